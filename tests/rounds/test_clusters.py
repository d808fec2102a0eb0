"""What a run with clusters leaves behind: its models by name, who is where, and results by label."""

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom import experiment
from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.fedavg import FedAvg
from fedloom.baselines import baseline_of
from fedloom.clustering.given import Given, Random
from fedloom.clustering.modes import Paper
from fedloom.clustering.sharing import Sharing
from fedloom.core.description import Clusters, describe
from fedloom.evaluation.measure import combine
from fedloom.results.chat import AUTO, Chat
from fedloom.results.export import deliverables
from fedloom.results.finish import clusters_record, record_clusters
from fedloom.results.route import Router
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.restore import last_run
from fedloom.rounds.session import Session, build

Make = Callable[..., Recipe]
LANGUAGES: dict[str, Any] = {
    "num_examples": 120,
    "where": {"language": ["de", "en"], "task": ["opposite", "plural"]},
    "partition": {"clusters": {"by": "language"}},
}
CLUSTERED = [{"clustered": {"mode": {"given": {"by": "language"}}}}, "fedavg"]


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture
def opened(small_recipe: Make, tmp_path: Path) -> Callable[..., Session]:
    """Return a function that runs four clients of two languages and opens what it left."""

    def run(**sections: Any) -> Session:
        data = {**LANGUAGES, **sections.pop("data", {})}
        recipe = small_recipe(**{"algorithm": CLUSTERED, "data": data, **sections})
        experiment.run(recipe, tmp_path / "run")
        return build(recipe, tmp_path / "run")

    return run


def test_each_cluster_is_a_folder_that_peft_loads(
    opened: Callable[..., Session], tiny_folder: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    session = opened(local={"lr": 5.0})
    folder = session.folder / "adapters"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"cluster-0", "cluster-1"}
    assert "client-002, client-003" in (folder / "cluster-1" / "README.md").read_text()
    ids, logits = torch.arange(5, 25)[None], []
    for name in ("cluster-0", "cluster-1"):
        base = AutoModelForCausalLM.from_pretrained(tiny_folder)
        with torch.no_grad(), warnings.catch_warnings():
            # PEFT 0.21 asks transformers under a name that version 6 will drop.
            warnings.simplefilter("ignore", FutureWarning)
            logits.append(PeftModel.from_pretrained(base, folder / name)(input_ids=ids).logits)
        session.space.load(deliverables(session, last_run(session))[name][0])
        with torch.no_grad():
            ours = session.space.model(input_ids=ids).logits
        assert torch.allclose(ours, logits[-1], atol=1e-5)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


def test_clusters_are_told_with_what_they_rest_on(opened: Callable[..., Session]) -> None:
    session = opened()
    told = read(session.folder / "clusters.json")
    assert list(told["assignment"].values()) == ["cluster-0"] * 2 + ["cluster-1"] * 2
    assert told["changes"] == {"1": told["assignment"]}
    assert told["agreement"]["language"] == {"adjusted_rand": 1.0, "num_values": 2}
    assert read(session.folder / "summary.json")["num_clusters"] == 2
    # While a run goes on, they are written down in the rounds in which they change.
    (session.folder / "clusters.json").unlink()
    run = last_run(session)
    record_clusters(session, run)
    assert not (session.folder / "clusters.json").exists()
    record_clusters(session, dataclasses.replace(run, number=1))
    assert read(session.folder / "clusters.json") == told


def test_clients_without_held_out_data_have_their_cluster_exported_too(
    opened: Callable[..., Session],
) -> None:
    held_out = {"fractions": [1, 0, 0], "held_out": {"task": ["plural"]}}
    session = opened(data=held_out, evaluation={"validation": False})
    models = deliverables(session, last_run(session))
    assert {name: clients for name, (_, clients) in models.items()} == {
        "cluster-0": ["client-000", "client-001"],
        "cluster-1": ["client-002", "client-003"],
        "global": ["held-out"],
    }


def test_a_run_without_a_grouping_has_none() -> None:
    assert describe(FedAvg(), FedAvg().init({"w": torch.zeros(1)}, 0)).clusters is None
    algorithm: Clustered[Any] = Clustered(FedAvg())
    assert describe(algorithm, algorithm.init({"x.lora_B": torch.zeros(4)}, 0)).clusters is not None
    assert clusters_record(Clusters(), {})["assignment"] == {}


@pytest.mark.parametrize("label", ["language", "file"])
def test_agreement_is_told_of_labels_that_all_have_and_some_share(label: str) -> None:
    clusters = Clusters({"a": "cluster-0", "b": "cluster-0", "c": "cluster-1"})
    profiles = {
        "a": {"group": "x", label: "x", "name": "1", "all": "-"},
        "b": {"group": "x", label: "x", "name": "2", "all": "-", "tier": "s"},
        "c": {"group": "y", label: "y", "name": "3", "all": "-"},
    }
    assert clusters_record(clusters, profiles)["agreement"] == {
        label: {"adjusted_rand": 1.0, "num_values": 2}
    }


# --- by label ------------------------------------------------------------------------------------


def test_results_by_language_are_those_of_the_clients_and_of_every_model(
    opened: Callable[..., Session],
) -> None:
    session = opened(evaluation={"by": "language", "max_examples": 2}, local={"lr": 5.0})
    told = read(session.folder / "by_label.json")
    final = read(session.folder / "summary.json")["final"]
    for metric in ("loss", "exact_match", "chrf"):
        assert combine(told["own"].values())[metric] == pytest.approx(final[f"test/{metric}"])
    assert told["own"]["de"]["num_examples"] == 4
    cross = {model["name"]: model["metrics"] for model in told["models"]}
    assert cross["cluster-0"]["de"] == pytest.approx(told["own"]["de"])
    assert cross["cluster-1"]["en"] == pytest.approx(told["own"]["en"])
    assert cross["cluster-0"]["en"]["loss"] != pytest.approx(told["own"]["en"]["loss"])
    assert cross["cluster-0"]["en"]["num_examples"] == 4
    worst = max(told["own"], key=lambda value: told["own"][value]["loss"])
    assert told["worst"]["loss"] == {"value": worst, "result": told["own"][worst]["loss"]}


def test_clients_of_several_languages_are_told_apart_example_by_example(
    opened: Callable[..., Session],
) -> None:
    session = opened(
        algorithm="fedavg",
        data={"partition": {"clusters": {"by": "language", "share": 0.5}}},
        evaluation={"by": "language"},
    )
    told = read(session.folder / "by_label.json")
    final = read(session.folder / "summary.json")["final"]
    assert combine(told["own"].values())["loss"] == pytest.approx(final["test/loss"])
    assert told["models"] == [
        {"name": "global", "clients": [f"client-{i:03d}" for i in range(4)], "metrics": {}}
    ]


def test_a_label_that_the_data_lacks_is_refused_before_anything_is_written(
    small_recipe: Make, tmp_path: Path
) -> None:
    recipe = small_recipe(evaluation={"by": "dialect"})
    with pytest.raises(
        ValueError,
        match=r"evaluation\.by must be a label of the data \(language, task\), got 'dialect'",
    ):
        experiment.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_clients_that_never_train_use_the_model_for_all_and_are_no_hypothesis_of_a_route(
    opened: Callable[..., Session],
) -> None:
    sections: dict[str, Any] = {"data": {"unseen": 0.5}, "run": {"rounds": 1, "samples": 0}}
    session = opened(algorithm=["ditto", "fedavg"], **sections)
    strangers = list(session.unseen)
    models = deliverables(session, last_run(session))
    assert len(strangers) == 2
    assert models["global"][1] == strangers
    assert sorted(models) == sorted({*session.learners, "global"})
    route = Router(session, models).route(["Was ist das Gegenteil von klein?"])
    assert route.sizes == {**dict.fromkeys(session.learners, 1), "global": 0}


def test_clients_that_are_called_as_another_model_is_have_folders_of_their_own(
    small_recipe: Make, tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"{at} plus {at % 3}", "completion": f"{at + at % 3}", "who": who}
        for at in range(24)
        for who in ("Global", "cluster-0", "anna")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(tmp_path / "rows.jsonl"), "partition": {"natural": {"by": "who"}}}
    given = {"clustered": {"mode": {"random": {"num_clusters": 1}}}}
    recipe = small_recipe(
        algorithm=["ditto", given, "fedavg"],
        data={"num_examples": None, "num_clients": None, "where": {}, **data},
        evaluation={"generate": False},
        run={"rounds": 1, "samples": 0},
    )
    result = experiment.run(recipe, tmp_path / "run")
    routing = read(tmp_path / "run" / "adapters" / "routing.json")
    own = {"anna": "anna", "Global": "Global-own", "cluster-0": "cluster-0-own"}
    assert routing["clients"] == own
    assert set(result.export(tmp_path / "out")) == {*own.values(), "global"}


# --- a chat --------------------------------------------------------------------------------------


def test_a_chat_takes_a_cluster_by_name_or_lets_all_that_was_asked_choose(
    opened: Callable[..., Session],
) -> None:
    session = opened(local={"lr": 5.0})
    assert Chat.open(session, "cluster-1").name == "cluster-1"
    assert Chat.open(session, "client-003").name == "cluster-1"
    talk = Chat.open(session, AUTO)
    assert talk.name == AUTO
    talk.answer("Was ist das Gegenteil von klein?")
    assert talk.name in ("cluster-0", "cluster-1", "global")
    talk.answer("And now?")
    asked = ["Was ist das Gegenteil von klein?", "And now?"]
    assert talk.route == Router.of(session, last_run(session)).route(asked)
    assert talk.name == talk.route.model
    message = r"own name: cluster-0, cluster-1, global, or auto, which lets what is asked choose"
    with pytest.raises(ValueError, match=message):
        Chat.open(session, None)


def test_of_one_model_there_is_nothing_to_choose(opened: Callable[..., Session]) -> None:
    session = opened(algorithm="fedavg")
    assert Chat.open(session, AUTO).name == "global"
    with pytest.raises(
        ValueError, match=r"or global, the one model that all use, or be left out; got 'nobody'"
    ):
        Chat.open(session, "nobody")


# --- baselines -----------------------------------------------------------------------------------


def test_baselines_of_a_clustered_run_put_other_clusters_in_place_of_its_own(
    small_recipe: Make,
) -> None:
    found = [{"ditto": {}}, {"clustered": {"share": {"mix": 0.1}}}, {"fedavg": {"mu": 0.5}}]
    recipe = small_recipe(algorithm=found, data=LANGUAGES)
    made: dict[str, Any] = {
        kind: baseline_of(recipe, kind, summary={"num_clients": 4, "num_clusters": 3}).algorithm
        for kind in ("fedavg", "oracle", "random")
    }
    assert made["fedavg"] == FedAvg(mu=0.5)
    assert made["oracle"].inner.mode == Given("group")
    assert made["random"].inner.mode == Random(3, recipe.run.seed)
    other = dataclasses.replace(
        recipe, run=dataclasses.replace(recipe.run, seed=recipe.run.seed + 1)
    )
    drawn: Any = baseline_of(
        other, "random", summary={"num_clients": 4, "num_clusters": 3}
    ).algorithm
    assert drawn.inner.mode != made["random"].inner.mode
    assert {made[kind].inner.share for kind in ("oracle", "random")} == {Sharing(pool="off")}
    assert made["oracle"].inner.inner == FedAvg(mu=0.5)


@pytest.mark.parametrize(
    ("sections", "label"),
    [
        ({"algorithm": [{"clustered": {"label": "tongue"}}, "fedavg"]}, "tongue"),
        ({"data": {"partition": {"natural": {"by": "language"}}, "num_clients": None}}, "language"),
        ({"data": {"partition": {"multi_domain": {"by": "language"}}}}, "group"),
    ],
)
def test_the_oracle_goes_by_the_label_that_is_named_or_dealt_out_by(
    sections: dict[str, Any], label: str, small_recipe: Make
) -> None:
    recipe = small_recipe(**{"algorithm": ["clustered", "fedavg"], **sections})
    algorithm: Any = baseline_of(recipe, "oracle", summary={}).algorithm
    assert algorithm.mode == Given(label)


def test_a_baseline_that_cannot_be_made_is_refused_before_the_run(
    small_recipe: Make, tmp_path: Path
) -> None:
    for kind, algorithm, said in (
        (
            "random",
            "fedavg",
            "oracle and random where the algorithm has clustered among its layers",
        ),
        ("oracle", ["clustered", "fedavg"], "name it in algorithm.clustered.label"),
    ):
        # A label that examples are dealt out by is not one that a client's have in common.
        mixed = {"partition": {"dirichlet": {"by": "language"}}}
        recipe = small_recipe(algorithm=algorithm, data=mixed, run={"baselines": [kind]})
        with pytest.raises(ValueError, match=said):
            experiment.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_beside_all_its_baselines(small_recipe: Make, tmp_path: Path) -> None:
    names = ["fedavg", "local", "oracle", "random", "centralised"]
    paper = [{"clustered": {"mode": {"paper": {"num_clusters": 2}}}}, "fedavg"]
    recipe = small_recipe(
        algorithm=paper,
        data=LANGUAGES,
        evaluation={"by": "language", "generate": False},
        run={"baselines": names, "rounds": 2, "samples": 0},
    )
    assert isinstance(recipe.algorithm, Clustered)
    assert recipe.algorithm.mode == Paper(2)
    result = experiment.run(recipe, tmp_path)
    summaries = {"": result.summary, **{n: r.summary for n, r in result.baselines.items()}}
    assert {name: summary["num_clusters"] for name, summary in summaries.items()} == {
        "": 2, "fedavg": 1, "local": 1, "oracle": 2, "random": 2, "centralised": 1,
    }  # fmt: skip
    assert all(summary["worst"]["loss"]["value"] in ("de", "en") for summary in summaries.values())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'id="clusters"' in page
    head = page.split('id="by-label"')[1].split("</thead>")[0]
    assert all(f">{name}</th>" in head for name in ("small", *names))
