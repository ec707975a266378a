"""The report on whole training steps: this package's trainers, TRL's trainers, and TRL's with `fuse`.

It measures time and peak memory of each method's step, and on a CPU the longest sequences that fit a memory budget.
The results of some cases join those of the other cases on the same machine, so that a report can be made in parts.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pictures
import torch
from contenders_training import CONTENDERS, METHODS, Contender, Problem, Training, contenders_of, make_problem
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

LONGEST = "longest"  # the case that searches for the longest sequences, of the methods SEARCHED
CASES = (*METHODS, LONGEST)
SEARCHED = ("kto", "dpo")
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
    budget: int = 0  # bytes that a step may hold at one time beyond weights, optimizer state and batch
    cases: tuple[str, ...] = CASES

    def of_cases(self, cases: list[str]) -> "Plan":
        """Return a plan of these cases alone."""
        return replace(self, cases=tuple(case for case in self.cases if case in cases))


PLANS = {
    "cpu": Plan(
        sizes=(Size("Llama 20M", 4, 512),), rounds=3, search=Size("Llama 20M", 2, 256), longest=4096, budget=2**30
    ),
    "cuda": Plan(
        sizes=(Size("Qwen2.5-0.5B", 8, 2048), Size("Llama-3.2-1B", 8, 2048)),
        rounds=3,
        settling=1.0,
    ),
}


@dataclass
class Row:
    """One trainer on one batch: a step's median time, and the most that it allocates at one time, with gradients."""

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
    return f"{pictures.loss_name(loss)}, {size}"


def found_length(seq_len: int | None, tried: int) -> str:
    """Return the table's cell for a length; the longest length tried is a lower bound."""
    return "-" if seq_len is None else f"at least {seq_len}" if seq_len == tried else str(seq_len)


def table(head: str, cells: dict[tuple[str, str], str]) -> list[str]:
    """Return a table of `cells` by method and contender."""
    lines = [f"| {head} | {' | '.join(CONTENDERS)} |", "|---" + "|---:" * len(CONTENDERS) + "|"]
    for loss in dict.fromkeys(loss for loss, _ in cells):
        found = (cells.get((loss, contender), "-") for contender in CONTENDERS)
        lines.append(f"| {pictures.loss_name(loss)} | {' | '.join(found)} |")
    return lines


def tables(report: dict) -> str:
    """Return the report's Markdown."""
    precision = "" if report["device"] == "CPU" else " and bfloat16 autocast"
    lines = [
        f"# A training step, {report['device']}",
        "",
        f"{machine_line(report)} Random float32 weights{precision}, gradient checkpointing, AdamW. A step is all that "
        "a trainer does for one batch: passes of the reference model and on mismatched pairs, the policy's forward and "
        "backward pass, the optimizer. GRPO and online DPO get their samples, and GRPO the samples' old "
        "log-probabilities: generating and scoring them takes no part. Half of each sequence is prompt. Times are "
        f"medians of {report['rounds']} rounds in which the contenders took turns{settled(report['settling'])}. "
        f"{how_timed(report['device'])} Peak memory is the most that a step holds at one time beyond weights, "
        "optimizer state and batch, which are there before it; gradients count. `fuse` does not take TRL's trainers "
        "for SFT, reward models and online DPO.",
    ]
    for size in dict.fromkeys(row["size"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["size"] == size]
        cells = {(row["loss"], row["contender"]): f"{row['ms']:.0f} / {row['peak_mib']:.0f}" for row in rows}
        lines += ["", f"## {size}", "", *table("ms / peak MiB", cells)]
        for loss in METHODS:
            lines += left_out_line(report, title(loss, size))
    if report["longest"]:
        found = report["longest"]
        cells = {
            (row["loss"], row["contender"]): found_length(row["seq_len"], report["longest_tried"]) for row in found
        }
        lines += [
            "",
            f"## The longest sequences within {report['budget_mib']:.0f} MiB",
            "",
            f"{found[0]['size']}. The search doubled or halved the length, then tried one length between the last two. "
            f"It ended at {report['longest_tried']} tokens.",
            "",
            *table("longest, tokens", cells),
        ]
    return "\n".join(lines) + "\n"


def measure(loss: str, size: Size, plan: Plan, left_out: list[dict], device: torch.device) -> list[Row]:
    """Measure all contenders on one size; their models are freed when this returns."""
    problem = make_problem(loss, size.architecture, size.sequences, size.seq_len, device)
    contenders = contenders_of(loss)
    turns = [TrainingTurn(name, contender, problem.with_own_models()) for name, contender in contenders.items()]
    del problem
    turns = take_turns(turns, plan.rounds, title(loss, size), left_out, device, plan.settling)
    return [Row(loss, str(size), turn.name, turn.milliseconds[0], turn.peak_mib) for turn in turns]


def joined(report: dict, plan: Plan, out: Path) -> dict:
    """Return `report` with the results of the other cases than `plan`'s that an earlier report in `out` has.

    Raises:
        ValueError: the earlier report is of another machine or version of PyTorch, or was measured in another way.
    """
    path = path_of(report, out, "-training.json")
    if plan.cases == CASES or not path.exists():
        return report
    earlier = json.loads(path.read_text())
    for name in ("machine", "torch", "rounds", "settling", "longest_tried", "budget_mib"):
        if earlier.get(name) != report[name]:
            raise ValueError(
                f"{path} has {name} {earlier.get(name)!r}, and this run {report[name]!r}: measure all cases anew "
                "(leave out --cases), or write them to another folder (--out)"
            )
    measured = [title(case, size) for case in plan.cases if case != LONGEST for size in plan.sizes]
    report["rows"] = [row for row in earlier["rows"] if row["loss"] not in plan.cases]
    report["left_out"] = [entry for entry in earlier["left_out"] if entry["case"] not in measured]
    report["longest"] = [] if LONGEST in plan.cases else earlier["longest"]
    first, last = earlier["date"].split(" to ")[0], report["date"]
    report["date"] = last if first == last else f"{first} to {last}"
    return report


def run(device: torch.device, plan: Plan, out: Path) -> None:
    """Measure the plan and write JSON, tables and picture to `out`."""
    report = new_report(device, plan.rounds) | {
        "settling": plan.settling,
        "longest": [],
        "longest_tried": plan.longest,
        "budget_mib": plan.budget / 2**20,
    }
    report = joined(report, plan, out)
    for size in plan.sizes:
        for loss in (case for case in plan.cases if case != LONGEST):
            free(device)
            for row in measure(loss, size, plan, report["left_out"], device):
                print(f"{title(loss, size)}: {row.contender:20} {row.ms:9.1f} ms {row.peak_mib:8.0f} MiB", flush=True)
                report["rows"].append(asdict(row))
            report["rows"].sort(key=lambda row: (row["size"], CASES.index(row["loss"])))
            write(report, tables, out, "-training")
    for loss in SEARCHED if plan.search and LONGEST in plan.cases else ():
        searched = f"{plan.search.architecture}, {plan.search.sequences} sequences"
        for name, contender in CONTENDERS.items():
            seq_len = longest(contender, loss, plan, device)
            print(f"{title(loss, searched)}: {name:20} up to {seq_len} tokens", flush=True)
            report["longest"].append(asdict(Longest(loss, searched, name, seq_len)))
            write(report, tables, out, "-training")
    print(tables(report))
    results = path_of(report, out, "-training.json")
    for path in (results, results.with_suffix(".md"), *pictures.redraw(results)):
        print(f"wrote {path}")
