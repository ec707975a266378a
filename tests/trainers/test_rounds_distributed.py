"""Two CPU processes (gloo) draw the samples of one, and train on them as one does."""

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this PyTorch has no gloo: no processes to train in", allow_module_level=True)

from tiny_training import assert_same_run, run_on_two
from train_rounds import OPTIONS, cases

pytestmark = pytest.mark.usefixtures("small_machine")
CASES = cases()  # for the fixture on_one


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    return run_on_two("train_rounds.py", tmp_path_factory)


@pytest.mark.parametrize("kind", list(OPTIONS))
def test_two_processes_sample_and_train_as_one(on_one, on_two, kind):
    two, one = on_two[kind], on_one(kind)
    assert "error" not in two, two
    assert two["samples"] == one["samples"]
    assert two["kl"] == pytest.approx(one["kl"], abs=1e-4)
    assert_same_run(two, one, tolerance=5e-5)


def test_where_one_process_fails_both_end_with_its_sentence(on_two):
    first, second = on_two["failures"]
    assert first == second
    assert "process 1 does not train what process 0 trains (data: other records there" in first.pop()
    assert first == [
        "JudgeError: the judge failed: ZeroDivisionError: no time",
        "GenerationError: --generator http://127.0.0.1:9/v1/models cannot be reached: [Errno 111] Connection refused",
        "MemoryError: no room",
        "ValueError: process 1 does not find another disk/run.json, which process 0 has written: put output_dir on a "
        "disk that all nodes share",
    ]
