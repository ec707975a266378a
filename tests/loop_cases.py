"""Runs of the loops of generation on tiny models, and their plain twins in float64."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_training import WORDS, data, model, tokenizer
from transformers import TrainerCallback

from kto_fused.trainers.configs import FusedDPOConfig, FusedKTOConfig
from kto_fused.trainers.online import OnlineLoop, SPINLoop
from kto_fused.trainers.ppo import PPOLoop
from kto_fused.trainers.ppo_config import FusedPPOConfig
from kto_fused.trainers.round_settings import LoopSettings
from kto_fused.trainers.rounds import Loop, read_samples

KINDS = {
    "spin": (SPINLoop, FusedDPOConfig),
    "dpo": (OnlineLoop, FusedDPOConfig),
    "kto": (OnlineLoop, FusedKTOConfig),
    "ppo": (PPOLoop, FusedPPOConfig),
}
TIMES = ("sampling_seconds", "training_seconds")


def judge(prompts: list[str], completions: list[list[str]]) -> list[list[float]]:
    """Score a completion by its words' mean number, in [0, 1)."""
    numbers = {word: number for number, word in enumerate(WORDS)}

    def score(text: str) -> float:
        found = [numbers.get(word, 0) for word in text.split()]
        return sum(found) / (len(WORDS) * (len(found) + 1))

    return [[score(text) for text in of_prompt] for of_prompt in completions]


def make_loop(
    kind: str, folder: Path, *, policy: Any = None, peft_config: Any = None, judged: Any = judge, **options: Any
) -> Loop:
    """Return a loop. ``options`` are those of ``LoopSettings`` and of the trainer's configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    records = folder.parent / "prompts.jsonl"
    if not records.exists():
        data("kto", 9).to_json(records)
    saved = folder.parent / "model"
    if not saved.exists():
        model(max_position_embeddings=64).save_pretrained(saved)
    kinds = KINDS[kind]
    names = set(LoopSettings.__dataclass_fields__)
    of_loop = {"model": str(saved), "data": [str(records)], "rounds": 2, "max_new_tokens": 6}
    of_loop |= {name: value for name, value in options.items() if name in names}
    of_trainer = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    of_trainer |= {name: value for name, value in options.items() if name not in names}
    settings = LoopSettings(**of_loop)
    if kind == "ppo":
        of_trainer.setdefault("sampling_temperature", settings.temperature)
    return kinds[0](
        settings,
        kinds[1](**of_trainer),
        judge=None if judged is None else lambda prompt, completions: judged([prompt], [completions])[0],
        tokenizer=tokenizer(),
        model=model(max_position_embeddings=64) if policy is None else policy,
        peft_config=peft_config,
    )


def outcome(loop: Loop) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Return the rounds' entries without times, and the bytes of the last checkpoint's weights."""

    def without_times(entry: dict[str, Any]) -> dict[str, Any]:
        log = [{name: value for name, value in step.items() if "second" not in name} for step in entry["log"]]
        return {name: value for name, value in entry.items() if name not in TIMES} | {"log": log}

    rounds = json.loads((loop.output / "run.json").read_text())["rounds"]
    folder = loop.output / rounds[-1]["checkpoint"]
    weights = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    return [without_times(entry) for entry in rounds], weights


class KilledError(Exception):
    pass


class KillAt(TrainerCallback):
    """Ends the process's work, as a kill would, after the checkpoint of step ``step``."""

    def __init__(self, step: int):
        self.step = step

    def on_save(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KilledError


# ---- plain twins ---------------------------------------------------------------------------------------------------


def plain_token_logps(policy, prompt: list[int], ids: list[int], temperature: float = 1.0):
    """Return the log-probabilities of ``ids`` after ``prompt`` [n], and the hidden states before each of them."""
    out = policy(input_ids=torch.tensor([prompt + ids]), output_hidden_states=True)
    states = slice(len(prompt) - 1, len(prompt) + len(ids) - 1)
    logps = (out.logits[0, states] / temperature).log_softmax(-1)
    return logps.gather(-1, torch.tensor(ids)[:, None])[:, 0], out.hidden_states[-1][0, states]


def plain_dpo_run(policy, ref, pairs, *, steps: int, batch: int, beta: float, rate: float) -> list[float]:
    """Train a float64 ``policy`` by DPO and SGD on (prompt, chosen, rejected) in order; return the losses."""
    losses, start = [], 0
    for _ in range(steps):
        rows = pairs[start : start + batch]
        start = start + batch if start + batch < len(pairs) else 0
        loss = torch.zeros((), dtype=torch.float64)
        for prompt, chosen, rejected in rows:
            with torch.no_grad():
                before = [plain_token_logps(ref, prompt, ids)[0].sum() for ids in (chosen, rejected)]
            now = [plain_token_logps(policy, prompt, ids)[0].sum() for ids in (chosen, rejected)]
            h = (now[0] - before[0]) - (now[1] - before[1])
            loss = loss - F.logsigmoid(beta * h) / len(rows)
        losses.append(loss.item())
        step(policy, loss, rate)
    return losses


def step(module: torch.nn.Module, loss: torch.Tensor, rate: float) -> None:
    parameters = list(module.parameters())
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.data -= rate * grad


def assert_same_weights(folder: Path, twin: torch.nn.Module, tolerance: float = 2e-5) -> None:
    """Compare the weights of a checkpoint with the twin's."""
    from safetensors.torch import load_file

    saved = load_file(folder / "model.safetensors")
    for name, tensor in twin.state_dict().items():
        if name in saved:
            torch.testing.assert_close(
                saved[name].double(), tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: n + m
            )


def samples_by_prompt(loop: Loop, number: int) -> dict[int, list[dict[str, Any]]]:
    grouped: dict[int, list[dict[str, Any]]] = {}
    for line in read_samples(loop.output / f"round-{number}"):
        grouped.setdefault(line["prompt_number"], []).append(line)
    return grouped
