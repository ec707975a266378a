"""The trainers, one per kind of data. Each says its columns, its collator, which losses it trains, and which tensors
they get.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from ..data import tokens
from ..data.collators import IGNORE_INDEX, PairedCollator, UnpairedCollator
from ..data.records import Source
from ..data.tokens import Prepared
from ..functional import fused_kto_loss, fused_linear_kto_loss, kto_class_weights
from ..heads.completions import KTO
from ..heads.mixed_formula import needs_completion_mask
from ..heads.protocol import Head, Mix, ld_alpha_of
from ..metrics import LossMetrics
from ..token_weights import ld_token_weights
from . import losses
from .base import Functions, FusedTrainer
from .configs import MISMATCHED, FusedDPOConfig, FusedKTOConfig

logger = logging.getLogger(__name__)


class RewardShift:
    """The reward shift delta of BCO: the middle between the moving means of desirable and undesirable rewards.

    A mean moves once per optimizer step, by the rewards of all its batches and ranks: m <- decay m + (1 - decay) mean.
    It starts with the first step's mean; before that it is 0. So delta of a step depends on the steps before it, and
    takes no further forward pass.
    """

    def __init__(self, decay: float, device: torch.device):
        self.decay = decay
        self.means = torch.zeros(2, dtype=torch.float64, device=device)  # of desirable and undesirable completions
        self.is_known = torch.zeros(2, dtype=torch.bool, device=device)
        self.sums = torch.zeros(2, 2, dtype=torch.float64, device=device)  # rewards since the last move: sums, counts
        self.is_due = False  # whether there are such rewards, on this rank as on all others

    def add(self, rewards: torch.Tensor, desirable: torch.Tensor) -> None:
        """Keep the rewards [B] of a training batch for the next move."""
        sides = torch.stack([desirable, ~desirable]).double()
        self.sums = self.sums + torch.stack([(sides * rewards.double()).sum(1), sides.sum(1)])
        self.is_due = True

    def move(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Move the means by the rewards since the last move, if there are any. ``reduce`` sums over ranks."""
        if not self.is_due:
            return
        sums, counts = reduce(self.sums)
        means, is_seen = sums / counts.clamp(min=1), counts > 0
        moved = torch.where(self.is_known, self.decay * self.means + (1 - self.decay) * means, means)
        self.means = torch.where(is_seen, moved, self.means)
        self.is_known, self.sums, self.is_due = self.is_known | is_seen, torch.zeros_like(self.sums), False

    @property
    def value(self) -> torch.Tensor:
        """Delta, a float64 scalar."""
        return self.means.mean()

    def state(self) -> dict[str, torch.Tensor]:
        return {"means": self.means, "is_known": self.is_known, "sums": self.sums}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.means, self.is_known, self.sums, self.is_due = state["means"], state["is_known"], state["sums"], True


class FusedKTOTrainer(FusedTrainer):
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306) and other losses of single completions on
    ``transformers.Trainer``, without logits.

    ``args.loss_type`` names the loss: ``kto``, ``kto_squared``, ``apo_zero_unpaired``, ``bco``, or one that you
    registered. ``loss`` is any other.

    Args:
        model: a causal language model, bare or a ``PeftModel``, or a checkpoint's path or id.
        ref_model: the reference, or its path or id. None: the policy as it is now, before training.

            - Without adapters that is a frozen copy of the model.
            - With adapters it is the model with its adapter named "ref" or "reference", if there is one that is not
              trained; else the model without adapters, if the trained adapter changes nothing yet; else the model with
              a frozen copy of the trained adapter, named "ref". ``args.reference="base"`` takes the model without
              adapters in any case.
            - The copy named "ref" stays in the model, so that the model can be evaluated. ``save_model`` leaves it
              out, and so does ``model.save_pretrained`` with ``selected_adapters=["default"]``;
              ``model.delete_adapter("ref")`` removes it.

            The log says which reference is used.
        args: ``FusedKTOConfig``.
        train_dataset, eval_dataset: unpaired feedback (``prompt``, ``completion``, ``label``), or pairs (``prompt``,
            ``chosen``, ``rejected``), which are split; plain text or conversations; a ``datasets.Dataset``, or paths of
            JSON Lines or Parquet files. ``eval_dataset`` may be a dict of these, and so may ``train_dataset`` with
            ``args.objective_weights``, which has a weight for each.
        processing_class: the tokenizer; None: the model's own.
        peft_config: adapters to add to the model, a ``peft.PeftConfig``.
        callbacks, optimizers: as in ``Trainer``.
        loss: a loss in place of ``args.loss_type``: a head (``heads.make("kto", beta=0.2)``, one of your own, a
            ``heads.Mix``), the name of a registered one, or a function ``f(logps, counts, ref_logps, **tensors)``. It
            may take the tensors ``desirable``, ``z0`` (the reference point, in nats), ``delta`` (the moving mean of
            the rewards, see ``heads.completions.BCO``) and ``weights``. A function that is not registered takes 4
            GEMMs, and has a reference unless its attribute ``needs_reference`` is False.

    A record may have a ``weight`` >= 0, which multiplies its loss. The mean divides by the number of records.

    Raises:
        ValueError, TypeError: an argument that cannot be used, by name; ``preference_data.DataError`` for a record,
            ``huggingface.UnsupportedModelError`` for a model whose logits the loss would not reproduce.
        NotImplementedError: a feature that is not supported under FSDP or DeepSpeed, by name.

    >>> trainer = FusedKTOTrainer(
    ...     "Qwen/Qwen2.5-0.5B-Instruct", args=FusedKTOConfig(output_dir="out"), train_dataset="feedback.jsonl"
    ... )  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    """

    config_class = FusedKTOConfig
    collator_class = UnpairedCollator
    takes_objectives = True
    tensors = losses.OF_COMPLETIONS
    optional_columns = ("completion_mask", "kl_completion_mask", "weight", "objective")
    # the loss of length-averaged log-probabilities, an option of these functions alone
    averaged_functions = Functions(fused_linear_kto_loss, fused_kto_loss)

    def __init__(self, *arguments: Any, **named_arguments: Any):
        super().__init__(*arguments, **named_arguments)
        self._reward_shift = RewardShift(self.args.reward_shift_decay, self.args.device)

    @classmethod
    def _check_loss(cls, loss: losses.AnyLoss, args: FusedKTOConfig) -> None:
        name = losses.describe(loss)
        if losses.level(loss) != "sequence" or getattr(loss, "is_paired", False):
            kind = "pairs (FusedDPOTrainer)" if getattr(loss, "is_paired", False) else "single tokens"
            raise ValueError(f"{name} is a loss of {kind}, and FusedKTOTrainer trains losses of single completions")
        if isinstance(loss, Mix) and losses.takes(loss, "delta"):
            raise ValueError(
                f"{name} mixes a loss that takes delta, the moving mean of its own rewards: train it alone"
            )
        args.check_tensors(loss)
        parts = args.world_size * args.gradient_accumulation_steps
        if args.reference_point == "batch_mean" and parts > 1:
            raise ValueError(
                "reference_point='batch_mean' couples a batch that lies in several parts: "
                f"{args.world_size} processes, gradient_accumulation_steps={args.gradient_accumulation_steps}; "
                "use 'mismatched' or a number"
            )
        super()._check_loss(loss, args)
        if takes_z0(loss) and args.reference_point == "batch_mean":
            raise ValueError(f"{name} takes z0, and reference_point is 'batch_mean': use 'mismatched' or a number")
        own = {part.reference_point for part in losses.parts(loss) if isinstance(part, KTO)} - {"tensor"}
        if args.reference_point != MISMATCHED and own - {args.reference_point}:
            raise ValueError(f"reference_point={args.reference_point!r} is given, and {name} has its own")
        if args.average_log_prob and args.loss_type != getattr(loss, "name", None):
            raise ValueError(f"average_log_prob=True has no meaning for loss={name}")

    @property
    def needs_mismatched(self) -> bool:
        """Whether z0 is estimated from mismatched pairs."""
        return self.args.reference_point == MISMATCHED and takes_z0(self.loss)

    @property
    def columns(self) -> tuple[str, ...]:
        columns = ("prompt_ids", "completion_ids", "label", "length")
        return (*columns, "kl_completion_ids") if self.needs_mismatched else columns

    @property
    def ref_columns(self) -> tuple[str, ...]:
        return ("ref_logps", "ref_kl_logps") if self.needs_mismatched else ("ref_logps",)

    def _tokenize(self, source: Source, args: FusedKTOConfig, name: str) -> Prepared:
        prepared = tokens.prepare_unpaired(
            source,
            self._tokenizer,
            max_length=self.max_length,
            mismatch=self.needs_mismatched,
            needs_both_labels=name.startswith("train"),
            seed=args.seed,
            num_proc=args.dataset_num_proc,
            name=name,
            reading=args.reading,
        )
        if args.average_log_prob and "weight" in prepared.dataset.column_names:
            raise ValueError(f"{name} data: records have a weight, which average_log_prob=True does not take")
        if name.startswith("train") and isinstance(self.loss, KTO) and self.loss.name == "kto" and args.should_log:
            _advise_weights(prepared.dataset, self.loss)
        return prepared

    def _ref_logps_of(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        prefixes = ("", "kl_") if self.needs_mismatched else ("",)
        return tuple(self._ref_logps(model, inputs, prefix) for prefix in prefixes)

    def _loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], reduction: str = "mean"
    ) -> tuple[torch.Tensor, LossMetrics]:
        z0 = self._reference_point(model, inputs)
        ref_logps = self._ref_logps(model, inputs) if self.needs_reference else None
        if self.args.average_log_prob:
            options = {name: getattr(self.loss, name) for name in ("beta", "desirable_weight", "undesirable_weight")}
            return self._apply(
                self.averaged_functions,
                model,
                inputs,
                loss_type=self.loss.name,
                desirable=inputs["desirable"],
                reference_point=getattr(self.loss, "reference_point", 0.0) if z0 is None else z0,
                ref_logps=ref_logps,
                reduction=reduction,
                average_log_prob=True,
                **options,
            )
        tensors = {"z0": z0, "weights": inputs.get("weights")}
        if losses.takes(self.loss, "desirable"):
            tensors["desirable"] = inputs["desirable"]
        if losses.takes(self.loss, "delta"):
            tensors["delta"] = self._moved_reward_shift()
        tensors = {name: value for name, value in tensors.items() if value is not None}
        loss, metrics = self._apply_loss(model, inputs, ref_logps=ref_logps, reduction=reduction, **tensors)
        metrics = replace(metrics, desirable=inputs["desirable"], is_paired=False)
        self._count_objectives(metrics, inputs.get("objective"), **tensors)
        if "delta" in tensors and self.model.training:
            self._reward_shift.add(metrics.rewards, inputs["desirable"])
        return loss, metrics

    # ---- the reward shift delta ----

    _reward_shift: RewardShift
    _is_new_step = False  # whether no batch of the optimizer step has asked for delta yet

    def _moved_reward_shift(self) -> torch.Tensor:
        """Return delta, moved by the former step's rewards at the first batch of a step, or of an evaluation."""
        if self._is_new_step or not self.model.training:
            self._reward_shift.move(self.accelerator.reduce)
        self._is_new_step = self._is_new_step and not self.model.training
        return self._reward_shift.value

    def _recipe_state(self) -> dict[str, torch.Tensor]:
        return self._reward_shift.state() if losses.takes(self.loss, "delta") else {}

    def _restore_recipe_state(self, state: dict[str, torch.Tensor]) -> None:
        if state:
            self._reward_shift.restore(state)

    # ---- the reference point z0 ----

    _step_batches: list[dict[str, torch.Tensor]] | None = None  # of the optimizer step, until its z0 is estimated
    _step_reference_point: torch.Tensor | None = None

    def get_batch_samples(self, *arguments: Any) -> tuple[list, torch.Tensor | int | None]:
        batches, num_items = super().get_batch_samples(*arguments)
        self._step_batches, self._step_reference_point, self._is_new_step = batches, None, True
        return batches, num_items

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._reward_shift = RewardShift(self.args.reward_shift_decay, self.args.device)
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:  # a later call of ``compute_loss`` by hand must not get the last step's z0
            self._step_batches = self._step_reference_point = None
            self._is_new_step = False

    def _reference_point(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor | float | None:
        """Return the tensor z0 of a loss that takes it, None for any other.

        An estimate is made once for all batches of an optimizer step, and for each batch of an evaluation.
        """
        if not self.needs_mismatched:
            return self.args.reference_point if takes_z0(self.loss) else None
        if not self.model.training:  # asked of the model itself: DeepSpeed's engine does not say
            return self._estimated_reference_point(model, [inputs])
        if self._step_reference_point is None:  # estimated in the step, after resuming has restored the random state
            if self._step_batches is None:  # compute_loss was called by hand
                return self._estimated_reference_point(model, [inputs])
            self._step_reference_point = self._estimated_reference_point(model, self._step_batches)
            self._step_batches = None
        return self._step_reference_point

    def _estimated_reference_point(self, model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Return ``kto_reference_point`` of all ranks' mismatched pairs, and 0 where there is no pair.

        The number of pairs stays on the device, so nothing waits for it.
        """
        log_ratios, is_pair = [], []
        for batch in batches:
            inputs = self._prepare_inputs(batch)
            policy_logps, ref_logps = self._logps(model, inputs, "kl_"), self._ref_logps(model, inputs, "kl_")
            log_ratios.append(policy_logps.double() - ref_logps.double())
            # a prompt may have no other prompt's completion to be paired with
            is_pair.append((inputs["kl_labels"] != IGNORE_INDEX).any(1))
        sums = torch.stack([torch.cat(log_ratios), torch.cat(is_pair).double()], 1)  # [pairs, 2]; 0, 0 for no pair
        if self.model.training:
            total, count = self.accelerator.reduce(sums.sum(0))
        else:
            total, count = self.accelerator.gather_for_metrics(sums).sum(0)
        return (total / count.clamp(min=1)).clamp(min=0)


class FusedDPOTrainer(FusedTrainer):
    """DPO (Rafailov et al. 2023, arXiv 2305.18290) and any other loss of pairs on ``transformers.Trainer``, without
    logits.

    Takes the arguments of ``FusedKTOTrainer``, with ``FusedDPOConfig`` and pairs: ``prompt``, ``chosen``, ``rejected``.
    A list in ``loss_type`` with ``loss_weights`` is a weighted sum of losses. Losses without a reference model
    (``simpo``, ``cpo``, ``orpo``, ...) load none. A ``loss`` of your own may take the tensor ``weights``.

    >>> trainer = FusedDPOTrainer(
    ...     "Qwen/Qwen2.5-0.5B-Instruct", args=FusedDPOConfig(output_dir="out"), train_dataset="pairs.jsonl"
    ... )  # doctest: +SKIP
    """

    config_class = FusedDPOConfig
    collator_class = PairedCollator
    takes_objectives = True
    tensors = losses.OF_PAIRS
    columns = ("prompt_ids", "chosen_ids", "rejected_ids", "length")
    optional_columns = ("chosen_mask", "rejected_mask", "weight", "objective")
    ref_columns = ("ref_chosen_logps", "ref_rejected_logps")

    @classmethod
    def _check_loss(cls, loss: losses.AnyLoss, args: FusedDPOConfig) -> None:
        level, group = losses.level(loss), getattr(loss, "group", None)
        if level == "token" or group == 1:
            kind = "single tokens" if level == "token" else "single completions (FusedKTOTrainer)"
            raise ValueError(f"{losses.describe(loss)} is a loss of {kind}, and FusedDPOTrainer trains losses of pairs")
        super()._check_loss(loss, args)

    def _tokenize(self, source: Source, args: FusedDPOConfig, name: str) -> Prepared:
        return tokens.prepare_paired(
            source,
            self._tokenizer,
            max_length=self.max_length,
            num_proc=args.dataset_num_proc,
            name=name,
            reading=args.reading,
        )

    @property
    def _ld_alpha(self) -> float:
        return ld_alpha_of(self.loss) if isinstance(self.loss, Head) else 1.0

    def _token_weights(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Return those of LD-DPO, by which the loss weights the policy's log-probabilities too."""
        return None if self._ld_alpha == 1 else ld_token_weights(inputs["labels"], self._ld_alpha)

    def _logps_depend_on(self) -> str:
        return super()._logps_depend_on() + (f" ld_alpha={self._ld_alpha}" if self._ld_alpha < 1 else "")

    def _ref_logps_of(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return self._ref_logps(model, _chosen_then_rejected(inputs)).chunk(2)

    def _loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], reduction: str = "mean"
    ) -> tuple[torch.Tensor, LossMetrics]:
        sequences = _chosen_then_rejected(inputs)
        ref_logps = self._ref_logps(model, sequences) if self.needs_reference else None
        tensors = {"weights": inputs["weights"]} if "weights" in inputs else {}
        if isinstance(self.loss, Head) and needs_completion_mask(self.loss):  # it reads the prompts' tokens too
            tensors["completion_mask"] = sequences["labels"] != IGNORE_INDEX
            is_padding = sequences["attention_mask"] == 0
            sequences["labels"] = sequences["input_ids"].masked_fill(is_padding, IGNORE_INDEX)
        loss, metrics = self._apply_loss(model, sequences, ref_logps=ref_logps, reduction=reduction, **tensors)
        metrics = replace(metrics, is_paired=True)
        self._count_objectives(metrics, inputs.get("objective"))
        return loss, metrics


def _chosen_then_rejected(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Reshape a batch of pairs [b, 2, ...] to sequences [2b, ...], all chosen ones first."""
    return {name: values.transpose(0, 1).flatten(0, 1) for name, values in inputs.items() if values.ndim > 1}


def takes_z0(loss: losses.AnyLoss) -> bool:
    """Whether the loss gets the reference point as the tensor z0."""
    return any(
        part.reference_point == "tensor" if isinstance(part, KTO) else losses.takes(part, "z0")
        for part in losses.parts(loss)
    )


def _advise_weights(dataset: Dataset, loss: KTO) -> None:
    """Log the weights that the paper advises for the labels of the data, where the options leave both at 1."""
    desirable = int(np.sum(dataset["label"]))
    counts = desirable, len(dataset) - desirable
    advised = [math.ceil(100 * weight) / 100 for weight in kto_class_weights(*counts)]  # up: nearer to the middle
    if advised == [1.0, 1.0] or (loss.desirable_weight, loss.undesirable_weight) != (1.0, 1.0):
        return
    name, weight = ("desirable_weight", advised[0]) if advised[0] > 1 else ("undesirable_weight", advised[1])
    logger.info(
        f"Hint: {counts[0]} desirable and {counts[1]} undesirable examples, a ratio of {counts[0] / counts[1]:.3g}. "
        "The KTO paper advises desirable_weight x desirable / (undesirable_weight x undesirable) in [1, 4/3]: set "
        f"{name}={weight:g} (--{name} {weight:g})."
    )
