"""``--load_in_4bit``: quantised layers, the exact loss of their hidden states, and a reference without adapters."""

# ruff: noqa: E402 (where packages are missing, the skip must come before the imports that need them)

from pathlib import Path

import pytest
import torch

for package in ("datasets", "accelerate", "matplotlib", "peft", "bitsandbytes"):
    pytest.importorskip(package, reason=f"--load_in_4bit needs {package}")

import bitsandbytes
import tiny_training
from command_runs import command, losses, read_metrics
from peft import LoraConfig, get_peft_model

import kto_fused
from kto_fused import huggingface
from kto_fused.commands import cli, train
from kto_fused.huggingface.inspect import keep_4bit_layers_differentiable
from kto_fused.trainers import FusedDPOConfig, FusedDPOTrainer

pytestmark = pytest.mark.usefixtures("module_cache", "in_a_new_folder")


@pytest.fixture
def wide(files) -> Path:
    """A model whose layers bitsandbytes would pack for a CPU: multiples of 32 outputs."""
    tiny_training.model(hidden_size=64, intermediate_size=64).save_pretrained("wide")
    tiny_training.tokenizer().save_pretrained("wide")
    return Path("wide")


def test_the_loss_of_a_quantised_model_is_that_of_its_logits_and_the_reference_has_no_adapter(wide):
    _, model = train.load(str(wide), "auto", in_4bit=True)
    assert type(model.lm_head) is torch.nn.Linear
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    ids, desirable = torch.randint(5, 60, (4, 9)), torch.tensor([True, False, True, False])
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    keep_4bit_layers_differentiable(model)  # as the trainers do before the first pass
    with torch.no_grad(), model.disable_adapter():
        ref_logits = model(ids).logits
        ref_logps = kto_fused.sequence_logps(ref_logits, labels)
    losses_and_grads = []
    for function in (kto_fused.fused_linear_kto_loss, None):
        model.zero_grad()
        if function is None:
            loss, _ = kto_fused.reference.kto_loss(model(ids).logits, labels, desirable, ref_logits=ref_logits)
        else:
            loss, _ = huggingface.apply(
                function, model, {"input_ids": ids}, labels=labels, desirable=desirable, ref_logps=ref_logps
            )
        loss.backward()
        losses_and_grads.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(losses_and_grads[0]) == len(losses_and_grads[1]) > 10
    for fused, plain in zip(*losses_and_grads, strict=True):
        torch.testing.assert_close(fused, plain, rtol=2e-2, atol=1e-4)  # the layers' own backward is in bfloat16
    torch.testing.assert_close(losses_and_grads[0][0], losses_and_grads[1][0], rtol=1e-5, atol=1e-6)


def test_the_command_trains_a_quantised_model_evaluates_saves_and_resumes_it(wide, files):
    flags = ["--model", str(wide), "--load_in_4bit", "--lora_rank", "2", "--save_strategy", "epoch", "--seed", "1"]
    flags += ["--eval_data", str(files / "dpo-eval.jsonl"), "--gradient_checkpointing", "--logging_steps", "1"]
    flags += ["--lr_scheduler_type", "constant"]
    assert cli.main(command(files, "dpo", *flags, "--num_train_epochs", "2")) == 0
    metrics = read_metrics("runs/dpo")
    assert metrics["settings"]["load_in_4bit"] is True
    assert metrics["steps"][0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert metrics["evaluations"][0]["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    whole = losses("runs/dpo")
    resumed = ["--output_dir", "resumed", "--num_train_epochs"]
    assert cli.main(command(files, "dpo", *flags, *resumed, "1")) == 0
    assert cli.main(command(files, "dpo", *flags, *resumed, "2", "--resume_from_checkpoint", "true")) == 0
    assert losses("resumed") == whole


def test_the_gradient_after_an_evaluation_is_that_of_the_dequantised_weights(wide, files):
    """On a CPU with AVX512-BF16, bitsandbytes would pack the layers there, and they would have no gradient."""
    tokenizer, model = train.load(str(wide), "auto", in_4bit=True)
    _, plain = train.load(str(wide), "auto")
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, bitsandbytes.nn.Linear4bit):
                weights = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
                plain.get_submodule(name).weight.copy_(weights)
    ids, grads = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(0)), []
    for one in (model, plain):
        trainer = FusedDPOTrainer(
            one,
            args=FusedDPOConfig(output_dir="runs/grad", report_to="none", use_cpu=True),
            train_dataset=str(files / "dpo.jsonl"),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
        )
        with torch.no_grad():
            trainer.model.eval()(ids)
        trainer.model.train()(ids).logits.square().mean().backward()
        grads.append({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
    assert len(grads[0]) > 10
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():  # the quantised layers compute in bfloat16
        similarity = torch.nn.functional.cosine_similarity(grad.flatten(), grads[1][name].flatten(), dim=0)
        assert similarity > 0.98, (name, similarity)


def test_a_model_whose_layers_are_packed_for_inference_is_refused(wide):
    _, model = train.load(str(wide), "auto", in_4bit=True)
    layer = model.model.layers[0].self_attn.q_proj
    layer.support_avx512bf16_for_cpu = True  # on a CPU without AVX512-BF16 too
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="q_proj for inference on this CPU, which has no backward pass"):
        FusedDPOTrainer(model, args=FusedDPOConfig(output_dir="runs/packed", report_to="none", use_cpu=True))
