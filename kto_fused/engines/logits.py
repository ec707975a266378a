"""autograd.Functions: logits in. The engine turns logits into log-probabilities and d loss / d log-probability back
into d loss / d logits; it knows no loss.

Forward:   logits --row kernel--> token log-probabilities --sequence kernel--> [B] --loss head--> loss and its gradient
Backward:  incoming x head's gradient --sequence kernel--> token gradients --row kernel--> d logits
"""

import math
from typing import Any, Optional

import torch

from . import cpu
from .backends import multiprocessors, on_device, opaque
from .first_derivative import first_derivative_only
from .layout import check_contents, compute_dtype
from .options import LogitOptions

# ---- operators ----------------------------------------------------------------------------------------------------


def row_outputs(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    """What the row kernel fills: targets, row_max and log_sum, each [rows], and per_token [4, rows]."""
    rows = math.prod(logits.shape[:-1])  # Size.numel() would fix a symbolic length
    row_max, log_sum = (logits.new_empty(rows, dtype=compute_dtype(logits)) for _ in range(2))
    return logits.new_empty(rows, dtype=torch.int32), row_max, log_sum, row_max.new_empty(4, rows)


@opaque(fake=row_outputs)
def _token_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: Optional[torch.Tensor],
    ignore_index: int,
    shift: bool,
    scale: float,
    softcap: Optional[float],
    factor: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(targets, row_max, log_sum), each [rows], and per_token = (logps, entropy, mean_logits, is_top1) [4, rows]."""
    check_contents(labels, cu_seqlens, ignore_index=ignore_index, shift=shift, vocab_size=logits.shape[-1])
    options = {
        "ignore_index": ignore_index,
        "shift": shift,
        "scale": scale,
        "softcap": softcap,
        "factor": factor,
    }
    if backend == "torch":
        return cpu.token_logprobs(logits, labels, cu_seqlens, **options)
    from ..kernels import token_logprobs

    outputs = row_outputs(logits)
    with on_device(logits):
        token_logprobs.forward(
            logits, labels, cu_seqlens, outputs, multiprocessors=multiprocessors(logits.device), **options
        )
    return outputs


@opaque(fake=lambda logits, grad, *_: None, mutates_args=("grad",))
def _token_logprobs_backward(
    logits: torch.Tensor,
    grad: torch.Tensor,
    targets: torch.Tensor,
    token_grads: torch.Tensor,
    row_max: torch.Tensor,
    log_sum: torch.Tensor,
    scale: float,
    softcap: Optional[float],
    factor: float,
    backend: str,
) -> None:
    options = {"scale": scale, "softcap": softcap, "factor": factor}
    if backend == "torch":
        cpu.token_logprobs_backward(logits, grad, targets, token_grads, row_max, log_sum, **options)
        return
    from ..kernels import token_logprobs

    with on_device(logits):
        token_logprobs.backward(logits, grad, targets, token_grads, row_max, log_sum, **options)


@opaque(fake=lambda logits, *_: None, mutates_args=("logits",))
def _token_logprobs_backward_inplace(
    logits: torch.Tensor,
    targets: torch.Tensor,
    token_grads: torch.Tensor,
    row_max: torch.Tensor,
    log_sum: torch.Tensor,
    scale: float,
    softcap: Optional[float],
    factor: float,
    backend: str,
) -> None:
    _token_logprobs_backward(logits, logits, targets, token_grads, row_max, log_sum, scale, softcap, factor, backend)


def _sequence_outputs(
    targets: torch.Tensor,
    per_token: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    num_sequences: int,
    *_: Any,
) -> tuple[torch.Tensor, ...]:
    return (
        per_token.new_empty(num_sequences, dtype=torch.float64),
        per_token.new_empty(num_sequences, dtype=torch.int64),
        *(per_token.new_empty(num_sequences) for _ in range(3)),
    )


@opaque(fake=_sequence_outputs)
def sequence_sums(
    targets: torch.Tensor,
    per_token: torch.Tensor,
    cu_seqlens: Optional[torch.Tensor],
    num_sequences: int,
    average: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-probabilities, token counts, mean entropy, mean logit, token accuracy) of each sequence, each [B]."""
    if backend == "torch":
        return cpu.sequence_sums(targets, per_token, cu_seqlens, num_sequences=num_sequences, average=average)
    from ..kernels import sequence

    outputs = _sequence_outputs(targets, per_token, cu_seqlens, num_sequences)
    seq_len = targets.numel() // num_sequences
    with on_device(targets):
        sequence.forward(targets, per_token, cu_seqlens, outputs, seq_len=seq_len, average=average)
    return outputs


def _token_grads(targets: torch.Tensor, *arguments: Any) -> torch.Tensor:
    *_, dtype, _ = arguments
    return targets.new_empty(targets.shape, dtype=dtype)


@opaque(fake=_token_grads)
def sequence_backward(
    targets: torch.Tensor,
    token_counts: torch.Tensor,
    head_grads: Optional[torch.Tensor],
    incoming: torch.Tensor,
    cu_seqlens: Optional[torch.Tensor],
    average: bool,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    """d loss / d token log-probability [rows], in the dtype that the row kernel computes in."""
    if backend == "torch":
        return cpu.sequence_backward(
            targets, token_counts, head_grads, incoming, cu_seqlens, average=average, dtype=dtype
        )
    from ..kernels import sequence

    token_grads = targets.new_empty(targets.shape, dtype=dtype)
    with on_device(targets):
        sequence.backward(
            targets,
            token_counts,
            head_grads,
            incoming.contiguous(),
            cu_seqlens,
            token_grads,
            seq_len=targets.numel() // token_counts.numel(),
            average=average,
        )
    return token_grads


# ---- engine -------------------------------------------------------------------------------------------------------


def _engine_forward(
    logits: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor | None, options: LogitOptions
) -> tuple[torch.Tensor, ...]:
    return _token_logprobs(
        logits,
        labels,
        cu_seqlens,
        options.ignore_index,
        options.shift,
        options.logit_scale,
        options.logit_softcap,
        options.factor,
        options.backend,
    )


def _engine_backward(
    ctx: Any,
    logits: torch.Tensor,
    targets: torch.Tensor,
    token_grads: torch.Tensor,
    row_max: torch.Tensor,
    log_sum: torch.Tensor,
) -> torch.Tensor:
    options: LogitOptions = ctx.options
    transform = options.logit_scale, options.logit_softcap, options.factor, options.backend
    if not ctx.is_inplace:
        grad = logits.new_empty(logits.shape)
        _token_logprobs_backward(logits, grad, targets, token_grads, row_max, log_sum, *transform)
        return grad
    grad = logits.detach()  # the same storage and version counter, without the graph
    _token_logprobs_backward_inplace(grad, targets, token_grads, row_max, log_sum, *transform)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(grad)  # whoever saved these logits must not read gradients
    return grad


def _sequences_backward(ctx: Any, incoming: torch.Tensor) -> torch.Tensor:
    logits, targets, row_max, log_sum, token_counts, head_grads, cu_seqlens = ctx.saved_tensors
    average, backend = ctx.options.average_log_prob, ctx.options.backend
    token_grads = sequence_backward(
        targets, token_counts, head_grads, incoming, cu_seqlens, average, row_max.dtype, backend
    )
    return _engine_backward(ctx, logits, targets, token_grads, row_max, log_sum)


def _save(ctx: Any, options: LogitOptions, *tensors: torch.Tensor | None) -> None:
    """Save for the backward. What saved-tensor hooks (of checkpoints, of ``save_on_cpu``) give back for the logits may
    be held by others too, whom a bumped version would not reach: then the gradient is not written in place.
    """
    ctx.save_for_backward(*tensors)
    ctx.options = options
    ctx.is_inplace = options.inplace_backward and (torch.compiler.is_compiling() or not _has_saved_tensors_hooks())


def _has_saved_tensors_hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class TokenLogps(torch.autograd.Function):
    """[rows] token log-probabilities, 0 where masked."""

    @staticmethod
    def forward(ctx, logits, labels, cu_seqlens, options):
        targets, row_max, log_sum, per_token = _engine_forward(logits, labels, cu_seqlens, options)
        _save(ctx, options, logits, targets, row_max, log_sum)
        return per_token[0].clone()

    @staticmethod
    @first_derivative_only
    def backward(ctx, incoming):
        logits, targets, row_max, log_sum = ctx.saved_tensors
        grad = _engine_backward(ctx, logits, targets, incoming.contiguous(), row_max, log_sum)
        return grad, None, None, None


class SequenceLogps(torch.autograd.Function):
    """[B] sequence log-probabilities in fp64."""

    @staticmethod
    def forward(ctx, logits, labels, cu_seqlens, num_sequences, options):
        targets, row_max, log_sum, per_token = _engine_forward(logits, labels, cu_seqlens, options)
        average, backend = options.average_log_prob, options.backend
        logps, token_counts, *_ = sequence_sums(targets, per_token, cu_seqlens, num_sequences, average, backend)
        _save(ctx, options, logits, targets, row_max, log_sum, token_counts, None, cu_seqlens)
        return logps

    @staticmethod
    @first_derivative_only
    def backward(ctx, incoming):
        return _sequences_backward(ctx, incoming), None, None, None, None


class LossFromLogits(torch.autograd.Function):
    """``(loss, logps, token_counts, entropy, mean_logits, token_accuracy, *reported)``: the engine, then a loss head.

    The head gives its gradient by the [B] log-probabilities in the forward; backward only scales it.
    """

    @staticmethod
    def forward(ctx, *arguments):  # of named ones torch.compile may drop the first, where nothing needs a gradient
        logits, labels, cu_seqlens, num_sequences, options, head, *head_tensors = arguments
        targets, row_max, log_sum, per_token = _engine_forward(logits, labels, cu_seqlens, options)
        average, backend = options.average_log_prob, options.backend
        sequences = sequence_sums(targets, per_token, cu_seqlens, num_sequences, average, backend)
        logps, token_counts, *_ = sequences
        loss, head_grads, *reported = head(logps, token_counts, *head_tensors)
        _save(ctx, options, logits, targets, row_max, log_sum, token_counts, head_grads, cu_seqlens)
        ctx.num_arguments = len(arguments)
        ctx.set_materialize_grads(False)  # else autograd fills a zero gradient for each of the reported tensors
        ctx.mark_non_differentiable(*sequences, *reported)
        return loss, *sequences, *reported

    @staticmethod
    @first_derivative_only
    def backward(ctx, incoming, *_):
        return _sequences_backward(ctx, incoming), *(None for _ in range(ctx.num_arguments - 1))
