"""Preparing and evaluating a run do not change the random state from which training draws its dropout."""

import random

import numpy as np
import pytest
import torch
from tiny_training import by_kind, data, history, make_trainer, model
from transformers import set_seed

SEED = 7
pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")


def state() -> tuple:
    """Return the random states of Python, NumPy and torch."""
    position = np.random.get_state()
    return random.getstate(), position[1].tolist(), position[2], torch.get_rng_state().tolist()


def state_after_seeding(seed: int) -> tuple:
    set_seed(seed)
    return state()


def lora(**options):
    peft = pytest.importorskip("peft", reason="peft is not installed: no adapters")
    return peft.LoraConfig(r=2, target_modules=["q_proj"], **options)


PREPARATIONS = {
    "a copy": lambda folder: {},
    "a model of its own": lambda folder: {"ref_model": model(seed=1)},
    "paths": lambda folder: {"policy": saved(folder / "policy"), "ref_model": saved(folder / "ref")},
    "new adapters": lambda folder: {"peft_config": lora()},
    "adapters that are not zero": lambda folder: {"peft_config": lora(init_lora_weights=False)},
    "PiSSA": lambda folder: {"peft_config": lora(init_lora_weights="pissa_niter_4")},
    "from logits": lambda folder: {"loss_from": "logits"},
    "precomputed": lambda folder: {"precompute_ref_log_probs": True, "ref_cache_dir": str(folder / "kept")},
    "precomputed with adapters": lambda folder: {
        "precompute_ref_log_probs": True,
        "ref_cache_dir": str(folder / "kept"),
        "peft_config": lora(init_lora_weights=False),
    },
}


def saved(folder):
    model().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", PREPARATIONS)
def test_a_trainer_leaves_the_random_state_at_the_seed(tmp_path, name):
    """There are dropout masks and mismatched partners to draw. The second trainer finds data and references cached."""
    for _ in range(2):
        settings = {"seed": SEED, "disable_dropout": False, "evaluation": 4, "train": 8}
        settings |= {"policy": model(attention_dropout=0.3), **PREPARATIONS[name](tmp_path)}
        trainer = make_trainer("kto", tmp_path, **settings)
        after = state()
        assert after == state_after_seeding(SEED)
        trainer.evaluate()  # its DataLoader would draw a seed
        if name != "precomputed":  # then no reference is left for new data
            trainer.evaluate(data("kto", 4, seed=5))
            trainer.predict(data("kto", 4, seed=5))
        assert state() == after


@by_kind
def test_one_cache_and_one_seed_make_one_curve(tmp_path, kind):
    """Reference values computed, found or live, with evaluations or without: dropout draws the same masks."""

    def run(**settings):
        trainer = make_trainer(
            kind,
            tmp_path / "out",
            policy=model(attention_dropout=0.3),
            disable_dropout=False,
            per_device_train_batch_size=1,  # other padding would round differently
            train=8,
            **settings,
        )
        trainer.train()
        return [entry for entry in history(trainer) if "loss" in entry]

    precomputed = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "kept")}
    curve = run(**precomputed)
    assert len({entry["loss"] for entry in curve}) > 2
    assert run(**precomputed) == curve
    assert run() == curve
    assert run(evaluation=4, eval_strategy="steps", eval_steps=2, eval_on_start=True) == curve


def test_adapters_of_a_configuration_depend_on_the_seed_alone(tmp_path):
    def weights(seed, drawn):
        torch.manual_seed(drawn)
        trainer = make_trainer("dpo", tmp_path, peft_config=lora(), seed=seed, train=4)
        return torch.cat([tensor.flatten() for name, tensor in trainer.model.state_dict().items() if "lora_A" in name])

    assert weights(1, 5).equal(weights(1, 6))
    assert not weights(1, 5).equal(weights(2, 5))
