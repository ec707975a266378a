"""Mismatched partners have other prompts and completions of similar length, and no example is used twice."""

# ruff: noqa: E402 (the imports below need datasets)

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

datasets = pytest.importorskip("datasets", reason="datasets is not installed: there is no data to prepare")


from kto_fused.data import partners as partners_module
from kto_fused.preference_data import mismatched_partners

examples = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), min_size=1, max_size=300)


@given(examples=examples, seed=st.integers(0, 3), common=st.floats(0, 1), neighbours=st.sampled_from([1, 2, 5, 64]))
def test_partners_have_other_prompts_and_as_many_examples_as_possible_have_one(examples, seed, common, neighbours):
    prompts, lengths = np.array(examples).T
    prompts[: int(common * len(prompts))] = 7  # many examples share this prompt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partners_module, "NEIGHBOURS", neighbours)
        partners = mismatched_partners(prompts, lengths, seed)
        assert np.array_equal(partners, mismatched_partners(prompts, lengths, seed))
    matched = partners >= 0
    assert (prompts[partners[matched]] != prompts[matched]).all()
    assert len(set(partners[matched])) == matched.sum()
    most = max(Counter(prompts.tolist()).values())
    assert matched.sum() == len(prompts) - max(0, 2 * most - len(prompts))


def test_partners_have_about_the_same_length():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 1000, 20000)
    prompts = np.repeat(np.arange(10000), 2)
    partners = mismatched_partners(prompts, lengths)
    apart = np.abs(lengths[partners] - lengths)
    assert apart.max() < 25  # partners drawn at random would be 333 apart on average


@pytest.mark.parametrize("length", ["shortest", "any"])
def test_one_prompt_in_half_of_all_examples_still_finds_partners(length):
    lengths = np.arange(2001) if length == "shortest" else np.random.default_rng(0).integers(1, 100, 2001)
    prompts = np.where(np.arange(2001) < 1000, -1, np.arange(2001))
    partners = mismatched_partners(prompts, lengths)
    assert sorted(partners) == list(range(2001))
    assert (prompts[partners] != prompts).all()
