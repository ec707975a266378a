"""Run these tests with each version of TRL that ``fuse`` knows: ``python tests/integrations/trl_versions.py [1.9]``.

Each version is installed into a folder of its own, without its dependencies, and goes before the installed one on
Python's path. The table at the end belongs into ``docs/trl.md``.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from kto_fused.integrations.trl import TRL_VERSIONS

HERE = Path(__file__).parent
# what versions before 1.14 import beside the dependencies of TRL's latest version
ALSO = ["requests", "urllib3", "charset_normalizer", "idna", "certifi"]


def passed(version: str, folder: Path) -> str:
    """Install TRL ``version`` into ``folder``, run the tests with it and return pytest's last line."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*install, f"trl=={version}.*", *ALSO], check=True)
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    tests = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", str(HERE)]
    finished = subprocess.run(tests, env=environment, capture_output=True, text=True)
    print(finished.stdout if finished.returncode else "", end="")
    return finished.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    versions = sys.argv[1:] or [".".join(map(str, version)) for version in TRL_VERSIONS]
    with tempfile.TemporaryDirectory() as folder:
        rows = [f"| {version} | {passed(version, Path(folder) / version)} |" for version in versions]
    print("\n".join(["| TRL | tests |", "|---|---|", *rows]))
