"""The report on KTO steps that train LoRA adapters of SmolLM2-135M, the model of `kto-fused demo --real`.

The weights are random, which changes neither time nor memory. It measures the time of a step, the memory that the step
allocates, and on a CPU under Linux the resident memory: what the system keeps in RAM for a process in which one
contender alone trains. Resident memory is larger, because the C library keeps freed blocks. Each trainer runs with
gradient checkpointing and without: TRL's configurations turn it on by default, this package's and transformers' do not.
"""

import gc
import multiprocessing
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from contenders_training import CONTENDERS, Problem, make_problem
from peft import LoraConfig, get_peft_model
from report_training import TrainingTurn
from side_by_side import free, how_timed, left_out_line, machine_line, new_report, path_of, settled, take_turns, write

STEPS = 2  # in the process whose resident memory is measured; the first one allocates the optimizer's state
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Plan:
    """The measurements for one kind of device."""

    architecture: str = "SmolLM2-135M"
    sequences: int = 4
    seq_len: int = 164
    lora_rank: int = 8
    rounds: int = 3
    settling: float = 0.0  # seconds of load in each turn

    def problem(self, checkpointing: bool, device: torch.device) -> Problem:
        problem = make_problem("kto", self.architecture, self.sequences, self.seq_len, device)
        if not checkpointing:
            problem.model.gradient_checkpointing_disable()
        adapters = LoraConfig(r=self.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return replace(problem, model=get_peft_model(problem.model, adapters), ref_model=None)


PLANS = {"cpu": Plan(), "cuda": Plan(sequences=8, seq_len=2048, settling=1.0)}


@dataclass
class Row:
    """One trainer: the median time of a step, the peak of what it allocates, and that of its own process's RAM."""

    contender: str
    checkpointing: bool
    ms: float
    peak_mib: float
    resident_mib: float | None  # None on a GPU


def resident_mib(contender: str, plan: Plan, checkpointing: bool) -> float:
    """Return the peak of this process's resident memory during steps, less that before them, in MiB.

    The trainer and its model are built before the first step, so they do not count.
    """
    training = CONTENDERS[contender](plan.problem(checkpointing, torch.device("cpu")))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before = held("VmRSS")
    for _ in range(STEPS):
        training.step()
        training.clear_gradients()
    return held("VmHWM") - before


def held(name: str) -> float:
    return int(re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())[1]) / 1024


def in_own_process(contender: str, plan: Plan, checkpointing: bool) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(resident_mib, (contender, plan, checkpointing))


def tables(report: dict) -> str:
    """Return the report's Markdown."""
    precision = "" if report["device"] == "CPU" else " and bfloat16 autocast"
    plan = Plan(**report["plan"])
    lines = [
        f"# A KTO step of adapters, {report['device']}",
        "",
        f"{machine_line(report)} {plan.architecture} with random float32 weights{precision}, LoRA of rank "
        f"{plan.lora_rank} on all linear layers but the LM head, {plan.sequences} sequences of {plan.seq_len} tokens, "
        "half of them prompt, AdamW. A step is all that a trainer does for one batch. Times are medians of "
        f"{plan.rounds} rounds in which the contenders took turns{settled(plan.settling)}. "
        f"{how_timed(report['device'])} *Allocated* is the most that a step holds at one time beyond weights, "
        "optimizer state and batch, which are there before it. *Resident* is measured in a process of the contender's "
        f"own: the most RAM that it has during {STEPS} steps, less what it has before them. That includes the "
        "optimizer's state, and blocks that the C library keeps after they were freed.",
    ]
    for checkpointing in (False, True):
        title = case(checkpointing)
        lines += ["", f"## {title}", "", "| | ms | allocated MiB | resident MiB |", "|---|---:|---:|---:|"]
        for row in report["rows"]:
            if row["checkpointing"] == checkpointing:
                resident = "-" if row["resident_mib"] is None else f"{row['resident_mib']:.0f}"
                lines.append(f"| {row['contender']} | {row['ms']:.0f} | {row['peak_mib']:.0f} | {resident} |")
        lines += left_out_line(report, title)
    return "\n".join(lines) + "\n"


def case(checkpointing: bool) -> str:
    return "With gradient checkpointing" if checkpointing else "Without gradient checkpointing"


def run(device: torch.device, plan: Plan, out: Path) -> None:
    """Measure the plan and write JSON and tables to `out`."""
    report = new_report(device, plan.rounds) | {"plan": asdict(plan)}
    is_resident = device.type == "cpu" and STATUS.exists()
    for checkpointing in (False, True):
        free(device)
        turns = [
            TrainingTurn(name, contender, plan.problem(checkpointing, device)) for name, contender in CONTENDERS.items()
        ]
        for turn in take_turns(turns, plan.rounds, case(checkpointing), report["left_out"], device, plan.settling):
            resident = in_own_process(turn.name, plan, checkpointing) if is_resident else None
            row = Row(turn.name, checkpointing, turn.milliseconds[0], turn.peak_mib, resident)
            print(f"{case(checkpointing)}: {row.contender:20} {row.ms:9.0f} ms {row.peak_mib:6.0f} MiB {resident}")
            report["rows"].append(asdict(row))
            write(report, tables, out, "-adapters")
    results = path_of(report, out, "-adapters.json")
    print(f"wrote {results}\nwrote {results.with_suffix('.md')}")
