"""New clients find their model by what they hold, without a label."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fedloom import experiment
from fedloom.core.description import GLOBAL
from fedloom.core.params import equal
from fedloom.data.formats import Message, Record
from fedloom.results.export import deliverables, routable
from fedloom.results.route import Route, Router, read_probe, route_table
from fedloom.rounds.restore import last_run
from fedloom.rounds.session import Session, build

LETTERS = {"north": "abcd", "south": "wxyz"}


def said(where: str, at: int) -> dict[str, str]:
    """Return a question that anybody may ask, answered in the letters of one place."""
    letters = LETTERS[where]
    answer = "".join(letters[(at * step + step) % 4] for step in range(1, 9))
    return {"prompt": f"Say {letters[at % 4]}{at}.", "completion": answer, "place": where}


def records(where: str, count: int) -> list[Record]:
    rows = [said(where, 1000 + at) for at in range(count)]
    return [
        Record(
            (Message("user", row["prompt"]), Message("assistant", row["completion"])),
            {},
            row["completion"],
        )
        for row in rows
    ]


@pytest.fixture(scope="module")
def router(
    small_recipe: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Session, Router]:
    """Train a model in each of two places that answer in different letters."""
    folder = tmp_path_factory.mktemp("two-places")
    rows = [str(said(where, at)).replace("'", '"') for at in range(30) for where in LETTERS]
    (folder / "places.jsonl").write_text("\n".join(rows))
    recipe = small_recipe(
        algorithm="local",
        data={
            "source": str(folder / "places.jsonl"),
            "num_examples": None,
            "where": {},
            "num_clients": None,
            "partition": {"natural": {"by": "place"}},
        },
        tune={"lora": {"rank": 4, "targets": "all-linear"}},
        local={"optimizer": "adamw", "lr": 0.02, "steps": 20},
        evaluation={"every": 0, "generate": False},
        run={"samples": 0, "rounds": 3},
    )
    experiment.run(recipe, folder / "run")
    session = build(recipe, folder / "run")
    return session, Router(session, deliverables(session, last_run(session)))


@pytest.mark.parametrize("where", LETTERS)
def test_a_client_goes_where_its_answers_surprise_least(
    where: str, router: tuple[Session, Router]
) -> None:
    route = router[1].route(records(where, 4))
    assert route.model == route.likeliest == where
    assert route.surprise[where] == min(route.surprise.values())
    assert route.posterior[where] > 0.99
    assert route.reason == (
        f"{where} suits best: > 99 % likely from 4 examples, 50 % by the number of its clients alone"
    )


def test_a_prompt_goes_where_the_answer_is_begun_most_surely(
    router: tuple[Session, Router],
) -> None:
    session, routes = router
    prompts = [record.messages[0].content for record in records("north", 3)]
    route = routes.route(prompts)
    for name, (params, _) in routes.models.items():
        session.space.load(params)
        total = 0.0
        for prompt in prompts:
            text = f"<user>{prompt}<assistant>"
            ids = torch.tensor(session.base.tokenizer(text, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                chances = session.space.model(input_ids=ids[None]).logits[0, -1].softmax(-1)
            total -= float((chances * chances.log()).sum())
        assert route.surprise[name] == pytest.approx(total / 3, rel=1e-4)
    assert route.model == min(route.surprise, key=lambda name: route.surprise[name])


def test_a_probe_is_read_from_a_file_like_the_data_or_from_lines_of_prompts(
    router: tuple[Session, Router], tmp_path: Path
) -> None:
    session, routes = router
    rows = [str(said("south", at)).replace("'", '"') for at in range(40)]
    (tmp_path / "new.jsonl").write_text("\n".join(rows))
    probe = read_probe(session, tmp_path / "new.jsonl", 16)
    assert len(probe) == 16
    assert probe == read_probe(session, tmp_path / "new.jsonl", 16)
    (tmp_path / "new.txt").write_text("Say w1.\n\n  Say x2. \n")
    assert read_probe(session, tmp_path / "new.txt", 16) == ["Say w1.", "Say x2."]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(route_table(routes, probe))
    told = console.export_text()
    assert "south suits best: > 99 % likely from 16 examples, 50 % by the number of" in told
    assert "loss of the answers" in told
    assert told.index("south ") < told.index("north ")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no example to find a model by"):
        read_probe(session, tmp_path / "empty.txt", 16)
    with pytest.raises(ValueError, match=r"in a file that ends in \.txt, .* got prompts\.md"):
        read_probe(session, Path("prompts.md"), 16)


def test_a_model_without_numbers_is_never_chosen(router: tuple[Session, Router]) -> None:
    session, routes = router
    broken = {
        name: ({key: torch.full_like(value, torch.nan) for key, value in params.items()}, clients)
        for name, (params, clients) in routes.models.items()
    }
    name = next(iter(broken))
    for probe in (records(name, 3), ["Say w1."]):
        others = {key: value for key, value in routes.models.items() if key != name}
        route = Router(session, {name: broken[name], **others}).route(probe)
        assert route.model != name
        assert route.surprise[name] == math.inf
        with pytest.raises(ValueError, match=r"no model of .* can be chosen: none gives numbers"):
            Router(session, broken).route(probe)


def test_a_probe_that_does_not_fit_is_an_error(router: tuple[Session, Router]) -> None:
    with pytest.raises(
        ValueError, match=r"must fit data\.max_length \(192 tokens\), which none of its 2"
    ):
        router[1].route(["x" * 400, "y" * 400])


def of_evidence(
    sizes: dict[str, int], evidence: dict[str, float], *, answered: bool = False
) -> Route:
    return Route(evidence, {GLOBAL: 0, **sizes}, 1, 1, answered)


def test_a_clusters_chance_is_its_share_of_the_clients_times_the_likelihood() -> None:
    # 2 exp(-3), exp(-2), exp(-4): 0.73576, 1 and 0.13534 of 1.87110 after division by exp(-2).
    route = of_evidence({"a": 2, "b": 1, "c": 1}, {"a": -3.0, "b": -2.0, "c": -4.0})
    assert route.prior == {"a": 0.5, "b": 0.25, "c": 0.25}
    expected = {"a": 0.393224, "b": 0.534447, "c": 0.072329}
    assert route.posterior == pytest.approx(expected, abs=1e-5)
    assert route.model == "b"
    assert (
        route.reason
        == "b suits best: 53 % likely from 1 prompt, 25 % by the number of its clients alone"
    )


def test_evidence_adds_up_and_is_never_lost_in_small_numbers() -> None:
    one, two = (of_evidence({"a": 3, "b": 1}, {"a": -2.0 * n, "b": -1.0 * n}) for n in (1, 2))
    odds = [route.posterior["b"] / route.posterior["a"] for route in (one, two)]
    assert odds == pytest.approx([math.e / 3, math.e**2 / 3])
    far = of_evidence({"a": 3, "b": 1}, {"a": -5000.0, "b": -4999.0})
    assert far.posterior == pytest.approx(one.posterior)


@pytest.mark.parametrize(
    ("sizes", "evidence", "answered", "why"),
    [
        ({"a": 1, "b": 1, "c": 1}, (-2.0, -1.9, -2.0), False, "no cluster is more likely than not"),
        ({"a": 1, "b": 1, "c": 1}, (-1.5, -9.0, -9.0), True, "it finds the answers likelier"),
    ],
)
def test_a_probe_in_doubt_is_for_the_model_for_all(
    sizes: dict[str, int], evidence: tuple[float, ...], answered: bool, why: str
) -> None:
    numbers = dict(zip("abc", evidence, strict=True))
    route = of_evidence(sizes, {**numbers, GLOBAL: -1.0}, answered=answered)
    assert route.model == GLOBAL
    assert route.likeliest in "ab"
    assert route.reason.startswith(f"global, the model for all, is used, as {why}: ")
    assert of_evidence(sizes, numbers, answered=answered).model == route.likeliest


def test_a_prompt_does_not_go_to_the_model_for_all_because_that_is_surer() -> None:
    assert of_evidence({"a": 1, "b": 1}, {"a": -1.0, "b": -9.0, GLOBAL: -0.5}).model == "a"


def test_clients_without_a_cluster_are_a_hypothesis_too() -> None:
    route = Route({"a": -2.0, GLOBAL: -1.0}, {"a": 1, GLOBAL: 3}, 2, 2, answered=True)
    assert route.posterior[GLOBAL] == pytest.approx(3 * math.e / (3 * math.e + 1))
    assert route.model == GLOBAL


def test_where_there_is_one_model_there_is_nothing_to_choose() -> None:
    route = of_evidence({"a": 4}, {"a": -2.0})
    assert (route.model, route.reason) == ("a", "a is the only model that gives numbers")
    lone = of_evidence({"a": 4, "b": 4}, {"a": -math.inf, "b": -math.inf, GLOBAL: -1.0})
    assert lone.model == GLOBAL


def test_clusters_that_share_everything_are_not_told_apart(router: tuple[Session, Router]) -> None:
    session, routes = router
    params, _ = routes.models["north"]
    same = {key: value.clone() for key, value in params.items()}
    models = {"one": (params, ["x", "y"]), "two": (same, ["z"]), GLOBAL: (params, [])}
    for probe in (records("north", 4), ["Say w1."]):
        route = Router(session, models).route(probe)
        assert route.posterior == pytest.approx({"one": 2 / 3, "two": 1 / 3})
        assert route.reason.startswith("one suits best: 67 % likely from ")
        assert route.reason.endswith(", 67 % by the number of its clients alone")


def test_there_is_a_model_for_all_to_fall_back_on_where_one_was_learnt(
    router: tuple[Session, Router], small_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    session, routes = router
    assert equal(session.newcomer(last_run(session)), session.space.start())
    assert routable(session, last_run(session)).keys() == routes.models.keys()
    recipe = small_recipe(algorithm=[{"ditto": {}}, "fedavg"])
    experiment.run(recipe, tmp_path)
    session = build(recipe, tmp_path)
    run = last_run(session)
    models = routable(session, run)
    assert set(models) - set(deliverables(session, run)) == {GLOBAL}
    shared, users = models[GLOBAL]
    assert users == []
    assert equal(shared, run.state.params)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_twenty_new_clients_find_their_language_from_sixteen_examples(
    seed: int, tmp_path: Path
) -> None:
    """Three languages, clusters found as they train."""
    from dataclasses import replace

    from fedloom.data.formats import to_records
    from fedloom.data.sources import take_rows
    from fedloom.recipe import load_recipe

    overrides = [
        "data.partition.clusters.share=1.0",
        "data.where={language: [de, pt, sv]}",
        "data.num_clients=6",
        "data.num_examples=1800",
        "evaluation.generate=false",
        "evaluation.every=0",
        "evaluation.max_examples=4",
        "run.baselines=[]",
        "run.samples=0",
        "run.rounds=8",
        f"run.seed={seed}",
    ]
    recipe = load_recipe("polyglot_mixed", overrides)
    experiment.run(recipe, tmp_path)
    session = build(recipe, tmp_path)
    routes = Router(session, deliverables(session, last_run(session)))
    profiles = session.federation.profiles
    speaks = {
        name: profiles[clients[0]]["language"] for name, (_, clients) in routes.models.items()
    }
    assert sorted(speaks.values()) == ["de", "pt", "sv"]
    data = replace(recipe.data, seed=99, num_examples=1200)
    rows = to_records(take_rows(data).rows, data).records
    right = 0
    for at in range(20):
        language = ("de", "pt", "sv")[at % 3]
        mine = [row for row in rows if row.labels["language"] == language]
        probe = mine[at // 3 * 16 : at // 3 * 16 + 16]
        right += speaks[routes.route(probe).model] == language
    assert right >= 19
