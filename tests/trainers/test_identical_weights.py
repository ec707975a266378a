"""Equal weights of policy and reference give log-ratios of exactly 0 in this package's trainers, and a bound on the
rounding that precomputing changes.
"""

import copy
import math
from pathlib import Path

import pytest
import torch
from tiny_training import data, history, make_trainer, model

from kto_fused.trainers import FusedTrainer

PRECISIONS = {  # (bf16 of the configuration, dtype of the weights)
    "float32": (False, torch.float32),
    "bf16-autocast": (True, torch.float32),
    "bf16-weights": (False, torch.bfloat16),
    "fp16-weights": (False, torch.float16),
}
SCORES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "kl")
FIRST_LOSS = {"kto": 0.5, "dpo": math.log(2)}  # if all log-ratios are 0
kinds = pytest.mark.parametrize("kind", ["kto", "dpo"])
pytestmark = pytest.mark.usefixtures("small_machine")


def equal_trainer(kind: str, folder: Path, precision: str, *, own_reference: bool = False, **settings) -> FusedTrainer:
    bf16, dtype = PRECISIONS[precision]
    policy = model(max_position_embeddings=256, hidden_size=64).to(dtype)
    return make_trainer(
        kind,
        folder,
        policy=policy,
        ref_model=copy.deepcopy(policy) if own_reference else None,
        bf16=bf16,
        max_length=256,
        **settings,
    )


def long_data(kind: str, rows: int):
    """Return completions of up to 200 tokens and 1,000 nats: their sums are large enough for a rounding to show."""

    def longer(record):
        names = ("completion",) if kind == "kto" else ("chosen", "rejected")
        return {name: " ".join([record[name].strip()] * 25) for name in names}

    return data(kind, rows).map(longer)


WAYS = [("hidden", False), ("hidden", True), ("logits", False)]
SLICE = [("float32", *WAYS[1]), *(("bf16-autocast", *way) for way in WAYS), ("bf16-weights", *WAYS[0])]
SLICE += [("fp16-weights", *WAYS[2])]
ALL = [(precision, *way) for precision in PRECISIONS for way in WAYS]


@kinds
@pytest.mark.parametrize(
    ("precision", "loss_from", "own_reference"),
    [*SLICE, *(pytest.param(*case, marks=pytest.mark.full) for case in ALL if case not in SLICE)],
)
def test_equal_weights_give_log_ratios_of_exactly_0(tmp_path, kind, precision, loss_from, own_reference):
    trainer = equal_trainer(
        kind,
        tmp_path,
        precision,
        own_reference=own_reference,
        train=long_data(kind, 4),
        evaluation=long_data(kind, 4),
        loss_from=loss_from,
        learning_rate=0.0,
    )
    before = trainer.evaluate()
    trainer.train()
    for prefix, log in (("eval_", before), ("", history(trainer)[0])):
        found = {name: log[prefix + name] for name in SCORES if prefix + name in log}
        # a tie counts one half, and so does a reward of 0, which has neither label's sign
        assert found == dict.fromkeys(found, 0.0) | {"rewards/accuracies": 0.5}
        assert len(found) == {"kto": 5, "dpo": 4}[kind]
        assert log[prefix + "loss"] == pytest.approx(FIRST_LOSS[kind], abs=1e-7)


@kinds
@pytest.mark.parametrize(
    ("precision", "nats"), [("float32", 1e-4), ("bf16-autocast", 0.25), ("bf16-weights", 0.25), ("fp16-weights", 0.05)]
)
def test_precomputed_references_differ_from_live_ones_by_rounding_alone(tmp_path, kind, precision, nats):
    """Precomputing pads other rows together. That changes the shapes of matrix products and attention, and with them
    the rounding. It changes nothing else: a batch's values and the sums are float64.
    """
    trainer = equal_trainer(
        kind,
        tmp_path,
        precision,
        train=long_data(kind, 24),
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=5,
        ref_cache_dir=str(tmp_path),
    )
    policy = trainer.accelerator.prepare_model(trainer.model)  # as in training
    trainer._reference.is_gone = False  # the policy is not trained yet, so that it can stand in for the reference
    differences = []
    for batch in trainer.get_train_dataloader():
        kept = {name: batch.pop(name) for name in ("ref_logps", "ref_kl_logps") if name in batch}
        live = trainer._ref_logps_of(policy, trainer._prepare_inputs(batch))
        live = (torch.stack(live, 1),) if kind == "dpo" and len(live) == 2 else live
        for values, expected in zip(kept.values(), live, strict=True):
            assert values.dtype == expected.dtype == torch.float64
            differences.append((values - expected).abs().max().item())
    assert len(differences) == 6 * (2 if kind == "kto" else 1)
    assert max(differences) < nats
