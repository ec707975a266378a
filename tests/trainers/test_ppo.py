"""A whole round of PPO, and of the group-relative methods, is its plain twin in float64: every loss and gradient."""

import copy
import itertools
import math

import pytest
import torch
from loop_cases import assert_same_weights, make_loop, plain_token_logps
from safetensors.torch import load_file
from tiny_training import lora_config, model
from transformers import LlamaForTokenClassification

from kto_fused.functional import linear_token_logps
from kto_fused.heads.protocol import class_of
from kto_fused.heads.tokens import clipped_losses
from kto_fused.trainers.ppo import ratio_totals
from kto_fused.trainers.ppo_config import FusedPPOConfig
from kto_fused.trainers.rounds import RoundError, read_samples

pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")


class PlainPPO:
    """PPO on one round's samples, by loops over tokens."""

    def __init__(self, loop, number, critic=None, critic_file=None):
        before = loop.checkpoint_before(number)
        first = model(max_position_embeddings=64).double().eval()
        self.args, self.loop, self.number = loop.config, loop, number
        self.policy = copy.deepcopy(first)
        if before is not None:
            self.policy = type(self.policy).from_pretrained(before).double().eval()
        self.head = torch.nn.Linear(16, 1).double()
        for parameter in self.head.parameters():
            parameter.data.zero_()
        self.critic = critic
        if critic_file is not None:
            state = load_file(critic_file)
            self.head.load_state_dict({name.removeprefix("linear."): value.double() for name, value in state.items()})
        ids = {one.number: one.ids for one in loop.data}
        self.rows = [
            (ids[line["prompt_number"]], line["ids"]) for line in read_samples(loop.output / f"round-{number}")
        ]
        scores = [line["score"] for line in read_samples(loop.output / f"round-{number}")]
        with torch.no_grad():
            self.old = [self.logps_and_values(*row) for row in self.rows]
            self.ref = [plain_token_logps(first, *row, loop.settings.temperature)[0] for row in self.rows]
        self.returns = [None] * len(self.rows)
        if self.args.advantage == "gae":
            self.estimate(scores)
        else:
            size = loop.samples
            groups = torch.tensor(scores, dtype=torch.float64).view(-1, size)
            relative = groups - groups.mean(1, keepdim=True)
            if self.args.scale_by_std:
                relative = relative / (groups.std(1, keepdim=True) + 1e-4)
            self.advantages = [
                value.expand(len(row[1])) for value, row in zip(relative.flatten(), self.rows, strict=True)
            ]

    def logps_and_values(self, prompt, ids):
        logps, hidden = plain_token_logps(self.policy, prompt, ids, self.loop.settings.temperature)
        if self.critic is None:
            return logps, self.head(hidden)[:, 0]
        values = self.critic(input_ids=torch.tensor([prompt + ids])).logits[0, :, 0]
        return logps, values[len(prompt) - 1 : -1]

    def estimate(self, scores):
        self.advantages = []
        for row, ((logps, values), ref, score) in enumerate(zip(self.old, self.ref, scores, strict=True)):
            rewards = -self.args.beta * (logps - ref)
            rewards[-1] += score
            advantage, found = 0.0, []
            for position in reversed(range(len(rewards))):
                following = values[position + 1] if position + 1 < len(rewards) else 0.0
                delta = rewards[position] + self.args.gamma * following - values[position]
                advantage = delta + self.args.gamma * self.args.lam * advantage
                found.insert(0, advantage)
            self.advantages.append(torch.stack(found))
            self.returns[row] = self.advantages[-1] + values
        every = torch.cat(self.advantages)
        self.kl = sum((now[0] - ref).sum() for now, ref in zip(self.old, self.ref, strict=True)) / len(self.rows)
        self.advantages = [(each - every.mean()) / (every.std() + 1e-8) for each in self.advantages]

    def loss(self, rows):
        args, total, clipped, tokens = self.args, 0, 0, sum(len(self.rows[row][1]) for row in rows)
        low, high = args.clip if isinstance(args.clip, (list, tuple)) else (args.clip, args.clip)
        for row in rows:
            now, values = self.logps_and_values(*self.rows[row])
            old_values, count = self.old[row][1], len(now)
            if args.loss_type == "gspo":
                ratio, advantage = ((now - self.old[row][0]).sum() / count).exp(), self.advantages[row][0]
                total = total - min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage) / len(rows)
                clipped += int((advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low))
            for t in range(count):
                ratio, advantage = (now[t] - self.old[row][0][t]).exp(), self.advantages[row][t]
                if args.loss_type == "gspo":
                    loss = torch.zeros((), dtype=torch.float64)
                elif args.loss_type == "cispo":
                    loss = -ratio.detach().clamp(max=5.0) * advantage * now[t]
                elif args.loss_type == "sapo":
                    tau = args.tau_pos if advantage > 0 else args.tau_neg
                    loss = -4 / tau / (1 + (tau * (1 - ratio)).exp()) * advantage
                else:
                    loss = -min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
                    clipped += int((advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low))
                if args.advantage == "group":
                    d = self.ref[row][t] - now[t]
                    loss = loss + args.beta * (d.exp() - d - 1)
                else:
                    error = (values[t] - self.returns[row][t]) ** 2
                    bounded = values[t].clamp(old_values[t] - args.value_clip, old_values[t] + args.value_clip)
                    loss = loss + args.value_coef * max(error, (bounded - self.returns[row][t]) ** 2)
                of_sequences = 1 / (count * len(rows))
                weight = {
                    "grpo": of_sequences,
                    "gspo": of_sequences,
                    "sapo": of_sequences,
                    "dr_grpo": 1 / (len(rows) * (args.max_tokens or 1)),
                }
                total = total + loss * weight.get(args.loss_type, 1 / tokens)
        return total, clipped / (len(rows) if args.loss_type == "gspo" else tokens)

    def run(self, batch):
        """Train as the trainer does, in order; return each step's loss and clip fraction."""
        modules = [self.policy, self.head if self.critic is None else self.critic]
        parameters = [parameter for module in modules for parameter in module.parameters()]
        logged, start = [], 0
        for _ in range(self.args.max_steps):
            rows = range(start, min(start + batch, len(self.rows)))
            start = start + batch if start + batch < len(self.rows) else 0
            loss, clipped = self.loss(rows)
            logged.append((loss.item(), clipped))
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    parameter.data -= self.args.learning_rate * grad
        return logged


OPTIONS = {"prompts": 4, "samples": 2, "max_new_tokens": 5, "temperature": 0.8, "learning_rate": 0.3, "max_steps": 4}
GROUP = {"advantage": "group", "beta": 0.3, "samples": 4, "prompts": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.2, "gamma": 0.9, "lam": 0.8, "value_coef": 0.5, "value_clip": 0.05, "rounds": 2},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "value_clip": 0.01, "clip": 0.05},
        {**GROUP, "clip": [0.2, 0.3], "rounds": 2},
        {**GROUP, "loss_type": "dr_grpo", "max_tokens": 7, "scale_by_std": False},
        {**GROUP, "loss_type": "dapo", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {**GROUP, "loss_type": "cispo", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {**GROUP, "loss_type": "sapo", "tau_neg": 1.5},
        {**GROUP, "loss_type": "gspo", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {**GROUP, "loss_type": "gspo", "beta": 0.0, "clip": [0.01, 0.02], "loss_from": "logits"},
        {**GROUP, "loss_from": "logits"},
    ],
    ids=["gae", "accumulated", "grpo", "dr_grpo", "dapo", "cispo", "sapo", "gspo", "gspo_logits", "grpo_logits"],
)
def test_a_round_is_its_plain_twin(tmp_path, options):
    options = {**OPTIONS, "rounds": 1, "num_train_epochs": 4, **options}
    loop = make_loop("ppo", tmp_path / "ppo", **options)
    rounds = loop.run()
    for number in range(1, options["rounds"] + 1):
        folder = tmp_path / "ppo" / f"round-{number}" / "checkpoint-4"
        is_gae = loop.config.advantage == "gae"
        before = loop.checkpoint_before(number)
        plain = PlainPPO(loop, number, critic_file=f"{before}/critic.safetensors" if before and is_gae else None)
        losses = plain.run(batch=4)
        log = rounds[number - 1]["log"]
        assert [step["loss"] for step in log] == pytest.approx([loss for loss, _ in losses], abs=5e-5)
        is_clipped = loop.config.loss_type not in ("cispo", "sapo")
        if is_clipped:
            assert [step["clip_fraction"] for step in log] == pytest.approx([clipped for _, clipped in losses])
        assert_same_weights(folder, plain.policy, tolerance=5e-5)
        if is_gae:
            state = load_file(folder / "critic.safetensors")
            torch.testing.assert_close(state["linear.weight"].double(), plain.head.weight.data, rtol=0, atol=5e-5)
            assert rounds[number - 1]["kl_reference"] == pytest.approx(plain.kl.item(), abs=1e-4)
        assert any(clipped for _, clipped in losses) or not is_clipped, "nothing was clipped"


def test_a_value_model_of_its_own_is_trained_with_the_policy(tmp_path):
    torch.manual_seed(1)
    config = model(max_position_embeddings=64).config
    config.num_labels = 1
    critic = LlamaForTokenClassification(config)
    critic.save_pretrained(tmp_path / "critic")
    options = {**OPTIONS, "rounds": 1, "value_model": str(tmp_path / "critic"), "loss_from": "logits"}
    loop = make_loop("ppo", tmp_path / "ppo", **options)
    (entry,) = loop.run()
    plain = PlainPPO(loop, 1, critic=copy.deepcopy(critic).double().eval())
    losses = plain.run(batch=4)
    assert [step["loss"] for step in entry["log"]] == pytest.approx([loss for loss, _ in losses], abs=5e-5)
    state = load_file(tmp_path / "ppo" / "round-1" / "checkpoint-4" / "critic.safetensors")
    for name, tensor in plain.critic.state_dict().items():
        torch.testing.assert_close(state[f"model.{name}"].double(), tensor, rtol=0, atol=5e-5)
    assert_same_weights(tmp_path / "ppo" / "round-1" / "checkpoint-4", plain.policy, tolerance=5e-5)


def test_an_adapter_is_compared_with_the_model_without_it(tmp_path):
    pytest.importorskip("peft")
    loop = make_loop("ppo", tmp_path / "ppo", **OPTIONS, peft_config=lora_config(init_lora_weights=True))
    first, second = loop.run()
    assert first["kl_reference"] == pytest.approx(0, abs=1e-5)
    assert second["kl_reference"] != pytest.approx(0, abs=1e-5)
    saved = {path.name for path in (tmp_path / "ppo" / "round-2" / "checkpoint-4").glob("*.safetensors")}
    assert saved == {"adapter_model.safetensors", "critic.safetensors"}


def test_the_kl_coefficient_adapts_towards_its_target(tmp_path):
    """beta (1 + clip(KL / target - 1, -0.2, 0.2) min(samples / horizon, 1))."""
    loop = make_loop("ppo", tmp_path / "ppo", **OPTIONS, beta=0.1, kl_target=0.5, kl_horizon=20, rounds=3)
    rounds = loop.run()
    assert rounds[0]["beta"] == 0.1
    for before, after in itertools.pairwise(rounds):
        error = min(max(before["kl_reference"] / 0.5 - 1, -0.2), 0.2)
        assert after["beta"] == pytest.approx(before["beta"] * (1 + error * 8 / 20))
    loop.config.kl_horizon = 1
    loop.state["rounds"][0] |= {"kl_reference": 0.0, "samples": 100}
    assert loop._beta(2) == pytest.approx(0.1 * 0.8), "a round of many samples changes beta by more than a fifth"


def test_equal_scores_have_no_advantage_whatever_their_rounding(tmp_path):
    """The floating-point mean of 0.1, 0.1, 0.1 is not 0.1."""
    options = {**OPTIONS, "advantage": "group", "samples": 3}
    loop = make_loop("ppo", tmp_path / "ppo", **options, judged=lambda prompts, of: [[0.1] * 3 for _ in prompts])
    with pytest.raises(RoundError, match="round 1: the judge's scores tell no samples apart"):
        loop.run()


@pytest.mark.parametrize("delta", [0.0, 1.1, 1.5])
def test_the_clip_fraction_counts_the_tokens_without_a_gradient(delta):
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(2, 40, 8), torch.randn(20, 8), torch.randint(20, (2, 40))
    head = class_of("ppo")(clip=(0.2, 0.3), delta=delta)
    logps = torch.nn.functional.pad(linear_token_logps(hidden, weight, labels)[:, :-1], (1, 0))
    batch = {"old_logps": logps + 0.4 * torch.randn(2, 40), "advantages": torch.randn(2, 40)}
    clip_fraction, tokens = ratio_totals(head, logps.roll(-1, 1), labels, batch)["clip_fraction"]
    ratios = (logps - batch["old_logps"])[:, 1:].exp().double().requires_grad_()
    clipped_losses(ratios, batch["advantages"][:, 1:].double(), head.clip, delta).sum().backward()
    assert 0 < clip_fraction == (ratios.grad == 0).sum()
    assert tokens == 2 * 39


def test_a_value_model_of_another_vocabulary_is_refused(tmp_path):
    config = model(max_position_embeddings=64).config
    config.num_labels, config.vocab_size = 1, 5
    config.save_pretrained(tmp_path / "critic")
    with pytest.raises(ValueError, match="has embeddings of 5 tokens, and the policy's tokenizer has"):
        make_loop("ppo", tmp_path / "ppo", value_model=str(tmp_path / "critic"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"advantage": "group", "kl_target": 1.0}, "kl_target=1.0 has no meaning without advantage='gae'"),
        ({"scale_by_std": False}, "scale_by_std=False has no meaning without advantage='group'"),
        ({"max_tokens": 5}, "max_tokens=5 with normalizer='tokens'"),
        ({"lam": 1.5}, r"lam must lie in \[0, 1\], got 1.5"),
        ({"loss_from": "logits"}, "loss_from='logits' with value_model='backbone': the value head reads hidden states"),
        ({"loss_type": "gspo"}, "loss_type='gspo' reads one advantage per sample.*set advantage='group'"),
        ({"loss_type": "gspo", "advantage": "group", "max_tokens": 5}, "max_tokens=5 with normalizer='sequences'"),
        ({"clip": -1.0}, "clip must"),
        ({"value_clip": math.nan}, "value_clip must be"),
        ({"beta": 0.0, "kl_target": 1.0}, "kl_target=1.0 adapts beta, which stays 0 once it is 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        FusedPPOConfig(output_dir=str(tmp_path), use_cpu=True, **options)
