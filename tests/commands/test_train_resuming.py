"""How ``kto-fused train`` stops on Ctrl-C, resumes, and keeps runs apart."""

# ruff: noqa: E402 (where packages are missing, the skip must come before the imports that need them)

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("datasets", "accelerate", "matplotlib"):
    pytest.importorskip(package, reason=f"kto-fused train needs {package}")

import tiny_training
from command_runs import command, losses, read_metrics
from filelock import FileLock

from kto_fused.commands import cli, progress, train
from kto_fused.commands.errors import CommandError
from kto_fused.trainers import FusedKTOTrainer, FusedTrainer, folder_lock

pytestmark = pytest.mark.usefixtures("module_cache", "in_a_new_folder")


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
    with progress.StopOnCtrlC() as ctrl_c:
        signal.raise_signal(signal.SIGINT)
        assert ctrl_c.is_pressed
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def press_ctrl_c_after(monkeypatch, step: int) -> None:
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == step:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress.StopOnCtrlC, "on_step_begin", on_step_begin)


@pytest.mark.parametrize("due", [["--save_strategy", "epoch"], ["--eval_steps", "2"]], ids=["epoch", "steps"])
def test_a_stop_does_not_evaluate(files, monkeypatch, capsys, due):
    press_ctrl_c_after(monkeypatch, 1)
    evaluated = ["--eval_data", str(files / "kto-eval.jsonl"), "--eval_on_start", "false"]
    assert cli.main(command(files, "kto", *evaluated, *due)) == 130
    printed = capsys.readouterr().out
    assert "Stopped after step 2 of 12. The checkpoint is runs/kto/checkpoint-2" in printed
    assert "evaluation" not in printed
    assert not Path("runs/kto/metrics.json").exists()


def test_ctrl_c_in_the_last_step_changes_nothing(files, monkeypatch):
    press_ctrl_c_after(monkeypatch, 2)
    assert cli.main(command(files, "kto", "--max_steps", "3")) == 0
    assert Path("runs/kto/metrics.json").exists()


def test_ctrl_c_before_training_ends_the_command(files, monkeypatch, capsys):
    monkeypatch.setattr(train, "make_trainer", lambda *_: signal.raise_signal(signal.SIGINT))
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
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
    before = read_metrics("runs/kto")
    assert cli.main(command(files, "kto", "--max_steps", "2")) == 2
    assert "--output_dir runs/kto already holds checkpoint-1 of another run" in capsys.readouterr().err
    assert read_metrics("runs/kto") == before


@pytest.mark.parametrize("ends", [["--max_steps", "3"], ["--num_train_epochs", "0.7"]], ids=["steps", "epochs"])
def test_a_run_that_has_ended_is_not_trained_further(files, capsys, ends):
    arguments = command(files, "kto", "--logging_steps", "1", "--lr_scheduler_type", "constant", *ends)
    assert cli.main(arguments) == 0  # trains three of the epoch's four steps
    before, weights = losses("runs/kto"), Path("runs/kto/model.safetensors").read_bytes()
    for lost in ("metrics.json", "model.safetensors"):
        Path("runs/kto", lost).unlink()  # as if the run had been killed before it wrote them
    capsys.readouterr()
    assert cli.main([*arguments, "--resume_from_checkpoint", "true"]) == 0
    assert "The checkpoint has all 3 steps: nothing is trained" in capsys.readouterr().out
    assert losses("runs/kto") == before
    assert Path("runs/kto/model.safetensors").read_bytes() == weights
    assert [path.name for path in Path("runs/kto").glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_checkpoint_of_more_steps_than_asked_for_is_refused(files, capsys):
    assert cli.main(command(files, "kto", "--max_steps", "2")) == 0
    before = read_metrics("runs/kto")
    assert cli.main(command(files, "kto", "--max_steps", "1", "--resume_from_checkpoint", "true")) == 2
    assert "runs/kto/checkpoint-2 has 2 steps already, but --max_steps is 1" in capsys.readouterr().err
    assert read_metrics("runs/kto") == before


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
        patch.setattr(FusedTrainer, "_determine_best_metric", first_is_best)
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
    before = read_metrics("runs/kto")
    assert cli.main(command(files, "kto", "--max_steps", "2", "--lora_rank", "2")) == 2
    assert "--output_dir runs/kto already holds metrics.json of another model or run" in capsys.readouterr().err
    assert read_metrics("runs/kto") == before
    assert cli.main(command(files, "kto", "--max_steps", "1", "--output_dir", "other")) == 0
    elsewhere = ["--max_steps", "2", "--resume_from_checkpoint", "other/checkpoint-1"]
    assert cli.main(command(files, "kto", *elsewhere)) == 2
    assert "--output_dir runs/kto already holds metrics.json of another model or run" in capsys.readouterr().err
    assert cli.main(command(files, "kto", *elsewhere, "--output_dir", "other")) == 0
    capsys.readouterr()
    assert cli.main(command(files, "kto", "--output_dir", str(files / "model"))) == 2
    assert "already holds config.json of another model or run" in capsys.readouterr().err


def test_a_checkpoint_of_the_other_loss_is_refused(files, capsys):
    assert cli.main(command(files, "kto", "--max_steps", "1")) == 0
    resumed = ["--output_dir", "runs/kto", "--max_steps", "2", "--resume_from_checkpoint", "true"]
    assert cli.main(command(files, "dpo", *resumed)) == 2
    assert "was trained with --loss kto: resume it with the same loss" in capsys.readouterr().err


def test_an_incomplete_checkpoint_is_passed_over_for_a_complete_one_or_refused(files, capsys):
    arguments = command(files, "kto", "--max_steps", "4", "--save_steps", "2", "--logging_steps", "1")
    kept = [*arguments, "--save_total_limit", "9"]
    assert cli.main([*kept, "--output_dir", "whole"]) == 0
    assert cli.main(kept) == 0
    Path("runs/kto/checkpoint-4/trainer_state.json").unlink()
    assert cli.main([*kept, "--resume_from_checkpoint", "runs/kto/checkpoint-4"]) == 2
    assert "checkpoint-4 is not a checkpoint: it has no trainer_state.json" in capsys.readouterr().err
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
    Path("runs/kto", folder_lock.RUNNING).write_text('{"pid": 1, "host": "elsewhere", "started": "today"}')
    with FileLock(Path("runs/kto", folder_lock.LOCK)):
        assert cli.main(command(files, "kto")) == 2
    message = "another run writes into runs/kto (process 1 on elsewhere, started today): wait until it ends"
    assert message in capsys.readouterr().err


def test_a_finished_run_that_logged_no_step_gets_its_results(files, tmp_path, capsys):
    settings = {"per_device_train_batch_size": 8, "logging_steps": 10, "save_strategy": "epoch"}
    tiny_training.make_trainer("kto", tmp_path / "runs" / "kto", train=str(files / "kto.jsonl"), **settings).train()
    batches = ("--num_train_epochs", "1", "--per_device_train_batch_size", "8")
    again = (*batches, "--resume_from_checkpoint", "true", "--resume_anyway")
    assert cli.main(command(files, "kto", *again)) == 0
    assert "examples per second" in capsys.readouterr().out
    assert read_metrics("runs/kto")["steps"] == []
    assert Path("runs/kto/curves.png").read_bytes().startswith(b"\x89PNG")


def test_resuming_can_be_turned_off(files, capsys):
    arguments = command(files, "kto", "--max_steps", "1", "--resume_from_checkpoint", "false")
    assert cli.main(arguments) == 0
    assert cli.main(arguments) == 2
    assert "already holds checkpoint-1 of another run" in capsys.readouterr().err


def test_a_checkpoint_of_the_model_alone_is_refused(files, capsys):
    arguments = command(files, "kto", "--save_steps", "2", "--save_only_model", "true")
    assert cli.main([*arguments, "--max_steps", "2"]) == 0
    before = read_metrics("runs/kto")
    assert cli.main([*arguments, "--max_steps", "4", "--resume_from_checkpoint", "true"]) == 2
    message = capsys.readouterr().err
    assert "runs/kto/checkpoint-2 holds only the model (--save_only_model)" in message
    assert "(--model runs/kto/checkpoint-2, another --output_dir)" in message
    assert read_metrics("runs/kto") == before
    assert cli.main([*arguments, "--max_steps", "2", "--resume_from_checkpoint", "true"]) == 0  # no step left


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
    assert "runs/kto/checkpoint-1 does not fit this model: resume with the --model and the LoRA flags" in line
    assert reason in line
    assert len(line) < 500


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (RuntimeError("a kernel's own"), RuntimeError, "a kernel's own"),
        (torch.OutOfMemoryError("CUDA out of memory"), CommandError, "the GPU does not have enough memory"),
    ],
)
def test_other_errors_of_a_resumed_run_are_not_taken_for_another_adapters(files, monkeypatch, error, expected, message):
    def fails(*_, **__):
        raise error

    assert cli.main(command(files, "kto", "--max_steps", "1")) == 0
    monkeypatch.setattr(FusedKTOTrainer, "train", fails)
    with pytest.raises(expected, match=message):
        train.main(command(files, "kto", "--max_steps", "2", "--resume_from_checkpoint", "true")[1:])
