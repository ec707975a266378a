"""What the command line does to its own process: streams that may be lost, and worker processes that end with it.

Nothing here is active in a program that uses kto_fused as a library.
"""

import ctypes
import os
import signal
import sys
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


class _Forking:
    """State of the hooks of ``os.register_at_fork``, which stay for good: they do nothing while not ``active``."""

    active = False
    registered = False
    prctl: Callable[..., int] | None = None
    parent = 0
    from_main_thread = False

    @classmethod
    def register(cls) -> None:
        if cls.registered or not hasattr(os, "register_at_fork"):
            return
        cls.registered = True
        if sys.platform == "linux":
            cls.prctl = ctypes.CDLL(None).prctl
        os.register_at_fork(before=cls.before, after_in_child=cls.in_child)

    @classmethod
    def before(cls) -> None:
        cls.parent = os.getpid()
        cls.from_main_thread = threading.current_thread() is threading.main_thread()

    @classmethod
    def in_child(cls) -> None:
        """A worker dies with its parent, leaves Ctrl-C to it, and ends quietly on SIGTERM, with its files removed."""
        if not cls.active:
            return
        # Linux sends the signal when the forking thread ends, so another thread's children are left alone
        if cls.prctl is not None and cls.from_main_thread:
            cls.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != cls.parent:  # it died before the call
                os._exit(1)
        with suppress(ValueError):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, _end_worker)


def _end_worker(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stderr = LastingStream(None, lambda _: None)  # multiprocessing prints a traceback of whatever ends a worker
    raise Terminated


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
    raise Terminated


@contextmanager
def orderly_end() -> Iterator[None]:
    """While entered, SIGTERM raises ``Terminated``, and forked workers end with this process, even if it is killed.

    Under a launcher of several processes SIGTERM keeps its default: it comes when another process has failed, and this
    one may wait for that process in a call that no exception interrupts.
    """
    _Forking.register()
    was_active, _Forking.active = _Forking.active, True
    handles_sigterm = "RANK" not in os.environ and threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _terminate) if handles_sigterm else None
    try:
        yield
    finally:
        _Forking.active = was_active
        if handles_sigterm:
            signal.signal(signal.SIGTERM, previous if previous is not None else signal.SIG_DFL)


def stopped_by(error: BaseException) -> KeyboardInterrupt | None:
    """The Ctrl-C or SIGTERM behind an error: libraries that are interrupted may raise another error in its place."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None
