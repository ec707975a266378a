"""A fused TRL trainer takes the steps and logs the values of the trainer that it was."""

import pytest

pytest.importorskip("trl", reason="TRL is not installed: nothing to fuse")

import torch
from trl_cases import (
    BATCH,
    STEPS,
    VERSION,
    DPOTrainer,
    KTOTrainer,
    assert_same_logs,
    assert_same_training,
    both_trainers,
    data,
    experts,
    make_trainer,
    only,
    said,
    since_1_14,
    since_1_15,
    steps,
    timeless,
    with_trained_adapter,
)

from kto_fused import huggingface
from kto_fused.integrations import trl_preference
from kto_fused.integrations.trl import fuse

pytestmark = pytest.mark.usefixtures("small_machine")

DPO_LOSSES = ["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "exo_pair", "nca_pair", "bco_pair"]
DPO_LOSSES += ["sppo_hard", "aot", "aot_unpaired", "discopop", "sft", "sigmoid_norm"]


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("reference", ["model", "precomputed", "lora", "lora-precomputed"])
def test_a_fused_kto_trainer_trains_and_logs_as_trls(tmp_path, loss_type, reference):
    logs = assert_same_training(
        KTOTrainer,
        tmp_path,
        loss_type=loss_type,
        desirable_weight=1.33,
        undesirable_weight=0.7,
        own_reference=reference in ("model", "precomputed"),
        lora="lora" in reference,
        precompute_ref_log_probs="precomputed" in reference,
    )
    names = {f"{kind}/{side}" for kind in ("rewards", "logps", "logits") for side in ("chosen", "rejected")}
    assert names | {"kl", "entropy", "num_tokens", "rewards/margins", "grad_norm", "loss"} < logs[0].keys()


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
def test_a_fused_dpo_trainer_trains_and_logs_as_trls(tmp_path, loss_type, calls, caplog):
    smoothing = {"robust": 0.1, "exo_pair": 1e-3, "aot": 0.1, "sigmoid": 0.2}  # TRL's sigmoid ignores it
    logs = assert_same_training(
        DPOTrainer, tmp_path, loss_type=[loss_type], label_smoothing=smoothing.get(loss_type, 0.0), beta=0.2
    )
    names = {f"{kind}/{side}" for kind in ("rewards", "logps", "logits") for side in ("chosen", "rejected")}
    names |= {"rewards/margins", "rewards/accuracies", "mean_token_accuracy", "entropy", "num_tokens", "grad_norm"}
    assert names < logs[0].keys()
    assert 0.1 < logs[0]["mean_token_accuracy"] < 0.9
    assert not said(caplog)
    only(calls, own=STEPS * 2, fused_linear_loss=STEPS, linear_sequence_logps=STEPS)


@pytest.mark.parametrize(
    ("loss_type", "reference"),
    [
        ("sigmoid", "precomputed"),
        ("sigmoid", "lora"),
        ("ipo", "lora-precomputed"),
        ("aot", "lora"),
        ("sft", "precomputed"),
    ],
)
def test_a_fused_dpo_trainer_trains_as_trls_with_any_reference(tmp_path, loss_type, reference):
    assert_same_training(
        DPOTrainer,
        tmp_path,
        loss_type=[loss_type],
        own_reference=reference == "precomputed",
        lora="lora" in reference,
        precompute_ref_log_probs="precomputed" in reference,
    )


# a function's address in a test's name would differ between the processes of a parallel run
def id_of(settings: dict) -> str:
    return str({name: getattr(value, "__name__", value) for name, value in settings.items()})


LISTS_AND_DIVERGENCES = [  # (the version of TRL since which fuse takes them over, settings)
    ((1, 9), {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    ((1, 9), {"loss_type": ["sigmoid_norm", "ipo"], "beta": 0.5}),
    ((1, 9), {"loss_weights": [0.5]}),
    ((1, 9), {"ld_alpha": 0.5, "loss_type": ["sigmoid", "sft"]}),
    ((1, 9), {"ld_alpha": 0.3, "loss_type": ["ipo"], "beta": 0.5}),
    ((1, 9), {"use_weighting": True, "loss_type": ["sigmoid", "apo_zero"]}),
    ((1, 14), {"ld_alpha": 0.5, "loss_type": ["apo_down"], "precompute_ref_log_probs": True}),
    ((1, 14), {"loss_type": ["sft", "aot"], "loss_weights": [1.0, 0.2], "precompute_ref_log_probs": True}),
    ((1, 15), {"make_policy": experts, "loss_type": ["nca_pair"]}),
    ((1, 10), {"f_divergence_type": "js_divergence", "loss_type": ["exo_pair"], "label_smoothing": 0.1}),
    ((1, 10), {"f_divergence_type": "forward_kl"}),
    ((1, 10), {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3, "loss_type": ["hinge"]}),
    ((1, 10), {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0, "loss_type": ["discopop"]}),
]


@pytest.mark.parametrize(
    "settings", [settings for since, settings in LISTS_AND_DIVERGENCES if since <= VERSION], ids=id_of
)
def test_lists_of_losses_and_f_divergences_are_one_call(tmp_path, settings, calls, caplog):
    """A list is logged as TRL logs it: the sum's value, and DPO's rewards."""
    assert_same_training(DPOTrainer, tmp_path, **settings)
    assert not said(caplog)
    assert calls["fused_linear_loss"] == STEPS
    assert not calls["linear_token_logps"]


@since_1_15
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"loss_weights": [-0.5]}, "a weight of Mix must be"),
        ({"ld_alpha": 1.5}, "ld_alpha must lie in"),
        ({"ld_alpha": 0.5, "loss_type": ["sft"]}, "which has no pairs"),
        ({"use_weighting": True, "loss_type": ["ipo"]}, "use_weighting=True stands beside loss_type=['ipo']"),
    ],
    ids=str,
)
def test_a_loss_that_only_trl_defines_is_trls_and_one_warning_says_so(tmp_path, settings, reason, calls, caplog):
    assert_same_training(DPOTrainer, tmp_path, **settings)
    (message,) = said(caplog)
    assert reason in message
    if "use_weighting" in settings:  # TRL computes everything in both trainers
        only(calls, own=STEPS * 4)
    else:
        only(calls, own=STEPS * 2, linear_token_logps=STEPS * 2)


def test_the_whole_loss_is_one_call_and_trls_head_never_runs(tmp_path, calls):
    steps(fuse(make_trainer(KTOTrainer, tmp_path)))
    only(calls, fused_linear_kto_loss=STEPS, linear_sequence_logps=3 * STEPS)
    calls.update(dict.fromkeys(calls, 0))
    steps(fuse(make_trainer(DPOTrainer, tmp_path)))
    only(calls, fused_linear_loss=STEPS, linear_sequence_logps=STEPS)


# ---- features of TRL's trainers -------------------------------------------------------------------------------------


@both_trainers
@pytest.mark.parametrize(
    "case", ["accumulation", "checkpointing", "reentrant-checkpointing", "experts", "experts-precomputed", "adapter"]
)
def test_features_of_trls_trainers_keep_working(tmp_path, kind, case):
    arguments = {
        "accumulation": {"gradient_accumulation_steps": 2},
        "checkpointing": {"gradient_checkpointing": True, "lora": True, "own_reference": False},
        "reentrant-checkpointing": {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        "experts": {"make_policy": experts, "router_aux_loss_coef": 0.3},
        "experts-precomputed": {"make_policy": experts, "precompute_ref_log_probs": True},
        "adapter": {"make_policy": with_trained_adapter, "own_reference": False},
    }
    logs = assert_same_training(kind, tmp_path, **arguments[case])
    assert ("aux_loss" in logs[0]) == case.startswith("experts")


@both_trainers
def test_a_separate_reference_leaves_the_policys_checkpointing_on(tmp_path, kind):
    """Switching checkpointing off and on at each pass would add a hook to the embeddings each time."""
    trainer = fuse(make_trainer(kind, tmp_path, gradient_checkpointing=True))
    steps(trainer)
    assert trainer.model.is_gradient_checkpointing
    assert len(trainer.model.get_input_embeddings()._forward_hooks) <= 1


def partly_frozen() -> torch.nn.Module:
    policy = with_trained_adapter()
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return policy


@both_trainers
def test_frozen_weights_of_an_adapter_stay_frozen(tmp_path, kind):
    """TRL's trainer keeps them frozen for the first step. Then its reference pass unfreezes them."""
    own_logs = steps(make_trainer(kind, tmp_path, policy=partly_frozen(), own_reference=False)).logs
    trainer = fuse(make_trainer(kind, tmp_path, policy=partly_frozen(), own_reference=False))
    logs = steps(trainer).logs
    assert_same_logs(logs[:1], own_logs[:1])
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4
    assert all("lora_B.default" in name for name in trained)


@both_trainers
def test_a_model_with_nothing_to_train_fails_as_in_trl(tmp_path, kind):
    for make in (lambda trainer: trainer, fuse):
        policy = with_trained_adapter().requires_grad_(False)
        trainer = make(make_trainer(kind, tmp_path, policy=policy, own_reference=False))
        with pytest.raises(RuntimeError, match="does not require grad"):
            trainer.train()


def test_trls_router_loss_replaces_the_models_own(tmp_path):
    """``attach`` refuses a model whose own router loss it does not know. TRL adds Mixtral's loss by its own setting."""

    def make_policy():
        policy = experts()
        del policy.router_aux_loss_coef
        return policy

    with pytest.raises(huggingface.UnsupportedModelError, match="router loss is not a known one"):
        huggingface.attach(make_policy())
    logs = assert_same_training(DPOTrainer, tmp_path, make_policy=make_policy)
    assert logs[0]["aux_loss"] > 0
    assert fuse(make_trainer(DPOTrainer, tmp_path, make_policy=make_policy)).model.config.output_router_logits


@both_trainers
def test_a_fused_trainer_evaluates_and_logs_as_trls(tmp_path, kind):
    arguments = {"eval_dataset": data(kind, rows=7), "per_device_eval_batch_size": BATCH, "eval_strategy": "steps"}
    logs = assert_same_training(kind, tmp_path, **arguments, eval_steps=2)
    assert any("eval_rewards/margins" in log for log in logs)
    own, fused = make_trainer(kind, tmp_path, **arguments), fuse(make_trainer(kind, tmp_path, **arguments))
    for trainer in (own, fused):  # compute_metrics asks for logits
        trainer.compute_metrics = lambda prediction: {"sum": float(prediction.predictions.sum())}
    assert_same_logs([timeless(fused.evaluate())], [timeless(own.evaluate())])


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("desirable", [True, False])
def test_a_batch_of_one_class_logs_no_other(tmp_path, loss_type, desirable):
    rows = data(KTOTrainer, desirable=desirable)
    logs = assert_same_training(KTOTrainer, tmp_path, loss_type=loss_type, train_dataset=rows)
    assert ("rewards/chosen" in logs[0]) is desirable
    assert ("rewards/rejected" in logs[0]) is not desirable
    assert "rewards/margins" not in logs[0]


@both_trainers
@pytest.mark.parametrize("prepared", ["reference", pytest.param("policy", marks=since_1_14)])
def test_a_model_that_accelerate_prepared_before_runs_under_autocast(tmp_path, kind, prepared, monkeypatch):
    """TRL has accelerate prepare the reference, and an evaluation before training prepares the policy."""
    autocasts = []
    for name in ("linear_sequence_logps", "fused_linear_kto_loss", "fused_linear_loss"):
        function = getattr(trl_preference, name)

        def recorded(function=function, **arguments):
            autocasts.append(torch.is_autocast_enabled("cpu"))
            return function(**arguments)

        monkeypatch.setattr(trl_preference, name, recorded)
    arguments = {"bf16": True, "eval_dataset": data(kind, rows=BATCH)}
    if prepared == "policy":
        arguments.update(precompute_ref_log_probs=True, own_reference=False)

    def trainer():
        made = make_trainer(kind, tmp_path, **arguments)
        if prepared == "policy":
            made.evaluate()
        assert "_original_forward" in vars(made.model if prepared == "policy" else made.ref_model)
        return made

    own_logs = steps(trainer()).logs
    logs = steps(fuse(trainer())).logs
    assert set(autocasts) == {True}
    for ours, theirs in zip(logs, own_logs, strict=True):
        assert ours.keys() == theirs.keys()
        for name in {"loss", "train_loss", "entropy", "logits/chosen", "logits/rejected"} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-2, abs=2e-2), name


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm", "sigmoid"])
def test_completions_without_a_prompt_train_as_in_trl(tmp_path, loss_type, calls):
    """TRL counts the first token in the length of such a completion, though nothing predicts it."""
    rows = data(DPOTrainer, prompt=False)
    assert_same_training(DPOTrainer, tmp_path, loss_type=[loss_type], beta=0.5, train_dataset=rows)
    assert calls["fused_linear_loss"] == (STEPS if loss_type == "sigmoid" else 0)
