"""``huggingface.apply`` and ``apply_to_logits`` with any head: a name, an object, a mix, a function, of tokens too."""

import functools

import pytest
import torch
from huggingface_cases import assert_same_gradients, backward
from models import make_model

import kto_fused
from kto_fused import heads, huggingface, reference


def by_hand(logps, counts, ref_logps, *, desirable):
    return torch.where(desirable, -1.0, 1.0) * (logps - ref_logps) / counts


MIX = heads.Mix((1.0, heads.make("ipo")), (0.3, heads.make("sft")))
CASES = {
    "name": ("orpo", ()),
    "object": (heads.make("kto_squared", beta=0.5, reference_point=0.1), ("ref_logps", "desirable")),
    "mix": (MIX, ("ref_logps", "weights")),
    "function": (by_hand, ("ref_logps", "desirable")),
    "tokens": ("nll", ()),
    "clipped": (heads.make("ppo", clip=0.1), ("old_logps", "advantages")),
}
TENSORS = {
    "ref_logps": torch.tensor([-20.0, -30.0, -25.0, -28.0]),
    "desirable": torch.tensor([True, False, True, True]),
    "weights": torch.tensor([0.5, 2.0]),
    "advantages": torch.tensor([1.0, -1.0, 0.5, 0.0]),
    "old_logps": -torch.rand(4, 12, generator=torch.Generator().manual_seed(1)) * 8,
}
by_head = pytest.mark.parametrize(("head", "names"), CASES.values(), ids=CASES)


def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    input_ids = torch.randint(3, 30, (4, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": input_ids}, input_ids.clone().index_fill_(1, torch.arange(4), -100)


def expected_of(model, head, arguments):
    """The twin on the model's own logits: loss and gradients."""
    inputs, labels = batch()
    loss, _ = reference.loss(head, model(**inputs).logits, labels, **arguments)
    return loss, backward(model, loss)


@by_head
def test_any_head_is_called_in_the_model(head, names):
    model, arguments = make_model("llama"), {name: TENSORS[name] for name in names}
    expected, expected_grads = expected_of(model, head, arguments)
    inputs, labels = batch()
    loss, metrics = huggingface.apply(kto_fused.fused_linear_loss, model, inputs, head=head, labels=labels, **arguments)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(backward(model, loss), expected_grads)
    assert metrics.token_counts.tolist() == [8] * 4


@by_head
def test_any_head_is_called_on_logits(head, names):
    model, arguments = make_model("llama"), {name: TENSORS[name] for name in names}
    expected, expected_grads = expected_of(model, head, arguments)
    inputs, labels = batch()
    for function, given in (
        (kto_fused.fused_loss, {"head": head}),
        (functools.partial(kto_fused.fused_loss, head), {}),
        (functools.partial(kto_fused.fused_loss, head=head), {}),
        (kto_fused.FusedLoss(head), {}),
    ):
        loss, _ = huggingface.apply_to_logits(function, model, inputs, labels=labels, **given, **arguments)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        assert_same_gradients(backward(model, loss), expected_grads)
