"""Collators pad tokenized examples to batches, and give labels to the trained tokens alone."""

# ruff: noqa: E402 (the imports below need datasets)

import pytest
import torch

datasets = pytest.importorskip("datasets", reason="datasets is not installed: there is no data to prepare")

pytestmark = pytest.mark.usefixtures("own_cache")

from kto_fused.preference_data import BUNDLED, PairedCollator, UnpairedCollator, load, prepare_unpaired


def test_unpaired_examples_are_padded_with_their_mismatched_completions():
    examples = [
        {"prompt_ids": [5, 6], "completion_ids": [7], "kl_completion_ids": [8, 9], "label": True, "length": 3},
        {"prompt_ids": [4], "completion_ids": [3, 2, 1], "kl_completion_ids": [], "label": False, "length": 4},
    ]
    batch = UnpairedCollator(pad_token_id=0)(examples)
    expected = {
        "input_ids": [[5, 6, 7, 0], [4, 3, 2, 1]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
        "labels": [[-100, -100, 7, -100], [-100, 3, 2, 1]],
        "kl_input_ids": [[5, 6, 8, 9], [4, 0, 0, 0]],
        "kl_attention_mask": [[1, 1, 1, 1], [1, 0, 0, 0]],
        "kl_labels": [[-100, -100, 8, 9], [-100, -100, -100, -100]],
        "desirable": [True, False],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert batch.pop("desirable").dtype == torch.bool
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_reference_log_probabilities_stay_float64_in_an_unpaired_batch():
    example = {"prompt_ids": [5], "completion_ids": [7], "label": 1, "ref_logps": -1.5, "ref_kl_logps": -2.0}
    batch = UnpairedCollator(pad_token_id=3, pad_to_multiple_of=8)([example, example])
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "desirable", "ref_logps", "ref_kl_logps"}
    assert batch["input_ids"].tolist() == [[5, 7] + [3] * 6] * 2
    assert batch["desirable"].tolist() == [True, True]
    for name, value in (("ref_logps", -1.5), ("ref_kl_logps", -2.0)):
        assert batch[name].dtype == torch.float64
        assert batch[name].tolist() == [value, value]


def test_pairs_are_padded_with_chosen_before_rejected():
    examples = [
        {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9], "length": 4},
        {"prompt_ids": [4], "chosen_ids": [3], "rejected_ids": [2], "length": 2},
    ]
    batch = PairedCollator(pad_token_id=0)(examples)
    expected = {
        "input_ids": [[[5, 6, 7, 0], [5, 6, 8, 9]], [[4, 3, 0, 0], [4, 2, 0, 0]]],
        "attention_mask": [[[1, 1, 1, 0], [1, 1, 1, 1]], [[1, 1, 0, 0], [1, 1, 0, 0]]],
        "labels": [[[-100, -100, 7, -100], [-100, -100, 8, 9]], [[-100, 3, -100, -100], [-100, 2, -100, -100]]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    logps = [{"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}, {"ref_chosen_logps": 0, "ref_rejected_logps": -4}]
    batch = PairedCollator(0, pad_to_multiple_of=3)(
        [example | more for example, more in zip(examples, logps, strict=True)]
    )
    assert batch["input_ids"].shape == (2, 2, 6)
    assert batch["ref_logps"].tolist() == [[-1, -2], [0, -4]]
    assert batch["ref_logps"].dtype == torch.float64


def test_tokens_that_a_mask_leaves_out_have_no_label():
    example = {"prompt_ids": [5], "completion_ids": [7, 8, 9], "completion_mask": [True, False, True], "label": True}
    example |= {"kl_completion_ids": [6, 4], "kl_completion_mask": [False, True]}
    other = {**example, "completion_ids": [3], "completion_mask": [True], "kl_completion_ids": []}
    batch = UnpairedCollator(pad_token_id=0)([example, other | {"kl_completion_mask": []}])
    assert batch["labels"].tolist() == [[-100, 7, -100, 9], [-100, 3, -100, -100]]
    assert batch["kl_labels"].tolist() == [[-100, -100, 4], [-100, -100, -100]]
    assert batch["input_ids"].tolist() == [[5, 7, 8, 9], [5, 3, 0, 0]]
    pair = {"prompt_ids": [5], "chosen_ids": [7, 8], "chosen_mask": [False, True], "rejected_ids": [9]}
    batch = PairedCollator(pad_token_id=0)([pair | {"rejected_mask": [True]}])
    assert batch["labels"].tolist() == [[[-100, -100, 8], [-100, 9, -100]]]


@pytest.mark.parametrize("collator", [UnpairedCollator, PairedCollator])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pad_token_id": None}, "pad_token_id must be an int, got NoneType"),
        ({"pad_token_id": -1}, "pad_token_id must be at least 0, got -1"),
        ({"pad_token_id": 0, "pad_to_multiple_of": 0}, "pad_to_multiple_of must be at least 1, got 0"),
        ({"pad_token_id": 0, "pad_to_multiple_of": True}, "pad_to_multiple_of must be an int, got bool"),
    ],
)
def test_a_bad_padding_option_is_refused(collator, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        collator(**arguments)


def test_the_bundled_feedback_fills_batches(byte_pairs):
    dataset = prepare_unpaired(BUNDLED, byte_pairs).dataset
    batch = UnpairedCollator(byte_pairs.pad_token_id)([dataset[row] for row in range(8)])
    assert batch["input_ids"].shape == (8, max(dataset["length"][:8]))
    for prefix in ("", "kl_"):
        scored = batch[f"{prefix}labels"] != -100
        assert scored.any(dim=1).all()
        assert torch.equal(batch[f"{prefix}labels"][scored], batch[f"{prefix}input_ids"][scored])
    record = load(BUNDLED)[0]
    whole = byte_pairs(record["prompt"] + record["completion"] + "</s>")["input_ids"]
    assert batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist() == whole
