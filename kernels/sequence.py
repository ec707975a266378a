"""Sums of token values over the completion tokens of each sequence, padded or packed; and the gradient by the tokens.

Forward: four values per token, as ``token_logprobs.py`` leaves them, become a log-probability, a token count and three
means per sequence; a fifth, log sum p^2, becomes a fourth mean. Backward: d loss / d log-probability of a sequence
becomes d loss / d log-probability of its tokens.
"""

import torch
import triton
import triton.language as tl

from . import COMPILER_OPTIONS
from .online import ENTROPY, IS_TOP1, LOG_SUM_SQUARES, LOGP, MASKED_TARGET, MEAN_LOGIT, TOKEN_ROWS, find_sequence

BLOCK_TOKENS = 1024


@triton.jit(do_not_specialize=["seq_len", "num_rows", "num_sequences"])
def sequence_kernel(
    targets_ptr,
    per_token_ptr,
    cu_seqlens_ptr,
    sequence_logps_ptr,
    token_counts_ptr,
    sequence_entropy_ptr,
    sequence_mean_logits_ptr,
    token_accuracy_ptr,
    sequence_squares_ptr,
    seq_len: tl.int64,
    num_rows: tl.int64,
    num_sequences: tl.int64,
    PACKED: tl.constexpr,
    AVERAGE: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (sequences,). One program adds up the tokens of one sequence in fp64.

    Reads 20 bytes per token: its target and four float32 values, the values of completion tokens only. Writes the
    sequence's log-probability (the sum, or with AVERAGE the mean), its number of completion tokens, and their mean
    entropy, mean logit and top-1. With SQUARES a fifth value, log sum p^2, is read and its mean written. All are 0 for
    a sequence without completion tokens. A log-probability is NaN where the offsets do not partition the rows.
    """
    sequence = tl.program_id(0).to(tl.int64)
    first = sequence * seq_len
    last = first + seq_len
    is_bad = sequence < 0
    if PACKED:
        first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        last = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
        is_bad = (first < 0) | (last < first) | (last > num_rows)
        is_bad = is_bad | ((sequence == 0) & (first != 0))
        is_bad = is_bad | ((sequence == num_sequences - 1) & (last != num_rows))
        first = tl.maximum(first, 0)
        last = tl.minimum(last, num_rows)

    logps = tl.zeros([BLOCK], tl.float64)
    entropy = tl.zeros([BLOCK], tl.float64)
    mean_logits = tl.zeros([BLOCK], tl.float64)
    num_top1 = tl.zeros([BLOCK], tl.float64)
    log_squares = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int64)
    for start in range(first, last, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        target = tl.load(targets_ptr + rows, mask=rows < last, other=MASKED_TARGET)
        is_token = target != MASKED_TARGET
        logps += tl.load(per_token_ptr + LOGP * num_rows + rows, mask=is_token, other=0.0).to(tl.float64)
        entropy += tl.load(per_token_ptr + ENTROPY * num_rows + rows, mask=is_token, other=0.0).to(tl.float64)
        mean_logit = tl.load(per_token_ptr + MEAN_LOGIT * num_rows + rows, mask=is_token, other=0.0)
        mean_logits += mean_logit.to(tl.float64)
        num_top1 += tl.load(per_token_ptr + IS_TOP1 * num_rows + rows, mask=is_token, other=0.0).to(tl.float64)
        if SQUARES:
            log_square = tl.load(per_token_ptr + LOG_SUM_SQUARES * num_rows + rows, mask=is_token, other=0.0)
            log_squares += log_square.to(tl.float64)
        count += is_token.to(tl.int64)

    tokens = tl.sum(count, axis=0)
    divisor = tl.maximum(tokens, 1).to(tl.float64)
    logp = tl.sum(logps, axis=0)
    if AVERAGE:
        logp = logp / divisor
    tl.store(sequence_logps_ptr + sequence, tl.where(is_bad, float("nan"), logp))
    tl.store(token_counts_ptr + sequence, tokens)
    tl.store(sequence_entropy_ptr + sequence, tl.sum(entropy, axis=0) / divisor)
    tl.store(sequence_mean_logits_ptr + sequence, tl.sum(mean_logits, axis=0) / divisor)
    tl.store(token_accuracy_ptr + sequence, tl.sum(num_top1, axis=0) / divisor)
    if SQUARES:
        tl.store(sequence_squares_ptr + sequence, tl.sum(log_squares, axis=0) / divisor)


@triton.jit(do_not_specialize=["seq_len", "num_rows", "num_sequences", "search_steps", "num_incoming"])
def sequence_backward_kernel(
    targets_ptr,
    cu_seqlens_ptr,
    token_counts_ptr,
    head_grads_ptr,
    incoming_ptr,
    token_grads_ptr,
    seq_len: tl.int64,
    num_rows: tl.int64,
    num_sequences: tl.int64,
    search_steps: tl.int32,
    num_incoming: tl.int64,
    PACKED: tl.constexpr,
    AVERAGE: tl.constexpr,
    HAS_HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (rows / BLOCK,). Write token_grads[row] = incoming[s mod num_incoming] * head_grads[s], 0 where masked.

    s is the row's sequence; with AVERAGE the result is divided by its number of completion tokens. ``incoming`` holds
    one number, one per pair, or one per sequence; in each case entry s mod num_incoming belongs to sequence s. Where
    head_grads is 0 the result is 0, even if the incoming gradient is not finite. Reads 4 bytes per row (its target) and
    its sequence's numbers, writes one value per row.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    target = tl.load(targets_ptr + rows, mask=inside, other=MASKED_TARGET)
    if PACKED:
        sequence = find_sequence(cu_seqlens_ptr, rows, num_sequences, search_steps)
    else:
        sequence = rows // seq_len
    is_token = target != MASKED_TARGET
    grad = tl.load(incoming_ptr + sequence % num_incoming, mask=is_token, other=0.0).to(tl.float64)
    if HAS_HEAD:
        head_grad = tl.load(head_grads_ptr + sequence, mask=is_token, other=0.0)
        grad = tl.where(head_grad == 0.0, 0.0, grad * head_grad)
    if AVERAGE:
        grad = grad / tl.maximum(tl.load(token_counts_ptr + sequence, mask=is_token, other=1), 1)
    tl.store(token_grads_ptr + rows, tl.where(is_token, grad, 0.0), mask=inside)


def forward(
    targets: torch.Tensor,
    per_token: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    outputs: tuple[torch.Tensor, ...],
    *,
    seq_len: int,
    average: bool,
) -> None:
    """Sum ``per_token`` [4, rows] or [5, rows] over the rows of each sequence whose target is not masked.

    Fills ``outputs`` = (log-probabilities in fp64, token counts in int64, mean entropy, mean logit, token accuracy, and
    of five rows the mean log sum p^2), each [B]. ``average`` divides the log-probabilities by the token counts.
    """
    sum_squares = len(per_token) > TOKEN_ROWS.value
    sequence_kernel[(outputs[0].numel(),)](
        targets,
        per_token,
        cu_seqlens if cu_seqlens is not None else targets,
        *outputs,
        *([] if sum_squares else [per_token]),
        seq_len=seq_len,
        num_rows=targets.numel(),
        num_sequences=outputs[0].numel(),
        PACKED=cu_seqlens is not None,
        AVERAGE=average,
        SQUARES=sum_squares,
        BLOCK=BLOCK_TOKENS,
        **COMPILER_OPTIONS,
    )


def backward(
    targets: torch.Tensor,
    token_counts: torch.Tensor,
    head_grads: torch.Tensor | None,
    incoming: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    token_grads: torch.Tensor,
    *,
    seq_len: int,
    average: bool,
) -> None:
    """Fill ``token_grads`` [rows] = d loss / d token log-probability.

    d loss / d sequence log-probability [B] is ``incoming`` * ``head_grads``, or ``incoming`` alone without a head.
    """
    num_sequences = token_counts.numel()
    sequence_backward_kernel[(triton.cdiv(targets.numel(), BLOCK_TOKENS),)](
        targets,
        cu_seqlens if cu_seqlens is not None else targets,
        token_counts,
        head_grads if head_grads is not None else token_counts,
        incoming,
        token_grads,
        seq_len=seq_len,
        num_rows=targets.numel(),
        num_sequences=num_sequences,
        search_steps=(num_sequences + 1).bit_length(),
        num_incoming=incoming.numel(),
        PACKED=cu_seqlens is not None,
        AVERAGE=average,
        HAS_HEAD=head_grads is not None,
        BLOCK=BLOCK_TOKENS,
        **COMPILER_OPTIONS,
    )
