"""Prepare a dataset of token ids for training: ``prepare_unpaired`` for KTO, ``prepare_paired`` for DPO and reward
models, ``prepare_completions`` for supervised fine-tuning.

All read and check the records (``records``), tokenize them (``token_rows``), drop examples that would teach nothing,
and report what was found in all of them. ``prepare_unpaired`` also gives each example a mismatched completion.

The results of every step are cached. What is reported is counted from columns of the cached rows, so a second run
reports the same.
"""

import json
import logging
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from .. import checks
from . import cache
from .collators import IGNORE_INDEX
from .form import COMPARISONS, DEMONSTRATIONS, MARGIN, NO_TEXTS, PAIRED, PREFERENCES, TOOLS, WEIGHT, DataError, Forms
from .layouts import Reading
from .packing import pack
from .partners import mismatched_partners
from .records import AS_IT_IS, Source, load
from .token_rows import DROPPED, FOUND, no_end_cause, template_tokens_advice, token_rows

logger = logging.getLogger(__name__)

TOKENS, MASK = List(Value("int32")), List(Value("bool"))
# Columns of the tokenized rows that the result does not have: the record's number, and integers that are equal for
# equal prompts and for equal tokens of whole examples.
KEYS = {"prompt_key": Value("int64"), "key": Value("int64"), "row": Value("int64")}
# Columns of the tokenized rows that are counted and reported.
REPORTED = {"dropped": Value("int8"), "truncated": Value("bool"), **dict.fromkeys(FOUND, Value("bool"))}


class Prepared(NamedTuple):
    """Tokenized examples, and counts of what was found while they were made.

    Attributes:
        dataset: the examples that are kept.
        truncated: how many of the examples had a completion cut at ``max_length``.
        dropped: how many further examples are left out.
        dropped_for: the dropped examples by reason: "no_room", "same_after_cut", "same_tokens", "untrained", "single".
        found: the kept examples that a warning was given of, by finding: "merged", "double_bos", "double_end",
            "no_end", "unknown", "changed", "added", "masked", "template_tokens", "system_lost", "ends_masked",
            "both_labels".
        prompts: how many different prompts the kept examples have.

    Reasons and findings without an example are missing.
    """

    dataset: Dataset
    truncated: int
    dropped: int
    dropped_for: dict[str, int]
    found: dict[str, int]
    prompts: int


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash that is equal for tokenizers that turn every text and conversation into the same tokens.

    It is part of the keys of caches of token ids. It does not depend on where a tokenizer was loaded from. For
    tokenizers without a Rust backend it covers all settings.
    """
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        for of_the_last_call in ("padding", "truncation"):
            state.pop(of_the_last_call, None)
    else:
        state = [tokenizer.get_vocab(), tokenizer.init_kwargs]
    split_special = getattr(tokenizer, "split_special_tokens", False)
    kind = type(tokenizer).__name__
    return cache.digest(kind, state, tokenizer.special_tokens_map, split_special, tokenizer.chat_template)


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
    reading: Reading = AS_IT_IS,
) -> Prepared:
    """Prepare tokens for KTO. A pair becomes two examples: its chosen completion is desirable, the rejected one not.

    The mismatched completion, from which KTO estimates z0, belongs to the example and not to its batch. So any sampler,
    batch size and number of processes sees the same mismatched pairs, and the reference's log-probabilities of them can
    be cached.

    Args:
        source: a ``Dataset``, a path or a list of paths; see ``load``.
        tokenizer: ends a plain completion with its end-of-text token. Conversations need its chat template.
        max_length: the most tokens of prompt and completion together, or None. A longer completion is cut at its end.
            An example whose prompt leaves no room for a completion is dropped. Both are counted and reported.
        mismatch: whether to add ``kl_completion_ids``.
        needs_both_labels: whether to refuse data of one label, from which KTO cannot learn. Evaluation may use them.
        seed: for the draw of mismatched partners among completions of similar length.
        num_proc: the number of processes that tokenize.
        name: the data's name in the progress bar and in messages.
        reading: names of columns, words of labels, and whether plain text is put into the chat template; made by
            ``preference_data.reading``.

    Returns:
        A dataset of ``prompt_ids``, ``completion_ids``, ``label`` (bool), ``length`` (tokens of prompt and completion)
        and ``kl_completion_ids``: the completion of another prompt, cut to the room that is left, or empty if there is
        none. If an answer has several messages, there are also ``completion_mask`` and ``kl_completion_mask`` (bool,
        one per token): True for the assistant's tokens, which alone are trained. ``weight`` (float64) is the record's,
        if the records have it; a pair's two examples both have the pair's.

    Raises:
        DataError: the data are bad, a chat template is missing, fails, exceeds a limit of ``Renderer`` or takes no
            tools though a record has some, the
            assistant's tokens of an answer cannot be told from the rest, no example is left, or none has a label that
            is needed.
        TypeError, ValueError: ``max_length`` is neither None nor an integer of at least 1; ``tokenizer`` is not a
            tokenizer of transformers.
    """
    prepared = _tokenized(source, tokenizer, PREFERENCES, ["completion"], max_length, num_proc, name, reading)
    tokens = prepared.dataset
    labels, prompts, keys, rows = (column_of(tokens, column) for column in ("label", "prompt_key", "key", "row"))
    tokens = tokens.remove_columns([*KEYS])
    for label, kind in ((True, "desirable"), (False, "undesirable")):
        if needs_both_labels and label not in labels:
            raise DataError(
                f"{name} data: expected desirable and undesirable examples, got no {kind} one: losses of labels learn "
                "from both, liked answers alone are for supervised fine-tuning (--loss sft)"
            )
    found = dict(prepared.found)
    disputed = np.isin(keys, np.intersect1d(keys[labels], keys[~labels]))
    if disputed.any():
        found["both_labels"] = int(disputed.sum())
        logger.warning(
            f"{name} data: {disputed.sum()} of {len(tokens)} examples (first: row {rows[disputed][0]}) have the tokens "
            "of an example with the other label. They are kept, although their gradients work against each other."
        )
    if mismatch:
        tokens = with_partners(tokens, prompts, max_length, seed, num_proc, name)
    return prepared._replace(dataset=tokens, found=found)


def prepare_paired(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    margins: bool = False,
    num_proc: int | None = None,
    name: str = "train",
    reading: Reading = AS_IT_IS,
) -> Prepared:
    """Prepare tokens for DPO or a reward model. The arguments are those of ``prepare_unpaired``.

    A pair with one completion cut counts as truncated. A pair whose sides have the same tokens, whole or once cut, is
    dropped: its margin would stay 0.

    Args:
        margins: whether the records may have a field ``margin``, a number that says how far apart the scores of the
            pair should be. Otherwise such a field is ignored, with a warning.

    Returns:
        A dataset of ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and ``length`` (tokens of the prompt and the
        longer side). If an answer has several messages, there are also ``chosen_mask`` and ``rejected_mask``, as in
        ``prepare_unpaired``, and ``weight`` or ``margin`` (float64) if the records have them.

    Raises:
        DataError: as in ``prepare_unpaired``, and for unpaired data.
    """
    forms = COMPARISONS if margins else PREFERENCES
    prepared = _tokenized(source, tokenizer, forms, ["chosen", "rejected"], max_length, num_proc, name, reading)
    return prepared._replace(dataset=prepared.dataset.remove_columns([*KEYS]))


def prepare_completions(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    num_proc: int | None = None,
    name: str = "train",
    reading: Reading = AS_IT_IS,
) -> Prepared:
    """Prepare tokens for supervised fine-tuning. The arguments are those of ``prepare_unpaired``.

    A record has ``prompt`` and ``completion``, of which the completion is trained; or ``text``, which is trained as a
    whole; or ``messages``, a conversation in which all of the assistant's messages are trained.

    Returns:
        A dataset of ``prompt_ids``, ``completion_ids`` and ``length``, and ``completion_mask`` and ``weight`` as in
        ``prepare_unpaired``. A text is a completion; its prompt holds no more than a beginning-of-text token.

    Raises:
        DataError: as in ``prepare_unpaired``; a record has a ``label``, which says that completions differ in worth.
    """
    prepared = _tokenized(source, tokenizer, DEMONSTRATIONS, ["completion"], max_length, num_proc, name, reading)
    return prepared._replace(dataset=prepared.dataset.remove_columns([*KEYS]))


def pack_completions(dataset: Dataset, max_length: int, *, num_proc: int | None = None, name: str = "train") -> Dataset:
    """Put several examples of ``prepare_completions`` into one row, as many as ``max_length`` tokens hold.

    No example is split or left out: the longest one goes first, each into the fullest row that has room for it.

    Returns:
        A dataset of ``input_ids`` and ``labels`` (-100 where a token is not trained) of the examples one after the
        other, ``lengths``, their numbers of tokens, and ``length``, the sum of these; ``weights``, if the examples have
        a ``weight``.
    """
    packs = pack(column_of(dataset, "length"), max_length)
    features = {"input_ids": TOKENS, "labels": TOKENS, "lengths": TOKENS, "length": Value("int32")}
    if WEIGHT in dataset.column_names:
        features["weights"] = List(Value("float64"))
    return cache.mapped(
        Dataset.from_dict({"rows": packs}, Features({"rows": List(Value("int64"))})),
        partial(_pack_row, tokens=dataset),
        source=dataset,
        remove_columns=["rows"],
        features=Features(features),
        num_proc=num_proc,
        desc=f"Packing {name} data",
        key=cache.digest("packs", dataset._fingerprint, max_length),
    )


def _tokenized(
    source: Source,
    tokenizer,
    forms: Forms,
    sides: list[str],
    max_length: int | None,
    num_proc: int | None,
    name: str,
    reading: Reading,
) -> Prepared:
    """Return the tokens of ``sides`` with the columns of ``KEYS``, and report what was found in them."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
    if max_length is not None:
        checks.integer("max_length", max_length, at_least=1)
    records = load(source, forms, reading)
    if "chosen" in sides and "chosen" not in records.column_names:
        raise DataError(f"{name} data: DPO needs pairs, expected {list(PAIRED)}, got {records.column_names}")
    is_text = records.features[records.column_names[0]] == Value("string")
    as_chat = _is_put_into_template(records, is_text, tokenizer, reading.chat, name)
    if not is_text and not tokenizer.chat_template:
        raise DataError(f"{name} data: holds conversations, but the tokenizer has no chat template to render them with")
    if TOOLS in records.column_names and is_text and not as_chat and any(column_of(records, TOOLS)):
        raise DataError(
            f"{name} data: has tools, which a chat template writes, but plain text is trained without one: make "
            "conversations of the records, with chat='always' (--chat always) for example"
        )
    answers = [field for field in records.column_names if field not in ("prompt", *NO_TEXTS)]
    has_masks = not is_text and any(column_of(records, answer, pc.list_value_length).max() > 1 for answer in answers)
    columns = {"prompt_ids": TOKENS} | {f"{side}_ids": TOKENS for side in sides}
    columns |= {f"{side}_mask": MASK for side in sides} if has_masks else {}
    columns |= {"label": Value("bool")} if forms == PREFERENCES and sides == ["completion"] else {}
    columns |= {name: Value("float64") for name in records.column_names if name in (WEIGHT, MARGIN)}
    columns |= {"length": Value("int32"), **KEYS, **REPORTED}
    tokens = cache.mapped(
        records,
        partial(
            token_rows,
            sides=sides,
            columns=[*columns],
            tokenizer=tokenizer,
            max_length=max_length,
            name=name,
            as_chat=as_chat,
        ),
        batched=True,
        with_indices=True,
        remove_columns=records.column_names,
        features=Features(columns),
        num_proc=num_proc,
        desc=f"Tokenizing {name} data",
        key=cache.digest("tokens", forms, sides, records._fingerprint, fingerprint(tokenizer), max_length, as_chat),
    )
    prepared = _reported(tokens, tokenizer, is_text and not as_chat, max_length, name)
    is_rendered = 2 * prepared.found.get("template_tokens", 0) > len(prepared.dataset)
    if is_text and reading.chat == "auto" and tokenizer.chat_template and not is_rendered:
        logger.info(
            f"{name} data: holds plain text, which is trained as it is, although the tokenizer has a chat template: "
            "chat='always' (--chat always) puts the prompt into a user's message and the answer into the assistant's, "
            "chat='never' trains the text without this note."
        )
    return prepared


def _is_put_into_template(records: Dataset, is_text: bool, tokenizer, chat: str, name: str) -> bool:
    """Return whether texts become messages, and refuse data that ``chat`` cannot be done with."""
    if chat == "never" and not is_text:
        raise DataError(f"{name} data: holds conversations, which only a chat template renders, but chat is 'never'")
    if chat != "always" or not is_text:
        return False
    if "text" in records.column_names:
        raise DataError(f"{name} data: chat is 'always', but whole texts have no prompt and answer to make messages of")
    if not tokenizer.chat_template:
        raise DataError(f"{name} data: chat is 'always', but the tokenizer has no chat template")
    return True


def _reported(tokens: Dataset, tokenizer, is_text: bool, max_length: int | None, name: str) -> Prepared:
    """Count and log what the columns of ``REPORTED`` say; return the kept rows without these columns."""
    reasons, rows = column_of(tokens, "dropped"), column_of(tokens, "row")
    truncated = int(column_of(tokens, "truncated").sum())
    flags = {finding: column_of(tokens, finding) for finding in FOUND}
    tokens = tokens.remove_columns([*REPORTED])
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
        text = FOUND[finding] + (no_end_cause(tokenizer, is_text) if finding == "no_end" else "")
        text += template_tokens_advice(is_text) if finding == "template_tokens" else ""
        first = rows[flags[finding]][0]
        logger.warning(f"{name} data: in {count} of {len(kept)} examples (first: row {first}) {text}.")
    if dropped_for:
        tokens = tokens.select(kept)
    prompts = len(np.unique(column_of(tokens, "prompt_key")))
    return Prepared(tokens, truncated, sum(dropped_for.values()), dropped_for, found, prompts)


def with_partners(
    tokens: Dataset, prompts: np.ndarray, max_length: int | None, seed: int, num_proc: int | None, name: str
) -> Dataset:
    """Return the rows with their mismatched completions. ``prompts`` are integers, equal for equal prompts."""
    columns = [column for column in ("completion_ids", "completion_mask") if column in tokens.column_names]
    completions = tokens.select_columns(columns)
    partners = mismatched_partners(prompts, column_of(completions, "completion_ids", pc.list_value_length), seed)
    if alone := int((partners < 0).sum()):
        logger.warning(
            f"{name} data: {alone} of {len(tokens)} examples have no mismatched completion, "
            "because more than half of all examples share one prompt."
        )
    added = {f"kl_{column}": tokens.features[column] for column in columns}
    return cache.mapped(
        tokens,
        partial(_partner_rows, completions=completions, partners=partners, max_length=max_length),
        batched=True,
        with_indices=True,
        input_columns=["prompt_ids"],
        features=Features({**tokens.features, **added}),
        num_proc=num_proc,
        desc=f"Mismatching {name} data",
        key=cache.digest("mismatch", tokens._fingerprint, seed, max_length),
    )


def _partner_rows(prompts: list, rows: list[int], *, completions: Dataset, partners: np.ndarray, max_length) -> dict:
    """Return each row's partner's completion, and its mask if there are masks, cut to the room the prompt leaves."""
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


def _pack_row(row: dict, *, tokens: Dataset) -> dict[str, Any]:
    """Return the columns of a pack. An example's first token has no label: nothing predicts it."""
    examples = tokens[row["rows"]]
    ids, labels = [], []
    masks = examples.get("completion_mask") or [[True] * len(completion) for completion in examples["completion_ids"]]
    for prompt, completion, mask in zip(examples["prompt_ids"], examples["completion_ids"], masks, strict=True):
        ids += prompt + completion
        trained = [token if is_trained else IGNORE_INDEX for token, is_trained in zip(completion, mask, strict=True)]
        labels += [IGNORE_INDEX, *([IGNORE_INDEX] * len(prompt) + trained)[1:]]
    weights = {"weights": examples[WEIGHT]} if WEIGHT in examples else {}
    return weights | {"input_ids": ids, "labels": labels, "lengths": examples["length"], "length": len(ids)}


def column_of(dataset: Dataset, column: str, values=lambda array: array) -> np.ndarray:
    """Return ``values`` of a column, in the order of the dataset's rows."""
    parts = dataset.select_columns(column).with_format("arrow").iter(10_000)
    return np.concatenate([values(part[column]).to_numpy() for part in parts])
