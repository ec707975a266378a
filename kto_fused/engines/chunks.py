"""One chunk of completion tokens through the LM head: hidden states to log-probabilities, and gradients back. No loss
here.

``forward`` is one GEMM and the rows' statistics; once ``backward`` was given d loss / d logps, ``hidden_gradient`` and
``add_weight_gradient`` are one GEMM each. Where the loss was not known at the first visit, ``again`` computes some
columns' logits a second time, with the statistics of the first. There are two kinds of chunk with these methods.
``WholeRows`` holds the chunk's logits in float32 and turns them into their own gradient. ``FoldedRows``, for bfloat16
on a GPU, has a tile of columns at a time in float32 and keeps softmax numerators in bfloat16, of all columns only where
the head's gradient is found on the first visit: half the bytes a token, a pass over them less.
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

# Bytes of LM-head weight cast at once, where a GEMM does not read it as it is; at most a quarter of a chunk's.
CAST_BYTES = 2**24
# Logits of one tile: enough for a GEMM that fills a GPU many times over, and outlasts its launch.
TILE_LOGITS = 3 * 2**23
# A panel is some tiles: each adds to the same gradient by the hidden states.
PANEL_LOGITS = 3 * TILE_LOGITS
# Where the weight's gradient is taken too, it has all tokens, so that the weight's rows are written once.
WEIGHT_PANEL_LOGITS = 2**28
# Of a chunk that keeps nothing, or panels without the head's gradient: with more its GEMMs would be no faster.
PANEL_TOKENS = 4096
# Enough for a CPU's GEMMs: with 4096 tokens a step took as long (H = 1024, V = 32768, on two cores), or 6 % longer
# (H = 256). Of few columns more, as each chunk looks at the whole batch's sequences.
CPU_TOKENS = 1024
CPU_LOGITS = 2**22
MOST_TOKENS = 2**24  # of any chunk

# Up to this hidden size a Hopper GPU folds logits in the registers of their GEMM. On an H200 a step with a trained head
# took 16.9 ms with it and 20.3 without (H = 896), 30.1 and 31.1 (2048), 81.7 and 83.8 (2560), 69.2 and 65.9 (4096).
REGISTER_HIDDEN_SIZE = 2560

# Numbers by which a second visit to a token knows what the first found.
NUM_STATISTICS = 3

# Of which of its logits a chunk keeps what their gradient needs: of all, or, where the loss is known or does not matter
# yet, of a panel of columns at a time.
Keeps = Literal["nothing", "all", "panels"]


class LMHead(NamedTuple):
    """logits = hidden @ weight.T + bias, with weight [V, H] in the GEMMs' dtype and bias [V] in the logits'."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def blocks(self, dtype: torch.dtype, num_bytes: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """The weight in ``dtype``, as many rows at a time as take ``num_bytes``, one at the least."""
        vocab_size, hidden_size = self.weight.shape
        size = min(vocab_size, max(1, num_bytes // (hidden_size * dtype.itemsize)))
        # one for all: a new one would come beside the last
        cast = self.weight.new_empty(size, hidden_size, dtype=dtype)
        for start in range(0, vocab_size, size):
            rows = slice(start, min(start + size, vocab_size))
            yield rows, cast[: rows.stop - start].copy_(self.weight[rows])


@functools.cache
def _has_float32_output(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GEMM of half-precision matrices can write float32."""
    if device.type != "cuda":
        return False
    matrix = torch.zeros(16, 16, device=device, dtype=dtype)
    try:
        torch.mm(matrix, matrix, out_dtype=torch.float32)
    except torch.OutOfMemoryError:
        raise  # says nothing about the device
    except (RuntimeError, TypeError) as error:
        if "CUBLAS_STATUS_ALLOC_FAILED" in str(error) or "CUBLAS_STATUS_NOT_INITIALIZED" in str(error):
            raise  # as it does where memory is short
        return False
    return True


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return is_nvidia and torch.cuda.get_device_capability(device)[0] == 9


def _folds_in_registers(hidden_size: int, device: torch.device) -> bool:
    return hidden_size <= REGISTER_HIDDEN_SIZE and _is_hopper(device)


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
    """out (+)= a @ b, in the precision of ``out``."""
    if a.dtype != out.dtype and not _has_float32_output(a.device, a.dtype):
        a, b = a.to(out.dtype), b.to(out.dtype)
    wider = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, out=out, **wider)
    else:
        torch.mm(a, b, out=out, **wider)


@dataclass(frozen=True)
class ChunkSpec:
    """What a chunk is made for: an LM head [V, H], what its GEMMs read, where, what it keeps, within what memory."""

    vocab_size: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    backend: str
    keeps: Keeps
    transform: dict  # scale, softcap and factor of ``kernels.token_logprobs``
    by_hidden: bool  # which gradients are to be taken
    by_head: bool  # of its weight, its bias or both
    num_bytes: int
    lent_bytes: int = 0  # of memory lent until the weight's gradient is written there

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.dtype)

    @property
    def is_native(self) -> bool:
        """Whether a GEMM reads the dtype and writes what log-probabilities are computed in."""
        return self.dtype == self.compute_dtype or _has_float32_output(self.device, self.dtype)

    @property
    def grad_dtype(self) -> torch.dtype:
        """Of logits' gradients. Not float16: they are found before the loss is scaled, and would underflow."""
        is_narrow = self.kind is FoldedRows or (self.is_native and self.dtype != torch.float16)
        return self.dtype if is_narrow else self.compute_dtype

    @property
    def kind(self) -> type["WholeRows"] | type["FoldedRows"]:
        """The fastest one."""
        is_foldable = self.dtype == torch.bfloat16 and self.backend == "triton"
        # the interpreter of Triton's kernels runs on a CPU; estimates are made without memory
        is_stand_in = self.device.type in ("cpu", "meta")
        return FoldedRows if is_foldable and (self.is_native or is_stand_in) else WholeRows

    @property
    def cast_bytes(self) -> int:
        """Of the weight, at a time."""
        return min(CAST_BYTES, self.num_bytes // 4)

    @property
    def enough_tokens(self) -> int:
        """With more its GEMMs would be no faster."""
        if self.kind is WholeRows:
            is_cpu = self.device.type == "cpu"
            return max(CPU_TOKENS, CPU_LOGITS // self.vocab_size) if is_cpu else MOST_TOKENS
        writes_weight_gradient = self.keeps == "all" or (self.keeps == "panels" and self.by_head)
        return MOST_TOKENS if writes_weight_gradient else PANEL_TOKENS

    def capacity(self) -> int:
        """How many tokens fit into ``num_bytes``, at least one; unless it keeps all logits, no more than enough."""
        limit = min(MOST_TOKENS if self.keeps == "all" else self.enough_tokens, self.num_bytes // self.hidden_size)
        return max(1, bisect.bisect_right(range(1, limit + 1), self.num_bytes, key=self.size))

    def goes_through_registers(self, weight: torch.Tensor) -> bool:
        """Whether a chunk of ``FoldedRows`` folds logits of this LM head in the registers of their GEMM."""
        from ..kernels import register_tiles

        # of policy and reference the wider: a chunk planned for tiles in memory has no room for registers' results
        is_narrow = _folds_in_registers(max(self.hidden_size, weight.shape[1]), self.device)
        return is_narrow and self.transform["softcap"] is None and register_tiles.serves(weight)

    def size(self, num_tokens: int) -> int:
        """Bytes that a chunk of so many tokens takes, what passes through their GEMMs counted in."""
        return self.kind.size(num_tokens, self)

    @functools.cached_property
    def block(self) -> int:
        """Columns of one step of the kernels of ``FoldedRows``."""
        from ..kernels import memory_tiles

        return memory_tiles.block_columns(self.vocab_size)


class WholeRows:
    """Buffers for the logits of up to ``num_tokens`` tokens, and for their gradient.

    Logits are in float32 (float64 for float64). Their gradient overwrites them, or where its GEMMs read bfloat16 stands
    beside them.
    """

    def __init__(self, num_tokens: int, spec: ChunkSpec):
        self.num_tokens, self.spec = num_tokens, spec
        self.logits = torch.empty(num_tokens, spec.vocab_size, dtype=spec.compute_dtype, device=spec.device)
        self.grads = self.logits
        if spec.keeps != "nothing" and spec.grad_dtype != spec.compute_dtype:
            self.grads = torch.empty_like(self.logits, dtype=spec.grad_dtype)

    @staticmethod
    def size(num_tokens: int, spec: ChunkSpec) -> int:
        """As ``ChunkSpec.size``."""
        wide, grad = spec.compute_dtype.itemsize, spec.grad_dtype.itemsize
        is_kept, hidden = spec.keeps != "nothing", num_tokens * spec.hidden_size
        logits = num_tokens * spec.vocab_size
        buffers = logits * (wide + grad if is_kept and grad != wide else wide)
        # beside them, what passes through the GEMMs, or what the row operations need
        passing = 0
        if not spec.is_native or (is_kept and spec.grad_dtype != spec.dtype):  # hidden states, a block of the weight
            passing = hidden * wide + min(spec.cast_bytes, spec.vocab_size * spec.hidden_size * wide)
        elif is_kept:  # the gradient by the hidden states
            passing = hidden * grad
        elif spec.backend == "torch":  # hidden states as they are gathered
            passing = hidden * spec.dtype.itemsize
        scratch = 2 * min(cpu.BLOCK_BYTES, logits * wide) if spec.backend == "torch" else 0
        return buffers + hidden * spec.dtype.itemsize + max(passing, scratch)

    def forward(self, hidden: torch.Tensor, lm_head: LMHead, targets: torch.Tensor, keep: bool) -> torch.Tensor:
        """(logps, entropy, mean_logits, is_top1) [4, n] of hidden [n, H] and targets [n] int32; ``keep`` what backward
        needs, as these rows always do. ``statistics`` is for a second visit.
        """
        logits = self._logits(hidden, lm_head)
        options = {"ignore_index": MASKED, "shift": False, **self.spec.transform}
        if self.spec.backend == "torch":
            outputs = cpu.token_logprobs(logits, targets, None, **options)
        else:
            from ..kernels import token_logprobs

            outputs = row_outputs(logits)
            with on_device(logits):
                token_logprobs.forward(
                    logits, targets, None, outputs, multiprocessors=multiprocessors(logits.device), **options
                )
        self.targets, row_max, log_sum, per_token = outputs
        self.statistics = row_max, log_sum, per_token[0]
        return per_token

    def again(
        self,
        hidden: torch.Tensor,
        lm_head: LMHead,
        targets: torch.Tensor,
        statistics: torch.Tensor,
        token_grads: torch.Tensor,
    ) -> Iterator[slice]:
        """``forward`` and ``backward`` once more, with the first visit's ``statistics`` [NUM_STATISTICS, n]: for some
        columns at a time, which it yields for the head's gradient.
        """
        self._logits(hidden, lm_head)
        self.targets = targets
        # copies: where a row of them starts would be one more thing that kernels are compiled for
        self.statistics = tuple(row.clone() for row in statistics)
        self.backward(token_grads)
        yield slice(0, self.spec.vocab_size)

    def _logits(self, hidden: torch.Tensor, lm_head: LMHead) -> torch.Tensor:
        logits = self.logits[: len(hidden)]
        if self.spec.is_native:
            _multiply(hidden, lm_head.weight.T, logits)
        else:
            hidden = hidden.to(logits.dtype)
            for rows, weight in lm_head.blocks(logits.dtype, self.spec.cast_bytes):
                torch.mm(hidden, weight.T, out=logits[:, rows])
        if lm_head.bias is not None:
            logits.add_(lm_head.bias)
        return logits

    def backward(self, token_grads: torch.Tensor) -> None:
        """Turn the chunk's logits into d loss / d logits, from d loss / d logps [n]."""
        row_max, log_sum, _ = self.statistics
        logits, self.current = self.logits[: len(token_grads)], self.grads[: len(token_grads)]
        arguments = logits, self.current, self.targets, token_grads, row_max, log_sum
        if self.spec.backend == "torch":
            cpu.token_logprobs_backward(*arguments, **self.spec.transform)
        else:
            from ..kernels import token_logprobs

            with on_device(logits):
                token_logprobs.backward(*arguments, **self.spec.transform)

    def hidden_gradient(self, lm_head: LMHead) -> tuple[torch.Tensor, None]:
        """d loss / d hidden [n, H], and what its rows are yet to be multiplied with: nothing."""
        grads = self.current
        if grads.dtype == lm_head.weight.dtype:
            return torch.mm(grads, lm_head.weight), None
        total = grads.new_zeros(len(grads), lm_head.weight.shape[1])
        for rows, weight in lm_head.blocks(grads.dtype, self.spec.cast_bytes):
            torch.addmm(total, grads[:, rows], weight, out=total)
        return total, None

    def add_weight_gradient(self, total: torch.Tensor, hidden: torch.Tensor, *, add: bool) -> None:
        """total (+)= d loss / d weight [columns, H] of the last visit's columns."""
        _multiply(self.current.T, hidden.to(self.current.dtype), total, add=add)

    def add_bias_gradient(self, total: torch.Tensor) -> None:
        """total += d loss / d bias [columns]."""
        total.add_(self.current.sum(0, dtype=total.dtype))


class FoldedRows:
    """Buffers for a tile of logits in float32, and for what is kept of some or all: P of ``kernels.memory_tiles``.

    d loss / d logits = diag(row_scale) P with row_scale = -k (d loss / d logps) / s, k as in that module. The gradient
    GEMMs read P as it is: row_scale goes to their other operand or their result.
    """

    def __init__(self, num_tokens: int, spec: ChunkSpec, lent: torch.Tensor | None = None):
        """``lent`` is the weight's gradient, whose memory serves the buffer until this chunk's last GEMM writes it."""
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
        """A tile of logits, unless registers hold them; where all are kept, also the gradient by the hidden states,
        once the last tile was folded.
        """
        cols = self.spec.hidden_size if self.in_registers else _buffer_cols(self.tile_cols, self.spec)
        size = self.num_tokens, cols
        if self.lent is None:
            return torch.empty(size, dtype=torch.float32, device=self.spec.device)
        memory = self.lent.view(-1).view(torch.uint8)[: 4 * math.prod(size)]
        return memory.view(torch.float32).view(size)

    @staticmethod
    def size(num_tokens: int, spec: ChunkSpec) -> int:
        """As ``ChunkSpec.size``."""
        from ..kernels import register_tiles

        tile_cols, kept_cols = _column_counts(num_tokens, spec)
        buffer = 4 * num_tokens * _buffer_cols(tile_cols, spec)
        if buffer <= spec.lent_bytes:
            buffer = 0
        is_second_visit = spec.keeps == "panels" and spec.by_head
        if _folds_in_registers(spec.hidden_size, spec.device) and not is_second_visit:  # never both at once
            # a reference keeps nothing
            partial = max(
                register_tiles.partial_bytes(spec.vocab_size, is_kept=False),
                register_tiles.partial_bytes(kept_cols, is_kept=True),
            )
            buffer = max(buffer, num_tokens * partial)
        return buffer + num_tokens * (2 * kept_cols + _passing_bytes(spec))

    def panels(self) -> list[slice]:
        """The columns kept at a time."""
        vocab_size, width = self.spec.vocab_size, self.kept_cols or self.spec.vocab_size
        return [slice(first, min(first + width, vocab_size)) for first in range(0, vocab_size, width)]

    def forward(self, hidden: torch.Tensor, lm_head: LMHead, targets: torch.Tensor, keep: bool) -> torch.Tensor:
        """As ``WholeRows.forward``, but that P is kept with ``keep`` alone."""
        from ..kernels import memory_tiles, register_tiles

        self._begin(lm_head, targets)
        new_empty = functools.partial(torch.empty, dtype=torch.float32, device=hidden.device)
        state = new_empty(6, len(hidden))
        outputs = new_empty(4, len(hidden))
        with on_device(hidden):
            if self.in_registers:
                register_tiles.start(hidden, *lm_head, targets, state)
            if keep:
                self._fold_and_keep(hidden, lm_head, state)
            else:
                self._fold(hidden, lm_head, state, slice(0, self.spec.vocab_size))
            memory_tiles.finish(
                targets, state, outputs, vocab_size=self.spec.vocab_size, factor=self.spec.transform["factor"]
            )
        self.statistics = state[:NUM_STATISTICS]
        return outputs

    def _begin(self, lm_head: LMHead, targets: torch.Tensor) -> None:
        """Choose the kernels of a visit."""
        from ..kernels import register_tiles

        self.targets = targets
        self.in_registers = self.spec.goes_through_registers(lm_head.weight)
        # a tile's columns, and of one step of the kernels that meet it in memory
        self.width, self.block = self.tile_cols, self.spec.block
        if self.in_registers:
            self.__dict__.pop("buffer", None)  # of an earlier visit: its memory is for the registers' results
            self.width, self.block = register_tiles.COLUMNS, min(self.block, register_tiles.COLUMNS)

    def _split(self, panel: slice) -> tuple[slice, slice]:
        """Which of a panel's columns registers serve, and which memory."""
        middle = panel.stop - (panel.stop - panel.start) % self.width if self.in_registers else panel.start
        return slice(panel.start, middle), slice(middle, panel.stop)

    def _fold(self, hidden, lm_head, state, panel, references=None) -> None:
        """Fold a panel of columns into ``state``; where there are ``references``, [n, tiles], keep its P too."""
        from ..kernels import memory_tiles, register_tiles

        def kept(columns: slice) -> memory_tiles.Kept | None:
            if references is None:
                return None
            tile_index = (columns.start - panel.start) // self.width
            return memory_tiles.Kept(self._kept_columns(hidden, columns, panel), references, tile_index)

        whole, rest = self._split(panel)
        if whole.start < whole.stop:
            register_tiles.fold(
                hidden, *lm_head, self.targets, state, whole, kept(whole), factor=self.spec.transform["factor"]
            )
        for tile, columns in self._tiles(hidden, lm_head, rest):
            memory_tiles.fold(
                tile, lm_head.bias, self.targets, state, columns, kept(columns), block=self.block, **self.spec.transform
            )

    def _fold_and_keep(self, hidden, lm_head, state) -> None:
        from ..kernels import memory_tiles

        is_summed, capping = self.spec.keeps == "panels", _without_scale(self.spec.transform)
        references = state.new_empty(len(hidden), -(-self.kept_cols // self.width))
        sums = None
        if is_summed:
            sums = memory_tiles.PanelSums(self.product[: len(hidden)], torch.empty_like(state[0]))
        for panel in self.panels():
            self._fold(hidden, lm_head, state, panel, references)
            self.current = self._kept_panel(hidden, panel)
            memory_tiles.settle(
                self.current,
                self.targets,
                state,
                references,
                sums,
                panel,
                tile_cols=self.width,
                block=self.block,
                vocab_size=self.spec.vocab_size,
                **capping,
            )
            if is_summed:
                self._add_product(lm_head, panel)
        if is_summed:
            memory_tiles.add_target_rows(sums.product, lm_head.weight, self.targets, state, **capping)

    def _kept_columns(self, hidden: torch.Tensor, columns: slice, panel: slice) -> torch.Tensor:
        """Where P of a panel's ``columns`` goes, to the end of the buffer."""
        return self.kept[: len(hidden), columns.start - panel.start :]

    def _kept_panel(self, hidden: torch.Tensor, panel: slice) -> torch.Tensor:
        """All P of a panel."""
        return self.kept[: len(hidden), : panel.stop - panel.start]

    def again(
        self,
        hidden: torch.Tensor,
        lm_head: LMHead,
        targets: torch.Tensor,
        statistics: torch.Tensor,
        token_grads: torch.Tensor,
    ) -> Iterator[slice]:
        """As ``WholeRows.again``; what is kept is the gradient itself."""
        from ..kernels import memory_tiles, register_tiles

        self._begin(lm_head, targets)
        self.statistics, transform = statistics, self.spec.transform
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
        _multiply(self.current, lm_head.weight[panel], self.product[: len(self.current)], add=panel.start > 0)

    def _tiles(self, hidden: torch.Tensor, lm_head: LMHead, panel: slice) -> Iterator[tuple[torch.Tensor, slice]]:
        """Tiles of logits [n, width], each in the same memory, and their columns."""
        num_tokens, width = len(hidden), self.width
        if panel.start == panel.stop:
            return
        if self.in_registers:  # a few columns
            tile = torch.empty(num_tokens, width, dtype=torch.float32, device=hidden.device)
        else:
            tile = self.buffer.view(-1)[: num_tokens * width].view(num_tokens, width)
        for first in range(panel.start, panel.stop, width):
            columns = slice(first, min(first + width, panel.stop))
            _multiply(hidden, lm_head.weight[columns].T, tile[:, : columns.stop - first])
            yield tile, columns

    def backward(self, token_grads: torch.Tensor) -> None:
        """Find the rows' factors from d loss / d logps [n]."""
        factor = self.spec.transform["factor"]
        if self.spec.transform["softcap"] is not None:
            factor *= self.spec.transform["scale"]
        row_scale = token_grads * -factor / self.statistics[1]
        self.row_scale = torch.where(self.targets == INVALID, torch.nan, row_scale)

    def hidden_gradient(self, lm_head: LMHead) -> tuple[torch.Tensor, torch.Tensor | None]:
        """d loss / d hidden [n, H], and what its rows are yet to be multiplied with [n], if anything."""
        size = len(self.current), lm_head.weight.shape[1]
        if self.spec.keeps == "panels":
            return self.product[: size[0]], self.row_scale
        product = self.buffer.view(-1)[: size[0] * size[1]].view(size)
        _multiply(self.current, lm_head.weight, product)
        return product, self.row_scale

    def add_weight_gradient(self, total: torch.Tensor, hidden: torch.Tensor, *, add: bool) -> None:
        """As ``WholeRows.add_weight_gradient``; ``hidden`` is scaled in place, unless what is kept was."""
        if self.row_scale is not None:
            move_rows(hidden, hidden, "triton", factors=self.row_scale)
        _multiply(self.current.T, hidden, total, add=add)

    def add_bias_gradient(self, total: torch.Tensor) -> None:
        """As ``WholeRows.add_bias_gradient``."""
        num_tokens, num_cols = self.current.shape
        row_scale = self.row_scale
        if row_scale is None:
            row_scale = torch.ones(num_tokens, dtype=torch.float32, device=self.current.device)
        high = row_scale.to(self.current.dtype)
        low = (row_scale - high).to(self.current.dtype)  # the bits that one half-precision column cannot hold
        sums = row_scale.new_empty(num_cols, 2)
        _multiply(self.current.T, torch.stack([high, low], dim=1), sums)
        total.add_(sums.sum(1))


def move_rows(
    source: torch.Tensor,
    target: torch.Tensor,
    backend: str,
    *,
    source_rows: torch.Tensor | None = None,
    target_rows: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
) -> None:
    """target[target_rows] = source[source_rows] * factors[:, None], rounded once.

    ``source`` is [rows, columns] or [B, T, columns], ``target`` [rows, columns]; rows not named are taken in order.
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
        source = source * factors[:, None]
    if target_rows is None:
        target.copy_(source)
    else:
        target.index_copy_(0, target_rows, source.to(target.dtype))


def _without_scale(transform: dict) -> dict:
    """For kernels that meet no logit itself."""
    return {name: value for name, value in transform.items() if name != "scale"}


def _passing_bytes(spec: ChunkSpec) -> int:
    """Of a token in ``FoldedRows``, beside logits: its hidden state, and the gradient by it that panels add up to."""
    return spec.hidden_size * (6 if spec.keeps == "panels" and spec.by_hidden else 2)


def _buffer_cols(tile_cols: int, spec: ChunkSpec) -> int:
    """Of ``FoldedRows.buffer``."""
    return max(tile_cols, spec.hidden_size) if spec.keeps == "all" else tile_cols


def _column_counts(num_tokens: int, spec: ChunkSpec) -> tuple[int, int]:
    """(of one tile, of those kept) of ``FoldedRows`` for so many tokens."""
    num_tokens, block = max(num_tokens, 1), spec.block
    whole = -(-spec.vocab_size // block) * block

    def columns(num_logits: int) -> int:
        return min(whole, max(block, num_logits // num_tokens // block * block))

    tile_cols = columns(min(TILE_LOGITS, spec.num_bytes // 16))  # a quarter of the bytes at most
    if spec.keeps == "nothing":
        return tile_cols, 0
    if spec.keeps == "all":
        return tile_cols, whole
    left = spec.num_bytes - num_tokens * (4 * tile_cols + _passing_bytes(spec))
    kept_cols = columns(min(WEIGHT_PANEL_LOGITS if spec.by_head else PANEL_LOGITS, left // 2))
    tile_cols = min(tile_cols, kept_cols)
    if kept_cols < whole:  # in whole tiles
        kept_cols = kept_cols // tile_cols * tile_cols
    return tile_cols, kept_cols
