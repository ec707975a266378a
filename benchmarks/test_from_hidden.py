"""Time a KTO or DPO step from hidden states, with a trained or frozen LM head: `pytest benchmarks/`."""

import pytest
import torch
from conftest import DEVICE
from contenders_from_hidden import GEMMs, contenders, make_problem

from kto_fused.measure import synchronize

# (B, T, H, V, dtype); on a CPU all benchmarks end within five minutes
SIZE = (8, 2048, 896, 151936, torch.bfloat16) if DEVICE.type == "cuda" else (4, 64, 256, 32000, torch.float32)
CONTENDERS = contenders(DEVICE)
ROUNDS = {"rounds": 5, "warmup_rounds": 2}


@pytest.fixture(scope="module")
def inputs():
    return make_problem(*SIZE, softcap=None, device=DEVICE)


@pytest.fixture(params=["kto trained", "kto frozen", "dpo trained", "dpo frozen"])
def problem(request, inputs, benchmark):
    benchmark.group = request.param
    loss, head = request.param.split()
    return inputs.posed(loss, is_trained=head == "trained")


@pytest.mark.parametrize("name", CONTENDERS)
def test_step(benchmark, problem, name):
    def step():
        loss, _ = CONTENDERS[name](problem)
        loss.backward()
        synchronize(DEVICE)

    benchmark.pedantic(step, setup=problem.clear_gradients, **ROUNDS)
    assert problem.hidden.grad.isfinite().all()
    assert (problem.weight.grad is not None) == problem.is_trained


def test_gemms_alone(benchmark, problem):
    gemms = GEMMs(problem)

    def step():
        gemms()
        synchronize(DEVICE)

    benchmark.pedantic(step, **ROUNDS)
