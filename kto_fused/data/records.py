"""Records of feedback or pairs, read from files or ``datasets`` and checked one by one."""

import codecs
import functools
import hashlib
import json
import logging
import os
import reprlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value, concatenate_datasets

from . import cache

logger = logging.getLogger(__name__)

BUNDLED = Path(__file__).with_name("feedback.jsonl")
UNPAIRED, PAIRED = ("prompt", "completion", "label"), ("prompt", "chosen", "rejected")
# what a model or a chat template would be given too: without it the rest of the record means something else
UNSUPPORTED = ("images", "image", "audio", "audios", "video", "videos", "tools", "chat_template_kwargs")
# bytes of a line of JSON, and characters of a record of a table: some four million tokens, far beyond what any model
# reads, while JSON and tokenizers still take it in a second or two
MAX_RECORD = 16 * 2**20
ROWS_AT_A_TIME = 1000
CACHE_FORMAT = 5  # part of every cache's key: raise it when the same input gives other rows
MESSAGE = {"role": Value("string"), "content": Value("string")}
# names that other data sets give to the fields
ALIASES = {
    "prompt": ("instruction", "question", "query", "input"),
    "completion": ("response", "answer", "output", "generation"),
    "label": ("score", "rating", "thumbs", "desirable", "is_desirable"),
    "chosen": ("chosen_response", "response_chosen", "preferred", "accepted"),
    "rejected": ("rejected_response", "response_rejected", "dispreferred"),
}
COMPRESSED = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"PK\3\4": ".zip", b"(\xb5/\xfd": ".zst"}
ARRAY = "got a JSON array: write one record a line (for example with jq -c '.[]' data.json > data.jsonl)"
ONE_LINE = "write each record on one line (for example with jq -c . data.json > data.jsonl)"
_UNREADABLE = (OSError, ValueError, pa.ArrowException, NotImplementedError, RecursionError)
Source = Dataset | str | os.PathLike | list[str | os.PathLike]


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the line (from 1) or row (from 0), and the field."""


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

    Files are read once and then found in a cache, until they change. All records must be of one form. Other columns
    are ignored, and a warning names them; those of ``UNSUPPORTED`` must hold nothing.

    Returns:
        ``prompt``, ``completion``, ``label`` (bool), or ``prompt``, ``chosen``, ``rejected``.

    Raises:
        DataError: a source that cannot be read, or a record that is not as the module says.
    """
    if isinstance(source, Dataset):
        return _checked_dataset(source, "dataset")
    paths = [source] if isinstance(source, (str, os.PathLike)) else source
    if not (isinstance(paths, list) and paths and all(isinstance(path, (str, os.PathLike)) for path in paths)):
        raise DataError(f"dataset: {_other_source(source)}")
    parts = [_read(Path(path)) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if part.features != parts[0].features:
            forms = [_form(records[0], str(path)) for records in (part, parts[0])]
            raise DataError(f"{path}: holds {forms[0]}, but {paths[0]} holds {forms[1]}: expected one form")
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _other_source(source: Any) -> str:
    """What is wrong with a source that is neither a ``Dataset`` nor files, and the way out."""
    kind = type(source).__name__
    if isinstance(source, Mapping):
        if all(isinstance(split, (Dataset, IterableDataset)) for split in source.values()):
            return f"got {kind} of the splits {list(source)}, expected one of them"
        return f"got {kind} with the keys {_names(source)}: make a Dataset of its columns with Dataset.from_dict"
    expected = "expected a Dataset that does not stream, a path or a list of paths"
    if isinstance(source, list) and source and all(isinstance(record, Mapping) for record in source):
        return f"{expected}, got a list of {len(source)} records: make a Dataset of them with Dataset.from_list"
    if isinstance(source, IterableDataset):
        return f"{expected}, got {kind}: load it without streaming=True"
    if isinstance(source, tuple):
        return f"{expected}, got {_short(source)}: make it a list"
    if kind == "DataFrame":
        return f"{expected}, got a DataFrame: make a Dataset of it with Dataset.from_pandas"
    return f"{expected}, got {_short(source)}"


def _read(path: Path) -> Dataset:
    _check_file_type(path)
    write = _write_parquet if path.suffix == ".parquet" else _write_lines
    kind = "parquet" if path.suffix == ".parquet" else "lines"
    try:
        content = cache.checksum(path)
        write = partial(write, path=path, content=content)
        records, notes = cache.stored(_digest(kind, content), write, str(path))
    except DataError:
        raise
    except _UNREADABLE as error:
        is_own = isinstance(error, OSError) and error.filename is None  # its number would say nothing more
        reason = (is_own and error.strerror) or error or type(error).__name__
        raise DataError(f"{path}: cannot be read: {reason}") from error
    _warn_of_ignored(str(path), content, tuple(notes["ignored"]))
    return records


def _check_file_type(path: Path) -> None:
    expected = f"{path}: expected a .jsonl, .json or .parquet file"
    if path.is_dir():
        raise DataError(f"{expected}, got a folder: name the files in it")
    if path.suffix in (".jsonl", ".json", ".parquet"):
        return
    got = f"got {path.suffix or 'no file type'!r}"
    if path.suffix in (".csv", ".tsv"):
        way_out = 'read it with datasets.load_dataset("csv", data_files=...) and write it with to_json("data.jsonl")'
    elif path.suffix in COMPRESSED.values():
        way_out = "unpack it first"
    elif path.suffix == ".arrow":
        way_out = "give Dataset.from_file of it, or write that with to_parquet"
    elif not path.suffix and not path.exists():
        way_out = "a data set of the Hub is loaded with datasets.load_dataset, and its split given as a Dataset"
    else:
        way_out = "write one record a line as JSON"
    raise DataError(f"{expected}, {got}: {way_out}")


def _check_unchanged(path: Path, before: str, now: str) -> None:
    if now != before:
        raise DataError(f"{path}: changed while it was read: start again when nothing writes to it any more")


def _write_lines(folder: Path, *, path: Path, content: str) -> dict[str, Any]:
    """The checked records of a file of JSON lines, as Arrow in ``folder``."""
    now = xxhash.xxh3_128()
    with path.open("rb") as file:
        try:
            ignored = _write_records(folder, _json_lines(path, file, now), path)
        except DataError:
            while chunk := file.read(2**20):
                now.update(chunk)
            _check_unchanged(path, content, now.hexdigest())  # a line that is only half written is not at fault
            raise
    _check_unchanged(path, content, now.hexdigest())
    return {"ignored": ignored}


def _json_lines(path: Path, file: BinaryIO, content) -> Iterator[tuple[str, Any]]:
    """Where each record stands, and the record; blank lines are skipped. The hash ``content`` is given all bytes."""
    first = True
    for number in count(1):  # bytes end a line at \n alone: JSON strings may hold other line separators
        line = file.readline(MAX_RECORD + 2)
        content.update(line)
        if not line:
            return
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        if first and (other := _other_format(line)):
            raise DataError(f"{where}: expected one record in JSON, got {other}")
        if len(line) > MAX_RECORD and len(line.rstrip(b"\r\n")) > MAX_RECORD:
            if first and _is_array(line):
                raise DataError(f"{where}: expected one record in JSON, {ARRAY}")
            raise DataError(f"{where}: longer than the {MAX_RECORD} bytes that one record may have")
        try:
            record = json.loads(
                line.decode("utf-8-sig" if number == 1 else "utf-8"), object_pairs_hook=_object_without_duplicates
            )
        except _DuplicateKeyError as error:
            raise DataError(f"{where}: the key {error} is given twice in one object: take one out") from None
        except RecursionError:
            raise DataError(f"{where}: expected one record in JSON, got brackets that are nested too deeply") from None
        except ValueError as error:
            reason = _other_json(line, error) if first else None
            reason = reason or f"got {_short(line)}: {error}"
            raise DataError(f"{where}: expected one record in JSON, {reason}") from error
        if first and isinstance(record, list):
            raise DataError(f"{where}: expected one record in JSON, {ARRAY}")
        first = False
        yield where, record


class _DuplicateKeyError(ValueError):
    """The key that stands twice in an object of JSON."""


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateKeyError(reprlib.repr(next(key for key, _ in pairs if key in seen or seen.add(key))))
    return found


def _other_format(line: bytes) -> str | None:
    """What a file holds that is no JSON in UTF-8, by its first bytes."""
    for begin, suffix in COMPRESSED.items():
        if line.startswith(begin):
            return f"compressed data ({suffix}): unpack the file first"
    if line.startswith(b"PAR1"):
        return "the content of a Parquet file: end the file's name in .parquet"
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in line[:4]:
        return "text in UTF-16 or UTF-32: save it in UTF-8 (for example with iconv -f UTF-16 -t UTF-8)"
    if line.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself: fetch it with git lfs pull"
    return None


def _is_array(line: bytes) -> bool:
    return line[:100].removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _other_json(line: bytes, error: ValueError) -> str | None:
    """What a file holds that is JSON, but not one record a line, by its first line and the parser's error."""
    if _is_array(line):
        return ARRAY
    if line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{") and isinstance(error, json.JSONDecodeError):
        if error.pos >= len(line.decode("utf-8-sig").rstrip()):
            return f"got an object that goes on after the line: {ONE_LINE}"
        if error.msg == "Extra data":
            return "got more than one object on the line: begin a new line after each"
    return None


def _write_records(folder: Path, records: Iterator[tuple[str, Any]], path: Path) -> list[str]:
    """Checks the records and writes them as Arrow; returns the ignored columns of all of them."""
    first = next(records, None)
    if first is None:
        raise DataError(f"{path}: holds no records")
    form = _form(first[1], first[0])
    schema = form.features.arrow_schema
    ignored: dict[str, None] = {}  # a set that keeps the order

    def checked() -> Iterator[dict[str, Any]]:
        for where, record in chain([first], records):
            yield _checked(record, form, where)
            ignored.update(dict.fromkeys(_ignored(record, form)))

    rows = checked()
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while batch := _next_rows(rows):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    return list(ignored)


def _next_rows(records: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many rows as one batch takes: an Arrow column of strings holds less than 2**31 bytes."""
    rows, characters = [], 0
    for record in records:
        rows.append(record)
        characters += _characters(record)
        if len(rows) == ROWS_AT_A_TIME or characters > 8 * MAX_RECORD:
            break
    return rows


def _characters(record: dict[str, Any]) -> int:
    """Characters of the texts of a checked record."""
    texts = [value for value in record.values() if not isinstance(value, bool)]
    return sum(
        len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text) for text in texts
    )


def _write_parquet(folder: Path, *, path: Path, content: str) -> dict[str, Any]:
    """The checked records of a Parquet file, as Arrow in ``folder``.

    A copy of the file is read, so that what is read is what was hashed.
    """
    copy = folder / "copy.parquet"
    shutil.copyfile(path, copy)
    _check_unchanged(path, content, cache.checksum(copy))
    try:
        with pq.ParquetFile(copy) as file:
            schema = file.schema_arrow
            _check_columns(schema, str(path))
            form = _form(dict.fromkeys(schema.names), f"{path}, row 0")  # names all columns where one is missing
            if "label" in form.fields:
                _check_described_label(schema, str(path))
            unsupported = [name for name in schema.names if name in UNSUPPORTED]
            if unsupported:
                _check_unsupported(file.iter_batches(100, columns=unsupported), str(path))
            _write_records(folder, _parquet_records(file, form.fields, path), path)
    finally:
        copy.unlink()
    return {"ignored": _ignored(schema.names, form)}


def _parquet_records(file: pq.ParquetFile, fields: tuple[str, ...], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    row = 0
    for batch in file.iter_batches(ROWS_AT_A_TIME, columns=list(fields)):
        table = pa.table([_plain(batch.column(field)) for field in fields], names=list(fields))
        for record in Dataset(table, fingerprint="batch"):  # decodes what datasets stores as another type
            yield f"{path}, row {row}", record
            row += 1


def _plain(column: pa.Array) -> pa.Array:
    """A column of repeated values (a pandas category) as the values."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _check_columns(schema: pa.Schema, where: str) -> None:
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise DataError(f"{where}: has more than one column of the name {_names(twice)}: take one out, or rename it")


def _check_described_label(schema: pa.Schema, where: str) -> None:
    """What ``datasets`` wrote beside the columns says which classes the numbers in ``label`` stand for."""
    written = (schema.metadata or {}).get(b"huggingface")
    if written is None or not pa.types.is_integer(schema.field("label").type):
        return
    try:
        label = json.loads(written)
        for key in ("info", "features", "label"):
            if not isinstance(label, dict):
                raise ValueError(f"expected an object around {key!r}, got {_short(label)}")
            label = label.get(key, {})
        if not isinstance(label, dict):
            raise ValueError(f"expected an object for 'label', got {_short(label)}")
        names = label.get("names") if label.get("_type") == "ClassLabel" else None
        if label.get("_type") == "ClassLabel" and not isinstance(names, list):
            raise ValueError(f"expected a list of class names, got {_short(names)}")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}, field 'label': holds numbers, and the metadata that datasets wrote about them ('huggingface') "
            f"cannot be read: {str(error)[:200]}: write the label as true or false"
        ) from error
    if names is not None:
        _check_label_classes(names, where)


def _checked_dataset(dataset: Dataset, name: str) -> Dataset:
    """The columns that count, each row looked at; converted (and cached) where their types are others."""
    if len(dataset) == 0:
        raise DataError(f"{name}: holds no records")
    if dataset.format["type"] == "custom":
        raise DataError(f"{name}: has a transform of its own (set_transform), which is not applied here: use map")
    dataset = _stamped(dataset.with_format(None))
    _check_columns(dataset.data.schema, name)
    form = _form(dict.fromkeys(dataset.column_names), f"{name}, row 0")
    if "label" in form.fields and isinstance(dataset.features["label"], ClassLabel):
        _check_label_classes(dataset.features["label"].names, name)
    unsupported = [field for field in dataset.column_names if field in UNSUPPORTED]
    if unsupported:  # as Arrow: images are looked for, not decoded
        _check_unsupported(dataset.select_columns(unsupported).with_format("arrow").iter(100), name)
    ignored = _ignored(dataset.column_names, form)
    dataset = dataset.select_columns(list(form.fields))
    form = _Form(form.fields, isinstance(dataset[0]["prompt"], list))
    batches = dataset.iter(ROWS_AT_A_TIME)
    rows = chain.from_iterable(zip(*(batch[field] for field in form.fields), strict=True) for batch in batches)
    for row, values in enumerate(rows):
        _checked(dict(zip(form.fields, values, strict=True)), form, f"{name}, row {row}")
    if ignored:
        logger.warning(_ignored_sentence(name, ignored))
    if dataset.features == form.features:
        return dataset
    return cache.mapped(
        dataset,
        partial(_checked, form=form, where=name),
        key=_digest("converted", dataset._fingerprint, form),
        features=form.features,
        desc="Converting columns",
    )


def _stamped(dataset: Dataset) -> Dataset:
    """``dataset`` with a fingerprint that also covers the size and time of its files.

    ``load_from_disk`` gives the fingerprint that was saved, even after the files were changed.
    """
    files = [Path(file["filename"]) for file in dataset.cache_files]
    if files:
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
        dataset._fingerprint = _digest("dataset", dataset._fingerprint, stats)
    return dataset


def _ignored(columns: Iterable[str], form: _Form) -> list[str]:
    return [name for name in columns if name not in form.fields and name not in UNSUPPORTED]


@functools.cache  # load() is called for one file several times: to check it, and to train on it
def _warn_of_ignored(where: str, content: str, names: tuple[str, ...]) -> None:
    if names:
        logger.warning(_ignored_sentence(where, names))


def _ignored_sentence(where: str, names: Iterable[str]) -> str:
    return f"{where}: these columns are ignored, training does not use them: {_names(names, 1000)}"


def _check_unsupported(batches: Iterable[pa.RecordBatch | pa.Table], where: str) -> None:
    """Refuses tables whose columns, all of ``UNSUPPORTED``, hold anything."""
    start = 0
    for batch in batches:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if column.null_count == len(column):
                continue
            for row, value in enumerate(column, start):
                if _has_content(value.as_py()):
                    raise DataError(f"{where}, row {row}, {_unsupported(name)}")
        start += batch.num_rows


def _unsupported(field: str) -> str:
    return (
        f"field {field!r}: not supported, expected texts or conversations alone: take out the records that need it, "
        "or the column if they do not"
    )


def _has_content(value: Any) -> bool:
    """Whether anything but nulls, empty texts and empty lists stands in ``value``."""
    values = [value]
    while values:  # no recursion: lists of JSON may be nested as deeply as Python goes
        value = values.pop()
        if isinstance(value, (dict, list, tuple)):
            values.extend(value.values() if isinstance(value, dict) else value)
        elif value is not None and not (isinstance(value, (str, bytes)) and not value):
            return True
    return False


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
            raise DataError(f"{where}, field {field!r}: missing, {expected}, got {_names(record)}{_renaming(record)}")
    return _Form(fields, isinstance(record["prompt"], list))


def _renaming(columns: Iterable[str]) -> str:
    """The way out of columns of other names, if they are known ones."""
    columns = set(columns)
    renamed = [
        f"{alias!r} to {field!r}" for field in ALIASES.keys() - columns for alias in ALIASES[field] if alias in columns
    ]
    if renamed:
        return f": rename {', '.join(sorted(renamed))} if it holds that"
    if "messages" in columns:
        return ": give the last message of 'messages' as 'completion' and those before it as 'prompt'"
    if {"chosen", "rejected"} <= columns:
        return ": give what 'chosen' and 'rejected' begin with in common as 'prompt' (trl.extract_prompt does)"
    return ""


def _checked(record: Any, form: _Form, where: str) -> dict[str, Any]:
    """The fields of ``form``, once each holds what it should."""
    own = _form(record, where)
    if own != form:
        raise DataError(f"{where}: holds {own}, expected {form} as in the first record")
    for field in UNSUPPORTED:
        if field in record and _has_content(record[field]):
            raise DataError(f"{where}, {_unsupported(field)}")
    checked: dict[str, Any] = {}
    for field in form.fields:
        value, here = record[field], f"{where}, field {field!r}"
        if field == "label":
            if not isinstance(value, int) or value not in (0, 1):  # a bool is an int
                raise DataError(f"{here}: expected true, false, 1 or 0, got {_short(value)}")
            checked[field] = bool(value)
            continue
        if isinstance(value, (str, list)) and isinstance(value, list) != form.conversational:
            raise DataError(_mixed(value, form, field, here))
        checked[field] = _messages(value, here) if form.conversational else _text(value, here)
        if form.conversational and field != "prompt" and (first := checked[field][0]["role"]) in ("system", "user"):
            raise DataError(f"{here}: expected the answer alone, got messages that begin with the {first}'s")
        texts = [message["content"] for message in checked[field]] if form.conversational else [checked[field]]
        if field != "prompt" and not any(texts):
            raise DataError(f"{here}: expected text, got an empty completion")
    if (characters := _characters(checked)) > MAX_RECORD:
        raise DataError(f"{where}: holds {characters} characters, more than the {MAX_RECORD} that one record may have")
    return checked


def _mixed(value: str | list, form: _Form, field: str, here: str) -> str:
    """What to do about a prompt of text with an answer of messages, or the reverse."""
    if form.conversational:
        expected = f"expected a list of messages, got {_short(value)}"
        advice = f'[{{"role": "assistant", "content": ...}}] as {field!r}, or the prompt as a string too'
    else:
        expected = f"expected a string, got {_short(value)}"
        advice = f'[{{"role": "user", "content": ...}}] as \'prompt\', or {field!r} as a string too'
    kind = "messages" if form.conversational else "a string"
    return f"{here}: {expected}, though the prompt is {kind}: give {advice}"


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


def _names(names: Iterable[Any], at_most: int = 20) -> str:
    """The names as a list in text, the first ``at_most`` of them."""
    names = list(names)
    shown = ", ".join(reprlib.repr(name) for name in names[:at_most])
    return f"[{shown}, and {len(names) - at_most} more]" if len(names) > at_most else f"[{shown}]"


def _digest(*parts: Any) -> str:
    text = json.dumps([CACHE_FORMAT, *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
