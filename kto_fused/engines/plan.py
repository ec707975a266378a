"""Which completion tokens are in which chunk, and what a chunk is made for."""

import logging
from dataclasses import replace
from typing import NamedTuple

import torch

from .chunks import NUM_STATISTICS, ChunkSpec, FoldedRows, Keeps, WholeRows
from .options import HiddenOptions

logger = logging.getLogger(__name__)

# One chunk for all tokens writes the weight's gradient once, and needs no float32 sum of it. How many times the memory
# of several chunks and their sum it may take on the first visit, and on the second:
ONE_CHUNK_MEMORY = 1.05
ONE_CHUNK_MEMORY_AGAIN = 0.75
# How many times ``chunk_bytes`` it may take on the second; more only with the narrowest panels.
ONE_CHUNK_BUDGETS_AGAIN = 2
# Bytes of a position while the completion tokens are looked for, before the first chunk is made.
SEARCH_BYTES = 80


exceeded_budgets: set[int] = set()  # of which a warning was given


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient between forward and backward. A float16 one would underflow: no loss scaling has reached it yet."""
    return torch.float32 if dtype == torch.float16 else dtype


class Room(NamedTuple):
    """What a first visit's chunks are made for where their loss is known in time, and how many tokens one holds."""

    spec: ChunkSpec
    usual: int  # with several sequences: as many as its GEMMs need, or as are worth their memory
    most: int  # as fit the budget
    most_alone: int  # the same where it is the only one


class Plan(NamedTuple):
    """A visit to all tokens: what its chunks are made for, which tokens are in which, and whether the loss of a chunk's
    sequences is known before its logits are dropped.
    """

    spec: ChunkSpec
    ranges: list[tuple[int, int]]
    is_loss_in_time: bool = False


def chunk_room(weight: torch.Tensor, options: HiddenOptions) -> Room:
    keeps = "all" if options.is_head_trained else "panels" if options.needs[0] else "nothing"
    spec = chunk_spec(weight, options, keeps)
    alone, most = _lone_chunk_spec(weight, options, spec), spec.capacity()
    usual = min(most, spec.enough_tokens)
    if keeps == "all" and spec.kind is FoldedRows:
        # several chunks go with a float32 sum of the weight's gradient: up to its size they are not what takes most
        enough_bytes = max(spec.num_bytes // 2, weight.numel() * spec.compute_dtype.itemsize)
        usual = min(usual, replace(spec, num_bytes=enough_bytes).capacity())
    return Room(spec, usual, most, most if alone == spec else alone.capacity())


def plan_visit(
    counts: list[int],
    room: Room,
    weight: torch.Tensor,
    options: HiddenOptions,
    *,
    is_total: bool,
    paired: bool,
    couples: bool,
) -> Plan:
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
            return Plan(alone, [(0, num_tokens)], is_loss_in_time=True)
        if several is not None:
            return Plan(room.spec, several, is_loss_in_time=True)
    if room.spec.keeps == "all":  # the loss comes too late for what would be kept
        spec = chunk_spec(weight, options, "nothing")
        return Plan(spec, even_ranges(num_tokens, spec.capacity()))
    return Plan(room.spec, even_ranges(num_tokens, room.usual))


def plan_second_visit(num_tokens: int, weight: torch.Tensor, options: HiddenOptions) -> Plan:
    """The second visit. Where it saves a quarter of the memory of several chunks and their sum, one chunk in panels may
    exceed ``chunk_bytes``: up to twice, or as far as its narrowest panels do.
    """
    spec = chunk_spec(weight, options, "panels")
    ranges = even_ranges(num_tokens, spec.capacity())
    if len(ranges) > 1 and spec.kind is FoldedRows:
        limit = int(ONE_CHUNK_MEMORY_AGAIN * _several_bytes(ranges, weight, options, spec))
        alone = replace(spec, num_bytes=min(limit, ONE_CHUNK_BUDGETS_AGAIN * spec.num_bytes))
        if alone.size(num_tokens) <= limit:
            return Plan(alone, [(0, num_tokens)])
    return Plan(spec, ranges)


def even_ranges(num_tokens: int, limit: int) -> list[tuple[int, int]]:
    """As few chunks as fit, of nearly equal size."""
    count = -(-num_tokens // limit)
    return [(num_tokens * i // count, num_tokens * (i + 1) // count) for i in range(count)]


def _whole_ranges(counts: list[int], room: Room, group: int) -> list[tuple[int, int]] | None:
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
    return max(spec.size(longest_range(ranges)) + wide - held, wide)


def longest_range(ranges: list[tuple[int, int]]) -> int:
    return max((stop - start for start, stop in ranges), default=0)


def chunk_spec(weight: torch.Tensor, options: HiddenOptions, keeps: Keeps) -> ChunkSpec:
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


def empty_weight_sum(plan: Plan, weight: torch.Tensor, options: HiddenOptions) -> torch.Tensor | None:
    """For the weight's gradient, which the first chunk writes."""
    if not options.needs[1]:
        return None
    total = weight.new_empty(weight.shape, dtype=_sum_dtype(len(plan.ranges), weight, plan.spec))
    return total if plan.ranges else total.zero_()


def make_chunk(plan: Plan, lent: torch.Tensor | None = None) -> WholeRows | FoldedRows:
    longest, spec = longest_range(plan.ranges), plan.spec
    return FoldedRows(longest, spec, lent) if spec.kind is FoldedRows else WholeRows(longest, spec)


def largest_chunk(
    counts: list[int], weight: torch.Tensor, options: HiddenOptions, *, paired: bool
) -> tuple[WholeRows | FoldedRows, torch.Tensor | None]:
    """(the longest chunk, what the weight's gradient adds up in) of a loss as a whole that does not couple its batch,
    with sequences of ``counts`` completion tokens; of two visits those of the second, which takes more.
    """
    room = chunk_room(weight, options)
    plan = plan_visit(counts, room, weight, options, is_total=True, paired=paired, couples=False)
    if room.spec.keeps == "all" and not plan.is_loss_in_time:
        plan = plan_second_visit(sum(counts), weight, options)
    weight_sum = empty_weight_sum(plan, weight, options)
    return make_chunk(plan, weight_sum if plan.spec.lent_bytes else None), weight_sum


def beside_bookkeeping(num_positions: int, weight: torch.Tensor, options: HiddenOptions) -> HiddenOptions:
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
    least = max(held + chunk_spec(weight, options, keeps).size(1), SEARCH_BYTES * num_positions)
    if options.chunk_bytes < least and options.chunk_bytes not in exceeded_budgets:
        exceeded_budgets.add(options.chunk_bytes)
        logger.warning(
            "chunk_bytes=%d is exceeded: one token of this LM head beside the numbers of %d positions takes %d bytes, "
            "the least that is possible",
            options.chunk_bytes,
            num_positions,
            least,
        )
    return replace(options, chunk_bytes=max(1, options.chunk_bytes - held))
