"""What a policy, and a value model, say of the tokens of samples: log-probabilities in nats, and values."""

from typing import Any, NamedTuple

import torch
from torch import nn

from .. import huggingface
from ..data.collators import UnpairedCollator
from ..functional import linear_token_logps, token_logps
from ..huggingface.inspect import evaluating
from ..huggingface.padding import without_padding_mask
from . import ranks
from .configs import FusedPreferenceConfig
from .generation import autocast

Row = tuple[list[int], list[int]]  # token ids of a prompt and of a completion


class TokenValues(NamedTuple):
    """What the policy, and a value model, say of a completion's tokens, one entry each."""

    logps: list[float]  # in nats
    values: list[float] | None = None  # of the state before the token; None without a value model


def token_values(
    policy: nn.Module,
    rows: list[Row],
    args: FusedPreferenceConfig,
    *,
    pad_token_id: int,
    temperature: float,
    critic: nn.Module | None = None,
) -> list[TokenValues]:
    """Return the log-probabilities, and with a ``critic`` the values, of the rows' completion tokens.

    The processes share the rows, in batches of ``args.per_device_train_batch_size``.
    """
    collate = UnpairedCollator(pad_token_id, args.pad_to_multiple_of)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]) + len(rows[row][1]))
    mine = order[args.process_index :: args.world_size]

    def found() -> list[tuple[int, TokenValues]]:
        policy.to(args.device)
        values_of = []
        with evaluating(policy), autocast(args):
            for start in range(0, len(mine), args.per_device_train_batch_size):
                numbers = mine[start : start + args.per_device_train_batch_size]
                batch = collate(
                    [{"prompt_ids": rows[row][0], "completion_ids": rows[row][1], "label": True} for row in numbers]
                )
                values = values_of_batch(policy, batch, args, temperature, critic)
                for row, of_row in zip(numbers, values.transpose(0, 1).tolist(), strict=True):
                    first, count = len(rows[row][0]) - 1, len(rows[row][1])
                    values_of.append((row, TokenValues(*(of_token[first : first + count] for of_token in of_row))))
        return values_of

    return [TokenValues(*values) for _, values in sorted(ranks.shared(args, found))]


def values_of_batch(
    policy: nn.Module,
    batch: dict[str, torch.Tensor],
    args: FusedPreferenceConfig,
    temperature: float,
    critic: nn.Module | None = None,
) -> torch.Tensor:
    """Return the log-probabilities, and with a ``critic`` the values, of a batch's labels: [1 or 2, B, T].

    Entry t belongs to ``labels[:, t + 1]``, and its value is that of the state before this token.
    """
    batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"labels": batch["labels"], "backend": args.backend, "temperature": temperature}
    if args.loss_from == "logits":
        logps = huggingface.apply_to_logits(token_logps, policy, inputs, **options)
        return logps[None] if critic is None else torch.stack([logps, critic(None, inputs).to(logps.dtype)])
    mixed = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"

    def function(*, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        logps = linear_token_logps(hidden, **arguments)
        return logps[None] if critic is None else torch.stack([logps, critic(hidden, inputs).to(logps.dtype)])

    unmasked = without_padding_mask(policy, inputs, mixed)
    return huggingface.apply(function, policy, unmasked, chunk_bytes=args.chunk_bytes, **options)
