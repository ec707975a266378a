"""The contenders for a whole training step: this package's trainers, TRL's, and TRL's with `fuse`.

They train a real architecture with random weights on equal batches. A contender maps a `Problem` to a `Training`,
whose `step` does what the trainer does for one batch.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Trainer,
)

from kto_fused.integrations.trl import fuse
from kto_fused.trainers import FusedDPOConfig, FusedDPOTrainer, FusedKTOConfig, FusedKTOTrainer

# every attention head is 64 wide, as in the published models
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "Llama 20M": LlamaConfig(
        vocab_size=32000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32768,
    ),
    "Qwen2.5-0.5B": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ),
    "Llama-3.2-1B": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ),
}
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Problem:
    """A model, its reference model, and one batch. Half of each sequence is prompt."""

    loss: str  # kto or dpo
    model: PreTrainedModel
    ref_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    dataset: Dataset
    sequences: int

    @property
    def rows(self) -> int:
        """The number of examples in the batch: sequences for KTO, pairs for DPO."""
        return self.sequences if self.loss == "kto" else self.sequences // 2

    def with_own_models(self) -> "Problem":
        """Return the problem with copies of both models, so that each contender trains its own."""
        return replace(self, model=copy.deepcopy(self.model), ref_model=copy.deepcopy(self.ref_model))


def make_problem(loss: str, architecture: str, sequences: int, seq_len: int, device: torch.device) -> Problem:
    """Return a problem of `sequences` sequences (half as many pairs) of `seq_len` tokens each."""
    config = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    # create the weights on their device: a CPU draws half a billion numbers in half a minute. float32 is the dtype in
    # which all trainers here load weights
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokenizer = word_tokenizer(config.vocab_size)
    words = torch.randint(1, config.vocab_size, (3, sequences, seq_len // 2)).tolist()

    def text(ids: list[int]) -> str:
        return " ".join(f"w{i}" for i in ids)

    records = []
    for row in range(sequences if loss == "kto" else sequences // 2):
        prompt, first, second = (text(kind[row]) for kind in words)
        # the leading space adds no token; <eos> replaces the last word, which keeps the length
        first, second = (" " + completion.rsplit(" ", 1)[0] + " <eos>" for completion in (first, second))
        if loss == "kto":
            records.append({"prompt": prompt, "completion": first, "label": row % 2 == 0})
        else:
            records.append({"prompt": prompt, "chosen": first, "rejected": second})
    ref_model = copy.deepcopy(model).eval()  # from_pretrained returns a model in eval mode too
    return Problem(loss, model, ref_model, tokenizer, Dataset.from_list(records), sequences)


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word, so that a text has exactly the wanted length."""
    vocabulary = {"<eos>": 0} | {f"w{i}": i for i in range(1, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


class Training:
    """A trainer outside its loop: `step` does what the trainer does for one batch, always on the same batch."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        trainer.create_optimizer_and_scheduler(num_training_steps=1000)
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = self.model
        self.batch = next(iter(trainer.get_train_dataloader()))

    def step(self) -> torch.Tensor:
        device = self.trainer.args.device
        batches, num_items = self.trainer.get_batch_samples(iter([dict(self.batch)]), 1, device)
        self.trainer.current_gradient_accumulation_steps = 1
        loss = self.trainer.training_step(self.model, batches[0], num_items)
        self.optimizer.step()
        return loss

    def clear_gradients(self) -> None:
        self.optimizer.zero_grad()


Contender = Callable[[Problem], Training]


def _arguments(problem: Problem, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": problem.rows,
        "learning_rate": LEARNING_RATE,
        "gradient_checkpointing": False,  # make_problem turned it on; a Trainer would do so when its loop starts
        "bf16": problem.model.device.type != "cpu",
        "use_cpu": problem.model.device.type == "cpu",
        "max_length": None,
        "report_to": [],
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }


def _training(trainer_class: type, config_class: type, problem: Problem) -> Trainer:
    with tempfile.TemporaryDirectory() as folder:
        return trainer_class(
            model=problem.model,
            ref_model=problem.ref_model,
            args=config_class(**_arguments(problem, folder)),
            train_dataset=problem.dataset,
            processing_class=problem.tokenizer,
        )


def ours(problem: Problem) -> Training:
    kinds = {"kto": (FusedKTOTrainer, FusedKTOConfig), "dpo": (FusedDPOTrainer, FusedDPOConfig)}
    return Training(_training(*kinds[problem.loss], problem))


def trl(problem: Problem) -> Training:
    return Training(_trl_trainer(problem))


def fused_trl(problem: Problem) -> Training:
    return Training(fuse(_trl_trainer(problem)))


def _trl_trainer(problem: Problem) -> Trainer:
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer  # imported here because it takes seconds

    kinds = {"kto": (KTOTrainer, KTOConfig), "dpo": (DPOTrainer, DPOConfig)}
    return _training(*kinds[problem.loss], problem)


CONTENDERS: dict[str, Contender] = {
    "kto-fused trainer": ours,
    "TRL 1.16": trl,
    "TRL 1.16, fused": fused_trl,
}
