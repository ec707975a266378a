"""Runs that are killed at random points and resumed end bit for bit like a run that was never stopped."""

import functools
import json
import os
import random
import tempfile
from pathlib import Path

import pytest
from killed_runs import STEPS, context, train

from kto_fused.trainers import checkpoints

# the number of kills without and with --full, and the number of kills after which a run may end
SLICE, FULL, KILLS_OF_A_RUN = 10, 80, 5
# a run of 12 steps and 6 checkpoints changes files about 100 times from Python
LAST_EVENT = 80


@pytest.fixture(scope="module")
def start():
    """A function that starts `killed_runs.train` in a process of its own and returns the process."""
    processes = context()

    def start(*arguments):
        process = processes.Process(target=train, args=arguments)
        process.start()
        return process

    return start


def finish(start, kind: str, folder: Path, resume: bool) -> tuple[dict, float]:
    """Let a run end by itself; returns its outcome and its seconds."""
    process = start(kind, str(folder), resume)
    assert ended(process) == 0, log_of(folder)
    outcome = json.loads((folder / "outcome.json").read_text())
    return outcome, outcome.pop("seconds")


def ended(process) -> int:
    """Wait for a process, at most 120 seconds; returns its exit code."""
    process.join(120)
    if process.is_alive():
        process.kill()
        pytest.fail("a run hangs")
    return process.exitcode


def log_of(folder: Path) -> str:
    return folder.with_suffix(".log").read_text()[-3000:]


def newest_complete(folder: Path) -> int:
    """Return the step of the newest complete checkpoint; 0 if there is none."""
    return max(
        (one.step for one in checkpoints.found_in(folder) if checkpoints._problem(one.folder) is None), default=0
    )


@pytest.fixture
def in_memory(tmp_path):
    """A folder in memory, if the system has one.

    A kill loses nothing that the operating system has received, so waiting for a disk would prove nothing.
    """
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_killed_and_resumed_runs_end_like_one_that_was_never_stopped(start, in_memory, full):
    @functools.cache
    def whole(kind: str) -> tuple[dict, float]:
        return finish(start, kind, in_memory / kind, False)

    kills = runs = torn = 0
    while kills < (FULL if full else SLICE):
        draw = random.Random(runs)  # seeded, so that a failure can be repeated
        kind, folder = ("kto", "dpo")[runs % 2], in_memory / str(runs)
        expected, seconds = whole(kind)
        runs += 1
        newest = 0
        for _ in range(KILLS_OF_A_RUN):
            if draw.random() < 0.5:  # at a change to a file, while a checkpoint is saved, rotated or cleaned up
                process = start(kind, str(folder), newest > 0, draw.randint(1, LAST_EVENT))
            else:  # at any time, also while torch and safetensors write
                process = start(kind, str(folder), newest > 0)
                process.join(draw.uniform(0.1, 1.0) * seconds * (1 - newest / STEPS))
                process.kill()
            code = ended(process)
            assert code in (0, -9), log_of(folder)
            kills += code != 0
            before, newest = newest, newest_complete(folder)
            assert newest >= before, f"run {runs}: a kill lost a complete checkpoint"
            torn += any(not checkpoints.is_complete(one.folder) for one in checkpoints.found_in(folder))
            if newest == STEPS:
                break
        outcome, _ = finish(start, kind, folder, newest > 0)
        assert outcome == expected, f"run {runs} ended with another outcome"
    print(f"{kills} kills of {runs} runs, {torn} of them left a torn checkpoint")
    assert torn, "no kill came while a checkpoint was saved"
