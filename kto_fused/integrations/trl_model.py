"""A model that TRL's trainers call, with this package's engine in the place of TRL's fused LM head.

TRL asks a model for log-probabilities by ``model(..., labels=..., fused_lm_head=True)``: its trainers patch the model's
forward to understand the argument. ``fuse_models`` patches the forwards of a trainer's policy and reference once more:

- ``fused_lm_head=False``: the forward does what it did before.
- ``fused_lm_head=True``, by TRL's own code: returns an ``ExactOutput`` with the fields that TRL reads.
- ``fused_lm_head=FusedCall(...)``, by ``trl.py``: calls a whole loss at the LM head.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from transformers import PreTrainedModel, Trainer
from transformers.utils import ModelOutput

from .. import huggingface
from ..functional import linear_token_logps
from ..huggingface.forward import FusedCall, Outcome, call_at_head

# attributes of modules that ``fuse_models`` sets or replaces
PATCHED = ("forward", "_original_forward", "_unfused_forward", "_forwards_before_fuse")


# ---- patching the models -------------------------------------------------------------------------------------------


def fuse_models(trainer: Trainer) -> str | None:
    """Patch the forwards of a trainer's policy and reference.

    Returns:
        None, or a sentence that says why a model cannot be fused. The models may then be half patched: the caller
        restores them.
    """
    inners = []
    for role, model in (("policy", trainer.model), ("reference", getattr(trainer, "ref_model", None))):
        if model is None:
            continue
        try:
            inner = huggingface.unwrap(model)
            # accelerate's autocast wraps the forward, and would round the logits that ``attach`` compares
            is_prepared = "_original_forward" in inner.__dict__
            if is_prepared:
                inner.forward = inner.__dict__.pop("_original_forward")
            with _without_router_logits(inner):
                huggingface.attach(inner)
        except huggingface.UnsupportedModelError as error:
            return f"the {role} cannot be fused, {error}"
        except Exception as error:  # a model that fails in these checks may still train in TRL
            return f"the {role} cannot be fused, checking it failed with {type(error).__name__}: {error}"
        inners.append((inner, is_prepared))
    for inner, is_prepared in inners:
        # that at which GRPO samples; TRL's other trainers have none
        _handle_fused_lm_head(inner, trainer.accelerator, getattr(trainer, "temperature", 1.0))
        if is_prepared:
            _wrap_in_autocast(inner, trainer.accelerator)
    return None


@contextmanager
def _without_router_logits(model: PreTrainedModel) -> Iterator[None]:
    """Hide from ``attach`` that a mixture of experts is configured to return router logits.

    ``attach`` would refuse a load-balancing loss that it does not know. TRL adds Mixtral's loss to every model.
    """
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        yield
        return
    config.output_router_logits = False
    try:
        yield
    finally:
        config.output_router_logits = True


def _handle_fused_lm_head(model: PreTrainedModel, accelerator: Accelerator, temperature: float) -> None:
    """Replace the model's forward by one that handles ``fused_lm_head``, as the file's opening lines say."""
    # The forwards before stay in a list on the model: a deep copy gets a list of its own, and trainers that share a
    # model put one forward over the other.
    unfused, level = model.forward, len(model.__dict__.setdefault("_forwards_before_fuse", []))
    model._forwards_before_fuse.append(unfused)

    def forward(self, *args, fused_lm_head: bool | FusedCall = False, **kwargs) -> Any:
        if fused_lm_head is False:
            return self._forwards_before_fuse[level](*args, **kwargs)
        # Autocast is needed here too, because accelerate has not prepared every model that TRL calls: not the policy
        # in an evaluation before training, and not the reference under FSDP2.
        with accelerator.autocast():
            if fused_lm_head is True:
                return _token_logps(self, *args, temperature=temperature, **kwargs)
            return _call(self, fused_lm_head, *args, **kwargs)

    # ``generate`` reads the signature; accelerate would follow a __wrapped__ when it removes its own wrappers
    forward.__signature__ = inspect.signature(unfused)
    model.forward = MethodType(forward, model)


def _wrap_in_autocast(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Wrap the model's forward as ``accelerator.prepare_model`` does."""
    model._original_forward = model.forward
    with_autocast = accelerator.autocast()(model.forward.__func__)
    model.forward = MethodType(convert_outputs_to_fp32(with_autocast), model)


# ---- calls at the LM head ------------------------------------------------------------------------------------------


def _call(model: PreTrainedModel, call: FusedCall, *args, **kwargs) -> tuple[torch.Tensor, Outcome]:
    """Run ``call`` in place of the LM head; return (gradient path, outcome).

    If router logits are asked for, the outcome has the load-balancing loss, unweighted.
    """
    gradient_path, outcome, routed = call_at_head(model, call, *args, **kwargs)
    if routed is not None:
        # TRL uses Mixtral's function for every architecture
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        router_logits, attention_mask = routed
        config = model.config.get_text_config()
        outcome.aux_loss = load_balancing_loss_func(
            router_logits, config.num_experts, config.num_experts_per_tok, attention_mask
        )
    return gradient_path, outcome


class TokenValues(NamedTuple):
    """Values of each predicted token, [B, T], or [B, T-1] if the labels are shifted here."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    mean_logits: torch.Tensor
    is_top1: torch.Tensor  # 1 where no token has a higher logit


@dataclass
class ExactOutput(ModelOutput):
    """TRL's ``FusedCausalLMOutput`` with unrounded values.

    FSDP2's mixed precision makes a second output of the same class from the rounded tensors of the first. ``outcome``
    is not a tensor, so it is handed on unrounded, and the values are taken from it.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: None = None  # ``fuse`` leaves trainers that read it to TRL
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    outcome: Outcome | None = None

    def __post_init__(self):
        super().__post_init__()
        values = TokenValues(*self.outcome.results(self.log_probs))
        self.log_probs, self.mean_logits = values.log_probs, values.mean_logits
        self.entropy = _WithoutGradient.apply(values.entropy, values.log_probs)


def _token_logps(
    model: PreTrainedModel,
    *args,
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    temperature: float,
    **kwargs,
) -> ExactOutput:
    """Return what TRL's patched forward returns, except for ``log_sum_sq_probs``."""
    is_shifted = shift_labels is not None
    targets = shift_labels if is_shifted else labels
    call = FusedCall(_predicted_logps, {"labels": targets, "shift": not is_shifted, "temperature": temperature})
    gradient_path, outcome = _call(model, call, *args, **kwargs)
    values = TokenValues(*outcome.results(gradient_path))
    label_mask = (targets if is_shifted else targets[:, 1:]) != -100
    num_items = label_mask.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
    loss = -values.log_probs.sum() / num_items.clamp(min=1)
    if outcome.aux_loss is not None:
        loss = loss + getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * outcome.aux_loss
    return ExactOutput(
        loss=loss,
        log_probs=values.log_probs,
        entropy=values.entropy,
        mean_logits=values.mean_logits,
        is_top1=values.is_top1 == 1,
        label_mask=label_mask,
        aux_loss=outcome.aux_loss,
        outcome=outcome,
    )


def _predicted_logps(*, shift: bool, **arguments) -> TokenValues:
    """Return the values of the predicted tokens, without the last position if ``shift``, as TRL has them."""
    logps, metrics = linear_token_logps(**arguments, shift=shift, return_metrics=True)
    predicting = slice(None, -1 if shift else None)
    # clone: FSDP2 warns of views
    columns = (logps, metrics.entropy, metrics.mean_logits, metrics.is_top1)
    return TokenValues(*(column[:, predicting].clone() for column in columns))


class _WithoutGradient(torch.autograd.Function):
    """Return ``values``, and raise an error where a loss asks for their gradient.

    TRL's entropy has a gradient, and this package's has none: a loss of it would train silently without it.
    """

    @staticmethod
    def forward(ctx, values: torch.Tensor, differentiable: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        return values.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor | None) -> tuple[None, None]:
        if grad is not None:
            raise RuntimeError(
                "the entropy of a fused trainer has no gradient: detach it, or train with TRL's own head"
            )
        return None, None
