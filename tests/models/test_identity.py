"""A model is told by what it does, not by where it lies or who wrote it down."""

import json
import shutil
from pathlib import Path

import pytest

from fedloom.models.build import ModelSettings, fingerprint, load_base
from fedloom.models.identity import commit, identity
from fedloom.models.quantized import QuantizedLinear


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def told(folder: Path) -> dict[str, str]:
    return identity(load_base(ModelSettings(name=str(folder))))


def edit(file: Path, **changed: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def test_a_copy_elsewhere_written_by_another_version_is_the_same(
    folder: Path, tiny_folder: Path
) -> None:
    edit(
        folder / "config.json",
        transformers_version="5.9.9",
        architectures=["Other"],
        use_cache=False,
    )
    assert told(folder) == told(tiny_folder)


def test_calls_do_not_change_a_tokenizer(tiny_folder: Path) -> None:
    base = load_base(ModelSettings(name=str(tiny_folder)))
    before = identity(base)
    base.tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert identity(base) == before


@pytest.mark.parametrize(
    ("key", "file", "changed"),
    [
        ("config", "config.json", {"rms_norm_eps": 1e-3}),
        ("config", "config.json", {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}),
        ("tokenizer", "tokenizer_config.json", {"eos_token": "<unk>"}),
    ],
)
def test_what_changes_what_a_model_does_changes_its_hash(
    key: str, file: str, changed: dict[str, object], folder: Path, tiny_folder: Path
) -> None:
    edit(folder / file, **changed)
    was, now = told(tiny_folder), told(folder)
    assert {name for name in was if was[name] != now[name]} == {key}


def test_a_template_is_told_by_itself(folder: Path, tiny_folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text() + "\n")
    was, now = told(tiny_folder), told(folder)
    assert {name for name in was if was[name] != now[name]} == {"template"}


def test_only_the_hub_gives_a_commit(tiny_folder: Path) -> None:
    base = load_base(ModelSettings(name=str(tiny_folder)))
    assert commit(base) is None
    base.model.config._commit_hash = "abc"
    assert commit(base) == "abc"


def test_the_scales_of_quantised_weights_count(tiny_folder: Path) -> None:
    base = load_base(ModelSettings(name=str(tiny_folder), quantize="int8"))
    before = fingerprint(base.model)
    layer = next(m for m in base.model.modules() if isinstance(m, QuantizedLinear))
    layer.packed["scale"].mul_(2)
    assert fingerprint(base.model) != before
