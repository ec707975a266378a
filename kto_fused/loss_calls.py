"""A loss between the checked arguments of its call and its engine: what ``functional`` and ``reference`` share.

``of_loss`` takes any loss, ``of_head`` a kind of head with its options, and ``of_logps`` the log-probabilities of
sequences. They check the loss's options and tensors, and return what an engine or a twin computes.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from . import checks, token_weights
from .arguments import HiddenInputs, LogitInputs, TokenInputs, TokenLogpInputs
from .engines import backends
from .engines.layout import compute_dtype
from .engines.logits import sums_over_labels
from .heads.base import REDUCTIONS, check_reference, reduce, weighted
from .heads.formula import FormulaHead
from .heads.mixed_formula import MixedFormulaHead
from .heads.protocol import Head, as_loss, ld_alpha_of, level_of
from .heads.token_formula import TokenFormulaHead
from .metrics import LossMetrics

Loss = Head | Callable[..., torch.Tensor]


class LossCall(NamedTuple):
    """A loss of tokens' log-probabilities, which come from logits, hidden states or the caller."""

    inputs: TokenInputs  # with the token weights and the row statistics that the loss asks for
    head: Any = None  # see ``heads.base``; None: the loss is ``function``
    head_tensors: tuple[torch.Tensor | None, ...] = ()
    function: Callable[..., torch.Tensor] | None = None  # of sequences' log-probabilities, for ``plain_loss``


class LogpCall(NamedTuple):
    """A loss of sequences' log-probabilities that the caller has."""

    policy_logps: torch.Tensor  # [B]
    ref_logps: torch.Tensor | None  # [B], detached
    token_counts: torch.Tensor | None  # [B]
    head: Any
    head_tensors: tuple[torch.Tensor | None, ...]


def of_loss(
    inputs: TokenInputs,
    head: Loss | str,
    tensors: dict[str, torch.Tensor],
    reduction: str,
    *,
    uses_kernels: bool = True,
) -> LossCall:
    """Check any loss's tensors and return its call. Without ``uses_kernels``, a loss's formula is its definition."""
    loss = as_loss(head)
    # a head that is not registered is called as a function, but its fields have their meaning
    described = head if isinstance(head, Head) else loss
    if not isinstance(described, Head):
        return LossCall(inputs, function=loss)
    level, tensors = level_of(described), dict(tensors)
    completion_mask = tensors.pop("completion_mask", None) if level == "mixed" else None
    inputs, completion_counts = _with_weights_of(described, inputs, completion_mask)
    if not isinstance(loss, Head):
        return LossCall(inputs, function=loss)
    if level == "token":
        return of_head(TokenFormulaHead, inputs, loss=loss, tensors=tensors, reduction=reduction)
    fast = loss.fast_options(tensors) if uses_kernels and level == "sequence" else None
    if fast is not None:
        head_type, options = fast
        return of_head(head_type, inputs, reduction=reduction, **options)
    summed = _summed(inputs, loss, tensors)
    if level == "sequence":
        return of_head(FormulaHead, inputs, loss=loss, tensors=summed, reduction=reduction)
    options = {"tensors": tensors, "sequence_tensors": summed, "completion_counts": completion_counts}
    return of_head(MixedFormulaHead, inputs, loss=loss, reduction=reduction, **options)


def of_head(head_type: type, inputs: TokenInputs, **head_options: object) -> LossCall:
    """Check the options of a kind of head, those of ``head_type.prepare``, and return its call."""
    options = inputs.logit_options
    head, head_tensors = head_type.prepare(
        inputs.policy,
        inputs.num_sequences,
        average_log_prob=options.average_log_prob,
        loss_dtype=compute_dtype(inputs.policy),
        backend=options.backend,
        **head_options,
    )
    check_reference(head, **inputs.references)
    statistics = getattr(head, "statistics", ())
    if statistics:
        if isinstance(inputs, TokenLogpInputs):
            raise TypeError(
                f"{head.loss_name} reads the row statistics {list(statistics)}, which log-probabilities do not "
                "tell: take fused_loss or fused_linear_loss"
            )
        head.check_statistics()
        if "log_sum_squares" in statistics:
            inputs = _with_sum_squares(inputs)
    return LossCall(inputs, head, head_tensors)


def of_logps(
    head_type: type,
    policy_logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    *,
    token_counts: torch.Tensor | None = None,
    average_log_prob: object = False,
    backend: str | None,
    **head_options: object,
) -> LogpCall:
    """Check log-probabilities of sequences and the options of a kind of head, and return its call."""
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
    return LogpCall(policy_logps, None if ref_logps is None else ref_logps.detach(), token_counts, head, head_tensors)


def takes_token_logps(loss: Loss, token_counts: object) -> bool:
    """Whether ``loss_from_logps`` gets the tokens' log-probabilities for this loss."""
    if not isinstance(loss, Head) or level_of(loss) == "sequence":
        return False
    if token_counts is not None:
        raise TypeError(f"{loss!r} reads tokens, which labels or mask count: token_counts has no meaning")
    return True


def check_return_tokens(return_tokens: object, head: Loss | str) -> None:
    """Refuse to return the tokens' values beside a loss that does not read tokens alone."""
    checks.flag("return_tokens", return_tokens)
    loss = as_loss(head)
    if return_tokens and not (isinstance(loss, Head) and level_of(loss) == "token"):
        raise ValueError(f"return_tokens=True belongs to token-level heads, got {loss!r}: take linear_token_logps")


def tensors_of_sequences(
    head: Loss | str, token_arguments: dict[str, torch.Tensor | None], tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the tensors of a loss that ``loss_from_logps`` calls on sequences' log-probabilities.

    ``token_arguments`` are the function's own tensors for losses of tokens. A loss of sequences may declare a tensor
    of the same name, such as ``mask``; one that does not refuses it by name.
    """
    loss = head if isinstance(head, Head) else as_loss(head)
    if isinstance(loss, Head) and ld_alpha_of(loss) != 1:
        raise ValueError(
            f"ld_alpha={ld_alpha_of(loss)} weights tokens, and policy_logps are sums already: take ld_alpha=1, and sum "
            "with token_weights=ld_token_weights(labels, ld_alpha)"
        )
    return {**tensors, **{name: value for name, value in token_arguments.items() if value is not None}}


def plain_loss(
    function: Callable[..., torch.Tensor],
    logps: torch.Tensor,
    token_counts: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    tensors: dict[str, torch.Tensor],
    reduction: str,
    loss_dtype: torch.dtype,
) -> tuple[torch.Tensor, LossMetrics]:
    """Return the loss of a function that is not registered, under autograd, and its metrics."""
    checks.choice("reduction", reduction, REDUCTIONS)
    weights = tensors.get("weights")
    multiplies = weights is not None and "weights" not in inspect.signature(function).parameters
    if weights is not None:
        checks.tensor("weights", weights, checks.NUMBER_DTYPES, checks.A_NUMBER)
        checks.not_negative("weights", weights)
    if multiplies:
        tensors = {name: value for name, value in tensors.items() if name != "weights"}
    losses = function(logps.double(), token_counts, None if ref_logps is None else ref_logps.double(), **tensors)
    if multiplies:
        losses = weighted(losses, weights)
    if not isinstance(losses, torch.Tensor) or losses.ndim > 1:
        came = list(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
        raise ValueError(f"head must return losses of one dimension, or one number, got {came}")
    policy = logps.detach()
    rewards = policy if ref_logps is None else policy - ref_logps
    metrics = LossMetrics(
        logps=policy, ref_logps=ref_logps, rewards=rewards, token_counts=token_counts, is_paired=False
    )
    return reduce(losses, reduction).to(loss_dtype), metrics


# ---- what a loss asks of its inputs ---------------------------------------------------------------------------------


def _with_weights_of(
    loss: Head, inputs: TokenInputs, completion_mask: torch.Tensor | None
) -> tuple[TokenInputs, torch.Tensor | None]:
    """Multiply the token weights of the call by those of ``ld_alpha`` and ``completion_mask``.

    Returns the inputs, and the numbers of tokens [B] in the completion mask, None without a mask.
    """
    if level_of(loss) == "token" and inputs.token_weights is not None:
        raise TypeError(
            f"token_weights multiply log-probabilities in a sequence's sum, and {loss!r} reads single tokens: pass "
            "weights, one per label, which multiply the tokens' losses"
        )
    ld_alpha, labels, cu_seqlens = ld_alpha_of(loss), inputs.labels, inputs.cu_seqlens
    is_weighted = ld_alpha != 1 or inputs.token_weights is not None
    _check_statistics(loss, is_weighted, is_masked=completion_mask is not None)
    if ld_alpha == 1 and completion_mask is None:
        return inputs, None
    options, completion_counts = inputs.logit_options, None
    is_token = token_weights.completion_rows(labels, cu_seqlens, options)
    if completion_mask is not None:
        completion_mask = checks.without_packed_batch(completion_mask, labels.shape)
        checks.token_mask("completion_mask", completion_mask, "labels", labels)
        checks.zero_or_one("completion_mask", completion_mask)
        is_token = is_token & token_weights.from_labels_to_rows(completion_mask != 0, options.shift)
        completion_counts = token_weights.counts_of_rows(is_token, cu_seqlens)
    dtype = compute_dtype(inputs.policy)
    weights = is_token.to(dtype)
    if ld_alpha != 1:
        checks.pairs(inputs.num_sequences)
        weights = weights * token_weights.ld_row_weights(is_token, cu_seqlens, ld_alpha, dtype)
    if inputs.token_weights is not None:
        weights = weights * inputs.token_weights
    return inputs._replace(token_weights=weights), completion_counts


def _check_statistics(loss: Head, is_weighted: bool, is_masked: bool) -> None:
    """Refuse a loss of sequences whose row statistics would be of other tokens than its log-probabilities."""
    for _, part in loss.terms():
        if part.level == "token" or not part.statistics():
            continue
        if is_masked:
            raise ValueError(
                f"completion_mask came for {part!r}, which reads {list(part.statistics())}: these are means over all "
                "labelled tokens, not over those of the mask"
            )
        if is_weighted and getattr(part, "use_weighting", False):
            raise ValueError(
                f"{part!r} weights pairs by their plain log-probabilities (use_weighting), and ld_alpha or "
                "token_weights make them weighted ones: take one of the two"
            )


def _with_sum_squares(inputs: LogitInputs | HiddenInputs) -> LogitInputs | HiddenInputs:
    """Return the inputs of a row pass that finds log sum p^2 too."""
    logits = replace(inputs.logit_options, sum_squares=True)
    if isinstance(inputs, LogitInputs):
        return inputs._replace(options=logits)
    return inputs._replace(options=replace(inputs.options, logits=logits))


def _summed(inputs: TokenInputs, loss: Head, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors, with those of ``loss.summed_tensors`` that came per token summed over each sequence's
    completion tokens, times the token weights.
    """
    shape, options, summed = inputs.labels.shape, inputs.logit_options, dict(tensors)
    for name in loss.summed_tensors:
        value = tensors.get(name)
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape == (inputs.num_sequences,):
            continue
        checks.tensor(name, value, checks.FLOAT_DTYPES, checks.A_FLOAT)
        value = checks.without_packed_batch(value, shape)
        if value.shape != shape:
            raise ValueError(
                f"{name} has shape {list(value.shape)}, expected [{inputs.num_sequences}], one per sequence, or "
                f"labels' shape {list(shape)}, one per token"
            )
        checks.same_device(name, value, "labels", inputs.labels)
        value = value.detach()
        if inputs.token_weights is not None:
            weights = token_weights.from_rows_to_labels(inputs.token_weights, options.shift)
            value = weighted(value, weights.to(compute_dtype(value)))
        layout = inputs.num_sequences, inputs.vocab_size, *options.labelling.values(), options.backend
        summed[name] = sums_over_labels(value, inputs.labels, inputs.cu_seqlens, *layout)
    return summed
