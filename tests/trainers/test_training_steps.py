"""Each optimizer step is the step of a plain loop, whatever the accumulation, precision and checkpointing."""

import copy
import itertools
import math
import random

import datasets
import pytest
import torch
from devices import HAS_GPU
from plain_training import assert_same_steps, plain_training
from tiny_training import (
    assert_near,
    by_kind,
    by_recipe,
    data,
    history,
    lora_config,
    make_trainer,
    model,
    model_for,
    reference_for,
    weights,
)

from kto_fused.heads.preference import DPO_LOSS_TYPES
from kto_fused.huggingface.padding import without_padding_mask
from kto_fused.trainers import base as trainer_base

pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")


SMOOTHED = {"sigmoid": 0.1, "robust": 0.2, "simpo": 0.1}


def check_against_plain_training(kind, folder, **settings):
    policy = model_for(kind)
    ref = reference_for(kind) if settings.get("loss_type") != "simpo" else None
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
    assert len(expected) == (2 if settings.get("packing") else 3)
    assert_near(history(trainer), expected)
    assert_same_steps(weights(trainer), trained.state_dict(), policy.state_dict())
    return trainer, expected


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
    if trainer.needs_mismatched:
        assert any(entry["kl"] > 0.05 for entry in expected), "z0 was cut off at 0 throughout"


@pytest.mark.parametrize("loss_from", ["hidden", "logits"])
@pytest.mark.parametrize("loss_type", DPO_LOSS_TYPES)
def test_dpo_trains_as_a_plain_loop(tmp_path, loss_type, loss_from):
    smoothing = {"label_smoothing": SMOOTHED[loss_type]} if loss_type in SMOOTHED else {}
    check_against_plain_training("dpo", tmp_path, loss_type=loss_type, loss_from=loss_from, **smoothing)


PACKED = {"packing": True, "max_length": 16}


@pytest.mark.parametrize("loss_from", ["hidden", "logits"])
@pytest.mark.parametrize("settings", [{}, {"loss_type": "dft"}, PACKED], ids=["nll", "dft", "packed"])
def test_sft_trains_as_a_plain_loop(tmp_path, settings, loss_from):
    check_against_plain_training("sft", tmp_path, loss_from=loss_from, **settings)


def test_a_reward_model_trains_as_a_plain_loop(tmp_path):
    check_against_plain_training("reward", tmp_path / "margins", centering=0.1)
    draw = random.Random(0)
    weighted = data("reward", 11).remove_columns("margin").add_column("weight", [draw.random() for _ in range(11)])
    policy, settings = model_for("reward"), {"train": weighted, "train_sampling_strategy": "sequential"}
    trainer = make_trainer("reward", tmp_path / "weights", policy=copy.deepcopy(policy), **settings)
    expected, trained = plain_training("reward", policy, None, trainer)
    trainer.train()
    assert_near(history(trainer), expected)
    assert_same_steps(weights(trainer), trained.state_dict(), policy.state_dict())


@by_kind
def test_attention_gets_no_mask_for_padding(tmp_path, kind, attention_masks):
    trainer = make_trainer(kind, tmp_path, ref_model=model(seed=1))
    batch = next(iter(trainer.get_train_dataloader()))
    assert not batch["attention_mask"].all()
    attention_masks.clear()  # drop the masks of the checks at construction
    trainer.train()
    assert set(attention_masks) == {None}


@pytest.mark.parametrize(("options", "expected"), [({}, "no"), ({"bf16": True}, "bf16")])
def test_leaving_out_the_mask_depends_on_the_precision_of_attention(tmp_path, options, expected, monkeypatch):
    seen, leave_out = [], without_padding_mask

    def seen_precision(model, inputs, mixed_precision):
        seen.append(mixed_precision)
        return leave_out(model, inputs, mixed_precision)

    trainer = make_trainer("kto", tmp_path, **options)
    monkeypatch.setattr(trainer_base, "without_padding_mask", seen_precision)
    trainer.train()
    assert set(seen) == {expected}


@pytest.mark.parametrize("rows", [24, 22, 19, 17], ids=lambda rows: f"{rows}_rows")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("kto", {}),
        ("kto", {"loss_from": "logits"}),
        ("dpo", {}),
        ("dpo", {"loss_type": "ipo"}),
        ("sft", {}),
        ("sft", PACKED),
        ("reward", {"centering": 0.1}),
    ],
    ids=["kto", "kto-logits", "dpo", "ipo", "sft", "sft-packed", "reward"],
)
def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path, kind, settings, rows):
    """The last step's batches are full (24 rows), the last of them is not (22), there are fewer of them too (19), or
    there is a single row (17).
    """
    runs = {}
    for size, number in ((8, 1), (4, 2), (2, 4)):
        trainer = make_trainer(
            kind,
            tmp_path,
            ref_model=reference_for(kind),
            train=rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=number,
            **settings,
        )
        trainer.train()
        runs[number] = trainer
    for number in (2, 4):
        assert_near(history(runs[number]), history(runs[1]), but=("epoch",))
        assert_same_steps(weights(runs[number]), weights(runs[1]), model_for(kind).state_dict())
    assert len(history(runs[1])) == (2 if "packing" in settings else 3)


@pytest.mark.parametrize(
    ("kind", "loss_from"),
    [*itertools.product(["kto", "dpo", "sft"], ["hidden", "logits"]), ("reward", "hidden")],
)
def test_bf16_autocast_stays_near_float32(tmp_path, kind, loss_from):
    # a score's gradient is large, and long steps would carry two runs apart
    shorter = {"learning_rate": 0.02} if kind == "reward" else {}
    runs = {}
    for bf16 in (False, True):
        trainer = make_trainer(kind, tmp_path, ref_model=reference_for(kind), bf16=bf16, loss_from=loss_from, **shorter)
        trainer.train()
        runs[bf16] = trainer
        assert trainer.model.dtype == torch.float32
    near, exact = history(runs[True]), history(runs[False])
    # one pair of four whose scores are near each other makes the accuracy jump
    assert_near(near, exact, tolerance=5e-2, but=("rewards/accuracies",) if kind == "reward" else ())
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
    """Only the first step is compared: the gradient scaler may skip later steps until its scale fits."""
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
    """This holds in training and in an evaluation before it, in every precision."""
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


@by_recipe
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_checkpointed_layers_run_twice_and_change_nothing(tmp_path, kind, lora):
    runs, forwards = {}, {}
    scored = {"modules_to_save": ["score"]} if kind == "reward" else {}
    for reentrant in (None, False, True):
        policy = model_for(kind)
        forwards[reentrant] = Forwards(policy.model.layers[0].mlp)
        trainer = make_trainer(
            kind,
            tmp_path,
            policy=policy,
            ref_model=reference_for(kind),
            peft_config=lora_config(**scored) if lora else None,
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
    assert all("lora_" in name or "modules_to_save" in name for name in trained) == lora


def distance(one, other):
    return torch.stack([(one[name].double() - other[name]).norm() for name in one]).norm().item()


@by_recipe
def test_max_grad_norm_clips_the_gradient_of_the_whole_step(tmp_path, kind):
    ways = {}
    for limit in (0.0, 0.01):
        trainer = make_trainer(
            kind,
            tmp_path,
            ref_model=reference_for(kind),
            train=8,
            gradient_accumulation_steps=2,
            max_grad_norm=limit,
        )
        trainer.train()
        (entry,) = history(trainer)
        ways[limit] = distance(weights(trainer), model_for(kind).state_dict()), entry["grad_norm"]
    assert ways[0.0][1] == pytest.approx(ways[0.01][1], rel=1e-6)
    assert ways[0.0][0] == pytest.approx(0.5 * ways[0.0][1], rel=1e-4)
    assert ways[0.01][0] == pytest.approx(0.5 * 0.01, rel=1e-3)


@by_recipe
def test_trains_compiled(tmp_path, kind):
    """Forward and backward are traced and run by PyTorch's operators; Inductor would take a minute or two."""
    torch.use_deterministic_algorithms(False)  # torch.compile guards on this flag
    runs = {}
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch._dynamo.reset()
        trainer = make_trainer(
            kind,
            tmp_path,
            policy=model_for(kind, num_hidden_layers=1),
            ref_model=reference_for(kind, num_hidden_layers=1),
            train=8,
            pad_to_multiple_of=32,  # one shape, so that it is traced once
            **settings,
        )
        trainer.train()
        runs[len(settings) > 0] = trainer
    assert_near(history(runs[True]), history(runs[False]))
    assert hasattr(runs[True].model_wrapped, "_orig_mod")
    assert not hasattr(runs[False].model_wrapped, "_orig_mod")


@pytest.mark.parametrize("empty", [16, 12], ids=["all", "most"])
def test_prompts_may_be_empty_where_no_completion_has_a_mismatched_one(tmp_path, empty):
    records = data("kto", 16).to_list()
    for record in records[:empty]:
        record["prompt"] = ""
    trainer = make_trainer("kto", tmp_path, train=datasets.Dataset.from_list(records), per_device_train_batch_size=2)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) and entry["kl"] >= 0 for entry in history(trainer))


def test_a_loss_asked_for_by_hand_has_a_reference_point_of_its_own(tmp_path):
    """It uses neither the last step's z0 nor that of the batch before."""
    settings = {"ref_model": model(seed=1), "gradient_accumulation_steps": 4}
    trained = make_trainer("kto", tmp_path, max_steps=1, **settings)
    trained.train()
    batches = list(trained.get_train_dataloader())
    losses = [trained.compute_loss(trained.model, batch).item() for batch in batches]
    points = set()
    for loss, batch in zip(losses, batches, strict=True):
        fresh = make_trainer("kto", tmp_path, policy=copy.deepcopy(trained.model), **settings)
        points.add(fresh._estimated_reference_point(fresh.model, [batch]).item())
        assert fresh.compute_loss(fresh.model.train(), batch).item() == loss
    assert len(points) > 1
