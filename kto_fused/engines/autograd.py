"""``autograd.Function``'s from hidden states."""

import math

import torch

from ..heads import base as heads
from ..heads.preference import scale_grads
from .backends import HAS_TRITON, on_device
from .cpu import BLOCK_BYTES
from .first_derivative import first_derivative_only
from .layout import compute_dtype, row_targets
from .logits import sequence_backward
from .operators import flatten_options, linear_backward, linear_forward
from .options import HiddenOptions


def _keeps_graph() -> bool:
    """Whether the backward under way may be asked for again (``retain_graph=True``)."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def _scaled(gradients: list[torch.Tensor], incoming: torch.Tensor) -> list[torch.Tensor]:
    """Gradients times the loss's own gradient, a scalar on the device; in place where nobody can ask for them again.
    A 0 stays one, as in ``scale_grads``.
    """
    if torch.compiler.is_compiling():
        return [torch.where(grad == 0, grad, grad * incoming.to(compute_dtype(grad))) for grad in gradients]
    if _keeps_graph():
        gradients = [grad.clone() for grad in gradients]
    for grad in gradients:
        scale_(grad, incoming)
    return gradients


def _scale_rows(values: torch.Tensor, factors: torch.Tensor, chunk_bytes: int) -> None:
    """values [..., H] *= factors [..., 1]. A row that takes no part keeps a gradient of 0, even beside a NaN."""
    if values.device.type != "cpu" or values.dtype == factors.dtype or torch.compiler.is_compiling():
        values.mul_(factors)
    else:  # a CPU multiplies copies in the wider dtype, so a block of rows at a time
        hidden_size = values.shape[-1]
        size = max(1, min(BLOCK_BYTES, chunk_bytes // 4) // (hidden_size * factors.dtype.itemsize))
        blocks = values.view(-1, hidden_size).split(size), factors.view(-1, 1).split(size)
        for rows, factor in zip(*blocks, strict=True):
            rows.mul_(factor)
    values.masked_fill_(factors == 0, 0)


def scale_(values: torch.Tensor, factor: torch.Tensor) -> None:
    """values *= factor, a scalar tensor on their device, but a 0 stays one; where it is 1, none is visited."""
    if values.device.type == "cpu":
        number = factor.item()
        zeros = None if math.isfinite(number) else values == 0
        if number != 1:
            values.mul_(number)
        if zeros is not None:
            values.masked_fill_(zeros, 0)
    elif HAS_TRITON:
        from ..kernels import rows

        with on_device(values):
            rows.scale_(values, factor)
    else:
        zeros = values == 0
        values.mul_(factor.to(compute_dtype(values))).masked_fill_(zeros, 0)


def _save(ctx, hidden, weight, bias, labels, cu_seqlens, options, outputs, head_grads, is_total) -> None:
    """For one of the three ways to a gradient: found in the forward for the loss as a whole, found in the forward for
    each token's log-probability, or computed in the backward.
    """
    ctx.options, ctx.is_total = options, is_total
    ctx.dtypes = tuple(None if x is None else x.dtype for x in (hidden, weight, bias))
    ctx.is_direction = not is_total and not options.is_head_trained
    token_counts, gradients, statistics = outputs[1], outputs[6:9], outputs[9]
    if is_total:
        ctx.save_for_backward(*(grad for grad, needed in zip(gradients, options.needs, strict=True) if needed))
    elif ctx.is_direction:
        ctx.vocab_size = weight.shape[0]
        ctx.save_for_backward(gradients[0], labels, cu_seqlens, token_counts, head_grads)
    else:
        ctx.save_for_backward(hidden, weight, bias, labels, cu_seqlens, head_grads, statistics)


def _gradients(ctx, incoming) -> tuple[torch.Tensor | None, ...]:
    """By hidden, weight and bias."""
    options: HiddenOptions = ctx.options
    if ctx.is_total:
        scaled = iter(_scaled(list(ctx.saved_tensors), incoming))
        return tuple(
            next(scaled).to(dtype) if needed else None for needed, dtype in zip(options.needs, ctx.dtypes, strict=True)
        )
    logits = options.logits
    if ctx.is_direction:
        direction, labels, cu_seqlens, token_counts, head_grads = ctx.saved_tensors
        if options.per_position:
            row_grads = torch.where(token_counts > 0, incoming, 0.0)
        else:
            layout = {"ignore_index": logits.ignore_index, "shift": logits.shift, "vocab_size": ctx.vocab_size}
            row_grads = sequence_backward(
                row_targets(labels, cu_seqlens, **layout).flatten().int(),
                token_counts,
                head_grads,
                incoming,
                cu_seqlens,
                logits.average_log_prob,
                options.compute_dtype,
                logits.backend,
            )
        row_grads = row_grads.view(*direction.shape[:-1], 1)
        if torch.compiler.is_compiling() or _keeps_graph():
            direction = direction.clone()
        _scale_rows(direction, row_grads, options.chunk_bytes)
        return direction.to(ctx.dtypes[0]), None, None
    *inputs, head_grads, statistics = ctx.saved_tensors
    logp_grads = incoming if head_grads is None else scale_grads(head_grads, incoming)
    gradients = linear_backward(*inputs, logp_grads, statistics, *flatten_options(options))
    return tuple(
        grad.to(dtype) if needed else None
        for grad, needed, dtype in zip(gradients, options.needs, ctx.dtypes, strict=True)
    )


class LogpsFromHidden(torch.autograd.Function):
    """``(logps, token_counts, entropy, mean_logits, token_accuracy)``: [B] of the sequences, the log-probabilities in
    fp64; or [rows] of each position by itself.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, cu_seqlens, options):
        no_head = ("", "", "", torch.float32, [])
        no_reference = (None, None, None, None, [])
        outputs = linear_forward(
            hidden, weight, bias, labels, cu_seqlens, *no_reference, *flatten_options(options), *no_head
        )
        _save(ctx, hidden, weight, bias, labels, cu_seqlens, options, outputs, None, is_total=False)
        ctx.set_materialize_grads(False)  # else autograd fills a zero gradient for each of the others
        ctx.mark_non_differentiable(*outputs[1:5])
        return tuple(outputs[:5])

    @staticmethod
    @first_derivative_only
    def backward(ctx, incoming, *_):
        return *_gradients(ctx, incoming), None, None, None


class LossFromHidden(torch.autograd.Function):
    """``(loss, logps, token_counts, entropy, mean_logits, token_accuracy, ref_logps, *reported)``: the engine and a
    loss head together.

    ``ref_logps`` is what was computed from ``ref_hidden``, empty without it.
    """

    @staticmethod
    def forward(ctx, *arguments):  # of named ones torch.compile may drop the first, where nothing needs a gradient
        policy, reference, (options, head, *head_tensors) = arguments[:5], arguments[5:9], arguments[9:]
        outputs = linear_forward(*policy, *reference, head_tensors, *flatten_options(options), *heads.flatten(head))
        sequences, computed_ref_logps, (loss, head_grads, *reported) = outputs[:5], outputs[5], outputs[10:]
        is_total = head.reduction != "none"
        _save(ctx, *policy, options, outputs, head_grads, is_total)
        ctx.num_arguments = len(arguments)
        ctx.set_materialize_grads(False)  # else autograd fills a zero gradient for each of the reported tensors
        ctx.mark_non_differentiable(*sequences, computed_ref_logps, *reported)
        return loss, *sequences, computed_ref_logps, *reported

    @staticmethod
    @first_derivative_only
    def backward(ctx, incoming, *_):
        gradients = _gradients(ctx, incoming)
        return *gradients, *(None for _ in range(ctx.num_arguments - len(gradients)))
