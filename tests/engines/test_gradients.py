"""The hand-written backward passes against finite differences, in float64, through both backends."""

import pytest
import torch
from cases import check_gradients, make_case

import kto_fused
from kto_fused.heads.preference import DPO_LOSS_TYPES, KTO_LOSS_TYPES, REFERENCE_FREE

SMALL = {"batch": 2, "seq_len": 3, "vocab": 5, "dtype": torch.float64, "std": 1.0}
TRANSFORM = {"temperature": 0.8, "logit_scale": 1.2, "logit_softcap": 4.0}


def small_case(engine, **options):
    case = make_case(**{**SMALL, **options}, device=engine[1], backend=engine[0])
    case.labels.clamp_(min=0)  # every position a completion token
    return case, case.logits.requires_grad_()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("transform", [{}, TRANSFORM], ids=["plain", "softcap"])
def test_token_logps(engine, packed, transform):
    case, logits = small_case(engine, packed=packed, **transform)
    check_gradients(engine, lambda x: kto_fused.token_logps(x, case.labels, **case.options), logits)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("average_log_prob", [False, True])
def test_sequence_logps(engine, packed, average_log_prob):
    case, logits = small_case(engine, packed=packed)
    options = {"average_log_prob": average_log_prob, **case.options}
    check_gradients(engine, lambda x: kto_fused.sequence_logps(x, case.labels, **options), logits)


# not with batch_mean: that reference point moves with the logits, but by definition it has no gradient
@pytest.mark.parametrize("loss_type", KTO_LOSS_TYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_kto(engine, loss_type, reduction):
    options = {} if loss_type == "apo_zero_unpaired" else {"reference_point": 0.2}
    case, logits = small_case(engine, loss_type=loss_type, reduction=reduction, beta=0.5, **options)
    ref_logps = torch.tensor([-3.0, -4.0], device=engine[1])

    def loss(x):
        return kto_fused.fused_kto_loss(x, case.labels, case.desirable, ref_logps=ref_logps, **case.options)[0]

    check_gradients(engine, loss, logits)
    logps = torch.tensor([-3.5, -2.0], dtype=torch.float64, device=engine[1], requires_grad=True)
    options = {"loss_type": loss_type, "reduction": reduction, "backend": engine[0], **options}
    check_gradients(engine, lambda x: kto_fused.kto_loss_from_logps(x, ref_logps, case.desirable, **options)[0], logps)


@pytest.mark.parametrize("loss_type", DPO_LOSS_TYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dpo(engine, loss_type, reduction):
    case, logits = small_case(engine, loss_type=loss_type, reduction=reduction, beta=0.5)
    ref_logps = None if loss_type in REFERENCE_FREE else torch.tensor([-3.0, -4.0], device=engine[1])

    def loss(x):
        return kto_fused.fused_dpo_loss(x, case.labels, ref_logps=ref_logps, **case.options)[0]

    check_gradients(engine, loss, logits)
    logps = torch.tensor([-1.5, -1.0], dtype=torch.float64, device=engine[1], requires_grad=True)
    options = {"loss_type": loss_type, "reduction": reduction, "average_log_prob": True, "backend": engine[0]}
    check_gradients(engine, lambda x: kto_fused.dpo_loss_from_logps(x, ref_logps, **options)[0], logps)


def test_a_second_derivative_raises(engine):
    case, logits = small_case(engine)
    losses = {
        "loss from logits": lambda: kto_fused.fused_kto_loss(
            logits, case.labels, case.desirable, ref_logits=case.ref_logits, backend=engine[0]
        )[0],
        "sequences": lambda: kto_fused.sequence_logps(logits, case.labels, backend=engine[0]).sum(),
        "tokens": lambda: kto_fused.token_logps(logits, case.labels, backend=engine[0]).sum(),
    }
    for loss in losses.values():
        (grad,) = torch.autograd.grad(loss(), logits, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            (grad.square().sum() + logits.sum()).backward()
    logps = torch.zeros(2, requires_grad=True, device=engine[1])
    loss, _ = kto_fused.kto_loss_from_logps(logps, torch.ones_like(logps), case.desirable, backend=engine[0])
    (grad,) = torch.autograd.grad(loss, logps, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_nothing_but_the_policy_gets_a_gradient(engine):
    case, logits = small_case(engine)
    ref_logits = case.ref_logits.requires_grad_()
    point = torch.tensor(0.1, dtype=torch.float64, device=engine[1], requires_grad=True)
    loss, metrics = kto_fused.fused_kto_loss(
        logits, case.labels, case.desirable, ref_logits=ref_logits, reference_point=point, backend=engine[0]
    )
    loss.backward()
    assert logits.grad is not None
    assert ref_logits.grad is None
    assert point.grad is None
    assert not any(value.requires_grad for value in metrics.summary().values())


def test_gradients_add_up_over_two_losses_on_the_same_logits(engine):
    case, logits = small_case(engine)
    inputs = (case.labels, case.desirable)
    kto, _ = kto_fused.fused_kto_loss(logits, *inputs, ref_logits=case.ref_logits, backend=engine[0])
    tokens = kto_fused.token_logps(logits, case.labels, backend=engine[0]).sum()
    (first,) = torch.autograd.grad(kto, logits, retain_graph=True)
    (second,) = torch.autograd.grad(tokens, logits, retain_graph=True)
    (both,) = torch.autograd.grad(kto + tokens, logits)
    torch.testing.assert_close(both, first + second)
