"""What a loss reports beside its value: detached device tensors, read without waiting for the device."""

from dataclasses import dataclass

import torch


@dataclass
class LossMetrics:
    """Per-sequence results of a KTO or DPO loss.

    ``logps`` and ``ref_logps`` are [B] log-probabilities in nats (sums, or means with ``average_log_prob``),
    ``rewards`` [B] is beta times their difference, ``reference_point`` is KTO's z0 in nats (None for pairs).
    ``desirable`` [B] is KTO's argument; None for pairs, whose first half is chosen and second rejected. From logits
    there are also ``token_counts`` [B], and ``entropy`` and ``mean_logits`` [B], means over each sequence's completion
    tokens (0 where it has none).
    """

    logps: torch.Tensor
    ref_logps: torch.Tensor | None
    rewards: torch.Tensor
    desirable: torch.Tensor | None = None
    reference_point: torch.Tensor | None = None
    token_counts: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None

    def summary(self) -> dict[str, torch.Tensor]:
        """Batch means under the names TRL logs, as scalar tensors still on the device.

        Rewards and log-probabilities are means over sequences, ``logits/*`` and ``entropy`` over completion tokens.
        The mean of a class that the batch does not hold is NaN.

        >>> import torch, kto_fused
        >>> _, metrics = kto_fused.kto_loss_from_logps(
        ...     torch.tensor([-2.0, -3.0]), torch.tensor([-3.0, -3.0]), torch.tensor([True, False]), reference_point=0.0
        ... )
        >>> {name: round(value.item(), 3) for name, value in metrics.summary().items()}["rewards/margins"]
        0.1
        """
        chosen = self.desirable
        if chosen is None:
            chosen = torch.arange(self.rewards.numel(), device=self.rewards.device) < self.rewards.numel() // 2
        sides = {"chosen": chosen, "rejected": ~chosen}
        summary = {}
        for side, members in sides.items():
            summary[f"rewards/{side}"] = _mean(self.rewards, members)
            summary[f"logps/{side}"] = _mean(self.logps, members)
            if self.mean_logits is not None:
                summary[f"logits/{side}"] = _mean(self.mean_logits, members * self.token_counts)
        summary["rewards/margins"] = summary["rewards/chosen"] - summary["rewards/rejected"]
        if self.desirable is None:
            of_chosen, of_rejected = self.rewards.chunk(2)
            summary["rewards/accuracies"] = (of_chosen > of_rejected).double().mean()
        if self.reference_point is not None:
            summary["kl"] = self.reference_point
        if self.entropy is not None:
            summary["entropy"] = _mean(self.entropy, self.token_counts)
        return summary


def _mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean that a value of weight 0 cannot touch, not even a NaN; NaN where no weight is left."""
    weights = weights.double()
    return torch.where(weights > 0, values.double() * weights, 0.0).sum() / weights.sum()
