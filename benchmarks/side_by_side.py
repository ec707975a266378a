"""How contenders are compared, whatever they start from.

They take turns within each round, so that a drift of the machine's speed meets them all; medians are reported. Who runs
out of memory, or fails, is left out and named.
"""

import gc
import json
import platform
import re
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kto_fused.measure import peak_bytes, seconds

# What the device does first when a step is timed: it outlasts the host's way to the step's first kernel.
QUEUED_CYCLES = 4_000_000


def step_seconds(step: Callable[[], object], device: torch.device) -> float:
    """Wall time on a CPU. On a GPU the device's own, behind other work, the step's own waits for the host included."""
    if device.type != "cuda":
        return seconds(step, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(QUEUED_CYCLES)
    start.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3


def how_timed(device_name: str) -> str:
    if device_name == "CPU":
        return "Wall time."
    return "Time on the device, behind other work, a step's own waits for the host included."


def settled(settling: float) -> str:
    return f", each of {settling:g} s, the last step of which counts" if settling else ""


class Turn(ABC):
    """One contender on one problem: what it does between fresh inputs and dropping them."""

    def __init__(self, name: str):
        self.name = name
        self.errors: dict[str, float | None] = {}
        self.peak_mib = 0.0
        self.rounds: list[list[float]] = []  # seconds of each step

    @abstractmethod
    def fresh(self) -> None: ...

    @abstractmethod
    def steps(self) -> tuple[Callable[[], None], ...]: ...

    @abstractmethod
    def drop(self) -> None: ...

    def measure_errors(self) -> dict[str, float | None]:
        """Of what the steps have just computed."""
        return {}

    def all_steps(self) -> None:
        for step in self.steps():
            step()

    def warm_up(self, device: torch.device) -> None:
        """Compile, measure errors, then memory."""
        self.fresh()
        self.all_steps()
        self.errors = self.measure_errors()
        self.drop()
        self.fresh()
        self.peak_mib = peak_bytes(self.all_steps, device) / 2**20
        self.drop()

    def take(self, device: torch.device, settling: float) -> None:
        """Again and again for ``settling`` seconds; the last counts."""
        end = time.perf_counter() + settling
        while True:
            self.fresh()
            times = [step_seconds(step, device) for step in self.steps()]
            self.drop()
            if time.perf_counter() >= end:
                break
        self.rounds.append(times)

    @property
    def milliseconds(self) -> list[float]:
        """Median of each step."""
        return [statistics.median(times) * 1e3 for times in zip(*self.rounds, strict=True)]


def take_turns(
    turns: list[Turn], rounds: int, case: str, left_out: list[dict], device: torch.device, settling: float = 0.0
) -> list[Turn]:
    """Measure them all; returns those that went through, ``left_out`` gains the others.

    A GPU at rest starts on clocks that it cannot keep up under load: ``settling`` seconds of each turn bring it to
    those of a training run.
    """
    running = []
    for turn in turns:
        free(device)
        why = failure(turn, device)
        if why is None:
            running.append(turn)
        else:
            turn.drop()
            left_out.append({"case": case, "contender": turn.name, "why": why})
            print(f"{case}: {turn.name} left out, {why}", flush=True)
    for _ in range(rounds):
        for turn in running:
            turn.take(device, settling)
    return running


def failure(turn: Turn, device: torch.device) -> str | None:
    """Why it cannot run here. A peer may fail in any way of its own; this package only for lack of memory."""
    try:
        turn.warm_up(device)
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        if "fused" in turn.name:  # "TRL 1.16, fused" too
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def left_out_line(report: dict, case: str) -> list[str]:
    names = [f"{entry['contender']} ({entry['why']})" for entry in report["left_out"] if entry["case"] == case]
    return ["", f"Left out: {', '.join(names)}."] if names else []


def new_report(device: torch.device, rounds: int) -> dict:
    return {
        "device": "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "machine": machine(device),
        "torch": torch.__version__,
        "rounds": rounds,
        "rows": [],
        "left_out": [],
    }


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{model.group(1) if model else platform.processor()}, {torch.get_num_threads()} threads"


def path_of(report: dict, out: Path, ending: str) -> Path:
    """<out>/<device><ending>"""
    return out / (re.sub(r"[^a-z0-9]+", "-", report["device"].lower()) + ending)


def write(report: dict, tables: Callable[[dict], str], out: Path, kind: str = "") -> None:
    """Numbers as JSON and tables in Markdown; again after each size, so that a run cut short keeps what it had."""
    out.mkdir(parents=True, exist_ok=True)
    path_of(report, out, f"{kind}.json").write_text(json.dumps(report, indent=1) + "\n")
    path_of(report, out, f"{kind}.md").write_text(tables(report))


def plot(points: list[tuple[str, int, float, float | None]], title: str, label: str, path: Path) -> None:
    """Time and memory, a line per contender: points are (contender, x, ms, peak MiB)."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    time_axes, memory_axes = figure.subplots(1, 2)
    for name in dict.fromkeys(point[0] for point in points):
        _, x, ms, peak_mib = zip(*sorted(point for point in points if point[0] == name), strict=True)
        time_axes.plot(x, ms, marker="o", label=name)
        if None not in peak_mib:
            memory_axes.plot(x, peak_mib, marker="o", label=name)
    time_axes.set(title=title, ylabel="ms")
    memory_axes.set(title="peak memory, gradients included", ylabel="MiB")
    ticks = sorted({point[1] for point in points})
    for axes in (time_axes, memory_axes):
        axes.set(xlabel=label, xscale="log", yscale="log")
        axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    time_axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")
