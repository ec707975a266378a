"""Loss heads: sequence log-probabilities -> (loss, d loss / d log-probabilities, what to report). No vocabulary here.

A head is a callable ``head(logps, token_counts, ref_logps, *tensors)`` on [B] fp64 log-probabilities; its numbers are
fixed when it is made, its tensors come with the call. It returns ``(loss, grads, *reported)``, all detached. ``HEADS``
names them all: a new loss is a class there, its formula given to ``value_and_grads`` in an operator. Beside the call a
class has

- ``paired``: the batch's halves belong together, sequence i with i + B/2
- ``loss_type``, ``reduction``, ``loss_dtype``, ``backend``: fields that every head has
- ``numbers``: its other fields as floats; ``from_numbers(numbers, **fields of every head)`` makes it again from them,
  inside an operator
- ``couples_batch(*tensors)``: whether a sequence's gradient depends on other sequences (or other pairs)
- ``outputs``: tensors shaped as its results

(Heads compare by identity: torch.compile of PyTorch 2.11 hashes an object before its fields are set.)
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Optional

import torch

from ..engines.backends import on_device, opaque
from .losses import dpo_losses, kto_losses, reduce


@dataclass(frozen=True, eq=False)
class KTOHead:
    """``head(logps, token_counts, ref_logps, desirable, z0) -> (loss, grads, rewards, reference_point)``.

    ``z0`` is a scalar tensor or None; None takes ``reference_point``: a number, or None for the batch's mean log-ratio.
    """

    paired: ClassVar[bool] = False

    loss_type: str
    beta: float
    desirable_weight: float
    undesirable_weight: float
    reference_point: float | None
    reduction: str
    loss_dtype: torch.dtype
    backend: str

    @property
    def numbers(self) -> list[float]:
        numbers = [self.beta, self.desirable_weight, self.undesirable_weight]
        return numbers if self.reference_point is None else [*numbers, self.reference_point]

    @classmethod
    def from_numbers(cls, numbers: list[float], **others: Any) -> "KTOHead":
        beta, desirable_weight, undesirable_weight, *reference_point = numbers
        return cls(
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            reference_point=reference_point[0] if reference_point else None,
            **others,
        )

    def couples_batch(self, desirable: torch.Tensor, z0: torch.Tensor | None) -> bool:
        return z0 is None and self.reference_point is None

    @staticmethod
    def outputs(logps: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """Empty; the last arguments are the reduction and the loss's dtype."""
        *_, reduction, loss_dtype = arguments
        size = logps.shape[0]
        return (
            logps.new_empty(_loss_shape(size, reduction), dtype=loss_dtype),
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
    ) -> tuple[torch.Tensor, ...]:
        return _kto(
            logps,
            ref_logps,
            desirable,
            z0,
            self.reference_point,
            self.loss_type,
            self.beta,
            self.desirable_weight,
            self.undesirable_weight,
            self.backend,
            self.reduction,
            self.loss_dtype,
        )


@dataclass(frozen=True, eq=False)
class DPOHead:
    """``head(logps, token_counts, ref_logps) -> (loss, grads, rewards)``; the first half chosen, the second rejected.

    ``divide_by_length`` divides each side's log-ratio by its ``token_counts`` (``ipo`` and ``simpo`` on sums).
    """

    paired: ClassVar[bool] = True

    loss_type: str
    beta: float
    label_smoothing: float
    gamma: float
    divide_by_length: bool
    reduction: str
    loss_dtype: torch.dtype
    backend: str

    @property
    def numbers(self) -> list[float]:
        return [self.beta, self.label_smoothing, self.gamma, float(self.divide_by_length)]

    @classmethod
    def from_numbers(cls, numbers: list[float], **others: Any) -> "DPOHead":
        beta, label_smoothing, gamma, divide_by_length = numbers
        return cls(
            beta=beta,
            label_smoothing=label_smoothing,
            gamma=gamma,
            divide_by_length=divide_by_length != 0,
            **others,
        )

    def couples_batch(self) -> bool:
        return False

    @staticmethod
    def outputs(logps: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """As ``KTOHead.outputs``."""
        *_, reduction, loss_dtype = arguments
        size = logps.shape[0]
        return (
            logps.new_empty(_loss_shape(size // 2, reduction), dtype=loss_dtype),
            logps.new_empty(size, dtype=torch.float64),
            logps.new_empty(size, dtype=torch.float64),
        )

    def __call__(
        self, logps: torch.Tensor, token_counts: torch.Tensor | None, ref_logps: torch.Tensor | None
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
            self.loss_dtype,
        )


HEADS = {"kto": KTOHead, "dpo": DPOHead}


def flatten(head: Any) -> tuple[str, str, str, torch.dtype, list[float]]:
    """What an operator takes in place of the object: name, loss type, reduction, dtype of the loss, numbers."""
    (name,) = (name for name, kind in HEADS.items() if kind is type(head))
    return name, head.loss_type, head.reduction, head.loss_dtype, head.numbers


def rebuild(
    name: str, loss_type: str, reduction: str, loss_dtype: torch.dtype, backend: str, numbers: list[float]
) -> Any:
    """The head that was flattened."""
    return HEADS[name].from_numbers(
        numbers, loss_type=loss_type, reduction=reduction, loss_dtype=loss_dtype, backend=backend
    )


def pair_scores(logps: torch.Tensor, ref_logps: torch.Tensor | None, token_counts: torch.Tensor | None) -> torch.Tensor:
    """What a pair loss compares: log-ratios (log-probabilities without a reference), divided by length if asked. [B]"""
    scores = logps if ref_logps is None else logps - ref_logps
    return scores if token_counts is None else scores / token_counts.clamp(min=1)


def pair_rewards(
    logps: torch.Tensor,
    ref_logps: torch.Tensor | None,
    token_counts: torch.Tensor | None,
    loss_type: str,
    beta: float,
) -> torch.Tensor:
    """beta times the log-ratio of whole sequences; ``simpo`` defines its reward by the length-averaged one. [B]"""
    return beta * pair_scores(logps, ref_logps, token_counts if loss_type == "simpo" else None)


def value_and_grads(
    losses: Callable[[torch.Tensor], torch.Tensor], logps: torch.Tensor, reduction: str, loss_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reduced loss and its gradient by each sequence's log-probability, for any formula.

    With ``none`` the gradient of the sum serves: no two sequences' or pairs' losses share a log-probability.
    """
    if torch.is_inference_mode_enabled():  # where nobody can ask for the gradient
        value, grads = reduce(losses(logps), reduction), torch.full_like(logps, math.nan)
    else:
        with _recording(), _no_hooks():
            # a copy: what was made in inference mode cannot require a gradient
            logps = logps.detach().clone().requires_grad_()
            value = reduce(losses(logps), reduction)
            (grads,) = torch.autograd.grad(value.sum(), logps)
    return value.detach().to(loss_dtype), grads


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Let autograd record, inside an operator too: the dispatcher excludes autograd's keys below the operator's own."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    for name in ("AutogradCPU", "AutogradCUDA", "AutogradXPU"):
        keys |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - keys), torch.enable_grad():
        yield


def _no_hooks() -> contextlib.AbstractContextManager:
    """Hooks around the loss (checkpointing, offloading) are for what its own backward saves, not for the head's."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # then there are none, and none may be set
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def scale_grads(grads: torch.Tensor, incoming: torch.Tensor) -> torch.Tensor:
    """Chain rule for a loss of [], [B/2] or [B]: sequence s belongs to incoming entry s mod their number. [B]

    A 0 stays one beside an incoming gradient that is not finite: what takes no part keeps a gradient of 0.
    """
    product = grads.view(-1, incoming.numel()) * incoming.reshape(1, -1)
    return torch.where(grads == 0, grads, product.view(-1))


def _loss_shape(num_losses: int, reduction: str) -> tuple[int, ...]:
    return (num_losses,) if reduction == "none" else ()


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
    loss_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    options = {
        "loss_type": loss_type,
        "beta": beta,
        "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
    }
    if backend == "triton":
        from ..kernels import kto

        outputs = KTOHead.outputs(logps, reduction, loss_dtype)
        with on_device(logps):
            kto.forward(
                logps.contiguous(),
                ref_logps.contiguous(),
                (desirable.view(torch.uint8) if desirable.dtype == torch.bool else desirable).contiguous(),
                z0 if z0 is not None else reference_point,
                outputs,
                reduction=reduction,
                **options,
            )
        return outputs

    logps, ref_logps = logps.double(), ref_logps.double()
    log_ratios = logps - ref_logps
    if z0 is not None:
        z0 = z0.to(torch.float64, copy=True).reshape(())
    elif reference_point is not None:
        z0 = log_ratios.new_full((), reference_point)
    else:
        z0 = log_ratios.mean()

    def losses(logps: torch.Tensor) -> torch.Tensor:
        return kto_losses(logps - ref_logps, desirable, z0, **options)

    return *value_and_grads(losses, logps, reduction, loss_dtype), beta * log_ratios, z0


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
    loss_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    options = {"loss_type": loss_type, "beta": beta, "label_smoothing": label_smoothing, "gamma": gamma}
    if backend == "triton":
        from ..kernels import dpo

        outputs = DPOHead.outputs(logps, reduction, loss_dtype)
        with on_device(logps):
            dpo.forward(
                logps.contiguous(),
                None if ref_logps is None else ref_logps.contiguous(),
                None if token_counts is None else token_counts.contiguous(),
                outputs,
                reduction=reduction,
                **options,
            )
        return outputs

    def losses(logps: torch.Tensor) -> torch.Tensor:
        return dpo_losses(*pair_scores(logps, ref_logps, token_counts).chunk(2), **options)

    logps = logps.double()
    rewards = pair_rewards(logps, ref_logps, token_counts, loss_type, beta)
    return *value_and_grads(losses, logps, reduction, loss_dtype), rewards
