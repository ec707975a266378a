"""Loss heads that no public function has, from hidden states: in one chunk, in several, and on a second visit."""

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from cases import INPUTS, assert_close, chunks_of, make_hidden_case, on

from kto_fused import reference
from kto_fused.engines.autograd import LossFromHidden
from kto_fused.engines.options import HiddenOptions, LogitOptions, Needs
from kto_fused.heads import base as heads
from kto_fused.heads.base import REDUCTIONS

FROZEN = ("hidden",)
# tokens in a chunk of a batch of four sequences with up to 4 completion tokens each
CHUNKS = pytest.mark.parametrize("num_tokens", [None, 6, 1], ids=["one chunk", "chunks", "split sequences"])
by_trained = pytest.mark.parametrize("trained", [INPUTS, FROZEN], ids=["trained", "frozen"])


@dataclass(frozen=True, eq=False)
class ClippedHead:
    """Each sequence alone: (margin - tanh(r / 10))^2 of the log-ratio r. Reports the log-ratios [B]."""

    group: ClassVar[int] = 1

    reduction: str
    loss_dtype: torch.dtype
    margin: float

    def losses(self, logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
        return (self.margin - torch.tanh(0.1 * (logps - ref_logps))).square()

    def report(self, logps: torch.Tensor, ref_logps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (logps - ref_logps,)

    def __call__(self, logps, token_counts, ref_logps, *tensors, num_losses=None):
        def losses(logps):
            return self.losses(logps, ref_logps, *tensors)

        value_and_grads = heads.value_and_grads(losses, logps, self.reduction, self.loss_dtype, num_losses)
        return *value_and_grads, *self.report(logps, ref_logps, *tensors)


@dataclass(frozen=True, eq=False)
class WeightedPairHead(ClippedHead):
    """Pairs with a weight each [B/2], an offset for each sequence [B] and a common scale []. Reports margins [B/2] and
    their mean [].
    """

    group: ClassVar[int] = 2

    def margins(self, logps, ref_logps, offsets):
        chosen, rejected = (logps - ref_logps + offsets).chunk(2)
        return chosen - rejected

    def losses(self, logps, ref_logps, weights, offsets, scale):
        return weights * torch.tanh(self.margin - scale * self.margins(logps, ref_logps, offsets))

    def report(self, logps, ref_logps, weights, offsets, scale):
        margins = self.margins(logps, ref_logps, offsets)
        return margins, margins.mean()


@dataclass(frozen=True, eq=False)
class UndeclaredHead:
    """Log-ratios against the batch's mean, whose gradient counts. The class says nothing about what a loss reads."""

    reduction: str
    loss_dtype: torch.dtype
    margin: float

    def losses(self, logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
        log_ratios = logps - ref_logps
        return (self.margin - torch.tanh(0.1 * (log_ratios - log_ratios.mean()))).square()

    def report(self, logps: torch.Tensor, ref_logps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (logps - ref_logps,)

    def __call__(self, logps, token_counts, ref_logps):
        assert (logps != 0).all(), "called before all log-probabilities were known"
        value_and_grads = heads.value_and_grads(
            lambda x: self.losses(x, ref_logps), logps, self.reduction, self.loss_dtype
        )
        return *value_and_grads, *self.report(logps, ref_logps)


def check_head(engine, head, tensors, trained, num_tokens, monkeypatch) -> None:
    """Compare loss, gradients and reported tensors with the head's formula on log-probabilities of autograd."""
    monkeypatch.setitem(heads.HEADS, "own", type(head))
    case = make_hidden_case(dtype=torch.float64, bias=True, **on(engine))
    ref_logps, *tensors = (x.to(engine[1]) for x in (torch.linspace(-20, -1, 4, dtype=torch.float64), *tensors))

    def inputs() -> list[torch.Tensor]:
        return [getattr(case, name).clone().requires_grad_(name in trained) for name in INPUTS]

    fused, plain = inputs(), inputs()
    logits = LogitOptions(backend=engine[0])
    needs = Needs(*(x.requires_grad for x in fused))
    options = HiddenOptions(logits, torch.float64, torch.float64, 2**30, needs=needs)
    with chunks_of(num_tokens):
        no_reference = (None, None, None)
        layout = (case.labels, None, None)
        outputs = LossFromHidden.apply(*fused, *layout, *no_reference, ref_logps, options, head, *tensors)
        loss, reported = outputs[0], outputs[-len(head.report(ref_logps, ref_logps, *tensors)) :]
        loss.sum().backward()

    hidden, weight, bias = plain
    logps = reference.linear_sequence_logps(hidden, weight, case.labels, lm_head_bias=bias)
    losses = head.losses(logps, ref_logps, *tensors)
    exact = {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}[head.reduction](losses)
    exact.sum().backward()
    assert_close(loss, exact, 1e-11, "loss")
    for actual, expected in zip(reported, head.report(logps, ref_logps, *tensors), strict=True):
        assert_close(actual, expected, 1e-11, "reported")
    for name, actual, expected in zip(INPUTS, fused, plain, strict=True):
        if name in trained:
            assert_close(actual.grad, expected.grad, 1e-11, name)


@by_trained
@CHUNKS
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_head_needs_no_more_than_its_formula(engine, trained, num_tokens, reduction, monkeypatch):
    head = ClippedHead(reduction, torch.float64, margin=0.3)
    check_head(engine, head, [], trained, num_tokens, monkeypatch)


@by_trained
@CHUNKS
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_head_that_declares_nothing_reads_the_whole_batch(engine, trained, num_tokens, reduction, monkeypatch):
    """Were it called on one chunk's sequences, or before the last chunk, its gradients would be wrong."""
    head = UndeclaredHead(reduction, torch.float64, margin=0.3)
    check_head(engine, head, [], trained, num_tokens, monkeypatch)


@by_trained
@pytest.mark.parametrize("num_tokens", [None, 10, 1], ids=["one chunk", "a chunk per pair", "split sequences"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_tensors_of_a_pair_and_of_a_sequence_follow_their_chunk(engine, trained, num_tokens, reduction, monkeypatch):
    weights, offsets = torch.tensor([0.5, 2.0]), torch.tensor([0.0, 1.0, -3.0, 2.0])
    tensors = [weights.double(), offsets.double(), torch.tensor(0.1, dtype=torch.float64)]
    head = WeightedPairHead(reduction, torch.float64, margin=0.3)
    check_head(engine, head, tensors, trained, num_tokens, monkeypatch)


def test_until_the_last_chunk_a_head_sees_its_chunks_sequences_alone(engine, monkeypatch):
    """With the divisor of the whole batch's mean; with the last chunk it sees the whole batch."""
    calls = []

    class SeenHead(ClippedHead):
        def __call__(self, logps, token_counts, ref_logps, num_losses=None):
            calls.append((len(logps), len(token_counts), len(ref_logps), num_losses, (logps != 0).all().item()))
            return super().__call__(logps, token_counts, ref_logps, num_losses=num_losses)

    head = SeenHead("mean", torch.float64, margin=math.pi)
    check_head(engine, head, [], INPUTS, 4, monkeypatch)
    assert len(calls) > 2
    assert sum(size for size, *_ in calls[:-1]) < 4
    assert all(call == (call[0], call[0], call[0], 4, True) for call in calls[:-1])
    assert calls[-1] == (4, 4, 4, None, True)
