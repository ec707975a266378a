"""KTO and DPO losses in NumPy and float64, with gradients derived by hand from the papers' formulas.

`test_fuzz.py` compares the package with them. Nothing here imports `kto_fused` or uses autograd, so that the package
and this file cannot share a mistake.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np


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
    )


def sequence_sums(values: np.ndarray, tokens: Tokens, num_sequences: int, average: bool) -> np.ndarray:
    """Sum (or average) values of tokens [n] per sequence [B]; 0 for a sequence without tokens."""
    sums = np.zeros(num_sequences)
    np.add.at(sums, tokens.sequences, values)
    return sums / np.maximum(counts(tokens, num_sequences), 1) if average else sums


def counts(tokens: Tokens, num_sequences: int) -> np.ndarray:
    return np.bincount(tokens.sequences, minlength=num_sequences)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(log_sigmoid(x))


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


def kto(
    logps: np.ndarray,
    ref_logps: np.ndarray,
    desirable: np.ndarray,
    *,
    loss_type: str,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    reference_point: float | str,
) -> Loss:
    """The KTO losses of sequences (arXiv 2402.01306; `apo_zero_unpaired` is from 2408.06266)."""
    ratios = logps - ref_logps
    z0 = ratios.mean() if isinstance(reference_point, str) else reference_point
    if loss_type == "apo_zero_unpaired":
        z0 = 0.0
    sign, weight = np.where(desirable, 1.0, -1.0), np.where(desirable, desirable_weight, undesirable_weight)
    q, rest = sigmoid(sign * beta * (ratios - z0)), sigmoid(-sign * beta * (ratios - z0))
    if loss_type == "kto_squared":
        losses, grads = weight * rest**2, -2 * weight * sign * beta * q * rest**2
    else:
        losses, grads = weight * rest, -weight * sign * beta * q * rest
    return Loss(losses, grads, beta * ratios, z0)


def dpo(
    logps: np.ndarray,
    ref_logps: np.ndarray | None,
    lengths: np.ndarray,
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    gamma: float,
    is_averaged: bool,
) -> Loss:
    """The DPO losses of pairs: chosen sequences in the first half, rejected ones in the second.

    `is_averaged` says that the log-probabilities are means over tokens already.
    """
    ratios = logps if ref_logps is None else logps - ref_logps
    divisor = np.ones_like(ratios)
    if loss_type in ("ipo", "simpo") and not is_averaged:
        divisor = np.maximum(lengths, 1)
    chosen, rejected = np.split(ratios / divisor, 2)
    h, s = chosen - rejected, label_smoothing
    if loss_type == "hinge":
        losses = np.maximum(0, 1 - beta * h)
        of_chosen = np.where(beta * h < 1, -beta, 0.0)
        of_rejected = -of_chosen
    elif loss_type == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
        of_chosen = 2 * (h - 1 / (2 * beta))
        of_rejected = -of_chosen
    elif loss_type == "apo_zero":
        losses = sigmoid(-beta * chosen) + sigmoid(beta * rejected)
        of_chosen = -beta * sigmoid(beta * chosen) * sigmoid(-beta * chosen)
        of_rejected = beta * sigmoid(beta * rejected) * sigmoid(-beta * rejected)
    elif loss_type == "apo_down":
        of_h = -beta * sigmoid(beta * h) * sigmoid(-beta * h)
        losses = sigmoid(beta * chosen) + sigmoid(-beta * h)
        of_chosen = beta * sigmoid(beta * chosen) * sigmoid(-beta * chosen) + of_h
        of_rejected = -of_h
    else:  # sigmoid, robust, simpo
        u = beta * h - (gamma if loss_type == "simpo" else 0.0)
        flipped = -s if loss_type == "robust" else s
        total = 1 - 2 * s if loss_type == "robust" else 1.0
        losses = (-(1 - s) * log_sigmoid(u) - flipped * log_sigmoid(-u)) / total
        of_chosen = -beta * ((1 - s) * sigmoid(-u) - flipped * sigmoid(u)) / total
        of_rejected = -of_chosen
    rewards = beta * ratios / (divisor if loss_type == "simpo" else 1.0)
    return Loss(losses, np.concatenate([of_chosen, of_rejected]) / divisor, rewards, None)
