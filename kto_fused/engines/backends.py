"""Which backend computes: Triton kernels or PyTorch. And what both need of a device.

``resolve`` decides the backend once per call. ``opaque`` makes an operator of a function, so that ``torch.compile``
does not look inside.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable

import torch

BACKENDS = ("triton", "torch")
HAS_TRITON = importlib.util.find_spec("triton") is not None


def resolve(backend: str | None, device: torch.device) -> str:
    """Return the backend for tensors on ``device``: the one asked for; for None, Triton on a GPU and PyTorch elsewhere.

    Raises ``ValueError`` for a backend that does not exist or cannot run on that device.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend must be one of {list(BACKENDS)} or None, got {backend!r}")
    if device.type == "meta":
        raise ValueError("tensors are on meta, which holds no values to compute with")
    if device.type == "mps":
        raise ValueError("tensors are on mps, which has no float64; move them to the cpu")
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        raise ValueError(f"tensors are on {device}, a GPU without float64; move them to the cpu")
    on_gpu = device.type in ("cuda", "xpu")
    if backend is None:
        return "triton" if on_gpu and HAS_TRITON else "torch"
    if backend == "triton" and not HAS_TRITON:
        raise ValueError("backend='triton' needs the package triton, which is not installed")
    if backend == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' needs a GPU, got tensors on {device.type}; its kernels run on a CPU only for tests, "
            "under Triton's interpreter (TRITON_INTERPRET=1 before triton is imported)"
        )
    return backend


def may_read(tensor: torch.Tensor) -> bool:
    """Return whether a check may read a tensor's values: on a CPU, or where KTO_FUSED_VALIDATE=1 lets the host wait."""
    return tensor.device.type == "cpu" or os.environ.get("KTO_FUSED_VALIDATE") == "1"


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Return a context in which the tensor's GPU is the current one: Triton launches kernels there."""
    if tensor.device.type in ("cuda", "xpu"):
        return getattr(torch, tensor.device.type).device(tensor.device)
    return contextlib.nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU, each of which runs a kernel program; 0 for a CPU."""
    if device.type not in ("cuda", "xpu"):
        return 0
    properties = getattr(torch, device.type).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count


def opaque(
    fake: Callable, mutates_args: tuple[str, ...] = (), *, waits: bool = False, schema: str | None = None
) -> Callable[[Callable], Callable]:
    """Decorate a function of tensors and plain values: ``torch.compile`` sees one operator, eager calls it directly.

    ``fake`` gives tensors shaped as its results. A function that ``waits`` for the device stays out of CUDA graphs.
    ``schema`` declares arguments and results where the function's annotations do not. The operator is
    ``torch.ops.kto_fused.<name>``, and the attribute ``op`` of the decorated function.
    """
    tags = (torch.Tag.cudagraph_unsafe,) if waits else ()

    def decorate(function: Callable) -> Callable:
        name = f"kto_fused::{function.__name__.strip('_')}"
        op = torch.library.custom_op(name, function, mutates_args=mutates_args, schema=schema, tags=tags)
        op.register_fake(fake)

        @functools.wraps(function)
        def call(*args):
            return op(*args) if torch.compiler.is_compiling() else function(*args)

        call.op = op
        return call

    return decorate
