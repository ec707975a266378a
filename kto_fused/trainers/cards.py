"""Model cards: ``README.md`` beside a trained model says what it was trained from and on, how, and what came of it.

A card names files and folders without the folders around them, and shows no record of the data.
"""

import os
import shlex
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import TrainingArguments

from . import held_out, runs

if TYPE_CHECKING:
    from .base import FusedTrainer

NAME = "README.md"
# options that a card always shows; of the others those that a run's curve depends on, where they are not the default
SHOWN = (
    *("loss_type", "learning_rate", "lr_scheduler_type", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "num_train_epochs", "max_steps", "max_length", "seed"),
)
# nested options, and those that another row shows
LEFT_OUT = ("accelerator_config", "fsdp_config", "parallelism_config", "deepspeed", "ref_model")
# settings of the command that a card shows where they are given; the weights' dtype always
OF_THE_COMMAND = ("dtype", "load_in_4bit", "ref_model", "eval_fraction")
PACKAGES = ("kto-fused", "torch", "transformers", "datasets", "peft")
NO_FIGURES = ("_runtime", "_per_second", "_preparation_time")


def write(trainer: "FusedTrainer", folder: Path, *, title: str | None = None, **head: Any) -> None:
    """Write the card of a trainer's model into ``folder``.

    Args:
        trainer: whose ``facts`` take the place of what it knows itself.
        folder: where the model is, or will be moved from.
        title: the folder's name if not given.
        head: more entries of the card's head, as ``ModelCardData`` takes them.
    """
    history, args = trainer.state.log_history, trainer.args
    facts = {
        "model": held_out.saved_model(trainer),
        "data": trainer.data_counts,
        "steps": [entry for entry in history if "loss" in entry],
        "evaluations": [entry for entry in history if "eval_loss" in entry],
        "config": {"loss_type": args.loss_type},
        **trainer.facts,
    }
    if not trainer.facts and Path(folder).resolve() != Path(args.output_dir).resolve():  # a checkpoint
        facts["model"] |= {"folder": str(folder), "step": trainer.state.global_step, "is_best": False, "best": None}
    where = getattr(trainer, "hub_model_id", None) if args.push_to_hub else None
    options = options_of(args) | {"max_length": trainer.max_length, "processes": args.world_size}
    (folder / NAME).write_text(card(facts, options, title=title, where=where, **head), encoding="utf-8")


def card(
    facts: dict[str, Any], options: dict[str, Any], *, title: str | None = None, where: str | None = None, **head: Any
) -> str:
    """Return a card's text.

    Args:
        facts: of the run, under the names of ``metrics.json``.
        options: of the trainer.
        title: the model's name; the folder's name if None.
        where: what the lines of Python load; the model's folder if None.
        head: more entries of the card's head.
    """
    model = facts["model"]
    start, is_adapter = model["start"], model["kind"] == "adapter"
    losses = options["loss_type"] if isinstance(options["loss_type"], list) else [options["loss_type"]]
    tags = ["kto-fused", *(name for name in losses if name.isidentifier()), *(["lora"] if is_adapter else [])]
    entries = {
        "base_model": None if start is None or _is_local(start) else start,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-classification" if model["scores"] else "text-generation",
        **head,
        "tags": sorted({*tags, *_listed(head.get("tags"))}),
    }
    parts = [
        f"---\n{ModelCardData(**entries).to_yaml()}\n---\n",
        f"# {title or Path(model['folder']).resolve().name}\n",
        _opening(model, losses),
    ]
    if (told := held_out.sentence(facts)) is not None:
        parts.append(f"**{told[0].upper()}{told[1:]}.**\n")
    loaded = where or (Path(model["folder"]).name if os.path.isabs(model["folder"]) else model["folder"])
    parts += ["## Use\n", "```python", *held_out.loading_lines({**model, "folder": loaded}), "```\n"]
    parts += _data(facts)
    parts += _figures(facts)
    settings = facts.get("settings", {})
    given = {name: settings[name] for name in OF_THE_COMMAND if settings.get(name)}
    if "ref_model" in given:
        given["ref_model"] = name_of(given["ref_model"])
    rows = [(name, _shown(value)) for name, value in {**options, **given}.items()]
    rows += [(f"adapter: {name}", _shown(value)) for name, value in model.get("adapter", {}).items()]
    parts += ["## Settings\n", *_table(("option", "value"), rows)]
    rows = [(name, found) for name in PACKAGES if (found := _version(name)) is not None]
    parts += ["## Versions\n", *_table(("package", "version"), rows)]
    return str(ModelCard("\n".join(parts), ignore_metadata_errors=True))


def upload_by_hand(trainer: "FusedTrainer") -> str:
    """Return the command that uploads the output folder as ``push_to_hub`` does, without checkpoints."""
    args = trainer.args
    name = getattr(trainer, "hub_model_id", None) or args.hub_model_id or Path(args.output_dir).resolve().name
    words = ["hf", "upload", name, args.output_dir, ".", "--exclude", "checkpoint-*"]
    return shlex.join(words + ["--private"] * bool(args.hub_private_repo))


def options_of(args: TrainingArguments) -> dict[str, Any]:
    """Return the options of a trainer that a card shows."""
    values, found = args.to_dict(), {}
    for option in fields(args):
        name, value = option.name, values.get(option.name)
        is_other_end = name == ("num_train_epochs" if args.max_steps > 0 else "max_steps")
        if name in LEFT_OUT or value is None or is_other_end:
            continue
        is_set = name not in runs.CURVE_NEUTRAL and value != runs.default_of(option)
        if name in SHOWN or is_set:
            found[name] = name_of(value) if isinstance(value, str) else value  # a value model's folder
    return found


def _opening(model: dict[str, Any], losses: list[str]) -> str:
    kind = "An adapter of" if model["kind"] == "adapter" else "All weights of"
    start = "a model that was made in memory" if model["start"] is None else f"`{name_of(model['start'])}`"
    unit = "round" if "round" in model else "step"
    ended = f"{unit} {model[unit]}" + (", the best one by evaluation" if model.get("is_best") else "")
    text = f"{kind} {start}, trained by `{model['trainer']}` of kto-fused with the loss {' + '.join(losses)}, {ended}."
    if model["kind"] == "adapter" and model["start"] is not None and _is_local(model["start"]):
        text += " The base was a local folder; `adapter_config.json` says where."
    return text + "\n"


def _data(facts: dict[str, Any]) -> list[str]:
    settings, rows = facts.get("settings", {}), []
    for name, count in facts.get("data", {}).items():
        given = settings.get("data" if name.startswith("train") else "eval_data") or settings.get("data")
        named = ", ".join(map(name_of, given)) if given else "-"
        rows.append((name, named, count["examples"], count["truncated"], count["dropped"]))
    if not rows:
        return []
    return ["## Data\n", *_table(("part", "from", "examples", "cut to max_length", "dropped"), rows)]


def _figures(facts: dict[str, Any]) -> list[str]:
    """Return tables of the figures of the first and the saved model's evaluation, and of the first and last log."""
    evaluations, steps, step = facts.get("evaluations") or [], facts.get("steps") or [], facts["model"].get("step")
    of_model = [entry for entry in evaluations if entry["step"] == step] or evaluations
    parts = []
    for title, columns in (("Held-out", [*evaluations[:1], *of_model[-1:]]), ("Training", [*steps[:1], *steps[-1:]])):
        columns = columns[-1:] if columns[0:1] == columns[1:] else columns  # there may be one alone
        names = [name for name, value in columns[-1].items() if _is_figure(name, value)] if columns else []
        rows = [(name.removeprefix("eval_"), *(_shown(entry.get(name, "-")) for entry in columns)) for name in names]
        if rows:
            titles = [f"step {entry['step']}" for entry in columns]
            parts += [f"## {title} figures\n", *_table(("", *titles), rows)]
    rounds = facts.get("rounds") or []
    names = list(dict.fromkeys(name for entry in rounds for name, value in entry.items() if _is_figure(name, value)))
    if rounds:
        rows = [(name, *(_shown(entry.get(name, "-")) for entry in rounds)) for name in names if name != "round"]
        parts += ["## Rounds\n", *_table(("", *(str(entry["round"]) for entry in rounds)), rows)]
    return parts


def _is_figure(name: str, value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and name not in ("step", "epoch") and not name.endswith(NO_FIGURES)


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines] + [""]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _listed(tags: str | list[str] | None) -> list[str]:
    return [tags] if isinstance(tags, str) else list(tags or [])


def _is_local(name: str) -> bool:
    return os.path.exists(name) or os.path.isabs(name) or name.startswith((".", "~"))


def name_of(name: str) -> str:
    """Return a file's or folder's name without the folders around it; an id of the Hub whole."""
    is_file = _is_local(name) or name.count("/") > 1 or any(one in name for one in "*?\\=")
    return Path(name).name if is_file else name


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
