"""Records become tokens: ends of text, chat templates, lengths, masks and mismatched completions."""

# ruff: noqa: E402 (the imports below need datasets)

import copy
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

datasets = pytest.importorskip("datasets", reason="datasets is not installed: there is no data to prepare")

import itertools

from data_cases import (
    COMPLETIONS,
    FORMS,
    MESSAGES,
    PAIRED,
    TEMPLATE,
    TEXTS,
    UNPAIRED,
    WITH_MARGINS,
    WORDS,
    conversation,
    ids,
    one_token_a_word,
    write,
)
from datasets import Dataset
from tokenizers import processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from kto_fused.data import tokens
from kto_fused.preference_data import (
    CompletionCollator,
    DataError,
    UnpairedCollator,
    fingerprint,
    load,
    pack_completions,
    prepare_completions,
    prepare_paired,
    prepare_unpaired,
    reading,
)

pytestmark = pytest.mark.usefixtures("own_cache")


def test_tokens_are_made_once_for_one_file_tokenizer_and_length(tmp_path, monkeypatch, caplog):
    path = write(tmp_path / "data.jsonl", UNPAIRED)
    first = prepare_unpaired(path, one_token_a_word(), max_length=3)
    made = tokens.token_rows
    monkeypatch.setattr(tokens, "token_rows", lambda *_, **__: pytest.fail("not from the cache"))
    monkeypatch.setattr(tokens, "_partner_rows", lambda *_, **__: pytest.fail("not from the cache"))
    caplog.clear()
    again = prepare_unpaired(path, one_token_a_word(), max_length=3)
    assert again.dataset.to_list() == first.dataset.to_list()
    assert (again.truncated, again.dropped) == (first.truncated, first.dropped) == (2, 0)
    assert "max_length=3" in caplog.text

    calls = []
    monkeypatch.setattr(tokens, "_partner_rows", lambda prompts, *_, **__: {"kl_completion_ids": prompts})
    monkeypatch.setattr(tokens, "token_rows", lambda *a, **k: calls.append(1) or made(*a, **k))
    for changed in (
        lambda: prepare_unpaired(path, one_token_a_word(), max_length=4),
        lambda: prepare_unpaired(path, one_token_a_word(), max_length=None),
        lambda: prepare_unpaired(path, one_token_a_word([*WORDS, "more"]), max_length=3),
        lambda: prepare_unpaired(path, one_token_a_word(eos_token="four"), max_length=3),
        lambda: prepare_unpaired(path, one_token_a_word(chat_template="{{ messages }}"), max_length=3),
        lambda: prepare_unpaired(write(path, UNPAIRED[:2]), one_token_a_word(), max_length=3),
    ):
        calls.clear()
        changed()
        assert calls == [1]


def test_another_seed_gives_other_partners_and_not_the_cached_ones(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"prompt": w, "completion": f" {w}", "label": w == "red"} for w in WORDS])
    runs = [prepare_unpaired(path, one_token_a_word(), seed=seed).dataset["kl_completion_ids"][:] for seed in (0, 1, 0)]
    assert runs[0] == runs[2] != runs[1]


def test_the_fingerprint_changes_with_everything_that_decides_the_tokens(tmp_path):
    tokenizer = one_token_a_word()
    before = fingerprint(tokenizer)
    tokenizer(["red", "red green"], padding=True, truncation=True, max_length=1)
    assert fingerprint(tokenizer) == before
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    assert fingerprint(PreTrainedTokenizerFast.from_pretrained(tmp_path / "elsewhere")) == before
    others = [
        one_token_a_word([*WORDS[::-1]]),
        one_token_a_word(eos_token="four"),
        one_token_a_word(chat_template=None),
        one_token_a_word(split_special_tokens=True),
    ]
    lowercase = one_token_a_word()
    lowercase.add_tokens(["new"])
    assert len({before, *map(fingerprint, [*others, lowercase])}) == 6


def test_the_fingerprint_tells_tokenizers_without_a_rust_backend_apart():
    tokenizers = [ByT5Tokenizer(), ByT5Tokenizer(), ByT5Tokenizer(eos_token="<pad>"), ByT5Tokenizer(extra_ids=3)]
    prints = [fingerprint(tokenizer) for tokenizer in tokenizers]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    row = prepare_unpaired(Dataset.from_list(UNPAIRED), tokenizers[0], mismatch=False).dataset[0]
    assert bytes(token - 3 for token in row["completion_ids"][:-1]) == b" one two"


# ---- texts ----------------------------------------------------------------------------------------------------------


def test_unpaired_records_become_prompt_and_completion_tokens():
    prepared = prepare_unpaired(Dataset.from_list(UNPAIRED), one_token_a_word(), mismatch=False)
    assert prepared.dataset.to_list() == [
        {"prompt_ids": ids("red"), "completion_ids": ids("one two </s>"), "label": True, "length": 4},
        {"prompt_ids": ids("green blue"), "completion_ids": ids("three </s>"), "label": False, "length": 4},
        {"prompt_ids": [], "completion_ids": ids("four </s>"), "label": True, "length": 2},
    ]
    assert (prepared.truncated, prepared.dropped) == (0, 0)


def test_pairs_become_prompt_chosen_and_rejected_tokens():
    dataset = prepare_paired(Dataset.from_list(PAIRED), one_token_a_word()).dataset
    assert dataset.to_list() == [
        {
            "prompt_ids": ids("red"),
            "chosen_ids": ids("one two </s>"),
            "rejected_ids": ids("three </s>"),
            "length": 4,
        },
        {
            "prompt_ids": ids("green blue"),
            "chosen_ids": ids("four </s>"),
            "rejected_ids": ids("one two three </s>"),
            "length": 6,
        },
    ]


def test_a_pair_gives_two_unpaired_examples():
    dataset = prepare_unpaired(Dataset.from_list(PAIRED), one_token_a_word(), mismatch=False).dataset
    found = [(row["prompt_ids"], row["completion_ids"], row["label"]) for row in dataset]
    assert found == [
        (ids("red"), ids("one two </s>"), True),
        (ids("red"), ids("three </s>"), False),
        (ids("green blue"), ids("four </s>"), True),
        (ids("green blue"), ids("one two three </s>"), False),
    ]


def test_demonstrations_become_prompt_and_completion_tokens(caplog):
    tokenizer = one_token_a_word()
    rows = prepare_completions(Dataset.from_list(COMPLETIONS), tokenizer).dataset
    assert rows[0] == {"prompt_ids": ids("red"), "completion_ids": ids("one two </s>"), "length": 4}
    (texts,) = prepare_completions(Dataset.from_list(TEXTS[:1]), tokenizer).dataset
    assert texts == {"prompt_ids": [], "completion_ids": ids("red one two </s>"), "length": 4}
    assert not caplog.records
    rows = prepare_completions(Dataset.from_list(MESSAGES), tokenizer).dataset
    assert rows["prompt_ids"][:] == [ids(f"<user> {word} </s> <assistant>") for word in ("red", "blue")]
    assert rows[0]["completion_ids"] == ids("one two </s> <user> green </s> <assistant> three </s>")
    assert rows[0]["completion_mask"] == [True] * 3 + [False] * 4 + [True] * 2
    assert rows[1]["completion_mask"] == [True] * 2
    assert "in 1 of 2 examples (first: row 0) an answer has several messages" in caplog.text


def test_a_text_of_one_token_is_dropped_and_counted():
    records = [*TEXTS, {"text": "red"}]
    prepared = prepare_completions(Dataset.from_list(records), one_token_a_word(eos_token=None))
    assert (len(prepared.dataset), prepared.dropped_for) == (2, {"single": 1})


def test_long_demonstrations_are_cut_and_counted():
    prepared = prepare_completions(Dataset.from_list(TEXTS), one_token_a_word(), max_length=3)
    assert (prepared.dataset["completion_ids"][0], prepared.truncated) == (ids("red one two"), 1)
    prepared = prepare_completions(Dataset.from_list(MESSAGES), one_token_a_word(), max_length=8)
    assert prepared.dataset[0]["completion_ids"] == ids("one two </s>")  # the second answer does not fit
    assert prepared.truncated == 1


def test_margins_come_with_their_pairs(tmp_path):
    path = write(tmp_path / "pairs.jsonl", WITH_MARGINS)
    assert prepare_paired(path, one_token_a_word(), margins=True).dataset["margin"][:] == [0.5, 2.0]
    assert "margin" not in prepare_paired(path, one_token_a_word()).dataset.column_names


def test_packs_hold_every_token_once_and_no_more_than_fits(tmp_path, monkeypatch):
    records = [*COMPLETIONS * 3, COMPLETIONS[0] | {"completion": " one two three four"}]
    path = write(tmp_path / "data.jsonl", records)
    alone = prepare_completions(path, one_token_a_word(), max_length=8).dataset
    packed = pack_completions(alone, 8)
    assert max(packed["length"]) == 8
    assert len(packed) == 5  # of 37 tokens, so no fewer would do
    batch = CompletionCollator(pad_token_id=0, pad_to_multiple_of=16)(packed.to_list())
    bounds = batch["cu_seqlens"].tolist()
    found = []
    for start, end in itertools.pairwise(bounds):
        assert batch["position_ids"][0, start:end].tolist() == list(range(end - start))
        if batch["attention_mask"][0, start]:
            found.append((batch["input_ids"][0, start:end].tolist(), batch["labels"][0, start:end].tolist()))
    expected = []
    for row in alone:
        labels = [-100] * len(row["prompt_ids"]) + row["completion_ids"]
        expected.append((row["prompt_ids"] + row["completion_ids"], [-100, *labels[1:]]))
    assert sorted(found) == sorted(expected)
    assert bounds[-1] == 48
    monkeypatch.setattr(tokens, "_pack_row", lambda *_, **__: pytest.fail("not from the cache"))
    again = pack_completions(prepare_completions(path, one_token_a_word(), max_length=8).dataset, 8)
    assert again.to_list() == packed.to_list()


@pytest.mark.parametrize(
    ("completion", "eos", "expected"),
    [(" one", "</s>", "one </s>"), (" one </s>", "</s>", "one </s>"), (" one", None, "one")],
)
def test_a_text_ends_with_one_end_of_text(completion, eos, expected):
    records = [record | {"completion": completion} for record in UNPAIRED]
    tokenizer = one_token_a_word(eos_token=eos)
    dataset = prepare_unpaired(Dataset.from_list(records), tokenizer, mismatch=False).dataset
    assert dataset["completion_ids"][:] == [ids(expected)] * 3


@pytest.mark.parametrize("split_special_tokens", [False, True], ids=["", "split"])
@pytest.mark.parametrize("completion", [" one two", " one two </s>"])
def test_an_end_of_text_that_the_tokenizer_adds_is_the_only_one(completion, split_special_tokens, caplog):
    tokenizer = one_token_a_word(split_special_tokens=split_special_tokens)
    ends = processors.TemplateProcessing(single="<user> $A </s>", special_tokens=[("<user>", 2), ("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = ends
    records = [{"prompt": prompt, "completion": completion, "label": prompt == ""} for prompt in ("", "red")]
    rows = prepare_unpaired(Dataset.from_list(records), tokenizer, mismatch=False).dataset
    assert rows["prompt_ids"][:] == [ids("<user>"), ids("<user> red")]
    assert rows["completion_ids"][:] == [ids("one two </s>")] * 2
    assert not caplog.records


def test_an_end_of_text_token_at_the_beginning_ends_no_text():
    tokenizer = one_token_a_word()
    begins = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = begins  # as OPT's: it is the last token of an empty text
    row = prepare_unpaired(Dataset.from_list(UNPAIRED), tokenizer, mismatch=False).dataset[0]
    assert (row["prompt_ids"], row["completion_ids"]) == (ids("</s> red"), ids("one two </s>"))
    unknown = one_token_a_word(eos_token="<unk>")  # it is the last token of an unknown word
    row = prepare_unpaired(Dataset.from_list(UNPAIRED), unknown, mismatch=False).dataset[0]
    assert (row["prompt_ids"], row["completion_ids"]) == (ids("red"), ids("one two <unk>"))


def test_texts_without_an_end_token_are_reported_once(caplog):
    prepare_paired(Dataset.from_list(PAIRED), one_token_a_word(eos_token=None, pad_token="four"))
    (said,) = caplog.records
    assert said.message.startswith("train data: in 2 of 2 examples (first: row 0) no end-of-text or end-of-turn token")
    assert "The tokenizer has no eos_token: set it" in said.message
    caplog.clear()
    prepare_paired(Dataset.from_list(FORMS["paired conversations"]), one_token_a_word(eos_token=None))
    assert not caplog.records  # the chat template ends them


def test_an_end_of_text_that_is_read_as_text_is_reported_once(caplog):
    split = one_token_a_word(split_special_tokens=True)
    assert prepare_unpaired(Dataset.from_list(UNPAIRED), split).found == {"no_end": 3, "unknown": 3}
    said = next(said for said in caplog.records if "end-of-turn" in said.message)
    assert "The tokenizer does not read its eos_token </s> as a token (with split" in said.message
    caplog.clear()
    unknown = one_token_a_word()
    unknown.eos_token = "<end>"  # it gets the unknown token's id
    assert prepare_paired(Dataset.from_list(PAIRED), unknown).found == {"no_end": 2, "unknown": 2}
    said = next(said for said in caplog.records if "end-of-turn" in said.message)
    assert "The tokenizer does not read its eos_token <end> as a token" in said.message


def test_texts_with_two_beginning_tokens_are_reported_once(caplog):
    tokenizer = one_token_a_word(bos_token="one")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="one $0", special_tokens=[("one", tokenizer.convert_tokens_to_ids("one"))]
    )
    prepare_unpaired(Dataset.from_list(UNPAIRED), tokenizer)
    assert not caplog.records
    records = [record | {"prompt": f"one {record['prompt']}"} if row else record for row, record in enumerate(UNPAIRED)]
    assert prepare_unpaired(Dataset.from_list(records), tokenizer).found == {"double_bos": 2}  # the first row has one
    (said,) = caplog.records
    assert said.message.startswith("train data: in 2 of 3 examples (first: row 1) the tokens begin with two beginning-")


def with_template(template: str) -> PreTrainedTokenizerFast:
    return one_token_a_word([*WORDS, "<old>", "<think>"], chat_template=template)


# One template writes the system message into the last user message, as Mistral's does. The other one calls all turns
# before the last one "old".
LAST_USER = (
    "{% for message in messages if message['role'] != 'system' %}{% if message['role'] == 'user' %}<user> "
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }} {% endif %}"
    "{{ message['content'] }} {% else %}{{ message['content'] }} </s> {% endif %}{% endfor %}"
)
OLD_TURNS = TEMPLATE.replace("<{{ message['role'] }}>", "<{{ message['role'] if loop.last else 'old' }}>")


@pytest.mark.parametrize(
    ("template", "system", "moved"),
    [(LAST_USER, "three four one", "three four one red green"), (OLD_TURNS, None, "<user> red green </s> <assistant>")],
    ids=["system", "old"],
)
@pytest.mark.parametrize("prepare", [prepare_unpaired, prepare_paired])
def test_a_template_that_moves_a_message_into_the_completion_is_refused(prepare, template, system, moved):
    def record(*messages):
        chosen, rejected = ([{"role": "assistant", "content": word}] for word in ("one", "two"))
        return {"prompt": list(messages), "chosen": chosen, "rejected": rejected}

    question = {"role": "user", "content": "red green"}
    records = [record({"role": "system", "content": system}, question) if system else record(question)] * 2
    if system:
        records[0] = record(question)  # the template renders this one alike
    row = 1 if system else 0
    with pytest.raises(DataError) as caught:
        prepare(Dataset.from_list(records), with_template(template), name="eval")
    message = str(caught.value)
    assert message.startswith(f"eval data, row {row}: the chat template renders the prompt differently once an answer")
    assert f"{len(moved.split())} tokens before the prompt's end, at {moved!r}" in message
    assert "use another one, or give prompt and completions as text" in message


def test_the_text_that_asks_for_an_answer_may_change(caplog):
    """Templates of models that think before an answer ask for a thought, and leave it out of a finished answer."""
    asking = TEMPLATE.replace("<assistant>{% endif %}", "<assistant> <think> <think> <think> {% endif %}")
    row = prepare_paired(Dataset.from_list(FORMS["paired conversations"]), with_template(asking)).dataset[0]
    assert (row["prompt_ids"], row["chosen_ids"]) == (ids("<user> red </s> <assistant>"), ids("one two </s>"))
    (said,) = caplog.records
    assert "in 2 of 2 examples (first: row 0) the prompt's last tokens differ" in said.message


def test_conversations_are_rendered_by_the_chat_template():
    dataset = Dataset.from_list(FORMS["paired conversations"])
    first = prepare_paired(dataset, one_token_a_word()).dataset[0]
    assert first["prompt_ids"] == ids("<user> red </s> <assistant>")
    assert first["chosen_ids"] == ids("one two </s>")
    assert first["rejected_ids"] == ids("three </s>")


@pytest.mark.parametrize("prepare", [prepare_unpaired, prepare_paired])
def test_a_template_that_leaves_out_part_of_an_answer_is_reported_once(prepare, caplog):
    """Templates that hide a model's own thoughts do this."""
    forgetting = TEMPLATE.replace("message['content']", "message['content'].split('<think>')[-1]")
    records = copy.deepcopy(FORMS["paired conversations"])
    prepare(Dataset.from_list(records), with_template(forgetting), name="eval")
    assert not [said for said in caplog.records if "leaves out" in said.message]
    records[1]["rejected"][0]["content"] = "two <think> three"
    prepare(Dataset.from_list(records), with_template(forgetting), name="eval")
    (said,) = (said.message for said in caplog.records if "leaves out" in said.message)
    examples = {prepare_unpaired: 4, prepare_paired: 2}[prepare]
    assert said.startswith(f"eval data: in 1 of {examples} examples (first: row 1) the chat template changes or leaves")


def test_conversations_need_a_chat_template():
    dataset = Dataset.from_list(FORMS["paired conversations"])
    for prepare in (prepare_unpaired, prepare_paired):
        with pytest.raises(DataError, match=r"^train data: .* the tokenizer has no chat template"):
            prepare(dataset, one_token_a_word(chat_template=None))


def test_a_conversation_that_the_template_refuses_is_named():
    refusing = TEMPLATE + "{% if messages[0]['content'] == 'green blue' %}{{ raise_exception('no blue') }}{% endif %}"
    dataset = Dataset.from_list(FORMS["paired conversations"])
    with pytest.raises(DataError, match=r"^test data, row 1: the chat template .* no blue"):
        prepare_unpaired(dataset, one_token_a_word(chat_template=refusing), name="test")


def test_long_examples_are_cut_or_dropped_and_reported_once(caplog):
    records = [
        {"prompt": "red", "completion": " one two three four", "label": True},
        {"prompt": "red green", "completion": " one", "label": False},
        {"prompt": "red green blue", "completion": " one", "label": False},
        {"prompt": "red green blue red", "completion": " one", "label": True},
        {"prompt": "red green blue red green", "completion": " one", "label": True},
    ]
    prepared = prepare_unpaired(Dataset.from_list(records), one_token_a_word(), max_length=4, mismatch=False)
    assert prepared.dataset["completion_ids"][:] == [ids("one two three"), ids("one </s>"), ids("one")]
    assert prepared.dataset["length"][:] == [4, 4, 4]
    assert (prepared.truncated, prepared.dropped) == (2, 2)
    (said,) = caplog.records
    assert said.levelno == logging.WARNING
    assert said.message == (
        "train data, max_length=4: of 5 examples, 2 had a completion cut and 2 were dropped, "
        "with no room for a completion token."
    )


def test_pairs_are_cut_and_dropped_whole(caplog):
    records = [
        {"prompt": "red", "chosen": " one two three four", "rejected": " one"},
        {"prompt": "red green blue red", "chosen": " one", "rejected": " two"},
    ]
    prepared = prepare_paired(Dataset.from_list(records), one_token_a_word(), max_length=4)
    (row,) = prepared.dataset
    assert (row["chosen_ids"], row["rejected_ids"], row["length"]) == (ids("one two three"), ids("one </s>"), 4)
    assert (prepared.truncated, prepared.dropped) == (1, 1)
    split = prepare_unpaired(Dataset.from_list(records), one_token_a_word(), max_length=4)
    assert (len(split.dataset), split.truncated, split.dropped) == (2, 1, 2)
    assert "of 4 examples, 1 had a completion cut and 2 were dropped" in caplog.text


def test_nothing_is_reported_of_examples_that_fit(caplog):
    prepared = prepare_unpaired(Dataset.from_list(UNPAIRED), one_token_a_word(), max_length=None)
    assert (len(prepared.dataset), prepared.truncated, prepared.dropped) == (3, 0, 0)
    assert not caplog.records


def test_no_example_left_is_an_error():
    for prepare in (prepare_unpaired, prepare_paired):
        records = Dataset.from_list([{**PAIRED[0], "prompt": "red red red"}] * 2)
        with pytest.raises(DataError, match=r"^eval data: .* max_length=3"):
            prepare(records, one_token_a_word(), max_length=3, name="eval")


@pytest.mark.parametrize(("label", "kind"), [(True, "undesirable"), (False, "desirable")])
def test_feedback_of_one_kind_is_an_error(label, kind):
    records = Dataset.from_list([record | {"label": label} for record in UNPAIRED])
    with pytest.raises(DataError, match=f"^train data: expected desirable and undesirable examples, got no {kind} one"):
        prepare_unpaired(records, one_token_a_word())


def test_feedback_without_pairs_is_refused_for_dpo():
    with pytest.raises(DataError, match=r"DPO needs pairs, expected .*'chosen'.* got .*'completion'"):
        prepare_paired(Dataset.from_list(UNPAIRED), one_token_a_word())


@pytest.mark.parametrize("max_length", [0, -1, 1.5, True, "8"])
def test_a_bad_length_is_refused(max_length):
    with pytest.raises((TypeError, ValueError), match=r"max_length must be (at least 1|an int), got"):
        prepare_unpaired(Dataset.from_list(UNPAIRED), one_token_a_word(), max_length=max_length)


def test_an_object_that_is_no_tokenizer_is_refused():
    with pytest.raises(TypeError, match="tokenizer must be a transformers tokenizer, got str"):
        prepare_unpaired(Dataset.from_list(UNPAIRED), "gpt2")


def test_a_completion_starts_where_the_prompts_tokens_change(byte_pairs, caplog):
    records = [
        {"prompt": "What is th", "completion": "e answer", "label": True},
        {"prompt": "What is", "completion": " the answer", "label": False},
    ]
    dataset = prepare_unpaired(Dataset.from_list(records), byte_pairs, mismatch=False).dataset
    for row, record in zip(dataset, records, strict=True):
        whole = record["prompt"] + record["completion"] + "</s>"
        assert row["prompt_ids"] + row["completion_ids"] == byte_pairs(whole)["input_ids"]
    assert len(dataset[0]["prompt_ids"]) < len(byte_pairs(records[0]["prompt"])["input_ids"])
    assert dataset[1]["prompt_ids"] == byte_pairs(records[1]["prompt"])["input_ids"]
    said = [record.message for record in caplog.records]
    assert "in 1 of 2 examples (first: row 0) the prompt's last tokens differ" in said[0]
    assert "2 of 2 examples (first: row 0) have the tokens of an example with the other label" in said[1]


def test_the_number_of_processes_changes_no_row(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"prompt": w, "completion": f" {w}", "label": w == "red"} for w in WORDS])
    rows = [
        prepare_unpaired(source, one_token_a_word(), max_length=4, num_proc=processes).dataset.to_list()
        for source, processes in ((load(path), None), (Dataset.from_list(load(path).to_list()), 2))
    ]
    assert rows[0] == rows[1]


# ---- reports on all rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_proc", [None, 2])
def test_every_row_is_checked_and_a_run_from_the_cache_reports_the_same(tmp_path, monkeypatch, caplog, num_proc):
    """Only rows 200 to 204 have the fault, so a sample of the first rows would not show it."""
    records = [
        {"prompt": f"red {'green ' * (row % 7)}", "completion": " one two", "label": row % 2 == 0} for row in range(210)
    ]
    for row in range(200, 205):
        records[row] = {"prompt": "blue", "completion": " mauve", "label": True}
    path = write(tmp_path / "data.jsonl", records)
    first = prepare_unpaired(path, one_token_a_word(), num_proc=num_proc, mismatch=False)
    assert first.found["unknown"] == 5
    said = [record.message for record in caplog.records]
    assert any(
        message.startswith("train data: in 5 of 210 examples (first: row 200) the tokenizer") for message in said
    )
    caplog.clear()
    monkeypatch.setattr(tokens, "token_rows", lambda *_, **__: pytest.fail("not from the cache"))
    again = prepare_unpaired(path, one_token_a_word(), num_proc=num_proc, mismatch=False)
    assert again[1:] == first[1:]
    assert [record.message for record in caplog.records] == said


# One template does not end an answer. The other one ends it with a token and a line break.
ENDLESS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TURNS = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(("template", "count"), [(ENDLESS, 2), (TURNS, 0), (TEMPLATE, 0)])
def test_an_answer_that_a_template_does_not_end_is_reported(template, count, caplog):
    tokenizer = with_template(template)
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    prepared = prepare_paired(Dataset.from_list(FORMS["paired conversations"]), tokenizer)
    assert prepared.found.get("no_end", 0) == count
    assert ("The chat template writes none after an answer" in caplog.text) == bool(count)


def test_an_end_token_in_the_answers_own_text_does_not_count_as_the_templates():
    tokenizer = with_template(ENDLESS)
    records = copy.deepcopy(FORMS["paired conversations"])
    records[0]["chosen"][0]["content"] = "one </s>"
    assert prepare_paired(Dataset.from_list(records), tokenizer).found["no_end"] == 2
    cut = prepare_paired(Dataset.from_list(FORMS["paired conversations"]), with_template(TEMPLATE), max_length=5)
    assert (cut.truncated, cut.dropped, cut.found) == (1, 1, {})


def test_an_answer_with_two_end_tokens_is_reported():
    """Its text has an end token, and the template writes another."""
    records = copy.deepcopy(FORMS["paired conversations"])
    records[1]["rejected"][0]["content"] = "one </s>"
    assert prepare_paired(Dataset.from_list(records), one_token_a_word()).found == {"double_end": 1}
    texts = [UNPAIRED[0], UNPAIRED[1] | {"completion": " three </s> </s>"}]
    assert prepare_unpaired(Dataset.from_list(texts), one_token_a_word()).found == {"double_end": 1}


def test_text_that_a_template_adds_to_an_answer_is_reported(caplog):
    """Qwen3's template, for example, writes an empty thought before an answer."""
    thought = "{{ '<think> ' if loop.last and message['role'] == 'assistant' }}"
    thinking = TEMPLATE.replace("{{ message['content'] }}", thought + "{{ message['content'] }}")
    prepared = prepare_paired(Dataset.from_list(FORMS["paired conversations"]), with_template(thinking))
    assert prepared.dataset[0]["chosen_ids"][0] == [*WORDS, "<old>", "<think>"].index("<think>")
    assert prepared.found == {"added": 2}
    assert "in 2 of 2 examples (first: row 0) the chat template adds text to the answer" in caplog.text


# ---- examples that teach nothing ------------------------------------------------------------------------------------


def test_pairs_that_a_cut_makes_equal_are_dropped_and_counted(caplog):
    same = {"prompt": "Q", "chosen": "x" * 60 + "yes", "rejected": "x" * 60 + "no"}
    pairs = [{"prompt": "Q", "chosen": "yes", "rejected": "no"}, same]
    tokenizer = ByT5Tokenizer()
    prepared = prepare_paired(Dataset.from_list(pairs), tokenizer, max_length=32)
    assert [bytes(token - 3 for token in row["chosen_ids"][:-1]) for row in prepared.dataset] == [b"yes"]
    assert prepared[1:] == (0, 1, {"same_after_cut": 1}, {}, 1)
    assert "1 of 2 examples (first: row 1) are dropped, because chosen and rejected have the same tokens" in caplog.text
    as_feedback = prepare_unpaired(Dataset.from_list(pairs), tokenizer, max_length=32)
    assert [row["label"] for row in as_feedback.dataset] == [True, False]
    assert (as_feedback.dropped, as_feedback.dropped_for) == (2, {"same_after_cut": 2})
    for prepare in (prepare_paired, prepare_unpaired):
        with pytest.raises(
            DataError, match=r"^train data: nothing is left of \d examples at max_length=32: \d are dropp"
        ):
            prepare(Dataset.from_list([same] * 2), tokenizer, max_length=32)


@pytest.mark.parametrize("prepare", [prepare_paired, prepare_unpaired])
def test_pairs_whose_difference_gets_no_token_are_dropped(prepare):
    """The pairs differ in unknown words, not at all, or in text that the chat template leaves out."""
    pairs = [*PAIRED, {"prompt": "red", "chosen": " mauve", "rejected": " taupe"}]
    pairs.append({"prompt": "red", "chosen": " one", "rejected": " one"})
    a_pair = {prepare_paired: 1, prepare_unpaired: 2}[prepare]
    prepared = prepare(Dataset.from_list(pairs), one_token_a_word())
    assert (len(prepared.dataset), prepared.dropped_for) == (2 * a_pair, {"same_tokens": 2 * a_pair})
    forgetting = TEMPLATE.replace("message['content']", "message['content'].split('<think>')[-1]")
    conversations = copy.deepcopy(FORMS["paired conversations"])
    for side, thought in (("chosen", "one"), ("rejected", "two")):
        conversations[0][side][0]["content"] = f"{thought} <think> three"
    prepared = prepare(Dataset.from_list(conversations), with_template(forgetting))
    assert prepared.dropped_for == {"same_tokens": a_pair}


def test_feedback_of_both_labels_on_the_same_tokens_is_counted_and_kept(caplog):
    records = [*UNPAIRED, UNPAIRED[1] | {"label": True}]
    prepared = prepare_unpaired(Dataset.from_list(records), one_token_a_word())
    assert (len(prepared.dataset), prepared.dropped, prepared.found) == (4, 0, {"both_labels": 2})
    assert "2 of 4 examples (first: row 1) have the tokens of an example with the other label" in caplog.text


# ---- answers of several messages ------------------------------------------------------------------------------------

TURN_WORDS = [*WORDS, "<tool>", "<think>", "SECRET"]
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant> {% generation %}{{ m.content }} </s> "
    "{% endgeneration %}{% else %}<{{ m.role }}> {{ m.content }} </s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As in Qwen3's template, an empty thought stands before the last answer, and earlier answers have none.
THINKING = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' and loop.last %}<think> {% endif %}"
    "{{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def turns(*messages: str) -> list[dict]:
    """Return messages; "assistant one" has the role assistant and the content one."""
    return [dict(zip(("role", "content"), message.split(maxsplit=1), strict=True)) for message in messages]


def several_messages() -> list[dict]:
    return [
        {
            "prompt": turns("user red"),
            "chosen": turns("assistant one", "user SECRET", "assistant two"),
            "rejected": turns("assistant three"),
        },
        {
            "prompt": turns("user green"),
            "chosen": turns("assistant four", "tool SECRET", "assistant one", "user SECRET"),
            "rejected": turns("assistant two"),
        },
    ]


def trained_words(tokenizer, tokens_, mask) -> str:
    return tokenizer.decode([token for token, is_trained in zip(tokens_, mask, strict=True) if is_trained])


@pytest.mark.parametrize(
    ("template", "thought"),
    [(TEMPLATE, ""), (GENERATION, ""), (THINKING, "<think> ")],
    ids=["prefixes", "blocks", "thinking"],
)
def test_only_the_assistants_messages_of_an_answer_are_trained(template, thought, caplog):
    tokenizer = one_token_a_word(TURN_WORDS, chat_template=template)
    prepared = prepare_paired(Dataset.from_list(several_messages()), tokenizer)
    first, second = prepared.dataset
    assert tokenizer.decode(first["chosen_ids"]) == f"one </s> <user> SECRET </s> <assistant> {thought}two </s>"
    assert trained_words(tokenizer, first["chosen_ids"], first["chosen_mask"]) == f"one </s> {thought}two </s>"
    assert first["rejected_mask"] == [True] * len(first["rejected_ids"])
    # the second answer ends with a user's turn, which is left out
    assert tokenizer.decode(second["chosen_ids"]) == "four </s> <tool> SECRET </s> <assistant> one </s>"
    assert trained_words(tokenizer, second["chosen_ids"], second["chosen_mask"]) == "four </s> one </s>"
    assert first["length"] == len(first["prompt_ids"]) + len(first["chosen_ids"])
    assert {name: prepared.found[name] for name in ("masked", "ends_masked")} == {"masked": 2, "ends_masked": 1}
    assert "no_end" not in prepared.found
    assert "in 2 of 2 examples (first: row 0) an answer has several messages, and only the tokens of the" in caplog.text


@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_training", "llama3", "gemma3", "deepseekv3", "gptoss", "gptoss_training"]
)
def test_models_own_templates_train_no_message_of_the_users(name, byte_pairs):
    """The templates are those in TRL. GPT-OSS's ends only the last answer with <|return|>, so it is refused."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: it brings the templates")
    path = Path(trl.__file__).with_name("chat_templates") / f"{name}.jinja"
    tokenizer = copy.deepcopy(byte_pairs)
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    records = Dataset.from_list(several_messages()[:1])
    if name == "gptoss":
        with pytest.raises(DataError, match=r"^train data, row 0: .* renders message 0 of the answer differently"):
            prepare_paired(records, tokenizer, max_length=None)
        return
    (row,) = prepare_paired(records, tokenizer, max_length=None).dataset
    assert "SECRET" in "".join(tokenizer.convert_ids_to_tokens(row["chosen_ids"]))
    trained = [token if mask else 0 for token, mask in zip(row["chosen_ids"], row["chosen_mask"], strict=True)]
    pieces = "".join(tokenizer.convert_ids_to_tokens(trained)).split("<s>")
    assert "SECRET" not in "".join(pieces)
    assert ["one" in pieces[0], "two" in pieces[-1]] == [True, True]


def test_a_mismatched_completion_has_its_mask():
    tokenizer = one_token_a_word(TURN_WORDS)
    rows = prepare_unpaired(Dataset.from_list(several_messages()), tokenizer, max_length=12).dataset.to_list()
    masks = {tuple(row["completion_ids"]): row["completion_mask"] for row in rows}
    assert len(masks) == 4
    assert any(False in row["kl_completion_mask"] for row in rows)
    for row in rows:
        assert masks[tuple(row["kl_completion_ids"])] == row["kl_completion_mask"]
    batch = UnpairedCollator(pad_token_id=1)(rows)
    secret = TURN_WORDS.index("SECRET")
    for prefix in ("", "kl_"):
        assert (batch[f"{prefix}input_ids"] == secret).any()
        assert not (batch[f"{prefix}labels"] == secret).any()


def test_data_without_answers_of_several_messages_has_no_masks():
    for form in FORMS:
        prepared = prepare_unpaired(Dataset.from_list(FORMS[form]), one_token_a_word())
        assert not [column for column in prepared.dataset.column_names if "mask" in column]


def test_an_answer_with_no_token_of_the_assistants_within_the_length_is_dropped():
    records = several_messages()
    records[0]["chosen"] = turns("tool SECRET SECRET", "assistant two")
    tokenizer = one_token_a_word(TURN_WORDS, chat_template=GENERATION)
    prepared = prepare_paired(Dataset.from_list(records), tokenizer, max_length=7)
    assert prepared.dropped_for == {"untrained": 1}
    assert prepare_paired(Dataset.from_list(records), tokenizer).dropped == 0


def test_pairs_that_differ_after_the_last_message_of_the_assistants_alone_are_dropped():
    records = several_messages()
    records[0] |= {"chosen": turns("assistant one", "user red"), "rejected": turns("assistant one", "user green")}
    assert prepare_paired(Dataset.from_list(records), one_token_a_word(TURN_WORDS)).dropped_for == {"same_tokens": 1}


@pytest.mark.parametrize("prepare", [prepare_paired, prepare_unpaired])
def test_messages_that_cannot_be_told_apart_are_an_error_with_their_row(prepare):
    records = [*FORMS["paired conversations"], *several_messages()]
    numbered = TEMPLATE.replace("</s>", "{{ messages | length if message['role'] == 'assistant' }} </s>")
    with pytest.raises(DataError, match=r"^train data, row 2: the answer has several messages.* renders message 0 of"):
        prepare(Dataset.from_list(records), one_token_a_word(TURN_WORDS, chat_template=numbered))
    empty = GENERATION.replace("{{ m.content }} </s> {% endgeneration %}", "{% endgeneration %}{{ m.content }} </s> ")
    empty = empty.replace("{% generation %}", "{% if false %}{% generation %}") + "{% if false %}{% endif %}"
    empty = empty.replace("{% endgeneration %}", "{% endgeneration %}{% endif %}")
    with pytest.raises(DataError, match=r"^train data, row 2: .* blocks hold none of its text"):
        prepare(Dataset.from_list(records), one_token_a_word(TURN_WORDS, chat_template=empty))
    for role in ("tool", "customer"):
        records[2]["rejected"] = turns(f"{role} one")
        with pytest.raises(DataError, match=rf"^train data, row 2: the answer has messages of the roles \['{role}'\]"):
            prepare(Dataset.from_list(records), one_token_a_word(TURN_WORDS))


# ---- the same tokens as TRL -----------------------------------------------------------------------------------------


def trl_trainer(tokenizer) -> SimpleNamespace:
    return SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0)


TRL_SETTINGS = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
MERGING = {"prompt": "What is th", "chosen": "e answer", "rejected": " question", "completion": "e end", "label": True}


@pytest.mark.parametrize("form", FORMS)
def test_kto_tokens_are_those_of_trl(form, byte_pairs):
    trl = pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with")
    fields = FORMS[form][0].keys()
    extra = {field: value for field, value in MERGING.items() if field in fields}
    records = [*FORMS[form], conversation(extra) if "conversations" in form else extra]
    theirs = trl.KTOTrainer._prepare_dataset(
        trl_trainer(byte_pairs), Dataset.from_list(records), byte_pairs, TRL_SETTINGS, "train"
    )
    ours = prepare_unpaired(Dataset.from_list(records), byte_pairs, mismatch=False).dataset

    def rows(dataset):  # sorted, because TRL orders a pair's sides differently
        return sorted((row["prompt_ids"], row["completion_ids"], row["label"]) for row in dataset)

    assert rows(ours) == rows(theirs)


@pytest.mark.parametrize("form", ["paired", "paired conversations"])
def test_dpo_tokens_are_those_of_trl(form, byte_pairs):
    trl = pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with")
    extra = {field: MERGING[field] for field in PAIRED[0]}
    records = Dataset.from_list([*FORMS[form], conversation(extra) if "conversations" in form else extra])
    theirs = trl.DPOTrainer._prepare_dataset(trl_trainer(byte_pairs), records, byte_pairs, TRL_SETTINGS, "train")
    ours = prepare_paired(records, byte_pairs).dataset
    columns = ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert ours.select_columns(columns).to_list() == theirs.select_columns(columns).to_list()


# ---- mismatched completions -----------------------------------------------------------------------------------------


def test_mismatched_completions_are_those_of_other_prompts_cut_to_what_fits():
    prompts = ["red", "red", "green blue", "blue", "red green blue"]
    completions = [" one", " two one two", " three two one", " four", " blue four three two"]
    records = Dataset.from_dict(
        {"prompt": prompts, "completion": completions, "label": [True, False, True, False, True]}
    )
    rows = prepare_unpaired(records, one_token_a_word(), max_length=5).dataset.to_list()
    givers = []
    for row in rows:
        mismatched, room = row["kl_completion_ids"], 5 - len(row["prompt_ids"])
        (giver,) = (other for other in rows if other["completion_ids"][0] == mismatched[0])
        assert giver["prompt_ids"] != row["prompt_ids"]
        assert mismatched == giver["completion_ids"][:room]
        givers.append(rows.index(giver))
    assert sorted(givers) == [0, 1, 2, 3, 4]


def test_a_mismatched_completion_is_cut_to_what_its_new_prompt_leaves():
    records = [
        {"prompt": "red", "completion": " one two three", "label": True},
        {"prompt": "red green blue", "completion": " four", "label": False},
    ]
    for max_length, cut in ((5, "one two"), (6, "one two three"), (None, "one two three </s>")):
        dataset = prepare_unpaired(Dataset.from_list(records), one_token_a_word(), max_length=max_length).dataset
        assert dataset["kl_completion_ids"][:] == [ids("four </s>"), ids(cut)]


def test_examples_of_one_prompt_have_no_mismatched_completion(caplog):
    records = [record | {"prompt": "red"} for record in UNPAIRED]
    dataset = prepare_unpaired(Dataset.from_list(records), one_token_a_word()).dataset
    assert dataset["kl_completion_ids"][:] == [[], [], []]
    assert "train data: 3 of 3 examples have no mismatched completion" in caplog.text


def test_prompts_that_lose_tokens_to_their_completions_are_still_the_same(byte_pairs):
    # "th" and "e" merge to one token, "th" and "5" do not: the remaining prompt tokens differ, the prompts do not
    records = [
        {"prompt": "What is th", "completion": "e answer", "label": True},
        {"prompt": "What is th", "completion": "5", "label": False},
    ]
    dataset = prepare_unpaired(Dataset.from_list(records), byte_pairs).dataset
    assert dataset[0]["prompt_ids"] != dataset[1]["prompt_ids"]
    assert dataset["kl_completion_ids"][:] == [[], []]


# ---- imports --------------------------------------------------------------------------------------------------------


def test_preference_data_needs_neither_trl_nor_peft():
    code = "import sys; sys.modules['trl'] = sys.modules['peft'] = None; import kto_fused.preference_data"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def chat_tokenizer(template=CHAT):
    tokenizer = one_token_a_word()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def test_plain_text_is_put_into_the_chat_template_only_on_request(caplog):
    caplog.set_level(logging.INFO, "kto_fused")
    tokenizer, source = chat_tokenizer(), Dataset.from_list(UNPAIRED)
    bare = one_token_a_word()
    bare.chat_template = None
    plain = prepare_unpaired(source, bare, mismatch=False).dataset
    assert "plain text" not in caplog.text
    notes = {}
    for chat in ("auto", "never", "always"):
        caplog.clear()
        made = prepare_unpaired(source, tokenizer, mismatch=False, reading=reading(chat=chat)).dataset
        notes[chat] = sum("holds plain text, which is trained as it is" in message for message in caplog.messages)
        as_messages = Dataset.from_list([conversation(record) for record in UNPAIRED])
        expected = prepare_unpaired(as_messages, tokenizer, mismatch=False).dataset if chat == "always" else plain
        assert made.to_list() == expected.to_list()
    assert notes == {"auto": 1, "never": 0, "always": 0}
    with pytest.raises(DataError, match="holds conversations, which only a chat template renders, but chat is 'never'"):
        prepare_unpaired(as_messages, tokenizer, reading=reading(chat="never"))
    with pytest.raises(DataError, match="chat is 'always', but the tokenizer has no chat template"):
        prepare_unpaired(source, bare, reading=reading(chat="always"))
    with pytest.raises(DataError, match="chat is 'always', but whole texts have no prompt"):
        prepare_completions(Dataset.from_list(TEXTS), tokenizer, reading=reading(chat="always"))


def test_tokens_of_the_template_in_texts_and_lost_system_messages_are_found(caplog):
    tokenizer = chat_tokenizer()
    rendered = [record | {"prompt": f"<|im_start|>{record['prompt']}<|im_end|><|im_start|>"} for record in UNPAIRED]
    for records, advice in (
        (rendered, "The text is trained as it is"),
        ([conversation(record) for record in rendered], "which adds them again: take them out"),
    ):
        caplog.clear()
        found = prepare_unpaired(Dataset.from_list(records), tokenizer, mismatch=False).found
        assert found["template_tokens"] == 3
        assert advice in caplog.text
        assert "holds plain text" not in caplog.text
    assert "template_tokens" not in prepare_unpaired(Dataset.from_list(UNPAIRED), tokenizer, mismatch=False).found
    forgetful = chat_tokenizer(CHAT.replace("in messages", "in messages if m.role != 'system'"))
    systems = Dataset.from_list([record | {"system": "three"} for record in UNPAIRED])
    for template, lost in ((tokenizer, 0), (forgetful, 3)):
        assert prepare_unpaired(systems, template, mismatch=False).found.get("system_lost", 0) == lost
