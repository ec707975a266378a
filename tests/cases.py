"""Random inputs, the comparison with the twin in float64, and one table of tolerances."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from kto_fused import fused_dpo_loss, fused_kto_loss, reference

# Largest error against float64 on the same inputs: a token's log-probability in nats, and a gradient's
# ||error|| / ||gradient||, which for half precision is the rounding of the result (Triton's interpreter truncates).
LOGP_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
GRAD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = list(LOGP_TOLERANCE)

TWINS = {fused_kto_loss: reference.kto_loss, fused_dpo_loss: reference.dpo_loss}


@dataclass
class Case:
    logits: torch.Tensor
    labels: torch.Tensor
    ref_logits: torch.Tensor
    desirable: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def with_options(self, **options: Any) -> "Case":
        return replace(self, options={**self.options, **options})


def make_case(
    *,
    batch: int = 4,
    seq_len: int = 5,
    vocab: int = 127,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    packed: bool = False,
    std: float = 3.0,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Logits of standard deviation ``std``; each sequence a prompt, a completion and padding of random lengths."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, vocab, generator=random, dtype=torch.float64) * std).to(dtype).to(device)

    labels = torch.randint(vocab, (batch, seq_len), generator=random)
    bounds = torch.randint(seq_len + 1, (batch, 2), generator=random).sort(1).values
    position = torch.arange(seq_len)
    labels[(position < bounds[:, :1]) | (position >= bounds[:, 1:])] = options.get("ignore_index", -100)
    desirable = torch.arange(batch).flip(0) % 2 == 0
    if packed:
        lengths = torch.randint(seq_len + 1, (batch,), generator=random)
        options["cu_seqlens"] = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().to(device)
        keep = position < lengths[:, None]
        labels = labels[keep]
    shape = tuple(labels.shape)
    return Case(normal(*shape), labels.to(device), normal(*shape), desirable.to(device), options)


def run(function, case: Case, **options: Any):
    """(loss, metrics, gradient by the logits) of a KTO or DPO function; the losses weighted unevenly."""
    logits = case.logits.detach().requires_grad_()
    options = {**case.options, **options}
    if not {"ref_logits", "ref_logps"} & set(options) and options.get("loss_type") != "simpo":
        options["ref_logits"] = case.ref_logits
    is_kto = function in (fused_kto_loss, reference.kto_loss)
    # in place overwrites its input, which a leaf must not be
    policy = logits.clone() if options.get("inplace_backward") else logits
    loss, metrics = function(policy, case.labels, *([case.desirable] if is_kto else []), **options)
    weights = torch.linspace(50, 100, loss.numel(), device=loss.device, dtype=loss.dtype)
    (loss.flatten() * weights).sum().backward()
    return loss.detach(), metrics, logits.grad


def truth(function, case: Case, **options: Any):
    """The twin in float64 on the same inputs."""
    exact = replace(case, logits=case.logits.double(), ref_logits=case.ref_logits.double())
    options = {key: value for key, value in options.items() if key not in ("backend", "inplace_backward")}
    return run(TWINS[function], exact, **options)


def assert_same_gradient(actual: torch.Tensor, expected: torch.Tensor, floor: float = 0.0) -> None:
    """||error|| <= tolerance ||gradient|| + floor, but for what the dtype cannot hold."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm().item()
    underflow = torch.finfo(actual.dtype).smallest_normal * actual.numel() ** 0.5
    bound = GRAD_TOLERANCE[actual.dtype] * expected.double().norm().item() + floor + underflow
    assert error <= bound, f"gradient: ||error|| is {error}, expected at most {bound}"


def assert_close(actual, expected, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def check_against_twin(function, case: Case, *, grad_floor: float = 0.0, **options: Any) -> None:
    """Loss, every metric and the gradient, against the twin in float64.

    ``grad_floor`` is for losses whose gradient may vanish (``ipo`` at its target), where no relative error is small.
    """
    dtype = case.logits.dtype
    loss, metrics, grad = run(function, case, **options)
    exact_loss, exact_metrics, exact_grad = truth(function, case, **options)
    # a sequence's log-probability adds up its tokens' errors, and the loss sees beta <= 1 of that
    tolerance = LOGP_TOLERANCE[dtype] * 10
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(loss, exact_loss, tolerance, "loss")
    for name in ("logps", "ref_logps", "rewards", "reference_point", "entropy", "mean_logits"):
        expected = getattr(exact_metrics, name)
        actual = getattr(metrics, name)
        if expected is None:
            assert actual is None, name
        else:
            assert not actual.requires_grad, name
            assert_close(actual, expected, tolerance, name)
    assert torch.equal(metrics.token_counts, exact_metrics.token_counts)
    assert grad.dtype == dtype
    assert_same_gradient(grad, exact_grad, grad_floor)
    masked = exact_grad.abs().sum(-1) == 0
    assert torch.equal(grad[masked], torch.zeros_like(grad[masked])), "masked rows must have a gradient of exactly 0"
