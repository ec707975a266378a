"""What a run leaves behind: the table at its end, the model with its card, ``metrics.json``, ``curves.png`` and
``report.html``.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..trainers import FusedTrainer, cards, held_out, ranks
from . import report, samples
from .progress import COLUMNS, REWARDS

DRAFT = "results.part"  # results are written into this folder before they move into the output folder
COLORS = {"rewards/chosen": "tab:green", "rewards/rejected": "tab:red", "rewards/margins": "tab:blue"}


def print_summary(metrics: dict[str, Any]) -> None:
    """Print the first and the last step and evaluation side by side, the speed, and what became of the data."""
    steps, evaluations = metrics["steps"], metrics["evaluations"]
    columns = [("", entry) for entry in steps[:1] + steps[-1:]]  # none where a finished run had logged no step
    if evaluations:
        columns += [("eval_", evaluations[0]), ("eval_", evaluations[-1])]
    titles = [("eval, " if prefix else "") + f"step {entry['step']}" for prefix, entry in columns]
    print(f"\n{'':20}" + " ".join(f"{title:>15}" for title in titles))
    for name in (*COLUMNS, "mean_token_accuracy", "entropy"):
        values = [entry.get(prefix + name) for prefix, entry in columns]
        if any(value is not None for value in values):
            cells = (f"{'-':>15}" if value is None else f"{value:15.4f}" for value in values)
            print(f"{name:20}" + " ".join(cells))
    tokens = f"{steps[-1]['num_tokens']} tokens, " if steps else ""
    print(f"\n{tokens}{metrics['seconds']:.1f} s, {metrics['samples_per_second']:.1f} examples per second")
    for name, count in metrics["data"].items():
        reasons = ", ".join(f"{reason} {number}" for reason, number in count["dropped_for"].items())
        print(
            f"{name} data: {count['examples']} examples used, {count['truncated']} of them with a completion cut to "
            f"--max_length; {count['dropped']} dropped" + (f" ({reasons})" if reasons else "")
        )
        if count["found"]:
            found = ", ".join(f"{finding} {number}" for finding, number in count["found"].items())
            print(f"{name} data: examples that a warning was given about: {found}")
    print_end(metrics)


def print_end(metrics: dict[str, Any]) -> None:
    """Print the samples, the sentence on held-out data or on the judge's scores, and what the saved model is."""
    if metrics.get("samples"):
        print("\n" + "\n".join(samples.lines(metrics["samples"])))
    if (told := held_out.sentence(metrics)) is not None:
        print(f"\n{told}")
    if (model := metrics.get("model")) is not None:
        code = [f"    {line}" for line in held_out.loading_lines(model)]
        print("\n" + "\n".join([*held_out.model_lines(model), "To load it:", *code]))


def plot(metrics: dict[str, Any], path: Path) -> None:
    """Write a picture of the loss, and of the rewards or else the tokens' accuracy, over the steps.

    Lines are training steps, dots on dashed lines are evaluations.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, reward_axes = figure.subplots(1, 2)

    def draw(axes: Any, name: str, color: str, label: str | None = None) -> None:
        report.draw_curve(axes, metrics["steps"], name, label, color=color)
        report.draw_evaluations(axes, metrics["evaluations"], name, color=color)

    draw(loss_axes, "loss", "black")
    loss_axes.set(title="loss", xlabel="step")
    names = {name for entry in metrics["steps"] for name in entry}
    if names.isdisjoint(COLORS) and "mean_token_accuracy" in names:
        draw(reward_axes, "mean_token_accuracy", "black")
        reward_axes.set(title="tokens predicted as most likely", xlabel="step")
    else:
        for name, color in COLORS.items():
            draw(reward_axes, name, color, REWARDS[name])
        unit = "nats x beta" if any(name.startswith("logps/") for name in names) else "scores"
        reward_axes.set(title=f"rewards ({unit})", xlabel="step")
        if reward_axes.get_legend_handles_labels()[0]:
            reward_axes.legend()
    if metrics["evaluations"]:
        figure.supxlabel("dots: evaluation data", fontsize="small")
    figure.savefig(path, dpi=120, format="png")


def saved_model_note(trainer: FusedTrainer) -> str:
    """Return where the trained weights are if the results cannot be written; empty if they are in no checkpoint."""
    checkpoint = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
    if not checkpoint.is_dir():
        return ""
    return f" (the trained model is in {checkpoint}: free space, then --resume_from_checkpoint true writes the results)"


def write_all(trainer: FusedTrainer, metrics: dict[str, Any]) -> None:
    """Write the model, its tokenizer and card, and the files of ``write``: all of them or none.

    All processes call it, because all take part in saving a sharded model. An error of one is raised on all; under
    DeepSpeed, whose processes wait for one another while they save, one that fails there ends alone.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    draft = folder / DRAFT

    def save() -> list:
        trainer.save_model(str(draft), _internal_call=True)  # no upload yet: one that fails must not lose the results
        return []

    def finish() -> None:
        write_files(draft, metrics, folder.name)
        cards.write(trainer, draft)
        drafts.close()

    with ExitStack() as drafts:  # the first process alone enters one
        ranks.on_first(args, lambda: drafts.enter_context(draft_of(folder)))
        if trainer.is_deepspeed_enabled:
            save()
        else:
            ranks.shared(args, save)
        ranks.on_first(args, finish)


def write_again(trainer: FusedTrainer, metrics: dict[str, Any]) -> None:
    """Write the files of ``write`` and the model card anew, beside the model of ``write_all``: all or none."""
    folder = Path(trainer.args.output_dir)
    with draft_of(folder) as draft:
        write_files(draft, metrics, folder.name)
        cards.write(trainer, draft)


def write(folder: str | Path, metrics: dict[str, Any]) -> None:
    """Write ``metrics.json``, ``curves.png`` and ``report.html`` into ``folder``: all or none."""
    with draft_of(Path(folder)) as draft:
        write_files(draft, metrics, Path(folder).name)


def write_files(draft: Path, metrics: dict[str, Any], title: str) -> None:
    write_json(draft / "metrics.json", metrics)
    plot(metrics, draft / "curves.png")
    report.write(draft / "report.html", metrics, title)


def write_json(path: Path, metrics: dict[str, Any]) -> None:
    text = json.dumps(_finite(metrics), indent=1, default=str, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


@contextmanager
def draft_of(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder inside ``folder``. Its files move into ``folder`` at the end; an error removes them."""
    draft = folder / DRAFT
    shutil.rmtree(draft, ignore_errors=True)  # a run that was killed may have left it
    draft.mkdir(parents=True)
    try:
        yield draft
        for path in sorted(draft.iterdir()):
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _finite(value: Any) -> Any:
    """Return the value with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
