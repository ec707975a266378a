"""Losses on the score of a reward model, and models whose packed sequences see each other."""

import pytest
import torch
from models import ARCHITECTURES, SIZES, VOCAB, make_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from kto_fused import huggingface, linear_bradley_terry_loss
from kto_fused.huggingface import UnsupportedModelError
from kto_fused.huggingface.inspect import check_keeps_packed_apart, check_scores, tokens_to_check

PAD = SIZES["pad_token_id"]


def reward_model(name: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name, **{**SIZES, **ARCHITECTURES[name], "num_labels": 1, "output_router_logits": False}
    )
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        model.score.weight *= 10
    return model.train()


def pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, mask and labels [4, 9]: prompts of two tokens, and two sequences padded behind."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, VOCAB, (4, 9), generator=generator)
    input_ids[0, 6:] = input_ids[3, 4:] = PAD
    mask = (input_ids != PAD).long()
    labels = input_ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return input_ids, mask, labels


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox", "mixtral"])
def test_scores_and_gradients_are_those_of_the_models_own_logits(name):
    """Neither a scale nor a soft cap of the architecture's logits applies to a score."""
    input_ids, mask, labels = pairs()
    own, fused = reward_model(name), reward_model(name)
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    scores = own(**inputs).logits[:, 0]
    chosen, rejected = scores.chunk(2)
    (-torch.nn.functional.logsigmoid(chosen - rejected - 0.5).mean()).backward()
    loss, found = huggingface.apply(linear_bradley_terry_loss, fused, inputs, labels=labels, margin=0.5)
    loss.backward()
    torch.testing.assert_close(found, scores.detach(), rtol=1e-5, atol=1e-6)
    for (parameter, theirs), ours in zip(own.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda text, n=parameter: n + text)
    huggingface.detach(fused)
    assert fused(**inputs).logits[:, 0].equal(scores)


def test_a_model_whose_score_of_the_checked_tokens_is_near_zero_is_taken():
    """The terms of its sum cancel, so the rounding of the sum is large beside the score."""
    model = reward_model("llama")
    tokens = tokens_to_check(model)
    with torch.no_grad():
        hidden = model.eval().base_model(input_ids=tokens).last_hidden_state[0, -1].double()
        for seed in range(50):
            weight = torch.randn(len(hidden), generator=torch.Generator().manual_seed(seed)).double()
            weight -= hidden * (weight @ hidden) / (hidden @ hidden)
            model.score.weight.copy_(weight)
            check_scores(model)


def test_a_score_that_is_more_than_its_layer_is_refused():
    class Doubling(type(reward_model("llama"))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    model = reward_model("llama")
    model.__class__ = Doubling
    with pytest.raises(UnsupportedModelError, match="computes something else than the score of the last token"):
        huggingface.attach(model)
    assert "forward" not in model.__dict__
    hooked = reward_model("llama")
    hooked.score.register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(UnsupportedModelError, match="forward hook"):
        huggingface.attach(hooked)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "gemma2", "phi3", "mixtral"])
def test_models_that_read_positions_keep_packed_sequences_apart(name):
    check_keeps_packed_apart(make_model(name))


@pytest.mark.parametrize("name", ["falcon_h1", "mpt"])
def test_models_that_carry_a_state_or_read_no_positions_do_not(name):
    with pytest.raises(UnsupportedModelError, match="lets packed sequences see each other"):
        check_keeps_packed_apart(make_model(name))
