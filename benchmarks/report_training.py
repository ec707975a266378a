"""The report on whole training steps: this package's trainers, TRL's trainers, and TRL's with `fuse`.

It measures time and peak memory of a step, and on a CPU the longest sequences that fit a memory budget.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pictures
import torch
from contenders_training import CONTENDERS, Contender, Problem, Training, make_problem
from side_by_side import (
    Turn,
    free,
    how_timed,
    left_out_line,
    machine_line,
    new_report,
    path_of,
    settled,
    take_turns,
    write,
)

from kto_fused.measure import peak_bytes

LOSSES = ("kto", "dpo")
SHORTEST = 64


@dataclass(frozen=True)
class Size:
    """A model and a batch for it."""

    architecture: str
    sequences: int
    seq_len: int

    def __str__(self) -> str:
        return f"{self.architecture}, {self.sequences} sequences of {self.seq_len} tokens"


@dataclass(frozen=True)
class Plan:
    """The measurements for one kind of device."""

    sizes: tuple[Size, ...]
    rounds: int
    settling: float = 0.0  # seconds of load in each turn
    # the size where the search for the longest sequence starts; it tries lengths from SHORTEST to `longest`. None on a
    # GPU: with gradient checkpointing, attention takes too long there before memory ends
    search: Size | None = None
    longest: int = 0
    budget: int = 0  # bytes that a step may allocate beside weights, optimizer and batch
    losses: tuple[str, ...] = LOSSES


PLANS = {
    "cpu": Plan(
        sizes=(Size("Llama 20M", 4, 512),), rounds=3, search=Size("Llama 20M", 2, 256), longest=8192, budget=2**30
    ),
    "cuda": Plan(
        sizes=(Size("Qwen2.5-0.5B", 8, 2048), Size("Llama-3.2-1B", 8, 2048)),
        rounds=3,
        settling=1.0,
    ),
}


@dataclass
class Row:
    """One trainer on one batch: the median time and the peak memory of a step, its gradients included."""

    loss: str
    size: str
    contender: str
    ms: float
    peak_mib: float


@dataclass
class Longest:
    """The longest sequences, of the lengths tried, with which a step stays within the memory budget."""

    loss: str
    size: str
    contender: str
    seq_len: int


class TrainingTurn(Turn):
    """A trainer's step on its batch."""

    def __init__(self, name: str, contender: Contender, problem: Problem):
        super().__init__(name)
        self.contender, self.problem = contender, problem
        self.training: Training | None = None

    def warm_up(self, device: torch.device) -> None:
        self.training = self.contender(self.problem)
        self.training.step()  # allocate the optimizer's state before memory is measured
        super().warm_up(device)

    def fresh(self) -> None:
        self.training.clear_gradients()

    def steps(self):
        return (self.training.step,)

    def drop(self) -> None:
        if self.training is not None:
            self.training.clear_gradients()


def fits(contender: Contender, loss: str, size: Size, budget: int, device: torch.device) -> bool:
    """Return whether a step stays within `budget` bytes."""
    free(device)
    training = contender(make_problem(loss, size.architecture, size.sequences, size.seq_len, device))
    try:
        training.step()
        training.clear_gradients()
        return peak_bytes(training.step, device) <= budget
    except torch.OutOfMemoryError:
        return False


def longest(contender: Contender, loss: str, plan: Plan, device: torch.device) -> int:
    """Return the longest sequence that fits, in tokens; 0 if none does.

    The length doubles until it no longer fits, or halves until it fits. Then one length between the last two is tried.
    """

    def tried(length: int) -> bool:
        size = replace(plan.search, seq_len=length)
        return length <= plan.longest and fits(contender, loss, size, plan.budget, device)

    best = plan.search.seq_len
    while not tried(best):
        best //= 2
        if best < SHORTEST:
            return 0
    while best >= plan.search.seq_len and tried(2 * best):
        best *= 2
    between = best + best // 2
    return between if tried(between) else best


def title(loss: str, size: Size | str) -> str:
    return f"{loss.upper()}, {size}"


def found_length(seq_len: int | None, tried: int) -> str:
    """Return the table's cell for a length; the longest length tried is a lower bound."""
    return "-" if seq_len is None else f"at least {seq_len}" if seq_len == tried else str(seq_len)


def tables(report: dict) -> str:
    """Return the report's Markdown."""
    precision = "" if report["device"] == "CPU" else " and bfloat16 autocast"
    lines = [
        f"# A training step, {report['device']}",
        "",
        f"{machine_line(report)} Random float32 weights{precision}, gradient checkpointing, AdamW. A step is all that "
        "a trainer does for one batch: passes of the reference model and on mismatched pairs, the policy's forward and "
        f"backward pass, the optimizer. Half of each sequence is prompt. Times are medians of {report['rounds']} "
        f"rounds in which the contenders took turns{settled(report['settling'])}. {how_timed(report['device'])} Peak "
        "memory is what a step allocates beside weights, optimizer and batch, the gradients included.",
    ]
    for loss, size in dict.fromkeys((row["loss"], row["size"]) for row in report["rows"]):
        lines += ["", f"## {title(loss, size)}", "", "| | ms | peak MiB |", "|---|---:|---:|"]
        for row in report["rows"]:
            if (row["loss"], row["size"]) == (loss, size):
                lines.append(f"| {row['contender']} | {row['ms']:.1f} | {row['peak_mib']:.0f} |")
        lines += left_out_line(report, title(loss, size))
    if report["longest"]:
        lines += [
            "",
            f"## The longest sequences within {report['budget_mib']:.0f} MiB",
            "",
            f"{report['longest'][0]['size']}. The search doubled or halved the length, then tried one length between "
            f"the last two. It ended at {report['longest_tried']} tokens.",
            "",
            "| | " + " | ".join(LOSSES).upper() + " |",
            "|---|---:|---:|",
        ]
        for contender in CONTENDERS:
            found = {row["loss"]: row["seq_len"] for row in report["longest"] if row["contender"] == contender}
            cells = (found_length(found.get(loss), report["longest_tried"]) for loss in LOSSES)
            lines.append(f"| {contender} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def measure(loss: str, size: Size, plan: Plan, left_out: list[dict], device: torch.device) -> list[Row]:
    """Measure all contenders on one size; their models are freed when this returns."""
    problem = make_problem(loss, size.architecture, size.sequences, size.seq_len, device)
    turns = [TrainingTurn(name, contender, problem.with_own_models()) for name, contender in CONTENDERS.items()]
    del problem
    turns = take_turns(turns, plan.rounds, title(loss, size), left_out, device, plan.settling)
    return [Row(loss, str(size), turn.name, turn.milliseconds[0], turn.peak_mib) for turn in turns]


def run(device: torch.device, plan: Plan, out: Path) -> None:
    """Measure the plan and write JSON, tables and picture to `out`."""
    report = new_report(device, plan.rounds) | {
        "settling": plan.settling,
        "longest": [],
        "longest_tried": plan.longest,
        "budget_mib": plan.budget / 2**20,
    }
    for size in plan.sizes:
        for loss in plan.losses:
            free(device)
            for row in measure(loss, size, plan, report["left_out"], device):
                print(f"{title(loss, size)}: {row.contender:20} {row.ms:9.1f} ms {row.peak_mib:8.0f} MiB", flush=True)
                report["rows"].append(asdict(row))
            write(report, tables, out, "-training")
    for loss in plan.losses if plan.search else ():
        searched = f"{plan.search.architecture}, {plan.search.sequences} sequences"
        for name, contender in CONTENDERS.items():
            seq_len = longest(contender, loss, plan, device)
            print(f"{loss.upper()}, {searched}: {name:20} up to {seq_len} tokens", flush=True)
            report["longest"].append(asdict(Longest(loss, searched, name, seq_len)))
            write(report, tables, out, "-training")
    results = path_of(report, out, "-training.json")
    for path in (results, results.with_suffix(".md"), *pictures.redraw(results)):
        print(f"wrote {path}")
