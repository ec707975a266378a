"""Fold logits in the registers of the GEMM that computes them, and keep their P: the tiles never reach memory.

Does the work of ``memory_tiles.py``, whose names it uses, for GPUs whose registers hold a tile (Hopper). A program
computes a tile of logits [ROWS, COLUMNS] and leaves for each row one partial result: the largest u, s, w and sum u, 16
bytes per COLUMNS logits. A second kernel merges the partial results into ``state``.

All programs run at the same time, so a row's reference cannot be the largest u of its first tile. It is the target's u
instead, which ``start`` computes beforehand. In a tile with a column more than 2^60 times as large, the row's part is
relative to its own largest u, and the row's reference becomes the largest of these.

Registers are scarce, so there is no soft cap and no partly filled tile at the end of the vocabulary:
``memory_tiles.py`` folds the remaining columns.
"""

import torch
import triton
import triton.language as tl

from . import COMPILER_OPTIONS
from .memory_tiles import HEADROOM, Kept, others_sum
from .online import (
    EXP_SUM,
    LOG2_E,
    LOGIT_SUM,
    MAXIMUM,
    PARTIAL_EXP_SUM,
    PARTIAL_LOGIT_SUM,
    PARTIAL_MAXIMUM,
    PARTIAL_ROWS,
    PARTIAL_SQUARE_SUM,
    PARTIAL_WEIGHTED_SUM,
    REFERENCE,
    SQUARE_SCALE,
    SQUARE_SUM,
    TARGET_LOGIT,
    WEIGHTED_SUM,
    merge,
)

# The tile of a program: the fastest one on an H200 when P is not kept. It takes 144 KiB of shared memory.
ROWS, COLUMNS, DEPTH = 128, 256, 64
NUM_WARPS, NUM_STAGES = 8, 3
# Blocks of rows that visit the same columns of the weight one after another, and so find them in the L2 cache.
GROUP_ROWS = 16
# Rows of one program of the merge, and partial results per row that it loads at a time.
MERGE_ROWS, MERGE_TILES = 32, 32
START_BLOCK = 1024  # elements of a hidden state that ``start_rows_kernel`` loads at a time


@triton.jit(do_not_specialize=["num_rows", "hidden_size"])
def start_rows_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    state_ptr,
    num_rows: tl.int64,
    hidden_size: tl.int32,
    weight_stride: tl.int32,
    HAS_BIAS: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (rows,). Start ``state`` before the first tile: r is the target's u, computed here; the rest is empty.

    Reads a hidden state and one row of the weight (4 bytes per hidden unit). TARGET_LOGIT is left to the tile that
    holds the target, whose GEMM rounds it in the same way as the other columns.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.maximum(tl.load(targets_ptr + row), 0).to(tl.int64)  # a row without a target takes column 0
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, hidden_size, BLOCK):
        depth = start + tl.arange(0, BLOCK)
        inside = depth < hidden_size
        hidden = tl.load(hidden_ptr + row * hidden_size + depth, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + target * weight_stride + depth, mask=inside, other=0.0)
        products += hidden.to(tl.float32) * weight.to(tl.float32)
    reference = tl.sum(products, axis=0)
    if HAS_BIAS:
        reference += tl.load(bias_ptr + target)
    tl.store(state_ptr + REFERENCE * num_rows + row, reference)
    tl.store(state_ptr + EXP_SUM * num_rows + row, 0.0)
    tl.store(state_ptr + WEIGHTED_SUM * num_rows + row, 0.0)
    tl.store(state_ptr + LOGIT_SUM * num_rows + row, 0.0)
    tl.store(state_ptr + MAXIMUM * num_rows + row, float("-inf"))
    if SQUARES:
        tl.store(state_ptr + SQUARE_SUM * num_rows + row, 0.0)


@triton.jit
def multiply_tile(
    hidden_ptr, weight_ptr, bias_ptr, num_rows, column_blocks, weight_stride,
    HIDDEN_SIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    """Return (u [ROWS, COLUMNS], block of rows, block of columns) of this program.

    u stays in the registers of its GEMM. GROUP_ROWS blocks of rows visit a block of columns one after another, so that
    its part of the weight is read from the L2 cache.
    """
    row_blocks = tl.cdiv(num_rows, ROWS)
    program = tl.program_id(0)
    group = program // (GROUP_ROWS * column_blocks)
    group_size = tl.minimum(row_blocks - group * GROUP_ROWS, GROUP_ROWS)
    row_block = group * GROUP_ROWS + program % (GROUP_ROWS * column_blocks) % group_size
    column_block = program % (GROUP_ROWS * column_blocks) // group_size

    # rows past the end wrap around to the first ones; masks drop their results
    rows = (row_block * ROWS + tl.arange(0, ROWS)) % num_rows
    columns = column_block * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    hidden_ptrs = hidden_ptr + rows.to(tl.int64)[:, None] * HIDDEN_SIZE + depth[None, :]
    weight_ptrs = weight_ptr + columns[None, :] * weight_stride + depth[:, None]
    u = tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in range(0, HIDDEN_SIZE, DEPTH):
        u = tl.dot(tl.load(hidden_ptrs), tl.load(weight_ptrs), u)
        hidden_ptrs += DEPTH
        weight_ptrs += DEPTH
    if HAS_BIAS:
        u += tl.load(bias_ptr + columns)[None, :]
    return u, row_block, column_block


@triton.jit
def kept_pointers(
    kept_ptr, kept_stride, row_block, column_block, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr
):
    """Return pointers [ROWS, WIDTH] to the first WIDTH columns of this program's tile of P."""
    tile_ptr = kept_ptr + row_block.to(tl.int64) * ROWS * kept_stride + column_block * COLUMNS
    # offsets within a tile fit into 32 bits, which take half the registers
    return tile_ptr + (tl.arange(0, ROWS)[:, None] * kept_stride.to(tl.int32) + tl.arange(0, WIDTH)[None, :])


@triton.jit
def tile_reference(tile_max, reference, log2_factor):
    """Return the reference of a row's part of a tile: the row's, unless the largest u exceeds that by HEADROOM."""
    is_near = (tile_max - reference) * log2_factor <= HEADROOM  # false if reference is -inf
    return tl.where(is_near, reference, tile_max)


@triton.jit
def split_columns(u):
    """Return the first and the second half of the columns."""
    return tl.split(tl.permute(tl.reshape(u, u.shape[0], 2, u.shape[1] // 2), 0, 2, 1))


@triton.jit
def fold_part(u, origin, log2_factor, kept_ptrs, is_row, KEEP: tl.constexpr, SQUARES: tl.constexpr):
    """Return (exp_sum, weighted_sum, square_sum) of each row over the columns of u; with KEEP store their P.

    Without SQUARES the last one means nothing.
    """
    distance = u - origin[:, None]
    exps = tl.exp2(distance * log2_factor)
    row_sum = tl.sum(exps, axis=1)
    # the finite floor makes 0 * -inf a 0
    row_weighted = tl.sum(exps * tl.maximum(distance, -1e30), axis=1)
    if KEEP:
        tl.store(kept_ptrs, exps.to(kept_ptrs.dtype.element_ty), mask=is_row[:, None])
    row_squares = tl.sum(exps * (exps * SQUARE_SCALE), axis=1) if SQUARES else row_sum
    return row_sum, row_weighted, row_squares


@triton.jit(do_not_specialize=["first", "num_rows", "column_blocks", "num_tiles"])
def fold_register_tiles_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    state_ptr,
    partials_ptr,
    kept_ptr,
    references_ptr,
    first: tl.int32,
    num_rows: tl.int32,
    column_blocks: tl.int32,
    num_tiles: tl.int64,
    weight_stride: tl.int32,
    kept_stride: tl.int64,
    factor: tl.float64,
    HIDDEN_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    SQUARES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    """Grid: (blocks of rows * blocks of columns,). One program computes and folds one tile of logits.

    Reads hidden [rows, H] and whole blocks of the weight's rows, which start at the vocabulary's column ``first``.
    Writes partials [PARTIAL_ROWS, blocks of columns, rows], 16 bytes per row and tile, and the targets' u into
    ``state``. With KEEP also writes P (2 bytes per logit) and the reference it is relative to, into ``references``
    [rows, tiles]. With SQUARES a partial result takes 20 bytes, and a logit two more operations.
    """
    u, row_block, column_block = multiply_tile(
        hidden_ptr, weight_ptr, bias_ptr, num_rows, column_blocks, weight_stride,
        HIDDEN_SIZE, HAS_BIAS, ROWS, COLUMNS, DEPTH, GROUP_ROWS,
    )  # fmt: skip
    rows = row_block * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    log2_factor = tl.full([], factor, tl.float32) * LOG2_E
    tile_max = tl.max(u, axis=1)
    reference = tile_reference(
        tile_max, tl.load(state_ptr + REFERENCE * num_rows + rows, mask=is_row, other=0.0), log2_factor
    )
    # logits of -inf are legal: a row that has no others in this tile must not compute -inf - -inf
    origin = tl.where(reference == float("-inf"), 0.0, reference)
    target = tl.load(targets_ptr + rows, mask=is_row, other=-1) - first
    partial_ptrs = partials_ptr + column_block.to(tl.int64) * num_rows + rows
    stride = column_blocks.to(tl.int64) * num_rows
    tl.store(partial_ptrs + PARTIAL_MAXIMUM * stride, tile_max, mask=is_row)
    tl.store(partial_ptrs + PARTIAL_LOGIT_SUM * stride, tl.sum(u, axis=1), mask=is_row)
    is_here = is_row & (target >= 0) & (target // COLUMNS == column_block)
    if tl.max(is_here.to(tl.int32), axis=0) > 0:
        # Few tiles hold a target of their rows. Done in all tiles, this would be a quarter of the work after the
        # product.
        columns = column_block * COLUMNS + tl.arange(0, COLUMNS)
        u_target = tl.sum(tl.where(columns[None, :] == target[:, None], u, 0.0), axis=1)
        tl.store(state_ptr + TARGET_LOGIT * num_rows + rows, u_target, mask=is_here)
    # quarter by quarter: beside u, registers cannot hold P of more columns
    QUARTER: tl.constexpr = COLUMNS // 4
    kept_ptrs = kept_pointers(kept_ptr, kept_stride, row_block, column_block, ROWS, COLUMNS, QUARTER)
    left, right = split_columns(u)
    u0, u1 = split_columns(left)
    u2, u3 = split_columns(right)
    sum0, weighted0, squares0 = fold_part(u0, origin, log2_factor, kept_ptrs, is_row, KEEP, SQUARES)
    sum1, weighted1, squares1 = fold_part(u1, origin, log2_factor, kept_ptrs + QUARTER, is_row, KEEP, SQUARES)
    sum2, weighted2, squares2 = fold_part(u2, origin, log2_factor, kept_ptrs + 2 * QUARTER, is_row, KEEP, SQUARES)
    sum3, weighted3, squares3 = fold_part(u3, origin, log2_factor, kept_ptrs + 3 * QUARTER, is_row, KEEP, SQUARES)
    tl.store(partial_ptrs + PARTIAL_EXP_SUM * stride, sum0 + sum1 + (sum2 + sum3), mask=is_row)
    tl.store(partial_ptrs + PARTIAL_WEIGHTED_SUM * stride, weighted0 + weighted1 + (weighted2 + weighted3), mask=is_row)
    if SQUARES:
        square_sum = squares0 + squares1 + (squares2 + squares3)
        tl.store(partial_ptrs + PARTIAL_SQUARE_SUM * stride, square_sum, mask=is_row)
    if KEEP:
        tl.store(references_ptr + rows.to(tl.int64) * num_tiles + column_block, reference, mask=is_row)


@triton.jit(do_not_specialize=["num_rows", "num_partials"])
def merge_register_tiles_kernel(
    partials_ptr,
    state_ptr,
    num_rows: tl.int64,
    num_partials: tl.int64,
    factor: tl.float64,
    SQUARES: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    MERGE_TILES: tl.constexpr,
):
    """Grid: (blocks of rows,). Merge partials [PARTIAL_ROWS, num_partials, rows] into ``state``, except TARGET_LOGIT.

    Reads 16 bytes per row and partial result, with SQUARES 20. MERGE_TILES running results per row stay in registers;
    ``merge`` combines them at the end.
    """
    rows = tl.program_id(0).to(tl.int64) * MERGE_ROWS + tl.arange(0, MERGE_ROWS)
    is_row = rows < num_rows
    log2_factor = tl.full([], factor, tl.float32) * LOG2_E
    reference = tl.load(state_ptr + REFERENCE * num_rows + rows, mask=is_row, other=0.0)
    # the state so far counts as one more partial result
    is_first = (tl.arange(0, MERGE_TILES) == 0)[:, None] & is_row[None, :]
    old = state_ptr + rows[None, :] + tl.zeros([MERGE_TILES, MERGE_ROWS], tl.int64)
    references = tl.where(is_first, reference[None, :], float("-inf"))
    sums = tl.load(old + EXP_SUM * num_rows, mask=is_first, other=0.0)
    weighted = tl.load(old + WEIGHTED_SUM * num_rows, mask=is_first, other=0.0)
    totals = tl.load(old + LOGIT_SUM * num_rows, mask=is_first, other=0.0)
    maxima = tl.load(old + MAXIMUM * num_rows, mask=is_first, other=float("-inf"))
    squares = tl.load(old + SQUARE_SUM * num_rows, mask=is_first, other=0.0) if SQUARES else sums
    for start in range(0, num_partials, MERGE_TILES):
        partials = start + tl.arange(0, MERGE_TILES).to(tl.int64)
        inside = (partials < num_partials)[:, None] & is_row[None, :]
        pointers = partials_ptr + partials[:, None] * num_rows + rows[None, :]
        stride = num_partials * num_rows
        more_maxima = tl.load(pointers + PARTIAL_MAXIMUM * stride, mask=inside, other=float("-inf"))
        more_sums = tl.load(pointers + PARTIAL_EXP_SUM * stride, mask=inside, other=0.0)
        more_weighted = tl.load(pointers + PARTIAL_WEIGHTED_SUM * stride, mask=inside, other=0.0)
        totals += tl.load(pointers + PARTIAL_LOGIT_SUM * stride, mask=inside, other=0.0)
        maxima = tl.maximum(maxima, more_maxima)
        # rescale both to the larger reference, with the finite floor of ``merge``
        more_references = tile_reference(more_maxima, reference[None, :], log2_factor)
        new_references = tl.maximum(references, more_references)
        origin = tl.where(new_references == float("-inf"), 0.0, new_references)
        step = tl.where(sums > 0, tl.maximum(references - origin, -1e30), 0.0)
        more_step = tl.where(more_sums > 0, tl.maximum(more_references - origin, -1e30), 0.0)
        rescale, more_rescale = tl.exp2(step * log2_factor), tl.exp2(more_step * log2_factor)
        # Sums reach 2^60 V, so a weighted sum whose factor is 0 may have overflowed: drop it.
        old_weighted = tl.where(rescale > 0, (weighted + sums * step) * rescale, 0.0)
        more_weighted = tl.where(more_rescale > 0, (more_weighted + more_sums * more_step) * more_rescale, 0.0)
        weighted = old_weighted + more_weighted
        sums = sums * rescale + more_sums * more_rescale
        if SQUARES:
            more_squares = tl.load(pointers + PARTIAL_SQUARE_SUM * stride, mask=inside, other=0.0)
            squares = squares * (rescale * rescale) + more_squares * (more_rescale * more_rescale)
        references = new_references
    row_reference, row_sum, row_weighted, row_squares = merge(references, sums, weighted, squares, log2_factor, SQUARES)
    tl.store(state_ptr + REFERENCE * num_rows + rows, row_reference, mask=is_row)
    tl.store(state_ptr + EXP_SUM * num_rows + rows, row_sum, mask=is_row)
    tl.store(state_ptr + WEIGHTED_SUM * num_rows + rows, row_weighted, mask=is_row)
    tl.store(state_ptr + LOGIT_SUM * num_rows + rows, tl.sum(totals, axis=0), mask=is_row)
    tl.store(state_ptr + MAXIMUM * num_rows + rows, tl.max(maxima, axis=0), mask=is_row)
    if SQUARES:
        tl.store(state_ptr + SQUARE_SUM * num_rows + rows, row_squares, mask=is_row)


@triton.jit(do_not_specialize=["first", "num_rows", "column_blocks"])
def keep_register_tiles_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    state_ptr,
    factors_ptr,
    kept_ptr,
    first: tl.int32,
    num_rows: tl.int32,
    column_blocks: tl.int32,
    weight_stride: tl.int32,
    kept_stride: tl.int64,
    factor: tl.float64,
    HIDDEN_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    """Grid: (blocks of rows * blocks of columns,). One program computes one tile of P times its rows' factors.

    For a second visit: P is relative to the reference at the end of the first. Reads hidden [rows, H] and blocks of the
    weight's rows, as ``fold_register_tiles_kernel`` does, and writes 2 bytes per logit, the targets' entries too.
    ``state`` holds REFERENCE, EXP_SUM and TARGET_LOGIT alone, [3, rows].
    """
    u, row_block, column_block = multiply_tile(
        hidden_ptr, weight_ptr, bias_ptr, num_rows, column_blocks, weight_stride,
        HIDDEN_SIZE, HAS_BIAS, ROWS, COLUMNS, DEPTH, GROUP_ROWS,
    )  # fmt: skip
    rows = row_block * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    log2_factor = tl.full([], factor, tl.float32) * LOG2_E
    reference = tl.load(state_ptr + REFERENCE * num_rows + rows, mask=is_row, other=0.0)
    row_sum = tl.load(state_ptr + EXP_SUM * num_rows + rows, mask=is_row, other=1.0)
    u_target = tl.load(state_ptr + TARGET_LOGIT * num_rows + rows, mask=is_row, other=0.0)
    row_factor = tl.load(factors_ptr + rows, mask=is_row, other=0.0)
    target = tl.load(targets_ptr + rows, mask=is_row, other=-1) - first
    kept = tl.exp2((u - reference[:, None]) * log2_factor) * row_factor[:, None]
    kept_ptrs = kept_pointers(kept_ptr, kept_stride, row_block, column_block, ROWS, COLUMNS, COLUMNS)
    tl.store(kept_ptrs, kept.to(kept_ptr.dtype.element_ty), mask=is_row[:, None])
    tl.debug_barrier()  # the target's entry overwrites the one stored above by another thread
    at_target = -others_sum(u_target, reference, row_sum, log2_factor, 1.0, False) * row_factor
    is_here = is_row & (target >= 0) & (target // COLUMNS == column_block)
    target_ptrs = kept_ptr + rows.to(tl.int64) * kept_stride + target
    tl.store(target_ptrs, at_target.to(kept_ptr.dtype.element_ty), mask=is_here)


def serves(weight: torch.Tensor) -> bool:
    """Return whether the kernels can read this LM head weight [V, H].

    H must be a multiple of DEPTH, each row contiguous, the distance between rows a multiple of 16 elements, the first
    row at a 16-byte boundary, and 32-bit offsets must reach the last element.
    """
    is_aligned = weight.stride(1) == 1 and weight.stride(0) % 16 == 0 and weight.data_ptr() % 16 == 0
    return is_aligned and weight.shape[1] % DEPTH == 0 and len(weight) * weight.stride(0) < 2**31


def partial_bytes(num_columns: int, is_kept: bool, sum_squares: bool) -> int:
    """Return the bytes per row beside the state: a partial result per tile, and with ``is_kept`` its P's reference."""
    return (PARTIAL_ROWS.value + sum_squares + is_kept) * 4 * -(-num_columns // COLUMNS)


def start(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    state: torch.Tensor,
    *,
    sum_squares: bool = False,
) -> None:
    """Start ``state`` [STATE_ROWS, rows], into which the first tile is folded; references are the targets' logits.

    ``hidden`` is [rows, H], ``weight`` the whole LM head [V, H] and ``bias`` its bias [V] or None. With ``sum_squares``
    the state has the row SQUARE_SUM too.
    """
    start_rows_kernel[(len(hidden),)](
        hidden,
        weight,
        bias if bias is not None else state,
        targets,
        state,
        num_rows=len(hidden),
        hidden_size=hidden.shape[1],
        weight_stride=weight.stride(0),
        HAS_BIAS=bias is not None,
        SQUARES=sum_squares,
        BLOCK=START_BLOCK,
        **COMPILER_OPTIONS,
    )


def fold(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    state: torch.Tensor,
    columns: slice,
    kept: Kept | None,
    *,
    factor: float,
    sum_squares: bool = False,
) -> None:
    """Fold the logits of ``columns`` of the vocabulary into ``state`` [STATE_ROWS, rows], which ``start`` has started.

    ``columns`` are whole blocks of COLUMNS. ``hidden`` is [rows, H]; ``weight`` [V, H] and ``bias`` [V] are the whole
    LM head's. If ``kept`` is given, P is stored there, and each block of columns is a tile of it.
    """
    num_rows, column_blocks = len(hidden), (columns.stop - columns.start) // COLUMNS
    partials = state.new_empty(PARTIAL_ROWS.value + sum_squares, column_blocks, num_rows)
    values, references, _ = kept if kept is not None else (None, None, 0)
    fold_register_tiles_kernel[_grid(num_rows, column_blocks)](
        hidden,
        weight[columns],
        bias[columns] if bias is not None else state,
        targets,
        state,
        partials,
        values if kept is not None else hidden,
        references if kept is not None else state,
        first=columns.start,
        num_rows=num_rows,
        column_blocks=column_blocks,
        num_tiles=0 if kept is None else references.shape[1],
        weight_stride=weight.stride(0),
        kept_stride=0 if kept is None else values.stride(0),
        factor=factor,
        HIDDEN_SIZE=hidden.shape[1],
        HAS_BIAS=bias is not None,
        KEEP=kept is not None,
        SQUARES=sum_squares,
        **_tile(),
        **COMPILER_OPTIONS,
    )
    merge_register_tiles_kernel[(triton.cdiv(num_rows, MERGE_ROWS),)](
        partials,
        state,
        num_rows=num_rows,
        num_partials=column_blocks,
        factor=factor,
        SQUARES=sum_squares,
        MERGE_ROWS=MERGE_ROWS,
        MERGE_TILES=MERGE_TILES,
        **COMPILER_OPTIONS,
    )


def keep(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kept: torch.Tensor,
    targets: torch.Tensor,
    state: torch.Tensor,
    factors: torch.Tensor,
    columns: slice,
    *,
    factor: float,
) -> None:
    """Store P of ``columns``, whole blocks of COLUMNS, times ``factors`` [rows] into ``kept``, on a second visit.

    ``state`` [3, rows] holds REFERENCE, EXP_SUM and TARGET_LOGIT after all columns were folded.
    """
    num_rows, column_blocks = len(hidden), (columns.stop - columns.start) // COLUMNS
    keep_register_tiles_kernel[_grid(num_rows, column_blocks)](
        hidden,
        weight[columns],
        bias[columns] if bias is not None else state,
        targets,
        state,
        factors,
        kept,
        first=columns.start,
        num_rows=num_rows,
        column_blocks=column_blocks,
        weight_stride=weight.stride(0),
        kept_stride=kept.stride(0),
        factor=factor,
        HIDDEN_SIZE=hidden.shape[1],
        HAS_BIAS=bias is not None,
        **_tile(),
        **COMPILER_OPTIONS,
    )


def _grid(num_rows: int, column_blocks: int) -> tuple[int]:
    return (triton.cdiv(num_rows, ROWS) * column_blocks,)


def _tile() -> dict[str, int]:
    """Return the launch options of a tile."""
    return {
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
        "DEPTH": DEPTH,
        "GROUP_ROWS": GROUP_ROWS,
        "num_warps": NUM_WARPS,
        "num_stages": NUM_STAGES,
    }
