"""Losses of tiny Hugging Face models, and comparisons with the losses of their own logits."""

from contextlib import contextmanager

import pytest
import torch
from cases import GRAD_TOLERANCE, assert_same_gradient
from models import ARCHITECTURES, TWINS, from_own_logits, make_batch
from torch import nn

from kto_fused import (
    fused_linear_kto_loss,
    huggingface,
    linear_sequence_logps,
)
from kto_fused.huggingface import UnsupportedModelError

by_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
by_function = pytest.mark.parametrize("function", TWINS, ids=lambda function: function.__name__)


def loss_of(function, model, model_inputs, **arguments) -> torch.Tensor:
    result = huggingface.apply(function, model, model_inputs, **arguments)
    return result if function is linear_sequence_logps else result[0]


def kto(model, seed: int = 0, **more) -> torch.Tensor:
    model_inputs, arguments = make_batch(fused_linear_kto_loss, seed=seed)
    return loss_of(fused_linear_kto_loss, model, model_inputs, **{**arguments, **more})


def backward(model: nn.Module, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return every parameter's gradient, and clear it. The losses have different weights, so a mix-up shows."""
    model.zero_grad()
    (losses.flatten() * torch.linspace(1, 2, losses.numel())).sum().backward()
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], roundings=4.0) -> None:
    """Compare all gradients. One that vanishes (by a key's bias) may differ by the rounding of the largest."""
    assert actual.keys() == expected.keys()
    assert expected
    largest = max(grad.norm().item() for grad in expected.values())
    assert largest > 0
    for name, grad in actual.items():
        try:
            assert_same_gradient(grad, expected[name], floor=GRAD_TOLERANCE[grad.dtype] * largest, roundings=roundings)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def check_against_own_logits(function, model, seed: int = 0) -> None:
    """Compare value and every gradient with the twin's on the model's own logits."""
    model_inputs, arguments = make_batch(function, seed=seed)
    expected = from_own_logits(function, model, model_inputs, **arguments)
    expected_grads = backward(model, expected)
    actual = loss_of(function, model, model_inputs, **arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert_same_gradients(backward(model, actual), expected_grads)


def with_lora(model, **settings):
    """Return a PEFT model whose adapters change its outputs from the start."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))


@contextmanager
def refuses(model: nn.Module, *words: str):
    """Expect an ``UnsupportedModelError`` with these words that leaves every module's forward as it was."""
    before = [(module, own_forwards(module)) for module in model.modules()]
    with pytest.raises(UnsupportedModelError) as error:
        yield
    for word in words:
        assert word in str(error.value)
    for module, forwards in before:
        assert own_forwards(module) == forwards, f"{type(module).__name__} was changed"


def own_forwards(module: nn.Module) -> dict:
    """Return the instance attributes that concern the module's forward or this package."""
    return {name: value for name, value in vars(module).items() if "forward" in name or "fused" in name}
