"""The command ``kto-fused`` and its subcommands. A subcommand's modules are imported once it has been chosen."""

import argparse
import importlib.util
import os
import sys

from .. import log
from . import early, process
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
LOOPS = ("spin", "online", "ppo")
TRAINS = ("train", *early.RECIPES, *LOOPS, "demo")
HELP, HELP_ALL = {"-h", "--help"}, {"--help-all", "--help_all"}
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
PACKAGES = {
    **dict.fromkeys((*TRAINS, "data"), TRAINING),
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
        epilog="kto-fused COMMAND --help lists the flags of a command that most runs need, --help-all all of them.",
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
    let_threads_sleep()
    only_prints = arguments[:1] not in [[name] for name in TRAINS] or bool((HELP | HELP_ALL) & set(arguments))
    streams = process.lasting_streams(None if only_prints else CONTINUES)
    with streams as stdout, process.orderly_end(), process.without_meaningless_warnings():
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
        return run(command, arguments[1:]) if answered(command, arguments[1:]) is None else 0
    except (Exception, KeyboardInterrupt) as error:
        process.remove_temporary_files()
        stop = process.stopped_by(error)
        if stop is None and not isinstance(error, CommandError):
            raise
        is_terminated = isinstance(stop, process.Terminated)
        message = error if stop is None else "ended by SIGTERM" if is_terminated else "interrupted"
        print(f"kto-fused {command}: {message}", file=sys.stderr)
        return 2 if stop is None else 143 if is_terminated else 130


def let_threads_sleep() -> None:
    """Let the threads that PyTorch's OpenMP keeps for a CPU sleep while they wait, unless the user has chosen.

    By default they spin for milliseconds, which stops whatever shares the cores with them: another run, or their own
    main thread. OpenMP reads the variable when PyTorch is imported.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def answered(command: str, arguments: list[str]) -> str | None:
    """Print the help of a command with many flags, if it is asked for, and return it; check the arguments otherwise."""
    if command not in (*TRAINS, "estimate") or HELP_ALL & set(arguments):
        return None
    if HELP & set(arguments):
        text = early.help_text(command, arguments, description(command))
        if text is not None:
            print(text, end="")
        return text
    return early.check(command, arguments)


def description(command: str) -> str:
    """Return what a command does, as a sentence."""
    does = COMMANDS[command]
    return f"{does[0].upper()}{does[1:]}."  # str.capitalize would lower the letters of KTO


def run(command: str, arguments: list[str]) -> int:
    arguments = ["--help" if text in HELP_ALL else text for text in arguments]
    log.show()  # before the data are read, whose layout the log names
    if command in early.RECIPES:
        return importlib.import_module(".train", __package__).main(arguments, command)
    if command in LOOPS:
        return importlib.import_module(".loops", __package__).main(command, arguments)
    if command != "env":
        return importlib.import_module(f".{command}", __package__).main(arguments)
    argparse.ArgumentParser(prog="kto-fused env", description=description("env")).parse_args(arguments)
    return importlib.import_module(".environment", __package__).run()
