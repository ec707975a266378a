"""Models as the trainers take them: loaded, given adapters, checked, and without dropout; and the random state kept."""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    PretrainedConfig,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..huggingface import files as model_files
from ..huggingface.config import max_positions
from .configs import AUTO, AUTO_MAX_LENGTH

logger = logging.getLogger(__name__)

# ``init_lora_weights`` that change the weights under the adapter too (PiSSA may have a number of iterations behind it)
REWRITING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Padding is masked everywhere, so any token will do."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0


def embedded_tokens(model: nn.Module | None) -> int | None:
    """How many tokens a model has embeddings of; of weights that are partitioned too. None: it does not say."""
    try:
        layers = model.get_input_embeddings().modules()  # PEFT may have wrapped something around the layer
    except (AttributeError, NotImplementedError):  # no model, no transformers model, one without such a layer
        return None
    return next((layer.num_embeddings for layer in layers if isinstance(layer, nn.Embedding)), None)


def is_partitioned(model: nn.Module) -> bool:
    """By DeepSpeed ZeRO-3, as it was loaded: what it marks parameters with."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def load(model: Any, dtype: torch.dtype | str, trust_remote_code: bool) -> Any:
    if not isinstance(model, str):
        return model
    return model_files.load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)


def max_length(wanted: int | str | None, multiple: int | None, **models: nn.Module | None) -> int | None:
    """In tokens. Beyond its positions a model fails on an index, or, with rotary ones, trains on what it never saw; so
    batches padded to a ``multiple`` end before them.
    """
    limits = [AUTO_MAX_LENGTH] if wanted == AUTO else [] if wanted is None else [wanted]
    for name, model in models.items():
        config = getattr(model, "config", None)
        positions = max_positions(config) if isinstance(config, PretrainedConfig) else None
        if positions is None:
            continue
        if isinstance(wanted, int) and wanted > positions:
            raise ValueError(f"max_length must be at most {positions}, the positions that {name} has, got {wanted}")
        usable = positions - positions % (multiple or 1)
        if usable < 2:
            raise ValueError(
                f"pad_to_multiple_of must be at most {positions}, the positions that {name} has, got {multiple}"
            )
        if isinstance(wanted, int) and wanted > usable:
            raise ValueError(
                f"max_length={wanted} would be padded to a multiple of {multiple} (pad_to_multiple_of), beyond the "
                f"{positions} positions that {name} has: expected at most {usable}"
            )
        limits.append(usable)
    return min(limits, default=None)


def warn_of_lost_updates(model: nn.Module, learning_rate: float) -> None:
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    for dtype in dtypes & {torch.bfloat16, torch.float16}:
        logger.warning(
            f"the weights to train are {dtype}, where most updates of learning_rate={learning_rate:g} round away: "
            "load the model in float32 (dtype=torch.float32) and compute in bfloat16 (bf16=True)"
        )


def with_adapter(model: nn.Module, peft_config: Any, seed: int) -> nn.Module:
    """Its weights are drawn from ``seed``, so that a resumed run makes the same ones, which may be the reference's."""
    from peft import PeftConfig, PeftModel, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config must be a peft.PeftConfig, got {type(peft_config).__name__}")
    if isinstance(model, PeftModel):
        raise ValueError("peft_config is given, but the model carries adapters already: merge_and_unload() them first")
    with keeping_random_state():
        set_seed(seed)
        return get_peft_model(model, peft_config)


def check_shares_no_trained_weight(model: nn.Module, ref_model: nn.Module) -> None:
    """A reference is frozen, and would freeze such a weight with it."""
    held = {parameter.data_ptr() for parameter in ref_model.parameters()} - {0}  # 0: partitioned, or without values
    shared = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.data_ptr() in held
    ]
    if shared:
        raise ValueError(
            f"ref_model holds weights that are to be trained ({len(shared)}, {shared[0]} among them), and a reference "
            "must not change: pass a model that shares none (copy.deepcopy), or leave ref_model out"
        )


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """One of the caller's own, made before the model was loaded or had its adapters, may hold nothing of it."""
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:
        return
    held = {id(parameter) for group in groups for parameter in group["params"]}
    if not any(parameter.requires_grad and id(parameter) in held for parameter in model.parameters()):
        raise ValueError(
            "optimizers has an optimizer of none of the weights to train: make it of the parameters of model as it is "
            "passed, with its adapters (get_peft_model) instead of peft_config"
        )


def check_adds_nothing_to_the_loss(model: nn.Module) -> None:
    """Refuse adapters whose method adds a term to a model's own loss, which is not computed here."""
    for config in model.peft_config.values():
        weight = getattr(config, "orth_reg_weight", 0.0)
        if weight:
            raise ValueError(
                f"orth_reg_weight={weight} (AdaLoRA) has no effect, for it belongs to the loss that a model computes "
                "from labels itself: set it to 0.0 to train without it"
            )


def check_base_is_reference(model: nn.Module, ref_model: nn.Module | None) -> None:
    """Refuse ``reference="base"`` where there is no base, or where it is not the adapters' original model."""
    if ref_model is not None:
        raise ValueError("reference='base' and ref_model are given, expected one of them: leave one out")
    if not hasattr(model, "disable_adapter"):
        raise ValueError(
            "reference='base' is the model with its adapters off, and model has no adapters: leave it out, and the "
            "reference is the model as it is before training"
        )
    for config in model.peft_config.values():
        init = getattr(config, "init_lora_weights", None)
        if isinstance(init, str) and init.lower().startswith(REWRITING_INITS):
            raise ValueError(
                f"init_lora_weights={init!r} changes the weights under the adapter, so reference='base' is not the "
                "original model: pass that, or its path, as ref_model, or leave reference='policy'"
            )
        if getattr(config, "layer_replication", None):
            raise ValueError(
                "layer_replication repeats layers of the model, with its adapters off too, so reference='base' is not "
                "the original model: pass that, or its path, as ref_model, or leave reference='policy'"
            )


def check_adapters_alone_are_trained(model: nn.Module) -> None:
    """Refuse weights trained beside the adapters, which the reference would share, and adapters merged into them."""
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise ValueError(
            "model's adapters are merged into its weights, so they can be neither trained nor taken off: call "
            "model.unmerge_adapter() first"
        )
    prefix = getattr(model.base_model, "prefix", None)
    if prefix is None:
        return
    of_adapters = (prefix, "modules_to_save.", "trainable_tokens_")
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(part in name for part in of_adapters)
    ]
    if others:
        raise ValueError(
            f"model trains weights beside its adapters ({len(others)}, {others[0]} among them), which the reference "
            "would share, so it would not stay as it is: pass ref_model, or freeze them (bias='none', modules_to_save)"
        )


def check_can_be_copied(model: nn.Module) -> None:
    """Refuse models in which one adapter is not one set of weights."""
    from peft import PeftModel

    kinds = [str(getattr(config.peft_type, "value", config.peft_type)) for config in model.peft_config.values()]
    if not isinstance(model, PeftModel) or "XLORA" in kinds:
        name = "X-LoRA" if "XLORA" in kinds else type(model).__name__
        raise ValueError(
            f"model mixes adapters ({name}), of which no copy can be kept as the reference: pass ref_model, or set "
            "reference='base' for the model with its adapters off"
        )


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """Put the global random states of Python, NumPy and torch (CPU, CUDA) back.

    Dropout in training draws from them, and what only some runs do (fill a cache, evaluate) must not move them.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)


def disable_dropout(model: nn.Module) -> None:
    """Modules, and the rates that attention layers hold as numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(module, name, 0.0)
