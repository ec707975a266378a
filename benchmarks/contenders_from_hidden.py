"""The contenders that start from hidden states: this package, eager PyTorch, TRL, Liger and cut-cross-entropy.

Each does the same step: the policy's loss and gradients, and the reference model's forward pass. A contender maps a
`Problem` to (loss, log-probabilities of the sequences [B]). The log-probabilities are None where a library does not
return them. The loss's `backward` leaves the gradients in `problem.hidden.grad` and, if the LM head is trained, in
`problem.weight.grad`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from contenders import BETA, by_hand, can_compile, is_installed

import kto_fused


@dataclass
class Problem:
    """Hidden states of B sequences, an LM head, and those of a reference model, which differ from them by 3 %.

    The first half of each sequence is prompt.
    """

    loss: str  # "kto" or "dpo"
    hidden: torch.Tensor  # [B, T, H], a leaf
    weight: torch.Tensor  # [V, H], a leaf
    ref_hidden: torch.Tensor  # [B, T, H]
    ref_weight: torch.Tensor  # [V, H]
    labels: torch.Tensor  # [B, T]
    desirable: torch.Tensor  # [B], bool
    softcap: float | None

    @property
    def is_trained(self) -> bool:
        return self.weight.requires_grad

    def posed(self, loss: str, is_trained: bool) -> "Problem":
        """Return a problem on the same tensors with another loss, a trained or frozen head, and no gradients yet."""
        return replace(
            self,
            loss=loss,
            hidden=self.hidden.detach().requires_grad_(),
            weight=self.weight.detach().requires_grad_(is_trained),
        )

    def clear_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None


def make_problem(
    batch: int,
    seq_len: int,
    hidden_size: int,
    vocab: int,
    dtype: torch.dtype,
    softcap: float | None,
    device: torch.device,
    seed: int = 0,
) -> Problem:
    """Return a KTO problem with a trained head. Its logits have standard deviation 3, its log-ratios a few nats."""
    torch.manual_seed(seed)

    def near(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.03 * tensor.std() * torch.randn_like(tensor)

    hidden = torch.randn(batch, seq_len, hidden_size, device=device, dtype=dtype)
    weight = torch.randn(vocab, hidden_size, device=device, dtype=dtype).mul_(3 * hidden_size**-0.5)
    ref_hidden, ref_weight = near(hidden), near(weight)
    labels = torch.randint(vocab, (batch, seq_len), device=device)
    labels[:, : seq_len // 2] = -100
    desirable = torch.arange(batch, device=device) % 2 == 0
    return Problem("", hidden, weight, ref_hidden, ref_weight, labels, desirable, softcap).posed("kto", is_trained=True)


Contender = Callable[[Problem], tuple[torch.Tensor, torch.Tensor | None]]


def fused(problem: Problem, **options):
    reference = {"ref_hidden": problem.ref_hidden, "ref_lm_head_weight": problem.ref_weight}
    options = {**reference, "beta": BETA, "logit_softcap": problem.softcap, **options}
    policy = problem.hidden, problem.weight, problem.labels
    if problem.loss == "kto":
        loss, metrics = kto_fused.fused_linear_kto_loss(*policy, problem.desirable, reference_point=0.0, **options)
    else:
        loss, metrics = kto_fused.fused_linear_dpo_loss(*policy, **options)
    return loss, metrics.logps


def from_sequence_logps(sequence_logps: Callable[..., torch.Tensor]) -> Contender:
    """Return a contender that computes the loss by hand from `sequence_logps(hidden, weight, problem)` [B]."""

    def contender(problem: Problem):
        with torch.no_grad():
            ref_logps = sequence_logps(problem.ref_hidden, problem.ref_weight, problem)
        logps = sequence_logps(problem.hidden, problem.weight, problem)
        return by_hand(problem.loss, logps, ref_logps, problem.desirable), logps

    return contender


def eager(hidden: torch.Tensor, weight: torch.Tensor, problem: Problem) -> torch.Tensor:
    """Return the log-probabilities [B] by log_softmax, gather and mask, from the logits of every position."""
    targets = problem.labels[:, 1:]
    logits = F.linear(hidden, weight)[:, :-1].float()
    if problem.softcap is not None:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    token_logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (token_logps * (targets != -100)).sum(-1)


# The outputs that TRL's trainers ask of its kernel for their metrics. For the reference model they ask for
# log-probabilities alone.
TRL_OUTPUTS = {
    "kto": ("log_probs", "entropy", "mean_logits"),
    "dpo": ("log_probs", "entropy", "mean_logits", "is_top1"),
}


def trl(hidden: torch.Tensor, weight: torch.Tensor, problem: Problem) -> torch.Tensor:
    """Return the log-probabilities [B] by TRL's kernel, called as TRL's trainers do.

    On a GPU they pass completion tokens only, on a CPU every position.
    """
    from trl.kernels import ChunkedLogProbFunction

    hidden, targets = hidden[:, :-1], problem.labels[:, 1:]
    mask = targets != -100
    is_compact = hidden.device.type == "cuda"
    token_logps = ChunkedLogProbFunction.apply(
        hidden[mask] if is_compact else hidden.reshape(-1, hidden.shape[-1]),
        weight,
        None,  # bias
        targets[mask] if is_compact else targets.clamp(min=0).reshape(-1),
        1.0,  # temperature
        32768,  # columns of a tile
        problem.softcap,
        1.0,  # logit scale
        TRL_OUTPUTS[problem.loss] if torch.is_grad_enabled() else ("log_probs",),
    )[0]
    if is_compact:
        token_logps = token_logps.new_zeros(mask.shape).masked_scatter(mask, token_logps)
    return (token_logps.view(mask.shape) * mask).sum(-1)


def cut_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, problem: Problem) -> torch.Tensor:
    """Return the log-probabilities [B]: the library's cross-entropy of a token is its negative log-probability."""
    from cut_cross_entropy import linear_cross_entropy

    targets = F.pad(problem.labels[:, 1:], (0, 1), value=-100)
    nll = linear_cross_entropy(hidden, weight, targets, softcap=problem.softcap, reduction="none", shift=False)
    return -(nll * (targets != -100)).sum(-1)


def liger(compiled: bool) -> Contender:
    """Return Liger's fused linear losses as a contender. Without `kl` its KTO has reference point 0."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearKTOLoss

    options = {"beta": BETA, "compiled": compiled, "use_ref_model": True}
    kto_loss, dpo_loss = LigerFusedLinearKTOLoss(**options), LigerFusedLinearDPOLoss(**options)

    def contender(problem: Problem):
        hidden, targets = problem.hidden[:, :-1], problem.labels[:, 1:]
        ref = {"ref_input": problem.ref_hidden[:, :-1], "ref_weight": problem.ref_weight}
        if problem.loss == "kto":
            loss, _ = kto_loss(hidden, problem.weight, targets, preference_labels=problem.desirable, **ref)
            return loss, None  # Liger's KTO returns only the batch's sums of log-probabilities
        loss, (chosen_logps, rejected_logps, *_) = dpo_loss(problem.weight, hidden, targets, **ref)
        return loss, torch.cat([chosen_logps, rejected_logps])

    return contender


def contenders(device: torch.device, softcap: float | None = None, compiled: bool = True) -> dict[str, Contender]:
    """Return the contenders that run on this device with this soft cap, by name.

    `compiled` adds the contenders that take long to compile.
    """
    compiled = compiled and can_compile(device)
    found: dict[str, Contender] = {"kto-fused": fused, "eager": from_sequence_logps(eager)}
    if device.type == "cuda":
        found["kto-fused, 2 GiB chunk"] = partial(fused, chunk_bytes=2**31)
        found["kto-fused, 128 MiB chunk"] = partial(fused, chunk_bytes=2**27)
    if compiled and device.type == "cuda":
        found["torch.compile of eager"] = torch.compile(from_sequence_logps(eager))
    if is_installed("trl"):
        found["TRL"] = from_sequence_logps(trl)
    if is_installed("liger_kernel") and softcap is None:
        found["Liger"] = liger(compiled=False)
        if compiled:
            found["Liger, compiled"] = liger(compiled=True)
    if is_installed("cut_cross_entropy") and device.type == "cuda":
        found["cut-cross-entropy"] = from_sequence_logps(cut_cross_entropy)
    return found


class GEMMs:
    """The lower bound on time: a step's matrix products alone, on completion tokens, into buffers allocated before.

    They are the reference model's logits, the policy's logits, the gradient of the hidden states and, if the head is
    trained, the gradient of the weight.
    """

    LOGIT_BYTES = 2**33  # larger logits are computed in equal pieces of tokens

    def __init__(self, problem: Problem):
        is_completion = problem.labels[:, 1:] != -100
        with torch.no_grad():
            hidden = problem.hidden[:, :-1][is_completion]
            ref_hidden = problem.ref_hidden[:, :-1][is_completion]
        pieces = -(-len(hidden) * len(problem.weight) * hidden.element_size() // self.LOGIT_BYTES)
        self.pieces = list(zip(ref_hidden.chunk(pieces), hidden.chunk(pieces), strict=True))
        self.weight, self.ref_weight = problem.weight.detach(), problem.ref_weight
        self.logits = hidden.new_empty(len(self.pieces[0][0]), len(self.weight))
        self.hidden_grad = torch.empty_like(self.pieces[0][0])
        self.weight_grad = torch.empty_like(self.weight) if problem.is_trained else None

    def __call__(self) -> None:
        for ref_hidden, hidden in self.pieces:
            logits, hidden_grad = self.logits[: len(hidden)], self.hidden_grad[: len(hidden)]
            torch.mm(ref_hidden, self.ref_weight.T, out=logits)
            torch.mm(hidden, self.weight.T, out=logits)
            torch.mm(logits, self.weight, out=hidden_grad)
            if self.weight_grad is not None:
                torch.mm(logits.T, hidden, out=self.weight_grad)
