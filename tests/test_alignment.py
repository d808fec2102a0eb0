"""From a run of selectors to a model that learnt what they prefer, and what is refused on the way."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import fedloom
from fedloom.alignment import JUDGED, ORIGIN, PAIRS, _write_pairs, align, aligned_recipe
from fedloom.cli import app
from fedloom.data.data_settings import DataSettings
from fedloom.data.preferences import to_pairs
from fedloom.data.readers import Row
from fedloom.objectives.dpo import DPO
from fedloom.objectives.selector import texts
from fedloom.recipe import build_recipe, load_recipe
from fedloom.results import judging
from fedloom.results.judging import CHUNK, Judged, Writing, judge, read_lines, read_prompts
from fedloom.results.plan import make_plan

pytestmark = pytest.mark.slow

SMALL = [
    "data.num_examples=60",
    "data.num_clients=4",
    "data.partition=iid",
    "data.fractions=[0.6, 0.2, 0.2]",
    "data.where={language: [en], task: [capital, plural]}",
    "tune.lora={rank: 4, alpha: 8, targets: [q_proj, v_proj]}",
    "local={steps: 2, batch_size: 2, lr: 0.004, schedule: constant}",
    "evaluation={every: 0, max_examples: 2}",
    "run={rounds: 3, baselines: [], samples: 1}",
]
PUBLIC = {"fedbiot": {"public": {"source": "builtin:polyglot"}}}
RESIDUAL = {"fedlora": {"aggregate": "residual"}}
FEW = ["run.rounds=1", "local.steps=1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> fedloom.Result:
    return fedloom.run(load_recipe("fedbiscuit", SMALL), tmp_path_factory.mktemp("biscuit") / "run")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Write ten prompts, the first with answers."""
    rows: list[dict[str, Any]] = [
        {"prompt": "What is the plural of cat?", "answers": ["cats", "cats and dogs and mice"]},
        *({"prompt": f"What is the capital of country {i}?"} for i in range(9)),
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_run_of_selectors_tells_how_pairs_are_judged(finished: fedloom.Result) -> None:
    final = finished.summary["final"]
    names = ("accuracy", "preference_accuracy", "preference_margin", "first_chosen", "num_pairs")
    assert {f"test/{name}" for name in names} <= final.keys()
    assert "test/exact_match" not in final
    assert "test/perplexity" not in final
    assert finished.summary["num_clusters"] == 2
    samples = json.loads((finished.folder / "samples.json").read_text())
    assert {samples[0]["before"], samples[0]["reference"]} <= {"A", "B"}


def test_it_does_not_chat(finished: fedloom.Result) -> None:
    with pytest.raises(ValueError, match=r"a selector compares two answers, got one: its run"):
        finished.chat("cluster-0").answer("What is the capital of France?")


def test_a_plan_counts_questions_and_all_models_of_a_round_that_groups(
    finished: fedloom.Result,
) -> None:
    plan = make_plan(load_recipe("fedbiscuit", SMALL))
    sent = finished.summary["upload_bytes"] + finished.summary["download_bytes"]
    assert plan.total_bytes == pytest.approx(sent, rel=0.02)


def test_both_orders_of_every_two_answers_are_judged_by_every_model_and_dpo_learns_from_them(
    finished: fedloom.Result, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "aligned"
    typed = ["align", str(finished.folder), "--prompts", str(prompts), "--out", str(out)]
    shown = CliRunner().invoke(app, [*typed, "--max-new-tokens", "6", *FEW])
    assert shown.exit_code == 0, shown.output
    assert "judged 8 of 10 prompts by 2 selectors" in shown.output
    lines = read_lines(out / JUDGED)
    assert [line["prompt"] for line in lines] == [one.text for one in read_prompts(prompts)]
    assert lines[0]["answers"] == ["cats", "cats and dogs and mice"]
    assert all(set(line["margins"]) == {"cluster-0", "cluster-1"} for line in lines)
    pairs = read_lines(out / PAIRS)
    assert 2 <= len(pairs) <= 10
    assert set(pairs[0]) == {"prompt", "chosen", "rejected"}
    learnt = fedloom.open_run(out)
    assert learnt.summary["rounds"] == 1
    assert (learnt.adapter() / "adapter_model.safetensors").exists()
    # Again it goes on where it was, and does nothing anew.
    again = CliRunner().invoke(app, [*typed, "--max-new-tokens", "6", *FEW])
    assert again.exit_code == 0, again.output
    assert "judged 10 of 10" in again.output
    assert "judged 8 of 10" not in again.output
    other = CliRunner().invoke(app, [*typed, "--max-new-tokens", "7", *FEW])
    assert isinstance(other.exception, ValueError)
    assert "holds what came of another max_new_tokens: take another" in str(other.exception)


def test_what_was_cut_short_is_judged_again_to_the_same_bytes(
    finished: fedloom.Result, prompts: Path, tmp_path: Path
) -> None:
    opened = finished.open("align")
    models = {"a": opened.session.space.start()}
    found, writing, file = read_prompts(prompts), Writing(max_new_tokens=4), tmp_path / "judged"
    assert list(judge(opened.session, models, found, writing, file)) == [0, CHUNK, 10]
    whole = file.read_bytes()
    file.write_bytes(whole[: -len(whole) // 20])
    assert list(judge(opened.session, models, found, writing, file)) == [CHUNK, 10]
    assert file.read_bytes() == whole
    file.write_bytes(whole[: len(whole) // 3])
    assert list(judge(opened.session, models, found, writing, file)) == [0, CHUNK, 10]
    assert file.read_bytes() == whole


def test_answers_are_drawn_anew_with_another_seed_and_differ_from_one_another(
    finished: fedloom.Result, prompts: Path, tmp_path: Path
) -> None:
    opened, found = finished.open("align"), read_prompts(prompts)[1:5]
    models = {"a": opened.session.space.start()}
    before = torch.random.get_rng_state()
    texts = []
    for seed in (0, 1):
        file = tmp_path / f"{seed}"
        writing = Writing(3, 2.0, 5, seed)
        list(judge(opened.session, models, found, writing, file))
        texts.append([line["answers"] for line in read_lines(file)])
    assert texts[0] != texts[1]
    assert all(len(set(each)) == len(each) for each in texts[0])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("margins", "expected"),
    [
        ({"a": [1.0], "b": [0.5]}, ("x", "y")),
        ({"a": [-1.0], "b": [-0.5]}, ("y", "x")),
        # Two of three outvote one that is surer.
        ({"a": [-0.1], "b": [-0.1], "c": [9.0]}, ("y", "x")),
        # Even votes: the mean decides.
        ({"a": [-0.5], "b": [1.0]}, ("x", "y")),
        ({"a": [0.0], "b": [0.0]}, None),
        ({"a": [None], "b": [None]}, None),
        ({"a": [None], "b": [-1.0]}, ("y", "x")),
    ],
)
def test_the_majority_of_models_decides(
    margins: dict[str, list[float | None]], expected: tuple[str, str] | None
) -> None:
    assert Judged("?", ["x", "y"], margins).pair == expected


def test_of_more_answers_the_best_and_the_worst_are_the_pair() -> None:
    """Margins of x over y, x over z, y over z: y beats both, z beats x."""
    assert Judged("?", ["x", "y", "z"], {"a": [-1.0, -1.0, 1.0]}).pair == ("y", "x")
    assert Judged("?", ["x"], {"a": []}).pair is None
    assert Judged("?", [], {"a": []}).pair is None


def test_the_run_of_dpo_has_model_and_training_of_the_selectors() -> None:
    recipe = load_recipe("fedbiscuit", SMALL)
    made = aligned_recipe(recipe, Path("pairs.jsonl"), ["objective.dpo.beta=0.3", "run.rounds=2"])
    assert (made.model, made.tune, made.local) == (recipe.model, recipe.tune, recipe.local)
    assert made.objective == load_recipe("dpo", ["objective={dpo: {beta: 0.3}}"]).objective
    assert made.data.num_clients == 1
    assert made.run.rounds == 2


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (
            {"tune": {"offsite": {"factors": 2, "int8": True}}, "algorithm": [PUBLIC, "fedavg"]},
            {"offsite": {"drop": 0, "adapter": {"lora": {}}}},
        ),
        (
            {"tune": {"lora": {"ranks": {"small": 2}, "side": 8}}, "algorithm": [RESIDUAL]},
            {"lora": {}},
        ),
        ({"tune": {"prompt": {"tokens": 2}}}, {"prompt": {"tokens": 2}}),
        ({"tune": "full"}, {"full": {}}),
    ],
    ids=["offsite", "fedlora", "prompt", "full"],
)
def test_the_server_has_the_whole_model_and_no_clients(
    settings: dict[str, Any], kept: dict[str, Any]
) -> None:
    tree = {"name": "x", "objective": "selector", "data": {"tiers": {"small": 0.5, "large": 0.5}}}
    made = aligned_recipe(build_recipe({**tree, **settings}), Path("pairs.jsonl"))
    assert made.tune == build_recipe({"name": "x", "tune": kept}).tune
    assert isinstance(made.objective, DPO)
    assert made.objective.reference == ("start" if "prompt" in kept else "base")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no rows"),
        ('{"prompt": [{"role": "user", "content": "a"}]}', "must be a text, .*, got turns"),
        ('{"text": "a"}', "a row must have the column prompt, and may have answers, got text"),
        ('{"prompt": "a", "answers": ["b"]}', "answers must be a list of 2 to 8 texts that differ"),
        ('{"prompt": "a", "answers": [1, 2]}', "answers must be a list of 2 to 8 texts that"),
    ],
)
def test_prompts_that_are_none_are_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_prompts(file)


def test_a_file_of_lines_holds_a_prompt_each(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("One?\n\n Two? \n")
    assert [one.text for one in read_prompts(file)] == ["One?", "Two?"]
    file.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(file)
    file.write_bytes("Où?\n".encode("utf-16"))
    assert [one.text for one in read_prompts(file)] == ["Où?"]
    file.write_bytes("One?\nOù?\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts\.txt, line 2: not UTF-8"):
        read_prompts(file)
    for nothing in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ValueError, match="is no file, or does not exist"):
            read_prompts(nothing)


def test_selectors_are_asked_as_clients_ask_them_whatever_answers_look_like(tmp_path: Path) -> None:
    settings = DataSettings(system="Be brief.")
    answers = ("Human: no", '[{"role": "user", "content": "no"}]')
    _write_pairs(tmp_path, [Judged("q", answers, {"a": [1.0]})], Console(quiet=True))
    rows = [Row(line, PAIRS, 1) for line in read_lines(tmp_path / PAIRS)]
    (taught,) = to_pairs(rows, settings).records
    assert texts(taught) == texts(judging._pair("q", *answers, settings))
    assert texts(taught) == ("System: Be brief.\n\nUser: q", *answers)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_answers": 1}, "--answers must be from 2 to 8, got 1"),
        ({"temperature": 0.0}, "--temperature must be above 0, got 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1, got 0"),
    ],
)
def test_answers_that_leave_nothing_to_choose_are_refused(
    settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Writing(**settings)


def test_other_runs_and_folders_are_refused_before_anything_is_judged(
    finished: fedloom.Result, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="holds a run already"):
        align(finished.folder, prompts, finished.folder)
    plain = fedloom.run(load_recipe("dpo", [*SMALL, "run.rounds=1"]), tmp_path / "dpo")
    with pytest.raises(ValueError, match="learnt another objective: begin a run with objective"):
        align(plain.folder, prompts, tmp_path / "out")
    with pytest.raises(ValueError, match=r"local\.lr"):
        align(finished.folder, prompts, tmp_path / "out", overrides=["local.lr=no"])
    assert not (tmp_path / "out" / ORIGIN).exists()
