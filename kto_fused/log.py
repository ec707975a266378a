"""The package's log. It reports a run's assumptions and decisions at level INFO, which Python hides by default."""

import logging
import sys


def show() -> None:
    """Make the INFO messages of the loggers of ``kto_fused`` visible. A second call changes nothing.

    Some messages are no warnings and must still be seen: which reference model a run uses, for example. They go to
    stderr if the application has not set up logging, and otherwise where the application sends its own messages.
    ``logging.getLogger("kto_fused").setLevel("WARNING")`` hides them.
    """
    package = logging.getLogger(__package__)
    if package.level == logging.NOTSET:
        package.setLevel(logging.INFO)
    if not any(isinstance(handler, _Fallback) for handler in package.handlers):
        package.addHandler(_Fallback())


class _Fallback(logging.Handler):
    """Writes messages to stderr, as Python does with warnings, as long as the application has no handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not logging.getLogger().handlers

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr)  # looked up each time: pytest and notebooks replace stderr
        except Exception:
            self.handleError(record)
