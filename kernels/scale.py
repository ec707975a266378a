"""In-place scaling by a number that only the device knows."""

import torch
import triton
import triton.language as tl

from . import COMPILER_OPTIONS

BLOCK = 2048
BLOCKS = 32  # of one program: where the factor is 1 there is nothing to do but start


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
    grid = (triton.cdiv(values.numel(), BLOCK * BLOCKS),)
    scale_kernel[grid](values, factor, size=values.numel(), BLOCK=BLOCK, BLOCKS=BLOCKS, **COMPILER_OPTIONS)
