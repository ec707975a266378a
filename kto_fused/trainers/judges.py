"""Judges: they score completions of a prompt. A reward model, a Python function, or a command.

``judge_of`` chooses by the form of its argument. Whatever the kind, a judge is called as ``judge(prompts,
completions)`` and returns one list of scores per prompt; ``scored`` checks them.
"""

import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from ..data.form import short
from ..data.prompts import Text
from ..huggingface import files
from ..huggingface.config import max_positions
from . import models
from .generation import autocast

FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
KINDS = (
    "the folder or the Hub's name of a reward model, a Python function as module:function, or a command that reads and "
    "writes JSON lines"
)
Judge = Callable[[list[Text], list[list[str]]], list[Any]]


class JudgeError(ValueError):
    """A judge cannot be used, failed, or returned something else than one finite number per completion."""


def judge_of(name: str, args: TrainingArguments, *, batch_size: int) -> Judge:
    """Return the judge that ``name`` names.

    - ``module:function``: ``function(prompt, completions)`` returns a score per completion. The module is looked for
      in the working directory too. ``prompt`` is the data's: text, or a list of messages.
    - a folder, or a name on the Hub: a reward model, ``AutoModelForSequenceClassification`` with one output. It reads
      prompt and completion in its own tokenizer, conversations by its chat template.
    - anything else: a command line. It gets a line ``{"prompt": ..., "completions": [...]}`` per prompt on stdin, and
      writes for each a line with the list of scores on stdout.

    Raises:
        JudgeError: there is no such function, model or command.
    """
    if FUNCTION.fullmatch(name):
        return _function(name)
    if Path(name).is_dir() or (HUB_NAME.fullmatch(name) and not Path(name).exists()):
        return RewardModel(name, args, batch_size)
    try:
        words = shlex.split(name)
    except ValueError as error:
        raise JudgeError(f"--judge {name!r} is no command line: {error}") from error
    if not words or shutil.which(words[0]) is None:
        raise JudgeError(f"--judge {name!r} is none of these: {KINDS}")
    return _Command(words)


def scored(judge: Judge, prompts: list[Text], completions: list[list[str]]) -> list[list[float]]:
    """Return the judge's scores, one finite float per completion.

    Raises:
        JudgeError: it returned another number of scores, text, NaN or an infinity; the message names the prompt.
    """
    scores = judge(prompts, completions)
    if not _is_sequence(scores) or len(scores) != len(prompts):
        came = f"{len(scores)} lists" if _is_sequence(scores) else short(scores)
        raise JudgeError(f"the judge returned {came} for {len(prompts)} prompts: expected one list of scores for each")
    return [_checked(*one) for one in zip(prompts, completions, scores, strict=True)]


def _checked(prompt: Text, completions: list[str], scores: Any) -> list[float]:
    where = f"the judge's scores of the completions of {short(prompt)}"
    if isinstance(scores, torch.Tensor) or hasattr(scores, "tolist"):  # NumPy's arrays too
        scores = scores.tolist()
    if not _is_sequence(scores):
        raise JudgeError(f"{where} are {short(scores)}: expected a list of {len(completions)} numbers")
    if len(scores) != len(completions):
        raise JudgeError(f"{where} are {len(scores)} numbers: expected one for each of {len(completions)} completions")
    values = []
    for score in scores:
        try:
            is_number = not isinstance(score, (bool, str)) and math.isfinite(score)
        except TypeError:
            is_number = False
        if not is_number:
            raise JudgeError(f"{where} hold {short(score)}: expected a finite number")
        values.append(float(score))
    return values


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


# ---- the kinds ----------------------------------------------------------------------------------------------------


def _function(name: str) -> Judge:
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as ``python -m`` does
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # a user's module may fail in any way
        raise JudgeError(f"--judge {name} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise JudgeError(f"--judge {name} is {short(function)}, expected a function of a prompt and its completions")

    return function_judge(function, f"--judge {name}")


def function_judge(function: Callable[[Text, list[str]], Any], name: str = "the judge") -> Judge:
    """Return the judge that calls ``function(prompt, completions)`` for each prompt."""

    def judge(prompts: list[Text], completions: list[list[str]]) -> list[Any]:
        scores = []
        for prompt, of_prompt in zip(prompts, completions, strict=True):
            try:
                scores.append(function(prompt, of_prompt))
            except Exception as error:  # a user's function may fail in any way
                raise JudgeError(f"{name} failed: {type(error).__name__}: {error}") from error
        return scores

    return judge


class _Command:
    def __init__(self, words: list[str]):
        self.words = words

    def __call__(self, prompts: list[Text], completions: list[list[str]]) -> list[Any]:
        lines = [
            json.dumps({"prompt": prompt, "completions": of_prompt})
            for prompt, of_prompt in zip(prompts, completions, strict=True)
        ]
        name = self.words[0]
        try:
            done = subprocess.run(self.words, input="\n".join(lines) + "\n", capture_output=True, text=True)
        except OSError as error:
            raise JudgeError(f"--judge {name} cannot be run: {error.strerror}") from error
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it printed no reason"])[-1]
            raise JudgeError(f"--judge {name} ended with code {done.returncode}: {reason}")
        scores = []
        for line in filter(str.strip, done.stdout.splitlines()):
            try:
                scores.append(json.loads(line))
            except ValueError as error:
                raise JudgeError(
                    f"--judge {name} wrote {short(line)}, expected a line with a list of scores"
                ) from error
        return scores


class RewardModel:
    """A sequence-classification model with one output, which it reads at the last token of prompt and completion."""

    def __init__(self, name: str, args: TrainingArguments, batch_size: int):
        self.args, self.batch_size, trusts = args, batch_size, args.trust_remote_code
        try:
            self.tokenizer = files.load_pretrained(AutoTokenizer, name, trust_remote_code=trusts)
            self.model, found = files.load_pretrained(
                AutoModelForSequenceClassification, name, trust_remote_code=trusts, output_loading_info=True
            )
        except Exception as error:  # files that others wrote can fail in any way
            place = "" if Path(name).is_dir() else " (no folder here, so a name on the Hub)"
            raise JudgeError(f"--judge {name}{place} cannot be loaded: {files.damaged_file(name) or error}") from error
        if missing := sorted(found["missing_keys"]):
            raise JudgeError(f"--judge {name} is no reward model: its files lack {missing[0]}")
        if self.model.config.num_labels != 1:
            raise JudgeError(f"--judge {name} has {self.model.config.num_labels} outputs, expected the one of a reward")
        self.pad = models.pad_token_id(self.tokenizer)
        self.model.config.pad_token_id = self.pad
        self.model.requires_grad_(False).eval().to(args.device)

    def __call__(self, prompts: list[Text], completions: list[list[str]]) -> list[list[float]]:
        texts = [
            (prompt, completion)
            for prompt, of_prompt in zip(prompts, completions, strict=True)
            for completion in of_prompt
        ]
        ids = [self._ids(*one) for one in texts]
        longest = max_positions(self.model.config)
        if longest is not None and (tokens := max(map(len, ids), default=0)) > longest:
            raise JudgeError(
                f"the judge's reward model reads at most {longest} tokens, but a prompt and its answer have {tokens}: "
                "lower max_new_tokens or max_length, or take a judge that reads more"
            )
        scores: list[float] = []
        with torch.no_grad(), autocast(self.args):
            for start in range(0, len(ids), self.batch_size):
                scores += self._scores(ids[start : start + self.batch_size])
        every = iter(scores)
        return [[next(every) for _ in of_prompt] for of_prompt in completions]

    def _ids(self, prompt: Text, completion: str) -> list[int]:
        """Return the tokens that the reward model was trained on: an answer ends with its end-of-text token."""
        tokenizer = self.tokenizer
        if not isinstance(prompt, str):
            messages = [*prompt, {"role": "assistant", "content": completion}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        ids, end = tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def _scores(self, rows: list[list[int]]) -> list[float]:
        width = max(map(len, rows))
        input_ids = torch.tensor([row + [self.pad] * (width - len(row)) for row in rows], device=self.args.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.args.device)
        if not hasattr(self.model, "score"):  # an encoder, which pools as it was trained to
            return self.model(input_ids=input_ids, attention_mask=mask).logits[:, 0].double().tolist()
        # transformers looks for the last token that is no padding by its id, and would pass over an end token that the
        # tokenizer pads with too
        hidden = self.model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(rows)), mask.sum(1) - 1]
        return self.model.score(last)[:, 0].double().tolist()
