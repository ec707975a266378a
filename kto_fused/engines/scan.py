"""Generalised advantage estimates: the operator that ``torch.compile`` sees, and the PyTorch backend.

``kernels/scan.py`` has the recurrence that both backends evaluate.
"""

from typing import Any, Optional

import torch

from .backends import may_read, on_device, opaque
from .layout import check_offsets, compute_dtype, row_sequences

SEGMENT = 32  # tokens that the PyTorch backend adds up one after another, in all segments at once


def result_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Return float64 if any of the tensors is float64, else float32."""
    dtypes = {compute_dtype(x) for x in tensors if x is not None}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_contents(mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None, num_positions: int) -> None:
    """Raise ``ValueError`` for offsets that do not rise from 0 to N, and for a mask that holds other than 0 and 1."""
    if cu_seqlens is not None:
        check_offsets(cu_seqlens, num_positions)
    if mask is not None and mask.dtype != torch.bool:
        wrong = mask[(mask != 0) & (mask != 1)]
        if len(wrong):
            raise ValueError(f"mask must hold 0 or 1, got {wrong[0].item()}")


def _outputs(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    bootstrap: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = result_dtype(rewards, values, bootstrap)
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)


@opaque(fake=_outputs)
def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: Optional[torch.Tensor],
    cu_seqlens: Optional[torch.Tensor],
    bootstrap: Optional[torch.Tensor],
    gamma: float,
    lam: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (advantages, returns) of rewards and values [B, T], or [N] with ``cu_seqlens`` [B+1]."""
    if backend == "torch" or may_read(rewards):  # the Triton kernel returns NaN for what it may not follow
        check_contents(mask, cu_seqlens, rewards.numel())
    advantages, returns = _outputs(rewards, values, mask, cu_seqlens, bootstrap)
    if backend == "torch":
        _fill(rewards, values, mask, cu_seqlens, bootstrap, advantages, returns, gamma=gamma, lam=lam)
        return advantages, returns
    from ..kernels import scan

    with on_device(rewards):
        scan.gae(rewards, values, mask, cu_seqlens, bootstrap, advantages, returns, gamma=gamma, lam=lam)
    return advantages, returns


def _fill(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    bootstrap: torch.Tensor | None,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    *,
    gamma: float,
    lam: float,
) -> None:
    """Fill ``advantages`` and ``returns`` with PyTorch operators, in float64.

    Each sequence's completion tokens, and one entry more for U after its end, are packed into whole segments. A long
    sequence among short ones costs no padding, and masked positions cost nothing.
    """
    num_positions, device = rewards.numel(), rewards.device
    if cu_seqlens is None:
        num_sequences = rewards.shape[0]
        sequences = torch.arange(num_sequences, device=device).repeat_interleave(
            rewards.shape[1], output_size=num_positions
        )
    else:
        num_sequences = cu_seqlens.numel() - 1
        sequences = row_sequences(cu_seqlens, num_positions).clamp_(0, num_sequences - 1)
    rewards, values = rewards.reshape(-1), values.reshape(-1)
    positions = None  # of the tokens; None where each position holds one
    if mask is not None:
        mask = mask.reshape(-1)
        positions = mask.nonzero().flatten()
        sequences, rewards, values = sequences[positions], rewards[positions], values[positions]
    rewards, values = rewards.double(), values.double()

    counts = torch.bincount(sequences, minlength=num_sequences)
    segments = counts // SEGMENT + 1
    segment_ends = segments.cumsum(0)
    num_segments = int(segment_ends[-1])
    starts = (segment_ends - segments) * SEGMENT  # of each sequence's entries
    entries = (starts - (counts.cumsum(0) - counts))[sequences]
    entries += torch.arange(len(sequences), device=device)

    gamma_lam = gamma * lam
    sums = rewards.new_zeros(num_segments * SEGMENT)
    sums.index_copy_(0, entries, gamma_lam * rewards + (gamma * (1 - lam)) * values)
    if bootstrap is not None:
        sums.index_copy_(0, starts + counts, gamma * bootstrap.double())
    segments_left = segment_ends.repeat_interleave(segments, output_size=num_segments)
    segments_left -= torch.arange(num_segments, device=device)
    sums = _add_later(sums, segments_left, gamma_lam)

    token_returns = sums[entries.add_(1)].add_(rewards)
    token_advantages = token_returns - values
    for output, of_tokens in ((returns, token_returns), (advantages, token_advantages)):
        if positions is None:
            output.view(-1).copy_(of_tokens)
        else:
            output.zero_().view(-1).index_copy_(0, positions, of_tokens.to(output.dtype))


def _add_later(sums: torch.Tensor, segments_left: torch.Tensor, factor: float) -> torch.Tensor:
    """Return, for each entry i, the sum over the entries j >= i of its sequence of factor^(j - i) sums[j].

    ``sums`` holds S segments of SEGMENT entries; ``segments_left`` [S] counts the segments from each one to the end of
    its sequence. Two SEGMENT operators run over all segments at once, and log2 of the longest sequence's number of
    segments over the segments' first entries. Nothing is divided, so no power of a small ``factor`` overflows.
    """
    rows = sums.view(-1, SEGMENT).T.contiguous()  # [SEGMENT, S]
    for row in range(SEGMENT - 2, -1, -1):
        rows[row].add_(rows[row + 1], alpha=factor)
    # after the pass at distance d an entry of ``firsts`` is its sum over 2 d segments
    firsts = rows[0].clone()
    longest, distance = int(segments_left.max()), 1
    while distance < longest and factor ** (SEGMENT * distance) > 0:
        # a condition ends the sequence, not a weight of 0: 0 times a NaN of the next sequence would be a NaN
        later = torch.where(segments_left[:-distance] > distance, firsts[distance:], 0.0)
        firsts[:-distance].add_(later, alpha=factor ** (SEGMENT * distance))
        distance *= 2
    after = torch.where(segments_left > 1, firsts.roll(-1), 0.0)
    for row in range(SEGMENT):
        rows[row].add_(after, alpha=factor ** (SEGMENT - row))
    return rows.T.reshape(-1)
