"""Hashes (XXH3, 128 bits) that are equal for equal data and for equal weights, and differ otherwise.

A resumed run and a cache of reference log-probabilities compare them to notice other data or another model.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash
from datasets import Dataset
from torch import nn
from torch.distributed.tensor import DTensor

ROWS_AT_A_TIME = 1000  # of a dataset that are in memory


def hash_json(value: Any) -> str:
    """Return the hash of a JSON value, whatever the order of its keys."""
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


# ---- data ---------------------------------------------------------------------------------------------------------


def hash_data(dataset: Dataset, columns: Iterable[str]) -> str:
    """Return the hash of the names and values of ``columns``, whatever file, cache or transform they came through."""
    names = sorted(columns)
    digest = xxhash.xxh3_128(repr(names).encode())
    for rows in dataset.select_columns(names).with_format("arrow").iter(ROWS_AT_A_TIME):
        for name in names:
            _add_values(digest, rows[name].combine_chunks())
    return digest.hexdigest()


def _add_values(digest: xxhash.xxh3_128, values: pa.Array) -> None:
    """Add the values alone; the offsets and buffers that Arrow keeps with them depend on how a dataset was made."""
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        digest.update(values.value_lengths().fill_null(-1).to_numpy().astype(np.int64))
        values = values.flatten()
    if pa.types.is_integer(values.type) or pa.types.is_boolean(values.type):
        values = values.cast(pa.int64())
    digest.update(json.dumps(values.null_count and values.is_null().to_pylist()).encode())
    if pa.types.is_integer(values.type):
        digest.update(values.fill_null(0).to_numpy())
    else:
        digest.update(repr(values.to_pylist()).encode())


# ---- weights ------------------------------------------------------------------------------------------------------


def hash_weights(model: nn.Module, counts: Callable[[str, torch.Tensor], bool] = lambda name, tensor: True) -> str:
    """Return the hash of the names, dtypes and values of a model's parameters and buffers.

    Weights that are sharded over ranks hash as whole ones do; every rank must ask.

    Args:
        model: the model, without wrappers.
        counts: ``counts(name, tensor)`` says whether a tensor is part of the hash.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if counts(name, tensor):
            add_tensor(digest, name, tensor)
    return digest.hexdigest()


def add_tensor(digest: xxhash.xxh3_128, name: str, tensor: torch.Tensor) -> None:
    """Add a tensor's name, dtype, shape and values to ``digest``."""
    with _whole(tensor) as values:
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        if not values.is_meta:  # accelerate loads the weights on the first process alone, and its hash is used
            digest.update(values.contiguous().cpu().flatten().view(torch.uint8).numpy())


@contextmanager
def _whole(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the whole tensor where FSDP2 or ZeRO-3 shards it; every rank must ask for it."""
    values = tensor.detach()
    if isinstance(values, DTensor):
        yield values.full_tensor()
    elif hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor.detach()
    else:
        yield values
