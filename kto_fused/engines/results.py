"""The named results that the engines hand to each other."""

from typing import Any, NamedTuple

import torch


class RowResults(NamedTuple):
    """What the row operations find in logits, one entry for each of the rows."""

    targets: torch.Tensor  # [rows] int32: a token id, or a mark of ``layout``
    row_max: torch.Tensor  # [rows] the largest u, see ``LogitOptions.factor``
    log_sum: torch.Tensor  # [rows] log sum exp(factor (u - row_max))
    per_token: torch.Tensor  # [4, rows], or [5, rows] with ``sum_squares``: the fields of ``TokenValues``


class TokenValues(NamedTuple):
    """The rows of ``per_token`` [4, rows] or [5, rows], in order; all 0 where a row is masked."""

    logps: torch.Tensor  # log-probability of the target, in nats
    entropy: torch.Tensor  # of the softmax, in nats
    mean_logits: torch.Tensor  # mean of z over the vocabulary
    is_top1: torch.Tensor  # 1 where the target has the largest logit, else 0
    log_sum_squares: torch.Tensor | None = None  # log sum p^2 over the vocabulary; with ``LogitOptions.sum_squares``


def num_token_values(sum_squares: bool) -> int:
    """Return the number of rows of ``per_token``."""
    return len(TokenValues._fields) - (not sum_squares)


class SequenceValues(NamedTuple):
    """What is known of each sequence, each [B]; or of each position by itself, each [rows]."""

    logps: torch.Tensor  # sum (or mean) over completion tokens in nats, float64; float32 or float64 of a position
    token_counts: torch.Tensor  # int64; 1 or 0 of a position
    entropy: torch.Tensor  # this and the next two are means over completion tokens
    mean_logits: torch.Tensor
    token_accuracy: torch.Tensor
    # a mean too; with ``LogitOptions.sum_squares``, for the loss head alone: no function returns it
    log_sum_squares: torch.Tensor | None = None

    @property
    def returned(self) -> tuple[torch.Tensor, ...]:
        """The values that a function returns, for its metrics."""
        return self[:NUM_RETURNED]


NUM_RETURNED = 5


def row_statistics(head: Any, values: SequenceValues | TokenValues) -> dict[str, tuple[torch.Tensor, ...]]:
    """Return the keyword ``statistics`` of a head's call: the values that it asks for by name, in its order."""
    names = getattr(head, "statistics", ())
    return {"statistics": tuple([getattr(values, name) for name in names])} if names else {}


class Gradients(NamedTuple):
    """Gradients by hidden states, LM-head weight and bias; None, or an empty tensor, where none was found."""

    hidden: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


class HiddenResults(NamedTuple):
    """What the forward from hidden states gives. As a list, None is an empty tensor, and without a loss head the list
    ends before ``loss``.
    """

    values: SequenceValues
    ref_logps: torch.Tensor | None  # computed from the reference's hidden states; shaped as ``values.logps``
    gradients: Gradients
    statistics: torch.Tensor | None  # for a backward that computes the logits again
    loss: torch.Tensor | None = None
    head_grads: torch.Tensor | None = None  # [B] d loss / d log-probability, as the head gives it
    reported: tuple[torch.Tensor, ...] = ()  # the head's other results

    def to_list(self) -> list[torch.Tensor]:
        optional = (self.ref_logps, *self.gradients, self.statistics)
        of_head = () if self.loss is None else (self.loss, self.head_grads, *self.reported)
        empty = self.values.logps.new_empty
        return [*self.values.returned, *(empty(0) if x is None else x for x in optional), *of_head]

    @classmethod
    def from_list(cls, outputs: list[torch.Tensor]) -> "HiddenResults":
        logps, token_counts, entropy, mean_logits, token_accuracy, *outputs = outputs
        ref_logps, by_hidden, by_weight, by_bias, statistics, *of_head = outputs
        values = SequenceValues(logps, token_counts, entropy, mean_logits, token_accuracy)
        gradients = Gradients(by_hidden, by_weight, by_bias)
        if not of_head:
            return cls(values, ref_logps, gradients, statistics)
        loss, head_grads, *reported = of_head
        return cls(values, ref_logps, gradients, statistics, loss, head_grads, tuple(reported))
