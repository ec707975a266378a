"""How a command's arguments are read, with no heavy package: aliases, the settings file, values, and their errors.

``FlagValues`` is the part of a parser that both kinds of parsers share: ``flags.FlagParser``, whose flags are the
fields of dataclasses, and ``flag_table.TableParser``, whose flags are read from a file in a moment.
"""

import argparse
import difflib
import functools
import json
import math
import re
import typing
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import CommandError
from .settings_file import read_settings

NULL = "null"
# names that other trainers' commands have for flags of this one
ALIASES = {
    "model_name_or_path": "model",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
}


class FlagValues:
    """The values of a parser's flags. An error is a ``CommandError`` of one sentence, which suggests the nearest flag.

    Beside ``argparse.ArgumentParser`` a class has the names of flags that may be ``null`` in ``_nullable``, of those
    that take one value or a list in ``_value_or_list``, and in ``_belongs_to`` where the flags of other commands are.
    """

    _nullable: set[str]
    _value_or_list: set[str]
    _belongs_to: dict[str, str]

    def error(self, message: str) -> typing.NoReturn:
        raise CommandError(message)

    def values(self, arguments: list[str], strict: bool = True) -> dict[str, Any]:
        """Return the value of every flag: the one given in ``arguments``, else the default.

        Arguments that belong to no flag are ignored if not ``strict``.

        Raises:
            CommandError: an argument is not a flag or its value, or a value is not of the flag's type.
        """
        namespace, rest = self.parse_known_args(arguments)
        if rest and strict:
            name = rest[0].partition("=")[0]
            if name.startswith("-"):
                raise CommandError(f"{name} is not a flag{self._suggestion(name, self._option_string_actions)}")
            raise CommandError(f"{rest[0]!r} does not belong to any flag")
        return vars(namespace)

    def arguments_from(self, settings: dict[str, Any], path: str) -> list[str]:
        """Return the flags that say the same as the settings of the YAML file ``path``.

        A null counts as not given, except where the flag's default is another value and None is allowed.

        Raises:
            CommandError: a name is not a flag, or a list is given where the flag takes one value.
        """
        actions = {action.dest: action for action in self._actions if action.dest not in ("help", "config")}
        arguments = []
        for name, value in settings.items():
            if name not in actions:
                raise CommandError(f"{path}: {name!r} is not a setting{self._suggestion(str(name), actions)}")
            if value is None:
                if name in self._nullable and self.get_default(name) is not None:
                    arguments.append(f"--{name}={NULL}")
            elif isinstance(value, dict) and actions[name].nargs == "+":
                arguments += [f"--{name}", *(f"{key}={held}" for key, held in value.items())]
            elif isinstance(value, list):
                if name not in self._value_or_list and actions[name].nargs != "+":
                    raise CommandError(f"{path}: {name!r} takes one value, but the file gives the list {value}")
                if None in value:
                    raise CommandError(f"{path}: the list of {name!r} must not hold null, got {value}")
                is_json = name in self._value_or_list
                arguments += [f"--{name}={json.dumps(value)}"] if is_json else [f"--{name}", *map(str, value)]
            else:
                arguments.append(f"--{name}={json.dumps(_typed(value)) if isinstance(value, dict) else value}")
        return arguments

    def _suggestion(self, name: str, names: Iterable[str]) -> str:
        """Return the end of an error message: where the name belongs, or which name was probably meant."""
        owner = self._belongs_to.get(name.lstrip("-").replace("-", "_"))
        if owner is not None:
            return f" here: it belongs to {owner}"
        nearest = difflib.get_close_matches(name, list(names), n=1)
        return f"; did you mean {nearest[0]}?" if nearest else "; --help lists all of them"


def _typed(value: Any) -> Any:
    """Return a nested YAML setting with true, false and numbers in place of their texts.

    No flag's type says what the values inside a mapping should be.
    """
    if isinstance(value, dict):
        return {name: _typed(nested) for name, nested in value.items()}
    if isinstance(value, list):
        return [_typed(nested) for nested in value]
    if value is None:
        return None
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for convert in (int, float):
        with suppress(ValueError):
            number = convert(value)
            return number if math.isfinite(number) else value  # JSON has no NaN and no infinity
    return value


def json_mapping(text: str) -> dict[str, Any]:
    parsed = json.loads(text)
    if not isinstance(parsed, dict):
        raise ValueError(text)
    return parsed


json_mapping.__name__ = "JSON mapping"  # argparse names the type in its errors


def list_or(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a converter that reads a JSON list as a list and passes any other text to ``convert``."""

    @functools.wraps(convert, updated=())
    def converted(text: str) -> Any:
        with suppress(ValueError):
            parsed = json.loads(text)
            if isinstance(parsed, list):
                return parsed
        return convert(text)

    return converted


def null_or(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a converter that reads ``null`` as None and passes any other text to ``convert``."""

    @functools.wraps(convert, updated=())
    def converted(text: str) -> Any:
        return None if text == NULL else convert(text)

    return converted


def boolean(text: str | bool) -> bool:
    if text is True or text is False:
        return text
    for value, words in ((True, ("true", "yes", "t", "y", "1")), (False, ("false", "no", "f", "n", "0"))):
        if text.lower() in words:
            return value
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


class _Plain(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise CommandError(message)


class FirstLook(typing.NamedTuple):
    """What a command reads of its arguments before it knows all flags."""

    loss: str | None  # of the flag, else of the settings file
    path: str | None  # of the settings file
    settings: dict[str, Any]  # the settings file's names and values
    arguments: list[str]  # with the flags' own names in place of aliases


def first_look(command: str, arguments: list[str]) -> FirstLook:
    """Read ``--loss`` and the settings file of ``--config``, and replace the aliases of flags.

    Raises:
        CommandError: several settings files are given, the file cannot be read, or a flag is given by two names.
    """
    parser = _Plain(prog=f"kto-fused {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--loss")
    found, _ = parser.parse_known_args(arguments)
    if len(found.config) > 1:
        raise CommandError(f"--config is given {len(found.config)} times, but a run reads one settings file")
    path = next(iter(found.config), None)
    settings = read_settings(path) if path else {}
    given: dict[str, str] = {}
    settings = {_own_name(str(name), given, f"{path}: "): value for name, value in settings.items()}
    loss = found.loss or settings.get("loss")
    return FirstLook(loss, path, settings, without_aliases(arguments))


def without_aliases(arguments: list[str]) -> list[str]:
    """Return the arguments with the flags' own names in place of aliases.

    Raises:
        CommandError: a flag is given by two names.
    """
    given: dict[str, str] = {}
    plain = []
    for text in arguments:
        flag, equals, value = text.partition("=")
        if flag.startswith("--"):
            name = flag[2:].replace("-", "_")
            own = _own_name(name, given, "--")
            text = text if own == name else f"--{own}{equals}{value}"
        plain.append(text)
    return plain


def _own_name(name: str, given: dict[str, str], prefix: str) -> str:
    """Return the name that an alias stands for; ``given`` keeps the name by which each setting was given first."""
    own = ALIASES.get(name, name)
    other = given.setdefault(own, name)
    if other != name:
        raise CommandError(f"{prefix}{other} and {prefix}{name} are two names of one setting: give one of them")
    return own


def objective_and_file(text: str) -> tuple[str | None, str]:
    """Return the objective and the file of ``NAME=FILE``; None and the text where it names no objective.

    A file that exists is no name, even if its own name or its folder's has a = in it.
    """
    name, _, path = text.partition("=")
    return (name, path) if path and re.fullmatch(r"\w+", name) and not Path(text).exists() else (None, text)


def folder_of(loss: str) -> str:
    """Return the output folder of a run with ``--loss`` that is given no other one."""
    return f"runs/{loss.replace(':', '.')}"


# ---- the losses that --loss names ---------------------------------------------------------------------------------


def recipe_of(loss: str, recipes: Iterable[str], known: dict[str, Any]) -> str:
    """Return the one of the ``recipes`` that trains a loss of this package.

    Raises:
        CommandError: there is no such loss, or another command trains it, or none.
    """
    if loss not in known["losses"]:
        raise CommandError(
            f"--loss {loss} is unknown: choose one of {', '.join(recipes)}, the name of a loss (such as simpo), or a "
            "loss of your own as module:Name"
        )
    recipe = known["losses"][loss]
    if recipe is None:
        raise CommandError(
            f"--loss {loss} is trained by no command, because it needs {', '.join(known['needs'][loss])}: call it in a "
            f"loop of your own, as heads.make({loss!r})"
        )
    if recipe not in recipes:
        raise trained_elsewhere(loss, recipe)
    return recipe


def trained_elsewhere(loss: str, recipe: str) -> CommandError:
    of_groups = "--advantage group " * (loss != "ppo")
    flags = f"{of_groups}--loss_type {loss}" if recipe == "ppo" else f"--loss {loss}"
    return CommandError(f"--loss {loss} is trained by another command: kto-fused {recipe} {flags}")
