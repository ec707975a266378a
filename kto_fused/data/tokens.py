"""Records to token ids: prompt and completion as the tokenizer or its chat template writes them.

Every check looks at every record while it is tokenized. What it finds is a column of the tokenized rows, so a second
run, which finds them in the cache, reports the same counts.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from .. import checks
from . import cache
from .partners import mismatched_partners
from .records import PAIRED, UNPAIRED, DataError, Source, _digest, load
from .rendering import GENERATION, Renderer

logger = logging.getLogger(__name__)

# tokens of a prompt's messages that may change once an answer follows: one or two where a tokenizer merges across the
# border; a chat template that renders a message otherwise changes its words and what stands around them
MERGED = 2
WHITE = " \t\r\n\u2581\u0120\u010a"  # with the letters that stand for a space and a line break in vocabularies
TOKENS, MASK = List(Value("int32")), List(Value("bool"))
ASSISTANT = ("assistant", "model")  # the roles whose messages are trained; Gemma's templates say "model"

# Why an example is dropped: the keys of ``Prepared.dropped_for``; the texts complete "they are dropped, because". A
# column of the rows holds the number of the reason, from 1.
DROPPED = {
    "no_room": "the prompt leaves no room for a completion token",
    "same_after_cut": "chosen and rejected have the same tokens once they are cut at max_length, so nothing tells them "
    "apart",
    "same_tokens": "chosen and rejected have the same tokens, so nothing tells them apart: their texts are equal, or "
    "differ only in what the tokenizer does not know or the chat template leaves out",
    "untrained": "a completion has no token of the assistant's within max_length",
}
# What is said of examples that are kept: the keys of ``Prepared.found``, each a column of the cached rows.
FOUND = {
    "merged": "the prompt's last tokens differ once a completion follows; the completion then starts at the first that "
    "does, and is trained with what it holds of the prompt",
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
    "ends_masked": "an answer ends with a message that is not the assistant's, and what follows the assistant's last "
    "message is left out",
}


class Prepared(NamedTuple):
    """Tokenized examples, and what was counted while they were made.

    ``truncated`` of the examples had a completion cut at ``max_length``. ``dropped`` further examples are left out;
    ``dropped_for`` counts them by reason, the keys of ``DROPPED``. ``found`` counts the examples that a warning was
    given of, by finding: the keys of ``FOUND`` and ``both_labels``. Reasons and findings without an example are
    missing.
    """

    dataset: Dataset
    truncated: int
    dropped: int
    dropped_for: dict[str, int]
    found: dict[str, int]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for two tokenizers that turn every text and conversation into the same tokens, wherever they were loaded.

    For caches of what was made from tokens. Tokenizers without a Rust backend are told apart by their settings too.
    """
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        for of_the_last_call in ("padding", "truncation"):
            state.pop(of_the_last_call, None)
    else:
        state = [tokenizer.get_vocab(), tokenizer.init_kwargs]
    split_special = getattr(tokenizer, "split_special_tokens", False)
    kind = type(tokenizer).__name__
    return _digest(kind, state, tokenizer.special_tokens_map, split_special, tokenizer.chat_template)


def prepare_unpaired(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    mismatch: bool = True,
    needs_both_labels: bool = True,
    seed: int = 0,
    num_proc: int | None = None,
    name: str = "train",
) -> Prepared:
    """Tokens for KTO; of a pair, the chosen completion is a desirable example and the rejected one an undesirable.

    The mismatched completion, from which z0 is estimated, belongs to the example and not to its batch: any sampler,
    batch size and number of processes sees the same pairs, and the reference's log-probs of them can be kept.

    Args:
        source: what :func:`load` takes.
        tokenizer: its end-of-text token ends a plain completion; conversations need its chat template.
        max_length: tokens of prompt and completion. A longer completion is cut at its end, an example whose prompt
            leaves no room for one is dropped; both are counted and reported.
        mismatch: add ``kl_completion_ids``.
        needs_both_labels: refuse data of one label, which nothing can be learned from; evaluation may use it.
        seed: draws the partners among completions of like length.
        num_proc: processes that tokenize.
        name: what the data is called in the progress bar and in messages.

    Returns:
        A dataset of ``prompt_ids``, ``completion_ids``, ``label`` (bool), ``length`` (tokens of both), and
        ``kl_completion_ids``: the completion of another prompt, cut to what fits; empty where there is none left.
        Where an answer has several messages there are also ``completion_mask`` and ``kl_completion_mask`` (bool, one
        for each token of the ids): the assistant's tokens, which alone are trained.

    Raises:
        DataError: bad data, a missing chat template or one that fails or goes beyond a limit of ``Renderer``, an
            answer whose assistant tokens cannot be told from the rest, no example left, or none of a label that is
            needed.
        TypeError, ValueError: ``max_length`` is not an integer of at least 1, or None; the tokenizer is none.
    """
    prepared = _tokenized(source, tokenizer, UNPAIRED, max_length, num_proc, name)
    tokens = prepared.dataset
    labels, prompts, keys, rows = (_column(tokens, column) for column in ("label", "prompt_key", "key", "row"))
    tokens = tokens.remove_columns(["prompt_key", "key", "row"])
    for label, kind in ((True, "desirable"), (False, "undesirable")):
        if needs_both_labels and label not in labels:
            raise DataError(f"{name} data: expected desirable and undesirable examples, got no {kind} one")
    found = dict(prepared.found)
    disputed = np.isin(keys, np.intersect1d(keys[labels], keys[~labels]))
    if disputed.any():
        found["both_labels"] = int(disputed.sum())
        logger.warning(
            f"{name} data: {disputed.sum()} of {len(tokens)} examples (first: row {rows[disputed][0]}) have the tokens "
            "of an example with the other label. They are trained as they are, and pull the model both ways."
        )
    if not mismatch:
        return prepared._replace(dataset=tokens, found=found)
    columns = [column for column in ("completion_ids", "completion_mask") if column in tokens.column_names]
    completions = tokens.select_columns(columns)
    partners = mismatched_partners(prompts, _column(completions, "completion_ids", pc.list_value_length), seed)
    if alone := int((partners < 0).sum()):
        logger.warning(
            f"{name} data: {alone} of {len(tokens)} examples have no mismatched completion, "
            "because more than half of all examples share one prompt."
        )
    added = {f"kl_{column}": tokens.features[column] for column in columns}
    tokens = cache.mapped(
        tokens,
        partial(_partner_rows, completions=completions, partners=partners, max_length=max_length),
        batched=True,
        with_indices=True,
        input_columns=["prompt_ids"],
        features=Features({**tokens.features, **added}),
        num_proc=num_proc,
        desc=f"Mismatching {name} data",
        key=_digest("mismatch", tokens._fingerprint, seed, max_length),
    )
    return prepared._replace(dataset=tokens, found=found)


def prepare_paired(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    num_proc: int | None = None,
    name: str = "train",
) -> Prepared:
    """Tokens for DPO. Arguments as in :func:`prepare_unpaired`; a pair with one completion cut counts as truncated.

    A pair whose sides have the same tokens, as they are or once cut, is dropped: its margin would stay 0.

    Returns:
        A dataset of ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and ``length`` (tokens of the longer side). Where
        an answer has several messages there are also ``chosen_mask`` and ``rejected_mask``, as in
        :func:`prepare_unpaired`.

    Raises:
        DataError: as :func:`prepare_unpaired`, and unpaired data.
    """
    prepared = _tokenized(source, tokenizer, PAIRED, max_length, num_proc, name)
    return prepared._replace(dataset=prepared.dataset.remove_columns(["prompt_key", "key", "row"]))


def _tokenized(source, tokenizer, fields: tuple[str, ...], max_length, num_proc, name: str) -> Prepared:
    """The tokens of ``fields``, cached under all that decides them, and what there is to say of them.

    Beside the columns of the result there are ``row`` (the record's number), ``prompt_key`` and ``key``: integers that
    are equal where the prompts are, and where all tokens of an example are.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
    if max_length is not None:
        checks.integer("max_length", max_length, at_least=1)
    records = load(source)
    if fields == PAIRED and "chosen" not in records.column_names:
        raise DataError(f"{name} data: DPO needs pairs, expected {list(PAIRED)}, got {records.column_names}")
    is_text = records.features["prompt"] == Value("string")
    if not is_text and not tokenizer.chat_template:
        raise DataError(f"{name} data: holds conversations, but the tokenizer has no chat template to render them with")
    sides = [field for field in fields if field not in ("prompt", "label")]
    answers = [field for field in records.column_names if field not in ("prompt", "label")]
    has_masks = not is_text and any(_column(records, answer, pc.list_value_length).max() > 1 for answer in answers)
    columns = {"prompt_ids": TOKENS} | {f"{side}_ids": TOKENS for side in sides}
    columns |= {f"{side}_mask": MASK for side in sides} if has_masks else {}
    columns |= {"label": Value("bool")} if "label" in fields else {}
    columns |= {"length": Value("int32"), "prompt_key": Value("int64"), "key": Value("int64"), "row": Value("int64")}
    findings = {"dropped": Value("int8"), "truncated": Value("bool"), **dict.fromkeys(FOUND, Value("bool"))}
    tokens = cache.mapped(
        records,
        partial(
            _token_rows,
            sides=sides,
            columns=[*columns, *findings],
            tokenizer=tokenizer,
            max_length=max_length,
            name=name,
        ),
        batched=True,
        with_indices=True,
        remove_columns=records.column_names,
        features=Features(columns | findings),
        num_proc=num_proc,
        desc=f"Tokenizing {name} data",
        key=_digest("tokens", fields, records._fingerprint, fingerprint(tokenizer), max_length),
    )
    reasons, rows = _column(tokens, "dropped"), _column(tokens, "row")
    truncated = int(_column(tokens, "truncated").sum())
    flags = {finding: _column(tokens, finding) for finding in FOUND}
    tokens = tokens.remove_columns(list(findings))
    kept = np.flatnonzero(reasons == 0)
    dropped_for = {
        reason: int(count) for number, reason in enumerate(DROPPED, 1) if (count := (reasons == number).sum())
    }
    found = {finding: int(count) for finding, flag in flags.items() if (count := flag.sum())}
    if len(kept) == 0:
        listed = "; ".join(f"{count} are dropped, because {DROPPED[reason]}" for reason, count in dropped_for.items())
        raise DataError(f"{name} data: nothing is left of {len(reasons)} examples at max_length={max_length}: {listed}")
    if truncated or dropped_for.get("no_room"):
        logger.warning(
            f"{name} data, max_length={max_length}: of {len(reasons)} examples, {truncated} had a completion cut "
            f"and {dropped_for.get('no_room', 0)} were dropped, with no room for a completion token."
        )
    for number, (reason, text) in enumerate(DROPPED.items(), 1):
        if reason in dropped_for and reason != "no_room":
            logger.warning(
                f"{name} data: {dropped_for[reason]} of {len(reasons)} examples (first: row "
                f"{rows[reasons == number][0]}) are dropped, because {text}."
            )
    for finding, count in found.items():
        text = FOUND[finding] + (_no_end_cause(tokenizer, is_text) if finding == "no_end" else "")
        first = rows[flags[finding]][0]
        logger.warning(f"{name} data: in {count} of {len(kept)} examples (first: row {first}) {text}.")
    if dropped_for:
        tokens = tokens.select(kept)
    return Prepared(tokens, truncated, sum(dropped_for.values()), dropped_for, found)


def _column(dataset: Dataset, column: str, values=lambda array: array) -> np.ndarray:
    """``values`` of a column, in the order of the dataset's rows."""
    parts = dataset.select_columns(column).with_format("arrow").iter(10_000)
    return np.concatenate([values(part[column]).to_numpy() for part in parts])


class _Special(NamedTuple):
    """The tokens that the checks look for; an absent one is None."""

    begin: int | None
    ends: set[int]
    unknown: int | None
    texts: dict[int, set[str]]  # of all tokens that a tokenizer takes whole out of a text, by length, longest first


class _Answer(NamedTuple):
    """The tokens of a prompt with one answer; which of them are the assistant's, or None where all of the answer is;
    what was found in their text; and whether a chat template (None: there is none) wrote a special token after it.
    """

    ids: list[int]
    trained: list[bool] | None
    found: set[str]
    has_end: bool | None

    def until(self, max_length: int | None) -> tuple[list[int], list[bool] | None]:
        """``ids`` and ``trained``, cut at ``max_length`` and after the last token that is trained."""
        if self.trained is None:
            return self.ids[:max_length], None
        trained = self.trained[:max_length]
        while trained and not trained[-1]:
            trained.pop()
        return self.ids[: len(trained)], trained


def _token_rows(
    batch: dict, rows: list[int], *, sides: list[str], columns: list[str], tokenizer, max_length: int | None, name: str
) -> dict[str, list]:
    """The columns of a batch of records; a pair gives two rows where ``sides`` is one.

    A completion starts where it leaves the tokens of the prompt alone. A record that is dropped gives rows without
    tokens, which say why.
    """
    answers = [field for field in batch if field not in ("prompt", "label")]
    is_split = len(answers) > len(sides)
    labels = batch.get("label", [None] * len(rows))
    special = _special(tokenizer)
    made = {column: [] for column in columns}
    with Renderer(tokenizer, name) as render:
        if isinstance(batch["prompt"][0], str):
            encoded = _encoded_texts(batch, answers, tokenizer)
        else:
            encoded = _encoded_conversations(batch, answers, rows, tokenizer, special, render)
        for row, messages, label, (prompt, answered) in zip(rows, batch["prompt"], labels, encoded, strict=True):
            why_same = _why_same(answered, max_length) if len(answered) == 2 else ""
            groups = [(answered[:1], True), (answered[1:], False)] if is_split else [(answered, label)]
            for group, its_label in groups:
                start = _common_prefix(prompt, tuple(answer.ids for answer in group))
                if start < len(prompt) and not isinstance(messages, str):
                    _check_template(tokenizer, render, messages, prompt, start, row, name)
                example = _example(prompt, dict(zip(sides, group, strict=True)), start, max_length, special, tokenizer)
                if why_same and "dropped" not in example:
                    example = {"dropped": why_same}
                if "dropped" in example:
                    example["dropped"] = [*DROPPED].index(example["dropped"]) + 1
                example |= {"label": its_label, "row": row}
                for column in columns:
                    empty = [] if column.endswith(("_ids", "_mask")) else 0
                    made[column].append(example.get(column, empty))
    return made


def _example(
    prompt: list[int],
    answers: dict[str, _Answer],
    start: int,
    max_length: int | None,
    special: _Special,
    tokenizer,
) -> dict[str, Any]:
    """The columns of a row of ``answers`` by side, whose completions begin at ``start``. A column without a value is 0
    or empty; a row that is dropped has ``dropped``, the reason, alone.
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
            last, before = _last_words(ids[start:], tokenizer)
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


def _why_same(sides: list[_Answer], max_length: int | None) -> str:
    """The reason to drop a pair whose sides no token tells apart, or "" where one does."""
    chosen, rejected = sides
    if chosen.until(max_length) != rejected.until(max_length):
        return ""
    return "same_tokens" if chosen.until(None) == rejected.until(None) else "same_after_cut"


def _key(*lists: list[int] | list[bool]) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for values in lists:
        digest.update(len(values).to_bytes(8, "big") + np.array(values, np.int32).tobytes())
    return int.from_bytes(digest.digest(), "big", signed=True)


def _special(tokenizer) -> _Special:
    eos, added = tokenizer.eos_token, tokenizer.added_tokens_decoder
    # an answer may end with an added token other than eos_token, as <|im_end|> or <end_of_turn>
    others = {tokenizer.bos_token, tokenizer.unk_token} - {eos}
    ends = {number for number, token in added.items() if token.content.strip() and token.content not in others}
    # an eos_token that the tokenizer does not have gets the unknown token's id
    if eos is not None and tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == eos:
        ends.add(tokenizer.eos_token_id)
    # GPT-2's unk_token is its eos_token, which says nothing where it stands
    is_shared = tokenizer.unk_token in (eos, tokenizer.bos_token, tokenizer.pad_token)
    texts = {}
    for text in sorted({eos or "", *(token.content for token in added.values())}, key=len, reverse=True):
        if text.strip():
            texts.setdefault(len(text), set()).add(text)
    return _Special(tokenizer.bos_token_id, ends, None if is_shared else tokenizer.unk_token_id, texts)


def _last_words(ids: list[int], tokenizer) -> tuple[int | None, int | None]:
    """The last token that is more than white space, which a template may write after the end of a turn, and the one
    before it.
    """
    words = (token for token in reversed(ids) if tokenizer.decode([token]).strip(WHITE))
    last, before = [*islice(words, 2), None, None][:2]
    return last, before


def _no_end_cause(tokenizer, is_text: bool) -> str:
    if not is_text:
        return ". The chat template writes none after an answer: use one that does"
    if tokenizer.eos_token is None:
        return ". The tokenizer has no eos_token: set it, or end the texts with the model's own token"
    return (
        f". The tokenizer does not read its eos_token {tokenizer.eos_token} as a token (with split_special_tokens it "
        "is read as text)"
    )


def _encoded_texts(batch: dict, answers: list[str], tokenizer) -> Iterator[tuple[list[int], list[_Answer]]]:
    """The prompt's tokens, and each answer's with it, of every record."""
    adds_end = _adds_end(tokenizer)
    prompts = tokenizer(batch["prompt"])["input_ids"]
    if adds_end:
        prompts = [ids[:-1] for ids in prompts]
    texts = [
        [_joined(*pair, tokenizer, adds_end) for pair in zip(batch["prompt"], batch[answer], strict=True)]
        for answer in answers
    ]
    wholes = zip(*(tokenizer(text)["input_ids"] for text in texts), strict=True)
    for prompt, sides in zip(prompts, wholes, strict=True):
        yield prompt, [_Answer(ids, None, set(), None) for ids in sides]


def _encoded_conversations(
    batch: dict, answers: list[str], rows: list[int], tokenizer, special: _Special, render: Renderer
) -> Iterator[tuple[list[int], list[_Answer]]]:
    """The tokens of the prompt and what asks for an answer, and each answer's with the prompt, of every record."""
    prompts = batch["prompt"]
    asked = [one.text for one in render.all(rows, prompts, add_generation_prompt=True)]
    asked_ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    sides = []
    for answer in answers:
        texts = [one.text for one in render.all(rows, list(map(list.__add__, prompts, batch[answer])))]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        records = zip(rows, prompts, batch[answer], asked, texts, ids, strict=True)
        sides.append([_conversation_answer(*record, tokenizer, special, render) for record in records])
    yield from zip(asked_ids, map(list, zip(*sides, strict=True)), strict=True)


def _conversation_answer(
    row: int,
    prompt: list[dict[str, str]],
    answer: list[dict[str, str]],
    asked: str,
    text: str,
    ids: list[int],
    tokenizer,
    special: _Special,
    render: Renderer,
) -> _Answer:
    """``asked`` and ``text`` are the rendered prompt and conversation, ``ids`` the tokens of ``text``."""
    roles = [message["role"] for message in answer]
    if not set(roles) & set(ASSISTANT):
        raise DataError(
            f"{render.name} data, row {row}: the answer has messages of the roles {sorted(set(roles))}, expected one "
            "of role 'assistant'"
        )
    found = set()
    if any(message["content"].strip() not in text for message in answer):
        found.add("changed")
    if len(answer) == 1:
        spans, trained = [(_common_prefix(asked, (text,)), len(text))], None
    else:
        spans = _assistant_spans(row, prompt, answer, text, tokenizer, render)
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
        before, after, ends_here = _written_around(text[start:end], content, special.texts)
        has_end &= ends_here
        if before.strip() or after.strip():
            found.add("added")
    return _Answer(ids, trained, found, has_end)


def _written_around(text: str, content: str, special: dict[int, set[str]]) -> tuple[str, str, bool]:
    """What a template wrote before and after an answer, without special tokens and white space after it, and whether
    there is such a token. Of an answer that it changed, nothing is told.
    """
    content, body, has_end = content.strip(), text.rstrip(), False
    while not body.endswith(content):
        # by length: some tokenizers have thousands of such tokens
        token = next((body[-length:] for length, tokens in special.items() if body[-length:] in tokens), None)
        if token is None:
            break
        body, has_end = body.removesuffix(token).rstrip(), True
    if not content or content not in body:
        return "", "", True
    before, _, after = body.rpartition(content)
    return before, after, has_end


def _assistant_spans(
    row: int, prompt: list, answer: list, text: str, tokenizer, render: Renderer
) -> list[tuple[int, int]]:
    """Where the assistant's messages of an answer stand in ``text``, the rendered conversation, in characters.

    They are what the template's ``{% generation %}`` blocks hold. In a template without such blocks a message starts
    after what the template writes to ask for it, and ends with what the template writes after it: found by comparing
    ``text`` with renderings of its first messages.
    """
    where = f"{render.name} data, row {row}: the answer has several messages, of which only the assistant's are trained"
    instead = "give each answer as one message, with what came before it in the prompt"
    if not tokenizer.is_fast:
        raise DataError(f"{where}, and finding their tokens needs a tokenizer with a Rust backend: {instead}")
    if GENERATION.search(tokenizer.get_chat_template()):
        if spans := render(row, prompt + answer, find_generated=True).generated:
            return spans
        raise DataError(f"{where}, but the chat template's {{% generation %}} blocks hold none of its text: {instead}")
    spans = []
    for number, message in enumerate(answer):
        if message["role"] not in ASSISTANT:
            continue
        before = prompt + answer[:number]
        is_found = number == 0 or text.startswith(render(row, before).text)
        start = _common_prefix(render(row, before, add_generation_prompt=True).text, (text,))
        until = render(row, [*before, message]).text
        end = len(until)
        if not text.startswith(until):
            # the template writes a last message otherwise, with an empty thought: look for the rest of it
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


def _adds_end(tokenizer) -> bool:
    """Whether the tokenizer itself ends a text with its end-of-text token."""
    # of an empty text that may be the token that begins all, of a word the one for unknown words: not of both
    return tokenizer.eos_token is not None and all(
        tokenizer(text)["input_ids"][-1:] == [tokenizer.eos_token_id] for text in ("", "a")
    )


def _joined(prompt: str, completion: str, tokenizer, adds_end: bool) -> str:
    end = tokenizer.eos_token or ""
    return prompt + completion.removesuffix(end) + ("" if adds_end else end)


def _check_template(
    tokenizer, render: Renderer, messages: list, prompt: list[int], start: int, row: int, name: str
) -> None:
    """Raises ``DataError`` if more than ``MERGED`` of the messages' tokens lie after ``start``, where answers start.

    What a template adds to a prompt to ask for an answer belongs to no message, and may change once there is one.
    """
    alone = tokenizer(render(row, messages).text, add_special_tokens=False)["input_ids"]
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


def _common_prefix(prompt: list[int] | str, wholes: tuple[list[int] | str, ...]) -> int:
    """How many tokens (characters) at the start of ``prompt`` all ``wholes`` start with."""
    low, high = 0, len(prompt)
    if all(whole[:high] == prompt for whole in wholes):
        return high
    while low < high:  # bisected, because slices compare faster than a loop in Python
        middle = (low + high + 1) // 2
        low, high = (middle, high) if all(whole[:middle] == prompt[:middle] for whole in wholes) else (low, middle - 1)
    return low


def _partner_rows(prompts: list, rows: list[int], *, completions: Dataset, partners: np.ndarray, max_length) -> dict:
    """The partner's completion of each row, and its mask where there is one, cut to what the row's prompt leaves."""
    chosen = partners[rows]
    rooms = [None if max_length is None else max_length - len(prompt) for prompt in prompts]
    partner_rows = completions[chosen[chosen >= 0].tolist()]
    made = {}
    for column, values in partner_rows.items():
        found = iter(values)
        made[f"kl_{column}"] = [
            next(found)[:room] if partner >= 0 else [] for partner, room in zip(chosen, rooms, strict=True)
        ]
    return made
