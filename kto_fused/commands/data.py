"""``kto-fused data``: says what a training on files of records would train on, without a model's weights.

It prints the layout, counts, duplicates, lengths, how many examples would be cut or dropped, and three examples with
the trained tokens marked. Libraries are imported once the paths and flags were checked.
"""

import argparse
from collections import Counter
from collections.abc import Iterable
from glob import has_magic
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from .errors import CommandError, sentence

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ..data.layouts import Reading
    from ..data.tokens import Prepared

RECIPES = ("kto", "dpo", "sft", "reward")
BEGIN, END = ">>>", "<<<"  # mark trained tokens
SHOWN = 1500  # characters of a text that are printed
DESCRIPTION = (
    "Show what kto-fused train would train on: the layout of the records, counts, duplicates, lengths, and with "
    "--model how many examples are cut or dropped, and three examples with the trained tokens marked. Exit code 2: a "
    "record is bad."
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(message)


def parser() -> argparse.ArgumentParser:
    flags = _Parser(prog="kto-fused data", description=DESCRIPTION, allow_abbrev=False)
    flags.add_argument("files", nargs="+", metavar="FILE", help="what --data of kto-fused train takes")
    flags.add_argument("--model", help="the model to train, whose tokenizer and chat template are used")
    flags.add_argument("--loss", choices=RECIPES, default="kto", help="the method that would train (default: kto)")
    flags.add_argument(
        "--max_length",
        "--max-length",
        default="auto",
        help="as of kto-fused train: a number of tokens, null for the model's positions, or auto (1024)",
    )
    flags.add_argument("--columns", nargs="+", metavar="FIELD=COLUMN", help="names that the columns have in the data")
    flags.add_argument("--label_true", "--label-true", nargs="+", help="labels that mean liked")
    flags.add_argument("--label_false", "--label-false", nargs="+", help="labels that mean not liked")
    flags.add_argument("--chat", choices=("auto", "always", "never"), default="auto", help="as of kto-fused train")
    flags.add_argument("--all-errors", "--all_errors", action="store_true", help="list every bad record")
    flags.add_argument(
        "--histogram", metavar="FILE.png", default="lengths.png", help="the histogram of lengths (default: lengths.png)"
    )
    flags.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the tokenizer")
    return flags


def main(arguments: list[str]) -> int:
    settings = parser().parse_args(arguments)
    _check(settings)
    from ..data import form, layouts, records

    forms = {"sft": form.DEMONSTRATIONS, "reward": form.COMPARISONS}.get(settings.loss, form.PREFERENCES)
    try:
        reading = layouts.reading(settings.columns, settings.label_true, settings.label_false, settings.chat)
        if settings.all_errors:
            _list_errors(records.bad_records(settings.files, forms, reading))
        found = records.load(settings.files, forms, reading)
        print(f"Layout: {'; '.join(records.layouts_of(settings.files, forms, reading))}")
        _describe(found)
        if settings.model is None:
            lengths = {"characters": _characters(found)}
            print("Give --model for lengths in tokens, what is cut and dropped, and the trained tokens of examples.")
            max_length = None
        else:
            lengths, max_length = _describe_tokens(settings, found, forms, reading)
    except (ValueError, OSError) as error:  # DataError is a ValueError
        raise CommandError(sentence(error)) from error
    _print_lengths(lengths)
    _draw(lengths, max_length, settings.histogram)
    return 0


def _check(settings: argparse.Namespace) -> None:
    for name in settings.files:
        if not (Path(name).exists() or has_magic(name) or ":" in name):
            raise CommandError(f"{name}: no such file or folder")
    for text in settings.columns or ():
        if "=" not in text:
            raise CommandError(f"--columns must have the form FIELD=COLUMN, such as prompt=question, got {text!r}")
    if settings.max_length not in ("auto", "null"):
        if not settings.max_length.isdecimal() or int(settings.max_length) < 2:
            raise CommandError(
                f"--max_length must be a number of at least 2, auto or null, got {settings.max_length!r}"
            )
        settings.max_length = int(settings.max_length)
    folder = Path(settings.histogram).parent
    if not folder.is_dir() or Path(settings.histogram).suffix != ".png":
        raise CommandError(
            f"--histogram {settings.histogram}: expected a name that ends in .png in a folder that exists"
        )


def _list_errors(errors: Iterable[Exception]) -> None:
    count = 0
    for error in errors:
        print(error)
        count += 1
    if count:
        raise CommandError(f"{count} bad record{'s' * (count > 1)}, listed above")


# ---- records ------------------------------------------------------------------------------------------------------


def _describe(records: "Dataset") -> None:
    """Print the number of records by label, and how often records and prompts are repeated."""
    from ..data.records import prompt_keys, record_keys

    kind = "texts" if records.features[records.column_names[0]].__class__.__name__ == "Value" else "conversations"
    print(f"Records: {len(records)}, {kind} with {', '.join(records.column_names)}")
    if "label" in records.column_names:
        count = Counter(label for batch in records.select_columns("label").iter(10_000) for label in batch["label"])
        print(f"Labels: {count[True]} liked, {count[False]} not liked ({count[True] / len(records):.0%} liked)")
    if "tools" in records.column_names:
        number = sum(bool(text) for batch in records.select_columns("tools").iter(10_000) for text in batch["tools"])
        print(f"Tools: {number} records have some")
    copies, prompts = _counts(record_keys(records)), _counts(prompt_keys(records, 0))
    print(f"Duplicates: {len(records) - len(copies)} records repeat an earlier one")
    print(f"Prompts: {len(prompts)} different ones; the most frequent one is in {prompts.max()} records")


def _counts(keys: "np.ndarray") -> "np.ndarray":
    import numpy as np

    return np.unique(keys, return_counts=True)[1]


def _characters(records: "Dataset") -> "np.ndarray":
    import numpy as np

    from ..data.form import characters

    return np.fromiter(map(characters, records), np.int64, len(records))


# ---- tokens -------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """Numbers of tokens by part of an example, and the longest sequence."""

    lengths: dict[str, "np.ndarray"]
    max_length: int | None


def _describe_tokens(settings: argparse.Namespace, records: "Dataset", forms: Any, reading: "Reading") -> Tokens:
    import pyarrow.compute as pc
    from transformers import AutoConfig, AutoTokenizer

    from ..data import tokens
    from ..data.records import Checked
    from ..huggingface.files import load_pretrained
    from ..trainers.configs import AUTO_MAX_LENGTH
    from ..trainers.models import max_positions

    try:
        options = {"name": settings.model, "trust_remote_code": settings.trust_remote_code}
        tokenizer, config = load_pretrained(AutoTokenizer, **options), load_pretrained(AutoConfig, **options)
    except Exception as error:  # files that others wrote can fail in any way
        raise CommandError(f"--model {settings.model} cannot be loaded: {sentence(error)}") from error
    positions = max_positions(config)
    wanted = {"auto": AUTO_MAX_LENGTH, "null": None}.get(settings.max_length, settings.max_length)
    if isinstance(settings.max_length, int) and positions is not None and wanted > positions:
        raise CommandError(f"--max_length must be at most {positions}, the positions that the model has, got {wanted}")
    limit = min((limit for limit in (wanted, positions) if limit is not None), default=None)
    prepare = {
        "kto": tokens.prepare_unpaired,
        "sft": tokens.prepare_completions,
    }.get(settings.loss, tokens.prepare_paired)
    options = {"max_length": limit, "reading": reading}
    if settings.loss == "kto":
        options |= {"mismatch": False, "needs_both_labels": False}
    if settings.loss == "reward":
        options["margins"] = True
    prepared = prepare(Checked(records), tokenizer, **options)
    _print_prepared(prepared, limit)
    examples = prepared.dataset
    columns = [name for name in examples.column_names if name.endswith("_ids")]
    lengths = {
        f"{name.removesuffix('_ids')} tokens": tokens.column_of(examples, name, pc.list_value_length)
        for name in columns
    }
    lengths["whole tokens"] = tokens.column_of(examples, "length")
    _print_examples(examples, tokenizer)
    return Tokens(lengths, limit)


def _print_prepared(prepared: "Prepared", max_length: int | None) -> None:
    from ..data.token_rows import DROPPED

    kept = len(prepared.dataset)
    print(
        f"Examples: {kept} at max_length={max_length}; {prepared.truncated} of them with a completion cut, and "
        f"{prepared.dropped} more dropped"
    )
    for reason, count in prepared.dropped_for.items():
        print(f"  {count} dropped: {DROPPED[reason]}")


def _print_examples(examples: "Dataset", tokenizer: "PreTrainedTokenizerBase") -> None:
    rows = sorted({0, len(examples) // 2, len(examples) - 1})
    print(f"\nExamples as the model reads them; trained tokens stand between {BEGIN} and {END}:")
    for row in rows:
        example = examples[row]
        label = {True: ", liked", False: ", not liked"}.get(example.get("label"), "")
        for side in [name.removesuffix("_ids") for name in example if name.endswith("_ids") and name != "prompt_ids"]:
            ids = example[f"{side}_ids"]
            text = tokenizer.decode(example["prompt_ids"]) + _marked(ids, example.get(f"{side}_mask"), tokenizer)
            print(f"--- example {row}, {side}{label}\n{_shortened(text)}")
    print()


def _marked(ids: list[int], mask: list[bool] | None, tokenizer: "PreTrainedTokenizerBase") -> str:
    parts = []
    for is_trained, run in groupby(zip(ids, mask or [True] * len(ids), strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in run])
        parts.append(f"{BEGIN}{text}{END}" if is_trained else text)
    return "".join(parts)


def _shortened(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    half = SHOWN // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters are left out here ...]\n{text[-half:]}"


# ---- lengths ------------------------------------------------------------------------------------------------------


def _print_lengths(lengths: dict[str, "np.ndarray"]) -> None:
    import numpy as np

    print(f"{'lengths':20}{'least':>8}{'median':>8}{'90 %':>8}{'99 %':>8}{'most':>8}{'sum':>14}")
    for name, values in lengths.items():
        marks = np.quantile(values, [0, 0.5, 0.9, 0.99, 1], method="nearest")
        print(f"{name:20}" + "".join(f"{mark:8d}" for mark in marks) + f"{values.sum():14d}")


def _draw(lengths: dict[str, "np.ndarray"], max_length: int | None, file: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.2 * len(lengths)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, values) in zip(
        figure.subplots(len(lengths), 1, squeeze=False, sharex=True)[:, 0], lengths.items(), strict=True
    ):
        axes.hist(values, bins=50)
        axes.set(title=name, ylabel="examples")
        if max_length is not None and 2 * max(array.max() for array in lengths.values()) > max_length:
            axes.axvline(max_length, color="tab:red", label=f"max_length {max_length}")
            axes.legend()
    axes.set_xlabel("characters" if "characters" in lengths else "tokens")
    try:
        figure.savefig(file, dpi=120)
    except OSError as error:
        raise CommandError(f"--histogram {file} cannot be written: {sentence(error)}") from error
    print(f"Wrote the histogram of the lengths to {file}")
