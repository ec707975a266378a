"""KTO losses of [B] sequences: value, closed-form gradient, rewards and reference point in one launch."""

import torch
import triton
import triton.language as tl

from . import COMPILER_OPTIONS

# two float64 sequences a thread: more would run out of registers
BLOCK_SEQUENCES = 256


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["num_sequences", "num_losses"])
def kto_kernel(
    logps_ptr,
    ref_logps_ptr,
    desirable_ptr,
    reference_point_in_ptr,
    loss_ptr,
    grads_ptr,
    rewards_ptr,
    reference_point_ptr,
    num_sequences: tl.int64,
    num_losses: tl.int64,
    reference_point: tl.float64,
    beta: tl.float64,
    desirable_weight: tl.float64,
    undesirable_weight: tl.float64,
    LOSS_TYPE: tl.constexpr,
    REFERENCE_POINT: tl.constexpr,
    REDUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (1,). One program, because the mean couples all sequences and B numbers are few; everything in fp64.

    q = sigma(e beta (r - z0)); kto: w (1 - q), kto_squared: w (1 - q)^2, with d loss / d L beside each.
    """
    beta = tl.full([], beta, tl.float64)
    desirable_weight = tl.full([], desirable_weight, tl.float64)
    undesirable_weight = tl.full([], undesirable_weight, tl.float64)
    z0 = tl.full([], reference_point, tl.float64)
    if REFERENCE_POINT == "tensor":
        z0 = tl.load(reference_point_in_ptr).to(tl.float64)
    if REFERENCE_POINT == "batch_mean":
        total_ratio = tl.zeros([BLOCK], tl.float64)
        for start in range(0, num_sequences, BLOCK):
            s = start + tl.arange(0, BLOCK)
            logp = tl.load(logps_ptr + s, mask=s < num_sequences, other=0.0).to(tl.float64)
            total_ratio += logp - tl.load(ref_logps_ptr + s, mask=s < num_sequences, other=0.0).to(tl.float64)
        z0 = tl.sum(total_ratio, axis=0) / num_sequences
    tl.store(reference_point_ptr, z0)

    scale = tl.full([], 1.0, tl.float64)
    if REDUCTION == "mean":
        scale = scale / num_losses
    total_loss = tl.zeros([BLOCK], tl.float64)
    for start in range(0, num_sequences, BLOCK):
        s = start + tl.arange(0, BLOCK)
        inside = s < num_sequences
        ratio = tl.load(logps_ptr + s, mask=inside, other=0.0).to(tl.float64)
        ratio -= tl.load(ref_logps_ptr + s, mask=inside, other=0.0).to(tl.float64)
        desirable = tl.load(desirable_ptr + s, mask=inside, other=0).to(tl.int64)
        sign = tl.where(desirable == 1, 1.0, -1.0).to(tl.float64)
        weight = tl.where(desirable == 1, desirable_weight, undesirable_weight)
        # a label that is neither 0 nor 1 has no loss
        weight = tl.where((desirable == 0) | (desirable == 1), weight, float("nan"))
        margin = sign * beta * (ratio - z0)
        q = sigmoid(margin)
        one_minus_q = sigmoid(-margin)
        if LOSS_TYPE == "kto_squared":
            loss = weight * one_minus_q * one_minus_q
            grad = -2.0 * weight * sign * beta * q * one_minus_q * one_minus_q
        else:
            loss = weight * one_minus_q
            grad = -weight * sign * beta * q * one_minus_q
        tl.store(grads_ptr + s, scale * grad, mask=inside)
        tl.store(rewards_ptr + s, beta * ratio, mask=inside)
        if REDUCTION == "none":
            tl.store(loss_ptr + s, loss, mask=inside)
        else:
            total_loss += tl.where(inside, loss, 0.0)
    if REDUCTION != "none":
        tl.store(loss_ptr, scale * tl.sum(total_loss, axis=0))


def forward(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    desirable: torch.Tensor,
    reference_point: torch.Tensor | float | None,
    outputs: tuple[torch.Tensor, ...],
    *,
    loss_type: str,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    reduction: str,
    num_losses: int | None,
) -> None:
    """Fill ``outputs``: loss ([] or [B]), d loss / d logps [B] and rewards [B] in fp64, reference point [] in fp64.

    ``reference_point`` None stands for the mean log-ratio of the batch. A mean divides by ``num_losses``, the number of
    losses in the whole batch; None stands for the number of losses in this call.
    """
    is_tensor = isinstance(reference_point, torch.Tensor)
    kto_kernel[(1,)](
        logps,
        ref_logps,
        desirable,
        reference_point if is_tensor else logps,
        *outputs,
        num_sequences=logps.numel(),
        num_losses=logps.numel() if num_losses is None else num_losses,
        reference_point=0.0 if is_tensor or reference_point is None else reference_point,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        LOSS_TYPE=loss_type,
        REFERENCE_POINT="tensor" if is_tensor else "batch_mean" if reference_point is None else "number",
        REDUCTION=reduction,
        BLOCK=BLOCK_SEQUENCES,
        **COMPILER_OPTIONS,
    )
