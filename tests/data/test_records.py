"""Files and datasets of records are read, and errors name the file, the line or row, and the field."""

# ruff: noqa: E402 (the imports below need datasets)

import gzip
import json
import os
import time
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

datasets = pytest.importorskip("datasets", reason="datasets is not installed: there is no data to prepare")

from data_cases import (
    COMPLETIONS,
    FORMS,
    MESSAGES,
    PAIRED,
    TEXTS,
    UNPAIRED,
    WITH_MARGINS,
    conversation,
    write,
)
from datasets import Dataset, DatasetDict

from kto_fused.data import files, records
from kto_fused.data import form as form_module
from kto_fused.data.form import COMPARISONS, DEMONSTRATIONS, PREFERENCES
from kto_fused.preference_data import BUNDLED, DataError, load, reading

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


def test_rows_of_a_shuffled_dataset_are_checked_in_its_order():
    dataset = Dataset.from_list([*UNPAIRED, UNPAIRED[0] | {"completion": ""}]).select([3, 0, 1, 2])
    with pytest.raises(DataError, match=r"^dataset, row 0, field 'completion': expected text"):
        load(dataset)


UNSUPPORTED = ["chat_template_kwargs", "image", "images", "audio", "audios", "video", "videos"]


@pytest.mark.parametrize("kind", ["dataset", "jsonl", "parquet"])
@pytest.mark.parametrize("field", UNSUPPORTED)
def test_unsupported_fields_are_refused_unless_they_are_empty(tmp_path, kind, field):
    def source(*held):
        records = [PAIRED[0] | {field: value} for value in held]
        if kind == "jsonl":
            return write(tmp_path / "data.jsonl", records)
        if kind == "dataset":
            return Dataset.from_list(records)
        Dataset.from_list(records).to_parquet(tmp_path / "data.parquet")
        return tmp_path / "data.parquet"

    where = "line 3" if kind == "jsonl" else "row 2"
    for empty, full in ((None, "a.png"), ("", "a.png"), ([], ["a.png"]), (None, {"search": False}), (None, b"\xff")):
        if kind == "jsonl" and isinstance(full, bytes):
            continue
        assert load(source(empty, None)).to_list() == [PAIRED[0]] * 2
        with pytest.raises(DataError, match=f"{where}, field '{field}': not supported"):
            load(source(empty, None, full))


def test_rows_of_a_selection_are_checked_for_unsupported_fields():
    records = [UNPAIRED[0] | {"audio": None}, UNPAIRED[1] | {"audio": {"name": "search"}}]
    dataset = Dataset.from_list(records)
    for chosen, row in ((dataset, 1), (dataset.select([1, 0]), 0), (dataset.select([1, 1, 0]).select([2, 0]), 1)):
        with pytest.raises(DataError, match=f"dataset, row {row}, field 'audio': not supported"):
            load(chosen)
    assert load(dataset.select([0])).to_list() == UNPAIRED[:1]


def test_images_are_refused_without_decoding_them():
    features = datasets.Features({name: datasets.Value("string") for name in PAIRED[0]} | {"images": datasets.Image()})
    dataset = Dataset.from_list([PAIRED[0] | {"images": {"bytes": b"no image", "path": None}}], features=features)
    with pytest.raises(DataError, match="dataset, row 0, field 'images': not supported"):
        load(dataset)


@pytest.fixture
def as_a_new_process():
    """Forget which warnings this process has given, as a new process would not know them."""
    records._warn_of_ignored.cache_clear()
    return records._warn_of_ignored.cache_clear


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["dataset", "jsonl", "parquet"])
def test_ignored_columns_are_named_once_per_process_even_from_the_cache(tmp_path, caplog, as_a_new_process, kind, form):
    wide = [record | {"difficulty": 2.0} for record in FORMS[form]]
    wide[-1] = wide[-1] | {"source": "web", "input_ids": [1]}
    source = write(tmp_path / "data.jsonl", wide) if kind == "jsonl" else Dataset.from_list(wide)
    if kind != "jsonl":
        source = Dataset.from_list([dict.fromkeys(wide[-1]) | record for record in wide])
    if kind == "parquet":
        source.to_parquet(tmp_path / "data.parquet")
        source = tmp_path / "data.parquet"
    for _ in range(2):
        caplog.clear()
        assert load(source).to_list() == FORMS[form]
        (message,) = caplog.messages
        assert message.startswith(f"{'dataset' if kind == 'dataset' else source}: these columns are ignored")
        assert all(f"'{name}'" in message for name in ("difficulty", "source", "input_ids"))
        if kind != "dataset":
            load(source)
            assert len(caplog.messages) == 1  # once per process, though the command reads its files twice
        as_a_new_process()


def test_records_without_other_columns_give_no_warning(tmp_path, caplog):
    load(Dataset.from_list([record | {"images": None} for record in UNPAIRED]))
    load(write(tmp_path / "data.jsonl", PAIRED))
    assert not caplog.messages


def test_a_transform_is_refused_and_not_silently_left_out():
    dataset = Dataset.from_list(UNPAIRED)
    dataset.set_transform(lambda batch: batch | {"label": [not label for label in batch["label"]]})
    with pytest.raises(DataError, match=r"^dataset: has a transform of its own \(set_transform\)"):
        load(dataset)


@pytest.mark.parametrize("through", ["dataset", "parquet"])
def test_classes_are_labels_only_if_they_are_named_false_and_true(tmp_path, through):
    def loaded(names):
        records = [record | {"label": names[record["label"]]} for record in UNPAIRED]
        dataset = Dataset.from_list(records).class_encode_column("label")
        if through == "dataset":
            return load(dataset)
        path = tmp_path / f"{names[0]}.parquet"
        dataset.to_parquet(path)
        return load(path)

    assert loaded(["False", "True"])["label"] == [record["label"] for record in UNPAIRED]
    message = r"row 0, field 'label': expected true, .* got str 'desirable'; .*'undesirable' .*--label_true"
    with pytest.raises(DataError, match=message):  # classes are numbered in alphabetical order, so desirable would be 0
        loaded(["undesirable", "desirable"])


@pytest.mark.parametrize("through", ["dataset", "parquet"])
def test_a_label_column_beside_pairs_is_ignored(tmp_path, through):
    records = [record | {"label": kind} for record, kind in zip(PAIRED, ("math", "chat"), strict=False)]
    dataset = Dataset.from_list(records).class_encode_column("label")
    if through == "parquet":
        dataset.to_parquet(tmp_path / "pairs.parquet")
    again = load(dataset if through == "dataset" else tmp_path / "pairs.parquet")
    assert again.column_names == list(PAIRED[0])


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this version of datasets has no type of its own for JSON")
@pytest.mark.parametrize("through", ["dataset", "parquet"])
@pytest.mark.parametrize("form", ["paired conversations", "unpaired conversations"])
def test_json_columns_are_read_as_their_values(tmp_path, form, through):
    plain = Dataset.from_list(FORMS[form])
    text = {name: datasets.Json() for name in plain.column_names if name != "label"}
    dataset = Dataset.from_list(FORMS[form], features=datasets.Features({**plain.features, **text}))
    if through == "parquet":
        dataset.to_parquet(tmp_path / "json.parquet")
    again = load(dataset if through == "dataset" else tmp_path / "json.parquet")
    assert again.to_list() == load(plain).to_list()


def test_types_that_datasets_does_not_know_are_an_error_that_names_the_file(tmp_path):
    columns = {name: [record[name] for record in UNPAIRED] for name in UNPAIRED[0] if name != "prompt"}
    maps = pa.array(
        [[[("role", "user"), ("content", "q")]]] * len(UNPAIRED), pa.list_(pa.map_(pa.string(), pa.string()))
    )
    pq.write_table(pa.table({"prompt": maps, **columns}), tmp_path / "maps.parquet")
    with pytest.raises(DataError, match=r"maps.parquet: cannot be read: .*map"):
        load(tmp_path / "maps.parquet")


def test_null_keys_of_messages_are_dropped():
    records = FORMS["unpaired conversations"]
    wider = [record | {"prompt": [{**m, "tool_calls": None} for m in record["prompt"]]} for record in records]
    assert load(Dataset.from_list(wider)).to_list() == records


OTHER_FORMS = {
    "completions": (DEMONSTRATIONS, COMPLETIONS),
    "completion conversations": (DEMONSTRATIONS, [conversation(record) for record in COMPLETIONS]),
    "texts": (DEMONSTRATIONS, [record | {"weight": 0.5} for record in TEXTS]),
    "messages": (DEMONSTRATIONS, [record | {"weight": 2.0} for record in MESSAGES]),
    "pairs": (COMPARISONS, PAIRED),
    "margins": (COMPARISONS, WITH_MARGINS),
}


@pytest.mark.parametrize(("forms", "records"), OTHER_FORMS.values(), ids=OTHER_FORMS)
def test_demonstrations_and_comparisons_are_read_from_files_and_datasets(tmp_path, forms, records, caplog):
    dataset = Dataset.from_list(records)
    dataset.to_parquet(tmp_path / "data.parquet")
    for source in (dataset, write(tmp_path / "data.jsonl", records), tmp_path / "data.parquet"):
        assert load(source, forms).to_list() == records
    assert not caplog.messages


def test_one_file_read_for_two_methods_is_cached_for_each(tmp_path, caplog):
    path = write(tmp_path / "pairs.jsonl", WITH_MARGINS)
    for _ in range(2):
        assert load(path).column_names == ["prompt", "chosen", "rejected"]
        assert load(path, COMPARISONS)["margin"][:] == [0.5, 2.0]
    assert "these columns are ignored, training does not use them: ['margin']" in caplog.text


BAD_OTHERS = {
    "label": (DEMONSTRATIONS, UNPAIRED[0], "field 'label': expected none, because supervised fine-tuning trains on"),
    "two forms": (DEMONSTRATIONS, COMPLETIONS[0] | TEXTS[0], "'text', or|or text.*'text'.*: keep one of them"),
    "pairs": (DEMONSTRATIONS, PAIRED[0], "field 'completion': missing, .*: give the answers to learn as 'completion'"),
    "other name": (
        DEMONSTRATIONS,
        {"instruction": "a", "output": "b"},
        "rename 'instruction' to 'prompt', 'output' to 'completion' .*--columns prompt=instruction completion=output",
    ),
    "text of messages": (DEMONSTRATIONS, {"text": MESSAGES[0]["messages"]}, "field 'text': expected a string, got l"),
    "messages of text": (DEMONSTRATIONS, {"messages": "red"}, "field 'messages': expected a list of messages, got str"),
    "no answer": (DEMONSTRATIONS, {"messages": MESSAGES[0]["messages"][:1]}, "expected a message of the role 'assis"),
    "answer first": (DEMONSTRATIONS, {"messages": MESSAGES[0]["messages"][1:]}, "begin with the user's or the sys"),
    "no margin": (
        COMPARISONS,
        WITH_MARGINS[0] | {"margin": None},
        "field 'margin': expected a finite number, got None",
    ),
    "endless margin": (COMPARISONS, WITH_MARGINS[0] | {"margin": float("inf")}, "field 'margin': expected a finite nu"),
    "feedback": (
        COMPARISONS,
        UNPAIRED[0],
        "field 'chosen': missing, expected prompt, chosen and rejected, got",
    ),
}


@pytest.mark.parametrize(("forms", "record", "message"), BAD_OTHERS.values(), ids=BAD_OTHERS)
def test_a_bad_demonstration_or_comparison_is_named(tmp_path, forms, record, message):
    with pytest.raises(DataError, match=message) as caught:
        load(write(tmp_path / "data.jsonl", [record]), forms)
    assert str(caught.value).startswith(f"{tmp_path}/data.jsonl, line 1")


def test_a_margin_that_only_some_pairs_have_is_refused(tmp_path):
    for pairs in ([PAIRED[0], WITH_MARGINS[1]], [WITH_MARGINS[0], PAIRED[1]]):
        with pytest.raises(DataError, match=r"line 2: holds paired texts.*, expected paired texts.* as in the first"):
            load(write(tmp_path / "data.jsonl", pairs), COMPARISONS)


BAD_RECORDS = {
    "missing": ({"prompt": "a", "completion": "b"}, "field 'label': missing"),
    "half a pair": ({"prompt": "a", "chosen": "b"}, "field 'rejected': missing"),
    "no prompt": ({"completion": "b", "label": True}, "field 'prompt': missing"),
    "number": ({"prompt": 7, "completion": "b", "label": True}, "field 'prompt': expected a string, got int 7"),
    "null": ({"prompt": "a", "completion": None, "label": True}, "field 'completion': expected a string, got NoneType"),
    "empty": ({"prompt": "a", "completion": "", "label": True}, "field 'completion': expected text, got an empty"),
    "word": ({"prompt": "a", "completion": "b", "label": "yes"}, "field 'label': expected true, .* got str 'yes'"),
    "two": ({"prompt": "a", "completion": "b", "label": 2}, "field 'label': expected true, .* got int 2"),
    "real": ({"prompt": "a", "completion": "b", "label": 0.5}, "field 'label': expected true, .* got float 0.5; the "),
    "paired": (PAIRED[0], "holds paired texts, expected unpaired texts"),
    "array inside": ([UNPAIRED[0]], r"expected prompt, completion and label.* got list"),
    "same key": ('{"prompt": "a", "completion": "b", "label": true, "label": false}', "the key 'label' is given twice"),
    "same key inside": ('{"prompt": [{"role": "a", "role": "b"}]}', "the key 'role' is given twice"),
    "other name": (
        {"instruction": "a", "response": "b", "label": True},
        "rename 'instruction' to 'prompt', 'response'",
    ),
    "conversation": (conversation(UNPAIRED[0]), "holds unpaired conversations, expected unpaired texts"),
    "mixed": (UNPAIRED[0] | {"completion": [{"role": "user", "content": "b"}]}, "field 'completion': expected a str"),
    "both": (UNPAIRED[0] | PAIRED[0], "got both"),
    "list": ([1, 2], r"expected prompt.* got list \[1, 2\]"),
    "surrogate": ({"prompt": "a", "completion": "b\ud800", "label": True}, "field 'completion': .* half a surrogate"),
}


@pytest.mark.parametrize(("record", "message"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_line_is_named(tmp_path, record, message):
    path = tmp_path / "data.jsonl"
    line = record if isinstance(record, str) else json.dumps(record)
    path.write_text(f"{json.dumps(UNPAIRED[0])}\n\n{line}\n{json.dumps(UNPAIRED[1])}\n")
    for _ in range(2):  # the first call must leave nothing in the cache
        with pytest.raises(DataError, match=message) as caught:
            load(path)
        assert str(caught.value).startswith(f"{path}, line 3")
    assert not list(tmp_path.rglob("*.arrow"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            PAIRED[0] | {"rejected": [{"role": "assistant", "content": "b"}]},
            "'rejected': .*the prompt is a string: give",
        ),
        (conversation(PAIRED[0]) | {"chosen": "b"}, "'chosen': .*the prompt is messages: give .*'assistant'"),
        (UNPAIRED[0] | {"completion": [{"role": "assistant", "content": "b"}]}, "'completion': .*the prompt is a str"),
        (conversation(UNPAIRED[0]) | {"completion": "b"}, "'completion': .*the prompt is messages: give"),
    ],
)
@pytest.mark.parametrize("kind", ["dataset", "jsonl"])
def test_a_text_prompt_with_an_answer_of_messages_says_what_to_do(tmp_path, kind, record, message):
    message = message.replace("'assistant'", '"assistant"')
    with pytest.raises(DataError, match=message):
        load(Dataset.from_list([record]) if kind == "dataset" else write(tmp_path / "data.jsonl", [record]))


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


def test_a_conversation_with_an_empty_completion_is_refused(tmp_path):
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
        ("data.csv", b"prompt,completion,label\n", "holds no records"),
        ("data.csv", b"prompt,label\na,1\n", "row 0, field 'completion': missing"),
        ("data.csv", b"prompt,completion,label\na,1\n", "cannot be read: .*Expected 3 columns, got 2"),
        ("data.csv", b"a" * 200_000, "expected the names of the columns in the first line: field larger than"),
        ("data.csv", "prompt".encode("utf-16"), "expected text with columns, got text in UTF-16"),
        ("data.tsv", b"prompt\tprompt\tlabel\na\tb\t1\n", "more than one column of the name"),
        ("data.txt", b"", r"expected a \.jsonl, .* file, also with \.gz, got '\.txt': name it \.csv or \.tsv"),
        ("data.xlsx", b"PK", r"got '\.xlsx': in Excel, save the table as 'CSV UTF-8'"),
        ("data.gz", b"", r"got '\.gz': name the type before \.gz"),
        ("data.jsonl.gz", b"\x1f\x8b", "cannot be read: "),
        ("trl-lib/kto", None, "got 'no file type': .*the split is named too, as in .*trl-lib/kto:train"),
        ("*.jsonl", None, "no file matches this pattern"),
        ("data", b"{}", "got 'no file type'"),
        ("data.jsonl", b"", "holds no records"),
        ("data.jsonl", b"\n \r\n", "holds no records"),
        ("data.jsonl", b"{}\n{", r"line 1, field 'prompt': missing"),
        ("data.json", b"[\n{}]", "row 0, field 'prompt': missing"),
        ("data.jsonl", b"[]", "holds no records"),
        ("data.jsonl", b"\xef\xbb\xbf [0,", "row 0: expected prompt, .* in a JSON object, got int 0"),
        ("data.json", b'[{"prompt": "a" "b"}]', "row 0: expected a record in JSON, got str .*delimiter"),
        ("data.json", b'[{"a": "' + b"0" * (2**24 + 2**21), "row 0: no record in JSON within the 16777216 char"),
        ("data.json", b'{\n  "prompt": "a"\n}\n', "line 1: .*an object that goes on after the line: .*jq -c"),
        ("data.json", b'{"prompt": "a",\n "label": 1}\n', "line 1: .*an object that goes on after the line"),
        ("data.jsonl", b'{"prompt": "a"} {}\n', "line 1: .*more than one object on the line"),
        ("data.jsonl", '{"prompt": "a"}'.encode("utf-16"), "line 1: .*text in UTF-16 .*save it in UTF-8"),
        ("data.jsonl", '{"prompt": "a"}'.encode("utf-16-le"), "line 1: .*text in UTF-16 .*save it in UTF-8"),
        (
            "data.jsonl",
            gzip.compress(b"{}", mtime=0),
            r"line 1: .*compressed data \(\.gz\): end the file's name in \.gz",
        ),
        ("data.jsonl", b"PAR1\x15\x04", r"line 1: .*a Parquet file: end the file's name in \.parquet"),
        ("data.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "line 1: .*pointer of Git LFS"),
        ("data.jsonl", b'{"prompt": "\xff"}', "line 1: expected one record in JSON, .*utf-8"),
        (
            "data.jsonl",
            b'{"a": ' + b"[" * 100000,  # more than Python 3.13 recurses
            "line 1: expected one record in JSON, got brackets that are nested",
        ),
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


TABLE = [
    {"prompt": "2 + 2?\nNow, please", "completion": ' "4", so ', "label": True},
    {"prompt": "7", "completion": "-1", "label": False},
    {"prompt": "", "completion": "x", "label": True},
]


@pytest.mark.parametrize("compressed", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "arrow"])
def test_every_format_gives_the_same_records(tmp_path, monkeypatch, kind, compressed):
    monkeypatch.setattr(files, "CHUNK", 7)  # of an array: records lie over several chunks
    plain, table = tmp_path / f"data.{kind}", Dataset.from_list(TABLE)
    if kind == "json":
        plain.write_text(f"\ufeff\n[ {', '.join(map(json.dumps, TABLE))} ]\n")
    elif kind in ("csv", "tsv"):
        table.to_csv(plain, sep="," if kind == "csv" else "\t")
    elif kind == "arrow":
        with pa.OSFile(str(plain), "wb") as file, pa.ipc.new_stream(file, table.data.schema) as writer:
            writer.write_table(table.data.table)
    else:
        getattr(table, "to_json" if kind == "jsonl" else "to_parquet")(plain)
    source = plain
    if compressed:
        source = tmp_path / f"{plain.name}.gz"
        source.write_bytes(gzip.compress(plain.read_bytes()))
    for _ in range(2):  # from the file, and from the cache
        assert load(source).to_list() == TABLE
    assert [record for _, record in files.raw_records(plain, plain.open("rb"))][1]["prompt"] == "7"


def test_folders_patterns_and_named_splits_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("set/inner").mkdir(parents=True)
    write(Path("set/train.jsonl"), TABLE[:2])
    Dataset.from_list(TABLE[2:]).to_csv("set/inner/b.csv")
    Path("set/readme.md").write_text("no data")
    assert load("set").to_list() == [TABLE[2], *TABLE[:2]]
    assert load(["set/*.jsonl", "set/**/*.csv"]).to_list() == TABLE
    Dataset.from_list(TABLE).save_to_disk("saved")
    assert load("saved").to_list() == TABLE
    Path("set/inner/b.csv").unlink()
    assert load("./set:train[:1]").to_list() == TABLE[:1]
    for name, message in (("set/inner", "a folder without any"), ("set:test", "the data set cannot be loaded: .*test")):
        with pytest.raises(DataError, match=message):
            load(name)


def test_a_semicolon_separates_columns_where_there_is_no_comma_and_json_cells_are_conversations(tmp_path):
    messages = conversation(TABLE[0])
    cells = [json.dumps(messages[name]).replace('"', '""') for name in ("prompt", "completion")]
    (tmp_path / "data.csv").write_text('prompt;completion;label;weight\n"{}";"{}";true;0.5\n'.format(*cells))
    assert load(tmp_path / "data.csv").to_list() == [messages | {"weight": 0.5}]
    (tmp_path / "repr.csv").write_text(f"""prompt;completion;label\n"{messages["prompt"]}";b;true\n""")
    with pytest.raises(DataError, match=r"row 0, field 'prompt': .* messages as Python prints them"):
        load(tmp_path / "repr.csv")


def test_rows_of_a_text_table_without_an_answer_or_a_label_are_left_out_and_counted(tmp_path, caplog):
    path = tmp_path / "thumbs.csv"
    path.write_bytes('\ufeffprompt;completion;label\r\n;;\r\na;b;1\r\n\r\na;;0\r\nc;"d\r\ne"; \r\n;f;0\r\n'.encode())
    for _ in range(2):  # from the file, and from the cache
        caplog.clear()
        records._warn_of_left_out.cache_clear()
        assert load(path).to_list() == [
            {"prompt": "a", "completion": "b", "label": True},
            {"prompt": "", "completion": "f", "label": False},
        ]
        assert f"{path}: 3 rows are left out, because a cell is empty: 'completion' in 2 (first: row 0)" in caplog.text
        assert ", 'label' in 1 (first: row 3)." in caplog.text
    assert list(records.bad_records([str(path)])) == []
    blank_is_bad = reading(label_true=["1", "0"], label_false=[""])
    path.write_text("prompt,completion,label\na,b,1\na,c,\n")
    assert load(path, reading=blank_is_bad)["label"][:] == [True, False]
    path.write_text("prompt,completion,label\na,b,\n")
    with pytest.raises(DataError, match=r"thumbs\.csv: holds no records: 1 row is left out, .* 'label' in 1"):
        load(path)


def test_a_table_from_excel_is_read_or_the_error_says_how_to_save_it(tmp_path):
    rows = [{"prompt": "größer, als 5 €?", "completion": 'so\r\n"ja"; oder', "label": flag} for flag in (True, False)]
    text = "prompt;completion;label\r\n" + "".join(
        '"{prompt}";"{}";{label}\r\n'.format(row["completion"].replace('"', '""'), **row) for row in rows
    )
    path = tmp_path / "DATA.CSV"
    for separator, encoding in ((";", "utf-8-sig"), ("\t", "utf-8")):
        path.write_bytes(text.replace(";", separator).replace(f"{separator} oder", "; oder").encode(encoding))
        assert load(path).to_list() == rows
    for content in (text.encode("cp1252"), text.replace("label", "größe", 1).encode("cp1252")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"UTF-8, got another encoding .* 'CSV UTF-8', or .* iconv -f CP1252"):
            load(path)
    path.write_text("Frage;Daumen;Zeit\nx;1;2\n")
    with pytest.raises(
        DataError, match=r"got \['Frage', 'Daumen', 'Zeit'\]: .*--columns prompt=COLUMN completion=COLUMN"
    ):
        load(path)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([1.0, 0.0], {}),
        (["True", "FALSE"], {}),
        (["1", "0.0"], {}),
        ([1, -1], {}),
        (["+1", "-1.0"], {}),
        (["up", "down"], {"label_true": ["Up", 1], "label_false": ["down"]}),
        ([5, 2], {"label_true": ["4", "5"], "label_false": ["1", "2"]}),
    ],
)
def test_labels_are_read_as_people_write_them(tmp_path, labels, words):
    table = [record | {"label": label} for record, label in zip(TABLE, labels, strict=False)]
    for source in (Dataset.from_list(table), write(tmp_path / "data.jsonl", table)):
        assert load(source, reading=reading(**words))["label"][:] == [True, False]


def test_other_labels_are_listed_with_the_flag_to_use(tmp_path):
    table = [TABLE[0] | {"label": label} for label in (True, "good", "bad", "good", None)]
    message = r"line 2, .* got str 'good'; .* 'bad' \(1 times\), 'good' \(2 times\), None .* True .*--label_true"
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "data.jsonl", table))
    with pytest.raises(DataError, match=r"line 2, .*expected either 0 or -1 for not liked, got both"):
        load(write(tmp_path / "both.jsonl", [TABLE[0] | {"label": label} for label in (0, -1)]))
    with pytest.raises(ValueError, match=r"both name \['1'\]"):
        reading(label_true=["1"], label_false=[1.0])


def test_columns_are_read_under_the_names_that_are_given(tmp_path, caplog):
    table = [{"question": "a", "answer": "b", "thumbs": "up", "prompt": "old"}]
    given = reading({"prompt": "question", "completion": "answer", "label": "thumbs"}, ["up"], ["down"])
    assert given == reading(["prompt=question", "completion=answer", "label=thumbs"], ["up"], ["down"])
    Dataset.from_list(table).to_csv(tmp_path / "data.csv")
    for source in (Dataset.from_list(table), write(tmp_path / "data.jsonl", table), tmp_path / "data.csv"):
        caplog.clear()
        assert load(source, reading=given).to_list() == [{"prompt": "a", "completion": "b", "label": True}]
        assert "these columns are ignored, training does not use them: ['prompt']" in caplog.text
    with pytest.raises(DataError, match="row 0, field 'label': --columns label=stars names a column that is missing"):
        load(tmp_path / "data.csv", reading=reading(["label=stars"]))
    for wrong in (["prompt"], ["promt=a"], ["label=a", "label=b"]):
        with pytest.raises(ValueError, match="columns"):
            reading(wrong)


def said(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, texts, strict=False)]


def shared(*texts):
    return [{"from": kind, "value": text} for kind, text in zip(("human", "gpt") * 3, texts, strict=False)]


PAIR = {"prompt": said("a", "b", "c"), "chosen": said("c", "d")[1:], "rejected": said("c", "e")[1:]}
DIALOGUE = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
SYSTEM = [{"role": "system", "content": "s"}]
LAYOUTS = {
    "whole conversations": ({"chosen": said("a", "b", "c", "d"), "rejected": said("a", "b", "c", "e")}, PAIR),
    "prompt repeated": (
        {"prompt": "a"} | {k: said("a", "b", "c", v) for k, v in (("chosen", "d"), ("rejected", "e"))},
        PAIR,
    ),
    "dialogues": (
        {"chosen": f"{DIALOGUE} dx", "rejected": f"{DIALOGUE} dy"},
        {"prompt": DIALOGUE, "chosen": " dx", "rejected": " dy"},
    ),
    "ShareGPT pair": (
        {"conversations": shared("a", "b", "c"), "chosen": shared("", "d")[1], "rejected": shared("", "e")[1]},
        PAIR,
    ),
    "ShareGPT tag": (
        {"conversations": shared("a", "b", "c", "d"), "kto_tag": True},
        {"prompt": PAIR["prompt"], "completion": PAIR["chosen"], "label": True},
    ),
    "messages": (
        {"messages": said("a", "b", "c", "d"), "label": 0},
        {"prompt": PAIR["prompt"], "completion": PAIR["chosen"], "label": False},
    ),
    "system": (
        {"system": "s", "prompt": "a", "completion": "b", "label": True},
        {"prompt": SYSTEM + said("a"), "completion": said("", "b")[1:], "label": True},
    ),
    "system of conversations": ({"system": "s"} | PAIR, PAIR | {"prompt": SYSTEM + PAIR["prompt"]}),
}


@pytest.mark.parametrize("kind", ["dataset", "jsonl", "parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_recognised_by_their_columns(tmp_path, layout, kind):
    record, expected = LAYOUTS[layout]
    source = Dataset.from_list([record, record])
    if kind == "jsonl":
        source = write(tmp_path / "data.jsonl", [record, record])
    elif kind == "parquet":
        source.to_parquet(tmp_path / "data.parquet")
        source = tmp_path / "data.parquet"
    assert load(source).to_list() == [expected] * 2


def test_shared_conversations_are_demonstrations(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"conversations": shared("a", "b")}])
    assert load(path, DEMONSTRATIONS).to_list() == [{"messages": said("a", "b")}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"chosen": said("a", "b"), "rejected": said("c", "d")}, "chosen and rejected to begin with the same messages"),
        ({"chosen": "ab", "rejected": "ac"}, "field 'prompt': missing, .* do not begin with the same turns"),
        ({"prompt": "x", "chosen": said("a", "b"), "rejected": said("a", "c")}, "field 'prompt': expected the text of"),
        ({"conversations": shared("a", "b", "c"), "kto_tag": True}, "ends with the assistant's answer"),
        ({"conversations": [{"from": "bot", "value": "a"}] * 2, "kto_tag": True}, "message 0, 'from': expected one of"),
        (
            {"system": 1, "prompt": "a", "completion": "b", "label": True},
            "field 'system': expected a string, got int 1",
        ),
        ({"system": "s"} | PAIR | {"prompt": SYSTEM + said("a")}, "begins with a system message too"),
    ],
)
def test_a_record_that_breaks_its_layout_is_named(tmp_path, record, message):
    with pytest.raises(DataError, match=message) as caught:
        load(write(tmp_path / "data.jsonl", [record]))
    assert str(caught.value).startswith(f"{tmp_path}/data.jsonl, line 1")


def test_a_system_text_that_the_first_record_lacks_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"line 2, field 'system': .*the first record has no such column"):
        load(write(tmp_path / "data.jsonl", [TABLE[0], TABLE[1] | {"system": "s"}]))


def test_all_bad_records_are_found(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(TABLE[0]), "{", json.dumps(TABLE[1] | {"label": 7}), json.dumps(TABLE[1]), "[]"]
    path.write_text("\n".join(lines))
    errors = [str(error).partition(", ")[2] for error in records.bad_records([str(path)])]
    assert [error.partition(":")[0] for error in errors] == ["line 2", "line 3, field 'label'", "line 5"]


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
        (lambda: UNPAIRED, "got a list of 3 records: make a Dataset of them with Dataset.from_list"),
        (lambda: {"prompt": ["a"], "label": [True]}, r"keys \['prompt', 'label'\]: make .* with Dataset.from_dict"),
        (lambda: ("a.jsonl",), "a list of paths, got tuple .*: make it a list"),
        (lambda: None, "a list of paths, got NoneType None"),
    ],
)
def test_a_source_of_another_kind_is_refused(make, message):
    with pytest.raises(DataError, match=message):
        load(make())


# ---- the cache ------------------------------------------------------------------------------------------------------


def test_an_unchanged_file_is_read_once(tmp_path, monkeypatch):
    path = write(tmp_path / "data.jsonl", UNPAIRED)
    load(path)
    write(tmp_path / "same.jsonl", UNPAIRED)
    monkeypatch.setattr(records, "checked_record", None)
    assert load(path).to_list() == load(tmp_path / "same.jsonl").to_list() == UNPAIRED


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_edited_file_is_read_again(tmp_path, kind):
    path = tmp_path / f"data.{kind}"

    def save(records):
        write(path, records) if kind == "jsonl" else Dataset.from_list(records).to_parquet(path)

    for chosen in (UNPAIRED, UNPAIRED[:2], UNPAIRED[::-1]):
        save(chosen)
        os.utime(path, (1, 1))  # like a copy that keeps the time
        assert load(path).to_list() == chosen


def test_a_file_name_is_not_a_glob_pattern(tmp_path):
    Dataset.from_list(UNPAIRED[:2]).to_parquet(tmp_path / "data[1].parquet")
    Dataset.from_list(UNPAIRED[2:]).to_parquet(tmp_path / "data1.parquet")
    assert load(tmp_path / "data[1].parquet").to_list() == UNPAIRED[:2]


def test_ignored_columns_of_a_table_are_not_read(tmp_path):
    table = pa.table({name: [record[name] for record in UNPAIRED] for name in UNPAIRED[0]})
    table = table.append_column("hash", pa.array([2**64 - 1] * len(UNPAIRED), pa.uint64()))
    table = table.append_column("counts", pa.array([[("a", 1)]] * len(UNPAIRED), pa.map_("str", "int8")))
    pq.write_table(table, tmp_path / "data.parquet")
    assert load(tmp_path / "data.parquet").to_list() == UNPAIRED


def test_an_empty_table_holds_no_records(tmp_path):
    Dataset.from_list(UNPAIRED).select([]).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"data\.parquet: holds no records"):
        load(tmp_path / "data.parquet")


# ---- hostile input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["record", "text", "list", "other column"])
def test_a_gigantic_line_is_refused_quickly_with_its_number_and_the_limit(tmp_path, line):
    size = 100_000_000 if line == "record" else 17 * 2**20
    content = {
        "record": json.dumps(UNPAIRED[1] | {"completion": "x" * size}),
        "text": "x" * size,
        "list": '{"a": [' + "1," * (size // 2),
        "other column": json.dumps(UNPAIRED[1] | {"images": "x" * size}),
    }[line]
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(UNPAIRED[0])}\n{content}\n")
    start = time.perf_counter()
    with pytest.raises(DataError, match=rf"line 2: longer than the {records.MAX_RECORD} bytes that one record may"):
        load(path)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("kind", ["dataset", "parquet"])
@pytest.mark.parametrize("form", ["unpaired", "paired conversations"])
def test_a_gigantic_row_is_refused_with_its_number_and_the_limit(tmp_path, monkeypatch, kind, form):
    monkeypatch.setattr(form_module, "MAX_RECORD", 40)
    first = FORMS[form][0]
    last = next(iter(reversed(first))) if form != "unpaired" else "completion"
    big = first | {last: "x" * 41 if form == "unpaired" else [{"role": "assistant", "content": "x" * 41}]}
    source = Dataset.from_list([first, big])
    if kind == "parquet":
        source.to_parquet(tmp_path / "data.parquet")
        source = tmp_path / "data.parquet"
    with pytest.raises(DataError, match=r"row 1: holds \d+ characters, more than the 40 that one record may have"):
        load(source)


def test_records_at_the_limit_are_read(tmp_path, monkeypatch):
    line = json.dumps(UNPAIRED[0])
    for module in (records, form_module):
        monkeypatch.setattr(module, "MAX_RECORD", len(line))
    path = tmp_path / "data.jsonl"
    for end in ("", "\n", "\r\n"):
        path.write_bytes(f"{line}\n{line}{end}".encode())
        assert load(path).to_list() == [UNPAIRED[0]] * 2


def numbered_labels(path, metadata):
    table = pa.table({"prompt": ["a", "a"], "completion": ["b", "c"], "label": pa.array([1, 0])})
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), path)
    return path


@pytest.mark.parametrize(
    "metadata",
    [
        b"\xff",
        "[" * 5000,
        "null",
        "[]",
        '"text"',
        '{"info": 3}',
        '{"info": {"features": []}}',
        '{"info": {"features": {"label": "ClassLabel"}}}',
        '{"info": {"features": {"label": {"_type": "ClassLabel"}}}}',
        '{"info": {"features": {"label": {"_type": "ClassLabel", "names": 2}}}}',
    ],
)
def test_unreadable_metadata_of_numbered_labels_is_refused(tmp_path, metadata):
    with pytest.raises(DataError, match=r"data\.parquet, field 'label': holds numbers, and the metadata"):
        load(numbered_labels(tmp_path / "data.parquet", metadata))


@pytest.mark.parametrize("metadata", ["{}", '{"info": {}}', '{"info": {"features": {"prompt": 3, "label": {}}}}'])
def test_metadata_without_label_classes_is_ignored(tmp_path, metadata):
    assert load(numbered_labels(tmp_path / "data.parquet", metadata))["label"] == [True, False]


@pytest.mark.parametrize("metadata", [b"\xff", "null", '{"info": []}'])
def test_metadata_is_ignored_if_labels_are_not_numbers(tmp_path, metadata):
    table = pa.table({name: [record[name] for record in UNPAIRED] for name in UNPAIRED[0]})
    pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "data.parquet")
    assert load(tmp_path / "data.parquet").to_list() == UNPAIRED


@pytest.mark.parametrize("name", ["label", "prompt", "source"])
def test_two_columns_of_the_same_name_are_refused(tmp_path, name):
    names = [*UNPAIRED[0], "source", name]
    columns = [pa.array([(UNPAIRED[0] | {"source": "forum"})[column]]) for column in names]
    pq.write_table(pa.Table.from_arrays(columns, names=names), tmp_path / "data.parquet")
    with pytest.raises(DataError, match=rf"data\.parquet: has more than one column of the name \['{name}'\]"):
        load(tmp_path / "data.parquet")


def test_pandas_categories_are_read_as_their_values(tmp_path):
    table = pa.table({name: [record[name] for record in UNPAIRED] for name in UNPAIRED[0]})
    table = table.set_column(0, "prompt", table["prompt"].dictionary_encode())
    pq.write_table(table, tmp_path / "data.parquet")
    assert load(tmp_path / "data.parquet").to_list() == UNPAIRED


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_with_random_faults_is_read_or_refused_with_its_name(tmp_path, kind):
    random = Random(0)
    path = tmp_path / f"data.{kind}"
    write(path, UNPAIRED) if kind == "jsonl" else Dataset.from_list(UNPAIRED).to_parquet(path)
    whole = path.read_bytes()
    refused = []
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(random.choice([1, 3, 20])):
            content[random.randrange(len(content))] = random.choice(b'{}[]",:\\\n\0\xff')
        path.write_bytes(content[: random.choice([len(content), random.randrange(len(content))])])
        try:
            load(path)
        except DataError as error:
            refused.append(str(error))
    assert all(message.startswith(str(path)) and len(message) < 1000 for message in refused)
    assert len(refused) > 75


@pytest.mark.parametrize("form", ["unpaired", "conversations", "text"])
def test_no_prompt_is_on_both_sides_of_a_split(form):
    rows = [{"prompt": f"p{n % 20}", "completion": str(n), "label": n % 3 == 0} for n in range(100)]
    if form == "conversations":
        rows = [
            {"messages": [*said(row["prompt"]), {"role": "assistant", "content": row["completion"]}]} for row in rows
        ]
    if form == "text":
        rows = [{"text": row["prompt"]} for row in rows]
    loaded = load(Dataset.from_list(rows), PREFERENCES if form == "unpaired" else DEMONSTRATIONS)
    prompt = {"unpaired": lambda row: row["prompt"], "conversations": lambda row: row["messages"][0]["content"]}.get(
        form, lambda row: row["text"]
    )
    train, held_out = (load(side) for side in records.split_by_prompt(loaded, 0.1, seed=3))
    assert len({prompt(row) for row in held_out}) == 2
    assert not {prompt(row) for row in train} & {prompt(row) for row in held_out}
    assert len(train) + len(held_out) == 100
    assert held_out.to_list() == load(records.split_by_prompt(loaded, 0.1, seed=3).eval).to_list()
    assert held_out.to_list() != load(records.split_by_prompt(loaded, 0.1, seed=4).eval).to_list()
    with pytest.raises(DataError, match=r"--eval_fraction 0\.5 splits the data by prompt, and they have one prompt"):
        records.split_by_prompt(loaded.select([0]), 0.5, seed=0)


def test_a_split_that_loses_a_label_names_the_fraction(caplog):
    rows = [{"prompt": f"p{n % 5}", "completion": str(n), "label": n % 5 > 0} for n in range(20)]  # p0 is disliked
    loaded = load(Dataset.from_list(rows))
    kept, refused = "--eval_fraction 0.2 keeps 1 of 5 prompts for evaluation", []
    for seed in range(10):
        try:
            records.split_by_prompt(loaded, 0.2, seed)
        except DataError as error:
            refused.append(str(error))
    assert 0 < len(refused) < 10
    assert {text.partition(", draw")[0] for text in refused} == {
        f"{kept} and leaves no undesirable example to train on: lower --eval_fraction"
    }
    warned = [text for text in caplog.messages if "none of their examples is undesirable" in text]
    assert len(warned) == 10 - len(refused)
    assert all(text.startswith(kept) and "Raise --eval_fraction" in text for text in warned)
    liked = loaded.filter(lambda row: row["label"])
    assert len(records.split_by_prompt(liked, 0.2, 0).eval.records) == 4  # the data are at fault, not the fraction
