"""Models and arguments that a fused loss refuses, each with a message that says what to do instead."""

import functools
import sys

import pytest
import torch
from huggingface_cases import (
    check_against_own_logits,
    kto,
    refuses,
    with_lora,
)
from models import VOCAB, make_batch, make_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertGenerationConfig,
    ElectraConfig,
    ElectraForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import kto_fused
from kto_fused import (
    FusedLinearKTOLoss,
    fused_kto_loss,
    fused_linear_kto_loss,
    huggingface,
    linear_sequence_logps,
)
from kto_fused.huggingface import UnsupportedModelError
from kto_fused.huggingface.forward import call_at_head
from kto_fused.huggingface.inspect import check_is_causal

# ---- the LM head ----------------------------------------------------------------------------------------------------


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


def test_refuses_a_patched_head():
    model = make_model("llama")
    plain = model.lm_head.forward
    model.lm_head.forward = lambda x: 2 * plain(x)
    with refuses(model, "a forward of its own", "remove it"):
        huggingface.attach(model)


def test_refuses_a_model_without_a_head():
    model = make_model("llama").model
    with refuses(model, "LlamaModel is no causal language model", "AutoModelForCausalLM"):
        huggingface.attach(model)


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
    message = rf"^LlamaForCausalLM's LM head has a {kind} \(test_refusals.forget\).*remove it.*loss_from='logits'"
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
    """They change the input or the weight of the head, and the fused loss takes both at the same place."""
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


# ---- attention and logits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("done_to_logits", [lambda x: 1.01 * x, lambda x: 30 * torch.tanh(x / 30)])
def test_refuses_changed_logits_that_half_precision_or_small_logits_would_hide(dtype, done_to_logits):
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


def test_refuses_an_encoder_decoder():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, **sizes))
    with refuses(model, "T5ForConditionalGeneration is no causal language model", "AutoModelForCausalLM"):
        huggingface.attach(model)


def test_refuses_attention_to_later_tokens():
    """BERT's attention sees later tokens unless its configuration says that it is a decoder."""
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


def test_refuses_an_architecture_with_logits_of_its_own():
    model = make_model("modernbert-decoder")  # it has one more layer before its head
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


def test_refuses_a_configuration_of_tuples():
    with pytest.raises(UnsupportedModelError, match=r"^model\.config\.return_dict is False.*set it to True$"):
        kto(make_model("llama", return_dict=False))


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


# ---- wrappers and devices -------------------------------------------------------------------------------------------


def test_refuses_a_wrapper_that_kept_the_forward_from_before():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)
    with pytest.raises(
        UnsupportedModelError, match=r"PeftModelForCausalLM\) still calls the forward from before attach"
    ):
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


def test_refuses_a_model_spread_by_a_device_map():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = accelerate.dispatch_model(make_model("llama"), {"": "cpu"}, force_hooks=True)
    with refuses(model, "device_map", "on one device"):
        huggingface.attach(model)


def test_refuses_data_parallel():
    model = nn.DataParallel(make_model("llama"))
    with refuses(model, "nn.DataParallel", "torchrun", "CUDA_VISIBLE_DEVICES"):
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


def test_a_module_that_holds_no_model_is_a_type_error():
    with pytest.raises(TypeError, match=r"must be or wrap a transformers.PreTrainedModel, got Linear"):
        huggingface.attach(nn.Linear(2, 2))


# ---- a router's loss ------------------------------------------------------------------------------------------------


def test_refuses_a_router_loss_it_does_not_know(monkeypatch):
    jetmoe = make_model("jetmoe", num_local_experts=4, num_experts_per_tok=2, kv_channels=8, output_router_logits=True)
    mixtral = make_model("mixtral")
    other = lambda gate_logits, num_experts, num_keys=1, top_k=2, attention_mask=None: torch.zeros(())  # noqa: E731
    monkeypatch.setattr(sys.modules[type(mixtral).__module__], "load_balancing_loss_func", other)
    own = make_model("mixtral")
    kinds = reversed([kind for kind in type(own).__mro__ if kind.__module__ == type(own).__module__])
    members = {name: value for kind in kinds for name, value in vars(kind).items() if name != "__dict__"}
    members["__module__"] = __name__  # not a modeling file
    own.__class__ = type("OwnMixtral", (PreTrainedModel,), members)
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


# ---- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 5.0, 1.0])
@pytest.mark.parametrize("name", ["logit_scale", "logit_softcap"])
def test_logit_scale_and_soft_cap_are_refused_as_arguments(name, value):
    """Even the default is refused: it would override the configuration."""
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
def test_inputs_that_are_not_a_mapping_are_a_type_error(function, call):
    model_inputs, arguments = make_batch(fused_linear_kto_loss)
    with pytest.raises(TypeError, match=r"^model_inputs must be a mapping of the model's arguments.*got Tensor$"):
        call(function, make_model("llama"), model_inputs["input_ids"], **arguments)
