"""The installed package: `kernels` lies inside it and nowhere else, and imports stay cheap."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    environment = {"PYTHONPATH": str(path)} if path else {}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # from a copy: a build folder in the working tree may hold modules that are gone
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    # no isolation, because that needs the network; setuptools comes with torch
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(folder), str(source)], check=True, cwd=folder)
    return next(folder.glob("kto_fused-*.whl"))


def test_the_wheel_holds_kernels_inside_the_package_alone(wheel):
    info = f"kto_fused-{version()}.dist-info/"
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith(info)}
    expected = {f"kto_fused/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    package = ROOT / "kto_fused"
    expected |= {f"kto_fused/{path.relative_to(package)}" for path in package.rglob("*.py")}
    assert names == expected | {
        f"kto_fused/{name}" for name in ("py.typed", "data/feedback.jsonl", "commands/flags.json")
    }


def test_an_installed_wheel_imports_its_own_kernels(wheel, tmp_path):
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True)
    code = "import kto_fused.kernels.token_logprobs as m, kto_fused; print(m.__file__); print(kto_fused.__version__)"
    module, installed = python(code, cwd=tmp_path, path=site).splitlines()
    assert Path(module) == site / "kto_fused" / "kernels" / "token_logprobs.py"
    assert installed == version()


def test_the_folder_imports_cleanly_under_either_name():
    """Python started in the repository's root finds the folder as a top-level package `kernels`."""
    code = "import sys, {0}; print({0}.__file__); assert 'torch' not in sys.modules and 'triton' not in sys.modules"
    assert Path(python(code.format("kernels"), cwd=ROOT)) == ROOT / "kernels" / "__init__.py"


def test_the_version_is_the_same_in_both_places():
    assert f'version="{version()}"' in (ROOT / "setup.py").read_text()


def test_the_readme_names_the_least_versions():
    setup = (ROOT / "setup.py").read_text()
    least_python, least_torch = re.search(r'python_requires=">=([\d.]+)".*"torch>=([\d.]+)"', setup, re.DOTALL).groups()
    needs = f"The package needs Python {least_python} and PyTorch {least_torch} or newer"
    assert needs in (ROOT / "README.md").read_text(encoding="utf-8")


def test_importing_the_package_imports_no_torch_and_its_public_names_neither_triton_nor_transformers(tmp_path):
    code = (
        "import sys, kto_fused; print('torch' in sys.modules)\n"
        "print([name for name in (*kto_fused.__all__, 'engines') if not hasattr(kto_fused, name)])\n"
        "print(hasattr(kto_fused, 'nothing'), {*kto_fused.__all__} - {*dir(kto_fused)})\n"
        "print([m for m in ('triton', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    assert python(code, cwd=tmp_path).splitlines() == ["False", "[]", "False set()", "[]"]


@pytest.mark.parametrize(
    ("module", "names"),
    {
        "kto_fused": ["fused_kto_loss", "fused_linear_dpo_loss", "FusedKTOLoss", "LossMetrics", "sequence_logps"],
        "kto_fused.reference": ["kto_loss", "linear_dpo_loss", "token_logps"],
        "kto_fused.preference_data": ["DataError", "PairedCollator", "UnpairedCollator", "load", "prepare_paired"],
        "kto_fused.huggingface": ["UnsupportedModelError", "apply", "apply_to_logits", "attach", "detach"],
        "kto_fused.trainers": ["FusedDPOConfig", "FusedDPOTrainer", "FusedKTOConfig", "FusedKTOTrainer"],
        "kto_fused.integrations.trl": ["fuse"],
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_public_names_stay_where_users_import_them_from(module, names):
    found = pytest.importorskip(module, reason=f"{module} needs libraries that are not installed")
    assert [name for name in names if not hasattr(found, name)] == []


def version() -> str:
    import kto_fused

    return kto_fused.__version__
