"""What a model's configuration says about its logits, its positions and its attention."""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

# what models multiply their logits by, or divide them by, and how their configurations call it
MULTIPLIED_BY = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVIDED_BY = ("logits_scaling", "logits_mup_width_multiplier")
SOFT_CAPPED_BY = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
MULTIPLYING = ("hyperclovax",)  # model types that multiply by what others divide by
# what is left for a model that ``attach`` refuses
FROM_LOGITS = "pass its logits to the losses that take logits (in this package's trainers: loss_from='logits')"
# what is autocast to within a forward, by accelerate's names for it
AUTOCAST_TO = {"bf16": torch.bfloat16, "fp16": torch.float16}


class UnsupportedModelError(ValueError):
    """A model whose logits the fused loss would not reproduce; the message says what to do."""


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
    input_ids, limit = model_inputs.get("input_ids"), max_positions(inner.config)
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


def max_positions(config: PretrainedConfig) -> int | None:
    """The longest sequence that the model described was made for, in tokens. None: the configuration says none."""
    text = config.get_text_config()
    stated = getattr(text, "max_position_embeddings", None)
    if stated is None or stated < 1:  # XLNet says -1
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") or stated
    return max(stated, int(original * (rope.get("factor") or 1)))  # what is stated may be the length before stretching
