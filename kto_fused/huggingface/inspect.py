"""Whether a model may be attached: its LM head, its attention and its logits."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .config import AUTOCAST_TO, FROM_LOGITS, UnsupportedModelError, logit_options, max_positions, without_padding_mask
from .forward import FusedCall, forward_of, head_forward

SCALING_HIDDEN = ("inkling_text", "minicpm3")  # model types that scale what their head is given, not its logits
# whose hooks on the LM head shard and gather its weight, and pass what it returns on unread
HOOKED_BY = ("torch.distributed", "deepspeed", "accelerate")
CHECKED_TOKENS = 8
ROUNDINGS = 8  # that those tokens' logits may be apart, of the largest
PROBED = 100.0


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
        if forward_of(layer) not in (nn.Linear.forward, head_forward):
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
    with evaluating(model), made_to_run(model, input_ids.device):
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
        with torch.enable_grad(), made_to_run(model, input_ids.device):
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
        with evaluating(model), made_to_run(model, input_ids.device):
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
    length = min(CHECKED_TOKENS, max_positions(model.config) or CHECKED_TOKENS)
    return torch.randint(_vocab_size(model), (1, length), generator=generator, device="cpu").to(device)


def _vocab_size(model: PreTrainedModel) -> int:
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    return size or len(model.get_input_embeddings().weight)


def check_logits(model: PreTrainedModel) -> None:
    """Compare the model's logits of a few tokens with its head, scale and soft cap applied to its hidden states; and,
    where half precision or small logits would hide a difference, what it makes of float32 numbers put in the head's
    place.
    """
    input_ids = _tokens_to_check(model)
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
            layer.forward = MethodType(head_forward, layer)


@contextmanager
def made_to_run(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
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
