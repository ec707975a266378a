"""Runs of the command ``kto-fused`` in tests: a tiny model with data, the command's arguments, and what a run wrote.

The module is a pytest plugin: ``pytest_plugins = ["command_runs"]`` in a test file makes its fixtures available.
"""

import json
from pathlib import Path

import pytest

FAST = ["--use_cpu", "--learning_rate", "0.01", "--per_device_train_batch_size", "4"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with a model (``model``) and data for both losses (``kto.jsonl``, ``kto-eval.jsonl``, ``dpo...``)."""
    import tiny_training  # here, because it needs datasets and accelerate

    folder = tmp_path_factory.mktemp("files")
    tiny_training.model(max_position_embeddings=1024).save_pretrained(folder / "model")
    tiny_training.tokenizer().save_pretrained(folder / "model")
    for loss in ("kto", "dpo"):
        tiny_training.data(loss, 16).to_json(folder / f"{loss}.jsonl")
        tiny_training.data(loss, 8, seed=1).to_json(folder / f"{loss}-eval.jsonl")
    return folder


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory):
    """A cache of ``datasets`` for one test file."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def training(model: Path, data: Path, *more: str) -> list[str]:
    """Return the arguments of a short ``kto-fused train`` on a CPU."""
    return ["train", "--model", str(model), "--data", str(data), *FAST, *more]


def command(files: Path, loss: str, *more: str) -> list[str]:
    """Return the arguments of ``kto-fused train`` on the model and data of the fixture ``files``."""
    return training(files / "model", files / f"{loss}.jsonl", "--loss", loss, "--disable_tqdm", *more)


def read_metrics(folder: str | Path) -> dict:
    return json.loads((Path(folder) / "metrics.json").read_text())


def losses(folder: str | Path) -> list[float]:
    return [step["loss"] for step in read_metrics(folder)["steps"]]


def refusal(capsys, arguments: list[str]) -> str:
    """Run a command that must fail. Returns its one sentence on stderr; it must have written nothing into ``runs``."""
    from kto_fused.commands import cli

    assert cli.main(arguments) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    (sentence,) = (line for line in errors.splitlines() if line.startswith(f"kto-fused {arguments[0]}: "))
    assert not Path("runs").exists()
    return sentence
