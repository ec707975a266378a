"""Writes the catalogue of registered losses into `losses.md`. Run `python docs/catalogue.py` after adding a loss.

The table comes from the registry: each loss's name, its docstring's first sentence, what it reads, and its fields.
"""

import dataclasses
import re
from pathlib import Path

from kto_fused import heads

PAGE = Path(__file__).with_name("losses.md")
START, END = "<!-- catalogue: written by catalogue.py -->\n", "<!-- end of the catalogue -->"
OWN_MODULES = [module.__name__ for module in (heads.completions, heads.pairs, heads.tokens)]
READS = {1: "a completion", 2: "a pair", None: "the whole batch"}
# where TRL 1.16 has the loss: the trainer whose option names it
TRL_TRAINERS = {
    "`DPOConfig(loss_type=...)`": (
        *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
        *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
    "`KTOConfig(loss_type=...)`": ("kto", "apo_zero_unpaired"),
    "`CPOConfig(loss_type=...)`": ("simpo", "alphapo"),
    "`CPOConfig`": ("cpo",),
    "`ORPOConfig`": ("orpo",),
    "`SFTConfig(loss_type=...)`": ("nll", "dft"),
    "`GRPOConfig(loss_type=...)`": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo"),
    '`GRPOConfig(importance_sampling_level="sequence")`': ("gspo",),
}


def first_sentence(kind: type) -> str:
    """The docstring up to the first full stop that ends a sentence, with its code marks as Markdown has them."""
    text = " ".join(kind.__doc__.split()).replace("``", "`").replace("|", "\\|")
    return re.split(r"(?<!al)(?<!Dr)\.(?= [A-Z`]|$)", text)[0]


def table() -> str:
    lines = ["| name | loss | one loss reads | fields and defaults | in TRL 1.16 |", "|---|---|---|---|---|"]
    for name in heads.names():
        kind = type(heads.make(name))
        if kind.__module__ not in OWN_MODULES:  # a user's, registered in this process
            continue
        reads = "a token" if kind.level == "token" else READS[heads.make(name).group]
        fields = ", ".join(f"`{field.name}={field.default!r}`" for field in dataclasses.fields(kind))
        trl = next((trainer for trainer, losses in TRL_TRAINERS.items() if name in losses), "-")
        lines.append(f"| `{name}` | {first_sentence(kind)} | {reads} | {fields or '-'} | {trl} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    before, rest = page.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
