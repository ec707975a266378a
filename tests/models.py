"""Tiny random models of every architecture that the fused losses are tested with, and batches for them."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kto_fused import fused_linear_dpo_loss, fused_linear_kto_loss, linear_sequence_logps, reference

VOCAB = 101
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
SOFT_CAP = {"final_logit_softcapping": 5.0, "head_dim": 8}
MIXTURE = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_chunk_size": 8}

# Settings by model_type. They make the scale, soft cap or head that is special to an architecture change its logits.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "mistral": {},
    "gemma2": SOFT_CAP,
    "gemma3_text": SOFT_CAP,
    "phi3": {},
    "phi": NO_DROPOUT,  # a head with a bias
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **NO_DROPOUT},
    "gpt_neox": {"attention_dropout": 0.0, "hidden_dropout": 0.0},
    "granite": {"logits_scaling": 3.0},
    "hyperclovax": {"logits_scaling": 0.3},  # multiplies by the number that Granite divides by
    "minicpm3": {"dim_model_base": 16, "num_key_value_heads": 4, **LATENT},  # scales its hidden states, not its logits
    "inkling_text": {"logits_mup_width_multiplier": 2.0},  # scales its hidden states too
    "cohere": {"logit_scale": 0.25},
    # the scale is the name of a rule, which the model does not follow
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "logit_scale": "inv_sqrt_d_model"},
    "olmo2": {},
    "falcon_h1": {"lm_head_multiplier": 0.3, **MAMBA},
    "mixtral": {"num_local_experts": 4, **MIXTURE},
    "llama4_text": {
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "head_dim": 8,
    },  # no base_model
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, **MIXTURE},
}

# each function of hidden states, and its twin that takes logits
TWINS = {
    fused_linear_kto_loss: reference.kto_loss,
    fused_linear_dpo_loss: reference.dpo_loss,
    linear_sequence_logps: reference.sequence_logps,
}


def make_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random model in training mode. Its biases and norms are random too, and its logits are a few nats."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(name, **{**SIZES, **ARCHITECTURES.get(name, {}), **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.get_output_embeddings().weight *= 4
    return model.to(dtype).train()


def make_batch(function, batch: int = 4, seq_len: int = 9, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (model_inputs, arguments) for ``function``: prompts of three tokens, and two sequences padded behind."""
    random = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (batch, seq_len), generator=random)
    lengths = torch.tensor([seq_len - 3, seq_len, seq_len - 1, seq_len]).repeat(batch // 4 + 1)[:batch]
    attention_mask = (torch.arange(seq_len) < lengths[:, None]).long()
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :3] = -100
    arguments: dict[str, Any] = {"labels": labels}
    if function is not linear_sequence_logps:
        arguments["ref_logps"] = -25.0 - 5.0 * torch.rand(batch, generator=random)
    if function is fused_linear_kto_loss:
        arguments.update(desirable=torch.arange(batch) % 2 == 0, reference_point=0.3)
    return {"input_ids": input_ids.masked_fill(attention_mask == 0, 0), "attention_mask": attention_mask}, arguments


def from_own_logits(function, model, model_inputs: dict[str, Any], **arguments: Any) -> torch.Tensor:
    """Return the result of ``function``'s twin on the model's own logits; a loss includes the model's router loss."""
    outputs = model(**model_inputs)
    result = TWINS[function](outputs.logits, **arguments)
    if function is linear_sequence_logps:
        return result
    loss = result[0]
    if getattr(outputs, "aux_loss", None) is not None:
        loss = loss + model.config.router_aux_loss_coef * outputs.aux_loss
    return loss
