"""May a model be attached? Checks of its LM head, its attention and its logits, which ``attach`` runs once.

A fused loss takes the hidden states and the LM head's weights, and makes the logits itself. That gives the model's own
logits only if the LM head is a plain linear layer and the model does nothing else between the head and the logits but
a scale and a soft cap that its configuration states. Every check refuses a model with an ``UnsupportedModelError``
that says what to do instead: it would be trained for something else than its logits.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .config import logit_options
from .forward import FusedCall, backbone_of, forward_of, head_forward
from .padding import without_padding_mask
from .running import evaluating, made_to_run, tokens_to_check, vocab_size
from .wrappers import FROM_LOGITS, UnsupportedModelError, head_of, is_scorer

# model types that scale the hidden states before their head, not the logits behind it
SCALING_HIDDEN = ("inkling_text", "minicpm3")
# Libraries whose hooks on the LM head are allowed: they shard and gather its weight, and pass its output on unread.
HOOKED_BY = ("torch.distributed", "deepspeed", "accelerate")
# how far the logits may differ, in roundings of the largest one
ROUNDINGS = 8
# logits from -PROBED to PROBED are put in the place of the head's output
PROBED = 100.0


# ---- the LM head ---------------------------------------------------------------------------------------------------


def head_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """Return the linear layer that is the LM head, or its copies where PEFT's ``modules_to_save`` holds several.

    In a reward model it is the layer ``score``.

    Raises:
        UnsupportedModelError: there is no such layer, or it is not a plain linear layer in floating point without
            hooks.
    """
    name = type(model).__name__
    check_is_decoder(model)
    head = head_of(model)
    if head is None:
        raise _no_causal_model(model)
    if type(head).__name__ == "ModulesToSaveWrapper":
        layers = [head.original_module, *head.modules_to_save.values()]
    else:
        layers = [head]
    for layer in {head, *layers}:
        _check_hooks(name, layer)
    for layer in layers:
        if type(layer).__module__.startswith("peft.") and is_scorer(model):
            raise UnsupportedModelError(
                f"{name}'s score carries an adapter ({type(layer).__name__}): leave 'score' out of target_modules and "
                "train it whole with modules_to_save=['score']"
            )
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
                f"{name}'s LM head is quantised to {layer.weight.dtype}: keep the head out of quantisation "
                "(llm_int8_skip_modules=['lm_head'])"
            )
        if forward_of(layer) not in (nn.Linear.forward, head_forward):
            raise UnsupportedModelError(
                f"{name}'s LM head has a forward of its own (a patch, or accelerate's hooks of a device_map), which "
                "the fused loss would bypass: remove it, or put the whole model on one device"
            )
    return layers


def check_is_decoder(model: nn.Module) -> None:
    """Refuse an encoder-decoder, which reads one sequence and writes another."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise _no_causal_model(model)


def _no_causal_model(model: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} is no causal language model with an LM head: load AutoModelForCausalLM"
    )


def _check_hooks(name: str, layer: nn.Module) -> None:
    """Refuse hooks that read or change the LM head's output or its gradient: in a fused loss the output is no logits.

    Pre-hooks and parametrizations are allowed: they get the hidden states and the weight that they always get.
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
                f"{name}'s LM head has a {kind} ({module}.{hook_name}), which expects logits, and the fused loss "
                "makes none: remove it, or train from logits (in a trainer: loss_from='logits')"
            )


def _owner(hook: Callable) -> Any:
    """Return the function under a hook's partials, methods and decorators, or the object that is called."""
    while True:
        if isinstance(hook, functools.partial):
            hook = hook.func
        elif hasattr(hook, "__func__"):
            hook = hook.__func__
        elif hasattr(hook, "__wrapped__"):
            hook = hook.__wrapped__
        else:
            return hook


# ---- the attention -------------------------------------------------------------------------------------------------


def check_is_causal(model: PreTrainedModel) -> None:
    """Refuse a model whose logits at a token depend on later tokens: they contain the answer that they are asked for.

    The model runs with a mask that leaves nothing out, and without a mask if training would leave it out.
    """
    input_ids = tokens_to_check(model)
    half = input_ids.shape[1] // 2
    changed = input_ids.clone()
    changed[:, half:] = (changed[:, half:] + 1) % vocab_size(model)
    options = {"use_cache": False, "return_dict": True}
    ways = [options]
    if "attention_mask" in inspect.signature(model.forward).parameters:
        masked = {**options, "attention_mask": torch.ones_like(input_ids)}
        unmasked = without_padding_mask(model, masked, "bf16")  # the precision in which most models drop the mask
        ways = [masked] if unmasked is masked else [masked, unmasked]
    for options in ways:
        with evaluating(model), made_to_run(model, input_ids.device):
            logits = [_of_tokens(model, input_ids=ids, **options) for ids in (input_ids, changed)]
        before, after = (each[:, :half].double() for each in logits)
        # half of the digits: an expert's rounding depends on how many tokens it gets
        rounding = torch.finfo(logits[0].dtype).eps ** 0.5 * before.abs().max()
        if (before - after).abs().max() > rounding:
            raise UnsupportedModelError(
                f"{type(model).__name__} is no causal language model as it is configured: its logits at a token change "
                "with the tokens after it (BERT and its relatives need config.is_decoder = True)"
            )


def _of_tokens(model: PreTrainedModel, **inputs: Any) -> torch.Tensor:
    """Return the logits of each token, or a reward model's hidden states."""
    return backbone_of(model)(**inputs).last_hidden_state if is_scorer(model) else model(**inputs).logits


def check_keeps_packed_apart(model: PreTrainedModel) -> None:
    """Refuse a model whose logits at a token depend on another sequence of the same row.

    The positions of packed sequences begin at 0 again. That alone tells the attention where a sequence begins, and
    transformers' attention masks follow it. A model with a recurrent or convolutional state carries it on.

    Raises:
        UnsupportedModelError: the second of two packed sequences has other logits than alone.
    """
    input_ids = tokens_to_check(model)
    half = input_ids.shape[1] // 2
    others = input_ids.clone()
    others[:, :half] = (others[:, :half] + 1) % vocab_size(model)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    restarted = torch.cat([positions[:, :half], positions[:, : input_ids.shape[1] - half]], 1)
    options = {"use_cache": False, "return_dict": True}
    with evaluating(model), made_to_run(model, input_ids.device):
        packed = [
            _of_tokens(model, input_ids=ids, position_ids=restarted, **options)[:, half:].double()
            for ids in (input_ids, others)
        ]
        alone = _of_tokens(model, input_ids=input_ids[:, half:], **options)
    largest, eps = alone.double().abs().max(), torch.finfo(alone.dtype).eps
    is_leaking = (packed[0] - packed[1]).abs().max() > ROUNDINGS * eps * largest
    if is_leaking or (packed[0] - alone).abs().max() > eps**0.5 * largest:
        attention = getattr(model.config, "_attn_implementation", None)
        raise UnsupportedModelError(
            f"{type(model).__name__} (attn_implementation={attention!r}) lets packed sequences see each other: its "
            "logits depend on the sequence before in the same row, so train it without packing"
        )


# ---- the logits ----------------------------------------------------------------------------------------------------


def keep_4bit_layers_differentiable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing a model's 4-bit layers for inference.

    On CPUs with AVX512-BF16 it packs them at the first pass in evaluation mode. The packed layers have no backward
    pass, and the gradient of everything before them would be lost.

    Raises:
        ValueError: layers are packed already, and the model has parameters to train.
    """
    is_trained = any(parameter.requires_grad for parameter in model.parameters())
    for name, layer in model.named_modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            state = getattr(getattr(layer, "weight", None), "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False) and is_trained:
                raise ValueError(
                    f"bitsandbytes has packed {name} for inference on this CPU, which has no backward pass: load the "
                    "model again, and train it before it generates or evaluates"
                )
            layer.support_avx512bf16_for_cpu = False


def check_logits(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are more than its head, scale and soft cap applied to its hidden states.

    The model's own logits of a few tokens are compared with those that the fused loss would make. Half precision and
    small logits could hide a difference there. So a second comparison puts float32 numbers from -PROBED to PROBED in
    the place of the head's output, and looks at the logits that the model makes of them.
    """
    keep_4bit_layers_differentiable(model)
    input_ids = tokens_to_check(model)
    with evaluating(model), made_to_run(model, input_ids.device):
        own = model(input_ids=input_ids, use_cache=False, return_dict=True).logits
        _, outcome = model(input_ids=input_ids, fused_call=FusedCall(_plain_logits, {}))
        (ours,) = outcome.result
        probe = torch.linspace(-PROBED, PROBED, ours.numel(), device=ours.device).view(ours.shape)
        with _head_giving(model, probe):
            own_of_probe = model(input_ids=input_ids, use_cache=False, return_dict=True).logits
    _compare(model, own, ours)
    options = logit_options(model.config)
    if model.config.get_text_config().model_type in SCALING_HIDDEN:
        options["logit_scale"] = 1.0  # such a model scales before the head, whose output the probe replaces
    _compare(model, own_of_probe, _scaled_and_capped(probe, **options))


def check_scores(model: PreTrainedModel) -> None:
    """Refuse a reward model whose score is more than its ``score`` applied to the hidden state of the last token."""
    keep_4bit_layers_differentiable(model)
    input_ids = tokens_to_check(model)
    pad_token_id = getattr(model.config.get_text_config(), "pad_token_id", None)
    if pad_token_id is not None:  # the model would take it for padding
        input_ids = torch.where(input_ids == pad_token_id, (input_ids + 1) % vocab_size(model), input_ids)
    with evaluating(model), made_to_run(model, input_ids.device):
        own = model(input_ids=input_ids, use_cache=False, return_dict=True).logits
        hidden = _of_tokens(model, input_ids=input_ids, use_cache=False, return_dict=True)
        # of all tokens, as the model computes it: a product of another shape rounds a score near 0 differently
        ours = head_of(model)(hidden)[:, -1]
        shape = (1, input_ids.shape[1], own.shape[-1])
        probe = torch.linspace(-PROBED, PROBED, input_ids.numel() * own.shape[-1], device=own.device).view(shape)
        with _head_giving(model, probe):
            own_of_probe = model(input_ids=input_ids, use_cache=False, return_dict=True).logits
    for theirs, expected in ((own, ours), (own_of_probe, probe[:, -1])):
        eps = max(torch.finfo(theirs.dtype).eps, torch.finfo(expected.dtype).eps)
        largest = theirs.double().abs().max()
        if theirs.shape != expected.shape or not (theirs.double() - expected.double()).abs().max() <= (
            ROUNDINGS * eps * largest
        ):
            raise UnsupportedModelError(
                f"{type(model).__name__} computes something else than the score of the last token's hidden state: "
                "it cannot be trained as a reward model here"
            )


def _plain_logits(hidden, lm_head_weight, lm_head_bias, logit_scale, logit_softcap) -> tuple[torch.Tensor]:
    """Return the logits in plain PyTorch; called like a fused loss."""
    if hidden.shape[-1] != lm_head_weight.shape[1]:
        raise UnsupportedModelError(
            f"model's hidden states are {hidden.shape[-1]} wide and its LM head takes {lm_head_weight.shape[1]}: it "
            f"computes something in between, so {FROM_LOGITS}"
        )
    return (_scaled_and_capped(F.linear(hidden, lm_head_weight, lm_head_bias), logit_scale, logit_softcap),)


def _scaled_and_capped(logits: torch.Tensor, logit_scale: float, logit_softcap: float | None) -> torch.Tensor:
    logits = logits * logit_scale
    return logits if logit_softcap is None else logit_softcap * torch.tanh(logits / logit_softcap)


@contextmanager
def _head_giving(model: PreTrainedModel, logits: torch.Tensor) -> Iterator[None]:
    """While entered, let the LM head return these logits, whatever hidden states it gets."""
    layers = head_layers(model)
    try:
        for layer in layers:
            layer.forward = lambda hidden: logits
        yield
    finally:
        for layer in layers:
            layer.forward = MethodType(head_forward, layer)


def _compare(model: PreTrainedModel, own: torch.Tensor, ours: torch.Tensor) -> None:
    """Raise an ``UnsupportedModelError`` if the model's ``own`` logits are not ``ours`` within ROUNDINGS."""
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
            f"{name}'s logits differ by up to {difference:.1e} (largest {largest:.1e}) from its LM head with "
            f"{logit_options(model.config)}: it computes something else there, so {FROM_LOGITS}"
        )
