"""From the arguments of a public function to what an engine takes: checked tensors and one options object.

``functional`` (fused) and ``reference`` (plain) both build their inputs here. A call that one of them refuses is
therefore refused by the other, with the same message.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from . import checks
from .engines import backends
from .engines.layout import MASKED, compute_dtype, gemm_dtype, row_sequences, row_targets
from .engines.logits import sums_over_labels
from .engines.options import HiddenOptions, LogitOptions, Needs
from .heads.base import check_reference


class LogitInputs(NamedTuple):
    """The checked arguments of a call from logits. The reference model is given by logits, by log-probabilities, or
    not at all.
    """

    logits: torch.Tensor  # [B, T, V], or [N, V] packed
    labels: torch.Tensor  # [B, T], or [N] packed
    cu_seqlens: torch.Tensor | None  # [B+1]; None unless packed
    num_sequences: int  # B
    options: LogitOptions
    ref_logits: torch.Tensor | None = None  # the shape of logits, detached
    ref_logps: torch.Tensor | None = None  # [B], detached


class HiddenReference(NamedTuple):
    """The reference model: hidden states and their LM head, or log-probabilities, or nothing. All detached."""

    hidden: torch.Tensor | None = None  # [B, T, H_ref], or [N, H_ref] packed
    weight: torch.Tensor | None = None  # [V, H_ref]
    bias: torch.Tensor | None = None  # [V]
    logps: torch.Tensor | None = None  # [B]


class HiddenInputs(NamedTuple):
    """The checked arguments of a call from hidden states."""

    hidden: torch.Tensor  # [B, T, H], or [N, H] packed
    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None  # [V]
    labels: torch.Tensor  # [B, T], or [N] packed
    cu_seqlens: torch.Tensor | None  # [B+1]; None unless packed
    num_sequences: int  # B
    options: HiddenOptions
    reference: HiddenReference


class LogpInputs(NamedTuple):
    """The checked arguments of a loss of log-probabilities, with the loss's head and its tensors."""

    policy_logps: torch.Tensor  # [B]
    ref_logps: torch.Tensor | None  # [B], detached
    token_counts: torch.Tensor | None  # [B]
    head: Any
    head_tensors: tuple[torch.Tensor | None, ...]


def from_logits(
    name: str,
    logits: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *,
    ref_logits: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    **options: object,
) -> LogitInputs:
    """Check a call from logits, which error messages call ``name``. ``options`` are those of ``LogitOptions``."""
    rows, labels, cu_seqlens, num_sequences = checks.logits_and_labels(name, logits, labels, cu_seqlens)
    checked_options = _logit_options(name, logits, **options)
    if ref_logits is not None:
        checks.ref_logits(ref_logits, logits)
        ref_logits = checks.logits_and_labels("ref_logits", ref_logits.detach(), labels, cu_seqlens).values
    ref_logps = _ref_logps(ref_logps, num_sequences, rows)
    return LogitInputs(rows, labels, cu_seqlens, num_sequences, checked_options, ref_logits, ref_logps)


def from_hidden(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    lm_head_bias: torch.Tensor | None,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *,
    chunk_bytes: object,
    ref_hidden: torch.Tensor | None = None,
    ref_lm_head_weight: torch.Tensor | None = None,
    ref_lm_head_bias: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    per_position: bool = False,
    **options: object,
) -> HiddenInputs:
    """Check a call from hidden states. ``options`` are those of ``LogitOptions``.

    ``per_position`` asks the engine for each position's own log-probability instead of each sequence's.
    """
    rows, labels, cu_seqlens, num_sequences = checks.rows_and_labels("hidden", hidden, labels, cu_seqlens, last="H")
    checks.lm_head("lm_head_weight", lm_head_weight, "lm_head_bias", lm_head_bias, "hidden", hidden)
    logit_options = _logit_options("hidden", hidden, **options)
    checks.integer("chunk_bytes", chunk_bytes, at_least=1)
    checks.ref_lm_head(ref_hidden, ref_lm_head_weight, ref_lm_head_bias)
    ref_logps = _ref_logps(ref_logps, num_sequences, rows)
    reference = HiddenReference(logps=ref_logps)
    if ref_hidden is not None:
        checks.ref_hidden(ref_hidden, hidden)
        weight, bias = checks.reference_head(
            lm_head_weight, lm_head_bias, ref_lm_head_weight, ref_lm_head_bias, ref_hidden
        )
        bias = None if bias is None else bias.detach()
        ref_rows = ref_hidden.detach().reshape(*rows.shape[:-1], ref_hidden.shape[-1])
        reference = HiddenReference(ref_rows, weight.detach(), bias, ref_logps)
    trainable = (hidden, lm_head_weight, lm_head_bias)
    hidden_options = HiddenOptions(
        logits=logit_options,
        dtype=gemm_dtype(hidden),
        ref_dtype=gemm_dtype(hidden if ref_hidden is None else ref_hidden),
        chunk_bytes=int(chunk_bytes),
        needs=Needs(*[x is not None and torch.is_grad_enabled() and x.requires_grad for x in trainable]),
        per_position=per_position,
    )
    return HiddenInputs(
        rows, lm_head_weight, lm_head_bias, labels, cu_seqlens, num_sequences, hidden_options, reference
    )


def of_reference(inputs: HiddenInputs) -> HiddenInputs:
    """The call that gives the reference model's log-probabilities: its hidden states and LM head, no gradient."""
    reference = inputs.reference
    options = replace(inputs.options, dtype=inputs.options.ref_dtype, needs=Needs())
    return inputs._replace(
        hidden=reference.hidden,
        weight=reference.weight,
        bias=reference.bias,
        options=options,
        reference=HiddenReference(),
    )


def token_counts(inputs: LogitInputs) -> torch.Tensor:
    """The number of completion tokens of each sequence. [B] int64"""
    targets = row_targets(
        inputs.labels, inputs.cu_seqlens, vocab_size=inputs.logits.shape[-1], **inputs.options.labelling
    )
    is_token = targets != MASKED
    if inputs.cu_seqlens is None:
        return is_token.sum(-1)
    return is_token.new_zeros(inputs.num_sequences, dtype=torch.int64).index_add_(
        0, row_sequences(inputs.cu_seqlens, len(targets)), is_token.long()
    )


def from_logps(
    head_type: type,
    policy_logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    *,
    token_counts: torch.Tensor | None = None,
    average_log_prob: object = False,
    backend: str | None,
    **head_options: object,
) -> LogpInputs:
    """Check a call from log-probabilities. ``head_options`` are those of ``head_type.prepare``."""
    checks.policy_logps(policy_logps)
    checks.flag("average_log_prob", average_log_prob)
    head, head_tensors = head_type.prepare(
        policy_logps,
        policy_logps.numel(),
        average_log_prob=average_log_prob,
        loss_dtype=compute_dtype(policy_logps),
        backend=backends.resolve(backend, policy_logps.device),
        **head_options,
    )
    head.check_logps(policy_logps, ref_logps, token_counts, average_log_prob)
    return LogpInputs(policy_logps, None if ref_logps is None else ref_logps.detach(), token_counts, head, head_tensors)


def loss_head(
    head_type: type, inputs: LogitInputs | HiddenInputs, **head_options: object
) -> tuple[Any, tuple[torch.Tensor | None, ...]]:
    """Check the options of a loss from logits or hidden states. Returns its head and the head's tensors."""
    if isinstance(inputs, LogitInputs):
        policy, options = inputs.logits, inputs.options
        references = {"ref_logits": inputs.ref_logits, "ref_logps": inputs.ref_logps}
    else:
        policy, options = inputs.hidden, inputs.options.logits
        references = {"ref_hidden": inputs.reference.hidden, "ref_logps": inputs.reference.logps}
    if "tensors" in head_options:
        head_options["tensors"] = _with_sums(inputs, options, **head_options)
    head, head_tensors = head_type.prepare(
        policy,
        inputs.num_sequences,
        average_log_prob=options.average_log_prob,
        loss_dtype=compute_dtype(policy),
        backend=options.backend,
        **head_options,
    )
    check_reference(head, **references)
    if getattr(head, "statistics", ()):
        head.check_statistics()
    return head, head_tensors


def _with_sums(
    inputs: LogitInputs | HiddenInputs,
    options: LogitOptions,
    *,
    loss: Any,
    tensors: dict[str, torch.Tensor],
    **_: object,
) -> dict[str, torch.Tensor]:
    """Sum those of ``loss.summed_tensors`` that came per token over each sequence's completion tokens."""
    shape, summed = inputs.labels.shape, dict(tensors)
    vocab_size = inputs.logits.shape[-1] if isinstance(inputs, LogitInputs) else len(inputs.weight)
    for name in loss.summed_tensors:
        value = tensors.get(name)
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape == (inputs.num_sequences,):
            continue
        checks.tensor(name, value, checks.FLOAT_DTYPES, checks.A_FLOAT)
        if value.ndim == 2 and value.shape[0] == 1 and inputs.cu_seqlens is not None:
            value = value[0]
        if value.shape != shape:
            raise ValueError(
                f"{name} has shape {list(value.shape)}, expected [{inputs.num_sequences}], one per sequence, or "
                f"labels' shape {list(shape)}, one per token"
            )
        checks.same_device(name, value, "labels", inputs.labels)
        layout = inputs.num_sequences, vocab_size, *options.labelling.values(), options.backend
        summed[name] = sums_over_labels(value.detach(), inputs.labels, inputs.cu_seqlens, *layout)
    return summed


def with_statistics(inputs: LogitInputs | HiddenInputs, head: Any) -> LogitInputs | HiddenInputs:
    """Let the row pass find what the head asks for."""
    if "log_sum_squares" not in getattr(head, "statistics", ()):
        return inputs
    if isinstance(inputs, LogitInputs):
        return inputs._replace(options=replace(inputs.options, sum_squares=True))
    logits = replace(inputs.options.logits, sum_squares=True)
    return inputs._replace(options=replace(inputs.options, logits=logits))


def _logit_options(
    name: str,
    values: torch.Tensor,
    *,
    ignore_index: object,
    shift: object,
    temperature: object,
    logit_scale: object,
    logit_softcap: object,
    backend: str | None,
    average_log_prob: object = False,
    inplace_backward: object = False,
) -> LogitOptions:
    """Check the options of logits or hidden states ``values`` and choose their backend."""
    checks.integer("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit in a signed 64-bit integer, as labels do, got {ignore_index}")
    checks.flag("shift", shift)
    checks.flag("average_log_prob", average_log_prob)
    checks.flag("inplace_backward", inplace_backward)
    checks.number("temperature", temperature, above=0)
    checks.number("logit_scale", logit_scale, above=0)
    if logit_softcap is not None:
        checks.number("logit_softcap", logit_softcap, above=0)
    if inplace_backward:
        checks.inplace(name, values)
    # Python's own numbers: NumPy's float32 would round what is computed from it
    return LogitOptions(
        ignore_index=int(ignore_index),
        shift=shift,
        average_log_prob=average_log_prob,
        temperature=float(temperature),
        logit_scale=float(logit_scale),
        logit_softcap=None if logit_softcap is None else float(logit_softcap),
        inplace_backward=inplace_backward,
        backend=backends.resolve(backend, values.device),
    )


def _ref_logps(ref_logps: torch.Tensor | None, num_sequences: int, policy: torch.Tensor) -> torch.Tensor | None:
    if ref_logps is None:
        return None
    checks.per_sequence("ref_logps", ref_logps, checks.FLOAT_DTYPES, checks.A_FLOAT, num_sequences, policy)
    return ref_logps.detach()
