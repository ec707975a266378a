"""KTO and DPO, a whole training step of a small architecture: ``pytest benchmarks/``."""

import pytest
from conftest import DEVICE
from contenders_training import CONTENDERS, make_problem

from kto_fused.measure import synchronize

# architecture, sequences, tokens: a CPU run of everything ends within five minutes
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
