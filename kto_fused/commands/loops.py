"""``kto-fused spin``, ``online`` and ``ppo``: rounds of generate, judge, train.

The options are those of the loop (``LoopSettings``) and of the trainer of its loss. Flags are checked, and the data
read, before a model is loaded.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import PrinterCallback, ProgressCallback, set_seed

from ..data.form import DataError
from ..data.prompts import read_prompts
from ..engines import backends
from ..trainers import FusedTrainer, cards, checkpoints, folder_lock, held_out
from ..trainers.configs import FusedDPOConfig, FusedKTOConfig, FusedPreferenceConfig
from ..trainers.generation import GenerationError
from ..trainers.judges import JudgeError
from ..trainers.online import OnlineLoop, SPINLoop
from ..trainers.ppo import PPOLoop
from ..trainers.ppo_config import FusedPPOConfig
from ..trainers.round_settings import LoopSettings
from ..trainers.rounds import STATE, Loop, RoundError, read_samples
from . import own_loss, progress, report, results, resuming, samples, train
from .arguments import ALIASES, first_look
from .cli import description
from .errors import CommandError, check_names
from .failures import check_writable, setup_errors, user_errors
from .flags import FlagParser

LOOPS = {"spin": SPINLoop, "online": OnlineLoop, "ppo": PPOLoop}
# options of the trainers that mean nothing in rounds: evaluations, objectives, and what the loop decides itself
LEFT_OUT = (
    *train.LEFT_OUT,
    *train.EVALUATION_FLAGS,
    "objective_weights",
    *("per_device_eval_batch_size", "greater_is_better", "reference", "precompute_ref_log_probs", "dataset_num_proc"),
    *("precompute_ref_batch_size", "ref_cache_dir", "push_to_hub", "hub_model_id", "hub_strategy", "hub_token"),
    *("hub_private_repo", "hub_always_push", "hub_revision", "save_only_model", "length_column_name"),
)
ERRORS = (checkpoints.FolderInUseError, checkpoints.CheckpointError, DataError, GenerationError, JudgeError, RoundError)
COLUMNS = {  # of a round's entry, and how they are printed
    "score": "score",
    "win_rate": "win rate",
    "kl": "KL",
    "kl_reference": "KL to ref",
    "explained_variance": "expl. var.",
    "examples": "examples",
    "mean_length": "length",
}


DESCRIPTION = (
    "--output_dir receives the model, metrics.json, curves.png and, in a folder per round, the samples. Ctrl-C saves a "
    "checkpoint; the same command with --resume_from_checkpoint true continues from it."
)
# files of a checkpoint that are not the model's
STATE_OF_TRAINING = (
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "metrics_*.pt", "manifest.json"),
    *("trainer_state.json", "training_args.bin", "critic.safetensors"),
)


ON_THE_CARD = ("rounds", "prompts", "samples", "max_new_tokens", "temperature", "max_kl")
SAMPLES_SHOWN = 3  # prompts whose samples the report shows
RECIPES = {"dpo": FusedDPOConfig, "kto": FusedKTOConfig}


@dataclass
class OnlineSettings(LoopSettings):
    """The options of ``kto-fused online``."""

    loss: str = field(
        default="dpo",
        metadata={
            "help": "dpo: losses of pairs, best against worst; kto: losses of single completions, labelled by "
            "--threshold; --loss_type names the loss, or --loss does (orpo). module:Name: a loss of your own"
        },
    )
    own_loss: Any = field(default=None, init=False)  # the loss of ``--loss module:Name``


def main(command: str, arguments: list[str]) -> int:
    settings, config = parse(command, arguments)
    return run(command, settings, config)


def parse(command: str, arguments: list[str]) -> tuple[LoopSettings, FusedPreferenceConfig]:
    """Return the options from flags and from the file of ``--config``. A flag overrides the file.

    Raises:
        CommandError: a flag or setting is unknown, has a wrong value, or contradicts another one.
    """
    look = first_look(command, arguments)
    loss = (look.loss or "dpo") if command == "online" else "dpo"
    choice = own_loss.choose(loss, RECIPES)  # the loss decides which flags there are
    recipe, _, own = choice
    taken = RECIPES[recipe].taken_names | {one.name for one in fields(OnlineSettings)} | {"config", "help", *ALIASES}
    parser = flags_of(command, recipe, own, taken)
    values = parser.values([*parser.arguments_from(look.settings, look.path), *look.arguments])
    choice.settle(values, loss)
    if own is not None:
        made = own.make({flag: values.pop(flag) for flag in own.flag_names(taken)}, taken)
    for option in ("output_dir", "report_to"):  # to transformers, None would mean another folder and an error
        if values[option] is None:
            values[option] = parser.get_default(option)
    if values["bf16"] is None:
        values["bf16"] = not (values["fp16"] or values["use_cpu"]) and train.computes_in_bfloat16()
    if command != "spin" and not values["temperature"]:
        raise CommandError(f"--temperature must be more than 0 for {command}, which needs samples that differ")
    settings, config = parser.build(values | {"sampling_temperature": values["temperature"]})
    if own is not None:
        settings.own_loss = made
    if command != "spin" and settings.judge is None:
        raise CommandError(f"--judge must be given: kto-fused {command} learns from its scores")
    return settings, config


def flags_of(
    command: str, recipe: str, own: own_loss.OwnLoss | None = None, taken: frozenset[str] = frozenset()
) -> FlagParser:
    """Return the parser for the flags of a loop; ``taken`` are names that fields of one's ``own`` loss cannot have."""
    kinds = {
        "spin": [LoopSettings, FusedDPOConfig],
        "online": [OnlineSettings, RECIPES[recipe]],
        "ppo": [LoopSettings, FusedPPOConfig],
    }[command]
    left_out = {*LEFT_OUT} if command == "spin" else {*LEFT_OUT, "label_true", "label_false"}
    left_out |= {
        "spin": {"threshold", "ref_model"},
        "ppo": {"threshold", "sampling_temperature", "loss_weights"},
    }.get(command, set())
    if command == "online" and recipe == "dpo":
        left_out.add("threshold")
    if own is not None:
        left_out |= {"loss_type", "loss_weights", *RECIPES[recipe].loss_options}
    parser = FlagParser(
        kinds,
        command,
        usage="%(prog)s --model MODEL --data FILE [FILE ...] --judge JUDGE [FLAGS]",
        description=f"{description(command)} {DESCRIPTION}",
        left_out=left_out,
        belongs_to={
            "threshold": "kto-fused online with --loss kto",
            "objective_weights": "kto-fused train",
            **({} if command == "spin" else dict.fromkeys(("label_true", "label_false"), "kto-fused spin and train")),
        },
        more=None if own is None else own.flags(taken),
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="YAML file of settings, named like the flags; flags override it"
    )
    parser.set_defaults(output_dir=f"runs/{command}", logging_steps=1, save_total_limit=1, bf16=None)
    parser.set_defaults(lr_scheduler_type="constant", train_sampling_strategy="random")
    if command != "ppo":
        parser.set_defaults(num_train_epochs=1.0)
    return parser


# ---- the run ------------------------------------------------------------------------------------------------------


def run(command: str, settings: LoopSettings, config: FusedPreferenceConfig) -> int:
    """Run the rounds and write the results. Returns the exit code: 0, or 130 if Ctrl-C ended the training.

    Raises:
        CommandError: the run cannot start, a round diverged, or the results cannot be written.
    """
    check_names(config.output_dir, settings.model, *settings.data)
    check_writable(config.output_dir)
    with user_errors(*ERRORS), folder_lock.only_run_in(config):
        checkpoints.agreed(config, lambda: _check_folder(config))
        train.check_schedule(config)
        datasets.disable_progress_bars()  # a round's data are small, and prepared in a moment
        with setup_errors():
            loop = make_loop(command, settings, config)
        with user_errors(ValueError, ImportError, OSError):
            rounds = loop.run()
        is_main = config.process_index == 0
        if "checkpoint" not in rounds[-1]:
            if is_main:
                print(
                    f"\nStopped in round {len(rounds)}, with a checkpoint. To continue, run the same command with "
                    "--resume_from_checkpoint true"
                )
            return 130
        if is_main:
            with user_errors(Exception, prefix=f"{config.output_dir} cannot be written: "):
                metrics = write(command, loop, rounds)
            results.print_end(metrics)
            if loop.judge is None:
                print("\nNo judge scored the samples (--judge), so nothing here says whether they became better.")
            written = "the model, README.md, metrics.json, curves.png, report.html and the samples"
            print(f"\nWrote {written} into {config.output_dir}")
    return 0


def make_loop(command: str, settings: LoopSettings, config: FusedPreferenceConfig) -> Loop:
    """Return the loop, with its model, data and judge loaded. The data are checked before the model is loaded."""
    kind = LOOPS[command]
    backends.resolve(config.backend, config.device)
    records = read_prompts(settings.data, needs_answers=kind.needs_answers, reading=config.reading)
    set_seed(config.seed)  # for weights that the checkpoint lacks
    tokenizer, model = train.load(settings.model, settings.dtype, config.trust_remote_code)
    return kind(
        settings,
        config,
        tokenizer=tokenizer,
        model=model,
        records=records,
        peft_config=train.lora(settings) if settings.lora_rank else None,
        loss=getattr(settings, "own_loss", None),
        during_training=_during_training,
        report=_Lines() if config.process_index == 0 else lambda entry: None,
    )


@contextmanager
def _during_training(trainer: FusedTrainer) -> Iterator[None]:
    """Let Ctrl-C end a round's training with a checkpoint; print no logs, because a line per round is printed."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(progress.BarWithoutLogs())
    with progress.StopOnCtrlC() as ctrl_c:
        trainer.add_callback(ctrl_c)
        yield


class _Lines:
    """Prints a line of numbers per finished round."""

    def __init__(self):
        self.names: list[str] = []

    def __call__(self, entry: dict[str, Any]) -> None:
        if not self.names:
            self.names = [name for name in COLUMNS if name in entry or name == "win_rate"]
            print(" round " + " ".join(f"{COLUMNS[name]:>10}" for name in self.names) + f" {'loss':>10} {'seconds':>8}")
        cells = (f"{'-':>10}" if entry.get(name) is None else f"{entry[name]:10.4g}" for name in self.names)
        seconds = entry["sampling_seconds"] + entry["training_seconds"]
        print(f"{entry['round']:6d} " + " ".join(cells) + f" {entry['log'][-1]['loss']:10.4f} {seconds:8.1f}")


def _check_folder(config: FusedPreferenceConfig) -> None:
    folder, wanted = Path(config.output_dir), (config.resume_from_checkpoint or "false").lower()
    if wanted not in ("true", "false"):
        raise CommandError(f"--resume_from_checkpoint must be true or false for a run of rounds, got {wanted}")
    if wanted == "true" and not (folder / STATE).is_file():
        raise CommandError(f"--resume_from_checkpoint true: {folder} holds no {STATE} of a run to continue")
    held = next((name for name in (STATE, *resuming.RESULTS) if (folder / name).exists()), None)
    if wanted == "false" and held is not None:
        raise CommandError(
            f"--output_dir {folder} already holds {held} of another model or run: add --resume_from_checkpoint true to "
            "continue a run of rounds, or choose another folder"
        )


# ---- results ------------------------------------------------------------------------------------------------------


def write(command: str, loop: Loop, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the last round's model and its card, ``metrics.json``, ``curves.png`` and ``report.html`` into the output
    folder: all or none. Returns the contents of ``metrics.json``.
    """
    own = getattr(loop.settings, "own_loss", None)
    config = loop.config if own is None else loop.config.with_loss(own)
    steps = []
    for entry in rounds:
        first = steps[-1]["step"] if steps else 0
        steps += [{**step, "step": first + step["step"], "round": entry["round"]} for step in entry["log"]]
    metrics = {
        "command": command,
        "settings": {name: value for name, value in vars(loop.settings).items() if name != "own_loss"},
        "config": config.to_dict() | {"max_length": loop.max_length},
        "torch": torch.__version__,
        "device": str(loop.config.device),
        "backend": backends.resolve(loop.config.backend, loop.config.device),
        "seconds": sum(entry["sampling_seconds"] + entry["training_seconds"] for entry in rounds),
        "memory": train.peak_memory(loop.config.device),
        "rounds": [{name: value for name, value in entry.items() if name != "log"} for entry in rounds],
        "steps": steps,
        "data": {"prompts": {"examples": len(loop.data), "truncated": 0, "dropped": loop.left_out}},
        "model": _model(loop, rounds),
        "samples": _samples(loop, rounds),
    }
    if loop.judge is not None:
        found = held_out.judged([_scores(loop, entry["round"]) for entry in rounds], loop.config.seed)
        if found is not None:
            metrics["judged"] = found._asdict()
            metrics["model"]["best_samples"] = _best_samples(loop, rounds, found)
    options = {name: value for name in ON_THE_CARD if (value := getattr(loop.settings, name)) is not None}
    if loop.settings.judge is not None:
        is_command = len(loop.settings.judge.split()) > 1  # which may hold paths and keys
        options["judge"] = "a command" if is_command else cards.name_of(loop.settings.judge)
    options |= {"samples": loop.samples, **cards.options_of(config), "max_length": loop.max_length}
    options["processes"] = loop.config.world_size
    checkpoint = loop.output / rounds[-1]["checkpoint"]
    with results.draft_of(loop.output) as draft:
        for path in checkpoint.iterdir():
            if path.is_file() and not any(map(path.match, STATE_OF_TRAINING)):
                shutil.copyfile(path, draft / path.name)
        results.write_json(draft / "metrics.json", metrics)
        plot(metrics, draft / "curves.png")
        report.write(draft / "report.html", metrics, loop.output.name)
        (draft / cards.NAME).write_text(cards.card(metrics, options), encoding="utf-8")
    return metrics


def _model(loop: Loop, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what ``held_out.saved_model`` returns, of a run of rounds."""
    named = {"folder": str(loop.output), "trainer": type(loop).__name__, "scores": False, "round": rounds[-1]["round"]}
    return named | held_out.kind_of(loop.peft_config, loop.settings.model)


def _scores(loop: Loop, number: int) -> dict[int, list[float]]:
    """Return the judge's scores of a round's samples, by prompt."""
    found: dict[int, list[float]] = {}
    for line in read_samples(loop.output / f"round-{number}"):
        found.setdefault(line["prompt_number"], []).append(line["score"])
    return found


def _best_samples(loop: Loop, rounds: list[dict[str, Any]], found: held_out.Judged) -> str:
    """Return a sentence on the weights that drew the best round's samples: those that the round began with."""
    checkpoint = loop.checkpoint_before(found.best_round)
    text = f"The best samples by the judge ({found.best:.3g}) are those of round {found.best_round}, drawn from "
    if checkpoint is None:
        return f"{text}the model before training."
    if Path(checkpoint).is_dir():
        return f"{text}{checkpoint}."
    return f"{text}the model of round {found.best_round - 1}, of which no checkpoint is kept."


def _samples(loop: Loop, rounds: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return samples of the first and the last round, if possible of the same prompts; None of one round."""
    if len(rounds) < 2:
        return None
    sides: list[dict[int, dict[str, Any]]] = [{}, {}]
    for side, entry in zip(sides, (rounds[0], rounds[-1]), strict=True):
        for line in read_samples(loop.output / f"round-{entry['round']}"):
            side.setdefault(line["prompt_number"], line)  # of several samples the first
    first, last = sides
    shared = [number for number in first if number in last][:SAMPLES_SHOWN]
    rows = []
    for number in shared or [*list(first)[:SAMPLES_SHOWN], *list(last)[:SAMPLES_SHOWN]]:
        prompt = (first.get(number) or last[number])["prompt"]
        if not isinstance(prompt, str):
            prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
        rows.append({"prompt": prompt, "before": _text_of(first.get(number)), "after": _text_of(last.get(number))})
    caption = f"{len(rows)} prompts; before: samples of round 1, after: samples of round {rounds[-1]['round']}"
    return {"caption": caption, "rows": rows}


def _text_of(line: dict[str, Any] | None) -> str:
    if line is None:
        return "(not a prompt of this round)"
    score = "" if line["score"] is None else f"\n(score {line['score'] + 0:.3g})"  # + 0: -0.0 becomes 0
    return line["completion"] + samples.CUT * line["is_cut"] + score


def plot(metrics: dict[str, Any], path: Path) -> None:
    """Write a picture of the judge's scores and the KL divergence by round, and of the loss by step."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("score of the samples", "round", metrics["rounds"], {"score": "mean", "best_score": "best of a prompt"}),
        ("win rate against the last round", "round", metrics["rounds"], {"win_rate": ""}),
        (
            "KL divergence, nats per sample",
            "round",
            metrics["rounds"],
            {"kl": "of the round", "kl_reference": "to ref"},
        ),
        ("loss", "step", metrics["steps"], {"loss": ""}),
    )
    drawn = [panel for panel in panels if any(name in entry for name in panel[3] for entry in panel[2])]
    for axes, (title, unit, entries, names) in zip(
        figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True
    ):
        for name, label in names.items():
            points = [(entry[unit], entry[name]) for entry in entries if name in entry]
            if points:
                axes.plot(*zip(*points, strict=True), "-o" if unit == "round" else "-", label=label or None)
        axes.set(title=title, xlabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if sum(any(name in entry for entry in entries) for name in names) > 1:
            axes.legend()
    figure.savefig(path, dpi=120, format="png")
