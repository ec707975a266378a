"""``kto-fused train --loss module:Name``: a loss of the user's own, with its fields as flags and settings."""

# ruff: noqa: E402 (where packages are missing, the skip must come before the imports that need them)

import re
import sys
from pathlib import Path

import pytest

for package in ("datasets", "accelerate", "matplotlib"):
    pytest.importorskip(package, reason=f"kto-fused train needs {package}")

from command_runs import command, losses, read_metrics, refusal

from kto_fused import heads
from kto_fused.commands import cli, train
from kto_fused.commands.errors import CommandError
from kto_fused.heads import protocol

pytestmark = pytest.mark.usefixtures("module_cache", "in_a_new_folder")

MODULE = """
from __future__ import annotations
from dataclasses import dataclass
from math import sqrt
import torch
from kto_fused import heads

@heads.register("command_margin")
@dataclass(frozen=True)
class Margin(heads.Head):
    margin: float = 1.0
    clip: float | tuple[float, float] = 0.2
    loss_type: str = "softplus"
    group = 2
    def __post_init__(self):
        if self.margin < 0:
            raise ValueError(f"margin must be >= 0, got {self.margin}")
    def losses(self, logps, counts, ref_logps):
        chosen, rejected = (0.1 * (logps - ref_logps)).chunk(2)
        return torch.nn.functional.softplus(self.margin - chosen + rejected)

@dataclass(frozen=True)
class Required(heads.Head):
    strength: float
    group = 1
    def losses(self, logps, counts, ref_logps, *, desirable):
        return self.strength * torch.where(desirable, -logps, logps)

class Plain(heads.Head):
    pass

mix = heads.Mix((1.0, heads.make("sigmoid")), (0.3, Margin()))
tokens = heads.make("nll")
number = 3

def liked(logps, counts, ref_logps, *, desirable):
    assert len(logps) == 8, "only this batch"
    return torch.where(desirable, -logps, logps) / counts
liked.group = 1

def misspelt(logps, counts, ref_logps):
    return (logps - ref_logps).men()

def whole(logps, counts, ref_logps):
    return logps.mean()
whole.group = 2

def rounded(logps, counts, ref_logps):
    return logps.detach()
"""


@pytest.fixture
def my_losses(monkeypatch):
    """The module ``my_losses`` in the current folder, of which nothing is left afterwards."""
    Path("my_losses.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(protocol, "_CLASSES", {**protocol._CLASSES})
    yield
    sys.modules.pop("my_losses", None)


def parsed(loss, *flags):
    settings, config = train.parse(["--model", "m", "--data", "d", "--use_cpu", "--loss", f"my_losses:{loss}", *flags])
    return settings.own_loss, type(config).__name__, config.output_dir


def test_fields_of_ones_own_loss_are_flags(my_losses):
    made, kind, folder = parsed("Margin", "--margin", "0.5", "--clip", "[0.2, 0.3]", "--command_margin_loss_type", "x")
    assert (made.margin, made.clip, made.loss_type) == (0.5, (0.2, 0.3), "x")
    assert (kind, folder) == ("FusedDPOConfig", "runs/my_losses.Margin")
    assert parsed("Margin")[0] == type(made)()
    made, kind, _ = parsed("Required", "--strength", "2")
    assert (made.strength, kind) == (2.0, "FusedKTOConfig")


def test_objects_and_functions_are_losses_too(my_losses):
    made, kind, _ = parsed("mix")
    assert (type(made), kind) == (heads.Mix, "FusedDPOConfig")
    assert parsed("liked")[1] == "FusedKTOConfig"
    assert parsed("tokens")[1] == "FusedSFTConfig"


def test_a_file_sets_the_fields_of_ones_own_loss(my_losses):
    Path("run.yaml").write_text("model: m\ndata: d\nuse_cpu: true\nloss: my_losses:Margin\nmargin: 0.25\nclip: 0.5\n")
    made = train.parse(["--config", "run.yaml"])[0].own_loss
    assert (made.margin, made.clip) == (0.25, 0.5)


@pytest.mark.parametrize(
    ("loss", "flags", "message"),
    [
        ("Margin", ["--margin", "-1"], "--loss my_losses:Margin: margin must be >= 0, got -1.0"),
        ("Margin", ["--margn", "1"], "--margn is not a flag; did you mean --margin?"),
        ("Margin", ["--beta", "1"], "--beta is not a flag here: it belongs to --loss "),
        ("Margin", ["--loss_type", "ipo"], "--loss_type is not a flag here: it belongs to --loss "),
        ("Required", [], "the following arguments are required: --strength"),
        ("mix", ["--margin", "1"], "--margin is not a flag"),
        ("Other", [], "my_losses.py has no Other"),
        ("number", [], "--loss my_losses:number is 3: expected a class derived from kto_fused.heads.Head"),
        ("Plain", [], "--loss my_losses:Plain is no dataclass: decorate it with @dataclass(frozen=True)"),
        ("sqrt", [], "--loss my_losses:sqrt: math.sqrt does not take the arguments of a loss (too many positional"),
        ("misspelt", [], "my_losses.misspelt fails when it is tried on 4 sequences on the CPU (AttributeError: "),
        ("whole", [], "my_losses.whole returns a tensor of shape [] for 4 sequences: expected a function f(logps, "),
        ("rounded", [], "my_losses.rounded is not differentiable by logps: it must use PyTorch operations"),
    ],
)
def test_a_loss_that_cannot_be_used_is_refused_in_one_sentence(my_losses, loss, flags, message):
    with pytest.raises(CommandError, match=re.escape(message)):
        parsed(loss, *flags)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("fly", "--loss fly is unknown: choose one of kto, dpo, sft, reward, the name of a loss (such as simpo), or a"),
        ("no_such:Loss", "--loss no_such:Loss: the module no_such cannot be imported: No module named 'no_such'"),
        ("broken:Loss", "--loss broken:Loss: the module broken cannot be imported: too early"),
    ],
)
def test_a_loss_that_is_not_found_is_named(monkeypatch, loss, message):
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("broken.py").write_text("raise RuntimeError('too early')")
    with pytest.raises(CommandError, match=re.escape(message)):
        train.parse(["--model", "m", "--data", "d", "--use_cpu", "--loss", loss])


def test_a_run_with_ones_own_loss_trains_and_records_it(my_losses, files, capsys):
    flags = ["--loss", "my_losses:Margin", "--margin", "0.5", "--max_steps", "2", "--output_dir", "runs/own"]
    assert cli.main([*command(files, "dpo"), *flags]) == 0
    assert all(0 < loss < 2 for loss in losses("runs/own"))
    written = read_metrics("runs/own")
    assert written["settings"]["loss"] == "my_losses:Margin"
    assert written["config"]["loss_type"] == "Margin(margin=0.5, clip=0.2, loss_type='softplus')"
    assert written["config"]["beta"] is None


def test_a_class_in_one_file_trains_alike_by_command_and_by_trainer(files, monkeypatch):
    """``own_heads`` knows nothing but ``kto_fused.heads``. Its class is trained by no code of its own."""
    monkeypatch.setattr(protocol, "_CLASSES", {**protocol._CLASSES})
    from own_heads import Toy

    protocol._CLASSES[Toy.name] = Toy  # the tests of the registry import the module too, and forget its classes
    from kto_fused.trainers import FusedDPOConfig, FusedDPOTrainer

    options = {"max_steps": 3, "logging_steps": 1, "learning_rate": 0.01, "per_device_train_batch_size": 4}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    flags += ["--loss", "own_heads:Toy", "--beta", "0.3", "--output_dir", "runs/command"]
    assert cli.main([*command(files, "dpo"), *flags]) == 0
    args = FusedDPOConfig(output_dir="runs/trainer", use_cpu=True, report_to=[], **options)
    trainer = FusedDPOTrainer(
        str(files / "model"), args=args, train_dataset=str(files / "dpo.jsonl"), loss=Toy(beta=0.3)
    )
    trainer.train()
    by_trainer = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(by_trainer) == 3
    assert losses("runs/command") == pytest.approx(by_trainer, rel=1e-4)
    assert by_trainer[0] == pytest.approx(0.6931**2, rel=1e-3)  # log(2)^2, where policy and reference are alike


def test_several_losses_are_flags(files):
    flags = ["--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.2", "--beta", "0.3", "--max_steps", "2"]
    assert cli.main([*command(files, "dpo", *flags)]) == 0
    config = read_metrics("runs/dpo")["config"]
    assert (config["loss_type"], config["loss_weights"], config["beta"]) == (["sigmoid", "sft"], [1.0, 0.2], 0.3)


def test_an_option_of_another_loss_is_refused_by_name(files, capsys):
    message = refusal(capsys, command(files, "dpo", "--loss_type", "hinge", "--label_smoothing", "0.1"))
    assert "label_smoothing=0.1 has no meaning for loss_type='hinge'" in message
