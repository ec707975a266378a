"""What the user sees and can do while a run trains: a progress bar, lines of numbers, and Ctrl-C."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from ..trainers import FusedTrainer, held_out
from ..trainers.configs import FusedKTOConfig, FusedPreferenceConfig, FusedSFTConfig

# logged names and how they are printed
REWARDS = {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin"}
ACCURACY, AUC = "rewards/accuracies", "rewards/auc"
TOKENS = {"mean_token_accuracy": "accuracy", "entropy": "entropy"}  # what supervised fine-tuning logs
COLUMNS = {"loss": "loss", **REWARDS, ACCURACY: "accuracy", AUC: "AUC", "kl": "z0"}
INTERRUPTED = b"\nfinishing this step, then saving a checkpoint; Ctrl-C again stops at once\n"


class StopOnCtrlC(TrainerCallback):
    """Ends training with a checkpoint when the user presses Ctrl-C.

    Within the ``with`` block, a first Ctrl-C ends training after the current step and saves a checkpoint; a second one
    raises ``KeyboardInterrupt`` at once. ``checkpoint`` is the folder that was saved; None if training was not ended.
    """

    def __init__(self):
        self.is_pressed = False
        self.checkpoint: Path | None = None
        self._group: Any = None  # a gloo group of all ranks: its collectives run on the hosts and wait for no GPU

    def __enter__(self) -> "StopOnCtrlC":
        self._previous = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _press(self, number: int, frame: FrameType | None) -> None:
        if self.is_pressed:
            raise KeyboardInterrupt
        self.is_pressed = True
        with suppress(OSError):  # stderr may be lost
            os.write(2, INTERRUPTED)  # not print(): the signal may have interrupted a print()

    def on_step_end(
        self, args: FusedPreferenceConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step < state.max_steps and self._is_pressed_on_any_rank(args):
            self.checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
            args.save_only_model = False  # training cannot resume from a model alone
            if args.save_total_limit == 1 and state.best_model_checkpoint is not None:
                args.save_total_limit = 2  # else the limit would delete this checkpoint and keep the best one

    def on_epoch_end(self, args, state, control: TrainerControl, **kwargs: Any) -> None:
        if self.checkpoint is not None:  # the epoch was cut short
            control.should_log = control.should_evaluate = control.should_save = False

    def _is_pressed_on_any_rank(self, args: FusedPreferenceConfig) -> bool:
        """Return the same value on all ranks, because all of them must end after the same step."""
        if args.world_size == 1:
            return self.is_pressed
        if self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        is_pressed = torch.tensor(self.is_pressed, dtype=torch.int32)
        torch.distributed.all_reduce(is_pressed, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(is_pressed)


class BarWithoutLogs(ProgressCallback):
    """transformers' progress bar, which does not print the logs: ``LogLines`` does."""

    def on_log(self, *_, **__) -> None:
        pass


class LogLines(TrainerCallback):
    """Prints one line of numbers per log: for every evaluation, and for every ``every``-th, the first and the last
    training step that is logged.
    """

    def __init__(self, every: int = 1):
        self.every = every
        self.names: list[str] = []  # logged names in the order of the columns; empty until the header is printed

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last step is always logged

    def on_log(self, args, state: TrainerState, control, logs: dict[str, float], **kwargs: Any) -> None:
        prefix = "eval_" if "eval_loss" in logs else ""
        step = state.global_step
        is_due = prefix or step in (1, state.max_steps) or step % self.every == 0
        if not (state.is_world_process_zero and is_due and f"{prefix}loss" in logs):
            return
        if not self.names:  # by loss and not by this log, which lacks a side if its batch holds one label only
            of_labels = () if isinstance(args, FusedKTOConfig) else (AUC, "kl")
            titles = {name: title for name, title in COLUMNS.items() if name not in of_labels}
            if isinstance(args, FusedSFTConfig):
                titles = {"loss": "loss", **TOKENS}
            self.names = list(titles)
            tqdm.write("  step " + " ".join(f"{title:>10}" for title in titles.values()))
        values = (logs.get(prefix + name) for name in self.names)
        line = f"{step:6d} " + " ".join(f"{'-':>10}" if value is None else f"{value:10.4f}" for value in values)
        tqdm.write(f"{line}  evaluation" if prefix else line)


class HeldOut(TrainerCallback):
    """Adds the comparisons of ``held_out`` to each evaluation's log entry, where a resumed run finds them too."""

    def __init__(self, trainer: FusedTrainer):
        self.trainer = trainer

    def on_evaluate(self, args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        rewards = self.trainer.evaluated
        if rewards is None:
            return
        found = held_out.compared(rewards, args.seed, self.trainer.data_counts["eval"]["prompts"])
        if found is not None:
            state.log_history[-1][held_out.COMPARISONS] = found


def print_lines(trainer: FusedTrainer, every: int) -> None:
    """Make the trainer print ``LogLines`` in place of transformers' dictionaries; a progress bar stays."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(BarWithoutLogs())
    trainer.add_callback(LogLines(every))
    trainer.add_callback(HeldOut(trainer))
