"""What all loss heads share: their protocol, their registry, reductions, and the gradient of a plain formula.

A loss head turns the log-probabilities of B sequences into a loss, the loss's gradient w.r.t. each log-probability, and
values to report. It never sees the vocabulary. An engine calls ``head(logps, token_counts, ref_logps, *tensors)`` with
[B] float64 log-probabilities and gets ``(loss, grads, *reported)``, all detached. A head is a frozen dataclass with

- ``loss_type``, ``reduction``, ``loss_dtype``, ``backend``: fields that every head has
- ``numbers``: its other fields as a list of floats; ``from_numbers(numbers, **fields of every head)`` is the inverse.
  An operator of ``torch.compile`` takes no objects, so it takes these (``flatten``) and makes the head again
  (``rebuild``)
- ``prepare(policy, num_sequences, **options)``: checks the options of a call and returns the head and its ``tensors``
- ``needs_reference``: whether ``ref_logps`` is a reference model's, or None
- ``losses(logps, token_counts, ref_logps, *tensors)``: the formula in differentiable PyTorch, one loss per sequence or
  pair. ``kto_fused.reference`` runs it under autograd
- ``report(logps, token_counts, ref_logps, *tensors)``: the reported values in plain PyTorch
- ``metrics(reported, *tensors)``: the reported values as fields of ``LossMetrics``
- ``couples_batch(*tensors)``: whether the gradient of a sequence depends on other sequences (of a pair, on other pairs)
- ``paired``: whether sequence i and sequence i + B/2 form a pair
- ``outputs(logps, ..., reduction, loss_dtype)``: empty tensors shaped like the results of a call

Heads compare by identity, because ``torch.compile`` of PyTorch 2.11 hashes an object before its fields are set. Of the
engines, heads import only ``engines.backends``: how an operator is declared, and which GPU is the current one.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

REDUCTIONS = ("mean", "sum", "none")
HEADS: dict[str, type] = {}


def register(name: str) -> Callable[[type], type]:
    """Decorate a head's class: operators find it under ``name``."""

    def decorate(head: type) -> type:
        HEADS[name] = head
        return head

    return decorate


def flatten(head: Any) -> tuple[str, str, str, torch.dtype, list[float]]:
    """Return a head as the plain values that an operator takes: name, loss type, reduction, loss's dtype, numbers."""
    (name,) = (name for name, kind in HEADS.items() if kind is type(head))
    return name, head.loss_type, head.reduction, head.loss_dtype, head.numbers


def rebuild(
    name: str, loss_type: str, reduction: str, loss_dtype: torch.dtype, backend: str, numbers: list[float]
) -> Any:
    """Make a head from the values that ``flatten`` returned."""
    return HEADS[name].from_numbers(
        numbers, loss_type=loss_type, reduction=reduction, loss_dtype=loss_dtype, backend=backend
    )


def check_reference(head: Any, **references: torch.Tensor | None) -> None:
    """Require exactly one of the two ``references``, or neither if the head has no reference model."""
    given = [name for name, value in references.items() if value is not None]
    if not head.needs_reference:
        if given:
            raise ValueError(f"loss_type={head.loss_type!r} has no reference model, but {' and '.join(given)} came")
    elif len(given) != 1:
        came = "both" if given else "neither"
        raise ValueError(f"expected exactly one of {' and '.join(references)}, got {came}")


def reduce(losses: torch.Tensor, reduction: str) -> torch.Tensor:
    """Return the mean or the sum over all sequences or pairs, or with ``none`` the losses as they are."""
    if reduction == "mean":
        return losses.mean()
    return losses.sum() if reduction == "sum" else losses


def loss_shape(num_losses: int, reduction: str) -> tuple[int, ...]:
    """The shape of ``num_losses`` losses after the reduction."""
    return (num_losses,) if reduction == "none" else ()


def value_and_grads(
    losses: Callable[[torch.Tensor], torch.Tensor], logps: torch.Tensor, reduction: str, loss_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the reduced loss of a formula and its gradient w.r.t. each sequence's log-probability, by autograd.

    With ``none`` this is the gradient of the sum of all losses. It serves each loss, because no two losses share a
    sequence.
    """
    if torch.is_inference_mode_enabled():  # nobody can ask for the gradient
        value, grads = reduce(losses(logps), reduction), torch.full_like(logps, math.nan)
    else:
        with _recording(), _no_hooks():
            # clone: a tensor made in inference mode cannot require a gradient
            logps = logps.detach().clone().requires_grad_()
            value = reduce(losses(logps), reduction)
            (grads,) = torch.autograd.grad(value.sum(), logps)
    return value.detach().to(loss_dtype), grads


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Let autograd record inside an operator too, for which the dispatcher has excluded autograd's dispatch keys."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    for name in ("AutogradCPU", "AutogradCUDA", "AutogradXPU"):
        keys |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - keys), torch.enable_grad():
        yield


def _no_hooks() -> contextlib.AbstractContextManager:
    """Keep saved-tensor hooks away from the head's own autograd graph. Checkpointing and offloading set them around the
    loss for the tensors that the loss's backward saves.
    """
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # then there are none, and none may be set
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
