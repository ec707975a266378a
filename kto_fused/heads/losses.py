"""Each loss as its formula: sequence log-probabilities in, one loss per sequence or pair out.

r_s = L_s - Lref_s is a sequence's log-ratio in nats, sigma the logistic function. The reference and the PyTorch backend
take these formulas' gradients by autograd; the Triton kernels write value and gradient out.
"""

import math

import torch
import torch.nn.functional as F

KTO_LOSS_TYPES = ("kto", "kto_squared", "apo_zero_unpaired")
DPO_LOSS_TYPES = ("sigmoid", "robust", "hinge", "ipo", "simpo", "apo_zero", "apo_down")
REDUCTIONS = ("mean", "sum", "none")

# losses on length-averaged log-ratios, and losses without a reference model
LENGTH_AVERAGED = ("ipo", "simpo")
REFERENCE_FREE = ("simpo",)
WITH_LABEL_SMOOTHING = ("sigmoid", "robust", "simpo")


def kto_losses(
    log_ratios: torch.Tensor,
    desirable: torch.Tensor,
    reference_point: torch.Tensor | float,
    *,
    loss_type: str,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> torch.Tensor:
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306) of log-ratios r; ``desirable`` is 1 or 0, else NaN. [B] -> [B]

    With e = +1 for desirable and -1 for undesirable, w the class weight, z0 the reference point and
    q = sigma(e beta (r - z0)):  ``kto`` w (1 - q);  ``kto_squared`` w (1 - q)^2;  ``apo_zero_unpaired`` (D'Oosterlinck
    et al. 2024, arXiv 2408.06266) is ``kto`` with z0 = 0.
    """
    sign = torch.where(desirable == 1, 1.0, -1.0).to(log_ratios.dtype)
    # tensors of the right dtype: torch.where would round Python numbers to float32 first
    of_desirable, of_undesirable, of_neither = (
        log_ratios.new_full((), weight) for weight in (desirable_weight, undesirable_weight, math.nan)
    )
    weight = torch.where(desirable == 1, of_desirable, torch.where(desirable == 0, of_undesirable, of_neither))
    one_minus_q = torch.sigmoid(-sign * beta * (log_ratios - reference_point))
    if loss_type == "kto_squared":
        return weight * one_minus_q**2
    return weight * one_minus_q


def dpo_losses(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    gamma: float,
) -> torch.Tensor:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290) and its relatives. [B/2], [B/2] -> [B/2]

    ``chosen`` r_w and ``rejected`` r_l are log-ratios; for ``ipo`` length-averaged ones; for ``simpo`` length-averaged
    log-probabilities of the policy alone. h = r_w - r_l, s = label smoothing.

    - ``sigmoid``: -(1-s) log sigma(beta h) - s log sigma(-beta h) (s > 0: Mitchell's conservative DPO)
    - ``robust`` (arXiv 2403.00409): [-(1-s) log sigma(beta h) + s log sigma(-beta h)] / (1 - 2s)
    - ``hinge`` (SLiC-HF, arXiv 2305.10425): max(0, 1 - beta h)
    - ``ipo`` (arXiv 2310.12036): (h - 1 / (2 beta))^2
    - ``simpo`` (arXiv 2405.14734): ``sigmoid`` of beta h - gamma
    - ``apo_zero`` (arXiv 2408.06266): [1 - sigma(beta r_w)] + sigma(beta r_l)
    - ``apo_down`` (arXiv 2408.06266): sigma(beta r_w) + [1 - sigma(beta h)]
    """
    h = chosen - rejected
    if loss_type == "hinge":
        return torch.relu(1 - beta * h)
    if loss_type == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if loss_type == "apo_zero":
        return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)
    if loss_type == "apo_down":
        return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * h)
    u = beta * h - gamma if loss_type == "simpo" else beta * h
    kept = -(1 - label_smoothing) * F.logsigmoid(u)
    if label_smoothing == 0:  # nothing of the flipped pair, even where its loss is infinite
        return kept
    flipped = -label_smoothing * F.logsigmoid(-u)
    if loss_type == "robust":
        return (kept - flipped) / (1 - 2 * label_smoothing)
    return kept + flipped


def reduce(losses: torch.Tensor, reduction: str, num_losses: int | None = None) -> torch.Tensor:
    """``mean`` over all sequences or pairs, ``sum``, or ``none``.

    Where ``losses`` are some of a batch's ``num_losses``, ``mean`` is their share of the batch's mean.
    """
    if reduction == "mean":
        return losses.mean() if num_losses is None else losses.sum() / num_losses
    return losses.sum() if reduction == "sum" else losses
