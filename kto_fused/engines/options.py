"""The options of the engines, as dataclasses and as the flat arguments of an operator.

``LogitOptions`` and ``HiddenOptions`` are made once per call by the public functions, which have validated every value.
An operator that ``torch.compile`` sees takes plain values only: ``flat`` gives a dataclass's fields in order,
``LogitOptions(*values)`` and ``HiddenOptions.unflat`` make it again, and ``LOGIT_SCHEMA`` and ``HIDDEN_SCHEMA`` declare
the fields in an operator's schema. All of them read the dataclass, so that an option is listed in one place.
"""

import enum
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from .layout import compute_dtype

# The type that an operator's schema has for a field's type.
_SCHEMA_TYPES = {
    bool: "bool",
    int: "SymInt",  # a number that changes from call to call stays symbolic, and nothing is compiled again
    float: "float",
    float | None: "float?",
    str: "str",
    torch.dtype: "ScalarType",
}


def _schema(kind: type, names: tuple[str, ...]) -> str:
    types = {field.name: field.type for field in fields(kind)}
    return ", ".join(f"{_SCHEMA_TYPES[types[name]]} {name}" for name in names)


@dataclass(frozen=True)
class LogitOptions:
    """How logits and labels become log-probabilities, and how the gradient by the logits is written."""

    ignore_index: int = -100
    shift: bool = True
    average_log_prob: bool = False
    temperature: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    inplace_backward: bool = False
    backend: str = "torch"
    sum_squares: bool = False  # whether the row pass finds log sum p^2, which some loss heads ask for

    @property
    def factor(self) -> float:
        """The last factor of z = factor * u. u is softcap tanh(scale x / softcap); without a soft cap, the logit x."""
        return (1.0 if self.logit_softcap is not None else self.logit_scale) / self.temperature

    @property
    def transform(self) -> dict[str, float | None]:
        """From logits x to z, in the names that the row operations of both backends take."""
        return {"scale": self.logit_scale, "softcap": self.logit_softcap, "factor": self.factor}

    @property
    def labelling(self) -> dict[str, int | bool]:
        """Which label each row predicts, in the names that ``layout`` takes."""
        return {"ignore_index": self.ignore_index, "shift": self.shift}

    def flat(self) -> tuple:
        """The fields in order, for an operator."""
        return tuple([getattr(self, name) for name in _LOGIT_FIELDS])


_LOGIT_FIELDS = tuple(field.name for field in fields(LogitOptions))
LOGIT_SCHEMA = _schema(LogitOptions, _LOGIT_FIELDS)


class Needs(NamedTuple):
    """Which of hidden states, LM-head weight and bias need a gradient."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


NO_NEEDS = Needs()


@dataclass(frozen=True)
class HiddenOptions:
    """How hidden states and an LM head become log-probabilities."""

    logits: LogitOptions
    dtype: torch.dtype  # in which the policy's GEMMs read hidden states and weight
    ref_dtype: torch.dtype  # the same for the reference model's GEMMs
    chunk_bytes: int
    # results are the log-probabilities of positions [rows] instead of sequences [B]
    per_position: bool = False
    needs: Needs = NO_NEEDS

    @property
    def is_head_trained(self) -> bool:
        return self.needs.weight or self.needs.bias

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.dtype)

    def flat(self) -> tuple:
        """The fields in order, ``logits`` and ``needs`` as their own fields, for an operator."""
        return *self.logits.flat(), *[getattr(self, name) for name in _HIDDEN_FIELDS], *self.needs

    @staticmethod
    def unflat(values: tuple[Any, ...]) -> "HiddenOptions":
        """Make the options of an operator's plain values again: the inverse of ``flat``."""
        num_logit, num_needs = len(_LOGIT_FIELDS), len(Needs._fields)
        logits, needs = LogitOptions(*values[:num_logit]), Needs(*values[-num_needs:])
        return HiddenOptions(logits, *values[num_logit:-num_needs], needs=needs)


_HIDDEN_FIELDS = tuple(field.name for field in fields(HiddenOptions) if field.name not in ("logits", "needs"))
_NEEDS_SCHEMA = ", ".join(f"bool needs_{name}" for name in Needs._fields)
HIDDEN_SCHEMA = f"{LOGIT_SCHEMA}, {_schema(HiddenOptions, _HIDDEN_FIELDS)}, {_NEEDS_SCHEMA}"
NUM_HIDDEN_OPTIONS = len(_LOGIT_FIELDS) + len(_HIDDEN_FIELDS) + len(Needs._fields)


class GradientMode(enum.Enum):
    """When the gradients are found, and of what. A GEMM is 2 N H V operations for N completion tokens.

    | mode        | gradients wanted  | result                          | found in     | GEMMs                         |
    |-------------|-------------------|---------------------------------|--------------|-------------------------------|
    | NONE        | none              | any                             |              | 1                             |
    | OF_LOSS     | any               | a reduced loss, one number      | the forward  | 2 frozen head; 3 trained head |
    | PER_TOKEN   | hidden states     | one loss per group, or no loss  | the forward  | 2                             |
    | IN_BACKWARD | weight or bias    | one loss per group, or no loss  | the backward | 4                             |

    OF_LOSS takes a 4th GEMM for a trained head where the loss is known only after a chunk's logits were dropped: a
    group of sequences exceeds the chunk and its accumulators half of ``chunk_bytes``, or the head reads a whole batch
    that exceeds the chunk. Where the weight or the bias needs a gradient and the hidden states do not, one GEMM less.
    """

    # No gradient is wanted.
    NONE = enum.auto()
    # The forward finds the gradients of the reduced loss; the backward scales them by one number.
    OF_LOSS = enum.auto()
    # The forward finds d log-probability / d hidden of each token; the backward scales the rows by d loss / d
    # log-probability, which only the caller knows.
    PER_TOKEN = enum.auto()
    # The backward computes the logits again: the weight's gradient needs d loss / d log-probability before its GEMM.
    IN_BACKWARD = enum.auto()


def gradient_mode(needs: Needs, head: Any) -> GradientMode:
    """Decide the mode for the gradients wanted and the loss head, which is None for log-probabilities alone."""
    if not (needs.hidden or needs.weight or needs.bias):
        return GradientMode.NONE
    if head is not None and head.reduction != "none":
        return GradientMode.OF_LOSS
    return GradientMode.IN_BACKWARD if needs.weight or needs.bias else GradientMode.PER_TOKEN
