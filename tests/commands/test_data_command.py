"""What ``kto-fused data`` prints, draws and refuses."""

# ruff: noqa: E402 (where packages are missing, the skip must come before the imports that need them)

import json
from pathlib import Path

import pytest

for package in ("datasets", "matplotlib"):
    pytest.importorskip(package, reason=f"kto-fused data needs {package}")

from command_runs import refusal

from kto_fused.commands import cli

pytestmark = pytest.mark.usefixtures("module_cache", "in_a_new_folder")


def test_a_file_is_described_with_its_trained_tokens_marked(files, capsys):
    source = [json.loads(line) for line in (files / "kto.jsonl").read_text().splitlines()]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, [*source, source[0]])))
    assert cli.main(["data", "data.jsonl", "--model", str(files / "model"), "--max_length", "12"]) == 0
    printed = capsys.readouterr().out
    liked = sum(record["label"] for record in [*source, source[0]])
    assert "Layout: prompt, completion, label\n" in printed
    assert f"Labels: {liked} liked, {len(source) + 1 - liked} not liked" in printed
    assert "Duplicates: 1 records repeat an earlier one" in printed
    assert f"Prompts: {len({record['prompt'] for record in source})} different ones" in printed
    assert f"Examples: {len(source) + 1} at max_length=12; 0 of them with a completion cut" in printed
    first = printed.partition("--- example 0, completion, ")[2].partition("--- ")[0]
    text, _, trained = first.partition("\n")[2].partition(">>>")
    assert text.split() == source[0]["prompt"].split()
    assert trained.rstrip().removesuffix("<<<").split() == [*source[0]["completion"].split(), "</s>"]
    assert Path("lengths.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["data", "data.jsonl", "--model", str(files / "model"), "--max_length", "5"]) == 0
    assert "of them with a completion cut" in capsys.readouterr().out


def test_without_a_model_lengths_are_characters(files, capsys):
    assert cli.main(["data", str(files / "dpo.jsonl"), "--loss", "dpo", "--histogram", "a.png"]) == 0
    printed = capsys.readouterr().out
    assert "Layout: prompt, chosen, rejected\n" in printed
    assert "Give --model for lengths in tokens" in printed
    assert "characters" in printed
    assert Path("a.png").exists()


def test_the_first_bad_record_ends_it_and_all_are_listed_on_request(files, capsys):
    good = (files / "kto.jsonl").read_text().splitlines()[0]
    Path("data.jsonl").write_text(f'{good}\n{{"prompt": "a"}}\n{good}\n{{\n')
    assert "data.jsonl, line 2, field 'completion': missing" in refusal(capsys, ["data", "data.jsonl"])
    assert cli.main(["data", "data.jsonl", "--all-errors"]) == 2
    out, err = capsys.readouterr()
    assert [line.partition(": ")[0] for line in out.splitlines()] == [
        "data.jsonl, line 2, field 'completion'",
        "data.jsonl, line 4",
    ]
    assert "2 bad records, listed above" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.csv"], "absent.csv: no such file or folder"),
        ([".", "--columns", "question"], "--columns must have the form FIELD=COLUMN"),
        ([".", "--max_length", "1"], "--max_length must be a number of at least 2"),
        ([".", "--histogram", "none/a.png"], "--histogram none/a.png: expected a name"),
        ([".", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["."], "got a folder without any"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(capsys, arguments, message):
    assert message in refusal(capsys, ["data", *arguments])
