"""A fused TRL trainer scores policy and reference alike, also where the reference is precomputed."""

from types import SimpleNamespace

import pytest

pytest.importorskip("trl", reason="TRL is not installed: nothing to fuse")

import torch
from datasets import Dataset
from trl_cases import (
    BATCH,
    FIRST_LOSS,
    VERSION,
    VOCAB,
    DPOTrainer,
    KTOTrainer,
    assert_no_log_ratio,
    assert_same_logs,
    both_trainers,
    equal_trainer,
    experts,
    long_data,
    model,
    only,
    precomputed,
    said,
    snapshot,
    steps,
    timeless,
    with_trained_adapter,
)

from kto_fused.integrations import trl_preference
from kto_fused.integrations.trl import fuse

pytestmark = [
    pytest.mark.usefixtures("small_machine"),
    pytest.mark.skipif(VERSION < (1, 14), reason="before TRL 1.14, TRL keeps trainers that precompute the reference"),
]


@both_trainers
@pytest.mark.parametrize(
    ("precision", "reference"),
    [
        ("float32", "live"),
        ("bf16-autocast", "live"),
        ("bf16-autocast", "precomputed"),
        ("bf16-weights", "precomputed by the policy"),
        ("fp16-weights", "precomputed by the policy"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ("float32", "precomputed by the policy"),
                ("bf16-autocast", "precomputed by the policy"),
                ("bf16-weights", "live"),
                ("fp16-weights", "live"),
            )
        ),
    ],
)
def test_equal_weights_give_log_ratios_of_exactly_0(tmp_path, kind, precision, reference):
    """That holds in training, in an evaluation before it, and in an evaluation of a dataset that is new to TRL."""
    trainer = fuse(
        equal_trainer(
            kind,
            tmp_path,
            precision,
            own_reference=reference != "precomputed by the policy",
            precompute_ref_log_probs=reference != "live",
            eval_dataset={"all": long_data(kind)},
        )
    )
    evaluations = [trainer.evaluate(), trainer.evaluate(long_data(kind, rows=3))]
    run = steps(trainer)
    for log in evaluations:
        assert_no_log_ratio(log, "eval_")
    assert_no_log_ratio(run.logs[0])
    losses = [*run.losses, evaluations[0]["eval_all_loss"], evaluations[1]["eval_loss"]]
    assert losses == pytest.approx([FIRST_LOSS[kind]] * 3, abs=1e-7)


PATHS = {
    "adapter": {"own_reference": False, "make_policy": lambda: with_trained_adapter()},
    "adapter-precomputed": {
        "own_reference": False,
        "make_policy": lambda: with_trained_adapter(),
        "precompute_ref_log_probs": True,
    },
    "experts": {"make_policy": experts},
    "experts-precomputed": {"make_policy": experts, "precompute_ref_log_probs": True},
    "checkpointing": {"gradient_checkpointing": True, "precompute_ref_log_probs": True},
    "a loss of TRL's": {"loss_weights": [-1.0], "precompute_ref_log_probs": True},
    "ld_alpha": {"ld_alpha": 0.5, "precompute_ref_log_probs": True},
    "weighting": {"use_weighting": True},
    "weighting-precomputed": {"use_weighting": True, "precompute_ref_log_probs": True},
    "ipo": {"loss_type": ["ipo"]},
    "ipo-precomputed": {"loss_type": ["ipo"], "precompute_ref_log_probs": True},
}
OF_DPO = ("a loss of TRL's", "ld_alpha", "weighting", "weighting-precomputed", "ipo", "ipo-precomputed")
KTO_SLICE = "adapter-precomputed"


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        *((DPOTrainer, path) for path in PATHS),
        (KTOTrainer, KTO_SLICE),
        *(pytest.param(KTOTrainer, path, marks=pytest.mark.full) for path in PATHS if path not in (*OF_DPO, KTO_SLICE)),
    ],
)
def test_no_setting_rounds_policy_and_reference_differently(tmp_path, kind, path):
    arguments = dict(PATHS[path])
    if path.startswith("ipo"):  # TRL computes the loss of completions without a prompt
        arguments["train_dataset"] = long_data(kind, prompt=False)
    logs = steps(fuse(equal_trainer(kind, tmp_path, **arguments))).logs
    assert_no_log_ratio(logs[0])


@both_trainers
@pytest.mark.parametrize("precomputed", [False, True])
def test_scores_stay_the_same_when_logits_are_asked_for(tmp_path, kind, precomputed):
    trainer = fuse(equal_trainer(kind, tmp_path, eval_dataset=long_data(kind), precompute_ref_log_probs=precomputed))
    trainer.compute_metrics = lambda prediction: {"size": prediction.predictions.shape[-1]}
    log = trainer.evaluate()
    assert log["eval_size"] == VOCAB
    assert_no_log_ratio(log, "eval_")


@both_trainers
def test_a_reference_synchronised_with_the_policy_gives_log_ratios_of_0(tmp_path, kind):
    trainer = fuse(
        equal_trainer(
            kind,
            tmp_path,
            train_dataset=long_data(kind, rows=3 * BATCH),
            max_steps=3,
            sync_ref_model=True,
            ref_model_sync_steps=1,
            ref_model_mixup_alpha=1.0,
        )
    )
    logs = steps(trainer).logs
    assert len({log["logps/chosen"] for log in logs[:3]}) == 3
    for log in logs[:3]:
        assert_no_log_ratio(log)


@both_trainers
@pytest.mark.parametrize(
    ("precision", "nats"),
    [("float32", 1e-4), ("bf16-autocast", 0.25), pytest.param("bf16-weights", 0.25, marks=pytest.mark.full)],
)
def test_precomputed_and_live_references_differ_only_by_the_rounding_of_other_batches(tmp_path, kind, precision, nats):
    """Another padding changes the shapes of matrix products and attention, and with them the rounding."""
    arguments = {"train_dataset": long_data(kind, rows=6 * BATCH), "precompute_ref_batch_size": 5}
    if kind is DPOTrainer:
        arguments["train_sampling_strategy"] = "random"
    trainer = fuse(equal_trainer(kind, tmp_path, precision, precompute_ref_log_probs=True, **arguments))
    differences = []
    for batch in trainer.get_train_dataloader():
        kept = [batch[name] for name in trl_preference.REF_COLUMNS if name in batch]
        live = trainer.compute_ref_log_probs(trainer.ref_model, trainer._prepare_inputs(batch))
        assert all(values.dtype == torch.float64 for values in (*kept, *live))
        differences += [(a - b).abs().max().item() for a, b in zip(kept, live, strict=True)]
    assert len(differences) == 12
    assert max(differences) < nats


@both_trainers
def test_fused_and_unfused_trainers_never_read_each_others_cache(tmp_path, kind, calls):
    long_data(kind).save_to_disk(tmp_path / "rows")
    rows = Dataset.load_from_disk(tmp_path / "rows")

    def make():
        return equal_trainer(kind, tmp_path, own_reference=False, precompute_ref_log_probs=True, train_dataset=rows)

    unfused = make()
    own = precomputed(unfused)
    unfused.evaluate(rows)
    calls.update(dict.fromkeys(calls, 0))
    trainer = fuse(make())
    fused = precomputed(trainer)
    assert calls["linear_sequence_logps"] > 0
    assert fused.keys() == own.keys()
    assert fused != own
    assert_no_log_ratio(trainer.evaluate(rows), "eval_")
    calls.update(dict.fromkeys(calls, 0))
    assert precomputed(fuse(make())) == fused
    only(calls)  # from the cache
    unfused = make()
    assert precomputed(unfused) == own
    if VERSION >= (1, 15):  # before, TRL rounds policy and reference differently
        assert_no_log_ratio(unfused.evaluate(rows), "eval_")


@both_trainers
def test_a_resumed_run_keeps_the_reference_that_it_began_with(tmp_path, kind):
    """``train`` loads the checkpoint, so ``fuse`` before it still sees the initial policy."""

    def make(name: str, **settings):
        rows = long_data(kind, rows=4 * BATCH)
        settings = {"max_steps": 4, "own_reference": False, "precompute_ref_log_probs": True, **settings}
        return fuse(equal_trainer(kind, tmp_path / name, train_dataset=rows, **settings))

    whole = make("whole", save_strategy="steps", save_steps=2)
    run = steps(whole)
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    log_history = [timeless(log) for log in resumed.state.log_history]
    for log in (*log_history, *run.logs):
        log.pop("num_tokens", None)  # TRL counts it anew
    assert_same_logs(log_history[2:4], run.logs[2:4])
    for name, parameter in resumed.model.named_parameters():
        torch.testing.assert_close(parameter, run.parameters[name])


@both_trainers
def test_a_policy_changed_after_precomputing_is_left_to_trl(tmp_path, kind, caplog):
    trainer = equal_trainer(kind, tmp_path, own_reference=False, precompute_ref_log_probs=True)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)
    before, values = snapshot(trainer), precomputed(trainer)
    assert fuse(trainer) is trainer
    assert snapshot(trainer) == before
    assert precomputed(trainer) == values
    (message,) = said(caplog)
    assert message.startswith("TRL computes everything as before: the policy's weights changed after TRL precomputed")
    assert "call fuse before training, or pass ref_model" in message


def test_fsdp_without_the_precomputed_reference_is_left_to_trl(tmp_path, caplog):
    trainer = equal_trainer(DPOTrainer, tmp_path, own_reference=False, precompute_ref_log_probs=True)
    trainer.is_fsdp_enabled = True
    trainer.accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=2)),
        parallelism_config=None,
        device=torch.device("cpu"),
    )
    before = snapshot(trainer)
    assert snapshot(fuse(trainer)) == before
    (message,) = said(caplog)
    assert "under FSDP, where TRL has dropped the reference" in message


@both_trainers
def test_a_new_dataset_after_training_is_refused_as_in_trl(tmp_path, kind):
    trainer = fuse(equal_trainer(kind, tmp_path, own_reference=False, precompute_ref_log_probs=True))
    trainer.train()
    with pytest.raises(ValueError, match="Cannot compute reference log-probs for a dataset passed to `evaluate"):
        trainer.evaluate(long_data(kind))


@both_trainers
def test_scoring_the_data_again_draws_no_random_number_and_keeps_the_mode(tmp_path, kind):
    def make_policy():
        policy = model()
        policy.config.attention_dropout = 0.5
        for layer in policy.model.layers:
            layer.self_attn.attention_dropout = 0.5
        return policy.train()

    trainer = equal_trainer(
        kind,
        tmp_path,
        make_policy=make_policy,
        own_reference=False,
        precompute_ref_log_probs=True,
        disable_dropout=False,
    )
    state = torch.get_rng_state()
    fuse(trainer)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in trainer.model.modules())


@both_trainers
def test_an_error_while_scoring_the_data_again_leaves_the_trainer_as_it_was(tmp_path, kind, monkeypatch):
    def fails(**_):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(trl_preference, "linear_sequence_logps", fails)
    trainer = equal_trainer(kind, tmp_path, precompute_ref_log_probs=True)
    before, attributes = snapshot(trainer), dict(vars(trainer))
    with pytest.raises(RuntimeError, match="the disk is full"):
        fuse(trainer)
    assert snapshot(trainer) == before
    assert vars(trainer) == attributes


def test_a_later_setting_that_leaves_the_loss_to_trl_is_refused_with_precomputed_references(tmp_path):
    trainer = fuse(equal_trainer(DPOTrainer, tmp_path, precompute_ref_log_probs=True))
    trainer.loss_weights = [-0.5]
    with pytest.raises(
        ValueError, match=r"a weight of Mix .* got -0\.5: this was set after fuse\(trainer\).*Set it before fuse"
    ):
        trainer.train()


@both_trainers
def test_deepspeed_does_not_round_precomputed_values(tmp_path, kind):
    """Under DeepSpeed, ``Trainer`` casts a batch's floats to the dtype of DeepSpeed's configuration."""
    trainer = fuse(equal_trainer(kind, tmp_path, precompute_ref_log_probs=True))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.is_deepspeed_enabled = True
    prepared = trainer._prepare_inputs(batch)
    names = [name for name in trl_preference.REF_COLUMNS if name in batch]
    assert len(names) == 2
    for name in names:
        assert prepared[name].dtype == torch.float64
        assert torch.equal(prepared[name], batch[name])


@pytest.mark.parametrize(
    ("difference", "reason"),
    [
        ("dtype", "the policy is torch.float32 and the reference torch.bfloat16, load both in one dtype"),
        ("attention", "their attn_implementation is sdpa and eager, load both with one"),
        ("full_eval", "bf16_full_eval=True rounds the weights of the policy alone, leave it out"),
    ],
)
def test_settings_that_round_policy_and_reference_differently_are_warned_of(tmp_path, difference, reason, caplog):
    settings = {"bf16_full_eval": True} if difference == "full_eval" else {}
    trainer = equal_trainer(DPOTrainer, tmp_path, **settings)
    if difference == "dtype":
        trainer.ref_model.to(torch.bfloat16)
    elif difference == "attention":
        trainer.ref_model.set_attn_implementation("eager")
    fuse(trainer)
    (message,) = said(caplog)
    assert message == f"Equal weights of policy and reference would not give a log-ratio of 0: {reason}."
