"""Checkpoints on disk: whether one is complete, which one to resume from, and which ones to keep.

The trainer writes ``manifest.json`` last into a checkpoint. It holds the size and the XXH3 hash of every file, and a
description of the run: the options, data and weights that the training curve depends on. A checkpoint without a valid
manifest is not complete, and no run resumes from it. ``runs`` compares a manifest's run with the one that resumes.
"""

import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from safetensors import safe_open
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from . import fingerprints, ranks

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PREVIOUS = ".previous"  # suffix of a complete checkpoint that is kept until its replacement is complete
BLOCK_BYTES = 1 << 22  # read at a time for a hash
# The files that training needs to go on. FSDP and DeepSpeed keep optimizer and weights in folders of other names.
STATE, ESSENTIAL = "trainer_state.json", ("optimizer.pt", "scheduler.pt", "metrics_0.pt")


class CheckpointError(ValueError):
    """A checkpoint is incomplete, damaged or of another run; the message names the file or the option."""


class FolderInUseError(ValueError):
    """Another run writes into the output folder; ``folder_lock`` raises it."""


# ---- complete or not ----------------------------------------------------------------------------------------------


def write_manifest(folder: Path, run: dict[str, Any]) -> None:
    """Make a checkpoint complete: write every file through to the disk, then the manifest, whole or not at all."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        digest = _hash_file(path, to_disk=True)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "xxh3_128": digest}
    content = {"files": files, "run": run}
    draft = folder / f"{MANIFEST}.part"
    with draft.open("w", encoding="utf-8") as file:
        json.dump({"xxh3_128": fingerprints.hash_json(content), **content}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, folder / MANIFEST)
    for changed in (folder, folder.parent):
        _sync_folder(changed)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest.

    Raises:
        CheckpointError: there is no manifest, or it is damaged.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist")
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["xxh3_128"] != fingerprints.hash_json({"files": manifest["files"], "run": manifest["run"]}):
            raise ValueError("its checksum differs")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: the checkpoint was not saved to its end, or by a version that wrote no manifests"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error or type(error).__name__})") from error
    return manifest


def verify(folder: Path) -> None:
    """Read every file of a checkpoint and raise ``CheckpointError`` unless each is as it was saved."""
    for name, expected in read_manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != expected["size"]:
            raise CheckpointError(f"{path} has {size} bytes, but {expected['size']} were saved")
        try:
            is_same = _hash_file(path) == expected["xxh3_128"]
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
        if not is_same:
            raise CheckpointError(f"{path} is damaged: its bytes differ from those that were saved")


def is_complete(folder: Path) -> bool:
    """Whether all files have their names and sizes; their contents are not read."""
    try:
        files = read_manifest(folder)["files"]
        return all((folder / name).stat().st_size == file["size"] for name, file in files.items())
    except (CheckpointError, OSError):
        return False


def check_readable(folder: Path) -> None:
    """Check a checkpoint without a manifest as far as that goes: its bytes cannot be compared with those saved.

    Raises:
        CheckpointError: a file that training needs is missing, or a file cannot be parsed.
    """
    is_plain = not any(path.is_dir() for path in folder.iterdir())
    needed = (STATE, *ESSENTIAL) if is_plain and any(folder.glob("rng_state*.pth")) else (STATE,)
    for name in needed:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            if path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin"):
                with zipfile.ZipFile(path) as archive:
                    damaged = archive.testzip()
                if damaged is not None:
                    raise ValueError(f"the checksum of its part {damaged} differs")
        except Exception as error:  # the files may hold anything, and the parsers raise anything
            raise CheckpointError(f"{path} is damaged ({' '.join(str(error).split())})") from error


def _hash_file(path: Path, to_disk: bool = False) -> str:
    """Return the file's XXH3 hash; ``to_disk`` first writes the file through to the disk."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        if to_disk:
            os.fsync(file.fileno())
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some network file systems cannot sync a folder
        os.fsync(handle)
    os.close(handle)


# ---- choosing the checkpoint to resume from -----------------------------------------------------------------------


class Found(NamedTuple):
    """A checkpoint in the folder of a run."""

    step: int
    folder: Path


def found_in(output_dir: str | Path) -> list[Found]:
    """Return the checkpoints in a folder, complete or not, the latest step first."""
    if not Path(output_dir).is_dir():
        return []
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)(?:{re.escape(PREVIOUS)})?")
    matches = ((pattern.fullmatch(path.name), path) for path in Path(output_dir).iterdir() if path.is_dir())
    found = [Found(int(match[1]), path) for match, path in matches if match]
    return sorted(found, key=lambda one: (-one.step, one.folder.name))


def choose(wanted: str | bool, output_dir: str, anyway: bool = False) -> str:
    """Return the checkpoint to resume from: ``wanted``, or for True the newest complete one in ``output_dir``.

    A warning lists the newer checkpoints that were passed over, and why.

    Args:
        wanted: a checkpoint's folder, or True.
        output_dir: the run's folder.
        anyway: also take a checkpoint without a manifest, if there is none with one.

    Raises:
        CheckpointError: the wanted checkpoint is not complete, or no checkpoint is.
    """
    if wanted is not True:
        try:
            _verify_or_read(Path(wanted), anyway)
        except CheckpointError as error:
            others = (found.folder for found in found_in(Path(wanted).parent) if found.folder != Path(wanted))
            complete = next((folder for folder in others if _problem(folder) is None), None)
            way_out = "resume from another checkpoint"
            if complete is not None:
                way_out = f"{complete} is complete, resume from that"
            raise CheckpointError(f"{error}; {way_out}{_hint_at_resume_anyway(str(error))}") from error
        return str(wanted)
    found = found_in(output_dir)
    problems = {}
    checks = [verify]
    if anyway:  # checkpoints without a manifest only where none has a valid one
        checks.append(lambda folder: _verify_or_read(folder, True))
    for check in checks:
        for number, (_, folder) in enumerate(found):
            problems[folder] = _problem(folder, check)
            if problems[folder] is None:
                passed_over = [problems[newer.folder] for newer in found[:number]]
                if passed_over:
                    logger.warning(f"resuming from {folder}; passed over: {'; '.join(passed_over)}")
                if folder.name.endswith(PREVIOUS):  # renamed, so that the best checkpoint is found under its name
                    folder = folder.with_name(folder.name.removesuffix(PREVIOUS))
                    _put_back(folder)
                return str(folder)
    if not problems:
        raise CheckpointError(f"there is no checkpoint in {output_dir}")
    reasons = "; ".join(problems.values())
    raise CheckpointError(
        f"{output_dir} holds no complete checkpoint: {reasons}; start a new run in another folder"
        f"{_hint_at_resume_anyway(reasons)}"
    )


def _problem(folder: Path, check: Callable[[Path], None] = verify) -> str | None:
    """Return why the checkpoint cannot be used; None if it can."""
    try:
        check(folder)
    except CheckpointError as error:
        return str(error)
    return None


def _verify_or_read(folder: Path, anyway: bool) -> None:
    if not anyway or (folder / MANIFEST).exists() or not folder.is_dir():
        return verify(folder)
    check_readable(folder)
    logger.warning(f"{folder} has no {MANIFEST}: resume_anyway takes it, and nothing in it could be verified")


def _hint_at_resume_anyway(problem: str) -> str:
    if f"{MANIFEST} is missing" not in problem:
        return ""
    return ", or, if you know that it was saved whole, take it unverified: resume_anyway=True (--resume_anyway)"


# ---- saving -------------------------------------------------------------------------------------------------------


def begin(folder: Path) -> None:
    """Make room for a checkpoint: set a complete one aside until ``end``, and remove an incomplete one."""
    previous = folder.with_name(folder.name + PREVIOUS)
    if is_complete(folder):
        remove(previous)
        folder.rename(previous)
    else:
        remove(folder)


def end(folder: Path, run: dict[str, Any]) -> None:
    """Make the checkpoint complete, and remove the one that ``begin`` set aside."""
    write_manifest(folder, run)
    remove(folder.with_name(folder.name + PREVIOUS))


def abandon(folder: Path) -> None:
    """After a failure to save, put back the checkpoint that was set aside, unless the new one is complete."""
    if not is_complete(folder):
        _put_back(folder)


def _put_back(folder: Path) -> None:
    """Remove an incomplete checkpoint and put the complete one that was set aside in its place."""
    remove(folder)
    previous = folder.with_name(folder.name + PREVIOUS)
    if previous.exists() and not folder.exists():
        previous.rename(folder)


def reason_of(error: Exception) -> str:
    """Return why saving failed: the operating system's reason, however deep it lies in the error's causes.

    ``torch.save`` may be the first to notice that less was written than it asked for, as on a full disk. Its error then
    only names a line of its source and two positions.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    if any(text in str(error) for text in ("unexpected pos", "iostream error")):
        return "a file could not be written to its end"
    return " ".join(str(error).split()) or type(error).__name__


def remove(folder: Path) -> None:
    """Remove a checkpoint, its manifest first, so that the rest of a removal that is killed is not complete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, current: Path, best: str | None) -> None:
    """Keep ``limit`` complete checkpoints: ``current``, which was just saved, ``best``, and the latest others.

    Checkpoints of later steps than ``current`` stem from before the run went back to an earlier step; they are removed
    first. Incomplete ones do not count, and are removed once there are ``limit`` complete ones.
    """
    if limit is None or limit <= 0:
        return
    found = found_in(output_dir)
    complete = [one for one in found if is_complete(one.folder)]
    now = next(one.step for one in found if one.folder == current)
    protected = {current} if best is None else {current, Path(best)}
    others = [one for one in complete if one.folder not in protected]
    others.sort(key=lambda one: (one.step <= now, one.step), reverse=True)
    num_protected = sum(one.folder in protected for one in complete)
    leaving = [one.folder for one in others[max(0, limit - num_protected) :]]
    if len(complete) >= limit:
        leaving += [one.folder for one in found if one not in complete and one.folder not in protected]
    for folder in leaving:
        logger.info(f"removing {folder}: save_total_limit={limit}")
        remove(folder)


# ---- several processes ---------------------------------------------------------------------------------------------


def agreed(args: TrainingArguments, work: Callable[[], Any]) -> Any:
    """Do ``work`` on the processes that save, and return its result, or raise its error, on all processes.

    Raises:
        CheckpointError: the results differ between nodes, which may each save into a folder of their own.
    """
    if args.world_size == 1:
        return work()
    results = ranks.shared(args, lambda: [work()] if args.should_save else [])
    if any(other != results[0] for other in results):
        raise CheckpointError(
            f"the nodes found different checkpoints: {results}; name one that all of them have, in the same folder"
        )
    return results[0]


def check_all_see(args: TrainingArguments, checkpoint: str) -> None:
    """Check that every process can read the checkpoint from which all of them resume.

    Raises:
        CheckpointError: one cannot, for example on a node with a disk of its own; raised on all processes.
    """

    def look() -> list:
        if args.world_size > 1 and not (Path(checkpoint) / STATE).is_file():
            raise CheckpointError(
                f"process {args.process_index} does not find {checkpoint} on its disk: put output_dir on a disk that "
                "all nodes share, or copy the checkpoint's folder to the same place on each node"
            )
        return []

    ranks.shared(args, look)
