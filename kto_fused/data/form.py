"""The form of a record: which fields it has, of which types, and the check that a record keeps to it.

A dataset has one form: unpaired or paired, texts or conversations. ``form_of`` reads it from the first record, and
``checked_record`` holds every record to it. Each error says where the record stands, what was found there, what was
expected, and often what to do.
"""

import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from datasets import Features, Value

UNPAIRED, PAIRED = ("prompt", "completion", "label"), ("prompt", "chosen", "rejected")
WEIGHT = "weight"  # a field that all records have, or none: a number >= 0 that multiplies the record's loss
# fields that a model or a chat template would get too: without them the rest of the record means something else
UNSUPPORTED = ("images", "image", "audio", "audios", "video", "videos", "tools", "chat_template_kwargs")
# The bytes of a line of JSON, and the characters of a record of a table, that one record may have. It is some four
# million tokens: far more than any model reads, while JSON and tokenizers still take it in a second or two.
MAX_RECORD = 16 * 2**20
MESSAGE = {"role": Value("string"), "content": Value("string")}
# other names of the fields in public data sets
ALIASES = {
    "prompt": ("instruction", "question", "query", "input"),
    "completion": ("response", "answer", "output", "generation"),
    "label": ("score", "rating", "thumbs", "desirable", "is_desirable"),
    "chosen": ("chosen_response", "response_chosen", "preferred", "accepted"),
    "rejected": ("rejected_response", "response_rejected", "dispreferred"),
}


class DataError(ValueError):
    """Data that cannot be used. The message names the file, the line (from 1) or row (from 0), and the field."""


class Form(NamedTuple):
    """The properties that all records of a dataset share."""

    fields: tuple[str, ...]  # UNPAIRED or PAIRED, perhaps with WEIGHT
    conversational: bool

    def __str__(self) -> str:
        kind = "paired" if "chosen" in self.fields else "unpaired"
        weights = " with weights" if WEIGHT in self.fields else ""
        return f"{kind} {'conversations' if self.conversational else 'texts'}{weights}"

    @property
    def features(self) -> Features:
        """The columns' types in a ``Dataset``."""
        text = [MESSAGE] if self.conversational else Value("string")
        numbers = {"label": Value("bool"), WEIGHT: Value("float64")}
        return Features({field: numbers.get(field, text) for field in self.fields})


def form_of(record: Any, where: str) -> Form:
    """Return the form of a record, or of a mapping of its field names to None. Raises ``DataError``."""
    expected = "expected prompt, completion and label, or prompt, chosen and rejected"
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: {expected} in a JSON object, got {short(record)}")
    complete = [fields for fields in (UNPAIRED, PAIRED) if all(field in record for field in fields[1:])]
    if len(complete) == 2:
        raise DataError(f"{where}: {expected}, got both")
    fields = complete[0] if complete else PAIRED if "chosen" in record or "rejected" in record else UNPAIRED
    for field in fields:
        if field not in record:
            raise DataError(f"{where}, field {field!r}: missing, {expected}, got {names(record)}{_renaming(record)}")
    weight = (WEIGHT,) if WEIGHT in record else ()
    return Form(fields + weight, isinstance(record["prompt"], list))


def _renaming(columns: Iterable[str]) -> str:
    """Return how to rename columns with known other names, or "" if there are none."""
    columns = set(columns)
    renamed = [
        f"{alias!r} to {field!r}" for field in ALIASES.keys() - columns for alias in ALIASES[field] if alias in columns
    ]
    if renamed:
        return f": rename {', '.join(sorted(renamed))} if that is what they hold"
    if "messages" in columns:
        return ": give the last message of 'messages' as 'completion' and those before it as 'prompt'"
    if {"chosen", "rejected"} <= columns:
        return ": give the common beginning of 'chosen' and 'rejected' as 'prompt' (trl.extract_prompt does it)"
    return ""


def checked_record(record: Any, form: Form, where: str) -> dict[str, Any]:
    """Return the fields of ``form``, with the label as a bool.

    Raises:
        DataError: the record has another form, a field has another type, is empty or too long, or an unsupported field
            holds something.
    """
    own = form_of(record, where)
    if own != form:
        raise DataError(f"{where}: holds {own}, expected {form} as in the first record")
    for field in UNSUPPORTED:
        if field in record and has_content(record[field]):
            raise DataError(f"{where}, {unsupported(field)}")
    checked: dict[str, Any] = {}
    for field in form.fields:
        value, here = record[field], f"{where}, field {field!r}"
        if field == "label":
            if not isinstance(value, int) or value not in (0, 1):  # a bool is an int
                raise DataError(f"{here}: expected true, false, 1 or 0, got {short(value)}")
            checked[field] = bool(value)
            continue
        if field == WEIGHT:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise DataError(f"{here}: expected a finite number >= 0, got {short(value)}")
            checked[field] = float(value)
            continue
        if isinstance(value, (str, list)) and isinstance(value, list) != form.conversational:
            raise DataError(_mixed(value, form, field, here))
        checked[field] = _messages(value, here) if form.conversational else _text(value, here)
        if form.conversational and field != "prompt" and (first := checked[field][0]["role"]) in ("system", "user"):
            raise DataError(f"{here}: expected the answer alone, got messages that begin with the {first}'s")
        texts = [message["content"] for message in checked[field]] if form.conversational else [checked[field]]
        if field != "prompt" and not any(texts):
            raise DataError(f"{here}: expected text, got an empty completion")
    if (size := characters(checked)) > MAX_RECORD:
        raise DataError(f"{where}: holds {size} characters, more than the {MAX_RECORD} that one record may have")
    return checked


def _mixed(value: str | list, form: Form, field: str, here: str) -> str:
    """Return the message for a prompt of text with an answer of messages, or the reverse."""
    if form.conversational:
        expected = f"expected a list of messages, got {short(value)}"
        advice = f'[{{"role": "assistant", "content": ...}}] as {field!r}, or the prompt as a string too'
    else:
        expected = f"expected a string, got {short(value)}"
        advice = f'[{{"role": "user", "content": ...}}] as \'prompt\', or {field!r} as a string too'
    kind = "messages" if form.conversational else "a string"
    return f"{here}: {expected}, though the prompt is {kind}: give {advice}"


def _messages(value: Any, here: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{here}: expected a list of messages, got {short(value)}")
    messages = []
    for number, message in enumerate(value):
        one = f"{here}, message {number}"
        if not isinstance(message, dict) or not MESSAGE.keys() <= message.keys():
            raise DataError(f"{one}: expected a role and a content, got {short(message)}")
        # keys with None are no fault: a column of Arrow gives every message the keys that any message has
        if lost := [key for key, held in message.items() if key not in MESSAGE and held is not None]:
            raise DataError(f"{one}: expected a role and a content alone, got {lost} too")
        messages.append({key: _text(message[key], f"{one}, {key!r}") for key in MESSAGE})
    return messages


def _text(value: Any, here: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{here}: expected a string, got {short(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{here}: expected text, got half a surrogate pair in {short(value)}") from error
    return value


def characters(record: dict[str, Any]) -> int:
    """Return the number of characters in the texts of a checked record."""
    texts = [value for value in record.values() if isinstance(value, (str, list))]
    return sum(
        len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text) for text in texts
    )


def unsupported(field: str) -> str:
    """Return the message for a field of ``UNSUPPORTED`` that holds something."""
    return (
        f"field {field!r}: not supported, expected texts or conversations alone: take out the records that need it, "
        "or the column if no record does"
    )


def has_content(value: Any) -> bool:
    """Return whether ``value`` holds anything but nulls, empty texts and empty lists."""
    values = [value]
    while values:  # no recursion: lists of JSON may be nested deeper than Python recurses
        value = values.pop()
        if isinstance(value, (dict, list, tuple)):
            values.extend(value.values() if isinstance(value, dict) else value)
        elif value is not None and not (isinstance(value, (str, bytes)) and not value):
            return True
    return False


def check_label_classes(classes: list[str], where: str) -> None:
    """Refuse a ``ClassLabel`` unless its classes are named false and true, or 0 and 1.

    It numbers its classes in any order: "desirable" before "undesirable" would be 0.
    """
    if [str(name).lower() for name in classes] not in (["false", "true"], ["0", "1"]):
        raise DataError(
            f"{where}, field 'label': expected true or false, or classes of these names, got the classes {classes}: "
            "map them to true where somebody liked the completion"
        )


def short(value: Any) -> str:
    """Return the value's type and a shortened text of it, for a message."""
    return f"{type(value).__name__} {reprlib.repr(value)}"


def names(of: Iterable[Any], at_most: int = 20) -> str:
    """Return the first ``at_most`` names as a list in text, for a message."""
    of = list(of)
    shown = ", ".join(reprlib.repr(name) for name in of[:at_most])
    return f"[{shown}, and {len(of) - at_most} more]" if len(of) > at_most else f"[{shown}]"
