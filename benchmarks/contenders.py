"""Shared by the contenders from logits and from hidden states: a hand-written loss, and checks of what can run here."""

import importlib.util
import shutil

import torch
import torch.nn.functional as F

BETA = 0.1


def by_hand(loss: str, logps: torch.Tensor, ref_logps: torch.Tensor, desirable: torch.Tensor) -> torch.Tensor:
    """Return the loss as most training loops write it: KTO with reference point 0, or sigmoid DPO.

    The log-probabilities are [B]; a DPO batch holds the chosen completions first, then the rejected ones.
    """
    ratios = logps - ref_logps.to(logps.dtype)
    if loss == "kto":
        sign = torch.where(desirable, 1.0, -1.0)
        return (1 - torch.sigmoid(sign * BETA * ratios)).mean()
    chosen, rejected = ratios.chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` works here. On a CPU it needs a C++ compiler."""
    return device.type != "cpu" or bool(shutil.which("g++") or shutil.which("clang++"))


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
