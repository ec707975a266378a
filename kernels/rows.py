"""Rows moved between the batch and a chunk of completion tokens, scaled and rounded on the way; and scaling in place
by a number that only the device knows.
"""

import torch
import triton
import triton.language as tl

from . import COMPILER_OPTIONS

BLOCK = 1024
SCALE_BLOCK = 2048
SCALE_BLOCKS = 32  # of one program: where the factor is 1 there is nothing to do but start
# elements between 16-byte accesses, in the narrowest dtype
ALIGNMENT = tl.constexpr(8)


@triton.jit(do_not_specialize=["seq_len", "batch_stride", "row_stride", "target_stride"])
def move_rows_kernel(
    source_ptr,
    target_ptr,
    source_rows_ptr,
    target_rows_ptr,
    factors_ptr,
    seq_len: tl.int64,
    batch_stride: tl.int64,
    row_stride: tl.int64,
    target_stride: tl.int64,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (rows,). target[target_rows[i]] = source[source_rows[i]] factors[i]; one row, read and written once.

    A source row b * seq_len + t lies at b * batch_stride + t * row_stride.
    """
    i = tl.program_id(0).to(tl.int64)
    source_row = tl.load(source_rows_ptr + i) if GATHER else i
    target_row = tl.load(target_rows_ptr + i) if SCATTER else i
    source_offset = (source_row // seq_len) * batch_stride + (source_row % seq_len) * row_stride
    target_offset = target_row * target_stride
    if ALIGNED:
        source_offset = tl.multiple_of(source_offset, ALIGNMENT)
        target_offset = tl.multiple_of(target_offset, ALIGNMENT)
    for start in range(0, COLUMNS, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        values = tl.load(source_ptr + source_offset + offsets, mask=offsets < COLUMNS, other=0.0)
        if SCALE:
            values = values.to(factors_ptr.dtype.element_ty) * tl.load(factors_ptr + i)
        values = values.to(target_ptr.dtype.element_ty)
        tl.store(target_ptr + target_offset + offsets, values, mask=offsets < COLUMNS)


def move_rows(
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    source_rows: torch.Tensor | None = None,
    target_rows: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
) -> None:
    """target[target_rows] = (source[source_rows] * factors[:, None]).to(target.dtype).

    ``source`` is [rows, columns] or [B, T, columns] with a contiguous last dimension, its rows counted through B T;
    ``target`` is [rows, columns]. Rows not named are taken in order.
    """
    seq_len = source.shape[1] if source.ndim == 3 else 1
    num_rows = next(len(x) for x in (source_rows, target_rows, source) if x is not None)
    strides = [source.stride(0), source.stride(1) if source.ndim == 3 else 0, target.stride(0)]
    move_rows_kernel[(num_rows,)](
        source,
        target,
        source_rows if source_rows is not None else source,
        target_rows if target_rows is not None else target,
        factors if factors is not None else source,
        seq_len=seq_len,
        batch_stride=strides[0],
        row_stride=strides[1],
        target_stride=strides[2],
        COLUMNS=source.shape[-1],
        ALIGNED=all(length % ALIGNMENT.value == 0 for length in (source.shape[-1], *strides)),
        GATHER=source_rows is not None,
        SCATTER=target_rows is not None,
        SCALE=factors is not None,
        BLOCK=BLOCK,
        **COMPILER_OPTIONS,
    )


@triton.jit
def scale_kernel(values_ptr, factor_ptr, size, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Grid: (size / (BLOCK * BLOCKS),). values *= factor, each read and written once; none touched where it is 1.

    A 0 stays one beside a factor that is not finite: masked positions take no part.
    """
    factor = tl.load(factor_ptr)
    if factor == 1.0:
        return
    COMPUTE: tl.constexpr = tl.float64 if values_ptr.dtype.element_ty == tl.float64 else tl.float32
    first = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS)
    for start in range(0, BLOCK * BLOCKS, BLOCK):
        offsets = tl.multiple_of(first + start, BLOCK) + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + offsets, mask=offsets < size, other=0.0).to(COMPUTE)
        scaled = tl.where(values == 0.0, values, values * factor.to(COMPUTE))
        tl.store(values_ptr + offsets, scaled.to(values_ptr.dtype.element_ty), mask=offsets < size)


def scale_(values: torch.Tensor, factor: torch.Tensor) -> None:
    """values *= factor: a contiguous tensor and a scalar one."""
    grid = (triton.cdiv(values.numel(), SCALE_BLOCK * SCALE_BLOCKS),)
    scale_kernel[grid](values, factor, size=values.numel(), BLOCK=SCALE_BLOCK, BLOCKS=SCALE_BLOCKS, **COMPILER_OPTIONS)
