"""Time a loss's step from hidden states, with a trained or frozen LM head: `pytest benchmarks/`."""

import pytest
import torch
from conftest import DEVICE
from contenders_from_hidden import CLIPPED_EVERY, LOSSES, GEMMs, contenders, make_problem
from report_from_hidden import HiddenTurn, exact, expect

from kto_fused.measure import synchronize

# (B, T, H, V, dtype); on a CPU all benchmarks end within five minutes
SIZE = (8, 2048, 896, 151936, torch.bfloat16) if DEVICE.type == "cuda" else (4, 64, 256, 32000, torch.float32)
CASES = [f"{loss} {head}" for loss in LOSSES for head in ("trained", "frozen")]
# compiling takes longest: two losses of a reference model stand for all
CONTENDERS = {loss: contenders(DEVICE, loss, compiled=loss in ("kto", "dpo")) for loss in LOSSES}
ROUNDS = {"rounds": 5, "warmup_rounds": 2}


@pytest.fixture(scope="module")
def inputs():
    return make_problem(*SIZE, softcap=None, device=DEVICE)


@pytest.fixture
def problem(case, inputs, benchmark):
    benchmark.group = case
    loss, head = case.split()
    return inputs.posed(loss, is_trained=head == "trained")


@pytest.mark.parametrize(("case", "name"), [(case, name) for case in CASES for name in CONTENDERS[case.split()[0]]])
def test_step(benchmark, problem, name):
    def step():
        loss, _ = CONTENDERS[problem.loss][name](problem)
        loss.backward()
        synchronize(DEVICE)

    benchmark.pedantic(step, setup=problem.clear_gradients, **ROUNDS)
    assert problem.hidden.grad.isfinite().all()
    assert (problem.weight.grad is not None) == problem.is_trained


@pytest.mark.parametrize("case", CASES)
def test_gemms_alone(benchmark, problem):
    gemms = GEMMs(problem)

    def step():
        gemms()
        synchronize(DEVICE)

    benchmark.pedantic(step, **ROUNDS)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_contender_computes_the_same_loss_and_gradients(loss):
    inputs = make_problem(4, 64, 64, 1000, torch.float32, None, DEVICE)
    problem = inputs.posed(loss, is_trained=True)
    expected = expect(problem, exact(problem))
    for name, contender in contenders(DEVICE, loss, compiled=False).items():
        turn = HiddenTurn(name, contender, problem, expected)
        turn.fresh()
        turn.step()
        errors = turn.measure_errors()
        assert max(errors.values()) < 1e-4, (name, errors)
        has_gradient = (problem.hidden.grad[:, :-1][problem.mask] != 0).any(-1)
        share = 1 - 1 / CLIPPED_EVERY if loss == "ppo-clipped" else 1.0
        assert has_gradient.double().mean() == share, name
        turn.drop()
