"""Losses of single completions, each with a label, liked or not, or with an advantage. Formulas and fields as in
``heads.pairs``.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F

from .. import checks
from .base import weighted
from .preference import KTO_LOSS_TYPES, KTOHead, kto_losses, signs_and_weights
from .protocol import Head, check_tensor_names, register
from .tokens import check_clip, check_normalizer, clipped_losses, log_ratios


@dataclass(frozen=True)
class _LabelledCompletion(Head):
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        checks.number("beta", self.beta, above=0)
        checks.number("desirable_weight", self.desirable_weight, at_least=0)
        checks.number("undesirable_weight", self.undesirable_weight, at_least=0)


@register("kto")
@dataclass(frozen=True)
class KTO(_LabelledCompletion):
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306): w (1 - sigma(e beta (r - z0))), with e = +1 for desirable and -1
    for undesirable completions and w the class weight.

    ``reference_point`` says where z0, in nats, comes from: ``"batch_mean"``: the batch's mean log-ratio; ``"tensor"``:
    the call's tensor ``z0``, a scalar (``kto_fused.kto_reference_point``); or a number. It never has a gradient.
    """

    reference_point: float | str = "batch_mean"

    loss_type = "kto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.reference_point, str):
            checks.choice("reference_point", self.reference_point, ("batch_mean", "tensor"))
        else:
            checks.number("reference_point", self.reference_point)

    @property
    def group(self) -> int | None:
        return None if self.reference_point == "batch_mean" else 1

    def _z0(self, log_ratios, z0):
        if z0 is not None and self.reference_point != "tensor":
            raise TypeError(f"z0 has no meaning for reference_point={self.reference_point!r}: expected 'tensor'")
        if self.reference_point == "batch_mean":
            return log_ratios.detach().mean()
        if self.reference_point == "tensor":
            if z0 is None:
                raise TypeError("reference_point='tensor' needs the tensor z0: pass it by name")
            return z0.double().reshape(())
        return log_ratios.new_full((), self.reference_point)

    def losses(self, logps, counts, ref_logps, *, desirable, z0=None):
        log_ratios = logps - ref_logps
        return kto_losses(
            log_ratios,
            desirable,
            self._z0(log_ratios, z0),
            loss_type=self.loss_type,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )

    def fast_options(self, tensors):
        """KTO's kernel, unless weights came. A subclass has a name, and perhaps a formula, of its own."""
        z0, is_tensor = tensors.get("z0"), self.reference_point == "tensor"
        if self.name not in KTO_LOSS_TYPES or "weights" in tensors or (z0 is None) == is_tensor:
            return None  # the formula computes it, or refuses it
        check_tensor_names(self, tensors)
        point = z0 if is_tensor else self.reference_point
        return KTOHead, {
            "desirable": tensors["desirable"],
            "reference_point": point,
            "loss_type": self.loss_type,
            "beta": self.beta,
            "desirable_weight": self.desirable_weight,
            "undesirable_weight": self.undesirable_weight,
        }

    def report(self, logps, counts, ref_logps, *, desirable, z0=None):
        return {"reference_point": self._z0(logps - ref_logps, z0)}


@register("kto_squared")
@dataclass(frozen=True)
class KTOSquared(KTO):
    """A variant of KTO: w (1 - sigma(e beta (r - z0)))^2."""

    loss_type = "kto_squared"


@register("apo_zero_unpaired")
@dataclass(frozen=True)
class APOZeroUnpaired(_LabelledCompletion):
    """APO-zero of single completions (D'Oosterlinck et al. 2024, arXiv 2408.06266): KTO with z0 = 0."""

    group = 1

    def losses(self, logps, counts, ref_logps, *, desirable):
        return kto_losses(
            logps - ref_logps,
            desirable,
            0.0,
            loss_type="kto",
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )

    def fast_options(self, tensors):
        """KTO's kernel, unless weights came. A subclass has a name, and perhaps a formula, of its own."""
        if self.name != "apo_zero_unpaired" or "weights" in tensors:
            return None
        check_tensor_names(self, tensors)
        return KTOHead, {
            "desirable": tensors["desirable"],
            "reference_point": 0.0,
            "loss_type": self.name,
            "beta": self.beta,
            "desirable_weight": self.desirable_weight,
            "undesirable_weight": self.undesirable_weight,
        }

    def report(self, logps, counts, ref_logps, *, desirable):
        return {"reference_point": logps.new_zeros(())}


@register("bco")
@dataclass(frozen=True)
class BCO(_LabelledCompletion):
    """BCO (Jung et al. 2024, arXiv 2404.04656): -w log sigma(e (beta r - delta)).

    ``delta`` is the call's scalar tensor, the moving mean of rewards that the trainer keeps, in units of rewards:
    (mean reward of desirable + mean reward of undesirable) / 2 over steps and ranks.
    """

    group = 1

    def losses(self, logps, counts, ref_logps, *, desirable, delta):
        sign, weight = signs_and_weights(logps, desirable, self.desirable_weight, self.undesirable_weight)
        return weighted(-F.logsigmoid(sign * (self.beta * (logps - ref_logps) - delta)), weight)

    def report(self, logps, counts, ref_logps, *, desirable, delta):
        return {"delta": delta}


@dataclass(frozen=True)
class _SequenceRatio(Head):
    """A policy-gradient loss with one importance ratio per sequence, averaged as ``heads.tokens`` averages tokens."""

    normalizer: str = "sequences"
    max_tokens: int = 0
    on_policy: bool = field(default=False, kw_only=True)

    group: ClassVar[int | None] = 1
    needs_reference: ClassVar[bool] = False
    summed_tensors: ClassVar[tuple[str, ...]] = ("old_logps",)

    def __post_init__(self) -> None:
        check_normalizer(self.normalizer, self.max_tokens)
        checks.flag("on_policy", self.on_policy)

    def _weights(self, counts, batch_counts, num_items):
        """The factors of sequences whose n tokens have one loss each, alike; the mean over the batch is normalised."""
        if self.normalizer == "sequences":
            return (counts > 0).double()
        if self.normalizer == "constant":
            return counts.double() / self.max_tokens
        total = batch_counts.sum().clamp(min=1) if num_items is None else num_items
        return torch.where(total == 0, 0.0, counts.double() * len(batch_counts) / total)


@register("gspo")
@dataclass(frozen=True)
class GSPO(_SequenceRatio):
    """GSPO (Zheng et al. 2025, arXiv 2507.18071), which clips a sequence's importance ratio rho = exp((L - Lold) / n):
    -min(rho A, clip(rho, 1 - low, 1 + high) A).

    The call's tensors are ``advantages`` A [B], and ``old_logps``: Lold [B], or the token log-probabilities from which
    it is summed, shaped as ``labels`` and aligned with them. ``clip`` is one number for low and high, or the pair
    (low, high); the default is the paper's. ``delta`` > 0 bounds rho from above in the first term. With ``on_policy``
    the policy itself has just sampled the completions: Lold is L without a gradient, and no ``old_logps`` come.

    ``normalizer`` is what ``reduction="mean"`` divides by. ``"sequences"`` is the paper's mean over the B sequences.
    The others weight a sequence's loss by its n tokens, as TRL's ``importance_sampling_level="sequence"`` does:
    ``"tokens"`` (TRL's ``bnpo``) divides the sum by the batch's number of completion tokens, ``"constant"``
    (``dr_grpo``) by B ``max_tokens``, and ``"items"`` (``dapo``) by the call's scalar ``num_items``, the number of
    tokens in all accumulated batches and ranks. ``max_tokens=1`` is TRL's ``luspo``. The loss of a completion without a
    token is 0.

    The KL divergence to a reference model is a loss of tokens, ``kl``, which a ``Mix`` adds.
    """

    clip: float | tuple[float, float] = (3e-4, 4e-4)
    delta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self.clip, self.delta)

    def _ratios(self, logps, counts, old_logps):
        return torch.exp(log_ratios(logps, old_logps, self.on_policy) / counts.clamp(min=1))

    def losses(self, logps, counts, ref_logps, *, advantages, old_logps=None, num_items=None, batch_counts):
        weights = self._weights(counts, batch_counts, num_items)
        ratios = self._ratios(logps, counts, old_logps)
        return weighted(clipped_losses(ratios, advantages, self.clip, self.delta), weights)

    def report(self, logps, counts, ref_logps, *, advantages, old_logps=None, num_items=None):
        return {"ratios": self._ratios(logps, counts, old_logps)}


@register("vespo")
@dataclass(frozen=True)
class VESPO(_SequenceRatio):
    """VESPO (Shen et al. 2026, arXiv 2602.10693): -sg(phi) A L, with phi = W^k exp(lambda (1 - W)) of the importance
    ratio W = exp(L - Lold) of the whole sequence, where sg has no gradient.

    ``k_pos`` and ``lambda_pos`` are k and lambda of sequences with A >= 0, ``k_neg`` and ``lambda_neg`` of the others.
    log W is held within [log 1e-8, 20], as in the authors' code.

    Tensors and ``on_policy`` are those of ``gspo``. The loss is the sum of -sg(phi) A l over the sequence's tokens, and
    ``normalizer`` is that of a loss of tokens; TRL's is ``"items"``.
    """

    normalizer: str = "tokens"
    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("k_pos", 0), ("lambda_pos", 1e-4), ("k_neg", 0), ("lambda_neg", 1e-4)):
            checks.number(name, getattr(self, name), at_least=least)

    def _phi(self, logps, advantages, old_logps):
        log_ratio = log_ratios(logps, old_logps, self.on_policy).detach().clamp(math.log(1e-8), 20.0)
        is_gain = advantages >= 0
        k = torch.where(is_gain, torch.full_like(log_ratio, self.k_pos), self.k_neg)
        rate = torch.where(is_gain, torch.full_like(log_ratio, self.lambda_pos), self.lambda_neg)
        return torch.exp(k * log_ratio - rate * torch.expm1(log_ratio))

    def losses(self, logps, counts, ref_logps, *, advantages, old_logps=None, num_items=None, batch_counts):
        weights = self._weights(counts, batch_counts, num_items) / counts.clamp(min=1)
        return weighted(-self._phi(logps, advantages, old_logps) * advantages * logps, weights)

    def report(self, logps, counts, ref_logps, *, advantages, old_logps=None, num_items=None):
        return {"phi": self._phi(logps, advantages, old_logps)}
