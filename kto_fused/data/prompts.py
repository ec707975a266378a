"""Read the prompts that a model generates answers to, and tokenize them as ``tokens`` tokenizes training data.

A record holds a ``prompt``, text or messages, and perhaps an answer: ``completion``, or the ``chosen`` one of a pair.
Files of feedback and of pairs therefore serve as they are.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from . import files
from .form import TOOLS, UNSUPPORTED, DataError, form_messages, form_text, has_content, short, unsupported
from .layouts import LabelError, Labels, Reading, renamed, with_system
from .rendering import Renderer
from .token_rows import encoded_conversations, encoded_texts, special_tokens

logger = logging.getLogger(__name__)

ANSWERS = ("completion", "chosen")
AS_IT_IS = Reading()
Text = str | list[dict[str, str]]


class Prompt(NamedTuple):
    """A prompt, tokenized."""

    number: int  # the record's number in the data; with a round and a seed it fixes the prompt's samples
    text: Text
    ids: list[int]
    answer: Text | None  # the data's own answer; None where none is asked for
    answer_ids: list[int]  # of prompt and answer together; empty without an answer


def read_prompts(paths: list[str], *, needs_answers: bool, reading: Reading = AS_IT_IS) -> list[dict[str, Any]]:
    """Return the records' prompts, and their answers if these are needed, as ``{"prompt", "answer"}``.

    A column ``system`` becomes the system message, and makes a message of a prompt in text. ``reading`` has the names
    of columns, the labels, and whether texts become messages.

    Without answers each prompt is kept once. With them an undesirable completion (``label`` false) and a pair's
    rejected completion are left out. A log entry says how many records are left out, and why.

    Raises:
        DataError: a file cannot be read, or a record has no prompt, lacks an answer that is needed, or has something
            that generation does not take, such as tools or images.
    """
    found, left_out, seen, labels = [], 0, set(), Labels(reading)
    for name, source in ((str(path), source) for path in paths for source in files.found(path)):
        for where, record in _records(source, name):
            checked = _checked(renamed(record, reading, where), needs_answers, where, labels, reading.chat)
            if found and isinstance(checked["prompt"], str) != isinstance(found[0]["prompt"], str):
                raise DataError(f"{where}, field 'prompt': expected all prompts as text, or all as messages, got both")
            key = repr((checked["prompt"], checked["answer"]))
            if key in seen or (needs_answers and not checked.pop("is_desirable")):
                left_out += 1
                continue
            checked.pop("is_desirable", None)
            seen.add(key)
            found.append(checked)
    if not found:
        raise DataError(f"{', '.join(map(str, paths))}: no record with a prompt{' and an answer' * needs_answers}")
    if left_out:
        why = "undesirable answers and repetitions" if needs_answers else "repeated prompts"
        logger.info(f"{len(found)} prompts; {left_out} records are left out: {why}.")
    return found


def _records(path: Path | Dataset, name: str) -> Any:
    """Yield where each record of a file or a ``Dataset`` stands, and the record."""
    if isinstance(path, Dataset):
        yield from ((f"{name}, row {row}", record) for row, record in enumerate(path))
        return
    try:
        with files.opened(path, None) as file:
            yield from files.raw_records(path, file)
    except DataError:
        raise
    except files.UNREADABLE as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _checked(record: Any, needs_answers: bool, where: str, labels: Labels, chat: str) -> dict[str, Any]:
    if not isinstance(record, dict) or "prompt" not in record:
        came = sorted(record) if isinstance(record, dict) else short(record)
        raise DataError(f"{where}: expected a record with a prompt, got {came}")
    for field in (TOOLS, *UNSUPPORTED):  # tools too: judges would not see them
        if has_content(record.get(field)):
            raise DataError(f"{where}, {unsupported(field)}")
    if "system" in record:
        record = with_system(lambda record, where: record, record, where)
    if chat == "always":
        for field, role in (("prompt", "user"), *((name, "assistant") for name in ANSWERS)):
            if isinstance(record.get(field), str) and record[field]:
                record = record | {field: [{"role": role, "content": record[field]}]}
    prompt, here = record["prompt"], f"{where}, field 'prompt'"
    is_text = isinstance(prompt, str)
    if chat == "never" and not is_text:
        raise DataError(f"{here}: holds a conversation, which only a chat template renders, but chat is 'never'")
    prompt = form_text(prompt, here) if is_text else form_messages(prompt, here)
    if not prompt:
        raise DataError(f"{here}: expected text, got an empty prompt")
    if not needs_answers:
        return {"prompt": prompt, "answer": None}
    name = next((name for name in ANSWERS if record.get(name)), None)
    if name is None:
        raise DataError(f"{where}: expected an answer beside the prompt, as 'completion' or 'chosen'")
    answer, here = record[name], f"{where}, field {name!r}"
    if isinstance(answer, str) != is_text:
        raise DataError(f"{here}: expected {'a string' if is_text else 'messages'}, as the prompt is")
    answer = form_text(answer, here) if is_text else form_messages(answer, here)
    try:
        is_desirable = record.get("label") is None or labels(record["label"], where)
    except LabelError as error:
        raise DataError(f"{error}: say which labels mean liked and not, with label_true and label_false") from error
    return {"prompt": prompt, "answer": answer, "is_desirable": is_desirable}


def tokenized_prompts(
    records: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int | None,
    chat: str = "auto",
) -> list[Prompt]:
    """Return the records of ``read_prompts`` as ``Prompt``s, without those longer than ``max_prompt_tokens``.

    Raises:
        DataError: prompts are messages and the tokenizer has no chat template, or no prompt is left.
    """
    texts, has_answers = [record["prompt"] for record in records], records[0]["answer"] is not None
    is_text, rows = isinstance(texts[0], str), list(range(len(records)))
    batch = {"prompt": texts, "completion": [record["answer"] for record in records]}
    fields = ["completion"] if has_answers else []
    if not is_text and not tokenizer.chat_template:
        raise DataError("the prompts are conversations, but the tokenizer has no chat template to render them with")
    if is_text and chat == "auto" and tokenizer.chat_template:
        logger.info(
            "The prompts are plain text, which the model continues as it is, although the tokenizer has a chat "
            "template: chat='always' (--chat always) makes a user's message of each, chat='never' leaves this note out."
        )
    with Renderer(tokenizer, "prompt") as render:
        if is_text:
            encoded = list(encoded_texts(batch, fields, tokenizer))
        else:
            encoded = list(encoded_conversations(batch, fields, rows, tokenizer, special_tokens(tokenizer), render))
    if not is_text and any(answer.trained is not None for one in encoded for answer in one.answers):
        raise DataError("an answer has several messages, and a sampled one has one: give each answer as one message")
    prompts = [
        Prompt(row, record["prompt"], one.prompt, record["answer"], one.answers[0].ids if has_answers else [])
        for row, record, one in zip(rows, records, encoded, strict=True)
    ]
    empty = next((prompt.number for prompt in prompts if not prompt.ids), None)
    if empty is not None:
        raise DataError(f"prompt {empty} has no tokens, so there is nothing to generate from: take it out")
    kept = [prompt for prompt in prompts if max_prompt_tokens is None or len(prompt.ids) <= max_prompt_tokens]
    if not kept:
        raise DataError(f"no prompt is left: all {len(prompts)} have more than {max_prompt_tokens} tokens")
    if len(kept) < len(prompts):
        logger.warning(
            f"{len(prompts) - len(kept)} of {len(prompts)} prompts are left out: they have more than "
            f"{max_prompt_tokens} tokens, and leave no room for the new ones."
        )
    return kept
