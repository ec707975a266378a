"""The contenders for a whole training step: this package's trainers, TRL's, and TRL's with `fuse`.

They train a real architecture with random weights on equal batches, with every method that TRL has too. A contender
maps a `Problem` to a `Training`, whose `step` does what the trainer does for one batch. Where a method samples its own
answers, the contenders get the same answers, and `generate` takes no part in a step.
"""

import copy
import importlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Trainer,
)

from kto_fused import huggingface, linear_token_logps
from kto_fused.data.tokens import TOKENS
from kto_fused.integrations.trl import fuse
from kto_fused.trainers import (
    FusedDPOConfig,
    FusedDPOTrainer,
    FusedKTOConfig,
    FusedKTOTrainer,
    FusedPPOConfig,
    FusedPPOTrainer,
    FusedRewardConfig,
    FusedRewardTrainer,
    FusedSFTConfig,
    FusedSFTTrainer,
)
from kto_fused.trainers.online import SampledDPOTrainer, paired

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # CPO, ORPO, online DPO and rollout_func are experimental in TRL

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
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
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
class Method:
    """A training method: its data, and the trainers and options with which both packages compute the same loss."""

    data: str  # unpaired, pairs or demonstrations; samples are pairs whose chosen sample has the higher reward
    trl: str  # module of TRL, and the name before Trainer and Config
    ours: tuple[type[Trainer], type]
    options: dict[str, Any] = field(default_factory=dict)  # of this package's configuration
    trl_options: dict[str, Any] = field(default_factory=lambda: {"max_length": None})
    needs_reference: bool = False
    is_fused: bool = False  # whether `fuse` takes TRL's trainer


DPO = FusedDPOTrainer, FusedDPOConfig
UNLIMITED = 2**20  # tokens, for configurations of TRL that need a number
METHODS = {
    "kto": Method("unpaired", "trl KTO", (FusedKTOTrainer, FusedKTOConfig), needs_reference=True, is_fused=True),
    "dpo": Method("pairs", "trl DPO", DPO, needs_reference=True, is_fused=True),
    "orpo": Method(
        "pairs",
        "trl.experimental.orpo ORPO",
        DPO,
        {"loss_type": "orpo", "nll_on": "all"},
        {"max_length": UNLIMITED},
        is_fused=True,
    ),
    "cpo": Method(
        "pairs", "trl.experimental.cpo CPO", DPO, {"loss_type": "cpo"}, {"max_length": UNLIMITED}, is_fused=True
    ),
    "simpo": Method(
        "pairs",
        "trl.experimental.cpo CPO",
        DPO,
        {"loss_type": "simpo", "beta": 2.0, "gamma": 1.0},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0, "max_length": UNLIMITED},
        is_fused=True,
    ),
    "sft": Method("demonstrations", "trl SFT", (FusedSFTTrainer, FusedSFTConfig)),
    "dft": Method(
        "demonstrations",
        "trl SFT",
        (FusedSFTTrainer, FusedSFTConfig),
        {"loss_type": "dft"},
        {"loss_type": "dft", "max_length": None},
    ),
    "reward": Method("pairs", "trl Reward", (FusedRewardTrainer, FusedRewardConfig)),
    "online-dpo": Method(
        "samples",
        "trl.experimental.online_dpo OnlineDPO",
        (SampledDPOTrainer, FusedDPOConfig),
        trl_options={"max_length": UNLIMITED},
        needs_reference=True,
    ),
    "grpo": Method(
        "samples",
        "trl GRPO",
        (FusedPPOTrainer, FusedPPOConfig),
        {"advantage": "group", "loss_type": "grpo", "beta": 0.0},
        # every step updates on the samples that the first step was given
        {"loss_type": "grpo", "beta": 0.0, "num_generations": 2, "num_iterations": 10**6},
        is_fused=True,
    ),
}


@dataclass(frozen=True)
class Problem:
    """A model, its reference model, and one batch. Half of each sequence is prompt."""

    method: str  # a name of METHODS
    model: PreTrainedModel
    ref_model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerFast
    dataset: Dataset
    sequences: int

    def with_own_models(self) -> "Problem":
        """Return the problem with copies of both models, so that each contender trains its own."""
        return replace(self, model=copy.deepcopy(self.model), ref_model=copy.deepcopy(self.ref_model))


def make_problem(method: str, architecture: str, sequences: int, seq_len: int, device: torch.device) -> Problem:
    """Return a problem of `sequences` sequences (half as many pairs) of `seq_len` tokens each."""
    config, data = ARCHITECTURES[architecture], METHODS[method].data
    tokenizer = word_tokenizer(config.vocab_size)
    torch.manual_seed(0)
    # create the weights on their device: a CPU draws half a billion numbers in half a minute. float32 is the dtype in
    # which all trainers here load weights
    with device:
        if method == "reward":
            config = copy.deepcopy(config)
            config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
            model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    words = torch.randint(FIRST_WORD, config.vocab_size, (3, sequences, seq_len // 2)).tolist()

    def text(ids: list[int]) -> str:
        return " ".join(f"w{i}" for i in ids)

    records = []
    for row in range(sequences // 2 if data in ("pairs", "samples") else sequences):
        prompt, first, second = (text(kind[row]) for kind in words)
        # the leading space adds no token; <eos> replaces the last word, which keeps the length
        first, second = (" " + completion.rsplit(" ", 1)[0] + " <eos>" for completion in (first, second))
        if data == "unpaired":
            records.append({"prompt": prompt, "completion": first, "label": row % 2 == 0})
        elif data == "demonstrations":
            records.append({"prompt": prompt, "completion": first})
        else:
            records.append({"prompt": prompt, "chosen": first, "rejected": second})
    # from_pretrained returns a model in eval mode too
    ref_model = copy.deepcopy(model).eval() if METHODS[method].needs_reference else None
    return Problem(method, model, ref_model, tokenizer, Dataset.from_list(records), sequences)


FIRST_WORD = 2  # before it come <eos> and <pad>


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word, so that a text has exactly the wanted length."""
    vocabulary = {"<eos>": 0, "<pad>": 1} | {f"w{i}": i for i in range(FIRST_WORD, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


class Training:
    """A trainer outside its loop: `step` does what the trainer does for one batch, always on the same batch."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        trainer.state.compute_steps(trainer.args, MAX_STEPS)  # when to log, as its loop would
        trainer.create_optimizer_and_scheduler(num_training_steps=MAX_STEPS)
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = self.model
        self.batch = next(iter(trainer.get_train_dataloader()))

    def step(self) -> torch.Tensor:
        device = self.trainer.args.device
        batches, num_items = self.trainer.get_batch_samples(iter([copy.copy(self.batch)]), 1, device)
        self.trainer.current_gradient_accumulation_steps = 1
        loss = self.trainer.training_step(self.model, batches[0], num_items)
        self.optimizer.step()
        self.trainer.state.global_step += 1
        return loss

    def clear_gradients(self) -> None:
        self.optimizer.zero_grad()


MAX_STEPS = 1000
Contender = Callable[[Problem], Training]


def ours(problem: Problem) -> Training:
    method = METHODS[problem.method]
    trainer_class, config_class = method.ours
    dataset = problem.dataset
    if problem.method == "grpo":
        dataset = _with_advantages(problem)
    elif problem.method == "online-dpo":
        names = ("prompt", "chosen", "rejected")
        dataset = paired([tuple(_ids(problem, record[name]) for name in names) for record in dataset])
    arguments = {"ref_model": problem.ref_model} if method.needs_reference else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            problem.model,
            args=config_class(**_arguments(problem, len(dataset), folder), **method.options, max_length=None),
            train_dataset=dataset,
            processing_class=problem.tokenizer,
            **arguments,
        )
    return Training(trainer)


def trl(problem: Problem) -> Training:
    return Training(_trl_trainer(problem))


def fused_trl(problem: Problem) -> Training:
    return Training(fuse(_trl_trainer(problem)))


def _arguments(problem: Problem, batch_size: int, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch_size,
        "learning_rate": LEARNING_RATE,
        "gradient_checkpointing": False,  # make_problem turned it on; a Trainer would do so when its loop starts
        "bf16": problem.model.device.type != "cpu",
        "use_cpu": problem.model.device.type == "cpu",
        "report_to": [],
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }


def _trl_trainer(problem: Problem) -> Trainer:
    method = METHODS[problem.method]
    module, name = method.trl.split()
    trl_module = importlib.import_module(module)  # imported here because it takes seconds
    trainer_class, config_class = (getattr(trl_module, name + kind) for kind in ("Trainer", "Config"))
    dataset, batch_size, arguments = problem.dataset, len(problem.dataset), {}
    if method.needs_reference:
        arguments["ref_model"] = problem.ref_model
    if method.data == "samples":
        chosen = {tuple(_ids(problem, record["chosen"])) for record in dataset}

        def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
            return [float(tuple(ids) in chosen) for ids in completion_ids]

        dataset, arguments["reward_funcs"] = dataset.select_columns(["prompt"]), reward
    if problem.method == "grpo":
        batch_size = problem.sequences
        arguments["rollout_func"] = lambda prompts, trainer: _samples(problem, prompts)
    if problem.method == "online-dpo":
        trainer_class = type(name, (_GivenSamples, trainer_class), {"problem": problem})
    with tempfile.TemporaryDirectory() as folder:
        return trainer_class(
            model=problem.model,
            args=config_class(**_arguments(problem, batch_size, folder), **method.trl_options),
            train_dataset=dataset,
            processing_class=problem.tokenizer,
            **arguments,
        )


# ---- the samples of GRPO and online DPO ----------------------------------------------------------------------------


def _ids(problem: Problem, text: str) -> list[int]:
    return problem.tokenizer(text, add_special_tokens=False)["input_ids"]


def _samples(problem: Problem, prompts: list[str]) -> dict[str, list]:
    """Return for TRL's GRPO the samples of `prompts`, of which each comes twice."""
    records = {record["prompt"]: record for record in problem.dataset}
    texts = [records[prompt]["rejected" if i % 2 else "chosen"] for i, prompt in enumerate(prompts)]
    return {
        "prompt_ids": [_ids(problem, prompt) for prompt in prompts],
        "completion_ids": [_ids(problem, text) for text in texts],
        "logprobs": None,
    }


class _GivenSamples:
    """Gives TRL's online DPO the samples of its prompts in place of generated ones."""

    def _generate(self, model: torch.nn.Module, prompts: list[str], images: None = None) -> tuple:
        records = {record["prompt"]: record for record in self.problem.dataset}
        completions = [records[prompt][name] for name in ("chosen", "rejected") for prompt in prompts]
        found = []
        for texts in (2 * prompts, completions):
            ids = torch.tensor([_ids(self.problem, text) for text in texts], device=self.args.device)
            found += [ids, torch.ones_like(ids)]
        return (*found, None)


def _with_advantages(problem: Problem) -> Dataset:
    """Return the samples with their log-probabilities and advantages, as `PPOLoop` makes them."""
    rows = [
        (_ids(problem, record["prompt"]), _ids(problem, record[name]))
        for record in problem.dataset
        for name in ("chosen", "rejected")
    ]
    input_ids = torch.tensor([prompt + completion for prompt, completion in rows], device=problem.model.device)
    rewards = torch.tensor([1.0, 0.0])
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    with torch.no_grad():
        logps = huggingface.apply(linear_token_logps, problem.model, {"input_ids": input_ids}, labels=input_ids)
    columns: dict[str, list] = {
        "prompt_ids": [prompt for prompt, _ in rows],
        "completion_ids": [completion for _, completion in rows],
        "length": [len(prompt) + len(completion) for prompt, completion in rows],
        "old_logps": [values[len(prompt) - 1 : -1].tolist() for values, (prompt, _) in zip(logps, rows, strict=True)],
        "advantages": [[advantages[i % 2].item()] * len(completion) for i, (_, completion) in enumerate(rows)],
    }
    features = {name: List(Value("float32")) for name in columns}
    features |= {"prompt_ids": TOKENS, "completion_ids": TOKENS, "length": Value("int32")}
    return Dataset.from_dict(columns, features=Features(features))


CONTENDERS: dict[str, Contender] = {
    "kto-fused trainer": ours,
    "TRL 1.16": trl,
    "TRL 1.16, fused": fused_trl,
}


def contenders_of(method: str) -> dict[str, Contender]:
    return {
        name: contender for name, contender in CONTENDERS.items() if METHODS[method].is_fused or contender != fused_trl
    }
