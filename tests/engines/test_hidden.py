"""Losses and log-probabilities from hidden states against their plain twins in float64, on both backends."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from cases import (
    DTYPES,
    INPUTS,
    LAYOUTS,
    LOGP_TOLERANCE,
    TRANSFORMS,
    TWINS,
    assert_close,
    assert_same_gradient,
    by_dtype,
    check_gradients,
    check_hidden_against_twin,
    chunks_of,
    is_masked,
    make_hidden_case,
    on,
    run_hidden,
    some,
    to_device,
)
from devices import HAS_GPU
from hypothesis import given, settings
from hypothesis import strategies as st

import kto_fused
from kto_fused import fused_linear_dpo_loss, fused_linear_kto_loss, linear_sequence_logps, linear_token_logps, reference
from kto_fused.engines import chunks as chunk_module
from kto_fused.heads.base import REDUCTIONS
from kto_fused.heads.preference import DPO_LOSS_TYPES, KTO_LOSS_TYPES, REFERENCE_FREE, WITH_LABEL_SMOOTHING

MASKED = -100
FUNCTIONS = [fused_linear_kto_loss, fused_linear_dpo_loss]
# "and its head": the reference has its own LM head, of another hidden size
REFERENCES = ["ref_hidden", "ref_hidden and its head", "ref_logps"]
DEVICE = "cuda" if HAS_GPU else "cpu"
FROZEN = ("hidden",)
HEAD_ONLY = ("weight", "bias")

by_function = pytest.mark.parametrize("function", FUNCTIONS, ids=["kto", "dpo"])
by_trained = pytest.mark.parametrize("trained", [INPUTS, FROZEN], ids=["trained", "frozen"])


# ---- one axis at a time -------------------------------------------------------------------------------------------


@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(engine, dtype, layout):
    case = make_hidden_case(dtype=dtype, bias=True, **LAYOUTS[layout], **on(engine))
    for function in some(engine, FUNCTIONS):
        check_hidden_against_twin(function, case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_pairs(engine, layout):
    case = make_hidden_case(dtype=torch.float64, bias=True, **LAYOUTS[layout], **on(engine))
    check_hidden_against_twin(fused_linear_dpo_loss, case)


@by_trained
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_logit_transforms(engine, trained, dtype, transform):
    case = make_hidden_case(dtype=dtype, seq_len=3, bias=True, **TRANSFORMS[transform], **on(engine))
    with chunks_of(3):
        for function in some(engine, FUNCTIONS):
            check_hidden_against_twin(function, case, trained=trained)


# one column, two, just under and over a block's vector widths, a real block's edge
@pytest.mark.parametrize("vocab", [1, 2, 127, 1000, 4097])
@pytest.mark.parametrize("hidden_size", [1, 33])
def test_sizes_that_are_multiples_of_nothing(engine, vocab, hidden_size):
    case = make_hidden_case(vocab=vocab, hidden_size=hidden_size, seq_len=3, dtype=torch.float64, **on(engine))
    check_hidden_against_twin(fused_linear_kto_loss, case)


@pytest.mark.parametrize("loss_type", KTO_LOSS_TYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@by_trained
def test_kto_losses(engine, loss_type, reduction, trained):
    case = make_hidden_case(dtype=torch.float64, loss_type=loss_type, reduction=reduction, **on(engine))
    points = ["batch_mean"]
    if loss_type != "apo_zero_unpaired":
        points += [0.3, torch.tensor(0.3, dtype=torch.float64, device=engine[1])]
    options = {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.8}
    for point in some(engine, points):
        with chunks_of(5):
            check_hidden_against_twin(fused_linear_kto_loss, case, trained=trained, reference_point=point, **options)


@pytest.mark.parametrize("loss_type", DPO_LOSS_TYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dpo_losses(engine, loss_type, reduction):
    options = {"loss_type": loss_type, "reduction": reduction, "beta": 0.3}
    if loss_type in WITH_LABEL_SMOOTHING:
        options["label_smoothing"] = 0.1
    case = make_hidden_case(dtype=torch.float64, **options, **on(engine))
    for trained, average_log_prob in some(engine, list(itertools.product([INPUTS, FROZEN], [False, True]))):
        with chunks_of(8):
            check_hidden_against_twin(fused_linear_dpo_loss, case, trained=trained, average_log_prob=average_log_prob)


def reference_options(kind: str, case, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Return a reference's arguments. Its own LM head has another hidden size, and ``dtype`` where that is given."""
    if kind == "ref_hidden":
        return {"ref_hidden": case.ref_hidden}
    if kind == "ref_logps":
        return {"ref_logps": torch.linspace(-9, -2, len(case.desirable), device=case.hidden.device)}
    other = make_hidden_case(hidden_size=7, vocab=len(case.weight), bias=True, seed=5)
    ref_hidden = torch.randn(*case.labels.shape, 7)
    ref_hidden[is_masked(case).cpu()] = math.nan
    values = {"ref_hidden": ref_hidden, "ref_lm_head_weight": other.weight, "ref_lm_head_bias": other.bias}
    return {name: value.to(case.hidden.device, dtype or case.hidden.dtype) for name, value in values.items()}


@by_dtype
@pytest.mark.parametrize("kind", REFERENCES)
@by_trained
def test_references(engine, dtype, kind, trained):
    case = make_hidden_case(dtype=dtype, bias=True, **on(engine))
    for num_tokens, function in some(engine, list(itertools.product([4, None], FUNCTIONS))):
        with chunks_of(num_tokens):
            check_hidden_against_twin(function, case, trained=trained, **reference_options(kind, case))


@by_function
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_a_reference_of_another_dtype(engine, function, dtypes):
    case = make_hidden_case(dtype=dtypes[0], **on(engine))
    options = reference_options("ref_hidden and its head", case, dtypes[1])
    for num_tokens in some(engine, [4, None]):
        with chunks_of(num_tokens):
            check_hidden_against_twin(function, case, **options)


@by_function
def test_ref_logps_equal_ref_hidden(engine, function):
    case = make_hidden_case(bias=True, **on(engine))
    with torch.no_grad():
        ref_logps = linear_sequence_logps(
            case.ref_hidden, case.weight, case.labels, lm_head_bias=case.bias, backend=engine[0]
        )
    from_logps, from_hidden = run_hidden(function, case, ref_logps=ref_logps), run_hidden(function, case)
    assert torch.equal(from_logps[0], from_hidden[0])
    for name, grad in from_logps[2].items():
        assert torch.equal(grad, from_hidden[2][name])


@by_function
@pytest.mark.parametrize("trained", [x for n in range(4) for x in itertools.combinations(INPUTS, n)], ids="-".join)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_for_any_of_hidden_weight_and_bias(engine, function, trained, reduction):
    case = make_hidden_case(dtype=torch.float64, bias=True, reduction=reduction, **on(engine))
    for num_tokens in some(engine, [6, None, 1]):
        with chunks_of(num_tokens):
            check_hidden_against_twin(function, case, trained=trained)


@by_function
def test_a_head_tied_to_the_embedding(engine, function):
    """One parameter serves as embedding and LM head: its gradient is the sum over both uses."""
    case = make_hidden_case(dtype=torch.float64, **on(engine))
    mix = torch.randn(16, 16, dtype=torch.float64, device=engine[1])
    grads = []
    for loss_function in (function, TWINS[function]):
        weight = case.weight.clone().requires_grad_()
        hidden = torch.nn.functional.embedding(case.labels.clamp(min=0), weight) @ mix
        tensors = (hidden, weight, case.labels, *([case.desirable] if function is fused_linear_kto_loss else []))
        loss, _ = loss_function(*tensors, ref_hidden=case.ref_hidden, backend=engine[0])
        loss.backward()
        grads.append(weight.grad)
    assert_same_gradient(*grads)


VIEWS = {
    "without the last position": lambda x: x[:, :-1],
    "every second position": lambda x: x[:, ::2],
    "part of the hidden size": lambda x: x[..., 1:9],
    "transposed batch": lambda x: x.transpose(0, 1),
    "a strided hidden size": lambda x: x.transpose(1, 2),
    "one sequence": lambda x: x[1:2],
    "expanded": lambda x: x[:1].expand(4, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS)
@by_trained
def test_hidden_states_of_any_strides(engine, view, trained):
    base = torch.randn(5, 6, 12, dtype=torch.float64, device=engine[1])
    results = []
    for function in (fused_linear_kto_loss, reference.linear_kto_loss):
        leaf = base.clone().requires_grad_()
        hidden = VIEWS[view](leaf)
        random = torch.Generator().manual_seed(0)
        batch, seq_len, hidden_size = hidden.shape
        labels = torch.randint(50, (batch, seq_len), generator=random).to(engine[1])
        labels[0, 0] = MASKED
        # the LM head's weight is transposed too
        matrix = torch.randn(hidden_size, 50, generator=random, dtype=torch.float64).to(engine[1])
        matrix.requires_grad_("weight" in trained)
        desirable = torch.ones(batch, dtype=torch.bool, device=engine[1])
        options = {"ref_logps": torch.zeros(batch, device=engine[1]), "shift": False, "reference_point": 0.1}
        loss, _ = function(hidden, matrix.T, labels, desirable, backend=engine[0], **options)
        loss.backward()
        results.append((loss, leaf.grad, matrix.grad))
    (loss, *grads), (exact_loss, *exact_grads) = results
    assert_close(loss, exact_loss, 1e-12, "loss")
    for grad, exact in zip(grads, exact_grads, strict=True):
        assert (grad is None) == (exact is None)
        if grad is not None:
            assert_same_gradient(grad, exact)


@by_function
def test_packed_hidden_states_may_keep_a_batch_of_one(engine, function):
    case = make_hidden_case(dtype=torch.float64, packed=True, **on(engine))
    _, _, expected = run_hidden(function, case)
    one = replace(case, hidden=case.hidden[None], labels=case.labels[None], ref_hidden=case.ref_hidden[None])
    loss, _, grads = run_hidden(function, one)
    assert torch.equal(grads["hidden"], expected["hidden"][None])
    assert torch.equal(grads["weight"], expected["weight"])


@pytest.mark.parametrize("layout", LAYOUTS)
@by_dtype
@by_trained
def test_linear_sequence_logps(engine, dtype, layout, trained):
    case = make_hidden_case(dtype=dtype, bias=True, **LAYOUTS[layout], **on(engine))

    def run(function, case):
        inputs = {name: getattr(case, name).clone().requires_grad_(name in trained) for name in INPUTS}
        logps = function(inputs["hidden"], inputs["weight"], case.labels, lm_head_bias=inputs["bias"], **case.options)
        # uneven incoming gradients, also of sequences without tokens
        (logps * torch.linspace(-1, 2, len(logps), device=engine[1])).sum().backward()
        return logps, {name: x.grad for name, x in inputs.items() if name in trained}

    exact_logps, exact_grads = run(reference.linear_sequence_logps, case.map(torch.Tensor.double))
    for num_tokens in some(engine, [3, None]):
        with chunks_of(num_tokens):
            logps, grads = run(linear_sequence_logps, case)
        assert logps.dtype == torch.float64
        assert_close(logps, exact_logps, LOGP_TOLERANCE[dtype] * 5, "logps")
        for name, grad in grads.items():
            assert grad.dtype == dtype
            assert_same_gradient(grad, exact_grads[name])


@pytest.mark.parametrize("layout", [name for name, options in LAYOUTS.items() if "average_log_prob" not in options])
@by_dtype
@by_trained
def test_linear_token_logps(engine, dtype, layout, trained):
    case = make_hidden_case(dtype=dtype, bias=True, **LAYOUTS[layout], **on(engine))

    def run(function, case):
        inputs = {name: getattr(case, name).clone().requires_grad_(name in trained) for name in INPUTS}
        options = {**case.options, "lm_head_bias": inputs["bias"], "return_metrics": True}
        logps, metrics = function(inputs["hidden"], inputs["weight"], case.labels, **options)
        # uneven incoming gradients, also of positions that predict nothing
        (logps * torch.linspace(-1, 2, logps.numel(), device=engine[1]).view(logps.shape)).sum().backward()
        return logps, metrics, {name: x.grad for name, x in inputs.items() if name in trained}

    exact_logps, exact_metrics, exact_grads = run(reference.linear_token_logps, case.map(torch.Tensor.double))
    for num_tokens in some(engine, [3, None]):
        with chunks_of(num_tokens):
            logps, metrics, grads = run(linear_token_logps, case)
        assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert logps[is_masked(case)].eq(0).all()
        assert_close(logps, exact_logps, LOGP_TOLERANCE[dtype] * 5, "logps")
        for name, exact in vars(exact_metrics).items():
            values = getattr(metrics, name)
            assert not values.requires_grad
            assert_close(values, exact, LOGP_TOLERANCE[dtype] * 5, name)
        for name, grad in grads.items():
            assert grad.dtype == dtype
            assert_same_gradient(grad, exact_grads[name])
        assert "hidden" not in grads or grads["hidden"][is_masked(case)].eq(0).all()


@by_dtype
@pytest.mark.parametrize("transform", [{}, TRANSFORMS["all"]], ids=["plain", "softcap"])
def test_token_logps_equal_those_from_logits(engine, dtype, transform):
    """The logits are exact in both ways, so that no rounding separates them. Metrics change no log-probability."""
    case = make_hidden_case(vocab=16, dtype=dtype, **transform, **on(engine))
    # logits are the hidden states themselves
    case = replace(case, weight=torch.eye(16, dtype=dtype, device=engine[1]), hidden=case.hidden.nan_to_num())
    logps, _ = linear_token_logps(case.hidden, case.weight, case.labels, return_metrics=True, **case.options)
    alone = linear_token_logps(case.hidden, case.weight, case.labels, **case.options)
    assert torch.equal(alone, logps)
    expected = kto_fused.token_logps(case.hidden, case.labels, **case.options)
    assert_close(logps, expected, LOGP_TOLERANCE[dtype], "logps")
    sums = linear_sequence_logps(case.hidden, case.weight, case.labels, **case.options)
    assert_close(sums, logps.double().sum(1), LOGP_TOLERANCE[dtype], "sums")


@by_function
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation(engine, function, mode):
    case = make_hidden_case(**on(engine))
    expected = run_hidden(function, case)[0]
    with mode():
        tensors = (case.hidden, case.weight, case.labels)
        if function is fused_linear_kto_loss:
            tensors += (case.desirable,)
        for either in (function, TWINS[function]):
            loss, metrics = either(*tensors, ref_hidden=case.ref_hidden, backend=engine[0])
            assert_close(loss * 50, expected * 50, 1e-5, "loss")
            assert metrics.summary()["rewards/margins"].isfinite()


@pytest.mark.parametrize("module", ["kto", "dpo"])
def test_modules_hold_the_keyword_arguments(module):
    case = make_hidden_case()
    tensors, options = (case.hidden, case.weight, case.labels), {"ref_hidden": case.ref_hidden}
    if module == "kto":
        tensors += (case.desirable,)
        loss_module = kto_fused.FusedLinearKTOLoss(beta=0.3, reference_point=0.2, chunk_bytes=2**20)
        expected, _ = fused_linear_kto_loss(*tensors, beta=0.3, reference_point=0.5, chunk_bytes=2**20, **options)
        actual, _ = loss_module(*tensors, reference_point=0.5, **options)
    else:
        loss_module = kto_fused.FusedLinearDPOLoss(beta=0.3, loss_type="ipo", chunk_bytes=2**20)
        expected, _ = fused_linear_dpo_loss(*tensors, beta=0.3, loss_type="ipo", chunk_bytes=2**20, **options)
        actual, _ = loss_module(*tensors, **options)
    assert torch.equal(actual, expected)
    assert "chunk_bytes=1048576" in repr(loss_module)
    with pytest.raises(TypeError, match="inplace_backward"):
        type(loss_module)(inplace_backward=True)


# ---- gradients against finite differences -------------------------------------------------------------------------


def small_case(engine, **options):
    """Return two sequences without prompts, and hidden states, weight and bias as leaf tensors."""
    sizes = {"batch": 2, "seq_len": 3, "hidden_size": 3, "vocab": 5, "std": 1.0}
    case = make_hidden_case(**sizes, dtype=torch.float64, bias=True, **options, **on(engine))
    case.labels.clamp_(min=0)
    case.hidden.nan_to_num_(nan=0.3)
    return case, tuple(getattr(case, name).requires_grad_() for name in INPUTS)


def check_hidden_gradients(engine, function, inputs, num_tokens: int | None, trained: tuple[str, ...]) -> None:
    chosen = tuple(x.detach().requires_grad_(n in trained) for n, x in zip(INPUTS, inputs, strict=True))
    with chunks_of(num_tokens):
        check_gradients(engine, function, *chosen)


# not with batch_mean: that reference point moves with the hidden states, but by definition it has no gradient
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", [INPUTS, FROZEN, HEAD_ONLY], ids="-".join)
@pytest.mark.parametrize("num_tokens", [None, 1], ids=["whole", "split"])
@by_function
def test_gradients_of_losses(engine, function, reduction, trained, num_tokens):
    case, inputs = small_case(engine, reduction=reduction, beta=0.5)
    options = {"ref_logps": torch.tensor([-3.0, -4.0], device=engine[1]), **case.options}
    others = ()
    if function is fused_linear_kto_loss:
        options["reference_point"], others = 0.2, (case.desirable,)

    def loss(hidden, weight, bias):
        return function(hidden, weight, case.labels, *others, lm_head_bias=bias, **options)[0]

    check_hidden_gradients(engine, loss, inputs, num_tokens, trained)


@pytest.mark.parametrize("average_log_prob", [False, True])
@pytest.mark.parametrize("trained", [INPUTS, FROZEN, HEAD_ONLY], ids="-".join)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_gradients_of_sequence_logps(engine, average_log_prob, trained, packed):
    transform = {"temperature": 0.8, "logit_scale": 1.2, "logit_softcap": 4.0}
    case, inputs = small_case(engine, average_log_prob=average_log_prob, packed=packed, **transform)

    def logps(hidden, weight, bias):
        return linear_sequence_logps(hidden, weight, case.labels, lm_head_bias=bias, **case.options)

    check_hidden_gradients(engine, logps, inputs, 2, trained)


@pytest.mark.parametrize("trained", [INPUTS, FROZEN, HEAD_ONLY], ids="-".join)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_gradients_of_token_logps(engine, trained, packed):
    transform = {"temperature": 0.8, "logit_scale": 1.2, "logit_softcap": 4.0}
    case, inputs = small_case(engine, packed=packed, **transform)

    def logps(hidden, weight, bias):
        return linear_token_logps(hidden, weight, case.labels, lm_head_bias=bias, **case.options)

    check_hidden_gradients(engine, logps, inputs, 2, trained)


SCALED = {  # one setting for each way in which the backward finds the gradients
    "frozen": (fused_linear_kto_loss, FROZEN, {"reference_point": "batch_mean"}),
    "trained": (fused_linear_kto_loss, INPUTS, {"reference_point": 0.1}),
    "pairs": (fused_linear_dpo_loss, INPUTS, {}),
    "one loss per sequence": (fused_linear_kto_loss, INPUTS, {"reduction": "none"}),
    "one loss per sequence, frozen": (fused_linear_kto_loss, FROZEN, {"reduction": "none"}),
}


def scaled_loss(engine, setting: str):
    """Return the tensors to train, and a function that computes the loss."""
    function, trained, options = SCALED[setting]
    case = make_hidden_case(**on(engine))
    inputs = [getattr(case, name).requires_grad_() for name in INPUTS[:2] if name in trained]
    tensors = (case.hidden, case.weight, case.labels, *([case.desirable] if function is fused_linear_kto_loss else []))
    return inputs, lambda: function(*tensors, ref_hidden=case.ref_hidden, **case.options, **options)[0].sum()


@pytest.mark.parametrize("setting", SCALED)
def test_a_retained_graph_gives_the_same_gradients_again(engine, setting):
    """Scaling by the incoming gradient must not touch what another backward starts from."""
    inputs, compute = scaled_loss(engine, setting)
    loss = compute()
    first = [x.clone() for x in torch.autograd.grad(loss, inputs, retain_graph=True)]
    tripled = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    for a, b, c in zip(first, again, tripled, strict=True):
        assert torch.equal(a, b)
        assert_same_gradient(c, 3 * a)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("setting", SCALED)
def test_the_incoming_gradient_scales(engine, setting):
    inputs, compute = scaled_loss(engine, setting)
    plain = torch.autograd.grad(compute(), inputs)
    for factor in (3.0, -0.25, 0.0):
        for grad, expected in zip(torch.autograd.grad(factor * compute(), inputs), plain, strict=True):
            assert_same_gradient(grad, factor * expected)


def test_a_second_derivative_raises(engine):
    case, (hidden, weight, bias) = small_case(engine)
    tensors, options = (hidden, weight, case.labels), {"backend": engine[0]}
    losses = {
        "sequences": lambda: linear_sequence_logps(*tensors, **options).sum(),
        "tokens": lambda: linear_token_logps(*tensors, **options).sum(),
        "kto": lambda: fused_linear_kto_loss(*tensors, case.desirable, ref_hidden=hidden, **options)[0],
        "dpo": lambda: fused_linear_dpo_loss(*tensors, ref_hidden=hidden, reduction="none", **options)[0].sum(),
    }
    for loss in losses.values():
        (grad,) = torch.autograd.grad(loss(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            (grad.square().sum() + hidden.sum()).backward()


def test_nothing_but_the_policy_gets_a_gradient(engine):
    case, (hidden, weight, bias) = small_case(engine)
    others = {
        "ref_hidden": case.ref_hidden.nan_to_num(),
        "ref_lm_head_weight": case.weight.detach().clone(),
        "ref_lm_head_bias": case.bias.detach().clone(),
        "reference_point": torch.tensor(0.1, dtype=torch.float64, device=engine[1]),
    }
    for tensor in others.values():
        tensor.requires_grad_()
    loss, metrics = fused_linear_kto_loss(
        hidden, weight, case.labels, case.desirable, lm_head_bias=bias, backend=engine[0], **others
    )
    loss.backward()
    assert all(x.grad is not None for x in (hidden, weight, bias))
    assert all(x.grad is None for x in others.values())
    assert not any(value.requires_grad for value in metrics.summary().values())


def test_a_reference_through_the_policys_own_head_gives_it_no_gradient(engine):
    """With ref_hidden = hidden the reference's own gradient would cancel the policy's."""
    case = make_hidden_case(dtype=torch.float64, bias=True, **on(engine))
    case.ref_hidden = case.hidden
    check_hidden_against_twin(fused_linear_kto_loss, case, reference_point=0.0)
    grads = run_hidden(fused_linear_kto_loss, case, reference_point=0.0)[2]
    assert all(grad.abs().sum() > 0 for grad in grads.values())


# ---- edges --------------------------------------------------------------------------------------------------------


@by_function
@by_trained
@pytest.mark.parametrize("average_log_prob", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("empty", ["one sequence", "the whole batch"])
def test_sequences_without_completion_tokens(engine, function, trained, average_log_prob, packed, empty):
    case = make_hidden_case(
        average_log_prob=average_log_prob, packed=packed, dtype=torch.float64, bias=True, **on(engine)
    )
    if empty == "the whole batch":
        case.labels[:] = MASKED
    elif not packed:
        case.labels[1] = MASKED
    case.hidden[is_masked(case)] = case.ref_hidden[is_masked(case)] = math.nan
    for reduction in some(engine, ["mean", "none"]):
        loss, metrics, grads = run_hidden(function, case, trained=trained, reduction=reduction)
        assert loss.isfinite().all()
        assert metrics.logps[metrics.token_counts == 0].eq(0).all()
        if empty == "the whole batch":
            assert metrics.token_counts.eq(0).all()
            assert all(grad.eq(0).all() for grad in grads.values())
        check_hidden_against_twin(function, case, trained=trained, reduction=reduction)


@by_function
@by_trained
@pytest.mark.parametrize("seq_len", [0, 1])
def test_sequences_of_at_most_one_position_predict_nothing_when_shifted(engine, function, trained, seq_len):
    case = make_hidden_case(dtype=torch.float64, bias=True, **on(engine))
    case = replace(case, hidden=case.hidden[:, :seq_len], ref_hidden=case.ref_hidden[:, :seq_len])
    case.labels = torch.full((4, seq_len), 3, device=engine[1])
    loss, metrics, grads = run_hidden(function, case, trained=trained)
    assert loss.isfinite()
    assert metrics.token_counts.eq(0).all()
    assert all(grad.eq(0).all() for grad in grads.values())


@by_trained
def test_no_packed_positions_at_all(engine, trained):
    case = make_hidden_case(dtype=torch.float64, bias=True, **on(engine))
    case = replace(case, hidden=case.hidden[0, :0], ref_hidden=case.ref_hidden[0, :0], labels=case.labels[0, :0])
    offsets = torch.zeros(5, dtype=torch.int32, device=engine[1])
    loss, metrics, grads = run_hidden(fused_linear_kto_loss, case, trained=trained, cu_seqlens=offsets)
    assert loss.item() == 0.5
    assert all(grad.eq(0).all() for grad in grads.values())
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_("weight" in trained)
    logps = linear_token_logps(hidden, weight, case.labels, cu_seqlens=offsets, backend=engine[0])
    assert logps.shape == (0,)
    logps.sum().backward()
    assert weight.grad is None or weight.grad.eq(0).all()


@by_trained
@pytest.mark.parametrize(
    "function", [*FUNCTIONS, linear_sequence_logps, linear_token_logps], ids=["kto", "dpo", "logps", "token logps"]
)
def test_masked_positions_are_never_read(engine, function, trained):
    case = make_hidden_case(dtype=torch.bfloat16, bias=True, **on(engine))
    results = []
    for poison in some(engine, [0.0, math.nan, math.inf], count=2):
        case.hidden[is_masked(case)] = case.ref_hidden[is_masked(case)] = poison
        if function in (linear_sequence_logps, linear_token_logps):
            inputs = [getattr(case, name).clone().requires_grad_(name in trained) for name in INPUTS]
            loss = function(*inputs[:2], case.labels, lm_head_bias=inputs[2], backend=engine[0])
            loss.sum().backward()
            results.append((loss, *(x.grad for x in inputs if x.requires_grad)))
        else:
            loss, metrics, grads = run_hidden(function, case, trained=trained)
            results.append((loss, metrics.entropy, *grads.values()))
    for actual, expected in itertools.product(results[1:], results[:1]):
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@by_function
@pytest.mark.parametrize("shift", [True, False])
def test_a_label_outside_the_vocabulary(engine, function, shift, monkeypatch):
    case = make_hidden_case(vocab=9, shift=shift, **on(engine))
    case.labels[:] = 1
    case.labels[2, 3] = 9
    case.hidden.nan_to_num_()
    if engine[1] == "cuda":
        loss, metrics, _ = run_hidden(function, case)
        assert loss.isnan()
        assert metrics.logps.isnan().tolist() == [False, False, True, False]
        monkeypatch.setenv("KTO_FUSED_VALIDATE", "1")
    message = r"labels\[2, 3\] is 9: expected a token id in \[0, 9\)"
    with pytest.raises(IndexError, match=message):
        run_hidden(function, case)
    for logps in (linear_sequence_logps, linear_token_logps):
        with pytest.raises(IndexError, match=message):
            logps(case.hidden, case.weight, case.labels, shift=shift, backend=engine[0])


@by_trained
def test_unchecked_labels_give_nan(engine, trained, monkeypatch):
    """A GPU does not check labels: the sequence gets NaN, and nothing outside the row is read."""
    monkeypatch.setattr(kto_fused.engines.hidden, "check_contents", lambda *args, **kwargs: None)
    case = make_hidden_case(vocab=9, bias=True, **on(engine))
    case.labels[:] = 1
    case.labels[2, 3] = 10**9
    case.labels[3, 2] = -7
    case.hidden.nan_to_num_()
    case.ref_hidden.nan_to_num_()
    options = {"reference_point": 0.0, "ref_logps": torch.zeros(4, device=engine[1])}
    for reduction in ("sum", "none"):
        _, metrics, grads = run_hidden(fused_linear_kto_loss, case, trained=trained, reduction=reduction, **options)
        assert metrics.logps.isnan().tolist() == [False, False, True, True]
        assert grads["hidden"].isfinite().flatten(1).all(1).tolist() == [True, True, False, False]
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_("weight" in trained)
    options = {"lm_head_bias": case.bias, "return_metrics": True, "backend": engine[0]}
    logps, metrics = linear_token_logps(hidden, weight, case.labels, **options)
    logps.sum().backward()
    invalid = torch.zeros(4, 5, dtype=torch.bool, device=engine[1])
    invalid[2, 2] = invalid[3, 1] = True  # the positions before the labels'
    assert torch.equal(logps.isnan(), invalid)
    assert torch.equal(hidden.grad.isnan().any(-1), invalid)
    assert metrics.is_top1[invalid].eq(0).all()


@by_function
def test_banned_tokens_are_legal(engine, function):
    case = make_hidden_case(dtype=torch.float64, bias=True, **on(engine))
    case.bias[::3] = -math.inf
    case.labels = torch.where(case.labels >= 0, case.labels // 3 * 3 + 1, case.labels).clamp(max=124)
    loss, metrics, grads = run_hidden(function, case)
    assert loss.isfinite()
    assert metrics.entropy.isfinite().all()
    assert grads["bias"][::3].eq(0).all()
    assert grads["weight"][::3].eq(0).all()
    check_hidden_against_twin(function, case)


@by_function
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_and_infinite_hidden_states_give_a_nan_loss(engine, function, poison):
    case = make_hidden_case(**on(engine))
    case.labels[:] = 1
    case.hidden.nan_to_num_()
    case.ref_hidden.nan_to_num_()
    case.hidden[1, 0, 3] = poison
    loss, metrics, _ = run_hidden(function, case)
    assert loss.isnan()
    assert metrics.logps.isnan().tolist() == [False, True, False, False]


# ---- accuracy -----------------------------------------------------------------------------------------------------


def test_bf16_log_probabilities_of_1024_tokens(engine):
    """They are within 1e-5 of float64 per token and 1e-4 on their sum, for logits of standard deviation 3.

    The sum's bound does not hold on tensor cores, which truncate as they add up, always to the same side.
    """
    vocab, num_tokens = (300, 64) if engine == ("triton", "cpu") else (16384, 1024)
    case = make_hidden_case(batch=1, hidden_size=256, vocab=vocab, std=3.0, dtype=torch.bfloat16, **on(engine))
    hidden = torch.randn(num_tokens, 1, 256, device=engine[1]).bfloat16()
    labels = torch.randint(vocab, (num_tokens, 1), device=engine[1])
    with torch.no_grad():
        exact = reference.linear_sequence_logps(hidden.double(), case.weight.double(), labels, shift=False)
        for limit in (None, num_tokens // 10):
            with chunks_of(limit):
                options = {"shift": False, "backend": engine[0]}
                tokens = linear_sequence_logps(hidden, case.weight, labels, **options)
                whole = linear_sequence_logps(hidden.transpose(0, 1), case.weight, labels.T, **options)
            assert (tokens - exact).abs().max() <= 1e-5
            assert (whole - exact.sum()).abs() <= (1e-4 if engine[1] == "cpu" else 1e-5 * num_tokens)


@pytest.mark.parametrize("from_hidden", [False, True], ids=["logits", "hidden states"])
def test_roundings_of_all_tokens_do_not_go_one_way(engine, from_hidden):
    """Neither 1 / 0.9 nor its product with log2(e) is a float32: uncorrected, each token would lose 6e-7 nats."""
    if from_hidden and engine[1] == "cuda":
        pytest.skip("a GPU's GEMM truncates bfloat16 products, which goes one way whatever follows it")
    options = {"temperature": 0.9, "shift": False, "backend": engine[0]}
    labels = torch.randint(500, (1, 512), device=engine[1])
    hidden = torch.randn(1, 512, 32, device=engine[1]).bfloat16()
    weight = (torch.randn(500, 32, device=engine[1]) * 3 / 32**0.5).bfloat16()
    if from_hidden:
        logp = linear_sequence_logps(hidden, weight, labels, **options)
        exact = reference.linear_sequence_logps(hidden.double(), weight.double(), labels, **options)
    else:
        logits = hidden.float() @ weight.float().T
        logp = kto_fused.sequence_logps(logits, labels, **options)
        exact = reference.sequence_logps(logits.double(), labels, **options)
    assert abs(logp - exact).item() <= 5e-5


@pytest.mark.parametrize("default", [torch.float16, torch.float64], ids=["float16", "float64"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@by_trained
def test_the_default_dtype_changes_nothing(engine, default, reduction, trained):
    case = make_hidden_case(dtype=torch.bfloat16, bias=True, reduction=reduction, **on(engine))
    ref_logps = torch.full([4], -20.0, device=engine[1])

    def loss_and_gradients():
        results = run_hidden(fused_linear_kto_loss, case, trained=trained, ref_logps=ref_logps, reference_point=0.1)
        return results[0], results[2]

    expected = loss_and_gradients()
    torch.set_default_dtype(default)
    try:
        torch.testing.assert_close(loss_and_gradients(), expected, rtol=0, atol=0)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.skipif(not HAS_GPU, reason="only a GPU truncates")
@pytest.mark.parametrize("hidden_size", [896, 2048, 2560, 4096])
def test_what_tensor_cores_truncate_leaves_the_log_ratio(hidden_size):
    """A policy that is its own reference has a log-ratio of 0, whichever GEMM computes the reference. Truncation alone
    moves both log-probabilities by more (3.6e-2 nats on 1024 tokens at H = 4096).
    """
    case = make_hidden_case(
        batch=1, seq_len=1025, hidden_size=hidden_size, vocab=32768, std=3.0, dtype=torch.bfloat16, device=DEVICE
    )
    case.labels = torch.randint(32768, case.labels.shape, device=DEVICE)
    case.hidden.nan_to_num_()
    case = case.with_options(ref_hidden=case.hidden, ref_lm_head_weight=case.weight.detach().clone())
    _, metrics, _ = run_hidden(fused_linear_kto_loss, case)
    assert (metrics.logps - metrics.ref_logps).abs().item() <= 2e-3


def test_a_gpu_short_of_memory_is_not_taken_for_one_whose_gemms_write_no_float32(monkeypatch):
    """What is found about a device is cached: a wrong answer would cost twice the bytes a logit from then on."""
    asked, messages = chunk_module._has_float32_output, ["CUBLAS_STATUS_ALLOC_FAILED", "out_dtype is not supported"]

    def failing(*_, **__):
        raise RuntimeError(messages[0])

    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch, "mm", failing)
    device = torch.device("cuda", 99)
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        asked(device, torch.bfloat16)
    messages.pop(0)
    assert asked(device, torch.bfloat16) is False
    asked.cache_clear()


@pytest.mark.parametrize("kind", ["every other element", "one element for all"])
def test_a_strided_bias(kind, engine):
    """The bias is float32, while autocast reads hidden states and weight in bfloat16."""
    case = make_hidden_case(vocab=300, **on(engine))
    bias = torch.randn(600, device=engine[1])[::2] if kind == "every other element" else torch.randn(1).expand(300)
    results = []
    for value in (bias.to(engine[1]), bias.to(engine[1]).contiguous()):
        with torch.autocast(engine[1], torch.bfloat16):
            options = {"lm_head_bias": value, "backend": engine[0]}
            results.append(linear_sequence_logps(case.hidden, case.weight, case.labels, **options))
    assert torch.equal(*results)


# ---- anything together --------------------------------------------------------------------------------------------


@st.composite
def losses(draw):
    function = draw(st.sampled_from(FUNCTIONS))
    batch = draw(st.sampled_from([1, 2, 3, 5]) if function is fused_linear_kto_loss else st.sampled_from([2, 4]))
    vocab = draw(st.sampled_from([1, 2, 3, 31, 128, 129]))
    dtype = draw(st.sampled_from(DTYPES))
    options = {
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "average_log_prob": draw(st.booleans()),
        "shift": draw(st.booleans()),
        "ignore_index": draw(st.sampled_from([MASKED, 0, vocab + 5])),
        "beta": draw(st.floats(0.01, 1.0)),
        "temperature": draw(st.sampled_from([1.0, 0.7])),
        "logit_scale": draw(st.sampled_from([1.0, 1.5])),
        "logit_softcap": draw(st.sampled_from([None, 10.0])),
    }
    if function is fused_linear_kto_loss:
        options["loss_type"] = draw(st.sampled_from(KTO_LOSS_TYPES))
        weights = draw(st.sampled_from([(1.0, 1.0), (0.0, 1.7), (0.6, 0.0)]))
        options["desirable_weight"], options["undesirable_weight"] = weights
        if options["loss_type"] != "apo_zero_unpaired":
            options["reference_point"] = draw(st.sampled_from(["batch_mean", 0.0, 1.3]))
    else:
        options["loss_type"] = draw(st.sampled_from(DPO_LOSS_TYPES))
        if options["loss_type"] in WITH_LABEL_SMOOTHING:
            options["label_smoothing"] = draw(st.sampled_from([0.0, 0.2]))
    case = make_hidden_case(
        batch=batch,
        seq_len=draw(st.integers(1, 4)),
        hidden_size=draw(st.sampled_from([1, 2, 8, 17])),
        vocab=vocab,
        dtype=dtype,
        packed=draw(st.booleans()),
        bias=draw(st.booleans()),
        std=draw(st.sampled_from([0.0, 1.0, 5.0])),
        seed=draw(st.integers(0, 2**31)),
        **options,
    )
    if options["loss_type"] not in REFERENCE_FREE:
        case = case.with_options(**reference_options(draw(st.sampled_from(REFERENCES)), case))
    trained = draw(st.sampled_from([INPUTS, FROZEN, HEAD_ONLY, ("weight",), ("hidden", "weight"), ()]))
    return function, case, trained, draw(st.sampled_from([None, 1, 2, 3, 6]))


def test_random_losses(engine):
    @settings(max_examples=40 if engine == ("triton", "cpu") else 260)
    @given(losses())
    def check(example):
        function, case, trained, num_tokens = example
        case = replace(
            case,
            **{name: to_device(value, engine[1]) for name, value in vars(case).items() if name != "options"},
            options={name: to_device(value, engine[1]) for name, value in case.options.items()},
        )
        # an error of the log-probability enters a vanishing gradient through the loss's curvature, times the head
        floor = 10 * LOGP_TOLERANCE[case.hidden.dtype] * max(1.0, case.weight.abs().max().item())
        with chunks_of(num_tokens):
            check_hidden_against_twin(function, case, trained=trained, grad_floor=floor, backend=engine[0])

    check()
