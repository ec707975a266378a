"""Runs of the command ``kto-fused`` in tests: the command's arguments, and what a run wrote.

The fixtures ``files``, ``module_cache`` and ``in_a_new_folder`` of ``conftest.py`` go with it.
"""

import json
from pathlib import Path

FAST = ["--use_cpu", "--learning_rate", "0.01", "--per_device_train_batch_size", "4"]


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
