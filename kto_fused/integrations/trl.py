"""TRL's KTO and DPO trainers on this package: ``trainer = fuse(KTOTrainer(...))``."""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import trl
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32, is_peft_model, send_to_device
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import ModelOutput

from .. import huggingface
from ..functional import fused_linear_dpo_loss, fused_linear_kto_loss, linear_sequence_logps, linear_token_logps
from ..huggingface import FusedCall, Outcome
from ..metrics import LossMetrics, with_margins

# what else is needed of TRL is imported where it is used: behind the check of the version
TRL_VERSION = "1.16"

# losses that both define alike; TRL's "sigmoid" has no label smoothing
KTO_LOSS_TYPES = ("kto", "apo_zero_unpaired")
DPO_LOSS_TYPES = ("sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down")
# methods of a trainer that the whole loss takes the place of
REPLACED = ("compute_loss", "_compute_loss", "_compute_kl_logps")
# methods of a trainer through which its batches come
MAKES_BATCHES = ("get_train_dataloader", "get_eval_dataloader", "_prepare_inputs")
# columns of a batch that no model takes
DATA = ("label", "ref_logps", "ref_KL_logps", "ref_chosen_logps", "ref_rejected_logps")

logger = logging.getLogger(__name__)


def fuse(trainer: Trainer) -> Trainer:
    """Let a TRL ``KTOTrainer`` or ``DPOTrainer`` compute through this package: same losses, same logged values.

    - Log-probabilities, of the policy and of the reference, for every loss type; the losses' formulas stay TRL's.
    - The whole loss, where the policy's LM head and the loss become one call (3 GEMMs instead of 4, or 2 instead of 3
      with a frozen head) and all logged values one wait for the device: KTO's ``kto`` and ``apo_zero_unpaired``;
      DPO's ``sigmoid``, ``hinge``, ``ipo``, ``robust``, ``apo_zero`` and ``apo_down``, one of them alone with weight
      1, without ``ld_alpha`` and ``use_weighting``, and with ``f_divergence_type="reverse_kl"``.

    What is not taken over stays TRL's, and a warning says so once: all of it for vision-language models, DeepSpeed
    ZeRO-3, FSDP1, tensor, context and sequence parallelism; evaluation that asks for logits (``compute_metrics``); and
    an ``ipo`` batch with an empty prompt. Precomputed reference log-probabilities (``precompute_ref_log_probs=True``)
    come from the trainer's own ``__init__``, before this call.

    Differences remain. Logits are not rounded to half precision, as TRL's are, and a configuration's soft cap is kept
    under all its names (TRL leaves out RecurrentGemma's and xLSTM's). What is random in training (dropout that
    ``disable_dropout`` leaves or does not reach, a router's jitter, NEFTune's noise) draws in another order, since the
    reference comes before the policy. Where a sequence's log-probability is NaN, so are KTO's loss and what is logged
    of its class; TRL's are those of the others, with a gradient of NaN. Of several tokens that are the most likely,
    each counts for ``mean_token_accuracy``, TRL's only the first. An adapter's frozen weights stay frozen; TRL's
    reference unfreezes them, and from the second step on the gradient is clipped by a norm with theirs.

    Args:
        trainer: of TRL 1.16. Fusing it again changes nothing.

    Returns:
        The same trainer.

    Raises:
        ImportError: TRL has another version.
        TypeError: ``trainer`` is neither a ``KTOTrainer`` nor a ``DPOTrainer``.
        UnsupportedModelError: the policy or the reference is refused by ``huggingface.attach``. After any of these
            errors trainer and models are what they were.
    """
    if not trl.__version__.startswith(f"{TRL_VERSION}."):
        raise ImportError(
            f"kto_fused.integrations.trl knows TRL {TRL_VERSION}.*, found TRL {trl.__version__}: "
            f"pip install 'trl=={TRL_VERSION}.*'"
        )
    from trl import DPOTrainer, KTOTrainer

    if not isinstance(trainer, (KTOTrainer, DPOTrainer)):
        raise TypeError(f"trainer must be a trl.KTOTrainer or trl.DPOTrainer, got {type(trainer).__name__}")
    if getattr(trainer, "_is_fused", False):
        return trainer
    own, compute_loss = (KTOTrainer, _kto_loss) if isinstance(trainer, KTOTrainer) else (DPOTrainer, _dpo_loss)
    unsupported = _unsupported(trainer)
    if unsupported is not None:
        logger.warning("TRL computes everything as before: %s.", unsupported)
        return trainer

    is_weighted = getattr(trainer, "use_weighting", False)
    models = [trainer.ref_model] if is_weighted else [trainer.model, trainer.ref_model]
    _install([model for model in models if model is not None], trainer.accelerator)
    trainer._is_fused = True
    not_whole = _overridden(trainer, own, REPLACED) or _not_whole(trainer)
    if is_weighted:
        logger.warning("TRL computes the policy's log-probabilities and the loss: use_weighting asks for more of them.")
    elif not_whole is not None:
        logger.warning("TRL computes the loss, from this package's log-probabilities: %s.", not_whole)
    else:
        trainer._compute_loss = MethodType(compute_loss, trainer)
    return trainer


# ---- what stays TRL's ---------------------------------------------------------------------------------------------


def _unsupported(trainer: Trainer) -> str | None:
    """Why nothing of a trainer is taken over, or None."""
    state, parallel = trainer.accelerator.state, trainer.accelerator.parallelism_config
    if trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
        return "DeepSpeed ZeRO-3 shards the LM head, use FSDP2"
    if trainer.is_fsdp_enabled and state.fsdp_plugin.fsdp_version == 1:
        return "FSDP1 flattens the LM head, set fsdp_version=2"
    if parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled):
        return "tensor, context and sequence parallelism split what the loss needs whole"
    if trainer._is_vlm:
        return "vision-language models are not supported"
    if trainer.accelerator.device.type == "mps":
        return "MPS has no float64"
    return None


def _overridden(trainer: Trainer, own: type, names: tuple[str, ...]) -> str | None:
    """Which of these methods is somebody else's, or None."""
    for name in names:
        method = getattr(trainer, name, None)
        if getattr(method, "__func__", method) is not getattr(own, name, None):
            return f"{type(trainer).__name__}.{name} is not {own.__name__}'s"
    return None


def _not_whole(trainer: Trainer) -> str | None:
    """Why a trainer's settings leave the loss to TRL, or None."""
    if trainer.beta <= 0:
        return f"beta={trainer.beta} is not positive"
    if hasattr(trainer, "loss_type"):  # KTO
        if trainer.loss_type not in KTO_LOSS_TYPES:
            return f"loss_type={trainer.loss_type!r} is not one of {list(KTO_LOSS_TYPES)}"
        if min(trainer.desirable_weight, trainer.undesirable_weight) < 0:
            return "a class weight is negative"
        return None
    if len(trainer.loss_types) != 1 or trainer.loss_types[0] not in DPO_LOSS_TYPES:
        return f"loss_type={trainer.loss_types} is not one of {list(DPO_LOSS_TYPES)}"
    if trainer.loss_weights != [1.0]:
        return f"loss_weights={trainer.loss_weights}"
    if trainer.loss_types == ["robust"] and not 0 <= trainer.label_smoothing < 0.5:
        return f"label_smoothing={trainer.label_smoothing} lies outside [0, 0.5)"
    if trainer.ld_alpha is not None:
        return f"ld_alpha={trainer.ld_alpha}"
    if trainer.f_divergence_type != "reverse_kl":
        return f"f_divergence_type={trainer.f_divergence_type!r}"
    return "use_weighting=True" if trainer.use_weighting else None


# ---- inside the models' forward -----------------------------------------------------------------------------------


def _install(models: list[nn.Module], accelerator: Accelerator) -> None:
    """Answer ``fused_lm_head`` from this package's engine in all of the models, or raise and change none."""
    inners = [huggingface.unwrap(model) for model in models]
    prepared = []
    with ExitStack() as undo:
        for inner in inners:
            original = inner.__dict__.get("_original_forward")
            if original is not None:  # accelerate's autocast stands before it, and would round what attach compares
                undo.callback(inner.__dict__.update, forward=inner.forward, _original_forward=original)
                inner.forward = inner.__dict__.pop("_original_forward")
                prepared.append(inner)
            if not hasattr(inner, "_unfused_forward"):
                undo.callback(huggingface.detach, inner)
            with _without_router_logits(inner):
                huggingface.attach(inner)
        undo.pop_all()
    for inner in inners:
        _answer_fused_lm_head(inner)
    for inner in prepared:
        inner._original_forward = inner.forward
        with_autocast = accelerator.autocast()(inner.forward.__func__)
        inner.forward = MethodType(convert_outputs_to_fp32(with_autocast), inner)


@contextmanager
def _without_router_logits(model: PreTrainedModel) -> Iterator[None]:
    """The model's own load-balancing loss, whose function may be unknown, is not what TRL adds."""
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        yield
        return
    config.output_router_logits = False
    try:
        yield
    finally:
        config.output_router_logits = True


def _answer_fused_lm_head(model: PreTrainedModel) -> None:
    unfused, level = model.forward, len(model.__dict__.setdefault("_unanswered_forwards", []))
    model._unanswered_forwards.append(unfused)  # a deep copy has its own; trainers that share a model stack them

    def forward(self, *args, fused_lm_head: bool | FusedCall = False, **kwargs) -> Any:
        if fused_lm_head is False:
            return self._unanswered_forwards[level](*args, **kwargs)
        if fused_lm_head is True:
            return _token_logps(self, *args, **kwargs)
        return _call(self, fused_lm_head, *args, **kwargs)

    # `generate` looks at the signature, but accelerate would follow a __wrapped__ when it takes its own wrappers off
    forward.__signature__ = inspect.signature(unfused)
    model.forward = MethodType(forward, model)


def _call(model: PreTrainedModel, call: FusedCall, *args, **kwargs) -> tuple[torch.Tensor, Outcome]:
    """``call`` in place of the LM head, and the load-balancing loss, unweighted, where router logits are asked for."""
    gradient_path, outcome, routed = huggingface.call_at_head(model, call, *args, **kwargs)
    if routed is not None:
        # TRL's choice for all architectures
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        router_logits, attention_mask = routed
        config = model.config.get_text_config()
        outcome.aux_loss = load_balancing_loss_func(
            router_logits, config.num_experts, config.num_experts_per_tok, attention_mask
        )
    return gradient_path, outcome


@dataclass
class ExactOutput(ModelOutput):
    """TRL's ``FusedCausalLMOutput`` as it was computed. FSDP2's mixed precision makes another output of the rounded
    tensors of one: ``outcome``, which is no tensor, goes along unrounded.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    outcome: Outcome | None = None

    def __post_init__(self):
        super().__post_init__()
        self.log_probs, entropy, self.mean_logits, _ = self.outcome.results(self.log_probs)
        self.entropy = _WithoutGradient.apply(entropy, self.log_probs)


def _token_logps(
    model: PreTrainedModel,
    *args,
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    **kwargs,
) -> ExactOutput:
    """The answer to TRL's own call, but for ``log_sum_sq_probs``."""
    is_shifted = shift_labels is not None
    targets = shift_labels if is_shifted else labels
    call = FusedCall(_predicted_logps, {"labels": targets, "shift": not is_shifted})
    gradient_path, outcome = _call(model, call, *args, **kwargs)
    log_probs, entropy, mean_logits, is_top1 = outcome.results(gradient_path)
    label_mask = (targets if is_shifted else targets[:, 1:]) != -100
    num_items = label_mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -log_probs.sum() / num_items
    if outcome.aux_loss is not None:
        loss = loss + getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * outcome.aux_loss
    return ExactOutput(
        loss=loss,
        log_probs=log_probs,
        entropy=entropy,
        mean_logits=mean_logits,
        is_top1=is_top1 == 1,
        label_mask=label_mask,
        aux_loss=outcome.aux_loss,
        outcome=outcome,
    )


def _predicted_logps(*, shift: bool, **arguments) -> tuple[torch.Tensor, ...]:
    """(log-probabilities, entropy, mean logits, is_top1), each [B, T]; with ``shift`` [B, T-1], as TRL has them."""
    logps, metrics = linear_token_logps(**arguments, shift=shift, return_metrics=True)
    predicting = slice(None, -1 if shift else None)
    # not views, of which FSDP2 warns
    return tuple(x[:, predicting].clone() for x in (logps, metrics.entropy, metrics.mean_logits, metrics.is_top1))


class _WithoutGradient(torch.autograd.Function):
    """Values whose gradient is not computed here but in TRL: a loss of them must not train silently without it."""

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


# ---- the whole loss -----------------------------------------------------------------------------------------------


def _kto_loss(self: Trainer, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
    """In place of ``KTOTrainer._compute_loss``."""
    batch = send_to_device(inputs, self.accelerator.device)
    if return_outputs or _not_whole(self) is not None:
        return type(self)._compute_loss(self, model, inputs, return_outputs)
    model_inputs, labels = _model_inputs(batch)
    if self.calculate_KL:
        mismatched = _model_inputs(batch, prefix="KL_")
        kl_logps = _sequence_logps(self, model, *mismatched)
    if self.precompute_ref_logps:
        ref_logps, ref_kl_logps = batch["ref_logps"], batch.get("ref_KL_logps")
    else:
        with _reference(self) as reference:
            ref_logps = _sequence_logps(self, reference, model_inputs, labels)
            ref_kl_logps = _sequence_logps(self, reference, *mismatched) if self.calculate_KL else None
    reference_point = 0.0
    if self.calculate_KL:
        mean_log_ratio = (kl_logps - ref_kl_logps).mean()
        reference_point = self.accelerator.gather_for_metrics(mean_log_ratio).mean().clamp(min=0)
    loss, metrics, aux_loss = _fused(
        self,
        fused_linear_kto_loss,
        model,
        _with_router_logits(self, model_inputs),
        labels=labels,
        desirable=batch["label"].bool(),
        ref_logps=ref_logps,
        reference_point=reference_point,
        beta=self.beta,
        desirable_weight=self.desirable_weight,
        undesirable_weight=self.undesirable_weight,
        loss_type=self.loss_type,
    )
    return _log(self, batch, loss, metrics, aux_loss)


def _dpo_loss(self: Trainer, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
    """In place of ``DPOTrainer._compute_loss``."""
    batch = send_to_device(inputs, self.accelerator.device)
    if return_outputs or _not_whole(self) is not None or _ipo_lengths_differ(self, batch):
        return type(self)._compute_loss(self, model, inputs, return_outputs)
    model_inputs, labels = _model_inputs(batch)
    if self.precompute_ref_logps:
        ref_logps = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    else:
        with _reference(self) as reference:
            ref_logps = _sequence_logps(self, reference, model_inputs, labels)
    (loss_type,) = self.loss_types
    loss, metrics, aux_loss = _fused(
        self,
        fused_linear_dpo_loss,
        model,
        _with_router_logits(self, model_inputs),
        labels=labels,
        ref_logps=ref_logps,
        beta=self.beta,
        loss_type=loss_type,
        label_smoothing=self.label_smoothing if loss_type == "robust" else 0.0,
    )
    return _log(self, batch, loss, metrics, aux_loss)


def _ipo_lengths_differ(trainer: Trainer, batch: dict[str, Any]) -> bool:
    """Whether any rank has a completion without a prompt: TRL divides by its length with the first token, which nothing
    predicts and which is not counted here. Waits for the device.
    """
    if trainer.loss_types != ["ipo"]:
        return False
    return bool(trainer.accelerator.gather(batch["completion_mask"][:, 0].max()).any())


def _model_inputs(batch: dict[str, Any], prefix: str | None = None) -> tuple[dict[str, Any], torch.Tensor]:
    """What a model takes of a batch, and the labels; with the prefix "KL_" of KTO's mismatched pairs."""
    inputs = {name: value for name, value in batch.items() if name not in DATA and not name.startswith("KL_")}
    if prefix is not None:
        inputs.update({name.removeprefix(prefix): batch[name] for name in batch if name.startswith(prefix)})
    completion_mask = inputs.pop("completion_mask")
    return inputs, inputs["input_ids"].masked_fill(completion_mask == 0, -100)


def _with_router_logits(trainer: Trainer, model_inputs: dict[str, Any]) -> dict[str, Any]:
    return {**model_inputs, "output_router_logits": True} if trainer.aux_loss_enabled else model_inputs


@contextmanager
def _reference(trainer: Trainer) -> Iterator[nn.Module]:
    """The reference model: one of its own, or the policy with its adapters off or its adapter "ref" on."""
    from trl.models.utils import disable_gradient_checkpointing
    from trl.trainer.utils import use_adapter

    reference = trainer.ref_model
    with ExitStack() as policy_as_reference:
        if reference is None and is_peft_model(trainer.model):
            reference = trainer.model
            unwrapped = trainer.accelerator.unwrap_model(reference)
            checkpointing = disable_gradient_checkpointing(reference, trainer.args.gradient_checkpointing_kwargs)
            adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
            for context in (checkpointing, huggingface.keeping_trainable(unwrapped), adapter):
                policy_as_reference.enter_context(context)
        yield reference


def _fused(
    trainer: Trainer, function: Callable, model: nn.Module, model_inputs: dict[str, Any], **arguments
) -> tuple[Any, ...]:
    """``function``'s results, computed inside the model's forward, then the load-balancing loss or None."""
    if _pads_on_the_right(trainer):
        model_inputs = huggingface.without_padding_mask(model, model_inputs, trainer.accelerator.mixed_precision)
    gradient_path, outcome = model(**model_inputs, fused_lm_head=FusedCall(function, arguments))
    return *outcome.results(gradient_path), outcome.aux_loss


def _pads_on_the_right(trainer: Trainer) -> bool:
    """As TRL's collators do, where nothing else has its hands on their batches."""
    from trl import DPOTrainer, KTOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    own = KTOTrainer if isinstance(trainer, KTOTrainer) else DPOTrainer
    collator = trainer.data_collator
    is_trls = type(collator) in (DataCollatorForPreference, DataCollatorForUnpairedPreference)
    return is_trls and "torch_call" not in vars(collator) and _overridden(trainer, own, MAKES_BATCHES) is None


@torch.no_grad()
def _sequence_logps(
    trainer: Trainer, model: nn.Module, model_inputs: dict[str, Any], labels: torch.Tensor
) -> torch.Tensor:
    logps, _ = _fused(trainer, linear_sequence_logps, model, model_inputs, labels=labels)
    return logps


def _log(
    trainer: Trainer, batch: dict[str, Any], loss: torch.Tensor, metrics: LossMetrics, aux_loss: torch.Tensor | None
) -> torch.Tensor:
    """Append to ``trainer._metrics`` what TRL appends, with one wait for the device; the loss with its auxiliary."""
    accelerator = trainer.accelerator
    is_kto = metrics.desirable is not None
    totals = metrics.totals()
    one = torch.ones_like(totals["entropy"][1])
    totals["num_tokens"] = batch["attention_mask"].sum().to(one), one
    if trainer.aux_loss_enabled:
        totals["aux_loss"] = aux_loss.detach().to(one), one
        loss = loss + trainer.router_aux_loss_coef * aux_loss

    local = torch.stack([torch.stack(total_and_weight) for total_and_weight in totals.values()])[None]
    # of an uneven last batch TRL drops ranks, but not from the rewards and log-probabilities of pairs
    of_all, of_kept = torch.stack(
        [gather(local).sum(0) for gather in (accelerator.gather, accelerator.gather_for_metrics)]
    ).tolist()
    sums = {}
    for name, all_ranks, kept_ranks in zip(totals, of_all, of_kept, strict=True):
        sums[name] = all_ranks if not is_kto and name.startswith(("rewards/", "logps/")) else kept_ranks

    mode = "train" if trainer.model.training else "eval"
    if mode == "train":
        trainer._total_train_tokens += int(sums["num_tokens"][0])
    del sums["num_tokens"]
    logged = trainer._metrics[mode]
    logged["num_tokens"] = [trainer._total_train_tokens]
    means = {name: total / weight for name, (total, weight) in sums.items() if weight > 0}
    for name in sums if not is_kto else ("entropy",):
        means.setdefault(name, 0.0)
    for name, mean in with_margins(means).items():
        logged[name].append(mean)
    return loss
