"""Hugging Face causal language models: their hidden states and LM head go to a fused loss, and logits never exist.

The loss is called inside the model's own ``forward``, at the place of its LM head, so that whatever wraps the model
(PEFT, DistributedDataParallel, FSDP2, ``torch.compile``, autocast) does its part as it does for logits: adapters are
on or off, sharded weights are gathered around the head, gradients are reduced behind it.
"""

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

from torch import nn

from .config import UnsupportedModelError, unwrap
from .forward import FusedCall, Outcome, forward_like, forward_of, head_forward, is_loss, unknown_router_loss
from .inspect import check_is_causal, check_logits, head_layers

__all__ = ["UnsupportedModelError", "apply", "apply_to_logits", "attach", "detach", "unwrap"]


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
    if aux_loss is None or not is_loss(result):
        return result
    inner = unwrap(model)
    if not hasattr(inner, "router_aux_loss_coef"):
        raise unknown_router_loss(inner)
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
    is_attached = hasattr(inner, "_unfused_forward") and forward_of(inner) is not type(inner).forward
    if not is_attached and "_original_forward" in inner.__dict__:
        raise UnsupportedModelError(
            "model was prepared by accelerate before it knew the fused loss, which would run outside of autocast: "
            "call kto_fused.huggingface.attach(model) before accelerator.prepare(model)"
        )
    for layer in layers:  # each time: the head may have been replaced since
        if forward_of(layer) is not head_forward:
            layer.forward = MethodType(head_forward, layer)
    if is_attached:
        return
    if not inner.config.return_dict:
        raise UnsupportedModelError(
            "model.config.return_dict is False, under which transformers' own models fail to run: set it to True"
        )
    # an instance's own forward is somebody else's patch; as a bound method it follows the model when that is copied
    inner._unfused_forward = inner.__dict__.get("forward")
    inner.forward = MethodType(forward_like(type(inner).forward), inner)
    try:
        check_is_causal(inner)
        check_logits(inner)
    except BaseException:
        detach(inner)
        raise


def detach(model: nn.Module) -> None:
    """Give the model back the forward it had before ``attach``."""
    inner = unwrap(model)
    if not hasattr(inner, "_unfused_forward"):
        return
    for layer in inner.get_output_embeddings().modules():
        if forward_of(layer) is head_forward:
            del layer.forward
    del inner.forward
    if inner._unfused_forward is not None:
        inner.forward = inner._unfused_forward
    del inner._unfused_forward


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


head_forward.__name__ = "forward"  # by which pickle finds the class's own in what it restores
