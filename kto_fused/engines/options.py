"""How logits or hidden states become log-probabilities."""

from dataclasses import dataclass

import torch

from .layout import compute_dtype


@dataclass(frozen=True)
class LogitOptions:
    """How logits and labels become log-probabilities, and how the gradient is written; validated by the caller."""

    ignore_index: int = -100
    shift: bool = True
    average_log_prob: bool = False
    temperature: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    inplace_backward: bool = False
    backend: str = "torch"

    @property
    def factor(self) -> float:
        """z = factor * u, with u = softcap tanh(scale x / softcap), or the logits x themselves without a soft cap."""
        return (1.0 if self.logit_softcap is not None else self.logit_scale) / self.temperature


@dataclass(frozen=True)
class HiddenOptions:
    """How hidden states become log-probabilities; validated by the caller."""

    logits: LogitOptions
    dtype: torch.dtype  # what the GEMMs read
    ref_dtype: torch.dtype  # the same, for the reference's
    chunk_bytes: int
    # for which of hidden, weight and bias a gradient is wanted
    needs: tuple[bool, bool, bool] = (False, False, False)
    # whether results are each position's own, not each sequence's
    per_position: bool = False

    @property
    def is_head_trained(self) -> bool:
        return self.needs[1] or self.needs[2]

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.dtype)
