"""What a command checks before anything heavy is imported: flags, settings files, paths, first records, packages.

PyTorch, transformers and the trainers take about ten seconds of a CPU to import. Errors that need none of them are
found here. The command checks all of it again, and more, once they are imported.
"""

import importlib.util
import os
import re
from glob import has_magic
from pathlib import Path
from typing import Any, NamedTuple

from . import flag_table, overview
from .arguments import FirstLook, first_look, folder_of, objective_and_file, recipe_of, trained_elsewhere
from .errors import CommandError, check_names, sentence
from .failures import check_writable

RECIPES = ("kto", "dpo", "sft", "reward")
# the packages of the values of --report_to, one of which must be installed; transformers adds others now and then
REPORTS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    **{name: (name,) for name in ("wandb", "mlflow", "trackio", "clearml", "codecarbon", "dvclive", "swanlab")},
    "comet_ml": ("comet_ml",),
    "neptune": ("neptune",),
    "azure_ml": ("azureml",),
}
FIRST_RECORDS = 100  # of each file
# flags that every recipe has
OF_ALL = ("model", "data", "eval_data", "ref_model", "report_to", "output_dir", "push_to_hub", "hub_token")


class Look(NamedTuple):
    """What is known of a command's arguments before its configuration is imported."""

    first: FirstLook
    key: str | None  # of the command's flags in the table; None where a loss of the user's own has flags too


def look_at(command: str, arguments: list[str]) -> Look:
    """Read ``--loss`` and the file of ``--config``.

    Raises:
        CommandError: the file cannot be read, a flag is given by two names, or no command trains the loss.
    """
    if command in ("demo", "estimate"):
        return Look(FirstLook(None, None, {}, arguments), command)
    first = first_look(command, arguments)
    if command in ("spin", "ppo"):
        return Look(first, command)
    recipes = ("dpo", "kto") if command == "online" else RECIPES
    loss = first.loss or (command if command in RECIPES else recipes[0])
    if ":" in loss:
        return Look(first, None)
    recipe = loss if loss in recipes else recipe_of(loss, recipes, flag_table.table())
    if command in RECIPES and recipe != command:
        raise trained_elsewhere(loss, recipe)
    return Look(first, f"online {recipe}" if command == "online" else recipe)


def help_text(command: str, arguments: list[str], description: str) -> str | None:
    """Return the text of ``--help``, or None where a loss of the user's own has flags too."""
    key = look_at(command, [text for text in arguments if text not in ("-h", "--help")]).key
    return None if key is None else overview.text(key, command, description)


def check(command: str, arguments: list[str]) -> None:
    """Check the arguments of a command whose flags the table lists.

    Raises:
        CommandError: a flag, a setting, a path or one of the first records is wrong, or a package is missing.
    """
    first, key = look_at(command, arguments)
    parser = flag_table.TableParser(key or "kto", command, OF_ALL if key is None else None)
    if command in (*RECIPES, "train"):
        parser.set_defaults(output_dir=folder_of(first.loss or (command if command in RECIPES else "kto")))
    elif key is None:
        parser.set_defaults(output_dir=f"runs/{command}")
    written = {name: value for name, value in first.settings.items() if key is not None or name in OF_ALL}
    values = parser.values([*parser.arguments_from(written, first.path), *first.arguments], strict=key is not None)
    check_reports(values.get("report_to"))
    if values.get("load_in_4bit") and importlib.util.find_spec("bitsandbytes") is None:
        raise CommandError(
            "--load_in_4bit needs the package bitsandbytes, which is not installed: in a clone of kto-fused, run pip "
            "install -c constraints.txt '.[train,4bit]'"
        )
    if command == "estimate":
        return
    for flag in ("model", "ref_model"):
        if values.get(flag) is not None:
            check_model(flag, values[flag])
    if command == "demo":
        return
    files = [objective_and_file(text)[1] for text in values["data"]] + (values.get("eval_data") or [])
    for flag, paths in (("data", values["data"]), ("eval_data", values.get("eval_data") or ())):
        for text in paths:
            if not is_there(objective_and_file(text)[1]):
                may_be_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None
                hint = f"; of a data set of the Hub the split is named too, as in {text}:train" if may_be_hub else ""
                raise CommandError(f"--{flag} {text}: no such file or folder{hint}")
    output_dir = parser.get_default("output_dir") if values["output_dir"] is None else values["output_dir"]
    check_names(output_dir, values["model"], *files)
    check_writable(output_dir)
    if command not in (*RECIPES, "train"):
        return
    if values["push_to_hub"] and os.environ.get("RANK", "0") == "0":  # the process that uploads
        check_upload(values["hub_token"], output_dir)
    if key is not None:
        check_records(files, values, key)


def check_reports(names: Any) -> None:
    for name in names if isinstance(names, list) else [names]:
        packages = REPORTS.get(name, ())
        if packages and not any(map(importlib.util.find_spec, packages)):
            extra = ": in a clone of kto-fused, run pip install -c constraints.txt '.[train,tensorboard]'"
            raise CommandError(
                f"--report_to {name} needs the package {' or '.join(packages)}, which is not installed"
                + (extra if name == "tensorboard" else f": run pip install {packages[0]}")
            )


def check_model(flag: str, name: str) -> None:
    """Check what needs no library of a model's folder or id."""
    path = Path(name).expanduser()
    if path.is_dir():
        has_model = (path / "config.json").is_file() or (path / "adapter_config.json").is_file()
        if not has_model and not any(path.glob("*.gguf")):
            raise CommandError(f"--{flag} {name} cannot be loaded: the folder holds no config.json")
    elif path.exists():
        raise CommandError(f"--{flag} {name} cannot be loaded: it is a file, not a model's folder")
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):  # an id of the Hub has one slash
        raise CommandError(f"--{flag} {name} cannot be loaded: there is no such folder, and it is no id of the Hub")


def check_upload(token: str | None, folder: str) -> None:
    """Check that ``--push_to_hub`` may ask the Hub, and has a token."""
    from huggingface_hub import constants, get_token  # here, because few runs upload

    later = f"or leave --push_to_hub out and upload {folder} after the run with hf upload"
    if constants.HF_HUB_OFFLINE:
        raise CommandError(
            f"--push_to_hub needs the Hub, and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids it: unset them, {later}"
        )
    try:
        token = token or get_token()
    except Exception as error:  # a token that another service must give first
        raise CommandError(f"--push_to_hub finds no token of the Hub: {sentence(error)}") from error
    if token is None:
        raise CommandError(
            f"--push_to_hub finds no token of the Hub: run hf auth login, set HF_TOKEN or give --hub_token, {later}"
        )


def is_there(name: str) -> bool:
    """Whether a path, a pattern or a name of the Hub with its split may hold data."""
    return Path(name).exists() or has_magic(name) or ":" in name


def check_records(files: list[str], values: dict[str, Any], recipe: str) -> None:
    """Check the first records of each file that is on disk."""
    from ..data import form, layouts, records  # they import datasets, which the training needs too

    forms = {"sft": form.DEMONSTRATIONS, "reward": form.COMPARISONS}.get(recipe, form.PREFERENCES)
    try:
        reading = layouts.reading(values["columns"], values["label_true"], values["label_false"], values["chat"])
        on_disk = [name for name in files if Path(name).exists() or has_magic(name)]
        records.check_first(on_disk, forms, reading, FIRST_RECORDS)
    except (ValueError, OSError) as error:  # DataError is a ValueError
        raise CommandError(sentence(error)) from error
