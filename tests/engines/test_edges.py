"""Inputs at the edges of what is legal, and just past them."""

import contextlib
import math

import pytest
import torch
from cases import (
    assert_close,
    assert_same_gradient,
    check_against_twin,
    is_masked,
    make_case,
    make_hidden_case,
    run,
    run_hidden,
    truth,
)
from devices import HAS_GPU

import kto_fused
from kto_fused import checks, fused_dpo_loss, fused_kto_loss, fused_linear_kto_loss
from kto_fused.engines import autograd, layout

MASKED = -100
by_function = pytest.mark.parametrize("function", [fused_kto_loss, fused_dpo_loss], ids=["kto", "dpo"])


def case_on(engine, **options):
    return make_case(device=engine[1], backend=engine[0], **options)


@by_function
@pytest.mark.parametrize("average_log_prob", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("empty", ["one sequence", "the whole batch"])
def test_sequences_without_completion_tokens(engine, function, average_log_prob, packed, empty):
    case = case_on(engine, average_log_prob=average_log_prob, packed=packed, dtype=torch.float64)
    if empty == "one sequence" and not packed:
        case.labels[1] = MASKED
    elif empty == "the whole batch":
        case.labels[:] = MASKED
    loss, metrics, grad = run(function, case)
    assert loss.isfinite().all()
    assert metrics.logps[metrics.token_counts == 0].eq(0).all()
    if empty == "the whole batch":
        assert metrics.token_counts.eq(0).all()
        assert torch.equal(grad, torch.zeros_like(grad))
    check_against_twin(function, case)


@by_function
def test_a_sequence_of_one_position_predicts_nothing_when_shifted(engine, function):
    case = case_on(engine, seq_len=1)
    case.labels[:] = 3
    loss, metrics, grad = run(function, case)
    assert metrics.token_counts.eq(0).all()
    assert grad.eq(0).all()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_no_positions_at_all(engine, packed):
    case = case_on(engine, dtype=torch.float64)
    shape = (0,) if packed else (4, 0)
    logits = torch.empty(*shape, 7, dtype=torch.float64, device=engine[1], requires_grad=True)
    labels = torch.empty(shape, dtype=torch.long, device=engine[1])
    offsets = torch.zeros(5, dtype=torch.int32, device=engine[1]) if packed else None
    ref_logps = torch.zeros(4, device=engine[1])
    loss, metrics = fused_kto_loss(
        logits, labels, case.desirable, ref_logps=ref_logps, cu_seqlens=offsets, backend=engine[0]
    )
    loss.backward()
    assert loss.item() == 0.5
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("desirable", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
def test_batches_of_one_class(engine, batch, desirable):
    case = case_on(engine, batch=batch, dtype=torch.float64)
    case.desirable[:] = desirable
    check_against_twin(fused_kto_loss, case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_the_only_token_of_a_vocabulary_is_certain(engine, dtype, softcap):
    case = case_on(engine, vocab=1, seq_len=50, dtype=dtype, logit_softcap=softcap)
    _, metrics, grad = run(fused_kto_loss, case)
    assert metrics.logps.eq(0).all()
    assert metrics.entropy.eq(0).all()
    assert grad.eq(0).all()


@pytest.mark.parametrize("weights", [(0.0, 1.7), (0.6, 0.0)], ids=["desirable", "undesirable"])
def test_a_class_of_weight_zero_has_a_gradient_of_exactly_0(engine, weights):
    desirable_weight, undesirable_weight = weights
    case = case_on(engine, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    case.labels[:] = 3
    _, _, grad = run(fused_kto_loss, case)
    is_weightless = case.desirable == (desirable_weight == 0)
    assert grad[is_weightless].eq(0).all()
    assert grad[~is_weightless, :-1].ne(0).any(-1).all()


def test_pairs_beyond_the_hinge_have_a_gradient_of_exactly_0(engine):
    logps = torch.tensor([3.0, 1.0, 1.0, 3.0], device=engine[1], requires_grad=True)
    options = {"loss_type": "hinge", "beta": 1.0, "backend": engine[0]}
    loss, _ = kto_fused.dpo_loss_from_logps(logps, torch.zeros_like(logps), **options)
    loss.backward()
    assert logps.grad.tolist() == [0.0, -0.5, 0.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_huge_logits(engine, dtype, offset):
    case = case_on(engine, dtype=dtype, std=1.0, reduction="none", beta=0.01)
    exact = {"logits": case.logits.double() + offset, "ref_logits": case.ref_logits.double() + offset}
    case.logits, case.ref_logits = (exact[name].to(dtype) for name in ("logits", "ref_logits"))
    # as exact as around zero: every logit is taken relative to the row's maximum
    check_against_twin(fused_kto_loss, case)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_from_minus_to_plus_ten_thousand(engine, dtype):
    logits = make_case(dtype=dtype, std=1.0, device=engine[1]).logits
    logits += torch.where(torch.arange(logits.shape[-1], device=engine[1]) % 2 == 0, 1e4, -1e4)
    labels = torch.randint(logits.shape[-1], logits.shape[:-1], device=engine[1])
    fused, plain = logits.requires_grad_(), logits.detach().to(torch.float64, copy=True).requires_grad_()
    actual = kto_fused.sequence_logps(fused, labels, backend=engine[0])
    expected = kto_fused.reference.sequence_logps(plain, labels)
    assert_close(actual, expected, 1e-7, "logps")
    actual.sum().backward()
    expected.sum().backward()
    assert_same_gradient(fused.grad, plain.grad)


@by_function
def test_banned_tokens_are_legal(engine, function):
    case = case_on(engine, dtype=torch.float64)
    case.logits[..., ::3] = -math.inf
    case.logits[0, 2, 5:] = -math.inf
    case.labels = torch.where(case.labels >= 0, case.labels // 3 * 3 + 1, case.labels)
    case.labels[0, 3] = 1
    loss, metrics, grad = run(function, case)
    assert loss.isfinite().all()
    assert metrics.entropy.isfinite().all()
    assert grad.isfinite().all()
    assert grad[..., ::3].eq(0).all()
    check_against_twin(function, case)


def test_a_banned_target_has_log_probability_minus_infinity(engine):
    logits = torch.zeros(1, 2, 4, device=engine[1])
    logits[0, 0, 2] = -math.inf
    labels = torch.tensor([[MASKED, 2]], device=engine[1])
    logps = kto_fused.token_logps(logits, labels, backend=engine[0])
    assert logps.tolist() == [[-math.inf, 0.0]]


@pytest.mark.parametrize("loss_type", kto_fused.heads.preference.WITH_LABEL_SMOOTHING)
def test_a_banned_rejected_completion_has_a_loss_of_0(engine, loss_type):
    """The loss is -log sigma(inf) = 0. The flipped pair's infinite loss counts only with label smoothing."""
    labels = torch.tensor([[MASKED, 1], [MASKED, 1], [MASKED, 2], [MASKED, 1]], device=engine[1])
    values = torch.randn(4, 2, 4, device=engine[1])
    values[2, 0, 2] = -math.inf
    smoothed = -math.inf if loss_type == "robust" else math.inf
    ref_logps = None if loss_type == "simpo" else torch.zeros(4, device=engine[1])
    for function, backend in ((fused_dpo_loss, engine[0]), (kto_fused.reference.dpo_loss, None)):
        logits = values.clone().requires_grad_()
        options = {"ref_logps": ref_logps, "loss_type": loss_type, "reduction": "none", "backend": backend}
        losses, _ = function(logits, labels, **options)
        losses.sum().backward()
        assert losses[0] == 0
        assert losses[1].isfinite()
        assert logits.grad.isfinite().all()
        assert function(logits, labels, label_smoothing=0.1, **options)[0][0] == smoothed


@pytest.mark.parametrize("loss_type", [name for name in kto_fused.heads.preference.DPO_LOSS_TYPES if name != "ipo"])
def test_a_banned_chosen_completion_has_the_gradient_of_the_formula(engine, loss_type):
    """At h = -inf every loss has a finite slope, except ipo, which is a square."""
    chosen, rejected = torch.tensor([-math.inf, -2.0]), torch.tensor([-3.0, -1.0])
    ref_logps = None if loss_type == "simpo" else torch.zeros(4, device=engine[1])
    gradients = []
    for function, backend in (
        (kto_fused.dpo_loss_from_logps, engine[0]),
        (kto_fused.reference.dpo_loss_from_logps, None),
    ):
        logps = torch.cat([chosen, rejected]).to(engine[1]).requires_grad_()
        options = {"token_counts": torch.ones(4, dtype=torch.int64, device=engine[1])} if loss_type == "simpo" else {}
        loss, _ = function(logps, ref_logps, loss_type=loss_type, reduction="sum", backend=backend, **options)
        loss.backward()
        gradients.append(logps.grad)
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(*gradients)


@by_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_banned_with_the_smallest_number(engine, function, dtype):
    case = case_on(engine, vocab=3000, dtype=dtype, seq_len=3)
    case.logits[..., :2000] = torch.finfo(dtype).min
    case.labels = torch.where(case.labels >= 0, case.labels % 1000 + 2000, case.labels)
    case.labels[0, 1] = 2500
    _, metrics, grad = run(function, case)
    _, expected, _ = truth(function, case)
    assert_close(metrics.entropy, expected.entropy, 1e-5, "entropy")
    assert_close(metrics.logps, expected.logps, 1e-5, "logps")
    assert grad.isfinite().all()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_labels_that_nobody_may_read_give_nan(engine, compiled, monkeypatch):
    """-1 is not 0: where values are not checked, a label that is neither 0 nor 1 gives a NaN loss."""
    monkeypatch.setattr(checks, "may_read", lambda tensor: False)
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    function = torch.compile(kto_fused.kto_loss_from_logps) if compiled else kto_fused.kto_loss_from_logps
    logps, desirable = torch.randn(4, device=engine[1]), torch.tensor([1, -1, 0, 2], device=engine[1])
    loss, metrics = function(logps, logps + 1, desirable, reference_point=0.0, reduction="none", backend=engine[0])
    assert loss.isnan().tolist() == [False, True, False, True]
    assert metrics.desirable.tolist() == [True, False, False, False]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation(engine, mode):
    case = case_on(engine)
    expected = run(fused_kto_loss, case)[0]
    with mode():
        logits = case.logits.clone()
        for function in (fused_kto_loss, kto_fused.reference.kto_loss):
            loss, metrics = function(
                logits, case.labels, case.desirable, ref_logits=case.ref_logits.clone(), backend=engine[0]
            )
            weight = 50  # the weight that `run` gives it
            assert_close(loss * weight, expected * weight, 1e-5, "loss")
            assert metrics.summary()["kl"].isfinite()


def made_in_inference_mode(values):
    with torch.inference_mode():
        return values.clone()


def test_log_probabilities_made_in_inference_mode(engine):
    logps = torch.randn(4, dtype=torch.float64, device=engine[1])
    ref_logps, desirable = torch.zeros_like(logps), torch.tensor([True, False] * 2, device=engine[1])
    losses = [
        (kto_fused.kto_loss_from_logps, (logps, ref_logps, desirable)),
        (kto_fused.dpo_loss_from_logps, (logps, ref_logps)),
    ]
    for function, tensors in losses:
        expected, _ = function(*tensors, backend=engine[0])
        actual, _ = function(*map(made_in_inference_mode, tensors), backend=engine[0])
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_labels_made_in_inference_mode(engine, packed):
    case = case_on(engine, packed=packed, dtype=torch.float64)
    hidden_case = make_hidden_case(packed=packed, dtype=torch.float64, device=engine[1], backend=engine[0])
    hidden_case.hidden.nan_to_num_()
    weights = [hidden_case.weight, hidden_case.weight.clone().requires_grad_()]
    zeros = torch.zeros(4, device=engine[1])

    def gradients(changed):
        """Yield the gradients of all functions by logits or hidden states, with a frozen and a trained LM head."""
        for module in (kto_fused, kto_fused.reference):
            for inputs, name in [(case, "token_logps"), (case, "sequence_logps"), (hidden_case, "linear_token_logps")]:
                options = {key: changed(x) if torch.is_tensor(x) else x for key, x in inputs.options.items()}
                rows = (inputs.logits if inputs is case else inputs.hidden).detach().requires_grad_()
                for weight in [()] if inputs is case else [(x,) for x in weights]:
                    result = getattr(module, name)(rows, *weight, changed(inputs.labels), **options)
                    yield torch.autograd.grad(result.sum(), rows)[0]
        options = {key: changed(x) if torch.is_tensor(x) else x for key, x in hidden_case.options.items()}
        rows = hidden_case.hidden.requires_grad_()
        for function in (fused_linear_kto_loss, kto_fused.reference.linear_kto_loss):
            for weight in weights:
                batch = changed(hidden_case.labels), changed(hidden_case.desirable)
                loss, _ = function(rows, weight, *batch, ref_logps=changed(zeros), reduction="none", **options)
                yield torch.autograd.grad(loss.sum(), rows)[0]

    for actual, expected in zip(gradients(made_in_inference_mode), gradients(lambda x: x), strict=True):
        assert torch.equal(actual, expected)


def test_losses_where_hooks_on_saved_tensors_are_disabled(engine):
    case = case_on(engine)
    expected = run(fused_kto_loss, case)
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        actual = run(fused_kto_loss, case)
    assert torch.equal(actual[2], expected[2])


def test_a_default_device_changes_nothing(engine):
    case, hidden_case = case_on(engine), make_hidden_case(bias=True, device=engine[1], backend=engine[0])
    results = []
    for context in (contextlib.nullcontext(), torch.device("meta")):
        with context:
            of_hidden = run_hidden(fused_linear_kto_loss, hidden_case)[2]
            results.append([*run(fused_kto_loss, case)[::2], *of_hidden.values()])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "hidden"])
def test_token_log_probabilities_can_be_changed_in_place(engine, linear):
    """Results behave like any operation's output: here a loss of one's own overwrites positions that it leaves out."""
    labels = torch.tensor([[MASKED, 1, 2]], device=engine[1])
    rows = torch.randn(1, 3, 4, device=engine[1], requires_grad=True)
    arguments = (rows, torch.randn(5, 4, device=engine[1]), labels) if linear else (rows, labels)
    logps = (kto_fused.linear_token_logps if linear else kto_fused.token_logps)(*arguments, backend=engine[0])
    logps.masked_fill_(torch.tensor([[True, False, False]], device=engine[1]), 0.0)
    logps.sum().backward()
    assert rows.grad.ne(0).any(-1).tolist() == [[False, True, False]]


@pytest.mark.parametrize("incoming", [math.nan, math.inf])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")], ids=["frozen", "trained"])
def test_what_takes_no_part_keeps_a_gradient_of_0_under_any_incoming_one(engine, trained, incoming):
    case = make_hidden_case(device=engine[1], backend=engine[0])
    case.labels[1] = MASKED
    for function in (fused_linear_kto_loss, kto_fused.reference.linear_kto_loss):
        hidden = case.hidden.clone().requires_grad_()
        weight = case.weight.clone().requires_grad_("weight" in trained)
        options = {**case.options, "ref_logps": torch.zeros(4, device=engine[1]), "reference_point": 0.0}
        loss, _ = function(hidden, weight, case.labels, case.desirable, **options)
        loss.backward(torch.full_like(loss, incoming))
        takes_part = ~is_masked(case)
        assert takes_part.any()
        assert hidden.grad[~takes_part].eq(0).all()
        assert not hidden.grad[takes_part].isfinite().any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("incoming", [math.nan, math.inf])
def test_a_pair_beyond_the_hinge_keeps_a_gradient_of_0_under_any_incoming_one(engine, incoming, reduction):
    case = case_on(engine)
    options = {"loss_type": "hinge", "beta": 1.0, "reduction": reduction}
    ref_logps = torch.tensor([-1e4, 1e4, 1e4, -1e4], device=engine[1])  # the first pair lies beyond, the second below
    for module, prefix in ((kto_fused, "fused_"), (kto_fused.reference, "")):
        logits = case.logits.clone().requires_grad_()
        logps = torch.zeros(4, device=engine[1], requires_grad=True)
        of_logits, of_logps = getattr(module, f"{prefix}dpo_loss"), module.dpo_loss_from_logps
        for leaf, loss in (
            (logits, of_logits(logits, case.labels, ref_logps=ref_logps, backend=engine[0], **options)[0]),
            (logps, of_logps(logps, ref_logps, backend=engine[0], **options)[0]),
        ):
            loss.backward(torch.full_like(loss, incoming))
            assert leaf.grad[[0, 2]].eq(0).all()
            assert not leaf.grad[[1, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zeros_stay_zeros_under_every_way_to_scale(engine, dtype, monkeypatch):
    """Three ways to scale agree: the device's own, the kernel's, and a GPU's without Triton."""
    from kto_fused.kernels import rows

    def without_the_kernel(values, factor):
        with monkeypatch.context() as patch:
            patch.setattr(autograd, "HAS_TRITON", False)
            autograd.scale_(values, factor)

    ways = [autograd.scale_, without_the_kernel]
    if engine[0] == "triton":
        ways.append(rows.scale_)
    for factor in (1.0, -2.0, math.nan, math.inf):
        for scale_ in ways:
            values = torch.tensor([0.0, 1.5, -3.0, math.nan], dtype=dtype, device=engine[1])
            expected = torch.tensor([0.0, 1.5 * factor, -3.0 * factor, math.nan], dtype=dtype, device=engine[1])
            scale_(values, torch.tensor(factor, device=engine[1]))
            assert torch.equal(values.nan_to_num(9), expected.nan_to_num(9))


@by_function
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_and_infinite_logits_give_a_nan_loss(engine, function, poison):
    for vocab in (7, 300):
        case = case_on(engine, vocab=vocab, seq_len=3)
        case.labels[:] = 1
        case.logits[1, 0, vocab - 2] = poison
        loss, metrics, _ = run(function, case)
        assert loss.isnan()
        assert metrics.logps.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("loss_type", ["kto", "kto_squared", "apo_zero_unpaired"])
def test_kto_saturates_without_overflow(engine, sign, loss_type):
    logps = torch.tensor([1e5 * sign, 1e5 * sign], dtype=torch.float64, device=engine[1], requires_grad=True)
    options = {"reduction": "none", "loss_type": loss_type, "backend": engine[0]}
    if loss_type != "apo_zero_unpaired":
        options["reference_point"] = 0.0
    desirable = torch.tensor([True, False], device=engine[1])
    loss, _ = kto_fused.kto_loss_from_logps(logps, torch.zeros_like(logps), desirable, **options)
    loss.sum().backward()
    assert loss.tolist() == ([0.0, 1.0] if sign > 0 else [1.0, 0.0])
    assert logps.grad.abs().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("loss_type", kto_fused.heads.preference.DPO_LOSS_TYPES)
@pytest.mark.parametrize("ratio", [1e5, -1e5])
def test_dpo_is_finite_for_huge_log_ratios(engine, loss_type, ratio):
    logps = torch.tensor([ratio, 0.0], dtype=torch.float64, device=engine[1], requires_grad=True)
    ref_logps = None if loss_type == "simpo" else torch.zeros_like(logps)
    options = {"loss_type": loss_type, "average_log_prob": True}
    loss, _ = kto_fused.dpo_loss_from_logps(logps, ref_logps, backend=engine[0], **options)
    expected, _ = kto_fused.reference.dpo_loss_from_logps(logps.detach(), ref_logps, **options)
    loss.backward()
    assert_close(loss, expected, 1e-12, "loss")
    assert logps.grad.isfinite().all()


def test_the_last_token_of_the_vocabulary(engine):
    for vocab in (1, 8, 127, 1000):
        case = case_on(engine, vocab=vocab, dtype=torch.float64, seq_len=3)
        case.labels[:] = vocab - 1
        check_against_twin(fused_kto_loss, case)


@pytest.mark.parametrize("bad", ["V", -7])
@pytest.mark.parametrize("shift", [True, False])
def test_a_label_outside_the_vocabulary(engine, bad, shift, monkeypatch):
    case = case_on(engine, vocab=9, shift=shift)
    case.labels[:] = 1
    case.labels[2, 3] = 9 if bad == "V" else bad
    message = rf"labels\[2, 3\] is {case.labels[2, 3].item()}: expected a token id in \[0, 9\)"
    if engine[1] == "cuda":
        loss, metrics, grad = run(fused_kto_loss, case)
        assert loss.isnan()
        assert metrics.logps.isnan().tolist() == [False, False, True, False]
        monkeypatch.setenv("KTO_FUSED_VALIDATE", "1")
    with pytest.raises(IndexError, match=message):
        run(fused_kto_loss, case)


@pytest.mark.parametrize("dtype", checks.INTEGER_DTYPES, ids=str)
def test_labels_of_every_integer_dtype(engine, dtype):
    case = case_on(engine, vocab=9, ignore_index=9)  # a value that uint8 can hold
    expected = run(fused_kto_loss, case)
    case.labels = case.labels.to(dtype)
    actual = run(fused_kto_loss, case)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[2], expected[2])


@pytest.mark.parametrize("function", [kto_fused.kto_loss_from_logps, kto_fused.dpo_loss_from_logps])
def test_metrics_carry_no_gradient(engine, function):
    policy, ref = (torch.randn(6, device=engine[1], requires_grad=True) for _ in range(2))
    desirable = [torch.arange(6, device=engine[1]) % 2 == 0] if function is kto_fused.kto_loss_from_logps else []
    loss, metrics = function(policy, ref, *desirable, backend=engine[0])
    assert loss.requires_grad
    tensors = [value for value in vars(metrics).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) >= 3
    assert not any(value.requires_grad for value in tensors)


def test_unchecked_labels_and_offsets_give_nan(engine, monkeypatch):
    """A GPU does not check labels: the sequence gets NaN, and nothing outside the row is read."""
    monkeypatch.setattr(kto_fused.engines.logits, "check_contents", lambda *args, **kwargs: None)
    case = case_on(engine, vocab=9)
    case.labels[:] = 1
    case.labels[2, 3] = 10**9
    case.labels[3, 2] = -7
    tokens = kto_fused.token_logps(case.logits, case.labels, backend=engine[0])
    assert tokens.isnan().nonzero().tolist() == [[2, 2], [3, 1]]
    _, metrics, grad = run(fused_kto_loss, case, reference_point=0.0, reduction="none")
    assert metrics.logps.isnan().tolist() == [False, False, True, True]
    assert grad.isfinite().all(-1).all(-1).tolist() == [True, True, False, False]


@pytest.mark.parametrize("offsets", [[1, 3, 6], [0, 3, 5], [0, 7, 6], [0, 3, 9]])
def test_packed_offsets_that_do_not_partition_the_rows(engine, offsets, monkeypatch):
    logits = torch.zeros(6, 4, device=engine[1])
    labels = torch.ones(6, dtype=torch.long, device=engine[1])
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=engine[1])
    if engine[0] == "triton":
        monkeypatch.setattr(kto_fused.engines.logits, "check_contents", lambda *args, **kwargs: None)
        assert kto_fused.sequence_logps(logits, labels, cu_seqlens=cu_seqlens, backend="triton").isnan().any()
        monkeypatch.undo()
    monkeypatch.setenv("KTO_FUSED_VALIDATE", "1")
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 6"):
        kto_fused.sequence_logps(logits, labels, cu_seqlens=cu_seqlens, backend=engine[0])


@by_function
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_masked_rows_are_never_read(engine, function, packed):
    case = case_on(engine, packed=packed, dtype=torch.bfloat16)
    expected = run(function, case)
    masked = is_masked(case)
    assert masked.any()
    for poison in (math.nan, -math.inf, math.inf):
        case.logits[masked] = poison
        case.ref_logits[masked] = poison
        loss, metrics, grad = run(function, case)
        assert torch.equal(loss, expected[0])
        assert torch.equal(grad, expected[2])
        assert torch.equal(metrics.entropy, expected[1].entropy)


def test_a_soft_cap_in_a_twin_reads_no_masked_rows_either():
    case = case_on(("torch", "cpu"), dtype=torch.float64, logit_softcap=5.0)
    grads = []
    for poison in (0.0, math.nan):
        case.logits[is_masked(case)] = poison
        logits = case.logits.clone().requires_grad_()
        kto_fused.reference.sequence_logps(logits, case.labels, logit_softcap=5.0).sum().backward()
        grads.append(logits.grad)
    assert torch.equal(*grads)


@by_function
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_results_repeat_bit_for_bit(engine, function, inplace_backward):
    case = case_on(engine, dtype=torch.float32, vocab=1000)
    first = run(function, case, inplace_backward=inplace_backward)
    for _ in range(3):
        again = run(function, case, inplace_backward=inplace_backward)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1].logps, again[1].logps)
        assert torch.equal(first[2], again[2])


def test_few_rows_are_split_over_several_programs(monkeypatch):
    """However a row is split among programs, the merged result is the unsplit one, up to rounding."""
    engine = ("triton", "cuda" if HAS_GPU else "cpu")
    for vocab in (2**13 + 5, 20_000):
        case = case_on(engine, batch=2, seq_len=3, vocab=vocab, dtype=torch.float64, logit_softcap=9.0)
        case.labels[0] = 5
        for multiprocessors in (0, 4, 132):
            monkeypatch.setattr(kto_fused.engines.logits, "multiprocessors", lambda device, n=multiprocessors: n)
            check_against_twin(fused_kto_loss, case)


@pytest.mark.parametrize(
    "strides", [(2**31 + 64, 100, 1), (100, 2**30 + 128, 1)], ids=["between sequences", "between positions"]
)
def test_rows_beyond_2_to_the_31_logits(engine, strides):
    """Two rows lie far apart in 4 GiB of bfloat16; the memory between them is never touched, so it costs nothing."""
    torch.use_deterministic_algorithms(False)  # otherwise PyTorch would fill the memory
    memory = torch.empty(strides[0] + 2 * strides[1] + 100, dtype=torch.bfloat16, device=engine[1])
    logits = memory.as_strided((2, 3, 100), strides)
    logits.copy_(torch.randn(2, 3, 100) * 3)
    labels = torch.tensor([[MASKED, 4, 5], [MASKED, 99, 0]], device=engine[1])
    desirable = torch.tensor([True, False], device=engine[1])
    options = {"ref_logps": torch.zeros(2, device=engine[1]), "reference_point": 0.0}
    near = logits.clone().requires_grad_()
    expected, _ = fused_kto_loss(near, labels, desirable, backend=engine[0], **options)
    expected.backward()
    # a non-leaf that shares the far memory, so that the gradient is written there too
    source = torch.zeros((), dtype=torch.bfloat16, device=engine[1], requires_grad=True)
    policy = AddZero.apply(source, logits)
    actual, _ = fused_kto_loss(policy, labels, desirable, inplace_backward=True, backend=engine[0], **options)
    actual.backward()
    assert torch.equal(actual, expected)
    assert torch.equal(logits, near.grad)


class AddZero(torch.autograd.Function):
    """Makes a tensor the output of an operation, in the same memory."""

    @staticmethod
    def forward(ctx, source, values):
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad):
        return grad.sum(), None


@pytest.mark.parametrize("rows", [65_536 + 10, 200_000])
def test_more_rows_than_a_grid_dimension_holds(engine, rows):
    if engine == ("triton", "cpu"):
        pytest.skip("the interpreter needs a minute for so many programs; test_ahead_of_time.py looks at the grid")
    labels = torch.full((1, rows), MASKED, device=engine[1])
    labels[0, -1] = 1
    logits = torch.tensor([0.0, 1.0], device=engine[1]).repeat(1, rows, 1)
    logps = kto_fused.token_logps(logits, labels, backend=engine[0])
    assert_close(logps[0, -2], torch.tensor(-math.log1p(math.exp(-1)), device=engine[1]), 1e-6, "last row")
    assert logps.count_nonzero() == 1


def test_kernels_and_engines_mark_rows_alike():
    """``kernels`` imports nothing from the package, so that the numbers stand in two places."""
    from kto_fused.kernels import online

    assert (online.MASKED_TARGET.value, online.INVALID_TARGET.value) == (layout.MASKED, layout.INVALID)
