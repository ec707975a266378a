"""Every registered loss in NumPy and float64, from the papers' formulas, with gradients by dual numbers.

`test_fuzz.py` compares the package with them. Nothing here imports `kto_fused` or uses autograd, so that the package
and this file cannot share a mistake.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

# A dual number x + STEP d i is the number x with the derivative d. STEP^2 is lost beside any x, so both are exact.
STEP = 1e-100
# the largest exponents of the scores of an alpha-divergence and of forward KL, and of AlphaPO's reward
LARGEST_EXPONENT, LARGEST_FORWARD_EXPONENT = 80.0, 700.0


class Tokens(NamedTuple):
    """The completion tokens of a batch, in any order."""

    sequences: np.ndarray  # [n] the sequence that each token belongs to
    rows: np.ndarray  # [n] the row of the logits [rows, V] that predicts it
    targets: np.ndarray  # [n] its token id


class Scored(NamedTuple):
    """Values computed from the logits [n, V] of n tokens, and bounds for their rounding errors."""

    logps: np.ndarray  # [n] in nats
    entropy: np.ndarray  # [n]
    mean_logit: np.ndarray  # [n]
    lead: np.ndarray  # [n] the target's logit minus the largest other logit
    jacobian: np.ndarray  # [n, V] d logp / d logit
    bound: np.ndarray  # [n, V] the same with all terms positive and no soft cap; rounding errors are proportional to it
    margin: np.ndarray  # [n] possible error of logps, in units of the compute dtype's eps
    log_sum_squares: np.ndarray  # [n] log sum p^2


class Loss(NamedTuple):
    """Losses of sequences (KTO) or pairs (DPO) before any reduction, their gradients, and the rewards."""

    losses: np.ndarray  # [B] or [B/2]
    grads: np.ndarray  # [B] d (sum of losses) / d (log-probability of each sequence)
    rewards: np.ndarray  # [B]
    reference_point: float | None


def find_tokens(labels: np.ndarray, offsets: list[int] | None, ignore_index: int, shift: bool) -> Tokens:
    """Find the completion tokens of labels [B, T], or of packed labels [N] whose sequences `offsets` separates."""
    if offsets is None:
        width = labels.shape[1]
        sequences = [(row * width, list(row_labels)) for row, row_labels in enumerate(labels)]
    else:
        sequences = [(start, list(labels[start:stop])) for start, stop in pairwise(offsets)]
    found = []
    for sequence, (first_row, tokens) in enumerate(sequences):
        for position in range(len(tokens)):
            predicted = position + 1 if shift else position
            if predicted < len(tokens) and tokens[predicted] != ignore_index:
                found.append((sequence, first_row + position, tokens[predicted]))
    columns = np.array(found, dtype=np.int64).reshape(-1, 3).T
    return Tokens(*columns)


def score(
    logits: np.ndarray,
    targets: np.ndarray,
    *,
    scale: float,
    softcap: float | None,
    temperature: float,
    size: np.ndarray,
) -> Scored:
    """Score logits x [n, V] after z = softcap tanh(scale x / softcap) / temperature.

    Without a soft cap z = scale x / temperature. `size` [n] is the largest number that was added up in a row's logits:
    the logits may be off by that number times eps.
    """
    z, slope = scale * logits, np.ones_like(logits)
    if softcap is not None:
        slope = 1 / np.cosh(np.clip(z / softcap, -300, 300)) ** 2
        z = softcap * np.tanh(z / softcap)
    z = z / temperature
    below = z - z.max(1, keepdims=True)  # differences are exact even for large logits
    log_sum = np.log(np.exp(below).sum(1, keepdims=True))
    p = np.exp(below - log_sum)
    with np.errstate(invalid="ignore"):
        entropy = log_sum[:, 0] - np.where(p > 0, p * below, 0.0).sum(1)
    index = np.arange(len(targets))
    onehot = np.zeros_like(p)
    onehot[index, targets] = 1.0
    largest = np.abs(np.where(np.isfinite(z), z, 0.0)).max(1, initial=0.0)
    margin = 1 + largest + size * scale / temperature
    others = np.where(onehot == 1, -np.inf, z).max(1, initial=-np.inf)
    return Scored(
        logps=below[index, targets] - log_sum[:, 0],
        entropy=entropy,
        mean_logit=z.mean(1),
        lead=z[index, targets] - others,
        jacobian=(onehot - p) * slope * scale / temperature,
        bound=(onehot + p) * scale / temperature,
        margin=margin,
        log_sum_squares=np.log((p**2).sum(1)),
    )


def sequence_sums(values: np.ndarray, tokens: Tokens, num_sequences: int, average: bool) -> np.ndarray:
    """Sum (or average) values of tokens [n] per sequence [B]; 0 for a sequence without tokens."""
    sums = np.zeros(num_sequences)
    np.add.at(sums, tokens.sequences, values)
    return sums / np.maximum(counts(tokens, num_sequences), 1) if average else sums


def counts(tokens: Tokens, num_sequences: int) -> np.ndarray:
    return np.bincount(tokens.sequences, minlength=num_sequences)


# ---- dual numbers ---------------------------------------------------------------------------------------------------


def dual(x: np.ndarray, value: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Return f(x) of a dual number from f's ``value`` and ``slope`` at x."""
    result = np.empty(np.shape(value), dtype=complex)
    result.real, result.imag = value, slope * np.imag(x)
    return result


def exp(x: np.ndarray) -> np.ndarray:
    return dual(x, np.exp(np.real(x)), np.exp(np.real(x)))


def expm1(x: np.ndarray) -> np.ndarray:
    return dual(x, np.expm1(np.real(x)), np.exp(np.real(x)))


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return dual(x, _log_sigmoid(np.real(x)), np.exp(_log_sigmoid(-np.real(x))))


def sigmoid(x: np.ndarray) -> np.ndarray:
    value, rest = np.exp(_log_sigmoid(np.real(x))), np.exp(_log_sigmoid(-np.real(x)))
    return dual(x, value, value * rest)


def log1mexp(x: np.ndarray) -> np.ndarray:
    """log(1 - exp(x)) for x < 0."""
    value = np.where(np.real(x) > -math.log(2), np.log(-np.expm1(np.real(x))), np.log1p(-np.exp(np.real(x))))
    return dual(x, value, 1 / np.expm1(-np.real(x)) * -1)


def clip(x: np.ndarray, low: float = -np.inf, high: float = np.inf) -> np.ndarray:
    return np.where(np.real(x) < low, low, np.where(np.real(x) > high, high, x))


def minimum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(np.real(x) < np.real(y), x, y)


def _log_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


# ---- losses of sequences --------------------------------------------------------------------------------------------

KTO_LIKE = ("kto", "kto_squared", "apo_zero_unpaired", "bco")
SEQUENCE_RATIO = ("gspo", "vespo")
SCORED = ("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop")
WEIGHTED = (*SCORED, "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
SORTED = ("aot", "aot_unpaired")
WITHOUT_REFERENCE = ("sft", "simpo", "alphapo", "cpo", "odds_ratio", "orpo")
PAIRS = (*WEIGHTED, *SORTED, *WITHOUT_REFERENCE)
SEQUENCE_LOSSES = (*KTO_LIKE, *SEQUENCE_RATIO, *PAIRS)


def sequence_losses(
    name: str,
    fields: dict[str, Any],
    logps: np.ndarray,
    counts: np.ndarray,
    ref_logps: np.ndarray | None,
    tensors: dict[str, Any],
) -> np.ndarray:
    """Return the losses of sequences [B], or of pairs [B/2], as dual numbers like ``logps`` [B]."""
    if name in KTO_LIKE:
        return _kto_like(name, fields, logps - ref_logps, tensors)
    if name in SEQUENCE_RATIO:
        return _sequence_ratio(name, fields, logps, counts, tensors)
    losses = _pair_losses(name, fields, logps, counts, ref_logps)
    if fields.get("use_weighting"):  # WPO
        own = np.real(logps) / np.maximum(counts, 1) - tensors["log_sum_squares"]
        losses = losses * np.exp(sum(np.split(own, 2)))
    return losses


def _kto_like(name: str, fields: dict[str, Any], ratios: np.ndarray, tensors: dict[str, Any]) -> np.ndarray:
    desirable, beta = tensors["desirable"], fields["beta"]
    sign = np.where(desirable, 1.0, -1.0)
    weight = np.where(desirable, fields["desirable_weight"], fields["undesirable_weight"])
    if name == "bco":
        return -weight * log_sigmoid(sign * (beta * ratios - tensors["delta"]))
    z0 = 0.0 if name == "apo_zero_unpaired" else fields["reference_point"]
    if isinstance(z0, str):
        z0 = np.real(ratios).mean() if z0 == "batch_mean" else tensors["z0"]
    rest = sigmoid(-sign * beta * (ratios - z0))
    return weight * (rest * rest if name == "kto_squared" else rest)


def _sequence_ratio(
    name: str, fields: dict[str, Any], logps: np.ndarray, counts: np.ndarray, tensors: dict[str, Any]
) -> np.ndarray:
    advantages, n = tensors["advantages"], np.maximum(counts, 1)
    log_ratios = logps - (np.real(logps) if fields["on_policy"] else tensors["old_logps"])
    # "mean" divides the sum over the sequences by B
    if fields["normalizer"] == "sequences":
        weights = (counts > 0).astype(float)
    elif fields["normalizer"] == "constant":
        weights = counts / fields["max_tokens"]
    else:
        items = tensors["num_items"] if fields["normalizer"] == "items" else max(counts.sum(), 1)
        weights = counts * len(counts) / items if items else np.zeros(len(counts))
    if name == "gspo":
        return clipped(exp(log_ratios / n), advantages, fields["clip"], fields["delta"]) * weights
    log_w = np.clip(np.real(log_ratios), math.log(1e-8), 20.0)
    gain = advantages >= 0
    k = np.where(gain, fields["k_pos"], fields["k_neg"])
    rate = np.where(gain, fields["lambda_pos"], fields["lambda_neg"])
    phi = np.exp(log_w) ** k * np.exp(rate * (1 - np.exp(log_w)))
    return -phi * advantages * logps * weights / n


def clipped(ratios: np.ndarray, advantages: np.ndarray, bounds: float | tuple, delta: float) -> np.ndarray:
    low, high = bounds if isinstance(bounds, tuple) else (bounds, bounds)
    first = clip(ratios, high=delta) if delta else ratios
    return -minimum(first * advantages, clip(ratios, 1 - low, 1 + high) * advantages)


def smoothed(u: np.ndarray, smoothing: float) -> np.ndarray:
    kept = -(1 - smoothing) * log_sigmoid(u)
    return kept - smoothing * log_sigmoid(-u) if smoothing else kept


def f_divergence_score(ratios: np.ndarray, kind: str, alpha: float) -> np.ndarray:
    if kind == "forward_kl":
        return -expm1(clip(-ratios, high=LARGEST_FORWARD_EXPONENT))
    if kind == "js_divergence":
        return math.log(2) + log_sigmoid(ratios)
    if kind == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        return expm1(clip((alpha - 1) * ratios, high=LARGEST_EXPONENT)) / (alpha - 1)
    return ratios


def _pair_losses(
    name: str, fields: dict[str, Any], logps: np.ndarray, counts: np.ndarray, ref_logps: np.ndarray | None
) -> np.ndarray:
    beta, s = fields.get("beta"), fields.get("label_smoothing", 0.0)
    n = np.maximum(counts, 1)
    of_w, of_l = np.split(logps, 2)
    mean_w, mean_l = np.split(logps / n, 2)
    # the mean over the pairs is the likelihood per chosen token
    nll = -of_w * len(of_w) / max(counts[: len(of_w)].sum(), 1)
    if name == "sft":
        return nll
    if name == "simpo":
        return smoothed(beta * (mean_w - mean_l) - fields["gamma"], s)
    if name == "alphapo":
        alpha = fields["alpha"]
        rewards = -expm1(clip(-alpha * logps / n, high=LARGEST_EXPONENT)) / alpha if alpha else logps / n
        chosen, rejected = np.split(rewards, 2)
        return smoothed(beta * (chosen - rejected) - fields["gamma"], s)
    if name == "cpo":
        if fields["loss_type"] == "ipo":
            losses = (mean_w - mean_l - 1 / (2 * beta)) ** 2
        elif fields["loss_type"] == "hinge":
            losses = clip(1 - beta * (of_w - of_l), low=0.0)
        else:
            losses = smoothed(beta * (of_w - of_l), s)
        return losses + fields["cpo_alpha"] * nll
    if name in ("odds_ratio", "orpo"):
        # where both answers have probability 1, the odds are equal
        is_certain = (np.real(mean_w) == 0) & (np.real(mean_l) == 0)
        h = np.where(is_certain, 0.0, mean_w - mean_l - (log1mexp(mean_w) - log1mexp(mean_l)))
        odds = -log_sigmoid(h)
        return odds if name == "odds_ratio" else nll + beta * odds

    ratios = logps - ref_logps
    r_w, r_l = np.split(ratios, 2)
    if name == "aot":
        differences = [of_w - of_l, np.subtract(*np.split(ref_logps, 2))]
        policy, reference = (x[np.argsort(np.real(x), kind="stable")] for x in differences)
        return smoothed(beta * (policy - reference), s)
    if name == "aot_unpaired":
        chosen, rejected = (x[np.argsort(np.real(x), kind="stable")] for x in (r_w, r_l))
        return smoothed(beta * (chosen - rejected), s)
    if name == "nca_pair":
        return -log_sigmoid(beta * r_w) - 0.5 * log_sigmoid(-beta * r_w) - 0.5 * log_sigmoid(-beta * r_l)
    if name == "bco_pair":
        return -log_sigmoid(beta * r_w) - log_sigmoid(-beta * r_l)
    if name == "sppo_hard":
        return (r_w - 1 / (2 * beta)) ** 2 + (r_l + 1 / (2 * beta)) ** 2
    if name == "apo_zero":
        return sigmoid(-beta * r_w) + sigmoid(beta * r_l)
    if name == "apo_down":
        return sigmoid(beta * r_w) + sigmoid(-beta * (r_w - r_l))

    kind, alpha = fields.get("f_divergence_type", "reverse_kl"), fields.get("f_alpha_divergence_coef", 0.5)
    scores = f_divergence_score(ratios, kind, alpha)
    h = np.subtract(*np.split(scores, 2))
    mean_h = np.subtract(*np.split(scores / n, 2))
    if name == "sigmoid":
        return smoothed(beta * h, s)
    if name == "robust":
        flipped = s * log_sigmoid(-beta * h) if s else 0.0
        return (-(1 - s) * log_sigmoid(beta * h) + flipped) / (1 - 2 * s)
    if name == "hinge":
        return clip(1 - beta * h, low=0.0)
    if name == "ipo":
        return (mean_h - 1 / (2 * beta)) ** 2
    if name == "sigmoid_norm":
        return -log_sigmoid(beta * mean_h)
    if name == "exo_pair":
        u = beta * h
        kept = sigmoid(u) * (log_sigmoid(u) - math.log(1 - s))
        return kept + sigmoid(-u) * (log_sigmoid(-u) - math.log(s))
    if name == "discopop":
        u = beta * h
        m = u / fields["discopop_tau"]
        return sigmoid(-m) * -log_sigmoid(u) + exp(log_sigmoid(m) - u)
    raise KeyError(name)


def with_gradients(losses_of: Any, logps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the losses [K] of ``losses_of(dual log-probabilities)`` and their derivatives [K, B]."""
    columns = []
    for index in range(len(logps)):
        point = logps.astype(complex)
        point[index] += 1j * STEP
        losses = losses_of(point)
        columns.append(losses.imag / STEP)
    return losses.real, np.stack(columns, 1)


def kto(logps: np.ndarray, ref_logps: np.ndarray, desirable: np.ndarray, *, loss_type: str, **fields: Any) -> Loss:
    """The KTO losses of sequences (arXiv 2402.01306; `apo_zero_unpaired` is from 2408.06266)."""
    counts, tensors = np.ones(len(logps)), {"desirable": desirable}
    losses, grads = with_gradients(
        lambda logps: sequence_losses(loss_type, fields, logps, counts, ref_logps, tensors), logps
    )
    z0, ratios = fields["reference_point"], logps - ref_logps
    z0 = 0.0 if loss_type == "apo_zero_unpaired" else ratios.mean() if isinstance(z0, str) else z0
    return Loss(losses, grads.sum(0), fields["beta"] * ratios, z0)


def dpo(
    logps: np.ndarray,
    ref_logps: np.ndarray | None,
    lengths: np.ndarray,
    *,
    loss_type: str,
    is_averaged: bool,
    **fields: Any,
) -> Loss:
    """The DPO losses of pairs: chosen sequences in the first half, rejected ones in the second.

    `is_averaged` says that the log-probabilities are means over tokens already.
    """
    counts = np.ones_like(lengths) if is_averaged else lengths
    losses, grads = with_gradients(
        lambda logps: sequence_losses(loss_type, fields, logps, counts, ref_logps, {}), logps
    )
    ratios = logps if ref_logps is None else logps - ref_logps
    rewards = fields["beta"] * ratios / (np.maximum(counts, 1) if loss_type == "simpo" else 1.0)
    return Loss(losses, grads.sum(0), rewards, None)


# ---- losses of tokens -----------------------------------------------------------------------------------------------

CLIPPED = ("ppo", "grpo", "bnpo", "dr_grpo", "dapo")
POLICY_GRADIENTS = (*CLIPPED, "cispo", "sapo")
TOKEN_LOSSES = ("nll", "dft", "kl", *POLICY_GRADIENTS)


def token_losses(name: str, fields: dict[str, Any], logps: np.ndarray, tensors: dict[str, Any]) -> np.ndarray:
    """Return the losses of tokens [n] as dual numbers like ``logps`` [n]."""
    if name == "nll":
        return -logps
    if name == "dft":
        return -np.exp(np.real(logps)) * logps
    kl = None
    if "ref_token_logps" in tensors:
        d = tensors["ref_token_logps"] - logps
        kl = expm1(d) - d
    if name == "kl":
        return kl
    advantages = tensors["advantages"]
    ratios = exp(logps - (np.real(logps) if fields["on_policy"] else tensors["old_logps"]))
    if name == "cispo":
        losses = -np.minimum(np.real(ratios), fields["clip_high"]) * advantages * logps
    elif name == "sapo":
        tau = np.where(advantages > 0, fields["tau_pos"], fields["tau_neg"])
        losses = -(4 / tau) * sigmoid(tau * (ratios - 1)) * advantages
    else:
        losses = clipped(ratios, advantages, fields["clip"], fields["delta"])
    if not fields["kl_beta"]:
        return losses
    return losses + fields["kl_beta"] * (kl * ratios if fields["kl_ratio"] else kl)


def token_factors(fields: dict[str, Any], counts: np.ndarray, reduction: str, num_items: float | None) -> np.ndarray:
    """Return the factors [B] of the losses of each sequence's tokens, for sequences of ``counts`` tokens."""
    takes_part = np.ones(len(counts))
    if fields.get("chosen_only"):
        takes_part[len(counts) // 2 :] = 0
    counts, size = counts * takes_part, takes_part.sum()
    if reduction == "sum":
        factors = np.ones(len(counts))
    elif fields["normalizer"] == "tokens":
        factors = np.full(len(counts), 1 / max(counts.sum(), 1))
    elif fields["normalizer"] == "sequences":
        factors = 1 / (np.maximum(counts, 1) * size)
    elif fields["normalizer"] == "constant":
        factors = np.full(len(counts), 1 / (size * fields["max_tokens"]))
    else:
        factors = np.full(len(counts), 1 / num_items if num_items else 0.0)
    return factors * takes_part


def shorter_lengths_factors(tokens: Tokens, is_counted: np.ndarray, num_sequences: int, ld_alpha: float) -> np.ndarray:
    """LD-DPO's weights of tokens [n]: ``ld_alpha`` beyond the length of the pair's shorter sequence, else 1."""
    lengths = np.bincount(tokens.sequences[is_counted], minlength=num_sequences)
    half, seen = num_sequences // 2, np.zeros(num_sequences)
    weights = np.ones(len(is_counted))
    for token, sequence in enumerate(tokens.sequences):
        seen[sequence] += is_counted[token]
        if seen[sequence] > min(lengths[sequence % half], lengths[sequence % half + half]):
            weights[token] = ld_alpha
    return weights
