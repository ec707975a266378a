"""The reference's log-probabilities of a dataset, computed once and kept on disk.

A cache file is named by a fingerprint of everything its values depend on: the reference's weights, configuration and
precision, the token ids (hence data and tokenizer), and the options of the log-probability. The file also holds this
fingerprint and a checksum of its values, so a damaged, renamed or foreign file is noticed, and its values are computed
again. The checksum protects against damage, not against someone who writes wrong values on purpose.
"""

import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import torch
import xxhash
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save
from transformers import PreTrainedModel

from . import fingerprints

logger = logging.getLogger(__name__)

# The entry of a file's metadata that holds fingerprint and checksum. They share one entry, because safetensors writes
# several entries in random order, and equal values should give equal files.
DESCRIBED = "kto_fused"
# The name of a cache file while it is being written: the fingerprint and a random number. Drafts of killed processes
# are removed once they are SECONDS_UNTIL_ABANDONED old.
DRAFT = re.compile(r"[0-9a-f]{32}\.[0-9a-f]{32}\.part")
SECONDS_UNTIL_ABANDONED = 24 * 3600


def add_ref_logps(
    dataset: Dataset,
    columns: tuple[str, ...],
    batches: Callable[[Dataset], Iterator[tuple[torch.Tensor, ...]]],
    folder: str | None,
    depends_on: tuple[str, ...],
    shared: Callable[[Callable[[], list]], list],
) -> Dataset:
    """Return ``dataset`` with the float64 columns ``columns``, read from disk or computed by ``batches``.

    Computed values are used even if they cannot be kept on disk; a warning then names the folder and the error.

    Args:
        dataset: prepared examples with a ``length`` column, in tokens.
        columns: names of the columns to add.
        batches: ``batches(dataset)`` yields one [b] tensor per column for each batch, in the dataset's order, the same
            on all processes. It gets the dataset sorted by length, longest first, so that batches pad little and the
            largest batch, which needs the most memory, comes first.
        folder: the folder of the files; None: ``kto_fused/`` in the Hugging Face cache.
        depends_on: texts that describe what the values depend on beside the dataset and the columns.
        shared: ``shared(work)`` does ``work`` on each process and returns the results of all in one list, or raises the
            error of one on all (``ranks.shared``). The processes compute together or not at all.

    Raises:
        OSError: ``folder`` is given and cannot be created; raised before anything is computed.
        ValueError: a computed value is NaN or infinite; nothing is kept.
    """
    tokens = fingerprints.hash_data(dataset, dataset.column_names)
    fingerprint = xxhash.xxh3_128_hexdigest("\n".join([tokens, *columns, *depends_on]).encode())
    path = Path(folder or Path(huggingface_hub.constants.HF_HOME) / "kto_fused")
    values = _read(path, fingerprint, columns, len(dataset))
    if not all(shared(lambda: [values is not None])):
        can_be_kept = all(shared(lambda: [_prepare_folder(path, is_given=folder is not None)]))
        order = np.argsort(-np.asarray(dataset["length"]), kind="stable")
        found = [torch.cat(parts).double().cpu() for parts in zip(*batches(dataset.select(order)), strict=True)]
        values = {}
        for column, sorted_values in zip(columns, found, strict=True):
            values[column] = torch.empty_like(sorted_values)
            values[column][torch.from_numpy(order)] = sorted_values
        _check_finite(values)
        if can_be_kept:
            _keep(values, path, fingerprint)
    for column in columns:
        dataset = dataset.add_column(column, values[column].numpy())
    return dataset


def hash_model(model: PreTrainedModel, adapter_prefix: str | None = None) -> str:
    """Return a hash of a model's configuration and weights, without adapters' weights.

    Args:
        model: the model.
        adapter_prefix: part of the names of adapters' weights; None: the model has no adapters to leave out.
    """
    irrelevant = ("_name_or_path", "use_cache")  # Trainer sets use_cache, and only for the policy
    configuration = {key: value for key, value in model.config.to_diff_dict().items() if key not in irrelevant}
    weights = fingerprints.hash_weights(
        model, lambda name, tensor: adapter_prefix is None or adapter_prefix not in name
    )
    return f"{xxhash.xxh3_128_hexdigest(repr(sorted(configuration.items(), key=str)).encode())} {weights}"


def _read(folder: Path, fingerprint: str, columns: tuple[str, ...], length: int) -> dict[str, torch.Tensor] | None:
    """Return the values of the first intact file, or None. A warning says why a file is not used."""
    paths = [folder / f"{fingerprint}.safetensors"]
    with suppress(OSError):
        paths += sorted(folder.glob(f"{fingerprint}.*.safetensors"))
    for path in paths:
        try:
            if not path.exists():
                continue
            if not path.is_file():  # opening a pipe would wait forever
                raise ValueError("it is not a regular file")
            return _intact_values(path, fingerprint, columns, length)
        except Exception as error:  # the file may hold anything, so reading it may raise anything
            reason = getattr(error, "strerror", None) or error
            logger.warning(f"the kept reference log-probabilities in {path} are not used: {reason}")
    return None


def _intact_values(path: Path, fingerprint: str, columns: tuple[str, ...], length: int) -> dict[str, torch.Tensor]:
    """Return the file's values; raise an error unless the file is one that ``_keep`` writes for this fingerprint."""
    with safe_open(path, framework="pt") as file:
        written_for, _, checksum = (file.metadata() or {}).get(DESCRIBED, "").partition(" ")
        # clone: uncloned values stay mapped to the file, and later damage to it would reach the training
        names = file.keys()
        values = {name: file.get_tensor(name).clone() for name in names}
    if written_for != fingerprint:
        raise ValueError("it does not say that it was computed from this data, tokenizer and reference model")
    if set(values) != set(columns):
        raise ValueError(f"it holds the columns {sorted(values)}, expected {sorted(columns)}")
    for name, column in values.items():
        if column.dtype != torch.float64 or column.shape != (length,):
            raise ValueError(
                f"{name} is {column.dtype} of shape {list(column.shape)}, expected {torch.float64} of shape [{length}]"
            )
        if not column.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    if checksum != _checksum(values):
        raise ValueError("its values do not match its checksum")
    return values


def _checksum(values: dict[str, torch.Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(values):
        digest.update(f"{name}\n".encode())
        digest.update(values[name].contiguous().numpy())
    return digest.hexdigest()


def _check_finite(values: dict[str, torch.Tensor]) -> None:
    for name, column in values.items():
        rows = (~column.isfinite()).nonzero().flatten().tolist()
        if rows:
            raise ValueError(
                f"the reference model gives {len(rows)} of {len(column)} examples a log-probability that is not "
                f"finite ({name} is {column[rows[0]].item()} in row {rows[0]} of the prepared data), and training on "
                "them would make the weights NaN: check the reference model's weights and its precision (fp16 "
                "overflows where bf16 does not), or leave these examples out"
            )


def _prepare_folder(folder: Path, is_given: bool) -> bool:
    """Create the folder, remove drafts of killed processes, and return whether a file can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_given:
            problem = f"ref_cache_dir cannot be created ({error.strerror}), name another folder"
            raise OSError(error.errno, problem, str(folder)) from error
        _warn_not_kept(folder, error)
        return False
    trial = folder / f"{uuid.uuid4().hex}.{uuid.uuid4().hex}.part"
    try:
        trial.open("xb").close()
        trial.unlink()
    except OSError as error:
        _warn_not_kept(folder, error)
        return False
    now = time.time()
    for draft in folder.glob("*.part"):
        with suppress(OSError):  # another user's draft, or one that was removed meanwhile
            if DRAFT.fullmatch(draft.name) and now - draft.stat().st_mtime > SECONDS_UNTIL_ABANDONED:
                draft.unlink()
    return True


def _keep(values: dict[str, torch.Tensor], folder: Path, fingerprint: str) -> None:
    """Write the values into the folder, whole or not at all.

    If several processes write, the last one wins, with the same values. A failure only warns, because the run can go on
    with the values in memory.
    """
    path = folder / f"{fingerprint}.safetensors"
    draft = folder / f"{fingerprint}.{uuid.uuid4().hex}.part"
    content = save(values, {DESCRIBED: f"{fingerprint} {_checksum(values)}"})
    try:
        with draft.open("xb") as file:  # opened so, the file's mode follows the umask; mkstemp's would be 0600
            file.write(content)
        try:
            os.replace(draft, path)
        except OSError as error:  # in a sticky folder, another user's file cannot be replaced
            beside = folder / f"{fingerprint}.{draft.stat().st_uid}.safetensors"
            os.replace(draft, beside)
            logger.warning(
                f"{path} cannot be replaced ({error.strerror}): the reference log-probabilities are kept in {beside}"
            )
    except OSError as error:
        _warn_not_kept(folder, error)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _warn_not_kept(folder: Path, error: OSError) -> None:
    logger.warning(
        f"the reference log-probabilities cannot be kept in {folder} ({error.strerror or error}): this run goes on "
        "with them in memory, the next run computes them again"
    )
