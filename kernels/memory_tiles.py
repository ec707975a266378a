"""Logits that exist a tile of columns at a time: folded into each row's statistics, kept only as unnormalised softmax.

z = factor * u are the logits of ``token_logprobs.py``. A row has a reference r, the largest u of its first tile, and

    s = sum exp(factor (u - r))     w = sum exp(factor (u - r)) (u - r)     total = sum u

grow tile by tile, and with them the largest u, which says whether the target is the row's most likely token. ``state``
[6, rows] holds r, s, the target's u, w, total and the largest u; a second visit needs the first three.

What is kept of a tile for the gradient is P = exp(factor (u - r)) times the soft cap's derivative, in bfloat16. Its
exponent has float32's range, so that P need not be rescaled for a larger column later; only for one 2^60 times as large
does the row take a new r. With the target's own entry replaced by ``-others``, what the other columns add to s,
d logp / d x = -k P / s in every column, with k = factor, times the scale under a soft cap.

P is kept for all columns, or for a panel of some tiles at a time. Before s is known the target's entry of a panel is 0,
and its part of the product with the LM head, ``-others`` times one row of it, is added at the end. On a second visit s
and d loss / d logp are known, and ``keep`` multiplies P by its rows' factors: it is d loss / d logits itself.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import COMPILER_OPTIONS
from .online import INVALID_TARGET, LOG2_E, cap, log_probability, tile_columns

# A thread loads VEC logits (16 bytes) at a time and has BLOCK / (32 NUM_WARPS VEC) such loads in flight.
BLOCK = 1024
VEC = 4
NUM_WARPS = 4
ROWS_BLOCK = 128  # of one program that visits rows' statistics alone
# log2 of how far a column may exceed the row's reference before the row takes a new one
HEADROOM = tl.constexpr(60.0)


@triton.jit
def load_tile(
    tile_ptr, bias_ptr, start, cols, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(u, slope, inside) of the columns start .. start + LANES * VEC: u is -inf past the last one; slope is its
    derivative by scale * x under a soft cap, else 1.
    """
    columns = start + tile_columns(True, LANES, VEC)
    x = tl.load(tile_ptr + columns)  # the buffer holds whole blocks
    inside = columns < cols
    if HAS_BIAS:
        x += tl.load(bias_ptr + columns, mask=inside, other=0.0)
    u, slope = cap(x, scale, softcap, HAS_SOFTCAP)
    return tl.where(inside, u, float("-inf")), slope, inside


@triton.jit
def fold_columns(
    tile_ptr, bias_ptr, kept_ptr, cols, reference, scale, softcap, log2_factor,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, KEEP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(s, w, total, max) of one row of a tile; its P is stored with KEEP."""
    lane_sum = tl.zeros([LANES], tl.float32)
    lane_weighted = tl.zeros([LANES], tl.float32)
    lane_total = tl.zeros([LANES], tl.float32)
    lane_max = tl.full([LANES], float("-inf"), tl.float32)
    for start in range(0, cols, LANES * VEC):
        u, slope, inside = load_tile(tile_ptr, bias_ptr, start, cols, scale, softcap, HAS_BIAS, HAS_SOFTCAP, LANES, VEC)
        distance = u - reference
        exps = tl.exp2(distance * log2_factor)
        lane_sum += tl.sum(exps, axis=1)
        # the finite floor turns 0 * -inf into 0
        lane_weighted += tl.sum(exps * tl.maximum(distance, -1e30), axis=1)
        lane_total += tl.sum(tl.where(inside, u, 0.0), axis=1)
        lane_max = tl.maximum(lane_max, tl.max(u, axis=1))
        if KEEP:
            kept = tl.where(inside, exps * slope, 0.0) if HAS_SOFTCAP else exps
            tl.store(kept_ptr + start + tile_columns(True, LANES, VEC), kept.to(kept_ptr.dtype.element_ty))
    return tl.sum(lane_sum, axis=0), tl.sum(lane_weighted, axis=0), tl.sum(lane_total, axis=0), tl.max(lane_max, axis=0)


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
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    """Grid: (rows,). One program folds one row of a tile, columns first .. first + cols of the vocabulary.

    Reads each logit once (4 bytes, from the L2 cache if the tile fits there), twice in a row's first tile, whose
    largest u is r, and in one that makes the row take a new r; with KEEP writes P (2 bytes).
    ``references`` [rows, tiles] is r as it was for each tile of the panel, and ``tile_index`` this one's place in it.
    """
    scale = tl.full([], scale, tl.float32)
    softcap = tl.full([], softcap, tl.float32)
    log2_factor = tl.full([], factor, tl.float32) * LOG2_E

    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * tile_stride
    kept_row_ptr = kept_ptr + tl.multiple_of(row * kept_stride, VEC)
    row_bias_ptr = bias_ptr + first
    is_first = first == 0
    reference = tl.load(state_ptr + row, mask=not is_first, other=float("-inf"))
    row_sum = tl.load(state_ptr + num_rows + row, mask=not is_first, other=0.0)
    row_weighted = tl.load(state_ptr + 3 * num_rows + row, mask=not is_first, other=0.0)

    if reference == float("-inf"):  # nothing but -inf so far
        lane_max = tl.full([LANES], float("-inf"), tl.float32)
        for start in range(0, cols, LANES * VEC):
            u, _, _ = load_tile(row_ptr, row_bias_ptr, start, cols, scale, softcap, HAS_BIAS, HAS_SOFTCAP, LANES, VEC)
            lane_max = tl.maximum(lane_max, tl.max(u, axis=1))
        reference = tl.max(lane_max, axis=0)
    origin = tl.where(reference == float("-inf"), 0.0, reference)
    tile_sum, tile_weighted, tile_total, tile_max = fold_columns(
        row_ptr, row_bias_ptr, kept_row_ptr, cols, origin, scale, softcap, log2_factor,
        HAS_BIAS, HAS_SOFTCAP, KEEP, LANES, VEC,
    )  # fmt: skip
    row_max = tl.load(state_ptr + 5 * num_rows + row, mask=not is_first, other=float("-inf"))
    # stored at once: no loop below has a register for it
    tl.store(state_ptr + 5 * num_rows + row, tl.maximum(row_max, tile_max))
    if (tile_max - origin) * log2_factor > HEADROOM:
        step = tl.maximum(origin - tile_max, -1e30)
        rescale = tl.exp2(step * log2_factor)
        # what counts for nothing may have overflowed
        row_weighted = tl.where(rescale > 0, (row_weighted + row_sum * step) * rescale, 0.0)
        row_sum = row_sum * rescale
        reference = tile_max
        tile_sum, tile_weighted, tile_total, tile_max = fold_columns(
            row_ptr, row_bias_ptr, kept_row_ptr, cols, reference, scale, softcap, log2_factor,
            HAS_BIAS, HAS_SOFTCAP, KEEP, LANES, VEC,
        )  # fmt: skip
    tl.store(state_ptr + row, reference)
    tl.store(state_ptr + num_rows + row, row_sum + tile_sum)
    tl.store(state_ptr + 3 * num_rows + row, row_weighted + tile_weighted)
    row_total = tl.load(state_ptr + 4 * num_rows + row, mask=not is_first, other=0.0)
    tl.store(state_ptr + 4 * num_rows + row, row_total + tile_total)
    if KEEP:
        tl.store(references_ptr + row * num_tiles + tile_index, reference)

    target = tl.load(targets_ptr + row) - first
    if (target >= 0) & (target < cols):
        x = tl.load(row_ptr + target)
        if HAS_BIAS:
            x += tl.load(row_bias_ptr + target)
        u, _ = cap(x, scale, softcap, HAS_SOFTCAP)
        tl.store(state_ptr + 2 * num_rows + row, u)


@triton.jit
def others_sum(u_target, reference, row_sum, log2_factor, softcap, HAS_SOFTCAP: tl.constexpr):
    """What the columns other than the target's add to s, times the soft cap's derivative at the target."""
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
    """Grid: (rows,). P of one row of a tile, times the row's factor, under the reference that all tiles led to.

    Reads each logit once (4 bytes) and writes P (2 bytes), the target's entry too. ``state`` is [3, rows].
    """
    scale = tl.full([], scale, tl.float32)
    softcap = tl.full([], softcap, tl.float32)
    log2_factor = tl.full([], factor, tl.float32) * LOG2_E
    row = tl.program_id(0).to(tl.int64)
    row_ptr = tile_ptr + row * tile_stride
    kept_row_ptr = kept_ptr + tl.multiple_of(row * kept_stride, VEC)
    reference = tl.load(state_ptr + row)
    row_factor = tl.load(factors_ptr + row)
    target = tl.load(targets_ptr + row) - first
    others = others_sum(
        tl.load(state_ptr + 2 * num_rows + row), reference, tl.load(state_ptr + num_rows + row), log2_factor, softcap,
        HAS_SOFTCAP,
    )  # fmt: skip
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

    Rescales the tiles, if any, that were kept under another reference than the row has now, and what earlier panels
    left in ``product`` [rows, hidden_size], under ``product_references`` [rows] (HAS_SUMS). Writes the target's entry:
    ``-others``, or 0 while s is not known (HAS_SUMS).
    """
    row = tl.program_id(0).to(tl.int64)
    reference = tl.load(state_ptr + row)
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
        # before the first panel there is neither
        old = tl.load(product_references_ptr + row, mask=first > 0, other=float("-inf"))
        if (old != reference) & (old != float("-inf")):
            rescale = tl.exp2((old - reference) * log2_factor)
            for start in range(0, hidden_size, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                pointers = product_ptr + row * hidden_size + columns
                product = tl.load(pointers, mask=columns < hidden_size, other=0.0)
                tl.store(pointers, product * rescale, mask=columns < hidden_size)
    tl.debug_barrier()  # what is stored from here on was read, or written otherwise, above
    if HAS_SUMS:
        tl.store(product_references_ptr + row, reference)
    target = tl.load(targets_ptr + row)
    if (target >= first) & (target < first + cols):
        entry = tl.full([], 0.0, tl.float32)
        if not HAS_SUMS:
            entry = -others_sum(
                tl.load(state_ptr + 2 * num_rows + row), reference, tl.load(state_ptr + num_rows + row), log2_factor,
                tl.full([], softcap, tl.float32), HAS_SOFTCAP,
            )  # fmt: skip
        tl.store(kept_ptr + row * kept_stride + target - first, entry.to(kept_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["num_rows", "vocab_size"])
def finish_rows_kernel(
    targets_ptr,
    state_ptr,
    outputs_ptr,
    num_rows: tl.int64,
    vocab_size: tl.int64,
    factor: tl.float64,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks of rows,). Writes outputs [4, rows] = logp, entropy, mean logit, is_top1 from ``state``.

    In fp64: r need not be the row's maximum, so log s and factor (u_target - r) may both be large, and cancel.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    target = tl.load(targets_ptr + row, mask=inside, other=INVALID_TARGET)
    reference = tl.load(state_ptr + row, mask=inside, other=0.0).to(tl.float64)
    row_sum = tl.load(state_ptr + num_rows + row, mask=inside, other=1.0)
    weighted = tl.load(state_ptr + 3 * num_rows + row, mask=inside, other=0.0).to(tl.float64)
    total = tl.load(state_ptr + 4 * num_rows + row, mask=inside, other=0.0).to(tl.float64)
    is_token = target != INVALID_TARGET
    u_target = tl.load(state_ptr + 2 * num_rows + row, mask=inside & is_token, other=0.0)
    row_max = tl.load(state_ptr + 5 * num_rows + row, mask=inside, other=0.0)
    factor64 = tl.full([], factor, tl.float64)
    log2_factor = tl.full([], factor, tl.float32) * LOG2_E
    log_sum, mean_distance = tl.log(row_sum.to(tl.float64)), weighted / row_sum
    logp = log_probability(u_target.to(tl.float64) - reference, log_sum, mean_distance, factor64, log2_factor)
    logp = tl.where(is_token, logp, float("nan"))
    tl.store(outputs_ptr + row, logp, mask=inside)
    tl.store(outputs_ptr + num_rows + row, log_sum - factor64 * mean_distance, mask=inside)
    tl.store(outputs_ptr + 2 * num_rows + row, factor64 * total / vocab_size, mask=inside)
    # maxima pass over a NaN, the log-probability does not
    is_top1 = (u_target >= row_max) & (logp == logp)
    tl.store(outputs_ptr + 3 * num_rows + row, is_top1.to(tl.float32), mask=inside)


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
    """Grid: (rows,). product[row] -= others * weight[target]: the target's part of P @ weight, once s is known."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    if target != INVALID_TARGET:
        others = others_sum(
            tl.load(state_ptr + 2 * num_rows + row), tl.load(state_ptr + row), tl.load(state_ptr + num_rows + row),
            tl.full([], factor, tl.float32) * LOG2_E, tl.full([], softcap, tl.float32), HAS_SOFTCAP,
        )  # fmt: skip
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
    """Columns of one step: a tile's width and a kept row's stride are multiples of it."""
    return min(BLOCK, max(32 * VEC, 1 << (vocab_size - 1).bit_length()))


class Kept(NamedTuple):
    """Where P of a tile goes, and what it is relative to."""

    values: torch.Tensor  # [rows, at least the tile's columns]
    references: torch.Tensor  # [rows, tiles of the panel] float32
    tile_index: int


class PanelSums(NamedTuple):
    """P @ weight of the panels so far, and what each row of it is relative to."""

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
) -> None:
    """Fold a tile of logits, those ``columns`` of the vocabulary, into ``state`` [6, rows]; ``kept`` takes its P."""
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
    """P of a tile of logits, those ``columns`` of the vocabulary, times ``factors`` [rows], once all tiles were folded
    into ``state`` [3, rows].
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
    """Make a panel of P, those ``columns`` of the vocabulary, ready for its GEMM.

    ``references`` [rows, tiles] says what its tiles are relative to. With ``sums`` the GEMM adds to them, and the rows'
    s is not known yet.
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
        BLOCK_TILES=triton.next_power_of_2(triton.cdiv(vocab_size, block)),  # as many as there might be
        num_warps=1,
        **COMPILER_OPTIONS,
    )


def finish(
    targets: torch.Tensor, state: torch.Tensor, outputs: torch.Tensor, *, vocab_size: int, factor: float
) -> None:
    """Fill ``outputs`` [4, rows]: logps, entropy, mean_logits and is_top1, once every tile was folded."""
    finish_rows_kernel[(triton.cdiv(len(targets), ROWS_BLOCK),)](
        targets,
        state,
        outputs,
        num_rows=len(targets),
        vocab_size=vocab_size,
        factor=factor,
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
    """Add to ``product`` [rows, H] = P @ ``weight`` what the targets' entries of P, once s is known, make of it."""
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
