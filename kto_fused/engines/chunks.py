"""One chunk of completion tokens through the LM head: hidden states to log-probabilities, and gradients back.

The engine (``hidden.py``) gathers the hidden states of a chunk's tokens and calls these methods in order. No loss is
known here: d loss / d logps comes from outside.

    fold                 one GEMM, and a pass that folds the logits of each row (token) into the row's state
    state                what the folded columns say about each row, to be read; states over other columns may be merged
    finish               the state to log-probability, entropy, mean logit and top-1 of each token
    backward             from d loss / d logps, prepare the gradient of the chunk's logits
    hidden_gradient      one GEMM: d loss / d hidden
    add_weight_gradient  one GEMM: d loss / d weight
    again                on a second visit: compute the logits once more and take their gradient, panel by panel

A second visit is for losses that are not known while the chunk still holds its logits. It reads the ``statistics`` of
the first visit, so it need not fold again.

Two kinds of chunk have these methods. ``WholeRows`` holds the chunk's logits in float32 and overwrites them with their
gradient. ``FoldedRows``, for bfloat16 on a GPU, has one tile of columns at a time in float32 and keeps the softmax's
numerators in bfloat16. It keeps those of all columns only where the head's gradient is taken on the first visit. That
is half the bytes per token, and one pass over them less.
"""

import bisect
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from . import cpu
from .backends import multiprocessors, on_device
from .layout import INVALID, MASKED, compute_dtype
from .logits import row_outputs
from .results import TokenValues, num_token_values

# Bytes of the LM head's weight that are cast at once where a GEMM cannot read it as it is; at most a quarter of a
# chunk's bytes.
CAST_BYTES = 2**24
# Bytes of rows that move together at a time, where rows without a gradient are left out.
MOVED_BYTES = 2**22
# Logits of one tile: enough for a GEMM that fills a GPU many times over and runs longer than its launch takes.
TILE_LOGITS = 3 * 2**23
# Logits of one panel, which is several tiles. Each panel's GEMM adds to the same gradient by the hidden states.
PANEL_LOGITS = 3 * TILE_LOGITS
# The same where the weight's gradient is taken too. A panel then has all tokens, so that each row of the weight's
# gradient is written once.
WEIGHT_PANEL_LOGITS = 2**28
# Tokens of a chunk that keeps nothing, or keeps panels without the head's gradient: with more, its GEMMs are no faster.
PANEL_TOKENS = 4096
# Tokens that are enough for a CPU's GEMMs: with 4096 tokens a step took as long (H = 1024, V = 32768, two cores), or 6
# % longer (H = 256). With few columns a chunk takes more tokens, up to CPU_LOGITS, because each chunk visits the
# sequences of the whole batch.
CPU_TOKENS = 1024
CPU_LOGITS = 2**22
MOST_TOKENS = 2**24  # of any chunk
# ``SQUARE_SCALE`` of kernels/online.py, repeated here because a CPU has no kernels; a test compares them.
SQUARE_SCALE = 2.0**-60

# Up to this hidden size a Hopper GPU folds logits in the registers of their GEMM. On an H200 a step with a trained head
# took 16.9 ms with it and 20.3 ms without (H = 896), 30.1 and 31.1 (2048), 81.7 and 83.8 (2560), 69.2 and 65.9 (4096).
REGISTER_HIDDEN_SIZE = 2560

# The columns whose softmax numerators a chunk keeps for the gradient: none, all, or one panel's at a time. Panels serve
# a frozen head, where the loss only scales the rows of d loss / d hidden, and a second visit, when the loss is known.
Keeps = Literal["nothing", "all", "panels"]


class RowState(NamedTuple):
    """What the columns folded so far say about each row of logits. Every field is [n], one number per row.

    u and factor are those of ``kernels/token_logprobs.py``: z = factor * u are the logits of the softmax. The fields
    are in the order of the rows of a state tensor, which ``kernels/online.py`` names. That file also says how states
    over disjoint columns merge, for example those of an LM head whose rows are spread over several GPUs.
    """

    reference: torch.Tensor  # r, which the exponentials are relative to; near the largest u
    exp_sum: torch.Tensor  # s = sum exp(factor (u - r))
    target_logit: torch.Tensor  # u of the target; undefined where the columns do not include it
    weighted_sum: torch.Tensor  # sum exp(factor (u - r)) (u - r)
    logit_sum: torch.Tensor  # sum u
    maximum: torch.Tensor  # the largest u
    square_sum: torch.Tensor | None = None  # SQUARE_SCALE sum exp(2 factor (u - r)); with ``ChunkSpec.sum_squares``


class RowStatistics(NamedTuple):
    """The part of the rows' state that a second visit reads, all columns folded. Every field is [n].

    ``normalizer`` has the form that the chunk's backward reads: s in ``FoldedRows``, log s in ``WholeRows``. Converting
    one into the other would round it. ``FoldedRows`` subtracts the target's exponential from s, which must give exactly
    0 where no other column counts; ``WholeRows`` subtracts log s in the exponent.
    """

    reference: torch.Tensor
    normalizer: torch.Tensor
    target_logit: torch.Tensor | None  # None in ``WholeRows``, which finds it among its logits


NUM_STATISTICS = len(RowStatistics._fields)


class MergedState(NamedTuple):
    """A state that was merged with those over other columns, for ``finish``."""

    state: RowState
    vocab_size: int  # columns of all the states


class LMHead(NamedTuple):
    """logits = hidden @ weight.T + bias, with weight [V, H] in the GEMMs' dtype and bias [V] in the logits'."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def blocks(self, dtype: torch.dtype, num_bytes: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (rows, weight[rows] in ``dtype``) in blocks of ``num_bytes``, or of one row if that takes more."""
        vocab_size, hidden_size = self.weight.shape
        size = min(vocab_size, max(1, num_bytes // (hidden_size * dtype.itemsize)))
        # one buffer for all blocks: a new one would be allocated while the last is still held
        cast = self.weight.new_empty(size, hidden_size, dtype=dtype)
        for start in range(0, vocab_size, size):
            rows = slice(start, min(start + size, vocab_size))
            yield rows, cast[: rows.stop - start].copy_(self.weight[rows])


@functools.cache
def _has_float32_output(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a GEMM of half-precision matrices can write float32 on this device."""
    if device.type != "cuda":
        return False
    matrix = torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.mm(matrix, matrix, out_dtype=torch.float32)
    except torch.OutOfMemoryError:
        raise  # a lack of memory says nothing about the device
    except (RuntimeError, TypeError) as error:
        if "CUBLAS_STATUS_ALLOC_FAILED" in str(error) or "CUBLAS_STATUS_NOT_INITIALIZED" in str(error):
            raise  # cuBLAS reports a lack of memory in this way too
        return False
    return True


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return is_nvidia and torch.cuda.get_device_capability(device)[0] == 9


def _folds_in_registers(hidden_size: int, device: torch.device) -> bool:
    return hidden_size <= REGISTER_HIDDEN_SIZE and _is_hopper(device)


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
    """Compute out = a @ b, or out += a @ b with ``add``, in the precision of ``out``."""
    if a.dtype != out.dtype and not _has_float32_output(a.device, a.dtype):
        a, b = a.to(out.dtype), b.to(out.dtype)
    wider = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, out=out, **wider)
    else:
        torch.mm(a, b, out=out, **wider)


@dataclass(frozen=True)
class ChunkSpec:
    """What a chunk is made for. The size of its buffers follows from this and its number of tokens."""

    vocab_size: int
    hidden_size: int
    dtype: torch.dtype  # of the hidden states and the weight as the GEMMs read them
    device: torch.device
    backend: str  # "triton" or "torch"
    keeps: Keeps
    transform: dict  # scale, softcap and factor, as in ``kernels/token_logprobs.py``
    by_hidden: bool  # whether d loss / d hidden is taken
    by_head: bool  # whether the gradient of the head's weight, its bias or both is taken
    num_bytes: int  # memory budget of the chunk
    # Bytes of the weight's gradient, if its memory serves the chunk as a buffer until the last GEMM writes it.
    lent_bytes: int = 0
    sum_squares: bool = False  # whether log sum p^2 is found too

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.dtype)

    @property
    def is_native(self) -> bool:
        """Whether a GEMM can read ``dtype`` and write ``compute_dtype``."""
        return self.dtype == self.compute_dtype or _has_float32_output(self.device, self.dtype)

    @property
    def grad_dtype(self) -> torch.dtype:
        """The dtype of the logits' gradient. Never float16: it is computed before loss scaling, and would underflow."""
        is_narrow = self.kind is FoldedRows or (self.is_native and self.dtype != torch.float16)
        return self.dtype if is_narrow else self.compute_dtype

    @property
    def kind(self) -> type["WholeRows"] | type["FoldedRows"]:
        """The faster kind of chunk for this dtype, backend and device."""
        is_foldable = self.dtype == torch.bfloat16 and self.backend == "triton"
        # Triton's interpreter runs on a CPU, and memory estimates use meta tensors
        is_stand_in = self.device.type in ("cpu", "meta")
        return FoldedRows if is_foldable and (self.is_native or is_stand_in) else WholeRows

    @property
    def cast_bytes(self) -> int:
        """Bytes of the weight that are cast at once."""
        return min(CAST_BYTES, self.num_bytes // 4)

    @property
    def enough_tokens(self) -> int:
        """A number of tokens beyond which the chunk's GEMMs are no faster."""
        if self.kind is WholeRows:
            is_cpu = self.device.type == "cpu"
            return max(CPU_TOKENS, CPU_LOGITS // self.vocab_size) if is_cpu else MOST_TOKENS
        writes_weight_gradient = self.keeps == "all" or (self.keeps == "panels" and self.by_head)
        return MOST_TOKENS if writes_weight_gradient else PANEL_TOKENS

    def capacity(self) -> int:
        """Return how many tokens fit into ``num_bytes``, at least one.

        A chunk that does not keep all columns takes no more than ``enough_tokens``.
        """
        limit = min(MOST_TOKENS if self.keeps == "all" else self.enough_tokens, self.num_bytes // self.hidden_size)
        return max(1, bisect.bisect_right(range(1, limit + 1), self.num_bytes, key=self.size))

    def goes_through_registers(self, weight: torch.Tensor) -> bool:
        """Return whether ``FoldedRows`` folds the logits of this LM head in the registers of their GEMM."""
        from ..kernels import register_tiles

        # The wider of policy and reference decides: a chunk that was planned for tiles in memory has no room for the
        # partial results that tiles in registers leave.
        is_narrow = _folds_in_registers(max(self.hidden_size, weight.shape[1]), self.device)
        return is_narrow and self.transform["softcap"] is None and register_tiles.serves(weight)

    def size(self, num_tokens: int) -> int:
        """Return the bytes that a chunk of ``num_tokens`` takes, including the inputs and outputs of its GEMMs."""
        return self.kind.size(num_tokens, self)

    @functools.cached_property
    def block(self) -> int:
        """Columns that the kernels of ``FoldedRows`` visit in one step."""
        from ..kernels import memory_tiles

        return memory_tiles.block_columns(self.vocab_size)


class WholeRows:
    """A chunk that holds all logits of up to ``num_tokens`` tokens in float32 (float64 for float64).

    The gradient of the logits overwrites them. Where its GEMMs read bfloat16, it has a buffer of its own.
    """

    def __init__(self, num_tokens: int, spec: ChunkSpec):
        self.num_tokens, self.spec = num_tokens, spec
        self.logits = torch.empty(num_tokens, spec.vocab_size, dtype=spec.compute_dtype, device=spec.device)
        self.grads = self.logits
        if spec.keeps != "nothing" and spec.grad_dtype != spec.compute_dtype:
            self.grads = torch.empty_like(self.logits, dtype=spec.grad_dtype)

    @staticmethod
    def size(num_tokens: int, spec: ChunkSpec) -> int:
        """Return the bytes of a chunk, see ``ChunkSpec.size``."""
        wide, grad = spec.compute_dtype.itemsize, spec.grad_dtype.itemsize
        is_kept, hidden = spec.keeps != "nothing", num_tokens * spec.hidden_size
        logits = num_tokens * spec.vocab_size
        buffers = logits * (wide + grad if is_kept and grad != wide else wide)
        # beside the buffers: the GEMMs' other operands and results, or the scratch memory of the row operations
        passing = 0
        if not spec.is_native or (is_kept and spec.grad_dtype != spec.dtype):
            # casts: hidden states, a block of the weight
            passing = hidden * wide + min(spec.cast_bytes, spec.vocab_size * spec.hidden_size * wide)
        elif is_kept:  # the gradient by the hidden states
            passing = hidden * grad
        elif spec.backend == "torch":  # the copy that gathering hidden states makes
            passing = hidden * spec.dtype.itemsize
        scratch = 2 * min(cpu.BLOCK_BYTES, logits * wide) if spec.backend == "torch" else 0
        return buffers + hidden * spec.dtype.itemsize + max(passing, scratch)

    def fold(self, hidden: torch.Tensor, lm_head: LMHead, targets: torch.Tensor, keep: bool) -> None:
        """Compute the logits of hidden [n, H] and fold them; targets [n] int32 are token ids or ``INVALID``.

        ``keep`` asks for what ``backward`` needs, which this kind of chunk always keeps. The row kernel folds and
        finishes in one launch, so the results of ``finish`` are already there. It leaves 8 bytes of state per row, all
        that the backward reads, instead of the whole state.

        The row kernel does not read ``MASKED`` rows. So a row whose target lies in another chunk's columns must be
        given one of this chunk's columns as its target. A merged state replaces that column's logit, but ``backward``
        would still treat the column as the row's target.
        """
        logits = self._logits(hidden, lm_head)
        options = {"ignore_index": MASKED, "shift": False, "sum_squares": self.spec.sum_squares, **self.spec.transform}
        if self.spec.backend == "torch":
            outputs = cpu.token_logprobs(logits, targets, None, **options)
        else:
            from ..kernels import token_logprobs

            outputs = row_outputs(logits, self.spec.sum_squares)
            with on_device(logits):
                token_logprobs.forward(
                    logits, targets, None, outputs, multiprocessors=multiprocessors(logits.device), **options
                )
        self.targets, row_max, log_sum, self.per_token = outputs
        self.statistics = RowStatistics(row_max, log_sum, None)

    @property
    def state(self) -> RowState:
        """The state after ``fold``, computed from the row kernel's results when asked for, which rounds once more.

        It costs a few operations on [n] numbers, and nothing where no state is merged. A row's ``target_logit`` is NaN
        if its target is ``INVALID``.
        """
        factor = self.spec.transform["factor"]
        row_max, log_sum, _ = self.statistics
        logps, entropy, mean_logits, _, log_sum_squares = TokenValues(*self.per_token)
        exp_sum, square_sum = log_sum.exp(), None
        if log_sum_squares is not None:
            square_sum = (log_sum_squares + 2 * log_sum).exp() * SQUARE_SCALE
        return RowState(
            reference=row_max,
            exp_sum=exp_sum,
            target_logit=row_max + (logps + log_sum) / factor,
            weighted_sum=(log_sum - entropy) / factor * exp_sum,
            logit_sum=mean_logits * (self.spec.vocab_size / factor),
            maximum=row_max,
            square_sum=square_sum,
        )

    def finish(self, lm_head: LMHead, merged: MergedState | None = None) -> torch.Tensor:
        """Return per_token [4, n]: logps, entropy, mean_logits and is_top1; [5, n] with log_sum_squares.

        Without ``merged`` these are the row kernel's results. ``merged`` replaces the state, for the backward too.
        """
        if merged is not None:
            state, vocab_size = merged
            self.statistics = RowStatistics(state.reference, state.exp_sum.log(), None)
            self.per_token = _finish(state, self.targets, vocab_size, self.spec.transform["factor"])
        return self.per_token

    def again(
        self,
        hidden: torch.Tensor,
        lm_head: LMHead,
        targets: torch.Tensor,
        statistics: torch.Tensor,
        token_grads: torch.Tensor,
    ) -> Iterator[slice]:
        """Compute the logits once more and their gradient, for one panel of columns at a time; yield its columns.

        The head's gradient by these columns must be taken before the next panel. ``statistics`` [NUM_STATISTICS, n] are
        the fields of the first visit's ``RowStatistics``; ``token_grads`` [n] are d loss / d logps.
        """
        self._logits(hidden, lm_head)
        self.targets = targets
        # clone: a slice's alignment would compile another variant of the kernel
        reference, normalizer, _ = statistics
        self.statistics = RowStatistics(reference.clone(), normalizer.clone(), None)
        self.backward(token_grads)
        yield slice(0, self.spec.vocab_size)

    def _logits(self, hidden: torch.Tensor, lm_head: LMHead) -> torch.Tensor:
        """Write the logits [n, V] into the buffer and return them."""
        logits, self.source_rows = self.logits[: len(hidden)], None
        if self.spec.is_native:
            _multiply(hidden, lm_head.weight.T, logits)
        else:
            hidden = hidden.to(logits.dtype)
            for rows, weight in lm_head.blocks(logits.dtype, self.spec.cast_bytes):
                torch.mm(hidden, weight.T, out=logits[:, rows])
        if lm_head.bias is not None:
            logits.add_(lm_head.bias)
        return logits

    def select(self, rows: torch.Tensor) -> None:
        """Keep only these ``rows`` of what ``backward`` reads, ascending indices [m]; it then takes [m] gradients."""
        if self.spec.backend == "torch":
            self.source_rows = rows  # ``backward`` reads them where they are
        else:
            _move_together(self.logits, rows)
        row_max, log_sum, _ = self.statistics
        self.targets, self.statistics = self.targets[rows], RowStatistics(row_max[rows], log_sum[rows], None)

    def clear(self, rows: torch.Tensor) -> None:
        """Let these rows [m], whose gradient by ``logps`` is 0, add nothing to GEMMs: ``backward`` makes them 0."""

    def backward(self, token_grads: torch.Tensor) -> None:
        """Compute d loss / d logits [n, V] from ``token_grads`` = d loss / d logps [n]; 0 where that is 0."""
        row_max, log_sum, _ = self.statistics
        logits, self.current = self.logits[: len(token_grads)], self.grads[: len(token_grads)]
        arguments = logits, self.current, self.targets, token_grads, row_max, log_sum
        if self.spec.backend == "torch":
            if self.source_rows is not None:
                arguments = self.logits, *arguments[1:]
            cpu.token_logprobs_backward(*arguments, **self.spec.transform, source_rows=self.source_rows)
        else:
            from ..kernels import token_logprobs

            with on_device(logits):
                token_logprobs.backward(*arguments, **self.spec.transform)

    def hidden_gradient(self, lm_head: LMHead) -> tuple[torch.Tensor, None]:
        """Return d loss / d hidden [n, H], and None: its rows need no further factor."""
        grads = self.current
        if grads.dtype == lm_head.weight.dtype:
            return torch.mm(grads, lm_head.weight), None
        total = grads.new_zeros(len(grads), lm_head.weight.shape[1])
        for rows, weight in lm_head.blocks(grads.dtype, self.spec.cast_bytes):
            torch.addmm(total, grads[:, rows], weight, out=total)
        return total, None

    def add_weight_gradient(self, total: torch.Tensor, hidden: torch.Tensor, *, add: bool) -> None:
        """Write d loss / d weight [columns, H] of the present columns to ``total``, or add it with ``add``."""
        _multiply(self.current.T, hidden.to(self.current.dtype), total, add=add)

    def add_bias_gradient(self, total: torch.Tensor) -> None:
        """Add d loss / d bias [columns] of the present columns to ``total``."""
        total.add_(self.current.sum(0, dtype=total.dtype))


class FoldedRows:
    """A chunk with one tile of logits in float32 at a time, which keeps P of ``kernels/memory_tiles.py`` in bfloat16.

    d loss / d logits = diag(row_scale) P with row_scale = -k (d loss / d logps) / s, where P, k and s are those of that
    module. The gradient's GEMMs read P as it is; row_scale multiplies their other operand or their result.
    """

    def __init__(self, num_tokens: int, spec: ChunkSpec, lent: torch.Tensor | None = None):
        """Allocate the chunk.

        ``lent`` is the weight's gradient. If it is large enough, its memory serves as the buffer until the chunk's last
        GEMM writes it.
        """
        self.num_tokens, self.spec = num_tokens, spec
        self.tile_cols, self.kept_cols = _column_counts(num_tokens, spec)
        is_enough = lent is not None and lent.nbytes >= 4 * num_tokens * _buffer_cols(self.tile_cols, spec)
        self.lent = lent if is_enough else None
        if self.kept_cols:
            self.kept = torch.empty(num_tokens, self.kept_cols, dtype=spec.dtype, device=spec.device)
        if spec.keeps == "panels" and spec.by_hidden:
            self.product = torch.empty(num_tokens, spec.hidden_size, dtype=torch.float32, device=spec.device)

    @functools.cached_property
    def buffer(self) -> torch.Tensor:
        """Memory of a tile of logits, unless registers hold it.

        Where all columns are kept, it also takes the gradient by the hidden states, once the last tile was folded.
        """
        cols = self.spec.hidden_size if self.in_registers else _buffer_cols(self.tile_cols, self.spec)
        size = self.num_tokens, cols
        if self.lent is None:
            return torch.empty(size, dtype=torch.float32, device=self.spec.device)
        memory = self.lent.view(-1).view(torch.uint8)[: 4 * math.prod(size)]
        return memory.view(torch.float32).view(size)

    @staticmethod
    def size(num_tokens: int, spec: ChunkSpec) -> int:
        """Return the bytes of a chunk, see ``ChunkSpec.size``."""
        from ..kernels import register_tiles

        tile_cols, kept_cols = _column_counts(num_tokens, spec)
        buffer = 4 * num_tokens * _buffer_cols(tile_cols, spec)
        if buffer <= spec.lent_bytes:
            buffer = 0
        is_second_visit = spec.keeps == "panels" and spec.by_head
        if _folds_in_registers(spec.hidden_size, spec.device) and not is_second_visit:  # it never has both at once
            # the reference model's visit, which keeps nothing, or the policy's
            partial = max(
                register_tiles.partial_bytes(spec.vocab_size, is_kept=False, sum_squares=spec.sum_squares),
                register_tiles.partial_bytes(kept_cols, is_kept=True, sum_squares=spec.sum_squares),
            )
            buffer = max(buffer, num_tokens * partial)
        return buffer + num_tokens * (2 * kept_cols + _passing_bytes(spec))

    def panels(self) -> list[slice]:
        """Return the panels: the columns whose P is kept at a time."""
        vocab_size, width = self.spec.vocab_size, self.kept_cols or self.spec.vocab_size
        return [slice(first, min(first + width, vocab_size)) for first in range(0, vocab_size, width)]

    def fold(self, hidden: torch.Tensor, lm_head: LMHead, targets: torch.Tensor, keep: bool) -> None:
        """Fold the logits of hidden [n, H] tile by tile, see ``WholeRows.fold``; P is kept only with ``keep``.

        A target that lies in columns of another chunk is ``MASKED``; its logit must come with a merged state.
        """
        from ..kernels import online, register_tiles

        self._begin(lm_head, targets)
        num_state_rows = online.STATE_ROWS + self.spec.sum_squares
        self.state_rows = torch.empty(num_state_rows, len(hidden), dtype=torch.float32, device=hidden.device)
        self.references = self.sums = None
        with on_device(hidden):
            if self.in_registers:
                squares = self.spec.sum_squares
                register_tiles.start(hidden, *lm_head, targets, self.state_rows, sum_squares=squares)
            if keep:
                self._fold_and_keep(hidden, lm_head)
            else:
                self._fold(hidden, lm_head, slice(0, self.spec.vocab_size))

    @property
    def state(self) -> RowState:
        """The state after ``fold``, as views of the tensor that the kernels fold into."""
        return RowState(*self.state_rows)

    def finish(self, lm_head: LMHead, merged: MergedState | None = None) -> torch.Tensor:
        """Return per_token [4, n], see ``WholeRows.finish``, and complete the P that was kept, now that s is known."""
        from ..kernels import memory_tiles

        vocab_size = self.spec.vocab_size
        with on_device(self.state_rows):
            if merged is not None:
                state, vocab_size = merged
                self.state_rows = torch.stack([values for values in state if values is not None])
                if self.sums is not None:  # a panel without columns: rescales the product to the new references alone
                    self._settle(slice(self.spec.vocab_size, self.spec.vocab_size))
            if self.sums is not None:
                capping = _without_scale(self.spec.transform)
                memory_tiles.add_target_rows(
                    self.sums.product, lm_head.weight, self.targets, self.state_rows, **capping
                )
            elif self.references is not None:
                self._settle(slice(0, self.spec.vocab_size))
            self.references = self.sums = None
            squares, factor = self.spec.sum_squares, self.spec.transform["factor"]
            per_token = self.state_rows.new_empty(num_token_values(squares), len(self.targets))
            options = {"vocab_size": vocab_size, "factor": factor, "sum_squares": squares}
            memory_tiles.finish(self.targets, self.state_rows, per_token, **options)
        self.statistics = RowStatistics(*self.state_rows[:NUM_STATISTICS])
        return per_token

    def _begin(self, lm_head: LMHead, targets: torch.Tensor) -> None:
        """Choose the kernels of a visit: tiles in registers or in memory."""
        from ..kernels import register_tiles

        self.targets = targets
        self.in_registers = self.spec.goes_through_registers(lm_head.weight)
        # columns of a tile, and of one step of the kernels that read tiles in memory
        self.width, self.block = self.tile_cols, self.spec.block
        if self.in_registers:
            self.__dict__.pop("buffer", None)  # an earlier visit's; the partial results take its memory
            self.width, self.block = register_tiles.COLUMNS, min(self.block, register_tiles.COLUMNS)

    def _split(self, panel: slice) -> tuple[slice, slice]:
        """Return a panel's columns in two parts: those folded in registers, and those folded in memory."""
        middle = panel.stop - (panel.stop - panel.start) % self.width if self.in_registers else panel.start
        return slice(panel.start, middle), slice(middle, panel.stop)

    def _fold(self, hidden: torch.Tensor, lm_head: LMHead, panel: slice) -> None:
        """Fold a panel of columns into the state; keep its P if ``references`` are there to be filled."""
        from ..kernels import memory_tiles, register_tiles

        def kept(columns: slice) -> memory_tiles.Kept | None:
            if self.references is None:
                return None
            tile_index = (columns.start - panel.start) // self.width
            return memory_tiles.Kept(self._kept_columns(hidden, columns, panel), self.references, tile_index)

        whole, rest = self._split(panel)
        transform, rows = self.spec.transform, (self.targets, self.state_rows)
        squares = {"sum_squares": self.spec.sum_squares}
        if whole.start < whole.stop:
            register_tiles.fold(hidden, *lm_head, *rows, whole, kept(whole), factor=transform["factor"], **squares)
        options = {"block": self.block, **transform, **squares}
        for tile, columns in self._tiles(hidden, lm_head, rest):
            memory_tiles.fold(tile, lm_head.bias, *rows, columns, kept(columns), **options)

    def _fold_and_keep(self, hidden: torch.Tensor, lm_head: LMHead) -> None:
        """Fold all columns and keep their P; multiply panels with the weight at once. ``finish`` completes P."""
        from ..kernels import memory_tiles

        self.references = self.state_rows.new_empty(len(hidden), -(-self.kept_cols // self.width))
        if self.spec.keeps == "panels":
            self.sums = memory_tiles.PanelSums(self.product[: len(hidden)], torch.empty_like(self.state_rows[0]))
        for panel in self.panels():
            self._fold(hidden, lm_head, panel)
            self.current = self._kept_panel(hidden, panel)
            if self.sums is not None:
                self._settle(panel)
                self._add_product(lm_head, panel)

    def _settle(self, panel: slice) -> None:
        """Make the panel of P that is kept at present ready for its GEMM."""
        from ..kernels import memory_tiles

        memory_tiles.settle(
            self.current,
            self.targets,
            self.state_rows,
            self.references,
            self.sums,
            panel,
            tile_cols=self.width,
            block=self.block,
            vocab_size=self.spec.vocab_size,
            **_without_scale(self.spec.transform),
        )

    def _kept_columns(self, hidden: torch.Tensor, columns: slice, panel: slice) -> torch.Tensor:
        """Return the memory for P of a panel from ``columns.start`` on, to the end of the buffer."""
        return self.kept[: len(hidden), columns.start - panel.start :]

    def _kept_panel(self, hidden: torch.Tensor, panel: slice) -> torch.Tensor:
        """Return the memory for P of a whole panel."""
        return self.kept[: len(hidden), : panel.stop - panel.start]

    def again(
        self,
        hidden: torch.Tensor,
        lm_head: LMHead,
        targets: torch.Tensor,
        statistics: torch.Tensor,
        token_grads: torch.Tensor,
    ) -> Iterator[slice]:
        """See ``WholeRows.again``. What is kept here is d loss / d logits itself, with the rows' factors."""
        from ..kernels import memory_tiles, register_tiles

        self._begin(lm_head, targets)
        self.statistics, transform = RowStatistics(*statistics), self.spec.transform
        self.backward(token_grads)
        factors, self.row_scale = self.row_scale, None
        for panel in self.panels():
            whole, rest = self._split(panel)
            self.current = self._kept_panel(hidden, panel)
            with on_device(hidden):
                if whole.start < whole.stop:
                    register_tiles.keep(
                        hidden, *lm_head, self.current, targets, statistics, factors, whole, factor=transform["factor"]
                    )
                for tile, columns in self._tiles(hidden, lm_head, rest):
                    into = self._kept_columns(hidden, columns, panel)
                    memory_tiles.keep(
                        tile, lm_head.bias, into, targets, statistics, factors, columns, block=self.block, **transform
                    )
            if self.spec.by_hidden:
                self._add_product(lm_head, panel)
            yield panel

    def _add_product(self, lm_head: LMHead, panel: slice) -> None:
        """Add what is kept of a panel, times its rows of the weight, to the gradient by the hidden states."""
        _multiply(self.current, lm_head.weight[panel], self.product[: len(self.current)], add=panel.start > 0)

    def _tiles(self, hidden: torch.Tensor, lm_head: LMHead, panel: slice) -> Iterator[tuple[torch.Tensor, slice]]:
        """Yield (logits [n, width] without the bias, columns) for each tile of a panel; all lie in the same memory."""
        num_tokens, width = len(hidden), self.width
        if panel.start == panel.stop:
            return
        if self.in_registers:  # less than a tile of registers
            tile = torch.empty(num_tokens, width, dtype=torch.float32, device=hidden.device)
        else:
            tile = self.buffer.view(-1)[: num_tokens * width].view(num_tokens, width)
        for first in range(panel.start, panel.stop, width):
            columns = slice(first, min(first + width, panel.stop))
            _multiply(hidden, lm_head.weight[columns].T, tile[:, : columns.stop - first])
            yield tile, columns

    def select(self, rows: torch.Tensor) -> None:
        """Keep only some rows, see ``WholeRows.select``. For ``keeps="all"``, after ``finish``."""
        _move_together(self.current, rows)
        self.current, self.targets = self.current[: len(rows)], self.targets[rows]
        self.statistics = RowStatistics(*[None if x is None else x[rows].contiguous() for x in self.statistics])

    def clear(self, rows: torch.Tensor) -> None:
        """See ``WholeRows.clear``. For ``keeps="all"``, after ``finish``."""
        self.current.index_fill_(0, rows, 0)

    def backward(self, token_grads: torch.Tensor) -> None:
        """Compute ``row_scale`` from ``token_grads`` = d loss / d logps [n]; 0 where that is 0."""
        factor = self.spec.transform["factor"]
        if self.spec.transform["softcap"] is not None:
            factor *= self.spec.transform["scale"]
        row_scale = torch.where(token_grads == 0, 0.0, token_grads * -factor / self.statistics.normalizer)
        self.row_scale = torch.where(self.targets == INVALID, torch.nan, row_scale)

    def hidden_gradient(self, lm_head: LMHead) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return d loss / d hidden [n, H], and the factors [n] that its rows still need, or None."""
        size = len(self.current), lm_head.weight.shape[1]
        if self.spec.keeps == "panels":
            return self.product[: size[0]], self.row_scale
        product = self.buffer.view(-1)[: size[0] * size[1]].view(size)
        _multiply(self.current, lm_head.weight, product)
        return product, self.row_scale

    def add_weight_gradient(self, total: torch.Tensor, hidden: torch.Tensor, *, add: bool) -> None:
        """See ``WholeRows.add_weight_gradient``. Scales ``hidden`` in place, unless P already has the rows' factors."""
        if self.row_scale is not None:
            move_rows(hidden, hidden, "triton", factors=self.row_scale)
        _multiply(self.current.T, hidden, total, add=add)

    def add_bias_gradient(self, total: torch.Tensor) -> None:
        """Add d loss / d bias [columns] of the present columns to ``total``."""
        num_tokens, num_cols = self.current.shape
        row_scale = self.row_scale
        if row_scale is None:
            row_scale = torch.ones(num_tokens, dtype=torch.float32, device=self.current.device)
        high = row_scale.to(self.current.dtype)
        low = (row_scale - high).to(self.current.dtype)  # the bits that bfloat16 drops from ``high``
        sums = row_scale.new_empty(num_cols, 2)
        _multiply(self.current.T, torch.stack([high, low], dim=1), sums)
        total.add_(sums.sum(1))


def _move_together(values: torch.Tensor, rows: torch.Tensor) -> None:
    """values[:m] = values[rows] for ascending ``rows`` [m], in place, a few rows at a time."""
    size = max(1, MOVED_BYTES // (values.shape[1] * values.element_size()))
    for start in range(0, len(rows), size):
        # rows are ascending: what a step overwrites, no later step reads
        moved = values.index_select(0, rows[start : start + size])
        values[start : start + len(moved)] = moved


def move_rows(
    source: torch.Tensor,
    target: torch.Tensor,
    backend: str,
    *,
    source_rows: torch.Tensor | None = None,
    target_rows: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
) -> None:
    """Write target[target_rows] = source[source_rows] * factors[:, None], rounded once; 0 where a factor is 0.

    ``source`` is [rows, columns] or [B, T, columns], whose rows count through B T; ``target`` is [rows, columns].
    Without ``source_rows`` or ``target_rows``, rows are taken in order.
    """
    if backend == "triton" and source.stride(-1) == 1:
        from ..kernels import rows

        with on_device(source):
            rows.move_rows(source, target, source_rows=source_rows, target_rows=target_rows, factors=factors)
        return
    if source_rows is not None:
        seq_len = source.shape[1]
        source = source[source_rows // seq_len, source_rows % seq_len]
    if factors is not None:
        source = (source * factors[:, None]).masked_fill_((factors == 0)[:, None], 0)
    if target_rows is None:
        target.copy_(source)
    else:
        target.index_copy_(0, target_rows, source.to(target.dtype))


def _without_scale(transform: dict) -> dict:
    """Return the transform for kernels that read u, not logits."""
    return {name: value for name, value in transform.items() if name != "scale"}


def _passing_bytes(spec: ChunkSpec) -> int:
    """Bytes per token of ``FoldedRows`` beside logits: the hidden state, and its gradient, to which panels add."""
    return spec.hidden_size * (6 if spec.keeps == "panels" and spec.by_hidden else 2)


def _buffer_cols(tile_cols: int, spec: ChunkSpec) -> int:
    """Columns of ``FoldedRows.buffer``."""
    return max(tile_cols, spec.hidden_size) if spec.keeps == "all" else tile_cols


def _finish(state: RowState, targets: torch.Tensor, vocab_size: int, factor: float) -> torch.Tensor:
    """Return per_token [4, n] or [5, n] of a merged state, the fields of ``TokenValues``, in fp64 up to the end."""
    reference, exp_sum, target_logit, weighted_sum, logit_sum, maximum = (values.double() for values in state[:6])
    log_sum, mean_distance = exp_sum.log(), weighted_sum / exp_sum
    logps = factor * (target_logit - reference) - log_sum
    logps = torch.where(targets == INVALID, torch.nan, logps)
    is_top1 = (target_logit >= maximum) & ~logps.isnan()
    per_token = [logps, log_sum - factor * mean_distance, factor * logit_sum / vocab_size, is_top1.double()]
    if state.square_sum is not None:
        per_token.append(torch.log(state.square_sum.double() / SQUARE_SCALE) - 2 * log_sum)
    return torch.stack(per_token).to(state.exp_sum.dtype)


def _column_counts(num_tokens: int, spec: ChunkSpec) -> tuple[int, int]:
    """Return the columns of one tile, and those kept at a time, of ``FoldedRows`` with ``num_tokens`` tokens."""
    num_tokens, block = max(num_tokens, 1), spec.block
    whole = -(-spec.vocab_size // block) * block

    def columns(num_logits: int) -> int:
        return min(whole, max(block, num_logits // num_tokens // block * block))

    tile_cols = columns(min(TILE_LOGITS, spec.num_bytes // 16))  # float32: a quarter of the bytes at most
    if spec.keeps == "nothing":
        return tile_cols, 0
    if spec.keeps == "all":
        return tile_cols, whole
    left = spec.num_bytes - num_tokens * (4 * tile_cols + _passing_bytes(spec))
    kept_cols = columns(min(WEIGHT_PANEL_LOGITS if spec.by_head else PANEL_LOGITS, left // 2))
    tile_cols = min(tile_cols, kept_cols)
    if kept_cols < whole:  # whole tiles only
        kept_cols = kept_cols // tile_cols * tile_cols
    return tile_cols, kept_cols
