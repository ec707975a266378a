"""A model's forward that calls a fused loss at the place of its LM head.

``attach`` puts two functions of this file on a model: ``forward_like`` makes its new forward, and ``head_forward``
becomes the forward of its LM head. With a ``FusedCall`` among its arguments, the model runs its backbone and hands the
call to the head, which runs the loss on the hidden states and on its own weight and bias. Without one, both do what
they did before.

The loss passes through the wrappers around the model on its way in and out. FSDP2's mixed precision rounds every
tensor that it finds in tuples, dicts and dataclasses: the reference's log-probabilities on their way in, the loss on
its way out. So both travel inside plain objects, ``FusedCall`` and ``Outcome``, which wrappers do not look into. A
tensor beside the outcome, the gradient path, still goes through the wrappers, so that their gradient hooks run.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..metrics import TokenMetrics
from .config import logit_options
from .wrappers import FROM_LOGITS, UnsupportedModelError, head_of, is_scorer


class FusedCall:
    """A function of hidden states and LM head, with the rest of its arguments."""

    def __init__(self, function: Callable, arguments: dict[str, Any]):
        self.function, self.arguments = function, arguments

    def __call__(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, head: str, options: dict
    ) -> Any:
        """Call the function with the weights of the layer ``head``: "lm_head" or "score"."""
        weights = {f"{head}_weight": weight, f"{head}_bias": bias}
        return self.function(hidden=hidden, **weights, **options, **self.arguments)


class Outcome:
    """The function's result, and the auxiliary loss of a mixture of experts, or None."""

    def __init__(self, result: Any):
        self.result, self.aux_loss = result, None

    def results(self, gradient_path: torch.Tensor) -> tuple:
        """Return the function's results as a tuple, unrounded.

        ``gradient_path`` is the first result as the wrappers returned it, perhaps rounded. The backward of the first
        result runs the gradient hooks that the wrappers put on it.
        """
        first, *others = self.result if isinstance(self.result, tuple) else (self.result,)
        return first if gradient_path is first else OnBothPaths.apply(first, gradient_path), *others


class OnBothPaths(torch.autograd.Function):
    """Forward: returns ``exact``, unrounded. Backward: ``exact`` gets the gradient.

    ``wrapped``, which the wrappers (DDP, FSDP2) returned, gets zeros, so that their hooks run and change no gradient.
    """

    @staticmethod
    def forward(ctx, exact: torch.Tensor, wrapped: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(wrapped)
        return exact.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, torch.zeros_like(*ctx.saved_tensors)


def forward_like(forward: Callable) -> Callable:
    """Return a forward that also takes a ``fused_call``.

    It has the signature of ``forward``, because ``generate`` and ``Trainer`` read the argument names from it.
    """

    def fused_forward(self: PreTrainedModel, *args, fused_call: FusedCall | None = None, **kwargs) -> Any:
        if fused_call is None:
            unfused = self._unfused_forward
            return type(self).forward(self, *args, **kwargs) if unfused is None else unfused(*args, **kwargs)
        called = call_at_head(self, fused_call, *args, **kwargs)
        if called.routed is not None and is_loss(called.outcome.result):
            called.outcome.aux_loss = _router_loss(self, *called.routed)
        return called.gradient_path, called.outcome

    # not functools.wraps: accelerate would follow its __wrapped__ when it removes its own wrappers
    fused_forward.__signature__ = inspect.signature(forward)
    fused_forward.__name__ = "forward"
    return fused_forward


class CalledAtHead(NamedTuple):
    """The return values of ``call_at_head``."""

    gradient_path: torch.Tensor  # the function's first result, on which wrappers hang their gradient hooks
    outcome: Outcome
    routed: tuple[Any, torch.Tensor | None] | None  # (router logits, attention mask) if router logits are asked for


def call_at_head(model: PreTrainedModel, call: FusedCall, *args, **kwargs) -> CalledAtHead:
    """Run the model's backbone on the arguments, then ``call`` in place of the LM head."""
    inputs = {
        name: value for name, value in kwargs.items() if value is not None
    }  # PEFT passes absent arguments as None
    inputs |= {"use_cache": False, "return_dict": True}
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        inputs.setdefault("output_router_logits", True)
    outputs = backbone_of(model)(*args, **inputs)
    if torch.is_autocast_enabled(outputs.last_hidden_state.device.type) and not torch.compiler.is_compiling():
        # Autocast keeps a half-precision copy of every layer's weights, which no layer needs any more. If the graph
        # holds the copies as well, dropping them here would free nothing.
        is_checkpointing = (getattr(module, "gradient_checkpointing", False) for module in model.modules())
        if not torch.is_grad_enabled() or any(is_checkpointing):
            torch.clear_autocast_cache()
    if is_scorer(model):
        call_with_names = functools.partial(call, head="score", options={})
    else:
        call_with_names = functools.partial(call, head="lm_head", options=logit_options(model.config))
    gradient_path, outcome = head_of(model)(outputs.last_hidden_state, fused_call=call_with_names)
    is_routed = inputs.get("output_router_logits", False)
    routed = (outputs.router_logits, inputs.get("attention_mask")) if is_routed else None
    return CalledAtHead(gradient_path, outcome, routed)


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """Return the module that gives the hidden states to the LM head or score."""
    found = model.base_model
    if found is model:  # the class names an attribute that does not exist: most such models call it "model"
        found = getattr(model, "model", None)
    if not isinstance(found, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} has no base_model beside its LM head: {FROM_LOGITS}")
    return found


def head_forward(self: nn.Linear, hidden: torch.Tensor, fused_call: Callable | None = None) -> Any:
    """Return the LM head's output, or (gradient path, outcome) of the ``fused_call`` that gets the head's weights."""
    if fused_call is None:
        return type(self).forward(self, hidden)
    result = fused_call(hidden, self.weight, self.bias)
    return result[0] if isinstance(result, tuple) else result, Outcome(result)


# pickle stores a bound method by its name: a layer that is loaded again gets its class's own forward
head_forward.__name__ = "forward"


def forward_of(module: nn.Module) -> Callable:
    """Return the function that runs as the module's forward, unbound."""
    return getattr(module.forward, "__func__", module.forward)


# ---- the auxiliary loss of a mixture of experts --------------------------------------------------------------------


def is_loss(result: Any) -> bool:
    """Return whether a function's result is a loss, to which a router's loss is added.

    A tuple is whose first item is a number, or which has no ``TokenMetrics``. Log-probabilities, alone or with metrics,
    are not.
    """
    if not isinstance(result, tuple):
        return False
    return result[0].ndim == 0 or not any(isinstance(part, TokenMetrics) for part in result)


def _router_loss(
    model: PreTrainedModel, router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Return the load-balancing loss by the architecture's own function, times ``model.router_aux_loss_coef``."""
    # of the first class that a modeling file defines: FSDP2 puts a class of its own before it
    modules = (kind.__module__ for kind in type(model).__mro__)
    module = next((name for name in modules if name.startswith(("transformers.models", "transformers_modules"))), "")
    balance = getattr(sys.modules.get(module), "load_balancing_loss_func", lambda: None)
    names = ["gate_logits", "num_experts", "top_k", "attention_mask"]
    if list(inspect.signature(balance).parameters) != names or not hasattr(model, "router_aux_loss_coef"):
        raise unknown_router_loss(model)
    loss = balance(router_logits, model.num_experts, model.num_experts_per_tok, attention_mask)
    return model.router_aux_loss_coef * loss


def unknown_router_loss(model: PreTrainedModel) -> UnsupportedModelError:
    """Return the error for a mixture of experts whose auxiliary loss this package cannot call or has no weight for."""
    return UnsupportedModelError(
        f"{type(model).__name__}'s router loss is not a known one: train without it "
        "(model.config.output_router_logits = False), or add it yourself to a loss of the model's logits"
    )
