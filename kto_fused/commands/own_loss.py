"""``--loss``: a recipe, a registered loss by its name, or a loss of the user's own as ``module:Name``.

A loss of the user's own comes from a module in the current folder or an installed one.
"""

import dataclasses
import importlib
import os
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple, get_type_hints

from .. import heads
from ..heads.protocol import Head, class_of
from ..trainers import losses
from ..trainers.configs import FusedRewardConfig
from ..trainers.ppo_config import FusedPPOConfig
from .arguments import recipe_of
from .errors import CommandError, sentence
from .failures import SETUP_ERRORS, user_errors


class OwnLoss(NamedTuple):
    """What ``--loss`` named: a class, whose fields are flags, or an object or function, which has none."""

    text: str  # as it was given
    found: Any
    recipe: str  # of the trainers

    def flag_names(self, taken: Iterable[str]) -> list[str]:
        """Return the flags of the class's fields. A field whose name is ``taken`` comes after the loss's name."""
        if not isinstance(self.found, type):
            return []
        name = getattr(self.found, "name", self.found.__name__)
        return [losses.option_name(name, own.name, taken) for own in dataclasses.fields(self.found)]

    def flags(self, taken: Iterable[str]) -> type | None:
        """Return a dataclass with one field per field of the class; None if there is no class."""
        if not isinstance(self.found, type):
            return None
        hints, made = get_type_hints(self.found), []
        for option, own in zip(self.flag_names(taken), dataclasses.fields(self.found), strict=True):
            kind = losses.option_type(hints[own.name])
            if own.default is dataclasses.MISSING:
                made.append((option, kind, dataclasses.field(metadata={"help": f"A field of {self.text}."})))
            else:
                text = {"help": f"A field of {self.text}. If not given: {own.default}."}
                made.append((option, kind | None, dataclasses.field(default=None, metadata=text)))
        namespace = {"_argument_group_name": f"fields of {self.text}"}
        return dataclasses.make_dataclass("LossFlags", made, namespace=namespace, kw_only=True)

    def make(self, values: dict[str, Any], taken: Iterable[str]) -> Any:
        """Return the loss, with fields from ``values`` by the names of their flags."""
        if not isinstance(self.found, type):
            return self.found
        hints, given = get_type_hints(self.found), {}
        with user_errors(*SETUP_ERRORS, prefix=f"--loss {self.text}: "):
            for option, own in zip(self.flag_names(taken), dataclasses.fields(self.found), strict=True):
                if (value := values[option]) is not None:
                    given[own.name] = losses.field_value(value, hints[own.name])
            return self.found(**given)


class Choice(NamedTuple):
    """The recipe that ``--loss`` chooses, and the loss if it named one: a registered name, or the user's own."""

    recipe: str
    loss_type: str | None = None
    own: OwnLoss | None = None

    def settle(self, values: dict[str, Any], text: str) -> None:
        """Put the name of a registered loss into the values of the flags.

        Raises:
            CommandError: ``--loss_type`` names other losses.
        """
        if self.loss_type is None:
            return
        given = values["loss_type"]
        if given not in (None, self.loss_type, [self.loss_type]):
            given = " ".join(given) if isinstance(given, list) else given
            raise CommandError(f"--loss {text} and --loss_type {given} name different losses: give one of the two")
        values["loss_type"] = self.loss_type


def known(names: Iterable[str]) -> dict[str, Any]:
    """Return the recipes of registered losses and of the reward model's, in the form that ``recipe_of`` takes.

    The recipe is ``"ppo"`` for the losses of ``kto-fused ppo``, and None where no command trains the loss.
    """
    recipes: dict[str, str | None] = {}
    kinds = {"dpo": losses.trains_pairs, "kto": losses.trains_completions, "sft": losses.trains_tokens}
    for name in names:
        found = (recipe for recipe, is_trained in kinds.items() if is_trained(class_of(name)))
        recipes[name] = "ppo" if name in FusedPPOConfig.loss_names else next(found, None)
    needs = {name: list(class_of(name).required_tensors()) for name, recipe in recipes.items() if recipe is None}
    return {"losses": recipes | dict.fromkeys(FusedRewardConfig.loss_names, "reward"), "needs": needs}


def choose(text: str, recipes: Iterable[str]) -> Choice:
    """Return what ``--loss`` names.

    Raises:
        CommandError: it is no recipe and no loss, or a loss that none of the ``recipes`` trains.
    """
    if text in recipes:
        return Choice(text)
    if ":" in text:
        own = find(text)
        return Choice(own.recipe, own=own)
    return Choice(recipe_of(text, recipes, known(heads.names())), text)


def find(text: str) -> OwnLoss:
    """Return what ``--loss module:Name`` names.

    Raises:
        CommandError: there is no such module or name, or it is no loss.
    """
    module_name, _, name = text.partition(":")
    if not (module_name and name):
        raise CommandError(f"--loss {text}: expected a loss of your own as module:Name")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # behind installed packages, so that no file here takes the place of one
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's code may raise anything
        raise CommandError(f"--loss {text}: the module {module_name} cannot be imported: {sentence(error)}") from error
    if not hasattr(module, name):
        raise CommandError(f"--loss {text}: {getattr(module, '__file__', module_name)} has no {name}")
    found = getattr(module, name)
    is_head = isinstance(found, Head) or (isinstance(found, type) and issubclass(found, Head))
    if not is_head and (isinstance(found, type) or not callable(found)):
        raise CommandError(
            f"--loss {text} is {found!r}: expected a class derived from kto_fused.heads.Head, an object of one, or a "
            "function f(logps, counts, ref_logps, **tensors)"
        )
    if is_head and isinstance(found, type) and not dataclasses.is_dataclass(found):
        raise CommandError(f"--loss {text} is no dataclass: decorate it with @dataclass(frozen=True)")
    if not is_head:
        with user_errors(TypeError, ValueError, prefix=f"--loss {text}: "):
            losses.try_function(found)
    if getattr(found, "level", "sequence") == "token":
        return OwnLoss(text, found, "sft")
    return OwnLoss(text, found, "dpo" if losses.reads_pairs(found) else "kto")
