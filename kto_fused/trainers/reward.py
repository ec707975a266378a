"""Reward models: a score of a prompt with its completion, trained on pairs."""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from .. import huggingface
from ..data import tokens
from ..data.collators import PairedCollator
from ..data.form import COMPARISONS, DataError
from ..data.records import Source
from ..data.tokens import Prepared
from ..heads.reward import linear_bradley_terry_loss
from ..huggingface.inspect import head_layers
from ..huggingface.padding import without_padding_mask
from ..huggingface.wrappers import is_scorer
from ..metrics import LossMetrics, pair_accuracy, weighted_total
from . import losses, models
from .base import FusedTrainer
from .configs import BradleyTerry, FusedRewardConfig

logger = logging.getLogger(__name__)

NEW_PAD = "<|pad|>"


class FusedRewardTrainer(FusedTrainer):
    """A reward model, trained on pairs with the Bradley-Terry loss, on ``transformers.Trainer``.

    The model is a causal language model with one number, its ``score``, in the place of the LM head: transformers'
    ``AutoModelForSequenceClassification`` with ``num_labels=1``. A completion's score is that of its last token, in
    float32. With the scores r_w and r_l of a pair's chosen and rejected completion, the record's margin m (0 without
    one) and ``centering`` c, the loss of a pair is

        -log sigma(r_w - r_l - m) + c (r_w + r_l)^2

    (Ouyang et al. 2022, arXiv 2203.02155; margin: Touvron et al. 2023, arXiv 2307.09288; centering: Eisenstein et al.
    2023, arXiv 2312.09244.)

    transformers itself finds a sequence's last token by its padding token. So a ``processing_class`` that pads with its
    end-of-text token, or with none, is copied and gets another padding token, a new one if there is no other; the log
    says which. The saved model, loaded again, gives the same scores.

    Takes the arguments of ``FusedKTOTrainer``, without ``ref_model`` and ``loss``, with ``FusedRewardConfig`` and
    pairs: ``prompt``, ``chosen``, ``rejected``, and, in all records or in none, ``margin`` and ``weight`` (>= 0, which
    multiplies the pair's loss). A ``model`` given as a path may be a causal language model, whose new ``score`` starts
    from random numbers drawn from ``args.seed``.

    Raises:
        ValueError, TypeError: as in ``FusedKTOTrainer``, and for a model that has no ``score`` of one number.

    >>> trainer = FusedRewardTrainer(
    ...     "Qwen/Qwen2.5-0.5B-Instruct", args=FusedRewardConfig(output_dir="out"), train_dataset="pairs.jsonl"
    ... )  # doctest: +SKIP
    """

    config_class = FusedRewardConfig
    collator_class = PairedCollator
    forms = COMPARISONS
    tensors = ("weights", "margin")
    columns = ("prompt_ids", "chosen_ids", "rejected_ids", "length")
    optional_columns = ("chosen_mask", "rejected_mask", "weight", "margin")
    ref_columns = ()

    @staticmethod
    def _given_loss(loss: Any) -> losses.AnyLoss:
        raise TypeError(f"FusedRewardTrainer takes no loss, got {loss!r}: its loss is Bradley-Terry")

    @classmethod
    def _check_loss(cls, loss: BradleyTerry, args: FusedRewardConfig) -> None:
        pass  # it is always the same

    def _say_how_the_loss_is_computed(self) -> None:
        pass  # it takes no GEMM by the vocabulary

    # ---- the model ----

    def _load_model(self, model: Any, args: FusedRewardConfig) -> Any:
        with models.keeping_random_state():
            set_seed(args.seed)  # a new score is the same in a run that resumes
            model = models.load(model, self.path_dtype, args.trust_remote_code, scores=True)
        if isinstance(model, nn.Module):
            _check_scores(model)
        return model

    def _pad_token_id(self, model: nn.Module) -> int:
        """Return a token to pad with that ends no completion, and make it the model's and the tokenizer's own.

        transformers' sequence classifiers score the last token that is no padding token.
        """
        tokenizer = self._tokenizer = copy.deepcopy(self._tokenizer)
        before, token = tokenizer.pad_token, _pad_token(tokenizer)
        if token != before:
            is_new = token not in tokenizer.get_vocab()
            if is_new:
                tokenizer.add_special_tokens({"pad_token": token})
            else:
                tokenizer.pad_token = token
            logger.info(
                f"The tokenizer pads with {before!r}. transformers scores the last token that is no padding, so the "
                f"padding must end no completion: it now pads with {token!r}{', a new token' * is_new}."
            )
        self._embedded_tokens["model"] = _embed(model, tokenizer.pad_token_id)
        config = huggingface.unwrap(model).config
        for each in {id(part): part for part in (config, config.get_text_config())}.values():
            each.pad_token_id = tokenizer.pad_token_id
        return tokenizer.pad_token_id

    def _check_policy(self, model: nn.Module, *, is_trained: bool) -> None:
        layers = head_layers(huggingface.unwrap(model))
        if is_trained and not any(layer.weight.requires_grad for layer in layers):
            raise ValueError(
                "the model's score would stay as it is, because adapters alone are trained: add "
                "modules_to_save=['score'] to the adapters' configuration"
            )

    # ---- data and loss ----

    def _tokenize(self, source: Source, args: FusedRewardConfig, name: str) -> Prepared:
        prepared = tokens.prepare_paired(
            source,
            self._tokenizer,
            max_length=self.max_length,
            margins=True,
            num_proc=args.dataset_num_proc,
            name=name,
            reading=args.reading,
        )
        ends = _last_tokens(prepared.dataset)
        if padded := int((ends == self._tokenizer.pad_token_id).sum()):
            raise DataError(
                f"{name} data: {padded} completions end with the padding token {self._tokenizer.pad_token!r}, which "
                "transformers would not score: give the tokenizer a pad_token that ends none"
            )
        return prepared

    def _loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], reduction: str = "mean"
    ) -> tuple[torch.Tensor, LossMetrics]:
        input_ids, attention_mask, labels = (
            inputs[name].transpose(0, 1).flatten(0, 1) for name in ("input_ids", "attention_mask", "labels")
        )
        model_inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        loss, scores = huggingface.apply(
            linear_bradley_terry_loss,
            model,
            without_padding_mask(model, model_inputs, self.accelerator.mixed_precision),
            labels=labels,
            margin=inputs.get("margin"),
            weights=inputs.get("weights"),
            centering=self.args.centering,
            reduction=reduction,
        )
        return loss, ScoreMetrics(logps=scores, ref_logps=None, rewards=scores)

    def _losses(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, LossMetrics]:
        return self._loss(model, inputs, reduction="none")


@dataclass
class ScoreMetrics(LossMetrics):
    """The metrics of a reward model, whose ``rewards`` are scores. It has no log-probabilities to report."""

    def totals(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        chosen, rejected = self.rewards.chunk(2)
        ones = torch.ones_like(chosen)
        return {
            "rewards/chosen": weighted_total(chosen, ones),
            "rewards/rejected": weighted_total(rejected, ones),
            "rewards/accuracies": weighted_total(pair_accuracy(chosen, rejected), ones),
        }


def _last_tokens(dataset: Dataset) -> np.ndarray:
    """Return the last token of every completion."""
    found = []
    for rows in dataset.select_columns(["chosen_ids", "rejected_ids"]).with_format("arrow").iter(10_000):
        for column in rows.columns:
            ends = np.cumsum(pc.list_value_length(column).to_numpy()) - 1
            found.append(pc.list_flatten(column).to_numpy()[ends])
    return np.concatenate(found)


def _check_scores(model: nn.Module) -> None:
    inner = huggingface.unwrap(model)
    if not is_scorer(inner):
        raise ValueError(
            f"model is a {type(inner).__name__}, which has no score: load it with "
            "AutoModelForSequenceClassification.from_pretrained(..., num_labels=1), or pass its path"
        )
    if inner.config.num_labels != 1:
        raise ValueError(f"model has num_labels={inner.config.num_labels}, expected 1: a reward is one number")


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's padding token, or else a special token that ends no completion, perhaps a new one.

    A special token that the chat template writes may end a turn.
    """
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else str(tokenizer.chat_template)
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return tokenizer.pad_token
    added = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    for token in (tokenizer.unk_token, tokenizer.bos_token, *added):
        is_known = token is not None and tokenizer.convert_tokens_to_ids(token) is not None
        if is_known and token != tokenizer.eos_token and token not in template:
            return token
    return NEW_PAD


def _embed(model: nn.Module, token_id: int) -> int | None:
    """Give the model an embedding of ``token_id``, of zeros, if it has none. Returns the number of embeddings."""
    count = models.embedded_tokens(model)
    if count is None or token_id < count:
        return count
    if models.is_partitioned(model):
        raise ValueError(
            f"the padding token has the id {token_id}, and the model, which ZeRO-3 has partitioned, has embeddings of "
            f"{count} tokens: resize them before, or pass a processing_class with another pad_token"
        )
    with models.keeping_random_state(), torch.no_grad():
        model.resize_token_embeddings(token_id + 1, mean_resizing=False)
        model.get_input_embeddings().weight[count:] = 0  # the same in a run that resumes
    return models.embedded_tokens(model)
