"""``--load_in_4bit``: quantised layers, the exact loss of their hidden states, and a reference without adapters."""

# ruff: noqa: E402 (where packages are missing, the skip must come before the imports that need them)

from pathlib import Path

import pytest
import torch

for package in ("datasets", "accelerate", "matplotlib", "peft", "bitsandbytes"):
    pytest.importorskip(package, reason=f"--load_in_4bit needs {package}")

import bitsandbytes
import tiny_training
from command_runs import command, losses, read_metrics, refusal
from peft import LoraConfig, get_peft_model

import kto_fused
from kto_fused import huggingface
from kto_fused.commands import cli, train

pytestmark = pytest.mark.usefixtures("module_cache", "in_a_new_folder")


@pytest.fixture
def wide(files) -> Path:
    """A model whose layers bitsandbytes can also pack for a CPU: multiples of 32 outputs."""
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


def test_a_layer_that_bitsandbytes_cannot_pack_is_named(files, capsys, monkeypatch):
    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "support_avx512bf16_for_cpu", True, raising=False)
    message = refusal(capsys, command(files, "kto", "--load_in_4bit", "--lora_rank", "2"))
    assert "q_proj of " in message
    assert "has 16 outputs, but on this CPU bitsandbytes takes multiples of 32" in message
