"""Command-line flags from dataclasses: one flag per field, on transformers' ``HfArgumentParser``.

``HfArgumentParser`` turns fields into flags. ``FlagParser`` adds what it lacks:

- An error is a ``CommandError`` of one sentence, which suggests the nearest flag.
- ``null``, on the command line and in YAML, is None.
- A JSON list is read as a list where a field takes one value or a list.
- The settings of a YAML file are parsed exactly as flags are.
"""

import argparse
import typing
from collections.abc import Iterable
from dataclasses import Field
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from .arguments import NULL, FlagValues, boolean, json_mapping, list_or, null_or
from .failures import SETUP_ERRORS, user_errors


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each flag's default to its help, except None: the help text itself says what happens then."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class FlagParser(FlagValues, HfArgumentParser):
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
            if action.type is string_to_bool:
                action.type = boolean
            if typing.get_origin(action.type) is dict:
                action.type = json_mapping
            if action.dest in self._value_or_list:
                action.type = list_or(action.type)
            if action.dest in self._nullable and action.type is not None:
                action.type = null_or(action.type)
                if action.choices is not None:
                    action.metavar = "{" + ",".join(map(str, [*action.choices, NULL])) + "}"
                    action.choices = [*action.choices, None]

    def _parse_dataclass_field(self, parser: Any, field: Field) -> None:
        if field.name not in self._left_out:
            HfArgumentParser._parse_dataclass_field(parser, field)

    def build(self, values: dict[str, Any]) -> tuple[Any, ...]:
        """Return the dataclasses ``kinds``, filled with ``values``.

        Raises:
            CommandError: a dataclass refuses its values.
        """
        with user_errors(*SETUP_ERRORS):
            return self.parse_dict(values, allow_extra_keys=True)


def parse(kind: type, arguments: list[str], command: str, description: str) -> Any:
    """Return the dataclass ``kind``, filled from the flags in ``arguments``."""
    parser = FlagParser([kind], command, description=description)
    return parser.build(parser.values(arguments))[0]
