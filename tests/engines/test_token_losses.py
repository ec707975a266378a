"""Token-level losses: three GEMMs at any length, and none of the gradient's for tokens without a gradient."""

import pytest
import torch
from cases import GRAD_TOLERANCE
from torch.utils.flop_counter import FlopCounterMode

from kto_fused import fused_linear_loss, fused_loss, heads, linear_token_logps, reference
from kto_fused.engines import cpu
from kto_fused.heads.tokens import NORMALIZERS

B, T, V, H = 4, 17, 300, 32
N = B * (T - 1)
FIELDS = {"dr_grpo": {"max_tokens": 9}}
TOKEN_LOSSES = [name for name in heads.names() if heads.make(name, **FIELDS.get(name, {})).level == "token"]
ONE_CHUNK, SEVERAL_CHUNKS = 2**30, 3 * 16 * V * 4


def make(dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden": torch.randn(B, T, H, generator=generator).to(device, dtype).requires_grad_(),
        "weight": (torch.randn(V, H, generator=generator) / 6).to(device, dtype).requires_grad_(),
        "labels": torch.randint(V, (B, T), generator=generator).to(device),
        "noise": (torch.randn(B, T, generator=generator) / 10).to(device),
        "advantages": torch.randn(B, T, generator=generator).to(device),
    }


def old_logps_of(case: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities near the policy's, aligned with labels; the first label is never predicted and holds NaN."""
    with torch.no_grad():
        logps = reference.linear_token_logps(case["hidden"].float(), case["weight"].float(), case["labels"])
    return torch.cat([torch.full_like(logps[:, :1], torch.nan), logps[:, :-1]], dim=1) + case["noise"]


def tensors_of(head: heads.Head, case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {}
    if "old_logps" in head.tensor_names():
        tensors = {"old_logps": old_logps_of(case), "advantages": case["advantages"]}
    if "ref_token_logps" in head.required_tensors():
        tensors["ref_token_logps"] = old_logps_of(case)
    if head.normalizer == "items":
        tensors["num_items"] = torch.tensor(37.0, device=case["hidden"].device)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("chunk_bytes", [ONE_CHUNK, SEVERAL_CHUNKS], ids=["one chunk", "several"])
@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_a_token_loss_equals_its_twin(engine, name, chunk_bytes, dtype):
    backend, device = engine
    case = make(dtype, device)
    head = heads.make(name, **FIELDS.get(name, {}))
    inputs = case["hidden"], case["weight"], case["labels"]
    tensors = tensors_of(head, case)
    loss, metrics = fused_linear_loss(head, *inputs, chunk_bytes=chunk_bytes, backend=backend, **tensors)
    expected, expected_metrics = reference.linear_loss(head, *inputs, **tensors)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics.logps, expected_metrics.logps, rtol=1e-5, atol=1e-4)
    grads, expected_grads = (torch.autograd.grad(value, inputs[:2]) for value in (loss, expected))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        error = (grad.double() - expected_grad.double()).norm() / expected_grad.double().norm()
        assert error < 1.2 * GRAD_TOLERANCE[dtype]


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_a_token_loss_from_logits_equals_its_twin(engine, name):
    backend, device = engine
    case = make(torch.float64, device)
    head = heads.make(name, **FIELDS.get(name, {}))
    tensors, logits = tensors_of(head, case), case["hidden"] @ case["weight"].T
    values = [
        fused_loss(head, logits, case["labels"], backend=backend, **tensors)[0],
        reference.loss(head, logits, case["labels"], **tensors)[0],
    ]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(2 * value, logits, retain_graph=True)[0] for value in values))


@pytest.mark.parametrize("layout", ["padded", "packed", "unshifted"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_tensors_are_aligned_with_labels_in_every_layout(layout, normalizer):
    case = make(torch.float64, "cpu")
    case["labels"][:, :3] = -100
    case["labels"][1] = -100  # a sequence without completion tokens
    head = heads.make("ppo", normalizer=normalizer, max_tokens=5 * (normalizer == "constant"), kl_beta=0.1)
    tensors = {**tensors_of(head, case), "ref_token_logps": old_logps_of(case) - 0.1}
    tensors["advantages"] = tensors["advantages"][:, 0].clone()  # one per sequence
    hidden, labels, options = case["hidden"], case["labels"], {}
    if layout == "packed":
        offsets = torch.arange(0, B * T + 1, T)
        hidden, labels, options = hidden.flatten(0, 1), labels.flatten(), {"cu_seqlens": offsets}
        tensors = {name: x.flatten() if name != "num_items" else x for name, x in tensors.items()}
    elif layout == "unshifted":
        hidden, labels, options = hidden[:, :-1], labels[:, 1:], {"shift": False}
        tensors = {name: x[:, 1:] if x.ndim == 2 else x for name, x in tensors.items()}
    values = [
        function(head, hidden, case["weight"], labels, **options, **tensors)[0]
        for function in (fused_linear_loss, reference.linear_loss)
    ]
    torch.testing.assert_close(*values)
    padded = reference.linear_loss(
        head, case["hidden"], case["weight"], case["labels"], **{**tensors_of(head, case), **scalars(case, head)}
    )[0]
    torch.testing.assert_close(values[0], padded)
    grads = [torch.autograd.grad(value, (case["hidden"], case["weight"])) for value in values]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def scalars(case: dict[str, torch.Tensor], head: heads.Head) -> dict[str, torch.Tensor]:
    return {"ref_token_logps": old_logps_of(case) - 0.1, "advantages": case["advantages"][:, 0].clone()}


@pytest.mark.parametrize("chunk_bytes", [ONE_CHUNK, SEVERAL_CHUNKS], ids=["one chunk", "several"])
@pytest.mark.parametrize(("alive", "trained", "frozen"), [(1.0, 3.0, 2.0), (0.25, 1.5, 1.25), (0.0, 1.0, 1.0)])
def test_tokens_without_a_gradient_cost_no_gradient_gemms(engine, alive, trained, frozen, chunk_bytes):
    backend, device = engine
    case = make(torch.float32, device)
    chosen = torch.zeros(N, device=device)
    chosen[torch.randperm(N, generator=torch.Generator().manual_seed(2))[: int(alive * N)].to(device)] = 1
    case["advantages"][:, 1:] *= chosen.view(B, T - 1)
    tensors = {"old_logps": old_logps_of(case), "advantages": case["advantages"]}
    head = heads.make("ppo", clip=10.0)  # a wide clip, so that the advantages alone decide
    for weight, expected in ((case["weight"], trained), (case["weight"].detach(), frozen)):
        inputs = case["hidden"], weight, case["labels"]
        with FlopCounterMode(display=False) as counter:
            loss, _ = fused_linear_loss(head, *inputs, chunk_bytes=chunk_bytes, backend=backend, **tensors)
            grads = torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])
        assert counter.get_total_flops() / (2 * N * H * V) == pytest.approx(expected, abs=0.02)
        twin, _ = reference.linear_loss(head, *inputs, **tensors)
        for grad, expected_grad in zip(
            grads, torch.autograd.grad(twin, [x for x in inputs if x.requires_grad]), strict=True
        ):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_clipped_tokens_have_a_gradient_of_exactly_0():
    case = make(torch.float64, "cpu")
    old_logps = old_logps_of(case) - 1.0  # every ratio is about e, above 1.2
    loss, _ = fused_linear_loss(
        "ppo", case["hidden"], case["weight"], case["labels"], old_logps=old_logps, advantages=torch.ones(B)
    )
    by_hidden, by_weight = torch.autograd.grad(loss, (case["hidden"], case["weight"]))
    assert not by_hidden.any()
    assert not by_weight.any()


def test_a_batch_without_completion_tokens_has_loss_0():
    case = make(torch.float32, "cpu")
    labels = torch.full_like(case["labels"], -100)
    loss, metrics = fused_linear_loss("nll", case["hidden"], case["weight"], labels)
    grads = torch.autograd.grad(loss, (case["hidden"], case["weight"]))
    assert loss.item() == 0
    assert metrics.token_counts.tolist() == [0] * B
    assert not any(grad.any() for grad in grads)


def test_nll_is_the_mean_of_the_tokens_log_probabilities():
    case = make(torch.float64, "cpu")
    inputs = case["hidden"], case["weight"], case["labels"]
    loss, _ = fused_linear_loss("nll", *inputs)
    torch.testing.assert_close(loss, -linear_token_logps(*inputs).sum() / N)


def test_a_compiled_token_loss_is_the_eager_one():
    case = make(torch.float32, "cpu")
    tensors = {"old_logps": old_logps_of(case), "advantages": case["advantages"]}
    inputs = case["hidden"], case["weight"], case["labels"]

    def step(function, *arguments):
        loss, _ = function("ppo", *arguments, **tensors)
        return loss

    def gradients(run, function):
        logits = inputs[0] @ inputs[1].T
        value = run(function, *(inputs if function is fused_linear_loss else (logits, inputs[2])))
        return value.detach(), *torch.autograd.grad(value, inputs[:2])

    for function in (fused_linear_loss, fused_loss):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(gradients(compiled, function), gradients(step, function))


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        ("nll", {"reduction": "none"}, ValueError, "reduction='none' has no meaning for the token-level"),
        ("ppo", {}, TypeError, "needs the tensors ['old_logps', 'advantages']"),
        ("nll", {"advantages": torch.ones(B)}, TypeError, "takes no tensor 'advantages'"),
        ("dapo", {"old_logps": torch.zeros(B, T), "advantages": torch.ones(B)}, TypeError, "num_items is the number"),
        ("nll", {"num_items": 3}, TypeError, "num_items is the number"),
        ("nll", {"weights": torch.ones(3)}, ValueError, "weights has shape [3], expected labels' shape"),
        ("nll", {"weights": -torch.ones(B)}, ValueError, "weights must be >= 0, got -1.0"),
        ("nll", {"ref_logps": torch.zeros(B)}, ValueError, "has no reference model, but ref_logps came"),
    ],
)
def test_a_wrong_call_is_named(loss, options, error, message):
    case = make(torch.float32, "cpu")
    with pytest.raises(error) as raised:
        fused_linear_loss(loss, case["hidden"], case["weight"], case["labels"], **options)
    assert message in str(raised.value)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("rows", [[0, 1, 2, 5, 6, 7, 11], [3, 4, 5, 6, 8, 9, 10]], ids=["from 0", "from 3"])
def test_rows_that_are_left_out_may_be_overwritten_by_the_others_gradients(monkeypatch, rows, softcap):
    """On a CPU the rows' gradients are written together, over logits of which each is read before."""
    vocab = 16
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 3 * vocab * 8)
    logits, rows = torch.randn(12, vocab, dtype=torch.float64), torch.tensor(rows)
    options = {"scale": 1.0, "softcap": softcap, "factor": 1.0}
    targets, row_max, log_sum, _ = cpu.token_logprobs(
        logits, torch.randint(vocab, (12,)), None, ignore_index=-100, shift=False, **options
    )
    chosen = targets[rows], torch.randn(len(rows), dtype=torch.float64), row_max[rows], log_sum[rows]
    expected = torch.empty(len(rows), vocab, dtype=torch.float64)
    cpu.token_logprobs_backward(logits[rows], expected, *chosen, **options)
    cpu.token_logprobs_backward(logits, logits[: len(rows)], *chosen, **options, source_rows=rows)
    assert torch.equal(logits[: len(rows)], expected)
