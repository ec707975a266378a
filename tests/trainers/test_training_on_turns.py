"""Answers of several messages are trained on the assistant's messages alone; pairs of equal sides are left out."""

import pytest
import torch
from datasets import Dataset
from tiny_training import CONFIGS, TRAINERS, data, make_trainer, model
from tiny_training import tokenizer as word_tokenizer

from kto_fused.commands import results, train

pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")

TEMPLATE = (
    "{% for m in messages %}{{ 'w1' if m.role == 'assistant' else 'w2' }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}w1{% endif %}"
)
SECRET, ANSWER = "w7", "w8"


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def records(kind: str) -> Dataset:
    """Return records whose answers have three messages: the assistant's, the user's w7, and the assistant's w8."""
    rows = []
    for row in range(8):
        answers = [
            [turn("assistant", f"w{word}"), turn("user", " ".join([SECRET] * (1 + row % 3))), turn("assistant", ANSWER)]
            for word in (10 + row, 30 + row)
        ]
        prompt = {"prompt": [turn("user", f"w{50 + row}")]}
        rows.append(
            prompt | {"completion": answers[0], "label": row % 2 == 0}
            if kind == "kto"
            else prompt | {"chosen": answers[0], "rejected": answers[1]}
        )
    return Dataset.from_list(rows)


@pytest.mark.parametrize("kind", ["kto", "dpo"])
@pytest.mark.parametrize("precompute", [False, True], ids=["live", "precomputed"])
def test_the_users_message_within_an_answer_gets_no_loss(tmp_path, kind, precompute):
    words = word_tokenizer()
    words.chat_template = TEMPLATE
    args = CONFIGS[kind](
        str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=8,
        max_steps=1,
        report_to=[],
        save_strategy="no",
        precompute_ref_log_probs=precompute,
        ref_cache_dir=str(tmp_path / "references") if precompute else None,
    )
    trainer = TRAINERS[kind](model(), None, args, train_dataset=records(kind), processing_class=words)
    batch = next(iter(trainer.get_train_dataloader()))
    secret, answer = (words.convert_tokens_to_ids(word) for word in (SECRET, ANSWER))
    labelled = [name for name in batch if name.endswith("labels")]
    assert len(labelled) == {"kto": 2, "dpo": 1}[kind]
    for name in labelled:
        inputs, labels = batch[name.replace("labels", "input_ids")], batch[name]
        assert (inputs == secret).any(-1).all()
        assert (labels == answer).any(-1).all()
        assert not (labels == secret).any()
    _, metrics = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    rows = batch["input_ids"]
    rows = rows if kind == "kto" else rows.transpose(0, 1).flatten(0, 1)
    with torch.no_grad():
        logps = trainer.model(input_ids=rows).logits.double().log_softmax(-1)
    expected = [assistant_logps(row.tolist(), logps[number], words) for number, row in enumerate(rows)]
    torch.testing.assert_close(metrics.logps.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)
    # 4 tokens: the first word and w8, each with the end of its message
    assert metrics.token_counts.tolist() == [4] * len(rows)
    trainer.train()
    assert trainer.state.global_step == 1


def assistant_logps(row: list[int], logps: torch.Tensor, words) -> float:
    """Return the sum over the tokens after each w1, up to the end of that message."""
    header, end = words.convert_tokens_to_ids("w1"), words.eos_token_id
    total, is_assistant = 0.0, False
    for place, token in enumerate(row):
        if is_assistant:
            total += logps[place - 1, token].item()
        is_assistant = token == header or (is_assistant and token != end)
    return total


@pytest.mark.parametrize("kind", ["kto", "dpo"])
def test_pairs_of_equal_sides_are_neither_trained_on_nor_scored(tmp_path, kind, capsys):
    pairs = data("dpo", 6).to_list()
    pairs[0]["rejected"] = pairs[0]["chosen"]
    pairs[3]["rejected"] = pairs[3]["chosen"]
    trainer = make_trainer(
        kind,
        tmp_path,
        train=Dataset.from_list(pairs),
        evaluation=Dataset.from_list(pairs[:2]),
        precompute_ref_log_probs=True,
        ref_cache_dir=str(tmp_path / "references"),
    )
    per_pair = {"kto": 2, "dpo": 1}[kind]
    assert len(trainer.train_dataset) == 4 * per_pair
    metrics = train.fit(trainer)
    counts = metrics["data"]["train"]
    assert (counts["examples"], counts["dropped"]) == (4 * per_pair, 2 * per_pair)
    assert metrics["data"]["eval"]["dropped_for"] == {"same_tokens": per_pair}
    if kind == "dpo":
        assert all(row["chosen_ids"] != row["rejected_ids"] for row in trainer.train_dataset)
        assert all(row["ref_chosen_logps"] != row["ref_rejected_logps"] for row in trainer.train_dataset)
    results.print_summary(metrics)
    printed = capsys.readouterr().out
    assert f"train data: {4 * per_pair} examples used, 0 of them with a completion cut to --max_length" in printed
    assert f"{2 * per_pair} dropped (same_tokens {2 * per_pair})" in printed
