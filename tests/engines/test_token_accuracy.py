"""The share of completion tokens that a greedy decoder would have chosen, found on the same visit as the loss."""

import math

import pytest
import torch
from cases import TRANSFORMS, by_dtype

from kto_fused import fused_dpo_loss, fused_kto_loss, fused_linear_kto_loss, linear_token_logps, reference
from kto_fused.engines import chunks as chunk_module
from kto_fused.engines import logits as from_logits

MASKED = -100
by_transform = pytest.mark.parametrize("transform", [{}, *TRANSFORMS.values()], ids=["plain", *TRANSFORMS])
# one program finds a row's maximum, or one program for each part of the row
by_split = pytest.mark.parametrize("multiprocessors", [0, 132], ids=["whole rows", "split rows"])


def accuracy(engine, logits: torch.Tensor, labels: torch.Tensor, **options) -> list[float]:
    """Return each sequence's accuracy, where position t predicts ``labels[:, t]``."""
    options = {"shift": False, "backend": engine[0], **options}
    desirable = torch.ones(len(labels), dtype=torch.bool, device=logits.device)
    ref_logps = torch.zeros(len(labels), device=logits.device)
    _, metrics = fused_kto_loss(logits, labels, desirable, ref_logps=ref_logps, **options)
    assert metrics.token_accuracy.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert not metrics.token_accuracy.requires_grad
    return metrics.token_accuracy.tolist()


@by_dtype
@by_transform
@by_split
def test_the_most_likely_tokens_count_and_the_next_best_do_not(engine, dtype, transform, multiprocessors, monkeypatch):
    monkeypatch.setattr(from_logits, "multiprocessors", lambda device: multiprocessors)
    # adjacent numbers in half precision
    order = torch.stack([torch.randperm(2500) for _ in range(8)]).view(2, 4, 2500)
    logits = torch.where(order < 2400, -3.0, (order - 2400) / 16.0).to(dtype).to(engine[1])
    first, second = logits.topk(2).indices.unbind(-1)
    labels = torch.where(torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]], device=engine[1]) == 1, first, second)
    assert accuracy(engine, logits, labels, **transform) == [0.75, 0.25]
    labels[0, 1:] = MASKED
    assert accuracy(engine, logits, labels, **transform) == [1.0, 0.25]


@by_split
def test_a_tie_counts_wherever_the_other_token_stands(engine, multiprocessors, monkeypatch):
    monkeypatch.setattr(from_logits, "multiprocessors", lambda device: multiprocessors)
    logits = torch.randn(4, 1, 2500, device=engine[1])
    labels = torch.full((4, 1), 1300, device=engine[1])
    logits[:, 0, 1300] = 9.0
    logits[0, 0, 0] = logits[1, 0, 2499] = logits[2, 0, 1299] = 9.0
    logits[3, 0, 7] = 9.0 + 2**-20
    assert accuracy(engine, logits, labels) == [1.0, 1.0, 1.0, 0.0]


@by_split
@pytest.mark.parametrize("column", [0, 1300, 2499])
def test_a_row_of_no_number_does_not_count(engine, multiprocessors, column, monkeypatch):
    monkeypatch.setattr(from_logits, "multiprocessors", lambda device: multiprocessors)
    logits = torch.randn(6, 1, 2500, device=engine[1])
    logits[:, 0, 1300] = 9.0
    logits[1, 0, column] = math.nan
    logits[2, 0, column] = math.inf
    logits[3] = -math.inf
    logits[4, 0, 1300] = -math.inf  # a banned target, among allowed tokens
    logits[5, 0, :1300] = -math.inf  # banned tokens beside the target
    labels = torch.full((6, 1), 1300, device=engine[1])
    assert accuracy(engine, logits, labels) == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_an_unchecked_label_outside_the_vocabulary_does_not_count(engine, monkeypatch):
    monkeypatch.setattr(from_logits, "check_contents", lambda *args, **kwargs: None)
    logits = torch.zeros(3, 1, 9, device=engine[1])
    assert accuracy(engine, logits, torch.tensor([[9], [-7], [8]], device=engine[1])) == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_sequence_without_completion_tokens_has_none_that_count(engine, packed):
    logits, labels = torch.zeros(2, 3, 9, device=engine[1]), torch.full((2, 3), 4, device=engine[1])
    labels[0] = MASKED
    options = {}
    if packed:
        logits, labels = logits.flatten(0, 1), labels.flatten()
        options["cu_seqlens"] = torch.tensor([0, 3, 6], dtype=torch.int32, device=engine[1])
    ref_logps = torch.zeros(2, device=engine[1])
    _, metrics = fused_dpo_loss(logits, labels, ref_logps=ref_logps, backend=engine[0], **options)
    assert metrics.token_accuracy.tolist() == [0.0, 1.0]
    assert metrics.summary()["mean_token_accuracy"].isnan()  # the mean over chosen tokens, of which there is none


# ---- from hidden states -------------------------------------------------------------------------------------------


@by_dtype
@by_transform
def test_the_most_likely_tokens_count_from_hidden_states(engine, dtype, transform, monkeypatch):
    """Where logits are folded tile by tile, the row has three tiles of columns."""
    monkeypatch.setattr(chunk_module, "TILE_LOGITS", 1)
    hidden = torch.randn(2, 4, 16, dtype=torch.float64).to(dtype).to(engine[1])
    weight = (torch.randn(2500, 16, dtype=torch.float64) / 4).to(dtype).to(engine[1])
    first, second = (hidden.double() @ weight.double().T).topk(2).indices.unbind(-1)
    labels = torch.where(torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]], device=engine[1]) == 1, first, second)
    labels[1, 3] = MASKED
    options = {"shift": False, **transform}
    logps, metrics = linear_token_logps(hidden, weight, labels, return_metrics=True, backend=engine[0], **options)
    assert metrics.is_top1.dtype == logps.dtype
    assert metrics.is_top1.tolist() == [[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    _, exact = reference.linear_token_logps(hidden.double(), weight.double(), labels, return_metrics=True, **options)
    assert torch.equal(metrics.is_top1.double(), exact.is_top1)

    desirable, options["ref_logps"] = torch.ones(2, device=engine[1]).long(), torch.zeros(2, device=engine[1])
    hidden.requires_grad_()  # so that the chunk keeps the numerators of the gradient
    _, metrics = fused_linear_kto_loss(hidden, weight, labels, desirable, backend=engine[0], **options)
    torch.testing.assert_close(metrics.token_accuracy.double().cpu(), torch.tensor([3 / 4, 1 / 3]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_ties_and_rows_of_no_number_from_hidden_states(engine, dtype, monkeypatch):
    monkeypatch.setattr(chunk_module, "TILE_LOGITS", 1)
    bias = torch.zeros(2500, dtype=dtype, device=engine[1])
    bias[[3, 1300, 2499]] = 5.0
    labels = torch.tensor([[3, 1300, 2499, 4]], device=engine[1])
    hidden, weight = (torch.zeros(n, dtype=dtype, device=engine[1]) for n in ((1, 4, 2), (2500, 2)))

    def is_top1(bias: torch.Tensor) -> list[float]:
        options = {"lm_head_bias": bias, "return_metrics": True, "shift": False, "backend": engine[0]}
        return linear_token_logps(hidden, weight, labels, **options)[1].is_top1[0].tolist()

    assert is_top1(bias) == [1.0, 1.0, 1.0, 0.0]
    for column in (0, 1300, 2499):
        for value in (math.nan, math.inf):
            assert is_top1(bias.index_fill(0, torch.tensor(column, device=engine[1]), value)) == [0.0] * 4
    assert is_top1(torch.full_like(bias, -math.inf)) == [0.0] * 4
    assert is_top1(bias.index_fill(0, torch.arange(1024, device=engine[1]), -math.inf)) == [0.0, 1.0, 1.0, 0.0]
