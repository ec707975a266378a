"""The errors of ``kto-fused train``: each is one sentence, and nothing has been written."""

# ruff: noqa: E402 (where packages are missing, the skip must come before the imports that need them)

import re
from pathlib import Path

import pytest
import torch

for package in ("datasets", "accelerate", "matplotlib"):
    pytest.importorskip(package, reason=f"kto-fused train needs {package}")

from command_runs import command, refusal

from kto_fused.commands import cli, train
from kto_fused.commands.errors import CommandError
from kto_fused.commands.failures import user_errors

pytestmark = pytest.mark.usefixtures("module_cache", "in_a_new_folder")


@pytest.mark.parametrize(
    "flags",
    [
        ["--eval_steps", "2"],
        ["--eval_delay", "100"],
        ["--eval_on_start"],
        ["--load_best_model_at_end"],
        ["--metric_for_best_model", "loss"],
    ],
    ids=lambda flags: flags[0],
)
def test_evaluation_flags_without_data_are_refused(files, capsys, flags):
    assert cli.main(command(files, "kto", *flags)) == 2
    assert f"{flags[0]} needs evaluations, so --eval_data or --eval_fraction must be given" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag", [["--metric_for_best_model", "loss"], ["--eval_delay", "100"]], ids=lambda flag: flag[0]
)
def test_evaluation_flags_without_evaluations_are_refused(files, capsys, flag):
    flags = ["--eval_data", str(files / "kto-eval.jsonl"), "--eval_strategy", "no", *flag]
    assert cli.main(command(files, "kto", *flags)) == 2
    assert f"{flag[0]} needs evaluations, but --eval_strategy is no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("loss", "metric"), [("kto", "rewards/margin"), ("kto", "eval_mean_token_accuracy"), ("dpo", "eval_kl")]
)
def test_a_metric_that_no_evaluation_reports_is_refused(files, capsys, loss, metric):
    flags = ["--eval_data", str(files / f"{loss}-eval.jsonl"), "--metric_for_best_model", metric]
    message = refusal(capsys, command(files, loss, *flags))
    assert f"--metric_for_best_model {metric} is unknown: choose one of loss, rewards/chosen, " in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lerning_rate", "1"], "--lerning_rate is not a flag; did you mean --learning_rate?"),
        (["--learning", "1"], "--learning is not a flag"),
        (["--do_train"], "--do_train is not a flag"),
        (["--xyzzy", "red"], "--xyzzy is not a flag; --help lists all of them"),
        (["--gamma", "2"], "--gamma is not a flag here: it belongs to --loss dpo"),
        (["--label-smoothing=0.1"], "--label-smoothing is not a flag here: it belongs to --loss dpo"),
        (
            ["--loss", "dpo", "--desirable_weight", "2"],
            "--desirable_weight is not a flag here: it belongs to --loss kto",
        ),
        (["--beta", "1", "2"], "'2' does not belong to any flag"),
        (["--max_steps", "ten"], "--max_steps/--max-steps: invalid int value: 'ten'"),
        (["--loss", "fly"], "--loss fly is unknown: choose one of kto, dpo"),
        (["--loss_type", "sigmoid"], "invalid choice: 'sigmoid'"),
        (["--data"], "--data: expected at least one argument"),
        (["--config", "a.yaml", "--config", "b.yaml"], "--config is given 2 times, but a run reads one settings file"),
        (["--config", "missing.yaml"], "--config missing.yaml cannot be read: No such file or directory"),
        (["--beta", "0"], "beta must be a finite number > 0, got 0.0"),
        (["--learning_rate", "nan"], "learning_rate must be a finite number of at least 0, got nan"),
        (["--weight_decay", "nan"], "weight_decay must be a finite number of at least 0, got nan"),
        (["--neftune_noise_alpha", "-1"], "neftune_noise_alpha must be a finite number of at least 0, got -1.0"),
        (["--lr_scheduler_kwargs", '{"power": 2}'], "--lr_scheduler_kwargs {'power': 2}: "),
        (["--lr_scheduler_kwargs", "abc"], "--lr_scheduler_kwargs abc: "),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "--lr_scheduler_kwargs None: "),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must be a finite number of at least 1"),
        (["--num_train_epochs", "0"], "num_train_epochs must be more than 0"),
        (["--max_length", "1025"], "max_length must be at most 1024, the positions that model has, got 1025"),
        (["--max_length", "long"], "max_length must be a positive integer, 'auto' or None, got 'long'"),
        (["--backend", "cuda"], "--backend: invalid choice: 'cuda'"),
        (["--lora_alpha", "8"], "lora_alpha is given, but there is no adapter: set lora_rank too"),
        (["--model", "no/such/model"], "--model no/such/model cannot be loaded"),
        (["--ref_model", "no/such/model"], "--ref_model no/such/model cannot be loaded"),
        (["--data", "missing.jsonl"], "--data missing.jsonl: no such file or folder"),
        (["--eval_data", "missing.jsonl"], "--eval_data missing.jsonl: no such file or folder"),
        (["--data", "broken.jsonl"], "broken.jsonl, line 1, field 'label': missing"),
        (["--loss", "dpo"], "train data: DPO needs pairs"),
        (["--output_dir", "broken.jsonl/out"], "broken.jsonl/out cannot be written: Not a directory"),
        (["--resume_from_checkpoint", "true"], "--resume_from_checkpoint true: there is no checkpoint in runs/kto"),
        (["--resume_from_checkpoint", "there"], "--resume_from_checkpoint there is not a checkpoint"),
        (
            ["--eval_strategy", "steps"],
            "--eval_strategy needs evaluations, so --eval_data or --eval_fraction must be given",
        ),
        (["--max_steps", "0"], "max_steps must be at least 1, or -1 for num_train_epochs, got 0"),
        (["--logging_steps", "nan"], "logging_steps must be a finite number of at least 0, got nan"),
        (["--enable_jit_checkpoint"], "--enable_jit_checkpoint is not a flag"),
        (["--fp16"], "fp16=True has no effect on a CPU"),
        (["--accelerator_config", "missing.json"], "No such file or directory: missing.json"),
    ],
)
def test_a_run_that_cannot_start_is_refused_in_one_sentence(files, capsys, flags, message):
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
    message = f"kto-fused train: --lora_rank needs the package peft: {cli.INSTALL}"
    assert refusal(capsys, command(files, "kto", "--lora_rank", "2")) == message


def test_model_and_data_are_required():
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
    arguments = command(files, "kto", "--optim", "adalomo", "--output_dir", "out")
    assert "lomo-optim" in refusal(capsys, arguments)


def test_too_little_memory_names_flags_that_exist():
    with pytest.raises(CommandError) as refused, user_errors(OSError):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    named = re.findall("--[a-z_]+", str(refused.value))
    assert len(named) == 4
    known = train.flags_of("kto")._option_string_actions
    assert set(named) <= set(known)
