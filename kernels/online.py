"""Device functions that several kernels share: the online softmax of a row, the soft cap, and where rows lie.

A row of logits x becomes u (after a soft cap or none) and z = factor * u, as in ``token_logprobs.py``. A row is read
once, a tile of columns at a time: ``fold`` adds a tile to the running maximum and sums of each lane, ``merge`` makes
one result of all lanes, and ``log_probability`` takes the target's log-probability from it.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# MASKED and INVALID of kto_fused/layout.py, which nothing here imports from: a test compares them
MASKED_TARGET = tl.constexpr(-1)
INVALID_TARGET = tl.constexpr(-2)


@triton.jit
def find_sequence(cu_seqlens_ptr, row, num_sequences, search_steps):
    """The packed sequence holding ``row`` (a scalar or a block of rows): the last s with cu_seqlens[s] <= row."""
    low = row * 0
    high = low + num_sequences
    for _ in range(search_steps):
        middle = (low + high) // 2
        right = tl.load(cu_seqlens_ptr + middle) <= row
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    return low


@triton.jit
def tanh(x, height):
    """(height tanh(x), 1 - tanh(x)^2), the first to a few ulp: a continued fraction near zero, where 1 - exp(-2|x|)
    cancels; one division serves the two formulas.

    The height comes before the sign is chosen: as a product at the end, a GPU would fuse it with the subtraction of
    the largest u, which is rounded, and leave an ulp where 0 should be.
    """
    x2 = x * x
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))  # tl.exp would handle subnormal numbers too, which 1 - e loses
    near = tl.abs(x) < 0.5
    numerator = tl.where(near, x * (2027025.0 + x2 * (270270.0 + x2 * (6930.0 + x2 * 36.0))), 1.0 - e)
    denominator = tl.where(near, 2027025.0 + x2 * (945945.0 + x2 * (51975.0 + x2 * (630.0 + x2))), 1.0 + e)
    ratio = numerator / denominator
    value = height * ratio
    return tl.where((x < 0) & (near == 0), -value, value), 1.0 - ratio * ratio


@triton.jit
def cap(x, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """(u of the module's docstring, its derivative by scale * x under a soft cap, else 1)."""
    if HAS_SOFTCAP:
        u, slope = tanh(x * (scale / softcap), softcap)
    else:
        u, slope = x, 1.0
    return u, slope


@triton.jit
def tile_columns(ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """[LANES, VEC] columns of a block, VEC of them in one thread: side by side for one 16-byte access where rows are
    ALIGNED, else LANES apart, so that neighbouring threads access neighbouring columns.
    """
    lane = tl.arange(0, LANES)[:, None]
    vec = tl.arange(0, VEC)[None, :]
    return lane * VEC + vec if ALIGNED else vec * LANES + lane


@triton.jit
def fold(running_max, running_sum, running_weighted, u, log2_factor):
    """Fold a [LANES, VEC] tile of u into each lane's max, sum of exp(factor (u - max)) and that weighted by u - max.

    A lane's VEC columns lie in one thread, so the loop over a row moves nothing between threads.
    """
    new_max = tl.maximum(running_max, tl.max(u, axis=1))
    # -inf logits are legal: a lane that has seen nothing else must not compute -inf - -inf
    origin = tl.where(new_max == float("-inf"), 0.0, new_max)
    distance = u - tl.expand_dims(origin, 1)
    exps = tl.exp2(distance * log2_factor)
    # the finite floor, here and below, turns 0 * -inf into 0; every factor beside it is 0 long before
    step = tl.where(running_sum > 0, tl.maximum(running_max - origin, -1e30), 0.0)
    rescale = tl.exp2(step * log2_factor)
    tile_weighted = tl.sum(exps * tl.maximum(distance, -1e30), axis=1)
    new_weighted = (running_weighted + running_sum * step) * rescale + tile_weighted
    new_sum = running_sum * rescale + tl.sum(exps, axis=1)
    return new_max, new_sum, new_weighted


@triton.jit
def merge(maxima, sums, weighted, log2_factor):
    """Merge partial results of ``fold`` into the row's."""
    row_max = tl.max(maxima, axis=0)
    origin = tl.where(row_max == float("-inf"), 0.0, row_max)
    step = tl.where(sums > 0, tl.maximum(maxima - origin, -1e30), 0.0)
    rescale = tl.exp2(step * log2_factor)
    row_sum = tl.sum(sums * rescale, axis=0)
    # what counts for nothing may have overflowed
    row_weighted = tl.sum(tl.where(rescale > 0, (weighted + sums * step) * rescale, 0.0), axis=0)
    return row_max, row_sum, row_weighted


@triton.jit
def log_probability(distance, log_sum, mean_distance, factor, log2_factor):
    """factor * distance - log s in fp64; ``distance`` is the target's u less the row's reference.

    ``log2_factor`` is rounded, which makes log s too large or too small, to first order by its excess times
    ``mean_distance`` = w / s: a millionth at most, but of one sign in all rows.
    """
    excess = log2_factor.to(tl.float64) * LN_2 - factor
    return factor * distance.to(tl.float64) - (log_sum - excess * mean_distance)
