"""What losses from logits cost, in counts that do not vary: bytes moved, kernels launched, operators, memory held."""

import pytest
import torch
from cases import make_case
from counters import MovedBytes, Operators, count_launches
from devices import HAS_GPU

import kto_fused
from kto_fused import checks, fused_dpo_loss, fused_kto_loss
from kto_fused.engines import layout
from kto_fused.engines import logits as from_logits
from kto_fused.measure import peak_bytes

interpreted = pytest.mark.skipif(HAS_GPU, reason="counts what Triton's interpreter does")
MIB = 2**20


def wide_case(dtype: torch.dtype, vocab: int, packed: bool = False, device: str = "cpu"):
    """Return two sequences, half of each a prompt, and their number of completion tokens."""
    case = make_case(batch=2, seq_len=8, vocab=vocab, dtype=dtype, device=device, backend="triton")
    case.labels = torch.randint(vocab, (2, 8), device=device)
    case.labels[:, :4] = -100
    if packed:
        case.logits, case.labels = case.logits.flatten(0, 1), case.labels.flatten()
        case = case.with_options(cu_seqlens=torch.tensor([0, 8, 16], dtype=torch.int32, device=device))
    return case, 8


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("vocab", [16384, 20001])
@pytest.mark.parametrize("multiprocessors", [0, 132], ids=["whole rows", "split rows"])
def test_bytes_moved(monkeypatch, dtype, packed, vocab, multiprocessors):
    monkeypatch.setattr(from_logits, "multiprocessors", lambda device: multiprocessors)
    case, tokens = wide_case(dtype, vocab, packed=packed)
    logits = case.logits.requires_grad_()
    moved = MovedBytes(monkeypatch)
    loss, _ = fused_kto_loss(logits, case.labels, case.desirable, ref_logps=torch.zeros(2), **case.options)
    forward = sum(moved.take())
    loss.backward()
    loaded, stored = moved.take()

    needed = tokens * vocab * dtype.itemsize
    written = logits.numel() * dtype.itemsize
    assert needed <= forward <= 1.02 * needed
    assert needed + written <= loaded + stored <= 1.02 * (needed + written)


@interpreted
def test_a_references_logits_are_read_once(monkeypatch):
    case, tokens = wide_case(torch.bfloat16, 16384)
    case.ref_logits = torch.randn_like(case.logits)
    moved = MovedBytes(monkeypatch)
    fused_kto_loss(case.logits, case.labels, case.desirable, ref_logits=case.ref_logits, **case.options)
    needed = 2 * tokens * 16384 * 2
    assert needed <= sum(moved.take()) <= 1.02 * needed


@interpreted
def test_in_place_backward_moves_no_more(monkeypatch):
    case, tokens = wide_case(torch.bfloat16, 16384)
    moved = MovedBytes(monkeypatch)
    logits = case.logits.requires_grad_() * 1
    loss, _ = fused_kto_loss(
        logits, case.labels, case.desirable, ref_logps=torch.zeros(2), inplace_backward=True, **case.options
    )
    moved.take()
    loss.backward()
    assert sum(moved.take()) <= 1.02 * (tokens * 16384 + logits.numel()) * 2


@pytest.fixture
def launches(monkeypatch):
    """Return a counter of Triton launches by kernel. As on a GPU, no check reads tensors."""
    monkeypatch.setattr(layout, "may_read", lambda tensor: False)
    monkeypatch.setattr(checks, "may_read", lambda tensor: False)
    return count_launches(monkeypatch)


@pytest.mark.parametrize("multiprocessors", [0, 132], ids=["whole rows", "split rows"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("reference", ["ref_logps", "ref_logits"])
@pytest.mark.parametrize("function", [fused_kto_loss, fused_dpo_loss], ids=["kto", "dpo"])
def test_launches(monkeypatch, launches, function, reference, packed, multiprocessors, inplace_backward):
    """The forward launches at most 4 kernels, with a reference's logits 7, the backward 2. Neither calls any other
    operator, so that the host has nothing to wait for.
    """
    monkeypatch.setattr(from_logits, "multiprocessors", lambda device: multiprocessors)
    device = "cuda" if HAS_GPU else "cpu"
    case, _ = wide_case(torch.bfloat16, 16384, packed=packed, device=device)
    # rows with gaps, which a copy would close
    logits = torch.nn.functional.pad(case.logits.requires_grad_(), (0, 8))[..., :-8]
    references = {"ref_logps": torch.zeros(2, device=device), "ref_logits": torch.zeros_like(case.logits)}
    tensors = (logits, case.labels) + ((case.desirable,) if function is fused_kto_loss else ())
    one = torch.ones((), device=device)
    with Operators() as operators:
        loss, _ = function(
            *tensors, **{reference: references[reference]}, inplace_backward=inplace_backward, **case.options
        )
        forward = dict(launches)
        launches.clear()
        torch.autograd.grad(loss, logits, one)
    head = "kto_kernel" if function is fused_kto_loss else "dpo_kernel"
    models = 2 if reference == "ref_logits" else 1
    combine = {"combine_splits_kernel": models} if multiprocessors else {}
    assert forward == {"token_logprobs_kernel": models, "sequence_kernel": models, head: 1, **combine}
    assert dict(launches) == {"sequence_backward_kernel": 1, "token_logprobs_backward_kernel": 1}
    assert operators.names == []


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_the_host_never_waits():
    case = make_case(device="cuda")
    logits = case.logits.requires_grad_()
    fused_kto_loss(logits, case.labels, case.desirable, ref_logits=case.ref_logits)[0].backward()  # compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, metrics = fused_kto_loss(logits, case.labels, case.desirable, ref_logits=case.ref_logits)
        loss.backward()
        metrics.summary()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("shape", [(2, 192, 32768), (1, 40, 262144), (64, 300, 512), (512, 512, 8)], ids=str)
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_the_torch_backend_holds_64_mib_beside_the_gradient(dtype, shape, inplace_backward):
    torch.use_deterministic_algorithms(False)  # its fill operators would be counted
    logits = torch.randn(shape, dtype=dtype, requires_grad=True)
    policy = logits * 1 if inplace_backward else logits
    labels = torch.randint(shape[-1], shape[:-1])
    desirable, ref_logps = torch.ones(shape[0], dtype=torch.bool), torch.zeros(shape[0])

    def step() -> None:
        options = {"ref_logps": ref_logps, "backend": "torch", "inplace_backward": inplace_backward}
        loss, _ = fused_kto_loss(policy, labels, desirable, **options)
        torch.autograd.grad(loss, policy)

    gradient = 0 if inplace_backward else logits.numel() * logits.element_size()
    assert peak_bytes(step, torch.device("cpu")) <= gradient + 64 * MIB


def test_the_torch_backend_holds_less_than_half_of_eager():
    torch.use_deterministic_algorithms(False)
    logits = torch.randn(2, 128, 32768, requires_grad=True)
    labels = torch.randint(32768, (2, 128))

    def eager() -> None:
        logps = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None]).sum()
        torch.autograd.grad(logps, logits)

    def fused() -> None:
        logps = kto_fused.sequence_logps(logits, labels, backend="torch").sum()
        torch.autograd.grad(logps, logits)

    assert peak_bytes(fused, torch.device("cpu")) < peak_bytes(eager, torch.device("cpu")) / 2
