"""``kto-fused demo``: KTO on a small language model and real text, then the same steps through the plain reference."""

import copy
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from . import backends, feedback, measure, reference
from .feedback import Batch, Example, Tokens
from .functional import (
    fused_kto_loss,
    fused_linear_kto_loss,
    kto_class_weights,
    kto_reference_point,
    linear_sequence_logps,
    sequence_logps,
)

VOCAB_SIZE = 4096
MAX_LENGTH = 512
WARMUP_STEPS = 80
WARMUP_BATCH = 16
COMPARED_STEPS = 5
LEARNING_RATE = 5e-5
REPORTED = {
    "loss": "loss",
    "rewards/chosen": "desirable",
    "rewards/rejected": "undesirable",
    "rewards/margins": "margin",
    "kl": "z0",
}


class DemoError(Exception):
    """Settings that cannot be run; the message is one sentence for the user."""


@dataclass(frozen=True)
class Settings:
    data: Path = feedback.BUNDLED
    model: str | None = None
    loss_from: str = "hidden"
    steps: int = 40
    batch_size: int = 16
    beta: float = 0.1
    seed: int = 0
    device: str | None = None
    backend: str | None = None
    out: Path = Path("runs/demo")


@dataclass(frozen=True)
class LossPath:
    """The functions a training step calls: the fused ones, or their plain twins; from logits or hidden states."""

    name: str
    loss_from: str
    kto_loss: Callable
    sequence_logps: Callable
    options: dict


def fused_path(settings: Settings) -> LossPath:
    functions = {"logits": (fused_kto_loss, sequence_logps), "hidden": (fused_linear_kto_loss, linear_sequence_logps)}
    return LossPath("fused", settings.loss_from, *functions[settings.loss_from], {"backend": settings.backend})


def plain_path(settings: Settings) -> LossPath:
    functions = {
        "logits": (reference.kto_loss, reference.sequence_logps),
        "hidden": (reference.linear_kto_loss, reference.linear_sequence_logps),
    }
    return LossPath("reference", settings.loss_from, *functions[settings.loss_from], {})


def run(settings: Settings) -> dict:
    """Train, compare, and write ``metrics.json`` and ``curves.png`` under ``settings.out``. Returns the metrics.

    Raises ``DemoError`` or ``feedback.FeedbackError`` before anything is trained or written, and ``DemoError`` if the
    results then do not fit on the disk.
    """
    device = check(settings)
    examples = feedback.read(settings.data)
    if settings.batch_size > len(examples):
        raise DemoError(f"--batch-size {settings.batch_size} is more than the {len(examples)} examples")
    plot = curve_plotter()
    torch.manual_seed(settings.seed)
    tokenizer, model = load(settings.model, examples)
    model.to(device)
    max_length = min(MAX_LENGTH, getattr(model.config, "max_position_embeddings", MAX_LENGTH))
    tokens = feedback.tokenize(examples, tokenizer, max_length)
    if settings.loss_from == "hidden":
        check_lm_head(model, feedback.collate(tokens[:1], device))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{len(examples)} examples, {parameters / 1e6:.1f}M parameters, vocabulary {model.config.vocab_size}, {device}"
    )

    make_out(settings.out)
    if settings.model is None:
        warm_up(model, tokens, settings.seed, device)
    ref = copy.deepcopy(model).eval().requires_grad_(False)
    path = fused_path(settings)
    curves = train(model, ref, tokens, settings, path, device)
    comparison = compare(ref, tokens, settings, path, device)
    metrics = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()},
        "torch": torch.__version__,
        "device": str(device),
        "backend": backends.resolve(settings.backend, device),
        "steps": curves,
        "comparison": comparison,
    }
    write(settings.out, metrics, plot)
    return metrics


def check(settings: Settings) -> torch.device:
    """The device to run on, if the settings can be run at all."""
    if settings.batch_size < 2:
        raise DemoError(f"--batch-size must be at least 2, to mismatch prompts; got {settings.batch_size}")
    if settings.steps < 1:
        raise DemoError(f"--steps must be at least 1, got {settings.steps}")
    if not 0 < settings.beta < math.inf:
        raise DemoError(f"--beta must be a finite number > 0, got {settings.beta}")
    if not 0 <= settings.seed < 2**63:
        raise DemoError(f"--seed must lie in [0, 2^63), got {settings.seed}")
    name = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        backends.resolve(settings.backend, device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise DemoError(f"--device {name}, --backend {settings.backend}: {str(error).splitlines()[0]}") from error
    return device


def make_out(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise DemoError(f"--out {out} cannot be written: {error.strerror}") from error


def load(name: str | None, examples: Sequence[Example]) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """A Hugging Face checkpoint, or a tokenizer trained on the examples and a small new Llama."""
    if name is not None:
        try:
            return AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise DemoError(f"--model {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((f"{example.prompt}\n{example.completion}" for example in examples), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer, LlamaForCausalLM(config)


def hidden_states(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    return model.base_model(batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state


def check_lm_head(model: PreTrainedModel, batch: Batch) -> None:
    """Refuse a model that does more to its hidden states than multiply them with the LM head."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
        is_linear = isinstance(head, torch.nn.Linear)
        if not is_linear or not torch.allclose(head(hidden_states(model, batch)), logits, rtol=1e-3, atol=1e-3):
            raise DemoError(f"{type(model).__name__} scales or caps its logits: train it with --from logits")


def batches(tokens: Sequence[Tokens], size: int, steps: int, seed: int) -> list[list[Tokens]]:
    """``steps`` batches, epoch after epoch in an order that the seed fixes."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * size:
        order += torch.randperm(len(tokens), generator=generator).tolist()
    return [[tokens[i] for i in order[step * size : (step + 1) * size]] for step in range(steps)]


def warm_up(model: PreTrainedModel, tokens: Sequence[Tokens], seed: int, device: torch.device) -> None:
    """A short supervised start, so that there is a policy to prefer by."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    progress = tqdm(batches(tokens, min(WARMUP_BATCH, len(tokens)), WARMUP_STEPS, seed), desc="warm-up", leave=False)
    for examples in progress:
        batch = feedback.collate(examples, device)
        loss = model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def kto_step(
    policy: PreTrainedModel,
    ref: PreTrainedModel,
    examples: Sequence[Tokens],
    settings: Settings,
    weights: tuple[float, float],
    path: LossPath,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """One KTO forward and backward with the paper's reference point; gradients are left in the policy."""
    batch = feedback.collate(examples, device)
    mismatched = feedback.collate(feedback.mismatch(examples), device)

    def inputs(model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
        """What a model gives to the loss, by the names of the policy's and the reference's arguments."""
        if path.loss_from == "logits":
            return {"logits": model(batch.input_ids, attention_mask=batch.attention_mask).logits}
        head = model.get_output_embeddings()
        return {"hidden": hidden_states(model, batch), "lm_head_weight": head.weight, "lm_head_bias": head.bias}

    with torch.no_grad():
        policy_kl, ref_kl = (
            path.sequence_logps(**inputs(model, mismatched), labels=mismatched.labels, **path.options)
            for model in (policy, ref)
        )
        ref_inputs = {f"ref_{name}": value for name, value in inputs(ref, batch).items()}
    policy_inputs = inputs(policy, batch)
    if path.loss_from == "logits":
        policy_inputs = {"policy_logits": policy_inputs["logits"], "inplace_backward": True}
    loss, metrics = path.kto_loss(
        **policy_inputs,
        **ref_inputs,
        labels=batch.labels,
        desirable=batch.desirable,
        reference_point=kto_reference_point(policy_kl, ref_kl),
        beta=settings.beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        **path.options,
    )
    loss.backward()
    return {"loss": loss.detach(), **metrics.summary()}


def class_weights(tokens: Sequence[Tokens]) -> tuple[float, float]:
    n_desirable = sum(example.label for example in tokens)
    return kto_class_weights(n_desirable, len(tokens) - n_desirable)


def train(
    model: PreTrainedModel,
    ref: PreTrainedModel,
    tokens: Sequence[Tokens],
    settings: Settings,
    path: LossPath,
    device: torch.device,
) -> list[dict[str, float]]:
    """KTO for ``settings.steps``; a line of metrics per step is returned, some are printed."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    weights = class_weights(tokens)
    curves = []
    print("step " + " ".join(f"{title:>12}" for title in REPORTED.values()))
    progress = tqdm(batches(tokens, settings.batch_size, settings.steps, settings.seed), desc="KTO", leave=False)
    for step, examples in enumerate(progress, 1):
        metrics = kto_step(model, ref, examples, settings, weights, path, device)
        optimizer.step()
        optimizer.zero_grad()
        curves.append({name: value.item() for name, value in metrics.items()})
        if step == 1 or step == settings.steps or step % max(1, settings.steps // 10) == 0:
            progress.write(f"{step:4d} " + " ".join(f"{curves[-1][name]:12.4f}" for name in REPORTED))
    return curves


def compare(
    ref: PreTrainedModel, tokens: Sequence[Tokens], settings: Settings, fused: LossPath, device: torch.device
) -> dict:
    """The first steps again from the reference model's weights, through plain PyTorch and through the fused path."""
    plain = plain_path(settings)
    steps = batches(tokens, settings.batch_size, settings.steps, settings.seed)[:COMPARED_STEPS]
    weights = class_weights(tokens)
    runs = {}
    for path in (plain, fused):
        model = copy.deepcopy(ref).requires_grad_(True).train()
        torch.manual_seed(settings.seed)  # dropout, where the model has it, drops the same
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        losses, gradients, times = [], [], []
        for examples in tqdm(steps, desc=path.name, leave=False):

            def step(model=model, examples=examples, path=path, losses=losses) -> None:
                losses.append(kto_step(model, ref, examples, settings, weights, path, device)["loss"])

            times.append(measure.seconds(step, device))
            gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
            optimizer.step()
            optimizer.zero_grad()
        peak = measure.peak_bytes(step, device)
        runs[path.name] = {"losses": losses[: len(steps)], "gradients": gradients, "times": times, "peak": peak}

    names = (plain.name, fused.name)
    pairs = list(zip(*(runs[name]["gradients"] for name in names), strict=True))
    result = {
        "steps": len(steps),
        "largest_loss_difference": max(
            abs(a.item() - b.item()) for a, b in zip(*(runs[name]["losses"] for name in names), strict=True)
        ),
        "largest_gradient_difference": max((a - b).abs().max().item() for a, b in pairs),
        "largest_gradient": max(a.abs().max().item() for a, _ in pairs),
        "milliseconds_per_step": {name: sorted(runs[name]["times"])[len(steps) // 2] * 1e3 for name in names},
        "peak_mebibytes": {name: runs[name]["peak"] / 2**20 for name in names},
    }
    print_comparison(result, names)
    return result


def print_comparison(result: dict, names: Sequence[str]) -> None:
    print(f"\nThe first {result['steps']} steps again, from the same weights:")
    print(f"{'':34}" + "".join(f"{name:>12}" for name in names))
    titles = {"milliseconds_per_step": "time per step, median (ms)", "peak_mebibytes": "peak memory of a step (MiB)"}
    for key, title in titles.items():
        print(f"{title:34}" + "".join(f"{result[key][name]:12.1f}" for name in names))
    print(f"{'largest difference in loss':34}{result['largest_loss_difference']:24.1e}")
    print(f"{'largest difference in a gradient':34}{result['largest_gradient_difference']:24.1e}")
    print(f"{'largest gradient':34}{result['largest_gradient']:24.1e}")


def curve_plotter() -> Callable[[list[dict[str, float]], Path], None]:
    """Matplotlib, found before the work starts."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DemoError("the curves need matplotlib: pip install 'kto-fused[demo]'") from error

    def plot(curves: list[dict[str, float]], path: Path) -> None:
        figure = Figure(figsize=(10, 4), layout="constrained")
        FigureCanvasAgg(figure)
        loss_axes, reward_axes = figure.subplots(1, 2)
        steps = range(1, len(curves) + 1)
        loss_axes.plot(steps, [step["loss"] for step in curves], color="black")
        loss_axes.set(title="KTO loss", xlabel="step")
        colors = {"rewards/chosen": "tab:green", "rewards/rejected": "tab:red", "rewards/margins": "tab:blue"}
        for name, color in colors.items():
            reward_axes.plot(steps, [step[name] for step in curves], color=color, label=REPORTED[name])
        reward_axes.set(title="rewards (nats x beta)", xlabel="step")
        reward_axes.legend()
        figure.savefig(path, dpi=120, format="png")

    return plot


def write(out: Path, metrics: dict, plot: Callable) -> None:
    """Both files or neither: written beside their place, then moved there."""
    try:
        with tempfile.TemporaryDirectory(dir=out) as scratch:
            draft = Path(scratch)
            (draft / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
            plot(metrics["steps"], draft / "curves.png")
            for name in ("metrics.json", "curves.png"):
                os.replace(draft / name, out / name)
    except OSError as error:
        raise DemoError(f"--out {out}: the results cannot be written: {error.strerror}") from error
    print(f"\nWrote {out / 'metrics.json'} and {out / 'curves.png'}")
