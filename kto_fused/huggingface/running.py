"""Run a model on a few tokens to look at its logits, and leave the model as it was.

The checks of ``attach`` and of the trainers use these functions. None of them changes a module's mode, the random
state, or which parameters are trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from .config import max_positions
from .wrappers import UnsupportedModelError

CHECKED_TOKENS = 8
HALF_PRECISION = (torch.bfloat16, torch.float16)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients: no dropout, no router noise. Restore every module's mode after."""
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
    """Restore every parameter's ``requires_grad`` afterwards.

    When PEFT switches adapters back on, it makes all their weights trainable, the frozen ones too.
    """
    before = {name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        for name, now in model.named_parameters():  # FSDP2 may have put another tensor in its place
            parameter, is_trainable = before.get(name, (now, now.requires_grad))
            parameter.requires_grad_(is_trainable)
            now.requires_grad_(is_trainable)


@contextmanager
def made_to_run(model: PreTrainedModel, device: torch.device) -> Iterator[None]:
    """Let a model run here and now, outside of the training that it is meant for.

    - A model with some weights in float32 (its head, its norms) and others in half precision may run in nothing but
      autocast, so autocast is on for it.
    - Attention kernels of a GPU do not run before the model is moved there, nor with float32 weights outside of
      autocast. Such an attention is replaced by "eager" meanwhile.
    """
    dtypes = {parameter.dtype for parameter in model.parameters()}
    half = next((dtype for dtype in HALF_PRECISION if dtype in dtypes), None)
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


def checked_logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the model's own logits [1, CHECKED_TOKENS, V] of a few fixed tokens, without dropout or gradients."""
    input_ids = tokens_to_check(model)
    with evaluating(model), made_to_run(model, input_ids.device):
        return model(input_ids=input_ids, use_cache=False, return_dict=True).logits


def is_reproduced(logits: torch.Tensor, others: torch.Tensor) -> bool:
    """Return whether two results of the same computation agree to half the digits of their dtype.

    They need not agree to all digits: the order in which sums are added, in experts and on a GPU, changes the rounding.
    """
    rounding = torch.finfo(logits.dtype).eps ** 0.5 * logits.double().abs().max()
    return bool((logits.double() - others.double()).abs().max() <= rounding)


def tokens_to_check(model: PreTrainedModel) -> torch.Tensor:
    """Return [1, CHECKED_TOKENS] token ids on the model's device, always the same; fewer if it has fewer positions."""
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    if device.type == "meta":
        raise UnsupportedModelError("model lies on the meta device: load its weights first")
    if hasattr(embeddings.weight, "ds_id") and not embeddings._forward_pre_hooks:
        raise UnsupportedModelError(
            "model was partitioned by DeepSpeed ZeRO-3, and only an engine gathers its weights: make the engine first "
            "(deepspeed.initialize), and pass the engine to apply or attach"
        )
    generator = torch.Generator().manual_seed(0)
    length = min(CHECKED_TOKENS, max_positions(model.config) or CHECKED_TOKENS)
    return torch.randint(vocab_size(model), (1, length), generator=generator, device="cpu").to(device)


def vocab_size(model: PreTrainedModel) -> int:
    """Return the number of tokens, by the configuration or else by the embeddings."""
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    return size or len(model.get_input_embeddings().weight)
