"""Turn records into rows of token ids, and find out what is wrong with them.

``token_rows`` does it for a batch of records. The tokens are those that the tokenizer gives for prompt and completion
together, so a completion starts at the first token that differs from the prompt's own. A conversation is first rendered
by its chat template. In an answer of several messages, only the assistant's tokens are trained.

Every record is checked while it is tokenized. A record that would teach nothing is dropped for a reason of ``DROPPED``;
what deserves a warning is a finding of ``FOUND``. Both are columns of the rows.
"""

import functools
import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from .form import ASSISTANT, MARGIN, NO_TEXTS, TOOLS, WEIGHT, DataError
from .rendering import GENERATION, Renderer

# How many tokens of a prompt's messages may change once an answer follows: one or two, if the tokenizer merges across
# the border. A chat template that renders a message differently changes its words and the text around them.
MERGED = 2
WHITE = " \t\r\n\u2581\u0120\u010a"  # with the letters that stand for a space and a line break in vocabularies

# Why an example is dropped: the keys of ``Prepared.dropped_for``. The texts complete "they are dropped, because". A
# column of the rows holds the number of the reason, from 1.
DROPPED = {
    "no_room": "the prompt leaves no room for a completion token",
    "same_after_cut": "chosen and rejected have the same tokens once they are cut at max_length, so nothing tells them "
    "apart",
    "same_tokens": "chosen and rejected have the same tokens, so nothing tells them apart: their texts are equal, or "
    "differ only in what the tokenizer does not know or the chat template leaves out",
    "untrained": "a completion has no token of the assistant's within max_length",
    "single": "a completion without a prompt is a single token, which nothing predicts",
}
# What is reported of examples that are kept: the keys of ``Prepared.found``, each a column of the rows. The texts
# complete "in 3 of 10 examples".
FOUND = {
    "merged": "the prompt's last tokens differ once a completion follows; the completion then starts at the first "
    "token that differs, and the text of the prompt in it is trained too",
    "double_bos": "the tokens begin with two beginning-of-text tokens: the tokenizer adds one, so take the other out "
    "of the texts or the chat template",
    "double_end": "a completion ends with the same end token twice: the tokenizer or the chat template adds one, so "
    "take the other out of the texts",
    "no_end": "no end-of-text or end-of-turn token ends a completion, so the model does not learn to end one",
    "unknown": "the tokenizer does not know some of the text, and puts its unknown token there",
    "changed": "the chat template changes or leaves out text of the answer, and the model is trained on what is left",
    "added": "the chat template adds text to the answer, such as a header or an empty thought, and the model is "
    "trained on it too",
    "masked": "an answer has several messages, and only the tokens of the assistant's messages are trained",
    "template_tokens": "the text already holds tokens of the chat template",
    "system_lost": "the chat template leaves out the system message",
    "ends_masked": "an answer ends with a message that is not the assistant's, and what follows the assistant's last "
    "message is left out",
}


class Answer(NamedTuple):
    """The tokens of a prompt with one answer, and what is known about them."""

    ids: list[int]  # of prompt and answer
    trained: list[bool] | None  # the assistant's tokens; None if all of the answer is
    found: set[str]  # findings about its text, keys of FOUND
    has_end: bool | None  # whether the chat template wrote a special token after it; None without a template

    def until(self, max_length: int | None) -> tuple[list[int], list[bool] | None]:
        """Return ``ids`` and ``trained``, cut at ``max_length`` and after the last token that is trained."""
        if self.trained is None:
            return self.ids[:max_length], None
        trained = self.trained[:max_length]
        while trained and not trained[-1]:
            trained.pop()
        return self.ids[: len(trained)], trained


class Encoded(NamedTuple):
    """The tokens of one record."""

    prompt: list[int]  # the prompt alone; of a conversation with the text that asks for an answer
    answers: list[Answer]


class SpecialTokens(NamedTuple):
    """The tokens that the checks look for; None if there is none."""

    begin: int | None
    ends: set[int]
    unknown: int | None
    # the texts of all tokens that the tokenizer takes whole out of a text, by length, longest first
    texts: dict[int, set[str]]
    template: re.Pattern | None  # finds those of these texts that the chat template writes


def token_rows(
    batch: dict,
    rows: list[int],
    *,
    sides: list[str],
    columns: list[str],
    tokenizer,
    max_length: int | None,
    name: str,
    as_chat: bool = False,
) -> dict[str, list]:
    """Return the columns of a batch of records; the function that ``Dataset.map`` applies.

    A record that is dropped gives a row without tokens, whose column ``dropped`` says why.

    Args:
        batch: the columns of the records.
        rows: the records' numbers.
        sides: the answers of a row: "completion", or "chosen" and "rejected". With one side, a pair gives two rows.
        columns: the columns to return.
        tokenizer, max_length: see ``prepare_unpaired``.
        name: of the data, for messages.
        as_chat: whether texts become messages: the prompt the user's, the answers the assistant's.
    """
    batch = _with_prompts(batch)
    if as_chat:
        batch = {field: values if field in NO_TEXTS else _as_messages(field, values) for field, values in batch.items()}
    fields = [field for field in batch if field not in ("prompt", *NO_TEXTS)]
    is_split = len(fields) > len(sides)
    nothing = [None] * len(rows)
    labels, weights, margins = (batch.get(field, nothing) for field in ("label", WEIGHT, MARGIN))
    tools = batch.get(TOOLS, [""] * len(rows))
    special = special_tokens(tokenizer)
    # a few different tokens end nearly all completions, and decoding one takes longer than all other checks of it
    is_white = functools.cache(lambda token: not tokenizer.decode([token]).strip(WHITE))
    made = {column: [] for column in columns}
    with Renderer(tokenizer, name) as render:
        if isinstance(batch["prompt"][0], str):
            encoded = encoded_texts(batch, fields, tokenizer)
        else:
            encoded = encoded_conversations(batch, fields, rows, tokenizer, special, render, tools)
        texts = zip(batch["prompt"], *(batch[field] for field in fields), strict=True)
        records = zip(rows, batch["prompt"], tools, texts, labels, weights, margins, encoded, strict=True)
        for row, messages, its_tools, record, label, weight, margin, (prompt, answers) in records:
            has_template_tokens = special.template is not None and _holds(special.template, record)
            why_same = _why_same(answers, max_length) if len(answers) == 2 else ""
            groups = [(answers[:1], True), (answers[1:], False)] if is_split else [(answers, label)]
            for group, its_label in groups:
                start = _common_prefix(prompt, tuple(answer.ids for answer in group))
                if start < len(prompt) and not isinstance(messages, str):
                    _check_template(tokenizer, render, messages, its_tools, prompt, start, row, name)
                example = _example(prompt, dict(zip(sides, group, strict=True)), start, max_length, special, is_white)
                if why_same and "dropped" not in example:
                    example = {"dropped": why_same}
                if sides == ["completion"] and its_label is None and example.get("length") == 1:
                    example = {"dropped": "single"}
                if "dropped" in example:
                    example["dropped"] = [*DROPPED].index(example["dropped"]) + 1
                elif has_template_tokens:
                    example["template_tokens"] = True
                example |= {"label": its_label, WEIGHT: weight, MARGIN: margin, "row": row}
                for column in columns:
                    empty = [] if column.endswith(("_ids", "_mask")) else 0
                    made[column].append(example.get(column, empty))
    return made


def _with_prompts(batch: dict) -> dict:
    """Return a batch of demonstrations as prompts with completions, and any other batch as it is.

    A text is a completion without a prompt. In a conversation the answer begins with the assistant's first message.
    """
    if "text" in batch:
        return {"prompt": [""] * len(batch["text"]), "completion": batch["text"]}
    if "messages" not in batch:
        return batch
    starts = [
        next(number for number, message in enumerate(messages) if message["role"] in ASSISTANT)
        for messages in batch["messages"]
    ]
    split = [(messages[:start], messages[start:]) for messages, start in zip(batch["messages"], starts, strict=True)]
    made = {"prompt": [prompt for prompt, _ in split], "completion": [answer for _, answer in split]}
    return made | ({TOOLS: batch[TOOLS]} if TOOLS in batch else {})


def _as_messages(field: str, texts: list[str]) -> list[list[dict[str, str]]]:
    role = "user" if field == "prompt" else "assistant"
    return [[{"role": role, "content": text}] for text in texts]


def _holds(pattern: re.Pattern, record: tuple) -> bool:
    """Return whether the prompt of a text, or a message of a conversation, holds what ``pattern`` finds.

    A token at the end of an answer does not count: the finding "double_end" is about it.
    """
    if isinstance(record[0], str):
        return pattern.search(record[0]) is not None
    prompt, *answers = ([message["content"] for message in messages] for messages in record)
    return any(map(pattern.search, prompt)) or any(
        found.end() < len(text.rstrip()) for answer in answers for text in answer for found in pattern.finditer(text)
    )


def _why_same(answers: list[Answer], max_length: int | None) -> str:
    """Return the reason to drop a pair whose sides have the same tokens, or "" if a token differs."""
    chosen, rejected = answers
    if chosen.until(max_length) != rejected.until(max_length):
        return ""
    return "same_tokens" if chosen.until(None) == rejected.until(None) else "same_after_cut"


def _example(
    prompt: list[int],
    answers: dict[str, Answer],
    start: int,
    max_length: int | None,
    special: SpecialTokens,
    is_white: Callable[[int], bool],
) -> dict[str, Any]:
    """Return the columns of one row.

    A column without a value is 0 or empty. A row that is dropped has only ``dropped``, the reason.

    Args:
        answers: by side.
        start: the number of tokens before the completions.
        is_white: whether a token is only white space.
    """
    example, found, truncated = {"prompt_ids": prompt[:start]}, set(), False
    for side, answer in answers.items():
        ids, trained = answer.until(max_length)
        is_cut = len(ids) < len(answer.until(None)[0])
        if max_length is not None and start >= max_length:
            return {"dropped": "no_room"}
        if len(ids) <= start:
            return {"dropped": "untrained"}
        example[f"{side}_ids"] = ids[start:]
        example[f"{side}_mask"] = [True] * (len(ids) - start) if trained is None else trained[start:]
        truncated |= is_cut
        found |= answer.found
        if not is_cut:
            last, before = _last_words(ids[start:], is_white)
            if answer.has_end is False or last not in special.ends:
                found.add("no_end")
            elif last == before:
                found.add("double_end")
        if special.unknown in ids:
            found.add("unknown")
        if special.begin is not None and ids[:2] == [special.begin] * 2:
            found.add("double_bos")
    if start < len(prompt):
        found.add("merged")
    completions = [values for name, values in example.items() if name != "prompt_ids"]
    return {
        **example,
        "length": start + max(len(example[f"{side}_ids"]) for side in answers),
        "prompt_key": _key(prompt),
        "key": _key(example["prompt_ids"], *completions),
        "truncated": truncated,
        **dict.fromkeys(found, True),
    }


def _last_words(ids: list[int], is_white: Callable[[int], bool]) -> tuple[int | None, int | None]:
    """Return the last token that is more than white space, and the one before it.

    A template may write white space after the end of a turn.
    """
    words = (token for token in reversed(ids) if not is_white(token))
    last, before = [*islice(words, 2), None, None][:2]
    return last, before


def _key(*lists: list[int] | list[bool]) -> int:
    """Return an int64 that is equal for equal lists."""
    digest = hashlib.blake2b(digest_size=8)
    for values in lists:
        digest.update(len(values).to_bytes(8, "big") + array("i", values).tobytes())
    return int.from_bytes(digest.digest(), "big", signed=True)


def _common_prefix(prompt: list[int] | str, wholes: tuple[list[int] | str, ...]) -> int:
    """Return how many tokens (characters) at the start of ``prompt`` all ``wholes`` start with."""
    low, high = 0, len(prompt)
    if all(whole[:high] == prompt for whole in wholes):
        return high
    while low < high:  # bisected, because slices compare faster than a loop in Python
        middle = (low + high + 1) // 2
        low, high = (middle, high) if all(whole[:middle] == prompt[:middle] for whole in wholes) else (low, middle - 1)
    return low


# ---- texts ---------------------------------------------------------------------------------------------------------


def encoded_texts(batch: dict, fields: list[str], tokenizer) -> Iterator[Encoded]:
    """Yield the tokens of each record. An answer ends with one end-of-text token, if the tokenizer has one."""
    adds_end = _adds_end(tokenizer)
    prompts = tokenizer(batch["prompt"])["input_ids"]
    if adds_end:
        prompts = [ids[:-1] for ids in prompts]
    texts = [
        [_joined(*pair, tokenizer, adds_end) for pair in zip(batch["prompt"], batch[field], strict=True)]
        for field in fields
    ]
    wholes = zip(*(tokenizer(text)["input_ids"] for text in texts), strict=True) if fields else [()] * len(prompts)
    for prompt, sides in zip(prompts, wholes, strict=True):
        yield Encoded(prompt, [Answer(ids, None, set(), None) for ids in sides])


def _adds_end(tokenizer) -> bool:
    """Return whether the tokenizer itself ends a text with its end-of-text token."""
    # The last token of an empty text may be the one that begins every text, and that of a word may be the one for
    # unknown words. Only an end-of-text token is the last one of both.
    return tokenizer.eos_token is not None and all(
        tokenizer(text)["input_ids"][-1:] == [tokenizer.eos_token_id] for text in ("", "a")
    )


def _joined(prompt: str, completion: str, tokenizer, adds_end: bool) -> str:
    end = tokenizer.eos_token or ""
    return prompt + completion.removesuffix(end) + ("" if adds_end else end)


# ---- conversations -------------------------------------------------------------------------------------------------


class Conversation(NamedTuple):
    """A record's prompt with one answer, rendered."""

    row: int
    prompt: list[dict[str, str]]
    answer: list[dict[str, str]]
    tools: str
    asked: str  # the rendered prompt, with what asks for an answer
    text: str  # the rendered prompt and answer
    ids: list[int]  # the tokens of ``text``


def encoded_conversations(
    batch: dict,
    fields: list[str],
    rows: list[int],
    tokenizer,
    special: SpecialTokens,
    render: Renderer,
    tools: list[str] | None = None,
) -> Iterator[Encoded]:
    """Yield the tokens of each record as its chat template writes it.

    Raises:
        DataError: a record has ``tools`` (JSON text) that the template does not write into the prompt.
    """
    prompts, tools = batch["prompt"], tools or [""] * len(rows)
    asked = [one.text for one in render.all(rows, prompts, tools, add_generation_prompt=True)]
    _check_tools(rows, prompts, tools, asked, render)
    asked_ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    sides = []
    for field in fields:
        texts = [one.text for one in render.all(rows, list(map(list.__add__, prompts, batch[field])), tools)]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        conversations = map(Conversation, rows, prompts, batch[field], tools, asked, texts, ids)
        sides.append([_conversation_answer(one, tokenizer, special, render) for one in conversations])
    yield from map(Encoded, asked_ids, map(list, zip(*sides, strict=True)) if fields else [[]] * len(prompts))


def _check_tools(rows: list[int], prompts: list, tools: list[str], asked: list[str], render: Renderer) -> None:
    """Raise ``DataError`` if a prompt with tools is rendered as one without them."""
    having = [number for number, text in enumerate(tools) if text]
    if not having:
        return
    of_these = [[values[number] for number in having] for values in (rows, prompts)]
    without = render.all(*of_these, add_generation_prompt=True)
    for number, one in zip(having, without, strict=True):
        if one.text == asked[number]:
            raise DataError(
                f"{render.name} data, row {rows[number]}, field {TOOLS!r}: the chat template writes the same text with "
                "and without the tools, so the model would not see them: take out the records that need tools, or use "
                "a tokenizer whose template takes them"
            )


def _conversation_answer(conversation: Conversation, tokenizer, special: SpecialTokens, render: Renderer) -> Answer:
    answer, text = conversation.answer, conversation.text
    roles = [message["role"] for message in answer]
    if not set(roles) & set(ASSISTANT):
        raise DataError(
            f"{render.name} data, row {conversation.row}: the answer has messages of the roles {sorted(set(roles))}, "
            "expected one of role 'assistant'"
        )
    found = set()
    if any(message["content"].strip() not in text for message in answer):
        found.add("changed")
    first = conversation.prompt[0] if conversation.prompt else {}
    if first.get("role") == "system" and first["content"].strip() not in conversation.asked:
        found.add("system_lost")
    if len(answer) == 1:
        spans, trained = [(_common_prefix(conversation.asked, (text,)), len(text))], None
    else:
        spans = _assistant_spans(conversation, tokenizer, render)
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        token_ends = np.array([end for _, end in encoding["offset_mapping"]])
        is_trained = np.zeros(len(token_ends), bool)
        for start, end in spans:
            is_trained |= (token_ends > start) & (token_ends <= end)
        trained = is_trained.tolist()
        found.add("masked")
        if roles[-1] not in ASSISTANT:
            found.add("ends_masked")
    has_end, messages = True, [message["content"] for message in answer if message["role"] in ASSISTANT]
    for (start, end), content in zip(spans[-len(messages) :], messages, strict=False):
        written = _written_around(text[start:end], content, special.texts)
        has_end &= written.has_end
        if written.before.strip() or written.after.strip():
            found.add("added")
    return Answer(conversation.ids, trained, found, has_end)


class WrittenAround(NamedTuple):
    """Text that a template wrote around an answer."""

    before: str
    after: str  # without the special tokens and the white space at its end
    has_end: bool  # whether there is such a special token


def _written_around(text: str, content: str, special: dict[int, set[str]]) -> WrittenAround:
    """Return what a template wrote around ``content``. If it changed the content, nothing is reported."""
    content, body, has_end = content.strip(), text.rstrip(), False
    while not body.endswith(content):
        # looked up by length, because some tokenizers have thousands of such tokens
        token = next((body[-length:] for length, tokens in special.items() if body[-length:] in tokens), None)
        if token is None:
            break
        body, has_end = body.removesuffix(token).rstrip(), True
    if not content or content not in body:
        return WrittenAround("", "", True)
    before, _, after = body.rpartition(content)
    return WrittenAround(before, after, has_end)


def _assistant_spans(conversation: Conversation, tokenizer, render: Renderer) -> list[tuple[int, int]]:
    """Return start and end, in characters, of the assistant's messages of an answer in the rendered conversation.

    They are the content of the template's ``{% generation %}`` blocks. In a template without such blocks a message
    starts after the text that asks for it, and ends with the text that the template writes after it. Both are found by
    comparing the rendered conversation with renderings of its first messages.
    """
    row, prompt, answer, text = conversation.row, conversation.prompt, conversation.answer, conversation.text
    tools = conversation.tools
    where = f"{render.name} data, row {row}: the answer has several messages, of which only the assistant's are trained"
    instead = "give each answer as one message, with what came before it in the prompt"
    if not tokenizer.is_fast:
        raise DataError(f"{where}, and finding their tokens needs a tokenizer with a Rust backend: {instead}")
    if GENERATION.search(tokenizer.get_chat_template(tools=json.loads(tools) if tools else None)):
        if spans := render(row, prompt + answer, tools, find_generated=True).generated:
            return spans
        raise DataError(f"{where}, but the chat template's {{% generation %}} blocks hold none of its text: {instead}")
    spans = []
    for number, message in enumerate(answer):
        if message["role"] not in ASSISTANT:
            continue
        before = prompt + answer[:number]
        is_found = number == 0 or text.startswith(render(row, before, tools).text)
        start = _common_prefix(render(row, before, tools, add_generation_prompt=True).text, (text,))
        until = render(row, [*before, message], tools).text
        end = len(until)
        if not text.startswith(until):
            # the template writes a last message differently (Qwen3 adds an empty thought): look for the rest of it
            content = message["content"].strip()
            rest = content + until.rpartition(content)[2] if content else ""
            begin = len(text) - len(text[start:].lstrip())
            end = begin + len(rest)
            is_found = is_found and bool(rest) and text.startswith(rest, begin)
        if not is_found:
            raise DataError(
                f"{where}, but the chat template renders message {number} of the answer differently once more messages "
                f"follow, so its tokens cannot be found: use a template with {{% generation %}} blocks, or {instead}"
            )
        spans.append((start, end))
    return spans


def _check_template(
    tokenizer, render: Renderer, messages: list, tools: str, prompt: list[int], start: int, row: int, name: str
) -> None:
    """Raise ``DataError`` if more than ``MERGED`` tokens of the prompt's messages lie after ``start``.

    There the completions start, so the template renders the messages differently once an answer follows. The text that
    asks for an answer belongs to no message, and may change.
    """
    alone = tokenizer(render(row, messages, tools).text, add_special_tokens=False)["input_ids"]
    if _common_prefix(alone, (prompt,)) - start <= MERGED:
        return
    tail = tokenizer.decode(prompt[start:])
    if len(tail) > 100:
        tail = f"{tail[:50]} ... {tail[-50:]}"
    raise DataError(
        f"{name} data, row {row}: the chat template renders the prompt differently once an answer follows, so the "
        f"completion would start {len(prompt) - start} tokens before the prompt's end, at {tail!r}: expected a "
        "template that renders messages alike whatever follows; use another one, or give prompt and completions as text"
    )


# ---- special tokens ------------------------------------------------------------------------------------------------


def special_tokens(tokenizer) -> SpecialTokens:
    eos, added = tokenizer.eos_token, tokenizer.added_tokens_decoder
    # an answer may end with another added token than eos_token, such as <|im_end|> or <end_of_turn>
    others = {tokenizer.bos_token, tokenizer.unk_token} - {eos}
    ends = {number for number, token in added.items() if token.content.strip() and token.content not in others}
    # an eos_token that is not in the vocabulary has the unknown token's id
    if eos is not None and tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == eos:
        ends.add(tokenizer.eos_token_id)
    # GPT-2's unk_token is its eos_token, so finding it means nothing
    is_shared = tokenizer.unk_token in (eos, tokenizer.bos_token, tokenizer.pad_token)
    texts = {}
    for text in sorted({eos or "", *(token.content for token in added.values())}, key=len, reverse=True):
        if text.strip():
            texts.setdefault(len(text), set()).add(text)
    unknown = None if is_shared else tokenizer.unk_token_id
    return SpecialTokens(tokenizer.bos_token_id, ends, unknown, texts, _template_tokens(tokenizer, texts))


def _template_tokens(tokenizer, texts: dict[int, set[str]]) -> re.Pattern | None:
    """Return a pattern of the tokens that the chat template writes, by its source; None if there are none."""
    source = str(tokenizer.chat_template or "")
    held = {
        text for name in ("bos_token", "eos_token") if name in source and (text := getattr(tokenizer, name)) is not None
    }
    held |= {text for of_length in texts.values() for text in of_length if text in source}
    held = sorted((text for text in held if len(text) > 2), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, held))) if held else None


def template_tokens_advice(is_text: bool) -> str:
    """Return what to do about template tokens in the texts; it follows the text of the finding."""
    if is_text:
        return ". The text is trained as it is, which is right if all of it was rendered with the template"
    return ", which adds them again: take them out of the messages"


def no_end_cause(tokenizer, is_text: bool) -> str:
    """Return why no end token ends the completions; it follows the text of the finding "no_end"."""
    if not is_text:
        return ". The chat template writes none after an answer: use one that does"
    if tokenizer.eos_token is None:
        return ". The tokenizer has no eos_token: set it, or end the texts with the model's own token"
    return (
        f". The tokenizer does not read its eos_token {tokenizer.eos_token} as a token (with split_special_tokens it "
        "is read as text)"
    )
