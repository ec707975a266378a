"""The state of a row of logits: kernels and engine name its fields alike, and states over disjoint columns merge."""

import pytest
import torch
from cases import on
from devices import ENGINES
from kto_fused.kernels import memory_tiles, online

from kto_fused.engines import chunks as chunk_module
from kto_fused.engines.chunks import ChunkSpec, LMHead, MergedState, RowState

N, V, H, MIDDLE = 6, 300, 64, 128
FACTOR = 0.7


def make_chunk(engine, dtype, weight, keeps, **options):
    device, backend = on(engine).values()
    transform = {"scale": FACTOR, "softcap": None, "factor": FACTOR}
    spec = ChunkSpec(
        *weight.shape,
        dtype,
        torch.device(device),
        backend,
        keeps,
        transform,
        True,
        keeps == "all",
        num_bytes=2**24,
        **options,
    )
    return spec.kind(N, spec)


def merged(states: list[RowState], targets: torch.Tensor) -> RowState:
    """The formula in kernels/online.py, for columns before and after MIDDLE."""
    stacked = RowState(*(torch.stack(values) for values in zip(*states, strict=True) if values[0] is not None))
    reference = stacked.reference.amax(0)
    step = stacked.reference - reference
    rescale = torch.exp(FACTOR * step)
    return RowState(
        reference=reference,
        exp_sum=(rescale * stacked.exp_sum).sum(0),
        target_logit=torch.where(targets < MIDDLE, *stacked.target_logit),
        weighted_sum=(rescale * (stacked.weighted_sum + stacked.exp_sum * step)).sum(0),
        logit_sum=stacked.logit_sum.sum(0),
        maximum=stacked.maximum.amax(0),
        square_sum=None if stacked.square_sum is None else (rescale**2 * stacked.square_sum).sum(0),
    )


def test_the_engine_and_the_kernels_name_the_same_rows():
    names = {name.lower(): getattr(online, name.upper()).value for name in RowState._fields}
    assert names == {name: row for row, name in enumerate(RowState._fields)}
    assert len(names) == online.STATE_ROWS + 1
    assert RowState._fields[-1] == "square_sum"  # which only a state with squares has
    assert chunk_module.SQUARE_SCALE == online.SQUARE_SCALE.value == 2.0**-memory_tiles.HEADROOM.value
    assert RowState._fields[:3] == ("reference", "exp_sum", "target_logit")  # what RowStatistics takes
    assert chunk_module.NUM_STATISTICS == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_states_of_two_column_ranges_merge_into_the_state_of_all(engine, dtype):
    device = engine[1]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(device, dtype)
    weight = torch.randn(V, H, generator=generator).to(device, dtype)
    targets = torch.tensor([0, 5, MIDDLE - 1, MIDDLE, V - 1, 200], dtype=torch.int32, device=device)
    squares = {"sum_squares": True}
    whole = make_chunk(engine, dtype, weight, "nothing", **squares)
    whole.fold(hidden, LMHead(weight, None), targets, False)
    expected, expected_state = whole.finish(LMHead(weight, None)), whole.state

    chunks = []
    for columns in (slice(0, MIDDLE), slice(MIDDLE, V)):
        is_here = (targets >= columns.start) & (targets < columns.stop)
        lm_head = LMHead(weight[columns].contiguous(), None)
        chunk = make_chunk(engine, dtype, lm_head.weight, "nothing", **squares)
        # a row without a target here takes column 0, and the merge drops its logit
        chunk.fold(hidden, lm_head, torch.where(is_here, targets - columns.start, 0).int(), False)
        chunks.append((chunk, lm_head))
    state = merged([chunk.state for chunk, _ in chunks], targets)
    assert torch.allclose(
        state.reference * FACTOR + state.exp_sum.log(), expected_state.reference * FACTOR + expected_state.exp_sum.log()
    )
    for name in ("target_logit", "logit_sum", "maximum"):
        assert torch.allclose(getattr(state, name), getattr(expected_state, name), rtol=1e-4, atol=1e-4), name
    assert len(expected) == 5
    for chunk, lm_head in chunks:  # each rank gets the same
        assert torch.allclose(chunk.finish(lm_head, MergedState(state, V)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keeps", ["all", "panels"])
def test_gradients_of_two_column_ranges_add_up_under_the_merged_state(keeps):
    """P that was kept under the reference of some columns is rescaled to that of all."""
    engine = ENGINES[1]  # Triton's
    device, dtype = engine[1], torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    hidden = (0.3 * torch.randn(N, H, generator=generator)).to(device, dtype)
    weight = torch.randn(V, H, generator=generator).to(device, dtype)
    weight[MIDDLE:] *= 3  # so that the references differ
    targets = torch.tensor([0, 5, MIDDLE - 1, MIDDLE, V - 1, 200], dtype=torch.int32, device=device)
    exact_hidden = hidden.double().requires_grad_()
    logps = torch.log_softmax(FACTOR * exact_hidden @ weight.double().T, -1).gather(1, targets[:, None].long())
    (expected,) = torch.autograd.grad(logps.sum(), exact_hidden)

    chunks = []
    for columns in (slice(0, MIDDLE), slice(MIDDLE, V)):
        is_here = (targets >= columns.start) & (targets < columns.stop)
        lm_head = LMHead(weight[columns].contiguous(), None)
        chunk = make_chunk(engine, dtype, lm_head.weight, keeps)
        chunk.fold(hidden, lm_head, torch.where(is_here, targets - columns.start, -1).int(), True)
        chunks.append((chunk, lm_head))
    state = merged([chunk.state for chunk, _ in chunks], targets)
    total = torch.zeros(N, H, device=device, dtype=torch.float64)
    for chunk, lm_head in chunks:
        per_token = chunk.finish(lm_head, MergedState(state, V))
        assert torch.allclose(per_token[0].double(), logps[:, 0], atol=1e-4)
        chunk.backward(torch.ones(N, device=device))
        grad, row_scale = chunk.hidden_gradient(lm_head)
        total += grad * row_scale[:, None]
    assert torch.allclose(total, expected, atol=0.02 * expected.abs().max().item())
