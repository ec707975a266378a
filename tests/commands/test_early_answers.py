"""What the command answers before it imports anything heavy: help, wrong flags, files, records and packages."""

# ruff: noqa: E402 (where packages are missing, the skip must come before the imports that need them)

import importlib.metadata
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

for package in ("datasets", "accelerate", "matplotlib"):
    pytest.importorskip(package, reason=f"kto-fused train needs {package}")

import huggingface_hub
from command_runs import command, refusal

from kto_fused.commands import cli, early, environment, flag_table, overview, process, train
from kto_fused.commands.errors import CommandError

pytestmark = pytest.mark.usefixtures("module_cache", "in_a_new_folder")

KEYS = flag_table.table()["commands"]
# commands that must fail, by what they may have imported until then
AT_ONCE = [
    *(["kto", "--model", "no/such/model", "--data", "d.jsonl"], ["kto", "--model", ".", "--data", "d.jsonl"]),
    *(
        ["dpo", "--model", "m", "--data", "missing.jsonl"],
        ["dpo", "--model", "m", "--data", "d.jsonl", "--lerning", "1"],
    ),
    *(["sft", "--model", "m", "--data", "d.jsonl", "--chunk_bytes", "ten"], ["reward", "--config", "missing.yaml"]),
    *(["train", "--config", "wrong.yaml"], ["train", "--loss", "grpo"], ["online", "--loss", "fly"], ["spin"]),
    *(
        ["kto", "--model", "m", "--data", "d.jsonl", "--report_to", "neptune"],
        ["ppo", "--model", "m", "--data", "none"],
    ),
    *(["demo", "--stepz", "1"], ["estimate", "--modle", "m"], ["data", "none.csv"], ["compare", "none"]),
    *(["chat", "--model", "no/such/model"], ["merge", "--model", "none", "--to", "n"]),
]
BAD_RECORDS = [
    ["kto", "--model", "m", "--data", "bad.jsonl"],
    ["data", "bad.jsonl"],
    ["dpo", "--model", "m", "--data", "bad.csv"],
]
HEAVY = ("torch", "transformers", "datasets", "pandas", "matplotlib")


def test_help_and_errors_come_before_anything_heavy():
    Path("d.jsonl").write_text('{"prompt": "p", "completion": "c", "label": true}')
    Path("bad.jsonl").write_text('{"prompt": "p"}')
    Path("bad.csv").write_text("prompt,answer\na,b\n")
    Path("wrong.yaml").write_text("lerning_rate: 1")
    helps = [[name, "--help"] for name in ("train", *early.RECIPES, *cli.LOOPS, "demo", "estimate")]
    code = (
        "import sys; from kto_fused.commands import cli\n"
        f"helps = [cli.main(arguments) for arguments in {helps}]\n"
        f"codes = [cli.main(arguments) for arguments in {AT_ONCE}]\n"
        f"found = [name for name in {HEAVY} if name in sys.modules]\n"
        f"codes += [cli.main(arguments) for arguments in {BAD_RECORDS}]\n"
        "print(helps, codes, found, [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = ([0] * len(helps), [2] * len(AT_ONCE + BAD_RECORDS), [], [])
    assert done.stdout.splitlines()[-1] == " ".join(map(str, expected)), done.stderr
    assert len(done.stderr.splitlines()) == len(AT_ONCE + BAD_RECORDS)


def test_the_table_of_flags_is_that_of_the_configurations():
    """After an option has changed, run python -m kto_fused.commands.flag_table."""
    made, table = json.loads(json.dumps(flag_table.made())), flag_table.table()
    for key in KEYS:
        now, then = ([each["flags"][number] for number in each["commands"][key]] for each in (made, table))
        if made["transformers"] != table["transformers"]:
            now, then = ([flag for flag in flags if not flag.get("inherited")] for flags in (now, then))
        assert now == then
    for name in ("losses", "needs", "belongs_to", "left_out"):
        if name in ("losses", "needs"):  # a docstring's example may have registered a loss in this process
            made[name].pop("doc_margin", None)
        assert made[name] == table[name]


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("key", KEYS)
def test_help_is_at_most_120_lines_and_has_every_flag_of_this_package(key, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    name = key.partition(" ")[0]
    lines = overview.text(key, name, cli.description(name)).splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= columns
    own = {flag["name"] for flag in flag_table.flags_of(key) if not flag.get("inherited")}
    shown = {line.split()[0][2:] for line in lines if line.startswith("  --")}
    assert own <= shown
    assert lines[0].startswith(f"usage: kto-fused {name}")
    if name in early.RECIPES:
        titles = [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]
        assert titles == [title for title in overview.GROUPS if title != "rounds"]
        assert "  --learning_rate X" in "\n".join(lines)


def test_help_all_lists_every_flag(capsys):
    for text in ("--help-all", "--help_all"):
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", "--loss", "orpo", text])
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        for action in train.flags_of("dpo")._actions:
            assert action.option_strings[0] in printed


def test_with_another_version_of_transformers_its_flags_are_read_from_its_source(monkeypatch, capsys):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1" if name == "transformers" else version(name))
    given = ["--model", "m", "--data", "d", "--max_steps", "ten", "--no_bf16", "--lr_scheduler_kwargs", "{}"]
    values = flag_table.TableParser("kto", "kto").values(given)
    assert values["max_steps"] == ["ten"]  # its type is not known
    assert values["output_dir"] == "runs/kto"
    for wrong in (["--lerning_rate", "1"], ["--do_train"], ["--beta", "much"]):
        with pytest.raises(CommandError):
            flag_table.TableParser("kto", "kto").values([*given, *wrong])
    page = overview.text("kto", "kto", "")
    assert page.count("\n") <= 120
    assert "  --learning_rate X            or --lr: initial learning rate" in page
    assert cli.main(["demo", "--steps", "0"]) == 2
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--report_to", "neptune"], "--report_to neptune needs the package neptune, which is not installed: run pip"),
        (["--model", "broken.jsonl"], "--model broken.jsonl cannot be loaded: it is a file, not a model's folder"),
        (["--data", "a=b.jsonl"], "--data a=b.jsonl: no such file or folder"),
        (["--loss", "no_such:Loss", "--data", "none.csv"], "--data none.csv: no such file or folder"),
        (["--data", "words.csv"], "say which of them mean liked and not liked with --label_true and --label_false"),
        (["--load_in_4bit"], "load_in_4bit needs an adapter, because weights of 4 bits are not trained: set lora_rank"),
        (["--bf16", "maybe"], "argument --bf16: expected true or false, got 'maybe'"),
    ],
)
def test_an_early_error_says_what_to_do(files, capsys, flags, message):
    Path("broken.jsonl").write_text("{")
    Path("words.csv").write_text("prompt,completion,label\na,b,up\na,b,down\n")
    assert message in refusal(capsys, command(files, "kto", *flags))


@pytest.mark.parametrize(
    ("is_offline", "token", "message"),
    [
        (
            True,
            "given",
            "--push_to_hub needs the Hub, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids it: unset the",
        ),
        (
            False,
            None,
            "--push_to_hub finds no token of the Hub: run hf auth login, set HF_TOKEN or give --hub_token, or",
        ),
    ],
)
def test_an_upload_that_cannot_be_is_refused_before_the_run(files, capsys, monkeypatch, is_offline, token, message):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    said = refusal(capsys, command(files, "kto", "--push_to_hub"))
    assert message in said
    assert said.endswith("leave --push_to_hub out and upload runs/kto after the run with hf upload")
    if not is_offline:
        early.check("train", command(files, "kto", "--push_to_hub", "--hub_token", "given")[1:])


def test_the_output_folder_that_is_checked_early_is_that_of_the_run(files):
    Path("file").write_text("")
    Path("run.yaml").write_text("output_dir: file/out\n")
    Path("runs").mkdir()
    Path("runs/dpo").write_text("")
    given = command(files, "dpo")[1:]
    for loss, flags, folder in (
        ("dpo", ["--config", "run.yaml"], "file/out"),
        ("simpo", ["--output_dir", "file/out"], "file/out"),
        ("no_such:Loss", ["--config", "run.yaml"], "file/out"),
        ("dpo", [], "runs/dpo"),
    ):
        with pytest.raises(CommandError, match=f"^{folder} cannot be written: Not a directory"):
            early.check("train", [*given, "--loss", loss, *flags])
    for loss in ("simpo", "no_such:Loss"):
        early.check("train", [*given, "--loss", loss])
    early.check("train", [*given, "--config", "run.yaml", "--output_dir", "out"])


def test_4_bits_without_bitsandbytes_name_the_package_and_its_extra(files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = refusal(capsys, command(files, "kto", "--load_in_4bit", "--lora_rank", "2"))
    assert message.endswith(
        "needs the package bitsandbytes, which is not installed: in a clone of kto-fused, run pip "
        "install -c constraints.txt '.[train,4bit]'"
    )


@pytest.mark.parametrize("version", ["0.1", importlib.metadata.version("transformers")])
def test_only_the_first_records_are_checked_early(files, monkeypatch, version):
    known = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "transformers" else known(name))
    Path("late.jsonl").write_text('{"prompt": "p", "completion": "c", "label": true}\n' * early.FIRST_RECORDS + "{")
    for flags in ([], ["--output_dir", "null"]):
        early.check("kto", command(files, "kto", "--data", "late.jsonl", *flags)[1:])


def test_warnings_that_say_nothing_to_a_user_do_not_appear_and_others_do(recwarn, caplog):
    logger = logging.getLogger(process.MEANINGLESS_LOG[0])
    with process.without_meaningless_warnings():
        text = (
            "'pin_memory' argument is set as true but no accelerator is found, then device pinned memory won't be used."
        )
        warnings.warn(text, stacklevel=1)
        warnings.warn(
            "`is_gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1
        )
        warnings.warn("`other` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1)
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
        logger.warning("other")
    assert [str(warning.message)[:7] for warning in recwarn] == ["`other`"]
    assert caplog.messages == ["other"]


def test_waiting_threads_sleep_unless_the_user_chose(monkeypatch):
    code = (
        "import os; from kto_fused.commands import cli\n"
        "cli.let_threads_sleep(); print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    for name in cli.WAITING:
        monkeypatch.delenv(name, raising=False)
    for chosen, expected in (
        ({}, "passive"),
        ({"OMP_WAIT_POLICY": "active"}, "active"),
        ({"GOMP_SPINCOUNT": "9"}, "None"),
    ):
        for name, value in chosen.items():
            monkeypatch.setenv(name, value)
        assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == expected
        for name in chosen:
            monkeypatch.delenv(name)
    assert "OMP_WAIT_POLICY" in environment.VARIABLES
