"""The layouts in which public data sets write feedback, pairs and demonstrations, and what turns them into records.

``find`` recognises a layout by a record's columns and their types. Its ``convert`` gives records of the forms that
``form`` checks. ``Reading`` holds what the user says about files: names of columns, words of labels, and whether plain
text is put into the chat template.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from .form import (
    ASSISTANT,
    DEMONSTRATIONS,
    KINDS,
    MARGIN,
    PAIRED,
    TOOLS,
    UNPAIRED,
    UNSUPPORTED,
    WEIGHT,
    DataError,
    Forms,
    form_of,
    names,
    short,
)

CHATS = ("auto", "always", "never")
# the columns that layouts read
FIELDS = dict.fromkeys(field for fields in KINDS for field in fields)
COLUMNS = (*FIELDS, WEIGHT, MARGIN, "conversations", "kto_tag", "system", TOOLS)
# ShareGPT's names of the roles
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
HUMAN, ASSISTANTS = "\n\nHuman:", "\n\nAssistant:"  # begin the turns of the helpful/harmless sets
LABELS = {"true": True, "1": True, "false": False, "0": False, "-1": False}


class Reading(NamedTuple):
    """What the user says about the data. ``reading`` makes one, and checks it.

    Attributes:
        columns: pairs of a field's name and the name that its column has in the data.
        label_true, label_false: the labels that mean liked and not liked.
        chat: "auto" trains plain text as it is; "always" puts it into the chat template, the prompt as the user's
            message and the completion as the assistant's; "never" also refuses conversations.
    """

    columns: tuple[tuple[str, str], ...] = ()
    label_true: tuple[str, ...] = ()
    label_false: tuple[str, ...] = ()
    chat: str = "auto"


def reading(
    columns: Mapping[str, str] | Iterable[str] | None = None,
    label_true: Iterable[Any] | None = None,
    label_false: Iterable[Any] | None = None,
    chat: str = "auto",
) -> Reading:
    """Return a checked ``Reading``.

    Args:
        columns: a mapping of fields to columns, or texts of the form "field=column".

    Raises:
        ValueError: a field is unknown or given twice, a label is both liked and not, or ``chat`` is none of ``CHATS``.

    >>> from kto_fused.preference_data import reading
    >>> reading(["prompt=question", "label=thumbs"], label_true=["up"], label_false=["down"]).columns
    (('prompt', 'question'), ('label', 'thumbs'))
    """
    if isinstance(columns, str):
        columns = [columns]
    pairs = list(columns.items()) if isinstance(columns, Mapping) else []
    for text in () if columns is None or isinstance(columns, Mapping) else columns:
        field, equals, column = str(text).partition("=")
        if not (field and equals and column):
            raise ValueError(f"columns must have the form field=column, such as prompt=question, got {text!r}")
        pairs.append((field, column))
    known = (*COLUMNS, *UNSUPPORTED)
    for field, _ in pairs:
        if field not in known:
            raise ValueError(f"columns names the field {field!r}, expected one of {list(COLUMNS)}")
    if len({field for field, _ in pairs}) < len(pairs):
        raise ValueError(f"columns names a field twice: {[field for field, _ in pairs]}")
    true, false = ([given] if isinstance(given, str) else list(given or ()) for given in (label_true, label_false))
    if both := {word(value) for value in true} & {word(value) for value in false}:
        raise ValueError(f"label_true and label_false both name {sorted(both)}")
    if chat not in CHATS:
        raise ValueError(f"chat must be one of {list(CHATS)}, got {chat!r}")
    return Reading(tuple(pairs), tuple(map(str, true)), tuple(map(str, false)), chat)


# ---- columns -------------------------------------------------------------------------------------------------------


def columns_read(columns: list[str], given: Reading) -> list[str]:
    """Return those of a table's columns that a layout may read."""
    sources = {column for _, column in given.columns}
    return [name for name in columns if name in sources or name in COLUMNS] or columns[:1]


def check_columns_suffice(columns: list[str], forms: Forms, given: Reading, where: str) -> None:
    """Raise ``DataError`` with the names of all of a table's columns if they hold none of ``forms`` and no layout."""
    named = renamed(dict.fromkeys(columns), given, where)
    if not (named.keys() >= {"chosen", "rejected"} or named.keys() & {"conversations", "messages"}):
        form_of(named, where, forms)


def label_column(columns: list[str], given: Reading) -> str | None:
    """Return the column of a table that holds the labels; None if it holds pairs."""
    sources = dict(given.columns)
    of = {field: sources.get(field, field) for field in ("label", "chosen", "rejected")}
    if of["chosen"] in columns and of["rejected"] in columns:
        return None
    return of["label"] if of["label"] in columns else None


def number_columns(given: Reading) -> frozenset[str]:
    """Return the columns of a text table that hold numbers."""
    sources = dict(given.columns)
    return frozenset(sources.get(field, field) for field in (WEIGHT, MARGIN))


def tools_column(given: Reading) -> str:
    """Return the name of the column that holds tools, if there is one."""
    return dict(given.columns).get(TOOLS, TOOLS)


def renamed(record: Any, given: Reading, where: str) -> Any:
    """Return a record with its columns under the names of their fields."""
    if not given.columns or not isinstance(record, Mapping):
        return record
    for field, column in given.columns:
        if column not in record:
            raise DataError(
                f"{where}, field {field!r}: --columns {field}={column} names a column that is missing, got "
                f"{names(record)}"
            )
    taken = {name for pair in given.columns for name in pair}
    others = {name: value for name, value in record.items() if name not in taken}
    return {field: record[column] for field, column in given.columns} | others


# ---- labels --------------------------------------------------------------------------------------------------------


class LabelError(DataError):
    """A label that means neither liked nor not liked."""


def word(value: Any) -> str:
    """Return the text by which labels are compared: in lower case, and without the zeros after a whole number.

    >>> from kto_fused.data.layouts import word
    >>> word(True), word(1.0), word(" Up "), word("-1.0")
    ('true', '1', 'up', '-1')
    """
    text = str(value).strip().lower()
    with suppress(ValueError, OverflowError):
        number = float(text)
        if number == int(number):
            return str(int(number))
    return text


class Labels:
    """Turns the labels of one source into bools."""

    def __init__(self, given: Reading):
        self.is_given = bool(given.label_true or given.label_false)
        self.known = LABELS
        if self.is_given:
            self.known = {word(text): True for text in given.label_true}
            self.known |= {word(text): False for text in given.label_false}
        self.negative: set[str] = set()
        self.seen: Counter = Counter()

    def count(self, value: Any) -> None:
        """Remember a label for a message."""
        if len(self.seen) < 1000:
            self.seen[value if isinstance(value, (bool, int, float, str, type(None))) else short(value)] += 1

    def __call__(self, value: Any, where: str) -> bool:
        self.count(value)
        text = word(value) if isinstance(value, (bool, int, float, str)) else ""
        if text not in self.known:
            expected = f"one of {list(self.known)}" if self.is_given else "true, false, 1 or 0"
            raise LabelError(f"{where}, field 'label': expected {expected}, got {short(value)}")
        if text in ("0", "-1") and not self.is_given:
            self.negative.add(text)
            if len(self.negative) == 2:
                raise LabelError(f"{where}, field 'label': expected either 0 or -1 for not liked, got both")
        return self.known[text]


def label_advice(found: Mapping[Any, int]) -> str:
    """Return the end of a ``LabelError``: the values that the data hold, and the flags to use."""
    ordered = sorted(found.items(), key=lambda pair: word(pair[0]))
    listed = ", ".join(f"{value!r} ({number} times)" for value, number in ordered[:20])
    more = f" and {len(found) - 20} more" if len(found) > 20 else ""
    return (
        f"; the data's labels are {listed}{more}: say which of them mean liked and not liked with --label_true and "
        "--label_false (label_true and label_false in Python), and take out the records that are neither"
    )


# ---- layouts -------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """A way to write records."""

    name: str
    columns: tuple[str, ...]  # those that it reads
    convert: Callable[[dict[str, Any], str], dict[str, Any]]


def find(record: Any, forms: Forms) -> Layout:
    """Return the layout of a record whose columns have the names of fields."""
    layout = _find(record, forms)
    if isinstance(record, Mapping) and "system" in record and layout.columns:
        name, columns = f"{layout.name}, with a system column", (*layout.columns, "system")
        return Layout(name, columns, partial(with_system, layout.convert))
    return layout


def _find(record: Any, forms: Forms) -> Layout:
    if not isinstance(record, Mapping):
        return Layout("records", (), lambda record, where: record)
    takes_pairs, takes_labels = PAIRED in forms, UNPAIRED in forms
    is_paired = takes_pairs and "chosen" in record and "rejected" in record
    whole = next((name for name in ("conversations", "messages") if isinstance(record.get(name), list)), None)
    if whole is not None and "prompt" not in record:
        kind = "ShareGPT conversations" if whole == "conversations" else "messages"
        label = next((name for name in ("kto_tag", "label") if name in record), None)
        if forms == DEMONSTRATIONS and whole == "conversations":
            return Layout(kind, (whole,), _messages)
        if is_paired:
            return Layout(
                f"{kind} with chosen and rejected", (whole, "chosen", "rejected"), partial(_sharegpt_pair, whole)
            )
        if takes_labels and label is not None and "completion" not in record:
            return Layout(f"{kind} with {label}", (whole, label), partial(_last_is_answer, whole, label))
    if is_paired:
        sides = record["chosen"], record["rejected"]
        are_lists = all(isinstance(side, list) for side in sides)
        if "prompt" not in record and are_lists:
            return Layout("chosen and rejected, whole conversations", ("chosen", "rejected"), _common_messages)
        if "prompt" not in record and all(isinstance(side, str) for side in sides):
            return Layout("chosen and rejected, whole dialogues as text", ("chosen", "rejected"), _common_turns)
        if isinstance(record.get("prompt"), str) and are_lists and all(map(_is_whole, sides)):
            return Layout("a prompt as text, with whole conversations in chosen and rejected", PAIRED, _prompt_repeated)
    fields = next((fields for fields in forms if all(field in record for field in fields[1:] or fields)), forms[0])
    return Layout(", ".join(fields), fields, lambda record, where: record)


def _without(record: Mapping[str, Any], *columns: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in columns}


def _is_whole(side: Any) -> bool:
    first = side[0] if isinstance(side, list) and side else None
    return isinstance(first, Mapping) and first.get("role", first.get("from")) in ("user", "system", "human")


def _standard(value: Any, here: str) -> Any:
    """Return messages with ``role`` and ``content``, also of ShareGPT's ``from`` and ``value``."""
    if not isinstance(value, list):
        raise DataError(f"{here}: expected a list of messages, got {short(value)}")
    made = []
    for number, message in enumerate(value):
        if isinstance(message, Mapping) and "from" in message and "value" in message:
            others = _without(message, "from", "value")
            role = ROLES.get(message["from"], message["from"])
            if role not in ("user", "system", "tool", *ASSISTANT):
                raise DataError(
                    f"{here}, message {number}, 'from': expected one of {['system', 'user', 'assistant', *ROLES]}, got "
                    f"{short(role)}"
                )
            message = {"role": role, "content": message["value"], **others}
        made.append(message)
    return made


def _messages(record: dict[str, Any], where: str) -> dict[str, Any]:
    here = f"{where}, field 'conversations'"
    return {"messages": _standard(_held(record, "conversations", where), here), **_without(record, "conversations")}


def _last_is_answer(whole: str, label: str, record: dict[str, Any], where: str) -> dict[str, Any]:
    """Split a conversation before its last message, which must be the assistant's."""
    here = f"{where}, field {whole!r}"
    messages = _standard(_held(record, whole, where), here)
    if len(messages) < 2 or messages[-1].get("role") not in ASSISTANT:
        raise DataError(f"{here}: expected a conversation that ends with the assistant's answer, got {short(messages)}")
    return {
        "prompt": messages[:-1],
        "completion": messages[-1:],
        "label": _held(record, label, where),
        **_without(record, whole, label, "prompt", "completion"),
    }


def _sharegpt_pair(whole: str, record: dict[str, Any], where: str) -> dict[str, Any]:
    sides = {}
    for side in ("chosen", "rejected"):
        value = _held(record, side, where)
        if isinstance(value, str):
            value = [{"role": "assistant", "content": value}]
        sides[side] = _standard([value] if isinstance(value, Mapping) else value, f"{where}, field {side!r}")
    prompt = _standard(_held(record, whole, where), f"{where}, field {whole!r}")
    return {"prompt": prompt, **sides, **_without(record, whole, *sides)}


def _common_messages(record: dict[str, Any], where: str) -> dict[str, Any]:
    """Take the messages that both sides begin with as the prompt; at least one message is left on each side."""
    sides = [_standard(_held(record, side, where), f"{where}, field {side!r}") for side in ("chosen", "rejected")]
    limit = min(map(len, sides)) - 1
    common = next((at for at in range(max(limit, 0)) if sides[0][at] != sides[1][at]), max(limit, 0))
    if common == 0:
        raise DataError(
            f"{where}: expected chosen and rejected to begin with the same messages, the prompt; they do not"
        )
    chosen, rejected = (side[common:] for side in sides)
    return {"prompt": sides[0][:common], "chosen": chosen, "rejected": rejected, **_without(record, *PAIRED)}


def _common_turns(record: dict[str, Any], where: str) -> dict[str, Any]:
    """Split dialogues in text after the last ``Assistant:`` that both sides share."""
    sides = [_held(record, side, where) for side in ("chosen", "rejected")]
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if not isinstance(side, str):
            raise DataError(f"{where}, field {name!r}: expected a string, got {short(side)}")
    common = os.path.commonprefix(sides)  # noqa: RUF071 (of texts, not of paths)
    at = common.rfind(ASSISTANTS)
    if at < 0:
        raise DataError(
            f"{where}, field 'prompt': missing, and chosen and rejected do not begin with the same turns "
            f"{HUMAN!r} and {ASSISTANTS!r}, from which it would be taken: give it as 'prompt'"
        )
    at += len(ASSISTANTS)
    return {"prompt": common[:at], "chosen": sides[0][at:], "rejected": sides[1][at:], **_without(record, *PAIRED)}


def _prompt_repeated(record: dict[str, Any], where: str) -> dict[str, Any]:
    made = _common_messages(record, where)
    asked = [message.get("content") for message in made["prompt"] if isinstance(message, Mapping)]
    if record["prompt"] not in asked:
        raise DataError(
            f"{where}, field 'prompt': expected the text of a message that chosen and rejected both begin with, got "
            f"{short(record['prompt'])}: take the column out if the conversations are right"
        )
    return made


def with_system(convert: Callable, record: dict[str, Any], where: str) -> dict[str, Any]:
    """Put the text of the column ``system`` before the conversation; a prompt in text becomes a user's message."""
    made = convert(_without(record, "system"), where)
    text, here = record.get("system"), f"{where}, field 'system'"
    if text is not None and not isinstance(text, str):
        raise DataError(f"{here}: expected a string, got {short(text)}")
    if "text" in made:
        raise DataError(f"{here}: expected none beside a whole text: put it into the text")
    for field in made.keys() & {"prompt", "completion", "chosen", "rejected"}:
        if isinstance(made[field], str):
            role = "user" if field == "prompt" else "assistant"
            made = made | {field: [{"role": role, "content": made[field]}]}
    if not text:
        return made
    field = "messages" if "messages" in made and "prompt" not in made else "prompt"
    messages = made.get(field)
    if not isinstance(messages, list):
        return made  # the record's own check says what is wrong with it
    if messages and isinstance(messages[0], Mapping) and messages[0].get("role") == "system":
        raise DataError(f"{here}: the conversation begins with a system message too: take one of them out")
    return made | {field: [{"role": "system", "content": text}, *messages]}


def _held(record: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in record:
        raise DataError(
            f"{where}, field {column!r}: missing, expected the columns of the first record, got {names(record)}"
        )
    return record[column]
