"""Every kernel, compiled for real GPUs on any machine: registers, spills, instructions, and variants per length."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kto_fused.kernels import register_tiles

SCRIPT = Path(__file__).with_name("ahead_of_time.py")
NVIDIA = ["sm_80", "sm_90", "sm_100"]


@pytest.fixture(scope="module")
def reports():
    """The report of ``ahead_of_time.py`` for each target, from one subprocess each, since the interpreter must be off
    where kernels are compiled.

    TRITON_DEFAULT_FP_FUSION=0 is announced as the default of Triton 3.10: a launch must ask for fusion by itself.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "0"
    processes = {
        target: subprocess.Popen(
            [sys.executable, str(SCRIPT), target],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for target in (*NVIDIA, "gfx942")
    }
    results = {}
    for target, process in processes.items():
        output, errors = process.communicate()
        assert process.returncode == 0, f"{target}: {errors}"
        results[target] = json.loads(output)
    return results


def kernels(report, prefix: str = "") -> list[dict]:
    return [entry for entry in report["kernels"] if entry["kernel"].startswith(prefix)]


@pytest.mark.parametrize("target", [*NVIDIA, "gfx942"])
def test_every_kernel_compiles(reports, target):
    compiled = {entry["kernel"] for entry in kernels(reports[target])}
    of_hopper = {
        "start_rows_kernel",
        "fold_register_tiles_kernel",
        "merge_register_tiles_kernel",
        "keep_register_tiles_kernel",
    }
    assert compiled == (of_hopper if target == "sm_90" else set()) | {
        "token_logprobs_kernel",
        "combine_splits_kernel",
        "token_logprobs_backward_kernel",
        "sequence_kernel",
        "sequence_backward_kernel",
        "kto_kernel",
        "dpo_kernel",
        "fold_tile_kernel",
        "keep_tile_kernel",
        "settle_rows_kernel",
        "finish_rows_kernel",
        "add_target_rows_kernel",
        "move_rows_kernel",
        "scale_kernel",
        "gae_kernel",
    }


@pytest.mark.parametrize("target", [*NVIDIA, "gfx942"])
def test_every_launch_asks_for_fused_multiply_add(reports, target):
    assert all(entry["fuses_multiply_add"] for entry in kernels(reports[target]))


def test_no_spills_on_sm_90(reports):
    for entry in kernels(reports["sm_90"]):
        assert (entry["stack"], entry["local"]) == (0, 0), entry


def test_row_kernels_read_and_write_16_bytes_at_a_time_on_sm_90(reports):
    """In every dtype, where rows are aligned. Narrower loads are a row's few scalars, never its columns."""
    for entry in kernels(reports["sm_90"], "token_logprobs"):
        if "ALIGNED=True" not in entry["variant"]:
            continue
        assert entry["loads"]["LDG.E.128"] >= 2, entry
        scalars = 12 if "PACKED=True" in entry["variant"] else 5  # packed rows search for their sequence
        assert sum(entry["loads"].values()) - entry["loads"]["LDG.E.128"] <= scalars, entry
        if "backward" in entry["kernel"]:
            assert entry["stores"] == ["STG.E.128"], entry


def test_row_kernels_leave_room_for_eight_blocks_per_multiprocessor(reports):
    """65,536 registers over 8 blocks of 128 threads are 64 per thread. The variants that training uses need no more."""
    for entry in kernels(reports["sm_90"], "token_logprobs"):
        if "ALIGNED=True" in entry["variant"] and "COMPUTE=fp32" in entry["variant"]:
            assert entry["registers"] <= 64, entry


def test_one_compiled_kernel_serves_every_length(reports):
    """Batches of so few rows that a row is split have one more variant."""
    for target in NVIDIA:
        for vocab, variants in reports[target]["variants_per_length"].items():
            assert variants["many rows"] == dict.fromkeys(variants["many rows"], 1), (target, vocab, variants)
            assert variants["few rows"] == {"token_logprobs_kernel": 1, "combine_splits_kernel": 1}, (target, vocab)
    # on AMD, Triton addresses tensors over 2 GiB in another way, which takes one more variant
    for vocab, variants in reports["gfx942"]["variants_per_length"].items():
        assert max(variants["many rows"].values()) <= 2, (vocab, variants)


def test_from_hidden_states_one_length_compiles_the_kernels_for_all(reports):
    for target in NVIDIA:
        after_one, after_several = reports[target]["variants_of_hidden_lengths"]
        assert after_one == after_several, target


def test_one_compiled_scan_serves_every_length_and_alignment(reports):
    assert [report["variants_of_gae_lengths"] for report in reports.values()] == [1] * len(reports)


def test_tile_kernels_read_16_bytes_and_write_8_at_a_time_on_sm_90(reports):
    for entry in kernels(reports["sm_90"], "fold_tile_kernel"):
        assert entry["loads"]["LDG.E.128"] >= 6, entry
        assert ("STG.E.64" in entry["stores"]) == ("KEEP=True" in entry["variant"]), entry
        assert "STG.E.U16" not in entry["stores"], entry


def test_the_kernels_that_fold_in_registers_multiply_by_warp_groups_on_sm_90(reports):
    """They also copy ahead of their multiplications, within the shared memory of a multiprocessor of that GPU."""
    fold, keep = (kernels(reports["sm_90"], f"{name}_register_tiles") for name in ("fold", "keep"))
    # three hidden sizes, with and without a bias; a fold with and without keeping P, and of one size with squares
    assert (len(fold), len(keep)) == (16, 6)
    for entry in fold + keep:
        assert entry["warp_group_products"] >= 4, entry
        assert 128 * 2**10 < entry["shared_memory"] <= 227 * 2**10, entry
        is_kept = entry in keep or "KEEP=True" in entry["variant"]
        assert ("STG.E.128" in entry["stores"]) == is_kept, entry


def test_a_logit_costs_few_instructions_after_its_product_on_sm_90(reports):
    """Instructions per logit of a thread, during which its multiprocessor multiplies nothing."""
    logits = register_tiles.ROWS * register_tiles.COLUMNS / (32 * register_tiles.NUM_WARPS)
    for name, limit in (("fold", 14), ("keep", 9)):
        for entry in kernels(reports["sm_90"], f"{name}_register_tiles"):
            squares = 3 * ("SQUARES=True" in entry["variant"])
            assert 1 < entry["instructions_after_product"] / logits <= limit + squares, entry


def test_squares_are_compiled_into_the_forward_kernels_alone_and_only_where_asked(reports):
    for target, report in reports.items():
        with_squares = {entry["kernel"] for entry in kernels(report) if "SQUARES=True" in entry["variant"]}
        of_hopper = {f"{name}_kernel" for name in ("start_rows", "fold_register_tiles", "merge_register_tiles")}
        assert with_squares == (of_hopper if target == "sm_90" else set()) | {
            "token_logprobs_kernel",
            "combine_splits_kernel",
            "sequence_kernel",
            "fold_tile_kernel",
            "finish_rows_kernel",
        }


def test_grids_use_the_one_dimension_that_holds_2_to_the_31_programs(reports):
    for target in (*NVIDIA, "gfx942"):
        grids = reports[target]["grids"]
        assert max(grid[0] for grid in grids) > 65_535
        assert all(len(grid) == 1 and grid[0] < 2**31 for grid in grids)
