"""A training step end to end: this package's trainers, TRL's, and TRL's with the loss taken over."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from contenders_training import CONTENDERS, Contender, Problem, Training, make_problem
from side_by_side import Turn, free, how_timed, left_out_line, new_report, path_of, settled, take_turns, write

from kto_fused.measure import peak_bytes

LOSSES = ("kto", "dpo")
SHORTEST = 64


@dataclass(frozen=True)
class Size:
    architecture: str
    sequences: int
    seq_len: int

    def __str__(self) -> str:
        return f"{self.architecture}, {self.sequences} sequences of {self.seq_len} tokens"


@dataclass(frozen=True)
class Plan:
    sizes: tuple[Size, ...]
    rounds: int
    settling: float = 0.0  # seconds
    # where the search for the longest sequence begins; it goes down to SHORTEST, up to ``longest``. None on a GPU: with
    # checkpointing, what ends there first is the patience for attention
    search: Size | None = None
    longest: int = 0
    budget: int = 0  # bytes a step may allocate beside weights, optimizer and batch
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
    """One trainer on one batch: the median of a step, and what it allocates at most, its gradients included."""

    loss: str
    size: str
    contender: str
    ms: float
    peak_mib: float


@dataclass
class Longest:
    """The longest sequences a step went through with, of those tried: powers of two and the halves between."""

    loss: str
    size: str
    contender: str
    seq_len: int


class TrainingTurn(Turn):
    def __init__(self, name: str, contender: Contender, problem: Problem):
        super().__init__(name)
        self.contender, self.problem = contender, problem
        self.training: Training | None = None

    def warm_up(self, device: torch.device) -> None:
        self.training = self.contender(self.problem)
        self.training.step()  # the optimizer's states are there before memory is looked at
        super().warm_up(device)

    def fresh(self) -> None:
        self.training.clear_gradients()

    def steps(self):
        return (self.training.step,)

    def drop(self) -> None:
        if self.training is not None:
            self.training.clear_gradients()


def fits(contender: Contender, loss: str, size: Size, budget: int, device: torch.device) -> bool:
    """Whether a step goes through within the budget."""
    free(device)
    training = contender(make_problem(loss, size.architecture, size.sequences, size.seq_len, device))
    try:
        training.step()
        training.clear_gradients()
        return peak_bytes(training.step, device) <= budget
    except torch.OutOfMemoryError:
        return False


def longest(contender: Contender, loss: str, plan: Plan, device: torch.device) -> int:
    """Twice as long until it no longer fits, or half as long until it fits, then once between; 0 if nothing fits."""

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
    return "-" if seq_len is None else f"at least {seq_len}" if seq_len == tried else str(seq_len)


def tables(report: dict) -> str:
    precision = "" if report["device"] == "CPU" else " and bfloat16 autocast"
    lines = [
        f"# A training step, {report['device']}",
        "",
        f"{report['machine']}; torch {report['torch']}. Random float32 weights{precision}, gradient checkpointing, "
        "AdamW; a step is what a trainer does for one batch: reference and mismatched passes, policy forward and "
        f"backward, optimizer. Half of each sequence is prompt. Medians of {report['rounds']} rounds in which all took "
        f"turns{settled(report['settling'])}. {how_timed(report['device'])} Peak memory is what a step allocates at "
        "most, the gradients included, beside weights, optimizer and batch.",
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
            f"{report['longest'][0]['size']}; tried were lengths twice or half as long, and once between the last two, "
            f"up to {report['longest_tried']} tokens.",
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
    """Of all contenders, whose models are let go of when it returns."""
    problem = make_problem(loss, size.architecture, size.sequences, size.seq_len, device)
    turns = [TrainingTurn(name, contender, problem.with_own_models()) for name, contender in CONTENDERS.items()]
    del problem
    turns = take_turns(turns, plan.rounds, title(loss, size), left_out, device, plan.settling)
    return [Row(loss, str(size), turn.name, turn.milliseconds[0], turn.peak_mib) for turn in turns]


def run(device: torch.device, plan: Plan, out: Path) -> None:
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
    print(f"wrote {path_of(report, out, '-training.json')} and .md")
