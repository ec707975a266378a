"""Answers of the model to a few prompts before and after training, side by side."""

import json
import math
import os
import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from .. import huggingface
from ..data.prompts import Prompt
from ..huggingface.config import max_positions
from ..trainers import ranks
from ..trainers.generation import ModelGenerator, Sampling, decoded, end_tokens

if TYPE_CHECKING:
    from ..trainers import FusedTrainer

FILE = "samples.json"  # in the output folder: the answers before training, for a run that is resumed
MAX_NEW_TOKENS, TEMPERATURE = 128, 0.0
BATCH_SIZE = 8  # answers that are generated at a time
CUT = " [...]"  # ends a text that goes on
NO_SHARDS = (
    "sample_prompts has no meaning with FSDP or DeepSpeed, whose processes hold parts of the weights each: leave it "
    "out, and talk with the trained model afterwards (kto-fused chat --compare)"
)


def check(settings: Any) -> None:
    """Check the options of samples of a command's settings.

    Raises:
        ValueError: an option has a wrong value, or there is no sample that it belongs to.
    """
    if settings.sample_prompts < 0:
        raise ValueError(f"sample_prompts must be at least 0, got {settings.sample_prompts}")
    if settings.sample_max_new_tokens is not None and settings.sample_max_new_tokens < 1:
        raise ValueError(f"sample_max_new_tokens must be at least 1, got {settings.sample_max_new_tokens}")
    if settings.sample_temperature is not None and not 0 <= settings.sample_temperature < math.inf:
        raise ValueError(f"sample_temperature must be a finite number >= 0, got {settings.sample_temperature}")
    for name in ("sample_max_new_tokens", "sample_temperature"):
        if not settings.sample_prompts and getattr(settings, name) is not None:
            raise ValueError(f"{name} is given, but there are no samples: set sample_prompts too")


class Sampler:
    """Generates one answer to each of a few prompts with a trainer's model, which trains as if it had not been asked.

    The prompts are the token ids of the prepared data, so the model reads them as it reads them in training.

    Args:
        trainer: a trainer that has not trained yet. Its evaluation data hold the prompts, else its training data do.
        count: number of distinct prompts, drawn by the trainer's seed; fewer where the data hold fewer.
        max_new_tokens: longest answer.
        temperature: 0 takes the most likely tokens.

    Raises:
        ValueError: the weights lie in shards on several processes, or the data hold no prompt that leaves room.
    """

    def __init__(
        self,
        trainer: "FusedTrainer",
        count: int,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
    ):
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(NO_SHARDS)
        max_new_tokens = MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens
        temperature = TEMPERATURE if temperature is None else temperature
        self.trainer, args, tokenizer = trainer, trainer.args, trainer.processing_class
        model = huggingface.unwrap(trainer.unwrapped(trainer.model))
        longest = max_positions(model.config)
        room = None if longest is None else longest - max_new_tokens
        is_held_out = trainer.eval_dataset is not None
        name = "evaluation" if is_held_out else "training"
        dataset = trainer.eval_dataset if is_held_out else trainer.train_dataset
        found = _prompts(dataset, count, room, tokenizer, args.seed)
        if not found:
            fitting = (
                "" if room is None else f" of at most {room} tokens, which leaves room for {max_new_tokens} new ones"
            )
            raise ValueError(f"sample_prompts={count}: the {name} data hold no prompt{fitting}")
        self.prompts = [
            Prompt(number, tokenizer.decode(ids, skip_special_tokens=False), ids, None, [])
            for number, ids in enumerate(found)
        ]
        number = str(len(found)) if len(found) == count else f"{len(found)} (all of {count} that are distinct)"
        how = f"tokens drawn at temperature {temperature:g}" if temperature else "the most likely tokens"
        why = "" if is_held_out else ", because there are no evaluation data"
        self.caption = f"{number} prompts of the {name} data{why}; {how}, at most {max_new_tokens} of them"
        ends = end_tokens(model, tokenizer)
        self._sampling = Sampling(1, max_new_tokens, temperature, BATCH_SIZE, ends, args.seed, 0)

    def before(self, *, is_resumed: bool) -> list[str]:
        """Return the answers before training, and keep them in the output folder. A resumed run reads them there.

        Where a resumed run finds none of the same prompts, the model that it was given answers, which is the model
        that the run began with.
        """
        described = {**self._sampling._asdict(), "prompts": [prompt.ids for prompt in self.prompts]}
        described = json.loads(json.dumps(described))
        args, path = self.trainer.args, Path(self.trainer.args.output_dir) / FILE
        found = ranks.on_first(args, lambda: _kept(path, described)) if is_resumed else None
        if found is not None:
            return found
        answers = self._answers("before")

        def keep() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f"{FILE}.part")
            draft.write_text(json.dumps({"sampling": described, "before": answers}) + "\n", encoding="utf-8")
            os.replace(draft, path)

        ranks.on_first(args, keep)
        return answers

    def compared(self, before: list[str]) -> dict[str, Any]:
        """Return the prompts with the answers before and after training, as ``metrics.json`` holds them."""
        after = self._answers("after")
        rows = [
            {"prompt": prompt.text, "before": was, "after": now}
            for prompt, was, now in zip(self.prompts, before, after, strict=True)
        ]
        return {"caption": self.caption, "rows": rows}

    def _answers(self, when: str) -> list[str]:
        trainer, tokenizer = self.trainer, self.trainer.processing_class
        if trainer.is_world_process_zero():
            print(f"generating answers to {len(self.prompts)} prompts {when} training")
        generate = ModelGenerator(tokenizer, trainer.args)
        found = generate(trainer.unwrapped(trainer.model), None, self.prompts, self._sampling)
        return [decoded(tokenizer, sample.ids) + CUT * sample.is_cut for sample in found]


def _prompts(dataset: Dataset, count: int, room: int | None, tokenizer: Any, seed: int) -> list[list[int]]:
    """Return ``count`` distinct prompts of prepared data as token ids, drawn by the seed; fewer if there are fewer."""
    if "prompt_ids" not in dataset.column_names:
        raise ValueError("sample_prompts finds no prompts in packed data: give evaluation data, which are not packed")
    column, found = dataset.select_columns(["prompt_ids"]), {}
    order = np.random.default_rng(seed).permutation(len(column))
    for start in range(0, len(order), 1000):
        for ids in column[order[start : start + 1000]]["prompt_ids"]:
            is_prompt = ids and ids != [tokenizer.bos_token_id]  # a whole text has none
            if is_prompt and (room is None or len(ids) <= room):
                found[tuple(ids)] = None
            if len(found) == count:
                return [*map(list, found)]
    return [*map(list, found)]


def _kept(path: Path, described: dict[str, Any]) -> list[str] | None:
    """Return the answers that the run's first part kept; None if there are none to the same prompts."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["before"] if content["sampling"] == described else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ---- on the terminal ----------------------------------------------------------------------------------------------


def lines(samples: dict[str, Any]) -> list[str]:
    """Return the samples as lines of text, the answers before and after training in two columns."""
    width = max(60, min(160, shutil.get_terminal_size((100, 24)).columns))
    half = (width - 3) // 2
    found = [f"samples: {samples['caption']}"]
    for row in samples["rows"]:
        columns = [_wrapped(f"{name}: {row[name] or '(no text)'}", half) for name in ("before", "after")]
        columns = [column + [""] * (max(map(len, columns)) - len(column)) for column in columns]
        found += ["", *_wrapped(f"prompt: {row['prompt']}", width)]
        found += [f"{before:{half}} | {after}".rstrip() for before, after in zip(*columns, strict=True)]
    return found


def _wrapped(text: str, width: int) -> list[str]:
    """Return the text in lines of at most ``width`` characters, without characters that would steer the terminal."""
    plain = ["".join(one if one.isprintable() else " " for one in line) for line in text.splitlines()]
    return [part for line in plain for part in textwrap.wrap(line, width) or [""]] or [""]
