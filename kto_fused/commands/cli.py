"""The command ``kto-fused`` and its subcommands. A subcommand's modules are imported once it has been chosen."""

import argparse
import importlib.util
import sys

from . import process
from .errors import CommandError, check_names

TRAINING = ("accelerate", "datasets", "filelock", "matplotlib", "safetensors", "tqdm", "transformers", "xxhash", "yaml")
INSTALL = "in a clone of kto-fused, run pip install -c constraints.txt '.[train]'"
COMMANDS = {
    "train": "train a model with the loss of --loss on files of records",
    "kto": "train a model with KTO or another loss of single completions, on feedback",
    "dpo": "train a model with DPO or another loss of pairs",
    "sft": "train a model with supervised fine-tuning, on demonstrations",
    "reward": "train a reward model, on pairs",
    "spin": "train a model in rounds of self-play against its own samples (SPIN)",
    "online": "train a model in rounds on its own samples, which a judge scores (online DPO, KTO and their relatives)",
    "ppo": "train a model in rounds on its own samples by policy gradients (PPO, GRPO and its relatives)",
    "demo": "train a small language model with KTO on real text, as a first try",
    "data": "show what a training on files would train on: layout, counts, lengths, rendered examples",
    "chat": "talk with a trained model on the terminal, also beside the model that it was trained from",
    "merge": "merge an adapter into its base model, as a folder that needs no peft",
    "compare": "print the last values of several runs side by side, and draw their curves together",
    "estimate": "print the memory that the loss and a training step need, with and without kto-fused, and the longest "
    "sequences that fit a GPU",
    "env": "print versions, devices, and the backend that each device gets",
}
RECIPES = ("kto", "dpo", "sft", "reward")
LOOPS = ("spin", "online", "ppo")
PACKAGES = {
    **dict.fromkeys(("train", *RECIPES, *LOOPS, "demo", "data"), TRAINING),
    "estimate": ("transformers", "yaml"),
    "compare": ("matplotlib",),
    "merge": ("transformers", "peft"),
    "chat": ("transformers",),
    "env": (),
}
CONTINUES = "the run continues without it and writes its results"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="kto-fused",
        description="Fused KTO and DPO losses for PyTorch.",
        epilog="kto-fused COMMAND --help lists the flags of a command.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, does in COMMANDS.items():
        commands.add_parser(name, help=does, add_help=False)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done, even if stdout was lost meanwhile (commands that train continue and write their results). 2: an error,
    printed as one sentence on stderr, or a lost stdout of a command that only prints. 130: Ctrl-C. 143: SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    writes = bool(arguments) and arguments[0] in ("train", *RECIPES, *LOOPS, "demo")
    only_prints = not writes or bool({"-h", "--help"} & set(arguments))
    with process.lasting_streams(None if only_prints else CONTINUES) as stdout, process.orderly_end():
        code = _main(arguments)
        stdout.flush()
        is_lost = stdout.loss is not None and not isinstance(stdout.loss, BrokenPipeError)
        return 2 if code == 0 and only_prints and is_lost else code


def _main(arguments: list[str]) -> int:
    command = parser().parse_args(arguments[:1]).command
    try:
        missing = [name for name in PACKAGES[command] if importlib.util.find_spec(name) is None]
        if missing:
            raise CommandError(f"these packages are not installed: {', '.join(missing)}; {INSTALL}")
        check_names(*arguments)
        return run(command, arguments[1:])
    except (Exception, KeyboardInterrupt) as error:
        process.remove_temporary_files()
        stop = process.stopped_by(error)
        if stop is None and not isinstance(error, CommandError):
            raise
        is_terminated = isinstance(stop, process.Terminated)
        message = error if stop is None else "ended by SIGTERM" if is_terminated else "interrupted"
        print(f"kto-fused {command}: {message}", file=sys.stderr)
        return 2 if stop is None else 143 if is_terminated else 130


def description(command: str) -> str:
    """Return what a command does, as a sentence."""
    does = COMMANDS[command]
    return f"{does[0].upper()}{does[1:]}."  # str.capitalize would lower the letters of KTO


def run(command: str, arguments: list[str]) -> int:
    if command in RECIPES:
        return importlib.import_module(".train", __package__).main(arguments, command)
    if command in LOOPS:
        return importlib.import_module(".loops", __package__).main(command, arguments)
    if command != "env":
        return importlib.import_module(f".{command}", __package__).main(arguments)
    from . import environment

    argparse.ArgumentParser(prog="kto-fused env", description=description("env")).parse_args(arguments)
    return environment.run()
