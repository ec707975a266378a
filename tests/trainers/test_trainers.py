"""The trainers against plain loops: steps, accumulation, precision, evaluation, resuming, references, errors."""

# ruff: noqa: E402 (where a library is missing, its absence comes before the imports that need it)

import copy
import logging
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import HAS_GPU
from torch.utils._python_dispatch import TorchDispatchMode

datasets = pytest.importorskip("datasets", reason="datasets is not installed: the trainers need it")
pytest.importorskip("accelerate", reason="accelerate is not installed: the trainers need it")

from safetensors.torch import save_file
from tiny_training import (
    CONFIGS,
    WORDS,
    StopAt,
    assert_near,
    data,
    history,
    make_trainer,
    model,
    tokenizer,
    weights,
)
from transformers import (
    BertConfig,
    BertLMHeadModel,
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from kto_fused import preference_data, reference
from kto_fused.heads.preference import DPO_LOSS_TYPES
from kto_fused.huggingface import UnsupportedModelError
from kto_fused.huggingface.config import without_padding_mask
from kto_fused.metrics import LossMetrics, Totals
from kto_fused.preference_data import IGNORE_INDEX, DataError
from kto_fused.trainers import FusedDPOTrainer, FusedKTOTrainer, FusedTrainer, reference_cache
from kto_fused.trainers import base as trainer_base
from kto_fused.trainers.configs import AT_LEAST

KINDS = ["kto", "dpo"]
RUN = {"loss", "grad_norm", "learning_rate", "num_tokens", "epoch", "step"}
SIDES = {f"{value}/{side}" for value in ("rewards", "logps", "logits") for side in ("chosen", "rejected")}
LOGGED = {
    "kto": SIDES | {"rewards/margins", "kl", "entropy"},
    "dpo": SIDES | {"rewards/margins", "rewards/accuracies", "mean_token_accuracy", "entropy"},
}
SMOOTHED = {"sigmoid": 0.1, "robust": 0.2, "simpo": 0.1}
by_kind = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.usefixtures("small_machine")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# ---- the plain loop ----


def plain_reference_point(policy, ref, batch, args):
    if args.reference_point != "mismatched":
        return args.reference_point

    def logps(model):
        logits = model(input_ids=batch["kl_input_ids"], attention_mask=batch["kl_attention_mask"]).logits
        return reference.sequence_logps(logits, batch["kl_labels"], average_log_prob=args.average_log_prob)

    has_partner = (batch["kl_labels"] != IGNORE_INDEX).any(1)
    with torch.no_grad():
        return (logps(policy) - logps(ref))[has_partner].mean().clamp(min=0)


def plain_kto(policy, ref, batch, args):
    model_inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ref_logits = ref(**model_inputs).logits
    return reference.kto_loss(
        policy(**model_inputs).logits,
        batch["labels"],
        batch["desirable"],
        ref_logits=ref_logits,
        reference_point="batch_mean"
        if args.loss_type == "apo_zero_unpaired"
        else plain_reference_point(policy, ref, batch, args),
        beta=args.beta,
        desirable_weight=args.desirable_weight,
        undesirable_weight=args.undesirable_weight,
        loss_type=args.loss_type,
        average_log_prob=args.average_log_prob,
    )


def plain_dpo(policy, ref, batch, args):
    chosen_then_rejected = {name: torch.cat([values[:, 0], values[:, 1]]) for name, values in batch.items()}
    labels = chosen_then_rejected.pop("labels")
    ref_logits = None
    if ref is not None:
        with torch.no_grad():
            ref_logits = ref(**chosen_then_rejected).logits
    return reference.dpo_loss(
        policy(**chosen_then_rejected).logits,
        labels,
        ref_logits=ref_logits,
        beta=args.beta,
        loss_type=args.loss_type,
        label_smoothing=args.label_smoothing,
        gamma=args.gamma,
    )


PLAIN = {"kto": plain_kto, "dpo": plain_dpo}


def in_order(trainer, rows, batch_size):
    """The batches of a sequential sampler."""
    for start in range(0, len(rows), batch_size):
        yield trainer.data_collator([rows[row] for row in range(start, min(start + batch_size, len(rows)))])


def plain_training(kind, policy, ref, trainer):
    """(log history, policy) of a loop by hand, in float64."""
    policy, args = copy.deepcopy(policy).double(), trainer.args
    ref = None if ref is None else copy.deepcopy(ref).double()
    optimizer = torch.optim.SGD(policy.parameters(), lr=args.learning_rate)
    entries, num_tokens = [], 0
    for batch in in_order(trainer, trainer.train_dataset, args.per_device_train_batch_size):
        optimizer.zero_grad()
        loss, metrics = PLAIN[kind](policy, ref, batch, args)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        optimizer.step()
        num_tokens += int(batch["attention_mask"].sum())
        entries.append({"loss": loss.detach(), "grad_norm": grad_norm, "num_tokens": num_tokens, **metrics.summary()})
    return [{name: float(value) for name, value in entry.items()} for entry in entries], policy


def check_against_plain_training(kind, folder, **settings):
    policy = model()
    ref = model(seed=1) if settings.get("loss_type") != "simpo" else None
    trainer = make_trainer(
        kind,
        folder,
        policy=copy.deepcopy(policy),
        ref_model=copy.deepcopy(ref),
        train=11,
        train_sampling_strategy="sequential",
        **settings,
    )
    expected, trained = plain_training(kind, policy, ref, trainer)
    trainer.train()
    assert len(expected) == 3
    assert_near(history(trainer), expected)
    assert_same_steps(weights(trainer), trained.state_dict(), policy.state_dict())
    return trainer, expected


def assert_same_steps(actual, expected, start, tolerance=1e-4):
    """The same way from ``start``, relative to its length, and to the rounding of what it ends at."""
    for name, target in expected.items():
        way, rounding = target.double() - start[name], 2e-7 * target.norm()
        assert way.norm() > 100 * rounding, f"{name} has not moved"
        error = (actual[name].double() - target).norm()
        assert error <= tolerance * way.norm() + rounding, f"{name}: {error:.1e} of {way.norm():.1e}"


@pytest.mark.parametrize("loss_from", ["hidden", "logits"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reference_point": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5},
        {"reference_point": "batch_mean"},
        {"loss_type": "kto_squared", "beta": 0.5},
        {"loss_type": "apo_zero_unpaired"},
        {"average_log_prob": True, "beta": 1.0},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "mismatched",
)
def test_kto_trains_as_a_plain_loop(tmp_path, settings, loss_from):
    trainer, expected = check_against_plain_training("kto", tmp_path, loss_from=loss_from, **settings)
    if trainer.args.needs_mismatched:
        assert any(entry["kl"] > 0.05 for entry in expected), "z0 was cut off at 0 throughout"


@pytest.mark.parametrize("loss_from", ["hidden", "logits"])
@pytest.mark.parametrize("loss_type", DPO_LOSS_TYPES)
def test_dpo_trains_as_a_plain_loop(tmp_path, loss_type, loss_from):
    check_against_plain_training(
        "dpo", tmp_path, loss_type=loss_type, loss_from=loss_from, label_smoothing=SMOOTHED.get(loss_type, 0.0)
    )


def spied(function: Callable, calls: list[dict[str, Any]], **replaced: Any) -> Callable:
    """``function``, whose named arguments are kept in ``calls``."""

    def spying(*args, **named):
        calls.append(named)
        return function(*args, **{**named, **replaced})

    return spying


OF_ANY_LOSS = {"beta": 0.3, "backend": "torch"}
OF_KTO = {"desirable_weight": 1.5, "undesirable_weight": 0.5, "reference_point": 0.2, "average_log_prob": True}
OF_DPO = {"loss_type": "simpo", "label_smoothing": 0.1, "gamma": 0.7}


@pytest.mark.parametrize("loss_from", ["hidden", "logits"])
@pytest.mark.parametrize(
    ("kind", "options"), [("kto", {"loss_type": "kto_squared", **OF_KTO}), ("dpo", OF_DPO)], ids=KINDS
)
def test_every_option_of_a_loss_reaches_it(tmp_path, kind, options, loss_from, monkeypatch):
    options = {**OF_ANY_LOSS, **options, **({"chunk_bytes": 2**20} if loss_from == "hidden" else {})}
    of_engine = {"inplace_backward": True} if loss_from == "logits" else {}
    calls = []
    trainer = make_trainer(kind, tmp_path, train=4, loss_from=loss_from, **options)
    monkeypatch.setattr(trainer, "loss_functions", [spied(function, calls) for function in trainer.loss_functions])
    trainer.train()
    assert len(calls) == 1
    assert {**options, **of_engine}.items() <= calls[0].items()


@by_kind
def test_logits_without_a_backward_are_not_written_over(tmp_path, kind, monkeypatch):
    """A reference's may be no memory of their own."""
    of_loss, of_logps = [], []
    trainer = make_trainer(kind, tmp_path, ref_model=model(seed=1), train=4, evaluation=4, loss_from="logits")
    for name, calls in (("loss_functions", of_loss), ("logps_functions", of_logps)):
        monkeypatch.setattr(trainer, name, [spied(function, calls) for function in getattr(trainer, name)])
    trainer.train()
    trainer.evaluate()
    assert [call["inplace_backward"] for call in of_loss] == [True, False]
    assert {call["inplace_backward"] for call in of_logps} == {False}


@pytest.mark.parametrize(("kind", "prepare"), [("kto", "prepare_unpaired"), ("dpo", "prepare_paired")])
def test_what_the_data_are_prepared_by_reaches_them(tmp_path, kind, prepare, monkeypatch):
    calls = []
    monkeypatch.setattr(preference_data, prepare, spied(getattr(preference_data, prepare), calls, num_proc=None))
    make_trainer(kind, tmp_path, train=4, dataset_num_proc=3, max_length=12, seed=5)
    expected = {"max_length": 12, "num_proc": 3, **({"seed": 5, "mismatch": True} if kind == "kto" else {})}
    assert len(calls) == 1
    assert expected.items() <= calls[0].items()


def test_adapters_from_a_path_leave_it_its_own_dtype_and_are_float32(tmp_path):
    model().bfloat16().save_pretrained(tmp_path / "model")
    whole = make_trainer("kto", tmp_path, policy=str(tmp_path / "model"), evaluation=2)
    assert {weight.dtype for weight in whole.model.parameters()} == {torch.float32}
    adapted = make_trainer("kto", tmp_path, policy=str(tmp_path / "model"), peft_config=lora_config())
    dtypes = {weight.requires_grad: weight.dtype for weight in adapted.model.parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}


@by_kind
def test_attention_gets_no_mask_for_padding(tmp_path, kind, attention_masks):
    trainer = make_trainer(kind, tmp_path, ref_model=model(seed=1))
    batch = next(iter(trainer.get_train_dataloader()))
    assert not batch["attention_mask"].all()
    attention_masks.clear()  # of the checks that came before
    trainer.train()
    assert set(attention_masks) == {None}


@pytest.mark.parametrize(("options", "expected"), [({}, "no"), ({"bf16": True}, "bf16")])
def test_the_mask_is_left_out_by_what_attention_computes_in(tmp_path, options, expected, monkeypatch):
    seen, leave_out = [], without_padding_mask

    def seen_precision(model, inputs, mixed_precision):
        seen.append(mixed_precision)
        return leave_out(model, inputs, mixed_precision)

    trainer = make_trainer("kto", tmp_path, **options)
    monkeypatch.setattr(trainer_base, "without_padding_mask", seen_precision)
    trainer.train()
    assert set(seen) == {expected}


# ---- accumulation ----


@pytest.mark.parametrize("rows", [24, 22, 19, 17], ids=lambda rows: f"{rows}_rows")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("kto", {}), ("kto", {"loss_from": "logits"}), ("dpo", {}), ("dpo", {"loss_type": "ipo"})],
    ids=["kto", "kto-logits", "dpo", "ipo"],
)
def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path, kind, settings, rows):
    """The last step's are whole (24 rows), end with a part (22), are fewer and a part (19), or a single row (17)."""
    runs = {}
    for size, number in ((8, 1), (4, 2), (2, 4)):
        trainer = make_trainer(
            kind,
            tmp_path,
            ref_model=model(seed=1),
            train=rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=number,
            **settings,
        )
        trainer.train()
        runs[number] = trainer
    for number in (2, 4):
        assert_near(history(runs[number]), history(runs[1]), but=("epoch",))
        assert_same_steps(weights(runs[number]), weights(runs[1]), model().state_dict())
    assert len(history(runs[1])) == 3


# ---- precision, checkpointing, clipping, compiling ----


@by_kind
@pytest.mark.parametrize("loss_from", ["hidden", "logits"])
def test_bf16_autocast_stays_near_float32(tmp_path, kind, loss_from):
    runs = {}
    for bf16 in (False, True):
        trainer = make_trainer(kind, tmp_path, ref_model=model(seed=1), bf16=bf16, loss_from=loss_from)
        trainer.train()
        runs[bf16] = trainer
        assert trainer.model.dtype == torch.float32
    near, exact = history(runs[True]), history(runs[False])
    assert_near(near, exact, tolerance=5e-2)
    assert near[0]["loss"] != exact[0]["loss"]


@by_kind
def test_a_model_in_bf16_stays_near_float32(tmp_path, kind):
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        policy, ref = model().to(dtype), model(seed=1).to(dtype)
        trainer = make_trainer(kind, tmp_path, policy=policy, ref_model=ref)
        trainer.train()
        runs[dtype] = history(trainer)
        assert trainer.model.dtype == dtype
    assert_near(runs[torch.bfloat16], runs[torch.float32], tolerance=8e-2)
    assert runs[torch.bfloat16][0]["loss"] != runs[torch.float32][0]["loss"]


@pytest.mark.skipif(not HAS_GPU, reason="fp16 needs a GPU")
@by_kind
def test_fp16_starts_near_float32_and_stays_finite(tmp_path, kind):
    """Later steps may be left out until the gradients' scale fits."""
    runs = {}
    for fp16 in (False, True):
        trainer = make_trainer(kind, tmp_path, ref_model=model(seed=1), fp16=fp16, use_cpu=False, num_train_epochs=8)
        trainer.train()
        runs[fp16] = history(trainer)
    assert_near(runs[True][:1], runs[False][:1], tolerance=1e-2, but=("grad_norm",))
    assert all(math.isfinite(entry["loss"]) for entry in runs[True])
    assert runs[True][-1]["loss"] < runs[True][0]["loss"]


@by_kind
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_before_the_first_step_policy_and_reference_agree_to_the_bit(tmp_path, kind, bf16):
    """In training, and in an evaluation before it, whatever the precision."""
    trainer = make_trainer(kind, tmp_path, evaluation=5, bf16=bf16)
    evaluated = trainer.evaluate()
    assert evaluated["eval_rewards/chosen"] == evaluated["eval_rewards/rejected"] == 0
    trainer.train()
    first, second, *_ = history(trainer)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert second["rewards/chosen"] != 0
    never_evaluated = make_trainer(kind, tmp_path, bf16=bf16)
    never_evaluated.train()
    assert history(trainer) == history(never_evaluated)


class Forwards:
    """Counts the calls of a module."""

    def __init__(self, module: torch.nn.Module):
        self.count = 0
        module.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.count += 1


@by_kind
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_checkpointed_layers_run_twice_and_change_nothing(tmp_path, kind, lora):
    runs, forwards = {}, {}
    for reentrant in (None, False, True):
        policy = model()
        forwards[reentrant] = Forwards(policy.model.layers[0].mlp)
        trainer = make_trainer(
            kind,
            tmp_path,
            policy=policy,
            ref_model=model(seed=1),
            peft_config=lora_config() if lora else None,
            gradient_checkpointing=reentrant is not None,
            gradient_checkpointing_kwargs=None if reentrant is None else {"use_reentrant": reentrant},
        )
        start = weights(trainer)
        trainer.train()
        runs[reentrant] = trainer
    steps = runs[None].state.global_step
    for reentrant in (False, True):
        assert forwards[reentrant].count == forwards[None].count + steps
        assert history(runs[reentrant]) == history(runs[None])
        for name, tensor in weights(runs[reentrant]).items():
            assert tensor.equal(weights(runs[None])[name]), name
    trained = [name for name, tensor in weights(runs[None]).items() if not tensor.equal(start[name])]
    assert trained
    assert all("lora_" in name for name in trained) == lora


def lora_config(**options):
    """Adapters that are not zero at the start."""
    peft = pytest.importorskip("peft", reason="peft is not installed: no adapters")
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options})


def distance(one, other):
    return torch.stack([(one[name].double() - other[name]).norm() for name in one]).norm().item()


@by_kind
def test_max_grad_norm_clips_the_gradient_of_the_whole_step(tmp_path, kind):
    ways = {}
    for limit in (0.0, 0.01):
        trainer = make_trainer(
            kind,
            tmp_path,
            ref_model=model(seed=1),
            train=8,
            gradient_accumulation_steps=2,
            max_grad_norm=limit,
        )
        trainer.train()
        (entry,) = history(trainer)
        ways[limit] = distance(weights(trainer), model().state_dict()), entry["grad_norm"]
    assert ways[0.0][1] == pytest.approx(ways[0.01][1], rel=1e-6)
    assert ways[0.0][0] == pytest.approx(0.5 * ways[0.0][1], rel=1e-4)
    assert ways[0.01][0] == pytest.approx(0.5 * 0.01, rel=1e-3)


@by_kind
def test_trains_compiled(tmp_path, kind):
    """Forward and backward traced, and run by PyTorch's own operators: compiling them takes a minute or two."""
    torch.use_deterministic_algorithms(False)  # which torch.compile guards on
    runs = {}
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch._dynamo.reset()
        trainer = make_trainer(
            kind,
            tmp_path,
            policy=model(num_hidden_layers=1),
            ref_model=model(seed=1, num_hidden_layers=1),
            train=8,
            pad_to_multiple_of=32,  # one shape, traced once
            **settings,
        )
        trainer.train()
        runs[len(settings) > 0] = trainer
    assert_near(history(runs[True]), history(runs[False]))
    assert hasattr(runs[True].model_wrapped, "_orig_mod")
    assert not hasattr(runs[False].model_wrapped, "_orig_mod")


# ---- evaluation ----


def plain_evaluation(kind, policy, ref, trainer, rows, batch_size):
    """Loss and metrics of a whole dataset: KTO's z0 is a batch's, everything else a mean over sequences or tokens."""
    totals = Totals()
    with torch.no_grad():
        for batch in in_order(trainer, rows, batch_size):
            loss, metrics = PLAIN[kind](policy, ref, batch, trainer.args)
            size = torch.tensor(len(batch["input_ids"]), dtype=torch.float64)
            totals.add(metrics.totals() | {"loss": (loss * size, size)})
    return {f"eval_{name}": value for name, value in totals.pop().items()}


@by_kind
@pytest.mark.parametrize("loss_from", ["hidden", "logits"])
def test_evaluation_is_that_of_the_whole_dataset(tmp_path, kind, loss_from):
    """9 rows in batches of 4: the last one weighs a quarter."""
    policy, ref = model(), model(seed=1)
    trainer = make_trainer(
        kind,
        tmp_path,
        policy=policy,
        ref_model=ref,
        evaluation=9,
        loss_from=loss_from,
        train_sampling_strategy="sequential",
    )
    expected = plain_evaluation(kind, policy, ref, trainer, trainer.eval_dataset, batch_size=4)
    assert {f"eval_{name}" for name in LOGGED[kind] | {"loss"}} == expected.keys()
    assert_near([trainer.evaluate()], [expected])


def test_batches_of_evaluation_change_nothing_where_z0_is_given(tmp_path):
    for kind, settings in (("kto", {"reference_point": 0.2}), ("dpo", {})):
        evaluated = [
            make_trainer(
                kind, tmp_path, ref_model=model(seed=1), evaluation=9, per_device_eval_batch_size=size, **settings
            ).evaluate()
            for size in (2, 9)
        ]
        names = [f"eval_{name}" for name in LOGGED[kind] | {"loss"}]
        assert_near(evaluated[:1], [{name: evaluated[1][name] for name in names}])


@by_kind
def test_several_evaluation_sets_are_reported_by_name(tmp_path, kind):
    sets = {"few": data(kind, 5, seed=3), "more": data(kind, 9, seed=4)}
    sets["train"] = data(kind, 4, seed=6)
    trainer = make_trainer(kind, tmp_path, ref_model=model(seed=1), evaluation=sets)
    counted = {name: counts["examples"] for name, counts in trainer.data_counts.items()}
    assert counted == {"train": 16, "eval_few": 5, "eval_more": 9, "eval_train": 4}
    together = trainer.evaluate()
    for name, rows in sets.items():
        alone = make_trainer(kind, tmp_path, ref_model=model(seed=1), evaluation=rows).evaluate()
        for metric in LOGGED[kind] | {"loss"}:
            assert together[f"eval_{name}_{metric}"] == alone[f"eval_{metric}"], metric


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("kto", {}), ("kto", {"loss_type": "apo_zero_unpaired"}), ("kto", {"reference_point": 0.1}), ("dpo", {})],
    ids=["kto", "apo_zero_unpaired", "given z0", "dpo"],
)
def test_evaluate_takes_new_data_and_prepared_data(tmp_path, kind, settings):
    trainer = make_trainer(kind, tmp_path, ref_model=model(seed=1), evaluation=5, **settings)
    given = trainer.evaluate()
    names = {"eval_loss", *(f"eval_{name}" for name in LOGGED[kind])}
    for rows in (data(kind, 5, seed=1), trainer.eval_dataset):
        evaluated = trainer.evaluate(rows)
        assert {name: evaluated[name] for name in names} == {name: given[name] for name in names}
        evaluated = trainer.evaluate({"again": rows})
        assert evaluated["eval_again_loss"] == given["eval_loss"]


@by_kind
def test_another_trainers_reference_is_not_used(tmp_path, kind):
    settings = {"evaluation": 5, "per_device_eval_batch_size": 5}
    others = run_precomputed(kind, tmp_path / "other", ref_model=model(seed=2), **settings)
    trainer = make_trainer(kind, tmp_path, ref_model=model(seed=1), **settings)
    given, of_others = trainer.evaluate(), trainer.evaluate(others.eval_dataset)
    assert of_others["eval_loss"] == given["eval_loss"] != others.evaluate()["eval_loss"]


def test_autocast_stands_around_the_model_once_however_often_it_is_evaluated(tmp_path):
    trainer = make_trainer("dpo", tmp_path, evaluation=4, bf16=True)
    forward = trainer.model.forward
    for _ in range(3):
        trainer.evaluate()
        assert trainer.model.forward == forward
    trainer.train()
    trained = make_trainer("dpo", tmp_path, evaluation=4, bf16=True)
    trained.train()
    assert history(trainer) == history(trained)


@by_kind
def test_workers_that_stay_evaluate_what_they_are_given(tmp_path, kind):
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make_trainer(kind, tmp_path, evaluation=4, **workers)
    of_old, of_new, of_old_again = trainer.evaluate(), trainer.evaluate(data(kind, 4, seed=5)), trainer.evaluate()
    expected = make_trainer(kind, tmp_path, evaluation=data(kind, 4, seed=5)).evaluate()
    assert of_new["eval_logps/chosen"] == expected["eval_logps/chosen"] != of_old["eval_logps/chosen"]
    assert of_old_again["eval_logps/chosen"] == of_old["eval_logps/chosen"]


def test_workers_that_stay_draw_the_same_batches_at_each_evaluation(tmp_path):
    """z0 is of a batch: in other batches the loss is another."""
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make_trainer("kto", tmp_path, ref_model=model(seed=1), evaluation=20, **workers)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert (first["eval_loss"], first["eval_kl"]) == (second["eval_loss"], second["eval_kl"])


@by_kind
def test_training_data_is_one_dataset_and_evaluation_data_may_be_several(tmp_path, kind):
    named = datasets.DatasetDict(a=data(kind, 4), b=data(kind, 4, seed=2))
    for several in (named, dict(named)):
        with pytest.raises((ValueError, TypeError), match=r"[dD]ict.*expected"):
            make_trainer(kind, tmp_path, train=several)
        metrics = make_trainer(kind, tmp_path, evaluation=several).evaluate()
        assert {"eval_a_loss", "eval_b_loss"} <= metrics.keys()


class Log(TrainerCallback):
    """What a reporting integration sees."""

    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **_):
        self.entries.append(dict(logs))


def test_the_best_checkpoint_by_a_metric_of_ours_is_kept_and_stops_the_run(tmp_path):
    """The pairs of evaluation are those of training the wrong way round: each step makes their margin worse."""
    pairs = data("dpo", 8)
    swapped = pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    after_the_first_step = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == 1:
                after_the_first_step.update(copy.deepcopy(model.state_dict()))

    trainer = make_trainer(
        "dpo",
        tmp_path,
        train=pairs,
        evaluation=swapped,
        per_device_train_batch_size=8,
        num_train_epochs=9,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="eval_rewards/margins",
        greater_is_better=True,
        load_best_model_at_end=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2), Keep()],
    )
    trainer.train()
    margins = [entry["eval_rewards/margins"] for entry in history(trainer) if "eval_loss" in entry]
    assert len(margins) == 3
    assert margins == sorted(margins, reverse=True)
    assert trainer.state.best_metric == margins[0]
    for name, tensor in weights(trainer).items():
        assert tensor.equal(after_the_first_step[name]), name


# ---- what is logged ----


@by_kind
def test_the_names_that_are_logged(tmp_path, kind):
    log = Log()
    trainer = make_trainer(
        kind, tmp_path, train=8, per_device_train_batch_size=8, evaluation=4, eval_strategy="epoch", callbacks=[log]
    )
    trainer.train()
    train, evaluation, summary = log.entries
    assert train.keys() == LOGGED[kind] | RUN - {"step"}
    assert {name for name in evaluation if not name.endswith(("runtime", "per_second"))} == {
        "epoch",
        "eval_loss",
        *(f"eval_{name}" for name in LOGGED[kind]),
    }
    assert not LOGGED[kind] & summary.keys()
    assert all(isinstance(value, (int, float)) for entry in log.entries for value in entry.values())


@by_kind
def test_a_log_entry_is_the_mean_over_its_steps(tmp_path, kind):
    """Sequences and tokens weigh the same, whichever step they came in; the last steps of 4 are never logged."""
    settings = {
        "train": 27,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-9,
        "train_sampling_strategy": "sequential",
    }
    each = make_trainer(kind, tmp_path, ref_model=model(seed=1), **settings)
    each.train()
    every_third = make_trainer(kind, tmp_path, ref_model=model(seed=1), logging_steps=3, **settings)
    every_third.train()
    (entry,) = history(every_third)
    steps = history(each)
    assert entry["loss"] == pytest.approx(sum(step["loss"] for step in steps[:3]) / 3, rel=1e-6)
    assert entry["num_tokens"] == steps[2]["num_tokens"]
    rows = [every_third.train_dataset[row] for row in range(18)]
    chosen = [row for row in rows if row["label"]] if kind == "kto" else rows
    lengths = [len(row["completion_ids" if kind == "kto" else "chosen_ids"]) for row in chosen]
    policy = model()
    with torch.no_grad():
        batch = every_third.data_collator(chosen)
        names = ("input_ids", "attention_mask", "labels")
        ids, mask, labels = (batch[name] if kind == "kto" else batch[name][:, 0] for name in names)
        logits = policy(input_ids=ids, attention_mask=mask).logits
        logps = reference.sequence_logps(logits, labels)
    assert sum(lengths) == (labels != IGNORE_INDEX).sum()
    assert entry["logps/chosen"] == pytest.approx(logps.mean().item(), rel=1e-5)
    is_completion = torch.nn.functional.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
    assert entry["logits/chosen"] == pytest.approx(logits[is_completion].mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("kto", {"loss_type": "apo_zero_unpaired"}), ("dpo", {}), ("dpo", {"loss_type": "ipo"})],
    ids=["apo_zero_unpaired", "dpo", "ipo"],
)
def test_a_step_logs_what_trl_logs(tmp_path, kind, settings):
    trl = pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with")
    if not trl.__version__.startswith("1.16."):
        pytest.skip(f"compares with TRL 1.16, found {trl.__version__}")
    trl_trainer, trl_config = {"kto": (trl.KTOTrainer, trl.KTOConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig)}[kind]
    common = {
        "per_device_train_batch_size": 6,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.5,
        "max_length": 64,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "num_train_epochs": 1,
        "beta": 0.2,
        **settings,
    }
    other = trl_trainer(
        model(),
        model(seed=1),
        args=trl_config(
            output_dir=str(tmp_path), bf16=False, gradient_checkpointing=False, save_strategy="no", **common
        ),
        train_dataset=data(kind, 6),
        processing_class=tokenizer(),
    )
    other.train()
    trainer = make_trainer(kind, tmp_path, ref_model=model(seed=1), train=6, **common)
    trainer.train()
    (ours,), (theirs,) = history(trainer), history(other)
    assert ours.keys() <= theirs.keys() | {"kl"}
    assert LOGGED[kind] - {"kl"} <= theirs.keys()
    assert_near([ours], [{name: theirs[name] for name in ours if name != "kl"}], tolerance=1e-4)


@by_kind
@pytest.mark.parametrize(("every", "left"), [(10, 4), (3, 1), (2, 0)])
def test_the_summary_holds_the_steps_after_the_last_log(tmp_path, kind, every, left):
    def run(logging_steps):
        trainer = make_trainer(kind, tmp_path, logging_steps=logging_steps, learning_rate=0.0)
        trainer.train()
        assert trainer.state.global_step == 4
        return trainer.state.log_history

    summary = run(every)[-1]
    assert "train_loss" in summary
    assert "loss" not in summary
    logged = summary.keys() & (LOGGED[kind] | {"num_tokens"})
    if left:
        expected = run(left)[-2]
        assert logged == expected.keys() & (LOGGED[kind] | {"num_tokens"})
        assert_near([summary], [{name: expected[name] for name in logged}])
    else:
        assert not logged


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU, by name."""

    OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts = Counter()
        for name in ("tolist", "numpy", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, self.counting(name, getattr(torch.Tensor, name)))

    def counting(self, name, method):
        def counted(tensor, *args, **kwargs):
            self.counts[name] += 1
            return method(tensor, *args, **kwargs)

        return counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith("index"):  # by a mask: as many rows as it holds ones
            indices = [index for index in args[1] if index is not None] if isinstance(args[1], (list, tuple)) else []
            self.counts[f"{name} by mask"] += any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        self.counts[name] += name in self.OPERATORS
        return func(*args, **(kwargs or {}))


def count_waits(kind, folder, monkeypatch, steps, **settings):
    trainer = make_trainer(kind, folder, train=8 * steps, logging_steps=1000, **settings)
    with monkeypatch.context() as patch, Waits(patch) as waits:
        trainer.train()
    return +waits.counts, trainer


@by_kind
@pytest.mark.parametrize("loss_from", ["hidden", "logits"])
def test_metrics_are_recorded_without_waiting_for_the_device(tmp_path, kind, loss_from, monkeypatch):
    settings = {"gradient_accumulation_steps": 2, "loss_from": loss_from}
    monkeypatch.setattr(FusedTrainer, "log", Trainer.log)  # which reads them, at the end of training too
    recorded, trainer = count_waits(kind, tmp_path, monkeypatch, 3, **settings)
    assert trainer._train_totals.values
    monkeypatch.setattr(Totals, "add", lambda self, totals: None)
    monkeypatch.setattr(LossMetrics, "totals", lambda self: {})
    unrecorded, trainer = count_waits(kind, tmp_path, monkeypatch, 3, **settings)
    assert not trainer._train_totals.values
    assert recorded == unrecorded
    assert sum(recorded.values()) > 0  # what a forward pass waits for: the number of completion tokens


def test_the_reference_point_waits_for_nothing_but_its_forward_passes(tmp_path, monkeypatch):
    trainer = make_trainer("kto", tmp_path, ref_model=model(seed=1))
    (batch,) = in_order(trainer, trainer.train_dataset, 16)
    with monkeypatch.context() as patch, Waits(patch) as passes:
        trainer._logps(trainer.model, batch, "kl_")
        trainer._logps(trainer.ref_model, batch, "kl_")
    with monkeypatch.context() as patch, Waits(patch) as estimate:
        trainer._estimate(trainer.model, [batch])
    assert +estimate.counts == +passes.counts


@by_kind
@pytest.mark.parametrize("filtered", [False, True])
def test_nan_losses_are_left_out_of_the_logged_mean_only_if_asked(tmp_path, kind, filtered, monkeypatch):
    def run(**settings):
        trainer = make_trainer(kind, tmp_path, train=12, evaluation=8, logging_steps=3, **settings)
        trainer.create_optimizer = lambda: setattr(trainer, "optimizer", torch.optim.SGD([torch.zeros(1)], lr=0.1))
        trainer.train()
        return history(trainer)[0]["loss"], trainer.evaluate()["eval_loss"]

    trainer_class = FusedKTOTrainer if kind == "kto" else FusedDPOTrainer
    calls, whole = Counter(), trainer_class._loss

    def first_is_nan(self, model, *args, **options):
        loss, metrics = whole(self, model, *args, **options)
        calls[model.training] += 1
        return (loss * float("nan") if calls[model.training] == 1 else loss), metrics

    monkeypatch.setattr(trainer_class, "_loss", first_is_nan)
    for value in run(logging_nan_inf_filter=filtered):
        assert math.isfinite(value) == filtered
    assert calls == {True: 3, False: 2}


# ---- stopping and resuming ----


@pytest.mark.parametrize("sampling", ["group_by_length", "random"])
@by_kind
def test_a_run_stopped_at_any_step_ends_as_one_that_was_not(tmp_path, kind, sampling):
    """Two epochs of 4 steps; the last of an epoch has 2 + 1 examples, the others 2 + 2; every third step is logged."""

    def run(folder, stop_at=None, resume_from=None, **settings):
        trainer = make_trainer(
            kind,
            tmp_path / folder,
            policy=model(attention_dropout=0.1),
            train=15,
            evaluation=5,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            logging_steps=3,
            eval_strategy="steps",
            eval_steps=4,
            optim="adamw_torch",
            learning_rate=0.01,
            lr_scheduler_type="linear",
            train_sampling_strategy=sampling,
            callbacks=[] if stop_at is None else [StopAt(stop_at)],
            **{"disable_dropout": False, **settings},
        )
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer

    whole = run("whole")
    steps = whole.state.global_step
    assert steps == 8
    assert history(run("no_dropout", disable_dropout=True)) != history(whole), "dropout does nothing"
    for step in range(1, steps + 1):
        stopped = run(f"stopped_{step}", stop_at=step)
        assert stopped.state.global_step == step
        resumed = run(f"stopped_{step}", resume_from=str(tmp_path / f"stopped_{step}" / f"checkpoint-{step}"))
        assert history(resumed) == history(whole), f"stopped at {step}"
        for name, tensor in weights(resumed).items():
            assert tensor.equal(weights(whole)[name]), f"stopped at {step}: {name}"


@by_kind
def test_a_checkpoint_of_a_model_alone_is_refused(tmp_path, kind):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    make_trainer(kind, tmp_path, max_steps=2, **saving).train()
    with pytest.raises(ValueError, match=r"checkpoint-2 holds a model alone \(save_only_model\)"):
        make_trainer(kind, tmp_path, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_loss_asked_for_by_hand_has_a_reference_point_of_its_own(tmp_path):
    """Not the last step's, nor that of the batch before."""
    settings = {"ref_model": model(seed=1), "gradient_accumulation_steps": 4}
    trained = make_trainer("kto", tmp_path, max_steps=1, **settings)
    trained.train()
    batches = list(trained.get_train_dataloader())
    losses = [trained.compute_loss(trained.model, batch).item() for batch in batches]
    points = set()
    for loss, batch in zip(losses, batches, strict=True):
        fresh = make_trainer("kto", tmp_path, policy=copy.deepcopy(trained.model), **settings)
        points.add(fresh._estimate(fresh.model, [batch]).item())
        assert fresh.compute_loss(fresh.model.train(), batch).item() == loss
    assert len(points) > 1


def test_epochs_of_similar_lengths_are_in_an_order_of_their_own(tmp_path):
    trainer = make_trainer("dpo", tmp_path, train=32, num_train_epochs=3)
    compute_loss, batches = trainer.compute_loss, []

    def recording(model, inputs, **options):
        batches.append(inputs["input_ids"])
        return compute_loss(model, inputs, **options)

    trainer.compute_loss = recording
    trainer.train()
    epochs = [batches[start : start + 8] for start in (0, 8, 16)]
    orders = {str([batch.tolist() for batch in epoch]) for epoch in epochs}
    assert len(orders) == 3
    for epoch in epochs:
        assert sum(len(batch) for batch in epoch) == 32
    shuffled = make_trainer("dpo", tmp_path, train=32, train_sampling_strategy="random").get_train_dataloader()
    width = sum(batch["input_ids"].shape[-1] for batch in shuffled)
    assert all(sum(batch.shape[-1] for batch in epoch) < width for epoch in epochs)


@pytest.mark.parametrize("sampling", ["group_by_length", "batch_rebalance", "random"])
def test_the_order_is_the_seeds(tmp_path, sampling):
    def widths(**settings):
        trainer = make_trainer("dpo", tmp_path, train=32, train_sampling_strategy=sampling, **settings)
        return [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]

    assert widths() == widths(data_seed=42) != widths(data_seed=5) == widths(data_seed=5)


@by_kind
def test_a_run_is_not_resumed_with_its_own_checkpoint_for_the_reference(tmp_path, kind):
    make_trainer(kind, tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    begun, checkpoint = str(tmp_path / "checkpoint-1"), str(tmp_path / "checkpoint-2")
    policy = type(model()).from_pretrained(begun)
    with pytest.raises(ValueError, match=r"reference_weights: .* as ref_model, and not one of its checkpoints"):
        make_trainer(kind, tmp_path, policy=policy, max_steps=3).train(resume_from_checkpoint=checkpoint)
    for elsewhere in ({"policy": policy, "ref_model": model()}, {"policy": model()}):
        trainer = make_trainer(kind, tmp_path, max_steps=3, **elsewhere)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 3


# ---- the reference ----


@by_kind
def test_frozen_weights_of_an_adapter_stay_frozen_whatever_the_reference_is(tmp_path, kind):
    """As with a reference of its own, also where it was evaluated or precomputed before the first step."""
    peft = pytest.importorskip("peft", reason="peft is not installed: no adapters")
    precomputed = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache")}
    histories = []

    def adapted():
        torch.manual_seed(3)
        policy = peft.get_peft_model(model(), lora_config())
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_("lora_B" in name)
        return policy

    for settings in ({"ref_model": adapted()}, {}, {"evaluation": 4}, precomputed, precomputed):  # computed, then read
        policy = adapted()
        trainer = make_trainer(kind, tmp_path, policy=policy, **settings)
        if "evaluation" in settings:
            trainer.evaluate()
        start = weights(trainer)
        trainer.train()
        changed = {name for name, tensor in weights(trainer).items() if not tensor.equal(start[name])}
        with_gradient = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        assert changed == with_gradient == {name for name in start if "lora_B.default" in name}
        histories.append([entry for entry in history(trainer) if "loss" in entry])
    for entries in histories[1:]:
        assert_near(entries, histories[0], but=("rewards/accuracies",))  # margins at first are precomputing's rounding


@by_kind
@pytest.mark.parametrize("lora", [None, "peft_config", "PeftModel"])
def test_without_a_reference_model_it_is_the_model_before_its_first_step(tmp_path, kind, lora):
    """A copy that stays; with new adapters the model without them, also where they and dropout are at work."""
    peft = pytest.importorskip("peft") if lora else None

    def run(ref_model):
        policy = model(attention_dropout=0.3)
        torch.manual_seed(3)
        if lora == "PeftModel":
            policy = peft.get_peft_model(policy, lora_config(lora_dropout=0.3, init_lora_weights=True))
        trainer = make_trainer(
            kind,
            tmp_path,
            policy=policy,
            ref_model=ref_model,
            evaluation=5,
            eval_strategy="epoch",
            disable_dropout=False,
            peft_config=lora_config(lora_dropout=0.3, init_lora_weights=True) if lora == "peft_config" else None,
        )
        trainer.train()
        return trainer

    own, given = run(None), run(model(attention_dropout=0.3))
    assert history(own) == history(given)
    assert (own.ref_model is None) == (lora is not None)
    start = model().state_dict()
    for name, tensor in given.ref_model.state_dict().items():
        assert tensor.equal(start[name])
    if lora is None:
        assert not any(parameter.requires_grad for parameter in own.ref_model.parameters())
        assert all(tensor.equal(start[name]) for name, tensor in own.ref_model.state_dict().items())
        assert not all(tensor.equal(start[name]) for name, tensor in weights(own).items())


@pytest.fixture
def ref_passes(monkeypatch):
    """Counts the forward passes of the reference."""
    counter, passes = Counter(), FusedTrainer._reference

    def counted(self, *args):
        counter["passes"] += 1
        return passes(self, *args)

    monkeypatch.setattr(FusedTrainer, "_reference", counted)

    def count():
        return counter.pop("passes", 0)

    return count


def run_precomputed(kind, tmp_path, **settings):
    trainer = make_trainer(
        kind, tmp_path / "out", precompute_ref_log_probs=True, ref_cache_dir=str(tmp_path / "cache"), **settings
    )
    trainer.train()
    return trainer


@by_kind
@pytest.mark.parametrize("source", ["given", "copy", "adapters off", "copied adapter"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_precomputed_is_live_to_the_bit(tmp_path, kind, source, bf16, ref_passes):
    settings = {"train": 6, "evaluation": 3, "eval_strategy": "epoch", "bf16": bf16}
    settings |= {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}  # padding rounds otherwise
    if "adapter" in source:
        settings["peft_config"] = lora_config(init_lora_weights=source == "adapters off")
    ref = model(seed=1) if source == "given" else None
    live = make_trainer(kind, tmp_path, ref_model=ref, **settings)
    live.train()
    assert ref_passes() > 0
    ref = model(seed=1) if source == "given" else None
    precomputed = run_precomputed(kind, tmp_path, ref_model=ref, **settings)
    passes = ref_passes() - (source == "copied adapter")  # the copy is compared once with what it is a copy of
    assert passes == 9 * len(precomputed.ref_columns if kind == "kto" else [0])
    assert precomputed.ref_model is None
    assert history(precomputed) == history(live)
    again = run_precomputed(kind, tmp_path, ref_model=model(seed=1) if source == "given" else None, **settings)
    assert ref_passes() == (source == "copied adapter")
    assert history(again) == history(live)


@by_kind
def test_precomputed_in_other_batches_is_live_to_rounding(tmp_path, kind, ref_passes):
    live = make_trainer(kind, tmp_path, ref_model=model(seed=1), train=11)
    live.train()
    ref_passes()
    for size, batches in {None: 3, 2: 6}.items():
        settings = {"ref_model": model(seed=1), "train": 11, "precompute_ref_batch_size": size}
        precomputed = run_precomputed(kind, tmp_path / str(size), **settings)
        assert ref_passes() == batches * (2 if kind == "kto" else 1)  # KTO's mismatched pairs too
        assert_near(history(precomputed), history(live))


CHANGES = {
    "a weight": {"changed_weight": True},
    "a record": {"changed_record": True},
    "the tokenizer": {"words": WORDS[::-1]},
    "max_length": {"max_length": 7},
    "loss_from": {"loss_from": "logits"},
    "precision": {"bf16": True},
}


@pytest.mark.parametrize(
    ("kind", "change"),
    [(kind, change) for kind in KINDS for change in CHANGES.values()] + [("kto", {"average_log_prob": True})],
    ids=[f"{kind}-{change}" for kind in KINDS for change in CHANGES] + ["kto-average_log_prob"],
)
def test_a_stale_cache_is_never_used(tmp_path, kind, change, ref_passes):
    change = dict(change)
    ref, rows = model(seed=1), data(kind, 8)
    run_precomputed(kind, tmp_path, ref_model=copy.deepcopy(ref), train=rows)
    ref_passes()
    if change.pop("changed_weight", False):
        with torch.no_grad():
            ref.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3
    if change.pop("changed_record", False):
        side = "completion" if kind == "kto" else "rejected"
        rows = rows.map(lambda record, row: {side: " w1" if row == 4 else record[side]}, with_indices=True)
    settings = {"train": rows, **change}
    precomputed = run_precomputed(kind, tmp_path, ref_model=copy.deepcopy(ref), **settings)
    assert ref_passes() > 0
    live = make_trainer(kind, tmp_path, ref_model=copy.deepcopy(ref), **settings)
    live.train()
    assert_near(history(precomputed), history(live), tolerance=5e-2 if change.get("bf16") else 2e-5)


@pytest.mark.parametrize("damage", ["cut off", "garbage", "empty", "too short", "other columns"])
def test_a_damaged_cache_is_computed_again_and_replaced(tmp_path, damage, ref_passes):
    whole = run_precomputed("dpo", tmp_path, ref_model=model(seed=1), train=8)
    (path,) = (tmp_path / "cache").iterdir()
    content = path.read_bytes()
    if damage in ("cut off", "garbage", "empty"):
        path.write_bytes({"cut off": content[:-9], "garbage": content[::-1], "empty": b""}[damage])
    else:
        names = whole.ref_columns if damage == "too short" else ("one", "other")
        save_file({name: torch.zeros(7 if damage == "too short" else 8) for name in names}, path)
    ref_passes()
    again = run_precomputed("dpo", tmp_path, ref_model=model(seed=1), train=8)
    assert ref_passes() > 0
    assert history(again) == history(whole)
    assert path.read_bytes() == content
    assert list((tmp_path / "cache").iterdir()) == [path]


def test_a_killed_write_leaves_nothing(tmp_path, monkeypatch, ref_passes):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reference_cache.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run_precomputed("dpo", tmp_path, ref_model=model(seed=1), train=8)
    assert list((tmp_path / "cache").iterdir()) == []
    ref_passes()
    run_precomputed("dpo", tmp_path, ref_model=model(seed=1), train=8)
    assert ref_passes() > 0


def test_what_could_not_be_kept_is_not_computed(tmp_path, ref_passes):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(FileExistsError, match="cache"):
        run_precomputed("dpo", tmp_path, ref_model=model(seed=1), train=8)
    assert ref_passes() == 0


def test_simpo_has_no_reference(tmp_path, ref_passes):
    trainer = make_trainer("dpo", tmp_path, loss_type="simpo")
    trainer.train()
    assert trainer.ref_model is None
    assert ref_passes() == 0
    with pytest.raises(ValueError, match="ref_model is given, but loss_type='simpo' has no reference"):
        make_trainer("dpo", tmp_path, loss_type="simpo", ref_model=model(seed=1))


# ---- errors ----


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS) + 3, n_embd=16, n_layer=1, n_head=2, n_positions=8))


@by_kind
def test_options_out_of_range_are_refused_by_name(tmp_path, kind):
    config = CONFIGS[kind]

    def refused(match, **options):
        with pytest.raises((ValueError, TypeError), match=match):
            config(output_dir=str(tmp_path), use_cpu=True, **options)

    refused("loss_type.*'kto_squared'.*apo_zero_unpaired|loss_type.*'sigmoid'.*'apo_down'", loss_type="squared")
    refused("loss_from.*'hidden'.*'logits'.*'text'", loss_from="text")
    refused("beta", beta=0.0)
    refused("max_steps must be at least 1, or -1 for num_train_epochs, got 0", max_steps=0)
    refused("num_train_epochs must be more than 0, or max_steps given", num_train_epochs=0)
    refused("learning_rate must be a finite number of at least 0, got nan", learning_rate=float("nan"))
    for name, least in AT_LEAST.items():
        said = f"{name} must be a finite number of at least {least}, got {least - 1}"
        if name == "warmup_steps":  # transformers refuses one below 0 itself, in words of its own
            said = name
        refused(said, **{"dataloader_num_workers": 1, name: least - 1})
    refused("fp16=True has no effect on a CPU", fp16=True)
    refused("save_strategy='best' needs evaluations", save_strategy="best", metric_for_best_model="loss")
    for rubbish in (0, -3, 2.5, "-64", "long", True):
        refused(f"max_length must be a positive integer, 'auto' or None, got {rubbish!r}", max_length=rubbish)
    refused("max_length must hold a prompt and a completion", max_length=1)
    for name in ("precompute_ref_batch_size", "dataset_num_proc", "pad_to_multiple_of"):
        refused(f"{name} must be a positive integer or None, got 0", **{name: 0})
    refused("chunk_bytes", chunk_bytes=-1)
    refused(r"backend must be one of \['triton', 'torch', None\], got 'cuda'", backend="cuda")
    for name in ("precompute_ref_log_probs", "disable_dropout", *(["average_log_prob"] if kind == "kto" else [])):
        for rubbish in ("no", "false", 1, None):
            refused(f"{name} must be True or False, got {rubbish!r}", **{name: rubbish})
    if kind == "dpo":
        refused("label_smoothing", label_smoothing=0.5)
    else:
        refused("undesirable_weight", undesirable_weight=-1.0)
        for other in ("batch_mean", 0.5):
            fixed = f"'apo_zero_unpaired' fixes reference_point at 0, got {other!r}"
            refused(fixed, loss_type="apo_zero_unpaired", reference_point=other)
        for rubbish in ("mean", "nan", "inf", None, [0.1], True):
            refused("reference_point must be 'mismatched', 'batch_mean' or a number, got", reference_point=rubbish)


@by_kind
@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("label_smoothing_factor", 0.3, "no classes to smooth"),
        ("average_tokens_across_devices", False, "sequences of all devices"),
        ("length_column_name", "size", "tokenized data"),
        ("include_for_metrics", ["inputs"], "compute_metrics"),
        ("bf16_full_eval", True, "round the model for good, not its reference"),
        ("fp16_full_eval", True, "round the model for good, not its reference"),
        ("use_liger_kernel", True, "fused_linear_cross_entropy"),
    ],
)
def test_arguments_that_would_change_nothing_are_refused(tmp_path, monkeypatch, kind, option, value, why):
    monkeypatch.setattr("transformers.training_args.is_liger_kernel_available", lambda: True, raising=False)
    with pytest.raises(ValueError, match=f"{option}.*{why}"):
        CONFIGS[kind](output_dir=str(tmp_path), use_cpu=True, **{option: value})


@by_kind
@pytest.mark.parametrize(
    ("needed", "options"),
    [
        ("loss_from='hidden'", {"chunk_bytes": 2**20, "loss_from": "logits"}),
        ("precompute_ref_log_probs", {"precompute_ref_batch_size": 2}),
        ("precompute_ref_log_probs", {"ref_cache_dir": "cache"}),
        ("push_to_hub", {"hub_model_id": "mine"}),
        (
            "a train_sampling_strategy whose batches can shrink",
            {"auto_find_batch_size": True, "train_sampling_strategy": "batch_rebalance"},
        ),
        ("an lr_scheduler_type that warms up", {"warmup_steps": 5, "lr_scheduler_type": "constant"}),
        (
            "an lr_scheduler_type that takes them",
            {"lr_scheduler_kwargs": {"power": 2}, "lr_scheduler_type": "constant"},
        ),
    ],
)
def test_options_without_what_they_belong_to_are_refused(tmp_path, kind, needed, options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} has no meaning without {needed}")):
        CONFIGS[kind](output_dir=str(tmp_path), use_cpu=True, **options)
    nothing = {} if name == "lr_scheduler_kwargs" else CONFIGS[kind].__dataclass_fields__[name].default
    CONFIGS[kind](output_dir=str(tmp_path), use_cpu=True, **{**options, name: nothing})


def test_precomputing_what_there_is_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="precompute_ref_log_probs has no meaning for loss_type='simpo'"):
        CONFIGS["dpo"](output_dir=str(tmp_path), use_cpu=True, loss_type="simpo", precompute_ref_log_probs=True)


@by_kind
@pytest.mark.parametrize("make", [lambda: model(max_position_embeddings=8), tiny_gpt2], ids=["llama", "gpt2"])
def test_no_sequence_is_longer_than_the_models_positions(tmp_path, kind, make):
    """GPT-2 would fail on an index in the middle of training, and Llama train on positions that it never saw."""
    for settings in ({}, {"max_length": None}, {"max_length": "8"}, {"max_length": 5}):
        trainer = make_trainer(kind, tmp_path, policy=make(), evaluation=4, **settings)
        assert trainer.max_length == (5 if settings.get("max_length") == 5 else 8)
        assert trainer.max_length == max(trainer.train_dataset["length"])
        trainer.train()
        counts = dict(trainer.data_counts)
        trainer.evaluate(data(kind, 5, seed=5))  # prepared only now
        assert trainer.data_counts == counts
        assert counts["eval"]["truncated"]
    for settings in ({"policy": make()}, {"ref_model": make()}):
        name = "model" if "policy" in settings else "ref_model"
        with pytest.raises(ValueError, match=f"max_length must be at most 8, the positions that {name} has, got 9"):
            make_trainer(kind, tmp_path, max_length=9, **settings)


def test_batches_are_padded_within_the_models_positions(tmp_path):
    for settings in ({}, {"max_length": None}, {"max_length": 6}):
        trainer = make_trainer("kto", tmp_path, policy=tiny_gpt2(), pad_to_multiple_of=3, **settings)
        assert trainer.max_length == 6
        trainer.train()
    with pytest.raises(ValueError, match=r"max_length=7 would be padded to a multiple of 3.*at most 6"):
        make_trainer("kto", tmp_path, policy=tiny_gpt2(), pad_to_multiple_of=3, max_length=7)
    with pytest.raises(ValueError, match="pad_to_multiple_of must be at most 8, the positions that model has, got 9"):
        make_trainer("kto", tmp_path, policy=tiny_gpt2(), pad_to_multiple_of=9)


def test_evaluation_data_may_be_of_one_label(tmp_path):
    desirable = data("kto", 9).filter(lambda record: record["label"])
    trainer = make_trainer("kto", tmp_path, evaluation=desirable)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    assert "eval_rewards/rejected" not in metrics
    with pytest.raises(DataError, match=r"train data: .* got no undesirable one"):
        make_trainer("kto", tmp_path, train=desirable)


def test_max_length_where_the_model_has_more_positions_or_no_limit(tmp_path):
    # XLNet's configuration says -1
    for limit, expected in ((2048, {"auto": 1024, None: 2048, 1500: 1500}), (-1, {"auto": 1024, None: None, 9: 9})):
        policy = model()
        policy.config.max_position_embeddings = limit
        for wanted, length in expected.items():
            assert make_trainer("dpo", tmp_path, policy=policy, max_length=wanted).max_length == length
    assert make_trainer("dpo", tmp_path, ref_model=model(max_position_embeddings=7)).max_length == 7


@pytest.mark.parametrize(("given", "expected"), [([], "auto"), (["--max_length", "64"], 64)])
def test_transformers_own_parser_reads_max_length(tmp_path, given, expected):
    parser = HfArgumentParser(CONFIGS["kto"])
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", *given])
    assert args.max_length == expected


def test_a_model_from_a_path_is_trained_in_float32_and_one_in_half_precision_is_warned_of(tmp_path, caplog):
    model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    trainer = make_trainer("dpo", tmp_path, policy=str(tmp_path / "model"))
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert trainer.ref_model.dtype == torch.float32
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    make_trainer("dpo", tmp_path, policy=model().to(torch.bfloat16))
    assert "most updates of learning_rate=0.5 round away" in caplog.text


def test_adapters_without_a_peft_model_are_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    policy = model()
    policy.add_adapter(peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"without being a PeftModel.*get_peft_model"):
        make_trainer("kto", tmp_path, policy=policy)


@by_kind
def test_a_model_with_nothing_to_train_is_refused_but_evaluated(tmp_path, kind):
    peft = pytest.importorskip("peft", reason="peft is not installed: no adapters")
    peft.get_peft_model(model(), lora_config()).save_pretrained(tmp_path / "adapter")
    policy = peft.PeftModel.from_pretrained(model(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"model has no parameter that requires a gradient.*is_trainable=True"):
        make_trainer(kind, tmp_path, policy=policy)
    trainer = make_trainer(kind, tmp_path, policy=policy, train=None, evaluation=4)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert not any(parameter.requires_grad for parameter in policy.parameters())


@by_kind
def test_evaluation_takes_a_path(tmp_path, kind):
    trainer = make_trainer(kind, tmp_path, evaluation=6)
    data(kind, 6, seed=3).to_json(tmp_path / "new.jsonl")
    of_path, of_data = trainer.evaluate(str(tmp_path / "new.jsonl")), trainer.evaluate(data(kind, 6, seed=3))
    assert of_path["eval_loss"] == of_data["eval_loss"]


def test_a_second_training_counts_anew(tmp_path):
    trainer = make_trainer("dpo", tmp_path, max_steps=1, learning_rate=0.0)
    trainer.train()
    first = trainer.state.log_history[0]
    trainer._train_totals.add({"loss": (torch.tensor(99.0).double(), torch.tensor(1.0).double())})  # of a step cut off
    trainer.train()
    second = trainer.state.log_history[0]
    assert (second["num_tokens"], second["loss"]) == (first["num_tokens"], first["loss"])


@by_kind
def test_tokens_that_a_model_has_no_embeddings_of_are_refused(tmp_path, kind):
    """A word of the data, or the pad token alone, that the tokenizer was given after the model."""
    more_words = [*WORDS, "new"]
    records = data(kind, 8)
    column = "completion" if kind == "kto" else "rejected"
    with_new = records.map(lambda record, row: {column: " new"} if row == 5 else {}, with_indices=True)
    with pytest.raises(ValueError, match=r"train data: .* token id 64, but model has embeddings of 64 tokens: resize"):
        make_trainer(kind, tmp_path, train=with_new, words=more_words)
    resized = model()
    resized.resize_token_embeddings(65)
    with pytest.raises(ValueError, match=r"train data: .* token id 64, but ref_model has embeddings of 64 tokens"):
        make_trainer(kind, tmp_path, policy=resized, ref_model=model(seed=1), train=with_new, words=more_words)
    trainer = make_trainer(kind, tmp_path, policy=resized, train=with_new, words=more_words, max_steps=1)
    trainer.train()
    trainer = make_trainer(kind, tmp_path, train=records, words=more_words)
    with pytest.raises(ValueError, match=r"eval data: .* token id 64"):
        trainer.evaluate(with_new)

    trainer_class, words = type(trainer), tokenizer()
    words.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"processing_class pads with token id 64, but model has .* 64 tokens: resize"):
        trainer_class(model(), args=trainer.args, train_dataset=records, processing_class=words)
    words.pad_token = words.eos_token
    trainer_class(model(), args=trainer.args, train_dataset=records, processing_class=words)


def test_a_model_made_in_memory_comes_with_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"processing_class is missing, and model was made in memory"):
        FusedKTOTrainer(model(), args=CONFIGS["kto"](str(tmp_path), use_cpu=True), train_dataset=data("kto", 8))


@by_kind
def test_arguments_of_the_wrong_kind_are_refused(tmp_path, kind):
    trainer, config = {"kto": FusedKTOTrainer, "dpo": FusedDPOTrainer}[kind], CONFIGS[kind]
    policy, words = model(), tokenizer()
    other = CONFIGS["dpo" if kind == "kto" else "kto"]
    for args in (TrainingArguments(str(tmp_path)), other(str(tmp_path), use_cpu=True)):
        with pytest.raises(TypeError, match=f"args must be a {config.__name__}, got {type(args).__name__}"):
            trainer(policy, args=args, processing_class=words)
    args = config(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="ref_model is the model itself: leave it out"):
        trainer(policy, policy, args, processing_class=words)
    with pytest.raises(TypeError, match="processing_class must be a transformers tokenizer, got str"):
        trainer(policy, args=args, processing_class="gpt2")
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs are visible.*torchrun.*CUDA_VISIBLE_DEVICES"):
        trainer(policy, args=args, processing_class=words)


def test_batch_mean_is_refused_where_a_batch_lies_in_parts(tmp_path):
    with pytest.raises(ValueError, match=r"reference_point='batch_mean'.*gradient_accumulation_steps=2"):
        make_trainer("kto", tmp_path, reference_point="batch_mean", gradient_accumulation_steps=2)


@by_kind
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_the_base_under_adapters_that_replaced_its_weights_is_no_reference(tmp_path, kind, init):
    """Without them it is another model than the one that they were made for; what policy and reference are at first
    agrees with that one to rounding, whether it is given or left out.
    """
    pytest.importorskip("peft", reason="peft is not installed: no adapters")
    adapters = {"peft_config": lora_config(init_lora_weights=init)}
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' changes the weights.*as ref_model"):
        make_trainer(kind, tmp_path, reference="base", **adapters)
    for ref_model in (None, model()):
        trainer = make_trainer(kind, tmp_path, ref_model=ref_model, max_steps=1, learning_rate=0.0, **adapters)
        trainer.train()
        assert history(trainer)[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5 if ref_model else 0)


@by_kind
def test_the_base_with_repeated_layers_is_no_reference(tmp_path, kind):
    pytest.importorskip("peft", reason="peft is not installed: no adapters")
    with pytest.raises(ValueError, match=r"layer_replication repeats layers.*as ref_model"):
        make_trainer(kind, tmp_path, reference="base", peft_config=lora_config(layer_replication=[(0, 2), (1, 2)]))


@by_kind
def test_a_term_that_peft_adds_to_a_models_own_loss_is_refused(tmp_path, kind):
    peft = pytest.importorskip("peft", reason="peft is not installed: no adapters")

    def adalora(weight: float):
        return peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9, orth_reg_weight=weight)

    with pytest.raises(ValueError, match=r"orth_reg_weight=0.5 \(AdaLoRA\) has no effect"):
        make_trainer(kind, tmp_path, peft_config=adalora(0.5))
    trainer = make_trainer(kind, tmp_path, peft_config=adalora(0.0))
    trainer.train()
    assert math.isfinite(history(trainer)[-1]["loss"])


@by_kind
@pytest.mark.parametrize("part", ["embed_tokens", "all"])
def test_a_reference_that_shares_what_is_trained_is_refused(tmp_path, kind, part):
    policy, reference = model(), model(seed=1)
    if part == "all":
        reference.model = policy.model
    else:
        reference.model.embed_tokens = policy.model.embed_tokens
    with pytest.raises(ValueError, match=r"ref_model holds weights that are to be trained \(\d+, model.embed_tokens"):
        make_trainer(kind, tmp_path, policy=policy, ref_model=reference)


def test_a_base_that_an_adapter_was_put_into_is_no_reference(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: no adapters")
    base = model()
    with pytest.raises(ValueError, match=r"ref_model holds weights that are to be trained.*lora_A"):
        make_trainer("dpo", tmp_path, policy=peft.get_peft_model(base, lora_config()), ref_model=base)


@pytest.mark.parametrize("made_of", ["another model", "the weights under an adapter"])
def test_an_optimizer_of_nothing_that_is_trained_is_refused(tmp_path, made_of):
    policy, settings = model(), {}
    if made_of != "another model":
        pytest.importorskip("peft", reason="peft is not installed: no adapters")
        settings["peft_config"] = lora_config()
    owner = model() if made_of == "another model" else policy
    optimizer = torch.optim.SGD(owner.parameters(), lr=0.5)
    args = CONFIGS["dpo"](output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="optimizers has an optimizer of none of the weights to train"):
        FusedDPOTrainer(
            policy, None, args, data("dpo", 8), processing_class=tokenizer(), optimizers=(optimizer, None), **settings
        )


@by_kind
@pytest.mark.parametrize("beside", ["biases", "embeddings"])
def test_weights_trained_beside_adapters_need_a_reference_of_their_own(tmp_path, kind, beside):
    peft = pytest.importorskip("peft", reason="peft is not installed: no adapters")

    def run(ref_model):
        start = model(attention_bias=True)
        policy = peft.get_peft_model(start, lora_config(bias="all" if beside == "biases" else "none"))
        if beside == "embeddings":
            start.get_input_embeddings().requires_grad_(True)
        trainer = make_trainer(kind, tmp_path, policy=policy, ref_model=ref_model)
        trainer.train()
        return trainer

    with pytest.raises(ValueError, match=r"model trains weights beside its adapters \(\d+, base_.*: pass ref_model"):
        run(None)
    assert math.isfinite(history(run(model(attention_bias=True)))[-1]["loss"])
    whole = lora_config(modules_to_save=["embed_tokens"])  # which PEFT takes off with the adapters
    assert make_trainer(kind, tmp_path, peft_config=whole).ref_model is None


@pytest.mark.parametrize("empty", [16, 12], ids=["all", "most"])
def test_prompts_may_be_empty_where_no_completion_has_a_mismatched_one(tmp_path, empty):
    records = data("kto", 16).to_list()
    for record in records[:empty]:
        record["prompt"] = ""
    trainer = make_trainer("kto", tmp_path, train=datasets.Dataset.from_list(records), per_device_train_batch_size=2)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) and entry["kl"] >= 0 for entry in history(trainer))


def test_an_encoder_decoder_is_refused_from_logits_too(tmp_path):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    policy = T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes))
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration is no causal language model"):
        make_trainer("dpo", tmp_path, policy=policy, loss_from="logits")


def test_a_model_that_sees_what_it_is_asked_for_is_refused_from_logits_too(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    configs = [BertConfig(vocab_size=64, is_decoder=is_decoder, **sizes) for is_decoder in (False, True)]
    policy, decoder = (BertLMHeadModel(config) for config in configs)
    with pytest.raises(UnsupportedModelError, match="BertLMHeadModel is no causal language model as it is configured"):
        make_trainer("dpo", tmp_path, policy=policy, loss_from="logits")
    with pytest.raises(UnsupportedModelError, match="BertLMHeadModel is no causal language model as it is configured"):
        make_trainer("dpo", tmp_path, policy=decoder, ref_model=policy, loss_from="logits")
    make_trainer("dpo", tmp_path, policy=decoder, loss_from="logits").train()


@pytest.mark.parametrize("loss_from", ["hidden", "logits"])
def test_models_are_checked_on_the_device_alone(tmp_path, monkeypatch, loss_from):
    """Layers may have kernels that run nowhere else, as Liger's do."""
    moved, move = [], Trainer._move_model_to_device

    def noted(self, model, device):
        moved.append(model)
        move(self, model, device)

    monkeypatch.setattr(Trainer, "_move_model_to_device", noted)

    def check_device(layer, arguments):
        assert any(layer in whole.modules() for whole in moved)

    policy, ref_model = model(), model(seed=1)
    for whole in (policy, ref_model):
        whole.model.norm.register_forward_pre_hook(check_device)
    make_trainer("dpo", tmp_path, policy=policy, ref_model=ref_model, loss_from=loss_from)
    assert moved == [policy, ref_model]


def test_a_reference_that_was_placed_stays_there(tmp_path, monkeypatch):
    """As quantized ones do, which cannot be moved."""
    ref_model = model(seed=1)
    ref_model.hf_device_map = {"": "cpu"}
    moved = []
    monkeypatch.setattr(Trainer, "_move_model_to_device", lambda self, model, device: moved.append(model))
    trainer = make_trainer("dpo", tmp_path, ref_model=ref_model)
    assert moved == [trainer.model]


@by_kind
def test_new_data_is_refused_once_the_reference_is_gone(tmp_path, kind):
    """Not scored by the policy in its place; where adapters can be taken off, the reference is still there."""
    settings = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache"), "evaluation": 5}
    new, prepared = data(kind, 5, seed=7), make_trainer(kind, tmp_path, evaluation=data(kind, 5, seed=7)).eval_dataset
    given = make_trainer(kind, tmp_path, ref_model=model(seed=1), **settings)
    copied = make_trainer(kind, tmp_path, **settings)
    with_adapters = make_trainer(kind, tmp_path, ref_model=model(seed=1), peft_config=lora_config(), **settings)
    for trainer in (given, copied, with_adapters):
        for rows in (new, prepared, {"new": new}):
            with pytest.raises(ValueError, match="eval_dataset is new, and with precompute_ref_log_probs"):
                trainer.evaluate(rows)
        with pytest.raises(ValueError, match="eval_dataset is new, and with precompute_ref_log_probs"):
            trainer.predict(new)
        assert trainer.evaluate()["eval_loss"] == trainer.evaluate(trainer.eval_dataset)["eval_loss"]
    adapters_off = make_trainer(kind, tmp_path, peft_config=lora_config(), **settings)
    live = make_trainer(kind, tmp_path, peft_config=lora_config(), evaluation=new)
    assert adapters_off.evaluate(new)["eval_loss"] == live.evaluate()["eval_loss"]


@by_kind
def test_adapters_that_cannot_be_are_refused(tmp_path, kind):
    peft = pytest.importorskip("peft")
    with pytest.raises(TypeError, match=r"peft_config must be a peft\.PeftConfig, got dict"):
        make_trainer(kind, tmp_path, peft_config={"r": 2})
    with pytest.raises(ValueError, match="peft_config is given, but the model carries adapters already"):
        make_trainer(kind, tmp_path, policy=peft.get_peft_model(model(), lora_config()), peft_config=lora_config())
    on_head = {"peft_config": lora_config(target_modules=["q_proj", "lm_head"])}
    with pytest.raises(UnsupportedModelError, match=r"LM head carries an adapter.*leave 'lm_head' out"):
        make_trainer(kind, tmp_path, **on_head)
    from_logits = make_trainer(kind, tmp_path, loss_from="logits", **on_head)
    start = weights(from_logits)
    from_logits.train()
    name = "base_model.model.lm_head.lora_A.default.weight"
    assert not weights(from_logits)[name].equal(start[name])


def test_deepspeed_without_its_processes_is_refused(tmp_path, monkeypatch):
    create = Trainer.create_accelerator_and_postprocess

    def under_deepspeed(self):
        create(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", under_deepspeed)
    with pytest.raises(ValueError, match=r"DeepSpeed needs processes.*counts 1, and none were started: use torchrun"):
        make_trainer("dpo", tmp_path)


def test_publishing_a_model_is_left_to_the_trainer_of_transformers():
    published = ("create_model_card", "push_to_hub", "_push_from_checkpoint", "init_hf_repo", "save_model")
    for trainer in (FusedKTOTrainer, FusedDPOTrainer):
        assert all(getattr(trainer, name) is getattr(Trainer, name) for name in published)
