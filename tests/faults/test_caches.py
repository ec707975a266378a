"""The cache of the reference model's log-probabilities survives damaged, foreign, shared and unwritable files.

A file that is not intact is computed again; a folder that cannot be written costs only the cache, never the run.
"""

import errno
import logging
import multiprocessing
import os
import re
import stat
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_training import counting_reference_passes, history, make_trainer, model

from kto_fused.trainers import reference_cache

COLUMNS = ("ref_logps", "ref_kl_logps")
LENGTHS = [3, 1, 4, 1, 5]
VALUES = {"ref_logps": [-1.5, -2.25, -3.0, -0.0, -9.0], "ref_kl_logps": [-7.0, -6.0, 0.0, -5.5, -4.0]}


class Reference:
    """A stand-in for the reference model: returns each row's value of `VALUES` and counts its passes."""

    def __init__(self, values=VALUES):
        self.values, self.passes = values, 0

    def batches(self, dataset):
        self.passes += 1
        for start in range(0, len(dataset), 2):
            rows = dataset[start : start + 2]["row"]
            yield tuple(torch.tensor([self.values[column][row] for row in rows]) for column in COLUMNS)


def add(folder, reference: Reference, **changes) -> dict[str, list[float]]:
    """Add the reference's columns to a small dataset; returns the added columns."""
    lengths = changes.pop("lengths", LENGTHS)
    dataset = Dataset.from_dict({"row": list(range(len(lengths))), "length": lengths})
    settings = {"depends_on": ("weights", "bf16"), "shared": lambda work: work(), **changes}
    added = reference_cache.add_ref_logps(
        dataset, COLUMNS, reference.batches, None if folder is None else str(folder), **settings
    )
    return {column: added[column][:] for column in COLUMNS}


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def kept(folder) -> Path:
    """The file of an intact cache entry."""
    add(folder, Reference())
    (path,) = folder.iterdir()
    return path


def metadata(path: Path) -> dict[str, str]:
    with reference_cache.safe_open(path, framework="pt") as file:
        return file.metadata()


# ---- damage


def test_values_are_kept_and_read_again_to_the_bit(folder, kept):
    again = Reference()
    assert add(folder, again) == VALUES
    assert again.passes == 0


def test_any_damaged_byte_of_a_file_is_found(kept, full):
    """Change each byte in turn (in three ways with --full). Only changes that alter no value may be overlooked."""
    content, length = kept.read_bytes(), len(LENGTHS)
    fingerprint = kept.stem
    truth = reference_cache._intact_values(kept, fingerprint, COLUMNS, length)
    tried, overlooked = 0, []
    for position in range(len(content)):
        for flip in (0x01, 0x80, 0xFF) if full else (1 << position % 8,):
            damaged = bytearray(content)
            damaged[position] ^= flip
            kept.write_bytes(damaged)
            tried += 1
            try:
                values = reference_cache._intact_values(kept, fingerprint, COLUMNS, length)
            except Exception:  # the cache then computes the values again
                continue
            overlooked.append(position)
            assert all(values[name].numpy().tobytes() == truth[name].numpy().tobytes() for name in COLUMNS)
    assert tried >= len(content) > 300
    assert len(overlooked) < 8  # spaces in the file's JSON header


def test_a_file_cut_off_anywhere_is_found(kept):
    content = kept.read_bytes()
    for length in range(len(content)):
        kept.write_bytes(content[:length])
        with pytest.raises((SafetensorError, OSError)):
            reference_cache._intact_values(kept, kept.stem, COLUMNS, len(LENGTHS))


def rewrite(path: Path, values: dict[str, torch.Tensor]) -> None:
    """Write values with a matching checksum, as a faulty writer would."""
    save_file(values, path, {reference_cache.DESCRIBED: f"{path.stem} {reference_cache._checksum(values)}"})


def zeros(path):
    save_file({name: torch.zeros(5, dtype=torch.float64) for name in COLUMNS}, path)


def zeros_under_the_old_checksum(path):
    save_file({name: torch.zeros(5, dtype=torch.float64) for name in COLUMNS}, path, metadata(path))


def single_precision(path):
    rewrite(path, {name: values.float() for name, values in load_file(path).items()})


def not_a_number(path):
    values = load_file(path)
    values["ref_logps"][2] = torch.nan
    rewrite(path, values)


def infinite(path):
    values = load_file(path)
    values["ref_kl_logps"][0] = -torch.inf
    rewrite(path, values)


def too_short(path):
    rewrite(path, {name: values[:-1].clone() for name, values in load_file(path).items()})


def another_shape(path):
    rewrite(path, {name: values[:, None].clone() for name, values in load_file(path).items()})


def swapped_columns(path):
    values = load_file(path)
    save_file({"ref_logps": values["ref_kl_logps"], "ref_kl_logps": values["ref_logps"]}, path, metadata(path))


def other_columns(path):
    rewrite(path, {"one": torch.zeros(5, dtype=torch.float64), "two": torch.zeros(5, dtype=torch.float64)})


def another_data_sets_rows(path):
    """Replace the file by that of another dataset with as many rows."""
    other = path.parent / "other"
    add(other, Reference(), lengths=[9, 9, 9, 9, 9])
    (foreign,) = other.iterdir()
    os.replace(foreign, path)
    other.rmdir()


def an_earlier_versions_file(path):
    save_file(load_file(path), path)


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(path.read_bytes()[::-1])


def a_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    zeros: "computed from this data",
    zeros_under_the_old_checksum: "checksum",
    single_precision: "torch.float32",
    not_a_number: "not finite",
    infinite: "not finite",
    too_short: r"shape \[4\], expected torch.float64 of shape \[5\]",
    another_shape: r"shape \[5, 1\]",
    swapped_columns: "checksum",
    other_columns: r"columns \['one', 'two'\]",
    another_data_sets_rows: "computed from this data",
    an_earlier_versions_file: "computed from this data",
    empty: "",
    garbage: "",
    a_pipe: "not a regular file",
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.items(), ids=lambda case: getattr(case, "__name__", ""))
def test_a_file_that_is_not_intact_is_computed_again_and_replaced_with_a_warning(folder, kept, damage, reason, caplog):
    content = kept.read_bytes()
    damage(kept)
    reference = Reference()
    assert add(folder, reference) == VALUES
    assert reference.passes == 1
    (said,) = caplog.messages
    assert f"{kept} are not used: " in said
    assert re.search(reason, said)
    assert list(folder.iterdir()) == [kept]
    assert kept.read_bytes() == content
    assert add(folder, reference) == VALUES
    assert reference.passes == 1


def test_changes_to_the_file_after_it_was_read_do_not_reach_training(folder, kept):
    values = reference_cache._intact_values(kept, kept.stem, COLUMNS, len(LENGTHS))
    with kept.open("r+b") as file:
        file.write(b"\0" * kept.stat().st_size)
    assert {name: column.tolist() for name, column in values.items()} == VALUES


def test_a_trainer_trains_alike_with_a_cache_of_zeros_and_an_intact_one(tmp_path):
    def curve():
        settings = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache"), "max_steps": 2}
        trainer = make_trainer("dpo", tmp_path / "out", ref_model=model(seed=1), train=8, **settings)
        trainer.train()
        return history(trainer)

    expected = curve()
    (path,) = (tmp_path / "cache").iterdir()
    save_file({name: torch.zeros_like(values) for name, values in load_file(path).items()}, path, metadata(path))
    assert curve() == expected


# ---- values that are not finite


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_values_that_are_not_finite_are_an_error_and_never_kept(folder, value):
    broken = {**VALUES, "ref_kl_logps": [-7.0, value, 0.0, value, -4.0]}
    message = f"2 of 5 examples a log-probability that is not finite .ref_kl_logps is {value} in row 1"
    with pytest.raises(ValueError, match=message):
        add(folder, Reference(broken))
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kind", ["kto", "dpo"])
def test_a_reference_that_gives_nan_is_refused_before_training(tmp_path, kind):
    broken = model(seed=1)
    with torch.no_grad():
        broken.model.embed_tokens.weight[10:20] = torch.nan
    with pytest.raises(ValueError, match=r"the reference model gives \d of 8 examples a log-probability that is not"):
        make_trainer(
            kind, tmp_path, ref_model=broken, train=8, precompute_ref_log_probs=True, ref_cache_dir=str(tmp_path / "c")
        )
    assert list((tmp_path / "c").iterdir()) == []


# ---- folders of several users, and folders that cannot be written


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_get_the_mode_that_the_umask_leaves(folder, umask):
    before = os.umask(umask)
    try:
        add(folder, Reference())
    finally:
        os.umask(before)
    (path,) = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def as_another_user(task):
    """Return the result of `task()` from a child process, which runs as user 12345 if this process is root's."""
    receive, send = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(12345)
                os.setuid(12345)
            send.send(task())
        except BaseException as error:
            send.send(error)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    outcome = receive.recv()
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


class Said(logging.Handler):
    """Collects the messages of `reference_cache`; works in a child process too."""

    def __init__(self):
        super().__init__()
        self.messages: list[str] = []
        reference_cache.logger.addHandler(self)

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def open_path(tmp_path):
    """A folder that other users can reach. pytest's temporary folders are closed to them."""
    changed = [path for path in (tmp_path, *tmp_path.parents) if path.exists() and path.stat().st_uid == os.getuid()]
    modes = [(path, stat.S_IMODE(path.stat().st_mode)) for path in changed if path != Path("/")]
    for path, mode in modes:
        path.chmod(mode | 0o011)
    yield tmp_path
    for path, mode in modes:
        path.chmod(mode)


def deny_replacing(monkeypatch, path: Path) -> None:
    """Deny replacing `path`, as a sticky folder does for users who own neither the file nor the folder.

    A real sticky folder would not deny it to root, which may run the tests.
    """
    replace = os.replace

    def denied(source, target):
        if Path(target) == path:
            raise PermissionError(errno.EPERM, "Operation not permitted", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", denied)


def test_an_intact_file_of_another_user_is_used(folder, kept, open_path):
    kept.chmod(0o644)
    folder.chmod(0o755)
    reference = Reference()
    assert as_another_user(lambda: (add(folder, reference), reference.passes)) == (VALUES, 0)


def test_a_second_file_is_kept_beside_one_that_cannot_be_replaced(folder, kept, monkeypatch, open_path):
    folder.chmod(0o1777)
    zeros(kept)
    damaged = kept.read_bytes()
    deny_replacing(monkeypatch, kept)

    def twice():
        said, reference = Said(), Reference()
        return [add(folder, reference), add(folder, reference)], reference.passes, said.messages

    values, passes, said = as_another_user(twice)
    assert values == [VALUES, VALUES]
    assert passes == 1
    assert kept.read_bytes() == damaged
    (beside,) = set(folder.iterdir()) - {kept}
    assert (
        f"{kept} cannot be replaced (Operation not permitted): the reference log-probabilities are kept in" in said[1]
    )
    assert str(beside) in said[1]
    assert beside.stat().st_uid == (12345 if os.getuid() == 0 else os.getuid())
    third = Reference()
    assert add(folder, third) == VALUES  # the first user reads it too
    assert third.passes == 0


def test_a_file_that_its_owner_alone_may_read_does_not_stop_another_user(folder, kept, open_path):
    kept.chmod(0o000)
    folder.chmod(0o1777)

    def task():
        reference = Reference()
        return add(folder, reference), reference.passes

    assert as_another_user(task) == (VALUES, 1)
    assert len(list(folder.iterdir())) == (2 if os.getuid() == 0 else 1)


@pytest.mark.parametrize("given", [True, False], ids=["given folder", "default folder"])
def test_an_unwritable_folder_gives_one_warning_and_the_same_values(folder, kept, given, monkeypatch, open_path):
    monkeypatch.setattr(reference_cache.huggingface_hub.constants, "HF_HOME", folder.parent)
    target = folder if given else folder.parent / "kto_fused"
    if not given:
        folder.rename(target)
    target.chmod(0o555)

    def task():
        said, read, computed = Said(), Reference(), Reference()
        found = add(target if given else None, read)
        new = add(target if given else None, computed, depends_on=("other weights",))
        return found, read.passes, new, computed.passes, said.messages

    found, passes, new, new_passes, said = as_another_user(task)
    target.chmod(0o755)
    assert (found, passes) == (VALUES, 0)
    assert (new, new_passes) == (VALUES, 1)
    (message,) = said
    assert f"cannot be kept in {target} (Permission denied): this run goes on with them in memory" in message
    assert [path.name for path in target.iterdir()] == [kept.name]


@pytest.mark.parametrize("number", [errno.EIO, errno.EPERM, errno.EROFS])
def test_values_that_cannot_be_moved_into_place_are_used_from_memory(folder, monkeypatch, caplog, number):
    def failing(source, target):
        raise OSError(number, os.strerror(number), str(target))

    monkeypatch.setattr(os, "replace", failing)
    reference = Reference()
    assert add(folder, reference) == VALUES
    assert reference.passes == 1
    (said,) = caplog.messages
    assert f"cannot be kept in {folder} ({os.strerror(number)})" in said
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_no_file(folder, monkeypatch, caplog, error):
    opened = Path.open

    def half_open(path, mode):
        file = opened(path, mode)
        is_draft = path.name.startswith(name)  # the file that tries whether the folder can be written is left alone

        class Half:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            close = __exit__

            def write(self, content):
                file.write(content[: len(content) // 2])
                raise error

        return Half() if is_draft else file

    add(folder, Reference())
    (path,) = folder.iterdir()
    name = path.stem
    path.unlink()
    monkeypatch.setattr(Path, "open", half_open)
    reference = Reference()
    if isinstance(error, OSError):
        assert add(folder, reference) == VALUES
        (said,) = caplog.messages
        assert f"cannot be kept in {folder} (No space left on device)" in said
    else:
        with pytest.raises(KeyboardInterrupt):
            add(folder, reference)
    assert reference.passes == 1
    assert list(folder.iterdir()) == []


def test_a_folder_in_the_place_of_the_file_does_not_stop_the_cache(folder, kept):
    kept.unlink()
    kept.mkdir()
    reference = Reference()
    assert add(folder, reference) == VALUES == add(folder, reference)
    assert reference.passes == 1
    assert kept.is_dir()
    assert len(list(folder.iterdir())) == 2


def test_a_given_folder_that_cannot_be_created_is_refused_before_computing(tmp_path):
    (tmp_path / "file").write_text("")
    reference = Reference()
    with pytest.raises(NotADirectoryError, match=r"ref_cache_dir cannot be created \(Not a directory\).*file/refs"):
        add(tmp_path / "file" / "refs", reference)
    assert reference.passes == 0


def test_a_default_folder_that_cannot_be_created_does_not_stop_the_run(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(reference_cache.huggingface_hub.constants, "HF_HOME", tmp_path / "file")
    reference = Reference()
    assert add(None, reference) == VALUES
    (said,) = caplog.messages
    assert f"cannot be kept in {tmp_path / 'file' / 'kto_fused'} (Not a directory)" in said


# ---- files that killed processes leave


def test_only_old_drafts_are_removed(folder):
    folder.mkdir()
    name = xxhash.xxh3_128_hexdigest(b"a fingerprint")
    names = {"old": f"{name}.{name}.part", "young": f"{name}.{name[::-1]}.part", "foreign": "film.mkv.part"}
    for path in names.values():
        (folder / path).write_bytes(b"half")
    for old in ("old", "foreign"):
        os.utime(folder / names[old], (time.time() - 25 * 3600,) * 2)
    add(folder, Reference())
    left = {path.name for path in folder.iterdir() if path.suffix == ".part"}
    assert left == {names["young"], names["foreign"]}


def test_a_trainer_precomputes_where_nothing_can_be_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(reference_cache, "_prepare_folder", lambda *_, **__: True)  # the folder is lost while computing
    with counting_reference_passes() as counter:
        trainer = make_trainer(
            "kto",
            tmp_path / "out",
            ref_model=model(seed=1),
            precompute_ref_log_probs=True,
            ref_cache_dir="lost",
            max_steps=1,
        )
        trainer.train()
    assert counter["passes"]
    assert not Path("lost").exists()
    assert any("cannot be kept in lost (No such file or directory)" in said for said in caplog.messages)
