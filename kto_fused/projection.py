"""One chunk of completion tokens through the LM head: hidden states to log-probabilities, and gradients back. No loss
here.

``forward`` is one GEMM and the rows' statistics; once ``backward`` was given d loss / d logps, ``hidden_gradient`` and
``add_weight_gradient`` are one GEMM each. There are two kinds of chunk with these methods. ``WholeRows`` holds the
chunk's logits in float32 and turns them into their own gradient. ``FoldedRows``, for bfloat16 on a GPU, has a tile of
columns at a time in float32 and keeps softmax numerators in bfloat16: half the bytes a token, a pass over them less.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import torch_backend
from .backends import multiprocessors, on_device
from .layout import INVALID, MASKED, compute_dtype

# Bytes of LM-head weight cast at once, where no GEMM reads half precision and writes float32.
CAST_BYTES = 2**24
# Logits of one tile: enough for a GEMM that fills a GPU many times over, and outlasts its launch.
TILE_LOGITS = 3 * 2**23


@dataclass(frozen=True)
class LMHead:
    """logits = hidden @ weight.T + bias, with weight [V, H] in the GEMMs' dtype and bias [V] in the logits'."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """The weight in ``dtype``, some rows at a time."""
        vocab_size, hidden_size = self.weight.shape
        size = min(vocab_size, max(1, CAST_BYTES // (hidden_size * dtype.itemsize)))
        cast = self.weight.new_empty(
            size, hidden_size, dtype=dtype
        )  # one for all: a new one would come beside the last
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
    except (RuntimeError, TypeError):
        return False
    return True


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
    """What a chunk is made for: an LM head [V, H], what its GEMMs read, where, and whether a gradient is wanted."""

    vocab_size: int
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    backend: str
    keeps: bool
    tile_logits: int  # about how many a tile may hold

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
        return self.dtype if self.is_native and self.dtype != torch.float16 else self.compute_dtype

    @property
    def kind(self) -> type["WholeRows"] | type["FoldedRows"]:
        """The fastest one."""
        is_foldable = self.dtype == torch.bfloat16 and self.backend == "triton"
        # the interpreter of Triton's kernels runs on a CPU
        return FoldedRows if is_foldable and (self.is_native or self.device.type == "cpu") else WholeRows


class WholeRows:
    """Buffers for the logits of up to ``num_tokens`` tokens, and for their gradient.

    Logits are in float32 (float64 for float64). Their gradient overwrites them, or where its GEMMs read bfloat16 stands
    beside them.
    """

    def __init__(self, num_tokens: int, spec: ChunkSpec):
        self.num_tokens, self.spec = num_tokens, spec
        self.logits = torch.empty(num_tokens, spec.vocab_size, dtype=spec.compute_dtype, device=spec.device)
        self.grad_dtype = spec.grad_dtype
        self.grads = self.logits
        if spec.keeps and spec.grad_dtype != spec.compute_dtype:
            self.grads = torch.empty_like(self.logits, dtype=spec.grad_dtype)

    @staticmethod
    def capacity(num_bytes: int, spec: ChunkSpec) -> int:
        """How many tokens fit into so many bytes, what passes through their GEMMs counted in; at least one."""
        wide, narrow = spec.compute_dtype.itemsize, spec.dtype.itemsize
        beside = spec.grad_dtype.itemsize if spec.keeps and spec.grad_dtype != spec.compute_dtype else 0
        per_token = spec.vocab_size * (wide + beside) + spec.hidden_size * 2 * (wide + narrow)
        fixed = CAST_BYTES if spec.grad_dtype != spec.dtype else 0
        if spec.backend == "torch":
            fixed += 3 * torch_backend.BLOCK_BYTES
        return max(1, (num_bytes - fixed) // per_token)

    def forward(
        self, hidden: torch.Tensor, lm_head: LMHead, targets: torch.Tensor, transform: dict, keep: bool
    ) -> tuple[torch.Tensor, ...]:
        """(logps, entropy, mean_logits, is_top1), each [n], of hidden [n, H] and targets [n]; ``keep`` what backward
        needs.
        """
        logits = self.logits[: len(hidden)]
        if self.spec.is_native:
            _multiply(hidden, lm_head.weight.T, logits)
        else:
            hidden = hidden.to(logits.dtype)
            for rows, weight in lm_head.blocks(logits.dtype):
                torch.mm(hidden, weight.T, out=logits[:, rows])
        if lm_head.bias is not None:
            logits.add_(lm_head.bias)
        options = {"ignore_index": MASKED, "shift": False, **transform}
        if self.spec.backend == "torch":
            outputs = torch_backend.token_logprobs(logits, targets, None, **options)
        else:
            from .kernels import token_logprobs

            outputs = tuple(
                targets.new_empty(len(targets), dtype=dtype) for dtype in [torch.int32] + 6 * [logits.dtype]
            )
            with on_device(logits):
                token_logprobs.forward(
                    logits, targets, None, outputs, multiprocessors=multiprocessors(logits.device), **options
                )
        _, logps, _, _, *metrics = outputs
        if keep:
            self.rows, self.transform = outputs, transform
        return logps, *metrics

    def backward(self, token_grads: torch.Tensor) -> None:
        """Turn the chunk's logits into d loss / d logits, from d loss / d logps [n]."""
        targets, _, row_max, log_sum, *_ = self.rows
        logits, self.current = self.logits[: len(token_grads)], self.grads[: len(token_grads)]
        arguments = logits, self.current, targets, token_grads, row_max, log_sum
        if self.spec.backend == "torch":
            torch_backend.token_logprobs_backward(*arguments, **self.transform)
        else:
            from .kernels import token_logprobs

            with on_device(logits):
                token_logprobs.backward(*arguments, **self.transform)

    def hidden_gradient(self, lm_head: LMHead) -> tuple[torch.Tensor, None]:
        """d loss / d hidden [n, H], and what its rows are yet to be multiplied with: nothing."""
        grads = self.current
        if grads.dtype == lm_head.weight.dtype:
            return torch.mm(grads, lm_head.weight), None
        total = grads.new_zeros(len(grads), lm_head.weight.shape[1])
        for rows, weight in lm_head.blocks(grads.dtype):
            total.addmm_(grads[:, rows], weight)
        return total, None

    def add_weight_gradient(self, total: torch.Tensor, hidden: torch.Tensor, *, add: bool) -> None:
        """total (+)= d loss / d weight [V, H]."""
        _multiply(self.current.T, hidden.to(self.current.dtype), total, add=add)

    def add_bias_gradient(self, total: torch.Tensor) -> None:
        """total += d loss / d bias [V]."""
        total.add_(self.current.sum(0, dtype=total.dtype))


class FoldedRows:
    """Buffers for one tile of logits in float32, and for what is kept of them all: P of ``kernels.vocabulary_tiles``.

    d loss / d logits = diag(row_scale) P with row_scale = -c / s, which goes to the GEMMs' other operand or result.
    """

    grad_dtype = torch.bfloat16

    def __init__(self, num_tokens: int, spec: ChunkSpec):
        self.num_tokens, self.spec = num_tokens, spec
        self.block, self.tile_cols = _tile_columns(num_tokens, spec)
        self.num_tiles = -(-spec.vocab_size // self.tile_cols)
        # a tile of logits, and after the last the gradient by the hidden states
        width = max(self.tile_cols, spec.hidden_size if spec.keeps else 0)
        self.buffer = torch.empty(num_tokens, width, device=spec.device)
        if spec.keeps:
            kept_cols = -(-spec.vocab_size // self.block) * self.block
            self.kept = torch.empty(num_tokens, kept_cols, dtype=spec.dtype, device=spec.device)

    @staticmethod
    def capacity(num_bytes: int, spec: ChunkSpec) -> int:
        """As ``WholeRows.capacity``."""

        block, _ = _tile_columns(1, spec)
        cols = -(-spec.vocab_size // block) * block

        def size(num_tokens: int) -> int:
            # at most so many logits in a tile, whatever its columns are rounded to
            buffer = min(num_tokens * cols, max(num_tokens * block, spec.tile_logits))
            if not spec.keeps:
                return 4 * buffer + 2 * num_tokens * spec.hidden_size
            buffer = max(buffer, num_tokens * spec.hidden_size)
            return 4 * buffer + 2 * num_tokens * (cols + spec.hidden_size)

        fits, step = 1, 2**20
        while step:
            if size(fits + step) <= num_bytes:
                fits += step
            step //= 2
        return fits

    def forward(
        self, hidden: torch.Tensor, lm_head: LMHead, targets: torch.Tensor, transform: dict, keep: bool
    ) -> tuple[torch.Tensor, ...]:
        """As ``WholeRows.forward``."""
        from .kernels import vocabulary_tiles

        num_tokens = len(hidden)
        state = self.buffer.new_empty(6, num_tokens)
        kept = self.kept[:num_tokens] if keep else None
        references = self.buffer.new_empty(num_tokens, self.num_tiles) if keep else None
        options = {"block": self.block, "softcap": transform["softcap"], "factor": transform["factor"]}
        outputs = tuple(self.buffer.new_empty(num_tokens) for _ in range(4))
        tile = self.buffer.view(-1)[: num_tokens * self.tile_cols].view(num_tokens, self.tile_cols)
        with on_device(hidden):
            for index in range(self.num_tiles):
                first = index * self.tile_cols
                cols = min(self.tile_cols, self.spec.vocab_size - first)
                _multiply(hidden, lm_head.weight[first : first + cols].T, tile[:, :cols])
                vocabulary_tiles.fold(
                    tile,
                    lm_head.bias,
                    kept,
                    targets,
                    state,
                    references,
                    first=first,
                    cols=cols,
                    tile_index=index,
                    scale=transform["scale"],
                    **options,
                )
            vocabulary_tiles.finish(
                kept,
                targets,
                state,
                references,
                outputs,
                tile_cols=self.tile_cols,
                vocab_size=self.spec.vocab_size,
                **options,
            )
        if keep:
            self.row_sums, self.targets, self.transform = state[1], targets, transform
            self.current = kept[:, : self.spec.vocab_size]
        return outputs

    def backward(self, token_grads: torch.Tensor) -> None:
        """Find the rows' factors from d loss / d logps [n]."""
        factor = self.transform["factor"]
        if self.transform["softcap"] is not None:
            factor *= self.transform["scale"]
        row_scale = token_grads * -factor / self.row_sums
        self.row_scale = torch.where(self.targets == INVALID, torch.nan, row_scale)

    def hidden_gradient(self, lm_head: LMHead) -> tuple[torch.Tensor, torch.Tensor]:
        """d loss / d hidden [n, H], and what its rows are yet to be multiplied with [n]."""
        size = len(self.current), lm_head.weight.shape[1]
        product = self.buffer.view(-1)[: size[0] * size[1]].view(size)
        _multiply(self.current, lm_head.weight, product)
        return product, self.row_scale

    def add_weight_gradient(self, total: torch.Tensor, hidden: torch.Tensor, *, add: bool) -> None:
        """total (+)= d loss / d weight [V, H]; ``hidden`` is scaled in place."""
        move_rows(hidden, hidden, "triton", factors=self.row_scale)
        _multiply(self.current.T, hidden, total, add=add)

    def add_bias_gradient(self, total: torch.Tensor) -> None:
        """total += d loss / d bias [V]."""
        row_scale = self.row_scale[:, None]
        high = row_scale.to(self.current.dtype)
        low = (row_scale - high).to(self.current.dtype)  # the bits that one half-precision column cannot hold
        sums = self.row_scale.new_empty(self.spec.vocab_size, 2)
        _multiply(self.current.T, torch.cat([high, low], dim=1), sums)
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
        from .kernels import rows

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


def _tile_columns(num_tokens: int, spec: ChunkSpec) -> tuple[int, int]:
    """(columns of one step, columns of one tile)."""
    from .kernels.vocabulary_tiles import block_columns

    block = block_columns(spec.vocab_size)
    cols = max(block, spec.tile_logits // max(num_tokens, 1) // block * block)
    return block, min(cols, -(-spec.vocab_size // block) * block)
