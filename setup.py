from pathlib import Path

from setuptools import setup

# the folders of kto_fused/, and kernels/
ROOMS = ("commands", "data", "engines", "heads", "huggingface", "integrations", "kernels", "trainers")

setup(
    name="kto-fused",
    version="0.2.0",
    description="Fused KTO, DPO and other losses for PyTorch: exact, in a fraction of the memory",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13, 14)],
    # kernels/ holds Triton alone and installs inside the package: a top-level `kernels` is somebody else's
    packages=["kto_fused", *(f"kto_fused.{room}" for room in ROOMS)],
    package_dir={"kto_fused": "kto_fused", "kto_fused.kernels": "kernels"},
    package_data={"kto_fused": ["py.typed", "commands/*.json", "data/*.jsonl"]},
    install_requires=[
        "torch>=2.10",
        "triton>=3.6; platform_system == 'Linux'",
    ],
    extras_require={
        "test": ["pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "numpy", "ruff", "trl==1.16.0"],
        # what the trainers and the command import; numpy and pyarrow come with datasets, tokenizers with transformers
        "train": [
            "accelerate>=1.6",
            "datasets>=4.0",
            "filelock>=4.0",
            "matplotlib",
            "peft",
            "pyyaml",
            "safetensors",
            "tqdm",
            "transformers>=5.17",
            "xxhash",
        ],
        "real": ["gguf>=0.10"],  # the model of kto-fused demo --real
        "4bit": ["bitsandbytes>=0.46"],
        "tensorboard": ["tensorboard"],
        "deepspeed": ["deepspeed>=0.19"],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
        "bench": ["matplotlib", "trl==1.16.0", "liger-kernel==0.8.5", "cut-cross-entropy==25.1.1"],
    },
    entry_points={"console_scripts": ["kto-fused = kto_fused.commands.cli:main"]},
)
