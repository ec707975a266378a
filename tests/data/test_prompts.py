"""Prompts are read from any file of records, and tokenized as training tokenizes them."""

import json

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: the data modules need it")

from datasets import Dataset
from tiny_training import tokenizer

from kto_fused.data.form import DataError
from kto_fused.data.layouts import reading
from kto_fused.data.prompts import read_prompts, tokenized_prompts
from kto_fused.data.tokens import prepare_paired

TEMPLATE = (
    "{% for m in messages %} {{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [str(path)]


def chat_tokenizer():
    words = tokenizer(["user", "assistant", *(f"w{number}" for number in range(9))])
    words.chat_template = TEMPLATE
    return words


def message(role, content):
    return {"role": role, "content": content}


def test_feedback_and_pairs_give_their_prompts_once_and_their_good_answers(tmp_path, caplog):
    feedback = write(
        tmp_path / "feedback.jsonl",
        [
            {"prompt": "w1", "completion": " w2", "label": True},
            {"prompt": "w1", "completion": " w3", "label": False},
            {"prompt": "w4", "completion": " w5", "label": 0},
        ],
    )
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "w6", "chosen": " w7", "rejected": " w8"}])
    Dataset.from_list([{"prompt": "w4"}]).to_parquet(tmp_path / "prompts.parquet")
    with caplog.at_level("INFO", logger="kto_fused"):
        found = read_prompts([*feedback, *pairs, str(tmp_path / "prompts.parquet")], needs_answers=False)
    assert [record["prompt"] for record in found] == ["w1", "w4", "w6"]
    assert "2 records are left out: repeated prompts" in caplog.text
    answered = read_prompts([*feedback, *pairs], needs_answers=True)
    assert [(record["prompt"], record["answer"]) for record in answered] == [("w1", " w2"), ("w6", " w7")]


def test_columns_labels_and_chat_are_read_as_in_training(tmp_path):
    path = tmp_path / "thumbs.csv"
    path.write_text("question,completion,label\nw1,w2,False\nw3,w4,1\n")
    (found,) = read_prompts([str(path)], needs_answers=True, reading=reading({"prompt": "question"}, chat="always"))
    assert found == {"prompt": [message("user", "w3")], "answer": [message("assistant", "w4")]}
    path.write_text("prompt,completion,label\nw1,w2,up\nw3,w4,down\n")
    words = reading(label_true=["up"], label_false=["down"])
    assert read_prompts([str(path)], needs_answers=True, reading=words) == [{"prompt": "w1", "answer": "w2"}]
    with pytest.raises(DataError, match=r"row 0, field 'label': expected .*, got str 'up': say which labels"):
        read_prompts([str(path)], needs_answers=True)
    conversations = write(tmp_path / "conversations.jsonl", [{"prompt": [message("user", "w1")]}])
    with pytest.raises(DataError, match=r"holds a conversation, .* but chat is 'never'"):
        read_prompts(conversations, needs_answers=False, reading=reading(chat="never"))


@pytest.mark.parametrize("kind", ["text", "conversation"])
def test_prompts_and_answers_have_the_tokens_of_training(tmp_path, monkeypatch, kind):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [
        {"prompt": "w1 w2", "chosen": " w3", "rejected": " w4"},
        {"prompt": "w5", "chosen": " w6 w7", "rejected": " w1"},
    ]
    if kind == "conversation":
        texts = [
            {
                "prompt": [message("user", record["prompt"])],
                **{side: [message("assistant", record[side].strip())] for side in ("chosen", "rejected")},
            }
            for record in texts
        ]
    path, words = write(tmp_path / "pairs.jsonl", texts), chat_tokenizer()
    prompts = tokenized_prompts(read_prompts(path, needs_answers=True), words, max_prompt_tokens=None)
    trained = prepare_paired(path, words).dataset
    assert [one.ids for one in prompts] == trained["prompt_ids"][:]
    assert [one.answer_ids[len(one.ids) :] for one in prompts] == trained["chosen_ids"][:]
    alone = tokenized_prompts(read_prompts(path, needs_answers=False), words, max_prompt_tokens=None)
    assert [one.ids for one in alone] == [one.ids for one in prompts]
    assert alone[0].answer is None


def test_prompts_without_room_are_left_out_and_counted(tmp_path, caplog):
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "w1 w2 w3"}, {"prompt": "w1"}])
    records = read_prompts(path, needs_answers=False)
    assert [one.number for one in tokenized_prompts(records, tokenizer(), max_prompt_tokens=2)] == [1]
    assert "1 of 2 prompts are left out: they have more than 2 tokens" in caplog.text
    with pytest.raises(DataError, match="no prompt is left: all 2 have more than 0 tokens"):
        tokenized_prompts(records, tokenizer(), max_prompt_tokens=0)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"question": "w1"}], r"line 1: expected a record with a prompt, got \['question'\]"),
        ([{"prompt": ""}], "line 1, field 'prompt': expected text, got an empty prompt"),
        ([{"prompt": 3}], "line 1, field 'prompt': expected a list of messages, got int 3"),
        (
            [{"prompt": "w1"}, {"prompt": [message("user", "w1")]}],
            "line 2, field 'prompt': expected all prompts as text",
        ),
    ],
)
def test_a_bad_record_is_named(tmp_path, records, message):
    with pytest.raises(DataError, match=message):
        read_prompts(write(tmp_path / "prompts.jsonl", records), needs_answers=False)
