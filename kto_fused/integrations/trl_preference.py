"""The whole loss of TRL's ``KTOTrainer`` and ``DPOTrainer``: methods that replace the trainers' own.

One call at the policy's LM head computes the loss and its gradients; the values that TRL logs come from its metrics.
``dpo_head`` says which loss of ``kto_fused.heads`` a DPO trainer's settings ask for.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import is_peft_model, send_to_device
from torch import nn
from transformers import Trainer
from transformers.utils import ModelOutput

from .. import heads
from ..functional import fused_linear_kto_loss, fused_linear_loss, linear_sequence_logps
from ..huggingface.forward import FusedCall
from ..huggingface.padding import without_padding_mask
from ..huggingface.running import keeping_trainable
from ..metrics import LossMetrics, weighted_total, with_margins
from ..token_weights import ld_token_weights

SHARED_KTO_LOSSES = ("kto", "apo_zero_unpaired")
# losses that read log-ratios through an f-divergence's score
SCORED = ("sigmoid", "hinge", "ipo", "sigmoid_norm", "exo_pair", "robust", "discopop")
# losses with TRL's label smoothing; TRL's "sigmoid" ignores it
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
# losses that divide by the completions' lengths
LENGTH_AVERAGED = ("ipo", "sigmoid_norm")
# methods of a trainer that make its batches
MAKES_BATCHES = ("get_train_dataloader", "get_eval_dataloader", "_prepare_inputs")
REF_COLUMNS = ("ref_logps", "ref_KL_logps", "ref_chosen_logps", "ref_rejected_logps")
# columns of a batch that are no arguments of a model
NOT_FOR_MODELS = ("label", *REF_COLUMNS)


@dataclass
class ExactReference:
    """A data collator that keeps precomputed values in float64, in which this package sums. TRL's rounds to float32."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        for name in REF_COLUMNS:
            if name in batch:
                batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float64)
        return batch


# ---- Which loss it is ----------------------------------------------------------------------------------------------


def dpo_head(trainer: Trainer) -> heads.Head:
    """Return the loss that a ``DPOTrainer``'s settings ask for: one head, or a ``Mix`` for weights or several losses.

    Raises:
        ValueError: no head is defined as TRL's loss is. The message names the setting.
    """
    if trainer.ld_alpha is not None and (trainer.use_weighting or trainer.loss_types == ["sft"]):
        also = "use_weighting=True" if trainer.use_weighting else "loss_type=['sft'], which has no pairs"
        raise ValueError(f"ld_alpha={trainer.ld_alpha} stands beside {also}")
    if trainer.use_weighting and "sft" in trainer.loss_types:
        raise ValueError("use_weighting=True multiplies the mean loss of 'sft' by the weights of all pairs")
    if trainer.use_weighting and _is_length_averaged(trainer):  # their batches with an empty prompt are TRL's
        raise ValueError(f"use_weighting=True stands beside loss_type={trainer.loss_types}")
    losses = [_dpo_part(trainer, loss_type) for loss_type in trainer.loss_types]
    if len(losses) == 1 and trainer.loss_weights == [1.0]:
        return losses[0]
    return heads.Mix(*zip(map(float, trainer.loss_weights), losses, strict=True))


def _dpo_part(trainer: Trainer, loss_type: str) -> heads.Head:
    if loss_type == "sft":
        return heads.make("sft")
    fields = {"beta": trainer.beta, "ld_alpha": _ld_alpha(trainer)}
    if trainer.use_weighting:
        fields["use_weighting"] = True
    if loss_type in SCORED:
        fields |= {
            "f_divergence_type": trainer.f_divergence_type,
            "f_alpha_divergence_coef": trainer.f_alpha_divergence_coef,
        }
    if loss_type in SMOOTHED:
        fields["label_smoothing"] = trainer.label_smoothing
    if loss_type == "discopop":
        fields["discopop_tau"] = trainer.args.discopop_tau
    return heads.make(loss_type, **fields)


def _ld_alpha(trainer: Trainer) -> float:
    return 1.0 if trainer.ld_alpha is None else trainer.ld_alpha


def why_trl_keeps_kto_loss(trainer: Trainer) -> str | None:
    """Return why TRL computes the loss of a ``KTOTrainer`` with these settings, or None."""
    if trainer.loss_type not in SHARED_KTO_LOSSES:
        return f"loss_type={trainer.loss_type!r} is not one of {list(SHARED_KTO_LOSSES)}"
    if trainer.beta <= 0:
        return f"beta={trainer.beta} is not positive"
    if min(trainer.desirable_weight, trainer.undesirable_weight) < 0:
        return "a class weight is negative"
    return None


def why_trl_keeps_dpo_loss(trainer: Trainer) -> str | None:
    """Return why TRL computes the loss of a ``DPOTrainer`` with these settings, or None."""
    if trainer.precompute_ref_logps and _is_length_averaged(trainer):
        return (
            f"loss_type={trainer.loss_types} needs TRL's loss for batches with an empty prompt, and its sums round "
            "differently from the precomputed ones"
        )
    try:
        dpo_head(trainer)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def _is_left_to_trl(trainer: Trainer, reason: str | None) -> bool:
    """Return whether settings that changed since ``fuse`` leave the loss to TRL, for the ``reason``.

    Raises:
        ValueError: the reference log-probabilities are precomputed, as float64 sums. TRL's loss sums the policy's in
            float32, so equal weights would not give a log-ratio of 0. Or TRL's loss would read the sum of squared
            probabilities, which a fused model does not return.
    """
    if reason is not None and getattr(trainer, "use_weighting", False):
        raise ValueError(f"{reason}: this was set after fuse(trainer). Set it before fuse")
    if reason is not None and trainer.precompute_ref_logps:
        raise ValueError(
            f"{reason}: this was set after fuse(trainer), which precomputed the reference log-probabilities for "
            "another loss. Set it before fuse"
        )
    return reason is not None


def _is_length_averaged(trainer: Trainer) -> bool:
    return any(loss_type in LENGTH_AVERAGED for loss_type in trainer.loss_types)


# ---- The whole loss ------------------------------------------------------------------------------------------------


def kto_loss(self: Trainer, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
    """Replace ``KTOTrainer._compute_loss``."""
    if _is_left_to_trl(self, why_trl_keeps_kto_loss(self)):
        return type(self)._compute_loss(self, model, inputs, return_outputs)
    batch = send_to_device(inputs, self.accelerator.device)
    model_inputs, labels = model_inputs_of(batch)
    if self.calculate_KL:
        mismatched = model_inputs_of(batch, prefix="KL_")
        kl_logps = sequence_logps(self, model, *mismatched)
    if self.precompute_ref_logps:
        ref_logps, ref_kl_logps = batch["ref_logps"], batch.get("ref_KL_logps")
    else:
        with reference_of(self) as reference:
            ref_logps = sequence_logps(self, reference, model_inputs, labels)
            ref_kl_logps = sequence_logps(self, reference, *mismatched) if self.calculate_KL else None
    reference_point = 0.0
    if self.calculate_KL:
        mean_log_ratio = (kl_logps - ref_kl_logps).mean()
        reference_point = self.accelerator.gather_for_metrics(mean_log_ratio).mean().clamp(min=0)
    model_inputs = with_router_logits(self, model_inputs)
    (loss, metrics), aux_loss = call_model(
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
    loss = with_aux_loss(self, loss, aux_loss)
    return (loss, own_outputs(model, model_inputs)) if return_outputs else loss


def dpo_loss(self: Trainer, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
    """Replace ``DPOTrainer._compute_loss``."""
    batch = send_to_device(inputs, self.accelerator.device)
    if _is_left_to_trl(self, why_trl_keeps_dpo_loss(self)) or _lengths_differ(self, batch):
        return type(self)._compute_loss(self, model, inputs, return_outputs)
    model_inputs, labels = model_inputs_of(batch)
    if self.precompute_ref_logps:
        ref_logps = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    else:
        with reference_of(self) as reference:
            ref_logps = pair_logps(self, reference, model_inputs, labels)
    model_inputs = with_router_logits(self, model_inputs)
    loss_head = dpo_head(self)
    (loss, metrics), aux_loss = call_model(
        self,
        fused_linear_loss,
        model,
        model_inputs,
        head=loss_head,
        labels=labels,
        ref_logps=ref_logps if loss_head.needs_reference else None,
    )
    # TRL logs the rewards of DPO for every loss, for one without a reference too
    rewards = self.beta * (metrics.logps - ref_logps)
    metrics = replace(metrics, ref_logps=ref_logps, rewards=rewards)
    _log(self, batch, metrics, aux_loss)
    loss = with_aux_loss(self, loss, aux_loss)
    return (loss, own_outputs(model, model_inputs)) if return_outputs else loss


def _lengths_differ(trainer: Trainer, batch: dict[str, Any]) -> bool:
    """Return whether any rank has a completion without a prompt. Waits for the device.

    Where TRL divides by the number of completion tokens, it counts the first token of the sequence too. Nothing
    predicts that token, so this package does not count it.
    """
    if not _is_length_averaged(trainer):
        return False
    return bool(trainer.accelerator.gather(batch["completion_mask"][:, 0].max()).any())


def _log(trainer: Trainer, batch: dict[str, Any], metrics: LossMetrics, aux_loss: torch.Tensor | None) -> None:
    """Append to ``trainer._metrics`` the values that TRL appends, with one wait for the device."""
    accelerator = trainer.accelerator
    is_kto = metrics.desirable is not None
    totals = metrics.totals()
    if not is_kto:  # TRL counts a tie as 0, and its log stays as it is without this package
        chosen, rejected = metrics.rewards.chunk(2)
        totals["rewards/accuracies"] = weighted_total(chosen > rejected, torch.ones_like(chosen))
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


# ---- Calls at the LM head ------------------------------------------------------------------------------------------


def model_inputs_of(batch: dict[str, Any], prefix: str | None = None) -> tuple[dict[str, Any], torch.Tensor]:
    """Return the model's arguments and the labels; with the prefix "KL_" those of KTO's mismatched pairs."""
    inputs = {name: value for name, value in batch.items() if name not in NOT_FOR_MODELS and not name.startswith("KL_")}
    if prefix is not None:
        inputs.update({name.removeprefix(prefix): batch[name] for name in batch if name.startswith(prefix)})
    completion_mask = inputs.pop("completion_mask")
    return inputs, inputs["input_ids"].masked_fill(completion_mask == 0, -100)


def with_router_logits(trainer: Trainer, model_inputs: dict[str, Any]) -> dict[str, Any]:
    return {**model_inputs, "output_router_logits": True} if trainer.aux_loss_enabled else model_inputs


def with_aux_loss(trainer: Trainer, loss: torch.Tensor, aux_loss: torch.Tensor | None) -> torch.Tensor:
    return loss + trainer.router_aux_loss_coef * aux_loss if trainer.aux_loss_enabled else loss


@torch.no_grad()
def own_outputs(model: nn.Module, model_inputs: dict[str, Any]) -> ModelOutput:
    """Return the model's own outputs; a trainer with ``compute_metrics`` asks for their logits."""
    return model(**model_inputs, use_cache=False)


@contextmanager
def reference_of(trainer: Trainer) -> Iterator[nn.Module]:
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
def sequence_logps(
    trainer: Trainer, model: nn.Module, model_inputs: dict[str, Any], labels: torch.Tensor, **weights: torch.Tensor
) -> torch.Tensor:
    (logps,), _ = call_model(trainer, linear_sequence_logps, model, model_inputs, labels=labels, **weights)
    return logps


def pair_logps(trainer: Trainer, model: nn.Module, model_inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of a ``DPOTrainer``'s sequences, [2 pairs], with its ``ld_alpha``."""
    weights = {}
    if _ld_alpha(trainer) != 1:
        weights["token_weights"] = ld_token_weights(labels, _ld_alpha(trainer))
    return sequence_logps(trainer, model, model_inputs, labels, **weights)


def call_model(
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
    if isinstance(collator, ExactReference):
        collator = collator.collator
    is_trls = type(collator) in (DataCollatorForPreference, DataCollatorForUnpairedPreference)
    return is_trls and "torch_call" not in vars(collator) and overridden(trainer, own, MAKES_BATCHES) is None


def overridden(trainer: Trainer, own: type, names: tuple[str, ...]) -> str | None:
    """Return which of these methods of TRL's class ``own`` the trainer overrides, or None."""
    for name in names:
        method = getattr(trainer, name, None)
        if getattr(method, "__func__", method) is not getattr(own, name, None):
            return f"{type(trainer).__name__}.{name} is not {own.__name__}'s"
    return None
