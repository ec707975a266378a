"""The losses of a recipe: which there are, their fields as options of a configuration, and what they ask of a batch.

A configuration names losses of the registry by ``loss_type``. Every field of these losses is an option of its own,
None by default, which means the loss's own default. ``with_loss_options`` makes the options from the registry, so a
loss that joins the registry brings its options with it.
"""

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable, Iterable
from typing import Any

from .. import heads
from ..heads.protocol import Head, Mix, class_of, level_of

AnyLoss = Head | Callable[..., Any]
# the tensors of a loss that the recipes have, by the names in its ``losses``
OF_PAIRS = ("weights",)
OF_COMPLETIONS = ("desirable", "z0", "delta", "weights")
# what the options of several losses mean; an option that is missing here is described by its losses alone
MEANINGS = {
    "beta": "Scale of the rewards; with a reference, the pull towards it.",
    "label_smoothing": "Probability that a preference is wrong.",
    "gamma": "Target margin between the rewards of the two answers.",
    "desirable_weight": "Weight of desirable completions, >= 0.",
    "undesirable_weight": "Weight of undesirable completions, >= 0.",
    "f_divergence_type": "Divergence that replaces the log-ratio by its score.",
    "f_alpha_divergence_coef": "Alpha of the alpha-divergence.",
    "use_weighting": "Multiply a pair's loss by its detached likelihood (WPO).",
    "ld_alpha": "Factor of the log-probabilities of tokens beyond the shorter answer's length, in [0, 1] (LD-DPO).",
    "nll_on": "Tokens of the negative log-likelihood: those of the completion, or all, the prompt's too.",
    "cpo_alpha": "Factor of the chosen answers' negative log-likelihood, >= 0.",
}


def built_in(is_wanted: Callable[[type[Head]], bool]) -> tuple[str, ...]:
    """Return the names of this package's losses whose class ``is_wanted``, in alphabetical order."""
    ours = (name for name in heads.names() if is_ours(name))
    return tuple(name for name in ours if is_wanted(class_of(name)))


def is_ours(name: str) -> bool:
    return class_of(name).__module__.startswith(f"{heads.__name__}.")


def reads_pairs(loss: AnyLoss | type[Head]) -> bool:
    """Whether the loss reads pairs: chosen sequences, then rejected ones.

    A loss of the whole batch that does not say so reads pairs unless it takes labels of single completions.
    """
    group, is_paired = getattr(loss, "group", None), getattr(loss, "is_paired", False)
    if isinstance(loss, type):  # a property depends on fields, of which a class has no values
        group = None if isinstance(group, property) else group
        is_paired = group == 2 if isinstance(is_paired, property) else is_paired
    return is_paired or (group is None and not takes(loss, "desirable"))


def trains_pairs(kind: type[Head]) -> bool:
    """Whether a class is one of ``FusedDPOTrainer``."""
    return kind.level == "sequence" and reads_pairs(kind) and {*kind.required_tensors()} <= {*OF_PAIRS}


def trains_completions(kind: type[Head]) -> bool:
    """Whether a class is one of ``FusedKTOTrainer``."""
    return kind.level == "sequence" and not reads_pairs(kind) and {*kind.required_tensors()} <= {*OF_COMPLETIONS}


def trains_tokens(kind: type[Head]) -> bool:
    """Whether a class is one of ``FusedSFTTrainer``: it needs nothing but a token's log-probability."""
    return kind.level == "token" and not kind.required_tensors()


# ---- fields as options ----------------------------------------------------------------------------------------------


def option_name(loss: str, field: str, taken: Iterable[str]) -> str:
    """Return the option of a loss's field: its name, after the loss's where another option has that name."""
    return f"{loss}_{field}" if field in taken else field


def with_loss_options(names: tuple[str, ...], left_out: tuple[str, ...] = ()) -> Callable[[type], type]:
    """Decorate a configuration, below ``@dataclass``, with an option for each field of the losses ``names``.

    ``left_out`` are fields that the recipe itself sets. The class attributes ``loss_names`` and ``loss_options`` keep
    the names and, by option, the defaults of the losses that have it.
    """

    def decorate(config: type) -> type:
        annotations = dict(inspect.get_annotations(config))
        bases = [base for base in config.__mro__[1:] if dataclasses.is_dataclass(base)]
        inherited = {field.name for base in bases for field in dataclasses.fields(base)}
        config.loss_names = names
        config.taken_names = frozenset({*annotations, *inherited})
        config.loss_options = {}
        for name in names:
            hints = typing.get_type_hints(class_of(name))
            for field in dataclasses.fields(class_of(name)):
                if field.name not in left_out:
                    option = option_name(name, field.name, config.taken_names)
                    config.loss_options.setdefault(option, {})[name] = field.default
                    annotations.setdefault(option, option_type(hints[field.name]) | None)
        for option, defaults in config.loss_options.items():
            setattr(config, option, dataclasses.field(default=None, metadata={"help": _help(option, defaults, names)}))
        config.__annotations__ = annotations
        return config

    return decorate


def option_type(hint: Any) -> type:
    """Return the type of an option's value on the command line. Text that is no text of the loss is read as JSON."""
    return hint if hint in (bool, int, float, str) else str


def _help(option: str, defaults: dict[str, Any], names: tuple[str, ...]) -> str:
    by_value: dict[Any, list[str]] = {}
    for name, default in defaults.items():
        by_value.setdefault(default, []).append(name)
    often = max(by_value, key=lambda value: len(by_value[value]))
    rest = "".join(f"; {', '.join(by_value[value])}: {value}" for value in by_value if value != often)
    others = [name for name in names if name not in defaults]
    of = f" Of all losses but {', '.join(others)}." if len(others) < len(defaults) else f" Of {', '.join(defaults)}."
    of = of if others else ""
    return f"{MEANINGS.get(option, 'A field of the loss.')}{of} If not given: {often}{rest}."


def field_value(value: Any, hint: Any) -> Any:
    """Return an option's value as the loss's field takes it: a list as a tuple, JSON where a field takes no text."""
    if isinstance(value, str) and hint is not str and str not in typing.get_args(hint):
        value = json.loads(value)
    return tuple(value) if isinstance(value, list) else value


# ---- what a loss asks of its batch ----------------------------------------------------------------------------------


def describe(loss: AnyLoss) -> str:
    """Return a text that names the loss: a head with its fields, or a function with its module."""
    if isinstance(loss, Head):
        return repr(loss)
    return f"{loss.__module__}.{loss.__qualname__}" if hasattr(loss, "__qualname__") else repr(loss)


def needs_reference(loss: AnyLoss) -> bool:
    """Whether the loss reads the reference's log-probabilities. A function does unless its attribute says otherwise."""
    return getattr(loss, "needs_reference", True)


def takes(loss: AnyLoss | type[Head], tensor: str) -> bool:
    """Whether the loss has a parameter for a tensor of this name."""
    if isinstance(loss, Head) or (isinstance(loss, type) and issubclass(loss, Head)):
        return tensor in loss.tensor_names() or loss.takes_any_tensor()
    parameters = list(inspect.signature(loss).parameters.values())[3:]
    return any(each.name == tensor or each.kind is each.VAR_KEYWORD for each in parameters)


def required(loss: AnyLoss) -> tuple[str, ...]:
    """Return the names of the tensors without which the loss cannot be computed."""
    if isinstance(loss, Head):
        return loss.required_tensors()
    parameters = list(inspect.signature(loss).parameters.values())[3:]
    named = (each for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL))
    return tuple(each.name for each in named if each.default is each.empty)


def level(loss: AnyLoss) -> str:
    """Return ``"sequence"``, ``"token"``, or ``"mixed"`` for a loss with a part of each. A function reads sequences."""
    return level_of(loss) if isinstance(loss, Head) else "sequence"


def is_of_batch(loss: AnyLoss) -> bool:
    """Whether there is only one loss of a whole batch, and none of each sequence or pair."""
    return getattr(loss, "group", None) is None or level(loss) == "mixed"


def depends_on_batch_tokens(loss: AnyLoss) -> bool:
    """Whether a part of the loss is a mean over the tokens of the batch."""
    return level(loss) == "mixed" or (isinstance(loss, Head) and loss.reads_batch_counts())


def parts(loss: AnyLoss) -> list[AnyLoss]:
    """Return the losses of a mix, or the loss alone."""
    return loss.heads if isinstance(loss, Mix) else [loss]
