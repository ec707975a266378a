"""``kto-fused demo``: training as ``kto-fused train`` does it, of a small model, then against the plain reference."""

import copy
import math
import statistics
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, ClassVar, Literal

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

from .. import measure, preference_data, reference
from ..engines import backends
from ..functional import kto_class_weights
from ..huggingface.config import max_positions
from ..trainers import FusedKTOTrainer
from ..trainers.configs import FusedKTOConfig
from . import flags, train
from .cli import COMMANDS
from .errors import CommandError

VOCAB_SIZE = 4096
MAX_LENGTH = 512
WARMUP_STEPS = 80
WARMUP_BATCH = 16
COMPARED_STEPS = 5
LEARNING_RATE = 5e-5


@dataclass(frozen=True)
class Settings:
    data: Path = field(
        default=preference_data.BUNDLED, metadata={"help": "a file of prompt, completion, label, as kto-fused train's"}
    )
    model: str | None = field(
        default=None, metadata={"help": "a Hugging Face model's folder or id, instead of a small new Llama"}
    )
    loss_from: Literal["hidden", "logits"] = field(
        default="hidden",
        metadata={
            "aliases": "--from",
            "help": "the loss takes hidden states and the LM head, or the model's logits",
        },
    )
    steps: int = field(default=40, metadata={"help": "KTO steps"})
    batch_size: int = field(default=16, metadata={"help": "examples per step"})
    beta: float = field(default=0.1, metadata={"help": "pull towards the reference model"})
    seed: int = field(default=0, metadata={"help": "for weights and batches"})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; the GPU if there is one"})
    backend: Literal["triton", "torch"] | None = field(
        default=None, metadata={"help": "kernels; the faster on the device if not given"}
    )
    out: Path = field(default=Path("runs/demo"), metadata={"help": "folder for metrics.json and curves.png"})


def main(arguments: list[str]) -> int:
    does = COMMANDS["demo"]
    does = does[0].upper() + does[1:]  # capitalize() would make KTO small
    run(flags.parse(Settings, arguments, "demo", f"{does}. With its defaults, about two minutes on two idle cores."))
    return 0


def run(settings: Settings) -> dict[str, Any]:
    """Train, compare, and write ``metrics.json`` and ``curves.png`` under ``settings.out``. Returns the metrics.

    Raises ``CommandError``, before anything is trained or written if the settings or the data are to blame.
    """
    device = check(settings)
    train.check_writable(settings.out)
    set_seed(settings.seed)
    with train.setting_up():
        trainer = make_trainer(settings, device)
    metrics = train.fit(trainer, every=max(1, settings.steps // 10))
    train.print_summary(metrics)
    comparison = compare(trainer)
    print_comparison(comparison)
    written = {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()}
    metrics = {"settings": written, **metrics, "comparison": comparison}
    with flags.refusals(OSError, doing=f"{settings.out} cannot be written: "):
        train.write(settings.out, metrics)
    print(f"\nWrote metrics.json and curves.png into {settings.out}")
    return metrics


def check(settings: Settings) -> torch.device:
    """The device to run on, if the settings can be run at all."""
    for name in ("steps", "batch_size"):
        if getattr(settings, name) < 1:
            raise CommandError(f"--{name} must be at least 1, got {getattr(settings, name)}")
    if not 0 < settings.beta < math.inf:
        raise CommandError(f"--beta must be a finite number > 0, got {settings.beta}")
    if not 0 <= settings.seed < 2**32:
        raise CommandError(f"--seed must lie in [0, 2^32), got {settings.seed}")
    name = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    doing = f"--device {name}, --backend {settings.backend}: "
    with flags.refusals(RuntimeError, AssertionError, ValueError, doing=doing):
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        backends.resolve(settings.backend, device)
    if device.index:
        raise CommandError(f"--device {name}: show that GPU alone (CUDA_VISIBLE_DEVICES={device.index}), as cuda")
    return device


def make_trainer(settings: Settings, device: torch.device) -> FusedKTOTrainer:
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
        raise CommandError(f"--batch_size {settings.batch_size} is more than the {len(dataset)} examples")
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
        train_sampling_strategy="random",  # batches of short and of long examples would draw a jagged curve
        seed=settings.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=device.type == "cpu",
    )
    config._n_gpu = min(config.n_gpu, 1)  # the trainers refuse to be shown several; the demo takes the first
    if settings.model is None:
        warm_up(model.to(device), dataset, settings.seed)
    return FusedKTOTrainer(model, args=config, train_dataset=settings.data, processing_class=tokenizer)


def small_llama(records: Dataset) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """A tokenizer made from the records, and a new model."""
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
    """A short supervised start, so that there is a policy to prefer by."""
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


# ---- the comparison -----------------------------------------------------------------------------------------------


class ComparedTrainer(FusedKTOTrainer):
    """Takes each step twice from the same weights, through the plain PyTorch twins and then fused, so that what else
    the machine does falls on both. Keeps each kind's losses, gradients and times, of the last step the memory instead.
    """

    kinds: ClassVar = {  # name: (loss_functions, logps_functions)
        "reference": (
            (reference.linear_kto_loss, reference.kto_loss),
            (reference.linear_sequence_logps, reference.sequence_logps),
        ),
        "fused": (FusedKTOTrainer.loss_functions, FusedKTOTrainer.logps_functions),
    }

    def __init__(self, *arguments: Any, **named_arguments: Any):
        super().__init__(*arguments, **named_arguments)
        self.losses: dict[str, list[float]] = {name: [] for name in self.kinds}
        self.gradients: dict[str, list[torch.Tensor]] = {name: [] for name in self.kinds}
        self.seconds: dict[str, list[float]] = {name: [] for name in self.kinds}
        self.peak_bytes: dict[str, int] = {}

    def training_step(self, model: torch.nn.Module, *arguments: Any, **named_arguments: Any) -> torch.Tensor:
        training_step, losses = super().training_step, []

        def step() -> None:
            losses.append(training_step(model, *arguments, **named_arguments))

        for name, functions in self.kinds.items():
            self.loss_functions, self.logps_functions = functions
            model.zero_grad()
            self._step_reference_point = None  # each kind finds its own
            if self.state.global_step == self.state.max_steps - 1:
                self.peak_bytes[name] = measure.peak_bytes(step, self.args.device)
                continue
            self.seconds[name].append(measure.seconds(step, self.args.device))
            self.losses[name].append(losses[-1].item())
            gradients = [weight.grad.flatten().cpu() for weight in model.parameters() if weight.grad is not None]
            self.gradients[name].append(torch.cat(gradients))
        return losses[-1]


def compare(trained: FusedKTOTrainer) -> dict[str, Any]:
    """The first steps again from the reference model's weights, each through plain PyTorch and fused."""
    config = copy.copy(trained.args)
    steps = min(COMPARED_STEPS, config.max_steps)
    config.max_steps = steps + 1
    print(f"\nThe first {steps} steps again, each through plain PyTorch and fused, from the same weights")
    model = copy.deepcopy(trained.ref_model).requires_grad_(True)
    run = ComparedTrainer(model, trained.ref_model, config, processing_class=trained.processing_class)
    run.train_dataset = trained.train_dataset
    train.show_bar_alone(run)
    run.train()
    loss_pairs, gradient_pairs = (list(zip(*kinds.values(), strict=True)) for kinds in (run.losses, run.gradients))
    return {
        "steps": steps,
        "losses": run.losses,
        "largest_loss_difference": max(abs(a - b) for a, b in loss_pairs),
        "largest_gradient_difference": max((a - b).abs().max().item() for a, b in gradient_pairs),
        "largest_gradient": max(plain.abs().max().item() for plain, _ in gradient_pairs),
        "milliseconds_per_step": {name: statistics.median(times) * 1e3 for name, times in run.seconds.items()},
        "peak_mebibytes": {name: peak / 2**20 for name, peak in run.peak_bytes.items()},
    }


def print_comparison(result: dict[str, Any]) -> None:
    titles = {"milliseconds_per_step": "time per step, median (ms)", "peak_mebibytes": "peak memory of a step (MiB)"}
    print(f"{'':34}" + "".join(f"{name:>12}" for name in result["peak_mebibytes"]))
    for key, title in titles.items():
        print(f"{title:34}" + "".join(f"{value:12.1f}" for value in result[key].values()))
    print(f"{'largest difference in loss':34}{result['largest_loss_difference']:24.1e}")
    print(f"{'largest difference in a gradient':34}{result['largest_gradient_difference']:24.1e}")
    print(f"{'largest gradient':34}{result['largest_gradient']:24.1e}")
