"""Losses of pairs: a chosen and a rejected answer to the same prompt.

Every class is one loss. Its fields are the loss's numbers, its ``losses`` is the formula: sequence log-probabilities of
a batch whose first half is chosen and whose second half is rejected, in; one loss per pair, out. Throughout, L is a
sequence's log-probability in nats, n its number of completion tokens, r = L - Lref its log-ratio against the reference
model, h = r_w - r_l the difference between the chosen (w) and the rejected (l) log-ratio, and sigma the logistic
function.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from .. import checks
from .base import weighted
from .preference import DEFAULT_GAMMA, DPO_LOSS_TYPES, DPOHead
from .protocol import Head, register
from .tokens import NLL

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# the largest exponent of an alpha-divergence's score, as TRL has it: exp(80) is finite in float32
LARGEST_EXPONENT = 80.0
# of forward KL's score: finite in float64, so that an answer without probability does not turn gradients into NaN
LARGEST_FORWARD_EXPONENT = 700.0


def f_divergence_scores(log_ratios: torch.Tensor, kind: str, alpha: float) -> torch.Tensor:
    """Return f'(pi / pi_ref) from log-ratios r, up to a constant (Wang et al. 2023, arXiv 2309.16240). [B] -> [B]

    ``reverse_kl`` r; ``forward_kl`` 1 - exp(-r); ``js_divergence`` log 2 + log sigma(r); ``alpha_divergence``
    (exp((alpha - 1) r) - 1) / (alpha - 1), whose limit for alpha -> 1 is r.
    """
    if kind == "forward_kl":
        return -torch.expm1((-log_ratios).clamp(max=LARGEST_FORWARD_EXPONENT))
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(log_ratios)
    if kind == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        return torch.expm1(((alpha - 1) * log_ratios).clamp(max=LARGEST_EXPONENT)) / (alpha - 1)
    return log_ratios


def smoothed_log_loss(u: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Return -(1-s) log sigma(u) - s log sigma(-u): the logistic loss of pairs of which a share s is flipped."""
    kept = -(1 - label_smoothing) * F.logsigmoid(u)
    # without smoothing, the flipped pair's term must not turn an infinite loss into NaN
    return kept if label_smoothing == 0 else kept - label_smoothing * F.logsigmoid(-u)


def length_averaged(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return values / counts.clamp(min=1)


def chosen_nll(logps: torch.Tensor, batch_counts: torch.Tensor) -> torch.Tensor:
    """Return one value per pair. Their mean over the batch's pairs is the chosen answers' negative log-likelihood per
    completion token. ``logps`` may belong to some of the pairs; ``batch_counts`` are the whole batch's token counts.
    """
    chosen_counts = batch_counts.chunk(2)[0]
    return -logps.chunk(2)[0] * (len(chosen_counts) / chosen_counts.sum().clamp(min=1).to(logps.dtype))


@dataclass(frozen=True)
class _ReferencePair(Head):
    """A loss of the chosen and the rejected log-ratio against a reference model.

    ``ld_alpha`` in [0, 1] is LD-DPO's (Liu et al. 2024, arXiv 2409.06411): a sequence's log-probability, the policy's
    and the reference's, is that of its first min(n_w, n_l) completion tokens plus ``ld_alpha`` times that of the rest.
    1 is the plain loss. Lengths n stay the numbers of completion tokens. ``ref_logps`` that you compute beforehand must
    be weighted likewise: ``sequence_logps(..., token_weights=ld_token_weights(labels, ld_alpha))``.
    """

    beta: float = 0.1
    ld_alpha: float = field(default=1.0, kw_only=True)

    group: ClassVar[int | None] = 2

    def __post_init__(self) -> None:
        checks.number("beta", self.beta, above=0)
        checks.number("ld_alpha", self.ld_alpha, at_least=0)
        if self.ld_alpha > 1:
            raise ValueError(f"ld_alpha must lie in [0, 1], got {self.ld_alpha}")


def wpo_weights(logps: torch.Tensor, counts: torch.Tensor, log_sum_squares: torch.Tensor) -> torch.Tensor:
    """Return w_w w_l of each pair, detached, with w = exp(mean_t [l_t - log sum_v p_tv^2]) (Zhou et al. 2024, arXiv
    2406.11827): close to 1 where the answer is one that the policy itself would give. [B] -> [B/2]
    """
    chosen, rejected = (length_averaged(logps.detach(), counts) - log_sum_squares).chunk(2)
    return torch.exp(chosen + rejected)


@dataclass(frozen=True)
class _WeightedPair(_ReferencePair):
    """A pair loss that ``use_weighting`` multiplies by ``wpo_weights``, as TRL's option of this name does.

    ``pair_losses`` is the formula without the weights.
    """

    use_weighting: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.flag("use_weighting", self.use_weighting)

    def statistics(self) -> tuple[str, ...]:
        return ("log_sum_squares",) if self.use_weighting else ()

    def losses(self, logps, counts, ref_logps, *, log_sum_squares=None):
        if not self.use_weighting:
            return self.pair_losses(logps, counts, ref_logps)
        weights = wpo_weights(logps, counts, log_sum_squares)
        # a weight that underflows to 0 stops gradients, even an infinite loss's
        logps = torch.where((weights != 0).repeat(2), logps, logps.detach())
        return weighted(self.pair_losses(logps, counts, ref_logps), weights)

    def pair_losses(self, logps: torch.Tensor, counts: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class _ScoredPair(_WeightedPair):
    """A pair loss that reads log-ratios through an f-divergence's score."""

    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("f_divergence_type", self.f_divergence_type, F_DIVERGENCES)
        checks.number("f_alpha_divergence_coef", self.f_alpha_divergence_coef)

    def scores(self, logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
        return f_divergence_scores(logps - ref_logps, self.f_divergence_type, self.f_alpha_divergence_coef)

    def difference(self, logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
        chosen, rejected = self.scores(logps, ref_logps).chunk(2)
        return chosen - rejected


def _dpo_kernel(loss: Head, tensors: dict[str, torch.Tensor]) -> tuple[type, dict[str, Any]] | None:
    """DPO's kernel for a loss that it computes, unless tensors came. A user's subclass has another name."""
    if loss.statistics():
        return None
    if tensors or loss.name not in DPO_LOSS_TYPES or getattr(loss, "f_divergence_type", "reverse_kl") != "reverse_kl":
        return None
    return DPOHead, {
        "loss_type": loss.name,
        "beta": loss.beta,
        "label_smoothing": getattr(loss, "label_smoothing", 0.0),
        "gamma": getattr(loss, "gamma", DEFAULT_GAMMA),
    }


def _check_label_smoothing(value: float, *, above_zero: bool = False) -> None:
    checks.number("label_smoothing", value)
    if not (value > 0 if above_zero else value >= 0) or not value < 0.5:
        bounds = "(0, 0.5)" if above_zero else "[0, 0.5)"
        raise ValueError(f"label_smoothing must lie in {bounds}, got {value}")


@register("sigmoid")
@dataclass(frozen=True)
class Sigmoid(_ScoredPair):
    """DPO (Rafailov et al. 2023, arXiv 2305.18290): -(1-s) log sigma(beta h) - s log sigma(-beta h).

    ``label_smoothing`` s > 0 is Mitchell's conservative DPO (2023); TRL's ``sigmoid`` has none.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_label_smoothing(self.label_smoothing)

    def pair_losses(self, logps, counts, ref_logps):
        return smoothed_log_loss(self.beta * self.difference(logps, ref_logps), self.label_smoothing)

    def fast_options(self, tensors):
        return _dpo_kernel(self, tensors)


@register("robust")
@dataclass(frozen=True)
class Robust(Sigmoid):
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409):
    [-(1-s) log sigma(beta h) + s log sigma(-beta h)] / (1 - 2s).
    """

    def pair_losses(self, logps, counts, ref_logps):
        u, s = self.beta * self.difference(logps, ref_logps), self.label_smoothing
        kept = -(1 - s) * F.logsigmoid(u)
        return kept if s == 0 else (kept + s * F.logsigmoid(-u)) / (1 - 2 * s)


@register("hinge")
@dataclass(frozen=True)
class Hinge(_ScoredPair):
    """SLiC-HF (Zhao et al. 2023, arXiv 2305.10425): max(0, 1 - beta h)."""

    def pair_losses(self, logps, counts, ref_logps):
        return torch.relu(1 - self.beta * self.difference(logps, ref_logps))

    def fast_options(self, tensors):
        return _dpo_kernel(self, tensors)


@register("ipo")
@dataclass(frozen=True)
class IPO(_ScoredPair):
    """IPO (Azar et al. 2023, arXiv 2310.12036): (r_w / n_w - r_l / n_l - 1 / (2 beta))^2."""

    def pair_losses(self, logps, counts, ref_logps):
        chosen, rejected = length_averaged(self.scores(logps, ref_logps), counts).chunk(2)
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2

    def fast_options(self, tensors):
        return _dpo_kernel(self, tensors)


@register("sigmoid_norm")
@dataclass(frozen=True)
class SigmoidNorm(_ScoredPair):
    """DPO of length-averaged log-ratios: -log sigma(beta (r_w / n_w - r_l / n_l))."""

    def pair_losses(self, logps, counts, ref_logps):
        chosen, rejected = length_averaged(self.scores(logps, ref_logps), counts).chunk(2)
        return -F.logsigmoid(self.beta * (chosen - rejected))


@register("exo_pair")
@dataclass(frozen=True)
class EXOPair(_ScoredPair):
    """EXO (Ji et al. 2024, arXiv 2402.00856), with q = sigma(beta h):
    q [log q - log(1-s)] + (1-q) [log(1-q) - log s], s > 0 the label smoothing.
    """

    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_label_smoothing(self.label_smoothing, above_zero=True)

    def pair_losses(self, logps, counts, ref_logps):
        u, s = self.beta * self.difference(logps, ref_logps), self.label_smoothing
        kept = torch.sigmoid(u) * (F.logsigmoid(u) - math.log1p(-s))
        return kept + torch.sigmoid(-u) * (F.logsigmoid(-u) - math.log(s))


@register("nca_pair")
@dataclass(frozen=True)
class NCAPair(_WeightedPair):
    """NCA (Chen et al. 2024, arXiv 2402.05369):
    -log sigma(beta r_w) - 1/2 log sigma(-beta r_w) - 1/2 log sigma(-beta r_l).
    """

    def pair_losses(self, logps, counts, ref_logps):
        chosen, rejected = (self.beta * (logps - ref_logps)).chunk(2)
        return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@register("bco_pair")
@dataclass(frozen=True)
class BCOPair(_WeightedPair):
    """BCO of a pair (Jung et al. 2024, arXiv 2404.04656), without its moving reward shift:
    -log sigma(beta r_w) - log sigma(-beta r_l).
    """

    def pair_losses(self, logps, counts, ref_logps):
        chosen, rejected = (self.beta * (logps - ref_logps)).chunk(2)
        return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@register("sppo_hard")
@dataclass(frozen=True)
class SPPOHard(_WeightedPair):
    """SPPO with hard labels (Wu et al. 2024, arXiv 2405.00675): (r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2."""

    def pair_losses(self, logps, counts, ref_logps):
        chosen, rejected = (logps - ref_logps).chunk(2)
        return (chosen - 0.5 / self.beta) ** 2 + (rejected + 0.5 / self.beta) ** 2


@register("apo_zero")
@dataclass(frozen=True)
class APOZero(_WeightedPair):
    """APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266): [1 - sigma(beta r_w)] + sigma(beta r_l)."""

    def pair_losses(self, logps, counts, ref_logps):
        chosen, rejected = (self.beta * (logps - ref_logps)).chunk(2)
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)

    def fast_options(self, tensors):
        return _dpo_kernel(self, tensors)


@register("apo_down")
@dataclass(frozen=True)
class APODown(_WeightedPair):
    """APO-down (D'Oosterlinck et al. 2024, arXiv 2408.06266): sigma(beta r_w) + [1 - sigma(beta h)]."""

    def pair_losses(self, logps, counts, ref_logps):
        chosen, rejected = (self.beta * (logps - ref_logps)).chunk(2)
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)

    def fast_options(self, tensors):
        return _dpo_kernel(self, tensors)


@register("discopop")
@dataclass(frozen=True)
class DiscoPOP(_ScoredPair):
    """DiscoPOP (Lu et al. 2024, arXiv 2406.08414), with u = beta h and m = sigma(u / tau):
    (1 - m) (-log sigma(u)) + m exp(-u), differentiated through m too.
    """

    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("discopop_tau", self.discopop_tau, above=0)

    def pair_losses(self, logps, counts, ref_logps):
        u = self.beta * self.difference(logps, ref_logps)
        scaled = u / self.discopop_tau
        # m exp(-u) as one exponential: its factors alone are 0 and infinite for large -u
        return -F.logsigmoid(u) * torch.sigmoid(-scaled) + torch.exp(F.logsigmoid(scaled) - u)


@dataclass(frozen=True)
class _SortedPair(_ReferencePair):
    """A loss that compares sorted values of the whole batch."""

    label_smoothing: float = 0.0

    group: ClassVar[int | None] = None
    is_paired: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_label_smoothing(self.label_smoothing)


@register("aot")
@dataclass(frozen=True)
class AOT(_SortedPair):
    """Alignment by optimal transport (Melnyk et al. 2024, arXiv 2406.05882) of pairs: the policy's L_w - L_l and the
    reference's are sorted over the batch, each by itself; delta is their difference at equal rank, the loss
    -(1-s) log sigma(beta delta) - s log sigma(-beta delta). The batch is one rank's: nothing is gathered.
    """

    def losses(self, logps, counts, ref_logps):
        policy, reference = (
            (chosen - rejected).sort().values for chosen, rejected in (logps.chunk(2), ref_logps.chunk(2))
        )
        return smoothed_log_loss(self.beta * (policy - reference), self.label_smoothing)


@register("aot_unpaired")
@dataclass(frozen=True)
class AOTUnpaired(_SortedPair):
    """As ``aot``, of the chosen and the rejected log-ratios, each sorted over the batch."""

    def losses(self, logps, counts, ref_logps):
        chosen, rejected = (log_ratios.sort().values for log_ratios in (logps - ref_logps).chunk(2))
        return smoothed_log_loss(self.beta * (chosen - rejected), self.label_smoothing)


@register("sft")
@dataclass(frozen=True)
class ChosenNLL(Head):
    """The negative log-likelihood of the chosen answers, averaged over the batch's chosen completion tokens."""

    group: ClassVar[int | None] = 2
    needs_reference: ClassVar[bool] = False

    def losses(self, logps, counts, ref_logps, *, batch_counts):
        return chosen_nll(logps, batch_counts)

    def beside_ld_alpha(self):
        return NLL(chosen_only=True)


# ---- without a reference model ------------------------------------------------------------------------------------


@register("simpo")
@dataclass(frozen=True)
class SimPO(Head):
    """SimPO (Meng et al. 2024, arXiv 2405.14734), with u = beta (L_w / n_w - L_l / n_l) - gamma:
    -(1-s) log sigma(u) - s log sigma(-u).

    ``gamma`` is the target margin between the rewards, in units of beta times nats per token.
    """

    beta: float = 2.0
    gamma: float = 0.5
    label_smoothing: float = 0.0

    group: ClassVar[int | None] = 2
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checks.number("beta", self.beta, above=0)
        checks.number("gamma", self.gamma)
        _check_label_smoothing(self.label_smoothing)

    def losses(self, logps, counts, ref_logps):
        chosen, rejected = length_averaged(logps, counts).chunk(2)
        return smoothed_log_loss(self.beta * (chosen - rejected) - self.gamma, self.label_smoothing)

    def report(self, logps, counts, ref_logps):
        return {"rewards": self.beta * length_averaged(logps, counts)}

    def fast_options(self, tensors):
        return _dpo_kernel(self, tensors)


@register("alphapo")
@dataclass(frozen=True)
class AlphaPO(SimPO):
    """AlphaPO (Gupta et al. 2025, arXiv 2501.03884): SimPO with the reward (1 - p^-alpha) / alpha in place of log p,
    p = exp(L / n) a sequence's geometric mean probability. alpha = 0 is SimPO.
    """

    alpha: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("alpha", self.alpha)

    def losses(self, logps, counts, ref_logps):
        chosen, rejected = self._transformed(logps, counts).chunk(2)
        return smoothed_log_loss(self.beta * (chosen - rejected) - self.gamma, self.label_smoothing)

    def report(self, logps, counts, ref_logps):
        return {"rewards": self.beta * self._transformed(logps, counts)}

    def _transformed(self, logps, counts):
        averages = length_averaged(logps, counts)
        if self.alpha == 0:
            return averages
        return -torch.expm1((-self.alpha * averages).clamp(max=LARGEST_EXPONENT)) / self.alpha


@register("cpo")
@dataclass(frozen=True)
class CPO(Head):
    """CPO (Xu et al. 2024, arXiv 2401.08417): a pair loss of log-probabilities without a reference, plus
    ``cpo_alpha`` times the negative log-likelihood of the chosen answers, averaged over their tokens in the batch.

    ``loss_type`` with u = L_w - L_l: ``sigmoid`` -(1-s) log sigma(beta u) - s log sigma(-beta u); ``hinge``
    max(0, 1 - beta u); ``ipo`` (u - 1/(2 beta))^2 of length-averaged log-probabilities.
    """

    beta: float = 0.1
    cpo_alpha: float = 1.0
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0

    group: ClassVar[int | None] = 2
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checks.number("beta", self.beta, above=0)
        checks.number("cpo_alpha", self.cpo_alpha, at_least=0)
        checks.choice("loss_type", self.loss_type, ("sigmoid", "hinge", "ipo"))
        _check_label_smoothing(self.label_smoothing)
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(
                f"label_smoothing={self.label_smoothing} has no meaning for loss_type={self.loss_type!r}: "
                "it belongs to 'sigmoid'"
            )

    def losses(self, logps, counts, ref_logps, *, batch_counts):
        chosen, rejected = (length_averaged(logps, counts) if self.loss_type == "ipo" else logps).chunk(2)
        u = chosen - rejected
        if self.loss_type == "hinge":
            losses = torch.relu(1 - self.beta * u)
        elif self.loss_type == "ipo":
            losses = (u - 1 / (2 * self.beta)) ** 2
        else:
            losses = smoothed_log_loss(self.beta * u, self.label_smoothing)
        return losses + self.cpo_alpha * chosen_nll(logps, batch_counts) if self.cpo_alpha else losses

    def report(self, logps, counts, ref_logps, **tensors):
        return {"rewards": self.beta * (length_averaged(logps, counts) if self.loss_type == "ipo" else logps)}


def log1mexp(values: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(a)) for a < 0, without cancellation on either side of a = -log 2."""
    above = values > -math.log(2)
    # each branch sees only values it is exact for, so that neither puts a NaN into the other's gradient
    near = torch.log(-torch.expm1(torch.where(above, values, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(above, -1.0, values)))
    return torch.where(above, near, far)


def odds_ratio_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return -log sigma(o_w - o_l) with o = a - log(1 - exp a) of average log-probabilities a <= 0. [B/2]

    Where the chosen answer is the likelier one, this is log(1 + odds_l / odds_w), which has finite derivatives even if
    that answer has probability 1, where o_w is infinite. Where both have probability 1, as empty answers do, the odds
    count as equal.
    """
    is_ahead = chosen > rejected
    # each branch sees only values it is exact for, so that neither puts a NaN into the other's gradient
    a_w, a_l = torch.where(is_ahead, chosen, -1.0), torch.where(is_ahead, rejected, -2.0)
    ahead = torch.log1p(torch.exp(a_l - a_w) * torch.expm1(a_w) / torch.expm1(a_l))
    a_w, a_l = torch.where(is_ahead, -2.0, chosen), torch.where(is_ahead, -1.0, rejected)
    is_certain = (chosen == 0) & (rejected == 0)
    a_w, a_l = a_w.masked_fill(is_certain, -1.0), a_l.masked_fill(is_certain, -1.0)
    behind = -F.logsigmoid((a_w - a_l) - (log1mexp(a_w) - log1mexp(a_l)))
    return torch.where(is_ahead, ahead, behind)


@register("odds_ratio")
@dataclass(frozen=True)
class OddsRatio(Head):
    """ORPO's second term alone (Hong et al. 2024, arXiv 2403.07691): -log sigma(o_w - o_l), with
    o = a - log(1 - exp a) the log-odds of a = L / n.
    """

    group: ClassVar[int | None] = 2
    needs_reference: ClassVar[bool] = False

    def losses(self, logps, counts, ref_logps):
        return odds_ratio_loss(*length_averaged(logps, counts).chunk(2))

    def report(self, logps, counts, ref_logps):
        return {"rewards": length_averaged(logps, counts)}


@register("orpo")
@dataclass(frozen=True)
class ORPO(Head):
    """ORPO (Hong et al. 2024, arXiv 2403.07691): NLL(chosen) - beta log sigma(o_w - o_l), with
    o = a - log(1 - exp a) the log-odds of a = L / n.

    ``beta`` is the paper's lambda. NLL is averaged over the batch's chosen completion tokens with
    ``nll_on="completion"``. With ``"all"``, as in TRL's ``ORPOTrainer``, it is averaged over the chosen prompts' tokens
    too: ``labels`` then hold the prompts' tokens, and the call's tensor ``completion_mask`` [B, T], aligned with
    ``labels``, is 1 for the completions' tokens, of which L and n are.
    """

    beta: float = 0.1
    nll_on: str = "completion"

    group: ClassVar[int | None] = 2
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checks.number("beta", self.beta, at_least=0)
        checks.choice("nll_on", self.nll_on, ("completion", "all"))

    def terms(self):
        if self.nll_on == "completion":
            return super().terms()
        return (1.0, NLL(chosen_only=True)), (self.beta, OddsRatio())

    def losses(self, logps, counts, ref_logps, *, batch_counts):
        if self.nll_on == "all":
            raise TypeError(f"{self!r} reads the prompts' tokens: pass it to fused_loss or fused_linear_loss")
        nll = chosen_nll(logps, batch_counts)
        if self.beta == 0:  # the odds' loss may be infinite
            return nll
        return nll + self.beta * odds_ratio_loss(*length_averaged(logps, counts).chunk(2))

    def report(self, logps, counts, ref_logps, **tensors):
        return {"rewards": self.beta * length_averaged(logps, counts)}  # as the odds do, and TRL's rewards
