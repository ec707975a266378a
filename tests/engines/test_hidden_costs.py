"""What hidden states cost: GEMMs, memory, waits for the device, and what stays alive afterwards."""

import gc
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
from cases import (
    INPUTS,
    ON_HOPPER,
    HiddenCase,
    chunks_of,
    is_masked,
    make_hidden_case,
    run_hidden,
)
from counters import count_launches
from devices import HAS_GPU
from kto_fused.kernels import memory_tiles, register_tiles, rows
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kto_fused import checks, fused_linear_dpo_loss, fused_linear_kto_loss, linear_sequence_logps, linear_token_logps
from kto_fused.commands import estimate
from kto_fused.engines import autograd, hidden, layout, plan
from kto_fused.engines import chunks as chunk_module
from kto_fused.measure import peak_bytes

MIB = 2**20
KTO, DPO, LOGPS, TOKEN_LOGPS = fused_linear_kto_loss, fused_linear_dpo_loss, linear_sequence_logps, linear_token_logps
FROZEN = ("hidden",)
CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
interpreted = pytest.mark.skipif(HAS_GPU, reason="counts what Triton's interpreter does")
by_function = pytest.mark.parametrize("function", [KTO, DPO], ids=["kto", "dpo"])


@pytest.fixture(autouse=True)
def unpoisoned_memory(poisoned_memory):
    """Poisoning fills new memory by operators, which these tests would count."""
    torch.use_deterministic_algorithms(False)


def long_case(engine=("torch", "cpu"), *, tokens: int, prompt: int, vocab: int, hidden_size: int, **options):
    """Return four sequences of ``tokens`` completion tokens each, behind a prompt."""
    seq_len = prompt + tokens + 1  # the first token of the prompt is never predicted
    case = make_hidden_case(
        seq_len=seq_len, vocab=vocab, hidden_size=hidden_size, device=engine[1], backend=engine[0], **options
    )
    case.labels = torch.randint(vocab, (4, seq_len), device=engine[1])
    case.labels[:, : prompt + 1] = -100
    case.hidden, case.ref_hidden = (torch.randn_like(x) for x in (case.hidden, case.ref_hidden))
    case.options["ref_logps"] = torch.full((4,), -9.0, device=engine[1])
    return case


# ---- GEMMs --------------------------------------------------------------------------------------------------------

# tokens that a chunk holds, of 4 sequences of 8 tokens
ONE_TOKEN, ONE_SEQUENCE, ONE_PAIR, ALL = 1, 10, 18, None
FIXED = {"reference_point": 0.1}
MEAN = {"reference_point": "batch_mean"}
EACH = {"reduction": "none"}
GEMMS = {
    "no gradient": (KTO, (), MEAN, ONE_TOKEN, 1),
    "frozen": (KTO, FROZEN, FIXED, ALL, 2),
    "frozen, a sequence over the budget": (KTO, FROZEN, FIXED, ONE_TOKEN, 2),
    "frozen, batch_mean over the budget": (KTO, FROZEN, MEAN, ONE_SEQUENCE, 2),
    "trained": (KTO, INPUTS, FIXED, ALL, 3),
    "trained, a batch over the budget": (KTO, INPUTS, FIXED, ONE_SEQUENCE, 3),
    "trained, a sequence over the budget": (KTO, INPUTS, FIXED, ONE_TOKEN, 4),
    "trained, batch_mean in one chunk": (KTO, INPUTS, MEAN, ALL, 3),
    "trained, batch_mean over the budget": (KTO, INPUTS, MEAN, ONE_SEQUENCE, 4),
    "only the head trained": (KTO, ("weight", "bias"), FIXED, ALL, 2),
    "one loss per sequence, no gradient": (KTO, (), EACH, ALL, 1),
    "one loss per sequence, frozen": (KTO, FROZEN, EACH, ONE_SEQUENCE, 2),
    "one loss per sequence, trained": (KTO, INPUTS, EACH, ALL, 4),
    "pairs, no gradient": (DPO, (), {}, ONE_TOKEN, 1),
    "pairs, frozen": (DPO, FROZEN, {}, ONE_SEQUENCE, 2),
    "pairs, trained": (DPO, INPUTS, {}, ALL, 3),
    "pairs, trained, a batch over the budget": (DPO, INPUTS, {}, ONE_PAIR, 3),
    "pairs, trained, a pair over the budget": (DPO, INPUTS, {}, ONE_SEQUENCE, 4),
    "one loss per pair, trained": (DPO, INPUTS, EACH, ALL, 4),
    "log-probabilities, no gradient": (LOGPS, (), {}, ONE_TOKEN, 1),
    "log-probabilities, frozen": (LOGPS, FROZEN, {}, ONE_SEQUENCE, 2),
    "log-probabilities, trained": (LOGPS, INPUTS, {}, ALL, 4),
    "tokens' log-probabilities, no gradient": (TOKEN_LOGPS, (), {"return_metrics": True}, ONE_TOKEN, 1),
    "tokens' log-probabilities, frozen": (TOKEN_LOGPS, FROZEN, {}, ONE_SEQUENCE, 2),
    "tokens' log-probabilities, trained": (TOKEN_LOGPS, INPUTS, {}, ALL, 4),
}
V, H, TOKENS = 509, 64, 8


def addmm_flops(total, a, b, *_, **__) -> int:
    """Count addmm's operations from shapes: PyTorch's formula does not know ``out_dtype``, used for half precision."""
    return 2 * a[0] * a[1] * b[1]


def gemms(function, case, trained, **options) -> float:
    """Return how many GEMMs of 2 N H V operations value and gradient take."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm: addmm_flops}) as counter:
        if function in (LOGPS, TOKEN_LOGPS):
            inputs = [getattr(case, name).detach().requires_grad_(name in trained) for name in INPUTS]
            options = {"backend": case.options["backend"], **options}
            logps = function(*inputs[:2], case.labels, lm_head_bias=inputs[2], **options)
            if trained:
                logps.sum().backward()
        else:
            run_hidden(function, case, trained=trained, **options)
    return counter.get_total_flops() / (2 * (~is_masked(case)).sum().item() * case.weight.numel())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("setting", GEMMS)
def test_gemms(engine, setting, dtype, monkeypatch):
    monkeypatch.setattr(chunk_module, "_is_hopper", lambda device: False)  # else a kernel multiplies, uncounted
    function, trained, options, num_tokens, expected = GEMMS[setting]
    case = long_case(engine, tokens=TOKENS, prompt=7, vocab=V, hidden_size=H, bias=True, dtype=dtype)
    with chunks_of(num_tokens):
        assert gemms(function, case, trained, **options) == pytest.approx(expected, rel=0.02)
    if num_tokens == ONE_TOKEN:
        assert gemms(function, case, trained, chunk_bytes=1, **options) == pytest.approx(expected, rel=0.02)


@by_function
@pytest.mark.parametrize("trained", [(), FROZEN, INPUTS], ids="-".join)
@pytest.mark.parametrize("own_head", [False, True])
def test_a_reference_takes_one_gemm_more(function, trained, own_head):
    case = long_case(tokens=TOKENS, prompt=7, vocab=V, hidden_size=H)
    reference = {"ref_hidden": case.ref_hidden}
    if own_head:
        reference["ref_lm_head_weight"] = case.weight.clone()
    alone = gemms(function, case, trained)
    del case.options["ref_logps"]
    assert gemms(function, case, trained, **reference) == pytest.approx(alone + 1, rel=0.02)


@pytest.mark.parametrize("prompt", [0, 3 * TOKENS - 1])
@pytest.mark.parametrize("trained", [(), FROZEN, INPUTS], ids="-".join)
def test_prompts_cost_no_gemm(prompt, trained):
    """The batch has N to 4 N positions for N completion tokens."""
    expected = 1 + len(trained[:2])
    case = long_case(tokens=TOKENS, prompt=prompt, vocab=V, hidden_size=H)
    assert gemms(KTO, case, trained) == pytest.approx(expected, rel=0.02)


# ---- memory -------------------------------------------------------------------------------------------------------

MEMORY = {
    "no gradient": (KTO, (), MEAN),
    "frozen": (KTO, FROZEN, MEAN),
    "trained": (KTO, INPUTS, FIXED),
    "trained, batch_mean": (KTO, INPUTS, MEAN),
    "pairs": (DPO, INPUTS, {}),
    "one loss per sequence": (KTO, INPUTS, EACH),
    "one loss per sequence, frozen": (KTO, FROZEN, EACH),
    "log-probabilities": (LOGPS, INPUTS, {}),
    "tokens' log-probabilities": (TOKEN_LOGPS, INPUTS, {}),
    "tokens' log-probabilities, frozen": (TOKEN_LOGPS, FROZEN, {}),
}


def inputs_and_step(function, case, trained, **options):
    """Return the tensors that get a gradient, and a step of forward and backward that keeps nothing."""
    options = {**case.options, **options}
    inputs = [getattr(case, name).detach().requires_grad_(name in trained) for name in INPUTS[:2]]
    tensors = (*inputs, case.labels, *([case.desirable] if function is KTO else []))
    if function in (LOGPS, TOKEN_LOGPS):
        options.pop("ref_logps")
    needed = [x for x in inputs if x.requires_grad]

    def step() -> None:
        result = function(*tensors, **options)
        loss = result if function in (LOGPS, TOKEN_LOGPS) else result[0]
        if needed:
            torch.autograd.grad(loss.sum(), needed)

    return needed, step


def extra_bytes(function, case, trained, **options) -> int:
    """Return the peak bytes of a step beyond the gradients that it returns."""
    needed, step = inputs_and_step(function, case, trained, **options)
    return peak_bytes(step, case.hidden.device) - sum(x.numel() * x.element_size() for x in needed)


@pytest.mark.parametrize("setting", MEMORY)
@pytest.mark.parametrize("chunk_bytes", [16 * MIB, 48 * MIB], ids=["16 MiB", "48 MiB"])
@pytest.mark.parametrize("tokens", [100, 400], ids=["400 tokens", "1600 tokens"])
def test_memory_stays_within_the_budget(setting, chunk_bytes, tokens):
    function, trained, options = MEMORY[setting]
    case = long_case(tokens=tokens, prompt=20, vocab=8192, hidden_size=64)
    assert extra_bytes(function, case, trained, chunk_bytes=chunk_bytes, **options) <= 1.05 * chunk_bytes


@pytest.mark.parametrize("trained", [FROZEN, INPUTS], ids=["frozen", "trained"])
@pytest.mark.parametrize("chunk_bytes", [8 * MIB, 32 * MIB], ids=["8 MiB", "32 MiB"])
def test_tokens_without_a_gradient_do_not_exceed_the_budget(chunk_bytes, trained):
    """The remaining tokens' rows are not adjacent, so that they are copied."""
    case = make_hidden_case(batch=256, seq_len=9, vocab=8192, hidden_size=64)
    case.labels = torch.randint(8192, case.labels.shape)
    case.hidden = torch.randn_like(case.hidden)
    case.options["ref_logps"] = torch.zeros(256)
    options = {"desirable_weight": 0.0, "chunk_bytes": chunk_bytes, **FIXED}
    assert extra_bytes(KTO, case, trained, **options) <= 1.05 * chunk_bytes


def test_gathering_wide_hidden_states_does_not_exceed_the_budget():
    case = long_case(tokens=512, prompt=4, vocab=8192, hidden_size=4096)
    assert extra_bytes(LOGPS, case, (), chunk_bytes=32 * MIB) <= 1.05 * 32 * MIB


@pytest.mark.parametrize("chunk_bytes", [MIB // 4, MIB])
def test_the_hidden_states_of_a_wider_reference_share_the_budget(chunk_bytes):
    case = make_hidden_case(batch=2, seq_len=256, vocab=64, hidden_size=16)
    case.labels = torch.randint(64, (2, 256))
    case.options |= {"ref_hidden": torch.randn(2, 256, 4096), "ref_lm_head_weight": torch.randn(64, 4096)}
    # the reference's hidden states are allocated beside the policy's chunk, which is small
    assert extra_bytes(KTO, case, FROZEN, chunk_bytes=chunk_bytes, **FIXED) <= 1.25 * chunk_bytes


@pytest.mark.parametrize("setting", ["one loss per sequence, frozen", "tokens' log-probabilities, frozen"])
@pytest.mark.parametrize("chunk_bytes", [MIB, 2 * MIB], ids=["1 MiB", "2 MiB"])
def test_prompts_take_no_memory_where_a_narrow_gradient_is_scaled_by_a_wider_number(setting, chunk_bytes):
    function, trained, options = MEMORY[setting]
    case = long_case(tokens=4, prompt=509, vocab=64, hidden_size=2048, dtype=torch.bfloat16)
    assert extra_bytes(function, case, trained, chunk_bytes=chunk_bytes, **options) <= 1.05 * chunk_bytes


@pytest.mark.parametrize(
    ("setting", "chunk_tokens", "products"),
    [
        ("no gradient", 1024, 1),
        ("frozen", 1024, 2),
        ("trained", 1024, 3),
        ("pairs", 1024, 3),
        ("trained, batch_mean", 2048, 3),
        ("one loss per sequence", 1024, 4),
    ],
)
def test_a_chunk_on_a_cpu_is_no_larger_than_its_gemms_need(setting, chunk_tokens, products):
    """Four sequences of 512 tokens take chunks of 1024, unless a larger chunk saves a GEMM."""
    function, trained, options = MEMORY[setting]
    case = long_case(tokens=512, prompt=20, vocab=8192, hidden_size=64)
    chunk_bytes = 4 * 8192 * chunk_tokens
    assert chunk_bytes < extra_bytes(function, case, trained, **options) < 1.2 * chunk_bytes
    assert gemms(function, case, trained, **options) == pytest.approx(products, rel=0.02)


@pytest.mark.parametrize(
    ("setting", "dtype"),
    [("frozen", torch.float32), ("frozen", torch.bfloat16), ("trained", torch.float32)],
    ids=["fp32, frozen", "bf16, frozen", "fp32, trained"],
)
@pytest.mark.parametrize("chunk_bytes", [2 * MIB, 6 * MIB], ids=["2 MiB", "6 MiB"])
def test_a_small_budget_is_kept_and_used(setting, dtype, chunk_bytes):
    """Even a budget below the scratch memory that row operations and casts of the weight take where there is room."""
    function, trained, options = MEMORY[setting]
    case = long_case(tokens=100, prompt=20, vocab=8192, hidden_size=512, dtype=dtype)
    case.weight, case.hidden = case.weight.to(dtype), case.hidden.to(dtype)
    extra = extra_bytes(function, case, trained, chunk_bytes=chunk_bytes, **options)
    assert 0.3 * chunk_bytes < extra <= 1.05 * chunk_bytes


SMALL_BUDGETS = {
    "frozen, fp32": ("frozen", torch.float32, {}),
    "frozen, fp32, softcap": ("frozen", torch.float32, {"logit_softcap": 30.0}),
    "frozen, bf16": ("frozen", torch.bfloat16, {}),
    "frozen, fp64": ("frozen", torch.float64, {}),
    "no gradient, fp16": ("no gradient", torch.float16, {}),
    "trained, fp32": ("trained", torch.float32, {}),
    "pairs, fp32": ("pairs", torch.float32, {}),
    "tokens' log-probabilities, frozen, fp32": ("tokens' log-probabilities, frozen", torch.float32, {}),
    "tokens' log-probabilities, fp32": ("tokens' log-probabilities", torch.float32, {}),
}


@pytest.mark.parametrize("chunk_bytes", [2**18, 2**20, 2**22], ids=["256 KiB", "1 MiB", "4 MiB"])
@pytest.mark.parametrize("name", SMALL_BUDGETS)
@pytest.mark.parametrize(("tokens", "vocab"), [(600, 128), (8, 8192)], ids=["many tokens", "wide rows"])
def test_a_budget_below_4_mib_is_kept_or_named(tokens, vocab, name, chunk_bytes, caplog, monkeypatch):
    """Many tokens' own numbers exceed the budget, or one token's wide row does; the warning names the size."""
    monkeypatch.setattr(plan, "exceeded_budgets", set())
    setting, dtype, more = SMALL_BUDGETS[name]
    function, trained, options = MEMORY[setting]
    case = long_case(tokens=tokens, prompt=20, vocab=vocab, hidden_size=16, dtype=dtype, bias=True)
    case.weight, case.hidden = case.weight.to(dtype), case.hidden.to(dtype)
    options = {**options, **more, "lm_head_bias": case.bias}
    extra = extra_bytes(function, case, trained, chunk_bytes=chunk_bytes, **options)
    least = max((record.args[2] for record in caplog.records), default=0)
    assert extra <= 1.1 * max(chunk_bytes, least)
    if (name, chunk_bytes) == ("frozen, fp32", 2**20):
        assert least == 0


@pytest.fixture
def without_arithmetic(monkeypatch):
    """Let every GEMM and kernel do nothing. Memory is allocated as on a GPU, at sizes that no CPU could compute."""

    def nothing(*args, **kwargs) -> None: ...

    for name in ("fold", "keep", "settle", "finish", "add_target_rows"):
        monkeypatch.setattr(memory_tiles, name, nothing)
    for name in ("start_rows", "fold_register_tiles", "merge_register_tiles", "keep_register_tiles"):
        monkeypatch.setattr(register_tiles, f"{name}_kernel", defaultdict(lambda: nothing))
    for module, name in ((chunk_module, "_multiply"), (chunk_module, "move_rows"), (hidden, "move_rows")):
        monkeypatch.setattr(module, name, nothing)

    def ones(engine: hidden.Engine, logp_grads: torch.Tensor) -> torch.Tensor:
        return engine.per_token.new_ones(len(engine.tokens.rows))

    monkeypatch.setattr(hidden.Engine, "token_grads", ones)  # a second visit leaves out tokens whose gradient is 0


def untouched_case(hidden_size: int, vocab: int, seq_len: int, batch: int = 4) -> HiddenCase:
    """Return a case whose sequences are half prompt. Only the labels' memory is ever touched."""
    size = {"dtype": torch.bfloat16, "device": "cpu"}
    num_prompt = seq_len // 2 + 1
    labels = torch.zeros(batch, seq_len, dtype=torch.int64)
    labels[:, :num_prompt] = -100
    return HiddenCase(
        hidden=torch.empty(batch, seq_len, hidden_size, **size),
        weight=torch.empty(vocab, hidden_size, **size),
        bias=None,
        labels=labels,
        ref_hidden=torch.empty(batch, seq_len, hidden_size, **size),
        desirable=torch.ones(batch, dtype=torch.bool),
        options={"ref_logps": torch.zeros(batch), "backend": "triton"},
    )


@interpreted
@pytest.mark.parametrize("is_hopper", [False, True], ids=["tiles in memory", "tiles in registers"])
@pytest.mark.parametrize("setting", MEMORY)
@pytest.mark.parametrize(
    ("hidden_size", "tokens", "chunk_bytes"),
    [(896, 2048, 2**30), (4096, 2048, 2**30), (896, 8192, 2**30), (896, 2048, 2**28)],
)
def test_memory_of_bf16_rows_stays_within_the_budget(
    without_arithmetic, setting, hidden_size, tokens, chunk_bytes, is_hopper, monkeypatch
):
    monkeypatch.setattr(chunk_module, "_is_hopper", lambda device: is_hopper)
    function, trained, options = MEMORY[setting]
    case = untouched_case(hidden_size, 151936, 2 * tokens)
    extra = extra_bytes(function, case, trained, chunk_bytes=chunk_bytes, **options)
    if "weight" not in trained:  # a chunk takes no more, since it would be no faster
        chunk_bytes = min(chunk_bytes, 384 * MIB)
    # several chunks whose loss is known on the first visit add up the weight's gradient in float32
    sums = 4 * case.weight.numel() if setting in ("trained", "pairs") else 0
    assert extra <= 1.05 * chunk_bytes + sums


@interpreted
@pytest.mark.parametrize("is_hopper", [False, True], ids=["tiles in memory", "tiles in registers"])
@pytest.mark.parametrize("trained", [FROZEN, INPUTS], ids=["frozen", "trained"])
@pytest.mark.parametrize("chunk_bytes", [2**25, 2**26])
def test_a_reference_of_bf16_rows_shares_the_budget(without_arithmetic, chunk_bytes, trained, is_hopper, monkeypatch):
    monkeypatch.setattr(chunk_module, "_is_hopper", lambda device: is_hopper)
    case = untouched_case(640, 262144, 2048)
    del case.options["ref_logps"]
    options = {"ref_hidden": case.ref_hidden, "ref_lm_head_weight": torch.empty_like(case.weight), **FIXED}
    extra = extra_bytes(KTO, case, trained, chunk_bytes=chunk_bytes, **options)
    sums = 4 * case.weight.numel() * (trained == INPUTS)
    assert extra <= 1.05 * chunk_bytes + sums


@interpreted
@pytest.mark.parametrize(("is_hopper", "softcap"), [(True, None), (True, 30.0), (False, None)])
def test_a_reference_in_registers_takes_as_few_chunks_as_fit(without_arithmetic, is_hopper, softcap, monkeypatch):
    """The policy's chunks hold one sequence each, because they keep its softmax numerators."""
    monkeypatch.setattr(chunk_module, "_is_hopper", lambda device: is_hopper)
    chunks, fold = {False: [], True: []}, chunk_module.FoldedRows.fold

    def counted(chunk, hidden, lm_head, targets, keep):
        chunks[keep].append(len(hidden))
        fold(chunk, hidden, lm_head, targets, keep)

    monkeypatch.setattr(chunk_module.FoldedRows, "fold", counted)
    case = untouched_case(896, 151936, 2048, batch=8)
    reference = {"ref_hidden": case.ref_hidden, "ref_lm_head_weight": torch.empty_like(case.weight), **FIXED}
    _, step = inputs_and_step(KTO, case.with_options(ref_logps=None), INPUTS, logit_softcap=softcap, **reference)
    step()
    assert chunks[True] == 8 * [1023]
    assert chunks[False] == (2 * [4092] if is_hopper and softcap is None else 8 * [1023])


# H, completion tokens of each sequence, batch -> tokens of each chunk
ONE_FOR_SEVERAL = {
    "2 H tokens": (4096, 2048, 4, [8192]),  # the softmax takes as much as a float32 sum of the weight's gradient
    "3 H tokens": (4096, 2048, 6, 6 * [2048]),
    "sequences that take more than half the budget": (896, 2200, 2, [2200, 2200]),
    "all within the budget, but several take less": (896, 400, 8, [1200, 1200, 800]),
    "all within half the budget, about": (896, 256, 8, [2048]),
    "as many sequences as take half the budget": (896, 500, 8, 4 * [1000]),
    "a sum beside a chunk that fills the budget": (2048, 1000, 5, [5000]),
}


@interpreted
@pytest.mark.parametrize("setting", ONE_FOR_SEVERAL)
def test_one_chunk_where_several_would_take_as_much(without_arithmetic, setting, monkeypatch):
    hidden_size, tokens, batch, expected = ONE_FOR_SEVERAL[setting]
    chunks = []

    def add_weight_gradient(chunk, total, hidden, *, add):
        assert add == bool(chunks)
        chunks.append(len(hidden))

    monkeypatch.setattr(chunk_module.FoldedRows, "add_weight_gradient", add_weight_gradient)
    case = untouched_case(hidden_size, 151936, 2 * tokens + 2, batch)
    extra = extra_bytes(KTO, case, INPUTS, **FIXED)
    assert chunks == expected
    monkeypatch.setattr(plan, "ONE_CHUNK_MEMORY", 0)
    chunks.clear()
    assert extra <= 1.05 * extra_bytes(KTO, case, INPUTS, **FIXED)


@interpreted
@pytest.mark.parametrize(
    ("vocab", "tokens", "is_spared"),
    [(151936, 3400, True), (151936, 3550, False), (32000, 14000, True), (32000, 15500, False)],
)
def test_lent_memory_may_spare_the_fourth_gemm(without_arithmetic, vocab, tokens, is_spared, monkeypatch):
    """A coupled batch needs 3 GEMMs if all its tokens fit one chunk.

    More tokens fit where the weight's gradient is large enough to hold the chunk's buffer: at V = 32000 it is not.
    """
    products = []
    monkeypatch.setattr(chunk_module.FoldedRows, "add_weight_gradient", lambda *args, **kwargs: products.append(1))
    case = untouched_case(896, vocab, 2 * tokens + 2, batch=1)
    assert extra_bytes(KTO, case, INPUTS, **MEAN) <= 1.05 * 2**30
    assert (len(products) == 1) == is_spared


@interpreted
@pytest.mark.parametrize(
    ("hidden_size", "tokens", "least"), [(896, 1024, 92), (896, 4096, 360), (2048, 1024, 144), (4096, 1024, 240)]
)
def test_half_the_budget_never_takes_more(without_arithmetic, hidden_size, tokens, least, monkeypatch):
    """Memory beyond the gradients falls with the budget.

    With 4 GEMMs one chunk holds all tokens, although it exceeds the smallest budgets by itself, because that saves the
    float32 sum of the weight's gradients.
    """
    case = untouched_case(hidden_size, 151936, 2 * tokens + 2, batch=8)
    budgets = [2**power for power in range(30, 23, -1)]
    extra = [extra_bytes(KTO, case, INPUTS, chunk_bytes=chunk_bytes, **FIXED) / MIB for chunk_bytes in budgets]
    assert extra == sorted(extra, reverse=True)
    assert extra[-1] == pytest.approx(least, rel=0.02)
    monkeypatch.setattr(plan, "ONE_CHUNK_MEMORY_AGAIN", 0)
    wide = 4 * case.weight.numel() / MIB  # the float32 sum, beside the rounded gradient
    assert extra_bytes(KTO, case, INPUTS, chunk_bytes=budgets[-1], **FIXED) / MIB >= wide


@interpreted
@pytest.mark.parametrize(
    ("tokens", "budget", "expected", "cols"),
    [
        (32768, 2**30, [32768], 2048),  # within the budget
        (40960, 2**30, [40960], 6144),  # within twice the budget
        (65536, 2**30, [32768, 32768], 2048),  # one chunk would take more than it saves
        (8192, 2**27, [8192], 1024),  # the narrowest panels, which still take more than twice the budget
        (65536, 2**27, 16 * [4096], 1024),
    ],
)
def test_the_chunks_of_a_second_visit(without_arithmetic, tokens, budget, expected, cols, monkeypatch):
    chunks, again = [], chunk_module.FoldedRows.again

    def seen_again(chunk, hidden, *args):
        chunks.append(len(hidden))
        assert chunk.kept_cols == cols
        yield from again(chunk, hidden, *args)

    def add_weight_gradient(chunk, total, hidden, *, add):
        assert total.dtype == (torch.bfloat16 if len(expected) == 1 else torch.float32)

    monkeypatch.setattr(chunk_module.FoldedRows, "again", seen_again)
    monkeypatch.setattr(chunk_module.FoldedRows, "add_weight_gradient", add_weight_gradient)
    case = untouched_case(4096, 151936, tokens // 4 + 2, batch=8)
    extra_bytes(KTO, case, INPUTS, chunk_bytes=budget, **MEAN)
    assert chunks == expected


def test_a_budget_may_be_any_number():
    for backend, dtype in (("triton", torch.bfloat16), ("torch", torch.float32)):
        spec = chunk_module.ChunkSpec(
            1, 1, dtype, CPU, backend, "all", {}, by_hidden=True, by_head=True, num_bytes=2**70
        )
        assert spec.capacity() > 2**20
        assert replace(spec, num_bytes=1).capacity() == 1


ELSEWHERE = {
    (896, 151936, 2048): (943, 943, 1543, 410, 290),
    (896, 151936, 8192): (1182, 862, 1928, 734, 375),
    (2048, 128256, 2048): (1930, 1567, 1930, 821, 353),
    (4096, 151936, 2048): (3763, 3763, 3763, 1555, 465),
}


@interpreted
@pytest.mark.parametrize("expected", [ON_HOPPER, ELSEWHERE], ids=["Hopper", "elsewhere"])
@pytest.mark.parametrize("size", ON_HOPPER, ids=str)
def test_what_a_step_takes(without_arithmetic, size, expected, monkeypatch):
    monkeypatch.setattr(chunk_module, "_is_hopper", lambda device: device == CPU and expected is ON_HOPPER)
    case = untouched_case(*size, batch=8)
    del case.options["ref_logps"]
    options = {"ref_hidden": case.ref_hidden, "ref_lm_head_weight": torch.empty_like(case.weight), **FIXED}
    settings = (INPUTS, 2**30), (INPUTS, 2**29), (INPUTS, 2**31), (INPUTS, 2**27), (FROZEN, 2**30)
    for (trained, chunk_bytes), mib in zip(settings, expected[size], strict=True):
        needed, step = inputs_and_step(KTO, case, trained, chunk_bytes=chunk_bytes, **options)
        assert peak_bytes(step, CPU) / MIB == pytest.approx(mib, rel=0.01)
        hidden_size, vocab, seq_len = size
        shape = estimate.LossShape(
            8, seq_len, seq_len // 2 - 1, vocab, hidden_size, *(2 * [torch.bfloat16]), is_head_trained=trained == INPUTS
        )
        moments = estimate.fused_moments(shape, chunk_bytes, "triton")[:2]  # without the moment of the mismatched pairs
        estimated = max(moment.total for moment in moments) - case.ref_hidden.nbytes
        assert 0.97 * mib <= estimated / MIB <= 1.03 * mib + 100 * (expected is ON_HOPPER)


@pytest.mark.parametrize("chunk_bytes", [16 * MIB, 48 * MIB], ids=["16 MiB", "48 MiB"])
def test_a_reference_shares_the_budget(chunk_bytes):
    case = long_case(tokens=400, prompt=20, vocab=8192, hidden_size=64)
    del case.options["ref_logps"]
    reference = {"ref_hidden": case.ref_hidden, "ref_lm_head_weight": case.weight.clone()}
    for trained in ((), FROZEN, INPUTS):
        extra = extra_bytes(KTO, case, trained, chunk_bytes=chunk_bytes, **FIXED, **reference)
        assert extra <= 1.05 * chunk_bytes


@interpreted
@pytest.mark.parametrize("batch", [1, 4], ids=["one chunk", "several"])
def test_a_references_head_cast_by_autocast_is_let_go(without_arithmetic, batch):
    """It is freed before the policy's visit, which needs more memory: gradients add up in float32."""
    case = untouched_case(4096, 151936, 4096, batch)
    del case.options["ref_logps"]
    case = replace(case, hidden=case.hidden.float(), weight=case.weight.float(), ref_hidden=case.ref_hidden.float())
    peaks = []
    for ref_head in (torch.empty_like(case.weight), torch.empty_like(case.weight, dtype=torch.bfloat16)):
        options = {"ref_hidden": case.ref_hidden, "ref_lm_head_weight": ref_head, **FIXED}
        _, step = inputs_and_step(KTO, case, INPUTS, **options)
        with torch.autocast("cpu", torch.bfloat16):
            peaks.append(peak_bytes(step, CPU))
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


class Casts(TorchDispatchMode):
    """Counts casts of tensors of one shape."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "_to_copy" and args[0].shape == self.shape:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("ref_head", "expected"), [("the policy's", 1), ("its own", 2), ("transposed", 2)])
def test_a_head_that_both_have_is_cast_once(ref_head, expected):
    case = make_hidden_case(vocab=16)
    case.labels[case.labels >= 0] %= 16
    own = {"the policy's": None, "its own": case.weight.clone(), "transposed": case.weight.T}[ref_head]
    with torch.autocast("cpu", torch.bfloat16), Casts(case.weight.shape) as casts:
        run_hidden(KTO, case, trained=FROZEN, ref_hidden=case.ref_hidden, ref_lm_head_weight=own)
    assert casts.count == expected


@needs_gpu
@pytest.mark.parametrize("setting", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk_bytes", [256 * MIB, 1024 * MIB], ids=["256 MiB", "1 GiB"])
@pytest.mark.parametrize("tokens", [512, 2048])
def test_memory_on_a_gpu_stays_within_the_budget(setting, dtype, chunk_bytes, tokens):
    function, trained, options = MEMORY[setting]
    engine = ("triton", "cuda")
    case = long_case(engine, tokens=tokens, prompt=tokens, vocab=65536, hidden_size=512, dtype=dtype)
    # the first step compiles kernels and allocates cuBLAS's workspace
    extra_bytes(function, case, trained, chunk_bytes=chunk_bytes, **options)
    extra = extra_bytes(function, case, trained, chunk_bytes=chunk_bytes, **options)
    # several chunks' weight gradients add up in float32, beside the rounded sum
    sums = 4 * case.weight.numel() if dtype == torch.bfloat16 and "weight" in trained else 0
    assert extra <= 1.05 * chunk_bytes + sums


# ---- waits --------------------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts operators for which the host waits for a GPU: they return a number, or a shape that depends on values."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "_unique2",
        "unique_consecutive",
    )

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = Counter()
        tolist = torch.Tensor.tolist

        def counted_tolist(tensor):
            self.names["tolist"] += 1
            return tolist(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted_tolist)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITING:
            self.names[name] += 1
        if name.startswith("index"):  # by a mask: as many elements as it holds
            indices = args[1] if isinstance(args[1], list | tuple) else []
            if any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices):
                self.names[f"{name} by a mask"] += 1
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Checks read no tensor, the kernel scales gradients, and nobody sees the interpreter's own operators."""
    for module in (checks, layout):
        monkeypatch.setattr(module, "may_read", lambda tensor: False)
    monkeypatch.setattr(autograd, "scale_", rows.scale_)
    count_launches(monkeypatch)  # which hides the interpreter's own operators


@interpreted
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("setting", ["frozen", "trained", "one loss per sequence", "pairs", "no gradient"])
def test_the_host_waits_once(as_on_a_gpu, monkeypatch, setting, packed, dtype):
    """The host waits for the number of completion tokens. A backward that computes the logits again may wait too, for
    that and for the number of tokens with a gradient.
    """
    function, trained, options = MEMORY[setting]
    case = make_hidden_case(dtype=dtype, bias=True, packed=packed, backend="triton", **options)
    waits = Waits(monkeypatch)
    with waits:
        run_hidden(function, case, trained=trained, chunk_bytes=1000)
    allowed = 3 if setting == "one loss per sequence" else 1
    assert sum(waits.names.values()) <= allowed, dict(waits.names)


@interpreted
@pytest.mark.parametrize("trained", [(), FROZEN, INPUTS], ids="-".join)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_token_logps_wait_once_a_pass(as_on_a_gpu, monkeypatch, trained, packed):
    case = make_hidden_case(dtype=torch.bfloat16, packed=packed, backend="triton")
    inputs = [getattr(case, name).requires_grad_(name in trained) for name in INPUTS[:2]]
    with Waits(monkeypatch) as waits:
        logps, _ = TOKEN_LOGPS(*inputs, case.labels, return_metrics=True, chunk_bytes=1000, **case.options)
        assert sum(waits.names.values()) == 1, dict(waits.names)
        if trained:
            logps.sum().backward()
    allowed = 3 if "weight" in trained else 1  # a trained head's backward finds the tokens, and those with a gradient
    assert sum(waits.names.values()) == allowed, dict(waits.names)


@needs_gpu
@by_function
@pytest.mark.parametrize("trained", [(), FROZEN, INPUTS], ids="-".join)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_host_waits_for_the_gpu_once(function, trained, packed, dtype, recwarn):
    case = make_hidden_case(dtype=dtype, packed=packed, device="cuda")
    run_hidden(function, case, trained=trained)  # compile
    recwarn.clear()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        run_hidden(function, case, trained=trained)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in recwarn if "called a synchronizing" in str(warning.message)]
    assert len(waits) <= 1, [str(warning.message) for warning in waits]


# ---- lifetime -----------------------------------------------------------------------------------------------------


def held_bytes(step) -> int:
    """Return the bytes that ``step`` allocates and that its result still holds. The garbage collector is off."""
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            kept = step()
        events = profiler.profiler.kineto_results.events()
        held = sum(event.nbytes() for event in events if event.name() == "[memory]")
        del kept
    finally:
        gc.enable()
    return held


LIFETIMES = {name: MEMORY[name] for name in ("frozen", "trained", "pairs", "one loss per sequence")}
SMALL = 64 * 2**10  # [B]-sized results


def long_loss(setting: str):
    """Return the hidden states and the weight of a long case, and a function that computes (loss, metrics)."""
    function, trained, options = LIFETIMES[setting]
    case = long_case(tokens=100, prompt=20, vocab=8192, hidden_size=64)
    inputs = [getattr(case, name).requires_grad_(name in trained) for name in INPUTS[:2]]
    tensors = (*inputs, case.labels, *([case.desirable] if function is KTO else []))
    return inputs, lambda: function(*tensors, **case.options, **options)


@pytest.mark.parametrize("setting", LIFETIMES)
def test_nothing_but_gradients_outlives_backward(setting):
    """The loss and its metrics are still held."""
    inputs, loss_and_metrics = long_loss(setting)

    def step():
        loss, metrics = loss_and_metrics()
        loss.sum().backward()
        return loss, metrics

    held = held_bytes(step)
    assert held <= sum(x.numel() * 4 for x in inputs if x.requires_grad) + SMALL


@pytest.mark.parametrize("setting", LIFETIMES)
def test_a_loss_that_nobody_differentiates_leaves_nothing(setting):
    _, loss_and_metrics = long_loss(setting)
    assert held_bytes(lambda: loss_and_metrics()[1].summary()) <= SMALL
