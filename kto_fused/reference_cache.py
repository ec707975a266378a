"""The reference model's log-probabilities of a dataset, computed once and kept on disk.

A file is named by a fingerprint of what it depends on: the reference's weights, configuration and precision, the token
ids (hence data and tokenizer), and the options of the log-probability. Whatever changes one of them names another file.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import torch
import xxhash
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

ROWS_AT_A_TIME = 1000


def add_ref_logps(
    dataset: Dataset,
    columns: tuple[str, ...],
    batches: Callable[[Dataset], Iterator[tuple[torch.Tensor, ...]]],
    folder: str | None,
    depends_on: tuple[str, ...],
    on_every_rank: Callable[[bool], bool],
) -> Dataset:
    """``dataset`` with the float64 columns ``columns``, from the disk or from ``batches``.

    ``batches(dataset)`` yields, batch after batch in the dataset's order, one [b] tensor per column, the same on all
    processes. It is given the dataset longest first, so that batches pad little and the largest comes first.
    ``on_every_rank(flag)`` says whether a flag is true on all processes: they compute together, or not at all.
    """
    name = xxhash.xxh3_128_hexdigest("\n".join([hash_tokens(dataset), *columns, *depends_on]).encode())
    path = Path(folder or Path(huggingface_hub.constants.HF_HOME) / "kto_fused") / f"{name}.safetensors"
    values = _read(path, columns, len(dataset))
    if not on_every_rank(values is not None):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()  # what could not be kept is not computed
        order = np.argsort(-np.asarray(dataset["length"]), kind="stable")
        found = [torch.cat(parts).double().cpu() for parts in zip(*batches(dataset.select(order)), strict=True)]
        values = {}
        for column, sorted_values in zip(columns, found, strict=True):
            values[column] = torch.empty_like(sorted_values)
            values[column][torch.from_numpy(order)] = sorted_values
        _write(path, values)
    for column in columns:
        dataset = dataset.add_column(column, values[column].numpy())
    return dataset


def hash_tokens(dataset: Dataset) -> str:
    """Of every value in the dataset."""
    digest = xxhash.xxh3_128(repr(dataset.features).encode())
    for batch in dataset.with_format("arrow").iter(ROWS_AT_A_TIME):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_table(batch.combine_chunks())
        digest.update(sink.getvalue())
    return digest.hexdigest()


def hash_model(model: PreTrainedModel, adapter_prefix: str | None = None) -> str:
    """Of configuration and weights; without the adapters', whose names hold ``adapter_prefix``."""
    irrelevant = ("_name_or_path", "use_cache")  # Trainer sets the latter, of the policy alone
    configuration = {key: value for key, value in model.config.to_diff_dict().items() if key not in irrelevant}
    digest = xxhash.xxh3_128(repr(sorted(configuration.items(), key=str)).encode())
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if adapter_prefix is None or adapter_prefix not in name:
            with _whole(tensor) as values:
                values = values.contiguous().cpu()
                digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
                digest.update(values.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def _whole(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of what FSDP2 or ZeRO-3 shards each rank asks for the whole, so that they hash the same."""
    values = tensor.detach()
    if isinstance(values, DTensor):
        yield values.full_tensor()
    elif hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor.detach()
    else:
        yield values


def _read(path: Path, columns: tuple[str, ...], length: int) -> dict[str, torch.Tensor] | None:
    """What is on the disk, or None where it is not there, broken or of another length."""
    try:
        values = load_file(path)
    except Exception:  # missing, cut off or foreign: computed again, and replaced
        return None
    is_whole = set(values) == set(columns) and all(column.shape == (length,) for column in values.values())
    return values if is_whole else None


def _write(path: Path, values: dict[str, torch.Tensor]) -> None:
    """Whole or not at all; of several processes the last wins, with the same content."""
    handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        save_file(values, draft)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
