"""The package's log: what a run assumes or decides is said at level INFO, which Python hides unless it is told to."""

import logging
import sys


def show() -> None:
    """Let the loggers of ``kto_fused`` say what they have at level INFO; calling it again changes nothing.

    Which reference a run uses is no warning, yet it must be seen. Where the application has set no logging up, the
    messages go to stderr; otherwise they go where the application sends its own.
    ``logging.getLogger("kto_fused").setLevel("WARNING")`` hides them.
    """
    package = logging.getLogger(__package__)
    if package.level == logging.NOTSET:
        package.setLevel(logging.INFO)
    if not any(isinstance(handler, _Fallback) for handler in package.handlers):
        package.addHandler(_Fallback())


class _Fallback(logging.Handler):
    """Writes to stderr, as Python does with warnings, while the application has no handler of its own."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not logging.getLogger().handlers

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr)  # the stderr of now: pytest and notebooks replace it
        except Exception:
            self.handleError(record)
