"""All of it side by side in one run: ``python benchmarks/report.py``.

Writes under ``benchmarks/results/`` for the device it ran on: ``<device>.json`` with every number from logits,
``<device>.md`` with the tables, plots of time and memory; the same from hidden states as ``<device>-hidden``; and whole
training steps, end to end, as ``<device>-training``.
"""

import argparse
from pathlib import Path

import report_from_hidden
import report_from_logits
import report_training
import torch

KINDS = {"logits": report_from_logits, "hidden": report_from_hidden, "training": report_training}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=KINDS, help="one part of it; all if not given")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    for kind in [arguments.only] if arguments.only else KINDS:
        module = KINDS[kind]
        module.run(device, module.PLANS[device.type], arguments.out)


if __name__ == "__main__":
    main()
