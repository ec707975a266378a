"""``kto-fused estimate``: from a model's config alone, the memory of its loss, plainly and fused, and the longest
sequence that fits a GPU.

B sequences (two per pair for DPO), T positions, V vocabulary, H hidden size, N completion tokens. The loss's memory
follows from the shapes (``plain_moments``, ``fused_moments``; vectors of B T numbers are left out). That of the rest of
the step is an estimate (``StepMemory``).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from ..engines import backends
from ..engines.chunks import FoldedRows, WholeRows
from ..engines.options import HiddenOptions, LogitOptions, Needs
from ..engines.plan import held_dtype, largest_chunk
from ..functional import DEFAULT_CHUNK_BYTES
from ..huggingface.config import max_positions
from ..huggingface.files import load_pretrained
from . import environment, flags
from .cli import COMMANDS
from .errors import CommandError

GIB = 2**30
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COMMON_GPUS_GIB = (24.0, 48.0, 80.0, 141.0)
# for the driver's context, libraries' workspaces and gaps between tensors
RESERVED_BYTES = GIB
STEP = 64  # sequence lengths are multiples of it
UNLIMITED = 2**22  # where a search ends for a model that sets no limit


@dataclass(frozen=True)
class EstimateSettings:
    model: str = field(metadata={"help": "a Hugging Face model: a folder with its config.json, or its id on the Hub"})
    batch: int = field(default=8, metadata={"help": "sequences of a step, for --loss dpo pairs"})
    seq: int = field(default=2048, metadata={"help": "positions of each sequence, prompt and padding included"})
    loss: Literal["kto", "dpo"] = field(default="kto", metadata={"help": "the loss"})
    dtype: Literal["bf16", "fp16", "fp32"] = field(
        default="bf16", metadata={"help": "what the model computes in; of fp32 weights, under autocast"}
    )
    weights: Literal["auto", "fp32", "bf16", "fp16"] = field(
        default="auto",
        metadata={"help": "what weights are kept in; auto: fp32 if trained, as by kto-fused train, else --dtype"},
    )
    gpu_gib: float | None = field(
        default=None, metadata={"help": "a GPU's memory in GiB (the GPU here; without one, several common sizes)"}
    )
    completion_fraction: float = field(default=1.0, metadata={"help": "share of the positions that are completion"})
    head: Literal["trained", "frozen"] = field(
        default="trained", metadata={"help": "frozen: adapters alone are trained, and turned off for the reference"}
    )
    chunk_bytes: int = field(default=DEFAULT_CHUNK_BYTES, metadata={"help": "the fused loss's budget for logits"})


@dataclass(frozen=True)
class ModelFacts:
    """What the config says of the model."""

    kind: str  # model_type
    num_parameters: int  # tied ones once
    vocab_size: int
    hidden_size: int  # of the LM head's input
    layer_size: int  # of the layers, mostly the same
    inner_size: int  # of a layer's MLP, of all experts that see a token together
    num_layers: int
    max_length: int | None


@dataclass(frozen=True)
class LossShape:
    """What the loss is computed from."""

    num_sequences: int  # B
    seq_len: int  # T
    tokens_per_sequence: int
    vocab_size: int  # V
    hidden_size: int  # H
    dtype: torch.dtype  # the GEMMs'; logits' without this package
    param_dtype: torch.dtype  # of weights, hidden states and their gradients; another than dtype under autocast
    is_head_trained: bool = True
    is_paired: bool = False

    @property
    def num_tokens(self) -> int:
        """N"""
        return self.num_sequences * self.tokens_per_sequence

    @property
    def logits(self) -> int:
        """Numbers in [B, T, V]."""
        return self.num_sequences * self.seq_len * self.vocab_size

    @property
    def predicted_logits(self) -> int:
        """Numbers in [B, T-1, V]: the last position predicts nothing."""
        return self.num_sequences * (self.seq_len - 1) * self.vocab_size

    @property
    def hidden(self) -> int:
        """Numbers in [B, T, H]."""
        return self.num_sequences * self.seq_len * self.hidden_size

    @property
    def head(self) -> int:
        """Numbers in [V, H]."""
        return self.vocab_size * self.hidden_size


@dataclass(frozen=True)
class Moment:
    """The bytes that a loss holds at one moment of a step."""

    name: str
    terms: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())


@dataclass(frozen=True)
class LossMemory:
    """``peak`` is the moment that holds most; ``made`` bytes are there before the forward has let go of what autocast
    cast, and ``kept`` bytes stay until the layers' backward is done.
    """

    peak: Moment
    made: int
    kept: int


@dataclass(frozen=True)
class StepMemory:
    """What a training step holds beside the loss, in bytes.

    weights, gradients, adamw     the policy's parameters times the bytes of each; AdamW has two numbers for one
    reference                     a second model's weights, where the policy's own base cannot serve
    casts                         autocast's copies of trained float32 weights but the head's, while the forward runs;
                                  too many by an embedding that is not the head
    checkpoints                   gradient checkpointing: one [B, T, H] for each of the layers
    layer                         B T (16 H + 6 I) numbers while one layer runs backward, I the width of its MLP, and
                                  under autocast B T 2 H in float32. Llama and Qwen 3 are within a quarter of it;
                                  attention is taken to hold no [T, T]
    """

    weights: int
    gradients: int
    adamw: int
    reference: int
    casts: int
    checkpoints: int
    layer: int

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.adamw + self.reference

    def peak(self, loss: LossMemory) -> int:
        """The end of the forward, the loss, or the backward of a layer, whichever holds most; with all that stays."""
        return self.states + self.checkpoints + max(self.casts + loss.made, loss.peak.total, loss.kept + self.layer)


@dataclass(frozen=True)
class Fit:
    """The longest sequences, plainly and fused, in multiples of 64 or the model's own limit; 0: not even 64 fit."""

    gpu: str
    memory_bytes: int
    plain: int
    fused: int


@dataclass(frozen=True)
class Estimate:
    facts: ModelFacts
    shape: LossShape
    plain: LossMemory
    fused: LossMemory
    step: StepMemory
    fits: list[Fit] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    return run(flags.parse(EstimateSettings, arguments, "estimate", f"Print {COMMANDS['estimate']}."))


def run(settings: EstimateSettings) -> int:
    """Print the estimate. Raises ``CommandError``."""
    print(table(settings, estimate(settings)))
    return 0


def estimate(settings: EstimateSettings) -> Estimate:
    """The numbers. Raises ``CommandError``; loads and downloads no weights."""
    check(settings)
    facts = model_facts(settings.model)

    def longest(loss: str, gpu_bytes: int) -> int:
        def fits(seq_len: int) -> bool:
            numbers = _estimate(settings, facts, seq_len)
            return numbers.step.peak(getattr(numbers, loss)) <= gpu_bytes - RESERVED_BYTES

        return longest_sequence(fits, facts.max_length)

    gpus = _gpus(settings.gpu_gib)
    fits = [Fit(name, size, plain=longest("plain", size), fused=longest("fused", size)) for name, size in gpus]
    return replace(_estimate(settings, facts, settings.seq), fits=fits)


def _estimate(settings: EstimateSettings, facts: ModelFacts, seq_len: int) -> Estimate:
    shape = loss_shape(settings, facts, seq_len)
    backend = backends.resolve(None, torch.device("cuda"))  # a GPU's, whatever is here
    fused = fused_loss(shape, settings.chunk_bytes, backend)
    return Estimate(facts, shape, plain_loss(shape), fused, step_memory(facts, shape))


def check(settings: EstimateSettings) -> None:
    for setting in fields(settings):
        value, choices = getattr(settings, setting.name), get_args(setting.type)
        if choices and isinstance(choices[0], str) and value not in choices:
            raise CommandError(f"--{setting.name} must be one of {list(choices)}, got {value!r}")
    for name, least, most in (("batch", 1, 2**16), ("seq", 2, 2**24), ("chunk_bytes", 1, 2**62)):
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise CommandError(f"--{name} must be a whole number from {least} to {most}, got {value!r}")
    if settings.weights not in ("auto", "fp32", settings.dtype):
        raise CommandError(f"--weights must be auto, fp32 or --dtype's {settings.dtype}, got {settings.weights!r}")
    if (settings.weights, settings.head) == ("fp16", "trained"):
        raise CommandError("--weights must be auto or fp32 where fp16 weights would be trained: loss scaling needs it")
    if settings.gpu_gib is not None and not 0 < settings.gpu_gib <= 2**20:
        raise CommandError(f"--gpu_gib must be a number > 0 and at most {2**20}, got {settings.gpu_gib!r}")
    if not 0 < settings.completion_fraction <= 1:
        raise CommandError(f"--completion_fraction must lie in (0, 1], got {settings.completion_fraction!r}")


# ---- the model ----------------------------------------------------------------------------------------------------


def model_facts(model: str) -> ModelFacts:
    """Counts a model that is built without memory for its weights. Raises ``CommandError``."""
    is_path = not model or Path(model).exists() or model.startswith(("/", ".")) or model.count("/") > 1
    if is_path and not (model and Path(model).is_dir()):
        raise CommandError(f"--model {model!r} is no folder")
    try:
        config = load_pretrained(AutoConfig, model, trust_remote_code=False)
    except Exception as error:  # of the file, the network, or of what a model's own code makes of its fields
        raise CommandError(f"--model {model}: its config cannot be read: {_first_line(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise CommandError(f"--model {model} is quantised: name the model that it was made from")
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder or is_encoder:
        raise CommandError(f"--model {model}: {config.model_type} is no causal language model")
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # an incomplete config fails somewhere in its model's own code
        problem = f"{config.model_type} cannot be built as a causal language model"
        raise CommandError(f"--model {model}: {problem}: {_first_line(error)}") from error
    head = getattr(skeleton.get_output_embeddings(), "weight", None)
    text = config.get_text_config(decoder=True)
    layer_size, num_layers = getattr(text, "hidden_size", None), getattr(text, "num_hidden_layers", None)
    if head is None or not layer_size or not num_layers:
        raise CommandError(
            f"--model {model}: {config.model_type} has not all of an LM head, hidden_size and num_hidden_layers"
        )
    return ModelFacts(
        kind=config.model_type,
        num_parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        vocab_size=head.shape[0],
        hidden_size=head.shape[1],
        layer_size=layer_size,
        inner_size=_inner_size(text),
        num_layers=num_layers,
        max_length=max_positions(config),
    )


def _inner_size(text: PretrainedConfig) -> int:
    """Width of a layer's MLP; of the experts that one token visits, all together."""

    def widest(name: str) -> int:
        size = getattr(text, name, None) or 0
        return max(size) if isinstance(size, list | tuple) else size  # one for each layer

    dense, expert = widest("intermediate_size") or 4 * text.hidden_size, widest("moe_intermediate_size")
    num_experts = getattr(text, "num_experts_per_tok", None) or 1
    return max(dense, expert * num_experts) if expert else dense * num_experts


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def loss_shape(settings: EstimateSettings, facts: ModelFacts, seq_len: int) -> LossShape:
    is_trained, is_paired = settings.head == "trained", settings.loss == "dpo"
    weights = settings.weights
    if weights == "auto":
        weights = "fp32" if is_trained else settings.dtype
    return LossShape(
        num_sequences=settings.batch * (2 if is_paired else 1),
        seq_len=seq_len,
        tokens_per_sequence=max(1, round(settings.completion_fraction * (seq_len - 1))),
        vocab_size=facts.vocab_size,
        hidden_size=facts.hidden_size,
        dtype=DTYPES[settings.dtype],
        param_dtype=DTYPES[weights],
        is_head_trained=is_trained,
        is_paired=is_paired,
    )


# ---- the loss -----------------------------------------------------------------------------------------------------


def plain_loss(shape: LossShape) -> LossMemory:
    """``plain_moments`` at their peak."""
    return LossMemory(
        peak=max(plain_moments(shape), key=lambda moment: moment.total),
        made=shape.dtype.itemsize * shape.logits,
        kept=2 * shape.dtype.itemsize * shape.logits,  # both logits still have a name in the loop
    )


def plain_moments(shape: LossShape) -> list[Moment]:
    """A loop without this package, that takes the logits of policy and reference, and log-probabilities by
    ``logits[:, :-1].float().log_softmax(-1).gather(...)``; with s bytes in a logit:

    s BTV + s BTV         the logits of policy and reference, until the step is done
    4 B(T-1)V             the policy's log-softmax, kept for its backward
    then, in the backward of the log-softmax,
    4 B(T-1)V             the gradient by the log-softmax, zeros but for the labels
    4 B(T-1)V             the gradient by the float32 logits
    or, in the backward of the LM head,
    s BTV                 the gradient by the logits
    s BTH + s VH          the gradients by hidden states and LM head

    Moments that hold no more than these: the reference's float32 copy and log-softmax, while the policy's is kept; and
    before the policy, KTO's mismatched pairs (and any other pass without a gradient), (s + 8) B(T-1)V at a time.
    """
    width, params = shape.dtype.itemsize, shape.param_dtype.itemsize
    logits = {
        "policy's logits [B, T, V]": width * shape.logits,
        "reference's logits [B, T, V]": width * shape.logits,
        **_autocast_copies(shape),
    }
    wide = 4 * shape.predicted_logits
    through_softmax = {
        "log-softmax, float32": wide,
        "gradient by the log-softmax, float32": wide,
        "gradient by the logits, float32": wide,
    }
    through_head = {
        "gradient by the logits [B, T, V]": width * shape.logits,
        "gradient by the hidden states [B, T, H]": params * shape.hidden,
        "gradient by the LM head [V, H]": params * shape.head * shape.is_head_trained,
    }
    return [
        Moment("in the backward of the log-softmax", {**logits, **through_softmax}),
        Moment("in the backward of the LM head", {**logits, **through_head}),
    ]


def fused_loss(shape: LossShape, chunk_bytes: int, backend: str) -> LossMemory:
    """``fused_moments`` at their peak."""
    return LossMemory(
        peak=max(fused_moments(shape, chunk_bytes, backend), key=lambda moment: moment.total),
        made=0,
        kept=shape.param_dtype.itemsize * shape.hidden,  # the gradient by the hidden states
    )


def fused_moments(shape: LossShape, chunk_bytes: int, backend: str) -> list[Moment]:
    """``fused_linear_kto_loss`` or ``fused_linear_dpo_loss`` with hidden states and LM head of policy and reference:

    BTH                   the reference's hidden states
    BTH                   the gradient by the policy's; float16's in float32 until the loss is scaled
    VH                    the sum of the gradients by the LM head: float32 where several chunks add up
    chunk                 logits of as many completion tokens as the budget holds, and what passes through their GEMMs:
                          the engine's own buffers; nothing of the size of B T V
    then, without the chunk, each gradient that is rounded beside its rounded self
    or, before the policy, KTO's mismatched pairs: their hidden states and a chunk without gradients
    """
    params, gradients = shape.param_dtype.itemsize, held_dtype(shape.param_dtype)
    chunk, weight_sum = _chunk(shape, chunk_bytes, backend)
    inputs = {"reference's hidden states [B, T, H]": params * shape.hidden, **_autocast_copies(shape)}
    gradients = {
        "gradient by the hidden states [B, T, H]": gradients.itemsize * shape.hidden,
        "gradient by the LM head, summed [V, H]": weight_sum.nbytes if weight_sum is not None else 0,
    }
    rounded = 0
    if weight_sum is not None and weight_sum.dtype != shape.param_dtype:
        rounded += params * shape.head
    if gradients != shape.param_dtype:
        rounded += params * shape.hidden
    logits = f"chunk: logits of {chunk.num_tokens} of {shape.num_tokens} tokens"
    moments = [
        Moment("in a chunk", {**inputs, **gradients, logits: chunk.spec.size(chunk.num_tokens)}),
        Moment("after the last chunk", {**inputs, **gradients, "gradients, rounded": rounded}),
    ]
    if not shape.is_paired:
        chunk, _ = _chunk(shape, chunk_bytes, backend, has_gradient=False)
        hidden = {"mismatched pairs' hidden states [B, T, H]": params * shape.hidden, **_autocast_copies(shape)}
        logits = f"chunk: logits of {chunk.num_tokens} of {shape.num_tokens} tokens"
        moments.append(Moment("in the mismatched pairs", {**hidden, logits: chunk.spec.size(chunk.num_tokens)}))
    return moments


def _autocast_copies(shape: LossShape) -> dict[str, int]:
    if shape.dtype == shape.param_dtype:
        return {}
    return {"LM head in the GEMMs' dtype [V, H]": shape.dtype.itemsize * shape.head}


def _chunk(
    shape: LossShape, chunk_bytes: int, backend: str, has_gradient: bool = True
) -> tuple[WholeRows | FoldedRows, torch.Tensor | None]:
    """``plan.largest_chunk``, without memory."""
    options = HiddenOptions(
        LogitOptions(backend=backend),
        dtype=shape.dtype,
        ref_dtype=shape.dtype,
        chunk_bytes=chunk_bytes,
        needs=Needs(hidden=has_gradient, weight=has_gradient and shape.is_head_trained),
    )
    weight = torch.empty(shape.vocab_size, shape.hidden_size, dtype=shape.param_dtype, device="meta")
    counts = [shape.tokens_per_sequence] * shape.num_sequences
    return largest_chunk(counts, weight, options, group=2 if shape.is_paired else 1)


# ---- the step -----------------------------------------------------------------------------------------------------


def step_memory(facts: ModelFacts, shape: LossShape) -> StepMemory:
    width, computed = shape.param_dtype.itemsize, shape.dtype.itemsize
    policy = width * facts.num_parameters
    positions = shape.num_sequences * shape.seq_len
    is_trained, is_cast = shape.is_head_trained, shape.dtype != shape.param_dtype
    of_layer = computed * (16 * facts.layer_size + 6 * facts.inner_size) + width * 2 * facts.layer_size * is_cast
    return StepMemory(
        weights=policy,
        gradients=policy * is_trained,
        adamw=2 * policy * is_trained,
        reference=policy * is_trained,
        casts=computed * (facts.num_parameters - shape.head) * (is_trained and is_cast),
        checkpoints=width * positions * facts.layer_size * facts.num_layers,
        layer=positions * of_layer,
    )


def longest_sequence(fits: Callable[[int], bool], max_length: int | None) -> int:
    """The longest that fits: the model's own limit, or a multiple of 64 below it, by bisection; 0 for none."""
    limit = max_length or UNLIMITED
    if fits(limit):
        return limit
    low, high = 0, -(-limit // STEP)  # low * STEP fits, high * STEP does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * STEP) else (low, middle)
    return low * STEP


def _gpus(gpu_gib: float | None) -> list[tuple[str, int]]:
    if gpu_gib is not None:
        return [(f"{gpu_gib:g} GiB", int(gpu_gib * GIB))]
    here = {gpu.name: gpu.memory_bytes for gpu in environment.gpus()}
    if here:
        return [(f"{name}, {size / GIB:.0f} GiB", size) for name, size in here.items()]
    return [(f"{size:g} GiB", int(size * GIB)) for size in COMMON_GPUS_GIB]


# ---- the text -----------------------------------------------------------------------------------------------------


def table(settings: EstimateSettings, numbers: Estimate) -> str:
    """What ``run`` prints."""
    facts, shape, step = numbers.facts, numbers.shape, numbers.step
    limit = f"at most {facts.max_length} positions" if facts.max_length else "no limit to its positions"
    unit = "pairs" if shape.is_paired else "sequences"
    lines = [
        f"{settings.model}: {facts.kind}, {facts.num_parameters / 1e6:.1f}M parameters, {facts.num_layers} layers, "
        f"H = {facts.hidden_size}, V = {facts.vocab_size}, {limit}",
        f"{settings.loss.upper()}, {settings.batch} {unit} of T = {settings.seq}, "
        f"{shape.tokens_per_sequence} completion tokens each, {settings.dtype}, head {settings.head}, "
        f"weights in {next(name for name, dtype in DTYPES.items() if dtype == shape.param_dtype)}",
    ]
    if facts.max_length and settings.seq > facts.max_length:
        lines.append(f"T = {settings.seq} is more than the {facts.max_length} positions that the model was made for")
    lines += ["", "The loss: exact, up to vectors of B T numbers"]
    for name, loss in (("plain", numbers.plain), ("fused", numbers.fused)):
        rows = [(f"  {term}", size) for term, size in loss.peak.terms.items() if size]
        lines += _rows([(f"{name}, {loss.peak.name}", loss.peak.total), *rows])
    lines.append(f"fused takes 1/{numbers.plain.peak.total / numbers.fused.peak.total:.1f} of plain")

    width = shape.param_dtype.itemsize
    lines += ["", "The rest of the step: an estimate, with gradient checkpointing and attention that holds no [T, T]"]
    rows = [(f"weights, {width} bytes each", step.weights)]
    if step.casts:
        rows.append((f"autocast's copies of them in the forward, {shape.dtype.itemsize} bytes", step.casts))
    if shape.is_head_trained:
        rows += [
            (f"gradients, {width} bytes each", step.gradients),
            (f"AdamW's two moments, {2 * width} bytes, no other copy", step.adamw),
            (f"reference's weights, {width} bytes each", step.reference),
        ]
    rows += [("a checkpoint for each layer [B, T, H]", step.checkpoints), ("one layer's backward", step.layer)]
    lines += _rows(rows)
    if not shape.is_head_trained:
        lines.append("adapters, their gradients and moments are not counted; the reference is the base without them")
    rows = [("whole step, plain", step.peak(numbers.plain)), ("whole step, fused", step.peak(numbers.fused))]
    lines += _rows(rows)
    gradients = "; gradients count throughout, as when they accumulate" if shape.is_head_trained else ""
    lines.append(f"at the forward's end, the loss or a layer's backward{gradients}")

    lines += ["", f"Longest T that fits {settings.batch} {unit}, {RESERVED_BYTES / GIB:g} GiB left for the driver"]
    lines.append(f"{'':44}{'plain':>12}{'fused':>12}")
    for fit in numbers.fits:
        lines.append(f"{fit.gpu:44}{_length(fit.plain, facts):>12}{_length(fit.fused, facts):>12}")
    if facts.max_length and any(facts.max_length in (fit.plain, fit.fused) for fit in numbers.fits):
        lines.append("* the model's own limit")
    return "\n".join(lines)


def _rows(rows: list[tuple[str, int]]) -> list[str]:
    return [f"{name:56}{_size(size):>12}" for name, size in rows]


def _size(num_bytes: int) -> str:
    """Three figures or more, so that small models show sizes too."""
    for unit, scale in (("GiB", GIB), ("MiB", 2**20)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes / 1024:.2f} KiB"


def _length(length: int, facts: ModelFacts) -> str:
    if not length:
        return "none"
    if length == facts.max_length:
        return f"{length}*"
    return f"{length}+" if length == UNLIMITED else str(length)
