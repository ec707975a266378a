"""Several objectives: every batch holds each of them, and the gradient is that of their weighted sum."""

import re

import datasets
import pytest
import torch
from tiny_training import data, history, make_trainer, model, stop_and_resume, weights

from kto_fused.trainers.objectives import ObjectiveBatches

pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")
ALPHA = {"helpful": 1.0, "harmless": 0.25}
NAMES = ("loss", "rewards/chosen", "rewards/rejected")


def sources(kind, helpful=8, harmless=4):
    return {"helpful": data(kind, helpful, seed=3), "harmless": data(kind, harmless, seed=4)}


def gradients(trainer, batches):
    """The gradient of the mean of the batches' losses, and the last loss."""
    trainer.model.train()
    trainer.model.zero_grad()
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, batch)
        (loss / len(batches)).backward()
    return {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}, loss.item()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("dpo", {}),
        ("dpo", {"loss_type": ["ipo", "apo_zero"], "loss_weights": [1.0, 0.5], "loss_from": "logits"}),
        ("kto", {"reference_point": 0.2}),
        ("kto", {"loss_type": "bco"}),
    ],
    ids=["dpo", "list", "kto", "bco"],
)
def test_the_gradient_is_that_of_the_weighted_sum_of_single_runs(tmp_path, kind, settings):
    given = sources(kind, 4, 4)
    common = {"ref_model": model(seed=1), "train_sampling_strategy": "sequential", **settings}
    together = make_trainer(
        kind, tmp_path, train=given, objective_weights=ALPHA, per_device_train_batch_size=8, **common
    )
    (batch,) = together.get_train_dataloader()
    assert batch["objective"].tolist() == [0] * 4 + [1] * 4
    found, loss = gradients(together, [batch])
    logged, expected, expected_loss = together._train_totals.pop(), {}, 0.0
    for name, alpha in ALPHA.items():
        alone = make_trainer(kind, tmp_path, train=given[name], per_device_train_batch_size=4, **common)
        own, own_loss = gradients(alone, alone.get_train_dataloader())
        expected = {key: expected.get(key, 0) + alpha * grad for key, grad in own.items()}
        expected_loss += alpha * own_loss
        single = alone._train_totals.pop()
        assert logged[f"{name}/loss"] == pytest.approx(own_loss, rel=1e-5)
        for side in ("chosen", "rejected", "margins", *(["accuracies"] if kind == "dpo" else [])):
            assert logged[f"{name}/rewards/{side}"] == pytest.approx(single[f"rewards/{side}"], rel=1e-5, abs=1e-6)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


def test_weights_of_records_multiply_those_of_objectives(tmp_path):
    given = sources("dpo", 4, 4)
    given["helpful"] = given["helpful"].add_column("weight", [0.0, 1.0, 2.0, 0.5])
    trainer = make_trainer("dpo", tmp_path, train=given, objective_weights=ALPHA)
    assert sorted(trainer.train_dataset["weight"][:]) == [0.0, 0.5, 0.5, 0.5, 0.5, 1.0, 2.0, 4.0]
    trainer.train()
    assert {f"{name}/{value}" for name in ALPHA for value in NAMES} <= history(trainer)[0].keys()


@pytest.mark.parametrize("order", ["group_by_length", "random", "sequential"])
def test_each_batch_holds_equally_many_of_each_objective_and_an_epoch_all_of_the_largest(order):
    sizes = [21, 5, 40]
    dataset = datasets.Dataset.from_dict({"length": [(7 * row) % 23 for row in range(sum(sizes))]})
    epochs = []
    for epoch in (0, 1, 0):
        batches = ObjectiveBatches(dataset, sizes, 6, order, seed=1, epoch=lambda epoch=epoch: epoch)
        rows = torch.tensor(list(batches)).view(-1, 6)
        assert rows.numel() == len(batches) == 20 * 6
        for block, start, size in zip(rows.split(2, dim=1), (0, 21, 26), sizes, strict=True):
            assert block.min() == start
            assert block.max() == start + size - 1
        counts = torch.bincount(rows[:, 4:].flatten(), minlength=66)[26:]
        assert counts.tolist() == [1] * 40
        small = torch.bincount(rows[:, 2:4].flatten(), minlength=26)[21:26]
        assert small.tolist() == [8] * 5
        epochs.append(rows.tolist())
    assert epochs[0] == epochs[2]
    assert (epochs[0] == epochs[1]) == (order == "sequential")


def test_batches_grouped_by_length_pad_less():
    lengths = torch.randint(1, 100, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    dataset = datasets.Dataset.from_dict({"length": lengths})
    padded = {}
    for order in ("random", "group_by_length"):
        rows = torch.tensor(list(ObjectiveBatches(dataset, [200, 200], 8, order, 0, lambda: 0))).view(-1, 8)
        padded[order] = torch.tensor(lengths)[rows].max(1).values.sum()
    assert padded["group_by_length"] < 0.75 * padded["random"]


@pytest.mark.parametrize("kind", ["kto", "dpo"])
def test_a_run_with_objectives_accumulates_and_resumes_to_the_bit(tmp_path, kind):
    def make(folder, train, **settings):
        return make_trainer(kind, folder, train=sources(kind, 16, 6), objective_weights=ALPHA, **settings)

    runs = stop_and_resume(tmp_path, make, lambda trainer: (history(trainer), weights(trainer)))
    (whole, last), (resumed, again) = runs["whole"], runs["resumed"]
    assert whole == resumed
    assert all(f"{name}/loss" in entry for entry in whole for name in ALPHA)
    for name, tensor in last.items():
        assert tensor.equal(again[name]), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_train_batch_size": 3}, "per_device_train_batch_size=3 must be a multiple of the 2 objectives"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True cannot be honoured with objective_weights"),
        (
            {"train_sampling_strategy": "batch_rebalance"},
            "train_sampling_strategy='batch_rebalance' cannot be honoured",
        ),
        ({"loss_type": "orpo"}, "divides by the tokens of the whole batch, which holds all objectives"),
        ({"loss_type": "aot"}, "reads the whole batch, which holds all objectives"),
        ({"use_weighting": True}, "reads ['log_sum_squares'], which is not kept for each example"),
        (
            {"objective_weights": {"helpful": 1.0}},
            "by the names of objective_weights, ['helpful'], got ['helpful', 'har",
        ),
        ({"objective_weights": {"helpful": 1.0, "harmless": -1.0}}, "the weight of objective 'harmless' must be"),
        ({"objective_weights": {"helpful": 1.0, "rewards": 1.0}}, "names an objective 'rewards': expected letters"),
        ({"objective_weights": {}}, "expected weights >= 0 by the names of objectives"),
        ({"objective_weights": ["helpful"]}, "expected weights >= 0 by the names of objectives"),
        ({"train": 4}, "train_dataset must be a dict of data by the names of objective_weights"),
    ],
)
def test_what_objectives_cannot_honour_is_refused(tmp_path, settings, message):
    settings = {"train": sources("dpo"), "objective_weights": ALPHA, **settings}
    with pytest.raises(ValueError, match=re.escape(message)):
        make_trainer("dpo", tmp_path, **settings)


def test_a_dict_of_data_without_objectives_is_refused(tmp_path):
    with pytest.raises(ValueError, match="or objective_weights for several objectives"):
        make_trainer("dpo", tmp_path, train=sources("dpo"))
    splits = datasets.DatasetDict(train=data("dpo", 4), test=data("dpo", 4))
    with pytest.raises(ValueError, match="expected one of them"):
        make_trainer("dpo", tmp_path, train=splits)


def test_a_loss_may_report_no_name_that_is_logged_already(tmp_path):
    trainer = make_trainer("dpo", tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    _, metrics = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    for name in ("loss", "rewards/chosen"):
        metrics.reported = {name: torch.zeros(())}
        with pytest.raises(ValueError, match=f"the loss reports '{name}', which is logged already"):
            metrics.totals()
