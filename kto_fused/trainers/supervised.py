"""Supervised fine-tuning: losses of single tokens on demonstrations."""

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn

from .. import huggingface
from ..data import tokens
from ..data.collators import IGNORE_INDEX, CompletionCollator
from ..data.form import DEMONSTRATIONS
from ..data.records import Source
from ..data.tokens import Prepared
from ..functional import fused_loss, linear_token_logps, token_logps
from ..heads.protocol import Head, Mix
from ..huggingface.inspect import check_keeps_packed_apart
from ..metrics import LossMetrics, weighted_total
from . import losses, models
from .base import Functions, FusedTrainer
from .configs import FusedSFTConfig


class FusedSFTTrainer(FusedTrainer):
    """Supervised fine-tuning on ``transformers.Trainer``, without logits.

    The loss is ``nll``, -l, or ``dft`` (Wu et al. 2025, arXiv 2508.05629), -sg(exp l) l, or a token-level loss of your
    own; l is a token's log-probability in nats. It is averaged over the trained tokens of all accumulated batches and
    ranks of an optimizer step, so that these add up to the gradient of one large batch. An evaluation is the mean over
    all trained tokens of its data.

    Takes the arguments of ``FusedKTOTrainer``, without ``ref_model``, with ``FusedSFTConfig`` and demonstrations:

    - ``prompt`` and ``completion``: the completion is trained
    - ``text``: all of it is trained
    - ``messages``: all messages of the assistant are trained

    A record may have a ``weight`` >= 0, which multiplies the losses of its tokens. The mean divides by the number of
    trained tokens, so a weight of 2 doubles the record's gradient.

    With ``args.packing`` a row of a training batch holds several examples, which do not see each other. A model whose
    attention would let them is refused. Evaluation data are not packed.

    Raises:
        ValueError: a loss that is none of single tokens, takes further tensors or has a mean of its own;
            ``UnsupportedModelError`` for packing with a model that does not keep packed sequences apart. The other
            errors are those of ``FusedKTOTrainer``.

    >>> trainer = FusedSFTTrainer(
    ...     "Qwen/Qwen2.5-0.5B", args=FusedSFTConfig(output_dir="out"), train_dataset="demonstrations.jsonl"
    ... )  # doctest: +SKIP
    """

    config_class = FusedSFTConfig
    collator_class = CompletionCollator
    forms = DEMONSTRATIONS
    tensors = ()
    columns = ("prompt_ids", "completion_ids", "length")
    optional_columns = ("completion_mask", "weight", "input_ids", "labels", "lengths", "weights")  # the last 4 of packs
    ref_columns = ()

    def __init__(self, *arguments: Any, **named_arguments: Any):
        super().__init__(*arguments, **named_arguments)
        if not self.args.packing or self.train_dataset is None:
            return
        if models.is_partitioned(self.model):
            raise NotImplementedError(
                "packing=True needs a check of the model's attention, which ZeRO-3 has no whole weights for: train "
                "without packing, or with ZeRO-2"
            )
        with models.keeping_random_state():
            check_keeps_packed_apart(huggingface.unwrap(self.model))

    @classmethod
    def _check_loss(cls, loss: losses.AnyLoss, args: FusedSFTConfig) -> None:
        name = losses.describe(loss)
        if not isinstance(loss, Head) or isinstance(loss, Mix) or loss.level != "token":
            raise ValueError(
                f"{name} is no loss of single tokens, which FusedSFTTrainer trains: expected one head of level 'token'"
            )
        if (normalizer := getattr(loss, "normalizer", "tokens")) != "tokens":
            raise ValueError(
                f"{name} has normalizer={normalizer!r}: FusedSFTTrainer takes the mean over the tokens of all "
                "accumulated batches and ranks, expected normalizer='tokens'"
            )
        if getattr(loss, "chosen_only", False):
            raise ValueError(f"{name} reads pairs (chosen_only), and FusedSFTTrainer trains on single completions")
        if loss.statistics():
            raise ValueError(
                f"{name} reads the row statistics {list(loss.statistics())}, which FusedSFTTrainer has none of in "
                "evaluations: expected a loss of log-probabilities alone"
            )
        super()._check_loss(loss, args)

    def _tokenize(self, source: Source, args: FusedSFTConfig, name: str) -> Prepared:
        return tokens.prepare_completions(
            source,
            self._tokenizer,
            max_length=self.max_length,
            num_proc=args.dataset_num_proc,
            name=name,
            reading=args.reading,
        )

    def _arranged(self, dataset: Dataset, args: FusedSFTConfig, name: str) -> Dataset:
        if not args.packing or name != "train":
            return dataset
        if self.max_length is None:
            raise ValueError("packing=True fills rows up to max_length, and neither the option nor the model has one")
        return tokens.pack_completions(dataset, self.max_length, num_proc=args.dataset_num_proc, name=name)

    def _num_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (batch["labels"][:, 1:] != IGNORE_INDEX).sum()

    def _loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], reduction: str = "mean"
    ) -> tuple[torch.Tensor, LossMetrics]:
        tensors = {"weights": inputs["weights"]} if "weights" in inputs else {}
        loss, metrics = self._apply_loss(model, inputs, reduction=reduction, **tensors)
        return loss, TokenLossMetrics(**{each.name: getattr(metrics, each.name) for each in fields(metrics)})

    def _losses(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, LossMetrics]:
        values, metrics = self._apply(
            Functions(_losses_from_hidden, _losses_from_logits), model, inputs, head=self.loss
        )
        return values * inputs.get("weights", 1.0), metrics

    def _loss_weights(self, metrics: LossMetrics) -> torch.Tensor:
        return metrics.token_counts


@dataclass
class TokenLossMetrics(LossMetrics):
    """The metrics of supervised fine-tuning: means over the trained tokens, under TRL's names."""

    def totals(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {
            "entropy": weighted_total(self.entropy, self.token_counts),
            "mean_token_accuracy": weighted_total(self.token_accuracy, self.token_counts),
        }


def _losses_from_hidden(
    hidden: torch.Tensor, lm_head_weight: torch.Tensor, labels: torch.Tensor, *, head: Head, **options: Any
) -> tuple[torch.Tensor, TokenLossMetrics]:
    """Return each sequence's mean loss over its tokens, [B] float64, and the metrics, without a gradient."""
    logps, of_tokens = linear_token_logps(hidden, lm_head_weight, labels, return_metrics=True, **options)
    return _of_sequences(head, logps, labels, of_tokens.entropy, of_tokens.is_top1)


def _losses_from_logits(
    logits: torch.Tensor, labels: torch.Tensor, *, head: Head, **options: Any
) -> tuple[torch.Tensor, TokenLossMetrics]:
    """``_losses_from_hidden`` of logits."""
    values, metrics = _of_sequences(head, token_logps(logits, labels, **options), labels)
    _, found = fused_loss(head, logits, labels, **options)
    metrics.entropy, metrics.token_accuracy = found.entropy, found.token_accuracy
    return values, metrics


def _of_sequences(
    head: Head,
    logps: torch.Tensor,
    labels: torch.Tensor,
    entropy: torch.Tensor | None = None,
    is_top1: torch.Tensor | None = None,
) -> tuple[torch.Tensor, TokenLossMetrics]:
    """Return each sequence's mean loss and metrics from the values of its positions, [B, T] each."""
    is_trained = F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
    counts = is_trained.sum(1)

    def mean(values: torch.Tensor) -> torch.Tensor:  # which are 0 where a position predicts nothing
        return values.double().sum(1) / counts.clamp(min=1)

    of_tokens = torch.zeros_like(logps, dtype=torch.float64)
    of_tokens[is_trained] = head.losses(logps[is_trained].double(), counts.repeat_interleave(counts), None)
    metrics = TokenLossMetrics(
        logps=logps.double().sum(1),
        ref_logps=None,
        rewards=logps.double().sum(1),
        token_counts=counts,
        entropy=None if entropy is None else mean(entropy),
        token_accuracy=None if is_top1 is None else mean(is_top1),
        is_paired=False,
    )
    return mean(of_tokens), metrics
