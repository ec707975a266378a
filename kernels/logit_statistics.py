"""Row statistics of logits that are never written: a GEMM whose tiles are folded in the registers they came to be in.

z = factor * u are the logits of ``token_logprobs.py``. Each program computes [ROWS, COLUMNS] of them and leaves of each
row max u, s = sum exp(factor (u - max)), w = sum exp(factor (u - max)) (u - max) and sum u: 16 bytes of COLUMNS logits.
A second kernel merges a row's into the ``state`` of ``vocabulary_tiles.py``, relative to the row's maximum.

Registers are what a tile has too few of, so there is no soft cap, and no tile that the vocabulary ends in: what is left
of it is folded by ``vocabulary_tiles.py``.
"""

import torch
import triton
import triton.language as tl

from .token_logprobs import LOG2_E, merge

# The tile of a program, fastest on an H200; it takes 144 KiB of shared memory.
ROWS, COLUMNS, DEPTH = 128, 256, 64
NUM_WARPS, NUM_STAGES = 8, 3
# Blocks of rows that visit the same columns of the weight together, and so find them in the L2 cache.
GROUP_ROWS = 16
# A program of the merge has so many rows, and so many partial results of each at a time.
MERGE_ROWS, MERGE_TILES = 32, 32


@triton.jit(do_not_specialize=["num_rows", "column_blocks"])
def logit_statistics_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    partials_ptr,
    state_ptr,
    num_rows: tl.int32,
    column_blocks: tl.int32,
    weight_stride: tl.int32,
    factor: tl.float64,
    HIDDEN_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    """Grid: (blocks of rows x blocks of columns,). Reads hidden [rows, H] and the weight's whole blocks, writes
    partials [4, blocks of columns, rows], and the targets' u into row 2 of ``state``.
    """
    row_blocks = tl.cdiv(num_rows, ROWS)
    program = tl.program_id(0)
    group = program // (GROUP_ROWS * column_blocks)
    group_size = tl.minimum(row_blocks - group * GROUP_ROWS, GROUP_ROWS)
    row_block = group * GROUP_ROWS + program % (GROUP_ROWS * column_blocks) % group_size
    column_block = program % (GROUP_ROWS * column_blocks) // group_size

    rows = row_block * ROWS + tl.arange(0, ROWS)
    columns = column_block * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    # past the last row come the first once more, whose results are not stored
    hidden_ptrs = hidden_ptr + (rows % num_rows).to(tl.int64)[:, None] * HIDDEN_SIZE + depth[None, :]
    weight_ptrs = weight_ptr + columns[None, :] * weight_stride + depth[:, None]
    u = tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in range(0, HIDDEN_SIZE, DEPTH):
        u = tl.dot(tl.load(hidden_ptrs), tl.load(weight_ptrs), u)
        hidden_ptrs += DEPTH
        weight_ptrs += DEPTH

    if HAS_BIAS:
        u += tl.load(bias_ptr + columns)[None, :]
    log2_factor = tl.full([], factor, tl.float32) * LOG2_E
    row_max = tl.max(u, axis=1)
    # -inf logits are legal: a row that has nothing else here must not compute -inf - -inf
    distance = u - tl.where(row_max == float("-inf"), 0.0, row_max)[:, None]
    exps = tl.exp2(distance * log2_factor)
    is_row = rows < num_rows
    partial_ptrs = partials_ptr + column_block.to(tl.int64) * num_rows + rows
    stride = column_blocks.to(tl.int64) * num_rows
    tl.store(partial_ptrs, row_max, mask=is_row)
    tl.store(partial_ptrs + stride, tl.sum(exps, axis=1), mask=is_row)
    # the finite floor turns 0 * -inf into 0
    tl.store(partial_ptrs + 2 * stride, tl.sum(exps * tl.maximum(distance, -1e30), axis=1), mask=is_row)
    tl.store(partial_ptrs + 3 * stride, tl.sum(u, axis=1), mask=is_row)
    target = tl.load(targets_ptr + rows, mask=is_row, other=-1)
    u_target = tl.sum(tl.where(columns[None, :] == target[:, None], u, 0.0), axis=1)
    tl.store(
        state_ptr + 2 * num_rows + rows, u_target, mask=is_row & (target >= 0) & (target // COLUMNS == column_block)
    )


@triton.jit(do_not_specialize=["num_rows", "num_partials"])
def merge_statistics_kernel(
    partials_ptr,
    state_ptr,
    num_rows: tl.int64,
    num_partials: tl.int64,
    factor: tl.float64,
    MERGE_ROWS: tl.constexpr,
    MERGE_TILES: tl.constexpr,
):
    """Grid: (blocks of rows,). ``state`` but for its row 2 from partials [4, num_partials, rows]."""
    rows = tl.program_id(0).to(tl.int64) * MERGE_ROWS + tl.arange(0, MERGE_ROWS)
    is_row = rows < num_rows
    log2_factor = tl.full([], factor, tl.float32) * LOG2_E
    maxima = tl.full([MERGE_TILES, MERGE_ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([MERGE_TILES, MERGE_ROWS], tl.float32)
    weighted = tl.zeros([MERGE_TILES, MERGE_ROWS], tl.float32)
    totals = tl.zeros([MERGE_TILES, MERGE_ROWS], tl.float32)
    for start in range(0, num_partials, MERGE_TILES):
        partials = start + tl.arange(0, MERGE_TILES).to(tl.int64)
        inside = (partials < num_partials)[:, None] & is_row[None, :]
        pointers = partials_ptr + partials[:, None] * num_rows + rows[None, :]
        stride = num_partials * num_rows
        more_maxima = tl.load(pointers, mask=inside, other=float("-inf"))
        more_sums = tl.load(pointers + stride, mask=inside, other=0.0)
        more_weighted = tl.load(pointers + 2 * stride, mask=inside, other=0.0)
        totals += tl.load(pointers + 3 * stride, mask=inside, other=0.0)
        # both relative to the larger maximum; the finite floor as in ``merge``
        new_maxima = tl.maximum(maxima, more_maxima)
        origin = tl.where(new_maxima == float("-inf"), 0.0, new_maxima)
        step = tl.where(sums > 0, tl.maximum(maxima - origin, -1e30), 0.0)
        more_step = tl.where(more_sums > 0, tl.maximum(more_maxima - origin, -1e30), 0.0)
        rescale, more_rescale = tl.exp2(step * log2_factor), tl.exp2(more_step * log2_factor)
        weighted = (weighted + sums * step) * rescale + (more_weighted + more_sums * more_step) * more_rescale
        sums = sums * rescale + more_sums * more_rescale
        maxima = new_maxima
    row_max, row_sum, row_weighted = merge(maxima, sums, weighted, log2_factor)
    tl.store(state_ptr + rows, row_max, mask=is_row)
    tl.store(state_ptr + num_rows + rows, row_sum, mask=is_row)
    tl.store(state_ptr + 3 * num_rows + rows, row_weighted, mask=is_row)
    tl.store(state_ptr + 4 * num_rows + rows, tl.sum(totals, axis=0), mask=is_row)
    tl.store(state_ptr + 5 * num_rows + rows, row_max, mask=is_row)


def whole_columns(weight: torch.Tensor) -> int:
    """The first rows of the weight [V, H] that ``statistics`` serves: in whole blocks; none where steps along H are
    not whole, wide loads do not reach its rows or 32 bits its end.
    """
    vocab_size, hidden_size = weight.shape
    is_aligned = weight.stride(1) == 1 and weight.stride(0) % 16 == 0 and weight.data_ptr() % 16 == 0
    if not is_aligned or hidden_size % DEPTH or vocab_size * weight.stride(0) >= 2**31:
        return 0
    return vocab_size // COLUMNS * COLUMNS


def partial_bytes(vocab_size: int) -> int:
    """What ``statistics`` needs of each row beside its results."""
    return 4 * 4 * (vocab_size // COLUMNS)


def statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    state: torch.Tensor,
    *,
    factor: float,
) -> None:
    """Fill ``state`` [6, rows] as ``vocabulary_tiles.fold`` does, from hidden [rows, H] and the weight's
    ``whole_columns``.
    """
    num_rows, column_blocks = len(hidden), whole_columns(weight) // COLUMNS
    partials = state.new_empty(4, column_blocks, num_rows)
    logit_statistics_kernel[(triton.cdiv(num_rows, ROWS) * column_blocks,)](
        hidden,
        weight,
        bias if bias is not None else state,
        targets,
        partials,
        state,
        num_rows=num_rows,
        column_blocks=column_blocks,
        weight_stride=weight.stride(0),
        factor=factor,
        HIDDEN_SIZE=hidden.shape[1],
        HAS_BIAS=bias is not None,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        DEPTH=DEPTH,
        GROUP_ROWS=GROUP_ROWS,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    merge_statistics_kernel[(triton.cdiv(num_rows, MERGE_ROWS),)](
        partials,
        state,
        num_rows=num_rows,
        num_partials=column_blocks,
        factor=factor,
        MERGE_ROWS=MERGE_ROWS,
        MERGE_TILES=MERGE_TILES,
    )
