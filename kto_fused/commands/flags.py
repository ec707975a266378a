"""Command-line flags from dataclasses: one flag per field, on transformers' ``HfArgumentParser``.

``HfArgumentParser`` turns fields into flags. ``FlagParser`` adds what it lacks:

- An error is a ``CommandError`` of one sentence, which suggests the nearest flag.
- ``null``, on the command line and in YAML, is None.
- A JSON list is read as a list where a field takes one value or a list.
- The settings of a YAML file are parsed exactly as flags are.
"""

import argparse
import difflib
import functools
import json
import math
import typing
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import Field
from typing import Any

from transformers import HfArgumentParser

from .errors import CommandError
from .failures import SETUP_ERRORS, user_errors
from .settings_file import read_settings

NULL = "null"
# names that other trainers' commands have for flags of this one
ALIASES = {
    "model_name_or_path": "model",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each flag's default to its help, except None: the help text itself says what happens then."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class FlagParser(HfArgumentParser):
    """Has a flag for each field of the dataclasses ``kinds`` whose name is not in ``left_out``.

    ``belongs_to`` maps a flag that this command lacks to the place that has it, for the error message. Flags cannot be
    abbreviated, so that a misspelt flag is an error. ``more`` is a dataclass whose fields are flags too, but which
    ``build`` does not make.
    """

    def __init__(
        self,
        kinds: list[type],
        command: str,
        left_out: Iterable[str] = (),
        belongs_to: dict[str, str] | None = None,
        more: type | None = None,
        **settings: Any,
    ):
        self._left_out, self._belongs_to = frozenset(left_out), belongs_to or {}
        super().__init__(
            kinds, prog=f"kto-fused {command}", allow_abbrev=False, formatter_class=_HelpFormatter, **settings
        )
        if more is not None:
            self._left_out = frozenset()
            self._add_dataclass_arguments(more)
            kinds = [*kinds, more]
        hints = {name: hint for kind in kinds for name, hint in typing.get_type_hints(kind).items()}
        self._nullable = {name for name, hint in hints.items() if type(None) in typing.get_args(hint)}
        takes_list = {name for name, hint in hints.items() if list in map(typing.get_origin, typing.get_args(hint))}
        self._value_or_list = {action.dest for action in self._actions if not action.nargs} & takes_list
        options = self._action_groups[:2]  # argparse's own groups; groups with a name hold the required flags
        self._action_groups = self._action_groups[2:] + options
        for action in self._actions:
            if hints.get(action.dest) == bool | None:  # --flag alone means True, as for fields that cannot be None
                action.nargs, action.const = "?", True
            if typing.get_origin(action.type) is dict:
                action.type = _json_mapping
            if action.dest in self._value_or_list:
                action.type = _list_or(action.type)
            if action.dest in self._nullable and action.type is not None:
                action.type = _null_or(action.type)
                if action.choices is not None:
                    action.metavar = "{" + ",".join(map(str, [*action.choices, NULL])) + "}"
                    action.choices = [*action.choices, None]

    def _parse_dataclass_field(self, parser: Any, field: Field) -> None:
        if field.name not in self._left_out:
            HfArgumentParser._parse_dataclass_field(parser, field)

    def error(self, message: str) -> typing.NoReturn:
        raise CommandError(message)

    def values(self, arguments: list[str]) -> dict[str, Any]:
        """Return the value of every flag: the one given in ``arguments``, else the default.

        Raises:
            CommandError: an argument is not a flag or its value, or a value is not of the flag's type.
        """
        namespace, rest = self.parse_known_args(arguments)
        if rest:
            name = rest[0].partition("=")[0]
            if name.startswith("-"):
                raise CommandError(f"{name} is not a flag{self._suggestion(name, self._option_string_actions)}")
            raise CommandError(f"{rest[0]!r} does not belong to any flag")
        return vars(namespace)

    def build(self, values: dict[str, Any]) -> tuple[Any, ...]:
        """Return the dataclasses ``kinds``, filled with ``values``.

        Raises:
            CommandError: a dataclass refuses its values.
        """
        with user_errors(*SETUP_ERRORS):
            return self.parse_dict(values, allow_extra_keys=True)

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


def parse(kind: type, arguments: list[str], command: str, description: str) -> Any:
    """Return the dataclass ``kind``, filled from the flags in ``arguments``."""
    parser = FlagParser([kind], command, description=description)
    return parser.build(parser.values(arguments))[0]


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


def _json_mapping(text: str) -> dict[str, Any]:
    parsed = json.loads(text)
    if not isinstance(parsed, dict):
        raise ValueError(text)
    return parsed


_json_mapping.__name__ = "JSON mapping"  # argparse names the type in its errors


def _list_or(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a converter that reads a JSON list as a list and passes any other text to ``convert``."""

    @functools.wraps(convert, updated=())
    def converted(text: str) -> Any:
        with suppress(ValueError):
            parsed = json.loads(text)
            if isinstance(parsed, list):
                return parsed
        return convert(text)

    return converted


def _null_or(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a converter that reads ``null`` as None and passes any other text to ``convert``."""

    @functools.wraps(convert, updated=())
    def converted(text: str) -> Any:
        return None if text == NULL else convert(text)

    return converted


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
    parser = FlagParser([], command, add_help=False)
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
