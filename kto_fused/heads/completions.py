"""Losses of single completions, each with a label: liked or not. Formulas and fields as in ``heads.pairs``."""

from dataclasses import dataclass

import torch.nn.functional as F

from .. import checks
from .preference import KTO_LOSS_TYPES, KTOHead, kto_losses, signs_and_weights
from .protocol import Head, check_tensor_names, register


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
        return -weight * F.logsigmoid(sign * (self.beta * (logps - ref_logps) - delta))
