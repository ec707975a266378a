"""Models, tokenizers and optimizers that the trainers take, and those that they refuse."""

import logging
import math

import pytest
import torch
from tiny_training import CONFIGS, WORDS, by_kind, data, history, lora_config, make_trainer, model, tokenizer, weights
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from kto_fused.huggingface import UnsupportedModelError
from kto_fused.trainers import FusedDPOTrainer, FusedKTOTrainer

pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS) + 3, n_embd=16, n_layer=1, n_head=2, n_positions=8))


def test_a_model_loaded_for_adapters_keeps_its_dtype_and_adapters_are_float32(tmp_path):
    model().bfloat16().save_pretrained(tmp_path / "model")
    whole = make_trainer("kto", tmp_path, policy=str(tmp_path / "model"), evaluation=2)
    assert {weight.dtype for weight in whole.model.parameters()} == {torch.float32}
    adapted = make_trainer("kto", tmp_path, policy=str(tmp_path / "model"), peft_config=lora_config())
    dtypes = {weight.requires_grad: weight.dtype for weight in adapted.model.parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}


@by_kind
@pytest.mark.parametrize("make", [lambda: model(max_position_embeddings=8), tiny_gpt2], ids=["llama", "gpt2"])
def test_no_sequence_is_longer_than_the_models_positions(tmp_path, kind, make):
    """Otherwise GPT-2 would fail on an index during training, and Llama would train on positions it has never seen."""
    for settings in ({}, {"max_length": None}, {"max_length": "8"}, {"max_length": 5}):
        trainer = make_trainer(kind, tmp_path, policy=make(), evaluation=4, **settings)
        assert trainer.max_length == (5 if settings.get("max_length") == 5 else 8)
        assert trainer.max_length == max(trainer.train_dataset["length"])
        trainer.train()
        counts = dict(trainer.data_counts)
        trainer.evaluate(data(kind, 5, seed=5))  # new data, prepared in this call
        assert trainer.data_counts == counts
        assert counts["eval"]["truncated"]
    for settings in ({"policy": make()}, {"ref_model": make()}):
        name = "model" if "policy" in settings else "ref_model"
        with pytest.raises(ValueError, match=f"max_length must be at most 8, the positions that {name} has, got 9"):
            make_trainer(kind, tmp_path, max_length=9, **settings)


def test_batches_are_padded_within_the_models_positions(tmp_path):
    for settings in ({}, {"max_length": None}, {"max_length": 6}):
        trainer = make_trainer("kto", tmp_path, policy=tiny_gpt2(), pad_to_multiple_of=3, **settings)
        assert trainer.max_length == 6
        trainer.train()
    with pytest.raises(ValueError, match=r"max_length=7 would be padded to a multiple of 3.*at most 6"):
        make_trainer("kto", tmp_path, policy=tiny_gpt2(), pad_to_multiple_of=3, max_length=7)
    with pytest.raises(ValueError, match="pad_to_multiple_of must be at most 8, the positions that model has, got 9"):
        make_trainer("kto", tmp_path, policy=tiny_gpt2(), pad_to_multiple_of=9)


def test_max_length_where_the_model_has_more_positions_or_no_limit(tmp_path):
    # -1 stands for no limit, as in XLNet's configuration
    for limit, expected in ((2048, {"auto": 1024, None: 2048, 1500: 1500}), (-1, {"auto": 1024, None: None, 9: 9})):
        policy = model()
        policy.config.max_position_embeddings = limit
        for wanted, length in expected.items():
            assert make_trainer("dpo", tmp_path, policy=policy, max_length=wanted).max_length == length
    assert make_trainer("dpo", tmp_path, ref_model=model(max_position_embeddings=7)).max_length == 7


def test_a_model_from_a_path_is_trained_in_float32_and_one_in_half_precision_is_warned_of(tmp_path, caplog):
    model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    trainer = make_trainer("dpo", tmp_path, policy=str(tmp_path / "model"))
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert trainer.ref_model.dtype == torch.float32
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    make_trainer("dpo", tmp_path, policy=model().to(torch.bfloat16))
    assert "most updates of learning_rate=0.5 round away" in caplog.text


def test_adapters_without_a_peft_model_are_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    policy = model()
    policy.add_adapter(peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"without being a PeftModel.*get_peft_model"):
        make_trainer("kto", tmp_path, policy=policy)


@by_kind
def test_a_model_with_nothing_to_train_is_refused_but_evaluated(tmp_path, kind):
    peft = pytest.importorskip("peft", reason="peft is not installed: no adapters")
    peft.get_peft_model(model(), lora_config()).save_pretrained(tmp_path / "adapter")
    policy = peft.PeftModel.from_pretrained(model(), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"model has no parameter that requires a gradient.*is_trainable=True"):
        make_trainer(kind, tmp_path, policy=policy)
    trainer = make_trainer(kind, tmp_path, policy=policy, train=None, evaluation=4)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert not any(parameter.requires_grad for parameter in policy.parameters())


@by_kind
def test_tokens_without_an_embedding_are_refused(tmp_path, kind):
    """The tokenizer has a word of the data, or the pad token, that was added after the model was made."""
    more_words = [*WORDS, "new"]
    records = data(kind, 8)
    column = "completion" if kind == "kto" else "rejected"
    with_new = records.map(lambda record, row: {column: " new"} if row == 5 else {}, with_indices=True)
    with pytest.raises(ValueError, match=r"train data: .* token id 64, but model has embeddings of 64 tokens: resize"):
        make_trainer(kind, tmp_path, train=with_new, words=more_words)
    resized = model()
    resized.resize_token_embeddings(65)
    with pytest.raises(ValueError, match=r"train data: .* token id 64, but ref_model has embeddings of 64 tokens"):
        make_trainer(kind, tmp_path, policy=resized, ref_model=model(seed=1), train=with_new, words=more_words)
    trainer = make_trainer(kind, tmp_path, policy=resized, train=with_new, words=more_words, max_steps=1)
    trainer.train()
    trainer = make_trainer(kind, tmp_path, train=records, words=more_words)
    with pytest.raises(ValueError, match=r"eval data: .* token id 64"):
        trainer.evaluate(with_new)

    trainer_class, words = type(trainer), tokenizer()
    words.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"processing_class pads with token id 64, but model has .* 64 tokens: resize"):
        trainer_class(model(), args=trainer.args, train_dataset=records, processing_class=words)
    words.pad_token = words.eos_token
    trainer_class(model(), args=trainer.args, train_dataset=records, processing_class=words)


def test_a_model_made_in_memory_comes_with_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"processing_class is missing, and model was made in memory"):
        FusedKTOTrainer(model(), args=CONFIGS["kto"](str(tmp_path), use_cpu=True), train_dataset=data("kto", 8))


@by_kind
def test_arguments_of_the_wrong_kind_are_refused(tmp_path, kind):
    trainer, config = {"kto": FusedKTOTrainer, "dpo": FusedDPOTrainer}[kind], CONFIGS[kind]
    policy, words = model(), tokenizer()
    other = CONFIGS["dpo" if kind == "kto" else "kto"]
    for args in (TrainingArguments(str(tmp_path)), other(str(tmp_path), use_cpu=True)):
        with pytest.raises(TypeError, match=f"args must be a {config.__name__}, got {type(args).__name__}"):
            trainer(policy, args=args, processing_class=words)
    args = config(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="ref_model is the model itself: leave it out"):
        trainer(policy, policy, args, processing_class=words)
    with pytest.raises(TypeError, match="processing_class must be a transformers tokenizer, got str"):
        trainer(policy, args=args, processing_class="gpt2")
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"2 GPUs are visible.*torchrun.*CUDA_VISIBLE_DEVICES"):
        trainer(policy, args=args, processing_class=words)


@by_kind
def test_a_term_that_peft_adds_to_a_models_own_loss_is_refused(tmp_path, kind):
    peft = pytest.importorskip("peft", reason="peft is not installed: no adapters")

    def adalora(weight: float):
        return peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9, orth_reg_weight=weight)

    with pytest.raises(ValueError, match=r"orth_reg_weight=0.5 \(AdaLoRA\) has no effect"):
        make_trainer(kind, tmp_path, peft_config=adalora(0.5))
    trainer = make_trainer(kind, tmp_path, peft_config=adalora(0.0))
    trainer.train()
    assert math.isfinite(history(trainer)[-1]["loss"])


@pytest.mark.parametrize("made_of", ["another model", "the weights under an adapter"])
def test_an_optimizer_without_any_trained_weight_is_refused(tmp_path, made_of):
    policy, settings = model(), {}
    if made_of != "another model":
        pytest.importorskip("peft", reason="peft is not installed: no adapters")
        settings["peft_config"] = lora_config()
    owner = model() if made_of == "another model" else policy
    optimizer = torch.optim.SGD(owner.parameters(), lr=0.5)
    args = CONFIGS["dpo"](output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="optimizers has an optimizer that holds none of the weights to train"):
        FusedDPOTrainer(
            policy, None, args, data("dpo", 8), processing_class=tokenizer(), optimizers=(optimizer, None), **settings
        )


def test_an_encoder_decoder_is_refused_from_logits_too(tmp_path):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    policy = T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes))
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration is no causal language model"):
        make_trainer("dpo", tmp_path, policy=policy, loss_from="logits")


def test_a_model_whose_positions_see_later_tokens_is_refused_from_logits_too(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    configs = [BertConfig(vocab_size=64, is_decoder=is_decoder, **sizes) for is_decoder in (False, True)]
    policy, decoder = (BertLMHeadModel(config) for config in configs)
    with pytest.raises(UnsupportedModelError, match="BertLMHeadModel is no causal language model as it is configured"):
        make_trainer("dpo", tmp_path, policy=policy, loss_from="logits")
    with pytest.raises(UnsupportedModelError, match="BertLMHeadModel is no causal language model as it is configured"):
        make_trainer("dpo", tmp_path, policy=decoder, ref_model=policy, loss_from="logits")
    make_trainer("dpo", tmp_path, policy=decoder, loss_from="logits").train()


@pytest.mark.parametrize("loss_from", ["hidden", "logits"])
def test_models_are_checked_on_the_device_alone(tmp_path, monkeypatch, loss_from):
    """Layers may have kernels that run only there, as Liger's do."""
    moved, move = [], Trainer._move_model_to_device

    def noted(self, model, device):
        moved.append(model)
        move(self, model, device)

    monkeypatch.setattr(Trainer, "_move_model_to_device", noted)

    def check_device(layer, arguments):
        assert any(layer in whole.modules() for whole in moved)

    policy, ref_model = model(), model(seed=1)
    for whole in (policy, ref_model):
        whole.model.norm.register_forward_pre_hook(check_device)
    make_trainer("dpo", tmp_path, policy=policy, ref_model=ref_model, loss_from=loss_from)
    assert moved == [policy, ref_model]


@by_kind
def test_adapters_that_cannot_be_trained_are_refused(tmp_path, kind):
    peft = pytest.importorskip("peft")
    with pytest.raises(TypeError, match=r"peft_config must be a peft\.PeftConfig, got dict"):
        make_trainer(kind, tmp_path, peft_config={"r": 2})
    with pytest.raises(ValueError, match="peft_config is given, but the model carries adapters already"):
        make_trainer(kind, tmp_path, policy=peft.get_peft_model(model(), lora_config()), peft_config=lora_config())
    on_head = {"peft_config": lora_config(target_modules=["q_proj", "lm_head"])}
    with pytest.raises(UnsupportedModelError, match=r"LM head carries an adapter.*leave 'lm_head' out"):
        make_trainer(kind, tmp_path, **on_head)
    from_logits = make_trainer(kind, tmp_path, loss_from="logits", **on_head)
    start = weights(from_logits)
    from_logits.train()
    name = "base_model.model.lm_head.lora_A.default.weight"
    assert not weights(from_logits)[name].equal(start[name])


def test_deepspeed_without_its_processes_is_refused(tmp_path, monkeypatch):
    create = Trainer.create_accelerator_and_postprocess

    def under_deepspeed(self):
        create(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", under_deepspeed)
    with pytest.raises(ValueError, match=r"DeepSpeed needs processes.*counts 1, and none were started: use torchrun"):
        make_trainer("dpo", tmp_path)


def test_publishing_a_model_is_left_to_the_trainer_of_transformers():
    published = ("push_to_hub", "_push_from_checkpoint")
    for trainer in (FusedKTOTrainer, FusedDPOTrainer):
        assert all(getattr(trainer, name) is getattr(Trainer, name) for name in published)
