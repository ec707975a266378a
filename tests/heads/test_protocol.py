"""Heads of one's own: what registration refuses, mixes, weights, tensors, torch.compile, other processes, metrics."""

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

import own_heads
import pytest
import torch
from cases import assert_close, chunks_of, make_case, make_hidden_case
from devices import HAS_GPU
from own_heads import OwnMargin, Toy
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import kto_fused
from kto_fused import FusedLinearLoss, FusedLoss, fused_linear_loss, fused_loss, heads, loss_from_logps, reference
from kto_fused.engines import plan
from kto_fused.heads import base, formula, protocol
from kto_fused.heads.formula import FormulaHead

OWN = {kind.name: kind for kind in (OwnMargin, Toy)}
for name in OWN:  # other tests of this process list what is registered
    protocol._CLASSES.pop(name, None)
B = 4
COUNTS = torch.tensor([3, 5, 4, 2])
LOGPS = torch.tensor([-2.0, -4.5, -3.0, -1.5], dtype=torch.float64)
REF_LOGPS = torch.tensor([-2.5, -4.0, -2.0, -2.0], dtype=torch.float64)
LIKED = torch.tensor([True, False, True, True])


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(protocol, "_CLASSES", {**protocol._CLASSES, **OWN})
    monkeypatch.setattr(protocol, "_tried", set())
    protocol.from_text.cache_clear()
    yield
    protocol.from_text.cache_clear()


def value_and_grad(head, *, engine=(None, "cpu"), logps=LOGPS, ref_logps=REF_LOGPS, **options):
    """Loss and gradient of ``loss_from_logps`` on the engine's device; the losses' weights differ."""
    backend, device = engine
    leaf = logps.to(device).clone().requires_grad_()
    ref_logps = ref_logps.to(device) if head.needs_reference else None
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    loss, _ = loss_from_logps(head, leaf, ref_logps, token_counts=COUNTS.to(device), backend=backend, **options)
    (loss * torch.linspace(1, 2, loss.numel(), device=device).view(loss.shape)).sum().backward()
    return loss.detach().cpu(), leaf.grad.cpu()


# ---- what registration refuses --------------------------------------------------------------------------------------


def head_of(losses, group=2, **members):
    """A frozen dataclass whose formula is ``losses(logps, counts, ref_logps)``."""
    body = {"losses": lambda self, logps, counts, ref_logps: losses(logps, counts, ref_logps), "group": group}
    return dataclass(frozen=True)(type("Own", (heads.Head,), {"__annotations__": {}, **body, **members}))


def with_method(method):
    """A frozen dataclass whose ``losses`` is ``method``."""
    return dataclass(frozen=True)(type("Own", (heads.Head,), {"losses": method}))


def losses_of_positions(self, logps, counts, ref_logps, *tensors):
    return logps


def margins(logps, ref_logps):
    chosen, rejected = (logps - ref_logps).chunk(2)
    return chosen - rejected


def in_place(logps, counts, ref_logps):
    logps -= ref_logps
    return logps.view(2, -1).sum(0)


def reference_in_place(logps, counts, ref_logps):
    ref_logps.neg_()
    return margins(logps, ref_logps)


REFUSED = {
    "a scalar": (head_of(lambda x, n, r: margins(x, r).mean()), ValueError, r"tensor of one dimension, got \[\]"),
    "no tensor": (head_of(lambda x, n, r: 0.0), ValueError, "tensor of one dimension, got float"),
    "a loss per sequence of pairs": (head_of(lambda x, n, r: x - r), ValueError, "8 losses for 8 .* expected 4"),
    "a loss per pair of sequences": (head_of(lambda x, n, r: margins(x, r), 1), ValueError, "expected 4 with group=1"),
    "no gradient": (head_of(lambda x, n, r: margins(x, r).detach()), ValueError, "not differentiable by logps"),
    "logps unread": (
        head_of(lambda x, n, r: margins(torch.zeros_like(x).requires_grad_(), r)),
        ValueError,
        "does not depend on logps",
    ),
    "its input changed": (head_of(in_place), ValueError, "changes its argument logps in place"),
    "the reference changed": (head_of(reference_in_place), ValueError, "changes its argument ref_logps in place"),
    # each of these groups reads others
    "the mean of logps": (head_of(lambda x, n, r: torch.tanh(margins(x, r) - x.mean())), ValueError, "group=2, but a"),
    "the mean of ref_logps": (
        head_of(lambda x, n, r: torch.tanh(margins(x, r) - r.mean())),
        ValueError,
        "depends on the batch's other",
    ),
    "the mean of counts": (
        head_of(lambda x, n, r: torch.tanh(margins(x, r) / n.double().mean())),
        ValueError,
        "depends on the batch's other",
    ),
    "the largest": (
        head_of(lambda x, n, r: torch.tanh(margins(x, r) - margins(x, r).max().detach())),
        ValueError,
        "depends on the batch's other",
    ),
    "sorted losses": (
        head_of(lambda x, n, r: torch.tanh(margins(x, r).sort().values)),
        ValueError,
        "a group's loss or gradient depends",
    ),
    "the number of losses": (
        head_of(lambda x, n, r: margins(x, r) / len(x)),
        ValueError,
        "depends on the batch's other",
    ),
    "neighbours": (head_of(lambda x, n, r: torch.tanh(x) * x.roll(1), 1), ValueError, "declares group=1"),
    "another level": (head_of(lambda x, n, r: x, level="word"), ValueError, "level must be 'sequence' or 'token'"),
    "another group": (head_of(lambda x, n, r: x, 3), ValueError, "group must be 1, 2 or None"),
    "another group of an instance": (
        head_of(lambda x, n, r: x, property(lambda self: 3)),
        ValueError,
        "group must be 1, 2 or None",
    ),
    "no formula": (dataclass(frozen=True)(type("Own", (heads.Head,), {})), TypeError, "must define losses"),
    "tensors by position": (with_method(losses_of_positions), TypeError, "followed by its tensors by name"),
    "other parameters": (with_method(lambda self, x, n, r: x), TypeError, "must define losses"),
    "a subclass that is no dataclass": (
        type("Own", (heads.pairs.Sigmoid,), {}),
        TypeError,
        "must be a frozen dataclass",
    ),
    "no dataclass": (type("Own", (heads.Head,), {}), TypeError, "must be a frozen dataclass"),
    "a dataclass that changes": (dataclass(type("Own", (heads.Head,), {})), TypeError, "must be a frozen dataclass"),
    "no head": (dataclass(frozen=True)(type("Own", (), {})), TypeError, "derived from kto_fused.heads.Head"),
    "a function": (lambda logps, counts, ref_logps: logps, TypeError, "decorates a class derived from"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_registration_refuses(case):
    kind, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        heads.register("own")(kind)
    assert "own" not in heads.names()


def test_a_formula_may_compute_in_float32():
    """Vectorised operations round otherwise than those on a batch's last elements."""
    heads.register("own")(head_of(lambda x, n, r: torch.exp(torch.tanh((x - r).float()) / 3).log1p() ** 1.7, 1))


@pytest.mark.parametrize(
    ("value", "message"), [(torch.ones(1), "beta is Tensor"), (None, "beta is NoneType"), ((1, None), "beta is tuple")]
)
def test_a_field_is_a_number_a_string_or_a_boolean(value, message):
    @dataclass(frozen=True)
    class Own(heads.Head):
        beta: float = field(default=value)

        def losses(self, logps, counts, ref_logps):
            return logps

    with pytest.raises(TypeError, match=message):
        heads.register("own")(Own)


def test_a_tensor_given_as_a_field_is_refused_at_the_call():
    head = OwnMargin(margin=torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"OwnMargin\.margin is Tensor"):
        loss_from_logps(head, LOGPS, REF_LOGPS, scale=torch.tensor(1.0))


def test_a_field_cannot_be_called_name():
    @dataclass(frozen=True)
    class Own(heads.Head):
        name: str = "mine"

        def losses(self, logps, counts, ref_logps):
            return logps

    with pytest.raises(ValueError, match="a field called"):
        heads.register("own")(Own)


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_is_a_string(name):
    with pytest.raises(TypeError, match="takes a name"):
        heads.register(name)(head_of(lambda x, n, r: margins(x, r)))


def test_a_name_taken_is_refused_and_kept():
    with pytest.raises(ValueError, match=r"'orpo' belongs to kto_fused.heads.pairs.ORPO"):
        heads.register("orpo")(head_of(lambda x, n, r: margins(x, r)))
    assert heads.make("orpo").beta == 0.1


def test_a_class_may_be_defined_again_and_its_new_formula_counts():
    """A notebook's cell runs twice, or a module is reloaded."""

    def defined(factor):
        @heads.register("own")
        @dataclass(frozen=True)
        class Own(heads.Head):
            group = 1

            def losses(self, logps, counts, ref_logps):
                return factor * (logps - ref_logps)

        return Own()

    once, again = (value_and_grad(defined(factor)) for factor in (1.0, 3.0))
    assert_close(again[0], 3 * once[0], 1e-12, "loss")
    assert_close(again[1], 3 * once[1], 1e-12, "gradient")


def test_a_failed_redefinition_keeps_the_class_before():
    kept = heads.register("own")(head_of(lambda x, n, r: margins(x, r)))
    with pytest.raises(ValueError, match="not differentiable"):
        heads.register("own")(head_of(lambda x, n, r: margins(x, r).detach()))
    assert type(heads.make("own")) is kept


@dataclass(frozen=True)
class Coupled(heads.Head):
    """Cannot be tried at its registration: nobody knows what ``shift`` is."""

    is_coupled: bool = True
    group = 1

    def losses(self, logps, counts, ref_logps, *, shift):
        centre = logps.mean() if self.is_coupled else 0.0
        return torch.tanh(logps - centre - shift)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_a_head_with_tensors_is_tried_at_its_first_call(is_compiled):
    """Again where a boolean among its fields changes."""
    heads.register("own")(Coupled)

    def step(head, logps):
        return loss_from_logps(head, logps, REF_LOGPS, shift=torch.zeros(B, dtype=torch.float64))[0]

    if is_compiled:
        torch.use_deterministic_algorithms(False)
        step = torch.compile(step, backend="aot_eager")
    assert step(Coupled(is_coupled=False), LOGPS).isfinite()
    with pytest.raises(Exception, match="Coupled declares group=1"):
        step(Coupled(), LOGPS)


def test_a_first_call_in_inference_mode_tries_the_head_too():
    heads.register("own")(Coupled)
    with torch.inference_mode():
        loss_from_logps(Coupled(is_coupled=False), LOGPS, REF_LOGPS, shift=torch.tensor(0.0))
        with pytest.raises(ValueError, match="Coupled declares group=1"):
            loss_from_logps(Coupled(), LOGPS, REF_LOGPS, shift=torch.tensor(0.0))


def test_a_tensor_per_pair_is_tried_as_a_tensor_per_pair():
    @heads.register("own")
    @dataclass(frozen=True)
    class Own(heads.Head):
        group = 2

        def losses(self, logps, counts, ref_logps, *, margin, offset):
            chosen, rejected = (logps - ref_logps + offset).chunk(2)
            return torch.relu(margin - chosen + rejected)

    loss, _ = value_and_grad(Own(), margin=torch.tensor([1.0, 2.0]), offset=torch.zeros(B), reduction="none")
    assert_close(loss, torch.relu(torch.tensor([1.0, 2.0]) - margins(LOGPS, REF_LOGPS)), 1e-12, "losses")


def test_making_a_loss_that_is_not_there():
    with pytest.raises(ValueError, match=r"no loss is registered as 'opro': expected one of \['alphapo'"):
        heads.make("opro")
    with pytest.raises(TypeError, match=r"orpo has no field 'gamma': expected some of \['beta', 'nll_on'\]"):
        heads.make("orpo", gamma=1.0)
    with pytest.raises(ValueError, match="beta"):
        heads.make("sigmoid", beta=0.0)
    assert list(heads.names()) == sorted(heads.names())
    with pytest.raises(TypeError, match="head must be a Head, a name of"):
        loss_from_logps(heads.pairs.ORPO, LOGPS, token_counts=COUNTS)


# ---- mixes ----------------------------------------------------------------------------------------------------------


def test_a_mix_is_the_weighted_sum_of_its_losses():
    """Also nested, with losses of single sequences, with tensors, and with a loss of weight 0."""
    parts = ((1.0, heads.make("sigmoid")), (0.2, heads.make("sft")), (0.5, heads.make("apo_zero_unpaired")))
    mix = heads.Mix(*parts[:1], (2.0, heads.Mix(*parts[1:])), (0.0, heads.make("ipo")))
    assert (mix.group, mix.needs_reference, mix.is_paired) == (2, True, True)
    assert set(mix.required_tensors()) == {"desirable"}
    assert mix.reads_batch_counts()
    total, grad = value_and_grad(mix, desirable=LIKED)
    sums = [torch.zeros(()), torch.zeros(B)]
    for weight, head in zip((1.0, 0.4, 1.0), (head for _, head in parts), strict=True):
        tensors = {"desirable": LIKED} if "desirable" in head.tensor_names() else {}
        for i, value in enumerate(value_and_grad(head, **tensors)):
            sums[i] = sums[i] + weight * value
    assert_close(total, sums[0], 1e-12, "loss")
    assert_close(grad, sums[1], 1e-12, "gradient")


def test_a_mix_reads_the_whole_batch_if_one_of_its_losses_does():
    assert heads.Mix((1.0, heads.make("sigmoid")), (1.0, heads.make("kto"))).group is None
    assert heads.Mix((1.0, heads.make("bco"))).group == 1
    assert not heads.Mix((1.0, heads.make("bco"))).is_paired


def test_mixes_are_equal_by_their_parts():
    first, second, third = (heads.Mix((1.0, heads.make("sigmoid", beta=beta))) for beta in (0.1, 0.1, 0.2))
    assert first == second
    assert hash(first) == hash(second)
    assert first != third
    assert repr(heads.Mix((0.5, heads.make("sft")))) == "Mix((0.5, ChosenNLL()))"
    mixed = heads.Mix((1.0, first), (0.5, heads.make("ppo", clip=(0.2, 0.3))), (1, heads.make("orpo", nll_on="all")))
    for mix in (first, mixed):
        assert pickle.loads(pickle.dumps(mix)) == mix
        assert protocol.from_text(protocol.to_text(mix)) == mix
    assert [term.name for _, term in mixed.terms()] == ["sigmoid", "ppo", "nll", "odds_ratio"]
    assert (mixed.level, mixed.group, mixed.is_paired, mixed.needs_reference) == ("mixed", 2, True, True)


def test_in_a_mix_only_one_ld_alpha_has_a_meaning():
    """``sft`` reads unweighted tokens there, as in TRL."""
    parts = (1.0, heads.make("sigmoid", ld_alpha=0.5)), (0.5, heads.make("sft"))
    assert [term.name for _, term in heads.Mix(*parts).terms()] == ["sigmoid", "nll"]
    assert protocol.ld_alpha_of(heads.Mix(*parts)) == 0.5
    with pytest.raises(ValueError, match=r"mixes ld_alpha=0.5 and 1.0 \(1 where a loss has no such field\)"):
        protocol.ld_alpha_of(heads.Mix(*parts, (1.0, heads.make("simpo"))))
    with pytest.raises(ValueError, match=r"ld_alpha must lie in \[0, 1\], got 1.5"):
        heads.make("ipo", ld_alpha=1.5)
    with pytest.raises(ValueError, match="weights tokens, and policy_logps are sums already"):
        loss_from_logps(heads.make("sigmoid", ld_alpha=0.5), LOGPS, REF_LOGPS)


def test_a_mix_reports_its_first_losss_rewards():
    mix = heads.Mix((1.0, heads.make("kto", beta=0.3)), (0.1, heads.make("apo_zero_unpaired")))
    _, metrics = loss_from_logps(mix, LOGPS, REF_LOGPS, desirable=LIKED)
    assert_close(metrics.rewards, 0.3 * (LOGPS - REF_LOGPS), 1e-12, "rewards")
    assert_close(metrics.reference_point, (LOGPS - REF_LOGPS).mean(), 1e-12, "reference point")


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ((), ValueError, "Mix holds no loss"),
        (("sigmoid",), TypeError, "takes \\(weight, head\\) pairs"),
        (((1.0, "sigmoid"),), TypeError, "takes \\(weight, head\\) pairs"),
        (((-1.0, heads.make("sigmoid")),), ValueError, "finite number >= 0, got -1.0"),
        (((float("nan"), heads.make("sigmoid")),), ValueError, "finite number >= 0, got nan"),
        (((True, heads.make("sigmoid")),), ValueError, "finite number >= 0, got True"),
        (((1.0, Coupled()),), TypeError, "Coupled is not registered"),
    ],
)
def test_a_mix_refuses(parts, error, message):
    with pytest.raises(error, match=message):
        heads.Mix(*parts)


@pytest.mark.parametrize("num_tokens", [None, 8], ids=["one chunk", "chunks"])
def test_a_mix_from_hidden_states_is_its_twin(engine, num_tokens):
    mix = heads.Mix((1.0, heads.make("sigmoid")), (0.2, heads.make("sft")), (0.3, heads.make("bco")))
    case = make_hidden_case(vocab=17, hidden_size=4, dtype=torch.float64, device=engine[1], seed=3)
    tensors = {"desirable": case.desirable, "delta": torch.tensor(0.1, device=engine[1])}
    tensors["weights"] = torch.tensor([0.5, 2.0], device=engine[1])
    results = []
    for function in (fused_linear_loss, reference.linear_loss):
        inputs = [x.clone().requires_grad_() for x in (case.hidden, case.weight)]
        with chunks_of(num_tokens):
            options = {"ref_hidden": case.ref_hidden, "backend": engine[0]}
            loss, _ = function(mix, *inputs, case.labels, **options, **tensors)
            loss.backward()
        results.append((loss.detach(), *(x.grad for x in inputs)))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


# ---- weights and tensors --------------------------------------------------------------------------------------------

WEIGHTED = {"sigmoid": 2, "orpo": 2, "aot": 2, "kto": 4, "apo_zero_unpaired": 4}


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_multiply_the_losses_and_a_mean_divides_by_their_number(engine, name):
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0][: WEIGHTED[name]], dtype=torch.float64)
    head, tensors = heads.make(name), {"desirable": LIKED} if WEIGHTED[name] == 4 else {}
    loss, grad = value_and_grad(head, weights=weights, engine=engine, **tensors)
    logps = LOGPS.clone().requires_grad_()
    counts = {"batch_counts": COUNTS} if head.reads_batch_counts() else {}
    losses = head.losses(logps, COUNTS, REF_LOGPS, **tensors, **counts)
    expected = (losses * weights).sum() / len(weights)
    expected.backward()
    assert_close(loss, expected, 1e-12, "loss")
    assert_close(grad, logps.grad, 1e-12, "gradient")


def test_a_weight_of_0_silences_an_infinite_loss(engine):
    """The second pair's rejected answer has probability 1."""
    logps = LOGPS.clone()
    logps[3] = 0.0
    options = {"reduction": "none", "engine": engine}
    infinite, _ = value_and_grad(heads.make("orpo"), logps=logps, **options)
    assert infinite[1] == torch.inf
    loss, grad = value_and_grad(heads.make("orpo"), logps=logps, weights=torch.tensor([1.0, 0.0]), **options)
    assert loss[1] == 0
    assert grad[[1, 3]].eq(0).all()
    assert grad[[0, 2]].isfinite().all()
    without_odds = value_and_grad(heads.make("orpo", beta=0.0), logps=logps, engine=engine)
    mix = heads.Mix((0.0, heads.make("orpo")), (1.0, heads.make("sft")))
    for actual in (without_odds, value_and_grad(mix, logps=logps, engine=engine)):
        torch.testing.assert_close(actual, value_and_grad(heads.make("sft"), logps=logps, engine=engine))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.tensor([1.0, -0.5]), "weights must be >= 0, got -0.5"),
        (torch.tensor([1.0, torch.nan]), "weights must be >= 0, got nan"),
        (torch.ones(4), r"weights has shape \[4\], expected \[2\], one per loss"),
        (torch.tensor(1.0), r"weights has shape \[\], expected \[2\], one per loss"),
    ],
)
def test_weights_that_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        loss_from_logps("sigmoid", LOGPS, REF_LOGPS, weights=weights)


def test_tensors_are_named_where_unknown_missing_or_misshapen():
    def refused(error, message, name="bco", **tensors):
        with pytest.raises(error, match=message):
            loss_from_logps(name, LOGPS, REF_LOGPS, **tensors)

    refused(TypeError, r"needs the tensors \['desirable', 'delta'\]")
    refused(TypeError, r"needs the tensors \['delta'\]", desirable=LIKED)
    refused(TypeError, "takes no tensor 'shift': expected some of", desirable=LIKED, shift=LIKED)
    refused(ValueError, r"delta has shape \[3\]", desirable=LIKED, delta=torch.zeros(3))
    refused(ValueError, "desirable must hold 0 or 1, got 2", desirable=torch.tensor([0, 1, 2, 1]), delta=0.0)
    refused(TypeError, "desirable", desirable=LIKED.double(), delta=0.0)
    refused(ValueError, r"desirable has shape", desirable=LIKED[:2], delta=0.0)
    refused(TypeError, "z0 has no meaning for reference_point='batch_mean'", "kto", desirable=LIKED, z0=0.5)
    head = heads.make("kto", reference_point="tensor")
    refused(TypeError, "needs the tensor z0", head, desirable=LIKED)
    with pytest.raises(ValueError, match="even batch"):
        loss_from_logps("sigmoid", LOGPS[:3], REF_LOGPS[:3])


@pytest.mark.parametrize("weights", [{}, {"weights": torch.ones(B)}], ids=["kernel", "formula"])
def test_a_tensor_of_one_number_is_a_scalar(weights):
    """To the kernel of KTO, to its formula, and to losses of tokens."""
    head = heads.make("kto", reference_point="tensor")
    results = [
        value_and_grad(head, desirable=LIKED, z0=z0, **weights) for z0 in (torch.tensor(0.2), torch.tensor([0.2]))
    ]
    torch.testing.assert_close(*results)
    case = make_case(vocab=17)
    tensors = {"old_logps": torch.tensor([-3.0]), "advantages": torch.tensor([2.0]), "num_items": torch.tensor([7.0])}
    scalars = {name: value[0] for name, value in tensors.items()}
    losses = [fused_loss("dapo", case.logits, case.labels, **given)[0] for given in (tensors, scalars)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", ["bco", "kto", "apo_zero_unpaired"])
def test_desirable_may_hold_integers(name):
    delta = {"delta": torch.tensor(0.1)} if name == "bco" else {}
    plain = value_and_grad(heads.make(name), desirable=LIKED, **delta)
    for dtype in (torch.uint8, torch.int64):
        torch.testing.assert_close(value_and_grad(heads.make(name), desirable=LIKED.to(dtype), **delta), plain)


@pytest.mark.parametrize("name", ["ipo", "simpo", "orpo", "sft", "cpo"])
def test_a_loss_that_reads_lengths_asks_for_them(name):
    ref_logps = REF_LOGPS if heads.make(name).needs_reference else None
    with pytest.raises(ValueError, match="reads the completions' lengths: pass token_counts"):
        loss_from_logps(name, LOGPS, ref_logps)
    with pytest.raises(ValueError, match="token_counts must be >= 0"):
        loss_from_logps(name, LOGPS, ref_logps, token_counts=-COUNTS)


def test_a_reference_comes_if_and_only_if_a_loss_reads_it():
    with pytest.raises(ValueError, match="ref_logps must be log-probabilities"):
        loss_from_logps("sigmoid", LOGPS)
    with pytest.raises(ValueError, match="ref_logps must be None"):
        loss_from_logps("orpo", LOGPS, REF_LOGPS, token_counts=COUNTS)
    case = make_case(vocab=7)
    with pytest.raises(ValueError, match="expected exactly one of ref_logits and ref_logps, got neither"):
        fused_loss("sigmoid", case.logits, case.labels)
    both = {"ref_logits": case.logits, "ref_logps": torch.zeros(4)}
    with pytest.raises(ValueError, match="expected at most one of ref_logits and ref_logps, got both"):
        fused_loss(lambda logps, counts, ref_logps: logps, case.logits, case.labels, **both)


def test_reductions():
    each, _ = value_and_grad(heads.make("sigmoid"), reduction="none")
    assert each.shape == (2,)
    assert_close(value_and_grad(heads.make("sigmoid"), reduction="sum")[0], each.sum(), 1e-12, "sum")
    assert_close(value_and_grad(heads.make("sigmoid"), reduction="mean")[0], each.mean(), 1e-12, "mean")
    with pytest.raises(ValueError, match="reduction='none' has no meaning for AOT"):
        value_and_grad(heads.make("aot"), reduction="none")
    each, grads = value_and_grad(heads.make("kto"), desirable=LIKED, reduction="none")  # its kernel has it
    expected, _ = kto_fused.kto_loss_from_logps(LOGPS, REF_LOGPS, LIKED, reduction="none")
    torch.testing.assert_close(each, expected)
    assert grads.ne(0).all()
    with pytest.raises(ValueError, match="reduction"):
        value_and_grad(heads.make("sigmoid"), reduction="median")


# ---- one class in one file ------------------------------------------------------------------------------------------


def test_a_class_of_ones_own_takes_three_gemms_at_any_length(engine, monkeypatch):
    """Two with a frozen LM head. Its twin's numbers come from one chunk, several, and pairs that exceed their chunk."""
    monkeypatch.setattr(plan, "SPLIT_TOKENS", 1)  # a few tokens are worth an accumulator here
    case = make_hidden_case(vocab=101, hidden_size=32, dtype=torch.float64, device=engine[1], seed=3)
    ref_logps, num_tokens = REF_LOGPS.to(engine[1]), (case.labels[:, 1:] != -100).sum().item()
    for is_trained, expected in ((True, 3), (False, 2)):
        for chunk in (None, 8, 3):
            results = []
            for function in (fused_linear_loss, reference.linear_loss):
                hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_(is_trained)
                with chunks_of(chunk), FlopCounterMode(display=False) as counter:
                    options = {"ref_logps": ref_logps, "backend": engine[0]}
                    loss, _ = function(heads.make("toy", beta=0.3), hidden, weight, case.labels, **options)
                    loss.backward()
                results.append([loss.detach(), hidden.grad, *([weight.grad] if is_trained else [])])
                if function is fused_linear_loss:
                    gemms = counter.get_total_flops() / (2 * num_tokens * weight.numel())
            torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
            assert gemms == pytest.approx(expected, rel=0.02), (is_trained, chunk)


def test_a_class_of_ones_own_keeps_its_numbers_under_autocast():
    case = make_hidden_case(vocab=17, hidden_size=4, seed=3)
    results = []
    for function in (fused_linear_loss, reference.linear_loss):
        hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = function("toy", hidden, weight, case.labels, ref_logps=REF_LOGPS)
        loss.backward()
        results.append(loss.detach())
        assert hidden.grad.isfinite().any()
        assert weight.grad.isfinite().all()
    torch.testing.assert_close(*results)


def test_a_call_reads_no_signature(monkeypatch):
    """Which would take a fifth of a small call."""
    case = make_case(vocab=17)

    def step():
        return fused_loss(Toy(), case.logits, case.labels, ref_logps=REF_LOGPS)[0]

    expected = step()
    monkeypatch.setattr(protocol.inspect, "signature", None)
    assert torch.equal(step(), expected)


# ---- what is not registered -----------------------------------------------------------------------------------------


def squared_margin(logps, counts, ref_logps, *, scale):
    return torch.relu(1.0 - scale * margins(logps, ref_logps)) ** 2


@dataclass(frozen=True)
class Unregistered(OwnMargin):
    pass


@dataclass(frozen=True)
class UnregisteredORPO(heads.pairs.ORPO):
    """Reads the lengths of the whole batch."""


@pytest.mark.parametrize("weights", [{}, {"weights": torch.tensor([0.5, 2.0])}], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", ["function", "head", "head of lengths"])
def test_what_is_not_registered_equals_what_is(kind, weights):
    own, registered = {
        "function": (squared_margin, OwnMargin()),
        "head": (Unregistered(), OwnMargin()),
        "head of lengths": (UnregisteredORPO(), heads.make("orpo")),
    }[kind]
    tensors = {**weights, **({"scale": torch.tensor(0.5)} if registered.needs_reference else {})}
    case = make_case(vocab=17, dtype=torch.float64, seed=3)
    hidden = make_hidden_case(vocab=17, hidden_size=4, dtype=torch.float64, seed=3)
    ref = {"ref_logps": REF_LOGPS} if registered.needs_reference else {}
    calls = {
        "logits": lambda head, x: fused_loss(head, x, case.labels, **ref, **tensors),
        "hidden": lambda head, x: fused_linear_loss(head, x, hidden.weight, hidden.labels, **ref, **tensors),
        "logps": lambda head, x: loss_from_logps(head, x, **ref, token_counts=COUNTS, **tensors),
        "twin": lambda head, x: reference.loss(head, x, case.labels, **ref, **tensors),
    }
    leaves = {"logits": case.logits, "twin": case.logits, "hidden": hidden.hidden.nan_to_num(), "logps": LOGPS}
    for name, call in calls.items():
        results = []
        for head in (own, registered):
            leaf = leaves[name].clone().requires_grad_()
            loss = call(head, leaf)[0]
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_an_unregistered_head_is_told_about_its_reference_and_its_tensors():
    with pytest.raises(ValueError, match="needs_reference=True"):
        loss_from_logps(Unregistered(), LOGPS, scale=torch.tensor(1.0))
    with pytest.raises(TypeError, match="needs the tensors \\['scale'\\]"):
        loss_from_logps(Unregistered(), LOGPS, REF_LOGPS)
    with pytest.raises(ValueError, match="weights must be >= 0"):
        loss_from_logps(squared_margin, LOGPS, REF_LOGPS, scale=1.0, weights=torch.tensor([1.0, -1.0]))
    with pytest.raises(TypeError, match="weights must be a tensor, got list"):
        loss_from_logps(squared_margin, LOGPS, REF_LOGPS, scale=1.0, weights=[1.0, 1.0])


@pytest.mark.parametrize("base_name", ["sigmoid", "kto"])
def test_a_subclass_of_a_loss_with_a_kernel_has_its_own_formula(base_name):
    kind = protocol._CLASSES[base_name]

    @heads.register("own")
    @dataclass(frozen=True)
    class Own(kind):
        def losses(self, logps, counts, ref_logps, **tensors):
            return 3 * super().losses(logps, counts, ref_logps, **tensors)

        if base_name == "kto":

            def losses(self, logps, counts, ref_logps, *, desirable, z0=None):
                return 3 * kind.losses(self, logps, counts, ref_logps, desirable=desirable, z0=z0)
        else:

            def losses(self, logps, counts, ref_logps):
                return 3 * kind.losses(self, logps, counts, ref_logps)

    case = make_case(vocab=17, dtype=torch.float64)
    tensors = {"desirable": LIKED} if base_name == "kto" else {}
    own, plain = (
        fused_loss(head, case.logits, case.labels, ref_logps=REF_LOGPS, **tensors)[0] for head in (Own(), kind())
    )
    assert_close(own, 3 * plain, 1e-12, "loss")


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    torch.use_deterministic_algorithms(False)  # torch.compile has a guard on this setting
    torch._dynamo.reset()


def counting(compilations: list):
    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    return backend


COMPILED = {
    "orpo": (heads.make("orpo"), {}),
    "kto": (heads.make("kto"), {"desirable": LIKED}),
    "own": (OwnMargin(), {"scale": torch.tensor(0.5)}),
    "weighted": (heads.make("sigmoid"), {"weights": torch.tensor([0.5, 2.0])}),
    "mix": (heads.Mix((1.0, heads.make("ipo")), (0.5, heads.make("sft"))), {}),
    "a name": ("simpo", {}),
    "a function": (squared_margin, {"scale": torch.tensor(0.5)}),
    "not registered": (Unregistered(), {"scale": torch.tensor(0.5)}),
}


@pytest.mark.parametrize("case", COMPILED)
@pytest.mark.parametrize("kind", ["logits", "hidden", "logps"])
def test_a_loss_compiles_as_one_graph_and_gives_the_same_numbers(compiler, kind, case):
    head, tensors = COMPILED[case]
    needs_reference = getattr(protocol.as_loss(head), "needs_reference", True)
    ref = {"ref_logps": REF_LOGPS} if needs_reference else {}
    logits, hidden = make_case(vocab=17), make_hidden_case(vocab=17, hidden_size=4)
    leaf = {"logits": logits.logits, "hidden": hidden.hidden.nan_to_num(), "logps": LOGPS}[kind]

    def step(x):
        if kind == "logits":
            loss, metrics = fused_loss(head, x * 1, logits.labels, **ref, **tensors)
        elif kind == "hidden":
            loss, metrics = fused_linear_loss(head, x * 1, hidden.weight, hidden.labels, **ref, **tensors)
        else:
            loss, metrics = loss_from_logps(head, x * 1, **ref, token_counts=COUNTS, **tensors)
        return loss * 3, metrics.summary()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = leaf.clone().requires_grad_()
        loss, summary = function(x)
        loss.backward()
        results.append((loss.detach(), x.grad, summary))
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize(("name", "tensor"), [("bco", "delta"), ("kto", "z0")])
def test_a_tensor_that_anneals_compiles_nothing_anew(compiler, name, tensor):
    head, compilations = heads.make(name, **({"reference_point": "tensor"} if name == "kto" else {})), []

    @torch.compile(fullgraph=True, backend=counting(compilations))
    def step(logps, value):
        return loss_from_logps(head, logps, REF_LOGPS, desirable=LIKED, **{tensor: value})[0]

    losses = [step(LOGPS, torch.tensor(value, dtype=torch.float64)) for value in (0.0, 0.1, 0.2, 0.3)]
    assert len(compilations) == 1
    assert len(set(losses)) == 4


@pytest.mark.parametrize("name", ["toy", "bco", "aot", "ipo"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_operator_is_well_formed(compiler, engine, name, reduction):
    head, device = heads.make(name, **({"use_weighting": True} if name == "ipo" else {})), engine[1]
    if head.group is None and reduction == "none":
        reduction = "sum"
    tensors = [LIKED.to(device), torch.tensor(0.1, device=device)] if name == "bco" else []
    names = "desirable,delta" if name == "bco" else ""
    ref_logps = REF_LOGPS.to(device) if head.needs_reference else None
    statistics = [-torch.ones_like(LOGPS, device=device) for _ in head.statistics()]
    arguments = (LOGPS.to(device), COUNTS.to(device), ref_logps, tensors, COUNTS.to(device), statistics)
    settings = (protocol.to_text(head), names, engine[0], reduction, 3, torch.float32)
    torch.library.opcheck(formula._formula.op, (*arguments, *settings))


def test_a_loss_in_inference_mode_under_autocast_and_without_gradient():
    case = make_case(vocab=17)
    expected = fused_loss("orpo", case.logits, case.labels)[0]
    for mode in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            assert torch.equal(fused_loss("orpo", case.logits, case.labels)[0], expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_the_loss_may_hold_its_first_call(use_reentrant):
    """The trial of a head at its first call must not count among what the checkpoint saves."""
    lm_head, hidden = torch.nn.Linear(4, 17, bias=False), torch.randn(4, 5, 4)
    labels, scale = torch.randint(17, (4, 5)), torch.tensor(0.5)

    def step(x):
        return fused_loss(OwnMargin(), lm_head(x), labels, ref_logps=REF_LOGPS, scale=scale)[0]

    grads = []
    for is_checkpointed in (True, False):
        x = hidden.clone().requires_grad_()
        loss = checkpoint(step, x, use_reentrant=use_reentrant) if is_checkpointed else step(x)
        loss.backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


# ---- other processes ------------------------------------------------------------------------------------------------


def test_a_worker_finds_a_head_again_by_its_module():
    """A pickled head, and one known by the operator's string alone, in a process started with ``spawn``."""
    head = OwnMargin(margin=2.0, kind="plain")
    assert pickle.loads(pickle.dumps(head)) == head
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as workers:
        assert workers.submit(protocol.from_text, protocol.to_text(head)).result() == head
        assert workers.submit(own_heads.loss_of, head).result() == own_heads.loss_of(head)


def test_a_module_that_does_not_register_its_head_is_named():
    text = protocol.to_text(OwnMargin()).replace("own margin", "own other").replace("own_heads", "json")
    with pytest.raises(ValueError, match="'own other', not even by its module json: register it there"):
        protocol.from_text(text)


def test_fields_of_every_kind_survive_the_way_through_a_string():
    @heads.register("own")
    @dataclass(frozen=True)
    class Own(heads.Head):
        numbers: tuple = (1, 0.1, float("inf"), -float("inf"), 1e-300, True, "it's")
        count: int = 3
        computed: float = field(init=False, default=0.0)

        def __post_init__(self):
            object.__setattr__(self, "computed", self.count / 2)

        def losses(self, logps, counts, ref_logps, *, weights):
            return logps * weights.sum()

    for head in (Own(), Own(count=4), Own(numbers=()), heads.Mix((0.5, Own()), (1.0, heads.Mix((2.0, Own()))))):
        assert protocol.from_text(protocol.to_text(head)) == head


@pytest.mark.parametrize("head", [OwnMargin(0.5, "plain"), heads.make("kto", reference_point=1), heads.make("sft")])
def test_a_head_survives_the_way_through_a_string(head):
    assert protocol.from_text(protocol.to_text(head)) == head


# ---- metrics --------------------------------------------------------------------------------------------------------


def test_what_a_head_reports_is_logged_by_its_names():
    _, metrics = loss_from_logps(OwnMargin(), LOGPS, REF_LOGPS, scale=torch.tensor(0.5))
    assert_close(metrics.rewards, 2 * (LOGPS - REF_LOGPS), 1e-12, "rewards")
    assert metrics.reported.keys() == {"margins", "scale"}
    summary = metrics.summary()
    assert summary["margins"] == margins(LOGPS, REF_LOGPS).mean()
    assert summary["scale"] == 0.5
    assert summary["rewards/margins"] == 2 * margins(LOGPS, REF_LOGPS).mean()


SIDES = {f"{name}/{side}" for name in ("rewards", "logps") for side in ("chosen", "rejected")}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ipo", {*SIDES, "rewards/margins", "rewards/accuracies"}),
        ("aot", {*SIDES, "rewards/margins", "rewards/accuracies"}),
        ("kto", {*SIDES, "rewards/margins", "kl"}),
        ("bco", {*SIDES, "rewards/margins", "delta"}),
        ("single", {"rewards", "logps"}),
    ],
)
def test_the_names_that_are_logged(name, expected):
    heads.register("single")(head_of(lambda x, n, r: torch.tanh(x - r), 1))
    tensors = {"desirable": LIKED} if name in ("kto", "bco") else {}
    tensors |= {"delta": torch.tensor(0.1)} if name == "bco" else {}
    _, metrics = loss_from_logps(name, LOGPS, REF_LOGPS, token_counts=COUNTS, **tensors)
    assert metrics.summary().keys() == expected
    assert not any(value.requires_grad for value in metrics.summary().values())


def test_gathered_metrics_keep_pairs_together():
    """As if two ranks held the same sequences."""
    _, metrics = loss_from_logps(OwnMargin(), LOGPS, REF_LOGPS, scale=torch.tensor(0.5))
    gathered = metrics.gathered(lambda rows: torch.cat([rows, rows]))
    chosen, rejected = LOGPS.chunk(2)
    assert torch.equal(gathered.logps, torch.cat([chosen, chosen, rejected, rejected]))
    assert torch.equal(gathered.reported["margins"], metrics.reported["margins"].repeat(2))
    assert gathered.reported["scale"] == 0.5
    torch.testing.assert_close(gathered.summary(), metrics.summary())


def test_the_module_keeps_a_head_and_its_options():
    case = make_case(vocab=17)
    module = FusedLoss(OwnMargin(2.0), temperature=0.7)
    tensors = {"ref_logps": REF_LOGPS, "scale": torch.tensor(0.5)}
    expected = fused_loss(OwnMargin(2.0), case.logits, case.labels, temperature=0.7, **tensors)[0]
    assert torch.equal(module(case.logits, case.labels, **tensors)[0], expected)
    assert repr(module) == "FusedLoss(OwnMargin(margin=2.0, kind='squared'), temperature=0.7)"
    hidden = make_hidden_case(vocab=17, hidden_size=4)
    linear, inputs = FusedLinearLoss("orpo", chunk_bytes=2**20), (hidden.hidden, hidden.weight, hidden.labels)
    assert torch.equal(linear(*inputs)[0], fused_linear_loss("orpo", *inputs)[0])
    with pytest.raises(TypeError, match="no option 'temprature'"):
        FusedLoss("orpo", temprature=0.7)
    with pytest.raises(ValueError, match="no loss is registered as 'opro'"):
        FusedLoss("opro")


# ---- the kernels of KTO and DPO -------------------------------------------------------------------------------------

KERNELS = {
    **{name: {} for name in ("sigmoid", "hinge", "ipo", "apo_zero", "apo_down", "simpo", "kto", "kto_squared")},
    "robust": {"label_smoothing": 0.2},
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_kernel_agrees_with_its_plain_formula(engine, name, reduction, monkeypatch):
    head = heads.make(name, **KERNELS[name], **({"reference_point": 0.2} if name.startswith("kto") else {}))
    case = make_case(vocab=17, device=engine[1], seed=4)
    tensors = {"desirable": case.desirable} if name.startswith("kto") else {}
    ref = {"ref_logits": case.ref_logits} if head.needs_reference else {}
    assert head.fast_options(tensors) is not None
    results = []
    for is_fast in (True, False):
        if not is_fast:
            monkeypatch.setattr(type(head), "fast_options", lambda self, tensors: None)
        logits = case.logits.clone().requires_grad_()
        options = {"reduction": reduction, "backend": engine[0]}
        loss, metrics = fused_loss(head, logits, case.labels, **ref, **tensors, **options)
        (loss * torch.linspace(1, 2, loss.numel(), device=loss.device).view(loss.shape)).sum().backward()
        results.append((loss.detach(), logits.grad, metrics.summary()))
    exact = engine[0] == "torch"  # one formula in the same PyTorch operations, but for the order of its factors
    torch.testing.assert_close(*results, rtol=1e-6 if not exact else 1e-7, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize(("name", "kernel"), [("kto", "_kto"), ("ipo", "_dpo"), ("orpo", "_formula")])
def test_a_loss_runs_its_own_operator_once(name, kernel, monkeypatch):
    from kto_fused.heads import preference

    calls = []
    for module, operator in ((preference, "_kto"), (preference, "_dpo"), (formula, "_formula")):
        run = getattr(module, operator)
        monkeypatch.setattr(
            module, operator, lambda *args, run=run, operator=operator: (calls.append(operator), run(*args))[1]
        )
    case = make_case(vocab=17)
    ref = {"ref_logits": case.ref_logits} if name != "orpo" else {}
    fused_loss(name, case.logits, case.labels, **ref, **({"desirable": case.desirable} if name == "kto" else {}))
    assert calls == [kernel]


def launches_of(monkeypatch, step) -> list[str]:
    """The names of the Triton kernels that ``step`` launches in the interpreter."""
    from triton.runtime import interpreter

    names, run = [], interpreter.InterpretedFunction.run

    def named_run(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "run", named_run)
        step()
    return names


@pytest.mark.skipif(HAS_GPU, reason="counts the launches of Triton's interpreter")
@pytest.mark.parametrize("kind", ["kto", "dpo"])
def test_a_named_loss_launches_the_kernels_of_its_own_function(kind, monkeypatch):
    case = make_case(vocab=17)
    options = {"ref_logps": torch.zeros(B), "backend": "triton"}

    def step(is_named: bool):
        logits = case.logits.clone().requires_grad_()
        if kind == "kto":
            name, own, tensors = "kto", kto_fused.fused_kto_loss, {"desirable": case.desirable}
        else:
            name, own, tensors = "sigmoid", kto_fused.fused_dpo_loss, {}
        if is_named:
            loss = fused_loss(name, logits, case.labels, **options, **tensors)[0]
        else:
            loss = own(logits, case.labels, **options, **tensors)[0]
        loss.backward()

    named, plain = (launches_of(monkeypatch, lambda is_named=is_named: step(is_named)) for is_named in (True, False))
    assert named == plain
    assert sum(kind in name for name in named) == 1


def test_every_head_flattens_into_an_operators_plain_values():
    head, _ = FormulaHead.prepare(
        LOGPS,
        B,
        loss=OwnMargin(),
        tensors={"scale": torch.tensor(1.0)},
        reduction="mean",
        average_log_prob=False,
        loss_dtype=torch.float32,
        backend="torch",
    )
    again = base.rebuild(base.flatten(head))
    assert (again.head, again.tensor_names, again.reduction) == (OwnMargin(), "scale", "mean")


@heads.register("scaled_by_anything")
@dataclass(frozen=True)
class ScaledByAnything(heads.Head):
    group = 1
    needs_reference = False

    def losses(self, logps, counts, ref_logps, **tensors):
        return -logps * sum(tensors.values())


def test_a_loss_with_a_rest_of_tensors_gets_all_of_them():
    factors = torch.arange(1.0, 1 + len(LOGPS))
    loss, _ = loss_from_logps("scaled_by_anything", LOGPS, mine=factors, another=torch.tensor(2.0))
    torch.testing.assert_close(loss, (-LOGPS * (factors + 2)).mean().to(loss.dtype))
