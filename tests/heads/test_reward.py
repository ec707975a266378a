"""The reward model's and the value model's losses: their formulas, gradients, masks and errors."""

import math
from collections import defaultdict
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from kto_fused import bradley_terry_loss, linear_bradley_terry_loss, reference, value_loss

NAN = float("nan")
by_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
by_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def scores(pairs: int = 5, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(pairs, dtype=dtype, requires_grad=True), torch.randn(pairs, dtype=dtype, requires_grad=True)


def reduced(losses: torch.Tensor, reduction: str) -> torch.Tensor:
    return {"mean": losses.mean(), "sum": losses.sum(), "none": losses}[reduction]


# ---- Bradley-Terry --------------------------------------------------------------------------------------------------


@by_reduction
@by_dtype
def test_bradley_terry_is_its_formula(dtype, reduction):
    """In float64, pair by pair; half precision computes in float32."""
    chosen, rejected = scores(dtype=dtype)
    margin, weights = torch.rand(5), torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0])
    expected = [
        w * (math.log1p(math.exp(-(c - r - m))) + 0.3 * (c + r) ** 2)
        for c, r, m, w in zip(chosen.tolist(), rejected.tolist(), margin.tolist(), weights.tolist(), strict=True)
    ]
    loss = bradley_terry_loss(chosen, rejected, margin=margin, centering=0.3, weights=weights, reduction=reduction)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = reduced(torch.tensor(expected, dtype=torch.float64), reduction).to(loss.dtype)
    torch.testing.assert_close(loss, expected)


def test_bradley_terry_by_hand():
    """Equal scores cost log 2, and pull each other apart with half of the pair's share."""
    chosen = torch.tensor([1.0, 1.0], requires_grad=True)
    rejected = torch.tensor([1.0, 1.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, rejected)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert chosen.grad.tolist() == [-0.25, -0.25]
    assert rejected.grad.tolist() == [0.25, 0.25]


@by_reduction
def test_bradley_terrys_first_and_second_derivative(reduction):
    weights, margin = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0]), torch.rand(5, dtype=torch.float64)

    def loss(chosen, rejected):
        return bradley_terry_loss(chosen, rejected, margin=margin, centering=0.1, weights=weights, reduction=reduction)

    assert gradcheck(loss, scores())
    assert torch.autograd.gradgradcheck(loss, scores())


def test_a_margin_of_one_number_is_that_of_every_pair():
    chosen, rejected = scores()
    expected = bradley_terry_loss(chosen, rejected, margin=torch.full((5,), 0.7, dtype=torch.float64))
    assert torch.equal(bradley_terry_loss(chosen, rejected, margin=0.7), expected)
    torch.testing.assert_close(bradley_terry_loss(chosen - 0.7, rejected), expected)


def test_a_margin_does_not_decide_the_losss_dtype():
    chosen, rejected = scores(dtype=torch.float32)
    for dtype in (torch.float64, torch.bfloat16):
        margin = torch.full((5,), 0.5, dtype=dtype)
        assert torch.equal(
            bradley_terry_loss(chosen, rejected, margin=margin), bradley_terry_loss(chosen, rejected, margin=0.5)
        )


@pytest.mark.parametrize("number", [np.float32(0.3), np.int64(2), Fraction(1, 3)], ids=repr)
def test_numbers_of_any_type_compute_like_floats(number):
    chosen, rejected = scores(dtype=torch.float32)
    for function, tensors, names in (
        (bradley_terry_loss, {}, ("margin", "centering")),
        (value_loss, {"old_values": torch.zeros(5)}, ("clip",)),
    ):
        loss = function(chosen, rejected, **tensors, **dict.fromkeys(names, number))
        assert torch.equal(loss, function(chosen, rejected, **tensors, **dict.fromkeys(names, float(number))))


def test_margin_and_weights_receive_no_gradient():
    chosen, rejected = scores()
    margin, weights = torch.zeros(5, requires_grad=True), torch.ones(5, requires_grad=True)
    bradley_terry_loss(chosen, rejected, margin=margin, weights=weights).backward()
    assert margin.grad is None
    assert weights.grad is None


def test_bradley_terry_of_scores_far_apart_neither_overflows_nor_loses_its_gradient():
    chosen, rejected = torch.tensor([-1e4, 1e4], requires_grad=True), torch.tensor([1e4, -1e4])
    losses = bradley_terry_loss(chosen, rejected, reduction="none")
    losses.sum().backward()
    assert losses.tolist() == [2e4, 0.0]
    assert chosen.grad.tolist() == [-1.0, 0.0]


def test_a_pair_of_weight_0_contributes_0_whatever_it_holds():
    weights = torch.tensor([1.0, 0.0, 0.0])
    chosen = torch.tensor([0.5, NAN, -math.inf], requires_grad=True)
    rejected = torch.tensor([0.0, 1.0, math.inf], requires_grad=True)
    margin = torch.tensor([0.0, math.inf, NAN])
    loss = bradley_terry_loss(chosen, rejected, margin=margin, centering=0.1, weights=weights)
    loss.backward()
    torch.testing.assert_close(loss, bradley_terry_loss(chosen[:1], rejected[:1], centering=0.1) / 3)
    assert chosen.grad[1:].tolist() == rejected.grad[1:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("centering", [None, 0.01])
def test_bradley_terry_is_trls_loss(margin, centering):
    """The loss that TRL's RewardTrainer computes from the same scores."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=centering),
        accelerator=accelerator,
        _total_train_tokens=0,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    chosen, rejected = scores(dtype=torch.float32)
    inputs = {"margin": torch.rand(5)} if margin else {}
    outputs = SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])
    expected = trl.RewardTrainer.compute_loss(trainer, lambda **_: outputs, dict(inputs))
    loss = bradley_terry_loss(chosen, rejected, centering=centering or 0.0, **inputs)
    torch.testing.assert_close(loss, expected)


BRADLEY_TERRY_ERRORS = {
    "scores of two dimensions": (
        {"chosen_scores": torch.zeros(2, 2)},
        ValueError,
        "chosen_scores must be [P] with P >= 1, got shape [2, 2]",
    ),
    "no pair": (
        {"chosen_scores": torch.zeros(0), "rejected_scores": torch.zeros(0)},
        ValueError,
        "chosen_scores must be [P] with P >= 1, got shape [0]",
    ),
    "scores of integers": (
        {"chosen_scores": torch.zeros(3, dtype=torch.long)},
        TypeError,
        "chosen_scores must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "more rejected than chosen": (
        {"rejected_scores": torch.zeros(4)},
        ValueError,
        "rejected_scores has shape [4], expected the shape of chosen_scores, [3]",
    ),
    "a margin of another length": (
        {"margin": torch.zeros(1)},
        ValueError,
        "margin has shape [1], expected the shape of chosen_scores, [3]",
    ),
    "an infinite margin": ({"margin": math.inf}, ValueError, "margin must be a finite number, got inf"),
    "a negative centering": ({"centering": -0.1}, ValueError, "centering must be a finite number >= 0, got -0.1"),
    "a negative weight": (
        {"weights": torch.tensor([1.0, -1.0, 0.0])},
        ValueError,
        "weights must be >= 0, got -1.0",
    ),
    "a weight that is NaN": ({"weights": torch.tensor([1.0, NAN, 0.0])}, ValueError, "weights must be >= 0, got nan"),
    "weights as a list": ({"weights": [1.0, 1.0, 1.0]}, TypeError, "weights must be a tensor, got list"),
    "an unknown reduction": (
        {"reduction": "max"},
        ValueError,
        "reduction must be one of ['mean', 'sum', 'none'], got 'max'",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), BRADLEY_TERRY_ERRORS.values(), ids=BRADLEY_TERRY_ERRORS)
def test_an_error_of_bradley_terry_says_what_came_and_what_was_expected(changes, error, message):
    with pytest.raises(error) as raised:
        bradley_terry_loss(**{"chosen_scores": torch.zeros(3), "rejected_scores": torch.zeros(3), **changes})
    assert message in str(raised.value)


# ---- Bradley-Terry from hidden states -------------------------------------------------------------------------------

LAST = (4, 6, 2, 3)  # the position of each sequence's last completion token; the rest is padding, or another answer


def reward_case(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Hidden states of two pairs, infinite or NaN wherever no score is read, and a score head."""
    hidden, labels = torch.full((4, 7, 5), NAN, dtype=dtype), torch.full((4, 7), -100)
    hidden[:, :2] = math.inf
    for sequence, last in enumerate(LAST):
        labels[sequence, last - 1 : last + 1] = 3
        hidden[sequence, last] = torch.randn(5, dtype=dtype)
    weight, bias = torch.randn(1, 5, dtype=dtype), torch.randn(1, dtype=dtype)
    return {"hidden": hidden, "labels": labels, "weight": weight, "bias": bias}


@by_reduction
@by_dtype
@pytest.mark.parametrize("layout", ["padded", "packed", "unshifted", "a view"])
def test_a_score_is_read_at_the_last_completion_token(layout, dtype, reduction):
    """Against the loss of scores by hand: value, scores and gradients, also of the twin."""
    case = reward_case(dtype)
    labels, options = case["labels"], {"centering": 0.3, "margin": torch.tensor([0.2, 0.4]), "reduction": reduction}
    expected_leaves = [case[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    rows, weight, bias = (x.to(exact) for x in expected_leaves)
    scores = (rows[torch.arange(4), list(LAST)] * weight[0]).sum(-1) + bias
    expected = bradley_terry_loss(*scores.chunk(2), **options)
    expected_grads = torch.autograd.grad(expected.sum(), expected_leaves)
    given = options
    for function in (linear_bradley_terry_loss, reference.linear_bradley_terry_loss):
        leaves = [case[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
        rows, of_layout = leaves[0], labels
        if layout == "packed":
            rows, of_layout = rows.flatten(0, 1), labels.flatten()
            given = {**options, "cu_seqlens": torch.arange(0, 29, 7)}
        elif layout == "unshifted":
            of_layout, given = labels.roll(-1, 1), {**options, "shift": False}
        elif layout == "a view":
            rows = rows.transpose(0, 1).contiguous().transpose(0, 1)
        loss, own_scores = function(rows, leaves[1], of_layout, score_bias=leaves[2], **given)
        assert loss.dtype == own_scores.dtype == exact
        assert not own_scores.requires_grad
        torch.testing.assert_close(own_scores, scores.detach())
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), leaves), expected_grads)


def test_bradley_terrys_derivative_from_hidden_states():
    case, weights = reward_case(), torch.tensor([0.5, 2.0])

    def loss(rows, weight, bias):
        hidden = torch.zeros(4, 7, 5, dtype=torch.float64)
        hidden[torch.arange(4), list(LAST)] = rows
        options = {"score_bias": bias, "margin": 0.3, "centering": 0.1, "weights": weights}
        return linear_bradley_terry_loss(hidden, weight, case["labels"], **options)[0]

    leaves = case["hidden"][torch.arange(4), list(LAST)], case["weight"], case["bias"]
    assert gradcheck(loss, tuple(x.requires_grad_() for x in leaves))


def test_only_the_last_tokens_are_multiplied():
    hidden, weight = torch.randn(4, 64, 32, requires_grad=True), torch.randn(1, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        linear_bradley_terry_loss(hidden, weight, torch.ones(4, 64, dtype=torch.long))[0].backward()
    assert counter.get_total_flops() == 3 * 2 * 4 * 32  # the scores and their two gradients


def test_a_pair_of_weight_0_harms_no_gradient_of_the_score_head():
    case = reward_case()
    case["hidden"][0, LAST[0]] = math.inf
    weights, grads = torch.tensor([0.0, 1.0]), []
    for function in (linear_bradley_terry_loss, reference.linear_bradley_terry_loss):
        hidden, weight = (case[name].clone().requires_grad_() for name in ("hidden", "weight"))
        loss, _ = function(hidden, weight, case["labels"], weights=weights)
        loss.backward()
        assert hidden.grad[[0, 2]].eq(0).all()
        assert weight.grad.isfinite().all()
        grads.append((loss.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("centering", [None, 0.01])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_bradley_terry_of_a_models_hidden_states_is_trls(centering, padding_side):
    """A transformers model for sequence classification in TRL's RewardTrainer: value and gradients."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with")
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=29, pad_token_id=0, num_labels=1, **sizes)
    model = LlamaForSequenceClassification(config).eval()
    mask = (torch.arange(8) < torch.tensor([5, 8, 3, 6])[:, None]).long()
    mask = mask.flip(1) if padding_side == "left" else mask
    tokens = torch.randint(1, 29, (4, 8)) * mask
    accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=centering),
        accelerator=accelerator,
        _total_train_tokens=0,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    batch = {"input_ids": tokens, "attention_mask": mask}
    expected = trl.RewardTrainer.compute_loss(trainer, model, dict(batch))
    expected_grads = torch.autograd.grad(expected, model.parameters())
    hidden = model.model(**batch, use_cache=False).last_hidden_state
    labels = tokens.masked_fill(mask == 0, -100)
    loss, _ = linear_bradley_terry_loss(hidden, model.score.weight, labels, centering=centering or 0.0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, model.parameters()), expected_grads, rtol=1e-4, atol=1e-6)


NO_TOKEN = torch.tensor([[-100, 3], [3, -100], [-100, -100], [3, 3]])
PAST = torch.tensor([[3, -100], [3, -100], [3, -100], [3, 3]])
LINEAR_ERRORS = {
    "no completion token": (
        {"labels": NO_TOKEN},
        ValueError,
        "sequence 2 has no completion token to score: each of its labels is ignore_index=-100",
    ),
    "no completion token, packed": (
        {"hidden": torch.zeros(4, 3), "labels": torch.ones(4).long(), "cu_seqlens": torch.tensor([0, 3, 3, 4, 4])},
        ValueError,
        "sequence 1 has no completion token to score",
    ),
    "a last token that is not there": (
        {"labels": PAST, "shift": False},
        ValueError,
        "the last completion token of sequence 3 stands one position after its label",
    ),
    "offsets that fall": (
        {"hidden": torch.zeros(4, 3), "labels": torch.ones(4).long(), "cu_seqlens": torch.tensor([0, 3, 2, 4, 4])},
        ValueError,
        "cu_seqlens must rise from 0 to the 4 packed positions",
    ),
    "an odd batch": (
        {"hidden": torch.zeros(3, 2, 3), "labels": PAST[:3]},
        ValueError,
        "pairs need an even batch, chosen then rejected; got 3 sequences",
    ),
    "two scores": ({"score_weight": torch.zeros(2, 3)}, ValueError, "score_weight must be [1, H], one score per"),
    "another width": ({"score_weight": torch.zeros(1, 4)}, ValueError, "score_weight must be [V, H] with V >= 1 and"),
    "another dtype": ({"score_weight": torch.zeros(1, 3).double()}, TypeError, "score_weight is torch.float64, exp"),
    "a bias of two": ({"score_bias": torch.zeros(2)}, ValueError, "score_bias has shape [2], expected [1]"),
    "a margin per sequence": (
        {"margin": torch.zeros(4)},
        ValueError,
        "margin has shape [4], expected the shape of the pairs, [2]",
    ),
    "a negative weight": ({"weights": torch.tensor([1.0, -1.0])}, ValueError, "weights must be >= 0, got -1.0"),
}


@pytest.mark.parametrize(("changes", "error", "message"), LINEAR_ERRORS.values(), ids=LINEAR_ERRORS)
def test_an_error_from_hidden_states_says_what_came_and_what_was_expected(changes, error, message):
    given = {"hidden": torch.zeros(4, 2, 3), "score_weight": torch.zeros(1, 3), "labels": PAST, **changes}
    for function in (linear_bradley_terry_loss, reference.linear_bradley_terry_loss):
        with pytest.raises(error) as raised:
            function(**given)
        assert message in str(raised.value)


# ---- the value model ------------------------------------------------------------------------------------------------


def value_case(dtype: torch.dtype = torch.float64):
    """(values, returns, options) of two sequences, half of each outside the mask."""
    values, returns, old_values = (torch.randn(2, 6, dtype=dtype) for _ in range(3))
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 1:4] = mask[1, 3:] = True
    return values.requires_grad_(), returns, {"old_values": old_values, "mask": mask}


@by_reduction
@by_dtype
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_value_loss_is_its_formula(dtype, reduction, clip, masked):
    """In float64, token by token; half precision computes in float32."""
    values, returns, options = value_case(dtype)
    old_values, mask = options["old_values"], options["mask"]
    expected = []
    for v, r, old in zip(*(x.flatten().tolist() for x in (values, returns, old_values)), strict=True):
        error = (v - r) ** 2
        if clip is not None:
            error = max(error, (min(max(v, old - clip), old + clip) - r) ** 2)
        expected.append(error)
    expected = torch.tensor(expected, dtype=torch.float64).view(2, 6)
    if masked and reduction == "none":
        expected = expected * mask
    elif masked:
        expected = expected[mask]
    loss = value_loss(
        values,
        returns,
        old_values=None if clip is None else old_values,
        clip=clip,
        mask=mask if masked else None,
        reduction=reduction,
    )
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss, reduced(expected, reduction).to(loss.dtype))


@by_reduction
@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_losss_derivative(clip, reduction):
    values, returns, options = value_case()
    if clip is None:
        del options["old_values"]
    assert gradcheck(lambda x: value_loss(x, returns, clip=clip, reduction=reduction, **options), values)


def test_a_value_that_has_moved_beyond_the_clip_towards_its_return_gets_no_gradient():
    values = torch.tensor([0.0, 0.5, 0.5, -0.5], requires_grad=True)
    returns, old_values = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.zeros(4)
    losses = value_loss(values, returns, old_values=old_values, clip=0.2, reduction="none")
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), torch.tensor([1.0, 0.64, 0.25, 2.25]))
    # within the clip; beyond it, towards the return; beyond it, away from the return, twice
    assert values.grad.tolist() == [-2.0, 0.0, 1.0, -3.0]


@pytest.mark.parametrize("clip", [None, 0.2])
def test_nothing_outside_the_mask_is_read(clip):
    values, returns, options = value_case()
    mask = options["mask"]
    if clip is None:
        del options["old_values"]
    loss = value_loss(values, returns, clip=clip, **options)
    (expected_grad,) = torch.autograd.grad(loss, values)
    for name in {"old_values"} & options.keys():
        options[name] = options[name].masked_fill(~mask, NAN)
    poisoned = values.detach().masked_fill(~mask, NAN).requires_grad_()
    poisoned_loss = value_loss(poisoned, returns.masked_fill(~mask, math.inf), clip=clip, **options)
    (grad,) = torch.autograd.grad(poisoned_loss, poisoned)
    assert torch.equal(poisoned_loss, loss)
    assert torch.equal(grad, expected_grad)
    assert (grad[~mask] == 0).all()


@by_reduction
def test_without_a_token_loss_and_gradient_are_0(reduction):
    values = torch.full((2, 3), NAN, requires_grad=True)
    loss = value_loss(values, values, mask=torch.zeros(2, 3, dtype=torch.bool), reduction=reduction)
    loss.sum().backward()
    assert (loss == 0).all()
    assert (values.grad == 0).all()
    assert value_loss(torch.zeros(0), torch.zeros(0)).item() == 0


def test_returns_and_old_values_receive_no_gradient():
    values, returns, old_values = (torch.randn(3, requires_grad=True) for _ in range(3))
    value_loss(values, returns, old_values=old_values, clip=0.1).backward()
    assert returns.grad is None
    assert old_values.grad is None


def test_a_mask_of_integers_is_a_mask():
    values, returns, options = value_case()
    del options["old_values"]
    expected = value_loss(values, returns, **options)
    assert torch.equal(value_loss(values, returns, mask=options["mask"].long()), expected)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_losses_compile_as_one_graph(clip):
    torch.use_deterministic_algorithms(False)  # which torch.compile guards on
    torch._dynamo.reset()
    values, returns, options = value_case(torch.float32)
    if clip is None:
        del options["old_values"]

    def step(values):
        weights = returns[0].abs()
        pairs = bradley_terry_loss(values[0], values[1], margin=0.1, centering=0.01, weights=weights)
        labels = torch.ones(2, 6, dtype=torch.long)
        pairs = pairs + linear_bradley_terry_loss(values[..., None], values[:1, :1], labels)[0]
        return pairs + value_loss(values, returns, clip=clip, **options)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for function in (step, compiled):
        values.grad = None
        loss = function(values)
        loss.backward()
        if function is step:
            expected, expected_grad = loss, values.grad
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(values.grad, expected_grad)


ROWS = torch.zeros(2, 3)
VALUE_ERRORS = {
    "values of integers": (
        {"values": ROWS.long()},
        TypeError,
        "values must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "returns of another shape": (
        {"returns": torch.zeros(3)},
        ValueError,
        "returns has shape [3], expected the shape of values, [2, 3]",
    ),
    "a clip alone": ({"clip": 0.2}, ValueError, "clip came without old_values: expected both or neither"),
    "old values alone": ({"old_values": ROWS}, ValueError, "old_values came without clip: expected both or neither"),
    "old values of another shape": (
        {"old_values": torch.zeros(2), "clip": 0.2},
        ValueError,
        "old_values has shape [2], expected the shape of values, [2, 3]",
    ),
    "a clip of 0": ({"old_values": ROWS, "clip": 0.0}, ValueError, "clip must be a finite number > 0, got 0.0"),
    "a mask of floats": ({"mask": ROWS}, TypeError, "mask must be bool (or 0/1 integers), got torch.float32"),
    "a mask that is a label": (
        {"mask": torch.full((2, 3), -100)},
        ValueError,
        "mask must hold 0 or 1, got -100",
    ),
    "an unknown reduction": (
        {"reduction": "max"},
        ValueError,
        "reduction must be one of ['mean', 'sum', 'none'], got 'max'",
    ),
}


@pytest.mark.parametrize(("changes", "error", "message"), VALUE_ERRORS.values(), ids=VALUE_ERRORS)
def test_an_error_of_value_loss_says_what_came_and_what_was_expected(changes, error, message):
    with pytest.raises(error) as raised:
        value_loss(**{"values": ROWS, "returns": ROWS, **changes})
    assert message in str(raised.value)


def test_the_twins_are_the_functions_themselves():
    """Plain PyTorch already: there is nothing to compare them with but the formulas above."""
    assert reference.bradley_terry_loss is bradley_terry_loss
    assert reference.value_loss is value_loss
