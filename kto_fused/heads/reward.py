"""The losses of the two models that a policy-gradient method trains beside the policy: the reward and the value model.

All are plain PyTorch with autograd's own backward, so they have second derivatives.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import checks
from ..engines.backends import resolve
from ..engines.layout import check_offsets, compute_dtype
from .base import REDUCTIONS, reduce


def bradley_terry_loss(
    chosen_scores: torch.Tensor,
    rejected_scores: torch.Tensor,
    *,
    margin: torch.Tensor | float | None = None,
    centering: float = 0.0,
    reduction: str = "mean",
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The Bradley-Terry loss of a reward model's scores. Differentiable in both scores.

    For a pair whose chosen completion scores r_w and whose rejected one scores r_l, with margin m, centering c and the
    pair's weight w,

        loss = w [-log sigma(r_w - r_l - m) + c (r_w + r_l)^2]

    Sources: the loss Ouyang et al. 2022, arXiv 2203.02155; the margin Touvron et al. 2023 (Llama 2), arXiv 2307.09288;
    the centering term, which keeps the scores' mean near 0, Eisenstein et al. 2023, arXiv 2312.09244.

    Args:
        chosen_scores, rejected_scores: [P] float16, bfloat16, float32 or float64: the score of each pair's completions,
            read at the completion's last token.
        margin: how far apart the scores of a pair should be, a number or [P]. Never receives a gradient.
        centering: c >= 0.
        reduction: ``mean`` over the P pairs, whatever their weights; ``sum``; or ``none`` ([P]).
        weights: [P], >= 0. A pair of weight 0 contributes exactly 0 to loss and gradient, even if its scores and its
            margin are not finite. Never receives a gradient.

    Returns:
        The loss, float32 (float64 if a score is float64).

    Raises:
        ValueError, TypeError: an argument's shape, device, dtype or value is not as above; the message names it. A
            negative weight is found on a CPU alone, unless ``KTO_FUSED_VALIDATE=1`` lets the host read GPU tensors.

    >>> import torch, kto_fused
    >>> chosen, rejected = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([1.0, -1.0])
    >>> loss = kto_fused.bradley_terry_loss(chosen, rejected)
    >>> loss.backward()
    >>> round(loss.item(), 4), [round(x, 4) for x in chosen.grad.tolist()]
    (0.3709, [-0.25, -0.0237])
    """
    resolve(None, checks.tensor("chosen_scores", chosen_scores, checks.FLOAT_DTYPES, checks.A_FLOAT).device)
    if chosen_scores.ndim != 1 or chosen_scores.numel() == 0:
        raise ValueError(f"chosen_scores must be [P] with P >= 1, got shape {list(chosen_scores.shape)}")
    checks.tensor("rejected_scores", rejected_scores, checks.FLOAT_DTYPES, checks.A_FLOAT)
    checks.shaped_like("rejected_scores", rejected_scores, "chosen_scores", chosen_scores)
    margin, weights = _pair_options("chosen_scores", chosen_scores, margin, centering, reduction, weights)

    chosen, rejected = _in_one_dtype(chosen_scores, rejected_scores)
    if isinstance(margin, torch.Tensor):
        margin = margin.detach().to(chosen.dtype)  # another dtype would change that of the loss
    if weights is not None:
        # a pair of weight 0 may hold anything, and 0 times a NaN is a NaN
        is_out = weights == 0
        chosen, rejected = (x.masked_fill(is_out, 0.0) for x in (chosen, rejected))
        if isinstance(margin, torch.Tensor):
            margin = margin.masked_fill(is_out, 0.0)
    h = chosen - rejected
    if margin is not None:
        h = h - margin
    losses = -F.logsigmoid(h)
    if centering:
        losses = losses + float(centering) * (chosen + rejected) ** 2
    if weights is not None:
        losses = losses * weights.to(losses.dtype)
    return reduce(losses, reduction)


def _pair_options(
    like_name: str,
    like: torch.Tensor,
    margin: torch.Tensor | float | None,
    centering: float,
    reduction: str,
    weights: torch.Tensor | None,
) -> tuple[torch.Tensor | float | None, torch.Tensor | None]:
    """Check the options of pairs, of which ``like`` [P] has one entry each. Returns margin and weights."""
    if isinstance(margin, torch.Tensor):
        checks.tensor("margin", margin, checks.FLOAT_DTYPES, checks.A_FLOAT)
        checks.shaped_like("margin", margin, like_name, like)
    elif margin is not None:
        checks.number("margin", margin)
        margin = float(margin)  # Python's own number: from NumPy or ``fractions`` too
    checks.number("centering", centering, at_least=0)
    checks.choice("reduction", reduction, REDUCTIONS)
    if weights is not None:
        checks.tensor("weights", weights, checks.FLOAT_DTYPES, checks.A_FLOAT)
        checks.shaped_like("weights", weights, like_name, like)
        checks.not_negative("weights", weights)
        weights = weights.detach()
    return margin, weights


class RewardInputs(NamedTuple):
    """The checked arguments of ``linear_bradley_terry_loss``."""

    hidden: torch.Tensor  # [B, T, H], or [N, H] packed
    labels: torch.Tensor  # [B, T], or [N] packed
    cu_seqlens: torch.Tensor | None  # [B+1]; None unless packed
    margin: torch.Tensor | float | None
    weights: torch.Tensor | None  # [B/2]


def linear_bradley_terry_loss(
    hidden: torch.Tensor,
    score_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    score_bias: torch.Tensor | None = None,
    margin: torch.Tensor | float | None = None,
    centering: float = 0.0,
    reduction: str = "mean",
    weights: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Bradley-Terry loss of a reward model from its hidden states. Differentiable in hidden, weight and bias.

    The score of a completion is r = w . x + b, with x the hidden state at its last token. The loss is that of
    ``bradley_terry_loss``. Only the B hidden states at the last tokens are multiplied.

    Args:
        hidden: [B, T, H] float16, bfloat16, float32 or float64; [N, H] or [1, N, H] with ``cu_seqlens``. The first half
            of the B sequences is chosen, the second half rejected; sequence i belongs together with i + B/2.
        score_weight: [1, H] w, the weight of the reward model's linear layer, in the dtype of ``hidden``.
        labels: [B, T] (or [N]) integer token ids; ``ignore_index`` at prompt and padding positions. Only which
            positions hold ``ignore_index`` is read, so any mask of the completion serves.
        score_bias: [1] b.
        margin, centering, weights, reduction: as in ``bradley_terry_loss``, for the P = B/2 pairs. Nothing is read of a
            pair of weight 0.
        cu_seqlens: [B+1] int32 or int64 offsets of the packed sequences, from 0 to N.
        shift: the label at position t is the token that the hidden state at t belongs to, as Hugging Face models take
            labels; if False, it is the next token, whose hidden state stands at t + 1.

    Returns:
        The loss, float32 (float64 for float64 hidden states), and the detached scores [B], chosen then rejected. Scores
        are computed in the loss's dtype, also under autocast.

    Raises:
        ValueError, TypeError: an argument's shape, device, dtype or value is not as above; the message names it. A
            sequence without a completion token is refused. On a GPU its score is NaN instead, because a check would
            wait for the device; the environment variable ``KTO_FUSED_VALIDATE=1`` turns the check on there too.

    >>> import torch, kto_fused
    >>> hidden = torch.tensor([[[0.0], [1.0], [9.0]], [[0.0], [0.0], [-1.0]]], requires_grad=True)
    >>> labels = torch.tensor([[-100, 5, -100], [-100, 5, 6]])  # the first sequence ends in padding
    >>> loss, scores = kto_fused.linear_bradley_terry_loss(hidden, torch.tensor([[2.0]]), labels)
    >>> loss.backward()
    >>> round(loss.item(), 4), scores.tolist()
    (0.0181, [2.0, -2.0])
    """
    inputs = checked_reward_inputs(
        hidden,
        score_weight,
        labels,
        score_bias=score_bias,
        margin=margin,
        centering=centering,
        reduction=reduction,
        weights=weights,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        shift=shift,
    )
    rows = _last_hidden(inputs, ignore_index, shift)
    if inputs.weights is not None:  # an infinite hidden state times a gradient of 0 would be NaN
        rows = rows.masked_fill((inputs.weights == 0).repeat(2)[:, None], 0.0)
    dtype = compute_dtype(rows)
    with torch.autocast(rows.device.type, enabled=False):
        scores = (rows.to(dtype) @ score_weight.to(dtype).T)[:, 0]
    if score_bias is not None:
        scores = scores + score_bias.to(dtype)
    options = {"margin": inputs.margin, "centering": centering, "reduction": reduction, "weights": inputs.weights}
    return bradley_terry_loss(*scores.chunk(2), **options), scores.detach()


def checked_reward_inputs(
    hidden: torch.Tensor,
    score_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    score_bias: torch.Tensor | None,
    margin: torch.Tensor | float | None,
    centering: float,
    reduction: str,
    weights: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    ignore_index: int,
    shift: bool,
) -> RewardInputs:
    """Check the arguments of ``linear_bradley_terry_loss``."""
    rows = checks.rows_and_labels("hidden", hidden, labels, cu_seqlens, last="H")
    checks.lm_head("score_weight", score_weight, "score_bias", score_bias, "hidden", hidden)
    if len(score_weight) != 1:
        raise ValueError(f"score_weight must be [1, H], one score per completion, got shape {list(score_weight.shape)}")
    checks.integer("ignore_index", ignore_index)
    checks.flag("shift", shift)
    checks.pairs(rows.num_sequences)
    pairs = hidden.new_empty(rows.num_sequences // 2)
    margin, weights = _pair_options("the pairs", pairs, margin, centering, reduction, weights)
    return RewardInputs(rows.values, rows.labels, rows.cu_seqlens, margin, weights)


def no_token(sequence: int, ignore_index: int) -> str:
    return f"sequence {sequence} has no completion token to score: each of its labels is ignore_index={ignore_index}"


def past_the_end(sequence: int) -> str:
    return (
        f"with shift=False the last completion token of sequence {sequence} stands one position after its label, which "
        "is past the sequence's end: pass the hidden states of all tokens"
    )


def _last_hidden(inputs: RewardInputs, ignore_index: int, shift: bool) -> torch.Tensor:
    """Return the hidden states [B, H] at the sequences' last completion tokens; NaN where a sequence has none."""
    labels, cu_seqlens = inputs.labels, inputs.cu_seqlens
    num_rows, may_read = labels.numel(), checks.may_read_values(labels)
    if cu_seqlens is None:
        starts = torch.arange(labels.shape[0], device=labels.device) * labels.shape[1]
        ends = starts + labels.shape[1]
    else:
        if may_read:
            check_offsets(cu_seqlens, num_rows)
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    # the last completion token at or before each row; before the first row there is none
    rows = torch.arange(num_rows, device=labels.device)
    latest = torch.where(labels.reshape(-1) == ignore_index, -1, rows)
    latest = torch.cat([latest.new_full((1,), -1), latest]).cummax(0).values
    last = latest[ends.clamp(0, num_rows)]
    is_found = last >= starts
    if may_read and not is_found.all():
        (sequence, *_) = (~is_found).nonzero().flatten().tolist()
        raise ValueError(no_token(sequence, ignore_index))
    if not shift:
        last = last + 1
        is_found = is_found & (last < ends)
        if may_read and not is_found.all():
            (sequence, *_) = (~is_found).nonzero().flatten().tolist()
            raise ValueError(past_the_end(sequence))
    last = last.clamp(0, max(0, num_rows - 1))
    if cu_seqlens is None:  # no reshape: hidden states may be a view with free strides
        found = inputs.hidden[torch.arange(labels.shape[0], device=labels.device), last - starts]
    else:
        found = inputs.hidden[last]
    return torch.where(is_found[:, None], found, math.nan)


def value_loss(
    values: torch.Tensor,
    returns: torch.Tensor,
    *,
    old_values: torch.Tensor | None = None,
    clip: float | None = None,
    mask: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """PPO's loss of a value model: the squared error to the returns, clipped or plain. Differentiable in ``values``.

    With V_t the value of token t, R_t its return (``gae``), Vold_t its value when the tokens were sampled and e the
    clip range,

        loss_t = (V_t - R_t)^2                                                            without ``clip``
        loss_t = max((V_t - R_t)^2, (min(max(V_t, Vold_t - e), Vold_t + e) - R_t)^2)      with it

    The clipped loss has no gradient where V_t has moved from Vold_t towards R_t by more than e. Sources: the squared
    error Schulman et al. 2017, arXiv 1707.06347; its clipping is in that paper's code (OpenAI baselines), not in its
    text. There is no factor 1/2 here; baselines and verl put one in front, so halve the loss's coefficient to match.

    Args:
        values: float16, bfloat16, float32 or float64 of any shape, [B, T] or packed [N].
        returns: like ``values`` in shape. Never receives a gradient.
        old_values: like ``values`` in shape; with ``clip``. Never receives a gradient.
        clip: e > 0, in units of the values; with ``old_values``.
        mask: like ``values`` in shape, bool or integers 0 and 1: which positions hold a completion token. None: all.
            Nothing is read at the others, and their gradient is 0.
        reduction: ``mean`` over the tokens of the mask (0 if there is none), ``sum``, or ``none``: shaped like
            ``values``, 0 outside the mask. For a mean over all ranks or accumulated batches take ``sum`` and divide.

    Returns:
        The loss, float32 (float64 if ``values``, ``returns`` or ``old_values`` is float64).

    Raises:
        ValueError, TypeError: an argument's shape, device, dtype or value is not as above; the message names it. A mask
            that holds other numbers than 0 and 1 is found on a CPU alone, unless ``KTO_FUSED_VALIDATE=1`` lets the host
            read GPU tensors; elsewhere its loss is NaN.

    >>> import torch, kto_fused
    >>> values = torch.tensor([[1.0, 3.0, 9.0]], requires_grad=True)
    >>> returns, mask = torch.tensor([[2.0, 2.0, 2.0]]), torch.tensor([[True, True, False]])
    >>> loss = kto_fused.value_loss(values, returns, old_values=torch.zeros(1, 3), clip=0.5, mask=mask)
    >>> loss.backward()
    >>> loss.item(), values.grad.tolist()
    (2.25, [[0.0, 0.0, 0.0]])
    """
    resolve(None, checks.tensor("values", values, checks.FLOAT_DTYPES, checks.A_FLOAT).device)
    checks.tensor("returns", returns, checks.FLOAT_DTYPES, checks.A_FLOAT)
    checks.shaped_like("returns", returns, "values", values)
    if (old_values is None) != (clip is None):
        came, missing = ("clip", "old_values") if old_values is None else ("old_values", "clip")
        raise ValueError(f"{came} came without {missing}: expected both or neither")
    if clip is not None:
        checks.tensor("old_values", old_values, checks.FLOAT_DTYPES, checks.A_FLOAT)
        checks.shaped_like("old_values", old_values, "values", values)
        checks.number("clip", clip, above=0)
    checks.choice("reduction", reduction, REDUCTIONS)
    if mask is not None:
        checks.token_mask("mask", mask, "values", values)
        checks.zero_or_one("mask", mask)

    values, returns, old_values = _in_one_dtype(values, returns.detach(), old_values)
    if mask is not None:
        # a masked position may hold anything, and 0 times a NaN is a NaN
        values, returns = (x.masked_fill(mask == 0, 0.0) for x in (values, returns))
    losses = (values - returns) ** 2
    if clip is not None:
        old_values = old_values.detach()
        if mask is not None:
            old_values = old_values.masked_fill(mask == 0, 0.0)
        clip = float(clip)  # from NumPy too
        clipped = torch.clamp(values, old_values - clip, old_values + clip)
        losses = torch.maximum(losses, (clipped - returns) ** 2)
    if mask is not None:
        losses = losses.masked_fill((mask != 0) & (mask != 1), math.nan)
    if reduction == "mean":
        num_tokens = max(1, losses.numel()) if mask is None else (mask != 0).sum().clamp(min=1)
        return losses.sum() / num_tokens
    return reduce(losses, reduction)


def _in_one_dtype(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Return the tensors in float64 if one of them is float64, else in float32."""
    is_exact = any(x is not None and x.dtype == torch.float64 for x in tensors)
    dtype = torch.float64 if is_exact else torch.float32
    return [None if x is None else x.to(dtype) for x in tensors]
