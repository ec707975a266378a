"""The command ``kto-fused``."""

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="kto-fused", description="Fused KTO and DPO losses for PyTorch.")
    commands = top.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="train a small language model with KTO on real text, and compare with the plain reference",
        description="Train a small Llama (or --model) with KTO on a feedback file, print loss, rewards, margin and "
        "reference point, then run the first steps again through plain PyTorch and compare. Ends in under 2 minutes "
        "on a CPU with its defaults.",
        argument_default=argparse.SUPPRESS,
    )
    demo.add_argument("--data", type=Path, metavar="FILE.jsonl", help="prompt, completion, label per line (bundled)")
    demo.add_argument("--model", metavar="PATH_OR_ID", help="a Hugging Face checkpoint instead of a small new Llama")
    demo.add_argument(
        "--from",
        dest="loss_from",
        choices=("hidden", "logits"),
        help="the loss takes hidden states and the LM head, or the model's logits (hidden)",
    )
    demo.add_argument("--steps", type=int, help="KTO steps (40)")
    demo.add_argument("--batch-size", type=int, help="examples per step, at least 2 (16)")
    demo.add_argument("--beta", type=float, help="pull towards the reference model (0.1)")
    demo.add_argument("--seed", type=int, help="for weights and batches (0)")
    demo.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    demo.add_argument("--backend", choices=("triton", "torch"), help="the faster one on the device")
    demo.add_argument("--out", type=Path, metavar="FOLDER", help="for metrics.json and curves.png (runs/demo)")
    return top


def main(arguments: list[str] | None = None) -> int:
    options = vars(parser().parse_args(arguments))
    command = options.pop("command")

    from . import demo  # transformers takes seconds to import: not for --help

    try:
        demo.run(demo.Settings(**options))
    except (demo.DemoError, demo.feedback.FeedbackError) as error:
        print(f"kto-fused {command}: {error}", file=sys.stderr)
        return 2
    return 0
