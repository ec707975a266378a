"""Counts of the functions that a fused TRL trainer calls."""

import pytest


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """Count the calls of this package's functions by a fused trainer, and of TRL's own LM head ("own")."""
    from trl.trainer import utils as trl_utils

    from kto_fused.integrations import trl_grpo, trl_model, trl_preference, trl_reference_free

    counted = {
        "linear_token_logps": [trl_model, trl_grpo],
        "linear_sequence_logps": [trl_preference],
        "fused_linear_kto_loss": [trl_preference],
        "fused_linear_loss": [trl_preference, trl_reference_free, trl_grpo],
    }
    counts = dict.fromkeys((*counted, "own"), 0)

    def count(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name, modules in counted.items():
        for module in modules:
            monkeypatch.setattr(module, name, count(name, getattr(module, name)))
    own = trl_utils._ChunkedLogProbFunction
    monkeypatch.setattr(own, "apply", count("own", own.apply))
    return counts
