"""A GGUF file, converted once into a folder of safetensors that everything else loads."""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch

from fedloom.core.files import PART
from fedloom.models.found import check_loaded, check_tokenizer, found
from fedloom.models.gguf_header import GgufHeader, read_header

CACHE = "FEDLOOM_CACHE"
_SOURCE = "gguf.json"
"""In a converted folder: which file it was."""
_WIDTH = 4
"""Bytes of a parameter in float32, which holds what any quantisation says."""


def cache() -> Path:
    """Return the folder of converted models; $FEDLOOM_CACHE, or else ~/.cache/fedloom, is above it."""
    return Path(os.environ.get(CACHE) or "~/.cache/fedloom").expanduser() / "converted"


def converted(file: Path, name: str) -> Path:
    """Return the folder that a GGUF file was converted into, after converting it where no process has yet.

    The folder goes by the SHA-256 of the file and by the version of transformers, whose reader it is: another name or
    place of the file is the same folder.

    Args:
        file: The GGUF file.
        name: As the recipe gives it.

    Raises:
        ValueError: where it is no whole language model that transformers can read, or there is no room for it.
    """
    import transformers

    header = header_of(file, name)
    sha256 = _sha256(_Version.of(file))
    folder = cache() / f"{sha256[:32]}-transformers-{transformers.__version__}"
    if folder.is_dir():
        return folder
    with _writable(name), _held(folder) as alone:
        if folder.is_dir():  # another process has converted it meanwhile
            return folder
        if alone:
            # What processes left that were killed.
            for part in folder.parent.glob(f"{folder.name}{PART}*"):
                shutil.rmtree(part, ignore_errors=True)
        _check_room(header, folder.parent, name)
        sys.stderr.write(f"{name} is converted, once, into {folder}: seconds to a few minutes\n")
        part = Path(tempfile.mkdtemp(prefix=folder.name + PART, dir=folder.parent))
        try:
            _convert(file.absolute(), header, part, name)
            source = {"file": file.name, "sha256": sha256, "holds": header.described()}
            (part / _SOURCE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
            for path in (part, *part.iterdir()):  # a cache may be shared
                path.chmod(0o755 if path.is_dir() else 0o644)
            part.rename(folder)
        except OSError:
            # Where file systems have no locks, another process may have been first, with the same bytes.
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def header_of(file: Path, name: str) -> GgufHeader:
    """Return the checked header of a file; read anew only where the file has changed.

    Raises:
        ValueError: where it is no whole language model.
    """
    return _header(_Version.of(file), name)


@dataclass(frozen=True, slots=True)
class _Version:
    """A file as it is now."""

    file: Path
    size: int
    changed: int

    @classmethod
    def of(cls, file: Path) -> "_Version":
        stat = file.stat()
        return cls(file.absolute(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=8)
def _header(version: _Version, name: str) -> GgufHeader:
    return read_header(version.file, name)


@lru_cache(maxsize=8)
def _sha256(version: _Version) -> str:
    with version.file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _convert(file: Path, header: GgufHeader, folder: Path, name: str) -> None:
    """Write the weights in float32, configuration, end tokens, tokenizer and chat template."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    reader = f"transformers {transformers.__version__}"
    # In an empty folder: nothing that lies beside the file has a say. An absolute path: transformers looks for a
    # relative one in the working directory first.
    with tempfile.TemporaryDirectory() as empty:
        place: dict[str, Any] = {"pretrained_model_name_or_path": empty, "gguf_file": str(file)}
        with found(
            f"model.name {name} is a GGUF of architecture {header.architecture}, which {reader} cannot read as a"
            " causal language model; give the model as a folder of safetensors"
        ):
            config = AutoConfig.from_pretrained(**place)
            # The model as it is read keeps traces of its quantisation, and cannot be saved.
            with torch.device("meta"):
                whole = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with found(
            f"model.name {name} has no tokenizer that {reader} can read (tokenizer.ggml.model"
            f" {header.values['tokenizer.ggml.model']}); give the model as a folder of safetensors with its tokenizer"
        ):
            tokenizer = AutoTokenizer.from_pretrained(**place)
        check_tokenizer(tokenizer, name)
        # The reader's bar, which nothing else turns off.
        with found(f"model.name {name} cannot be read by {reader}"), _without_bar():
            loaded, loading = AutoModelForCausalLM.from_pretrained(
                **place,
                **_unpacked(transformers),
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    check_loaded(loaded, loading, name)
    with found(f"model.name {name} cannot be converted by {reader}"):
        whole.load_state_dict(loaded.state_dict(), assign=True)
        whole.tie_weights()
        _add_end_of_turn_(whole, header)
        whole.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _drop_foreign_tokens(folder, int(header.values["tokenizer.ggml.tokens"]))


def _drop_foreign_tokens(folder: Path, count: int) -> None:
    """Take from a saved tokenizer what the file has no row for: transformers adds GPT-2's end of text to any BPE."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < count]
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _without_bar() -> contextlib.redirect_stderr[io.StringIO]:
    return contextlib.redirect_stderr(io.StringIO())


def _unpacked(transformers: Any) -> dict[str, Any]:
    """Return what makes transformers give weights as numbers; before it could keep them packed, it always did."""
    settings = getattr(transformers, "GgufConfig", None)
    return {} if settings is None else {"quantization_config": settings(dequantize=True)}


def _add_end_of_turn_(model: Any, header: GgufHeader) -> None:
    """Let answers end where the file says that a turn ends, too."""
    turn, settings = header.values.get("tokenizer.ggml.eot_token_id"), model.generation_config
    if isinstance(turn, int) and settings is not None and settings.eos_token_id != turn:
        settings.eos_token_id = [e for e in (settings.eos_token_id, turn) if e is not None]


def _check_room(header: GgufHeader, folder: Path, name: str) -> None:
    needed = _WIDTH * header.num_parameters
    for what, free, remedy in (
        ("memory", psutil.virtual_memory().available, "choose a smaller model"),
        (f"room in {folder}", shutil.disk_usage(folder).free, f"set {CACHE} to a larger disk"),
    ):
        if needed > free:
            raise ValueError(
                f"model.name {name} needs {needed / 1e9:.1f} GB of {what} to be converted to float32, and"
                f" {free / 1e9:.1f} GB are free: {remedy}"
            )


@contextlib.contextmanager
def _writable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"model.name {name} cannot be converted into {cache()} ({error.strerror}): set {CACHE} to a folder"
            " that can be written to"
        ) from error


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Wait until no other process converts into the folder; yields False where file systems have no locks."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            yield False
        else:
            yield True
