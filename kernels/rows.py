"""Gather, scatter and scale rows, and scale a tensor in place by a number that lies on the device.

The engine from hidden states gathers a chunk's completion tokens out of the batch and scatters their gradients back,
scaled and rounded once on the way. The backward scales finished gradients by the incoming one without reading it on
the host, which would wait for the device.
"""

import torch
import triton
import triton.language as tl

from . import COMPILER_OPTIONS

BLOCK = 1024
SCALE_BLOCK = 2048
SCALE_BLOCKS = 32  # blocks of one program: a factor of 1 starts all programs for nothing, so there should be few
# elements in one 16-byte access of the narrowest dtype, two bytes
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
    """Grid: (rows,). Program i writes target[target_rows[i]] = source[source_rows[i]] * factors[i].

    Reads and writes each element of its row once. Source row b * seq_len + t starts at element
    b * batch_stride + t * row_stride. Without GATHER or SCATTER the row is i; without SCALE the values are only cast.
    A factor of 0 makes the row 0, even if it holds a NaN.
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
            factor = tl.load(factors_ptr + i)
            values = tl.where(factor == 0, 0.0, values.to(factors_ptr.dtype.element_ty) * factor)
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
    """Write target[target_rows] = (source[source_rows] * factors[:, None]).to(target.dtype); 0 where a factor is 0.

    ``source`` is [rows, columns] or [B, T, columns] with a contiguous last dimension; row b * T + t of the latter is
    position t of sequence b. ``target`` is [rows, columns]. Without ``source_rows`` or ``target_rows``, rows are taken
    in order. ``factors`` is [rows]; the product is computed in its dtype and rounded once.
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
    """Grid: (size / (BLOCK * BLOCKS),). One program multiplies BLOCKS blocks of values by the factor, in fp32 or fp64.

    Reads and writes each value once; touches none if the factor is 1. A value of 0 stays 0 even if the factor is not
    finite, so masked positions keep a gradient of exactly 0.
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
    """Multiply the contiguous tensor ``values`` in place by the scalar tensor ``factor``."""
    grid = (triton.cdiv(values.numel(), SCALE_BLOCK * SCALE_BLOCKS),)
    scale_kernel[grid](values, factor, size=values.numel(), BLOCK=SCALE_BLOCK, BLOCKS=SCALE_BLOCKS, **COMPILER_OPTIONS)
