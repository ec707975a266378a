"""Where a training loop uses the losses: torch.compile, autocast, checkpointing, accumulation, a model."""

import pytest
import torch
from cases import make_case
from conftest import HAS_GPU
from torch.utils.checkpoint import checkpoint

import kto_fused
from kto_fused import from_logits, fused_dpo_loss, fused_kto_loss, heads, reference

DEVICE = "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.use_deterministic_algorithms(False)  # which torch.compile guards on
    torch._dynamo.reset()


def head_and_inputs(packed: bool = False, dtype: torch.dtype = torch.float32, device: str = DEVICE):
    """A projection to logits, hidden states, and the rest of a loss's arguments."""
    case = make_case(seq_len=6, vocab=64, device=device, packed=packed, seed=2)
    head = torch.nn.Linear(16, 64, device=device, dtype=dtype)
    hidden = torch.randn(*case.labels.shape, 16, device=device, dtype=dtype)
    return head, hidden, case


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("loss", ["kto", "dpo"])
def test_compiles_as_one_graph_and_gives_the_same_numbers(engine, loss, packed, inplace_backward):
    head, hidden, case = head_and_inputs(packed, device=engine[1])
    options = {
        "ref_logits": case.ref_logits,
        "inplace_backward": inplace_backward,
        "backend": engine[0],
        **case.options,
    }

    def step(hidden, labels, desirable):
        logits = head(hidden)
        if loss == "kto":
            value, metrics = fused_kto_loss(logits, labels, desirable, reference_point=0.1, **options)
        else:
            value, metrics = fused_dpo_loss(logits, labels, label_smoothing=0.1, **options)
        return value * 3, metrics.rewards, metrics.summary()

    expected, expected_rewards, expected_summary = step(hidden, case.labels, case.desirable)
    expected.backward()
    expected_grad, head.weight.grad = head.weight.grad, None
    compiled = torch.compile(step, fullgraph=True)
    actual, rewards, summary = compiled(hidden, case.labels, case.desirable)
    actual.backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(rewards, expected_rewards)
    torch.testing.assert_close(summary, expected_summary, equal_nan=True)
    torch.testing.assert_close(head.weight.grad, expected_grad)


@pytest.mark.parametrize("function", [kto_fused.sequence_logps, kto_fused.fused_kto_loss])
def test_compiled_batches_of_many_lengths_share_one_graph(engine, function):
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=count, dynamic=True)
    def step(logits, labels, *others):
        options = {"ref_logps": others[1]} if others else {}
        result = function(logits, labels, *others[:1], backend=engine[0], **options)
        return result[0] if others else result

    for seq_len in (4, 7, 12, 33):
        logits = torch.randn(2, seq_len, 32, device=engine[1])
        labels = torch.randint(32, (2, seq_len), device=engine[1])
        others = ()
        if function is kto_fused.fused_kto_loss:
            others = (torch.tensor([True, False], device=engine[1]), torch.zeros(2, device=engine[1]))
        expected = function(logits, labels, *others[:1], **({"ref_logps": others[1]} if others else {}))
        torch.testing.assert_close(step(logits, labels, *others), expected[0] if others else expected)
    assert len(compilations) == 1


def test_the_operators_are_well_formed(engine):
    """Schemas, fake implementations and aliasing of everything that torch.compile sees as one operator."""
    backend, device = engine
    case = make_case(batch=2, seq_len=3, vocab=8, device=device)
    check = torch.library.opcheck
    transform = (1.5, 4.0, 0.7, backend)
    of_rows = (case.logits, case.labels, None, -100, True, *transform)
    check(from_logits._token_logprobs.op, of_rows)
    targets, logps, row_max, log_sum, entropy, mean_logits = from_logits._token_logprobs(*of_rows)
    of_sequences = (targets, logps, entropy, mean_logits, None, 2, False, backend)
    check(from_logits.sequence_sums.op, of_sequences)
    sequences, counts, _, _ = from_logits.sequence_sums(*of_sequences)
    one = torch.ones((), device=device)
    check(from_logits.sequence_backward.op, (targets, counts, sequences, one, None, False, torch.float32, backend))
    gradient = (targets, logps, row_max, log_sum, *transform)
    check(from_logits._token_logprobs_backward.op, (case.logits, torch.empty_like(case.logits), *gradient))
    check(from_logits._token_logprobs_backward_inplace.op, (case.logits.clone(), *gradient))
    if backend == "triton":
        of_kto = (sequences, sequences - 1, case.desirable, None, 0.5, "kto", 0.1, 1.0, 1.0, "mean", torch.float32)
        check(heads._kto_triton.op, of_kto)
        check(heads._dpo_triton.op, (sequences, None, counts, "simpo", 0.1, 0.0, 0.5, "none", torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Under autocast the model's logits are half precision; the loss computes in float32 all the same."""
    head, hidden, case = head_and_inputs()
    with torch.autocast(DEVICE, dtype=dtype):
        logits = head(hidden)
        assert logits.dtype == dtype
        loss, metrics = fused_kto_loss(logits, case.labels, case.desirable, ref_logits=case.ref_logits.to(dtype))
    exact, exact_metrics = reference.kto_loss(
        logits.detach().double(), case.labels, case.desirable, ref_logits=case.ref_logits.to(dtype).double()
    )
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(metrics.logps, exact_metrics.logps, rtol=1e-6, atol=1e-5)
    assert head.weight.grad.isfinite().all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_around_the_model(use_reentrant):
    head, hidden, case = head_and_inputs()
    hidden.requires_grad_()
    grads = []
    for model in (head, lambda x: checkpoint(head, x, use_reentrant=use_reentrant)):
        loss, _ = fused_kto_loss(
            model(hidden), case.labels, case.desirable, ref_logits=case.ref_logits, inplace_backward=True
        )
        grads.append(
            torch.autograd.grad(loss, [head.weight, hidden]) if model is head else backward(loss, head, hidden)
        )
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def backward(loss, head, hidden):
    """Reentrant checkpoints work with .backward() alone."""
    loss.backward()
    return head.weight.grad, hidden.grad


def test_checkpointing_around_the_loss_too():
    head, hidden, case = head_and_inputs()

    def step(hidden):
        return fused_kto_loss(head(hidden), case.labels, case.desirable, ref_logits=case.ref_logits)[0]

    (plain,) = torch.autograd.grad(step(hidden), head.weight)
    (checkpointed,) = torch.autograd.grad(checkpoint(step, hidden, use_reentrant=False), head.weight)
    torch.testing.assert_close(plain, checkpointed)


def test_accumulated_micro_batches_add_up_to_the_batch():
    head, hidden, case = head_and_inputs()
    options = {"reference_point": 0.2, "reduction": "sum"}
    whole, _ = fused_kto_loss(head(hidden), case.labels, case.desirable, ref_logits=case.ref_logits, **options)
    (expected,) = torch.autograd.grad(whole, head.weight)
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        loss, _ = fused_kto_loss(
            head(hidden[rows]),
            case.labels[rows],
            case.desirable[rows],
            ref_logits=case.ref_logits[rows],
            inplace_backward=True,
            **options,
        )
        loss.backward()
    torch.testing.assert_close(head.weight.grad, expected)


def test_gradients_through_a_model_equal_the_twins():
    head, hidden, case = head_and_inputs(dtype=torch.float64)
    grads = []
    for function in (fused_kto_loss, reference.kto_loss):
        loss, _ = function(head(hidden), case.labels, case.desirable, ref_logits=case.ref_logits.double())
        grads.append(torch.autograd.grad(loss, [head.weight, head.bias]))
    for fused, plain in zip(*grads, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-12)
