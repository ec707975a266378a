"""Labels -> which rows are completion tokens, what each predicts, and which sequence it belongs to."""

from dataclasses import dataclass

import torch

from .backends import may_read

# targets[row] is the token id that a row predicts, or one of these (kernels/online.py repeats the numbers):
MASKED = -1  # prompt, padding, or nothing left to predict: log-probability 0, gradient 0, logits never read
INVALID = -2  # a label outside the vocabulary: log-probability NaN


def compute_dtype(values: torch.Tensor | torch.dtype) -> torch.dtype:
    """What logits or log-probabilities are computed in, and their loss given in: float64 for float64, else float32."""
    dtype = values if isinstance(values, torch.dtype) else values.dtype
    return torch.float64 if dtype == torch.float64 else torch.float32


def gemm_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What a GEMM of hidden states reads: their own dtype, or autocast's, which leaves float64 alone."""
    device_type = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden.dtype


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
            num_rows = labels.shape[-1]
            starts = torch.zeros(num_rows + 1, dtype=torch.bool, device=labels.device)
            starts.index_fill_(0, cu_seqlens[1:].long().clamp(0, num_rows), True)
            targets.masked_fill_(starts[1:], ignore_index)
    is_valid = (targets >= 0) & (targets < vocab_size)
    return torch.where(targets == ignore_index, MASKED, torch.where(is_valid, targets, INVALID))


@dataclass(frozen=True)
class CompletionTokens:
    """The N completion tokens of a batch, packed sequence after sequence; where they are paired, pair after pair.

    ``sequences[i]`` is the i-th packed sequence; None where they keep their order.
    """

    rows: torch.Tensor  # [N] int64, in hidden states flattened to rows
    targets: torch.Tensor  # [N] int32, a token id or INVALID
    offsets: torch.Tensor  # [B+1] int64, where each packed sequence starts
    counts: list[int]  # [B] tokens of each packed sequence, known to the host
    sequences: torch.Tensor | None  # [B] int64

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """[B] values of the packed sequences, in the batch's own order."""
        if self.sequences is None:
            return values
        return torch.empty_like(values).index_copy_(0, self.sequences, values)

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """[B] values of the batch's sequences, in packed order."""
        return values if self.sequences is None else values[self.sequences]


def completion_tokens(
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *,
    ignore_index: int,
    shift: bool,
    vocab_size: int,
    paired: bool = False,
) -> CompletionTokens:
    """Find the completion tokens of labels [B, T], or [N] with offsets. Waits for the device once, for their counts."""
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
    if paired:
        half = num_sequences // 2
        sequences = torch.arange(num_sequences, device=labels.device).view(2, half).T.flatten()
        row_sequence = 2 * (row_sequence % half) + row_sequence // half
        counts = counts[sequences]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    # a stable sort packs without asking the device how many there are, and runs while the host waits for that
    order = torch.where(is_token, row_sequence, num_sequences).argsort(stable=True)
    *host_counts, is_partition = torch.cat([counts, is_partition]).tolist()
    if not is_partition:
        raise _no_partition(num_rows, cu_seqlens)
    rows = order[: sum(host_counts)]
    return CompletionTokens(rows, targets[rows], offsets, host_counts, sequences)


def _no_partition(num_rows: int, cu_seqlens: torch.Tensor) -> ValueError:
    return ValueError(f"cu_seqlens must rise from 0 to the {num_rows} packed labels, got {cu_seqlens.tolist()}")


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
            raise _no_partition(num_rows, cu_seqlens)
    targets = row_targets(labels, cu_seqlens, ignore_index=ignore_index, shift=shift, vocab_size=vocab_size)
    invalid = (targets == INVALID).nonzero()
    if len(invalid):
        position = invalid[0].tolist()
        position[-1] += int(shift)
        raise IndexError(
            f"labels{position} is {labels[tuple(position)].item()}: expected a token id in [0, {vocab_size}) "
            f"or ignore_index={ignore_index}"
        )
