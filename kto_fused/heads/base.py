"""What all loss heads share: their protocol, their registry, reductions, and the gradient of a plain formula.

A loss head turns the log-probabilities of B sequences into a loss, the loss's gradient w.r.t. each log-probability, and
values to report. It never sees the vocabulary. A head is a frozen dataclass. Its numbers and names are fields, its
tensors come with each call: an engine calls ``head(logps, token_counts, ref_logps, *tensors, num_losses=None)`` with
[B] float64 log-probabilities and gets ``(loss, grads, *reported)``, all detached. A head has

- ``group``: how many sequences one loss value reads. 1: each sequence alone. 2: sequence i together with i + B/2. None,
  also where a head has no such attribute: the whole batch. An engine may call a head that has a group on some of the
  batch's groups alone; ``num_losses`` is then the number of losses in the whole batch, by which a mean divides, and a
  head with the attribute ``reads_batch_counts`` gets the whole batch's token counts as ``batch_counts``. A head without
  a group is only called on the whole batch, and without these two
- ``statistics``: the names of what it wants to know of the sequences' rows, fields of ``engines.results``; where there
  are any, each call has the keyword ``statistics`` with their tensors
- ``may_be_zero``: whether some sequences' gradients are likely to be exactly 0; False where there is no such attribute.
  An engine then waits for the device to leave their tokens out
- ``reduction`` and ``loss_dtype``: fields that every head has. Its other fields are strings, floats and bools, because
  an operator of ``torch.compile`` takes no object: ``flatten`` turns a head into plain values, ``rebuild`` inverts that
- ``outputs(logps, ..., reduction, num_losses, loss_dtype)``: empty tensors shaped like the results of a call

The public functions and their twins in ``kto_fused.reference`` need more:

- ``prepare(policy, num_sequences, **options)``: checks the options of a call and returns the head and its ``tensors``
- ``needs_reference``: whether the loss has a reference model; ``loss_name``: what messages call the loss
- ``check_logps(policy_logps, ref_logps, token_counts, average_log_prob)``: checks log-probabilities given as arguments
- ``losses(logps, token_counts, ref_logps, *tensors)``: the formula in differentiable PyTorch, one loss per sequence or
  pair. The twins run it under autograd
- ``report(logps, token_counts, ref_logps, *tensors)``: the reported values in plain PyTorch
- ``metrics(reported, *tensors)``: the reported values by the names of ``LossMetrics``' fields

Heads compare by identity, because ``torch.compile`` of PyTorch 2.11 hashes an object before its fields are set. Of the
engines, heads import only ``engines.backends``: how an operator is declared, and which GPU is the current one.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, NamedTuple

import torch

REDUCTIONS = ("mean", "sum", "none")
HEADS: dict[str, type] = {}


def register(name: str) -> Callable[[type], type]:
    """Decorate a head's class: operators find it under ``name``."""

    def decorate(head: type) -> type:
        HEADS[name] = head
        return head

    return decorate


class FlatHead(NamedTuple):
    """A head in the plain types that an operator takes. The name is ``""`` where there is no head."""

    name: str = ""
    reduction: str = "none"
    loss_dtype: torch.dtype = torch.float32
    texts: list[str] = []  # noqa: RUF012 (never changed)
    numbers: list[float] = []  # noqa: RUF012


_COMMON_FIELDS = ("reduction", "loss_dtype")  # of every head


def flatten(head: Any) -> FlatHead:
    """Return the head's name and fields."""
    (name,) = (name for name, kind in HEADS.items() if kind is type(head))
    own = [getattr(head, field.name) for field in fields(head) if field.name not in _COMMON_FIELDS]
    texts = [value for value in own if isinstance(value, str)]
    numbers = [float(value) for value in own if not isinstance(value, str)]
    return FlatHead(name, head.reduction, head.loss_dtype, texts, numbers)


def rebuild(flat: FlatHead) -> Any:
    """Return the head that was flattened."""
    kind, texts, numbers = HEADS[flat.name], iter(flat.texts), iter(flat.numbers)
    own = [field for field in fields(kind) if field.name not in _COMMON_FIELDS]
    values = {field.name: next(texts) if field.type is str else field.type(next(numbers)) for field in own}
    return kind(reduction=flat.reduction, loss_dtype=flat.loss_dtype, **values)


def check_reference(head: Any, **references: torch.Tensor | None) -> None:
    """Require exactly one of the two ``references``, or neither if the head has no reference model."""
    given = [name for name, value in references.items() if value is not None]
    if not head.needs_reference:
        if given:
            raise ValueError(f"{head.loss_name} has no reference model, but {' and '.join(given)} came")
    elif len(given) != 1:
        came = "both" if given else "neither"
        raise ValueError(f"expected exactly one of {' and '.join(references)}, got {came}")


def at_most_one(**references: torch.Tensor | None) -> None:
    """Refuse two references, for a loss that does not say whether it has one."""
    if all(value is not None for value in references.values()):
        raise ValueError(f"expected at most one of {' and '.join(references)}, got both")


def reduce(losses: torch.Tensor, reduction: str, num_losses: int | None = None) -> torch.Tensor:
    """Return the mean or the sum over all sequences or pairs, or with ``none`` the losses as they are.

    If ``losses`` are some of a batch's ``num_losses``, ``mean`` returns their share of the batch's mean.
    """
    if reduction == "mean":
        return losses.mean() if num_losses is None else losses.sum() / num_losses
    return losses.sum() if reduction == "sum" else losses


def weighted(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Multiply each loss by its weight. A loss of weight 0 takes no part, even if it is infinite."""
    if losses.shape != weights.shape:
        raise ValueError(f"weights has shape {list(weights.shape)}, expected one per loss: {list(losses.shape)}")
    return torch.where(weights == 0, 0.0, losses * weights)


def loss_shape(num_losses: int, reduction: str) -> tuple[int, ...]:
    """Return the shape of ``num_losses`` losses after the reduction."""
    return (num_losses,) if reduction == "none" else ()


def value_and_grads(
    losses: Callable[[torch.Tensor], torch.Tensor],
    logps: torch.Tensor,
    reduction: str,
    loss_dtype: torch.dtype,
    num_losses: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the reduced loss of a formula and its gradient w.r.t. each sequence's log-probability, by autograd.

    A mean divides by ``num_losses``, or if that is None by the number of these losses. With ``none`` this is the
    gradient of the sum of all losses. It serves each loss, because no two losses share a sequence.
    """
    if torch.is_inference_mode_enabled():  # nobody can ask for the gradient
        value, grads = reduce(losses(logps), reduction, num_losses), torch.full_like(logps, math.nan)
    else:
        with recording(), no_hooks():
            # clone: a tensor made in inference mode cannot require a gradient
            logps = logps.detach().clone().requires_grad_()
            value = reduce(losses(logps), reduction, num_losses)
            (grads,) = torch.autograd.grad(value.sum(), logps)
    return value.detach().to(loss_dtype), grads


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Let autograd record inside an operator too, for which the dispatcher has excluded autograd's dispatch keys."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    for name in ("AutogradCPU", "AutogradCUDA", "AutogradXPU"):
        keys |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - keys), torch.enable_grad():
        yield


def no_hooks() -> contextlib.AbstractContextManager:
    """Keep saved-tensor hooks away from the head's own autograd graph. Checkpointing and offloading set them around the
    loss for the tensors that the loss's backward saves.
    """
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # then there are none, and none may be set
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
