"""Hugging Face models: the loss inside their forward is the loss of their own logits, whatever wraps them."""

import copy
import functools
import inspect
import io
import os
import sys
import traceback
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from cases import GRAD_TOLERANCE, assert_same_gradient
from models import ARCHITECTURES, TWINS, VOCAB, from_own_logits, make_batch, make_model
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    BertGenerationConfig,
    ElectraConfig,
    ElectraForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import kto_fused
from kto_fused import (
    FusedLinearKTOLoss,
    fused_kto_loss,
    fused_linear_kto_loss,
    huggingface,
    linear_sequence_logps,
    linear_token_logps,
    reference,
)
from kto_fused.huggingface import UnsupportedModelError, forward
from kto_fused.huggingface.config import (
    DIVIDED_BY,
    MULTIPLIED_BY,
    SOFT_CAPPED_BY,
    logit_options,
    max_positions,
    without_padding_mask,
)
from kto_fused.huggingface.forward import call_at_head
from kto_fused.huggingface.inspect import check_is_causal, made_to_run
from kto_fused.measure import peak_bytes

by_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
by_function = pytest.mark.parametrize("function", TWINS, ids=lambda function: function.__name__)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small are fastest on one, also where other work shares the cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def loss_of(function, model, model_inputs, **arguments) -> torch.Tensor:
    result = huggingface.apply(function, model, model_inputs, **arguments)
    return result if function is linear_sequence_logps else result[0]


def backward(model: nn.Module, losses: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients by parameter, of the losses each with a weight of its own; none is left behind."""
    model.zero_grad()
    (losses.flatten() * torch.linspace(1, 2, losses.numel())).sum().backward()
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], roundings=4.0) -> None:
    """Of every parameter; where a gradient vanishes (keys' biases), what is left of the largest one's rounding."""
    assert actual.keys() == expected.keys()
    assert expected
    largest = max(grad.norm().item() for grad in expected.values())
    assert largest > 0
    for name, grad in actual.items():
        try:
            assert_same_gradient(grad, expected[name], floor=GRAD_TOLERANCE[grad.dtype] * largest, roundings=roundings)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def check_against_own_logits(function, model, seed: int = 0) -> None:
    """Value and every gradient."""
    model_inputs, arguments = make_batch(function, seed=seed)
    expected = from_own_logits(function, model, model_inputs, **arguments)
    expected_grads = backward(model, expected)
    actual = loss_of(function, model, model_inputs, **arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert_same_gradients(backward(model, actual), expected_grads)


def kto(model, seed: int = 0, **more) -> torch.Tensor:
    model_inputs, arguments = make_batch(fused_linear_kto_loss, seed=seed)
    return loss_of(fused_linear_kto_loss, model, model_inputs, **{**arguments, **more})


# ---- every architecture -------------------------------------------------------------------------------------------


@by_function
@by_architecture
def test_is_the_loss_of_the_models_own_logits(name, function):
    check_against_own_logits(function, make_model(name))


@by_architecture
def test_bfloat16_models_are_not_refused_for_their_rounding(name):
    model = make_model(name, torch.bfloat16)
    huggingface.attach(model)
    torch.testing.assert_close(kto(model), kto(make_model(name)), rtol=0.01, atol=0.01)


def test_the_architectures_exercise_what_logits_may_be(monkeypatch):
    """A scale, a soft cap, a tied head and a head's bias each stand in the table, and change the loss."""
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


def test_router_loss_is_added_to_a_loss_of_ones_own():
    def summarized(**arguments):
        loss, metrics = fused_linear_kto_loss(**arguments)
        return loss, metrics.summary()

    model = make_model("mixtral")
    model_inputs, arguments = make_batch(fused_linear_kto_loss)
    loss, _ = huggingface.apply(summarized, model, model_inputs, **arguments)
    torch.testing.assert_close(loss, kto(model))


@pytest.mark.parametrize("name", ["mixtral", "modernbert-decoder"])
def test_a_loss_of_the_models_logits(name):
    """The way that is left to a model which is refused."""
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
def test_positions_of_a_stretched_rope(settings, expected):
    assert max_positions(CONFIG_MAPPING["llama"](**settings)) == expected


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [("gpt2", {"n_positions": 32}, 32), ("xlnet", {}, None), ("mamba", {}, None), ("bloom", {}, None)],
)
def test_positions_under_other_names_and_none(kind, settings, expected):
    assert max_positions(CONFIG_MAPPING[kind](**settings)) == expected


def test_padding_on_the_right_changes_nothing():
    model = make_model("llama")
    model_inputs, arguments = make_batch(fused_linear_kto_loss)
    longer = {name: nn.functional.pad(value, (0, 3)) for name, value in model_inputs.items()}
    arguments_of_longer = {**arguments, "labels": nn.functional.pad(arguments["labels"], (0, 3), value=-100)}
    torch.testing.assert_close(
        loss_of(fused_linear_kto_loss, model, longer, **arguments_of_longer),
        loss_of(fused_linear_kto_loss, model, model_inputs, **arguments),
    )


@by_architecture
def test_a_mask_of_padding_on_the_right_is_left_out_where_nothing_needs_it(name):
    """Left out by all but those with an attention of their own (Gemma 2's) or a router's loss; it changes nothing."""
    model = make_model(name)
    model_inputs, arguments = make_batch(linear_sequence_logps)
    left = without_padding_mask(model, model_inputs, "bf16")
    needs_it = name in ("mixtral", "qwen3_moe") or model.config._attn_implementation != "sdpa"
    assert ("attention_mask" in left) == needs_it
    logps, expected = (
        huggingface.apply(linear_sequence_logps, model, inputs, **arguments) for inputs in (left, model_inputs)
    )
    torch.testing.assert_close(logps, expected, rtol=1e-6, atol=0)


def is_mask_left_out(model: nn.Module, mixed_precision: str = "no", **more_inputs) -> bool:
    model_inputs = make_batch(linear_sequence_logps)[0] | more_inputs
    left = without_padding_mask(model, model_inputs, mixed_precision)
    assert left.keys() | {"attention_mask"} == model_inputs.keys()
    return "attention_mask" not in left


def test_a_mask_stays_for_another_attention_for_a_router_and_where_it_has_no_default():
    model = make_model("llama")
    wrapped = nn.Sequential()
    wrapped.module = model  # as DDP does
    assert is_mask_left_out(wrapped)
    assert not is_mask_left_out(wrapped, output_router_logits=True)
    model.set_attn_implementation("eager")
    assert not is_mask_left_out(wrapped)
    model.set_attn_implementation("sdpa")
    backbone = type(model.model)

    class Insistent(backbone):
        def forward(self, input_ids, attention_mask, **options):
            return super().forward(input_ids, attention_mask, **options)

    model.model.__class__ = Insistent
    assert not is_mask_left_out(model)


def test_a_mask_stays_for_batches_longer_than_a_models_positions():
    """OPT looks up positions by it, and has none for padding beyond."""
    model = make_model("opt", max_position_embeddings=8, word_embed_proj_dim=32, ffn_dim=48)
    model_inputs, arguments = make_batch(linear_sequence_logps)
    model_inputs["attention_mask"][:, 8:] = 0
    arguments["labels"][:, 8:] = -100
    assert not is_mask_left_out(model)
    assert is_mask_left_out(make_model("opt", max_position_embeddings=9, word_embed_proj_dim=32, ffn_dim=48))
    assert huggingface.apply(linear_sequence_logps, model, model_inputs, **arguments).isfinite().all()


def test_layers_may_differ_in_their_heads():
    differing = {"num_global_key_value_heads": 1, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0, "head_dim": 8}
    model = make_model("gemma4_text", **differing, **layers)
    model_inputs, arguments = make_batch(linear_sequence_logps)
    left = without_padding_mask(model, model_inputs, "no")
    logps, expected = (
        huggingface.apply(linear_sequence_logps, model, inputs, **arguments) for inputs in (left, model_inputs)
    )
    torch.testing.assert_close(logps, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("capability", "dtype", "mixed_precision", "key_value_heads", "expected"),
    [
        ((9, 0), torch.bfloat16, "no", 2, True),
        ((9, 0), torch.float16, "no", 2, True),
        ((9, 0), torch.float32, "bf16", 2, True),  # autocast is not on yet where the mask is left out
        ((9, 0), torch.float32, "fp16", 2, True),
        ((9, 0), torch.float32, "no", 2, False),  # FlashAttention takes half precision alone
        ((7, 5), torch.float32, "fp16", 2, False),  # and no GPU before Ampere
        ((7, 5), torch.float32, "no", 4, True),  # each head its own keys
    ],
)
def test_a_mask_stays_on_a_gpu_without_a_kernel_for_shared_keys(
    capability, dtype, mixed_precision, key_value_heads, expected, monkeypatch
):
    """Else PyTorch would hold [B, heads, T, T] scores."""
    model = make_model("llama").to(dtype)
    model.config.num_key_value_heads = key_value_heads
    assert is_mask_left_out(model, mixed_precision)  # a CPU has one
    monkeypatch.setattr(type(model), "device", property(lambda _: torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert is_mask_left_out(model, mixed_precision) is expected


def test_packed_sequences_and_embeddings_as_inputs():
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


# ---- PEFT ---------------------------------------------------------------------------------------------------------


def with_lora(model, **settings):
    """A PEFT model whose adapters change its outputs."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **settings}
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))


@by_architecture
def test_lora_is_trained_and_switched_off(name):
    base = make_model(name)
    base_loss = kto(base)
    # PEFT refuses a Mamba layer's projections, and trips over a router that returns two results
    refused = name in ("falcon_h1", "llama4_text")
    model = with_lora(base, **({"target_modules": ["q_proj", "gate_proj"]} if refused else {}))
    for function in TWINS:
        check_against_own_logits(function, model)
    assert {"lora_A", "lora_B"} == {key.split(".")[-3] for key in backward(model, kto(model))}
    assert abs(kto(model) - base_loss) > 1e-5
    with model.disable_adapter():
        torch.testing.assert_close(kto(model), base_loss)


@by_function
def test_a_head_trained_whole_beside_lora(function):
    model = with_lora(make_model("phi"), modules_to_save=["lm_head"])
    with torch.no_grad():
        head = model.get_base_model().lm_head.modules_to_save["default"]
        head.weight += torch.randn_like(head.weight)
    check_against_own_logits(function, model)
    grads = backward(model, kto(model))
    assert [name for name in grads if "lm_head" in name] == [
        "base_model.model.lm_head.modules_to_save.default.weight",
        "base_model.model.lm_head.modules_to_save.default.bias",
    ]
    with model.disable_adapter():
        torch.testing.assert_close(kto(model), kto(make_model("phi")))
    assert abs(kto(model) - kto(make_model("phi"))) > 1e-3


def test_adapters_that_come_after_the_first_loss():
    base = make_model("llama")
    kto(base)
    model = with_lora(base, modules_to_save=["lm_head"])
    check_against_own_logits(fused_linear_kto_loss, model)
    assert any("lm_head" in name for name in backward(model, kto(model)))


# ---- refusals -----------------------------------------------------------------------------------------------------


@contextmanager
def refuses(model: nn.Module, *words: str):
    """The call raises with those words, and leaves every module's forward as it was."""
    before = [(module, own_forwards(module)) for module in model.modules()]
    with pytest.raises(UnsupportedModelError) as error:
        yield
    for word in words:
        assert word in str(error.value)
    for module, forwards in before:
        assert own_forwards(module) == forwards, f"{type(module).__name__} was changed"


def own_forwards(module: nn.Module) -> dict:
    """What an instance holds of its own that has to do with its forward, or with us."""
    return {name: value for name, value in vars(module).items() if "forward" in name or "fused" in name}


@pytest.mark.parametrize(
    "on_the_head", [{"target_modules": ["q_proj", "lm_head"]}, {"trainable_token_indices": {"lm_head": [3, 4]}}]
)
def test_refuses_an_adapter_on_the_head(on_the_head):
    model = with_lora(make_model("llama"), **on_the_head)
    with refuses(model, "LM head carries an adapter", "leave 'lm_head' out of target_modules", "modules_to_save"):
        huggingface.attach(model)


def test_refuses_an_adapter_that_comes_to_the_head_later():
    model = make_model("llama")
    kto(model)
    model = with_lora(model, target_modules=["q_proj", "lm_head"])
    with pytest.raises(UnsupportedModelError, match="LM head carries an adapter"):
        kto(model)
    huggingface.detach(model)
    assert "forward" not in model.get_base_model().__dict__


def test_refuses_a_wrapper_that_kept_the_forward_from_before():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)
    with pytest.raises(UnsupportedModelError, match=r"PeftModelForCausalLM.*attach\(model\) before the wrapping"):
        kto(peft.get_peft_model(make_model("llama"), config))
    model = make_model("llama")
    huggingface.attach(model)
    check_against_own_logits(fused_linear_kto_loss, peft.get_peft_model(model, config))


def test_refuses_prompts_that_are_learned():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(make_model("llama"), config)
    with refuses(model, "learns prompts", "PROMPT_TUNING", "use LoRA"):
        huggingface.attach(model)


class CastingLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).float()


def test_refuses_a_head_that_is_no_plain_linear_layer():
    model = make_model("llama")
    model.lm_head = CastingLinear(32, VOCAB)
    with refuses(model, "LM head is a CastingLinear", "keep the head out of quantisation"):
        huggingface.attach(model)


def test_refuses_a_quantised_head():
    model = make_model("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
    with refuses(model, "torch.int8", "keep the head out"):
        huggingface.attach(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("done_to_logits", [lambda x: 1.01 * x, lambda x: 30 * torch.tanh(x / 30)])
def test_refuses_what_half_precision_and_small_logits_would_hide(dtype, done_to_logits):
    model = make_model("llama", dtype)

    class Capped(type(model)):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            return None if outputs is None else type(outputs)(logits=done_to_logits(outputs.logits))

    Capped.__module__ = type(model).__module__
    model.__class__ = Capped
    with torch.no_grad():
        model.lm_head.weight.mul_(0.01)
    with refuses(model, "computes something else there", "logits"):
        huggingface.attach(model)


def test_the_check_runs_where_the_models_attention_does_not(monkeypatch):
    """A GPU's kernel, while the model still lies on the CPU."""

    def kernel(*args, **kwargs):
        raise RuntimeError("needs a GPU")

    model = make_model("llama")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "gpu_kernel", kernel)
    model.config._attn_implementation = "gpu_kernel"
    huggingface.attach(model)
    assert model.config._attn_implementation == "gpu_kernel"
    with pytest.raises(RuntimeError, match="needs a GPU"):
        model(input_ids=torch.tensor([[1, 2]]))


def test_refuses_a_patched_head():
    model = make_model("llama")
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: 2 * plain(x)
    with refuses(model, "a forward of its own", "remove it"):
        huggingface.attach(model)


def test_refuses_a_model_spread_by_a_device_map():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = accelerate.dispatch_model(make_model("llama"), {"": "cpu"}, force_hooks=True)
    with refuses(model, "device_map", "on one device"):
        huggingface.attach(model)


def test_refuses_data_parallel():
    model = nn.DataParallel(make_model("llama"))
    with refuses(model, "nn.DataParallel", "torchrun", "CUDA_VISIBLE_DEVICES"):
        huggingface.attach(model)


def test_refuses_an_encoder_decoder():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **sizes))
    with refuses(model, "T5ForConditionalGeneration is no causal language model", "AutoModelForCausalLM"):
        huggingface.attach(model)


def test_refuses_a_model_that_sees_what_it_is_asked_for():
    """BERT's attention sees later tokens, unless it is told to be a decoder."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    configs = [BertGenerationConfig(vocab_size=VOCAB, is_decoder=is_decoder, **sizes) for is_decoder in (False, True)]
    model, decoder = (AutoModelForCausalLM.from_config(config) for config in configs)
    with refuses(model, "BertGenerationDecoder is no causal language model", "tokens after it", "is_decoder = True"):
        huggingface.attach(model)
    huggingface.attach(decoder)


def test_refuses_a_model_whose_backbone_it_does_not_find():
    model = make_model("llama")
    model.base_model_prefix, model.layers = "language_model", model.model
    del model.model
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no base_model beside its LM head"):
        call_at_head(model, None)


def test_refuses_layers_between_the_hidden_states_and_the_head():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = ElectraForCausalLM(ElectraConfig(vocab_size=VOCAB, embedding_size=24, is_decoder=True, **sizes))
    with refuses(model, "hidden states are 32 wide and its LM head takes 24", "loss_from='logits'"):
        huggingface.attach(model)


def test_refuses_a_model_without_a_head():
    model = make_model("llama").model
    with refuses(model, "LlamaModel is no causal language model", "AutoModelForCausalLM"):
        huggingface.attach(model)


def test_refuses_the_meta_device():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_model("llama").config)
    with refuses(model, "meta device", "load its weights first"):
        huggingface.attach(model)


def test_refuses_weights_that_zero3_partitioned_before_there_is_an_engine():
    model = make_model("llama")
    model.model.embed_tokens.weight.ds_id = 0  # as DeepSpeed marks them
    with refuses(model, "DeepSpeed ZeRO-3", "make the engine first"):
        huggingface.attach(model)


def test_refuses_an_architecture_with_logits_of_its_own():
    model = make_model("modernbert-decoder")  # a layer more before its head
    name = type(model).__name__
    with refuses(model, f"{name}'s logits differ", "computes something else", "losses that take logits"):
        huggingface.attach(model)


@pytest.mark.parametrize("name", ["llama", "minicpm3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refuses_logits_that_are_a_tenth_too_large(name, dtype):
    model = make_model(name, dtype)
    plain = model.forward

    def patched(*args, **kwargs):
        outputs = plain(*args, **kwargs)
        outputs.logits = outputs.logits * 1.1
        return outputs

    model.forward = patched
    with refuses(model, f"{type(model).__name__}'s logits differ"):
        huggingface.attach(model)


def test_refuses_logits_of_other_shape_than_the_heads():
    model = make_model("llama")
    plain = model.forward

    def patched(*args, **kwargs):
        outputs = plain(*args, **kwargs)
        outputs.logits = outputs.logits[..., :-1]
        return outputs

    model.forward = patched
    with refuses(model, f"LlamaForCausalLM's logits are (1, 8, {VOCAB - 1}), its LM head gives (1, 8, {VOCAB})"):
        huggingface.attach(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_weights_that_are_not_finite_and_says_so(value):
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = value
    with refuses(model, "LlamaForCausalLM's logits are not finite: its weights hold NaN or infinities"):
        huggingface.attach(model)


def test_the_check_takes_no_more_positions_than_a_model_has():
    model = make_model("gpt2", n_positions=4)
    huggingface.attach(model)
    input_ids = torch.arange(4)[None]
    logps = huggingface.apply(linear_sequence_logps, model, {"input_ids": input_ids}, labels=input_ids)
    torch.testing.assert_close(logps, reference.sequence_logps(model(input_ids).logits, input_ids).double())


def test_refuses_a_router_loss_it_does_not_know(monkeypatch):
    jetmoe = make_model("jetmoe", num_local_experts=4, num_experts_per_tok=2, kv_channels=8, output_router_logits=True)
    mixtral = make_model("mixtral")
    other = lambda gate_logits, num_experts, num_keys=1, top_k=2, attention_mask=None: torch.zeros(())  # noqa: E731
    monkeypatch.setattr(sys.modules[type(mixtral).__module__], "load_balancing_loss_func", other)
    own = make_model("mixtral")
    kinds = reversed([kind for kind in type(own).__mro__ if kind.__module__ == type(own).__module__])
    members = {name: value for kind in kinds for name, value in vars(kind).items() if name != "__dict__"}
    own.__class__ = type("OwnMixtral", (PreTrainedModel,), {**members, "__module__": __name__})  # no modeling file's
    for model in (jetmoe, mixtral, own):
        with refuses(model, "router loss is not a known one", "output_router_logits = False"):
            huggingface.attach(model)
        model.config.output_router_logits = False
        huggingface.attach(model)


def test_refuses_a_router_loss_of_unknown_weight_beside_logits_too():
    model = make_model("mixtral")
    del model.router_aux_loss_coef
    model_inputs, arguments = make_batch(fused_linear_kto_loss)
    assert model(**model_inputs).aux_loss > 0
    with refuses(model, "router loss is not a known one", "output_router_logits = False"):
        huggingface.apply_to_logits(fused_kto_loss, model, model_inputs, **arguments)
    model.config.output_router_logits = False
    loss, _ = huggingface.apply_to_logits(fused_kto_loss, model, model_inputs, **arguments)
    assert loss.isfinite()


def test_what_holds_no_model_is_a_type_error():
    with pytest.raises(TypeError, match=r"must be or wrap a transformers.PreTrainedModel, got Linear"):
        huggingface.attach(nn.Linear(2, 2))


def test_refuses_a_configuration_of_tuples():
    with pytest.raises(UnsupportedModelError, match=r"^model\.config\.return_dict is False.*set it to True$"):
        kto(make_model("llama", return_dict=False))


@pytest.mark.parametrize("value", [None, 5.0, 1.0])
@pytest.mark.parametrize("name", ["logit_scale", "logit_softcap"])
def test_what_the_configuration_says_of_logits_is_not_an_argument(name, value):
    """Not even a default, which would take the configuration's place."""
    model = make_model("gemma2")
    model_inputs, arguments = make_batch(fused_linear_kto_loss)
    for function, call in ((fused_linear_kto_loss, huggingface.apply), (fused_kto_loss, huggingface.apply_to_logits)):
        with pytest.raises(ValueError, match=f"{name}={value} is given, expected none: the model's configuration"):
            call(function, model, model_inputs, **{**arguments, name: value})
        with pytest.raises(ValueError, match=f"{name}={value} is given, expected none: the model's configuration"):
            call(functools.partial(function, **{name: value}), model, model_inputs, **arguments)
    held = FusedLinearKTOLoss(**{name: value})
    for function in (held, functools.partial(held, beta=0.2)):
        with pytest.raises(ValueError, match=f"{name}={value} is given, expected none: the model's configuration"):
            huggingface.apply(function, model, model_inputs, **arguments)


@pytest.mark.parametrize(
    ("function", "call"),
    [(fused_linear_kto_loss, huggingface.apply), (fused_kto_loss, huggingface.apply_to_logits)],
    ids=["apply", "apply_to_logits"],
)
def test_inputs_that_are_no_mapping_are_a_type_error(function, call):
    model_inputs, arguments = make_batch(fused_linear_kto_loss)
    with pytest.raises(TypeError, match=r"^model_inputs must be a mapping of the model's arguments.*got Tensor$"):
        call(function, make_model("llama"), model_inputs["input_ids"], **arguments)


# ---- without a loss the model is what it was ----------------------------------------------------------------------


def test_attaching_leaves_modes_random_numbers_and_gradients_alone():
    model = make_model("llama")
    model.model.layers[0].eval()
    modes, random_state = [module.training for module in model.modules()], torch.get_rng_state()
    huggingface.attach(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        (torch.float32, "cpu", "eager"),
        (torch.bfloat16, "cpu", "eager"),
        (torch.float32, "cuda", "eager"),  # FlashAttention takes half precision alone, and autocast is not on yet
        (torch.bfloat16, "cuda", "gpu_kernel"),
    ],
)
def test_what_is_checked_runs_an_attention_that_can(dtype, device, expected, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "gpu_kernel", None)
    model = make_model("llama", dtype)
    model.set_attn_implementation("gpu_kernel")
    with made_to_run(model, torch.device(device)):
        assert model.config._attn_implementation == expected


@pytest.mark.parametrize("name", ["llama", "qwen2"], ids=["untied", "tied"])
@pytest.mark.parametrize("kept", ["head", "norms", "all but the head"])
def test_a_model_of_two_dtypes_is_attached_outside_of_the_autocast_it_trains_under(name, kept):
    model = make_model(name, torch.bfloat16)
    head = model.get_output_embeddings()
    layers = {"head": head, "norms": model.model.norm, "all but the head": model.model}
    layers[kept].float()
    if kept == "all but the head":
        head.weight = nn.Parameter(head.weight.bfloat16())
    huggingface.attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        kto(model).backward()
    assert head.weight.grad.dtype == head.weight.dtype
    assert head.weight.grad.abs().max() > 0


class Unusual(PreTrainedModel):
    """A causal model whose configuration does not say how many tokens there are, and which needs a mask."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self.embeddings, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids, attention_mask, **_):
        return CausalLMOutput(logits=self.head((self.embeddings(input_ids) * attention_mask[..., None]).cumsum(1)))


def test_a_model_of_ones_own_is_seen_to_be_causal():
    check_is_causal(Unusual(PretrainedConfig()))


def test_a_model_that_is_causal_by_its_mask_alone_is_refused():
    model = make_model("llama")
    backbone = type(model.model)

    class SeesAllWithoutAMask(backbone):
        def forward(self, input_ids=None, attention_mask=None, **options):
            output = super().forward(input_ids, attention_mask, **options)
            if attention_mask is None:
                output.last_hidden_state = output.last_hidden_state.flip(1).cumsum(1).flip(1)
            return output

    model.model.__class__ = SeesAllWithoutAMask
    with pytest.raises(UnsupportedModelError, match="no causal language model"):
        check_is_causal(model)


def test_attaching_under_another_default_device():
    model = make_model("llama")
    with torch.device("meta"):  # as a GPU would be
        huggingface.attach(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_logits_and_generation_are_unchanged(name):
    model = make_model(name).eval()
    model_inputs, _ = make_batch(linear_sequence_logps)
    prompt = {"input_ids": model_inputs["input_ids"][:, :4], "max_new_tokens": 5, "do_sample": False}
    logits, tokens = model(**model_inputs).logits, model.generate(**prompt)
    kto(model)
    assert torch.equal(model(**model_inputs).logits, logits)
    assert torch.equal(model.generate(**prompt), tokens)
    with pytest.raises(ValueError, match="nonsense"):  # generate looks arguments up in forward's signature
        model.generate(**prompt, nonsense=1)


def test_each_model_keeps_its_own_signature():
    models = [make_model("llama"), make_model("gpt2")]
    before = [inspect.signature(model.forward) for model in models]
    for model in models:
        huggingface.attach(model)
    assert [inspect.signature(model.forward) for model in models] == before
    assert before[0] != before[1]


def test_saving_and_loading(tmp_path):
    model = make_model("llama")
    keys = model.state_dict().keys()
    huggingface.attach(model)
    assert model.state_dict().keys() == keys
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    model_inputs, _ = make_batch(linear_sequence_logps)
    assert torch.equal(loaded(**model_inputs).logits, model.eval()(**model_inputs).logits)
    assert torch.equal(kto(loaded), kto(model))


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_uses_its_own_weights(duplicate):
    model = make_model("llama")
    loss = kto(model)
    other = duplicate(model)
    with torch.no_grad():
        other.lm_head.weight *= 0.5
        other.model.norm.weight *= 0.9
    assert torch.equal(kto(model), loss)
    assert abs(kto(other) - loss) > 1e-3
    check_against_own_logits(fused_linear_kto_loss, other)
    model_inputs, _ = make_batch(linear_sequence_logps)
    hidden = other.model(**model_inputs).last_hidden_state
    assert torch.equal(other(**model_inputs).logits, hidden @ other.lm_head.weight.T)
    assert torch.equal(kto(model), loss)


def test_detaching_restores_the_model_and_attaching_twice_is_attaching_once():
    model = make_model("llama")
    before = [(module, own_forwards(module)) for module in model.modules()]
    huggingface.attach(model)
    forward, head_forward = model.forward, model.lm_head.forward
    huggingface.attach(model)
    assert model.forward is forward
    assert model.lm_head.forward is head_forward
    huggingface.detach(model)
    huggingface.detach(model)
    for module, forwards in before:
        assert own_forwards(module) == forwards
    torch.testing.assert_close(kto(model), kto(make_model("llama")))


def test_an_earlier_patch_of_forward_still_runs_and_comes_back():
    model = make_model("llama")
    plain, calls = model.forward, []

    def patched(*args, **kwargs):
        calls.append(kwargs)
        return plain(*args, **kwargs)

    model.forward = patched
    huggingface.attach(model)
    calls.clear()
    model_inputs, _ = make_batch(linear_sequence_logps)
    model(**model_inputs)
    assert len(calls) == 1
    assert calls[0].keys() == model_inputs.keys()
    huggingface.detach(model)
    assert model.forward is patched


def test_a_head_that_is_replaced_after_attaching():
    model = make_model("llama")
    kto(model)
    model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    check_against_own_logits(fused_linear_kto_loss, model)


# ---- wrappers in one process --------------------------------------------------------------------------------------


@pytest.mark.parametrize("attached_first", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_once_for_every_step(name, attached_first):
    torch.use_deterministic_algorithms(False)  # which torch.compile guards on
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    model, eager = make_model(name), make_model(name)
    if attached_first:
        huggingface.attach(model)
    compiled = torch.compile(model, backend=count)
    numbers = []
    for seed in range(4):
        z0 = torch.tensor(0.1 * seed)
        options = {"reference_point": z0, "beta": 0.2, "desirable_weight": 1.3, "seed": seed}
        actual, expected = kto(compiled, **options), kto(eager, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert_same_gradients(backward(model, actual), backward(eager, expected))
        numbers.append(len(graphs))
    assert numbers == [1] * 4


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("is_checkpointing", [True, False])
def test_autocasts_copies_of_the_layers_are_let_go_before_the_loss(is_checkpointing, monkeypatch):
    """Unless the graph holds them too, and the next call of the same step would make others."""
    model = make_model("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    if is_checkpointing:
        model.gradient_checkpointing_enable()
    model_inputs, arguments = make_batch(fused_linear_kto_loss)
    num_weights = sum(parameter.numel() for parameter in model.model.layers.parameters())

    def large_loss(**given):
        torch.empty(2 * num_weights)
        return fused_linear_kto_loss(**given)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            losses = [loss_of(large_loss, model, model_inputs, **arguments) for _ in range(2)]
        sum(losses).backward()

    step()  # it has gradients from here on
    peaks = []
    for clear in (torch.clear_autocast_cache, lambda: None):
        monkeypatch.setattr(torch, "clear_autocast_cache", clear)
        peaks.append(peak_bytes(step, torch.device("cpu")))
    assert peaks[1] - peaks[0] == pytest.approx(2 * num_weights * is_checkpointing, rel=0.1)


def test_autocast_rounds_the_gemms_inputs_and_no_logit():
    model = make_model("phi")
    model_inputs, arguments = make_batch(linear_sequence_logps)
    huggingface.attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        actual = huggingface.apply(linear_sequence_logps, model, model_inputs, **arguments)
        hidden = model.model(**model_inputs).last_hidden_state
        own = from_own_logits(linear_sequence_logps, model, model_inputs, **arguments)
    weight, bias = model.lm_head.weight.bfloat16().double(), model.lm_head.bias.double()
    logits = nn.functional.linear(hidden.bfloat16().double(), weight, bias)
    exact = reference.sequence_logps(logits, arguments["labels"])
    torch.testing.assert_close(actual, exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(actual, own.double(), rtol=0, atol=0.5)
    assert (own - exact).abs().max() > 1e-3  # the model's own are rounded
    grads, own_grads = backward(model, actual), backward(model, own)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert (grad - own_grads[name]).norm() <= 0.05 * own_grads[name].norm() + 0.01, name


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_gradient_checkpointing(name, use_reentrant):
    model = make_model(name)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    check_against_own_logits(fused_linear_kto_loss, model)


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_prepared_by_accelerate_with_mixed_precision(accelerator):
    model = make_model("llama")
    huggingface.attach(model)
    prepared = accelerator.prepare(model)
    loss = kto(prepared)
    assert loss.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss, kto(make_model("llama")))
    assert loss != kto(make_model("llama"))
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    torch.testing.assert_close(kto(unwrapped), kto(make_model("llama")))


def test_refuses_a_model_that_accelerate_prepared_first(accelerator):
    model = accelerator.prepare(make_model("llama"))
    with refuses(model, "prepared by accelerate before", "attach(model) before accelerator.prepare(model)"):
        huggingface.attach(model)


# ---- wrappers over two processes ----------------------------------------------------------------------------------

ACROSS_RANKS = {}


def across_ranks(check):
    """A test of two processes: one pair runs all of them, ``outcomes`` holds what became of each."""
    ACROSS_RANKS[check.__name__] = check

    def test(outcomes):
        for outcome in outcomes:
            if (reason := outcome[check.__name__]).startswith("skipped: "):
                pytest.skip(reason.removeprefix("skipped: "))
            assert reason == "passed", reason

    return test


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_all, (folder,), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


def run_all(rank: int, folder) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    outcome = {}
    for name, check in ACROSS_RANKS.items():
        try:
            check()
            outcome[name] = "passed"
        except pytest.skip.Exception as reason:
            outcome[name] = f"skipped: {reason}"
        except Exception:
            outcome[name] = f"rank {rank}: {traceback.format_exc()}"
    torch.save(outcome, folder / str(rank))
    dist.destroy_process_group()


def half(rank: int, seed: int) -> tuple[dict, dict]:
    model_inputs, arguments = make_batch(fused_linear_kto_loss, seed=seed)
    rows = slice(2 * rank, 2 * rank + 2)
    model_inputs = {name: value[rows] for name, value in model_inputs.items()}
    arguments = {name: value if name == "reference_point" else value[rows] for name, value in arguments.items()}
    return model_inputs, arguments


def both_losses(wrapped: nn.Module, plain: nn.Module, seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """This rank's loss, and those of both ranks' halves from the plain model's logits."""
    expected = []
    for rank in range(2):
        model_inputs, arguments = half(rank, seed)
        expected.append(from_own_logits(fused_linear_kto_loss, plain, model_inputs, **arguments))
    model_inputs, arguments = half(dist.get_rank(), seed)
    actual = loss_of(fused_linear_kto_loss, wrapped, model_inputs, **arguments)
    torch.testing.assert_close(actual, expected[dist.get_rank()], rtol=1e-5, atol=1e-5)
    return actual, expected


def check_training(wrapped: nn.Module, plain: nn.Module) -> None:
    """Two steps on the ranks' halves are two steps of one process on both; the reference path follows."""
    models = [huggingface.unwrap(model) for model in (wrapped, plain)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for seed in range(2):
        actual, losses = both_losses(wrapped, plain, seed)
        actual.backward()
        (sum(losses) / 2).backward()
        grads, expected = (
            {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None} for model in models
        )
        assert_same_gradients(grads, expected)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        model_inputs, arguments = half(dist.get_rank(), seed)
        with torch.no_grad():
            logps = loss_of(linear_sequence_logps, wrapped, model_inputs, labels=arguments["labels"])
            expected = from_own_logits(linear_sequence_logps, plain, model_inputs, labels=arguments["labels"])
            torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-4)


@across_ranks
def test_ddp():
    check_training(DistributedDataParallel(make_model("llama")), make_model("llama"))


@across_ranks
def test_ddp_that_looks_for_unused_parameters():
    model = DistributedDataParallel(make_model("mixtral"), find_unused_parameters=True)
    check_training(model, make_model("mixtral"))


@across_ranks
def test_ddp_with_a_static_graph():
    check_training(DistributedDataParallel(make_model("mixtral"), static_graph=True), make_model("mixtral"))


def sharded(model: nn.Module, tail: bool = False, **options) -> nn.Module:
    """Layers and root each a group of FSDP2; ``tail``: the last norm and the head another, as accelerate makes it."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    if tail:
        fully_shard([model.model.norm, model.lm_head], mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


@across_ranks
def test_fsdp2_of_layers_and_root():
    check_training(sharded(make_model("llama")), make_model("llama"))


@across_ranks
def test_fsdp2_with_the_head_in_a_group_of_its_own():
    check_training(sharded(make_model("llama"), tail=True), make_model("llama"))


@across_ranks
def test_fsdp2_with_a_tied_head():
    check_training(sharded(make_model("gemma2")), make_model("gemma2"))


@across_ranks
def test_fsdp2_attached_first():
    model = make_model("llama")
    huggingface.attach(model)
    check_training(sharded(model, tail=True), make_model("llama"))


@across_ranks
def test_fsdp2_of_a_mixture_of_experts():
    check_training(sharded(make_model("mixtral")), make_model("mixtral"))


@across_ranks
def test_fsdp2_with_lora_whose_adapters_are_off_for_the_reference():
    plain = with_lora(make_model("llama"), modules_to_save=["lm_head"])
    model = with_lora(make_model("llama"), modules_to_save=["lm_head"])
    sharded(model.get_base_model())
    check_training(model, plain)
    model_inputs, arguments = half(0, 0)
    with torch.no_grad(), model.disable_adapter():
        logps = loss_of(linear_sequence_logps, model, model_inputs, labels=arguments["labels"])
    expected = loss_of(linear_sequence_logps, make_model("llama"), model_inputs, labels=arguments["labels"])
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-4)


def sharded_by_accelerate(model: nn.Module, mp_policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    """By its own function, called directly because its ``Accelerator`` shards on no CPU."""
    utils = pytest.importorskip("accelerate.utils", reason="accelerate is not installed")
    plugin = utils.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(model.model.layers[0]).__name__],
        mixed_precision_policy=mp_policy,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        torch_device_mesh={("ranks",): dist.device_mesh.init_device_mesh("cpu", (2,))},
        parallelism_config=SimpleNamespace(fsdp_dim_names=["ranks"]),
        mixed_precision="no",
        device=torch.device("cpu"),
        is_main_process=dist.get_rank() == 0,
    )
    huggingface.attach(model)
    model = utils.fsdp_utils.fsdp2_prepare_model(accelerator, model)
    assert type(model.lm_head) is not nn.Linear  # which shards the head by itself
    return model


@across_ranks
def test_fsdp2_as_accelerate_prepares_it():
    check_training(sharded_by_accelerate(make_model("llama")), make_model("llama"))


@across_ranks
def test_fsdp2_as_accelerate_prepares_a_tied_head():
    check_training(sharded_by_accelerate(make_model("gemma2")), make_model("gemma2"))


def check_nothing_is_rounded(shard) -> None:
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16)
    model = shard(make_model("llama"), mp_policy=policy)
    seen = {}

    def watched(hidden, lm_head_weight, **arguments):
        loss, metrics = fused_linear_kto_loss(hidden, lm_head_weight, **arguments)
        loss.register_hook(lambda grad: seen.update(grad=grad))
        seen.update(loss=loss.detach(), metrics=metrics, dtype=lm_head_weight.dtype, **arguments)
        return loss, metrics

    model_inputs, arguments = half(dist.get_rank(), 0)
    loss, metrics = huggingface.apply(watched, model, model_inputs, **arguments, reduction="none")
    assert seen["dtype"] == torch.bfloat16
    assert torch.equal(seen["ref_logps"], arguments["ref_logps"])
    assert not torch.equal(arguments["ref_logps"], arguments["ref_logps"].bfloat16().float())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, seen["loss"])
    assert not torch.equal(loss, loss.bfloat16().float())
    assert metrics is seen["metrics"]
    assert metrics.logps.dtype != torch.bfloat16
    weights = torch.tensor([1 / 3, 1 / 7])
    (loss * weights).sum().backward()
    assert torch.equal(seen["grad"], weights)
    plain = make_model("llama")
    for rank in range(2):
        model_inputs, arguments = half(rank, 0)
        loss = loss_of(fused_linear_kto_loss, plain, model_inputs, **arguments, reduction="none")
        (loss * weights).sum().div(2).backward()
    for name, parameter in plain.named_parameters():
        grad = whole(model.get_parameter(name).grad)
        assert grad.dtype == torch.float32
        assert (grad - parameter.grad).norm() <= 0.03 * parameter.grad.norm(), name


@across_ranks
def test_fsdp2_in_mixed_precision_rounds_no_loss():
    check_nothing_is_rounded(sharded)


@across_ranks
def test_fsdp2_in_mixed_precision_rounds_no_loss_of_a_head_in_a_group_of_its_own():
    check_nothing_is_rounded(partial(sharded, tail=True))


@across_ranks
def test_fsdp2_in_mixed_precision_as_accelerate_prepares_it_rounds_no_loss():
    check_nothing_is_rounded(sharded_by_accelerate)


@across_ranks
def test_deepspeed_zero3():
    deepspeed = pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE="2")
    model, plain = make_model("llama"), make_model("llama")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (model, plain)]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizers[0],
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "gradient_clipping": 0.0,  # 1 unless told
            "zero_allow_untested_optimizer": True,
        },
    )
    assert model.lm_head.weight.numel() == 0
    for seed in range(2):
        actual, losses = both_losses(engine, plain, seed)
        engine.backward(actual)
        engine.step()
        optimizers[1].zero_grad()
        (sum(losses) / 2).backward()
        optimizers[1].step()
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            torch.testing.assert_close(parameter.data, plain.get_parameter(name).data, rtol=0, atol=1e-6)


# ---- hooks on the LM head -----------------------------------------------------------------------------------------


def forget(*_) -> None: ...


@pytest.mark.parametrize(
    ("register", "kind"),
    [
        ("register_forward_hook", "forward hook"),
        ("register_full_backward_hook", "backward hook"),
        ("register_full_backward_pre_hook", "backward pre-hook"),
    ],
)
@pytest.mark.parametrize("is_attached", [False, True], ids=["before attaching", "after"])
def test_hooks_that_expect_logits_are_refused(register, kind, is_attached):
    model = make_model("llama")
    if is_attached:
        huggingface.attach(model)
    handle = getattr(model.get_output_embeddings(), register)(forget)
    message = rf"^LlamaForCausalLM's LM head has a {kind} \(test_huggingface.forget\).*remove it.*loss_from='logits'"
    input_ids = torch.arange(8).view(1, 8)
    call = functools.partial(
        huggingface.apply, linear_sequence_logps, model, {"input_ids": input_ids}, labels=input_ids
    )
    with pytest.raises(huggingface.UnsupportedModelError, match=message):
        call()
    handle.remove()
    assert call().isfinite().all()


@pytest.mark.parametrize("kind", ["pre-hook", "weight_norm", "old weight_norm"])
def test_pre_hooks_and_parametrizations_of_the_head_take_part(kind):
    """They change what goes into the head, which the fused loss takes at the same place."""
    model = make_model("llama").float()
    head = model.get_output_embeddings()
    if kind == "pre-hook":
        head.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))
    elif kind == "weight_norm":
        torch.nn.utils.parametrizations.weight_norm(head)
    else:
        torch.nn.utils.weight_norm(head)
    input_ids = torch.arange(8).view(1, 8)
    functions = (huggingface.apply, linear_sequence_logps), (huggingface.apply_to_logits, kto_fused.sequence_logps)
    found = []
    for apply, function in functions:
        model.zero_grad()
        logps = apply(function, model, {"input_ids": input_ids}, labels=input_ids)
        logps.sum().backward()
        found.append((logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (fused, fused_grads), (plain, plain_grads) = found
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    for name, grad in plain_grads.items():
        torch.testing.assert_close(fused_grads[name], grad, rtol=1e-3, atol=1e-5, msg=name)
