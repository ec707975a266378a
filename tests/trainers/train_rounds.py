"""The cases of ``test_rounds_distributed``, for one process or two, as in ``train_distributed.py``."""

import os
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from loop_cases import make_loop, outcome
from safetensors.torch import load_file
from tiny_training import run_cases

from kto_fused.trainers import rounds as loops
from kto_fused.trainers.rounds import read_samples

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
OPTIONS: dict[str, dict[str, Any]] = {
    "spin": {"batch": 6},  # all of its pairs: accelerate would fill a shorter last batch up with the first ones
    # an optimizer with a state, which the second round goes on with; epsilon keeps its steps smooth in the gradient
    "kto": {"samples": 3, "optim": "adamw_torch", "adam_epsilon": 1.0},
    "ppo": {"samples": 2},
}


def rounds(kind: str, folder: Path) -> dict[str, Any]:
    options = {**OPTIONS[kind]}
    batch = options.pop("batch", 4)
    with PartialState(cpu=True).main_process_first():  # it writes the data and the model
        loop = make_loop(
            kind,
            folder / kind,
            rounds=2,
            max_steps=2,
            learning_rate=0.1,
            per_device_train_batch_size=batch // PROCESSES,
            ddp_backend="gloo" if PROCESSES > 1 else None,
            **options,
        )
    loop.run()
    entries, _ = outcome(loop)
    saved = load_file(loop.output / entries[-1]["checkpoint"] / "model.safetensors")
    return {
        "samples": [[line["ids"] for line in read_samples(loop.output / f"round-{number}")] for number in (1, 2)],
        "history": [step for entry in entries for step in entry["log"]],
        "weights": {name: tensor.tolist() for name, tensor in saved.items()},
        "kl": [entry["kl"] for entry in entries],
    }


def failures(folder: Path) -> list[list[str]]:
    """Return what each process says where one alone fails: it asks the judge or the server, or draws its samples."""

    def broken_judge(prompts, completions):
        raise ZeroDivisionError("no time")

    def broken_batch(policy, batch, sampling):
        if PartialState().process_index == PROCESSES - 1:
            raise MemoryError("no room")
        return drawn(policy, batch, sampling)

    said = []
    for kind, options in (
        ("judge", {"judged": broken_judge}),
        ("server", {"generator": "http://127.0.0.1:9"}),
        ("samples", {}),
        ("disk", {}),
        ("prompts", {}),
    ):
        with PartialState(cpu=True).main_process_first():
            loop = make_loop("dpo", folder / kind, ddp_backend="gloo" if PROCESSES > 1 else None, **options)
        if kind == "samples":
            drawn, loop.generate._batch = loop.generate._batch, broken_batch
        if kind == "prompts" and PartialState().process_index:
            loop.state["settings"]["data"] = "other records"
        if kind == "disk" and PartialState().process_index:
            loop.output, loops.DISK_SECONDS = Path("another disk"), 0.1
        try:
            loop.run()
            said.append("nothing")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return gather_object([said])


def cases() -> dict[str, Any]:
    return {"failures": failures} | {kind: lambda folder, kind=kind: rounds(kind, folder) for kind in OPTIONS}


if __name__ == "__main__":
    run_cases(cases(), Path(sys.argv[1]))
