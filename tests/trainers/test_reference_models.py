"""Which model is the reference: a given one, a copy, the base model; which ones are refused."""

import math

import pytest
import torch
from tiny_training import assert_near, by_kind, history, lora_config, make_trainer, model, weights
from transformers import Trainer

pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")


@by_kind
def test_frozen_weights_of_an_adapter_stay_frozen_whatever_the_reference_is(tmp_path, kind):
    """As with a reference model of its own, also after an evaluation or precomputing before the first step."""
    peft = pytest.importorskip("peft", reason="peft is not installed: no adapters")
    precomputed = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache")}
    histories = []

    def adapted():
        torch.manual_seed(3)
        policy = peft.get_peft_model(model(), lora_config())
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_("lora_B" in name)
        return policy

    # the first run with precomputed values computes them, the second reads them
    for settings in ({"ref_model": adapted()}, {}, {"evaluation": 4}, precomputed, precomputed):
        policy = adapted()
        trainer = make_trainer(kind, tmp_path, policy=policy, **settings)
        if "evaluation" in settings:
            trainer.evaluate()
        start = weights(trainer)
        trainer.train()
        changed = {name for name, tensor in weights(trainer).items() if not tensor.equal(start[name])}
        with_gradient = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
        assert changed == with_gradient == {name for name in start if "lora_B.default" in name}
        histories.append([entry for entry in history(trainer) if "loss" in entry])
    for entries in histories[1:]:
        # precomputing rounds differently, so the first margins are not 0, and their signs are noise
        assert_near(entries, histories[0], but=("rewards/accuracies",))


@by_kind
@pytest.mark.parametrize("lora", [None, "peft_config", "PeftModel"])
def test_without_a_reference_model_it_is_the_model_before_its_first_step(tmp_path, kind, lora):
    """Without adapters it is a frozen copy; with new adapters the model without them, also with dropout in them."""
    peft = pytest.importorskip("peft") if lora else None

    def run(ref_model):
        policy = model(attention_dropout=0.3)
        torch.manual_seed(3)
        if lora == "PeftModel":
            policy = peft.get_peft_model(policy, lora_config(lora_dropout=0.3, init_lora_weights=True))
        trainer = make_trainer(
            kind,
            tmp_path,
            policy=policy,
            ref_model=ref_model,
            evaluation=5,
            eval_strategy="epoch",
            disable_dropout=False,
            peft_config=lora_config(lora_dropout=0.3, init_lora_weights=True) if lora == "peft_config" else None,
        )
        trainer.train()
        return trainer

    own, given = run(None), run(model(attention_dropout=0.3))
    assert history(own) == history(given)
    assert (own.ref_model is None) == (lora is not None)
    start = model().state_dict()
    for name, tensor in given.ref_model.state_dict().items():
        assert tensor.equal(start[name])
    if lora is None:
        assert not any(parameter.requires_grad for parameter in own.ref_model.parameters())
        assert all(tensor.equal(start[name]) for name, tensor in own.ref_model.state_dict().items())
        assert not all(tensor.equal(start[name]) for name, tensor in weights(own).items())


def test_simpo_has_no_reference(tmp_path, ref_passes):
    trainer = make_trainer("dpo", tmp_path, loss_type="simpo")
    trainer.train()
    assert trainer.ref_model is None
    assert ref_passes() == 0
    with pytest.raises(ValueError, match="ref_model is given, but loss_type='simpo' has no reference"):
        make_trainer("dpo", tmp_path, loss_type="simpo", ref_model=model(seed=1))


@by_kind
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_the_base_under_adapters_that_replaced_its_weights_is_no_reference(tmp_path, kind, init):
    """With its adapters off, such a model is not the original one. The default reference equals the policy at first;
    the original model, given as ref_model, does so to rounding.
    """
    pytest.importorskip("peft", reason="peft is not installed: no adapters")
    adapters = {"peft_config": lora_config(init_lora_weights=init)}
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' changes the weights.*as ref_model"):
        make_trainer(kind, tmp_path, reference="base", **adapters)
    for ref_model in (None, model()):
        trainer = make_trainer(kind, tmp_path, ref_model=ref_model, max_steps=1, learning_rate=0.0, **adapters)
        trainer.train()
        assert history(trainer)[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5 if ref_model else 0)


@by_kind
def test_the_base_with_repeated_layers_is_no_reference(tmp_path, kind):
    pytest.importorskip("peft", reason="peft is not installed: no adapters")
    with pytest.raises(ValueError, match=r"layer_replication repeats layers.*as ref_model"):
        make_trainer(kind, tmp_path, reference="base", peft_config=lora_config(layer_replication=[(0, 2), (1, 2)]))


@by_kind
@pytest.mark.parametrize("part", ["embed_tokens", "all"])
def test_a_reference_that_shares_what_is_trained_is_refused(tmp_path, kind, part):
    policy, reference = model(), model(seed=1)
    if part == "all":
        reference.model = policy.model
    else:
        reference.model.embed_tokens = policy.model.embed_tokens
    with pytest.raises(ValueError, match=r"ref_model holds weights that are to be trained \(\d+, model.embed_tokens"):
        make_trainer(kind, tmp_path, policy=policy, ref_model=reference)


def test_the_base_that_peft_put_an_adapter_into_is_no_reference(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: no adapters")
    base = model()
    with pytest.raises(ValueError, match=r"ref_model holds weights that are to be trained.*lora_A"):
        make_trainer("dpo", tmp_path, policy=peft.get_peft_model(base, lora_config()), ref_model=base)


@by_kind
@pytest.mark.parametrize("beside", ["biases", "embeddings"])
def test_weights_trained_beside_adapters_need_a_reference_of_their_own(tmp_path, kind, beside):
    peft = pytest.importorskip("peft", reason="peft is not installed: no adapters")

    def run(ref_model):
        start = model(attention_bias=True)
        policy = peft.get_peft_model(start, lora_config(bias="all" if beside == "biases" else "none"))
        if beside == "embeddings":
            start.get_input_embeddings().requires_grad_(True)
        trainer = make_trainer(kind, tmp_path, policy=policy, ref_model=ref_model)
        trainer.train()
        return trainer

    with pytest.raises(ValueError, match=r"model trains weights beside its adapters \(\d+, base_.*: pass ref_model"):
        run(None)
    assert math.isfinite(history(run(model(attention_bias=True)))[-1]["loss"])
    whole = lora_config(modules_to_save=["embed_tokens"])  # PEFT switches these off together with the adapters
    assert make_trainer(kind, tmp_path, peft_config=whole).ref_model is None


def test_a_reference_model_with_a_device_map_is_not_moved(tmp_path, monkeypatch):
    """Quantized models have one, and cannot be moved."""
    ref_model = model(seed=1)
    ref_model.hf_device_map = {"": "cpu"}
    moved = []
    monkeypatch.setattr(Trainer, "_move_model_to_device", lambda self, model, device: moved.append(model))
    trainer = make_trainer("dpo", tmp_path, ref_model=ref_model)
    assert moved == [trainer.model]
