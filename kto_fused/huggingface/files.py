"""A model's files: which of them is damaged, and weights that a checkpoint lacks."""

import functools
import json
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

logger = logging.getLogger(__name__)

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
DESCRIPTIONS = (
    *("config.json", "generation_config.json", "*.index.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json"),
)
LFS_POINTER = b"version https://git-lfs"


def load_model(name: str, *, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """A causal language model from a folder or the Hub.

    Raises:
        ValueError: a file is damaged, or the checkpoint lacks weights of the model, which ``transformers`` would fill
            with random numbers. Beside that, what ``huggingface.load_pretrained`` raises.
    """
    try:
        model, found = load_pretrained(
            AutoModelForCausalLM, name, trust_remote_code=trust_remote_code, output_loading_info=True, **options
        )
    except Exception as error:  # it may fail in any way, mostly without the file's name
        damage = damaged_file(name)
        if damage is None:
            raise
        raise ValueError(damage) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"its files lack {len(missing)} of the weights of {type(model).__name__} ({missing[0]} among them), which "
            "would start as random numbers: expected the whole checkpoint of a causal language model"
        )
    return model


def folder_of(name: str) -> Path | None:
    """Where the files of a folder or of a downloaded model lie; None if nowhere yet."""
    if Path(name).is_dir():
        return Path(name)
    try:
        config = huggingface_hub.try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name of the Hub
        return None
    return Path(config).parent if isinstance(config, str) else None


def damaged_file(name: str) -> str | None:
    """A sentence on the first file of the model that is empty, cut off or not what its name says; None if all are
    whole. Damage inside the numbers of a weight is not found: nothing records what they were.
    """
    folder = folder_of(name)
    if folder is None:
        return None
    for path in _files(folder, DESCRIPTIONS):
        try:
            is_object = isinstance(json.loads(path.read_bytes()), dict)
        except (OSError, ValueError, RecursionError) as error:
            return _damaged(path, "JSON", error)
        if not is_object:
            return _damaged(path, "JSON", "expected an object")
    for path in _files(folder, WEIGHTS):
        try:
            with path.open("rb") as file:
                begin = file.read(len(LFS_POINTER))
            if begin == LFS_POINTER:
                return f"{path} is a Git LFS pointer in place of the weights: fetch them (git lfs pull)"
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif not begin or (begin.startswith(b"PK") and not zipfile.is_zipfile(path)):  # older ones are no zip
                return _damaged(path, "PyTorch", "it ends early")
        except Exception as error:  # safetensors has a class of its own, below ``Exception``
            return _damaged(path, "safetensors", error)
    return None


def _files(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for pattern in patterns:
        yield from sorted(folder.glob(pattern))


def _damaged(path: Path, kind: str, reason: object) -> str:
    try:
        is_empty = path.stat().st_size == 0
    except OSError:  # a dangling link
        is_empty = False
    reason = "it is empty" if is_empty else getattr(reason, "strerror", None) or reason
    return f"{path} is no whole {kind} file ({reason}): copy or download it again"


class RemoteCodeError(ValueError):
    """A model, tokenizer or configuration that cannot be loaded without running Python code that comes with it."""


def load_pretrained(kind: type, name: str, *, trust_remote_code: bool, **options: Any) -> Any:
    """``kind.from_pretrained(name)``, which never asks on the terminal whether the model's own code may be run.

    Raises:
        RemoteCodeError: that code is needed, and ``trust_remote_code`` is off.
    """
    if trust_remote_code:
        _say_trusted(name)
    try:
        return kind.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise RemoteCodeError(
            f"{name} brings Python code of its own, which is run only with trust_remote_code=True in the trainer's "
            "config (kto-fused train: --trust_remote_code)"
        ) from error


@functools.cache  # once for each model
def _say_trusted(name: str) -> None:
    logger.warning("trust_remote_code is on: Python code that comes with %s is run", name)
