"""The engines' side of a loss with a part that reads sequences and a part that reads tokens.

The two parts are heads by themselves, of the two other kinds. An engine calls both in one visit and adds up their
gradients by the tokens' log-probabilities.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .base import register
from .formula import FormulaHead, PreparedLoss
from .protocol import Head, Mix, check_tensor_names, level_of, normalizers_of, part_of, report_of
from .token_formula import TokenFormulaHead

LEVELS = {"sequence": FormulaHead, "token": TokenFormulaHead}
# the name among a call's tensors of the numbers of tokens in the completion mask
COMPLETION_COUNTS = "completion_counts"


@register("mixed_formula")
@dataclass(frozen=True, eq=False)
class MixedFormulaHead(PreparedLoss):
    """A loss of both levels. Its tensors' names are ``level:name``, beside ``completion_counts``."""

    level: ClassVar[str] = "mixed"

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
        by_name = {}
        for level, kind in LEVELS.items():
            part = part_of(loss, level)
            given = sequence_tensors if level == "sequence" else tensors
            part_tensors = _tensors_of_part(part, level, loss, given)
            head, values = kind.prepare(policy, num_sequences, loss=part, tensors=part_tensors, **options)
            by_name.update({f"{level}:{name}": value for name, value in head.by_name(values).items()})
        weights = by_name.get("sequence:weights")
        if weights is not None and "weights" not in loss.tensor_names():
            # a token has the weight of its sequence, or of its sequence's pair
            by_name["token:weights"] = weights.repeat(num_sequences // len(weights))
        if completion_counts is not None:
            by_name[COMPLETION_COUNTS] = completion_counts
        return cls.of(loss, by_name, reduction=reduction, **fields)

    def part(self, level: str, tensors: tuple[torch.Tensor, ...]) -> tuple[PreparedLoss, tuple[torch.Tensor, ...]]:
        """Return the head of one level, and its tensors."""
        prefix, by_name = f"{level}:", self.by_name(tensors)
        part_tensors = {name.removeprefix(prefix): by_name[name] for name in by_name if name.startswith(prefix)}
        fields = {"reduction": self.reduction, "loss_dtype": self.loss_dtype, "backend": self.backend}
        return LEVELS[level].of(part_of(self.head, level), part_tensors, **fields)

    def completion_counts(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
        """Return the numbers of tokens that the sequences' log-probabilities are of; None: of all labelled ones."""
        return self.by_name(tensors).get(COMPLETION_COUNTS)

    def report(self, logps, token_counts, ref_logps, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        part, part_tensors = self.part("sequence", tensors)
        counts = self.completion_counts(tensors)
        counts = token_counts if counts is None else counts
        return report_of(self.head, logps, counts, ref_logps, part.by_name(part_tensors))

    def metrics(self, reported: dict[str, torch.Tensor], *tensors: torch.Tensor) -> dict[str, Any]:
        part, part_tensors = self.part("sequence", tensors)
        return part.metrics(reported, *part_tensors)

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


def _tensors_of_part(part: Mix, level: str, loss: Head, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a call that belong to the part of one level."""
    names = [name for name in part.tensor_names() if name != "num_items"]
    part_tensors = {name: value for name, value in tensors.items() if name in names}
    if "items" in normalizers_of(part):
        part_tensors["num_items"] = tensors["num_items"]
    weights = tensors.get("weights")
    if weights is not None and level == "sequence" and "weights" not in loss.tensor_names():
        part_tensors["weights"] = weights
    return part_tensors
