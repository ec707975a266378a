"""Measure every contender side by side on this machine: `python benchmarks/report.py`.

The report has four parts: losses from logits (`<device>`), losses from hidden states (`<device>-hidden`), whole
training steps (`<device>-training`) and steps that train adapters (`<device>-adapters`). Each part writes to
`benchmarks/results/`: a `.json` file with every number, an `.md` file with the tables, and all but the last part
pictures of time and memory.
"""

import argparse
from pathlib import Path

import report_adapters
import report_from_hidden
import report_from_logits
import report_training
import torch

RESULTS = Path(__file__).with_name("results")
KINDS = {
    "logits": report_from_logits,
    "hidden": report_from_hidden,
    "training": report_training,
    "adapters": report_adapters,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=KINDS, help="measure this part only; without it all parts")
    parser.add_argument(
        "--cases",
        nargs="+",
        help="measure these cases only: with --only hidden as 'orpo trained'; with --only training "
        f"{', '.join(report_training.CASES)}, which join the other cases' results in --out",
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.cases and arguments.only not in ("hidden", "training"):
        parser.error("--cases measures a part of --only hidden or --only training: name one of them")
    if arguments.cases and arguments.only == "hidden" and arguments.out == RESULTS:
        parser.error(f"--only hidden with --cases needs an --out other than {RESULTS}")
    if arguments.only == "training" and (unknown := set(arguments.cases or ()) - set(report_training.CASES)):
        parser.error(f"--cases {' '.join(sorted(unknown))}: expected some of {', '.join(report_training.CASES)}")
    for kind in [arguments.only] if arguments.only else KINDS:
        module = KINDS[kind]
        plan = module.PLANS[device.type]
        module.run(device, plan.of_cases(arguments.cases) if arguments.cases else plan, arguments.out)


if __name__ == "__main__":
    main()
