"""The passes from hidden states as ``torch.compile`` sees them: one operator each."""

from typing import Any, Optional

import torch

from ..heads import base as heads
from .backends import opaque
from .chunks import NUM_STATISTICS
from .hidden import backward, forward
from .layout import compute_dtype
from .options import HiddenOptions, LogitOptions
from .plan import held_dtype


def flatten_options(options: HiddenOptions) -> tuple:
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
def linear_forward(
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
def linear_backward(
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
