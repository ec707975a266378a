"""autograd.Functions: hidden states and an LM head in; the logits exist for one chunk of completion tokens at a time.

Forward:   hidden --chunk of tokens--> logits --rows--> token log-probabilities --sequences--> [B] --loss head--> loss
           and its gradient by [B], hence by the chunk's tokens: logits become their own gradient and meet both GEMMs
Backward:  the gradients found in the forward, scaled by the incoming one

How many GEMMs of 2 N H V that is, with N completion tokens:

1  no gradient
2  the head is frozen: d logp / d hidden needs no loss, so chunks may split sequences
3  the head is trained: a chunk holds whole sequences, whose loss gradient is known before its logits are dropped
4  the head is trained, and a sequence exceeds the chunk, or the loss couples sequences that do not fit one chunk, or
   each sequence's gradient comes from outside (``reduction="none"``, log-probabilities): once the loss is known, a
   second visit computes the logits again
"""

import logging
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Optional

import torch

from . import heads
from .backends import HAS_TRITON, on_device, opaque
from .first_derivative import first_derivative_only
from .from_logits import LogitOptions, sequence_backward, sequence_sums
from .layout import CompletionTokens, check_contents, completion_tokens, compute_dtype, row_targets
from .projection import NUM_STATISTICS, ChunkSpec, FoldedRows, Keeps, LMHead, WholeRows, move_rows
from .torch_backend import BLOCK_BYTES

# One chunk for all tokens writes the weight's gradient once, and needs no float32 sum of it. How many times the memory
# of several chunks and their sum it may take on the first visit, and on the second:
ONE_CHUNK_MEMORY = 1.05
ONE_CHUNK_MEMORY_AGAIN = 0.75
# How many times ``chunk_bytes`` it may take on the second; more only with the narrowest panels.
ONE_CHUNK_BUDGETS_AGAIN = 2
# Bytes of a position while the completion tokens are looked for, before the first chunk is made.
SEARCH_BYTES = 80

logger = logging.getLogger(__name__)
_exceeded_budgets: set[int] = set()  # of which a warning was given


@dataclass(frozen=True)
class HiddenOptions:
    """How hidden states become log-probabilities; validated by the caller."""

    logits: LogitOptions
    dtype: torch.dtype  # what the GEMMs read
    ref_dtype: torch.dtype  # the same, for the reference's
    chunk_bytes: int
    # for which of hidden, weight and bias a gradient is wanted
    needs: tuple[bool, bool, bool] = (False, False, False)
    # whether results are each position's own, not each sequence's
    per_position: bool = False

    @property
    def is_head_trained(self) -> bool:
        return self.needs[1] or self.needs[2]

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.dtype)


# ---- engine -------------------------------------------------------------------------------------------------------


class _Engine:
    """One model's completion tokens through its LM head, a chunk at a time."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        tokens: CompletionTokens,
        chunk: WholeRows | FoldedRows | None,
        options: HiddenOptions,
        weight_dtype: torch.dtype,
    ):
        """``weight`` in the GEMMs' dtype; ``weight_dtype`` is the parameter's own."""
        self.hidden = hidden if hidden.ndim == 3 else hidden[None]
        compute = options.compute_dtype
        self.lm_head = LMHead(weight, None if bias is None else bias.to(compute).contiguous())
        self.tokens, self.chunk, self.options = tokens, chunk, options
        # logps, entropy, mean_logits and is_top1 of each token; 0 until its chunk was visited
        self.per_token = hidden.new_zeros(4, len(tokens.rows), dtype=compute)
        self.statistics = None
        self.grad_hidden = None
        if options.needs[0]:
            self.grad_hidden = hidden.new_zeros(hidden.shape, dtype=held_dtype(hidden.dtype))
        self.weight_dtype = held_dtype(weight_dtype)
        self.bias_dtype = None if bias is None else held_dtype(bias.dtype)
        self.weight_sum = self.bias_sum = None

    def forward(self, start: int, stop: int, *, keep: bool = False) -> None:
        """Log-probabilities of tokens start..stop; ``keep`` in the chunk what their gradient needs."""
        self._gather(start, stop)
        # a copy, as below: where a slice starts would be one more thing that kernels are compiled for
        targets = self.tokens.targets[start:stop].clone()
        self.per_token[:, start:stop] = self.chunk.forward(self.chunk_hidden, self.lm_head, targets, keep)
        if self.statistics is not None:
            for values, statistic in zip(self.statistics, self.chunk.statistics, strict=True):
                values[start:stop] = statistic

    def start_statistics(self) -> None:
        """For a second visit: what the first visit's chunks say of each token's logits, [3, B T]. Of these N are used:
        an operator's output has a shape that must be known before the tokens are counted.
        """
        num_positions = self.hidden.shape[:-1].numel()
        self.statistics = self.hidden.new_zeros(NUM_STATISTICS, num_positions, dtype=self.options.compute_dtype)

    def _gather(self, start: int, stop: int) -> None:
        rows = self.tokens.rows[start:stop]
        self.chunk_hidden = None  # the last chunk's goes before this one's comes
        self.chunk_hidden = self.hidden.new_empty(len(rows), self.hidden.shape[-1], dtype=self.options.dtype)
        move_rows(self.hidden, self.chunk_hidden, self.options.logits.backend, source_rows=rows)

    def backward(self, start: int, stop: int, token_grads: torch.Tensor) -> None:
        """Add the gradients of tokens start..stop, whose logits are in the chunk."""
        self.chunk.backward(token_grads[start:stop])
        self._write_hidden_gradient(start, stop)
        self._add_head_gradients(slice(None), add=start > 0)

    def visit_again(self, start: int, stop: int, token_grads: torch.Tensor) -> None:
        """Add the gradients of tokens start..stop by what ``statistics`` says of their logits, computed once more."""
        self._gather(start, stop)
        targets = self.tokens.targets[start:stop].clone()
        statistics = self.statistics[:, start:stop].contiguous()
        grads = token_grads[start:stop]
        for panel in self.chunk.again(self.chunk_hidden, self.lm_head, targets, statistics, grads):
            self._add_head_gradients(panel, add=start > 0)
        self._write_hidden_gradient(start, stop)

    def _write_hidden_gradient(self, start: int, stop: int) -> None:
        if self.grad_hidden is not None:
            grad, factors = self.chunk.hidden_gradient(self.lm_head)
            rows, backend = self.tokens.rows[start:stop], self.options.logits.backend
            move_rows(grad, self.grad_hidden.view(-1, grad.shape[1]), backend, target_rows=rows, factors=factors)

    def _add_head_gradients(self, panel: slice, *, add: bool) -> None:
        if self.weight_sum is not None:
            self.chunk.add_weight_gradient(self.weight_sum[panel], self.chunk_hidden, add=add)
        if self.bias_sum is not None:
            self.chunk.add_bias_gradient(self.bias_sum[panel])

    def start_sums(self, weight_sum: torch.Tensor | None) -> None:
        """Of the head's gradients; the first chunk overwrites ``weight_sum``."""
        self.weight_sum = weight_sum
        if self.options.needs[2]:
            bias = self.lm_head.bias
            self.bias_sum = bias.new_zeros(bias.shape, dtype=self.options.compute_dtype)

    def scale_hidden_gradient(self, token_grads: torch.Tensor, ranges: list[tuple[int, int]]) -> None:
        """Turn d token log-probability / d hidden into d loss / d hidden."""
        self.chunk = self.chunk_hidden = None  # no longer needed
        backend, hidden_size = self.options.logits.backend, self.hidden.shape[-1]
        grads = self.grad_hidden.view(self.hidden.shape), self.grad_hidden.view(-1, hidden_size)
        for start, stop in ranges:
            rows = self.tokens.rows[start:stop]
            move_rows(*grads, backend, source_rows=rows, target_rows=rows, factors=token_grads[start:stop])

    def sequences(self) -> tuple[torch.Tensor, ...]:
        """(logps, token counts, mean entropy, mean logit, token accuracy) of the batch's sequences, each [B]."""
        logits = self.options.logits
        sums = sequence_sums(
            self.tokens.targets,
            self.per_token,
            self.tokens.offsets,
            len(self.tokens.counts),
            logits.average_log_prob,
            logits.backend,
        )
        return tuple(self.tokens.unpack(values) for values in sums)

    def positions(self) -> tuple[torch.Tensor, ...]:
        """The same of each position by itself, [rows]: logp, 1 where it is a completion token, entropy, mean logit and
        is_top1; 0 where it is none.
        """
        num_rows = self.hidden.shape[0] * self.hidden.shape[1]

        def spread(values: torch.Tensor) -> torch.Tensor:
            return values.new_zeros(num_rows).index_copy_(0, self.tokens.rows, values)

        logps, *metrics = (spread(values) for values in self.per_token)
        return logps, spread(torch.ones_like(self.tokens.rows)), *metrics

    def token_grads(self, logp_grads: torch.Tensor) -> torch.Tensor:
        """d loss / d token log-probability [N] from d loss / d log-probability, each sequence's [B] or position's."""
        if self.options.per_position:
            return logp_grads[self.tokens.rows].to(self.options.compute_dtype)
        return sequence_backward(
            self.tokens.targets,
            self.tokens.offsets.diff(),
            None,
            self.tokens.pack(logp_grads),
            self.tokens.offsets,
            self.options.logits.average_log_prob,
            self.options.compute_dtype,
            self.options.logits.backend,
        )

    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        """By hidden, weight and bias, as they are held; None where not wanted. Lets go of the chunk."""
        self.chunk = self.chunk_hidden = None  # before the rounded gradients take their memory
        return (
            self.grad_hidden,
            None if self.weight_sum is None else self.weight_sum.to(self.weight_dtype),
            None if self.bias_sum is None else self.bias_sum.to(self.bias_dtype),
        )


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient between forward and backward. A float16 one would underflow: no loss scaling has reached it yet."""
    return torch.float32 if dtype == torch.float16 else dtype


# ---- which tokens are in which chunk ------------------------------------------------------------------------------


class _Room(NamedTuple):
    """What a first visit's chunks are made for where their loss is known in time, and how many tokens one holds."""

    spec: ChunkSpec
    usual: int  # with several sequences: as many as its GEMMs need, or as are worth their memory
    most: int  # as fit the budget
    most_alone: int  # the same where it is the only one


class _Plan(NamedTuple):
    """A visit to all tokens: what its chunks are made for, which tokens are in which, and whether the loss of a chunk's
    sequences is known before its logits are dropped.
    """

    spec: ChunkSpec
    ranges: list[tuple[int, int]]
    is_loss_in_time: bool = False


def _room(weight: torch.Tensor, options: HiddenOptions) -> _Room:
    keeps = "all" if options.is_head_trained else "panels" if options.needs[0] else "nothing"
    spec = _chunk_spec(weight, options, keeps)
    alone, most = _lone_chunk_spec(weight, options, spec), spec.capacity()
    usual = min(most, spec.enough_tokens)
    if keeps == "all" and spec.kind is FoldedRows:
        # several chunks go with a float32 sum of the weight's gradient: up to its size they are not what takes most
        enough_bytes = max(spec.num_bytes // 2, weight.numel() * spec.compute_dtype.itemsize)
        usual = min(usual, replace(spec, num_bytes=enough_bytes).capacity())
    return _Room(spec, usual, most, most if alone == spec else alone.capacity())


def _plan(
    counts: list[int],
    room: _Room,
    weight: torch.Tensor,
    options: HiddenOptions,
    *,
    is_total: bool,
    paired: bool,
    couples: bool,
) -> _Plan:
    """The first visit to sequences of ``counts`` tokens. Where their loss is one number, ``is_total``, and known in
    time, it is the only one.
    """
    num_tokens = sum(counts)
    if is_total and any(options.needs) and num_tokens:
        alone = _lone_chunk_spec(weight, options, room.spec)
        several = None if couples else _whole_ranges(counts, room, 2 if paired else 1)
        if several is None:
            is_one = num_tokens <= room.most_alone
        else:
            limit = ONE_CHUNK_MEMORY * _several_bytes(several, weight, options, room.spec)
            is_one = len(several) == 1 or alone.size(num_tokens) <= limit
        if is_one:
            return _Plan(alone, [(0, num_tokens)], is_loss_in_time=True)
        if several is not None:
            return _Plan(room.spec, several, is_loss_in_time=True)
    if room.spec.keeps == "all":  # the loss comes too late for what would be kept
        spec = _chunk_spec(weight, options, "nothing")
        return _Plan(spec, _even_ranges(num_tokens, spec.capacity()))
    return _Plan(room.spec, _even_ranges(num_tokens, room.usual))


def _plan_again(num_tokens: int, weight: torch.Tensor, options: HiddenOptions) -> _Plan:
    """The second visit. Where it saves a quarter of the memory of several chunks and their sum, one chunk in panels may
    exceed ``chunk_bytes``: up to twice, or as far as its narrowest panels do.
    """
    spec = _chunk_spec(weight, options, "panels")
    ranges = _even_ranges(num_tokens, spec.capacity())
    if len(ranges) > 1 and spec.kind is FoldedRows:
        limit = int(ONE_CHUNK_MEMORY_AGAIN * _several_bytes(ranges, weight, options, spec))
        alone = replace(spec, num_bytes=min(limit, ONE_CHUNK_BUDGETS_AGAIN * spec.num_bytes))
        if alone.size(num_tokens) <= limit:
            return _Plan(alone, [(0, num_tokens)])
    return _Plan(spec, ranges)


def _even_ranges(num_tokens: int, limit: int) -> list[tuple[int, int]]:
    """As few chunks as fit, of nearly equal size."""
    count = -(-num_tokens // limit)
    return [(num_tokens * i // count, num_tokens * (i + 1) // count) for i in range(count)]


def _whole_ranges(counts: list[int], room: _Room, group: int) -> list[tuple[int, int]] | None:
    """Chunks of whole groups of sequences; None where one group alone is more than a chunk can hold."""
    ranges, start, stop = [], 0, 0
    for first in range(0, len(counts), group):
        size = sum(counts[first : first + group])
        if size > room.most:
            return None
        if stop + size - start > room.usual and stop > start:
            ranges.append((start, stop))
            start = stop
        stop += size
    if stop > start:
        ranges.append((start, stop))
    return ranges


def _several_bytes(ranges: list[tuple[int, int]], weight: torch.Tensor, options: HiddenOptions, spec: ChunkSpec) -> int:
    """The most that several chunks take beyond the weight's gradient itself: a chunk beside the float32 sum, or the
    whole sum beside its rounded copy. 0 where one chunk would write a gradient as wide as the sum.
    """
    wide, held = weight.numel() * spec.compute_dtype.itemsize, weight.nbytes
    if not options.needs[1] or spec.grad_dtype != weight.dtype or wide == held:
        return 0
    return max(spec.size(_longest(ranges)) + wide - held, wide)


def _longest(ranges: list[tuple[int, int]]) -> int:
    return max((stop - start for start, stop in ranges), default=0)


def _chunk_spec(weight: torch.Tensor, options: HiddenOptions, keeps: Keeps) -> ChunkSpec:
    logits = options.logits
    return ChunkSpec(
        *weight.shape,
        dtype=options.dtype,
        device=weight.device,
        backend=logits.backend,
        keeps=keeps,
        transform={"scale": logits.logit_scale, "softcap": logits.logit_softcap, "factor": logits.factor},
        by_hidden=options.needs[0],
        by_head=options.is_head_trained,
        num_bytes=options.chunk_bytes,
    )


def _lone_chunk_spec(weight: torch.Tensor, options: HiddenOptions, spec: ChunkSpec) -> ChunkSpec:
    """Of a chunk of all tokens, whose buffer may lie where its last GEMM writes the weight's gradient."""
    if spec.keeps != "all" or not options.needs[1]:
        return spec
    return replace(spec, lent_bytes=weight.numel() * _sum_dtype(1, weight, spec).itemsize)


def _sum_dtype(num_chunks: int, weight: torch.Tensor, spec: ChunkSpec) -> torch.dtype:
    """Of the weight's gradient while chunks add to it; the sum of several is rounded once, at its end."""
    held = held_dtype(weight.dtype)
    return held if num_chunks == 1 and spec.grad_dtype == held else spec.compute_dtype


def _empty_weight_sum(plan: _Plan, weight: torch.Tensor, options: HiddenOptions) -> torch.Tensor | None:
    """For the weight's gradient, which the first chunk writes."""
    if not options.needs[1]:
        return None
    total = weight.new_empty(weight.shape, dtype=_sum_dtype(len(plan.ranges), weight, plan.spec))
    return total if plan.ranges else total.zero_()


def _make_chunk(plan: _Plan, lent: torch.Tensor | None = None) -> WholeRows | FoldedRows:
    longest, spec = _longest(plan.ranges), plan.spec
    return FoldedRows(longest, spec, lent) if spec.kind is FoldedRows else WholeRows(longest, spec)


def largest_chunk(
    counts: list[int], weight: torch.Tensor, options: HiddenOptions, *, paired: bool
) -> tuple[WholeRows | FoldedRows, torch.Tensor | None]:
    """(the longest chunk, what the weight's gradient adds up in) of a loss as a whole that does not couple its batch,
    with sequences of ``counts`` completion tokens; of two visits those of the second, which takes more.
    """
    room = _room(weight, options)
    plan = _plan(counts, room, weight, options, is_total=True, paired=paired, couples=False)
    if room.spec.keeps == "all" and not plan.is_loss_in_time:
        plan = _plan_again(sum(counts), weight, options)
    weight_sum = _empty_weight_sum(plan, weight, options)
    return _make_chunk(plan, weight_sum if plan.spec.lent_bytes else None), weight_sum


def _beside_bookkeeping(num_positions: int, weight: torch.Tensor, options: HiddenOptions) -> HiddenOptions:
    """``options`` whose ``chunk_bytes`` are what the tokens' own numbers leave of the budget, on the PyTorch engine.

    A position's numbers are its row and target, and in the compute dtype its four results, its gradient and, for a
    second visit, its statistics. (On a GPU they are less than the allocator's own rounding of a chunk.) A budget that
    holds no token beside them is exceeded by the least that is possible; a warning says by which size.
    """
    if options.logits.backend != "torch":
        return options
    numbers = 6 + NUM_STATISTICS * options.is_head_trained
    held = num_positions * (12 + numbers * options.compute_dtype.itemsize)
    keeps = "panels" if any(options.needs) else "nothing"
    least = max(held + _chunk_spec(weight, options, keeps).size(1), SEARCH_BYTES * num_positions)
    if options.chunk_bytes < least and options.chunk_bytes not in _exceeded_budgets:
        _exceeded_budgets.add(options.chunk_bytes)
        logger.warning(
            "chunk_bytes=%d is exceeded: one token of this LM head beside the numbers of %d positions takes %d bytes, "
            "the least that is possible",
            options.chunk_bytes,
            num_positions,
            least,
        )
    return replace(options, chunk_bytes=max(1, options.chunk_bytes - held))


# ---- forward and backward -----------------------------------------------------------------------------------------


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    options: HiddenOptions,
    head: Any,
    reference: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    ref_logps: torch.Tensor | None,
    head_tensors: tuple[torch.Tensor | None, ...],
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None, tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...]]:
    """``(sequences, ref_logps, (loss, head_grads, *reported), gradients, statistics)``.

    ``sequences`` is (logps, token_counts, entropy, mean_logits, token_accuracy), each [B]; or of each position,
    ``_Engine.positions``. ``reference`` is the reference's (hidden, weight, bias).

    Three cases. The loss is one number: the gradients are by it. It is not (one value per sequence or pair, or no
    head), and the LM head is frozen: the gradient by hidden is of each token's own log-probability, for the backward
    to scale. It is not, and the LM head is trained: there are no gradients, but ``statistics`` for ``backward``, else
    None.
    """
    is_total = head is not None and head.reduction != "none"
    is_left_to_backward = not is_total and options.is_head_trained
    options = _beside_bookkeeping(labels.numel(), weight, options)
    if is_left_to_backward:
        options = replace(options, needs=(False, False, False))
    paired = is_total and head.paired  # a chunk holds whole pairs
    room = _room(weight, options)  # before the host waits for the device
    tokens = _find_tokens(weight, labels, cu_seqlens, options, paired)
    couples = is_total and head.couples_batch(*head_tensors)
    plan = _plan(tokens.counts, room, weight, options, is_total=is_total, paired=paired, couples=couples)
    weight_sum = _empty_weight_sum(plan, weight, options) if plan.spec.lent_bytes else None

    chunk = gemm_weight = None
    if reference[0] is not None:
        ref_logps, chunk, gemm_weight = _reference_logps(reference, tokens, plan, weight, weight_sum, options)
    if gemm_weight is None:
        gemm_weight = weight.to(options.dtype)
    chunk = chunk or _make_chunk(plan, weight_sum)
    engine = _Engine(hidden, gemm_weight, bias, tokens, chunk, options, weight.dtype)
    del chunk

    def apply_head() -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        values = engine.positions() if options.per_position else engine.sequences()
        return values, () if head is None else head(*values[:2], ref_logps, *head_tensors)

    if plan.is_loss_in_time:
        engine.start_sums(_empty_weight_sum(plan, weight, options) if weight_sum is None else weight_sum)
        for start, stop in plan.ranges:
            engine.forward(start, stop, keep=True)
            # of sequences yet to come the log-probability is 0 here; their gradients are not looked at
            values, results = apply_head()
            engine.backward(start, stop, engine.token_grads(results[1]))
    else:
        ones = torch.ones_like(engine.per_token[0])
        is_direction = plan.spec.keeps == "panels"  # d logp / d hidden, which needs no loss
        if is_left_to_backward or options.is_head_trained:
            engine.start_statistics()
        for start, stop in plan.ranges:
            engine.forward(start, stop, keep=is_direction)
            if is_direction:
                engine.backward(start, stop, ones)
        values, results = apply_head()
        if is_total and any(options.needs):
            token_grads = engine.token_grads(results[1])
            if is_direction:
                engine.scale_hidden_gradient(token_grads, plan.ranges)
            else:
                _visit_again(engine, weight, token_grads)
    statistics = engine.statistics if is_left_to_backward else None
    return values, ref_logps, results, engine.gradients(), statistics


def _find_tokens(
    weight: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor | None, options: HiddenOptions, paired: bool
) -> CompletionTokens:
    layout = {"ignore_index": options.logits.ignore_index, "shift": options.logits.shift, "vocab_size": len(weight)}
    check_contents(labels, cu_seqlens, **layout)
    return completion_tokens(labels, cu_seqlens, paired=paired, **layout)


def _reference_logps(
    reference: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    tokens: CompletionTokens,
    plan: _Plan,
    weight: torch.Tensor,
    weight_sum: torch.Tensor | None,
    options: HiddenOptions,
) -> tuple[torch.Tensor, WholeRows | FoldedRows | None, torch.Tensor | None]:
    """Its log-probabilities [B]; and what serves the policy too: the chunk, the ``weight`` as the GEMMs read it."""
    hidden, ref_weight, bias = reference
    # a copy under autocast: one at a time, or one for both
    is_shared = ref_weight.is_set_to(weight) and options.ref_dtype == options.dtype
    ref_weight = ref_weight.to(options.ref_dtype)
    ref_options, chunk = replace(options, dtype=options.ref_dtype, needs=(False, False, False)), None
    num_tokens, spec = len(tokens.rows), _chunk_spec(ref_weight, ref_options, "nothing")
    limit = spec.capacity()
    if ref_options.dtype == options.dtype and not _takes_fewer(spec, ref_weight, num_tokens, plan):
        chunk = _make_chunk(plan, weight_sum)
        most = max(1, chunk.num_tokens)
        # it was made for hidden states of the policy's width
        limit = min(limit, most) if ref_weight.shape[1] > weight.shape[1] else most
    ranges = _even_ranges(num_tokens, limit)
    ref_chunk = chunk or _make_chunk(_Plan(spec, ranges))
    engine = _Engine(hidden, ref_weight, bias, tokens, ref_chunk, ref_options, ref_weight.dtype)
    for start, stop in ranges:
        engine.forward(start, stop)
    return engine.sequences()[0], chunk, ref_weight if is_shared else None


def _takes_fewer(spec: ChunkSpec, ref_weight: torch.Tensor, num_tokens: int, plan: _Plan) -> bool:
    """Whether the reference takes fewer chunks of its own, before the policy's take their memory. Not where tiles in
    memory would be others than the policy's: of equal models the log-ratios would no longer be exactly 0. (The last
    columns, less than a tile of registers', go through memory all the same, and may be rounded otherwise there.)
    """
    if spec.kind is not FoldedRows or not spec.goes_through_registers(ref_weight):
        return False
    shared, own = (max(1, size) for size in (_longest(plan.ranges), min(num_tokens, spec.enough_tokens)))
    is_fewer = len(_even_ranges(num_tokens, own)) < len(_even_ranges(num_tokens, shared))
    return is_fewer and spec.size(own) <= spec.num_bytes


def _visit_again(engine: _Engine, weight: torch.Tensor, token_grads: torch.Tensor) -> None:
    """Compute the logits once more, and all gradients."""
    engine.chunk = None  # before the other takes its memory
    plan = _plan_again(len(engine.tokens.rows), weight, engine.options)
    engine.chunk = _make_chunk(plan)
    engine.start_sums(_empty_weight_sum(plan, weight, engine.options))
    for start, stop in plan.ranges:
        engine.visit_again(start, stop, token_grads)


def backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    logp_grads: torch.Tensor,
    statistics: torch.Tensor,
    options: HiddenOptions,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients by hidden, weight and bias from d loss / d logps, shaped as they are, and ``forward``'s statistics."""
    options = _beside_bookkeeping(labels.numel(), weight, options)
    tokens = _find_tokens(weight, labels, cu_seqlens, options, paired=False)
    engine = _Engine(hidden, weight.to(options.dtype), bias, tokens, None, options, weight.dtype)
    engine.statistics = statistics
    _visit_again(engine, weight, engine.token_grads(logp_grads))
    return engine.gradients()


# ---- operators: what torch.compile sees in their place ------------------------------------------------------------


def _flatten_options(options: HiddenOptions) -> tuple:
    logits = options.logits
    return (
        logits.ignore_index,
        logits.shift,
        logits.average_log_prob,
        logits.temperature,
        logits.logit_scale,
        logits.logit_softcap,
        logits.backend,
        options.dtype,
        options.ref_dtype,
        options.chunk_bytes,
        options.per_position,
        *options.needs,
    )


def _unflatten_options(*values: Any) -> HiddenOptions:
    logits = LogitOptions(*values[:6], backend=values[6])
    dtype, ref_dtype, chunk_bytes, per_position, *needs = values[7:]
    return HiddenOptions(logits, dtype, ref_dtype, chunk_bytes, tuple(needs), per_position)


def _num_sequences(labels: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:
    return labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _fake_gradients(tensors: tuple, needs: tuple[bool, ...]) -> list[torch.Tensor]:
    hidden = tensors[0]
    return [
        x.new_empty(x.shape, dtype=held_dtype(x.dtype)) if needed else hidden.new_empty(0)
        for x, needed in zip(tensors, needs, strict=True)
    ]


def _fake_forward(hidden, weight, bias, labels, cu_seqlens, ref_hidden, *arguments) -> list[torch.Tensor]:
    *_, dtype, _, _, per_position, needs_hidden, needs_weight, needs_bias, head_name, _, reduction, loss_dtype, _ = (
        arguments
    )
    size = labels.numel() if per_position else _num_sequences(labels, cu_seqlens)
    compute = compute_dtype(dtype)
    logps = hidden.new_empty(size, dtype=compute if per_position else torch.float64)
    counts = hidden.new_empty(size, dtype=torch.int64)
    means = [hidden.new_empty(size, dtype=compute) for _ in range(3)]
    ref_logps = torch.empty_like(logps) if ref_hidden is not None else hidden.new_empty(0)
    needs, statistics = (needs_hidden, needs_weight, needs_bias), hidden.new_empty(0)
    if (needs_weight or needs_bias) and (not head_name or reduction == "none"):
        needs = (False, False, False)
        statistics = hidden.new_empty(NUM_STATISTICS, labels.numel(), dtype=compute)
    results = heads.HEADS[head_name].outputs(logps, reduction, loss_dtype) if head_name else ()
    gradients = _fake_gradients((hidden, weight, bias), needs)
    return [logps, counts, *means, ref_logps, *gradients, statistics, *results]


@opaque(fake=_fake_forward, waits=True)
def _linear_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    labels: torch.Tensor,
    cu_seqlens: Optional[torch.Tensor],
    ref_hidden: Optional[torch.Tensor],
    ref_weight: Optional[torch.Tensor],
    ref_bias: Optional[torch.Tensor],
    ref_logps: Optional[torch.Tensor],
    head_tensors: list[Optional[torch.Tensor]],
    ignore_index: int,
    shift: bool,
    average: bool,
    temperature: float,
    scale: float,
    softcap: Optional[float],
    backend: str,
    dtype: torch.dtype,
    ref_dtype: torch.dtype,
    chunk_bytes: int,
    per_position: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    head_name: str,
    loss_type: str,
    reduction: str,
    loss_dtype: torch.dtype,
    head_numbers: list[float],
) -> list[torch.Tensor]:
    """``forward``, flattened: [logps, token_counts, entropy, mean_logits, token_accuracy, the reference's logps,
    gradients by hidden, weight and bias, statistics, loss, head_grads, *reported]; what there is not is empty.
    """
    options = _unflatten_options(
        ignore_index, shift, average, temperature, scale, softcap, backend, dtype, ref_dtype, chunk_bytes,
        per_position, needs_hidden, needs_weight, needs_bias,
    )  # fmt: skip
    head = heads.rebuild(head_name, loss_type, reduction, loss_dtype, backend, head_numbers) if head_name else None
    outputs = forward(
        hidden, weight, bias, labels, cu_seqlens, options, head, (ref_hidden, ref_weight, ref_bias), ref_logps,
        tuple(head_tensors),
    )  # fmt: skip
    sequences, computed_ref_logps, results, gradients, statistics = outputs
    optional = (computed_ref_logps if ref_hidden is not None else None, *gradients, statistics)
    return [*sequences, *(hidden.new_empty(0) if x is None else x for x in optional), *results]


def _fake_backward(hidden, weight, bias, labels, cu_seqlens, logp_grads, statistics, *arguments) -> list[torch.Tensor]:
    return _fake_gradients((hidden, weight, bias), arguments[-3:])


@opaque(fake=_fake_backward, waits=True)
def _linear_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional[torch.Tensor],
    labels: torch.Tensor,
    cu_seqlens: Optional[torch.Tensor],
    logp_grads: torch.Tensor,
    statistics: torch.Tensor,
    ignore_index: int,
    shift: bool,
    average: bool,
    temperature: float,
    scale: float,
    softcap: Optional[float],
    backend: str,
    dtype: torch.dtype,
    ref_dtype: torch.dtype,
    chunk_bytes: int,
    per_position: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> list[torch.Tensor]:
    """``backward``, flattened; a gradient that is not wanted is empty."""
    options = _unflatten_options(
        ignore_index, shift, average, temperature, scale, softcap, backend, dtype, ref_dtype, chunk_bytes,
        per_position, needs_hidden, needs_weight, needs_bias,
    )  # fmt: skip
    gradients = backward(hidden, weight, bias, labels, cu_seqlens, logp_grads, statistics, options)
    return [hidden.new_empty(0) if x is None else x for x in gradients]


# ---- autograd.Functions -------------------------------------------------------------------------------------------


def _keeps_graph() -> bool:
    """Whether the backward under way may be asked for again (``retain_graph=True``)."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def _scaled(gradients: list[torch.Tensor], incoming: torch.Tensor) -> list[torch.Tensor]:
    """Gradients times the loss's own gradient, a scalar on the device; in place where nobody can ask for them again.
    A 0 stays one, as in ``heads.scale_grads``.
    """
    if torch.compiler.is_compiling():
        return [torch.where(grad == 0, grad, grad * incoming.to(compute_dtype(grad))) for grad in gradients]
    if _keeps_graph():
        gradients = [grad.clone() for grad in gradients]
    for grad in gradients:
        scale_(grad, incoming)
    return gradients


def _scale_rows(values: torch.Tensor, factors: torch.Tensor, chunk_bytes: int) -> None:
    """values [..., H] *= factors [..., 1]. A row that takes no part keeps a gradient of 0, even beside a NaN."""
    if values.device.type != "cpu" or values.dtype == factors.dtype or torch.compiler.is_compiling():
        values.mul_(factors)
    else:  # a CPU multiplies copies in the wider dtype, so a block of rows at a time
        hidden_size = values.shape[-1]
        size = max(1, min(BLOCK_BYTES, chunk_bytes // 4) // (hidden_size * factors.dtype.itemsize))
        blocks = values.view(-1, hidden_size).split(size), factors.view(-1, 1).split(size)
        for rows, factor in zip(*blocks, strict=True):
            rows.mul_(factor)
    values.masked_fill_(factors == 0, 0)


def scale_(values: torch.Tensor, factor: torch.Tensor) -> None:
    """values *= factor, a scalar tensor on their device, but a 0 stays one; where it is 1, none is visited."""
    if values.device.type == "cpu":
        number = factor.item()
        zeros = None if math.isfinite(number) else values == 0
        if number != 1:
            values.mul_(number)
        if zeros is not None:
            values.masked_fill_(zeros, 0)
    elif HAS_TRITON:
        from .kernels import rows

        with on_device(values):
            rows.scale_(values, factor)
    else:
        zeros = values == 0
        values.mul_(factor.to(compute_dtype(values))).masked_fill_(zeros, 0)


def _save(ctx, hidden, weight, bias, labels, cu_seqlens, options, outputs, head_grads, is_total) -> None:
    """For one of the three ways to a gradient: found in the forward for the loss as a whole, found in the forward for
    each token's log-probability, or computed in the backward.
    """
    ctx.options, ctx.is_total = options, is_total
    ctx.dtypes = tuple(None if x is None else x.dtype for x in (hidden, weight, bias))
    ctx.is_direction = not is_total and not options.is_head_trained
    token_counts, gradients, statistics = outputs[1], outputs[6:9], outputs[9]
    if is_total:
        ctx.save_for_backward(*(grad for grad, needed in zip(gradients, options.needs, strict=True) if needed))
    elif ctx.is_direction:
        ctx.vocab_size = weight.shape[0]
        ctx.save_for_backward(gradients[0], labels, cu_seqlens, token_counts, head_grads)
    else:
        ctx.save_for_backward(hidden, weight, bias, labels, cu_seqlens, head_grads, statistics)


def _gradients(ctx, incoming) -> tuple[torch.Tensor | None, ...]:
    """By hidden, weight and bias."""
    options: HiddenOptions = ctx.options
    if ctx.is_total:
        scaled = iter(_scaled(list(ctx.saved_tensors), incoming))
        return tuple(
            next(scaled).to(dtype) if needed else None for needed, dtype in zip(options.needs, ctx.dtypes, strict=True)
        )
    logits = options.logits
    if ctx.is_direction:
        direction, labels, cu_seqlens, token_counts, head_grads = ctx.saved_tensors
        if options.per_position:
            row_grads = torch.where(token_counts > 0, incoming, 0.0)
        else:
            layout = {"ignore_index": logits.ignore_index, "shift": logits.shift, "vocab_size": ctx.vocab_size}
            row_grads = sequence_backward(
                row_targets(labels, cu_seqlens, **layout).flatten().int(),
                token_counts,
                head_grads,
                incoming,
                cu_seqlens,
                logits.average_log_prob,
                options.compute_dtype,
                logits.backend,
            )
        row_grads = row_grads.view(*direction.shape[:-1], 1)
        if torch.compiler.is_compiling() or _keeps_graph():
            direction = direction.clone()
        _scale_rows(direction, row_grads, options.chunk_bytes)
        return direction.to(ctx.dtypes[0]), None, None
    *inputs, head_grads, statistics = ctx.saved_tensors
    logp_grads = incoming if head_grads is None else heads.scale_grads(head_grads, incoming)
    gradients = _linear_backward(*inputs, logp_grads, statistics, *_flatten_options(options))
    return tuple(
        grad.to(dtype) if needed else None
        for grad, needed, dtype in zip(gradients, options.needs, ctx.dtypes, strict=True)
    )


class LogpsFromHidden(torch.autograd.Function):
    """``(logps, token_counts, entropy, mean_logits, token_accuracy)``: [B] of the sequences, the log-probabilities in
    fp64; or [rows] of each position by itself.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, cu_seqlens, options):
        no_head = ("", "", "", torch.float32, [])
        no_reference = (None, None, None, None, [])
        outputs = _linear_forward(
            hidden, weight, bias, labels, cu_seqlens, *no_reference, *_flatten_options(options), *no_head
        )
        _save(ctx, hidden, weight, bias, labels, cu_seqlens, options, outputs, None, is_total=False)
        ctx.set_materialize_grads(False)  # else autograd fills a zero gradient for each of the others
        ctx.mark_non_differentiable(*outputs[1:5])
        return tuple(outputs[:5])

    @staticmethod
    @first_derivative_only
    def backward(ctx, incoming, *_):
        return *_gradients(ctx, incoming), None, None, None


class LossFromHidden(torch.autograd.Function):
    """``(loss, logps, token_counts, entropy, mean_logits, token_accuracy, ref_logps, *reported)``: the engine and a
    loss head together.

    ``ref_logps`` is what was computed from ``ref_hidden``, empty without it.
    """

    @staticmethod
    def forward(ctx, *arguments):  # of named ones torch.compile may drop the first, where nothing needs a gradient
        policy, reference, (options, head, *head_tensors) = arguments[:5], arguments[5:9], arguments[9:]
        outputs = _linear_forward(*policy, *reference, head_tensors, *_flatten_options(options), *heads.flatten(head))
        sequences, computed_ref_logps, (loss, head_grads, *reported) = outputs[:5], outputs[5], outputs[10:]
        is_total = head.reduction != "none"
        _save(ctx, *policy, options, outputs, head_grads, is_total)
        ctx.num_arguments = len(arguments)
        ctx.set_materialize_grads(False)  # else autograd fills a zero gradient for each of the reported tensors
        ctx.mark_non_differentiable(*sequences, computed_ref_logps, *reported)
        return loss, *sequences, computed_ref_logps, *reported

    @staticmethod
    @first_derivative_only
    def backward(ctx, incoming, *_):
        gradients = _gradients(ctx, incoming)
        return *gradients, *(None for _ in range(ctx.num_arguments - len(gradients)))
