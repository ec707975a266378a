"""Time the engine from hidden states with other values of its constants: ``python benchmarks/tune.py`` on a GPU.

For each constant (tile and panel sizes, the hidden size up to which registers hold tiles, ...) a whole step is timed at
several values, the present one first. A table per case and model size shows milliseconds and peak memory. If another
value is faster on a GPU, change the constant in ``kto_fused/engines/chunks.py`` or ``kernels/register_tiles.py``.
"""

import argparse
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from contenders_from_hidden import Problem, fused, make_problem
from kto_fused.kernels import register_tiles
from report_from_hidden import QWEN_05B, HiddenTurn, Size, on_gpu
from side_by_side import free, take_turns

from kto_fused.engines import chunks as chunk_module

LLAMA_1B, QWEN_8B = on_gpu("Llama-3.2-1B", 2048, 128256), on_gpu("Qwen3-8B", 4096, 151936)
LONG = replace(QWEN_05B, seq_len=8192)
IN_MEMORY = (QWEN_8B, on_gpu("Gemma-3-4B", 2560, 262208, softcap=30.0))  # tiles of these do not stay in registers
EVERY_WIDTH = (QWEN_05B, LLAMA_1B, QWEN_8B)


@dataclass(frozen=True)
class Sweep:
    """Values to try for some constants of one module, and the model sizes and cases where they matter."""

    module: object
    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    sizes: tuple[Size, ...]
    cases: tuple[str, ...] = ("kto trained",)

    @property
    def settings(self) -> list[tuple[int, ...]]:
        """The values in use, then the others."""
        return list(dict.fromkeys([tuple(getattr(self.module, name) for name in self.names), *self.values]))

    def title(self, setting: tuple[int, ...]) -> str:
        return ", ".join(f"{name}={value:,}" for name, value in zip(self.names, setting, strict=True))


def chunk_sweep(name: str, *values: int, **where: tuple) -> Sweep:
    """Return a sweep over one constant of ``kto_fused/engines/chunks.py``."""
    return Sweep(chunk_module, (name,), tuple((value,) for value in values), **where)


SWEEPS = {
    "registers": chunk_sweep("REGISTER_HIDDEN_SIZE", 0, 4096, sizes=EVERY_WIDTH),
    "register tile": Sweep(
        register_tiles,
        ("ROWS", "COLUMNS", "DEPTH", "NUM_WARPS", "NUM_STAGES", "GROUP_ROWS"),
        (
            (128, 256, 64, 8, 4, 16),
            (128, 256, 64, 8, 3, 8),
            (256, 128, 64, 8, 3, 16),
            (128, 128, 64, 4, 3, 16),  # two programs per multiprocessor: one multiplies while the other folds
        ),
        sizes=(QWEN_05B, LLAMA_1B),
    ),
    "tile": chunk_sweep("TILE_LOGITS", 2**23, 3 * 2**22, 3 * 2**24, 3 * 2**25, sizes=IN_MEMORY),
    "panel": chunk_sweep("PANEL_LOGITS", 3 * 2**23, 9 * 2**24, 9 * 2**25, sizes=EVERY_WIDTH, cases=("kto frozen",)),
    "panel's tokens": chunk_sweep("PANEL_TOKENS", 2048, 8192, sizes=EVERY_WIDTH, cases=("kto frozen",)),
    "second visit's panel": chunk_sweep("WEIGHT_PANEL_LOGITS", 2**26, 2**27, 2**29, sizes=(LONG,)),
}


class TunedTurn(HiddenTurn):
    """A step with some constants set to other values. Errors are not measured; ``report_from_hidden.py`` does that."""

    def __init__(self, sweep: Sweep, setting: tuple[int, ...], problem: Problem):
        super().__init__(sweep.title(setting), fused, problem, expected=None)
        self.patches = [
            partial(mock.patch.object, sweep.module, name, value)
            for name, value in zip(sweep.names, setting, strict=True)
        ]

    def step(self) -> None:
        with ExitStack() as stack:
            for patch in self.patches:
                stack.enter_context(patch())
            super().step()

    def measure_errors(self) -> dict[str, float | None]:
        return {}


def run(sweep: Sweep, device: torch.device, rounds: int, settling: float) -> None:
    for size in sweep.sizes:
        free(device)
        inputs = make_problem(size.batch, size.seq_len, size.hidden, size.vocab, size.dtype, size.softcap, device)
        for case in sweep.cases:
            loss, head = case.split()
            problem, left_out = inputs.posed(loss, is_trained=head == "trained"), []
            turns = [TunedTurn(sweep, setting, problem) for setting in sweep.settings]
            print(f"\n{case}, {size}\n\n| | ms | peak MiB |\n|---|---:|---:|")
            for turn in take_turns(turns, rounds, case, left_out, device, settling):
                print(f"| {turn.name} | {turn.milliseconds[0]:.2f} | {turn.peak_mib:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SWEEPS, help="the sweep to run; all of them by default")
    parser.add_argument("--rounds", type=int, default=5, help="how often each setting takes its turn")
    parser.add_argument("--settling", type=float, default=0.3, help="seconds that each turn lasts")
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else SWEEPS:
        run(SWEEPS[name], torch.device("cuda"), arguments.rounds, arguments.settling)


if __name__ == "__main__":
    main()
