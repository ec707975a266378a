"""The engines' side of any ``Head``: its formula differentiated by autograd inside one operator.

``kto`` and ``dpo`` have heads with Triton kernels of their own (``heads.preference``); every other loss passes through
``FormulaHead``. It works on [B] float64 log-probabilities, so that its cost does not depend on the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .. import checks
from ..engines.backends import opaque
from .base import REDUCTIONS, loss_shape, register, value_and_grads, weighted
from .preference import check_desirable, check_token_counts
from .protocol import Head, check_group, check_tensor_names, from_text, report_of, to_text, try_once

# tensors of this package's losses that are numbers, also where they come as [1] and a batch has one sequence or pair
SCALARS = ("z0", "delta", "num_items")


@dataclass(frozen=True, eq=False)
class PreparedLoss:
    """A ``Head`` in plain fields, as an operator takes it, and the names of its call's tensors."""

    text: str  # the loss, as ``protocol.to_text`` writes it
    tensor_names: str  # of the call's tensors in their order, joined by commas
    reduction: str
    loss_dtype: torch.dtype
    backend: str

    @property
    def head(self) -> Head:
        loss = getattr(self, "_loss", None)  # as it was prepared
        return from_text(self.text) if loss is None else loss

    @property
    def group(self) -> int | None:
        return self.head.group

    @property
    def needs_reference(self) -> bool:
        return self.head.needs_reference

    @property
    def loss_name(self) -> str:
        return repr(self.head)

    @property
    def statistics(self) -> tuple[str, ...]:
        """The row statistics that an engine passes with each call as ``statistics``, in this order."""
        return self.head.statistics()

    @classmethod
    def of(
        cls, loss: Head, tensors: dict[str, torch.Tensor], **fields: Any
    ) -> tuple["PreparedLoss", tuple[torch.Tensor, ...]]:
        """Return the prepared loss of a call, and the call's tensors in its order."""
        prepared = cls(text=to_text(loss), tensor_names=",".join(tensors), **fields)
        object.__setattr__(prepared, "_loss", loss)  # torch.compile need not read the text
        return prepared, tuple(tensors.values())

    def by_name(self, tensors: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        """Return the call's tensors by their names."""
        return dict(zip(self.tensor_names.split(",") if self.tensor_names else [], tensors, strict=True))

    def check_statistics(self) -> None:
        """Refuse row statistics among the tensors of a call whose engine finds them itself."""
        for name in self.tensor_names.split(","):
            if name in self.statistics:
                raise TypeError(
                    f"{name} came for {self.head!r}, but is found in the logits, without a gradient: leave it out"
                )


def checked_tensor(name: str, value: torch.Tensor | float, policy: torch.Tensor) -> torch.Tensor:
    """Check dtype and device of a loss's tensor; a number becomes a scalar tensor."""
    if checks.is_number(value):
        value = torch.tensor(float(value), dtype=torch.float64, device=policy.device)
    checks.tensor(name, value, checks.NUMBER_DTYPES, checks.A_NUMBER)
    checks.same_device(name, value, "the policy", policy)
    return value


def as_scalar(value: torch.Tensor, *shapes: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor [1] as a scalar, unless [1] is one of the ``shapes`` of values per sequence, loss or token."""
    return value.reshape(()) if value.shape == (1,) and (1,) not in shapes else value


@register("formula")
@dataclass(frozen=True, eq=False)
class FormulaHead(PreparedLoss):
    """``head(logps, token_counts, ref_logps, *tensors) -> (loss, grads)`` of a ``Head``, see ``heads.base``."""

    reads_batch_counts: ClassVar[bool] = True

    @property
    def may_be_zero(self) -> bool:
        """Whether gradients of exactly 0 are worth looking for: weights and advantages of 0, clipped ratios."""
        return not {"weights", "advantages"}.isdisjoint(self.tensor_names.split(","))

    @classmethod
    def prepare(
        cls,
        policy: torch.Tensor,
        num_sequences: int,
        *,
        loss: Head,
        tensors: dict[str, torch.Tensor],
        reduction: str,
        average_log_prob: bool,  # False: heads divide by the token counts themselves
        **fields: Any,
    ) -> tuple["FormulaHead", tuple[torch.Tensor, ...]]:
        """Check a call's tensors. Returns the head and its tensors."""
        checks.choice("reduction", reduction, REDUCTIONS)
        tensors = check_tensors(loss, tensors, num_sequences, policy)
        # a loss with a kernel has losses of its own for each sequence, although it reads the batch
        if reduction == "none" and loss.group is None and loss.fast_options(tensors) is None:
            raise ValueError(
                f"reduction='none' has no meaning for {loss!r}, which reads the whole batch: expected 'mean' or 'sum'"
            )
        try_once(loss, tensors, num_sequences)
        return cls.of(loss, tensors, reduction=reduction, **fields)

    def check_logps(
        self,
        policy_logps: torch.Tensor,
        ref_logps: torch.Tensor | None,
        token_counts: torch.Tensor | None,
        average_log_prob: bool,
    ) -> None:
        """Check the log-probabilities of ``loss_from_logps``."""
        if (ref_logps is not None) != self.needs_reference:
            expected = "log-probabilities [B]" if self.needs_reference else "None"
            raise ValueError(f"ref_logps must be {expected} for {self.head!r}, got {type(ref_logps).__name__}")
        if ref_logps is not None:
            checks.per_sequence(
                "ref_logps", ref_logps, checks.FLOAT_DTYPES, checks.A_FLOAT, policy_logps.numel(), policy_logps
            )
        if token_counts is not None:
            check_token_counts(token_counts, policy_logps)
        missing = [name for name in self.statistics if name not in self.tensor_names.split(",")]
        if missing:
            raise TypeError(
                f"{self.head!r} reads the row statistics {missing}, which log-probabilities do not tell: pass them by "
                "name [B], means over completion tokens; the losses from logits and hidden states find them"
            )

    def losses(
        self,
        logps: torch.Tensor,
        token_counts: torch.Tensor | None,
        ref_logps: torch.Tensor | None,
        *tensors: torch.Tensor,
        batch_counts: torch.Tensor | None = None,
        statistics: Sequence[torch.Tensor] = (),
    ) -> torch.Tensor:
        """One loss per sequence or per pair; times the weight where ``weights`` came for a loss that has none."""
        named, weights = self.by_name(tensors), None
        if statistics:
            named.update(zip(self.statistics, statistics, strict=True))
        if "weights" in named and "weights" not in self.head.tensor_names():
            weights = named.pop("weights")
        if self.head.reads_batch_counts():
            named["batch_counts"] = token_counts if batch_counts is None else batch_counts
        if weights is not None and self.group is not None:  # weight 0 stops gradients, even an infinite loss's
            logps = torch.where((weights != 0).repeat(self.group), logps, logps.detach())
        try:
            losses = self.head.losses(logps, token_counts, ref_logps if self.needs_reference else None, **named)
        except (AttributeError, TypeError) as error:
            if token_counts is None:
                raise ValueError(f"{self.head!r} reads the completions' lengths: pass token_counts [B]") from error
            raise
        return losses if weights is None else weighted(losses, weights)

    def report(self, logps, token_counts, ref_logps, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """What to log, by name."""
        return report_of(self.head, logps, token_counts, ref_logps, self.by_name(tensors))

    def metrics(self, reported: dict[str, torch.Tensor], *tensors: torch.Tensor) -> dict[str, Any]:
        """What ``report`` returned, by the fields of ``LossMetrics``."""
        known = {name: reported[name] for name in ("rewards", "reference_point") if name in reported}
        others = {name: value for name, value in reported.items() if name not in known}
        desirable = self.by_name(tensors).get("desirable")
        if desirable is not None and desirable.dtype != torch.bool:
            desirable = desirable == 1
        return {**known, "desirable": desirable, "is_paired": self.head.is_paired, "reported": others}

    def outputs(self, logps: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
        """Empty tensors like the results of ``_formula``: the loss and d loss / d log-probability [B]."""
        *_, reduction, _, loss_dtype = arguments
        num_losses = logps.shape[0] // (self.group or 1)
        return logps.new_empty(loss_shape(num_losses, reduction), dtype=loss_dtype), logps.new_empty(
            logps.shape[0], dtype=torch.float64
        )

    def __call__(
        self,
        logps: torch.Tensor,
        token_counts: torch.Tensor | None,
        ref_logps: torch.Tensor | None,
        *tensors: torch.Tensor,
        num_losses: int | None = None,
        batch_counts: torch.Tensor | None = None,
        statistics: Sequence[torch.Tensor] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.head.reads_batch_counts() and batch_counts is None:
            batch_counts = token_counts
        elif not self.head.reads_batch_counts():
            batch_counts = None
        return _formula(
            logps,
            token_counts,
            ref_logps,
            list(tensors),
            batch_counts,
            list(statistics),
            self.text,
            self.tensor_names,
            self.backend,
            self.reduction,
            num_losses,
            self.loss_dtype,
        )


def check_tensors(
    loss: Head, tensors: dict[str, torch.Tensor], num_sequences: int, policy: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Check the tensors of a call by name and shape. Returns them detached, in the order of the head's names."""
    check_tensor_names(loss, tensors)
    check_group(type(loss), loss.group)
    if loss.group == 2:
        checks.pairs(num_sequences)
    # a loss of the whole batch may be one of pairs
    lengths = {None: (num_sequences, num_sequences // 2), 1: (num_sequences,), 2: (num_sequences // 2,)}[loss.group]
    checked = {}
    for name in dict.fromkeys((*loss.tensor_names(), *tensors, "weights")):
        value = tensors.get(name)
        if value is None:
            continue
        value = checked_tensor(name, value, policy)
        values_per = () if name in SCALARS else (num_sequences, *lengths)
        value = as_scalar(value, *[(length,) for length in values_per])
        if name == "desirable":
            check_desirable(value, num_sequences, policy)
        elif value.ndim > 1 or (value.ndim == 1 and len(value) not in (num_sequences, *lengths)):
            raise ValueError(
                f"{name} has shape {list(value.shape)}, expected [{num_sequences}] (sequences), "
                f"[{lengths[-1]}] (losses) or a scalar"
            )
        if name == "weights":
            _check_weights(value, loss, lengths)
        if name == "num_items":
            checks.not_negative("num_items", value)
        if name in loss.statistics() and value.shape != (num_sequences,):
            raise ValueError(f"{name} has shape {list(value.shape)}, expected [{num_sequences}], one per sequence")
        if name in loss.statistics() and value.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, but no gradient flows through row statistics: pass {name}.detach(), or "
                "write the loss in plain PyTorch"
            )
        checked[name] = value.detach()
    return checked


def _check_weights(weights: torch.Tensor, loss: Head, lengths: tuple[int, ...]) -> None:
    if "weights" not in loss.tensor_names() and (weights.ndim != 1 or len(weights) not in lengths):
        raise ValueError(f"weights has shape {list(weights.shape)}, expected [{lengths[-1]}], one per loss of {loss!r}")
    checks.not_negative("weights", weights)


def _fake_formula(
    logps,
    counts,
    ref_logps,
    tensors,
    batch_counts,
    statistics,
    text,
    tensor_names,
    backend,
    reduction,
    num_losses,
    loss_dtype,
):
    head = FormulaHead(text, tensor_names, reduction, loss_dtype, backend)
    return head.outputs(logps, reduction, num_losses, loss_dtype)


@opaque(
    fake=_fake_formula,
    schema="(Tensor logps, Tensor? counts, Tensor? ref_logps, Tensor[] tensors, Tensor? batch_counts, "
    "Tensor[] statistics, str text, str tensor_names, str backend, str reduction, SymInt? num_losses, "
    "ScalarType loss_dtype) -> (Tensor, Tensor)",
)
def _formula(
    logps,
    counts,
    ref_logps,
    tensors,
    batch_counts,
    statistics,
    text,
    tensor_names,
    backend,
    reduction,
    num_losses,
    loss_dtype,
):
    """The reduced loss of a head's formula in float64, and its gradient by the log-probabilities [B]."""
    head = FormulaHead(text, tensor_names, reduction, loss_dtype, backend)
    try_once(head.head, head.by_name(tuple(tensors)), len(logps))  # a compiled call comes here untried
    ref_logps = None if ref_logps is None else ref_logps.double()

    def losses(logps: torch.Tensor) -> torch.Tensor:
        given = {"batch_counts": batch_counts, "statistics": statistics}
        return head.losses(logps, counts, ref_logps, *tensors, **given)

    return value_and_grads(losses, logps.double(), reduction, loss_dtype, num_losses)
