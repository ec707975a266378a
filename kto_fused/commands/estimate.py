"""``kto-fused estimate``: the memory of a training step, from a model's configuration alone.

It prints what the loss needs with kto-fused ("fused") and in plain PyTorch ("plain"), what the rest of the step needs,
and the longest sequences that fit a GPU. No weights are loaded or downloaded.

Letters in the formulas: B sequences (two per pair for DPO), T positions, V vocabulary size, H hidden size. The loss's
memory follows exactly from these shapes (``plain_moments``, ``fused_moments``); only vectors of B T numbers are not
counted. The memory of the rest of the step is an estimate (``StepMemory``).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from .. import heads
from ..engines import backends
from ..engines.options import HiddenOptions, LogitOptions, Needs
from ..engines.plan import held_dtype, largest_chunk
from ..functional import DEFAULT_CHUNK_BYTES
from ..heads.protocol import Head, class_of
from ..huggingface.config import max_positions
from ..huggingface.files import load_pretrained
from . import environment, flags
from .cli import description
from .errors import CommandError

GIB = 2**30
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COMMON_GPUS_GIB = (24.0, 48.0, 80.0, 141.0)
RESERVED_BYTES = GIB  # for the driver's context, libraries' workspaces and gaps between tensors
STEP = 64  # the search for the longest sequence tries multiples of it
REWARD = "reward"
LOSSES = {"kto": "kto", "dpo": "sigmoid", "sft": "nll"}  # by recipe, the loss if --loss_type is not given
UNLIMITED = 2**22  # the longest sequence that is tried for a model that sets no limit itself


@dataclass(frozen=True)
class EstimateSettings:
    """The flags of ``kto-fused estimate``."""

    model: str = field(metadata={"help": "a Hugging Face model: a folder with its config.json, or its id on the Hub"})
    batch: int = field(default=8, metadata={"help": "sequences per step; pairs per step for losses of pairs"})
    seq: int = field(default=2048, metadata={"help": "positions per sequence, prompt and padding included"})
    loss: str = field(
        default="kto",
        metadata={
            "help": "kto: a loss of single completions; dpo: a loss of pairs; sft: a loss of single tokens; reward: a "
            "reward model's; the name of any other of these losses (orpo); module:Name: a loss of your own, with its "
            "default fields"
        },
    )
    dtype: Literal["bf16", "fp16", "fp32"] = field(
        default="bf16",
        metadata={"help": "dtype that the model computes in; if the weights are wider, under autocast"},
    )
    weights: Literal["auto", "fp32", "bf16", "fp16"] = field(
        default="auto",
        metadata={"help": "dtype of the weights; auto: fp32 if they are trained, as in kto-fused train, else --dtype"},
    )
    gpu_gib: float | None = field(
        default=None,
        metadata={"help": "memory of the GPU in GiB; if not given, that of the GPU here, or of several common GPUs"},
    )
    completion_fraction: float = field(
        default=1.0, metadata={"help": "fraction of the positions that belong to completions; the rest is prompt"}
    )
    head: Literal["trained", "frozen"] = field(
        default="trained",
        metadata={
            "help": "trained: all weights are trained; frozen: only adapters are, and the reference is the model with "
            "its adapters off"
        },
    )
    chunk_bytes: int = field(
        default=DEFAULT_CHUNK_BYTES, metadata={"help": "bytes that the fused loss may use for a chunk of logits"}
    )
    loss_type: str | None = field(
        default=None,
        metadata={
            "help": "the loss, named as in kto-fused train: some have no reference model, or no mismatched pairs; kto, "
            "sigmoid or nll if not given"
        },
    )


class ModelFacts(NamedTuple):
    """What a model's configuration says of its sizes."""

    kind: str  # model_type
    num_parameters: int  # tied parameters count once
    vocab_size: int
    hidden_size: int  # of the LM head's input
    layer_size: int  # hidden size of the layers, usually equal to hidden_size
    inner_size: int  # width of a layer's MLP, or of all experts that process one token
    num_layers: int
    max_length: int | None
    is_head_tied: bool  # to the embedding

    def with_score(self) -> "ModelFacts":
        """Return the facts of the reward model that is made of the model."""
        head = 0 if self.is_head_tied else self.vocab_size * self.hidden_size
        return self._replace(num_parameters=self.num_parameters - head + self.hidden_size, vocab_size=1)


@dataclass(frozen=True)
class LossShape:
    """The sizes and dtypes that decide the loss's memory."""

    num_sequences: int  # B
    seq_len: int  # T
    tokens_per_sequence: int  # completion tokens
    vocab_size: int  # V
    hidden_size: int  # H
    dtype: torch.dtype  # of the GEMMs, and of the logits in plain PyTorch
    param_dtype: torch.dtype  # of weights, hidden states and their gradients; wider than dtype under autocast
    is_head_trained: bool = True
    is_paired: bool = False
    has_reference: bool = True
    has_mismatched: bool = True  # whether z0 comes from mismatched pairs, which a loss of pairs never has
    reads_tokens: bool = False  # whether each token has a loss of its own
    reads_batch: bool = False  # whether all sequences share one loss
    is_late: bool = False  # whether the loss is computed once all log-probabilities are known: it is not registered
    is_reward: bool = False  # whether a score of one number takes the LM head's place; then vocab_size is 1

    @property
    def num_tokens(self) -> int:
        """Completion tokens of the batch."""
        return self.num_sequences * self.tokens_per_sequence

    @property
    def logits(self) -> int:
        """Number of elements of [B, T, V]."""
        return self.num_sequences * self.seq_len * self.vocab_size

    @property
    def predicted_logits(self) -> int:
        """Number of elements of [B, T-1, V]. The last position predicts no token."""
        return self.num_sequences * (self.seq_len - 1) * self.vocab_size

    @property
    def hidden(self) -> int:
        """Number of elements of [B, T, H]."""
        return self.num_sequences * self.seq_len * self.hidden_size

    @property
    def head(self) -> int:
        """Number of elements of [V, H]."""
        return self.vocab_size * self.hidden_size


class Moment(NamedTuple):
    """The bytes that the loss holds at one moment of a step, by tensor."""

    name: str
    terms: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())


class LossMemory(NamedTuple):
    """The loss's memory in bytes."""

    peak: Moment  # the moment that holds most
    at_forward_end: int  # held when the model's forward ends, while autocast's copies of the weights still exist
    until_backward_end: int  # held until the layers' backward is done


@dataclass(frozen=True)
class StepMemory:
    """What a training step holds besides the loss, in bytes.

    weights, gradients, adamw     the policy's parameters times their bytes; AdamW keeps two numbers per parameter
    reference                     the weights of a second model; 0 if the policy's own base is the reference
    casts                         autocast's copies of trained float32 weights during the forward, without the head's;
                                  too high by an embedding that is not tied to the head
    checkpoints                   gradient checkpointing: one [B, T, H] per layer
    layer                         B T (16 H + 6 I) numbers during one layer's backward, with I the width of its MLP,
                                  and B T 2 H float32 numbers under autocast. Llama and Qwen 3 are within a quarter of
                                  it. Attention is assumed to hold no [T, T].
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
        """Return the step's peak: at the end of the forward, in the loss, or in a layer's backward."""
        moments = (
            self.casts + loss.at_forward_end,
            loss.peak.total,
            loss.until_backward_end + self.layer,
        )
        return self.states + self.checkpoints + max(moments)


class Fit(NamedTuple):
    """The longest sequences that fit a GPU: a multiple of 64, the model's own limit, or 0 if not even 64 fit."""

    gpu: str
    memory_bytes: int
    plain: int
    fused: int


class Estimate(NamedTuple):
    """All numbers of the table that ``run`` prints."""

    facts: ModelFacts
    shape: LossShape
    plain: LossMemory
    fused: LossMemory
    step: StepMemory
    fits: tuple[Fit, ...] = ()


def main(arguments: list[str]) -> int:
    return run(flags.parse(EstimateSettings, arguments, "estimate", description("estimate")))


def run(settings: EstimateSettings) -> int:
    """Print the estimate. Returns the exit code.

    Raises:
        CommandError: a setting is out of range, or the model's configuration cannot be used.
    """
    print(table(settings, estimate(settings)))
    return 0


def estimate(settings: EstimateSettings) -> Estimate:
    """Return the numbers that ``run`` prints. Raises what ``run`` raises."""
    check(settings)
    facts = model_facts(settings.model)
    if settings.loss == REWARD:
        facts = facts.with_score()

    def longest(loss: str, gpu_bytes: int) -> int:
        def fits(seq_len: int) -> bool:
            numbers = _estimate(settings, facts, seq_len)
            return numbers.step.peak(getattr(numbers, loss)) <= gpu_bytes - RESERVED_BYTES

        return longest_sequence(fits, facts.max_length)

    gpus = _gpus(settings.gpu_gib)
    fits = tuple(Fit(name, size, plain=longest("plain", size), fused=longest("fused", size)) for name, size in gpus)
    return _estimate(settings, facts, settings.seq)._replace(fits=fits)


def _estimate(settings: EstimateSettings, facts: ModelFacts, seq_len: int) -> Estimate:
    shape = loss_shape(settings, facts, seq_len)
    if shape.is_reward:
        loss = score_loss(shape)
        return Estimate(facts, shape, loss, loss, step_memory(facts, shape))
    backend = backends.resolve(None, torch.device("cuda"))  # the estimate is for a GPU, even on a machine without one
    fused = fused_loss(shape, settings.chunk_bytes, backend)
    return Estimate(facts, shape, plain_loss(shape), fused, step_memory(facts, shape))


def check(settings: EstimateSettings) -> None:
    """Check the ranges of the settings; the flag parser checks their types and choices. Raises ``CommandError``."""
    for name, least, most in (("batch", 1, 2**16), ("seq", 2, 2**24), ("chunk_bytes", 1, 2**62)):
        value = getattr(settings, name)
        if not least <= value <= most:
            raise CommandError(f"--{name} must be a whole number from {least} to {most}, got {value}")
    loss_facts(settings)
    if settings.weights not in ("auto", "fp32", settings.dtype):
        raise CommandError(
            f"--weights must be auto, fp32 or the same as --dtype ({settings.dtype}), got {settings.weights!r}"
        )
    if (settings.weights, settings.head) == ("fp16", "trained"):
        raise CommandError("--weights must be auto or fp32, got 'fp16': loss scaling needs trained weights in fp32")
    if settings.gpu_gib is not None and not 0 < settings.gpu_gib <= 2**20:
        raise CommandError(f"--gpu_gib must be a number > 0 and at most {2**20}, got {settings.gpu_gib!r}")
    if not 0 < settings.completion_fraction <= 1:
        raise CommandError(f"--completion_fraction must lie in (0, 1], got {settings.completion_fraction!r}")


# ---- the model ----------------------------------------------------------------------------------------------------


def model_facts(model: str) -> ModelFacts:
    """Return the sizes of a model, which is built on the meta device, without memory for its weights.

    Raises:
        CommandError: the configuration cannot be read, or is not that of a causal language model.
    """
    is_path = not model or Path(model).exists() or model.startswith(("/", ".")) or model.count("/") > 1
    if is_path and not (model and Path(model).is_dir()):
        raise CommandError(f"--model {model!r} is not a folder")
    try:
        config = load_pretrained(AutoConfig, model, trust_remote_code=False)
    except Exception as error:  # of the file, the network, or the model's own code
        raise CommandError(f"--model {model}: its configuration cannot be read: {_first_line(error)}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise CommandError(f"--model {model} is quantised: give the model that it was made from instead")
    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder or is_encoder:
        raise CommandError(f"--model {model}: {config.model_type} is not a causal language model")
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # an incomplete configuration fails somewhere in the model's own code
        problem = f"{config.model_type} cannot be built as a causal language model"
        raise CommandError(f"--model {model}: {problem}: {_first_line(error)}") from error
    head = getattr(skeleton.get_output_embeddings(), "weight", None)
    text = config.get_text_config(decoder=True)
    layer_size, num_layers = getattr(text, "hidden_size", None), getattr(text, "num_hidden_layers", None)
    if head is None or not layer_size or not num_layers:
        raise CommandError(
            f"--model {model}: the estimate needs an LM head, hidden_size and num_hidden_layers, and "
            f"{config.model_type} lacks one of them"
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
        is_head_tied=skeleton.get_input_embeddings().weight is head,
    )


def _inner_size(text: PretrainedConfig) -> int:
    """Return the width of a layer's MLP, or the sum of the widths of all experts that process one token."""

    def widest(name: str) -> int:
        size = getattr(text, name, None) or 0
        return max(size) if isinstance(size, list | tuple) else size  # a list holds one width per layer

    dense, expert = widest("intermediate_size") or 4 * text.hidden_size, widest("moe_intermediate_size")
    num_experts = getattr(text, "num_experts_per_tok", None) or 1
    return max(dense, expert * num_experts) if expert else dense * num_experts


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def loss_facts(settings: EstimateSettings) -> dict[str, bool]:
    """Return the fields of ``LossShape`` that the loss of the settings decides.

    Raises:
        CommandError: ``--loss`` names no loss, or ``--loss_type`` none or one of other data than ``--loss``.
    """
    if settings.loss_type is not None and (settings.loss == REWARD or ":" in settings.loss):
        raise CommandError(f"--loss_type {settings.loss_type} has no meaning with --loss {settings.loss}")
    if settings.loss == REWARD:
        return {"is_paired": True, "has_reference": False, "has_mismatched": False, "is_reward": True}
    if ":" in settings.loss:
        return _own_loss_facts(settings.loss)
    recipe, name = settings.loss, settings.loss_type or LOSSES.get(settings.loss)
    if recipe not in LOSSES and recipe in heads.names() and settings.loss_type in (None, recipe):
        name, recipe = recipe, next((each for each in LOSSES if _reads(class_of(recipe), each)), recipe)
    if recipe not in LOSSES:
        raise CommandError(
            f"--loss {settings.loss} is unknown: choose one of {', '.join(LOSSES)}, {REWARD}, a loss of your own as "
            "module:Name, or a registered loss of their data"
        )
    of_data = [each for each in heads.names() if _reads(class_of(each), recipe)]
    if name not in of_data:
        raise CommandError(f"--loss_type {name} is no loss of --loss {recipe}: choose one of {', '.join(of_data)}")
    loss = heads.make(name)
    return {
        "is_paired": recipe == "dpo",
        "has_reference": loss.needs_reference,
        "has_mismatched": "z0" in loss.tensor_names(),
        "reads_tokens": loss.level == "token",
        "reads_batch": loss.group is None,
    }


def _own_loss_facts(text: str) -> dict[str, bool]:
    try:
        from ..heads.protocol import is_registered
        from ..trainers import losses  # here, because the rest of the estimate runs without the packages of training
        from . import own_loss
    except ImportError as error:
        raise CommandError(f"--loss {text}: a loss of your own needs the packages of training: {error}") from error
    own = own_loss.find(text)
    loss: Any = own.found
    if isinstance(loss, type):
        try:
            loss = loss()
        except Exception as error:  # a field without a default, or what the class itself refuses
            raise CommandError(f"--loss {text} cannot be made of its default fields: {error}") from error
    return {
        "is_paired": own.recipe == "dpo",
        "has_reference": losses.needs_reference(loss),
        "has_mismatched": losses.takes(loss, "z0"),
        "reads_tokens": own.recipe == "sft",
        "reads_batch": getattr(loss, "group", None) is None,
        "is_late": not (isinstance(loss, Head) and is_registered(loss)),
    }


def _reads(kind: type[Head], loss: str) -> bool:
    """Whether a loss reads the data of ``--loss``: pairs, single completions with labels, or demonstrations."""
    if loss == "sft":
        return kind.level == "token" and not kind.required_tensors()
    if loss == "kto":
        return kind.level == "sequence" and "desirable" in kind.tensor_names()
    return kind.level == "sequence" and not kind.required_tensors() and heads.make(kind.name).is_paired


def loss_shape(settings: EstimateSettings, facts: ModelFacts, seq_len: int) -> LossShape:
    loss, is_trained = loss_facts(settings), settings.head == "trained"
    weights = settings.weights
    if weights == "auto":
        weights = "fp32" if is_trained else settings.dtype
    return LossShape(
        num_sequences=settings.batch * (2 if loss["is_paired"] else 1),
        seq_len=seq_len,
        tokens_per_sequence=max(1, round(settings.completion_fraction * (seq_len - 1))),
        vocab_size=facts.vocab_size,
        hidden_size=facts.hidden_size,
        dtype=DTYPES[settings.dtype],
        param_dtype=DTYPES[weights],
        is_head_trained=is_trained,
        **loss,
    )


# ---- the loss -----------------------------------------------------------------------------------------------------


def plain_loss(shape: LossShape) -> LossMemory:
    """Return the memory of the loss in plain PyTorch."""
    return LossMemory(
        peak=max(plain_moments(shape), key=lambda moment: moment.total),
        at_forward_end=shape.dtype.itemsize * shape.logits,
        # the loop's variables still hold both logits
        until_backward_end=(1 + shape.has_reference) * shape.dtype.itemsize * shape.logits,
    )


def plain_moments(shape: LossShape) -> list[Moment]:
    """Return the moments at which the loss in plain PyTorch may hold most.

    The loop takes the logits of policy and reference, and their log-probabilities by
    ``logits[:, :-1].float().log_softmax(-1).gather(...)``. With s bytes per logit it holds:

        s BTV + s BTV         the logits of policy and reference, until the step is done
        4 B(T-1)V             the policy's log-softmax, kept for its backward

    and in the backward of the log-softmax

        4 B(T-1)V             the gradient w.r.t. the log-softmax, zero except at the labels
        4 B(T-1)V             the gradient w.r.t. the float32 logits

    or in the backward of the LM head

        s BTV                 the gradient w.r.t. the logits
        s BTH + s VH          the gradients w.r.t. the hidden states and the LM head

    Two other moments never hold more: the reference's float32 copy and log-softmax while the policy's is kept; and
    KTO's mismatched pairs before the policy (or any pass without a gradient), with (s + 8) B(T-1)V bytes per pass.
    """
    width, params = shape.dtype.itemsize, shape.param_dtype.itemsize
    logits = {
        "policy's logits [B, T, V]": width * shape.logits,
        "reference's logits [B, T, V]": width * shape.logits * shape.has_reference,
        **_autocast_copies(shape),
    }
    wide = 4 * shape.predicted_logits
    through_softmax = {
        "log-softmax, float32": wide,
        "gradient w.r.t. the log-softmax, float32": wide,
        "gradient w.r.t. the logits, float32": wide,
    }
    through_head = {
        "gradient w.r.t. the logits [B, T, V]": width * shape.logits,
        "gradient w.r.t. the hidden states [B, T, H]": params * shape.hidden,
        "gradient w.r.t. the LM head [V, H]": params * shape.head * shape.is_head_trained,
    }
    return [
        Moment("in the backward of the log-softmax", {**logits, **through_softmax}),
        Moment("in the backward of the LM head", {**logits, **through_head}),
    ]


def fused_loss(shape: LossShape, chunk_bytes: int, backend: str) -> LossMemory:
    """Return the memory of the loss with kto-fused."""
    return LossMemory(
        peak=max(fused_moments(shape, chunk_bytes, backend), key=lambda moment: moment.total),
        at_forward_end=0,
        until_backward_end=shape.param_dtype.itemsize * shape.hidden,  # the gradient w.r.t. the hidden states
    )


def fused_moments(shape: LossShape, chunk_bytes: int, backend: str) -> list[Moment]:
    """Return the moments at which the loss with kto-fused may hold most.

    ``fused_linear_loss`` takes the hidden states and LM heads of policy and reference; a loss without a reference takes
    the policy's alone.
    In a chunk it holds (in numbers):

        BTH                   the reference's hidden states
        BTH                   the gradient w.r.t. the policy's hidden states; float16's in float32 until the loss is
                              scaled
        VH                    the sum of the gradients w.r.t. the LM head; float32 if several chunks add up
        chunk                 the engine's own buffers: logits of as many completion tokens as ``chunk_bytes`` holds,
                              and operands of their GEMMs; nothing has B T V elements

    After the last chunk, without the chunk, each gradient that is rounded stands beside its rounded copy. KTO's
    mismatched pairs come before the policy: their hidden states and a chunk without gradients.
    """
    params, gradient_dtype = shape.param_dtype.itemsize, held_dtype(shape.param_dtype)
    chunk = _chunk(shape, chunk_bytes, backend)
    ref_hidden = params * shape.hidden * shape.has_reference
    inputs = {"reference's hidden states [B, T, H]": ref_hidden, **_autocast_copies(shape)}
    gradients = {
        "gradient w.r.t. the hidden states [B, T, H]": gradient_dtype.itemsize * shape.hidden,
        "gradient w.r.t. the LM head, summed [V, H]": chunk.weight_sum.nbytes if chunk.weight_sum is not None else 0,
    }
    rounded = 0
    if chunk.weight_sum is not None and chunk.weight_sum.dtype != shape.param_dtype:
        rounded += params * shape.head
    if gradient_dtype != shape.param_dtype:
        rounded += params * shape.hidden
    moments = [
        Moment("in a chunk", {**inputs, **gradients, **chunk.terms}),
        Moment("after the last chunk", {**inputs, **gradients, "gradients, rounded": rounded}),
    ]
    if shape.has_mismatched and not shape.is_paired:
        hidden = {"mismatched pairs' hidden states [B, T, H]": params * shape.hidden, **_autocast_copies(shape)}
        mismatched = _chunk(shape, chunk_bytes, backend, has_gradient=False)
        moments.append(Moment("in the mismatched pairs", {**hidden, **mismatched.terms}))
    return moments


def score_loss(shape: LossShape) -> LossMemory:
    """Return the memory of a reward model's loss, with kto-fused and without it: it has no vocabulary."""
    hidden = shape.param_dtype.itemsize * shape.hidden
    peak = Moment("in the backward of the score", {"gradient w.r.t. the hidden states [B, T, H]": hidden})
    return LossMemory(peak, at_forward_end=0, until_backward_end=hidden)


def _autocast_copies(shape: LossShape) -> dict[str, int]:
    if shape.dtype == shape.param_dtype:
        return {}
    return {"LM head in the GEMMs' dtype [V, H]": shape.dtype.itemsize * shape.head}


class Chunk(NamedTuple):
    """The engine's largest chunk, on the meta device."""

    terms: dict[str, int]  # its bytes, under the name that the table shows
    weight_sum: torch.Tensor | None  # the sum of the gradients w.r.t. the LM head


def _chunk(shape: LossShape, chunk_bytes: int, backend: str, has_gradient: bool = True) -> Chunk:
    """Return the chunk that the engine itself plans for these shapes. It allocates no memory."""
    options = HiddenOptions(
        LogitOptions(backend=backend),
        dtype=shape.dtype,
        ref_dtype=shape.dtype,
        chunk_bytes=chunk_bytes,
        needs=Needs(hidden=has_gradient, weight=has_gradient and shape.is_head_trained),
    )
    weight = torch.empty(shape.vocab_size, shape.hidden_size, dtype=shape.param_dtype, device="meta")
    counts = [shape.tokens_per_sequence] * shape.num_sequences
    largest = largest_chunk(
        counts,
        weight,
        options,
        group=None if shape.reads_batch else 2 if shape.is_paired else 1,
        reads_tokens=shape.reads_tokens,
        is_late=shape.is_late,
    )
    chunk = largest.chunk
    terms = {f"chunk: logits of {chunk.num_tokens} of {shape.num_tokens} tokens": chunk.spec.size(chunk.num_tokens)}
    if largest.accumulator_bytes:
        terms["sequences longer than a chunk: their gradients w.r.t. the LM head"] = largest.accumulator_bytes
    return Chunk(terms, largest.weight_sum)


# ---- the step -----------------------------------------------------------------------------------------------------


def step_memory(facts: ModelFacts, shape: LossShape) -> StepMemory:
    """Return the memory of a step besides the loss. ``StepMemory`` documents the formulas."""
    width, computed = shape.param_dtype.itemsize, shape.dtype.itemsize
    policy = width * facts.num_parameters
    positions = shape.num_sequences * shape.seq_len
    is_trained, is_cast = shape.is_head_trained, shape.dtype != shape.param_dtype
    of_layer = computed * (16 * facts.layer_size + 6 * facts.inner_size) + width * 2 * facts.layer_size * is_cast
    return StepMemory(
        weights=policy,
        gradients=policy * is_trained,
        adamw=2 * policy * is_trained,
        reference=policy * is_trained * shape.has_reference,
        casts=computed * (facts.num_parameters - shape.head) * (is_trained and is_cast),
        checkpoints=width * positions * facts.layer_size * facts.num_layers,
        layer=positions * of_layer,
    )


def longest_sequence(fits: Callable[[int], bool], max_length: int | None) -> int:
    """Return the longest length that fits: ``max_length``, else a multiple of 64 below it by bisection, or 0."""
    limit = max_length or UNLIMITED
    if fits(limit):
        return limit
    low, high = 0, -(-limit // STEP)  # low * STEP fits, high * STEP does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * STEP) else (low, middle)
    return low * STEP


def _gpus(gpu_gib: float | None) -> list[tuple[str, int]]:
    """Return names and memory sizes in bytes: the size that was asked for, the GPUs here, or common sizes."""
    if gpu_gib is not None:
        return [(f"{gpu_gib:g} GiB", int(gpu_gib * GIB))]
    here = {gpu.name: gpu.memory_bytes for gpu in environment.gpus()}
    if here:
        return [(f"{name}, {size / GIB:.0f} GiB", size) for name, size in here.items()]
    return [(f"{size:g} GiB", int(size * GIB)) for size in COMMON_GPUS_GIB]


# ---- the text -----------------------------------------------------------------------------------------------------


def table(settings: EstimateSettings, numbers: Estimate) -> str:
    """Return the text that ``run`` prints."""
    facts, shape, step = numbers.facts, numbers.shape, numbers.step
    limit = f"at most {facts.max_length} positions" if facts.max_length else "no limit on positions"
    unit = "pairs" if shape.is_paired else "sequences"
    head = "a score of one number" if shape.is_reward else f"V = {facts.vocab_size}"
    name = settings.loss_type or (settings.loss if ":" in settings.loss else settings.loss.upper())
    lines = [
        f"{settings.model}: {facts.kind}, {facts.num_parameters / 1e6:.1f}M parameters, {facts.num_layers} layers, "
        f"H = {facts.hidden_size}, {head}, {limit}",
        f"{name}, {settings.batch} {unit} of T = {settings.seq}, "
        f"{shape.tokens_per_sequence} completion tokens each, computed in {settings.dtype}, head {settings.head}, "
        f"weights in {next(name for name, dtype in DTYPES.items() if dtype == shape.param_dtype)}",
    ]
    if facts.max_length and settings.seq > facts.max_length:
        lines.append(f"T = {settings.seq} exceeds the {facts.max_length} positions that the model was made for")
    if shape.is_reward:
        lines += [
            "",
            "A reward model has a score of one number in the place of the LM head: its loss takes no logits, only "
            f"{_size(numbers.fused.peak.total)}",
            "for the gradient w.r.t. the hidden states, with kto-fused as without it.",
        ]
    else:
        lines += ["", "Memory of the loss (exact, except vectors of B T numbers)"]
        for name, loss in (("plain", numbers.plain), ("fused", numbers.fused)):
            rows = [(f"  {term}", size) for term, size in loss.peak.terms.items() if size]
            lines += _rows([(f"{name}: peak {loss.peak.name}", loss.peak.total), *rows])
        lines.append(f"plain needs {numbers.plain.peak.total / numbers.fused.peak.total:.1f} times the memory of fused")
    if shape.is_late:
        lines.append("the loss is not registered (heads.register), so fused takes 4 GEMMs and not 3")

    width = shape.param_dtype.itemsize
    lines += [
        "",
        "Memory of the rest of the step (an estimate, with gradient checkpointing and attention without a [T, T])",
    ]
    rows = [(f"weights, {width} bytes each", step.weights)]
    if step.casts:
        rows.append((f"autocast's copies in the forward, {shape.dtype.itemsize} bytes each", step.casts))
    if shape.is_head_trained:
        rows += [
            (f"gradients, {width} bytes each", step.gradients),
            (f"AdamW's two moments, {2 * width} bytes together", step.adamw),
        ]
        if step.reference:
            rows.append((f"reference model's weights, {width} bytes each", step.reference))
    rows += [("one checkpoint per layer [B, T, H]", step.checkpoints), ("backward of one layer", step.layer)]
    lines += _rows(rows)
    if not shape.is_head_trained:
        lines.append(
            "adapters, their gradients and moments are not counted"
            + "; the reference is the model with its adapters off" * shape.has_reference
        )
    rows = [
        ("peak of the whole step, plain", step.peak(numbers.plain)),
        ("peak of the whole step, fused", step.peak(numbers.fused)),
    ]
    lines += _rows(rows)
    lines.append("the peak is at the end of the forward, in the loss or in a layer's backward")
    if shape.is_head_trained:
        lines.append("gradients are counted all the time, as when they accumulate over batches")

    lines += ["", f"Longest T for {settings.batch} {unit} ({RESERVED_BYTES / GIB:g} GiB is left for the driver)"]
    lines.append(f"{'':44}{'plain':>12}{'fused':>12}")
    for fit in numbers.fits:
        lines.append(f"{fit.gpu:44}{_length(fit.plain, facts):>12}{_length(fit.fused, facts):>12}")
    if facts.max_length and any(facts.max_length in (fit.plain, fit.fused) for fit in numbers.fits):
        lines.append("* the model's own limit")
    return "\n".join(lines)


def _rows(rows: list[tuple[str, int]]) -> list[str]:
    return [f"{name:56}{_size(size):>12}" for name, size in rows]


def _size(num_bytes: int) -> str:
    """Return the size with its unit, in at least three digits for small models too."""
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
