"""Precomputed reference log-probabilities equal live ones and are never taken from a stale or damaged file."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from tiny_training import (
    KINDS,
    WORDS,
    assert_near,
    by_kind,
    data,
    history,
    lora_config,
    make_trainer,
    model,
    run_precomputed,
)

from kto_fused.trainers import reference_cache

pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")


@by_kind
@pytest.mark.parametrize("source", ["given", "copy", "adapters off", "copied adapter"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_precomputed_log_probabilities_equal_live_ones_to_the_bit(tmp_path, kind, source, bf16, ref_passes):
    settings = {"train": 6, "evaluation": 3, "eval_strategy": "epoch", "bf16": bf16}
    settings |= {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
    }  # no padding, which rounds
    if "adapter" in source:
        settings["peft_config"] = lora_config(init_lora_weights=source == "adapters off")
    ref = model(seed=1) if source == "given" else None
    live = make_trainer(kind, tmp_path, ref_model=ref, **settings)
    live.train()
    assert ref_passes() > 0
    ref = model(seed=1) if source == "given" else None
    precomputed = run_precomputed(kind, tmp_path, ref_model=ref, **settings)
    assert ref_passes() == 9 * len(precomputed.ref_columns if kind == "kto" else [0])
    assert precomputed.ref_model is None
    assert history(precomputed) == history(live)
    again = run_precomputed(kind, tmp_path, ref_model=model(seed=1) if source == "given" else None, **settings)
    assert ref_passes() == 0
    assert history(again) == history(live)


@by_kind
def test_precomputed_in_other_batches_they_equal_live_ones_to_rounding(tmp_path, kind, ref_passes):
    live = make_trainer(kind, tmp_path, ref_model=model(seed=1), train=11)
    live.train()
    ref_passes()
    for size, batches in {None: 3, 2: 6}.items():
        settings = {"ref_model": model(seed=1), "train": 11, "precompute_ref_batch_size": size}
        precomputed = run_precomputed(kind, tmp_path / str(size), **settings)
        assert ref_passes() == batches * (2 if kind == "kto" else 1)  # KTO scores mismatched pairs too
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


def test_nothing_is_computed_where_the_given_cache_folder_cannot_be_created(tmp_path, ref_passes):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(FileExistsError, match="cache"):
        run_precomputed("dpo", tmp_path, ref_model=model(seed=1), train=8)
    assert ref_passes() == 0


@by_kind
def test_a_batch_without_reference_values_is_refused_once_the_reference_is_gone(tmp_path, kind):
    """The policy, trained since, must not stand in for its own reference."""
    trainer = run_precomputed(kind, tmp_path, ref_model=model(seed=1), train=8)
    batch = next(iter(trainer.get_train_dataloader()))
    del batch["ref_logps"]
    with pytest.raises(RuntimeError, match="a batch has no reference log-probabilities, and with precompute_ref_log"):
        trainer.compute_loss(trainer.model, batch)


@by_kind
def test_new_data_is_refused_once_the_reference_is_gone(tmp_path, kind):
    """The policy must not score it instead. Where switching adapters off makes the reference, it is still there."""
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
