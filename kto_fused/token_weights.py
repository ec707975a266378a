"""Token weights: the factors w_t of the tokens' log-probabilities l_t in a sequence's sum, L_s = sum_t w_t l_t.

A caller gives weights aligned with ``labels``; an engine takes them aligned with rows, the positions of the logits.
With ``shift``, row t predicts the label t + 1.
"""

import torch

from . import checks
from .engines.layout import MASKED, row_sequences, row_targets
from .engines.options import LogitOptions


def ld_token_weights(
    labels: torch.Tensor,
    ld_alpha: float,
    *,
    cu_seqlens: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
) -> torch.Tensor:
    """Token weights of LD-DPO (Liu et al. 2024, arXiv 2409.06411): 1 for the first min(n_w, n_l) completion tokens of
    both answers of a pair, ``ld_alpha`` for the longer answer's other tokens.

    A head's field ``ld_alpha`` applies them to the policy, and to a reference model that comes as hidden states or
    logits. Use this function for log-probabilities that you compute beforehand:
    ``sequence_logps(ref_logits, labels, token_weights=ld_token_weights(labels, ld_alpha))``.

    Args:
        labels: [B, T] (or [N]) integer token ids; the batch's first half is chosen, its second half rejected.
        ld_alpha: in [0, 1].
        cu_seqlens, ignore_index, shift: as in ``fused_kto_loss``.

    Returns:
        float64, shaped as ``labels`` and aligned with them: entry t belongs to the token ``labels[:, t]``. Entries of
        tokens that no position predicts have no meaning.

    Raises:
        ValueError, TypeError: ``ld_alpha`` lies outside [0, 1], or the batch is odd.

    >>> import torch, kto_fused
    >>> labels = torch.tensor([[-100, 3, 4, 5], [-100, 7, -100, -100]])
    >>> kto_fused.ld_token_weights(labels, 0.5)[0]
    tensor([1.0000, 1.0000, 0.5000, 0.5000], dtype=torch.float64)
    """
    checks.number("ld_alpha", ld_alpha, at_least=0)
    if ld_alpha > 1:
        raise ValueError(f"ld_alpha must lie in [0, 1], got {ld_alpha}")
    checks.tensor("labels", labels, checks.INTEGER_DTYPES, "integer token ids")
    rows = checks.rows_and_labels("labels", labels.double()[..., None], labels, cu_seqlens, last="1")
    checks.pairs(rows.num_sequences)
    is_token = completion_rows(rows.labels, rows.cu_seqlens, LogitOptions(ignore_index=ignore_index, shift=shift))
    weights = ld_row_weights(is_token, rows.cu_seqlens, float(ld_alpha), torch.float64)
    if shift:  # from rows to labels; no row predicts the first label of a sequence
        weights = weights.roll(1, -1)
        if cu_seqlens is None:
            weights[:, 0] = 1.0
    return weights.view(labels.shape)


def row_weights(
    token_weights: torch.Tensor | None,
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    options: LogitOptions,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """Check a caller's ``token_weights``. Return each row's weight, 0 where the row predicts no completion token."""
    if token_weights is None:
        return None
    checks.tensor("token_weights", token_weights, checks.NUMBER_DTYPES, checks.A_NUMBER)
    token_weights = checks.without_packed_batch(token_weights, labels.shape)
    checks.shaped_like("token_weights", token_weights, "labels", labels)
    weights = from_labels_to_rows(token_weights.detach().to(dtype), options.shift)
    weights = torch.where(completion_rows(labels, cu_seqlens, options), weights, 0.0)
    checks.not_negative("token_weights", weights)
    return weights


def ld_row_weights(
    is_token: torch.Tensor, cu_seqlens: torch.Tensor | None, ld_alpha: float, dtype: torch.dtype
) -> torch.Tensor:
    """Return 1 for the rows of a pair's first min(n_w, n_l) completion tokens, else ``ld_alpha``.

    ``is_token`` says which rows predict a completion token.
    """
    counts, seen = counts_of_rows(is_token, cu_seqlens), is_token.cumsum(-1)
    chosen, rejected = counts.chunk(2)
    shared = torch.minimum(chosen, rejected).repeat(2)
    if cu_seqlens is None:
        is_shared = seen <= shared[:, None]
    else:
        sequence = _sequence_of_rows(cu_seqlens, len(is_token))
        is_shared = seen - (counts.cumsum(0) - counts)[sequence] <= shared[sequence]
    return torch.ones(is_shared.shape, dtype=dtype, device=is_shared.device).masked_fill(~is_shared, ld_alpha)


def completion_rows(labels: torch.Tensor, cu_seqlens: torch.Tensor | None, options: LogitOptions) -> torch.Tensor:
    """Return which rows predict a completion token: bool, shaped as ``labels`` [B, T] or [N]."""
    # the vocabulary's size decides which labels are invalid, not which are masked
    return row_targets(labels, cu_seqlens, vocab_size=1, **options.labelling) != MASKED


def counts_of_rows(is_token: torch.Tensor, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
    """Return the number of rows of each sequence for which ``is_token`` holds. [B, T] or [N] -> [B] int64"""
    if cu_seqlens is None:
        return is_token.sum(-1)
    sequence = _sequence_of_rows(cu_seqlens, len(is_token))
    return sequence.new_zeros(len(cu_seqlens) - 1, dtype=torch.int64).index_add_(0, sequence, is_token.long())


def from_labels_to_rows(values: torch.Tensor, shift: bool) -> torch.Tensor:
    """Return each row's value of the label that it predicts. A row that predicts nothing may get any value."""
    return values.roll(-1, -1) if shift else values


def from_rows_to_labels(values: torch.Tensor, shift: bool) -> torch.Tensor:
    """Return each label's value of the row that predicts it. A label that no row predicts may get any value."""
    return values.roll(1, -1) if shift else values


def _sequence_of_rows(cu_seqlens: torch.Tensor, num_rows: int) -> torch.Tensor:
    # clamp: offsets may be wrong, which the engine finds
    return row_sequences(cu_seqlens, num_rows).clamp(0, len(cu_seqlens) - 2)
