"""Losses that read tokens: three GEMMs at any length, and none of the gradient's for tokens without a gradient. Weights
of tokens in their sequences' sums. Mixes of both levels.
"""

from dataclasses import dataclass

import pytest
import torch
from cases import GRAD_TOLERANCE, chunks_of, some
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from kto_fused import (
    fused_linear_loss,
    fused_loss,
    heads,
    ld_token_weights,
    linear_sequence_logps,
    linear_token_logps,
    loss_from_logps,
    reference,
    sequence_logps,
    token_logps,
)
from kto_fused.engines import cpu
from kto_fused.heads import base, protocol
from kto_fused.heads.mixed_formula import MixedFormulaHead
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


def soft_gate(ratio: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    return torch.where(advantages > 0, 4 / (1 + torch.exp(1 - ratio)), 4 / 1.05 / (1 + torch.exp(1.05 * (1 - ratio))))


@pytest.mark.parametrize("name", ["ppo", "cispo", "sapo"])
def test_on_policy_and_with_a_weighted_kl_a_loss_is_the_one_by_hand(name):
    case = make(torch.float64, "cpu")
    inputs, advantages = (case["hidden"], case["weight"], case["labels"]), case["advantages"]
    ref = old_logps_of(case)
    head = heads.make(name, normalizer="tokens", kl_beta=0.3, kl_ratio=True, on_policy=True)
    loss, _ = fused_linear_loss(head, *inputs, advantages=advantages, ref_token_logps=ref)
    logps = reference.linear_token_logps(*inputs)[:, :-1]
    ratio, d = torch.exp(logps - logps.detach()), ref[:, 1:] - logps
    gained = {"ppo": ratio, "cispo": logps, "sapo": soft_gate(ratio, advantages[:, 1:])}[name] * advantages[:, 1:]
    expected = (-gained + 0.3 * ratio * (d.exp() - d - 1)).mean()
    torch.testing.assert_close(loss, expected)
    for grads in zip(*(torch.autograd.grad(value, inputs[:2]) for value in (loss, expected)), strict=True):
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("is_packed", [False, True])
def test_the_values_of_tokens_come_with_the_loss(engine, is_packed):
    backend, device = engine
    case = make(torch.float32, device)
    case["labels"][:, :5] = -100
    head, tensors, layout = heads.make("ppo"), {"advantages": case["advantages"]}, {}
    tensors["old_logps"] = old_logps_of(case)
    hidden, labels = case["hidden"], case["labels"]
    if is_packed:
        layout = {"cu_seqlens": torch.arange(0, B * T + 1, T, device=device)}
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
        tensors = {name: x.flatten() for name, x in tensors.items()}
    options = {"chunk_bytes": SEVERAL_CHUNKS, "backend": backend, **layout}
    inputs = hidden, case["weight"], labels
    plain, _ = fused_linear_loss(head, *inputs, **options, **tensors)
    loss, logps, metrics = fused_linear_loss(head, *inputs, return_tokens=True, **options, **tensors)
    expected, expected_metrics = linear_token_logps(*inputs, return_metrics=True, **options)
    assert torch.equal(loss, plain)
    assert not logps.requires_grad
    twin = reference.linear_loss(head, *inputs, return_tokens=True, **layout, **tensors)
    torch.testing.assert_close(twin[0], loss)
    for one in ((expected.detach(), expected_metrics), twin[1:]):
        torch.testing.assert_close(one[0], logps)
        torch.testing.assert_close(vars(one[1]), vars(metrics), rtol=1e-4, atol=1e-5)
    for grads in zip(*(torch.autograd.grad(value, inputs[:2]) for value in (loss, plain)), strict=True):
        assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        ("nll", {"reduction": "none"}, ValueError, "reduction='none' has no meaning for the token-level"),
        ("ppo", {}, TypeError, "needs the tensors ['advantages']"),
        ("ppo", {"advantages": torch.ones(B)}, TypeError, "on_policy=False, but none came as old_logps"),
        ("kto", {"return_tokens": True}, ValueError, "return_tokens=True belongs to token-level heads"),
        ("nll", {"advantages": torch.ones(B)}, TypeError, "takes no tensor 'advantages'"),
        ("dapo", {"old_logps": torch.zeros(B, T), "advantages": torch.ones(B)}, TypeError, "num_items is the number"),
        ("nll", {"num_items": 3}, TypeError, "num_items is the number"),
        (heads.make("nll", normalizer="items"), {"num_items": -3}, ValueError, "num_items must be >= 0, got -3.0"),
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


# ---- mixes ----------------------------------------------------------------------------------------------------------

# (parts, GEMMs with a trained LM head where a pair fits its chunk, and where it does not); N = 64, a pair has 32 tokens
MIXES = {
    "tokens": (((1.0, "nll"), (0.3, "ppo"), (0.5, heads.make("dft", normalizer="sequences"))), 3, 3),
    "pairs and tokens": (((1.0, "sigmoid"), (0.3, "nll"), (0.2, "ppo")), 3, 4),
    "chosen tokens": (((0.7, "simpo"), (2.0, heads.make("nll", chosen_only=True))), 3, 4),
    "the batch and tokens": (((1.0, "aot"), (0.3, "nll")), 4, 4),
    "completions and tokens": (((1.0, "apo_zero_unpaired"), (0.3, "grpo")), 3, 4),
    "sums and tokens": (((1.0, heads.make("gspo", clip=0.2)), (0.3, "ppo"), (0.1, "kl")), 3, 4),  # share old_logps
}


def mix_of(name: str) -> heads.Mix:
    parts = MIXES[name][0]
    return heads.Mix(*((weight, heads.make(head) if isinstance(head, str) else head) for weight, head in parts))


def tensors_of_mix(mix: heads.Mix, case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    old_logps = old_logps_of(case)
    own = {"old_logps": old_logps, "advantages": case["advantages"][:, 0], "ref_token_logps": old_logps - 0.1}
    names = {*mix.required_tensors(), *({"old_logps"} & {*mix.tensor_names()})}
    tensors = {name: value for name, value in own.items() if name in names}
    if "desirable" in mix.tensor_names():
        tensors["desirable"] = torch.arange(B, device=case["hidden"].device) % 2
    if mix.needs_reference:
        tensors["ref_logps"] = torch.linspace(-90, -80, B, device=case["hidden"].device)
    return tensors


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MIXES)
def test_a_mix_is_the_weighted_sum_of_its_parts_by_themselves(name, reduction):
    """Each with its own normaliser."""
    case, mix = make(torch.float64, "cpu"), mix_of(name)
    inputs = case["hidden"], case["weight"], case["labels"]
    total, metrics = fused_linear_loss(mix, *inputs, **tensors_of_mix(mix, case), reduction=reduction)
    expected = 0.0
    for weight, part in mix.parts:
        tensors = tensors_of_mix(heads.Mix((1.0, part)), case)
        part_loss, part_metrics = fused_linear_loss(part, *inputs, **tensors, reduction=reduction)
        per_pair = 0.5 if reduction == "sum" and part.group == 1 and mix.is_paired and part.level != "token" else 1.0
        expected = expected + weight * per_pair * part_loss
        if part is mix.heads[0]:
            torch.testing.assert_close(metrics.rewards, part_metrics.rewards)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    grads = (torch.autograd.grad(value, inputs[:2], retain_graph=True) for value in (total, expected))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("num_tokens", [None, 32, 10], ids=["one chunk", "a pair", "less than a pair"])
@pytest.mark.parametrize("name", MIXES)
def test_a_mix_takes_one_visit_where_its_groups_fit(engine, name, num_tokens):
    backend, device = engine
    if engine == ("triton", "cpu") and name != "pairs and tokens":
        pytest.skip("Triton's interpreter is slow")
    case, mix = make(torch.float32, device), mix_of(name)
    tensors = tensors_of_mix(mix, case)
    _, fitting, split = MIXES[name]
    expected = {None: 3, 32: fitting, 10: split}[num_tokens]
    for weight, gemms in some(engine, [(case["weight"], expected), (case["weight"].detach(), 2)]):
        inputs = case["hidden"], weight, case["labels"]
        wanted = [x for x in inputs if x.requires_grad]
        with FlopCounterMode(display=False) as counter, chunks_of(num_tokens):
            loss, _ = fused_linear_loss(mix, *inputs, backend=backend, **tensors)
            grads = torch.autograd.grad(loss, wanted)
        if "ppo" not in repr(mix).lower():  # clipped tokens cost less
            assert counter.get_total_flops() / (2 * N * H * V) == pytest.approx(gemms, abs=0.02)
        assert counter.get_total_flops() / (2 * N * H * V) <= gemms + 0.02
        twin, _ = reference.linear_loss(mix, *inputs, **tensors)
        torch.testing.assert_close(loss, twin, rtol=1e-5, atol=1e-5)
        for grad, expected_grad in zip(grads, torch.autograd.grad(twin, wanted), strict=True):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=2e-6)


def test_weights_of_a_mix_multiply_a_pairs_loss_and_its_tokens_losses():
    case = make(torch.float64, "cpu")
    inputs = case["hidden"], case["weight"], case["labels"]
    mix = heads.Mix((1.0, heads.make("simpo")), (0.3, heads.make("nll")))
    weights = torch.tensor([0.5, 2.0])
    loss, _ = fused_linear_loss(mix, *inputs, weights=weights)
    pairs, _ = fused_linear_loss("simpo", *inputs, weights=weights)
    tokens, _ = fused_linear_loss("nll", *inputs, weights=weights.repeat(2))
    torch.testing.assert_close(loss, pairs + 0.3 * tokens)


@dataclass(frozen=True)
class PerCount(heads.tokens.TokenHead):
    """Reads its sequence's length, and a tensor."""

    def losses(self, logps, counts, ref_logps, *, scale):
        return -scale * logps / counts


@pytest.mark.parametrize("function", [fused_linear_loss, reference.linear_loss], ids=["fused", "twin"])
def test_values_of_sequences_are_theirs_where_a_packed_batch_has_as_many_tokens_as_sequences(function, monkeypatch):
    """[B] values then have the shape of packed labels."""
    monkeypatch.setattr(protocol, "_CLASSES", dict(protocol._CLASSES))  # what is registered here is forgotten
    heads.register("per_count")(PerCount)
    case, mask = make(torch.float64, "cpu"), torch.zeros(B, T, dtype=torch.bool)
    mask[0, :3] = mask[3, 0] = True  # sequences of 3, 0, 0 and 1 tokens: as many as sequences
    labels, scale = case["labels"].where(mask, -100), case["advantages"]
    mix = heads.Mix((1.0, heads.make("simpo")), (0.3, heads.make("per_count")))
    options = {"weights": torch.tensor([0.5, 2.0]), "shift": False}
    offsets = torch.tensor([0, 3, 3, 3, 4])
    packed = function(
        mix, case["hidden"][mask], case["weight"], labels[mask], cu_seqlens=offsets, scale=scale[mask], **options
    )
    padded = function(mix, case["hidden"], case["weight"], labels, scale=scale, **options)
    torch.testing.assert_close(packed[0], padded[0])
    grads = (torch.autograd.grad(loss, case["weight"])[0] for loss, _ in (packed, padded))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("normalizers", [("items", "tokens"), ("tokens", "items"), ("items", "items")])
def test_num_items_goes_to_the_parts_of_a_mix_that_divide_by_it(normalizers):
    case = make(torch.float64, "cpu")
    inputs = case["hidden"], case["weight"], case["labels"]
    parts = [heads.make(name, normalizer=kind) for name, kind in zip(("gspo", "nll"), normalizers, strict=True)]
    tensors = [{"old_logps": old_logps_of(case), "advantages": torch.linspace(-1, 1, B)}, {}]
    number = torch.tensor(37.0)
    expected = [
        fused_linear_loss(part, *inputs, **own, **({"num_items": number} if kind == "items" else {}))[0]
        for part, own, kind in zip(parts, tensors, normalizers, strict=True)
    ]
    loss, _ = fused_linear_loss(heads.Mix((2.0, parts[0]), (0.5, parts[1])), *inputs, **tensors[0], num_items=number)
    torch.testing.assert_close(loss, 2 * expected[0] + 0.5 * expected[1])


def test_a_mixed_head_survives_the_way_through_an_operators_arguments():
    head, _ = MixedFormulaHead.prepare(
        torch.zeros(B, T, V),
        B,
        loss=heads.make("orpo", nll_on="all"),
        tensors={},
        sequence_tensors={},
        completion_counts=torch.ones(B),
        reduction="mean",
        average_log_prob=False,
        loss_dtype=torch.float32,
        backend="torch",
    )
    again = base.rebuild(base.flatten(head))
    assert (again.head, again.tensor_names, again.group) == (heads.make("orpo", nll_on="all"), "completion_counts", 2)


# ---- ORPO over prompt and completion --------------------------------------------------------------------------------


def test_orpo_of_all_tokens_by_hand_and_without_gemms_for_rejected_prompts(engine):
    """The rejected answers' prompts have neither a likelihood nor odds, so they need no gradient."""
    backend, device = engine
    case = make(torch.float64, device)
    inputs, prompt = (case["hidden"], case["weight"], case["labels"]), 7
    mask = (torch.arange(T, device=device) >= prompt).expand(B, T)
    head = heads.make("orpo", beta=0.4, nll_on="all")
    with FlopCounterMode(display=False) as counter:
        loss, metrics = fused_linear_loss(head, *inputs, completion_mask=mask, backend=backend)
        grads = torch.autograd.grad(loss, inputs[:2])
    logps = reference.linear_token_logps(*inputs)[:, :-1]
    averages = logps[:, prompt - 1 :].mean(1)
    log_odds = averages - torch.log1p(-averages.exp())
    chosen, rejected = log_odds.chunk(2)
    expected = -logps[: B // 2].mean() - 0.4 * torch.nn.functional.logsigmoid(chosen - rejected).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, inputs[:2]))
    torch.testing.assert_close(metrics.logps, logps[:, prompt - 1 :].sum(1).detach())
    without = (B // 2) * (prompt - 1) / N
    assert counter.get_total_flops() / (2 * N * H * V) == pytest.approx(1 + 2 * (1 - without), abs=0.02)


# ---- weights of tokens in a sequence's sum --------------------------------------------------------------------------


def weights_of_tokens(device: str) -> torch.Tensor:
    """Between 0 and 1, some of them 0; the first label is never predicted and holds NaN."""
    weights = torch.rand(B, T, generator=torch.Generator().manual_seed(5)).to(device)
    weights[:, 5] = 0
    weights[:, 0] = torch.nan
    return weights


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("average", [False, True], ids=["sum", "average"])
@pytest.mark.parametrize("layout", ["padded", "packed", "unshifted"])
def test_weighted_sequence_log_probabilities_by_hand(layout, average, trained):
    """Sum over tokens of weight times log-probability; an average divides by the tokens' number. From hidden states in
    both of the modes for any gradient, and from logits.
    """
    case = make(torch.float64, "cpu")
    weights, mask = weights_of_tokens("cpu").double(), torch.ones(B, T, dtype=torch.bool)
    case["labels"][:, :3], mask[:, :3] = -100, False
    case["labels"][1], mask[1] = -100, False
    mask[:, 0] = False
    hidden, labels, own, options = case["hidden"], case["labels"], weights, {"average_log_prob": average}
    if layout == "packed":
        options["cu_seqlens"] = torch.arange(0, B * T + 1, T)
        hidden, labels, own = hidden.flatten(0, 1), labels.flatten(), weights.flatten()
    elif layout == "unshifted":
        hidden, labels, own, options["shift"] = hidden[:, :-1], labels[:, 1:], weights[:, 1:], False
    lm_head = case["weight"] if trained else case["weight"].detach()
    log_p = (case["hidden"] @ lm_head.T).log_softmax(-1)[:, :-1]
    logps = log_p.gather(-1, case["labels"][:, 1:, None].clamp(min=0))[..., 0]
    expected = torch.where(mask[:, 1:] & (weights[:, 1:] > 0), logps * weights[:, 1:], 0.0).sum(1)
    expected = expected / mask.sum(1).clamp(min=1) if average else expected
    incoming = torch.linspace(-1, 1, B, dtype=torch.float64)
    wanted = [x for x in (case["hidden"], lm_head) if x.requires_grad]
    grads = torch.autograd.grad(expected, wanted, incoming)
    for function in (linear_sequence_logps, reference.linear_sequence_logps, sequence_logps):
        given = (hidden, lm_head, labels) if function is not sequence_logps else (hidden @ lm_head.T, labels)
        values = function(*given, token_weights=own, **options)
        torch.testing.assert_close(values, expected)
        found = torch.autograd.grad(values, wanted, incoming)
        torch.testing.assert_close(found, grads)
        assert not found[0][:, 4].any(), "tokens of weight 0 have no gradient"


@pytest.mark.parametrize("num_tokens", [None, 32, 10], ids=["one chunk", "a pair", "split pairs"])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "orpo", "aot"])
def test_a_loss_of_weighted_tokens_equals_its_twin(engine, name, num_tokens, monkeypatch):
    backend, device = engine
    if engine == ("triton", "cpu") and name not in ("ipo", "orpo"):
        pytest.skip("Triton's interpreter is slow")
    monkeypatch.setattr("kto_fused.engines.plan.SPLIT_TOKENS", 1)
    case = make(torch.float64, device)
    inputs, head = (case["hidden"], case["weight"], case["labels"]), heads.make(name)
    options = {"token_weights": weights_of_tokens(device)}
    if head.needs_reference:
        options["ref_hidden"] = case["hidden"].detach().flip(0)
    with chunks_of(num_tokens), FlopCounterMode(display=False) as counter:
        loss, metrics = fused_linear_loss(head, *inputs, backend=backend, **options)
        grads = torch.autograd.grad(loss, inputs[:2])
    expected, expected_metrics = reference.linear_loss(head, *inputs, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics.ref_logps, expected_metrics.ref_logps)
    torch.testing.assert_close(metrics.token_counts, torch.full((B,), T - 1, device=device))
    torch.testing.assert_close(grads, torch.autograd.grad(expected, inputs[:2]), rtol=1e-9, atol=1e-12)
    assert not grads[0][:, 4].any()
    gemms = 4 if name == "aot" and num_tokens is not None else 3
    assert counter.get_total_flops() / (2 * N * H * V) <= gemms + head.needs_reference + 0.02


@pytest.mark.parametrize("num_tokens", [None, 10], ids=["one chunk", "split pairs"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_weights_count_in_every_mode_of_the_gradients(trained, reduction, num_tokens):
    """Gradients found in the forward or in the backward, of the loss or of each token."""
    case = make(torch.float64, "cpu")
    weight = case["weight"] if trained else case["weight"].detach()
    wanted = [x for x in (case["hidden"], weight) if x.requires_grad]
    options = {"token_weights": weights_of_tokens("cpu"), "ref_logps": torch.linspace(-90, -80, B)}
    results = []
    for function in (fused_linear_loss, reference.linear_loss):
        with chunks_of(num_tokens):
            losses, _ = function("ipo", case["hidden"], weight, case["labels"], reduction=reduction, **options)
            incoming = torch.linspace(1, 2, losses.numel(), dtype=torch.float64).view(losses.shape)
            results.append((losses.detach(), *torch.autograd.grad(losses, wanted, incoming)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
    assert not results[0][1][:, 4].any()


@pytest.mark.parametrize("num_tokens", [None, 32], ids=["one chunk", "a pair"])
def test_tokens_of_weight_0_cost_no_gradient_gemms(num_tokens):
    case = make(torch.float32, "cpu")
    weights = torch.zeros(B, T)
    weights[:, -4:] = 1  # a quarter of the 16 predicted tokens
    with FlopCounterMode(display=False) as counter, chunks_of(num_tokens):
        loss, _ = fused_linear_loss("simpo", case["hidden"], case["weight"], case["labels"], token_weights=weights)
        torch.autograd.grad(loss, (case["hidden"], case["weight"]))
    assert counter.get_total_flops() / (2 * N * H * V) == pytest.approx(1.5, abs=0.02)


@pytest.mark.parametrize("name", ["weights", "mixed", "ld_alpha"])
def test_gradients_of_weights_and_mixes_agree_with_finite_differences(engine, name):
    backend, device = engine
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(4, 5, 2, generator=generator, dtype=torch.float64).to(device)
    weight = torch.randn(5, 2, generator=generator, dtype=torch.float64).to(device)
    labels, ref_logps = torch.randint(5, (4, 5), generator=generator).to(device), torch.linspace(-9, -6, 4).to(device)
    labels[0, 4:] = labels[3, 3:] = -100
    head, tensors = heads.make("sigmoid", ld_alpha=0.3 if name == "ld_alpha" else 1.0), {}
    if name == "weights":
        tensors["token_weights"] = torch.rand(4, 5, generator=generator).to(device)
    elif name == "mixed":
        head = heads.Mix((1.0, head), (0.5, heads.make("nll")), (0.2, heads.make("orpo", nll_on="all")))
        tensors["completion_mask"] = (torch.arange(5, device=device) > 1).expand(4, 5)

    def from_hidden(hidden, weight):
        with chunks_of(5 if name == "ld_alpha" else None):
            return fused_linear_loss(head, hidden, weight, labels, ref_logps=ref_logps, backend=backend, **tensors)[0]

    def from_logits(logits):
        return fused_loss(head, logits, labels, ref_logps=ref_logps, backend=backend, **tensors)[0]

    assert gradcheck(from_hidden, (hidden.requires_grad_(), weight.clone().requires_grad_()), fast_mode=True)
    assert gradcheck(from_logits, ((hidden @ weight.T).detach().requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("layout", ["padded", "packed", "unshifted"])
def test_the_longer_answers_other_tokens_get_ld_alpha(layout):
    labels, options = torch.full((4, 6), -100), {}
    lengths = [3, 1, 2, 4]  # pairs (3, 2) and (1, 4)
    for row, length in zip(labels, lengths, strict=True):
        row[1 : 1 + length] = 5
    if layout == "packed":
        labels, options = labels.flatten(), {"cu_seqlens": torch.arange(0, 25, 6)}
    elif layout == "unshifted":
        labels, options = labels[:, 1:], {"shift": False}
    weights = ld_token_weights(labels, 0.1, **options)[labels != -100]
    expected = [1, 1, 0.1, 1, 1, 1, 1, 0.1, 0.1, 0.1]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0)


def test_ld_alpha_multiplies_token_weights_of_the_call():
    case = make(torch.float64, "cpu")
    case["labels"][0, 8:] = -100
    inputs, ref_logps = (case["hidden"], case["weight"], case["labels"]), torch.zeros(B)
    weights = torch.rand(B, T, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    both = weights * ld_token_weights(case["labels"], 0.25)
    values = [
        fused_linear_loss(heads.make("ipo", ld_alpha=alpha), *inputs, ref_logps=ref_logps, token_weights=own)[0]
        for alpha, own in ((0.25, weights), (1.0, both))
    ]
    torch.testing.assert_close(*values)


def test_token_weights_weight_the_old_log_probabilities_that_are_summed_too():
    case = make(torch.float64, "cpu")
    inputs, head = (case["hidden"], case["weight"], case["labels"]), heads.make("gspo", clip=0.5)
    weights, old_logps = weights_of_tokens("cpu"), old_logps_of(case)
    summed = (weights * old_logps)[:, 1:].double().sum(1)
    values = [
        fused_linear_loss(head, *inputs, token_weights=weights, old_logps=old, advantages=torch.ones(B))[0]
        for old in (old_logps, summed)
    ]
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-8)


COMPILED = {
    "weights": ("simpo", {"token_weights": weights_of_tokens("cpu").nan_to_num()}),
    "ld_alpha": (heads.make("sigmoid", ld_alpha=0.5), {"ref_logps": torch.zeros(B)}),
    "mixed": (heads.Mix((1.0, heads.make("simpo")), (0.5, heads.make("nll"))), {}),
    "orpo of all": (
        heads.make("orpo", nll_on="all"),
        {"completion_mask": (torch.arange(T) > 6).expand(B, T).contiguous()},
    ),
}


@pytest.mark.parametrize("kind", ["hidden", "logits"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_weights_and_mixes_are_the_eager_ones(name, kind):
    torch.use_deterministic_algorithms(False)  # torch.compile has a guard on this setting
    case, (head, tensors) = make(torch.float32, "cpu"), COMPILED[name]
    case["labels"][0, 9:] = -100

    def step(hidden, weight, labels):
        if kind == "hidden":
            return fused_linear_loss(head, hidden, weight, labels, **tensors)[0]
        return fused_loss(head, hidden @ weight.T, labels, **tensors)[0]

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = function(case["hidden"], case["weight"], case["labels"])
        results.append((loss.detach(), *torch.autograd.grad(loss, (case["hidden"], case["weight"]))))
    torch.testing.assert_close(*results)


# ---- from the tokens' log-probabilities -----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["labels", "mask", "packed"])
@pytest.mark.parametrize("name", ["ppo", "pairs and tokens", "orpo of all"])
def test_a_loss_of_tokens_from_their_log_probabilities_is_that_from_logits(engine, name, layout):
    backend, device = engine
    case = make(torch.float64, device)
    case["labels"][:, :3] = case["labels"][1, 9:] = -100
    head = {"ppo": heads.make("ppo"), "orpo of all": heads.make("orpo", nll_on="all")}.get(name) or mix_of(name)
    tensors, logits = {}, (case["hidden"] @ case["weight"].T).detach().requires_grad_()
    if name == "orpo of all":
        tensors["completion_mask"] = (torch.arange(T, device=device) > 6).expand(B, T).contiguous()
    else:
        tensors = tensors_of_mix(head if name in MIXES else heads.Mix((1.0, head)), case)
    if name == "pairs and tokens":
        tensors["token_weights"] = weights_of_tokens(device)
    expected, metrics = fused_loss(head, logits, case["labels"], **tensors)
    logps = token_logps(logits, case["labels"])
    given, options = logps.masked_fill(logps == 0, torch.nan), {"labels": case["labels"]}
    if layout == "packed":
        given, options = given.flatten(), {"labels": case["labels"].flatten()}
        options["cu_seqlens"] = torch.arange(0, B * T + 1, T, device=device)
        tensors = {key: x.flatten() if x.ndim == 2 else x for key, x in tensors.items()}
    elif layout == "mask":
        options = {"mask": logps != 0}
        tensors = {key: x.roll(-1, 1) if x.ndim == 2 else x for key, x in tensors.items()}
    for function in (loss_from_logps, reference.loss_from_logps):
        loss, own_metrics = function(head, given, **tensors, **options, backend=backend)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(own_metrics.rewards, metrics.rewards)
        torch.testing.assert_close(own_metrics.token_counts, metrics.token_counts)
        grads = [torch.autograd.grad(3 * value, logits, retain_graph=True)[0] for value in (loss, expected)]
        torch.testing.assert_close(*grads)


def test_gradients_by_the_tokens_log_probabilities_agree_with_finite_differences():
    labels = torch.randint(7, (4, 6), generator=torch.Generator().manual_seed(3))
    labels[0, 4:] = -100
    head = heads.Mix((1.0, heads.make("simpo")), (0.3, heads.make("nll", chosen_only=True)))
    logps = -torch.rand(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    assert gradcheck(lambda x: loss_from_logps(head, x, labels=labels)[0], (logps.requires_grad_(),))


MIXED = heads.Mix((1.0, heads.make("simpo")), (0.3, heads.make("nll")))


@pytest.mark.parametrize(
    ("loss", "options", "error", "message"),
    [
        (MIXED, {"reduction": "none"}, ValueError, "adds losses of tokens to losses of sequences"),
        (
            MIXED,
            {"weights": torch.ones(B, T)},
            ValueError,
            "weights has shape [4, 17], expected [4] (sequences), [2]",
        ),
        (
            heads.make("sigmoid", use_weighting=True),
            {"token_weights": torch.ones(B, T)},
            ValueError,
            "take one of the two",
        ),
        (
            heads.Mix((1.0, heads.make("sigmoid", use_weighting=True)), (1.0, heads.make("nll"))),
            {"completion_mask": torch.ones(B, T, dtype=torch.bool)},
            ValueError,
            "means over all labelled tokens, not over those of the mask",
        ),
        (MIXED, {"num_items": 3}, TypeError, "num_items is the number"),
        (MIXED, {"advantages": torch.ones(B)}, TypeError, "takes no tensor 'advantages'"),
        (MIXED, {"completion_mask": torch.ones(B, T)}, TypeError, "completion_mask must be bool"),
        (MIXED, {"completion_mask": torch.ones(B, 3, dtype=torch.bool)}, ValueError, "completion_mask has shape"),
        (heads.make("orpo", nll_on="all"), {}, TypeError, "needs the tensor completion_mask"),
        ("orpo", {"completion_mask": torch.ones(B, T)}, TypeError, "takes no tensor 'completion_mask'"),
        ("nll", {"token_weights": torch.ones(B, T)}, TypeError, "reads single tokens: pass weights"),
        ("simpo", {"token_weights": torch.ones(B)}, ValueError, "token_weights has shape [4], expected the shape of"),
        ("simpo", {"token_weights": -torch.ones(B, T)}, ValueError, "token_weights must be >= 0, got -1.0"),
        ("simpo", {"token_weights": 0.5}, TypeError, "token_weights must be a tensor, got float"),
    ],
)
def test_a_wrong_call_of_weights_and_mixes_is_named(loss, options, error, message):
    case = make(torch.float32, "cpu")
    inputs = case["hidden"], case["weight"], case["labels"]
    for function in (fused_linear_loss, reference.linear_loss):
        with pytest.raises(error) as raised:
            function(loss, *inputs, **options)
        assert message in str(raised.value)


@pytest.mark.parametrize(
    ("loss", "logps", "options", "message"),
    [
        ("nll", torch.zeros(B, T), {}, "needs labels or mask, which say which entries of policy_logps count"),
        (
            "nll",
            torch.zeros(B),
            {"mask": torch.ones(B, dtype=torch.bool)},
            "must be the tokens' log-probabilities [B, T]",
        ),
        ("nll", torch.zeros(B, T), {"mask": torch.ones(B, T)}, "mask must be bool"),
        ("nll", torch.zeros(B, T), {"mask": torch.full((B, T), 2)}, "mask must hold 0 or 1, got 2"),
        ("nll", torch.zeros(B, T), {"token_counts": torch.ones(B)}, "token_counts has no meaning"),
        ("nll", torch.zeros(3, T), {"labels": torch.ones(B, T).long()}, "labels has shape [4, 17], expected [3, 17]"),
        ("simpo", torch.zeros(B), {"labels": torch.ones(B, T)}, "takes no tensor 'labels'"),
        (heads.make("nll", chosen_only=True), torch.zeros(3, T), {"labels": torch.ones(3, T).long()}, "an even batch"),
    ],
)
def test_a_wrong_call_with_the_tokens_log_probabilities_is_named(loss, logps, options, message):
    for function in (loss_from_logps, reference.loss_from_logps):
        with pytest.raises((TypeError, ValueError)) as raised:
            function(loss, logps, **options)
        assert message in str(raised.value)
