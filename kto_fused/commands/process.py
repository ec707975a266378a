"""What the command line does to its own process: streams that may be lost, and worker processes that end with it.

Nothing here is active in a program that uses kto_fused as a library.
"""

import ctypes
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

PR_SET_PDEATHSIG = 1  # of Linux's prctl(2)


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Libraries remove their temporary files on ``KeyboardInterrupt``, but not on ``SystemExit``."""


# ---- streams ------------------------------------------------------------------------------------------------------


class LastingStream:
    """A text stream to which writing never fails: what cannot be written is dropped, and ``on_loss`` is told once.

    Characters that the stream's encoding lacks are written as backslash escapes.
    """

    def __init__(self, stream: TextIO | None, on_loss: Callable[[Exception], None]):
        # None: the stream was closed before Python started
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        self._on_loss = on_loss
        self.loss: Exception | None = None

    def write(self, text: str) -> int:
        with self._noting_loss():
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._noting_loss():
            self._stream.flush()

    def isatty(self) -> bool:
        with suppress(OSError, ValueError):
            return self._stream.isatty()
        return False

    def finish(self) -> None:
        """Flush. What cannot be written goes to the null device: at its exit Python would flush once more, and print
        the error.
        """
        self.flush()
        with suppress(OSError, ValueError):
            try:
                self._stream.flush()
            except OSError:
                if self._stream.fileno() in (1, 2):
                    null = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(null, self._stream.fileno())
                    os.close(null)
                    self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _noting_loss(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            if self.loss is None:
                self.loss = error
                self._on_loss(error)


@contextmanager
def lasting_streams(goes_on: str | None) -> Iterator[LastingStream]:
    """Replaces stdout and stderr by streams whose loss ends nothing; yields stdout's.

    A loss of stdout is said on stderr, except that a reader has closed the pipe (``| head``) of a command that only
    prints. ``goes_on`` says what goes on without stdout; None: the command only prints.
    """

    def say(error: Exception) -> None:
        reason = getattr(error, "strerror", None) or error
        if goes_on is not None:
            print(f"kto-fused: stdout cannot be written ({reason}): {goes_on}", file=sys.stderr)
        elif not isinstance(error, BrokenPipeError):
            print(f"kto-fused: stdout cannot be written: {reason}", file=sys.stderr)

    for descriptor in range(3):  # a closed one would be given to the next file opened, and printed lines end in that
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
    before = sys.stdout, sys.stderr
    stdout, stderr = LastingStream(before[0], say), LastingStream(before[1], lambda _: None)
    sys.stdout, sys.stderr = stdout, stderr
    try:
        yield stdout
    finally:
        stdout.finish()
        stderr.finish()
        sys.stdout, sys.stderr = before


# ---- signals and workers ------------------------------------------------------------------------------------------


class _Hooks:
    """State of hooks that cannot be taken back, and do nothing while not ``active``: those of ``os.register_at_fork``
    and the audit hook that notes temporary files.
    """

    active = False
    registered = False
    is_terminated = False  # SIGTERM came, even if a library swallowed the exception
    prctl: Callable[..., int] | None = None
    parent = 0
    from_main_thread = False
    journal = -1  # a file without a name, into which this process and its workers write their temporary files' names

    @classmethod
    def register(cls) -> None:
        if cls.registered:
            return
        cls.registered = True
        sys.addaudithook(_note_temporary_file)
        if not hasattr(os, "register_at_fork"):
            return
        if sys.platform == "linux":
            cls.prctl = ctypes.CDLL(None).prctl
        os.register_at_fork(before=cls.before, after_in_child=cls.in_child)

    @classmethod
    def before(cls) -> None:
        cls.parent = os.getpid()
        cls.from_main_thread = threading.current_thread() is threading.main_thread()

    @classmethod
    def in_child(cls) -> None:
        """A worker dies with its parent, leaves Ctrl-C to it, and ends on SIGTERM at once."""
        if not cls.active:
            return
        # Linux sends the signal when the forking thread ends, so another thread's children are left alone
        if cls.prctl is not None and cls.from_main_thread:
            cls.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != cls.parent:  # it died before the call
                os._exit(1)
        with suppress(ValueError):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _note_temporary_file(event: str, arguments: tuple) -> None:
    if _Hooks.active and event == "tempfile.mkstemp":
        with suppress(OSError):
            os.write(_Hooks.journal, os.fsencode(arguments[0]) + b"\0")


def remove_temporary_files() -> None:
    """Removes the files that this process and its workers made under temporary names and left there.

    ``datasets`` leaves the file that it prepares data in where the disk is full, or a worker is ended.
    """
    names = b""
    with suppress(OSError):
        os.lseek(_Hooks.journal, 0, os.SEEK_SET)
        while part := os.read(_Hooks.journal, 2**16):
            names += part
    for name in names.split(b"\0"):
        with suppress(OSError):
            os.unlink(name)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
    _Hooks.is_terminated = True
    raise Terminated


def _nameless_file() -> int:
    """Its descriptor, which forked processes share, and programs that they start do not."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("kto-fused")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


@contextmanager
def orderly_end() -> Iterator[None]:
    """While entered, SIGTERM raises ``Terminated``, and forked workers end with this process, even if it is killed.

    Under a launcher of several processes SIGTERM keeps its default: it comes when another process has failed, and this
    one may wait for that process in a call that no exception interrupts.
    """
    _Hooks.register()
    journal, _Hooks.is_terminated = _nameless_file(), False
    was_active, _Hooks.active, before, _Hooks.journal = _Hooks.active, True, _Hooks.journal, journal
    handles_sigterm = "RANK" not in os.environ and threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _terminate) if handles_sigterm else None
    try:
        yield
    finally:
        _Hooks.active, _Hooks.journal = was_active, before
        with suppress(OSError):
            os.close(journal)
        if handles_sigterm:
            signal.signal(signal.SIGTERM, previous if previous is not None else signal.SIG_DFL)


def stopped_by(error: BaseException) -> KeyboardInterrupt | None:
    """The Ctrl-C or SIGTERM behind an error: libraries that are interrupted may raise another error in its place."""
    if _Hooks.is_terminated:
        return Terminated()
    seen, found = set(), [error]
    while found:
        error = found.pop()
        if isinstance(error, KeyboardInterrupt):
            return error
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            found += [error.__context__, error.__cause__]
    return None
