"""The sweeps of `tune.py` can be built. Without this test a renamed constant would be noticed only on a GPU."""

import pytest
import tune


@pytest.mark.parametrize("name", tune.SWEEPS)
def test_a_sweep_has_other_settings_than_the_one_in_use(name):
    sweep = tune.SWEEPS[name]
    assert len(sweep.settings) > 1
    assert {len(setting) for setting in sweep.settings} == {len(sweep.names)}
