"""Two CPU processes (gloo), under DistributedDataParallel or FSDP2, train as one process on the same global batches."""

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this PyTorch has no gloo: no processes to train in", allow_module_level=True)

import transformers
from tiny_training import assert_near, assert_same_run, run_on_two
from train_distributed import FAILURES, KINDS, WITHOUT_REFERENCE, WRAPPERS, cases

pytestmark = pytest.mark.usefixtures("small_machine")
CASES = cases()  # for the fixture on_one
EVERYWHERE = [f"{wrapper}-{kind}" for wrapper in WRAPPERS for kind in KINDS]
on_everything = pytest.mark.parametrize("name", EVERYWHERE)
ALONE = [f"ddp-{kind}" for kind in WITHOUT_REFERENCE]
on_every_recipe = pytest.mark.parametrize("name", EVERYWHERE + ALONE)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """Return a function from a case to its result on two processes; one launch runs all cases."""
    results = run_on_two("train_distributed.py", tmp_path_factory)

    def result(case):
        result = results[case]
        error = result.get("error", "") if isinstance(result, dict) else ""
        if "_load_optimizer_and_scheduler" in error and "tagged with cpu:0" in error:
            pytest.skip(f"transformers {transformers.__version__} loads no optimizer on several CPUs")
        assert not error, error
        return result

    return result


@on_everything
@pytest.mark.parametrize("head", ["untied", "tied"])
def test_trains_as_one_process(on_one, on_two, name, head):
    """Compares losses, z0, gradient norms, metrics, token counts and weights."""
    two, one = on_two(f"{name}-{head}"), on_one(f"{name}-{head}")
    assert (two["is_ddp"], two["is_fsdp"]) == (name.startswith("ddp"), name.startswith("fsdp"))
    assert not one["is_ddp"]
    assert not one["is_fsdp"]
    assert_same_run(two, one)
    assert len(one["history"]) == 4
    if "kto" in name:
        assert any(entry["kl"] > 0.05 for entry in one["history"]), "z0 was cut off at 0 throughout"


@pytest.mark.parametrize("name", [*EVERYWHERE, *ALONE, *(f"fsdp-{kind}" for kind in WITHOUT_REFERENCE)])
def test_accumulates_as_one_process(on_one, on_two, name):
    """The last step has one batch where the others have two."""
    assert_same_run(on_two(f"{name}-accumulated"), on_one(f"{name}-accumulated"))


@on_everything
def test_the_copy_that_is_the_reference_is_that_of_one_process(on_one, on_two, name):
    two = on_two(f"{name}-copied reference")
    assert two["history"][0]["rewards/chosen"] == 0
    assert_same_run(two, on_one(f"{name}-copied reference"))


@on_everything
@pytest.mark.parametrize("reference", ["lora", "lora off"])
def test_adapters_train_as_in_one_process(on_one, on_two, name, reference):
    """The reference is a copy of the adapter, so that rewards start at 0, or the model with its adapters off."""
    pytest.importorskip("peft", reason="peft is not installed: no adapters")
    two = on_two(f"{name}-{reference}")
    assert (two["history"][0]["rewards/chosen"] == 0) == (reference == "lora")
    assert_same_run(two, on_one(f"{name}-{reference}"))
    for key, values in two["weights"].items():
        if "ref" in key.split("."):
            assert values == on_one(f"{name}-{reference}")["weights"][key], "the copy was trained"


@on_everything
def test_a_stopped_run_of_adapters_resumes_to_the_bit(on_two, name):
    pytest.importorskip("peft", reason="peft is not installed: no adapters")
    runs = on_two(f"{name}-lora resumed")
    assert runs["resumed"] == runs["whole"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_vision_language_model_trains_on_text_as_in_one_process(on_one, on_two, kind):
    two = on_two(f"ddp-{kind}-vision")
    assert two["is_ddp"]
    assert len(two["history"]) == 4
    assert_same_run(two, on_one(f"ddp-{kind}-vision"))


@pytest.mark.parametrize("kind", KINDS)
def test_filling_a_cache_moves_no_dropout(on_two, kind):
    computed, found, live = on_two(f"ddp-{kind}-dropout")
    assert found == computed == live


@on_everything
def test_bf16_rounds_policy_and_reference_alike(on_one, on_two, name):
    two, one = on_two(f"{name}-bf16"), on_one(f"{name}-bf16")
    first = two["history"][0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    assert_near(two["history"], one["history"], tolerance=5e-2)


@pytest.mark.parametrize(
    "case",
    [
        f"{wrapper}-{setting}"
        for wrapper in WRAPPERS
        for setting in (
            "dpo-logits",
            "dpo-random",
            "dpo-simpo",
            "kto-checkpointed",
            "kto-bco",
            "sft-lora",
            "reward-lora",
        )
    ]
    + ["ddp-kto-used", "ddp-sft-packed", "ddp-dpo-objectives"],
)
def test_other_settings_train_as_one_process(on_one, on_two, case):
    """The cases: loss from logits, random order, no reference, checkpointed layers, no search for unused parameters,
    adapters without a reference, packed rows.
    """
    assert_same_run(on_two(case), on_one(case))


@on_every_recipe
def test_a_stopped_run_resumes_to_the_bit(on_two, name):
    runs = on_two(f"{name}-resumed")
    assert runs["resumed"] == runs["whole"]
    assert len(runs["whole"]["history"]) == 2


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_all_processes_refuse_a_damaged_checkpoint_and_agree_on_an_older_one(on_two, wrapper):
    runs = on_two(f"{wrapper}-damaged")
    first, second = runs["errors"]
    assert first == second
    assert "checkpoint-4/rng_state_1.pth is missing" in first
    assert runs["resumed"] == runs["whole"]


def test_all_processes_are_refused_a_folder_that_another_run_has_locked(on_two):
    first, second = on_two("ddp-locked")
    assert first == second
    assert "another run writes into" in first


@pytest.mark.parametrize("where", FAILURES)
def test_where_one_process_fails_to_write_all_end_with_its_error(on_two, where):
    """Without its error the others would wait for it: until the launcher ends them, or on other nodes for half an hour.

    The failures: while a checkpoint is made, as data are prepared, as a cache is made, as the results are written.
    """
    first, second = on_two("ddp-failures")[where]
    assert first == second
    assert "No space left on device" in first
    is_checkpoint = where in ("begin", "model", "state", "end")
    assert first.startswith("CheckpointError" if is_checkpoint else "OSError")
    assert ("start again, because there is no earlier checkpoint" in first) == is_checkpoint


def test_processes_that_train_something_else_than_the_first_one_are_refused(on_two):
    for (first, second), differs in zip(
        on_two("ddp-others"), ("train_data: 20 examples", "learning_rate: 1.5"), strict=True
    ):
        assert first == second
        assert f"process 1 does not train what process 0 trains ({differs}" in first


def test_processes_with_disks_of_their_own_agree_on_the_best_checkpoint_and_resume_from_none_of_them(on_two):
    found = on_two("ddp-own disks")
    assert found["best"] == ["run/checkpoint-1", "run/checkpoint-1"]
    first, second = found["resumed"]
    assert first == second
    assert "process 1 does not find run/checkpoint-1 on its disk: put output_dir on a disk" in first


@on_every_recipe
def test_an_evaluation_counts_no_row_twice(on_one, on_two, name):
    """9 rows: one of the last batches is not full and one is empty; accelerate fills them with repeated rows."""
    assert_near(on_two(f"{name}-evaluated"), on_one(f"{name}-evaluated"))


@on_everything
def test_precomputed_references_are_those_of_one_process(on_one, on_two, name):
    (computed, found, live), (on_its_own, _, _) = on_two(f"{name}-precomputed"), on_one(f"{name}-precomputed")
    assert computed["passes"] == on_its_own["passes"] > 0
    assert found["passes"] == 0
    assert found["history"] == computed["history"]
    assert_same_run(computed, live)
    assert_same_run(computed, on_its_own)


def test_processes_compute_references_together_where_one_has_lost_them(on_two):
    computed, found, lost = on_two("ddp-dpo-two disks")
    assert computed == lost > 0
    assert found == 0


def test_a_last_batch_too_small_for_all_processes_is_filled_with_the_first_rows(on_one, on_two):
    """accelerate does this: of 14 rows in batches of 4, the last step takes rows 12, 13, 0 and 1."""
    assert_same_run(on_two("ddp-dpo-repeated"), on_one("ddp-dpo-repeated"))


def test_batch_mean_is_refused_for_the_parts_of_two_processes(on_two):
    words = "reference_point='batch_mean' couples a batch that lies in several parts: 2 processes"
    assert words in on_two("ddp-kto-batch_mean")


def test_losses_of_a_whole_batch_are_refused_where_it_lies_in_parts(on_two):
    assert "reads the whole batch, which would lie in 2 parts: 2 processes" in on_two("ddp-dpo-aot")
    said = "has one loss for a whole batch, and in 2 processes the last batch may hold examples twice"
    assert said in on_two("ddp-dpo-orpo evaluated")


def test_two_processes_answer_prompts_as_one_does(on_one, on_two):
    two, one = on_two("ddp-dpo-sampled"), on_one("ddp-dpo-sampled")
    rows = one["samples"]["rows"]
    assert two["samples"] == one["samples"]
    assert two["kept"] == one["kept"] == [row["before"] for row in rows]
    assert all(row["before"] != row["after"] for row in rows)
    assert_same_run(two, one)
    assert "sample_prompts has no meaning with FSDP or DeepSpeed" in on_two("fsdp-dpo-sampled")


def test_adapters_under_fsdp_are_not_precomputed(on_two):
    pytest.importorskip("peft", reason="peft is not installed: no adapters")
    assert "precompute_ref_log_probs with adapters under FSDP: leave it out" in on_two("fsdp-dpo-lora precomputed")
