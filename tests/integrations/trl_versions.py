"""Run these tests with each version of TRL that ``fuse`` knows: ``python tests/integrations/trl_versions.py [1.9]``.

It needs the packages of ``pip install -c constraints.txt ".[train,test]" trl``. Each version is installed into a folder
of its own, without its dependencies, and goes before the installed one on Python's path. The table belongs into
``docs/trl.md``; a version's row is printed as soon as its tests have ended.
"""

import importlib.metadata
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
# what versions before 1.14 import beside the dependencies of TRL's latest version
ALSO = ["requests", "urllib3", "charset_normalizer", "idna", "certifi"]
DPO_LOSSES = [
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
]
# settings by trainer: of each, the whole loss is taken over from one of these versions on
SETTINGS = {
    "KTO": [{"loss_type": "kto"}, {"loss_type": "apo_zero_unpaired"}, {"precompute_ref_log_probs": True}],
    "DPO": [
        *({"loss_type": [loss]} for loss in DPO_LOSSES),
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
        *({"f_divergence_type": name} for name in ("forward_kl", "js_divergence", "alpha_divergence")),
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"precompute_ref_log_probs": True},
    ],
    "GRPO": [
        *({"loss_type": loss} for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")),
        {"beta": 0.1},
        {"delta": 1.5},
        {"importance_sampling_level": "sequence"},
    ],
    "CPO": [
        *({"loss_type": loss} for loss in ("sigmoid", "hinge", "ipo", "simpo")),
        {"loss_type": "simpo", "alpha": 0.3},
    ],
    "ORPO": [{}],
}
HEADER = f"| TRL | {' | '.join(SETTINGS)} | tests passed | skipped | failed |"


def taken_over(folder: Path) -> str:
    """Return the cells that count by trainer how many of its settings ``fuse`` takes over whole, of those that the
    installed version of TRL has.
    """
    sys.path.insert(0, str(HERE.parent))
    import trl_cases

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("kto_fused.integrations.trl").addHandler(handler)
    cells = []
    for name, every in SETTINGS.items():
        whole = known = 0
        for settings in every:
            try:
                if name == "GRPO":
                    trainer = trl_cases.make_grpo_trainer(folder, **settings)
                else:
                    trainer = trl_cases.make_trainer(getattr(trl_cases, f"{name}Trainer"), folder, **settings)
            except (TypeError, ValueError):
                continue  # this version of TRL has no such setting
            except RuntimeError as error:  # without a GPU, 1.15 precomputes with a kernel for GPUs
                print(f"TRL itself fails with {settings}: {error}", file=sys.stderr)
                continue
            said.clear()
            trl_cases.fuse(trainer)
            known, whole = known + 1, whole + (not said)
        cells.append(f"{whole} of {known}")
    return " | ".join(cells)


def row(version: str, folder: Path) -> str:
    """Install TRL ``version`` into ``folder``, run the tests with it and return its row of the table."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*install, f"trl=={version}.*", *ALSO], check=True)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    probe = subprocess.run([sys.executable, __file__, "--taken-over"], env=environment, capture_output=True, text=True)
    if probe.returncode:
        print(probe.stderr, flush=True)
    cells = probe.stdout.strip().splitlines()[-1] if not probe.returncode else " | ".join(["-"] * len(SETTINGS))
    tests = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", str(HERE)]
    finished = subprocess.run(tests, env=environment, capture_output=True, text=True)
    print(finished.stdout if finished.returncode else "", end="", flush=True)
    last = finished.stdout.strip().splitlines()[-1]
    counts = [int(count[1]) if (count := re.search(rf"(\d+) {kind}", last)) else 0 for kind in ("passed", "skipped")]
    failed = sum(map(int, re.findall(r"(\d+) (?:failed|error)", last)))
    exact = next(folder.glob("trl-*.dist-info")).name.removeprefix("trl-").removesuffix(".dist-info")
    return f"| {exact} | {cells} | {counts[0]} | {counts[1]} | {failed} |"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        if sys.argv[1:] == ["--taken-over"]:
            print(taken_over(Path(folder)))
            sys.exit()
        from kto_fused.integrations.trl import TRL_VERSIONS

        versions = sys.argv[1:] or [".".join(map(str, version)) for version in reversed(TRL_VERSIONS)]
        packages = ("torch", "transformers", "accelerate", "peft", "datasets")
        print(", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages))
        print(HEADER, "|---" * (len(SETTINGS) + 4) + "|", sep="\n", flush=True)
        for version in versions:
            print(row(version, Path(folder) / version), flush=True)
