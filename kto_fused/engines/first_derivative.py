"""A decorator for hand-written backwards: their gradients raise an error when they are differentiated again.

Without it autograd would treat the gradient as a constant, and a penalty on the gradient would train nothing.
"""

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
            "the fused losses have no second derivative; use the functions of kto_fused.reference, which autograd "
            "differentiates twice"
        )


def first_derivative_only(backward: Callable) -> Callable:
    """Decorate the ``backward`` of an autograd.Function whose gradients cannot be differentiated.

    ``torch.autograd.function.once_differentiable`` raises only where the incoming gradient requires one. This raises in
    every second backward: under ``create_graph=True`` a penalty on the gradient must not silently lose its gradient.
    """

    @functools.wraps(backward)
    def call(ctx, *incoming):
        if incoming[0] is None:  # nothing depends on the loss
            return (None,) * len(ctx.needs_input_grad)
        # autocast around the backward must not change its dtypes: they are the forward's
        with torch.no_grad(), torch.autocast(incoming[0].device.type, enabled=False):
            grads = backward(ctx, *incoming)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            anchor = torch.zeros((), requires_grad=True)
            grads = tuple(None if grad is None else _Refuse.apply(grad, anchor) for grad in grads)
        return grads

    return call
