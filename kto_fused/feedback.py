"""Unpaired feedback: JSON Lines of ``prompt``, ``completion`` and ``label``, read, tokenized and padded to batches."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

BUNDLED = Path(__file__).with_name("data") / "feedback.jsonl"
FIELDS = {"prompt": str, "completion": str, "label": bool}
IGNORE_INDEX = -100


class FeedbackError(Exception):
    """A feedback file that cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class Example:
    """One completion somebody liked (``label``) or did not."""

    prompt: str
    completion: str
    label: bool


@dataclass(frozen=True)
class Tokens:
    """An example in token ids."""

    prompt: list[int]
    completion: list[int]
    label: bool


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences, prompt then completion. [B, T] and ``desirable`` [B]."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    desirable: torch.Tensor


def read(path: Path) -> list[Example]:
    """The examples of a JSON Lines file; blank lines are skipped.

    Raises:
        FeedbackError: the file cannot be read, a line is not JSON or lacks a field, or there is no example of a kind.
    """
    try:
        lines = path.read_text(encoding="utf-8").split(
            "\n"
        )  # not splitlines(): JSON strings may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise FeedbackError(f"{path}: cannot be read as text: {error}") from error
    examples = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise FeedbackError(f"{path}: holds no examples")
    for label, kind in ((True, "desirable"), (False, "undesirable")):
        if all(example.label is not label for example in examples):
            raise FeedbackError(f"{path}: holds no {kind} example (label {str(label).lower()})")
    return examples


def _parse(line: str, where: str) -> Example:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise FeedbackError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise FeedbackError(f"{where}: expected an object with {list(FIELDS)}, got {type(record).__name__}")
    for field, kind in FIELDS.items():
        if field not in record:
            raise FeedbackError(f"{where}: the field {field!r} is missing")
        if not isinstance(record[field], kind):
            raise FeedbackError(f"{where}: {field!r} must be {kind.__name__}, got {record[field]!r}")
        if kind is str and not _is_text(record[field]):
            raise FeedbackError(f"{where}: {field!r} holds half a surrogate pair, which is no text")
    if not record["completion"]:
        raise FeedbackError(f"{where}: 'completion' is empty")
    return Example(record["prompt"], record["completion"], record["label"])


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def tokenize(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Tokens]:
    """Prompt, line break, completion, end of text; of what is longer than ``max_length`` the end is cut off."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = []
    for example in examples:
        prompt = tokenizer(example.prompt + "\n")["input_ids"][: max_length // 2]
        completion = tokenizer(example.completion, add_special_tokens=False)["input_ids"] + end
        tokens.append(Tokens(prompt, completion[: max_length - len(prompt)], example.label))
    return tokens


def collate(examples: Sequence[Tokens], device: torch.device) -> Batch:
    """Pad to the longest; the labels of prompt and padding are ``IGNORE_INDEX``."""
    length = max(len(example.prompt) + len(example.completion) for example in examples)
    input_ids = torch.zeros(len(examples), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, example in enumerate(examples):
        start, stop = len(example.prompt), len(example.prompt) + len(example.completion)
        input_ids[row, :stop] = torch.tensor(example.prompt + example.completion)
        attention_mask[row, :stop] = 1
        labels[row, start:stop] = torch.tensor(example.completion)
    desirable = torch.tensor([example.label for example in examples])
    return Batch(*(tensor.to(device) for tensor in (input_ids, attention_mask, labels, desirable)))


def mismatch(examples: Sequence[Tokens]) -> list[Tokens]:
    """Each prompt with the next prompt's completion: what KTO estimates its reference point from."""
    following = [*examples[1:], examples[0]]
    return [Tokens(own.prompt, other.completion, own.label) for own, other in zip(examples, following, strict=True)]
