"""Rounds of generate, judge, train: the loop that SPIN, online DPO and KTO (``online``) and PPO (``ppo``) share.

A round is a function of the settings and of the checkpoint that the round before it ended with. Its samples, its
training data and its checkpoints are on disk before the next part begins, so a run goes on from any of them as if it
had not been stopped. ``output_dir`` holds

- ``run.json``: the settings, and what each finished part of each round found
- ``round-1/samples.jsonl``: the samples, with their scores, one a line
- ``round-1/data``: what the round trains on, as token ids
- ``round-1/checkpoint-8``: the trainer's checkpoints; the last one is the round's result
"""

import copy
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from .. import log
from ..data.prompts import Prompt, read_prompts, tokenized_prompts
from ..data.tokens import Prepared
from ..huggingface import files
from . import checkpoints, fingerprints, folder_lock, losses, models, ranks, runs
from .base import FusedTrainer
from .configs import FusedPreferenceConfig
from .generation import ModelGenerator, Sample, Sampling, ServerGenerator, decoded, end_tokens
from .judges import Judge, function_judge, judge_of, scored
from .round_settings import LoopSettings
from .token_values import Row, TokenValues, token_values

logger = logging.getLogger(__name__)

STATE, SAMPLES, DATA = "run.json", "samples.jsonl", "data"
DISK_SECONDS = 60  # after which a file is seen from other nodes: a network disk may keep its absence for half a minute
KEPT_ROUNDS = 2  # whose checkpoints stay: the last one's, and the one before it that it began with


class RoundError(ValueError):
    """A round diverged or has nothing to learn from; the message names it and the last good checkpoint."""


class Scored(NamedTuple):
    """A sample with what the loop knows of it."""

    sample: Sample
    score: float | None  # None without a judge
    logps: list[float]  # of its tokens under the policy that drew it, at the sampling temperature, in nats


class TrainingData(NamedTuple):
    """What a round trains on, and what is logged of it."""

    dataset: Dataset
    found: dict[str, Any]


# ---- the loop -----------------------------------------------------------------------------------------------------


class Loop:
    """Rounds of generate, judge, train. A subclass says what a round trains on, and with which trainer.

    Args:
        settings, config: the loop's options and the trainer's.
        judge: a function of a prompt and its completions that returns a score for each, in place of ``settings.judge``.
        tokenizer, model, records: of ``settings.model`` and ``settings.data`` if not given; the model without an
            adapter, the records as ``read_prompts`` returns them.
        peft_config: of the adapter to train; None trains all weights.
        loss: a loss in place of the one that ``config`` describes.
        during_training: ``during_training(trainer)`` is a context in which a round's trainer trains.
        report: called with each finished round's entry of ``run.json``.

    Raises:
        ValueError: an option that cannot be used, by name; ``DataError`` for a record, ``JudgeError`` for a judge.
    """

    trainer_class: type[FusedTrainer]
    needs_answers: ClassVar[bool] = False
    needs_judge: ClassVar[bool] = True
    default_samples: ClassVar[int] = 4
    least_samples: ClassVar[int] = 1
    keeps_optimizer: ClassVar[bool] = True  # whether a round's optimizer goes on where the last one's ended

    def __init__(
        self,
        settings: LoopSettings,
        config: FusedPreferenceConfig,
        *,
        judge: Callable[[Any, list[str]], Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        model: PreTrainedModel | None = None,
        records: list[dict[str, Any]] | None = None,
        peft_config: Any = None,
        loss: losses.AnyLoss | None = None,
        during_training: Callable[[FusedTrainer], AbstractContextManager] = nullcontext,
        report: Callable[[dict[str, Any]], None] = lambda entry: None,
    ):
        log.show()
        self.settings, self.config, self.peft_config = settings, config, peft_config
        self.during_training, self.report = during_training, report
        self.loss = config.make_loss() if loss is None else loss
        self._given_loss = loss
        self.samples = settings.samples or self.default_samples
        self.output = Path(config.output_dir)
        if self.samples < self.least_samples:
            raise ValueError(f"samples must be at least {self.least_samples} to compare them, got {self.samples}")
        if settings.lora_rank and peft_config is None:
            raise ValueError(f"lora_rank={settings.lora_rank} is an option of the command: pass peft_config instead")
        # what a round's trainer would refuse is refused before the first round's samples are drawn
        self.trainer_class._check_loss(self.loss, config)
        if settings.ref_model is not None:
            if not self.takes_ref_model():
                why = self.why_no_ref_model()
                raise ValueError(f"ref_model={settings.ref_model} is given, but {why}: leave it out")
            models.config_of("ref_model", settings.ref_model, config.trust_remote_code)
        if config.fsdp or config.deepspeed:
            raise ValueError(
                "rounds of generation under FSDP or DeepSpeed are not supported, because each process generates with a "
                "whole model: start one process per GPU without them (torchrun), with lora_rank for a larger model"
            )
        for name in ("save_only_model", "objective_weights"):
            if getattr(config, name, None):
                raise ValueError(f"{name} has no meaning in rounds of generation: leave it out")
        if records is None:
            records = read_prompts(settings.data, needs_answers=self.needs_answers, reading=config.reading)
        self.judge = self._judge_of(judge)
        self.tokenizer = models.tokenizer_of(settings.model, tokenizer, config.trust_remote_code)
        model = self._load(settings.model) if model is None else model
        self.max_length = models.max_length(config.max_length, config.pad_to_multiple_of, model=model)
        room = None if self.max_length is None else self.max_length - settings.max_new_tokens
        if room is not None and room < 1:
            raise ValueError(
                f"max_new_tokens={settings.max_new_tokens} leaves no room for a prompt: max_length is {self.max_length}"
            )
        self.data = tokenized_prompts(records, self.tokenizer, max_prompt_tokens=room, chat=config.chat)
        self.left_out = len(records) - len(self.data)  # prompts that leave no room
        self._by_number = {prompt.number: prompt for prompt in self.data}
        self._ends = end_tokens(model, self.tokenizer)
        self._first: nn.Module | None = models.with_adapters(model, peft_config, config.seed)
        if settings.generator is None:
            self.generate: Any = ModelGenerator(self.tokenizer, config)
        else:
            self.generate = ServerGenerator(settings.generator, settings.model, config, settings.reload_command)
        self.state: dict[str, Any] = {"settings": self._described(records), "rounds": []}

    def _judge_of(self, function: Callable[[Any, list[str]], Any] | None) -> Judge | None:
        settings = self.settings
        if function is not None and settings.judge is not None:
            raise ValueError("judge is given twice, in settings and as a function: leave one out")
        if function is not None:
            return function_judge(function)
        if settings.judge is None:
            if self.needs_judge:
                raise ValueError(f"judge must be given: {type(self).__name__} learns from its scores")
            return None
        loaded: list[Judge] = []  # on the first process alone, which asks it
        batch_size = settings.generation_batch_size
        ranks.on_first(self.config, lambda: loaded.append(judge_of(settings.judge, self.config, batch_size=batch_size)))
        return loaded[0] if loaded else _of_the_first_process

    # ---- what a subclass says ----

    def training_data(self, number: int, policy: nn.Module, samples: list[Scored]) -> TrainingData:
        """Return what round ``number`` trains on.

        Raises:
            RoundError: there is nothing to learn from.
        """
        raise NotImplementedError

    def make_trainer(self, number: int, policy: nn.Module, **arguments: Any) -> FusedTrainer:
        """Return the round's trainer of ``policy``; ``arguments`` are ``args``, ``train_dataset`` and more."""
        raise NotImplementedError

    def takes_ref_model(self) -> bool:
        """Whether the rounds compare the policy with one reference, which ``settings.ref_model`` may name."""
        return losses.needs_reference(self.loss)

    def why_no_ref_model(self) -> str:
        """Return why there is no such reference."""
        return f"{losses.describe(self.loss)} has no reference"

    # ---- the run ----

    def run(self) -> list[dict[str, Any]]:
        """Run the rounds that ``run.json`` does not hold yet, and return the entries of all rounds.

        Raises:
            RoundError: a round diverged, or has nothing to learn from.
            checkpoints.CheckpointError: ``output_dir`` holds a run with other settings.
            checkpoints.FolderInUseError: another run writes into it.
        """
        with folder_lock.only_run_in(self.config):
            runs.check_same_everywhere(self.state["settings"], self.config)
            self.state["rounds"] = rounds = ranks.on_first(self.config, self._resumed_rounds)
            if self.config.should_log and (text := self.reference_text()):
                logger.info(f"The reference is {text}.")
            self._save_state()
            ranks.shared(self.config, self._check_disk)
            for number in range(1, self.settings.rounds + 1):
                if number > len(rounds):
                    rounds.append({"round": number})
                entry = rounds[number - 1]
                if "checkpoint" in entry:
                    continue
                if not self._round(number, entry):
                    break
                self.report(entry)
            return rounds

    def _round(self, number: int, entry: dict[str, Any]) -> bool:
        """Do what is left of a round. Returns whether it trained to its end."""
        folder, before = self.output / f"round-{number}", self.checkpoint_before(number)
        policy = self._load_policy(before)
        if "examples" not in entry:
            started = time.perf_counter()
            samples = self._sampled(number, policy, before)
            entry |= self._described_samples(number, samples)
            data = self.training_data(number, policy, samples)
            ranks.on_first(self.config, lambda: self._write(folder, samples, data.dataset))
            entry |= data.found | {"examples": len(data.dataset), "sampling_seconds": time.perf_counter() - started}
            self._save_state()
        config = copy.copy(self.config)
        config.output_dir, config.seed = str(folder), self.config.seed + number - 1
        dataset = Dataset.load_from_disk(str(folder / DATA))
        callbacks = [_EndOfRound(), _StopOnNaN(lambda reason: self._diverged(number, reason))]
        trainer = self.make_trainer(
            number, policy, args=config, train_dataset=dataset, processing_class=self.tokenizer, callbacks=callbacks
        )
        is_begun = ranks.on_first(
            self.config, lambda: any(checkpoints.is_complete(found.folder) for found in checkpoints.found_in(folder))
        )
        if self.keeps_optimizer and before is not None and not is_begun:
            _continue_optimizer(trainer, before)
        with self.during_training(trainer):
            done = trainer.train(resume_from_checkpoint=True if is_begun else None)
        if trainer.state.global_step < trainer.state.max_steps:
            return False  # Ctrl-C ended it, with a checkpoint
        kl = self._moved(number, trainer.model)
        if not abs(kl) <= self.settings.max_kl:
            self._diverged(
                number, f"it moved the policy by a KL divergence of {kl:.4g} nats, max_kl is {self.settings.max_kl:g}"
            )
        result = ranks.on_first(self.config, lambda: max(checkpoints.found_in(folder)))
        entry |= {
            "kl": kl,
            "log": [step for step in trainer.state.log_history if "loss" in step],
            "training_seconds": done.metrics["train_runtime"],
            "checkpoint": f"{folder.name}/{result.folder.name}",
        }
        self._save_state()
        ranks.on_first(self.config, lambda: self._remove_old(number))
        trainer.accelerator.free_memory()
        return True

    def checkpoint_before(self, number: int) -> str | None:
        """Return the checkpoint that round ``number`` begins with; None for the first one."""
        return None if number == 1 else str(self.output / self.state["rounds"][number - 2]["checkpoint"])

    def _diverged(self, number: int, reason: str) -> None:
        good = self.checkpoint_before(number)
        kept = f"the last good checkpoint is {good}" if good else f"the last good weights are {self.settings.model}"
        raise RoundError(f"round {number} diverged: {reason}; {kept}")

    def _nothing(self, number: int) -> None:
        good = self.checkpoint_before(number) or self.settings.model
        raise RoundError(
            f"round {number}: the judge's scores tell no samples apart, so there is nothing to learn; the last good "
            f"checkpoint is {good}"
        )

    # ---- samples ----

    def prompts_of(self, number: int) -> list[Prompt]:
        """Return a round's prompts: the next of all, which are shuffled anew when fewer than it takes are left."""
        count, total = self.settings.prompts or len(self.data), len(self.data)
        if count > total:
            raise ValueError(f"prompts={count} are more than the data's {total}")
        epoch, index = divmod(number - 1, total // count)
        order = np.random.default_rng([self.config.seed, epoch]).permutation(total)
        return [self.data[row] for row in sorted(order[index * count : (index + 1) * count].tolist())]

    def _sampled(self, number: int, policy: nn.Module, before: str | None) -> list[Scored]:
        settings = self.settings
        prompts = self.prompts_of(number)
        sampling = Sampling(
            self.samples,
            settings.max_new_tokens,
            settings.temperature,
            settings.generation_batch_size,
            self._ends,
            self.config.seed,
            number,
        )
        found = self.generate(policy, before, prompts, sampling)
        texts = [decoded(self.tokenizer, sample.ids) for sample in found]
        if not any(text.strip() for text in texts):
            self._diverged(number, f"all {len(texts)} samples are empty")
        if len(found) > 1 and all(sample.ids == found[0].ids for sample in found):
            self._diverged(number, f"all {len(texts)} samples are equal: {texts[0]!r:.60}")
        scores: list[float | None] = [None] * len(found)
        if self.judge is not None:
            scores = self._judged([prompt.text for prompt in prompts], texts)
        rows = [(self._by_number[sample.prompt].ids, sample.ids) for sample in found]
        values = self.token_values(policy, rows)
        if not all(np.isfinite(one.logps).all() for one in values):
            self._diverged(number, "the policy's log-probabilities are not finite")
        return [Scored(*one, value.logps) for *one, value in zip(found, scores, values, strict=True)]

    def _judged(self, prompts: list[Any], texts: list[str]) -> list[float | None]:
        """Return the judge's scores, given on the first process."""
        groups = [texts[start : start + self.samples] for start in range(0, len(texts), self.samples)]
        scores = ranks.on_first(self.config, lambda: scored(self.judge, prompts, groups))
        return [score for of_prompt in scores for score in of_prompt]

    def _described_samples(self, number: int, samples: list[Scored]) -> dict[str, Any]:
        lengths = [len(one.sample.ids) for one in samples]
        entry = {
            "samples": len(samples),
            "tokens": sum(lengths),
            "mean_length": sum(lengths) / len(lengths),
            "cut": sum(one.sample.is_cut for one in samples) / len(samples),
            "entropy": -sum(sum(one.logps) for one in samples) / max(1, sum(lengths)),
        }
        if self.judge is not None:
            scores = np.array([one.score for one in samples])
            entry |= {"score": scores.mean(), "score_std": scores.std()}
            if self.samples > 1:
                entry["best_score"] = scores.reshape(-1, self.samples).max(1).mean()
            if number > 1 and (rate := self._win_rate(number, samples)) is not None:
                entry["win_rate"] = rate
        return {name: value if isinstance(value, int) else float(value) for name, value in entry.items()}

    def _win_rate(self, number: int, samples: list[Scored]) -> float | None:
        """Return how often a prompt's samples score higher than those of the round before; a tie counts as half."""
        before: dict[int, list[float]] = {}
        for line in read_samples(self.output / f"round-{number - 1}"):
            before.setdefault(line["prompt_number"], []).append(line["score"])
        wins = [
            (one.score > other) + (one.score == other) / 2
            for one in samples
            for other in before.get(one.sample.prompt, ())
        ]
        return sum(wins) / len(wins) if wins else None

    def token_values(self, policy: nn.Module, rows: list[Row], critic: nn.Module | None = None) -> list[TokenValues]:
        """Return the log-probabilities and values of the rows' completion tokens, at the sampling temperature."""
        pad, temperature = models.pad_token_id(self.tokenizer), self.settings.temperature or 1.0
        return token_values(policy, rows, self.config, pad_token_id=pad, temperature=temperature, critic=critic)

    def _moved(self, number: int, policy: nn.Module) -> float:
        """Return an estimate of KL(policy before the round || policy after it), in nats per sample, by its samples.

        It is the mean of log p_before - log p_after. A divergence is never below 0; an estimate far below it says that
        the policy has learnt these samples by heart.
        """
        lines = read_samples(self.output / f"round-{number}")
        rows = [(self._by_number[line["prompt_number"]].ids, line["ids"]) for line in lines]
        after = self.token_values(policy, rows)
        return sum(line["logp"] - sum(one.logps) for line, one in zip(lines, after, strict=True)) / len(lines)

    # ---- models ----

    def _load_policy(self, checkpoint: str | None) -> nn.Module:
        """Return the policy of a checkpoint; without one, the model that the run begins with."""
        first, self._first = self._first, None
        if checkpoint is None and first is not None:
            return first
        if self.peft_config is None:
            return self._load(checkpoint or self.settings.model)
        base = self._load(self.settings.model)
        if checkpoint is None:
            return models.with_adapters(base, self.peft_config, self.config.seed)
        from peft import PeftModel

        return PeftModel.from_pretrained(base, checkpoint, is_trainable=True)

    def _load(self, name: str) -> nn.Module:
        return files.load_model(name, dtype=self.settings.dtype, trust_remote_code=self.config.trust_remote_code)

    def reference(self) -> nn.Module | None:
        """Return the reference model of the whole run; None where it is the policy with its adapters off."""
        if self.settings.ref_model is None and self.peft_config is not None:
            return None
        return self._load(self.settings.ref_model or self.settings.model)

    def reference_text(self) -> str | None:
        """Return what the rounds compare the policy with, for the log; None if they need no reference."""
        if not self.takes_ref_model():
            return None
        if self.settings.ref_model is not None:
            return f"{self.settings.ref_model} (ref_model), in every round"
        if self.peft_config is not None:
            return "the model with its adapters off, in every round"
        return f"the model that the run began with ({self.settings.model}), in every round"

    # ---- files ----

    def _described(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what a run's results depend on, by name."""
        left_out = ("data", "own_loss", "rounds", "max_kl", "generation_batch_size", "generator", "reload_command")
        described = {name: value for name, value in vars(self.settings).items() if name not in left_out}
        options = self.config.to_dict()
        for option in fields(self.config):
            if option.name not in runs.CURVE_NEUTRAL or option.name in ("max_steps", "num_train_epochs", "max_length"):
                described[option.name] = options[option.name]
        if self._given_loss is not None:
            described["loss_type"] = losses.describe(self.loss)
        described |= {"samples": self.samples, "data": fingerprints.hash_json(records)}
        return json.loads(json.dumps(described, default=str))

    def _resumed_rounds(self) -> list[dict[str, Any]]:
        path = self.output / STATE
        if not path.is_file():
            return []
        try:
            saved = json.loads(path.read_bytes())
            before, rounds = saved["settings"], saved["rounds"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise checkpoints.CheckpointError(f"{path} is damaged ({error}): start in another output_dir") from error
        now = self.state["settings"]
        different = [name for name in now if before.get(name) != now[name]]
        if different and not self.config.resume_anyway:
            listed = "; ".join(f"{name}: {before.get(name)} then, {now[name]} now" for name in different)
            raise checkpoints.CheckpointError(
                f"{self.output} holds a run with other settings ({listed}): resume it with the same ones, or go on "
                "regardless with resume_anyway=True (--resume_anyway)"
            )
        return rounds

    def _save_state(self) -> None:
        def save() -> None:
            draft = self.output / f"{STATE}.part"
            draft.write_text(json.dumps(self.state, indent=1) + "\n", encoding="utf-8")
            os.replace(draft, self.output / STATE)

        ranks.on_first(self.config, save)

    def _check_disk(self) -> list:
        """Refuse a process that does not see the first one's files, as all read its samples and checkpoints."""
        end = time.monotonic() + DISK_SECONDS
        while not (self.output / STATE).is_file() and time.monotonic() < end:
            time.sleep(0.5)
        if not (self.output / STATE).is_file():
            raise ValueError(
                f"process {self.config.process_index} does not find {self.output / STATE}, which process 0 has "
                "written: put output_dir on a disk that all nodes share"
            )
        return []

    def _write(self, folder: Path, samples: list[Scored], dataset: Dataset) -> None:
        """Write the samples and the training data of a round; what a killed run left there goes."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with (folder / SAMPLES).open("w", encoding="utf-8") as file:
            for one in samples:
                prompt = self._by_number[one.sample.prompt]
                line = {
                    "prompt_number": prompt.number,
                    "sample": one.sample.sample,
                    "prompt": prompt.text,
                    "completion": decoded(self.tokenizer, one.sample.ids),
                    "score": one.score,
                    "is_cut": one.sample.is_cut,
                    "logp": sum(one.logps),
                    "ids": one.sample.ids,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        dataset.save_to_disk(str(folder / DATA))

    def _remove_old(self, number: int) -> None:
        for entry in self.state["rounds"][: max(0, number - KEPT_ROUNDS)]:
            for found in checkpoints.found_in(self.output / f"round-{entry['round']}"):
                checkpoints.remove(found.folder)


def _of_the_first_process(prompts: list[Any], completions: list[list[str]]) -> list[Any]:
    raise RuntimeError("only the first process has the judge")


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a round's ``samples.jsonl``."""
    with (folder / SAMPLES).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ---- parts of a round's trainer -----------------------------------------------------------------------------------


class TakesTokens:
    """A trainer whose data are token ids already, as the loop makes them of samples."""

    def _tokenize(self, source: Dataset, args: FusedPreferenceConfig, name: str) -> Prepared:
        return Prepared(source, 0, 0, {}, {}, 0)

    def _say_what_the_reference_is(self) -> None:
        pass  # the loop says it once, for all rounds


class _EndOfRound(TrainerCallback):
    """Saves after the last step, whatever ``save_strategy`` says: the next round begins with this checkpoint."""

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = control.should_log = True


class _StopOnNaN(TrainerCallback):
    def __init__(self, stop: Callable[[str], None]):
        self.stop = stop

    def on_log(self, args, state, control, logs: dict[str, float], **kwargs: Any) -> None:
        # with fp16, loss scaling skips a step whose scaled gradients overflow
        for name in ("loss",) if args.fp16 else ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                self.stop(f"{name} is {logs[name]} at step {state.global_step}")


def _continue_optimizer(trainer: FusedTrainer, checkpoint: str) -> None:
    """Give the trainer the optimizer's state of a checkpoint; its schedule begins anew."""
    path = Path(checkpoint) / "optimizer.pt"
    rates = [group["lr"] for group in trainer.create_optimizer().param_groups]
    # the optimizer moves its state to the weights' device; torch.load takes no map_location like "cpu:0"
    trainer.optimizer.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
        group.pop("initial_lr", None)
