"""One run at a time writes into an output folder: a lock that the operating system frees when its run is killed."""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import TrainingArguments

from .checkpoints import FolderInUseError, agreed

logger = logging.getLogger(__name__)

LOCK, RUNNING = "_run.lock", "_run.json"  # transformers uploads no file whose name begins with "_"
ORPHANS_END_WITHIN = 30  # seconds: worker processes of a killed run hold its lock until they notice its death


@contextmanager
def only_run_in(args: TrainingArguments) -> Iterator[None]:
    """Hold the lock of ``args.output_dir`` for this run.

    The operating system frees the lock of a killed run. A folder that was made for the lock and stays empty is removed.

    Raises:
        FolderInUseError: another run holds the lock; raised on all processes.
    """
    folder, held = Path(args.output_dir), []
    made = [path for path in (folder, *folder.parents) if not path.exists()]

    def acquire() -> None:
        try:
            lock = _acquire(folder)
        except FolderInUseError as error:
            if not args.save_on_each_node:
                raise
            shared = "if this is the same run on another node, the nodes share this disk: leave save_on_each_node out"
            raise FolderInUseError(f"{error}; {shared}") from error
        if lock is not None:
            held.append(lock)

    agreed(args, acquire)
    try:
        yield
    finally:
        for lock in held:
            if lock.lock_counter == 1:  # no caller holds it as well
                for name in (RUNNING, LOCK):
                    (folder / name).unlink(missing_ok=True)
                with suppress(OSError):
                    for path in made:
                        path.rmdir()
            lock.release()


def _acquire(folder: Path) -> FileLock | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, is_singleton=True)  # the command and its trainer take it together
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if _is_alive(_running_in(folder)):
                raise
            lock.acquire(timeout=ORPHANS_END_WITHIN)
    except Timeout:
        other = _running_in(folder)
        who = f" (process {other.get('pid')} on {other.get('host')}, started {other.get('started')})" if other else ""
        raise FolderInUseError(
            f"another run writes into {folder}{who}: wait until it ends, stop it, or use another output_dir"
        ) from None
    except OSError as error:
        logger.warning(f"{folder} cannot be locked ({error}): a second run in it would not be noticed")
        return None
    if lock.lock_counter == 1:
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")
        content = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
        try:
            (folder / RUNNING).write_text(json.dumps(content), encoding="utf-8")
        except OSError as error:  # the lock holds without this file, but a second run cannot say who holds it
            logger.warning(
                f"{folder / RUNNING} cannot be written ({error.strerror}), so this run's results may fail to be written"
            )
    return lock


def _running_in(folder: Path) -> dict[str, Any]:
    """Return process, host and start of the run that holds the folder's lock, as far as they can be read."""
    try:
        return dict(json.loads((folder / RUNNING).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _is_alive(run: dict[str, Any]) -> bool:
    """Whether the run's process exists. A run on another host cannot be looked up, and counts as alive."""
    if run.get("host") != socket.gethostname() or not isinstance(run.get("pid"), int):
        return True
    try:
        os.kill(run["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's process
        pass
    return True
