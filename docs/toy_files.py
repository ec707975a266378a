"""Write files to try every method of docs/methods.md on: ``python docs/toy_files.py``.

They are made of the feedback that comes with the package, in the folder ``toy``:

- ``pairs.jsonl``: pairs of an earnest and a joking answer; ``answers.jsonl``: the earnest answers alone;
  ``feedback.jsonl``: both answers, each with a label
- the same of other prompts: ``held-out-pairs.jsonl``, ``held-out-answers.jsonl``, ``held-out-feedback.jsonl``
- ``brief-pairs.jsonl``: another objective, pairs of an earnest answer's first sentence and the whole answer
- ``model``: a new small Llama with random weights, whose tokenizer knows the training texts alone

Nothing is downloaded.
"""

import json
import random
import re
from pathlib import Path

from datasets import Dataset
from transformers import set_seed

from kto_fused import preference_data
from kto_fused.commands.demo import small_llama

HELD_OUT = 40

folder = Path("toy")
folder.mkdir(exist_ok=True)


def write(name: str, records: list[dict]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


answers: dict[str, dict[bool, str]] = {}
for record in preference_data.load(preference_data.BUNDLED):
    answers.setdefault(record["prompt"], {})[record["label"]] = record["completion"]
pairs = [
    {"prompt": prompt, "chosen": found[True], "rejected": found[False]}
    for prompt, found in answers.items()
    if len(found) == 2
]
random.Random(0).shuffle(pairs)
held_out, training = pairs[:HELD_OUT], pairs[HELD_OUT:]
for prefix, records in (("held-out-", held_out), ("", training)):
    write(f"{prefix}pairs", records)
    write(f"{prefix}answers", [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in records])
    sides = (("chosen", True), ("rejected", False))
    write(
        f"{prefix}feedback",
        [
            {"prompt": pair["prompt"], "completion": pair[side], "label": label}
            for pair in records
            for side, label in sides
        ],
    )
first_sentences = [(pair, re.split(r"(?<=[.!?])\s", pair["chosen"])[0]) for pair in training]
write(
    "brief-pairs",
    [
        {"prompt": pair["prompt"], "chosen": first, "rejected": pair["chosen"]}
        for pair, first in first_sentences
        if first != pair["chosen"].strip()
    ],
)
set_seed(0)
tokenizer, model = small_llama(Dataset.from_list(training))
tokenizer.save_pretrained(folder / "model")
model.save_pretrained(folder / "model")
print(f"wrote {len(training)} pairs and {len(held_out)} held-out pairs into {folder}/")
