"""Tiles of logits that are never written: folded, and their P kept, in the registers of the GEMM that they come from.

What ``memory_tiles.py`` does with a tile in memory, under its names. A program computes [ROWS, COLUMNS] logits and
leaves of each row the largest u, s, w and sum u: 16 bytes of COLUMNS logits, which a second kernel adds to ``state``.

All programs run at once, so a row's reference cannot be the largest u of its first tile: it is the target's u, found
beforehand. A tile with a column more than 2^60 times as large takes its own largest u, and the row's reference becomes
the largest of these.

Registers are what a tile has too few of, so there is no soft cap, and no tile that the vocabulary ends in: what is left
of it is for ``memory_tiles.py``.
"""

import torch
import triton
import triton.language as tl

from . import COMPILER_OPTIONS
from .memory_tiles import HEADROOM, Kept, others_sum
from .online import LOG2_E, merge

# The tile of a program, fastest on an H200 where nothing was kept; it takes 144 KiB of shared memory.
ROWS, COLUMNS, DEPTH = 128, 256, 64
NUM_WARPS, NUM_STAGES = 8, 3
# Blocks of rows that visit the same columns of the weight together, and so find them in the L2 cache.
GROUP_ROWS = 16
# A program of the merge has so many rows, and so many partial results of each at a time.
MERGE_ROWS, MERGE_TILES = 32, 32
START_BLOCK = 1024  # of one hidden state at a time


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
    BLOCK: tl.constexpr,
):
    """Grid: (rows,). ``state`` before the first tile: r is the target's u, found here. Row 2, the target's u, is left
    to the tile that holds it, whose GEMM rounds it as it does the others.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.maximum(tl.load(targets_ptr + row), 0).to(tl.int64)  # any column serves a row that has none
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
    tl.store(state_ptr + row, reference)
    tl.store(state_ptr + num_rows + row, 0.0)
    tl.store(state_ptr + 3 * num_rows + row, 0.0)
    tl.store(state_ptr + 4 * num_rows + row, 0.0)
    tl.store(state_ptr + 5 * num_rows + row, float("-inf"))


@triton.jit
def multiply_tile(
    hidden_ptr, weight_ptr, bias_ptr, num_rows, column_blocks, weight_stride,
    HIDDEN_SIZE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP_ROWS: tl.constexpr,
):  # fmt: skip
    """(u [ROWS, COLUMNS], its block of rows, its block of columns) of this program."""
    row_blocks = tl.cdiv(num_rows, ROWS)
    program = tl.program_id(0)
    group = program // (GROUP_ROWS * column_blocks)
    group_size = tl.minimum(row_blocks - group * GROUP_ROWS, GROUP_ROWS)
    row_block = group * GROUP_ROWS + program % (GROUP_ROWS * column_blocks) % group_size
    column_block = program % (GROUP_ROWS * column_blocks) // group_size

    # past the last row come the first once more, whose results are not stored
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
    """Of the first WIDTH columns of a tile of P."""
    tile_ptr = kept_ptr + row_block.to(tl.int64) * ROWS * kept_stride + column_block * COLUMNS
    # 32 bits reach all of a tile, and take half the registers
    return tile_ptr + (tl.arange(0, ROWS)[:, None] * kept_stride.to(tl.int32) + tl.arange(0, WIDTH)[None, :])


@triton.jit
def tile_reference(tile_max, reference, log2_factor):
    """What a row's part of a tile is relative to: the row's reference, unless that is too far below its largest u."""
    is_near = (tile_max - reference) * log2_factor <= HEADROOM  # never if that is -inf
    return tl.where(is_near, reference, tile_max)


@triton.jit
def split_columns(u):
    """The first half of the columns, and the second."""
    return tl.split(tl.permute(tl.reshape(u, u.shape[0], 2, u.shape[1] // 2), 0, 2, 1))


@triton.jit
def fold_part(u, origin, log2_factor, kept_ptrs, is_row, KEEP: tl.constexpr):
    """(s, w) of each row of some columns; their P is stored with KEEP."""
    distance = u - origin[:, None]
    exps = tl.exp2(distance * log2_factor)
    row_sum = tl.sum(exps, axis=1)
    # the finite floor turns 0 * -inf into 0
    row_weighted = tl.sum(exps * tl.maximum(distance, -1e30), axis=1)
    if KEEP:
        tl.store(kept_ptrs, exps.to(kept_ptrs.dtype.element_ty), mask=is_row[:, None])
    return row_sum, row_weighted


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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
):
    """Grid: (blocks of rows x blocks of columns,). Reads hidden [rows, H] and whole blocks of the weight's rows, from
    the vocabulary's column ``first`` on, writes partials [4, blocks of columns, rows] and the targets' u into
    ``state``; with KEEP P, and what it is relative to into ``references`` [rows, tiles].
    """
    u, row_block, column_block = multiply_tile(
        hidden_ptr, weight_ptr, bias_ptr, num_rows, column_blocks, weight_stride,
        HIDDEN_SIZE, HAS_BIAS, ROWS, COLUMNS, DEPTH, GROUP_ROWS,
    )  # fmt: skip
    rows = row_block * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    log2_factor = tl.full([], factor, tl.float32) * LOG2_E
    tile_max = tl.max(u, axis=1)
    reference = tile_reference(tile_max, tl.load(state_ptr + rows, mask=is_row, other=0.0), log2_factor)
    # -inf logits are legal: a row that has nothing else here must not compute -inf - -inf
    origin = tl.where(reference == float("-inf"), 0.0, reference)
    target = tl.load(targets_ptr + rows, mask=is_row, other=-1) - first
    partial_ptrs = partials_ptr + column_block.to(tl.int64) * num_rows + rows
    stride = column_blocks.to(tl.int64) * num_rows
    tl.store(partial_ptrs, tile_max, mask=is_row)
    tl.store(partial_ptrs + 3 * stride, tl.sum(u, axis=1), mask=is_row)
    is_here = is_row & (target >= 0) & (target // COLUMNS == column_block)
    if tl.max(is_here.to(tl.int32), axis=0) > 0:
        # few tiles hold a row's target; in all of them this would be a quarter of the work after the product
        columns = column_block * COLUMNS + tl.arange(0, COLUMNS)
        u_target = tl.sum(tl.where(columns[None, :] == target[:, None], u, 0.0), axis=1)
        tl.store(state_ptr + 2 * num_rows + rows, u_target, mask=is_here)
    # quarter by quarter: P of more columns would not fit beside u
    QUARTER: tl.constexpr = COLUMNS // 4
    kept_ptrs = kept_pointers(kept_ptr, kept_stride, row_block, column_block, ROWS, COLUMNS, QUARTER)
    left, right = split_columns(u)
    u0, u1 = split_columns(left)
    u2, u3 = split_columns(right)
    sum0, weighted0 = fold_part(u0, origin, log2_factor, kept_ptrs, is_row, KEEP)
    sum1, weighted1 = fold_part(u1, origin, log2_factor, kept_ptrs + QUARTER, is_row, KEEP)
    sum2, weighted2 = fold_part(u2, origin, log2_factor, kept_ptrs + 2 * QUARTER, is_row, KEEP)
    sum3, weighted3 = fold_part(u3, origin, log2_factor, kept_ptrs + 3 * QUARTER, is_row, KEEP)
    tl.store(partial_ptrs + stride, sum0 + sum1 + (sum2 + sum3), mask=is_row)
    tl.store(partial_ptrs + 2 * stride, weighted0 + weighted1 + (weighted2 + weighted3), mask=is_row)
    if KEEP:
        tl.store(references_ptr + rows.to(tl.int64) * num_tiles + column_block, reference, mask=is_row)


@triton.jit(do_not_specialize=["num_rows", "num_partials"])
def merge_register_tiles_kernel(
    partials_ptr,
    state_ptr,
    num_rows: tl.int64,
    num_partials: tl.int64,
    factor: tl.float64,
    MERGE_ROWS: tl.constexpr,
    MERGE_TILES: tl.constexpr,
):
    """Grid: (blocks of rows,). Adds partials [4, num_partials, rows] to ``state``, all but the target's u."""
    rows = tl.program_id(0).to(tl.int64) * MERGE_ROWS + tl.arange(0, MERGE_ROWS)
    is_row = rows < num_rows
    log2_factor = tl.full([], factor, tl.float32) * LOG2_E
    reference = tl.load(state_ptr + rows, mask=is_row, other=0.0)
    # what was there before is one more partial result
    is_first = (tl.arange(0, MERGE_TILES) == 0)[:, None] & is_row[None, :]
    old = state_ptr + rows[None, :] + tl.zeros([MERGE_TILES, MERGE_ROWS], tl.int64)
    references = tl.where(is_first, reference[None, :], float("-inf"))
    sums = tl.load(old + num_rows, mask=is_first, other=0.0)
    weighted = tl.load(old + 3 * num_rows, mask=is_first, other=0.0)
    totals = tl.load(old + 4 * num_rows, mask=is_first, other=0.0)
    maxima = tl.load(old + 5 * num_rows, mask=is_first, other=float("-inf"))
    for start in range(0, num_partials, MERGE_TILES):
        partials = start + tl.arange(0, MERGE_TILES).to(tl.int64)
        inside = (partials < num_partials)[:, None] & is_row[None, :]
        pointers = partials_ptr + partials[:, None] * num_rows + rows[None, :]
        stride = num_partials * num_rows
        more_maxima = tl.load(pointers, mask=inside, other=float("-inf"))
        more_sums = tl.load(pointers + stride, mask=inside, other=0.0)
        more_weighted = tl.load(pointers + 2 * stride, mask=inside, other=0.0)
        totals += tl.load(pointers + 3 * stride, mask=inside, other=0.0)
        maxima = tl.maximum(maxima, more_maxima)
        # both relative to the larger reference; the finite floor as in ``merge``
        more_references = tile_reference(more_maxima, reference[None, :], log2_factor)
        new_references = tl.maximum(references, more_references)
        origin = tl.where(new_references == float("-inf"), 0.0, new_references)
        step = tl.where(sums > 0, tl.maximum(references - origin, -1e30), 0.0)
        more_step = tl.where(more_sums > 0, tl.maximum(more_references - origin, -1e30), 0.0)
        rescale, more_rescale = tl.exp2(step * log2_factor), tl.exp2(more_step * log2_factor)
        # sums of up to 2^60 V may overflow in what then counts for nothing
        old_weighted = tl.where(rescale > 0, (weighted + sums * step) * rescale, 0.0)
        more_weighted = tl.where(more_rescale > 0, (more_weighted + more_sums * more_step) * more_rescale, 0.0)
        weighted = old_weighted + more_weighted
        sums = sums * rescale + more_sums * more_rescale
        references = new_references
    row_reference, row_sum, row_weighted = merge(references, sums, weighted, log2_factor)
    tl.store(state_ptr + rows, row_reference, mask=is_row)
    tl.store(state_ptr + num_rows + rows, row_sum, mask=is_row)
    tl.store(state_ptr + 3 * num_rows + rows, row_weighted, mask=is_row)
    tl.store(state_ptr + 4 * num_rows + rows, tl.sum(totals, axis=0), mask=is_row)
    tl.store(state_ptr + 5 * num_rows + rows, tl.max(maxima, axis=0), mask=is_row)


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
    """Grid as that of ``fold_register_tiles_kernel``. P times the rows' factors, the targets' entries too, under the
    reference that all tiles led to. ``state`` is [3, rows].
    """
    u, row_block, column_block = multiply_tile(
        hidden_ptr, weight_ptr, bias_ptr, num_rows, column_blocks, weight_stride,
        HIDDEN_SIZE, HAS_BIAS, ROWS, COLUMNS, DEPTH, GROUP_ROWS,
    )  # fmt: skip
    rows = row_block * ROWS + tl.arange(0, ROWS)
    is_row = rows < num_rows
    log2_factor = tl.full([], factor, tl.float32) * LOG2_E
    reference = tl.load(state_ptr + rows, mask=is_row, other=0.0)
    row_sum = tl.load(state_ptr + num_rows + rows, mask=is_row, other=1.0)
    u_target = tl.load(state_ptr + 2 * num_rows + rows, mask=is_row, other=0.0)
    row_factor = tl.load(factors_ptr + rows, mask=is_row, other=0.0)
    target = tl.load(targets_ptr + rows, mask=is_row, other=-1) - first
    kept = tl.exp2((u - reference[:, None]) * log2_factor) * row_factor[:, None]
    kept_ptrs = kept_pointers(kept_ptr, kept_stride, row_block, column_block, ROWS, COLUMNS, COLUMNS)
    tl.store(kept_ptrs, kept.to(kept_ptr.dtype.element_ty), mask=is_row[:, None])
    tl.debug_barrier()  # the target's entry over what was stored there
    at_target = -others_sum(u_target, reference, row_sum, log2_factor, 1.0, False) * row_factor
    is_here = is_row & (target >= 0) & (target // COLUMNS == column_block)
    target_ptrs = kept_ptr + rows.to(tl.int64) * kept_stride + target
    tl.store(target_ptrs, at_target.to(kept_ptr.dtype.element_ty), mask=is_here)


def serves(weight: torch.Tensor) -> bool:
    """Whether steps along H of the weight [V, H] are whole, wide loads reach its rows and 32 bits its end."""
    is_aligned = weight.stride(1) == 1 and weight.stride(0) % 16 == 0 and weight.data_ptr() % 16 == 0
    return is_aligned and weight.shape[1] % DEPTH == 0 and len(weight) * weight.stride(0) < 2**31


def partial_bytes(num_columns: int, is_kept: bool) -> int:
    """Bytes for each row: four partial results a tile, and a reference where its P is kept."""
    return (4 + is_kept) * 4 * -(-num_columns // COLUMNS)


def start(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, state: torch.Tensor
) -> None:
    """Make ``state`` [6, rows] what the first tile is folded into, from the whole ``weight`` and ``bias``."""
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
) -> None:
    """Fold whole blocks of ``columns`` of the vocabulary into ``state`` [6, rows], from hidden [rows, H] and the whole
    ``weight`` [V, H] and ``bias`` [V]; ``kept`` takes their P, each block a tile.
    """
    num_rows, column_blocks = len(hidden), (columns.stop - columns.start) // COLUMNS
    partials = state.new_empty(4, column_blocks, num_rows)
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
        **_tile(),
        **COMPILER_OPTIONS,
    )
    merge_register_tiles_kernel[(triton.cdiv(num_rows, MERGE_ROWS),)](
        partials,
        state,
        num_rows=num_rows,
        num_partials=column_blocks,
        factor=factor,
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
    """P of whole blocks of ``columns``, once all were folded into ``state`` [3, rows], times ``factors`` [rows]."""
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
    return {
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
        "DEPTH": DEPTH,
        "GROUP_ROWS": GROUP_ROWS,
        "num_warps": NUM_WARPS,
        "num_stages": NUM_STAGES,
    }
