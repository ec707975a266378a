"""What the user can mend, as one sentence."""

import os
import sys


class CommandError(Exception):
    """What the user can mend; the message is one sentence that names it."""


def sentence(error: BaseException) -> str:
    """The error's message on one line; of a file's, without its number."""
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        message = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    return " ".join(message.split())


def check_names(*names: str) -> None:
    """Raises ``CommandError`` if a name cannot be a file's for Python and for libraries that take UTF-8 alone."""
    for name in names:
        try:
            name.encode("utf-8")
            os.fsencode(name)
        except UnicodeEncodeError as error:
            raise CommandError(
                f"{name} cannot be a file's name here, where names are {sys.getfilesystemencoding()}: set PYTHONUTF8=1 "
                "if it is UTF-8, else rename the file"
            ) from error
