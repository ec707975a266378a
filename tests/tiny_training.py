"""Trainers that run in a second, for the tests of training: models of a few thousand parameters, a tokenizer of whole
words, feedback of random words, and helpers that compare runs.

A test module that imports this one is skipped where the trainers' libraries are missing.
"""

import faulthandler
import gc
import json
import os
import random
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets is not installed: the trainers need it")
pytest.importorskip("accelerate", reason="accelerate is not installed: the trainers need it")

import datasets
import torch
import transformers
from datasets import Dataset
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from kto_fused.trainers import FusedDPOTrainer, FusedKTOTrainer, FusedRewardTrainer, FusedSFTTrainer, FusedTrainer
from kto_fused.trainers.configs import FusedDPOConfig, FusedKTOConfig, FusedRewardConfig, FusedSFTConfig
from kto_fused.trainers.reference import Reference

KINDS = ["kto", "dpo"]  # the recipes with a reference model
WITHOUT_REFERENCE = ["sft", "reward"]
RECIPES = KINDS + WITHOUT_REFERENCE
by_kind = pytest.mark.parametrize("kind", KINDS)
by_recipe = pytest.mark.parametrize("kind", RECIPES)
SIDES = {f"{value}/{side}" for value in ("rewards", "logps", "logits") for side in ("chosen", "rejected")}
LOGGED = {  # the names that each trainer logs beside those of ``Trainer``
    "kto": SIDES | {"rewards/margins", "rewards/accuracies", "rewards/auc", "kl", "entropy"},
    "dpo": SIDES | {"rewards/margins", "rewards/accuracies", "mean_token_accuracy", "entropy"},
    "sft": {"mean_token_accuracy", "entropy"},
    "reward": {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"},
}
WORDS = [f"w{number}" for number in range(61)]
TRAINERS = {"kto": FusedKTOTrainer, "dpo": FusedDPOTrainer, "sft": FusedSFTTrainer, "reward": FusedRewardTrainer}
CONFIGS = {"kto": FusedKTOConfig, "dpo": FusedDPOConfig, "sft": FusedSFTConfig, "reward": FusedRewardConfig}
LONGEST = 450  # seconds that the cases of one launch may take
CLOCK = ("runtime", "per_second", "total_flos", "preparation_time")


def tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", "<pad>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )


def model(seed: int = 0, kind: type[PreTrainedModel] = LlamaForCausalLM, **config: Any) -> PreTrainedModel:
    """Return a Llama with large weights, so that log-ratios are large too."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(WORDS) + 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 2,
    }
    return kind(LlamaConfig(**{**sizes, **config}))


def model_for(recipe: str, seed: int = 0, **config: Any) -> PreTrainedModel:
    """Return ``model``, or for "reward" a reward model of its size."""
    if recipe == "reward":
        return model(seed, LlamaForSequenceClassification, num_labels=1, **config)
    return model(seed, **config)


def reference_for(recipe: str, seed: int = 1, **config: Any) -> LlamaForCausalLM | None:
    """Return a reference model, or None for a recipe that has none."""
    return model(seed, **config) if recipe in KINDS else None


def vision_language_model(seed: int = 0) -> Gemma3ForConditionalGeneration:
    """Return a model of the size of ``model`` with a vision tower."""
    torch.manual_seed(seed)
    text = {
        "vocab_size": len(WORDS) + 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 2,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    tokens = {"image_token_index": 3, "boi_token_index": 4, "eoi_token_index": 5}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    return Gemma3ForConditionalGeneration(config)


def data(kind: str, rows: int, seed: int = 0) -> Dataset:
    """Return random words: unpaired feedback for "kto", pairs for "dpo", with margins for "reward", demonstrations for
    "sft".
    """
    draw = random.Random(seed)

    def text(longest: int) -> str:
        return "".join(f" {word}" for word in draw.choices(WORDS, k=draw.randint(1, longest)))

    records = []
    for row in range(rows):
        record = {"prompt": text(4)}
        if kind == "kto":
            record |= {"completion": text(8), "label": row % 3 != 0}
        elif kind == "sft":
            record |= {"completion": text(8)}
        else:
            record |= {"chosen": text(8), "rejected": text(8)}
        if kind == "reward":
            record["margin"] = draw.random()
        records.append(record)
    return Dataset.from_list(records)


def make_trainer(
    kind: str,
    folder: str | Path,
    *,
    policy: Any = None,
    ref_model: Any = None,
    train: Any = 16,
    evaluation: Any = None,
    peft_config: Any = None,
    callbacks: list[TrainerCallback] | None = None,
    words: list[str] = WORDS,
    loss: Any = None,
    **settings: Any,
) -> FusedTrainer:
    """Return a trainer. ``train`` and ``evaluation`` are data, or a number of rows.

    The optimizer is SGD at a constant rate: Adam would divide a gradient's rounding by the gradient.
    """
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = CONFIGS[kind](**{**defaults, **settings})
    return TRAINERS[kind](
        model_for(kind) if policy is None else policy,
        ref_model,
        args,
        train_dataset=data(kind, train) if isinstance(train, int) else train,
        eval_dataset=data(kind, evaluation, seed=1) if isinstance(evaluation, int) else evaluation,
        processing_class=tokenizer(words),
        peft_config=peft_config,
        callbacks=callbacks,
        loss=loss,
    )


def history(trainer: FusedTrainer) -> list[dict[str, float]]:
    """Return the log entries, without times and without the summary at the end."""
    return [
        {name: value for name, value in entry.items() if not name.endswith(CLOCK)}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]


def weights(trainer: FusedTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def assert_near(
    actual: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float = 2e-5, but: tuple = ()
) -> None:
    """Compare the entries of ``expected``; ``tolerance`` is relative where an entry is larger than 1."""
    assert len(actual) == len(expected)
    for step, (entry, truth) in enumerate(zip(actual, expected, strict=True)):
        for name in truth.keys() - set(but):
            error = abs(entry[name] - truth[name])
            assert error <= tolerance * max(1, abs(truth[name])), f"{step}, {name}: {entry[name]} for {truth[name]}"


def lora_config(**options: Any) -> Any:
    """Return a configuration of adapters that are not zero at the start."""
    peft = pytest.importorskip("peft", reason="peft is not installed: no adapters")
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options})


@contextmanager
def counting_reference_passes() -> Iterator[Counter]:
    """Count, under "passes", the forward passes of every trainer's reference."""
    counter, active = Counter(), Reference.active

    def counted(self, policy):
        counter["passes"] += 1
        return active(self, policy)

    Reference.active = counted
    try:
        yield counter
    finally:
        Reference.active = active


def run_precomputed(kind: str, folder: Path, **settings: Any) -> FusedTrainer:
    """Train with precomputed reference log-probabilities, which are kept in ``folder / "cache"``."""
    trainer = make_trainer(
        kind, folder / "out", precompute_ref_log_probs=True, ref_cache_dir=str(folder / "cache"), **settings
    )
    trainer.train()
    return trainer


class StopAt(TrainerCallback):
    """Ends the run with a checkpoint after step ``step``."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def run_on_two(script: str, tmp_path_factory: pytest.TempPathFactory, **environment: str) -> dict[str, Any]:
    """Start a script of ``trainers/`` on two CPU processes with torchrun, and return what it wrote.

    The script writes its results into ``results.json`` of the folder that it is given. Where several workers of
    pytest-xdist ask for the same script, the first one runs it and the others wait for its results.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / f"two-{Path(script).stem}"
    results = folder / "results.json"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            with (folder / "log").open("w") as log:
                launch = subprocess.run(
                    [sys.executable, *launcher, Path(__file__).with_name("trainers") / script, folder],
                    cwd=folder,
                    env={
                        **os.environ,
                        "OMP_NUM_THREADS": "1",
                        "PYTHONPATH": str(Path(__file__).parent),  # for the helper modules, this file among them
                        "CUDA_VISIBLE_DEVICES": "",
                        "HF_DATASETS_CACHE": str(folder / "datasets"),
                        **environment,
                    },
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    timeout=500,
                )
            if launch.returncode:
                results.unlink(missing_ok=True)
    assert results.exists(), (folder / "log").read_text()[-8000:]
    return json.loads(results.read_text())


def run_cases(cases: dict[str, Callable[[Path], Any]], folder: Path) -> None:
    """Run each case in a folder of its own and write its result or its traceback.

    Called in the processes that ``run_on_two`` starts. A case that fails in one of them alone has failed.
    """
    faulthandler.dump_traceback_later(LONGEST, exit=True)  # ends processes that wait for one another forever
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    gc.freeze()  # every train() collects garbage, which takes time for each object that is not frozen
    results = {}
    for name, case in cases.items():
        error = None
        try:
            results[name] = case(folder / name)
        except Exception:
            error = traceback.format_exc()
            # into the log: the other process may wait for this one forever, and then no results are written
            print(f"{name}: {error}", file=sys.stderr)
        errors = [None] * int(os.environ["WORLD_SIZE"])
        torch.distributed.all_gather_object(errors, error)
        if any(errors):
            results[name] = {"error": next(error for error in errors if error)}
    if os.environ["RANK"] == "0":
        (folder / "results.json").write_text(json.dumps(results))
    gc.collect()  # trainers hold the process group, whose threads should end before the interpreter does
    torch.distributed.destroy_process_group()


def stop_and_resume(
    folder: Path, make: Callable[..., FusedTrainer], outcome: Callable[[FusedTrainer], Any], recipe: str = "dpo"
) -> dict:
    """Return the outcomes of a whole run and of one that was stopped and resumed, with dropout at work.

    The second run is stopped in its second epoch, between two log entries.
    """

    def run(name: str, stop_at: int | None = None, resume_from: Path | None = None):
        trainer = make(
            folder=folder / name,
            policy=model_for(recipe, attention_dropout=0.1),
            disable_dropout=False,
            train=16,
            gradient_accumulation_steps=2,
            num_train_epochs=3,
            logging_steps=3,
            optim="adamw_torch",
            learning_rate=0.01,
            callbacks=[] if stop_at is None else [StopAt(stop_at)],
        )
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        return outcome(trainer)

    whole = run("whole")
    run("stopped", stop_at=4)
    return {"whole": whole, "resumed": run("stopped", resume_from=folder / "stopped" / "checkpoint-4")}


def assert_same_run(actual: dict, expected: dict, tolerance: float = 2e-5, but: tuple[str, ...] = ()) -> None:
    """Compare two outcomes: their weights, and their histories without the entries ``but``."""
    assert_near(actual["history"], expected["history"], tolerance, but)
    assert actual["weights"].keys() == expected["weights"].keys()
    for name, values in expected["weights"].items():
        torch.testing.assert_close(
            torch.tensor(actual["weights"][name]),
            torch.tensor(values),
            rtol=0,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )
