"""What prepares a run, and what looks at it, leaves alone the random state that its dropout draws from."""

import random

import numpy as np
import pytest
import torch
from tiny_training import by_kind, data, history, make_trainer, model
from transformers import set_seed

SEED = 7
pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")


def state() -> tuple:
    """Of Python, NumPy and torch: what each would draw next."""
    position = np.random.get_state()
    return random.getstate(), position[1].tolist(), position[2], torch.get_rng_state().tolist()


def of_seed(seed: int) -> tuple:
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
    """With dropout and partners to draw, twice: a second one finds data and references in their caches."""
    for _ in range(2):
        settings = {"seed": SEED, "disable_dropout": False, "evaluation": 4, "train": 8}
        settings |= {"policy": model(attention_dropout=0.3), **PREPARATIONS[name](tmp_path)}
        trainer = make_trainer("kto", tmp_path, **settings)
        after = state()
        assert after == of_seed(SEED)
        trainer.evaluate()  # its DataLoader would draw a seed of its own
        if name != "precomputed":  # which leaves no reference for new data
            trainer.evaluate(data("kto", 4, seed=5))
            trainer.predict(data("kto", 4, seed=5))
        assert state() == after


@by_kind
def test_one_cache_and_one_seed_make_one_curve(tmp_path, kind):
    """Computed, found, live, and evaluated between the steps or not: dropout draws the same masks."""

    def run(**settings):
        trainer = make_trainer(
            kind,
            tmp_path / "out",
            policy=model(attention_dropout=0.3),
            disable_dropout=False,
            per_device_train_batch_size=1,  # padding rounds otherwise
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
