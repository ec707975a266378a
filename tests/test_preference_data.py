"""Preference data: what is read, what is refused and where it says the fault is, tokens, partners, caches, batches."""

# ruff: noqa: E402 (where datasets is missing, its absence comes before the imports that need it)

import copy
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

datasets = pytest.importorskip("datasets", reason="datasets is not installed: there is no data to prepare")

from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from kto_fused import preference_data
from kto_fused.preference_data import (
    BUNDLED,
    DataError,
    PairedCollator,
    UnpairedCollator,
    fingerprint,
    load,
    mismatched_partners,
    prepare_paired,
    prepare_unpaired,
)

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["<unk>", "</s>", "<user>", "<assistant>", "red", "green", "blue", "one", "two", "three", "four"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def one_token_a_word(vocabulary=tuple(WORDS), **settings) -> PreTrainedTokenizerFast:
    ids = {word: number for number, word in enumerate(vocabulary)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    settings = {"eos_token": "</s>", "pad_token": "</s>", "chat_template": TEMPLATE} | settings
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **settings)


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


@pytest.fixture(scope="module")
def byte_pairs() -> PreTrainedTokenizerFast:
    """As Llama's: merges of bytes, and a token that begins every text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "</s>", "<user>", "<assistant>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(BUNDLED.read_text(encoding="utf-8").split("\n"), trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=TEMPLATE
    )


def conversation(record: dict) -> dict:
    """The same record as a conversation."""
    roles = dict.fromkeys(record, "assistant") | {"prompt": "user"}
    return {
        field: value if field == "label" else [{"role": roles[field], "content": value}]
        for field, value in record.items()
    }


UNPAIRED = [
    {"prompt": "red", "completion": " one two", "label": True},
    {"prompt": "green blue", "completion": " three", "label": False},
    {"prompt": "", "completion": " four", "label": True},
]
PAIRED = [
    {"prompt": "red", "chosen": " one two", "rejected": " three"},
    {"prompt": "green blue", "chosen": " four", "rejected": " one two three"},
]
FORMS = {
    "unpaired": UNPAIRED,
    "paired": PAIRED,
    "unpaired conversations": [conversation(record) for record in UNPAIRED],
    "paired conversations": [conversation(record) for record in PAIRED],
}


def write(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


# reading


@pytest.mark.parametrize("records", FORMS.values(), ids=FORMS)
def test_files_and_datasets_give_the_same_records(tmp_path, records):
    dataset = Dataset.from_list([record | {"source": "forum"} for record in records])
    dataset.to_parquet(tmp_path / "data.parquet")
    lines = write(tmp_path / "data.jsonl", [record | {"source": "forum"} for record in records])
    write(tmp_path / "data.json", records)
    for source in (dataset, lines, str(tmp_path / "data.json"), tmp_path / "data.parquet"):
        loaded = load(source)
        assert loaded.to_list() == records
        assert loaded.features == load(lines).features


def test_several_files_are_read_in_order(tmp_path):
    first = write(tmp_path / "first.jsonl", UNPAIRED[:2])
    Dataset.from_list(UNPAIRED[2:]).to_parquet(tmp_path / "last.parquet")
    assert load([first, tmp_path / "last.parquet"]).to_list() == UNPAIRED


def test_the_bundled_feedback_is_read():
    records = load(BUNDLED)
    assert records.column_names == ["prompt", "completion", "label"]
    assert len(records) == sum(1 for line in BUNDLED.read_text(encoding="utf-8").split("\n") if line)
    assert set(records["label"]) == {True, False}


def test_labels_of_0_and_1_become_bools(tmp_path):
    expected = [True, False, True]
    numbered = [record | {"label": int(record["label"])} for record in UNPAIRED]
    for source in (write(tmp_path / "data.jsonl", numbered), Dataset.from_list(numbered)):
        labels = load(source)["label"][:]
        assert labels == expected
        assert all(type(label) is bool for label in labels)


def test_only_a_line_break_ends_a_line(tmp_path):
    text = "a\u2028b\u2029c\x85d\x0b\x0c\x1c"
    record = {"prompt": text, "completion": text, "label": True}
    line = json.dumps(record, ensure_ascii=False)
    (tmp_path / "data.jsonl").write_bytes(f"\ufeff{line}\r\n\n  \r\n{line}".encode())
    raw = tmp_path / "data.jsonl"
    raw.write_bytes(raw.read_bytes().replace(b"\x0b\x0c", b"\\u000b\\f"))
    assert load(raw).to_list() == [record, record]


def test_rows_of_a_shuffled_dataset_are_looked_at_in_its_order():
    dataset = Dataset.from_list([*UNPAIRED, UNPAIRED[0] | {"completion": ""}]).select([3, 0, 1, 2])
    with pytest.raises(DataError, match=r"^dataset, row 0, field 'completion': expected text"):
        load(dataset)


@pytest.mark.parametrize("field", ["tools", "chat_template_kwargs"])
def test_what_a_template_would_render_too_is_refused(tmp_path, field):
    records = [
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "c", "completion": "d", "label": False, field: {"name": "search"}},
    ]
    path = tmp_path / "feedback.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(preference_data.DataError, match=f"line 2, field '{field}': not supported"):
        preference_data.load(path)
    dataset = Dataset.from_list([records[1], records[0] | {field: None}])
    for chosen, row in ((dataset, 0), (dataset.select([1, 0]), 1), (dataset.select([1, 1, 0]).select([2, 0]), 0)):
        with pytest.raises(preference_data.DataError, match=f"dataset, row {row}, field '{field}': not supported"):
            preference_data.load(chosen)
    assert load(dataset.select([1])).to_list() == records[:1]


def test_a_transform_is_refused_not_left_out():
    dataset = Dataset.from_list(UNPAIRED)
    dataset.set_transform(lambda batch: batch | {"label": [not label for label in batch["label"]]})
    with pytest.raises(DataError, match=r"^dataset: has a transform of its own \(set_transform\)"):
        load(dataset)


@pytest.mark.parametrize("through", ["dataset", "parquet"])
def test_classes_are_labels_only_where_their_names_say_so(tmp_path, through):
    def loaded(names):
        records = [record | {"label": names[record["label"]]} for record in UNPAIRED]
        dataset = Dataset.from_list(records).class_encode_column("label")
        if through == "dataset":
            return load(dataset)
        path = tmp_path / f"{names[0]}.parquet"
        dataset.to_parquet(path)
        return load(path)

    assert loaded(["False", "True"])["label"] == [record["label"] for record in UNPAIRED]
    message = r"field 'label': expected true or false, .* got the classes \['desirable', 'undesirable'\]"
    with pytest.raises(DataError, match=message):  # in the order of their letters: desirable would be 0
        loaded(["undesirable", "desirable"])


@pytest.mark.parametrize("through", ["dataset", "parquet"])
def test_a_label_beside_pairs_is_another_column(tmp_path, through):
    records = [record | {"label": kind} for record, kind in zip(PAIRED, ("math", "chat"), strict=False)]
    dataset = Dataset.from_list(records).class_encode_column("label")
    if through == "parquet":
        dataset.to_parquet(tmp_path / "pairs.parquet")
    again = load(dataset if through == "dataset" else tmp_path / "pairs.parquet")
    assert again.column_names == list(PAIRED[0])


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this version of datasets has no type of its own for JSON")
@pytest.mark.parametrize("through", ["dataset", "parquet"])
@pytest.mark.parametrize("form", ["paired conversations", "unpaired conversations"])
def test_columns_of_json_are_read_as_what_they_hold(tmp_path, form, through):
    plain = Dataset.from_list(FORMS[form])
    text = {name: datasets.Json() for name in plain.column_names if name != "label"}
    dataset = Dataset.from_list(FORMS[form], features=datasets.Features({**plain.features, **text}))
    if through == "parquet":
        dataset.to_parquet(tmp_path / "json.parquet")
    again = load(dataset if through == "dataset" else tmp_path / "json.parquet")
    assert again.to_list() == load(plain).to_list()


def test_types_that_datasets_has_no_name_for_are_said_with_their_file(tmp_path):
    columns = {name: [record[name] for record in UNPAIRED] for name in UNPAIRED[0] if name != "prompt"}
    maps = pa.array(
        [[[("role", "user"), ("content", "q")]]] * len(UNPAIRED), pa.list_(pa.map_(pa.string(), pa.string()))
    )
    pq.write_table(pa.table({"prompt": maps, **columns}), tmp_path / "maps.parquet")
    with pytest.raises(DataError, match=r"maps.parquet: cannot be read: .*map"):
        load(tmp_path / "maps.parquet")


def test_null_columns_of_messages_are_dropped():
    records = FORMS["unpaired conversations"]
    wider = [record | {"prompt": [{**m, "tool_calls": None} for m in record["prompt"]]} for record in records]
    assert load(Dataset.from_list(wider)).to_list() == records


BAD_RECORDS = {
    "missing": ({"prompt": "a", "completion": "b"}, "field 'label': missing"),
    "half a pair": ({"prompt": "a", "chosen": "b"}, "field 'rejected': missing"),
    "no prompt": ({"completion": "b", "label": True}, "field 'prompt': missing"),
    "number": ({"prompt": 7, "completion": "b", "label": True}, "field 'prompt': expected a string, got int 7"),
    "null": ({"prompt": "a", "completion": None, "label": True}, "field 'completion': expected a string, got NoneType"),
    "empty": ({"prompt": "a", "completion": "", "label": True}, "field 'completion': expected text, got an empty"),
    "word": ({"prompt": "a", "completion": "b", "label": "yes"}, "field 'label': expected true, .* got str 'yes'"),
    "two": ({"prompt": "a", "completion": "b", "label": 2}, "field 'label': expected true, .* got int 2"),
    "real": ({"prompt": "a", "completion": "b", "label": 1.0}, "field 'label': expected true, .* got float 1.0"),
    "paired": (PAIRED[0], "holds paired texts, expected unpaired texts"),
    "conversation": (conversation(UNPAIRED[0]), "holds unpaired conversations, expected unpaired texts"),
    "mixed": (UNPAIRED[0] | {"completion": [{"role": "user", "content": "b"}]}, "field 'completion': expected a str"),
    "both": (UNPAIRED[0] | PAIRED[0], "got both"),
    "list": ([1, 2], r"expected prompt.* got list \[1, 2\]"),
    "surrogate": ({"prompt": "a", "completion": "b\ud800", "label": True}, "field 'completion': .* half a surrogate"),
}


@pytest.mark.parametrize(("record", "message"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_line_is_named(tmp_path, record, message):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(UNPAIRED[0])}\n\n{json.dumps(record)}\n{json.dumps(UNPAIRED[1])}\n")
    for _ in range(2):  # the first time leaves nothing behind that the second would find
        with pytest.raises(DataError, match=message) as caught:
            load(path)
        assert str(caught.value).startswith(f"{path}, line 3")
    assert not list(tmp_path.rglob("*.arrow"))


BAD_MESSAGES = {
    "empty": ([], r"field 'prompt': expected a list of messages, got list \[\]"),
    "text": (["hello"], "field 'prompt', message 0: expected a role and a content, got str 'hello'"),
    "no role": ([{"content": "hello"}], "field 'prompt', message 0: expected a role and a content"),
    "parts": (
        [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text"}]}],
        "field 'prompt', message 1, 'content': expected a string, got list",
    ),
    "tools": (
        [{"role": "user", "content": "a", "tool_calls": [1]}],
        r"message 0: expected a role and a content alone, got \['tool_calls'\] too",
    ),
}


@pytest.mark.parametrize(("prompt", "message"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_a_bad_message_is_named(tmp_path, prompt, message):
    good = conversation(UNPAIRED[0])
    path = write(tmp_path / "data.jsonl", [good, good | {"prompt": prompt}])
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}, line 2, field 'prompt'")


def test_a_conversation_without_a_word_of_completion_is_refused(tmp_path):
    good = conversation(UNPAIRED[0])
    path = write(tmp_path / "data.jsonl", [good, good | {"completion": [{"role": "assistant", "content": ""}]}])
    with pytest.raises(DataError, match=r"line 2, field 'completion': expected text"):
        load(path)
    with pytest.raises(DataError, match=r"line 1, field 'completion': expected a list of messages, got str 'b'"):
        load(write(tmp_path / "data.jsonl", [good | {"completion": "b"}]))


@pytest.mark.parametrize("kind", ["dataset", "parquet"])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"label": [True, None]}, "row 1, field 'label': expected true, false, 1 or 0, got NoneType None"),
        ({"label": [1, 3]}, "row 1, field 'label': expected true, false, 1 or 0, got int 3"),
        ({"completion": ["b", ""]}, "row 1, field 'completion': expected text"),
        ({"completion": [1.5, 2.5]}, "row 0, field 'completion': expected a string, got float 1.5"),
        ({"label": None}, "row 0, field 'label': missing"),
        ({"chosen": ["b", "b"], "rejected": ["b", "b"]}, "row 0: expected .* got both"),
    ],
)
def test_a_bad_row_is_named(tmp_path, kind, changed, message):
    columns = {"prompt": ["a", "a"], "completion": ["b", "b"], "label": [True, False]} | changed
    dataset = Dataset.from_dict({name: values for name, values in columns.items() if values is not None})
    source, name = dataset, "dataset"
    if kind == "parquet":
        dataset.to_parquet(tmp_path / "data.parquet")
        source, name = tmp_path / "data.parquet", tmp_path / "data.parquet"
    with pytest.raises(DataError, match=message) as caught:
        load(source)
    assert str(caught.value).startswith(f"{name}, row")


@pytest.mark.parametrize("role", ["user", "system"])
def test_a_completion_that_repeats_the_prompt_is_refused(role):
    conversations = FORMS["paired conversations"][0]
    whole = [{"role": role, "content": "a"}, *conversations["rejected"]]
    with pytest.raises(DataError, match=f"row 0, field 'rejected': expected the answer alone, .* with the {role}'s"):
        load(Dataset.from_list([conversations | {"rejected": whole}]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "cannot be read: .*No such file"),
        ("data.csv", b"prompt\n", r"expected a \.jsonl, \.json or \.parquet file, got '\.csv'"),
        ("data", b"{}", "got 'no file type'"),
        ("data.jsonl", b"", "holds no records"),
        ("data.jsonl", b"\n \r\n", "holds no records"),
        ("data.jsonl", b"{}\n{", r"line 1, field 'prompt': missing"),
        ("data.json", b"[\n{}]", r"line 1: expected one record in JSON, got bytes b'\[\\n'"),
        ("data.jsonl", b'{"prompt": "\xff"}', "line 1: expected one record in JSON, .*utf-8"),
        ("data.jsonl", b"[" * 100000, "line 1: expected one record in JSON"),
        ("data.parquet", b"PAR1", "cannot be read: .*Parquet"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))


def test_files_of_two_forms_do_not_mix(tmp_path):
    paths = [write(tmp_path / "one.jsonl", UNPAIRED), write(tmp_path / "two.jsonl", PAIRED)]
    with pytest.raises(DataError, match=r"two\.jsonl: holds paired texts, but .*one\.jsonl holds unpaired texts"):
        load(paths)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DatasetDict(train=Dataset.from_list(UNPAIRED)), r"DatasetDict of the splits \['train'\]"),
        (lambda: Dataset.from_list(UNPAIRED).to_iterable_dataset(), "does not stream.* got IterableDataset"),
        (lambda: Dataset.from_list(UNPAIRED).select([]), "holds no records"),
        (lambda: [], r"a list of paths, got list \[\]"),
        (lambda: UNPAIRED, "a list of paths, got list"),
        (lambda: None, "a list of paths, got NoneType None"),
    ],
)
def test_a_source_of_another_kind_is_refused(make, message):
    with pytest.raises(DataError, match=message):
        load(make())


# caches


def test_an_unchanged_file_is_read_once(tmp_path, monkeypatch):
    path = write(tmp_path / "data.jsonl", UNPAIRED)
    load(path)
    write(tmp_path / "same.jsonl", UNPAIRED)
    monkeypatch.setattr(preference_data, "_checked", None)
    assert load(path).to_list() == load(tmp_path / "same.jsonl").to_list() == UNPAIRED


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_edited_file_is_read_again(tmp_path, kind):
    path = tmp_path / f"data.{kind}"

    def save(records):
        write(path, records) if kind == "jsonl" else Dataset.from_list(records).to_parquet(path)

    for records in (UNPAIRED, UNPAIRED[:2], UNPAIRED[::-1]):
        save(records)
        os.utime(path, (1, 1))  # as a copy that keeps the time
        assert load(path).to_list() == records


def test_a_files_name_is_no_pattern(tmp_path):
    Dataset.from_list(UNPAIRED[:2]).to_parquet(tmp_path / "data[1].parquet")
    Dataset.from_list(UNPAIRED[2:]).to_parquet(tmp_path / "data1.parquet")
    assert load(tmp_path / "data[1].parquet").to_list() == UNPAIRED[:2]


def test_other_columns_of_a_table_are_not_read(tmp_path):
    table = pa.table({name: [record[name] for record in UNPAIRED] for name in UNPAIRED[0]})
    table = table.append_column("hash", pa.array([2**64 - 1] * len(UNPAIRED), pa.uint64()))
    table = table.append_column("counts", pa.array([[("a", 1)]] * len(UNPAIRED), pa.map_("str", "int8")))
    pq.write_table(table, tmp_path / "data.parquet")
    assert load(tmp_path / "data.parquet").to_list() == UNPAIRED


def test_an_empty_table_holds_no_records(tmp_path):
    Dataset.from_list(UNPAIRED).select([]).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"data\.parquet: holds no records"):
        load(tmp_path / "data.parquet")


def test_tokens_are_made_once_for_one_file_tokenizer_and_length(tmp_path, monkeypatch, caplog):
    path = write(tmp_path / "data.jsonl", UNPAIRED)
    first = prepare_unpaired(path, one_token_a_word(), max_length=3)
    made = preference_data._token_rows
    monkeypatch.setattr(preference_data, "_token_rows", lambda *_, **__: pytest.fail("not from the cache"))
    monkeypatch.setattr(preference_data, "_partner_rows", lambda *_, **__: pytest.fail("not from the cache"))
    caplog.clear()
    again = prepare_unpaired(path, one_token_a_word(), max_length=3)
    assert again.dataset.to_list() == first.dataset.to_list()
    assert (again.truncated, again.dropped) == (first.truncated, first.dropped) == (2, 0)
    assert "max_length=3" in caplog.text

    calls = []
    monkeypatch.setattr(preference_data, "_partner_rows", lambda prompts, *_, **__: {"kl_completion_ids": prompts})
    monkeypatch.setattr(preference_data, "_token_rows", lambda *a, **k: calls.append(1) or made(*a, **k))
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


def test_the_fingerprint_is_what_decides_the_tokens(tmp_path):
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


def test_the_fingerprint_knows_tokenizers_written_in_python():
    tokenizers = [ByT5Tokenizer(), ByT5Tokenizer(), ByT5Tokenizer(eos_token="<pad>"), ByT5Tokenizer(extra_ids=3)]
    prints = [fingerprint(tokenizer) for tokenizer in tokenizers]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    row = prepare_unpaired(Dataset.from_list(UNPAIRED), tokenizers[0], mismatch=False).dataset[0]
    assert bytes(token - 3 for token in row["completion_ids"][:-1]) == b" one two"


# tokens


def test_unpaired_tokens():
    prepared = prepare_unpaired(Dataset.from_list(UNPAIRED), one_token_a_word(), mismatch=False)
    assert prepared.dataset.to_list() == [
        {"prompt_ids": ids("red"), "completion_ids": ids("one two </s>"), "label": True, "length": 4},
        {"prompt_ids": ids("green blue"), "completion_ids": ids("three </s>"), "label": False, "length": 4},
        {"prompt_ids": [], "completion_ids": ids("four </s>"), "label": True, "length": 2},
    ]
    assert (prepared.truncated, prepared.dropped) == (0, 0)


def test_paired_tokens():
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


def test_a_pair_is_two_examples_of_feedback():
    dataset = prepare_unpaired(Dataset.from_list(PAIRED), one_token_a_word(), mismatch=False).dataset
    found = [(row["prompt_ids"], row["completion_ids"], row["label"]) for row in dataset]
    assert found == [
        (ids("red"), ids("one two </s>"), True),
        (ids("red"), ids("three </s>"), False),
        (ids("green blue"), ids("four </s>"), True),
        (ids("green blue"), ids("one two three </s>"), False),
    ]


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


def test_a_beginning_of_text_that_is_the_end_of_text_too_ends_none(caplog):
    tokenizer = one_token_a_word()
    begins = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = begins  # as OPT's: of an empty text it is the last token
    row = prepare_unpaired(Dataset.from_list(UNPAIRED), tokenizer, mismatch=False).dataset[0]
    assert (row["prompt_ids"], row["completion_ids"]) == (ids("</s> red"), ids("one two </s>"))
    unknown = one_token_a_word(eos_token="<unk>")  # of a word that it does not know it is the last token
    row = prepare_unpaired(Dataset.from_list(UNPAIRED), unknown, mismatch=False).dataset[0]
    assert (row["prompt_ids"], row["completion_ids"]) == (ids("red"), ids("one two <unk>"))


def test_texts_that_nothing_ends_are_said_once(caplog):
    prepare_paired(Dataset.from_list(PAIRED), one_token_a_word(eos_token=None, pad_token="four"))
    (said,) = caplog.records
    assert said.message.startswith("train data: the tokenizer has no eos_token, so nothing ends a completion")
    caplog.clear()
    prepare_paired(Dataset.from_list(FORMS["paired conversations"]), one_token_a_word(eos_token=None))
    assert not caplog.records  # a template ends them


def test_an_end_of_text_that_is_read_as_text_is_said_once(caplog):
    prepare_unpaired(Dataset.from_list(UNPAIRED), one_token_a_word(split_special_tokens=True))
    (said,) = caplog.records
    assert said.message.startswith("train data: the tokenizer does not read its eos_token </s> as a token (with split")
    caplog.clear()
    unknown = one_token_a_word()
    unknown.eos_token = "<end>"  # whose id is that of what is unknown
    prepare_paired(Dataset.from_list(PAIRED), unknown)
    (said,) = caplog.records
    assert said.message.startswith("train data: the tokenizer does not read its eos_token <end> as a token")


def test_texts_that_begin_twice_are_said_once(caplog):
    tokenizer = one_token_a_word(bos_token="one")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="one $0", special_tokens=[("one", tokenizer.convert_tokens_to_ids("one"))]
    )
    prepare_unpaired(Dataset.from_list(UNPAIRED), tokenizer)
    assert not caplog.records
    prepare_unpaired(Dataset.from_list([x | {"prompt": "one " + x["prompt"]} for x in UNPAIRED]), tokenizer)
    (said,) = caplog.records
    assert said.message.startswith("train data: the texts begin with one, and the tokenizer puts another before it")


def with_template(template: str) -> PreTrainedTokenizerFast:
    return one_token_a_word([*WORDS, "<old>", "<think>"], chat_template=template)


# the system's words before the last user's, as in Mistral's, and turns before the last one as "old"
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
        records[0] = record(question)  # which the template renders alike
    row = 1 if system else 0
    with pytest.raises(DataError) as caught:
        prepare(Dataset.from_list(records), with_template(template), name="eval")
    message = str(caught.value)
    assert message.startswith(f"eval data, row {row}: the chat template renders the prompt differently once an answer")
    assert f"{len(moved.split())} tokens before the prompt's end, at {moved!r}" in message
    assert "use another one, or give prompt and completions as text" in message


def test_the_words_that_ask_for_an_answer_may_change(caplog):
    """As those of models that think before an answer, but are not shown what they thought."""
    asking = TEMPLATE.replace("<assistant>{% endif %}", "<assistant> <think> <think> <think> {% endif %}")
    row = prepare_paired(Dataset.from_list(FORMS["paired conversations"]), with_template(asking)).dataset[0]
    assert (row["prompt_ids"], row["chosen_ids"]) == (ids("<user> red </s> <assistant>"), ids("one two </s>"))
    (said,) = caplog.records
    assert "in 2 of 2 examples the prompt's last tokens differ" in said.message


def test_conversations_are_rendered_by_the_chat_template():
    dataset = Dataset.from_list(FORMS["paired conversations"])
    first = prepare_paired(dataset, one_token_a_word()).dataset[0]
    assert first["prompt_ids"] == ids("<user> red </s> <assistant>")
    assert first["chosen_ids"] == ids("one two </s>")
    assert first["rejected_ids"] == ids("three </s>")


@pytest.mark.parametrize("prepare", [prepare_unpaired, prepare_paired])
def test_a_template_that_leaves_out_part_of_an_answer_is_said_once(prepare, caplog):
    """As those do that show a model none of what it thought."""
    forgetting = TEMPLATE.replace("message['content']", "message['content'].split('<think>')[-1]")
    records = copy.deepcopy(FORMS["paired conversations"])
    prepare(Dataset.from_list(records), with_template(forgetting), name="eval")
    assert not [said for said in caplog.records if "leaves out" in said.message]
    records[1]["rejected"][0]["content"] = "two <think> three"
    prepare(Dataset.from_list(records), with_template(forgetting), name="eval")
    (said,) = (said.message for said in caplog.records if "leaves out" in said.message)
    assert said.startswith("eval data: the chat template changes or leaves out text of the answers in 1 of the first 2")
    assert "(row 1 among them)" in said


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


def test_what_is_too_long_is_cut_dropped_counted_and_said_once(caplog):
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


def test_nothing_is_said_of_what_fits(caplog):
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
def test_a_length_that_is_none_is_refused(max_length):
    with pytest.raises((TypeError, ValueError), match=r"max_length must be (at least 1|an int), got"):
        prepare_unpaired(Dataset.from_list(UNPAIRED), one_token_a_word(), max_length=max_length)


def test_what_is_no_tokenizer_is_refused():
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
    (said,) = caplog.records
    assert "in 1 of 2 examples the prompt's last tokens differ" in said.message


def test_processes_share_the_work_and_change_nothing(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"prompt": w, "completion": f" {w}", "label": w == "red"} for w in WORDS])
    rows = [
        prepare_unpaired(source, one_token_a_word(), max_length=4, num_proc=processes).dataset.to_list()
        for source, processes in ((load(path), None), (Dataset.from_list(load(path).to_list()), 2))
    ]
    assert rows[0] == rows[1]


# the same tokens as TRL


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

    def rows(dataset):  # a pair's sides stand in another order
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


# mismatched partners

examples = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=300)


@given(examples=examples, seed=st.integers(0, 3), common=st.floats(0, 1), neighbours=st.sampled_from([1, 2, 5, 64]))
def test_partners_have_other_prompts_and_as_many_as_can_have_one(examples, seed, common, neighbours):
    prompts, lengths = np.array(examples).T
    prompts[: int(common * len(prompts))] = 7  # one prompt for many
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preference_data, "NEIGHBOURS", neighbours)
        partners = mismatched_partners(prompts, lengths, seed)
        assert np.array_equal(partners, mismatched_partners(prompts, lengths, seed))
    matched = partners >= 0
    assert (prompts[partners[matched]] != prompts[matched]).all()
    assert len(set(partners[matched])) == matched.sum()
    most = max(Counter(prompts.tolist()).values())
    assert matched.sum() == len(prompts) - max(0, 2 * most - len(prompts))


def test_partners_are_about_as_long_as_each_other():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 1000, 20000)
    prompts = np.repeat(np.arange(10000), 2)
    partners = mismatched_partners(prompts, lengths)
    apart = np.abs(lengths[partners] - lengths)
    assert apart.max() < 25  # drawn at random they would be 333 apart on average


@pytest.mark.parametrize("length", ["shortest", "any"])
def test_one_prompt_in_half_of_all_examples_still_finds_partners(length):
    lengths = np.arange(2001) if length == "shortest" else np.random.default_rng(0).integers(1, 100, 2001)
    prompts = np.where(np.arange(2001) < 1000, -1, np.arange(2001))
    partners = mismatched_partners(prompts, lengths)
    assert sorted(partners) == list(range(2001))
    assert (prompts[partners] != prompts).all()


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
    # th|e merges and th|at does not: the prompts' tokens that remain differ, the prompt does not
    records = [
        {"prompt": "What is th", "completion": "e answer", "label": True},
        {"prompt": "What is th", "completion": "5", "label": False},
    ]
    dataset = prepare_unpaired(Dataset.from_list(records), byte_pairs).dataset
    assert dataset[0]["prompt_ids"] != dataset[1]["prompt_ids"]
    assert dataset["kl_completion_ids"][:] == [[], []]


# batches


def test_unpaired_batch():
    examples = [
        {"prompt_ids": [5, 6], "completion_ids": [7], "kl_completion_ids": [8, 9], "label": True, "length": 3},
        {"prompt_ids": [4], "completion_ids": [3, 2, 1], "kl_completion_ids": [], "label": False, "length": 4},
    ]
    batch = UnpairedCollator(pad_token_id=0)(examples)
    expected = {
        "input_ids": [[5, 6, 7, 0], [4, 3, 2, 1]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
        "labels": [[-100, -100, 7, -100], [-100, 3, 2, 1]],
        "kl_input_ids": [[5, 6, 8, 9], [4, 0, 0, 0]],
        "kl_attention_mask": [[1, 1, 1, 1], [1, 0, 0, 0]],
        "kl_labels": [[-100, -100, 8, 9], [-100, -100, -100, -100]],
        "desirable": [True, False],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert batch.pop("desirable").dtype == torch.bool
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_unpaired_batch_with_reference_and_without_mismatched():
    example = {"prompt_ids": [5], "completion_ids": [7], "label": 1, "ref_logps": -1.5, "ref_kl_logps": -2.0}
    batch = UnpairedCollator(pad_token_id=3, pad_to_multiple_of=8)([example, example])
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "desirable", "ref_logps", "ref_kl_logps"}
    assert batch["input_ids"].tolist() == [[5, 7] + [3] * 6] * 2
    assert batch["desirable"].tolist() == [True, True]
    for name, value in (("ref_logps", -1.5), ("ref_kl_logps", -2.0)):
        assert batch[name].dtype == torch.float64
        assert batch[name].tolist() == [value, value]


def test_paired_batch():
    examples = [
        {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9], "length": 4},
        {"prompt_ids": [4], "chosen_ids": [3], "rejected_ids": [2], "length": 2},
    ]
    batch = PairedCollator(pad_token_id=0)(examples)
    expected = {
        "input_ids": [[[5, 6, 7, 0], [5, 6, 8, 9]], [[4, 3, 0, 0], [4, 2, 0, 0]]],
        "attention_mask": [[[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 1, 0, 0], [1, 1, 0, 0]]],
        "labels": [[[-100, -100, 7, -100], [-100, -100, 8, 9]], [[-100, 3, -100, -100], [-100, 2, -100, -100]]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    logps = [{"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}, {"ref_chosen_logps": 0, "ref_rejected_logps": -4}]
    batch = PairedCollator(0, pad_to_multiple_of=3)(
        [example | more for example, more in zip(examples, logps, strict=True)]
    )
    assert batch["input_ids"].shape == (2, 2, 6)
    assert batch["ref_logps"].tolist() == [[-1, -2], [0, -4]]
    assert batch["ref_logps"].dtype == torch.float64


@pytest.mark.parametrize("collator", [UnpairedCollator, PairedCollator])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pad_token_id": None}, "pad_token_id must be an int, got NoneType"),
        ({"pad_token_id": -1}, "pad_token_id must be at least 0, got -1"),
        ({"pad_token_id": 0, "pad_to_multiple_of": 0}, "pad_to_multiple_of must be at least 1, got 0"),
        ({"pad_token_id": 0, "pad_to_multiple_of": True}, "pad_to_multiple_of must be an int, got bool"),
    ],
)
def test_a_padding_that_is_none_is_refused(collator, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        collator(**arguments)


def test_the_bundled_feedback_fills_batches(byte_pairs):
    dataset = prepare_unpaired(BUNDLED, byte_pairs).dataset
    batch = UnpairedCollator(byte_pairs.pad_token_id)([dataset[row] for row in range(8)])
    assert batch["input_ids"].shape == (8, max(dataset["length"][:8]))
    for prefix in ("", "kl_"):
        scored = batch[f"{prefix}labels"] != -100
        assert scored.any(dim=1).all()
        assert torch.equal(batch[f"{prefix}labels"][scored], batch[f"{prefix}input_ids"][scored])
    record = load(BUNDLED)[0]
    whole = byte_pairs(record["prompt"] + record["completion"] + "</s>")["input_ids"]
    assert batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist() == whole


def test_it_needs_neither_trl_nor_peft():
    code = "import sys; sys.modules['trl'] = sys.modules['peft'] = None; import kto_fused.preference_data"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
