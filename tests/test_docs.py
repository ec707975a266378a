"""The examples in docstrings and README run as shown."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import kto_fused

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
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
