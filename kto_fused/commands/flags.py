"""Dataclasses filled from flags and YAML files. Whatever does not fit is a ``CommandError``: one sentence."""

import argparse
import difflib
import functools
import json
import math
import re
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser

from .errors import CommandError, sentence

NULL = "null"
# Limits of a settings file, far above what a run's settings need. A file at a limit is read in about half a second.
YAML_BYTES = 2**16
YAML_VALUES = 2000
YAML_DEPTH = 32
SETUP_ERRORS = (ValueError, TypeError, RuntimeError, ImportError, OSError)


class _Loader(yaml.BaseLoader):
    """Scalars as they are written, but for null. Stops at the first value that exceeds a limit."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = self._num_values = 0

    def fetch_flow_collection_start(self, kind: type) -> None:
        if self.flow_level >= YAML_DEPTH:  # the scanner reads a thousand brackets ahead of compose_node
            raise _LimitError(f"is nested more than {YAML_DEPTH} deep")
        super().fetch_flow_collection_start(kind)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        self._depth += 1
        self._num_values += 1
        if self._depth > YAML_DEPTH:
            raise _LimitError(f"is nested more than {YAML_DEPTH} deep")
        if self._num_values > YAML_VALUES:
            raise _LimitError(f"has more than {YAML_VALUES} values")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _LimitError(Exception):
    """What a settings file exceeds."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_constructor("tag:yaml.org,2002:null", lambda *_: None)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    """YAML itself lets the last of several values under one name stand."""
    names = [loader.construct_object(name) for name, _ in node.value]
    for name in names:
        if names.count(name) > 1:
            raise yaml.YAMLError(f"{name!r} is set {names.count(name)} times")
    return yaml.BaseLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


class FlagParser(HfArgumentParser):
    """A flag for each field of the dataclasses ``kinds``, but for those ``left_out``. ``elsewhere`` says of other names
    what they are flags of.

    ``null`` is None where a field may be None; a list in JSON is one where a field takes a value or a list. Flags are
    not abbreviated: a misspelt one is an error.
    """

    def __init__(
        self,
        kinds: list[type],
        command: str,
        left_out: Iterable[str] = (),
        elsewhere: dict[str, str] | None = None,
        **settings: Any,
    ):
        self._left_out, self._elsewhere = frozenset(left_out), elsewhere or {}
        super().__init__(kinds, prog=f"kto-fused {command}", allow_abbrev=False, **settings)
        hints = {name: hint for kind in kinds for name, hint in typing.get_type_hints(kind).items()}
        self._nullable = {name for name, hint in hints.items() if type(None) in typing.get_args(hint)}
        takes_list = {name for name, hint in hints.items() if list in map(typing.get_origin, typing.get_args(hint))}
        self._value_or_list = {action.dest for action in self._actions if not action.nargs} & takes_list
        options = self._action_groups[:2]  # argparse's own; groups with a name hold what must be given
        self._action_groups = self._action_groups[2:] + options
        for action in self._actions:
            if action.required:
                action.default = argparse.SUPPRESS  # --help shows none
            hint = hints.get(action.dest)
            if hint == bool | None:  # --flag alone, as where None is no choice
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
        """What the flags say, and the defaults of the others."""
        namespace, rest = self.parse_known_args(arguments)
        if rest:
            name = rest[0].partition("=")[0]
            if name.startswith("-"):
                raise CommandError(f"{name} is not a flag{self._instead(name, self._option_string_actions)}")
            raise CommandError(f"{rest[0]!r} follows no flag that takes it")
        return vars(namespace)

    def arguments_from(self, settings: dict[str, Any], path: str) -> list[str]:
        """The settings of a YAML file as flags that say the same. Null is as not given, unless None is a choice."""
        actions = {action.dest: action for action in self._actions if action.dest not in ("help", "config")}
        arguments = []
        for name, value in settings.items():
            if name not in actions:
                raise CommandError(f"{path}: {name!r} is not a setting{self._instead(str(name), actions)}")
            if value is None:
                if name in self._nullable and self.get_default(name) is not None:
                    arguments.append(f"--{name}={NULL}")
            elif isinstance(value, list):
                is_written_as_one = name in self._value_or_list
                if not is_written_as_one and actions[name].nargs != "+":
                    raise CommandError(f"{path}: {name!r} takes one value, got the list {value}")
                if None in value:
                    raise CommandError(f"{path}: {name!r} takes no null in its list, got {value}")
                arguments += [f"--{name}={json.dumps(value)}"] if is_written_as_one else [f"--{name}", *map(str, value)]
            else:
                arguments.append(f"--{name}={json.dumps(_typed(value)) if isinstance(value, dict) else value}")
        return arguments

    def _instead(self, name: str, names: Iterable[str]) -> str:
        """Where the name belongs, or what it may have been meant to be."""
        owner = self._elsewhere.get(name.lstrip("-").replace("-", "_"))
        if owner is not None:
            return f" here: it belongs to {owner}"
        nearest = difflib.get_close_matches(name, list(names), n=1)
        return f"; the nearest is {nearest[0]}" if nearest else "; --help lists them"


@contextmanager
def refusals(*kinds: type[Exception], doing: str = "") -> Iterator[None]:
    """Errors of these kinds, from libraries and the disk, become a ``CommandError`` that says what was being done."""
    try:
        yield
    except (torch.OutOfMemoryError, *kinds) as error:
        if isinstance(error, torch.OutOfMemoryError) and not doing:
            raise CommandError(
                "the GPU's memory is not enough: lower --per_device_train_batch_size and raise "
                "--gradient_accumulation_steps, or use --gradient_checkpointing or --lora_rank"
            ) from error
        raise CommandError(doing + sentence(error)) from error


def parse(kind: type, arguments: list[str], command: str, description: str) -> Any:
    """The dataclass that the flags describe."""
    return build(kind, FlagParser([kind], command, description=description).values(arguments))


def build(kind: type, values: dict[str, Any]) -> Any:
    """``kind`` of those of ``values`` that are its fields; what it refuses is a ``CommandError``."""
    with refusals(*SETUP_ERRORS):
        return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})


def read_yaml(path: str) -> dict[str, Any]:
    """Names and values; each scalar but null as it is written, to be understood as the flag's value would be."""
    with refusals(OSError, UnicodeDecodeError, doing=f"--config {path} cannot be read: "):
        with Path(path).open("rb") as file:
            content = file.read(YAML_BYTES + 1)
        if len(content) > YAML_BYTES:
            raise CommandError(f"--config {path} is longer than {YAML_BYTES} bytes: expected the settings of a run")
        text = content.decode("utf-8")
    with refusals(yaml.YAMLError, doing=f"--config {path} is not YAML: "):
        try:
            loader = _Loader(text)
            root = loader.get_single_node()
            if root is not None and _num_values(root, {}) > YAML_VALUES:
                raise _LimitError(f"has more than {YAML_VALUES} values once its aliases are written out")
            settings = None if root is None else loader.construct_document(root)
        except _LimitError as error:
            raise CommandError(f"--config {path} {error}: expected the settings of a run") from error
    if not isinstance(settings, dict):
        raise CommandError(f"--config {path}: expected names with values, got {type(settings).__name__}")
    return settings


def _num_values(node: yaml.Node, known: dict[yaml.Node, float]) -> float:
    """How many values a node has with all of its aliases written out; infinitely many where it holds itself."""
    if node in known:
        return known[node]
    known[node] = math.inf  # until it is counted
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in children for part in pair]
    known[node] = 1 + sum(_num_values(child, known) for child in children)
    return known[node]


def _typed(value: Any) -> Any:
    """Words of a nested setting as true, false and numbers where they are: no flag's type says what they should be."""
    if isinstance(value, dict):
        return {name: _typed(nested) for name, nested in value.items()}
    if isinstance(value, list):
        return [_typed(nested) for nested in value]
    if value is None:
        return None
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for convert in (int, float):
        try:
            number = convert(value)
        except ValueError:
            continue
        return number if math.isfinite(number) else value  # JSON has no others
    return value


def _json_mapping(text: str) -> dict[str, Any]:
    parsed = json.loads(text)
    if not isinstance(parsed, dict):
        raise ValueError(text)
    return parsed


_json_mapping.__name__ = "mapping in JSON"  # argparse names the type in its errors


def _list_or(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    @functools.wraps(convert, updated=())
    def converted(text: str) -> Any:
        try:
            parsed = json.loads(text)
        except ValueError:
            return convert(text)
        return parsed if isinstance(parsed, list) else convert(text)

    return converted


def _null_or(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    @functools.wraps(convert, updated=())  # argparse names the type in its errors
    def converted(text: str) -> Any:
        return None if text == NULL else convert(text)

    return converted
