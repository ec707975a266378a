"""Records of feedback or pairs, read from files or ``datasets`` and checked one by one."""

import hashlib
import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets
from datasets.exceptions import DatasetGenerationError

BUNDLED = Path(__file__).with_name("feedback.jsonl")
UNPAIRED, PAIRED = ("prompt", "completion", "label"), ("prompt", "chosen", "rejected")
RENDERED = ("tools", "chat_template_kwargs")  # what a chat template would render too; without it the text is another
CACHE_FORMAT = 4  # part of every cache's key: raise it when the same input gives other rows
MESSAGE = {"role": Value("string"), "content": Value("string")}
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


def _digest(*parts: Any) -> str:
    text = json.dumps([CACHE_FORMAT, *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
