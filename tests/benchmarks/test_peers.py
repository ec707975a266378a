"""Liger-kernel 0.8.5 and TRL 1.16 compute the same losses and gradients from the same hidden states in float32."""

import importlib.metadata

import pytest
import torch
from cases import assert_close, assert_same_gradient, make_hidden_case

from kto_fused import fused_linear_dpo_loss, fused_linear_kto_loss, linear_sequence_logps

B, T, V, H = 4, 6, 97, 24
POINT = 0.4


def skip_unless(package: str, version: str) -> None:
    """Skip the test unless this version of a package is installed."""
    pytest.importorskip(package.replace("-", "_"), reason=f"{package} is not installed: nothing to compare with")
    found = importlib.metadata.version(package)
    if not found.startswith(version):
        pytest.skip(f"compares with {package} {version}, found {found}")


@pytest.fixture
def case():
    """A batch without masked positions or shift: Liger logs a masked position as token 0 and does not shift labels."""
    case = make_hidden_case(batch=B, seq_len=T, vocab=V, hidden_size=H, bias=True, std=2.0, shift=False, seed=4)
    case.labels = torch.randint(V, (B, T))
    case.hidden, case.ref_hidden = torch.randn(2, B, T, H)
    return case


def leaves(case) -> list[torch.Tensor]:
    return [x.detach().requires_grad_() for x in (case.hidden, case.weight, case.bias)]


def compare(actual, expected) -> None:
    """Compare two (loss, inputs) pairs after their backward pass: the losses, and the gradients of the inputs."""
    (loss, inputs), (expected_loss, expected_inputs) = actual, expected
    assert_close(loss, expected_loss, 2e-6, "loss")
    for x, y in zip(inputs, expected_inputs, strict=True):
        assert_same_gradient(x.grad, y.grad)


@pytest.mark.parametrize("average_log_prob", [False, True])
def test_kto_equals_ligers(case, average_log_prob):
    skip_unless("liger-kernel", "0.8.5")
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    weight, bias = torch.randn(V, H) / 3, torch.randn(V)
    options = {"beta": 0.2, "average_log_prob": average_log_prob}
    theirs, ours = leaves(case), leaves(case)
    peer = LigerFusedLinearKTOLoss(compiled=False, use_ref_model=True, **options)
    expected, _ = peer(
        *theirs[:2],
        case.labels,
        bias=theirs[2],
        preference_labels=case.desirable,
        ref_input=case.ref_hidden,
        ref_weight=weight,
        ref_bias=bias,
        kl=torch.tensor(POINT),
    )
    expected.backward()
    loss, _ = fused_linear_kto_loss(
        *ours[:2],
        case.labels,
        case.desirable,
        lm_head_bias=ours[2],
        ref_hidden=case.ref_hidden,
        ref_lm_head_weight=weight,
        ref_lm_head_bias=bias,
        reference_point=POINT,
        shift=False,
        **options,
    )
    loss.backward()
    compare((loss, ours), (expected, theirs))


@pytest.mark.parametrize("loss_type", ["sigmoid", "robust", "hinge", "apo_zero", "apo_down"])
def test_dpo_equals_ligers(case, loss_type):
    skip_unless("liger-kernel", "0.8.5")
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    options = {"beta": 0.2, "loss_type": loss_type, "label_smoothing": 0.1 if loss_type == "robust" else 0.0}
    theirs, ours = leaves(case), leaves(case)
    hidden, weight, bias = theirs
    reference = {"ref_weight": case.weight, "ref_bias": case.bias}
    peer = LigerFusedLinearDPOLoss(compiled=False, use_ref_model=True, **options)
    expected, _ = peer(weight, hidden, case.labels, bias=bias, ref_input=case.ref_hidden, **reference)
    expected.backward()
    hidden, weight, bias = ours
    loss, _ = fused_linear_dpo_loss(
        hidden, weight, case.labels, lm_head_bias=bias, ref_hidden=case.ref_hidden, shift=False, **options
    )
    loss.backward()
    compare((loss, ours), (expected, theirs))


@pytest.mark.parametrize("transform", [{}, {"temperature": 0.8, "logit_scale": 1.5, "logit_softcap": 6.0}], ids=str)
def test_log_probabilities_equal_trls(case, transform):
    skip_unless("trl", "1.16.")
    from trl.kernels import ChunkedLogProbFunction

    theirs, ours = leaves(case), leaves(case)
    hidden, weight, bias = theirs
    tokens, *_ = ChunkedLogProbFunction.apply(
        hidden.flatten(0, 1),
        weight,
        bias,
        case.labels.flatten(),
        transform.get("temperature", 1.0),
        32,
        transform.get("logit_softcap"),
        transform.get("logit_scale", 1.0),
    )
    expected = tokens.view(B, T).double().sum(1)
    hidden, weight, bias = ours
    actual = linear_sequence_logps(hidden, weight, case.labels, lm_head_bias=bias, shift=False, **transform)
    uneven = torch.linspace(-1, 2, B, dtype=torch.float64)
    (expected * uneven).sum().backward()
    (actual * uneven).sum().backward()
    compare((actual, ours), (expected, theirs))
