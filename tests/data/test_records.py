"""Files and datasets of records: what is read, and what is refused by the place where it stands."""

# ruff: noqa: E402 (where datasets is missing, its absence comes before the imports that need it)

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

datasets = pytest.importorskip("datasets", reason="datasets is not installed: there is no data to prepare")

from data_cases import FORMS, PAIRED, UNPAIRED, conversation, write
from datasets import Dataset, DatasetDict

from kto_fused.data import records
from kto_fused.preference_data import (
    BUNDLED,
    DataError,
    load,
)

pytestmark = pytest.mark.usefixtures("own_cache")


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
    with pytest.raises(DataError, match=f"line 2, field '{field}': not supported"):
        load(path)
    dataset = Dataset.from_list([records[1], records[0] | {field: None}])
    for chosen, row in ((dataset, 0), (dataset.select([1, 0]), 1), (dataset.select([1, 1, 0]).select([2, 0]), 0)):
        with pytest.raises(DataError, match=f"dataset, row {row}, field '{field}': not supported"):
            load(chosen)
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
    monkeypatch.setattr(records, "_checked", None)
    assert load(path).to_list() == load(tmp_path / "same.jsonl").to_list() == UNPAIRED


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_edited_file_is_read_again(tmp_path, kind):
    path = tmp_path / f"data.{kind}"

    def save(records):
        write(path, records) if kind == "jsonl" else Dataset.from_list(records).to_parquet(path)

    for chosen in (UNPAIRED, UNPAIRED[:2], UNPAIRED[::-1]):
        save(chosen)
        os.utime(path, (1, 1))  # as a copy that keeps the time
        assert load(path).to_list() == chosen


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
