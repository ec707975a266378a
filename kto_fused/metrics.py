"""The metrics that come with a loss or with log-probabilities: detached tensors on the device.

``LossMetrics`` and ``TokenMetrics`` belong to one call. ``Totals`` adds up many calls for a trainer's log. Nothing here
waits for the device until the means are read.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch


@dataclass
class LossMetrics:
    """Per-sequence results of a loss, each [B].

    - ``logps``, ``ref_logps``: log-probabilities in nats; sums over completion tokens, or means with
      ``average_log_prob``
    - ``rewards``: beta times their difference. ``simpo`` and ``orpo`` have no reference and compare length-averaged
      log-probabilities, so their rewards are beta ``logps`` / ``token_counts`` for sums
    - ``desirable``: KTO's argument; None for pairs, whose first half is chosen and whose second half is rejected
    - ``is_paired``: whether sequences without ``desirable`` are such pairs; True unless the loss reads single sequences
    - ``reported``: what else the loss reports, by name: tensors of one dimension or none
    - ``reference_point``: KTO's z0 in nats, a scalar; None for pairs

    A loss from logits or hidden states also fills the next fields. The last three are means over a sequence's
    completion tokens, 0 for a sequence without any.

    - ``token_counts``: number of completion tokens
    - ``entropy``: in nats
    - ``mean_logits``: mean over the vocabulary of the logits after scale, soft cap and temperature
    - ``token_accuracy``: share of tokens that are the model's most likely ones, ties included

    Arguments of the loss (``desirable``, log-probabilities) are not copied: a later write to them shows here too.
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
    is_paired: bool = True
    reported: dict[str, torch.Tensor] = field(default_factory=dict)

    def summary(self) -> dict[str, torch.Tensor]:
        """Return the batch's means under the names that TRL logs, as scalar tensors on the device.

        Rewards and log-probabilities are means over sequences; ``logits/*`` and ``entropy`` are means over completion
        tokens. Pairs alone have ``mean_token_accuracy``, over the chosen sequences' completion tokens, and
        ``rewards/accuracies``, the share whose chosen reward is the higher one. A tie counts one half, where TRL counts
        it as 0. The mean of a class that the batch does not hold is NaN.

        >>> import torch, kto_fused
        >>> _, metrics = kto_fused.kto_loss_from_logps(
        ...     torch.tensor([-2.0, -3.0]), torch.tensor([-3.0, -3.0]), torch.tensor([True, False]), reference_point=0.0
        ... )
        >>> {name: round(value.item(), 3) for name, value in metrics.summary().items()}["rewards/margins"]
        0.1
        """
        return with_margins({name: total / weight for name, (total, weight) in self.totals().items()})

    def totals(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return the (weighted sum, weight) of each mean in ``summary``, in float64. Both add up over ranks."""
        chosen, is_paired = self.desirable, self.desirable is None and self.is_paired
        if is_paired:
            chosen = torch.arange(self.rewards.numel(), device=self.rewards.device) < self.rewards.numel() // 2
        if chosen is None:
            sides = {"": torch.ones_like(self.rewards, dtype=torch.bool)}
        else:
            sides = {"/chosen": chosen, "/rejected": ~chosen}
        totals = {}
        for side, members in sides.items():
            totals[f"rewards{side}"] = weighted_total(self.rewards, members)
            totals[f"logps{side}"] = weighted_total(self.logps, members)
            if self.mean_logits is not None:
                totals[f"logits{side}"] = weighted_total(self.mean_logits, members * self.token_counts)
        if is_paired:
            chosen_rewards, rejected_rewards = self.rewards.chunk(2)
            is_right = pair_accuracy(chosen_rewards, rejected_rewards)
            totals["rewards/accuracies"] = weighted_total(is_right, torch.ones_like(is_right))
            if self.token_accuracy is not None:
                totals["mean_token_accuracy"] = weighted_total(self.token_accuracy, chosen * self.token_counts)
        if self.reference_point is not None:
            # weighted by the number of sequences, like the losses that it is part of
            weight = torch.full_like(self.reference_point, self.rewards.numel())
            totals["kl"] = weighted_total(self.reference_point, weight)
        if self.entropy is not None:
            totals["entropy"] = weighted_total(self.entropy, self.token_counts)
        for name, values in self.reported.items():
            if name in totals or name == "loss":
                raise ValueError(f"the loss reports {name!r}, which is logged already: report it by another name")
            totals[name] = weighted_total(values, torch.ones_like(values))
        return totals

    def gathered(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> "LossMetrics":
        """Return the metrics of all ranks' sequences. ``gather`` joins the ranks' rows, one per sequence or pair."""

        def gather_field(values: torch.Tensor | None) -> torch.Tensor | None:
            if values is None or values.ndim == 0:
                return values
            if self.desirable is None and self.is_paired and len(values) == len(self.rewards):
                return gather(values.view(2, -1).T.contiguous()).T.flatten()
            return gather(values)

        own = {field.name: getattr(self, field.name) for field in fields(self)}
        gathered = {name: gather_field(value) for name, value in own.items() if name not in ("is_paired", "reported")}
        reported = {name: gather_field(value) for name, value in self.reported.items()}
        return replace(self, **gathered, reported=reported)


class Totals:
    """Sums of ``LossMetrics.totals`` over many batches. They stay on the device until ``pop`` reads their means."""

    def __init__(self):
        self.values: dict[str, torch.Tensor] = {}  # name: [2], weighted sum and weight
        self.labelled: list[torch.Tensor] = []  # [2, b] each: the rewards of labelled sequences, and their labels

    def add(self, totals: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add the (weighted sum, weight) of each name, as ``LossMetrics.totals`` returns them."""
        for name, total_and_weight in totals.items():
            values = torch.stack(total_and_weight)
            self.values[name] = self.values[name] + values if name in self.values else values

    def add_labelled(self, metrics: LossMetrics) -> None:
        """Add the label accuracy of sequences with labels, and keep their rewards for the AUC."""
        if metrics.desirable is not None:
            rewards, desirable = metrics.rewards.detach().double(), metrics.desirable
            is_right = label_accuracy(rewards, desirable)
            self.add({"rewards/accuracies": weighted_total(is_right, torch.ones_like(is_right))})
            self.labelled.append(torch.stack([rewards, desirable.double()]))

    def pop(
        self,
        reduce: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
        join: Callable[[torch.Tensor], torch.Tensor] = lambda labelled: labelled,
    ) -> dict[str, float]:
        """Return the means and start again from zero. Means without weight are left out.

        ``reduce`` adds up the ranks' tensors, and ``join`` puts their labelled rewards [2, n] side by side. The device
        is read once, and once more for the AUC where there are labels.
        """
        if not self.values:
            return {}
        sums = reduce(torch.stack(list(self.values.values()))).tolist()
        means = {name: total / weight for name, (total, weight) in zip(self.values, sums, strict=True) if weight}
        if self.labelled:
            rewards, labels = join(torch.cat(self.labelled, 1)).cpu()
            if 0 < labels.sum() < len(labels):
                means["rewards/auc"] = auc(rewards, labels.bool()).item()
        self.values, self.labelled = {}, []
        return with_margins(means)


@dataclass
class TokenMetrics:
    """Per-position metrics of ``linear_token_logps``, in the shape of its log-probabilities. All are 0 where a position
    predicts nothing.

    - ``entropy``: in nats
    - ``mean_logits``: mean of z over the vocabulary
    - ``is_top1``: 1 where no token is more likely than the target, else 0; also 0 where the log-probability is NaN

    >>> import torch, kto_fused
    >>> hidden, weight, labels = torch.eye(3)[None], torch.eye(3), torch.tensor([[-100, 0, 2]])
    >>> _, metrics = kto_fused.linear_token_logps(hidden, weight, labels, return_metrics=True)
    >>> metrics.is_top1
    tensor([[1., 0., 0.]])
    """

    entropy: torch.Tensor
    mean_logits: torch.Tensor
    is_top1: torch.Tensor


def weighted_total(values: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted sum and the sum of the weights. A value of weight 0 adds nothing, even if it is NaN."""
    weights = weights.double()
    return torch.where(weights > 0, values.double() * weights, 0.0).sum(), weights.sum()


def pair_accuracy(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return 1 for each pair [b] whose chosen reward is higher than its rejected one, 1/2 for a tie, else 0."""
    return (chosen > rejected).double() + (chosen == rejected).double() / 2


def label_accuracy(rewards: torch.Tensor, desirable: torch.Tensor) -> torch.Tensor:
    """Return 1 for each reward [B] that has the sign of its label, 0 for the other sign, and 1/2 for a reward of 0."""
    return (1 + torch.where(desirable, rewards, -rewards).sign()) / 2


def auc(scores: torch.Tensor, desirable: torch.Tensor) -> torch.Tensor:
    """Return the share of (desirable, undesirable) pairs whose desirable member has the higher score; a tie counts 1/2.

    It is the area under the ROC curve, by the rank sum of Mann and Whitney. NaN without both labels, or of NaN scores.

    >>> import torch
    >>> auc(torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.tensor([True, True, False, False])).item()
    0.625
    """
    _, group, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2).double()[group]  # tied scores share the mean of their ranks
    num_desirable, num_all = desirable.sum(), len(scores)
    wins = ranks[desirable].sum() - num_desirable * (num_desirable + 1) / 2
    share = wins / (num_desirable * (num_all - num_desirable))
    return torch.where(scores.isnan().any(), torch.nan, share)


def with_margins(means: dict) -> dict:
    """Add the difference between chosen and rejected rewards to ``means``, where both are there, and return it."""
    for prefix in [name.removesuffix("rewards/chosen") for name in means if name.endswith("rewards/chosen")]:
        if f"{prefix}rewards/rejected" in means:
            margin = means[f"{prefix}rewards/chosen"] - means[f"{prefix}rewards/rejected"]
            means[f"{prefix}rewards/margins"] = margin
    return means
