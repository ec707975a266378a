"""Tiny models, data and TRL trainers, and comparisons of a fused trainer with TRL's own."""

import copy
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

trl = pytest.importorskip("trl", reason="TRL is not installed: nothing to fuse")
VERSION = tuple(int(part) for part in trl.__version__.split(".")[:2])
# CI runs one version; trl_versions.py runs these tests with all that fuse knows
since_1_15 = pytest.mark.skipif(VERSION < (1, 15), reason="before TRL 1.15 its losses read logits")
since_1_14 = pytest.mark.skipif(VERSION < (1, 14), reason="before TRL 1.14 references are not precomputed here")

# ruff: noqa: E402 (the imports below need TRL)

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # CPO and ORPO are experimental in TRL

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from kto_fused.integrations import trl as fused_trl
from kto_fused.integrations import trl_preference
from kto_fused.integrations.trl import fuse

VOCAB, HIDDEN, STEPS, BATCH = 100, 32, 3, 4
WORDS = VOCAB - 3
TIMES = (
    "runtime",
    "per_second",
    "total_flos",
    "step_time",
    "preparation_time",
)  # endings of logged names that no two runs agree on
SCORES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "kl")
PRECISIONS = {  # (bf16 of the configuration, dtype of the weights)
    "float32": (False, torch.float32),
    "bf16-autocast": (True, torch.float32),
    "bf16-weights": (False, torch.bfloat16),
    "fp16-weights": (False, torch.float16),
}
FIRST_LOSS = {KTOTrainer: 0.5, DPOTrainer: math.log(2)}  # if all log-ratios are 0
CONFIGS = {KTOTrainer: KTOConfig, DPOTrainer: DPOConfig, CPOTrainer: CPOConfig, ORPOTrainer: ORPOConfig}
WITH_REFERENCE = (KTOTrainer, DPOTrainer)  # the trainers that take a reference model
both_trainers = pytest.mark.parametrize("kind", [KTOTrainer, DPOTrainer])


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, "<pad>": 1, "<eos>": 2, **{f"w{i}": i + 3 for i in range(WORDS)}}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", model_max_length=64
    )


def data(
    kind: type,
    desirable: bool | None = None,
    prompt: bool = True,
    rows: int = 2 * STEPS * BATCH,
    longest: int = 7,
) -> Dataset:
    random = torch.Generator().manual_seed(1)

    def text(longest: int) -> str:
        length = int(torch.randint(1, longest + 1, (1,), generator=random))
        words = torch.randint(WORDS, (length,), generator=random).tolist()
        repeats = torch.randint(2, (length,), generator=random).tolist()
        return "".join(f" w{words[i - 1 if i % 2 and repeats[i] else i]}" for i in range(length))

    records = []
    for row in range(rows):
        record = {"prompt": text(5) if prompt else ""}
        if kind is KTOTrainer:
            record |= {"completion": text(longest), "label": row % 3 != 0 if desirable is None else desirable}
        else:
            record |= {"chosen": text(longest), "rejected": text(longest)}
        records.append(record)
    return Dataset.from_list(records)


def long_data(kind: type, rows: int = BATCH, **arguments) -> Dataset:
    """Return data whose sums of log-probabilities are large enough for a difference in rounding to show."""
    return data(kind, rows=rows, longest=50, **arguments)


def model(seed: int = 0, vocab: int = VOCAB, experts: bool = False):
    sizes = {
        "vocab_size": vocab,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,  # large enough that log-probabilities differ
    }
    torch.manual_seed(seed)
    if experts:
        made = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, output_router_logits=True))
    else:
        made = LlamaForCausalLM(LlamaConfig(**sizes))
    with torch.no_grad():  # the model repeats its last word, as the data does half of the time
        embedding = made.get_input_embeddings().weight.mul_(5)
        made.lm_head.weight.add_(0.5 * embedding)
    return made


def experts():
    return model(experts=True)


def with_trained_adapter():
    """Return a model with an adapter that TRL copies into one named "ref", its reference."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model(), settings)


def make_trainer(
    kind: type,
    folder: Path,
    *,
    subclass: type | None = None,
    policy=None,
    make_policy: Callable = model,
    own_reference: bool = True,
    is_reference_equal: bool = False,
    lora: bool = False,
    peft_config=None,
    train_dataset: Dataset | None = None,
    eval_dataset: Dataset | None = None,
    **settings,
):
    config = CONFIGS[kind]
    policy = make_policy() if policy is None else policy
    reference = None
    if own_reference and kind in WITH_REFERENCE:
        reference = copy.deepcopy(policy)
        random = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in reference.parameters() if not is_reference_equal else ():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    if lora:
        peft = pytest.importorskip("peft")
        peft_config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    defaults = {
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",  # Adam would divide a gradient's rounding by the gradient
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
    }
    return (subclass or kind)(
        model=policy,
        **({"ref_model": reference} if kind in WITH_REFERENCE else {}),
        args=config(
            output_dir=str(folder),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **{**defaults, **settings},
        ),
        train_dataset=data(kind) if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def equal_trainer(kind: type, folder: Path, precision: str = "bf16-autocast", *, make_policy=model, **arguments):
    """Return a trainer with equal weights in policy and reference. Precomputing and training see the same batches."""
    bf16, dtype = PRECISIONS[precision]
    settings = {
        "bf16": bf16,
        "train_dataset": long_data(kind),
        "policy": make_policy().to(dtype),
        "is_reference_equal": True,
        "max_steps": 1,
        "train_sampling_strategy": "sequential",
    }
    return make_trainer(kind, folder, **{**settings, **arguments})


class Run(NamedTuple):
    losses: list[float]  # of each batch
    logs: list[dict[str, float]]  # everything that was logged
    parameters: dict[str, torch.Tensor]  # at the end


def steps(trainer) -> Run:
    losses, training_step = [], trainer.training_step

    def recorded(*args, **kwargs):
        loss = training_step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.training_step = recorded
    trainer.train()
    logs = [timeless(log) for log in trainer.state.log_history]
    return Run(losses, logs, {name: p.detach().clone() for name, p in trainer.model.named_parameters()})


def timeless(log: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in log.items() if not name.endswith(TIMES)}


def assert_same_logs(fused: list[dict], own: list[dict], rel: float = 2e-5) -> None:
    assert [list(log) for log in map(sorted, fused)] == [list(log) for log in map(sorted, own)]
    for step, (ours, theirs) in enumerate(zip(fused, own, strict=True)):
        for name in theirs:
            assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=5e-6), (step, name)


def assert_same_training(kind: type, folder: Path, **arguments) -> list[dict[str, float]]:
    """Train TRL's trainer and a fused one: losses, logs and parameters are the same. Return the fused one's logs."""
    own = steps(make_trainer(kind, folder, **arguments))
    fused = steps(fuse(make_trainer(kind, folder, **arguments)))
    assert fused.losses == pytest.approx(own.losses, rel=2e-5, abs=2e-6)
    assert len({round(loss, 6) for loss in fused.losses}) > 1 or len(fused.losses) == 1  # the loss changes
    assert_same_logs(fused.logs, own.logs)
    assert fused.parameters.keys() == own.parameters.keys()
    for name, parameter in fused.parameters.items():
        torch.testing.assert_close(parameter, own.parameters[name], rtol=1e-4, atol=2e-6)
    return fused.logs


def assert_no_log_ratio(log: dict[str, float], prefix: str = "") -> None:
    found = {name: log[prefix + name] for name in SCORES if prefix + name in log}
    assert found == dict.fromkeys(found, 0.0)
    assert {"rewards/chosen", "rewards/rejected"} <= found.keys()


def precomputed(trainer) -> dict[str, list[float]]:
    dataset = trainer.train_dataset
    return {name: dataset[name][:] for name in trl_preference.REF_COLUMNS if name in dataset.column_names}


def make_grpo_trainer(folder: Path, **settings) -> GRPOTrainer:
    """Return a trainer whose reward is the number of different tokens. TRL loads its reference from ``folder``."""
    if not (folder / "model").exists():
        model().save_pretrained(folder / "model")

    def variety(completion_ids, **_):
        return [float(len(set(ids))) for ids in completion_ids]

    defaults = {
        "per_device_train_batch_size": BATCH,
        "num_generations": 2,
        "max_completion_length": 6,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.05,
        "optim": "sgd",
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
    }
    return GRPOTrainer(
        model=LlamaForCausalLM.from_pretrained(folder / "model"),
        reward_funcs=variety,
        args=GRPOConfig(
            output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **{**defaults, **settings}
        ),
        train_dataset=data(DPOTrainer, rows=8).select_columns(["prompt"]),
        processing_class=tokenizer(),
    )


def snapshot(trainer) -> dict[str, object]:
    found = {"loss": vars(trainer).get("_compute_loss"), "fused": vars(trainer).get("_is_fused")}
    for name, one in (("policy", trainer.model), ("reference", getattr(trainer, "ref_model", None))):
        if one is None:
            continue
        for module_name, module in one.named_modules():
            for attribute in ("forward", "_original_forward", "_unfused_forward"):
                found[f"{name}.{module_name}.{attribute}"] = module.__dict__.get(attribute)
    return found


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == fused_trl.__name__]


def only(calls: dict[str, int], **expected: int) -> None:
    if VERSION < (1, 15):  # TRL has no LM head of its own
        expected.pop("own", None)
    assert {name: count for name, count in calls.items() if count} == expected


def batch() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(4)
    input_ids = torch.randint(3, VOCAB, (3, 9), generator=random)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :3] = -100
    labels[2] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
