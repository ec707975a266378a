"""The loops whose rounds train a loss of sequences: SPIN, and online DPO, KTO and their relatives."""

import logging
from statistics import mean
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from torch import nn

from ..data.tokens import TOKENS, with_partners
from . import losses
from .base import FusedTrainer
from .configs import BASE, MISMATCHED, FusedDPOConfig, FusedPreferenceConfig
from .recipes import FusedDPOTrainer, FusedKTOTrainer, takes_z0
from .round_settings import LoopSettings
from .rounds import Loop, RoundError, Scored, TakesTokens, TrainingData

logger = logging.getLogger(__name__)


class SampledDPOTrainer(TakesTokens, FusedDPOTrainer):
    """``FusedDPOTrainer`` on pairs of token ids."""


class SampledKTOTrainer(TakesTokens, FusedKTOTrainer):
    """``FusedKTOTrainer`` on labelled completions of token ids."""


# ---- SPIN ---------------------------------------------------------------------------------------------------------


class SPINLoop(Loop):
    """SPIN, self-play fine-tuning (Chen et al. 2024, arXiv 2401.01335).

    A pair's chosen completion is the data's answer, its rejected one a sample of the last round's model, which is also
    the reference. A judge is not needed; with one, the win rate against the last round's samples is logged.
    """

    trainer_class = SampledDPOTrainer
    needs_answers = True
    needs_judge = False
    default_samples = 1
    keeps_optimizer = False  # each round has another reference, and so another objective

    def __init__(self, settings: LoopSettings, config: FusedPreferenceConfig, **arguments: Any):
        if settings.threshold != "mean":
            raise ValueError(f"threshold={settings.threshold} has no meaning for SPIN: the data's answers are chosen")
        super().__init__(settings, config, **arguments)

    def training_data(self, number: int, policy: nn.Module, samples: list[Scored]) -> TrainingData:
        pairs, equal, cut = [], 0, 0
        for one in samples:
            prompt = self._by_number[one.sample.prompt]
            whole = prompt.ids + one.sample.ids
            start = 0
            for ours, theirs in zip(prompt.ids, prompt.answer_ids, strict=False):
                if ours != theirs:
                    break
                start += 1
            chosen, rejected = prompt.answer_ids[start : self.max_length], whole[start:]
            cut += start + len(chosen) < len(prompt.answer_ids)
            if chosen == rejected or not chosen:
                equal += 1
                continue
            pairs.append((prompt.ids[:start], chosen, rejected))
        if not pairs:
            raise RoundError(f"round {number}: all samples equal the data's answers, so nothing is left to learn")
        if cut:
            logger.warning(
                f"Round {number}: the data's answers of {cut} of {len(samples)} pairs are cut to max_length, "
                f"{self.max_length} tokens with the prompt."
            )
        return TrainingData(paired(pairs), {"equal": equal, "cut_answers": cut})

    def takes_ref_model(self) -> bool:
        return False

    def why_no_ref_model(self) -> str:
        return "SPIN's reference is the model that a round begins with"

    def reference_text(self) -> str | None:
        return "the model that a round begins with" if losses.needs_reference(self.loss) else None

    def make_trainer(self, number: int, policy: nn.Module, **arguments: Any) -> FusedTrainer:
        return self.trainer_class(policy, loss=self._given_loss, **arguments)


def paired(pairs: list[tuple[list[int], list[int], list[int]]]) -> Dataset:
    """Return (prompt, chosen, rejected) token ids as the dataset that ``prepare_paired`` makes."""
    columns = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(list, zip(*pairs, strict=True)), strict=True))
    columns["length"] = [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in pairs]
    features = {**dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), TOKENS), "length": Value("int32")}
    return Dataset.from_dict(columns, features=Features(features))


# ---- online DPO and KTO -------------------------------------------------------------------------------------------


class OnlineLoop(Loop):
    """Online DPO (Guo et al. 2024, arXiv 2402.04792) and its form for single completions.

    The policy answers each prompt several times, and the judge scores the answers. For a loss of pairs the best and
    the worst make a pair; a prompt whose best and worst score alike is dropped. For a loss of single completions each
    sample is desirable or not by the threshold; a sample at the threshold is dropped. The reference is the model that
    the run began with.
    """

    least_samples = 2

    def __init__(self, settings: LoopSettings, config: FusedPreferenceConfig, **arguments: Any):
        if isinstance(config, FusedDPOConfig) and settings.threshold != "mean":
            raise ValueError(
                f"threshold={settings.threshold} has no meaning for a loss of pairs: best and worst make one"
            )
        if not settings.temperature:
            raise ValueError("temperature is 0, so all samples of a prompt would be equal: set it above 0")
        self.trainer_class = SampledDPOTrainer if isinstance(config, FusedDPOConfig) else SampledKTOTrainer
        super().__init__(settings, config, **arguments)

    def training_data(self, number: int, policy: nn.Module, samples: list[Scored]) -> TrainingData:
        groups = [samples[start : start + self.samples] for start in range(0, len(samples), self.samples)]
        is_paired = isinstance(self.config, FusedDPOConfig)
        data = self._pairs(groups) if is_paired else self._labelled(number, groups)
        if data is None:
            self._nothing(number)
        return data

    def _pairs(self, groups: list[list[Scored]]) -> TrainingData | None:
        pairs, ties = [], 0
        for group in groups:
            best, worst = max(group, key=_score), min(group, key=_score)
            if best.score == worst.score or best.sample.ids == worst.sample.ids:
                ties += 1
                continue
            pairs.append((self._by_number[best.sample.prompt].ids, best.sample.ids, worst.sample.ids))
        if ties:
            logger.info(f"{ties} of {len(groups)} prompts are left out: their best and worst samples score alike.")
        return TrainingData(paired(pairs), {"ties": ties}) if pairs else None

    def _labelled(self, number: int, groups: list[list[Scored]]) -> TrainingData | None:
        threshold, rows, ties = self.settings.threshold, [], 0
        # exact means, so that a sample that equals its prompt's or round's mean is a tie whatever the rounding
        of_round = mean(one.score for group in groups for one in group)
        for group in groups:
            if threshold == "mean":
                limit = of_round
            elif threshold == "prompt_mean":
                limit = mean(one.score for one in group)
            else:
                limit = float(threshold)
            for one in group:
                if one.score == limit:
                    ties += 1
                    continue
                rows.append((self._by_number[one.sample.prompt], one.sample.ids, one.score > limit))
        above = sum(is_desirable for *_, is_desirable in rows)
        shown = f"{of_round:.4g}, the mean of the round's scores" if threshold == "mean" else threshold
        logger.info(
            f"Round {number}: {above} samples are desirable and {len(rows) - above} undesirable, by the threshold "
            f"{shown}; {ties} at the threshold are left out."
        )
        if above in (0, len(rows)):
            return None
        columns = {
            "prompt_ids": [prompt.ids for prompt, *_ in rows],
            "completion_ids": [ids for _, ids, _ in rows],
            "label": [label for *_, label in rows],
            "length": [len(prompt.ids) + len(ids) for prompt, ids, _ in rows],
        }
        features = {"prompt_ids": TOKENS, "completion_ids": TOKENS, "label": Value("bool"), "length": Value("int32")}
        dataset = Dataset.from_dict(columns, features=Features(features))
        if self.config.reference_point == MISMATCHED and takes_z0(self.loss):
            numbers = np.array([prompt.number for prompt, *_ in rows])
            with self.config.main_process_first():  # the others find the result in the cache
                dataset = with_partners(dataset, numbers, self.max_length, self.config.seed, None, f"round {number}")
        found = {"ties": ties, "desirable": above / len(rows)}
        return TrainingData(dataset, found | ({"threshold": of_round} if threshold == "mean" else {}))

    def make_trainer(self, number: int, policy: nn.Module, **arguments: Any) -> FusedTrainer:
        reference = None
        if losses.needs_reference(self.loss):
            reference = self.reference()
            if reference is None:
                arguments["args"].reference = BASE
        return self.trainer_class(policy, reference, loss=self._given_loss, **arguments)


def _score(one: Scored) -> float:
    return one.score
