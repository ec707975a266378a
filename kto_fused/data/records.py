"""Read records of feedback, pairs or demonstrations from files or ``datasets``, and check each of them.

``load`` is the entry. A file (see ``files``) is read, brought from its layout (see ``layouts``) to one form, checked
and written to the cache as Arrow; the next call finds it there by the checksum of its bytes. A ``Dataset`` that has the
form already is checked in place.
"""

import functools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash
from datasets import ClassLabel, Dataset, IterableDataset, concatenate_datasets
from tqdm import tqdm

from . import cache, files
from .form import (
    ASSISTANT,
    MAX_RECORD,
    PREFERENCES,
    TOOLS,
    UNSUPPORTED,
    DataError,
    Form,
    Forms,
    characters,
    checked_record,
    form_of,
    names,
    short,
    without_nulls,
)
from .layouts import (
    LabelError,
    Labels,
    Layout,
    Reading,
    check_columns_suffice,
    columns_read,
    find,
    label_advice,
    label_column,
    number_columns,
    renamed,
    tools_column,
    word,
)

logger = logging.getLogger(__name__)

BUNDLED = Path(__file__).with_name("feedback.jsonl")
ROWS_AT_A_TIME = files.ROWS_AT_A_TIME
AS_IT_IS = Reading()


class Checked(NamedTuple):
    """Records that ``load`` returned, or a selection of them: ``load`` takes them as they are."""

    records: Dataset


Source = Dataset | Checked | str | os.PathLike | list[str | os.PathLike]


def load(source: Source, forms: Forms = PREFERENCES, reading: Reading = AS_IT_IS) -> Dataset:
    """Return every record of a ``Dataset``, or of files of JSON lines, JSON, CSV, TSV, Parquet or Arrow.

    Files are read once; later calls find them in a cache until they change. All records must have one form. Other
    columns are ignored, and a warning names them. Columns of ``UNSUPPORTED`` must be empty. The layouts of public data
    sets are recognised by their columns, and the log names them.

    Args:
        source: a ``Dataset``; a path of a file, also with ``.gz``, of a folder of files or of one that
            ``Dataset.save_to_disk`` wrote; a pattern such as ``"data/*.jsonl"``; a data set's name with a split, such
            as ``"owner/name:train"``; or a list of these.
        forms: the fields that a record may have, one of the constants of ``form``. Preferences: ``prompt``,
            ``completion``, ``label``, or ``prompt``, ``chosen``, ``rejected``. Demonstrations: ``prompt``,
            ``completion``, or ``text``, or ``messages``. Comparisons: ``prompt``, ``chosen``, ``rejected``. All may
            have a ``weight``, comparisons also a ``margin``, and all but texts ``tools``.
        reading: names of columns and words of labels, made by ``layouts.reading``.

    Returns:
        A dataset with the fields of one of the forms. A label is a bool, a weight or margin a float64; tools are JSON
        text, "" if there are none.

    Raises:
        DataError: a source cannot be read, or a record has not the form that ``kto_fused.data`` describes.
    """
    if isinstance(source, Checked):
        return source.records
    if isinstance(source, Dataset):
        return _checked_dataset(source, "dataset", forms, reading)
    paths = [source] if isinstance(source, (str, os.PathLike)) else source
    if not (isinstance(paths, list) and paths and all(isinstance(path, (str, os.PathLike)) for path in paths)):
        raise DataError(f"dataset: {_other_source(source)}")
    found = [(str(path), one) for path in paths for one in files.found(path)]
    parts = [
        _checked_dataset(one, name, forms, reading) if isinstance(one, Dataset) else _read(one, forms, reading)
        for name, one in found
    ]
    named = [name if isinstance(one, Dataset) else str(one) for name, one in found]
    for name, part in zip(named, parts, strict=True):
        if part.features != parts[0].features:
            kinds = [form_of(records[0], name, forms) for records in (part, parts[0])]
            raise DataError(f"{name}: holds {kinds[0]}, but {named[0]} holds {kinds[1]}: expected one form")
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)


class Split(NamedTuple):
    """Records for training and for evaluation."""

    train: Checked
    eval: Checked


def split_by_prompt(records: Dataset, fraction: float, seed: int) -> Split:
    """Return the records with ``fraction`` of the prompts (at least one) for evaluation; no prompt is on both sides.

    Which prompts these are depends on their texts and on ``seed``, not on the order of the records. Of demonstrations
    without a prompt, the text or the messages before the first answer count as the prompt.

    Raises:
        DataError: all records have one prompt, or a label that the data have is missing on the training side.
    """
    keys = prompt_keys(records, seed)
    prompts = np.unique(keys)
    if len(prompts) < 2:
        raise DataError(
            f"--eval_fraction {fraction:g} splits the data by prompt, and they have one prompt: give the records to "
            "evaluate on as --eval_data"
        )
    number = min(max(round(fraction * len(prompts)), 1), len(prompts) - 1)
    is_eval = keys < prompts[number]
    if "label" in records.column_names:
        kept = f"--eval_fraction {fraction:g} keeps {number} of {len(prompts)} prompts for evaluation"
        _check_labels(np.array(records["label"][:]), is_eval, kept)
    train, held_out = (records.select(np.flatnonzero(side)) for side in (~is_eval, is_eval))
    logger.info(
        f"{number} of {len(prompts)} prompts are kept for evaluation: {len(train)} records train, {len(held_out)} "
        "evaluate."
    )
    return Split(Checked(train), Checked(held_out))


def _check_labels(labels: np.ndarray, is_eval: np.ndarray, kept: str) -> None:
    """Refuse a split that leaves a label of the data without a record to train on; warn if none evaluates."""
    cure = "draw other prompts with --data_seed, or give the records to evaluate on as --eval_data"
    for label, kind in ((True, "desirable"), (False, "undesirable")):
        of_kind = labels == label
        if not of_kind.any():
            continue
        if not of_kind[~is_eval].any():
            raise DataError(f"{kept} and leaves no {kind} example to train on: lower --eval_fraction, {cure}")
        if not of_kind[is_eval].any():
            logger.warning(
                f"{kept}, and none of their examples is {kind}: evaluations cannot compare liked answers with disliked "
                f"ones. Raise --eval_fraction, {cure}."
            )


def prompt_keys(records: Dataset, seed: int) -> np.ndarray:
    """Return uint64s that are equal for records with equal prompts."""
    column = "prompt" if "prompt" in records.column_names else records.column_names[0]
    batches = records.select_columns(column).iter(ROWS_AT_A_TIME)
    keys = (_prompt_key(value, seed) for batch in batches for value in batch[column])
    return np.fromiter(keys, np.uint64, len(records))


def record_keys(records: Dataset) -> np.ndarray:
    """Return uint64s that are equal for equal records."""
    rows = (row for batch in records.iter(ROWS_AT_A_TIME) for row in zip(*batch.values(), strict=True))
    return np.fromiter((xxhash.xxh3_64_intdigest(repr(row).encode()) for row in rows), np.uint64, len(records))


def _prompt_key(value: Any, seed: int) -> int:
    if isinstance(value, list):
        value = list(takewhile(lambda message: message["role"] not in ASSISTANT, value)) or value
    return xxhash.xxh3_64_intdigest(repr(value).encode(), seed=seed % 2**64)


def bad_records(paths: list[str], forms: Forms = PREFERENCES, reading: Reading = AS_IT_IS) -> Iterator[DataError]:
    """Yield the error of every bad record of files, where ``load`` stops at the first one.

    A broken line of JSON is one bad record; a file that cannot be read any further gives one error.
    """
    for path in paths:
        for one in files.found(path):
            if isinstance(one, Dataset):
                errors = _errors_of(_dataset_records(one, str(path), reading), str(path), _Converted(forms, reading))
                yield from errors
                continue
            found: list[DataError] = []
            try:
                with files.opened(one, None) as file:
                    records = files.raw_records(one, file, _wanted(one, forms, reading), problem=found.append)
                    for error in _errors_of(records, str(one), _Converted(forms, reading, files.is_text_table(one))):
                        yield from found
                        found.clear()
                        yield error
            except DataError as error:
                found.append(error)
            except files.UNREADABLE as error:
                found.append(DataError(f"{one}: cannot be read: {error}"))
            yield from found


def check_first(paths: list[str], forms: Forms = PREFERENCES, reading: Reading = AS_IT_IS, at_most: int = 100) -> None:
    """Check the first ``at_most`` records of each file.

    Raises:
        DataError: a file cannot be read, or one of these records has not the form that ``kto_fused.data`` describes.
    """
    for path in paths:
        for one in files.found(path):
            if isinstance(one, Dataset):
                continue  # reading it is quick, and ``load`` checks it
            with _read_errors(one), files.opened(one, None) as file:
                records = files.raw_records(one, file, _wanted(one, forms, reading))
                converted, is_empty = _Converted(forms, reading, files.is_text_table(one)), True
                for where, record in islice(records, at_most):
                    is_empty = False
                    try:
                        converted(record, where)
                    except LabelError as error:
                        _count_labels(records, converted)
                        raise DataError(f"{error}{label_advice(converted.labels.seen)}") from error
                if is_empty:
                    raise DataError(f"{one}: holds no records")


def layouts_of(paths: list[str], forms: Forms = PREFERENCES, reading: Reading = AS_IT_IS) -> list[str]:
    """Return the names of the layouts of files, by their first records."""
    named: dict[str, None] = {}
    for path in paths:
        for one in files.found(path):
            if isinstance(one, Dataset):
                first = next(_dataset_records(one, str(path), reading))
            else:
                with files.opened(one, None) as file:
                    first = next(files.raw_records(one, file, _wanted(one, forms, reading)))
            named[find(renamed(first[1], reading, first[0]), forms).name] = None
    return list(named)


def _errors_of(records: Iterator, where: str, converted: "_Converted") -> Iterator[DataError]:
    is_empty = True
    for here, record in records:
        is_empty = False
        try:
            converted(record, here)
        except DataError as error:
            yield error
    if is_empty:
        yield DataError(f"{where}: holds no records")


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


def _wanted(path: Path, forms: Forms, reading: Reading) -> files.Wanted:
    def chosen(columns: list[str]) -> list[str]:
        check_columns_suffice(columns, forms, reading, f"{path}, row 0")
        return columns_read(columns, reading)

    return files.Wanted(
        chosen,
        number_columns(reading),
        partial(label_column, given=reading),
        tools_column(reading),
    )


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Raise a ``DataError`` in place of the errors of a file that cannot be read."""
    try:
        yield
    except DataError:
        raise
    except files.UNREADABLE as error:
        is_ours = isinstance(error, OSError) and error.filename is None  # then its number adds nothing to its text
        reason = (is_ours and error.strerror) or error or type(error).__name__
        raise DataError(f"{path}: cannot be read: {reason}") from error


def _read(path: Path, forms: Forms, reading: Reading) -> Dataset:
    """Return the checked records of a file, from the cache if the file was read before."""
    with _read_errors(path):
        content = cache.checksum(path)
        write = partial(_write_file, path=path, content=content, forms=forms, reading=reading)
        key = cache.digest(files.kind_of(path), path.suffix == ".gz", content, forms, reading[:-1])
        records, notes = cache.stored(key, write, str(path))
    _say_layout(str(path), content, notes["layout"], reading)
    _warn_of_ignored(str(path), content, tuple(notes["ignored"]))
    _warn_of_left_out(str(path), content, reading, _left_out(notes["left_out"]))
    return records


def _write_file(folder: Path, *, path: Path, content: str, forms: Forms, reading: Reading) -> dict[str, Any]:
    """Write the checked records of a file to ``folder`` as Arrow; return notes for the cache.

    ``content`` is the file's checksum. The bytes that are read must have the same one.
    """
    now, in_place = xxhash.xxh3_128(), files.is_json_lines(path)
    columns: list[str] = []
    wanted = _wanted(path, forms, reading)

    def chosen(found: list[str]) -> list[str]:
        columns.extend(found)
        return wanted.of(found)

    with files.opened(path, content, folder) as file:
        try:
            records = files.raw_records(path, file, wanted._replace(of=chosen), now)
            converted = _Converted(forms, reading, files.is_text_table(path))
            notes = _write_records(folder, records, str(path), converted, columns)
        except DataError:
            if in_place:
                while chunk := file.read(2**20):
                    now.update(chunk)
                files.check_unchanged(path, content, now.hexdigest())  # a line may only be half written yet
            raise
    if in_place:
        files.check_unchanged(path, content, now.hexdigest())
    return notes


class _Converted:
    """Brings raw records of one source to one form, that of the first one, and checks them.

    A row of a table in text has no other way to hold nothing than an empty cell. Where the answer or the label is
    empty, the result is None, and ``left_out`` counts the row.
    """

    def __init__(self, forms: Forms, reading: Reading, is_text_table: bool = False):
        self.forms, self.reading, self.labels = forms, reading, Labels(reading)
        self.is_text_table = is_text_table
        self.left_out: dict[str, list] = {}  # by field: the number of rows, and where the first one stands
        self.layout: Layout | None = None
        self.form: Form | None = None
        self.ignored: dict[str, None] = {}  # a set that keeps the order

    def __call__(self, record: Any, where: str) -> dict[str, Any] | None:
        named = renamed(record, self.reading, where)
        layout = self.layout or find(named, self.forms)
        if self.is_text_table and (field := self._empty_field(named, layout)) is not None:
            self.left_out.setdefault(field, [0, where.rpartition(", ")[2]])[0] += 1
            return None
        if isinstance(named, Mapping) and named.get("system") and "system" not in layout.columns:
            raise DataError(
                f"{where}, field 'system': holds {short(named['system'])}, but the first record has no such column: "
                "give it to every record, with null where there is none"
            )
        made = layout.convert(named, where) if isinstance(named, Mapping) else named
        form = self.form or form_of(made, where, self.forms)
        if "label" in form.fields and isinstance(made, Mapping) and "label" in made:
            made = made | {"label": self.labels(made["label"], where)}
        checked = checked_record(made, form, where)
        self.layout, self.form = layout, form
        self.note(record)
        return checked

    def _empty_field(self, named: Mapping[str, Any], layout: Layout) -> str | None:
        """Return the first field but the prompt whose cell is empty, unless this is the name of a label."""
        for field in layout.columns:
            is_named = field in ("label", "kto_tag") and "" in self.labels.known
            if field not in ("prompt", "system") and not is_named and not word(named.get(field, "-")):
                return field
        return None

    def note(self, columns: Iterable[str]) -> None:
        """Remember which columns are not used."""
        sources = {column: field for field, column in self.reading.columns}
        read = {*self.layout.columns, *self.form.fields, *UNSUPPORTED, TOOLS}
        replaced = {field for field, column in self.reading.columns if field != column}
        for name in columns:
            if sources.get(name, name) not in read or (name in replaced and name not in sources):
                self.ignored[name] = None


def _write_records(
    folder: Path,
    records: Iterator[tuple[str, Any]],
    where: str,
    converted: _Converted,
    columns: list[str],
) -> dict[str, Any]:
    """Check the records of the source ``where`` and write them to ``folder`` as Arrow.

    Args:
        records: pairs of where the record stands, for messages, and the record.
        columns: all columns of a table, also those that are not read.

    Returns:
        The notes of the cache: the layout, the names of the columns that were ignored in any record, and the rows that
        were left out.
    """
    first = next(records, None)
    if first is None:
        raise DataError(f"{where}: holds no records")
    records = chain([first], records)
    progress = tqdm(records, desc=f"Reading {os.path.basename(where)}", unit=" records", delay=5, disable=None)

    def checked() -> Iterator[dict[str, Any]]:
        for here, record in progress:
            try:
                made = converted(record, here)
            except LabelError as error:
                _count_labels(records, converted)
                raise DataError(f"{error}{label_advice(converted.labels.seen)}") from error
            if made is not None:
                yield made

    rows = checked()
    batch = _next_rows(rows)
    if not batch:
        raise DataError(f"{where}: holds no records: {_left_out(converted.left_out)}")
    schema = converted.form.features.arrow_schema
    with pa.OSFile(str(folder / "data.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while batch:
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
            batch = _next_rows(rows)
    converted.note(columns)
    return {"ignored": list(converted.ignored), "layout": converted.layout.name, "left_out": converted.left_out}


def _count_labels(records: Iterator, converted: _Converted) -> None:
    """Count the labels of the records that are left, for a message."""
    for _, one in records:
        if isinstance(one, Mapping):
            named = {field: one.get(column) for field, column in converted.reading.columns} | dict(one)
            label = named.get("label", named.get("kto_tag"))
            if not (converted.is_text_table and label == ""):
                converted.labels.count(label)


def _next_rows(records: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return as many rows as one batch takes: an Arrow column of strings holds less than 2**31 bytes."""
    rows, size = [], 0
    for record in records:
        rows.append(record)
        size += characters(record)
        if len(rows) == ROWS_AT_A_TIME or size > 8 * MAX_RECORD:
            break
    return rows


# ---- datasets ------------------------------------------------------------------------------------------------------


def _checked_dataset(dataset: Dataset, name: str, forms: Forms, reading: Reading) -> Dataset:
    """Return the records of a ``Dataset``. One that has a form already is checked in place; any other is converted."""
    if len(dataset) == 0:
        raise DataError(f"{name}: holds no records")
    if dataset.format["type"] == "custom":
        raise DataError(f"{name}: has a transform of its own (set_transform), which is not applied here: use map")
    dataset = _stamped(dataset.with_format(None))
    columns = dataset.column_names
    files.check_columns(dataset.data.schema.names, name)
    check_columns_suffice(columns, forms, reading, f"{name}, row 0")
    found = [field for field in columns if field in UNSUPPORTED]
    if found:  # in Arrow's format, in which images are not decoded
        files.check_unsupported(dataset.select_columns(found).with_format("arrow").iter(100), name)
    read = dataset.select_columns(columns_read(columns, reading))
    converted = _Converted(forms, reading)
    first = next(_dataset_records(read.select([0]), name, reading))[1]
    with suppress(LabelError):  # raised again below, with the labels of all records
        converted(first, f"{name}, row 0")
        converted.note(columns)
    if converted.form is not None and first.keys() >= {*converted.form.fields} and not reading.columns:
        in_place = read.select_columns(list(converted.form.fields))
        if in_place.features == converted.form.features and converted.layout.columns == converted.form.fields:
            for where, record in _dataset_records(in_place, name, reading):
                checked_record(record, converted.form, where)
            if converted.ignored:
                logger.warning(_ignored_sentence(name, converted.ignored))
            return in_place
    write = partial(_write_dataset, dataset=read, name=name, forms=forms, reading=reading, columns=columns)
    key = cache.digest("converted", dataset._fingerprint, forms, reading[:-1])
    records, notes = (cache.stored if dataset.cache_files else cache.temporary)(key, write, name)
    _say_layout(name, key, notes["layout"], reading)
    if notes["ignored"]:
        logger.warning(_ignored_sentence(name, notes["ignored"]))
    return records


def _write_dataset(folder: Path, *, dataset: Dataset, name: str, columns: list[str], forms: Forms, reading: Reading):
    records = _dataset_records(dataset, name, reading)
    return _write_records(folder, records, name, _Converted(forms, reading), columns)


def _dataset_records(dataset: Dataset, name: str, reading: Reading) -> Iterator[tuple[str, dict[str, Any]]]:
    label = label_column(dataset.column_names, reading)
    feature = dataset.features[label] if label is not None else None
    classes = feature.names if isinstance(feature, ClassLabel) else None
    tools, row = tools_column(reading), 0
    for batch in dataset.iter(ROWS_AT_A_TIME):
        for values in zip(*batch.values(), strict=True):
            record = dict(zip(batch, values, strict=True))
            if classes is not None:
                record[label] = files.class_name(record[label], classes)
            if tools in record:
                record[tools] = without_nulls(record[tools])
            yield f"{name}, row {row}", record
            row += 1


def _stamped(dataset: Dataset) -> Dataset:
    """Give ``dataset`` a fingerprint that also covers the size and time of its files.

    ``load_from_disk`` returns the fingerprint that was saved, even after the files were changed.
    """
    files = [Path(file["filename"]) for file in dataset.cache_files]
    if files:
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
        dataset._fingerprint = cache.digest("dataset", dataset._fingerprint, stats)
    return dataset


# ---- messages ------------------------------------------------------------------------------------------------------


@functools.cache  # load() is called several times for one file: to check it, and to train on it
def _say_layout(where: str, content: str, layout: str, reading: Reading) -> None:
    named = "".join(f"; {field} is the column {column!r}" for field, column in reading.columns)
    logger.info(f"{where}: read as {layout}{named}.")


@functools.cache
def _warn_of_ignored(where: str, content: str, columns: tuple[str, ...]) -> None:
    if columns:
        logger.warning(_ignored_sentence(where, columns))


@functools.cache
def _warn_of_left_out(where: str, content: str, reading: Reading, left_out: str) -> None:
    if left_out:
        logger.warning(f"{where}: {left_out}.")


def _left_out(found: Mapping[str, list]) -> str:
    """Return which rows of a table in text are left out; "" if there are none."""
    listed = ", ".join(f"{field!r} in {count} (first: {first})" for field, (count, first) in found.items())
    number = sum(count for count, _ in found.values())
    return (
        f"{number} row{'s are' if number > 1 else ' is'} left out, because a cell is empty: {listed}" if found else ""
    )


def _ignored_sentence(where: str, columns: Iterable[str]) -> str:
    return f"{where}: these columns are ignored, training does not use them: {names(columns, 1000)}"
