"""The form of a record: which fields it has, of which types, and the check that a record keeps to it.

A dataset has one form: its fields, and whether they hold texts or conversations. ``form_of`` reads it from the first
record, and ``checked_record`` holds every record to it. Each error says where the record stands, what was found there,
what was expected, and often what to do.
"""

import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Features

UNPAIRED, PAIRED = ("prompt", "completion", "label"), ("prompt", "chosen", "rejected")
COMPLETION, TEXT, MESSAGES = ("prompt", "completion"), ("text",), ("messages",)
KINDS = {
    UNPAIRED: "unpaired",
    PAIRED: "paired",
    COMPLETION: "prompt-and-completion",
    TEXT: "whole",
    MESSAGES: "whole",
}
# The forms that a method takes: preferences for KTO and DPO, demonstrations for supervised fine-tuning, comparisons for
# reward models.
Forms = tuple[tuple[str, ...], ...]
PREFERENCES: Forms = (UNPAIRED, PAIRED)
DEMONSTRATIONS = (COMPLETION, TEXT, MESSAGES)
COMPARISONS = (PAIRED,)
EXPECTED = {
    PREFERENCES: "expected prompt, completion and label, or prompt, chosen and rejected",
    DEMONSTRATIONS: "expected prompt and completion, or text, or messages",
    COMPARISONS: "expected prompt, chosen and rejected",
}
# Fields with a number that all records have, or none: a weight multiplies the record's loss, a margin is how far apart
# the scores of a pair should be.
WEIGHT, MARGIN = "weight", "margin"
NUMBERS = {PREFERENCES: (WEIGHT,), DEMONSTRATIONS: (WEIGHT,), COMPARISONS: (WEIGHT, MARGIN)}
# The functions that the model may call, which a chat template writes into the prompt. A checked record keeps them as
# JSON text, "" if there are none.
TOOLS = "tools"
NO_TEXTS = ("label", WEIGHT, MARGIN, TOOLS)
# fields that a model or a chat template would get too: without them the rest of the record means something else
UNSUPPORTED = ("images", "image", "audio", "audios", "video", "videos", "chat_template_kwargs")
# The bytes of a line of JSON, and the characters of a record of a table, that one record may have. It is some four
# million tokens: far more than any model reads, while JSON and tokenizers still take it in a second or two.
MAX_RECORD = 16 * 2**20
ASSISTANT = ("assistant", "model")  # the roles whose messages are trained; Gemma's templates say "model"
MESSAGE = ("role", "content")
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

    fields: tuple[str, ...]  # a key of KINDS, perhaps with some of NUMBERS and TOOLS
    conversational: bool
    forms: Forms = PREFERENCES  # those among which this one was found

    def __str__(self) -> str:
        optional = [field for field in self.fields if field in (WEIGHT, MARGIN, TOOLS)]
        kind = KINDS[self.fields[: len(self.fields) - len(optional)]]
        added = f" with {' and '.join(optional)}" if optional else ""
        return f"{kind} {'conversations' if self.conversational else 'texts'}{added}"

    @property
    def features(self) -> "Features":
        """The columns' types in a ``Dataset``."""
        from datasets import Features, Value

        text = [dict.fromkeys(MESSAGE, Value("string"))] if self.conversational else Value("string")
        others = {"label": Value("bool"), WEIGHT: Value("float64"), MARGIN: Value("float64"), TOOLS: Value("string")}
        return Features({field: others.get(field, text) for field in self.fields})


def form_of(record: Any, where: str, forms: Forms = PREFERENCES) -> Form:
    """Return the form of a record, one of ``forms``. Raises ``DataError``.

    Of a mapping of field names to None it returns the form whose ``conversational`` means nothing yet.
    """
    expected = EXPECTED[forms]
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: {expected} in a JSON object, got {short(record)}")
    complete = [fields for fields in forms if all(field in record for field in fields[1:] or fields)]
    if len(complete) > 1:
        found = "both" if forms == PREFERENCES else f"{names(record)}: keep one of them"
        raise DataError(f"{where}: {expected}, got {found}")
    is_paired = forms == PREFERENCES and ("chosen" in record or "rejected" in record)
    fields = complete[0] if complete else PAIRED if is_paired else forms[0]
    for field in fields:
        if field not in record:
            advice = _renaming(record, forms)
            raise DataError(f"{where}, field {field!r}: missing, {expected}, got {names(record)}{advice}")
    if fields == COMPLETION and "label" in record:
        raise DataError(
            f"{where}, field 'label': expected none, because supervised fine-tuning trains on every completion alike: "
            "keep the records whose completions are good, and take the field out"
        )
    optional = tuple(field for field in (*NUMBERS[forms], TOOLS) if field in record)
    if fields == TEXT:  # has no prompt for tools
        optional = tuple(field for field in optional if field != TOOLS)
    is_conversation = fields == MESSAGES or (fields != TEXT and isinstance(record["prompt"], list))
    return Form(fields + optional, is_conversation, forms)


def _renaming(columns: Iterable[str], forms: Forms) -> str:
    """Return how to rename columns with known other names, or "" if there are none."""
    columns, known = set(columns), {field for fields in forms for field in fields}
    renamed = [
        (alias, field) for field in (ALIASES.keys() & known) - columns for alias in ALIASES[field] if alias in columns
    ]
    if renamed:
        listed = ", ".join(f"{alias!r} to {field!r}" for alias, field in sorted(renamed))
        flags = " ".join(f"{field}={alias}" for alias, field in sorted(renamed))
        return f": rename {listed} if that is what they hold (--columns {flags} does it)"
    if forms == DEMONSTRATIONS:
        return ": give the answers to learn as 'completion'" if "chosen" in columns else ""
    if "messages" in columns:
        return ": give the last message of 'messages' as 'completion' and those before it as 'prompt'"
    missing = " ".join(f"{field}=COLUMN" for field in forms[0] if field not in columns)
    return f": if other columns hold them, name these with --columns {missing}"


def checked_record(record: Any, form: Form, where: str) -> dict[str, Any]:
    """Return the fields of ``form``, with the label as a bool.

    Raises:
        DataError: the record has another form, a field has another type, is empty or too long, or an unsupported field
            holds something.
    """
    own = form_of(record, where, form.forms)
    if TOOLS not in form.fields:
        if has_content(record.get(TOOLS)):
            is_whole = form.fields == TEXT
            reason = (
                "a whole text has no prompt to write them into" if is_whole else "the first record has no such field"
            )
            advice = "put them into the text" if is_whole else "give it to every record, with null where there is none"
            raise DataError(f"{where}, field {TOOLS!r}: holds {short(record[TOOLS])}, but {reason}: {advice}")
        own = own._replace(fields=tuple(field for field in own.fields if field != TOOLS))
    elif TOOLS not in own.fields:
        own = own._replace(fields=(*own.fields, TOOLS))
    if own != form:
        raise DataError(f"{where}: holds {own}, expected {form} as in the first record")
    for field in UNSUPPORTED:
        if field in record and has_content(record[field]):
            raise DataError(f"{where}, {unsupported(field)}")
    checked: dict[str, Any] = {}
    for field in form.fields:
        value, here = record.get(field), f"{where}, field {field!r}"
        if field == TOOLS:
            checked[field] = form_tools(value, here)
            continue
        if field == "label":
            if not isinstance(value, int) or value not in (0, 1):  # a bool is an int
                raise DataError(f"{here}: expected true, false, 1 or 0, got {short(value)}")
            checked[field] = bool(value)
            continue
        if field in (WEIGHT, MARGIN):
            least = 0 if field == WEIGHT else -math.inf
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or value < least:
                expected = "a finite number >= 0" if field == WEIGHT else "a finite number"
                raise DataError(f"{here}: expected {expected}, got {short(value)}")
            checked[field] = float(value)
            continue
        is_whole = form.fields[:1] in (TEXT, MESSAGES)
        if not is_whole and isinstance(value, (str, list)) and isinstance(value, list) != form.conversational:
            raise DataError(_mixed(value, form, field, here))
        checked[field] = form_messages(value, here) if form.conversational else form_text(value, here)
        first = checked[field][0]["role"] if form.conversational else ""
        if is_whole and first in ASSISTANT:
            raise DataError(f"{here}: expected messages that begin with the user's or the system's, got the {first}'s")
        if not is_whole and field != "prompt" and first in ("system", "user"):
            raise DataError(f"{here}: expected the answer alone, got messages that begin with the {first}'s")
        if is_whole and form.conversational and not any(part["role"] in ASSISTANT for part in checked[field]):
            raise DataError(f"{here}: expected a message of the role 'assistant', got none")
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


def form_messages(value: Any, here: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{here}: expected a list of messages, got {short(value)}")
    messages = []
    for number, message in enumerate(value):
        one = f"{here}, message {number}"
        if not isinstance(message, dict) or not message.keys() >= {*MESSAGE}:
            raise DataError(f"{one}: expected a role and a content, got {short(message)}")
        # keys with None are no fault: a column of Arrow gives every message the keys that any message has
        if lost := [key for key, held in message.items() if key not in MESSAGE and held is not None]:
            raise DataError(f"{one}: expected a role and a content alone, got {lost} too")
        messages.append({key: form_text(message[key], f"{one}, {key!r}") for key in MESSAGE})
    return messages


def form_text(value: Any, here: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{here}: expected a string, got {short(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{here}: expected text, got half a surrogate pair in {short(value)}") from error
    return value


def form_tools(value: Any, here: str) -> str:
    """Return a list of tools, which may be given as JSON text, as JSON text; "" if there are none.

    >>> from kto_fused.data.form import form_tools
    >>> form_tools([{"type": "function", "function": {"name": "now"}}], "line 1")
    '[{"type": "function", "function": {"name": "now"}}]'
    >>> form_tools("[]", "line 1")
    ''
    """
    tools, expected = (
        value,
        "expected a list of tools, each an object with a JSON schema, or the JSON text of such a list",
    )
    if isinstance(value, str) and value:
        try:
            tools = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{here}: {expected}, got {short(value)}: {error}") from error
    if not has_content(tools):
        return ""
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) and tool for tool in tools):
        raise DataError(f"{here}: {expected}, got {short(tools)}")
    try:
        return form_text(json.dumps(tools, ensure_ascii=False), here)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{here}: {expected}, got {short(tools)}: {error}") from error


def without_nulls(value: Any) -> Any:
    """Return lists and objects without the keys that hold null.

    A column of Arrow gives every object the keys that any object has.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(held) for key, held in value.items() if held is not None}
    return [without_nulls(held) for held in value] if isinstance(value, list) else value


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


def short(value: Any) -> str:
    """Return the value's type and a shortened text of it, for a message."""
    return f"{type(value).__name__} {reprlib.repr(value)}"


def names(of: Iterable[Any], at_most: int = 20) -> str:
    """Return the first ``at_most`` names as a list in text, for a message."""
    of = list(of)
    shown = ", ".join(reprlib.repr(name) for name in of[:at_most])
    return f"[{shown}, and {len(of) - at_most} more]" if len(of) > at_most else f"[{shown}]"
