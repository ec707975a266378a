"""A renamed constant is missed here, not on a GPU."""

import pytest
import tune


@pytest.mark.parametrize("name", tune.SWEEPS)
def test_a_sweep_starts_from_what_is_in_use(name):
    sweep = tune.SWEEPS[name]
    in_use, *others = sweep.settings
    assert sweep.title(in_use) == ", ".join(f"{name}={getattr(sweep.module, name):,}" for name in sweep.names)
    assert others
    assert in_use not in others
