"""Heads of a user's module: another process finds them again by importing it."""

from dataclasses import dataclass

import torch

from kto_fused import heads


@heads.register("own margin")
@dataclass(frozen=True)
class OwnMargin(heads.Head):
    """max(0, margin - scale (r_w - r_l)); ``scale`` is a tensor of the call."""

    margin: float = 1.0
    kind: str = "squared"
    group = 2

    def losses(self, logps, counts, ref_logps, *, scale):
        chosen, rejected = (logps - ref_logps).chunk(2)
        losses = torch.relu(self.margin - scale * (chosen - rejected))
        return losses**2 if self.kind == "squared" else losses

    def report(self, logps, counts, ref_logps, *, scale):
        log_ratios = logps - ref_logps
        return {"rewards": 2.0 * log_ratios, "margins": log_ratios.chunk(2)[0] - log_ratios.chunk(2)[1], "scale": scale}


@heads.register("toy")
@dataclass(frozen=True)
class Toy(heads.Head):
    """log(1 + exp(-beta h))^2 of a pair's log-ratios: all that a new loss needs."""

    beta: float = 0.5
    group = 2

    def losses(self, logps, counts, ref_logps):
        chosen, rejected = (logps - ref_logps).chunk(2)
        return torch.nn.functional.softplus(-self.beta * (chosen - rejected)) ** 2


def loss_of(head: heads.Head) -> float:
    """The loss of one pair, wherever it is called."""
    from kto_fused import loss_from_logps

    logps = torch.tensor([-2.0, -3.0], dtype=torch.float64)
    return loss_from_logps(head, logps, torch.full_like(logps, -2.5), scale=torch.tensor(0.5))[0].item()
