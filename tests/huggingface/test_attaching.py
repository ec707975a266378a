"""Without a loss an attached model is what it was; detaching restores it; the checks run where the model lies."""

import copy
import inspect
import io

import pytest
import torch
from huggingface_cases import (
    check_against_own_logits,
    kto,
    own_forwards,
)
from models import VOCAB, make_batch, make_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kto_fused import (
    fused_linear_kto_loss,
    huggingface,
    linear_sequence_logps,
    reference,
)
from kto_fused.huggingface.inspect import check_is_causal
from kto_fused.huggingface.running import made_to_run


def test_attaching_leaves_modes_random_numbers_and_gradients_alone():
    model = make_model("llama")
    model.model.layers[0].eval()
    modes, random_state = [module.training for module in model.modules()], torch.get_rng_state()
    huggingface.attach(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_logits_and_generation_are_unchanged(name):
    model = make_model(name).eval()
    model_inputs, _ = make_batch(linear_sequence_logps)
    prompt = {"input_ids": model_inputs["input_ids"][:, :4], "max_new_tokens": 5, "do_sample": False}
    logits, tokens = model(**model_inputs).logits, model.generate(**prompt)
    kto(model)
    assert torch.equal(model(**model_inputs).logits, logits)
    assert torch.equal(model.generate(**prompt), tokens)
    with pytest.raises(ValueError, match="nonsense"):  # generate looks up arguments in forward's signature
        model.generate(**prompt, nonsense=1)


def test_each_model_keeps_its_own_signature():
    models = [make_model("llama"), make_model("gpt2")]
    before = [inspect.signature(model.forward) for model in models]
    for model in models:
        huggingface.attach(model)
    assert [inspect.signature(model.forward) for model in models] == before
    assert before[0] != before[1]


def test_a_saved_model_is_loaded_unattached_and_gives_the_same_loss(tmp_path):
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


def test_an_earlier_patch_of_forward_still_runs_and_is_restored():
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


def test_a_head_replaced_after_attaching_is_used():
    model = make_model("llama")
    kto(model)
    model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    check_against_own_logits(fused_linear_kto_loss, model)


# ---- the checks run where the model lies ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        (torch.float32, "cpu", "eager"),
        (torch.bfloat16, "cpu", "eager"),
        (torch.float32, "cuda", "eager"),  # FlashAttention takes only half precision, and autocast is not on yet
        (torch.bfloat16, "cuda", "gpu_kernel"),
    ],
)
def test_checks_replace_an_attention_that_cannot_run_here(dtype, device, expected, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "gpu_kernel", None)
    model = make_model("llama", dtype)
    model.set_attn_implementation("gpu_kernel")
    with made_to_run(model, torch.device(device)):
        assert model.config._attn_implementation == expected


def test_the_check_runs_where_the_models_attention_does_not(monkeypatch):
    """For example a GPU's kernel, while the model still lies on the CPU."""

    def kernel(*args, **kwargs):
        raise RuntimeError("needs a GPU")

    model = make_model("llama")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "gpu_kernel", kernel)
    model.config._attn_implementation = "gpu_kernel"
    huggingface.attach(model)
    assert model.config._attn_implementation == "gpu_kernel"
    with pytest.raises(RuntimeError, match="needs a GPU"):
        model(input_ids=torch.tensor([[1, 2]]))


def test_the_check_takes_no_more_positions_than_a_model_has():
    model = make_model("gpt2", n_positions=4)
    huggingface.attach(model)
    input_ids = torch.arange(4)[None]
    logps = huggingface.apply(linear_sequence_logps, model, {"input_ids": input_ids}, labels=input_ids)
    torch.testing.assert_close(logps, reference.sequence_logps(model(input_ids).logits, input_ids).double())


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
    """A causal model that requires a mask, and whose configuration does not state the vocabulary's size."""

    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        self.embeddings, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, input_ids, attention_mask, **_):
        return CausalLMOutput(logits=self.head((self.embeddings(input_ids) * attention_mask[..., None]).cumsum(1)))


def test_a_model_of_the_users_own_class_is_found_causal():
    check_is_causal(Unusual(PretrainedConfig()))


def test_attaching_works_under_another_default_device():
    model = make_model("llama")
    with torch.device("meta"):  # stands for a GPU
        huggingface.attach(model)
