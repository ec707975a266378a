"""The ``autograd.Function``s of losses from log-probabilities that the caller already has."""

import torch

from .first_derivative import first_derivative_only
from .layout import MASKED, compute_dtype, scale_grads
from .logits import loss_of_rows


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


class LossFromTokenLogps(torch.autograd.Function):
    """``(loss, logps, token_counts)`` of a loss head that reads tokens, on log-probabilities [B, T] or [N].

    ``logps`` and ``token_counts`` [B] are those of the sequences. Entries where ``is_token`` is False are not read.
    """

    @staticmethod
    def forward(ctx, *arguments):  # torch.compile may drop the first of named arguments where nothing needs a gradient
        logps, is_token, cu_seqlens, token_weights, num_sequences, options, head, ref_logps, *head_tensors = arguments
        rows = torch.where(is_token, logps, 0.0).to(compute_dtype(logps)).flatten()
        per_token = torch.stack([rows, *[torch.zeros_like(rows)] * 3])  # the other fields of ``TokenValues``
        targets = torch.where(is_token, 0, MASKED).flatten().int()
        found = loss_of_rows(
            targets,
            per_token,
            cu_seqlens,
            token_weights,
            num_sequences,
            options,
            head,
            ref_logps,
            tuple(head_tensors),
        )
        ctx.save_for_backward(found.head_grads)
        ctx.shape, ctx.dtype, ctx.num_arguments = logps.shape, logps.dtype, len(arguments)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(found.values.logps, found.values.token_counts)
        return found.loss, found.values.logps, found.values.token_counts

    @staticmethod
    @first_derivative_only
    def backward(ctx, incoming, *_):
        (grads,) = ctx.saved_tensors
        return scale_grads(grads, incoming).to(ctx.dtype).view(ctx.shape), *(None for _ in range(ctx.num_arguments - 1))
