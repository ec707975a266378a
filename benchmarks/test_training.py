"""Time a whole KTO or DPO training step of a small model: `pytest benchmarks/`.

With every method, a step of each contender on the same batch has the same loss and gradient.
"""

import json

import pytest
import report_adapters
import report_training
import torch
from conftest import DEVICE
from contenders_training import ARCHITECTURES, CONTENDERS, METHODS, contenders_of, make_problem
from transformers import LlamaConfig

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


TINY = LlamaConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)


@pytest.mark.parametrize("method", METHODS)
def test_contenders_compute_the_same_loss_and_gradient(method, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)
    # KTO's mismatched pairs are drawn at random; of two prompts there is one way to draw them
    problem = make_problem(method, "tiny", 2 if method == "kto" else 4, 16, torch.device("cpu"))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():  # other weights of the reference, and log-probabilities that differ
        for model in filter(None, (problem.model, problem.ref_model)):
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn(weight.shape, generator=random))
    expected = None
    for name, contender in contenders_of(method).items():
        training = contender(problem.with_own_models())
        loss = training.step()
        grads = {key: weight.grad for key, weight in training.model.named_parameters()}
        if expected is None:
            expected = loss, grads
            assert min(grad.abs().max() for grad in grads.values()) > 1e-6
        torch.testing.assert_close(loss, expected[0], rtol=2e-6, atol=2e-6, msg=name)
        for key, grad in expected[1].items():
            torch.testing.assert_close(grads[key], grad, rtol=0, atol=1e-5 * grad.abs().max().item(), msg=name)


def test_the_results_of_some_cases_join_the_others(tmp_path):
    plan = report_training.PLANS["cpu"]
    report = report_training.new_report(torch.device("cpu"), plan.rounds) | {
        "settling": plan.settling,
        "longest": [{"loss": "kto"}],
        "longest_tried": plan.longest,
        "budget_mib": plan.budget / 2**20,
    }
    rows = [{"loss": "kto"}, {"loss": "sft"}]
    left_out = [{"case": report_training.title(case, plan.sizes[0])} for case in ("kto", "sft")]
    path = tmp_path / "cpu-training.json"
    path.write_text(json.dumps({**report, "rows": rows, "left_out": left_out, "date": "2000-01-01"}))
    joined = report_training.joined(dict(report), plan.of_cases(["sft"]), tmp_path)
    assert (joined["rows"], joined["left_out"], joined["longest"]) == (rows[:1], left_out[:1], report["longest"])
    assert joined["date"] == f"2000-01-01 to {report['date']}"
    assert report_training.joined(dict(report), plan, tmp_path) == report  # of all cases: nothing is kept
    path.write_text(json.dumps({**report, "torch": "1.0"}))
    with pytest.raises(ValueError, match=r"has torch '1.0', and this run .* measure all cases anew"):
        report_training.joined(dict(report), plan.of_cases(["sft"]), tmp_path)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU's memory is not the process's resident memory")
def test_the_resident_memory_of_steps_that_train_adapters_is_measured():
    plan = report_adapters.Plan("Llama 20M", sequences=2, seq_len=64)
    assert not plan.problem(False, DEVICE).model.is_gradient_checkpointing
    resident = report_adapters.in_own_process("kto-fused trainer", plan, checkpointing=True)
    assert 0 < resident < 1024
    row = report_adapters.Row("kto-fused trainer", True, 1.0, 2.0, resident)
    report = report_training.new_report(DEVICE, 1) | {"plan": vars(plan), "rows": [vars(row)]}
    assert f"| kto-fused trainer | 1 | 2 | {resident:.0f} |" in report_adapters.tables(report)


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
