"""A model in seed space as a file of a few kilobytes, and made again of it."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom import experiment
from fedloom.result import Result, open_run
from fedloom.results.seed_file import SeedFile, apply_seeds
from fedloom.rounds.recipe_settings import Recipe

Make = Callable[..., Recipe]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def run(small_recipe: Make, tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("seeds") / "run"
    recipe = small_recipe(
        algorithm={"fedkseed": {"steps": 5}},
        tune={"seeds": {"num_seeds": 64, "distribution": "rademacher", "weights": ["mlp", "norm"]}},
        run={"rounds": 1, "samples": 0},
        data={"num_examples": 40, "num_clients": 2},
        local={"order": "zeroth", "lr": 1e-3, "steps": None},
        evaluation={"every": 0, "generate": False},
    )
    experiment.run(recipe, folder)
    return open_run(folder)


@pytest.fixture(scope="module")
def file(run: Result) -> Path:
    return run.export(form="seeds")["global"]


def test_applied_to_its_base_it_is_the_runs_own_export_to_the_bit(
    run: Result, file: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    assert file == run.folder / "seeds" / "global" / "global.seeds"
    assert file.stat().st_size < 2500
    apply_seeds(file, str(tiny_folder), tmp_path / "made")
    own = run.export(tmp_path / "own", form="merged")["global"]
    made, whole = ((folder / WEIGHTS).read_bytes() for folder in (tmp_path / "made", own))
    assert made == whole
    assert made != (tiny_folder / WEIGHTS).read_bytes()
    assert (tmp_path / "made" / "tokenizer.json").is_file()
    # The run left the same file beside its model.
    beside = run.folder / "adapters" / "global"
    assert (beside / "global.seeds").read_bytes() == file.read_bytes()
    assert (beside / WEIGHTS).read_bytes() == whole


def test_another_base_is_refused(
    file: Path, tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tiny_llama(seed=1, vocab=len(tiny_tokenizer)).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"was made on another model than .*: it asks for the weights"
    ):
        apply_seeds(file, str(tmp_path / "other"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: changed(data, len(data) - 5), r"is damaged: get the file again"),
        (lambda data: changed(data, 200), r"is damaged"),
        (lambda data: data[:-1], r"is damaged"),
        (lambda data: data[:30], r"is damaged"),
        (
            lambda data: b"GGUF" + data,
            r"is no seed file: give one that `fedloom export --for seeds` ",
        ),
        (lambda data: b"", r"is no seed file"),
        (
            lambda data: data.replace(b"fedloom-seeds 1 ", b"fedloom-seeds 2 ", 1),
            r"is of version 2, and version 1 is read here: install the fedloom that wrote it",
        ),
    ],
    ids=["numbers", "head", "end", "cut", "foreign", "empty", "version"],
)
def test_a_damaged_or_foreign_file_is_one_sentence(
    file: Path, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    bad = tmp_path / "bad.seeds"
    bad.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"bad\.seeds {message}") as caught:
        SeedFile.read(bad)
    assert "\n" not in str(caught.value)


def test_a_folder_that_holds_something_is_not_written_to(file: Path, tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(
        ValueError, match=r"--out must be a folder that is empty or not there yet, got"
    ):
        apply_seeds(file, "no/model", tmp_path)
    with pytest.raises(ValueError, match=r"none\.seeds is no file: give a seed file, as"):
        apply_seeds(tmp_path / "none.seeds", "no/model", tmp_path / "out")


@pytest.mark.parametrize("value", [0.1, 0.5], ids=["64 bits", "32 bits"])
def test_numbers_keep_their_bits(file: Path, tmp_path: Path, value: float) -> None:
    one = SeedFile.read(file)
    params = {name: torch.full_like(t, value) for name, t in one.params.items()}
    other = SeedFile(
        **{**vars_of(one), "params": {**params, "base": torch.tensor(-value).double()}}
    )
    other.write(tmp_path / "a.seeds")
    again = SeedFile.read(tmp_path / "a.seeds")
    assert again.identity == one.identity
    for name, t in other.params.items():
        assert torch.equal(again.params[name], t)
        assert again.params[name].shape == t.shape
    head = (tmp_path / "a.seeds").read_bytes().split(b"\n", 2)
    assert head[0].split()[2].decode() == hashlib.sha256(b"\n".join(head[1:])).hexdigest()


def vars_of(one: SeedFile) -> dict[str, Any]:
    return {name: getattr(one, name) for name in SeedFile.__dataclass_fields__}
