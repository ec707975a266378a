"""A checkpoint that is damaged, incomplete or of another run is never used.

If it is named, it is refused with an error that says what is wrong. If the newest checkpoint is asked for, an older
complete one is taken. The same holds for checkpoints that were saved onto a full disk.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tiny_training import (
    WORDS,
    StopAt,
    data,
    history,
    make_trainer,
    model,
    tokenizer,
    vision_language_model,
    weights,
)

from kto_fused.commands import cli
from kto_fused.trainers import checkpoints, fingerprints, runs
from kto_fused.trainers.checkpoints import MANIFEST, PREVIOUS, CheckpointError
from kto_fused.trainers.configs import FusedDPOConfig, FusedKTOConfig

pytestmark = pytest.mark.usefixtures("small_machine")
TORCH_FILES = ("optimizer.pt", "rng_state.pth")
SAVING = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 0.01}


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


KINDS = {"cut": cut, "empty": empty, "flip": flip, "delete": Path.unlink}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The folder of a run of 4 steps, with checkpoints after steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved")
    make_trainer("kto", folder, **SAVING).train()
    assert [path.name for path in sorted(folder.glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]
    return folder


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """A copy of the `saved` folder."""
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple:
    """The outcome of a run of 8 steps that was never stopped."""
    return outcome(make_trainer("kto", tmp_path_factory.mktemp("whole"), num_train_epochs=2, **SAVING))


def outcome(trainer, resume: str | bool | None = None) -> tuple:
    """Train; returns all that must not depend on interruptions: everything logged, and the weights."""
    trainer.train(resume_from_checkpoint=resume)
    return history(trainer), {name: tensor.tolist() for name, tensor in weights(trainer).items()}


def files_of(checkpoint: Path) -> list[str]:
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


# ---- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_damaged_file_is_named_and_its_checkpoint_passed_over(saved, tmp_path, caplog, kind):
    names = files_of(saved / "checkpoint-4")
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "metrics_0.pt", "rng_state.pth"} <= set(names)
    assert {"trainer_state.json", "training_args.bin", MANIFEST} <= set(names)
    for number, name in enumerate(names):
        run = shutil.copytree(saved, tmp_path / str(number))
        damaged = run / "checkpoint-4"
        KINDS[kind](damaged / name)
        with pytest.raises(CheckpointError) as refused:
            checkpoints.choose(str(damaged), str(run))
        assert f"{damaged / name} " in str(refused.value)
        assert "checkpoint-2 is complete, resume from that" in str(refused.value)
        caplog.clear()
        assert checkpoints.choose(True, str(run)) == str(run / "checkpoint-2")
        assert f"passed over: {damaged / name} " in caplog.text


def test_training_never_uses_a_damaged_checkpoint(saved, tmp_path, whole, full):
    """Naming a damaged checkpoint is an error before training.

    Resuming from the newest complete one ends like a run that was never stopped.
    """
    cases = [(name, kind) for name in files_of(saved / "checkpoint-4") for kind in KINDS]
    for number, (name, kind) in enumerate(cases if full else random.Random(4).sample(cases, 4)):
        run = shutil.copytree(saved, tmp_path / str(number))
        KINDS[kind](run / "checkpoint-4" / name)
        trainer = make_trainer("kto", run, num_train_epochs=2, **SAVING)
        before = weights(trainer)
        with pytest.raises(CheckpointError, match=name):
            trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
        assert all(tensor.equal(before[key]) for key, tensor in weights(trainer).items())
        assert outcome(trainer, resume=True) == whole, f"{kind} {name}"


def test_files_in_folders_of_a_checkpoint_count_too(tmp_path):
    """DeepSpeed, FSDP and sharded models write such folders."""
    shard = tmp_path / "checkpoint-1" / "global_step1" / "mp_rank_00_model_states.pt"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"weights")
    checkpoints.write_manifest(tmp_path / "checkpoint-1", {})
    checkpoints.verify(tmp_path / "checkpoint-1")
    flip(shard)
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states.pt is damaged"):
        checkpoints.verify(tmp_path / "checkpoint-1")


def test_no_complete_checkpoint_is_an_error_that_says_why(run):
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    cut(run / "checkpoint-4" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no complete checkpoint: .*model.safetensors has .*optimizer.pt is mis"):
        make_trainer("kto", run, **SAVING).train(resume_from_checkpoint=True)


def test_a_damaged_best_model_is_not_loaded(tmp_path):
    class Damage(StopAt):
        def on_train_begin(self, args, state, control, **_):
            pass

        def on_step_end(self, args, state, control, **_):
            if state.global_step == self.step:
                flip(Path(state.best_model_checkpoint) / "model.safetensors")

    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    trainer = make_trainer(
        "dpo", tmp_path, evaluation=4, callbacks=[Damage(4)], **{**SAVING, "learning_rate": 0.0, **settings}
    )
    with pytest.raises(CheckpointError, match=r"checkpoint-1/model.safetensors is damaged"):
        trainer.train()


# ---- without a manifest -------------------------------------------------------------------------------------------


def test_a_checkpoint_without_a_manifest_is_taken_only_when_asked_for(run, whole, caplog):
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / MANIFEST).unlink()
    settings = {"num_train_epochs": 2, **SAVING}
    for resume in (True, str(run / "checkpoint-4")):
        with pytest.raises(CheckpointError, match=rf"{MANIFEST} is missing.*resume_anyway=True \(--resume_anyway\)"):
            make_trainer("kto", run, **settings).train(resume_from_checkpoint=resume)
    assert outcome(make_trainer("kto", run, resume_anyway=True, **settings), resume=True) == whole
    assert (
        "checkpoint-4 has no manifest.json: resume_anyway takes it, and nothing in it could be verified" in caplog.text
    )


@pytest.mark.parametrize("kind", ["cut", "empty", "delete"])
@pytest.mark.parametrize("name", [checkpoints.STATE, *checkpoints.ESSENTIAL, "model.safetensors"])
def test_resume_anyway_still_refuses_files_that_cannot_be_read(run, name, kind):
    checkpoint = run / "checkpoint-4"
    (checkpoint / MANIFEST).unlink()
    KINDS[kind](checkpoint / name)
    if (name, kind) == ("model.safetensors", "delete"):  # weights may have other file names, so the trainer notices it
        with pytest.raises(ValueError, match="checkpoint-4"):
            make_trainer("kto", run, resume_anyway=True, **SAVING).train(resume_from_checkpoint=str(checkpoint))
        return
    with pytest.raises(CheckpointError, match=name):
        checkpoints.choose(str(checkpoint), str(run), anyway=True)


def test_a_complete_checkpoint_is_preferred_to_a_newer_one_without_a_manifest(run):
    (run / "checkpoint-4" / MANIFEST).unlink()
    assert checkpoints.choose(True, str(run), anyway=True) == str(run / "checkpoint-2")


# ---- rotation -----------------------------------------------------------------------------------------------------


def complete(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(bytes([step]))
    checkpoints.write_manifest(checkpoint, {})
    return checkpoint


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoint-*")}


def test_rotation_goes_by_step_not_by_time(tmp_path):
    class SetBack(StopAt):
        def on_save(self, args, state, control, **_):
            if state.global_step < self.step:
                os.utime(tmp_path / f"checkpoint-{state.global_step}", (4e9, 4e9))

    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    make_trainer("kto", tmp_path, callbacks=[SetBack(4)], **settings).train()
    assert names_in(tmp_path) == {"checkpoint-3", "checkpoint-4"}


def test_torn_checkpoints_are_not_counted_as_kept(tmp_path):
    first, torn, current = complete(tmp_path, 1), complete(tmp_path, 2), complete(tmp_path, 3)
    (torn / "model.safetensors").unlink()
    checkpoints.rotate(tmp_path, 3, current, None)
    assert names_in(tmp_path) == {first.name, torn.name, current.name}  # too few complete ones to remove any
    checkpoints.rotate(tmp_path, 2, current, None)
    assert names_in(tmp_path) == {first.name, current.name}


def test_the_best_and_the_last_are_kept_and_later_steps_of_a_run_that_went_back_go_first(tmp_path):
    best, current, _, _ = (complete(tmp_path, step) for step in (1, 5, 4, 9))
    checkpoints.rotate(tmp_path, 3, current, str(best))
    assert names_in(tmp_path) == {"checkpoint-1", "checkpoint-4", "checkpoint-5"}
    checkpoints.rotate(tmp_path, 1, current, str(best))
    assert names_in(tmp_path) == {"checkpoint-1", "checkpoint-5"}
    checkpoints.rotate(tmp_path, None, current, None)
    assert names_in(tmp_path) == {"checkpoint-1", "checkpoint-5"}


def test_a_complete_checkpoint_stays_until_the_one_that_replaces_it_is_complete(tmp_path):
    checkpoint = complete(tmp_path, 2)
    checkpoints.begin(checkpoint)
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"half")
    checkpoints.abandon(checkpoint)
    assert checkpoints.choose(True, str(tmp_path)) == str(checkpoint)
    checkpoints.begin(checkpoint)
    checkpoint.mkdir()
    assert checkpoints.is_complete(checkpoint.with_name(checkpoint.name + PREVIOUS))  # the state that a kill leaves
    assert checkpoints.choose(True, str(tmp_path)) == str(checkpoint), "the earlier checkpoint was not put back"
    checkpoints.verify(checkpoint)
    checkpoints.begin(checkpoint)
    checkpoint.mkdir()
    checkpoints.end(checkpoint, {})
    assert names_in(tmp_path) == {"checkpoint-2"}


def test_a_complete_checkpoint_that_cannot_be_set_aside_stays(tmp_path, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 2}
    make_trainer("kto", tmp_path, **settings).train()

    def no_permission(self, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", no_permission)
    with pytest.raises(CheckpointError, match=r"checkpoint-4 could not be saved \(Permission denied\)"):
        make_trainer("kto", tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    checkpoints.verify(tmp_path / "checkpoint-4")


# ---- a disk that fills --------------------------------------------------------------------------------------------


@pytest.fixture
def file_limit():
    """A function that limits the size of files, in bytes. Writing more fails as on a full disk.

    Under a limit nothing is printed, because stdout may be a larger file. A test lifts the limit before it ends, so
    that pytest can report.
    """
    before, streams = resource.getrlimit(resource.RLIMIT_FSIZE), [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)  # flush buffered output first, which may exceed the new limit
        sys.stdout.flush()
        for number, stream in enumerate(streams, 1):
            os.dup2(stream if size == resource.RLIM_INFINITY else nowhere, number)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    limit(resource.RLIM_INFINITY)
    for handle in (*streams, nowhere):
        os.close(handle)


class FillDisk(StopAt):
    """Fills the disk after step `step`."""

    def __init__(self, step: int, fill):
        super().__init__(step)
        self.fill = fill

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.fill()


@pytest.mark.parametrize(
    "too_large",
    ["model.safetensors", MANIFEST, *(pytest.param(name, marks=pytest.mark.full) for name in TORCH_FILES)],
)
def test_a_failed_save_ends_in_one_sentence_and_keeps_the_older_one(saved, tmp_path, file_limit, too_large, whole):
    sizes = sorted({path.stat().st_size for path in (saved / "checkpoint-2").iterdir()})
    size = (saved / "checkpoint-2" / too_large).stat().st_size
    fill = FillDisk(3, lambda: file_limit(max([other for other in sizes if other < size], default=size - 1)))
    settings = {"num_train_epochs": 2, **SAVING}
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4 could not be saved \(.+\): free space .* resume from the newest"
    ):
        make_trainer("kto", tmp_path / "run", callbacks=[fill], **settings).train()
    file_limit(resource.RLIM_INFINITY)
    assert names_in(tmp_path / "run") == {"checkpoint-2"}
    assert outcome(make_trainer("kto", tmp_path / "run", **settings), resume=True) == whole


@pytest.mark.full
def test_a_save_onto_a_full_tmpfs_leaves_the_older_checkpoint(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        fill = FillDisk(3, lambda: (small / "filler").write_bytes(b"x" * (shutil.disk_usage(small).free - 20_000)))
        with pytest.raises(CheckpointError, match=r"checkpoint-4 could not be saved"):
            make_trainer("kto", small / "run", callbacks=[fill], **SAVING).train()
        assert checkpoints.choose(True, str(small / "run")) == str(small / "run" / "checkpoint-2")
        assert names_in(small / "run") == {"checkpoint-2"}
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_command_ends_with_one_sentence_where_the_disk_is_full(tmp_path, monkeypatch, capsys, file_limit):
    monkeypatch.chdir(tmp_path)
    model().save_pretrained("model")
    tokenizer().save_pretrained("model")
    data("kto", 8).to_json("data.jsonl")
    options = ["--use_cpu", "--disable_tqdm", "--max_steps", "1", "--num_train_epochs", "1"]
    arguments = ["train", "--model", "model", "--data", "data.jsonl", "--output_dir", "out", *options]
    for saving, problem in (("steps", "checkpoint-1 could not be saved"), ("no", "out cannot be written")):
        file_limit(20_000)
        assert cli.main([*arguments, "--save_strategy", saving]) == 2
        file_limit(resource.RLIM_INFINITY)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kto-fused train:")]
        assert problem in line
        assert not Path("out").exists() or list(Path("out").iterdir()) == []


def test_an_error_of_torch_on_a_full_disk_has_a_reason(tmp_path, file_limit):
    file_limit(100)
    with pytest.raises((OSError, RuntimeError)) as raised:
        torch.save({"values": torch.zeros(1000)}, tmp_path / "file.pt")
    file_limit(resource.RLIM_INFINITY)
    assert checkpoints.reason_of(raised.value)


# ---- the run that a checkpoint belongs to -------------------------------------------------------------------------


def other_tokens() -> dict:
    """A tokenizer that gives the same words other token ids."""
    return {"words": WORDS[::-1]}


OTHERS = {
    "beta": lambda: {"beta": 0.2},
    "seed": lambda: {"seed": 7},
    "learning_rate": lambda: {"learning_rate": 0.02},
    "loss_type": lambda: {"loss_type": "apo_zero_unpaired"},
    "desirable_weight": lambda: {"desirable_weight": 1.5},
    "per_device_train_batch_size": lambda: {"per_device_train_batch_size": 2},
    "gradient_accumulation_steps": lambda: {"gradient_accumulation_steps": 2},
    "optim": lambda: {"optim": "sgd"},
    "disable_dropout": lambda: {"disable_dropout": False},
    "train_data": lambda: {"train": data("kto", 16, seed=5)},
    "reference_weights": lambda: {"policy": model(seed=1)},
    "model.attention_dropout": lambda: {"policy": model(attention_dropout=0.1)},
    "tokenizer": other_tokens,
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_an_error_that_names_the_difference(run, name):
    trainer = make_trainer("kto", run, **{**SAVING, "num_train_epochs": 2, **OTHERS[name]()})
    before = weights(trainer)
    with pytest.raises(CheckpointError, match=rf"belongs to another run \(.*{name}: .* in the checkpoint, .* now"):
        trainer.train(resume_from_checkpoint=True)
    assert all(tensor.equal(before[key]) for key, tensor in weights(trainer).items())


def test_all_differences_are_listed_and_resume_anyway_goes_on(run, caplog):
    settings = {**SAVING, "num_train_epochs": 2, "beta": 0.2, "seed": 7}
    with pytest.raises(CheckpointError, match=r"beta: 0.1 in the checkpoint, 0.2 now; seed: 42 in .*, 7 now"):
        make_trainer("kto", run, **settings).train(resume_from_checkpoint=True)
    trainer = make_trainer("kto", run, resume_anyway=True, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    assert "belongs to another run, and resume_anyway goes on with it: beta: 0.1 in" in caplog.text


def test_options_that_do_not_change_the_curve_may_differ(run, whole, caplog):
    changes = {"logging_strategy": "steps", "save_steps": 3, "chunk_bytes": 1 << 22, "backend": "torch"}
    changes |= {"evaluation": 4, "eval_strategy": "epoch", "dataloader_num_workers": 1, "run_name": "again"}
    trainer = make_trainer("kto", run, **{**SAVING, "num_train_epochs": 2, **changes})
    steps, trained = outcome(trainer, resume=True)
    assert [entry for entry in steps if "loss" in entry] == [entry for entry in whole[0] if "loss" in entry]
    assert trained == whole[1]
    assert "another curve" not in caplog.text  # the learning rate is constant


def test_another_number_of_steps_is_logged_if_the_schedule_depends_on_it(tmp_path, caplog):
    settings = {**SAVING, "lr_scheduler_type": "linear"}
    make_trainer("kto", tmp_path, max_steps=2, **settings).train()
    make_trainer("kto", tmp_path, max_steps=3, **settings).train(resume_from_checkpoint=True)
    assert "was to end after 2 steps, this one after 3: lr_scheduler_type='linear' depends on that" in caplog.text


def test_an_adapter_and_the_weights_below_it_belong_to_the_run(tmp_path):
    peft = pytest.importorskip("peft")

    def trainer(rank: int = 2, seed: int = 0, **settings):
        lora = peft.LoraConfig(r=rank, target_modules=["q_proj"])
        return make_trainer("dpo", tmp_path, policy=model(seed), peft_config=lora, **{**SAVING, **settings})

    trainer(max_steps=2).train()
    with pytest.raises(CheckpointError, match=r"adapter.default.r: 2 in the checkpoint, 4 now"):
        trainer(rank=4).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match=r"model.frozen_weights: "):
        trainer(seed=1).train(resume_from_checkpoint=True)
    trainer(max_steps=3).train(resume_from_checkpoint=True)  # the adapter's random start may differ


@pytest.mark.parametrize("precompute", [False, True])
def test_another_reference_model_is_another_run(tmp_path, precompute):
    settings = {**SAVING, "precompute_ref_log_probs": precompute}
    if precompute:
        settings["ref_cache_dir"] = str(tmp_path / "cache")
    make_trainer("dpo", tmp_path / "run", ref_model=model(seed=1), max_steps=2, **settings).train()
    with pytest.raises(CheckpointError, match=r"another run \(reference_weights: "):
        make_trainer("dpo", tmp_path / "run", ref_model=model(seed=2), **settings).train(resume_from_checkpoint=True)


def test_evaluation_data_count_where_they_choose_the_best_model(tmp_path):
    best = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", **SAVING}
    for number, settings in enumerate(({"eval_strategy": "steps", "eval_steps": 2, **SAVING}, best)):
        folder = tmp_path / str(number)
        make_trainer("kto", folder, evaluation=4, max_steps=2, **settings).train()
        again = make_trainer("kto", folder, evaluation=data("kto", 4, seed=9), max_steps=3, **settings)
        if settings is best:
            with pytest.raises(CheckpointError, match="eval_data: "):
                again.train(resume_from_checkpoint=True)
        else:
            again.train(resume_from_checkpoint=True)


# The options of transformers and of these trainers that change the training curve. A new option belongs here or in
# `CURVE_NEUTRAL`.
CHANGES_THE_CURVE = {
    *("accelerator_config", "adam_beta1", "adam_beta2", "adam_epsilon", "auto_find_batch_size", "average_log_prob"),
    *("average_tokens_across_devices", "beta", "bf16", "bf16_full_eval", "data_seed", "dataloader_drop_last"),
    *("dataloader_in_order", "deepspeed", "desirable_weight", "disable_dropout", "fp16", "fp16_full_eval", "fsdp"),
    *("fsdp_config", "full_determinism", "gamma", "gradient_accumulation_steps", "greater_is_better"),
    *("ignore_data_skip", "label_smoothing", "label_smoothing_factor", "learning_rate", "liger_kernel_config"),
    *(
        "loss_from",
        "loss_type",
        "loss_weights",
        "lr_scheduler_kwargs",
        "lr_scheduler_type",
        "max_grad_norm",
        "metric_for_best_model",
    ),
    *("neftune_noise_alpha", "objective_weights", "optim", "optim_args", "optim_target_modules", "pad_to_multiple_of"),
    *("parallelism_config", "per_device_train_batch_size", "precompute_ref_log_probs", "reference_point"),
    "reward_shift_decay",
    *("seed", "tf32", "train_sampling_strategy", "undesirable_weight", "use_liger_kernel", "warmup_steps"),
    "weight_decay",
}


@pytest.mark.parametrize("config_class", [FusedKTOConfig, FusedDPOConfig])
def test_every_option_changes_the_curve_or_is_listed_as_one_that_does_not(tmp_path, config_class):
    names = {option.name for option in fields(config_class)}
    of_losses = config_class.loss_options.keys()
    assert names - runs.CURVE_NEUTRAL <= CHANGES_THE_CURVE | of_losses, "sort the new options"
    assert not of_losses & runs.CURVE_NEUTRAL
    assert not CHANGES_THE_CURVE & runs.CURVE_NEUTRAL
    settings = {"model": model(), "reference": None, "tokenizer": tokenizer(), "columns": ()}
    settings |= {"train_dataset": None, "eval_dataset": None}

    def described(**changes) -> dict:
        args = config_class(output_dir=str(tmp_path), use_cpu=True, report_to=[])
        for name, value in changes.items():
            setattr(args, name, value)
        return runs.describe_run(args, **settings)

    plain = described()
    for name in names - {"parallelism_config"}:  # its value must be an object that describes itself
        is_counted = described(**{name: 0.123}).get(name) != plain.get(name)
        assert is_counted == (name not in runs.CURVE_NEUTRAL), name


def test_parts_of_a_model_are_described_without_what_loading_sets(tmp_path):
    """Loading writes the dtype into the configurations of a model's text part and vision part."""
    built = vision_language_model()
    built.save_pretrained(tmp_path)
    loaded = type(built).from_pretrained(tmp_path)
    assert loaded.config.text_config.to_dict()["dtype"] != built.config.text_config.to_dict()["dtype"]
    args = FusedKTOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    settings = {"reference": None, "tokenizer": tokenizer(), "columns": (), "train_dataset": None, "eval_dataset": None}
    described = [runs.describe_run(args, model=each, **settings) for each in (built, loaded)]
    assert described[0] == described[1]
    assert described[0]["model.text_config"]["hidden_size"] == 16


def test_a_later_versions_option_at_its_default_is_no_difference(run):
    path = run / "checkpoint-4" / MANIFEST
    content = json.loads(path.read_text())
    del content["run"]["disable_dropout"]
    content["xxh3_128"] = fingerprints.hash_json({"files": content["files"], "run": content["run"]})
    path.write_text(json.dumps(content))
    for value, is_another in ((True, False), (False, True)):
        trainer = make_trainer(
            "kto", run, **{**SAVING, "num_train_epochs": 2, "disable_dropout": value, "max_steps": 5}
        )
        if is_another:
            with pytest.raises(CheckpointError, match="disable_dropout: True in the checkpoint, False now"):
                trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
        else:
            trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))


def test_the_hash_of_data_depends_on_its_values_only(tmp_path):
    """The cache, file and transforms that the data came through do not count."""
    data("kto", 8).to_json(tmp_path / "data.jsonl")
    sources = [data("kto", 8), str(tmp_path / "data.jsonl")]
    trainers = [make_trainer("kto", tmp_path, train=source) for source in sources]
    trainers.append(make_trainer("kto", tmp_path, train=sources[1], policy=model(max_position_embeddings=128)))
    assert len({runs._describe_data(one.train_dataset, one.columns) for one in trainers}) == 1
    fewer = trainers[0].train_dataset.select(range(7))
    assert runs._describe_data(fewer, trainers[0].columns).startswith("7 examples, ")
