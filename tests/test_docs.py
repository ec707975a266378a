"""The examples in docstrings and README run as shown."""

import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest

import kto_fused
from kto_fused import losses

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = ["kto_fused", *(f"kto_fused.{module.name}" for module in pkgutil.iter_modules(kto_fused.__path__))]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


@pytest.mark.parametrize("name", [name for name in kto_fused.__all__ if name != "reference"])
def test_every_public_name_has_an_example(name):
    finder = doctest.DocTestFinder(recurse=True)
    tests = finder.find(getattr(kto_fused, name), name, module=False)
    assert any(test.examples for test in tests)


@pytest.mark.parametrize(
    ("function", "formulas", "loss_types"),
    [
        (kto_fused.fused_kto_loss, losses.kto_losses, losses.KTO_LOSS_TYPES),
        (kto_fused.fused_dpo_loss, losses.dpo_losses, losses.DPO_LOSS_TYPES),
    ],
)
def test_help_has_each_losss_formula_and_source(function, formulas, loss_types):
    listed = re.findall(r"^ {8}(\w+) {2,}\S", function.__doc__, re.MULTILINE)
    assert tuple(listed) == loss_types
    papers = [set(re.findall(r"\d{4}\.\d{5}", text.__doc__)) for text in (function, formulas)]
    assert papers[0] == papers[1]


def test_the_readmes_code_runs(tmp_path, monkeypatch):
    """Each section by itself, in a folder that holds what it names: a model and two files of feedback."""
    for package in ("accelerate", "datasets", "trl"):
        pytest.importorskip(package, reason=f"the README's code needs {package}")
    import tiny_training  # needs them

    tiny_training.tokenizer().save_pretrained(tmp_path / "my-model")
    tiny_training.model(vocab_size=1000).save_pretrained(tmp_path / "my-model")
    unpaired = [{"prompt": f"{i} ", "completion": "good", "label": i % 2 == 0} for i in range(12)]
    pairs = [{"prompt": f"{i} ", "chosen": "good", "rejected": "bad"} for i in range(12)]
    for name, records in (("feedback.jsonl", unpaired), ("pairs.jsonl", pairs)):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.chdir(tmp_path)

    sections = [re.findall(r"```python\n(.*?)```", section, re.DOTALL) for section in README.split("\n## ")]
    assert sum(map(len, sections)) >= 6
    for blocks in sections:
        namespace: dict = {}
        for block in blocks:
            exec(compile(block, "README.md", "exec"), namespace)


def test_every_public_name_is_in_the_readmes_table():
    for name in kto_fused.__all__:
        assert f"`{name}" in README or f"`kto_fused.{name}" in README, name


def results(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def from_logits_on_a_cpu() -> list[str]:
    size = "B=4 T=256 V=32000 float32"
    rows = [row for row in results("cpu.json")["rows"] if (row["loss"], row["size"]) == ("kto", size)]
    return [
        f"| {row['contender']} | {row['forward_ms'] + row['backward_ms']:.1f} | {row['peak_mib']:.0f} "
        f"| {row['logp_error']:.0e} |"
        for row in rows
    ]


def from_hidden_states_on_a_cpu() -> list[str]:
    rows = [row for row in results("cpu-hidden.json")["rows"] if row["size"].startswith("medium head")]
    cases = {
        case: {row["contender"]: row for row in rows if row["case"] == case} for case in ("kto trained", "kto frozen")
    }
    lines = []
    for name, trained in cases["kto trained"].items():
        frozen = cases["kto frozen"][name]
        ms = [f"{row['ms']:.0f} ({row['times_gemms']:.2f})" for row in (trained, frozen)]
        peaks = ["-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}" for row in (trained, frozen)]
        lines.append(f"| {name} | {ms[0]} | {peaks[0]} | {ms[1]} | {peaks[1]} |")
    return lines


def from_logits_on_a_gpu() -> list[str]:
    """A line per vocabulary."""
    report = results("nvidia-h200.json")
    rows = [row for row in report["rows"] if row["loss"] == "kto" and "T=2048" in row["size"] and "bf" in row["size"]]
    lines = [f"reached {report['copy_gb_s']:.0f} GB/s"]
    for vocab in sorted({row["vocab"] for row in rows}):
        by_name = {row["contender"]: row for row in rows if row["vocab"] == vocab}
        ours = by_name["kto-fused"]
        others = ("eager log_softmax", "torch.compile of eager", "TRL kernel")
        ms = [f"{row['forward_ms'] + row['backward_ms']:.2f}" for row in (ours, *(by_name[name] for name in others))]
        lines.append(f"| {vocab} | {ours['forward_gb_s']:.0f} | {ours['backward_gb_s']:.0f} | {' | '.join(ms)} |")
    return lines


def from_hidden_states_on_a_gpu() -> list[str]:
    """A line per LM head."""
    rows = [
        row
        for row in results("nvidia-h200-hidden.json")["rows"]
        if row["case"] == "kto trained" and "T=2048" in row["size"]
    ]
    lines = []
    for size in dict.fromkeys(row["size"] for row in rows):
        head, numbers = size.split(": ")
        hidden, vocab = re.search(r"H=(\d+) V=(\d+)", numbers).groups()
        capped = ", soft cap" if "soft cap" in numbers else ""
        by_name = {row["contender"]: row for row in rows if row["size"] == size}
        names = ("kto-fused", "TRL", "cut-cross-entropy", "Liger", "eager")
        cells = [
            f"{by_name[name]['ms']:.1f} / {by_name[name]['peak_mib']:.0f}" if name in by_name else "-" for name in names
        ]
        gemms, ratio = by_name["GEMMs alone"]["ms"], by_name["kto-fused"]["times_gemms"]
        lines.append(f"| {head} ({hidden}, {vocab}){capped} | {gemms:.1f} | {ratio:.2f} | {' | '.join(cells)} |")
    return lines


def training_steps_on_a_cpu() -> list[str]:
    report = results("cpu-training.json")
    steps, longest = ({(row["loss"], row["contender"]): row for row in report[kind]} for kind in ("rows", "longest"))
    lines = [f"within {report['budget_mib']:.0f} MiB"]
    for name in dict.fromkeys(contender for _, contender in steps):
        cells = []
        for loss in ("kto", "dpo"):
            step, seq_len = steps[loss, name], longest[loss, name]["seq_len"]
            cells.append(f"{step['ms']:.0f} / {step['peak_mib']:.0f}")
            cells.append(f">= {seq_len}" if seq_len == report["longest_tried"] else str(seq_len))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


TABLES = [
    from_logits_on_a_cpu,
    from_hidden_states_on_a_cpu,
    training_steps_on_a_cpu,
    from_logits_on_a_gpu,
    from_hidden_states_on_a_gpu,
]


@pytest.mark.parametrize("table", TABLES)
def test_the_readmes_figures_are_the_measured_ones(table):
    lines = table()
    assert len(lines) >= 4
    for line in lines:
        assert line in README
