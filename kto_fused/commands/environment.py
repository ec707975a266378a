"""``kto-fused env``: prints versions, devices, and the backend that each device gets, with the reason.

A bug report should contain its output. It runs without any of the optional packages, because it imports only PyTorch.
"""

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from typing import Any

import torch

from .. import __version__
from ..engines import backends

PACKAGES = ("transformers", "accelerate", "datasets", "peft", "trl", "liger-kernel")
# Some builds of PyTorch bring Triton under another name.
TRITON_PACKAGES = ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows")
VARIABLES = {
    "KTO_FUSED_VALIDATE": "1: check labels and offsets on a GPU before use, which waits for the GPU",
    "TRITON_INTERPRET": "1: run Triton's kernels in its interpreter, which is slow and needs no GPU",
    "TRITON_CACHE_DIR": "folder of the kernels that Triton has compiled",
    "CUDA_VISIBLE_DEVICES": "numbers of the GPUs that PyTorch may use",
    "PYTORCH_ALLOC_CONF": "how PyTorch allocates GPU memory",
    "PYTORCH_CUDA_ALLOC_CONF": "older name of PYTORCH_ALLOC_CONF",
    "OMP_NUM_THREADS": "number of threads that PyTorch uses on a CPU",
    "OMP_WAIT_POLICY": "passive: waiting threads sleep, which kto-fused chooses if neither it nor the next is set",
    "GOMP_SPINCOUNT": "how long a waiting thread spins before it sleeps",
    "HF_HOME": "folder of downloaded models and data",
    "HF_HUB_OFFLINE": "1: use only models and data that are on disk",
}


@dataclass(frozen=True)
class GPU:
    """A GPU that PyTorch sees."""

    device: torch.device
    name: str
    memory_bytes: int
    capability: str | None  # compute capability ("9.0"), or the architecture under ROCm ("gfx942")


def gpus() -> list[GPU]:
    """Return the GPUs that PyTorch sees and Triton can compile for: NVIDIA, AMD and Intel."""
    found = []
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        for index in range(module.device_count() if module.is_available() else 0):
            properties = module.get_device_properties(index)
            capability = getattr(properties, "gcnArchName", None) if torch.version.hip else None
            if capability is None and hasattr(properties, "major"):
                capability = f"{properties.major}.{properties.minor}"
            found.append(GPU(torch.device(kind, index), properties.name, properties.total_memory, capability))
    return found


def report() -> dict[str, Any]:
    """Return the report as a dict.

    ``versions`` maps packages to versions (None: not installed), ``torch_build`` is a text, ``devices`` lists each
    device with its backend and the reason, and ``variables`` maps environment variables to values (None: not set).
    """
    versions = {"kto-fused": __version__, "python": platform.python_version(), "torch": torch.__version__}
    versions["triton"] = next(filter(None, map(_version, TRITON_PACKAGES)), None)
    versions |= {name: _version(name) for name in PACKAGES}
    cores, threads = os.cpu_count(), torch.get_num_threads()
    cpu = f"{platform.machine()}, {cores} cores, {threads} threads"
    devices = [{"device": "cpu", "name": cpu, "memory_bytes": None, "capability": None}]
    devices += [{**vars(gpu), "device": str(gpu.device)} for gpu in gpus()]
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU", "memory_bytes": None, "capability": None})
    for device in devices:
        device["backend"], device["reason"] = backend_and_reason(torch.device(device["device"]))
    return {
        "versions": versions,
        "torch_build": torch_build(),
        "devices": devices,
        "variables": {name: os.environ.get(name) for name in VARIABLES},
    }


def run() -> int:
    """Print the report. Returns the exit code."""
    facts = report()
    lines = [(name, version or "not installed") for name, version in facts["versions"].items()]
    lines.append(("PyTorch is built for", facts["torch_build"]))
    _print("Versions", lines)
    for device in facts["devices"]:
        lines = [("name", device["name"])]
        if device["memory_bytes"]:
            lines.append(("memory", f"{device['memory_bytes'] / 2**30:.1f} GiB"))
        if device["capability"]:
            lines.append(("capability", device["capability"]))
        lines.append(("backend", f"{device['backend'] or 'none'}: {device['reason']}"))
        _print(f"Device {device['device']}", lines)
    _print("Variables", [(name, _described(name, value)) for name, value in facts["variables"].items()])
    return 0


def backend_and_reason(device: torch.device) -> tuple[str | None, str]:
    """Return the backend that a loss gets on the device, and the reason. The backend is None if it is refused."""
    try:
        backend = backends.resolve(None, device)
    except ValueError as error:
        return None, str(error)
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "triton":
        how = "run in Triton's interpreter, slowly (TRITON_INTERPRET=1)" if is_interpreted else "are compiled for it"
        return backend, f"this is a GPU and Triton is installed, so the kernels {how}"
    if device.type != "cpu":
        return backend, "Triton is not installed"
    if is_interpreted and backends.HAS_TRITON:
        return backend, "Triton compiles only for GPUs; TRITON_INTERPRET=1 lets backend='triton' run here, for tests"
    return backend, "Triton compiles only for GPUs"


def torch_build() -> str:
    """Return what PyTorch was compiled for, and whether it sees such a device."""
    if torch.version.hip:
        name, module = f"ROCm {torch.version.hip}", torch.cuda
    elif torch.version.cuda:
        name, module = f"CUDA {torch.version.cuda}", torch.cuda
    elif torch.version.xpu:
        name, module = f"XPU {torch.version.xpu}", torch.xpu
    else:
        return "CPU"
    return name if module.is_available() else f"{name}, but PyTorch sees no such GPU"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _described(name: str, value: str | None) -> str:
    return f"{'not set' if value is None else repr(value)} ({VARIABLES[name]})"


def _print(title: str, lines: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in lines)
    print(title)
    for name, text in lines:
        print(f"  {name:{width}}  {text}")
