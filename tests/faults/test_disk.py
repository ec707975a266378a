"""Full disks and damaged model files end the command with one sentence that names the file, and leave no half file."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import forked_command
import pytest
import tiny_training
import torch
from safetensors.torch import load_file, save_file

from kto_fused import preference_data
from kto_fused.commands import results, train
from kto_fused.commands.errors import CommandError
from kto_fused.commands.failures import setup_errors
from kto_fused.data import tokens
from kto_fused.huggingface import files as model_files
from kto_fused.trainers import FusedDPOTrainer, FusedTrainer, reference_cache

pytestmark = pytest.mark.usefixtures("small_machine")
FAST = ["--use_cpu", "--learning_rate", "0.01", "--per_device_train_batch_size", "4", "--max_steps", "2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with a model in one file, a model in several files, and a file of pairs."""
    folder = tmp_path_factory.mktemp("files")
    for name, size in (("model", "1GB"), ("sharded", "10KB")):
        tiny_training.model().save_pretrained(folder / name, max_shard_size=size)
        tiny_training.tokenizer().save_pretrained(folder / name)
    tiny_training.data("dpo", 300).to_json(folder / "pairs.jsonl")
    return folder


def command(files: Path, out: Path, *more: str) -> list[str]:
    """The arguments of a DPO run of two steps that writes to `out`."""
    given = ["--model", str(files / "model"), "--data", str(files / "pairs.jsonl"), "--output_dir", str(out)]
    return ["train", "--loss", "dpo", *given, *FAST, "--logging_steps", "1", *more]


# ---- full disks

LIMIT = 4000  # bytes that a file may have; the messages of the command are shorter


def no_large_files(folder: Path) -> None:
    """Let the kernel refuse files larger than `LIMIT` bytes with EFBIG, as a quota does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def no_space(folder: Path) -> None:
    """Fill the file system of `folder`, so that writes fail with ENOSPC. The file system should be small."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                pass


@pytest.fixture(params=["limit", pytest.param("tmpfs", marks=pytest.mark.full)])
def disk(request, tmp_path):
    """A folder, and a function that fills its disk. With --full also a small file system that is really filled."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if request.param == "limit":
        yield folder, no_large_files
        return
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield folder, no_space
    subprocess.run(["umount", str(folder)], check=True)


def filling(fill: Callable[[Path], None], folder: Path, function: Callable) -> Callable:
    """Return `function` with a disk that is filled just before the call."""

    def full(*arguments, **named):
        fill(folder)
        return function(*arguments, **named)

    return full


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("place", "kept"),
    [
        ("save_model", "steps"),
        ("write_files", "no"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (("save_model", "no"), ("write_files", "steps"), ("plot", "no"), ("plot", "steps"))
        ),
    ],
)
def test_results_that_do_not_fit_end_in_one_sentence_and_leave_no_half_results(files, tmp_path, disk, place, kept):
    folder, fill = disk
    out = folder / "out"

    def before():
        owner = FusedDPOTrainer if place == "save_model" else results
        setattr(owner, place, filling(fill, folder, getattr(owner, place)))
        if place == "save_model":  # it saves checkpoints too, which must still fit
            saved = FusedDPOTrainer.save_model
            original = FusedTrainer.save_model

            def save_model(self, output_dir=None, **named):
                is_checkpoint = Path(output_dir).name.startswith("checkpoint-")
                return (original if is_checkpoint else saved)(self, output_dir, **named)

            FusedDPOTrainer.save_model = save_model

    outcome = forked_command.run(command(files, out, "--save_strategy", kept), tmp_path, before)
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    (said,) = (line for line in outcome.err.splitlines() if line.startswith("kto-fused train: "))
    assert f"{out} cannot be written" in said
    assert re.search("No space left|File too large", said)
    assert ("the trained model is in" in said) == (kept == "steps")
    assert out.exists() == (kept == "steps")
    assert kept == "no" or names(out) == {"checkpoint-2"}
    (folder / "filler").unlink(missing_ok=True)
    if kept == "steps":
        resumed = command(files, out, "--save_strategy", kept, "--resume_from_checkpoint", "true")
        outcome = forked_command.run(resumed, tmp_path)
        assert outcome.code == 0, outcome.err
        assert {"model.safetensors", "metrics.json", "curves.png"} <= names(out)
        assert len(json.loads((out / "metrics.json").read_text())["steps"]) == 2


@pytest.mark.parametrize("place", ["reading", "tokenizing", "tokenizing in workers"])
def test_a_full_disk_under_the_data_cache_names_it(files, tmp_path, disk, place, monkeypatch):
    folder, fill = disk
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    workers = ["--dataset_num_proc", "2"] if place == "tokenizing in workers" else []

    def before():
        # the modules in which the command and the trainer look the functions up
        owner, name = (preference_data, "load") if place == "reading" else (tokens, "prepare_paired")
        setattr(owner, name, filling(fill, folder, getattr(owner, name)))
        if place != "reading":
            preference_data.load(str(files / "pairs.jsonl"))

    outcome = forked_command.run(command(files, tmp_path / "out", *workers), tmp_path, before)
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    (said,) = (line for line in outcome.err.splitlines() if line.startswith("kto-fused train: "))
    assert f"the disk is full. Prepared data is kept in {folder / 'cache'} (HF_DATASETS_CACHE)" in said
    assert [path for path in (folder / "cache").rglob("tmp*") if path.is_file()] == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command_of", [command, lambda _, out: ["demo", "--device", "cpu", "--out", str(out)]])
def test_a_disk_that_is_full_before_the_run_is_refused_at_once(files, tmp_path, disk, monkeypatch, command_of):
    folder, fill = disk
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 2000)
    outcome = forked_command.run(command_of(files, folder / "out"), tmp_path, lambda: fill(folder))
    assert outcome.code == 2, outcome.err
    (said,) = outcome.err.splitlines()
    assert re.search(rf"{folder}/out cannot be written: (No space left|File too large)", said)
    assert names(folder) <= {"filler"}


def test_a_disk_that_fills_while_precomputing_loses_no_run(files, tmp_path, disk):
    folder, fill = disk
    flags = ["--precompute_ref_log_probs", "--ref_cache_dir", str(folder / "refs"), "--save_strategy", "no"]

    def before():
        keep, limit = reference_cache._keep, resource.getrlimit(resource.RLIMIT_FSIZE)

        def keep_on_a_full_disk(*arguments):
            fill(folder)
            keep(*arguments)
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

        reference_cache._keep = keep_on_a_full_disk

    outcome = forked_command.run(command(files, tmp_path / "out", *flags), tmp_path, before)
    assert outcome.code == 0, outcome.err
    assert names(folder / "refs") == set()
    assert (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize("kind", [OSError(28, "No space left on device"), RuntimeError("No space left on device")])
def test_a_full_disk_is_known_by_what_caused_an_error(kind):
    with pytest.raises(CommandError, match=r"the disk is full\. Prepared data is kept in"), setup_errors():
        raise ValueError("data cannot be read") from kind


def test_another_error_names_no_cache():
    with pytest.raises(CommandError, match=r"^bad data$"), setup_errors():
        raise ValueError("bad data")


def test_what_a_killed_run_left_in_its_draft_is_removed(tmp_path):
    (tmp_path / results.DRAFT).mkdir()
    (tmp_path / results.DRAFT / "model.safetensors").write_bytes(b"half")
    results.write(tmp_path, {"steps": [], "evaluations": []})
    assert names(tmp_path) == {"metrics.json", "curves.png", "report.html"}


# ---- damaged model files

DAMAGES = {
    "empty": lambda content: b"",
    "cut in half": lambda content: content[: len(content) // 2],
    "without its last bytes": lambda content: content[:-9],
    "zeros": lambda content: bytes(len(content)),
    "backwards": lambda content: content[::-1],
    "a list": lambda content: b"[1, 2]",
}
KINDS = {
    "model": ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    "sharded": ("model-00002-of-00003.safetensors", "model.safetensors.index.json"),
}


@pytest.mark.parametrize("flag", ["model", "ref_model"])
@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind, held in KINDS.items() for file in held])
def test_a_damaged_file_of_a_model_is_named(files, tmp_path, kind, file, flag):
    content = (files / kind / file).read_bytes()
    for damage, damaged in DAMAGES.items():
        folder = tmp_path / damage
        shutil.copytree(files / kind, folder)
        (folder / file).write_bytes(damaged(content))
        with pytest.raises(CommandError) as refused:
            train.load(str(folder), "float32", flag=flag)
        said = str(refused.value)
        assert said.startswith(f"--{flag} {folder} cannot be loaded: {folder / file} is no whole "), (damage, said)
        assert said.endswith("copy or download it again")
        assert "\n" not in said


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_model_ends_the_command_before_anything_is_written(files, tmp_path, file):
    shutil.copytree(files / "model", tmp_path / "damaged")
    (tmp_path / "damaged" / file).write_bytes(b"")
    arguments = command(files, tmp_path / "out", "--ref_model", str(tmp_path / "damaged"))
    outcome = forked_command.run(arguments, tmp_path)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert f"{tmp_path / 'damaged' / file} is no whole" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_model_file_that_lacks_weights_is_refused(files, tmp_path):
    shutil.copytree(files / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    values = load_file(path)
    del values["model.layers.1.mlp.down_proj.weight"]
    save_file(values, path, {"format": "pt"})
    message = r"lack 1 of the weights of LlamaForCausalLM \(model.layers.1.mlp.down_proj.weight among them\)"
    with pytest.raises(CommandError, match=message):
        train.load(str(tmp_path / "model"), "float32")
    with pytest.raises(ValueError, match=message):  # the trainers refuse it too
        tiny_training.make_trainer("dpo", tmp_path / "out", policy=str(tmp_path / "model"))


def test_an_index_that_lacks_a_shard_is_refused(files, tmp_path):
    shutil.copytree(files / "sharded", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    last = "model-00003-of-00003.safetensors"
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != last}
    path.write_text(json.dumps(index))
    with pytest.raises(CommandError, match="of the weights of LlamaForCausalLM"):
        train.load(str(tmp_path / "model"), "float32")


def test_a_git_lfs_pointer_is_named_as_such(files, tmp_path):
    shutil.copytree(files / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid")
    with pytest.raises(CommandError, match=r"model.safetensors is a Git LFS pointer.*git lfs pull"):
        train.load(str(tmp_path / "model"), "float32")


def test_truncated_pytorch_weights_are_named(files, tmp_path):
    shutil.copytree(files / "model", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    path = tmp_path / "model" / "pytorch_model.bin"
    torch.save(weights, path)
    train.load(str(tmp_path / "model"), "float32")
    content = path.read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CommandError, match=f"{re.escape(str(path))} is no whole PyTorch file"):
            train.load(str(tmp_path / "model"), "float32")


def test_the_trainers_name_a_damaged_model_file_too(files, tmp_path):
    shutil.copytree(files / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is no whole safetensors file"):
        tiny_training.make_trainer("dpo", tmp_path / "out", policy=str(tmp_path / "model"))


def test_whole_models_and_unknown_names_are_not_damaged(files):
    for name in (str(files / "model"), str(files / "sharded"), "no/such", "not a name of the Hub!"):
        assert model_files.damaged_file(name) is None
