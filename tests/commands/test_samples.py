"""Answers before and after training: they are the models' own, move no step, and outlive a stop."""

# ruff: noqa: E402 (where packages are missing, the skip must come before the imports that need them)

import json
from pathlib import Path

import pytest
import torch

for package in ("datasets", "accelerate", "matplotlib"):
    pytest.importorskip(package, reason=f"kto-fused train needs {package}")

from command_runs import command, read_metrics, refusal
from transformers import AutoModelForCausalLM, AutoTokenizer

from kto_fused.commands import cli, progress, samples

pytestmark = pytest.mark.usefixtures("small_machine", "module_cache", "in_a_new_folder")
# the order of the examples is drawn from the random state that sampling must leave alone
DRAWN = ["--train_sampling_strategy", "random", "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1"]
SAMPLED = ["--sample_prompts", "3", "--sample_max_new_tokens", "6"]


def answers_of(folder: str | Path, prompts: list[str]) -> list[str]:
    """Return the most likely six tokens after each prompt, generated one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        new = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        new = new[0, ids.shape[1] :]
        is_cut = tokenizer.eos_token_id not in new
        found.append(tokenizer.decode(new, skip_special_tokens=True) + samples.CUT * is_cut)
    return found


@pytest.mark.parametrize("loss", ["kto", "sft"])
def test_answers_are_the_models_own_and_move_no_step(files, capsys, loss):
    evaluated = ["--eval_data", str(files / f"{loss}-eval.jsonl"), *DRAWN]
    assert cli.main(command(files, loss, *evaluated, *SAMPLED)) == 0
    printed = capsys.readouterr().out
    assert cli.main(command(files, loss, *evaluated, "--output_dir", "plain")) == 0
    assert Path(f"runs/{loss}/model.safetensors").read_bytes() == Path("plain/model.safetensors").read_bytes()
    found = read_metrics(f"runs/{loss}")["samples"]
    assert found["caption"] == "3 prompts of the evaluation data; the most likely tokens, at most 6 of them"
    prompts = [row["prompt"] for row in found["rows"]]
    held_out = {json.loads(line)["prompt"].strip() for line in (files / f"{loss}-eval.jsonl").open()}
    assert len(set(prompts)) == 3
    assert {prompt.strip() for prompt in prompts} <= held_out
    assert [row["before"] for row in found["rows"]] == answers_of(files / "model", prompts)
    assert [row["after"] for row in found["rows"]] == answers_of(f"runs/{loss}", prompts)
    assert [row["before"] for row in found["rows"]] != [row["after"] for row in found["rows"]]
    page = Path(f"runs/{loss}/report.html").read_text()
    for row in found["rows"]:
        assert all(f"<td>{text}</td>" in page for text in row.values())
        assert f"prompt: {row['prompt']}" in printed
    assert f"before: {found['rows'][0]['before'].split()[0]}" in printed
    assert " | after:" in printed


def test_a_resumed_run_keeps_the_answers_of_its_first_part(files, monkeypatch, capsys):
    lora = [*DRAWN, "--lora_rank", "2", "--sample_temperature", "0.7"]
    arguments = command(files, "kto", *lora, *SAMPLED)
    assert cli.main([*arguments, "--output_dir", "whole"]) == 0

    def press(self, args, state, control, **kwargs):
        self.is_pressed = state.global_step == 1

    with monkeypatch.context() as patch:
        patch.setattr(progress.StopOnCtrlC, "on_step_begin", press)
        assert cli.main(arguments) == 130
    capsys.readouterr()
    assert cli.main([*arguments, "--resume_from_checkpoint", "true"]) == 0
    printed = capsys.readouterr().out
    assert "prompts after training" in printed
    assert "prompts before training" not in printed
    whole, resumed = read_metrics("whole"), read_metrics("runs/kto")
    assert resumed["samples"] == whole["samples"]
    assert (whole["resumed_at"], resumed["resumed_at"]) == (0, 2)
    assert (
        "training data, because there are no evaluation data; tokens drawn at temperature 0.7"
        in (whole["samples"]["caption"])
    )
    weights = [Path(folder, "adapter_model.safetensors").read_bytes() for folder in ("whole", "runs/kto")]
    assert weights[0] == weights[1]
    # other samples than the first part's: the model that the run began with answers again
    assert cli.main([*arguments, "--sample_max_new_tokens", "2", "--resume_from_checkpoint", "true"]) == 0
    assert "prompts before training" in capsys.readouterr().out
    short = [row["before"].removesuffix(samples.CUT) for row in read_metrics("runs/kto")["samples"]["rows"]]
    whole = [row["before"] for row in whole["samples"]["rows"]]
    assert all(text.startswith(part) for text, part in zip(whole, short, strict=True))


def test_samples_that_cannot_be_had_are_refused(files, capsys):
    Path("texts.jsonl").write_text("".join(json.dumps({"text": f"w{number} w3"}) + "\n" for number in range(8)))
    texts = ["train", "--model", str(files / "model"), "--data", "texts.jsonl", "--loss", "sft", "--use_cpu"]
    for arguments, message in (
        (command(files, "reward", *SAMPLED), "no meaning for a reward model"),
        (command(files, "kto", *SAMPLED, "--fsdp", "full_shard"), "no meaning with FSDP or DeepSpeed"),
        (command(files, "kto", "--sample_prompts", "-1"), "sample_prompts must be at least 0, got -1"),
        (command(files, "kto", "--sample_max_new_tokens", "4"), "set sample_prompts too"),
        (command(files, "kto", "--sample_prompts", "2", "--sample_temperature", "nan"), "finite number >= 0, got nan"),
        (
            command(files, "kto", "--sample_prompts", "2", "--sample_max_new_tokens", "1024"),
            "hold no prompt of at most 0 tokens, which leaves room for 1024 new ones",
        ),
        (command(files, "sft", *SAMPLED, "--packing", "--max_length", "32"), "finds no prompts in packed data"),
        ([*texts, *SAMPLED], "the training data hold no prompt"),
        (["demo", "--device", "cpu", "--sample_prompts", "-2"], "sample_prompts must be at least 0, got -2"),
    ):
        assert message in refusal(capsys, arguments)


def test_columns_stand_side_by_side_and_steer_no_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "63")
    rows = [{"prompt": "p", "before": "a " * 30, "after": "\x1b[31mred\tx\n\ny"}]
    printed = samples.lines({"caption": "1 prompt", "rows": rows})
    assert printed == [
        "samples: 1 prompt",
        "",
        "prompt: p",
        f"{'before: ' + ('a ' * 11).strip():30} | after:  [31mred x",
        f"{('a ' * 15).strip():30} |",
        f"{'a a a a':30} | y",
    ]
    assert torch.initial_seed() == 0  # the fixture's: nothing here draws
