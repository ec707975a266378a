"""The devices of this machine, and the engines that the tests run on them."""

import torch

HAS_GPU = torch.cuda.is_available()
# (backend, device) pairs that run on this machine; without a GPU, Triton's kernels run in its interpreter
ENGINES = (
    [("torch", "cpu"), ("triton", "cuda"), ("torch", "cuda")] if HAS_GPU else [("torch", "cpu"), ("triton", "cpu")]
)
