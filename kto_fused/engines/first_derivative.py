"""A hand-written backward that refuses to be differentiated again, rather than to count as a constant."""

import functools
from collections.abc import Callable

import torch


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, anchor):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "the fused losses have no second derivative; kto_fused.reference has, by autograd's own backward"
        )


def first_derivative_only(backward: Callable) -> Callable:
    """Decorate the ``backward`` of an autograd.Function. Unlike ``once_differentiable`` it raises whatever the incoming
    gradient: under ``create_graph=True`` a penalty on the gradient must not silently lose its own gradient.
    """

    @functools.wraps(backward)
    def call(ctx, *incoming):
        if incoming[0] is None:  # nothing depends on the loss
            return (None,) * len(ctx.needs_input_grad)
        # in the forward's dtypes, whatever autocast surrounds the backward
        with torch.no_grad(), torch.autocast(incoming[0].device.type, enabled=False):
            grads = backward(ctx, *incoming)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            anchor = torch.zeros((), requires_grad=True)
            grads = tuple(None if grad is None else _Refuse.apply(grad, anchor) for grad in grads)
        return grads

    return call
