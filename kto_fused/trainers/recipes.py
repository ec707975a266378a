"""The trainers of the losses. Each says its columns, its collator, its loss, and what the loss takes beside a batch."""

import logging
import math
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from ..data import tokens
from ..data.collators import IGNORE_INDEX, PairedCollator, UnpairedCollator
from ..data.records import Source
from ..data.tokens import Prepared
from ..functional import (
    fused_dpo_loss,
    fused_kto_loss,
    fused_linear_dpo_loss,
    fused_linear_kto_loss,
    kto_class_weights,
)
from ..metrics import LossMetrics
from .base import Functions, FusedTrainer
from .configs import FusedDPOConfig, FusedKTOConfig

logger = logging.getLogger(__name__)


class FusedKTOTrainer(FusedTrainer):
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306) on ``transformers.Trainer``, without logits.

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
            JSON Lines or Parquet files. ``eval_dataset`` may be a dict of these.
        processing_class: the tokenizer; None: the model's own.
        peft_config: adapters to add to the model, a ``peft.PeftConfig``.
        callbacks, optimizers: as in ``Trainer``.

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
    loss_functions = Functions(fused_linear_kto_loss, fused_kto_loss)
    loss_options = ("loss_type", "beta", "desirable_weight", "undesirable_weight")
    mask_columns = ("completion_mask", "kl_completion_mask")

    def __init__(self, *arguments: Any, **named_arguments: Any):
        super().__init__(*arguments, **named_arguments)
        args = self.args
        if args.reference_point == "batch_mean" and args.world_size * args.gradient_accumulation_steps > 1:
            raise ValueError(
                "reference_point='batch_mean' couples a batch that lies in several parts: "
                f"{args.world_size} processes, gradient_accumulation_steps={args.gradient_accumulation_steps}; "
                "use 'mismatched' or a number"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        columns = ("prompt_ids", "completion_ids", "label", "length")
        return (*columns, "kl_completion_ids") if self.args.needs_mismatched else columns

    @property
    def ref_columns(self) -> tuple[str, ...]:
        return ("ref_logps", "ref_kl_logps") if self.args.needs_mismatched else ("ref_logps",)

    def _tokenize(self, source: Source, args: FusedKTOConfig, name: str) -> Prepared:
        prepared = tokens.prepare_unpaired(
            source,
            self._tokenizer,
            max_length=self.max_length,
            mismatch=args.needs_mismatched,
            needs_both_labels=name == "train",
            seed=args.seed,
            num_proc=args.dataset_num_proc,
            name=name,
        )
        if name == "train" and args.loss_type == "kto" and args.should_log:
            _advise_weights(prepared.dataset, args)
        return prepared

    def _ref_logps_of(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        prefixes = ("", "kl_") if self.args.needs_mismatched else ("",)
        return tuple(self._ref_logps(model, inputs, prefix) for prefix in prefixes)

    def _loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], reduction: str = "mean"
    ) -> tuple[torch.Tensor, LossMetrics]:
        return self._apply_loss(
            model,
            inputs,
            desirable=inputs["desirable"],
            reference_point=self._reference_point(model, inputs),
            ref_logps=self._ref_logps(model, inputs),
            reduction=reduction,
        )

    # ---- the reference point z0 ----

    _step_batches: list[dict[str, torch.Tensor]] | None = None  # of the optimizer step, until its z0 is estimated
    _step_reference_point: torch.Tensor | None = None

    def get_batch_samples(self, *arguments: Any) -> tuple[list, torch.Tensor | int | None]:
        batches, num_items = super().get_batch_samples(*arguments)
        self._step_batches, self._step_reference_point = batches, None
        return batches, num_items

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:  # a later call of ``compute_loss`` by hand must not get the last step's z0
            self._step_batches = self._step_reference_point = None

    def _reference_point(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor | float | str:
        """Return z0, estimated once for all batches of an optimizer step, or for each batch of an evaluation."""
        if self.args.loss_type == "apo_zero_unpaired":
            return 0.0
        if not self.args.needs_mismatched:
            return self.args.reference_point
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
    """DPO (Rafailov et al. 2023, arXiv 2305.18290) and its relatives on ``transformers.Trainer``, without logits.

    Takes the arguments of ``FusedKTOTrainer``, with ``FusedDPOConfig`` and pairs: ``prompt``, ``chosen``, ``rejected``.
    ``loss_type="simpo"`` has no reference.

    >>> trainer = FusedDPOTrainer(
    ...     "Qwen/Qwen2.5-0.5B-Instruct", args=FusedDPOConfig(output_dir="out"), train_dataset="pairs.jsonl"
    ... )  # doctest: +SKIP
    """

    config_class = FusedDPOConfig
    collator_class = PairedCollator
    loss_functions = Functions(fused_linear_dpo_loss, fused_dpo_loss)
    loss_options = ("loss_type", "beta", "label_smoothing", "gamma")
    columns = ("prompt_ids", "chosen_ids", "rejected_ids", "length")
    mask_columns = ("chosen_mask", "rejected_mask")
    ref_columns = ("ref_chosen_logps", "ref_rejected_logps")

    def _tokenize(self, source: Source, args: FusedDPOConfig, name: str) -> Prepared:
        return tokens.prepare_paired(
            source, self._tokenizer, max_length=self.max_length, num_proc=args.dataset_num_proc, name=name
        )

    def _ref_logps_of(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return self._ref_logps(model, _chosen_then_rejected(inputs)).chunk(2)

    def _loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], reduction: str = "mean"
    ) -> tuple[torch.Tensor, LossMetrics]:
        sequences = _chosen_then_rejected(inputs)
        ref_logps = self._ref_logps(model, sequences) if self.args.needs_reference else None
        return self._apply_loss(model, sequences, ref_logps=ref_logps, reduction=reduction)


def _chosen_then_rejected(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Reshape a batch of pairs [b, 2, ...] to sequences [2b, ...], all chosen ones first."""
    return {name: values.transpose(0, 1).flatten(0, 1) for name, values in inputs.items()}


def _advise_weights(dataset: Dataset, args: FusedKTOConfig) -> None:
    """Log the weights that the paper advises for the labels of the data, where the options leave both at 1."""
    desirable = int(np.sum(dataset["label"]))
    counts = desirable, len(dataset) - desirable
    advised = [math.ceil(100 * weight) / 100 for weight in kto_class_weights(*counts)]  # up: nearer to the middle
    if advised == [1.0, 1.0] or (args.desirable_weight, args.undesirable_weight) != (1.0, 1.0):
        return
    name, weight = ("desirable_weight", advised[0]) if advised[0] > 1 else ("undesirable_weight", advised[1])
    logger.info(
        f"Hint: {counts[0]} desirable and {counts[1]} undesirable examples, a ratio of {counts[0] / counts[1]:.3g}. "
        "The KTO paper advises desirable_weight x desirable / (undesirable_weight x undesirable) in [1, 4/3]: set "
        f"{name}={weight:g} (--{name} {weight:g})."
    )
