"""Writes finished runs into `real-model.md`: `python docs/real_model.py kto=runs/real dpo=runs/real-dpo ...`.

Each run's part of the page gets its sentence on held-out data or the judge's scores, its curves, and its answers before
and after training. A run that is not named keeps its part.
"""

import json
import re
import shutil
import sys
from pathlib import Path

from kto_fused.trainers import held_out

PAGE = Path(__file__).with_name("real-model.md")
LONGEST = 420  # characters of an answer
PICTURES = {
    "kto": "Loss and rewards by step; dots are evaluations",
    "dpo": "Loss and rewards by step; dots are evaluations",
    "sft": "Loss by step; dots are evaluations",
    "reward": "Loss and scores by step; dots are evaluations",
    "online": "The judge's scores by round, and the loss by step",
}


def picture_of(name: str) -> Path:
    return PAGE.with_name(f"real-model-{name}.png")


def part(name: str, metrics: dict) -> str:
    told = held_out.sentence(metrics)
    lines = [f"**{told[0].upper()}{told[1:]}.**" if told else "", ""]
    lines += of_rounds(metrics) if "rounds" in metrics else of_evaluations(metrics)
    lines += [f"![{PICTURES[name]}]({picture_of(name).name})", ""]
    if metrics.get("samples"):
        lines += ["| question | before | after |", "|---|---|---|"]
        lines += [
            f"| {cell(question(row['prompt']))} | {cell(row['before'])} | {cell(row['after'])} |"
            for row in metrics["samples"]["rows"]
        ]
        lines += ["", f"{metrics['samples']['caption']}; long answers are shortened here ([...]).", ""]
    return "\n".join(lines)


def of_rounds(metrics: dict) -> list[str]:
    rounds = metrics["rounds"]
    head = " | ".join(f"round {entry['round']}" for entry in rounds)
    lines = [f"| samples | {head} |", "|---|" + "---:|" * len(rounds)]
    names = {"score": "judge's mean score", "mean_length": "mean length, tokens", "kl": "KL of the round, nats"}
    for key, title in names.items():
        lines.append(f"| {title} | " + " | ".join(f"{entry[key]:.3f}" for entry in rounds) + " |")
    return [*lines, ""]


def of_evaluations(metrics: dict) -> list[str]:
    steps, evaluations = metrics["steps"], metrics["evaluations"]
    first, last = evaluations[0], evaluations[-1]
    lines = ["| held-out data | before the first step | after the last one |", "|---|---:|---:|"]
    better, worse = ("liked", "disliked") if "eval_rewards/auc" in last else ("chosen", "rejected")
    names = {"loss": "loss", "rewards/chosen": f"mean reward, {better}", "rewards/rejected": f"mean reward, {worse}"}
    names |= {"rewards/accuracies": "accuracy of the rewards", "rewards/auc": "AUC of the rewards by label"}
    names |= {"mean_token_accuracy": "tokens predicted as most likely"}
    for key, title in names.items():
        if f"eval_{key}" in last:
            was, now = (round(each[f"eval_{key}"], 3) + 0.0 for each in (first, last))  # + 0.0: no -0
            lines.append(f"| {title} | {was:.3f} | {now:.3f} |")
    held = f"{metrics['data']['train']['examples']} records train, {metrics['data']['eval']['examples']} are held out"
    return [*lines, "", f"{steps[-1]['step']} steps; {held}.", ""]


def question(prompt: str) -> str:
    """The user's message of a prompt in the model's chat template; a prompt of a round is not rendered."""
    found = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", prompt, re.DOTALL)
    return found[-1] if found else prompt.removeprefix("user: ")


def cell(text: str) -> str:
    text = text.strip().removesuffix("[...]").strip() if len(text) > LONGEST else text.strip()
    text = f"{text[:LONGEST].rsplit(' ', 1)[0]} [...]" if len(text) > LONGEST else text
    text = (
        re.sub(r"```\w*", "", text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("*", "\\*")
    )
    return re.sub(r"\s*\n\s*", "<br>", text.strip())


def main(arguments: list[str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    for argument in arguments:
        name, _, folder = argument.partition("=")
        start, end = f"<!-- {name}: written by real_model.py -->\n", f"<!-- end of {name} -->"
        before, rest = page.split(start)
        metrics = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
        page = before + start + part(name, metrics) + end + rest.split(end)[1]
        shutil.copyfile(Path(folder) / "curves.png", picture_of(name))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
