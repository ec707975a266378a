"""Read records of feedback, pairs or demonstrations from files or ``datasets``, and check each of them.

``load`` is the entry. A file of JSON lines or a Parquet file is read, checked and written to the cache as Arrow; the
next call finds it there by the checksum of its bytes. A ``Dataset`` is checked in place, and converted if its columns
have other types.
"""

import codecs
import functools
import json
import logging
import os
import reprlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datasets import ClassLabel, Dataset, IterableDataset, concatenate_datasets

from . import cache
from .form import (
    MAX_RECORD,
    PREFERENCES,
    UNSUPPORTED,
    DataError,
    Form,
    Forms,
    characters,
    check_label_classes,
    checked_record,
    form_of,
    has_content,
    names,
    short,
    unsupported,
)

logger = logging.getLogger(__name__)

BUNDLED = Path(__file__).with_name("feedback.jsonl")
ROWS_AT_A_TIME = 1000
COMPRESSED = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"PK\3\4": ".zip", b"(\xb5/\xfd": ".zst"}
ARRAY = "got a JSON array: write one record per line (for example with jq -c '.[]' data.json > data.jsonl)"
ONE_LINE = "write each record on one line (for example with jq -c . data.json > data.jsonl)"
_UNREADABLE = (OSError, ValueError, pa.ArrowException, NotImplementedError, RecursionError)
Source = Dataset | str | os.PathLike | list[str | os.PathLike]


def load(source: Source, forms: Forms = PREFERENCES) -> Dataset:
    """Return every record of a ``Dataset``, or of ``.jsonl``, ``.json`` (one record per line) or ``.parquet`` files.

    Files are read once; later calls find them in a cache until they change. All records must have one form. Other
    columns are ignored, and a warning names them. Columns of ``UNSUPPORTED`` must be empty.

    Args:
        source: a ``Dataset``, a path, or a list of paths.
        forms: the fields that a record may have, one of the constants of ``form``. Preferences: ``prompt``,
            ``completion``, ``label``, or ``prompt``, ``chosen``, ``rejected``. Demonstrations: ``prompt``,
            ``completion``, or ``text``, or ``messages``. Comparisons: ``prompt``, ``chosen``, ``rejected``. Preferences
            and comparisons may have a ``weight``, comparisons also a ``margin``.

    Returns:
        A dataset with the fields of one of the forms. A label is a bool, a weight or margin a float64.

    Raises:
        DataError: a source cannot be read, or a record has not the form that ``kto_fused.data`` describes.
    """
    if isinstance(source, Dataset):
        return _checked_dataset(source, "dataset", forms)
    paths = [source] if isinstance(source, (str, os.PathLike)) else source
    if not (isinstance(paths, list) and paths and all(isinstance(path, (str, os.PathLike)) for path in paths)):
        raise DataError(f"dataset: {_other_source(source)}")
    parts = [_read(Path(path), forms) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if part.features != parts[0].features:
            found = [form_of(records[0], str(path), forms) for records in (part, parts[0])]
            raise DataError(f"{path}: holds {found[0]}, but {paths[0]} holds {found[1]}: expected one form")
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def _other_source(source: Any) -> str:
    """Return what is wrong with a source that is neither a ``Dataset`` nor paths, and what to do."""
    kind = type(source).__name__
    if isinstance(source, Mapping):
        if all(isinstance(split, (Dataset, IterableDataset)) for split in source.values()):
            return f"got {kind} of the splits {list(source)}, expected one of them"
        return f"got {kind} with the keys {names(source)}: make a Dataset of its columns with Dataset.from_dict"
    expected = "expected a Dataset that does not stream, a path or a list of paths"
    if isinstance(source, list) and source and all(isinstance(record, Mapping) for record in source):
        return f"{expected}, got a list of {len(source)} records: make a Dataset of them with Dataset.from_list"
    if isinstance(source, IterableDataset):
        return f"{expected}, got {kind}: load it without streaming=True"
    if isinstance(source, tuple):
        return f"{expected}, got {short(source)}: make it a list"
    if kind == "DataFrame":
        return f"{expected}, got a DataFrame: make a Dataset of it with Dataset.from_pandas"
    return f"{expected}, got {short(source)}"


# ---- files ---------------------------------------------------------------------------------------------------------


def _read(path: Path, forms: Forms) -> Dataset:
    """Return the checked records of a file, from the cache if the file was read before."""
    _check_file_type(path)
    write = _write_parquet if path.suffix == ".parquet" else _write_lines
    kind = "parquet" if path.suffix == ".parquet" else "lines"
    try:
        content = cache.checksum(path)
        write = partial(write, path=path, content=content, forms=forms)
        records, notes = cache.stored(cache.digest(kind, content, forms), write, str(path))
    except DataError:
        raise
    except _UNREADABLE as error:
        is_ours = isinstance(error, OSError) and error.filename is None  # then its number adds nothing to its text
        reason = (is_ours and error.strerror) or error or type(error).__name__
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
        advice = 'read it with datasets.load_dataset("csv", data_files=...) and write it with to_json("data.jsonl")'
    elif path.suffix in COMPRESSED.values():
        advice = "unpack it first"
    elif path.suffix == ".arrow":
        advice = "give Dataset.from_file of it, or write that with to_parquet"
    elif not path.suffix and not path.exists():
        advice = "a data set of the Hub is loaded with datasets.load_dataset, and its split given as a Dataset"
    else:
        advice = "write one record per line as JSON"
    raise DataError(f"{expected}, {got}: {advice}")


def _check_unchanged(path: Path, before: str, now: str) -> None:
    if now != before:
        raise DataError(f"{path}: changed while it was read: start again when nothing writes to it any more")


def _write_records(folder: Path, records: Iterator[tuple[str, Any]], path: Path, forms: Forms) -> list[str]:
    """Check the records of the file ``path`` and write them to ``folder`` as Arrow.

    Args:
        records: pairs of where the record stands, for messages, and the record.

    Returns:
        The names of the columns that were ignored in any of them.
    """
    first = next(records, None)
    if first is None:
        raise DataError(f"{path}: holds no records")
    form = form_of(first[1], first[0], forms)
    schema = form.features.arrow_schema
    ignored: dict[str, None] = {}  # a set that keeps the order

    def checked() -> Iterator[dict[str, Any]]:
        for where, record in chain([first], records):
            yield checked_record(record, form, where)
            ignored.update(dict.fromkeys(_ignored(record, form)))

    rows = checked()
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while batch := _next_rows(rows):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    return list(ignored)


def _next_rows(records: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return as many rows as one batch takes: an Arrow column of strings holds less than 2**31 bytes."""
    rows, size = [], 0
    for record in records:
        rows.append(record)
        size += characters(record)
        if len(rows) == ROWS_AT_A_TIME or size > 8 * MAX_RECORD:
            break
    return rows


# ---- files of JSON lines -------------------------------------------------------------------------------------------


def _write_lines(folder: Path, *, path: Path, content: str, forms: Forms) -> dict[str, Any]:
    """Write the checked records of a file of JSON lines to ``folder``; return notes for the cache.

    ``content`` is the file's checksum. The bytes that are read must have the same one.
    """
    now = xxhash.xxh3_128()
    with path.open("rb") as file:
        try:
            ignored = _write_records(folder, json_lines(path, file, now), path, forms)
        except DataError:
            while chunk := file.read(2**20):
                now.update(chunk)
            _check_unchanged(path, content, now.hexdigest())  # a line may only be half written yet
            raise
    _check_unchanged(path, content, now.hexdigest())
    return {"ignored": ignored}


def json_lines(path: Path, file: BinaryIO, content) -> Iterator[tuple[str, Any]]:
    """Yield where each record stands, and the record. Skip blank lines. Update the hash ``content`` with all bytes."""
    first = True
    for number in count(1):  # bytes, because only \n ends a line: JSON strings may hold other line separators
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
            reason = reason or f"got {short(line)}: {error}"
            raise DataError(f"{where}: expected one record in JSON, {reason}") from error
        if first and isinstance(record, list):
            raise DataError(f"{where}: expected one record in JSON, {ARRAY}")
        first = False
        yield where, record


class _DuplicateKeyError(ValueError):
    """The key that stands twice in a JSON object."""


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateKeyError(reprlib.repr(next(key for key, _ in pairs if key in seen or seen.add(key))))
    return found


def _other_format(line: bytes) -> str | None:
    """Return which other format than JSON in UTF-8 a file's first bytes show, and what to do; or None."""
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
    """Return how the JSON of a file is not one record per line, by its first line and the parser's error; or None."""
    if _is_array(line):
        return ARRAY
    if line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{") and isinstance(error, json.JSONDecodeError):
        if error.pos >= len(line.decode("utf-8-sig").rstrip()):
            return f"got an object that goes on after the line: {ONE_LINE}"
        if error.msg == "Extra data":
            return "got more than one object on the line: begin a new line after each"
    return None


# ---- Parquet files -------------------------------------------------------------------------------------------------


def _write_parquet(folder: Path, *, path: Path, content: str, forms: Forms) -> dict[str, Any]:
    """Write the checked records of a Parquet file to ``folder`` as Arrow; return notes for the cache.

    ``content`` is the file's checksum. A copy of the file is read, so that the bytes that are read were checked.
    """
    copy = folder / "copy.parquet"
    shutil.copyfile(path, copy)
    _check_unchanged(path, content, cache.checksum(copy))
    try:
        with pq.ParquetFile(copy) as file:
            schema = file.schema_arrow
            _check_columns(schema, str(path))
            form = form_of(
                dict.fromkeys(schema.names), f"{path}, row 0", forms
            )  # a missing field is reported with all names
            if "label" in form.fields:
                _check_described_label(schema, str(path))
            found = [name for name in schema.names if name in UNSUPPORTED]
            if found:
                _check_unsupported(file.iter_batches(100, columns=found), str(path))
            _write_records(folder, _parquet_records(file, form.fields, path), path, forms)
    finally:
        copy.unlink()
    return {"ignored": _ignored(schema.names, form)}


def _parquet_records(file: pq.ParquetFile, fields: tuple[str, ...], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    row = 0
    for batch in file.iter_batches(ROWS_AT_A_TIME, columns=list(fields)):
        table = pa.table([_plain(batch.column(field)) for field in fields], names=list(fields))
        for record in Dataset(table, fingerprint="batch"):  # it decodes types that datasets stores as others
            yield f"{path}, row {row}", record
            row += 1


def _plain(column: pa.Array) -> pa.Array:
    """Return the values of a dictionary-encoded column (a pandas category), and any other column as it is."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _check_described_label(schema: pa.Schema, where: str) -> None:
    """Check the classes of numbered labels, which ``datasets`` describes in the file's metadata."""
    written = (schema.metadata or {}).get(b"huggingface")
    if written is None or not pa.types.is_integer(schema.field("label").type):
        return
    try:
        label = json.loads(written)
        for key in ("info", "features", "label"):
            if not isinstance(label, dict):
                raise ValueError(f"expected an object around {key!r}, got {short(label)}")
            label = label.get(key, {})
        if not isinstance(label, dict):
            raise ValueError(f"expected an object for 'label', got {short(label)}")
        classes = label.get("names") if label.get("_type") == "ClassLabel" else None
        if label.get("_type") == "ClassLabel" and not isinstance(classes, list):
            raise ValueError(f"expected a list of class names, got {short(classes)}")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}, field 'label': holds numbers, and the metadata that datasets wrote about them ('huggingface') "
            f"cannot be read: {str(error)[:200]}: write the label as true or false"
        ) from error
    if classes is not None:
        check_label_classes(classes, where)


# ---- datasets ------------------------------------------------------------------------------------------------------


def _checked_dataset(dataset: Dataset, name: str, forms: Forms) -> Dataset:
    """Return the form's columns after a check of every row, converted (and cached) if their types differ."""
    if len(dataset) == 0:
        raise DataError(f"{name}: holds no records")
    if dataset.format["type"] == "custom":
        raise DataError(f"{name}: has a transform of its own (set_transform), which is not applied here: use map")
    dataset = _stamped(dataset.with_format(None))
    _check_columns(dataset.data.schema, name)
    form = form_of(dict.fromkeys(dataset.column_names), f"{name}, row 0", forms)
    if "label" in form.fields and isinstance(dataset.features["label"], ClassLabel):
        check_label_classes(dataset.features["label"].names, name)
    found = [field for field in dataset.column_names if field in UNSUPPORTED]
    if found:  # in Arrow's format, in which images are not decoded
        _check_unsupported(dataset.select_columns(found).with_format("arrow").iter(100), name)
    ignored = _ignored(dataset.column_names, form)
    dataset = dataset.select_columns(list(form.fields))
    form = form_of(dataset[0], f"{name}, row 0", forms)
    batches = dataset.iter(ROWS_AT_A_TIME)
    rows = chain.from_iterable(zip(*(batch[field] for field in form.fields), strict=True) for batch in batches)
    for row, values in enumerate(rows):
        checked_record(dict(zip(form.fields, values, strict=True)), form, f"{name}, row {row}")
    if ignored:
        logger.warning(_ignored_sentence(name, ignored))
    if dataset.features == form.features:
        return dataset
    return cache.mapped(
        dataset,
        partial(checked_record, form=form, where=name),
        key=cache.digest("converted", dataset._fingerprint, form),
        features=form.features,
        desc="Converting columns",
    )


def _stamped(dataset: Dataset) -> Dataset:
    """Give ``dataset`` a fingerprint that also covers the size and time of its files.

    ``load_from_disk`` returns the fingerprint that was saved, even after the files were changed.
    """
    files = [Path(file["filename"]) for file in dataset.cache_files]
    if files:
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
        dataset._fingerprint = cache.digest("dataset", dataset._fingerprint, stats)
    return dataset


# ---- columns of a Parquet file or a dataset ------------------------------------------------------------------------


def _check_columns(schema: pa.Schema, where: str) -> None:
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise DataError(f"{where}: has more than one column of the name {names(twice)}: take one out, or rename it")


def _check_unsupported(batches: Iterable[pa.RecordBatch | pa.Table], where: str) -> None:
    """Raise ``DataError`` if a value of these columns, all of ``UNSUPPORTED``, holds anything."""
    start = 0
    for batch in batches:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if column.null_count == len(column):
                continue
            for row, value in enumerate(column, start):
                if has_content(value.as_py()):
                    raise DataError(f"{where}, row {row}, {unsupported(name)}")
        start += batch.num_rows


def _ignored(columns: Iterable[str], form: Form) -> list[str]:
    return [name for name in columns if name not in form.fields and name not in UNSUPPORTED]


@functools.cache  # load() is called several times for one file: to check it, and to train on it
def _warn_of_ignored(where: str, content: str, columns: tuple[str, ...]) -> None:
    if columns:
        logger.warning(_ignored_sentence(where, columns))


def _ignored_sentence(where: str, columns: Iterable[str]) -> str:
    return f"{where}: these columns are ignored, training does not use them: {names(columns, 1000)}"
