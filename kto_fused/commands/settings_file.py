"""Reads the YAML file of ``kto-fused train --config``: names and values, within limits that stop a hostile file.

Values stay text, because the command parses them as it parses flags. YAML's own rules would read ``save_strategy: no``
as False and ``learning_rate: 1e-3`` as text.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from .errors import CommandError
from .failures import user_errors

# Far above what the settings of a run need. A file at these limits is read in about half a second.
MAX_BYTES = 2**16
MAX_VALUES = 2000
MAX_DEPTH = 32


class _TextLoader(yaml.BaseLoader):
    """Loads every scalar as text, except null, which it loads as None. A name that is set twice is an error."""


def _mapping(loader: _TextLoader, node: yaml.MappingNode) -> dict[str, Any]:
    names = [loader.construct_object(name) for name, _ in node.value]
    for name in names:
        if names.count(name) > 1:  # YAML libraries silently take the last value
            raise yaml.YAMLError(f"{name!r} is set {names.count(name)} times")
    return loader.construct_mapping(node, deep=True)


_TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_TextLoader.add_constructor("tag:yaml.org,2002:null", lambda *_: None)
_TextLoader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_settings(path: str) -> dict[str, Any]:
    """Return the names and values of a YAML file. A value is text, None, or a list or dict of values.

    Raises:
        CommandError: the file cannot be read, is not YAML, sets a name twice, or exceeds a limit.
    """
    with user_errors(OSError, UnicodeDecodeError, prefix=f"--config {path} cannot be read: "):
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise _over_limit(path, f"is longer than {MAX_BYTES} bytes")
        text = content.decode("utf-8")
    with user_errors(yaml.YAMLError, prefix=f"--config {path} is not valid YAML: "):
        _check_written_size(text, path)
        loader = _TextLoader(text)
        root = loader.get_single_node()
        _check_size_with_aliases(root, path)
        settings = None if root is None else loader.construct_document(root)
    if not isinstance(settings, dict):
        found = {list: "a list", str: "a single value"}.get(type(settings), "nothing")
        raise CommandError(f"--config {path} must hold lines of the form 'name: value', but it holds {found}")
    return settings


def _check_written_size(text: str, path: str) -> None:
    """Count values and depth while the text is parsed, and stop at the first value that exceeds a limit."""
    count = depth = 0
    for event in yaml.parse(text, Loader=_TextLoader):
        count += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        _check_limits(count, depth, path)


def _check_size_with_aliases(root: yaml.Node | None, path: str) -> None:
    """Count values and depth once more, with every alias counted as all values that it stands for."""
    count, pending = 0, [(root, 1)] if root is not None else []
    while pending:
        node, depth = pending.pop()
        count += 1
        _check_limits(count, depth, path)
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in children for part in pair]
        pending += [(child, depth + 1) for child in children]


def _check_limits(count: int, depth: int, path: str) -> None:
    if depth > MAX_DEPTH:
        raise _over_limit(path, f"is nested more than {MAX_DEPTH} deep")
    if count > MAX_VALUES:
        raise _over_limit(path, f"has more than {MAX_VALUES} values")


def _over_limit(path: str, problem: str) -> CommandError:
    return CommandError(f"--config {path} {problem}: it must hold the settings of one run")
