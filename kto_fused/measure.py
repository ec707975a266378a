"""Measures the wall time and the peak memory of a function call, with the same calls on a CPU and on a GPU.

The benchmarks and the tests of memory use it.
"""

import os
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints a line on stderr at each start and stop


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of ``step()`` in seconds. Waits for ``device`` before and after it."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that ``step()`` holds on ``device`` at one moment, beyond what was held before it.

    Temporary tensors inside operators are included. On a CPU, PyTorch's profiler reports every allocation; on other
    devices, PyTorch's caching allocator keeps the peak.
    """
    if device.type != "cpu":
        memory = getattr(torch, device.type)
        memory.synchronize(device)
        memory.reset_peak_memory_stats(device)
        before = memory.memory_allocated(device)
        step()
        memory.synchronize(device)
        return memory.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done all work that was queued on it."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
