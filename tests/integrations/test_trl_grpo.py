"""A fused ``GRPOTrainer`` computes TRL's losses, gradients and logged values, with fewer GEMMs."""

import pytest

pytest.importorskip("trl", reason="TRL is not installed: nothing to fuse")

import torch
from torch.utils.flop_counter import FlopCounterMode
from trl_cases import (
    HIDDEN,
    VERSION,
    VOCAB,
    assert_same_logs,
    make_grpo_trainer,
    only,
    said,
    since_1_15,
    snapshot,
    steps,
)

from kto_fused.integrations.trl import fuse

pytestmark = pytest.mark.usefixtures("small_machine")

B, PROMPT, COMPLETION = 4, 3, 6


def generated(
    trainer, is_old: bool = True, has_tools: bool = False, of_tokens: bool = False, is_corrected: bool = True
) -> dict[str, torch.Tensor]:
    """Return a batch as TRL's generation makes it: prompts padded on the left, one completion without a token.

    The old policy and the reference are the model with noise.
    """
    random = torch.Generator().manual_seed(6)
    completion_mask = (torch.arange(COMPLETION) < torch.tensor([6, 4, 0, 5])[:, None]).long()
    prompt_mask = (torch.arange(PROMPT) >= torch.tensor([0, 1, 2, 0])[:, None]).long()
    prompt_ids = torch.randint(3, VOCAB, (B, PROMPT), generator=random)
    completion_ids = torch.randint(3, VOCAB, (B, COMPLETION), generator=random)
    ids, mask = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, COMPLETION)[0]
    old_logps, ref_logps = (logps + 0.4 * torch.randn(B, COMPLETION, generator=random) for _ in range(2))
    tool_mask = (torch.rand(B, COMPLETION, generator=random) > 0.2).long()
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.randn(B, *([COMPLETION] if of_tokens else []), generator=random),
        "num_items_in_batch": torch.tensor(31),
        "ref_per_token_logps": ref_logps,
        **({"importance_sampling_ratio": torch.rand(B, COMPLETION, generator=random) + 0.5} if is_corrected else {}),
        **({"old_per_token_logps": old_logps} if is_old else {}),
        **({"tool_mask": tool_mask} if has_tools else {}),
    }


def loss_gradients_and_logs(trainer, inputs: dict[str, torch.Tensor]):
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 2
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), grads, logged


def assert_same(trainer, own, inputs: dict[str, torch.Tensor]) -> None:
    loss, grads, logged = loss_gradients_and_logs(trainer, inputs)
    own_loss, own_grads, own_logged = loss_gradients_and_logs(own, inputs)
    torch.testing.assert_close(loss, own_loss, rtol=2e-5, atol=2e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, own_grads[name], rtol=1e-4, atol=2e-6)
    assert_same_logs([logged], [own_logged])


SEQUENCE = {"importance_sampling_level": "sequence"}
OF_TOKENS = {
    "clipped": ({}, {}),
    "on-policy": ({"beta": 0.1, "temperature": 0.7}, {"is_old": False}),
    "two-sided and tools": ({"beta": 0.1, "epsilon_high": 0.5, "delta": 1.8}, {"has_tools": True}),
    "advantages of tokens": ({"beta": 0.2, "use_bias_correction_kl": False}, {"of_tokens": True}),
}
OF_VESPO = {
    "sequences and tools": ({"vespo_lambda_pos": 0.1, "vespo_k_neg": 1.5}, {"has_tools": True}),
    "on-policy": ({}, {"is_old": False, "is_corrected": False}),
}
OF_SEQUENCES = {
    "sequences": ({**SEQUENCE, "epsilon": 0.01, "delta": 1.1}, {"has_tools": True}),
    "sequences on-policy": (SEQUENCE, {"is_old": False}),
}
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", *(["luspo"] if VERSION >= (1, 10) else [])]


@pytest.mark.parametrize(
    ("loss_type", "settings", "batch"),
    [
        pytest.param(loss_type, *case, id=f"{loss_type}, {name}")
        for losses, cases in (([*LOSSES, "cispo", "sapo"], OF_TOKENS), (LOSSES, OF_SEQUENCES), (["vespo"], OF_VESPO))
        for loss_type in losses
        for name, case in cases.items()
    ],
)
def test_losses_gradients_and_logs_are_trls(tmp_path, loss_type, settings, batch, calls, caplog):
    own, fused = (make_grpo_trainer(tmp_path, loss_type=loss_type, **settings) for _ in range(2))
    inputs = generated(own, **batch)
    fuse(fused)
    assert not said(caplog)
    calls.update(dict.fromkeys(calls, 0))
    assert_same(fused, own, inputs)
    only(calls, fused_linear_loss=1, own=1)
    if "old_per_token_logps" in inputs and loss_type not in ("cispo", "sapo", "vespo"):
        assert 0 < fused._metrics["train"]["clip_ratio/region_mean"][-1] < 1
    if "importance_sampling_ratio" not in inputs:
        return
    # vLLM's correction multiplies a token's loss, but not its KL term
    for trainer in (own, fused):
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    assert_same(fused, own, inputs)
    own.model.eval(), fused.model.eval()
    with torch.no_grad():
        losses = [trainer.compute_loss(trainer.model, inputs) for trainer in (fused, own)]
    torch.testing.assert_close(*losses, rtol=2e-5, atol=2e-6)
    assert_same_logs(*([{name: x[-1] for name, x in t._metrics["eval"].items()}] for t in (fused, own)))


@since_1_15
@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "sapo", **SEQUENCE},
        {"loss_type": "vespo", "beta": 0.1},
        {"loss_type": "cispo", **SEQUENCE},
        {"beta": 0.1, **SEQUENCE},
        {"top_entropy_quantile": 0.5},
        {"off_policy_mask_threshold": 0.5},
        {"epsilon": 0.0},
    ],
    ids=str,
)
def test_a_loss_that_only_trl_defines_takes_this_packages_log_probabilities(tmp_path, settings, calls, caplog):
    own, fused = (make_grpo_trainer(tmp_path, **settings) for _ in range(2))
    inputs = generated(own)
    fuse(fused)
    (message,) = said(caplog)
    assert message.startswith("TRL computes the loss, from this package's log-probabilities")
    assert next(iter(settings)).replace("epsilon", "clip") in message
    calls.update(dict.fromkeys(calls, 0))
    assert_same(fused, own, inputs)
    only(calls, linear_token_logps=1, own=1)
    assert not calls["fused_linear_loss"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"entropy_coef": 0.1}, "entropy_coef"), ({"cast_lm_head_to_fp32": True}, "LM head has a forward of its own")],
    ids=["entropy", "head in float32"],
)
def test_what_this_package_cannot_compute_is_left_to_trl(tmp_path, settings, reason, caplog):
    trainer = make_grpo_trainer(tmp_path, **settings)
    before = snapshot(trainer)
    assert snapshot(fuse(trainer)) == before
    (message,) = said(caplog)
    assert message.startswith("TRL computes everything as before")
    assert reason in message


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.1, "loss_type": "dapo", "temperature": 0.8},
        {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 2, "max_steps": 3},
    ],
    ids=["one update", "two updates of each batch"],
)
def test_a_fused_trainer_generates_trains_and_logs_as_trls(tmp_path, settings, calls):
    """Old and reference log-probabilities are this package's too, so that TRL's head never runs."""
    own = steps(make_grpo_trainer(tmp_path, **settings))
    calls.update(dict.fromkeys(calls, 0))
    fused = steps(fuse(make_grpo_trainer(tmp_path, **settings)))
    assert not calls["own"]
    assert calls["fused_linear_loss"] == len(fused.losses)
    assert calls["linear_token_logps"] > 0
    assert_same_logs(fused.logs, own.logs)
    for name, parameter in fused.parameters.items():
        torch.testing.assert_close(parameter, own.parameters[name], rtol=1e-4, atol=2e-6)


def gemms_of_the_weight(folder, advantages: list[float]) -> float:
    """Return how many GEMMs of 2 N H V operations a trained LM head takes more than a frozen one."""
    trainer = fuse(make_grpo_trainer(folder))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = {**generated(trainer, is_old=False), "advantages": torch.tensor(advantages)}
    flops = []
    for is_trained in (True, False):
        trainer.model.lm_head.weight.requires_grad_(is_trained)
        with FlopCounterMode(display=False) as counter:
            trainer.compute_loss(trainer.model, inputs).backward()
        flops.append(counter.get_total_flops())
    tokens = int(inputs["completion_mask"].sum())
    return (flops[0] - flops[1]) / (2 * tokens * HIDDEN * VOCAB)


def test_tokens_without_a_gradient_take_no_gradient_gemm(tmp_path):
    """The GEMM of the LM head's gradient, one of three, counts the tokens whose advantage is not 0."""
    assert gemms_of_the_weight(tmp_path, [1.0, -1.0, 1.0, -1.0]) == 1
    assert gemms_of_the_weight(tmp_path, [0.0, 1.0, 0.0, 0.0]) == pytest.approx(4 / 15)
