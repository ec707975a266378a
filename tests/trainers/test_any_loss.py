"""The trainers take any loss: by its name with its own options, several with weights, or one of the user's own."""

import copy
import functools
import math
import re
from dataclasses import dataclass

import pytest
import torch
from plain_training import assert_same_steps, in_order, plain_reference_point
from tiny_training import assert_near, data, history, make_trainer, model, stop_and_resume, weights

from kto_fused import heads, reference
from kto_fused.heads.preference import DPO_LOSS_TYPES
from kto_fused.trainers import FusedDPOConfig, FusedKTOConfig
from kto_fused.trainers.checkpoints import CheckpointError

pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")

KERNEL_FREE = sorted({*FusedDPOConfig.loss_names} - {*DPO_LOSS_TYPES})  # the others: ``test_training_steps``


@heads.register("test_trainers_margin")
@dataclass(frozen=True)
class Margin(heads.Head):
    """A loss of pairs that weighs and reports by itself."""

    margin: float = 1.0
    beta: float = 0.5
    group = 2

    def losses(self, logps, counts, ref_logps, *, weights=None):
        chosen, rejected = (self.beta * (logps - ref_logps)).chunk(2)
        losses = torch.nn.functional.softplus(self.margin - chosen + rejected)
        return losses if weights is None else losses * weights

    def report(self, logps, counts, ref_logps, *, weights=None):
        return {"margin": logps.new_full((), self.margin)}


@heads.register("test_trainers_gain")
@dataclass(frozen=True)
class Gain(heads.Head):
    """A loss of single completions that takes the trainer's reference point."""

    group = 1

    def losses(self, logps, counts, ref_logps, *, desirable, z0):
        sign = torch.where(desirable, 1.0, -1.0)
        return torch.nn.functional.softplus(-sign * 0.2 * (logps - ref_logps - z0))


def by_hand(logps, counts, ref_logps, *, weights=None):
    """A function without a reference, unregistered."""
    averages = logps / counts
    chosen, rejected = averages.chunk(2)
    return torch.relu(1 - chosen + rejected)


by_hand.needs_reference = False
by_hand.group = 2
MIX = heads.Mix((1.0, heads.make("sigmoid")), (0.5, heads.make("sft")), (0.25, Margin()))


def plain_run(kind, trainer, policy, ref):
    """Train copies in float64 with the plain twin of the loss, in order, and return log entries and the policy."""
    args, policy, shift = trainer.args, copy.deepcopy(policy).double(), {True: None, False: None}
    ref = copy.deepcopy(ref).double()
    optimizer = torch.optim.SGD(policy.parameters(), lr=args.learning_rate)
    entries = []
    for batch in in_order(trainer, trainer.train_dataset, args.per_device_train_batch_size):
        given = {name: batch[name] for name in ("weights", "desirable") if name in batch}
        if kind == "dpo":
            batch = {name: torch.cat([batch[name][:, 0], batch[name][:, 1]]) for name in batch if name != "weights"}
        elif trainer.needs_mismatched:
            given["z0"] = plain_reference_point(policy, ref, batch, args)
        if getattr(trainer.loss, "name", "") == "bco":
            given["delta"] = sum(value or 0.0 for value in shift.values()) / 2
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if trainer.needs_reference:
            with torch.no_grad():
                given["ref_logits"] = ref(**inputs).logits
        optimizer.zero_grad()
        loss, metrics = reference.loss(trainer.loss, policy(**inputs).logits, batch["labels"], **given)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        optimizer.step()
        for side in shift:
            if kind == "kto" and (batch["desirable"] == side).any():
                mean = metrics.rewards[batch["desirable"] == side].mean().item()
                former = shift[side]
                shift[side] = mean if former is None else 0.9 * former + 0.1 * mean
        entries.append({"loss": loss.item()} | {name: float(value) for name, value in metrics.reported.items()})
    return entries, policy


def weighted(kind, rows):
    records = data(kind, rows)
    return records.add_column("weight", [0.5 * (row % 4) for row in range(rows)])


def check_against_plain_run(kind, folder, *, train=11, loss=None, **settings):
    policy, ref = model(), model(seed=1)
    is_free = loss is by_hand or settings.get("loss_type") in ("cpo", "orpo")
    trainer = make_trainer(
        kind,
        folder,
        policy=copy.deepcopy(policy),
        ref_model=None if is_free else copy.deepcopy(ref),
        train=train,
        train_sampling_strategy="sequential",
        loss=loss,
        **settings,
    )
    expected, trained = plain_run(kind, trainer, policy, ref)
    trainer.train()
    assert_near(history(trainer), expected)
    assert_same_steps(weights(trainer), trained.state_dict(), policy.state_dict())
    return trainer


@pytest.mark.parametrize("loss_type", KERNEL_FREE)
def test_a_batch_has_the_loss_of_every_head_of_pairs(tmp_path, loss_type):
    trainer = make_trainer("dpo", tmp_path, loss_type=loss_type, train=4)
    batch = next(iter(trainer.get_train_dataloader()))
    rows = {name: torch.cat([values[:, 0], values[:, 1]]) for name, values in batch.items()}
    policy, given = model(seed=3), {}
    if trainer.needs_reference:
        given["ref_logits"] = trainer.ref_model(input_ids=rows["input_ids"]).logits
    found, metrics = trainer.compute_loss(policy.train(), batch, return_outputs=True)
    expected, truth = reference.loss(loss_type, policy(input_ids=rows["input_ids"]).logits, rows["labels"], **given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics.rewards, truth.rewards, rtol=1e-4, atol=1e-4)
    assert {"rewards/chosen", "rewards/margins", "rewards/accuracies"} <= metrics.summary().keys()


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.3},
        {"loss_type": "cpo", "cpo_loss_type": "hinge", "cpo_alpha": 0.3},
        {"loss_type": "test_trainers_margin", "beta": 0.3},
        {"loss_type": "sigmoid", "ld_alpha": 0.3},
        {"loss_type": ["ipo", "sft"], "ld_alpha": 0.5},
        {"loss_type": "hinge", "use_weighting": True},
        {"loss": Margin(margin=0.3)},
        {"loss": MIX},
        {"loss": by_hand},
        {"loss": Margin(), "train": weighted("dpo", 11)},
        {"loss": by_hand, "train": weighted("dpo", 11)},
        {"loss_type": "orpo", "train": weighted("dpo", 11), "loss_from": "logits"},
        {"loss_type": "sigmoid", "train": weighted("dpo", 11)},
    ],
    ids=[
        "list",
        "prefixed",
        "name",
        "ld_alpha",
        "ld_alpha-sft",
        "wpo",
        "object",
        "mix",
        "function",
        "own-weights",
        "function-weights",
        "logits",
        "weights",
    ],
)
def test_pairs_train_with_any_loss(tmp_path, settings):
    trainer = check_against_plain_run("dpo", tmp_path, **settings)
    assert "rewards/accuracies" in history(trainer)[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "bco"},
        {"loss_type": "bco", "train": weighted("kto", 11), "loss_from": "logits"},
        {"loss_type": "kto", "train": weighted("kto", 11)},
        {"loss_type": "apo_zero_unpaired", "train": weighted("kto", 11)},
        {"loss_type": ["kto", "apo_zero_unpaired"], "loss_weights": [1.0, 0.5]},
        {"loss": Gain()},
    ],
    ids=["bco", "bco-weights", "kto-weights", "apo-weights", "list", "own"],
)
def test_single_completions_train_with_any_loss(tmp_path, settings):
    trainer = check_against_plain_run("kto", tmp_path, **settings)
    assert "rewards/chosen" in {name for entry in history(trainer) for name in entry}
    if settings.get("loss_type") == "bco":
        assert [entry["delta"] == 0 for entry in history(trainer)] == [True, False, False]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("dpo", {"loss_type": "exo_pair", "train": weighted("dpo", 19)}),
        ("kto", {"loss_type": "bco", "train": weighted("kto", 19)}),
    ],
    ids=["exo_pair", "bco"],
)
def test_accumulated_batches_make_the_step_of_one_large_batch_for_any_loss(tmp_path, kind, settings):
    runs = {}
    for size, number in ((8, 1), (2, 4)):
        parts = {"per_device_train_batch_size": size, "gradient_accumulation_steps": number}
        trainer = make_trainer(kind, tmp_path, ref_model=model(seed=1), **parts, **settings)
        trainer.train()
        runs[number] = trainer
    assert_near(history(runs[4]), history(runs[1]), but=("epoch",))
    assert_same_steps(weights(runs[4]), weights(runs[1]), model().state_dict())


def test_orpo_reads_the_prompts_too_if_asked(tmp_path):
    trainer = make_trainer("dpo", tmp_path, loss_type="orpo", nll_on="all", train=4, evaluation=6)
    batch = next(iter(trainer.get_train_dataloader()))
    rows = {name: torch.cat([values[:, 0], values[:, 1]]) for name, values in batch.items()}
    policy = model(seed=3)
    found = trainer.compute_loss(policy.train(), batch)
    logps = torch.log_softmax(policy(input_ids=rows["input_ids"]).logits.double()[:, :-1], -1)
    logps = logps.gather(-1, rows["input_ids"][:, 1:, None])[..., 0]
    is_completion = rows["labels"][:, 1:] != -100
    is_chosen = rows["attention_mask"][:, 1:].bool() & (torch.arange(8)[:, None] < 4)
    average = (logps * is_completion).sum(1) / is_completion.sum(1)
    odds = average - torch.log(-torch.expm1(average))
    chosen, rejected = odds.chunk(2)
    expected = -logps[is_chosen].mean() - 0.1 * torch.nn.functional.logsigmoid(chosen - rejected).mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert trainer.evaluate()["eval_loss"] > 0


def test_precomputed_references_are_those_of_their_ld_alpha(tmp_path):
    settings = {"ref_model": model(seed=1), "train": 8, "loss_type": "sigmoid"}
    live = make_trainer("dpo", tmp_path, ld_alpha=0.3, **settings)
    live.train()
    cache = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache")}
    for ld_alpha in (1.0, 0.3):  # the values of 1 must not be taken for those of 0.3
        kept = make_trainer("dpo", tmp_path, ld_alpha=ld_alpha, **settings, **cache)
    kept.train()
    assert_near(history(kept), history(live))


def test_a_run_of_bco_resumes_to_the_bit_with_its_reward_shift(tmp_path):
    def outcome(trainer):
        assert trainer._reward_shift.is_known.all()
        return {"history": history(trainer), "weights": weights(trainer), "shift": trainer._reward_shift.means.tolist()}

    runs = stop_and_resume(
        tmp_path, functools.partial(make_trainer, "kto", loss_type="bco", ref_model=model(seed=1)), outcome
    )
    assert runs["whole"]["history"] == runs["resumed"]["history"]
    assert runs["whole"]["shift"] == runs["resumed"]["shift"] != [0.0, 0.0]
    for name, tensor in runs["whole"]["weights"].items():
        assert tensor.equal(runs["resumed"]["weights"][name]), name


def test_evaluations_move_no_reward_shift(tmp_path):
    runs = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1, "evaluation": 5}):
        trainer = make_trainer("kto", tmp_path, loss_type="bco", ref_model=model(seed=1), **settings)
        trainer.train()
        runs.append([entry for entry in history(trainer) if "loss" in entry])
        if settings:
            assert all("eval_delta" in entry for entry in history(trainer) if "eval_loss" in entry)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("loss_type", ["aot", "orpo", "sigmoid"])
def test_an_evaluation_reports_the_loss_of_its_batches(tmp_path, loss_type):
    """One batch of 4 pairs and one of 2: the mean weighs them by their pairs."""
    ref = None if loss_type == "orpo" else model(seed=1)
    trainer = make_trainer("dpo", tmp_path, loss_type=loss_type, ref_model=ref, train=4, evaluation=6)
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    losses = [trainer.compute_loss(trainer.model.eval(), batch).item() for batch in trainer.get_eval_dataloader()]
    assert found == pytest.approx((4 * losses[0] + 2 * losses[1]) / 6, rel=1e-6)


def test_a_checkpoint_belongs_to_its_loss(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "train": 8}
    make_trainer("dpo", tmp_path, loss=Margin(), **settings).train()
    again = make_trainer("dpo", tmp_path, loss=Margin(margin=0.2), **settings)
    said = "loss_type: Margin(margin=1.0, beta=0.5) in the checkpoint, Margin(margin=0.2, beta=0.5) now"
    with pytest.raises(CheckpointError, match=re.escape(said)):
        again.train(resume_from_checkpoint=True)


def config(kind, folder, **options):
    kinds = {"kto": FusedKTOConfig, "dpo": FusedDPOConfig}
    return kinds[kind](output_dir=str(folder), use_cpu=True, report_to=[], **options)


def test_options_hold_the_values_of_the_chosen_loss(tmp_path):
    simpo = config("dpo", tmp_path, loss_type="simpo")
    assert (simpo.beta, simpo.gamma, simpo.label_smoothing, simpo.cpo_alpha) == (2.0, 0.5, 0.0, None)
    assert simpo.make_loss() == heads.make("simpo")
    mix = config("dpo", tmp_path, loss_type=["simpo", "sigmoid"], label_smoothing=0.1)
    assert (mix.beta, mix.label_smoothing) == (None, 0.1)
    assert mix.make_loss() == heads.Mix(
        (1.0, heads.make("simpo", label_smoothing=0.1)), (1.0, heads.make("sigmoid", label_smoothing=0.1))
    )
    assert config("dpo", tmp_path, loss_type=["ipo"]).loss_type == "ipo"
    again = config("dpo", tmp_path, **{name: getattr(simpo, name) for name in ("loss_type", "beta", "gamma")})
    assert again.make_loss() == simpo.make_loss()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "dpo",
            {"loss_type": "hinge", "label_smoothing": 0.1},
            "label_smoothing=0.1 has no meaning for loss_type='hin",
        ),
        ("dpo", {"loss_type": "sft", "beta": 0.1}, "beta=0.1 has no meaning for loss_type='sft': it belongs to"),
        ("dpo", {"gamma": 0.5}, "gamma=0.5 has no meaning for loss_type='sigmoid': it belongs to ['alphapo', 'simpo']"),
        ("dpo", {"loss_type": "kto"}, "loss_type must be one of"),
        ("dpo", {"loss_type": ["sigmoid", "sigmoid"]}, "loss_type names a loss twice"),
        ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights must hold one weight per loss"),
        (
            "dpo",
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, -1.0]},
            "a weight of Mix must be a finite numb",
        ),
        ("dpo", {"f_divergence_type": "kl"}, "f_divergence_type must be one of"),
        ("dpo", {"loss_type": "cpo", "cpo_loss_type": "kto"}, "loss_type must be one of"),
        ("kto", {"loss_type": "bco", "reference_point": 0.5}, "reference_point=0.5 has no meaning for loss_type='bco'"),
        ("kto", {"loss_type": "kto", "reward_shift_decay": 0.5}, "reward_shift_decay=0.5 has no meaning for loss_type"),
        ("kto", {"loss_type": "bco", "reward_shift_decay": 1.0}, "reward_shift_decay must lie in [0, 1), got 1.0"),
        (
            "kto",
            {"loss_type": "bco", "average_log_prob": True},
            "average_log_prob=True has no meaning for loss_type='b",
        ),
    ],
)
def test_options_that_the_loss_does_not_have_are_refused(tmp_path, kind, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(kind, tmp_path, **options)


@dataclass(frozen=True)
class NeedsMore(heads.Head):
    group = 2

    def losses(self, logps, counts, ref_logps, *, scores):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("dpo", {"loss": heads.make("ppo")}, "is a loss of single tokens, and FusedDPOTrainer trains losses of pairs"),
        ("kto", {"loss": heads.make("nll")}, "is a loss of single tokens, and FusedKTOTrainer"),
        ("dpo", {"loss": heads.make("bco")}, "is a loss of single completions (FusedKTOTrainer), and FusedDPOTrainer"),
        ("kto", {"loss": heads.make("ipo")}, "is a loss of pairs (FusedDPOTrainer), and FusedKTOTrainer"),
        ("dpo", {"loss": NeedsMore()}, "NeedsMore() needs the tensors ['scores'], and FusedDPOTrainer has none of"),
        ("dpo", {"loss": Margin(), "beta": 0.2}, "is given, and beta=0.2 too: set the numbers of a loss on the loss"),
        ("dpo", {"loss": "squared"}, "no loss is registered as 'squared'"),
        ("dpo", {"loss": math.sqrt}, "math.sqrt does not take the arguments of a loss (too many positional arguments)"),
        (
            "dpo",
            {"loss_type": "aot", "gradient_accumulation_steps": 2},
            "reads the whole batch, which would lie in 2 p",
        ),
        ("dpo", {"loss": by_hand, "ref_model": model()}, "has no reference: leave ref_model out"),
        (
            "dpo",
            {"loss": by_hand, "precompute_ref_log_probs": True},
            "precompute_ref_log_probs=True has no meaning wit",
        ),
        ("kto", {"loss_type": ["kto", "bco"]}, "mixes a loss that takes delta, the moving mean of its own rewards"),
        ("kto", {"loss": Gain(), "reference_point": "batch_mean"}, "takes z0, and reference_point is 'batch_mean'"),
        (
            "kto",
            {"loss": heads.make("kto", reference_point=0.1), "reference_point": 0.2},
            "and KTO(beta=0.1, desirable",
        ),
        (
            "kto",
            {"average_log_prob": True, "train": weighted("kto", 6)},
            "a weight, which average_log_prob=True does n",
        ),
    ],
)
def test_a_loss_that_the_recipe_cannot_train_is_refused_at_construction(tmp_path, kind, settings, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        make_trainer(kind, tmp_path, **settings)


def test_the_log_says_which_mean_a_loss_per_token_is(tmp_path, caplog):
    make_trainer("dpo", tmp_path, loss_type="orpo", gradient_accumulation_steps=2)
    assert "divides by the tokens of one device's batch" in caplog.text
    make_trainer("dpo", tmp_path, loss=by_hand)
    assert "by_hand is not registered: it takes 4 GEMMs" in caplog.text
