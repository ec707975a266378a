"""Load models and tokenizers from a folder or the Hub, with errors that name a damaged file.

``transformers`` reports a damaged file in many ways, mostly without its name, and fills weights that a checkpoint lacks
with random numbers. Here both are one clear error. Python code that comes with a model runs only if the user said so.
"""

import functools
import json
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

logger = logging.getLogger(__name__)

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
DESCRIPTIONS = (
    *("config.json", "generation_config.json", "*.index.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json"),
)
LFS_POINTER = b"version https://git-lfs"


class RemoteCodeError(ValueError):
    """A model, tokenizer or configuration cannot be loaded without running Python code that comes with it."""


def load_model(name: str, *, trust_remote_code: bool, scores: bool = False, **options: Any) -> PreTrainedModel:
    """Load a causal language model from a folder or the Hub.

    Args:
        name: a folder, or a model's name on the Hub.
        scores: whether to load it as a reward model: a sequence classifier whose ``score`` is one number. The ``score``
            of a checkpoint without one starts from random numbers, and the log says so.
        trust_remote_code: whether Python code that comes with the model may run.
        options: for ``from_pretrained``.

    Raises:
        ValueError: a file is damaged, or the checkpoint lacks weights of the model, which ``transformers`` would fill
            with random numbers.
        RemoteCodeError: see ``load_pretrained``, whose other errors pass through.
    """
    kind = AutoModelForCausalLM
    if scores:
        kind, options = AutoModelForSequenceClassification, {"num_labels": 1, **options}
    try:
        model, found = load_pretrained(
            kind, name, trust_remote_code=trust_remote_code, output_loading_info=True, **options
        )
    except Exception as error:  # loading may fail in any way, mostly without the file's name
        damage = damaged_file(name)
        if damage is None and scores and str(error).startswith("Unrecognized configuration class"):
            raise ValueError(
                f"{name} cannot be a reward model: transformers has no sequence classifier of its architecture"
            ) from error
        if damage is None:
            raise
        raise ValueError(damage) from error
    missing = sorted(found["missing_keys"])
    if scores and (new := [key for key in missing if key.startswith("score.")]):
        logger.info(f"{name} has no score layer: a new one starts from random numbers.")
        missing = [key for key in missing if key not in new]
    if missing:
        raise ValueError(
            f"its files lack {len(missing)} of the weights of {type(model).__name__} ({missing[0]} among them), which "
            "would start as random numbers: expected the whole checkpoint of a causal language model"
        )
    return model


def load_pretrained(kind: type, name: str, *, trust_remote_code: bool, **options: Any) -> Any:
    """Return ``kind.from_pretrained(name)``, without the question on the terminal whether the model's code may run.

    Raises:
        RemoteCodeError: the model's own code is needed, and ``trust_remote_code`` is off.
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


@functools.cache  # once per model
def _say_trusted(name: str) -> None:
    logger.warning("trust_remote_code is on: Python code that comes with %s is run", name)


def damaged_file(name: str) -> str | None:
    """Return a sentence on the first file of the model that is damaged, or None if all files are whole.

    A damaged file is empty, cut off, or not of the kind that its name says. Damage inside the numbers of a weight is
    not found: no file records a checksum of them.
    """
    folder = _folder_of(name)
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
            elif not begin or (begin.startswith(b"PK") and not zipfile.is_zipfile(path)):  # old files are no zip
                return _damaged(path, "PyTorch", "it ends early")
        except Exception as error:  # safetensors raises a class of its own, directly below ``Exception``
            return _damaged(path, "safetensors", error)
    return None


def _folder_of(name: str) -> Path | None:
    """Return the folder with the files of a model, or None if it was not downloaded yet."""
    if Path(name).is_dir():
        return Path(name)
    try:
        config = huggingface_hub.try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a name of the Hub
        return None
    return Path(config).parent if isinstance(config, str) else None


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
