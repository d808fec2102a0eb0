"""A run on a GGUF file: the same as on its converted folder, and bound to its weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import small_tree
from tests.models.gguf_files import Q, write_gguf
from typer.testing import CliRunner

from fedloom import experiment
from fedloom.cli import app
from fedloom.models.gguf import converted
from fedloom.recipe import build_recipe


def command(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words), terminal_width=400)
    said = f"{result.output} {result.exception or ''}"
    return result.exit_code, said.replace("\n", " ")


def numbers(folder: Path) -> list[Any]:
    """Return the losses of a run, to the bit."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "loss" in k} for line in lines]


@pytest.fixture(scope="module")
def runs(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run on a copy of the file, and one on what it was converted into."""
    home = tmp_path_factory.mktemp("runs")
    file = Path(shutil.copy(tiny_gguf, home / "tiny.gguf"))
    for name, model in {"file": file, "folder": converted(tiny_gguf, "tiny")}.items():
        tree = small_tree(model, run={"rounds": 1, "samples": 1}, evaluation={"every": 1})
        tree["data"] |= {"num_examples": 40, "num_clients": 2, "prompt": "chat"}
        experiment.run(build_recipe(tree), home / name)
    return home


def test_it_is_the_run_of_its_converted_folder_to_the_bit(runs: Path):
    assert numbers(runs / "file") == numbers(runs / "folder")
    assert all(numbers(runs / "file"))
    told = [json.loads((runs / name / "inputs.json").read_text()) for name in ("file", "folder")]
    assert told[0]["identity"] == told[1]["identity"]
    for name in ("file", "folder"):
        assert command("export", str(runs / name), "--out", str(runs / f"{name}-out"))[0] == 0
    weights = [
        runs / f"{n}-out" / "global" / "adapter_model.safetensors" for n in ("file", "folder")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert 'file = "tiny.gguf"' in (runs / "file-out" / "global" / "README.md").read_text()


def test_it_goes_on_wherever_the_file_lies(runs: Path, tmp_path: Path):
    run = shutil.copytree(runs / "file", tmp_path / "run")
    moved = shutil.copy(runs / "tiny.gguf", tmp_path / "moved.gguf")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["model"]["name"] == str(runs / "tiny.gguf")
    words = ("chat", str(run), "--model", str(moved), "--prompt", "hello")
    assert command(*words)[0] == 0
    code, said = command("resume", str(run), f"model.name={moved}", "run.rounds=2")
    assert code == 0, said


def test_another_quantisation_is_refused_and_says_why(runs: Path, tmp_path: Path, gguf_llama: Any):
    other = write_gguf(tmp_path / "tiny.gguf", gguf_llama, Q.Q4_0)
    run = shutil.copytree(runs / "file", tmp_path / "run")
    code, said = command("resume", str(run), f"model.name={other}", "run.rounds=2")
    assert code == 1
    assert "has changed: weights of the base model" in said
    assert "or take what is there now with --anyway" in said


def test_a_merged_model_is_loaded_by_transformers_alone(runs: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, said = command("export", str(runs / "file"), "--for", "merged", "--out", str(tmp_path))
    assert code == 0, said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "global")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "global")
    assert tokenizer.chat_template
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0]


def test_the_plan_says_what_the_file_holds(tiny_gguf: Path):
    words = ("model.name=" + str(tiny_gguf), "data.num_examples=40", "data.num_clients=2")
    lora = "tune.lora.targets=[q_proj]"
    code, said = command("plan", "quickstart", *words, lora, "run.baselines=[]")
    assert code == 0, said
    assert "llama, 37,472 parameters as Q8_0 with F32" in said


def test_data_shows_its_own_template(tiny_gguf: Path, tmp_path: Path):
    words = (f"model.name={tiny_gguf}", "data.num_examples=40", "data.num_clients=2")
    picture = ("--picture", str(tmp_path / "split.png"))
    code, said = command("data", "quickstart", *words, "data.prompt=chat", *picture)
    assert code == 0, said
    assert "<s>assistant" in said
