"""The loops of SPIN, online DPO and KTO are their plain twins, and resume to the bit from any point of any round."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from loop_cases import (
    KillAt,
    KilledError,
    assert_same_weights,
    judge,
    make_loop,
    outcome,
    plain_dpo_run,
    plain_token_logps,
    samples_by_prompt,
    step,
)
from tiny_training import lora_config, model

from kto_fused.trainers import checkpoints
from kto_fused.trainers.rounds import RoundError, read_samples

pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")


def logged_losses(loop, number):
    return [entry["loss"] for entry in loop.state["rounds"][number - 1]["log"]]


def policy_of(loop, number):
    """Return the float64 policy that round ``number`` begins with."""
    before = loop.checkpoint_before(number)
    policy = model(max_position_embeddings=64) if before is None else type(model()).from_pretrained(before)
    return policy.double().eval()


def test_a_round_of_spin_is_its_plain_twin(tmp_path):
    """Chosen: the data's answer; rejected: the sample; reference: the model that the round begins with."""
    loop = make_loop("spin", tmp_path / "spin", beta=0.5)
    loop.run()
    for number in (1, 2):
        samples = samples_by_prompt(loop, number)
        pairs = [(one.ids, one.answer_ids[len(one.ids) :], samples[one.number][0]["ids"]) for one in loop.data]
        policy = policy_of(loop, number)
        losses = plain_dpo_run(policy, copy.deepcopy(policy), pairs, steps=3, batch=4, beta=0.5, rate=0.5)
        assert logged_losses(loop, number) == pytest.approx(losses, abs=2e-5)
        assert_same_weights(tmp_path / "spin" / f"round-{number}" / "checkpoint-3", policy)
    assert all(label.endswith("</s>") for label in loop.tokenizer.batch_decode([one.answer_ids for one in loop.data]))


def test_a_round_of_online_dpo_is_its_plain_twin(tmp_path):
    """Best and worst of a prompt's samples make a pair; the reference is the model that the run began with."""
    loop = make_loop("dpo", tmp_path / "dpo", beta=0.5, samples=3)
    loop.run()
    for number in (1, 2):
        pairs, samples = [], samples_by_prompt(loop, number)
        for prompt in loop.data:
            lines = samples[prompt.number]
            (scores,) = judge([prompt.text], [[line["completion"] for line in lines]])
            assert scores == [line["score"] for line in lines]
            best, worst = (choose(lines, key=lambda line: line["score"]) for choose in (max, min))
            if best["score"] != worst["score"]:
                pairs.append((prompt.ids, best["ids"], worst["ids"]))
        policy, start = policy_of(loop, number), policy_of(loop, 1)
        losses = plain_dpo_run(policy, start, pairs, steps=3, batch=4, beta=0.5, rate=0.5)
        assert logged_losses(loop, number) == pytest.approx(losses, abs=2e-5)
        assert_same_weights(tmp_path / "dpo" / f"round-{number}" / "checkpoint-3", policy)


@pytest.mark.parametrize("threshold", ["mean", "prompt_mean", "0.35"])
def test_a_step_of_online_kto_is_its_plain_twin(tmp_path, threshold):
    """loss = 1 - sigma(+-beta (r - z0)), + above the threshold; samples at the threshold are left out."""
    loop = make_loop(
        "kto", tmp_path / "kto", beta=0.5, reference_point=0.25, max_steps=1, rounds=1, samples=3, threshold=threshold
    )
    loop.run()
    lines = read_samples(tmp_path / "kto" / "round-1")
    scores = [line["score"] for line in lines]
    limits = [0.35 if threshold == "0.35" else sum(scores) / len(scores)] * len(lines)
    if threshold == "prompt_mean":
        limits = [sum(scores[row // 3 * 3 : row // 3 * 3 + 3]) / 3 for row in range(len(lines))]
    labelled = [
        (line, score > limit) for line, score, limit in zip(lines, scores, limits, strict=True) if score != limit
    ]
    policy, prompts, loss = policy_of(loop, 1), {one.number: one.ids for one in loop.data}, 0
    for line, is_desirable in labelled[:4]:
        logp = plain_token_logps(policy, prompts[line["prompt_number"]], line["ids"])[0].sum()
        sign = 1 if is_desirable else -1
        loss = loss + (1 - torch.sigmoid(sign * 0.5 * (logp - logp.detach() - 0.25))) / 4
    assert logged_losses(loop, 1) == pytest.approx([loss.item()], abs=2e-5)
    step(policy, loss, 0.5)
    assert_same_weights(tmp_path / "kto" / "round-1" / "checkpoint-1", policy)
    assert loop.state["rounds"][0]["desirable"] == sum(label for _, label in labelled) / len(labelled)


def test_ties_are_dropped_and_counted(tmp_path):
    asked = []

    def rarely(prompts, completions):
        asked.extend(prompts)
        return [[float(index == 1 and len(asked) <= 3) for index in range(4)]]

    loop = make_loop("dpo", tmp_path / "dpo", rounds=1, max_steps=1, judged=rarely)
    (entry,) = loop.run()
    assert (entry["examples"], entry["ties"]) == (3, 6)
    loop = make_loop("dpo", tmp_path / "none", judged=lambda prompts, of: [[1.0] * 4 for _ in prompts])
    with pytest.raises(RoundError, match="round 1: the judge's scores tell no samples apart"):
        loop.run()


def test_a_sample_at_its_prompts_mean_is_left_out_whatever_the_rounding(tmp_path):
    """The floating-point mean of 0.1, 0.1, 0.1 is not 0.1."""
    scores = {0: [0.1, 0.2, 0.6]}
    asked = iter(range(9))
    loop = make_loop(
        "kto",
        tmp_path / "kto",
        judged=lambda prompts, of: [scores.get(next(asked), [0.1] * 3)],
        samples=3,
        rounds=1,
        max_steps=1,
        threshold="prompt_mean",
        reference_point=0.0,
    )
    (entry,) = loop.run()
    assert (entry["examples"], entry["ties"], entry["desirable"]) == (3, 24, 1 / 3)


def test_answers_that_are_cut_are_told(tmp_path, caplog):
    loop = make_loop("spin", tmp_path / "spin", rounds=1, max_steps=1, max_length=10, max_new_tokens=4)
    whole = [len(one.answer_ids) for one in loop.data]
    too_long = sum(length > 10 for length in whole)
    assert 0 < too_long < len(whole)
    (entry,) = loop.run()
    assert entry["cut_answers"] == too_long
    assert f"the data's answers of {too_long} of {len(whole)} pairs are cut to max_length, 10 tokens" in caplog.text
    data = Dataset.load_from_disk(str(tmp_path / "spin" / "round-1" / "data"))
    assert max(len(row["prompt_ids"] + row["chosen_ids"]) for row in data) == 10


@pytest.mark.parametrize("kind", ["spin", "kto", "ppo", "lora"])
def test_a_run_killed_at_any_point_of_any_round_ends_as_one_that_was_not(tmp_path, monkeypatch, kind):
    """Killed while it samples, within the training, after it, and between rounds; each time started again."""
    options = {"optim": "adamw_torch", "learning_rate": 0.02, "save_strategy": "steps", "save_steps": 1}
    options |= {"disable_dropout": True, "train_sampling_strategy": "random", "prompts": 6}
    if kind == "lora":
        pytest.importorskip("peft")
        options["peft_config"] = lora_config()

    def make(folder):
        return make_loop("dpo" if kind == "lora" else kind, tmp_path / folder, **options)

    whole = make("whole")
    whole.run()
    killed = make("killed")
    calls = []

    def fails_once(name, call):
        def failing(*arguments, **named):
            calls.append(name)
            if calls.count(name) == call:
                raise KilledError
            return original(*arguments, **named)

        original = getattr(type(killed), name)
        monkeypatch.setattr(type(killed), name, failing)

    fails_once("token_values", 1)  # in round 1, before the samples are written
    fails_once("_save_state", 3)  # after they are written, before that is noted
    fails_once("_moved", 2)  # in round 2, after its last step
    make_trainer, kills = type(killed).make_trainer, [KillAt(1), KillAt(2), KillAt(2)]

    def with_kill(self, *arguments, **named):
        trainer = make_trainer(self, *arguments, **named)
        if kills:
            trainer.add_callback(kills.pop(0))
        return trainer

    monkeypatch.setattr(type(killed), "make_trainer", with_kill)
    deaths = 0
    while deaths < 12:
        try:
            killed.run()
            break
        except KilledError:
            deaths += 1
            killed = make("killed")
    assert deaths >= 5
    assert outcome(killed) == outcome(whole)


def test_a_run_with_other_settings_is_refused_and_more_rounds_go_on(tmp_path):
    make_loop("dpo", tmp_path / "run", rounds=1, max_steps=1).run()
    longer = make_loop("dpo", tmp_path / "run", rounds=3, max_steps=1)
    longer.run()
    assert outcome(longer) == outcome_of_one_go(tmp_path)
    assert not list((tmp_path / "run" / "round-1").glob("checkpoint-*")), "only two rounds' checkpoints are kept"
    with pytest.raises(checkpoints.CheckpointError, match=r"temperature: 1.0 then, .*max_length: auto then, 20 now"):
        make_loop("dpo", tmp_path / "run", rounds=3, max_steps=1, temperature=0.5, max_length=20).run()


def outcome_of_one_go(tmp_path):
    loop = make_loop("dpo", tmp_path / "one_go", rounds=3, max_steps=1)
    loop.run()
    return outcome(loop)


def test_a_diverging_round_names_the_last_good_checkpoint(tmp_path):
    make_loop("dpo", tmp_path / "run", rounds=1, max_steps=1).run()
    good = tmp_path / "run" / "round-1" / "checkpoint-1"
    with pytest.raises(RoundError, match=f"round 2 diverged: it moved the policy by .* max_kl is .*{good}"):
        make_loop("dpo", tmp_path / "run", max_steps=1, max_kl=1e-9, resume_anyway=True).run()
    with pytest.raises(RoundError, match=r"round 1 diverged: (loss|grad_norm) is (nan|inf).*weights are"):
        make_loop("dpo", tmp_path / "nan", learning_rate=1e30, max_steps=3).run()
    policy = model(max_position_embeddings=64)
    policy.lm_head.weight.data[1] = 1e3 * policy.model.norm.weight.data.sign()
    policy.generation_config.eos_token_id = None
    loop = make_loop("dpo", tmp_path / "equal", policy=policy)
    loop.generate = lambda *_: [one._replace(ids=[5]) for one in loop_samples(loop)]
    with pytest.raises(RoundError, match=r"round 1 diverged: all 36 samples are equal: 'w2'"):
        loop.run()
    loop.generate = lambda *_: [one._replace(ids=[1]) for one in loop_samples(loop)]
    with pytest.raises(RoundError, match="round 1 diverged: all 36 samples are empty"):
        loop.run()


def loop_samples(loop):
    from kto_fused.trainers.generation import Sample

    return [Sample(prompt.number, sample, [], False) for prompt in loop.data for sample in range(loop.samples)]


def test_each_round_takes_the_next_prompts(tmp_path):
    loop = make_loop("dpo", tmp_path / "run", prompts=4, rounds=3, max_steps=1)
    assert [len({one.number for one in loop.prompts_of(number)}) for number in (1, 2, 3, 4)] == [4] * 4
    loop = make_loop("dpo", tmp_path / "run", prompts=3, rounds=3, max_steps=1)
    taken = [{one.number for one in loop.prompts_of(number)} for number in (1, 2, 3)]
    assert set.union(*taken) == set(range(9))
    assert {one.number for one in loop.prompts_of(4)} != taken[0]
    loop.run()
    lines = read_samples(tmp_path / "run" / "round-2")
    assert {line["prompt_number"] for line in lines} == taken[1]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["rounds"][1]["samples"] == 12
