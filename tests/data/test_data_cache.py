"""The cache of prepared data: damaged entries are made again, whole ones are used, and nothing else stays on disk."""

# ruff: noqa: E402 (the imports below need datasets)

import json
import multiprocessing
import os
import signal
import time
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

datasets = pytest.importorskip("datasets", reason="datasets is not installed: there is no data to prepare")

from data_cases import PAIRED, UNPAIRED, one_token_a_word, write
from datasets import Dataset

from kto_fused.data import cache, records, tokens
from kto_fused.preference_data import DataError, load, prepare_paired, prepare_unpaired

pytestmark = pytest.mark.usefixtures("own_cache")


def entries(tmp_path):
    return sorted(path for path in (tmp_path / "cache" / "kto_fused").iterdir() if path.suffix != ".lock")


def files(tmp_path, pattern="*/*.arrow"):
    return sorted((tmp_path / "cache" / "kto_fused").glob(pattern))


# ---- the bytes that are read are the bytes whose checksum is the key ------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_that_changes_between_hash_and_reading_is_refused_and_not_cached(tmp_path, monkeypatch, kind):
    path = tmp_path / f"data.{kind}"

    def save(chosen):
        write(path, chosen) if kind == "jsonl" else Dataset.from_list(chosen).to_parquet(path)
        os.utime(path, (1, 1))

    def hash_then_change(file):
        content = plain(file)
        save(UNPAIRED[::-1])
        return content

    save(UNPAIRED)
    plain = cache.checksum
    monkeypatch.setattr(cache, "checksum", hash_then_change)
    with pytest.raises(DataError, match=rf"data\.{kind}: changed while it was read"):
        load(path)
    monkeypatch.setattr(cache, "checksum", plain)
    assert entries(tmp_path) == []
    save(UNPAIRED)
    assert load(path).to_list() == UNPAIRED  # and not the reversed records under the same key


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "data.jsonl", UNPAIRED)
    checked = records.checked_record

    def check_and_append(record, *rest):
        with path.open("a") as file:
            file.write(json.dumps(UNPAIRED[0])[:-1])  # a half-written line
        return checked(record, *rest)

    monkeypatch.setattr(records, "checked_record", check_and_append)
    with pytest.raises(DataError, match=r"data\.jsonl: changed while it was read"):
        load(path)


# ---- damaged entries ------------------------------------------------------------------------------------------------


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def empty(file):
    os.truncate(file, 0)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("prepare", "damage", "num_proc"),
    [
        (prepare_unpaired, flip, None),
        (prepare_paired, truncate, None),
        *(
            pytest.param(prepare_unpaired, damage, None, marks=pytest.mark.full)
            for damage in (truncate, empty, Path.unlink)
        ),
        pytest.param(prepare_unpaired, flip, 2, marks=pytest.mark.full),  # files of two worker processes
        pytest.param(prepare_unpaired, Path.unlink, 2, marks=pytest.mark.full),
    ],
)
def test_each_damaged_file_is_found_and_made_again(tmp_path, caplog, prepare, damage, num_proc):
    source = write(tmp_path / "data.jsonl", PAIRED * 2)
    tokenizer = one_token_a_word()
    prepared = partial(prepare, source, tokenizer, num_proc=num_proc)
    expected = prepared().dataset.to_list()
    kept = {file: file.read_bytes() for file in files(tmp_path, "*/*") if file.is_file()}
    steps = 3 if prepare is prepare_unpaired else 2  # records, tokens, mismatched completions
    assert len(entries(tmp_path)) == steps
    assert len([file for file in kept if file.suffix == ".arrow"]) == (steps * 2 - 1 if num_proc else steps)
    for file in kept:
        damage(file)
        caplog.clear()
        assert prepared().dataset.to_list() == expected
        assert [m for m in caplog.messages if "is damaged, and is made again" in m and str(file.parent) in m]
        assert len(entries(tmp_path)) == steps  # nothing else is left
        for other in kept:
            assert cache._intact(other.parent) is not None
    caplog.clear()
    prepared()
    assert not [message for message in caplog.messages if "damaged" in message]


def test_a_damaged_conversion_of_a_dataset_on_the_disk_is_made_again(tmp_path, caplog):
    Dataset.from_list([record | {"label": int(record["label"])} for record in UNPAIRED]).save_to_disk(tmp_path / "d")
    assert load(Dataset.load_from_disk(tmp_path / "d")).to_list() == UNPAIRED
    (file,) = files(tmp_path)
    flip(file)
    assert load(Dataset.load_from_disk(tmp_path / "d")).to_list() == UNPAIRED
    assert "the cached copy" in caplog.text
    assert "is damaged, and is made again" in caplog.text


def test_records_read_before_the_damage_was_found_stay_readable(tmp_path):
    source = write(tmp_path / "data.jsonl", UNPAIRED)
    before = load(source)
    (file,) = files(tmp_path, "*/" + cache.MANIFEST)
    flip(file)
    assert load(source).to_list() == UNPAIRED
    assert before.to_list() == UNPAIRED


# ---- several processes ----------------------------------------------------------------------------------------------


def _load_once(path, cache_folder, made):
    datasets.config.HF_DATASETS_CACHE = cache_folder
    checked = records.checked_record

    def slow(record, *rest):
        if record["prompt"] == UNPAIRED[0]["prompt"]:
            made.put(os.getpid())
            time.sleep(0.5)
        return checked(record, *rest)

    records.checked_record = slow
    assert load(path).to_list() == UNPAIRED


def _started(path, number):
    context = multiprocessing.get_context("fork")
    made = context.SimpleQueue()
    processes = [
        context.Process(target=_load_once, args=(path, datasets.config.HF_DATASETS_CACHE, made)) for _ in range(number)
    ]
    for process in processes:
        process.start()
    return processes, made


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_prepare_the_same_data_at_once_leave_one_whole_entry(tmp_path, monkeypatch, locks):
    if not locks:  # as on a file system without locks

        def no_lock(*_, **__):
            raise OSError("Function not implemented")

        monkeypatch.setattr(cache.FileLock, "acquire", no_lock)
    path = write(tmp_path / "data.jsonl", UNPAIRED)
    processes, made = _started(path, 3)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    writers = set()
    while not made.empty():
        writers.add(made.get())
    assert len(writers) == 1 if locks else len(writers) >= 1
    (entry,) = entries(tmp_path)
    assert cache._intact(entry).dataset.to_list() == UNPAIRED


def test_a_killed_writer_leaves_no_entry_and_its_folder_is_removed_later(tmp_path):
    path = write(tmp_path / "data.jsonl", UNPAIRED)
    (process,), made = _started(path, 1)
    made.get()
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    (abandoned,) = entries(tmp_path)
    assert abandoned.name.endswith(cache.UNFINISHED)
    assert load(path).to_list() == UNPAIRED
    assert abandoned in entries(tmp_path)  # the folder of a live writer looks the same
    for part in (*abandoned.iterdir(), abandoned):
        os.utime(part, (1, 1))
    load(write(tmp_path / "other.jsonl", PAIRED))
    assert abandoned not in entries(tmp_path)
    assert len(entries(tmp_path)) == 2


# ---- folders that cannot be written ---------------------------------------------------------------------------------


def test_data_are_prepared_with_a_warning_if_the_cache_cannot_be_written(tmp_path, caplog):
    path = write(tmp_path / "data.jsonl", PAIRED)
    (tmp_path / "cache").write_text("a file where the folder should be")
    for _ in range(2):
        caplog.clear()
        prepared = prepare_paired(path, one_token_a_word())
        assert len(prepared.dataset) == len(PAIRED)
        assert f"data.jsonl: the cache {tmp_path / 'cache' / 'kto_fused'} cannot be written" in caplog.text


def test_a_whole_entry_of_a_read_only_cache_is_used(tmp_path, monkeypatch, caplog):
    path = write(tmp_path / "data.jsonl", UNPAIRED)
    load(path)

    def read_only(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "mkdir", read_only)
    monkeypatch.setattr(records, "checked_record", None)
    assert load(path).to_list() == UNPAIRED
    assert not caplog.messages


def test_disabled_caching_keeps_nothing(tmp_path):
    path = write(tmp_path / "data.jsonl", UNPAIRED)
    datasets.disable_caching()
    try:
        assert len(prepare_unpaired(path, one_token_a_word()).dataset) == len(UNPAIRED)
    finally:
        datasets.enable_caching()
    assert not (tmp_path / "cache").exists()


def test_a_full_disk_is_an_error_that_says_what_to_do_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(cache.errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records.pa, "OSFile", full)
    with pytest.raises(
        DataError, match=r"data\.jsonl: cannot be read: the disk is full\. .*cache \(HF_DATASETS_CACHE\)"
    ):
        load(write(tmp_path / "data.jsonl", UNPAIRED))
    assert entries(tmp_path) == []


def test_files_of_an_entry_have_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o022)
    try:
        load(write(tmp_path / "data.jsonl", UNPAIRED))
    finally:
        os.umask(before)
    (entry,) = entries(tmp_path)
    assert entry.stat().st_mode & 0o777 == 0o755
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in entry.iterdir())


# ---- whole entries --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_proc", [None, 2])
def test_whole_entries_are_used_for_any_number_of_processes(tmp_path, monkeypatch, num_proc):
    source = write(tmp_path / "data.jsonl", PAIRED * 2)
    tokenizer = one_token_a_word()
    expected = prepare_unpaired(source, tokenizer, num_proc=num_proc).dataset
    monkeypatch.setattr(records, "checked_record", lambda *_: pytest.fail("not from the cache"))
    monkeypatch.setattr(tokens, "token_rows", lambda *_, **__: pytest.fail("not from the cache"))
    monkeypatch.setattr(tokens, "_partner_rows", lambda *_, **__: pytest.fail("not from the cache"))
    for again in (None, 2, 3):
        found = prepare_unpaired(source, tokenizer, num_proc=again).dataset
        assert found.to_list() == expected.to_list()
        assert found._fingerprint == expected._fingerprint


@pytest.mark.parametrize("num_proc", [None, 2])
def test_data_whose_examples_are_all_dropped_are_refused_each_time(tmp_path, num_proc):
    source = write(tmp_path / "data.jsonl", [PAIRED[1]] * 4)
    for _ in range(2):
        with pytest.raises(
            DataError,
            match="nothing is left of 4 examples at max_length=1: 4 are dropped, because the prompt leaves no",
        ):
            prepare_paired(source, one_token_a_word(), max_length=1, num_proc=num_proc)


def test_a_process_whose_records_are_all_dropped_leaves_a_whole_entry(tmp_path):
    source = write(tmp_path / "data.jsonl", [*[PAIRED[1]] * 2, *[PAIRED[0]] * 2])
    for _ in range(2):
        prepared = prepare_paired(source, one_token_a_word(), max_length=2, num_proc=2)
        assert (len(prepared.dataset), prepared.dropped) == (2, 2)


def test_no_copy_of_a_parquet_file_stays(tmp_path):
    Dataset.from_list(UNPAIRED).to_parquet(tmp_path / "data.parquet")
    assert pq.read_metadata(tmp_path / "data.parquet").num_rows == len(UNPAIRED)
    load(tmp_path / "data.parquet")
    assert not list((tmp_path / "cache").rglob("*.parquet"))


def test_a_saved_dataset_that_was_changed_is_prepared_again(tmp_path):
    """``load_from_disk`` returns the saved fingerprint, although the files changed."""
    tokenizer = one_token_a_word()
    rows = [record | {"label": int(record["label"])} for record in UNPAIRED]
    for changed in (rows, [record | {"prompt": "blue"} for record in rows]):
        Dataset.from_list(changed).save_to_disk(tmp_path / "saved")
        state = json.loads((tmp_path / "saved" / "state.json").read_text()) | {"_fingerprint": "same"}
        (tmp_path / "saved" / "state.json").write_text(json.dumps(state))
        prepared = prepare_unpaired(datasets.load_from_disk(tmp_path / "saved"), tokenizer)
        expected = [tokenizer(record["prompt"])["input_ids"] for record in changed]
        assert prepared.dataset["prompt_ids"][:] == expected
