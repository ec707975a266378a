"""Fused losses of Hugging Face causal language models, whose logits are never in memory.

``apply(function, model, model_inputs, ...)`` runs the model up to its LM head and calls a loss of this package there,
with the hidden states and the head's weights. For a model that cannot be used in this way, ``apply_to_logits`` takes
the loss of its logits. ``attach`` prepares a model before it is wrapped; ``detach`` undoes that.

The loss is called inside the model's own ``forward``. So everything that wraps the model (PEFT,
DistributedDataParallel, FSDP2, ``torch.compile``, autocast) works as it does for logits: adapters are on or off,
sharded weights are gathered around the head, and gradients are reduced.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import nn

from .forward import FusedCall, Outcome, forward_like, forward_of, head_forward, is_loss, unknown_router_loss
from .inspect import check_is_causal, check_logits, check_scores, head_layers
from .wrappers import UnsupportedModelError, head_of, is_scorer, unwrap

__all__ = ["UnsupportedModelError", "apply", "apply_to_logits", "attach", "detach", "unwrap"]


def apply(function: Callable, model: nn.Module, model_inputs: dict[str, Any], **arguments) -> Any:
    """Call a loss or log-probability function on a model's hidden states and LM head.

    ``function(hidden=, lm_head_weight=, lm_head_bias=, logit_scale=, logit_softcap=, **arguments)`` runs once, inside
    the model's forward. If a mixture of experts is configured to return router logits, its auxiliary loss times
    ``router_aux_loss_coef`` is added to the loss, as the model's own forward does. With ``reduction="none"`` it is
    added to each sequence's loss. It is not added to log-probabilities.

    A reward model (``AutoModelForSequenceClassification`` of a causal model) has a layer ``score`` in the place of an
    LM head: ``function(hidden=, score_weight=, score_bias=, **arguments)`` runs there, such as
    ``linear_bradley_terry_loss``.

    Args:
        function: takes hidden states: ``fused_linear_loss``, with ``head=`` any loss among the arguments,
            ``fused_linear_kto_loss``, ``fused_linear_dpo_loss``, ``linear_sequence_logps``, ``linear_token_logps``, or
            a twin of theirs in ``reference``. A function of your own that returns a tuple must return a loss first.
        model: a ``PreTrainedModel`` with an LM head or a score, bare or wrapped (PEFT, DDP, FSDP2,
            ``torch.compile``).
        model_inputs: for the model's backbone: ``input_ids`` [B, T], ``attention_mask``, ``position_ids``, ...
        arguments: for ``function``: ``labels`` and its other arguments, except for ``logit_scale`` and
            ``logit_softcap``, which come from the model's configuration.

    Returns:
        The return value of ``function``.

    Raises:
        UnsupportedModelError, TypeError: see ``attach``.
        TypeError: ``model_inputs`` is not a mapping.
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
    >>> loss, metrics = huggingface.apply(
    ...     kto_fused.fused_linear_loss, model, {"input_ids": input_ids}, head="orpo", labels=input_ids
    ... )
    """
    _check_call(function, model_inputs, arguments)
    attach(model)
    returned = model(**model_inputs, fused_call=FusedCall(function, arguments))
    if not isinstance(returned, tuple) or not isinstance(returned[-1], Outcome):
        raise UnsupportedModelError(
            f"model ({type(model).__name__}) still calls the forward from before attach: call "
            "kto_fused.huggingface.attach(model) before it is wrapped"
        )
    gradient_path, outcome = returned
    first, *others = outcome.results(gradient_path)
    if not isinstance(outcome.result, tuple):
        return first
    if outcome.aux_loss is not None:
        first = first + outcome.aux_loss.to(first)
    return first, *others


def apply_to_logits(function: Callable, model: nn.Module, model_inputs: dict[str, Any], **arguments) -> Any:
    """Call a loss or log-probability function on a model's logits, for a model that ``attach`` refuses.

    ``function(logits, **arguments)`` runs once. The auxiliary loss of a mixture of experts is added as in ``apply``.

    Args:
        function: takes logits [B, T, V] as its first argument, or by the name ``policy_logits`` or ``logits``:
            ``fused_loss``, with ``head=`` any loss among the arguments, ``fused_kto_loss``, ``fused_dpo_loss``,
            ``sequence_logps``, ``token_logps``, or a twin of theirs in ``reference``.
        model: any model that returns ``logits``, bare or wrapped.
        model_inputs: arguments of the model, as in ``apply``.
        arguments: for ``function``, as in ``apply``. ``logit_scale`` and ``logit_softcap`` are refused here too: the
            model has applied them to its logits already.

    Returns:
        The return value of ``function``.

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
    result = _call_on_logits(function, outputs.logits, arguments)
    aux_loss = getattr(outputs, "aux_loss", None)
    if aux_loss is None or not is_loss(result):
        return result
    inner = unwrap(model)
    if not hasattr(inner, "router_aux_loss_coef"):
        raise unknown_router_loss(inner)
    return result[0] + inner.router_aux_loss_coef * aux_loss.to(result[0]), *result[1:]


def _call_on_logits(function: Callable, logits: torch.Tensor, arguments: dict[str, Any]) -> Any:
    """Call a function on logits: by name where they are not its first argument, as in ``fused_loss(head, ...)``."""
    parameters = () if isinstance(function, nn.Module) else signature(function).parameters
    name = next((name for name in ("policy_logits", "logits") if name in parameters), None)
    return function(logits, **arguments) if name is None else function(**{name: logits}, **arguments)


def _check_call(function: Callable, model_inputs: Any, arguments: dict[str, Any]) -> None:
    if not isinstance(model_inputs, Mapping):
        raise TypeError(
            "model_inputs must be a mapping of the model's arguments, {'input_ids': ..., ...}, "
            f"got {type(model_inputs).__name__}"
        )
    # a Fused...Loss holds options, a functools.partial holds keywords, and a partial of a Fused...Loss holds both
    held = {
        **getattr(getattr(function, "func", function), "options", {}),
        **getattr(function, "keywords", {}),
        **arguments,
    }
    for name in ("logit_scale", "logit_softcap"):
        if name in held:
            raise ValueError(f"{name}={held[name]} is given, expected none: the model's configuration sets it")


def attach(model: nn.Module) -> None:
    """Teach a model's forward to call a fused loss in place of its LM head.

    ``apply`` does it at its first call. Call ``attach`` yourself before ``accelerate`` or another wrapper takes the
    model. Without a loss the forward does what it did before, so generating, saving and copying are unchanged.

    The model's own logits are compared once, on a few tokens, with the logits that the loss would make. A model that
    computes anything else between its hidden states and its logits is refused: it would be trained wrongly.

    Args:
        model: as in ``apply``. Attaching it again changes nothing.

    Raises:
        UnsupportedModelError: the fused loss cannot be called in this model, for one of these reasons.

            - The LM head is missing or not a plain linear layer: it carries an adapter, or is quantised.
            - The LM head has hooks that expect logits.
            - Prompts are learned, or attention sees later tokens.
            - The logits are not finite, or are more than the LM head's output with a scale and a soft cap.
            - The backbone is not found beside the LM head, or a router's auxiliary loss is not a known one.
            - ``config.return_dict`` is off.
            - The model is wrapped in ``nn.DataParallel``, was prepared by accelerate before, lies on the meta device,
              or was partitioned by DeepSpeed ZeRO-3 and is not in an engine.
        TypeError: ``model`` holds no ``PreTrainedModel``.

    >>> from kto_fused import huggingface
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    ...                                      num_attention_heads=2, num_key_value_heads=2))
    >>> huggingface.attach(model)
    """
    inner = unwrap(model)
    layers = head_layers(inner)
    # a model that pickle loaded has ``_unfused_forward``, but its class's own forward
    is_attached = hasattr(inner, "_unfused_forward") and forward_of(inner) is not type(inner).forward
    if not is_attached and "_original_forward" in inner.__dict__:
        raise UnsupportedModelError(
            "model was prepared by accelerate before attach, so the fused loss would run outside of its autocast: "
            "call kto_fused.huggingface.attach(model) before accelerator.prepare(model)"
        )
    for layer in layers:  # at every call, because the head may have been replaced since the last one
        if forward_of(layer) is not head_forward:
            layer.forward = MethodType(head_forward, layer)
    if is_attached:
        return
    if not inner.config.return_dict:
        raise UnsupportedModelError(
            "model.config.return_dict is False, with which transformers' own models fail to run: set it to True"
        )
    # An instance's own forward is somebody else's patch, which ``detach`` restores. Ours is a bound method, so that a
    # deep copy of the model calls the copy's weights.
    inner._unfused_forward = inner.__dict__.get("forward")
    inner.forward = MethodType(forward_like(type(inner).forward), inner)
    try:
        check_is_causal(inner)
        check_scores(inner) if is_scorer(inner) else check_logits(inner)
    except BaseException:
        detach(inner)
        raise


def detach(model: nn.Module) -> None:
    """Give the model back the forward it had before ``attach``. A model that is not attached stays as it is."""
    inner = unwrap(model)
    if not hasattr(inner, "_unfused_forward"):
        return
    for layer in head_of(inner).modules():
        if forward_of(layer) is head_forward:
            del layer.forward
    del inner.forward
    if inner._unfused_forward is not None:
        inner.forward = inner._unfused_forward
    del inner._unfused_forward
