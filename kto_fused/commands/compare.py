"""``kto-fused compare``: the last values of several runs side by side, and their curves drawn together."""

import argparse
import json
from pathlib import Path
from typing import Any

from .cli import description
from .errors import CommandError
from .failures import check_writable, user_errors


def main(arguments: list[str]) -> int:
    """Print the last values of several runs side by side, and write a page with their curves drawn together."""
    parser = argparse.ArgumentParser(prog="kto-fused compare", description=description("compare"))
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output folder of a finished run")
    parser.add_argument("--out", default="compare.html", help="page to write (default: compare.html)")
    options = parser.parse_args(arguments)
    runs = {name: read(Path(run)) for name, run in zip(_names(options.runs), options.runs, strict=True)}
    check_writable(Path(options.out).parent)
    from ..trainers import held_out  # here: it imports PyTorch and the trainers
    from . import report

    names = list(dict.fromkeys(name for run in runs.values() for name in _last_values(run)))
    width = max(10, *map(len, runs)) + 2
    print(" " * 28 + "".join(f"{name:>{width}}" for name in runs))
    rows = []
    for name in names:
        values = [_last_values(run).get(name) for run in runs.values()]
        cells = ["-" if value is None else f"{value:.4g}" for value in values]
        rows.append((name, *cells))
        print(f"{name:28}" + "".join(f"{cell:>{width}}" for cell in cells))
    told = [f"{name}: {text}" for name, run in runs.items() if (text := held_out.sentence(run)) is not None]
    print("".join(f"\n{line}" for line in told))
    parts = [*(f"<p>{report.text_of(line)}</p>" for line in told), report.curves(runs), "<h2>Last values</h2>"]
    parts.append(report.table(rows, ("", *runs)))
    with user_errors(OSError, prefix=f"--out {options.out} cannot be written: "):
        Path(options.out).write_text(report.page("Runs: " + ", ".join(runs), parts), encoding="utf-8")
    print(f"\nWrote {options.out}")
    return 0


def read(folder: Path) -> dict[str, Any]:
    """Return the contents of a run's ``metrics.json``."""
    path = folder / "metrics.json"
    if not path.is_file():
        raise CommandError(f"{folder} holds no metrics.json: expected the output folder of a finished run")
    with user_errors(OSError, ValueError, prefix=f"{path} cannot be read: "):
        metrics = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(metrics, dict) or not isinstance(metrics.get("steps"), list):
        raise CommandError(f"{path} holds no steps: expected what a run of kto-fused writes")
    return metrics


def _names(runs: list[str]) -> list[str]:
    """Return the folders' last names where they differ, else the paths as they are given."""
    short = [Path(run).resolve().name for run in runs]
    names = short if len(set(short)) == len(short) else runs
    if len(set(names)) < len(names):
        raise CommandError(f"a run is given twice: {' '.join(runs)}")
    return names


def _last_values(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the last logged values of a run, under their names; scalars alone."""
    found: dict[str, float] = {}
    for entry in (*metrics["steps"][-1:], *metrics.get("evaluations", [])[-1:], *metrics.get("rounds", [])[-1:]):
        found |= {name: value for name, value in entry.items() if type(value) in (int, float)}
    return found | {name: metrics[name] for name in ("seconds", "samples_per_second") if name in metrics}
