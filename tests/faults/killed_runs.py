"""Tiny training runs in processes of their own, for `test_kills.py` to kill.

The processes are forked from a server that has imported everything, so each starts within milliseconds.
"""

import gc
import json
import os
import signal
import sys
import tempfile
import threading
import time
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch
from tiny_training import history, make_trainer, model, weights
from tqdm import tqdm

IS_SERVER = "KILLED_RUNS_SERVER"
STEPS, SAVE_EVERY = 12, 2
# audit events of changes to files from Python; torch and safetensors write without them
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")

# Replace tqdm's lock, a semaphore that forked processes share: a process that is killed while it holds the semaphore
# would stop all others.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # no monitor thread: it might hold the lock while a process is forked


def context() -> ForkServerContext:
    """Start a new server with this process's `sys.path`, because tests import their helper modules by plain name."""
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    context = get_context("forkserver")
    context.set_forkserver_preload(["killed_runs"])
    os.environ[IS_SERVER] = "yes"
    forkserver._forkserver._stop()
    forkserver.ensure_running()
    del os.environ[IS_SERVER]
    return context


def train(kind: str, folder: str, resume: bool, kill_at_event: int | None = None) -> None:
    """Train `kind` ("kto" or "dpo") in `folder` and write `outcome.json`: the logs, the weights and the seconds.

    With `kill_at_event` = n the process kills itself just before its n-th change to a file in `folder`.
    """
    began = time.monotonic()
    tqdm.set_lock(threading.RLock())
    log = os.open(Path(folder).with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    trainer = make_trainer(
        kind,
        folder,
        policy=model(attention_dropout=0.1),
        disable_dropout=False,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=SAVE_EVERY,
        save_total_limit=2,
        optim="adamw_torch",
        learning_rate=0.01,
        lr_scheduler_type="linear",
        logging_steps=3,
    )
    if kill_at_event is not None:
        die_at(kill_at_event, folder)
    trainer.train(resume_from_checkpoint=resume)
    values = {name: tensor.tolist() for name, tensor in weights(trainer).items()}
    draft = Path(folder) / "outcome.part"
    seconds = time.monotonic() - began
    draft.write_text(json.dumps({"history": history(trainer), "weights": values, "seconds": seconds}))
    draft.rename(Path(folder) / "outcome.json")


def die_at(event_number: int, folder: str) -> None:
    """Kill this process just before its `event_number`-th change to a file in `folder`."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in FILE_EVENTS and isinstance(arguments[0], (str, os.PathLike)) and folder in os.fspath(arguments[0]):
            is_reading = event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR))
            seen += not is_reading
            if seen == event_number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


if IS_SERVER in os.environ:  # in the server: run once, so that forked runs find all imports done
    del os.environ[IS_SERVER]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("kto", "dpo"):
            train(kind, str(Path(folder) / kind), False)
    gc.collect()
    gc.freeze()
