"""Errors that the user can fix. A command prints each of them as one sentence, without a traceback.

``kto-fused --help`` loads this module, so it imports no heavy package.
"""

import os
import sys


class CommandError(Exception):
    """An error that the user can fix. Its message is one sentence that names the flag or file at fault."""


def sentence(error: BaseException) -> str:
    """Return the error's message on one line. An error of the operating system loses its number."""
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    return " ".join(message.split())


def check_names(*names: str) -> None:
    """Check that every name can be a file name, both for Python and for libraries that accept UTF-8 only.

    Raises:
        CommandError: a name cannot be encoded.
    """
    for name in names:
        try:
            name.encode("utf-8")
            os.fsencode(name)
        except UnicodeEncodeError as error:
            raise CommandError(
                f"{name} cannot be used as a file name: this system encodes file names in "
                f"{sys.getfilesystemencoding()}; set PYTHONUTF8=1 if the name is UTF-8, otherwise rename the file"
            ) from error
