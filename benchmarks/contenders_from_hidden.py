"""The contenders that start from hidden states: this package, eager PyTorch, TRL, Liger and cut-cross-entropy.

Each does the same step: the policy's loss and gradients and, for KTO and DPO, the reference model's forward pass. A
contender maps a `Problem` to (loss, log-probabilities of the sequences [B]). The log-probabilities are None where a
library does not return them. The loss's `backward` leaves the gradients in `problem.hidden.grad` and, if the LM head is
trained, in `problem.weight.grad`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from contenders import BETA, can_compile, is_installed
from contenders import by_hand as preference_by_hand

import kto_fused
from kto_fused.heads import Head, make

# The losses, by the first word of a case, and their names in the reports.
LOSSES = {
    "kto": "KTO",
    "dpo": "DPO",
    "orpo": "ORPO",
    "nll": "SFT",
    "ppo": "PPO",
    "ppo-clipped": "PPO with a quarter of the tokens clipped",
}
CLIP = 0.2  # PPO clips the ratios to [1 - CLIP, 1 + CLIP]
CLIPPED_EVERY = 4  # "ppo-clipped" clips one token in so many; a clipped token's gradient is exactly 0


@dataclass
class Problem:
    """Hidden states of B sequences, an LM head, and those of a reference model, which differ from them by 3 %.

    The first half of each sequence is prompt. The chosen answers are the first half of the batch.
    """

    loss: str  # of LOSSES
    hidden: torch.Tensor  # [B, T, H], a leaf
    weight: torch.Tensor  # [V, H], a leaf
    ref_hidden: torch.Tensor  # [B, T, H]
    ref_weight: torch.Tensor  # [V, H]
    labels: torch.Tensor  # [B, T]
    desirable: torch.Tensor  # [B], bool
    advantages: torch.Tensor  # [B], each for all tokens of a sequence
    old_logps: torch.Tensor  # [B, T], of the tokens `labels` under the policy that sampled them
    token_logps: torch.Tensor  # [B, T], the same under the present policy
    softcap: float | None
    ref_logps: torch.Tensor | None = None  # [B]; None: the reference model's forward pass is part of the step
    chunk_bytes: int | None = None  # of kto-fused; None: its default

    @property
    def is_trained(self) -> bool:
        return self.weight.requires_grad

    @property
    def has_reference(self) -> bool:
        return self.loss in ("kto", "dpo")

    @property
    def runs_reference(self) -> bool:
        return self.has_reference and self.ref_logps is None

    @property
    def mask(self) -> torch.Tensor:
        """Which of the positions 0 .. T-2 predict a completion token. [B, T-1]"""
        return self.labels[:, 1:] != -100

    @property
    def head(self) -> Head:
        """The loss as this package's head, for all losses but KTO and DPO."""
        if self.loss == "orpo":
            return make("orpo", beta=BETA)
        return make("nll") if self.loss == "nll" else make("ppo", clip=CLIP)

    def posed(self, loss: str, is_trained: bool, ref_logps: torch.Tensor | None = None) -> "Problem":
        """Return a problem on the same tensors with another loss, a trained or frozen head, and no gradients yet."""
        return replace(
            self,
            loss=loss,
            hidden=self.hidden.detach().requires_grad_(),
            weight=self.weight.detach().requires_grad_(is_trained),
            old_logps=self.token_logps - self.moves(loss),
            ref_logps=ref_logps,
        )

    def moves(self, loss: str) -> torch.Tensor:
        """Return by how many nats the policy has moved since it sampled the tokens. [B, T]

        Up to 0.1, within PPO's range; 0.5 on the side of the advantage for the tokens that "ppo-clipped" clips, three
        times the range's bound, so that no contender's rounding decides which tokens are clipped.
        """
        moves = 0.1 * torch.rand(self.labels.shape, generator=torch.Generator().manual_seed(1))
        moves = moves.to(self.labels.device)
        if loss == "ppo-clipped":
            moves[:, ::CLIPPED_EVERY] = 0.5 * self.advantages.sign()[:, None]
        return moves

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
    with torch.no_grad():
        token_logps = kto_fused.linear_token_logps(hidden, weight, labels, logit_softcap=softcap).roll(1, 1)
    problem = Problem(
        loss="kto",
        hidden=hidden,
        weight=weight,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        labels=labels,
        desirable=desirable,
        advantages=torch.where(desirable, 1.0, -0.75),
        old_logps=token_logps,
        token_logps=token_logps,
        softcap=softcap,
    )
    return problem.posed("kto", is_trained=True)


Contender = Callable[[Problem], tuple[torch.Tensor, torch.Tensor | None]]


def fused(problem: Problem, **options):
    options = {"logit_softcap": problem.softcap, **options}
    if problem.chunk_bytes is not None:
        options["chunk_bytes"] = problem.chunk_bytes
    if problem.runs_reference:
        options |= {"ref_hidden": problem.ref_hidden, "ref_lm_head_weight": problem.ref_weight}
    elif problem.has_reference:
        options["ref_logps"] = problem.ref_logps
    policy = problem.hidden, problem.weight, problem.labels
    if problem.loss == "kto":
        kto_options = {"reference_point": 0.0, "beta": BETA}
        loss, metrics = kto_fused.fused_linear_kto_loss(*policy, problem.desirable, **kto_options, **options)
    elif problem.loss == "dpo":
        loss, metrics = kto_fused.fused_linear_dpo_loss(*policy, beta=BETA, **options)
    else:
        if problem.loss.startswith("ppo"):
            options |= {"old_logps": problem.old_logps, "advantages": problem.advantages}
        loss, metrics = kto_fused.fused_linear_loss(problem.head, *policy, **options)
    return loss, metrics.logps


def by_hand(problem: Problem, token_logps: torch.Tensor, ref_logps: torch.Tensor | None) -> torch.Tensor:
    """Return the loss as most training loops write it, from log-probabilities of tokens [B, T-1], 0 where masked."""
    logps, mask = token_logps.sum(-1), problem.mask
    if problem.has_reference:
        return preference_by_hand(problem.loss, logps, ref_logps, problem.desirable)
    if problem.loss == "nll":
        return -token_logps.sum() / mask.sum()
    if problem.loss == "orpo":
        counts = mask.sum(-1)
        return -logps.chunk(2)[0].sum() / counts.chunk(2)[0].sum() + BETA * odds_ratio_loss(logps / counts)
    ratio, advantages = torch.exp(token_logps - problem.old_logps[:, 1:]), problem.advantages[:, None]
    losses = -torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    return (losses * mask).sum() / mask.sum()


def odds_ratio_loss(averages: torch.Tensor) -> torch.Tensor:
    """Return ORPO's second term from the average log-probabilities of chosen, then rejected sequences [B]."""
    chosen, rejected = (averages - torch.log1p(-averages.exp())).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def from_token_logps(token_logps: Callable[..., torch.Tensor]) -> Contender:
    """Return a contender that computes the loss by hand from `token_logps(hidden, weight, problem)` [B, T-1]."""

    def contender(problem: Problem):
        ref_logps = problem.ref_logps
        if problem.runs_reference:
            with torch.no_grad():
                ref_logps = token_logps(problem.ref_hidden, problem.ref_weight, problem).sum(-1)
        logps = token_logps(problem.hidden, problem.weight, problem)
        return by_hand(problem, logps, ref_logps), logps.sum(-1)

    return contender


def eager(hidden: torch.Tensor, weight: torch.Tensor, problem: Problem) -> torch.Tensor:
    """Return the log-probabilities by log_softmax, gather and mask, from the logits of every position."""
    logits = F.linear(hidden, weight)[:, :-1].float()
    if problem.softcap is not None:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    targets = problem.labels[:, 1:].clamp(min=0)
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0] * problem.mask


# The outputs that TRL's trainers ask of its kernel for their metrics: KTOTrainer, DPOTrainer, SFTTrainer and
# GRPOTrainer. For the reference model they ask for log-probabilities alone.
TRL_OUTPUTS = {
    "kto": ("log_probs", "entropy", "mean_logits"),
    "dpo": ("log_probs", "entropy", "mean_logits", "is_top1"),
    "nll": ("log_probs", "entropy", "is_top1"),
    "ppo": ("log_probs", "entropy"),
    "ppo-clipped": ("log_probs", "entropy"),
}


def trl(hidden: torch.Tensor, weight: torch.Tensor, problem: Problem) -> torch.Tensor:
    """Return the log-probabilities by TRL's kernel, called as TRL's trainers do.

    On a GPU they pass completion tokens only, on a CPU every position.
    """
    from trl.kernels import ChunkedLogProbFunction

    hidden, targets, mask = hidden[:, :-1], problem.labels[:, 1:], problem.mask
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
        return token_logps.new_zeros(mask.shape).masked_scatter(mask, token_logps)
    return token_logps.view(mask.shape) * mask


def trl_orpo(problem: Problem):
    """ORPO as TRL's ORPOTrainer computes it, from the logits of every position, which its model returns.

    The trainer's NLL counts prompt tokens too. Here it counts completion tokens, as it does for the other contenders;
    the work is the same.
    """
    from trl.trainer.utils import selective_log_softmax

    logits, targets, mask = F.linear(problem.hidden, problem.weight), problem.labels[:, 1:], problem.mask
    half = len(logits) // 2
    chosen_logits = logits[:half, :-1].contiguous()
    nll = F.cross_entropy(chosen_logits.view(-1, logits.shape[-1]), targets[:half].reshape(-1))
    logps = (selective_log_softmax(logits[:, :-1], targets.clamp(min=0)) * mask).sum(-1)
    return nll + BETA * odds_ratio_loss((logps / mask.sum(-1)).float()), logps


def cut_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, problem: Problem) -> torch.Tensor:
    """Return the log-probabilities: the library's cross-entropy of a token is its negative log-probability."""
    from cut_cross_entropy import linear_cross_entropy

    targets = F.pad(problem.labels[:, 1:], (0, 1), value=-100)
    nll = linear_cross_entropy(hidden, weight, targets, softcap=problem.softcap, reduction="none", shift=False)
    return -nll[:, :-1] * problem.mask


def liger_preference(loss: str, compiled: bool) -> Contender:
    """Return Liger's KTO, DPO or ORPO. Without `kl` its KTO has reference point 0. It does not shift labels."""
    from liger_kernel import chunked_loss

    options = {"beta": BETA, "compiled": compiled} | ({} if loss == "orpo" else {"use_ref_model": True})
    liger_loss = getattr(chunked_loss, f"LigerFusedLinear{loss.upper()}Loss")(**options)

    def contender(problem: Problem):
        hidden, targets = problem.hidden[:, :-1], problem.labels[:, 1:]
        ref = {"ref_input": problem.ref_hidden[:, :-1], "ref_weight": problem.ref_weight}
        if loss == "kto":
            value, _ = liger_loss(hidden, problem.weight, targets, preference_labels=problem.desirable, **ref)
            return value, None  # Liger's KTO returns only the batch's sums of log-probabilities
        if loss == "dpo":
            value, (chosen, rejected, *_) = liger_loss(problem.weight, hidden, targets, **ref)
            return value, torch.cat([chosen, rejected])
        value, (chosen, rejected, *_) = liger_loss(problem.weight, hidden, targets)
        return value, torch.cat([chosen, rejected]) * problem.mask.sum(-1)  # it returns averages

    return contender


def liger_cross_entropy(problem: Problem):
    """The mean over completion tokens by Liger's fused cross-entropy, a Triton kernel."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    hidden, targets = problem.hidden[:, :-1], problem.labels[:, 1:]
    loss = LigerFusedLinearCrossEntropyLoss()(problem.weight, hidden.flatten(0, 1), targets.flatten())
    return loss, None


def liger_policy_gradient(compiled: bool) -> Contender:
    """Return Liger's clipped loss without a KL term; "bnpo" is the mean over the batch's completion tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    options = {"epsilon_low": CLIP, "epsilon_high": CLIP, "loss_type": "bnpo", "beta": 0.0, "use_ref_model": False}
    liger_loss = LigerFusedLinearGRPOLoss(compiled=compiled, **options)

    def contender(problem: Problem):
        start = problem.labels.shape[1] // 2  # a GRPO trainer passes the columns that predict completions
        loss, _ = liger_loss(
            problem.hidden[:, start - 1 : -1],
            problem.weight,
            problem.labels[:, start:],
            problem.mask[:, start - 1 :],
            problem.advantages,
            old_per_token_logps=problem.old_logps[:, start:],
        )
        return loss, None

    return contender


def liger(loss: str, compiled: bool) -> Contender:
    if loss == "nll":
        return liger_cross_entropy
    return liger_policy_gradient(compiled) if loss.startswith("ppo") else liger_preference(loss, compiled)


def contenders(
    device: torch.device, loss: str, softcap: float | None = None, compiled: bool = True
) -> dict[str, Contender]:
    """Return the contenders that compute a loss on this device with this soft cap, by name.

    `compiled` adds the contenders that take long to compile.
    """
    compiled = compiled and can_compile(device)
    found: dict[str, Contender] = {"kto-fused": fused, "eager": from_token_logps(eager)}
    if device.type == "cuda" and loss == "kto":
        found["kto-fused, 2 GiB chunk"] = partial(fused, chunk_bytes=2**31)
        found["kto-fused, 128 MiB chunk"] = partial(fused, chunk_bytes=2**27)
    if compiled and device.type == "cuda":
        found["torch.compile of eager"] = torch.compile(from_token_logps(eager))
    if is_installed("trl") and not (loss == "orpo" and softcap):
        found["TRL"] = trl_orpo if loss == "orpo" else from_token_logps(trl)
    # Liger's cross-entropy is a Triton kernel
    if is_installed("liger_kernel") and softcap is None and (loss != "nll" or device.type == "cuda"):
        found["Liger"] = liger(loss, compiled=False)
        if compiled and loss != "nll":
            found["Liger, compiled"] = liger(loss, compiled=True)
    if is_installed("cut_cross_entropy") and device.type == "cuda":
        found["cut-cross-entropy"] = from_token_logps(cut_cross_entropy)
    return found


class GEMMs:
    """The lower bound on time: a step's matrix products alone, on completion tokens, into buffers allocated before.

    They are the policy's logits, the gradient of the hidden states and, if the head is trained, the gradient of the
    weight; before them the reference model's logits where the step computes them. The gradients' products leave out the
    tokens that PPO clips.
    """

    LOGIT_BYTES = 2**33  # larger logits are computed in equal pieces of tokens

    def __init__(self, problem: Problem):
        with torch.no_grad():
            hidden = problem.hidden[:, :-1][problem.mask]
            ref_hidden = problem.ref_hidden[:, :-1][problem.mask]
        pieces = -(-len(hidden) * len(problem.weight) * hidden.element_size() // self.LOGIT_BYTES)
        self.pieces = list(zip(ref_hidden.chunk(pieces), hidden.chunk(pieces), strict=True))
        self.runs_reference = problem.runs_reference
        self.clipped_share = 1 / CLIPPED_EVERY if problem.loss == "ppo-clipped" else 0.0
        self.weight, self.ref_weight = problem.weight.detach(), problem.ref_weight
        self.logits = hidden.new_empty(len(self.pieces[0][0]), len(self.weight))
        self.hidden_grad = torch.empty_like(self.pieces[0][0])
        self.weight_grad = torch.empty_like(self.weight) if problem.is_trained else None

    def __call__(self) -> None:
        for ref_hidden, hidden in self.pieces:
            logits = self.logits[: len(hidden)]
            if self.runs_reference:
                torch.mm(ref_hidden, self.ref_weight.T, out=logits)
            torch.mm(hidden, self.weight.T, out=logits)
            num_alive = len(hidden) - int(len(hidden) * self.clipped_share)
            torch.mm(logits[:num_alive], self.weight, out=self.hidden_grad[:num_alive])
            if self.weight_grad is not None:
                torch.mm(logits[:num_alive].T, hidden[:num_alive], out=self.weight_grad)
