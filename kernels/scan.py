"""Generalised advantage estimates (GAE) by a scan that runs backwards over each sequence, padded or packed.

With r_t the reward and V_t the value of token t, t + 1 the sequence's next token, and 0 or a bootstrapped value for V
after the last token, the recurrence of the advantages A_t is rewritten for the returns R_t = A_t + V_t:

    A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}
    R_t = r_t + U_{t+1},   U_t = gamma lam U_{t+1} + [gamma lam r_t + gamma (1 - lam) V_t]

The bracket reads one token alone. A masked position between two tokens can therefore be skipped by the map U -> U,
without a search for the next token.
"""

import torch
import triton
import triton.language as tl

from . import COMPILER_OPTIONS

BLOCK_POSITIONS = 1024

# One compiled kernel serves every length, stride and alignment.
POINTERS = ["rewards_ptr", "values_ptr", "mask_ptr", "cu_seqlens_ptr", "bootstrap_ptr", "advantages_ptr", "returns_ptr"]
RUNTIME = ["seq_len", "num_positions", "num_sequences", "rewards_stride", "values_stride", "mask_stride"]


@triton.jit
def compose(factor, summand, next_factor, next_summand):
    """Return (factor, summand) of x -> summand + factor x, followed by x -> next_summand + next_factor x."""
    return factor * next_factor, next_summand + next_factor * summand


@triton.jit
def is_no_partition(cu_seqlens_ptr, num_positions, num_sequences, BLOCK: tl.constexpr):
    """Return whether the offsets fail to rise from 0 to ``num_positions``. Reads all of them, two at a time."""
    falls = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_sequences, BLOCK):
        sequence = start + tl.arange(0, BLOCK)
        inside = sequence < num_sequences
        first = tl.load(cu_seqlens_ptr + sequence, mask=inside, other=0)
        last = tl.load(cu_seqlens_ptr + sequence + 1, mask=inside, other=0)
        falls += (last < first).to(tl.int32)
    return (
        (tl.sum(falls, axis=0) > 0)
        | (tl.load(cu_seqlens_ptr) != 0)
        | (tl.load(cu_seqlens_ptr + num_sequences) != num_positions)
    )


@triton.jit(do_not_specialize=RUNTIME, do_not_specialize_on_alignment=POINTERS)
def gae_kernel(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    bootstrap_ptr,
    advantages_ptr,
    returns_ptr,
    seq_len: tl.int64,
    num_positions: tl.int64,
    num_sequences: tl.int64,
    rewards_stride: tl.int64,
    values_stride: tl.int64,
    mask_stride: tl.int64,
    gamma: tl.float64,
    lam: tl.float64,
    PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_BOOTSTRAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (sequences,). One program walks its sequence from the last position to the first, a block at a time.

    It reads the mask of each position, and the reward and the value of each token, twice: the scan at position t needs
    the token at t + 1. The second read finds them in the cache, so memory moves 9 bytes in and 8 out per float32
    token with a bool mask, and 1 byte in and 8 out per masked position. A program also reads all of ``cu_seqlens``.

    All arithmetic is float64: a sum of 100,000 rewards loses no digit of a float32 result. What a program carries from
    block to block is one number, U. The order of the additions depends on the block size alone, not on the batch.

    Masked positions get 0. A mask that is neither 0 nor 1 gives NaN there and at all earlier tokens of the sequence.
    Offsets that do not partition the positions give NaN everywhere.
    """
    sequence = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    # padded: position p of [first, last) lies at p - first + sequence * stride; packed: seq_len and strides are 0
    first = sequence * seq_len
    last = first + seq_len
    rewards_ptr += sequence * rewards_stride - first
    values_ptr += sequence * values_stride - first
    mask_ptr += sequence * mask_stride - first
    if PACKED:
        if is_no_partition(cu_seqlens_ptr, num_positions, num_sequences, BLOCK):
            # the programs share the positions, so that each is written once
            share = tl.cdiv(num_positions, num_sequences)
            first = sequence * share
            last = tl.minimum(first + share, num_positions)
            for start in range(first, last, BLOCK):
                position = start + lanes
                tl.store(advantages_ptr + position, float("nan"), mask=position < last)
                tl.store(returns_ptr + position, float("nan"), mask=position < last)
            return
        first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        last = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)

    gamma = tl.full([], gamma, tl.float64)
    lam = tl.full([], lam, tl.float64)
    gamma_lam = gamma * lam
    # U of the position after the block's; after the sequence it is gamma times the bootstrapped value
    carry = tl.full([], 0.0, tl.float64)
    if HAS_BOOTSTRAP:
        carry = gamma * tl.load(bootstrap_ptr + sequence).to(tl.float64)
    for start in range(0, last - first, BLOCK):
        # Lanes run backwards in time: associative_scan(reverse=True) has been reported to give wrong results for two
        # operands (triton issue 4362).
        position = last - 1 - start - lanes
        inside = position >= first
        has_next = inside & (position + 1 < last)
        is_token = inside
        is_next_token = has_next
        if HAS_MASK:
            mask = tl.load(mask_ptr + position, mask=inside, other=0)
            next_mask = tl.load(mask_ptr + position + 1, mask=has_next, other=0)
            is_token = mask != 0
            is_next_token = next_mask != 0
        next_reward = tl.load(rewards_ptr + position + 1, mask=is_next_token, other=0.0).to(tl.float64)
        next_value = tl.load(values_ptr + position + 1, mask=is_next_token, other=0.0).to(tl.float64)
        reward = tl.load(rewards_ptr + position, mask=is_token, other=0.0).to(tl.float64)
        value = tl.load(values_ptr + position, mask=is_token, other=0.0).to(tl.float64)
        if HAS_MASK:
            next_reward = tl.where(is_next_token & (next_mask != 1), float("nan"), next_reward)
            reward = tl.where(is_token & (mask != 1), float("nan"), reward)

        factor = tl.where(is_next_token, gamma_lam, tl.full([], 1.0, tl.float64))
        summand = gamma_lam * next_reward + gamma * (1.0 - lam) * next_value
        factor, summand = tl.associative_scan((factor, summand), 0, compose)
        next_sum = summand + factor * carry  # U of the next position
        carry = tl.sum(tl.where(lanes == BLOCK - 1, next_sum, 0.0), axis=0)

        returns = reward + next_sum
        tl.store(returns_ptr + position, tl.where(is_token, returns, 0.0), mask=inside)
        tl.store(advantages_ptr + position, tl.where(is_token, returns - value, 0.0), mask=inside)


def gae(
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
    """Fill ``advantages`` and ``returns`` from tensors [B, T], or [N] with ``cu_seqlens`` [B+1].

    ``mask`` holds 1 at completion tokens; ``bootstrap`` [B] holds the values after each sequence's last token. The
    results are contiguous; the inputs may have any strides.
    """
    packed = cu_seqlens is not None
    rewards, values, mask = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (rewards, values, mask))
    if mask is not None and mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    num_sequences = cu_seqlens.numel() - 1 if packed else rewards.shape[0]
    strides = [0 if packed or x is None else x.stride(0) for x in (rewards, values, mask)]
    gae_kernel[(num_sequences,)](
        rewards,
        values,
        mask if mask is not None else rewards,
        cu_seqlens if packed else rewards,
        bootstrap if bootstrap is not None else rewards,
        advantages,
        returns,
        seq_len=0 if packed else rewards.shape[1],
        num_positions=rewards.numel(),
        num_sequences=num_sequences,
        rewards_stride=strides[0],
        values_stride=strides[1],
        mask_stride=strides[2],
        gamma=gamma,
        lam=lam,
        PACKED=packed,
        HAS_MASK=mask is not None,
        HAS_BOOTSTRAP=bootstrap is not None,
        BLOCK=BLOCK_POSITIONS,
        **COMPILER_OPTIONS,
    )
