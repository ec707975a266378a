"""The ``autograd.Function``s from hidden states: ``LogpsFromHidden`` and ``LossFromHidden``.

Their forward runs the operator ``linear_forward``, which finds the gradients too wherever it can. Their backward scales
those gradients by the incoming gradient, or, in ``GradientMode.IN_BACKWARD``, runs ``linear_backward``.
"""

import math

import torch

from ..heads import base as heads
from .backends import HAS_TRITON, on_device
from .cpu import BLOCK_BYTES
from .first_derivative import first_derivative_only
from .layout import compute_dtype, row_targets, scale_grads
from .logits import sequence_backward, weighted_grads
from .operators import linear_backward, linear_forward
from .options import GradientMode, HiddenOptions, gradient_mode
from .results import Gradients, HiddenResults


def _keeps_graph() -> bool:
    """Whether the backward under way may be asked for again (``retain_graph=True``)."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def _scaled(gradients: list[torch.Tensor], incoming: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients times the incoming gradient, a scalar tensor on their device. A 0 stays a 0.

    The gradients are overwritten, unless a later backward of the same graph may read them again.
    """
    if torch.compiler.is_compiling():
        return [torch.where(grad == 0, grad, grad * incoming.to(compute_dtype(grad))) for grad in gradients]
    if _keeps_graph():
        gradients = [grad.clone() for grad in gradients]
    for grad in gradients:
        scale_(grad, incoming)
    return gradients


def _scale_rows(values: torch.Tensor, factors: torch.Tensor, chunk_bytes: int) -> None:
    """Multiply values [..., H] by factors [..., 1] in place. A factor of 0 makes the row 0, even if it holds a NaN."""
    if values.device.type != "cpu" or values.dtype == factors.dtype or torch.compiler.is_compiling():
        values.mul_(factors)
    else:  # a CPU multiplies through copies in the wider dtype: a block of rows at a time bounds their memory
        hidden_size = values.shape[-1]
        size = max(1, min(BLOCK_BYTES, chunk_bytes // 4) // (hidden_size * factors.dtype.itemsize))
        blocks = values.view(-1, hidden_size).split(size), factors.view(-1, 1).split(size)
        for rows, factor in zip(*blocks, strict=True):
            rows.mul_(factor)
    values.masked_fill_(factors == 0, 0)


def scale_(values: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply values in place by a scalar tensor on their device. A 0 stays a 0. A factor of 1 visits no value."""
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


def _save(ctx, policy, options: HiddenOptions, mode: GradientMode, results: HiddenResults) -> None:
    """Save what the backward of ``mode`` reads. ``policy`` holds the first six tensors of ``linear_forward``."""
    hidden, weight, bias, labels, cu_seqlens, token_weights = policy
    ctx.options, ctx.mode = options, mode
    ctx.dtypes = tuple(None if x is None else x.dtype for x in (hidden, weight, bias))
    if mode is GradientMode.OF_LOSS:
        found = zip(results.gradients, options.needs, strict=True)
        ctx.save_for_backward(*(grad for grad, is_needed in found if is_needed))
    elif mode is GradientMode.PER_TOKEN:
        ctx.vocab_size = weight.shape[0]
        counts = results.values.token_counts
        ctx.save_for_backward(results.gradients.hidden, labels, cu_seqlens, token_weights, counts, results.head_grads)
    elif mode is GradientMode.IN_BACKWARD:
        ctx.save_for_backward(*policy, results.head_grads, results.statistics)


def _gradients(ctx, incoming: torch.Tensor) -> Gradients:
    """Return the gradients in the inputs' own dtypes; None where none is needed."""
    find = {
        GradientMode.OF_LOSS: _gradients_of_loss,
        GradientMode.PER_TOKEN: _gradients_per_token,
        GradientMode.IN_BACKWARD: _gradients_in_backward,
    }[ctx.mode]
    found = zip(find(ctx, incoming), ctx.options.needs, ctx.dtypes, strict=True)
    return Gradients(*[grad.to(dtype) if is_needed else None for grad, is_needed, dtype in found])


def _gradients_of_loss(ctx, incoming: torch.Tensor) -> Gradients:
    scaled = iter(_scaled(list(ctx.saved_tensors), incoming))
    return Gradients(*[next(scaled) if is_needed else None for is_needed in ctx.options.needs])


def _gradients_per_token(ctx, incoming: torch.Tensor) -> Gradients:
    """Scale the rows of d token log-probability / d hidden by d loss / d token log-probability."""
    options: HiddenOptions = ctx.options
    direction, labels, cu_seqlens, token_weights, token_counts, head_grads = ctx.saved_tensors
    if options.per_position:
        row_grads = torch.where(token_counts > 0, incoming, 0.0)
    else:
        targets = row_targets(labels, cu_seqlens, **options.logits.labelling, vocab_size=ctx.vocab_size)
        row_grads = sequence_backward(
            targets.flatten().int(),
            token_counts,
            head_grads,
            incoming,
            cu_seqlens,
            options.logits.average_log_prob,
            options.compute_dtype,
            options.logits.backend,
        )
        row_grads = weighted_grads(row_grads, token_weights)
    row_grads = row_grads.view(*direction.shape[:-1], 1)
    if torch.compiler.is_compiling() or _keeps_graph():
        direction = direction.clone()
    _scale_rows(direction, row_grads, options.chunk_bytes)
    return Gradients(hidden=direction)


def _gradients_in_backward(ctx, incoming: torch.Tensor) -> Gradients:
    *policy, head_grads, statistics = ctx.saved_tensors
    logp_grads = incoming if head_grads is None else scale_grads(head_grads, incoming)
    by_hidden, by_weight, by_bias = linear_backward(*policy, logp_grads, statistics, *ctx.options.flat())
    return Gradients(by_hidden, by_weight, by_bias)


class LogpsFromHidden(torch.autograd.Function):
    """The fields of ``SequenceValues``: of sequences, each [B]; or of positions, each [rows]."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, cu_seqlens, token_weights, options):
        policy, no_reference = (hidden, weight, bias, labels, cu_seqlens, token_weights), (None, None, None, None)
        outputs = linear_forward(*policy, *no_reference, [], *options.flat(), *heads.FlatHead())
        results = HiddenResults.from_list(outputs)
        _save(ctx, policy, options, gradient_mode(options.needs, None), results)
        ctx.set_materialize_grads(False)  # otherwise autograd would fill a gradient of zeros for each metric
        logps, *metrics = results.values.returned
        ctx.mark_non_differentiable(*metrics)
        return logps, *metrics

    @staticmethod
    @first_derivative_only
    def backward(ctx, incoming, *_):
        return *_gradients(ctx, incoming), None, None, None, None


class LossFromHidden(torch.autograd.Function):
    """``(loss, *fields of SequenceValues, ref_logps, *reported)``: the engine and a loss head together.

    ``ref_logps`` [B] is computed from the reference's hidden states, and empty where there are none. ``reported`` is
    what the head returns beside the loss and its gradient.
    """

    @staticmethod
    def forward(ctx, *arguments):  # torch.compile may drop the first of named arguments where nothing needs a gradient
        policy, reference, (options, head, *head_tensors) = arguments[:6], arguments[6:10], arguments[10:]
        outputs = linear_forward(*policy, *reference, head_tensors, *options.flat(), *heads.flatten(head))
        results = HiddenResults.from_list(outputs)
        _save(ctx, policy, options, gradient_mode(options.needs, head), results)
        ctx.num_arguments = len(arguments)
        ctx.set_materialize_grads(False)  # otherwise autograd would fill a gradient of zeros for each reported tensor
        others = *results.values.returned, results.ref_logps, *results.reported
        ctx.mark_non_differentiable(*others)
        return results.loss, *others

    @staticmethod
    @first_derivative_only
    def backward(ctx, incoming, *_):
        gradients = _gradients(ctx, incoming)
        return *gradients, *(None for _ in range(ctx.num_arguments - len(gradients)))
