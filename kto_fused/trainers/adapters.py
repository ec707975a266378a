"""PEFT adapters as the reference of a run.

A model with adapters needs no second model as its reference: the same weights with other adapters active, or with
none, compute the reference's log-probabilities. This module finds an adapter that is meant as the reference, copies the
trained adapter where its start is the reference, switches to the reference's adapters and back, and keeps the copies
out of saved models. ``reference`` decides which of these a run needs.
"""

import copy
import functools
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
import xxhash
from torch import nn

from . import fingerprints

REFERENCE_NAMES = ("ref", "reference")  # an adapter of one of these names is the reference, unless it is trained
COPIES = "_kto_fused_copies"  # attribute of a PeftModel: {name: configuration} of the copies that a trainer made
PLAIN = (bool, int, float, str, type(None))  # types of values that are hashed by their text
MODULE_DICTS = ("_parameters", "_buffers", "_modules")  # dicts of nn.Module whose keys are not names of adapters


def named_reference(model: nn.Module) -> str | None:
    """Return the adapter whose name makes it the reference; None if there is none, or the policy uses it itself."""
    ours = copies(model)
    return next(
        (
            name
            for name in REFERENCE_NAMES
            if name in model.peft_config and name not in ours and name not in model.active_adapters
        ),
        None,
    )


def is_trained(model: nn.Module, adapter: str) -> bool:
    """Whether a weight of the adapter requires a gradient."""
    return any(parameter.requires_grad for parameter in parameters_of(model, adapter))


def freeze(model: nn.Module, adapter: str) -> None:
    """Let no weight of the adapter require a gradient."""
    for parameter in parameters_of(model, adapter):
        parameter.requires_grad_(False)


def changes_nothing(model: nn.Module, adapter: str) -> bool:
    """Whether the model with ``adapter`` is exactly the model without it. False where that cannot be shown.

    LoRA and AdaLoRA add a product, which is 0 if one factor is 0. DoRA and other variants round on the way, and
    other methods are not examined.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    def is_unchanged(module: nn.Module) -> bool:
        if isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save
            return adapter not in trained or _is_copy(trained[adapter], module.original_module)
        if isinstance(module, TrainableTokensLayer):
            rows, originals = module.trainable_tokens_delta, module.trainable_tokens_original
            return adapter not in rows or _is_equal(rows[adapter], originals[adapter])
        if isinstance(module, BaseTunerLayer) and adapter in module._get_available_adapters():
            return isinstance(module, LoraLayer) and _adds_zero(module, adapter)
        return True

    return all(is_unchanged(module) for module in model.modules())


def _is_copy(module: nn.Module, original: nn.Module) -> bool:
    tensors, originals = module.state_dict(), original.state_dict()
    return tensors.keys() == originals.keys() and all(
        _is_equal(tensor, originals[name]) for name, tensor in tensors.items()
    )


def _is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other.to(one.device))


def _adds_zero(layer: nn.Module, adapter: str) -> bool:
    if adapter in getattr(layer, "lora_variant", {}) or layer.use_dora.get(adapter):
        return False
    containers = (getattr(layer, name, {}) for name in ("lora_E", "lora_B", "lora_embedding_A", "lora_embedding_B"))
    factors = [_parameters(held[adapter]) for held in containers if adapter in held]  # lora_B's may hold a bias
    return any(not any(parameter.detach().any() for parameter in factor) for factor in factors)


# ---- copies -------------------------------------------------------------------------------------------------------


def copy_adapters(model: nn.Module, adapters: list[str]) -> dict[str, str]:
    """Add a frozen, inactive copy of each adapter, as it is now, to the model.

    Entries are copied one by one, whatever the method, so nothing is drawn, initialised or cast. PEFT's own
    ``add_adapter`` would draw from the random state, and with some ``init_lora_weights`` (PiSSA) it would rewrite the
    base weights again.

    Returns:
        The name of each adapter's copy, by the adapter's name.
    """
    names: dict[str, str] = {}
    for adapter in adapters:
        taken = {*model.peft_config, *names.values()}
        numbered = (f"ref_{number}" for number in range(2, len(taken) + 3))
        names[adapter] = next(name for name in (*REFERENCE_NAMES, *numbered) if name not in taken)
    memo: dict[int, Any] = {}  # one memo for all copies, so that shared weights are shared in the copy too
    for module in _owners(model):
        for held in _containers(module):
            for adapter, name in names.items():
                # methods that share weights hold one container in many places, so it may have the copy already
                if adapter in held and name not in held:
                    held[name] = _copied(held[adapter], memo)
        if isinstance(getattr(module, "_adapters", None), set):
            module._adapters |= {name for adapter, name in names.items() if adapter in module._adapters}
    for name in names.values():
        model.peft_config[name].inference_mode = True
        freeze(model, name)
    setattr(model, COPIES, {name: model.peft_config[name] for name in names.values()})
    return names


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    from peft import PeftConfig

    if isinstance(value, (nn.Module, torch.Tensor, PeftConfig)):
        return copy.deepcopy(value, memo)
    return copy.copy(value) if isinstance(value, (list, dict, set)) else value


def drop_copies(model: nn.Module) -> None:
    """Remove the copies that an earlier trainer left in the model: the policy has been trained since."""
    names = copies(model)
    for module in _owners(model):
        for held in _containers(module):
            for name in names & set(held):
                del held[name]
        if isinstance(getattr(module, "_adapters", None), set):
            module._adapters -= names
    if hasattr(model, COPIES):
        delattr(model, COPIES)


def copies(model: nn.Module) -> set[str]:
    """Return the names of the copies in the model; an adapter that the user has put under such a name is no copy."""
    made = getattr(model, COPIES, {})
    return {name for name, config in made.items() if model.peft_config.get(name) is config}


@contextmanager
def saving_all_but(model: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """While entered, let the model's ``save_pretrained`` write every adapter except ``names``."""
    selected = [name for name in model.peft_config if name not in names]
    model.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=selected)
    try:
        yield
    finally:
        del model.save_pretrained


# ---- use ----------------------------------------------------------------------------------------------------------


@contextmanager
def switched_to(model: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """While entered, make the adapters ``names`` the active ones, or with no names switch adapters off.

    PEFT lets the weights of an active adapter require gradients; ``huggingface.running.keeping_trainable`` undoes that.
    """
    before = model.base_model.active_adapter
    if not names:
        with model.disable_adapter():
            yield
    elif list(names) == list(model.active_adapters):
        yield
    else:
        model.base_model.set_adapter(list(names))
        try:
            yield
        finally:
            model.base_model.set_adapter(before)


def fingerprint(model: nn.Module, names: tuple[str, ...]) -> str:
    """Return a hash of the adapters' weights and numbers (scale, rank), whatever the adapters are called."""
    digest = xxhash.xxh3_128(str(len(names)).encode())
    for name in names:
        for path, module in model.named_modules():
            if not _is_owner(module):
                continue
            for key, held in _named_containers(module):
                if name in held and key != "peft_config":
                    _update(digest, f"{path} {key}", held[name])
    return digest.hexdigest()


def _update(digest: Any, name: str, value: Any) -> None:
    tensors = {"": value} if isinstance(value, torch.Tensor) else {}
    if isinstance(value, nn.Module):
        tensors = value.state_dict(keep_vars=True)
    digest.update(f"{name} {value if isinstance(value, PLAIN) else type(value).__name__}".encode())
    for key, tensor in sorted(tensors.items()):
        fingerprints.add_tensor(digest, key, tensor)


# ---- where PEFT keeps adapters ------------------------------------------------------------------------------------


def _is_owner(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper))


def _owners(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _is_owner(module)]


def _named_containers(module: nn.Module) -> Iterator[tuple[str, MutableMapping]]:
    """Yield the module's mappings from an adapter's name to a layer, parameter, buffer or number, by their names."""
    for key, value in {**vars(module), **module._modules}.items():
        is_mapping = isinstance(value, (dict, nn.ModuleDict, nn.ParameterDict)) or type(value).__name__ == "BufferDict"
        if is_mapping and key not in MODULE_DICTS:
            yield key, value


def _containers(module: nn.Module) -> list[MutableMapping]:
    return [held for _, held in _named_containers(module)]


def parameters_of(model: nn.Module, adapter: str) -> Iterator[nn.Parameter]:
    """Yield all weights of one adapter."""
    for module in _owners(model):
        for held in _containers(module):
            if adapter in held:
                yield from _parameters(held[adapter])


def _parameters(value: Any) -> list[nn.Parameter]:
    if isinstance(value, nn.Parameter):
        return [value]
    return list(value.parameters()) if isinstance(value, nn.Module) else []
