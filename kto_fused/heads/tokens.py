"""Losses of single tokens: supervised fine-tuning and policy gradients.

A token-level loss reads each completion token by itself, so that the gradient of a token is known as soon as its
log-probability is: from hidden states it takes 3 GEMMs with a trained LM head and 2 with a frozen one, whatever the
sequences' lengths. Throughout, l is a token's log-probability in nats under the policy, lold under the policy that
sampled it, lref under the reference model, A the advantage, and rho = exp(l - lold) the importance ratio.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from .. import checks
from .protocol import Head, register

# How the tokens' losses become one number. n_s: completion tokens of sequence s; B: sequences of the batch.
NORMALIZERS = ("tokens", "sequences", "constant", "items")


def check_normalizer(normalizer: str, max_tokens: int) -> None:
    checks.choice("normalizer", normalizer, NORMALIZERS)
    checks.integer("max_tokens", max_tokens, at_least=0)
    if (normalizer == "constant") != (max_tokens > 0):
        raise ValueError(
            f"max_tokens={max_tokens} with normalizer={normalizer!r}: expected a number > 0 for 'constant', and 0 for "
            "any other"
        )


def check_clip(clip: float | tuple[float, float], delta: float) -> None:
    bounds = clip if isinstance(clip, tuple) else (clip, clip)
    if len(bounds) != 2:
        raise ValueError(f"clip must be one number or a pair (low, high), got {clip!r}")
    for bound in bounds:
        checks.number("clip", bound, above=0)
    checks.number("delta", delta, at_least=0)


def clipped_losses(
    ratios: torch.Tensor, advantages: torch.Tensor, clip: float | tuple[float, float], delta: float
) -> torch.Tensor:
    """Return -min(rho A, clip(rho, 1 - low, 1 + high) A), with rho bounded from above by ``delta`` > 0 in the first
    term.
    """
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    clipped = ratios.clamp(1 - low, 1 + high)
    if delta:
        ratios = ratios.clamp(max=delta)
    return -torch.minimum(ratios * advantages, clipped * advantages)


def log_ratios(logps: torch.Tensor, old_logps: torch.Tensor | None, on_policy: bool) -> torch.Tensor:
    """Return l - lold; ``on_policy`` 0, with the gradient of l."""
    if (old_logps is None) != on_policy:
        came = "none" if old_logps is None else "some"
        raise TypeError(f"on_policy={on_policy}, but {came} came as old_logps: pass them unless it is True")
    return logps - (logps.detach() if on_policy else old_logps)


@dataclass(frozen=True)
class TokenHead(Head):
    """What token-level losses share: the way in which ``reduction="mean"`` turns the tokens' losses into one number.

    ``losses`` gets n completion tokens: ``logps`` [n] float64, ``counts`` [n] the numbers of tokens in their sequences,
    None for ``ref_logps``, and by name tensors [n] or scalars. It returns one loss per token, [n].

    ``normalizer`` is ``"tokens"``: the mean over the batch's completion tokens; ``"sequences"``: the mean over each
    sequence's tokens, then over the sequences; ``"constant"``: the sum divided by B ``max_tokens``; ``"items"``: the
    sum divided by the call's scalar ``num_items``, the number of tokens in all accumulated batches and ranks.
    """

    normalizer: str = "tokens"
    max_tokens: int = 0

    level: ClassVar[str] = "token"
    group: ClassVar[int | None] = 1
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_normalizer(self.normalizer, self.max_tokens)


@register("nll")
@dataclass(frozen=True)
class NLL(TokenHead):
    """The negative log-likelihood of supervised fine-tuning: -l.

    ``chosen_only``, for a batch of pairs: the rejected sequences' tokens, those of the batch's second half, take no
    part, and do not count in the normaliser.
    """

    chosen_only: bool = False

    def losses(self, logps, counts, ref_logps):
        return -logps


@register("dft")
@dataclass(frozen=True)
class DFT(TokenHead):
    """Dynamic fine-tuning (Wu et al. 2025, arXiv 2508.05629): -sg(exp l) l, where sg has no gradient."""

    def losses(self, logps, counts, ref_logps):
        return -logps.detach().exp() * logps


def kl_estimates(logps: torch.Tensor, ref_token_logps: torch.Tensor) -> torch.Tensor:
    """Return exp(d) - d - 1 with d = lref - l, Schulman's estimate k3 of the KL divergence to the reference model."""
    d = ref_token_logps - logps
    return torch.expm1(d) - d


@register("kl")
@dataclass(frozen=True)
class KL(TokenHead):
    """An estimate of the KL divergence to the reference model (Schulman 2020), for a ``Mix``: exp(d) - d - 1, with
    d = lref - l. The reference model's token log-probabilities come as ``ref_token_logps``.
    """

    def losses(self, logps, counts, ref_logps, *, ref_token_logps):
        return kl_estimates(logps, ref_token_logps)


@dataclass(frozen=True)
class _PolicyGradient(TokenHead):
    """A policy-gradient loss plus ``kl_beta`` times the loss ``kl``, which reads ``ref_token_logps``.

    ``on_policy``: the policy itself has just sampled the tokens. lold is then l without a gradient, so that rho is 1,
    and no ``old_logps`` come. ``kl_ratio``: a token's KL estimate is multiplied by rho, which makes the KL term's
    gradient unbiased for tokens that an older policy sampled (DeepSeek-AI 2025, arXiv 2512.02556).
    """

    kl_beta: float = 0.0
    on_policy: bool = field(default=False, kw_only=True)
    kl_ratio: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("kl_beta", self.kl_beta, at_least=0)
        checks.flag("on_policy", self.on_policy)
        checks.flag("kl_ratio", self.kl_ratio)

    def _ratios(self, logps, old_logps):
        return torch.exp(log_ratios(logps, old_logps, self.on_policy))

    def _with_kl(self, losses, logps, ratio, ref_token_logps):
        if self.kl_beta == 0:
            return losses
        if ref_token_logps is None:
            raise TypeError(f"kl_beta={self.kl_beta} needs the tensor ref_token_logps: pass it by name")
        kl = kl_estimates(logps, ref_token_logps)
        return losses + self.kl_beta * (kl * ratio if self.kl_ratio else kl)


@register("ppo")
@dataclass(frozen=True)
class PPO(_PolicyGradient):
    """PPO's clipped loss (Schulman et al. 2017, arXiv 1707.06347): -min(rho A, clip(rho, 1 - low, 1 + high) A).

    ``clip`` is one number for low and high, or the pair (low, high). ``delta`` > 0 bounds rho from above in the first
    term, which limits the loss of tokens with a negative advantage (two-sided clipping).
    """

    clip: float | tuple[float, float] = 0.2
    delta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip, self.delta)

    def losses(self, logps, counts, ref_logps, *, advantages, old_logps=None, ref_token_logps=None):
        ratio = self._ratios(logps, old_logps)
        losses = clipped_losses(ratio, advantages, self.clip, self.delta)
        return self._with_kl(losses, logps, ratio, ref_token_logps)


@register("grpo")
@dataclass(frozen=True)
class GRPO(PPO):
    """PPO's loss as GRPO (Shao et al. 2024, arXiv 2402.03300) averages it: over each sequence, then over sequences."""

    normalizer: str = "sequences"


@register("bnpo")
@dataclass(frozen=True)
class BNPO(PPO):
    """PPO's loss averaged over the batch's completion tokens, TRL's ``bnpo``."""


@register("dr_grpo")
@dataclass(frozen=True)
class DrGRPO(PPO):
    """PPO's loss as Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) averages it: its sum divided by B ``max_tokens``."""

    normalizer: str = "constant"
    max_tokens: int = 1024


@register("dapo")
@dataclass(frozen=True)
class DAPO(PPO):
    """PPO's loss as DAPO (Yu et al. 2025, arXiv 2503.14476) averages it: over the tokens of all accumulated batches
    and ranks, whose number comes as the scalar ``num_items``. DAPO's clip-higher is ``clip=(0.2, 0.28)``.
    """

    normalizer: str = "items"


@register("cispo")
@dataclass(frozen=True)
class CISPO(_PolicyGradient):
    """CISPO (MiniMax 2025, arXiv 2506.13585): -sg(min(rho, ``clip_high``)) A l, where sg has no gradient."""

    normalizer: str = "items"
    clip_high: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("clip_high", self.clip_high, above=0)

    def losses(self, logps, counts, ref_logps, *, advantages, old_logps=None, ref_token_logps=None):
        ratio = self._ratios(logps, old_logps)
        weights = ratio.detach().clamp(max=self.clip_high)
        return self._with_kl(-weights * advantages * logps, logps, ratio, ref_token_logps)


@register("sapo")
@dataclass(frozen=True)
class SAPO(_PolicyGradient):
    """SAPO (Gao et al. 2025, arXiv 2511.20347), PPO's loss with a soft gate in place of the clip:
    -(4 / tau) sigma(tau (rho - 1)) A, with tau = ``tau_pos`` where A > 0 and ``tau_neg`` elsewhere.

    Its derivative by rho is -A at rho = 1, and falls towards 0 on both sides.
    """

    normalizer: str = "sequences"
    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("tau_pos", self.tau_pos, above=0)
        checks.number("tau_neg", self.tau_neg, above=0)

    def losses(self, logps, counts, ref_logps, *, advantages, old_logps=None, ref_token_logps=None):
        ratio = self._ratios(logps, old_logps)
        taus = torch.where(advantages > 0, torch.full_like(ratio, self.tau_pos), self.tau_neg)
        gates = torch.sigmoid(taus * (ratio - 1)) * 4 / taus
        return self._with_kl(-gates * advantages, logps, ratio, ref_token_logps)
