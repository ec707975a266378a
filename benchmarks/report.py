"""Measure every contender side by side on this machine: `python benchmarks/report.py`.

The report has three parts: losses from logits (`<device>`), losses from hidden states (`<device>-hidden`) and whole
training steps (`<device>-training`). Each part writes to `benchmarks/results/`: a `.json` file with every number, an
`.md` file with the tables, and pictures of time and memory.
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
    parser.add_argument("--only", choices=KINDS, help="measure this part only; without it all parts")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    for kind in [arguments.only] if arguments.only else KINDS:
        module = KINDS[kind]
        module.run(device, module.PLANS[device.type], arguments.out)


if __name__ == "__main__":
    main()
