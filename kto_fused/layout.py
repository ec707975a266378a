"""Labels -> which rows of the logits are completion tokens, what each predicts, and which sequence it belongs to."""

import torch

from .backends import may_read

# targets[row] is the token id that a row predicts, or one of:
MASKED = -1  # prompt, padding, or nothing left to predict: log-probability 0, gradient 0, logits never read
INVALID = -2  # a label outside the vocabulary: log-probability NaN


def compute_dtype(values: torch.Tensor) -> torch.dtype:
    """What logits or log-probabilities are computed in, and their loss given in: float64 for float64, else float32."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def row_sequences(cu_seqlens: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The sequence of each packed row. [B+1] -> [N]"""
    rows = torch.arange(num_rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, rows, right=True) - 1


def row_targets(
    labels: torch.Tensor, cu_seqlens: torch.Tensor | None, *, ignore_index: int, shift: bool, vocab_size: int
) -> torch.Tensor:
    """The target of each row of the logits: a token id, ``MASKED`` or ``INVALID``. [B, T] or [N] -> the same shape"""
    targets = labels.long()
    if shift:
        targets = torch.full_like(targets, ignore_index)
        targets[..., :-1] = labels[..., 1:]
        if cu_seqlens is not None:
            # the last row of a sequence would predict the first token of the next
            ends = cu_seqlens[1:].long() - 1
            targets[ends[ends >= 0]] = ignore_index
    is_valid = (targets >= 0) & (targets < vocab_size)
    return torch.where(targets == ignore_index, MASKED, torch.where(is_valid, targets, INVALID))


def check_contents(
    labels: torch.Tensor, cu_seqlens: torch.Tensor | None, *, ignore_index: int, shift: bool, vocab_size: int
) -> None:
    """Raise for label values and offsets that no kernel may follow.

    On a GPU the kernels answer NaN instead, see ``backends.may_read``.
    """
    if not may_read(labels):
        return
    num_rows = labels.shape[-1]
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != num_rows or sorted(offsets) != offsets:
            raise ValueError(f"cu_seqlens must rise from 0 to the {num_rows} packed labels, got {offsets}")
    targets = row_targets(labels, cu_seqlens, ignore_index=ignore_index, shift=shift, vocab_size=vocab_size)
    invalid = (targets == INVALID).nonzero()
    if len(invalid):
        position = invalid[0].tolist()
        position[-1] += int(shift)
        raise IndexError(
            f"labels{position} is {labels[tuple(position)].item()}: expected a token id in [0, {vocab_size}) "
            f"or ignore_index={ignore_index}"
        )
