"""Loss heads: sequence log-probabilities -> (loss, d loss / d log-probabilities, what to report). No vocabulary here.

A head is a frozen dataclass and a callable ``head(logps, token_counts, ref_logps, *tensors, num_losses=None)`` on [B]
fp64 log-probabilities. Its fields are fixed when it is made, its tensors come with the call. It returns ``(loss, grads,
*reported)``, all detached. ``HEADS`` names all heads: a new loss is a class there, its formula given to
``value_and_grads`` in an operator. Beside the call a class has

- ``group``: how many sequences one loss value reads. 1: each sequence alone. 2: sequence i together with i + B/2. None,
  also where a head has no such attribute: the whole batch. An engine may call a head that has a group on some of the
  batch's groups alone. ``num_losses`` is then the number of losses in the whole batch, by which a mean divides. A head
  without a group is only called on the whole batch, and without ``num_losses``.
- ``reduction``, ``loss_dtype``: fields that every head has. Its other fields are strings, floats and bools
  (``flatten``).
- ``outputs``: tensors shaped as its results

(Heads compare by identity: torch.compile of PyTorch 2.11 hashes an object before its fields are set.)
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, Optional

import torch

from ..engines.backends import on_device, opaque
from .losses import dpo_losses, kto_losses, reduce


@dataclass(frozen=True, eq=False)
class KTOHead:
    """``head(logps, token_counts, ref_logps, desirable, z0) -> (loss, grads, rewards, reference_point)``.

    ``reference`` says what the reference point is: ``"number"``: the field ``reference_point``; ``"batch_mean"``: the
    mean log-ratio of the batch; ``"tensor"``: ``z0``, a scalar tensor that comes with the call and is None otherwise.
    """

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
    def group(self) -> int | None:
        return None if self.reference == "batch_mean" else 1

    @staticmethod
    def outputs(logps: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """Empty; the last arguments are the reduction, ``num_losses`` and the loss's dtype."""
        *_, reduction, _, loss_dtype = arguments
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
        num_losses: int | None = None,
    ) -> tuple[torch.Tensor, ...]:
        return _kto(
            logps,
            ref_logps,
            desirable,
            z0,
            self.reference_point if self.reference == "number" else None,
            self.loss_type,
            self.beta,
            self.desirable_weight,
            self.undesirable_weight,
            self.backend,
            self.reduction,
            num_losses,
            self.loss_dtype,
        )


@dataclass(frozen=True, eq=False)
class DPOHead:
    """``head(logps, token_counts, ref_logps) -> (loss, grads, rewards)``; the first half chosen, the second rejected.

    ``divide_by_length`` divides each side's log-ratio by its ``token_counts`` (``ipo`` and ``simpo`` on sums).
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

    @staticmethod
    def outputs(logps: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """As ``KTOHead.outputs``."""
        *_, reduction, _, loss_dtype = arguments
        size = logps.shape[0]
        return (
            logps.new_empty(_loss_shape(size // 2, reduction), dtype=loss_dtype),
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


HEADS = {"kto": KTOHead, "dpo": DPOHead}


class FlatHead(NamedTuple):
    """A head in the plain types that an operator takes; the name is ``""`` where there is no head."""

    name: str = ""
    reduction: str = "none"
    loss_dtype: torch.dtype = torch.float32
    texts: list[str] = []  # noqa: RUF012 (never changed)
    numbers: list[float] = []  # noqa: RUF012


# Fields that every head has.
_COMMON = ("reduction", "loss_dtype")


def flatten(head: Any) -> FlatHead:
    """Return the head's name and fields."""
    (name,) = (name for name, kind in HEADS.items() if kind is type(head))
    own = [getattr(head, field.name) for field in fields(head) if field.name not in _COMMON]
    texts = [value for value in own if isinstance(value, str)]
    numbers = [float(value) for value in own if not isinstance(value, str)]
    return FlatHead(name, head.reduction, head.loss_dtype, texts, numbers)


def rebuild(flat: FlatHead) -> Any:
    """Return the head that was flattened."""
    kind, texts, numbers = HEADS[flat.name], iter(flat.texts), iter(flat.numbers)
    own = [field for field in fields(kind) if field.name not in _COMMON]
    values = {field.name: next(texts) if field.type is str else field.type(next(numbers)) for field in own}
    return kind(reduction=flat.reduction, loss_dtype=flat.loss_dtype, **values)


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
    losses: Callable[[torch.Tensor], torch.Tensor],
    logps: torch.Tensor,
    reduction: str,
    loss_dtype: torch.dtype,
    num_losses: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reduced loss and its gradient by each sequence's log-probability, for any formula. A mean divides by
    ``num_losses``, or where that is None by the number of these losses.

    With ``none`` the gradient of the sum serves: no two sequences' or pairs' losses share a log-probability.
    """
    if torch.is_inference_mode_enabled():  # where nobody can ask for the gradient
        value, grads = reduce(losses(logps), reduction, num_losses), torch.full_like(logps, math.nan)
    else:
        with _recording(), _no_hooks():
            # a copy: what was made in inference mode cannot require a gradient
            logps = logps.detach().clone().requires_grad_()
            value = reduce(losses(logps), reduction, num_losses)
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
    num_losses: Optional[int],
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
    if z0 is not None:
        z0 = z0.to(torch.float64, copy=True).reshape(())
    elif reference_point is not None:
        z0 = log_ratios.new_full((), reference_point)
    else:
        z0 = log_ratios.mean()

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
