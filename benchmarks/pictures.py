"""Draw the pictures in `benchmarks/results/` from the JSON files there: `python benchmarks/pictures.py`.

Each picture shows time and peak memory of every contender as lines, and beside them linear bars per model: how many
times the time and memory of kto-fused each peer takes. The picture of losses from hidden states has bars only, and its
times are divided by those of the matrix products alone. The reports call `redraw` after they have measured. Nothing is
measured here, so a change of style needs no new measurement.

A picture's title line holds device, dtype, PyTorch version and date. Reports record their date. Results from before
that lack it; their pictures show the date of the commit that brought the file.
"""

import json
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

RESULTS = Path(__file__).with_name("results")
# One colour per contender in every picture. TRL and eager PyTorch have one name per report.
COLOURS = {
    "kto-fused": "#1f5fbf",
    "kto-fused trainer": "#1f5fbf",
    "kto-fused, in place": "#6fb1e8",
    "kto-fused, 2 GiB chunk": "#17becf",
    "kto-fused, 128 MiB chunk": "#7b6fd0",
    "TRL": "#2e8b57",
    "TRL kernel": "#2e8b57",
    "TRL 1.16": "#2e8b57",
    "TRL 1.16, fused": "#9acd32",
    "Liger": "#c0392b",
    "Liger, compiled": "#f1948a",
    "cut-cross-entropy": "#8e5b3a",
    "eager": "#e67e22",
    "eager log_softmax": "#e67e22",
    "torch.compile of eager": "#d4ac0d",
    "reference": "#7f8c8d",
    "GEMMs alone": "#222222",
}
# The contenders that the bars compare with. The plain reference is written to be read, not to be fast.
PEERS = ("TRL", "Liger", "cut-cross-entropy", "eager", "torch.compile")
FLOOR = "GEMMs alone"
# the losses and methods whose names are not their capital letters
LOSS_NAMES = {
    "nll": "SFT",
    "ppo-clipped": "PPO,\na quarter clipped",
    "simpo": "SimPO",
    "dft": "SFT, dft",
    "reward": "reward model",
    "online-dpo": "online DPO",
}


class Measured(NamedTuple):
    """One contender's median time and peak memory on one model. `x` is its place on the lines' axis."""

    contender: str
    model: str
    x: int
    ms: float
    peak_mib: float | None


class Picture(NamedTuple):
    """What one picture shows. A picture without `lines` has bars only."""

    ending: str  # the file is <name of the results><ending>.png
    title: str
    dtype: str
    lines: list[Measured]
    x_label: str
    x_scale: int  # ticks show x divided by this
    bars: list[Measured]
    baseline: str = "kto-fused"  # whose time the bars of time are divided by

    @property
    def barred(self) -> list[str]:
        """The contenders that have a bar of time: the peers, and kto-fused unless it is the baseline."""
        ours = () if self.baseline == "kto-fused" else ("kto-fused",)
        return list(dict.fromkeys(x.contender for x in self.bars if is_peer(x.contender) or x.contender in ours))


def redraw(results: Path) -> list[Path]:
    """Draw all pictures of one JSON file of results beside it; returns their paths."""
    report = json.loads(results.read_text())
    paths = []
    for picture in pictures(results):
        path = results.with_name(f"{results.stem}{picture.ending}.png")
        figure(picture, f"{report['machine']}, {picture.dtype}, PyTorch {report['torch']}, {date(results)}").savefig(
            path, dpi=110, format="png", metadata={"Software": None}
        )
        paths.append(path)
    return paths


def date(results: Path) -> str:
    """When the results were measured, else when they were committed."""
    recorded = json.loads(results.read_text()).get("date")
    if recorded:
        return f"measured {recorded}"
    command = ["git", "log", "-1", "--format=%as", "--", results.name]
    committed = subprocess.run(command, cwd=results.parent, capture_output=True, text=True, check=False).stdout.strip()
    return f"committed {committed}" if committed else "date not recorded"


def pictures(results: Path) -> list[Picture]:
    """The pictures that one JSON file of results is enough for."""
    rows = json.loads(results.read_text())["rows"]
    if results.stem.endswith("-hidden"):
        return from_hidden(rows) + losses(rows)
    if results.stem.endswith("-training"):
        return training(rows)
    if results.stem.endswith("-adapters"):
        return []  # six rows, which the page shows as a table
    return from_logits(rows)


def from_hidden(rows: list[dict]) -> list[Picture]:
    """Lines for the head that was measured at the most lengths; bars for every head, at its first length."""
    lengths: dict[str, list[int]] = {}
    measured: dict[str, list[Measured]] = {}
    for row in rows:
        if row["case"] == "kto trained" and "chunk" not in row["size"]:  # long sequences have a table of their own
            head = re.sub(r" T=\d+", "", row["size"])
            if row["seq_len"] not in lengths.setdefault(head, []):
                lengths[head].append(row["seq_len"])
            name, _, sizes = head.partition(": ")
            softcap = ",\nsoft cap" if "soft cap" in sizes else ""
            model = f"{name}{softcap}\nT={row['seq_len']}"
            entry = Measured(row["contender"], model, row["seq_len"], row["ms"], row["peak_mib"])
            measured.setdefault(head, []).append(entry)
    if not lengths:
        return []
    drawn = max(lengths, key=lambda head: len(lengths[head]))
    name, _, sizes = drawn.partition(": ")
    bars = [entry for head, entries in measured.items() for entry in entries if entry.x == lengths[head][0]]
    title = "KTO from hidden states, head trained: policy forward and backward, reference forward"
    label = f"sequence length T ({name}, {sizes.rsplit(' ', 1)[0]})"
    return [Picture("", title, sizes.split()[-1], measured[drawn], label, 1, bars)]


def losses(rows: list[dict]) -> list[Picture]:
    """Bars for each loss with a trained head, at the size at which most losses were measured, if it has three."""
    rows = [row for row in rows if row["case"].endswith(" trained")]
    cases: dict[str, dict[str, None]] = {}
    for row in rows:
        cases.setdefault(row["size"], {})[row["case"]] = None
    size = max(cases, key=lambda size: len(cases[size]), default=None)
    if size is None or len(cases[size]) < 3:
        return []
    bars = []
    for row in rows:
        if row["size"] == size:
            name = loss_name(row["case"].split()[0])
            bars.append(Measured(row["contender"], name, row["seq_len"], row["ms"], row["peak_mib"]))
    head, dtype = size.rsplit(" ", 1)
    title = f"Losses from hidden states, head trained ({head})"
    return [Picture("-losses", title, dtype, [], "", 1, bars, baseline=FLOOR)]


def loss_name(loss: str) -> str:
    return LOSS_NAMES.get(loss, loss.upper())


def from_logits(rows: list[dict]) -> list[Picture]:
    """One picture against the vocabulary and one against the positions, where three or more sizes were measured."""
    dtype = rows[0]["size"].split()[-1]
    base = {key: rows[0][key] for key in ("vocab", "tokens")}
    kinds = (
        ("-vocabulary", "vocab", "tokens", f"vocabulary V in thousands (B T = {base['tokens']})", 1000, "V = {}"),
        ("-tokens", "tokens", "vocab", f"positions B T (V = {base['vocab']})", 1, "B T = {}"),
    )
    drawn = []
    for ending, varied, fixed, label, scale, model in kinds:
        entries = [
            Measured(
                row["contender"],
                model.format(row[varied]),
                row[varied],
                row["forward_ms"] + row["backward_ms"],
                row["peak_mib"],
            )
            for row in rows
            if (row["loss"], row["size"].split()[-1], row[fixed]) == ("kto", dtype, base[fixed])
        ]
        if len({entry.x for entry in entries}) >= 3:
            title = "KTO from logits: forward and backward"
            drawn.append(Picture(ending, title, dtype, entries, label, scale, sorted(entries, key=lambda e: e.x)))
    return drawn


def training(rows: list[dict]) -> list[Picture]:
    """Bars for each loss and architecture."""
    bars = []
    for row in rows:
        model = f"{loss_name(row['loss'])}\n{row['size'].split(',')[0]}"
        bars.append(Measured(row["contender"], model, 0, row["ms"], row["peak_mib"]))
    sizes = "; ".join(dict.fromkeys(row["size"] for row in rows))
    return [Picture("", f"A whole training step: {sizes}", "float32 weights", [], "", 1, bars)]


def figure(picture: Picture, subtitle: str) -> Figure:
    """Lines at the left, bars at the right, one legend below both."""
    groups = list(dict.fromkeys(entry.model for entry in picture.bars))
    most_bars = len([entry for entry in picture.bars if entry.contender in picture.barred]) + len(groups)
    height = max(5.8 if picture.lines else 2.6, 0.17 * most_bars + 1.6)
    drawn = Figure(figsize=(14 if picture.lines else 10, height), layout="constrained")
    FigureCanvasAgg(drawn)
    drawn.suptitle(f"{picture.title}\n{subtitle}", fontsize=11)
    columns = 3 if picture.lines else 2
    grid = drawn.add_gridspec(2, columns, width_ratios=[1.25, 1, 1][-columns:])
    if picture.lines:
        for row, (name, value) in enumerate((("time, ms", "ms"), ("peak memory, MiB", "peak_mib"))):
            lines(drawn.add_subplot(grid[row, 0]), picture, name, value)
    bars(drawn.add_subplot(grid[:, -2]), picture, groups, "ms")
    bars(drawn.add_subplot(grid[:, -1]), picture._replace(baseline="kto-fused"), groups, "peak_mib")
    handles: dict[str, object] = {}
    for axes in drawn.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    drawn.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=9)
    return drawn


def is_peer(contender: str) -> bool:
    return contender.startswith(PEERS)


def by_contender(entries: Iterable[Measured]) -> dict[str, list[Measured]]:
    grouped: dict[str, list[Measured]] = {}
    for entry in entries:
        grouped.setdefault(entry.contender, []).append(entry)
    return grouped


def lines(axes: Axes, picture: Picture, name: str, value: str) -> None:
    """Both axes are logarithmic: sizes and contenders differ by orders of magnitude."""
    for contender, entries in by_contender(picture.lines).items():
        points = sorted((entry.x, getattr(entry, value)) for entry in entries if getattr(entry, value) is not None)
        if points:
            # "in place" has the time of kto-fused: dashes and hollow squares leave the line below visible
            style = {"linestyle": "--", "marker": "s", "mfc": "none"} if "in place" in contender else {"marker": "o"}
            style |= {"linestyle": ":"} if contender == "GEMMs alone" else {}
            if len(points) == 1:  # a large diamond shows behind a line's point at the same place
                style = {"linestyle": "none", "marker": "D", "markersize": 8, "zorder": 1.5}
            axes.plot(
                *zip(*points, strict=True), color=COLOURS[contender], label=contender, **{"markersize": 5, **style}
            )
    axes.set(xscale="log", yscale="log", ylabel=name)
    ticks = sorted({entry.x for entry in picture.lines})
    axes.set_xticks(ticks, labels=[str(round(tick / picture.x_scale)) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,), numticks=20))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.10g}"))
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3)
    if value == "peak_mib":
        axes.set_xlabel(picture.x_label)


BAR_TITLES = {
    ("kto-fused", "ms"): "x faster: peer's time / kto-fused's",
    ("kto-fused", "peak_mib"): "x less memory: peer's peak / kto-fused's",
    (FLOOR, "ms"): "x GEMMs: time / that of the matrix products alone",
}


def bars(axes: Axes, picture: Picture, groups: list[str], value: str) -> None:
    """One linear bar per contender and model: its time or memory divided by that of the picture's baseline."""
    position, middles, baseline = 0.0, [], picture.baseline
    for group in groups:
        here = {entry.contender: entry for entry in picture.bars if entry.model == group}
        base = getattr(here.get(baseline) or here[f"{baseline} trainer"], value)
        shown = [name for name in picture.barred if name in here]
        for offset, name in enumerate(shown):
            ratio = getattr(here[name], value) / base
            axes.barh(position + offset, ratio, color=COLOURS[name], label=name, height=0.85)
            text = f"{ratio:.2f}" if ratio < 1 or name == "kto-fused" else f"{ratio:.1f}"
            label = axes.annotate(text, (ratio, position + offset), (3, 0), textcoords="offset points", fontsize=8)
            label.set(verticalalignment="center", bbox={"color": "white", "pad": 0.5})  # the line at 1 passes behind it
        middles.append(position + (len(shown) - 1) / 2)
        position += len(shown) + 1
    axes.axvline(1, color=COLOURS[baseline], linewidth=1.2, zorder=0.5)
    axes.set_yticks(middles, labels=groups, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.15, y=0.01)
    axes.set_title(BAR_TITLES[baseline, value], fontsize=10)
    axes.set_xlabel(f"{baseline} = 1 ({'blue' if baseline == 'kto-fused' else 'black'} line)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def main() -> None:
    for results in sorted(RESULTS.glob("*.json")):
        for path in redraw(results):
            print(f"drew {path}")


if __name__ == "__main__":
    main()
