"""Hugging Face causal language models: their hidden states and LM head go to a fused loss, and logits never exist.

The loss is called inside the model's own ``forward``, at the place of its LM head, so that whatever wraps the model
(PEFT, DistributedDataParallel, FSDP2, ``torch.compile``, autocast) does its part as it does for logits: adapters are
on or off, sharded weights are gathered around the head, gradients are reduced behind it.
"""

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from .metrics import TokenMetrics

# what models multiply their logits by, or divide them by, and how their configurations call it
MULTIPLIED_BY = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVIDED_BY = ("logits_scaling", "logits_mup_width_multiplier")
SOFT_CAPPED_BY = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLYING = ("hyperclovax",)  # model types that multiply by what others divide by
SCALING_HIDDEN = ("inkling_text", "minicpm3")  # model types that scale what their head is given, not its logits
# what is left for a model that ``attach`` refuses
FROM_LOGITS = "pass its logits to the losses that take logits (in this package's trainers: loss_from='logits')"
# what is autocast to within a forward, by accelerate's names for it
AUTOCAST_TO = {"bf16": torch.bfloat16, "fp16": torch.float16}
# whose hooks on the LM head shard and gather its weight, and pass what it returns on unread
HOOKED_BY = ("torch.distributed", "deepspeed", "accelerate")
CHECKED_TOKENS = 8
ROUNDINGS = 8  # that those tokens' logits may be apart, of the largest
PROBED = 100.0

logger = logging.getLogger(__name__)


class UnsupportedModelError(ValueError):
    """A model whose logits the fused loss would not reproduce; the message says what to do."""


class RemoteCodeError(ValueError):
    """A model, tokenizer or configuration that cannot be loaded without running Python code that comes with it."""


def load_pretrained(kind: type, name: str, *, trust_remote_code: bool, **options: Any) -> Any:
    """``kind.from_pretrained(name)``, which never asks on the terminal whether the model's own code may be run.

    Raises:
        RemoteCodeError: that code is needed, and ``trust_remote_code`` is off.
    """
    if trust_remote_code:
        _say_trusted(name)
    try:
        return kind.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise RemoteCodeError(
            f"{name} brings Python code of its own, which is run only with trust_remote_code=True in the trainer's "
            "config (kto-fused train: --trust_remote_code)"
        ) from error


@functools.cache  # once for each model
def _say_trusted(name: str) -> None:
    logger.warning("trust_remote_code is on: Python code that comes with %s is run", name)


def apply(function: Callable, model: nn.Module, model_inputs: dict[str, Any], **arguments) -> Any:
    """``function(hidden=, lm_head_weight=, lm_head_bias=, logit_scale=, logit_softcap=, **arguments)`` of a model.

    ``function`` is one that takes hidden states: ``fused_linear_kto_loss``, ``fused_linear_dpo_loss``,
    ``linear_sequence_logps``, ``linear_token_logps``, or a twin of theirs in ``reference``. A mixture of experts whose
    configuration asks for router logits has its auxiliary loss added to a loss (with ``reduction="none"`` to each
    sequence's), times ``router_aux_loss_coef``, as the model's own forward does; not to log-probabilities. A function
    of your own that returns a tuple returns a loss first.

    Args:
        function: called once, inside the model's forward.
        model: a ``PreTrainedModel`` with an LM head, bare or wrapped (PEFT, DDP, FSDP2, ``torch.compile``).
        model_inputs: for the model's backbone: ``input_ids`` [B, T], ``attention_mask``, ``position_ids``, ...
        arguments: for ``function``: ``labels`` and what else it takes, but for ``logit_scale`` and ``logit_softcap``,
            which the model's configuration says.

    Returns:
        What ``function`` returns.

    Raises:
        UnsupportedModelError, TypeError: see ``attach``.
        TypeError: ``model_inputs`` is no mapping.
        ValueError: ``logit_scale`` or ``logit_softcap`` is among ``arguments``.

    >>> import torch, kto_fused
    >>> from kto_fused import huggingface
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    ...                                      num_attention_heads=2, num_key_value_heads=2))
    >>> input_ids = torch.arange(8).view(2, 4)
    >>> loss, metrics = huggingface.apply(
    ...     kto_fused.fused_linear_kto_loss, model, {"input_ids": input_ids}, labels=input_ids,
    ...     desirable=torch.tensor([True, False]), ref_logps=torch.zeros(2), reference_point=0.0
    ... )
    >>> loss.backward()
    >>> metrics.token_counts.tolist()
    [3, 3]
    """
    _check_call(function, model_inputs, arguments)
    attach(model)
    answer = model(**model_inputs, fused_call=FusedCall(function, arguments))
    if not isinstance(answer, tuple) or not isinstance(answer[-1], Outcome):
        raise UnsupportedModelError(
            f"model ({type(model).__name__}) calls the forward that it found when it was made: call "
            "kto_fused.huggingface.attach(model) before the wrapping"
        )
    gradient_path, outcome = answer
    first, *others = outcome.results(gradient_path)
    if not isinstance(outcome.result, tuple):
        return first
    if outcome.aux_loss is not None:
        first = first + outcome.aux_loss.to(first)
    return first, *others


def apply_to_logits(function: Callable, model: nn.Module, model_inputs: dict[str, Any], **arguments) -> Any:
    """``function(logits, **arguments)`` of a model's own logits, for a model that ``attach`` refuses.

    ``function`` is one that takes logits: ``fused_kto_loss``, ``fused_dpo_loss``, ``sequence_logps``, ``token_logps``,
    or a twin. The auxiliary loss of a mixture of experts is treated as in ``apply``, and so are ``logit_scale`` and
    ``logit_softcap``, which these logits hold already.

    Args:
        function: called once, with the logits [B, T, V].
        model: any model that returns ``logits``, bare or wrapped.
        model_inputs, arguments: as in ``apply``.

    Returns:
        What ``function`` returns.

    Raises:
        UnsupportedModelError: the auxiliary loss has a weight of another name than ``router_aux_loss_coef``.
        TypeError, ValueError: see ``apply``.

    >>> import torch, kto_fused
    >>> from kto_fused import huggingface
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=8))
    >>> input_ids = torch.arange(8).view(2, 4)
    >>> logps = huggingface.apply_to_logits(
    ...     kto_fused.sequence_logps, model, {"input_ids": input_ids}, labels=input_ids
    ... )
    >>> logps.shape
    torch.Size([2])
    """
    _check_call(function, model_inputs, arguments)
    outputs = model(**{**model_inputs, "use_cache": False, "return_dict": True})
    result = function(outputs.logits, **arguments)
    aux_loss = getattr(outputs, "aux_loss", None)
    if aux_loss is None or not _is_loss(result):
        return result
    inner = unwrap(model)
    if not hasattr(inner, "router_aux_loss_coef"):
        raise _unknown_router_loss(inner)
    return result[0] + inner.router_aux_loss_coef * aux_loss.to(result[0]), *result[1:]


def attach(model: nn.Module) -> None:
    """Teach a model's forward to call a fused loss in place of its LM head; ``apply`` does it at its first call.

    To be called before ``accelerate`` prepares the model. Without a loss the forward stays what it was, so generation,
    saving and copying are as before. The model's own logits are compared once, on a few tokens, with those the loss
    would see: an architecture that does more between its hidden states and its logits is refused, not trained wrongly.

    Args:
        model: as in ``apply``. Attaching it again changes nothing.

    Raises:
        UnsupportedModelError: the LM head is not a plain linear layer (it carries an adapter, is quantised or missing),
            or has hooks that expect logits; prompts are learned, ``config.return_dict`` is off, attention sees later
            tokens, or the model's logits are not finite or more than its head, scale and soft cap; or the model is
            wrapped in ``nn.DataParallel``, was prepared by accelerate before, lies on the meta device, or is ZeRO-3's
            without an engine.
        TypeError: ``model`` holds no ``PreTrainedModel``.

    >>> from kto_fused import huggingface
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    ...                                      num_attention_heads=2, num_key_value_heads=2))
    >>> huggingface.attach(model)
    """
    inner = unwrap(model)
    layers = head_layers(inner)
    # what pickle brings back is the class's own forward
    is_attached = hasattr(inner, "_unfused_forward") and _forward_of(inner) is not type(inner).forward
    if not is_attached and "_original_forward" in inner.__dict__:
        raise UnsupportedModelError(
            "model was prepared by accelerate before it knew the fused loss, which would run outside of autocast: "
            "call kto_fused.huggingface.attach(model) before accelerator.prepare(model)"
        )
    for layer in layers:  # each time: the head may have been replaced since
        if _forward_of(layer) is not _head_forward:
            layer.forward = MethodType(_head_forward, layer)
    if is_attached:
        return
    if not inner.config.return_dict:
        raise UnsupportedModelError(
            "model.config.return_dict is False, under which transformers' own models fail to run: set it to True"
        )
    # an instance's own forward is somebody else's patch; as a bound method it follows the model when that is copied
    inner._unfused_forward = inner.__dict__.get("forward")
    inner.forward = MethodType(_forward_like(type(inner).forward), inner)
    try:
        check_is_causal(inner)
        _check_logits(inner)
    except BaseException:
        detach(inner)
        raise


def detach(model: nn.Module) -> None:
    """Give the model back the forward it had before ``attach``."""
    inner = unwrap(model)
    if not hasattr(inner, "_unfused_forward"):
        return
    for layer in inner.get_output_embeddings().modules():
        if _forward_of(layer) is _head_forward:
            del layer.forward
    del inner.forward
    if inner._unfused_forward is not None:
        inner.forward = inner._unfused_forward
    del inner._unfused_forward


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The ``PreTrainedModel`` inside PEFT, DDP, FSDP and ``torch.compile``.

    Raises:
        TypeError: there is none.
        UnsupportedModelError: ``nn.DataParallel``, or PEFT that learns prompts.
    """
    inner = model
    while not isinstance(inner, PreTrainedModel):
        if isinstance(inner, nn.DataParallel):
            raise UnsupportedModelError(
                "model is wrapped in nn.DataParallel, whose replicas forget the fused loss: start one process per GPU "
                "(torchrun, accelerate launch), or show one GPU (CUDA_VISIBLE_DEVICES)"
            )
        if hasattr(inner, "get_base_model"):
            config = inner.active_peft_config
            if config.is_prompt_learning:
                raise UnsupportedModelError(
                    f"model learns prompts ({config.peft_type}), whose virtual tokens have no labels: use LoRA or "
                    "another adapter of the weights"
                )
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            raise TypeError(f"model must be or wrap a transformers.PreTrainedModel, got {type(model).__name__}")
    return inner


def without_padding_mask(model: nn.Module, model_inputs: dict[str, Any], mixed_precision: str | None) -> dict[str, Any]:
    """``model_inputs`` that are padded on the right, without their ``attention_mask`` where nothing needs it for
    attention under accelerate's ``mixed_precision``.

    No token of a causal model sees the padding behind it, and PyTorch's own attention takes its fastest kernels where
    there is no mask, which would be [B, 1, T, T]. It stays for another attention (FlashAttention leaves out padding by
    it), for heads that share keys and values where the GPU has no kernel for them, for the auxiliary loss of a mixture
    of experts, for batches longer than the model's positions (OPT's padding has none), and for a forward that has no
    default for it.
    """
    inner = unwrap(model)
    config = inner.config.get_text_config()
    parameter = inspect.signature(inner.base_model.forward).parameters.get("attention_mask")
    is_optional = parameter is not None and parameter.default is None
    is_routed = model_inputs.get("output_router_logits") or getattr(config, "output_router_logits", False)
    if config._attn_implementation != "sdpa" or is_routed or not is_optional:
        return model_inputs
    input_ids, limit = model_inputs.get("input_ids"), positions(inner.config)
    if input_ids is not None and limit is not None and input_ids.shape[1] > limit:
        return model_inputs
    attends_in = AUTOCAST_TO.get(mixed_precision) or inner.dtype
    if _shares_keys(config) and not _attends_shared_keys(inner.device, attends_in):
        return model_inputs
    return {name: value for name, value in model_inputs.items() if name != "attention_mask"}


def _shares_keys(config: PretrainedConfig) -> bool:
    try:
        heads = getattr(config, "num_attention_heads", None)
        return getattr(config, "num_key_value_heads", heads) != heads
    except RuntimeError:  # transformers' answer where layers differ in it
        return True


def _attends_shared_keys(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch has an attention for heads that share keys without a mask: on a GPU that is FlashAttention alone,
    in half precision from compute capability 8.0 on; else it would write [B, heads, T, T] out.
    """
    if device.type != "cuda":
        return True
    return dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(device) >= (8, 0)


def logit_options(config: PretrainedConfig) -> dict[str, float | None]:
    """``logit_scale`` and ``logit_softcap`` of the logits a configuration describes."""
    text = config.get_text_config()
    is_multiplying = text.model_type in MULTIPLYING
    scale = 1.0
    for name in MULTIPLIED_BY + DIVIDED_BY:
        factor = getattr(text, name, None)
        if factor and not isinstance(factor, str):  # MPT's may be the name of a rule, which its model does not follow
            scale = scale * factor if name in MULTIPLIED_BY or is_multiplying else scale / factor
    softcaps = (getattr(text, name, None) for name in SOFT_CAPPED_BY)
    return {"logit_scale": scale, "logit_softcap": next(filter(None, softcaps), None)}


def positions(config: PretrainedConfig) -> int | None:
    """The longest sequence that the model described was made for, in tokens. None: the configuration says none."""
    text = config.get_text_config()
    stated = getattr(text, "max_position_embeddings", None)
    if stated is None or stated < 1:  # XLNet says -1
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or stated
    return max(stated, int(original * (rope.get("factor") or 1)))  # what is stated may be the length before stretching


def _check_call(function: Callable, model_inputs: Any, arguments: dict[str, Any]) -> None:
    if not isinstance(model_inputs, Mapping):
        raise TypeError(
            "model_inputs must be a mapping of the model's arguments, {'input_ids': ..., ...}, "
            f"got {type(model_inputs).__name__}"
        )
    # of a Fused...Loss, of a functools.partial
    held = {
        **getattr(getattr(function, "func", function), "options", {}),
        **getattr(function, "keywords", {}),
        **arguments,
    }
    for name in ("logit_scale", "logit_softcap"):
        if name in held:
            raise ValueError(f"{name}={held[name]} is given, expected none: the model's configuration says it")


# ---- inside the model's forward -----------------------------------------------------------------------------------


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


def _forward_like(forward: Callable) -> Callable:
    """``forward`` that takes a ``fused_call``, under the signature that ``generate`` and ``Trainer`` look at."""

    def fused_forward(self: PreTrainedModel, *args, fused_call: FusedCall | None = None, **kwargs) -> Any:
        if fused_call is None:
            unfused = self._unfused_forward
            return type(self).forward(self, *args, **kwargs) if unfused is None else unfused(*args, **kwargs)
        gradient_path, outcome, routed = call_at_head(self, fused_call, *args, **kwargs)
        if routed is not None and _is_loss(outcome.result):
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


def _head_forward(self: nn.Linear, hidden: torch.Tensor, fused_call: Callable | None = None) -> Any:
    if fused_call is None:
        return type(self).forward(self, hidden)
    result = fused_call(hidden, self.weight, self.bias)
    return result[0] if isinstance(result, tuple) else result, Outcome(result)


_head_forward.__name__ = "forward"  # by which pickle finds the class's own in what it restores


def _is_loss(result: Any) -> bool:
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
        raise _unknown_router_loss(model)
    loss = balance(router_logits, model.num_experts, model.num_experts_per_tok, attention_mask)
    return model.router_aux_loss_coef * loss


def _unknown_router_loss(model: PreTrainedModel) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__}'s router loss is not a known one: train without it "
        "(model.config.output_router_logits = False), or add it yourself to a loss of the model's logits"
    )


# ---- what may be attached -----------------------------------------------------------------------------------------


def check_is_decoder(model: nn.Module) -> None:
    """Refuse what reads one sequence and writes another."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise _no_causal_model(model)


def _no_causal_model(model: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} is no causal language model with an LM head: load AutoModelForCausalLM"
    )


def head_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """The plain linear layer that is the LM head, or the copies of it that PEFT's ``modules_to_save`` holds."""
    name = type(model).__name__
    check_is_decoder(model)
    head = model.get_output_embeddings()
    if head is None:
        raise _no_causal_model(model)
    if type(head).__name__ == "ModulesToSaveWrapper":
        layers = [head.original_module, *head.modules_to_save.values()]
    else:
        layers = [head]
    for layer in {head, *layers}:
        _check_hooks(name, layer)
    for layer in layers:
        if type(layer).__module__.startswith("peft."):
            raise UnsupportedModelError(
                f"{name}'s LM head carries an adapter ({type(layer).__name__}), which the fused loss would neither "
                "apply nor train: leave 'lm_head' out of target_modules and trainable_token_indices, train it whole "
                "with modules_to_save=['lm_head'], or train from logits (in this package's trainers: "
                "loss_from='logits')"
            )
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            raise UnsupportedModelError(
                f"{name}'s LM head is a {type(layer).__name__}, not a plain nn.Linear: keep the head out of "
                "quantisation and casts (llm_int8_skip_modules=['lm_head'])"
            )
        if not layer.weight.is_floating_point():
            raise UnsupportedModelError(
                f"{name}'s LM head is quantised to {layer.weight.dtype}: keep the head out "
                "(llm_int8_skip_modules=['lm_head'])"
            )
        if _forward_of(layer) not in (nn.Linear.forward, _head_forward):
            raise UnsupportedModelError(
                f"{name}'s LM head has a forward of its own (a patch, or accelerate's hooks of a device_map), which "
                "the fused loss would pass by: remove it, or put the whole model on one device"
            )
    return layers


def _check_hooks(name: str, layer: nn.Module) -> None:
    """Refuse hooks that read or change what the LM head returns, or the gradient by it: under a fused loss it returns
    that loss, and no logits. Pre-hooks and parametrizations see the same hidden states and weight as ever.
    """
    kinds = {
        "forward hook": layer._forward_hooks,
        "backward hook": layer._backward_hooks,
        "backward pre-hook": layer._backward_pre_hooks,
    }
    for kind, hooks in kinds.items():
        for hook in hooks.values():
            owner = _owner(hook)
            module = getattr(owner, "__module__", None) or type(owner).__module__
            if module.startswith(HOOKED_BY):
                continue
            hook_name = getattr(owner, "__qualname__", type(owner).__name__)
            raise UnsupportedModelError(
                f"{name}'s LM head has a {kind} ({module}.{hook_name}), which expects logits where the fused "
                "loss makes none: remove it, or train from logits (in a trainer: loss_from='logits')"
            )


def _owner(hook: Callable) -> Any:
    """The function under a hook's partials, methods and decorators, or the object that is called."""
    while True:
        if isinstance(hook, functools.partial):
            hook = hook.func
        elif hasattr(hook, "__func__"):
            hook = hook.__func__
        elif hasattr(hook, "__wrapped__"):
            hook = hook.__wrapped__
        else:
            return hook


def _forward_of(module: nn.Module) -> Callable:
    return getattr(module.forward, "__func__", module.forward)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and router noise off, without a lasting change of any module's mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def keeping_trainable(model: nn.Module) -> Iterator[None]:
    """What asks for a gradient does so afterwards, and nothing else: where PEFT switches adapters back on, it asks for
    one of all their weights, the frozen ones too.
    """
    before = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for name, now in model.named_parameters():  # FSDP2 may have put another tensor in the place
            parameter, is_trainable = before.get(name, (now, now.requires_grad))
            parameter.requires_grad_(is_trainable)
            now.requires_grad_(is_trainable)


def checked_logits(model: PreTrainedModel) -> torch.Tensor:
    """The model's own logits [1, CHECKED_TOKENS, V] of a few fixed tokens, without dropout and without a gradient."""
    input_ids = _tokens_to_check(model)
    with evaluating(model), _made_to_run(model, input_ids.device):
        return model(input_ids=input_ids, use_cache=False, return_dict=True).logits


def is_reproduced(logits: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether two results of the same computation agree, to half the digits: experts, and a GPU's sums, may round by
    the order in which they come.
    """
    rounding = torch.finfo(logits.dtype).eps ** 0.5 * logits.double().abs().max()
    return bool((logits.double() - others.double()).abs().max() <= rounding)


class Unreached(NamedTuple):
    """Names of trainable parameters that the logits of text do not depend on."""

    outside: list[str]  # of the language model: vision and audio towers, their projectors
    inside: list[str]  # of it: what a few tokens do not reach, but others may (experts of a mixture)


def unreached_by_text(model: PreTrainedModel) -> Unreached:
    """Which trainable parameters get no gradient from text.

    The graph of a few tokens' logits says which parameters it ends in; no gradient is computed. What it does not end in
    is never reached where it lies outside of the language model (``get_decoder()``), its embeddings and its head: no
    token can bring a vision tower in. Inside, it may depend on the tokens.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    input_ids = _tokens_to_check(model)
    modes = {module: module.training for module in model.modules()}
    model.eval()  # without dropout, which would draw from the random state
    try:
        with torch.enable_grad(), _made_to_run(model, input_ids.device):
            logits = model(input_ids=input_ids, use_cache=False, return_dict=True).logits
    finally:
        for module, is_training in modes.items():
            module.training = is_training
    reached = _leaves(logits)
    inside = {
        id(parameter)
        for part in (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
        if part is not None
        for parameter in part.parameters()
    }
    missed = {name: id(parameter) for name, parameter in trainable.items() if id(parameter) not in reached}
    return Unreached(
        [name for name, key in missed.items() if key not in inside],
        [name for name, key in missed.items() if key in inside],
    )


def parts_of(model: PreTrainedModel, parameters: list[str]) -> list[str]:
    """The largest modules that hold the parameters and nothing of the language model, by name."""
    decoder = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    around = {tuple(path.split(".")[:depth]) for depth in range(path.count(".") + 2)}
    found = set()
    for parameter in parameters:
        steps = tuple(parameter.split("."))
        found.add(next(".".join(steps[:depth]) for depth in range(1, len(steps) + 1) if steps[:depth] not in around))
    return sorted(found)


def _leaves(tensor: torch.Tensor) -> set[int]:
    """The ids of the parameters in which the tensor's graph ends."""
    waiting, seen, found = [tensor.grad_fn], set(), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting.extend(following for following, _ in node.next_functions)
    return found


def check_is_causal(model: PreTrainedModel) -> None:
    """Refuse a model whose logits at a token depend on those after it, which are what it is asked for; with a mask that
    leaves nothing out, and without one where training leaves it out.
    """
    input_ids = _tokens_to_check(model)
    seen = input_ids.shape[1] // 2
    others = input_ids.clone()
    others[:, seen:] = (others[:, seen:] + 1) % _vocab_size(model)
    options = {"use_cache": False, "return_dict": True}
    ways = [options]
    if "attention_mask" in inspect.signature(model.forward).parameters:
        masked = {**options, "attention_mask": torch.ones_like(input_ids)}
        unmasked = without_padding_mask(model, masked, "bf16")  # in which most models may do without
        ways = [masked] if unmasked is masked else [masked, unmasked]
    for options in ways:
        with evaluating(model), _made_to_run(model, input_ids.device):
            logits = [model(input_ids=ids, **options).logits for ids in (input_ids, others)]
        before, after = (of_all[:, :seen].double() for of_all in logits)
        # half the digits, for experts may round by how many tokens each of them gets
        rounding = torch.finfo(logits[0].dtype).eps ** 0.5 * before.abs().max()
        if (before - after).abs().max() > rounding:
            raise UnsupportedModelError(
                f"{type(model).__name__} is no causal language model as it is configured: its logits at a token change "
                "with the tokens after it (BERT and its relatives need config.is_decoder = True)"
            )


def _tokens_to_check(model: PreTrainedModel) -> torch.Tensor:
    """[1, CHECKED_TOKENS] random token ids, fewer where the model has fewer positions, on its device."""
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    if device.type == "meta":
        raise UnsupportedModelError("model lies on the meta device: load its weights first")
    if hasattr(embeddings.weight, "ds_id") and not embeddings._forward_pre_hooks:
        raise UnsupportedModelError(
            "model was partitioned by DeepSpeed ZeRO-3, whose engine alone gathers its weights: make the engine first "
            "(deepspeed.initialize), and pass it to apply or attach"
        )
    generator = torch.Generator().manual_seed(0)
    length = min(CHECKED_TOKENS, positions(model.config) or CHECKED_TOKENS)
    return torch.randint(_vocab_size(model), (1, length), generator=generator, device="cpu").to(device)


def _vocab_size(model: PreTrainedModel) -> int:
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    return size or len(model.get_input_embeddings().weight)


def _check_logits(model: PreTrainedModel) -> None:
    """Compare the model's logits of a few tokens with its head, scale and soft cap applied to its hidden states; and,
    where half precision or small logits would hide a difference, what it makes of float32 numbers put in the head's
    place.
    """
    input_ids = _tokens_to_check(model)
    with evaluating(model), _made_to_run(model, input_ids.device):
        own = model(input_ids=input_ids, use_cache=False, return_dict=True).logits
        _, outcome = model(input_ids=input_ids, fused_call=FusedCall(_plain_logits, {}))
        (ours,) = outcome.result
        probe = torch.linspace(-PROBED, PROBED, ours.numel(), device=ours.device).view(ours.shape)
        with _head_giving(model, probe):
            own_of_probe = model(input_ids=input_ids, use_cache=False, return_dict=True).logits
    _compare(model, own, ours)
    options = logit_options(model.config)
    if model.config.get_text_config().model_type in SCALING_HIDDEN:
        options["logit_scale"] = 1.0  # what the head gives is scaled already
    _compare(model, own_of_probe, _transformed(probe, **options))


def _compare(model: PreTrainedModel, own: torch.Tensor, ours: torch.Tensor) -> None:
    name = type(model).__name__
    if own.shape != ours.shape:
        raise UnsupportedModelError(
            f"{name}'s logits are {tuple(own.shape)}, its LM head gives {tuple(ours.shape)}: {FROM_LOGITS}"
        )
    if not ours.isfinite().all():
        raise UnsupportedModelError(
            f"{name}'s logits are not finite: its weights hold NaN or infinities, or overflow {ours.dtype}"
        )
    eps = max(torch.finfo(own.dtype).eps, torch.finfo(ours.dtype).eps)
    difference, largest = (own.double() - ours.double()).abs().max(), own.double().abs().max()
    if not difference <= ROUNDINGS * eps * largest:
        raise UnsupportedModelError(
            f"{name}'s logits differ by up to {difference:.1e} (largest {largest:.1e}) from its head with "
            f"{logit_options(model.config)}: it computes something else there, so {FROM_LOGITS}"
        )


def _plain_logits(hidden, lm_head_weight, lm_head_bias, logit_scale, logit_softcap) -> tuple[torch.Tensor]:
    if hidden.shape[-1] != lm_head_weight.shape[1]:
        raise UnsupportedModelError(
            f"model's hidden states are {hidden.shape[-1]} wide and its LM head takes {lm_head_weight.shape[1]}: it "
            f"computes something in between, so {FROM_LOGITS}"
        )
    return (_transformed(F.linear(hidden, lm_head_weight, lm_head_bias), logit_scale, logit_softcap),)


def _transformed(logits: torch.Tensor, logit_scale: float, logit_softcap: float | None) -> torch.Tensor:
    logits = logits * logit_scale
    return logits if logit_softcap is None else logit_softcap * torch.tanh(logits / logit_softcap)


@contextmanager
def _head_giving(model: PreTrainedModel, logits: torch.Tensor) -> Iterator[None]:
    """The LM head answers with these logits, whatever it is given."""
    layers = head_layers(model)
    try:
        for layer in layers:
            layer.forward = lambda hidden: logits
        yield
    finally:
        for layer in layers:
            layer.forward = MethodType(_head_forward, layer)


@contextmanager
def _made_to_run(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Autocast for a model that keeps some weights (its head, its norms) in float32 and others in half precision, which
    may run in nothing else; and an attention that runs where the model lies now: a GPU's kernels do not before it is
    moved there, nor, outside autocast, with float32 weights.
    """
    dtypes = {parameter.dtype for parameter in model.parameters()}
    half = next((dtype for dtype in AUTOCAST_TO.values() if dtype in dtypes), None)
    is_mixed = half is not None and torch.float32 in dtypes
    chosen = getattr(model.config, "_attn_implementation", None)
    is_replaced = chosen not in (None, "eager", "sdpa") and not (model.dtype == half and device.type != "cpu")
    if is_replaced:
        model.set_attn_implementation("eager")
    try:
        with torch.autocast(device.type, half) if is_mixed else nullcontext():
            yield
    finally:
        if is_replaced:
            model.set_attn_implementation(chosen)
