"""Rows of logits to log-probabilities, entropy, mean logit and top-1 of their targets; and the gradient of the logits.

Logits are [B, T, V] with any batch and row stride, or packed [N, V] (then B = 1, T = N). Row b * T + t is position t
of sequence b. With logits x, scale a, soft cap c and temperature tau,

    z = factor * u,   u = c tanh(a x / c), factor = 1 / tau   (soft cap)
                      u = x,               factor = a / tau   (none)

All exponents are relative to the row's largest u, so a common offset of the logits never enters their rounding:

    log p = factor (u_target - u_max) - log_sum,   log_sum = log sum_v exp(factor (u_v - u_max))
    d log p / d x_v = k_v ((v = target) - exp(factor (u_v - u_max) - log_sum)),   k_v = d z_v / d x_v

The forward folds a row and finishes it in one launch. Where a batch has few rows, several programs fold parts of the
columns of one row (SPLIT). They leave partial results, as ``online.py`` defines them, and a second launch merges and
finishes them.

With SQUARES the same pass finds log sum_v p_v^2 too. It reads and launches nothing more, and costs one more fused
multiply-add per logit, one more result per row and one more number per partial result.
"""

import torch
import triton
import triton.language as tl

from . import COMPILER_OPTIONS
from .online import (
    ENTROPY,
    INVALID_TARGET,
    IS_TOP1,
    LOG2_E,
    LOG_SUM_SQUARES,
    LOGP,
    MASKED_TARGET,
    MEAN_LOGIT,
    PARTIAL_EXP_SUM,
    PARTIAL_LOGIT_SUM,
    PARTIAL_MAXIMUM,
    PARTIAL_ROWS,
    PARTIAL_SQUARE_SUM,
    PARTIAL_WEIGHTED_SUM,
    TOKEN_ROWS,
    cap,
    find_sequence,
    fold,
    log_probability,
    merge,
    tile_columns,
)

# A thread loads 16 bytes at a time, and has two such loads in flight before it uses the first.
VECTOR_BYTES = 16
BLOCK_BYTES = 4096
NUM_WARPS = 4
# Blocks of columns per backward program: enough to pay for loading the row's numbers, few enough that a batch of few
# rows still fills a GPU.
BACKWARD_BLOCKS = 2
# With fewer rows per multiprocessor than this, a row is split over several programs, MAX_SPLITS at most.
ROWS_PER_MULTIPROCESSOR = 2
MAX_SPLITS = 64
# At least two blocks per split, so its four partial results cost little next to its reads.
MIN_SPLIT_BLOCKS = 2


@triton.jit
def store_row(
    logits_row_ptr,
    target,
    row,
    row_max,
    row_sum,
    row_weighted,
    row_total,
    row_squares,
    row_max_ptr,
    log_sum_ptr,
    per_token_ptr,
    num_rows,
    vocab_size,
    scale,
    softcap,
    factor,
    log2_factor,
    HAS_SOFTCAP: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """Finish a row: read its target's logit, write row_max, log_sum and the four results, with SQUARES five."""
    log_sum = tl.log(row_sum)
    mean_distance = row_weighted / row_sum
    is_token = target >= 0
    x_target = tl.load(logits_row_ptr + tl.maximum(target, 0), mask=is_token, other=0.0).to(scale.dtype)
    u_target, _ = cap(x_target, scale, softcap, HAS_SOFTCAP)
    factor64 = tl.full([], factor, tl.float64)
    logp = log_probability(u_target - row_max, log_sum, mean_distance, factor64, log2_factor)
    logp = tl.where(is_token, logp, float("nan"))
    tl.store(row_max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(per_token_ptr + LOGP * num_rows + row, logp)
    tl.store(per_token_ptr + ENTROPY * num_rows + row, log_sum - factor64 * mean_distance)
    tl.store(per_token_ptr + MEAN_LOGIT * num_rows + row, factor64 * (row_total / vocab_size))
    # a maximum ignores NaN, the log-probability does not
    is_top1 = (u_target >= row_max) & (logp == logp)
    tl.store(per_token_ptr + IS_TOP1 * num_rows + row, is_top1.to(scale.dtype))
    if SQUARES:
        tl.store(per_token_ptr + LOG_SUM_SQUARES * num_rows + row, tl.log(row_squares) - 2.0 * log_sum)


@triton.jit
def store_masked_row(row, row_max_ptr, log_sum_ptr, per_token_ptr, num_rows, SQUARES: tl.constexpr):
    """Write zeros for a row that predicts no completion token."""
    tl.store(row_max_ptr + row, 0.0)
    tl.store(log_sum_ptr + row, 0.0)
    zeros = tl.zeros([TOKEN_ROWS], per_token_ptr.dtype.element_ty)
    tl.store(per_token_ptr + tl.arange(0, TOKEN_ROWS) * num_rows + row, zeros)
    if SQUARES:
        tl.store(per_token_ptr + LOG_SUM_SQUARES * num_rows + row, 0.0)


# The kernel is not specialised on any length or stride, so one compiled kernel serves every batch of a model. The
# launcher derives the compile-time constants from its arguments.
FORWARD_RUNTIME = [
    "num_rows",
    "seq_len",
    "num_sequences",
    "search_steps",
    "vocab_size",
    "splits",
    "blocks_per_split",
    "logits_batch_stride",
    "logits_row_stride",
    "labels_batch_stride",
    "labels_row_stride",
    "ignore_index",
]


@triton.jit(do_not_specialize=FORWARD_RUNTIME)
def token_logprobs_kernel(
    logits_ptr,
    labels_ptr,
    cu_seqlens_ptr,
    targets_ptr,
    row_max_ptr,
    log_sum_ptr,
    per_token_ptr,
    partials_ptr,
    num_rows: tl.int64,
    seq_len: tl.int64,
    num_sequences: tl.int64,
    search_steps: tl.int32,
    vocab_size: tl.int32,
    splits: tl.int64,
    blocks_per_split: tl.int32,
    logits_batch_stride: tl.int64,
    logits_row_stride: tl.int64,
    labels_batch_stride: tl.int64,
    labels_row_stride: tl.int64,
    ignore_index: tl.int64,
    scale: tl.float64,
    softcap: tl.float64,
    factor: tl.float64,
    SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SQUARES: tl.constexpr,
    SPLIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Grid: (rows * splits,). One program folds one row, or one of ``splits`` ranges of its columns.

    Reads each logit of a completion token once (itemsize bytes per logit) and no logit of a masked row. Writes the
    row's target. Then writes row_max, log_sum and four results per row; or, with SPLIT, PARTIAL_ROWS numbers per
    program, which ``combine_splits_kernel`` merges. A lane's maximum and sums stay in registers, in COMPUTE precision.
    """
    scale = tl.full([], scale, COMPUTE)
    softcap = tl.full([], softcap, COMPUTE)
    log2_factor = tl.full([], factor, COMPUTE) * LOG2_E

    program = tl.program_id(0).to(tl.int64)
    row = program // splits
    split = program % splits
    batch = row // seq_len
    position = row % seq_len

    # the token that this row predicts
    label_position = position + SHIFT
    end = seq_len + batch * 0
    if PACKED and SHIFT:
        sequence = find_sequence(cu_seqlens_ptr, position, num_sequences, search_steps)
        end = tl.minimum(end, tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64))
    label_ptr = labels_ptr + batch * labels_batch_stride + label_position * labels_row_stride
    label = tl.load(label_ptr, mask=label_position < end, other=0).to(tl.int64)
    is_masked = (label_position >= end) | (label == ignore_index)
    is_valid = (label >= 0) & (label < vocab_size)
    target = tl.where(is_masked, MASKED_TARGET, tl.where(is_valid, label, INVALID_TARGET))
    if split == 0:
        tl.store(targets_ptr + row, target.to(tl.int32))
    if is_masked:
        if not SPLIT:
            store_masked_row(row, row_max_ptr, log_sum_ptr, per_token_ptr, num_rows, SQUARES)
        return

    row_offset = batch * logits_batch_stride + position * logits_row_stride
    first = (split * blocks_per_split).to(tl.int32) * (LANES * VEC)
    last = tl.minimum(first + blocks_per_split * (LANES * VEC), vocab_size)
    if ALIGNED:
        row_offset = tl.multiple_of(row_offset, VEC)
        last = tl.multiple_of(last, VEC)
    last_full = first + (last - first) // (LANES * VEC) * (LANES * VEC)
    row_ptr = logits_ptr + row_offset
    tile = tile_columns(ALIGNED, LANES, VEC)
    lane_max = tl.full([LANES], float("-inf"), COMPUTE)
    lane_sum = tl.zeros([LANES], COMPUTE)
    lane_weighted = tl.zeros([LANES], COMPUTE)
    lane_total = tl.zeros([LANES], COMPUTE)
    lane_squares = tl.zeros([LANES], COMPUTE)

    for start in range(first, last_full, LANES * VEC):
        u, _ = cap(tl.load(row_ptr + start + tile).to(COMPUTE), scale, softcap, HAS_SOFTCAP)
        lane_max, lane_sum, lane_weighted, lane_squares = fold(
            lane_max, lane_sum, lane_weighted, lane_squares, u, log2_factor, SQUARES
        )
        lane_total += tl.sum(u, axis=1)
    inside = last_full + tile < last
    u, _ = cap(tl.load(row_ptr + last_full + tile, mask=inside, other=0.0).to(COMPUTE), scale, softcap, HAS_SOFTCAP)
    lane_total += tl.sum(u, axis=1)
    u = tl.where(inside, u, float("-inf"))
    lane_max, lane_sum, lane_weighted, lane_squares = fold(
        lane_max, lane_sum, lane_weighted, lane_squares, u, log2_factor, SQUARES
    )

    row_max, row_sum, row_weighted, row_squares = merge(
        lane_max, lane_sum, lane_weighted, lane_squares, log2_factor, SQUARES
    )
    row_total = tl.sum(lane_total, axis=0)
    if SPLIT:
        partial_ptr = partials_ptr + program * (PARTIAL_ROWS + SQUARES)
        tl.store(partial_ptr + PARTIAL_MAXIMUM, row_max)
        tl.store(partial_ptr + PARTIAL_EXP_SUM, row_sum)
        tl.store(partial_ptr + PARTIAL_WEIGHTED_SUM, row_weighted)
        tl.store(partial_ptr + PARTIAL_LOGIT_SUM, row_total)
        if SQUARES:
            tl.store(partial_ptr + PARTIAL_SQUARE_SUM, row_squares)
    else:
        store_row(
            row_ptr,
            target,
            row,
            row_max,
            row_sum,
            row_weighted,
            row_total,
            row_squares,
            row_max_ptr,
            log_sum_ptr,
            per_token_ptr,
            num_rows,
            vocab_size,
            scale,
            softcap,
            factor,
            log2_factor,
            HAS_SOFTCAP,
            SQUARES,
        )


@triton.jit(
    do_not_specialize=["num_rows", "seq_len", "vocab_size", "splits", "logits_batch_stride", "logits_row_stride"],
)
def combine_splits_kernel(
    logits_ptr,
    targets_ptr,
    row_max_ptr,
    log_sum_ptr,
    per_token_ptr,
    partials_ptr,
    num_rows: tl.int64,
    seq_len: tl.int64,
    vocab_size: tl.int32,
    splits: tl.int64,
    logits_batch_stride: tl.int64,
    logits_row_stride: tl.int64,
    scale: tl.float64,
    softcap: tl.float64,
    factor: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Grid: (rows,). One program merges the partial results of a row's ``splits`` and finishes the row.

    Reads PARTIAL_ROWS numbers per split (with SQUARES one more) and the target's logit, writes row_max, log_sum and
    four results (five) per row.
    """
    scale = tl.full([], scale, COMPUTE)
    softcap = tl.full([], softcap, COMPUTE)
    log2_factor = tl.full([], factor, COMPUTE) * LOG2_E

    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    if target == MASKED_TARGET:
        store_masked_row(row, row_max_ptr, log_sum_ptr, per_token_ptr, num_rows, SQUARES)
        return

    split = tl.arange(0, BLOCK_SPLITS)
    inside = split < splits
    partial_ptr = partials_ptr + (row * splits + split) * (PARTIAL_ROWS + SQUARES)
    maxima = tl.load(partial_ptr + PARTIAL_MAXIMUM, mask=inside, other=float("-inf"))
    sums = tl.load(partial_ptr + PARTIAL_EXP_SUM, mask=inside, other=0.0)
    weighted = tl.load(partial_ptr + PARTIAL_WEIGHTED_SUM, mask=inside, other=0.0)
    totals = tl.load(partial_ptr + PARTIAL_LOGIT_SUM, mask=inside, other=0.0)
    squares = tl.load(partial_ptr + PARTIAL_SQUARE_SUM, mask=inside, other=0.0) if SQUARES else sums
    row_max, row_sum, row_weighted, row_squares = merge(maxima, sums, weighted, squares, log2_factor, SQUARES)
    store_row(
        logits_ptr + (row // seq_len) * logits_batch_stride + (row % seq_len) * logits_row_stride,
        target,
        row,
        row_max,
        row_sum,
        row_weighted,
        tl.sum(totals, axis=0),
        row_squares,
        row_max_ptr,
        log_sum_ptr,
        per_token_ptr,
        num_rows,
        vocab_size,
        scale,
        softcap,
        factor,
        log2_factor,
        HAS_SOFTCAP,
        SQUARES,
    )


@triton.jit
def store_gradient(
    logits_row_ptr,
    grad_row_ptr,
    columns,
    target,
    row_max,
    log2_sum,
    coefficient,
    last,
    scale,
    softcap,
    log2_factor,
    HAS_SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
):
    """Write coefficient * slope * (onehot - p) for one tile of columns; slope is the soft cap's derivative, or 1."""
    if MASK:
        x = tl.load(logits_row_ptr + columns, mask=columns < last, other=float("-inf")).to(coefficient.dtype)
    else:
        x = tl.load(logits_row_ptr + columns).to(coefficient.dtype)
    u, slope = cap(x, scale, softcap, HAS_SOFTCAP)
    p = tl.exp2((u - row_max) * log2_factor - log2_sum)
    grad = (coefficient * slope * (tl.where(columns == target, 1.0, 0.0) - p)).to(grad_row_ptr.dtype.element_ty)
    if MASK:
        tl.store(grad_row_ptr + columns, grad, mask=columns < last)
    else:
        tl.store(grad_row_ptr + columns, grad)


@triton.jit(
    do_not_specialize=[
        "seq_len",
        "vocab_size",
        "chunks",
        "logits_batch_stride",
        "logits_row_stride",
        "grad_batch_stride",
        "grad_row_stride",
    ],
)
def token_logprobs_backward_kernel(
    logits_ptr,
    grad_ptr,
    targets_ptr,
    token_grads_ptr,
    row_max_ptr,
    log_sum_ptr,
    seq_len: tl.int64,
    vocab_size: tl.int32,
    chunks: tl.int64,
    logits_batch_stride: tl.int64,
    logits_row_stride: tl.int64,
    grad_batch_stride: tl.int64,
    grad_row_stride: tl.int64,
    scale: tl.float64,
    softcap: tl.float64,
    factor: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    BLOCKS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Grid: (rows * chunks,). One program writes the gradient of one chunk of a row: BLOCKS tiles of columns.

    Reads each logit of a completion token once and writes each gradient once (2 * itemsize bytes per logit). A row
    whose token gradient is zero, masked rows included, is written as zeros and its logits are not read. ``grad_ptr``
    may equal ``logits_ptr``: a program reads a tile before it writes it, and no other program touches that tile.
    """
    scale = tl.full([], scale, COMPUTE)
    softcap = tl.full([], softcap, COMPUTE)
    factor = tl.full([], factor, COMPUTE)

    program = tl.program_id(0).to(tl.int64)
    row = program // chunks
    first = ((program % chunks) * (BLOCKS * LANES * VEC)).to(tl.int32)
    last = tl.minimum(first + BLOCKS * LANES * VEC, vocab_size)
    logits_offset = (row // seq_len) * logits_batch_stride + (row % seq_len) * logits_row_stride
    grad_offset = (row // seq_len) * grad_batch_stride + (row % seq_len) * grad_row_stride
    if ALIGNED:
        logits_offset = tl.multiple_of(logits_offset, VEC)
        grad_offset = tl.multiple_of(grad_offset, VEC)
        last = tl.multiple_of(last, VEC)
    last_full = first + (last - first) // (LANES * VEC) * (LANES * VEC)
    logits_row_ptr = logits_ptr + logits_offset
    grad_row_ptr = grad_ptr + grad_offset
    tile = tile_columns(ALIGNED, LANES, VEC)

    target = tl.load(targets_ptr + row)
    token_grad = tl.load(token_grads_ptr + row)
    if target == INVALID_TARGET:
        token_grad = token_grad * float("nan")
    if (token_grad == 0) | (target == MASKED_TARGET):
        zeros = tl.zeros([LANES, VEC], grad_ptr.dtype.element_ty)
        for start in range(first, last_full, LANES * VEC):
            tl.store(grad_row_ptr + start + tile, zeros)
        if last_full < last:
            tl.store(grad_row_ptr + last_full + tile, zeros, mask=last_full + tile < last)
        return

    row_max = tl.load(row_max_ptr + row)
    log2_sum = tl.load(log_sum_ptr + row) * LOG2_E
    log2_factor = factor * LOG2_E
    # d z / d x without the slope of the soft cap, which differs from column to column
    coefficient = token_grad * (factor * scale if HAS_SOFTCAP else factor)
    for start in range(first, last_full, LANES * VEC):
        store_gradient(
            logits_row_ptr,
            grad_row_ptr,
            start + tile,
            target,
            row_max,
            log2_sum,
            coefficient,
            last,
            scale,
            softcap,
            log2_factor,
            HAS_SOFTCAP,
            False,
        )
    if last_full < last:
        store_gradient(
            logits_row_ptr,
            grad_row_ptr,
            last_full + tile,
            target,
            row_max,
            log2_sum,
            coefficient,
            last,
            scale,
            softcap,
            log2_factor,
            HAS_SOFTCAP,
            True,
        )


def _row_view(logits: torch.Tensor) -> tuple[int, int, int]:
    """Return (T, batch stride, row stride) of logits [B, T, V] or [N, V], in elements; an unused stride is 0."""
    seq_len = logits.shape[-2]
    batch_stride = logits.stride(0) if logits.ndim == 3 and logits.shape[0] > 1 else 0
    return seq_len, batch_stride, logits.stride(-2) if seq_len > 1 else 0


def _compute_dtype(logits: torch.Tensor) -> tl.dtype:
    """Return COMPUTE: float64 for float64 logits, else float32."""
    return tl.float64 if logits.dtype == torch.float64 else tl.float32


def _tile(vocab_size: int, itemsize: int) -> tuple[int, int]:
    """Return (LANES, VEC) of one block of columns: BLOCK_BYTES, or less for a narrow vocabulary."""
    vec = VECTOR_BYTES // itemsize
    block = min(BLOCK_BYTES // itemsize, max(triton.next_power_of_2(vocab_size), 32 * vec))
    return block // vec, vec


def _is_aligned(vec: int, *lengths: int) -> bool:
    """Whether every row starts and ends at a multiple of ``vec`` elements, the 16 bytes of one access."""
    return all(length % vec == 0 for length in lengths)


def _num_warps(lanes: int) -> int:
    return min(NUM_WARPS, max(1, lanes // 32))


def forward(
    logits: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    outputs: tuple[torch.Tensor, ...],
    *,
    ignore_index: int,
    shift: bool,
    scale: float,
    softcap: float | None,
    factor: float,
    multiprocessors: int,
    sum_squares: bool = False,
) -> None:
    """Compute each row's log-probability, entropy, mean logit and top-1 from ``logits`` [B, T, V] or [N, V].

    Fills ``outputs`` = (targets [rows] int32, row_max [rows], log_sum [rows], per_token [4, rows]). The rows of
    ``per_token`` are logps, entropy (of the softmax, in nats), mean_logits (of z) and is_top1 (0 or 1); with
    ``sum_squares`` a fifth row is log sum p^2. ``backward`` reads the first three outputs. ``labels`` is [B, T] or [N];
    ``cu_seqlens`` [B + 1] holds the offsets of packed sequences.
    """
    targets, *stats = outputs
    seq_len, batch_stride, row_stride = _row_view(logits)
    rows, vocab_size = targets.numel(), logits.shape[-1]
    lanes, vec = _tile(vocab_size, logits.element_size())

    blocks = triton.cdiv(vocab_size, lanes * vec)
    splits, blocks_per_split, partials = 1, blocks, targets
    if 0 < rows < ROWS_PER_MULTIPROCESSOR * multiprocessors and blocks > 1:
        # enough programs for twice that many per multiprocessor
        wanted = min(triton.cdiv(2 * ROWS_PER_MULTIPROCESSOR * multiprocessors, rows), MAX_SPLITS)
        wanted = min(wanted, triton.cdiv(blocks, MIN_SPLIT_BLOCKS))
        blocks_per_split = triton.cdiv(blocks, wanted)
        splits = triton.cdiv(blocks, blocks_per_split)
        partials = stats[0].new_empty(rows, splits, PARTIAL_ROWS.value + sum_squares)

    transform = {
        "scale": scale,
        "softcap": softcap if softcap is not None else 1.0,
        "factor": factor,
        "HAS_SOFTCAP": softcap is not None,
        "SQUARES": sum_squares,
        "COMPUTE": _compute_dtype(logits),
    }
    token_logprobs_kernel[(rows * splits,)](
        logits,
        labels,
        cu_seqlens if cu_seqlens is not None else labels,
        targets,
        *stats,
        partials,
        num_rows=rows,
        seq_len=seq_len,
        num_sequences=cu_seqlens.numel() - 1 if cu_seqlens is not None else 0,
        search_steps=cu_seqlens.numel().bit_length() if cu_seqlens is not None else 0,
        vocab_size=vocab_size,
        splits=splits,
        blocks_per_split=blocks_per_split,
        logits_batch_stride=batch_stride,
        logits_row_stride=row_stride,
        labels_batch_stride=labels.stride(0) if labels.ndim == 2 else 0,
        labels_row_stride=labels.stride(-1),
        ignore_index=ignore_index,
        SHIFT=int(shift),
        PACKED=cu_seqlens is not None,
        SPLIT=splits > 1,
        ALIGNED=_is_aligned(vec, vocab_size, batch_stride, row_stride),
        LANES=lanes,
        VEC=vec,
        num_warps=_num_warps(lanes),
        **transform,
        **COMPILER_OPTIONS,
    )
    if splits > 1:
        combine_splits_kernel[(rows,)](
            logits,
            targets,
            *stats,
            partials,
            num_rows=rows,
            seq_len=seq_len,
            vocab_size=vocab_size,
            splits=splits,
            logits_batch_stride=batch_stride,
            logits_row_stride=row_stride,
            BLOCK_SPLITS=MAX_SPLITS,
            num_warps=1,
            **transform,
            **COMPILER_OPTIONS,
        )


def backward(
    logits: torch.Tensor,
    grad: torch.Tensor,
    targets: torch.Tensor,
    token_grads: torch.Tensor,
    row_max: torch.Tensor,
    log_sum: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    factor: float,
) -> None:
    """Fill ``grad`` with d loss / d logits, from ``token_grads`` = d loss / d logps [rows].

    ``targets``, ``row_max`` and ``log_sum`` [rows] are those that ``forward`` filled. ``grad`` has the shape of
    ``logits`` and may be the same tensor.
    """
    seq_len, batch_stride, row_stride = _row_view(logits)
    _, grad_batch_stride, grad_row_stride = _row_view(grad)
    vocab_size = logits.shape[-1]
    lanes, vec = _tile(vocab_size, logits.element_size())
    chunks = triton.cdiv(vocab_size, BACKWARD_BLOCKS * lanes * vec)
    token_logprobs_backward_kernel[(targets.numel() * chunks,)](
        logits,
        grad,
        targets,
        token_grads,
        row_max,
        log_sum,
        seq_len=seq_len,
        vocab_size=vocab_size,
        chunks=chunks,
        logits_batch_stride=batch_stride,
        logits_row_stride=row_stride,
        grad_batch_stride=grad_batch_stride,
        grad_row_stride=grad_row_stride,
        scale=scale,
        softcap=softcap if softcap is not None else 1.0,
        factor=factor,
        HAS_SOFTCAP=softcap is not None,
        ALIGNED=_is_aligned(vec, vocab_size, batch_stride, row_stride, grad_batch_stride, grad_row_stride),
        LANES=lanes,
        VEC=vec,
        BLOCKS=BACKWARD_BLOCKS,
        COMPUTE=_compute_dtype(logits),
        num_warps=_num_warps(lanes),
        **COMPILER_OPTIONS,
    )
