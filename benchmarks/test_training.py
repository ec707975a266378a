"""Time a whole KTO or DPO training step of a small model: `pytest benchmarks/`."""

import pytest
import report_training
import torch
from conftest import DEVICE
from contenders_training import CONTENDERS, make_problem

from kto_fused.measure import synchronize

# (architecture, sequences, tokens); on a CPU all benchmarks end within five minutes
SIZE = ("Qwen2.5-0.5B", 8, 2048) if DEVICE.type == "cuda" else ("Llama 20M", 4, 64)
ROUNDS = {"rounds": 3, "warmup_rounds": 1}


@pytest.mark.parametrize("loss", ["kto", "dpo"])
@pytest.mark.parametrize("name", CONTENDERS)
def test_training_step(benchmark, loss, name):
    benchmark.group = f"{loss} training step"
    training = CONTENDERS[name](make_problem(loss, *SIZE, DEVICE))

    def step():
        loss = training.step()
        synchronize(DEVICE)
        return loss

    assert benchmark.pedantic(step, setup=training.clear_gradients, **ROUNDS).isfinite()
    training.clear_gradients()


def test_each_contender_gets_its_own_copy_of_equal_weights():
    problem = make_problem("kto", "Llama 20M", 2, 64, DEVICE)
    other = problem.with_own_models()
    for weights in zip(*(x.parameters() for x in (problem.model, problem.ref_model, other.model)), strict=True):
        assert len({weight.data_ptr() for weight in weights}) == 3
        assert all(torch.equal(weight, weights[0]) for weight in weights)


@pytest.mark.parametrize(
    ("most", "found"),
    [(10**6, 4096), (3500, 3072), (3000, 2048), (1024, 1024), (800, 768), (700, 512), (64, 64), (63, 0)],
)
def test_the_longest_sequence_is_found_from_above_and_below(most, found, monkeypatch):
    tried = []

    def fits(contender, loss, size, budget, device):
        tried.append(size.seq_len)
        return size.seq_len <= most

    monkeypatch.setattr(report_training, "fits", fits)
    plan = report_training.Plan((), 1, search=report_training.Size("Llama 20M", 2, 1024), longest=4096)
    assert report_training.longest(None, "kto", plan, DEVICE) == found
    assert len(tried) == len(set(tried))
    assert max(tried) <= 4096
