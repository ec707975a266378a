"""The device of the benchmarks, which the header of a run names."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_report_header() -> str:
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"benchmarks on {name}, torch {torch.__version__}"
