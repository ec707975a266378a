"""Records to token ids: prompt and completion as the tokenizer or its chat template writes them."""

import hashlib
import json
import logging
from functools import partial
from itertools import chain, zip_longest
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from .. import checks
from . import cache
from .partners import mismatched_partners
from .records import PAIRED, UNPAIRED, DataError, Source, _digest, load

logger = logging.getLogger(__name__)

RENDERED_TO_CHECK = 100  # conversations, of which a template might leave out a part
# tokens of a prompt's messages that may change once an answer follows: one or two where a tokenizer merges across the
# border; a chat template that renders a message otherwise changes its words and what stands around them
MERGED = 2
TOKENS = List(Value("int32"))


class Prepared(NamedTuple):
    """Tokenized examples, how many had a completion cut at ``max_length``, and how many had no completion left."""

    dataset: Dataset
    truncated: int
    dropped: int


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

    Raises:
        DataError: bad data, a missing chat template, no example left, or none of a label that is needed.
        TypeError, ValueError: ``max_length`` is not an integer of at least 1, or None; the tokenizer is none.
    """
    tokens, truncated, dropped = _tokenized(source, tokenizer, UNPAIRED, max_length, num_proc, name)
    labels, prompts = (tokens.data.column(column).to_numpy() for column in ("label", "prompt_key"))
    for label, kind in ((True, "desirable"), (False, "undesirable")):
        if needs_both_labels and label not in labels:
            raise DataError(f"{name} data: expected desirable and undesirable examples, got no {kind} one")
    tokens = tokens.remove_columns("prompt_key")
    if not mismatch:
        return Prepared(tokens, truncated, dropped)
    completions = tokens.select_columns("completion_ids")
    lengths = pc.list_value_length(completions.data.column("completion_ids")).to_numpy()
    partners = mismatched_partners(prompts, lengths, seed)
    if alone := int((partners < 0).sum()):
        logger.warning(
            f"{name} data: {alone} of {len(tokens)} examples have no mismatched completion, "
            "because more than half of all examples share one prompt."
        )
    tokens = cache.mapped(
        tokens,
        partial(_partner_rows, completions=completions, partners=partners, max_length=max_length),
        batched=True,
        with_indices=True,
        input_columns=["prompt_ids"],
        features=Features({**tokens.features, "kl_completion_ids": TOKENS}),
        num_proc=num_proc,
        desc=f"Mismatching {name} data",
        key=_digest("mismatch", tokens._fingerprint, seed, max_length),
    )
    return Prepared(tokens, truncated, dropped)


def prepare_paired(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    num_proc: int | None = None,
    name: str = "train",
) -> Prepared:
    """Tokens for DPO. Arguments as in :func:`prepare_unpaired`; a pair with one completion cut counts as truncated.

    Returns:
        A dataset of ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and ``length`` (tokens of the longer side).

    Raises:
        DataError: bad data, unpaired data, a missing chat template, or no pair left.
    """
    tokens, truncated, dropped = _tokenized(source, tokenizer, PAIRED, max_length, num_proc, name)
    return Prepared(tokens.remove_columns("prompt_key"), truncated, dropped)


def _tokenized(source, tokenizer, fields: tuple[str, ...], max_length, num_proc, name: str) -> Prepared:
    """The tokens of ``fields``, cached under all that decides them; ``prompt_key`` is equal for equal prompts."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
    if max_length is not None:
        checks.integer("max_length", max_length, at_least=1)
    records = load(source)
    if fields == PAIRED and "chosen" not in records.column_names:
        raise DataError(f"{name} data: DPO needs pairs, expected {list(PAIRED)}, got {records.column_names}")
    if records.features["prompt"] == Value("string"):
        _warn_of_ends(tokenizer, records[0]["prompt"], name)
    elif tokenizer.chat_template:
        _warn_of_lost_answers(tokenizer, records.select(range(min(len(records), RENDERED_TO_CHECK))), name)
    else:
        raise DataError(f"{name} data: holds conversations, but the tokenizer has no chat template to render them with")
    columns = {f"{field}_ids": TOKENS for field in fields if field != "label"}
    columns |= {"label": Value("bool")} if "label" in fields else {}
    columns |= {"length": Value("int32"), "prompt_key": Value("int64")}
    columns |= {"truncated": Value("bool"), "merged": Value("bool")}
    tokens = cache.mapped(
        records,
        partial(_token_rows, columns=list(columns), tokenizer=tokenizer, max_length=max_length, name=name),
        batched=True,
        with_indices=True,
        remove_columns=records.column_names,
        features=Features(columns),
        num_proc=num_proc,
        desc=f"Tokenizing {name} data",
        key=_digest("tokens", fields, records._fingerprint, fingerprint(tokenizer), max_length),
    )
    total = len(records) * (2 if "label" in fields and "chosen" in records.column_names else 1)
    if len(tokens) == 0:
        raise DataError(f"{name} data: no prompt of {total} examples leaves room in max_length={max_length}")
    # counted from columns, because a second call finds the rows in the cache and tokenizes nothing
    truncated, merged = (int(tokens.data.column(column).to_numpy().sum()) for column in ("truncated", "merged"))
    dropped = total - len(tokens)
    if truncated or dropped:
        logger.warning(
            f"{name} data, max_length={max_length}: of {total} examples, {truncated} had a completion cut "
            f"and {dropped} were dropped, with no room for a completion token."
        )
    if merged:
        logger.warning(
            f"{name} data: in {merged} of {len(tokens)} examples the prompt's last tokens differ once a completion "
            "follows; the completion then starts at the first that does, and is trained with what it holds of the "
            "prompt."
        )
    return Prepared(tokens.remove_columns(["truncated", "merged"]), truncated, dropped)


def _token_rows(batch: dict, rows: list[int], *, columns: list[str], tokenizer, max_length, name: str) -> dict:
    """The columns of a batch of records: a completion starts where it leaves the tokens of the prompt alone."""
    if "label" in columns and "chosen" in batch:
        batch = {
            "prompt": [prompt for prompt in batch["prompt"] for _ in range(2)],
            "completion": list(chain.from_iterable(zip(batch["chosen"], batch["rejected"], strict=True))),
            "label": [True, False] * len(rows),
        }
        rows = [row for row in rows for _ in range(2)]
    sides = [field for field in batch if field not in ("prompt", "label")]
    is_text = isinstance(batch["prompt"][0], str)
    adds_end = is_text and _adds_end(tokenizer)
    prompts = _ids(tokenizer, batch["prompt"], rows, name, add_generation_prompt=True)
    if adds_end:
        prompts = [ids[:-1] for ids in prompts]
    texts = [
        [_joined(*pair, tokenizer, adds_end) for pair in zip(batch["prompt"], batch[side], strict=True)]
        for side in sides
    ]
    wholes = zip(*(_ids(tokenizer, text, rows, name) for text in texts), strict=True)
    labels = batch.get("label", [None] * len(rows))
    made = {column: [] for column in columns}
    for number, messages, prompt, whole, label in zip(rows, batch["prompt"], prompts, wholes, labels, strict=True):
        start = _common_prefix(prompt, whole)
        completions = [ids[start:max_length] for ids in whole]
        if not all(completions):
            continue
        if start < len(prompt) and not is_text:
            _check_template(tokenizer, messages, prompt, start, number, name)
        length = start + max(map(len, completions))
        key = hashlib.blake2b(np.array(prompt, np.int32).tobytes(), digest_size=8).digest()
        row = {"prompt_ids": prompt[:start], "label": label, "length": length}
        row |= {f"{side}_ids": ids for side, ids in zip(sides, completions, strict=True)}
        row |= {"truncated": max(map(len, whole)) > length, "merged": start < len(prompt)}
        row |= {"prompt_key": int.from_bytes(key, "big", signed=True)}
        for column in columns:
            made[column].append(row[column])
    return made


def _warn_of_ends(tokenizer, text: str, name: str) -> None:
    """Of texts that nothing ends, or that begin twice, as ``text`` does."""
    end, begin = tokenizer.eos_token, tokenizer.bos_token
    if end is None:
        logger.warning(
            f"{name} data: the tokenizer has no eos_token, so nothing ends a completion, and the model does not learn "
            "to end one: set it, or end the texts with the model's own token."
        )
    elif end not in tokenizer.convert_ids_to_tokens(tokenizer(f"a{end}")["input_ids"]):
        logger.warning(
            f"{name} data: the tokenizer does not read its eos_token {end} as a token (with split_special_tokens as "
            "text), so nothing ends a completion, and the model does not learn to end one."
        )
    begins = begin is not None and text.startswith(begin)
    if begins and tokenizer(text)["input_ids"][:2] == 2 * [tokenizer.bos_token_id]:
        logger.warning(
            f"{name} data: the texts begin with {begin}, and the tokenizer puts another before it: take it off the "
            "texts, or give conversations, which the chat template renders."
        )


def _warn_of_lost_answers(tokenizer, records: Dataset, name: str) -> None:
    """A template may leave out a part of an answer, such as what a model thought before it."""
    lost = []
    for row, record in enumerate(records):
        for side in record.keys() - {"prompt", "label"}:
            try:
                text = tokenizer.apply_chat_template(record["prompt"] + record[side], tokenize=False)
            except Exception:  # said with the row that it is of, where tokens are made
                return
            if any(message["content"].strip() not in text for message in record[side]):
                lost.append(row)
    if lost:
        logger.warning(
            f"{name} data: the chat template changes or leaves out text of the answers in {len(set(lost))} of the "
            f"first {len(records)} examples (row {lost[0]} among them), and the model is trained on what is left."
        )


def _adds_end(tokenizer) -> bool:
    """Whether the tokenizer itself ends a text with its end-of-text token."""
    # of an empty text that may be the token that begins all, of a word the one for unknown words: not of both
    return tokenizer.eos_token is not None and all(
        tokenizer(text)["input_ids"][-1:] == [tokenizer.eos_token_id] for text in ("", "a")
    )


def _joined(prompt, completion, tokenizer, adds_end: bool):
    if isinstance(prompt, list):
        return prompt + completion
    end = tokenizer.eos_token or ""
    return prompt + completion.removesuffix(end) + ("" if adds_end else end)


def _ids(tokenizer, texts: list, rows: list[int], name: str, **template) -> list[list[int]]:
    if isinstance(texts[0], str):
        return tokenizer(texts)["input_ids"]
    ids = []
    for row, messages in zip(rows, texts, strict=True):
        try:
            rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **template)
        except Exception as error:  # a template is a program of its own: it may refuse roles, or fail in any way
            raise DataError(f"{name} data, row {row}: the chat template does not render it: {error}") from error
        ids.append(rendered["input_ids"])
    return ids


def _check_template(tokenizer, messages: list, prompt: list[int], start: int, row: int, name: str) -> None:
    """Raises ``DataError`` if more than ``MERGED`` of the messages' tokens lie after ``start``, where answers start.

    What a template adds to a prompt to ask for an answer is no message's, and may be otherwise once there is one.
    """
    (alone,) = _ids(tokenizer, [messages], [row], name)
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


def _common_prefix(prompt: list[int], wholes: tuple[list[int], ...]) -> int:
    if all(ids[: len(prompt)] == prompt for ids in wholes):
        return len(prompt)
    return next(place for place, tokens in enumerate(zip_longest(prompt, *wholes)) if len(set(tokens)) > 1)


def _partner_rows(prompts: list, rows: list[int], *, completions: Dataset, partners: np.ndarray, max_length) -> dict:
    chosen = partners[rows]
    found = iter(completions[chosen[chosen >= 0].tolist()]["completion_ids"])
    rooms = [None if max_length is None else max_length - len(prompt) for prompt in prompts]
    return {
        "kl_completion_ids": [
            next(found)[:room] if partner >= 0 else [] for partner, room in zip(chosen, rooms, strict=True)
        ]
    }
