"""The reference of a model with adapters: the policy as it was before training, and the log message that names it."""

import logging
import re

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import StopAt, history, make_trainer, model

from kto_fused.trainers import adapters

peft = pytest.importorskip("peft", reason="peft is not installed: no adapters")

LN_2 = 0.693147
LAYERS = {"target_modules": ["q_proj", "v_proj"]}
ADAPTERS = {
    "LoRA": lambda: peft.LoraConfig(r=2, **LAYERS),
    "LoRA with ranks of its own": lambda: peft.LoraConfig(r=2, rank_pattern={"q_proj": 3}, **LAYERS),
    "LoRA with a whole embedding and head": lambda: peft.LoraConfig(
        r=2, modules_to_save=["embed_tokens", "lm_head"], **LAYERS
    ),
    "LoRA with tokens": lambda: peft.LoraConfig(r=2, trainable_token_indices=[3, 4, 5], **LAYERS),
    "LoRA of an embedding": lambda: peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "DoRA": lambda: peft.LoraConfig(r=2, use_dora=True, **LAYERS),
    "PiSSA": lambda: peft.LoraConfig(r=2, init_lora_weights="pissa", **LAYERS),
    "OLoRA": lambda: peft.LoraConfig(r=2, init_lora_weights="olora", **LAYERS),
    "repeated layers": lambda: peft.LoraConfig(r=2, layer_replication=[(0, 2), (1, 2)], **LAYERS),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=2, target_r=2, total_step=9, orth_reg_weight=0.0, **LAYERS),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": lambda: peft.LoHaConfig(r=2, **LAYERS),
    "VeRA": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]),
}
pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")


def disturb(policy, adapter: str | None = None, seed: int = 3):
    """Add noise to the trained weights, or to one adapter by its name, as if they had been trained before."""
    torch.manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad if adapter is None else f".{adapter}" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return policy


def adapted(config=ADAPTERS["LoRA"], **settings):
    """Return a policy whose adapter an earlier run has trained."""
    torch.manual_seed(5)
    return disturb(peft.get_peft_model(model(**settings), config()))


def train(kind, folder, policy, **settings):
    trainer = make_trainer(kind, folder, policy=policy, **settings)
    trainer.train()
    return trainer


def logged_reference(caplog) -> str:
    (message,) = [record.getMessage() for record in caplog.records if "reference is" in record.getMessage()]
    return message


# ---- a frozen copy ----


@pytest.mark.parametrize(
    ("kind", "adapter"), [*(("dpo", name) for name in ADAPTERS), ("kto", "LoRA"), ("kto", "LoRA with tokens")]
)
def test_training_starts_at_the_reference_whatever_the_adapter_holds(tmp_path, kind, adapter):
    """Rewards and kl are exactly 0, so the first DPO loss is ln 2. Training does not change the reference."""
    policy = adapted(ADAPTERS[adapter])
    trainer = make_trainer(kind, tmp_path, policy=policy, train=8, max_steps=2)
    start = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    trainer.train()
    first = history(trainer)[0]
    if kind == "dpo":
        assert first["loss"] == pytest.approx(LN_2, abs=1e-6)
        assert first["rewards/margins"] == 0
    else:
        assert first["loss"] == 0.5
        assert first["kl"] == 0
    assert first["rewards/chosen"] == first.get("rewards/rejected", 0) == 0
    assert trainer._reference.adapters.names == trainer._reference.adapters.copies == ("ref",)
    changed = {name for name, tensor in policy.state_dict().items() if not tensor.equal(start[name])}
    assert changed
    assert not any("ref" in name.split(".") for name in changed)
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    for name, parameter in policy.named_parameters():
        if "ref" in name.split("."):
            assert not parameter.requires_grad
            assert id(parameter) not in held


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("kto", {}),
        ("dpo", {"loss_from": "logits"}),
        ("kto", {"gradient_checkpointing": True}),
        ("dpo", {"bf16": True}),
    ],
)
def test_a_copy_is_as_good_as_a_model_of_its_own(tmp_path, kind, settings):
    """To the bit, with dropout in training and evaluations between steps."""

    def run(ref_model):
        policy = adapted(lambda: peft.LoraConfig(r=2, lora_dropout=0.3, **LAYERS), attention_dropout=0.3)
        settings_of_both = {"disable_dropout": False, "evaluation": 5, "eval_strategy": "steps", "eval_steps": 2}
        return train(kind, tmp_path, policy, ref_model=ref_model, **settings_of_both, **settings)

    assert history(run(None)) == history(run(adapted(attention_dropout=0.3)))


def test_a_copy_has_the_dtype_of_what_is_trained(tmp_path):
    policy = adapted(lambda: peft.LoraConfig(r=2, **LAYERS)).to(torch.bfloat16)
    trainer = train("dpo", tmp_path, policy, train=4)
    copies = [parameter for name, parameter in policy.named_parameters() if "ref" in name.split(".")]
    assert {parameter.dtype for parameter in copies} == {torch.bfloat16}
    assert history(trainer)[0]["rewards/chosen"] == 0


def test_only_the_trained_ones_of_several_active_adapters_are_copied(tmp_path):
    """The frozen adapter serves as its own reference; the one that changes nothing yet needs none."""

    def policy():
        made = adapted()
        made.add_adapter("second", ADAPTERS["LoRA"]())
        made.add_adapter("fresh", ADAPTERS["LoRA"]())
        disturb(made, "second")
        made.base_model.set_adapter(["default", "second", "fresh"])
        for name, parameter in made.named_parameters():
            parameter.requires_grad_("lora_" in name and ".default." not in name)
        return made

    own = train("kto", tmp_path, policy(), train=8)
    assert own._reference.adapters.names == ("default", "ref")
    assert own.model.active_adapters == ["default", "second", "fresh"]
    assert history(own)[0]["rewards/chosen"] == 0
    given = train("kto", tmp_path, policy(), ref_model=policy(), train=8)
    assert history(own) == history(given)


def test_precomputed_with_a_copy_equals_live_to_the_bit_and_belongs_to_that_adapter(tmp_path):
    """The copy's name does not matter. Another adapter on the same model does not get this adapter's cached values."""
    settings = {"train": 6, "per_device_train_batch_size": 1}
    precomputed = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "kept"), **settings}

    def run(seed, **settings):
        return history(train("kto", tmp_path / "out", disturb(adapted(), seed=seed), **settings))

    assert run(1, **precomputed) == run(1, **settings)
    (path,) = (tmp_path / "kept").iterdir()
    assert run(2, **precomputed) == run(2, **settings)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    before = path.stat().st_mtime_ns
    assert run(1, **precomputed) == run(1, **settings)
    assert path.stat().st_mtime_ns == before
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_saved_models_hold_the_trained_adapter_alone(tmp_path):
    policy = adapted()
    trainer = train("dpo", tmp_path / "out", policy, train=8, save_strategy="steps", save_steps=1)
    trainer.save_model(str(tmp_path / "final"))
    folders = [*(tmp_path / "out").glob("checkpoint-*"), tmp_path / "final"]
    assert len(folders) == 3
    for folder in folders:
        assert not (folder / "ref").exists()
        assert not any("ref" in name.split(".") for name in load_file(folder / "adapter_model.safetensors"))
    assert list(policy.peft_config) == ["default", "ref"]  # the copy stays in memory, to evaluate with
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path / "final")
    assert list(loaded.peft_config) == ["default"]
    for name, tensor in loaded.state_dict().items():
        assert tensor.equal(policy.state_dict()[name]), name


@pytest.mark.parametrize("named", [False, True], ids=["copied", "named"])
def test_a_resumed_run_has_the_reference_that_it_began_with(tmp_path, named):
    """The curve is equal to the bit. With a checkpoint's adapter in the model, resuming is refused."""

    def begin(name, policy=None, **settings):
        policy = adapted() if policy is None else policy
        if named:
            policy.add_adapter("reference", ADAPTERS["LoRA"]())
            disturb(policy, "reference", seed=9)
        return make_trainer("kto", tmp_path / name, policy=policy, train=16, logging_steps=1, **settings)

    whole = begin("whole")
    whole.train()
    begin("stopped", callbacks=[StopAt(2)]).train()
    checkpoint = tmp_path / "stopped" / "checkpoint-2"
    resumed = begin("stopped")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert history(resumed) == history(whole)
    if not named:
        begun_anew = peft.PeftModel.from_pretrained(model(), checkpoint, is_trainable=True)
        with pytest.raises(ValueError, match=r"belongs to another run .*reference_weights: adapters"):
            begin("stopped", begun_anew).train(resume_from_checkpoint=str(checkpoint))


def test_adapters_of_a_configuration_are_the_same_when_resumed(tmp_path):
    """New adapters are drawn from the seed alone. One that is not zero at first is the reference too."""

    def begin(name, **settings):
        torch.rand(7)
        config = peft.LoraConfig(r=2, init_lora_weights=False, **LAYERS)
        return make_trainer("dpo", tmp_path / name, peft_config=config, train=16, **settings)

    whole = begin("whole")
    whole.train()
    assert history(whole)[0]["rewards/chosen"] == 0
    begin("stopped", callbacks=[StopAt(2)]).train()
    resumed = begin("stopped")
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-2"))
    assert history(resumed) == history(whole)


def test_all_active_adapters_are_resumed_and_the_best_of_them_loaded(tmp_path):
    def begin(name, **settings):
        policy = adapted()
        policy.add_adapter("second", ADAPTERS["LoRA"]())
        disturb(policy, "second")
        policy.base_model.set_adapter(["default", "second"])
        for parameter_name, parameter in policy.named_parameters():  # PEFT would unfreeze the other weights
            parameter.requires_grad_("lora_B" in parameter_name)
        return make_trainer(
            "dpo", tmp_path / name, policy=policy, train=16, evaluation=4, eval_strategy="epoch", **settings
        )

    whole = begin("whole")
    whole.train()
    begin("stopped", callbacks=[StopAt(2)]).train()
    resumed = begin("stopped")
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-2"))
    assert history(resumed) == history(whole)
    for name, tensor in whole.model.state_dict().items():
        assert tensor.equal(resumed.model.state_dict()[name]), name
    best = begin("best", num_train_epochs=3, save_strategy="epoch", load_best_model_at_end=True)
    best.train()
    found = min(entry["eval_loss"] for entry in history(best) if "eval_loss" in entry)
    assert best.evaluate()["eval_loss"] == found


def test_a_later_trainer_takes_the_policy_as_it_is_then(tmp_path):
    """The earlier trainer refuses to go on, because its reference is gone."""
    policy = adapted()
    first = train("dpo", tmp_path, policy, train=8, evaluation=4)
    second = make_trainer("dpo", tmp_path, policy=policy, train=8, evaluation=4)
    assert list(policy.peft_config) == ["default", "ref"]
    assert second.evaluate()["eval_loss"] == pytest.approx(LN_2, abs=1e-6)
    with pytest.raises(RuntimeError, match="this trainer's reference, was taken out of the model or replaced"):
        first.evaluate()
    make_trainer("dpo", tmp_path, policy=policy, ref_model=model(), train=8)
    assert list(policy.peft_config) == ["default"]
    with pytest.raises(RuntimeError, match="this trainer's reference, was taken out of the model or replaced"):
        second.evaluate()


def test_a_copy_that_the_user_replaced_is_the_users(tmp_path):
    policy = adapted()
    first = train("dpo", tmp_path, policy, train=4, evaluation=4)
    policy.delete_adapter("ref")
    with pytest.raises(RuntimeError, match="adapter 'ref', this trainer's reference, was taken out"):
        first.evaluate()
    policy.add_adapter("ref", ADAPTERS["LoRA"]())
    second = make_trainer("dpo", tmp_path, policy=policy, train=4)
    assert (second._reference.adapters.names, second._reference.adapters.copies) == (("ref",), ())


def test_dropping_copies_leaves_the_model_as_it_was():
    for config in ADAPTERS.values():
        policy = adapted(config)
        before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        assert adapters.copy_adapters(policy, ["default"]) == {"default": "ref"}
        assert len(policy.state_dict()) > len(before)
        adapters.drop_copies(policy)
        assert list(policy.peft_config) == ["default"]
        after = policy.state_dict()
        assert after.keys() == before.keys()
        assert all(tensor.equal(after[name]) for name, tensor in before.items())


# ---- other references ----


@pytest.mark.parametrize("name", ["ref", "reference"])
def test_an_adapter_named_ref_or_reference_is_the_reference(tmp_path, name, caplog):
    def policy(active):
        made = adapted()
        made.add_adapter(name, ADAPTERS["LoRA"]())
        disturb(made, name, seed=7)
        made.set_adapter(active)
        return made

    own = train("kto", tmp_path, policy("default"))
    assert f"its adapter {name!r}, which it came with" in logged_reference(caplog)
    assert history(own) == history(train("kto", tmp_path, policy("default"), ref_model=policy(name)))
    assert history(own)[0]["rewards/chosen"] != 0
    assert list(own.model.peft_config) == ["default", name]


def test_a_trained_adapter_named_ref_is_the_policy(tmp_path):
    torch.manual_seed(5)
    policy = disturb(peft.get_peft_model(model(), ADAPTERS["LoRA"](), adapter_name="ref"))
    trainer = train("dpo", tmp_path, policy)
    assert trainer._reference.adapters.names == ("reference",)
    assert history(trainer)[0]["loss"] == pytest.approx(LN_2, abs=1e-6)


def test_base_is_the_model_with_its_adapters_off(tmp_path, caplog):
    own = train("kto", tmp_path, adapted(), reference="base")
    assert "the model with its adapters off (reference='base')" in logged_reference(caplog)
    assert history(own) == history(train("kto", tmp_path, adapted(), ref_model=model()))
    assert history(own)[0]["rewards/chosen"] != 0
    assert list(own.model.peft_config) == ["default"]


IDENTITIES = ["LoRA", "LoRA with a whole embedding and head", "LoRA with tokens", "LoRA of an embedding", "AdaLoRA"]


@pytest.mark.parametrize("kept", [name for name in ADAPTERS if name not in ("IA3", "LoHa", "VeRA")])
def test_an_adapter_that_changes_nothing_needs_no_copy(kept):
    """That is certain where the adapter adds a product with 0 or holds equal weights. One changed number ends it."""
    torch.manual_seed(5)
    policy = peft.get_peft_model(model(), ADAPTERS[kept]())
    is_identity = kept in IDENTITIES or kept in ("LoRA with ranks of its own", "repeated layers")
    assert adapters.changes_nothing(policy, "default") == is_identity
    if is_identity:
        on = policy(input_ids=torch.arange(8)[None]).logits
        with policy.disable_adapter():
            assert policy(input_ids=torch.arange(8)[None]).logits.equal(on)
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    last = [name for name in trained if "lora_B" in name or "lora_E" in name][-1]
    if "lora_E" in last or "Ada" not in kept:
        with torch.no_grad():
            trained[last].view(-1)[-1] += 1e-6
        assert not adapters.changes_nothing(policy, "default")


def test_a_changed_whole_weight_of_an_adapter_is_noticed():
    for config, name in (("LoRA with a whole embedding and head", "lm_head"), ("LoRA with tokens", "tokens_delta")):
        policy = peft.get_peft_model(model(), ADAPTERS[config]())
        assert adapters.changes_nothing(policy, "default")
        with torch.no_grad():
            (weight,) = [held for key, held in policy.named_parameters() if name in key and held.requires_grad]
            weight[-1, -1] += 1e-6
        assert not adapters.changes_nothing(policy, "default")


SAID = {
    "a model of its own": ({"ref_model": lambda: model(seed=1)}, r"is ref_model, a model of its own\.$"),
    "a copy": ({}, r"is a frozen copy of the model as it is before training\.$"),
    "adapters off": ({"policy": lambda: peft.get_peft_model(model(), ADAPTERS["LoRA"]())}, r"its adapters off \('def"),
    "a copied adapter": ({"policy": adapted}, r"frozen copy of the adapter.*\(adapter 'default' as 'ref'\).*leaves it"),
    "precomputed": (
        {"precompute_ref_log_probs": lambda: True},
        r"as it is before its first step\. Its log-probabilities are computed before training\.$",
    ),
    "none": ({"loss_type": lambda: "simpo"}, None),
}


@pytest.mark.parametrize(("settings", "words"), SAID.values(), ids=SAID.keys())
def test_the_log_says_which_reference_is_used(tmp_path, settings, words, caplog):
    settings = {name: make() for name, make in settings.items()}
    if "precompute_ref_log_probs" in settings:
        settings["ref_cache_dir"] = str(tmp_path / "kept")
    make_trainer("dpo", tmp_path, train=4, **settings)
    found = [record for record in caplog.records if "reference is" in record.getMessage()]
    assert len(found) == (words is not None)
    if words:
        assert found[0].levelno == logging.INFO
        assert re.search(words, found[0].getMessage())


def test_the_log_is_seen_where_no_logging_is_set_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    make_trainer("dpo", tmp_path, train=4)
    make_trainer("dpo", tmp_path, train=4)
    assert capsys.readouterr().err.count("The reference is a frozen copy of the model as it is before training.") == 2
    logging.getLogger("kto_fused").warning("a warning")
    assert capsys.readouterr().err == "a warning\n"


def test_where_no_adapter_is_trained_the_reference_is_the_model_itself(tmp_path, caplog):
    """The log names the option that compares with the base model, which is wanted more often."""
    adapted().save_pretrained(tmp_path / "adapter")

    def evaluate(**settings):
        policy = peft.PeftModel.from_pretrained(model(), tmp_path / "adapter")
        return make_trainer("dpo", tmp_path, policy=policy, train=None, evaluation=4, **settings).evaluate()

    assert evaluate()["eval_rewards/chosen"] == 0
    assert "none of its adapters is trained: all rewards are 0 (reference='base'" in logged_reference(caplog)
    assert evaluate(reference="base")["eval_rewards/chosen"] != 0


# ---- refusals ----


def test_references_that_cannot_be_used_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="reference='base' is the model with its adapters off, and model has no adap"):
        make_trainer("dpo", tmp_path, reference="base")
    with pytest.raises(ValueError, match="reference='base' and ref_model are given"):
        make_trainer("dpo", tmp_path, policy=adapted(), ref_model=model(), reference="base")
    with pytest.raises(ValueError, match="reference must be one of"):
        make_trainer("dpo", tmp_path, reference="start")
    merged = adapted()
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters are merged into its weights.*unmerge_adapter"):
        make_trainer("dpo", tmp_path, policy=merged)


def test_base_of_a_loss_without_a_reference_is_refused(tmp_path):
    with pytest.raises(ValueError, match="reference='base' has no meaning without a loss_type that has a reference"):
        make_trainer("dpo", tmp_path, policy=adapted(), loss_type="simpo", reference="base")


def test_mixed_adapters_are_refused(tmp_path):
    mixed = peft.get_peft_model(model(), ADAPTERS["LoRA"](), mixed=True)
    with pytest.raises(ValueError, match=r"model mixes adapters \(PeftMixedModel\).*pass ref_model, or set reference"):
        make_trainer("dpo", tmp_path, policy=mixed, loss_from="logits")


def test_a_copy_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    """No method of PEFT does so today; a future one may keep its weights in places that are not copied."""
    copy_adapters = adapters.copy_adapters

    def forgetful(policy, names):
        found = copy_adapters(policy, names)
        for name, parameter in policy.named_parameters():
            if "lora_B.ref" in name:
                parameter.data.zero_()
        return found

    monkeypatch.setattr(adapters, "copy_adapters", forgetful)
    with pytest.raises(ValueError, match=r"a copy of the adapter \(LORA\) does not compute what the adapter does"):
        make_trainer("dpo", tmp_path, policy=adapted())
