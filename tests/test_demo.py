"""The command ``kto-fused demo``: what it learns, what it writes, and how it fails."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from kto_fused import cli, demo, feedback

FEW = {"steps": 10, "batch_size": 16, "device": "cpu"}


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
    assert margins[0] == pytest.approx(0, abs=1e-4)  # policy and reference are still the same model
    assert sum(margins[-4:]) / 4 > 0.02


def test_fused_and_reference_trajectories_agree(finished):
    comparison = finished[0]["comparison"]
    assert comparison["steps"] == demo.COMPARED_STEPS
    assert comparison["largest_gradient"] > 1e-3
    assert comparison["largest_loss_difference"] < 1e-5
    assert comparison["largest_gradient_difference"] < 1e-5
    assert all(value > 0 for value in comparison["milliseconds_per_step"].values())
    assert comparison["peak_mebibytes"]["fused"] < comparison["peak_mebibytes"]["reference"]


def test_it_writes_metrics_and_curves(finished):
    metrics, out = finished
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "metrics.json"]
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_curve(finished, tmp_path):
    again = demo.run(demo.Settings(out=tmp_path, **FEW))
    assert [step["loss"] for step in again["steps"]] == [step["loss"] for step in finished[0]["steps"]]


def test_a_local_checkpoint_and_a_file_of_ones_own(tmp_path):
    examples = feedback.read(feedback.BUNDLED)[:40]
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join(json.dumps(vars(example)) for example in examples) + "\n\n")
    tokenizer, model = demo.load(None, examples)
    tokenizer.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    arguments = ["demo", "--data", str(data), "--model", str(tmp_path / "model"), "--steps", "2", "--batch-size", "4"]
    arguments += [
        "--beta",
        "0.5",
        "--seed",
        "3",
        "--device",
        "cpu",
        "--backend",
        "torch",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(arguments) == 0
    settings = json.loads((tmp_path / "out" / "metrics.json").read_text())["settings"]
    assert (settings["beta"], settings["seed"], settings["backend"], settings["steps"]) == (0.5, 3, "torch", 2)


def test_the_bundled_feedback():
    examples = feedback.read(feedback.BUNDLED)
    assert len(examples) >= 200
    assert len({example.completion for example in examples}) == len(examples)
    share = sum(example.label for example in examples) / len(examples)
    assert 0.4 < share < 0.6


def test_batches_pad_prompts_and_mismatch():
    tokens = [feedback.Tokens([1, 2], [3], True), feedback.Tokens([4], [5, 6, 7], False)]
    batch = feedback.collate(tokens, torch.device("cpu"))
    assert batch.input_ids.tolist() == [[1, 2, 3, 0], [4, 5, 6, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [[-100, -100, 3, -100], [-100, 5, 6, 7]]
    assert batch.desirable.tolist() == [True, False]
    assert [(t.prompt, t.completion) for t in feedback.mismatch(tokens)] == [([1, 2], [5, 6, 7]), ([4], [3])]


GOOD = '{"prompt": "p", "completion": "c", "label": true}\n{"prompt": "p", "completion": "d", "label": false}\n'
BROKEN = {
    "a broken line": (GOOD + '{"prompt": "p"', "feedback.jsonl, line 3: not valid JSON"),
    "a missing field": (GOOD + '{"prompt": "p", "label": true}', "line 3: the field 'completion' is missing"),
    "a label of text": (
        '{"prompt": "p", "completion": "c", "label": "yes"}',
        "line 1: 'label' must be bool, got 'yes'",
    ),
    "an empty completion": (GOOD + '{"prompt": "p", "completion": "", "label": true}', "line 3: 'completion' is empty"),
    "half a character": (
        GOOD + '{"prompt": "p", "completion": "\\ud800", "label": true}',
        "line 3: 'completion' holds half a surrogate pair",
    ),
    "a list": (GOOD + "\n[1]", "line 4: expected an object"),
    "an empty file": ("", "feedback.jsonl: holds no examples"),
    "one class": ('{"prompt": "p", "completion": "c", "label": true}', "holds no undesirable example (label false)"),
    "bytes": (b"\xff\xfe\x00", "cannot be read as text"),
}


def fails(capsys, tmp_path: Path, *arguments: str) -> str:
    """The one sentence on stderr; exit code 2 and nothing written."""
    out = tmp_path / "out"
    code = cli.main(["demo", "--out", str(out), "--device", "cpu", *arguments])
    errors = capsys.readouterr().err.strip()
    assert code == 2
    assert errors.startswith("kto-fused demo: ")
    assert "\n" not in errors
    assert not out.exists()
    return errors


@pytest.mark.parametrize("name", BROKEN)
def test_a_feedback_file_that_cannot_be_used(capsys, tmp_path, name):
    content, message = BROKEN[name]
    path = tmp_path / "feedback.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in fails(capsys, tmp_path, "--data", str(path))


def test_line_separators_inside_a_string_are_text(tmp_path):
    path = tmp_path / "feedback.jsonl"
    path.write_text(GOOD.replace('"d"', '"one\u2028two\u0085three"'), encoding="utf-8")
    assert feedback.read(path)[1].completion == "one\u2028two\u0085three"


def test_every_flag_is_a_setting():
    flags = {action.dest for action in cli.parser()._subparsers._group_actions[0].choices["demo"]._actions}
    assert flags - {"help"} == {field.name for field in fields(demo.Settings)}


def test_a_feedback_file_that_is_not_there(capsys, tmp_path):
    assert "missing.jsonl: cannot be read" in fails(capsys, tmp_path, "--data", str(tmp_path / "missing.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "1"], "--batch-size must be at least 2, to mismatch prompts; got 1"),
        (["--batch-size", "9999"], "--batch-size 9999 is more than the"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--beta", "0"], "--beta must be a finite number > 0, got 0.0"),
        (["--beta", "nan"], "--beta must be a finite number > 0, got nan"),
        (["--device", "warp"], "--device warp"),
        (["--device", "meta"], "--device meta"),
        (["--seed", str(2**70)], "--seed must lie in [0, 2^63)"),
        (["--model", "no/such/model"], "--model no/such/model cannot be loaded"),
    ],
)
def test_settings_that_cannot_be_run(capsys, tmp_path, arguments, message):
    assert message in fails(capsys, tmp_path, *arguments)


def test_an_out_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "out").write_text("a file is in the way")
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert "cannot be written: File exists" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "a file is in the way"


def test_unknown_flags_exit_with_2_as_a_command():
    result = subprocess.run(
        [sys.executable, "-c", "from kto_fused.cli import main; main()", "demo", "--speed", "9"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert result.returncode == 2
    assert "--speed" in result.stderr
