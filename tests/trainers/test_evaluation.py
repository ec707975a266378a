"""Evaluation: metrics of the whole dataset, new data, several datasets, the best checkpoint."""

import copy
import itertools

import datasets
import pytest
import torch
from plain_training import PLAIN, in_order, of_labels
from tiny_training import (
    LOGGED,
    assert_near,
    by_kind,
    by_recipe,
    data,
    history,
    make_trainer,
    model,
    model_for,
    reference_for,
    run_precomputed,
    weights,
)
from transformers import EarlyStoppingCallback, TrainerCallback

from kto_fused.metrics import Totals
from kto_fused.preference_data import IGNORE_INDEX, DataError

pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")


def plain_evaluation(kind, policy, ref, trainer, rows, batch_size):
    """Return loss and metrics of a whole dataset: z0 is estimated per batch, all else is a mean over the dataset."""
    totals, seen = Totals(), []
    with torch.no_grad():
        for batch in in_order(trainer, rows, batch_size):
            loss, metrics = PLAIN[kind](policy, ref, batch, trainer.args)
            count = (batch["labels"][:, 1:] != IGNORE_INDEX).sum() if kind == "sft" else len(batch["input_ids"])
            size = torch.as_tensor(count, dtype=torch.float64)
            seen.append(metrics)
            totals.add(metrics.totals() | {"loss": (loss * size, size)})
    return {f"eval_{name}": value for name, value in (totals.pop() | of_labels(seen)).items()}


@pytest.mark.parametrize(
    ("kind", "loss_from"),
    [*itertools.product(["kto", "dpo", "sft"], ["hidden", "logits"]), ("reward", "hidden")],
)
def test_evaluation_is_that_of_the_whole_dataset(tmp_path, kind, loss_from):
    """9 rows in batches of 4: the last batch has one row and weighs a quarter of the others."""
    policy, ref = model_for(kind), reference_for(kind)
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


@by_recipe
def test_several_evaluation_sets_are_reported_by_name(tmp_path, kind):
    sets = {"few": data(kind, 5, seed=3), "more": data(kind, 9, seed=4)}
    sets["train"] = data(kind, 4, seed=6)
    trainer = make_trainer(kind, tmp_path, ref_model=reference_for(kind), evaluation=sets)
    counted = {name: counts["examples"] for name, counts in trainer.data_counts.items()}
    assert counted == {"train": 16, "eval_few": 5, "eval_more": 9, "eval_train": 4}
    together = trainer.evaluate()
    for name, rows in sets.items():
        alone = make_trainer(kind, tmp_path, ref_model=reference_for(kind), evaluation=rows).evaluate()
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
def test_evaluation_takes_a_path(tmp_path, kind):
    trainer = make_trainer(kind, tmp_path, evaluation=6)
    data(kind, 6, seed=3).to_json(tmp_path / "new.jsonl")
    of_path, of_data = trainer.evaluate(str(tmp_path / "new.jsonl")), trainer.evaluate(data(kind, 6, seed=3))
    assert of_path["eval_loss"] == of_data["eval_loss"]


def test_evaluation_data_may_be_of_one_label(tmp_path):
    desirable = data("kto", 9).filter(lambda record: record["label"])
    trainer = make_trainer("kto", tmp_path, evaluation=desirable)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    assert "eval_rewards/rejected" not in metrics
    with pytest.raises(DataError, match=r"train data: .* got no undesirable one"):
        make_trainer("kto", tmp_path, train=desirable)


@by_kind
def test_reference_columns_of_another_trainer_are_not_used(tmp_path, kind):
    settings = {"evaluation": 5, "per_device_eval_batch_size": 5}
    others = run_precomputed(kind, tmp_path / "other", ref_model=model(seed=2), **settings)
    trainer = make_trainer(kind, tmp_path, ref_model=model(seed=1), **settings)
    given, of_others = trainer.evaluate(), trainer.evaluate(others.eval_dataset)
    assert of_others["eval_loss"] == given["eval_loss"] != others.evaluate()["eval_loss"]


def test_autocast_wraps_the_model_once_however_often_it_is_evaluated(tmp_path):
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
def test_persistent_workers_evaluate_the_dataset_they_are_given(tmp_path, kind):
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make_trainer(kind, tmp_path, evaluation=4, **workers)
    of_old, of_new, of_old_again = trainer.evaluate(), trainer.evaluate(data(kind, 4, seed=5)), trainer.evaluate()
    expected = make_trainer(kind, tmp_path, evaluation=data(kind, 4, seed=5)).evaluate()
    assert of_new["eval_logps/chosen"] == expected["eval_logps/chosen"] != of_old["eval_logps/chosen"]
    assert of_old_again["eval_logps/chosen"] == of_old["eval_logps/chosen"]


def test_persistent_workers_draw_the_same_batches_at_each_evaluation(tmp_path):
    """z0 is estimated per batch, so other batches would give another loss."""
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


def test_a_logged_metric_chooses_the_best_checkpoint_and_stops_the_run(tmp_path):
    """Evaluation swaps the sides of the training pairs, so each step makes the evaluated margin worse."""
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
