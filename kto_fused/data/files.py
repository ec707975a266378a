"""Read raw records, one after the other, from the files that people have: JSON lines, a JSON array, CSV, TSV, Parquet
and Arrow, each also compressed with gzip.

``found`` turns paths, folders, patterns and names of data sets into files and ``Dataset``s. ``raw_records`` yields the
records of one file, and where each of them stands. No file is held in memory as a whole.
"""

import codecs
import csv
import gzip
import json
import os
import re
import reprlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from glob import has_magic, iglob
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import xxhash

from .form import MARGIN, MAX_RECORD, TOOLS, UNSUPPORTED, WEIGHT, DataError, has_content, names, short, without_nulls
from .form import unsupported as unsupported_field

if TYPE_CHECKING:  # datasets takes seconds to import, and most files are read without it
    from datasets import Dataset

ROWS_AT_A_TIME = 1000
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
EXPECTED = "expected a .jsonl, .json, .csv, .tsv, .parquet or .arrow file, also with .gz"
COMPRESSED = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"PK\3\4": ".zip", b"(\xb5/\xfd": ".zst"}
EXCEL = "in Excel, save the table as 'CSV UTF-8'"
OTHER_TYPES = {
    ".txt": "name it .csv or .tsv if it is a table, and .jsonl if each line is a record in JSON",
    **dict.fromkeys((".xlsx", ".xls", ".ods"), EXCEL),
}
ONE_LINE = "write each record on one line (for example with jq -c . data.json > data.jsonl), or all in one array"
UNREADABLE = (OSError, EOFError, ValueError, pa.ArrowException, NotImplementedError, RecursionError)
NAMED = re.compile(r"[\w.-]+(/[\w.-]+)*:([\w.-]+:)?[\w.-]+(\[[\d:%-]*\])?")  # name:split or name:configuration:split
CHUNK = 2**20
Problem = Callable[[DataError], None]


def kind_of(path: Path) -> str:
    """Return the file type of a path in lower case, such as ".csv", without a ".gz" after it."""
    return (path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix).lower()


def found(one: str | os.PathLike) -> "list[Path | Dataset]":
    """Return the files of a path, of all files below a folder or of a pattern, in the order of their names.

    A folder that ``Dataset.save_to_disk`` wrote, and a data set's name with a split (``owner/name:train``), give a
    ``Dataset``.

    Raises:
        DataError: there is no such file, or it is of another type.
    """
    path = Path(one)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return [_saved(path)]
        inside = sorted(file for file in path.rglob("*") if file.is_file() and kind_of(file) in SUFFIXES)
        if not inside:
            raise DataError(f"{path}: {EXPECTED}, got a folder without any")
        return inside
    if path.exists():
        return [_of_known_type(path)]
    one = str(path)
    if has_magic(one) and not NAMED.fullmatch(one):
        matched = sorted(map(Path, iglob(one, recursive=True)))
        if not matched:
            raise DataError(f"{one}: no file matches this pattern")
        return [_of_known_type(file) for file in matched if file.is_file()]
    if NAMED.fullmatch(one):
        return [_named(one)]
    return [_of_known_type(path)]


def _of_known_type(path: Path) -> Path:
    if kind_of(path) in SUFFIXES:
        return path
    expected, got = f"{path}: {EXPECTED}", f"got {path.suffix or 'no file type'!r}"
    if path.suffix in COMPRESSED.values():
        advice = "unpack it first" if path.suffix != ".gz" else "name the type before .gz, as in data.jsonl.gz"
    elif not path.suffix and not path.exists():
        advice = f"there is no such file; of a data set of the Hub the split is named too, as in {path}:train"
    else:
        advice = OTHER_TYPES.get(path.suffix.lower(), "write one record per line as JSON")
    raise DataError(f"{expected}, {got}: {advice}")


def _saved(folder: Path) -> "Dataset":
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except UNREADABLE as error:
        raise DataError(f"{folder}: cannot be read: {error}") from error
    if isinstance(saved, datasets.DatasetDict):
        raise DataError(f"{folder}: holds the splits {list(saved)}: name the folder of one, such as {folder / 'train'}")
    return saved


def _named(name: str) -> "Dataset":
    import datasets

    path, *configuration, split = name.split(":") if "[" not in name else _parts_of_slice(name)
    try:
        return datasets.load_dataset(path, *configuration, split=split)
    except Exception as error:  # the Hub, the network and a data set's files can fail in any way
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{name}: the data set cannot be loaded: {reason or type(error).__name__}") from error


def _parts_of_slice(name: str) -> list[str]:
    """Return the parts of ``name:train[:100]``, whose slice holds a colon too."""
    before, bracket, part = name.partition("[")
    *first, split = before.split(":")
    return [*first, split + bracket + part]


# ---- one file ------------------------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """The columns of a table that are read; the names of the columns decide (a table may hold large other ones)."""

    of: Callable[[list[str]], list[str]] = list
    numbers: frozenset[str] = frozenset((WEIGHT, MARGIN))  # columns of a CSV file that hold numbers
    has_label: Callable[[list[str]], str | None] = lambda columns: None  # the column that holds the label
    tools: str = TOOLS  # the column that holds tools


EVERYTHING = Wanted()


@contextmanager
def opened(path: Path, content: str | None, folder: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file, or a copy that is verified and unpacked, for ``raw_records``.

    Args:
        path: the file. Plain JSON lines are read in place.
        content: the checksum that the file's bytes must have; None for no check.
        folder: where the copy lies meanwhile; a temporary folder if not given.
    """
    if kind_of(path) == path.suffix and (content is None or _is_json_lines(path)):
        with path.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryDirectory(prefix="kto_fused_", dir=folder) as copies:
        copy, read = Path(copies) / f"copy{kind_of(path)}", xxhash.xxh3_128()
        with path.open("rb") as file, copy.open("wb") as to:
            reader = gzip.GzipFile(fileobj=_Hashed(file, read)) if path.suffix == ".gz" else _Hashed(file, read)
            shutil.copyfileobj(reader, to, CHUNK)
            while chunk := file.read(CHUNK):
                read.update(chunk)
        if content is not None:
            check_unchanged(path, content, read.hexdigest())
        with copy.open("rb") as file:
            yield file


class _Hashed:
    """A file whose bytes update a hash as they are read."""

    def __init__(self, file: BinaryIO, content: Any):
        self.file, self.content = file, content

    def read(self, size: int = -1) -> bytes:
        chunk = self.file.read(size)
        self.content.update(chunk)
        return chunk


def check_unchanged(path: Path, before: str, now: str) -> None:
    if now != before:
        raise DataError(f"{path}: changed while it was read: start again when nothing writes to it any more")


def is_text_table(path: Path) -> bool:
    """Return whether a file is a table in which every cell is text."""
    return kind_of(path) in (".csv", ".tsv")


def _is_json_lines(path: Path) -> bool:
    if kind_of(path) not in (".jsonl", ".json"):
        return False
    with path.open("rb") as file:
        return not _is_array(file.read(100))


def is_json_lines(path: Path) -> bool:
    """Return whether a file is read in place, line by line."""
    return path.suffix != ".gz" and _is_json_lines(path)


def raw_records(
    path: Path, file: BinaryIO, wanted: Wanted = EVERYTHING, content: Any = None, problem: Problem | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield where each record of a file stands, for messages, and the record.

    Args:
        path: the file's name.
        file: the file itself, or its copy, of ``opened``.
        wanted: the columns to read of a table.
        content: a hash that is updated with all bytes of JSON lines.
        problem: is called with the error of a broken line of JSON, and the next line is read. Without it the error is
            raised.
    """
    kind = kind_of(path)
    if kind in (".jsonl", ".json"):
        start = file.read(100)
        file.seek(0)
        if _is_array(start):
            yield from _array_records(path, file)
        else:
            yield from _json_lines(path, file, xxhash.xxh3_128() if content is None else content, problem)
    elif is_text_table(path):
        yield from _csv_records(path, file, wanted)
    else:
        yield from _table_records(path, file, wanted)


# ---- JSON ----------------------------------------------------------------------------------------------------------


def _json_lines(path: Path, file: BinaryIO, content: Any, problem: Problem | None) -> Iterator[tuple[str, Any]]:
    """Yield the records of a file of JSON lines. Skip blank lines. Update the hash ``content`` with all bytes."""
    first = True
    for number in count(1):  # bytes, because only \n ends a line: JSON strings may hold other line separators
        line = file.readline(MAX_RECORD + 2)
        content.update(line)
        if not line:
            return
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = _of_line(line, where, first, "utf-8-sig" if number == 1 else "utf-8")
        except DataError as error:
            if problem is None:
                raise
            problem(error)
            while not line.endswith(b"\n") and (line := file.readline(MAX_RECORD)):
                pass
            continue
        first = False
        yield where, record


def _of_line(line: bytes, where: str, first: bool, encoding: str) -> Any:
    if first and (other := _other_format(line)):
        raise DataError(f"{where}: expected one record in JSON, got {other}")
    if len(line) > MAX_RECORD and len(line.rstrip(b"\r\n")) > MAX_RECORD:
        raise DataError(f"{where}: longer than the {MAX_RECORD} bytes that one record may have")
    try:
        return json.loads(line.decode(encoding), object_pairs_hook=_object_without_duplicates)
    except _DuplicateKeyError as error:
        raise DataError(f"{where}: the key {error} is given twice in one object: take one out") from None
    except RecursionError:
        raise DataError(f"{where}: expected one record in JSON, got brackets that are nested too deeply") from None
    except ValueError as error:
        reason = _other_json(line, error) if first else None
        reason = reason or f"got {short(line)}: {error}"
        raise DataError(f"{where}: expected one record in JSON, {reason}") from error


class _DuplicateKeyError(ValueError):
    """The key that stands twice in a JSON object."""


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        raise _DuplicateKeyError(reprlib.repr(next(key for key, _ in pairs if key in seen or seen.add(key))))
    return made


def _other_format(line: bytes) -> str | None:
    """Return which other format than JSON in UTF-8 a file's first bytes show, and what to do; or None."""
    for begin, suffix in COMPRESSED.items():
        if line.startswith(begin):
            advice = "end the file's name in .gz" if suffix == ".gz" else "unpack the file first"
            return f"compressed data ({suffix}): {advice}"
    if line.startswith(b"PAR1"):
        return "the content of a Parquet file: end the file's name in .parquet"
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in line[:4]:
        return "text in UTF-16 or UTF-32: save it in UTF-8 (for example with iconv -f UTF-16 -t UTF-8)"
    if line.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself: fetch it with git lfs pull"
    return None


def _is_array(start: bytes) -> bool:
    return start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _other_json(line: bytes, error: ValueError) -> str | None:
    """Return how the JSON of a file is not one record per line, by its first line and the parser's error; or None."""
    if line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{") and isinstance(error, json.JSONDecodeError):
        if error.pos >= len(line.decode("utf-8-sig").rstrip()):
            return f"got an object that goes on after the line: {ONE_LINE}"
        if error.msg == "Extra data":
            return "got more than one object on the line: begin a new line after each"
    return None


def _array_records(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Yield the records of a JSON array; the text that is held is that of the chunk and of one record."""
    reader = codecs.getreader("utf-8-sig")(file)
    decode = json.JSONDecoder(object_pairs_hook=_object_without_duplicates).raw_decode
    text, at, is_end = reader.read(CHUNK), 0, False

    def skipped() -> str:
        """Move to the next character that is no white space; return it, or "" at the end of the file."""
        nonlocal text, at, is_end
        while True:
            at = _NO_SPACE.search(text, at).start()
            if at < len(text) or is_end:
                return text[at : at + 1]
            text, at = reader.read(CHUNK), 0
            is_end = not text

    skipped()
    at += 1  # the bracket
    for number in count():
        where = f"{path}, row {number}"
        mark = skipped()
        if mark == "]" and number == 0:
            at += 1
            break
        while True:
            try:
                record, end = decode(text, at)
                break
            except _DuplicateKeyError as error:
                raise DataError(f"{where}: the key {error} is given twice in one object: take one out") from None
            except RecursionError:
                raise DataError(f"{where}: expected a record in JSON, got brackets nested too deeply") from None
            except json.JSONDecodeError as error:
                if len(text) - at > MAX_RECORD:
                    raise DataError(
                        f"{where}: no record in JSON within the {MAX_RECORD} characters that one may have: {error.msg}"
                    ) from None
                more = "" if is_end else reader.read(CHUNK)
                is_end = not more
                if is_end:
                    raise DataError(
                        f"{where}: expected a record in JSON, got {short(text[at : at + 60])}: {error.msg}"
                    ) from None
                text, at = text[at:] + more, 0
        at = end
        yield where, record
        mark = skipped()
        at += 1
        if mark == "]":
            break
        if mark != ",":
            raise DataError(f"{where}: expected a comma or the array's end after it, got {mark or 'no more'!r}")
        text, at = (text[at:], 0) if at > CHUNK else (text, at)
    if mark := skipped():
        raise DataError(f"{path}: expected the end of the file after the array, got {mark!r}")


_NO_SPACE = re.compile(r"[^ \t\r\n]|\Z")


# ---- tables --------------------------------------------------------------------------------------------------------


def check_columns(columns: list[str], where: str) -> None:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataError(f"{where}: has more than one column of the name {names(twice)}: take one out, or rename it")


def _csv_records(path: Path, file: BinaryIO, wanted: Wanted) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of a table in text. Every cell is read as text, so that a prompt of digits stays one."""
    header = file.readline(MAX_RECORD)
    file.seek(0)
    if other := _other_format(header):
        raise DataError(f"{path}: expected text with columns, got {other}; {EXCEL}")
    if not header.strip():
        raise DataError(f"{path}: holds no records")
    try:
        columns, delimiter = _header(path, file)
        yield from _rows(path, file, wanted, columns, delimiter)
    except csv.Error as error:
        raise DataError(f"{path}: expected the names of the columns in the first line: {error}") from error
    except (UnicodeDecodeError, pa.ArrowInvalid) as error:
        if isinstance(error, pa.ArrowInvalid) and "UTF8" not in str(error):
            raise
        raise DataError(
            f"{path}: expected text in UTF-8, got another encoding ({error}): {EXCEL}, or convert the file (for "
            "example with iconv -f CP1252 -t UTF-8)"
        ) from error


def _header(path: Path, file: BinaryIO) -> tuple[list[str], str]:
    """Return the columns' names, and what separates them: the one of comma, semicolon and tab that gives most names."""
    found = []
    for delimiter in "\t" if kind_of(path) == ".tsv" else ",;\t":
        file.seek(0)  # a quoted name may hold line breaks
        lines = (line.decode("utf-8-sig") for line in iter(partial(file.readline, MAX_RECORD), b""))
        found.append((next(csv.reader(lines, delimiter=delimiter)), delimiter))
    return max(found, key=lambda one: len(one[0]))


def _rows(
    path: Path, file: BinaryIO, wanted: Wanted, columns: list[str], delimiter: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    parse = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    read = pyarrow.csv.ReadOptions(block_size=2 * MAX_RECORD, use_threads=False)
    check_columns(columns, str(path))
    chosen = wanted.of(columns)
    convert = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(columns, pa.string()), include_columns=chosen, strings_can_be_null=False
    )
    row = 0
    file.seek(0)
    with pyarrow.csv.open_csv(file, read_options=read, parse_options=parse, convert_options=convert) as reader:
        for batch in reader:
            for record in batch.to_pylist():
                where = f"{path}, row {row}"
                yield where, {name: _cell(name, text, where, wanted) for name, text in record.items()}
                row += 1


def _cell(name: str, text: str, where: str, wanted: Wanted) -> Any:
    """Return the value of a cell: a number where one belongs, a conversation where the text is one in JSON."""
    if name in wanted.numbers:
        with suppress(ValueError):
            return float(text)
    if text[:2] == "[{" and name != wanted.tools:
        with suppress(ValueError, RecursionError):
            return json.loads(text)
        if "'role'" in text or "'from'" in text:
            raise DataError(
                f"{where}, field {name!r}: expected text, or messages in JSON, got messages as Python prints them: "
                "write the column with json.dumps"
            )
    return text


def _table_records(path: Path, file: BinaryIO, wanted: Wanted) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the records of a Parquet file, or of an Arrow file of either kind (stream, file)."""
    from datasets import Dataset

    if kind_of(path) == ".parquet":
        table = pq.ParquetFile(file)
        schema, batches = table.schema_arrow, lambda columns, size: table.iter_batches(size, columns=columns)
    else:
        schema, batches = _arrow_batches(path, file)
    check_columns(schema.names, str(path))
    if held := [name for name in schema.names if name in UNSUPPORTED]:
        check_unsupported(batches(held, 100), str(path))
    chosen = wanted.of(schema.names)
    label = wanted.has_label(schema.names)
    classes = described_classes(schema, label, str(path)) if label is not None else None
    row = 0
    for batch in batches(chosen, ROWS_AT_A_TIME):
        part = pa.table([_plain(batch.column(name)) for name in chosen], names=chosen)
        for record in Dataset(part, fingerprint="batch"):  # it decodes types that datasets stores as others
            if classes is not None:
                record[label] = class_name(record[label], classes)
            if wanted.tools in record:
                record[wanted.tools] = without_nulls(record[wanted.tools])
            yield f"{path}, row {row}", record
            row += 1


def _arrow_batches(path: Path, file: BinaryIO) -> tuple[pa.Schema, Callable]:
    is_file = file.read(6) == b"ARROW1"

    def reader() -> Any:
        file.seek(0)
        return pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)

    def batches(columns: list[str], size: int) -> Iterator[pa.RecordBatch]:
        opened = reader()
        for batch in map(opened.get_batch, range(opened.num_record_batches)) if is_file else opened:
            for start in range(0, batch.num_rows, size):
                yield batch.select(columns).slice(start, size)

    return reader().schema, batches


def _plain(column: pa.Array) -> pa.Array:
    """Return the values of a dictionary-encoded column (a pandas category), and any other column as it is."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def check_unsupported(batches: Any, where: str) -> None:
    """Raise ``DataError`` if a value of these columns, all of ``UNSUPPORTED``, holds anything."""
    start = 0
    for batch in batches:
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if column.null_count == len(column):
                continue
            for row, value in enumerate(column, start):
                if has_content(value.as_py()):
                    raise DataError(f"{where}, row {row}, {unsupported_field(name)}")
        start += batch.num_rows


def class_name(value: Any, classes: list[str]) -> Any:
    """Return the name of a numbered class, and any other value as it is."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(classes)
    return classes[value] if is_number else value


def described_classes(schema: pa.Schema, label: str, where: str) -> list[str] | None:
    """Return the classes of numbered labels, which ``datasets`` describes in the file's metadata."""
    written = (schema.metadata or {}).get(b"huggingface")
    if written is None or label not in schema.names or not pa.types.is_integer(schema.field(label).type):
        return None
    try:
        described = json.loads(written)
        for key in ("info", "features", label):
            if not isinstance(described, dict):
                raise ValueError(f"expected an object around {key!r}, got {short(described)}")
            described = described.get(key, {})
        if not isinstance(described, dict):
            raise ValueError(f"expected an object for {label!r}, got {short(described)}")
        classes = described.get("names") if described.get("_type") == "ClassLabel" else None
        if described.get("_type") == "ClassLabel" and not isinstance(classes, list):
            raise ValueError(f"expected a list of class names, got {short(classes)}")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}, field {label!r}: holds numbers, and the metadata that datasets wrote about them ('huggingface') "
            f"cannot be read: {str(error)[:200]}: write the label as true or false"
        ) from error
    return classes
