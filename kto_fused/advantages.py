"""Advantages and returns of a policy-gradient method such as PPO, from rewards and a value model's values."""

from typing import NamedTuple

import torch

from . import checks
from .engines import backends, scan


class GAEInputs(NamedTuple):
    """The checked tensors of ``gae``, detached. T or N positions, B sequences."""

    rewards: torch.Tensor  # [B, T] or [N]
    values: torch.Tensor  # like rewards
    mask: torch.Tensor | None  # like rewards
    cu_seqlens: torch.Tensor | None  # [B+1]
    bootstrap: torch.Tensor | None  # [B]


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    bootstrap: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates and returns (Schulman et al. 2015, arXiv 1506.02438).

    With r_t the reward and V_t the value of completion token t, and t + 1 the next completion token of its sequence,

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t = delta_t + gamma lam A_{t+1}
        returns_t = A_t + V_t

    After a sequence's last token A is 0, and V is 0 or the sequence's ``bootstrap``. Positions where ``mask`` is 0
    (prompt, padding, a tool's output between two answers) are skipped as if they were not in the sequence: nothing
    there is read, and both results are 0 there.

    Neither result carries a gradient, by ``rewards``, ``values`` or ``bootstrap``: PPO holds both fixed. ``value_loss``
    trains the values on the returns.

    Args:
        rewards: [B, T], one per token, float16, bfloat16, float32 or float64; [N] or [1, N] with ``cu_seqlens``.
        values: like ``rewards`` in shape, in any of these dtypes. V_t is the value before token t is chosen.
        gamma: the discount of a token's later rewards, in [0, 1].
        lam: in [0, 1]. 0 gives A_t = delta_t (least variance); 1 gives the discounted sum of rewards minus V_t (no
            bias from wrong values).
        mask: like ``rewards`` in shape, bool or integers 0 and 1: which positions hold a completion token. None: all.
        cu_seqlens: [B+1] int32 or int64, the packed sequences' offsets from 0 to N.
        bootstrap: [B], the value of the state after each sequence's last token: the value model's for a sequence that
            was cut off, 0 for one that ended. None: all ended.
        backend: ``triton``, ``torch``, or None for Triton on a GPU and PyTorch elsewhere.

    Returns:
        (advantages, returns), each shaped like ``rewards``, float32 (float64 if a tensor is float64). The sums are
        float64.

    Raises:
        ValueError, TypeError: an argument's shape, device, dtype or value is not as above; the message names it. On a
            GPU, where the host does not read tensors unless ``KTO_FUSED_VALIDATE=1``, wrong offsets give NaN
            everywhere, and a wrong mask gives NaN in its sequence.

    >>> import torch, kto_fused
    >>> rewards = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    >>> values = torch.tensor([[0.5, 0.25, 0.5, 0.0]])
    >>> mask = torch.tensor([[True, True, True, False]])
    >>> advantages, returns = kto_fused.gae(rewards, values, gamma=1.0, lam=0.5, mask=mask)
    >>> advantages
    tensor([[0.0000, 0.5000, 0.5000, 0.0000]])
    >>> returns
    tensor([[0.5000, 0.7500, 1.0000, 0.0000]])
    """
    inputs = checked_inputs(rewards, values, gamma, lam, mask, cu_seqlens, bootstrap)
    backend = backends.resolve(backend, rewards.device)
    advantages, returns = scan.gae(*inputs, float(gamma), float(lam), backend)
    return advantages.view(rewards.shape), returns.view(rewards.shape)


def checked_inputs(
    rewards: torch.Tensor,
    values: torch.Tensor,
    gamma: float,
    lam: float,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    bootstrap: torch.Tensor | None,
) -> GAEInputs:
    """Check the arguments of ``gae``, all but the values of offsets and mask; packed [1, N] becomes [N]."""
    backends.resolve(None, checks.tensor("rewards", rewards, checks.FLOAT_DTYPES, checks.A_FLOAT).device)
    shape = list(rewards.shape)
    if cu_seqlens is None:
        if rewards.ndim != 2:
            raise ValueError(f"rewards must be [B, T], got shape {shape}; packed, [N], it needs cu_seqlens")
        num_sequences = shape[0]
        if num_sequences == 0:
            raise ValueError(f"rewards must hold at least one sequence, got shape {shape}")
    else:
        checks.offsets(cu_seqlens, "rewards", rewards)
        if rewards.ndim != 1 and not (rewards.ndim == 2 and shape[0] == 1):
            raise ValueError(f"rewards must be [N] or [1, N] with cu_seqlens, got shape {shape}")
        num_sequences = cu_seqlens.numel() - 1
        cu_seqlens = cu_seqlens.contiguous()
    checks.tensor("values", values, checks.FLOAT_DTYPES, checks.A_FLOAT)
    checks.shaped_like("values", values, "rewards", rewards)
    if mask is not None:
        checks.token_mask("mask", mask, "rewards", rewards)
    if bootstrap is not None:
        floats = checks.FLOAT_DTYPES, checks.A_FLOAT
        checks.per_sequence("bootstrap", bootstrap, *floats, num_sequences, rewards, like_name="rewards")
        bootstrap = bootstrap.detach().contiguous()
    for name, value in (("gamma", gamma), ("lam", lam)):
        checks.number(name, value)
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
    if cu_seqlens is not None:
        rewards, values, mask = (x if x is None else x.reshape(-1) for x in (rewards, values, mask))
    return GAEInputs(rewards.detach(), values.detach(), mask, cu_seqlens, bootstrap)
