"""Fused ``CPOTrainer`` and ``ORPOTrainer`` train and log as TRL's, and never compute logits."""

import pytest

pytest.importorskip("trl", reason="TRL is not installed: nothing to fuse")

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma2Config, Gemma2ForCausalLM
from trl_cases import (
    HIDDEN,
    STEPS,
    VOCAB,
    CPOTrainer,
    ORPOTrainer,
    assert_same_logs,
    assert_same_training,
    data,
    experts,
    make_trainer,
    model,
    only,
    said,
    snapshot,
    steps,
    timeless,
)

from kto_fused.integrations.trl import fuse

pytestmark = pytest.mark.usefixtures("small_machine")


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "sigmoid", "label_smoothing": 0.1},
        {"loss_type": "hinge", "cpo_alpha": 0.0, "lora": True},
        {"loss_type": "ipo", "beta": 0.5, "gradient_accumulation_steps": 2},
        {"loss_type": "simpo", "beta": 1.0},
        {"loss_type": "simpo", "cpo_alpha": 0.3, "label_smoothing": 0.2, "alpha": 0.3, "beta": 0.5},
        {"loss_type": "alphapo", "beta": 0.5, "alpha": -0.3},
    ],
    ids=str,
)
def test_a_fused_cpo_trainer_trains_and_logs_as_trls(tmp_path, settings, calls, caplog):
    logs = assert_same_training(CPOTrainer, tmp_path, **settings)
    assert not said(caplog)
    names = {f"{kind}/{side}" for kind in ("rewards", "logps", "logits") for side in ("chosen", "rejected")}
    assert names | {"rewards/margins", "rewards/accuracies", "nll_loss", "loss", "grad_norm"} < logs[0].keys()
    only(calls, fused_linear_loss=STEPS * settings.get("gradient_accumulation_steps", 1))


@pytest.mark.parametrize(
    "settings", [{"beta": 0.3, "lora": True}, {"beta": 0.0}, {"beta": 1.0, "gradient_accumulation_steps": 2}], ids=str
)
def test_a_fused_orpo_trainer_trains_and_logs_as_trls(tmp_path, settings, calls, caplog):
    """TRL's likelihood is that of the chosen prompts too."""
    logs = assert_same_training(ORPOTrainer, tmp_path, **settings)
    assert not said(caplog)
    assert {"nll_loss", "log_odds_ratio", "log_odds_chosen", "logits/chosen", "rewards/margins"} < logs[0].keys()
    only(calls, fused_linear_loss=STEPS * settings.get("gradient_accumulation_steps", 1))


@pytest.mark.parametrize("kind", [CPOTrainer, ORPOTrainer])
def test_a_fused_trainer_evaluates_as_trls(tmp_path, kind):
    arguments = {"eval_dataset": data(kind, rows=7), "per_device_eval_batch_size": 4}
    own, fused = make_trainer(kind, tmp_path, **arguments), fuse(make_trainer(kind, tmp_path, **arguments))
    logs = [timeless(trainer.evaluate()) for trainer in (fused, own)]
    assert "eval_nll_loss" in logs[0]
    assert_same_logs(*([log] for log in logs))


def soft_capped():
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=VOCAB, final_logit_softcapping=30.0, **sizes, **heads))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"alpha": 0.3}, "alpha=0.3 belongs to 'simpo' here"),
        ({"label_smoothing": 0.5}, "label_smoothing must lie in"),
        ({"make_policy": experts}, "load-balancing loss"),
        ({"make_policy": soft_capped}, "the model caps its logits"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_settings_that_this_package_does_not_take_leave_everything_to_trl(tmp_path, settings, reason, caplog):
    trainer = make_trainer(CPOTrainer, tmp_path, **settings)
    before = snapshot(trainer)
    assert snapshot(fuse(trainer)) == before
    (message,) = said(caplog)
    assert message.startswith("TRL computes everything as before")
    assert reason in message


def test_settings_changed_after_fuse_are_followed(tmp_path, calls):
    runs = []
    for wrap in (lambda trainer: trainer, fuse):
        trainer = wrap(make_trainer(CPOTrainer, tmp_path, max_steps=1))
        trainer.alpha = 0.1
        runs.append(steps(trainer))
    only(calls)
    assert_same_logs(runs[1].logs, runs[0].logs)


def lm_head_gemms(folder, wrap) -> float:
    """Return how many GEMMs of 2 N H V operations a forward and backward take: the part that grows with V."""
    operations = []
    for vocab in (VOCAB, 2 * VOCAB):
        trainer = wrap(make_trainer(CPOTrainer, folder, policy=model(vocab=vocab)))
        trainer.model.train()
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        with FlopCounterMode(display=False) as counter:
            trainer.compute_loss(trainer.model, inputs).backward()
        operations.append(counter.get_total_flops())
    tokens = sum(int((inputs[f"{side}_labels"][:, 1:] != -100).sum()) for side in ("chosen", "rejected"))
    return (operations[1] - operations[0]) / (2 * tokens * HIDDEN * VOCAB)


def test_only_completion_tokens_pass_through_the_lm_head(tmp_path):
    assert lm_head_gemms(tmp_path, fuse) == pytest.approx(3, abs=0.1)
    assert lm_head_gemms(tmp_path, lambda trainer: trainer) > 4
