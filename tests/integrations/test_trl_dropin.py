"""A fused TRL trainer takes the steps, and logs the values, of the one it was."""

import copy
import gc
import math
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

trl = pytest.importorskip("trl", reason="TRL is not installed: nothing to fuse")
if not trl.__version__.startswith("1.16."):
    pytest.skip(f"fuses TRL 1.16, found {trl.__version__}", allow_module_level=True)

# ruff: noqa: E402  (what follows needs TRL)
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer import utils as trl_utils

from kto_fused import huggingface, linear_sequence_logps
from kto_fused.integrations import trl as dropin
from kto_fused.integrations.trl import fuse

VOCAB, HIDDEN, STEPS, BATCH = 100, 32, 3, 4
WORDS = VOCAB - 3
DPO_WHOLE = ["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down"]
DPO_OTHERS = ["exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "discopop", "sft", "sigmoid_norm"]
TIMES = ("runtime", "per_second", "total_flos")
pytestmark = pytest.mark.usefixtures("small_machine")


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


def model(seed: int = 0, vocab: int = VOCAB, experts: bool = False):
    sizes = {
        "vocab_size": vocab,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,  # log-probabilities that differ
    }
    torch.manual_seed(seed)
    if experts:
        made = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, output_router_logits=True))
    else:
        made = LlamaForCausalLM(LlamaConfig(**sizes))
    with torch.no_grad():  # it says the same word again, as the data does half of the time
        embedding = made.get_input_embeddings().weight.mul_(5)
        made.lm_head.weight.add_(0.5 * embedding)
    return made


def experts():
    return model(experts=True)


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
    config = KTOConfig if kind is KTOTrainer else DPOConfig
    policy = make_policy() if policy is None else policy
    reference = None
    if own_reference:
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
        "optim": "sgd",  # Adam divides a gradient's rounding by the gradient
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
    }
    return (subclass or kind)(
        model=policy,
        ref_model=reference,
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


def timeless(log: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in log.items() if not name.endswith(TIMES)}


def steps(trainer) -> tuple[list[float], list[dict[str, float]], dict[str, torch.Tensor]]:
    """(each batch's loss, everything logged, the parameters at the end)"""
    losses, training_step = [], trainer.training_step

    def recorded(*args, **kwargs):
        loss = training_step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.training_step = recorded
    trainer.train()
    logs = [timeless(log) for log in trainer.state.log_history]
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
    assert 0.1 < logs[0]["mean_token_accuracy"] < 0.9


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
        {"make_policy": experts, "f_divergence_type": "reverse_kl", "loss_type": ["nca_pair"]},
        {"loss_weights": [0.5]},
        {"ld_alpha": 0.5},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "alpha_divergence"},
        {"use_weighting": True},
    ],
    # a function's address would name the test differently in each process of a parallel run
    ids=lambda settings: str({name: getattr(value, "__name__", value) for name, value in settings.items()}),
)
def test_what_only_trl_defines_stays_trls_and_is_said_once(tmp_path, settings, calls, caplog):
    assert_same_training(DPOTrainer, tmp_path, **settings)
    (message,) = said(caplog)
    assert list(settings)[-1] in message or str(settings["loss_type"]) in message
    if "use_weighting" in settings:  # TRL computes everything, in the trainer that is fused too
        only(calls, own=STEPS * 4)
    else:
        only(calls, own=STEPS * 2, linear_token_logps=STEPS * 2)


def test_the_whole_loss_is_one_call_and_trls_head_never_runs(tmp_path, calls):
    steps(fuse(make_trainer(KTOTrainer, tmp_path)))
    only(calls, fused_linear_kto_loss=STEPS, linear_sequence_logps=3 * STEPS)
    calls.update(dict.fromkeys(calls, 0))
    steps(fuse(make_trainer(DPOTrainer, tmp_path)))
    only(calls, fused_linear_dpo_loss=STEPS, linear_sequence_logps=STEPS)


# ---- what trainers bring ------------------------------------------------------------------------------------------

both_trainers = pytest.mark.parametrize("kind", [KTOTrainer, DPOTrainer])


@both_trainers
@pytest.mark.parametrize(
    "case", ["accumulation", "checkpointing", "reentrant-checkpointing", "experts", "experts-precomputed", "adapter"]
)
def test_what_trainers_bring_keeps_working(tmp_path, kind, case):
    arguments = {
        "accumulation": {"gradient_accumulation_steps": 2},
        "checkpointing": {"gradient_checkpointing": True, "lora": True, "own_reference": False},
        "reentrant-checkpointing": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        "experts": {"make_policy": experts, "router_aux_loss_coef": 0.3},
        "experts-precomputed": {"make_policy": experts, "precompute_ref_log_probs": True},
        "adapter": {"make_policy": with_trained_adapter, "own_reference": False},
    }
    logs = assert_same_training(kind, tmp_path, **arguments[case])
    assert ("aux_loss" in logs[0]) == case.startswith("experts")


@both_trainers
def test_a_reference_of_its_own_leaves_the_policys_checkpointing_alone(tmp_path, kind):
    """Off and on again at each pass, it leaves one more hook at the embeddings each time."""
    trainer = fuse(make_trainer(kind, tmp_path, gradient_checkpointing=True))
    steps(trainer)
    assert trainer.model.is_gradient_checkpointing
    assert len(trainer.model.get_input_embeddings()._forward_hooks) <= 1


def with_trained_adapter():
    """TRL copies such an adapter into one named "ref", its reference."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model(), settings)


def partly_frozen() -> torch.nn.Module:
    policy = with_trained_adapter()
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return policy


@both_trainers
def test_frozen_weights_of_an_adapter_stay_frozen(tmp_path, kind):
    """In TRL too, for the first step; its reference then unfreezes them."""
    _, own_logs, _ = steps(make_trainer(kind, tmp_path, policy=partly_frozen(), own_reference=False))
    trainer = fuse(make_trainer(kind, tmp_path, policy=partly_frozen(), own_reference=False))
    _, logs, _ = steps(trainer)
    assert_same_logs(logs[:1], own_logs[:1])
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4
    assert all("lora_B.default" in name for name in trained)


@both_trainers
def test_a_model_with_nothing_to_train_fails_as_in_trl(tmp_path, kind):
    for make in (lambda trainer: trainer, fuse):
        policy = with_trained_adapter().requires_grad_(False)
        trainer = make(make_trainer(kind, tmp_path, policy=policy, own_reference=False))
        with pytest.raises(RuntimeError, match="does not require grad"):
            trainer.train()


def test_a_router_loss_of_a_models_own_is_not_asked_for(tmp_path):
    """``apply`` would add it, and refuses one that it does not know; TRL adds Mixtral's, weighed by the setting."""

    def make_policy():
        policy = experts()
        del policy.router_aux_loss_coef
        return policy

    with pytest.raises(huggingface.UnsupportedModelError, match="router loss is not a known one"):
        huggingface.attach(make_policy())
    logs = assert_same_training(DPOTrainer, tmp_path, make_policy=make_policy)
    assert logs[0]["aux_loss"] > 0
    assert fuse(make_trainer(DPOTrainer, tmp_path, make_policy=make_policy)).model.config.output_router_logits


@both_trainers
def test_evaluation_logs_alike(tmp_path, kind):
    arguments = {"eval_dataset": data(kind, rows=7), "per_device_eval_batch_size": BATCH, "eval_strategy": "steps"}
    logs = assert_same_training(kind, tmp_path, **arguments, eval_steps=2)
    assert any("eval_rewards/margins" in log for log in logs)
    own, fused = make_trainer(kind, tmp_path, **arguments), fuse(make_trainer(kind, tmp_path, **arguments))
    for trainer in (own, fused):  # asked for logits, the loss is TRL's, and so are they
        trainer.compute_metrics = lambda prediction: {"sum": float(prediction.predictions.sum())}
    assert_same_logs([timeless(fused.evaluate())], [timeless(own.evaluate())])


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("desirable", [True, False])
def test_a_batch_of_one_class_logs_no_other(tmp_path, loss_type, desirable):
    rows = data(KTOTrainer, desirable=desirable)
    logs = assert_same_training(KTOTrainer, tmp_path, loss_type=loss_type, train_dataset=rows)
    assert ("rewards/chosen" in logs[0]) is desirable
    assert ("rewards/rejected" in logs[0]) is not desirable
    assert "rewards/margins" not in logs[0]


@both_trainers
@pytest.mark.parametrize("prepared", ["reference", "policy"])
def test_autocast_covers_a_model_that_was_prepared_before(tmp_path, kind, prepared, monkeypatch):
    """TRL has accelerate prepare the reference, and an evaluation before training the policy."""
    autocasts = []
    for name in ("linear_sequence_logps", "fused_linear_kto_loss", "fused_linear_dpo_loss"):
        function = getattr(dropin, name)

        def recorded(function=function, **arguments):
            autocasts.append(torch.is_autocast_enabled("cpu"))
            return function(**arguments)

        monkeypatch.setattr(dropin, name, recorded)
    arguments = {"bf16": True, "eval_dataset": data(kind, rows=BATCH)}
    if prepared == "policy":
        arguments.update(precompute_ref_log_probs=True, own_reference=False)

    def trainer():
        made = make_trainer(kind, tmp_path, **arguments)
        if prepared == "policy":
            made.evaluate()
        assert "_original_forward" in vars(made.model if prepared == "policy" else made.ref_model)
        return made

    _, own_logs, _ = steps(trainer())
    _, logs, _ = steps(fuse(trainer()))
    assert set(autocasts) == {True}
    for ours, theirs in zip(logs, own_logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name in {"loss", "train_loss", "entropy", "logits/chosen", "logits/rejected"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-2, abs=2e-2), name


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid"])
def test_completions_without_a_prompt_train_alike(tmp_path, loss_type, calls):
    """Of those TRL's lengths count the first token, which nothing predicts."""
    rows = data(DPOTrainer, prompt=False)
    assert_same_training(DPOTrainer, tmp_path, loss_type=[loss_type], beta=0.5, train_dataset=rows)
    assert calls["fused_linear_dpo_loss"] == (0 if loss_type == "ipo" else STEPS)


# ---- policy and reference are scored alike ------------------------------------------------------------------------

SCORES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "kl")
PRECISIONS = {  # (bf16 of the configuration, dtype of the weights)
    "float32": (False, torch.float32),
    "bf16-autocast": (True, torch.float32),
    "bf16-weights": (False, torch.bfloat16),
    "fp16-weights": (False, torch.float16),
}
FIRST_LOSS = {KTOTrainer: 0.5, DPOTrainer: math.log(2)}  # of log-ratios that are 0


def long_data(kind: type, rows: int = BATCH, **arguments) -> Dataset:
    """Sums of log-probabilities that are large enough for a difference in rounding to show."""
    return data(kind, rows=rows, longest=50, **arguments)


def equal_trainer(kind: type, folder: Path, precision: str = "bf16-autocast", *, make_policy=model, **arguments):
    """Policy and reference have equal weights, and precomputing sees the batches that training sees."""
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


def assert_no_log_ratio(log: dict[str, float], prefix: str = "") -> None:
    found = {name: log[prefix + name] for name in SCORES if prefix + name in log}
    assert found == dict.fromkeys(found, 0.0)
    assert {"rewards/chosen", "rewards/rejected"} <= found.keys()


@both_trainers
@pytest.mark.parametrize(
    ("precision", "reference"),
    [
        ("float32", "live"),
        ("bf16-autocast", "live"),
        ("bf16-autocast", "precomputed"),
        ("bf16-weights", "precomputed by the policy"),
        ("fp16-weights", "precomputed by the policy"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ("float32", "precomputed by the policy"),
                ("bf16-autocast", "precomputed by the policy"),
                ("bf16-weights", "live"),
                ("fp16-weights", "live"),
            )
        ),
    ],
)
def test_equal_weights_give_log_ratios_of_exactly_0(tmp_path, kind, precision, reference):
    """In training, in an evaluation before it, and in one of a dataset that TRL has not seen."""
    trainer = fuse(
        equal_trainer(
            kind,
            tmp_path,
            precision,
            own_reference=reference != "precomputed by the policy",
            precompute_ref_log_probs=reference != "live",
            eval_dataset={"all": long_data(kind)},
        )
    )
    evaluations = [trainer.evaluate(), trainer.evaluate(long_data(kind, rows=3))]
    losses, logs, _ = steps(trainer)
    for log in evaluations:
        assert_no_log_ratio(log, "eval_")
    assert_no_log_ratio(logs[0])
    losses += [evaluations[0]["eval_all_loss"], evaluations[1]["eval_loss"]]
    assert losses == pytest.approx([FIRST_LOSS[kind]] * 3, abs=1e-7)


PATHS = {
    "adapter": {"own_reference": False, "make_policy": lambda: with_trained_adapter()},
    "adapter-precomputed": {
        "own_reference": False,
        "make_policy": lambda: with_trained_adapter(),
        "precompute_ref_log_probs": True,
    },
    "experts": {"make_policy": experts},
    "experts-precomputed": {"make_policy": experts, "precompute_ref_log_probs": True},
    "checkpointing": {"gradient_checkpointing": True, "precompute_ref_log_probs": True},
    "a loss of TRL's": {"loss_type": ["nca_pair"], "precompute_ref_log_probs": True},
    "ld_alpha": {"ld_alpha": 0.5, "precompute_ref_log_probs": True},
    "weighting": {"use_weighting": True},
    "weighting-precomputed": {"use_weighting": True, "precompute_ref_log_probs": True},
    "ipo": {"loss_type": ["ipo"]},
    "ipo-precomputed": {"loss_type": ["ipo"], "precompute_ref_log_probs": True},
}
OF_DPO = ("a loss of TRL's", "ld_alpha", "weighting", "weighting-precomputed", "ipo", "ipo-precomputed")
KTO_SLICE = "adapter-precomputed"


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        *((DPOTrainer, path) for path in PATHS),
        (KTOTrainer, KTO_SLICE),
        *(pytest.param(KTOTrainer, path, marks=pytest.mark.full) for path in PATHS if path not in (*OF_DPO, KTO_SLICE)),
    ],
)
def test_no_path_mixes_two_ways_of_rounding(tmp_path, kind, path):
    arguments = dict(PATHS[path])
    if path.startswith("ipo"):  # without a prompt, for which TRL computes the loss
        arguments["train_dataset"] = long_data(kind, prompt=False)
    _, logs, _ = steps(fuse(equal_trainer(kind, tmp_path, **arguments)))
    assert_no_log_ratio(logs[0])


@both_trainers
@pytest.mark.parametrize("precomputed", [False, True])
def test_asked_for_logits_the_scores_are_the_same(tmp_path, kind, precomputed):
    trainer = fuse(equal_trainer(kind, tmp_path, eval_dataset=long_data(kind), precompute_ref_log_probs=precomputed))
    trainer.compute_metrics = lambda prediction: {"size": prediction.predictions.shape[-1]}
    log = trainer.evaluate()
    assert log["eval_size"] == VOCAB
    assert_no_log_ratio(log, "eval_")


@both_trainers
def test_a_reference_that_follows_the_policy_is_scored_like_it(tmp_path, kind):
    trainer = fuse(
        equal_trainer(
            kind,
            tmp_path,
            train_dataset=long_data(kind, rows=3 * BATCH),
            max_steps=3,
            sync_ref_model=True,
            ref_model_sync_steps=1,
            ref_model_mixup_alpha=1.0,
        )
    )
    _, logs, _ = steps(trainer)
    assert len({log["logps/chosen"] for log in logs[:3]}) == 3
    for log in logs[:3]:
        assert_no_log_ratio(log)


@both_trainers
@pytest.mark.parametrize(
    ("precision", "nats"),
    [("float32", 1e-4), ("bf16-autocast", 0.25), pytest.param("bf16-weights", 0.25, marks=pytest.mark.full)],
)
def test_other_batches_than_precomputed_differ_by_rounding_alone(tmp_path, kind, precision, nats):
    """The padding of a batch changes the shapes, and with them the rounding, of matrix products and attention."""
    arguments = {"train_dataset": long_data(kind, rows=6 * BATCH), "precompute_ref_batch_size": 5}
    if kind is DPOTrainer:
        arguments["train_sampling_strategy"] = "random"
    trainer = fuse(equal_trainer(kind, tmp_path, precision, precompute_ref_log_probs=True, **arguments))
    differences = []
    for batch in trainer.get_train_dataloader():
        kept = [batch[name] for name in dropin.REF_COLUMNS if name in batch]
        live = trainer.compute_ref_log_probs(trainer.ref_model, trainer._prepare_inputs(batch))
        assert all(values.dtype == torch.float64 for values in (*kept, *live))
        differences += [(a - b).abs().max().item() for a, b in zip(kept, live, strict=True)]
    assert len(differences) == 12
    assert max(differences) < nats


def precomputed(trainer) -> dict[str, list[float]]:
    dataset = trainer.train_dataset
    return {name: dataset[name][:] for name in dropin.REF_COLUMNS if name in dataset.column_names}


@both_trainers
def test_fused_and_unfused_trainers_never_read_each_others_cache(tmp_path, kind, calls):
    long_data(kind).save_to_disk(tmp_path / "rows")
    rows = Dataset.load_from_disk(tmp_path / "rows")

    def make():
        return equal_trainer(kind, tmp_path, own_reference=False, precompute_ref_log_probs=True, train_dataset=rows)

    unfused = make()
    own = precomputed(unfused)
    unfused.evaluate(rows)
    calls.update(dict.fromkeys(calls, 0))
    trainer = fuse(make())
    fused = precomputed(trainer)
    assert calls["linear_sequence_logps"] > 0
    assert fused.keys() == own.keys()
    assert fused != own
    assert_no_log_ratio(trainer.evaluate(rows), "eval_")
    calls.update(dict.fromkeys(calls, 0))
    assert precomputed(fuse(make())) == fused
    only(calls)  # from the cache
    unfused = make()
    assert precomputed(unfused) == own
    assert_no_log_ratio(unfused.evaluate(rows), "eval_")


@both_trainers
def test_a_resumed_run_keeps_the_reference_that_it_began_with(tmp_path, kind):
    """``train`` loads the checkpoint: ``fuse`` still sees the initial policy."""

    def make(name: str, **settings):
        rows = long_data(kind, rows=4 * BATCH)
        settings = {"max_steps": 4, "own_reference": False, "precompute_ref_log_probs": True, **settings}
        return fuse(equal_trainer(kind, tmp_path / name, train_dataset=rows, **settings))

    whole = make("whole", save_strategy="steps", save_steps=2)
    _, logs, parameters = steps(whole)
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    log_history = [timeless(log) for log in resumed.state.log_history]
    for log in (*log_history, *logs):
        log.pop("num_tokens", None)  # which TRL counts anew
    assert_same_logs(log_history[2:4], logs[2:4])
    for name, parameter in resumed.model.named_parameters():
        torch.testing.assert_close(parameter, parameters[name])


@both_trainers
def test_a_policy_that_is_not_the_precomputed_reference_stays_trls(tmp_path, kind, caplog):
    trainer = equal_trainer(kind, tmp_path, own_reference=False, precompute_ref_log_probs=True)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)
    before, values = snapshot(trainer), precomputed(trainer)
    assert fuse(trainer) is trainer
    assert snapshot(trainer) == before
    assert precomputed(trainer) == values
    (message,) = said(caplog)
    assert message.startswith("TRL computes everything as before: the policy's weights changed after TRL precomputed")
    assert "call fuse before training, or pass ref_model" in message


def test_fsdp_without_the_precomputed_reference_stays_trls(tmp_path, caplog):
    trainer = equal_trainer(DPOTrainer, tmp_path, own_reference=False, precompute_ref_log_probs=True)
    trainer.is_fsdp_enabled = True
    trainer.accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=2)),
        parallelism_config=None,
        device=torch.device("cpu"),
    )
    before = snapshot(trainer)
    assert snapshot(fuse(trainer)) == before
    (message,) = said(caplog)
    assert "under FSDP, where TRL has dropped the reference" in message


@both_trainers
def test_a_new_dataset_after_training_is_refused_as_in_trl(tmp_path, kind):
    trainer = fuse(equal_trainer(kind, tmp_path, own_reference=False, precompute_ref_log_probs=True))
    trainer.train()
    with pytest.raises(ValueError, match="Cannot compute reference log-probs for a dataset passed to `evaluate"):
        trainer.evaluate(long_data(kind))


@both_trainers
def test_computing_again_draws_no_random_number_and_keeps_the_mode(tmp_path, kind):
    def make_policy():
        policy = model()
        policy.config.attention_dropout = 0.5
        for layer in policy.model.layers:
            layer.self_attn.attention_dropout = 0.5
        return policy.train()

    trainer = equal_trainer(
        kind,
        tmp_path,
        make_policy=make_policy,
        own_reference=False,
        precompute_ref_log_probs=True,
        disable_dropout=False,
    )
    state = torch.get_rng_state()
    fuse(trainer)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in trainer.model.modules())


@both_trainers
def test_an_error_while_computing_again_leaves_all_as_it_was(tmp_path, kind, monkeypatch):
    def fails(**_):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(dropin, "linear_sequence_logps", fails)
    trainer = equal_trainer(kind, tmp_path, precompute_ref_log_probs=True)
    before, attributes = snapshot(trainer), dict(vars(trainer))
    with pytest.raises(RuntimeError, match="the disk is full"):
        fuse(trainer)
    assert snapshot(trainer) == before
    assert vars(trainer) == attributes


def test_with_precomputed_references_a_setting_must_not_change_the_sums(tmp_path):
    trainer = fuse(equal_trainer(DPOTrainer, tmp_path, precompute_ref_log_probs=True))
    trainer.ld_alpha = 0.5
    with pytest.raises(ValueError, match=r"ld_alpha=0\.5: this was set after fuse\(trainer\).*Set it before fuse"):
        trainer.train()


@both_trainers
def test_deepspeed_does_not_round_precomputed_values(tmp_path, kind):
    """``Trainer`` casts a batch's floats to the dtype of DeepSpeed's configuration."""
    trainer = fuse(equal_trainer(kind, tmp_path, precompute_ref_log_probs=True))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.is_deepspeed_enabled = True
    prepared = trainer._prepare_inputs(batch)
    names = [name for name in dropin.REF_COLUMNS if name in batch]
    assert len(names) == 2
    for name in names:
        assert prepared[name].dtype == torch.float64
        assert torch.equal(prepared[name], batch[name])


@pytest.mark.parametrize(
    ("difference", "reason"),
    [
        ("dtype", "the policy is torch.float32 and the reference torch.bfloat16, load both in one dtype"),
        ("attention", "their attn_implementation is sdpa and eager, load both with one"),
        ("full_eval", "bf16_full_eval=True rounds the weights of the policy alone, leave it out"),
    ],
)
def test_another_rounding_by_choice_is_said(tmp_path, difference, reason, caplog):
    settings = {"bf16_full_eval": True} if difference == "full_eval" else {}
    trainer = equal_trainer(DPOTrainer, tmp_path, **settings)
    if difference == "dtype":
        trainer.ref_model.to(torch.bfloat16)
    elif difference == "attention":
        trainer.ref_model.set_attn_implementation("eager")
    fuse(trainer)
    (message,) = said(caplog)
    assert message == f"Equal weights of policy and reference would not give a log-ratio of 0: {reason}."


# ---- the answers to TRL's own calls -------------------------------------------------------------------------------


def batch() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(4)
    input_ids = torch.randint(3, VOCAB, (3, 9), generator=random)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :3] = -100
    labels[2] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@pytest.mark.parametrize("make_policy", ["llama", "experts"])
@pytest.mark.parametrize("layout", ["labels", "shift_labels", "num_items_in_batch"])
def test_every_field_of_trls_output_is_answered(tmp_path, make_policy, layout):
    policy = model(experts=make_policy == "experts")
    trainer = make_trainer(DPOTrainer, tmp_path, policy=policy)
    inputs = batch()
    if layout == "shift_labels":
        inputs["shift_labels"] = inputs.pop("labels").roll(-1, 1)
    elif layout == "num_items_in_batch":
        inputs["num_items_in_batch"] = torch.tensor(7)

    def answers():
        policy.zero_grad()
        output = policy(**inputs, fused_lm_head=True)
        weights = torch.randn(output.log_probs.shape, generator=torch.Generator().manual_seed(5))
        (output.loss + (weights * output.log_probs).sum()).backward()
        return output, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    own, own_grads = answers()
    fuse(trainer)
    output, grads = answers()
    assert list(output) == [*own, "outcome"]
    for name in own:
        torch.testing.assert_close(output[name], own[name], rtol=2e-5, atol=5e-6)
        assert output[name].requires_grad == own[name].requires_grad, name
    assert grads.keys() == own_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, own_grads[name], rtol=1e-4, atol=1e-5)


def test_a_gradient_by_the_entropy_is_an_error_not_zero(tmp_path):
    trainer = fuse(make_trainer(DPOTrainer, tmp_path))
    output = trainer.model(**batch(), fused_lm_head=True)
    with pytest.raises(RuntimeError, match="entropy of a fused trainer has no gradient"):
        (output.log_probs.sum() + output.entropy.sum()).backward()


def test_without_the_fused_head_the_model_is_what_it_was(tmp_path):
    policy, inputs = model(), batch()
    own_logits = policy(**inputs).logits
    trainer = fuse(make_trainer(DPOTrainer, tmp_path, policy=policy))
    assert torch.equal(trainer.model(**inputs).logits, own_logits)
    assert trainer.model.generate(inputs["input_ids"], max_new_tokens=2, pad_token_id=1).shape == (3, 11)


# ---- costs --------------------------------------------------------------------------------------------------------


def lm_head_gemms(folder: Path, kind: type, **arguments) -> float:
    """GEMMs of 2 N H V operations for a policy's forward and backward: what grows with V."""
    operations = []
    for vocab in (VOCAB, 2 * VOCAB):
        policy = model(vocab=vocab)
        trainer = fuse(make_trainer(kind, folder, policy=policy, precompute_ref_log_probs=True, **arguments))
        trainer.model.train()
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        with FlopCounterMode(display=False) as counter:
            trainer.compute_loss(trainer.model, inputs).backward()
        operations.append(counter.get_total_flops())
    tokens = int(inputs["completion_mask"][:, 1:].sum())
    return (operations[1] - operations[0]) / (2 * tokens * HIDDEN * VOCAB)


def test_the_whole_loss_takes_three_gemms_log_probabilities_four(tmp_path):
    assert lm_head_gemms(tmp_path, KTOTrainer, loss_type="apo_zero_unpaired") == 3
    assert lm_head_gemms(tmp_path, DPOTrainer) == 3
    assert lm_head_gemms(tmp_path, DPOTrainer, loss_type=["nca_pair"]) == 4
    assert lm_head_gemms(tmp_path, DPOTrainer, own_reference=False, lora=True) == 2


class HostReads(TorchFunctionMode):
    """Counts what makes the host wait for a device."""

    READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "cpu", "numpy")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in self.READS
        return function(*args, **(kwargs or {}))


@both_trainers
def test_all_logged_values_are_read_at_once(tmp_path, kind, monkeypatch):
    settings = {"loss_type": "apo_zero_unpaired"} if kind is KTOTrainer else {}
    trainer = fuse(make_trainer(kind, tmp_path, precompute_ref_log_probs=True, **settings))
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    counts = []
    for log in (dropin._log, lambda trainer, batch, loss, metrics, aux_loss: loss):
        monkeypatch.setattr(dropin, "_log", log)
        with HostReads() as reads:
            trainer.compute_loss(trainer.model, inputs)
        counts.append(reads.count)
    assert counts[0] == counts[1] + 1


@both_trainers
def test_with_a_router_loss_policy_and_reference_both_get_the_mask(tmp_path, kind, attention_masks):
    """The router loss needs it. Without it, the reference would run another attention kernel than the policy."""

    def make_policy():
        policy = experts()
        policy.config.output_router_logits = False  # TRL asks for them by an argument, of the policy alone
        return policy

    trainer = fuse(equal_trainer(kind, tmp_path, make_policy=make_policy, router_aux_loss_coef=0.1))
    attention_masks.clear()  # of the checks that came before
    _, logs, _ = steps(trainer)
    assert logs[0]["aux_loss"] > 0
    assert attention_masks
    assert all(mask is not None for mask in attention_masks)
    assert_no_log_ratio(logs[0])


@both_trainers
@pytest.mark.parametrize("batches", ["trls", "of another collator", "of a patched collator", *dropin.MAKES_BATCHES])
def test_attention_gets_no_mask_for_the_padding_of_trls_collators(tmp_path, kind, batches, attention_masks):
    subclass = None
    if batches in dropin.MAKES_BATCHES:  # a method of one's own may pad on the left
        subclass = type("MyTrainer", (kind,), {batches: lambda self, *args: getattr(kind, batches)(self, *args)})
    trainer = fuse(make_trainer(kind, tmp_path, max_steps=1, subclass=subclass))
    collator = trainer.data_collator
    if batches == "of another collator":  # which may pad on the left

        class Collator(type(collator)):
            pass

        trainer.data_collator = Collator(collator.pad_token_id)
    elif batches == "of a patched collator":
        collator.torch_call = type(collator).torch_call.__get__(collator)
    batch = next(iter(trainer.get_train_dataloader()))
    assert not batch["attention_mask"].all()
    attention_masks.clear()  # of the checks that came before
    trainer.train()
    assert attention_masks
    assert all((mask is None) == (batches == "trls") for mask in attention_masks)


# ---- what is not taken over, and errors ---------------------------------------------------------------------------


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == dropin.__name__]


@both_trainers
@pytest.mark.parametrize("method", ["_compute_loss", "compute_loss"])
def test_a_loss_of_ones_own_gets_fused_log_probabilities(tmp_path, kind, method, calls, caplog):
    def doubled(self, *args, **kwargs):
        return 2 * getattr(kind, method)(self, *args, **kwargs)

    subclass = type("MyTrainer", (kind,), {method: doubled})
    assert_same_training(kind, tmp_path, subclass=subclass)
    assert calls["linear_token_logps"] > 0
    assert not calls["fused_linear_kto_loss"] + calls["fused_linear_dpo_loss"]
    (message,) = said(caplog)
    assert f"MyTrainer.{method} is not {kind.__name__}'s" in message


def test_settings_changed_later_are_followed(tmp_path, calls):
    trainer = fuse(make_trainer(DPOTrainer, tmp_path, max_steps=1))
    trainer.ld_alpha = 0.5
    steps(trainer)
    only(calls, linear_token_logps=2)


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("beta", 0.0, "beta=0.0 is not positive"),
        ("label_smoothing", 0.5, "label_smoothing=0.5 lies outside"),
        ("undesirable_weight", -1.0, "a class weight is negative"),
    ],
)
def test_what_stays_trls_is_named(tmp_path, attribute, value, reason, caplog):
    kind = KTOTrainer if attribute == "undesirable_weight" else DPOTrainer
    settings = {"loss_type": ["robust"], "label_smoothing": 0.1} if attribute == "label_smoothing" else {}
    trainer = make_trainer(kind, tmp_path, **settings)
    setattr(trainer, attribute, value)
    fuse(trainer)
    (message,) = said(caplog)
    assert reason in message
    assert "_compute_loss" not in vars(trainer)


@pytest.mark.parametrize(
    ("reason", "changed"),
    [
        ("DeepSpeed ZeRO-3", {"is_deepspeed_enabled": True, "deepspeed_plugin": SimpleNamespace(zero_stage=3)}),
        ("FSDP1", {"is_fsdp_enabled": True, "fsdp_plugin": SimpleNamespace(fsdp_version=1)}),
        ("parallelism", {"parallelism_config": ParallelismConfig(tp_size=2)}),
        ("parallelism", {"parallelism_config": ParallelismConfig(cp_size=2)}),
        ("vision-language", {"_is_vlm": True}),
        ("MPS", {"device": torch.device("mps")}),
    ],
)
def test_what_cannot_be_fused_is_left_alone(tmp_path, reason, changed, caplog):
    trainer = make_trainer(DPOTrainer, tmp_path)
    before = snapshot(trainer)
    plugins = {name: changed.get(name) for name in ("deepspeed_plugin", "fsdp_plugin")}
    trainer.accelerator = SimpleNamespace(
        state=SimpleNamespace(**plugins),
        parallelism_config=changed.get("parallelism_config"),
        device=changed.get("device", torch.device("cpu")),
    )
    for name in ("is_deepspeed_enabled", "is_fsdp_enabled", "_is_vlm"):
        setattr(trainer, name, changed.get(name, False))
    assert fuse(trainer) is trainer
    assert snapshot(trainer) == before
    (message,) = said(caplog)
    assert message.startswith("TRL computes everything as before")
    assert reason in message


def test_fusing_again_changes_nothing(tmp_path):
    trainer = make_trainer(DPOTrainer, tmp_path)
    assert fuse(trainer) is trainer
    before = snapshot(trainer)
    assert fuse(trainer) is trainer
    assert snapshot(trainer) == before


def test_two_trainers_may_share_a_model(tmp_path, calls):
    """TRL patches it again for the second, over what the first one's fuse did."""
    policy = model()
    steps(fuse(make_trainer(KTOTrainer, tmp_path, policy=policy)))
    calls.update(dict.fromkeys(calls, 0))
    steps(fuse(make_trainer(DPOTrainer, tmp_path, policy=policy)))
    only(calls, fused_linear_dpo_loss=STEPS, linear_sequence_logps=STEPS)


def test_a_deep_copy_calls_a_loss_at_its_own_head(tmp_path):
    policy, inputs = model(), batch()
    fuse(make_trainer(DPOTrainer, tmp_path, policy=policy))
    copied = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    labels = {"labels": inputs["input_ids"]}
    expected = huggingface.apply(linear_sequence_logps, model(), inputs, **labels)
    assert torch.equal(huggingface.apply(linear_sequence_logps, copied, inputs, **labels), expected)


def snapshot(trainer) -> dict[str, object]:
    found = {"loss": vars(trainer).get("_compute_loss"), "fused": vars(trainer).get("_is_fused")}
    for name, one in (("policy", trainer.model), ("reference", trainer.ref_model)):
        if one is None:
            continue
        for module_name, module in one.named_modules():
            for attribute in ("forward", "_original_forward", "_unfused_forward"):
                found[f"{name}.{module_name}.{attribute}"] = module.__dict__.get(attribute)
    return found


PROMPT_LEARNING = {
    "PROMPT_TUNING": lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P_TUNING": lambda peft: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8
    ),
    "PREFIX_TUNING": lambda peft: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (KTOTrainer, "PROMPT_TUNING"),
        (DPOTrainer, "P_TUNING"),
        (DPOTrainer, "PREFIX_TUNING"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in ((DPOTrainer, "PROMPT_TUNING"), (KTOTrainer, "P_TUNING"), (KTOTrainer, "PREFIX_TUNING"))
        ),
    ],
)
def test_learned_prompts_train_as_in_trl(tmp_path, kind, method, calls, caplog):
    config = PROMPT_LEARNING[method](pytest.importorskip("peft"))
    runs = []
    for wrap in (lambda trainer: trainer, fuse):
        trainer = make_trainer(
            kind, tmp_path, own_reference=False, peft_config=config, precompute_ref_log_probs=kind is KTOTrainer
        )
        before, values = snapshot(trainer), precomputed(trainer)
        assert snapshot(wrap(trainer)) == before
        assert precomputed(trainer) == values
        runs.append(steps(trainer))
    assert runs[1][1] == runs[0][1]
    assert {name for name, count in calls.items() if count} == {"own"}
    (message,) = said(caplog)
    assert message.startswith("TRL computes everything as before: the policy cannot be fused, model learns prompts")
    assert method in message
    assert "use LoRA" in message


class OtherHead(torch.nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden) * 2


class RolledLlama(LlamaForCausalLM):
    """Its logits are not what its head gives."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits.roll(1, -1)
        return outputs


def rolled():
    return RolledLlama(model().config)


def replace_head(refused) -> None:
    refused.lm_head = OtherHead(HIDDEN, VOCAB, bias=False)


def quantise_head(refused) -> None:
    refused.lm_head.weight = torch.nn.Parameter(refused.lm_head.weight.to(torch.int8), requires_grad=False)


def place_head(refused) -> None:
    add_hook_to_module(refused.lm_head, AlignDevicesHook("cpu"))  # as a device_map does


def hook_head(refused) -> None:
    refused.lm_head.register_forward_hook(lambda head, inputs, output: 2 * output)


def put_adapter_on_head(refused) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["lm_head"])
    peft.inject_adapter_in_model(settings, refused)


def spoil_weights(refused) -> None:
    with torch.no_grad():
        refused.lm_head.weight[0, 0] = torch.nan


def make_encoder_decoder(refused) -> None:
    refused.config.is_encoder_decoder = True


def drop_return_dict(refused) -> None:
    refused.config.return_dict = False


def break_backbone(refused) -> None:
    def fails(*args, **kwargs):
        raise RuntimeError("no kernel for this device")

    refused.model.forward = fails


REFUSALS = {
    replace_head: "LM head is a OtherHead",
    quantise_head: "LM head is quantised to torch.int8",
    place_head: "has a forward of its own .* put the whole model on one device",
    hook_head: "the .* cannot be fused",
    put_adapter_on_head: "LM head carries an adapter",
    spoil_weights: "logits are not finite",
    make_encoder_decoder: "no causal language model with an LM head",
    drop_return_dict: "return_dict is False",
    break_backbone: "checking it failed with RuntimeError: no kernel for this device",
}


@pytest.mark.parametrize(
    ("change", "refused", "bf16"),
    [
        *((change, "model", False) for change in REFUSALS),
        (replace_head, "ref_model", False),
        (replace_head, "ref_model", True),  # the reference then has autocast around it
        (replace_head, "model", True),
        *(
            pytest.param(change, "ref_model", False, marks=pytest.mark.full)
            for change in REFUSALS
            if change != replace_head
        ),
    ],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else f"bf16={value}"),
)
def test_a_model_that_cannot_be_fused_stays_trls(tmp_path, refused, bf16, change, caplog):
    trainer = make_trainer(DPOTrainer, tmp_path, bf16=bf16)
    change(getattr(trainer, refused))
    before = snapshot(trainer)
    assert fuse(trainer) is trainer
    assert snapshot(trainer) == before
    (message,) = said(caplog)
    role = "policy" if refused == "model" else "reference"
    assert message.startswith(f"TRL computes everything as before: the {role} cannot be fused, ")
    assert re.search(REFUSALS[change], message)


def test_a_model_whose_logits_are_not_its_heads_trains_as_in_trl(tmp_path, caplog):
    runs = []
    for wrap in (lambda trainer: trainer, fuse):
        torch.manual_seed(0)
        runs.append(steps(wrap(make_trainer(DPOTrainer, tmp_path, make_policy=rolled, max_steps=1))))
    assert runs[1][1] == runs[0][1]
    (message,) = said(caplog)
    assert "logits differ" in message


def test_another_version_of_trl_is_refused(tmp_path, monkeypatch):
    trainer = make_trainer(DPOTrainer, tmp_path)
    before = snapshot(trainer)
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ImportError, match=r"knows TRL 1\.16\.\*, found TRL 1\.17\.0"):
        fuse(trainer)
    assert snapshot(trainer) == before


def test_another_trainer_is_refused():
    with pytest.raises(TypeError, match=r"trainer must be a trl\.KTOTrainer or trl\.DPOTrainer, got object"):
        fuse(object())


# ---- two processes ------------------------------------------------------------------------------------------------


def two_processes(rank: int, folder: Path, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", RANK=str(rank))
    os.environ.update(LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    gc.freeze()
    for kind, settings in ((KTOTrainer, {}), (DPOTrainer, {"loss_type": ["ipo"]})):
        # one row is left for the last batch, of which TRL gathers but one rank's values
        rows = data(kind, rows=2 * BATCH + 1)
        logs = assert_same_training(
            kind, folder / f"{rank}", train_dataset=rows, num_train_epochs=1, max_steps=-1, **settings
        )
        assert len(logs) == 3
        assert kind is DPOTrainer or logs[0]["kl"] > 0
    check_fsdp2_rounds_no_log_probability(folder / f"{rank}")
    check_precomputed_references(rank, folder)
    gc.collect()  # trainers hold the process group, whose threads should end before the interpreter does
    torch.distributed.destroy_process_group()


def check_precomputed_references(rank: int, folder: Path) -> None:
    """Both processes share TRL's cache file, which lies beside the data."""
    for kind in (KTOTrainer, DPOTrainer):
        if rank == 0:
            long_data(kind, rows=2 * BATCH).save_to_disk(folder / kind.__name__)
        torch.distributed.barrier()
        trainer = fuse(
            equal_trainer(
                kind,
                folder / f"{rank}",
                own_reference=False,
                precompute_ref_log_probs=True,
                train_dataset=Dataset.load_from_disk(folder / kind.__name__),
            )
        )
        assert vars(trainer)["_is_fused"]
        evaluated = trainer.evaluate(Dataset.load_from_disk(folder / kind.__name__))
        _, logs, _ = steps(trainer)
        assert_no_log_ratio(evaluated, "eval_")
        assert_no_log_ratio(logs[0])


def check_fsdp2_rounds_no_log_probability(folder: Path) -> None:
    """Not even those that go to losses of TRL's own."""
    fused = fuse(make_trainer(DPOTrainer, folder)).model
    whole, weight = fused(**batch(), fused_lm_head=True), fused.model.layers[0].mlp.up_proj.weight
    (expected_grad,) = torch.autograd.grad(whole.log_probs.sum(), weight)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard([*fused.model.layers], mesh=mesh)
    fully_shard(fused, mesh=mesh, mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16))
    output = fused(**batch(), fused_lm_head=True)
    assert output.loss.dtype == torch.bfloat16  # which nothing reads
    for name in ("log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(output[name], whole[name])
    output.log_probs.sum().backward()
    grad = fused.model.layers[0].mlp.up_proj.weight.grad.full_tensor()
    torch.testing.assert_close(grad, expected_grad)


def test_two_processes_log_alike(tmp_path):
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    torch.multiprocessing.spawn(two_processes, (tmp_path, port), nprocs=2)
