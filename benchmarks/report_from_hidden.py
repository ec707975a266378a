"""The report from hidden states: time, memory and errors of a loss's step with a trained or frozen LM head.

A step is the policy's loss and gradients and, for KTO and DPO, the reference model's forward pass. Times are compared
with those of the step's matrix products alone.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pictures
import torch
from contenders import BETA
from contenders_from_hidden import LOSSES, Contender, GEMMs, Problem, contenders, make_problem
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
COLUMNS = (
    *("", "ms", "x GEMMs", "peak MiB"),
    *("loss error", "log-prob error", "hidden gradient error", "weight gradient error"),
)
ERRORS = ("loss_error", "logp_error", "hidden_gradient_error", "weight_gradient_error")
# the most tokens whose float64 logits exist at one time
EXACT_TOKENS = 1024


@dataclass(frozen=True)
class Size:
    """An LM head (hidden size H, vocabulary size V) and a batch for it.

    `chunk_bytes` are those of kto-fused, None its default. `is_reference_known`: KTO and DPO are given the reference's
    log-probabilities, and a step has no reference model.
    """

    head: str
    hidden: int
    vocab: int
    batch: int
    seq_len: int
    dtype: torch.dtype
    softcap: float | None = None
    chunk_bytes: int | None = None
    is_reference_known: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        softcap = "" if self.softcap is None else f" soft cap {self.softcap:g}"
        chunk = "" if self.chunk_bytes is None else f" chunk {self.chunk_bytes / 2**20:.0f} MiB"
        return f"{self.head}: B={self.batch} T={self.seq_len} H={self.hidden} V={self.vocab} {dtype}{softcap}{chunk}"


@dataclass(frozen=True)
class Entry:
    """The cases that are measured at one size."""

    size: Size
    cases: tuple[str, ...] = ("kto trained",)  # the loss, and "trained" or "frozen" for the head
    compiled: bool = False  # also measure the peers that take long to compile
    only: tuple[str, ...] = ()  # the contenders to measure; empty: all that can run


@dataclass(frozen=True)
class Plan:
    """The measurements for one kind of device."""

    entries: tuple[Entry, ...]
    picture: Size  # the head whose time and memory are drawn against the sequence length
    lengths: tuple[int, ...]
    rounds: int
    settling: float = 0.0  # seconds of load in each turn
    enough: float = math.inf  # seconds of steps after which a contender takes no more turns

    @property
    def all_entries(self) -> list[Entry]:
        """The entries, and those that only the picture's lines need."""
        known = [entry.size for entry in self.entries]
        return [*self.entries, *(Entry(size) for size in self.picture_sizes if size not in known)]

    def of_cases(self, cases: list[str]) -> "Plan":
        """Return a plan of these cases alone, without the picture's lengths."""
        chosen = [replace(entry, cases=tuple(case for case in entry.cases if case in cases)) for entry in self.entries]
        return replace(self, entries=tuple(entry for entry in chosen if entry.cases), lengths=())

    @property
    def picture_sizes(self) -> list[Size]:
        return [replace(self.picture, seq_len=length) for length in self.lengths]


def on_gpu(head: str, hidden: int, vocab: int, softcap: float | None = None) -> Size:
    return Size(head, hidden, vocab, batch=8, seq_len=2048, dtype=torch.bfloat16, softcap=softcap)


def of(heads: str, *losses: str) -> tuple[str, ...]:
    """Return the cases of some losses, for one or both of "trained frozen"."""
    return tuple(f"{loss} {head}" for loss in losses for head in heads.split())


SMALL = Size("small head", hidden=256, vocab=32000, batch=4, seq_len=128, dtype=torch.float32)
MEDIUM = Size("medium head", hidden=1024, vocab=16384, batch=4, seq_len=512, dtype=torch.float32)
# A sequence has 4096 completion tokens, its chunks 1024: of the budget, which is that of 4 gradients of the LM head, a
# pair's two accumulators take half.
LONG = Size(
    "long sequences",
    hidden=1024,
    vocab=16384,
    batch=2,
    seq_len=8192,
    dtype=torch.float32,
    chunk_bytes=4 * 4 * 16384 * 1024 + 2**21,
    is_reference_known=True,
)
QWEN_05B, QWEN_8B = on_gpu("Qwen2.5-0.5B", 896, 151936), on_gpu("Qwen3-8B", 4096, 151936)
# A sequence has 8192 completion tokens, its chunks 2048 or a few more: an accumulator takes a third of the budget.
LONG_ON_GPU = replace(
    QWEN_05B,
    head="Qwen2.5-0.5B, long sequences",
    batch=4,
    seq_len=16384,
    chunk_bytes=3 * 2**29,
    is_reference_known=True,
)

PLANS = {
    "cpu": Plan(
        entries=(
            Entry(SMALL, compiled=True),
            Entry(MEDIUM, of("trained frozen", "kto"), compiled=True),
            Entry(MEDIUM, of("trained frozen", "dpo", "orpo", "nll", "ppo", "ppo-clipped")),
            Entry(LONG, of("trained", "kto", "dpo", "nll"), only=("kto-fused",)),
        ),
        picture=SMALL,
        lengths=(128, 256, 512),
        rounds=4,
        enough=4.0,
    ),
    "cuda": Plan(
        entries=(
            Entry(QWEN_05B, ("kto trained", "kto frozen"), compiled=True),
            Entry(QWEN_05B, of("trained", "dpo", "orpo", "nll", "ppo", "ppo-clipped")),
            Entry(QWEN_8B, ("kto trained", "kto frozen"), compiled=True),
            Entry(QWEN_8B, of("trained", "dpo", "orpo", "nll", "ppo", "ppo-clipped")),
            Entry(on_gpu("Llama-3.2-1B", 2048, 128256)),
            Entry(on_gpu("Llama-3-8B", 4096, 128256)),
            Entry(on_gpu("Gemma-3-4B", 2560, 262208)),
            Entry(on_gpu("Gemma-3-4B", 2560, 262208, softcap=30.0)),
            Entry(LONG_ON_GPU, of("trained", "kto", "nll"), only=("kto-fused", "TRL")),
        ),
        picture=QWEN_05B,
        lengths=(512, 2048, 8192),
        rounds=3,
        settling=0.4,
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
    loss_error: float | None = None
    logp_error: float | None = None
    hidden_gradient_error: float | None = None
    weight_gradient_error: float | None = None


@dataclass
class Truth:
    """The log-probabilities of the completion tokens in float64, which are those of every case of one size."""

    token_logps: torch.Tensor  # [B, T-1], 0 where masked
    ref_logps: torch.Tensor  # [B]


class Expected(NamedTuple):
    """What a step should give, in float64."""

    loss: torch.Tensor
    logps: torch.Tensor  # [B]
    by_last_hidden: torch.Tensor  # [T, H], the gradient w.r.t. the hidden states of the last sequence
    by_weight: torch.Tensor | None  # [SAMPLED_ROWS, H], w.r.t. sampled rows of the weight; None for a frozen head


def sampled_rows(problem: Problem) -> torch.Tensor:
    """Return the indices of `SAMPLED_ROWS` rows of the weight, evenly spaced over the vocabulary."""
    vocab = len(problem.weight)
    return torch.arange(0, vocab, max(1, vocab // SAMPLED_ROWS), device=problem.weight.device)[:SAMPLED_ROWS]


def pieces(problem: Problem) -> Iterator[tuple[int, slice]]:
    """Yield (sequence, positions) for all positions from the last prompt token on, `EXACT_TOKENS` at a time.

    Earlier positions predict only prompt tokens.
    """
    batch, seq_len = problem.labels.shape
    for sequence in range(batch):
        for start in range(seq_len // 2 - 1, seq_len - 1, EXACT_TOKENS):
            yield sequence, slice(start, min(start + EXACT_TOKENS, seq_len - 1))


def exact_token_logps(problem: Problem, logits: torch.Tensor, sequence: int, positions: slice) -> torch.Tensor:
    """Return the log-probabilities of the tokens that some positions predict, by `kto_fused.reference`."""
    targets = problem.labels[sequence : sequence + 1, 1:][:, positions]
    return reference.token_logps(logits[None], targets, shift=False, logit_softcap=problem.softcap)[0]


@torch.no_grad()
def exact(problem: Problem) -> Truth:
    """Compute the log-probabilities of policy and reference model."""
    token_logps = torch.zeros_like(problem.mask, dtype=torch.float64)
    ref_token_logps = torch.zeros_like(token_logps)
    for hidden, weight, results in (
        (problem.hidden, problem.weight, token_logps),
        (problem.ref_hidden, problem.ref_weight, ref_token_logps),
    ):
        weight = weight.double()
        for piece in pieces(problem):
            results[piece] = exact_token_logps(problem, hidden[piece].double() @ weight.T, *piece)
    return Truth(token_logps, ref_token_logps.sum(-1))


def exact_loss(problem: Problem, token_logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """Return the loss in float64 from the log-probabilities of tokens [B, T-1] and of the reference's sequences [B]."""
    logps, mask = token_logps.sum(-1), problem.mask
    if problem.loss == "kto":
        return reference.kto_loss_from_logps(logps, ref_logps, problem.desirable, reference_point=0.0, beta=BETA)[0]
    if problem.loss == "dpo":
        return reference.dpo_loss_from_logps(logps, ref_logps, beta=BETA)[0]
    if problem.loss == "orpo":
        return reference.loss_from_logps(problem.head, logps, token_counts=mask.sum(-1))[0]
    tensors = {}
    if problem.loss.startswith("ppo"):
        advantages = problem.advantages[:, None].expand_as(mask)
        tensors = {"old_logps": problem.old_logps[:, 1:][mask].double(), "advantages": advantages[mask].double()}
    return problem.head.losses(token_logps[mask], mask.sum(-1), None, **tensors).mean()


def expect(problem: Problem, truth: Truth) -> Expected:
    """Compute loss and gradients: d loss / d log-probabilities first, then d loss / d logits of a piece of tokens."""
    token_logps, rows = truth.token_logps.clone().requires_grad_(), sampled_rows(problem)
    ref_logps = truth.ref_logps if problem.ref_logps is None else problem.ref_logps.double()
    loss = exact_loss(problem, token_logps, ref_logps)
    (by_logps,) = torch.autograd.grad(loss, token_logps)
    weight = problem.weight.detach().double()
    by_last_hidden = torch.zeros_like(problem.hidden[-1], dtype=torch.float64)
    by_weight = weight.new_zeros(len(rows), weight.shape[1]) if problem.is_trained else None
    last = len(problem.labels) - 1
    for sequence, positions in pieces(problem):
        if by_weight is None and sequence < last:
            continue
        hidden = problem.hidden[sequence, positions].detach().double()
        logits = (hidden @ weight.T).requires_grad_()
        logps = exact_token_logps(problem, logits, sequence, positions)
        (by_logits,) = torch.autograd.grad(logps, logits, by_logps[sequence, positions])
        if by_weight is not None:
            by_weight += by_logits[:, rows].T @ hidden
        if sequence == last:
            by_last_hidden[positions] = by_logits @ weight
    return Expected(loss.detach(), truth.token_logps.sum(-1), by_last_hidden, by_weight)


def relative(difference: torch.Tensor, truth: torch.Tensor) -> float:
    return (difference.norm() / truth.norm()).item()


class HiddenTurn(Turn):
    """A contender's whole step: the reference model's forward pass, the policy's forward and backward pass."""

    def __init__(self, name: str, contender: Contender, problem: Problem, expected: Expected | None):
        super().__init__(name)
        self.contender, self.problem, self.expected = contender, problem, expected

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
        problem, expected = self.problem, self.expected
        errors = {
            "loss_error": (self.loss.detach().double() - expected.loss).abs().item(),
            "hidden_gradient_error": relative(
                problem.hidden.grad[-1].double() - expected.by_last_hidden, expected.by_last_hidden
            ),
        }
        if self.logps is not None:
            errors["logp_error"] = (self.logps.detach().double() - expected.logps).abs().max().item()
        if problem.is_trained:
            sample = problem.weight.grad[sampled_rows(problem)].double()
            errors["weight_gradient_error"] = relative(sample - expected.by_weight, expected.by_weight)
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
    expected, device = expect(problem, truth), problem.hidden.device
    turns = [*(HiddenTurn(name, contender, problem, expected) for name, contender in found.items()), FloorTurn(problem)]
    turns = take_turns(turns, plan.rounds, title(case, size), left_out, device, plan.settling, plan.enough)
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
    return f"{LOSSES[loss]}, head {head}, {size}"


def cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def tables(report: dict) -> str:
    """Return the report's Markdown."""
    enough = f"; after {report['enough']:g} s of steps a contender took no more of them" if report["enough"] else ""
    lines = [
        f"# From hidden states, {report['device']}",
        "",
        f"{machine_line(report)} A step is the policy's forward and backward pass and, for KTO and DPO, the reference "
        f"model's forward pass; half of each sequence is prompt. Times are medians of {report['rounds']} rounds in "
        f"which the contenders took turns{settled(report['settling'])}{enough}. {how_timed(report['device'])} {FLOOR}: "
        "the same matrix products on completion tokens, in the input dtype, into buffers allocated before; the tokens "
        "that PPO clips take no part in the gradients' products. With long sequences the reference's log-probabilities "
        "are given. Peak memory is all that a step allocates beside its inputs, the gradients included. Errors are "
        "differences from float64 on the same inputs: that of the loss; the largest of a sequence's log-probability, "
        "in nats; that of the gradient w.r.t. the last sequence's hidden states and w.r.t. "
        f"{SAMPLED_ROWS} rows of the head, relative to the gradient's norm. Liger's KTO, cross-entropy and clipped "
        "loss return no log-probabilities.",
    ]
    for case, size in dict.fromkeys((row["case"], row["size"]) for row in report["rows"]):
        rows = [row for row in report["rows"] if (row["case"], row["size"]) == (case, size)]
        lines += [
            "",
            f"## {title(case, size)}",
            "",
            f"The gradients themselves take {rows[0]['gradient_mib']:.0f} MiB.",
            "",
            f"| {' | '.join(COLUMNS)} |",
            f"|---|{'---:|' * (len(COLUMNS) - 1)}",
        ]
        for row in rows:
            errors = [row[name] for name in ERRORS]
            lines.append(
                f"| {row['contender']} | {row['ms']:.2f} | {row['times_gemms']:.2f} | {cell(row['peak_mib'], '.0f')} "
                f"| {' | '.join(cell(error, '.1e') for error in errors)} |"
            )
        lines += left_out_line(report, title(case, size))
    return "\n".join(lines) + "\n"


def run(device: torch.device, plan: Plan, out: Path) -> None:
    """Measure the plan and write JSON, tables and picture to `out`."""
    report = new_report(device, plan.rounds) | {
        "settling": plan.settling,
        "enough": None if math.isinf(plan.enough) else plan.enough,
    }
    for entry in plan.all_entries:
        size = entry.size
        free(device)
        inputs = make_problem(size.batch, size.seq_len, size.hidden, size.vocab, size.dtype, size.softcap, device)
        inputs.chunk_bytes = size.chunk_bytes
        truth = exact(inputs)
        for case in entry.cases:
            loss, head = case.split()
            if entry.compiled:
                torch.compiler.reset()  # compile for this case alone: no dynamic shapes, no recompilation limit reached
            found = contenders(device, loss, size.softcap, entry.compiled)
            if entry.only:
                found = {name: found[name] for name in entry.only if name in found}
            problem = inputs.posed(
                loss, head == "trained", truth.ref_logps.float() if size.is_reference_known else None
            )
            rows = measure(problem, truth, case, size, found, plan, report["left_out"])
            for row in rows:
                print(f"{title(case, size)}: {row.contender:24} {row.ms:9.2f} ms {row.times_gemms:6.2f} x", flush=True)
            report["rows"] += [asdict(row) for row in rows]
            write(report, tables, out, "-hidden")
    results = path_of(report, out, "-hidden.json")
    for path in (results, results.with_suffix(".md"), *pictures.redraw(results)):
        print(f"wrote {path}")
