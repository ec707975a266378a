"""The command ``kto-fused estimate``: its formulas against measured memory, its table, and its errors."""

import re
from dataclasses import replace

import pytest
import torch
from devices import HAS_GPU
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma3Config,
    GPT2Config,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    ViTConfig,
    XLNetConfig,
)

from kto_fused import fused_linear_dpo_loss, fused_linear_kto_loss, fused_linear_loss, linear_sequence_logps
from kto_fused.commands import environment, estimate
from kto_fused.commands.errors import CommandError
from kto_fused.commands.estimate import DTYPES, GIB, EstimateSettings, LossShape
from kto_fused.engines import chunks as chunk_module
from kto_fused.engines.chunks import CAST_BYTES
from kto_fused.measure import peak_bytes

MIB = 2**20
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
BETA = 0.1
FROZEN = {"is_head_trained": False}
PAIRS = {"is_paired": True}
FREE = {"is_paired": True, "has_reference": False}
ZERO = {"has_mismatched": False}
TOKENS = {"has_reference": False, "has_mismatched": False, "reads_tokens": True}
LATE = {"has_reference": False, "has_mismatched": False, "reads_batch": True, "is_late": True}


@pytest.fixture(autouse=True)
def unpoisoned_memory(poisoned_memory):
    """Turn off the filling of new memory with NaN, whose operators would be counted."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(environment, "gpus", list)


# ---- against measured memory --------------------------------------------------------------------------------------


def make_shape(dtype="fp32", *, seq_len=257, tokens=256, vocab=4096, hidden_size=64, **options) -> LossShape:
    return LossShape(4, seq_len, tokens, vocab, hidden_size, DTYPES[dtype], DTYPES[dtype], **options)


def make_inputs(shape: LossShape, device=CPU):
    """Return hidden states, LM head, the reference's hidden states and LM head, and labels."""
    options = {"dtype": shape.param_dtype, "device": device}
    hidden, ref_hidden = torch.randn(2, shape.num_sequences, shape.seq_len, shape.hidden_size, **options)
    weight, ref_weight = torch.randn(2, shape.vocab_size, shape.hidden_size, **options)
    labels = torch.randint(shape.vocab_size, (shape.num_sequences, shape.seq_len), device=device)
    labels[:, : shape.seq_len - shape.tokens_per_sequence] = -100
    weight.requires_grad_(shape.is_head_trained)
    return hidden.clone().requires_grad_(), weight, ref_hidden, ref_weight, labels


def needed(hidden, weight) -> list[torch.Tensor]:
    return [x for x in (hidden, weight) if x.requires_grad]


def plain_logps(logits, labels):
    targets = labels[:, 1:]
    log_p = logits[:, :-1].float().log_softmax(-1)
    logps = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return logps.where(targets != -100, 0.0).sum(-1)


def plain_step(shape, hidden, weight, ref_hidden, ref_weight, labels):
    """The usual loop in plain PyTorch: both models' logits, log-probabilities, loss, backward."""
    z0 = 0.0
    if shape.has_mismatched and not shape.is_paired:
        with torch.no_grad():
            mismatched = labels.roll(1, 0)
            policy = plain_logps(hidden @ weight.T, mismatched)
            z0 = (policy - plain_logps(ref_hidden @ ref_weight.T, mismatched)).mean().clamp(min=0)
    logits = hidden @ weight.T
    if shape.has_reference:
        with torch.no_grad():
            ref_logits = ref_hidden @ ref_weight.T
    log_ratios = BETA * plain_logps(logits, labels)
    if shape.has_reference:
        with torch.no_grad():
            ref_logps = plain_logps(ref_logits, labels)
        log_ratios = log_ratios - BETA * ref_logps
    if shape.is_paired:
        chosen, rejected = log_ratios.chunk(2)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    else:
        sign = torch.tensor([1, -1, 1, -1], device=labels.device)
        loss = (1 - torch.sigmoid(sign * (log_ratios - BETA * z0))).mean()
    return torch.autograd.grad(loss, needed(hidden, weight))


def fused_step(shape, chunk_bytes, backend, hidden, weight, ref_hidden, ref_weight, labels):
    options = {"chunk_bytes": chunk_bytes, "backend": backend}
    kl_hidden = None  # hidden states of the mismatched pairs
    if shape.has_mismatched and not shape.is_paired:
        kl_hidden = hidden.detach().clone()
        with torch.no_grad():
            linear_sequence_logps(kl_hidden, weight, labels, **options)
        kl_hidden = None
    if shape.reads_tokens or shape.is_late:
        head = "nll" if shape.reads_tokens else lambda logps, counts, ref_logps: -logps
        loss, _ = fused_linear_loss(head, hidden, weight, labels, **options)
        return torch.autograd.grad(loss, needed(hidden, weight))
    if not shape.has_reference:
        loss, _ = fused_linear_loss("cpo", hidden, weight, labels, **options)
        return torch.autograd.grad(loss, needed(hidden, weight))
    options |= {"ref_hidden": ref_hidden.clone(), "ref_lm_head_weight": ref_weight}
    if shape.is_paired:
        loss, _ = fused_linear_dpo_loss(hidden, weight, labels, **options)
    else:
        desirable = torch.tensor([True, False, True, False], device=labels.device)
        loss, _ = fused_linear_kto_loss(hidden, weight, labels, desirable, reference_point=0.1, **options)
    return torch.autograd.grad(loss, needed(hidden, weight))


@pytest.mark.parametrize("options", [{}, FROZEN, PAIRS, FREE], ids=["kto", "frozen", "dpo", "cpo"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_plain_loss_takes_the_estimated_memory(dtype, options):
    shape = make_shape(dtype, **options)
    inputs = make_inputs(shape)
    measured = peak_bytes(lambda: plain_step(shape, *inputs), CPU)
    assert estimate.plain_loss(shape).peak.total == pytest.approx(measured, rel=0.03)


def test_a_few_tokens_before_a_wide_head_peak_in_the_heads_gradient():
    shape = make_shape(seq_len=64, tokens=63, vocab=4096, hidden_size=1024)
    inputs = make_inputs(shape)
    measured = peak_bytes(lambda: plain_step(shape, *inputs), CPU)
    peak = estimate.plain_loss(shape).peak
    assert peak.name == "in the backward of the LM head"
    assert peak.total == pytest.approx(measured, rel=0.03)


LARGE_HEAD = {"vocab": 16384, "hidden_size": 384, "seq_len": 65, "tokens": 64}
WIDE_HEAD = {"vocab": 8192, "hidden_size": 2560, "seq_len": 33, "tokens": 32}
LONG_PROMPT = {"seq_len": 4097, "tokens": 64, "hidden_size": 256}
# (sizes and options, dtype, budget in MiB)
FUSED = {
    "one chunk": ({}, "fp32", 64),
    "one chunk, bf16": ({}, "bf16", 64),
    "one chunk, frozen": (FROZEN, "bf16", 64),
    "several chunks": ({}, "fp32", 18),
    "several chunks of pairs": (PAIRS, "fp32", 18),
    "several chunks, bf16": ({}, "bf16", 28),
    "no reference": (FREE, "fp32", 18),
    "no mismatched pairs": (ZERO, "bf16", 64),
    "a sequence over the budget": ({}, "fp32", 9),
    "a sequence over the budget, frozen": (FROZEN, "fp32", 9),
    "a large head": (LARGE_HEAD, "fp32", 20),
    "a large head, bf16": (LARGE_HEAD | PAIRS, "bf16", 36),
    "a sum beside its rounded self": (WIDE_HEAD, "bf16", 28),
    "tokens": (TOKENS, "fp32", 9),
    "tokens, bf16": (TOKENS, "bf16", 64),
    "a function, one chunk": (LATE, "fp32", 64),
    "a function, bf16": (LATE, "bf16", 18),
    "long prompts": (LONG_PROMPT, "fp32", 48),
    "long prompts, bf16, frozen": (LONG_PROMPT | FROZEN, "bf16", 48),
}


@pytest.mark.parametrize("case", FUSED)
def test_the_fused_loss_takes_the_estimated_memory(case):
    options, dtype, budget = FUSED[case]
    shape = make_shape(dtype, **options)
    inputs = make_inputs(shape)
    measured = peak_bytes(lambda: fused_step(shape, budget * MIB, "torch", *inputs), CPU)
    assert estimate.fused_loss(shape, budget * MIB, "torch").peak.total == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("chunk_bytes", [64 * MIB, 28 * MIB])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_float32_weights_under_autocast_take_the_estimated_memory(dtype, chunk_bytes):
    shape = replace(make_shape(dtype), param_dtype=torch.float32)
    inputs = make_inputs(shape)

    def step(function, *options):
        with torch.autocast("cpu", DTYPES[dtype]):
            return function(shape, *options, *inputs)

    measured = peak_bytes(lambda: step(fused_step, chunk_bytes, "torch"), CPU)
    assert estimate.fused_loss(shape, chunk_bytes, "torch").peak.total == pytest.approx(measured, rel=0.03)
    measured = peak_bytes(lambda: step(plain_step), CPU)
    assert estimate.plain_loss(shape).peak.total == pytest.approx(measured, rel=0.03)


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, FROZEN, PAIRS], ids=["kto", "frozen", "dpo"])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("chunk_bytes", [256 * MIB, GIB], ids=["256 MiB", "1 GiB"])
def test_a_gpu_takes_the_estimated_memory(chunk_bytes, dtype, options, monkeypatch):
    """As on any GPU but Hopper's, which fold the logits of such a head without a tile."""
    monkeypatch.setattr(chunk_module, "_is_hopper", lambda device: False)
    shape = make_shape(dtype, seq_len=2049, tokens=1024, vocab=65536, hidden_size=1024, **options)
    inputs = make_inputs(shape, DEVICE)
    fused_step(shape, chunk_bytes, "triton", *inputs)  # compiles the kernels and allocates cuBLAS's workspace
    measured = peak_bytes(lambda: fused_step(shape, chunk_bytes, "triton", *inputs), DEVICE)
    assert estimate.fused_loss(shape, chunk_bytes, "triton").peak.total == pytest.approx(measured, rel=0.1)
    measured = peak_bytes(lambda: plain_step(shape, *inputs), DEVICE)
    assert estimate.plain_loss(shape).peak.total == pytest.approx(measured, rel=0.1)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("num_layers", [2, 5])
@pytest.mark.parametrize(
    ("make_config", "make_model", "dtype"),
    [(LlamaConfig, LlamaModel, "fp32"), (LlamaConfig, LlamaModel, "bf16"), (Qwen3Config, Qwen3Model, "bf16")],
)
def test_activations_are_within_a_quarter(make_config, make_model, dtype, num_layers, tmp_path):
    config = make_config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        use_cache=False,
    )
    config.save_pretrained(tmp_path)
    model = make_model(config).to(DTYPES[dtype]).train()
    model.gradient_checkpointing_enable()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids = torch.randint(64, (2, 256))

    def step():
        model(ids).last_hidden_state.sum().backward()

    facts = estimate.model_facts(str(tmp_path))
    expected = estimate.step_memory(facts, LossShape(2, 256, 255, 64, 128, DTYPES[dtype], DTYPES[dtype]))
    assert expected.checkpoints + expected.layer == pytest.approx(peak_bytes(step, CPU), rel=0.25)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("seq_len", [64, 512])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_of_the_trainer_is_within_a_quarter(dtype, seq_len, tmp_path):
    """With float32 weights. The peak is the loss or autocast's copies at 64 positions, a layer's backward at 512."""
    tiny_training = pytest.importorskip("tiny_training", reason="the trainers need datasets and accelerate")
    sizes = {**SMALL, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    config = LlamaConfig(**sizes, vocab_size=4096, max_position_embeddings=512)
    policy, settings = LlamaForCausalLM(config), {"reference_point": 0.0, "chunk_bytes": 2**24, "backend": "torch"}
    trainer = tiny_training.make_trainer("kto", tmp_path, policy=policy, bf16=dtype == "bf16", **settings)
    trainer.current_gradient_accumulation_steps = 1
    policy.gradient_checkpointing_enable()
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    prepared, ids = trainer.accelerator.prepare(policy.train()), torch.randint(4096, (4, seq_len))
    desirable = torch.tensor([True, False, True, False])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "desirable": desirable}
    config.save_pretrained(tmp_path)
    facts = estimate.model_facts(str(tmp_path))
    shape = estimate.loss_shape(EstimateSettings("", batch=4, dtype=dtype), facts, seq_len)
    step = estimate.step_memory(facts, shape)
    expected = step.peak(estimate.fused_loss(shape, 2**24, "torch")) - step.states
    assert expected == pytest.approx(peak_bytes(lambda: trainer.training_step(prepared, batch), CPU), rel=0.25)


# ---- what follows from the formulas -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [64 * MIB, 256 * MIB, GIB])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("tokens", [64, 8191])
def test_a_chunk_stays_within_its_budget_and_uses_it(tokens, dtype, chunk_bytes):
    shape = make_shape(dtype, seq_len=8192, tokens=tokens, vocab=128256, hidden_size=2048)
    in_a_chunk = estimate.fused_moments(shape, chunk_bytes, "triton")[0]
    (size,) = (size for name, size in in_a_chunk.terms.items() if name.startswith("chunk"))
    needed_by_all = shape.num_tokens * shape.vocab_size * 2
    budget = chunk_bytes
    if dtype == "fp16":
        budget += CAST_BYTES  # two float32 blocks of the head exist for a moment, while the first one is released
    if dtype == "bf16" and in_a_chunk.terms["gradient w.r.t. the LM head, summed [V, H]"] == 2 * shape.head:
        # one chunk alone, on a first or second visit, needs no float32 sum of several chunks
        budget = max(budget, (1.05 if size >= needed_by_all else 0.75) * 4 * shape.head)
    assert min(chunk_bytes, needed_by_all) / 2 < size <= budget


def test_prompts_cost_the_fused_loss_no_logits():
    short, long = (make_shape(seq_len=seq_len, hidden_size=1) for seq_len in (257, 257 * 16))
    fused = [estimate.fused_loss(shape, GIB, "triton").peak.total for shape in (short, long)]
    assert fused[1] < 1.01 * fused[0]
    assert estimate.plain_loss(long).peak.total > 15 * estimate.plain_loss(short).peak.total


def test_a_loss_without_a_reference_takes_no_second_model(llama):
    orpo, sigmoid = (estimate.estimate(EstimateSettings(llama, loss="dpo", loss_type=name)) for name in ("orpo", None))
    assert (orpo.step.reference, sigmoid.step.reference) == (0, sigmoid.step.weights)
    assert orpo.fused.peak.total == sigmoid.fused.peak.total - orpo.shape.param_dtype.itemsize * orpo.shape.hidden
    with pytest.raises(
        CommandError, match="--loss_type orpo is no loss of --loss kto: choose one of apo_zero_unpaired,"
    ):
        estimate.estimate(EstimateSettings(llama, loss_type="orpo"))


def test_losses_of_tokens_and_of_your_own_have_their_memory(llama, tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="a loss of one's own needs the packages of training")
    (tmp_path / "loss_of_estimate.py").write_text(
        "from dataclasses import dataclass\nfrom kto_fused import heads\n"
        "def likelihood(logps, counts, ref_logps, desirable):\n    return -logps\n"
        "likelihood.needs_reference = False\n"
        "@dataclass(frozen=True)\nclass Margin(heads.Head):\n    margin: float\n    group = 2\n"
        "    def losses(self, logps, counts, ref_logps):\n        return -logps.chunk(2)[0]\n"
    )
    monkeypatch.chdir(tmp_path)
    sft = estimate.estimate(EstimateSettings(llama, loss="sft"))
    own = estimate.estimate(EstimateSettings(llama, loss="loss_of_estimate:likelihood"))
    assert sft.step == own.step
    assert sft.step.reference == 0
    assert sft.plain == own.plain
    with pytest.raises(CommandError, match=r"loss_of_estimate:Margin cannot be made of its default fields: .*'margin'"):
        estimate.estimate(EstimateSettings(llama, loss="loss_of_estimate:Margin"))
    for name in ("ppo", "nothing"):
        with pytest.raises(
            CommandError, match=f"--loss {name} is unknown: choose one of kto, dpo, sft, reward, a loss"
        ):
            estimate.estimate(EstimateSettings(llama, loss=name))
    orpo = estimate.estimate(EstimateSettings(llama, loss="orpo"))
    assert orpo == estimate.estimate(EstimateSettings(llama, loss="dpo", loss_type="orpo"))
    with pytest.raises(CommandError, match="--loss_type nll has no meaning with --loss reward"):
        estimate.estimate(EstimateSettings(llama, loss="reward", loss_type="nll"))


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_reward_model_has_no_head(tmp_path, capsys, is_tied):
    config = LlamaConfig(**TEXT, tie_word_embeddings=is_tied, num_labels=1)
    config.save_pretrained(tmp_path)
    settings = EstimateSettings(str(tmp_path), loss="reward", gpu_gib=24.0)
    numbers = estimate.estimate(settings)
    model = AutoModelForSequenceClassification.from_config(config)
    assert numbers.facts.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert numbers.plain == numbers.fused
    estimate.run(settings)
    assert "a score of one number in the place of the LM head" in capsys.readouterr().out


def test_pairs_are_twice_the_sequences(llama):
    kto, dpo = (
        estimate.estimate(EstimateSettings(llama, batch=4, loss=loss, weights="bf16")) for loss in ("kto", "dpo")
    )
    assert dpo.plain.peak.total == 2 * kto.plain.peak.total
    assert dpo.step.layer == 2 * kto.step.layer
    assert dpo.step.weights == kto.step.weights


@pytest.mark.parametrize(
    ("dtype", "weights", "head", "sizes"),
    [
        ("bf16", "auto", "trained", (4, 4, 8, 4, 2)),
        ("bf16", "bf16", "trained", (2, 2, 4, 2, 0)),
        ("fp32", "auto", "trained", (4, 4, 8, 4, 0)),
        ("fp16", "auto", "trained", (4, 4, 8, 4, 2)),
        ("bf16", "auto", "frozen", (2, 0, 0, 0, 0)),
        ("bf16", "fp32", "frozen", (4, 0, 0, 0, 0)),
        ("fp16", "auto", "frozen", (2, 0, 0, 0, 0)),
    ],
)
def test_bytes_of_a_parameter(llama, dtype, weights, head, sizes):
    numbers = estimate.estimate(EstimateSettings(llama, dtype=dtype, weights=weights, head=head))
    step, count = numbers.step, numbers.facts.num_parameters
    *kept, cast = sizes
    actual = (step.weights, step.gradients, step.adamw, step.reference)
    assert actual == tuple(size * count for size in kept)
    assert step.casts == cast * (count - numbers.shape.head)


def peak_of(settings: EstimateSettings, seq_len: int, which: str) -> int:
    numbers = estimate.estimate(replace(settings, seq=seq_len))
    return numbers.step.peak(getattr(numbers, which))


@pytest.mark.parametrize("which", ["plain", "fused"])
@pytest.mark.parametrize("gpu_gib", [4.0, 9.0])
def test_the_longest_sequence_fits_and_64_more_do_not(llama, gpu_gib, which):
    settings = EstimateSettings(llama, weights="bf16", gpu_gib=gpu_gib)
    (fit,) = estimate.estimate(settings).fits
    longest = getattr(fit, which)
    assert longest > 0
    assert longest % 64 == 0
    limit = gpu_gib * GIB - estimate.RESERVED_BYTES
    assert peak_of(settings, longest, which) <= limit < peak_of(settings, longest + 64, which)


def test_longer_sequences_fit_with_the_fused_loss(llama):
    fits = estimate.estimate(EstimateSettings(llama)).fits
    assert [fit.gpu for fit in fits] == ["24 GiB", "48 GiB", "80 GiB", "141 GiB"]
    for fit in fits:
        assert fit.fused > 2 * fit.plain > 0


def test_the_models_own_limit_ends_the_search(tmp_path, capsys):
    GPT2Config(n_layer=2, n_positions=1000).save_pretrained(tmp_path)
    settings = EstimateSettings(str(tmp_path), seq=512, gpu_gib=80)
    (fit,) = estimate.estimate(settings).fits
    assert (fit.plain, fit.fused) == (1000, 1000)
    estimate.run(settings)
    assert "* the model's own limit" in capsys.readouterr().out


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32768}


def test_stretched_positions_are_the_models_own_limit(tmp_path, capsys):
    LlamaConfig(**{**TEXT, "max_position_embeddings": 32768, "rope_parameters": YARN}).save_pretrained(tmp_path)
    estimate.run(EstimateSettings(str(tmp_path), batch=1, seq=65536, gpu_gib=1000.0))
    out = capsys.readouterr().out
    assert "at most 131072 positions" in out
    assert "exceeds" not in out
    assert out.count("131072*") == 2


def test_a_model_of_any_length_has_no_limit(tmp_path, capsys):
    """XLNet's configuration holds -1."""
    XLNetConfig(d_model=64, n_layer=2, n_head=2, d_inner=96, vocab_size=500).save_pretrained(tmp_path)
    estimate.run(EstimateSettings(str(tmp_path), gpu_gib=24.0))
    out = capsys.readouterr().out
    assert "no limit on positions" in out
    assert "exceeds" not in out
    assert "none" not in out


def test_a_gpu_too_small_for_the_weights_fits_nothing(llama, capsys):
    settings = EstimateSettings(llama, gpu_gib=1.1)
    (fit,) = estimate.estimate(settings).fits
    assert (fit.plain, fit.fused) == (0, 0)
    estimate.run(settings)
    assert capsys.readouterr().out.splitlines()[-1].split() == ["1.1", "GiB", "none", "none"]


def test_a_gpu_that_is_here_is_taken(llama, monkeypatch):
    gpu = environment.GPU(torch.device("cuda", 0), "A GPU", 40 * GIB, "9.0")
    monkeypatch.setattr(environment, "gpus", lambda: [gpu, gpu])
    (fit,) = estimate.estimate(EstimateSettings(llama)).fits
    assert (fit.gpu, fit.memory_bytes) == ("A GPU, 40 GiB", 40 * GIB)


# ---- models -------------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SMALL, "num_key_value_heads": 2, "vocab_size": 500, "max_position_embeddings": 256}


@pytest.fixture
def llama(tmp_path):
    folder = tmp_path / "llama"
    LlamaConfig(
        vocab_size=128256,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=2**20,
    ).save_pretrained(folder)
    return str(folder)


CONFIGS = {
    "own head": LlamaConfig(**TEXT, tie_word_embeddings=False),
    "tied head": LlamaConfig(**TEXT, tie_word_embeddings=True),
    "other names": GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=500, bos_token_id=1, eos_token_id=2),
    "experts": MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2),
    "text and images": Gemma3Config(
        text_config={**TEXT, "head_dim": 32}, vision_config={**SMALL, "image_size": 28, "patch_size": 14}
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_parameters_are_counted_as_the_model_has_them(kind, tmp_path):
    CONFIGS[kind].save_pretrained(tmp_path)
    facts = estimate.model_facts(str(tmp_path))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert facts.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (facts.vocab_size, facts.hidden_size) == tuple(model.get_output_embeddings().weight.shape)
    assert (facts.layer_size, facts.num_layers) == (64, 2)


def test_a_tied_head_is_counted_once(tmp_path):
    counts = []
    for kind in ("own head", "tied head"):
        CONFIGS[kind].save_pretrained(tmp_path / kind)
        counts.append(estimate.model_facts(str(tmp_path / kind)).num_parameters)
    assert counts[0] - counts[1] == 500 * 64


@pytest.mark.parametrize(
    ("kind", "width"), [("own head", 96), ("other names", 4 * 64), ("experts", 2 * 96), ("text and images", 96)]
)
def test_the_width_of_an_mlp_counts_the_experts_of_a_token(kind, width, tmp_path):
    CONFIGS[kind].save_pretrained(tmp_path)
    assert estimate.model_facts(str(tmp_path)).inner_size == width


def test_no_weights_are_made(tmp_path):
    """The model is far larger than this machine's memory."""
    LlamaConfig(
        vocab_size=128256,
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        max_position_embeddings=131072,
    ).save_pretrained(tmp_path)
    assert peak_bytes(lambda: estimate.estimate(EstimateSettings(str(tmp_path))), CPU) < MIB
    assert estimate.model_facts(str(tmp_path)).num_parameters == pytest.approx(405.9e9, rel=1e-3)


# ---- the text -----------------------------------------------------------------------------------------------------


def test_the_table_shows_both_losses_and_what_is_assumed(llama, capsys):
    settings = EstimateSettings(llama)
    assert estimate.run(settings) == 0
    out = capsys.readouterr().out
    numbers = estimate.estimate(settings)
    assert f"{numbers.plain.peak.total / GIB:.2f} GiB" in out
    assert "policy's logits [B, T, V]" in out
    assert "chunk: logits of" in out or "gradients, rounded" in out
    assert "Memory of the loss (exact" in out
    assert "Memory of the rest of the step (an estimate" in out
    assert "AdamW's two moments, 8 bytes together" in out
    assert max(map(len, out.splitlines()[1:])) <= 110


def test_columns_line_up(llama, capsys):
    estimate.run(EstimateSettings(llama))
    lines = capsys.readouterr().out.splitlines()
    sized = [line for line in lines if line.endswith((" GiB", " MiB", " KiB"))]
    assert len(sized) > 12
    assert {len(line) for line in sized} == {68}
    fits = lines[next(i for i, line in enumerate(lines) if line.startswith("Longest T")) + 1 :][:5]
    assert {len(line) for line in fits} == {68}


def test_a_sequence_beyond_the_models_positions_is_remarked(tmp_path, capsys):
    CONFIGS["own head"].save_pretrained(tmp_path)
    estimate.run(EstimateSettings(str(tmp_path), seq=512))
    assert "T = 512 exceeds the 256 positions" in capsys.readouterr().out


# ---- settings and errors ------------------------------------------------------------------------------------------


def test_every_setting_is_a_flag():
    (parser,) = [HfArgumentParser(EstimateSettings)]
    flags = "--model m --batch 2 --seq 64 --loss dpo --dtype fp32 --weights fp32 --gpu_gib 80 --completion_fraction 0.5"
    (settings,) = parser.parse_args_into_dataclasses([*flags.split(), "--head", "frozen", "--chunk_bytes", "1000"])
    assert settings == EstimateSettings("m", 2, 64, "dpo", "fp32", "fp32", 80.0, 0.5, "frozen", 1000)
    assert all(action.help for action in parser._actions)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch", 0),
        ("seq", 1),
        ("seq", -64),
        ("seq", 10**12),
        ("batch", 10**30),
        ("chunk_bytes", 0),
        ("gpu_gib", 0.0),
        ("gpu_gib", float("nan")),
        ("gpu_gib", float("inf")),
        ("gpu_gib", 1e308),
        ("completion_fraction", 0.0),
        ("completion_fraction", 1.1),
        ("weights", "int4"),
        ("weights", "fp16"),
    ],
)
def test_a_bad_number_or_name_is_named(llama, name, value):
    with pytest.raises(CommandError, match=re.escape(f"--{name} must ") + ".*" + re.escape(str(value))):
        estimate.estimate(EstimateSettings(llama, **{name: value}))


def test_a_model_that_is_not_there_is_named(tmp_path):
    missing = str(tmp_path / "missing")
    with pytest.raises(CommandError, match="missing' is not a folder"):
        estimate.model_facts(missing)
    with pytest.raises(CommandError, match="'' is not a folder"):
        estimate.model_facts("")
    with pytest.raises(CommandError, match=r"nobody/no-such-model: its configuration cannot be read: \w"):
        estimate.model_facts("nobody/no-such-model")
    with pytest.raises(CommandError, match="its configuration cannot be read"):
        estimate.model_facts(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "its configuration cannot be read"),
        ("{}", "its configuration cannot be read"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "cannot be built|cannot be read"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}}', "is quantised"),
    ],
)
def test_a_config_that_cannot_be_used_is_one_sentence(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CommandError, match=said) as error:
        estimate.model_facts(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [BertConfig(), T5Config(), ViTConfig()], ids=lambda config: config.model_type)
def test_a_model_that_predicts_no_next_token_is_refused(config, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(CommandError, match=f"{config.model_type} is not a causal language model"):
        estimate.model_facts(str(tmp_path))
