"""Runs the command line in a forked child process, for tests of its streams, signals and exit codes.

The child has imported everything already, so a run takes a second instead of ten.
"""

import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

from kto_fused.commands import cli


class Outcome(NamedTuple):
    """The exit code of a run (minus the signal's number if a signal ended it) and its output."""

    code: int
    out: str
    err: str


def start(arguments: list[str], folder: Path, before: Callable[[], None] = lambda: None) -> int:
    """Start a child that runs the command, and return its process id. Its output goes into files in ``folder``.

    The child calls ``before`` once its streams are as Python opens them at its start.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child != 0:
        return child
    code = 99
    try:
        os.setsid()
        faulthandler.register(signal.SIGUSR1, all_threads=True, file=(folder / "stacks").open("w"))
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        open_streams()
        before()
        code = cli.main(arguments)
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        code = as_python_exits(code)
        os._exit(code)


def open_streams(encoding: str = "utf-8") -> None:
    """Open stdout and stderr as Python does when it starts. A stream is None if its descriptor is closed."""
    for descriptor, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        try:
            os.fstat(descriptor)
            stream = open(descriptor, "w", encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
        except OSError:
            stream = None
        setattr(sys, name, stream)


def as_python_exits(code: int) -> int:
    """Flush both streams as Python does when it exits, and return the exit code: 120 if a flush fails."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except Exception:
            code = 120
    return code


def ended(child: int, folder: Path, seconds: float = 60) -> Outcome:
    """Wait for a child of ``start`` and return its outcome. After ``seconds`` it is killed, with its stacks printed."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGUSR1)
            time.sleep(1)
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError((folder / "stderr").read_text()[-4000:] + (folder / "stacks").read_text())
        time.sleep(0.02)
    return Outcome(os.waitstatus_to_exitcode(status), *((folder / name).read_text() for name in ("stdout", "stderr")))


def run(arguments: list[str], folder: Path, before: Callable[[], None] = lambda: None) -> Outcome:
    """Run the command in a child process to its end. See ``start``."""
    return ended(start(arguments, folder, before), folder)


def descendants(child: int) -> list[psutil.Process]:
    try:
        return psutil.Process(child).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def still_running(processes: list[psutil.Process], seconds: float = 10) -> list[psutil.Process]:
    """Return the processes that still run after at most ``seconds``. A zombie has ended."""
    deadline = time.monotonic() + seconds
    while True:
        running = []
        for process in processes:
            try:
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    running.append(process)
            except psutil.NoSuchProcess:
                pass
        if not running or time.monotonic() > deadline:
            return running
        time.sleep(0.05)
