"""From logits to log-probabilities, and from d loss / d log-probability back to d loss / d logits.

Three ``autograd.Function``s take logits: ``TokenLogps``, ``SequenceLogps`` and ``LossFromLogits``. They share a row
operation and a sequence operation, which run as Triton kernels or in PyTorch (``cpu.py``) and are operators for
``torch.compile``. No loss is known here; ``LossFromLogits`` calls the head that it is given.

Forward:   logits -> row operation -> token log-probabilities -> sequence operation -> log-probabilities [B]
           -> loss head -> loss, and its gradient by the log-probabilities
Backward:  incoming gradient times the head's -> sequence operation -> token gradients -> row operation
           -> d loss / d logits
"""

import math
from typing import Any, NamedTuple, Optional

import torch

from ..heads import base as heads
from . import cpu
from .backends import multiprocessors, on_device, opaque
from .first_derivative import first_derivative_only
from .layout import MASKED, check_contents, compute_dtype, row_targets, scale_grads
from .options import LOGIT_SCHEMA, LogitOptions
from .results import RowResults, SequenceValues, TokenValues, num_token_values, row_statistics
from .tokens import is_mixed, reads_tokens, token_loss

# ---- operators ----------------------------------------------------------------------------------------------------


def row_outputs(logits: torch.Tensor, sum_squares: bool) -> RowResults:
    """Return empty tensors for the row operation to fill."""
    rows = math.prod(logits.shape[:-1])  # Size.numel() would fix a symbolic length
    row_max, log_sum = (logits.new_empty(rows, dtype=compute_dtype(logits)) for _ in range(2))
    per_token = row_max.new_empty(num_token_values(sum_squares), rows)
    return RowResults(logits.new_empty(rows, dtype=torch.int32), row_max, log_sum, per_token)


@opaque(
    fake=lambda logits, labels, cu_seqlens, *flat: row_outputs(logits, LogitOptions(*flat).sum_squares),
    schema=f"(Tensor logits, Tensor labels, Tensor? cu_seqlens, {LOGIT_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _token_logprobs(logits, labels, cu_seqlens, *flat_options) -> tuple[torch.Tensor, ...]:
    """The fields of ``RowResults``."""
    options = LogitOptions(*flat_options)
    check_contents(labels, cu_seqlens, **options.labelling, vocab_size=logits.shape[-1])
    if options.backend == "torch":
        return cpu.token_logprobs(
            logits, labels, cu_seqlens, sum_squares=options.sum_squares, **options.labelling, **options.transform
        )
    from ..kernels import token_logprobs

    outputs = row_outputs(logits, options.sum_squares)
    with on_device(logits):
        token_logprobs.forward(
            logits,
            labels,
            cu_seqlens,
            outputs,
            multiprocessors=multiprocessors(logits.device),
            sum_squares=options.sum_squares,
            **options.labelling,
            **options.transform,
        )
    return outputs


_GRADIENT_SCHEMA = f"Tensor targets, Tensor token_grads, Tensor row_max, Tensor log_sum, {LOGIT_SCHEMA}"


@opaque(
    fake=lambda logits, grad, *_: None,
    mutates_args=("grad",),
    schema=f"(Tensor logits, Tensor(a!) grad, {_GRADIENT_SCHEMA}) -> ()",
)
def _token_logprobs_backward(logits, grad, targets, token_grads, row_max, log_sum, *flat_options) -> None:
    """Fill ``grad``, shaped as ``logits``, possibly the same tensor, from ``token_grads`` = d loss / d logps [rows]."""
    options = LogitOptions(*flat_options)
    if options.backend == "torch":
        cpu.token_logprobs_backward(logits, grad, targets, token_grads, row_max, log_sum, **options.transform)
        return
    from ..kernels import token_logprobs

    with on_device(logits):
        token_logprobs.backward(logits, grad, targets, token_grads, row_max, log_sum, **options.transform)


@opaque(fake=lambda logits, *_: None, mutates_args=("logits",), schema=f"(Tensor(a!) logits, {_GRADIENT_SCHEMA}) -> ()")
def _token_logprobs_backward_inplace(logits, *arguments) -> None:
    """Overwrite the logits with their gradient."""
    _token_logprobs_backward(logits, logits, *arguments)


def _sequence_outputs(
    targets: torch.Tensor,
    per_token: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    num_sequences: int,
    *_: Any,
) -> SequenceValues:
    return SequenceValues(
        per_token.new_empty(num_sequences, dtype=torch.float64),
        per_token.new_empty(num_sequences, dtype=torch.int64),
        *[per_token.new_empty(num_sequences) for _ in range(per_token.shape[0] - 1)],
    )


def _no_none(values: SequenceValues) -> list[torch.Tensor]:
    return [value for value in values if value is not None]


@opaque(
    fake=lambda *arguments: _no_none(_sequence_outputs(*arguments)),
    schema="(Tensor targets, Tensor per_token, Tensor? cu_seqlens, SymInt num_sequences, bool average, str backend)"
    " -> Tensor[]",
)
def sequence_sums(
    targets: torch.Tensor,
    per_token: torch.Tensor,
    cu_seqlens: Optional[torch.Tensor],
    num_sequences: int,
    average: bool,
    backend: str,
) -> list[torch.Tensor]:
    """Return the fields of ``SequenceValues``, each [B], from ``per_token`` [4, rows], or from [5, rows] one more."""
    if backend == "torch":
        values = cpu.sequence_sums(targets, per_token, cu_seqlens, num_sequences=num_sequences, average=average)
        return _no_none(values)
    from ..kernels import sequence

    outputs = _no_none(_sequence_outputs(targets, per_token, cu_seqlens, num_sequences))
    seq_len = targets.numel() // num_sequences
    with on_device(targets):
        sequence.forward(targets, per_token, cu_seqlens, outputs, seq_len=seq_len, average=average)
    return outputs


def _fake_sums(values, labels, cu_seqlens, num_sequences, *_: Any) -> torch.Tensor:
    return values.new_empty(num_sequences, dtype=torch.float64)


@opaque(fake=_fake_sums)
def sums_over_labels(
    values: torch.Tensor,
    labels: torch.Tensor,
    cu_seqlens: Optional[torch.Tensor],
    num_sequences: int,
    vocab_size: int,
    ignore_index: int,
    shift: bool,
    backend: str,
) -> torch.Tensor:
    """Return the sums [B] float64 of ``values`` over each sequence's completion tokens. ``values`` has the shape of
    ``labels``, and an entry belongs to the token that the label at its place names.
    """
    labelling = {"ignore_index": ignore_index, "shift": shift, "vocab_size": vocab_size}
    check_contents(labels, cu_seqlens, **labelling)
    targets = row_targets(labels, cu_seqlens, **labelling)
    if shift:  # the entry of the token that a row predicts
        values = values.roll(-1, -1)
    values = torch.where(targets == MASKED, 0.0, values.to(compute_dtype(values)))  # a prompt's entry may be NaN
    per_token = values.new_zeros(len(TokenValues._fields), values.numel())
    per_token[0] = values.flatten()
    targets = targets.flatten().int()
    return sequence_sums(targets, per_token, cu_seqlens, num_sequences, False, backend)[0]


def _fake_sequence_backward(
    targets, token_counts, head_grads, incoming, cu_seqlens, average, dtype, backend
) -> torch.Tensor:
    return targets.new_empty(targets.shape, dtype=dtype)


@opaque(fake=_fake_sequence_backward)
def sequence_backward(
    targets: torch.Tensor,
    token_counts: torch.Tensor,
    head_grads: Optional[torch.Tensor],
    incoming: torch.Tensor,
    cu_seqlens: Optional[torch.Tensor],
    average: bool,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    """Return d loss / d token log-probability [rows] in ``dtype``, the compute dtype of the row operation.

    d loss / d sequence log-probability is ``incoming`` ([], [B/2] or [B]), times ``head_grads`` [B] where given.
    """
    if backend == "torch":
        return cpu.sequence_backward(
            targets, token_counts, head_grads, incoming, cu_seqlens, average=average, dtype=dtype
        )
    from ..kernels import sequence

    token_grads = targets.new_empty(targets.shape, dtype=dtype)
    with on_device(targets):
        sequence.backward(
            targets,
            token_counts,
            head_grads,
            incoming.contiguous(),
            cu_seqlens,
            token_grads,
            seq_len=targets.numel() // token_counts.numel(),
            average=average,
        )
    return token_grads


def weighted_tokens(per_token: torch.Tensor, token_weights: torch.Tensor | None) -> torch.Tensor:
    """Return ``per_token`` with the log-probabilities times their weights [rows]; None: as they are."""
    if token_weights is None:
        return per_token
    logps = heads.weighted(TokenValues(*per_token).logps, token_weights.flatten())
    return torch.cat([logps[None], per_token[1:]])


def weighted_grads(token_grads: torch.Tensor, token_weights: torch.Tensor | None) -> torch.Tensor:
    """Return d loss / d log-probability [rows] from d loss / d (weight times log-probability); 0 for a weight of 0."""
    return token_grads if token_weights is None else heads.weighted(token_grads, token_weights.flatten())


# ---- engine -------------------------------------------------------------------------------------------------------


def _rows_forward(
    logits: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor | None, options: LogitOptions
) -> RowResults:
    return RowResults(*_token_logprobs(logits, labels, cu_seqlens, *options.flat()))


def _sequences_forward(
    targets: torch.Tensor,
    per_token: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    num_sequences: int,
    options: LogitOptions,
) -> SequenceValues:
    per_token, average = weighted_tokens(per_token, token_weights), options.average_log_prob
    return SequenceValues(*sequence_sums(targets, per_token, cu_seqlens, num_sequences, average, options.backend))


class RowsLoss(NamedTuple):
    """A loss of rows' log-probabilities."""

    loss: torch.Tensor
    values: SequenceValues
    head_grads: torch.Tensor  # d loss / d log-probability: [B] of sequences; [rows] where the loss reads tokens
    reported: list[torch.Tensor]


def loss_of_rows(
    targets: torch.Tensor,
    per_token: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    token_weights: torch.Tensor | None,
    num_sequences: int,
    options: LogitOptions,
    head: Any,
    ref_logps: torch.Tensor | None,
    head_tensors: tuple[torch.Tensor | None, ...],
) -> RowsLoss:
    """Call a loss head of any level on ``per_token`` [4, rows] or [5, rows]."""
    values = _sequences_forward(targets, per_token, cu_seqlens, token_weights, num_sequences, options)
    counts = values.token_counts
    if not reads_tokens(head):
        of_sequences = values.logps, counts, ref_logps, *head_tensors
        loss, logp_grads, *reported = head(*of_sequences, **row_statistics(head, values))
        return RowsLoss(loss, values, logp_grads, reported)
    token_head, token_tensors = head.part("token", head_tensors) if is_mixed(head) else (head, head_tensors)
    tokens = TokenValues(*per_token).logps.contiguous(), targets, counts, cu_seqlens
    of_rows = row_statistics(token_head, TokenValues(*per_token)).get("statistics", ())
    loss, token_grads = token_loss(*tokens, token_tensors, list(of_rows), options.shift, *heads.flatten(token_head))
    if is_mixed(head):
        sequence_head, tensors = head.part("sequence", head_tensors)
        completion_counts = head.completion_counts(head_tensors)
        of_sequences = values.logps, counts if completion_counts is None else completion_counts, ref_logps, *tensors
        sequence_loss, logp_grads = sequence_head(*of_sequences, **row_statistics(sequence_head, values))
        loss = loss + sequence_loss
        spread = sequence_backward(
            targets, counts, None, logp_grads, cu_seqlens, options.average_log_prob, token_grads.dtype, options.backend
        )
        token_grads = token_grads + weighted_grads(spread, token_weights)
    return RowsLoss(loss, values, token_grads, [])


def _rows_backward(
    ctx: Any,
    logits: torch.Tensor,
    targets: torch.Tensor,
    token_grads: torch.Tensor,
    row_max: torch.Tensor,
    log_sum: torch.Tensor,
) -> torch.Tensor:
    options: LogitOptions = ctx.options
    arguments = targets, token_grads, row_max, log_sum, *options.flat()
    if not ctx.is_inplace:
        grad = logits.new_empty(logits.shape)
        _token_logprobs_backward(logits, grad, *arguments)
        return grad
    grad = logits.detach()  # the same storage and version counter, without the graph
    _token_logprobs_backward_inplace(grad, *arguments)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(grad)  # an operation that saved these logits must not read gradients
    return grad


def _sequences_backward(ctx: Any, incoming: torch.Tensor) -> torch.Tensor:
    logits, targets, row_max, log_sum, token_counts, head_grads, cu_seqlens, token_weights = ctx.saved_tensors
    average, backend = ctx.options.average_log_prob, ctx.options.backend
    token_grads = sequence_backward(
        targets, token_counts, head_grads, incoming, cu_seqlens, average, row_max.dtype, backend
    )
    return _rows_backward(ctx, logits, targets, weighted_grads(token_grads, token_weights), row_max, log_sum)


def _save(ctx: Any, options: LogitOptions, *tensors: torch.Tensor | None) -> None:
    """Save tensors for the backward, and whether it may overwrite the logits.

    It may not under saved-tensor hooks (checkpointing, ``save_on_cpu``): the tensor that a hook returns may be shared
    with others, who would not notice from its version counter that it now holds gradients.
    """
    ctx.save_for_backward(*tensors)
    ctx.options = options
    ctx.is_inplace = options.inplace_backward and (torch.compiler.is_compiling() or not _has_saved_tensors_hooks())


def _has_saved_tensors_hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class TokenLogps(torch.autograd.Function):
    """Token log-probabilities [rows], 0 where masked."""

    @staticmethod
    def forward(ctx, logits, labels, cu_seqlens, options):
        rows = _rows_forward(logits, labels, cu_seqlens, options)
        _save(ctx, options, logits, rows.targets, rows.row_max, rows.log_sum)
        return TokenValues(*rows.per_token).logps.clone()

    @staticmethod
    @first_derivative_only
    def backward(ctx, incoming):
        logits, targets, row_max, log_sum = ctx.saved_tensors
        grad = _rows_backward(ctx, logits, targets, incoming.contiguous(), row_max, log_sum)
        return grad, None, None, None


class SequenceLogps(torch.autograd.Function):
    """Sequence log-probabilities [B] in float64."""

    @staticmethod
    def forward(ctx, logits, labels, cu_seqlens, token_weights, num_sequences, options):
        rows = _rows_forward(logits, labels, cu_seqlens, options)
        values = _sequences_forward(rows.targets, rows.per_token, cu_seqlens, token_weights, num_sequences, options)
        saved = logits, rows.targets, rows.row_max, rows.log_sum, values.token_counts, None, cu_seqlens, token_weights
        _save(ctx, options, *saved)
        return values.logps

    @staticmethod
    @first_derivative_only
    def backward(ctx, incoming):
        return _sequences_backward(ctx, incoming), None, None, None, None, None


class LossFromLogits(torch.autograd.Function):
    """``(loss, *fields of SequenceValues, *reported)`` of a loss head on the sequences' log-probabilities.

    The head gives its gradient by the log-probabilities [B] in the forward; the backward scales it by the incoming
    gradient. ``reported`` is what the head returns beside the loss and its gradient.
    """

    @staticmethod
    def forward(ctx, *arguments):  # torch.compile may drop the first of named arguments where nothing needs a gradient
        logits, labels, cu_seqlens, token_weights, num_sequences, options, head, ref_logps, *head_tensors = arguments
        rows = _rows_forward(logits, labels, cu_seqlens, options)
        loss, values, head_grads, reported = loss_of_rows(
            rows.targets,
            rows.per_token,
            cu_seqlens,
            token_weights,
            num_sequences,
            options,
            head,
            ref_logps,
            tuple(head_tensors),
        )
        ctx.reads_tokens = reads_tokens(head)
        saved = logits, rows.targets, rows.row_max, rows.log_sum, values.token_counts, head_grads, cu_seqlens
        _save(ctx, options, *saved, token_weights)
        ctx.num_arguments = len(arguments)
        ctx.set_materialize_grads(False)  # otherwise autograd would fill a gradient of zeros for each reported tensor
        ctx.mark_non_differentiable(*values.returned, *reported)
        return loss, *values.returned, *reported

    @staticmethod
    @first_derivative_only
    def backward(ctx, incoming, *_):
        if ctx.reads_tokens:
            logits, targets, row_max, log_sum, _, head_grads, *_ = ctx.saved_tensors
            token_grads = scale_grads(head_grads, incoming).to(head_grads.dtype)
            grad = _rows_backward(ctx, logits, targets, token_grads, row_max, log_sum)
        else:
            grad = _sequences_backward(ctx, incoming)
        return grad, *(None for _ in range(ctx.num_arguments - 1))
