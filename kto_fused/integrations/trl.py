"""TRL's KTO and DPO trainers on this package: ``trainer = fuse(KTOTrainer(...))``."""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import transformers
import trl
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, convert_outputs_to_fp32, is_peft_model, send_to_device
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import ModelOutput

from .. import __version__, huggingface
from ..functional import fused_linear_dpo_loss, fused_linear_kto_loss, linear_sequence_logps, linear_token_logps
from ..huggingface.forward import FusedCall, Outcome, call_at_head
from ..huggingface.padding import without_padding_mask
from ..huggingface.running import evaluating, keeping_trainable
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
# methods of a trainer that precompute the reference log-probabilities
PRECOMPUTES = ("compute_ref_log_probs", "_precompute_ref_logps")
REF_COLUMNS = ("ref_logps", "ref_KL_logps", "ref_chosen_logps", "ref_rejected_logps")
# columns of a batch that no model takes
DATA = ("label", *REF_COLUMNS)
# attributes of modules that fuse sets or replaces
PATCHED = ("forward", "_original_forward", "_unfused_forward", "_unanswered_forwards")

logger = logging.getLogger(__name__)


def fuse(trainer: Trainer) -> Trainer:
    """Let a TRL ``KTOTrainer`` or ``DPOTrainer`` compute with this package: same losses, same logged values.

    - This package computes the log-probabilities of the policy and of the reference, for every loss type. TRL keeps
      the formulas of the losses.
    - Some losses are taken over whole: the policy's LM head and the loss become one call, which takes 3 GEMMs instead
      of 4 (2 instead of 3 with a frozen head) and waits for the device once for all logged values. These are KTO's
      ``kto`` and ``apo_zero_unpaired``, and DPO's ``sigmoid``, ``hinge``, ``ipo``, ``robust``, ``apo_zero`` and
      ``apo_down``, if the loss type stands alone with weight 1, ``ld_alpha`` is None, and ``f_divergence_type`` is
      "reverse_kl". For ``ipo`` TRL computes the loss of a batch with an empty prompt, and of every batch if the
      reference log-probabilities are precomputed.

    **Where this package cannot take a trainer over, TRL computes everything as before.** ``fuse`` then returns the
    trainer and its models unchanged, and one warning names the reason. That happens with vision-language models,
    DeepSpeed ZeRO-3, FSDP1, tensor, context and sequence parallelism, ``use_weighting``, MPS, with every model that
    ``huggingface.attach`` refuses (prompt tuning, p-tuning, prefix tuning, a quantised LM head, ...), and where
    reference log-probabilities were precomputed and the reference is no longer there (see below).

    **Policy and reference are always scored by the same code at the same precision.** With
    ``precompute_ref_log_probs=True`` TRL scores the datasets in the trainer's ``__init__``, with logits rounded to the
    autocast dtype. ``fuse`` therefore scores them again: one more forward pass over the training and evaluation data,
    which a later run reads from the ``datasets`` cache. The reference must still be there: as ``ref_model``, or as the
    policy with the weights that TRL scored. Call ``fuse`` before ``train``, also when a run is resumed: the checkpoint
    is loaded by ``train``, so the reference is the initial model. ``evaluate(dataset)`` scores a new dataset in the
    same way, or is refused by TRL once the policy has been trained. Under FSDP, precomputing needs a ``ref_model``.

    A fused trainer differs from TRL's in these ways:

    - Logits are not rounded to half precision.
    - A soft cap of the logits is applied under every name it has in a configuration. TRL misses RecurrentGemma's and
      xLSTM's.
    - Random operations during training (dropout that is still active, router jitter, NEFTune noise) draw other
      numbers, because the reference is scored before the policy.
    - If the log-probability of one sequence is NaN, KTO's loss and the logged values of its class are NaN. TRL leaves
      the sequence out of the loss, but its gradient is NaN.
    - If several tokens share the highest logit, each of them counts as right for ``mean_token_accuracy``. In TRL only
      the first does.
    - Frozen weights of an adapter stay frozen. TRL's reference pass unfreezes them, and from the second step on their
      gradients count towards the norm that clips the gradient.

    Args:
        trainer: of TRL 1.16. Fusing it again changes nothing.

    Returns:
        The same trainer.

    Raises:
        ImportError: TRL has another version.
        TypeError: ``trainer`` is neither a ``KTOTrainer`` nor a ``DPOTrainer``.

    After an error, in the second scoring of the datasets too, trainer and models are what they were.
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
    own = KTOTrainer if isinstance(trainer, KTOTrainer) else DPOTrainer
    restore = _restorer(trainer)
    try:
        unsupported = _unsupported(trainer) or _install(trainer)
        if unsupported is not None:
            restore()
            logger.warning("TRL computes everything as before: %s.", unsupported)
            return trainer
        not_whole = _overridden(trainer, own, REPLACED) or _not_whole(trainer)
        if trainer.precompute_ref_logps:
            not_whole = _overridden(trainer, own, PRECOMPUTES) or not_whole
        if not_whole is None:
            is_kto = own is KTOTrainer
            trainer._compute_loss = MethodType(_kto_loss if is_kto else _dpo_loss, trainer)
            trainer.compute_ref_log_probs = MethodType(_kto_ref_log_probs if is_kto else _dpo_ref_log_probs, trainer)
        if trainer.precompute_ref_logps:
            trainer.data_collator = _ExactReference(trainer.data_collator)
            trainer._prepare_input = MethodType(_prepare_input, trainer)
            _precompute_again(trainer, is_whole=not_whole is None)
        trainer._is_fused = True
    except BaseException:
        restore()
        raise
    if not_whole is not None:
        logger.warning("TRL computes the loss, from this package's log-probabilities: %s.", not_whole)
    difference = _other_rounding(trainer)
    if difference is not None:
        logger.warning("Equal weights of policy and reference would not give a log-ratio of 0: %s.", difference)
    return trainer


def _restorer(trainer: Trainer) -> Callable[[], None]:
    """A function that undoes what ``fuse`` did to the trainer and its models since this call."""
    attributes = dict(vars(trainer))
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    patches = []
    for module in (module for model in models for module in model.modules()):
        patch = {name: module.__dict__[name] for name in PATCHED if name in module.__dict__}
        if "_unanswered_forwards" in patch:  # a list that fuse appends to
            patch["_unanswered_forwards"] = [*patch["_unanswered_forwards"]]
        patches.append((module, patch))

    def restore() -> None:
        vars(trainer).clear()
        vars(trainer).update(attributes)
        for module, patch in patches:
            for name in PATCHED:
                module.__dict__.pop(name, None)
            module.__dict__.update(patch)

    return restore


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
    if getattr(trainer, "use_weighting", False):
        return "use_weighting=True needs the sum of squared probabilities, which only TRL's LM head computes"
    return _lost_reference(trainer) if trainer.precompute_ref_logps else None


def _lost_reference(trainer: Trainer) -> str | None:
    """Why the datasets, which TRL scored by the reference, cannot be scored by it again, or None."""
    if trainer.ref_model is not None:
        return None
    if trainer.is_fsdp_enabled:
        return (
            "precompute_ref_log_probs=True under FSDP, where TRL has dropped the reference that it scored the data "
            "with: pass ref_model, or set precompute_ref_log_probs=False"
        )
    from trl.trainer.utils import hash_module

    is_initial = [hash_module(trainer.model) == trainer._precompute_model_hash]
    broadcast_object_list(is_initial, from_process=0)
    if is_initial[0]:
        return None
    return (
        "the policy's weights changed after TRL precomputed the reference log-probabilities with them, so this "
        "package cannot compute them again: call fuse before training, or pass ref_model"
    )


def _other_rounding(trainer: Trainer) -> str | None:
    """How the policy is rounded otherwise than the reference, by the user's choice, or None."""
    args = trainer.args
    if trainer.ref_model is not None:
        policy, reference = huggingface.unwrap(trainer.model), huggingface.unwrap(trainer.ref_model)
        if policy.dtype != reference.dtype:
            return f"the policy is {policy.dtype} and the reference {reference.dtype}, load both in one dtype"
        attentions = [getattr(model.config, "_attn_implementation", None) for model in (policy, reference)]
        if attentions[0] != attentions[1]:
            return f"their attn_implementation is {attentions[0]} and {attentions[1]}, load both with one"
    elif is_peft_model(trainer.model) and not trainer.precompute_ref_logps:
        return None
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            return f"{name}=True rounds the weights of the policy alone, leave it out"
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
    if trainer.loss_types == ["ipo"] and trainer.precompute_ref_logps:
        return "with loss_type=['ipo'] some batches need TRL's loss, whose sums round otherwise than precomputed ones"
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
    return None


# ---- precomputed reference log-probabilities ----------------------------------------------------------------------


def _precompute_again(trainer: Trainer, is_whole: bool) -> None:
    """Replace the reference log-probabilities that TRL precomputed by this package's.

    TRL's cache files are named by the hash of the model. Another hash keeps both kinds of values apart: a fused trainer
    never reads TRL's, and an unfused one never this package's.
    """
    args = trainer.args
    model = trainer.model if trainer.ref_model is None else trainer.ref_model
    trainer._precompute_model_hash = _numerics_hash(trainer, model, is_whole)

    def again(dataset: Any, name: str, batch_size: int) -> Any:
        dataset = dataset.remove_columns([column for column in REF_COLUMNS if column in dataset.column_names])
        return trainer._precompute_ref_logps(dataset, name, args.precompute_ref_batch_size or batch_size)

    # an iterator over a data loader draws a seed; evaluation mode, so that dropout draws nothing
    with torch.random.fork_rng(devices=[]), evaluating(model):
        trainer.train_dataset = again(trainer.train_dataset, "train", args.per_device_train_batch_size)
        sets, size = trainer.eval_dataset, args.per_device_eval_batch_size
        if isinstance(sets, dict):
            trainer.eval_dataset = {name: again(dataset, name, size) for name, dataset in sets.items()}
        elif sets is not None:
            trainer.eval_dataset = again(sets, "eval", size)


def _numerics_hash(trainer: Trainer, model: nn.Module, is_whole: bool) -> str:
    """A hash of TRL's hash of the weights and of what else the reference log-probabilities depend on."""
    from datasets.fingerprint import Hasher

    device = trainer.accelerator.device
    adapters = getattr(trainer.accelerator.unwrap_model(model), "peft_config", {})
    config = huggingface.unwrap(model).config
    depends_on = (
        trainer._precompute_model_hash,
        ("kto_fused", __version__, is_whole, torch.__version__, transformers.__version__),
        (trainer.accelerator.mixed_precision, torch.get_float32_matmul_precision()),
        (device.type, torch.cuda.get_device_name(device) if device.type == "cuda" else None),
        (config.to_json_string(use_diff=False), getattr(config, "_attn_implementation", None)),
        {name: adapter.to_dict() for name, adapter in adapters.items()},
        (repr(trainer.data_collator), getattr(trainer, "ld_alpha", None)),
    )
    return Hasher.hash(depends_on)


@contextmanager
def _scoring(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """``model`` as the reference."""
    with _reference(trainer), evaluating(model):
        yield


def _kto_ref_log_probs(
    self: Trainer, model: nn.Module, inputs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """In place of ``KTOTrainer.compute_ref_log_probs``: [B] of the completions, and of the mismatched pairs or None."""
    with _scoring(self, model):
        logps = _sequence_logps(self, model, *_model_inputs(inputs))
        kl_logps = _sequence_logps(self, model, *_model_inputs(inputs, prefix="KL_")) if self.calculate_KL else None
    return logps, kl_logps


def _dpo_ref_log_probs(self: Trainer, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of ``DPOTrainer.compute_ref_log_probs``: [pairs] of the chosen and of the rejected completions."""
    with _scoring(self, model):
        return _sequence_logps(self, model, *_model_inputs(inputs)).chunk(2)


@dataclass
class _ExactReference:
    """A data collator whose precomputed values stay float64, in which this package sums; TRL's round to float32."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        for name in REF_COLUMNS:
            if name in batch:
                batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float64)
        return batch


def _prepare_input(self: Trainer, data: Any) -> Any:
    """In place of ``Trainer``'s, which under DeepSpeed rounds the precomputed values to the model's dtype."""
    return data.to(self.args.device) if isinstance(data, torch.Tensor) else type(self)._prepare_input(self, data)


# ---- inside the models' forward -----------------------------------------------------------------------------------


def _install(trainer: Trainer) -> str | None:
    """Answer ``fused_lm_head`` from this package's engine in policy and reference. Why a model is refused, or None."""
    inners = []
    for role, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        if model is None:
            continue
        try:
            inner = huggingface.unwrap(model)
            # accelerate's autocast stands before the forward, and would round the logits that attach compares
            is_prepared = "_original_forward" in inner.__dict__
            if is_prepared:
                inner.forward = inner.__dict__.pop("_original_forward")
            with _without_router_logits(inner):
                huggingface.attach(inner)
        except huggingface.UnsupportedModelError as error:
            return f"the {role} cannot be fused, {error}"
        except Exception as error:  # a model that cannot run as attach runs it may well train in TRL
            return f"the {role} cannot be fused, checking it failed with {type(error).__name__}: {error}"
        inners.append((inner, is_prepared))
    for inner, is_prepared in inners:
        _answer_fused_lm_head(inner, trainer.accelerator)
        if is_prepared:
            _autocast(inner, trainer.accelerator)
    return None


def _autocast(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """As ``accelerator.prepare_model`` wraps a forward."""
    model._original_forward = model.forward
    with_autocast = accelerator.autocast()(model.forward.__func__)
    model.forward = MethodType(convert_outputs_to_fp32(with_autocast), model)


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


def _answer_fused_lm_head(model: PreTrainedModel, accelerator: Accelerator) -> None:
    unfused, level = model.forward, len(model.__dict__.setdefault("_unanswered_forwards", []))
    model._unanswered_forwards.append(unfused)  # a deep copy has its own; trainers that share a model stack them

    def forward(self, *args, fused_lm_head: bool | FusedCall = False, **kwargs) -> Any:
        if fused_lm_head is False:
            return self._unanswered_forwards[level](*args, **kwargs)
        # here too, since not every model that TRL calls was prepared by accelerate: not the policy in an evaluation
        # before training, not the reference under FSDP2
        with accelerator.autocast():
            if fused_lm_head is True:
                return _token_logps(self, *args, **kwargs)
            return _call(self, fused_lm_head, *args, **kwargs)

    # `generate` looks at the signature, but accelerate would follow a __wrapped__ when it takes its own wrappers off
    forward.__signature__ = inspect.signature(unfused)
    model.forward = MethodType(forward, model)


def _call(model: PreTrainedModel, call: FusedCall, *args, **kwargs) -> tuple[torch.Tensor, Outcome]:
    """``call`` in place of the LM head, and the load-balancing loss, unweighted, where router logits are asked for."""
    gradient_path, outcome, routed = call_at_head(model, call, *args, **kwargs)
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
    if _is_left_to_trl(self):
        return type(self)._compute_loss(self, model, inputs, return_outputs)
    batch = send_to_device(inputs, self.accelerator.device)
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
    model_inputs = _with_router_logits(self, model_inputs)
    loss, metrics, aux_loss = _fused(
        self,
        fused_linear_kto_loss,
        model,
        model_inputs,
        labels=labels,
        desirable=batch["label"].bool(),
        ref_logps=ref_logps,
        reference_point=reference_point,
        beta=self.beta,
        desirable_weight=self.desirable_weight,
        undesirable_weight=self.undesirable_weight,
        loss_type=self.loss_type,
    )
    loss = _log(self, batch, loss, metrics, aux_loss)
    return (loss, _outputs(model, model_inputs)) if return_outputs else loss


def _dpo_loss(self: Trainer, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
    """In place of ``DPOTrainer._compute_loss``."""
    batch = send_to_device(inputs, self.accelerator.device)
    if _is_left_to_trl(self) or _ipo_lengths_differ(self, batch):
        return type(self)._compute_loss(self, model, inputs, return_outputs)
    model_inputs, labels = _model_inputs(batch)
    if self.precompute_ref_logps:
        ref_logps = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    else:
        with _reference(self) as reference:
            ref_logps = _sequence_logps(self, reference, model_inputs, labels)
    model_inputs = _with_router_logits(self, model_inputs)
    (loss_type,) = self.loss_types
    loss, metrics, aux_loss = _fused(
        self,
        fused_linear_dpo_loss,
        model,
        model_inputs,
        labels=labels,
        ref_logps=ref_logps,
        beta=self.beta,
        loss_type=loss_type,
        label_smoothing=self.label_smoothing if loss_type == "robust" else 0.0,
    )
    loss = _log(self, batch, loss, metrics, aux_loss)
    return (loss, _outputs(model, model_inputs)) if return_outputs else loss


def _is_left_to_trl(trainer: Trainer) -> bool:
    """Whether the trainer's settings, changed since ``fuse``, leave the loss to TRL.

    Raises:
        ValueError: its reference log-probabilities are precomputed. TRL's loss sums the policy's in float32 and the
            precomputed ones were summed in float64, so that equal weights would not give a log-ratio of 0.
    """
    reason = _not_whole(trainer)
    if reason is not None and trainer.precompute_ref_logps:
        raise ValueError(
            f"{reason}: this was set after fuse(trainer), which precomputed the reference log-probabilities for "
            "another loss. Set it before fuse"
        )
    return reason is not None


@torch.no_grad()
def _outputs(model: nn.Module, model_inputs: dict[str, Any]) -> ModelOutput:
    """The model's own outputs, whose logits a trainer with ``compute_metrics`` asks for."""
    return model(**model_inputs, use_cache=False)


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
            for context in (checkpointing, keeping_trainable(unwrapped), adapter):
                policy_as_reference.enter_context(context)
        yield reference


def _fused(
    trainer: Trainer, function: Callable, model: nn.Module, model_inputs: dict[str, Any], **arguments
) -> tuple[Any, ...]:
    """``function``'s results, computed inside the model's forward, then the load-balancing loss or None."""
    # the router loss needs the mask: then the reference gets it too, so that both run the same attention kernel
    if not trainer.aux_loss_enabled and _pads_on_the_right(trainer):
        model_inputs = without_padding_mask(model, model_inputs, trainer.accelerator.mixed_precision)
    gradient_path, outcome = model(**model_inputs, fused_lm_head=FusedCall(function, arguments))
    return *outcome.results(gradient_path), outcome.aux_loss


def _pads_on_the_right(trainer: Trainer) -> bool:
    """As TRL's collators do, where nothing else has its hands on their batches."""
    from trl import DPOTrainer, KTOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    own = KTOTrainer if isinstance(trainer, KTOTrainer) else DPOTrainer
    collator = trainer.data_collator
    if isinstance(collator, _ExactReference):
        collator = collator.collator
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
