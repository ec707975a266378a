"""Token-level loss heads: an engine calls them on the completion tokens that it has just visited.

A token's loss reads that token alone. Its gradient is known with its log-probability, so chunks may split sequences.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..heads import base as heads
from .backends import opaque
from .layout import MASKED, CompletionTokens, row_sequences
from .results import TokenValues, row_statistics


def is_token_level(head: Any) -> bool:
    return getattr(head, "level", "sequence") == "token"


def reads_tokens(head: Any) -> bool:
    """Whether a head has a part that reads single tokens."""
    return is_token_level(head) or is_mixed(head)


def is_mixed(head: Any) -> bool:
    """Whether a head has a part of each level: ``head.part(level, tensors)`` is that part with its tensors."""
    return getattr(head, "level", "sequence") == "mixed"


@dataclass(frozen=True)
class TokenCall:
    """A token-level head with its tensors for N completion tokens."""

    head: Any
    counts: torch.Tensor  # [N] int64, the numbers of tokens in their sequences
    weights: torch.Tensor  # [L, N] float64, the factors of the tokens' losses, for a sum of L losses
    tensors: tuple[torch.Tensor, ...]  # [N] each, or scalars

    @classmethod
    def of(
        cls,
        head: Any,
        tensors: tuple[torch.Tensor, ...],
        rows: torch.Tensor,
        sequence: torch.Tensor,
        token_counts: torch.Tensor,
        *,
        shift: bool,
    ) -> "TokenCall":
        """Gather the tensors' entries of the tokens at ``rows`` [N], which belong to the sequences ``sequence`` [N].

        A tensor has two dimensions and an entry for each label, or [B] for the batch's sequences, or is a scalar.
        """

        def gather(x: torch.Tensor) -> torch.Tensor:
            if x.ndim == 0:
                return x
            return x.flatten()[rows + int(shift)] if x.ndim == 2 else x[sequence]

        weights = head.weights_of(token_counts, tensors)[:, sequence]
        return cls(head, token_counts[sequence], weights, tuple(gather(x) for x in tensors))

    @classmethod
    def of_packed(
        cls,
        head: Any,
        tensors: tuple[torch.Tensor, ...],
        tokens: CompletionTokens,
        *,
        shift: bool,
    ) -> "TokenCall":
        """The call on packed completion tokens."""
        counts = tokens.offsets.diff()
        index = torch.arange(len(counts), device=counts.device)
        sequence = tokens.pack(index).repeat_interleave(counts, output_size=len(tokens.rows))
        return cls.of(head, tensors, tokens.rows, sequence, tokens.unpack(counts), shift=shift)

    def __call__(self, values: TokenValues, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss of tokens start..stop, a float64 scalar, and its gradient by their log-probabilities.

        ``values`` are those of these tokens alone.
        """
        tensors = tuple(x if x.ndim == 0 else x[start:stop] for x in self.tensors)
        of_tokens = values.logps, self.counts[start:stop], self.weights[:, start:stop], tensors
        return self.head.on_tokens(*of_tokens, **row_statistics(self.head, values))


def _fake_token_loss(
    logps, targets, token_counts, cu_seqlens, tensors, statistics, shift, name, reduction, loss_dtype, *_
):
    return logps.new_empty((), dtype=loss_dtype), torch.empty_like(logps)


@opaque(
    fake=_fake_token_loss,
    schema="(Tensor logps, Tensor targets, Tensor token_counts, Tensor? cu_seqlens, Tensor[] tensors, "
    "Tensor[] statistics, bool shift, str name, str reduction, ScalarType loss_dtype, str[] texts, float[] numbers) "
    "-> (Tensor, Tensor)",
    waits=True,
)
def token_loss(
    logps, targets, token_counts, cu_seqlens, tensors, statistics, shift, name, reduction, loss_dtype, texts, numbers
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of all rows' log-probabilities [rows] and its gradient by each; 0 where a row is masked.

    ``statistics`` are the rows' values that the head asks for, [rows] each.
    """
    head = heads.rebuild(heads.FlatHead(name, reduction, loss_dtype, texts, numbers))
    rows, num_rows = (targets != MASKED).nonzero().flatten(), len(targets)
    if cu_seqlens is None:
        sequence = rows // max(1, num_rows // len(token_counts))
    else:
        sequence = row_sequences(cu_seqlens, num_rows)[rows]
    call = TokenCall.of(head, tuple(tensors), rows, sequence, token_counts, shift=shift)
    asked = dict(zip(getattr(head, "statistics", ()), [values[rows] for values in statistics], strict=True))
    values = TokenValues(**{**dict.fromkeys(TokenValues._fields), **asked, "logps": logps[rows]})
    value, grads = call(values, 0, len(rows))
    return value.to(loss_dtype), torch.zeros_like(logps).index_copy_(0, rows, grads)
