"""The report from hidden states: time, memory and errors of a KTO or DPO step with a trained or frozen LM head.

A step is the policy's loss and gradients and the reference model's forward pass. Times are compared with those of the
step's matrix products alone.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pictures
import torch
from contenders import BETA
from contenders_from_hidden import Contender, GEMMs, Problem, contenders, make_problem
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

from kto_fused import reference

FLOOR = "GEMMs alone"
# the number of rows of the weight's gradient that are compared with float64
SAMPLED_ROWS = 256


@dataclass(frozen=True)
class Size:
    """An LM head (hidden size H, vocabulary size V) and a batch for it."""

    head: str
    hidden: int
    vocab: int
    batch: int
    seq_len: int
    dtype: torch.dtype
    softcap: float | None = None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        softcap = "" if self.softcap is None else f" soft cap {self.softcap:g}"
        return f"{self.head}: B={self.batch} T={self.seq_len} H={self.hidden} V={self.vocab} {dtype}{softcap}"


@dataclass(frozen=True)
class Entry:
    """The cases that are measured at one size."""

    size: Size
    cases: tuple[str, ...] = ("kto trained",)  # the loss, and "trained" or "frozen" for the head
    compiled: bool = False  # also measure the peers that take long to compile


@dataclass(frozen=True)
class Plan:
    """The measurements for one kind of device."""

    entries: tuple[Entry, ...]
    picture: Size  # the head whose time and memory are drawn against the sequence length
    lengths: tuple[int, ...]
    rounds: int
    settling: float = 0.0  # seconds of load in each turn

    @property
    def all_entries(self) -> list[Entry]:
        """The entries, and those that only the picture's lines need."""
        known = [entry.size for entry in self.entries]
        return [*self.entries, *(Entry(size) for size in self.picture_sizes if size not in known)]

    @property
    def picture_sizes(self) -> list[Size]:
        return [replace(self.picture, seq_len=length) for length in self.lengths]


def on_gpu(head: str, hidden: int, vocab: int, softcap: float | None = None) -> Size:
    return Size(head, hidden, vocab, batch=8, seq_len=2048, dtype=torch.bfloat16, softcap=softcap)


SMALL = Size("small head", hidden=256, vocab=32000, batch=4, seq_len=128, dtype=torch.float32)
MEDIUM = Size("medium head", hidden=1024, vocab=32768, batch=4, seq_len=512, dtype=torch.float32)
QWEN_05B = on_gpu("Qwen2.5-0.5B", 896, 151936)

PLANS = {
    "cpu": Plan(
        entries=(
            Entry(SMALL, compiled=True),
            Entry(MEDIUM, ("kto trained", "kto frozen", "dpo trained", "dpo frozen"), compiled=True),
        ),
        picture=SMALL,
        lengths=(128, 256, 512, 1024),
        rounds=4,
    ),
    "cuda": Plan(
        entries=(
            Entry(QWEN_05B, ("kto trained", "kto frozen"), compiled=True),
            Entry(on_gpu("Qwen3-8B", 4096, 151936), ("kto trained", "kto frozen", "dpo trained"), compiled=True),
            Entry(on_gpu("Llama-3.2-1B", 2048, 128256)),
            Entry(on_gpu("Llama-3-8B", 4096, 128256)),
            Entry(on_gpu("Gemma-3-4B", 2560, 262208)),
            Entry(on_gpu("Gemma-3-4B", 2560, 262208, softcap=30.0)),
        ),
        picture=QWEN_05B,
        lengths=(512, 2048, 8192),
        rounds=3,
        settling=0.5,
    ),
}


@dataclass
class Row:
    """One contender on one problem: the median time of a step and the peak memory that it allocates."""

    case: str
    size: str
    seq_len: int
    contender: str
    ms: float
    times_gemms: float
    peak_mib: float | None  # the gradients included, the inputs not; None for the GEMMs alone
    gradient_mib: float
    logp_error: float | None = None
    hidden_gradient_error: float | None = None
    weight_gradient_error: float | None = None


@dataclass
class Truth:
    """Each sequence's log-probability and its derivatives in float64.

    The gradients of any loss follow from these by the chain rule.
    """

    logps: torch.Tensor  # [B]
    ref_logps: torch.Tensor  # [B]
    by_last_hidden: torch.Tensor  # [T, H], d log-probability / d hidden states of the last sequence
    by_weight: torch.Tensor  # [B, SAMPLED_ROWS, H], d log-probability / d sampled rows of the weight

    def gradients(self, loss: str, desirable: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss's gradients w.r.t. the last sequence's hidden states and the weight's sampled rows."""
        logps = self.logps.clone().requires_grad_()
        if loss == "kto":
            value, _ = reference.kto_loss_from_logps(logps, self.ref_logps, desirable, reference_point=0.0, beta=BETA)
        else:
            value, _ = reference.dpo_loss_from_logps(logps, self.ref_logps, beta=BETA)
        (by_logps,) = torch.autograd.grad(value, logps)
        return by_logps[-1] * self.by_last_hidden, torch.einsum("b,brh->rh", by_logps, self.by_weight)


def sampled_rows(problem: Problem) -> torch.Tensor:
    """Return the indices of `SAMPLED_ROWS` rows of the weight, evenly spaced over the vocabulary."""
    vocab = len(problem.weight)
    return torch.arange(0, vocab, max(1, vocab // SAMPLED_ROWS), device=problem.weight.device)[:SAMPLED_ROWS]


def exact(problem: Problem) -> Truth:
    """Compute the truth with `kto_fused.reference`, one sequence at a time, from the last prompt position on.

    One sequence at a time bounds the memory of float64 logits. Earlier positions predict only prompt tokens.
    """
    labels, rows = problem.labels, sampled_rows(problem)
    start = labels.shape[1] // 2 - 1
    weight, ref_weight = (x.detach().double() for x in (problem.weight, problem.ref_weight))
    weight.requires_grad_()
    logps, ref_logps, by_weight = [], [], []
    for sequence in range(len(labels)):
        here = slice(sequence, sequence + 1), slice(start, None)
        options = {"labels": labels[here], "logit_softcap": problem.softcap}
        with torch.no_grad():
            ref_logps.append(reference.linear_sequence_logps(problem.ref_hidden[here].double(), ref_weight, **options))
        hidden = problem.hidden[here].detach().double().requires_grad_()
        logps.append(reference.linear_sequence_logps(hidden, weight, **options))
        by_hidden, by_whole_weight = torch.autograd.grad(logps[-1].sum(), (hidden, weight))
        logps[-1] = logps[-1].detach()
        by_weight.append(by_whole_weight[rows])
    by_last_hidden = torch.zeros_like(problem.hidden[-1], dtype=torch.float64)
    by_last_hidden[start:] = by_hidden[0]
    return Truth(torch.cat(logps), torch.cat(ref_logps), by_last_hidden, torch.stack(by_weight))


def relative(difference: torch.Tensor, truth: torch.Tensor) -> float:
    return (difference.norm() / truth.norm()).item()


class HiddenTurn(Turn):
    """A contender's whole step: the reference model's forward pass, the policy's forward and backward pass."""

    def __init__(self, name: str, contender: Contender, problem: Problem, truth: Truth):
        super().__init__(name)
        self.contender, self.problem, self.truth = contender, problem, truth

    def fresh(self) -> None:
        self.problem.clear_gradients()

    def step(self) -> None:
        self.loss, self.logps = self.contender(self.problem)
        self.loss.backward()

    def steps(self):
        return (self.step,)

    def drop(self) -> None:
        self.loss = self.logps = None
        self.problem.clear_gradients()

    def measure_errors(self) -> dict[str, float | None]:
        problem, truth = self.problem, self.truth
        by_hidden, by_weight = truth.gradients(problem.loss, problem.desirable)
        errors = {"hidden_gradient_error": relative(problem.hidden.grad[-1].double() - by_hidden, by_hidden)}
        if self.logps is not None:
            errors["logp_error"] = (self.logps.detach().double() - truth.logps).abs().max().item()
        if problem.is_trained:
            sample = problem.weight.grad[sampled_rows(problem)].double()
            errors["weight_gradient_error"] = relative(sample - by_weight, by_weight)
        return errors


class FloorTurn(Turn):
    """The step's matrix products alone."""

    def __init__(self, problem: Problem):
        super().__init__(FLOOR)
        self.gemms = GEMMs(problem)

    def fresh(self) -> None: ...

    def steps(self):
        return (self.gemms,)

    def drop(self) -> None: ...


def measure(
    problem: Problem,
    truth: Truth,
    case: str,
    size: Size,
    found: dict[str, Contender],
    plan: Plan,
    left_out: list[dict],
) -> list[Row]:
    """Measure all contenders and the GEMMs on one problem; a failed contender is appended to `left_out`."""
    turns = [*(HiddenTurn(name, contender, problem, truth) for name, contender in found.items()), FloorTurn(problem)]
    device = problem.hidden.device
    turns = take_turns(turns, plan.rounds, title(case, size), left_out, device, plan.settling)
    ms = {turn.name: turn.milliseconds[0] for turn in turns}
    gradients = [problem.hidden, problem.weight] if problem.is_trained else [problem.hidden]
    return [
        Row(
            case=case,
            size=str(size),
            seq_len=size.seq_len,
            contender=turn.name,
            ms=ms[turn.name],
            times_gemms=ms[turn.name] / ms[FLOOR],
            peak_mib=None if turn.name == FLOOR else turn.peak_mib,
            gradient_mib=sum(x.nbytes for x in gradients) / 2**20,
            **turn.errors,
        )
        for turn in turns
    ]


def title(case: str, size: Size | str) -> str:
    loss, head = case.split()
    return f"{loss.upper()}, head {head}, {size}"


def cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def tables(report: dict) -> str:
    """Return the report's Markdown."""
    lines = [
        f"# From hidden states, {report['device']}",
        "",
        f"{machine_line(report)} A step is the policy's forward and backward pass and the reference model's forward "
        f"pass; half of each sequence is prompt. Times are medians of {report['rounds']} rounds in which the "
        f"contenders took turns{settled(report['settling'])}. {how_timed(report['device'])} {FLOOR}: the same matrix "
        "products on completion tokens, in the input dtype, into buffers allocated before. Peak memory is all that a "
        "step allocates beside its inputs, the gradients included. Errors are differences from float64 on the same "
        "inputs: the largest of a sequence's log-probability, in nats; that of the gradient w.r.t. the last sequence's "
        f"hidden states and w.r.t. {SAMPLED_ROWS} rows of the head, relative to the gradient's norm. Liger's KTO does "
        "not return log-probabilities.",
    ]
    for case, size in dict.fromkeys((row["case"], row["size"]) for row in report["rows"]):
        rows = [row for row in report["rows"] if (row["case"], row["size"]) == (case, size)]
        lines += [
            "",
            f"## {title(case, size)}",
            "",
            f"The gradients themselves take {rows[0]['gradient_mib']:.0f} MiB.",
            "",
            "| | ms | x GEMMs | peak MiB | log-prob error | hidden gradient error | weight gradient error |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row in rows:
            errors = (row["logp_error"], row["hidden_gradient_error"], row["weight_gradient_error"])
            lines.append(
                f"| {row['contender']} | {row['ms']:.2f} | {row['times_gemms']:.2f} | {cell(row['peak_mib'], '.0f')} "
                f"| {' | '.join(cell(error, '.1e') for error in errors)} |"
            )
        lines += left_out_line(report, title(case, size))
    return "\n".join(lines) + "\n"


def run(device: torch.device, plan: Plan, out: Path) -> None:
    """Measure the plan and write JSON, tables and picture to `out`."""
    report = new_report(device, plan.rounds) | {"settling": plan.settling}
    for entry in plan.all_entries:
        size = entry.size
        free(device)
        if entry.compiled:
            torch.compiler.reset()  # compile for this size alone: no dynamic shapes, and no recompilation limit reached
        found = contenders(device, size.softcap, entry.compiled)
        inputs = make_problem(size.batch, size.seq_len, size.hidden, size.vocab, size.dtype, size.softcap, device)
        truth = exact(inputs)
        for case in entry.cases:
            loss, head = case.split()
            problem = inputs.posed(loss, is_trained=head == "trained")
            rows = measure(problem, truth, case, size, found, plan, report["left_out"])
            for row in rows:
                print(f"{title(case, size)}: {row.contender:24} {row.ms:9.2f} ms {row.times_gemms:6.2f} x", flush=True)
            report["rows"] += [asdict(row) for row in rows]
            write(report, tables, out, "-hidden")
    results = path_of(report, out, "-hidden.json")
    for path in (results, results.with_suffix(".md"), *pictures.redraw(results)):
        print(f"wrote {path}")
