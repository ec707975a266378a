"""Measures a step's time and memory, on every device in the same way. For ``kto-fused demo``, benchmarks and tests."""

import os
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler announces each start and stop on stderr


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of ``step`` in seconds. The device finishes all work before the clock starts and stops."""
    synchronize(device)
    start = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - start


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the largest number of bytes that ``step`` holds on ``device`` at once.

    It counts memory that ``step`` itself allocates, temporaries inside operators included.
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
    """Wait until the device has finished all work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
