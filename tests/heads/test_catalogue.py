"""Every registered loss: against its formula by hand, against TRL's code, through every function, and at extremes."""

import inspect
import math
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import assert_close, chunks_of, make_case, make_hidden_case
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

import kto_fused
from kto_fused import (
    fused_linear_loss,
    fused_loss,
    heads,
    kto_reference_point,
    loss_from_logps,
    reference,
    sequence_logps,
)
from kto_fused.engines.logits import sums_over_labels

exp, log, tanh = math.exp, math.log, math.tanh


# ---- the formulas by hand -------------------------------------------------------------------------------------------


def sigma(x: float) -> float:
    return (1 + tanh(x / 2)) / 2


def cost(x: float) -> float:
    """-log sigma(x)"""
    return max(-x, 0) + math.log1p(exp(-abs(x)))


def smoothed(x: float, s: float) -> float:
    return (1 - s) * cost(x) + s * cost(-x)


def of_pairs(formula):
    """Let a formula of one pair's log-probabilities, lengths and reference (chosen, rejected) take a batch."""

    def of_batch(logps, counts, ref_logps, **_):
        pairs = len(logps) // 2
        return [
            formula(*(x for values in (logps, counts, ref_logps) for x in (values[i], values[i + pairs])))
            for i in range(pairs)
        ]

    return of_batch


def of_differences(formula):
    """Let a formula of h = r_w - r_l take a batch."""
    return of_pairs(lambda c, r, nw, nl, rw, rl: formula((c - rw) - (r - rl)))


def of_ratios(formula):
    """Let a formula of r_w, r_l take a batch."""
    return of_pairs(lambda c, r, nw, nl, rw, rl: formula(c - rw, r - rl))


def of_averages(formula):
    """Let a formula of L_w / n_w, L_l / n_l take a batch."""
    return of_pairs(lambda c, r, nw, nl, rw, rl: formula(c / nw, r / nl))


def of_completions(formula):
    """Let a formula of a sign, a class weight and a log-ratio take a batch."""

    def of_batch(logps, counts, ref_logps, desirable, **numbers):
        return [
            formula(1 if good else -1, 1.5 if good else 0.5, policy - ref, **numbers)
            for policy, ref, good in zip(logps, ref_logps, desirable, strict=True)
        ]

    return of_batch


def kto_around_the_mean(logps, counts, ref_logps, desirable, z0=None):
    z0 = sum(logps) / len(logps) - sum(ref_logps) / len(ref_logps) if z0 is None else z0
    return of_completions(lambda e, w, r: w * (1 - sigma(e * 0.3 * (r - z0))))(logps, counts, ref_logps, desirable)


def chosen_nll(logps, counts) -> float:
    pairs = len(logps) // 2
    return -sum(logps[:pairs]) / sum(counts[:pairs])


def with_nll(weight, formula):
    """Add ``weight`` times the negative log-likelihood per chosen token to each pair's loss."""

    def of_batch(logps, counts, ref_logps):
        nll = weight * chosen_nll(logps, counts)
        return [loss + nll for loss in formula(logps, counts, ref_logps)]

    return of_batch


def log_odds(a: float) -> float:
    return log(exp(a) / (1 - exp(a)))


def sorted_differences(logps, counts, ref_logps):
    pairs = len(logps) // 2
    policy = sorted(c - r for c, r in zip(logps[:pairs], logps[pairs:], strict=True))
    ref = sorted(c - r for c, r in zip(ref_logps[:pairs], ref_logps[pairs:], strict=True))
    return [smoothed(0.3 * (p - r), 0.1) for p, r in zip(policy, ref, strict=True)]


def sorted_sides(logps, counts, ref_logps):
    ratios = [policy - ref for policy, ref in zip(logps, ref_logps, strict=True)]
    pairs = len(ratios) // 2
    sides = zip(sorted(ratios[:pairs]), sorted(ratios[pairs:]), strict=True)
    return [smoothed(0.3 * (c - r), 0.1) for c, r in sides]


def alpha_score(r: float) -> float:
    return (exp((0.3 - 1) * r) - 1) / (0.3 - 1)


def js_score(r: float) -> float:
    return log(2 * exp(r) / (1 + exp(r)))


def power(p: float) -> float:
    """AlphaPO's reward at alpha = 0.7, of a geometric mean probability."""
    return (1 - p**-0.7) / 0.7


def gspo(weight, delta=math.inf):
    """GSPO with a clip of (0.3, 0.2); ``weight`` of a sequence's length, the batch's tokens and number of sequences."""

    def of_batch(logps, counts, ref_logps, old_logps, advantages, **numbers):
        losses = []
        for policy, old, n, advantage in zip(logps, old_logps, counts, advantages, strict=True):
            ratio = exp((policy - old) / n)
            clipped = min(max(ratio, 0.7), 1.2)
            factor = weight(n, numbers.get("num_items", sum(counts)), len(counts))
            losses.append(-factor * min(min(ratio, delta) * advantage, clipped * advantage))
        return losses

    return of_batch


def vespo(weight):
    """VESPO; ``weight`` of a sequence's length, the batch's tokens and number of sequences."""

    def of_batch(logps, counts, ref_logps, old_logps, advantages, **numbers):
        losses = []
        for policy, old, n, advantage in zip(logps, old_logps, counts, advantages, strict=True):
            k, rate = (1.5, 2.5) if advantage >= 0 else (3.0, 2.0)
            ratio = exp(policy - old)
            phi = ratio**k * exp(rate * (1 - ratio))
            factor = weight(n, numbers.get("num_items", sum(counts)), len(counts)) / n
            losses.append(-factor * phi * advantage * policy)
        return losses

    return of_batch


CLIP = {"clip": (0.3, 0.2)}
CLASSES = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
SMOOTH = {"beta": 0.3, "label_smoothing": 0.1}
# (name, fields, formula of a batch), each loss with every option that changes its formula
FORMULAS = {
    "sigmoid": ("sigmoid", {"beta": 0.3}, of_differences(lambda h: cost(0.3 * h))),
    "sigmoid, smoothed": ("sigmoid", SMOOTH, of_differences(lambda h: smoothed(0.3 * h, 0.1))),
    "sigmoid, forward KL": (
        "sigmoid",
        {"beta": 0.3, "f_divergence_type": "forward_kl"},
        of_ratios(lambda c, r: cost(0.3 * (exp(-r) - exp(-c)))),
    ),
    "sigmoid, Jensen-Shannon": (
        "sigmoid",
        {"beta": 0.3, "f_divergence_type": "js_divergence"},
        of_ratios(lambda c, r: cost(0.3 * (js_score(c) - js_score(r)))),
    ),
    "sigmoid, alpha": (
        "sigmoid",
        {"beta": 0.3, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        of_ratios(lambda c, r: cost(0.3 * (alpha_score(c) - alpha_score(r)))),
    ),
    "sigmoid, alpha 1": (
        "sigmoid",
        {"beta": 0.3, "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        of_differences(lambda h: cost(0.3 * h)),
    ),
    "robust": (
        "robust",
        SMOOTH,
        of_differences(lambda h: (0.9 * cost(0.3 * h) - 0.1 * cost(-0.3 * h)) / 0.8),
    ),
    "robust, certain": ("robust", {"beta": 0.3}, of_differences(lambda h: cost(0.3 * h))),
    "hinge": ("hinge", {"beta": 0.3}, of_differences(lambda h: max(0, 1 - 0.3 * h))),
    "ipo": (
        "ipo",
        {"beta": 0.3},
        of_pairs(lambda c, r, nw, nl, rw, rl: ((c - rw) / nw - (r - rl) / nl - 1 / 0.6) ** 2),
    ),
    "ipo, Jensen-Shannon": (
        "ipo",
        {"beta": 0.3, "f_divergence_type": "js_divergence"},
        of_pairs(lambda c, r, nw, nl, rw, rl: (js_score(c - rw) / nw - js_score(r - rl) / nl - 1 / 0.6) ** 2),
    ),
    "sigmoid_norm": (
        "sigmoid_norm",
        {"beta": 0.3},
        of_pairs(lambda c, r, nw, nl, rw, rl: cost(0.3 * ((c - rw) / nw - (r - rl) / nl))),
    ),
    "exo_pair": (
        "exo_pair",
        SMOOTH,
        of_differences(
            lambda h: (
                sigma(0.3 * h) * (log(sigma(0.3 * h)) - log(0.9))
                + (1 - sigma(0.3 * h)) * (log(1 - sigma(0.3 * h)) - log(0.1))
            )
        ),
    ),
    "nca_pair": (
        "nca_pair",
        {"beta": 0.3},
        of_ratios(lambda c, r: cost(0.3 * c) + 0.5 * cost(-0.3 * c) + 0.5 * cost(-0.3 * r)),
    ),
    "bco_pair": ("bco_pair", {"beta": 0.3}, of_ratios(lambda c, r: cost(0.3 * c) + cost(-0.3 * r))),
    "sppo_hard": ("sppo_hard", {"beta": 0.3}, of_ratios(lambda c, r: (c - 1 / 0.6) ** 2 + (r + 1 / 0.6) ** 2)),
    "apo_zero": ("apo_zero", {"beta": 0.3}, of_ratios(lambda c, r: 1 - sigma(0.3 * c) + sigma(0.3 * r))),
    "apo_down": ("apo_down", {"beta": 0.3}, of_ratios(lambda c, r: sigma(0.3 * c) + 1 - sigma(0.3 * (c - r)))),
    "discopop": (
        "discopop",
        {"beta": 0.3, "discopop_tau": 0.5},
        of_differences(lambda h: (1 - sigma(0.3 * h / 0.5)) * cost(0.3 * h) + sigma(0.3 * h / 0.5) * exp(-0.3 * h)),
    ),
    "aot": ("aot", SMOOTH, sorted_differences),
    "aot_unpaired": ("aot_unpaired", SMOOTH, sorted_sides),
    "sft": ("sft", {}, with_nll(1, of_pairs(lambda *_: 0.0))),
    "simpo": (
        "simpo",
        {"beta": 2.5, "gamma": 0.4, "label_smoothing": 0.1},
        of_averages(lambda c, r: smoothed(2.5 * (c - r) - 0.4, 0.1)),
    ),
    "alphapo": (
        "alphapo",
        {"beta": 2.5, "gamma": 0.4, "alpha": 0.7},
        of_averages(lambda c, r: cost(2.5 * (power(exp(c)) - power(exp(r))) - 0.4)),
    ),
    "alphapo, alpha 0": (
        "alphapo",
        {"beta": 2.5, "gamma": 0.4, "alpha": 0.0},
        of_averages(lambda c, r: cost(2.5 * (c - r) - 0.4)),
    ),
    "cpo": (
        "cpo",
        {**SMOOTH, "cpo_alpha": 0.7},
        with_nll(0.7, of_pairs(lambda c, r, *_: smoothed(0.3 * (c - r), 0.1))),
    ),
    "cpo, hinge": (
        "cpo",
        {"beta": 0.3, "loss_type": "hinge", "cpo_alpha": 0.0},
        of_pairs(lambda c, r, *_: max(0, 1 - 0.3 * (c - r))),
    ),
    "cpo, ipo": (
        "cpo",
        {"beta": 0.3, "loss_type": "ipo"},
        with_nll(1, of_averages(lambda c, r: (c - r - 1 / 0.6) ** 2)),
    ),
    "odds_ratio": ("odds_ratio", {}, of_averages(lambda c, r: cost(log_odds(c) - log_odds(r)))),
    "orpo": ("orpo", {"beta": 0.3}, with_nll(1, of_averages(lambda c, r: 0.3 * cost(log_odds(c) - log_odds(r))))),
    "kto": ("kto", CLASSES, kto_around_the_mean),
    "kto, a number": (
        "kto",
        {**CLASSES, "reference_point": 0.4},
        of_completions(lambda e, w, r: w * (1 - sigma(e * 0.3 * (r - 0.4)))),
    ),
    "kto, a tensor": ("kto", {**CLASSES, "reference_point": "tensor"}, kto_around_the_mean),
    "kto_squared": (
        "kto_squared",
        {**CLASSES, "reference_point": 0.4},
        of_completions(lambda e, w, r: w * (1 - sigma(e * 0.3 * (r - 0.4))) ** 2),
    ),
    "apo_zero_unpaired": (
        "apo_zero_unpaired",
        CLASSES,
        of_completions(lambda e, w, r: w * (1 - sigma(e * 0.3 * r))),
    ),
    "bco": ("bco", CLASSES, of_completions(lambda e, w, r, delta: w * cost(e * (0.3 * r - delta)))),
    "gspo": ("gspo", CLIP, gspo(lambda *_: 1)),
    "gspo, two-sided": ("gspo", {**CLIP, "delta": 1.5}, gspo(lambda *_: 1, delta=1.5)),
    "gspo, tokens": ("gspo", {**CLIP, "normalizer": "tokens"}, gspo(lambda n, tokens, size: n * size / tokens)),
    "gspo, items": ("gspo", {**CLIP, "normalizer": "items"}, gspo(lambda n, tokens, size: n * size / tokens)),
    "gspo, constant": ("gspo", {**CLIP, "normalizer": "constant", "max_tokens": 7}, gspo(lambda n, *_: n / 7)),
    "vespo": ("vespo", {"k_pos": 1.5, "lambda_pos": 2.5}, vespo(lambda n, tokens, size: n * size / tokens)),
    "vespo, items": (
        "vespo",
        {"k_pos": 1.5, "lambda_pos": 2.5, "normalizer": "items"},
        vespo(lambda n, tokens, size: n * size / tokens),
    ),
}
# formulas with a part that has no gradient: KTO's reference point, VESPO's phi
DETACHED = ("kto", "vespo", "vespo, items")
# losses of token log-probabilities have tests of their own
SEQUENCE_LOSSES = [name for name in heads.names() if heads.protocol._CLASSES[name].level == "sequence"]
OURS = [name for name in SEQUENCE_LOSSES if heads.protocol._CLASSES[name].__module__.startswith("kto_fused.")]


def inputs(pairs: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Log-probabilities of sequences, of a reference and lengths, all in float64."""
    random = torch.Generator().manual_seed(seed)
    counts = torch.randint(2, 9, (2 * pairs,), generator=random)
    per_token = -0.3 - torch.rand(2 * pairs, generator=random, dtype=torch.float64)
    ref_logps = per_token * counts + torch.randn(2 * pairs, generator=random, dtype=torch.float64)
    return {"logps": per_token * counts, "counts": counts, "ref_logps": ref_logps}


def tensors_of(name: str, num_sequences: int, fields: dict, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The tensors that the loss needs beside log-probabilities."""
    made = {}
    known = heads.protocol._CLASSES[name].tensor_names()
    if "desirable" in known:
        made["desirable"] = torch.arange(num_sequences, device=device) % 3 != 0
    if "delta" in known:
        made["delta"] = torch.tensor(0.2, dtype=torch.float64, device=device)
    if "old_logps" in known:
        made["old_logps"] = torch.linspace(-5, -1, num_sequences, dtype=torch.float64, device=device)
        made["advantages"] = torch.linspace(-1, 1.5, num_sequences, dtype=torch.float64, device=device)
    if fields.get("normalizer") == "items":
        made["num_items"] = torch.tensor(45.0, dtype=torch.float64, device=device)
    if fields.get("reference_point") == "tensor":
        made["z0"] = torch.tensor(0.15, dtype=torch.float64, device=device)
    return made


def plain(tensors: dict[str, torch.Tensor]) -> dict[str, object]:
    return {name: value.tolist() for name, value in tensors.items()}


def test_every_loss_has_a_formula_here():
    assert {name for name, *_ in FORMULAS.values()} == set(OURS)


@pytest.mark.parametrize("case", FORMULAS)
def test_a_loss_is_its_formula(case):
    """Value and gradient; the gradient by central differences of the formula in Python's own numbers."""
    name, fields, formula = FORMULAS[case]
    given = inputs()
    head, logps = heads.make(name, **fields), given["logps"].clone().requires_grad_()
    ref_logps = given["ref_logps"] if head.needs_reference else None
    tensors = tensors_of(name, 6, fields)
    total, _ = loss_from_logps(head, logps, ref_logps, token_counts=given["counts"], reduction="sum", **tensors)
    total.backward()

    def value(logps: list[float]) -> float:
        return sum(formula(logps, given["counts"].tolist(), given["ref_logps"].tolist(), **plain(tensors)))

    at = given["logps"].tolist()
    assert total.item() == pytest.approx(value(at), rel=1e-12)
    if case in DETACHED:
        return  # no gradient passes through a part that differences of the formula here move too
    step = 1e-5
    for i, grad in enumerate(logps.grad.tolist()):
        above, below = ([x + (i == j) * shift for j, x in enumerate(at)] for shift in (step, -step))
        assert grad == pytest.approx((value(above) - value(below)) / (2 * step), rel=1e-6, abs=1e-9)


def test_no_gradient_passes_through_the_batchs_mean_log_ratio():
    given, tensors = inputs(), tensors_of("kto", 6, {})
    mean = (given["logps"] - given["ref_logps"]).mean()
    grads = []
    for head in (heads.make("kto"), heads.make("kto", reference_point=mean.item())):
        logps = given["logps"].clone().requires_grad_()
        loss_from_logps(head, logps, given["ref_logps"], **tensors)[0].backward()
        grads.append(logps.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("case", [case for case in FORMULAS if case not in DETACHED])
def test_gradients_agree_with_finite_differences(case):
    name, fields, _ = FORMULAS[case]
    given, head = inputs(seed=1), heads.make(name, **fields)
    ref_logps, tensors = given["ref_logps"] if head.needs_reference else None, tensors_of(name, 6, fields)
    for reduction in ("mean", "sum") if head.group is None else ("mean", "none"):

        def loss(logps, reduction=reduction):
            counts = given["counts"]
            return loss_from_logps(head, logps, ref_logps, token_counts=counts, reduction=reduction, **tensors)[0]

        assert gradcheck(loss, (given["logps"].clone().requires_grad_(),))


# ---- TRL 1.16 -------------------------------------------------------------------------------------------------------

ONE_PROCESS = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


def trl_batch(given: dict[str, torch.Tensor]) -> tuple[SimpleNamespace, dict[str, torch.Tensor]]:
    """Return what TRL's trainers get for these log-probabilities: a model's outputs and a batch.

    Each completion token has an equal share of its sequence's log-probability. The first position is a prompt.
    """
    counts = given["counts"]
    mask = (torch.arange(counts.max() + 1) <= counts[:, None]) & (torch.arange(counts.max() + 1) > 0)
    log_probs = (mask * (given["logps"] / counts)[:, None])[:, 1:]
    zeros = torch.zeros_like(log_probs)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    if "log_sum_squares" in given:  # of each sequence, as if equal for its tokens
        outputs.log_sum_sq_probs = given["log_sum_squares"][:, None].expand_as(log_probs)
    batch = {"input_ids": mask.long(), "attention_mask": torch.ones_like(mask), "completion_mask": mask.long()}
    return outputs, batch


def trl_dpo_loss(given, loss_type, beta=0.1, **options):
    from trl import DPOTrainer

    outputs, batch = trl_batch(given)
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = given["ref_logps"].chunk(2)
    options = {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "label_smoothing": 0.0, **options}
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=ONE_PROCESS,
        args=SimpleNamespace(discopop_tau=options.pop("discopop_tau", 0.05)),
        beta=beta,
        loss_types=[loss_type],
        loss_weights=[1.0],
        ld_alpha=None,
        use_weighting="log_sum_squares" in given,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **options,
    )
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, batch, False)


def token_batch(seed: int = 7) -> dict[str, torch.Tensor]:
    """Logits of six sequences of a prompt, a completion and padding, in float64."""
    random = torch.Generator().manual_seed(seed)
    position = torch.arange(10)
    starts, lengths = torch.tensor([2, 1, 3, 2, 3, 1]), torch.tensor([7, 3, 4, 5, 6, 4])
    ends = (starts + lengths)[:, None]
    ids = torch.randint(13, (6, 10), generator=random)
    completion = (position >= starts[:, None]) & (position < ends)
    return {
        "ids": ids,
        "attention": position < ends,
        "completion": completion,
        "labels": ids.masked_fill(~completion, -100),
        "logits": torch.randn(6, 10, 13, generator=random, dtype=torch.float64),
        "ref_logits": torch.randn(6, 10, 13, generator=random, dtype=torch.float64),
    }


def trl_ld_loss(given, logits, loss_types, loss_weights, ld_alpha):
    """The loss of TRL's DPO trainer with a policy and a reference model of these logits."""
    from trl import DPOTrainer

    def outputs_of(logits):
        log_probs = reference.token_logps(logits, given["labels"])[:, :-1]
        zeros = torch.zeros_like(log_probs)
        return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    mask = given["completion"].long()
    batch = {"input_ids": given["ids"], "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    model = torch.nn.Identity()
    model.is_gradient_checkpointing = False
    trainer = SimpleNamespace(
        model=model,
        ref_model=lambda **_: outputs_of(given["ref_logits"]),
        accelerator=ONE_PROCESS,
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None),
        beta=0.3,
        loss_types=loss_types,
        loss_weights=loss_weights,
        ld_alpha=ld_alpha,
        use_weighting=False,
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5,
        label_smoothing=0.2,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs_of(logits), batch, False)


DIVERGENCES = [{"f_divergence_type": name} for name in ("forward_kl", "js_divergence", "alpha_divergence")]
SCORED = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
# in float32: TRL's alpha divergence knows no wider type. Label smoothing is left out for sigmoid: TRL's has none
TRL_PAIRS = [
    *(("sigmoid", {}), ("hinge", {}), ("ipo", {}), ("nca_pair", {}), ("bco_pair", {}), ("sppo_hard", {})),
    *(("apo_zero", {}), ("apo_down", {}), ("discopop", {}), ("sft", {}), ("sigmoid_norm", {})),
    *((name, {"label_smoothing": 0.2}) for name in ("exo_pair", "robust", "aot", "aot_unpaired")),
    ("discopop", {"discopop_tau": 0.3}),
    *((name, divergence) for name in SCORED for divergence in DIVERGENCES),
    ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}),
]


def trl_losses() -> dict[str, set[str]]:
    """The losses of TRL's trainers by the names of their options, from TRL's own messages and sources."""
    from trl import GRPOTrainer, KTOTrainer, SFTTrainer
    from trl.experimental.cpo import CPOConfig

    with pytest.raises(ValueError, match="Unknown loss type") as error:
        trl_dpo_loss(inputs(), "no loss")
    compared = r"loss_type (?:==|(?:not )?in) (.*)"
    found = {
        "DPO": str(error.value).partition("[")[2],
        "KTO": " ".join(re.findall(compared, inspect.getsource(KTOTrainer._compute_loss))),
        "CPO": " ".join(re.findall(r'- (`"\w+"`):', CPOConfig.__doc__)),
        "SFT": " ".join(re.findall(compared, inspect.getsource(SFTTrainer.__init__))),
        "GRPO": " ".join(re.findall(compared, inspect.getsource(GRPOTrainer._compute_loss))),
    }
    return {trainer: set(re.findall(r"""['"](\w+)['"]""", text)) for trainer, text in found.items()}


def test_no_loss_of_trl_is_missing():
    """But those that the page of losses names as missing. The page's column of TRL's names lists what TRL has."""
    pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with")
    theirs = trl_losses()
    assert theirs["DPO"] == {name for name, _ in TRL_PAIRS}
    assert min(map(len, theirs.values())) >= 2
    of_cpo = {name for name in theirs["CPO"] if name in TRL_CPO}
    assert of_cpo == theirs["CPO"]
    missing = set().union(*theirs.values(), {"cpo", "orpo"}) - {*heads.names(), *of_cpo}
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")
    assert missing == {"luspo"}
    assert all(f"`{name}`" in page for name in missing)
    for name, trainer in re.findall(r"^\| `(\w+)` \|.*\| (?:`(\w+)Config.*`|-) \|$", page, re.MULTILINE):
        has = {kind for kind, losses in theirs.items() if name in losses}
        expected = {"cpo": {"CPO"}, "orpo": {"ORPO"}, "gspo": {"GRPO"}}.get(name, has)
        assert expected == ({trainer} if trainer else set()) or trainer in expected, name


@pytest.mark.parametrize(("name", "options"), TRL_PAIRS, ids=str)
def test_a_pair_loss_is_trls(name, options):
    pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with")
    if "f_divergence_type" in options and name in ("exo_pair", "robust"):
        options = {**options, "label_smoothing": 0.2}
    given = {key: value.float() if value.is_floating_point() else value for key, value in inputs(seed=2).items()}
    results = []
    for is_ours in (True, False):
        logps = given["logps"].clone().requires_grad_()
        if is_ours:
            head = heads.make(name, **({} if name == "sft" else {"beta": 0.3, **options}))
            ref_logps = given["ref_logps"] if head.needs_reference else None
            loss, _ = loss_from_logps(head, logps, ref_logps, token_counts=given["counts"])
        else:
            loss = trl_dpo_loss({**given, "logps": logps}, name, beta=0.3, **options)
        loss.backward()
        results.append((loss.detach(), logps.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


WEIGHTED = [name for name in OURS if "use_weighting" in heads.protocol._CLASSES[name].__dataclass_fields__]


@pytest.mark.parametrize("name", WEIGHTED)
def test_use_weighting_is_trls(name):
    """WPO's weights multiply each pair's loss, and no gradient flows through them."""
    pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with")
    given = {key: value.float() if value.is_floating_point() else value for key, value in inputs(seed=8).items()}
    given["log_sum_squares"] = torch.tensor([-0.2, -0.7, -1.1, -0.4, -1.6, -0.9])
    options = {"label_smoothing": 0.2} if name in ("exo_pair", "robust") else {}
    results = []
    for is_ours in (True, False):
        logps = given["logps"].clone().requires_grad_()
        if is_ours:
            head = heads.make(name, beta=0.3, use_weighting=True, **options)
            tensors = {"token_counts": given["counts"], "log_sum_squares": given["log_sum_squares"]}
            loss, _ = loss_from_logps(head, logps, given["ref_logps"], **tensors)
        else:
            loss = trl_dpo_loss({**given, "logps": logps}, name, beta=0.3, **options)
        if name != "hinge":  # TRL multiplies its hinge in place, which autograd refuses to differentiate
            loss.backward()
        results.append((loss.detach(), logps.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_use_weighting_is_a_field_wherever_trl_has_it():
    """TRL's ``sft`` is one number for all pairs, which it cannot multiply by a weight each."""
    pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with")
    assert set(WEIGHTED) == {name for name, _ in TRL_PAIRS} - {"aot", "aot_unpaired", "sft"}
    with pytest.raises(RuntimeError, match="memory location"):
        trl_dpo_loss({**inputs(), "log_sum_squares": torch.zeros(6)}, "sft")


@pytest.mark.parametrize("is_weighted", [False, True], ids=["balanced", "weighted"])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_a_loss_of_completions_is_trls(loss_type, is_weighted):
    """With the reference point of TRL's trainer: other prompts' completions, clamped at 0."""
    pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with")
    from trl import KTOTrainer

    given, others = inputs(seed=3), inputs(seed=4)
    desirable = torch.tensor([True, False, True, True, False, True])
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5} if is_weighted else {}
    results = []
    for is_ours in (True, False):
        logps = given["logps"].clone().requires_grad_()
        if is_ours:
            z0 = {"z0": kto_reference_point(others["logps"], others["ref_logps"])} if loss_type == "kto" else {}
            fields = {"reference_point": "tensor"} if loss_type == "kto" else {}
            head = heads.make(loss_type, beta=0.3, **fields, **weights)
            loss, _ = loss_from_logps(head, logps, given["ref_logps"], desirable=desirable, **z0)
        else:
            outputs, batch = trl_batch({**given, "logps": logps})
            refs = {"ref_logps": given["ref_logps"], "ref_KL_logps": others["ref_logps"], "label": desirable}
            trainer = SimpleNamespace(
                model=SimpleNamespace(training=True),
                accelerator=ONE_PROCESS,
                beta=0.3,
                loss_type=loss_type,
                calculate_KL=loss_type == "kto",
                precompute_ref_logps=True,
                aux_loss_enabled=False,
                _compute_kl_logps=lambda model, batch: others["logps"],
                _metrics=defaultdict(lambda: defaultdict(list)),
                _total_train_tokens=0,
                _tp_size=1,
                **{"desirable_weight": 1.0, "undesirable_weight": 1.0, **weights},
            )
            loss = KTOTrainer._compute_loss(trainer, lambda outputs=outputs, **_: outputs, {**batch, **refs}, False)
        loss.backward()
        results.append((loss.detach(), logps.grad))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")  # TRL's sigmoid has no label smoothing


@pytest.mark.parametrize("ld_alpha", [0.4, 0.0])
@pytest.mark.parametrize("name", [*sorted({name for name, _ in TRL_PAIRS} - {"sft"}), "sigmoid and sft"])
def test_ld_alpha_is_trls_for_every_loss(name, ld_alpha):
    """For policy and reference; the reference by its logits, and by log-probabilities weighted beforehand."""
    pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with")
    given = token_batch()
    names, weights = name.split(" and "), [1.0, 0.7]
    smoothing = {"label_smoothing": 0.2} if name in SMOOTHED else {}
    head = heads.make(names[0], beta=0.3, ld_alpha=ld_alpha, **smoothing)
    if len(names) == 2:
        head = heads.Mix((1.0, head), (0.7, heads.make("sft")))
    own_weights = kto_fused.ld_token_weights(given["labels"], ld_alpha)
    ref_logps = sequence_logps(given["ref_logits"], given["labels"], token_weights=own_weights)
    results = []
    for way in ("trl", "logits", "logps"):
        logits = given["logits"].clone().requires_grad_()
        if way == "trl":
            loss = trl_ld_loss(given, logits, names, weights[: len(names)], ld_alpha)
        else:
            ref = {"ref_logits": given["ref_logits"]} if way == "logits" else {"ref_logps": ref_logps}
            loss, _ = fused_loss(head, logits, given["labels"], **ref)
        loss.backward()
        results.append((loss.detach(), logits.grad))
    # TRL's exo_pair holds its label smoothing in float32
    tolerance = {"rtol": 1e-7, "atol": 1e-8} if name == "exo_pair" else {"rtol": 1e-10, "atol": 1e-12}
    for ours in results[1:]:
        torch.testing.assert_close(ours, results[0], **tolerance)


def test_orpo_of_prompt_and_completion_is_trls():
    pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with")
    from trl.experimental.orpo import ORPOTrainer

    given, results = token_batch(), []
    labels = given["ids"].masked_fill(~given["attention"], -100)
    for is_ours in (True, False):
        logits = given["logits"].clone().requires_grad_()
        if is_ours:
            head, mask = heads.make("orpo", beta=0.3, nll_on="all"), given["completion"]
            loss, metrics = fused_loss(head, logits, labels, completion_mask=mask)
            rewards = metrics.rewards
        else:
            trainer = SimpleNamespace(
                accelerator=ONE_PROCESS,
                beta=0.3,
                is_encoder_decoder=False,
                padding_value=0,
                aux_loss_enabled=False,
                concatenated_inputs=ORPOTrainer.concatenated_inputs,
                get_batch_logps=ORPOTrainer.get_batch_logps,
            )
            trainer.concatenated_forward = lambda *args, of=trainer: ORPOTrainer.concatenated_forward(of, *args)
            trainer.odds_ratio_loss = lambda *args, of=trainer: ORPOTrainer.odds_ratio_loss(of, *args)
            named = {"input_ids": given["ids"], "attention_mask": given["attention"].long(), "labels": given["labels"]}
            batch = {
                f"{side}_{name}": value.chunk(2)[index]
                for name, value in named.items()
                for index, side in enumerate(("chosen", "rejected"))
            }
            model = lambda *_, logits=logits, **options: SimpleNamespace(logits=logits)  # noqa: E731
            loss, logged = ORPOTrainer.get_batch_loss_metrics(trainer, model, batch)
        loss.backward()
        results.append((loss.detach().double(), logits.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)  # TRL's odds ratio is float32
    for side, ours in zip(("chosen", "rejected"), rewards.chunk(2), strict=True):
        assert ours.mean().item() == pytest.approx(logged[f"rewards/{side}"], rel=1e-5)


TRL_CPO = {
    "sigmoid": ("cpo", {"loss_type": "sigmoid", "label_smoothing": 0.1}, False),
    "hinge": ("cpo", {"loss_type": "hinge"}, False),
    "ipo": ("cpo", {"loss_type": "ipo"}, True),
    "simpo": ("simpo", {"gamma": 0.4, "label_smoothing": 0.1}, True),
    # TRL's AlphaPO is whatever its loss_type is; the paper's, and ours, is that of the length-averaged SimPO
    "alphapo": ("alphapo", {"gamma": 0.4, "alpha": 0.7}, True),
}


@pytest.mark.parametrize("case", TRL_CPO)
def test_a_loss_without_a_reference_is_trls(case):
    pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with")
    from trl.experimental.cpo import CPOTrainer

    name, options, is_averaged = TRL_CPO[case]
    given, results = inputs(seed=5), []
    for is_ours in (True, False):
        logps, counts = given["logps"].clone().requires_grad_(), given["counts"]
        if is_ours:
            fields = {"cpo_alpha": 0.7, **options} if name == "cpo" else options
            loss, _ = loss_from_logps(heads.make(name, beta=0.3, **fields), logps, token_counts=counts)
        else:
            loss_type = options.get("loss_type", "simpo")
            trainer = SimpleNamespace(
                accelerator=ONE_PROCESS,
                alpha=options.get("alpha", 0.0),
                beta=0.3,
                label_smoothing=options.get("label_smoothing", 0.0),
                loss_type=loss_type,
                simpo_gamma=options.get("gamma"),
            )
            losses, *_ = CPOTrainer.cpo_loss(trainer, *(logps / counts if is_averaged else logps).chunk(2))
            nll = -logps[:3].sum() / counts[:3].sum()
            loss = losses.mean() + (0.7 * nll if name == "cpo" else 0.0)
        loss.backward()
        results.append((loss.detach(), logps.grad))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_orpos_odds_ratio_is_trls():
    """In float32, as TRL computes it. TRL's negative log-likelihood counts the prompt too, ours by default does not."""
    pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with")
    from trl.experimental.orpo import ORPOTrainer

    given, results = inputs(seed=6), []
    for is_ours in (True, False):
        logps, counts = given["logps"].clone().requires_grad_(), given["counts"]
        if is_ours:
            loss, _ = loss_from_logps(heads.make("orpo", beta=0.3), logps, token_counts=counts)
        else:
            trainer = SimpleNamespace(accelerator=ONE_PROCESS, beta=0.3)
            ratios, *_ = ORPOTrainer.odds_ratio_loss(trainer, *(logps / counts).chunk(2))
            loss = -logps[:3].sum() / counts[:3].sum() - ratios.mean()
        loss.backward()
        results.append((loss.detach(), logps.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def policy_gradient_case(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Logits, labels, per-token log-probabilities of an older and of a reference policy, and advantages."""
    random, shape = torch.Generator().manual_seed(8), (4, 9)
    logits = torch.randn(*shape, 13, generator=random, dtype=dtype).requires_grad_()
    labels = torch.randint(13, shape, generator=random)
    labels[:, :3] = -100
    labels[1, 5:] = -100
    with torch.no_grad():
        logps = reference.token_logps(logits, labels)
    aligned = torch.cat([torch.full((4, 1), math.nan, dtype=dtype), logps[:, :-1]], 1)
    noise = (0.4 * torch.randn(*shape, generator=random, dtype=dtype) for _ in range(2))
    old_logps, ref_logps = (aligned + x for x in noise)
    advantages = torch.tensor([1.0, -0.7, -1.3, 0.4], dtype=dtype)
    return {"logits": logits, "labels": labels, "old": old_logps, "ref": ref_logps, "advantages": advantages}


def trl_grpo_loss(case: dict[str, torch.Tensor], loss_type: str, level: str, **options) -> torch.Tensor:
    """The loss of TRL's GRPO trainer in evaluation, which divides by no accumulation."""
    from trl import GRPOTrainer

    mask = (case["labels"][:, 1:] != -100).long()
    logps = reference.token_logps(case["logits"], case["labels"])[:, :-1]
    batch = {
        "prompt_ids": mask[:, :0],
        "prompt_mask": mask[:, :0],
        "completion_ids": case["labels"][:, 1:],
        "completion_mask": mask,
        "advantages": case["advantages"],
        "old_per_token_logps": torch.where(mask == 1, case["old"][:, 1:], 0.0),
        "ref_per_token_logps": torch.where(mask == 1, case["ref"][:, 1:], 0.0),
        "num_items_in_batch": torch.tensor(29.0),
    }
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, **vars(ONE_PROCESS)),
        args=SimpleNamespace(
            delta=options.get("delta"),
            use_bias_correction_kl=False,
            sapo_temperature_pos=options.get("tau_pos"),
            sapo_temperature_neg=options.get("tau_neg"),
            **{f"vespo_{name}": options.get(name) for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")},
        ),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        importance_sampling_level=level,
        loss_type=loss_type,
        beta=options.get("kl_beta", 0.0),
        epsilon_low=0.3,
        epsilon_high=0.2,
        max_completion_length=7,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    return GRPOTrainer._compute_loss(trainer, None, batch)


OF_SEQUENCES = {
    "grpo": {},
    "bnpo": {"normalizer": "tokens"},
    "dr_grpo": {"normalizer": "constant", "max_tokens": 7},
    "dapo": {"normalizer": "items"},
    "luspo": {"normalizer": "constant", "max_tokens": 1},
}
TRL_GRPO = [
    *(("sequence", loss_type, {}) for loss_type in OF_SEQUENCES),
    *(("sequence", loss_type, {"kl_beta": 0.1}) for loss_type in OF_SEQUENCES),
    ("sequence", "grpo", {"delta": 1.5}),
    *(("token", loss_type, {"kl_beta": 0.1}) for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")),
    ("token", "grpo", {"delta": 1.1}),
    ("token", "sapo", {"kl_beta": 0.1, "tau_pos": 1.5, "tau_neg": 0.75}),
    ("token", "vespo", {"k_pos": 1.5, "lambda_pos": 2.5, "k_neg": 2.0, "lambda_neg": 0.5}),
]


@pytest.mark.parametrize(("level", "loss_type", "options"), TRL_GRPO, ids=str)
def test_a_policy_gradient_is_trls(level, loss_type, options):
    """Value and gradient by the logits, with a prompt, padding, and ratios on both sides of the clip."""
    pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with")
    case = policy_gradient_case()
    tensors = {"old_logps": case["old"], "advantages": case["advantages"]}
    if level == "sequence":
        normalizer, of_head = OF_SEQUENCES[loss_type], {name: x for name, x in options.items() if name != "kl_beta"}
        head = heads.make("gspo", **CLIP, **normalizer, **of_head)
        if "kl_beta" in options:
            kl = heads.make("kl", **{"normalizer": "sequences", **normalizer})
            head = heads.Mix((1.0, head), (options["kl_beta"], kl))
    else:
        fields = {"cispo": {"clip_high": 0.2}, "sapo": {}, "vespo": {"normalizer": "items"}}.get(loss_type, CLIP)
        length = {"max_tokens": 7} if loss_type == "dr_grpo" else {}
        head = heads.make(loss_type, **fields, **length, **options)
    tensors |= {"ref_token_logps": case["ref"]} if "kl_beta" in options else {}
    tensors |= {"num_items": torch.tensor(29.0)} if loss_type in ("dapo", "cispo", "vespo") else {}
    losses = (
        fused_loss(head, case["logits"], case["labels"], **tensors)[0],
        trl_grpo_loss(case, loss_type, level, **options),
    )
    grads = [torch.autograd.grad(loss, case["logits"])[0] for loss in losses]
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layout", ["padded", "packed", "unshifted"])
def test_log_probabilities_of_tokens_are_summed_over_the_completion(engine, layout):
    """As the sums themselves, through the fused functions and their twins."""
    (backend, device), case = engine, policy_gradient_case()
    logits, labels, old_logps, advantages = (case[x].detach() for x in ("logits", "labels", "old", "advantages"))
    sums = torch.where(labels == -100, 0.0, old_logps).sum(1)
    options = {}
    if layout == "packed":
        logits, labels, old_logps = logits.flatten(0, 1), labels.flatten(), old_logps.flatten()[None]
        options["cu_seqlens"] = torch.arange(0, 37, 9, device=device)
    elif layout == "unshifted":
        logits, labels, old_logps, options["shift"] = logits[:, :-1], labels[:, 1:], old_logps[:, 1:], False
    head = heads.make("gspo", **CLIP)
    results = []
    for function, old in ((fused_loss, sums), (fused_loss, old_logps), (reference.loss, old_logps)):
        leaf = logits.to(device).requires_grad_()
        tensors = {"old_logps": old.to(device), "advantages": advantages.to(device)}
        loss, metrics = function(head, leaf, labels.to(device), **tensors, **options, backend=backend)
        loss.backward()
        results.append((loss.detach(), leaf.grad, metrics.summary()["ratios"]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-12)


def test_num_items_belongs_to_those_parts_of_a_mix_that_divide_by_it():
    """And a tensor per token is summed for the losses of sequences alone."""
    case = policy_gradient_case()
    inputs, parts = (case["logits"], case["labels"]), (heads.make("gspo", **CLIP), heads.make("dapo", **CLIP))
    tensors, items = {"old_logps": case["old"], "advantages": case["advantages"]}, {"num_items": torch.tensor(29.0)}
    mix = heads.Mix((0.7, parts[0]), (0.3, parts[1]))
    expected = (
        0.7 * fused_loss(parts[0], *inputs, **tensors)[0] + 0.3 * fused_loss(parts[1], *inputs, **tensors, **items)[0]
    )
    for function in (fused_loss, reference.loss):
        loss, metrics = function(mix, *inputs, **tensors, **items)
        torch.testing.assert_close(loss, expected)
        grads = [torch.autograd.grad(x, case["logits"], retain_graph=True)[0] for x in (loss, expected)]
        torch.testing.assert_close(*grads)
        assert "ratios" in metrics.summary()
    with pytest.raises(TypeError, match="expected one for it and none for any other, got none"):
        fused_loss(mix, *inputs, **tensors)
    for head in (parts[0], heads.Mix((1.0, parts[0])), heads.Mix((1.0, parts[0]), (1.0, heads.make("nll")))):
        with pytest.raises(TypeError, match="expected one for it and none for any other, got one"):
            fused_loss(head, *inputs, **tensors, **items)


def test_sums_of_tokens_are_an_operator(engine):
    """Of ``torch.compile``, which sees one graph."""
    (backend, device), case = engine, policy_gradient_case()
    torch.use_deterministic_algorithms(False)  # torch.compile has a guard on this setting
    labels, old_logps = case["labels"].to(device), case["old"].nan_to_num().to(device)
    torch.library.opcheck(sums_over_labels.op, (old_logps, labels, None, 4, 13, -100, True, backend))
    offsets = torch.tensor([0, 9, 9, 36], device=device)
    torch.library.opcheck(
        sums_over_labels.op, (old_logps.flatten(), labels.flatten(), offsets, 3, 13, -100, True, backend)
    )

    def step(logits):
        tensors = {"old_logps": old_logps, "advantages": case["advantages"].to(device)}
        return fused_loss("gspo", logits * 1, labels, **tensors, backend=backend)[0]

    logits = case["logits"].detach().to(device).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    losses = [function(logits) for function in (step, compiled)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses))


def test_what_cannot_be_summed_is_refused():
    case = policy_gradient_case()
    inputs = case["logits"], case["labels"]
    with pytest.raises(ValueError, match=r"old_logps has shape \[4, 8\], expected \[4\], one per sequence, or labels'"):
        fused_loss("gspo", *inputs, old_logps=case["old"][:, 1:], advantages=case["advantages"])
    with pytest.raises(ValueError, match=r"advantages has shape \[4, 9\]"):  # a sum of advantages has no meaning
        fused_loss("gspo", *inputs, old_logps=case["old"], advantages=case["old"])
    with pytest.raises(TypeError, match="num_items is the number of tokens that normalizer='items' divides by"):
        fused_loss("gspo", *inputs, old_logps=case["old"], advantages=case["advantages"], num_items=3.0)

    class Unregistered(heads.completions.GSPO):
        pass

    with pytest.raises(ValueError, match=r"expected \[B\] sums over completion tokens, because Unregistered is not"):
        fused_loss(Unregistered(), *inputs, old_logps=case["old"], advantages=case["advantages"])


# ---- through the three functions -----------------------------------------------------------------------------------

# a chunk that holds one pair of the batch of 4 sequences with up to 4 completion tokens each, and all of it
CHUNKS = pytest.mark.parametrize("num_tokens", [None, 8], ids=["one chunk", "chunks"])


def reference_of(head: heads.Head, **reference: torch.Tensor) -> dict[str, torch.Tensor]:
    return reference if head.needs_reference else {}


def check_metrics(actual, expected) -> None:
    """Compare the metrics of two calls."""
    for field in ("logps", "rewards", "reference_point", "entropy"):
        given = getattr(expected, field)
        assert (getattr(actual, field) is None) == (given is None)
        if given is not None:
            assert_close(getattr(actual, field), given, 1e-10, field)
    assert actual.is_paired == expected.is_paired
    assert actual.summary().keys() == expected.summary().keys()


@pytest.fixture
def name(request, engine):
    """The name of a loss. Triton's slow interpreter gets each kind of loss once: its kernels see no formula."""
    if engine == ("triton", "cpu") and request.param not in ("orpo", "bco", "aot", "kto", "kto_squared", "simpo"):
        pytest.skip("Triton's interpreter is slow")
    return request.param


@pytest.mark.parametrize("name", OURS, indirect=True)
def test_from_logits_a_loss_is_its_twin(engine, name):
    head = heads.make(name)
    case = make_case(vocab=17, dtype=torch.float64, device=engine[1], seed=3)
    options = {**reference_of(head, ref_logits=case.ref_logits), **tensors_of(name, 4, {}, engine[1])}
    results = []
    for function in (fused_loss, reference.loss):
        logits = case.logits.clone().requires_grad_()
        loss, metrics = function(head, logits, case.labels, **options, backend=engine[0])
        loss.backward()
        results.append((loss, metrics, logits.grad))
    (loss, metrics, grad), (exact, exact_metrics, exact_grad) = results
    assert_close(loss, exact, 1e-11, "loss")
    assert_close(grad, exact_grad, 1e-11, "gradient")
    check_metrics(metrics, exact_metrics)


@CHUNKS
@pytest.mark.parametrize("name", OURS, indirect=True)
def test_from_hidden_states_a_loss_is_its_twin(engine, name, num_tokens):
    head = heads.make(name)
    case = make_hidden_case(vocab=17, hidden_size=4, dtype=torch.float64, device=engine[1], seed=3)
    options = {**reference_of(head, ref_hidden=case.ref_hidden), **tensors_of(name, 4, {}, engine[1])}
    results = []
    for function in (fused_linear_loss, reference.linear_loss):
        hidden, weight = (x.clone().requires_grad_() for x in (case.hidden, case.weight))
        with chunks_of(num_tokens):
            loss, metrics = function(head, hidden, weight, case.labels, **options, backend=engine[0])
            loss.backward()
        results.append((loss, metrics, hidden.grad, weight.grad))
    (loss, metrics, *grads), (exact, exact_metrics, *exact_grads) = results
    assert_close(loss, exact, 1e-11, "loss")
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert_close(grad, exact_grad, 1e-11, "gradient")
    check_metrics(metrics, exact_metrics)


@pytest.mark.parametrize("case", FORMULAS)
def test_from_log_probabilities_a_loss_is_its_twin(engine, case):
    name, fields, _ = FORMULAS[case]
    head, given = heads.make(name, **fields), {key: x.to(engine[1]) for key, x in inputs(seed=7).items()}
    options = {"token_counts": given["counts"], **tensors_of(name, 6, fields, engine[1])}
    results = []
    for function in (loss_from_logps, reference.loss_from_logps):
        logps = given["logps"].clone().requires_grad_()
        loss, metrics = function(head, logps, given["ref_logps"] if head.needs_reference else None, **options)
        (3 * loss).backward()
        results.append((loss, metrics, logps.grad))
    (loss, metrics, grad), (exact, exact_metrics, exact_grad) = results
    assert_close(loss, exact, 1e-12, "loss")
    assert_close(grad, exact_grad, 1e-12, "gradient")
    check_metrics(metrics, exact_metrics)


@pytest.mark.parametrize("name", ["orpo", "bco"])
def test_gradients_from_hidden_states_agree_with_finite_differences(name):
    head = heads.make(name)
    case = make_hidden_case(vocab=5, hidden_size=3, seq_len=4, dtype=torch.float64, seed=5)
    hidden = case.hidden.nan_to_num().requires_grad_()
    options = {**reference_of(head, ref_logps=torch.full((4,), -3.0)), **tensors_of(name, 4, {})}
    with chunks_of(4):
        assert gradcheck(
            lambda hidden, weight: fused_linear_loss(head, hidden, weight, case.labels, **options)[0],
            (hidden, case.weight.requires_grad_()),
        )


@pytest.mark.parametrize(
    "name", ["sigmoid_norm", "orpo", "cpo", "sft", "bco", "gspo", "vespo", "apo_zero_unpaired", "aot"]
)
def test_a_batch_in_chunks_takes_three_gemms_unless_a_loss_reads_all_of_it(poisoned_memory, name):
    """Four sequences of 8 tokens each; a chunk holds one pair."""
    torch.use_deterministic_algorithms(False)  # poisoned memory is filled by operators
    head, vocab = heads.make(name), 101
    labels = torch.randint(vocab, (4, 9))
    hidden, weight = torch.randn(4, 9, 32, requires_grad=True), torch.randn(vocab, 32, requires_grad=True)
    options = {**reference_of(head, ref_logps=torch.full((4,), -9.0)), **tensors_of(name, 4, {})}
    with FlopCounterMode(display=False) as counter, chunks_of(18):
        fused_linear_loss(head, hidden, weight, labels, **options)[0].backward()
    gemms = counter.get_total_flops() / (2 * 32 * weight.numel())
    expected = 4 if head.group is None else 3
    if name == "gspo":  # the tokens of a clipped ratio have no gradient
        expected = 1 + 2 * (hidden.grad[:, :-1] != 0).any(-1).double().mean().item()
        assert expected < 3
    assert gemms == pytest.approx(expected, rel=0.02)


# ---- extremes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratios", [(1e4, -1e4), (-1e4, 1e4), (1e4, 1e4), (-1e4, -1e4), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_log_ratios_of_ten_thousand_nats_give_no_nan(engine, name, ratios):
    head, device = heads.make(name), engine[1]
    counts = torch.full((4,), 2, device=device)
    if head.needs_reference:
        ref_logps = torch.tensor([-2e4, -3.0, -2e4, -3.0], dtype=torch.float64, device=device)
        logps = ref_logps.clone()
        logps[0] += ratios[0]
        logps[2] += ratios[1]
    else:  # the log-probability itself is extreme
        ref_logps = None
        logps = torch.tensor([min(ratios[0], -1.0), -3.0, min(ratios[1], -1.0), -4.0], dtype=torch.float64)
        logps = logps.to(device)
    logps.requires_grad_()
    options = {"token_counts": counts, **tensors_of(name, 4, {}, device), "backend": engine[0]}
    loss, metrics = loss_from_logps(head, logps, ref_logps, **options)
    loss.backward()
    assert loss.isfinite()
    assert logps.grad.isfinite().all()
    assert not any(value.isnan() for value in metrics.summary().values())


def test_a_rejected_answer_without_probability_gives_no_nan_through_an_f_divergence():
    """A rejected answer without probability is what the loss wants: it costs nothing."""
    for fields in ({"f_divergence_type": "forward_kl"}, {"f_divergence_type": "alpha_divergence"}):
        for name in SCORED:
            logps = torch.tensor([-3.0, -1e4], dtype=torch.float64, requires_grad=True)
            ref_logps, counts = torch.tensor([-3.0, -4.0], dtype=torch.float64), torch.tensor([2, 2])
            loss, _ = loss_from_logps(heads.make(name, **fields), logps, ref_logps, token_counts=counts)
            loss.backward()
            assert not loss.isnan(), name
            assert not logps.grad.isnan().any(), name
            if name in ("sigmoid", "hinge", "robust", "sigmoid_norm", "discopop"):
                assert loss == 0, name
                assert logps.grad.eq(0).all(), name


@pytest.mark.parametrize("is_empty", [(True, False), (False, True), (True, True)], ids=["chosen", "rejected", "both"])
@pytest.mark.parametrize("name", OURS)
def test_an_empty_completion_harms_no_other_pair(engine, name, is_empty):
    """It has log-probability 0 and no token. ORPO's odds of an empty rejected answer are infinite, as is its loss."""
    head, device = heads.make(name), engine[1]
    counts = torch.tensor([3, 2, 4, 2], device=device)
    logps = torch.tensor([-2.0, -3.0, -4.0, -2.0], dtype=torch.float64, device=device)
    ref_logps = logps - 0.5
    for index, empty in zip((0, 2), is_empty, strict=True):
        if empty:
            counts[index], logps[index], ref_logps[index] = 0, 0.0, 0.0
    logps.requires_grad_()
    options = {"token_counts": counts, **tensors_of(name, 4, {}, device), "backend": engine[0]}
    loss, _ = loss_from_logps(head, logps, ref_logps if head.needs_reference else None, **options)
    loss.backward()
    if name in ("orpo", "odds_ratio") and is_empty[1]:
        assert loss == math.inf or is_empty[0]
    else:
        assert loss.isfinite()
    # the engines have no token that the gradient of an empty completion could reach
    assert logps.grad[counts > 0].isfinite().all()


@pytest.mark.parametrize("near", [0.0, 1e-300, 1e-16, 1e-8])
def test_a_chosen_answer_of_probability_1_has_orpos_limit(near):
    """d/da_w -> -beta odds_l as a_w -> 0; the term of a_l vanishes, and the loss with it."""
    logps = torch.tensor([-near, -1.2], dtype=torch.float64, requires_grad=True)
    head = heads.make("orpo", beta=0.3)
    loss, _ = loss_from_logps(head, logps, token_counts=torch.tensor([1, 2]))
    loss.backward()
    odds = exp(-0.6) / (1 - exp(-0.6))
    assert loss.item() == pytest.approx(near + 0.3 * near * odds, rel=1e-6)
    assert logps.grad[0].item() == pytest.approx(-1 - 0.3 * odds, rel=1e-6)
    assert logps.grad[1].item() == pytest.approx(0.3 * near * odds / (1 - exp(-0.6)) / 2, rel=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_probability_of_1_is_nothing_special_to_alphapo(sign):
    logps = torch.tensor([0.0, -1.2], dtype=torch.float64, requires_grad=True)
    head = heads.make("alphapo", alpha=0.5 * sign)
    assert gradcheck(
        lambda logps: loss_from_logps(head, logps, token_counts=torch.tensor([1, 2]))[0],
        (logps.detach().requires_grad_(),),
    )
