"""From labels to completion tokens: which rows they are, which token each row predicts, which sequence each belongs to.

A row is one position of the batch: row b T + t of a padded batch [B, T], row t of a packed one [N]. Both engines, and
the plain reference, read labels through these functions.
"""

from dataclasses import dataclass

import torch

from .backends import may_read

# targets[row] is the token id that the row predicts, or one of these marks (kernels/online.py repeats the numbers):
MASKED = -1  # prompt, padding, or nothing left to predict: log-probability 0, gradient 0, logits never read
INVALID = -2  # a label outside the vocabulary: log-probability NaN


def compute_dtype(values: torch.Tensor | torch.dtype) -> torch.dtype:
    """Return the dtype of log-probabilities and loss: float64 for float64 values, else float32."""
    dtype = values if isinstance(values, torch.dtype) else values.dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def gemm_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Return the dtype in which GEMMs read hidden states: autocast's if it is on (not for float64), else their own."""
    device_type = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


def row_sequences(cu_seqlens: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Return the sequence that each packed row belongs to. [B+1] offsets -> [N]"""
    rows = torch.arange(num_rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, rows, right=True) - 1


def row_targets(
    labels: torch.Tensor, cu_seqlens: torch.Tensor | None, *, ignore_index: int, shift: bool, vocab_size: int
) -> torch.Tensor:
    """Return each row's target: a token id, ``MASKED`` or ``INVALID``. [B, T] or [N] labels -> the same shape"""
    targets = labels.long()
    if shift:
        targets = torch.full_like(targets, ignore_index)
        targets[..., :-1] = labels[..., 1:]
        if cu_seqlens is not None:
            # the last row of a sequence must not predict the first token of the next sequence
            num_rows = labels.shape[-1]
            starts = torch.zeros(num_rows + 1, dtype=torch.bool, device=labels.device)
            starts.index_fill_(0, cu_seqlens[1:].long().clamp(0, num_rows), True)
            targets.masked_fill_(starts[1:], ignore_index)
    is_valid = (targets >= 0) & (targets < vocab_size)
    return torch.where(targets == ignore_index, MASKED, torch.where(is_valid, targets, INVALID))


@dataclass(frozen=True)
class CompletionTokens:
    """The N completion tokens of a batch, packed sequence after sequence, and the sequences group after group.

    In the batch, group i holds the sequences i, i + B/group, i + 2 B/group, ...: of pairs, the chosen sequences are the
    first half and the rejected ones the second half. Packed, a group's sequences follow each other.
    """

    rows: torch.Tensor  # [N] int64, indices into the batch's rows
    targets: torch.Tensor  # [N] int32, a token id or INVALID
    offsets: torch.Tensor  # [B+1] int64, where each packed sequence starts
    counts: list[int]  # [B] tokens of each packed sequence, known to the host
    sequences: torch.Tensor | None  # [B] int64, the packed sequences' numbers in the batch; None: they keep their order
    group: int = 1  # sequences in a group
    # [N] factors of the log-probabilities in their sequences' sums; None: 1
    weights: torch.Tensor | None = None

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """Return [B] values of the packed sequences in the batch's order."""
        if self.sequences is None:
            return values
        return torch.empty_like(values).index_copy_(0, self.sequences, values)

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """Return [B] values of the batch's sequences in packed order."""
        return values if self.sequences is None else values[self.sequences]


def completion_tokens(
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *,
    ignore_index: int,
    shift: bool,
    vocab_size: int,
    group: int = 1,
) -> CompletionTokens:
    """Find the completion tokens of labels [B, T], or [N] with offsets, for losses that read ``group`` sequences each.

    The host waits for the device once, for the number of tokens in each sequence.
    """
    layout = {"ignore_index": ignore_index, "shift": shift, "vocab_size": vocab_size}
    targets = row_targets(labels, cu_seqlens, **layout).flatten().int()
    is_token = targets != MASKED
    num_rows = targets.numel()
    if cu_seqlens is None:
        num_sequences = labels.shape[0]
        positions = torch.arange(num_rows, device=labels.device)
        row_sequence = positions // labels.shape[1] if num_rows else positions
        counts = is_token.view(labels.shape).sum(1)
        is_partition = counts.new_ones(1)
    else:
        num_sequences = cu_seqlens.numel() - 1
        row_sequence = row_sequences(cu_seqlens, num_rows).clamp_(0, num_sequences - 1)
        seen = torch.cat([is_token.new_zeros(1, dtype=torch.int64), is_token.cumsum(0)])
        counts = seen[cu_seqlens.long().clamp(0, num_rows)].diff()
        rises = (cu_seqlens.diff() >= 0).all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == num_rows)
        is_partition = rises.long()[None]
    sequences = None
    if group > 1:
        num_groups = num_sequences // group
        sequences = torch.arange(num_sequences, device=labels.device).view(group, num_groups).T.flatten()
        row_sequence = group * (row_sequence % num_groups) + row_sequence // num_groups
        counts = counts[sequences]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    # a stable sort needs no number of tokens from the device, and it runs there while the host waits for that number
    order = torch.where(is_token, row_sequence, num_sequences).argsort(stable=True)
    *host_counts, is_partition = torch.cat([counts, is_partition]).tolist()
    if not is_partition:
        raise _no_partition(num_rows, cu_seqlens.tolist())
    rows = order[: sum(host_counts)]
    return CompletionTokens(rows, targets[rows], offsets, host_counts, sequences, group)


def _no_partition(num_rows: int, offsets: list[int]) -> ValueError:
    return ValueError(f"cu_seqlens must rise from 0 to the {num_rows} packed positions, got {offsets}")


def check_offsets(cu_seqlens: torch.Tensor, num_rows: int) -> None:
    """Raise ``ValueError`` for offsets [B+1] that do not rise from 0 to the number of rows. The host reads them."""
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != num_rows or sorted(offsets) != offsets:
        raise _no_partition(num_rows, offsets)


def check_contents(
    labels: torch.Tensor, cu_seqlens: torch.Tensor | None, *, ignore_index: int, shift: bool, vocab_size: int
) -> None:
    """Raise ``IndexError`` for a label outside the vocabulary, ``ValueError`` for offsets that do not rise from 0 to N.

    Where the host may not read the tensors (``backends.may_read``) nothing is checked, and the kernels give NaN.
    """
    if not may_read(labels):
        return
    if cu_seqlens is not None:
        check_offsets(cu_seqlens, labels.shape[-1])
    targets = row_targets(labels, cu_seqlens, ignore_index=ignore_index, shift=shift, vocab_size=vocab_size)
    invalid = (targets == INVALID).nonzero()
    if len(invalid):
        position = invalid[0].tolist()
        position[-1] += int(shift)
        raise IndexError(
            f"labels{position} is {labels[tuple(position)].item()}: expected a token id in [0, {vocab_size}) "
            f"or ignore_index={ignore_index}"
        )


def scale_grads(head_grads: torch.Tensor, incoming: torch.Tensor) -> torch.Tensor:
    """Return d loss / d log-probability [B]: a head's own gradient [B] times the incoming one [], [B/2] or [B].

    Sequence s belongs to incoming entry s mod their number. A 0 stays a 0 even where the incoming gradient is NaN or
    infinite: a sequence that takes no part keeps a gradient of 0.
    """
    product = head_grads.view(-1, incoming.numel()) * incoming.reshape(1, -1)
    return torch.where(head_grads == 0, head_grads, product.view(-1))
