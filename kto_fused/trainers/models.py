"""The policy and the reference model as the trainers take them: loaded, given adapters, checked and frozen.

Functions named ``check_...`` refuse, before the first step, a model on which training would fail or would train
something else than was asked for. The others load, limit or prepare a model. ``keeping_random_state`` keeps all of this
from changing the numbers that training draws.
"""

import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from .. import huggingface
from ..huggingface import files as model_files
from ..huggingface.config import max_positions
from ..huggingface.inspect import check_is_causal, check_is_decoder, head_layers
from ..huggingface.unreached import parts_of, unreached_by_text
from .configs import AUTO, AUTO_MAX_LENGTH, BASE, FusedPreferenceConfig

logger = logging.getLogger(__name__)

# Prefixes of ``init_lora_weights`` that change the weights under the adapter too. A number of iterations may follow,
# as in "pissa_niter_4".
REWRITING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

# ---- loading ------------------------------------------------------------------------------------------------------


def load(model: Any, dtype: torch.dtype | str, trust_remote_code: bool, *, scores: bool = False) -> Any:
    """Load a model from a path or an id; with ``scores`` a reward model. Anything but a string is returned as it is."""
    if not isinstance(model, str):
        return model
    return model_files.load_model(model, scores=scores, dtype=dtype, trust_remote_code=trust_remote_code)


def tokenizer_of(model: str | nn.Module, processing_class: Any, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Return ``processing_class``, or where it is None the tokenizer from the model's path or id.

    Raises:
        ValueError: there is neither a tokenizer nor a path.
        TypeError: ``processing_class`` is not a tokenizer of transformers.
    """
    if processing_class is None:
        name = model if isinstance(model, str) else huggingface.unwrap(model).config._name_or_path
        if not name:
            raise ValueError(
                "processing_class is missing, and model was made in memory, with no path to load a tokenizer from: "
                "pass the tokenizer"
            )
        processing_class = model_files.load_pretrained(AutoTokenizer, name, trust_remote_code=trust_remote_code)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class must be a transformers tokenizer, got {type(processing_class).__name__}")
    return processing_class


def config_of(option: str, name: str, trust_remote_code: bool, **changes: Any) -> PretrainedConfig:
    """Return the configuration of a model's folder or id, which ``option`` names, with ``changes``.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        return model_files.load_pretrained(AutoConfig, name, trust_remote_code=trust_remote_code, **changes)
    except Exception as error:  # files that others wrote can fail in any way
        raise ValueError(f"{option} {name} cannot be loaded: {model_files.damaged_file(name) or error}") from error


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token id to pad with. Padding is masked everywhere, so any token will do."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0


def with_adapters(model: nn.Module, peft_config: Any, seed: int) -> nn.Module:
    """Return ``model`` with new adapters of ``peft_config``; None adds none.

    The adapters' weights are drawn from ``seed`` alone, so a resumed run draws the same ones. That matters where they
    are not zero, because they are then the reference too.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            "model carries adapters without being a PeftModel, so they cannot be switched off for the reference: "
            "wrap it with peft (get_peft_model, PeftModel.from_pretrained) instead of add_adapter or load_adapter"
        )
    if peft_config is None:
        return model
    from peft import PeftConfig, PeftModel, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config must be a peft.PeftConfig, got {type(peft_config).__name__}")
    if isinstance(model, PeftModel):
        raise ValueError("peft_config is given, but the model carries adapters already: merge_and_unload() them first")
    with keeping_random_state():
        set_seed(seed)
        model = get_peft_model(model, peft_config)
    for config in model.peft_config.values():  # a folder must be found from any other folder too
        base = config.base_model_name_or_path
        config.base_model_name_or_path = os.path.abspath(base) if base and os.path.isdir(base) else base
    return model


# ---- properties of a model ----------------------------------------------------------------------------------------


def has_adapters(model: nn.Module) -> bool:
    """Whether the model is a PEFT model, whose adapters can be switched off."""
    return hasattr(model, "disable_adapter")


def is_partitioned(model: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 has partitioned the weights, which it does as a model is loaded."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def embedded_tokens(model: nn.Module | None) -> int | None:
    """Return the number of tokens that the model has embeddings of, also of partitioned weights; None if unknown."""
    try:
        layers = model.get_input_embeddings().modules()  # PEFT may have wrapped something around the layer
    except (AttributeError, NotImplementedError):  # no model, no transformers model, or one without such a layer
        return None
    return next((layer.num_embeddings for layer in layers if isinstance(layer, nn.Embedding)), None)


def max_length(wanted: int | str | None, multiple: int | None, **models: nn.Module | None) -> int | None:
    """Return the longest sequence in tokens that ``wanted`` and the positions of all ``models`` allow.

    Beyond its positions a model fails on an index or, with rotary positions, trains on positions it has never seen.
    Batches are padded to ``multiple`` tokens, and the padding must end before the last position too.

    Returns:
        The limit; None where neither ``wanted`` nor a model sets one.

    Raises:
        ValueError: ``wanted`` or ``multiple`` exceeds the positions of the model that the message names.
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


# ---- checks before training ---------------------------------------------------------------------------------------


def check_policy(
    model: nn.Module,
    ref_model: nn.Module | None,
    args: FusedPreferenceConfig,
    optimizer: Any,
    *,
    is_trained: bool,
    needs_reference: bool,
) -> None:
    """Refuse a policy that cannot be trained, or not against this reference, before any data is prepared.

    Args:
        model: the policy, with its adapters.
        ref_model: the reference model; None where the policy makes its own.
        args: the trainer's options.
        optimizer: the caller's own optimizer, or None.
        is_trained: whether there is training data; else the trainer only evaluates.
        needs_reference: whether the loss has a reference.
    """
    if is_trained:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "model has no parameter that requires a gradient, so nothing would be trained: load adapters with "
                "PeftModel.from_pretrained(..., is_trainable=True), or requires_grad_() what is to be trained"
            )
        check_optimizer(optimizer, model)
        if ref_model is not None:
            check_shares_no_trained_weight(model, ref_model)
        if has_adapters(model):
            check_adds_nothing_to_the_loss(model)
    check_is_decoder(model)
    if args.loss_from == "hidden":
        head_layers(huggingface.unwrap(model))
    if args.reference == BASE:
        check_base_is_reference(model, ref_model)
    if has_adapters(model) and needs_reference and ref_model is None:
        check_adapters_alone_are_trained(model)


def check_shares_no_trained_weight(model: nn.Module, ref_model: nn.Module) -> None:
    """Refuse a reference that holds a weight to be trained: the reference is frozen, and that weight with it."""
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
    """Refuse the caller's optimizer if it holds no weight to train.

    That happens where the optimizer was made before the model was loaded or given its adapters.
    """
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:
        return
    held = {id(parameter) for group in groups for parameter in group["params"]}
    if not any(parameter.requires_grad and id(parameter) in held for parameter in model.parameters()):
        raise ValueError(
            "optimizers has an optimizer that holds none of the weights to train: make it from the parameters of the "
            "model that you pass, with its adapters (get_peft_model) instead of peft_config"
        )


def check_adds_nothing_to_the_loss(model: nn.Module) -> None:
    """Refuse adapters whose method adds a term to the model's own loss, because that loss is not computed here."""
    for config in model.peft_config.values():
        weight = getattr(config, "orth_reg_weight", 0.0)
        if weight:
            raise ValueError(
                f"orth_reg_weight={weight} (AdaLoRA) has no effect, because it belongs to the loss that a model "
                "computes from labels itself: set it to 0.0 to train without it"
            )


def check_base_is_reference(model: nn.Module, ref_model: nn.Module | None) -> None:
    """Refuse ``reference="base"`` without adapters, or with adapters that changed the weights under them."""
    if ref_model is not None:
        raise ValueError("reference='base' and ref_model are given, expected one of them: leave one out")
    if not has_adapters(model):
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
    """Refuse merged adapters, and weights trained beside the adapters, which the reference would share."""
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise ValueError(
            "model's adapters are merged into its weights, so they can be neither trained nor switched off: call "
            "model.unmerge_adapter() first"
        )
    prefix = getattr(model.base_model, "prefix", None)
    if prefix is None:
        return
    parts_of_adapters = (prefix, "modules_to_save.", "trainable_tokens_")
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(part in name for part in parts_of_adapters)
    ]
    if others:
        raise ValueError(
            f"model trains weights beside its adapters ({len(others)}, {others[0]} among them), which the reference "
            "would share, so the reference would change: pass ref_model, or freeze them (bias='none', modules_to_save)"
        )


def check_can_be_copied(model: nn.Module) -> None:
    """Refuse PEFT models in which one adapter is not one set of weights."""
    from peft import PeftModel

    kinds = [str(getattr(config.peft_type, "value", config.peft_type)) for config in model.peft_config.values()]
    if not isinstance(model, PeftModel) or "XLORA" in kinds:
        name = "X-LoRA" if "XLORA" in kinds else type(model).__name__
        raise ValueError(
            f"model mixes adapters ({name}), and no copy of mixed adapters can be kept as the reference: pass "
            "ref_model, or set reference='base' for the model with its adapters off"
        )


def check_logits(model: nn.Module, loss_from: str) -> None:
    """Refuse a model that the loss cannot be computed with exactly.

    From hidden states the loss must reproduce the model's logits; from logits the model must be causal.

    Runs the model, so call it with the model on its device, because some kernels run nowhere else, and before
    accelerate prepares the model. A model that ZeRO-3 has partitioned gives no logits yet; ``huggingface.apply``
    checks it in the first step.
    """
    if is_partitioned(model):
        if loss_from == "hidden":
            head_layers(huggingface.unwrap(model))
        return
    if loss_from == "hidden":
        huggingface.attach(model)
        return
    inner = _transformers_model(model)
    if inner is not None and embedded_tokens(inner) is not None:
        check_is_causal(inner)


# ---- preparing for training ---------------------------------------------------------------------------------------


def freeze_unreached(model: nn.Module, args: FusedPreferenceConfig, *, is_ddp: bool) -> None:
    """Freeze the parameters that text never reaches, such as a vision tower, and log which.

    They get no gradient, so DistributedDataParallel would wait for one, and the optimizer would keep a state for them.
    Parameters that only some texts reach (experts) stay trainable; a warning names the option that they need.

    Raises:
        ValueError: text reaches none of the parameters to train.
    """
    inner = _transformers_model(model)
    if inner is None or is_partitioned(model) or embedded_tokens(inner) is None:
        return
    outside, inside = unreached_by_text(inner)
    parameters = dict(inner.named_parameters())
    for name in outside:
        parameters[name].requires_grad_(False)
    if outside and args.should_log:
        parts = parts_of(inner, outside)
        count = sum(parameters[name].numel() for name in outside)
        logger.info(f"Text never reaches {', '.join(parts)}: its {count:,} parameters get no gradient and are frozen.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"text reaches none of the parameters to train ({outside[0]} among them): train parameters of the language "
            "model"
        )
    waits_for_every_gradient = args.ddp_find_unused_parameters is False or (
        args.ddp_find_unused_parameters is None and isinstance(model, PreTrainedModel) and args.gradient_checkpointing
    )
    if inside and waits_for_every_gradient and is_ddp and args.should_log:
        logger.warning(
            f"{len(inside)} parameters to train ({inside[0]} among them) get no gradient from a few tokens, as experts "
            "of a mixture that no token is sent to; DistributedDataParallel fails at the step after one in which a "
            "parameter gets none: set ddp_find_unused_parameters=True (--ddp_find_unused_parameters true)"
        )


def _transformers_model(model: nn.Module) -> PreTrainedModel | None:
    return next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)


def disable_dropout(model: nn.Module) -> None:
    """Set the dropout modules' rates to 0, and the rates that attention layers hold as numbers."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(module, name, 0.0)


def warn_of_lost_updates(model: nn.Module, learning_rate: float) -> None:
    """Warn where weights to train are in half precision, in which most updates round to nothing."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    for dtype in dtypes & {torch.bfloat16, torch.float16}:
        logger.warning(
            f"the weights to train are {dtype}, where most updates of learning_rate={learning_rate:g} round away: "
            "load the model in float32 (dtype=torch.float32) and compute in bfloat16 (bf16=True)"
        )


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """Restore the global random states of Python, NumPy and torch (CPU, CUDA) on leaving.

    Dropout in training draws from them. Work that only some runs do, such as filling a cache or evaluating, must not
    change what training draws.
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
