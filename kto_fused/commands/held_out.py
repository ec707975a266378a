"""The answer to "did it work?" from held-out data: how often the better answer has the higher reward, and before."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics import auc

if TYPE_CHECKING:
    from ..trainers import FusedTrainer
    from ..trainers.base import Rewards

COMPARISONS = "eval_comparisons"  # in an evaluation's log entry: the share, and the ends of its interval
INTERVAL = (2.5, 97.5)  # percentiles
REPLICATES, COMPARED = 1000, 10**7  # bootstrap samples, fewer where they would hold more than COMPARED rewards


def compared(found: "Rewards", seed: int) -> list[float] | None:
    """Return [share, low, high]: the share of comparisons that the better answer wins, and its bootstrap interval.

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
    return [float(share), *map(float, np.percentile(shares, INTERVAL))]


def _drawn_share(liked: np.ndarray, disliked: np.ndarray, draw: np.random.Generator) -> float:
    """Return the AUC of sequences drawn with replacement from each label; ``disliked`` is sorted."""
    drawn = liked[draw.integers(len(liked), size=len(liked))]
    others = disliked[np.sort(draw.integers(len(disliked), size=len(disliked)))]
    wins = np.searchsorted(others, drawn, "left") + np.searchsorted(others, drawn, "right")
    return wins.mean() / (2 * len(others))


def sentence(metrics: dict[str, Any]) -> str | None:
    """Return one sentence on the held-out data: the values of the saved model, and those before the first step.

    None without an evaluation that has something to say.
    """
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
        text += f" (95 % interval {100 * low:.0f} % to {100 * high:.0f} %)"
        if COMPARISONS in before:
            was = before[COMPARISONS][0]
            text += f", {100 * was:.0f} % before training"
            if low <= was <= high:
                text += "; the interval holds the value before, so these data show no difference"
        return text
    if "eval_mean_token_accuracy" in now and not any(name.startswith("eval_rewards") for name in now):
        text = f"held-out{at}: the loss is {now['eval_loss']:.3f} nats per token"
        text += f", {before['eval_loss']:.3f} before training" if before else ""
        text += f"; the most likely token is right for {100 * now['eval_mean_token_accuracy']:.0f} % of tokens"
        return text + (f", {100 * before['eval_mean_token_accuracy']:.0f} % before" if before else "")
    return None


# ---- the saved model ----------------------------------------------------------------------------------------------


def saved_model(trainer: "FusedTrainer") -> dict[str, Any]:
    """Return what the output folder's model is: its kind, base and step, and which evaluation was the best."""
    args, state, model = trainer.args, trainer.state, trainer.unwrapped(trainer.model)
    configs = getattr(model, "peft_config", None)
    best = state.best_model_checkpoint
    is_best = bool(args.load_best_model_at_end and best)
    found = {
        "folder": args.output_dir,
        "kind": "whole weights" if configs is None else "adapter",
        "base": None if configs is None else next(iter(configs.values())).base_model_name_or_path,
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


def model_lines(model: dict[str, Any]) -> list[str]:
    """Return sentences on the saved model: what it is, of which step, and where the best checkpoint is."""
    kind = f"an adapter of {model['base']}" if model["kind"] == "adapter" else "a model with all its weights"
    of = f"of step {model['step']}, the {'best' if model['is_best'] else 'last'} one"
    lines = [f"{model['folder']} holds {kind}, {of}."]
    best = model.get("best")
    if best is not None:
        text = (
            f"Of {best['evaluations']} evaluations the best by {best['metric']} ({best['value']:.4f}) is that of step "
        )
        text += f"{best['step']}"
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
    return [
        *sorted(imports),
        f'model = {name}.from_pretrained("{model["folder"]}"{more})',
        f'tokenizer = AutoTokenizer.from_pretrained("{model["folder"]}")',
    ]
