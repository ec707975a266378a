"""The attention mask of padding on the right is left out, and stays for the models that need it."""

import pytest
import torch
from huggingface_cases import by_architecture, loss_of
from models import make_batch, make_model
from torch import nn

from kto_fused import (
    fused_linear_kto_loss,
    huggingface,
    linear_sequence_logps,
)
from kto_fused.huggingface.padding import without_padding_mask


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
    """A router's loss needs the mask, and so does an attention other than PyTorch's (Gemma 2's)."""
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
    wrapped.module = model  # as in DDP
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
    """OPT looks up positions by the mask, and has no position for padding beyond its last one."""
    model = make_model("opt", max_position_embeddings=8, word_embed_proj_dim=32, ffn_dim=48)
    model_inputs, arguments = make_batch(linear_sequence_logps)
    model_inputs["attention_mask"][:, 8:] = 0
    arguments["labels"][:, 8:] = -100
    assert not is_mask_left_out(model)
    assert is_mask_left_out(make_model("opt", max_position_embeddings=9, word_embed_proj_dim=32, ffn_dim=48))
    assert huggingface.apply(linear_sequence_logps, model, model_inputs, **arguments).isfinite().all()


def test_a_mask_is_harmless_where_layers_differ_in_their_heads():
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
        ((9, 0), torch.float32, "bf16", 2, True),  # autocast is not on yet when the mask is left out
        ((9, 0), torch.float32, "fp16", 2, True),
        ((9, 0), torch.float32, "no", 2, False),  # FlashAttention takes only half precision
        ((7, 5), torch.float32, "fp16", 2, False),  # FlashAttention needs Ampere or later
        ((7, 5), torch.float32, "no", 4, True),  # each head has its own keys
    ],
)
def test_a_mask_stays_on_a_gpu_without_a_kernel_for_shared_keys(
    capability, dtype, mixed_precision, key_value_heads, expected, monkeypatch
):
    """Without the mask PyTorch would write the scores [B, heads, T, T] to memory there."""
    model = make_model("llama").to(dtype)
    model.config.num_key_value_heads = key_value_heads
    assert is_mask_left_out(model, mixed_precision)  # a CPU has a kernel
    monkeypatch.setattr(type(model), "device", property(lambda _: torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert is_mask_left_out(model, mixed_precision) is expected
