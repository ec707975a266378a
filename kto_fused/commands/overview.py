"""``--help`` of the commands with many flags: the flags that most runs need, in groups, from the table of flags."""

import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from . import flag_table
from .arguments import ALIASES

WIDTH, COLUMN = 100, 31  # of a line at most, and of the flags
LINES = 118  # of the page
LENGTHS = (130, 100, 80, 65, 50, 45)  # characters of a flag's text; the first with which the page has LINES
GROUPS = {
    "model and data": (
        *("model", "data", "eval_data", "eval_fraction", "columns", "label_true", "label_false", "chat", "max_length"),
        *("dtype", "trust_remote_code", "dataset_num_proc"),
    ),
    "rounds": (
        *("judge", "rounds", "prompts", "samples", "max_new_tokens", "temperature", "threshold", "generator"),
        *("generation_batch_size", "reload_command", "max_kl"),
    ),
    "loss": (),  # and every flag of this package that no other group has
    "reference model": (
        "ref_model",
        "reference",
        "precompute_ref_log_probs",
        "precompute_ref_batch_size",
        "ref_cache_dir",
    ),
    "adapters and quantised weights": ("lora_rank", "lora_alpha", "lora_target_modules", "load_in_4bit"),
    "memory and speed": ("loss_from", "chunk_bytes", "backend", "packing", "pad_to_multiple_of", "disable_dropout"),
    "training": (),  # COMMON
    "saving and resuming": ("resume_anyway", "config"),
}
# the options of transformers' TrainingArguments that most runs need
COMMON = {
    "learning_rate": "initial learning rate",
    "per_device_train_batch_size": "sequences or pairs per device and batch",
    "gradient_accumulation_steps": "batches per optimizer step",
    "num_train_epochs": "passes over the data",
    "max_steps": "optimizer steps, instead of epochs",
    "lr_scheduler_type": "schedule of the learning rate: linear, cosine, constant, ...",
    "warmup_steps": "steps over which the learning rate rises; below 1, a fraction of all steps",
    "weight_decay": "weight decay of AdamW",
    "bf16": "compute in bfloat16 (where a GPU has it, on by default)",
    "gradient_checkpointing": "compute activations again in the backward pass, which saves memory",
    "seed": "random seed",
    "use_cpu": "train on the CPU even if there is a GPU",
    "eval_strategy": "when to evaluate: no, steps, epoch",
    "eval_steps": "steps between evaluations",
    "load_best_model_at_end": "save the best evaluated model, not the last",
    "logging_steps": "steps between logs",
    "report_to": "where to log too: tensorboard, wandb, ... or none",
}
SAVING = {
    "output_dir": "folder of the results",
    "save_strategy": "when to save a checkpoint: no, steps, epoch, best",
    "save_steps": "steps between checkpoints",
    "save_total_limit": "checkpoints to keep",
    "resume_from_checkpoint": "true, or the folder of a checkpoint, to continue a run",
}
TEXTS = COMMON | SAVING
VALUES = {"model": "MODEL", "data": "FILE", "eval_data": "FILE", "config": "FILE", "output_dir": "DIR"}


def text(key: str, command: str, description: str) -> str:
    """Return the help of a command, whose flags the table lists under ``key``."""
    pages = (_page(key, command, description, length) for length in LENGTHS)
    return next((page for page in pages if page.count("\n") <= LINES), _page(key, command, description, LENGTHS[-1]))


def _page(key: str, command: str, description: str, length: int) -> str:
    flags = [flag for flag in flag_table.flags_of(key) if "type" in flag]
    # the table knows more of a flag than the source text of another version of transformers
    of_table = {flag["name"]: flag for flag in flag_table.listed(key) if "type" in flag}
    by_name = {flag["name"]: of_table.get(flag["name"], flag) for flag in flags}
    width = min(WIDTH, shutil.get_terminal_size().columns)
    required = " ".join(f"--{flag['name']} {_value(flag)}" for flag in flags if flag.get("required"))
    lines = [f"usage: kto-fused {command} {required} [FLAGS]".replace("  ", " "), ""]
    lines += [*textwrap.wrap(description, width), ""]
    for title, names in _groups(flags):
        held = [by_name[name] for name in names if name in by_name]
        if held:
            lines += [f"{title}:", *(line for flag in held for line in _described(flag, width, length)), ""]
    count = sum(bool(flag.get("inherited")) and flag["name"] not in TEXTS for flag in flags)
    if count:
        lines += textwrap.wrap(
            f"In brackets: the default. --help-all describes every flag in full, with {count} more of transformers' "
            "TrainingArguments. A flag can also be a line of the file of --config; a flag overrides the file.",
            width,
        )
    else:
        lines += ["In brackets: the default. --help-all describes the flags in full."]
    return "\n".join(lines) + "\n"


def _groups(flags: list[dict[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    own = [flag["name"] for flag in flags if not flag.get("inherited")]
    if len(own) == len(flags):  # a command that does not train by transformers' options
        yield "options", own
        return
    elsewhere = {name for names in GROUPS.values() for name in names}
    rest = sorted((name for name in own if name not in elsewhere), key=lambda name: not name.startswith("loss"))
    more = {"loss": rest, "training": [*COMMON], "saving and resuming": [*SAVING]}
    for title, names in GROUPS.items():
        yield title, [*more.get(title, ()), *names]


def _described(flag: dict[str, Any], width: int, length: int) -> Iterator[str]:
    alias = next((alias for alias, name in ALIASES.items() if name == flag["name"]), None)
    names = f"  --{flag['name']}" if flag["type"] == "bool" else f"  --{flag['name']} {_value(flag)}"
    words = TEXTS.get(flag["name"]) or flag.get("help", "")
    default = flag.get("default")
    end = "" if default in (None, False, "", -1) else f" ({default})"
    if flag.get("choices") and len(flag["choices"]) <= 4 and flag["name"] not in TEXTS:
        end = f" ({', '.join(f'{choice} by default' if choice == default else choice for choice in flag['choices'])})"
    words = textwrap.shorten(words, max(20, length - len(end)), placeholder=" ...") + end
    if alias is not None and (flag.get("inherited") or alias == "model_name_or_path"):
        words = f"or --{alias}: {words}"
    wrapped = textwrap.wrap(words, width - COLUMN) or [""]
    if len(names) > COLUMN - 2:
        yield names
    else:
        yield f"{names:{COLUMN}}{wrapped.pop(0)}"
    yield from (" " * COLUMN + line for line in wrapped)


def _value(flag: dict[str, Any]) -> str:
    word = {"int": "N", "float": "X", "mapping": "JSON"}.get(flag["type"])
    word = word or VALUES.get(flag["name"], "TEXT")
    return f"{word} ..." if flag.get("nargs") in ("+", "*") else word
