"""Runs of offsite tuning, and of a server that aligns the emulator between rounds."""

import dataclasses
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from rich.console import Console

from fedloom import experiment
from fedloom.algorithms.fedbiot import FedBiOTState
from fedloom.client.cohort import Cohort
from fedloom.core.params import equal
from fedloom.data.data_settings import DataSettings
from fedloom.data.formats import to_records
from fedloom.data.readers import Row
from fedloom.engines.inprocess import InProcess
from fedloom.evaluation.generation import Generation
from fedloom.models.build import fingerprint
from fedloom.result import open_run
from fedloom.results import forecast, judging, probes, suites
from fedloom.results.chat import Chat
from fedloom.results.plan import make_plan
from fedloom.results.probes import Cost, Line
from fedloom.results.route import Router
from fedloom.rounds import emulation
from fedloom.rounds.emulation import stage_of
from fedloom.rounds.inputs import read_notes
from fedloom.rounds.loop import begin
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import build
from fedloom.spaces.emulation import gradient
from fedloom.spaces.offsite import OffsiteSpace
from fedloom.suites.likelihood import Continuation, Likelihood
from fedloom.tracking.records import records

pytestmark = pytest.mark.slow

Make = Callable[..., Recipe]
PUBLIC = {"source": "builtin:polyglot", "where": {"language": ["da"]}, "num_examples": 12}
ALIGN = {"public": PUBLIC, "before": 2, "steps": 2, "batch_size": 2}


@pytest.fixture(scope="session")
def deep(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Return a folder with a random Llama of eight layers."""
    folder = tmp_path_factory.mktemp("models") / "deep"
    tiny_llama(layers=8, vocab=len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def made(small_recipe: Make, deep: str) -> Make:
    """Return a maker of small runs of offsite tuning; what is said of `offsite` is of its section."""

    def make(*, offsite: Any = None, **sections: Any) -> Recipe:
        settings = {"left": 1, "right": 1, "adapter": {"lora": {"rank": 2}}, **(offsite or {})}
        given = {
            "model": {"name": deep},
            "tune": {"offsite": settings},
            "data": {"num_examples": 24, "max_length": 64},
            "local": {"steps": 1, "batched": "off"},
            "evaluation": {"every": 1, "generate": False},
            "run": {"rounds": 2, "samples": 0},
        }
        for name, section in sections.items():
            known = given.get(name)
            merged = isinstance(known, dict) and isinstance(section, dict) and name != "tune"
            given[name] = {**known, **section} if merged else section  # type: ignore[dict-item]
        return small_recipe(**given)

    return make


def aligned(made: Make, **changes: Any) -> Recipe:
    return made(offsite={"factors": 2}, algorithm=[{"fedbiot": {**ALIGN, **changes}}, "fedavg"])


def test_a_run_is_measured_around_the_emulator_and_plugged_in(made: Make, tmp_path: Path) -> None:
    result = experiment.run(made(), tmp_path / "run")
    for line in records(tmp_path / "run" / "metrics.jsonl").rows():
        for split in ("validation", "test"):
            assert line[f"{split}/loss"] != line[f"{split}/plugin/loss"] > 0
            assert line[f"{split}/plugin/perplexity"] == pytest.approx(
                torch.tensor(line[f"{split}/plugin/loss"]).exp().item(), rel=1e-5
            )
    assert "test/plugin/loss" in result.summary["final"]
    # Layers keep their numbers of the whole model, of which the emulator has fewer.
    file = open_run(result.folder).export(tmp_path / "out", form="gguf-lora")["global"]
    assert {t.name.split(".")[1] for t in gguf.GGUFReader(file).tensors} == {"0", "7"}


def test_public_tests_and_routes_are_of_the_whole_model(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = experiment.run(made(), tmp_path / "run")
    rows = [{"question": "Is it?", "choices": ["no", "yes"], "answer": at} for at in (0, 1)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    layers = list[int]()

    def judge(model: Any, _tokenizer: Any, asked: Sequence[Continuation], **_: Any) -> Any:
        layers.append(len(model.model.layers))
        return [Likelihood(0.0, True, 1) for _ in asked]

    monkeypatch.setattr(suites, "likelihoods", judge)
    opened = open_run(result.folder)
    opened.suites([suites.Asked("arc", file)])
    assert layers == [8]
    session = opened.open("route").session
    (record,) = to_records(
        [Row({"prompt": "Say it.", "completion": "yes"}, "")], DataSettings()
    ).records
    router = Router(session, Chat.open(session, None).models)
    (evidence,) = router.route([record]).evidence.values()
    examples, model = router.examples([record]), session.space.model
    (around,) = session.evaluator.losses(model, examples)
    with session.evaluator.deployed() as evaluator:
        (whole,) = evaluator.losses(model, examples)
    assert evidence == pytest.approx(-whole) != pytest.approx(-around)

    def harness(model: Any, *_: Any, **__: Any) -> dict[str, Any]:
        layers.append(len(model.model.layers))
        return {}

    def write(_self: Generation, model: Any, prompts: Sequence[Any], _ends: Any) -> list[str]:
        layers.append(len(model.model.layers))
        return ["yes"] * len(prompts)

    monkeypatch.setattr("fedloom.result.harness", harness)
    monkeypatch.setattr(Generation, "answers", write)
    opened.lm_eval([])
    assert judging._answered(session, [judging.Prompt("Say it.")], judging.Writing()) == [["yes"]]
    assert set(layers) == {8}


def test_without_a_dropped_layer_it_is_fedavg_of_the_same_layers_to_the_bit(
    made: Make, tmp_path: Path
) -> None:
    parts = ["layers.0", "layers.7"]
    recipes = {
        "offsite": made(offsite={"drop": 0.0, "adapter": {"full": {}}}),
        "full": made(tune={"full": {"weights": parts}}),
    }
    ends = [
        experiment.run(recipe, tmp_path / name).summary["state_sha256"]
        for name, recipe in recipes.items()
    ]
    assert ends[0] == ends[1]
    lines = [records(tmp_path / name / "metrics.jsonl").rows()[-1] for name in recipes]
    assert lines[0]["test/loss"] == lines[1]["test/loss"] == lines[0]["test/plugin/loss"]
    assert lines[0]["comm/upload_bytes"] == lines[1]["comm/upload_bytes"]


@pytest.mark.parametrize("factors", [0, 2])
def test_no_message_names_a_layer_between_those_that_learn_but_for_the_emulator_s_factors(
    factors: int, made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[int]] = {"down": set(), "up": set()}
    frozen: set[str] = set()
    answer = InProcess.run

    def run(engine: InProcess, tasks: Any) -> Any:
        for task in tasks:
            seen["down"] |= {int(n.split(".")[2]) for n in task.download["params"]}
            frozen.update(n for n in task.download["params"] if ".lora_" not in n)
            assert set(task.download) == {"params"}
        for delivery in answer(engine, tasks):
            for group in getattr(delivery.answer, "upload", {}).values():
                seen["up"] |= {int(n.split(".")[2]) for n in group}
            yield delivery

    monkeypatch.setattr(InProcess, "run", run)
    experiment.run(aligned(made) if factors else made(), tmp_path / "run")
    # Of the six layers between them the emulator has three.
    assert seen["down"] == ({0, 1, 3, 6, 7} if factors else {0, 7})
    assert seen["up"] == {0, 7}
    assert not frozen


def test_clients_leave_the_emulator_as_it_was_sent(made: Make, tmp_path: Path) -> None:
    recipe = aligned(made, before=1, steps=0)
    with experiment.session(recipe, tmp_path / "run") as s:
        weights = fingerprint(s.session.space.model)
        states = [s.run.state, *(s.run.state for _ in s.rounds())]
    assert fingerprint(s.session.space.model) == weights
    # Before the first round the server moved it, and nobody after.
    assert not equal(states[0].others, states[1].others)
    assert equal(states[1].others, states[2].others)
    assert not equal(states[1].inner.params, states[2].inner.params)


def test_alignment_brings_the_emulator_nearer_and_is_told_of(made: Make, tmp_path: Path) -> None:
    recipe = aligned(made, before=15, steps=5, optimizer={"adamw": {"lr": 0.01}}, batch_size=12)
    experiment.run(recipe, tmp_path / "run")
    lines = records(tmp_path / "run" / "metrics.jsonl").rows()
    assert "server/align_kl" not in lines[0]
    assert all(line["server/align_kl"] >= 0 for line in lines[1:])
    assert lines[2]["server/align_hidden"] < lines[1]["server/align_hidden"]


class Killed(BaseException):
    """Ends the process as far as the code can tell."""


@pytest.mark.parametrize("at", [1, 4, 5])
def test_a_run_that_dies_while_the_emulator_is_aligned_goes_on_to_the_same_bits(
    at: int, made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes two steps before round 1, and two after each of two rounds."""
    whole = experiment.run(aligned(made), tmp_path / "whole").summary
    taken = 0

    def dying(*args: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == at:
            raise Killed
        return gradient(*args)

    with monkeypatch.context() as patch:
        patch.setattr(emulation, "gradient", dying)
        with pytest.raises(Killed):
            experiment.run(aligned(made), tmp_path / "cut")
    again = experiment.run(aligned(made), tmp_path / "cut").summary
    assert again["state_sha256"] == whole["state_sha256"]
    assert again["final"] == whole["final"]


def test_a_plan_counts_the_steps_that_align_the_emulator(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = aligned(made)
    session = build(recipe, tmp_path / "plan")
    stage = stage_of(session)
    assert stage is not None
    planned, taken = [*stage.all_batches()], list[Any]()

    def watched(space: Any, params: Any, rows: Any, distance: Any) -> Any:
        taken.append(rows)
        return gradient(space, params, rows, distance)

    monkeypatch.setattr(emulation, "gradient", watched)
    experiment.run(recipe, tmp_path / "run")
    assert [[r.key for r in rows] for rows in planned] == [[r.key for r in rows] for rows in taken]
    monkeypatch.setattr(forecast, "aligning", lambda _: Cost(0.0, Line(60.0, 0.0), Line(9e9, 0.0)))
    plan = make_plan(recipe)
    assert (plan.align_seconds, plan.peak_memory_bytes) == (360.0, int(9e9))
    shown = io.StringIO()
    Console(width=120, file=shown).print(plan.table())
    assert re.search(r"alignment at the server +│ 6 min", shown.getvalue())


@pytest.mark.parametrize(("before", "steps"), [(2, 0), (0, 2)])
def test_factors_that_have_moved_are_planned_as_they_are_sent(
    before: int, steps: int, made: Make, tmp_path: Path
) -> None:
    """Before the first step some of them are zeros, which a message packs away."""
    fedbiot = {"fedbiot": {**ALIGN, "before": before, "steps": steps}}
    recipe = made(
        offsite={"factors": 2}, algorithm=[fedbiot, "fedavg"], local={"steps": 4, "batched": "off"}
    )
    planned = make_plan(recipe)
    summary = experiment.run(recipe, tmp_path / "run").summary
    measured = summary["upload_bytes"] + summary["download_bytes"]
    assert planned.total_bytes == pytest.approx(measured, rel=0.03)


def test_what_a_step_of_an_alignment_costs_is_tried(made: Make, tmp_path: Path) -> None:
    stage = stage_of(build(aligned(made), tmp_path / "plan"))
    assert stage is not None
    cost = probes.aligning(stage)
    assert cost.seconds.at(100, 1) > 0
    assert cost.memory.at(100) > 1e8


def test_what_the_optimizer_remembers_lasts_from_round_to_round(made: Make, tmp_path: Path) -> None:
    with experiment.session(aligned(made), tmp_path / "run") as s:
        steps = [
            s.run.state.moments.num_steps,
            *(s.run.state.moments.num_steps for _ in s.rounds()),
        ]
    assert isinstance(s.run.state, FedBiOTState)
    assert steps == [0, 4, 6]


def test_public_text_that_a_client_holds_is_refused_before_anything_is_written(
    made: Make, tmp_path: Path
) -> None:
    own = {"source": "builtin:polyglot", "where": {"language": ["en"]}, "num_examples": 24}
    with pytest.raises(
        ValueError, match=r"fedbiot\.public must be text that no client holds, got rows"
    ):
        experiment.run(aligned(made, public=own), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize("answer", ["good", "bad"])
def test_either_answer_of_a_pair_is_text_that_a_client_holds(
    answer: str, made: Make, tmp_path: Path
) -> None:
    pairs = [{"prompt": f"q {i}", "chosen": "good", "rejected": "bad"} for i in range(24)]
    files = {"pairs": pairs, "public": [{"prompt": "q 3", "completion": answer}] * 2}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(tmp_path / "pairs.jsonl"), "partition": "iid", "where": {}}
    public = {"fedbiot": {**ALIGN, "public": {"source": str(tmp_path / "public.jsonl")}}}
    recipe = made(offsite={"factors": 2}, algorithm=[public, "fedavg"], data=data, objective="dpo")
    with pytest.raises(ValueError, match=r"fedbiot\.public must be text that no client holds"):
        stage_of(build(recipe, tmp_path))


def test_public_text_that_cannot_be_read_says_where_it_is_named(made: Make, tmp_path: Path) -> None:
    public = {"source": str(tmp_path / "nothing.jsonl")}
    with pytest.raises(
        ValueError, match=r"fedbiot\.public, read as a section data: .*nothing\.jsonl"
    ):
        experiment.run(aligned(made, public=public), tmp_path / "run")


def test_public_text_that_has_changed_is_refused_as_changed_data_are(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    said = [{"prompt": f"public {at}", "completion": f"{at}"} for at in range(8)]
    file = tmp_path / "here" / "public.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in said))
    recipe = aligned(made, public={"source": "public.jsonl"})
    folder = tmp_path / "run"
    with experiment.session(recipe, folder) as s:
        next(s.rounds())
    # Found where it was, wherever a command is started.
    monkeypatch.chdir(tmp_path)
    assert experiment.run(recipe, folder).summary["rounds"] == 2
    file.write_text(file.read_text().replace("public 3", "public 9"))
    with pytest.raises(
        ValueError, match=r"has changed: text of the server's own \(fedbiot\.public"
    ):
        experiment.run(recipe, folder)
    experiment.run(recipe, folder, anyway=True)
    (note,) = read_notes(folder)
    assert [each["key"] for each in note["differs"]] == ["public"]
    assert experiment.run(recipe, folder).summary["rounds"] == 2


def test_joined_rows_are_refused_as_nobody_could_tell_whose_they_are(
    made: Make, tmp_path: Path
) -> None:
    recipe = aligned(made)
    packed = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, packing=True))
    with pytest.raises(ValueError, match=r"data\.packing must be false for algorithm fedbiot"):
        experiment.run(packed, tmp_path / "run")


def test_the_same_emulator_serves_clusters(made: Make, tmp_path: Path) -> None:
    layers = [
        {"fedbiot": ALIGN},
        {"clustered": {"mode": {"random": {"num_clusters": 2}}}},
        "fedavg",
    ]
    recipe = made(offsite={"factors": 2}, algorithm=layers)
    experiment.run(recipe, tmp_path / "run")
    session = build(recipe, tmp_path / "other")
    stage = stage_of(session)
    assert stage is not None
    assert isinstance(session.space, OffsiteSpace)
    run = begin(recipe.algorithm, session.space.start(), 0)
    assert not equal(stage.before(run).state.others, run.state.others)


@pytest.mark.parametrize("factors", [0, 2])
def test_a_batched_cohort_around_an_emulator_is_its_clients_one_by_one(
    factors: int, made: Make, tmp_path: Path
) -> None:
    ends = []
    for batched in ("auto", "off"):
        changes: dict[str, Any] = {"local": {"batched": batched, "steps": 2}}
        if factors:
            changes |= {"offsite": {"factors": 2}, "algorithm": [{"fedbiot": ALIGN}, "fedavg"]}
        with experiment.session(made(**changes), tmp_path / batched) as s:
            assert isinstance(s.session.trainer, Cohort) == (batched == "auto")
            for _ in s.rounds():
                pass
            state = s.run.state
            ends.append(state.inner.params if factors else state.params)
    for name, tensor in ends[0].items():
        assert torch.allclose(tensor, ends[1][name], atol=1e-5)


def test_preferences_are_compared_with_the_emulator_and_plugged_in_with_the_whole_model(
    made: Make, tmp_path: Path
) -> None:
    recipe = made(objective="dpo", data={"source": "builtin:polyglot_pairs"}, run={"rounds": 1})
    experiment.run(recipe, tmp_path / "run")
    before, after = records(tmp_path / "run" / "metrics.jsonl").rows()
    # Before training every answer is as likely as under its reference, to the bit.
    for name in (
        "preference_margin",
        "chosen_drift",
        "plugin/preference_margin",
        "plugin/chosen_drift",
    ):
        assert before[f"test/{name}"] == 0
        assert after[f"test/{name}"] != 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedot", "fedbiot"])
def test_what_is_learnt_around_an_emulator_makes_the_whole_model_better(
    name: str, tmp_path: Path
) -> None:
    small = ["data.num_examples=300", "local.steps=4", "run.rounds=2", "run.samples=0"]
    ended = experiment.run(name, tmp_path / "run", overrides=[*small, "evaluation.every=0"]).summary
    for metric in ("test/loss", "test/plugin/loss"):
        assert ended["final"][metric] < ended["before"][metric]
    assert 0.5 < ended["disclosed"] < 1


def test_other_kinds_of_run_have_no_stage(small_recipe: Make, tmp_path: Path) -> None:
    assert stage_of(build(small_recipe(), tmp_path)) is None
