"""A second run in an output folder is refused, and neither a killed run nor a faulty disk blocks the folder."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from filelock import FileLock
from tiny_training import StopAt, make_trainer

from kto_fused.trainers import folder_lock
from kto_fused.trainers.checkpoints import FolderInUseError

pytestmark = pytest.mark.usefixtures("small_machine")


def hold(folder: Path, is_held) -> None:
    """Hold the lock of a folder until this process is killed."""
    lock = folder_lock._acquire(folder)
    is_held.set()
    while lock.is_locked:
        signal.pause()


def test_a_second_run_is_refused_with_the_first_ones_process_and_a_killed_one_blocks_none(tmp_path):
    context = multiprocessing.get_context("fork")
    is_held = context.Event()
    first = context.Process(target=hold, args=(tmp_path, is_held))
    first.start()
    try:
        assert is_held.wait(30)
        other = rf"another run writes into .* \(process {first.pid} on .*, started 2"
        with pytest.raises(FolderInUseError, match=other):
            make_trainer("kto", tmp_path, max_steps=1).train()
        with pytest.raises(FolderInUseError, match="the nodes share this disk: leave save_on_each_node out"):
            make_trainer("kto", tmp_path, max_steps=1, save_on_each_node=True).train()
    finally:
        first.kill()
        first.join()
    make_trainer("kto", tmp_path, max_steps=1).train()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_full_for_the_locks_note_gives_a_warning(tmp_path, monkeypatch, caplog):
    write_text = Path.write_text

    def full(path, *arguments, **named):
        if path.name == folder_lock.RUNNING:
            path.touch()
            raise OSError(28, "No space left on device")
        return write_text(path, *arguments, **named)

    monkeypatch.setattr(Path, "write_text", full)
    make_trainer("kto", tmp_path, max_steps=1).train()
    assert f"{tmp_path / folder_lock.RUNNING} cannot be written (No space left on device)" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_released_by_an_error_too(tmp_path):
    class Fail(StopAt):
        def on_step_end(self, args, state, control, **_):
            assert json.loads((tmp_path / folder_lock.RUNNING).read_text())["pid"] == os.getpid()
            with pytest.raises(Exception, match="could not be acquired"):
                FileLock(tmp_path / folder_lock.LOCK).acquire(timeout=0)
            raise KeyError("a callback's own")

    with pytest.raises(KeyError, match="a callback's own"):
        make_trainer("kto", tmp_path, callbacks=[Fail(1)]).train()
    assert list(tmp_path.iterdir()) == []
    make_trainer("kto", tmp_path, max_steps=1).train()


def test_a_folder_that_cannot_be_locked_gives_a_warning(tmp_path, monkeypatch, caplog):
    def no_locks(self, **_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", no_locks)
    make_trainer("kto", tmp_path, max_steps=1).train()
    assert "cannot be locked ([Errno 37] No locks available)" in caplog.text
