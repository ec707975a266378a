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

import torch

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


def try_function(function: Callable[..., Any]) -> None:
    """Try a loss that is a function, with log-probabilities of 4 sequences, the first 2 of which may be chosen.

    A function that needs other tensors than the recipes have is not called; the recipe refuses it by their names.

    Raises:
        TypeError: it does not take the arguments of a loss.
        ValueError: it fails as it would with any tensors, or returns no differentiable loss of one dimension or none.
    """
    name = describe(function)
    expected = "expected a function f(logps, counts, ref_logps, **tensors) of tensors that returns the losses"
    try:
        inspect.signature(function).bind(None, None, None, **dict.fromkeys(required(function)))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} does not take the arguments of a loss ({error}): {expected}") from error
    group, needed = getattr(function, "group", None), required(function)
    if group not in (None, 1, 2):
        raise ValueError(f"{name}.group must be 1, 2 or None (the whole batch), got {group!r}")
    if not {*needed} <= {*OF_COMPLETIONS}:
        return
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        logps = torch.tensor([-5.0, -9.0, -7.0, -14.0], dtype=torch.float64, requires_grad=True)
        counts, ref_logps = torch.tensor([2, 4, 3, 5]), logps.detach() + 0.5
        made_up = {
            "desirable": torch.tensor([True, False, True, False]),
            "weights": torch.ones(2 if reads_pairs(function) else 4, dtype=torch.float64),
            **dict.fromkeys(("z0", "delta"), torch.tensor(0.5, dtype=torch.float64)),
        }
        try:
            tensors = {tensor: made_up[tensor] for tensor in needed}
            losses = function(logps * 1, counts, ref_logps if needs_reference(function) else None, **tensors)
        except (RuntimeError, ValueError, AssertionError, IndexError, ArithmeticError):
            return  # perhaps it is written for another device or number of sequences: the first step tells
        except Exception as error:  # the user's code may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"{name} fails when it is tried on 4 sequences on the CPU ({reason}): {expected}"
            ) from error
    came = f"a tensor of shape {list(losses.shape)}" if isinstance(losses, torch.Tensor) else type(losses).__name__
    if not isinstance(losses, torch.Tensor) or losses.ndim > 1 or (group and losses.shape != (4 // group,)):
        of_group = f", {4 // group} of them with group = {group}" if group else ""
        raise ValueError(f"{name} returns {came} for 4 sequences: {expected}{of_group}")
    if not losses.requires_grad:
        raise ValueError(f"{name} is not differentiable by logps: it must use PyTorch operations on them")


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
