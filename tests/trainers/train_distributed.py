"""The cases of ``test_distributed``, for one process or two.

The test imports them for one process. ``torchrun --nproc_per_node 2 train_distributed.py FOLDER`` runs them on two and
writes each case's result into ``FOLDER/results.json``. Global batches are the same for one process and for two.
"""

import contextlib
import functools
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset, concatenate_datasets
from filelock import FileLock
from tiny_training import (
    CLOCK,
    counting_reference_passes,
    data,
    history,
    make_trainer,
    model,
    model_for,
    reference_for,
    run_cases,
    stop_and_resume,
    vision_language_model,
    weights,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from kto_fused.commands import results
from kto_fused.commands.samples import Sampler
from kto_fused.trainers import FusedDPOTrainer, FusedTrainer, checkpoints, reference_cache
from kto_fused.trainers.checkpoints import CheckpointError, FolderInUseError
from kto_fused.trainers.folder_lock import LOCK

PROCESSES, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
KINDS = ("kto", "dpo")
WITHOUT_REFERENCE = ("sft", "reward")
WRAPPERS = ("ddp", "fsdp")
FSDP = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    },
}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def shard_on_cpus() -> None:
    """Let accelerate shard on CPUs too: set up for them what it sets up for accelerators only."""
    initialise = AcceleratorState.__init__

    @functools.wraps(initialise)
    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


def make(kind: str, wrapper: str, folder: Path, *, batch: int = 4, lora: bool = False, **settings: Any) -> FusedTrainer:
    """Return a trainer; ``batch`` is the number of examples on all processes together."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate sets it and leaves it set
    if wrapper == "fsdp" and PROCESSES > 1:
        settings |= FSDP
    if lora:
        import peft

        torch.manual_seed(5)
        options = LORA | ({"modules_to_save": ["score"]} if kind == "reward" else {})
        settings["policy"] = peft.get_peft_model(settings.get("policy") or model_for(kind), peft.LoraConfig(**options))
    return make_trainer(
        kind,
        folder,
        per_device_train_batch_size=batch // PROCESSES,
        per_device_eval_batch_size=batch // PROCESSES,
        **settings,
    )


def outcome(trainer: FusedTrainer) -> dict[str, Any]:
    """Return the log, the weights, and which wrapper the model was in."""

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    return {
        "history": history(trainer),
        "weights": {name: whole(tensor).flatten().tolist() for name, tensor in weights(trainer).items()},
        "is_ddp": isinstance(trainer.model_wrapped, DistributedDataParallel),
        "is_fsdp": isinstance(trainer.model_wrapped, FSDPModule),
    }


def train(folder: Path, kind: str, wrapper: str, *, tied: bool = False, own_reference: bool = True, **settings: Any):
    policy = model_for(kind, tie_word_embeddings=tied)
    ref_model = reference_for(kind, tie_word_embeddings=tied) if own_reference else None
    trainer = make(kind, wrapper, folder, policy=policy, ref_model=ref_model, **settings)
    trainer.train()
    return outcome(trainer)


def train_on_text(folder: Path, kind: str):
    """Train a vision-language model with checkpointed layers, so that DDP does not look for unused parameters."""
    trainer = make(kind, "ddp", folder, policy=vision_language_model(), gradient_checkpointing=True)
    trainer.train()
    return outcome(trainer)


def precompute_with_dropout(folder: Path, kind: str):
    """Return the logs of three runs: one that precomputes reference values, one that finds them, and a live one."""
    settings = {"disable_dropout": False, "train": 8, "batch": 2, "evaluation": 4, "eval_strategy": "steps"}
    curves = []
    for is_precomputed in (True, True, False):
        kept = {"precompute_ref_log_probs": True, "ref_cache_dir": str(folder / f"kept_by_{PROCESSES}")}
        policy = model(attention_dropout=0.3)
        trainer = make(kind, "ddp", folder, policy=policy, **settings, **(kept if is_precomputed else {}))
        trainer.train()
        curves.append(history(trainer))
    return curves


def resume(folder: Path, kind: str, wrapper: str, lora: bool = False):
    return stop_and_resume(folder, functools.partial(make, kind, wrapper, lora=lora), outcome, kind)


def damage(folder: Path, wrapper: str):
    """Remove the second process's file, which it is slow to write, from the newest checkpoint and resume.

    Returns each process's error for that checkpoint, the outcome of resuming from the one before it, and the outcome of
    a run that was not stopped.
    """
    train_again = functools.partial(make, "kto", wrapper, save_strategy="steps", save_steps=2, optim="adamw_torch")
    save_rng_state = FusedTrainer._save_rng_state

    def slowly(trainer: FusedTrainer, checkpoint: str) -> None:
        time.sleep(0.2)
        save_rng_state(trainer, checkpoint)

    with mock.patch.object(FusedTrainer, "_save_rng_state", slowly) if RANK == 1 else contextlib.nullcontext():
        train_again(folder / "stopped", num_train_epochs=1).train()
    newest = folder / "stopped" / "checkpoint-4"
    trainer = train_again(folder / "stopped", num_train_epochs=2)
    if PROCESSES > 1:
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            (newest / "rng_state_1.pth").unlink()
    errors = [""]
    try:
        trainer.train(resume_from_checkpoint=str(newest))
    except CheckpointError as error:
        errors = gather_object([str(error)])
    trainer.train(resume_from_checkpoint=True)
    whole = train_again(folder / "whole", num_train_epochs=2)
    whole.train()
    return {"errors": errors, "resumed": outcome(trainer), "whole": outcome(whole)}


def lock(folder: Path):
    """Return each process's error for a folder that another run has locked."""
    trainer = make("dpo", "ddp", folder)
    if trainer.is_world_process_zero():
        other = FileLock(folder / LOCK)
        other.acquire()
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.train()
    except FolderInUseError as error:
        return gather_object([str(error)])


def of_all(work: Callable[[], Any]) -> list[str]:
    """Return each process's error, in which ``work`` ends."""
    try:
        work()
    except Exception as error:
        return gather_object([f"{type(error).__name__}: {error}"])
    return gather_object(["nothing"])


# where one process alone fails: in which one, what is replaced by a failure, and the options of a run that comes there
BEST = {"evaluation": 4, "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
FAILURES: dict[str, tuple[int, Any, str, dict[str, Any]]] = {
    "begin": (0, checkpoints, "begin", {"save_strategy": "epoch"}),
    "model": (0, FusedTrainer, "_save", BEST),  # before a barrier of transformers
    "state": (1, FusedTrainer, "_save_rng_state", {"save_strategy": "epoch"}),
    "end": (0, checkpoints, "end", {"save_strategy": "epoch"}),
    "data": (1, FusedDPOTrainer, "_tokenize", {}),
    "cache": (1, reference_cache, "_prepare_folder", {"precompute_ref_log_probs": True}),
    "results": (0, results, "draft_of", {}),
    "weights": (0, FusedTrainer, "_save", {}),
    "curves": (0, results, "plot", {}),
}


def failures(folder: Path) -> dict[str, list[str]]:
    """Return each process's error where one of them finds a full disk, which takes no space from the other."""
    said = {}
    for name, (rank, where, what, options) in FAILURES.items():
        if "precompute_ref_log_probs" in options:
            options = {**options, "ref_model": model(seed=1), "ref_cache_dir": str(folder / "cache")}

        def run(name: str = name, options: dict[str, Any] = options) -> None:
            trainer = make("dpo", "ddp", folder / name, train=4, **options)
            trainer.train()
            entries = {"steps": trainer.state.log_history[:1], "evaluations": [], "data": {}, "seconds": 1.0}
            results.write_all(trainer, entries)

        error = OSError(28, "No space left on device")
        with mock.patch.object(where, what, side_effect=error) if rank == RANK else contextlib.nullcontext():
            said[name] = of_all(run)
    return said


def others(folder: Path) -> list[list[str]]:
    """Return each process's errors, where the second one has more data, and where it has another learning rate."""
    changes = {"train": data("dpo", 16 + 4 * RANK)}, {"learning_rate": 0.5 + RANK}
    return [of_all(make("dpo", "ddp", folder / str(number), **each).train) for number, each in enumerate(changes)]


def own_disks(folder: Path) -> dict[str, list]:
    """Return the best checkpoint that each process knows, where only the first one's disk holds any, and each
    process's error as the run is to resume.
    """
    disk = folder / f"disk_of_{RANK}"
    disk.mkdir(parents=True)
    with contextlib.chdir(disk):
        settings = {**BEST, "save_only_model": True}
        trainer = make("dpo", "ddp", Path("run"), train=4, **settings)
        trainer.train()
        best = gather_object([trainer.state.best_model_checkpoint])
        trainer.accelerator.wait_for_everyone()
        return {"best": best, "resumed": of_all(functools.partial(trainer.train, resume_from_checkpoint=True))}


def evaluate(folder: Path, kind: str, wrapper: str):
    """Return evaluations of 9 rows before and after training; the last row fills only part of the last batches."""
    trainer = make(kind, wrapper, folder, ref_model=reference_for(kind), evaluation=9, train=4)
    entries = []
    if wrapper == "ddp":  # under FSDP accelerate shards a model together with its optimizer, so only after training
        entries.append(trainer.evaluate())
    trainer.train()
    entries.append(trainer.evaluate())
    return [{name: value for name, value in entry.items() if not name.endswith(CLOCK)} for entry in entries]


def precompute_once(kind: str, wrapper: str, folder: Path, cache: Path, **settings: Any):
    with counting_reference_passes() as counter:
        trainer = make(
            kind,
            wrapper,
            folder,
            ref_model=model(seed=1),
            train=12,
            evaluation=5,
            eval_strategy="epoch",
            precompute_ref_log_probs=True,
            ref_cache_dir=str(cache),
            **settings,
        )
        trainer.train()
    return {"passes": counter["passes"], **outcome(trainer)}


def precompute(folder: Path, kind: str, wrapper: str):
    """Return the outcomes of a run that precomputes reference values, one that finds them, and a live one."""
    runs = [precompute_once(kind, wrapper, folder, folder / f"cache_of_{PROCESSES}") for _ in range(2)]
    return [*runs, train(folder, kind, wrapper, train=12, evaluation=5, eval_strategy="epoch")]


def precompute_on_two_disks(folder: Path):
    """Return the reference passes of three runs; before the third, the second process loses its cache."""
    passes = []
    for is_lost in (False, False, True):
        cache = folder / f"cache_of_rank_{RANK}"
        if is_lost and RANK == 1:
            shutil.rmtree(cache)
        passes.append(precompute_once("dpo", "ddp", folder, cache)["passes"])
    return passes


def repeated(folder: Path, kind: str, wrapper: str, rows: int):
    """Train on ``rows`` rows in order, where the first rows are repeated to fill the last global batch."""
    rows_of_data = data(kind, rows)
    if PROCESSES == 1:
        rows_of_data = concatenate_datasets([rows_of_data, rows_of_data.select(range(-rows % 4))])
    return train(folder, kind, wrapper, train=rows_of_data, train_sampling_strategy="sequential")


def sampled(folder: Path, kind: str):
    """Return the answers before and after training, and the outcome."""
    trainer = make(kind, "ddp", folder, ref_model=reference_for(kind), evaluation=9)
    sampler = Sampler(trainer, 5, max_new_tokens=6, temperature=0.8)
    before = sampler.before(is_resumed=False)
    trainer.train()
    kept = sampler.before(is_resumed=True)  # the model has changed meanwhile
    return {"samples": sampler.compared(before), "kept": kept, **outcome(trainer)}


def weighted(rows: Dataset) -> Dataset:
    return rows.add_column("weight", [0.5 * (row % 3) for row in range(len(rows))])


def refusal(folder: Path, kind: str, wrapper: str, is_sampled: bool = False, **settings: Any):
    try:
        trainer = make(kind, wrapper, folder, **settings)
        if is_sampled:
            Sampler(trainer, 1)
    except (ValueError, NotImplementedError) as error:
        return str(error)


def cases() -> dict[str, Callable[[Path], Any]]:
    found = {}
    for wrapper in WRAPPERS:
        for kind in KINDS:
            run = functools.partial(train, kind=kind, wrapper=wrapper)
            name = f"{wrapper}-{kind}"
            found |= {
                f"{name}-untied": functools.partial(run, tied=False),
                f"{name}-tied": functools.partial(run, tied=True),
                f"{name}-accumulated": functools.partial(run, train=20, gradient_accumulation_steps=2),
                f"{name}-copied reference": functools.partial(run, own_reference=False),
                f"{name}-bf16": functools.partial(run, own_reference=False, bf16=True),
                f"{name}-lora": functools.partial(run, own_reference=False, lora=True),
                f"{name}-lora off": functools.partial(run, own_reference=False, lora=True, reference="base"),
                f"{name}-lora resumed": functools.partial(resume, kind=kind, wrapper=wrapper, lora=True),
                f"{name}-resumed": functools.partial(resume, kind=kind, wrapper=wrapper),
                f"{name}-evaluated": functools.partial(evaluate, kind=kind, wrapper=wrapper),
                f"{name}-precomputed": functools.partial(precompute, kind=kind, wrapper=wrapper),
            }
        for kind in WITHOUT_REFERENCE:
            run, name = functools.partial(train, kind=kind, wrapper=wrapper), f"{wrapper}-{kind}"
            found |= {
                f"{name}-accumulated": functools.partial(run, train=20, gradient_accumulation_steps=2),
                f"{name}-lora": functools.partial(run, lora=True),
            }
        found[f"{wrapper}-dpo-logits"] = functools.partial(train, kind="dpo", wrapper=wrapper, loss_from="logits")
        found[f"{wrapper}-kto-checkpointed"] = functools.partial(
            train, kind="kto", wrapper=wrapper, gradient_checkpointing=True
        )
        found[f"{wrapper}-dpo-random"] = functools.partial(
            train, kind="dpo", wrapper=wrapper, train_sampling_strategy="random"
        )
        found[f"{wrapper}-dpo-simpo"] = functools.partial(
            train, kind="dpo", wrapper=wrapper, loss_type="simpo", own_reference=False
        )
        found[f"{wrapper}-kto-bco"] = functools.partial(
            train, kind="kto", wrapper=wrapper, loss_type="bco", train=20, gradient_accumulation_steps=2
        )
        found[f"{wrapper}-damaged"] = functools.partial(damage, wrapper=wrapper)
    for kind in WITHOUT_REFERENCE:
        found[f"ddp-{kind}-resumed"] = functools.partial(resume, kind=kind, wrapper="ddp")
        found[f"ddp-{kind}-evaluated"] = functools.partial(evaluate, kind=kind, wrapper="ddp")
    found["ddp-sft-packed"] = functools.partial(
        train, kind="sft", wrapper="ddp", packing=True, max_length=16, train=24, train_sampling_strategy="sequential"
    )
    found["ddp-locked"] = lock
    found |= {"ddp-failures": failures, "ddp-others": others, "ddp-own disks": own_disks}
    for kind in KINDS:
        found[f"ddp-{kind}-vision"] = functools.partial(train_on_text, kind=kind)
        found[f"ddp-{kind}-dropout"] = functools.partial(precompute_with_dropout, kind=kind)
    found["ddp-dpo-sampled"] = functools.partial(sampled, kind="dpo")
    found["fsdp-dpo-sampled"] = functools.partial(refusal, kind="dpo", wrapper="fsdp", is_sampled=True)
    found["ddp-kto-used"] = functools.partial(train, kind="kto", wrapper="ddp", ddp_find_unused_parameters=False)
    found["ddp-dpo-repeated"] = functools.partial(repeated, kind="dpo", wrapper="ddp", rows=14)
    found["ddp-dpo-two disks"] = precompute_on_two_disks
    found["ddp-kto-batch_mean"] = functools.partial(refusal, kind="kto", wrapper="ddp", reference_point="batch_mean")
    found["ddp-dpo-aot"] = functools.partial(refusal, kind="dpo", wrapper="ddp", loss_type="aot")
    found["ddp-dpo-orpo evaluated"] = functools.partial(
        refusal, kind="dpo", wrapper="ddp", loss_type="orpo", nll_on="all", evaluation=4
    )
    found["ddp-dpo-objectives"] = functools.partial(
        train,
        kind="dpo",
        wrapper="ddp",
        train={"helpful": weighted(data("dpo", 14, seed=3)), "harmless": data("dpo", 5, seed=4)},
        objective_weights={"helpful": 1.0, "harmless": 0.5},
    )
    found["fsdp-dpo-lora precomputed"] = functools.partial(
        refusal, kind="dpo", wrapper="fsdp", lora=True, precompute_ref_log_probs=True
    )
    return found


def main(folder: Path) -> None:
    shard_on_cpus()
    run_cases(cases(), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
