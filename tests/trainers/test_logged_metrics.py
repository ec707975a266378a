"""What the trainers log: names, means, and that recording metrics never waits for the device."""

import itertools
import math
from collections import Counter

import pytest
import torch
from plain_training import in_order
from tiny_training import LOGGED, assert_near, by_kind, by_recipe, data, history, make_trainer, model, tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback

from kto_fused import reference
from kto_fused.metrics import LossMetrics, Totals
from kto_fused.preference_data import IGNORE_INDEX
from kto_fused.trainers import FusedDPOTrainer, FusedKTOTrainer, FusedTrainer

pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")


RUN = {"loss", "grad_norm", "learning_rate", "num_tokens", "epoch", "step"}


class Log(TrainerCallback):
    """Collects the entries that a reporting integration gets."""

    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **_):
        self.entries.append(dict(logs))


@by_recipe
def test_each_loss_logs_its_names(tmp_path, kind):
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
    """Every sequence and token weighs the same, whichever step it came in. No entry is due for the last steps."""
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
    own = {"kl", "rewards/accuracies", "rewards/auc"} if kind == "kto" else set()
    assert ours.keys() <= theirs.keys() | own
    assert LOGGED[kind] - own <= theirs.keys()
    assert_near([ours], [{name: theirs[name] for name in ours.keys() - own}], tolerance=1e-4)


@by_recipe
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
    """Counts, by name, the operators that would make the host wait for a GPU."""

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
        if name.startswith("index"):  # indexing by a mask waits for the number of its ones
            indices = [index for index in args[1] if index is not None] if isinstance(args[1], (list, tuple)) else []
            self.counts[f"{name} by mask"] += any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        self.counts[name] += name in self.OPERATORS
        return func(*args, **(kwargs or {}))


def count_waits(kind, folder, monkeypatch, steps, **settings):
    trainer = make_trainer(kind, folder, train=8 * steps, logging_steps=1000, **settings)
    with monkeypatch.context() as patch, Waits(patch) as waits:
        trainer.train()
    return +waits.counts, trainer


@pytest.mark.parametrize(
    ("kind", "loss_from"),
    [*itertools.product(["kto", "dpo", "sft"], ["hidden", "logits"]), ("reward", "hidden")],
)
def test_metrics_are_recorded_without_waiting_for_the_device(tmp_path, kind, loss_from, monkeypatch):
    settings = {"gradient_accumulation_steps": 2, "loss_from": loss_from}
    monkeypatch.setattr(FusedTrainer, "log", Trainer.log)  # ours reads the metrics, also at the end of training
    recorded, trainer = count_waits(kind, tmp_path, monkeypatch, 3, **settings)
    assert trainer._train_totals.values
    monkeypatch.setattr(Totals, "add", lambda self, totals: None)
    monkeypatch.setattr(LossMetrics, "totals", lambda self: {})
    unrecorded, trainer = count_waits(kind, tmp_path, monkeypatch, 3, **settings)
    assert not trainer._train_totals.values
    assert recorded == unrecorded
    assert sum(recorded.values()) > 0  # a forward pass waits for the number of completion tokens


def test_the_reference_point_waits_for_nothing_but_its_forward_passes(tmp_path, monkeypatch):
    trainer = make_trainer("kto", tmp_path, ref_model=model(seed=1))
    (batch,) = in_order(trainer, trainer.train_dataset, 16)
    with monkeypatch.context() as patch, Waits(patch) as passes:
        trainer._logps(trainer.model, batch, "kl_")
        trainer._logps(trainer.ref_model, batch, "kl_")
    with monkeypatch.context() as patch, Waits(patch) as estimate:
        trainer._estimated_reference_point(trainer.model, [batch])
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


def test_a_second_training_starts_its_sums_at_zero(tmp_path):
    trainer = make_trainer("dpo", tmp_path, max_steps=1, learning_rate=0.0)
    trainer.train()
    first = trainer.state.log_history[0]
    left_by_a_cut_off_step = {"loss": (torch.tensor(99.0).double(), torch.tensor(1.0).double())}
    trainer._train_totals.add(left_by_a_cut_off_step)
    trainer.train()
    second = trainer.state.log_history[0]
    assert (second["num_tokens"], second["loss"]) == (first["num_tokens"], first["loss"])
