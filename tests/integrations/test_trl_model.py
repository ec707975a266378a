"""A fused model returns what TRL's own calls ask for, and costs no more than this package's losses."""

from pathlib import Path

import pytest

pytest.importorskip("trl", reason="TRL is not installed: nothing to fuse")

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from trl_cases import (
    HIDDEN,
    VERSION,
    VOCAB,
    DPOTrainer,
    KTOTrainer,
    assert_no_log_ratio,
    batch,
    both_trainers,
    equal_trainer,
    experts,
    make_trainer,
    model,
    since_1_14,
    since_1_15,
    steps,
)

from kto_fused.integrations import trl_preference
from kto_fused.integrations.trl import fuse

pytestmark = pytest.mark.usefixtures("small_machine")


@since_1_15
@pytest.mark.parametrize("make_policy", ["llama", "experts"])
@pytest.mark.parametrize("layout", ["labels", "shift_labels", "num_items_in_batch"])
def test_every_field_of_trls_output_is_returned(tmp_path, make_policy, layout):
    policy = model(experts=make_policy == "experts")
    trainer = make_trainer(DPOTrainer, tmp_path, policy=policy)
    inputs = batch()
    if layout == "shift_labels":
        inputs["shift_labels"] = inputs.pop("labels").roll(-1, 1)
    elif layout == "num_items_in_batch":
        inputs["num_items_in_batch"] = torch.tensor(7)

    def answers():
        policy.zero_grad()
        output = policy(**inputs, fused_lm_head=True)
        weights = torch.randn(output.log_probs.shape, generator=torch.Generator().manual_seed(5))
        (output.loss + (weights * output.log_probs).sum()).backward()
        return output, {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    own, own_grads = answers()
    fuse(trainer)
    output, grads = answers()
    assert list(output) == [*own, "outcome"]
    for name in own:
        torch.testing.assert_close(output[name], own[name], rtol=2e-5, atol=5e-6)
        assert output[name].requires_grad == own[name].requires_grad, name
    assert grads.keys() == own_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, own_grads[name], rtol=1e-4, atol=1e-5)


@since_1_15
def test_a_gradient_by_the_entropy_is_an_error_not_zero(tmp_path):
    trainer = fuse(make_trainer(DPOTrainer, tmp_path))
    output = trainer.model(**batch(), fused_lm_head=True)
    with pytest.raises(RuntimeError, match="entropy of a fused trainer has no gradient"):
        (output.log_probs.sum() + output.entropy.sum()).backward()


def test_without_fused_lm_head_the_model_is_what_it_was(tmp_path):
    policy, inputs = model(), batch()
    own_logits = policy(**inputs).logits
    trainer = fuse(make_trainer(DPOTrainer, tmp_path, policy=policy))
    assert torch.equal(trainer.model(**inputs).logits, own_logits)
    assert trainer.model.generate(inputs["input_ids"], max_new_tokens=2, pad_token_id=1).shape == (3, 11)


# ---- costs ----------------------------------------------------------------------------------------------------------


def lm_head_gemms(folder: Path, kind: type, **arguments) -> float:
    """Return how many GEMMs of 2 N H V operations a policy's forward and backward take: the part that grows with V."""
    operations = []
    for vocab in (VOCAB, 2 * VOCAB):
        policy = model(vocab=vocab)
        trainer = fuse(make_trainer(kind, folder, policy=policy, precompute_ref_log_probs=True, **arguments))
        trainer.model.train()
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        with FlopCounterMode(display=False) as counter:
            trainer.compute_loss(trainer.model, inputs).backward()
        operations.append(counter.get_total_flops())
    tokens = int(inputs["completion_mask"][:, 1:].sum())
    return (operations[1] - operations[0]) / (2 * tokens * HIDDEN * VOCAB)


@since_1_14
def test_the_whole_loss_takes_three_gemms_and_log_probabilities_four(tmp_path):
    assert lm_head_gemms(tmp_path, KTOTrainer, loss_type="apo_zero_unpaired") == 3
    assert lm_head_gemms(tmp_path, DPOTrainer) == 3
    assert lm_head_gemms(tmp_path, DPOTrainer, loss_type=["exo_pair", "sft"], label_smoothing=0.1) == 3
    assert lm_head_gemms(tmp_path, DPOTrainer, ld_alpha=0.5) == 3
    if VERSION >= (1, 15):
        assert lm_head_gemms(tmp_path, DPOTrainer, loss_weights=[-1.0]) == 4
    assert lm_head_gemms(tmp_path, DPOTrainer, own_reference=False, lora=True) == 2


class HostReads(TorchFunctionMode):
    """Counts the calls that make the host wait for a device."""

    READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "cpu", "numpy")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in self.READS
        return function(*args, **(kwargs or {}))


@since_1_14
@both_trainers
def test_all_logged_values_are_read_with_one_wait_for_the_device(tmp_path, kind, monkeypatch):
    settings = {"loss_type": "apo_zero_unpaired"} if kind is KTOTrainer else {}
    trainer = fuse(make_trainer(kind, tmp_path, precompute_ref_log_probs=True, **settings))
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    counts = []
    for log in (trl_preference._log, lambda *_: None):
        monkeypatch.setattr(trl_preference, "_log", log)
        with HostReads() as reads:
            trainer.compute_loss(trainer.model, inputs)
        counts.append(reads.count)
    assert counts[0] == counts[1] + 1


@since_1_15
@both_trainers
def test_with_a_router_loss_both_policy_and_reference_get_the_mask(tmp_path, kind, attention_masks):
    """The router loss of the policy needs the mask. The reference gets it too: both run the same attention kernel."""

    def make_policy():
        policy = experts()
        policy.config.output_router_logits = False  # TRL passes an argument for it, to the policy only
        return policy

    trainer = fuse(equal_trainer(kind, tmp_path, make_policy=make_policy, router_aux_loss_coef=0.1))
    attention_masks.clear()  # forget those of the checks in fuse
    logs = steps(trainer).logs
    assert logs[0]["aux_loss"] > 0
    assert attention_masks
    assert all(mask is not None for mask in attention_masks)
    assert_no_log_ratio(logs[0])


@both_trainers
@pytest.mark.parametrize(
    "batches", ["trls", "of another collator", "of a patched collator", *trl_preference.MAKES_BATCHES]
)
def test_attention_gets_no_mask_for_the_padding_of_trls_collators(tmp_path, kind, batches, attention_masks):
    subclass = None
    if batches in trl_preference.MAKES_BATCHES:  # the user's method may pad on the left
        subclass = type("MyTrainer", (kind,), {batches: lambda self, *args: getattr(kind, batches)(self, *args)})
    trainer = fuse(make_trainer(kind, tmp_path, max_steps=1, subclass=subclass))
    collator = trainer.data_collator
    if batches == "of another collator":  # it may pad on the left

        class Collator(type(collator)):
            pass

        trainer.data_collator = Collator(collator.pad_token_id)
    elif batches == "of a patched collator":
        collator.torch_call = type(collator).torch_call.__get__(collator)
    batch = next(iter(trainer.get_train_dataloader()))
    assert not batch["attention_mask"].all()
    attention_masks.clear()  # forget those of the checks in fuse
    trainer.train()
    assert attention_masks
    assert all((mask is None) == (batches == "trls") for mask in attention_masks)
