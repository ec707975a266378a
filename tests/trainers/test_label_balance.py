"""Unbalanced labels: a hint names the weight that the KTO paper advises, with its flag."""

import pytest
from datasets import Dataset
from tiny_training import data, make_trainer

pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")


def feedback(desirable: int, undesirable: int) -> Dataset:
    labels = [True] * desirable + [False] * undesirable
    return Dataset.from_list(
        [{"prompt": f" w{row}", "completion": f" w{row + 1}", "label": label} for row, label in enumerate(labels)]
    )


def hints(tmp_path, caplog, train, **settings) -> list[str]:
    caplog.clear()
    make_trainer("kto", tmp_path, train=train, **settings)
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("Hint")]


@pytest.mark.parametrize(
    ("desirable", "undesirable", "ratio", "name", "weight"),
    [
        (1, 19, "0.0526", "desirable_weight", "19"),
        (19, 1, "19", "undesirable_weight", "14.25"),
        (3, 7, "0.429", "desirable_weight", "2.34"),  # 7/3, rounded up into the range
        (7, 5, "1.4", "undesirable_weight", "1.05"),
    ],
)
def test_the_hint_names_a_weight_in_the_papers_range(tmp_path, caplog, desirable, undesirable, ratio, name, weight):
    (hint,) = hints(tmp_path, caplog, feedback(desirable, undesirable))
    assert hint == (
        f"Hint: {desirable} desirable and {undesirable} undesirable examples, a ratio of {ratio}. The KTO paper "
        "advises desirable_weight x desirable / (undesirable_weight x undesirable) in [1, 4/3]: set "
        f"{name}={weight} (--{name} {weight})."
    )
    weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0, name: float(weight)}
    balance = weights["desirable_weight"] * desirable / (weights["undesirable_weight"] * undesirable)
    assert 1 <= balance <= 4 / 3


def test_there_is_no_hint_where_labels_are_balanced_or_weights_chosen(tmp_path, caplog):
    for train, settings in (
        (feedback(5, 5), {}),
        (feedback(8, 6), {}),  # 4/3
        (data("dpo", 4), {}),  # a pair has one of each
        (feedback(1, 19), {"desirable_weight": 2.0}),
        (feedback(1, 19), {"undesirable_weight": 0.5}),
        (feedback(1, 19), {"loss_type": "apo_zero_unpaired"}),  # the paper's advice is for the kto loss
    ):
        assert hints(tmp_path, caplog, train, **settings) == []


def test_there_is_no_hint_about_evaluation_data(tmp_path, caplog):
    assert hints(tmp_path, caplog, feedback(5, 5), evaluation=feedback(1, 19)) == []
