"""The engines' side of a loss with a part that reads sequences and a part that reads tokens.

The two parts are heads by themselves, of the two other kinds. An engine calls both in one visit and adds up their
gradients by the tokens' log-probabilities.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .base import register
from .formula import FormulaHead, PreparedLoss
from .protocol import Head, Mix, check_tensor_names, level_of, normalizers_of, part_of
from .token_formula import TokenFormulaHead

LEVELS = {"sequence": FormulaHead, "token": TokenFormulaHead}
# the name among a call's tensors of the numbers of tokens in the completion mask
COMPLETION_COUNTS = "completion_counts"


@register("mixed_formula")
@dataclass(frozen=True, eq=False)
class MixedFormulaHead(PreparedLoss):
    """A loss of both levels. Its tensors' names are ``level:name``, beside ``completion_counts``."""

    level: ClassVar[str] = "mixed"

    @property
    def group(self) -> int | None:
        return self.head.group

    @property
    def needs_reference(self) -> bool:
        return self.head.needs_reference

    @classmethod
    def prepare(
        cls,
        policy: torch.Tensor,
        num_sequences: int,
        *,
        loss: Head,
        tensors: dict[str, torch.Tensor],
        reduction: str,
        average_log_prob: bool,
        sequence_tensors: dict[str, torch.Tensor],
        completion_counts: torch.Tensor | None = None,
        **fields: Any,
    ) -> tuple["MixedFormulaHead", tuple[torch.Tensor, ...]]:
        """Check a call's tensors. Returns the head and its tensors.

        ``sequence_tensors`` are ``tensors`` with those summed that the sequence-level part reads as sums.
        ``completion_counts`` [B] are the numbers of tokens in the completion mask, None where no mask came.
        """
        if reduction == "none":
            raise ValueError(
                f"reduction='none' has no meaning for {loss!r}, which adds losses of tokens to losses of sequences: "
                "expected 'mean' or 'sum'"
            )
        if completion_counts is None and needs_completion_mask(loss):
            raise TypeError(
                f"{loss!r} needs the tensor completion_mask [B, T], which tells completions from prompts: pass it by "
                "name, and labels with the prompts' tokens"
            )
        check_tensor_names(loss, tensors)
        found = [name for name in loss.statistics() if tensors.get(name) is not None]
        if found:
            raise TypeError(
                f"{found} came for {loss!r}, but are found in the logits, without a gradient: leave them out"
            )
        options = {"reduction": reduction, "average_log_prob": average_log_prob, **fields}
        named = {}
        for level, kind in LEVELS.items():
            part = part_of(loss, level)
            given = sequence_tensors if level == "sequence" else tensors
            own = _tensors_of(part, level, loss, given)
            head, values = kind.prepare(policy, num_sequences, loss=part, tensors=own, **options)
            named.update({f"{level}:{name}": value for name, value in head.named(values).items()})
        weights = named.get("sequence:weights")
        if weights is not None and "weights" not in loss.tensor_names():
            # a token has the weight of its sequence, or of its sequence's pair
            named["token:weights"] = weights.repeat(num_sequences // len(weights))
        if completion_counts is not None:
            named[COMPLETION_COUNTS] = completion_counts
        return cls.of(loss, named, reduction=reduction, **fields)

    def part(self, level: str, tensors: tuple[torch.Tensor, ...]) -> tuple[PreparedLoss, tuple[torch.Tensor, ...]]:
        """Return the head of one level, and its tensors."""
        prefix = f"{level}:"
        own = {
            name.removeprefix(prefix): value for name, value in self.named(tensors).items() if name.startswith(prefix)
        }
        fields = {"reduction": self.reduction, "loss_dtype": self.loss_dtype, "backend": self.backend}
        return LEVELS[level].of(part_of(self.head, level), own, **fields)

    def completion_counts(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
        """Return the numbers of tokens that the sequences' log-probabilities are of; None: of all labelled ones."""
        return self.named(tensors).get(COMPLETION_COUNTS)

    def report(self, logps, token_counts, ref_logps, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        part, own = self.part("sequence", tensors)
        named = {name: value for name, value in part.named(own).items() if name in self.head.tensor_names()}
        counts = self.completion_counts(tensors)
        sequences = logps, token_counts if counts is None else counts, ref_logps if self.needs_reference else None
        return {**Head.report(self.head, *sequences), **self.head.report(*sequences, **named)}

    def metrics(self, reported: dict[str, torch.Tensor], *tensors: torch.Tensor) -> dict[str, Any]:
        part, own = self.part("sequence", tensors)
        return part.metrics(reported, *own)

    @staticmethod
    def outputs(logps: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """Empty tensors like the loss and the sequence-level part's gradient by the sequences' log-probabilities."""
        *_, loss_dtype = arguments
        return logps.new_empty((), dtype=loss_dtype), logps.new_empty(logps.shape[0], dtype=torch.float64)


def needs_completion_mask(loss: Head) -> bool:
    """Whether a loss of both levels by itself is among the parts: its sequences are the completions alone."""
    if isinstance(loss, Mix):
        return any(needs_completion_mask(part) for part in loss.heads)
    return level_of(loss) == "mixed"


def _tensors_of(part: Mix, level: str, loss: Head, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a call that belong to the part of one level."""
    own = {name: value for name, value in tensors.items() if name in part.tensor_names() and name != "num_items"}
    if "items" in normalizers_of(part):
        own["num_items"] = tensors["num_items"]
    weights = tensors.get("weights")
    if weights is not None and level == "sequence" and "weights" not in loss.tensor_names():
        own["weights"] = weights
    return own
