"""``report.html``: one self-contained page on a run, with curves, samples, data, times and settings."""

import base64
import html
import io
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..trainers import held_out

Entries = list[dict[str, Any]]

# title: the logged names that are drawn together, and their labels
BY_STEP = {
    "loss": {"loss": ""},
    "rewards": {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
    "margin of rewards": {"rewards/margins": ""},
    "accuracy of rewards": {"rewards/accuracies": "accuracy", "rewards/auc": "AUC"},
    "z0 or KL, nats": {"kl": ""},
    "log-probabilities, nats": {"logps/chosen": "chosen", "logps/rejected": "rejected"},
    "share of tokens predicted as most likely": {"mean_token_accuracy": ""},
    "entropy, nats per token": {"entropy": ""},
    "learning rate": {"learning_rate": ""},
    "gradient norm": {"grad_norm": ""},
}
BY_ROUND = {
    "score of the samples": {"score": "mean", "best_score": "best of a prompt"},
    "win rate against the last round": {"win_rate": ""},
    "KL divergence, nats per sample": {"kl": "of the round", "kl_reference": "to the reference"},
    "explained variance": {"explained_variance": ""},
    "tokens per sample": {"mean_length": ""},
}
# logged names that are no curves
NO_CURVES = {"epoch", "step", "round", "num_tokens", "runtime", "samples_per_second", "steps_per_second"}
NO_CURVES |= {"logits/chosen", "logits/rejected"}
STYLES = ("-", "--", ":")
COLORS = ("#1f6fb4", "#c8452f", "#2f9157", "#8457b0", "#b8860b", "#4a4a4a")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin: 2em 0 .5em; border-bottom: 1px solid #ddd }
.held-out { font-size: 1.2em; background: #eef5ee; border-left: 4px solid #2f9157; padding: .6em 1em }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 8px }
.curves img { width: 100% }
table { border-collapse: collapse; margin: .5em 0 } td, th { padding: .2em .8em; text-align: left; vertical-align: top }
td { border-top: 1px solid #eee } td.number { text-align: right; font-variant-numeric: tabular-nums }
.samples td { width: 33%; white-space: pre-wrap } pre { background: #f5f5f5; padding: .8em; overflow-x: auto }
"""


# ---- curves -------------------------------------------------------------------------------------------------------


def points(entries: Entries, name: str, unit: str = "step") -> list[tuple[float, float]]:
    """Return the (step, value) of the entries that have the name."""
    found = []
    for entry in entries:
        value = entry.get(name)
        if isinstance(value, (int, float)):
            found.append((entry[unit], value))
    return found


def draw_curve(
    axes: Any, entries: Entries, name: str, label: str | None = None, *, unit: str = "step", **style: Any
) -> None:
    """Draw a training curve. A last log of fewer steps is a noisier mean: a cross that no line joins."""
    curve = points(entries, name, unit)
    gaps = sorted(after[0] - before[0] for before, after in itertools.pairwise(curve))
    is_short = len(gaps) > 1 and curve[-1][0] - curve[-2][0] < gaps[len(gaps) // 2]
    joined = curve[:-1] if is_short else curve
    if joined:
        marker = "o" if len(joined) == 1 or unit == "round" else ""
        axes.plot(*zip(*joined, strict=True), label=label or None, marker=marker, markersize=4, **style)
    if is_short:
        axes.plot(*curve[-1], "x", color=style.get("color"), markersize=4)


def draw_evaluations(axes: Any, entries: Entries, name: str, label: str | None = None, **style: Any) -> None:
    """Draw an evaluation's values as dots that a line joins."""
    curve = points(entries, f"eval_{name}")
    if curve:
        style = {"linestyle": "--", "linewidth": 1, **style}
        axes.plot(*zip(*curve, strict=True), marker="o", markersize=4, label=label or None, **style)


def figures(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Return the curves of the runs as SVG pictures, of those names that a run has logged."""
    pictures = []
    for unit, key, panels in (("round", "rounds", BY_ROUND), ("step", "steps", BY_STEP)):
        known = {name for names in panels.values() for name in names} | NO_CURVES
        if unit == "step":
            others = {name for run in runs.values() for entry in run.get(key, []) for name in entry} - known
            panels = {**panels, **{name: {name: ""} for name in sorted(others)}}
        pictures += [picture for title, names in panels.items() if (picture := _panel(runs, title, names, unit, key))]
    return pictures


def _panel(runs: dict[str, dict[str, Any]], title: str, names: dict[str, str], unit: str, key: str) -> str | None:
    figure = Figure(figsize=(4.6, 3), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    is_one = len(runs) == 1
    for run_number, (run, metrics) in enumerate(runs.items()):
        for number, (name, label) in enumerate(names.items()):
            color = COLORS[(number if is_one else run_number) % len(COLORS)]
            style = "-" if is_one else STYLES[number % len(STYLES)]
            text = label if is_one else f"{run} {label}".strip()
            entries, evaluations = metrics.get(key, []), metrics.get("evaluations", []) if unit == "step" else []
            has_curve = bool(points(entries, name, unit))
            draw_curve(axes, entries, name, text, unit=unit, color=color, linestyle=style)
            of_evaluation = f"{text} evaluation".strip() if is_one or not has_curve else None
            draw_evaluations(axes, evaluations, name, of_evaluation, color=color, alpha=0.8)
    if not axes.lines:
        return None
    if is_one and unit == "step":  # a round has data, and often a reference, of its own
        steps = next(iter(runs.values())).get(key, [])
        for before, after in itertools.pairwise(steps):
            if before.get("round") != after.get("round"):
                axes.axvline((before["step"] + after["step"]) / 2, color="#bbb", linewidth=0.8, zorder=0)
    label_axes(axes, title, unit)
    return _svg(figure)


def label_axes(axes: Any, title: str, unit: str) -> None:
    """Give a finished panel its title, its axis of steps or rounds, and a legend where a line has a name."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7.5)


def _svg(figure: Figure) -> str:
    file = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kto-fused"}):  # text stays text, and ids the same
        figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


# ---- the page -----------------------------------------------------------------------------------------------------


def write(path: Path, metrics: dict[str, Any], title: str) -> None:
    """Write the page on one run, from the contents of its ``metrics.json``."""
    parts = []
    if (told := held_out.sentence(metrics)) is not None:
        parts.append(f'<p class="held-out">{text_of(told[0].upper() + told[1:])}.</p>')
    if (model := metrics.get("model")) is not None:
        parts += [f"<p>{text_of(line)}</p>" for line in held_out.model_lines(model)]
        parts.append(f"<pre>{text_of(chr(10).join(held_out.loading_lines(model)))}</pre>")
    parts.append(curves({title: metrics}))
    if metrics.get("samples"):
        parts += ["<h2>Samples</h2>", _samples(metrics["samples"])]
    if metrics.get("data"):
        parts += ["<h2>Data</h2>", _data(metrics["data"])]
    parts += ["<h2>Time and memory</h2>", table(_costs(metrics))]
    for name in ("settings", "config"):
        if name in metrics:
            parts.append(f"<h2>{'Settings of the command' if name == 'settings' else 'Options of the trainer'}</h2>")
            parts.append(f"<details><summary>show</summary>{table(metrics[name].items())}</details>")
    path.write_text(page(title, parts), encoding="utf-8")


def page(title: str, parts: list[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text_of(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{text_of(title)}</h1>\n{body}\n</body></html>\n"
    )


def curves(runs: dict[str, dict[str, Any]]) -> str:
    pictures = "\n".join(f'<img src="{picture}" alt="curve">' for picture in figures(runs))
    note = "Dots on dashed lines: evaluations. A cross: the mean of a last log of fewer steps than the others."
    note += " Grey lines: where rounds begin." if any(run.get("rounds") for run in runs.values()) else ""
    return f'<h2>Curves</h2>\n<div class="curves">{pictures}</div><p><small>{note}</small></p>'


def _samples(samples: dict[str, Any]) -> str:
    names = [*samples["rows"][0]]
    lines = ["<tr>" + "".join(f"<th>{text_of(name)}</th>" for name in names) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{text_of(row[name])}</td>" for name in names) + "</tr>" for row in samples["rows"]]
    return f'<p>{text_of(samples["caption"])}</p><table class="samples">{"".join(lines)}</table>'


def _data(data: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, count in data.items():
        reasons = ", ".join(f"{reason} {number}" for reason, number in count.get("dropped_for", {}).items())
        found = ", ".join(f"{finding} {number}" for finding, number in count.get("found", {}).items())
        counts = (count.get(one, "") for one in ("examples", "prompts", "truncated", "dropped"))
        rows.append((name, *counts, reasons, found))
    head = ("", "examples", "different prompts", "cut to max_length", "dropped", "dropped for", "warned about")
    return table(rows, head)


def _costs(metrics: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    steps = metrics["steps"][-1]["step"] if metrics.get("steps") else 0
    if metrics.get("rounds"):
        for part in ("sampling", "training"):
            seconds = sum(entry[f"{part}_seconds"] for entry in metrics["rounds"])
            yield f"seconds of {part}, all rounds", f"{seconds:.1f}"
    elif "seconds" in metrics:
        start = metrics.get("resumed_at", 0)
        since = f", since step {start}" * bool(start)
        yield f"seconds of training, with evaluations and saving{since}", f"{metrics['seconds']:.1f}"
        if steps > start:
            yield "seconds per step", f"{metrics['seconds'] / (steps - start):.3f}"
    if "samples_per_second" in metrics:
        yield "examples per second", f"{metrics['samples_per_second']:.2f}"
    for name, value in metrics.get("memory", {}).items():
        yield name, f"{value:,.0f} MiB"
    for name in ("device", "backend", "torch"):
        if name in metrics:
            yield name, metrics[name]


def table(rows: Iterable[tuple], head: tuple[str, ...] = ()) -> str:
    def cell(value: Any) -> str:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return f"<td{' class=number' * is_number}>{text_of(value)}</td>"

    lines = ["<tr>" + "".join(f"<th>{text_of(name)}</th>" for name in head) + "</tr>"] if head else []
    lines += ["<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def text_of(value: Any) -> str:
    return html.escape(str(value))
