"""Output streams that break or lack characters, signals, and worker processes that must not outlive the command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import forked_command
import pytest
import tiny_training
from command_runs import losses, training
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerFast

from kto_fused.commands import cli, process, progress, results
from kto_fused.trainers import folder_lock

pytestmark = pytest.mark.usefixtures("small_machine", "module_cache")
SENTENCE = "kto-fused: stdout cannot be written ({}): the run continues without it and writes its results"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with a model and feedback, whose names and words hold characters that ASCII lacks."""
    folder = tmp_path_factory.mktemp("fichiers-é")
    tiny_training.model().save_pretrained(folder / "modèle")
    tiny_training.tokenizer().save_pretrained(folder / "modèle")
    rows = tiny_training.data("kto", 16).map(lambda record: {"prompt": record["prompt"] + " 猫 ü"})
    rows.to_json(folder / "données.jsonl", force_ascii=False)
    return folder


def command(files: Path, out: Path, *more: str) -> list[str]:
    short = ["--output_dir", str(out), "--save_strategy", "no", "--max_steps", "3", "--logging_steps", "1"]
    return training(files / "modèle", files / "données.jsonl", *short, *more)


@pytest.fixture(scope="module")
def expected(files, tmp_path_factory) -> list[float]:
    """The losses of a run with working output streams."""
    folder = tmp_path_factory.mktemp("expected")
    outcome = forked_command.run(command(files, folder / "out"), folder)
    assert outcome.code == 0, outcome.err
    assert "Wrote the model" in outcome.out
    return losses(folder / "out")


# ---- lost streams -------------------------------------------------------------------------------------------------


def broken_pipe(*descriptors):
    for descriptor in descriptors:
        read, write = os.pipe()
        os.dup2(write, descriptor)
        os.close(write)
        os.close(read)


def full_disk(*descriptors):
    for descriptor in descriptors:
        os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)


def closed(*descriptors):
    for descriptor in descriptors:
        os.close(descriptor)


STREAMS = {"stdout": (1,), "stderr": (2,), "both": (1, 2)}
LOST = [(broken_pipe, "stdout"), (full_disk, "stdout"), (full_disk, "both"), (closed, "stderr")]
ALL_LOST = [(lose, streams) for lose in (broken_pipe, full_disk, closed) for streams in STREAMS]


@pytest.mark.parametrize(
    ("lose", "streams"),
    [*LOST, *(pytest.param(*case, marks=pytest.mark.full) for case in ALL_LOST if case not in LOST)],
)
def test_a_lost_stream_loses_no_run(files, tmp_path, expected, lose, streams):
    descriptors = STREAMS[streams]

    def before():
        lose(*descriptors)
        forked_command.open_streams()

    outcome = forked_command.run(command(files, tmp_path / "out"), tmp_path, before)
    assert outcome.code == 0, outcome.err
    assert losses(tmp_path / "out") == expected
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 1000
    assert "Traceback" not in outcome.err
    assert "Error" not in outcome.err
    reasons = {broken_pipe: "Broken pipe", full_disk: "No space left on device"}
    said = outcome.err.count("stdout cannot be written")
    assert said == (1 if descriptors == (1,) and lose in reasons else 0)
    if said:
        assert SENTENCE.format(reasons[lose]) in outcome.err


def test_a_pipe_closed_in_the_middle_of_a_run_loses_no_run(files, tmp_path, expected):
    """``| head -3`` closes the pipe so."""
    read, write = os.pipe()

    def before():
        os.close(read)
        os.dup2(write, 1)
        os.close(write)
        sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115

    child = forked_command.start(command(files, tmp_path / "out"), tmp_path, before)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert "16 examples" in pipe.readline()
    outcome = forked_command.ended(child, tmp_path)
    assert outcome.code == 0, outcome.err
    assert losses(tmp_path / "out") == expected
    assert outcome.err.count(SENTENCE.format("Broken pipe")) == 1


def test_a_closed_stdout_does_not_print_into_the_runs_files(tmp_path):
    """A file that is opened later would get the number of the closed descriptor."""

    def before():
        closed(0, 1)
        forked_command.open_streams()
        sys.stdout = None

    def check(arguments):
        with open(tmp_path / "opened", "w") as file:
            os.write(1, b"printed by a library in C")
            return 0 if file.fileno() > 2 else 5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "run", lambda name, arguments: check(arguments))
        assert forked_command.run(["env"], tmp_path, before).code == 0
    assert (tmp_path / "opened").read_text() == ""


@pytest.mark.parametrize("arguments", [["env"], ["estimate", "--seq", "64"], ["train", "--help"], ["--help"]])
def test_a_command_that_only_prints_reports_a_lost_stdout(files, tmp_path, arguments):
    if arguments[0] == "estimate":
        arguments = [*arguments, "--model", str(files / "modèle")]

    def with_stdout(lose):
        def before():
            lose(1)
            forked_command.open_streams()

        return forked_command.run(arguments, tmp_path, before)

    head, full = with_stdout(broken_pipe), with_stdout(full_disk)
    assert (head.code, head.err) == (0, "")
    assert full.err == "kto-fused: stdout cannot be written: No space left on device\n"
    assert full.code == (0 if arguments == ["--help"] else 2)  # argparse itself prints the help of all commands


def test_python_says_nothing_of_a_broken_pipe_at_its_exit():
    """The interpreter flushes stdout when it exits; the other tests only imitate that."""
    script = "import sys; from kto_fused.commands import cli; sys.exit(cli.main(['env']))"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        started.stdout.close()
        errors = started.stderr.read().decode()
    assert (started.returncode, errors) == (0, "")


def test_ctrl_c_with_a_lost_stderr_still_saves_a_checkpoint(files, tmp_path):
    def before():
        broken_pipe(2)
        forked_command.open_streams()
        progress.StopOnCtrlC.on_step_begin = lambda self, args, state, *_, **__: (
            signal.raise_signal(signal.SIGINT) if state.global_step == 1 else None
        )

    outcome = forked_command.run(command(files, tmp_path / "out"), tmp_path, before)
    assert outcome.code == 130
    assert "Stopped after step 2 of 3" in outcome.out
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


# ---- an ASCII terminal --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["train"], ["env"], ["estimate"], *([name, "--help"] for name in cli.COMMANDS)])
def test_an_ascii_terminal_ends_no_command(files, tmp_path, arguments, expected):
    out = tmp_path / "résultats"
    if arguments == ["train"]:
        arguments = command(files, out)
    if arguments == ["estimate"]:
        arguments = ["estimate", "--seq", "64", "--model", str(files / "modèle")]

    def before():
        os.environ["HF_HOME"] = "/dossier-é"
        forked_command.open_streams("ascii")

    outcome = forked_command.run(arguments, tmp_path, before)
    assert outcome.code == 0, outcome.err
    assert "Traceback" not in outcome.err
    assert "Error" not in outcome.err
    if arguments[0] == "train" and len(arguments) > 2:
        assert losses(out) == expected
        assert "r\\xe9sultats" in outcome.out
    if arguments[0] == "estimate" and len(arguments) > 2:
        assert "mod\\xe8le" in outcome.out


def test_errors_about_names_that_ascii_lacks_are_said(files, tmp_path):
    arguments = command(files, tmp_path / "out")
    arguments[arguments.index("--data") + 1] = "manquées.jsonl"
    outcome = forked_command.run(arguments, tmp_path, lambda: forked_command.open_streams("ascii"))
    assert outcome.code == 2
    assert "manqu\\xe9es.jsonl" in outcome.err


@pytest.mark.parametrize("flag", ["--output_dir", "--model", "--data"])
def test_a_name_that_cannot_be_passed_on_is_refused_before_training(files, tmp_path, flag):
    """The tokenizer cannot be saved under a name that is not UTF-8, or that the locale's encoding lacks."""
    arguments = command(files, tmp_path / "out")
    arguments[arguments.index(flag) + 1] = os.fsdecode(b"caf\xe9")
    outcome = forked_command.run(arguments, tmp_path)
    assert outcome.code == 2
    assert "caf\\udce9 cannot be used as a file name" in outcome.err
    assert "set PYTHONUTF8=1" in outcome.err
    assert not (tmp_path / "out").exists()


# ---- workers ------------------------------------------------------------------------------------------------------


def endless_in_workers(function):
    main = os.getpid()

    def slow(*arguments, **named):
        if os.getpid() != main:
            time.sleep(100)
        return function(*arguments, **named)

    return slow


def writing_for_ever():
    """Make workers hang just before they close the temporary file that holds their tokens."""
    ArrowWriter.finalize = endless_in_workers(ArrowWriter.finalize)


WORKERS = {
    "tokenizers": (["--dataset_num_proc", "2"], writing_for_ever),
    "loaders": (["--dataloader_num_workers", "2", "--max_steps", "100000"], lambda: None),
}
SIGNALS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}


ENDINGS = [("tokenizers", signal.SIGTERM), ("loaders", signal.SIGINT), ("loaders", signal.SIGKILL)]
ALL_ENDINGS = [(kind, number) for kind in WORKERS for number in SIGNALS]


@pytest.mark.parametrize(
    ("kind", "number"),
    [*ENDINGS, *(pytest.param(*case, marks=pytest.mark.full) for case in ALL_ENDINGS if case not in ENDINGS)],
    ids=lambda value: getattr(value, "name", value),
)
def test_no_worker_and_no_draft_stays_behind(files, tmp_path, kind, number, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    flags, before = WORKERS[kind]
    child = forked_command.start(command(files, tmp_path / "out", *flags), tmp_path, before)
    deadline, workers = time.monotonic() + 60, []
    while len(workers) < 2 or (kind == "loaders" and "  step" not in (tmp_path / "stdout").read_text()):
        assert time.monotonic() < deadline
        assert os.waitpid(child, os.WNOHANG) == (0, 0), (tmp_path / "stderr").read_text()
        workers = forked_command.descendants(child)
        time.sleep(0.05)
    time.sleep(0.5)
    workers = forked_command.descendants(child)
    (os.kill if number == signal.SIGKILL else os.killpg)(child, number)  # Ctrl-C in a terminal reaches all processes
    outcome = forked_command.ended(child, tmp_path)
    assert forked_command.still_running(workers) == []
    assert outcome.code == SIGNALS[number], outcome.err
    assert "Traceback" not in outcome.err
    if number == signal.SIGTERM:
        assert "kto-fused train: ended by SIGTERM" in outcome.err
    if number == signal.SIGINT:
        assert outcome.err.count("finishing this step" if kind == "loaders" else "kto-fused train: interrupted") == 1
    if number != signal.SIGKILL:
        assert [path for path in (tmp_path / "cache").rglob("tmp*") if path.is_file()] == []
        assert not (tmp_path / "out" / results.DRAFT).exists()


def test_a_killed_loader_is_one_sentence(files, tmp_path):
    # persistent workers do not end by themselves with an epoch, before one of them can be killed
    flags = [*WORKERS["loaders"][0], "--dataloader_persistent_workers"]
    child = forked_command.start(command(files, tmp_path / "out", *flags), tmp_path)
    deadline, workers = time.monotonic() + 60, []
    while len(workers) < 2 or "  step" not in (tmp_path / "stdout").read_text():
        assert time.monotonic() < deadline
        workers = forked_command.descendants(child)
        time.sleep(0.05)
    workers[0].kill()
    outcome = forked_command.ended(child, tmp_path)
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    assert "lower --dataloader_num_workers" in outcome.err
    assert forked_command.still_running(workers) == []


def test_a_killed_loader_is_one_sentence_wherever_torch_says_so(files, tmp_path):
    """torch raises the error in a signal handler, so from any line: here while the folder's lock is released."""

    def before():
        def fails(*_, **__):
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

        folder_lock.FileLock.release = fails

    outcome = forked_command.run(command(files, tmp_path / "out"), tmp_path, before)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert "killed by signal: Killed.: a process that loads batches was killed from outside" in outcome.err


def test_an_error_in_a_worker_ends_all_of_them(files, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def before():
        main, call = os.getpid(), PreTrainedTokenizerFast.__call__

        def failing(*arguments, **named):
            if os.getpid() != main:
                raise ValueError("a tokenizer's own error")
            return call(*arguments, **named)

        PreTrainedTokenizerFast.__call__ = failing

    outcome = forked_command.run(command(files, tmp_path / "out", "--dataset_num_proc", "2"), tmp_path, before)
    assert outcome.code == 2
    assert "a tokenizer's own error" in outcome.err
    assert "Traceback" not in outcome.err
    assert [path for path in (tmp_path / "cache").rglob("tmp*") if path.is_file()] == []


def test_a_program_that_uses_the_library_forks_as_before():
    """The fork hooks do nothing outside the command."""
    with process.orderly_end():
        pass
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    child = os.fork()
    if child == 0:
        os._exit(0 if (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before else 1)
    assert os.waitpid(child, 0)[1] == 0
