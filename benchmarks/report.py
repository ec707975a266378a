"""All of it side by side in one run: ``python benchmarks/report.py``.

Writes under ``benchmarks/results/`` for the device it ran on: ``<device>.json`` with every number, ``<device>.md`` with
the tables, ``<device>-vocabulary.png`` and ``<device>-tokens.png`` with time and memory against V and against B T.
Contenders take turns within each round, so that a drift of the machine's speed meets them all; medians are reported.
Who runs out of memory is left out of that table.
"""

import argparse
import json
import platform
import re
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from contenders import BETA, Contender, Problem, contenders, make_problem, policy_logits
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kto_fused import reference
from kto_fused.measure import peak_bytes, seconds

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Size:
    batch: int
    seq_len: int
    vocab: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"B={self.batch} T={self.seq_len} V={self.vocab} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Plan:
    """What is measured on a kind of device."""

    base: Size
    dtypes: tuple[torch.dtype, ...]
    vocabularies: tuple[int, ...]
    lengths: tuple[int, ...]
    rounds: int
    copy_bytes: int


PLANS = {
    "cpu": Plan(
        base=Size(4, 256, 32000, torch.float32),
        dtypes=(torch.float32, torch.bfloat16),
        vocabularies=(8192, 32000, 128256),
        lengths=(64, 256, 1024),
        rounds=5,
        copy_bytes=2**28,
    ),
    "cuda": Plan(
        base=Size(8, 2048, 128256, torch.bfloat16),
        dtypes=(torch.bfloat16, torch.float32),
        vocabularies=(32000, 128256, 151936, 262144),
        lengths=(256, 1024, 2048, 4096),
        rounds=20,
        copy_bytes=2**32,
    ),
}


@dataclass
class Row:
    """One contender on one problem: medians in milliseconds, bandwidths over necessary bytes in GB/s."""

    loss: str
    size: str
    vocab: int
    tokens: int
    contender: str
    forward_ms: float
    backward_ms: float
    forward_gb_s: float
    backward_gb_s: float
    peak_mib: float
    logp_error: float
    gradient_error: float


def copy_bandwidth(size: int, device: torch.device) -> float:
    """GB/s of a large copy on the device, bytes read and written counted."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(10)]
    return 2 * size / statistics.median(times) / 1e9


class Turn:
    """One contender on one problem, with fresh logits at each turn."""

    def __init__(self, name: str, contender: Contender, problem: Problem):
        self.name, self.contender, self.problem = name, contender, problem
        self.forward_seconds: list[float] = []
        self.backward_seconds: list[float] = []

    def fresh(self) -> None:
        self.policy = policy_logits(self.problem, self.name)

    def forward(self) -> None:
        self.loss, self.logps = self.contender(self.policy, self.problem)

    def backward(self) -> None:
        (self.gradient,) = torch.autograd.grad(self.loss, self.policy)

    def both(self) -> None:
        self.forward()
        self.backward()

    def take(self, device: torch.device) -> None:
        self.fresh()
        self.forward_seconds.append(seconds(self.forward, device))
        self.backward_seconds.append(seconds(self.backward, device))
        self.drop()

    def drop(self) -> None:
        del self.policy, self.loss, self.logps, self.gradient


def exact(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, and the last sequence's gradient, of the plain twin in float64; one sequence at a time."""
    sequences = zip(problem.logits, problem.labels, strict=True)
    logps = torch.cat([reference.sequence_logps(x[None].double(), y[None]) for x, y in sequences]).requires_grad_()
    if problem.loss == "kto":
        loss, _ = reference.kto_loss_from_logps(
            logps, problem.ref_logps, problem.desirable, reference_point=0.0, beta=BETA
        )
    else:
        loss, _ = reference.dpo_loss_from_logps(logps, problem.ref_logps, beta=BETA)
    (of_sequences,) = torch.autograd.grad(loss, logps)
    last = problem.logits[-1:].double().requires_grad_()
    (of_logits,) = torch.autograd.grad(reference.sequence_logps(last, problem.labels[-1:]).sum(), last)
    return logps.detach(), of_logits * of_sequences[-1]


def measure(problem: Problem, size: Size, found: dict[str, Contender], rounds: int) -> list[Row]:
    device = problem.logits.device
    exact_logps, exact_gradient = exact(problem)
    turns = [Turn(name, contender, problem) for name, contender in found.items()]
    errors, peaks = {}, {}
    for turn in list(turns):
        try:
            turn.fresh()
            turn.both()  # compiles
        except torch.OutOfMemoryError:
            turns.remove(turn)
            print(f"{size!s:36} {problem.loss:4} {turn.name:24} out of memory")
            continue
        errors[turn.name] = (
            (turn.logps.double() - exact_logps).abs().max().item(),
            ((turn.gradient[-1:].double() - exact_gradient).norm() / exact_gradient.norm()).item(),
        )
        turn.drop()
        turn.fresh()
        peaks[turn.name] = peak_bytes(turn.both, device)
        turn.drop()
    for _ in range(rounds):
        for turn in turns:
            turn.take(device)

    itemsize = problem.logits.element_size()
    read, written = problem.completion_logits * itemsize, problem.logits.numel() * itemsize
    rows = []
    for turn in turns:
        forward, backward = statistics.median(turn.forward_seconds), statistics.median(turn.backward_seconds)
        logp_error, gradient_error = errors[turn.name]
        row = Row(
            loss=problem.loss,
            size=str(size),
            vocab=size.vocab,
            tokens=size.batch * size.seq_len,
            contender=turn.name,
            forward_ms=forward * 1e3,
            backward_ms=backward * 1e3,
            forward_gb_s=read / forward / 1e9,
            backward_gb_s=(read + written) / backward / 1e9,
            peak_mib=peaks[turn.name] / 2**20,
            logp_error=logp_error,
            gradient_error=gradient_error,
        )
        rows.append(row)
        print(f"{row.size:36} {row.loss:4} {row.contender:24} {row.forward_ms:9.2f} ms {row.backward_ms:9.2f} ms")
    return rows


def tables(report: dict) -> str:
    lines = [
        f"# From logits, {report['device']}",
        "",
        f"{report['machine']}; torch {report['torch']}. Half of each sequence is prompt. Medians of {report['rounds']} "
        "rounds in which all took turns. Peak memory is everything a forward and backward allocates, the gradient "
        "included. Bandwidth counts necessary bytes only: completion logits read once, gradients written once; a "
        f"large copy reached {report['copy_gb_s']:.1f} GB/s in the same run. Errors are against float64 on the same "
        "inputs: the worst sequence's log-probability in nats, and the last sequence's gradient relative to its norm.",
    ]
    for size, loss in dict.fromkeys((row["size"], row["loss"]) for row in report["rows"]):
        lines += [
            "",
            f"## {loss.upper()}, {size}",
            "",
            "| | forward ms | backward ms | both ms | peak MiB | forward GB/s | backward GB/s "
            "| log-prob error | gradient error |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for row in report["rows"]:
            if (row["size"], row["loss"]) == (size, loss):
                both_ms = row["forward_ms"] + row["backward_ms"]
                lines.append(
                    f"| {row['contender']} | {row['forward_ms']:.2f} | {row['backward_ms']:.2f} | {both_ms:.2f} "
                    f"| {row['peak_mib']:.0f} | {row['forward_gb_s']:.1f} | {row['backward_gb_s']:.1f} "
                    f"| {row['logp_error']:.1e} | {row['gradient_error']:.1e} |"
                )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], against: str, label: str, path: Path) -> None:
    """Time and memory of a KTO forward and backward, a line per contender."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    time_axes, memory_axes = figure.subplots(1, 2)
    for name in dict.fromkeys(row["contender"] for row in rows):
        points = sorted((row for row in rows if row["contender"] == name), key=lambda row: row[against])
        x = [row[against] for row in points]
        time_axes.plot(x, [row["forward_ms"] + row["backward_ms"] for row in points], marker="o", label=name)
        memory_axes.plot(x, [row["peak_mib"] for row in points], marker="o", label=name)
    time_axes.set(title="KTO forward and backward", ylabel="ms")
    memory_axes.set(title="peak memory, gradient included", ylabel="MiB")
    ticks = sorted({row[against] for row in rows})
    for axes in (time_axes, memory_axes):
        axes.set(xlabel=label, xscale="log", yscale="log")
        axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    time_axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, format="png")


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{model.group(1) if model else platform.processor()}, {torch.get_num_threads()} threads"


def run(device: torch.device, plan: Plan) -> dict:
    found = contenders(device)
    base = plan.base
    sizes = {
        "base": [Size(base.batch, base.seq_len, base.vocab, dtype) for dtype in plan.dtypes],
        "vocab": [Size(base.batch, base.seq_len, vocab, base.dtype) for vocab in plan.vocabularies],
        "tokens": [Size(base.batch, length, base.vocab, base.dtype) for length in plan.lengths],
    }
    measured: dict[tuple[str, Size], list[Row]] = {}
    for kind in sizes:
        for size in sizes[kind]:
            for loss in ("kto", "dpo") if kind == "base" else ("kto",):
                if (loss, size) not in measured:
                    problem = make_problem(loss, size.batch, size.seq_len, size.vocab, size.dtype, device)
                    measured[loss, size] = measure(problem, size, found, plan.rounds)
    sweeps = {
        kind: [asdict(row) for size in sizes[kind] for row in measured["kto", size]] for kind in ("vocab", "tokens")
    }
    return {
        "device": "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "machine": machine(device),
        "torch": torch.__version__,
        "rounds": plan.rounds,
        "copy_gb_s": copy_bandwidth(plan.copy_bytes, device),
        "rows": [asdict(row) for rows in measured.values() for row in rows],
        "sweeps": sweeps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    report = run(device, PLANS[device.type])
    name = re.sub(r"[^a-z0-9]+", "-", report["device"].lower())
    arguments.out.mkdir(parents=True, exist_ok=True)
    sweeps = report.pop("sweeps")
    (arguments.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / f"{name}.md").write_text(tables(report))
    plot(sweeps["vocab"], "vocab", "vocabulary V", arguments.out / f"{name}-vocabulary.png")
    plot(sweeps["tokens"], "tokens", "positions B T", arguments.out / f"{name}-tokens.png")
    print(f"wrote {arguments.out}/{name}.json, .md and two plots")


if __name__ == "__main__":
    main()
