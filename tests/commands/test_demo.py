"""The command ``kto-fused demo``: it learns, writes its results, and reports errors in one sentence."""

# ruff: noqa: E402 (where packages are missing, the skip must come before the imports that need them)

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for package in ("datasets", "accelerate", "matplotlib"):
    pytest.importorskip(package, reason=f"kto-fused demo needs {package}")

import datasets

from kto_fused.commands import cli, demo
from kto_fused.preference_data import BUNDLED, load

FEW = {"steps": 10, "batch_size": 16, "device": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def own_cache_and_a_shorter_start(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(demo, "WARMUP_STEPS", 20)
        yield


@pytest.fixture(autouse=True)
def ordinary_memory():
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return demo.run(demo.Settings(out=out, **FEW)), out


def test_the_margin_rises(finished):
    metrics, _ = finished
    margins = [step["rewards/margins"] for step in metrics["steps"]]
    assert len(margins) == FEW["steps"]
    assert margins[0] == pytest.approx(0, abs=1e-4)  # policy and reference are the same model before the first update
    assert sum(margins[-4:]) / 4 > 0.02


def test_it_writes_metrics_and_curves(finished):
    metrics, out = finished
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "metrics.json", "report.html"]
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_curve(finished, tmp_path):
    again = demo.run(demo.Settings(out=tmp_path, **{**FEW, "steps": 3}))
    assert [step["loss"] for step in again["steps"]] == [step["loss"] for step in finished[0]["steps"][:3]]


@pytest.mark.parametrize("loss_from", ["hidden", "logits"])
def test_a_local_checkpoint_and_a_file_of_ones_own(tmp_path, loss_from):
    records = load(BUNDLED).select(range(40))
    records.to_json(tmp_path / "mine.jsonl")
    tokenizer, model = demo.small_llama(records)
    tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    arguments = ["demo", "--data", str(tmp_path / "mine.jsonl"), "--model", str(tmp_path / "model"), "--steps", "2"]
    arguments += ["--batch-size", "4", "--beta", "0.5", "--seed", "3", "--device", "cpu", "--backend", "torch"]
    assert cli.main([*arguments, "--from", loss_from, "--out", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    asked = {"beta": 0.5, "seed": 3, "backend": "torch", "steps": 2, "batch_size": 4, "loss_from": loss_from}
    assert asked.items() <= metrics["settings"].items()
    assert len(metrics["steps"]) == 2


def test_stretched_positions_are_used(tmp_path):
    tokenizer, model = demo.small_llama(load(BUNDLED).select(range(40)))
    model.config.max_position_embeddings = 64
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    model.config.rope_parameters = {**model.config.rope_parameters, **yarn}
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "model")
    settings = demo.Settings(model=str(tmp_path / "model"), out=tmp_path / "out", **FEW)
    assert demo.make_trainer(settings, torch.device("cpu")).args.max_length == 256


def test_a_demo_in_several_processes_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "the demo runs in one process, and 2 were started" in fails(capsys, tmp_path)


def test_the_bundled_feedback():
    records = load(BUNDLED)
    assert len(records) >= 200
    assert len(set(records["completion"])) == len(records)
    assert all(prompt.endswith("\n") for prompt in records["prompt"])  # completions are appended as they are
    assert 0.4 < sum(records["label"]) / len(records) < 0.6


def fails(capsys, tmp_path: Path, *arguments: str) -> str:
    """Run a demo that must fail with exit code 2. Returns its one sentence on stderr; it must have written nothing."""
    out = tmp_path / "out"
    code = cli.main(["demo", "--out", str(out), "--device", "cpu", *arguments])
    errors = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in errors
    (sentence,) = (line for line in errors.splitlines() if line.startswith("kto-fused demo: "))
    assert not out.exists()
    return sentence


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "p", "completion": "c", "label": true}\n{"prompt": "p"', "feedback.jsonl, line 2: expected one"),
        ('{"prompt": "p", "completion": "c", "label": true}', "got no undesirable one"),
    ],
    ids=["a broken line", "one class"],
)
def test_a_feedback_file_that_cannot_be_used(capsys, tmp_path, content, message):
    (tmp_path / "feedback.jsonl").write_text(content)
    assert message in fails(capsys, tmp_path, "--data", str(tmp_path / "feedback.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch_size must be at least 1, got 0"),
        (["--batch-size", "9999"], "--batch_size 9999 is larger than the data: 284 examples"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--beta", "0"], "--beta must be a finite number > 0, got 0.0"),
        (["--beta", "nan"], "--beta must be a finite number > 0, got nan"),
        (["--device", "warp"], "--device warp"),
        (["--device", "meta"], "--device meta"),
        (["--seed", str(2**70)], "--seed must lie in [0, 2^32)"),
        (["--model", "no/such/model"], "--model no/such/model cannot be loaded"),
        (["--data", "missing.jsonl"], "missing.jsonl: cannot be read"),
        (["--from", "nowhere"], "--from: invalid choice: 'nowhere'"),
        (["--speed", "9"], "--speed is not a flag; did you mean --seed?"),
    ],
)
def test_settings_that_cannot_be_run(capsys, tmp_path, arguments, message):
    assert message in fails(capsys, tmp_path, *arguments)


def test_an_out_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "out").write_text("a file is in the way")
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert f"{tmp_path / 'out'} cannot be written: Not a directory" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "a file is in the way"


def test_help_writes_kto_as_it_is_written(capsys):
    assert cli.main(["demo", "--help"]) == 0
    assert "Train a small language model with KTO" in capsys.readouterr().out


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "kto_fused", "demo", "--speed", "9"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert result.returncode == 2
    assert "--speed" in result.stderr
