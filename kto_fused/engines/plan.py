"""Plans: which completion tokens share a chunk, how large a chunk may be, and which gradients it prepares.

The engine (``hidden.py``) visits all tokens once or twice. A plan describes one visit: the ``ChunkSpec`` that all its
chunks are made for, and the range of tokens of each chunk. Sizes follow from ``chunk_bytes``; the constants below were
chosen by measurement. ``kto-fused estimate`` asks the same functions.
"""

import bisect
import itertools
import logging
from dataclasses import replace
from typing import NamedTuple

import torch

from .chunks import NUM_STATISTICS, ChunkSpec, FoldedRows, Keeps, WholeRows
from .options import GradientMode, HiddenOptions

logger = logging.getLogger(__name__)

# A single chunk for all tokens writes the weight's gradient once, so that no float32 sum of it is needed. It is taken
# if its memory is at most this many times the memory of several chunks and their sum, on the first and second visit:
ONE_CHUNK_MEMORY = 1.05
ONE_CHUNK_MEMORY_AGAIN = 0.75
# On the second visit a single chunk takes at most this many ``chunk_bytes``, or what the narrowest panels take.
ONE_CHUNK_BUDGETS_AGAIN = 2
# A group of at least so many tokens that exceeds its chunk is split, instead of computing all logits again: the
# accumulator of a sequence of n tokens costs 12 V H bytes of traffic, the second visit 2 n H V operations.
SPLIT_TOKENS = 256
# Bytes per position while the completion tokens are searched for, before the first chunk is made.
SEARCH_BYTES = 80

exceeded_budgets: set[int] = set()  # values of chunk_bytes for which a warning was given


def held_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a gradient between forward and backward: float32 for float16, else the input's own.

    A float16 gradient would underflow before the backward's loss scaling reaches it.
    """
    return torch.float32 if dtype == torch.float16 else dtype


class Room(NamedTuple):
    """The first visit's chunks if the loss is known in time: their spec, and how many tokens one chunk holds."""

    spec: ChunkSpec
    usual: int  # tokens of a chunk of several sequences; more would be no faster, or not worth their memory
    most: int  # tokens that fit the budget
    most_alone: int  # tokens that fit the budget in the only chunk


class Plan(NamedTuple):
    """One visit to all tokens: the spec and the ranges of tokens, start to stop, of its chunks.

    ``is_loss_in_time``: the loss of a chunk's sequences is known before the chunk's logits are dropped.
    """

    spec: ChunkSpec
    ranges: list[tuple[int, int]]
    is_loss_in_time: bool = False
    # how many sequences' gradients by the LM head add up unscaled at the same time, where a group exceeds a chunk
    num_accumulators: int = 0


def chunk_room(weight: torch.Tensor, options: HiddenOptions) -> Room:
    """Return the room of a first visit's chunks for the gradients that ``options`` want."""
    keeps = "all" if options.is_head_trained else "panels" if options.needs.hidden else "nothing"
    spec = chunk_spec(weight, options, keeps)
    alone, most = _lone_chunk_spec(weight, options, spec), spec.capacity()
    usual = min(most, spec.enough_tokens)
    if keeps == "all" and spec.kind is FoldedRows:
        # several chunks need a float32 sum of the weight's gradient: up to its size, a chunk is not the peak
        enough_bytes = max(spec.num_bytes // 2, weight.numel() * spec.compute_dtype.itemsize)
        usual = min(usual, replace(spec, num_bytes=enough_bytes).capacity())
    return Room(spec, usual, most, most if alone == spec else alone.capacity())


def plan_visit(
    counts: list[int],
    room: Room,
    weight: torch.Tensor,
    options: HiddenOptions,
    *,
    mode: GradientMode,
    group: int | None,
    may_split_sequences: bool = False,
    may_split_groups: bool = True,
) -> Plan:
    """Plan the first visit to packed sequences of ``counts`` tokens. One loss value reads ``group`` of them, None: all;
    or a token alone, where chunks ``may_split_sequences``. Chunks ``may_split_groups`` where the tokens of a sequence
    share one factor, their weights aside.

    With ``is_loss_in_time`` the first visit is the only one.
    """
    num_tokens = sum(counts)
    if mode is GradientMode.OF_LOSS and num_tokens:
        alone = _lone_chunk_spec(weight, options, room.spec)
        if may_split_sequences:
            several = even_ranges(num_tokens, room.usual)
        else:
            several = None if group is None else _whole_ranges(counts, room, group)
        if several is None:
            is_one = num_tokens <= room.most_alone
        else:
            limit = ONE_CHUNK_MEMORY * _several_bytes(several, weight, options, room.spec)
            is_one = len(several) == 1 or alone.size(num_tokens) <= limit
        if is_one:
            return Plan(alone, [(0, num_tokens)], is_loss_in_time=True)
        if several is not None:
            return Plan(room.spec, several, is_loss_in_time=True)
        if may_split_groups and group is not None and room.spec.keeps == "all":
            split = _split_groups(counts, room, weight, group)
            if split is not None:
                return split
    if room.spec.keeps == "all":  # the loss comes too late: what a chunk would keep is dropped before it is known
        spec = chunk_spec(weight, options, "nothing")
        return Plan(spec, even_ranges(num_tokens, spec.capacity()))
    return Plan(room.spec, even_ranges(num_tokens, room.usual))


def plan_second_visit(num_tokens: int, weight: torch.Tensor, options: HiddenOptions) -> Plan:
    """Plan the second visit. A single chunk in panels may exceed ``chunk_bytes`` where it saves a quarter of the memory
    of several chunks and their sum: up to twice ``chunk_bytes``, or as much as the narrowest panels take.
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
    """Return as few ranges of at most ``limit`` tokens as possible, of nearly equal size."""
    count = -(-num_tokens // limit)
    return [(num_tokens * i // count, num_tokens * (i + 1) // count) for i in range(count)]


def _whole_ranges(counts: list[int], room: Room, group: int) -> list[tuple[int, int]] | None:
    """Return ranges of whole groups of sequences; None where a single group exceeds a chunk."""
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


def _split_groups(counts: list[int], room: Room, weight: torch.Tensor, group: int) -> Plan | None:
    """Plan one visit in which groups that exceed a chunk are split, sequence by sequence.

    The weight's gradient of a split sequence adds up unscaled in an accumulator [V, H], until the group's last
    log-probability is known. Accumulators take at most half of ``chunk_bytes``, and the chunk takes the rest. Returns
    None where they would take more, or where a split group is too short to be worth the passes over its accumulators.
    """
    for num_accumulators in range(1, group + 1):
        held = num_accumulators * accumulator_bytes(weight, room.spec)
        if held > room.spec.num_bytes // 2:
            return None
        spec = replace(room.spec, num_bytes=room.spec.num_bytes - held)
        most = spec.capacity()
        split = _split_ranges(counts, group, min(most, room.usual), most)
        if split is None:
            return None
        if split.num_accumulators <= num_accumulators:
            return Plan(spec, split.ranges, is_loss_in_time=True, num_accumulators=num_accumulators)
    return None


class _SplitRanges(NamedTuple):
    ranges: list[tuple[int, int]]
    num_accumulators: int  # of one group at the most


def _split_ranges(counts: list[int], group: int, usual: int, most: int) -> _SplitRanges | None:
    """Return ranges of whole groups, up to ``usual`` tokens, and pieces of sequences, where a group exceeds ``most``.

    Returns None where such a group has fewer than ``SPLIT_TOKENS``.
    """
    ranges, start, stop, num_accumulators = [], 0, 0, 0
    for first in range(0, len(counts), group):
        own = counts[first : first + group]
        is_split = sum(own) > most
        if is_split and sum(own) < SPLIT_TOKENS:
            return None
        if (is_split or stop + sum(own) - start > usual) and stop > start:
            ranges.append((start, stop))
            start = stop
        if not is_split:
            stop += sum(own)
            continue
        pieces = [even_ranges(count, usual) for count in own if count]
        for of_sequence in pieces:
            ranges += [(stop + begin, stop + end) for begin, end in of_sequence]
            stop += of_sequence[-1][1]
        start = stop
        # the group's last chunk is scaled at once: its sequence needs an accumulator only for chunks before that one
        num_accumulators = max(num_accumulators, len(pieces) - (len(pieces[-1]) == 1))
    if stop > start:
        ranges.append((start, stop))
    return _SplitRanges(ranges, num_accumulators)


def accumulator_bytes(weight: torch.Tensor, spec: ChunkSpec) -> int:
    """Return the bytes of one sequence's unscaled gradient by the LM head's weight."""
    return weight.numel() * spec.compute_dtype.itemsize


def group_ranges(counts: list[int], ranges: list[tuple[int, int]], group: int) -> list[tuple[int, int]]:
    """Return which groups, first to last + 1, each range of tokens holds. A group without tokens joins the groups
    before it, so that every group belongs to one range.
    """
    ends, end = [], 0
    for first in range(0, len(counts), group):
        end += sum(counts[first : first + group])
        ends.append(end)
    bounds = [0, *(bisect.bisect_right(ends, stop) for _, stop in ranges)]
    return list(itertools.pairwise(bounds))


def _several_bytes(ranges: list[tuple[int, int]], weight: torch.Tensor, options: HiddenOptions, spec: ChunkSpec) -> int:
    """Return the peak bytes of several chunks beyond the weight's gradient: a chunk beside the float32 sum, or the
    whole sum beside its rounded copy. 0 where a single chunk would write a gradient as wide as the sum.
    """
    wide, held = weight.numel() * spec.compute_dtype.itemsize, weight.nbytes
    if not options.needs.weight or spec.grad_dtype != weight.dtype or wide == held:
        return 0
    return max(spec.size(longest_range(ranges)) + wide - held, wide)


def longest_range(ranges: list[tuple[int, int]]) -> int:
    """Return the tokens of the longest range, 0 where there is none."""
    return max((stop - start for start, stop in ranges), default=0)


def chunk_spec(weight: torch.Tensor, options: HiddenOptions, keeps: Keeps) -> ChunkSpec:
    """Return the spec of chunks within ``options.chunk_bytes`` for an LM head [V, H]."""
    logits = options.logits
    return ChunkSpec(
        *weight.shape,
        dtype=options.dtype,
        device=weight.device,
        backend=logits.backend,
        keeps=keeps,
        transform=logits.transform,
        by_hidden=options.needs.hidden,
        by_head=options.is_head_trained,
        num_bytes=options.chunk_bytes,
        sum_squares=logits.sum_squares,
    )


def _lone_chunk_spec(weight: torch.Tensor, options: HiddenOptions, spec: ChunkSpec) -> ChunkSpec:
    """Return the spec of a single chunk of all tokens: its buffer may lie in the memory of the weight's gradient, which
    its last GEMM writes.
    """
    if spec.keeps != "all" or not options.needs.weight:
        return spec
    return replace(spec, lent_bytes=weight.numel() * _sum_dtype(1, weight, spec).itemsize)


def _sum_dtype(num_chunks: int, weight: torch.Tensor, spec: ChunkSpec) -> torch.dtype:
    """Return the dtype in which chunks add up the weight's gradient: the sum of several is rounded once, at its end."""
    held = held_dtype(weight.dtype)
    return held if num_chunks == 1 and spec.grad_dtype == held else spec.compute_dtype


def empty_weight_sum(plan: Plan, weight: torch.Tensor, options: HiddenOptions) -> torch.Tensor | None:
    """Return memory for the weight's gradient, which the first chunk overwrites; None where it is not wanted."""
    if not options.needs.weight:
        return None
    total = weight.new_empty(weight.shape, dtype=_sum_dtype(len(plan.ranges), weight, plan.spec))
    return total if plan.ranges else total.zero_()


def make_chunk(plan: Plan, lent: torch.Tensor | None = None) -> WholeRows | FoldedRows:
    """Allocate the chunk that serves all ranges of a plan; ``lent`` is memory that its buffer may lie in."""
    longest, spec = longest_range(plan.ranges), plan.spec
    return FoldedRows(longest, spec, lent) if spec.kind is FoldedRows else WholeRows(longest, spec)


class LargestChunk(NamedTuple):
    """What a visit holds at its peak."""

    chunk: WholeRows | FoldedRows
    weight_sum: torch.Tensor | None  # the sum of the gradients by the LM head's weight
    accumulator_bytes: int  # of the unscaled gradients of sequences that exceed a chunk


def largest_chunk(
    counts: list[int],
    weight: torch.Tensor,
    options: HiddenOptions,
    *,
    group: int | None,
    reads_tokens: bool = False,
    is_late: bool = False,
) -> LargestChunk:
    """Return the longest chunk, and the memory of the weight's gradient, of a reduced loss that reads ``group``
    sequences of ``counts`` completion tokens (None: all) or, with ``reads_tokens``, a token alone. Of two visits, those
    of the second, which takes more. There are two if the loss ``is_late``: if it takes all log-probabilities at once.
    """
    room = chunk_room(weight, options)
    mode = GradientMode.OF_LOSS if any(options.needs) else GradientMode.NONE
    plan = plan_visit(counts, room, weight, options, mode=mode, group=group, may_split_sequences=reads_tokens)
    if room.spec.keeps == "all" and (is_late or not plan.is_loss_in_time):
        plan = plan_second_visit(sum(counts), weight, options)
    weight_sum = empty_weight_sum(plan, weight, options)
    chunk = make_chunk(plan, weight_sum if plan.spec.lent_bytes else None)
    return LargestChunk(chunk, weight_sum, plan.num_accumulators * accumulator_bytes(weight, plan.spec))


def beside_bookkeeping(num_positions: int, weight: torch.Tensor, options: HiddenOptions) -> HiddenOptions:
    """Return ``options`` with ``chunk_bytes`` reduced by the bytes of the per-position numbers, on the PyTorch backend.

    A position's numbers are its row and its target, and in the compute dtype its four or five results, its gradient
    and, for a second visit, its statistics. On a GPU they take less than the allocator's rounding of a chunk. A budget
    that holds not even one token beside them is exceeded by as little as possible, and a warning names the size.
    """
    if options.logits.backend != "torch":
        return options
    numbers = 6 + options.logits.sum_squares + NUM_STATISTICS * options.is_head_trained
    held = num_positions * (12 + numbers * options.compute_dtype.itemsize)
    keeps = "panels" if any(options.needs) else "nothing"
    least = max(held + chunk_spec(weight, options, keeps).size(1), SEARCH_BYTES * num_positions)
    if options.chunk_bytes < least and options.chunk_bytes not in exceeded_budgets:
        exceeded_budgets.add(options.chunk_bytes)
        logger.warning(
            "chunk_bytes=%d is exceeded: one token's logits of this LM head and the numbers of %d positions take %d "
            "bytes, the least that is possible",
            options.chunk_bytes,
            num_positions,
            least,
        )
    return replace(options, chunk_bytes=max(1, options.chunk_bytes - held))
