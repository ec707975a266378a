"""Counters of what a call costs: the bytes that kernels move, their launches, and PyTorch's operators."""

from collections import Counter

import pytest
from devices import HAS_GPU
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter, jit


class MovedBytes:
    """Counts the bytes that interpreted kernels load and store; a masked lane costs nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        builder = interpreter.interpreter_builder
        self.loaded = self.stored = 0
        load, store = builder.create_masked_load, builder.create_masked_store

        def counted_load(ptrs, mask, *args, **kwargs):
            self.loaded += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
            return load(ptrs, mask, *args, **kwargs)

        def counted_store(ptrs, value, mask, *args, **kwargs):
            self.stored += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
            return store(ptrs, value, mask, *args, **kwargs)

        monkeypatch.setattr(builder, "create_masked_load", counted_load)
        monkeypatch.setattr(builder, "create_masked_store", counted_store)

    def take(self) -> tuple[int, int]:
        """Return the bytes loaded and stored since the last call."""
        counts = self.loaded, self.stored
        self.loaded = self.stored = 0
        return counts


class Operators(TorchDispatchMode):
    """Records every ATen operator called, except those that only make views or allocate memory."""

    FREE = (
        "empty",
        "new_empty",
        "empty_like",
        "view",
        "_unsafe_view",
        "alias",
        "detach",
        "select",
        "unsqueeze",
        "expand",
    )

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def count_launches(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Return a counter of Triton launches by kernel. The interpreter's own operators are hidden from other counters."""
    launches = Counter()
    function = jit.JITFunction if HAS_GPU else interpreter.InterpretedFunction
    run = function.run

    def counted_run(self, *args, **kwargs):
        launches[self.fn.__name__] += 1
        with _disable_current_modes():
            return run(self, *args, **kwargs)

    monkeypatch.setattr(function, "run", counted_run)
    return launches
