"""Liger-kernel 0.8.5 and TRL 1.16 compute the same losses and gradients from the same hidden states in float32."""

import importlib.metadata

import pytest
import torch
from cases import assert_close, assert_same_gradient, make_hidden_case

from kto_fused import (
    fused_linear_dpo_loss,
    fused_linear_kto_loss,
    fused_linear_loss,
    heads,
    linear_sequence_logps,
    linear_token_logps,
)

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


@pytest.mark.parametrize(
    ("theirs", "options", "head"),
    [
        ("ORPO", {}, heads.make("orpo", beta=0.2)),
        (
            "CPO",
            {"alpha": 0.7, "label_smoothing": 0.1},
            heads.make("cpo", beta=0.2, cpo_alpha=0.7, label_smoothing=0.1),
        ),
        ("SimPO", {"alpha": 0.0, "gamma": 0.3}, heads.make("simpo", beta=0.2, gamma=0.3)),
    ],
    ids=["orpo", "cpo", "simpo"],
)
def test_losses_without_a_reference_equal_ligers(case, theirs, options, head):
    skip_unless("liger-kernel", "0.8.5")
    from liger_kernel import chunked_loss

    peer = getattr(chunked_loss, f"LigerFusedLinear{theirs}Loss")(beta=0.2, compiled=False, **options)
    case.labels[0, 4:] = case.labels[3, :2] = -100  # lengths differ, so that averages differ from sums
    expected_leaves, ours = leaves(case), leaves(case)
    hidden, weight, bias = expected_leaves
    expected, _ = peer(weight, hidden, case.labels, bias=bias)
    expected.backward()
    hidden, weight, bias = ours
    loss, _ = fused_linear_loss(head, hidden, weight, case.labels, lm_head_bias=bias, shift=False)
    loss.backward()
    compare((loss, ours), (expected, expected_leaves))


@pytest.mark.parametrize("name", ["grpo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("delta", [None, 1.5])
def test_clipped_losses_equal_ligers(case, name, delta):
    skip_unless("liger-kernel", "0.8.5")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    clipping = {"epsilon_low": 0.2, "epsilon_high": 0.3, "delta": delta, "max_completion_length": T}
    peer = LigerFusedLinearGRPOLoss(compiled=False, loss_type=name, beta=0.1, **clipping)
    case.labels[0, 4:] = case.labels[3, :2] = -100
    options = {"lm_head_bias": case.bias, "shift": False}
    logps = linear_token_logps(case.hidden, case.weight, case.labels, **options)
    old_logps, ref_token_logps = logps + torch.randn(2, B, T) / 2
    advantages = torch.tensor([1.0, -2.0, 0.5, -0.5])
    theirs, ours = leaves(case), leaves(case)
    hidden, weight, bias = theirs
    tokens = case.labels.clamp(min=0), case.labels != -100, advantages
    expected, _ = peer(
        hidden, weight, *tokens, bias, ref_per_token_logps=ref_token_logps, old_per_token_logps=old_logps
    )
    expected.backward()
    hidden, weight, bias = ours
    fields = {"clip": (0.2, 0.3), "delta": delta or 0.0, "kl_beta": 0.1}
    head = heads.make(name, **fields, **({"max_tokens": T} if name == "dr_grpo" else {}))
    tensors = {"old_logps": old_logps, "advantages": advantages, "ref_token_logps": ref_token_logps}
    loss, _ = fused_linear_loss(head, hidden, weight, case.labels, **options | {"lm_head_bias": bias}, **tensors)
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
