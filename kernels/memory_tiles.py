"""Fold tiles of logits that exist in memory for a moment, and keep only their unnormalised softmax for the gradient.

The logits of a chunk of tokens are computed one tile of columns at a time. Each tile is folded into the state of its
rows (``online.py`` defines the state and u, factor, r, s and w) and overwritten by the next one. A row's reference r is
the largest u of its first tile. r need not be the row's maximum: exp(factor (u - r)) has float32's range, so r changes
only when a column exceeds it by more than 2^60. The state is a tensor [STATE_ROWS, rows]; its first three rows, r, s
and the target's u, suffice for a second visit.

What is kept of a tile for the gradient is P = exp(factor (u - r)) times the soft cap's slope, in bfloat16. bfloat16's
exponent has float32's range, so P is rescaled only where the row takes a new r. In the target's column P is replaced by
``-others``, where others is the part of s that the other columns contribute. With that,

    d logp / d x = -k P / s    in every column,    k = factor, times the scale under a soft cap.

P is kept for all columns, or for one panel of a few tiles at a time. While panels pass on a first visit, s is not known
yet: the target's entry of a panel is 0, and ``add_target_rows`` adds its part of P @ weight, ``-others`` times one row
of the weight, at the end. On a second visit s and d loss / d logp are known, and ``keep`` multiplies P by each row's
factor: the result is d loss / d logits itself.

With SQUARES a first visit also adds up the squares of exp(factor (u - r)), each times 2^-60. Without that factor a
square may reach 2^120, and a sum of V squares may exceed float32's range. The row's largest square is at least 1, so
that no square which counts underflows. It costs two more operations per logit and 4 bytes per row and tile.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import COMPILER_OPTIONS
from .online import (
    ENTROPY,
    EXP_SUM,
    INVALID_TARGET,
    IS_TOP1,
    LN_2,
    LOG2_E,
    LOG_SUM_SQUARES,
    LOGIT_SUM,
    LOGP,
    MAXIMUM,
    MEAN_LOGIT,
    REFERENCE,
    SQUARE_SCALE,
    SQUARE_SUM,
    TARGET_LOGIT,
    WEIGHTED_SUM,
    cap,
    log_probability,
    tile_columns,
)

# A thread loads VEC logits (16 bytes) at a time, and has BLOCK / (32 NUM_WARPS VEC) such loads in flight.
BLOCK = 1024
VEC = 4
NUM_WARPS = 4
ROWS_BLOCK = 128  # rows of one program of ``finish_rows_kernel``, which reads states alone
# A row takes a new reference when a column's exponential relative to the old one would exceed 2 to this power.
HEADROOM = tl.constexpr(60.0)


@triton.jit
def load_tile(
    tile_ptr, bias_ptr, start, cols, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Return (u, slope, inside) of the columns start .. start + LANES * VEC of one row of a tile.

    u is -inf outside the tile. slope is the derivative of u w.r.t. scale * x under a soft cap, else 1.
    """
    columns = start + tile_columns(True, LANES, VEC)
    x = tl.load(tile_ptr + columns)  # no mask: the buffer holds whole blocks
    inside = columns < cols
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    u, slope = cap(x, scale, softcap, HAS_SOFTCAP)
    return tl.where(inside, u, float("-inf")), slope, inside


@triton.jit
def fold_columns(
    tile_ptr, bias_ptr, kept_ptr, cols, reference, scale, softcap, log2_factor,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, KEEP: tl.constexpr, SQUARES: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Return (exp_sum, weighted_sum, logit_sum, maximum, square_sum) of one row of a tile; with KEEP store its P.

    The running values of each lane, four or with SQUARES five, stay in registers. A lane's VEC columns lie in one
    thread, so the loop moves nothing between threads. Without SQUARES square_sum is 0.
    """
    lane_sum = tl.zeros([LANES], tl.float32)
    lane_weighted = tl.zeros([LANES], tl.float32)
    lane_total = tl.zeros([LANES], tl.float32)
    lane_max = tl.full([LANES], float("-inf"), tl.float32)
    lane_squares = tl.zeros([LANES], tl.float32)
    for start in range(0, cols, LANES * VEC):
        u, slope, inside = load_tile(tile_ptr, bias_ptr, start, cols, scale, softcap, HAS_BIAS, HAS_SOFTCAP, LANES, VEC)
        distance = u - reference
        exps = tl.exp2(distance * log2_factor)
        lane_sum += tl.sum(exps, axis=1)
        # the finite floor makes 0 * -inf a 0
        lane_weighted += tl.sum(exps * tl.maximum(distance, -1e30), axis=1)
        lane_total += tl.sum(tl.where(inside, u, 0.0), axis=1)
        lane_max = tl.maximum(lane_max, tl.max(u, axis=1))
        if SQUARES:
            lane_squares += tl.sum(exps * (exps * SQUARE_SCALE), axis=1)
        if KEEP:
            kept = tl.where(inside, exps * slope, 0.0) if HAS_SOFTCAP else exps
            tl.store(kept_ptr + start + tile_columns(True, LANES, VEC), kept.to(kept_ptr.dtype.element_ty))
    square_sum = tl.sum(lane_squares, axis=0) if SQUARES else 0.0
    row_sum, row_weighted = tl.sum(lane_sum, axis=0), tl.sum(lane_weighted, axis=0)
    return row_sum, row_weighted, tl.sum(lane_total, axis=0), tl.max(lane_max, axis=0), square_sum


@triton.jit(do_not_specialize=["first", "cols", "tile_index", "num_rows", "num_tiles"])
def fold_tile_kernel(
    tile_ptr,
    bias_ptr,
    kept_ptr,
    targets_ptr,
    state_ptr,
    references_ptr,
    first: tl.int32,
    cols: tl.int32,
    tile_index: tl.int32,
    num_rows: tl.int64,
    num_tiles: tl.int64,
    tile_stride,
    kept_stride,
    scale: tl.float64,
    softcap: tl.float64,
    factor: tl.float64,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KEEP: tl.constexpr,
    SQUARES: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """Grid: (rows,). One program folds one row of a tile into ``state``.

    The tile holds columns first .. first + cols of the vocabulary. Reads each logit once (4 bytes, from the L2 cache if
    the tile fits there). Reads them twice in a row's first tile, to find the largest u, which becomes r, and in a tile
    that makes the row take a new r. With KEEP writes P (2 bytes per logit) and, into ``references`` [rows, tiles of the
    panel] at ``tile_index``, the r that P is relative to.
    """
    scale = tl.full([], scale, tl.float32)
    softcap = tl.full([], softcap, tl.float32)
    log2_factor = tl.full([], factor, tl.float32) * LOG2_E

    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * tile_stride
    kept_row_ptr = kept_ptr + tl.multiple_of(row * kept_stride, VEC)
    row_bias_ptr = bias_ptr + first
    is_first = first == 0
    reference = tl.load(state_ptr + REFERENCE * num_rows + row, mask=not is_first, other=float("-inf"))
    row_sum = tl.load(state_ptr + EXP_SUM * num_rows + row, mask=not is_first, other=0.0)
    row_weighted = tl.load(state_ptr + WEIGHTED_SUM * num_rows + row, mask=not is_first, other=0.0)

    if reference == float("-inf"):  # no column so far, or only -inf
        lane_max = tl.full([LANES], float("-inf"), tl.float32)
        for start in range(0, cols, LANES * VEC):
            u, _, _ = load_tile(row_ptr, row_bias_ptr, start, cols, scale, softcap, HAS_BIAS, HAS_SOFTCAP, LANES, VEC)
            lane_max = tl.maximum(lane_max, tl.max(u, axis=1))
        reference = tl.max(lane_max, axis=0)
    origin = tl.where(reference == float("-inf"), 0.0, reference)
    tile_sum, tile_weighted, tile_total, tile_max, tile_squares = fold_columns(
        row_ptr, row_bias_ptr, kept_row_ptr, cols, origin, scale, softcap, log2_factor,
        HAS_BIAS, HAS_SOFTCAP, KEEP, SQUARES, LANES, VEC,
    )  # fmt: skip
    row_max = tl.load(state_ptr + MAXIMUM * num_rows + row, mask=not is_first, other=float("-inf"))
    # stored at once, because the second fold below has no register left to hold it
    tl.store(state_ptr + MAXIMUM * num_rows + row, tl.maximum(row_max, tile_max))
    if (tile_max - origin) * log2_factor > HEADROOM:
        step = tl.maximum(origin - tile_max, -1e30)
        rescale = tl.exp2(step * log2_factor)
        # where the factor is 0, the old sum may have overflowed: drop it rather than multiply inf by 0
        row_weighted = tl.where(rescale > 0, (row_weighted + row_sum * step) * rescale, 0.0)
        row_sum = row_sum * rescale
        reference = tile_max
        tile_sum, tile_weighted, tile_total, tile_max, tile_squares = fold_columns(
            row_ptr, row_bias_ptr, kept_row_ptr, cols, reference, scale, softcap, log2_factor,
            HAS_BIAS, HAS_SOFTCAP, KEEP, SQUARES, LANES, VEC,
        )  # fmt: skip
    if SQUARES:
        # loaded here, with the reference so far, because the folds above have no register left to hold them
        row_squares = tl.load(state_ptr + SQUARE_SUM * num_rows + row, mask=not is_first, other=0.0)
        old = tl.load(state_ptr + REFERENCE * num_rows + row, mask=not is_first, other=float("-inf"))
        step = tl.where(row_squares > 0, tl.maximum(old - reference, -1e30), 0.0)
        rescale = tl.exp2(step * log2_factor)
        tl.store(state_ptr + SQUARE_SUM * num_rows + row, row_squares * (rescale * rescale) + tile_squares)
    tl.store(state_ptr + REFERENCE * num_rows + row, reference)
    tl.store(state_ptr + EXP_SUM * num_rows + row, row_sum + tile_sum)
    tl.store(state_ptr + WEIGHTED_SUM * num_rows + row, row_weighted + tile_weighted)
    row_total = tl.load(state_ptr + LOGIT_SUM * num_rows + row, mask=not is_first, other=0.0)
    tl.store(state_ptr + LOGIT_SUM * num_rows + row, row_total + tile_total)
    if KEEP:
        tl.store(references_ptr + row * num_tiles + tile_index, reference)

    target = tl.load(targets_ptr + row) - first
    if (target >= 0) & (target < cols):
        x = tl.load(row_ptr + target)
        if HAS_BIAS:
            x += tl.load(row_bias_ptr + target)
        u, _ = cap(x, scale, softcap, HAS_SOFTCAP)
        tl.store(state_ptr + TARGET_LOGIT * num_rows + row, u)


@triton.jit
def others_sum(u_target, reference, row_sum, log2_factor, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return the part of s that columns other than the target contribute, times the soft cap's slope at the target."""
    others = row_sum - tl.exp2((u_target - reference) * log2_factor)
    if HAS_SOFTCAP:
        capped = u_target / softcap
        others = others * (1.0 - capped * capped)
    return others


@triton.jit(do_not_specialize=["first", "cols", "num_rows"])
def keep_tile_kernel(
    tile_ptr,
    bias_ptr,
    kept_ptr,
    targets_ptr,
    state_ptr,
    factors_ptr,
    first: tl.int32,
    cols: tl.int32,
    num_rows: tl.int64,
    tile_stride,
    kept_stride,
    scale: tl.float64,
    softcap: tl.float64,
    factor: tl.float64,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """Grid: (rows,). One program writes P of one row of a tile times the row's factor, on a second visit.

    P is relative to the reference at the end of the first visit. Reads each logit once (4 bytes) and writes one entry
    per logit (2 bytes), the target's too. ``state`` holds REFERENCE, EXP_SUM and TARGET_LOGIT alone, [3, rows].
    """
    scale = tl.full([], scale, tl.float32)
    softcap = tl.full([], softcap, tl.float32)
    log2_factor = tl.full([], factor, tl.float32) * LOG2_E
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * tile_stride
    kept_row_ptr = kept_ptr + tl.multiple_of(row * kept_stride, VEC)
    reference = tl.load(state_ptr + REFERENCE * num_rows + row)
    row_factor = tl.load(factors_ptr + row)
    target = tl.load(targets_ptr + row) - first
    u_target = tl.load(state_ptr + TARGET_LOGIT * num_rows + row)
    row_sum = tl.load(state_ptr + EXP_SUM * num_rows + row)
    others = others_sum(u_target, reference, row_sum, log2_factor, softcap, HAS_SOFTCAP)
    for start in range(0, cols, LANES * VEC):
        u, slope, inside = load_tile(
            row_ptr, bias_ptr + first, start, cols, scale, softcap, HAS_BIAS, HAS_SOFTCAP, LANES, VEC
        )
        kept = tl.exp2((u - reference) * log2_factor) * row_factor
        if HAS_SOFTCAP:
            kept = tl.where(inside, kept * slope, 0.0)
        columns = start + tile_columns(True, LANES, VEC)
        kept = tl.where(columns == target, -others * row_factor, kept)
        tl.store(kept_row_ptr + columns, kept.to(kept_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["first", "cols", "num_rows", "num_tiles", "hidden_size"])
def settle_rows_kernel(
    kept_ptr,
    targets_ptr,
    state_ptr,
    references_ptr,
    product_ptr,
    product_references_ptr,
    first: tl.int32,
    cols: tl.int32,
    num_rows: tl.int64,
    num_tiles: tl.int64,
    tile_cols,
    kept_stride,
    hidden_size: tl.int64,
    softcap: tl.float64,
    factor: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Grid: (rows,). Make a panel of P, columns first .. first + cols, ready for its GEMM.

    Rescales the tiles whose P is relative to an earlier reference of the row. Such tiles are rare, and only they are
    read and written (4 bytes per entry). With HAS_SUMS, rescales in the same way the sum of earlier panels' products,
    ``product`` [rows, hidden_size], which is relative to ``product_references`` [rows]. Writes the target's entry of P:
    ``-others``, or with HAS_SUMS 0, because s is not known yet.
    """
    row = tl.program_id(0).to(tl.int64)
    reference = tl.load(state_ptr + REFERENCE * num_rows + row)
    log2_factor = tl.full([], factor, tl.float32) * LOG2_E
    tiles = tl.arange(0, BLOCK_TILES)
    panel_tiles = tl.cdiv(cols, tile_cols)
    kept_under = tl.load(references_ptr + row * num_tiles + tiles, mask=tiles < panel_tiles, other=reference)
    is_old = (kept_under != reference) & (kept_under != float("-inf"))
    if tl.max(is_old.to(tl.int32), axis=0) > 0:
        for tile in range(0, panel_tiles):
            old = tl.load(references_ptr + row * num_tiles + tile)
            if (old != reference) & (old != float("-inf")):
                rescale = tl.exp2((old - reference) * log2_factor)
                for start in range(0, tl.minimum(tile_cols, cols - tile * tile_cols), BLOCK):
                    offsets = row * kept_stride + tile * tile_cols + start + tl.arange(0, BLOCK)
                    kept = tl.load(kept_ptr + offsets).to(tl.float32) * rescale
                    tl.store(kept_ptr + offsets, kept.to(kept_ptr.dtype.element_ty))
    if HAS_SUMS:
        # before the first panel, product and product_references are undefined
        old = tl.load(product_references_ptr + row, mask=first > 0, other=float("-inf"))
        if (old != reference) & (old != float("-inf")):
            rescale = tl.exp2((old - reference) * log2_factor)
            for start in range(0, hidden_size, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                pointers = product_ptr + row * hidden_size + columns
                product = tl.load(pointers, mask=columns < hidden_size, other=0.0)
                tl.store(pointers, product * rescale, mask=columns < hidden_size)
    tl.debug_barrier()  # the stores below overwrite what other threads have read or written above
    if HAS_SUMS:
        tl.store(product_references_ptr + row, reference)
    target = tl.load(targets_ptr + row)
    if (target >= first) & (target < first + cols):
        entry = tl.full([], 0.0, tl.float32)
        if not HAS_SUMS:
            u_target = tl.load(state_ptr + TARGET_LOGIT * num_rows + row)
            row_sum = tl.load(state_ptr + EXP_SUM * num_rows + row)
            softcap32 = tl.full([], softcap, tl.float32)
            entry = -others_sum(u_target, reference, row_sum, log2_factor, softcap32, HAS_SOFTCAP)
        tl.store(kept_ptr + row * kept_stride + target - first, entry.to(kept_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["num_rows", "vocab_size"])
def finish_rows_kernel(
    targets_ptr,
    state_ptr,
    per_token_ptr,
    num_rows: tl.int64,
    vocab_size: tl.int64,
    factor: tl.float64,
    SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of rows,). Compute per_token [TOKEN_ROWS, rows] from ``state``.

    Reads 28 bytes and writes 16 per row, with SQUARES 4 more of each. Computes in fp64: r need not be the row's
    maximum, so log s and factor (u_target - r) may both be large and cancel.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    target = tl.load(targets_ptr + row, mask=inside, other=INVALID_TARGET)
    reference = tl.load(state_ptr + REFERENCE * num_rows + row, mask=inside, other=0.0).to(tl.float64)
    row_sum = tl.load(state_ptr + EXP_SUM * num_rows + row, mask=inside, other=1.0)
    weighted = tl.load(state_ptr + WEIGHTED_SUM * num_rows + row, mask=inside, other=0.0).to(tl.float64)
    total = tl.load(state_ptr + LOGIT_SUM * num_rows + row, mask=inside, other=0.0).to(tl.float64)
    is_token = target != INVALID_TARGET
    u_target = tl.load(state_ptr + TARGET_LOGIT * num_rows + row, mask=inside & is_token, other=0.0)
    row_max = tl.load(state_ptr + MAXIMUM * num_rows + row, mask=inside, other=0.0)
    factor64 = tl.full([], factor, tl.float64)
    log2_factor = tl.full([], factor, tl.float32) * LOG2_E
    log_sum, mean_distance = tl.log(row_sum.to(tl.float64)), weighted / row_sum
    logp = log_probability(u_target.to(tl.float64) - reference, log_sum, mean_distance, factor64, log2_factor)
    logp = tl.where(is_token, logp, float("nan"))
    tl.store(per_token_ptr + LOGP * num_rows + row, logp, mask=inside)
    tl.store(per_token_ptr + ENTROPY * num_rows + row, log_sum - factor64 * mean_distance, mask=inside)
    tl.store(per_token_ptr + MEAN_LOGIT * num_rows + row, factor64 * total / vocab_size, mask=inside)
    # a maximum ignores NaN, the log-probability does not
    is_top1 = (u_target >= row_max) & (logp == logp)
    tl.store(per_token_ptr + IS_TOP1 * num_rows + row, is_top1.to(tl.float32), mask=inside)
    if SQUARES:
        square_sum = tl.load(state_ptr + SQUARE_SUM * num_rows + row, mask=inside, other=1.0).to(tl.float64)
        log_sum_squares = tl.log(square_sum) + HEADROOM * LN_2 - 2.0 * log_sum
        tl.store(per_token_ptr + LOG_SUM_SQUARES * num_rows + row, log_sum_squares, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "hidden_size"])
def add_target_rows_kernel(
    product_ptr,
    weight_ptr,
    targets_ptr,
    state_ptr,
    num_rows: tl.int64,
    hidden_size: tl.int64,
    weight_row_stride,
    weight_column_stride,
    softcap: tl.float64,
    factor: tl.float64,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (rows,). One program subtracts others * weight[target] from its row of ``product``.

    That is the target's part of P @ weight, added once s is known. Reads and writes one row of the product (8 bytes per
    hidden unit) and reads one row of the weight.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    if target >= 0:
        u_target = tl.load(state_ptr + TARGET_LOGIT * num_rows + row)
        reference = tl.load(state_ptr + REFERENCE * num_rows + row)
        row_sum = tl.load(state_ptr + EXP_SUM * num_rows + row)
        log2_factor = tl.full([], factor, tl.float32) * LOG2_E
        softcap32 = tl.full([], softcap, tl.float32)
        others = others_sum(u_target, reference, row_sum, log2_factor, softcap32, HAS_SOFTCAP)
        for start in range(0, hidden_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < hidden_size
            pointers = product_ptr + row * hidden_size + columns
            weight_ptrs = (
                weight_ptr + target.to(tl.int64) * weight_row_stride + columns.to(tl.int64) * weight_column_stride
            )
            weight = tl.load(weight_ptrs, mask=inside, other=0.0)
            product = tl.load(pointers, mask=inside, other=0.0)
            tl.store(pointers, product - others * weight.to(tl.float32), mask=inside)


def block_columns(vocab_size: int) -> int:
    """Return the columns of one step of a kernel; a tile's width and a kept row's stride are multiples of it."""
    return min(BLOCK, max(32 * VEC, 1 << (vocab_size - 1).bit_length()))


class Kept(NamedTuple):
    """Where ``fold`` stores P of a tile and the reference that it is relative to."""

    values: torch.Tensor  # [rows, at least the tile's columns] bfloat16
    references: torch.Tensor  # [rows, tiles of the panel] float32
    tile_index: int  # of this tile in its panel


class PanelSums(NamedTuple):
    """The sum of P @ weight over the panels so far, and the reference that each row of it is relative to."""

    product: torch.Tensor  # [rows, H] float32; undefined before the first panel
    references: torch.Tensor  # [rows] float32


def fold(
    tile: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    state: torch.Tensor,
    columns: slice,
    kept: Kept | None,
    *,
    block: int,
    scale: float,
    softcap: float | None,
    factor: float,
    sum_squares: bool = False,
) -> None:
    """Fold a tile of logits [rows, width] float32 into ``state`` [STATE_ROWS, rows]; store its P if ``kept`` is given.

    The tile holds ``columns`` of the vocabulary. The tile that starts at column 0 starts the state, whose memory may be
    undefined before. ``bias`` is [V]; the tile does not contain it yet. ``targets`` [rows] are token ids of the whole
    vocabulary; the row TARGET_LOGIT is written by the tile that holds the target. With ``sum_squares`` the state has
    the row SQUARE_SUM too.
    """
    values, references, tile_index = kept if kept is not None else (None, None, 0)
    fold_tile_kernel[(len(targets),)](
        tile,
        bias if bias is not None else tile,
        values if kept is not None else tile,
        targets,
        state,
        references if kept is not None else state,
        first=columns.start,
        cols=columns.stop - columns.start,
        tile_index=tile_index,
        num_rows=len(targets),
        num_tiles=0 if kept is None else references.shape[1],
        tile_stride=tile.stride(0),
        kept_stride=0 if kept is None else values.stride(0),
        scale=scale,
        softcap=softcap if softcap is not None else 1.0,
        factor=factor,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        KEEP=kept is not None,
        SQUARES=sum_squares,
        **_lanes(block),
        **COMPILER_OPTIONS,
    )


def keep(
    tile: torch.Tensor,
    bias: torch.Tensor | None,
    kept: torch.Tensor,
    targets: torch.Tensor,
    state: torch.Tensor,
    factors: torch.Tensor,
    columns: slice,
    *,
    block: int,
    scale: float,
    softcap: float | None,
    factor: float,
) -> None:
    """Store P of a tile of logits times ``factors`` [rows] into ``kept``, on a second visit.

    The tile holds ``columns`` of the vocabulary. ``state`` [3, rows] holds REFERENCE, EXP_SUM and TARGET_LOGIT after
    all columns were folded.
    """
    keep_tile_kernel[(len(targets),)](
        tile,
        bias if bias is not None else tile,
        kept,
        targets,
        state,
        factors,
        first=columns.start,
        cols=columns.stop - columns.start,
        num_rows=len(targets),
        tile_stride=tile.stride(0),
        kept_stride=kept.stride(0),
        scale=scale,
        softcap=softcap if softcap is not None else 1.0,
        factor=factor,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        **_lanes(block),
        **COMPILER_OPTIONS,
    )


def _lanes(block: int) -> dict[str, int]:
    """Return the launch options of a kernel that visits ``block`` columns in one step."""
    return {"LANES": block // VEC, "VEC": VEC, "num_warps": max(1, min(NUM_WARPS, block // VEC // 32))}


def settle(
    kept: torch.Tensor,
    targets: torch.Tensor,
    state: torch.Tensor,
    references: torch.Tensor,
    sums: PanelSums | None,
    columns: slice,
    *,
    tile_cols: int,
    block: int,
    vocab_size: int,
    softcap: float | None,
    factor: float,
) -> None:
    """Make a panel of P, ``columns`` of the vocabulary, ready for its GEMM.

    Rescales to the rows' present references: the panel's tiles, which are relative to ``references`` [rows, tiles], and
    the product in ``sums``. Writes the targets' entries: ``-others`` without ``sums``; 0 with ``sums``, whose GEMM runs
    before s is known.
    """
    settle_rows_kernel[(len(targets),)](
        kept,
        targets,
        state,
        references,
        sums.product if sums is not None else state,
        sums.references if sums is not None else state,
        first=columns.start,
        cols=columns.stop - columns.start,
        num_rows=len(targets),
        num_tiles=references.shape[1],
        tile_cols=tile_cols,
        kept_stride=kept.stride(0),
        hidden_size=0 if sums is None else sums.product.shape[1],
        softcap=softcap if softcap is not None else 1.0,
        factor=factor,
        HAS_SOFTCAP=softcap is not None,
        HAS_SUMS=sums is not None,
        BLOCK=block,
        BLOCK_TILES=triton.next_power_of_2(triton.cdiv(vocab_size, block)),  # at least the tiles of any panel
        num_warps=1,
        **COMPILER_OPTIONS,
    )


def finish(
    targets: torch.Tensor,
    state: torch.Tensor,
    per_token: torch.Tensor,
    *,
    vocab_size: int,
    factor: float,
    sum_squares: bool = False,
) -> None:
    """Fill ``per_token`` [4, rows] from the ``state`` of all columns: logps, entropy, mean_logits and is_top1; with
    ``sum_squares`` a fifth row, log sum p^2.
    """
    finish_rows_kernel[(triton.cdiv(len(targets), ROWS_BLOCK),)](
        targets,
        state,
        per_token,
        num_rows=len(targets),
        vocab_size=vocab_size,
        factor=factor,
        SQUARES=sum_squares,
        BLOCK=ROWS_BLOCK,
        **COMPILER_OPTIONS,
    )


def add_target_rows(
    product: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    state: torch.Tensor,
    *,
    softcap: float | None,
    factor: float,
) -> None:
    """Add the targets' entries of P, known once s is, to ``product`` [rows, H] = P @ ``weight``."""
    add_target_rows_kernel[(len(targets),)](
        product,
        weight,
        targets,
        state,
        num_rows=len(targets),
        hidden_size=product.shape[1],
        weight_row_stride=weight.stride(0),
        weight_column_stride=weight.stride(1),
        softcap=softcap if softcap is not None else 1.0,
        factor=factor,
        HAS_SOFTCAP=softcap is not None,
        BLOCK=BLOCK,
        **COMPILER_OPTIONS,
    )
