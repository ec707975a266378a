"""The ``autograd.Function`` of losses from sequence log-probabilities that the caller already has."""

import torch

from .first_derivative import first_derivative_only
from .layout import scale_grads


class LossFromLogps(torch.autograd.Function):
    """``(loss, *reported)`` of a loss head on log-probabilities [B].

    The head gives its gradient by the log-probabilities in the forward; the backward scales it by the incoming one.
    """

    @staticmethod
    def forward(ctx, *arguments):  # torch.compile may drop the first of named arguments where nothing needs a gradient
        logps, head, token_counts, ref_logps, *head_tensors = arguments
        loss, grads, *reported = head(logps, token_counts, ref_logps, *head_tensors)
        ctx.save_for_backward(grads)
        ctx.dtype = logps.dtype
        ctx.num_arguments = len(arguments)
        ctx.set_materialize_grads(False)  # otherwise autograd would fill a gradient of zeros for each reported tensor
        ctx.mark_non_differentiable(*reported)
        return loss, *reported

    @staticmethod
    @first_derivative_only
    def backward(ctx, incoming, *_):
        (grads,) = ctx.saved_tensors
        return scale_grads(grads, incoming).to(ctx.dtype), *(None for _ in range(ctx.num_arguments - 1))
