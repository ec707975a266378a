"""The flags of the commands that train, as a table in ``flags.json``, which is read in a moment.

The flags are fields of configurations, and those derive from transformers' ``TrainingArguments``, whose import takes
several seconds. The table answers ``--help`` and wrong flags without it. After an option has changed, run
``python -m kto_fused.commands.flag_table``; a test compares the table with the configurations.
"""

import argparse
import ast
import functools
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .arguments import NULL, FlagValues, boolean, json_mapping, list_or, null_or

FILE = Path(__file__).with_name("flags.json")
TYPES = {"int": int, "float": float, "bool": boolean, "mapping": json_mapping, "str": str}
NAMES = {"boolean": "bool", "JSON mapping": "mapping"}  # of types, in the table
# fields of ``TrainingArguments`` whose values ``early`` reads, in any version
KEPT = ("output_dir", "report_to", "push_to_hub", "hub_token")


class TableParser(FlagValues, argparse.ArgumentParser):
    """A parser for the flags of a command that the table lists under ``key``, or for those of the given ``names``.

    The fields of ``TrainingArguments`` are those of the version that is installed. If the table was made with another
    version, their names are read from its source text, and their values are not checked here.
    """

    def __init__(self, key: str, command: str, names: Iterable[str] | None = None):
        super().__init__(prog=f"kto-fused {command}", add_help=False, allow_abbrev=False)
        self.flags = [flag for flag in flags_of(key) if names is None or flag["name"] in names]
        self._belongs_to = table()["belongs_to"].get(key, {})
        self._nullable = {flag["name"] for flag in self.flags if flag.get("nullable")}
        self._value_or_list = {flag["name"] for flag in self.flags if flag.get("list")}
        for flag in self.flags:
            self._add(flag)

    def _add(self, flag: dict[str, Any]) -> None:
        if "type" not in flag:
            self.add_argument(*flag["flags"], dest=flag["name"], action="store_false", default=argparse.SUPPRESS)
            return
        name, kind = flag["name"], TYPES[flag["type"]]
        choices = flag.get("choices")
        if name in self._value_or_list:
            kind = list_or(kind)
        if name in self._nullable:
            kind = null_or(kind)
            choices = choices and [*choices, None]
        is_optional = flag.get("nargs") == "?"
        metavar = "{" + ",".join([*flag["choices"], NULL]) + "}" if choices and None in choices else None
        self.add_argument(
            *flag["flags"],
            dest=name,
            type=kind,
            nargs=flag.get("nargs"),
            const=True if is_optional else None,
            default=flag.get("default"),
            choices=choices,
            required=flag.get("required", False),
            metavar=metavar,
        )


def flags_of(key: str) -> list[dict[str, Any]]:
    """Return the flags of a command, as the installed version of transformers has them."""
    flags = listed(key)
    has_inherited = any(flag.get("inherited") for flag in flags)
    if not has_inherited or importlib.metadata.version("transformers") == table()["transformers"]:
        return flags
    inherited = sorted(_fields_of_training_arguments() - {*table()["left_out"], *KEPT})
    found = [flag for flag in flags if not flag.get("inherited") or flag["name"] in KEPT]
    for name in inherited:
        flag = {"name": name, "inherited": True}
        found.append(flag | {"flags": _spellings(name), "type": "str", "nargs": "*"})
        found.append(flag | {"flags": _spellings(f"no_{name}")})
    return found


def listed(key: str) -> list[dict[str, Any]]:
    """Return the flags of a command as the table has them, which was made with one version of transformers."""
    return [table()["flags"][number] for number in table()["commands"][key]]


@functools.cache
def table() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def _fields_of_training_arguments() -> set[str]:
    """Return the names of the fields of transformers' ``TrainingArguments`` without importing it."""
    folder = importlib.util.find_spec("transformers").submodule_search_locations[0]
    tree = ast.parse(Path(folder, "training_args.py").read_text(encoding="utf-8"))
    (kind,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    return {node.target.id for node in kind.body if isinstance(node, ast.AnnAssign)}


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


# ---- making the table ---------------------------------------------------------------------------------------------


def made() -> dict[str, Any]:
    """Return the table, made from the configurations."""
    from dataclasses import fields

    from transformers import TrainingArguments

    from .. import heads
    from ..trainers import losses
    from . import demo, estimate, loops, own_loss, train
    from .flags import FlagParser

    parsers = {recipe: train.flags_of(recipe) for recipe in train.CONFIGS}
    for key in ("spin", "online dpo", "online kto", "ppo"):
        command, _, recipe = key.partition(" ")
        parsers[key] = loops.flags_of(command, recipe or "dpo")
    parsers |= {"demo": FlagParser([demo.Settings], "demo"), "estimate": FlagParser([estimate.EstimateSettings], "")}
    inherited = {field.name for field in fields(TrainingArguments)}
    rows: dict[str, dict[str, Any]] = {}
    commands: dict[str, list[str]] = {}
    for key, parser in parsers.items():
        commands[key] = []
        for action in parser._actions:
            if action.dest != "help":
                is_inherited = action.dest in inherited and key not in ("demo", "estimate")
                row = json.dumps(_row(action, parser, is_inherited), sort_keys=True)
                rows.setdefault(row, json.loads(row))
                commands[key].append(row)
    order = {row: number for number, row in enumerate(sorted(rows, key=lambda row: (rows[row]["name"], row)))}
    return {
        "transformers": importlib.metadata.version("transformers"),
        "left_out": sorted(train.LEFT_OUT),
        **own_loss.known([name for name in heads.names() if losses.is_ours(name)]),
        "belongs_to": {key: dict(sorted(p._belongs_to.items())) for key, p in parsers.items() if p._belongs_to},
        "commands": {key: [order[row] for row in found] for key, found in commands.items()},
        "flags": [rows[row] for row in order],
    }


def _row(action: argparse.Action, parser: Any, is_inherited: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"name": action.dest, "flags": action.option_strings}
    if is_inherited:
        row["inherited"] = True
    if isinstance(action, argparse._StoreFalseAction):
        return row
    kind = getattr(action.type, "__name__", "str")
    kind = NAMES.get(kind, kind)
    row["type"] = kind if kind in TYPES else "str"
    choices = action.choices and [str(choice) for choice in action.choices if choice is not None]
    found = {
        "nargs": action.nargs,
        "choices": choices,
        "required": action.required,
        "nullable": action.dest in parser._nullable,
        "list": action.dest in parser._value_or_list,
        "help": None if is_inherited or action.help is None else brief(action.help),
    }
    row |= {name: value for name, value in found.items() if value}
    if isinstance(action.default, (bool, int, float, str)) and not action.required:
        row["default"] = action.default
    return row


def brief(text: str) -> str:
    """Return the first clause of a help text. A field that its losses alone describe keeps their names."""
    text = text.replace("%%", "%").replace("A field of the loss. Of ", "A field of ")
    first = re.split(r"(?<=[^.])\. (?=[A-Z])|; |\.$", text)[0]
    word = first.split()[0]
    return first[0].lower() + first[1:] if word == "A" or word[1:].islower() else first


def _lines(value: dict[str, Any]) -> Iterator[str]:
    """Yield JSON with one flag per line, so that two changes of the table rarely meet in one line."""
    yield "{"
    for number, (name, part) in enumerate(value.items()):
        end = "" if number == len(value) - 1 else ","
        if isinstance(part, (dict, list)):
            items: Iterable[str] = (
                (f"{json.dumps(key)}: {json.dumps(held)}" for key, held in part.items())
                if isinstance(part, dict)
                else map(json.dumps, part)
            )
            opening, closing = ("{", "}") if isinstance(part, dict) else ("[", "]")
            yield f"{json.dumps(name)}: {opening}\n" + ",\n".join(items) + f"\n{closing}{end}"
        else:
            yield f"{json.dumps(name)}: {json.dumps(part)}{end}"
    yield "}\n"


if __name__ == "__main__":
    FILE.write_text("\n".join(_lines(made())), encoding="utf-8")
