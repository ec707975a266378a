"""The losses as ``torch.nn.Module``: keyword arguments are given once, tensors come with each call."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .functional import (
    fused_dpo_loss,
    fused_kto_loss,
    fused_linear_dpo_loss,
    fused_linear_kto_loss,
    fused_linear_loss,
    fused_loss,
)
from .heads.protocol import Head, as_loss
from .metrics import LossMetrics


class _LossModule(torch.nn.Module):
    """Keeps keyword arguments of ``function``, which a subclass names, and calls it with them."""

    function: Callable[..., tuple[torch.Tensor, LossMetrics]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        known = [p.name for p in inspect.signature(self.function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        for name in options:
            if name not in known:
                raise TypeError(f"{type(self).__name__} has no option {name!r}, expected one of {known}")
        self.options = options

    def forward(self, *tensors: torch.Tensor, **options: Any) -> tuple[torch.Tensor, LossMetrics]:
        return self.function(*tensors, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class FusedLoss(_LossModule):
    """``fused_loss`` of one head that keeps keyword arguments. A keyword argument of a call takes precedence.

    Raises ``TypeError`` for an argument that ``fused_loss`` does not take. Values are checked at each call.

    >>> import torch, kto_fused
    >>> simpo = kto_fused.FusedLoss("simpo", logit_softcap=30.0)
    >>> logits, labels = torch.randn(2, 5, 11), torch.randint(11, (2, 5))
    >>> loss, metrics = simpo(logits, labels)
    """

    function = staticmethod(fused_loss)

    def __init__(self, head: Head | str | Callable[..., torch.Tensor], **options: Any) -> None:
        super().__init__(**options)
        as_loss(head)  # refuses what is no loss
        self.head = head

    def forward(self, *tensors: torch.Tensor, **options: Any) -> tuple[torch.Tensor, LossMetrics]:
        return super().forward(self.head, *tensors, **options)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (repr(self.head), super().extra_repr())))


class FusedLinearLoss(FusedLoss):
    """``fused_linear_loss`` of one head that keeps keyword arguments, like ``FusedLoss``.

    >>> import torch, kto_fused
    >>> orpo = kto_fused.FusedLinearLoss("orpo", chunk_bytes=2**28)
    >>> hidden, weight, labels = torch.randn(2, 5, 8), torch.randn(11, 8), torch.randint(11, (2, 5))
    >>> loss, metrics = orpo(hidden, weight, labels)
    """

    function = staticmethod(fused_linear_loss)


class FusedKTOLoss(_LossModule):
    """``fused_kto_loss`` that keeps keyword arguments. A keyword argument of a call takes precedence.

    Raises ``TypeError`` for an argument that ``fused_kto_loss`` does not take. Values are checked at each call.

    >>> import torch, kto_fused
    >>> kto_loss = kto_fused.FusedKTOLoss(beta=0.2, desirable_weight=1.33)
    >>> logits, labels = torch.randn(2, 5, 11), torch.randint(11, (2, 5))
    >>> loss, metrics = kto_loss(logits, labels, torch.tensor([True, False]), ref_logits=logits, reference_point=0.0)
    """

    function = staticmethod(fused_kto_loss)


class FusedDPOLoss(_LossModule):
    """``fused_dpo_loss`` that keeps keyword arguments. A keyword argument of a call takes precedence.

    Raises ``TypeError`` for an argument that ``fused_dpo_loss`` does not take. Values are checked at each call.

    >>> import torch, kto_fused
    >>> dpo_loss = kto_fused.FusedDPOLoss(beta=0.2, loss_type="ipo")
    >>> logits, labels = torch.randn(2, 5, 11), torch.randint(11, (2, 5))
    >>> loss, metrics = dpo_loss(logits, labels, ref_logits=logits)
    """

    function = staticmethod(fused_dpo_loss)


class FusedLinearKTOLoss(_LossModule):
    """``fused_linear_kto_loss`` that keeps keyword arguments. A keyword argument of a call takes precedence.

    Raises ``TypeError`` for an argument that ``fused_linear_kto_loss`` does not take. Values are checked at each call.

    >>> import torch, kto_fused
    >>> kto_loss = kto_fused.FusedLinearKTOLoss(beta=0.2, chunk_bytes=2**28)
    >>> hidden, lm_head, labels = torch.randn(2, 5, 8), torch.nn.Linear(8, 11), torch.randint(11, (2, 5))
    >>> desirable, head = torch.tensor([True, False]), {"lm_head_bias": lm_head.bias}
    >>> loss, metrics = kto_loss(hidden, lm_head.weight, labels, desirable, **head, ref_hidden=hidden)
    """

    function = staticmethod(fused_linear_kto_loss)


class FusedLinearDPOLoss(_LossModule):
    """``fused_linear_dpo_loss`` that keeps keyword arguments. A keyword argument of a call takes precedence.

    Raises ``TypeError`` for an argument that ``fused_linear_dpo_loss`` does not take. Values are checked at each call.

    >>> import torch, kto_fused
    >>> dpo_loss = kto_fused.FusedLinearDPOLoss(beta=0.2, loss_type="ipo")
    >>> hidden, weight, labels = torch.randn(2, 5, 8), torch.randn(11, 8), torch.randint(11, (2, 5))
    >>> loss, metrics = dpo_loss(hidden, weight, labels, ref_hidden=hidden)
    """

    function = staticmethod(fused_linear_dpo_loss)
