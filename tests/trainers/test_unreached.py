"""Parameters that text never reaches are frozen; parameters that only some tokens reach stay trainable."""

import logging

import pytest
import torch
from tiny_training import WORDS, by_kind, history, make_trainer, model, vision_language_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from kto_fused.huggingface.unreached import unreached_by_text

TOWERS = ("model.vision_tower.", "model.multi_modal_projector.")
pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")


def messages(caplog, word: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if word in record.getMessage()]


@by_kind
def test_parameters_that_text_never_reaches_are_frozen_and_logged(tmp_path, kind, caplog):
    """A vision tower and its projector get no gradient, optimizer state or decay; all other weights are trained."""
    policy = vision_language_model()
    start = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    trainer = make_trainer(kind, tmp_path, policy=policy, optim="adamw_torch", weight_decay=0.1, learning_rate=0.01)
    (said,) = messages(caplog, "Text never reaches")
    count = sum(parameter.numel() for name, parameter in policy.named_parameters() if name.startswith(TOWERS))
    assert said == (
        f"Text never reaches model.multi_modal_projector, model.vision_tower: its {count:,} parameters get no gradient "
        "and are frozen."
    )
    trainer.train()
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad != name.startswith(TOWERS), name
        assert parameter.equal(start[name]) == name.startswith(TOWERS), name
    assert history(trainer)[0]["rewards/chosen"] == 0


def test_adapters_in_a_vision_tower_are_frozen_too(tmp_path, caplog):
    peft = pytest.importorskip("peft", reason="peft is not installed: no adapters")
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    trainer = make_trainer("dpo", tmp_path, policy=vision_language_model(), peft_config=config)
    trainer.train()
    assert len(messages(caplog, "Text never reaches model.vision_tower")) == 1
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            assert parameter.requires_grad == ("vision_tower" not in name), name


def test_parameters_that_some_tokens_reach_are_not_frozen():
    """Experts, whatever their layers, and any other part of the language model stay trainable."""
    policy = model()
    policy.model.layers[0].expert = nn.Linear(16, 16)
    policy.value_head = nn.Linear(16, 1)
    assert unreached_by_text(policy) == (
        ["value_head.weight", "value_head.bias"],
        ["model.layers.0.expert.weight", "model.layers.0.expert.bias"],
    )
    experts = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=len(WORDS) + 3,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=16,
            num_experts_per_tok=1,
        )
    )
    assert unreached_by_text(experts).outside == []
    assert unreached_by_text(model()) == ([], [])


def test_looking_for_unreached_parameters_leaves_no_trace():
    """Gradients, modes and the random state are unchanged."""
    policy = model(attention_dropout=0.3).train()
    policy.model.layers[1].eval()
    modes, state = [module.training for module in policy.modules()], torch.get_rng_state()
    unreached_by_text(policy)
    assert [module.training for module in policy.modules()] == modes
    assert torch.get_rng_state().equal(state)
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_training_a_vision_tower_alone_is_refused(tmp_path):
    policy = vision_language_model()
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name.startswith(TOWERS))
    with pytest.raises(ValueError, match="text reaches none of the parameters to train"):
        make_trainer("dpo", tmp_path, policy=policy)


def test_the_flag_is_named_where_processes_would_wait_for_a_gradient(tmp_path, caplog, monkeypatch):
    """The warning comes before training, if DistributedDataParallel does not look for unused parameters."""
    policy = model()
    policy.model.layers[0].expert = nn.Linear(16, 16)
    make_trainer("dpo", tmp_path, policy=policy, gradient_checkpointing=True)
    assert not messages(caplog, "ddp_find_unused_parameters")
    monkeypatch.setattr("kto_fused.trainers.FusedDPOTrainer._is_ddp", property(lambda self: True))
    make_trainer("dpo", tmp_path, policy=policy, gradient_checkpointing=True, ddp_find_unused_parameters=True)
    assert not messages(caplog, "ddp_find_unused_parameters")
    make_trainer("dpo", tmp_path, policy=policy, gradient_checkpointing=True)
    (said,) = messages(caplog, "--ddp_find_unused_parameters true")
    assert "2 parameters to train (model.layers.0.expert.weight among them) get no gradient" in said
    assert caplog.records[-1].levelno == logging.WARNING or "reference" in caplog.records[-1].getMessage()
