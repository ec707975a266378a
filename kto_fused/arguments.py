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
from .heads.base import check_reference, weighted
from .heads.formula import ANY_DTYPE
from .heads.protocol import Head, ld_alpha_of, level_of


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


class LogpInputs(NamedTuple):
    """The checked arguments of a loss of log-probabilities, with the loss's head and its tensors."""

    policy_logps: torch.Tensor  # [B]
    ref_logps: torch.Tensor | None  # [B], detached
    token_counts: torch.Tensor | None  # [B]
    head: Any
    head_tensors: tuple[torch.Tensor | None, ...]


class TokenLogpInputs(NamedTuple):
    """The checked arguments of a loss of the tokens' log-probabilities."""

    logps: torch.Tensor  # [B, T], or [N] packed
    labels: torch.Tensor  # the shape of logps
    cu_seqlens: torch.Tensor | None  # [B+1]; None unless packed
    num_sequences: int  # B
    options: LogitOptions
    ref_logps: torch.Tensor | None = None  # [B], detached
    token_weights: torch.Tensor | None = None  # as in ``LogitInputs``


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
    inputs = LogitInputs(rows, labels, cu_seqlens, num_sequences, checked_options, ref_logits, ref_logps)
    return _with_token_weights(inputs, token_weights)


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
    inputs = HiddenInputs(
        rows, lm_head_weight, lm_head_bias, labels, cu_seqlens, num_sequences, hidden_options, reference
    )
    return _with_token_weights(inputs, token_weights)


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
    is_token = _predicts(inputs.labels, inputs.cu_seqlens, inputs.options)
    return _counts(is_token, inputs.cu_seqlens)


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
            f"a loss of tokens needs labels or mask, which say what of policy_logps counts: expected one, got {came}"
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
    # the labels' own values do not matter
    rows = checks.rows_and_labels("policy_logps", policy_logps[..., None], labels, cu_seqlens, last="1")
    ref_logps = _ref_logps(ref_logps, rows.num_sequences, policy_logps)
    inputs = TokenLogpInputs(
        policy_logps, rows.labels, rows.cu_seqlens, rows.num_sequences, options, ref_logps=ref_logps
    )
    return _with_token_weights(inputs, token_weights)


# ---- weights of tokens ----------------------------------------------------------------------------------------------

TokenInputs = LogitInputs | HiddenInputs | TokenLogpInputs


def predicting_rows(inputs: TokenLogpInputs) -> torch.Tensor:
    """Return which rows predict a completion token, bool, shaped as the labels."""
    return _predicts(inputs.labels, inputs.cu_seqlens, inputs.options)


def ld_token_weights(
    labels: torch.Tensor,
    ld_alpha: float,
    *,
    cu_seqlens: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
) -> torch.Tensor:
    """Token weights of LD-DPO (Liu et al. 2024, arXiv 2409.06411): 1 for the first min(n_w, n_l) completion tokens of
    both answers of a pair, ``ld_alpha`` for the longer answer's other tokens.

    A head's field ``ld_alpha`` applies them to the policy, and to a reference model that comes as hidden states or
    logits. Use this function for log-probabilities that you compute beforehand:
    ``sequence_logps(ref_logits, labels, token_weights=ld_token_weights(labels, ld_alpha))``.

    Args:
        labels: [B, T] (or [N]) integer token ids; the batch's first half is chosen, its second half rejected.
        ld_alpha: in [0, 1].
        cu_seqlens, ignore_index, shift: as in ``fused_kto_loss``.

    Returns:
        float64, shaped as ``labels`` and aligned with them: entry t belongs to the token ``labels[:, t]``. Entries of
        tokens that no position predicts have no meaning.

    Raises:
        ValueError, TypeError: ``ld_alpha`` lies outside [0, 1], or the batch is odd.

    >>> import torch, kto_fused
    >>> labels = torch.tensor([[-100, 3, 4, 5], [-100, 7, -100, -100]])
    >>> kto_fused.ld_token_weights(labels, 0.5)[0]
    tensor([1.0000, 1.0000, 0.5000, 0.5000], dtype=torch.float64)
    """
    checks.number("ld_alpha", ld_alpha, at_least=0)
    if ld_alpha > 1:
        raise ValueError(f"ld_alpha must lie in [0, 1], got {ld_alpha}")
    checks.tensor("labels", labels, checks.INTEGER_DTYPES, "integer token ids")
    rows = checks.rows_and_labels("labels", labels.double()[..., None], labels, cu_seqlens, last="1")
    if rows.num_sequences % 2:
        raise ValueError(f"pairs need an even batch, chosen then rejected; got {rows.num_sequences} sequences")
    options = LogitOptions(ignore_index=ignore_index, shift=shift)
    is_token = _predicts(rows.labels, rows.cu_seqlens, options)
    weights = _ld_weights(is_token, rows.cu_seqlens, float(ld_alpha), torch.float64)
    if shift:
        weights = weights.roll(1, -1)
        if cu_seqlens is None:
            weights[:, 0] = 1.0
    return weights.view(labels.shape)


def with_weights_of(
    inputs: TokenInputs, head: Any, tensors: dict[str, torch.Tensor]
) -> tuple[TokenInputs, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the inputs with the token weights that a loss and its tensors ask for, the loss's other tensors, and what
    its ``prepare`` gets beside them.

    ``ld_alpha`` and ``completion_mask`` multiply the ``token_weights`` of the call.
    """
    if not isinstance(head, Head):
        return inputs, tensors, {}
    level = level_of(head)
    if level == "token" and inputs.token_weights is not None:
        raise TypeError(
            f"token_weights multiply log-probabilities in a sequence's sum, and {head!r} reads single tokens: pass "
            "weights, one per label, which multiply the tokens' losses"
        )
    alpha, others, own = ld_alpha_of(head), dict(tensors), {}
    mask = others.pop("completion_mask", None) if level == "mixed" else None
    _check_statistics(head, alpha != 1 or inputs.token_weights is not None, mask is not None)
    if alpha == 1 and mask is None:
        return inputs, others, own
    options = inputs.options.logits if isinstance(inputs, HiddenInputs) else inputs.options
    is_token = _predicts(inputs.labels, inputs.cu_seqlens, options)
    if mask is not None:
        mask = _like_labels(mask, inputs.labels)
        checks.token_mask("completion_mask", mask, "labels", inputs.labels)
        checks.zero_or_one("completion_mask", mask)
        is_token = is_token & _of_rows(mask != 0, options.shift)
        own["completion_counts"] = _counts(is_token, inputs.cu_seqlens)
    dtype = _weights_dtype(inputs)
    weights = is_token.to(dtype)
    if alpha != 1:
        if inputs.num_sequences % 2:
            raise ValueError(f"pairs need an even batch, chosen then rejected; got {inputs.num_sequences} sequences")
        weights = weights * _ld_weights(is_token, inputs.cu_seqlens, alpha, dtype)
    if inputs.token_weights is not None:
        weights = weights * inputs.token_weights
    return inputs._replace(token_weights=weights), others, own


def _check_statistics(head: Head, is_weighted: bool, is_masked: bool) -> None:
    """Refuse row statistics of sequences whose tokens they would not be of."""
    for _, leaf in head.leaves():
        if leaf.level == "token" or not leaf.statistics():
            continue
        if is_masked:
            raise ValueError(
                f"completion_mask came for {leaf!r}, which reads {list(leaf.statistics())}: these are means over all "
                "labelled tokens, not over those of the mask"
            )
        if is_weighted and getattr(leaf, "use_weighting", False):
            raise ValueError(
                f"{leaf!r} weights pairs by their plain log-probabilities (use_weighting), and ld_alpha or "
                "token_weights make them weighted ones: take one of the two"
            )


def refuse_ld_alpha(head: Any) -> None:
    """Refuse a loss of sums that the caller has, if its field ``ld_alpha`` asks for weighted ones."""
    if isinstance(head, Head) and ld_alpha_of(head) != 1:
        raise ValueError(
            f"ld_alpha={ld_alpha_of(head)} weights tokens, and policy_logps are sums already: take ld_alpha=1, and sum "
            "with token_weights=ld_token_weights(labels, ld_alpha)"
        )


def _with_token_weights(inputs: TokenInputs, token_weights: torch.Tensor | None) -> TokenInputs:
    """Return the inputs with ``token_weights``, which came aligned with the labels."""
    if token_weights is None:
        return inputs
    options = inputs.options.logits if isinstance(inputs, HiddenInputs) else inputs.options
    token_weights = _like_labels(token_weights, inputs.labels)
    checks.tensor("token_weights", token_weights, ANY_DTYPE, "bool, integer or floating-point")
    checks.shaped_like("token_weights", token_weights, "labels", inputs.labels)
    weights = _of_rows(token_weights.detach().to(_weights_dtype(inputs)), options.shift)
    weights = torch.where(_predicts(inputs.labels, inputs.cu_seqlens, options), weights, 0.0)
    checks.not_negative("token_weights", weights)
    return inputs._replace(token_weights=weights)


def _weights_dtype(inputs: TokenInputs) -> torch.dtype:
    if isinstance(inputs, HiddenInputs):
        return inputs.options.compute_dtype
    return compute_dtype(inputs[0])


def _like_labels(value: Any, labels: torch.Tensor) -> Any:
    """Return a packed tensor [1, N] as [N]."""
    if isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[0] == 1 and labels.ndim == 1:
        return value[0]
    return value


def _of_rows(values: torch.Tensor, shift: bool) -> torch.Tensor:
    """Return each row's value of the label that it predicts. A row that predicts nothing may get any value."""
    return values.roll(-1, -1) if shift else values


def _predicts(labels: torch.Tensor, cu_seqlens: torch.Tensor | None, options: LogitOptions) -> torch.Tensor:
    """Return which rows predict a completion token, shaped as the labels."""
    # the vocabulary's size decides which labels are invalid, not which are masked
    return row_targets(labels, cu_seqlens, vocab_size=1, **options.labelling) != MASKED


def _sequence_of_rows(cu_seqlens: torch.Tensor, num_rows: int) -> torch.Tensor:
    # clamp: offsets may be wrong, which the engine finds
    return row_sequences(cu_seqlens, num_rows).clamp(0, len(cu_seqlens) - 2)


def _counts(is_token: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    if cu_seqlens is None:
        return is_token.sum(-1)
    sequence = _sequence_of_rows(cu_seqlens, len(is_token))
    return sequence.new_zeros(len(cu_seqlens) - 1, dtype=torch.int64).index_add_(0, sequence, is_token.long())


def _ld_weights(
    is_token: torch.Tensor, cu_seqlens: torch.Tensor | None, ld_alpha: float, dtype: torch.dtype
) -> torch.Tensor:
    """Return 1 for the rows of a pair's first min(n_w, n_l) completion tokens, else ``ld_alpha``."""
    counts, seen = _counts(is_token, cu_seqlens), is_token.cumsum(-1)
    chosen, rejected = counts.chunk(2)
    shared = torch.minimum(chosen, rejected).repeat(2)
    if cu_seqlens is None:
        is_shared = seen <= shared[:, None]
    else:
        sequence = _sequence_of_rows(cu_seqlens, len(is_token))
        is_shared = seen - (counts.cumsum(0) - counts)[sequence] <= shared[sequence]
    return torch.ones(is_shared.shape, dtype=dtype, device=is_shared.device).masked_fill(~is_shared, ld_alpha)


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
    head_type: type, inputs: TokenInputs, **head_options: object
) -> tuple[Any, tuple[torch.Tensor | None, ...]]:
    """Check the options of a loss from logits, hidden states or tokens. Returns its head and the head's tensors."""
    if isinstance(inputs, LogitInputs):
        policy, options = inputs.logits, inputs.options
        references = {"ref_logits": inputs.ref_logits, "ref_logps": inputs.ref_logps}
    elif isinstance(inputs, TokenLogpInputs):
        policy, options = inputs.logps[..., None], inputs.options
        references = {"ref_logps": inputs.ref_logps}
    else:
        policy, options = inputs.hidden, inputs.options.logits
        references = {"ref_hidden": inputs.reference.hidden, "ref_logps": inputs.reference.logps}
    if "tensors" in head_options:
        summed = _with_sums(inputs, options, **head_options)
        # beside losses of tokens, which get their own tensors as they came
        head_options["sequence_tensors" if level_of(head_options["loss"]) == "mixed" else "tensors"] = summed
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
        if isinstance(inputs, TokenLogpInputs):
            raise TypeError(
                f"{head.loss_name} reads the row statistics {list(head.statistics)}, which log-probabilities do not "
                "tell: take fused_loss or fused_linear_loss"
            )
        head.check_statistics()
    return head, head_tensors


def _with_sums(
    inputs: TokenInputs,
    options: LogitOptions,
    *,
    loss: Any,
    tensors: dict[str, torch.Tensor],
    **_: object,
) -> dict[str, torch.Tensor]:
    """Sum those of ``loss.summed_tensors`` that came per token over each sequence's completion tokens, times the
    token weights.
    """
    shape, summed = inputs.labels.shape, dict(tensors)
    if isinstance(inputs, TokenLogpInputs):
        vocab_size = 2**31 - 1  # the labels' own values do not matter
    else:
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
        value = value.detach()
        if inputs.token_weights is not None:
            weights = inputs.token_weights.roll(1, -1) if options.shift else inputs.token_weights
            value = weighted(value, weights.to(compute_dtype(value)))
        layout = inputs.num_sequences, vocab_size, *options.labelling.values(), options.backend
        summed[name] = sums_over_labels(value, inputs.labels, inputs.cu_seqlens, *layout)
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
