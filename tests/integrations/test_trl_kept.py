"""Trainers, losses and models that fuse leaves to TRL, with a warning or an error that names the reason."""

import copy
import re
from types import SimpleNamespace

import pytest

trl = pytest.importorskip("trl", reason="TRL is not installed: nothing to fuse")

# ruff: noqa: E402 (the imports below need TRL)

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.parallelism_config import ParallelismConfig
from transformers import LlamaForCausalLM
from trl_cases import (
    HIDDEN,
    STEPS,
    VOCAB,
    DPOTrainer,
    KTOTrainer,
    assert_same_training,
    batch,
    both_trainers,
    make_trainer,
    model,
    only,
    precomputed,
    said,
    since_1_15,
    snapshot,
    steps,
)

from kto_fused import huggingface, linear_sequence_logps
from kto_fused.integrations.trl import fuse

pytestmark = pytest.mark.usefixtures("small_machine")


@since_1_15
@both_trainers
@pytest.mark.parametrize("method", ["_compute_loss", "compute_loss"])
def test_a_subclass_with_its_own_loss_gets_fused_log_probabilities(tmp_path, kind, method, calls, caplog):
    def doubled(self, *args, **kwargs):
        return 2 * getattr(kind, method)(self, *args, **kwargs)

    subclass = type("MyTrainer", (kind,), {method: doubled})
    assert_same_training(kind, tmp_path, subclass=subclass)
    assert calls["linear_token_logps"] > 0
    assert not calls["fused_linear_kto_loss"] + calls["fused_linear_loss"]
    (message,) = said(caplog)
    assert f"MyTrainer.{method} is not {kind.__name__}'s" in message


@since_1_15
def test_settings_changed_after_fuse_are_followed(tmp_path, calls):
    trainer = fuse(make_trainer(DPOTrainer, tmp_path, max_steps=1))
    trainer.loss_weights = [-0.5]
    steps(trainer)
    only(calls, linear_token_logps=2)


@since_1_15
@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("beta", 0.0, "beta must be a finite number > 0, got 0.0"),
        ("label_smoothing", 0.5, "label_smoothing must lie in [0, 0.5), got 0.5"),
        ("undesirable_weight", -1.0, "a class weight is negative"),
    ],
)
def test_a_setting_that_leaves_the_loss_to_trl_is_named(tmp_path, attribute, value, reason, caplog):
    kind = KTOTrainer if attribute == "undesirable_weight" else DPOTrainer
    settings = {"loss_type": ["robust"], "label_smoothing": 0.1} if attribute == "label_smoothing" else {}
    trainer = make_trainer(kind, tmp_path, **settings)
    setattr(trainer, attribute, value)
    fuse(trainer)
    (message,) = said(caplog)
    assert reason in message
    assert "_compute_loss" not in vars(trainer)


@pytest.mark.parametrize(
    ("reason", "changed"),
    [
        ("DeepSpeed ZeRO-3", {"is_deepspeed_enabled": True, "deepspeed_plugin": SimpleNamespace(zero_stage=3)}),
        ("FSDP1", {"is_fsdp_enabled": True, "fsdp_plugin": SimpleNamespace(fsdp_version=1)}),
        ("parallelism", {"parallelism_config": ParallelismConfig(tp_size=2)}),
        ("parallelism", {"parallelism_config": ParallelismConfig(cp_size=2)}),
        ("vision-language", {"_is_vlm": True}),
        ("MPS", {"device": torch.device("mps")}),
    ],
)
def test_a_trainer_that_cannot_be_fused_is_left_unchanged(tmp_path, reason, changed, caplog):
    trainer = make_trainer(DPOTrainer, tmp_path)
    before = snapshot(trainer)
    plugins = {name: changed.get(name) for name in ("deepspeed_plugin", "fsdp_plugin")}
    trainer.accelerator = SimpleNamespace(
        state=SimpleNamespace(**plugins),
        parallelism_config=changed.get("parallelism_config"),
        device=changed.get("device", torch.device("cpu")),
    )
    for name in ("is_deepspeed_enabled", "is_fsdp_enabled", "_is_vlm"):
        setattr(trainer, name, changed.get(name, False))
    assert fuse(trainer) is trainer
    assert snapshot(trainer) == before
    (message,) = said(caplog)
    assert message.startswith("TRL computes everything as before")
    assert reason in message


def test_fusing_again_changes_nothing(tmp_path):
    trainer = make_trainer(DPOTrainer, tmp_path)
    assert fuse(trainer) is trainer
    before = snapshot(trainer)
    assert fuse(trainer) is trainer
    assert snapshot(trainer) == before


def test_two_trainers_may_share_a_model(tmp_path, calls):
    """TRL patches the model again for the second trainer, over the patches of the first ``fuse``."""
    policy = model()
    steps(fuse(make_trainer(KTOTrainer, tmp_path, policy=policy)))
    calls.update(dict.fromkeys(calls, 0))
    steps(fuse(make_trainer(DPOTrainer, tmp_path, policy=policy)))
    only(calls, fused_linear_loss=STEPS, linear_sequence_logps=STEPS)


def test_a_deep_copy_calls_a_loss_at_its_own_head(tmp_path):
    policy, inputs = model(), batch()
    fuse(make_trainer(DPOTrainer, tmp_path, policy=policy))
    copied = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    labels = {"labels": inputs["input_ids"]}
    expected = huggingface.apply(linear_sequence_logps, model(), inputs, **labels)
    assert torch.equal(huggingface.apply(linear_sequence_logps, copied, inputs, **labels), expected)


PROMPT_LEARNING = {
    "PROMPT_TUNING": lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P_TUNING": lambda peft: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8
    ),
    "PREFIX_TUNING": lambda peft: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@since_1_15
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (KTOTrainer, "PROMPT_TUNING"),
        (DPOTrainer, "P_TUNING"),
        (DPOTrainer, "PREFIX_TUNING"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in ((DPOTrainer, "PROMPT_TUNING"), (KTOTrainer, "P_TUNING"), (KTOTrainer, "PREFIX_TUNING"))
        ),
    ],
)
def test_learned_prompts_train_as_in_trl(tmp_path, kind, method, calls, caplog):
    config = PROMPT_LEARNING[method](pytest.importorskip("peft"))
    runs = []
    for wrap in (lambda trainer: trainer, fuse):
        trainer = make_trainer(
            kind, tmp_path, own_reference=False, peft_config=config, precompute_ref_log_probs=kind is KTOTrainer
        )
        before, values = snapshot(trainer), precomputed(trainer)
        assert snapshot(wrap(trainer)) == before
        assert precomputed(trainer) == values
        runs.append(steps(trainer))
    assert runs[1].logs == runs[0].logs
    assert {name for name, count in calls.items() if count} == {"own"}
    (message,) = said(caplog)
    assert message.startswith("TRL computes everything as before: the policy cannot be fused, model learns prompts")
    assert method in message
    assert "use LoRA" in message


class OtherHead(torch.nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden) * 2


class RolledLlama(LlamaForCausalLM):
    """A model whose logits are not its head's output."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits.roll(1, -1)
        return outputs


def rolled():
    return RolledLlama(model().config)


def replace_head(refused) -> None:
    refused.lm_head = OtherHead(HIDDEN, VOCAB, bias=False)


def quantise_head(refused) -> None:
    refused.lm_head.weight = torch.nn.Parameter(refused.lm_head.weight.to(torch.int8), requires_grad=False)


def place_head(refused) -> None:
    add_hook_to_module(refused.lm_head, AlignDevicesHook("cpu"))  # as a device_map does


def hook_head(refused) -> None:
    refused.lm_head.register_forward_hook(lambda head, inputs, output: 2 * output)


def put_adapter_on_head(refused) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["lm_head"])
    peft.inject_adapter_in_model(settings, refused)


def spoil_weights(refused) -> None:
    with torch.no_grad():
        refused.lm_head.weight[0, 0] = torch.nan


def make_encoder_decoder(refused) -> None:
    refused.config.is_encoder_decoder = True


def drop_return_dict(refused) -> None:
    refused.config.return_dict = False


def break_backbone(refused) -> None:
    def fails(*args, **kwargs):
        raise RuntimeError("no kernel for this device")

    refused.model.forward = fails


REFUSALS = {
    replace_head: "LM head is a OtherHead",
    quantise_head: "LM head is quantised to torch.int8",
    place_head: "has a forward of its own .* put the whole model on one device",
    hook_head: "the .* cannot be fused",
    put_adapter_on_head: "LM head carries an adapter",
    spoil_weights: "logits are not finite",
    make_encoder_decoder: "no causal language model with an LM head",
    drop_return_dict: "return_dict is False",
    break_backbone: "checking it failed with RuntimeError: no kernel for this device",
}


@pytest.mark.parametrize(
    ("change", "refused", "bf16"),
    [
        *((change, "model", False) for change in REFUSALS),
        (replace_head, "ref_model", False),
        (replace_head, "ref_model", True),  # autocast then wraps the reference
        (replace_head, "model", True),
        *(
            pytest.param(change, "ref_model", False, marks=pytest.mark.full)
            for change in REFUSALS
            if change != replace_head
        ),
    ],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else f"bf16={value}"),
)
def test_a_model_that_cannot_be_fused_is_left_to_trl(tmp_path, refused, bf16, change, caplog):
    trainer = make_trainer(DPOTrainer, tmp_path, bf16=bf16)
    change(getattr(trainer, refused))
    before = snapshot(trainer)
    assert fuse(trainer) is trainer
    assert snapshot(trainer) == before
    (message,) = said(caplog)
    role = "policy" if refused == "model" else "reference"
    assert message.startswith(f"TRL computes everything as before: the {role} cannot be fused, ")
    assert re.search(REFUSALS[change], message)


def test_a_model_whose_logits_are_not_its_heads_trains_as_in_trl(tmp_path, caplog):
    runs = []
    for wrap in (lambda trainer: trainer, fuse):
        torch.manual_seed(0)
        runs.append(steps(wrap(make_trainer(DPOTrainer, tmp_path, make_policy=rolled, max_steps=1))))
    assert runs[1].logs == runs[0].logs
    (message,) = said(caplog)
    assert "logits differ" in message


@pytest.mark.parametrize("version", ["1.8.0", "1.17.0.dev0", "2.0rc1"])
def test_another_version_of_trl_is_refused(tmp_path, monkeypatch, version):
    trainer = make_trainer(DPOTrainer, tmp_path)
    before = snapshot(trainer)
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ImportError, match=rf"knows TRL 1\.9 to 1\.16, found TRL {re.escape(version)}"):
        fuse(trainer)
    assert snapshot(trainer) == before


def test_another_trainer_is_refused():
    with pytest.raises(TypeError, match=r"trainer must be one of TRL's KTOTrainer, DPOTrainer, .*, got object"):
        fuse(object())
