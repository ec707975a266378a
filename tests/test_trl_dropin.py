"""A fused TRL trainer takes the steps, and logs the values, of the one it was."""

import copy
import gc
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

trl = pytest.importorskip("trl", reason="TRL is not installed: nothing to fuse")
if not trl.__version__.startswith("1.16."):
    pytest.skip(f"fuses TRL 1.16, found {trl.__version__}", allow_module_level=True)

# ruff: noqa: E402  (what follows needs TRL)
import datasets
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer import utils as trl_utils

from kto_fused import huggingface
from kto_fused.integrations import trl as dropin
from kto_fused.integrations.trl import fuse

VOCAB, HIDDEN, STEPS, BATCH = 100, 32, 3, 4
WORDS = VOCAB - 3
DPO_WHOLE = ["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down"]
DPO_OTHERS = ["exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "discopop", "sft", "sigmoid_norm"]
TIMES = ("runtime", "per_second", "total_flos")


@pytest.fixture(autouse=True, scope="module")
def many_short_runs():
    """Nothing here is worth a second thread; each run collects garbage, which need not look at imported modules."""
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)
    datasets.enable_progress_bars()
    transformers.logging.set_verbosity_warning()


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, "<pad>": 1, "<eos>": 2, **{f"w{i}": i + 3 for i in range(WORDS)}}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", model_max_length=64
    )


def data(kind: type, desirable: bool | None = None, prompt: bool = True) -> Dataset:
    random = torch.Generator().manual_seed(1)

    def text(longest: int) -> str:
        length = int(torch.randint(1, longest + 1, (1,), generator=random))
        return "".join(f" w{i}" for i in torch.randint(WORDS, (length,), generator=random).tolist())

    rows = []
    for row in range(STEPS * BATCH * 2):
        record = {"prompt": text(5) if prompt else ""}
        if kind is KTOTrainer:
            record |= {"completion": text(7), "label": row % 3 != 0 if desirable is None else desirable}
        else:
            record |= {"chosen": text(7), "rejected": text(7)}
        rows.append(record)
    return Dataset.from_list(rows)


def model(seed: int = 0, vocab: int = VOCAB, experts: bool = False):
    sizes = {
        "vocab_size": vocab,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,  # log-probabilities that differ
    }
    torch.manual_seed(seed)
    if experts:
        return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, output_router_logits=True))
    return LlamaForCausalLM(LlamaConfig(**sizes))


def make_trainer(
    kind: type,
    folder: Path,
    *,
    subclass: type | None = None,
    policy=None,
    own_reference: bool = True,
    lora: bool = False,
    train_dataset: Dataset | None = None,
    eval_dataset: Dataset | None = None,
    **settings,
):
    config = KTOConfig if kind is KTOTrainer else DPOConfig
    policy = model() if policy is None else policy
    reference = None
    if own_reference:
        reference = copy.deepcopy(policy)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    peft_config = None
    if lora:
        peft = pytest.importorskip("peft")
        peft_config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    defaults = {
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",  # Adam divides a gradient's rounding by the gradient
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return (subclass or kind)(
        model=policy,
        ref_model=reference,
        args=config(
            output_dir=str(folder),
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **{**defaults, **settings},
        ),
        train_dataset=data(kind) if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def steps(trainer) -> tuple[list[float], list[dict[str, float]], dict[str, torch.Tensor]]:
    """(each batch's loss, everything logged, the parameters at the end)"""
    losses, training_step = [], trainer.training_step

    def recorded(*args, **kwargs):
        loss = training_step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.training_step = recorded
    trainer.train()
    logs = [{n: v for n, v in log.items() if not n.endswith(TIMES)} for log in trainer.state.log_history]
    return losses, logs, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same_logs(fused: list[dict], own: list[dict], rel: float = 2e-5) -> None:
    assert [list(log) for log in map(sorted, fused)] == [list(log) for log in map(sorted, own)]
    for step, (ours, theirs) in enumerate(zip(fused, own, strict=True)):
        for name in theirs:
            assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=5e-6), (step, name)


def assert_same_training(kind: type, folder: Path, **arguments) -> list[dict[str, float]]:
    own_losses, own_logs, own_parameters = steps(make_trainer(kind, folder, **arguments))
    losses, logs, parameters = steps(fuse(make_trainer(kind, folder, **arguments)))
    assert losses == pytest.approx(own_losses, rel=2e-5, abs=2e-6)
    assert len({round(loss, 6) for loss in losses}) > 1 or len(losses) == 1  # it does train
    assert_same_logs(logs, own_logs)
    assert parameters.keys() == own_parameters.keys()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, own_parameters[name], rtol=1e-4, atol=2e-6)
    return logs


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """How often a fused trainer asked this package, and TRL's own LM head, for what."""
    counts = dict.fromkeys(
        ("linear_token_logps", "linear_sequence_logps", "fused_linear_kto_loss", "fused_linear_dpo_loss", "own"), 0
    )

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in counts:
        if name != "own":
            monkeypatch.setattr(dropin, name, counted(name, getattr(dropin, name)))
    own = trl_utils._ChunkedLogProbFunction
    monkeypatch.setattr(own, "apply", counted("own", own.apply))
    return counts


def only(calls: dict[str, int], **expected: int) -> None:
    assert {name: count for name, count in calls.items() if count} == expected


# ---- every loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("reference", ["model", "precomputed", "lora", "lora-precomputed"])
def test_kto_trains_and_logs_alike(tmp_path, loss_type, reference):
    logs = assert_same_training(
        KTOTrainer,
        tmp_path,
        loss_type=loss_type,
        desirable_weight=1.33,
        undesirable_weight=0.7,
        own_reference=reference in ("model", "precomputed"),
        lora="lora" in reference,
        precompute_ref_log_probs="precomputed" in reference,
    )
    names = {f"{kind}/{side}" for kind in ("rewards", "logps", "logits") for side in ("chosen", "rejected")}
    assert names | {"kl", "entropy", "num_tokens", "rewards/margins", "grad_norm", "loss"} < logs[0].keys()


@pytest.mark.parametrize("loss_type", DPO_WHOLE + DPO_OTHERS)
def test_dpo_trains_and_logs_alike(tmp_path, loss_type):
    smoothing = {"robust": 0.1, "exo_pair": 1e-3, "aot": 0.1, "sigmoid": 0.2}  # TRL's sigmoid does not look at it
    logs = assert_same_training(
        DPOTrainer, tmp_path, loss_type=[loss_type], label_smoothing=smoothing.get(loss_type, 0.0), beta=0.2
    )
    names = {f"{kind}/{side}" for kind in ("rewards", "logps", "logits") for side in ("chosen", "rejected")}
    names |= {"rewards/margins", "rewards/accuracies", "mean_token_accuracy", "entropy", "num_tokens", "grad_norm"}
    assert names < logs[0].keys()


@pytest.mark.parametrize(
    ("loss_type", "reference"),
    [
        ("sigmoid", "precomputed"),
        ("sigmoid", "lora"),
        ("ipo", "lora-precomputed"),
        ("aot", "lora"),
        ("sft", "precomputed"),
    ],
)
def test_dpo_trains_alike_with_any_reference(tmp_path, loss_type, reference):
    assert_same_training(
        DPOTrainer,
        tmp_path,
        loss_type=[loss_type],
        own_reference=reference == "precomputed",
        lora="lora" in reference,
        precompute_ref_log_probs="precomputed" in reference,
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"loss_weights": [0.5]},
        {"ld_alpha": 0.5},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "alpha_divergence"},
        {"use_weighting": True},
    ],
    ids=str,
)
def test_what_only_trl_defines_stays_trls_and_is_said_once(tmp_path, settings, calls, caplog):
    assert_same_training(DPOTrainer, tmp_path, **settings)
    said = [record.getMessage() for record in caplog.records if record.name == dropin.__name__]
    assert len(said) == 1
    assert list(settings)[-1] in said[0] or str(settings["loss_type"]) in said[0]
    if "use_weighting" in settings:
        only(calls, own=STEPS * 3, linear_token_logps=STEPS)
    else:
        only(calls, own=STEPS * 2, linear_token_logps=STEPS * 2)


def test_the_whole_loss_is_one_call_and_trls_head_never_runs(tmp_path, calls):
    steps(fuse(make_trainer(KTOTrainer, tmp_path)))
    only(calls, fused_linear_kto_loss=STEPS, linear_sequence_logps=3 * STEPS)
    calls.update(dict.fromkeys(calls, 0))
    steps(fuse(make_trainer(DPOTrainer, tmp_path)))
    only(calls, fused_linear_dpo_loss=STEPS, linear_sequence_logps=STEPS)


@pytest.mark.parametrize("kind", [KTOTrainer, DPOTrainer])
@pytest.mark.parametrize("case", ["accumulation", "checkpointing", "reentrant", "dropout-off-by-default"])
def test_what_the_trainer_brings_keeps_working(tmp_path, kind, case):
    settings = {
        "accumulation": {"gradient_accumulation_steps": 2},
        "checkpointing": {"gradient_checkpointing": True, "lora": True, "own_reference": False},
        "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "dropout-off-by-default": {"policy": model(dropout=0.5)},
    }
    assert_same_training(kind, tmp_path, **settings[case])
