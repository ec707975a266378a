"""What a head may ask of the row pass, detached: entropy, mean logit, top-1 and the sum of squared probabilities."""

import math
from dataclasses import dataclass

import pytest
import torch
from cases import INPUTS, assert_close, assert_same_gradient, chunks_of, make_case, make_hidden_case, some
from counters import MovedBytes
from devices import HAS_GPU
from torch.autograd import gradcheck

from kto_fused import fused_linear_loss, fused_loss, heads, loss_from_logps, reference
from kto_fused.engines import logits as from_logits_engine
from kto_fused.heads import protocol
from kto_fused.heads.tokens import TokenHead

FROZEN = ("hidden",)
WPO = heads.make("sigmoid", beta=0.3, use_weighting=True)


@pytest.fixture(autouse=True)
def own_heads():
    """Heads that ask for everything; other modules' lists of losses must not hold them."""
    before = dict(protocol._CLASSES)

    @heads.register("asks of sequences")
    @dataclass(frozen=True)
    class OfSequences(heads.Head):
        is_coupled: bool = False
        needs_reference = False

        @property
        def group(self):
            return None if self.is_coupled else 1

        def losses(self, logps, counts, ref_logps, *, log_sum_squares, entropy, token_accuracy, mean_logits):
            scores = torch.exp(0.1 * log_sum_squares) + entropy * (1 + token_accuracy) + 0.3 * mean_logits
            return -logps * (scores - scores.mean() if self.is_coupled else scores)

    @heads.register("asks of tokens")
    @dataclass(frozen=True)
    class OfTokens(TokenHead):
        def losses(self, logps, counts, ref_logps, *, is_top1, mean_logits, entropy, log_sum_squares):
            return -logps * (torch.exp(log_sum_squares) + entropy * (1 + is_top1) + 0.3 * mean_logits)

    yield
    protocol._CLASSES.clear()
    protocol._CLASSES.update(before)
    protocol.from_text.cache_clear()


def head_of(name: str) -> heads.Head:
    if name == "mix":
        return heads.Mix((0.5, WPO), (2.0, heads.make("sft")), (0.1, heads.make("asks of sequences")))
    if name == "coupled":
        return heads.make("asks of sequences", is_coupled=True)
    return WPO if name == "wpo" else heads.make(name)


HEADS = ["asks of sequences", "asks of tokens", "coupled", "wpo", "mix"]
LAYOUTS = {
    "padded": {},
    "packed, transformed": {"packed": True, "temperature": 1.3, "logit_scale": 0.6, "logit_softcap": 8.0},
    "unshifted": {"shift": False},
}


def step(function, head, leaves, labels, **options):
    """Return loss and gradients of float64 or other leaves."""
    leaves = [x.detach().clone().requires_grad_(is_trained) for x, is_trained in leaves]
    bias = {"lm_head_bias": leaves[2]} if len(leaves) == 3 else {}
    loss, _ = function(head, *leaves[:2], labels, **bias, **options)
    loss.sum().backward()
    return loss.detach(), [leaf.grad for leaf in leaves if leaf.requires_grad]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", HEADS)
def test_from_logits_a_head_gets_what_plain_pytorch_finds(engine, name, layout):
    case = make_case(dtype=torch.float64, vocab=40, seed=3, **LAYOUTS[layout], device=engine[1])
    head = head_of(name)
    options = {**case.options, **({"ref_logps": torch.full((4,), -9.0)} if head.needs_reference else {})}
    options = {key: x.to(engine[1]) if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    results = []
    for function, backend in ((fused_loss, engine[0]), (reference.loss, None)):
        logits = case.logits.clone().requires_grad_()
        loss, _ = function(head, logits, case.labels, **options, backend=backend)
        loss.backward()
        results.append((loss.detach(), logits.grad))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-11, "result")


@pytest.mark.parametrize("trained", [INPUTS, FROZEN], ids=["trained", "frozen"])
@pytest.mark.parametrize("num_tokens", [None, 8, 2], ids=["one chunk", "chunks", "split sequences"])
@pytest.mark.parametrize("name", HEADS)
def test_from_hidden_states_a_head_gets_its_chunks_statistics(engine, name, num_tokens, trained):
    case = make_hidden_case(dtype=torch.float64, bias=True, vocab=40, hidden_size=6, seed=3, device=engine[1])
    head = head_of(name)
    options = {"ref_logps": torch.full((4,), -9.0, device=engine[1])} if head.needs_reference else {}
    reductions = ["mean"] if head.level == "token" or head.group is None else some(engine, ["none", "mean"])
    leaves = [(getattr(case, x), x in trained) for x in INPUTS]
    for reduction in reductions:
        results = []
        for function, backend in ((fused_linear_loss, engine[0]), (reference.linear_loss, None)):
            with chunks_of(num_tokens):
                given = {**options, "reduction": reduction, "backend": backend}
                results.append(step(function, head, leaves, case.labels, **given))
        (loss, grads), (exact, exact_grads) = results
        assert_close(loss, exact, 1e-11, "loss")
        for grad, exact_grad in zip(grads, exact_grads, strict=True):
            assert_close(grad, exact_grad, 1e-11, "gradient")


def weights_by_hand(logits, labels) -> torch.Tensor:
    """w_w w_l of each pair, in float64: the mean over tokens of log p_t - log sum_v p_v^2."""
    log_w = []
    for row, row_labels in zip(logits.double(), labels, strict=True):
        p, at = row[:-1].softmax(-1), (row_labels[1:] >= 0).nonzero().flatten()
        tokens = [math.log(p[t, row_labels[t + 1]]) - math.log(sum(x * x for x in p[t].tolist())) for t in at]
        log_w.append(sum(tokens) / max(1, len(tokens)))
    return torch.tensor(log_w, dtype=torch.float64).view(2, -1).sum(0).exp()


def test_wpo_is_the_loss_times_detached_weights(engine):
    """The gradient is that of given weights, which finite differences confirm."""
    case = make_hidden_case(dtype=torch.float64, vocab=9, hidden_size=3, seed=5, device=engine[1])
    hidden, ref_logps = case.hidden.nan_to_num(), torch.full((4,), -6.0, device=engine[1])
    weights = weights_by_hand((hidden @ case.weight.T).cpu(), case.labels.cpu()).to(engine[1])
    assert weights.min() > 0
    assert not torch.allclose(weights, torch.ones_like(weights))
    plain = heads.make("sigmoid", beta=0.3)

    def loss(hidden, weight, head=plain, **tensors):
        with chunks_of(4):
            options = {"ref_logps": ref_logps, "backend": engine[0]}
            return fused_linear_loss(head, hidden, weight, case.labels, **options, **tensors)[0]

    results = []
    for head, tensors in ((WPO, {}), (plain, {"weights": weights})):
        leaves = [x.clone().requires_grad_() for x in (hidden, case.weight)]
        value = loss(*leaves, head, **tensors)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 1e-11, "result")
    leaves = [x.clone().requires_grad_() for x in (hidden, case.weight)]
    given = {"fast_mode": engine == ("triton", "cpu")}
    assert gradcheck(lambda hidden, weight: loss(hidden, weight, weights=weights), leaves, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_wpo_in_the_dtypes_of_training(engine, dtype, reduction):
    case = make_hidden_case(dtype=dtype, vocab=300, seed=1, bias=True, device=engine[1])
    results = []
    for function, x in ((fused_linear_loss, case), (reference.linear_loss, case.map(torch.Tensor.double))):
        leaves = [(getattr(x, name), True) for name in INPUTS]
        options = {"ref_logps": torch.full((4,), -9.0, device=engine[1]), "reduction": reduction}
        options["backend"] = engine[0] if x is case else None
        with chunks_of(8 if x is case else None):
            results.append(step(function, WPO, leaves, case.labels, **options))
    (loss, grads), (exact, exact_grads) = results
    assert_close(loss, exact, 1e-4, "loss")
    for actual, expected in zip(grads, exact_grads, strict=True):
        assert_same_gradient(actual, expected, roundings=3)


# ---- under torch.compile, costs, refusals ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wpo", "asks of tokens"])
def test_compiled_whole(name):
    """Without a graph break, from logits and from hidden states."""
    head, device = head_of(name), "cuda" if HAS_GPU else "cpu"
    options = {"ref_logps": torch.full((4,), -9.0, device=device)} if head.needs_reference else {}
    cases = make_case(vocab=40, seed=3, device=device), make_hidden_case(vocab=40, seed=3, device=device)

    def step(logits, hidden, weight):
        loss, _ = fused_loss(head, logits, cases[0].labels, **options)
        return loss + fused_linear_loss(head, hidden, weight, cases[1].labels, **options)[0]

    leaves = [x.clone().requires_grad_() for x in (cases[0].logits, cases[1].hidden, cases[1].weight)]
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(*leaves)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(HAS_GPU, reason="counts what Triton's interpreter does")
@pytest.mark.parametrize("multiprocessors", [0, 132], ids=["whole rows", "split rows"])
def test_the_sum_of_squares_reads_no_logit_again(monkeypatch, multiprocessors):
    monkeypatch.setattr(from_logits_engine, "multiprocessors", lambda device: multiprocessors)
    logits, labels = torch.randn(2, 4, 16384, dtype=torch.bfloat16), torch.randint(16384, (2, 4))
    moved = MovedBytes(monkeypatch)
    fused_loss(WPO, logits, labels, ref_logps=torch.zeros(2), backend="triton")
    needed = 2 * 3 * 16384 * 2
    assert needed <= sum(moved.take()) <= 1.02 * needed


def test_log_probabilities_alone_do_not_tell_the_statistics():
    logps, given = torch.tensor([-4.0, -7.0], requires_grad=True), {"token_counts": torch.tensor([2, 3])}
    with pytest.raises(TypeError, match=r"reads the row statistics \['log_sum_squares'\].* pass them by name"):
        loss_from_logps(WPO, logps, logps.detach(), **given)
    with pytest.raises(ValueError, match=r"log_sum_squares has shape \[1\], expected \[2\]"):
        loss_from_logps(WPO, logps, logps.detach(), **given, log_sum_squares=torch.zeros(1))
    log_sum_squares = torch.tensor([-1.0, -2.0])
    results = [
        f(WPO, logps, torch.full((2,), -6.0), **given, log_sum_squares=log_sum_squares)[0]
        for f in (loss_from_logps, reference.loss_from_logps)
    ]
    weight = math.exp(-4 / 2 + 1) * math.exp(-7 / 3 + 2)
    assert results[0].item() == pytest.approx(weight * math.log1p(math.exp(-0.3 * 3)), rel=1e-6)
    assert results[1].item() == pytest.approx(results[0].item(), rel=1e-12)


def test_a_statistic_with_a_gradient_is_refused_by_name():
    logps, entropy = torch.tensor([-4.0, -7.0]), torch.ones(2, requires_grad=True)
    others = {name: torch.ones(2) for name in ("log_sum_squares", "token_accuracy", "mean_logits")}
    with pytest.raises(ValueError, match="entropy requires a gradient, but no gradient flows"):
        loss_from_logps("asks of sequences", logps, token_counts=torch.ones(2).long(), entropy=entropy, **others)
    logits, labels = torch.randn(2, 4, 9), torch.randint(9, (2, 4))
    for name in ("asks of sequences", "asks of tokens"):
        with pytest.raises(TypeError, match=r"entropy came .* but is found in the logits, without a gradient"):
            fused_loss(name, logits, labels, entropy=entropy.detach())


def test_a_head_that_asks_in_vain_is_refused():
    def register(losses, kind=heads.Head, **attributes):
        made = type("Own", (kind,), {"__module__": __name__, "losses": losses, "needs_reference": False, **attributes})
        return heads.register("own")(dataclass(frozen=True)(made))

    with pytest.raises(TypeError, match="asks for is_top1, which a sequence-level head does not get"):
        register(lambda self, logps, counts, ref_logps, *, is_top1: -logps * is_top1)
    with pytest.raises(TypeError, match="asks for token_accuracy, which a token-level head does not get"):
        register(lambda self, logps, counts, ref_logps, *, token_accuracy: -logps * token_accuracy, TokenHead)
    with pytest.raises(ValueError, match=r"not differentiable .*no gradient flows through \['entropy'\]"):
        register(lambda self, logps, counts, ref_logps, *, entropy: -entropy)

    @dataclass(frozen=True)
    class Unregistered(heads.Head):
        needs_reference = False

        def losses(self, logps, counts, ref_logps, *, entropy):
            return -logps * entropy

    with pytest.raises(ValueError, match="only a registered head gets"):
        fused_loss(Unregistered(), torch.randn(2, 4, 9), torch.randint(9, (2, 4)))


def test_a_weight_of_0_stops_an_infinite_loss():
    logps = torch.tensor([-math.inf, -3.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    given = {"token_counts": torch.full((4,), 2), "log_sum_squares": torch.full((4,), -1.0)}
    loss, _ = loss_from_logps(WPO, logps, torch.full((4,), -3.0), **given)
    loss.backward()
    assert loss.isfinite()
    assert logps.grad[[0, 2]].eq(0).all()
    assert logps.grad[[1, 3]].ne(0).all()
