"""One chunk of completion tokens through the LM head: hidden states to logits, and their gradient back. No loss here.

``Chunk.forward`` is one GEMM and the row statistics; ``Chunk.backward`` turns the logits into their own gradient and is
one GEMM for the hidden states and one for the weight.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import torch_backend
from .backends import multiprocessors, on_device
from .layout import MASKED, compute_dtype

# Bytes of LM-head weight cast at once, where no GEMM reads half precision and writes float32.
CAST_BYTES = 2**24


@dataclass(frozen=True)
class LMHead:
    """logits = hidden @ weight.T + bias, with weight [V, H] in the GEMMs' dtype and bias [V] in the logits'."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """The weight in ``dtype``, some rows at a time."""
        size = max(1, CAST_BYTES // (self.weight.shape[1] * dtype.itemsize))
        for start in range(0, self.weight.shape[0], size):
            rows = slice(start, start + size)
            yield rows, self.weight[rows].to(dtype)


@functools.cache
def _has_float32_output(device_type: str, dtype: torch.dtype) -> bool:
    """Whether a GEMM of half-precision matrices can write float32."""
    if device_type != "cuda":
        return False
    try:
        matrix = torch.zeros(16, 16, device=device_type, dtype=dtype)
        torch.mm(matrix, matrix, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


class Chunk:
    """Buffers for the logits of up to ``num_tokens`` tokens, and for their gradient.

    Logits are in float32 (float64 for float64). Their gradient overwrites them, or where the GEMMs read half precision
    stands beside them.
    """

    def __init__(self, num_tokens: int, vocab_size: int, dtype: torch.dtype, device: torch.device, backend: str):
        self.dtype, self.backend = dtype, backend
        self.is_native = gemm_is_native(dtype, device)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        self.logits = torch.empty(num_tokens, vocab_size, dtype=compute, device=device)
        self.grads = self.logits
        if self.is_native and compute != dtype:
            self.grads = torch.empty(num_tokens, vocab_size, dtype=dtype, device=device)

    @staticmethod
    def num_tokens(
        chunk_bytes: int, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device, backend: str
    ) -> int:
        """How many tokens fit a budget, what passes through their GEMMs counted in; at least one."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        is_native = gemm_is_native(dtype, device)
        grad_size = dtype.itemsize if is_native and compute != dtype else 0
        per_token = vocab_size * (compute.itemsize + grad_size) + hidden_size * 2 * (dtype.itemsize + compute.itemsize)
        fixed = (0 if is_native else CAST_BYTES) + (3 * torch_backend.BLOCK_BYTES if backend == "torch" else 0)
        return max(1, (chunk_bytes - fixed) // per_token)

    def forward(
        self, hidden: torch.Tensor, lm_head: LMHead, targets: torch.Tensor, transform: dict
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(logps, entropy, mean_logits), each [n], of hidden [n, H] and targets [n]."""
        logits = self.logits[: len(hidden)]
        if self.is_native and hidden.dtype == logits.dtype:
            torch.mm(hidden, lm_head.weight.T, out=logits)
        elif self.is_native:
            torch.mm(hidden, lm_head.weight.T, out_dtype=logits.dtype, out=logits)
        else:
            hidden = hidden.to(logits.dtype)
            for rows, weight in lm_head.blocks(logits.dtype):
                torch.mm(hidden, weight.T, out=logits[:, rows])
        if lm_head.bias is not None:
            logits.add_(lm_head.bias)
        options = {"ignore_index": MASKED, "shift": False, **transform}
        if self.backend == "torch":
            outputs = torch_backend.token_logprobs(logits, targets, None, **options)
        else:
            from .kernels import token_logprobs

            outputs = tuple(
                targets.new_empty(len(targets), dtype=dtype) for dtype in [torch.int32] + 5 * [logits.dtype]
            )
            with on_device(logits):
                token_logprobs.forward(
                    logits, targets, None, outputs, multiprocessors=multiprocessors(logits.device), **options
                )
        self.targets, logps, self.row_max, self.log_sum, entropy, mean_logits = outputs
        self.transform = transform
        return logps, entropy, mean_logits

    def backward(self, token_grads: torch.Tensor) -> None:
        """Turn the chunk's logits into d loss / d logits, from d loss / d logps [n]."""
        logits, grads = self.logits[: len(token_grads)], self.grads[: len(token_grads)]
        arguments = logits, grads, self.targets, token_grads, self.row_max, self.log_sum
        if self.backend == "torch":
            torch_backend.token_logprobs_backward(*arguments, **self.transform)
        else:
            from .kernels import token_logprobs

            with on_device(logits):
                token_logprobs.backward(*arguments, **self.transform)
        self.current = grads

    def hidden_gradient(self, lm_head: LMHead) -> torch.Tensor:
        """d loss / d hidden [n, H] after ``backward``."""
        grads = self.current
        if grads.dtype == lm_head.weight.dtype:
            return torch.mm(grads, lm_head.weight)
        total = grads.new_zeros(len(grads), lm_head.weight.shape[1])
        for rows, weight in lm_head.blocks(grads.dtype):
            total.addmm_(grads[:, rows], weight)
        return total

    def add_weight_gradient(self, total: torch.Tensor, hidden: torch.Tensor, is_first: bool) -> None:
        """Add d loss / d weight to ``total`` [V, H], or set it."""
        grads = self.current
        hidden = hidden.to(grads.dtype)
        out = {} if grads.dtype == total.dtype else {"out_dtype": total.dtype}
        if is_first:
            torch.mm(grads.T, hidden, out=total, **out)
        else:
            torch.addmm(total, grads.T, hidden, out=total, **out)

    def add_bias_gradient(self, total: torch.Tensor) -> None:
        """Add d loss / d bias to ``total`` [V]."""
        total.add_(self.current.sum(0, dtype=total.dtype))


def gemm_is_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a GEMM reads ``dtype`` and writes what log-probabilities are computed in."""
    return dtype.itemsize >= 4 or _has_float32_output(device.type, dtype)
