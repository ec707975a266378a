"""Sequences that exceed a chunk: one visit with accumulators where they fit, a second visit where they do not."""

import pytest
import torch
from cases import GRAD_TOLERANCE
from torch.utils.flop_counter import FlopCounterMode

from kto_fused import fused_linear_loss, heads, reference
from kto_fused.engines import plan
from kto_fused.engines.options import HiddenOptions, LogitOptions, Needs

V, H = 200, 32
LENGTHS = {  # completion tokens of each sequence; pairs are the halves' i-th
    "one side long": [40, 7, 12, 33, 5, 9],
    "both sides long": [50, 4, 6, 45, 3, 8],
    "empty sides": [0, 50, 70, 30, 0, 3],
    "the last pair": [3, 5, 4, 7, 6, 100],
}


@pytest.fixture(autouse=True)
def split_short_groups(monkeypatch):
    """A few tokens are worth an accumulator here, so that the cases stay small."""
    monkeypatch.setattr(plan, "SPLIT_TOKENS", 1)


def batch(lengths: list[int], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states, weight and labels of sequences with a prompt of two tokens."""
    generator = torch.Generator().manual_seed(sum(lengths))
    labels = torch.full((len(lengths), max(lengths) + 3), -100)
    for row, length in zip(labels, lengths, strict=True):
        row[2 : 2 + length] = torch.randint(V, (length,), generator=generator)
    hidden = torch.randn(*labels.shape, H, generator=generator).to(device, dtype)
    weight = (torch.randn(V, H, generator=generator) / 6).to(device, dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), labels.to(device)


def step(loss, function, lengths, dtype, device, **options):
    hidden, weight, labels = batch(lengths, dtype, device)
    bias = torch.linspace(-1, 1, V, device=device).to(dtype).requires_grad_()
    head = heads.make("ipo", use_weighting=True) if loss == "wpo" else heads.make(loss)
    if head.needs_reference:
        options["ref_logps"] = -4.0 * torch.tensor(lengths, device=device)
    if loss == "apo_zero_unpaired":
        options["desirable"] = torch.arange(len(lengths), device=device) % 2
    with FlopCounterMode(display=False) as counter:
        value, metrics = function(head, hidden, weight, labels, lm_head_bias=bias, **options)
        grads = torch.autograd.grad(value, (hidden, weight, bias))
    return value, grads, metrics, counter.get_total_flops() / (2 * sum(lengths) * H * V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("loss", ["sigmoid", "wpo", "simpo", "orpo", "apo_zero_unpaired"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_one_visit_gives_the_losss_own_gradients(engine, lengths, loss, dtype):
    backend, device = engine
    options = {"chunk_bytes": 160_000 if lengths == LENGTHS["the last pair"] else 120_000, "backend": backend}
    value, grads, metrics, units = step(loss, fused_linear_loss, lengths, dtype, device, **options)
    expected, expected_grads, expected_metrics, _ = step(loss, reference.linear_loss, lengths, dtype, device)
    assert units < 3.1, "the logits are computed once"
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics.logps, expected_metrics.logps, rtol=1e-5, atol=1e-4)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        error = (grad.double() - expected_grad.double()).norm() / expected_grad.double().norm()
        assert error < 2 * GRAD_TOLERANCE[dtype]  # scaled rows of the gradient by hidden states are rounded twice


@pytest.mark.parametrize("loss", ["sigmoid", "apo_zero_unpaired"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_token_weights_go_into_the_unscaled_gradients(lengths, loss):
    weights = torch.rand(len(lengths), max(lengths) + 3, generator=torch.Generator().manual_seed(1))
    weights[weights < 0.2] = 0
    options = {"chunk_bytes": 160_000 if lengths == LENGTHS["the last pair"] else 120_000, "token_weights": weights}
    value, grads, _, units = step(loss, fused_linear_loss, lengths, torch.float32, "cpu", **options)
    expected, expected_grads, *_ = step(
        loss, reference.linear_loss, lengths, torch.float32, "cpu", token_weights=weights
    )
    assert units < 3.1, "the logits are computed once"
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert (grad - expected_grad).norm() < 2 * GRAD_TOLERANCE[torch.float32] * expected_grad.norm()


@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_results_do_not_move_between_runs(engine, loss):
    backend, device = engine
    runs = [
        step(
            loss,
            fused_linear_loss,
            LENGTHS["one side long"],
            torch.float32,
            device,
            chunk_bytes=120_000,
            backend=backend,
        )
        for _ in range(2)
    ]
    for one, other in zip((runs[0][0], *runs[0][1]), (runs[1][0], *runs[1][1]), strict=True):
        assert torch.equal(one, other)


def test_a_loss_of_the_whole_batch_takes_the_second_visit():
    *_, units = step("aot", fused_linear_loss, LENGTHS["one side long"], torch.float32, "cpu", chunk_bytes=120_000)
    assert units == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize(("tokens", "vocab_size", "accumulators"), [(2000, 1000, 1), (2000, 40_000, 0), (200, 1000, 0)])
def test_accumulators_stay_within_the_budget_and_are_worth_their_passes(tokens, vocab_size, accumulators, monkeypatch):
    """One accumulator of 1000 x 64 numbers fits half of 1 MiB, one of 40,000 x 64 does not; 200 tokens are too few."""
    monkeypatch.undo()
    options = HiddenOptions(LogitOptions(), torch.float32, torch.float32, 2**20, needs=Needs(hidden=True, weight=True))
    weight = torch.empty(vocab_size, 64, device="meta")
    largest = plan.largest_chunk([tokens], weight, options, group=1)
    assert largest.accumulator_bytes == accumulators * vocab_size * 64 * 4
