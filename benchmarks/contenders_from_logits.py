"""The contenders that start from logits: this package, its plain PyTorch twin, eager PyTorch and TRL's kernel.

Each computes the same loss. A contender maps (logits, problem) to (loss, log-probabilities of the sequences [B]).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from contenders import BETA, by_hand, can_compile, is_installed

import kto_fused
from kto_fused import reference


@dataclass
class Problem:
    """Policy logits of B sequences, whose first half is prompt, and the reference model's log-probabilities."""

    loss: str  # "kto" or "dpo"
    logits: torch.Tensor  # [B, T, V]
    labels: torch.Tensor  # [B, T]
    desirable: torch.Tensor  # [B], bool
    ref_logps: torch.Tensor  # [B]

    @property
    def completion_logits(self) -> int:
        """The number of logits that any exact implementation must read."""
        return int((self.labels[:, 1:] != -100).sum()) * self.logits.shape[-1]


def make_problem(
    loss: str, batch: int, seq_len: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Problem:
    """Return a problem whose logits have standard deviation 3 and whose log-ratios lie between -5 and 5 nats."""
    torch.manual_seed(seed)
    logits = (torch.randn(batch, seq_len, vocab, device=device, dtype=dtype)).mul_(3)
    labels = torch.randint(vocab, (batch, seq_len), device=device)
    labels[:, : seq_len // 2] = -100
    desirable = torch.arange(batch, device=device) % 2 == 0
    ref_logps = kto_fused.sequence_logps(logits, labels) + torch.linspace(-5, 5, batch, device=device)
    return Problem(loss, logits, labels, desirable, ref_logps)


def policy_logits(problem: Problem, name: str) -> torch.Tensor:
    """Return fresh logits that require a gradient.

    A contender that writes the gradient over the logits gets a copy, so that the problem stays as it is.
    """
    logits = problem.logits.detach().requires_grad_()
    return logits.clone() if "in place" in name else logits


Contender = Callable[[torch.Tensor, Problem], tuple[torch.Tensor, torch.Tensor]]


def package_loss(kto_loss: Callable, dpo_loss: Callable, **options: object) -> Contender:
    """Return a contender that calls this package's functions, or their twins in `kto_fused.reference`."""

    def contender(logits: torch.Tensor, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = {"ref_logps": problem.ref_logps, "beta": BETA, **options}
        if problem.loss == "kto":
            loss, metrics = kto_loss(logits, problem.labels, problem.desirable, reference_point=0.0, **arguments)
        else:
            loss, metrics = dpo_loss(logits, problem.labels, **arguments)
        return loss, metrics.logps

    return contender


def from_token_logps(token_logps: torch.Tensor, mask: torch.Tensor, problem: Problem):
    """Return the loss by hand and the log-probabilities [B], from those of the tokens [B, T]."""
    logps = (token_logps * mask).sum(-1)
    return by_hand(problem.loss, logps, problem.ref_logps, problem.desirable), logps


def eager(logits: torch.Tensor, problem: Problem):
    """The loss as most training loops write it: log_softmax, gather, mask."""
    targets = problem.labels[:, 1:]
    mask = targets != -100
    log_p = logits[:, :-1].float().log_softmax(-1)
    token_logps = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return from_token_logps(token_logps, mask, problem)


def trl_kernel(logits: torch.Tensor, problem: Problem):
    """The loss from the token log-probabilities of TRL's Triton kernel, called as TRL's trainers do."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    targets = problem.labels[:, 1:]
    mask = targets != -100
    token_logps, _ = selective_log_softmax_and_entropy(logits[:, :-1], targets.clamp(min=0), row_mask=mask)
    return from_token_logps(token_logps, mask, problem)


def contenders(device: torch.device) -> dict[str, Contender]:
    """Return the contenders that run on this device, by name."""
    fused = (kto_fused.fused_kto_loss, kto_fused.fused_dpo_loss)
    found: dict[str, Contender] = {
        "kto-fused": package_loss(*fused),
        "kto-fused, in place": package_loss(*fused, inplace_backward=True),
        "reference": package_loss(reference.kto_loss, reference.dpo_loss),
        "eager log_softmax": eager,
    }
    if can_compile(device):
        found["torch.compile of eager"] = torch.compile(eager)
    if device.type == "cuda" and is_installed("trl"):
        found["TRL kernel"] = trl_kernel
    return found
