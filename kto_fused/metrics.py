"""What is reported beside a loss or log-probabilities: detached device tensors, read without waiting for the device."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch


@dataclass
class LossMetrics:
    """Per-sequence results of a KTO or DPO loss.

    ``logps`` and ``ref_logps`` are [B] log-probabilities in nats (sums, or means with ``average_log_prob``),
    ``rewards`` [B] is beta times their difference; ``simpo``, which has no reference, defines its reward by the
    length-averaged log-probability, beta ``logps`` / ``token_counts`` of sums. ``reference_point`` is KTO's z0 in nats
    (None for pairs). ``desirable`` [B] is KTO's argument; None for pairs, whose first half is chosen and second
    rejected. From logits or hidden states there are also ``token_counts`` [B], and ``entropy``, ``mean_logits`` and
    ``token_accuracy`` [B], means over each sequence's completion tokens (0 where it has none). ``entropy`` is in nats,
    ``mean_logits`` the mean over the vocabulary of the logits after scale, soft cap and temperature, ``token_accuracy``
    the share of tokens that are the model's most likely one, a tie included.

    What was an argument of the loss (``desirable``, log-probabilities) is not copied: written to afterwards, it changes
    here too.
    """

    logps: torch.Tensor
    ref_logps: torch.Tensor | None
    rewards: torch.Tensor
    desirable: torch.Tensor | None = None
    reference_point: torch.Tensor | None = None
    token_counts: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    token_accuracy: torch.Tensor | None = None

    def summary(self) -> dict[str, torch.Tensor]:
        """Batch means under the names TRL logs, as scalar tensors still on the device.

        Rewards and log-probabilities are means over sequences, ``logits/*`` and ``entropy`` over completion tokens.
        ``mean_token_accuracy``, over the completion tokens of the chosen sequences, is logged for pairs alone. The mean
        of a class that the batch does not hold is NaN.

        >>> import torch, kto_fused
        >>> _, metrics = kto_fused.kto_loss_from_logps(
        ...     torch.tensor([-2.0, -3.0]), torch.tensor([-3.0, -3.0]), torch.tensor([True, False]), reference_point=0.0
        ... )
        >>> {name: round(value.item(), 3) for name, value in metrics.summary().items()}["rewards/margins"]
        0.1
        """
        return with_margins({name: total / weight for name, (total, weight) in self.totals().items()})

    def totals(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The (weighted sum, weight) of each mean in ``summary``, float64: these add up over batches and ranks."""
        chosen = self.desirable
        if chosen is None:
            chosen = torch.arange(self.rewards.numel(), device=self.rewards.device) < self.rewards.numel() // 2
        sides = {"chosen": chosen, "rejected": ~chosen}
        totals = {}
        for side, members in sides.items():
            totals[f"rewards/{side}"] = _total(self.rewards, members)
            totals[f"logps/{side}"] = _total(self.logps, members)
            if self.mean_logits is not None:
                totals[f"logits/{side}"] = _total(self.mean_logits, members * self.token_counts)
        if self.desirable is None:
            of_chosen, of_rejected = self.rewards.chunk(2)
            totals["rewards/accuracies"] = _total(of_chosen > of_rejected, torch.ones_like(of_chosen))
            if self.token_accuracy is not None:
                totals["mean_token_accuracy"] = _total(self.token_accuracy, chosen * self.token_counts)
        if self.reference_point is not None:
            # as the losses it is part of: each sequence's
            weight = torch.full_like(self.reference_point, self.rewards.numel())
            totals["kl"] = _total(self.reference_point, weight)
        if self.entropy is not None:
            totals["entropy"] = _total(self.entropy, self.token_counts)
        return totals

    def gathered(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> "LossMetrics":
        """The same of all ranks' sequences; ``gather`` joins the ranks' tensors, one row per sequence or pair."""

        def of_all_ranks(values: torch.Tensor | None) -> torch.Tensor | None:
            if values is None or values.ndim == 0:
                return values
            if self.desirable is None:
                return gather(values.view(2, -1).T.contiguous()).T.flatten()
            return gather(values)

        return replace(self, **{field.name: of_all_ranks(getattr(self, field.name)) for field in fields(self)})


class Totals:
    """Sums of many batches' ``LossMetrics.totals``, on the device until their means are asked for."""

    def __init__(self):
        self.values: dict[str, torch.Tensor] = {}  # name: [2], weighted sum and weight

    def add(self, totals: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        for name, total_and_weight in totals.items():
            values = torch.stack(total_and_weight)
            self.values[name] = self.values[name] + values if name in self.values else values

    def pop(self, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda values: values) -> dict[str, float]:
        """The means, read from the device in one piece, without those of no weight; starts anew. ``reduce`` adds up
        the ranks' tensors.
        """
        if not self.values:
            return {}
        sums = reduce(torch.stack(list(self.values.values()))).tolist()
        means = {name: total / weight for name, (total, weight) in zip(self.values, sums, strict=True) if weight}
        self.values = {}
        return with_margins(means)


@dataclass
class TokenMetrics:
    """What ``linear_token_logps`` finds beside each log-probability, shaped as they are; 0 where a position predicts
    nothing.

    ``entropy`` in nats, ``mean_logits`` the mean of z over the vocabulary, and ``is_top1``: 1 where no token is more
    likely than the target, else 0, as where the log-probability is NaN.

    >>> import torch, kto_fused
    >>> hidden, weight, labels = torch.eye(3)[None], torch.eye(3), torch.tensor([[-100, 0, 2]])
    >>> _, metrics = kto_fused.linear_token_logps(hidden, weight, labels, return_metrics=True)
    >>> metrics.is_top1
    tensor([[1., 0., 0.]])
    """

    entropy: torch.Tensor
    mean_logits: torch.Tensor
    is_top1: torch.Tensor


def _total(values: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum, which a value of weight 0 cannot touch, not even a NaN, and the sum of the weights."""
    weights = weights.double()
    return torch.where(weights > 0, values.double() * weights, 0.0).sum(), weights.sum()


def with_margins(means: dict) -> dict:
    """The means, with the difference of both classes' rewards where the batch holds both."""
    if "rewards/chosen" in means and "rewards/rejected" in means:
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means
