"""Device functions that several kernels share: the online softmax of a row, the soft cap, and how rows are laid out.

A row of logits x becomes u (x itself, or x under a soft cap) and z = factor * u, see ``token_logprobs.py``. A row is
read once, one tile of columns at a time. ``fold`` adds a tile to the running maximum and sums of each lane (a lane is
the columns that one thread visits), ``merge`` combines all lanes into one result, and ``log_probability`` computes the
target's log-probability from it.

The state of a row is what any subset of its columns says about it:

    r = reference            the number that exponentials are relative to, near the largest u so that none overflows
    s = exp_sum              sum exp(factor (u - r))
    target_logit             u of the target; undefined in a state whose columns do not include the target
    w = weighted_sum         sum exp(factor (u - r)) (u - r), from which the entropy is computed
    logit_sum                sum u, from which the mean logit is computed
    maximum                  the largest u, which says whether the target is the row's most likely token
    q = square_sum           2^-60 sum exp(2 factor (u - r)), from which log sum p^2 is computed; only if asked for. The
                             factor 2^-60 keeps it in float32's range where a column's exponential reaches 2^60

States over disjoint columns merge. With R the largest reference, d_i = r_i - R and e_i = exp(factor d_i):

    reference = R    exp_sum = sum_i e_i s_i    weighted_sum = sum_i e_i (w_i + s_i d_i)
    logit_sum = sum_i logit_sum_i    maximum = max_i maximum_i    target_logit: of the state that includes the target
    square_sum = sum_i e_i^2 square_sum_i

Where a state is a tensor, it is [STATE_ROWS, rows] and the constants below name its rows. Partial results of one row
(of lanes, splits or tiles) are relative to their own maximum and hold no target: PARTIAL_ROWS numbers. With SQUARES,
the sum of squares is one more row of the state, of a partial result and of the results for each token.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# MASKED and INVALID of kto_fused/engines/layout.py, repeated here because kernels import nothing from above; a test
# compares them.
MASKED_TARGET = tl.constexpr(-1)
INVALID_TARGET = tl.constexpr(-2)

# Rows of a state [STATE_ROWS, rows]; the fields of RowState in kto_fused/engines/chunks.py, in the same order. The
# first three suffice for a second visit to the row.
REFERENCE = tl.constexpr(0)
EXP_SUM = tl.constexpr(1)
TARGET_LOGIT = tl.constexpr(2)
WEIGHTED_SUM = tl.constexpr(3)
LOGIT_SUM = tl.constexpr(4)
MAXIMUM = tl.constexpr(5)
STATE_ROWS = 6
SQUARE_SUM = tl.constexpr(6)  # a row more, with SQUARES
SQUARE_SCALE = tl.constexpr(2.0**-60)  # of a state's square_sum: 2 to the power -HEADROOM of memory_tiles.py

# Numbers of one partial result.
PARTIAL_MAXIMUM = tl.constexpr(0)
PARTIAL_EXP_SUM = tl.constexpr(1)
PARTIAL_WEIGHTED_SUM = tl.constexpr(2)
PARTIAL_LOGIT_SUM = tl.constexpr(3)
PARTIAL_ROWS = tl.constexpr(4)
PARTIAL_SQUARE_SUM = tl.constexpr(4)  # one number more, with SQUARES

# Rows of per_token [TOKEN_ROWS, rows], the results for each token.
LOGP = tl.constexpr(0)
ENTROPY = tl.constexpr(1)
MEAN_LOGIT = tl.constexpr(2)
IS_TOP1 = tl.constexpr(3)
TOKEN_ROWS = tl.constexpr(4)
LOG_SUM_SQUARES = tl.constexpr(4)  # one row more, with SQUARES


@triton.jit
def find_sequence(cu_seqlens_ptr, row, num_sequences, search_steps):
    """Return the packed sequence that holds ``row`` (a scalar or a block): the last s with cu_seqlens[s] <= row.

    A binary search over num_sequences + 1 offsets; ``search_steps`` halvings must suffice for them.
    """
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
    """Return (height tanh(x), 1 - tanh(x)^2), the first to a few ulp.

    Near zero, where 1 - exp(-2|x|) cancels, a continued fraction takes its place. One division serves both formulas.
    The height is multiplied in before the sign is chosen. If it came last, a GPU would fuse that product with the
    later subtraction of the largest u, which is already rounded, and leave an ulp where the difference should be 0.
    """
    x2 = x * x
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))  # not tl.exp: it treats subnormal results too, which 1 - e drops
    near = tl.abs(x) < 0.5
    numerator = tl.where(near, x * (2027025.0 + x2 * (270270.0 + x2 * (6930.0 + x2 * 36.0))), 1.0 - e)
    denominator = tl.where(near, 2027025.0 + x2 * (945945.0 + x2 * (51975.0 + x2 * (630.0 + x2))), 1.0 + e)
    ratio = numerator / denominator
    value = height * ratio
    return tl.where((x < 0) & (near == 0), -value, value), 1.0 - ratio * ratio


@triton.jit
def cap(x, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Return (u, slope): u of the logit x, and with HAS_SOFTCAP its derivative w.r.t. scale * x, else 1."""
    if HAS_SOFTCAP:
        u, slope = tanh(x * (scale / softcap), softcap)
    else:
        u, slope = x, 1.0
    return u, slope


@triton.jit
def tile_columns(ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """Return the columns [LANES, VEC] of one block; each thread has VEC of them.

    Where rows are ALIGNED, a thread's columns lie side by side and take one 16-byte access. Elsewhere they lie LANES
    apart, so that neighbouring threads access neighbouring columns.
    """
    lane = tl.arange(0, LANES)[:, None]
    vec = tl.arange(0, VEC)[None, :]
    return lane * VEC + vec if ALIGNED else vec * LANES + lane


@triton.jit
def fold(running_max, running_sum, running_weighted, running_squares, u, log2_factor, SQUARES: tl.constexpr):
    """Fold a tile u [LANES, VEC] into each lane's maximum, exp_sum and weighted_sum (relative to that maximum).

    With SQUARES also into the lane's sum exp(2 factor (u - maximum)), one more fused multiply-add per column. The
    running values stay in registers. A lane's VEC columns lie in one thread, so the loop over a row moves nothing
    between threads.
    """
    new_max = tl.maximum(running_max, tl.max(u, axis=1))
    # logits of -inf are legal: a lane that has seen no other must not compute -inf - -inf
    origin = tl.where(new_max == float("-inf"), 0.0, new_max)
    distance = u - tl.expand_dims(origin, 1)
    exps = tl.exp2(distance * log2_factor)
    # The finite floor, here and below, makes 0 * -inf a 0. It changes no other result: the exponential that it is
    # multiplied with has underflowed to 0 long before -1e30.
    step = tl.where(running_sum > 0, tl.maximum(running_max - origin, -1e30), 0.0)
    rescale = tl.exp2(step * log2_factor)
    tile_weighted = tl.sum(exps * tl.maximum(distance, -1e30), axis=1)
    new_weighted = (running_weighted + running_sum * step) * rescale + tile_weighted
    new_sum = running_sum * rescale + tl.sum(exps, axis=1)
    if SQUARES:
        running_squares = running_squares * (rescale * rescale) + tl.sum(exps * exps, axis=1)
    return new_max, new_sum, new_weighted, running_squares


@triton.jit
def merge(maxima, sums, weighted, squares, log2_factor, SQUARES: tl.constexpr):
    """Return (maximum, exp_sum, weighted_sum, square_sum) of a row from partial results of ``fold`` along axis 0.

    Without SQUARES the last one means nothing.
    """
    row_max = tl.max(maxima, axis=0)
    origin = tl.where(row_max == float("-inf"), 0.0, row_max)
    step = tl.where(sums > 0, tl.maximum(maxima - origin, -1e30), 0.0)
    rescale = tl.exp2(step * log2_factor)
    row_sum = tl.sum(sums * rescale, axis=0)
    # a partial result whose factor is 0 may have overflowed: drop it rather than multiply inf by 0
    row_weighted = tl.sum(tl.where(rescale > 0, (weighted + sums * step) * rescale, 0.0), axis=0)
    row_squares = tl.sum(squares * (rescale * rescale), axis=0) if SQUARES else 0.0
    return row_max, row_sum, row_weighted, row_squares


@triton.jit
def log_probability(distance, log_sum, mean_distance, factor, log2_factor):
    """Return factor * distance - log s in fp64, where ``distance`` is the target's u minus the row's reference.

    Exponentials were taken with ``log2_factor`` = factor / ln 2, which is rounded. To first order its excess changes
    log s by excess * ``mean_distance`` (= w / s). That is a millionth at most, but it has the same sign in all rows, so
    it is subtracted here.
    """
    excess = log2_factor.to(tl.float64) * LN_2 - factor
    return factor * distance.to(tl.float64) - (log_sum - excess * mean_distance)
