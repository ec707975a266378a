"""The passes from hidden states as ``torch.compile`` sees them: one operator for the forward, one for the backward.

An operator takes tensors and plain values and returns a list of tensors. ``HiddenOptions.flat`` and ``heads.flatten``
turn the options and the loss head into plain values; inside the operator ``HiddenOptions.unflat`` and ``heads.rebuild``
make them again. In eager mode both functions are called directly.
"""

from typing import Any

import torch

from ..heads import base as heads
from .backends import opaque
from .chunks import NUM_STATISTICS
from .hidden import Reference, backward, forward
from .options import HIDDEN_SCHEMA, NUM_HIDDEN_OPTIONS, GradientMode, HiddenOptions, Needs, gradient_mode
from .plan import held_dtype
from .results import Gradients, HiddenResults, SequenceValues

_POLICY_SCHEMA = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? cu_seqlens, Tensor? token_weights"
_REFERENCE_SCHEMA = (
    "Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias, Tensor? ref_logps, Tensor?[] head_tensors"
)
_HEAD_SCHEMA = "str head_name, str reduction, ScalarType loss_dtype, str[] head_texts, float[] head_numbers"


def _fake_gradients(inputs: tuple[torch.Tensor | None, ...], needs: Needs) -> Gradients:
    wanted = zip(inputs, needs, strict=True)
    return Gradients(*[x.new_empty(x.shape, dtype=held_dtype(x.dtype)) if needed else None for x, needed in wanted])


def _unflat(values: tuple[Any, ...]) -> tuple[HiddenOptions, Any]:
    """Return the options and the loss head; None where there is no head."""
    flat_head = heads.FlatHead(*values[NUM_HIDDEN_OPTIONS:])
    return HiddenOptions.unflat(values[:NUM_HIDDEN_OPTIONS]), heads.rebuild(flat_head) if flat_head.name else None


def _fake_forward(
    hidden,
    weight,
    bias,
    labels,
    cu_seqlens,
    token_weights,
    ref_hidden,
    ref_weight,
    ref_bias,
    ref_logps,
    head_tensors,
    *options_and_head,
) -> list[torch.Tensor]:
    options, head = _unflat(options_and_head)
    num_sequences = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    size = labels.numel() if options.per_position else num_sequences
    compute = options.compute_dtype
    logps = hidden.new_empty(size, dtype=compute if options.per_position else torch.float64)
    counts = hidden.new_empty(size, dtype=torch.int64)
    means = [hidden.new_empty(size, dtype=compute) for _ in range(3)]
    mode = gradient_mode(options.needs, head)
    is_in_backward = mode is GradientMode.IN_BACKWARD
    statistics = hidden.new_empty(NUM_STATISTICS, labels.numel(), dtype=compute) if is_in_backward else None
    loss, head_grads, *reported = (
        (None, None) if head is None else head.outputs(logps, head.reduction, None, head.loss_dtype)
    )
    return HiddenResults(
        SequenceValues(logps, counts, *means),
        None if ref_hidden is None else torch.empty_like(logps),
        _fake_gradients((hidden, weight, bias), Needs() if is_in_backward else options.needs),
        statistics,
        loss,
        head_grads,
        tuple(reported),
    ).to_list()


@opaque(
    fake=_fake_forward,
    waits=True,
    schema=f"({_POLICY_SCHEMA}, {_REFERENCE_SCHEMA}, {HIDDEN_SCHEMA}, {_HEAD_SCHEMA}) -> Tensor[]",
)
def linear_forward(
    hidden,
    weight,
    bias,
    labels,
    cu_seqlens,
    token_weights,
    ref_hidden,
    ref_weight,
    ref_bias,
    ref_logps,
    head_tensors,
    *options_and_head,
) -> list[torch.Tensor]:
    """``hidden.forward``, its results as ``HiddenResults.to_list``."""
    options, head = _unflat(options_and_head)
    reference = None if ref_hidden is None else Reference(ref_hidden, ref_weight, ref_bias)
    policy = hidden, weight, bias, labels, cu_seqlens, token_weights
    return forward(*policy, options, head, reference, ref_logps, tuple(head_tensors)).to_list()


def _fake_backward(
    hidden, weight, bias, labels, cu_seqlens, token_weights, logp_grads, statistics, *options
) -> list[torch.Tensor]:
    return _no_none(hidden, _fake_gradients((hidden, weight, bias), HiddenOptions.unflat(options).needs))


@opaque(
    fake=_fake_backward,
    waits=True,
    schema=f"({_POLICY_SCHEMA}, Tensor logp_grads, Tensor statistics, {HIDDEN_SCHEMA}) -> Tensor[]",
)
def linear_backward(
    hidden, weight, bias, labels, cu_seqlens, token_weights, logp_grads, statistics, *options
) -> list[torch.Tensor]:
    """``hidden.backward``: the fields of ``Gradients``, an empty tensor where no gradient is wanted."""
    policy = hidden, weight, bias, labels, cu_seqlens, token_weights
    return _no_none(hidden, backward(*policy, logp_grads, statistics, HiddenOptions.unflat(options)))


def _no_none(like: torch.Tensor, gradients: Gradients) -> list[torch.Tensor]:
    return [like.new_empty(0) if grad is None else grad for grad in gradients]
