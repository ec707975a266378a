"""Write files to try supervised fine-tuning and reward models on: ``python docs/toy_files.py``.

They are made of the feedback that comes with the package, in the folder ``toy``: ``pairs.jsonl`` and ``answers.jsonl``
to train on, ``held-out-pairs.jsonl`` and ``held-out-answers.jsonl`` of other prompts, and ``model``, a new small Llama
with random weights whose tokenizer knows the training texts alone. Nothing is downloaded.
"""

import json
import random
from pathlib import Path

from datasets import Dataset
from transformers import set_seed

from kto_fused import preference_data
from kto_fused.commands.demo import small_llama

HELD_OUT = 40

folder = Path("toy")
folder.mkdir(exist_ok=True)
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
    demonstrations = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in records]
    for name, rows in (("pairs", records), ("answers", demonstrations)):
        (folder / f"{prefix}{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
set_seed(0)
tokenizer, model = small_llama(Dataset.from_list(training))
tokenizer.save_pretrained(folder / "model")
model.save_pretrained(folder / "model")
print(f"wrote {len(training)} pairs and {len(held_out)} held-out pairs into {folder}/")
