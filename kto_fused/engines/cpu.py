"""The row and sequence operations in PyTorch, for CPUs and for GPUs without Triton.

Each function here has a Triton counterpart with the same arguments and results: ``token_logprobs`` and
``token_logprobs_backward`` in ``kernels/token_logprobs.py``, which explains the formulas; ``sequence_sums`` and
``sequence_backward`` in ``kernels/sequence.py``. Only ``token_logprobs_backward`` here takes ``source_rows``.
Completion rows are visited in blocks small enough for the processor's cache, through two scratch buffers. Beside these
two buffers the functions take about a hundred bytes per position.
"""

import math
from collections.abc import Iterator

import torch

from .layout import INVALID, MASKED, compute_dtype, row_sequences, row_targets, scale_grads
from .results import RowResults, SequenceValues, TokenValues, num_token_values

# Bytes of one scratch buffer in the compute dtype. Two exist at a time; a copy of a block of rows is added where the
# logits have another dtype and the rows are not adjacent.
BLOCK_BYTES = 2 * 2**20
# exp2 costs a quarter of exp in PyTorch on some processors, and is as exact
LOG2_E = 1.4426950408889634


def _strided_rows(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of any batch and row stride as one 2-D view, and the index in the view of each row b T + t."""
    seq_len, vocab_size = logits.shape[-2:]
    batch_size = logits.shape[0] if logits.ndim == 3 else 1
    if batch_size * seq_len == 0:
        return logits.reshape(0, vocab_size), torch.empty(0, dtype=torch.long, device=logits.device)
    batch_stride = logits.stride(0) if batch_size > 1 else 0
    row_stride = logits.stride(-2) if seq_len > 1 else 0
    step = math.gcd(batch_stride, row_stride) or 1
    batches, positions = (torch.arange(size, device="cpu") for size in (batch_size, seq_len))
    offsets = (batches[:, None] * (batch_stride // step) + positions * (row_stride // step)).flatten()
    view = logits.as_strided((int(offsets[-1]) + 1, vocab_size), (step, 1))
    return view, offsets.to(logits.device)


class _Rows:
    """Selected rows of strided logits, read and written block by block."""

    def __init__(self, logits: torch.Tensor, rows: torch.Tensor):
        self.view, offsets = _strided_rows(logits)
        self.offsets = offsets[rows]
        # where the strides have no common step, the view's rows overlap; such rows are written through the logits
        self.logits = logits if logits.ndim == 3 else logits[None]
        self.overlaps = 0 < self.view.stride(0) < logits.shape[-1]
        if self.overlaps:
            self.sequence, self.position = rows // logits.shape[-2], rows % logits.shape[-2]

    def block(self, start: int, stop: int) -> torch.Tensor | None:
        """Return the rows as a view, or None where they are not adjacent."""
        offsets = self.offsets[start:stop]
        if not (offsets.diff() == 1).all():
            return None
        first = int(offsets[0])
        return self.view[first : first + stop - start]

    def read(self, start: int, stop: int, scratch: torch.Tensor, is_copy: bool = False) -> torch.Tensor:
        """Return the rows as a view, or as a copy, which lies in ``scratch`` if that has their dtype."""
        block = None if is_copy else self.block(start, stop)
        if block is None:
            out = scratch if scratch.dtype == self.view.dtype else None
            block = torch.index_select(self.view, 0, self.offsets[start:stop], out=out)
        return block

    def write(self, start: int, stop: int, values: torch.Tensor) -> None:
        block = self.block(start, stop)
        if block is None and self.overlaps:
            self.logits[self.sequence[start:stop], self.position[start:stop]] = values.to(self.view.dtype)
        elif block is None:
            self.view[self.offsets[start:stop]] = values.to(self.view.dtype)
        elif block.data_ptr() != values.data_ptr():
            block.copy_(values)

    def zero(self) -> None:
        if self.overlaps:
            self.logits[self.sequence, self.position] = 0
        else:
            self.view.index_fill_(0, self.offsets, 0)


def _blocks(num_rows: int, vocab_size: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    size = max(1, BLOCK_BYTES // (vocab_size * dtype.itemsize))
    for start in range(0, num_rows, size):
        yield start, min(start + size, num_rows)


def token_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *,
    ignore_index: int,
    shift: bool,
    scale: float,
    softcap: float | None,
    factor: float,
    sum_squares: bool = False,
) -> RowResults:
    """Return targets, softmax statistics and per-token values of logits [..., V]; 0 in masked rows.

    ``sum_squares`` adds log sum p^2 to the values, at two more passes over the scratch buffer of the exponentials.
    """
    vocab_size, dtype = logits.shape[-1], compute_dtype(logits)
    targets = row_targets(labels, cu_seqlens, ignore_index=ignore_index, shift=shift, vocab_size=vocab_size).flatten()
    tokens = (targets != MASKED).nonzero().flatten()
    token_targets = targets[tokens]
    rows = _Rows(logits, tokens)
    row_maxima, log_sums = torch.zeros(2, len(tokens), dtype=dtype, device=logits.device)
    per_token = torch.zeros(num_token_values(sum_squares), len(tokens), dtype=dtype, device=logits.device)
    log2_factor = torch.tensor(factor * LOG2_E, dtype=dtype, device="cpu").item()
    scratch = None
    for start, stop in _blocks(len(tokens), vocab_size, dtype):
        if scratch is None:
            scratch = torch.empty(2, stop - start, vocab_size, dtype=dtype, device=logits.device)
        u, exps = scratch[:, : stop - start]
        row_max, log_sum = row_maxima[start:stop], log_sums[start:stop]
        logps, entropy, mean_logits, is_top1, log_sum_squares = TokenValues(*per_token[:, start:stop])

        x = rows.read(start, stop, exps)  # x may lie in exps, which is written only after u is made of x
        if softcap is not None:
            x = torch.mul(u.copy_(x), scale / softcap, out=u).tanh_().mul_(softcap)
        row_max.copy_(x.amax(1))
        torch.mul(x.sum(1, dtype=dtype), factor / vocab_size, out=mean_logits)
        # -inf logits are legal: a row that holds nothing else must become NaN by -inf - -inf here, and nowhere else
        if x.dtype == dtype:
            torch.sub(x, row_max[:, None], out=u)
        else:
            u.copy_(x).sub_(row_max[:, None])
        torch.mul(u, log2_factor, out=exps).exp2_()
        row_sum = exps.sum(1)
        exact_log_sum = torch.log(row_sum.double())
        target = token_targets[start:stop]
        distance = u.gather(1, target.clamp(min=0)[:, None])[:, 0]
        is_top1.copy_((distance >= 0) & (target != INVALID))  # a NaN in the row makes its maximum NaN
        if mean_logits.isinf().any():
            u.clamp_(min=-1e30)  # turns 0 * -inf into 0: exps is 0 long before u reaches -1e30
        mean_distance = u.mul_(exps).sum(1).div_(row_sum)
        log_sum.copy_(exact_log_sum)
        if sum_squares:
            log_sum_squares.copy_(torch.log(exps.square_().sum(1).double()) - 2 * exact_log_sum)
        entropy.copy_(exact_log_sum - mean_distance * factor)
        # log2_factor is rounded, and the kernels correct for that in the same way
        exact_log_sum -= mean_distance * (log2_factor * math.log(2) - factor)
        logps.copy_(distance.double().mul_(factor).sub_(exact_log_sum))
        logps[target == INVALID] = math.nan

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(*values.shape[:-1], targets.numel()).index_copy_(-1, tokens, values)

    return RowResults(targets.int(), spread(row_maxima), spread(log_sums), spread(per_token))


def token_logprobs_backward(
    logits: torch.Tensor,
    grad: torch.Tensor,
    targets: torch.Tensor,
    token_grads: torch.Tensor,
    row_max: torch.Tensor,
    log_sum: torch.Tensor,
    *,
    scale: float,
    softcap: float | None,
    factor: float,
    source_rows: torch.Tensor | None = None,
) -> None:
    """Fill ``grad``, shaped as ``logits`` and possibly the same tensor, from token_grads = d loss / d logps [rows].

    With ``source_rows`` [rows], ascending, row i of ``grad`` is the gradient by ``logits[source_rows[i]]``. ``grad``
    may then be the first rows of ``logits``: what a block of rows overwrites, no later block reads.
    """
    vocab_size, dtype = logits.shape[-1], compute_dtype(logits)
    token_grads = torch.where(targets == INVALID, math.nan, token_grads)
    is_needed = (targets != MASKED) & (token_grads != 0)
    _Rows(grad, (~is_needed).nonzero().flatten()).zero()
    tokens = is_needed.nonzero().flatten()
    grad_rows = _Rows(grad, tokens)
    rows = _Rows(logits, tokens if source_rows is None else source_rows[tokens])
    # d z / d x without the soft cap's own derivative
    coefficients = (token_grads * (factor if softcap is None else factor * scale))[tokens]
    p_scale = coefficients / log_sum[tokens].exp()
    token_max, token_targets = row_max[tokens, None], targets[tokens].long().clamp_(min=0)
    scratch = None
    for start, stop in _blocks(len(tokens), vocab_size, dtype):
        if scratch is None:
            scratch = torch.empty(2, stop - start, vocab_size, dtype=dtype, device=logits.device)
        x = rows.read(start, stop, scratch[1, : stop - start], is_copy=source_rows is not None)
        result = grad_rows.block(start, stop) if grad.dtype == dtype else None
        if result is None:
            result = scratch[0, : stop - start]
        slope = None
        if softcap is not None:
            slope = scratch[1, : stop - start]
            torch.mul(slope.copy_(x), scale / softcap, out=slope).tanh_()
            torch.mul(slope, softcap, out=result).sub_(token_max[start:stop])
            slope.square_().neg_().add_(1)
        elif x.dtype == dtype:
            torch.sub(x, token_max[start:stop], out=result)
        else:
            result.copy_(x).sub_(token_max[start:stop])
        result.mul_(factor * LOG2_E).exp2_().mul_(-p_scale[start:stop, None])
        target = token_targets[start:stop, None]
        result.scatter_(1, target, result.gather(1, target) + coefficients[start:stop, None])
        if slope is not None:
            result.mul_(slope)
        grad_rows.write(start, stop, result)


def sequence_sums(
    targets: torch.Tensor,
    per_token: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *,
    num_sequences: int,
    average: bool,
) -> SequenceValues:
    """Return sums (means with ``average``) of the log-probabilities and means of the metrics, each [B]."""
    lengths = None if cu_seqlens is None else cu_seqlens.diff().long()

    def add_up(values: torch.Tensor) -> torch.Tensor:
        if lengths is None:
            return values.view(num_sequences, -1).sum(1, dtype=torch.float64)
        return torch.segment_reduce(values.double(), "sum", lengths=lengths)

    counts = add_up(targets != MASKED)
    divisor = counts.clamp(min=1)
    logps, *metrics = per_token
    sums = add_up(logps)
    means = (add_up(values).div_(divisor).to(values.dtype, copy=True) for values in metrics)
    return SequenceValues(sums.div_(divisor) if average else sums, counts.long(), *means)


def sequence_backward(
    targets: torch.Tensor,
    token_counts: torch.Tensor,
    head_grads: torch.Tensor | None,
    incoming: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *,
    average: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return d loss / d token log-probability [rows]; d loss / d sequence log-probability is incoming * head_grads."""
    grads = incoming.double() if head_grads is None else scale_grads(head_grads, incoming)
    if average:
        grads = grads / token_counts.clamp(min=1)
    num_rows, num_sequences = targets.numel(), token_counts.numel()
    if cu_seqlens is None:
        row_grads = grads[:, None].expand(num_sequences, num_rows // num_sequences).flatten()
    else:
        row_grads = grads[row_sequences(cu_seqlens, num_rows)]
    return torch.where(targets == MASKED, 0.0, row_grads).to(dtype)
