"""The losses of the two models that a policy-gradient method trains beside the policy: the reward and the value model.

Both are plain PyTorch with autograd's own backward, so they have second derivatives and need no twin.
"""

import math

import torch
import torch.nn.functional as F

from .. import checks
from ..engines.backends import resolve
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
    if isinstance(margin, torch.Tensor):
        checks.tensor("margin", margin, checks.FLOAT_DTYPES, checks.A_FLOAT)
        checks.shaped_like("margin", margin, "chosen_scores", chosen_scores)
    elif margin is not None:
        checks.number("margin", margin)
        margin = float(margin)  # Python's own number: from NumPy or ``fractions`` too
    checks.number("centering", centering, at_least=0)
    checks.choice("reduction", reduction, REDUCTIONS)
    if weights is not None:
        checks.tensor("weights", weights, checks.FLOAT_DTYPES, checks.A_FLOAT)
        checks.shaped_like("weights", weights, "chosen_scores", chosen_scores)
        checks.not_negative("weights", weights)
        weights = weights.detach()

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
