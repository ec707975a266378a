"""Generalised advantage estimates: both backends against the recurrence in float64, and what the scan costs."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from counters import MovedBytes, Operators, count_launches
from devices import HAS_GPU
from kto_fused.kernels import scan
from torch.library import opcheck

from kto_fused import gae, reference
from kto_fused.engines import scan as scan_engine

# float32 results are float64 sums that were rounded once: half a unit in the last place, and another half in the twin
TOLERANCE = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 1.2e-7, "atol": 1e-11}}
BLOCK = 16
by_discount = pytest.mark.parametrize(
    ("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.99, 0.0), (0.0, 0.95), (1.0, 1e-30)]
)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 positions, so that short sequences cross their boundaries."""
    monkeypatch.setattr(scan, "BLOCK_POSITIONS", BLOCK)
    monkeypatch.setattr(scan_engine, "SEGMENT", BLOCK)


def make_batch(lengths, *, packed, device, dtype=torch.float32, masked=False, bootstrapped=False):
    """(rewards, values, options): sequences of ``lengths``, padded to the longest or packed.

    Where ``masked``, a third of the positions hold no token. What is outside the mask is NaN.
    """
    seq_len = max(lengths)
    is_real = torch.arange(seq_len) < torch.tensor(lengths)[:, None]
    is_token = is_real & (torch.rand(is_real.shape) > 1 / 3) if masked else is_real
    rewards, values = (
        torch.randn(is_real.shape, dtype=dtype).masked_fill(~is_token, torch.nan).to(device) for _ in range(2)
    )
    options = {"mask": is_token.to(device)} if masked or not packed else {}
    if packed:
        rewards, values = rewards[is_real.to(device)], values[is_real.to(device)]
        options = {name: mask[is_real.to(device)] for name, mask in options.items()}
        options["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    if bootstrapped:
        options["bootstrap"] = torch.randn(len(lengths), dtype=dtype).to(device)
    return rewards, values, options


def check(engine, rewards, values, options, *, gamma=1.0, lam=0.95):
    """Compare a backend with the recurrence; returns its (advantages, returns)."""
    results = gae(rewards, values, gamma=gamma, lam=lam, backend=engine[0], **options)
    expected = reference.gae(rewards, values, gamma=gamma, lam=lam, **options)
    for result, expected_result in zip(results, expected, strict=True):
        assert result.isfinite().all()
        torch.testing.assert_close(result, expected_result, **TOLERANCE[result.dtype])
    return results


# ---- the numbers ----------------------------------------------------------------------------------------------------


@by_discount
def test_the_twin_is_the_sum_of_discounted_errors(gamma, lam):
    """The paper's equation 16: A_t = sum over l of (gamma lam)^l delta_{t+l}."""
    rewards, values = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    bootstrap = torch.randn(1, dtype=torch.float64)
    deltas = rewards + gamma * torch.cat([values[1:], bootstrap]) - values
    expected = [sum((gamma * lam) ** (later - t) * deltas[later] for later in range(t, 7)) for t in range(7)]
    advantages, returns = reference.gae(rewards[None], values[None], gamma=gamma, lam=lam, bootstrap=bootstrap)
    torch.testing.assert_close(advantages[0], torch.stack(expected))
    torch.testing.assert_close(returns, advantages + values)


@by_discount
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("bootstrapped", [False, True], ids=["ended", "bootstrapped"])
def test_equals_the_recurrence(engine, small_blocks, gamma, lam, packed, masked, bootstrapped):
    """Lengths of no token, one, a block and one more or less: nothing outside the mask is read, where all is NaN."""
    lengths = [BLOCK, 0, 1, 2 * BLOCK + 1, BLOCK - 1, 0]
    batch = make_batch(lengths, packed=packed, device=engine[1], masked=masked, bootstrapped=bootstrapped)
    check(engine, *batch, gamma=gamma, lam=lam)


@pytest.mark.parametrize("length", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 5 * BLOCK + 3])
def test_a_single_sequence_of_any_length(engine, small_blocks, length):
    rewards, values = torch.randn(2, 1, length, device=engine[1])
    check(engine, rewards, values, {})


@pytest.mark.parametrize("gamma_lam", [0.95, 1.0])
def test_one_hundred_thousand_positions_in_one_call(engine, gamma_lam):
    """Packed beside a short sequence, in float32. The interpreter walks through a tenth of them."""
    length = 10_000 if engine == ("triton", "cpu") else 100_000
    batch = make_batch([3, length - 3], packed=True, device=engine[1], bootstrapped=True)
    check(engine, *batch, lam=gamma_lam)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(engine, small_blocks, dtype):
    rewards, values, options = make_batch([20, 5], packed=False, device=engine[1], dtype=dtype, bootstrapped=True)
    advantages, returns = check(engine, rewards, values, options)
    assert advantages.dtype == returns.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_one_float64_tensor_makes_the_results_float64(engine, small_blocks):
    rewards, values, options = make_batch([20, 5], packed=False, device=engine[1])
    for tensors in ((rewards.double(), values.bfloat16()), (rewards, values.double())):
        assert check(engine, *tensors, options)[0].dtype == torch.float64
    options["bootstrap"] = torch.ones(2, dtype=torch.float64, device=engine[1])
    assert check(engine, rewards, values, options)[0].dtype == torch.float64


@pytest.mark.parametrize("number", [np.float32(0.9), np.int64(1), Fraction(1, 3)], ids=repr)
def test_discounts_of_any_type_compute_like_floats(number):
    rewards, values = torch.randn(2, 1, 40, dtype=torch.float64)
    for function in (gae, reference.gae):
        results = function(rewards, values, gamma=number, lam=number)
        expected = function(rewards, values, gamma=float(number), lam=float(number))
        assert all(torch.equal(result, x) for result, x in zip(results, expected, strict=True))


def test_a_skipped_position_changes_nothing(engine, small_blocks):
    """Tokens with a tool's output between them have the advantages of the same tokens side by side."""
    rewards, values, options = make_batch([40], packed=False, device=engine[1], masked=True)
    is_token = options["mask"]
    results = gae(rewards, values, gamma=0.9, lam=0.8, backend=engine[0], **options)
    together = gae(rewards[is_token][None], values[is_token][None], gamma=0.9, lam=0.8, backend=engine[0])
    for result, expected in zip(results, together, strict=True):
        torch.testing.assert_close(result[is_token], expected[0], **TOLERANCE[torch.float32])
        assert (result[~is_token] == 0).all()


def test_lam_0_and_lam_1(engine, small_blocks):
    """lam = 0 gives the one-step error; lam = 1 the discounted rewards to come, whatever the values are."""
    rewards, values = torch.randn(2, 3, 40, device=engine[1], dtype=torch.float64)
    bootstrap = torch.randn(3, device=engine[1], dtype=torch.float64)
    next_values = torch.cat([values[:, 1:], bootstrap[:, None]], dim=1)
    advantages, _ = gae(rewards, values, gamma=0.9, lam=0.0, bootstrap=bootstrap, backend=engine[0])
    torch.testing.assert_close(advantages, rewards + 0.9 * next_values - values)

    _, returns = gae(rewards, values, gamma=0.9, lam=1.0, bootstrap=bootstrap, backend=engine[0])
    weights = 0.9 ** torch.arange(41, dtype=torch.float64, device=engine[1])
    expected = [(torch.cat([rewards[:, t:], bootstrap[:, None]], dim=1) * weights[: 41 - t]).sum(1) for t in range(40)]
    torch.testing.assert_close(returns, torch.stack(expected, dim=1))


def test_float32_sums_lose_no_digit(engine, small_blocks):
    """Ten rewards of 1e-3 beside 1e6 and -1e6: a float32 sum would swallow them."""
    rewards = torch.tensor([[1e6] + [1e-3] * 10 + [-1e6]], device=engine[1])
    advantages, _ = gae(rewards, torch.zeros_like(rewards), gamma=1.0, lam=1.0, backend=engine[0])
    assert advantages[0, 0].item() == pytest.approx(1e-2, rel=1e-6)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_nan_stays_in_its_sequence_and_before_its_token(engine, small_blocks, packed):
    lengths = [BLOCK + 5, 2 * BLOCK, 3]
    rewards, values, options = make_batch(lengths, packed=packed, device=engine[1], bootstrapped=True)
    start = lengths[0] if packed else 2 * BLOCK
    expected = gae(rewards, values, gamma=1.0, lam=0.95, backend=engine[0], **options)
    rewards.view(-1)[start + 20] = torch.nan
    results = gae(rewards, values, gamma=1.0, lam=0.95, backend=engine[0], **options)
    for result, expected_result in zip(results, expected, strict=True):
        result, expected_result = result.flatten(), expected_result.flatten()
        assert result[start : start + 21].isnan().all()
        assert torch.equal(result[:start], expected_result[:start])
        assert torch.equal(result[start + 21 :], expected_result[start + 21 :])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_no_token_at_all(engine, packed):
    shape = (5,) if packed else (2, 5)
    offsets = torch.tensor([0, 2, 5], device=engine[1]) if packed else None
    garbage = torch.full(shape, torch.nan, device=engine[1])
    nowhere = torch.zeros(shape, dtype=torch.bool, device=engine[1])
    results = gae(garbage, garbage, gamma=1.0, lam=0.95, mask=nowhere, cu_seqlens=offsets, backend=engine[0])
    assert all((result == 0).all() for result in results)


def test_sequences_of_no_position(engine):
    empty = torch.empty(2, 0, device=engine[1])
    for result in gae(empty, empty, gamma=1.0, lam=0.95, backend=engine[0]):
        assert result.shape == (2, 0)
    offsets = torch.zeros(3, dtype=torch.int32, device=engine[1])
    for result in gae(empty[0], empty[0], gamma=1.0, lam=0.95, cu_seqlens=offsets, backend=engine[0]):
        assert result.shape == (0,)


# ---- what comes in and goes out -------------------------------------------------------------------------------------


def test_strides_that_a_value_model_leaves(engine, small_blocks):
    rewards, values, mask = (torch.randn(3, 21, 2, device=engine[1]) for _ in range(3))
    options = {"mask": mask[:, :-1, 0] > 0, "bootstrap": values[:, -1, 0]}
    check(engine, rewards[:, 1:, 1], values[:, :-1, 0], options)
    check(engine, rewards[..., 0].contiguous()[:, 1:], values[..., 0].contiguous()[:, :-1], options)
    check(engine, rewards[..., 0].T, values[..., 0].T, {})
    check(
        engine,
        rewards[:1, :, 0].expand(3, -1),
        values[:, :1, 0].expand(-1, 21),
        {"mask": mask[:1, :, 0].expand(3, -1) > 0},
    )


def test_a_packed_batch_keeps_its_leading_one(engine, small_blocks):
    rewards, values, options = make_batch([20, 5], packed=True, device=engine[1])
    expected = gae(rewards, values, gamma=1.0, lam=0.95, backend=engine[0], **options)
    results = gae(rewards[None], values[None], gamma=1.0, lam=0.95, backend=engine[0], **options)
    assert all(torch.equal(result, x[None]) for result, x in zip(results, expected, strict=True))
    check(engine, rewards[None], values[None], options)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_a_mask_of_integers(engine, small_blocks, dtype):
    rewards, values, options = make_batch([20, 5], packed=False, device=engine[1], masked=True)
    expected = gae(rewards, values, gamma=1.0, lam=0.95, backend=engine[0], **options)
    options["mask"] = options["mask"].to(dtype)
    results = check(engine, rewards, values, options)
    assert all(torch.equal(result, x) for result, x in zip(results, expected, strict=True))


def test_nothing_carries_a_gradient(engine, small_blocks):
    rewards, values = (torch.randn(2, 5, device=engine[1], requires_grad=True) for _ in range(2))
    bootstrap = torch.randn(2, device=engine[1], requires_grad=True)
    for function in (gae, reference.gae):
        results = function(rewards, values, gamma=1.0, lam=0.95, bootstrap=bootstrap, backend=engine[0])
        assert not any(result.requires_grad for result in results)


def test_two_calls_give_the_same_bits(engine, small_blocks):
    batch = make_batch([40, 3, 17], packed=True, device=engine[1], masked=True)
    first, second = (gae(*batch[:2], gamma=1.0, lam=0.95, backend=engine[0], **batch[2]) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_compiled_batches_of_many_lengths_see_one_operator(engine, small_blocks):
    torch.use_deterministic_algorithms(False)  # which torch.compile guards on
    torch._dynamo.reset()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=keep, dynamic=True)
    def step(rewards, values, mask):
        return gae(rewards, values, gamma=1.0, lam=0.95, mask=mask, backend=engine[0])

    for length in (4, 7, 12):
        rewards, values, options = make_batch([length, 3], packed=False, device=engine[1], masked=True)
        results, expected = step(rewards, values, options["mask"]), check(engine, rewards, values, options)
        assert all(torch.equal(result, x) for result, x in zip(results, expected, strict=True))
    (graph,) = graphs
    assert sum("kto_fused.gae" in str(node.target) for node in graph.graph.nodes) == 1


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_the_operator_is_what_its_fake_says(engine, small_blocks, packed):
    rewards, values, options = make_batch([20, 5], packed=packed, device=engine[1], masked=True, bootstrapped=True)
    arguments = (rewards, values, options["mask"], options.get("cu_seqlens"), options["bootstrap"], 1.0, 0.95)
    opcheck(scan_engine.gae.op, (*arguments, engine[0]), test_utils=("test_schema", "test_faketensor"))


# ---- errors ---------------------------------------------------------------------------------------------------------

ROWS = torch.zeros(2, 5)
PACKED = {"rewards": torch.zeros(6), "values": torch.zeros(6)}
ERRORS = {
    "rewards of one dimension": (
        {"rewards": torch.zeros(5)},
        ValueError,
        "rewards must be [B, T], got shape [5]; packed, [N], it needs cu_seqlens",
    ),
    "no sequence": ({"rewards": ROWS[:0]}, ValueError, "rewards must hold at least one sequence, got shape [0, 5]"),
    "rewards of integers": (
        {"rewards": ROWS.long()},
        TypeError,
        "rewards must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "values one longer": (
        {"values": torch.zeros(2, 6)},
        ValueError,
        "values has shape [2, 6], expected the shape of rewards, [2, 5]",
    ),
    "values on another device": (
        {"values": ROWS.to("meta")},
        ValueError,
        "values is on meta, but rewards is on cpu: expected the same device",
    ),
    "a mask of floats": ({"mask": ROWS}, TypeError, "mask must be bool (or 0/1 integers), got torch.float32"),
    "a mask that is a label": (
        {"mask": torch.full((2, 5), -100)},
        ValueError,
        "mask must hold 0 or 1, got -100",
    ),
    "a mask of another shape": (
        {"mask": torch.ones(5, dtype=torch.bool)},
        ValueError,
        "mask has shape [5], expected the shape of rewards, [2, 5]",
    ),
    "a bootstrap per position": (
        {"bootstrap": ROWS},
        ValueError,
        "bootstrap has shape [2, 5], expected [2], one per sequence",
    ),
    "a bootstrap that is a number": ({"bootstrap": 0.0}, TypeError, "bootstrap must be a tensor, got float"),
    "gamma above 1": ({"gamma": 1.5}, ValueError, "gamma must lie in [0, 1], got 1.5"),
    "lam below 0": ({"lam": -0.1}, ValueError, "lam must lie in [0, 1], got -0.1"),
    "lam is NaN": ({"lam": float("nan")}, ValueError, "lam must be a finite number, got nan"),
    "gamma as a tensor": ({"gamma": torch.ones(())}, TypeError, "gamma must be a number, got Tensor"),
    "an unknown backend": (
        {"backend": "cuda"},
        ValueError,
        "backend must be one of ['triton', 'torch'] or None, got 'cuda'",
    ),
    "offsets beside padded rewards": (
        {"cu_seqlens": torch.tensor([0, 5])},
        ValueError,
        "rewards must be [N] or [1, N] with cu_seqlens, got shape [2, 5]",
    ),
    "offsets that end early": (
        {**PACKED, "cu_seqlens": torch.tensor([0, 3, 5])},
        ValueError,
        "cu_seqlens must rise from 0 to the 6 packed positions, got [0, 3, 5]",
    ),
    "offsets that fall": (
        {**PACKED, "cu_seqlens": torch.tensor([0, 5, 3, 6])},
        ValueError,
        "cu_seqlens must rise from 0 to the 6 packed positions, got [0, 5, 3, 6]",
    ),
    "one offset": (
        {**PACKED, "cu_seqlens": torch.tensor([0])},
        ValueError,
        "cu_seqlens must be [B+1] offsets of B >= 1 sequences, got shape [1]",
    ),
}


@pytest.mark.parametrize("function", [gae, reference.gae], ids=["fused", "twin"])
@pytest.mark.parametrize(("changes", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_an_error_says_what_came_and_what_was_expected(function, changes, error, message):
    arguments = {"rewards": ROWS, "values": ROWS, "gamma": 1.0, "lam": 0.95, **changes}
    with pytest.raises(error) as raised:
        function(**arguments)
    assert message in str(raised.value)


@pytest.fixture
def unread(monkeypatch):
    """As on a GPU: the host reads no tensor."""
    monkeypatch.setattr(scan_engine, "may_read", lambda tensor: False)


@pytest.mark.parametrize(
    "offsets", [[0, 5, 3, 20], [1, 5, 9, 20], [0, 5, 9, 19], [0, -4, 9, 20], [0, 30, 9, 20], [0, 0, 0, 0]], ids=str
)
def test_offsets_that_the_host_does_not_read_give_nan_everywhere(unread, small_blocks, offsets):
    device = "cuda" if HAS_GPU else "cpu"
    rewards, offsets = torch.randn(20, device=device), torch.tensor(offsets, device=device)
    for result in gae(rewards, rewards, gamma=1.0, lam=0.95, cu_seqlens=offsets, backend="triton"):
        assert result.isnan().all()


def test_a_mask_that_the_host_does_not_read_gives_nan_in_its_sequence(unread, small_blocks):
    device = "cuda" if HAS_GPU else "cpu"
    rewards, mask = torch.randn(2, 20, device=device), torch.ones(2, 20, dtype=torch.long, device=device)
    mask[0, 10] = -100
    for result in gae(rewards, rewards, gamma=1.0, lam=0.95, mask=mask, backend="triton"):
        assert result[0, :11].isnan().all()
        assert result[0, 11:].isfinite().all()
        assert result[1].isfinite().all()


def test_the_torch_backend_reads_offsets_and_mask_on_every_device(unread):
    rewards = torch.zeros(6)
    with pytest.raises(ValueError, match="cu_seqlens must rise"):
        gae(rewards, rewards, gamma=1.0, lam=0.95, cu_seqlens=torch.tensor([0, 3, 5]), backend="torch")
    with pytest.raises(ValueError, match="mask must hold 0 or 1"):
        gae(rewards[None], rewards[None], gamma=1.0, lam=0.95, mask=torch.full((1, 6), 2), backend="torch")


# ---- costs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_one_launch_for_any_batch_and_nothing_to_wait_for(monkeypatch, small_blocks, unread, packed):
    launches = count_launches(monkeypatch)
    device = "cuda" if HAS_GPU else "cpu"
    rewards, values, options = make_batch([40, 3, 17], packed=packed, device=device, masked=True, bootstrapped=True)
    with Operators() as operators:
        gae(rewards, values, gamma=1.0, lam=0.95, backend="triton", **options)
    assert launches == {"gae_kernel": 1}
    assert operators.names == []


@pytest.mark.skipif(HAS_GPU, reason="counts what Triton's interpreter does, without a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_moved(monkeypatch, small_blocks, dtype):
    """The mask of each position and the numbers of each token are read at most twice; each result is written once."""
    moved = MovedBytes(monkeypatch)
    rewards, values, options = make_batch([60, 33], packed=False, device="cpu", dtype=dtype, masked=True)
    gae(rewards, values, gamma=1.0, lam=0.95, backend="triton", **options)
    tokens, positions = int(options["mask"].sum()), rewards.numel()
    read_once = tokens * 2 * dtype.itemsize + positions
    assert 0.9 * 2 * read_once <= moved.loaded <= 2 * read_once
    assert moved.stored == positions * 2 * 4


def test_the_torch_backend_runs_few_operators():
    """Some hundred operators, where a loop over the positions would run several for each of them."""
    rewards, values = torch.randn(2, 4, 25_000)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gae(rewards, values, gamma=1.0, lam=0.95, backend="torch")
    assert sum(event.count for event in profile.key_averages()) < 1000
