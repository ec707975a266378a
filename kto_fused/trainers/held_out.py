"""The answer to "did it work?" from held-out data: how often the better answer has the higher reward, and before."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import nn

from .. import huggingface
from ..metrics import auc

if TYPE_CHECKING:
    from .base import FusedTrainer, Rewards

COMPARISONS = "eval_comparisons"  # in an evaluation's log entry: the share, and the ends of its interval
INTERVAL = (2.5, 97.5)  # percentiles
FEWEST_PROMPTS = 20  # resamples of fewer say little about other prompts
REPLICATES, COMPARED = 1000, 10**7  # bootstrap samples, fewer where they would hold more than COMPARED rewards


def compared(found: "Rewards", seed: int, prompts: int) -> list[float | None] | None:
    """Return [share, low, high]: the share of comparisons that the better answer wins, and its bootstrap interval.

    The interval's ends are None if there are fewer ``prompts`` than ``FEWEST_PROMPTS``, or if all resamples agree.

    With labels, each desirable sequence is compared with each undesirable one (the AUC), and the sequences of each
    label are drawn anew. Of pairs, the chosen one is compared with the rejected one, and the pairs are drawn anew. A
    tie counts one half. The interval covers 95 %. None where a label is missing or a reward is NaN.
    """
    rewards, desirable = found
    if rewards.isnan().any() or rewards.numel() == 0 or (desirable is not None and len(set(desirable.tolist())) < 2):
        return None
    draw = np.random.default_rng(seed)
    replicates = max(100, min(REPLICATES, COMPARED // rewards.numel()))
    if desirable is None:
        wins = (1 + (rewards[0] - rewards[1]).sign().numpy()) / 2
        share = wins.mean()
        chances = [(wins == value).mean() for value in (0, 0.5, 1)]
        shares = draw.multinomial(len(wins), chances, replicates) @ [0, 0.5, 1] / len(wins)
    else:
        share = auc(rewards, desirable).item()
        liked, disliked = rewards[desirable].numpy(), np.sort(rewards[~desirable].numpy())
        shares = np.array([_drawn_share(liked, disliked, draw) for _ in range(replicates)])
    return [float(share), *_interval(shares, prompts)]


def _interval(resampled: np.ndarray, prompts: int) -> tuple[float | None, float | None]:
    low, high = map(float, np.percentile(resampled, INTERVAL))
    return (None, None) if prompts < FEWEST_PROMPTS or low == high else (low, high)


def _has_interval(low: float | None, high: float | None) -> bool:
    """Whether the ends are known and differ. A ``metrics.json`` of an earlier version may hold equal ends."""
    return low is not None and low != high


def _no_interval(prompts: int | None) -> str:
    """Return why ``_interval`` gives none."""
    if prompts is not None and prompts < FEWEST_PROMPTS:
        return f"over {prompts} prompt{'s' * (prompts != 1)}: too few for an interval"
    return f"all resamples {'' if prompts is None else f'of {prompts} prompts '}agree, which gives no interval"


def _drawn_share(liked: np.ndarray, disliked: np.ndarray, draw: np.random.Generator) -> float:
    """Return the AUC of sequences drawn with replacement from each label; ``disliked`` is sorted."""
    drawn = liked[draw.integers(len(liked), size=len(liked))]
    others = disliked[np.sort(draw.integers(len(disliked), size=len(disliked)))]
    wins = np.searchsorted(others, drawn, "left") + np.searchsorted(others, drawn, "right")
    return wins.mean() / (2 * len(others))


class Judged(NamedTuple):
    """The judge's scores of the first and the last round of a loop, whose samples are those of each round's start."""

    rounds: int
    first: float  # mean score of the round's samples
    last: float
    change: list[float | None]  # last - first, and the ends of its bootstrap interval, None as in ``compared``
    wins: float | None  # share of comparisons of a prompt's samples that the last round wins; None: no common prompt
    best_round: int
    best: float
    prompts: int | None = None  # the fewer of the two rounds'; a metrics.json of an earlier version has none


def judged(rounds: list[dict[int, list[float]]], seed: int) -> Judged | None:
    """Return what the scores of the rounds' samples say, given by prompt; None of fewer than two rounds.

    The interval covers 95 %. It is that of a mean over prompts drawn anew: the same ones in both rounds if both have
    the same prompts.
    """
    if len(rounds) < 2:
        return None
    means = [float(np.mean([score for scores in of.values() for score in scores])) for of in rounds]
    first, last = rounds[0], rounds[-1]
    draw, replicates = np.random.default_rng(seed), 1000
    of_first, of_last = (np.array([np.mean(of[number]) for number in sorted(of)]) for of in (first, last))

    def drawn(values: np.ndarray) -> np.ndarray:
        return np.array([values[draw.integers(len(values), size=len(values))].mean() for _ in range(replicates)])

    changes = drawn(of_last - of_first) if first.keys() == last.keys() else drawn(of_last) - drawn(of_first)
    signs = [np.sign(np.subtract.outer(last[number], first[number])) for number in first.keys() & last.keys()]
    wins = float((1 + np.concatenate([sign.ravel() for sign in signs]).mean()) / 2) if signs else None
    best = int(np.argmax(means))
    prompts = min(len(first), len(last))
    change = [means[-1] - means[0], *_interval(changes, prompts)]
    return Judged(len(rounds), means[0], means[-1], change, wins, best + 1, means[best], prompts)


def _sentence_of_rounds(found: Judged) -> str:
    change, low, high = found.change
    text = f"the samples of round {found.rounds} have a mean score of {found.last:.3g} by the judge, those of round 1, "
    has_interval = _has_interval(low, high)
    interval = f"95 % interval {low:+.3g} to {high:+.3g}" if has_interval else _no_interval(found.prompts)
    text += f"before training, {found.first:.3g}: {change:+.3g} ({interval})"
    if found.wins is not None:
        text += f"; they win {100 * found.wins:.0f} % of comparisons with samples of round 1 on the same prompt"
    text += f"; the best round is {found.best_round} ({found.best:.3g})"
    is_zero_in_it = has_interval and low <= 0 <= high
    return text + "; the interval holds 0, so these rounds show no difference" * is_zero_in_it


def sentence(metrics: dict[str, Any]) -> str | None:
    """Return one sentence on the held-out data: the values of the saved model, and those before the first step.

    Of rounds, it is about the judge's scores. None without an evaluation that has something to say.
    """
    if metrics.get("judged"):
        return _sentence_of_rounds(Judged(**metrics["judged"]))
    evaluations = metrics.get("evaluations") or []
    step = metrics.get("model", {}).get("step")
    now = next(
        (entry for entry in reversed(evaluations) if entry["step"] == step), evaluations[-1] if evaluations else None
    )
    if now is None or now["step"] == 0:
        return None
    before = evaluations[0] if evaluations[0]["step"] == 0 else {}
    at = "" if now["step"] == step else f" at step {now['step']}"
    if COMPARISONS in now:
        share, low, high = now[COMPARISONS]
        is_labelled = "eval_rewards/auc" in now
        text = (
            "liked answers score above disliked ones"
            if is_labelled
            else "the chosen answer scores above the rejected one"
        )
        text = f"held-out{at}: {text} in {100 * share:.0f} % of {'comparisons' if is_labelled else 'pairs'}"
        has_interval = _has_interval(low, high)
        prompts = metrics.get("data", {}).get("eval", {}).get("prompts")
        text += f" ({_percents(low, high) if has_interval else _no_interval(prompts)})"
        if COMPARISONS in before:
            was = before[COMPARISONS][0]
            text += f", {100 * was:.0f} % before training"
            if has_interval and low <= was <= high:
                text += "; the interval holds the value before, so these data show no difference"
        return text
    if "eval_mean_token_accuracy" in now and not any(name.startswith("eval_rewards") for name in now):
        is_nll = metrics.get("config", {}).get("loss_type") == "nll"  # another loss is not measured in nats
        text = f"held-out{at}: the loss is {now['eval_loss']:.3f}{' nats per token' * is_nll}"
        text += f", {before['eval_loss']:.3f} before training" if before else ""
        text += f"; the most likely token is right for {100 * now['eval_mean_token_accuracy']:.0f} % of tokens"
        return text + (f", {100 * before['eval_mean_token_accuracy']:.0f} % before" if before else "")
    return None


def _percents(low: float, high: float) -> str:
    digits = 0 if round(100 * low) != round(100 * high) else 1  # an interval of no width would look exact
    return f"95 % interval {100 * low:.{digits}f} % to {100 * high:.{digits}f} %"


# ---- the saved model ----------------------------------------------------------------------------------------------


def saved_model(trainer: "FusedTrainer") -> dict[str, Any]:
    """Return what the output folder's model is: its kind, base and step, and which evaluation was the best."""
    args, state, model = trainer.args, trainer.state, trainer.unwrapped(trainer.model)
    best = state.best_model_checkpoint
    is_best = bool(args.load_best_model_at_end and best)
    found = {
        "folder": args.output_dir,
        **_kind_of(model),
        "trainer": type(trainer).__name__,
        "scores": type(trainer).__name__ == "FusedRewardTrainer",
        "step": int(best.rpartition("-")[2]) if is_best else state.global_step,
        "is_best": is_best,
    }
    metric = "eval_" + (args.metric_for_best_model or "loss").removeprefix("eval_")
    entries = [entry for entry in state.log_history if metric in entry and entry["step"] > 0]
    if entries:
        larger = bool(args.greater_is_better) if args.metric_for_best_model else False
        entry = (max if larger else min)(entries, key=lambda entry: entry[metric])
        folder = f"{args.output_dir}/checkpoint-{entry['step']}"
        found["best"] = {"step": entry["step"], "metric": metric, "value": entry[metric], "evaluations": len(entries)}
        found["best"]["checkpoint"] = folder if Path(folder).is_dir() else None
    return found


def _kind_of(model: nn.Module) -> dict[str, Any]:
    configs = getattr(model, "peft_config", None)
    config = None if configs is None else next(iter(configs.values()))
    return kind_of(config, getattr(getattr(huggingface.unwrap(model), "config", None), "_name_or_path", None))


def kind_of(config: Any, start: str | None) -> dict[str, Any]:
    """Return what a model's weights are, the model that they were made from, and an adapter's settings.

    Args:
        config: the adapter's, as PEFT holds it; None: all weights are trained.
        start: the name or path of the model that the run began with; None or empty if it has none.
    """
    if config is None:
        return {"kind": "whole weights", "base": None, "start": start or None}
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_dora", "use_rslora")
    adapter = {"type": str(getattr(config.peft_type, "value", config.peft_type))}
    adapter |= {name: getattr(config, name) for name in names if getattr(config, name, None)}
    adapter |= {name: sorted(value) for name, value in adapter.items() if isinstance(value, (set, list))}
    base = config.base_model_name_or_path or start or None
    return {"kind": "adapter", "base": base, "start": base, "adapter": adapter}


def model_lines(model: dict[str, Any]) -> list[str]:
    """Return sentences on the saved model: what it is, of which step, and where the best checkpoint is."""
    kind = f"an adapter of {model['base']}" if model["kind"] == "adapter" else "a model with all its weights"
    unit = "round" if "round" in model else "step"
    of = f"of {unit} {model[unit]}, the {'best' if model.get('is_best') else 'last'} one"
    lines = [f"{model['folder']} holds {kind}, {of}."]
    if model.get("best_samples"):
        lines.append(model["best_samples"])
    best = model.get("best")
    if best is not None:
        number = best["evaluations"]
        text = f"Of {number} evaluation{'s' * (number > 1)} after the first step the best by {best['metric']} "
        text += f"({best['value']:.4f}) is that of step {best['step']}"
        if best["step"] == model["step"]:
            lines.append(f"{text}, which is this model.")
        elif best["checkpoint"]:
            lines.append(f"{text}; its checkpoint is {best['checkpoint']}.")
        else:
            lines.append(f"{text}; no checkpoint of it is kept (--load_best_model_at_end saves the best one).")
    return lines


def loading_lines(model: dict[str, Any]) -> list[str]:
    """Return the lines of Python that load the saved model."""
    task = "SequenceClassification" if model["scores"] else "CausalLM"
    more = ", num_labels=1" * model["scores"]
    name, package = (
        (f"AutoPeftModelFor{task}", "peft") if model["kind"] == "adapter" else (f"AutoModelFor{task}", "transformers")
    )
    imports = ["from transformers import AutoTokenizer", f"from {package} import {name}"]
    if package == "transformers":
        imports = [f"from transformers import {name}, AutoTokenizer"]
        more = ""
    folder = json.dumps(model["folder"], ensure_ascii=False)  # quotes and backslashes escaped, as Python has them
    return [
        *sorted(imports),
        f"model = {name}.from_pretrained({folder}{more})",
        f"tokenizer = AutoTokenizer.from_pretrained({folder})",
    ]
