"""A cache of prepared datasets on disk, whose checksums are verified before every use.

``stored(key, write, ...)`` returns the entry of a key, and calls ``write`` to make it where there is none. ``mapped``
does so with a function that ``Dataset.map`` applies. ``digest`` makes a key of everything that decides the content.

An entry is a folder ``<cache of datasets>/kto_fused/<key>`` of Arrow files and a manifest. It is written under another
name and renamed when it is complete. So a killed process leaves no entry, and processes that prepare the same data at
the same time do not disturb each other.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import xxhash
from datasets import Dataset, concatenate_datasets
from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

CACHE_FORMAT = 9  # part of every key: raise it when the same input gives other rows
MANIFEST = "manifest.json"
UNFINISHED = ".unfinished"  # ends the name of a folder that is being written
# A folder that nothing touched for this long has no writer any more. A live writer touches its files every 1000 rows,
# which takes up to 3 hours if a chat template takes RENDER_SECONDS for each row.
SECONDS_UNTIL_ABANDONED = 24 * 3600
_until_exit: list[tempfile.TemporaryDirectory] = []  # removed when the interpreter ends


def digest(*parts: Any) -> str:
    """Return a key: a hash of ``CACHE_FORMAT`` and the parts, which JSON or ``str`` can write."""
    text = json.dumps([CACHE_FORMAT, *parts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Stored(NamedTuple):
    """A dataset that is read from the disk, and the notes of its writer."""

    dataset: Dataset
    notes: dict[str, Any]


def stored(key: str, write: Callable[[Path], dict[str, Any]], what: str, *, one_writer: bool = True) -> Stored:
    """Return the entry of ``key``. If there is none, or the entry on the disk is damaged, ``write`` makes it.

    If the cache cannot be written, or ``datasets.disable_caching()`` was called, the files lie in a temporary folder
    until the process ends.

    Args:
        key: stands for the content (see ``digest``); also the fingerprint of the dataset that is returned.
        write: writes ``*.arrow`` files into the folder that it gets, and returns notes that JSON can hold. The order of
            the rows is the order of the sorted file names.
        what: the data's name in messages.
        one_writer: whether other processes that want the entry wait until it is written. False if ``write`` starts
            worker processes: workers that outlive a killed run would keep the lock.

    Raises:
        OSError: the disk is full, or returns other bytes than were written.
    """
    root = Path(datasets.config.HF_DATASETS_CACHE) / "kto_fused"
    folder = root / key
    if not datasets.is_caching_enabled():
        return temporary(key, write, what)
    if (entry := _intact(folder)) is not None:
        return entry
    with _lock(root / f"{key}.lock", what) if one_writer else nullcontext():
        if (entry := _intact(folder)) is not None:  # written by another process meanwhile
            return entry
        try:
            unfinished = _place_for(folder, what)
        except OSError as error:
            logger.warning(f"{what}: the cache {root} cannot be written ({error}), so the prepared data are not kept.")
            return temporary(key, write, what)
        try:
            _write(unfinished, write)
            try:
                os.replace(unfinished, folder)
            except OSError:
                if not folder.exists():
                    raise
                # another process finished the same entry first
            if (entry := _intact(folder)) is None:
                raise OSError(f"the prepared data in {folder} differ from what was written there: check the disk")
            return entry
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def mapped(
    dataset: Dataset,
    function: Callable,
    *,
    key: str,
    num_proc: int | None = None,
    source: Dataset | None = None,
    **options,
) -> Dataset:
    """Return ``dataset.map(function, **options)``, cached under ``key`` if ``dataset`` itself, or ``source`` from which
    it was made, lies on the disk.
    """
    if not (dataset if source is None else source).cache_files:
        return dataset.map(function, num_proc=num_proc, new_fingerprint=key, **options)

    def write(folder: Path) -> dict[str, Any]:
        file = str(folder / "data.arrow")  # or num_proc files: data_00000_of_00002.arrow, ...
        dataset.map(function, num_proc=num_proc, new_fingerprint=key, cache_file_name=file, **options)
        return {}

    return stored(key, write, options.get("desc", "data"), one_writer=num_proc is None).dataset


def temporary(key: str, write: Callable[[Path], dict[str, Any]], what: str) -> Stored:
    """Return what ``stored`` returns, from a folder that is removed when the process ends."""
    _until_exit.append(tempfile.TemporaryDirectory(prefix="kto_fused_", ignore_cleanup_errors=True))
    folder = Path(_until_exit[-1].name)
    _write(folder, write)
    return _opened(folder, key, json.loads((folder / MANIFEST).read_text().split("\n")[0]))


def _write(folder: Path, write: Callable[[Path], dict[str, Any]]) -> None:
    """Write the Arrow files, and the manifest last.

    Line 1 of the manifest holds the files' sizes and checksums and the notes, line 2 the checksum of line 1.
    """
    try:
        notes = write(folder)
        files = {file.name: [file.stat().st_size, checksum(file)] for file in sorted(folder.glob("*.arrow"))}
        content = json.dumps({"files": files, "notes": notes})
        (folder / MANIFEST).write_text(f"{content}\n{xxhash.xxh3_128_hexdigest(content.encode())}", encoding="utf-8")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        problem = (
            f"the disk is full. Prepared data is kept in {datasets.config.HF_DATASETS_CACHE} (HF_DATASETS_CACHE): free "
            "space there, or set this variable to a folder on another disk"
        )
        raise OSError(error.errno, problem) from error


def _intact(folder: Path) -> Stored | None:
    """Return the entry, or None unless every file has the size and the checksum of the manifest."""
    try:
        content, written = (folder / MANIFEST).read_text(encoding="utf-8").split("\n")
        if xxhash.xxh3_128_hexdigest(content.encode()) != written:
            return None
        manifest = json.loads(content)
        for name, (size, written) in manifest["files"].items():
            if (folder / name).stat().st_size != size or checksum(folder / name) != written:
                return None
    except (OSError, ValueError):
        return None
    return _opened(folder, folder.name, manifest)


def _opened(folder: Path, key: str, manifest: dict[str, Any]) -> Stored:
    parts = [Dataset.from_file(str(folder / name)) for name in manifest["files"]]
    dataset = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    dataset._fingerprint = key
    return Stored(dataset, manifest["notes"])


def checksum(file: Path) -> str:
    """Return a checksum of all bytes of a file."""
    checked = xxhash.xxh3_128()
    with file.open("rb", buffering=0) as content:
        while chunk := content.read(2**22):
            checked.update(chunk)
    return checked.hexdigest()


def _place_for(folder: Path, what: str) -> Path:
    """Make an empty folder to write in, and take away a damaged ``folder`` and abandoned folders beside it."""
    root = folder.parent
    root.mkdir(parents=True, exist_ok=True)
    for abandoned in root.glob(f"*{UNFINISHED}"):
        with suppress(OSError):  # its writer may finish it just now
            newest = max(path.stat().st_mtime for path in (abandoned, *abandoned.glob("*")))
            if time.time() - newest > SECONDS_UNTIL_ABANDONED:
                shutil.rmtree(abandoned, ignore_errors=True)
    unfinished = root / f"{folder.name}.{uuid.uuid4().hex}{UNFINISHED}"
    unfinished.mkdir()  # not mkdtemp, whose mode would shut out the other users of a shared cache
    try:
        if folder.exists():
            logger.warning(f"{what}: the cached copy in {folder} is damaged, and is made again.")
            os.replace(folder, unfinished / "damaged")  # files that another process has open stay readable
            shutil.rmtree(unfinished / "damaged")
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return unfinished


@contextmanager
def _lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock; wait for another process that holds it.

    Without a lock (a file system may have none) several processes prepare the same data, which is slow but correct:
    each renames a whole folder.
    """
    lock = FileLock(path, mode=0o666)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info(f"{what}: another process prepares the same data; waiting for it ({path}).")
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        logger.debug(f"{what}: prepared without the lock {path}: {error}")
    try:
        yield
    finally:
        lock.release()
