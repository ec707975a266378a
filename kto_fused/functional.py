"""The public functions. Each is a signature, its documentation, and a call of checks and engine.

``arguments`` and ``loss_calls`` check a call, ``heads`` holds the losses, ``engines`` compute. Shapes are given for B
sequences of T positions (N positions where sequences are packed), a vocabulary of V, and hidden states of width H.
Log-probabilities are in nats.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import arguments, checks, loss_calls
from .arguments import HiddenInputs, LogitInputs
from .engines.autograd import LogpsFromHidden, LossFromHidden
from .engines.layout import compute_dtype
from .engines.logits import LossFromLogits, SequenceLogps, TokenLogps
from .engines.logps import LossFromLogps, LossFromTokenLogps
from .engines.results import NUM_RETURNED, SequenceValues
from .heads.base import at_most_one
from .heads.formula import FormulaHead, PreparedLoss
from .heads.preference import DEFAULT_GAMMA, DPOHead, KTOHead
from .heads.protocol import Head, as_loss
from .loss_calls import LogpCall, LossCall
from .metrics import LossMetrics, TokenMetrics
from .token_weights import completion_rows, counts_of_rows

DEFAULT_CHUNK_BYTES = 2**30


def fused_kto_loss(
    policy_logits: torch.Tensor,
    labels: torch.Tensor,
    desirable: torch.Tensor,
    *,
    ref_logits: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    reference_point: torch.Tensor | float | str = "batch_mean",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
    reduction: str = "mean",
    average_log_prob: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, LossMetrics]:
    """KTO loss (Ethayarajh et al. 2024, arXiv 2402.01306) from logits.

    Write L_s for the log-probability of sequence s's completion, r_s = L_s - Lref_s for its log-ratio, z0 for the
    reference point, e_s for +1 (desirable) or -1 (undesirable), w_s for the class weight, sigma for the logistic
    function, and q_s = sigma(e_s beta (r_s - z0)). ``loss_type`` is one of

        kto                 w_s (1 - q_s)       the paper's loss
        kto_squared         w_s (1 - q_s)^2     a variant of it
        apo_zero_unpaired   kto with z0 = 0     APO, D'Oosterlinck et al. 2024, arXiv 2408.06266

    Args:
        policy_logits: [B, T, V] float16, bfloat16, float32 or float64; [N, V] or [1, N, V] with ``cu_seqlens``. The
            last dimension is contiguous, the other strides are free. Half precision and float32 compute in float32.
        labels: [B, T] (or [N]) integer token ids; ``ignore_index`` at prompt and padding positions.
        desirable: [B] bool, or integers 0 and 1.
        ref_logits: the reference model's logits, in the shape of ``policy_logits``; they never receive a gradient.
        ref_logps: [B] the reference model's log-probabilities instead, of any floating dtype: ``sequence_logps`` of its
            logits, with the same ``average_log_prob``. Pass exactly one of ``ref_logits`` and ``ref_logps``.
        reference_point: z0 in nats: a number, a scalar tensor (``kto_reference_point``), or ``"batch_mean"`` for the
            batch's mean log-ratio. It never receives a gradient. For ``apo_zero_unpaired``, leave it out or
            pass 0. Under ``torch.compile``, pass a value that changes as a tensor: a new Python number may compile
            again.
        beta: strength of the pull towards the reference model, > 0.
        desirable_weight, undesirable_weight: class weights, >= 0 (``kto_class_weights``).
        loss_type: ``kto``, ``kto_squared`` or ``apo_zero_unpaired``.
        reduction: ``mean`` over all sequences, ``sum``, or ``none`` ([B]).
        average_log_prob: L_s is the mean over completion tokens instead of the sum.
        cu_seqlens: [B+1] int32 or int64 offsets of the packed sequences, from 0 to N.
        ignore_index: the label of a position that is not part of a completion.
        shift: position t predicts ``labels[:, t + 1]``, as in Hugging Face models; if False, ``labels[:, t]``. The last
            position of a packed sequence predicts nothing.
        temperature, logit_scale, logit_softcap: logits x become z = softcap tanh(scale x / softcap) / temperature, or
            z = scale x / temperature without a soft cap, for the policy and for ``ref_logits``. A soft cap makes even
            an infinite logit finite; without one, +inf gives a NaN loss.
        inplace_backward: write the gradient over ``policy_logits``, which saves a tensor of that size. Use it only
            if no other operation needs the logits in its backward. Autograd raises an error if one does, but does not
            notice a compiled model that uses the logits again, nor your own saved-tensor hooks. A leaf tensor is
            refused. In a checkpoint, or under ``save_on_cpu``, the gradient gets its own tensor.
        backend: ``triton``, ``torch``, or None for the faster one on the tensors' device.

    Returns:
        The loss (float32; float64 for float64 logits) and ``LossMetrics``.

    Raises:
        ValueError, TypeError: an argument's shape, device, dtype or value is not as above; the message names it.
        IndexError: a label lies outside [0, V), on a CPU. On a GPU the sequence's log-probability becomes NaN instead,
            because a check would wait for the device; the environment variable ``KTO_FUSED_VALIDATE=1`` turns the
            check on there too.
        RuntimeError: from autograd, if a second derivative is asked for.

    >>> import torch, kto_fused
    >>> logits = torch.randn(2, 5, 11, requires_grad=True)
    >>> labels = torch.tensor([[-100, -100, 3, 4, 5], [-100, 7, 8, -100, -100]])
    >>> loss, metrics = kto_fused.fused_kto_loss(
    ...     logits, labels, torch.tensor([True, False]), ref_logits=logits.detach(), reference_point=0.0
    ... )
    >>> loss.item(), metrics.token_counts.tolist()
    (0.5, [3, 2])
    """
    inputs = arguments.from_logits(
        "policy_logits",
        policy_logits,
        labels,
        cu_seqlens,
        ref_logits=ref_logits,
        ref_logps=ref_logps,
        average_log_prob=average_log_prob,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    call = loss_calls.of_head(
        KTOHead,
        inputs,
        desirable=desirable,
        reference_point=reference_point,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        loss_type=loss_type,
        reduction=reduction,
    )
    return _loss_from_logits(call)


def fused_dpo_loss(
    policy_logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ref_logits: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    gamma: float = DEFAULT_GAMMA,
    reduction: str = "mean",
    average_log_prob: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, LossMetrics]:
    """DPO loss (Rafailov et al. 2023, arXiv 2305.18290) and its relatives from logits.

    The first half of the batch holds the chosen sequences, the second half the rejected ones: pair i is sequences i and
    i + B/2. Write r_w and r_l for the log-ratios of the chosen and the rejected sequence, h = r_w - r_l, s for the
    label smoothing, and sigma for the logistic function. ``loss_type`` is one of

        sigmoid     -(1-s) log sigma(beta h) - s log sigma(-beta h)
        robust      [-(1-s) log sigma(beta h) + s log sigma(-beta h)] / (1 - 2s)
        hinge       max(0, 1 - beta h)
        ipo         (h - 1 / (2 beta))^2, with log-ratios divided by the completions' lengths
        simpo       sigmoid of beta h - gamma, with log-probabilities divided by the lengths, no reference model
        apo_zero    [1 - sigma(beta r_w)] + sigma(beta r_l)
        apo_down    sigma(beta r_w) + [1 - sigma(beta h)]

    Sources: ``sigmoid`` the DPO paper, for s > 0 Mitchell's note on conservative DPO (2023); ``robust`` Chowdhury et
    al. 2024, arXiv 2403.00409; ``hinge`` SLiC-HF, arXiv 2305.10425; ``ipo`` Azar et al. 2023, arXiv 2310.12036;
    ``simpo`` Meng et al. 2024, arXiv 2405.14734; ``apo_zero`` and ``apo_down`` D'Oosterlinck et al. 2024, arXiv
    2408.06266.

    Args:
        beta: strength of the pull towards the reference model, > 0. For ``simpo``, which has none, the reward's scale.
        label_smoothing: s in [0, 0.5), the assumed share of pairs whose order is wrong; for ``sigmoid``, ``robust`` and
            ``simpo``.
        gamma: SimPO's target margin between rewards, in units of beta h (gamma / beta nats per token); for ``simpo``.
        reduction: ``mean`` over all pairs, ``sum``, or ``none`` ([B/2]).
        ref_logits, ref_logps: the reference model; pass exactly one of them, or neither for ``simpo``.

    All other arguments, the return value and the errors are those of ``fused_kto_loss``; an odd batch is a
    ``ValueError``.

    >>> import torch, kto_fused
    >>> logits = torch.randn(2, 5, 11, requires_grad=True)
    >>> labels = torch.tensor([[-100, -100, 3, 4, 5], [-100, 7, 8, -100, -100]])
    >>> loss, metrics = kto_fused.fused_dpo_loss(logits, labels, ref_logits=logits.detach())
    >>> round(loss.item(), 4), metrics.rewards.tolist()
    (0.6931, [0.0, 0.0])
    """
    inputs = arguments.from_logits(
        "policy_logits",
        policy_logits,
        labels,
        cu_seqlens,
        ref_logits=ref_logits,
        ref_logps=ref_logps,
        average_log_prob=average_log_prob,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    call = loss_calls.of_head(
        DPOHead,
        inputs,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        gamma=gamma,
        reduction=reduction,
    )
    return _loss_from_logits(call)


def fused_linear_kto_loss(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    labels: torch.Tensor,
    desirable: torch.Tensor,
    *,
    lm_head_bias: torch.Tensor | None = None,
    ref_hidden: torch.Tensor | None = None,
    ref_lm_head_weight: torch.Tensor | None = None,
    ref_lm_head_bias: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    reference_point: torch.Tensor | float | str = "batch_mean",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
    reduction: str = "mean",
    average_log_prob: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    backend: str | None = None,
) -> tuple[torch.Tensor, LossMetrics]:
    """KTO loss from hidden states and the LM head: ``fused_kto_loss`` of hidden @ lm_head_weight.T + bias.

    The logits exist for one chunk of completion tokens at a time, in float32 (float64 for float64 hidden states).
    Prompts and padding cost nothing.

    For N completion tokens a GEMM is 2 N H V operations. Loss and gradient take

    - 2 GEMMs if the LM head is frozen
    - 3 if it is trained
    - 4 if it is trained and ``"batch_mean"`` couples a batch that exceeds the chunk, or a single sequence exceeds it
      whose own gradient by the LM head, in float32, exceeds half of ``chunk_bytes``, or ``reduction="none"``

    and the reference model takes 1. The forward finds the gradients, and the backward scales them by the incoming
    gradient. A trained head with ``reduction="none"`` is the exception: its backward computes the logits again. The
    host waits for the device once in the forward, for the number of completion tokens, and once in such a backward.

    Args:
        hidden: [B, T, H] float16, bfloat16, float32 or float64 (any strides); [N, H] or [1, N, H] with ``cu_seqlens``.
        lm_head_weight: [V, H] in the dtype of ``hidden`` (autocast casts both, as for ``torch.nn.Linear``). It may be
            tied to the embedding.
        labels, desirable: as in ``fused_kto_loss``.
        lm_head_bias: [V].
        ref_hidden: the reference model's hidden states [B, T, H_ref]; they never receive a gradient.
        ref_lm_head_weight, ref_lm_head_bias: the reference model's LM head [V, H_ref] and bias [V]. A weight alone
            means no bias. Without a weight, both are the policy's and receive no gradient from the reference.
        ref_logps: [B] the reference model's log-probabilities instead: ``linear_sequence_logps`` of its hidden states.
        chunk_bytes: memory to spend beside the gradients, in bytes; one token always fits. The default, 1 GiB, lets the
            GEMMs run near their full rate. More can spare a long sequence or a coupled batch the fourth GEMM, and makes
            small heads on a GPU (H = 896, 2 GiB) a few percent faster. Memory that makes no GEMM faster is not taken.
            Less than a sequence needs leads to the least memory on a GPU, with 4 GEMMs: the second visit of the logits
            takes one chunk of up to twice ``chunk_bytes``, or of 6 (H + 1024) bytes per token, if that saves a quarter.
            The gradients on top of this are float32 for float16 inputs. The weight's gradient is float32 too if it adds
            up over several chunks, or if one chunk takes the memory of that sum. Under autocast the cast head comes on
            top.

    The other arguments and the errors are those of ``fused_kto_loss``.

    Returns:
        The loss (float32; float64 for float64 hidden states) and ``LossMetrics``.

    >>> import torch, kto_fused
    >>> hidden = torch.randn(2, 5, 8, requires_grad=True)
    >>> lm_head = torch.nn.Linear(8, 11, bias=False)
    >>> labels = torch.tensor([[-100, -100, 3, 4, 5], [-100, 7, 8, -100, -100]])
    >>> loss, metrics = kto_fused.fused_linear_kto_loss(
    ...     hidden, lm_head.weight, labels, torch.tensor([True, False]), ref_hidden=hidden, reference_point=0.0
    ... )
    >>> loss.backward()
    >>> loss.item(), list(hidden.grad.shape), list(lm_head.weight.grad.shape)
    (0.5, [2, 5, 8], [11, 8])
    """
    inputs = arguments.from_hidden(
        hidden,
        lm_head_weight,
        lm_head_bias,
        labels,
        cu_seqlens,
        ref_hidden=ref_hidden,
        ref_lm_head_weight=ref_lm_head_weight,
        ref_lm_head_bias=ref_lm_head_bias,
        ref_logps=ref_logps,
        average_log_prob=average_log_prob,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        chunk_bytes=chunk_bytes,
        backend=backend,
    )
    call = loss_calls.of_head(
        KTOHead,
        inputs,
        desirable=desirable,
        reference_point=reference_point,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        loss_type=loss_type,
        reduction=reduction,
    )
    return _loss_from_hidden(call)


def fused_linear_dpo_loss(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    lm_head_bias: torch.Tensor | None = None,
    ref_hidden: torch.Tensor | None = None,
    ref_lm_head_weight: torch.Tensor | None = None,
    ref_lm_head_bias: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    gamma: float = DEFAULT_GAMMA,
    reduction: str = "mean",
    average_log_prob: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    backend: str | None = None,
) -> tuple[torch.Tensor, LossMetrics]:
    """DPO loss and its relatives from hidden states and the LM head: ``fused_dpo_loss`` of
    hidden @ lm_head_weight.T + bias.

    A chunk holds whole pairs. If the head is trained and a pair exceeds the chunk, one or two float32 gradients by the
    LM head must fit into half of ``chunk_bytes``; if they do not, the logits are computed twice (4 GEMMs). Losses and
    pairs are those of ``fused_dpo_loss``; arguments, result and errors are those of ``fused_linear_kto_loss``.

    >>> import torch, kto_fused
    >>> hidden = torch.randn(2, 5, 8, requires_grad=True)
    >>> lm_head = torch.nn.Linear(8, 11, bias=False)
    >>> labels = torch.tensor([[-100, -100, 3, 4, 5], [-100, 7, 8, -100, -100]])
    >>> loss, metrics = kto_fused.fused_linear_dpo_loss(hidden, lm_head.weight, labels, ref_hidden=hidden)
    >>> loss.backward()
    >>> round(loss.item(), 4), metrics.rewards.tolist()
    (0.6931, [0.0, 0.0])
    """
    inputs = arguments.from_hidden(
        hidden,
        lm_head_weight,
        lm_head_bias,
        labels,
        cu_seqlens,
        ref_hidden=ref_hidden,
        ref_lm_head_weight=ref_lm_head_weight,
        ref_lm_head_bias=ref_lm_head_bias,
        ref_logps=ref_logps,
        average_log_prob=average_log_prob,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        chunk_bytes=chunk_bytes,
        backend=backend,
    )
    call = loss_calls.of_head(
        DPOHead,
        inputs,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        gamma=gamma,
        reduction=reduction,
    )
    return _loss_from_hidden(call)


def token_logps(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Log-probability of each position's target, log softmax(z)_target. Differentiable in ``logits``.

    The arguments and errors are those of ``fused_kto_loss``.

    Returns:
        [B, T] (or [N]) in nats, float32 (float64 for float64 logits); 0 where the position predicts nothing. With
        ``shift``, entry t belongs to ``labels[:, t + 1]``.

    >>> import torch, kto_fused
    >>> kto_fused.token_logps(torch.zeros(1, 3, 4), torch.tensor([[-100, 2, 1]])).exp()
    tensor([[0.2500, 0.2500, 1.0000]])
    """
    inputs = arguments.from_logits(
        "logits",
        logits,
        labels,
        cu_seqlens,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    return TokenLogps.apply(inputs.logits, inputs.labels, inputs.cu_seqlens, inputs.options).view(inputs.labels.shape)


def sequence_logps(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    token_weights: torch.Tensor | None = None,
    average_log_prob: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Log-probability L_s of each sequence's completion. Differentiable in ``logits``.

    Call it under ``torch.no_grad()`` on the reference model's logits for the ``ref_logps`` of a loss.

    Args:
        token_weights: as in ``fused_loss``: L_s is the sum of weight times log-probability, with ``average_log_prob``
            divided by the number of completion tokens, whatever their weights.

    The other arguments and the errors are those of ``fused_kto_loss``.

    Returns:
        [B] in nats: the sum over completion tokens, or their mean with ``average_log_prob``; 0 for a sequence without
        completion tokens. Always float64: the rounding error of a float32 sum over thousands of tokens would exceed
        the rewards.

    >>> import torch, kto_fused
    >>> kto_fused.sequence_logps(torch.zeros(1, 3, 4), torch.tensor([[-100, 2, 1]])).exp()
    tensor([0.0625], dtype=torch.float64)
    """
    inputs = arguments.from_logits(
        "logits",
        logits,
        labels,
        cu_seqlens,
        token_weights=token_weights,
        average_log_prob=average_log_prob,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    return _sequence_logps(inputs.logits, inputs)


def linear_sequence_logps(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    lm_head_bias: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    average_log_prob: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    backend: str | None = None,
) -> torch.Tensor:
    """Log-probability L_s of each sequence's completion, from hidden states and the LM head. Differentiable in hidden
    states, weight and bias.

    It takes 1 GEMM of 2 N H V operations without a gradient (a reference model's ``ref_logps``), 2 with a frozen head,
    and 4 with a trained head, whose logits the backward computes again. ``token_weights`` is as in ``sequence_logps``;
    the other arguments and the errors are those of ``fused_linear_kto_loss``.

    Returns:
        [B] float64 in nats, like ``sequence_logps``.

    >>> import torch, kto_fused
    >>> hidden, weight = torch.zeros(1, 3, 8), torch.randn(4, 8)
    >>> kto_fused.linear_sequence_logps(hidden, weight, torch.tensor([[-100, 2, 1]])).exp()
    tensor([0.0625], dtype=torch.float64)
    """
    inputs = arguments.from_hidden(
        hidden,
        lm_head_weight,
        lm_head_bias,
        labels,
        cu_seqlens,
        token_weights=token_weights,
        average_log_prob=average_log_prob,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        chunk_bytes=chunk_bytes,
        backend=backend,
    )
    return _logps_from_hidden(inputs).logps


def linear_token_logps(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    lm_head_bias: torch.Tensor | None = None,
    return_metrics: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, TokenMetrics]:
    """Log-probability of each position's target: ``token_logps`` of hidden @ lm_head_weight.T + bias. Differentiable in
    hidden states, weight and bias.

    Use it for your own loss on tokens: its backward takes any gradient w.r.t. the log-probabilities. It takes as many
    GEMMs as ``linear_sequence_logps``: 1 without a gradient, 2 with a frozen head, 4 with a trained one.

    Args:
        return_metrics: return each position's ``TokenMetrics`` too. They need no further visit to the logits.

    The other arguments and the errors are those of ``fused_linear_kto_loss``.

    Returns:
        [B, T] (or [N]) in nats, float32 (float64 for float64 hidden states); 0 where the position predicts nothing.
        With ``shift``, entry t belongs to ``labels[:, t + 1]``. With ``return_metrics``, a tuple of these
        log-probabilities and detached ``TokenMetrics``.

    >>> import torch, kto_fused
    >>> hidden, weight = torch.zeros(1, 3, 8), torch.randn(4, 8)
    >>> kto_fused.linear_token_logps(hidden, weight, torch.tensor([[-100, 2, 1]])).exp()
    tensor([[0.2500, 0.2500, 1.0000]])
    """
    checks.flag("return_metrics", return_metrics)
    inputs = arguments.from_hidden(
        hidden,
        lm_head_weight,
        lm_head_bias,
        labels,
        cu_seqlens,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        chunk_bytes=chunk_bytes,
        backend=backend,
        per_position=True,
    )
    logps, metrics = _of_positions(_logps_from_hidden(inputs), inputs.labels.shape)
    return (logps, metrics) if return_metrics else logps


def kto_loss_from_logps(
    policy_logps: torch.Tensor,
    ref_logps: torch.Tensor,
    desirable: torch.Tensor,
    *,
    reference_point: torch.Tensor | float | str = "batch_mean",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    loss_type: str = "kto",
    reduction: str = "mean",
    backend: str | None = None,
) -> tuple[torch.Tensor, LossMetrics]:
    """KTO loss of sequence log-probabilities. Differentiable in ``policy_logps``.

    Args:
        policy_logps, ref_logps: [B] floating-point, in nats, both sums or both means over completion tokens.

    The formula, the other arguments and the errors are those of ``fused_kto_loss``. The loss is float64 for float64
    ``policy_logps``, else float32.

    >>> import torch, kto_fused
    >>> logps = torch.tensor([-10.0, -12.0], requires_grad=True)
    >>> loss, _ = kto_fused.kto_loss_from_logps(
    ...     logps, torch.tensor([-10.0, -12.0]), torch.tensor([True, False]), reference_point=0.0
    ... )
    >>> loss.backward(); logps.grad
    tensor([-0.0125,  0.0125])
    """
    call = loss_calls.of_logps(
        KTOHead,
        policy_logps,
        ref_logps,
        desirable=desirable,
        reference_point=reference_point,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        loss_type=loss_type,
        reduction=reduction,
        backend=backend,
    )
    return _loss_from_logps(call)


def dpo_loss_from_logps(
    policy_logps: torch.Tensor,
    ref_logps: torch.Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    gamma: float = DEFAULT_GAMMA,
    reduction: str = "mean",
    average_log_prob: bool = False,
    token_counts: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, LossMetrics]:
    """DPO loss, or one of its relatives, of sequence log-probabilities. Differentiable in ``policy_logps``.

    Args:
        policy_logps: [B] floating-point, in nats; the chosen sequences, then the rejected ones.
        ref_logps: [B] the reference model's, in the same order; None for ``simpo``.
        average_log_prob: the log-probabilities are means over completion tokens, not sums.
        token_counts: [B] integers >= 0, the completions' lengths. ``ipo`` and ``simpo`` divide sums by them; no other
            loss takes them.

    The formulas, the other arguments and the errors are those of ``fused_dpo_loss``. The loss is float64 for float64
    ``policy_logps``, else float32.

    >>> import torch, kto_fused
    >>> loss, metrics = kto_fused.dpo_loss_from_logps(torch.tensor([-9.0, -12.0]), torch.tensor([-10.0, -12.0]))
    >>> round(loss.item(), 4)
    0.6444
    """
    call = loss_calls.of_logps(
        DPOHead,
        policy_logps,
        ref_logps,
        token_counts=token_counts,
        average_log_prob=average_log_prob,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        gamma=gamma,
        reduction=reduction,
        backend=backend,
    )
    return _loss_from_logps(call)


def fused_loss(
    head: Head | str | Callable[..., torch.Tensor],
    policy_logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ref_logits: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    reduction: str = "mean",
    cu_seqlens: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
    **tensors: torch.Tensor,
) -> tuple[torch.Tensor, LossMetrics]:
    """Any loss straight from logits.

    Args:
        head: the loss: a ``kto_fused.heads.Head``, a ``Mix``, a registered name such as ``"orpo"``, or a function of
            your own, ``f(logps, counts, ref_logps, **tensors)``, which need not be registered.
        ref_logits, ref_logps: the reference, exactly one of them; neither if the loss has none. A function of your own
            may have either or neither.
        token_weights: factors >= 0 of the tokens' log-probabilities in their sequences' sums, L_s = sum_t w_t l_t, for
            the policy and for ``ref_logits``. Shaped as ``labels`` and aligned with them: entry t belongs to the token
            ``labels[:, t]``. ``ref_logps`` must have been summed with the same weights, also with those of a head's
            ``ld_alpha`` < 1 (``ld_token_weights``). Token counts stay the numbers of completion tokens. A token of
            weight 0 takes no part: its gradient is exactly 0, even where its row holds NaN or infinities, which only
            the metrics then show. Token-level losses take ``weights`` instead.
        reduction: ``mean`` over the losses, ``sum``, or ``none``: one loss per sequence or pair.
        tensors: the loss's own tensors by the names in its ``losses``: ``desirable`` [B], ``z0``, ``delta``, or any
            name that your class declares; each [B], one per pair [B/2], or a scalar. Those that the class names in
            ``summed_tensors``, and all of a token-level loss, may have the shape of ``labels`` instead, aligned with
            them. None of them gets a gradient. ``weights`` >= 0, one per loss, multiplies the losses of any head; a
            mean still divides by their number. What has weight 0 takes no part, even where its rows hold NaN or
            infinities, unless one loss reads the whole batch. With ``num_items=0`` loss and gradient are 0.

    All other arguments, the return value and the errors are those of ``fused_kto_loss``. ``metrics.reported`` holds
    what the head's ``report`` returns beside the rewards.

    Raises:
        TypeError: a tensor that the loss does not know, or lacks.
        ValueError: the loss declares that groups of sequences do not depend on each other, and they do.

    >>> import torch, kto_fused
    >>> logits, labels = torch.randn(2, 5, 11, requires_grad=True), torch.randint(11, (2, 5))
    >>> loss, metrics = kto_fused.fused_loss("simpo", logits, labels)
    >>> loss.backward()
    """
    inputs = arguments.from_logits(
        "policy_logits",
        policy_logits,
        labels,
        cu_seqlens,
        ref_logits=ref_logits,
        ref_logps=ref_logps,
        token_weights=token_weights,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        inplace_backward=inplace_backward,
        backend=backend,
    )
    call = loss_calls.of_loss(inputs, head, tensors, reduction)
    if call.function is None:
        return _loss_from_logits(call)
    at_most_one(ref_logits=ref_logits, ref_logps=ref_logps)
    inputs = call.inputs
    logps, ref_logps = _sequence_logps(inputs.logits, inputs), inputs.ref_logps
    if inputs.ref_logits is not None:
        ref_logps = _sequence_logps(inputs.ref_logits, inputs)
    counts = counts_of_rows(completion_rows(inputs.labels, inputs.cu_seqlens, inputs.options), inputs.cu_seqlens)
    dtype = compute_dtype(policy_logits)
    return loss_calls.plain_loss(call.function, logps, counts, ref_logps, tensors, reduction, dtype)


def fused_linear_loss(
    head: Head | str | Callable[..., torch.Tensor],
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    lm_head_bias: torch.Tensor | None = None,
    ref_hidden: torch.Tensor | None = None,
    ref_lm_head_weight: torch.Tensor | None = None,
    ref_lm_head_bias: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    reduction: str = "mean",
    cu_seqlens: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    backend: str | None = None,
    return_tokens: bool = False,
    **tensors: torch.Tensor,
) -> tuple[torch.Tensor, LossMetrics] | tuple[torch.Tensor, torch.Tensor, TokenMetrics]:
    """Any loss straight from hidden states and the LM head, without logits.

    A registered head takes as many GEMMs as ``fused_linear_kto_loss``: 2 with a frozen LM head and 3 with a trained
    one; 4 where a group of sequences exceeds the chunk, as there. A token-level head takes 2 and 3 at any length, and
    leaves tokens whose gradient is exactly 0 out of the gradient's GEMMs; so does any head with ``token_weights`` of 0
    where chunks hold whole groups. A ``Mix`` of token-level and other heads takes 4 where a group exceeds the chunk. A
    function that is not registered takes 4 with a trained LM head.

    Args:
        head: as in ``fused_loss``.
        ref_hidden, ref_logps: the reference, exactly one of them; neither if the loss has none.
        token_weights: as in ``fused_loss``, for the policy and for ``ref_hidden``.
        tensors: the loss's own tensors by the names in its ``losses``: ``desirable`` [B], ``z0``, ``delta``, or any
            name that your class declares; each [B], one per pair [B/2], or a scalar. Those that the class names in
            ``summed_tensors``, and all of a token-level loss, may have the shape of ``labels`` instead, aligned with
            them. None of them gets a gradient. ``weights`` >= 0, one per loss, multiplies the losses of any head; a
            mean still divides by their number. What has weight 0 takes no part, even where its rows hold NaN or
            infinities, unless one loss reads the whole batch. With ``num_items=0`` loss and gradient are 0.
        return_tokens: for a token-level head: return (loss, log-probabilities, ``TokenMetrics``), the last two of each
            position as ``linear_token_logps`` returns them, detached. They need no further visit to the logits.

    All other arguments, the return value and the errors are those of ``fused_loss`` and ``fused_linear_kto_loss``.

    >>> import torch, kto_fused
    >>> hidden, lm_head = torch.randn(2, 5, 8, requires_grad=True), torch.nn.Linear(8, 11, bias=False)
    >>> labels = torch.randint(11, (2, 5))
    >>> loss, metrics = kto_fused.fused_linear_loss("orpo", hidden, lm_head.weight, labels)
    >>> loss.backward()
    """
    loss_calls.check_return_tokens(return_tokens, head)
    inputs = arguments.from_hidden(
        hidden,
        lm_head_weight,
        lm_head_bias,
        labels,
        cu_seqlens,
        chunk_bytes=chunk_bytes,
        ref_hidden=ref_hidden,
        ref_lm_head_weight=ref_lm_head_weight,
        ref_lm_head_bias=ref_lm_head_bias,
        ref_logps=ref_logps,
        token_weights=token_weights,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        backend=backend,
        per_position=return_tokens,
    )
    call = loss_calls.of_loss(inputs, head, tensors, reduction)
    if call.function is None:
        loss, metrics = _loss_from_hidden(call)
        return (loss, *_of_positions(metrics, inputs.labels.shape)) if return_tokens else (loss, metrics)
    at_most_one(ref_hidden=ref_hidden, ref_logps=ref_logps)
    inputs = call.inputs
    policy, ref_logps = _logps_from_hidden(inputs), inputs.reference.logps
    if inputs.reference.hidden is not None:
        ref_logps = _logps_from_hidden(arguments.of_reference(inputs)).logps
    sequences = policy.logps, policy.token_counts, ref_logps
    return loss_calls.plain_loss(call.function, *sequences, tensors, reduction, compute_dtype(hidden))


def loss_from_logps(
    head: Head | str | Callable[..., torch.Tensor],
    policy_logps: torch.Tensor,
    ref_logps: torch.Tensor | None = None,
    *,
    token_counts: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
    **tensors: torch.Tensor,
) -> tuple[torch.Tensor, LossMetrics]:
    """Any loss of log-probabilities that you already have. Differentiable in ``policy_logps``.

    A loss of sequences takes one log-probability per sequence. A token-level loss, and a ``Mix`` with one, takes one
    per position, such as ``token_logps`` returns, and ``labels`` or ``mask``.

    Args:
        head: as in ``fused_loss``.
        policy_logps: [B] floating-point, in nats, summed over completion tokens; for pairs chosen, then rejected. For
            losses of tokens [B, T], or [N] with ``cu_seqlens``.
        ref_logps: [B] the reference model's; None if the loss has none.
        token_counts: [B] integers >= 0, the completions' lengths, for losses of sequences that read them.
        labels: [B, T] (or [N]), for losses of tokens: as they were given to ``token_logps``, shifted. Entry t of
            ``policy_logps`` belongs to ``labels[:, t + 1]``, and counts unless that is -100. The loss's tensors are
            aligned with ``labels``.
        mask: instead of labels, for any other layout: which entries of ``policy_logps`` count, bool or 0 and 1, in its
            shape. The loss's tensors are then aligned with ``policy_logps``.
        token_weights, cu_seqlens: as in ``fused_loss``, for losses of tokens.
        tensors: the loss's own tensors by the names in its ``losses``: ``desirable`` [B], ``z0``, ``delta``, or any
            name that your class declares; each [B], one per pair [B/2], or a scalar. None of them gets a gradient.
            ``weights`` >= 0, one per loss, multiplies the losses of any head; a mean still divides by their number.

    Returns and raises what ``fused_loss`` does.

    >>> import torch, kto_fused
    >>> loss, metrics = kto_fused.loss_from_logps("sigmoid", torch.tensor([-9.0, -12.0]), torch.tensor([-10.0, -12.0]))
    >>> round(loss.item(), 4)
    0.6444
    """
    loss = as_loss(head)
    token_arguments = {"labels": labels, "mask": mask, "token_weights": token_weights, "cu_seqlens": cu_seqlens}
    if loss_calls.takes_token_logps(loss, token_counts):
        inputs = arguments.from_token_logps(policy_logps, ref_logps, backend=backend, **token_arguments)
        return _loss_from_token_logps(loss_calls.of_loss(inputs, loss, tensors, reduction))
    tensors = loss_calls.tensors_of_sequences(head, token_arguments, tensors)
    if isinstance(loss, Head):
        call = loss_calls.of_logps(
            FormulaHead,
            policy_logps,
            ref_logps,
            token_counts=token_counts,
            backend=backend,
            loss=loss,
            tensors=tensors,
            reduction=reduction,
        )
        return _loss_from_logps(call)
    checks.policy_logps(policy_logps)
    sequences = policy_logps, token_counts, ref_logps
    return loss_calls.plain_loss(loss, *sequences, tensors, reduction, compute_dtype(policy_logps))


def kto_reference_point(
    policy_kl_logps: torch.Tensor,
    ref_kl_logps: torch.Tensor,
    *,
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> torch.Tensor:
    """The KTO paper's reference point: z0 = max(0, mean_i [log pi(y_j | x_i) - log pi_ref(y_j | x_i)]), j = i+1 mod m.

    The log-probabilities are those of mismatched pairs: each prompt with the next prompt's completion (Ethayarajh et
    al. 2024, arXiv 2402.01306). If ``torch.distributed`` is initialised, the mean is over all ranks of
    ``process_group`` (None: all ranks), so every rank must call.

    Args:
        policy_kl_logps, ref_kl_logps: [m] floating-point, in nats; a rank's m may be 0.
        process_group: the ranks to average over.

    Returns:
        A float64 scalar without a gradient; NaN if no rank holds a pair.

    Raises:
        ValueError, TypeError: shapes or devices do not agree, or a dtype is not floating-point.

    >>> import torch, kto_fused
    >>> kto_fused.kto_reference_point(torch.tensor([-5.0, -6.0]), torch.tensor([-6.0, -6.0]))
    tensor(0.5000, dtype=torch.float64)
    """
    checks.tensor("policy_kl_logps", policy_kl_logps, checks.FLOAT_DTYPES, checks.A_FLOAT)
    if policy_kl_logps.ndim != 1:
        raise ValueError(f"policy_kl_logps must be [m], got shape {list(policy_kl_logps.shape)}")
    checks.per_sequence(
        "ref_kl_logps",
        ref_kl_logps,
        checks.FLOAT_DTYPES,
        checks.A_FLOAT,
        policy_kl_logps.numel(),
        policy_kl_logps,
    )
    log_ratios = policy_kl_logps.detach().double() - ref_kl_logps.detach().double()
    sum_and_count = torch.stack([log_ratios.sum(), torch.full_like(log_ratios.sum(), log_ratios.numel())])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sum_and_count, group=process_group)
    return (sum_and_count[0] / sum_and_count[1]).clamp(min=0)


def kto_class_weights(n_desirable: int, n_undesirable: int) -> tuple[float, float]:
    """Return (desirable_weight, undesirable_weight) for ``n_desirable`` and ``n_undesirable`` examples.

    The KTO paper (arXiv 2402.01306) advises desirable_weight n_desirable / (undesirable_weight n_undesirable) in
    [1, 4/3]. If equal weights fulfil that, both are 1. Otherwise the rarer side's weight is raised until the ratio
    reaches the nearer bound.

    Raises:
        ValueError, TypeError: a count is not a positive number.

    >>> import kto_fused
    >>> kto_fused.kto_class_weights(100, 1000), kto_fused.kto_class_weights(1000, 300)
    ((10.0, 1.0), (1.0, 2.5))
    """
    checks.number("n_desirable", n_desirable, above=0)
    checks.number("n_undesirable", n_undesirable, above=0)
    ratio = float(n_desirable / n_undesirable)  # float: also for counts from NumPy
    return max(1.0, 1 / ratio), max(1.0, 3 * ratio / 4)


# ---- from checked arguments to results ------------------------------------------------------------------------------


def _loss_from_logits(call: LossCall) -> tuple[torch.Tensor, LossMetrics]:
    inputs, head, head_tensors = call.inputs, call.head, call.head_tensors
    ref_logps = inputs.ref_logps
    if inputs.ref_logits is not None:
        ref_logps = _sequence_logps(inputs.ref_logits, inputs)
    loss, *values = LossFromLogits.apply(
        inputs.logits,
        inputs.labels,
        inputs.cu_seqlens,
        inputs.token_weights,
        inputs.num_sequences,
        inputs.options,
        head,
        ref_logps,
        *head_tensors,
    )
    sequences, reported = SequenceValues(*values[:NUM_RETURNED]), values[NUM_RETURNED:]
    named = _named(head, reported, sequences.logps, sequences.token_counts, ref_logps, head_tensors)
    return loss, _metrics(sequences, ref_logps=ref_logps, **named)


def _sequence_logps(logits: torch.Tensor, inputs: LogitInputs) -> torch.Tensor:
    """Return the log-probabilities [B] of the policy's or the reference's logits."""
    layout = inputs.labels, inputs.cu_seqlens, inputs.token_weights, inputs.num_sequences
    return SequenceLogps.apply(logits, *layout, inputs.options)


def _loss_from_hidden(call: LossCall) -> tuple[torch.Tensor, LossMetrics]:
    inputs, head, head_tensors = call.inputs, call.head, call.head_tensors
    reference = inputs.reference
    loss, *values = LossFromHidden.apply(
        inputs.hidden,
        inputs.weight,
        inputs.bias,
        inputs.labels,
        inputs.cu_seqlens,
        inputs.token_weights,
        *reference,
        inputs.options,
        head,
        *head_tensors,
    )
    sequences, (computed_ref_logps, *reported) = SequenceValues(*values[:NUM_RETURNED]), values[NUM_RETURNED:]
    ref_logps = reference.logps if reference.hidden is None else computed_ref_logps
    named = _named(head, reported, sequences.logps, sequences.token_counts, ref_logps, head_tensors)
    return loss, _metrics(sequences, ref_logps=ref_logps, **named)


def _of_positions(values: SequenceValues | LossMetrics, shape: torch.Size) -> tuple[torch.Tensor, TokenMetrics]:
    """Return an engine's values of each position in the shape of the labels: log-probabilities, and the metrics."""
    entropy, mean_logits = values.entropy.view(shape), values.mean_logits.view(shape)
    return values.logps.view(shape), TokenMetrics(entropy, mean_logits, is_top1=values.token_accuracy.view(shape))


def _logps_from_hidden(inputs: HiddenInputs) -> SequenceValues:
    """Return the values of each sequence, or of each position if the options say so."""
    layout = inputs.labels, inputs.cu_seqlens, inputs.token_weights
    values = LogpsFromHidden.apply(inputs.hidden, inputs.weight, inputs.bias, *layout, inputs.options)
    return SequenceValues(*values)


def _loss_from_logps(call: LogpCall) -> tuple[torch.Tensor, LossMetrics]:
    loss, *reported = LossFromLogps.apply(
        call.policy_logps, call.head, call.token_counts, call.ref_logps, *call.head_tensors
    )
    logps = call.policy_logps.detach()
    named = _named(call.head, reported, logps, call.token_counts, call.ref_logps, call.head_tensors)
    return loss, LossMetrics(logps=logps, ref_logps=call.ref_logps, token_counts=call.token_counts, **named)


def _loss_from_token_logps(call: LossCall) -> tuple[torch.Tensor, LossMetrics]:
    inputs, head, head_tensors = call.inputs, call.head, call.head_tensors
    loss, logps, token_counts = LossFromTokenLogps.apply(
        inputs.logps,
        completion_rows(inputs.labels, inputs.cu_seqlens, inputs.options),
        inputs.cu_seqlens,
        inputs.token_weights,
        inputs.num_sequences,
        inputs.options,
        head,
        inputs.ref_logps,
        *head_tensors,
    )
    named = _named(head, (), logps, token_counts, inputs.ref_logps, head_tensors)
    return loss, LossMetrics(logps=logps, ref_logps=inputs.ref_logps, token_counts=token_counts, **named)


def _named(
    head: Any,
    reported: Sequence[torch.Tensor],
    logps: torch.Tensor,
    token_counts: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    head_tensors: tuple[torch.Tensor | None, ...],
) -> dict[str, Any]:
    """The head's fields of ``LossMetrics``: from what its kernel reported, or from its formula's own ``report``."""
    if isinstance(head, PreparedLoss):
        with torch.no_grad():
            exact_ref = None if ref_logps is None else ref_logps.double()
            reported = head.report(logps.double(), token_counts, exact_ref, *head_tensors)
    return head.metrics(reported, *head_tensors)


def _metrics(sequences: SequenceValues, **named: torch.Tensor | None) -> LossMetrics:
    """Return the metrics: an engine's values of each sequence, and the ``named`` fields that it does not know."""
    return LossMetrics(
        logps=sequences.logps,
        token_counts=sequences.token_counts,
        entropy=sequences.entropy,
        mean_logits=sequences.mean_logits,
        token_accuracy=sequences.token_accuracy,
        **named,
    )
