"""One thread for the tiny models of this folder."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors are computed fastest by one thread, also when other work shares the cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
