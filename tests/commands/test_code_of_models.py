"""Python code that comes with a model is run only with ``trust_remote_code``."""

# ruff: noqa: E402 (where packages are missing, the skip must come before the imports that need them)

import io
import json
from pathlib import Path

import pytest

for package in ("datasets", "accelerate", "matplotlib"):
    pytest.importorskip(package, reason=f"kto-fused train needs {package}")

import tiny_training
from command_runs import command, refusal

from kto_fused.commands import cli

pytestmark = pytest.mark.usefixtures("module_cache", "in_a_new_folder")


REMOTE_CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).touch()


class RemoteConfig(LlamaConfig):
    model_type = "remote-llama"


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
"""


@pytest.fixture
def remote(tmp_path) -> tuple[Path, Path]:
    """The folder of a model that brings its own code, and the path of a file that this code creates when it runs."""
    folder, mark = tmp_path / "remote", tmp_path / "was-run"
    tiny_training.model(max_position_embeddings=1024).save_pretrained(folder)
    tiny_training.tokenizer().save_pretrained(folder)
    (folder / "modeling_remote.py").write_text(REMOTE_CODE.format(mark=str(mark)))
    described = json.loads((folder / "config.json").read_text())
    described |= {
        "model_type": "remote-llama",
        "architectures": ["RemoteForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_remote.RemoteConfig",
            "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(described))
    return folder, mark


@pytest.mark.parametrize("flag", ["--model", "--ref_model"])
def test_a_models_own_code_is_never_run_without_the_flag(files, remote, flag, capsys, monkeypatch):
    """Not even if somebody answers "y" to a question on the terminal."""
    folder, mark = remote
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    message = refusal(capsys, command(files, "kto", flag, str(folder)))
    assert f"{flag} {folder} cannot be loaded" in message
    assert "--trust_remote_code" in message
    assert not mark.exists()


@pytest.mark.parametrize("given", ["model", "ref_model", "processing_class"])
def test_no_trainer_runs_a_models_own_code_by_itself(remote, given, monkeypatch):
    folder, mark = remote
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    policy = tiny_training.model(max_position_embeddings=1024)
    policy.config._name_or_path = str(folder)
    models = {"policy": str(folder) if given == "model" else policy}
    models |= {"ref_model": str(folder)} if given == "ref_model" else {}
    if given == "processing_class":
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"auto_map": {"AutoTokenizer": ["modeling_remote.RemoteTokenizer", None]}})
        )
        config = tiny_training.CONFIGS["kto"](output_dir=str(folder.parent / "out"), use_cpu=True, report_to="none")
        with pytest.raises(ValueError, match="trust_remote_code=True in the trainer's config"):
            tiny_training.TRAINERS["kto"](policy, args=config, train_dataset=tiny_training.data("kto", 8))
    else:
        with pytest.raises(ValueError, match="trust_remote_code=True in the trainer's config"):
            tiny_training.make_trainer("kto", folder.parent / "out", **models)
    assert not mark.exists()


@pytest.mark.parametrize("subcommand", ["demo", "estimate"])
def test_no_other_command_runs_a_models_own_code(files, remote, subcommand, capsys, monkeypatch):
    folder, mark = remote
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    data = ["--data", str(files / "kto.jsonl")] if subcommand == "demo" else []
    message = refusal(capsys, [subcommand, "--model", str(folder), *data])
    assert "Python code of its own" in message
    assert not mark.exists()


def test_trust_remote_code_runs_a_models_own_code_and_says_so(files, remote, caplog):
    folder, mark = remote
    arguments = command(files, "kto", "--trust_remote_code", "--max_steps", "1", "--model", str(folder))
    assert cli.main(arguments) == 0
    assert mark.exists()
    assert f"trust_remote_code is on: Python code that comes with {folder} is run" in caplog.text
