"""Batches padded on the right, without the attention mask that would make their attention slow.

No token of a causal model attends to the padding behind it, so the mask changes nothing that a loss reads. PyTorch's
attention uses its fastest kernels if it gets no mask, and a mask would be [B, 1, T, T].
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from .config import max_positions
from .wrappers import unwrap

# the dtype that autocast uses inside a forward, by accelerate's name for the mixed precision
AUTOCAST_TO = {"bf16": torch.bfloat16, "fp16": torch.float16}


def without_padding_mask(model: nn.Module, model_inputs: dict[str, Any], mixed_precision: str | None) -> dict[str, Any]:
    """Return ``model_inputs`` without their ``attention_mask``, unless the model needs the mask.

    The mask stays in these cases:

    - The attention is not PyTorch's own ("sdpa"). FlashAttention, for example, uses the mask to leave out padding.
    - Several heads share keys and values, and the GPU has no kernel for that without a mask.
    - Router logits are asked for: the auxiliary loss of a mixture of experts reads the mask.
    - The batch is longer than the model's positions. OPT counts positions by the mask and has none for the padding.
    - The model's forward requires the argument.

    Args:
        model: a ``PreTrainedModel``, bare or wrapped.
        model_inputs: arguments of its forward, padded on the right.
        mixed_precision: accelerate's setting: "no", "bf16", "fp16" or None.
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
    attention_dtype = AUTOCAST_TO.get(mixed_precision) or inner.dtype
    if _shares_keys(config) and not _has_kernel_for_shared_keys(inner.device, attention_dtype):
        return model_inputs
    return {name: value for name, value in model_inputs.items() if name != "attention_mask"}


def _shares_keys(config: PretrainedConfig) -> bool:
    """Return whether the model has fewer heads for keys and values than for queries."""
    try:
        heads = getattr(config, "num_attention_heads", None)
        return getattr(config, "num_key_value_heads", heads) != heads
    except RuntimeError:  # transformers raises it where the layers differ in this number
        return True


def _has_kernel_for_shared_keys(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether PyTorch has a kernel for shared keys and values that takes no mask.

    On a GPU only FlashAttention does: in half precision, from compute capability 8.0 on. Otherwise PyTorch would write
    the scores [B, heads, T, T] to memory.
    """
    if device.type != "cuda":
        return True
    return dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(device) >= (8, 0)
