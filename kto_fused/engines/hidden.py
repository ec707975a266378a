"""From hidden states and an LM head to log-probabilities, loss and gradients; logits exist for one chunk at a time.

Only completion tokens are visited. They are packed sequence after sequence and cut into chunks, whose logits fit
``chunk_bytes``:

Forward:   hidden -> chunk of tokens -> logits -> token log-probabilities -> sequences [B] -> loss head -> loss, and its
           gradient by the log-probabilities; from it the chunk's logits become d loss / d logits, which two GEMMs turn
           into the gradients by hidden states and weight
Backward:  the gradients found in the forward, times the incoming gradient

``GradientMode`` says when gradients are found and how many GEMMs that takes. In the mode OF_LOSS with a trained head, a
chunk holds whole groups of sequences, so that the head can be called on the chunk's groups while their logits are still
there. A group that exceeds the chunk is split: its gradients by the LM head add up unscaled, in accumulators, until its
loss is known. Where they do not fit, and for a loss of the whole batch, a second visit to the tokens computes the
logits again once the loss is known: the 4th GEMM. A token-level head needs neither. With a frozen head chunks may split
sequences: d log-probability / d hidden needs no loss, and its rows are scaled once the loss is known.

``forward`` and ``backward`` are called by ``operators.py`` only.
"""

import bisect
import itertools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from .chunks import NUM_STATISTICS, ChunkSpec, FoldedRows, LMHead, WholeRows, move_rows
from .layout import CompletionTokens, check_contents, completion_tokens
from .logits import sequence_backward, sequence_sums, weighted_grads, weighted_tokens
from .options import GradientMode, HiddenOptions, Needs, gradient_mode
from .plan import (
    Plan,
    beside_bookkeeping,
    chunk_room,
    chunk_spec,
    empty_weight_sum,
    even_ranges,
    group_ranges,
    held_dtype,
    longest_range,
    make_chunk,
    plan_second_visit,
    plan_visit,
)
from .results import Gradients, HiddenResults, SequenceValues, TokenValues, num_token_values, row_statistics
from .tokens import TokenCall, is_mixed, is_token_level

# Share of a chunk's tokens with a gradient from which on the gradient's GEMMs take all of its tokens.
MOST_ALIVE = 0.9

# ---- engine -------------------------------------------------------------------------------------------------------


class HeadSums(NamedTuple):
    """Sums of gradients by the LM head: by its weight [V, H] and its bias [V]; None where none is wanted."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def add(self, other: "HeadSums", factor: torch.Tensor) -> None:
        """self += factor * other, ``factor`` a scalar tensor on their device."""
        for mine, others in zip(self, other, strict=True):
            if mine is not None:
                mine.addcmul_(others, factor)


class Engine:
    """Takes one model's completion tokens through its LM head, a chunk at a time, and adds up the gradients."""

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
        """``weight`` is in the GEMMs' dtype, ``weight_dtype`` is the parameter's."""
        self.hidden = hidden if hidden.ndim == 3 else hidden[None]
        compute = options.compute_dtype
        self.lm_head = LMHead(weight, None if bias is None else bias.to(compute).contiguous())
        self.tokens, self.chunk, self.options = tokens, chunk, options
        # [4, N] or [5, N], the fields of ``TokenValues``; 0 until a token's chunk was visited
        num_values = num_token_values(options.logits.sum_squares)
        self.per_token = hidden.new_zeros(num_values, len(tokens.rows), dtype=compute)
        self.statistics = None
        self.grad_hidden = None
        if options.needs.hidden:
            self.grad_hidden = hidden.new_zeros(hidden.shape, dtype=held_dtype(hidden.dtype))
        self.weight_dtype = held_dtype(weight_dtype)
        self.bias_dtype = None if bias is None else held_dtype(bias.dtype)
        self.weight_sum = self.bias_sum = None

    def forward(self, start: int, stop: int, *, keep: bool = False) -> None:
        """Find the log-probabilities of tokens start..stop. With ``keep`` the chunk keeps what their gradient needs."""
        self._gather(self.tokens.rows[start:stop])
        # clone, here and below: a slice's alignment would compile another variant of the kernels
        targets = self.tokens.targets[start:stop].clone()
        self.chunk.fold(self.chunk_hidden, self.lm_head, targets, keep)
        self.per_token[:, start:stop] = self.chunk.finish(self.lm_head)
        if self.statistics is not None:
            for values, statistic in zip(self.statistics, self.chunk.statistics, strict=True):
                if statistic is not None:
                    values[start:stop] = statistic

    def start_statistics(self) -> None:
        """Let ``forward`` record each token's softmax statistics, from which a second visit computes gradients.

        They are [3, B T], of which the first N columns are used: they are an operator's output, whose shape must be
        known before the tokens are counted.
        """
        num_positions = self.hidden.shape[:-1].numel()
        self.statistics = self.hidden.new_zeros(NUM_STATISTICS, num_positions, dtype=self.options.compute_dtype)

    def _gather(self, rows: torch.Tensor) -> None:
        self.chunk_hidden = None  # frees the last chunk's hidden states before this chunk's are allocated
        self.chunk_hidden = self.hidden.new_empty(len(rows), self.hidden.shape[-1], dtype=self.options.dtype)
        move_rows(self.hidden, self.chunk_hidden, self.options.logits.backend, source_rows=rows)

    def backward(self, start: int, stop: int, token_grads: torch.Tensor, into: "HeadSums | None" = None) -> None:
        """Add the gradients of tokens start..stop, which ``forward`` has just visited with ``keep``.

        Those by the LM head go ``into`` sums that hold a value already; by default into the engine's, which the first
        chunk overwrites.
        """
        self._add_gradients(self.tokens.rows[start:stop], token_grads[start:stop], start > 0, into)

    def _add_gradients(self, rows: torch.Tensor, token_grads: torch.Tensor, add: bool, into: "HeadSums | None") -> None:
        """Add the gradients of the chunk's tokens, which stand at ``rows`` [n] of the batch."""
        self.chunk.backward(token_grads)
        self._write_hidden_gradient(rows)
        if into is None:
            self._add_head_gradients(slice(None), add=add)
            return
        if into.weight is not None:
            self.chunk.add_weight_gradient(into.weight, self.chunk_hidden, add=True)
        if into.bias is not None:
            self.chunk.add_bias_gradient(into.bias)

    def zeroed_sums(self) -> "HeadSums":
        """Return zeroed memory for gradients by weight and bias, in the precision of their sums."""
        compute, needs = self.options.compute_dtype, self.options.needs
        weight, bias = self.lm_head
        return HeadSums(
            torch.zeros_like(weight, dtype=compute) if needs.weight else None,
            torch.zeros_like(bias, dtype=compute) if needs.bias else None,
        )

    def scale_rows(self, start: int, stop: int, token_grads: torch.Tensor) -> None:
        """Turn d token log-probability / d hidden of tokens start..stop into d loss / d hidden, in place."""
        if self.grad_hidden is None or start == stop:
            return
        backend, hidden_size = self.options.logits.backend, self.hidden.shape[-1]
        grads = self.grad_hidden.view(self.hidden.shape), self.grad_hidden.view(-1, hidden_size)
        rows = self.tokens.rows[start:stop]
        move_rows(*grads, backend, source_rows=rows, target_rows=rows, factors=token_grads[start:stop])

    def backward_of_some(
        self, start: int, stop: int, token_grads: torch.Tensor, into: "HeadSums | None" = None
    ) -> None:
        """``backward`` that leaves tokens whose gradient is exactly 0 out of its GEMMs. The host waits for the device.

        Tokens are left out where they are at least a tenth of the chunk, since moving the others' rows together costs
        a pass over them. Fewer ones pass through the GEMMs as rows of 0: what they hold, even a NaN, adds nothing.
        """
        rows, grads = self.tokens.rows[start:stop], token_grads[start:stop]
        if self.chunk.spec.keeps != "all" and not isinstance(self.chunk, WholeRows):
            self.backward(start, stop, token_grads, into)  # the GEMM is done already; a factor of 0 makes a row 0
            return
        alive = (grads != 0).nonzero().flatten()
        if len(alive) > MOST_ALIVE * len(grads):
            if len(alive) < len(grads):
                zeros = (grads == 0).nonzero().flatten()
                self.chunk.clear(zeros)
                self.chunk_hidden.index_fill_(0, zeros, 0)
            self.backward(start, stop, token_grads, into)
        elif len(alive):
            self.chunk.select(alive)
            self.chunk_hidden = self.chunk_hidden[alive]
            self._add_gradients(rows[alive], grads[alive], start > 0, into)
        elif start == 0 and into is None and self.weight_sum is not None:
            self.weight_sum.zero_()  # which the first chunk would have written

    def visit_again(
        self,
        rows: torch.Tensor,
        targets: torch.Tensor,
        statistics: torch.Tensor,
        token_grads: torch.Tensor,
        *,
        add: bool,
    ) -> None:
        """Compute the logits of tokens once more, and add gradients by the first visit's ``statistics``.

        ``rows`` [n] are the tokens' places in the batch. With ``add``, gradients by the LM head are added to those of
        earlier chunks; without it they overwrite them.
        """
        self._gather(rows)
        # clone: a slice's alignment would compile another variant of the kernels
        targets, statistics = targets.clone(), statistics.contiguous()
        for panel in self.chunk.again(self.chunk_hidden, self.lm_head, targets, statistics, token_grads):
            self._add_head_gradients(panel, add=add)
        self._write_hidden_gradient(rows)

    def _write_hidden_gradient(self, rows: torch.Tensor) -> None:
        if self.grad_hidden is not None:
            grad, factors = self.chunk.hidden_gradient(self.lm_head)
            backend = self.options.logits.backend
            move_rows(grad, self.grad_hidden.view(-1, grad.shape[1]), backend, target_rows=rows, factors=factors)

    def _add_head_gradients(self, panel: slice, *, add: bool) -> None:
        if self.weight_sum is not None:
            self.chunk.add_weight_gradient(self.weight_sum[panel], self.chunk_hidden, add=add)
        if self.bias_sum is not None:
            self.chunk.add_bias_gradient(self.bias_sum[panel])

    def start_sums(self, weight_sum: torch.Tensor | None) -> None:
        """Provide memory for the gradients by weight and bias; the first chunk overwrites ``weight_sum``."""
        self.weight_sum = weight_sum
        if self.options.needs.bias:
            bias = self.lm_head.bias
            self.bias_sum = bias.new_zeros(bias.shape, dtype=self.options.compute_dtype)

    def scale_hidden_gradient(self, token_grads: torch.Tensor, ranges: list[tuple[int, int]]) -> None:
        """Turn d token log-probability / d hidden into d loss / d hidden, in place. Frees the chunk."""
        self.chunk = self.chunk_hidden = None
        for start, stop in ranges:
            self.scale_rows(start, stop, token_grads)

    def values(self) -> SequenceValues:
        """Return the values of the sequences, each [B]; with ``options.per_position`` of the positions, each [rows]."""
        return self._positions() if self.options.per_position else self._sequences()

    def _sequences(self) -> SequenceValues:
        logits = self.options.logits
        sums = sequence_sums(
            self.tokens.targets,
            weighted_tokens(self.per_token, self.tokens.weights),
            self.tokens.offsets,
            len(self.tokens.counts),
            logits.average_log_prob,
            logits.backend,
        )
        return SequenceValues(*(self.tokens.unpack(values) for values in sums))

    def _positions(self) -> SequenceValues:
        num_rows = self.hidden.shape[0] * self.hidden.shape[1]

        def spread(values: torch.Tensor) -> torch.Tensor:
            return values.new_zeros(num_rows).index_copy_(0, self.tokens.rows, values)

        tokens = TokenValues(*(spread(values) for values in self.per_token))
        token_counts = spread(torch.ones_like(self.tokens.rows))
        return SequenceValues(tokens.logps, token_counts, tokens.entropy, tokens.mean_logits, tokens.is_top1)

    def token_grads(self, logp_grads: torch.Tensor) -> torch.Tensor:
        """Return d loss / d token log-probability [N] from ``logp_grads``: d loss / d log-probability of the sequences
        [B] or positions [rows].
        """
        return weighted_grads(self.unweighted_grads(logp_grads), self.tokens.weights)

    def unweighted_grads(self, logp_grads: torch.Tensor) -> torch.Tensor:
        """Return ``token_grads`` of tokens that all have the weight 1: one value for all tokens of a sequence."""
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

    def gradients(self) -> Gradients:
        """Return the gradients in their storage dtypes; None for those not requested. Frees the chunk."""
        self.chunk = self.chunk_hidden = None  # before the rounded gradients are allocated
        return Gradients(
            self.grad_hidden,
            None if self.weight_sum is None else self.weight_sum.to(self.weight_dtype),
            None if self.bias_sum is None else self.bias_sum.to(self.bias_dtype),
        )


# ---- loss head ----------------------------------------------------------------------------------------------------


class HeadResult(NamedTuple):
    """What a head returns for the whole batch; nothing where there is no head."""

    loss: torch.Tensor | None
    logp_grads: torch.Tensor | None  # [B] d loss / d log-probability
    reported: tuple[torch.Tensor, ...]

    def plus(self, head: Any, total: torch.Tensor) -> "HeadResult":
        """Return this result with the loss of all tokens, a float64 scalar of a token-level head, added."""
        total = total.to(head.loss_dtype)
        if self.loss is None:  # a token-level head alone has no gradient by sequences
            return HeadResult(total, total.new_empty(0), ())
        return self._replace(loss=self.loss + total)


def head_group(head: Any) -> int | None:
    """Return how many sequences one loss value of a head reads. None, the default: the whole batch."""
    return getattr(head, "group", None)


@dataclass(frozen=True)
class HeadCall:
    """A loss head (None: there is none) with the tensors of its call, for a batch of sequences."""

    head: Any
    ref_logps: torch.Tensor | None
    tensors: tuple[torch.Tensor | None, ...]
    counts: torch.Tensor | None = None  # [B] the sequences' lengths; None: the numbers of all labelled tokens

    def _counts(self, values: SequenceValues) -> torch.Tensor:
        return values.token_counts if self.counts is None else self.counts

    def may_be_zero(self, tokens: CompletionTokens) -> bool:
        """Whether gradients of exactly 0 are worth a wait for the device, see ``heads.base``."""
        return tokens.weights is not None or getattr(self.head, "may_be_zero", False)

    def on_batch(self, values: SequenceValues) -> HeadResult:
        """Call the head on the whole batch."""
        if self.head is None:
            return HeadResult(None, None, ())
        of_sequences = values.logps, self._counts(values), self.ref_logps, *self.tensors
        loss, logp_grads, *reported = self.head(*of_sequences, **row_statistics(self.head, values))
        return HeadResult(loss, logp_grads, tuple(reported))

    def grads_of_groups(self, values: SequenceValues, first: int, last: int) -> torch.Tensor:
        """Call the head on the groups first..last alone. Return d loss / d log-probability [B], 0 outside these groups.

        The head sees a smaller batch: the groups' entries of each tensor that has one per sequence or per group. Any
        other tensor is passed on.
        """
        num_sequences = len(values.logps)
        num_groups = num_sequences // self.head.group

        def part(x: torch.Tensor | None) -> torch.Tensor | None:
            if x is None or x.ndim != 1 or len(x) not in (num_sequences, num_groups):
                return x
            # clone: a slice's alignment would compile another variant of the kernels
            columns = x.reshape(-1, num_groups)[:, first:last]
            return columns.clone(memory_format=torch.contiguous_format).view(-1)

        counts = self._counts(values)
        tensors = map(part, (values.logps, counts, self.ref_logps, *self.tensors))
        whole = {"batch_counts": counts} if getattr(self.head, "reads_batch_counts", False) else {}
        statistics = {name: tuple(map(part, of_rows)) for name, of_rows in row_statistics(self.head, values).items()}
        _, grads, *_ = self.head(*tensors, num_losses=num_groups, **whole, **statistics)
        logp_grads = torch.zeros_like(values.logps)
        logp_grads.view(-1, num_groups)[:, first:last] = grads.view(-1, last - first)
        return logp_grads


# ---- forward and backward -----------------------------------------------------------------------------------------


class Reference(NamedTuple):
    """The reference model's hidden states and LM head."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


class ReferenceVisit(NamedTuple):
    """The reference's log-probabilities [B], and what its visit leaves for the policy's."""

    logps: torch.Tensor
    chunk: WholeRows | FoldedRows | None  # None: the policy needs a chunk of its own
    gemm_weight: torch.Tensor | None  # the LM head in the GEMMs' dtype; None: the policy has another LM head


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    options: HiddenOptions,
    head: Any,
    reference: Reference | None,
    ref_logps: torch.Tensor | None,
    head_tensors: tuple[torch.Tensor | None, ...],
) -> HiddenResults:
    """Find log-probabilities, the loss of ``head`` (None: no loss), and the gradients of ``gradient_mode``.

    In IN_BACKWARD there are no gradients, but the ``statistics`` that ``backward`` needs. ``ref_logps`` [B] are the
    reference's log-probabilities where ``reference`` is None. ``token_weights``, shaped as ``labels``, are the factors
    of the rows' log-probabilities in the sums of both models.
    """
    mode = gradient_mode(options.needs, head)
    options = beside_bookkeeping(labels.numel(), weight, options)
    if mode is GradientMode.IN_BACKWARD:
        options = replace(options, needs=Needs())
    # the other modes keep the batch's order: ``backward`` finds the tokens again, without a head to ask for groups
    group = head_group(head) if mode in (GradientMode.NONE, GradientMode.OF_LOSS) else None
    room = chunk_room(weight, options)  # its Python runs before the host waits for the device
    tokens = find_tokens(weight, labels, cu_seqlens, token_weights, options, group or 1)
    plan = plan_visit(
        tokens.counts,
        room,
        weight,
        options,
        mode=mode,
        group=group,
        may_split_sequences=is_token_level(head),
        may_split_groups=not is_mixed(head),
    )
    weight_sum = empty_weight_sum(plan, weight, options) if plan.spec.lent_bytes else None

    chunk = gemm_weight = computed_ref_logps = None
    if reference is not None:
        computed_ref_logps, chunk, gemm_weight = _visit_reference(reference, tokens, plan, weight, weight_sum, options)
        ref_logps = computed_ref_logps
    if gemm_weight is None:
        gemm_weight = weight.to(options.dtype)
    chunk = chunk or make_chunk(plan, weight_sum)
    engine = Engine(hidden, gemm_weight, bias, tokens, chunk, options, weight.dtype)
    del chunk  # the engine alone holds it, and frees it
    call, token_call = _calls(head, ref_logps, head_tensors, tokens, shift=options.logits.shift)

    if not plan.is_loss_in_time:
        values, result = _visit_before_loss(engine, call, token_call, plan, weight, mode)
    elif plan.num_accumulators:
        values, result = _visit_split_groups(engine, call, plan)
    else:
        engine.start_sums(empty_weight_sum(plan, weight, options) if weight_sum is None else weight_sum)
        if is_token_level(head):
            values, result = _visit_tokens(engine, token_call, plan)
        else:
            values, result = _visit_whole_groups(engine, call, token_call, plan)
    statistics = engine.statistics if mode is GradientMode.IN_BACKWARD else None
    return HiddenResults(
        values, computed_ref_logps, engine.gradients(), statistics, result.loss, result.logp_grads, result.reported
    )


def _calls(
    head: Any,
    ref_logps: torch.Tensor | None,
    head_tensors: tuple[torch.Tensor | None, ...],
    tokens: CompletionTokens,
    *,
    shift: bool,
) -> tuple[HeadCall, TokenCall | None]:
    """Return the calls of a head's sequence-level and of its token-level part."""
    if is_token_level(head):
        return HeadCall(None, None, ()), TokenCall.of_packed(head, head_tensors, tokens, shift=shift)
    if not is_mixed(head):
        return HeadCall(head, ref_logps, head_tensors), None
    sequence_head, sequence_tensors = head.part("sequence", head_tensors)
    token_head, token_tensors = head.part("token", head_tensors)
    call = HeadCall(sequence_head, ref_logps, sequence_tensors, head.completion_counts(head_tensors))
    return call, TokenCall.of_packed(token_head, token_tensors, tokens, shift=shift)


# ---- visits: each takes all chunks through the LM head, and calls the loss head ------------------------------------
#
#     _visit_tokens         a token-level head                               called on each chunk's tokens
#     _visit_whole_groups   chunks hold whole groups of sequences            called on each chunk's groups
#     _visit_split_groups   a group exceeds a chunk, its accumulators fit    called at the end of each group
#     _visit_before_loss    any other loss, or none                          called once, after the last chunk


def _visit_tokens(engine: Engine, call: TokenCall, plan: Plan) -> tuple[SequenceValues, HeadResult]:
    """Find log-probabilities, the loss and the gradients of a token-level head, chunk by chunk."""
    total = engine.per_token.new_zeros((), dtype=torch.float64)
    token_grads = torch.zeros_like(engine.per_token[0])
    for start, stop in plan.ranges:
        engine.forward(start, stop, keep=True)
        loss, grads = call(TokenValues(*engine.per_token[:, start:stop]), start, stop)
        total += loss
        token_grads[start:stop] = grads
        if call.head.may_be_zero:
            engine.backward_of_some(start, stop, token_grads)
        else:
            engine.backward(start, stop, token_grads)
    return engine.values(), HeadResult(None, None, ()).plus(call.head, total)


def _visit_whole_groups(
    engine: Engine, call: HeadCall, token_call: TokenCall | None, plan: Plan
) -> tuple[SequenceValues, HeadResult]:
    """Find log-probabilities and gradients chunk by chunk. The head is called once per chunk.

    Until the last chunk, the head sees the chunk's groups alone: the later sequences' log-probabilities are not known
    yet. With the last chunk all are known, so that this call gives the loss and the reported values of the whole batch.
    """
    group = call.head.group if len(plan.ranges) > 1 else 1  # a head that reads the whole batch gets one chunk
    backward = engine.backward_of_some if call.may_be_zero(engine.tokens) else engine.backward
    losses = []
    for (start, stop), (first, last) in zip(
        plan.ranges, group_ranges(engine.tokens.counts, plan.ranges, group), strict=True
    ):
        engine.forward(start, stop, keep=True)
        values = engine.values()
        if stop < len(engine.tokens.rows):
            logp_grads = call.grads_of_groups(values, first, last)
        else:
            result = call.on_batch(values)
            logp_grads = result.logp_grads
        token_grads = engine.token_grads(logp_grads)
        if token_call is not None:
            loss, of_tokens = token_call(TokenValues(*engine.per_token[:, start:stop]), start, stop)
            losses.append(loss)
            token_grads[start:stop] += of_tokens
        backward(start, stop, token_grads)
    return values, result if token_call is None else result.plus(token_call.head, sum(losses))


def _visit_split_groups(engine: Engine, call: HeadCall, plan: Plan) -> tuple[SequenceValues, HeadResult]:
    """Find log-probabilities and gradients in one visit where a group exceeds a chunk, see ``plan._split_groups``.

    A chunk holds whole groups, or some tokens of a single sequence. In the second case its gradients are those of the
    weighted log-probabilities alone, until the group's last chunk brings the loss: it scales the accumulators and the
    rows of the gradient by the hidden states.
    """
    counts, group = engine.tokens.counts, call.head.group
    ends = list(itertools.accumulate(counts))
    group_ends = ends[group - 1 :: group]
    weights = engine.tokens.weights
    weights = engine.per_token.new_ones(len(engine.tokens.rows)) if weights is None else weights
    may_be_zero = call.may_be_zero(engine.tokens)
    backward = engine.backward_of_some if may_be_zero else engine.backward
    accumulators: dict[int, HeadSums] = {}  # of the present group's sequences
    total = engine.zeroed_sums()
    for start, stop in plan.ranges:
        engine.forward(start, stop, keep=True)
        sequence = bisect.bisect_right(ends, start)  # that of the first token; empty sequences are passed over
        first = sequence // group
        if stop < group_ends[first]:
            sums = accumulators.get(sequence)
            if sums is None:
                accumulators[sequence] = sums = engine.zeroed_sums()
            backward(start, stop, weights, into=sums)
            continue
        last = bisect.bisect_right(group_ends, stop)
        factors = engine.unweighted_grads(call.grads_of_groups(engine.values(), first, last))
        backward(start, stop, weighted_grads(factors, engine.tokens.weights), into=total)
        for sequence, sums in accumulators.items():
            begin, end = ends[sequence] - counts[sequence], min(ends[sequence], start)
            if not may_be_zero or factors[begin] != 0:  # a sequence of weight 0 may hold NaN
                total.add(sums, factors[begin])  # one factor for all tokens of a sequence
            engine.scale_rows(begin, end, factors)
        accumulators.clear()
    engine.weight_sum, engine.bias_sum = total
    values = engine.values()
    return values, call.on_batch(values)


def _visit_before_loss(
    engine: Engine, call: HeadCall, token_call: TokenCall | None, plan: Plan, weight: torch.Tensor, mode: GradientMode
) -> tuple[SequenceValues, HeadResult]:
    """Find all log-probabilities, then the loss, then the gradients of the mode OF_LOSS.

    With a frozen head the chunks leave d log-probability / d hidden, whose rows the loss scales. With a trained one, a
    second visit computes the logits again. In the other modes ``backward`` or the caller does either.
    """
    is_direction = plan.spec.keeps == "panels"  # chunks leave d log-probability / d hidden
    if mode is GradientMode.IN_BACKWARD or engine.options.is_head_trained:
        engine.start_statistics()
    ones, backward, weights = engine.per_token.new_ones(len(engine.tokens.rows)), engine.backward, engine.tokens.weights
    if weights is not None and token_call is None:  # a token's loss beside the sequences' does not read these weights
        ones, backward = (weights != 0).to(ones.dtype), engine.backward_of_some
    for start, stop in plan.ranges:
        engine.forward(start, stop, keep=is_direction)
        if is_direction:
            backward(start, stop, ones)
    values = engine.values()
    result, of_tokens = call.on_batch(values), None
    if token_call is not None:
        total, of_tokens = token_call(TokenValues(*engine.per_token), 0, len(engine.tokens.rows))
        result = result.plus(token_call.head, total)
    if mode is GradientMode.OF_LOSS:
        if call.head is None:  # a token-level head comes here only where there are no tokens
            token_grads = of_tokens
        else:
            token_grads = engine.token_grads(result.logp_grads)
            if of_tokens is not None:
                token_grads = token_grads + of_tokens
        if is_direction:
            engine.scale_hidden_gradient(token_grads, plan.ranges)
        else:
            _visit_again(engine, weight, token_grads, may_be_zero=call.may_be_zero(engine.tokens))
    return values, result


def find_tokens(
    weight: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    options: HiddenOptions,
    group: int,
) -> CompletionTokens:
    """Check the labels where the host may read them, and find the completion tokens."""
    labelling = {**options.logits.labelling, "vocab_size": len(weight)}
    check_contents(labels, cu_seqlens, **labelling)
    tokens = completion_tokens(labels, cu_seqlens, group=group, **labelling)
    return tokens if token_weights is None else replace(tokens, weights=token_weights.flatten()[tokens.rows])


def _visit_reference(
    reference: Reference,
    tokens: CompletionTokens,
    plan: Plan,
    weight: torch.Tensor,
    weight_sum: torch.Tensor | None,
    options: HiddenOptions,
) -> ReferenceVisit:
    """Find the reference's log-probabilities before the policy's visit, in the policy's chunk where that is as fast."""
    hidden, ref_weight, bias = reference
    # under autocast the LM head is copied: one copy for both models, or one after the other
    is_shared = ref_weight.is_set_to(weight) and options.ref_dtype == options.dtype
    ref_weight = ref_weight.to(options.ref_dtype)
    ref_options, chunk = replace(options, dtype=options.ref_dtype, needs=Needs()), None
    num_tokens, spec = len(tokens.rows), chunk_spec(ref_weight, ref_options, "nothing")
    limit = spec.capacity()
    if ref_options.dtype == options.dtype and not _takes_fewer(spec, ref_weight, num_tokens, plan):
        chunk = make_chunk(plan, weight_sum)
        most = max(1, chunk.num_tokens)
        # the chunk was made for hidden states of the policy's width
        limit = min(limit, most) if ref_weight.shape[1] > weight.shape[1] else most
    ranges = even_ranges(num_tokens, limit)
    ref_chunk = chunk or make_chunk(Plan(spec, ranges))
    engine = Engine(hidden, ref_weight, bias, tokens, ref_chunk, ref_options, ref_weight.dtype)
    for start, stop in ranges:
        engine.forward(start, stop)
    return ReferenceVisit(engine.values().logps, chunk, ref_weight if is_shared else None)


def _takes_fewer(spec: ChunkSpec, ref_weight: torch.Tensor, num_tokens: int, plan: Plan) -> bool:
    """Return whether the reference needs fewer chunks if it gets its own, before the policy's is allocated.

    Only where logits stay in registers: tiles in memory of another size than the policy's would round differently, and
    the log-ratios of equal models would not be exactly 0. (The last columns, fewer than a tile in registers, go through
    memory in any case and may be rounded differently there.)
    """
    if spec.kind is not FoldedRows or not spec.goes_through_registers(ref_weight):
        return False
    shared, own = (max(1, size) for size in (longest_range(plan.ranges), min(num_tokens, spec.enough_tokens)))
    is_fewer = len(even_ranges(num_tokens, own)) < len(even_ranges(num_tokens, shared))
    return is_fewer and spec.size(own) <= spec.num_bytes


def _visit_again(engine: Engine, weight: torch.Tensor, token_grads: torch.Tensor, *, may_be_zero: bool) -> None:
    """Compute the logits again, and all gradients.

    With ``may_be_zero`` tokens whose gradient is exactly 0 are not visited, and the host waits for their number.
    """
    engine.chunk = None  # frees the first visit's chunk before the second's is allocated
    rows, targets, statistics = engine.tokens.rows, engine.tokens.targets, engine.statistics
    if may_be_zero:
        alive = (token_grads != 0).nonzero().flatten()
        if len(alive) < len(rows):
            rows, targets, token_grads = rows[alive], targets[alive], token_grads[alive]
            statistics = statistics[:, alive]
    plan = plan_second_visit(len(rows), weight, engine.options)
    engine.chunk = make_chunk(plan)
    engine.start_sums(empty_weight_sum(plan, weight, engine.options))
    for start, stop in plan.ranges:
        of_chunk = slice(start, stop)
        engine.visit_again(
            rows[of_chunk], targets[of_chunk], statistics[:, of_chunk], token_grads[of_chunk], add=start > 0
        )


def backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    logp_grads: torch.Tensor,
    statistics: torch.Tensor,
    options: HiddenOptions,
) -> Gradients:
    """Return the gradients by computing the logits again, for IN_BACKWARD.

    ``logp_grads`` is d loss / d log-probability of the sequences [B] or positions [rows], ``statistics`` comes from
    ``forward``.
    """
    options = beside_bookkeeping(labels.numel(), weight, options)
    tokens = find_tokens(weight, labels, cu_seqlens, token_weights, options, group=1)
    engine = Engine(hidden, weight.to(options.dtype), bias, tokens, None, options, weight.dtype)
    engine.statistics = statistics
    _visit_again(engine, weight, engine.token_grads(logp_grads), may_be_zero=True)
    return engine.gradients()
