"""``kto-fused merge``: the whole model of an adapter and its base, as a folder that needs no peft."""

import argparse
import json
from pathlib import Path

from .cli import description
from .errors import CommandError, check_names
from .failures import check_writable, setup_errors, user_errors


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="kto-fused merge", description=description("merge"))
    parser.add_argument("--model", required=True, help="folder of an adapter, such as a run's output folder")
    parser.add_argument("--to", required=True, metavar="DIR", help="new folder for the merged model")
    options = parser.parse_args(arguments)
    check_names(options.model, options.to)
    folder, target = Path(options.model), Path(options.to)
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise CommandError(f"--model {folder} holds no adapter_config.json: expected the folder of an adapter")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CommandError(f"--to {target} exists and is no empty folder: choose another one")
    check_writable(target)
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification  # here: it takes seconds
    from transformers import AutoTokenizer

    with user_errors(OSError, ValueError, prefix=f"{path} cannot be read: "):
        config = json.loads(path.read_text(encoding="utf-8"))
    is_reward = config.get("task_type") == "SEQ_CLS"
    kind = AutoPeftModelForSequenceClassification if is_reward else AutoPeftModelForCausalLM
    with setup_errors():
        model = kind.from_pretrained(str(folder), dtype="auto", **({"num_labels": 1} if is_reward else {}))
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        merged = model.merge_and_unload(safe_merge=True)  # refuses weights that are not finite
    if is_reward:
        merged.config.pad_token_id = tokenizer.pad_token_id  # the scored token is the last one that is no padding
    with user_errors(Exception, prefix=f"--to {target} cannot be written: "):
        merged.save_pretrained(target)
        tokenizer.save_pretrained(target)
    print(f"Wrote {folder} merged into {config.get('base_model_name_or_path')}, in {merged.dtype}, into {target}")
    return 0
