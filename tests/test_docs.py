"""The examples in docstrings and README run as shown."""

import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest

import kto_fused

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


def test_the_readmes_code_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_every_public_name_is_in_the_readmes_table():
    for name in kto_fused.__all__:
        assert f"`{name}" in README or f"`kto_fused.{name}" in README, name


def test_the_readmes_figures_are_the_measured_ones():
    report = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())
    size = "B=4 T=256 V=32000 float32"
    rows = [row for row in report["rows"] if (row["loss"], row["size"]) == ("kto", size)]
    assert len(rows) >= 4
    for row in rows:
        both_ms = row["forward_ms"] + row["backward_ms"]
        line = f"| {row['contender']} | {both_ms:.1f} | {row['peak_mib']:.0f} | {row['logp_error']:.0e} |"
        assert line in README
