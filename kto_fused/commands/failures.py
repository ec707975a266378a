"""Turns errors of libraries and of the operating system into ``CommandError``, which the user reads as one sentence."""

import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CommandError, sentence

# the kinds that libraries raise while a configuration, model or data set is loaded and prepared
SETUP_ERRORS = (ValueError, TypeError, RuntimeError, ImportError, OSError)
# how the operating system reports a disk that is full, a quota that is used up, and a file that may not grow
DISK_FULL_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OUT_OF_GPU_MEMORY = (
    "the GPU does not have enough memory: lower --per_device_train_batch_size and raise "
    "--gradient_accumulation_steps, or use --gradient_checkpointing or --lora_rank"
)


@contextmanager
def user_errors(*kinds: type[Exception], prefix: str = "") -> Iterator[None]:
    """Raise a ``CommandError`` in place of errors of the given ``kinds`` and of ``torch.OutOfMemoryError``.

    Its message is ``prefix``, which says what failed, and the original error's message.
    """
    try:
        yield
    except Exception as error:
        # before anything has imported PyTorch there is no such error
        is_out_of_memory = "torch" in sys.modules and isinstance(error, sys.modules["torch"].OutOfMemoryError)
        if not (is_out_of_memory or isinstance(error, kinds)):
            raise
        if is_out_of_memory and not prefix:
            raise CommandError(OUT_OF_GPU_MEMORY) from error
        raise CommandError(prefix + sentence(error)) from error


@contextmanager
def setup_errors() -> Iterator[None]:
    """Raise a ``CommandError`` in place of errors of loading and preparing. On a full disk it names the caches."""
    try:
        with user_errors(*SETUP_ERRORS):
            yield
    except CommandError as error:
        import datasets  # here, because kto-fused estimate runs without datasets
        import huggingface_hub.constants

        if "HF_DATASETS_CACHE" in str(error) or not is_disk_full(error):
            raise
        raise CommandError(
            f"{error}: the disk is full. Prepared data is kept in {datasets.config.HF_DATASETS_CACHE} "
            f"(HF_DATASETS_CACHE), downloaded models in {huggingface_hub.constants.HF_HUB_CACHE} (HF_HUB_CACHE): free "
            "space there, or set these variables to folders on another disk"
        ) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether a full disk or quota caused the error.

    Libraries often pass on only the text of the original error, so the texts of all causes are searched too.
    """
    texts = (*map(os.strerror, DISK_FULL_NUMBERS), "Not enough disk space")  # ``datasets`` says the last one
    while error is not None:
        if getattr(error, "errno", None) in DISK_FULL_NUMBERS or any(text in str(error) for text in texts):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_writable(folder: str | Path) -> None:
    """Check that 4 KiB can be written in ``folder``, or in its nearest parent that exists. Leaves no file behind.

    Raises:
        CommandError: they cannot be written.
    """
    folder = Path(folder)
    with user_errors(OSError, prefix=f"{folder} cannot be written: "):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(4096))  # an empty file can still be created on a full disk
