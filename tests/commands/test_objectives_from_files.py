"""``--data NAME=FILE --objective_weights NAME=WEIGHT``: several objectives from the command line."""

# ruff: noqa: E402 (where packages are missing, the skip must come before the imports that need them)

from pathlib import Path

import pytest

for package in ("datasets", "accelerate", "matplotlib"):
    pytest.importorskip(package, reason=f"kto-fused train needs {package}")

from command_runs import command, read_metrics, refusal

from kto_fused.commands import cli, train

pytestmark = pytest.mark.usefixtures("module_cache", "in_a_new_folder")


def by_name(files, loss="kto"):
    return f"helpful={files / f'{loss}.jsonl'}", f"harmless={files / f'{loss}-eval.jsonl'}"


@pytest.mark.parametrize("loss", ["kto", "dpo"])
def test_each_objective_is_trained_and_logged(files, loss):
    flags = ["--data", *by_name(files, loss), "--objective_weights", "helpful=1", "harmless=0.5", "--max_steps", "2"]
    flags += ["--eval_data", str(files / f"{loss}-eval.jsonl")]
    assert cli.main(command(files, loss, *flags)) == 0
    written = read_metrics(f"runs/{loss}")
    assert written["config"]["objective_weights"] == {"helpful": 1.0, "harmless": 0.5}
    assert {"train_helpful", "train_harmless"} <= written["data"].keys()
    (first, *_) = written["steps"]
    assert first["loss"] == pytest.approx(first["helpful/loss"] + 0.5 * first["harmless/loss"], rel=1e-5)


def test_a_file_of_settings_names_objectives(files):
    helpful, harmless = by_name(files)
    lines = [
        "model: m",
        f"data: [{helpful}, {harmless}]",
        "use_cpu: true",
        "objective_weights: {helpful: 1, harmless: 0.5}",
    ]
    Path("run.yaml").write_text("\n".join(lines))
    settings, config = train.parse(["--config", "run.yaml"])
    assert config.objective_weights == {"helpful": 1.0, "harmless": 0.5}
    assert train.training_data(settings.data, config.objective_weights) == {
        name: [path] for name, _, path in (text.partition("=") for text in (helpful, harmless))
    }


def test_a_file_with_an_equals_sign_in_its_name_is_a_file():
    Path("a=b.jsonl").write_text("")
    assert train.training_data(["a=b.jsonl"], None) == ["a=b.jsonl"]


@pytest.mark.parametrize(
    ("data", "weights", "message"),
    [
        ((0, 1), [], "names an objective: add --objective_weights, such as helpful=1"),
        ((0,), ["helpful=1", "harmless=1"], "--objective_weights names harmless, but no --data harmless=FILE is given"),
        (
            (0, 1),
            ["helpful=1"],
            "must begin with the name of an objective of --objective_weights and =: expected one of",
        ),
        ((0, 1), ["helpful=1", "harmless=much"], "expected weights >= 0 by the names of objectives, such as helpful=1"),
        ((0, 1), ["helpful=1", "helpful=1"], "names an objective twice"),
    ],
)
def test_objectives_that_do_not_fit_are_refused_in_one_sentence(files, capsys, data, weights, message):
    named = by_name(files)
    flags = ["--data", *(named[number] for number in data), *(["--objective_weights", *weights] if weights else [])]
    assert message in refusal(capsys, command(files, "kto", *flags))
