"""Chunks of completion tokens: any size gives the same results, in tiles of logits in memory and in registers."""

import math
from dataclasses import replace

import pytest
import torch
import triton.language as tl
from cases import (
    INPUTS,
    LOGP_TOLERANCE,
    TWINS,
    assert_close,
    assert_same_gradient,
    check_hidden_against_twin,
    check_loss_and_metrics,
    chunks_of,
    is_masked,
    make_hidden_case,
    on,
    run_hidden,
    some,
)
from devices import HAS_GPU
from kto_fused.kernels import memory_tiles, register_tiles

import kto_fused
from kto_fused import fused_linear_dpo_loss, fused_linear_kto_loss, linear_token_logps, reference
from kto_fused.engines import chunks as chunk_module

FUNCTIONS = [fused_linear_kto_loss, fused_linear_dpo_loss]
DEVICE = "cuda" if HAS_GPU else "cpu"
FROZEN = ("hidden",)
HEAD_ONLY = ("weight", "bias")

by_function = pytest.mark.parametrize("function", FUNCTIONS, ids=["kto", "dpo"])
by_trained = pytest.mark.parametrize("trained", [INPUTS, FROZEN], ids=["trained", "frozen"])


# ---- chunks -------------------------------------------------------------------------------------------------------

CHUNKED = {
    "trained": (fused_linear_kto_loss, INPUTS, {"reference_point": 0.2}),
    "frozen": (fused_linear_kto_loss, FROZEN, {"reference_point": 0.2}),
    "head only": (fused_linear_kto_loss, HEAD_ONLY, {"reference_point": 0.2}),
    "the batch's mean": (fused_linear_kto_loss, INPUTS, {"reference_point": "batch_mean"}),
    "the batch's mean, frozen": (fused_linear_kto_loss, FROZEN, {"reference_point": "batch_mean"}),
    "one loss per sequence": (fused_linear_kto_loss, INPUTS, {"reduction": "none"}),
    "one loss per sequence, frozen": (fused_linear_kto_loss, FROZEN, {"reduction": "none"}),
    "pairs": (fused_linear_dpo_loss, INPUTS, {}),
    "pairs, frozen": (fused_linear_dpo_loss, FROZEN, {}),
    "one loss per pair": (fused_linear_dpo_loss, INPUTS, {"reduction": "none"}),
}


@pytest.mark.parametrize("setting", CHUNKED)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_any_chunk_gives_the_same_result(engine, setting, packed):
    """Chunks hold one token, part of a sequence or a pair, exactly one of them, several, or the whole batch."""
    function, trained, options = CHUNKED[setting]
    case = make_hidden_case(batch=6, seq_len=8, vocab=61, dtype=torch.float64, bias=True, packed=packed, **on(engine))
    expected = run_hidden(function, case, trained=trained, **options)
    for num_tokens in some(engine, [5, 2, 7, 11, 1000]):
        with chunks_of(num_tokens):
            compare(run_hidden(function, case, trained=trained, **options), expected)
    for chunk_bytes in some(engine, [1, 2000, 2**23, 2**40, 2**70]):
        compare(run_hidden(function, case, trained=trained, chunk_bytes=chunk_bytes, **options), expected)


@by_trained
@pytest.mark.parametrize("kind", ["transposed", "every other column", "rows apart"])
def test_a_strided_head(engine, kind, trained):
    case = make_hidden_case(vocab=300, dtype=torch.bfloat16, **on(engine))
    wide = torch.full((300, 40), torch.nan, dtype=torch.bfloat16, device=engine[1])
    views = {
        "transposed": torch.empty_like(case.weight.T.contiguous()).T,
        "every other column": wide[:, :32:2],
        "rows apart": wide[:, :16],
    }
    case = replace(case, weight=views[kind].copy_(case.weight))
    assert case.weight.stride() != (16, 1)
    check_hidden_against_twin(fused_linear_kto_loss, case, trained=trained)


def test_a_reference_whose_square_head_is_the_policys_transposed(engine):
    case = make_hidden_case(vocab=16, hidden_size=16, dtype=torch.float64, **on(engine))
    case.labels[case.labels >= 0] %= 16
    check_hidden_against_twin(
        fused_linear_kto_loss, case.with_options(ref_hidden=case.ref_hidden, ref_lm_head_weight=case.weight.T)
    )


@pytest.mark.parametrize("setting", ["frozen", "one loss per sequence"])
def test_likely_targets_at_the_ends_of_panels(engine, setting, monkeypatch):
    """Where the target's probability is near 1, its own entry must not swamp the others' in the gradient."""
    function, trained, options = CHUNKED[setting]
    for name in ("TILE_LOGITS", "PANEL_LOGITS", "WEIGHT_PANEL_LOGITS"):
        monkeypatch.setattr(chunk_module, name, 1)
    case = make_hidden_case(batch=4, seq_len=6, vocab=2500, dtype=torch.bfloat16, std=1.0, **on(engine))
    ends = torch.tensor([0, 1023, 1024, 2047, 2048, 2499], device=engine[1])
    hidden_size = case.hidden.shape[-1]
    case.weight[ends] = 0
    for index, token in enumerate(ends):
        case.weight[token, index] = 12.0
    rows = torch.arange(case.labels.numel(), device=engine[1]).view_as(case.labels) % len(ends)
    case.labels[:] = torch.where(case.labels >= 0, ends[rows], case.labels)
    likely = torch.nn.functional.one_hot(rows.roll(-1, dims=1), hidden_size)
    case.hidden.nan_to_num_().mul_(0.1).add_(likely)
    check_hidden_against_twin(function, case, trained=trained, **options)


@pytest.mark.parametrize("setting", CHUNKED)
@pytest.mark.parametrize("num_tokens", [None, 7], ids=["whole", "split"])
def test_panels_of_columns(engine, setting, num_tokens, monkeypatch):
    """Gradients in bfloat16 come from three panels of columns in turn, with a frozen head and on second visits."""
    function, trained, options = CHUNKED[setting]
    for name in ("TILE_LOGITS", "PANEL_LOGITS", "WEIGHT_PANEL_LOGITS"):
        monkeypatch.setattr(chunk_module, name, 1)
    softcap = {"logit_softcap": 20.0, "logit_scale": 1.5}
    case = make_hidden_case(batch=4, seq_len=6, vocab=2500, dtype=torch.bfloat16, bias=True, **on(engine))
    with chunks_of(num_tokens):
        check_hidden_against_twin(function, case, trained=trained, **options, **softcap)


@pytest.mark.parametrize("setting", CHUNKED)
def test_a_second_visit_in_one_chunk_beyond_the_budget(setting, monkeypatch):
    """A single chunk of all tokens has three panels, each one kernel step wide: no float32 sum of weight gradients."""
    function, trained, options = CHUNKED[setting]
    engine = ("triton", "cuda" if HAS_GPU else "cpu")
    case = make_hidden_case(
        batch=4, seq_len=6, vocab=2500, hidden_size=64, dtype=torch.bfloat16, bias=True, **on(engine)
    )
    panels, again = [], chunk_module.FoldedRows.again

    def seen_again(chunk, hidden, *args):
        for panel in again(chunk, hidden, *args):
            panels.append((len(hidden), panel.start))
            yield panel

    monkeypatch.setattr(chunk_module.FoldedRows, "again", seen_again)
    check_hidden_against_twin(function, case, trained=trained, chunk_bytes=1, **options)
    num_tokens = (~is_masked(case)).sum().item()
    assert panels == ([(num_tokens, start) for start in (0, 1024, 2048)] if "weight" in trained else [])


@pytest.mark.parametrize("tile_logits", [1, 2**24], ids=["three tiles", "one tile"])
def test_the_weights_gradient_lends_its_memory(tile_logits, monkeypatch):
    """A single chunk's tiles, also the reference's, and its gradient by the hidden states lie in the memory of the
    weight's gradient, which the chunk's last GEMM writes.
    """
    engine = ("triton", "cuda" if HAS_GPU else "cpu")
    monkeypatch.setattr(chunk_module, "TILE_LOGITS", tile_logits)
    chunks, make_chunk = [], kto_fused.engines.hidden.make_chunk

    def seen_make_chunk(*args):
        chunks.append(make_chunk(*args))
        return chunks[-1]

    monkeypatch.setattr(kto_fused.engines.hidden, "make_chunk", seen_make_chunk)
    case = make_hidden_case(seq_len=5, vocab=2500, hidden_size=128, dtype=torch.bfloat16, bias=True, **on(engine))
    check_hidden_against_twin(fused_linear_kto_loss, case)
    (chunk,) = (chunk for chunk in chunks if isinstance(chunk, chunk_module.FoldedRows))
    assert chunk.lent.shape == case.weight.shape
    assert chunk.buffer.data_ptr() == chunk.lent.data_ptr()


def compare(actual, expected, tolerance: float = LOGP_TOLERANCE[torch.float64]) -> None:
    (loss, metrics, grads), (expected_loss, expected_metrics, expected_grads) = actual, expected
    assert_close(loss, expected_loss, tolerance, "loss")
    for name in ("logps", "ref_logps", "rewards", "entropy", "mean_logits", "token_accuracy"):
        assert_close(getattr(metrics, name), getattr(expected_metrics, name), tolerance, name)
    for name, grad in grads.items():
        assert_same_gradient(grad, expected_grads[name])


@by_function
@by_trained
@pytest.mark.parametrize("num_tokens", [None, 4], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_results_repeat_bit_for_bit(engine, function, trained, num_tokens, dtype):
    case = make_hidden_case(vocab=1000, hidden_size=64, seq_len=8, bias=True, dtype=dtype, **on(engine))
    with chunks_of(num_tokens):
        first, again = (run_hidden(function, case, trained=trained) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1].logps, again[1].logps)
    for name, grad in first[2].items():
        assert torch.equal(grad, again[2][name])


@by_function
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_gradients_of_many_chunks_are_rounded_once(engine, function, dtype):
    """If each chunk's sum were rounded, the error would grow with the number of chunks."""
    case = make_hidden_case(batch=16, seq_len=8, dtype=dtype, bias=True, **on(engine))
    options = {"reference_point": 0.0} if function is fused_linear_kto_loss else {}
    exact = case.map(torch.Tensor.double)
    _, _, exact_grads = run_hidden(TWINS[function], exact, **options)
    errors = []
    for num_tokens in (None, 16):
        with chunks_of(num_tokens):
            _, _, grads = run_hidden(function, case, **options)
        errors.append([(grads[name].double() - exact_grads[name]).norm().item() for name in HEAD_ONLY])
    for once, chunked in zip(*errors, strict=True):
        assert chunked <= 1.2 * once


# ---- small gradients, far columns ---------------------------------------------------------------------------------


def test_float16_gradients_reach_the_loss_scaler_whole(engine):
    """The forward's gradient is too small for float16; times the loss scale it is not."""
    case = make_hidden_case(dtype=torch.float16, packed=False, loss_type="kto", beta=1e-5, **on(engine))
    exact = case.map(torch.Tensor.double).with_options(backend=None)
    results = []
    for function, x in ((fused_linear_kto_loss, case), (reference.linear_kto_loss, exact)):
        hidden, weight = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_()
        options = {**x.options, "ref_logps": torch.zeros(len(x.labels), device=engine[1])}
        loss, _ = function(hidden, weight, x.labels, x.desirable, reference_point=0.0, **options)
        (loss * 2.0**16).backward()
        results.append((hidden.grad, weight.grad))
    for actual, expected in zip(*results, strict=True):
        assert_same_gradient(actual, expected)


FAR = {  # biases of the columns, far from each other: (first column, last column, bias)
    "near": [],
    "later columns far larger": [(1500, 1600, 200.0), (2400, 2500, 350.0)],
    "nothing but -inf at first": [(0, 1024, -math.inf)],
    "every other tile -inf": [(0, 1024, -math.inf), (2048, 2500, -math.inf)],
    "the smallest numbers at first": [(0, 1024, torch.finfo(torch.bfloat16).min)],
    "all far below zero": [(0, 2800, -200.0)],
    "a far larger one, then the largest numbers": [(1500, 1600, 25.0), (2400, 2500, 1e29)],
}


@by_trained
@pytest.mark.parametrize(("chunk_bytes", "panel"), [(1, 1), (2**30, 1), (2**30, 2), (2**30, 3)])
@pytest.mark.parametrize("columns", FAR)
def test_tiles_of_far_columns(columns, chunk_bytes, panel, trained, engine, monkeypatch):
    """A later tile may move the reference that a row's numerators are relative to. The earlier tiles stay exact, in the
    same panel and in panels before it.
    """
    case = make_hidden_case(batch=2, vocab=2500, dtype=torch.bfloat16, **on(engine))
    num_tokens = int((case.labels[:, 1:] >= 0).sum())
    monkeypatch.setattr(chunk_module, "TILE_LOGITS", 1)  # the narrowest tiles: three
    monkeypatch.setattr(chunk_module, "PANEL_LOGITS", panel * 1024 * num_tokens)
    monkeypatch.setattr(chunk_module, "WEIGHT_PANEL_LOGITS", panel * 1024 * num_tokens)
    bias = torch.zeros(2500, device=engine[1])
    for first, last, value in FAR[columns]:
        bias[first:last] = value
    bias = bias.bfloat16()
    case.labels[case.labels >= 0] = case.labels[case.labels >= 0] % 1024 + 1024
    results = []
    for function, x in ((fused_linear_kto_loss, case), (reference.linear_kto_loss, case.map(torch.Tensor.double))):
        leaves = [
            y.detach().to(x.hidden.dtype).requires_grad_(name in trained)
            for name, y in zip(INPUTS, (x.hidden, x.weight, bias), strict=True)
        ]
        options = {"ref_logps": torch.zeros(2, device=engine[1]), "reference_point": 0.0, "beta": 1e-3}
        if x is case:
            options |= {"backend": engine[0], "chunk_bytes": chunk_bytes}
        loss, metrics = function(*leaves[:2], x.labels, x.desirable, lm_head_bias=leaves[2], **options)
        loss.backward()
        results.append((metrics, [leaf.grad for leaf in leaves if leaf.requires_grad]))
    (metrics, grads), (exact, exact_grads) = results
    assert_close(metrics.logps, exact.logps, 1e-5, "logps")
    assert_close(metrics.entropy, exact.entropy, 1e-5, "entropy")
    for actual, expected in zip(grads, exact_grads, strict=True):
        assert_same_gradient(actual, expected, roundings=1.5 if engine == ("triton", "cpu") else 1.0)


@pytest.fixture
def in_registers(monkeypatch):
    """Return the list of calls of the kernels that fold logits, or keep P, in registers. Triton's interpreter runs
    these kernels on any machine.
    """
    if HAS_GPU and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs the shared memory of a Hopper GPU")
    calls = []

    def counted(name):
        function = getattr(register_tiles, name)

        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(register_tiles, name, call)

    for name in ("fold", "keep"):
        counted(name)
    if not HAS_GPU:  # Triton's interpreter would multiply bfloat16's bits as if they were integers
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

        create_dot = InterpreterBuilder.create_dot

        def dot(builder, a, b, *others):
            as_float32 = (TensorHandle((x.data.astype("uint32") << 16).view("float32"), tl.float32) for x in (a, b))
            return create_dot(builder, *as_float32, *others)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
        small = {"ROWS": 32, "COLUMNS": 64, "DEPTH": 32, "GROUP_ROWS": 2, "MERGE_TILES": 4, "MERGE_ROWS": 16}
        for name, value in small.items():
            monkeypatch.setattr(register_tiles, name, value)
    monkeypatch.setattr(memory_tiles, "BLOCK", 128)  # the width of a panel is a multiple of BLOCK
    monkeypatch.setattr(chunk_module, "_is_hopper", lambda device: True)
    return calls


def register_case(columns, vocab, **options):
    """Return a case with several groups of row blocks, several merge steps, and targets behind the first columns."""
    sizes = {"batch": 5, "seq_len": 40, "vocab": vocab, "hidden_size": 64}
    case = make_hidden_case(**sizes, dtype=torch.bfloat16, device=DEVICE, backend="triton", **options)
    bias = torch.zeros(vocab, device=DEVICE)
    for first, last, value in FAR[columns]:
        bias[first // 4 : last // 4] = value
    case.labels[case.labels >= 0] = case.labels[case.labels >= 0] % 444 + 256
    return replace(case, bias=bias.bfloat16() if FAR[columns] else None)


@pytest.mark.parametrize("columns", FAR)
@pytest.mark.parametrize("num_tokens", [None, 40], ids=["one chunk", "chunks"])
@pytest.mark.parametrize(("vocab", "temperature"), [(700, 1.0), (768, 0.7)], ids=["a rest of columns", "none"])
def test_logits_folded_in_registers(columns, num_tokens, vocab, temperature, in_registers):
    case = register_case(columns, vocab, temperature=temperature)
    with chunks_of(num_tokens), torch.no_grad():
        loss, metrics, _ = run_hidden(fused_linear_kto_loss, case, trained=())
    assert len(in_registers) == 2 if num_tokens is None else len(in_registers) > 2, "policy and reference"
    exact = case.map(torch.Tensor.double).with_options(backend=None)
    exact_loss, exact_metrics, _ = run_hidden(reference.linear_kto_loss, exact, trained=())
    if columns == "the smallest numbers at first":  # float32 cannot hold their mean
        metrics, exact_metrics = (replace(x, mean_logits=torch.zeros(5)) for x in (metrics, exact_metrics))
    check_loss_and_metrics((loss, metrics), (exact_loss, exact_metrics), torch.bfloat16)


# what is kept: all, a panel while s is not known, and d loss / d logits on a second visit
KEPT = {"all": (INPUTS, None, "fold"), "panels": (FROZEN, None, "fold"), "second visit": (INPUTS, 10, "keep")}


@pytest.mark.parametrize("columns", FAR)
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize(("vocab", "temperature"), [(700, 1.0), (768, 0.7)], ids=["a rest of columns", "none"])
def test_gradients_from_registers(columns, kept, vocab, temperature, in_registers, monkeypatch):
    """Also of logits far above the target's, although a row is measured relative to its target. No target is -inf.
    Panels have 256 columns; where V is no multiple of that, the last one has 188.
    """
    trained, num_tokens, last_call = KEPT[kept]
    case = register_case(columns, vocab, temperature=temperature, beta=1e-3)
    case.labels[(case.labels >= 512) & (case.labels < 625)] -= 256
    case = case.with_options(ref_logps=torch.zeros(5, device=DEVICE))
    monkeypatch.setattr(chunk_module, "PANEL_LOGITS", 256 * int((case.labels[:, 1:] >= 0).sum()))
    monkeypatch.setattr(chunk_module, "WEIGHT_PANEL_LOGITS", 256 * 10)
    with chunks_of(num_tokens):
        actual = run_hidden(fused_linear_kto_loss, case, trained=trained)
    assert in_registers[-1] == last_call
    assert kept == "all" or in_registers.count(last_call) >= 2
    exact = case.map(torch.Tensor.double).with_options(backend=None)
    expected = run_hidden(reference.linear_kto_loss, exact, trained=trained)
    if columns == "the smallest numbers at first":  # float32 cannot hold their mean
        actual, expected = ((x[0], replace(x[1], mean_logits=torch.zeros(5)), x[2]) for x in (actual, expected))
    check_loss_and_metrics(actual[:2], expected[:2], torch.bfloat16)
    for name, gradient in expected[2].items():
        assert_same_gradient(actual[2][name], gradient, roundings=1.0 if HAS_GPU else 1.5)


def test_registers_know_the_most_likely_token_of_an_earlier_panel(in_registers, monkeypatch):
    case = register_case("near", 700)
    case.labels[case.labels >= 0] = 600
    bias = torch.zeros(700, device=DEVICE).bfloat16()
    bias[5], bias[600] = 60.0, 30.0
    monkeypatch.setattr(chunk_module, "PANEL_LOGITS", 256 * int((case.labels[:, 1:] >= 0).sum()))
    hidden = case.hidden.detach().requires_grad_()
    options = {"lm_head_bias": bias, "return_metrics": True, **case.options}
    _, metrics = linear_token_logps(hidden, case.weight, case.labels, **options)
    assert len(in_registers) >= 2
    assert not metrics.is_top1.any()


@by_trained
def test_registers_and_a_target_of_no_probability(trained, in_registers):
    """The target's logit is -inf, so that the row cannot be measured relative to it."""
    case = register_case("every other tile -inf", 700)
    results = []
    for function, x in (
        (linear_token_logps, case),
        (reference.linear_token_logps, case.map(torch.Tensor.double).with_options(backend=None)),
    ):
        inputs = [getattr(x, name).detach().requires_grad_(name in trained) for name in INPUTS]
        logps = function(*inputs[:2], x.labels, lm_head_bias=inputs[2], **x.options)
        logps.nan_to_num(neginf=0.0).sum().backward()
        results.append((logps, [leaf.grad for leaf in inputs if leaf.requires_grad]))
    (actual, actual_grads), (exact, exact_grads) = results
    assert exact.isneginf().any()
    assert_close(actual.nan_to_num(), exact.nan_to_num(neginf=torch.finfo(torch.float32).min), 1e-5, "logps")
    for gradient, expected in zip(actual_grads, exact_grads, strict=True):
        assert_same_gradient(gradient, expected, roundings=1.0 if HAS_GPU else 1.5)
    assert in_registers


@by_trained
def test_registers_and_a_label_out_of_range(trained, in_registers, monkeypatch):
    """A GPU does not report such a label: its token's log-probability and the gradients it reaches are NaN."""
    monkeypatch.setattr(kto_fused.engines.hidden, "check_contents", lambda *args, **kwargs: None)
    case = register_case("near", 700)
    labels = case.labels.clone()
    labels[0, 3], labels[1, 4], labels[2, 5] = 700, -7, 10**9
    hidden, weight = (getattr(case, name).detach().requires_grad_(name in trained) for name in INPUTS[:2])
    logps = linear_token_logps(hidden, weight, labels, **case.options)
    expected = torch.zeros(logps.shape, dtype=torch.bool, device=DEVICE)
    expected[0, 2] = expected[1, 3] = expected[2, 4] = True
    assert torch.equal(logps.isnan(), expected)
    logps.sum().backward()
    assert torch.equal(hidden.grad.isnan().any(-1), expected)
    assert in_registers


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_registers_give_nan_for_hidden_states_that_are_not_finite(poison, in_registers):
    case = make_hidden_case(hidden_size=64, vocab=700, dtype=torch.bfloat16, device=DEVICE, backend="triton")
    case.hidden.nan_to_num_()
    case.hidden[0, 0] = poison
    labels = case.labels.clamp(min=0)
    with torch.no_grad():
        logps, _ = linear_token_logps(case.hidden, case.weight, labels, return_metrics=True, **case.options)
    assert in_registers
    assert logps[0, 0].isnan()
    assert logps[0, 1:].isfinite().all()
    assert logps[1:].isfinite().all()


@pytest.mark.parametrize("why", ["soft cap", "hidden size", "steps of H", "strides", "float16", "another GPU"])
def test_logits_that_registers_do_not_serve(why, in_registers, monkeypatch):
    hidden_size = {"hidden size": 2624, "steps of H": 72}.get(why, 64)
    dtype = torch.float16 if why == "float16" else torch.bfloat16
    case = make_hidden_case(hidden_size=hidden_size, vocab=300, dtype=dtype, device=DEVICE, backend="triton")
    if why == "soft cap":
        case = case.with_options(logit_softcap=20.0)
    if why == "strides":
        case = replace(case, weight=case.weight.T.contiguous().T)
    if why == "another GPU":
        monkeypatch.setattr(chunk_module, "_is_hopper", lambda device: False)
    reference_logps = {"ref_logps": torch.zeros(len(case.labels), device=DEVICE)}
    for trained in ((), INPUTS):
        check_hidden_against_twin(fused_linear_kto_loss, case, trained=trained, **reference_logps)
    assert not in_registers


# ---- sums of squared probabilities ----------------------------------------------------------------------------------

STEPS = {  # (first column, last column, bias), the bias as a power of 2
    # 700 columns 2^59.5 times as large as the row's reference: without a scale their squares would add up to 2^128
    "below the headroom": [(1100, 1800, 59.5)],
    "twice": [(1100, 1800, 59.5), (2100, 2900, 119.0)],
    "beyond it, then a little more": [(1100, 1800, 70.0), (2100, 2900, 129.5)],
    "far beyond": [(1100, 1800, 1e4), (2100, 2900, 3e4)],
    "one column": [(2500, 2501, 59.0)],
    "nothing but -inf at first": [(0, 1024, -math.inf)],
    "nothing but -inf later": [(1024, 3000, -math.inf)],
}


def check_squares(engine, columns: str, dtype: torch.dtype) -> None:
    """Compare log sum p^2 of three rows, as a chunk finds it in tiles, with float64."""
    generator, (backend, device) = torch.Generator().manual_seed(0), engine
    hidden, weight = (torch.randn(n, 64, generator=generator).to(device, dtype) / 20 for n in (3, 3000))
    bias = torch.zeros(3000, device=device)
    for first, last, value in STEPS[columns]:
        bias[first:last] = value * math.log(2)
    lm_head, transform = chunk_module.LMHead(weight, bias), {"scale": 1.0, "softcap": None, "factor": 1.0}
    targets = torch.tensor([0, 1, 1000], dtype=torch.int32, device=device)
    options = {"num_bytes": 2**26, "sum_squares": True}
    of_all = *weight.shape, dtype, torch.device(device), backend, "all", transform, True, True
    spec = chunk_module.ChunkSpec(*of_all, **options)
    chunk = spec.kind(3, spec)
    chunk.fold(hidden, lm_head, targets, True)
    actual = chunk.finish(lm_head)[4]
    log_p = (hidden.double() @ weight.double().T + bias.double()).log_softmax(-1)
    torch.testing.assert_close(actual.double(), (2 * log_p).logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", STEPS)
def test_squares_of_far_columns_neither_overflow_nor_vanish(columns, engine, monkeypatch):
    """A row's reference need not be its largest logit, which may be 2^60 times as likely."""
    monkeypatch.setattr(chunk_module, "TILE_LOGITS", 1)  # the narrowest tiles: three
    for dtype in (torch.bfloat16, torch.float32):
        check_squares(engine, columns, dtype)


@pytest.mark.parametrize("columns", STEPS)
def test_squares_folded_in_registers(columns, in_registers):
    """Every tile is relative to the row's target, or to its own largest logit."""
    check_squares(("triton", DEVICE), columns, torch.bfloat16)
    assert in_registers == ["fold"]
