"""The engines' side of a token-level ``Head``: its formula on completion tokens, differentiated by autograd."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .. import checks
from .base import register, value_and_grads, weighted
from .formula import PreparedLoss, as_scalar, checked_tensor
from .protocol import Head, check_tensor_names, normalizer_of, try_once


@register("token_formula")
@dataclass(frozen=True, eq=False)
class TokenFormulaHead(PreparedLoss):
    """A token-level head, which an engine calls on the completion tokens that it has just visited.

    ``weights_of`` gives the factors of each sequence's tokens, ``on_tokens`` the loss of some tokens and its gradient.
    The loss may be a ``Mix`` of L token-level losses, each with factors of its own.
    """

    level: ClassVar[str] = "token"
    group: ClassVar[int] = 1
    needs_reference: ClassVar[bool] = False

    @classmethod
    def prepare(
        cls,
        policy: torch.Tensor,
        num_sequences: int,
        *,
        loss: Head,
        tensors: dict[str, torch.Tensor],
        reduction: str,
        average_log_prob: bool,
        **fields: Any,
    ) -> tuple["TokenFormulaHead", tuple[torch.Tensor, ...]]:
        """Check a call's tensors. Returns the head and its tensors."""
        if reduction == "none":
            raise ValueError(
                f"reduction='none' has no meaning for the token-level {loss!r}: take linear_token_logps or "
                "token_logps, and apply the formula to its result"
            )
        checks.choice("reduction", reduction, ("mean", "sum"))
        if num_sequences % 2 and any(_reads_chosen_only(term) for _, term in loss.terms()):
            raise ValueError(
                f"{loss!r} has chosen_only=True, which needs an even batch, chosen then rejected; got {num_sequences} "
                "sequences"
            )
        tensors = _checked_tensors(loss, tensors, num_sequences, policy)
        return cls.of(loss, tensors, reduction=reduction, **fields)

    @property
    def may_be_zero(self) -> bool:
        """Whether gradients of exactly 0 are worth looking for: clipped ratios, advantages and weights of 0."""
        return bool(self.tensor_names) or any(_reads_chosen_only(term) for _, term in self.head.terms())

    def weights_of(self, token_counts: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return the factors of the losses of each sequence's tokens, [L, B] float64, for sequences of
        ``token_counts``.
        """
        num_items = self.by_name(tensors).get("num_items")
        factors = [
            weight * _factors(term, token_counts.double(), self.reduction, num_items)
            for weight, term in self.head.terms()
        ]
        return torch.stack(factors)

    def losses(
        self,
        logps: torch.Tensor,
        counts: torch.Tensor,
        weights: torch.Tensor,
        tensors: tuple[torch.Tensor, ...],
        statistics: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """Return the weighted losses of n tokens, [n] float64, with ``weights`` [L, n]. ``tensors`` have one entry per
        token, or are scalars; ``statistics`` [n] are those that the head asks for.
        """
        named = {**self.by_name(tensors), **dict(zip(self.statistics, statistics, strict=True))}
        if "num_items" not in self.head.tensor_names():
            named.pop("num_items", None)
        if "weights" in named and "weights" not in self.head.tensor_names():
            weights = weights * named.pop("weights")
        total = None
        for (_, term), factors in zip(self.head.terms(), weights, strict=True):
            its_tensors = named
            if term is not self.head:
                names = (*term.tensor_names(), *term.statistics())
                its_tensors = {name: named[name] for name in names if name in named}
            try_once(term, its_tensors, len(logps))  # a compiled call comes here untried
            # a token of weight 0 takes no part and has a gradient of 0, even if its loss is infinite
            trained_logps = torch.where(factors != 0, logps, logps.detach())
            losses = weighted(term.losses(trained_logps, counts, None, **its_tensors), factors)
            total = losses if total is None else total + losses
        return total

    def on_tokens(
        self,
        logps: torch.Tensor,
        counts: torch.Tensor,
        weights: torch.Tensor,
        tensors: tuple[torch.Tensor, ...],
        statistics: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of n tokens' weighted losses, a float64 scalar, and its gradient by ``logps`` [n]."""
        value, grads = value_and_grads(
            lambda logps: self.losses(logps, counts, weights, tensors, statistics), logps.double(), "sum", torch.float64
        )
        return value, grads.to(logps.dtype)

    def report(self, logps, token_counts, ref_logps, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"rewards": logps}

    def metrics(self, reported: Any, *tensors: torch.Tensor) -> dict[str, Any]:
        return {"rewards": reported["rewards"], "is_paired": False}

    @staticmethod
    def outputs(logps: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """Empty tensors like the loss and the gradient by sequences, of which there is none."""
        *_, loss_dtype = arguments
        return logps.new_empty((), dtype=loss_dtype), logps.new_empty(0, dtype=torch.float64)


def _reads_chosen_only(head: Head) -> bool:
    return getattr(head, "chosen_only", False)


def _factors(head: Head, counts: torch.Tensor, reduction: str, num_items: torch.Tensor | None) -> torch.Tensor:
    """Return the factor of the losses of each sequence's tokens, [B] float64, for sequences of ``counts`` tokens."""
    num_sequences, normalizer = len(counts), normalizer_of(head)
    takes_part = None
    if _reads_chosen_only(head):
        num_sequences //= 2
        takes_part = torch.arange(len(counts), device=counts.device) < num_sequences
        counts = torch.where(takes_part, counts, 0.0)
    if reduction == "sum":
        factors = torch.ones_like(counts)
    elif normalizer == "tokens":
        factors = (1 / counts.sum().clamp(min=1)).expand_as(counts)
    elif normalizer == "sequences":
        factors = 1 / (counts.clamp(min=1) * num_sequences)
    elif normalizer == "constant":
        factors = torch.full_like(counts, 1 / (num_sequences * head.max_tokens))
    else:
        items = num_items.double()
        factors = torch.where(items == 0, 0.0, 1 / items).expand_as(counts)
    return factors if takes_part is None else torch.where(takes_part, factors, 0.0)


def _checked_tensors(
    loss: Head, tensors: dict[str, torch.Tensor], num_sequences: int, policy: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Check the tensors by name and shape. Returns them detached: [B, T] (packed [1, N]) with one entry per position,
    [B] with one per sequence, or scalars. Packed tensors [N] have one per position, also where N = B.
    """
    check_tensor_names(loss, tensors)
    shape = tuple(policy.shape[:-1])
    positions = shape if len(shape) == 2 else (1, *shape)
    checked = {}
    for name in dict.fromkeys((*loss.tensor_names(), *tensors, "weights", "num_items")):
        value = tensors.get(name)
        if value is None:
            continue
        value = checked_tensor(name, value, policy)
        if name == "num_items" and value.numel() != 1:
            raise ValueError(f"num_items must be a number, got shape {list(value.shape)}")
        value = value.reshape(()) if name == "num_items" else value
        value = as_scalar(value, shape, (num_sequences,))
        if len(shape) == 1 and value.shape == shape:
            value = value[None]
        if tuple(value.shape) not in (positions, (num_sequences,), ()):
            raise ValueError(
                f"{name} has shape {list(value.shape)}, expected labels' shape {list(shape)}, [{num_sequences}], one "
                "per sequence, or a scalar"
            )
        if name in ("weights", "num_items"):
            checks.not_negative(name, value)
        checked[name] = value.detach()
    return checked
