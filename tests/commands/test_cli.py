"""The command ``kto-fused`` as a whole: its subcommands, their help, and what they need to be installed."""

# ruff: noqa: E402 (where packages are missing, the skip must come before the imports that need them)

import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

for package in ("datasets", "accelerate", "matplotlib"):
    pytest.importorskip(package, reason=f"kto-fused train needs {package}")

from command_runs import refusal

from kto_fused.commands import cli, estimate, train

pytestmark = pytest.mark.usefixtures("module_cache", "in_a_new_folder")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["train", "demo"])
def test_a_command_without_its_packages_says_how_to_install_them(monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    install = cli.INSTALL
    assert (
        refusal(capsys, [name])
        == f"kto-fused {name}: these packages are not installed: accelerate, datasets; {install}"
    )
    command = install.partition(", run ")[2].replace("'", '"')
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")


def test_estimate_takes_its_settings_as_flags(files, capsys):
    assert cli.main(["estimate", "--model", str(files / "model"), "--seq", "64", "--loss", "dpo", "--batch", "3"]) == 0
    assert "DPO, 3 pairs of T = 64" in capsys.readouterr().out
    assert "--seq must be" in refusal(capsys, ["estimate", "--model", str(files / "model"), "--seq", "0"])
    assert "--model nothing: its configuration" in refusal(capsys, ["estimate", "--model", "nothing"])


@pytest.mark.parametrize("flags", [[], ["--lora_rank", "2"]], ids=["trained", "frozen"])
def test_the_estimate_assumes_the_dtype_that_train_loads(flags):
    settings, _ = train.parse(["--model", "m", "--data", "d", "--use_cpu", *flags])
    head = "frozen" if settings.lora_rank else "trained"
    facts = estimate.ModelFacts("llama", 1, 2, 3, 3, 3, 1, None, False)
    shape = estimate.loss_shape(estimate.EstimateSettings("m", dtype="bf16", head=head), facts, 64)
    # auto is the dtype of the checkpoint, usually bfloat16
    assert shape.param_dtype == {"float32": torch.float32, "auto": torch.bfloat16}[settings.dtype]


def test_env_prints_versions(capsys):
    assert cli.main(["env"]) == 0
    assert torch.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["fly"], ["env", "more"]])
def test_a_wrong_command_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: kto-fused" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_lists_its_flags(name, capsys):
    with suppress(SystemExit):
        assert cli.main([name, "--help"]) == 0
    assert f"usage: kto-fused {name}" in capsys.readouterr().out
