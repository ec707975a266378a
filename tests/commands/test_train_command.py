"""The command ``kto-fused``: what ``train`` leaves behind and resumes, how flags and YAML are read, how it fails."""

# ruff: noqa: E402 (where packages are missing, their absence comes before the imports that need it)

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import safetensors.torch
import torch

for package in ("datasets", "accelerate", "matplotlib"):
    pytest.importorskip(package, reason=f"kto-fused train needs {package}")

import datasets
import tiny_training
import yaml
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from kto_fused.commands import cli, estimate, flags, train
from kto_fused.commands.errors import CommandError
from kto_fused.trainers import checkpoints

ROOT = Path(__file__).parents[2]
FAST = ["--use_cpu", "--disable_tqdm", "--learning_rate", "0.01", "--per_device_train_batch_size", "4"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A model, and data for both losses."""
    folder = tmp_path_factory.mktemp("files")
    tiny_training.model(max_position_embeddings=1024).save_pretrained(folder / "model")
    tiny_training.tokenizer().save_pretrained(folder / "model")
    for loss in ("kto", "dpo"):
        tiny_training.data(loss, 16).to_json(folder / f"{loss}.jsonl")
        tiny_training.data(loss, 8, seed=1).to_json(folder / f"{loss}-eval.jsonl")
    return folder


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def command(files: Path, loss: str, *more: str) -> list[str]:
    data = ["--model", str(files / "model"), "--data", str(files / f"{loss}.jsonl"), "--loss", loss]
    return ["train", *data, *FAST, *more]


def results(folder: str | Path) -> dict:
    return json.loads((Path(folder) / "metrics.json").read_text())


def losses(folder: str | Path) -> list[float]:
    return [step["loss"] for step in results(folder)["steps"]]


# what train does


def test_kto_leaves_a_trained_model_curves_and_metrics(files, capsys):
    assert cli.main(command(files, "kto", "--num_train_epochs", "2", "--logging_steps", "3")) == 0
    trained = AutoModelForCausalLM.from_pretrained("runs/kto")
    assert not torch.equal(trained.lm_head.weight, tiny_training.model().lm_head.weight)
    assert AutoTokenizer.from_pretrained("runs/kto").get_vocab() == tiny_training.tokenizer().get_vocab()
    assert Path("runs/kto/curves.png").read_bytes().startswith(b"\x89PNG")
    metrics = results("runs/kto")
    assert [step["step"] for step in metrics["steps"]] == [1, 3, 6, 8]  # the first and the last too
    counts = {"examples": 16, "truncated": 0, "dropped": 0, "dropped_for": {}, "found": {}}
    assert metrics["data"] == {"train": counts}
    assert metrics["settings"]["model"] == str(files / "model")
    assert metrics["config"]["learning_rate"] == 0.01

    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    (header,) = (line for line in lines if line[:1] == ["step"] and "loss" in line)
    assert header == ["step", "loss", "chosen", "rejected", "margin", "z0"]
    first, last = metrics["steps"][0], metrics["steps"][-1]
    assert ["8", *(f"{last[name]:.4f}" for name in train.LINE if name in last)] in lines
    assert ["loss", f"{first['loss']:.4f}", f"{last['loss']:.4f}"] in lines
    assert f"{last['num_tokens']} tokens" in printed
    assert "train data: 16 examples, 0 with a completion cut" in printed


def test_a_first_batch_of_one_class_hides_no_column(files, capsys):
    assert cli.main(command(files, "kto", "--per_device_train_batch_size", "1", "--logging_steps", "1")) == 0
    assert [name for name in train.REWARDS if name not in results("runs/kto")["steps"][0]]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["step", "loss", "chosen", "rejected", "margin", "z0"] in lines
    assert sum(line[:1] == ["1"] and line.count("-") == 2 and len(line) == 6 for line in lines) == 1


def test_dpo_is_evaluated_after_each_epoch(files, capsys):
    evaluation = ["--eval_data", str(files / "dpo-eval.jsonl"), "--num_train_epochs", "2", "--save_strategy", "no"]
    assert cli.main(command(files, "dpo", *evaluation)) == 0
    metrics = results("runs/dpo")
    assert [entry["step"] for entry in metrics["evaluations"]] == [4, 8]
    assert "eval_rewards/accuracies" in metrics["evaluations"][0]
    assert metrics["data"]["eval"]["examples"] == 8
    printed = capsys.readouterr().out
    assert len(re.findall("^ +[48] .* evaluation$", printed, re.MULTILINE)) == 2
    assert re.search("^rewards/accuracies( +[01][.][0-9]{4}){4}$", printed, re.MULTILINE)


def test_what_was_cut_and_dropped_is_reported(files, capsys):
    assert cli.main(command(files, "kto", "--max_length", "6", "--max_steps", "1")) == 0
    counts = results("runs/kto")["data"]["train"]
    assert counts["truncated"] > 0
    printed = capsys.readouterr().out
    assert f"{counts['examples']} examples, {counts['truncated']} with a completion cut at --max_length" in printed


@pytest.mark.parametrize(("flags", "length"), [([], 512), (["--max_length", "null"], 512), (["--max_length", "9"], 9)])
def test_a_model_of_few_positions_is_trained_within_them(files, flags, length):
    tiny_training.model(max_position_embeddings=512).save_pretrained("model")
    tiny_training.tokenizer().save_pretrained("model")
    assert cli.main(command(files, "kto", "--model", "model", "--max_steps", "1", *flags)) == 0
    assert results("runs/kto")["config"]["max_length"] == length


def test_lora_saves_an_adapter_of_the_asked_rank(files):
    pytest.importorskip("peft")
    lora = ["--lora_rank", "2", "--lora_target_modules", "q_proj", "v_proj", "--max_steps", "2"]
    assert cli.main(command(files, "kto", *lora)) == 0
    adapter = json.loads(Path("runs/kto/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], set(adapter["target_modules"])) == (2, 4, {"q_proj", "v_proj"})


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], "float32"), (["--lora_rank", "2"], "bfloat16"), (["--lora_rank", "2", "--dtype", "float32"], "float32")],
)
def test_an_adapters_base_is_kept_as_it_was_saved(files, flags, expected):
    pytest.importorskip("peft")
    tiny_training.model().to(torch.bfloat16).save_pretrained("half")
    tiny_training.tokenizer().save_pretrained("half")
    assert cli.main(command(files, "kto", "--model", "half", "--max_steps", "1", *flags)) == 0
    assert results("runs/kto")["settings"]["dtype"] == expected


def test_the_base_of_a_model_without_adapters_is_refused(files, capsys):
    assert cli.main(command(files, "kto", "--reference", "base")) == 2
    assert "reference='base' is the model with its adapters off, and model has no" in capsys.readouterr().err
    assert cli.main(command(files, "kto", "--reference", "base", "--lora_rank", "2", "--max_steps", "1")) == 0
    assert results("runs/kto")["config"]["reference"] == "base"


def test_an_adapter_is_no_model_to_start_from(files, capsys):
    pytest.importorskip("peft")
    assert cli.main(command(files, "kto", "--lora_rank", "2", "--max_steps", "1", "--output_dir", "adapter")) == 0
    arguments = command(files, "kto", "--output_dir", "out")
    arguments[arguments.index("--model") + 1] = "adapter"
    assert cli.main(arguments) == 2
    assert "--model adapter is an adapter: merge it" in capsys.readouterr().err


def test_a_reference_of_its_own_gives_another_loss(files):
    tiny_training.model(seed=1).save_pretrained("ref")
    tiny_training.tokenizer().save_pretrained("ref")
    few = ["--max_steps", "1", "--loss", "dpo"]
    assert cli.main(command(files, "dpo", *few)) == 0
    assert cli.main(command(files, "dpo", *few, "--ref_model", "ref", "--output_dir", "other")) == 0
    assert losses("runs/dpo")[0] == pytest.approx(0.6931, abs=1e-4)
    assert abs(losses("other")[0] - 0.6931) > 0.01


def test_metrics_and_curves_are_written_both_or_neither(tmp_path, monkeypatch):
    entry = {"step": 1, "loss": 0.5, "rewards/chosen": 0.1}
    train.write("out", {"steps": [entry], "evaluations": []})
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert sorted(before) == ["curves.png", "metrics.json"]

    def full_disk(metrics, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train, "plot", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train.write("out", {"steps": [entry, entry], "evaluations": []})
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


# Ctrl-C and resuming


def test_ctrl_c_saves_a_checkpoint_and_resuming_ends_as_if_it_had_not_been(files, tmp_path):
    arguments = command(files, "kto", "--max_steps", "150", "--logging_steps", "1")
    stopped = [*arguments, "--output_dir", str(tmp_path / "stopped")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    with subprocess.Popen(
        [sys.executable, "-m", "kto_fused", *stopped],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
    ) as process:
        while process.stdout.readline().split()[:1] != ["1"]:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "finishing this step, then saving a checkpoint" in errors
    assert "\nThe reference is a frozen copy of the model as it is before training.\n" in errors
    assert "(--undesirable_weight 1.25).\n" in errors
    step = int(re.search("Stopped after step ([0-9]+) of 150", printed)[1])
    assert 1 <= step < 150
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert not (tmp_path / "stopped" / "metrics.json").exists()

    assert cli.main([*stopped, "--resume_from_checkpoint", "true"]) == 0
    assert cli.main([*arguments, "--output_dir", "whole"]) == 0
    assert len(losses("whole")) == 150
    assert losses("stopped") == losses("whole")


def test_the_first_ctrl_c_waits_for_the_step_the_second_does_not():
    before = signal.getsignal(signal.SIGINT)
    with train.CtrlC() as ctrl_c:
        signal.raise_signal(signal.SIGINT)
        assert ctrl_c.is_pressed
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def press_ctrl_c_after(monkeypatch, step: int) -> None:
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train.CtrlC, "on_step_begin", on_step_begin)


@pytest.mark.parametrize("due", [["--save_strategy", "epoch"], ["--eval_steps", "2"]], ids=["epoch", "steps"])
def test_a_stop_does_not_evaluate(files, monkeypatch, capsys, due):
    press_ctrl_c_after(monkeypatch, 1)
    assert cli.main(command(files, "kto", "--eval_data", str(files / "kto-eval.jsonl"), *due)) == 130
    printed = capsys.readouterr().out
    assert "Stopped after step 2 of 12, saved in runs/kto/checkpoint-2" in printed
    assert "evaluation" not in printed
    assert not Path("runs/kto/metrics.json").exists()


def test_results_are_there_where_the_upload_fails(files, monkeypatch, capsys):
    def no_network(self, *_, **__):
        raise ConnectionRefusedError("nobody listens")

    monkeypatch.setattr(train.FusedTrainer, "init_hf_repo", lambda self, **_: None)
    monkeypatch.setattr(train.FusedTrainer, "push_to_hub", no_network)
    flags = ["--push_to_hub", "--max_steps", "1", "--save_strategy", "no"]
    assert cli.main(command(files, "kto", *flags)) == 2
    message = "runs/kto holds all results, but could not be uploaded: nobody listens"
    assert message in capsys.readouterr().err
    assert results("runs/kto")["steps"]
    assert Path("runs/kto/model.safetensors").exists()


def test_ctrl_c_in_the_last_step_changes_nothing(files, monkeypatch):
    press_ctrl_c_after(monkeypatch, 2)
    assert cli.main(command(files, "kto", "--max_steps", "3")) == 0
    assert Path("runs/kto/metrics.json").exists()


def test_ctrl_c_before_training_ends_the_command(files, monkeypatch, capsys):
    monkeypatch.setattr(train, "make_trainer", lambda *_: signal.raise_signal(signal.SIGINT))
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert cli.main(command(files, "kto")) == 130
    finally:
        signal.signal(signal.SIGINT, previous)
    assert capsys.readouterr().err == "kto-fused train: interrupted\n"


def test_a_run_is_resumed_from_a_named_checkpoint(files):
    arguments = command(files, "kto", "--logging_steps", "1", "--save_steps", "2", "--save_total_limit", "9")
    assert cli.main([*arguments, "--max_steps", "6", "--lr_scheduler_type", "constant"]) == 0
    whole = losses("runs/kto")
    resumed = ["--max_steps", "6", "--lr_scheduler_type", "constant", "--output_dir", "again"]
    assert cli.main([*arguments, *resumed, "--resume_from_checkpoint", "runs/kto/checkpoint-4"]) == 0
    assert losses("again") == whole


def test_a_folder_with_another_runs_checkpoint_is_refused(files, capsys):
    assert cli.main(command(files, "kto", "--max_steps", "1")) == 0
    before = results("runs/kto")
    assert cli.main(command(files, "kto", "--max_steps", "2")) == 2
    assert "--output_dir runs/kto holds checkpoint-1 of another run" in capsys.readouterr().err
    assert results("runs/kto") == before


@pytest.mark.parametrize("ends", [["--max_steps", "3"], ["--num_train_epochs", "0.7"]], ids=["steps", "epochs"])
def test_a_run_that_has_ended_is_not_trained_further(files, capsys, ends):
    arguments = command(files, "kto", "--logging_steps", "1", "--lr_scheduler_type", "constant", *ends)
    assert cli.main(arguments) == 0  # three of an epoch's four steps
    before, weights = losses("runs/kto"), Path("runs/kto/model.safetensors").read_bytes()
    for lost in ("metrics.json", "model.safetensors"):
        Path("runs/kto", lost).unlink()  # as if it had been killed before it wrote them
    capsys.readouterr()
    assert cli.main([*arguments, "--resume_from_checkpoint", "true"]) == 0
    assert "The checkpoint has all 3 steps: nothing is trained" in capsys.readouterr().out
    assert losses("runs/kto") == before
    assert Path("runs/kto/model.safetensors").read_bytes() == weights
    assert [path.name for path in Path("runs/kto").glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_checkpoint_of_more_steps_than_asked_for_is_refused(files, capsys):
    assert cli.main(command(files, "kto", "--max_steps", "2")) == 0
    before = results("runs/kto")
    assert cli.main(command(files, "kto", "--max_steps", "1", "--resume_from_checkpoint", "true")) == 2
    assert "runs/kto/checkpoint-2 has 2 steps already, but --max_steps is 1" in capsys.readouterr().err
    assert results("runs/kto") == before


def test_a_stop_saves_all_even_where_checkpoints_hold_the_model_alone(files, monkeypatch):
    arguments = command(files, "kto", "--max_steps", "4", "--logging_steps", "1", "--save_only_model", "true")
    assert cli.main([*arguments, "--output_dir", "whole"]) == 0
    with monkeypatch.context() as patch:
        press_ctrl_c_after(patch, 1)
        assert cli.main(arguments) == 130
    assert cli.main([*arguments, "--resume_from_checkpoint", "true"]) == 0
    assert losses("runs/kto") == losses("whole")
    assert not Path("runs/kto/checkpoint-4/optimizer.pt").exists()


@pytest.mark.parametrize("best", [["--load_best_model_at_end"], ["--metric_for_best_model", "rewards/margins"]])
def test_a_stop_keeps_its_checkpoint_beside_the_best_one(files, monkeypatch, best):
    evaluated = ["--eval_data", str(files / "kto-eval.jsonl"), "--eval_steps", "1", "--save_steps", "1", *best]
    arguments = command(files, "kto", "--max_steps", "4", "--logging_steps", "1", *evaluated)
    with monkeypatch.context() as patch:
        press_ctrl_c_after(patch, 2)
        patch.setattr(train.FusedTrainer, "_determine_best_metric", first_is_best)
        assert cli.main(arguments) == 130
    assert {path.name for path in Path("runs/kto").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-3"}
    assert cli.main([*arguments, "--resume_from_checkpoint", "true"]) == 0


def test_a_stop_leaves_its_checkpoint_alone_where_none_is_best(files, monkeypatch):
    press_ctrl_c_after(monkeypatch, 2)
    assert cli.main(command(files, "kto", "--max_steps", "4", "--save_steps", "1")) == 130
    assert [path.name for path in Path("runs/kto").glob("checkpoint-*")] == ["checkpoint-3"]


def first_is_best(self, metrics, trial) -> bool:
    is_first = self.state.best_metric is None
    if is_first:
        self.state.best_metric, self.state.best_global_step = 0.0, self.state.global_step
    return is_first


def test_a_folder_of_another_run_or_model_is_refused(files, capsys):
    assert cli.main(command(files, "kto", "--max_steps", "1", "--save_strategy", "no")) == 0
    before = results("runs/kto")
    assert cli.main(command(files, "kto", "--max_steps", "2", "--lora_rank", "2")) == 2
    assert "--output_dir runs/kto holds metrics.json of another model or run" in capsys.readouterr().err
    assert results("runs/kto") == before
    assert cli.main(command(files, "kto", "--max_steps", "1", "--output_dir", "other")) == 0
    elsewhere = ["--max_steps", "2", "--resume_from_checkpoint", "other/checkpoint-1"]
    assert cli.main(command(files, "kto", *elsewhere)) == 2
    assert "--output_dir runs/kto holds metrics.json of another model or run" in capsys.readouterr().err
    assert cli.main(command(files, "kto", *elsewhere, "--output_dir", "other")) == 0
    capsys.readouterr()
    assert cli.main(command(files, "kto", "--output_dir", str(files / "model"))) == 2
    assert "holds config.json of another model or run" in capsys.readouterr().err


def test_a_checkpoint_of_the_other_loss_is_refused(files, capsys):
    assert cli.main(command(files, "kto", "--max_steps", "1")) == 0
    resumed = ["--output_dir", "runs/kto", "--max_steps", "2", "--resume_from_checkpoint", "true"]
    assert cli.main(command(files, "dpo", *resumed)) == 2
    assert "is of a run with --loss kto: go on with that" in capsys.readouterr().err


def test_an_incomplete_checkpoint_is_passed_over_for_a_complete_one_or_refused(files, capsys):
    arguments = command(files, "kto", "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1")
    kept = [*arguments, "--save_total_limit", "9"]
    assert cli.main([*kept, "--output_dir", "whole"]) == 0
    assert cli.main(kept) == 0
    Path("runs/kto/checkpoint-4/trainer_state.json").unlink()
    assert cli.main([*kept, "--resume_from_checkpoint", "runs/kto/checkpoint-4"]) == 2
    assert "checkpoint-4 is no checkpoint: it has no trainer_state.json" in capsys.readouterr().err
    assert cli.main([*kept, "--resume_from_checkpoint", "true"]) == 0
    assert losses("runs/kto") == losses("whole")
    for step in (2, 4):
        Path(f"runs/kto/checkpoint-{step}/optimizer.pt").unlink()
    capsys.readouterr()
    assert cli.main([*kept, "--resume_from_checkpoint", "true"]) == 2
    message = capsys.readouterr().err
    assert "--resume_from_checkpoint true: runs/kto holds no complete checkpoint" in message
    assert "runs/kto/checkpoint-4/optimizer.pt is missing; runs/kto/checkpoint-2/optimizer.pt is missing" in message


@pytest.mark.parametrize("other", ["--beta", "--data", "--model"])
def test_other_options_data_and_weights_are_refused_unless_asked_for(files, capsys, other):
    tiny_training.model(seed=1, max_position_embeddings=1024).save_pretrained("model")
    tiny_training.tokenizer().save_pretrained("model")
    values = {"--beta": "0.3", "--data": str(files / "kto-eval.jsonl"), "--model": "model"}
    names = {
        "--beta": "beta: 0.1 in the checkpoint, 0.3 now",
        "--data": "train_data: ",
        "--model": "reference_weights: ",
    }
    arguments = command(files, "kto", "--max_steps", "1")
    assert cli.main(arguments) == 0
    resumed = [*command(files, "kto", "--max_steps", "2", other, values[other]), "--resume_from_checkpoint", "true"]
    assert cli.main(resumed) == 2
    message = capsys.readouterr().err
    assert f"runs/kto/checkpoint-1 belongs to another run ({names[other]}" in message
    assert "--resume_anyway" in message
    assert cli.main([*resumed, "--resume_anyway"]) == 0


def test_a_second_command_in_the_same_folder_is_refused(files, capsys):
    Path("runs/kto").mkdir(parents=True)
    Path("runs/kto", checkpoints.RUNNING).write_text('{"pid": 1, "host": "elsewhere", "started": "today"}')
    with FileLock(Path("runs/kto", checkpoints.LOCK)):
        assert cli.main(command(files, "kto")) == 2
    message = "another run writes into runs/kto (process 1 on elsewhere, started today): wait until it ends"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["all-linear", ".*[qv]_proj", "self_attn.q_proj"])
def test_layers_to_adapt_by_name_or_pattern(files, name):
    pytest.importorskip("peft")
    assert cli.main(command(files, "kto", "--max_steps", "1", "--lora_rank", "2", "--lora_target_modules", name)) == 0
    adapted = safetensors.torch.load_file("runs/kto/adapter_model.safetensors").keys()
    layers = {key.split(".lora_")[0].rpartition(".")[2] for key in adapted}
    expected = {"self_attn.q_proj": {"q_proj"}, ".*[qv]_proj": {"q_proj", "v_proj"}}
    assert layers == expected.get(name, layers)
    assert ("down_proj" in layers) == (name == "all-linear")


def test_fewer_examples_than_a_batch_that_must_be_whole(files, capsys):
    arguments = ["--per_device_train_batch_size", "17", "--dataloader_drop_last"]
    assert cli.main(command(files, "kto", *arguments)) == 2
    assert "16 examples are less than a batch of 17" in capsys.readouterr().err
    assert not Path("runs/kto/config.json").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--eval_steps", "2"],
        ["--eval_on_start"],
        ["--eval_delay", "100"],
        ["--load_best_model_at_end"],
        ["--metric_for_best_model", "loss"],
        ["--save_strategy", "best"],
    ],
    ids=lambda flags: flags[0],
)
def test_evaluations_of_nothing_are_refused(files, capsys, flags):
    assert cli.main(command(files, "kto", *flags)) == 2
    assert f"{flags[0]} needs --eval_data" in capsys.readouterr().err


def test_a_file_for_several_runs_may_say_how_often_none_is_evaluated(files):
    assert cli.main(command(files, "kto", "--max_steps", "1", "--eval_strategy", "no", "--eval_steps", "5")) == 0


def test_the_best_of_no_evaluations_is_refused(files, capsys):
    flags = ["--eval_data", str(files / "kto-eval.jsonl"), "--eval_strategy", "no", "--metric_for_best_model", "loss"]
    assert cli.main(command(files, "kto", *flags)) == 2
    assert "--metric_for_best_model needs evaluations, but --eval_strategy is no" in capsys.readouterr().err


def test_a_metric_of_both_labels_evaluated_on_one_is_one_sentence(files, tmp_path, capsys):
    liked = [line for line in (files / "kto-eval.jsonl").read_text().splitlines() if json.loads(line)["label"]]
    (tmp_path / "liked.jsonl").write_text("\n".join(liked))
    evaluated = ["--eval_data", str(tmp_path / "liked.jsonl"), "--metric_for_best_model", "rewards/margins"]
    assert cli.main(command(files, "kto", "--max_steps", "1", *evaluated)) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert "eval_rewards/margins" in message


@pytest.mark.parametrize("loss", ["kto", "dpo"])
def test_the_best_model_is_chosen_by_what_an_evaluation_finds(files, capsys, loss):
    evaluated = ["--eval_data", str(files / f"{loss}-eval.jsonl")]
    assert cli.main(command(files, loss, *evaluated, "--metric_for_best_model", "rewards/margin")) == 2
    assert "--metric_for_best_model rewards/margin is not evaluated: expected one of" in capsys.readouterr().err
    assert cli.main(command(files, loss, *evaluated, "--max_steps", "1")) == 0
    (found,) = results(f"runs/{loss}")["evaluations"]
    own = {"epoch", "step", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    known = {f"eval_{name}" for name in train.EVALUATED + train.EVALUATED_ALONE[loss]}
    assert found.keys() - own == known


def test_a_finished_run_that_logged_no_step_gets_its_results(files, tmp_path, capsys):
    settings = {"per_device_train_batch_size": 8, "logging_steps": 10, "save_strategy": "epoch"}
    tiny_training.make_trainer("kto", tmp_path / "runs" / "kto", train=str(files / "kto.jsonl"), **settings).train()
    batches = ("--num_train_epochs", "1", "--per_device_train_batch_size", "8")
    again = (*batches, "--resume_from_checkpoint", "true", "--resume_anyway")
    assert cli.main(command(files, "kto", *again)) == 0
    assert "examples a second" in capsys.readouterr().out
    assert results("runs/kto")["steps"] == []
    assert Path("runs/kto/curves.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_that_json_does_not_have():
    train.write("results", {"steps": [{"step": 1, "loss": float("nan"), "grad_norm": float("inf")}], "evaluations": []})
    assert results("results")["steps"] == [{"step": 1, "loss": None, "grad_norm": None}]


def test_not_to_resume_can_be_said(files, capsys):
    arguments = command(files, "kto", "--max_steps", "1", "--resume_from_checkpoint", "false")
    assert cli.main(arguments) == 0
    assert cli.main(arguments) == 2
    assert "holds checkpoint-1 of another run" in capsys.readouterr().err


def test_a_model_alone_is_no_checkpoint_to_go_on_from(files, capsys):
    arguments = command(files, "kto", "--save_steps", "2", "--save_only_model", "true")
    assert cli.main([*arguments, "--max_steps", "2"]) == 0
    before = results("runs/kto")
    assert cli.main([*arguments, "--max_steps", "4", "--resume_from_checkpoint", "true"]) == 2
    message = capsys.readouterr().err
    assert "runs/kto/checkpoint-2 holds a model alone (--save_only_model)" in message
    assert "(--model runs/kto/checkpoint-2, another --output_dir)" in message
    assert results("runs/kto") == before
    assert cli.main([*arguments, "--max_steps", "2", "--resume_from_checkpoint", "true"]) == 0  # nothing is left


@pytest.mark.parametrize(
    ("flags", "difference", "reason"),
    [
        (["--lora_rank", "4"], "adapter.default.r: 2 in the checkpoint, 4 now", "size mismatch"),
        (["--lora_rank", "2", "--lora_target_modules", "q_proj"], "adapter.default.target_modules", "parameter group"),
        ([], "adapter.default.r: 2 in the checkpoint, none", "Can't find a checkpoint index"),
    ],
    ids=["rank", "layers", "none"],
)
def test_a_checkpoint_of_another_adapter_is_one_sentence(files, capsys, flags, difference, reason):
    pytest.importorskip("peft")
    assert cli.main(command(files, "kto", "--max_steps", "1", "--lora_rank", "2")) == 0
    capsys.readouterr()
    resumed = command(files, "kto", "--max_steps", "2", *flags, "--resume_from_checkpoint", "true")
    assert cli.main(resumed) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("kto-fused train: "))
    assert "runs/kto/checkpoint-1 belongs to another run" in line
    assert difference in line
    assert len(line) < 1000
    assert cli.main([*resumed, "--resume_anyway"]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("kto-fused train: "))
    assert "runs/kto/checkpoint-1 does not fit this model: go on with the --model and the LoRA flags it was" in line
    assert reason in line
    assert len(line) < 500


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (RuntimeError("a kernel's own"), RuntimeError, "a kernel's own"),
        (torch.OutOfMemoryError("CUDA out of memory"), CommandError, "the GPU's memory is not enough"),
    ],
)
def test_other_errors_of_a_resumed_run_are_not_taken_for_another_adapters(files, monkeypatch, error, expected, message):
    def fails(*_, **__):
        raise error

    assert cli.main(command(files, "kto", "--max_steps", "1")) == 0
    monkeypatch.setattr(train.FusedKTOTrainer, "train", fails)
    with pytest.raises(expected, match=message):
        train.main(command(files, "kto", "--max_steps", "2", "--resume_from_checkpoint", "true")[1:])


# flags and YAML


def test_every_field_is_a_flag_but_those_that_would_change_nothing():
    for loss, kind in train.CONFIGS.items():
        settings, config = train.parse(["--model", "m", "--data", "d", "--loss", loss, "--use_cpu"])
        names = {field.name for field in fields(kind) if field.init}
        assert names > set(train.LEFT_OUT)
        parser = train.flags_of(loss)
        flags = {action.dest for action in parser._actions} - {"help", "config"}
        assert flags == names - set(train.LEFT_OUT) | {field.name for field in fields(train.TrainSettings)}
        assert (settings.loss, type(config)) == (loss, kind)


def test_defaults_train_at_once():
    _, config = train.parse(["--model", "m", "--data", "d", "--use_cpu"])
    assert (config.output_dir, config.report_to, config.save_total_limit) == ("runs/kto", [], 1)
    assert train.parse(["--model", "m", "--data", "d", "--use_cpu", "--loss", "dpo"])[1].output_dir == "runs/dpo"
    assert config.eval_strategy == "no"
    assert config.max_length == "auto"


@pytest.mark.parametrize(
    ("flags", "expected"), [([], "epoch"), (["--eval_steps", "5"], "steps"), (["--eval_strategy", "no"], "no")]
)
def test_evaluation_data_are_used(flags, expected):
    _, config = train.parse(["--model", "m", "--data", "d", "--use_cpu", "--eval_data", "e", *flags])
    assert config.eval_strategy == expected


@pytest.mark.parametrize(("flags", "expected"), [([], True), (["--fp16"], False), (["--bf16", "false"], False)])
def test_a_gpu_with_bfloat16_computes_in_it(monkeypatch, flags, expected):
    monkeypatch.setattr(train, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(train, "build", lambda kind, values: values["bf16"])  # which would look for the GPU
    assert train.parse(["--model", "m", "--data", "d", *flags])[1] is expected


def test_a_gpu_that_emulates_bfloat16_computes_in_it_only_if_asked(monkeypatch):
    monkeypatch.setattr(train, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(train, "build", lambda kind, values: values["bf16"])
    flags = ["--model", "m", "--data", "d"]
    assert [train.parse([*flags, *more])[1] for more in ([], ["--bf16"])] == [False, True]


FILE = """
model: m
data: [a.jsonl, b.jsonl]
loss: dpo
loss_type: simpo
learning_rate: 1e-3
max_length: null
save_strategy: no
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
lora_rank: 4
lora_target_modules: [q_proj]
backend: torch
gamma: 0.25
use_cpu: yes
"""
FLAGS = [
    *("--model", "m", "--data", "a.jsonl", "b.jsonl", "--loss", "dpo", "--loss_type", "simpo"),
    *("--learning_rate", "1e-3"),
    *("--max_length", "null", "--save_strategy", "no", "--gradient_checkpointing"),
    *("--gradient_checkpointing_kwargs", '{"use_reentrant": false}', "--lora_rank", "4"),
    *("--lora_target_modules", "q_proj", "--backend", "torch", "--gamma", "0.25", "--use_cpu"),
]


def said(arguments: list[str]) -> list[dict]:
    settings, config = train.parse(arguments)
    return [vars(settings), config.to_dict()]


def test_a_file_says_what_flags_say():
    Path("file.yaml").write_text(FILE)
    settings, config = train.parse(["--config", "file.yaml"])
    assert said(["--config", "file.yaml"]) == said(FLAGS)
    assert settings.data == ["a.jsonl", "b.jsonl"]
    assert (config.max_length, config.learning_rate, config.save_strategy) == (None, 1e-3, "no")
    assert config.gradient_checkpointing_kwargs == {"use_reentrant": False}


def parsed(text: str) -> tuple[train.TrainSettings, train.FusedPreferenceConfig]:
    Path("file.yaml").write_text(f"model: m\ndata: d\nuse_cpu: true\n{text}\n")
    return train.parse(["--config", "file.yaml"])


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("{min_lr: 1e-7, num_cycles: 2}", {"min_lr": 1e-7, "num_cycles": 2}),
        ("{a: -1, b: -.5, c: +2.5E+3}", {"a": -1, "b": -0.5, "c": 2500.0}),
        ("{a: true, b: False, c: null, d: ~, e: }", {"a": True, "b": False, "c": None, "d": None, "e": None}),
        (
            "{a: nan, b: inf, c: no, d: 1e999, e: 'null'}",
            {"a": "nan", "b": "inf", "c": "no", "d": "1e999", "e": "null"},
        ),
        ("{a: {b: [1, 1e-2, x, null]}}", {"a": {"b": [1, 0.01, "x", None]}}),
    ],
)
def test_a_mapping_keeps_its_numbers(written, value):
    given = parsed(f"lr_scheduler_kwargs: {written}")[1].lr_scheduler_kwargs
    assert given == value
    assert repr(given) == repr(value)  # 1 is not 1.0, nor True


def test_a_mapping_is_one_whatever_it_holds():
    """transformers' hint of this one is dict[str, bool], not dict | str."""
    assert parsed("liger_kernel_config: {fused_linear_cross_entropy: false}")[1].liger_kernel_config == {
        "fused_linear_cross_entropy": False
    }
    with pytest.raises(
        CommandError, match="liger_kernel_config/--liger-kernel-config: invalid mapping in JSON value: '3'"
    ):
        parsed("liger_kernel_config: 3")


@pytest.mark.parametrize("null", ["null", "~", "", "Null"])
def test_null_is_as_not_given(null):
    names = ["ref_model", "run_name", "eval_data", "lora_alpha", "lora_target_modules", "report_to", "loss"]
    names += ["output_dir", "learning_rate", "save_strategy", "bf16", "resume_from_checkpoint"]
    settings, config = parsed("\n".join(f"{name}: {null}" for name in names))
    plain_settings, plain = parsed("")
    assert settings == plain_settings
    for name in ("run_name", "report_to", "output_dir", "learning_rate", "save_strategy", "bf16"):
        assert getattr(config, name) == getattr(plain, name)
    assert config.resume_from_checkpoint is None


@pytest.mark.parametrize("null", ["null", "~", ""])
def test_null_is_no_limit_where_there_is_one_by_default(null):
    config = parsed(f"max_length: {null}\nsave_total_limit: {null}")[1]
    assert (config.max_length, config.save_total_limit) == (None, None)


def test_a_quoted_null_is_a_word():
    assert parsed("run_name: '~'")[1].run_name == "~"


@pytest.mark.parametrize(("written", "value"), [("[none]", []), ("none", []), ("[tensorboard]", ["tensorboard"])])
def test_reports_are_a_name_or_a_list(written, value):
    assert parsed(f"report_to: {written}")[1].report_to == value


def test_modules_are_a_pattern_or_a_list():
    """One name in a list is not the pattern that it is alone."""
    for written, value in (("[attn]", ["attn"]), ("[a, b]", ["a", "b"]), ("[qv]_proj", "[qv]_proj")):
        quoted = written if isinstance(value, list) else f"'{written}'"
        assert parsed(f"optim_target_modules: {quoted}")[1].optim_target_modules == value


def test_flags_come_before_the_file():
    Path("file.yaml").write_text(FILE)
    over = ["--data", "c.jsonl", "--gamma", "1", "--backend", "null", "--no_disable_dropout"]
    settings, config = train.parse(["--config", "file.yaml", *over])
    assert (settings.data, config.gamma, config.backend, config.disable_dropout) == (["c.jsonl"], 1.0, None, False)


def test_the_files_command_trains(files):
    arguments = command(files, "kto", "--max_steps", "2")[1:]
    settings = {"model": str(files / "model"), "data": str(files / "kto.jsonl"), "max_steps": 2, "output_dir": "yaml"}
    settings |= {"use_cpu": True, "disable_tqdm": True, "learning_rate": 0.01, "per_device_train_batch_size": 4}
    Path("file.yaml").write_text(yaml.safe_dump(settings))
    assert cli.main(["train", "--config", "file.yaml"]) == 0
    assert cli.main(["train", *arguments]) == 0
    assert losses("yaml") == losses("runs/kto")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "file.yaml: 'lerning_rate' is not a setting; the nearest is learning_rate"),
        ("gamma: 1", "file.yaml: 'gamma' is not a setting here: it belongs to --loss dpo"),
        ("colour: red", "file.yaml: 'colour' is not a setting; --help lists them"),
        ("label_smoothing_factor: 0.1", "file.yaml: 'label_smoothing_factor' is not a setting"),
        ("config: other.yaml", "file.yaml: 'config' is not a setting"),
        ("max_steps: [1, 2]", "file.yaml: 'max_steps' takes one value, got the list ['1', '2']"),
        ("data: [a, ~]", "file.yaml: 'data' takes no null in its list, got ['a', None]"),
        ("max_steps: many", "--max_steps/--max-steps: invalid int value: 'many'"),
        ("loss: sft", "--loss: invalid choice: 'sft'"),
        ("beta: 0.1\nloss: kto\nbeta: 0.2", "--config file.yaml is not YAML: 'beta' is set 2 times"),
        ("max_steps: 1: 2", "--config file.yaml is not YAML: mapping values are not allowed here"),
        ("- a", "--config file.yaml: expected names with values, got list"),
        ("", "--config file.yaml: expected names with values, got NoneType"),
    ],
)
def test_a_file_that_cannot_be_used(text, message):
    Path("file.yaml").write_text(text)
    with pytest.raises(CommandError, match=re.escape(message)):
        train.parse(["--model", "m", "--data", "d", "--use_cpu", "--config", "file.yaml"])


# errors


def refusal(capsys, arguments: list[str]) -> str:
    """The one sentence on stderr, with exit code 2 and nothing written."""
    assert cli.main(arguments) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    (sentence,) = (line for line in errors.splitlines() if line.startswith(f"kto-fused {arguments[0]}: "))
    assert not Path("runs").exists()
    return sentence


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lerning_rate", "1"], "--lerning_rate is not a flag; the nearest is --learning_rate"),
        (["--learning", "1"], "--learning is not a flag"),
        (["--do_train"], "--do_train is not a flag"),
        (["--colour", "red"], "--colour is not a flag; --help lists them"),
        (["--gamma", "2"], "--gamma is not a flag here: it belongs to --loss dpo"),
        (["--label-smoothing=0.1"], "--label-smoothing is not a flag here: it belongs to --loss dpo"),
        (
            ["--loss", "dpo", "--desirable_weight", "2"],
            "--desirable_weight is not a flag here: it belongs to --loss kto",
        ),
        (["--beta", "1", "2"], "'2' follows no flag that takes it"),
        (["--max_steps", "ten"], "--max_steps/--max-steps: invalid int value: 'ten'"),
        (["--loss", "sft"], "--loss: invalid choice: 'sft'"),
        (["--loss_type", "sigmoid"], "invalid choice: 'sigmoid'"),
        (["--data"], "--data: expected at least one argument"),
        (["--config", "a.yaml", "--config", "b.yaml"], "--config is given 2 times: expected one file"),
        (["--config", "missing.yaml"], "--config missing.yaml cannot be read: No such file or directory"),
        (["--beta", "0"], "beta must be a finite number > 0, got 0.0"),
        (["--learning_rate", "nan"], "learning_rate must be a finite number of at least 0, got nan"),
        (["--weight_decay", "nan"], "weight_decay must be a finite number of at least 0, got nan"),
        (["--neftune_noise_alpha", "-1"], "neftune_noise_alpha must be a finite number of at least 0, got -1.0"),
        (["--lr_scheduler_kwargs", '{"power": 2}'], "--lr_scheduler_kwargs {'power': 2}: "),  # not of a linear one
        (["--lr_scheduler_kwargs", "abc"], "--lr_scheduler_kwargs abc: "),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "--lr_scheduler_kwargs None: "),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be a finite number of at least 1"),
        (["--num_train_epochs", "0"], "num_train_epochs must be more than 0"),
        (["--max_length", "1025"], "max_length must be at most 1024, the positions that model has, got 1025"),
        (["--max_length", "long"], "max_length must be a positive integer, 'auto' or None, got 'long'"),
        (["--backend", "cuda"], "--backend: invalid choice: 'cuda'"),
        (["--lora_alpha", "8"], "lora_alpha is given, but lora_rank is 0"),
        (["--model", "no/such/model"], "--model no/such/model cannot be loaded"),
        (["--ref_model", "no/such/model"], "--ref_model no/such/model cannot be loaded"),
        (["--data", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["--eval_data", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["--data", "broken.jsonl"], "broken.jsonl, line 1, field 'label': missing"),
        (["--loss", "dpo"], "train data: DPO needs pairs"),
        (["--output_dir", "broken.jsonl/out"], "broken.jsonl/out cannot be written: Not a directory"),
        (["--resume_from_checkpoint", "true"], "--resume_from_checkpoint true: there is no checkpoint in runs/kto"),
        (["--resume_from_checkpoint", "there"], "--resume_from_checkpoint there is no checkpoint"),
        (["--eval_strategy", "steps"], "eval_strategy"),
        (["--max_steps", "0"], "max_steps must be at least 1, or -1 for num_train_epochs, got 0"),
        (["--logging_steps", "nan"], "logging_steps must be a finite number of at least 0, got nan"),
        (["--enable_jit_checkpoint"], "--enable_jit_checkpoint is not a flag"),
        (["--fp16"], "fp16=True has no effect on a CPU"),
        (["--accelerator_config", "missing.json"], "No such file or directory: missing.json"),
    ],
)
def test_what_cannot_be_trained_is_one_sentence(files, capsys, flags, message):
    Path("broken.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    assert message in refusal(capsys, command(files, "kto", *flags))


def test_a_schedule_is_checked_at_the_runs_learning_rate(files):
    flags = ["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"lr_end": 0.5}']
    _, config = train.parse(command(files, "kto", "--learning_rate", "1.0", *flags)[1:])
    train.check_schedule(config)
    config.learning_rate = 0.4
    with pytest.raises(CommandError, match=r"lr_end \(0.5\) must be smaller than initial lr \(0.4\)"):
        train.check_schedule(config)


@pytest.mark.parametrize(("layer", "message"), [("lm_head", "LM head carries an adapter"), ("nothing", "nothing")])
def test_layers_that_cannot_be_adapted(files, capsys, layer, message):
    pytest.importorskip("peft")
    assert message in refusal(capsys, command(files, "kto", "--lora_rank", "2", "--lora_target_modules", layer))


def test_lora_without_peft(files, capsys, monkeypatch):
    monkeypatch.setattr(train, "is_peft_available", lambda: False)
    message = f"kto-fused train: --lora_rank needs peft: {cli.INSTALL}"
    assert refusal(capsys, command(files, "kto", "--lora_rank", "2")) == message


def test_what_must_be_given():
    with pytest.raises(CommandError, match="the following arguments are required: --model, --data"):
        train.parse([])


def test_a_folder_without_a_model(capsys, files):
    Path("empty").mkdir()
    assert "--model empty cannot be loaded" in refusal(capsys, command(files, "kto", "--model", "empty"))


def test_a_setting_that_the_trainer_refuses(capsys, files):
    arguments = command(files, "kto", "--reference_point", "batch_mean", "--gradient_accumulation_steps", "2")
    assert "reference_point='batch_mean' couples" in refusal(capsys, [*arguments, "--output_dir", "out"])


def test_a_path_that_cannot_be_written_is_named(capsys, files):
    Path("file").write_text("")
    flags = ("--precompute_ref_log_probs", "--ref_cache_dir", "file/refs", "--output_dir", "out")
    said = refusal(capsys, command(files, "kto", *flags))
    assert said == (
        "kto-fused train: ref_cache_dir cannot be created (Not a directory), name another folder: file/refs"
    )


def test_an_optimizer_that_is_not_installed(capsys, files):
    arguments = command(files, "kto", "--optim", "adamw_bnb_8bit", "--output_dir", "out")
    assert "bitsandbytes" in refusal(capsys, arguments)


def test_too_little_memory_names_flags_that_exist():
    with pytest.raises(CommandError) as refused, flags.refusals(OSError):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    named = re.findall("--[a-z_]+", str(refused.value))
    assert len(named) == 4
    known = train.flags_of("kto")._option_string_actions
    assert set(named) <= set(known)


@pytest.mark.parametrize("name", ["train", "demo"])
def test_without_the_extra_the_command_says_how_to_install_it(monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    install = "in a clone of kto-fused, pip install -c constraints.txt '.[train]'"
    assert refusal(capsys, [name]) == f"kto-fused {name}: needs accelerate, datasets: {install}"
    command = install.partition(", ")[2].replace("'", '"')
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")


# the other commands


def test_estimate_takes_its_settings_as_flags(files, capsys):
    assert cli.main(["estimate", "--model", str(files / "model"), "--seq", "64", "--loss", "dpo", "--batch", "3"]) == 0
    assert "DPO, 3 pairs of T = 64" in capsys.readouterr().out
    assert "--seq must be" in refusal(capsys, ["estimate", "--model", str(files / "model"), "--seq", "0"])
    assert "--model nothing: its config" in refusal(capsys, ["estimate", "--model", "nothing"])


@pytest.mark.parametrize("flags", [[], ["--lora_rank", "2"]], ids=["trained", "frozen"])
def test_weights_are_kept_as_the_command_that_trains_keeps_them(flags):
    settings, _ = train.parse(["--model", "m", "--data", "d", "--use_cpu", *flags])
    head = "frozen" if settings.lora_rank else "trained"
    facts = estimate.ModelFacts("llama", 1, 2, 3, 3, 3, 1, None)
    shape = estimate.loss_shape(estimate.EstimateSettings("m", dtype="bf16", head=head), facts, 64)
    # auto is what the checkpoint is in, which is mostly bfloat16
    assert shape.param_dtype == {"float32": torch.float32, "auto": torch.bfloat16}[settings.dtype]


def test_env_prints_versions(capsys):
    assert cli.main(["env"]) == 0
    assert torch.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["fly"], ["env", "more"]])
def test_what_is_no_command_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: kto-fused" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_lists_its_flags(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: kto-fused {name}" in capsys.readouterr().out


def test_help_begins_with_what_must_be_given(capsys):
    for name, groups in (("train", ["what is trained on what:", "options:"]), ("estimate", ["options:"])):
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        printed = capsys.readouterr().out
        positions = [printed.index(f"\n{group}\n") for group in groups]
        assert positions == sorted(positions)
        assert len(printed[: positions[0]].splitlines()) < 15
        first = " ".join(printed[positions[0] :].split("\n  --model ")[1].split("\n  --")[0].split())
        assert "Hugging Face model" in first
        assert "default" not in first


def test_help_needs_no_heavy_package():
    """The command's own module, without the package's: that is the library, and imports PyTorch."""
    code = (
        "import sys, types\n"
        f"package = types.ModuleType('kto_fused'); package.__path__ = [{str(ROOT / 'kto_fused')!r}]\n"
        "sys.modules['kto_fused'] = package\n"
        "from kto_fused import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: print([name for name in ('torch', 'transformers', 'yaml') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "estimate" in printed
    assert printed.splitlines()[-1] == "[]"


def yaml_bomb() -> str:
    levels = (f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 10))
    return "\n".join(["a0: &a0 [x, x]", *levels])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (yaml_bomb(), "has more than 2000 values once its aliases are written out"),
        ("a: &a [*a]\n", "has more than 2000 values once its aliases are written out"),
        ("a: " + "[" * 5000 + "]" * 5000, "is nested more than 32 deep"),
        ("{a: " * 5000, "is nested more than 32 deep"),
        ("a: [" + "1, " * 20000 + "]", "has more than 2000 values"),
        ("beta: 0.1\n" * 10**6, "is longer than 65536 bytes"),
    ],
    ids=["aliases", "an alias of itself", "brackets", "braces", "a long list", "a long file"],
)
def test_a_hostile_config_is_refused_at_once(content, message, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    start = time.perf_counter()
    with pytest.raises(CommandError, match=f"^--config {re.escape(str(path))} {message}: expected the settings"):
        flags.read_yaml(str(path))
    assert time.perf_counter() - start < 1


def test_aliases_in_a_config_are_what_they_name(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("lora_target_modules: &names [q_proj, v_proj]\ndata: *names\n")
    assert flags.read_yaml(str(path)) == {"lora_target_modules": ["q_proj", "v_proj"], "data": ["q_proj", "v_proj"]}


# ---- code that comes with a model ---------------------------------------------------------------------------------

REMOTE_CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).touch()


class RemoteConfig(LlamaConfig):
    model_type = "remote-llama"


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
"""


@pytest.fixture
def remote(tmp_path) -> tuple[Path, Path]:
    """(a model that brings its own code, a file that exists once that code was run)."""
    folder, mark = tmp_path / "remote", tmp_path / "was-run"
    tiny_training.model(max_position_embeddings=1024).save_pretrained(folder)
    tiny_training.tokenizer().save_pretrained(folder)
    (folder / "modeling_remote.py").write_text(REMOTE_CODE.format(mark=str(mark)))
    described = json.loads((folder / "config.json").read_text())
    described |= {
        "model_type": "remote-llama",
        "architectures": ["RemoteForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_remote.RemoteConfig",
            "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(described))
    return folder, mark


@pytest.mark.parametrize("flag", ["--model", "--ref_model"])
def test_a_models_own_code_is_never_run_without_the_flag(files, remote, flag, capsys, monkeypatch):
    """Though somebody answers "y" to a question."""
    folder, mark = remote
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    message = refusal(capsys, command(files, "kto", flag, str(folder)))
    assert f"{flag} {folder} cannot be loaded" in message
    assert "--trust_remote_code" in message
    assert not mark.exists()


@pytest.mark.parametrize("given", ["model", "ref_model", "processing_class"])
def test_no_trainer_runs_a_models_own_code_by_itself(remote, given, monkeypatch):
    folder, mark = remote
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    policy = tiny_training.model(max_position_embeddings=1024)
    policy.config._name_or_path = str(folder)
    models = {"policy": str(folder) if given == "model" else policy}
    models |= {"ref_model": str(folder)} if given == "ref_model" else {}
    if given == "processing_class":
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"auto_map": {"AutoTokenizer": ["modeling_remote.RemoteTokenizer", None]}})
        )
        config = tiny_training.CONFIGS["kto"](output_dir=str(folder.parent / "out"), use_cpu=True, report_to="none")
        with pytest.raises(ValueError, match="trust_remote_code=True in the trainer's config"):
            tiny_training.TRAINERS["kto"](policy, args=config, train_dataset=tiny_training.data("kto", 8))
    else:
        with pytest.raises(ValueError, match="trust_remote_code=True in the trainer's config"):
            tiny_training.make_trainer("kto", folder.parent / "out", **models)
    assert not mark.exists()


@pytest.mark.parametrize("subcommand", ["demo", "estimate"])
def test_no_other_command_runs_a_models_own_code(files, remote, subcommand, capsys, monkeypatch):
    folder, mark = remote
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    data = ["--data", str(files / "kto.jsonl")] if subcommand == "demo" else []
    message = refusal(capsys, [subcommand, "--model", str(folder), *data])
    assert "Python code of its own" in message
    assert not mark.exists()


def test_trust_remote_code_runs_a_models_own_code_and_says_so(files, remote, caplog):
    folder, mark = remote
    arguments = command(files, "kto", "--trust_remote_code", "--max_steps", "1", "--model", str(folder))
    assert cli.main(arguments) == 0
    assert mark.exists()
    assert f"trust_remote_code is on: Python code that comes with {folder} is run" in caplog.text
