"""DPO-family losses of [B] = chosen | rejected sequences: value, closed-form gradient and rewards in one launch."""

import torch
import triton
import triton.language as tl

from . import COMPILER_OPTIONS
from .kto import BLOCK_SEQUENCES, sigmoid


@triton.jit
def log_sigmoid(x):
    e = tl.exp(-tl.abs(x))
    # log1p(e): what rounding takes from 1 + e is given back by the quotient
    one_plus_e = 1.0 + e
    log1p = tl.where(one_plus_e == 1.0, e, tl.log(one_plus_e) * (e / tl.maximum(one_plus_e - 1.0, 1e-300)))
    return tl.minimum(x, 0.0) - log1p


@triton.jit
def flipped(u, smooth):
    """-s log sigma(-u), the flipped pair's loss: 0 where s = 0, even where the logarithm is infinite."""
    return tl.where(smooth == 0.0, 0.0, -smooth * log_sigmoid(-u))


@triton.jit(do_not_specialize=["num_pairs", "num_losses"])
def dpo_kernel(
    logps_ptr,
    ref_logps_ptr,
    token_counts_ptr,
    loss_ptr,
    grads_ptr,
    rewards_ptr,
    num_pairs: tl.int64,
    num_losses: tl.int64,
    beta: tl.float64,
    label_smoothing: tl.float64,
    gamma: tl.float64,
    LOSS_TYPE: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    DIVIDE_BY_LENGTH: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (1,). One program over all pairs, because the mean couples them; everything in fp64.

    r_w, r_l are the log-ratios of chosen and rejected, h = r_w - r_l. Each branch sets the loss and its derivatives
    by r_w and r_l (by h alone: g and -g).
    """
    beta = tl.full([], beta, tl.float64)
    smooth = tl.full([], label_smoothing, tl.float64)
    gamma = tl.full([], gamma, tl.float64)
    scale = tl.full([], 1.0, tl.float64)
    if REDUCTION == "mean":
        scale = scale / num_losses
    total_loss = tl.zeros([BLOCK], tl.float64)
    for start in range(0, num_pairs, BLOCK):
        chosen = start + tl.arange(0, BLOCK)
        rejected = chosen + num_pairs
        inside = chosen < num_pairs
        r_w = tl.load(logps_ptr + chosen, mask=inside, other=0.0).to(tl.float64)
        r_l = tl.load(logps_ptr + rejected, mask=inside, other=0.0).to(tl.float64)
        if HAS_REFERENCE:
            r_w -= tl.load(ref_logps_ptr + chosen, mask=inside, other=0.0).to(tl.float64)
            r_l -= tl.load(ref_logps_ptr + rejected, mask=inside, other=0.0).to(tl.float64)
        reward_w = beta * r_w
        reward_l = beta * r_l
        n_w = tl.full([BLOCK], 1.0, tl.float64)
        n_l = tl.full([BLOCK], 1.0, tl.float64)
        if DIVIDE_BY_LENGTH:
            n_w = tl.maximum(tl.load(token_counts_ptr + chosen, mask=inside, other=1), 1).to(tl.float64)
            n_l = tl.maximum(tl.load(token_counts_ptr + rejected, mask=inside, other=1), 1).to(tl.float64)
            r_w = r_w / n_w
            r_l = r_l / n_l
        h = r_w - r_l

        if LOSS_TYPE == "sigmoid":
            loss = -(1.0 - smooth) * log_sigmoid(beta * h) + flipped(beta * h, smooth)
            grad_w = -beta * ((1.0 - smooth) * sigmoid(-beta * h) - smooth * sigmoid(beta * h))
            grad_l = -grad_w
        elif LOSS_TYPE == "robust":
            loss = (-(1.0 - smooth) * log_sigmoid(beta * h) - flipped(beta * h, smooth)) / (1.0 - 2.0 * smooth)
            grad_w = -beta * ((1.0 - smooth) * sigmoid(-beta * h) + smooth * sigmoid(beta * h)) / (1.0 - 2.0 * smooth)
            grad_l = -grad_w
        elif LOSS_TYPE == "hinge":
            # written so that a NaN stays one
            loss = tl.where(beta * h >= 1.0, 0.0, 1.0 - beta * h)
            grad_w = tl.where(beta * h >= 1.0, 0.0, tl.where(h == h, -beta, h))
            grad_l = -grad_w
        elif LOSS_TYPE == "ipo":
            error = h - 0.5 / beta
            loss = error * error
            grad_w = 2.0 * error
            grad_l = -grad_w
        elif LOSS_TYPE == "simpo":
            u = beta * h - gamma
            loss = -(1.0 - smooth) * log_sigmoid(u) + flipped(u, smooth)
            grad_w = -beta * ((1.0 - smooth) * sigmoid(-u) - smooth * sigmoid(u))
            grad_l = -grad_w
            reward_w = beta * r_w
            reward_l = beta * r_l
        elif LOSS_TYPE == "apo_zero":
            loss = sigmoid(-beta * r_w) + sigmoid(beta * r_l)
            grad_w = -beta * sigmoid(beta * r_w) * sigmoid(-beta * r_w)
            grad_l = beta * sigmoid(beta * r_l) * sigmoid(-beta * r_l)
        else:
            tl.static_assert(LOSS_TYPE == "apo_down")
            loss = sigmoid(beta * r_w) + sigmoid(-beta * h)
            slope = beta * sigmoid(beta * h) * sigmoid(-beta * h)
            grad_w = beta * sigmoid(beta * r_w) * sigmoid(-beta * r_w) - slope
            grad_l = slope

        tl.store(grads_ptr + chosen, scale * grad_w / n_w, mask=inside)
        tl.store(grads_ptr + rejected, scale * grad_l / n_l, mask=inside)
        tl.store(rewards_ptr + chosen, reward_w, mask=inside)
        tl.store(rewards_ptr + rejected, reward_l, mask=inside)
        if REDUCTION == "none":
            tl.store(loss_ptr + chosen, loss, mask=inside)
        else:
            total_loss += tl.where(inside, loss, 0.0)
    if REDUCTION != "none":
        tl.store(loss_ptr, scale * tl.sum(total_loss, axis=0))


def forward(
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    token_counts: torch.Tensor | None,
    outputs: tuple[torch.Tensor, ...],
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    gamma: float,
    reduction: str,
    num_losses: int | None,
) -> None:
    """Fill ``outputs``: loss ([] or [B/2]), d loss / d logps [B] and rewards [B] in fp64.

    ``token_counts`` [B], where given, divide each side's log-ratio (``ipo`` and ``simpo`` on summed log-probabilities).
    A mean divides by ``num_losses``, the number of pairs in the whole batch; None stands for the pairs of this call.
    """
    dpo_kernel[(1,)](
        logps,
        ref_logps if ref_logps is not None else logps,
        token_counts if token_counts is not None else logps,
        *outputs,
        num_pairs=logps.numel() // 2,
        num_losses=logps.numel() // 2 if num_losses is None else num_losses,
        beta=beta,
        label_smoothing=label_smoothing,
        gamma=gamma,
        LOSS_TYPE=loss_type,
        HAS_REFERENCE=ref_logps is not None,
        DIVIDE_BY_LENGTH=token_counts is not None,
        REDUCTION=reduction,
        BLOCK=BLOCK_SEQUENCES,
        **COMPILER_OPTIONS,
    )
