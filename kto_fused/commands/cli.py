"""The command ``kto-fused``. What a command needs is imported once it is chosen."""

import argparse
import importlib.util
import sys

from . import process
from .errors import CommandError, check_names

TRAINING = (
    *("accelerate", "datasets", "filelock", "matplotlib", "safetensors", "tqdm", "transformers", "xxhash", "yaml"),
)
INSTALL = "in a clone of kto-fused, pip install -c constraints.txt '.[train]'"
COMMANDS = {
    "train": "train a model with KTO or DPO on files of feedback or pairs",
    "demo": "train a small language model with KTO on real text, and compare with the plain reference",
    "estimate": "the memory a model's loss needs, plainly and fused, and the longest sequences that fit a GPU",
    "env": "versions, devices, and which kernels are used on them",
}
RUNS_ON = "the run goes on without it, to its end"
NEEDS = {"train": TRAINING, "demo": TRAINING, "estimate": ("transformers", "yaml"), "env": ()}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="kto-fused",
        description="Fused KTO and DPO losses for PyTorch.",
        epilog="kto-fused COMMAND --help lists a command's flags.",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, does in COMMANDS.items():
        commands.add_parser(name, help=does, add_help=False)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns the exit code.

    0: done, even if stdout was lost on the way (``train`` and ``demo`` go on, and write their results); 2: an error,
    said in one sentence on stderr, or stdout could not be written by a command that only prints; 130: Ctrl-C; 143:
    SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    prints_alone = arguments[:1] not in (["train"], ["demo"]) or {"-h", "--help"} & set(arguments)
    goes_on = None if prints_alone else RUNS_ON
    with process.lasting_streams(goes_on) as stdout, process.orderly_end():
        code = _main(arguments)
        stdout.flush()
        is_lost = stdout.loss is not None and not isinstance(stdout.loss, BrokenPipeError)
        return 2 if code == 0 and goes_on is None and is_lost else code


def _main(arguments: list[str]) -> int:
    command = parser().parse_args(arguments[:1]).command
    try:
        missing = [name for name in NEEDS[command] if importlib.util.find_spec(name) is None]
        if missing:
            raise CommandError(f"needs {', '.join(missing)}: {INSTALL}")
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


def run(command: str, arguments: list[str]) -> int:
    if command != "env":
        return importlib.import_module(f".{command}", __package__).main(arguments)
    from . import environment

    argparse.ArgumentParser(prog="kto-fused env", description=f"Print {COMMANDS[command]}.").parse_args(arguments)
    return environment.run()
