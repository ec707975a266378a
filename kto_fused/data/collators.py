"""Pad tokenized examples to batches.

``UnpairedCollator`` pads the examples of ``prepare_unpaired``, ``PairedCollator`` those of ``prepare_paired``, and
``CompletionCollator`` those of ``prepare_completions``, or joins packs of them without padding.
"""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from .. import checks

IGNORE_INDEX = -100


@dataclass
class _Padding:
    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        checks.integer("pad_token_id", self.pad_token_id, at_least=0)
        if self.pad_to_multiple_of is not None:
            checks.integer("pad_to_multiple_of", self.pad_to_multiple_of, at_least=1)

    def _pad(
        self, prompts: list[list[int]], completions: list[list[int]], masks: list[list[bool]] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``, each [rows, T] int64.

        Args:
            prompts, completions: token ids of each row.
            masks: which tokens of the completions have a label. None: all of them.
        """
        tokens = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        if masks is not None:
            completions = [
                [token if is_trained else IGNORE_INDEX for token, is_trained in zip(ids, mask, strict=True)]
                for ids, mask in zip(completions, masks, strict=True)
            ]
        labels = [[IGNORE_INDEX] * len(prompt) + ids for prompt, ids in zip(prompts, completions, strict=True)]
        multiple = self.pad_to_multiple_of or 1
        # at least 1: mismatched pairs may all be empty, and models do not take rows without a token
        width = -(-max(1, *map(len, tokens)) // multiple) * multiple

        def padded(rows: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.int64)

        return {
            "input_ids": padded(tokens, self.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in tokens], 0),
            "labels": padded(labels, IGNORE_INDEX),
        }


@dataclass
class UnpairedCollator(_Padding):
    """Pads examples of ``prepare_unpaired`` to a batch, on the right.

    Args:
        pad_token_id: fills ``input_ids`` behind each row.
        pad_to_multiple_of: T becomes a multiple of this.

    Returns:
        A call on a list of examples returns a dictionary:

        - ``input_ids``, ``attention_mask``, ``labels`` [B, T] int64, and ``desirable`` [B] bool. Prompts, padding and
          tokens that ``completion_mask`` leaves out have the label -100.
        - ``kl_input_ids``, ``kl_attention_mask``, ``kl_labels`` [B, T'] int64, if the examples have
          ``kl_completion_ids``. A row without a mismatched completion holds its prompt and no label.
        - ``weights``, ``ref_logps`` and ``ref_kl_logps`` [B] float64, if the examples have ``weight``, ``ref_logps``
          and ``ref_kl_logps``.
        - ``objective`` [B] int64, if the examples have it: the number of the example's objective.

    >>> from kto_fused.preference_data import UnpairedCollator
    >>> batch = UnpairedCollator(pad_token_id=0)([
    ...     {"prompt_ids": [5, 6], "completion_ids": [7], "label": True},
    ...     {"prompt_ids": [4], "completion_ids": [3], "label": False},
    ... ])
    >>> batch["labels"].tolist()
    [[-100, -100, 7], [-100, 3, -100]]
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        columns = {column: [example[column] for example in examples] for column in examples[0]}
        batch = self._pad(columns["prompt_ids"], columns["completion_ids"], columns.get("completion_mask"))
        batch["desirable"] = torch.tensor(columns["label"], dtype=torch.bool)
        if "kl_completion_ids" in columns:
            mismatched = self._pad(
                columns["prompt_ids"], columns["kl_completion_ids"], columns.get("kl_completion_mask")
            )
            batch |= {f"kl_{name}": tensor for name, tensor in mismatched.items()}
        for name in {"ref_logps", "ref_kl_logps"} & columns.keys():
            batch[name] = torch.tensor(columns[name], dtype=torch.float64)
        if "weight" in columns:
            batch["weights"] = torch.tensor(columns["weight"], dtype=torch.float64)
        if "objective" in columns:
            batch["objective"] = torch.tensor(columns["objective"])
        return batch


@dataclass
class PairedCollator(_Padding):
    """Pads examples of ``prepare_paired`` to a batch, on the right, chosen before rejected.

    The first dimension counts pairs, so that code which counts or splits a batch by its rows keeps pairs whole.

    Args:
        pad_token_id: fills ``input_ids`` behind each row.
        pad_to_multiple_of: T becomes a multiple of this.

    Returns:
        A call on a list of examples returns a dictionary of ``input_ids``, ``attention_mask``, ``labels`` [B, 2, T]
        int64, ``ref_logps`` [B, 2] float64 if the examples have ``ref_chosen_logps`` and ``ref_rejected_logps``, and
        ``weights`` and ``margin`` [B] float64 and ``objective`` [B] int64 if they have ``weight``, ``margin`` and
        ``objective``. Prompts, padding and tokens that ``chosen_mask`` or ``rejected_mask`` leave out have the label
        -100.

    >>> from kto_fused.preference_data import PairedCollator
    >>> batch = PairedCollator(pad_token_id=0)([{"prompt_ids": [5], "chosen_ids": [7, 8], "rejected_ids": [9]}])
    >>> batch["input_ids"].tolist()
    [[[5, 7, 8], [5, 9, 0]]]
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        prompts = [example["prompt_ids"] for example in examples for _ in range(2)]
        completions = [example[side] for example in examples for side in ("chosen_ids", "rejected_ids")]
        masks = None
        if "chosen_mask" in examples[0]:
            masks = [example[side] for example in examples for side in ("chosen_mask", "rejected_mask")]
        rows = self._pad(prompts, completions, masks)
        batch = {name: tensor.view(len(examples), 2, -1) for name, tensor in rows.items()}
        if {"ref_chosen_logps", "ref_rejected_logps"} <= examples[0].keys():
            logps = [[example["ref_chosen_logps"], example["ref_rejected_logps"]] for example in examples]
            batch["ref_logps"] = torch.tensor(logps, dtype=torch.float64)
        for column, name in (("weight", "weights"), ("margin", "margin")):
            if column in examples[0]:
                batch[name] = torch.tensor([example[column] for example in examples], dtype=torch.float64)
        if "objective" in examples[0]:
            batch["objective"] = torch.tensor([example["objective"] for example in examples])
        return batch


@dataclass
class CompletionCollator(_Padding):
    """Makes batches of the examples of ``prepare_completions``, or of the packs of ``pack_completions``.

    Args:
        pad_token_id: fills ``input_ids`` behind each row of examples, and the end of the row of packs.
        pad_to_multiple_of: T or N becomes a multiple of this.

    Returns:
        A call on a list of examples pads them on the right. It returns a dictionary of ``input_ids``,
        ``attention_mask`` and ``labels`` [B, T] int64, and ``weights`` [B] float64 if they have ``weight``. Prompts,
        padding and tokens that ``completion_mask`` leaves out have the label -100.

        A call on a list of packs joins them to one row of N tokens. The dictionary then holds ``input_ids``,
        ``attention_mask`` (0 for padding), ``labels`` and ``position_ids`` [1, N] int64, and ``cu_seqlens`` int32, the
        offsets of the sequences; also their ``weights``, float64, if the packs have them. Padding is one more sequence.
        The positions of every sequence begin at 0, by which a model's attention tells the sequences apart.

    >>> from kto_fused.preference_data import CompletionCollator
    >>> collator = CompletionCollator(pad_token_id=0)
    >>> collator([{"prompt_ids": [5, 6], "completion_ids": [7]}])["labels"].tolist()
    [[-100, -100, 7]]
    >>> batch = collator([{"input_ids": [5, 7, 8, 9], "labels": [-100, 7, -100, 9], "lengths": [2, 2]}])
    >>> batch["position_ids"].tolist(), batch["cu_seqlens"].tolist()
    ([[0, 1, 0, 1]], [0, 2, 4])
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        columns = {column: [example[column] for example in examples] for column in examples[0]}
        if "lengths" in columns:
            names = [name for name in ("input_ids", "labels", "lengths", "weights") if name in columns]
            return self._join(**{name: list(chain(*columns[name])) for name in names})
        batch = self._pad(columns["prompt_ids"], columns["completion_ids"], columns.get("completion_mask"))
        if "weight" in columns:
            batch["weights"] = torch.tensor(columns["weight"], dtype=torch.float64)
        return batch

    def _join(
        self, input_ids: list[int], labels: list[int], lengths: list[int], weights: list[float] | None = None
    ) -> dict[str, torch.Tensor]:
        rest = -len(input_ids) % (self.pad_to_multiple_of or 1)
        mask = [1] * len(input_ids) + [0] * rest
        lengths = torch.tensor(lengths + [rest] * (rest > 0))
        ends = lengths.cumsum(0)
        positions = torch.arange(len(mask)) - (ends - lengths).repeat_interleave(lengths)
        of_sequences = {}
        if weights is not None:
            of_sequences["weights"] = torch.tensor(weights + [1.0] * (rest > 0), dtype=torch.float64)
        return of_sequences | {
            "input_ids": torch.tensor([input_ids + [self.pad_token_id] * rest]),
            "attention_mask": torch.tensor([mask]),
            "labels": torch.tensor([labels + [IGNORE_INDEX] * rest]),
            "position_ids": positions[None],
            "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int32), ends.to(torch.int32)]),
        }
