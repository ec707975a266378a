"""The report from logits: time, bandwidth, memory and errors of KTO and DPO at several vocabularies and lengths.

Forward and backward are timed apart. Bandwidths are compared with that of a large copy on the same device.
"""

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import pictures
import torch
from contenders import BETA
from contenders_from_logits import Contender, Problem, contenders, make_problem, policy_logits
from side_by_side import (
    Turn,
    how_timed,
    left_out_line,
    machine_line,
    new_report,
    path_of,
    step_seconds,
    take_turns,
    write,
)

from kto_fused import reference


@dataclass(frozen=True)
class Size:
    """The shape [B, T, V] and dtype of the logits."""

    batch: int
    seq_len: int
    vocab: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"B={self.batch} T={self.seq_len} V={self.vocab} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Plan:
    """The measurements for one kind of device: `base` in each dtype, then other vocabularies and lengths."""

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
    """One contender on one problem: median times in milliseconds, bandwidths over the necessary bytes in GB/s."""

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
    """Return the bandwidth in GB/s of a copy of `size` bytes; bytes read and bytes written both count."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = [step_seconds(lambda: target.copy_(source), device) for _ in range(10)]
    return 2 * size / statistics.median(times) / 1e9


class LogitsTurn(Turn):
    """A contender's forward and backward pass as two timed steps, with fresh logits at each turn."""

    def __init__(self, name: str, contender: Contender, problem: Problem, truth: tuple[torch.Tensor, torch.Tensor]):
        super().__init__(name)
        self.contender, self.problem, self.truth = contender, problem, truth

    def fresh(self) -> None:
        self.policy = policy_logits(self.problem, self.name)

    def forward(self) -> None:
        self.loss, self.logps = self.contender(self.policy, self.problem)

    def backward(self) -> None:
        (self.gradient,) = torch.autograd.grad(self.loss, self.policy)

    def steps(self):
        return self.forward, self.backward

    def drop(self) -> None:
        self.policy = self.loss = self.logps = self.gradient = None

    def measure_errors(self) -> dict[str, float | None]:
        logps, gradient = self.truth
        return {
            "logp_error": (self.logps.double() - logps).abs().max().item(),
            "gradient_error": ((self.gradient[-1:].double() - gradient).norm() / gradient.norm()).item(),
        }


def exact(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probabilities [B] and the gradient of the last sequence's logits [1, T, V] in float64.

    Computed with `kto_fused.reference`, one sequence at a time to bound memory.
    """
    sequences = zip(problem.logits, problem.labels, strict=True)
    logps = torch.cat([reference.sequence_logps(x[None].double(), y[None]) for x, y in sequences]).requires_grad_()
    if problem.loss == "kto":
        loss, _ = reference.kto_loss_from_logps(
            logps, problem.ref_logps, problem.desirable, reference_point=0.0, beta=BETA
        )
    else:
        loss, _ = reference.dpo_loss_from_logps(logps, problem.ref_logps, beta=BETA)
    (by_logps,) = torch.autograd.grad(loss, logps)
    last = problem.logits[-1:].double().requires_grad_()
    (by_last_logits,) = torch.autograd.grad(reference.sequence_logps(last, problem.labels[-1:]).sum(), last)
    return logps.detach(), by_last_logits * by_logps[-1]


def measure(problem: Problem, size: Size, found: dict[str, Contender], rounds: int, left_out: list[dict]) -> list[Row]:
    """Measure all contenders on one problem; a failed one is appended to `left_out`."""
    truth = exact(problem)
    turns = [LogitsTurn(name, contender, problem, truth) for name, contender in found.items()]
    itemsize = problem.logits.element_size()
    read, written = problem.completion_logits * itemsize, problem.logits.numel() * itemsize
    rows = []
    for turn in take_turns(turns, rounds, case_name(problem.loss, size), left_out, problem.logits.device):
        forward_ms, backward_ms = turn.milliseconds
        row = Row(
            loss=problem.loss,
            size=str(size),
            vocab=size.vocab,
            tokens=size.batch * size.seq_len,
            contender=turn.name,
            forward_ms=forward_ms,
            backward_ms=backward_ms,
            forward_gb_s=read / forward_ms / 1e6,
            backward_gb_s=(read + written) / backward_ms / 1e6,
            peak_mib=turn.peak_mib,
            **turn.errors,
        )
        rows.append(row)
        print(f"{row.size:36} {row.loss:4} {row.contender:24} {forward_ms:9.2f} ms {backward_ms:9.2f} ms", flush=True)
    return rows


def case_name(loss: str, size: Size | str) -> str:
    return f"{loss.upper()}, {size}"


def tables(report: dict) -> str:
    """Return the report's Markdown."""
    lines = [
        f"# From logits, {report['device']}",
        "",
        f"{machine_line(report)} Half of each sequence is prompt. Times are medians of {report['rounds']} rounds in "
        f"which the contenders took turns. {how_timed(report['device'])} Peak memory is all that a forward and "
        "backward pass allocates, the gradient included. Bandwidths count the necessary bytes only: completion logits "
        f"read once per pass, gradients written once. A large copy reached {report['copy_gb_s']:.1f} GB/s in the same "
        "run. Errors are differences from float64 on the same inputs: the largest of a sequence's log-probability, in "
        "nats, and that of the last sequence's gradient, relative to its norm.",
    ]
    for size, loss in dict.fromkeys((row["size"], row["loss"]) for row in report["rows"]):
        lines += [
            "",
            f"## {case_name(loss, size)}",
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
        lines += left_out_line(report, case_name(loss, size))
    return "\n".join(lines) + "\n"


def run(device: torch.device, plan: Plan, out: Path) -> None:
    """Measure the plan and write JSON, tables and pictures to `out`."""
    found = contenders(device)
    base = plan.base
    base_sizes = [Size(base.batch, base.seq_len, base.vocab, dtype) for dtype in plan.dtypes]
    other_sizes = [Size(base.batch, base.seq_len, vocab, base.dtype) for vocab in plan.vocabularies]
    other_sizes += [Size(base.batch, length, base.vocab, base.dtype) for length in plan.lengths]
    cases = [(loss, size) for size in base_sizes for loss in ("kto", "dpo")]
    cases += [("kto", size) for size in other_sizes]
    report = new_report(device, plan.rounds)
    report["copy_gb_s"] = copy_bandwidth(plan.copy_bytes, device)
    for loss, size in dict.fromkeys(cases):  # each once
        problem = make_problem(loss, size.batch, size.seq_len, size.vocab, size.dtype, device)
        report["rows"] += map(asdict, measure(problem, size, found, plan.rounds, report["left_out"]))
        write(report, tables, out)
    results = path_of(report, out, ".json")
    for path in (results, results.with_suffix(".md"), *pictures.redraw(results)):
        print(f"wrote {path}")
