"""The command ``kto-fused env`` reports versions, devices and backends, whatever packages are missing."""

import importlib.metadata
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from devices import HAS_GPU

import kto_fused
from kto_fused.commands import environment
from kto_fused.engines import backends

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture
def one_gpu(monkeypatch):
    """PyTorch sees one GPU."""
    properties = SimpleNamespace(name="A GPU", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


def printed(capsys) -> str:
    assert environment.run() == 0
    return capsys.readouterr().out


def test_versions_are_those_installed():
    versions = environment.report()["versions"]
    assert versions["kto-fused"] == kto_fused.__version__
    assert versions["torch"] == torch.__version__
    assert versions["transformers"] == importlib.metadata.version("transformers")
    assert list(versions) == ["kto-fused", "python", "torch", "triton", *environment.PACKAGES]


def test_checks_read_a_gpus_tensors_only_where_the_variable_says_so(monkeypatch):
    monkeypatch.delenv("KTO_FUSED_VALIDATE", raising=False)
    elsewhere = torch.empty(0, device="meta")
    assert backends.may_read(torch.empty(0))
    assert not backends.may_read(elsewhere)
    monkeypatch.setenv("KTO_FUSED_VALIDATE", "1")
    assert backends.may_read(elsewhere)


def test_a_missing_package_is_reported_and_stops_nothing(monkeypatch, capsys):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert environment.report()["versions"]["triton"] is None
    out = printed(capsys)
    assert out.count("not installed") == 1 + len(environment.PACKAGES)


def test_triton_is_found_under_the_name_that_a_build_gives_it(monkeypatch):
    def version(name):
        if name == "pytorch-triton-rocm":
            return "3.4.0"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert environment.report()["versions"]["triton"] == "3.4.0"


def test_it_imports_no_heavy_package():
    heavy = ("transformers", "datasets", "trl", "peft", "accelerate", "triton")
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "from kto_fused.commands import environment; environment.report()\n"
        f"print([name for name in {heavy} if name in set(sys.modules) - before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_each_device_is_listed_with_its_backend(one_gpu, monkeypatch, capsys):
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu, gpu = environment.report()["devices"][:2]
    assert (cpu["device"], cpu["backend"]) == ("cpu", "torch")
    assert (gpu["device"], gpu["backend"]) == ("cuda:0", "triton")
    assert (gpu["name"], gpu["memory_bytes"], gpu["capability"]) == ("A GPU", 80 * 2**30, "9.0")
    out = printed(capsys)
    assert "Device cuda:0" in out
    assert "80.0 GiB" in out
    assert "triton: this is a GPU and Triton is installed, so the kernels are compiled for it" in out


@pytest.mark.parametrize("has_triton", [True, False])
@pytest.mark.parametrize("interpret", ["1", None])
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_the_backend_is_the_one_that_a_loss_would_get(monkeypatch, device, interpret, has_triton):
    monkeypatch.setattr(backends, "HAS_TRITON", has_triton)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if interpret:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    backend, reason = environment.backend_and_reason(device)
    assert backend == backends.resolve(None, device)
    assert ("interpreter" in reason or "TRITON_INTERPRET=1" in reason) == bool(interpret and has_triton)
    assert ("not installed" in reason) == (device == GPU and not has_triton)


def test_a_device_that_is_refused_has_the_refusal_as_its_reason():
    backend, reason = environment.backend_and_reason(torch.device("mps"))
    assert backend is None
    assert "float64" in reason


def test_variables_show_their_values(monkeypatch, capsys):
    monkeypatch.setenv("KTO_FUSED_VALIDATE", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    variables = environment.report()["variables"]
    assert variables["KTO_FUSED_VALIDATE"] == "1"
    assert variables["OMP_NUM_THREADS"] is None
    lines = [line.split() for line in printed(capsys).splitlines()]
    assert ["KTO_FUSED_VALIDATE", "'1'"] in [words[:2] for words in lines]
    assert ["OMP_NUM_THREADS", "not", "set"] in [words[:3] for words in lines]


@pytest.mark.skipif(HAS_GPU, reason="checks the report on a machine without a GPU")
def test_a_build_for_gpus_that_sees_none_says_so(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert environment.torch_build() == "CUDA 13.0, but PyTorch sees no such GPU"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert environment.torch_build() == "CPU"
