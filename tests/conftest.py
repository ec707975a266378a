"""Settings and fixtures of all tests.

Without a GPU the Triton kernels run under Triton's interpreter. It must be switched on before Triton is imported.
"""

import gc
import logging
import os
from pathlib import Path

import torch
from devices import ENGINES, HAS_GPU

if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# the workers of pytest-xdist share the cores
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

import pytest
import triton.language as tl
from hypothesis import HealthCheck, settings
from triton.runtime import interpreter

settings.register_profile("kto-fused", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("kto-fused")


def patch_language_once_a_launch() -> None:
    """Make the interpreter patch `triton.language` once per launch.

    It would patch it again at each call of a function within the kernel, which takes half of the tests' time.
    """
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function):
        modules = frozenset(value for value in function.__globals__.values() if value is tl or value is tl.core)
        if modules in patched:
            return None  # only a launch uses the returned value
        scope = patch(function)
        patched.add(modules)
        restore = scope.restore

        def restore_and_forget():
            patched.clear()
            restore()

        scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch_once


if not HAS_GPU:
    patch_language_once_a_launch()


def skipped_for_its_device(report: pytest.CollectReport | pytest.TestReport):
    """Turn a skip for any reason but the device into a failure, if the environment asks for that.

    CI asks for it, because it installs every package that tests need: another skip there is a test lost unnoticed.
    pytest reports expected failures as skips too, without such a reason; they stay as they are.
    """
    if "KTO_FUSED_SKIP_FOR_DEVICE_ONLY" in os.environ and report.skipped and not hasattr(report, "wasxfail"):
        *_, reason = report.longrepr
        if "GPU" not in reason and "interpreter" not in reason:
            report.outcome = "failed"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return skipped_for_its_device((yield))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return skipped_for_its_device((yield))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run every kill, corruption and fuzzed case; CI runs a slice")
    parser.addoption("--real-model", action="store_true", help="download a model of 93 MB and train it, in minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: repeats other tests on another path; runs only with --full")
    config.addinivalue_line("markers", "real_model: downloads and trains a real model; runs only with --real-model")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    not_wanted = [name for name in ("full", "real_model") if not config.getoption(name)]
    left_out = [item for item in items if any(map(item.get_closest_marker, not_wanted))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def full(request) -> bool:
    """Whether `--full` asks for all cases of a test that otherwise runs a slice of them."""
    return request.config.getoption("--full")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine" in metafunc.fixturenames:
        metafunc.parametrize("engine", ENGINES, ids=["-".join(engine) for engine in ENGINES])


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill new memory with NaN, so that a kernel's forgotten outputs show. Nondeterministic operators raise."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def own_log_level():
    """Undo ``log.show`` of earlier tests and of modules' fixtures: their INFO messages would appear in other tests."""
    logging.getLogger("kto_fused").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def small_machine():
    """Settings for tests that train: one thread, quiet libraries, and no search for garbage in imported modules.

    The tensors are tiny, so more threads slow them down. Every `train()` runs the garbage collector, which skips frozen
    objects.
    """
    import datasets
    import transformers

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture
def attention_masks(monkeypatch) -> list[torch.Tensor | None]:
    """The masks that PyTorch's attention receives. A call without a mask must be causal."""
    masks, attention = [], torch.nn.functional.scaled_dot_product_attention

    def seen_attention(*args, attn_mask=None, is_causal=False, **options):
        assert is_causal == (attn_mask is None)
        masks.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen_attention)
    return masks


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A separate cache of `datasets` for this test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def ref_passes():
    """Returns, at each call, the number of the reference's forward passes since the last call."""
    from tiny_training import counting_reference_passes

    with counting_reference_passes() as counter:
        yield lambda: counter.pop("passes", 0)


@pytest.fixture(scope="module")
def byte_pairs():
    """A tokenizer whose tokens are merged letters."""
    from data_cases import byte_pair_tokenizer

    return byte_pair_tokenizer()


@pytest.fixture(scope="module")
def on_one(request, tmp_path_factory):
    """A function that runs one of the module's `CASES` in this process alone and returns its result."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield lambda case: request.module.CASES[case](tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """For tests of the command: a folder with a model (``model``) and data for each recipe, named by it:
    ``kto.jsonl`` to train on, ``kto-eval.jsonl`` to evaluate on.
    """
    import tiny_training

    folder = tmp_path_factory.mktemp("files")
    tiny_training.model(max_position_embeddings=1024).save_pretrained(folder / "model")
    tiny_training.tokenizer().save_pretrained(folder / "model")
    for loss in tiny_training.RECIPES:
        tiny_training.data(loss, 16).to_json(folder / f"{loss}.jsonl")
        tiny_training.data(loss, 8, seed=1).to_json(folder / f"{loss}-eval.jsonl")
    return folder


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory):
    """A cache of ``datasets`` for one test file."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
