"""The model inside its wrappers, and the error for a model that the fused losses do not support.

Training code seldom holds a bare ``PreTrainedModel``: PEFT, DistributedDataParallel, FSDP2 and ``torch.compile`` wrap
it. ``unwrap`` finds it again.
"""

from torch import nn
from transformers import PreTrainedModel

# the way that remains for a model that ``attach`` refuses; messages end with it
FROM_LOGITS = "pass its logits to the losses that take logits (in this package's trainers: loss_from='logits')"


class UnsupportedModelError(ValueError):
    """The fused loss would not reproduce this model's logits. The message says why, and what to do instead."""


def head_of(model: PreTrainedModel) -> nn.Module | None:
    """Return the layer behind a model's hidden states: its LM head, or the ``score`` of a sequence classifier."""
    head = model.get_output_embeddings()
    return getattr(model, "score", None) if head is None else head


def is_scorer(model: PreTrainedModel) -> bool:
    """Whether the model has no LM head but a ``score``, which is a number of a sequence: a reward model."""
    return model.get_output_embeddings() is None and isinstance(getattr(model, "score", None), nn.Module)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the ``PreTrainedModel`` inside PEFT, DDP, FSDP and ``torch.compile``.

    Raises:
        TypeError: ``model`` holds no ``PreTrainedModel``.
        UnsupportedModelError: the wrapper is ``nn.DataParallel``, or a PEFT method that learns prompts.
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
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):  # torch.compile
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module):  # DDP, FSDP, DeepSpeed
            inner = inner.module
        else:
            raise TypeError(f"model must be or wrap a transformers.PreTrainedModel, got {type(model).__name__}")
    return inner
