"""DeepSpeed's ZeRO-2 and ZeRO-3 on two CPU processes (gloo) train as one process does without DeepSpeed."""

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

from tiny_training import assert_near, assert_same_run, model, run_on_two
from train_deepspeed import KINDS, cases

pytestmark = pytest.mark.usefixtures("small_machine")
CASES = cases()  # for the fixture on_one
of_each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """Return a function from a case to its result on two processes; one launch runs all cases."""
    ninja = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # to build its operator
    results = run_on_two("train_deepspeed.py", tmp_path_factory, DS_ACCELERATOR="cpu", PATH=ninja)

    def result(case):
        assert not isinstance(results[case], dict) or "error" not in results[case], results[case]["error"]
        return results[case]

    return result


@of_each_kind
@pytest.mark.parametrize("head", ["untied", "tied"])
def test_zero3_trains_as_one_process(on_one, on_two, kind, head):
    """Compares losses, z0, gradient norms, metrics, token counts and weights."""
    two, one = on_two(f"3-{kind}-{head}"), on_one(f"3-{kind}-{head}")
    assert two["policy"] == two["reference"] == {"stage": 3, "held": 0}
    assert one["policy"] is one["reference"] is None
    assert_same_run(two, one)
    assert len(one["history"]) == 4
    if kind == "kto":
        assert any(entry["kl"] > 0.05 for entry in one["history"]), "z0 was cut off at 0 throughout"


@of_each_kind
def test_zero2_trains_as_one_process(on_one, on_two, kind):
    two = on_two(f"2-{kind}-untied")
    assert two["policy"]["stage"] == 2
    assert two["reference"] == {"stage": 0, "held": sum(weights.numel() for weights in model().parameters())}
    assert_same_run(two, on_one(f"2-{kind}-untied"))


@pytest.mark.parametrize("case", ["2-dpo-accumulated", "3-dpo-accumulated", "3-kto-accumulated"])
def test_accumulates_as_one_process(on_one, on_two, case):
    """The last step has one batch where the others have two."""
    assert_same_run(on_two(case), on_one(case))


@of_each_kind
def test_the_copy_that_is_the_reference_is_that_of_one_process(on_one, on_two, kind):
    """Sizes of ZeRO that are left to transformers ("auto") are set for the reference too."""
    two = on_two(f"3-{kind}-copied reference")
    assert two["history"][0]["rewards/chosen"] == 0
    assert two["reference"]["stage"] == 3
    assert_same_run(two, on_one(f"3-{kind}-copied reference"))


@of_each_kind
def test_adapters_train_as_in_one_process(on_one, on_two, kind):
    two = on_two(f"3-{kind}-lora")
    assert two["policy"] == {"stage": 3, "held": 0}
    assert two["reference"] is None
    assert_same_run(two, on_one(f"3-{kind}-lora"))


@pytest.mark.parametrize("case", ["3-kto-own path", "3-dpo-same path"])
def test_weights_partitioned_at_load_train_as_whole_ones(on_one, on_two, case):
    """Policy and reference come from two paths, or both from one."""
    two = on_two(case)
    assert two["is_partitioned_at_load"]
    assert two["reference"] == {"stage": 3, "held": 0}
    assert_same_run(two, on_one(case))


def test_bf16_rounds_policy_and_reference_alike(on_one, on_two):
    """DeepSpeed holds the weights in bf16, autocast does not, hence the tolerance."""
    two, one = on_two("3-dpo-bf16"), on_one("3-dpo-bf16")
    first = two["history"][0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert_near(two["history"], one["history"], tolerance=5e-2, but=("rewards/accuracies", "mean_token_accuracy"))


@pytest.mark.parametrize("case", ["3-kto-checkpointed", "3-dpo-logits", "3-dpo-clipped", "3-dpo-environment"])
def test_other_settings_train_as_one_process(on_one, on_two, case):
    """The cases: checkpointed layers; the loss from logits; gradients clipped at max_grad_norm, which DeepSpeed's
    configuration does not mention; DeepSpeed configured through accelerate's environment variables.
    """
    two = on_two(case)
    assert two["policy"]["stage"] == two["reference"]["stage"] == 3
    assert_same_run(two, on_one(case))


@of_each_kind
def test_an_evaluation_counts_no_row_twice_and_leaves_training_as_it_was(on_one, on_two, kind):
    two, one = on_two(f"3-{kind}-evaluated"), on_one(f"3-{kind}-evaluated")
    assert_near(two["evaluations"], one["evaluations"])
    assert_same_run(two, one)


def test_a_stopped_run_resumes_to_the_bit(on_two):
    runs = on_two("3-kto-resumed")
    assert runs["resumed"] == runs["whole"]
    assert len(runs["whole"]["history"]) == 2


@pytest.mark.parametrize("case", ["2-kto-precomputed", "3-kto-precomputed"])
def test_precomputed_references_are_those_of_one_process(on_one, on_two, case):
    """Their fingerprint is that of the whole model, not of the part that one process holds."""
    (computed, found), (on_its_own, _) = on_two(case), on_one(case)
    assert computed["passes"] == on_its_own["passes"] > 0
    assert found["passes"] == 0
    assert computed["fingerprints"] == found["fingerprints"] == on_its_own["fingerprints"]
    assert found["history"] == computed["history"]
    assert_same_run(computed, on_its_own)


def test_precomputed_references_are_not_rounded_to_the_models_dtype(on_two):
    computed, found = on_two("3-kto-precomputed in bf16")
    assert computed["is_unrounded"]
    assert found["is_unrounded"]
    assert abs(computed["history"][0]["rewards/chosen"]) < 1e-3


def test_a_saved_model_is_whole(on_two):
    run = on_two("3-dpo-saved")
    assert run["saved"] == run["weights"]


def test_features_unsupported_under_deepspeed_are_refused(on_two):
    assert "precompute_ref_log_probs with adapters under DeepSpeed: leave it out" in on_two("adapters precomputed")
    assert "it counts 1, and 2 were started" in on_two("processes")
    assert "ref_model is missing, and model cannot be copied" in on_two("no reference")
