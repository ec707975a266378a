"""How the command ``kto-fused`` protects its own process against lost streams, signals and orphaned workers.

A lost stdout or stderr does not end a run, worker processes end when the command ends, and temporary files are removed
after an error. ``cli`` switches all of this on; nothing here is active in a program that imports kto_fused.
"""

import ctypes
import logging
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

PR_SET_PDEATHSIG = 1  # an option of Linux's prctl(2): the signal that a process gets when its parent dies


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived.

    This is a ``KeyboardInterrupt`` because libraries remove their temporary files on one, but not on ``SystemExit``.
    """


# ---- streams ------------------------------------------------------------------------------------------------------


class LastingStream:
    """Wraps a text stream so that writing never fails.

    Text that cannot be written is dropped, and ``on_loss`` is called with the first error. Characters that the stream's
    encoding lacks are written as backslash escapes.
    """

    def __init__(self, stream: TextIO | None, on_loss: Callable[[Exception], None]):
        # the stream is None if it was closed before Python started
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
        """Flush, and send text that cannot be written to the null device.

        Python flushes once more when it exits, and would print the error.
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
        except (OSError, ValueError) as error:  # a closed stream raises ValueError
            if self.loss is None:
                self.loss = error
                self._on_loss(error)


@contextmanager
def lasting_streams(continues: str | None) -> Iterator[LastingStream]:
    """Replace stdout and stderr by streams whose loss does not end the program. Yields the new stdout.

    A lost stdout is reported on stderr, and ``continues`` says in that message what continues without it. For a command
    that only prints, ``continues`` is None; a reader that closes its pipe early (``| head``) is not reported then.
    """

    def say(error: Exception) -> None:
        reason = getattr(error, "strerror", None) or error
        if continues is not None:
            print(f"kto-fused: stdout cannot be written ({reason}): {continues}", file=sys.stderr)
        elif not isinstance(error, BrokenPipeError):
            print(f"kto-fused: stdout cannot be written: {reason}", file=sys.stderr)

    # The next file that is opened would get the number of a closed descriptor, and printed lines would end up in it.
    for descriptor in range(3):
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


# ---- warnings -----------------------------------------------------------------------------------------------------

# warnings of libraries about their own later versions or optional parts, of which a user can change nothing
MEANINGLESS = (
    (UserWarning, "'pin_memory' argument is set as true but no accelerator is found"),
    (FutureWarning, "`(is_)?gradient_checkpointing` is deprecated"),
)
MEANINGLESS_LOG = ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward")


def _says_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(MEANINGLESS_LOG[1])


@contextmanager
def without_meaningless_warnings() -> Iterator[None]:
    """Keep the warnings of ``MEANINGLESS`` and ``MEANINGLESS_LOG`` from the terminal."""
    logger = logging.getLogger(MEANINGLESS_LOG[0])
    logger.addFilter(_says_something)
    with warnings.catch_warnings():
        for kind, text in MEANINGLESS:
            warnings.filterwarnings("ignore", text, kind)
        try:
            yield
        finally:
            logger.removeFilter(_says_something)


# ---- signals and workers ------------------------------------------------------------------------------------------


class _Hooks:
    """The state of two hooks that Python cannot remove: ``os.register_at_fork`` and the audit hook for temporary files.

    The hooks do nothing while ``active`` is False.
    """

    active = False
    registered = False
    is_terminated = False  # SIGTERM arrived; a library may have swallowed the exception
    prctl: Callable[..., int] | None = None
    parent = 0
    from_main_thread = False
    journal = -1  # an unnamed file in which this process and its workers note the paths of their temporary files

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
        """Make a forked worker die with its parent, ignore Ctrl-C (the parent handles it), and end on SIGTERM."""
        if not cls.active:
            return
        # Linux sends the signal when the forking thread ends, so children of other threads do not ask for it
        if cls.prctl is not None and cls.from_main_thread:
            cls.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != cls.parent:  # the parent died before the call
                os._exit(1)
        with suppress(ValueError):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _note_temporary_file(event: str, arguments: tuple) -> None:
    if _Hooks.active and event == "tempfile.mkstemp":
        with suppress(OSError):
            os.write(_Hooks.journal, os.fsencode(arguments[0]) + b"\0")


def remove_temporary_files() -> None:
    """Remove the temporary files that this process and its workers created and left behind.

    ``datasets`` leaves the file that it prepares data in when the disk is full or a worker is killed.
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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second SIGTERM ends the process at once
    _Hooks.is_terminated = True
    raise Terminated


def _nameless_file() -> int:
    """Return the descriptor of an unnamed file. Forked processes share it, and programs that they start do not."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("kto-fused")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


@contextmanager
def orderly_end() -> Iterator[None]:
    """Make SIGTERM raise ``Terminated``, and forked workers end with this process, even if it is killed.

    Under a launcher of several processes (``torchrun``) SIGTERM keeps its default. The launcher sends it when another
    process has failed, and this process may be waiting for that one in a call that no exception interrupts.
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
    """Return the Ctrl-C or SIGTERM that caused an error, or None. An interrupted library may raise another error."""
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
