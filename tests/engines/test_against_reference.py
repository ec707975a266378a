"""Every public function from logits or log-probabilities equals its plain twin in float64, on both backends."""

import inspect

import pytest
import torch
from cases import (
    LAYOUTS,
    LOGP_TOLERANCE,
    TRANSFORMS,
    TWINS,
    assert_close,
    assert_same_gradient,
    by_dtype,
    check_against_twin,
    fused_of,
    make_case,
    on,
    run,
)

import kto_fused
from kto_fused import fused_dpo_loss, fused_kto_loss, reference
from kto_fused.heads.base import REDUCTIONS
from kto_fused.heads.preference import DPO_LOSS_TYPES, KTO_LOSS_TYPES, LENGTH_AVERAGED, REFERENCE_FREE

# one column, two, just below and above the vector widths of a block, one column beyond a block of real size
VOCABS = [1, 2, 127, 1000, 4097]

FUNCTIONS = [fused_kto_loss, fused_dpo_loss]
by_function = pytest.mark.parametrize("function", FUNCTIONS, ids=["kto", "dpo"])


@by_function
@by_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_dtype_equals_the_twin(engine, function, dtype, layout):
    check_against_twin(function, make_case(dtype=dtype, **LAYOUTS[layout], **on(engine)))


@by_function
@by_dtype
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_logit_transforms_equal_the_twins(engine, function, dtype, transform):
    check_against_twin(function, make_case(dtype=dtype, seq_len=3, **TRANSFORMS[transform], **on(engine)))


@by_dtype
@pytest.mark.parametrize("vocab", VOCABS)
def test_any_vocabulary_size_equals_the_twin(engine, dtype, vocab):
    check_against_twin(fused_kto_loss, make_case(vocab=vocab, dtype=dtype, seq_len=3, **on(engine)))


@pytest.mark.parametrize("loss_type", KTO_LOSS_TYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_kto_losses_equal_the_twins(engine, loss_type, reduction):
    case = make_case(dtype=torch.float64, loss_type=loss_type, reduction=reduction, **on(engine))
    points = ["batch_mean", 0.0]
    if loss_type != "apo_zero_unpaired":
        points += [
            0.3,
            torch.tensor(0.3, dtype=torch.float64, device=engine[1]),
            torch.tensor([1 / 3], device=engine[1]),
        ]
    for point in points:
        check_against_twin(
            fused_kto_loss, case, reference_point=point, beta=0.4, desirable_weight=1.5, undesirable_weight=0.8
        )


@pytest.mark.parametrize("loss_type", DPO_LOSS_TYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("average_log_prob", [False, True])
def test_dpo_losses_equal_the_twins(engine, loss_type, reduction, average_log_prob):
    options = {"loss_type": loss_type, "reduction": reduction, "average_log_prob": average_log_prob, "beta": 0.3}
    if loss_type in ("sigmoid", "robust", "simpo"):
        options["label_smoothing"] = 0.1
    if loss_type == "simpo":
        options["gamma"] = 0.7
    check_against_twin(fused_dpo_loss, make_case(dtype=torch.float64, **options, **on(engine)))


@by_function
@by_dtype
def test_reference_logps_equal_reference_logits(engine, function, dtype):
    case = make_case(dtype=dtype, **on(engine))
    ref_logps = kto_fused.sequence_logps(case.ref_logits, case.labels, backend=engine[0])
    assert ref_logps.dtype == torch.float64
    from_logps, from_logits = run(function, case, ref_logps=ref_logps), run(function, case)
    assert torch.equal(from_logps[0], from_logits[0])
    assert torch.equal(from_logps[2], from_logits[2])
    check_against_twin(function, case, ref_logps=ref_logps)


@by_function
@by_dtype
@pytest.mark.parametrize("transform", [{}, TRANSFORMS["all"]], ids=["plain", "softcap"])
def test_in_place_backward_equals_out_of_place(engine, function, dtype, transform):
    case = make_case(dtype=dtype, **transform, **on(engine))
    check_against_twin(function, case, inplace_backward=True)
    assert torch.equal(run(function, case)[2], run(function, case, inplace_backward=True)[2])


VIEWS = {
    "without the last position": lambda x: x[:, :-1],
    "every second position": lambda x: x[:, ::2],
    "part of the vocabulary": lambda x: x[..., 1:-2],
    "aligned part of the vocabulary": lambda x: x[..., 8:40],
    "transposed batch": lambda x: x.transpose(0, 1),
    "one sequence": lambda x: x[1:2],
    "one position": lambda x: x[:, 2:3],
    "strides without a common step": lambda x: x.flatten().as_strided((4, 5, 90), (641, 101, 1)),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_strided_views_need_no_copy(engine, view, masked, inplace_backward):
    base = make_case(batch=5, seq_len=6, vocab=128, dtype=torch.float64, device=engine[1]).logits
    expected_base = base.clone().requires_grad_()
    actual_base = base.clone().requires_grad_()
    options = {"shift": False, "reference_point": 0.1}
    logits = VIEWS[view](expected_base)
    labels = torch.randint(logits.shape[-1], logits.shape[:2], device=engine[1])
    if masked:
        labels[0, 0] = -100
    inputs = (labels, torch.ones(len(labels), dtype=torch.bool, device=engine[1]))
    options["ref_logps"] = torch.zeros(len(labels), device=engine[1])

    expected, _ = reference.kto_loss(logits, *inputs, **options)
    expected.backward()
    logits, seen = VIEWS[view](actual_base * 1), []  # in place may overwrite a view of an intermediate
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    actual, _ = fused_kto_loss(logits, *inputs, backend=engine[0], inplace_backward=inplace_backward, **options)
    actual.backward()
    assert (seen == [logits.data_ptr()]) == inplace_backward
    assert_close(actual, expected, 1e-12, "loss")
    assert_same_gradient(actual_base.grad, expected_base.grad)


def test_expanded_logits_are_read_but_not_overwritten(engine):
    row = torch.randn(1, 1, 50, dtype=torch.float64, device=engine[1], requires_grad=True)
    labels = torch.randint(50, (3, 4), device=engine[1])
    fused = kto_fused.token_logps(row.expand(3, 4, 50), labels, backend=engine[0])
    plain = reference.token_logps(row.expand(3, 4, 50), labels)
    assert_close(fused, plain, 1e-12, "token log-probabilities")
    (grad,), (expected,) = (torch.autograd.grad(x.sum(), row) for x in (fused, plain))
    assert_close(grad, expected, 1e-12, "gradient")
    with pytest.raises(ValueError, match="share memory"):
        kto_fused.token_logps((row * 1).expand(3, 4, 50), labels, inplace_backward=True, backend=engine[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@by_dtype
def test_token_and_sequence_logps_equal_the_twins(engine, dtype, layout):
    case = make_case(dtype=dtype, **LAYOUTS[layout], **on(engine))
    options = dict(case.options)
    average = options.pop("average_log_prob", False)
    for name, extra in (("token_logps", {}), ("sequence_logps", {"average_log_prob": average})):
        logits = case.logits.clone().requires_grad_()
        exact_logits = case.logits.to(torch.float64, copy=True).requires_grad_()
        actual = getattr(kto_fused, name)(logits, case.labels, **options, **extra)
        expected = getattr(reference, name)(exact_logits, case.labels, **options, **extra)
        assert_close(actual, expected, LOGP_TOLERANCE[dtype] * 5, name)
        # uneven incoming gradients, on masked positions too
        weights = torch.linspace(-1, 2, actual.numel(), device=engine[1]).view(actual.shape)
        (actual * weights).sum().backward()
        (expected * weights).sum().backward()
        assert_same_gradient(logits.grad, exact_logits.grad)


@pytest.mark.parametrize("loss_type", KTO_LOSS_TYPES)
@by_dtype
def test_kto_from_logps_equals_the_twin(engine, dtype, loss_type):
    policy, ref = (torch.randn(2, 7, dtype=torch.float64) * 5 - 20).to(dtype).to(engine[1])
    desirable = torch.arange(7, device=engine[1]) % 3 == 0
    for labels in (desirable, desirable.long()):
        fused, plain = policy.clone().requires_grad_(), policy.to(torch.float64, copy=True).requires_grad_()
        loss, metrics = kto_fused.kto_loss_from_logps(fused, ref, labels, loss_type=loss_type, backend=engine[0])
        expected, expected_metrics = reference.kto_loss_from_logps(plain, ref.double(), labels, loss_type=loss_type)
        loss.backward()
        expected.backward()
        assert_close(loss, expected, 1e-6, "loss")
        assert_close(metrics.rewards, expected_metrics.rewards, 1e-12, "rewards")
        assert fused.grad.dtype == dtype
        assert_same_gradient(fused.grad, plain.grad)


@pytest.mark.parametrize("loss_type", DPO_LOSS_TYPES)
@pytest.mark.parametrize("average_log_prob", [False, True])
def test_dpo_from_logps_equals_the_twin(engine, loss_type, average_log_prob):
    policy, ref = (torch.randn(2, 8, dtype=torch.float64) * 5 - 20).to(engine[1])
    options = {"loss_type": loss_type, "average_log_prob": average_log_prob, "reduction": "none"}
    if loss_type in LENGTH_AVERAGED and not average_log_prob:
        options["token_counts"] = torch.arange(8, device=engine[1])
    ref = None if loss_type in REFERENCE_FREE else ref
    fused, plain = policy.clone().requires_grad_(), policy.clone().requires_grad_()
    loss, metrics = kto_fused.dpo_loss_from_logps(fused, ref, backend=engine[0], **options)
    expected, expected_metrics = reference.dpo_loss_from_logps(plain, ref, **options)
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5], device=engine[1])
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_close(loss, expected, 1e-12, "loss")
    assert_close(metrics.rewards, expected_metrics.rewards, 1e-12, "rewards")
    assert_close(fused.grad, plain.grad, 1e-12, "gradient")


def spread(values: torch.Tensor) -> torch.Tensor:
    """Return the same values as every third element of a larger tensor."""
    others = ~values if values.dtype == torch.bool else values + 1
    return torch.stack([values, others, others], dim=-1)[..., 0]


@pytest.mark.parametrize("function", FUNCTIONS, ids=["kto", "dpo"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_per_sequence_tensors_may_be_strided(engine, function, packed):
    case = make_case(dtype=torch.float64, packed=packed, **on(engine))
    ref_logps = torch.arange(4.0, device=engine[1])
    expected = run(function, case, ref_logps=ref_logps)
    case.desirable, case.labels = spread(case.desirable), spread(case.labels)
    if packed:
        case = case.with_options(cu_seqlens=spread(case.options["cu_seqlens"]))
    actual = run(function, case, ref_logps=spread(ref_logps))
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[2], expected[2])


@pytest.mark.parametrize("loss", ["kto", "ipo"])
def test_log_probabilities_may_be_strided(engine, loss):
    policy, ref = torch.randn(2, 6, device=engine[1])
    results = []
    for change in (torch.clone, spread):
        logps = policy.clone().requires_grad_()
        if loss == "kto":
            desirable = change(torch.arange(6, device=engine[1]) % 3 == 0)
            value, _ = kto_fused.kto_loss_from_logps(change(logps), change(ref), desirable, backend=engine[0])
        else:
            counts = change(torch.arange(6, device=engine[1]) + 1)
            value, _ = kto_fused.dpo_loss_from_logps(
                change(logps), change(ref), loss_type="ipo", token_counts=counts, backend=engine[0]
            )
        value.backward()
        results.append((value, logps.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_of_more_sequences_than_a_block_equals_the_twin(engine, reduction):
    policy, ref = (torch.randn(2, 1200, dtype=torch.float64) * 3).to(engine[1])
    desirable = torch.rand(1200, device=engine[1]) < 0.5
    options = {"reduction": reduction}
    for name, extra in (("kto_loss_from_logps", [desirable]), ("dpo_loss_from_logps", [])):
        fused, plain = policy.clone().requires_grad_(), policy.clone().requires_grad_()
        actual, metrics = getattr(kto_fused, name)(fused, ref, *extra, backend=engine[0], **options)
        expected, expected_metrics = getattr(reference, name)(plain, ref, *extra, **options)
        actual.sum().backward()
        expected.sum().backward()
        assert_close(actual, expected, 1e-12, name)
        assert_close(metrics.rewards, expected_metrics.rewards, 1e-12, name)
        assert_close(fused.grad, plain.grad, 1e-12, name)


@by_function
def test_summaries_agree(engine, function):
    case = make_case(dtype=torch.float64, **on(engine))
    _, metrics, _ = run(function, case)
    _, expected, _ = run(TWINS[function], case)
    actual, expected = metrics.summary(), expected.summary()
    names = {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"}
    names |= {"logits/chosen", "logits/rejected", "entropy"}
    names |= {"kl"} if function is fused_kto_loss else {"rewards/accuracies", "mean_token_accuracy"}
    assert set(actual) == set(expected) == names
    for name in names:
        assert_close(actual[name], expected[name], 1e-12, name)


def test_a_summary_equals_means_taken_by_hand():
    metrics = kto_fused.LossMetrics(
        logps=torch.tensor([-1.0, -2.0, -6.0, -4.0]),
        ref_logps=torch.zeros(4),
        rewards=torch.tensor([1.0, -1.0, 1.0, 2.0]),
        token_counts=torch.tensor([1, 3, 2, 0]),
        entropy=torch.tensor([2.0, 1.0, 0.5, torch.nan]),
        mean_logits=torch.tensor([4.0, 0.0, 3.0, torch.nan]),
        token_accuracy=torch.tensor([1.0, 1 / 3, 0.5, torch.nan], dtype=torch.float64),
    )
    summary = {name: value.item() for name, value in metrics.summary().items()}
    assert summary == {
        "rewards/chosen": 0.0,
        "rewards/rejected": 1.5,
        "rewards/margins": -1.5,
        "rewards/accuracies": 0.25,  # a tie counts one half
        "logps/chosen": -1.5,
        "logps/rejected": -5.0,
        "logits/chosen": 1.0,  # over tokens: (1 * 4 + 3 * 0) / 4
        "logits/rejected": 3.0,
        "mean_token_accuracy": 0.5,  # over the chosen sequences alone: (1 * 1 + 3 * 1/3) / 4
        "entropy": 1.0,  # (1 * 2 + 3 * 1 + 2 * 0.5) / 6
    }


@pytest.mark.parametrize("module", ["kto", "dpo"])
def test_modules_hold_the_keyword_arguments(module):
    case = make_case()
    if module == "kto":
        loss_module = kto_fused.FusedKTOLoss(beta=0.3, reference_point=0.2)
        tensors = (case.logits, case.labels, case.desirable)
        expected, _ = fused_kto_loss(*tensors, ref_logits=case.ref_logits, beta=0.3, reference_point=0.5)
        actual, _ = loss_module(*tensors, ref_logits=case.ref_logits, reference_point=0.5)
    else:
        loss_module, tensors = kto_fused.FusedDPOLoss(beta=0.3, loss_type="ipo"), (case.logits, case.labels)
        expected, _ = fused_dpo_loss(*tensors, ref_logits=case.ref_logits, beta=0.3, loss_type="ipo")
        actual, _ = loss_module(*tensors, ref_logits=case.ref_logits)
    assert torch.equal(actual, expected)
    assert "beta=0.3" in repr(loss_module)
    with pytest.raises(TypeError, match="bta"):
        type(loss_module)(bta=0.3)


@pytest.mark.parametrize("name", reference.__all__)
def test_a_twin_takes_the_arguments_of_its_function(name):
    """A program that swaps one for the other gets no TypeError and no other default."""
    assert inspect.signature(getattr(reference, name)) == inspect.signature(fused_of(name))


@pytest.mark.parametrize("name", ["kto_loss", "dpo_loss", "sequence_logps", "token_logps"])
def test_hidden_states_take_the_options_of_logits(name):
    def options(function) -> dict[str, object]:
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    from_logits, from_hidden = options(fused_of(name)), options(fused_of(f"linear_{name}"))
    only_logits, only_hidden = from_logits.keys() - from_hidden.keys(), from_hidden.keys() - from_logits.keys()
    assert only_logits <= {"inplace_backward", "ref_logits"}
    of_lm_head = {"lm_head_bias", "ref_hidden", "ref_lm_head_weight", "ref_lm_head_bias", "chunk_bytes"}
    assert only_hidden <= {*of_lm_head, "return_metrics"}
    assert all(from_logits[option] == from_hidden[option] for option in from_logits.keys() - only_logits)
