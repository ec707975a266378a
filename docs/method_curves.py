"""Run the commands of methods.md, draw their curves, and write the page's table of results.

    python docs/method_curves.py --run FOLDER [METHOD ...]   # all methods, or those with these output folders
    python docs/method_curves.py                             # draw again from the committed numbers

With ``--run`` each command runs as the page prints it, one after another on one thread, in FOLDER, where
``toy_files.py`` has written its files; a method's older output there is removed. The seconds, and the numbers that the
pictures show, go to ``curves/methods.json``. The later commands need the models of ``sft`` and ``reward``. Then
``curves/METHOD.png`` and the table of methods.md are written from the numbers.
"""

import argparse
import io
import json
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from kto_fused.commands import report
from kto_fused.trainers.held_out import COMPARISONS

HERE = Path(__file__).parent
PAGE, RESULTS, CURVES = HERE / "methods.md", HERE / "curves" / "methods.json", HERE / "curves"
START, END = "<!-- measured: written by method_curves.py -->\n", "<!-- end of the measurements -->"


class Panel(NamedTuple):
    """A panel of a picture: the logged names that it shows, with their labels."""

    title: str  # with the unit
    names: dict[str, str]
    unit: str = "step"  # or "round"
    evaluation: str = ""  # the logged name of the held-out data's values, where they are shown


class Method(NamedTuple):
    """A picture, and the number that tells in the table whether the method worked."""

    title: str
    panels: tuple[Panel, Panel]
    entries: str  # of metrics.json: where the number stands
    told: str  # the number's logged name
    meaning: str


def loss_of(unit: str) -> Panel:
    return Panel(f"loss, {unit}", {"loss": ""}, evaluation="eval_loss")


ACCURACY, AUC, TOKENS = "rewards/accuracies", "rewards/auc", "mean_token_accuracy"
RANKED = "held-out pairs whose chosen answer has the higher reward"
RANKS = Panel("pairs with the chosen reward higher, share", {ACCURACY: ""}, evaluation=COMPARISONS)
SCORE = Panel("judge's score", {"score": "mean of the samples", "best_score": "best of each prompt"}, "round")
MEAN_SCORE = "judge's mean score of the samples"
METHODS = {  # by the last part of --output_dir
    "sft": Method(
        "SFT",
        (
            loss_of("nats per token"),
            Panel("tokens predicted as most likely, share", {TOKENS: ""}, evaluation=f"eval_{TOKENS}"),
        ),
        "evaluations",
        "eval_loss",
        "held-out loss, nats per token",
    ),
    "reward": Method(
        "Reward model",
        (loss_of("nats"), Panel("pairs with the chosen score higher, share", {ACCURACY: ""}, evaluation=COMPARISONS)),
        "evaluations",
        COMPARISONS,
        "held-out pairs whose chosen answer has the higher score",
    ),
    "kto": Method(
        "KTO",
        (loss_of("weighted share"), Panel("AUC of the rewards by label", {AUC: ""}, evaluation=f"eval_{AUC}")),
        "evaluations",
        f"eval_{AUC}",
        "held-out comparisons in which the liked answer has the higher reward",
    ),
    "dpo": Method("DPO", (loss_of("nats"), RANKS), "evaluations", COMPARISONS, RANKED),
    "orpo": Method("ORPO", (loss_of("nats"), RANKS), "evaluations", COMPARISONS, RANKED),
    "ipo": Method("IPO", (loss_of("squared nats per token"), RANKS), "evaluations", COMPARISONS, RANKED),
    "simpo": Method("SimPO", (loss_of("nats"), RANKS), "evaluations", COMPARISONS, RANKED),
    "objectives": Method(
        "Several objectives",
        (
            Panel("loss, nats", {"earnest/loss": "earnest", "brief/loss": "brief"}),
            Panel(
                "pairs with the chosen reward higher, share",
                {f"earnest/{ACCURACY}": "earnest", f"brief/{ACCURACY}": "brief"},
            ),
        ),
        "evaluations",
        COMPARISONS,
        f"{RANKED} (earnest)",
    ),
    "spin": Method(
        "SPIN",
        (loss_of("nats"), Panel("win rate against the last round, share", {"win_rate": ""}, "round")),
        "rounds",
        "win_rate",
        "win rate of the samples against the last round's",
    ),
    "online-dpo": Method("Online DPO", (SCORE, loss_of("nats")), "rounds", "score", MEAN_SCORE),
    "online-kto": Method("Online KTO", (SCORE, loss_of("weighted share")), "rounds", "score", MEAN_SCORE),
    "ppo": Method(
        "PPO",
        (SCORE, Panel("variance of the returns explained, share", {"explained_variance": ""}, "round")),
        "rounds",
        "score",
        MEAN_SCORE,
    ),
    "grpo": Method(
        "GRPO",
        (SCORE, Panel("tokens whose gradient is clipped, share", {"clip_fraction": ""})),
        "rounds",
        "score",
        MEAN_SCORE,
    ),
}


# ---- the page's commands ------------------------------------------------------------------------------------------


def commands(page: str) -> dict[str, list[str]]:
    """Return the words of each command of the page that trains, by the last part of its ``--output_dir``, in order."""
    found = {}
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["kto-fused"] and "--output_dir" in words:
                found[Path(words[words.index("--output_dir") + 1]).name] = words
    return found


def run(folder: Path, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run the commands of these methods in ``folder``. Yields each one's seconds and the numbers of its picture."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "toy").exists():
        timed([sys.executable, str(HERE.resolve() / "toy_files.py")], folder, folder / "toy_files.log")
    of_page = commands(PAGE.read_text(encoding="utf-8"))
    for name in names:
        shutil.rmtree(folder / "runs" / name, ignore_errors=True)
        words = [sys.executable, "-m", "kto_fused", *of_page[name][1:]]
        wall, cpu = timed(words, folder, folder / f"{name}.log")
        print(f"{name:12} {wall:6.1f} s, {cpu:6.1f} s of CPU", flush=True)
        metrics = json.loads((folder / "runs" / name / "metrics.json").read_text(encoding="utf-8"))
        yield name, {"wall_seconds": round(wall, 1), "cpu_seconds": round(cpu, 1), **drawn(name, metrics)}


def timed(words: list[str], folder: Path, log: Path) -> tuple[float, float]:
    """Run a command on one thread. Returns its seconds by the clock and of the processor."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("w") as file:
        code = subprocess.run(words, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code:
        raise SystemExit(f"{shlex.join(words)} ended with code {code}; {log} has its output")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, cpu


def drawn(name: str, metrics: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """Return the numbers of a run's metrics that its picture and its row of the table show, to five digits."""
    method = METHODS[name]
    shown = {one for panel in method.panels for one in panel.names} | {method.told}
    kept = {"step", "round"} | shown | {panel.evaluation for panel in method.panels}

    def rounded(value: Any) -> float:
        if isinstance(value, list):  # a share and its interval
            value = value[0]
        return value if isinstance(value, int) else float(f"{value:.5g}")

    return {
        key: [{one: rounded(value) for one, value in entry.items() if one in kept} for entry in metrics[key]]
        for key in ("steps", "evaluations", "rounds")
        if metrics.get(key)
    }


# ---- pictures and the table ---------------------------------------------------------------------------------------


def draw(name: str, numbers: dict[str, Any]) -> None:
    """Draw a method's picture: lines are training, dots on dashed lines evaluations."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, 2), METHODS[name].panels, strict=True):
        entries = numbers["rounds" if panel.unit == "round" else "steps"]
        evaluations = numbers.get("evaluations", []) if panel.evaluation else []
        for color, (one, label) in zip(report.COLORS, panel.names.items(), strict=False):
            label = label or ("training" if evaluations else "")
            report.draw_curve(axes, entries, one, label, unit=panel.unit, color=color)
        of_evaluation = panel.evaluation.removeprefix("eval_")
        report.draw_evaluations(axes, evaluations, of_evaluation, "held-out", color=report.COLORS[1])
        report.label_axes(axes, panel.title, panel.unit)
    CURVES.mkdir(exist_ok=True)
    drawing = io.BytesIO()
    figure.savefig(drawing, format="png", dpi=100)
    Image.open(drawing).convert("RGB").quantize(64).save(CURVES / f"{name}.png", optimize=True)  # a third of the bytes


def measured(results: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of the methods that have been run, in the page's order."""
    return {name: results["methods"][name] for name in METHODS if name in results["methods"]}


def table(results: dict[str, Any]) -> str:
    lines = ["| method | measured | before | after | seconds | of CPU |", "|---|---|---:|---:|---:|---:|"]
    for name, numbers in measured(results).items():
        method = METHODS[name]
        values = [entry[method.told] for entry in numbers[method.entries] if method.told in entry]
        seconds = f"{numbers['wall_seconds']:.0f} | {numbers['cpu_seconds']:.0f}"
        lines.append(f"| {method.title} | {method.meaning} | {values[0]:.2f} | {values[-1]:.2f} | {seconds} |")
    return "\n".join(lines) + "\n"


def with_table(page: str, results: dict[str, Any]) -> str:
    before, rest = page.split(START)
    return before + START + table(results) + END + rest.split(END)[1]


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{model[1] if model else platform.processor()}, 1 thread"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="run the commands in this folder first")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"with --run: some of {', '.join(METHODS)}")
    options = parser.parse_args()
    if set(options.methods) - set(METHODS) or (options.methods and options.run is None):
        parser.error(f"methods are given with --run, and are some of {', '.join(METHODS)}")
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"methods": {}}
    if options.run is not None:
        import torch

        results |= {"machine": machine(), "torch": torch.__version__}
        for name, numbers in run(options.run, options.methods or list(METHODS)):
            results["methods"][name] = numbers
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, numbers in measured(results).items():
        draw(name, numbers)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_table(page, results), encoding="utf-8")


if __name__ == "__main__":
    main()
