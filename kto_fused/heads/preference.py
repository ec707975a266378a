"""KTO and DPO with their relatives: the formulas, the checks of their options, and their heads (see ``heads.base``).

r_s = L_s - Lref_s is the log-ratio of sequence s in nats, sigma the logistic function. The formulas are plain PyTorch:
the reference and the PyTorch backend differentiate them by autograd. The Triton kernels ``kernels/kto.py`` and
``kernels/dpo.py`` hold value and gradient written out by hand.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Optional

import torch
import torch.nn.functional as F

from .. import checks
from ..engines.backends import on_device, opaque
from .base import REDUCTIONS, loss_shape, register, value_and_grads

KTO_LOSS_TYPES = ("kto", "kto_squared", "apo_zero_unpaired")
DPO_LOSS_TYPES = ("sigmoid", "robust", "hinge", "ipo", "simpo", "apo_zero", "apo_down")
LENGTH_AVERAGED = ("ipo", "simpo")  # losses of length-averaged log-ratios
REFERENCE_FREE = ("simpo",)  # losses without a reference model
WITH_LABEL_SMOOTHING = ("sigmoid", "robust", "simpo")
DEFAULT_GAMMA = 0.5


# ---- formulas -------------------------------------------------------------------------------------------------------


def kto_losses(
    log_ratios: torch.Tensor,
    desirable: torch.Tensor,
    reference_point: torch.Tensor | float,
    *,
    loss_type: str,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> torch.Tensor:
    """KTO losses (Ethayarajh et al. 2024, arXiv 2402.01306) of log-ratios r. [B] -> [B]

    With e = +1 for desirable and -1 for undesirable, w the class weight, z0 the reference point and
    q = sigma(e beta (r - z0)):

    - ``kto``: w (1 - q)
    - ``kto_squared``: w (1 - q)^2
    - ``apo_zero_unpaired`` (D'Oosterlinck et al. 2024, arXiv 2408.06266): ``kto`` with z0 = 0

    ``desirable`` holds 1 or 0. Any other value gives NaN.
    """
    sign, weight = signs_and_weights(log_ratios, desirable, desirable_weight, undesirable_weight)
    one_minus_q = torch.sigmoid(-sign * beta * (log_ratios - reference_point))
    if loss_type == "kto_squared":
        return weight * one_minus_q**2
    return weight * one_minus_q


def signs_and_weights(
    like: torch.Tensor, desirable: torch.Tensor, desirable_weight: float, undesirable_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return +1 for desirable and -1 for undesirable completions, and their class weights, in the dtype of ``like``.

    ``desirable`` holds 1 or 0. Any other value gets the weight NaN. [B] -> [B], [B]
    """
    sign = torch.where(desirable == 1, 1.0, -1.0).to(like.dtype)
    # tensors of the right dtype: torch.where would round Python numbers to float32 first
    desirable_weight, undesirable_weight, invalid = (
        like.new_full((), number) for number in (desirable_weight, undesirable_weight, math.nan)
    )
    weight = torch.where(desirable == 1, desirable_weight, torch.where(desirable == 0, undesirable_weight, invalid))
    return sign, weight


def choose_z0(log_ratios: torch.Tensor, z0: torch.Tensor | None, number: float | None) -> torch.Tensor:
    """Return KTO's reference point as a float64 scalar: ``z0``, else the ``number``, else the mean of the log-ratios.

    It never has a gradient.
    """
    if z0 is not None:
        return z0.detach().to(torch.float64, copy=True).reshape(())
    return log_ratios.new_full((), number) if number is not None else log_ratios.detach().mean()


def dpo_losses(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    gamma: float,
) -> torch.Tensor:
    """DPO losses (Rafailov et al. 2023, arXiv 2305.18290) and their relatives. [B/2], [B/2] -> [B/2]

    ``chosen`` r_w and ``rejected`` r_l are log-ratios. For ``ipo`` they are divided by the completions' lengths; for
    ``simpo`` they are the policy's log-probabilities divided by the lengths. h = r_w - r_l, s = label smoothing.

    - ``sigmoid``: -(1-s) log sigma(beta h) - s log sigma(-beta h) (s > 0: Mitchell's conservative DPO)
    - ``robust`` (arXiv 2403.00409): [-(1-s) log sigma(beta h) + s log sigma(-beta h)] / (1 - 2s)
    - ``hinge`` (SLiC-HF, arXiv 2305.10425): max(0, 1 - beta h)
    - ``ipo`` (arXiv 2310.12036): (h - 1 / (2 beta))^2
    - ``simpo`` (arXiv 2405.14734): ``sigmoid`` of beta h - gamma
    - ``apo_zero`` (arXiv 2408.06266): [1 - sigma(beta r_w)] + sigma(beta r_l)
    - ``apo_down`` (arXiv 2408.06266): sigma(beta r_w) + [1 - sigma(beta h)]
    """
    h = chosen - rejected
    if loss_type == "hinge":
        return torch.relu(1 - beta * h)
    if loss_type == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if loss_type == "apo_zero":
        return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)
    if loss_type == "apo_down":
        return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * h)
    u = beta * h - gamma if loss_type == "simpo" else beta * h
    kept = -(1 - label_smoothing) * F.logsigmoid(u)
    if label_smoothing == 0:  # 0 times an infinite loss of the flipped pair would be NaN
        return kept
    flipped = -label_smoothing * F.logsigmoid(-u)
    if loss_type == "robust":
        return (kept - flipped) / (1 - 2 * label_smoothing)
    return kept + flipped


def pair_scores(logps: torch.Tensor, ref_logps: torch.Tensor | None, token_counts: torch.Tensor | None) -> torch.Tensor:
    """Return the scores whose difference a pair loss reads. [B]

    A score is a log-ratio, or a log-probability without a reference; divided by its length if ``token_counts`` came.
    """
    scores = logps if ref_logps is None else logps - ref_logps
    return scores if token_counts is None else scores / token_counts.clamp(min=1)


def pair_rewards(
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    token_counts: torch.Tensor | None,
    loss_type: str,
    beta: float,
) -> torch.Tensor:
    """Return beta times each sequence's log-ratio. [B]

    ``simpo`` alone divides by the length too: its paper defines the reward by the length-averaged log-probability.
    """
    return beta * pair_scores(logps, ref_logps, token_counts if loss_type == "simpo" else None)


# ---- checks of options ----------------------------------------------------------------------------------------------


def check_kto_options(
    loss_type: object,
    beta: object,
    desirable_weight: object,
    undesirable_weight: object,
    reference_point: object,
    reduction: object,
) -> None:
    """Check the numbers and names of a KTO loss. ``reference_point`` is a number, a scalar tensor or "batch_mean"."""
    checks.choice("loss_type", loss_type, KTO_LOSS_TYPES)
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.number("beta", beta, above=0)
    checks.number("desirable_weight", desirable_weight, at_least=0)
    checks.number("undesirable_weight", undesirable_weight, at_least=0)
    is_number = checks.is_number(reference_point)
    if isinstance(reference_point, torch.Tensor):
        checks.tensor("reference_point", reference_point, checks.FLOAT_DTYPES, checks.A_FLOAT)
        if reference_point.numel() != 1:
            raise ValueError(f"reference_point must be a scalar, got shape {list(reference_point.shape)}")
    elif is_number:
        checks.number("reference_point", reference_point)
    elif not (isinstance(reference_point, str) and reference_point == "batch_mean"):
        raise ValueError(f"reference_point must be a number, a scalar tensor or 'batch_mean', got {reference_point!r}")
    is_left_out = isinstance(reference_point, str)  # "batch_mean" is the default
    if loss_type == "apo_zero_unpaired" and not is_left_out and not (is_number and reference_point == 0):
        raise ValueError(f"loss_type='apo_zero_unpaired' fixes reference_point at 0, got {reference_point!r}")


def check_desirable(desirable: torch.Tensor, num_sequences: int, policy: torch.Tensor) -> None:
    """Check that ``desirable`` [B] is bool, or integers 0 and 1."""
    kind = "bool (or 0/1 integers)"
    checks.per_sequence("desirable", desirable, (torch.bool, *checks.INTEGER_DTYPES), kind, num_sequences, policy)
    checks.zero_or_one("desirable", desirable)


def check_dpo_options(
    loss_type: object, beta: object, label_smoothing: object, gamma: object, reduction: object
) -> None:
    """Check the numbers and names of a DPO loss."""
    checks.choice("loss_type", loss_type, DPO_LOSS_TYPES)
    checks.choice("reduction", reduction, REDUCTIONS)
    checks.number("beta", beta, above=0)
    checks.number("label_smoothing", label_smoothing)
    checks.number("gamma", gamma)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    if label_smoothing and loss_type not in WITH_LABEL_SMOOTHING:
        raise ValueError(
            f"label_smoothing={label_smoothing} has no meaning for loss_type={loss_type!r}; "
            f"it belongs to {list(WITH_LABEL_SMOOTHING)}"
        )
    if gamma != DEFAULT_GAMMA and loss_type != "simpo":
        raise ValueError(f"gamma={gamma} has no meaning for loss_type={loss_type!r}; it belongs to 'simpo'")


def check_token_counts(token_counts: torch.Tensor, policy_logps: torch.Tensor) -> None:
    """Check that ``token_counts`` [B] are integers >= 0."""
    kind, num_sequences = "integers", policy_logps.numel()
    checks.per_sequence("token_counts", token_counts, checks.INTEGER_DTYPES, kind, num_sequences, policy_logps)
    checks.not_negative("token_counts", token_counts)


# ---- heads ----------------------------------------------------------------------------------------------------------


@register("kto")
@dataclass(frozen=True, eq=False)
class KTOHead:
    """``head(logps, token_counts, ref_logps, desirable, z0) -> (loss, grads, rewards, reference_point)``.

    ``reference`` says what the reference point is: ``"number"``: the field ``reference_point``; ``"batch_mean"``: the
    mean log-ratio of the batch; ``"tensor"``: ``z0``, a scalar tensor that comes with the call and is None otherwise.
    """

    needs_reference: ClassVar[bool] = True

    loss_type: str
    beta: float
    desirable_weight: float
    undesirable_weight: float
    reference: str
    reference_point: float
    reduction: str
    loss_dtype: torch.dtype
    backend: str

    @property
    def loss_name(self) -> str:
        return f"loss_type={self.loss_type!r}"

    @property
    def group(self) -> int | None:
        return None if self.reference == "batch_mean" else 1

    @property
    def may_be_zero(self) -> bool:
        return 0 in (self.desirable_weight, self.undesirable_weight)

    @classmethod
    def prepare(
        cls,
        policy: torch.Tensor,
        num_sequences: int,
        *,
        desirable: torch.Tensor,
        reference_point: torch.Tensor | float | str,
        loss_type: str,
        beta: float,
        desirable_weight: float,
        undesirable_weight: float,
        average_log_prob: bool,  # unused: KTO has the same formula for sums and means
        **fields: Any,
    ) -> tuple["KTOHead", tuple[torch.Tensor | None, ...]]:
        """Check a call's options for the policy's logits, hidden states or log-probabilities.

        Returns the head and its tensors (desirable, z0). ``fields`` are those that every head has, and ``backend``.
        """
        check_kto_options(loss_type, beta, desirable_weight, undesirable_weight, reference_point, fields["reduction"])
        check_desirable(desirable, num_sequences, policy)
        reference, z0, number = "number", None, 0.0  # apo_zero_unpaired fixes the reference point at 0
        if isinstance(reference_point, torch.Tensor):
            if reference_point.device != policy.device:
                raise ValueError(
                    f"reference_point is on {reference_point.device}, expected the policy's device {policy.device}"
                )
            reference, z0 = "tensor", reference_point.detach()
        elif loss_type != "apo_zero_unpaired" and reference_point == "batch_mean":
            reference = "batch_mean"
        elif loss_type != "apo_zero_unpaired":
            number = float(reference_point)
        head = cls(
            loss_type=loss_type,
            beta=float(beta),
            desirable_weight=float(desirable_weight),
            undesirable_weight=float(undesirable_weight),
            reference=reference,
            reference_point=number,
            **fields,
        )
        return head, (desirable, z0)

    def check_logps(
        self,
        policy_logps: torch.Tensor,
        ref_logps: torch.Tensor | None,
        token_counts: torch.Tensor | None,
        average_log_prob: bool,
    ) -> None:
        """Check the log-probabilities of ``kto_loss_from_logps``."""
        checks.per_sequence(
            "ref_logps", ref_logps, checks.FLOAT_DTYPES, checks.A_FLOAT, policy_logps.numel(), policy_logps
        )

    def losses(
        self,
        logps: torch.Tensor,
        token_counts: torch.Tensor | None,
        ref_logps: torch.Tensor,
        desirable: torch.Tensor,
        z0: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return each sequence's loss. [B]"""
        log_ratios = logps - ref_logps
        return kto_losses(
            log_ratios,
            desirable,
            choose_z0(log_ratios, z0, self._number),
            loss_type=self.loss_type,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )

    def report(
        self,
        logps: torch.Tensor,
        token_counts: torch.Tensor | None,
        ref_logps: torch.Tensor,
        desirable: torch.Tensor,
        z0: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rewards [B] and the reference point, a scalar."""
        log_ratios = logps - ref_logps
        return self.beta * log_ratios, choose_z0(log_ratios, z0, self._number)

    @staticmethod
    def metrics(reported: Sequence[torch.Tensor], desirable: torch.Tensor, z0: torch.Tensor | None) -> dict[str, Any]:
        """Return the fields of ``LossMetrics`` that the head knows."""
        rewards, reference_point = reported
        if desirable.dtype != torch.bool:
            desirable = desirable == 1
        return {
            "rewards": rewards,
            "reference_point": reference_point,
            "desirable": desirable,
            "is_paired": False,
        }

    @property
    def _number(self) -> float | None:
        """The reference point, if it is a number."""
        return self.reference_point if self.reference == "number" else None

    @staticmethod
    def outputs(logps: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """Return empty tensors like ``_kto``'s results. Its last arguments are reduction, ``num_losses`` and dtype."""
        *_, reduction, _, loss_dtype = arguments
        size = logps.shape[0]
        return (
            logps.new_empty(loss_shape(size, reduction), dtype=loss_dtype),
            logps.new_empty(size, dtype=torch.float64),
            logps.new_empty(size, dtype=torch.float64),
            logps.new_empty((), dtype=torch.float64),
        )

    def __call__(
        self,
        logps: torch.Tensor,
        token_counts: torch.Tensor | None,
        ref_logps: torch.Tensor,
        desirable: torch.Tensor,
        z0: torch.Tensor | None,
        num_losses: int | None = None,
    ) -> tuple[torch.Tensor, ...]:
        return _kto(
            logps,
            ref_logps,
            desirable,
            z0,
            self._number,
            self.loss_type,
            self.beta,
            self.desirable_weight,
            self.undesirable_weight,
            self.backend,
            self.reduction,
            num_losses,
            self.loss_dtype,
        )


@register("dpo")
@dataclass(frozen=True, eq=False)
class DPOHead:
    """``head(logps, token_counts, ref_logps) -> (loss, grads, rewards)``. The first half of the batch is chosen, the
    second half rejected.

    ``divide_by_length`` divides each sequence's log-ratio by its ``token_counts``: for ``ipo`` and ``simpo``, if the
    log-probabilities are sums.
    """

    group: ClassVar[int] = 2

    loss_type: str
    beta: float
    label_smoothing: float
    gamma: float
    divide_by_length: bool
    reduction: str
    loss_dtype: torch.dtype
    backend: str

    @property
    def loss_name(self) -> str:
        return f"loss_type={self.loss_type!r}"

    @property
    def needs_reference(self) -> bool:
        return self.loss_type not in REFERENCE_FREE

    @property
    def may_be_zero(self) -> bool:
        return self.loss_type == "hinge"

    @classmethod
    def prepare(
        cls,
        policy: torch.Tensor,
        num_sequences: int,
        *,
        loss_type: str,
        beta: float,
        label_smoothing: float,
        gamma: float,
        average_log_prob: bool,
        **fields: Any,
    ) -> tuple["DPOHead", tuple[()]]:
        """Check a call's options, like ``KTOHead.prepare``. Returns the head and no tensors."""
        check_dpo_options(loss_type, beta, label_smoothing, gamma, fields["reduction"])
        checks.pairs(num_sequences)
        head = cls(
            loss_type=loss_type,
            beta=float(beta),
            label_smoothing=float(label_smoothing),
            gamma=float(gamma),
            divide_by_length=loss_type in LENGTH_AVERAGED and not average_log_prob,
            **fields,
        )
        return head, ()

    def check_logps(
        self,
        policy_logps: torch.Tensor,
        ref_logps: torch.Tensor | None,
        token_counts: torch.Tensor | None,
        average_log_prob: bool,
    ) -> None:
        """Check the log-probabilities of ``dpo_loss_from_logps``: the reference model's come unless the loss has none,
        and lengths come if and only if ``ipo`` or ``simpo`` gets sums.
        """
        if (ref_logps is not None) != self.needs_reference:
            expected = "log-probabilities [B]" if self.needs_reference else "None"
            came = type(ref_logps).__name__
            raise ValueError(f"ref_logps must be {expected} for loss_type={self.loss_type!r}, got {came}")
        if ref_logps is not None:
            checks.per_sequence(
                "ref_logps", ref_logps, checks.FLOAT_DTYPES, checks.A_FLOAT, policy_logps.numel(), policy_logps
            )
        if token_counts is None and self.divide_by_length:
            raise ValueError(
                f"loss_type={self.loss_type!r} works on length-averaged log-probabilities: pass token_counts [B], "
                "or average_log_prob=True if the log-probabilities are averages already"
            )
        if token_counts is not None:
            if not self.divide_by_length:
                raise ValueError(
                    f"token_counts has no meaning for loss_type={self.loss_type!r} with "
                    f"average_log_prob={average_log_prob}"
                )
            check_token_counts(token_counts, policy_logps)

    def losses(
        self, logps: torch.Tensor, token_counts: torch.Tensor | None, ref_logps: torch.Tensor | None
    ) -> torch.Tensor:
        """Return each pair's loss. [B/2]"""
        chosen, rejected = pair_scores(logps, ref_logps, self._lengths(token_counts)).chunk(2)
        return dpo_losses(
            chosen,
            rejected,
            loss_type=self.loss_type,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            gamma=self.gamma,
        )

    def report(
        self, logps: torch.Tensor, token_counts: torch.Tensor | None, ref_logps: torch.Tensor | None
    ) -> tuple[torch.Tensor]:
        """Return the rewards [B]."""
        return (pair_rewards(logps, ref_logps, self._lengths(token_counts), self.loss_type, self.beta),)

    @staticmethod
    def metrics(reported: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Return the fields of ``LossMetrics`` that the head knows."""
        (rewards,) = reported
        return {"rewards": rewards}

    def _lengths(self, token_counts: torch.Tensor | None) -> torch.Tensor | None:
        return token_counts if self.divide_by_length else None

    @staticmethod
    def outputs(logps: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """Return empty tensors like the results of ``_dpo``."""
        *_, reduction, _, loss_dtype = arguments
        size = logps.shape[0]
        return (
            logps.new_empty(loss_shape(size // 2, reduction), dtype=loss_dtype),
            logps.new_empty(size, dtype=torch.float64),
            logps.new_empty(size, dtype=torch.float64),
        )

    def __call__(
        self,
        logps: torch.Tensor,
        token_counts: torch.Tensor | None,
        ref_logps: torch.Tensor | None,
        num_losses: int | None = None,
    ) -> tuple[torch.Tensor, ...]:
        return _dpo(
            logps,
            ref_logps,
            token_counts if self.divide_by_length else None,
            self.loss_type,
            self.beta,
            self.label_smoothing,
            self.gamma,
            self.backend,
            self.reduction,
            num_losses,
            self.loss_dtype,
        )


# ---- operators ------------------------------------------------------------------------------------------------------


@opaque(fake=KTOHead.outputs)
def _kto(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    desirable: torch.Tensor,
    z0: Optional[torch.Tensor],
    reference_point: Optional[float],
    loss_type: str,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    backend: str,
    reduction: str,
    num_losses: Optional[int],
    loss_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute ``KTOHead.__call__``. The reference point is ``z0``, else ``reference_point``, else the batch's mean."""
    options = {
        "loss_type": loss_type,
        "beta": beta,
        "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
    }
    if backend == "triton":
        from ..kernels import kto

        outputs = KTOHead.outputs(logps, reduction, num_losses, loss_dtype)
        with on_device(logps):
            kto.forward(
                logps.contiguous(),
                ref_logps.contiguous(),
                (desirable.view(torch.uint8) if desirable.dtype == torch.bool else desirable).contiguous(),
                z0 if z0 is not None else reference_point,
                outputs,
                reduction=reduction,
                num_losses=num_losses,
                **options,
            )
        return outputs

    logps, ref_logps = logps.double(), ref_logps.double()
    log_ratios = logps - ref_logps
    z0 = choose_z0(log_ratios, z0, reference_point)

    def losses(logps: torch.Tensor) -> torch.Tensor:
        return kto_losses(logps - ref_logps, desirable, z0, **options)

    return *value_and_grads(losses, logps, reduction, loss_dtype, num_losses), beta * log_ratios, z0


@opaque(fake=DPOHead.outputs)
def _dpo(
    logps: torch.Tensor,
    ref_logps: Optional[torch.Tensor],
    token_counts: Optional[torch.Tensor],
    loss_type: str,
    beta: float,
    label_smoothing: float,
    gamma: float,
    backend: str,
    reduction: str,
    num_losses: Optional[int],
    loss_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute ``DPOHead.__call__``. ``token_counts``, if given, divide the log-ratios."""
    options = {"loss_type": loss_type, "beta": beta, "label_smoothing": label_smoothing, "gamma": gamma}
    if backend == "triton":
        from ..kernels import dpo

        outputs = DPOHead.outputs(logps, reduction, num_losses, loss_dtype)
        with on_device(logps):
            dpo.forward(
                logps.contiguous(),
                None if ref_logps is None else ref_logps.contiguous(),
                None if token_counts is None else token_counts.contiguous(),
                outputs,
                reduction=reduction,
                num_losses=num_losses,
                **options,
            )
        return outputs

    def losses(logps: torch.Tensor) -> torch.Tensor:
        return dpo_losses(*pair_scores(logps, ref_logps, token_counts).chunk(2), **options)

    logps = logps.double()
    rewards = pair_rewards(logps, ref_logps, token_counts, loss_type, beta)
    return *value_and_grads(losses, logps, reduction, loss_dtype, num_losses), rewards
