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
from dataclasses import replace
from typing import Any

import torch

from .chunks import NUM_STATISTICS, ChunkSpec, FoldedRows, LMHead, WholeRows, move_rows
from .layout import CompletionTokens, check_contents, completion_tokens
from .logits import sequence_backward, sequence_sums
from .options import HiddenOptions
from .plan import (
    Plan,
    beside_bookkeeping,
    chunk_room,
    chunk_spec,
    empty_weight_sum,
    even_ranges,
    held_dtype,
    longest_range,
    make_chunk,
    plan_second_visit,
    plan_visit,
)

logger = logging.getLogger(__name__)


# ---- engine -------------------------------------------------------------------------------------------------------


class Engine:
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
        # clone: a slice's alignment would compile another variant of the kernels
        targets = self.tokens.targets[start:stop].clone()
        self.chunk.fold(self.chunk_hidden, self.lm_head, targets, keep)
        self.per_token[:, start:stop] = self.chunk.finish(self.lm_head)
        if self.statistics is not None:
            for values, statistic in zip(self.statistics, self.chunk.statistics, strict=True):
                if statistic is not None:
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
    ``Engine.positions``. ``reference`` is the reference's (hidden, weight, bias).

    Three cases. The loss is one number: the gradients are by it. It is not (one value per sequence or pair, or no
    head), and the LM head is frozen: the gradient by hidden is of each token's own log-probability, for the backward
    to scale. It is not, and the LM head is trained: there are no gradients, but ``statistics`` for ``backward``, else
    None.
    """
    is_total = head is not None and head.reduction != "none"
    is_left_to_backward = not is_total and options.is_head_trained
    options = beside_bookkeeping(labels.numel(), weight, options)
    if is_left_to_backward:
        options = replace(options, needs=(False, False, False))
    paired = is_total and head.paired  # a chunk holds whole pairs
    room = chunk_room(weight, options)  # before the host waits for the device
    tokens = find_tokens(weight, labels, cu_seqlens, options, paired)
    couples = is_total and head.couples_batch(*head_tensors)
    plan = plan_visit(tokens.counts, room, weight, options, is_total=is_total, paired=paired, couples=couples)
    weight_sum = empty_weight_sum(plan, weight, options) if plan.spec.lent_bytes else None

    chunk = gemm_weight = None
    if reference[0] is not None:
        ref_logps, chunk, gemm_weight = _reference_logps(reference, tokens, plan, weight, weight_sum, options)
    if gemm_weight is None:
        gemm_weight = weight.to(options.dtype)
    chunk = chunk or make_chunk(plan, weight_sum)
    engine = Engine(hidden, gemm_weight, bias, tokens, chunk, options, weight.dtype)
    del chunk

    def apply_head() -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        values = engine.positions() if options.per_position else engine.sequences()
        return values, () if head is None else head(*values[:2], ref_logps, *head_tensors)

    if plan.is_loss_in_time:
        engine.start_sums(empty_weight_sum(plan, weight, options) if weight_sum is None else weight_sum)
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


def find_tokens(
    weight: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor | None, options: HiddenOptions, paired: bool
) -> CompletionTokens:
    layout = {"ignore_index": options.logits.ignore_index, "shift": options.logits.shift, "vocab_size": len(weight)}
    check_contents(labels, cu_seqlens, **layout)
    return completion_tokens(labels, cu_seqlens, paired=paired, **layout)


def _reference_logps(
    reference: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    tokens: CompletionTokens,
    plan: Plan,
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
    num_tokens, spec = len(tokens.rows), chunk_spec(ref_weight, ref_options, "nothing")
    limit = spec.capacity()
    if ref_options.dtype == options.dtype and not _takes_fewer(spec, ref_weight, num_tokens, plan):
        chunk = make_chunk(plan, weight_sum)
        most = max(1, chunk.num_tokens)
        # it was made for hidden states of the policy's width
        limit = min(limit, most) if ref_weight.shape[1] > weight.shape[1] else most
    ranges = even_ranges(num_tokens, limit)
    ref_chunk = chunk or make_chunk(Plan(spec, ranges))
    engine = Engine(hidden, ref_weight, bias, tokens, ref_chunk, ref_options, ref_weight.dtype)
    for start, stop in ranges:
        engine.forward(start, stop)
    return engine.sequences()[0], chunk, ref_weight if is_shared else None


def _takes_fewer(spec: ChunkSpec, ref_weight: torch.Tensor, num_tokens: int, plan: Plan) -> bool:
    """Whether the reference takes fewer chunks of its own, before the policy's take their memory. Not where tiles in
    memory would be others than the policy's: of equal models the log-ratios would no longer be exactly 0. (The last
    columns, less than a tile of registers', go through memory all the same, and may be rounded otherwise there.)
    """
    if spec.kind is not FoldedRows or not spec.goes_through_registers(ref_weight):
        return False
    shared, own = (max(1, size) for size in (longest_range(plan.ranges), min(num_tokens, spec.enough_tokens)))
    is_fewer = len(even_ranges(num_tokens, own)) < len(even_ranges(num_tokens, shared))
    return is_fewer and spec.size(own) <= spec.num_bytes


def _visit_again(engine: Engine, weight: torch.Tensor, token_grads: torch.Tensor) -> None:
    """Compute the logits once more, and all gradients."""
    engine.chunk = None  # before the other takes its memory
    plan = plan_second_visit(len(engine.tokens.rows), weight, engine.options)
    engine.chunk = make_chunk(plan)
    engine.start_sums(empty_weight_sum(plan, weight, engine.options))
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
    options = beside_bookkeeping(labels.numel(), weight, options)
    tokens = find_tokens(weight, labels, cu_seqlens, options, paired=False)
    engine = Engine(hidden, weight.to(options.dtype), bias, tokens, None, options, weight.dtype)
    engine.statistics = statistics
    _visit_again(engine, weight, engine.token_grads(logp_grads))
    return engine.gradients()
