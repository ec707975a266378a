"""PEFT, torch.compile, autocast, gradient checkpointing and accelerate around a model, in one process."""

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
    refuses,
    with_lora,
)
from models import TWINS, from_own_logits, make_batch, make_model
from torch import nn

from kto_fused import (
    fused_linear_kto_loss,
    huggingface,
    linear_sequence_logps,
    reference,
)
from kto_fused.measure import peak_bytes

# ---- PEFT -----------------------------------------------------------------------------------------------------------


@by_architecture
def test_lora_is_trained_and_switched_off(name):
    base = make_model(name)
    base_loss = kto(base)
    # PEFT refuses a Mamba layer's projections, and fails on a router that returns two results
    refused = name in ("falcon_h1", "llama4_text")
    model = with_lora(base, **({"target_modules": ["q_proj", "gate_proj"]} if refused else {}))
    for function in TWINS:
        check_against_own_logits(function, model)
    assert {"lora_A", "lora_B"} == {key.split(".")[-3] for key in backward(model, kto(model))}
    assert abs(kto(model) - base_loss) > 1e-5
    with model.disable_adapter():
        torch.testing.assert_close(kto(model), base_loss)


@by_function
def test_a_head_that_is_trained_whole_beside_lora_gets_its_gradient(function):
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


def test_adapters_added_after_the_first_loss_are_trained():
    base = make_model("llama")
    kto(base)
    model = with_lora(base, modules_to_save=["lm_head"])
    check_against_own_logits(fused_linear_kto_loss, model)
    assert any("lm_head" in name for name in backward(model, kto(model)))


# ---- the other wrappers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attached_first", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_compiled_model_is_compiled_once_for_all_steps(name, attached_first):
    torch.use_deterministic_algorithms(False)  # torch.compile guards on this setting
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
def test_autocasts_copies_of_the_layers_weights_are_freed_before_the_loss(is_checkpointing, monkeypatch):
    """They stay if the graph holds them too: the next call of the same step would only make new copies."""
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

    step()  # allocates the gradients
    peaks = []
    for clear in (torch.clear_autocast_cache, lambda: None):
        monkeypatch.setattr(torch, "clear_autocast_cache", clear)
        peaks.append(peak_bytes(step, torch.device("cpu")))
    assert peaks[1] - peaks[0] == pytest.approx(2 * num_weights * is_checkpointing, rel=0.1)


def test_autocast_rounds_the_inputs_of_matrix_products_but_no_logit():
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
    assert (own - exact).abs().max() > 1e-3  # the model's own logits are rounded
    grads, own_grads = backward(model, actual), backward(model, own)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert (grad - own_grads[name]).norm() <= 0.05 * own_grads[name].norm() + 0.01, name


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_gradient_checkpointing_changes_nothing(name, use_reentrant):
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


def test_a_model_prepared_by_accelerate_runs_the_loss_under_autocast(accelerator):
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
