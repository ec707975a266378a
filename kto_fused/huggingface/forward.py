"""A model's forward that calls a fused loss in place of its LM head."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..metrics import TokenMetrics
from .config import FROM_LOGITS, UnsupportedModelError, logit_options

# Both are plain objects because wrappers look for tensors in tuples, dicts and dataclasses: FSDP2's mixed precision
# would round the reference's log-probabilities on their way in and the loss on its way out.


class FusedCall:
    """A function of hidden states and LM head with the rest of its arguments."""

    def __init__(self, function: Callable, arguments: dict[str, Any]):
        self.function, self.arguments = function, arguments

    def __call__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, options: dict) -> Any:
        return self.function(hidden=hidden, lm_head_weight=weight, lm_head_bias=bias, **options, **self.arguments)


class Outcome:
    """The function's result, and the mixture of experts' own loss."""

    def __init__(self, result: Any):
        self.result, self.aux_loss = result, None

    def results(self, gradient_path: torch.Tensor) -> tuple:
        """As computed; the first with the gradient hooks of the wrappers that may have rounded ``gradient_path``."""
        first, *others = self.result if isinstance(self.result, tuple) else (self.result,)
        return first if gradient_path is first else OnBothPaths.apply(first, gradient_path), *others


class OnBothPaths(torch.autograd.Function):
    """Forward: ``exact``, unrounded. Backward: the gradient goes straight to ``exact``, and zeros through ``wrapped``,
    what wrappers (DDP, FSDP2) made of it, so that their hooks run.
    """

    @staticmethod
    def forward(ctx, exact: torch.Tensor, wrapped: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(wrapped)
        return exact.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, torch.zeros_like(*ctx.saved_tensors)


def forward_like(forward: Callable) -> Callable:
    """``forward`` that takes a ``fused_call``, under the signature that ``generate`` and ``Trainer`` look at."""

    def fused_forward(self: PreTrainedModel, *args, fused_call: FusedCall | None = None, **kwargs) -> Any:
        if fused_call is None:
            unfused = self._unfused_forward
            return type(self).forward(self, *args, **kwargs) if unfused is None else unfused(*args, **kwargs)
        gradient_path, outcome, routed = call_at_head(self, fused_call, *args, **kwargs)
        if routed is not None and is_loss(outcome.result):
            outcome.aux_loss = _router_loss(self, *routed)
        return gradient_path, outcome

    # not functools.wraps, whose __wrapped__ accelerate follows when it takes its own wrappers off
    fused_forward.__signature__ = inspect.signature(forward)
    fused_forward.__name__ = "forward"
    return fused_forward


def call_at_head(model: PreTrainedModel, call: FusedCall, *args, **kwargs) -> tuple[torch.Tensor, Outcome, Any]:
    """The backbone, then ``call`` in place of the LM head; with (router logits, attention mask) where they are asked
    for, else None.
    """
    inputs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT names what it leaves out
    inputs |= {"use_cache": False, "return_dict": True}
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        inputs.setdefault("output_router_logits", True)
    outputs = _backbone(model)(*args, **inputs)
    if torch.is_autocast_enabled(outputs.last_hidden_state.device.type) and not torch.compiler.is_compiling():
        is_checkpointing = (getattr(module, "gradient_checkpointing", False) for module in model.modules())
        if not torch.is_grad_enabled() or any(is_checkpointing):  # else the graph holds them as well
            torch.clear_autocast_cache()  # of the layers' weights in half precision, though no layer is left
    gradient_path, outcome = model.get_output_embeddings()(
        outputs.last_hidden_state, fused_call=functools.partial(call, options=logit_options(model.config))
    )
    is_routed = inputs.get("output_router_logits", False)
    return gradient_path, outcome, (outputs.router_logits, inputs.get("attention_mask")) if is_routed else None


def _backbone(model: PreTrainedModel) -> nn.Module:
    """What gives the hidden states to the LM head."""
    found = model.base_model
    if found is model:  # there is nothing of the name that its class says: most have it here
        found = getattr(model, "model", None)
    if not isinstance(found, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} has no base_model beside its LM head: {FROM_LOGITS}")
    return found


def head_forward(self: nn.Linear, hidden: torch.Tensor, fused_call: Callable | None = None) -> Any:
    if fused_call is None:
        return type(self).forward(self, hidden)
    result = fused_call(hidden, self.weight, self.bias)
    return result[0] if isinstance(result, tuple) else result, Outcome(result)


def is_loss(result: Any) -> bool:
    """Whether a router's loss belongs to a function's result: not to log-probabilities, alone or with metrics."""
    return isinstance(result, tuple) and not any(isinstance(part, TokenMetrics) for part in result)


def _router_loss(
    model: PreTrainedModel, router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """The load-balancing loss by the architecture's own function, weighted by its own coefficient."""
    # of the class from a modeling file: FSDP2 puts a class of its own before it
    modules = (kind.__module__ for kind in type(model).__mro__)
    module = next((name for name in modules if name.startswith(("transformers.models", "transformers_modules"))), "")
    balance = getattr(sys.modules.get(module), "load_balancing_loss_func", lambda: None)
    names = ["gate_logits", "num_experts", "top_k", "attention_mask"]
    if list(inspect.signature(balance).parameters) != names or not hasattr(model, "router_aux_loss_coef"):
        raise unknown_router_loss(model)
    loss = balance(router_logits, model.num_experts, model.num_experts_per_tok, attention_mask)
    return model.router_aux_loss_coef * loss


def unknown_router_loss(model: PreTrainedModel) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__}'s router loss is not a known one: train without it "
        "(model.config.output_router_logits = False), or add it yourself to a loss of the model's logits"
    )


def forward_of(module: nn.Module) -> Callable:
    return getattr(module.forward, "__func__", module.forward)
