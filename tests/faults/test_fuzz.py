"""Random calls of every loss and log-probability function agree with `loss_oracle`: values, metrics and gradients.

A case is made from its seed alone, so that a failure can be repeated.
"""

import math
import random
from typing import Any, NamedTuple

import loss_oracle as oracle
import numpy as np
import pytest
import torch
from devices import ENGINES

import kto_fused

# the number of cases with and without --full, and the number of tests that share them
CASES, SLICE, GROUPS = 3000, 200, 10

# EPS is the distance from 1 to the next number. A result may be off by `ROUNDINGS` eps of the dtype that it is computed
# in, relative to the numbers that it is computed from, and by `STORED` eps of the dtype that it is stored in.
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SMALLEST = {torch.float64: 1e-300, torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 2.0**-24}
ROUNDINGS, STORED = 8, 3

FROM_LOGITS = ("fused_kto_loss", "fused_dpo_loss", "sequence_logps", "token_logps")
FROM_HIDDEN = ("fused_linear_kto_loss", "fused_linear_dpo_loss", "linear_sequence_logps", "linear_token_logps")
FROM_LOGPS = ("kto_loss_from_logps", "dpo_loss_from_logps")
FUNCTIONS = (*FROM_LOGITS[:2], *FROM_HIDDEN[:2], *FROM_LOGITS, *FROM_HIDDEN, *FROM_LOGPS)
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
    """One random call, made from its seed alone."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.backend, self.device = self.random.choice([ENGINES[0], ENGINES[0], ENGINES[1]])
        self.function = self.random.choice(FUNCTIONS)
        self.dtype = self.random.choice(list(EPS))
        self.is_dpo, self.is_loss = "dpo" in self.function, "loss" in self.function
        self.batch = self.random.choice([2, 2, 4, 6]) if self.is_dpo else self.random.randint(1, 5)
        self.options: dict[str, Any] = {"backend": self.backend}
        self.worst = 0.0
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
        ignore_index = self.pick(-100, -100, -100, -1, 0)
        self.shift, self.average = self.pick(True, True, False), self.pick(False, False, True)
        labels = torch.randint(self.vocab, (self.batch, seq_len), generator=self.generator)
        nothing = self.random.random() < 0.05
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
        dtypes = [torch.int64, torch.int64, torch.int32] + [torch.int16, torch.int8] * (self.vocab < 128)
        labels = labels if self.pick(True, False) else labels.reshape(self.rows_shape)
        self.labels = labels.to(self.device, self.pick(*dtypes))
        self.options |= {"ignore_index": ignore_index, "shift": self.shift}
        if "token_logps" not in self.function:
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
        values = self.randn(num_rows, self.vocab) * self.pick(0.1, 3.0, 3.0, 30.0)
        extreme = self.pick("none", "none", "large", "banned")
        if extreme == "large":
            where = torch.rand(values.shape, generator=self.generator) < 0.1
            values[where] = 1e4 * values[where].sign()
        elif extreme == "banned":  # forbidden tokens have logit -inf, but never the targets
            where = torch.rand(values.shape, generator=self.generator) < 0.3
            where[self.tokens.rows, self.tokens.targets] = False
            values[where] = -math.inf
        logits = self.strided(values.view(*self.rows_shape, self.vocab), last_too=False, dtype=dtype)
        seen = to_numpy(logits).reshape(num_rows, self.vocab)
        return Source({"logits": logits}, seen, np.zeros(num_rows))

    def make_hidden(self, dtype: torch.dtype, head: Source | None = None) -> Source:
        """Draw hidden states, with the LM head of `head` or with a new one."""
        num_rows = math.prod(self.rows_shape)
        hidden_size = head.tensors["weight"].shape[1] if head else self.pick(1, 2, 3, 8, 16, 33)
        hidden = self.randn(num_rows, hidden_size) * self.pick(0.3, 1.0, 1.0, 20.0)
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
        x, w = to_numpy(hidden).reshape(num_rows, hidden_size), to_numpy(weight)
        b = np.zeros(self.vocab) if bias is None else to_numpy(bias)
        return Source(tensors, x @ w.T + b, (np.abs(x) @ np.abs(w).T + np.abs(b)).max(1))

    def score(self, source: Source) -> oracle.Scored:
        rows = self.tokens.rows
        return oracle.score(source.logits[rows], self.tokens.targets, size=source.size[rows], **self.transform)

    def sums(self, values: np.ndarray) -> np.ndarray:
        return oracle.sequence_sums(values, self.tokens, self.batch, self.average)

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
        x = to_numpy(hidden).reshape(num_rows, weight.shape[1])[rows]
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


@pytest.mark.parametrize("group", range(GROUPS))
def test_random_calls_agree_with_the_formulas(group, full):
    wrong = []
    for seed in range(group, CASES if full else SLICE, GROUPS):
        case = Fuzz(seed).run()
        if case.mismatches:
            wrong.append(f"seed {seed}: {'; '.join(case.mismatches)}: {case}")
    assert not wrong, "\n".join(wrong)
