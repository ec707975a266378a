"""autograd.Function: sequence log-probabilities in, loss out."""

import torch

from ..heads.preference import scale_grads
from .first_derivative import first_derivative_only


class LossFromLogps(torch.autograd.Function):
    """``(loss, *reported)`` of a loss head on [B] log-probabilities; backward scales the head's own gradient."""

    @staticmethod
    def forward(ctx, *arguments):  # of named ones torch.compile may drop the first, where nothing needs a gradient
        logps, head, token_counts, *head_tensors = arguments
        loss, grads, *reported = head(logps, token_counts, *head_tensors)
        ctx.save_for_backward(grads)
        ctx.dtype = logps.dtype
        ctx.num_arguments = len(arguments)
        ctx.set_materialize_grads(False)  # else autograd fills a zero gradient for each of the reported tensors
        ctx.mark_non_differentiable(*reported)
        return loss, *reported

    @staticmethod
    @first_derivative_only
    def backward(ctx, incoming, *_):
        (grads,) = ctx.saved_tensors
        return scale_grads(grads, incoming).to(ctx.dtype), *(None for _ in range(ctx.num_arguments - 1))
