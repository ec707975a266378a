"""Tokens whose gradient is exactly 0 are left out of the gradient's GEMMs. Tokens of weight 0 may hold NaN."""

import math

import pytest
import torch
from cases import chunks_of
from torch.utils.flop_counter import FlopCounterMode

from kto_fused import fused_linear_loss, fused_loss, heads, linear_token_logps, loss_from_logps, reference
from kto_fused.engines import plan

B, T, V, H = 4, 5, 70, 16
N, PAIR = B * (T - 1), 2 * (T - 1)  # completion tokens of the batch and of a pair
MIX = heads.Mix((1.0, heads.make("nll")), (0.5, heads.make("simpo")))
# loss -> what its zeros are weights of
LOSSES = {
    "nll": ("nll", "tokens' losses"),
    "simpo": ("simpo", "tokens' log-probabilities"),
    "aot": ("aot", "tokens' log-probabilities"),
    "sigmoid": ("sigmoid", "pairs"),
    "mix": (MIX, "pairs"),
}
# tokens of a chunk; tokens of a group from which on it is split with accumulators, instead of a second visit; whether
# the LM head is trained; whether few rows have the weight 0
SETTINGS = {
    "one chunk, few": (None, 1, True, True),
    "one chunk, half": (None, 1, True, False),
    "one chunk, few, frozen": (None, 1, False, True),
    "one chunk, half, frozen": (None, 1, False, False),
    "chunks of pairs": (PAIR, 1, True, False),
    "split pairs": (3, 1, True, False),
    "split pairs, few": (3, 1, True, True),
    "a second visit": (3, plan.SPLIT_TOKENS, True, False),
    "split pairs, frozen": (3, plan.SPLIT_TOKENS, False, False),
}
# Triton's interpreter takes a second for each setting
INTERPRETED = {"nll": ["one chunk, few"], "sigmoid": ["split pairs", "a second visit", "split pairs, frozen"]}


def make(dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, T, H, generator=generator).to(device, dtype)
    weight = (torch.randn(V, H, generator=generator) / 4).to(device, dtype)
    return hidden, weight, torch.randint(V, (B, T), generator=generator).to(device)


def weights_of(kind: str, is_few: bool, device: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the call's weights, and which positions [B, T] have the weight 0: a few of the tokens, or half of them."""
    weights = 0.5 + torch.rand(B, T, generator=torch.Generator().manual_seed(2))
    if kind == "pairs":
        pairs = torch.tensor([1.5, 0.0])
        is_out = (pairs == 0).repeat(2)[:, None].expand(B, T).clone()
        weights, name = pairs, "weights"
    else:
        is_out = torch.zeros(B, T, dtype=torch.bool)
        is_out[:, 3 if is_few else slice(0, T // 2)] = True
        is_out[1:] &= not is_few  # one token in 16
        weights[:, 1:][is_out[:, :-1]] = 0  # the weight of the token that a position predicts
        name = "weights" if kind == "tokens' losses" else "token_weights"
    return {name: weights.to(device)}, is_out.to(device)


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_of_weight_0_may_hold_anything(engine, loss, monkeypatch):
    """Loss and gradients are the same to the bit whether such rows hold numbers, NaN or infinities."""
    backend, device = engine
    settings, dtype = list(SETTINGS), torch.float32
    if engine == ("triton", "cpu"):
        settings, dtype = INTERPRETED.get(loss, []), torch.bfloat16
    head, kind = LOSSES[loss]
    hidden, weight, labels = make(dtype, device)
    options = {"backend": backend}
    if loss in ("aot", "sigmoid"):
        options["ref_logps"] = torch.linspace(-40, -30, B, device=device)
    # one chunk, a pair in each, pairs in several chunks with accumulators or a second visit
    reductions = ["mean", "none"] if loss == "sigmoid" and backend == "torch" else ["mean"]
    runs = [(name, reduction) for name in settings for reduction in reductions]
    for name, reduction in runs:
        chunk, split_tokens, is_trained, is_few = SETTINGS[name]
        monkeypatch.setattr(plan, "SPLIT_TOKENS", split_tokens)
        weights, is_out = weights_of(kind, is_few, device)
        results = []
        for filler in (1.0, math.nan if is_trained else math.inf):
            x = hidden.masked_fill(is_out[..., None], filler).requires_grad_()
            w = weight.clone().requires_grad_(is_trained)
            with chunks_of(chunk):
                value, _ = fused_linear_loss(head, x, w, labels, reduction=reduction, **weights, **options)
                grads = torch.autograd.grad(value.sum(), [x, w] if is_trained else [x])
            results.append((value.detach(), *grads))
        assert all(map(torch.equal, *results)), f"{name}, {reduction}"
        assert not results[0][1][is_out].any(), f"{name}, {reduction}"
        assert results[0][0].isfinite().all(), f"{name}, {reduction}"
    weights, is_out = weights_of(kind, False, device)
    logits = (hidden.float() @ weight.float().T).to(dtype)
    results = []
    for filler in (1.0, math.nan):
        x = logits.masked_fill(is_out[..., None], filler).requires_grad_()
        value, _ = fused_loss(head, x, labels, **weights, **options)
        results.append((value.detach(), *torch.autograd.grad(value, x)))
    assert all(map(torch.equal, *results)), "from logits"


# ---- GEMMs ----------------------------------------------------------------------------------------------------------


def gemms(call, *inputs: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(call(), [x for x in inputs if x.requires_grad])
    return counter.get_total_flops() / (2 * N * H * V)


@pytest.mark.parametrize("chunk", [None, 3], ids=["one chunk", "several"])
@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "frozen"])
def test_sequences_and_tokens_of_weight_0_cost_no_gradient_gemms(engine, is_trained, chunk):
    """Half of the tokens have the weight 0: all take the first GEMM, and half of them the gradient's. With a frozen
    head the gradient's GEMM comes before the loss, so that only weights of tokens save it.
    """
    backend, device = engine
    hidden, weight, labels = make(torch.float32, device)
    hidden.requires_grad_()
    weight.requires_grad_(is_trained)
    losses = ["nll", "sigmoid"] if engine == ("triton", "cpu") else LOSSES  # the interpreter is slow
    visits = 3 if chunk is not None else 2  # GEMMs after the first: a second visit computes the logits again
    for loss in losses:
        head, kind = LOSSES[loss]
        weights, _ = weights_of(kind, False, device)
        options = {"ref_logps": torch.zeros(B, device=device)} if loss in ("aot", "sigmoid") else {}

        def call(head=head, weights=weights, options=options):
            return fused_linear_loss(head, hidden, weight, labels, backend=backend, **weights, **options)[0]

        with chunks_of(chunk):
            found = gemms(call, hidden, weight)
        if is_trained:
            expected = 1 + (2 if loss == "nll" else visits) / 2
        else:
            expected = 2 if kind == "pairs" and chunk is not None else 1.5
        assert found == pytest.approx(expected, abs=0.02), loss


def test_a_backward_visits_only_tokens_with_a_gradient(engine):
    """The caller's loss has no gradient for three quarters of the tokens, whose logits are not computed again."""
    backend, device = engine
    hidden, weight, labels = make(torch.float32, device)
    hidden.requires_grad_()
    weight.requires_grad_()
    takes_part = torch.zeros(B, T, device=device)
    takes_part[:, 0] = 1
    results = []
    for function, options in ((linear_token_logps, {"backend": backend}), (reference.linear_token_logps, {})):
        incoming = torch.linspace(1, 2, B * T, device=device).view(B, T) * takes_part
        logps = function(hidden, weight, labels, **options)
        results.append(torch.autograd.grad(logps, (hidden, weight), incoming))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)

    def call():
        return (linear_token_logps(hidden, weight, labels, backend=backend) * takes_part).sum()

    assert gemms(call, hidden, weight) == pytest.approx(1 + 3 / 4, abs=0.02)


# ---- nothing is trained ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_items", [0, 0.5])
@pytest.mark.parametrize("is_empty", [True, False], ids=["no tokens", "tokens"])
def test_of_no_items_loss_and_gradients_are_0(num_items, is_empty):
    """``num_items`` may be a share of one item, as that of a rank, but of none nothing is trained."""
    hidden, weight, labels = make(torch.float64, "cpu")
    labels = labels.fill_(-100) if is_empty else labels
    logps = reference.linear_token_logps(hidden, weight, labels)
    tensors = {"old_logps": logps.roll(1, -1), "advantages": torch.ones(B), "num_items": num_items}
    of_items = {"normalizer": "items"}
    losses = [heads.make(name, **of_items) for name in ("nll", "ppo", "cispo", "sapo", "gspo", "vespo")]
    losses.append(heads.Mix((1.0, losses[0]), (1.0, losses[-2])))
    for head in losses:
        given = {name: tensors[name] for name in (*head.tensor_names(), "num_items") if name in tensors}
        results = []
        for function in (fused_linear_loss, reference.linear_loss):
            x, w = (value.clone().requires_grad_() for value in (hidden, weight))
            value, _ = function(head, x, w, labels, **given)
            results.append((value.detach(), *torch.autograd.grad(value, (x, w))))
        if head.level == "token":
            results.append((loss_from_logps(head, logps, labels=labels, **given)[0],))
        for value, *grads in results:
            is_trained = num_items > 0 and not is_empty
            assert bool(value) == is_trained, head
            assert all(bool(grad.any()) == is_trained for grad in grads), head
