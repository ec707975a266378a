"""Supervised fine-tuning and reward models: TRL's steps, packing, the scored token, saved models, and refusals."""

import copy

import pytest
import torch
from data_cases import MESSAGES
from datasets import Dataset
from tiny_training import (
    TRAINERS,
    assert_near,
    data,
    history,
    lora_config,
    make_trainer,
    model,
    model_for,
    tokenizer,
    weights,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
)

from kto_fused import heads
from kto_fused.huggingface import UnsupportedModelError
from kto_fused.preference_data import IGNORE_INDEX, DataError
from kto_fused.trainers import FusedRewardConfig, FusedRewardTrainer

pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")


@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        ("sft", {}, {}),
        ("sft", {"loss_type": "dft"}, {"loss_type": "dft"}),
        ("reward", {"centering": 0.1}, {"center_rewards_coefficient": 0.1}),
    ],
    ids=["nll", "dft", "reward"],
)
def test_a_step_is_trls(tmp_path, kind, ours, theirs):
    """Two accumulated batches of different lengths: loss, gradient norm and weights. Of entropy and accuracy TRL logs
    the mean of the batches' means.
    """
    trl = pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with")
    if not trl.__version__.startswith("1.16."):
        pytest.skip(f"compares with TRL 1.16, found {trl.__version__}")
    trainer_class, config_class = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
    }[kind]
    common = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_length": 64,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "num_train_epochs": 1,
    }
    other = trainer_class(
        model_for(kind),
        args=config_class(
            str(tmp_path), bf16=False, gradient_checkpointing=False, save_strategy="no", **common, **theirs
        ),
        train_dataset=data(kind, 6),
        processing_class=tokenizer(),
    )
    other.train()
    trainer = make_trainer(kind, tmp_path, train=6, train_sampling_strategy="random", **common, **ours)
    trainer.train()
    (entry,), (truth,) = history(trainer), history(other)
    names = {"loss": "loss", "grad_norm": "grad_norm", "num_tokens": "num_tokens"}
    if kind == "reward":  # batches of three pairs each, so the means agree
        names |= {"rewards/accuracies": "accuracy", "rewards/margins": "margin"}
    assert_near([entry], [{ours: truth[theirs] for ours, theirs in names.items()}], 1e-4)
    for name, tensor in weights(other).items():
        torch.testing.assert_close(weights(trainer)[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_step_without_a_token_to_train_changes_nothing(tmp_path, steps):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": steps, "max_steps": 1}
    trainer = make_trainer("sft", tmp_path, train=4, logging_steps=1, **settings)
    collate, before = trainer.data_collator, {name: x.clone() for name, x in weights(trainer).items()}

    def without_labels(examples):
        batch = collate(examples)
        return {**batch, "labels": torch.full_like(batch["labels"], IGNORE_INDEX)}

    trainer.data_collator = without_labels
    trainer.train()
    assert history(trainer)[0]["grad_norm"] == 0
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, before[name]), name


# ---- packing --------------------------------------------------------------------------------------------------------


def test_packed_rows_train_as_padded_ones_where_one_batch_holds_all(tmp_path):
    runs = {}
    for packing in (False, True):
        rows = 4 if packing else 16
        settings = {"max_length": 48, "packing": packing, "per_device_train_batch_size": rows, "num_train_epochs": 3}
        trainer = make_trainer("sft", tmp_path, evaluation=5, eval_strategy="epoch", **settings)
        trainer.train()
        assert trainer.data_counts["train"]["examples"] == 16
        runs[packing] = trainer
    assert len(runs[True].train_dataset) == 3  # of 119 tokens
    assert_near(history(runs[True]), history(runs[False]))


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 2, "packing": True, "max_length": 32, "pad_to_multiple_of": 16},
        {"per_device_train_batch_size": 6, "loss_from": "logits"},
    ],
    ids=["padded", "packed", "logits"],
)
def test_a_weight_multiplies_the_losses_of_the_records_tokens(tmp_path, settings):
    """loss = sum_s w_s sum_t -l_t / (number of all tokens), in training and in evaluation."""
    factors = [0.0, 2.0, 0.5, 1.0, 3.0, 0.25]
    weighted = data("sft", 6).add_column("weight", factors)
    trainer = make_trainer("sft", tmp_path, train=weighted, evaluation=weighted, max_grad_norm=0.0, **settings)
    twin = copy.deepcopy(trainer.model).double().eval()
    total, count = 0, 0
    for record, factor in zip(weighted, factors, strict=True):
        prompt, answer = (tokenizer()(record[side])["input_ids"] for side in ("prompt", "completion"))
        ids = torch.tensor([prompt + answer + [tokenizer().eos_token_id]])
        logps = twin(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total = total - factor * logps.gather(1, ids[0, len(prompt) :, None]).sum()
        count += len(answer) + 1
    loss = total / count
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), abs=2e-5)
    trainer.train()
    assert history(trainer)[-1]["loss"] == pytest.approx(loss.item(), abs=2e-5)
    grads = torch.autograd.grad(loss, list(twin.parameters()))
    for (name, parameter), grad in zip(twin.named_parameters(), grads, strict=True):
        torch.testing.assert_close(weights(trainer)[name].double(), parameter - 0.5 * grad, rtol=0, atol=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_mixes_packed_sequences_is_refused(tmp_path, attention):
    make_trainer("sft", tmp_path, policy=model(attn_implementation=attention), packing=True, max_length=32)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    falcon = FalconForCausalLM(FalconConfig(**sizes, attn_implementation=attention))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1))
    for policy in (falcon, mamba):
        make_trainer("sft", tmp_path, policy=copy.deepcopy(policy), max_length=32)
        with pytest.raises(UnsupportedModelError, match=r"packed sequences see each other: .* without packing"):
            make_trainer("sft", tmp_path, policy=policy, packing=True, max_length=32)


# ---- which tokens ---------------------------------------------------------------------------------------------------


def test_all_messages_of_the_assistant_are_trained(tmp_path):
    words = tokenizer(["red", "green", "blue", "one", "two", "three", "four", "<user>", "<assistant>"])
    words.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    trainer = make_trainer("sft", tmp_path)
    prepared = TRAINERS["sft"](model(), None, trainer.args, Dataset.from_list(MESSAGES), processing_class=words)
    batch = prepared.data_collator(list(prepared.train_dataset))
    trained = [words.decode(row[row != -100]) for row in batch["labels"]]
    assert trained == ["one two </s> three </s>", "four </s>"]


def scores_of(trainer, **settings):
    batch = next(iter(trainer.get_train_dataloader()))
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        _, metrics = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    rows = {name: batch[name].transpose(0, 1).flatten(0, 1) for name in ("input_ids", "attention_mask")}
    return rows, metrics.rewards


@pytest.mark.parametrize("pads", ["<pad>", "</s>", None, "new"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_saved_reward_model_gives_the_same_scores_to_padded_batches(tmp_path, pads, lora):
    """A completion ends with </s>. Padding with </s> too would make transformers score the token before it."""
    words, policy = tokenizer(), model_for("reward")
    if pads == "new":  # there is no token left to pad with
        words.unk_token = "</s>"
    pads = words.pad_token = "</s>" if pads == "new" else pads
    args = make_trainer("reward", tmp_path, train=8).args
    trainer = FusedRewardTrainer(
        policy,
        None,
        args,
        train_dataset=data("reward", 8),
        processing_class=words,
        peft_config=lora_config(modules_to_save=["score"], task_type="SEQ_CLS") if lora else None,
    )
    assert words.pad_token == pads  # the caller's own tokenizer stays as it is
    trainer.train()
    rows, scores = scores_of(trainer)
    last = rows["attention_mask"].sum(1) - 1
    assert (rows["input_ids"].gather(1, last[:, None]) == words.eos_token_id).all()
    if lora:
        trainer.model.merge_and_unload().save_pretrained(tmp_path / "saved")
    else:
        trainer.save_model(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(again(**rows).logits[:, 0], scores, rtol=1e-5, atol=1e-6)


def test_a_causal_model_gets_a_score_that_depends_on_the_seed_alone(tmp_path):
    model().save_pretrained(tmp_path / "model")
    found = []
    for seed, noise in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(noise)
        args = FusedRewardConfig(str(tmp_path), seed=seed, use_cpu=True, report_to=[])
        trainer = FusedRewardTrainer(
            str(tmp_path / "model"), args=args, train_dataset=data("reward", 4), processing_class=tokenizer()
        )
        found.append(trainer.model.score.weight.detach().clone())
        assert trainer.model.model.embed_tokens.weight.equal(model().model.embed_tokens.weight)
    assert found[0].equal(found[1])
    assert not found[0].equal(found[2])


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_reward_model_must_have_one_trained_score(tmp_path):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM, which has no score: load it with AutoModelForSequenceCl"):
        make_trainer("reward", tmp_path, policy=model())
    with pytest.raises(ValueError, match="model has num_labels=2, expected 1"):
        make_trainer("reward", tmp_path, policy=model(0, LlamaForSequenceClassification, num_labels=2))
    with pytest.raises(ValueError, match=r"score would stay as it is, .*modules_to_save=\['score'\]"):
        make_trainer("reward", tmp_path, peft_config=lora_config())
    with pytest.raises(ValueError, match="score carries an adapter"):
        make_trainer("reward", tmp_path, peft_config=lora_config(target_modules=["q_proj", "score"]))
    with pytest.raises(ValueError, match="ref_model is given, but loss_type='bradley_terry' has no reference"):
        make_trainer("reward", tmp_path, ref_model=model())
    with pytest.raises(TypeError, match="FusedRewardTrainer takes no loss"):
        FusedRewardTrainer(model_for("reward"), args=FusedRewardConfig(str(tmp_path), use_cpu=True), loss="sigmoid")


def test_completions_that_end_with_the_padding_token_are_refused(tmp_path):
    pairs = data("reward", 4).to_list()
    pairs[1]["chosen"] += " <pad>"
    words = tokenizer()
    words.eos_token = None
    with pytest.raises(DataError, match="train data: 1 completions end with the padding token '<pad>'"):
        FusedRewardTrainer(
            model_for("reward"),
            args=FusedRewardConfig(str(tmp_path), use_cpu=True),
            train_dataset=Dataset.from_list(pairs),
            processing_class=words,
        )


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("sft", {"packing": True, "max_length": None}, None),
        ("sft", {"loss_type": "sigmoid"}, "loss_type must be one of .*'nll'"),
        ("sft", {"precompute_ref_log_probs": True}, "precompute_ref_log_probs=True has no meaning without a loss_type"),
        ("reward", {"loss_from": "logits"}, "loss_from='logits' has no meaning for a reward model"),
        ("reward", {"centering": -1.0}, "centering must be"),
        ("reward", {"loss_weights": [1.0]}, "loss_weights="),
    ],
)
def test_options_that_mean_nothing_are_refused(tmp_path, kind, settings, message):
    if message is None:
        assert len(make_trainer(kind, tmp_path, **settings).train_dataset) < 16  # the model's positions are the limit
        return
    with pytest.raises(ValueError, match=message):
        make_trainer(kind, tmp_path, **settings)


def test_supervised_fine_tuning_takes_losses_of_single_tokens_over_all_tokens(tmp_path):
    args = make_trainer("sft", tmp_path).args
    for loss, message in (
        ("sigmoid", "is no loss of single tokens"),
        ("ppo", r"needs the tensors \[.*'advantages'\]"),
        (heads.make("nll", chosen_only=True), "reads pairs"),
        (heads.Mix((1.0, heads.make("nll")), (1.0, heads.make("dft"))), "is no loss of single tokens"),
        (heads.make("nll", normalizer="sequences"), "normalizer='sequences': FusedSFTTrainer takes the mean over"),
    ):
        with pytest.raises(ValueError, match=message):
            TRAINERS["sft"](model(), args=args, processing_class=tokenizer(), loss=loss)


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 32}], ids=["padded", "packed"])
def test_a_step_takes_three_gemms_of_the_trained_tokens(tmp_path, settings):
    """The operations that grow with the vocabulary are those of the LM head."""

    def step(vocab_size):
        trainer = make_trainer("sft", tmp_path, policy=model(vocab_size=vocab_size), max_steps=1, **settings)
        (batch, *_) = trainer.get_train_dataloader()
        count = (batch["labels"][:, 1:] != IGNORE_INDEX).sum().item()
        with FlopCounterMode(display=False) as counter:
            trainer.train()
        return counter.get_total_flops(), count, trainer.model.lm_head.weight.numel()

    (few, count, small), (many, _, large) = step(512), step(1024)
    assert (many - few) / (2 * count * (large - small)) == pytest.approx(3)
