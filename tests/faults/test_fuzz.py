"""Random calls of every loss and log-probability function agree with `loss_oracle`: values, metrics and gradients.

A case is made from its seed alone, so that a failure can be repeated.
"""

import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import loss_oracle as oracle
import numpy as np
import pytest
import torch
from devices import ENGINES

import kto_fused
from kto_fused import heads, reference
from kto_fused.engines import plan
from kto_fused.heads.protocol import Head, class_of

# the number of cases with and without --full, and the number of tests that share them
CASES, SLICE, GROUPS = 3000, 200, 10

# EPS is the distance from 1 to the next number. A result may be off by `ROUNDINGS` eps of the dtype that it is computed
# in, relative to the numbers that it is computed from, and by `STORED` eps of the dtype that it is stored in.
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SMALLEST = {torch.float64: 1e-300, torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 2.0**-24}
ROUNDINGS, STORED = 8, 3

OF_LOGITS = ("fused_kto_loss", "fused_dpo_loss", "sequence_logps", "token_logps")
OF_HIDDEN = ("fused_linear_kto_loss", "fused_linear_dpo_loss", "linear_sequence_logps", "linear_token_logps")
FROM_LOGPS = ("kto_loss_from_logps", "dpo_loss_from_logps")
FUNCTIONS = (*OF_LOGITS[:2], *OF_HIDDEN[:2], *OF_LOGITS, *OF_HIDDEN, *FROM_LOGPS)
FROM_LOGITS, FROM_HIDDEN = (*OF_LOGITS, "fused_loss"), (*OF_HIDDEN, "fused_linear_loss")
KTO_TYPES = ("kto", "kto_squared", "apo_zero_unpaired")
DPO_TYPES = ("sigmoid", "robust", "hinge", "ipo", "simpo", "apo_zero", "apo_down")
SMOOTHED = ("sigmoid", "robust", "simpo")


class Source(NamedTuple):
    """Logits, and the tensors that they come from: themselves, or hidden states and an LM head."""

    tensors: dict[str, torch.Tensor]  # logits; or hidden, weight and perhaps bias
    logits: np.ndarray  # [rows, V]
    size: np.ndarray  # [rows] the largest number that was added up in a row's logits


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_numpy(values: torch.Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()


class CheckedLoss(NamedTuple):
    """A compared loss, and the gradient to expect from its backward pass."""

    loss: torch.Tensor
    incoming: torch.Tensor  # the gradient that flows into the loss
    grads: np.ndarray  # [B] d loss / d log-probability of each sequence, times incoming
    tolerance: np.ndarray  # [B] possible error of grads


class Fuzz:
    """One random call of a function of KTO, DPO or log-probabilities, made from its seed alone."""

    is_tame = False  # whether log-probabilities and their differences stay moderate
    ignore_indices: tuple[int, ...] = (-100, -100, -100, -1, 0)
    shifts: tuple[bool, ...] = (True, True, False)
    empty_share = 0.05  # of batches in which no label counts

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.backend, self.device = self.random.choice([ENGINES[0], ENGINES[0], ENGINES[1]])
        self.function = self.random.choice(FUNCTIONS)
        self.dtype = self.random.choice(list(EPS))
        self.is_dpo, self.is_loss = "dpo" in self.function, "loss" in self.function
        self.batch = self.random.choice([2, 2, 4, 6]) if self.is_dpo else self.random.randint(1, 5)
        self.options: dict[str, Any] = {"backend": self.backend}
        self.worst, self.is_left_out, self.is_compared = 0.0, False, False
        self.mismatches: list[str] = []

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    # ---- inputs -----------------------------------------------------------------------------------------------------

    def strided(self, values: torch.Tensor, *, last_too: bool, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the same values with random strides, in the case's dtype and on its device.

        `last_too` allows a stride other than 1 in the last dimension.
        """
        kind = self.pick("contiguous", "contiguous", "transposed", "padded", "every second", *["columns"] * last_too)
        values = values.to(self.device, dtype or self.dtype)
        shape = values.shape
        if kind == "transposed" and values.ndim == 3:
            holder = values.new_full((shape[1], shape[0], shape[2]), math.nan).transpose(0, 1)
        elif kind == "padded":
            holder = values.new_full((*shape[:-1], shape[-1] + 3), math.nan)[..., : shape[-1]]
        elif kind == "every second":
            holder = values.new_full((2 * shape[0], *shape[1:]), math.nan)[::2]
        elif kind == "columns":
            holder = values.new_full((*shape[:-2], shape[-1], shape[-2]), math.nan).transpose(-1, -2)
        else:
            holder = torch.empty_like(values)
        return holder.copy_(values)

    def make_labels(self) -> None:
        """Draw labels, their dtype, and offsets if sequences are packed. Some or all completions may be empty."""
        self.vocab = self.pick(1, 2, 3, 5, 17, 33, 64, 100, 127, 130, 257, 500)
        seq_len = self.pick(1, 2, 3, 5, 8, 9)
        ignore_index = self.pick(*self.ignore_indices)
        self.shift, self.average = self.pick(*self.shifts), self.pick(False, False, True)
        labels = torch.randint(self.vocab, (self.batch, seq_len), generator=self.generator)
        nothing = self.random.random() < self.empty_share
        for row in labels:
            start, stop = sorted(self.random.randint(0, seq_len) for _ in range(2))
            row[:start], row[stop:] = ignore_index, ignore_index
            if nothing or self.random.random() < 0.1:
                row[:] = ignore_index
        self.offsets = None
        self.rows_shape: tuple[int, ...] = (self.batch, seq_len)
        if self.pick(True, False):
            lengths = [self.random.randint(0, seq_len) for _ in range(self.batch)]
            self.offsets = [sum(lengths[:i]) for i in range(self.batch + 1)]
            labels = torch.cat([row[:length] for row, length in zip(labels, lengths, strict=True)])
            self.rows_shape = self.pick((len(labels),), (1, len(labels)))
            dtype = self.pick(torch.int32, torch.int64)
            self.options["cu_seqlens"] = torch.tensor(self.offsets, dtype=dtype, device=self.device)
        self.tokens = oracle.find_tokens(labels.numpy(), self.offsets, ignore_index, self.shift)
        self.token_weights = np.ones(len(self.tokens.rows))
        # rows that no function may read: where nothing is predicted
        self.unread = torch.ones(labels.numel(), dtype=torch.bool)
        self.unread[self.tokens.rows] = False
        dtypes = [torch.int64, torch.int64, torch.int32] + [torch.int16, torch.int8] * (self.vocab < 128)
        labels = labels if self.pick(True, False) else labels.reshape(self.rows_shape)
        self.labels = labels.to(self.device, self.pick(*dtypes))
        self.options |= {"ignore_index": ignore_index, "shift": self.shift}
        if "token_logps" not in self.function and self.function in FUNCTIONS:
            self.options["average_log_prob"] = self.average
        else:
            self.average = False
        self.transform = {
            "scale": self.pick(1.0, 1.0, 0.3, 2.5),
            "softcap": self.pick(None, None, 5.0, 30.0),
            "temperature": self.pick(1.0, 1.0, 0.5, 1.9),
        }
        self.options |= {
            "logit_scale": self.transform["scale"],
            "logit_softcap": self.transform["softcap"],
            "temperature": self.transform["temperature"],
        }

    def make_logits(self, dtype: torch.dtype) -> Source:
        num_rows = math.prod(self.rows_shape)
        values = self.randn(num_rows, self.vocab) * self.pick(0.1, 3.0, 3.0, 3.0 if self.is_tame else 30.0)
        extreme = self.pick("none", "none", "none" if self.is_tame else "large", "banned")
        if extreme == "large":
            where = torch.rand(values.shape, generator=self.generator) < 0.1
            values[where] = 1e4 * values[where].sign()
        elif extreme == "banned":  # forbidden tokens have logit -inf, but never the targets
            where = torch.rand(values.shape, generator=self.generator) < 0.3
            where[self.tokens.rows, self.tokens.targets] = False
            values[where] = -math.inf
        seen = to_numpy(values.to(dtype)).copy()  # of float64 it is the same memory
        values[self.unread] = math.nan
        logits = self.strided(values.view(*self.rows_shape, self.vocab), last_too=False, dtype=dtype)
        return Source({"logits": logits}, seen, np.zeros(num_rows))

    def make_hidden(self, dtype: torch.dtype, head: Source | None = None) -> Source:
        """Draw hidden states, with the LM head of `head` or with a new one."""
        num_rows = math.prod(self.rows_shape)
        hidden_size = head.tensors["weight"].shape[1] if head else self.pick(1, 2, 3, 8, 16, 33)
        values = self.randn(num_rows, hidden_size) * self.pick(0.3, 1.0, 1.0, 1.0 if self.is_tame else 20.0)
        x, hidden = to_numpy(values.to(dtype)), values.clone()
        hidden[self.unread] = math.nan
        hidden = self.strided(hidden.view(*self.rows_shape, hidden_size), last_too=True, dtype=dtype)
        tensors = {"hidden": hidden}
        if head:
            weight, bias = head.tensors["weight"], head.tensors.get("bias")
        else:
            weight = self.randn(self.vocab, hidden_size) * self.pick(0.2, 1.0)
            tensors["weight"] = weight = self.strided(weight, last_too=True, dtype=dtype)
            bias = self.randn(self.vocab).to(self.device, dtype) if self.pick(True, False) else None
            if bias is not None:
                tensors["bias"] = bias
        w = to_numpy(weight)
        b = np.zeros(self.vocab) if bias is None else to_numpy(bias)
        return Source(tensors, x @ w.T + b, (np.abs(x) @ np.abs(w).T + np.abs(b)).max(1))

    def score(self, source: Source) -> oracle.Scored:
        rows = self.tokens.rows
        return oracle.score(source.logits[rows], self.tokens.targets, size=source.size[rows], **self.transform)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sums (or means) over sequences of the tokens' values times their weights."""
        weighted = np.where(self.token_weights == 0, 0.0, values * self.token_weights)
        return oracle.sequence_sums(weighted, self.tokens, self.batch, self.average)

    def make_loss_options(self) -> None:
        reduction, beta = self.pick("mean", "mean", "sum", "none"), self.pick(0.01, 0.1, 0.5, 2.0)
        self.reduction = reduction
        self.options |= {"reduction": reduction, "beta": beta}
        if self.is_dpo:
            loss_type = self.pick(*DPO_TYPES)
            smoothing = self.pick(0.0, 0.1, 0.3) if loss_type in SMOOTHED else 0.0
            gamma = self.pick(0.5, 0.0, 1.3) if loss_type == "simpo" else 0.5
            self.loss_options = {"loss_type": loss_type, "beta": beta, "label_smoothing": smoothing, "gamma": gamma}
            self.options |= {"loss_type": loss_type, "label_smoothing": smoothing, "gamma": gamma}
            self.has_reference = loss_type != "simpo"
            return
        self.has_reference = True
        loss_type = self.pick(*KTO_TYPES)
        weights = {"desirable_weight": self.pick(1.0, 0.0, 1.33), "undesirable_weight": self.pick(1.0, 0.0, 0.3)}
        z0: Any = self.pick(0.0, 0.37, -1.5, "batch_mean", "batch_mean", "tensor")
        if loss_type == "apo_zero_unpaired":
            z0 = self.pick(0.0, "batch_mean")
        elif z0 == "tensor":
            z0 = torch.full(self.pick((), (1,)), 0.7, dtype=self.pick(*EPS), device=self.device)
        self.options |= {"loss_type": loss_type, "reference_point": z0, **weights}
        z0 = z0.item() if isinstance(z0, torch.Tensor) else z0
        self.loss_options = {"loss_type": loss_type, "beta": beta, "reference_point": z0, **weights}
        self.desirable = torch.rand(self.batch, generator=self.generator) < 0.5

    # ---- the comparison ---------------------------------------------------------------------------------------------

    def compare(self, name: str, got: Any, want: Any, tolerance: Any) -> None:
        """Note a mismatch if `got` differs from `want` by more than `tolerance`."""
        got = to_numpy(got) if isinstance(got, torch.Tensor) else np.asarray(got)
        want, tolerance = np.asarray(want), np.broadcast_to(np.asarray(tolerance, dtype=float), np.shape(want))
        tolerance = np.where(np.isnan(tolerance), np.inf, tolerance)  # 0 times an infinite one
        if got.shape != want.shape:
            self.mismatches.append(f"{name} has shape {got.shape}, expected {want.shape}")
            return
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            same = (got == want) | (np.isnan(got) & np.isnan(want))
            share = np.where(same, 0.0, np.abs(got - want) / tolerance)
        share = np.where(np.isnan(share), np.inf, share).max(initial=0.0)
        self.worst = max(self.worst, share)
        if share > 1:
            self.mismatches.append(f"{name} is off by {share:.2g} tolerances")

    def loss_of(self, logps: np.ndarray, ref_logps: np.ndarray | None, lengths: np.ndarray) -> oracle.Loss:
        if self.is_dpo:
            return oracle.dpo(logps, ref_logps, lengths, is_averaged=self.average, **self.loss_options)
        return oracle.kto(logps, ref_logps, self.desirable.numpy(), **self.loss_options)

    def check_loss(
        self,
        result: tuple[torch.Tensor, kto_fused.LossMetrics],
        logps: np.ndarray,
        ref_logps: np.ndarray | None,
        errors: np.ndarray,
        ref_errors: np.ndarray,
        lengths: np.ndarray,
    ) -> CheckedLoss:
        """Compare a loss and its metrics with the oracle.

        `errors` and `ref_errors` [B] bound the errors of the log-probabilities.
        """
        loss, metrics = result
        want = self.loss_of(logps, ref_logps, lengths)
        loss_off, grad_off = np.zeros_like(want.losses), np.zeros_like(want.grads)
        beta, half = self.options["beta"], len(logps) // 2
        scale = EPS[torch.float64] * ROUNDINGS
        apart = errors + ref_errors + scale * (1 + np.abs(logps) + (0 if ref_logps is None else np.abs(ref_logps)))
        signs = [np.full(len(logps), sign) for sign in (1.0, -1.0)]
        signs += [np.concatenate([sign[:half], -sign[half:]]) for sign in signs]
        for sign in signs:
            near = self.loss_of(logps + sign * apart, ref_logps, lengths)
            loss_off = np.maximum(loss_off, 2 * np.abs(near.losses - want.losses))
            grad_off = np.maximum(grad_off, 2 * np.abs(near.grads - want.grads))
        if not self.is_dpo and isinstance(self.loss_options["reference_point"], str):  # z0 depends on all sequences
            steepest = beta * max(self.loss_options["desirable_weight"], self.loss_options["undesirable_weight"])
            loss_off = loss_off + steepest * (apart + apart.mean())
            grad_off = grad_off + steepest * beta * (apart + apart.mean())
        # sigma'(x) = sigma(x) (1 - sigma(x)) carries the rounding error of 1 - sigma(x), however small it is itself
        grad_off = grad_off + scale * beta * max(self.options.get("desirable_weight", 1.0), 1.0)
        eps = EPS[loss.dtype]
        average = len(want.losses) if self.reduction == "mean" else 1
        if self.reduction == "none":
            incoming = self.randn(len(want.losses))
            expected, off = want.losses, loss_off + STORED * eps * np.abs(want.losses)
        else:
            incoming = self.randn(1)[0]
            expected, off = want.losses.sum() / average, loss_off.sum() / average
            off += STORED * eps * (np.abs(want.losses).sum() / average)
        incoming = incoming.to(loss)
        self.compare("loss", loss, expected, off + SMALLEST[loss.dtype])
        divisor = np.maximum(lengths, 1) if self.is_dpo and self.loss_options["loss_type"] == "simpo" else 1
        divisor = 1 if self.average else divisor
        self.compare("metrics.rewards", metrics.rewards, want.rewards, beta * apart / divisor)
        if want.reference_point is not None:
            self.compare("metrics.reference_point", metrics.reference_point, want.reference_point, apart.mean())
        self.check_sequences(metrics, logps, errors)
        if ref_logps is not None:
            self.compare("metrics.ref_logps", metrics.ref_logps, ref_logps, ref_errors + scale * np.abs(ref_logps))
        by_sequence = np.resize(to_numpy(incoming), len(logps)) / average
        grads = want.grads * by_sequence
        return CheckedLoss(loss, incoming, grads, grad_off * np.abs(by_sequence) + STORED * eps * np.abs(grads))

    def check_sequences(self, metrics: Any, logps: np.ndarray, errors: np.ndarray) -> None:
        self.compare("metrics.logps", metrics.logps, logps, errors + EPS[torch.float64] * ROUNDINGS * np.abs(logps))

    def check_tokens(self, metrics: Any, scored: oracle.Scored, errors: np.ndarray) -> None:
        lengths = oracle.counts(self.tokens, self.batch)

        def means(values: np.ndarray) -> np.ndarray:
            return oracle.sequence_sums(values, self.tokens, self.batch, average=True)

        self.compare("metrics.token_counts", metrics.token_counts, lengths, 0)
        self.compare(
            "metrics.entropy", metrics.entropy, means(scored.entropy), means(errors * (2 + math.log(self.vocab)))
        )
        self.compare("metrics.mean_logits", metrics.mean_logits, means(scored.mean_logit), means(errors))
        # given logits keep their order, ties included; rounding may swap computed logits that are nearly equal
        is_given = self.function in FROM_LOGITS and self.transform["softcap"] is None
        apart = np.zeros_like(errors) if is_given else 2 * errors
        least, most = means(scored.lead >= apart), means(scored.lead >= -apart)
        self.compare("metrics.token_accuracy", metrics.token_accuracy, (least + most) / 2, (most - least) / 2 + 1e-6)

    def run(self) -> "Fuzz":
        """Make the call and compare its results; mismatches are collected in `mismatches`."""
        self.run_logps() if self.function in FROM_LOGPS else self.run_tokens()
        return self

    def run_logps(self) -> None:
        """Run a loss that takes log-probabilities."""
        self.make_loss_options()
        self.average = self.pick(False, True)
        given = (-self.randn(self.batch).abs() * self.pick(1.0, 30.0, 1000.0)).to(self.device, self.dtype)
        reference = (
            to_numpy(given) + to_numpy(self.randn(self.batch)) * self.pick(0.0, 1.0, 20.0)
        ) * self.has_reference
        lengths = np.array([self.random.randint(0, 9) for _ in range(self.batch)])
        arguments = [given.requires_grad_()]
        ref_logps = None
        if self.has_reference:
            ref_logps = torch.tensor(reference, device=self.device).to(self.pick(*EPS))
            arguments.append(ref_logps)
        if self.is_dpo:
            self.options["average_log_prob"] = self.average
            if self.options["loss_type"] in ("ipo", "simpo") and not self.average:
                self.options["token_counts"] = torch.tensor(lengths, device=self.device)
        else:
            arguments.append(self.desirable.to(self.device))
        result = getattr(kto_fused, self.function)(*arguments, **self.options)
        nothing = np.zeros(self.batch)
        reference = None if ref_logps is None else to_numpy(ref_logps)
        loss, incoming, grads, off = self.check_loss(result, to_numpy(given), reference, nothing, nothing, lengths)
        (grad,) = torch.autograd.grad(loss, given, incoming)
        off = off + STORED * EPS[self.dtype] * np.abs(grads) + SMALLEST[self.dtype]
        self.compare("grad of policy_logps", grad, grads, off)

    def run_tokens(self) -> None:
        """Run a function that takes logits or hidden states."""
        self.make_labels()
        from_hidden = self.function in FROM_HIDDEN
        policy = self.make_hidden(self.dtype) if from_hidden else self.make_logits(self.dtype)
        needed = list(policy.tensors)
        if from_hidden:
            self.options["chunk_bytes"] = self.pick(1, 100, 3000, 2**14, 2**18, 2**30)
            self.options |= {"lm_head_bias": policy.tensors["bias"]} if "bias" in policy.tensors else {}
            needed = self.pick(needed, needed, ["hidden"], ["weight"], needed[1:], [])
        for name in needed:
            policy.tensors[name].requires_grad_()
        arguments = [policy.tensors["hidden"], policy.tensors["weight"]] if from_hidden else [policy.tensors["logits"]]
        if not from_hidden and self.random.random() < 0.3:
            self.options["inplace_backward"] = True
            arguments = [arguments[0].clone(memory_format=torch.contiguous_format)]
        eps = EPS[compute_dtype(self.dtype)]
        scored = self.score(policy)
        errors = ROUNDINGS * eps * scored.margin
        logps, sequence_errors = self.sums(scored.logps), self.sums(errors)
        lengths = oracle.counts(self.tokens, self.batch)
        arguments.append(self.labels)
        if not self.is_loss:
            self.finish_logps(arguments, needed, policy, scored, errors, logps, sequence_errors)
            return
        self.make_loss_options()
        if not self.is_dpo:
            arguments.append(self.desirable.to(self.device, self.pick(torch.bool, torch.int64, torch.uint8)))
        ref_logps, ref_errors = self.add_reference(policy, from_hidden, logps)
        result = getattr(kto_fused, self.function)(*arguments, **self.options)
        self.check_tokens(result[1], scored, errors)
        loss, incoming, grads, off = self.check_loss(result, logps, ref_logps, sequence_errors, ref_errors, lengths)
        if self.average:
            grads, off = grads / np.maximum(lengths, 1), off / np.maximum(lengths, 1)
        sequences = self.tokens.sequences
        self.check_gradients(loss, incoming, needed, policy, scored, errors, grads[sequences], off[sequences])

    def add_reference(
        self, policy: Source, from_hidden: bool, logps: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Add a reference to the call's options; returns its log-probabilities and their possible errors."""
        if not self.has_reference:
            return None, np.zeros(self.batch)
        if self.pick(True, False):
            given = torch.tensor(logps) + self.randn(self.batch) * self.pick(0.0, 1.0, 10.0)
            given = given.to(self.device, self.pick(torch.float64, torch.float64, torch.float32))
            self.options["ref_logps"] = given
            return to_numpy(given), np.zeros(self.batch)
        dtype = self.pick(self.dtype, self.dtype, *EPS)
        if not from_hidden:
            source = self.make_logits(dtype)
            self.options["ref_logits"] = source.tensors["logits"]
        else:
            shared = self.pick(True, False)
            source = self.make_hidden(self.dtype if shared else dtype, policy if shared else None)
            dtype = self.dtype if shared else dtype
            names = {"hidden": "ref_hidden", "weight": "ref_lm_head_weight", "bias": "ref_lm_head_bias"}
            self.options |= {names[name]: values for name, values in source.tensors.items()}
        scored = self.score(source)
        return self.sums(scored.logps), self.sums(ROUNDINGS * EPS[compute_dtype(dtype)] * scored.margin)

    def finish_logps(self, arguments, needed, policy, scored, errors, logps, sequence_errors) -> None:
        """Run a function that returns log-probabilities of sequences or tokens, with a random incoming gradient."""
        got = getattr(kto_fused, self.function)(*arguments, **self.options)
        num_rows, sequences, rows = math.prod(self.rows_shape), self.tokens.sequences, self.tokens.rows
        if "token" in self.function:
            want, off = np.zeros(num_rows), np.zeros(num_rows)
            want[rows], off[rows] = scored.logps, errors
            self.compare("logps", got.flatten(), want, off)
            incoming = self.randn(num_rows).view(got.shape).to(got)
            token_grads = to_numpy(incoming).flatten()[rows]
        else:
            self.compare("logps", got, logps, sequence_errors + EPS[torch.float64] * ROUNDINGS * np.abs(logps))
            incoming = self.randn(self.batch).to(got)
            divisor = np.maximum(oracle.counts(self.tokens, self.batch), 1) if self.average else 1
            token_grads = (to_numpy(incoming) / divisor)[sequences]
        off = STORED * EPS[compute_dtype(self.dtype)] * np.abs(token_grads)
        self.check_gradients(got, incoming, needed, policy, scored, errors, token_grads, off)

    def check_gradients(self, result, incoming, needed, policy, scored, errors, token_grads, token_off) -> None:
        """Compare the gradients of the tensors in `needed` with those that follow from the tokens' gradients."""
        if not needed:
            assert not result.requires_grad
            return
        found = torch.autograd.grad(result, [policy.tensors[name] for name in needed], incoming)
        grads = dict(zip(needed, found, strict=True))
        compute = compute_dtype(self.dtype)
        share = np.abs(token_grads)[:, None]
        of_logits = token_grads[:, None] * scored.jacobian
        off = token_off[:, None] * np.abs(scored.jacobian) + share * scored.bound * errors[:, None] + SMALLEST[compute]
        num_rows, rows = math.prod(self.rows_shape), self.tokens.rows

        def at_rows(values: np.ndarray) -> np.ndarray:
            spread = np.zeros((num_rows, values.shape[1]))
            spread[rows] = values
            return spread

        stored, least = STORED * EPS[self.dtype], SMALLEST[self.dtype]
        if "logits" in grads:
            off = at_rows(off + stored * np.abs(of_logits) + least)
            self.compare("grad of logits", grads["logits"].reshape(num_rows, self.vocab), at_rows(of_logits), off)
            return
        is_narrow = self.dtype == torch.bfloat16 and (self.backend == "triton" or self.device != "cpu")
        off = off + ROUNDINGS * EPS[self.dtype if is_narrow else compute] * share * scored.bound
        hidden, weight = policy.tensors["hidden"], to_numpy(policy.tensors["weight"])
        x = np.nan_to_num(to_numpy(hidden).reshape(num_rows, weight.shape[1])[rows], nan=0.0)  # NaN: weight 0
        wanted = {
            "hidden": (at_rows(of_logits @ weight), at_rows(off @ np.abs(weight) + least)),
            "weight": (of_logits.T @ x, off.T @ np.abs(x) + least),
            "bias": (of_logits.sum(0), off.sum(0) + least),
        }
        for name, got in grads.items():
            want, tolerance = wanted[name]
            self.compare(f"grad of {name}", got.reshape(want.shape), want, tolerance + stored * np.abs(want))

    def __str__(self) -> str:
        return f"{self.function} {self.dtype} {self.batch} x {self.__dict__.get('rows_shape')} {self.options}"


class Leaf(NamedTuple):
    """One loss of a mix, with the factor of its values."""

    factor: float
    name: str
    fields: dict[str, Any]


class Outcome(NamedTuple):
    """What the formulas give for some log-probabilities, and what rounding errors are proportional to."""

    losses: np.ndarray  # [] or [K], reduced
    grads: np.ndarray  # [n] d (losses @ incoming) / d log-probability of each token
    losses_size: np.ndarray
    grads_size: np.ndarray


HEADS = (*oracle.SEQUENCE_LOSSES, *oracle.TOKEN_LOSSES)
NORMALIZERS = ("tokens", "sequences", "constant", "items")
# losses that read old log-probabilities and advantages
RATIOS = (*oracle.SEQUENCE_RATIO, *oracle.POLICY_GRADIENTS)
# Losses that hold exponentials of log-ratios: numbers stay small for them, so that nothing overflows.
EXPONENTIAL = ("discopop", "alphapo", "kl", *RATIOS)


class AnyLoss(Fuzz):
    """One random call of a function that takes any loss, with a registered head or a mix of up to four."""

    def __init__(self, seed: int):
        super().__init__(seed)
        self.function = self.pick("fused_loss", "fused_linear_loss", "fused_linear_loss", "loss_from_logps")
        self.is_loss, self.is_dpo = True, False
        self.is_twin = self.random.random() < 0.15
        self.split_tokens = self.pick(1, plan.SPLIT_TOKENS)
        self.make_head(HEADS[seed % len(HEADS)])
        if self.function == "loss_from_logps" and (self.ld_alpha < 1 or (self.is_weighted and self.of_tokens)):
            self.function = "fused_linear_loss"  # the only loss that finds token weights or row statistics
        self.has_tokens = self.function != "loss_from_logps" or bool(self.of_tokens)
        self.batch = self.pick(2, 2, 4, 6) if self.is_even else self.random.randint(1, 5)

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def make_head(self, first: str) -> None:
        """Draw the loss: ``first`` by itself or in a mix."""
        names = [first, *self.random.choices(HEADS, k=self.pick(0, 0, 1, 2))]
        # a z0 of the batch beside one that is given, and ratios on policy beside others, are refused
        self.z0_kind = self.pick("batch_mean", "batch_mean", "tensor", 0.3)
        self.on_policy = self.random.random() < 0.2
        parts = [(self.pick(0.3, 1.0, 2.0, 0.0) if len(names) > 1 else 1.0, name, self.fields(name)) for name in names]
        self.needs_mask = any(fields.get("nll_on") == "all" for _, _, fields in parts)
        if self.needs_mask:  # a loss that reads row statistics is refused beside a completion mask
            parts = [
                (factor, name, {**fields, **({"use_weighting": False} if "use_weighting" in fields else {})})
                for factor, name, fields in parts
            ]
        sequence_parts = [fields for _, name, fields in parts if name not in oracle.TOKEN_LOSSES]
        reads_ld = [name in (*oracle.WEIGHTED, *oracle.SORTED) for name in names]
        may_ld = all(
            is_ld or name in ("sft", *oracle.TOKEN_LOSSES) for is_ld, name in zip(reads_ld, names, strict=True)
        )
        is_weighted = any(fields.get("use_weighting") for fields in sequence_parts)
        self.ld_alpha = self.pick(0.0, 0.4, 1.0, 1.0, 1.0) if may_ld and any(reads_ld) and not is_weighted else 1.0
        for is_ld, (_, _, fields) in zip(reads_ld, parts, strict=True):
            if is_ld and self.ld_alpha < 1:
                fields["ld_alpha"] = self.ld_alpha

        made = [(factor, heads.make(name, **fields)) for factor, name, fields in parts]
        if len(made) == 1:
            self.head: Head = made[0][1] if self.pick(True, True, False) else heads.Mix(*made)
        elif len(made) == 3 and self.pick(True, False):
            self.head = heads.Mix(made[0], (0.5, heads.Mix(*made[1:])))
            parts = [parts[0], *((0.5 * factor, name, fields) for factor, name, fields in parts[1:])]
        else:
            self.head = heads.Mix(*made)
        leaves = []
        for (factor, name, _), (_, head) in zip(parts, made, strict=True):
            leaf = Leaf(factor, name, {field.name: getattr(head, field.name) for field in dataclasses.fields(head)})
            if name == "orpo" and leaf.fields["nll_on"] == "all":
                nll = {"normalizer": "tokens", "chosen_only": True}
                leaves += [Leaf(factor, "nll", nll), Leaf(factor * leaf.fields["beta"], "odds_ratio", {})]
            elif name == "sft" and self.ld_alpha < 1:
                leaves.append(Leaf(factor, "nll", {"normalizer": "tokens", "chosen_only": True}))
            else:
                leaves.append(leaf)
        self.of_sequences = [leaf for leaf in leaves if leaf.name not in oracle.TOKEN_LOSSES]
        self.of_tokens = [leaf for leaf in leaves if leaf.name in oracle.TOKEN_LOSSES]
        self.leaves, self.names = leaves, {leaf.name for leaf in leaves}
        self.is_paired = any(leaf.name in oracle.PAIRS for leaf in self.of_sequences)
        self.is_even = self.is_paired or any(leaf.fields.get("chosen_only") for leaf in leaves)
        self.is_batchwise = any(
            leaf.name in oracle.SORTED or leaf.fields.get("reference_point") == "batch_mean" for leaf in leaves
        )
        self.is_weighted = is_weighted
        self.is_tame = not self.names.isdisjoint(EXPONENTIAL) or any(
            leaf.fields.get("f_divergence_type", "reverse_kl") != "reverse_kl" for leaf in leaves
        )
        reads_reference = (*oracle.KTO_LIKE, *oracle.WEIGHTED, *oracle.SORTED)
        self.has_reference = not self.names.isdisjoint(reads_reference)

    def fields(self, name: str) -> dict[str, Any]:
        """Draw some of a head's fields; the others keep their defaults."""
        fields: dict[str, Any] = {}
        has_beta = name not in ("sft", "odds_ratio", *oracle.SEQUENCE_RATIO, *oracle.TOKEN_LOSSES)
        if has_beta and self.pick(True, False):
            fields["beta"] = self.pick(0.05, 0.3, 1.5)
        if name in ("sigmoid", "robust", "simpo", "alphapo", *oracle.SORTED, "exo_pair") and self.pick(True, False):
            fields["label_smoothing"] = self.pick(0.1, 0.3)
        if name in oracle.SCORED and self.pick(True, False):
            kind = self.pick("forward_kl", "js_divergence", "alpha_divergence")
            fields |= {"f_divergence_type": kind, "f_alpha_divergence_coef": self.pick(0.5, 0.3, 1.0), "beta": 0.05}
        if name in oracle.WEIGHTED and self.random.random() < 0.25:
            fields["use_weighting"] = True
        if name in ("simpo", "alphapo"):
            fields["gamma"] = self.pick(0.5, 0.0, 1.3)
        if name == "alphapo":
            fields["alpha"] = self.pick(0.25, 0.0, -0.5)
        if name == "cpo":
            fields |= {"loss_type": self.pick("sigmoid", "hinge", "ipo"), "cpo_alpha": self.pick(1.0, 0.0)}
        if name == "orpo":
            fields["nll_on"] = self.pick("completion", "all")
        if name in oracle.KTO_LIKE:
            fields |= {"desirable_weight": self.pick(1.0, 0.0, 1.3), "undesirable_weight": self.pick(1.0, 0.0, 0.3)}
        if name in ("kto", "kto_squared"):
            fields["reference_point"] = self.z0_kind
        if name in RATIOS:
            fields["on_policy"] = self.on_policy
        if name in (*oracle.CLIPPED, "gspo"):
            fields |= {"clip": self.pick(0.05, 0.2, (0.1, 0.4), (3e-4, 4e-4)), "delta": self.pick(0.0, 1.3)}
        if name == "cispo":
            fields["clip_high"] = self.pick(5.0, 1.1)
        if name in oracle.POLICY_GRADIENTS:
            fields |= {"kl_beta": self.pick(0.0, 0.3), "kl_ratio": self.pick(False, True)}
        if name == "nll":
            fields["chosen_only"] = self.pick(False, True)
        if name in ("nll", "dft", "kl", "ppo", "cispo", "sapo", *oracle.SEQUENCE_RATIO):
            fields["normalizer"] = self.pick(*NORMALIZERS)
            fields["max_tokens"] = 7 if fields["normalizer"] == "constant" else 0
        return fields

    # ---- tensors ----------------------------------------------------------------------------------------------------

    def as_labels(
        self, values: np.ndarray, other: float = math.nan, dtype: torch.dtype = torch.float64
    ) -> torch.Tensor:
        """Spread values of tokens [n] over a tensor like the labels, with ``other`` where no label is predicted."""
        spread = torch.full((self.labels.numel(),), other, dtype=dtype)
        spread[self.tokens.rows + int(self.shift)] = torch.from_numpy(values).to(dtype)
        return spread.view(self.labels.shape).to(self.device)

    def weights_like(self, *shape: int) -> np.ndarray:
        weights = 2 * torch.rand(*shape, generator=self.generator, dtype=torch.float64)
        weights[torch.rand(*shape, generator=self.generator) < self.pick(0.1, 0.5)] = 0
        return weights.numpy()

    def make_tensors(self) -> None:
        """Draw the loss's tensors that do not depend on the policy's log-probabilities.

        ``tensors`` go into the call; ``seen_by_sequences`` and ``seen_by_tokens`` are what the formulas read.
        """
        n, sequences = len(self.tokens.rows), self.tokens.sequences
        # as many packed positions as sequences: one number per sequence would be read as one per position
        is_ambiguous = self.offsets is not None and self.labels.numel() == self.batch
        # which nobody can tell apart where the advantages are those of sequences
        self.is_left_out = is_ambiguous and bool(self.of_tokens) and not self.names.isdisjoint(oracle.SEQUENCE_RATIO)
        self.tensors: dict[str, Any] = {}
        self.seen_by_sequences: dict[str, Any] = {}
        self.seen_by_tokens: dict[str, np.ndarray] = {}
        if not self.names.isdisjoint(oracle.KTO_LIKE):
            desirable = torch.rand(self.batch, generator=self.generator) < 0.5
            self.tensors["desirable"] = desirable.to(self.device)
            self.seen_by_sequences["desirable"] = desirable.numpy()
        for name, is_read in (("z0", "tensor" in self.fields_of("reference_point")), ("delta", "bco" in self.names)):
            if is_read:
                value = self.randn(1).to(self.pick(torch.float64, torch.float32))
                self.seen_by_sequences[name] = value.item()
                self.tensors[name] = value.reshape(self.pick((), (1,))).to(self.device) if name == "z0" else value[0]
                self.tensors[name] = self.tensors[name].to(self.device)
        if not self.names.isdisjoint(RATIOS):
            is_of_tokens = self.names.isdisjoint(oracle.SEQUENCE_RATIO) and (is_ambiguous or self.pick(True, False))
            advantages = to_numpy(self.randn(n if is_of_tokens else self.batch))
            advantages[self.weights_like(len(advantages)) == 0] = 0
            self.seen_by_sequences["advantages"] = advantages
            self.seen_by_tokens["advantages"] = advantages if is_of_tokens else advantages[sequences]
            given = torch.from_numpy(advantages).to(self.device)
            self.tensors["advantages"] = self.as_labels(advantages) if is_of_tokens else given
        if "items" in self.fields_of("normalizer"):
            self.num_items = self.pick(0.0, 0.5, float(self.random.randint(1, 50)))
            self.tensors["num_items"] = torch.tensor(self.num_items, device=self.device)
            self.seen_by_sequences["num_items"] = self.num_items
        else:
            self.num_items = None

        # weights of the losses
        self.weights = self.weights_of_tokens = None
        if self.random.random() < 0.4 and self.of_sequences:
            self.weights = self.weights_like(self.batch // 2 if self.is_paired else self.batch)
            self.weights_of_tokens = np.resize(self.weights, self.batch)[sequences]
            self.tensors["weights"] = torch.from_numpy(self.weights).to(self.device)
        elif self.random.random() < 0.4 and not self.of_sequences:
            if is_ambiguous or self.pick(True, False):
                self.weights_of_tokens = self.weights_like(n)
                self.tensors["weights"] = self.as_labels(self.weights_of_tokens, other=7.0)
            else:
                weights = self.weights_like(self.batch)
                self.weights_of_tokens = weights[sequences]
                self.tensors["weights"] = torch.from_numpy(weights).to(self.device)

        # weights of the tokens in their sequences' sums
        is_mixed = bool(self.of_sequences and self.of_tokens)
        is_counted = np.ones(n, dtype=bool)
        if self.needs_mask or (is_mixed and not self.is_weighted and self.random.random() < 0.3):
            is_counted = (torch.rand(n, generator=self.generator) < 0.6).numpy()
            self.tensors["completion_mask"] = self.as_labels(is_counted, other=0, dtype=torch.bool)
        self.counts = np.bincount(sequences[is_counted], minlength=self.batch)
        self.token_weights = is_counted.astype(float)
        if self.ld_alpha < 1:
            factors = oracle.shorter_lengths_factors(self.tokens, is_counted, self.batch, self.ld_alpha)
            self.token_weights = self.token_weights * factors
        if self.of_sequences and self.has_tokens and not self.is_weighted and self.random.random() < 0.3:
            given_weights = self.weights_like(n)
            self.token_weights = self.token_weights * given_weights
            self.options["token_weights"] = self.as_labels(given_weights)
        self.spoil(is_mixed)

    def spoil(self, is_mixed: bool) -> None:
        """Let rows of weight 0 hold NaN, for some calls: they take no part in the loss and in gradients.

        Not those of the twins, whose backward is autograd's own.
        """
        takes_part = np.ones(len(self.tokens.rows), dtype=bool)
        if self.random.random() < 0.5 and not self.is_twin:
            if self.weights_of_tokens is not None and not self.is_batchwise:
                takes_part &= self.weights_of_tokens != 0
            if not is_mixed and self.of_sequences and not self.is_weighted:
                takes_part &= self.token_weights != 0
        self.takes_part = takes_part
        self.unread[self.tokens.rows[~takes_part]] = True

    def fields_of(self, name: str) -> list[Any]:
        return [leaf.fields.get(name) for leaf in self.leaves]

    def make_old_logps(self, logps: np.ndarray) -> None:
        """Draw the log-probabilities of other policies, not far from this one's."""
        near = [logps + 0.3 * to_numpy(self.randn(len(logps))) for _ in range(2)]
        if "kl" in self.names or any(self.fields_of("kl_beta")):
            self.seen_by_tokens["ref_token_logps"] = near[0]
            self.tensors["ref_token_logps"] = self.as_labels(near[0])
        if self.names.isdisjoint(RATIOS) or self.on_policy:
            return
        self.seen_by_tokens["old_logps"] = near[1]
        sums = self.sums(near[1])
        self.seen_by_sequences["old_logps"] = sums
        is_ambiguous = self.offsets is not None and self.labels.numel() == self.batch
        needs_tokens = not self.names.isdisjoint(oracle.POLICY_GRADIENTS)
        if not self.has_tokens or (not needs_tokens and (is_ambiguous or self.pick(True, False))):
            self.tensors["old_logps"] = torch.from_numpy(sums).to(self.device)
        else:
            self.tensors["old_logps"] = self.as_labels(near[1])
            if is_ambiguous:  # or it would be read as one number per sequence
                self.tensors["old_logps"] = self.tensors["old_logps"].view(1, -1)

    # ---- the formulas -----------------------------------------------------------------------------------------------

    def losses_of_sequences(self, logps: np.ndarray, ref_logps: np.ndarray | None, squares: np.ndarray) -> np.ndarray:
        """Return the weighted sum of the sequence-level losses, [B] or [B/2] dual numbers."""
        size = self.batch // 2 if self.is_paired else self.batch
        total = np.zeros(size, dtype=complex)
        tensors = {**self.seen_by_sequences, "log_sum_squares": squares}
        for leaf in self.of_sequences:
            if leaf.factor == 0:
                continue
            losses = oracle.sequence_losses(leaf.name, leaf.fields, logps, self.counts, ref_logps, tensors)
            total += leaf.factor * (losses if len(losses) == size else losses.reshape(2, size).mean(0))
        return total if self.weights is None else np.where(self.weights == 0, 0.0, total * self.weights)

    def outcome(
        self, token_logps: np.ndarray, ref_logps: np.ndarray | None, squares: np.ndarray, incoming: np.ndarray
    ) -> Outcome:
        """Return losses and gradients of tokens' log-probabilities [n], where ``squares`` [n] are log sum p^2."""
        sequences, lengths = self.tokens.sequences, oracle.counts(self.tokens, self.batch)
        losses, grads = np.zeros(()), np.zeros(len(token_logps))
        losses_size, grads_size = np.zeros(()), np.zeros(len(token_logps))
        if self.of_sequences:
            means = oracle.sequence_sums(squares, self.tokens, self.batch, average=True)
            every, jacobian = oracle.with_gradients(
                lambda logps: self.losses_of_sequences(logps, ref_logps, means), self.sums(token_logps)
            )
            share = 1 / len(every) if self.reduction == "mean" else 1.0
            losses, losses_size = every * share, np.abs(every) * share
            if self.reduction != "none":
                losses, losses_size = losses.sum(), losses_size.sum()
            by_loss = np.broadcast_to(incoming * share, every.shape)
            grads = (by_loss @ jacobian)[sequences] * self.token_weights
            # sigma'(x) = sigma(x) (1 - sigma(x)) carries the rounding error of 1 - sigma(x), however small it is itself
            steepness = [
                leaf.factor * (1 + leaf.fields.get("beta", 1) + 1 / (leaf.fields.get("beta") or 1)) * 20
                for leaf in self.of_sequences
            ]
            weights = 1.0 if self.weights is None else self.weights
            rounded = np.abs(by_loss) @ np.abs(jacobian)
            rounded = rounded + sum(steepness) * np.resize(np.abs(by_loss) * weights, self.batch)
            grads_size = rounded[sequences] * self.token_weights
        for leaf in self.of_tokens:
            factors = (
                leaf.factor * oracle.token_factors(leaf.fields, lengths, self.reduction, self.num_items)[sequences]
            )
            if self.weights_of_tokens is not None:
                factors = factors * self.weights_of_tokens
            every = oracle.token_losses(leaf.name, leaf.fields, token_logps + 1j * oracle.STEP, self.seen_by_tokens)
            every = np.where(factors == 0, 0.0, every * factors)
            slopes = every.imag / oracle.STEP * incoming
            losses, losses_size = losses + every.real.sum(), losses_size + np.abs(every).sum()
            grads, grads_size = grads + slopes, grads_size + np.abs(slopes) + 20 * np.abs(factors * incoming)
        return Outcome(losses, grads, losses_size, grads_size)

    # ---- the comparison ---------------------------------------------------------------------------------------------

    def run_tokens(self) -> None:
        with splitting_groups_of(self.split_tokens):
            self.run_any()

    run_logps = run_tokens

    def run_any(self) -> None:
        """Make the call and compare its loss, its metrics and its gradients."""
        module = reference if self.is_twin else kto_fused
        call: Callable = getattr(module, self.function.removeprefix("fused_") if self.is_twin else self.function)
        may_be_none = not (self.of_tokens or self.is_batchwise)
        self.reduction = self.pick("mean", "mean", "sum", *["none"] * may_be_none)
        if self.function == "loss_from_logps":
            self.run_given_logps(call)
            return
        self.make_labels()
        self.options["reduction"], self.average = self.reduction, False
        self.make_tensors()
        if self.is_left_out:
            return
        from_hidden = self.function == "fused_linear_loss"
        policy = self.make_hidden(self.dtype) if from_hidden else self.make_logits(self.dtype)
        needed, arguments = list(policy.tensors), list(policy.tensors.values())[: 1 + from_hidden]
        if from_hidden:
            self.options["chunk_bytes"] = self.pick(1, 100, 3000, 2**13, 2**14, 2**16, 2**18, 2**30)
            self.options |= {"lm_head_bias": policy.tensors["bias"]} if "bias" in policy.tensors else {}
            needed = self.pick(needed, needed, ["hidden"], ["weight"], needed[1:], [])
        for name in needed:
            policy.tensors[name].requires_grad_()
        if not from_hidden and self.random.random() < 0.3:
            self.options["inplace_backward"] = True
            arguments = [arguments[0].clone(memory_format=torch.contiguous_format)]
        scored = self.score(policy)
        errors = ROUNDINGS * EPS[compute_dtype(self.dtype)] * scored.margin
        self.make_old_logps(scored.logps)
        ref_logps, ref_errors = None, np.zeros(self.batch)
        if self.has_reference:
            ref_logps, ref_errors = self.add_reference(policy, from_hidden, self.sums(scored.logps))
        loss, metrics = call(self.head, *arguments, self.labels, **self.options, **self.tensors)
        seen = scored
        if not self.is_twin and not self.takes_part.all():
            nowhere = np.where(self.takes_part, 0.0, math.nan)
            seen = scored._replace(
                **{name: getattr(scored, name) + nowhere for name in ("logps", "entropy", "mean_logit", "lead")}
            )
        self.check_tokens(metrics, seen, errors)
        self.check_sequences(metrics, self.sums(seen.logps), self.sums(errors))
        checked = self.check_any(loss, scored.logps, errors, ref_logps, ref_errors, scored.log_sum_squares)
        if checked is not None:
            self.check_gradients(loss, self.incoming, needed, policy, scored, errors, *checked)

    def run_given_logps(self, call: Callable) -> None:
        """Run the loss on the log-probabilities of sequences, or of tokens if it reads tokens."""
        if self.has_tokens:
            self.ignore_indices, self.shifts = (-100,), (True, False)
            self.make_labels()
            self.labels = self.labels if self.offsets is None else self.labels.flatten()
            self.options = {name: self.options[name] for name in ("backend", "cu_seqlens") if name in self.options}
            if self.shift:
                self.options["labels"] = self.labels
            else:
                self.options["mask"] = self.labels != -100
        else:  # one "token" for each sequence
            index = np.arange(self.batch)
            self.tokens, self.offsets = oracle.Tokens(index, index, index), None
            self.labels, self.shift, self.unread = torch.zeros(self.batch), False, torch.zeros(self.batch).bool()
        self.average, self.options["reduction"] = False, self.reduction
        self.make_tensors()
        if self.is_left_out:
            return
        n = len(self.tokens.rows)
        scale = self.pick(1.0, 3.0) if self.is_tame else self.pick(1.0, 30.0, 1000.0)
        logps = to_numpy((-self.randn(n).abs() * scale).to(self.dtype))
        squares = -2 * np.abs(to_numpy(self.randn(n)))
        self.make_old_logps(logps)
        if not self.has_tokens:
            self.counts = np.array([self.random.randint(0, 9) for _ in range(self.batch)])
            self.options["token_counts"] = torch.from_numpy(self.counts).to(self.device)
            if self.is_weighted:
                self.tensors["log_sum_squares"] = torch.from_numpy(squares).to(self.device)
        given = torch.full((self.labels.numel(),), math.nan, dtype=self.dtype)
        rows = self.tokens.rows[self.takes_part]  # of weight 0: NaN
        given[rows] = torch.from_numpy(logps[self.takes_part]).to(self.dtype)
        given = given.view(self.labels.shape).to(self.device).requires_grad_()
        ref_logps = None
        if self.has_reference:
            ref_logps = self.sums(logps) + to_numpy(self.randn(self.batch)) * self.pick(0.0, 1.0, 10.0)
            self.options["ref_logps"] = torch.from_numpy(ref_logps).to(self.device)
        loss, metrics = call(self.head, given, **self.options, **self.tensors)
        nowhere = np.where(self.takes_part, 0.0, math.nan)
        errors = EPS[compute_dtype(self.dtype)] * np.abs(logps)  # of their products with token weights
        self.check_sequences(metrics, self.sums(logps + nowhere), self.sums(errors))
        checked = self.check_any(loss, logps, errors, ref_logps, np.zeros(self.batch), squares)
        if checked is None:
            return
        (grad,) = torch.autograd.grad(loss, given, self.incoming)
        want, off = np.zeros(self.labels.numel()), np.full(self.labels.numel(), SMALLEST[self.dtype])
        want[self.tokens.rows] = checked[0]
        off[self.tokens.rows] += checked[1] + STORED * EPS[self.dtype] * np.abs(checked[0])
        self.compare("grad of policy_logps", grad.flatten(), want, off)

    def check_any(
        self,
        loss: torch.Tensor,
        logps: np.ndarray,
        errors: np.ndarray,
        ref_logps: np.ndarray | None,
        ref_errors: np.ndarray,
        squares: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Compare a loss with the oracle. Returns the gradients by the tokens' log-probabilities and their tolerances;
        None for a loss or a gradient that exceeds what the dtypes hold.

        ``errors`` [n] and ``ref_errors`` [B] bound the errors of the log-probabilities. A result may be off by what it
        moves, times 3, when all of them move within their errors, in fixed and in random directions.
        """
        size = (self.batch // 2 if self.is_paired else self.batch) if self.reduction == "none" else 1
        incoming = self.randn(size).to(loss.dtype)
        self.incoming = incoming.view(loss.shape).to(loss.device)
        of_losses = to_numpy(incoming) if self.reduction == "none" else to_numpy(incoming)[0]
        want = self.outcome(logps, ref_logps, squares, of_losses)
        tiny = EPS[torch.float64] * ROUNDINGS
        apart = errors + tiny * (1 + np.abs(logps))
        ref_apart = None if ref_logps is None else ref_errors + tiny * (1 + np.abs(ref_logps))
        loss_off, grad_off = np.zeros(want.losses.shape), np.zeros(len(logps))
        first = np.resize([1.0], self.batch)
        half = np.where(np.arange(self.batch) < self.batch // 2, 1.0, -1.0)
        rng = np.random.default_rng(self.random.randrange(2**32))
        signs = [first, -first, half, -half, *rng.choice([-1.0, 1.0], (6, self.batch))]
        for sign in signs:
            near = self.outcome(
                np.minimum(logps + sign[self.tokens.sequences] * apart, 0.0),
                None if ref_logps is None else ref_logps + rng.choice([-1.0, 1.0], self.batch) * ref_apart,
                squares + rng.choice([-1.0, 1.0]) * 4 * errors,
                of_losses,
            )
            moved = [3 * np.abs(near.losses - want.losses), 3 * np.abs(near.grads - want.grads)]
            loss_off, grad_off = map(np.fmax, (loss_off, grad_off), [np.where(np.isnan(x), np.inf, x) for x in moved])
        largest = np.abs([*want.losses.flatten(), *want.grads]).max(initial=0.0)
        if not largest < (1e3 if self.dtype == torch.float16 else 1e30):
            return None
        self.is_compared = True
        eps = EPS[loss.dtype]
        rounded = (STORED * eps + 64 * EPS[torch.float64]) * want.losses_size
        self.compare("loss", loss, want.losses, loss_off + rounded + SMALLEST[loss.dtype])
        # the gradients of a mix of both levels are added up in the compute dtype
        added_up = want.grads_size if self.of_tokens and self.of_sequences else np.abs(want.grads)
        rounded = STORED * EPS[compute_dtype(self.dtype)] * added_up + 64 * EPS[torch.float64] * want.grads_size
        return want.grads, grad_off + rounded

    def __str__(self) -> str:
        twin = "twin of " * self.is_twin
        return f"{twin}{self.head!r} {super().__str__()} {sorted(self.tensors)}"


class NothingTrained(AnyLoss):
    """A batch without completion tokens."""

    empty_share = 1.0


@contextmanager
def splitting_groups_of(num_tokens: int) -> Iterator[None]:
    """Split groups of so many tokens into several chunks, instead of a second visit."""
    before, plan.SPLIT_TOKENS = plan.SPLIT_TOKENS, num_tokens
    try:
        yield
    finally:
        plan.SPLIT_TOKENS = before


def test_the_formulas_are_those_of_every_registered_loss():
    ours = {name for name in heads.names() if class_of(name).__module__.startswith("kto_fused.")}
    assert ours == set(HEADS)


def test_a_batch_without_tokens_has_the_loss_of_empty_completions_and_no_gradient():
    """It is finite for every loss: 0 of tokens, and what the formula gives for L = 0 of sequences."""
    for seed in range(len(HEADS)):
        case = NothingTrained(seed)
        case.has_tokens, case.function = True, case.pick("fused_loss", "fused_linear_loss")
        case.run()
        assert not case.mismatches, f"seed {seed}: {case.mismatches}: {case}"
        assert case.is_compared or case.is_left_out, f"seed {seed}: the loss is not finite: {case}"


def make(seed: int) -> Fuzz:
    """Return the case of a seed: a third of them are of KTO, DPO and log-probabilities."""
    return (Fuzz if seed // GROUPS % 3 == 0 else AnyLoss)(seed)


@pytest.mark.parametrize("group", range(GROUPS))
def test_random_calls_agree_with_the_formulas(group, full):
    wrong = []
    for seed in range(group, CASES if full else SLICE, GROUPS):
        case = make(seed).run()
        if case.mismatches:
            wrong.append(f"seed {seed}: {'; '.join(case.mismatches)}: {case}")
    assert not wrong, "\n".join(wrong)
