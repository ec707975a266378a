"""The plain PyTorch twin of every public function: same arguments, same returns, autograd's own backward.

These are the definitions the fused paths are tested against. They build the whole log-softmax, several times the memory
of the logits. float64 inputs compute in float64 throughout. ``inplace_backward``, ``chunk_bytes`` and ``backend`` say
how a result is computed, not what it is: here they are checked and change nothing.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from . import checks, functional
from .advantages import checked_inputs
from .engines import backends, scan
from .engines.layout import check_contents, compute_dtype, gemm_dtype
from .functional import DEFAULT_CHUNK_BYTES, kto_class_weights, kto_reference_point
from .heads.losses import LENGTH_AVERAGED, dpo_losses, kto_losses, reduce
from .heads.preference import pair_rewards, pair_scores
from .heads.reward import bradley_terry_loss, value_loss
from .metrics import LossMetrics, TokenMetrics

__all__ = [
    "bradley_terry_loss",
    "dpo_loss",
    "dpo_loss_from_logps",
    "gae",
    "kto_class_weights",
    "kto_loss",
    "kto_loss_from_logps",
    "kto_reference_point",
    "linear_dpo_loss",
    "linear_kto_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "sequence_logps",
    "token_logps",
    "value_loss",
]


def _twin_of(fused: Callable) -> Callable[[Callable], Callable]:
    """Decorate a twin that passes its named arguments on: one that ``fused`` does not take is refused at the call."""
    known = frozenset(inspect.signature(fused).parameters)

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def twin(*arguments: Any, **named_arguments: Any) -> Any:
            for name in named_arguments:
                if name not in known:
                    raise TypeError(f"reference.{function.__name__}() got an unexpected keyword argument {name!r}")
            return function(*arguments, **named_arguments)

        return twin

    return decorate


@_twin_of(functional.token_logps)
def token_logps(logits: torch.Tensor, labels: torch.Tensor, **engine: Any) -> torch.Tensor:
    """Twin of ``kto_fused.token_logps``."""
    return _tokens("logits", logits, labels, **engine)[0]


@_twin_of(functional.sequence_logps)
def sequence_logps(logits: torch.Tensor, labels: torch.Tensor, **engine: Any) -> torch.Tensor:
    """Twin of ``kto_fused.sequence_logps``."""
    return _sequences("logits", logits, labels, **engine)[0]


@_twin_of(functional.fused_kto_loss)
def kto_loss(
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
    **engine: Any,
) -> tuple[torch.Tensor, LossMetrics]:
    """Twin of ``kto_fused.fused_kto_loss``."""
    sequences, ref_logps = _policy_and_ref_sequences(policy_logits, labels, ref_logits, ref_logps, loss_type, **engine)
    result = kto_loss_from_logps(
        sequences[0],
        ref_logps,
        desirable,
        reference_point=reference_point,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        loss_type=loss_type,
        reduction=reduction,
    )
    return _with_metrics(*result, sequences, policy_logits)


@_twin_of(functional.fused_dpo_loss)
def dpo_loss(
    policy_logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    ref_logits: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    gamma: float = checks.DEFAULT_GAMMA,
    reduction: str = "mean",
    average_log_prob: bool = False,
    **engine: Any,
) -> tuple[torch.Tensor, LossMetrics]:
    """Twin of ``kto_fused.fused_dpo_loss``."""
    engine["average_log_prob"] = average_log_prob
    sequences, ref_logps = _policy_and_ref_sequences(policy_logits, labels, ref_logits, ref_logps, loss_type, **engine)
    result = dpo_loss_from_logps(
        sequences[0],
        ref_logps,
        beta=beta,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        gamma=gamma,
        reduction=reduction,
        average_log_prob=average_log_prob,
        token_counts=sequences[1] if loss_type in LENGTH_AVERAGED and not average_log_prob else None,
    )
    return _with_metrics(*result, sequences, policy_logits)


@_twin_of(functional.linear_sequence_logps)
def linear_sequence_logps(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    lm_head_bias: torch.Tensor | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    **engine: Any,
) -> torch.Tensor:
    """Twin of ``kto_fused.linear_sequence_logps``."""
    checks.integer("chunk_bytes", chunk_bytes, at_least=1)
    logits = _logits(hidden, lm_head_weight, lm_head_bias, labels, **engine)
    return sequence_logps(logits, labels, **engine)


@_twin_of(functional.linear_token_logps)
def linear_token_logps(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    lm_head_bias: torch.Tensor | None = None,
    return_metrics: bool = False,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    **engine: Any,
) -> torch.Tensor | tuple[torch.Tensor, TokenMetrics]:
    """Twin of ``kto_fused.linear_token_logps``."""
    checks.flag("return_metrics", return_metrics)
    checks.integer("chunk_bytes", chunk_bytes, at_least=1)
    logits = _logits(hidden, lm_head_weight, lm_head_bias, labels, **engine)
    logps, *metrics, _ = _tokens("logits", logits, labels, **engine)
    return (logps, TokenMetrics(*metrics)) if return_metrics else logps


@_twin_of(functional.fused_linear_kto_loss)
def linear_kto_loss(
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
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    **options: Any,
) -> tuple[torch.Tensor, LossMetrics]:
    """Twin of ``kto_fused.fused_linear_kto_loss``."""
    head, ref_head = (lm_head_weight, lm_head_bias), (ref_lm_head_weight, ref_lm_head_bias)
    logits, ref_logits = _policy_and_ref_logits(
        hidden, head, labels, ref_hidden, ref_head, ref_logps, chunk_bytes, **options
    )
    return kto_loss(logits, labels, desirable, ref_logits=ref_logits, ref_logps=ref_logps, **options)


@_twin_of(functional.fused_linear_dpo_loss)
def linear_dpo_loss(
    hidden: torch.Tensor,
    lm_head_weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    lm_head_bias: torch.Tensor | None = None,
    ref_hidden: torch.Tensor | None = None,
    ref_lm_head_weight: torch.Tensor | None = None,
    ref_lm_head_bias: torch.Tensor | None = None,
    ref_logps: torch.Tensor | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    **options: Any,
) -> tuple[torch.Tensor, LossMetrics]:
    """Twin of ``kto_fused.fused_linear_dpo_loss``."""
    head, ref_head = (lm_head_weight, lm_head_bias), (ref_lm_head_weight, ref_lm_head_bias)
    logits, ref_logits = _policy_and_ref_logits(
        hidden, head, labels, ref_hidden, ref_head, ref_logps, chunk_bytes, **options
    )
    return dpo_loss(logits, labels, ref_logits=ref_logits, ref_logps=ref_logps, **options)


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
    """Twin of ``kto_fused.kto_loss_from_logps``."""
    checks.logps(policy_logps, ref_logps, needs_reference=True)
    checks.kto_options(
        loss_type, beta, desirable_weight, undesirable_weight, reference_point, reduction, policy_logps.device
    )
    checks.desirable(desirable, policy_logps.numel(), policy_logps)
    backends.resolve(backend, policy_logps.device)
    beta = float(beta)
    log_ratios = policy_logps.double() - ref_logps.detach().double()
    if loss_type == "apo_zero_unpaired":
        reference_point = 0.0
    elif isinstance(reference_point, str):
        reference_point = log_ratios.mean()
    z0 = torch.as_tensor(reference_point, dtype=torch.float64, device=policy_logps.device).detach().reshape(())
    losses = kto_losses(
        log_ratios,
        desirable,
        z0,
        loss_type=loss_type,
        beta=beta,
        desirable_weight=float(desirable_weight),
        undesirable_weight=float(undesirable_weight),
    )
    return reduce(losses, reduction).to(compute_dtype(policy_logps)), LossMetrics(
        logps=policy_logps.detach(),
        ref_logps=ref_logps.detach(),
        rewards=beta * log_ratios.detach(),
        desirable=desirable == 1,
        reference_point=z0,
    )


def dpo_loss_from_logps(
    policy_logps: torch.Tensor,
    ref_logps: torch.Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    gamma: float = checks.DEFAULT_GAMMA,
    reduction: str = "mean",
    average_log_prob: bool = False,
    token_counts: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, LossMetrics]:
    """Twin of ``kto_fused.dpo_loss_from_logps``."""
    checks.logps(policy_logps, ref_logps, needs_reference=False)
    checks.dpo_options(loss_type, beta, label_smoothing, gamma, reduction)
    checks.pairs(policy_logps.numel())
    checks.pair_logps(ref_logps, token_counts, loss_type, average_log_prob, policy_logps)
    backends.resolve(backend, policy_logps.device)
    beta, label_smoothing, gamma = float(beta), float(label_smoothing), float(gamma)
    logps = policy_logps.double()
    reference = None if ref_logps is None else ref_logps.detach().double()
    chosen, rejected = pair_scores(logps, reference, token_counts).chunk(2)
    losses = dpo_losses(chosen, rejected, loss_type=loss_type, beta=beta, label_smoothing=label_smoothing, gamma=gamma)
    return reduce(losses, reduction).to(compute_dtype(policy_logps)), LossMetrics(
        logps=policy_logps.detach(),
        ref_logps=None if ref_logps is None else ref_logps.detach(),
        rewards=pair_rewards(logps.detach(), reference, token_counts, loss_type, beta),
        token_counts=token_counts,
    )


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    bootstrap: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of ``kto_fused.gae``: the recurrence token by token, in Python's float64."""
    inputs = checked_inputs(rewards, values, gamma, lam, mask, cu_seqlens, bootstrap)
    backends.resolve(backend, rewards.device)
    scan.check_contents(inputs.mask, inputs.cu_seqlens, rewards.numel())

    if cu_seqlens is None:
        offsets = [sequence * rewards.shape[1] for sequence in range(rewards.shape[0] + 1)]
    else:
        offsets = cu_seqlens.tolist()
    r, v = rewards.flatten().tolist(), values.flatten().tolist()
    is_token = [True] * len(r) if mask is None else mask.flatten().tolist()
    after_end = [0.0] * (len(offsets) - 1) if bootstrap is None else bootstrap.tolist()
    results = [[0.0] * len(r), [0.0] * len(r)]
    for first, last, next_value in zip(offsets[:-1], offsets[1:], after_end, strict=True):
        next_advantage = 0.0
        for t in reversed(range(first, last)):
            if is_token[t]:
                delta = r[t] + gamma * next_value - v[t]
                next_advantage = delta + gamma * lam * next_advantage
                next_value = v[t]
                results[0][t], results[1][t] = next_advantage, next_advantage + next_value
    dtype = scan.result_dtype(rewards, values, bootstrap)
    advantages, returns = (torch.tensor(x, dtype=dtype, device=rewards.device).view(rewards.shape) for x in results)
    return advantages, returns


def _policy_and_ref_sequences(
    policy_logits: torch.Tensor,
    labels: torch.Tensor,
    ref_logits: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    loss_type: str,
    **engine: Any,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """``_sequences`` of the policy, and the reference's log-probabilities."""
    sequences = _sequences("policy_logits", policy_logits, labels, **engine)
    checks.one_reference(loss_type, ref_logits=ref_logits, ref_logps=ref_logps)
    if ref_logits is not None:
        checks.ref_logits(ref_logits, policy_logits)
        engine["inplace_backward"] = False  # which is about the policy's logits
        ref_logps = _sequences("ref_logits", ref_logits.detach(), labels, **engine)[0]
    return sequences, ref_logps


def _with_metrics(
    loss: torch.Tensor, metrics: LossMetrics, sequences: tuple[torch.Tensor, ...], policy_logits: torch.Tensor
) -> tuple[torch.Tensor, LossMetrics]:
    """Loss and metrics of log-probabilities, and what else is known of their logits."""
    _, metrics.token_counts, metrics.entropy, metrics.mean_logits, metrics.token_accuracy = sequences
    return loss.to(compute_dtype(policy_logits)), metrics


def _targets(labels: torch.Tensor, cu_seqlens: torch.Tensor | None, ignore_index: int, shift: bool) -> torch.Tensor:
    """The label that each position predicts. [B, T] or [N]"""
    targets = labels.long()
    if not shift:
        return targets
    targets = torch.cat([targets[..., 1:], torch.full_like(targets[..., :1], ignore_index)], dim=-1)
    if cu_seqlens is not None:
        last_rows = cu_seqlens[1:].long() - 1
        targets[last_rows[cu_seqlens.diff() > 0]] = ignore_index
    return targets


def _logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    **_: Any,
) -> torch.Tensor:
    """hidden @ weight.T + bias in float32 (float64 for float64): logits are not rounded on their way. [..., V]"""
    checks.label_options(ignore_index, shift)
    hidden, labels, cu_seqlens, _ = checks.rows_and_labels("hidden", hidden, labels, cu_seqlens, last="H")
    # finds nothing in a reference's, which came here checked under its own names
    checks.lm_head("lm_head_weight", weight, "lm_head_bias", bias, "hidden", hidden)
    check_contents(labels, cu_seqlens, ignore_index=ignore_index, shift=shift, vocab_size=len(weight))
    is_token = _targets(labels, cu_seqlens, ignore_index, shift) != ignore_index
    read, compute = gemm_dtype(hidden), compute_dtype(hidden)
    # a masked position may hold anything, and 0 times the gradient of a NaN is a NaN
    hidden = hidden.masked_fill(~is_token[..., None], 0.0)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(read).to(compute) @ weight.to(read).to(compute).T
        return logits if bias is None else logits + bias.to(compute)


def _policy_and_ref_logits(
    hidden: torch.Tensor,
    head: tuple[torch.Tensor, torch.Tensor | None],
    labels: torch.Tensor,
    ref_hidden: torch.Tensor | None,
    ref_head: tuple[torch.Tensor | None, torch.Tensor | None],
    ref_logps: torch.Tensor | None,
    chunk_bytes: int,
    loss_type: str = "",
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    checks.integer("chunk_bytes", chunk_bytes, at_least=1)
    checks.one_reference(loss_type, ref_hidden=ref_hidden, ref_logps=ref_logps)
    checks.ref_lm_head(ref_hidden, *ref_head)
    logits = _logits(hidden, *head, labels, **options)
    if ref_hidden is None:
        return logits, None
    checks.ref_hidden(ref_hidden, hidden)
    ref_head = checks.reference_head(*head, *ref_head, ref_hidden)
    with torch.no_grad():
        return logits, _logits(ref_hidden, *ref_head, labels, **options)


def _tokens(
    name: str,
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
) -> tuple[torch.Tensor, ...]:
    """(log-probability, entropy, mean logit, whether no token is likelier than the target, whether it is a completion
    token) of each position, [B, T] or [N].
    """
    checks.logit_options(ignore_index, shift, False, temperature, logit_scale, logit_softcap, inplace_backward)
    backends.resolve(backend, checks.tensor(name, logits, checks.FLOAT_DTYPES, checks.A_FLOAT).device)
    if inplace_backward:
        checks.inplace(name, logits)
    logits, labels, cu_seqlens, _ = checks.logits_and_labels(name, logits, labels, cu_seqlens)
    check_contents(labels, cu_seqlens, ignore_index=ignore_index, shift=shift, vocab_size=logits.shape[-1])

    targets = _targets(labels, cu_seqlens, ignore_index, shift)
    is_token = targets != ignore_index
    is_known = (targets >= 0) & (targets < logits.shape[-1])

    z = logits.to(compute_dtype(logits)) * float(logit_scale)
    if logit_softcap is not None:
        logit_softcap = float(logit_softcap)
        z = logit_softcap * torch.tanh(z / logit_softcap)
    z = z / float(temperature)
    # masked rows may hold anything, and 0 times the gradient of a NaN is a NaN
    z = z.masked_fill(~is_token[..., None], 0.0)
    log_p = z.log_softmax(-1)
    known_targets = targets.where(is_known, 0)[..., None]
    logps = log_p.gather(-1, known_targets)[..., 0]
    logps = logps.where(is_known, torch.nan).where(is_token, 0.0)
    with torch.no_grad():
        p = log_p.exp()
        entropy = -(p * log_p).where(p != 0, 0.0).sum(-1).where(is_token, 0.0)
        mean_logits = z.mean(-1)
        is_top1 = (z.gather(-1, known_targets)[..., 0] == z.amax(-1)) & ~logps.isnan() & is_token
    return logps, entropy, mean_logits, is_top1.to(z.dtype), is_token


def _sequences(
    name: str,
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    average_log_prob: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """(log-probability in float64, token count, mean entropy, mean logit, token accuracy) of each sequence, [B]."""
    checks.flag("average_log_prob", average_log_prob)
    logps, *metrics, is_token = _tokens(name, logits, labels, cu_seqlens=cu_seqlens, **options)

    def per_sequence(values: torch.Tensor) -> torch.Tensor:
        if cu_seqlens is None:
            return values.sum(-1)
        return torch.stack([part.sum() for part in values.split(cu_seqlens.diff().tolist())])

    counts = per_sequence(is_token.long())
    divisor = counts.clamp(min=1)
    sums = per_sequence(logps.double())
    return (
        sums / divisor if average_log_prob else sums,
        counts,
        *((per_sequence(values.double()) / divisor).to(values.dtype) for values in metrics),
    )
