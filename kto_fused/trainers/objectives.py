"""Several objectives at once, each with data of its own: L = sum_k alpha_k L_k with weights alpha_k >= 0.

Every batch of a device holds equally many examples of each of the K objectives, in the order of the objectives. The
mean of n example losses with weights alpha_k K is then sum_k alpha_k times the mean over objective k's n / K examples.
So one pass of the model serves all objectives, and its gradient is that of the weighted sum.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from ..data.form import WEIGHT, DataError
from ..functional import loss_from_logps
from ..heads.protocol import Head
from ..metrics import LossMetrics, pair_accuracy, weighted_total
from .configs import FusedPreferenceConfig
from .losses import AnyLoss, depends_on_batch_tokens, describe, required

OBJECTIVE = "objective"  # the column that holds an example's objective, by its number
LARGEST_GROUP = 50  # batches whose examples are sorted by length together


def check(args: FusedPreferenceConfig, loss: AnyLoss) -> None:
    """Refuse options and losses with which a batch would not have the weighted sum's gradient."""
    names = list(args.objective_weights)
    if args.per_device_train_batch_size % len(names):
        raise ValueError(
            f"per_device_train_batch_size={args.per_device_train_batch_size} must be a multiple of the {len(names)} "
            f"objectives {names}, because each batch holds equally many examples of each"
        )
    for option, value, why in (
        ("auto_find_batch_size", True, "another batch size may not be a multiple of the objectives"),
        ("train_sampling_strategy", "batch_rebalance", "it would take the objectives of a batch apart"),
    ):
        if getattr(args, option) == value:
            raise ValueError(f"{option}={value!r} cannot be honoured with objective_weights: {why}")
    statistics = loss.statistics() if isinstance(loss, Head) else ()
    if unknown := [name for name in statistics if name not in LossMetrics.__dataclass_fields__]:
        raise ValueError(
            f"{describe(loss)} reads {unknown}, which is not kept for each example: its loss cannot be logged by "
            "objective"
        )
    if getattr(loss, "group", None) is None or depends_on_batch_tokens(loss):
        reads = "divides by the tokens of the whole batch" if getattr(loss, "group", None) else "reads the whole batch"
        raise ValueError(
            f"{describe(loss)} {reads}, which holds all objectives: the gradient would not be that of the weighted sum"
        )


def joined(parts: dict[str, Dataset], weights: dict[str, float]) -> Dataset:
    """Return the prepared examples of all objectives, one after another, with the columns OBJECTIVE and WEIGHT.

    Raises:
        DataError: some objectives' answers have several messages and others' have not.
    """
    first, *_ = parts
    with_columns = []
    for number, (name, part) in enumerate(parts.items()):
        if set(part.column_names) - {WEIGHT} != set(parts[first].column_names) - {WEIGHT}:
            raise DataError(
                f"the objectives {first!r} and {name!r} have data of different forms: expected answers of several "
                "messages in all of them or in none"
            )
        own = np.asarray(part[WEIGHT]) if WEIGHT in part.column_names else np.ones(len(part))
        part = part.remove_columns([column for column in (WEIGHT,) if column in part.column_names])
        part = part.add_column(WEIGHT, own * weights[name] * len(parts))
        with_columns.append(part.add_column(OBJECTIVE, np.full(len(part), number)))
    return concatenate_datasets(with_columns)


class ObjectiveBatches(Sampler):
    """Rows of a ``joined`` dataset, in batches that hold equally many rows of each objective.

    An epoch ends when the largest objective's rows have all been drawn; rows of smaller ones are drawn again. The order
    depends on the seed and the epoch alone. So it is the same after resuming, and whether one process or several
    ``processes`` share a global batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        sizes: list[int],
        batch_size: int,
        order: str,
        seed: int,
        epoch: Callable[[], int],
        processes: int = 1,
    ):
        self.lengths = np.asarray(dataset["length"])
        self.sizes, self.batch_size, self.order, self.seed, self.epoch = sizes, batch_size, order, seed, epoch
        self.share = batch_size // len(sizes)
        self.share_of_all = self.share * processes  # rows of an objective in the batches of all processes
        self.num_batches = -(-max(sizes) // self.share_of_all) * processes

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        starts = np.cumsum([0, *self.sizes[:-1]])
        rows = [start + self._drawn(size, start, generator) for start, size in zip(starts, self.sizes, strict=True)]
        blocks = np.concatenate([each.reshape(self.num_batches, self.share) for each in rows], axis=1)
        return iter(blocks.flatten().tolist())

    def _drawn(self, size: int, start: int, generator: torch.Generator) -> np.ndarray:
        """Return as many rows of an objective as an epoch takes, counted from the objective's first row."""
        needed = self.num_batches * self.share
        if self.order == "sequential":
            return np.arange(needed) % size
        rounds = [torch.randperm(size, generator=generator).numpy() for _ in range(-(-needed // size))]
        rows = np.concatenate(rounds)[:needed]
        if self.order == "group_by_length":
            # groups of equally many batches for all objectives, so that lengths fall alike in the blocks of a batch
            batches = max(1, min(needed // self.share_of_all // 4, LARGEST_GROUP))
            lengths = self.lengths[start + rows].tolist()
            rows = rows[get_length_grouped_indices(lengths, self.share_of_all, batches, generator=generator)]
        return rows


def totals(
    loss: AnyLoss,
    metrics: LossMetrics,
    objective: torch.Tensor,
    names: list[str],
    tensors: dict[str, torch.Tensor | None],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the (sum, count) of each objective's losses and rewards in a batch, as ``LossMetrics.totals`` does.

    The losses are found again from the batch's log-probabilities, without the weights.

    Args:
        metrics: of the batch, whose log-probabilities have no gradient.
        objective: [b] the examples' objectives, positions in ``names``.
        tensors: the loss's tensors, without ``weights``.
    """
    given = {name: value for name, value in tensors.items() if value is not None and name != "weights"}
    if "weights" in required(loss):
        given["weights"] = torch.ones_like(objective, dtype=torch.float64)
    if isinstance(loss, Head):
        given |= {name: getattr(metrics, name) for name in loss.statistics()}
    with torch.no_grad():
        losses, _ = loss_from_logps(
            loss, metrics.logps, metrics.ref_logps, token_counts=metrics.token_counts, reduction="none", **given
        )
    chosen = metrics.desirable
    found = {}
    for number, name in enumerate(names):
        members = objective == number
        found[f"{name}/loss"] = weighted_total(losses, members)
        if chosen is None:
            chosen_rewards, rejected_rewards = metrics.rewards.chunk(2)
            sides = (chosen_rewards, members), (rejected_rewards, members)
            found[f"{name}/rewards/accuracies"] = weighted_total(
                pair_accuracy(chosen_rewards, rejected_rewards), members
            )
        else:
            sides = (metrics.rewards, members & chosen), (metrics.rewards, members & ~chosen)
        for side, (rewards, counted) in zip(("chosen", "rejected"), sides, strict=True):
            found[f"{name}/rewards/{side}"] = weighted_total(rewards, counted)
    return found
