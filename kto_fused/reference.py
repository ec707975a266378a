"""The plain PyTorch twin of every public function: the definition that the fused functions are tested against.

A twin takes the arguments of its fused function, refuses the same calls with the same messages, and returns the same
results. It builds the whole log-softmax, several times the memory of the logits, and leaves the backward to autograd.
float64 inputs compute in float64 throughout. ``inplace_backward``, ``chunk_bytes`` and ``backend`` say how a result is
computed, not what it is: a twin checks them and does nothing else with them. A row that has weight 0 and holds NaN has
a gradient of 0 from a fused function, and NaN from a twin, because autograd multiplies the NaN by 0.

The definition reads from top to bottom: ``_logits`` from hidden states, ``_tokens``, ``_sequences``, ``_loss``. The
formulas of the losses are in ``heads.preference``. ``gae`` and ``linear_bradley_terry_loss`` have definitions of their
own. ``bradley_terry_loss`` and ``value_loss`` are plain PyTorch already, and are their own twins.
"""

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch

from . import advantages, arguments, checks, functional, loss_calls
from .arguments import HiddenInputs, LogitInputs, TokenLogpInputs
from .engines import backends, scan
from .engines.layout import check_contents, check_offsets, compute_dtype
from .engines.options import LogitOptions
from .engines.results import SequenceValues, row_statistics
from .engines.tokens import reads_tokens
from .functional import kto_class_weights, kto_reference_point
from .heads import reward
from .heads.base import reduce, weighted
from .heads.formula import FormulaHead
from .heads.preference import DPOHead, KTOHead
from .heads.protocol import Head, as_loss
from .heads.reward import bradley_terry_loss, value_loss
from .loss_calls import LossCall
from .metrics import LossMetrics, TokenMetrics
from .token_weights import completion_rows, ld_token_weights

__all__ = [
    "bradley_terry_loss",
    "dpo_loss",
    "dpo_loss_from_logps",
    "gae",
    "kto_class_weights",
    "kto_loss",
    "kto_loss_from_logps",
    "kto_reference_point",
    "ld_token_weights",
    "linear_bradley_terry_loss",
    "linear_dpo_loss",
    "linear_kto_loss",
    "linear_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "loss",
    "loss_from_logps",
    "sequence_logps",
    "token_logps",
    "value_loss",
]


# ---- the definition -------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """One value per position, [B, T] or [N]; 0 where a position is no completion token."""

    logps: torch.Tensor  # log-probability of the target, in nats
    entropy: torch.Tensor  # in nats
    mean_logits: torch.Tensor  # mean over the vocabulary
    is_top1: torch.Tensor  # 1 where no token is likelier than the target
    is_token: torch.Tensor  # bool: whether the position is a completion token
    log_sum_squares: torch.Tensor | None  # log sum p^2; None unless a loss asks for it


def _targets(labels: torch.Tensor, cu_seqlens: torch.Tensor | None, ignore_index: int, shift: bool) -> torch.Tensor:
    """Return the label that each position predicts. [B, T] or [N]"""
    targets = labels.long()
    if not shift:
        return targets
    targets = torch.cat([targets[..., 1:], torch.full_like(targets[..., :1], ignore_index)], dim=-1)
    if cu_seqlens is not None:
        # the last row of a packed sequence would predict the first token of the next sequence
        last_rows = cu_seqlens[1:].long() - 1
        targets[last_rows[cu_seqlens.diff() > 0]] = ignore_index
    return targets


def _logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    is_token: torch.Tensor,
    gemm_dtype: torch.dtype,
) -> torch.Tensor:
    """Return hidden @ weight.T + bias. [..., V]

    Inputs are rounded to the GEMM's dtype; logits are float32 (float64 for float64), never rounded to half precision.
    """
    compute = compute_dtype(hidden)
    # a masked position may hold anything, and 0 times the gradient of a NaN is a NaN
    hidden = hidden.masked_fill(~is_token[..., None], 0.0)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(gemm_dtype).to(compute) @ weight.to(gemm_dtype).to(compute).T
        return logits if bias is None else logits + bias.to(compute)


def _tokens(logits: torch.Tensor, inputs: LogitInputs) -> Tokens:
    """Return log softmax(z) at each position's target, with z = softcap tanh(scale x / softcap) / temperature."""
    options, vocab_size = inputs.options, logits.shape[-1]
    targets = _targets(inputs.labels, inputs.cu_seqlens, options.ignore_index, options.shift)
    is_token = targets != options.ignore_index
    is_valid = (targets >= 0) & (targets < vocab_size)  # a target outside the vocabulary has log-probability NaN
    index = targets.where(is_valid, 0)[..., None]

    # a masked row may hold anything, and 0 times the gradient of a NaN is a NaN
    z = logits.to(compute_dtype(logits)).masked_fill(~is_token[..., None], 0.0) * options.logit_scale
    if options.logit_softcap is not None:
        z = options.logit_softcap * torch.tanh(z / options.logit_softcap)
    z = z / options.temperature
    log_p = z.log_softmax(-1)
    logps = log_p.gather(-1, index)[..., 0].where(is_valid, torch.nan).where(is_token, 0.0)
    with torch.no_grad():
        p = log_p.exp()
        entropy = -(p * log_p).where(p != 0, 0.0).sum(-1).where(is_token, 0.0)
        mean_logits = z.mean(-1)
        is_top1 = (z.gather(-1, index)[..., 0] == z.amax(-1)) & ~logps.isnan() & is_token
        log_sum_squares = (2 * log_p).logsumexp(-1).where(is_token, 0.0) if options.sum_squares else None
    return Tokens(logps, entropy, mean_logits, is_top1.to(z.dtype), is_token, log_sum_squares)


def _sequences(logits: torch.Tensor, inputs: LogitInputs) -> SequenceValues:
    """Sum or average each sequence's completion tokens, log-probabilities times ``token_weights``, in float64."""
    return _sums(_tokens(logits, inputs), inputs)


def _ref_logps(inputs: LogitInputs) -> torch.Tensor | None:
    """Return the reference model's log-probabilities [B], None without a reference."""
    return inputs.ref_logps if inputs.ref_logits is None else _sequences(inputs.ref_logits, inputs).logps


def _sums(tokens: Tokens, inputs: LogitInputs | TokenLogpInputs) -> SequenceValues:
    def add_up(values: torch.Tensor) -> torch.Tensor:
        if inputs.cu_seqlens is None:
            return values.sum(-1)
        return torch.stack([part.sum() for part in values.split(inputs.cu_seqlens.diff().tolist())])

    counts = add_up(tokens.is_token.long())
    divisor = counts.clamp(min=1)
    logps = tokens.logps.double()
    sums = add_up(logps if inputs.token_weights is None else weighted(logps, inputs.token_weights.double()))
    means = (
        (add_up(values.double()) / divisor).to(values.dtype)
        for values in (tokens.entropy, tokens.mean_logits, tokens.is_top1, tokens.log_sum_squares)
        if values is not None
    )
    return SequenceValues(sums / divisor if inputs.options.average_log_prob else sums, counts, *means)


def _loss(
    head: Any,
    head_tensors: tuple[torch.Tensor | None, ...],
    logps: torch.Tensor,
    token_counts: torch.Tensor | None,
    ref_logps: torch.Tensor | None,
    **statistics: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, LossMetrics]:
    """Return the head's formula in float64, reduced, and the metrics that log-probabilities alone give."""
    exact = logps.double(), token_counts, None if ref_logps is None else ref_logps.double()
    loss = reduce(head.losses(*exact, *head_tensors, **statistics), head.reduction).to(head.loss_dtype)
    with torch.no_grad():
        named = head.metrics(head.report(*exact, *head_tensors), *head_tensors)
    return loss, LossMetrics(logps=logps.detach(), ref_logps=ref_logps, token_counts=token_counts, **named)


def _with_means(metrics: LossMetrics, values: SequenceValues) -> LossMetrics:
    """Add the means over completion tokens, which log-probabilities alone do not give."""
    return replace(
        metrics, entropy=values.entropy, mean_logits=values.mean_logits, token_accuracy=values.token_accuracy
    )


# ---- the twins ------------------------------------------------------------------------------------------------------

ENGINE_ARGUMENTS = frozenset(
    {
        *("policy_logits", "logits", "ref_logits", "ref_logps", "labels", "cu_seqlens", "token_weights"),
        *("hidden", "lm_head_weight", "lm_head_bias", "ref_hidden", "ref_lm_head_weight", "ref_lm_head_bias"),
        *("chunk_bytes", *(field.name for field in fields(LogitOptions))),
    }
)


def _checked(given: dict[str, Any]) -> tuple[LogitInputs | HiddenInputs, dict[str, Any]]:
    """Check what an engine takes of the arguments ``given``. Returns the checked inputs and the other arguments."""
    engine = {name: value for name, value in given.items() if name in ENGINE_ARGUMENTS}
    others = {name: value for name, value in given.items() if name not in ENGINE_ARGUMENTS}
    if "hidden" in engine:
        return arguments.from_hidden(**engine), others
    name = "logits" if "logits" in engine else "policy_logits"
    return arguments.from_logits(name, engine.pop(name), **engine), others


def _with_logits(inputs: LogitInputs | HiddenInputs) -> LogitInputs:
    """Check the values of labels and offsets, and compute the logits of hidden states."""
    is_hidden = isinstance(inputs, HiddenInputs)
    options = inputs.options.logits if is_hidden else inputs.options
    vocab_size = len(inputs.weight) if is_hidden else inputs.logits.shape[-1]
    layout = {"ignore_index": options.ignore_index, "shift": options.shift}
    check_contents(inputs.labels, inputs.cu_seqlens, vocab_size=vocab_size, **layout)
    if not is_hidden:
        return inputs
    is_token = _targets(inputs.labels, inputs.cu_seqlens, **layout) != options.ignore_index
    logits = _logits(inputs.hidden, inputs.weight, inputs.bias, is_token, inputs.options.dtype)
    ref_logits, reference = None, inputs.reference
    if reference.hidden is not None:
        ref_logits = _logits(reference.hidden, reference.weight, reference.bias, is_token, inputs.options.ref_dtype)
    labels_and_offsets = inputs.labels, inputs.cu_seqlens, inputs.num_sequences
    return LogitInputs(logits, *labels_and_offsets, options, ref_logits, reference.logps, inputs.token_weights)


def _token_logps(given: dict[str, Any]) -> torch.Tensor | tuple[torch.Tensor, TokenMetrics]:
    return_metrics = given.pop("return_metrics", False)
    checks.flag("return_metrics", return_metrics)
    inputs = _with_logits(_checked(given)[0])
    tokens = _tokens(inputs.logits, inputs)
    metrics = TokenMetrics(tokens.entropy, tokens.mean_logits, tokens.is_top1)
    return (tokens.logps, metrics) if return_metrics else tokens.logps


def _sequence_logps(given: dict[str, Any]) -> torch.Tensor:
    inputs = _with_logits(_checked(given)[0])
    return _sequences(inputs.logits, inputs).logps


def _any_loss(given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """The twin of ``fused_loss`` and ``fused_linear_loss``: the head's formula, registered or not."""
    head, tensors, reduction = given.pop("head"), given.pop("tensors"), given.pop("reduction")
    return_tokens = given.pop("return_tokens", False)
    loss_calls.check_return_tokens(return_tokens, head)
    call = loss_calls.of_loss(_checked(given)[0], head, tensors, reduction, uses_kernels=False)
    if call.function is None:
        return _loss_that_reads_tokens(call, return_tokens) if reads_tokens(call.head) else _loss_of_sequences(call)
    inputs = _with_logits(call.inputs)
    policy, ref_logps = _sequences(inputs.logits, inputs), _ref_logps(inputs)
    sequences = policy.logps, policy.token_counts, ref_logps
    return loss_calls.plain_loss(call.function, *sequences, tensors, reduction, compute_dtype(inputs.logits))


def _loss_that_reads_tokens(call: LossCall, return_tokens: bool) -> tuple[torch.Tensor, ...]:
    """A loss that reads tokens, from logits or hidden states."""
    inputs = _with_logits(call.inputs)
    tokens, ref_logps = _tokens(inputs.logits, inputs), _ref_logps(inputs)
    loss, metrics = _loss_of_tokens(tokens, inputs, call.head, call.head_tensors, ref_logps)
    if return_tokens:
        return loss, tokens.logps.detach(), TokenMetrics(tokens.entropy, tokens.mean_logits, tokens.is_top1)
    return loss, _with_means(metrics, _sums(tokens, inputs))


def _loss_of_tokens(
    tokens: Tokens,
    inputs: LogitInputs | TokenLogpInputs,
    head: Any,
    head_tensors: tuple[torch.Tensor, ...],
    ref_logps: torch.Tensor | None,
) -> tuple[torch.Tensor, LossMetrics]:
    """A token-level loss, and beside it a loss of sequences where the head has both levels."""
    policy = _sums(tokens, inputs)
    exact_ref = None if ref_logps is None else ref_logps.double()
    if head.level == "token":
        loss = _sum_of_tokens(tokens, inputs, head, head_tensors, policy.token_counts)
    else:
        loss = _sum_of_tokens(tokens, inputs, *head.part("token", head_tensors), policy.token_counts)
        sequence_head, sequence_tensors = head.part("sequence", head_tensors)
        counts = head.completion_counts(head_tensors)
        of_sequences = policy.logps, policy.token_counts if counts is None else counts, exact_ref, *sequence_tensors
        losses = sequence_head.losses(*of_sequences, **row_statistics(sequence_head, policy))
        loss = loss + reduce(losses, head.reduction)
    with torch.no_grad():
        reported = head.report(policy.logps.detach(), policy.token_counts, exact_ref, *head_tensors)
        named = head.metrics(reported, *head_tensors)
    logps, counts = policy.logps.detach(), policy.token_counts
    return loss.to(head.loss_dtype), LossMetrics(logps=logps, ref_logps=ref_logps, token_counts=counts, **named)


def _sum_of_tokens(
    tokens: Tokens,
    inputs: LogitInputs | TokenLogpInputs,
    head: Any,
    head_tensors: tuple[torch.Tensor, ...],
    token_counts: torch.Tensor,
) -> torch.Tensor:
    """Each completion token's loss times its factor, added up in float64."""
    if inputs.cu_seqlens is None:
        sequence = torch.arange(inputs.num_sequences, device=tokens.logps.device)[:, None].expand(tokens.logps.shape)
    else:
        lengths = inputs.cu_seqlens.diff().long()
        sequence = torch.arange(inputs.num_sequences, device=tokens.logps.device).repeat_interleave(lengths)

    def of_completion(x: torch.Tensor) -> torch.Tensor:
        """The entries of the completion tokens: of their labels, of their sequences, or a scalar as it is."""
        if x.ndim == 0:
            return x
        if x.ndim == 2:
            x = x.view(inputs.labels.shape)
            x = x.roll(-1, -1) if inputs.options.shift else x
            return x[tokens.is_token]
        return x[sequence[tokens.is_token]]

    weights = head.weights_of(token_counts, head_tensors)[:, sequence[tokens.is_token]]
    counts, own = of_completion(token_counts), tuple(of_completion(x) for x in head_tensors)
    statistics = [getattr(tokens, name)[tokens.is_token] for name in head.statistics]
    return head.losses(tokens.logps[tokens.is_token].double(), counts, weights, own, statistics).sum()


def _any_loss_of_logps(given: dict[str, Any]) -> tuple[torch.Tensor, LossMetrics]:
    head, tensors, reduction = given.pop("head"), given.pop("tensors"), given.pop("reduction")
    loss = as_loss(head)
    token_arguments = {name: given.pop(name) for name in ("labels", "mask", "token_weights", "cu_seqlens")}
    if loss_calls.takes_token_logps(loss, given["token_counts"]):
        inputs = arguments.from_token_logps(
            given["policy_logps"], given["ref_logps"], backend=given["backend"], **token_arguments
        )
        call = loss_calls.of_loss(inputs, loss, tensors, reduction)
        inputs = call.inputs
        is_token = completion_rows(inputs.labels, inputs.cu_seqlens, inputs.options)
        logps = torch.where(is_token, inputs.logps, 0.0)
        tokens = Tokens(logps, *[torch.zeros_like(logps.detach())] * 3, is_token, None)
        return _loss_of_tokens(tokens, inputs, call.head, call.head_tensors, inputs.ref_logps)
    tensors = loss_calls.tensors_of_sequences(head, token_arguments, tensors)
    if isinstance(loss, Head):
        return _loss_of_logps(FormulaHead, {**given, "loss": loss, "tensors": tensors, "reduction": reduction})
    given.pop("backend")
    logps, ref_logps, token_counts = given["policy_logps"], given["ref_logps"], given["token_counts"]
    checks.policy_logps(logps)
    return loss_calls.plain_loss(loss, logps, token_counts, ref_logps, tensors, reduction, compute_dtype(logps))


def _loss_of(head_type: type, given: dict[str, Any]) -> tuple[torch.Tensor, LossMetrics]:
    inputs, head_options = _checked(given)
    return _loss_of_sequences(loss_calls.of_head(head_type, inputs, **head_options))


def _loss_of_sequences(call: LossCall) -> tuple[torch.Tensor, LossMetrics]:
    """A loss that reads sequences, from logits or hidden states."""
    inputs = _with_logits(call.inputs)
    policy, ref_logps = _sequences(inputs.logits, inputs), _ref_logps(inputs)
    statistics = row_statistics(call.head, policy)
    loss, metrics = _loss(call.head, call.head_tensors, policy.logps, policy.token_counts, ref_logps, **statistics)
    return loss, _with_means(metrics, policy)


def _loss_of_logps(head_type: type, given: dict[str, Any]) -> tuple[torch.Tensor, LossMetrics]:
    call = loss_calls.of_logps(head_type, **given)
    return _loss(call.head, call.head_tensors, call.policy_logps, call.token_counts, call.ref_logps)


def _gae(given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence token by token, in Python's float64."""
    backend, rewards = given.pop("backend"), given["rewards"]
    inputs = advantages.checked_inputs(**given)
    backends.resolve(backend, rewards.device)
    scan.check_contents(inputs.mask, inputs.cu_seqlens, rewards.numel())

    # Python's own numbers: NumPy's float32 would round what is computed from it
    gamma, lam = float(given["gamma"]), float(given["lam"])
    if inputs.cu_seqlens is None:
        offsets = [sequence * rewards.shape[1] for sequence in range(rewards.shape[0] + 1)]
    else:
        offsets = inputs.cu_seqlens.tolist()
    r, v = inputs.rewards.flatten().tolist(), inputs.values.flatten().tolist()
    is_token = [True] * len(r) if inputs.mask is None else inputs.mask.flatten().tolist()
    after_end = [0.0] * (len(offsets) - 1) if inputs.bootstrap is None else inputs.bootstrap.tolist()
    results = [[0.0] * len(r), [0.0] * len(r)]
    for first, last, next_value in zip(offsets[:-1], offsets[1:], after_end, strict=True):
        next_advantage = 0.0
        for t in reversed(range(first, last)):
            if is_token[t]:
                delta = r[t] + gamma * next_value - v[t]
                next_advantage = delta + gamma * lam * next_advantage
                next_value = v[t]
                results[0][t], results[1][t] = next_advantage, next_advantage + next_value
    dtype = scan.result_dtype(inputs.rewards, inputs.values, inputs.bootstrap)
    return tuple(torch.tensor(x, dtype=dtype, device=rewards.device).view(rewards.shape) for x in results)


def _linear_bradley_terry(given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores sequence by sequence."""
    inputs = reward.checked_reward_inputs(**given)
    hidden, labels, dtype = inputs.hidden, inputs.labels, compute_dtype(inputs.hidden)
    if inputs.cu_seqlens is not None:
        check_offsets(inputs.cu_seqlens, len(labels))
        lengths = inputs.cu_seqlens.diff().tolist()
        hidden, labels = hidden.split(lengths), labels.split(lengths)
    weight, bias = (None if x is None else x.to(dtype) for x in (given["score_weight"], given["score_bias"]))
    scores = []
    for sequence, (own_hidden, own_labels) in enumerate(zip(hidden, labels, strict=True)):
        positions = (own_labels != given["ignore_index"]).nonzero().flatten().tolist()
        if not positions:
            raise ValueError(reward.no_token(sequence, given["ignore_index"]))
        position = positions[-1] + (not given["shift"])
        if position == len(own_hidden):
            raise ValueError(reward.past_the_end(sequence))
        last = own_hidden[position].to(dtype)
        if inputs.weights is not None and inputs.weights[sequence % len(inputs.weights)] == 0:
            last = torch.zeros_like(last)
        score = (last * weight[0]).sum()
        scores.append(score if bias is None else score + bias[0])
    scores = torch.stack(scores)
    options = {name: given[name] for name in ("margin", "centering", "reduction", "weights")}
    return bradley_terry_loss(*scores.chunk(2), **options), scores.detach()


def _twin_of(fused: Callable, compute: Callable, *head_type: type) -> Callable:
    """Make the twin of ``fused``: its signature, and ``compute(*head_type, arguments by name)`` as its body."""
    signature, name = inspect.signature(fused), fused.__name__.removeprefix("fused_")

    def twin(*positional: Any, **named: Any) -> Any:
        takes_tensors = "tensors" in signature.parameters
        for argument in named:
            if argument not in signature.parameters and not takes_tensors:
                raise TypeError(f"{name}() got an unexpected keyword argument {argument!r}")
        bound = signature.bind(*positional, **named)
        bound.apply_defaults()
        return compute(*head_type, bound.arguments)

    twin.__name__ = twin.__qualname__ = name
    twin.__doc__ = f"Twin of ``kto_fused.{fused.__name__}``."
    twin.__signature__ = signature
    return twin


loss = _twin_of(functional.fused_loss, _any_loss)
linear_loss = _twin_of(functional.fused_linear_loss, _any_loss)
loss_from_logps = _twin_of(functional.loss_from_logps, _any_loss_of_logps)
token_logps = _twin_of(functional.token_logps, _token_logps)
sequence_logps = _twin_of(functional.sequence_logps, _sequence_logps)
linear_token_logps = _twin_of(functional.linear_token_logps, _token_logps)
linear_sequence_logps = _twin_of(functional.linear_sequence_logps, _sequence_logps)
kto_loss = _twin_of(functional.fused_kto_loss, _loss_of, KTOHead)
dpo_loss = _twin_of(functional.fused_dpo_loss, _loss_of, DPOHead)
linear_kto_loss = _twin_of(functional.fused_linear_kto_loss, _loss_of, KTOHead)
linear_dpo_loss = _twin_of(functional.fused_linear_dpo_loss, _loss_of, DPOHead)
kto_loss_from_logps = _twin_of(functional.kto_loss_from_logps, _loss_of_logps, KTOHead)
dpo_loss_from_logps = _twin_of(functional.dpo_loss_from_logps, _loss_of_logps, DPOHead)
gae = _twin_of(advantages.gae, _gae)
linear_bradley_terry_loss = _twin_of(reward.linear_bradley_terry_loss, _linear_bradley_terry)
