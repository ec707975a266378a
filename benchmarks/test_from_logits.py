"""Time KTO and DPO from logits, forward, backward and both: `pytest benchmarks/`."""

import pytest
import torch
from conftest import DEVICE
from contenders_from_logits import contenders, make_problem, policy_logits

from kto_fused.measure import synchronize

# (B, T, V, dtype); on a CPU all benchmarks end within five minutes
SIZE = (8, 2048, 128256, torch.bfloat16) if DEVICE.type == "cuda" else (4, 128, 32000, torch.float32)
CONTENDERS = contenders(DEVICE)
ROUNDS = {"rounds": 5, "warmup_rounds": 1}


@pytest.fixture(scope="module", params=["kto", "dpo"])
def problem(request):
    return make_problem(request.param, *SIZE, DEVICE)


@pytest.mark.parametrize("name", CONTENDERS)
def test_forward(benchmark, problem, name):
    benchmark.group = f"{problem.loss} forward"

    def forward(logits):
        CONTENDERS[name](logits, problem)
        synchronize(DEVICE)

    benchmark.pedantic(forward, setup=lambda: ((policy_logits(problem, name),), {}), **ROUNDS)


@pytest.mark.parametrize("name", CONTENDERS)
def test_backward(benchmark, problem, name):
    benchmark.group = f"{problem.loss} backward"

    def setup():
        logits = policy_logits(problem, name)
        loss, _ = CONTENDERS[name](logits, problem)
        synchronize(DEVICE)
        return (loss, logits), {}

    def backward(loss, logits):
        (grad,) = torch.autograd.grad(loss, logits)
        synchronize(DEVICE)
        return grad

    grad = benchmark.pedantic(backward, setup=setup, **ROUNDS)
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", CONTENDERS)
def test_forward_and_backward(benchmark, problem, name):
    benchmark.group = f"{problem.loss} forward and backward"

    def both(logits):
        loss, _ = CONTENDERS[name](logits, problem)
        torch.autograd.grad(loss, logits)
        synchronize(DEVICE)

    benchmark.pedantic(both, setup=lambda: ((policy_logits(problem, name),), {}), **ROUNDS)
