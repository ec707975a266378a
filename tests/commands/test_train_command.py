"""What ``kto-fused train`` writes and prints."""

# ruff: noqa: E402 (where packages are missing, the skip must come before the imports that need them)

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

for package in ("datasets", "accelerate", "matplotlib"):
    pytest.importorskip(package, reason=f"kto-fused train needs {package}")

import tiny_training
from command_runs import command, losses, read_metrics, training
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from kto_fused.commands import cli, early, progress, results, train
from kto_fused.trainers import FusedTrainer

pytestmark = pytest.mark.usefixtures("module_cache", "in_a_new_folder")


def test_kto_leaves_a_trained_model_curves_and_metrics(files, capsys):
    assert cli.main(command(files, "kto", "--num_train_epochs", "2", "--logging_steps", "3")) == 0
    trained = AutoModelForCausalLM.from_pretrained("runs/kto")
    assert not torch.equal(trained.lm_head.weight, tiny_training.model().lm_head.weight)
    assert AutoTokenizer.from_pretrained("runs/kto").get_vocab() == tiny_training.tokenizer().get_vocab()
    assert Path("runs/kto/curves.png").read_bytes().startswith(b"\x89PNG")
    metrics = read_metrics("runs/kto")
    assert [step["step"] for step in metrics["steps"]] == [1, 3, 6, 8]  # the first and the last step are always logged
    records = [json.loads(line) for line in (files / "kto.jsonl").read_text().splitlines()]
    counts = {"examples": 16, "truncated": 0, "dropped": 0, "dropped_for": {}, "found": {}}
    assert metrics["data"] == {"train": counts | {"prompts": len({record["prompt"] for record in records})}}
    assert metrics["settings"]["model"] == str(files / "model")
    assert metrics["config"]["learning_rate"] == 0.01

    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    (header,) = (line for line in lines if line[:1] == ["step"] and "loss" in line)
    assert header == ["step", "loss", "chosen", "rejected", "margin", "accuracy", "AUC", "z0"]
    first, last = metrics["steps"][0], metrics["steps"][-1]
    assert ["8", *(f"{last[name]:.4f}" for name in progress.COLUMNS if name in last)] in lines
    assert ["loss", f"{first['loss']:.4f}", f"{last['loss']:.4f}"] in lines
    assert f"{last['num_tokens']} tokens" in printed
    assert "train data: 16 examples used, 0 of them with a completion cut" in printed


def test_a_first_batch_of_one_class_hides_no_column(files, capsys):
    assert cli.main(command(files, "kto", "--per_device_train_batch_size", "1", "--logging_steps", "1")) == 0
    assert [name for name in progress.REWARDS if name not in read_metrics("runs/kto")["steps"][0]]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["step", "loss", "chosen", "rejected", "margin", "accuracy", "AUC", "z0"] in lines
    assert sum(line[:1] == ["1"] and line.count("-") == 3 and len(line) == 8 for line in lines) == 1


def test_dpo_is_evaluated_after_each_epoch(files, capsys):
    evaluation = ["--eval_data", str(files / "dpo-eval.jsonl"), "--num_train_epochs", "2", "--save_strategy", "no"]
    assert cli.main(command(files, "dpo", *evaluation)) == 0
    metrics = read_metrics("runs/dpo")
    assert [entry["step"] for entry in metrics["evaluations"]] == [0, 4, 8]
    assert "eval_rewards/accuracies" in metrics["evaluations"][0]
    assert metrics["data"]["eval"]["examples"] == 8
    printed = capsys.readouterr().out
    assert len(re.findall("^ +[048] .* evaluation$", printed, re.MULTILINE)) == 3
    assert re.search("^rewards/accuracies( +[01][.][0-9]{4}){4}$", printed, re.MULTILINE)


def test_supervised_fine_tuning_and_a_reward_model_run_from_one_file_and_resume(files, capsys):
    for loss, header, more in (
        ("sft", ["loss", "accuracy", "entropy"], ["--packing", "--max_length", "16", "--loss_type", "dft"]),
        ("reward", ["loss", "chosen", "rejected", "margin", "accuracy"], ["--centering", "0.01"]),
    ):
        settings = {"model": str(files / "model"), "data": str(files / f"{loss}.jsonl"), "loss": loss}
        settings |= {"eval_data": str(files / f"{loss}-eval.jsonl"), "use_cpu": "true", "save_strategy": "epoch"}
        Path("run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
        arguments = ["train", "--config", "run.yaml", "--disable_tqdm", *more]
        assert cli.main([*arguments, "--num_train_epochs", "1"]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["step", *header] in lines
        assert Path(f"runs/{loss}/curves.png").read_bytes().startswith(b"\x89PNG")
        before, evaluation = read_metrics(f"runs/{loss}")["evaluations"]
        assert before["step"] == 0
        assert {f"eval_{name}" for name in tiny_training.LOGGED[loss]} <= evaluation.keys()
        assert cli.main([*arguments, "--num_train_epochs", "2", "--resume_from_checkpoint", "true"]) == 0
        assert len(read_metrics(f"runs/{loss}")["evaluations"]) == 3  # none before the resumed step
    reward = AutoModelForSequenceClassification.from_pretrained("runs/reward")
    assert (reward.config.num_labels, reward.config.pad_token_id) == (1, 2)


def test_a_reward_models_adapter_holds_its_score(files):
    pytest.importorskip("peft")
    assert cli.main(command(files, "reward", "--lora_rank", "2", "--max_steps", "1")) == 0
    adapter = json.loads(Path("runs/reward/adapter_config.json").read_text())
    assert adapter["task_type"] == "SEQ_CLS"
    assert "score" in adapter["modules_to_save"]
    saved = safetensors.torch.load_file("runs/reward/adapter_model.safetensors")
    assert any("score" in name for name in saved)
    assert not any("lora" in name and "score" in name for name in saved)


def test_cut_and_dropped_examples_are_reported(files, capsys):
    assert cli.main(command(files, "kto", "--max_length", "6", "--max_steps", "1")) == 0
    counts = read_metrics("runs/kto")["data"]["train"]
    assert counts["truncated"] > 0
    printed = capsys.readouterr().out
    assert (
        f"{counts['examples']} examples used, {counts['truncated']} of them with a completion cut to --max_length"
        in printed
    )


@pytest.mark.parametrize(("flags", "length"), [([], 512), (["--max_length", "null"], 512), (["--max_length", "9"], 9)])
def test_a_model_of_few_positions_is_trained_within_them(files, flags, length):
    tiny_training.model(max_position_embeddings=512).save_pretrained("model")
    tiny_training.tokenizer().save_pretrained("model")
    assert cli.main(command(files, "kto", "--model", "model", "--max_steps", "1", *flags)) == 0
    assert read_metrics("runs/kto")["config"]["max_length"] == length


def test_lora_saves_an_adapter_of_the_asked_rank_without_a_word_on_names_that_libraries_changed(files, recwarn):
    pytest.importorskip("peft")
    lora = ["--lora_rank", "2", "--lora_target_modules", "q_proj", "v_proj", "--max_steps", "2"]
    assert cli.main(command(files, "kto", *lora, "--gradient_checkpointing")) == 0
    assert not [warning for warning in recwarn if "gradient_checkpointing" in str(warning.message)]
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
    assert read_metrics("runs/kto")["settings"]["dtype"] == expected


def test_the_base_of_a_model_without_adapters_is_refused(files, capsys):
    assert cli.main(command(files, "kto", "--reference", "base")) == 2
    assert "reference='base' is the model with its adapters off, and model has no" in capsys.readouterr().err
    assert cli.main(command(files, "kto", "--reference", "base", "--lora_rank", "2", "--max_steps", "1")) == 0
    assert read_metrics("runs/kto")["config"]["reference"] == "base"


def test_an_adapter_in_place_of_a_model_is_refused(files, capsys):
    pytest.importorskip("peft")
    assert cli.main(command(files, "kto", "--lora_rank", "2", "--max_steps", "1", "--output_dir", "adapter")) == 0
    arguments = command(files, "kto", "--output_dir", "out")
    arguments[arguments.index("--model") + 1] = "adapter"
    assert cli.main(arguments) == 2
    assert "--model adapter is an adapter, not a model: merge it" in capsys.readouterr().err


def test_a_reference_of_its_own_gives_another_loss(files):
    tiny_training.model(seed=1).save_pretrained("ref")
    tiny_training.tokenizer().save_pretrained("ref")
    few = ["--max_steps", "1", "--loss", "dpo"]
    assert cli.main(command(files, "dpo", *few)) == 0
    assert cli.main(command(files, "dpo", *few, "--ref_model", "ref", "--output_dir", "other")) == 0
    assert losses("runs/dpo")[0] == pytest.approx(0.6931, abs=1e-4)
    assert abs(losses("other")[0] - 0.6931) > 0.01


def test_metrics_and_curves_are_written_both_or_neither(monkeypatch):
    entry = {"step": 1, "loss": 0.5, "rewards/chosen": 0.1}
    results.write("out", {"steps": [entry], "evaluations": []})
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert sorted(before) == ["curves.png", "metrics.json", "report.html"]

    def full_disk(metrics, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "plot", full_disk)
    with pytest.raises(OSError, match="No space left"):
        results.write("out", {"steps": [entry, entry], "evaluations": []})
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before


def test_a_failed_upload_loses_no_results(files, monkeypatch, capsys):
    def no_network(self, *_, **__):
        raise ConnectionRefusedError("nobody listens")

    monkeypatch.setattr(early, "check_upload", lambda *_: None)
    flags = ["--push_to_hub", "--max_steps", "1", "--save_strategy", "no"]
    by_hand = "hf upload kto runs/kto . --exclude 'checkpoint-*'"
    assert cli.main(command(files, "kto", *flags)) == 2
    message = capsys.readouterr().err
    assert "push_to_hub: the repository cannot be made (Cannot reach " in message  # the tests are offline
    assert message.endswith(f"upload the model after the run: {by_hand}\n")
    monkeypatch.setattr(FusedTrainer, "init_hf_repo", lambda self, **_: None)
    monkeypatch.setattr(FusedTrainer, "push_to_hub", no_network)
    assert cli.main(command(files, "kto", *flags)) == 2
    message = "--push_to_hub: the upload failed (nobody listens); runs/kto holds the trained model and all results; "
    assert f"{message}to upload them later: {by_hand}\n" in capsys.readouterr().err
    assert read_metrics("runs/kto")["steps"]
    assert Path("runs/kto/model.safetensors").exists()


def test_a_run_writes_events_for_tensorboard(files):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    assert (
        cli.main(command(files, "dpo", "--report_to", "tensorboard", "--max_steps", "2", "--logging_steps", "1")) == 0
    )
    (events,) = Path("runs/dpo").glob("runs/*/events.out.tfevents.*")
    assert b"train/rewards/margins" in events.read_bytes()


@pytest.mark.parametrize("name", ["all-linear", ".*[qv]_proj", "self_attn.q_proj"])
def test_layers_to_adapt_by_name_or_pattern(files, name):
    pytest.importorskip("peft")
    assert cli.main(command(files, "kto", "--max_steps", "1", "--lora_rank", "2", "--lora_target_modules", name)) == 0
    adapted = safetensors.torch.load_file("runs/kto/adapter_model.safetensors").keys()
    layers = {key.split(".lora_")[0].rpartition(".")[2] for key in adapted}
    expected = {"self_attn.q_proj": {"q_proj"}, ".*[qv]_proj": {"q_proj", "v_proj"}}
    assert layers == expected.get(name, layers)
    assert ("down_proj" in layers) == (name == "all-linear")


def test_fewer_examples_than_a_whole_batch_are_refused(files, capsys):
    arguments = ["--per_device_train_batch_size", "17", "--dataloader_drop_last"]
    assert cli.main(command(files, "kto", *arguments)) == 2
    assert "16 examples are fewer than a batch of 17" in capsys.readouterr().err
    assert not Path("runs/kto/config.json").exists()


@pytest.mark.parametrize("loss", tiny_training.RECIPES)
def test_the_metrics_to_choose_the_best_model_by_are_those_that_evaluations_report(files, loss):
    assert cli.main(command(files, loss, "--eval_data", str(files / f"{loss}-eval.jsonl"), "--max_steps", "1")) == 0
    evaluation = read_metrics(f"runs/{loss}")["evaluations"][-1]
    of_trainer = {
        "epoch",
        "step",
        "eval_comparisons",
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
    }
    assert evaluation.keys() - of_trainer == {f"eval_{name}" for name in train.evaluation_metrics(loss)}


def test_a_metric_of_both_labels_evaluated_on_one_is_one_sentence(files, tmp_path, capsys):
    liked = [line for line in (files / "kto-eval.jsonl").read_text().splitlines() if json.loads(line)["label"]]
    (tmp_path / "liked.jsonl").write_text("\n".join(liked))
    evaluated = ["--eval_data", str(tmp_path / "liked.jsonl"), "--metric_for_best_model", "rewards/margins"]
    assert cli.main(command(files, "kto", "--max_steps", "1", *evaluated)) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert "eval_rewards/margins" in message


def test_nan_and_infinity_are_null_in_json():
    results.write(
        "results", {"steps": [{"step": 1, "loss": float("nan"), "grad_norm": float("inf")}], "evaluations": []}
    )
    assert read_metrics("results")["steps"] == [{"step": 1, "loss": None, "grad_norm": None}]


def test_eval_steps_may_stay_where_evaluation_is_off(files):
    assert cli.main(command(files, "kto", "--max_steps", "1", "--eval_strategy", "no", "--eval_steps", "5")) == 0


def test_a_table_with_other_names_trains_and_keeps_prompts_for_evaluation(files, caplog):
    records = [json.loads(line) for line in (files / "kto.jsonl").read_text().splitlines()]
    rows = [f'"{r["prompt"]}"\t"{r["completion"]}"\t{"up" if r["label"] else "down"}' for r in records]
    Path("thumbs.tsv").write_text("\n".join(["question\tanswer\tthumbs", *rows]))
    names = ["--columns", "prompt=question", "completion=answer", "label=thumbs"]
    flags = [
        *names,
        "--label_true",
        "up",
        "--label_false",
        "down",
        "--eval_fraction",
        "0.3",
        "--load_best_model_at_end",
    ]
    assert cli.main(training(files / "model", Path("thumbs.tsv"), "--num_train_epochs", "2", *flags)) == 0
    metrics = read_metrics("runs/kto")
    assert metrics["data"]["train"]["examples"] + metrics["data"]["eval"]["examples"] == len(records)
    assert metrics["settings"]["eval_fraction"] == 0.3
    assert metrics["config"]["columns"] == names[1:]
    assert [entry["epoch"] for entry in metrics["evaluations"]] == [0, 1, 2]
    # pytest's own handlers take what the command would print
    assert "thumbs.tsv: read as prompt, completion, label; prompt is the column 'question'" in caplog.text
    assert "prompts are kept for evaluation" in caplog.text
