"""From the arguments of a public function to what an engine takes: checked tensors and one options object.

``functional`` (fused) and ``reference`` (plain) both build their inputs here. A call that one of them refuses is
therefore refused by the other, with the same message. The loss of the call is checked in ``loss_calls``.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from . import checks
from .engines import backends
from .engines.layout import compute_dtype, gemm_dtype
from .engines.options import HiddenOptions, LogitOptions, Needs
from .token_weights import row_weights


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
    # factors of the rows' log-probabilities in their sequences' sums, shaped as labels; 0 where a row predicts nothing
    token_weights: torch.Tensor | None = None

    @property
    def logit_options(self) -> LogitOptions:
        return self.options

    @property
    def policy(self) -> torch.Tensor:
        """The policy's rows: [B, T, V], or [N, V] packed."""
        return self.logits

    @property
    def vocab_size(self) -> int:
        return self.logits.shape[-1]

    @property
    def references(self) -> dict[str, torch.Tensor | None]:
        """The reference model by the names of its arguments."""
        return {"ref_logits": self.ref_logits, "ref_logps": self.ref_logps}


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
    token_weights: torch.Tensor | None = None  # as in ``LogitInputs``

    @property
    def logit_options(self) -> LogitOptions:
        return self.options.logits

    @property
    def policy(self) -> torch.Tensor:
        return self.hidden

    @property
    def vocab_size(self) -> int:
        return len(self.weight)

    @property
    def references(self) -> dict[str, torch.Tensor | None]:
        return {"ref_hidden": self.reference.hidden, "ref_logps": self.reference.logps}


class TokenLogpInputs(NamedTuple):
    """The checked arguments of a loss of the tokens' log-probabilities."""

    logps: torch.Tensor  # [B, T], or [N] packed
    labels: torch.Tensor  # the shape of logps
    cu_seqlens: torch.Tensor | None  # [B+1]; None unless packed
    num_sequences: int  # B
    options: LogitOptions
    ref_logps: torch.Tensor | None = None  # [B], detached
    token_weights: torch.Tensor | None = None  # as in ``LogitInputs``

    @property
    def logit_options(self) -> LogitOptions:
        return self.options

    @property
    def policy(self) -> torch.Tensor:
        return self.logps[..., None]

    @property
    def vocab_size(self) -> int:
        return 2**31 - 1  # the labels only say which tokens count: any token id will do

    @property
    def references(self) -> dict[str, torch.Tensor | None]:
        return {"ref_logps": self.ref_logps}


TokenInputs = LogitInputs | HiddenInputs | TokenLogpInputs


def from_logits(
    name: str,
    logits: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *,
    ref_logits: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    **options: object,
) -> LogitInputs:
    """Check a call from logits, which error messages call ``name``. ``options`` are those of ``LogitOptions``."""
    rows, labels, cu_seqlens, num_sequences = checks.logits_and_labels(name, logits, labels, cu_seqlens)
    checked_options = _logit_options(name, logits, **options)
    if ref_logits is not None:
        checks.ref_logits(ref_logits, logits)
        ref_logits = checks.logits_and_labels("ref_logits", ref_logits.detach(), labels, cu_seqlens).values
    ref_logps = _ref_logps(ref_logps, num_sequences, rows)
    weights = row_weights(token_weights, labels, cu_seqlens, checked_options, compute_dtype(rows))
    return LogitInputs(rows, labels, cu_seqlens, num_sequences, checked_options, ref_logits, ref_logps, weights)


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
    token_weights: torch.Tensor | None = None,
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
    weights = row_weights(token_weights, labels, cu_seqlens, logit_options, hidden_options.compute_dtype)
    return HiddenInputs(
        rows, lm_head_weight, lm_head_bias, labels, cu_seqlens, num_sequences, hidden_options, reference, weights
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


def from_token_logps(
    policy_logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    *,
    labels: torch.Tensor | None,
    mask: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    backend: str | None,
) -> TokenLogpInputs:
    """Check log-probabilities of tokens, [B, T] or packed [N], and the labels or the mask that say which count."""
    if (labels is None) == (mask is None):
        came = "neither" if labels is None else "both"
        raise TypeError(
            "a loss of tokens needs labels or mask, which say which entries of policy_logps count: expected one, got "
            f"{came}"
        )
    checks.tensor("policy_logps", policy_logps, checks.FLOAT_DTYPES, checks.A_FLOAT)
    if policy_logps.ndim != (2 if cu_seqlens is None else 1):
        expected = "[B, T]" if cu_seqlens is None else "[N] with cu_seqlens"
        raise ValueError(
            f"policy_logps must be the tokens' log-probabilities {expected}, got shape {list(policy_logps.shape)}"
        )
    options = _logit_options(
        "policy_logps",
        policy_logps,
        ignore_index=-100,
        shift=mask is None,  # the entries of a mask are those of policy_logps
        temperature=1.0,
        logit_scale=1.0,
        logit_softcap=None,
        backend=backend,
    )
    if mask is not None:
        checks.token_mask("mask", mask, "policy_logps", policy_logps)
        checks.zero_or_one("mask", mask)
        labels = torch.where(mask != 0, 0, -100)
    rows = checks.rows_and_labels("policy_logps", policy_logps[..., None], labels, cu_seqlens, last="1")
    ref_logps = _ref_logps(ref_logps, rows.num_sequences, policy_logps)
    weights = row_weights(token_weights, rows.labels, rows.cu_seqlens, options, compute_dtype(policy_logps))
    return TokenLogpInputs(policy_logps, rows.labels, rows.cu_seqlens, rows.num_sequences, options, ref_logps, weights)


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
