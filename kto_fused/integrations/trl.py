"""TRL's KTO and DPO trainers on this package: ``trainer = fuse(KTOTrainer(...))``.

``fuse`` changes one trainer object, in this order:

1. It asks whether anything keeps this package from taking the trainer over ("What TRL keeps"). If so, the trainer stays
   as it is, and a warning names the reason.
2. It patches the policy and the reference, so that both compute log-probabilities here (``trl_model.py``).
3. If TRL and this package define the loss alike, ``_kto_loss`` or ``_dpo_loss`` replaces the trainer's
   ``_compute_loss``. Otherwise TRL computes the loss from this package's log-probabilities, and a warning says why.
4. If TRL has precomputed reference log-probabilities, they are computed again here ("Precomputed references").
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import transformers
import trl
from accelerate.utils import broadcast_object_list, is_peft_model, send_to_device
from torch import nn
from transformers import Trainer
from transformers.utils import ModelOutput

from .. import __version__, huggingface
from ..functional import fused_linear_dpo_loss, fused_linear_kto_loss, linear_sequence_logps
from ..huggingface.forward import FusedCall
from ..huggingface.padding import without_padding_mask
from ..huggingface.running import evaluating, keeping_trainable
from ..metrics import LossMetrics, with_margins
from .trl_model import PATCHED, fuse_models

# Everything else of TRL is imported where it is used, after the check of its version.
TRL_VERSION = "1.16"

# losses that TRL and this package define alike; TRL's "sigmoid" ignores label smoothing
SHARED_KTO_LOSSES = ("kto", "apo_zero_unpaired")
SHARED_DPO_LOSSES = ("sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down")
# methods of a trainer that the whole loss replaces
REPLACED = ("compute_loss", "_compute_loss", "_compute_kl_logps")
# methods of a trainer that make its batches
MAKES_BATCHES = ("get_train_dataloader", "get_eval_dataloader", "_prepare_inputs")
# methods of a trainer that precompute the reference log-probabilities
PRECOMPUTES = ("compute_ref_log_probs", "_precompute_ref_logps")
REF_COLUMNS = ("ref_logps", "ref_KL_logps", "ref_chosen_logps", "ref_rejected_logps")
# columns of a batch that are no arguments of a model
NOT_FOR_MODELS = ("label", *REF_COLUMNS)

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
        trainer: a ``KTOTrainer`` or ``DPOTrainer`` of TRL 1.16. Fusing it again changes nothing.

    Returns:
        The same trainer.

    Raises:
        ImportError: TRL has another version.
        TypeError: ``trainer`` is neither a ``KTOTrainer`` nor a ``DPOTrainer``.

    After an error, also one while the datasets are scored again, the trainer and its models are what they were.
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
        keeps_all = _why_trl_keeps_all(trainer) or fuse_models(trainer)
        if keeps_all is not None:
            restore()
            logger.warning("TRL computes everything as before: %s.", keeps_all)
            return trainer
        keeps_loss = _overridden(trainer, own, REPLACED) or _why_trl_keeps_the_loss(trainer)
        if trainer.precompute_ref_logps:
            keeps_loss = _overridden(trainer, own, PRECOMPUTES) or keeps_loss
        if keeps_loss is None:
            is_kto = own is KTOTrainer
            trainer._compute_loss = MethodType(_kto_loss if is_kto else _dpo_loss, trainer)
            trainer.compute_ref_log_probs = MethodType(_kto_ref_log_probs if is_kto else _dpo_ref_log_probs, trainer)
        if trainer.precompute_ref_logps:
            trainer.data_collator = _ExactReference(trainer.data_collator)
            trainer._prepare_input = MethodType(_prepare_input, trainer)
            _precompute_again(trainer, is_whole=keeps_loss is None)
        trainer._is_fused = True
    except BaseException:
        restore()
        raise
    if keeps_loss is not None:
        logger.warning("TRL computes the loss, from this package's log-probabilities: %s.", keeps_loss)
    difference = _rounding_difference(trainer)
    if difference is not None:
        logger.warning("Equal weights of policy and reference would not give a log-ratio of 0: %s.", difference)
    return trainer


def _restorer(trainer: Trainer) -> Callable[[], None]:
    """Return a function that undoes every change to the trainer and its models since this call."""
    attributes = dict(vars(trainer))
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    patches = []
    for module in (module for model in models for module in model.modules()):
        patch = {name: module.__dict__[name] for name in PATCHED if name in module.__dict__}
        if "_forwards_before_fuse" in patch:  # fuse appends to this list
            patch["_forwards_before_fuse"] = [*patch["_forwards_before_fuse"]]
        patches.append((module, patch))

    def restore() -> None:
        vars(trainer).clear()
        vars(trainer).update(attributes)
        for module, patch in patches:
            for name in PATCHED:
                module.__dict__.pop(name, None)
            module.__dict__.update(patch)

    return restore


# ---- What TRL keeps ------------------------------------------------------------------------------------------------
# Each function returns a reason in words, for a warning, or None.


def _why_trl_keeps_all(trainer: Trainer) -> str | None:
    """Return why nothing of this trainer can be taken over, or None."""
    state, parallel = trainer.accelerator.state, trainer.accelerator.parallelism_config
    if trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
        return "DeepSpeed ZeRO-3 shards the LM head, use FSDP2"
    if trainer.is_fsdp_enabled and state.fsdp_plugin.fsdp_version == 1:
        return "FSDP1 flattens the LM head, set fsdp_version=2"
    if parallel is not None and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled):
        return "tensor, context and sequence parallelism split the LM head or the sequences, which the loss needs whole"
    if trainer._is_vlm:
        return "vision-language models are not supported"
    if trainer.accelerator.device.type == "mps":
        return "MPS has no float64"
    if getattr(trainer, "use_weighting", False):
        return "use_weighting=True needs the sum of squared probabilities, which only TRL's LM head computes"
    return _why_reference_is_lost(trainer) if trainer.precompute_ref_logps else None


def _why_reference_is_lost(trainer: Trainer) -> str | None:
    """Return why the reference that TRL scored the datasets with is no longer there to score them again, or None."""
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


def _why_trl_keeps_the_loss(trainer: Trainer) -> str | None:
    """Return why TRL computes the loss of a trainer with these settings, or None."""
    if trainer.beta <= 0:
        return f"beta={trainer.beta} is not positive"
    if hasattr(trainer, "loss_type"):  # a KTOTrainer
        if trainer.loss_type not in SHARED_KTO_LOSSES:
            return f"loss_type={trainer.loss_type!r} is not one of {list(SHARED_KTO_LOSSES)}"
        if min(trainer.desirable_weight, trainer.undesirable_weight) < 0:
            return "a class weight is negative"
        return None
    if trainer.loss_types == ["ipo"] and trainer.precompute_ref_logps:
        return (
            "loss_type=['ipo'] needs TRL's loss for batches with an empty prompt, and its sums round differently from "
            "the precomputed ones"
        )
    if len(trainer.loss_types) != 1 or trainer.loss_types[0] not in SHARED_DPO_LOSSES:
        return f"loss_type={trainer.loss_types} is not one of {list(SHARED_DPO_LOSSES)}"
    if trainer.loss_weights != [1.0]:
        return f"loss_weights={trainer.loss_weights} is not [1.0]"
    if trainer.loss_types == ["robust"] and not 0 <= trainer.label_smoothing < 0.5:
        return f"label_smoothing={trainer.label_smoothing} lies outside [0, 0.5)"
    if trainer.ld_alpha is not None:
        return f"ld_alpha={trainer.ld_alpha} is not None"
    if trainer.f_divergence_type != "reverse_kl":
        return f"f_divergence_type={trainer.f_divergence_type!r} is not 'reverse_kl'"
    return None


def _overridden(trainer: Trainer, own: type, names: tuple[str, ...]) -> str | None:
    """Return which of these methods of TRL's class ``own`` the trainer overrides, or None."""
    for name in names:
        method = getattr(trainer, name, None)
        if getattr(method, "__func__", method) is not getattr(own, name, None):
            return f"{type(trainer).__name__}.{name} is not {own.__name__}'s"
    return None


def _is_left_to_trl(trainer: Trainer) -> bool:
    """Return whether settings that changed since ``fuse`` leave the loss to TRL.

    Raises:
        ValueError: the reference log-probabilities are precomputed, as float64 sums. TRL's loss sums the policy's in
            float32, so equal weights would not give a log-ratio of 0.
    """
    reason = _why_trl_keeps_the_loss(trainer)
    if reason is not None and trainer.precompute_ref_logps:
        raise ValueError(
            f"{reason}: this was set after fuse(trainer), which precomputed the reference log-probabilities for "
            "another loss. Set it before fuse"
        )
    return reason is not None


def _rounding_difference(trainer: Trainer) -> str | None:
    """Return how the user's settings round the policy and the reference differently, or None."""
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


# ---- The whole loss ------------------------------------------------------------------------------------------------


def _kto_loss(self: Trainer, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
    """Replace ``KTOTrainer._compute_loss``."""
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
    (loss, metrics), aux_loss = _call(
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
    _log(self, batch, metrics, aux_loss)
    loss = _with_aux_loss(self, loss, aux_loss)
    return (loss, _outputs(model, model_inputs)) if return_outputs else loss


def _dpo_loss(self: Trainer, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
    """Replace ``DPOTrainer._compute_loss``."""
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
    (loss, metrics), aux_loss = _call(
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
    _log(self, batch, metrics, aux_loss)
    loss = _with_aux_loss(self, loss, aux_loss)
    return (loss, _outputs(model, model_inputs)) if return_outputs else loss


def _ipo_lengths_differ(trainer: Trainer, batch: dict[str, Any]) -> bool:
    """Return whether any rank has a completion without a prompt. Waits for the device.

    TRL's IPO divides by the number of completion tokens, the first token of the sequence included. Nothing predicts
    that token, so this package does not count it.
    """
    if trainer.loss_types != ["ipo"]:
        return False
    return bool(trainer.accelerator.gather(batch["completion_mask"][:, 0].max()).any())


def _model_inputs(batch: dict[str, Any], prefix: str | None = None) -> tuple[dict[str, Any], torch.Tensor]:
    """Return the model's arguments and the labels; with the prefix "KL_" those of KTO's mismatched pairs."""
    inputs = {name: value for name, value in batch.items() if name not in NOT_FOR_MODELS and not name.startswith("KL_")}
    if prefix is not None:
        inputs.update({name.removeprefix(prefix): batch[name] for name in batch if name.startswith(prefix)})
    completion_mask = inputs.pop("completion_mask")
    return inputs, inputs["input_ids"].masked_fill(completion_mask == 0, -100)


def _with_router_logits(trainer: Trainer, model_inputs: dict[str, Any]) -> dict[str, Any]:
    return {**model_inputs, "output_router_logits": True} if trainer.aux_loss_enabled else model_inputs


def _with_aux_loss(trainer: Trainer, loss: torch.Tensor, aux_loss: torch.Tensor | None) -> torch.Tensor:
    return loss + trainer.router_aux_loss_coef * aux_loss if trainer.aux_loss_enabled else loss


@torch.no_grad()
def _outputs(model: nn.Module, model_inputs: dict[str, Any]) -> ModelOutput:
    """Return the model's own outputs; a trainer with ``compute_metrics`` asks for their logits."""
    return model(**model_inputs, use_cache=False)


@contextmanager
def _reference(trainer: Trainer) -> Iterator[nn.Module]:
    """Yield the reference model: ``ref_model``, or the policy with its adapters off or with its adapter "ref"."""
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


@torch.no_grad()
def _sequence_logps(
    trainer: Trainer, model: nn.Module, model_inputs: dict[str, Any], labels: torch.Tensor
) -> torch.Tensor:
    (logps,), _ = _call(trainer, linear_sequence_logps, model, model_inputs, labels=labels)
    return logps


def _call(
    trainer: Trainer, function: Callable, model: nn.Module, model_inputs: dict[str, Any], **arguments
) -> tuple[tuple[Any, ...], torch.Tensor | None]:
    """Call ``function`` inside the model's forward; return its results and the load-balancing loss or None."""
    # The router loss reads the attention mask. The reference then gets the mask too, so that policy and reference run
    # the same attention kernel.
    if not trainer.aux_loss_enabled and _pads_on_the_right(trainer):
        model_inputs = without_padding_mask(model, model_inputs, trainer.accelerator.mixed_precision)
    gradient_path, outcome = model(**model_inputs, fused_lm_head=FusedCall(function, arguments))
    return outcome.results(gradient_path), outcome.aux_loss


def _pads_on_the_right(trainer: Trainer) -> bool:
    """Return whether TRL's own collator and methods make the batches: these pad on the right."""
    from trl import DPOTrainer, KTOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    own = KTOTrainer if isinstance(trainer, KTOTrainer) else DPOTrainer
    collator = trainer.data_collator
    if isinstance(collator, _ExactReference):
        collator = collator.collator
    is_trls = type(collator) in (DataCollatorForPreference, DataCollatorForUnpairedPreference)
    return is_trls and "torch_call" not in vars(collator) and _overridden(trainer, own, MAKES_BATCHES) is None


def _log(trainer: Trainer, batch: dict[str, Any], metrics: LossMetrics, aux_loss: torch.Tensor | None) -> None:
    """Append to ``trainer._metrics`` the values that TRL appends, with one wait for the device."""
    accelerator = trainer.accelerator
    is_kto = metrics.desirable is not None
    totals = metrics.totals()
    one = torch.ones_like(totals["entropy"][1])
    totals["num_tokens"] = batch["attention_mask"].sum().to(one), one
    if trainer.aux_loss_enabled:
        totals["aux_loss"] = aux_loss.detach().to(one), one

    local = torch.stack([torch.stack(total_and_weight) for total_and_weight in totals.values()])[None]
    # In an uneven last batch TRL drops ranks, but not from the rewards and log-probabilities of pairs.
    all_ranks, kept_ranks = torch.stack(
        [gather(local).sum(0) for gather in (accelerator.gather, accelerator.gather_for_metrics)]
    ).tolist()
    sums = {}
    for name, of_all, of_kept in zip(totals, all_ranks, kept_ranks, strict=True):
        sums[name] = of_all if not is_kto and name.startswith(("rewards/", "logps/")) else of_kept

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


# ---- Precomputed references ----------------------------------------------------------------------------------------


def _precompute_again(trainer: Trainer, is_whole: bool) -> None:
    """Replace the reference log-probabilities that TRL precomputed by this package's.

    TRL names its cache files by a hash of the model. Another hash keeps the two kinds of values apart: a fused trainer
    never reads TRL's, and an unfused one never reads this package's.
    """
    args = trainer.args
    model = trainer.model if trainer.ref_model is None else trainer.ref_model
    trainer._precompute_model_hash = _numerics_hash(trainer, model, is_whole)

    def scored(dataset: Any, name: str, batch_size: int) -> Any:
        dataset = dataset.remove_columns([column for column in REF_COLUMNS if column in dataset.column_names])
        return trainer._precompute_ref_logps(dataset, name, args.precompute_ref_batch_size or batch_size)

    # an iterator over a data loader draws a seed; evaluation mode keeps dropout from drawing
    with torch.random.fork_rng(devices=[]), evaluating(model):
        trainer.train_dataset = scored(trainer.train_dataset, "train", args.per_device_train_batch_size)
        sets, size = trainer.eval_dataset, args.per_device_eval_batch_size
        if isinstance(sets, dict):
            trainer.eval_dataset = {name: scored(dataset, name, size) for name, dataset in sets.items()}
        elif sets is not None:
            trainer.eval_dataset = scored(sets, "eval", size)


def _numerics_hash(trainer: Trainer, model: nn.Module, is_whole: bool) -> str:
    """Return a hash of everything that the reference log-probabilities depend on; TRL's hash covers the weights."""
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


def _kto_ref_log_probs(
    self: Trainer, model: nn.Module, inputs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Replace ``KTOTrainer.compute_ref_log_probs``: return [B] of the completions and [B] of the mismatched pairs."""
    with _scoring(self, model):
        logps = _sequence_logps(self, model, *_model_inputs(inputs))
        kl_logps = _sequence_logps(self, model, *_model_inputs(inputs, prefix="KL_")) if self.calculate_KL else None
    return logps, kl_logps


def _dpo_ref_log_probs(self: Trainer, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace ``DPOTrainer.compute_ref_log_probs``: return [pairs] of the chosen and of the rejected completions."""
    with _scoring(self, model):
        return _sequence_logps(self, model, *_model_inputs(inputs)).chunk(2)


@contextmanager
def _scoring(trainer: Trainer, model: nn.Module) -> Iterator[None]:
    """Make ``model`` the reference: its adapters off or "ref" on, in evaluation mode."""
    with _reference(trainer), evaluating(model):
        yield


@dataclass
class _ExactReference:
    """A data collator that keeps precomputed values in float64, in which this package sums. TRL's rounds to float32."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        for name in REF_COLUMNS:
            if name in batch:
                batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float64)
        return batch


def _prepare_input(self: Trainer, data: Any) -> Any:
    """Replace ``Trainer._prepare_input``, which under DeepSpeed rounds the precomputed values to the model's dtype."""
    return data.to(self.args.device) if isinstance(data, torch.Tensor) else type(self)._prepare_input(self, data)
