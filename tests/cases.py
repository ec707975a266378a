"""What the tests of losses share: random inputs, the comparison with the plain twin in float64, and the tolerances.

``make_case`` and ``check_against_twin`` are for losses from logits, ``make_hidden_case`` and
``check_hidden_against_twin`` for losses from hidden states.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

import kto_fused
from kto_fused import (
    fused_dpo_loss,
    fused_kto_loss,
    fused_linear_dpo_loss,
    fused_linear_kto_loss,
    linear_sequence_logps,
    linear_token_logps,
    reference,
)
from kto_fused.engines import chunks as chunk_module
from kto_fused.engines import plan
from kto_fused.engines.layout import MASKED, row_targets

# The largest error against float64 on the same inputs: of a token's log-probability, in nats, and of a gradient, as
# ||error|| / ||gradient||. In half precision the latter is the result's rounding (Triton's interpreter truncates).
LOGP_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
GRAD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = list(LOGP_TOLERANCE)

# Peak MiB of a step of 8 sequences on a Hopper GPU, by (H, V, T): with a trained head and the default chunk_bytes,
# half, twice and an eighth of it, and with a frozen head. An H200 measured 860, 1483, 203, 1087, 1864, 3767 and 465.
ON_HOPPER = {
    (896, 151936, 2048): (859, 859, 1481, 386, 203),
    (896, 151936, 8192): (1087, 766, 1878, 638, 285),
    (2048, 128256, 2048): (1863, 1567, 1863, 757, 262),
    (4096, 151936, 2048): (3763, 3763, 3763, 1555, 465),
}

LAYOUTS = {
    "plain": {},
    "averaged": {"average_log_prob": True},
    "unshifted": {"shift": False},
    "packed": {"packed": True},
    "packed-averaged": {"packed": True, "average_log_prob": True},
    "packed-unshifted": {"packed": True, "shift": False},
    "ignore-0": {"ignore_index": 0},
}
TRANSFORMS = {
    "temperature": {"temperature": 0.7},
    "scale": {"logit_scale": 1.7},
    "softcap": {"logit_softcap": 5.0},
    "all": {"temperature": 1.3, "logit_scale": 0.6, "logit_softcap": 8.0},
}
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

TWINS = {
    fused_kto_loss: reference.kto_loss,
    fused_dpo_loss: reference.dpo_loss,
    fused_linear_kto_loss: reference.linear_kto_loss,
    fused_linear_dpo_loss: reference.linear_dpo_loss,
    linear_sequence_logps: reference.linear_sequence_logps,
    linear_token_logps: reference.linear_token_logps,
}
KTO = (fused_kto_loss, fused_linear_kto_loss, reference.kto_loss, reference.linear_kto_loss)


def fused_of(name: str) -> Callable:
    """Return the public function whose twin ``kto_fused.reference`` holds under ``name``."""
    return getattr(kto_fused, name if name in kto_fused.__all__ else f"fused_{name}")


class WithOptions:
    def with_options(self, **options: Any):
        return replace(self, options={**self.options, **options})


@dataclass
class Case(WithOptions):
    logits: torch.Tensor
    labels: torch.Tensor
    ref_logits: torch.Tensor
    desirable: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)


def make_labels(
    random: torch.Generator, batch: int, seq_len: int, vocab: int, packed: bool, device: str, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (labels, desirable). Each sequence is a prompt, a completion and padding of random lengths.

    ``packed`` cuts the sequences to random lengths and adds their offsets to ``options``.
    """
    labels = torch.randint(vocab, (batch, seq_len), generator=random)
    bounds = torch.randint(seq_len + 1, (batch, 2), generator=random).sort(1).values
    position = torch.arange(seq_len)
    labels[(position < bounds[:, :1]) | (position >= bounds[:, 1:])] = options.get("ignore_index", -100)
    desirable = torch.arange(batch).flip(0) % 2 == 0
    if packed:
        lengths = torch.randint(seq_len + 1, (batch,), generator=random)
        options["cu_seqlens"] = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().to(device)
        labels = labels[position < lengths[:, None]]
    return labels.to(device), desirable.to(device)


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
    """Logits of standard deviation ``std`` for the labels of ``make_labels``."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, vocab, generator=random, dtype=torch.float64) * std).to(dtype).to(device)

    labels, desirable = make_labels(random, batch, seq_len, vocab, packed, device, options)
    shape = tuple(labels.shape)
    return Case(normal(*shape), labels, normal(*shape), desirable, options)


def run(function, case: Case, **options: Any):
    """Return (loss, metrics, gradient w.r.t. the logits) of a KTO or DPO function. The losses get uneven weights."""
    logits = case.logits.detach().requires_grad_()
    options = {**case.options, **options}
    if not {"ref_logits", "ref_logps"} & set(options) and options.get("loss_type") != "simpo":
        options["ref_logits"] = case.ref_logits
    # in place overwrites its input, so the input must not be a leaf
    policy = logits.clone() if options.get("inplace_backward") else logits
    loss, metrics = function(policy, case.labels, *([case.desirable] if function in KTO else []), **options)
    weigh(loss).backward()
    return loss.detach(), metrics, logits.grad


def weigh(losses: torch.Tensor) -> torch.Tensor:
    """Return the sum of the losses, each with its own weight."""
    weights = torch.linspace(50, 100, losses.numel(), device=losses.device, dtype=losses.dtype)
    return (losses.flatten() * weights).sum()


def truth(function, case: Case, **options: Any):
    """Run the twin of ``function`` in float64 on the same inputs."""
    exact = replace(case, logits=case.logits.double(), ref_logits=case.ref_logits.double())
    options = {key: value for key, value in options.items() if key not in ("backend", "inplace_backward")}
    return run(TWINS[function], exact, **options)


def assert_same_gradient(
    actual: torch.Tensor, expected: torch.Tensor, floor: float = 0.0, roundings: float = 1.0
) -> None:
    """Require ||error|| <= roundings * tolerance * ||gradient|| + floor, plus what underflows in the dtype."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm().item()
    underflow = torch.finfo(actual.dtype).smallest_normal * actual.numel() ** 0.5
    bound = roundings * GRAD_TOLERANCE[actual.dtype] * expected.double().norm().item() + floor + underflow
    assert error <= bound, f"gradient: ||error|| is {error}, expected at most {bound}"


def check_gradients(
    engine: tuple[str, str], function: Callable[..., torch.Tensor], *inputs: torch.Tensor | None
) -> None:
    """Compare with finite differences along every element; in the slow interpreter, along one random direction."""
    assert gradcheck(function, inputs, fast_mode=engine == ("triton", "cpu"))


def assert_close(actual, expected, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def check_loss_and_metrics(actual, expected, dtype: torch.dtype) -> None:
    """Compare (loss, metrics) of inputs in ``dtype`` with those in float64."""
    (loss, metrics), (exact_loss, exact_metrics) = actual, expected
    # a sequence's log-probability adds up its tokens' errors; the loss multiplies them by beta <= 1
    tolerance = LOGP_TOLERANCE[dtype] * 10
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(loss, exact_loss, tolerance, "loss")
    for name in ("logps", "ref_logps", "rewards", "reference_point", "entropy", "mean_logits", "token_accuracy"):
        expected = getattr(exact_metrics, name)
        actual = getattr(metrics, name)
        if expected is None:
            assert actual is None, name
        else:
            assert not actual.requires_grad, name
            assert_close(actual, expected, tolerance, name)
    assert torch.equal(metrics.token_counts, exact_metrics.token_counts)


def check_against_twin(function, case: Case, *, grad_floor: float = 0.0, **options: Any) -> None:
    """Compare loss, every metric and the gradient with the twin in float64.

    ``grad_floor`` is an absolute tolerance for losses whose gradient may vanish (``ipo`` at its target).
    """
    dtype = case.logits.dtype
    loss, metrics, grad = run(function, case, **options)
    exact_loss, exact_metrics, exact_grad = truth(function, case, **options)
    check_loss_and_metrics((loss, metrics), (exact_loss, exact_metrics), dtype)
    assert grad.dtype == dtype
    assert_same_gradient(grad, exact_grad, grad_floor)
    # not "where the twin's gradient is 0": two terms may cancel there (``apo_down``) and round otherwise on a GPU
    assert grad[is_masked(case)].eq(0).all(), "masked rows must have a gradient of exactly 0"


# ---- from hidden states -------------------------------------------------------------------------------------------

INPUTS = ("hidden", "weight", "bias")


@dataclass
class HiddenCase(WithOptions):
    """Hidden states [B, T, H] (or [N, H]) whose masked positions hold NaN, and an LM head [V, H]."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    labels: torch.Tensor
    ref_hidden: torch.Tensor
    desirable: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def map(self, change) -> "HiddenCase":
        """Return the case with ``change`` applied to every floating-point tensor."""

        def changed(value):
            is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
            return change(value) if is_float else value

        values = {name: changed(value) for name, value in vars(self).items() if name != "options"}
        return HiddenCase(**values, options={name: changed(value) for name, value in self.options.items()})


def is_masked(case: "Case | HiddenCase") -> torch.Tensor:
    """Which positions are not completion tokens. [B, T] or [N]"""
    layout = {"ignore_index": case.options.get("ignore_index", -100), "shift": case.options.get("shift", True)}
    # the vocabulary's size decides which labels are invalid, not which are masked
    targets = row_targets(case.labels, case.options.get("cu_seqlens"), vocab_size=1, **layout)
    return targets == MASKED


def make_hidden_case(
    *,
    batch: int = 4,
    seq_len: int = 5,
    hidden_size: int = 16,
    vocab: int = 127,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    packed: bool = False,
    bias: bool = False,
    std: float = 3.0,
    seed: int = 0,
    **options: Any,
) -> HiddenCase:
    """Logits of standard deviation ``std`` for the labels of ``make_labels``."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=random, dtype=torch.float64) * std).to(dtype).to(device)

    labels, desirable = make_labels(random, batch, seq_len, vocab, packed, device, options)
    hidden, ref_hidden = (normal(*labels.shape, hidden_size) for _ in range(2))
    weight = normal(vocab, hidden_size, std=std / hidden_size**0.5)
    case = HiddenCase(hidden, weight, normal(vocab) if bias else None, labels, ref_hidden, desirable, options)
    case.hidden[is_masked(case)] = torch.nan
    case.ref_hidden[is_masked(case)] = torch.nan
    return case


def run_hidden(function, case: HiddenCase, *, trained: tuple[str, ...] = INPUTS, **options: Any):
    """Return (loss, metrics, gradients by name) of a loss from hidden states. The losses get uneven weights."""
    inputs = {name: getattr(case, name) for name in INPUTS}
    inputs = {name: x if x is None else x.detach().requires_grad_(name in trained) for name, x in inputs.items()}
    options = {**case.options, **options}
    if not {"ref_hidden", "ref_logps"} & set(options) and options.get("loss_type") != "simpo":
        options["ref_hidden"] = case.ref_hidden
    tensors = (inputs["hidden"], inputs["weight"], case.labels, *([case.desirable] if function in KTO else []))
    loss, metrics = function(*tensors, lm_head_bias=inputs["bias"], **options)
    if loss.requires_grad:
        weigh(loss).backward()
    return loss.detach(), metrics, {name: x.grad for name, x in inputs.items() if x is not None and x.requires_grad}


def check_hidden_against_twin(
    function, case: HiddenCase, *, trained: tuple[str, ...] = INPUTS, grad_floor: float = 0.0, **options: Any
) -> None:
    """Compare loss, every metric and all gradients with the twin in float64 on the same inputs."""
    case, dtype = case.with_options(**options), case.hidden.dtype
    loss, metrics, grads = run_hidden(function, case, trained=trained)
    exact = case.map(torch.Tensor.double).with_options(backend=None)
    exact_loss, exact_metrics, exact_grads = run_hidden(TWINS[function], exact, trained=trained)
    check_loss_and_metrics((loss, metrics), (exact_loss, exact_metrics), dtype)
    assert grads.keys() == exact_grads.keys()
    # softmax, d logp / d hidden and the result are each rounded, and Triton's interpreter truncates each of them
    is_truncated = case.options.get("backend") == "triton" and case.hidden.device.type == "cpu"
    # in float32 the GEMM rounds logits of up to 20 before the softmax
    roundings = {torch.bfloat16: 1.5 if is_truncated else 1.0, torch.float32: 2.0}.get(dtype, 1.0)
    for name, grad in grads.items():
        assert grad.dtype == dtype, name
        assert_same_gradient(grad, exact_grads[name], grad_floor, roundings)
    if "hidden" in grads:
        assert grads["hidden"][is_masked(case)].eq(0).all(), "masked positions must have a gradient of exactly 0"


def some(engine: tuple[str, str], values: list, count: int = 1) -> list:
    """Return all values; under Triton's interpreter, which takes a tenth of a second a run, the first ``count``."""
    return values[:count] if engine == ("triton", "cpu") else values


def to_device(value: Any, device: str) -> Any:
    """Return a tensor on the device; any other value as it is."""
    return value.to(device) if isinstance(value, torch.Tensor) else value


def on(engine: tuple[str, str]) -> dict[str, str]:
    """Return the options of a case on this engine."""
    return {"device": engine[1], "backend": engine[0]}


@contextmanager
def chunks_of(num_tokens: int | None) -> Iterator[None]:
    """Let a chunk hold ``num_tokens`` tokens, whatever ``chunk_bytes`` says. None changes nothing."""
    with pytest.MonkeyPatch.context() as patch:
        if num_tokens is not None:
            patch.setattr(chunk_module.ChunkSpec, "capacity", lambda spec: num_tokens)
            patch.setattr(plan, "ONE_CHUNK_MEMORY", 0)
            patch.setattr(plan, "ONE_CHUNK_MEMORY_AGAIN", 0)
        yield
