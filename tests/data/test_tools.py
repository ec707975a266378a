"""Tools reach the prompts of every recipe as the chat template writes them, or are refused by name."""

import json

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: the data modules need it")

import datasets
from data_cases import TEMPLATE, byte_pair_tokenizer, one_token_a_word, write
from datasets import Dataset
from tokenizers import decoders

from kto_fused.data.form import COMPARISONS, DEMONSTRATIONS, PREFERENCES, DataError
from kto_fused.data.prompts import read_prompts, tokenized_prompts
from kto_fused.data.records import load
from kto_fused.preference_data import prepare_completions, prepare_paired, prepare_unpaired, reading

TAKES_TOOLS = "{% for tool in tools or [] %}[{{ tool | tojson }}]{% endfor %}" + TEMPLATE


def function(name: str, **properties: dict) -> dict:
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [
    [function("weather", city={"type": "string", "description": "in the user's words"}), function("now")],
    None,
    [function("add", a={"type": "number"}, b={"type": "number"})],
]
QUESTIONS = [[{"role": "user", "content": text}] for text in ("Is it raining in Oslo?", "Who are you?", "2 + 2?")]
GOOD, BAD = ([{"role": "assistant", "content": text}] for text in ("Let me look.", "No idea."))
RECORDS = {
    "kto": [
        {"prompt": question, "completion": answer, "label": answer is GOOD, "tools": tools}
        for question, answer, tools in zip(QUESTIONS, (GOOD, BAD, GOOD), TOOLS, strict=True)
    ],
    "dpo": [
        {"prompt": question, "chosen": GOOD, "rejected": BAD, "tools": tools}
        for question, tools in zip(QUESTIONS, TOOLS, strict=True)
    ],
    "sft": [
        {"prompt": question, "completion": GOOD, "tools": tools}
        for question, tools in zip(QUESTIONS, TOOLS, strict=True)
    ],
    "sft messages": [
        {"messages": question + GOOD, "tools": tools} for question, tools in zip(QUESTIONS, TOOLS, strict=True)
    ],
}
RECORDS["reward"] = RECORDS["dpo"]
PREPARE = {"kto": prepare_unpaired, "dpo": prepare_paired, "reward": prepare_paired}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def tool_tokenizer():
    tokenizer = byte_pair_tokenizer()
    tokenizer.chat_template = TAKES_TOOLS
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [*((recipe, "jsonl") for recipe in RECORDS), *(("kto", kind) for kind in ("json text", "parquet", "dataset"))],
)
def test_prompts_hold_the_tools_as_the_template_writes_them(tmp_path, recipe, kind):
    tokenizer, records, path = tool_tokenizer(), RECORDS[recipe], tmp_path / "records.jsonl"
    if kind == "json text":
        records = [record | {"tools": json.dumps(record["tools"])} for record in records]
    if kind == "parquet":  # whose columns give each object the keys of all objects
        path = tmp_path / "records.parquet"
        Dataset.from_list(records).to_parquet(path)
    elif kind != "dataset":
        write(path, records)
    source = Dataset.from_list(records) if kind == "dataset" else str(path)
    options = {"margins": True} if recipe == "reward" else {}
    prepared = PREPARE.get(recipe, prepare_completions)(source, tokenizer, **options)
    expected = [
        tokenizer.apply_chat_template(question, tools=tools, tokenize=False, add_generation_prompt=True)
        for question, tools in zip(QUESTIONS, TOOLS, strict=True)
    ]
    assert tokenizer.batch_decode(prepared.dataset["prompt_ids"][:]) == expected
    assert "weather" in expected[0]
    assert not prepared.dropped


def test_a_csv_cell_holds_tools_as_json_with_its_nulls(tmp_path):
    tools = [function("weather", city={"type": "string", "default": None})]
    text = json.dumps(tools).replace('"', '""')
    (tmp_path / "calls.csv").write_text(f'prompt,completion,label,functions\nOslo?,Rain.,1,"{text}"\nYou?,Me.,0,\n')
    given = reading(["tools=functions"], chat="always")
    assert load(tmp_path / "calls.csv", reading=given)["tools"][:] == [json.dumps(tools), ""]
    tokenizer = tool_tokenizer()
    rows = prepare_unpaired(tmp_path / "calls.csv", tokenizer, reading=given).dataset["prompt_ids"][:]
    asked = [{"role": "user", "content": "Oslo?"}]
    expected = tokenizer.apply_chat_template(asked, tools=tools, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(rows[0]) == expected


@pytest.mark.parametrize("generation", [False, True])
def test_only_the_assistants_tokens_of_an_answer_that_calls_tools_are_trained(tmp_path, generation):
    tokenizer, texts = tool_tokenizer(), ["weather of Oslo", "It rains."]
    if generation:
        block = "{% generation %}{{ message['content'] }} </s>{% endgeneration %}"
        tokenizer.chat_template = (
            "{% for tool in tools or [] %}[{{ tool | tojson }}]{% endfor %}{% for message in messages %}"
            "<{{ message['role'] }}> {% if message['role'] == 'assistant' %}" + block + "{% else %}"
            "{{ message['content'] }} </s>{% endif %} {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
        )
    answer = [
        {"role": "assistant", "content": texts[0]},
        {"role": "tool", "content": "rain, 4 degrees"},
        {"role": "assistant", "content": texts[1]},
    ]
    record = {"messages": QUESTIONS[0] + answer, "tools": TOOLS[0]}
    row = prepare_completions(str(write(tmp_path / "calls.jsonl", [record])), tokenizer).dataset[0]
    trained = tokenizer.decode(
        [token for token, is_trained in zip(row["completion_ids"], row["completion_mask"], strict=True) if is_trained]
    )
    assert all(text in trained for text in texts)
    assert "degrees" not in trained
    assert "degrees" in tokenizer.decode(row["completion_ids"])


def test_tools_that_the_template_leaves_out_are_refused(tmp_path):
    path = str(write(tmp_path / "calls.jsonl", [RECORDS["kto"][1], RECORDS["kto"][2]]))
    with pytest.raises(DataError, match=r"^train data, row 1, field 'tools': the chat template writes the same text"):
        prepare_unpaired(path, byte_pair_tokenizer())
    prepare_unpaired(path, tool_tokenizer())
    texts = [{"prompt": "2 + 2?", "completion": " 4", "label": i == 0, "tools": TOOLS[2]} for i in range(2)]
    path = str(write(tmp_path / "texts.jsonl", texts))
    with pytest.raises(DataError, match=r"has tools, which a chat template writes, but plain text .* .--chat always."):
        prepare_unpaired(path, tool_tokenizer())


def test_an_empty_tools_column_changes_nothing(tmp_path):
    records = [{name: value for name, value in record.items() if name != "tools"} for record in RECORDS["kto"]]
    empty = [record | {"tools": tools} for record, tools in zip(records, (None, [], "[]"), strict=True)]
    tokenizer = one_token_a_word()  # its template takes none
    plain, empty = (
        prepare_unpaired(str(write(tmp_path / f"{name}.jsonl", rows)), tokenizer).dataset
        for name, rows in (("plain", records), ("empty", empty))
    )
    assert plain[:] == empty[:]


BEGIN = r"records.jsonl, line {}, field 'tools': "


@pytest.mark.parametrize(
    ("records", "forms", "message"),
    [
        (
            [{"prompt": "a", "completion": "b", "label": 1, "tools": {"name": "x"}}],
            PREFERENCES,
            "1: expected a list of",
        ),
        ([{"prompt": "a", "completion": "b", "label": 1, "tools": "weather"}], PREFERENCES, "1: expected a list of"),
        ([{"prompt": "a", "completion": "b", "tools": ["weather"]}], DEMONSTRATIONS, "1: expected a list of"),
        ([{"text": "a b", "tools": TOOLS[0]}], DEMONSTRATIONS, "1: holds list .* a whole text has no prompt"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"} | tools for tools in ({}, {"tools": TOOLS[0]})],
            COMPARISONS,
            "2: holds list .* the first record has no such field: give it to every record",
        ),
    ],
)
def test_tools_that_cannot_be_used_are_named(tmp_path, records, forms, message):
    line, _, rest = message.partition(": ")
    with pytest.raises(DataError, match=BEGIN.format(line) + rest):
        load(str(write(tmp_path / "records.jsonl", records)), forms)


def test_prompts_to_generate_from_take_a_system_message_and_refuse_tools(tmp_path):
    tokenizer = one_token_a_word()
    records = [{"system": system, "prompt": "red", "completion": "one", "label": 1} for system in ("blue", None)]
    path = str(write(tmp_path / "records.jsonl", records))
    prompts = tokenized_prompts(read_prompts([path], needs_answers=True), tokenizer, max_prompt_tokens=None)
    trained = prepare_unpaired(path, tokenizer, mismatch=False, needs_both_labels=False).dataset
    assert [prompt.ids for prompt in prompts] == trained["prompt_ids"][:]
    assert [prompt.answer_ids[len(prompt.ids) :] for prompt in prompts] == trained["completion_ids"][:]
    for field in ("tools", "images"):
        path = str(write(tmp_path / "records.jsonl", [records[0], records[1] | {field: TOOLS[2]}]))
        with pytest.raises(DataError, match=f"line 2, field '{field}': not supported"):
            read_prompts([path], needs_answers=False)
