"""The loss inside a model's forward equals the loss of the model's own logits, for every architecture."""

import pytest
import torch
from huggingface_cases import (
    assert_same_gradients,
    backward,
    by_architecture,
    by_function,
    check_against_own_logits,
    kto,
    loss_of,
)
from models import ARCHITECTURES, from_own_logits, make_batch, make_model
from torch import nn
from transformers import (
    PretrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kto_fused import (
    fused_kto_loss,
    fused_linear_kto_loss,
    huggingface,
    linear_sequence_logps,
    linear_token_logps,
)
from kto_fused.huggingface import forward
from kto_fused.huggingface.config import (
    DIVIDED_BY,
    MULTIPLIED_BY,
    SOFT_CAPPED_BY,
    logit_options,
    max_positions,
)


@by_function
@by_architecture
def test_is_the_loss_of_the_models_own_logits(name, function):
    check_against_own_logits(function, make_model(name))


@by_architecture
def test_bfloat16_models_are_not_refused_for_their_rounding(name):
    model = make_model(name, torch.bfloat16)
    huggingface.attach(model)
    torch.testing.assert_close(kto(model), kto(make_model(name)), rtol=0.01, atol=0.01)


def test_the_architectures_cover_scales_soft_caps_tied_heads_and_biases(monkeypatch):
    """Each scale and each soft cap changes the loss, so the tests above would see it ignored."""
    options = {name: logit_options(make_model(name).config) for name in ARCHITECTURES}
    scales = {name: option["logit_scale"] for name, option in options.items() if option["logit_scale"] != 1}
    assert scales == {
        "granite": pytest.approx(1 / 3),
        "hyperclovax": 0.3,
        "minicpm3": 0.5,
        "inkling_text": 0.5,
        "cohere": 0.25,
        "falcon_h1": 0.3,
    }
    assert {name for name, option in options.items() if option["logit_softcap"]} == {"gemma2", "gemma3_text"}
    tied = {name for name in ARCHITECTURES if getattr(make_model(name).config, "tie_word_embeddings", False)}
    assert tied >= {"qwen2", "gpt2", "gemma2", "gemma3_text"}
    assert make_model("phi").lm_head.bias.abs().min() > 0
    models = {name: make_model(name) for name in [*scales, "gemma2"]}
    losses = {name: kto(model) for name, model in models.items()}
    monkeypatch.setattr(forward, "logit_options", lambda config: {"logit_scale": 1.0, "logit_softcap": None})
    for name, model in models.items():
        assert abs(losses[name] - kto(model)) > 1e-4, name


@pytest.mark.parametrize("name", ["mixtral", "modernbert-decoder"])
def test_apply_to_logits_gives_the_loss_of_the_models_logits(name):
    """The way that remains for a model that ``attach`` refuses."""
    model = make_model(name)
    model_inputs, arguments = make_batch(fused_linear_kto_loss)
    expected = from_own_logits(fused_linear_kto_loss, model, model_inputs, **arguments)
    actual, _ = huggingface.apply_to_logits(fused_kto_loss, model, model_inputs, **arguments)
    torch.testing.assert_close(actual, expected)
    assert_same_gradients(backward(model, actual), backward(model, expected))


@by_architecture
def test_inputs_that_ask_for_a_tuple_change_nothing(name):
    model = make_model(name)
    model_inputs, arguments = make_batch(fused_linear_kto_loss)
    expected = from_own_logits(fused_linear_kto_loss, model, model_inputs, **arguments)
    asked = {**model_inputs, "return_dict": False}
    for function, call in ((fused_linear_kto_loss, huggingface.apply), (fused_kto_loss, huggingface.apply_to_logits)):
        torch.testing.assert_close(call(function, model, asked, **arguments)[0], expected)
    assert isinstance(model(**asked), tuple)


def test_packed_sequences_and_embeddings_as_inputs_give_the_same_loss():
    model = make_model("llama")
    model_inputs, arguments = make_batch(fused_linear_kto_loss)
    is_token = model_inputs["attention_mask"].bool()
    lengths = is_token.sum(1)
    packed = {
        "inputs_embeds": model.get_input_embeddings()(model_inputs["input_ids"][is_token][None]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
    }
    arguments_of_packed = {
        **arguments,
        "labels": arguments["labels"][is_token],
        "cu_seqlens": nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
    }
    expected = kto(model)
    actual = loss_of(fused_linear_kto_loss, model, packed, **arguments_of_packed)
    torch.testing.assert_close(actual, expected)
    assert_same_gradients(backward(model, actual), backward(model, expected))


# ---- a mixture of experts' own loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_router_loss_is_added_to_losses_with_and_without_gradients(name):
    model, twin = make_model(name), make_model(name, output_router_logits=False)
    model_inputs, arguments = make_batch(fused_linear_kto_loss)
    added = model.config.router_aux_loss_coef * model(**model_inputs).aux_loss
    assert added > 0.1
    torch.testing.assert_close(kto(model), kto(twin) + added)
    with torch.no_grad():
        torch.testing.assert_close(kto(model), kto(twin) + added)
    torch.testing.assert_close(kto(model, reduction="none"), kto(twin, reduction="none") + added)
    without = loss_of(fused_linear_kto_loss, model, {**model_inputs, "output_router_logits": False}, **arguments)
    torch.testing.assert_close(without, kto(twin))


def test_router_loss_is_not_added_to_log_probabilities():
    model, twin = make_model("mixtral"), make_model("mixtral", output_router_logits=False)
    model_inputs, arguments = make_batch(linear_sequence_logps)
    arguments |= {"return_metrics": True}
    values = [huggingface.apply(linear_token_logps, of, model_inputs, **arguments)[0] for of in (model, twin)]
    torch.testing.assert_close(*values)


def test_router_loss_is_added_to_a_function_of_the_users_own():
    def summarized(**arguments):
        loss, metrics = fused_linear_kto_loss(**arguments)
        return loss, metrics.summary()

    model = make_model("mixtral")
    model_inputs, arguments = make_batch(fused_linear_kto_loss)
    loss, _ = huggingface.apply(summarized, model, model_inputs, **arguments)
    torch.testing.assert_close(loss, kto(model))


# ---- what a configuration says --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scale", "softcap"),
    [
        *((name, 3.0, None) for name in MULTIPLIED_BY),
        *((name, 1 / 3, None) for name in DIVIDED_BY),
        *((name, 1.0, 3.0) for name in SOFT_CAPPED_BY),
    ],
)
def test_each_name_of_a_scale_or_a_soft_cap_is_read(name, scale, softcap):
    options = logit_options(PretrainedConfig(**{name: 3.0}))
    assert options == {"logit_scale": pytest.approx(scale), "logit_softcap": softcap}
    assert logit_options(PretrainedConfig(**{name: None})) == {"logit_scale": 1.0, "logit_softcap": None}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 2048}, 8192),
        (
            {
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
                "max_position_embeddings": 32768,
            },
            131072,
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                },
                "max_position_embeddings": 131072,
            },
            131072,
        ),
    ],
    ids=["plain", "linear", "yarn", "llama3"],
)
def test_a_stretched_rope_counts_with_its_stretched_length(settings, expected):
    assert max_positions(CONFIG_MAPPING["llama"](**settings)) == expected


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [("gpt2", {"n_positions": 32}, 32), ("xlnet", {}, None), ("mamba", {}, None), ("bloom", {}, None)],
)
def test_positions_are_read_under_other_names_and_may_be_missing(kind, settings, expected):
    assert max_positions(CONFIG_MAPPING[kind](**settings)) == expected
