"""The cases of ``test_deepspeed``: on one process without DeepSpeed, or on two with it.

The test imports them for one process. ``torchrun --nproc_per_node 2 train_deepspeed.py FOLDER`` runs them on two and
writes each case's result into ``FOLDER/results.json``. Global batches are the same for one process and for two.
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tiny_training import CLOCK, counting_reference_passes, history, make_trainer, model, run_cases, stop_and_resume

from kto_fused import huggingface
from kto_fused.trainers import FusedTrainer

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))
KINDS = ("kto", "dpo")
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
SGD = {"type": "SGD", "params": {"lr": "auto"}}
AUTO = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


def make(
    kind: str,
    stage: int,
    folder: Path,
    *,
    lora: bool = False,
    optimizer: dict | None = None,
    zero: dict | None = None,
    **settings: Any,
) -> FusedTrainer:
    """Return a trainer whose batch has 4 examples on all processes together.

    ``zero`` adds settings of ZeRO. ``optimizer`` is DeepSpeed's description of its own optimizer, which is then used.
    """
    if PROCESSES > 1:
        persistence = {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": stage} | (persistence if stage == 3 else {}) | (zero or {}),
        }
        if optimizer is not None:
            config |= {"optimizer": optimizer, "zero_allow_untested_optimizer": True}
            settings["optim"] = "adamw_torch"
        settings["deepspeed"] = config
    if lora:
        import peft

        torch.manual_seed(5)
        settings["policy"] = peft.get_peft_model(model(), peft.LoraConfig(**LORA))
    return make_trainer(
        kind,
        folder,
        per_device_train_batch_size=4 // PROCESSES,
        per_device_eval_batch_size=4 // PROCESSES,
        ddp_timeout=60,
        **settings,
    )


def whole(parameter: torch.Tensor) -> list[float]:
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().float().flatten().tolist()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().float().flatten().tolist()


def wrapping(module: torch.nn.Module | None) -> dict[str, int] | None:
    """Return the module's stage of ZeRO and the number of weights that this process holds between steps."""
    if not hasattr(module, "zero_optimization_stage"):
        return None
    held = sum(parameter.numel() for parameter in huggingface.unwrap(module).parameters())
    return {"stage": module.zero_optimization_stage(), "held": held}


def outcome(trainer: FusedTrainer) -> dict[str, Any]:
    return {
        "history": history(trainer),
        "weights": {name: whole(parameter) for name, parameter in trainer.model.named_parameters()},
        "policy": wrapping(trainer.model_wrapped),
        "reference": wrapping(trainer.ref_model),
    }


def train(folder: Path, kind: str, stage: int, *, tied: bool = False, own_reference: bool = True, **settings: Any):
    policy = None if settings.get("lora") else model(tie_word_embeddings=tied)
    ref_model = model(seed=1, tie_word_embeddings=tied) if own_reference else None
    trainer = make(kind, stage, folder, policy=policy, ref_model=ref_model, **settings)
    trainer.train()
    return outcome(trainer)


def on_disk(folder: Path, seed: int) -> str:
    path = folder / f"model_{seed}"
    if RANK == 0:
        model(seed=seed).save_pretrained(path)
    if PROCESSES > 1:
        torch.distributed.barrier()
    return str(path)


def from_path(folder: Path, kind: str, stage: int, *, own_reference: bool):
    """Train models that ZeRO-3 partitions as they are loaded, because a configuration of DeepSpeed is alive."""
    policy, ref_model = on_disk(folder, 0), on_disk(folder, 1) if own_reference else None
    trainer = make(kind, stage, folder, policy=policy, ref_model=ref_model)
    is_partitioned = all(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters())
    trainer.train()
    return outcome(trainer) | {"is_partitioned_at_load": is_partitioned}


def loaded_before(folder: Path, kind: str, stage: int):
    """Return the refusal of a partitioned model without a reference."""
    path = on_disk(folder, 0)
    config = make(kind, stage, folder, train=4).args  # kept alive while the model is loaded
    policy = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert config.deepspeed
    return refusal(folder, make, kind=kind, stage=stage, policy=policy)


def resume(folder: Path, kind: str, stage: int):
    return stop_and_resume(folder, functools.partial(make, kind, stage), outcome)


def evaluate(folder: Path, kind: str, stage: int):
    """Evaluate 9 rows before and after training; the last row fills only part of the last batches.

    Evaluation removes DeepSpeed's own optimizer from the configuration; training needs it back.
    """
    trainer = make(kind, stage, folder, ref_model=model(seed=1), evaluation=9, train=8, optimizer=SGD)
    entries = [trainer.evaluate()]
    trainer.train()
    entries.append(trainer.evaluate())
    seen = [{name: value for name, value in entry.items() if not name.endswith(CLOCK)} for entry in entries]
    return {"evaluations": seen, **outcome(trainer)}


def precompute(folder: Path, kind: str, stage: int, is_on_disk: bool = False, **settings: Any):
    """Train twice with precomputed reference values; the second run finds them on disk."""
    runs = []
    for _ in range(2):
        if is_on_disk:
            settings["policy"] = on_disk(folder, 0)
        cache = str(folder / f"cache_of_{PROCESSES}")
        with counting_reference_passes() as counter:
            trainer = make(
                kind, stage, folder, train=12, precompute_ref_log_probs=True, ref_cache_dir=cache, **settings
            )
            trainer.train()
        batch = next(iter(trainer.get_train_dataloader()))
        is_unrounded = trainer._prepare_inputs(batch)["ref_logps"].equal(batch["ref_logps"])
        fingerprints = sorted(os.listdir(cache))
        passes = counter["passes"]
        runs.append({"passes": passes, "is_unrounded": is_unrounded, "fingerprints": fingerprints, **outcome(trainer)})
    return runs


def save(folder: Path, kind: str, stage: int):
    """Return the weights of the saved model, as another process would load them, beside those in memory."""
    trainer = make(kind, stage, folder, train=4)
    trainer.train()
    trainer.save_model()
    weights = load_file(folder / "model.safetensors") if RANK == 0 else {}
    return {"saved": {name: tensor.flatten().tolist() for name, tensor in weights.items()}, **outcome(trainer)}


def through_the_environment(folder: Path, kind: str, stage: int):
    """Train with DeepSpeed asked for as by ``accelerate launch --use_deepspeed``, not in the trainer's options."""
    if PROCESSES == 1:
        return train(folder, kind, stage)
    asked = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    os.environ.update(asked)
    try:
        policy, ref_model = model(), model(seed=1)
        trainer = make_trainer(kind, folder, policy=policy, ref_model=ref_model, per_device_train_batch_size=2)
        trainer.train()
        return outcome(trainer)
    finally:
        for name in asked:
            os.environ.pop(name, None)


def refusal(folder: Path, run: Callable, **settings: Any):
    try:
        run(folder=folder, **settings)
    except (ValueError, NotImplementedError) as error:
        return str(error)


def cases() -> dict[str, Callable[[Path], Any]]:
    found = {}
    for kind in KINDS:
        run = functools.partial(train, kind=kind, stage=3)
        found |= {
            f"3-{kind}-untied": functools.partial(run, tied=False),
            f"3-{kind}-tied": functools.partial(run, tied=True),
            f"3-{kind}-accumulated": functools.partial(run, train=20, gradient_accumulation_steps=2),
            f"3-{kind}-copied reference": functools.partial(run, own_reference=False, zero=dict.fromkeys(AUTO, "auto")),
            f"3-{kind}-lora": functools.partial(run, own_reference=False, lora=True),
            f"3-{kind}-evaluated": functools.partial(evaluate, kind=kind, stage=3),
            f"2-{kind}-untied": functools.partial(train, kind=kind, stage=2),
        }
    return found | {
        "2-dpo-accumulated": functools.partial(
            train, kind="dpo", stage=2, own_reference=False, train=20, gradient_accumulation_steps=2
        ),
        "3-kto-own path": functools.partial(from_path, kind="kto", stage=3, own_reference=True),
        "3-dpo-same path": functools.partial(from_path, kind="dpo", stage=3, own_reference=False),
        "3-dpo-bf16": functools.partial(train, kind="dpo", stage=3, own_reference=False, bf16=True),
        "3-kto-checkpointed": functools.partial(train, kind="kto", stage=3, gradient_checkpointing=True),
        "3-dpo-logits": functools.partial(train, kind="dpo", stage=3, loss_from="logits"),
        "3-dpo-clipped": functools.partial(train, kind="dpo", stage=3, max_grad_norm=0.2),
        "3-dpo-environment": functools.partial(through_the_environment, kind="dpo", stage=3),
        "3-dpo-saved": functools.partial(save, kind="dpo", stage=3),
        "3-kto-resumed": functools.partial(resume, kind="kto", stage=3),
        "2-kto-precomputed": functools.partial(precompute, kind="kto", stage=2),
        "3-kto-precomputed": functools.partial(precompute, kind="kto", stage=3, is_on_disk=True),
        "3-kto-precomputed in bf16": functools.partial(precompute, kind="kto", stage=3, bf16=True),
        "adapters precomputed": functools.partial(
            refusal, run=make, kind="dpo", stage=3, lora=True, precompute_ref_log_probs=True
        ),
        "processes": functools.partial(refusal, run=make, kind="dpo", stage=3, use_cpu=False),
        "no reference": functools.partial(loaded_before, kind="dpo", stage=3),
    }


def main(folder: Path) -> None:
    run_cases(cases(), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
