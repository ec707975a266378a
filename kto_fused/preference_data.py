"""Preference data: records read from files or ``datasets``, tokenized once, padded to batches.

Unpaired records hold ``prompt``, ``completion`` and ``label`` (true or 1: somebody liked it), paired ones ``prompt``,
``chosen`` and ``rejected``. Texts are strings, or conversations: lists of ``{"role": ..., "content": ...}``.
"""

import hashlib
import json
import logging
import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Dataset, Features, List, Value, concatenate_datasets
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from . import checks

logger = logging.getLogger(__name__)

BUNDLED = Path(__file__).with_name("data") / "feedback.jsonl"
IGNORE_INDEX = -100
UNPAIRED, PAIRED = ("prompt", "completion", "label"), ("prompt", "chosen", "rejected")
RENDERED = ("tools", "chat_template_kwargs")  # what a chat template would render too; without it the text is another
CACHE_FORMAT = 3  # part of every cache's key: raise it when the same input gives other rows
RENDERED_TO_CHECK = 100  # conversations, of which a template might leave out a part
NEIGHBOURS = 64  # completions of like length among which mismatched partners are drawn
# tokens of a prompt's messages that may change once an answer follows: one or two where a tokenizer merges across the
# border; a chat template that renders a message otherwise changes its words and what stands around them
MERGED = 2
MESSAGE = {"role": Value("string"), "content": Value("string")}
TOKENS = List(Value("int32"))
Source = Dataset | str | os.PathLike | list[str | os.PathLike]


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the line (from 1) or row (from 0), and the field."""


class Prepared(NamedTuple):
    """Tokenized examples, how many had a completion cut at ``max_length``, and how many had no completion left."""

    dataset: Dataset
    truncated: int
    dropped: int


class _Form(NamedTuple):
    """What all records of a dataset have in common."""

    fields: tuple[str, ...]
    conversational: bool

    def __str__(self) -> str:
        return f"{'paired' if self.fields == PAIRED else 'unpaired'} {'conversations' if self[1] else 'texts'}"

    @property
    def features(self) -> Features:
        text = [MESSAGE] if self.conversational else Value("string")
        return Features({field: Value("bool") if field == "label" else text for field in self.fields})


def load(source: Source) -> Dataset:
    """Every record of a ``Dataset``, or of one or more ``.jsonl``, ``.json`` (one record a line) or ``.parquet`` files.

    Files are read once and then found in the cache of ``datasets``, until they change. All records must be of one
    form; other columns are dropped, but for ``tools`` and ``chat_template_kwargs``, which are refused.

    Returns:
        ``prompt``, ``completion``, ``label`` (bool), or ``prompt``, ``chosen``, ``rejected``.

    Raises:
        DataError: a source that cannot be read, or a record that is not as the module says.
    """
    if isinstance(source, Dataset):
        return _checked_dataset(source, "dataset")
    if isinstance(source, Mapping):
        raise DataError(f"dataset: got {type(source).__name__} of the splits {list(source)}, expected one of them")
    paths = [source] if isinstance(source, (str, os.PathLike)) else source
    if not (isinstance(paths, list) and paths and all(isinstance(path, (str, os.PathLike)) for path in paths)):
        expected = "expected a Dataset that does not stream, a path or a list of paths"
        raise DataError(f"dataset: {expected}, got {_short(source)}")
    parts = [_read(Path(path)) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if part.features != parts[0].features:
            forms = [_form(records[0], str(path)) for records in (part, parts[0])]
            raise DataError(f"{path}: holds {forms[0]}, but {paths[0]} holds {forms[1]}: expected one form")
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _read(path: Path) -> Dataset:
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise DataError(f"{path}: expected a .jsonl, .json or .parquet file, got {path.suffix or 'no file type'!r}")
    try:
        content = hashlib.blake2b()
        with path.open("rb") as file:
            while chunk := file.read(2**20):
                content.update(chunk)
        if path.suffix == ".parquet":
            return _checked_dataset(_read_parquet(path, content.hexdigest()), str(path))
        where, record = next(_json_lines(path), (None, None))
        if where is None:
            raise DataError(f"{path}: holds no records")
        form = _form(record, where)
        return Dataset.from_generator(
            _checked_lines,
            features=form.features,
            gen_kwargs={"path": path, "form": form},
            fingerprint=_digest("lines", content.hexdigest()),
        )
    except DataError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: of types that ``datasets`` has no name for
        raise DataError(f"{path}: cannot be read: {error}") from error
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise DataError(f"{path}: cannot be read: {error.__cause__ or error}") from error


def _read_parquet(path: Path, content: str) -> Dataset:
    with pq.ParquetFile(path) as file:
        num_rows, schema = file.metadata.num_rows, file.schema_arrow
    if num_rows == 0:
        raise DataError(f"{path}: holds no records")
    form = _form(dict.fromkeys(schema.names), f"{path}, row 0")  # names all columns where one is missing
    described = json.loads((schema.metadata or {}).get(b"huggingface", "{}"))  # by ``datasets``, where that wrote it
    label = described.get("info", {}).get("features", {}).get("label", {})
    if "label" in form.fields and label.get("_type") == "ClassLabel":
        _check_label_classes(label["names"], str(path))
    counted = [field for field in schema if field.name in {*UNPAIRED, *PAIRED, *RENDERED}]
    return Dataset.from_generator(
        _parquet_records,
        features=Features.from_arrow_schema(pa.schema(counted)),
        gen_kwargs={"path": path, "columns": tuple(field.name for field in counted)},  # a list would be taken apart
        fingerprint=_digest("parquet", content),
    )


def _parquet_records(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(1000, columns=list(columns)):
            yield from batch.to_pylist()


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each record stands, and the record; blank lines are skipped."""
    with path.open("rb") as file:  # bytes end a line at \n alone: JSON strings may hold other line separators
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: expected one record in JSON, got {_short(line)}: {error}") from error
            yield where, record


def _checked_lines(path: Path, form: _Form) -> Iterator[dict[str, Any]]:
    for where, record in _json_lines(path):
        yield _checked(record, form, where)


def _checked_dataset(dataset: Dataset, name: str) -> Dataset:
    """The columns that count, each row looked at; converted (and cached) where their types are others."""
    if len(dataset) == 0:
        raise DataError(f"{name}: holds no records")
    if dataset.format["type"] == "custom":
        raise DataError(f"{name}: has a transform of its own (set_transform), which is not applied here: use map")
    dataset = dataset.with_format(None)
    form = _form(dataset[0], f"{name}, row 0")
    if "label" in form.fields and isinstance(dataset.features["label"], ClassLabel):
        _check_label_classes(dataset.features["label"].names, name)
    rendered = [field for field in RENDERED if field in dataset.column_names]
    columns = [*form.fields, *rendered]
    batches = dataset.select_columns(columns).iter(1000)
    rows = chain.from_iterable(zip(*(batch[column] for column in columns), strict=True) for batch in batches)
    for row, values in enumerate(rows):
        _checked(dict(zip(columns, values, strict=True)), form, f"{name}, row {row}")
    dataset = dataset.select_columns(list(form.fields))
    if dataset.features == form.features:
        return dataset
    convert = partial(_checked, form=form, where=name)
    return dataset.map(convert, features=form.features, desc="Converting columns")


def _check_label_classes(names: list[str], where: str) -> None:
    """``ClassLabel`` numbers names in whatever order they come: "desirable" before "undesirable" would be 0."""
    if [str(name).lower() for name in names] not in (["false", "true"], ["0", "1"]):
        raise DataError(
            f"{where}, field 'label': expected true or false, or classes of these names, got the classes {names}: map "
            "them to true where somebody liked the completion"
        )


def _form(record: Any, where: str) -> _Form:
    expected = "expected prompt, completion and label, or prompt, chosen and rejected"
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: {expected} in a JSON object, got {_short(record)}")
    complete = [fields for fields in (UNPAIRED, PAIRED) if all(field in record for field in fields[1:])]
    if len(complete) == 2:
        raise DataError(f"{where}: {expected}, got both")
    fields = complete[0] if complete else PAIRED if "chosen" in record or "rejected" in record else UNPAIRED
    for field in fields:
        if field not in record:
            raise DataError(f"{where}, field {field!r}: missing, {expected}, got {list(record)}")
    return _Form(fields, isinstance(record["prompt"], list))


def _checked(record: Any, form: _Form, where: str) -> dict[str, Any]:
    """The fields of ``form``, once each holds what it should."""
    own = _form(record, where)
    if own != form:
        raise DataError(f"{where}: holds {own}, expected {form} as in the first record")
    for field in RENDERED:
        if record.get(field):
            raise DataError(f"{where}, field {field!r}: not supported, expected texts or conversations alone")
    checked = {}
    for field in form.fields:
        value, here = record[field], f"{where}, field {field!r}"
        if field == "label":
            if not isinstance(value, int) or value not in (0, 1):  # a bool is an int
                raise DataError(f"{here}: expected true, false, 1 or 0, got {_short(value)}")
            checked[field] = bool(value)
            continue
        checked[field] = _messages(value, here) if form.conversational else _text(value, here)
        if form.conversational and field != "prompt" and (first := checked[field][0]["role"]) in ("system", "user"):
            raise DataError(f"{here}: expected the answer alone, got messages that begin with the {first}'s")
        texts = [message["content"] for message in checked[field]] if form.conversational else [checked[field]]
        if field != "prompt" and not any(texts):
            raise DataError(f"{here}: expected text, got an empty completion")
    return checked


def _messages(value: Any, here: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{here}: expected a list of messages, got {_short(value)}")
    messages = []
    for number, message in enumerate(value):
        one = f"{here}, message {number}"
        if not isinstance(message, dict) or not MESSAGE.keys() <= message.keys():
            raise DataError(f"{one}: expected a role and a content, got {_short(message)}")
        # a column of Arrow gives every message the keys that any message has
        if lost := [key for key, held in message.items() if key not in MESSAGE and held is not None]:
            raise DataError(f"{one}: expected a role and a content alone, got {lost} too")
        messages.append({key: _text(message[key], f"{one}, {key!r}") for key in MESSAGE})
    return messages


def _text(value: Any, here: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{here}: expected a string, got {_short(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{here}: expected text, got half a surrogate pair in {_short(value)}") from error
    return value


def _short(value: Any) -> str:
    return f"{type(value).__name__} {reprlib.repr(value)}"


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for two tokenizers that turn every text and conversation into the same tokens, wherever they were loaded.

    For caches of what was made from tokens. Tokenizers without a Rust backend are told apart by their settings too.
    """
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        for of_the_last_call in ("padding", "truncation"):
            state.pop(of_the_last_call, None)
    else:
        state = [tokenizer.get_vocab(), tokenizer.init_kwargs]
    split_special = getattr(tokenizer, "split_special_tokens", False)
    kind = type(tokenizer).__name__
    return _digest(kind, state, tokenizer.special_tokens_map, split_special, tokenizer.chat_template)


def _digest(*parts: Any) -> str:
    text = json.dumps([CACHE_FORMAT, *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def prepare_unpaired(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    mismatch: bool = True,
    needs_both_labels: bool = True,
    seed: int = 0,
    num_proc: int | None = None,
    name: str = "train",
) -> Prepared:
    """Tokens for KTO; of a pair, the chosen completion is a desirable example and the rejected one an undesirable.

    The mismatched completion, from which z0 is estimated, belongs to the example and not to its batch: any sampler,
    batch size and number of processes sees the same pairs, and the reference's log-probs of them can be kept.

    Args:
        source: what :func:`load` takes.
        tokenizer: its end-of-text token ends a plain completion; conversations need its chat template.
        max_length: tokens of prompt and completion. A longer completion is cut at its end, an example whose prompt
            leaves no room for one is dropped; both are counted and reported.
        mismatch: add ``kl_completion_ids``.
        needs_both_labels: refuse data of one label, which nothing can be learned from; evaluation may use it.
        seed: draws the partners among completions of like length.
        num_proc: processes that tokenize.
        name: what the data is called in the progress bar and in messages.

    Returns:
        A dataset of ``prompt_ids``, ``completion_ids``, ``label`` (bool), ``length`` (tokens of both), and
        ``kl_completion_ids``: the completion of another prompt, cut to what fits; empty where there is none left.

    Raises:
        DataError: bad data, a missing chat template, no example left, or none of a label that is needed.
        TypeError, ValueError: ``max_length`` is not an integer of at least 1, or None; the tokenizer is none.
    """
    tokens, truncated, dropped = _tokenized(source, tokenizer, UNPAIRED, max_length, num_proc, name)
    labels, prompts = (tokens.data.column(column).to_numpy() for column in ("label", "prompt_key"))
    for label, kind in ((True, "desirable"), (False, "undesirable")):
        if needs_both_labels and label not in labels:
            raise DataError(f"{name} data: expected desirable and undesirable examples, got no {kind} one")
    tokens = tokens.remove_columns("prompt_key")
    if not mismatch:
        return Prepared(tokens, truncated, dropped)
    completions = tokens.select_columns("completion_ids")
    lengths = pc.list_value_length(completions.data.column("completion_ids")).to_numpy()
    partners = mismatched_partners(prompts, lengths, seed)
    if alone := int((partners < 0).sum()):
        logger.warning(
            f"{name} data: {alone} of {len(tokens)} examples have no mismatched completion, "
            "because more than half of all examples share one prompt."
        )
    tokens = tokens.map(
        partial(_partner_rows, completions=completions, partners=partners, max_length=max_length),
        batched=True,
        with_indices=True,
        input_columns=["prompt_ids"],
        features=Features({**tokens.features, "kl_completion_ids": TOKENS}),
        num_proc=num_proc,
        desc=f"Mismatching {name} data",
        new_fingerprint=_digest("mismatch", tokens._fingerprint, seed, max_length),
    )
    return Prepared(tokens, truncated, dropped)


def prepare_paired(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    num_proc: int | None = None,
    name: str = "train",
) -> Prepared:
    """Tokens for DPO. Arguments as in :func:`prepare_unpaired`; a pair with one completion cut counts as truncated.

    Returns:
        A dataset of ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and ``length`` (tokens of the longer side).

    Raises:
        DataError: bad data, unpaired data, a missing chat template, or no pair left.
    """
    tokens, truncated, dropped = _tokenized(source, tokenizer, PAIRED, max_length, num_proc, name)
    return Prepared(tokens.remove_columns("prompt_key"), truncated, dropped)


def _tokenized(source, tokenizer, fields: tuple[str, ...], max_length, num_proc, name: str) -> Prepared:
    """The tokens of ``fields``, cached under all that decides them; ``prompt_key`` is equal for equal prompts."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
    if max_length is not None:
        checks.integer("max_length", max_length, at_least=1)
    records = load(source)
    if fields == PAIRED and "chosen" not in records.column_names:
        raise DataError(f"{name} data: DPO needs pairs, expected {list(PAIRED)}, got {records.column_names}")
    if records.features["prompt"] == Value("string"):
        _warn_of_ends(tokenizer, records[0]["prompt"], name)
    elif tokenizer.chat_template:
        _warn_of_lost_answers(tokenizer, records.select(range(min(len(records), RENDERED_TO_CHECK))), name)
    else:
        raise DataError(f"{name} data: holds conversations, but the tokenizer has no chat template to render them with")
    columns = {f"{field}_ids": TOKENS for field in fields if field != "label"}
    columns |= {"label": Value("bool")} if "label" in fields else {}
    columns |= {"length": Value("int32"), "prompt_key": Value("int64")}
    columns |= {"truncated": Value("bool"), "merged": Value("bool")}
    tokens = records.map(
        partial(_token_rows, columns=list(columns), tokenizer=tokenizer, max_length=max_length, name=name),
        batched=True,
        with_indices=True,
        remove_columns=records.column_names,
        features=Features(columns),
        num_proc=num_proc,
        desc=f"Tokenizing {name} data",
        new_fingerprint=_digest("tokens", fields, records._fingerprint, fingerprint(tokenizer), max_length),
    )
    total = len(records) * (2 if "label" in fields and "chosen" in records.column_names else 1)
    if len(tokens) == 0:
        raise DataError(f"{name} data: no prompt of {total} examples leaves room in max_length={max_length}")
    # counted from columns, because a second call finds the rows in the cache and tokenizes nothing
    truncated, merged = (int(tokens.data.column(column).to_numpy().sum()) for column in ("truncated", "merged"))
    dropped = total - len(tokens)
    if truncated or dropped:
        logger.warning(
            f"{name} data, max_length={max_length}: of {total} examples, {truncated} had a completion cut "
            f"and {dropped} were dropped, with no room for a completion token."
        )
    if merged:
        logger.warning(
            f"{name} data: in {merged} of {len(tokens)} examples the prompt's last tokens differ once a completion "
            "follows; the completion then starts at the first that does, and is trained with what it holds of the "
            "prompt."
        )
    return Prepared(tokens.remove_columns(["truncated", "merged"]), truncated, dropped)


def _token_rows(batch: dict, rows: list[int], *, columns: list[str], tokenizer, max_length, name: str) -> dict:
    """The columns of a batch of records: a completion starts where it leaves the tokens of the prompt alone."""
    if "label" in columns and "chosen" in batch:
        batch = {
            "prompt": [prompt for prompt in batch["prompt"] for _ in range(2)],
            "completion": list(chain.from_iterable(zip(batch["chosen"], batch["rejected"], strict=True))),
            "label": [True, False] * len(rows),
        }
        rows = [row for row in rows for _ in range(2)]
    sides = [field for field in batch if field not in ("prompt", "label")]
    is_text = isinstance(batch["prompt"][0], str)
    adds_end = is_text and _adds_end(tokenizer)
    prompts = _ids(tokenizer, batch["prompt"], rows, name, add_generation_prompt=True)
    if adds_end:
        prompts = [ids[:-1] for ids in prompts]
    texts = [
        [_joined(*pair, tokenizer, adds_end) for pair in zip(batch["prompt"], batch[side], strict=True)]
        for side in sides
    ]
    wholes = zip(*(_ids(tokenizer, text, rows, name) for text in texts), strict=True)
    labels = batch.get("label", [None] * len(rows))
    made = {column: [] for column in columns}
    for number, messages, prompt, whole, label in zip(rows, batch["prompt"], prompts, wholes, labels, strict=True):
        start = _common_prefix(prompt, whole)
        completions = [ids[start:max_length] for ids in whole]
        if not all(completions):
            continue
        if start < len(prompt) and not is_text:
            _check_template(tokenizer, messages, prompt, start, number, name)
        length = start + max(map(len, completions))
        key = hashlib.blake2b(np.array(prompt, np.int32).tobytes(), digest_size=8).digest()
        row = {"prompt_ids": prompt[:start], "label": label, "length": length}
        row |= {f"{side}_ids": ids for side, ids in zip(sides, completions, strict=True)}
        row |= {"truncated": max(map(len, whole)) > length, "merged": start < len(prompt)}
        row |= {"prompt_key": int.from_bytes(key, "big", signed=True)}
        for column in columns:
            made[column].append(row[column])
    return made


def _warn_of_ends(tokenizer, text: str, name: str) -> None:
    """Of texts that nothing ends, or that begin twice, as ``text`` does."""
    end, begin = tokenizer.eos_token, tokenizer.bos_token
    if end is None:
        logger.warning(
            f"{name} data: the tokenizer has no eos_token, so nothing ends a completion, and the model does not learn "
            "to end one: set it, or end the texts with the model's own token."
        )
    elif end not in tokenizer.convert_ids_to_tokens(tokenizer(f"a{end}")["input_ids"]):
        logger.warning(
            f"{name} data: the tokenizer does not read its eos_token {end} as a token (with split_special_tokens as "
            "text), so nothing ends a completion, and the model does not learn to end one."
        )
    begins = begin is not None and text.startswith(begin)
    if begins and tokenizer(text)["input_ids"][:2] == 2 * [tokenizer.bos_token_id]:
        logger.warning(
            f"{name} data: the texts begin with {begin}, and the tokenizer puts another before it: take it off the "
            "texts, or give conversations, which the chat template renders."
        )


def _warn_of_lost_answers(tokenizer, records: Dataset, name: str) -> None:
    """A template may leave out a part of an answer, such as what a model thought before it."""
    lost = []
    for row, record in enumerate(records):
        for side in record.keys() - {"prompt", "label"}:
            try:
                text = tokenizer.apply_chat_template(record["prompt"] + record[side], tokenize=False)
            except Exception:  # said with the row that it is of, where tokens are made
                return
            if any(message["content"].strip() not in text for message in record[side]):
                lost.append(row)
    if lost:
        logger.warning(
            f"{name} data: the chat template changes or leaves out text of the answers in {len(set(lost))} of the "
            f"first {len(records)} examples (row {lost[0]} among them), and the model is trained on what is left."
        )


def _adds_end(tokenizer) -> bool:
    """Whether the tokenizer itself ends a text with its end-of-text token."""
    # of an empty text that may be the token that begins all, of a word the one for unknown words: not of both
    return tokenizer.eos_token is not None and all(
        tokenizer(text)["input_ids"][-1:] == [tokenizer.eos_token_id] for text in ("", "a")
    )


def _joined(prompt, completion, tokenizer, adds_end: bool):
    if isinstance(prompt, list):
        return prompt + completion
    end = tokenizer.eos_token or ""
    return prompt + completion.removesuffix(end) + ("" if adds_end else end)


def _ids(tokenizer, texts: list, rows: list[int], name: str, **template) -> list[list[int]]:
    if isinstance(texts[0], str):
        return tokenizer(texts)["input_ids"]
    ids = []
    for row, messages in zip(rows, texts, strict=True):
        try:
            rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **template)
        except Exception as error:  # a template is a program of its own: it may refuse roles, or fail in any way
            raise DataError(f"{name} data, row {row}: the chat template does not render it: {error}") from error
        ids.append(rendered["input_ids"])
    return ids


def _check_template(tokenizer, messages: list, prompt: list[int], start: int, row: int, name: str) -> None:
    """Raises ``DataError`` if more than ``MERGED`` of the messages' tokens lie after ``start``, where answers start.

    What a template adds to a prompt to ask for an answer is no message's, and may be otherwise once there is one.
    """
    (alone,) = _ids(tokenizer, [messages], [row], name)
    if _common_prefix(alone, (prompt,)) - start <= MERGED:
        return
    tail = tokenizer.decode(prompt[start:])
    if len(tail) > 100:
        tail = f"{tail[:50]} ... {tail[-50:]}"
    raise DataError(
        f"{name} data, row {row}: the chat template renders the prompt differently once an answer follows, so the "
        f"completion would start {len(prompt) - start} tokens before the prompt's end, at {tail!r}: expected a "
        "template that renders messages alike whatever follows; use another one, or give prompt and completions as text"
    )


def _common_prefix(prompt: list[int], wholes: tuple[list[int], ...]) -> int:
    if all(ids[: len(prompt)] == prompt for ids in wholes):
        return len(prompt)
    return next(place for place, tokens in enumerate(zip_longest(prompt, *wholes)) if len(set(tokens)) > 1)


def mismatched_partners(prompts: np.ndarray, lengths: np.ndarray, seed: int = 0) -> np.ndarray:
    """For each example another one, whose prompt is not its own and whose completion is about as long as its own.

    No example is chosen twice. As many as can be have a partner: all, unless more than half share one prompt.

    Args:
        prompts: [N] integers, equal where prompts are.
        lengths: [N] integers, of the completions.
        seed: of the order among examples of one length, and among the prompts of neighbours.

    Returns:
        [N] int64 indices, -1 where there is no partner.
    """
    random = np.random.default_rng(seed)
    order = np.lexsort((random.permutation(len(prompts)), lengths))
    distinct, prompts = np.unique(prompts, return_inverse=True)
    prompts = random.permutation(len(distinct))[prompts]  # the order in which they are stepped through below
    partners = np.full(len(prompts), -1, dtype=np.int64)
    waiting = []  # for a partner; all of one prompt, because examples of two prompts are each other's partners
    for start in range(0, len(order), NEIGHBOURS):
        members = np.concatenate([waiting[-NEIGHBOURS:], order[start : start + NEIGHBOURS]]).astype(np.int64)
        del waiting[-NEIGHBOURS:]
        members = members[np.argsort(prompts[members], kind="stable")]
        _, first, counts = np.unique(prompts[members], return_index=True, return_counts=True)
        largest = counts.argmax()
        surplus = max(0, 2 * counts[largest] - len(members))
        alone = slice(first[largest], first[largest] + surplus)
        waiting.extend(members[alone].tolist())
        members = np.delete(members, alone)
        # they stand prompt by prompt, and no prompt is longer than this step or than the step back round the end
        partners[members] = np.roll(members, surplus - counts[largest])
    if waiting:
        # each goes between an example and its partner, where neither has its prompt: such pairs are never too few,
        # unless the prompt has more than half of all examples
        own = prompts[waiting[0]]
        hosts = order[partners[order] >= 0]
        hosts = hosts[(prompts[hosts] != own) & (prompts[partners[hosts]] != own)][: len(waiting)]
        waiting = waiting[: len(hosts)]
        partners[waiting], partners[hosts] = partners[hosts], waiting
    return partners


def _partner_rows(prompts: list, rows: list[int], *, completions: Dataset, partners: np.ndarray, max_length) -> dict:
    chosen = partners[rows]
    found = iter(completions[chosen[chosen >= 0].tolist()]["completion_ids"])
    rooms = [None if max_length is None else max_length - len(prompt) for prompt in prompts]
    return {
        "kl_completion_ids": [
            next(found)[:room] if partner >= 0 else [] for partner, room in zip(chosen, rooms, strict=True)
        ]
    }


@dataclass
class _Padding:
    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        checks.integer("pad_token_id", self.pad_token_id, at_least=0)
        if self.pad_to_multiple_of is not None:
            checks.integer("pad_to_multiple_of", self.pad_to_multiple_of, at_least=1)

    def _pad(self, prompts: list[list[int]], completions: list[list[int]]) -> dict[str, torch.Tensor]:
        tokens = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        labels = [[IGNORE_INDEX] * len(prompt) + ids for prompt, ids in zip(prompts, completions, strict=True)]
        multiple = self.pad_to_multiple_of or 1
        # never 0, which models do not take: mismatched pairs may all be empty
        width = -(-max(1, *map(len, tokens)) // multiple) * multiple

        def padded(rows: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.int64)

        return {
            "input_ids": padded(tokens, self.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in tokens], 0),
            "labels": padded(labels, IGNORE_INDEX),
        }


@dataclass
class UnpairedCollator(_Padding):
    """Examples of :func:`prepare_unpaired` as a batch, right-padded.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels`` [B, T] int64, ``desirable`` [B] bool; if the examples have
        ``kl_completion_ids``, ``kl_input_ids``, ``kl_attention_mask``, ``kl_labels`` [B, T'], a row without mismatched
        completion being its prompt with no label; if they have them, ``ref_logps`` and ``ref_kl_logps`` [B] float64.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        columns = {column: [example[column] for example in examples] for column in examples[0]}
        batch = self._pad(columns["prompt_ids"], columns["completion_ids"])
        batch["desirable"] = torch.tensor(columns["label"], dtype=torch.bool)
        if "kl_completion_ids" in columns:
            mismatched = self._pad(columns["prompt_ids"], columns["kl_completion_ids"])
            batch |= {f"kl_{name}": tensor for name, tensor in mismatched.items()}
        for name in {"ref_logps", "ref_kl_logps"} & columns.keys():
            batch[name] = torch.tensor(columns[name], dtype=torch.float64)
        return batch


@dataclass
class PairedCollator(_Padding):
    """Examples of :func:`prepare_paired` as a batch, right-padded, chosen before rejected.

    The first dimension counts pairs, so that whatever counts or splits a batch by its rows keeps pairs whole.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels`` [B, 2, T] int64; ``ref_logps`` [B, 2] float64, if the examples
        have ``ref_chosen_logps`` and ``ref_rejected_logps``.
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        prompts = [example["prompt_ids"] for example in examples for _ in range(2)]
        completions = [example[side] for example in examples for side in ("chosen_ids", "rejected_ids")]
        rows = self._pad(prompts, completions)
        batch = {name: tensor.view(len(examples), 2, -1) for name, tensor in rows.items()}
        if {"ref_chosen_logps", "ref_rejected_logps"} <= examples[0].keys():
            logps = [[example["ref_chosen_logps"], example["ref_rejected_logps"]] for example in examples]
            batch["ref_logps"] = torch.tensor(logps, dtype=torch.float64)
        return batch
