"""From logits, the same loss by everyone: this package, its plain twin, what users write by hand, and TRL's kernel."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from contenders import BETA, by_hand, can_compile, is_installed

import kto_fused
from kto_fused import reference


@dataclass
class Problem:
    """Policy logits of B sequences whose first half is prompt, and the reference's log-probabilities."""

    loss: str
    logits: torch.Tensor
    labels: torch.Tensor
    desirable: torch.Tensor
    ref_logps: torch.Tensor

    @property
    def completion_logits(self) -> int:
        """How many logits any exact implementation must read."""
        return int((self.labels[:, 1:] != -100).sum()) * self.logits.shape[-1]


def make_problem(
    loss: str, batch: int, seq_len: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Problem:
    torch.manual_seed(seed)
    logits = (torch.randn(batch, seq_len, vocab, device=device, dtype=dtype)).mul_(3)
    labels = torch.randint(vocab, (batch, seq_len), device=device)
    labels[:, : seq_len // 2] = -100
    desirable = torch.arange(batch, device=device) % 2 == 0
    ref_logps = kto_fused.sequence_logps(logits, labels) + torch.linspace(-5, 5, batch, device=device)
    return Problem(loss, logits, labels, desirable, ref_logps)


def policy_logits(problem: Problem, name: str) -> torch.Tensor:
    """Logits that need a gradient; not a leaf where the contender's gradient overwrites them."""
    logits = problem.logits.detach().requires_grad_()
    return logits.clone() if "in place" in name else logits


# A contender maps (logits, problem) to (loss, sequence log-probabilities).
Contender = Callable[[torch.Tensor, Problem], tuple[torch.Tensor, torch.Tensor]]


def calling(kto_loss: Callable, dpo_loss: Callable, **options: object) -> Contender:
    """The package's functions, or their twins."""

    def contender(logits: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = {"ref_logps": problem.ref_logps, "beta": BETA, **options}
        if problem.loss == "kto":
            loss, metrics = kto_loss(logits, problem.labels, problem.desirable, reference_point=0.0, **arguments)
        else:
            loss, metrics = dpo_loss(logits, problem.labels, **arguments)
        return loss, metrics.logps

    return contender


def from_token_logps(token_logps: torch.Tensor, mask: torch.Tensor, problem: Problem):
    logps = (token_logps * mask).sum(-1)
    return by_hand(problem.loss, logps, problem.ref_logps, problem.desirable), logps


def eager(logits: torch.Tensor, problem: Problem):
    """log_softmax, gather, mask: the loss as most training loops have it."""
    targets = problem.labels[:, 1:]
    mask = targets != -100
    log_p = logits[:, :-1].float().log_softmax(-1)
    token_logps = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return from_token_logps(token_logps, mask, problem)


def trl_kernel(logits: torch.Tensor, problem: Problem):
    from trl.trainer.utils import selective_log_softmax_and_entropy

    targets = problem.labels[:, 1:]
    mask = targets != -100
    token_logps, _ = selective_log_softmax_and_entropy(logits[:, :-1], targets.clamp(min=0), row_mask=mask)
    return from_token_logps(token_logps, mask, problem)


def contenders(device: torch.device) -> dict[str, Contender]:
    """Who can run on this device."""
    fused = (kto_fused.fused_kto_loss, kto_fused.fused_dpo_loss)
    found: dict[str, Contender] = {
        "kto-fused": calling(*fused),
        "kto-fused, in place": calling(*fused, inplace_backward=True),
        "reference": calling(reference.kto_loss, reference.dpo_loss),
        "eager log_softmax": eager,
    }
    if can_compile(device):
        found["torch.compile of eager"] = torch.compile(eager)
    if device.type == "cuda" and is_installed("trl"):
        found["TRL kernel"] = trl_kernel
    return found
