"""How contenders are compared, whether they start from logits, hidden states or a whole training step.

The contenders take turns within each round, so that a drift of the machine's speed affects all of them alike. Reports
show the medians. A contender that runs out of memory or fails is left out, and the report names it.
"""

import datetime
import gc
import json
import math
import platform
import re
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch

from kto_fused.measure import peak_bytes, seconds

# GPU clock cycles that the device sleeps before a timed step: longer than the host needs to launch the first kernel.
QUEUED_CYCLES = 4_000_000


def step_seconds(step: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one step: wall time on a CPU, time between two events on a GPU.

    The GPU is kept busy before the step, so that the launch of the first kernel does not count. Times when the device
    waits for the host within the step do count.
    """
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
    """Return the sentence on timing for the head of a report."""
    if device_name == "CPU":
        return "Times are wall time."
    return "Times are those of the device, kept busy before each step; a step's own waits for the host count."


def settled(settling: float) -> str:
    """Return the half sentence on the length of a turn for the head of a report."""
    return f" of {settling:g} s each, whose last step counts" if settling else ""


class Turn(ABC):
    """One contender on one problem. `fresh` makes its inputs, `steps` are timed, `drop` frees all that they hold."""

    def __init__(self, name: str):
        self.name = name
        self.errors: dict[str, float | None] = {}
        self.peak_mib = 0.0
        self.rounds: list[list[float]] = []  # one list per round: seconds of each step

    @abstractmethod
    def fresh(self) -> None: ...

    @abstractmethod
    def steps(self) -> tuple[Callable[[], None], ...]: ...

    @abstractmethod
    def drop(self) -> None: ...

    def measure_errors(self) -> dict[str, float | None]:
        """Return the errors of the results that the steps have just computed, by the name of their column."""
        return {}

    def all_steps(self) -> None:
        for step in self.steps():
            step()

    def warm_up(self, device: torch.device) -> None:
        """Run twice: once to compile and to measure errors, once to measure peak memory."""
        self.fresh()
        self.all_steps()
        self.errors = self.measure_errors()
        self.drop()
        self.fresh()
        self.peak_mib = peak_bytes(self.all_steps, device) / 2**20
        self.drop()

    def take(self, device: torch.device, settling: float) -> None:
        """Repeat the steps for `settling` seconds; keep the times of the last repetition."""
        end = time.perf_counter() + settling
        while True:
            self.fresh()
            times = [step_seconds(step, device) for step in self.steps()]
            self.drop()
            if time.perf_counter() >= end:
                break
        self.rounds.append(times)

    @property
    def seconds(self) -> float:
        """The time of all rounds' steps."""
        return sum(map(sum, self.rounds))

    @property
    def milliseconds(self) -> list[float]:
        """The median of each step, in milliseconds."""
        return [statistics.median(times) * 1e3 for times in zip(*self.rounds, strict=True)]


def take_turns(
    turns: list[Turn],
    rounds: int,
    case: str,
    left_out: list[dict],
    device: torch.device,
    settling: float = 0.0,
    enough: float = math.inf,
) -> list[Turn]:
    """Measure all turns. Returns the turns that ran; the failed ones are appended to `left_out` with the reason.

    A GPU at rest starts with clock rates that it cannot keep under load. `settling` seconds of load in each turn bring
    it to the clock rates of a training run. A contender whose steps took `enough` seconds takes no part in later
    rounds, so that slow contenders do not take most of a report's time.
    """
    running = []
    for turn in turns:
        free(device)
        reason = failure(turn, device)
        if reason is None:
            running.append(turn)
        else:
            turn.drop()
            left_out.append({"case": case, "contender": turn.name, "why": reason})
            print(f"{case}: {turn.name} left out, {reason}", flush=True)
    for _ in range(rounds):
        for turn in running:
            if turn.seconds < enough:
                turn.take(device, settling)
    return running


def failure(turn: Turn, device: torch.device) -> str | None:
    """Return why a turn cannot run here, or None if it can.

    A peer may fail with any error. An error of this package other than lack of memory is raised.
    """
    try:
        turn.warm_up(device)
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        if "fused" in turn.name:  # kto-fused, and "TRL 1.16, fused"
            raise
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def left_out_line(report: dict, case: str) -> list[str]:
    """Return the lines that name the contenders left out of a case; none if all ran."""
    names = [f"{entry['contender']} ({entry['why']})" for entry in report["left_out"] if entry["case"] == case]
    return ["", f"Left out: {', '.join(names)}."] if names else []


def new_report(device: torch.device, rounds: int) -> dict:
    """Return a report without rows: the machine, the versions and today's date."""
    return {
        "device": "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "machine": machine(device),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "rounds": rounds,
        "rows": [],
        "left_out": [],
    }


def machine(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's model and number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{model.group(1) if model else platform.processor()}, {torch.get_num_threads()} threads"


def path_of(report: dict, out: Path, ending: str) -> Path:
    """Return the path of a report's file: <out>/<device><ending>."""
    return out / (re.sub(r"[^a-z0-9]+", "-", report["device"].lower()) + ending)


def machine_line(report: dict) -> str:
    """Return the first sentence of a report's tables: machine, PyTorch version and date."""
    return f"{report['machine']}; torch {report['torch']}; measured {report['date']}."


def write(report: dict, tables: Callable[[dict], str], out: Path, kind: str = "") -> None:
    """Write the numbers as JSON and the tables as Markdown.

    The reports call this after each size, so that an interrupted run keeps the sizes that it finished.
    """
    out.mkdir(parents=True, exist_ok=True)
    path_of(report, out, f"{kind}.json").write_text(json.dumps(report, indent=1) + "\n")
    path_of(report, out, f"{kind}.md").write_text(tables(report))
