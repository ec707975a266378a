"""A stopped run resumes to the bit; the order of the examples depends on the seed alone."""

import itertools

import pytest
from tiny_training import RECIPES, StopAt, by_kind, history, make_trainer, model, model_for, weights

pytestmark = pytest.mark.usefixtures("own_cache", "small_machine")


@pytest.mark.parametrize(
    ("kind", "sampling"),
    [*itertools.product(RECIPES, ["group_by_length"]), ("kto", "random"), ("dpo", "random")],
)
def test_a_run_stopped_at_any_step_ends_as_one_that_was_not(tmp_path, kind, sampling):
    """Two epochs of 4 steps, of 2 + 2 examples each and 2 + 1 in the last step; every third step is logged."""

    def run(folder, stop_at=None, resume_from=None, **settings):
        trainer = make_trainer(
            kind,
            tmp_path / folder,
            policy=model_for(kind, attention_dropout=0.1),
            train=15,
            evaluation=5,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=2,
            logging_steps=3,
            eval_strategy="steps",
            eval_steps=4,
            optim="adamw_torch",
            learning_rate=0.01,
            lr_scheduler_type="linear",
            train_sampling_strategy=sampling,
            callbacks=[] if stop_at is None else [StopAt(stop_at)],
            **{"disable_dropout": False, **settings},
        )
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer

    whole = run("whole")
    steps = whole.state.global_step
    assert steps == 8
    assert history(run("no_dropout", disable_dropout=True)) != history(whole), "dropout does nothing"
    for step in range(1, steps + 1):
        stopped = run(f"stopped_{step}", stop_at=step)
        assert stopped.state.global_step == step
        resumed = run(f"stopped_{step}", resume_from=str(tmp_path / f"stopped_{step}" / f"checkpoint-{step}"))
        assert history(resumed) == history(whole), f"stopped at {step}"
        for name, tensor in weights(resumed).items():
            assert tensor.equal(weights(whole)[name]), f"stopped at {step}: {name}"


@by_kind
def test_a_checkpoint_of_a_model_alone_is_refused(tmp_path, kind):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    make_trainer(kind, tmp_path, max_steps=2, **saving).train()
    with pytest.raises(ValueError, match=r"checkpoint-2 holds a model alone \(save_only_model\)"):
        make_trainer(kind, tmp_path, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@by_kind
def test_a_run_is_not_resumed_with_its_own_checkpoint_for_the_reference(tmp_path, kind):
    make_trainer(kind, tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    begun, checkpoint = str(tmp_path / "checkpoint-1"), str(tmp_path / "checkpoint-2")
    policy = type(model()).from_pretrained(begun)
    with pytest.raises(ValueError, match=r"reference_weights: .* as ref_model, and not one of its checkpoints"):
        make_trainer(kind, tmp_path, policy=policy, max_steps=3).train(resume_from_checkpoint=checkpoint)
    for elsewhere in ({"policy": policy, "ref_model": model()}, {"policy": model()}):
        trainer = make_trainer(kind, tmp_path, max_steps=3, **elsewhere)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 3


def test_batches_of_similar_lengths_come_in_another_order_each_epoch(tmp_path):
    trainer = make_trainer("dpo", tmp_path, train=32, num_train_epochs=3)
    compute_loss, batches = trainer.compute_loss, []

    def recording(model, inputs, **options):
        batches.append(inputs["input_ids"])
        return compute_loss(model, inputs, **options)

    trainer.compute_loss = recording
    trainer.train()
    epochs = [batches[start : start + 8] for start in (0, 8, 16)]
    orders = {str([batch.tolist() for batch in epoch]) for epoch in epochs}
    assert len(orders) == 3
    for epoch in epochs:
        assert sum(len(batch) for batch in epoch) == 32
    shuffled = make_trainer("dpo", tmp_path, train=32, train_sampling_strategy="random").get_train_dataloader()
    width = sum(batch["input_ids"].shape[-1] for batch in shuffled)
    assert all(sum(batch.shape[-1] for batch in epoch) < width for epoch in epochs)


@pytest.mark.parametrize("sampling", ["group_by_length", "batch_rebalance", "random"])
def test_the_order_of_examples_is_drawn_from_the_seed(tmp_path, sampling):
    def widths(**settings):
        trainer = make_trainer("dpo", tmp_path, train=32, train_sampling_strategy=sampling, **settings)
        return [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]

    assert widths() == widths(data_seed=42) != widths(data_seed=5) == widths(data_seed=5)
