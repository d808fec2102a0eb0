"""Clusters, and results by label, on the page."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.clustering.given import Given
from fedloom.clustering.members import Grouping, clusters_of, regrouped, with_rows
from fedloom.report.page import write_report
from fedloom.report.pooling import by_layer
from fedloom.results.finish import clusters_record

Make = Callable[..., Path]


def planted(clients: int, groups: int) -> Grouping:
    """Return a grouping that heard two thirds of the clients in round 2 and all in round 3."""
    source = torch.Generator().manual_seed(0)
    centers = torch.randn(groups, 2000, generator=source)
    rows = {
        f"client-{i:03d}": centers[i % groups] + torch.randn(2000, generator=source)
        for i in range(clients)
    }
    some = dict(list(rows.items())[: 2 * clients // 3])
    grouping, _ = regrouped(with_rows(Grouping(), some, 2), 2)
    return regrouped(with_rows(grouping, rows, 3), 3)[0]


def told(clients: int, groups: int) -> dict[str, Any]:
    profiles = {f"client-{i:03d}": {"language": "abcdefgh"[i % groups]} for i in range(clients)}
    return clusters_record(clusters_of(planted(clients, groups)), profiles)


def page(folder: Path, **files: Any) -> str:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return write_report(folder).read_text(encoding="utf-8")


def section(page: str, which: str) -> str:
    found = re.search(f'<section id="{which}">.*?</section>', page, flags=re.DOTALL)
    return found[0] if found else ""


def test_the_page_shows_similarity_tree_and_course(fabricate: Make) -> None:
    part = section(page(fabricate(clients=12), clusters=told(12, 3)), "clusters")
    assert part.count("<svg") == 3
    for said in (
        "3 clusters.",
        "cluster-0 (4)",
        "client-011",
        "cut",
        "adjusted Rand index is 1.000",
    ):
        assert said in part
    assert 'src="data:image/png' in part or "data:image/png" in part
    assert "#0072b2" not in part


def test_many_clients_are_named_by_their_cluster(fabricate: Make) -> None:
    part = section(page(fabricate(clients=48), clusters=told(48, 4)), "clusters")
    assert "client-001" not in part
    assert part.count(">cluster-3<") >= 2


def test_clusters_of_another_package_have_names_of_its_own(fabricate: Make) -> None:
    record = told(12, 3)
    names = {"cluster-0": "north", "cluster-1": "south-west", "cluster-2": "group-10"}
    record["assignment"] = {c: names[k] for c, k in record["assignment"].items()}
    record["changes"] = {"3": record["assignment"]}
    part = section(page(fabricate(clients=12), clusters=record), "clusters")
    assert [part.index(f"{name} (4)") for name in ("north", "south-west", "group-10")] == sorted(
        part.index(f"{name} (4)") for name in names.values()
    )


def test_clusters_by_a_label_have_neither_similarity_nor_tree(fabricate: Make) -> None:
    from fedloom.algorithms.clustered import Clustered
    from fedloom.algorithms.fedavg import FedAvg
    from fedloom.core.protocols import Reply, Round

    algorithm: Clustered[Any] = Clustered(FedAvg(), mode=Given("language"))
    people = {"a": {"language": "x"}, "b": {"language": "y"}, "c": {"language": "y"}}
    round = Round(1, 0, people, tuple(people), 1.0)
    state = algorithm.init({"w": torch.zeros(1)}, 0)
    replies = [Reply(client, {"delta": {"w": torch.ones(1)}}) for client in people]
    state, _ = algorithm.server_update(state, round, iter(replies))
    record = clusters_record(clusters_of(state.grouping), people)
    part = section(page(fabricate(clients=3), clusters=record), "clusters")
    assert part.count("<svg") == 1
    assert "2 clusters." in part
    assert "Confidence" not in part


def with_lambdas(folder: Path, *lambdas: float, alike: int = 0) -> Path:
    """Return the run, whose clusters went this far their own way in each of its rounds, the first less and less."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        line |= {f"server/cluster-{k}/lambda": value for k, value in enumerate(lambdas)}
        line |= {"server/lambda": sum(lambdas) / len(lambdas), "server/rounds_alike": float(alike)}
        line |= {"server/lasting": 0.11, "server/gain": 4.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def differing(*layers: tuple[float, float]) -> dict[str, Any]:
    return {
        f"model.layers.{at}.self_attn.{name}.lora_B.weight": {"noise": noise, "spread": spread}
        for at, (noise, spread) in enumerate(layers)
        for name in ("q_proj", "v_proj")
    }


def test_pooled_clusters_say_how_much_is_shared_and_in_which_layers(fabricate: Make) -> None:
    record = told(12, 3) | {"variances": differing((9.0, 1.0), (6.0, 4.0))}
    folder = with_lambdas(fabricate(clients=12), 0.5, 0.25, 0.125)
    part = section(page(folder, clusters=record), "clusters")
    assert part.count("<svg") == 5
    for said in (
        "3 clusters last went 12.5 % to 50 % of their own way (lambda)",
        "25 % are between clusters",
        "11 % come back every round",
        "by a gain of 4.",
        "How far each cluster goes its own way (lambda)",
        "Part of clients&#39; differences that is their clusters",
    ):
        assert said.replace("&#39;", "'") in part.replace("&#39;", "'")
    assert by_layer(record["variances"]) == {"0": 0.1, "1": 0.4}


def test_pooled_clusters_that_are_alike_say_so(fabricate: Make) -> None:
    record = told(12, 3) | {"variances": differing((9.0, 0.0))}
    folder = with_lambdas(fabricate(clients=12), 0.0, 0.031, 0.0)
    part = section(page(folder, clusters=record), "clusters")
    assert (
        "3 clusters, alike enough to share nearly all: each last went 3.1 % of its own way" in part
    )
    assert "in a row" not in part
    (given := told(12, 3) | {"variances": differing((9.0, 0.0))})["similarity"] = []
    for each, rarer in ((record, True), (given, False)):
        folder = with_lambdas(fabricate(f"for long {rarer}", clients=12), 0.0, 0.001, alike=12)
        part = section(page(folder, clusters=each), "clusters")
        assert "For 12 rounds in a row it was less than 1 %" in part
        assert ("more rarely clients are probed" in part) == rarer
    folder = with_lambdas(fabricate("unknown", clients=12), 0.0, 0.0, 0.0)
    part = section(page(folder, clusters=record), "clusters")
    assert "is not known yet" in part
    assert "alike enough" not in part
    assert by_layer({"w": {"noise": 0.0, "spread": 0.0}, "a.b": {"noise": 1.0, "spread": 3.0}}) == {
        "a": 0.75,
        "w": 0.0,
    }


def test_a_run_that_never_found_a_cluster_says_nothing(fabricate: Make) -> None:
    assert not section(
        page(fabricate(), clusters=clusters_record(clusters_of(Grouping()), {})), "clusters"
    )
    assert not section(page(fabricate("without")), "clusters")


# --- by label ------------------------------------------------------------------------------------


def scored(loss: float, hit: float) -> Mapping[str, float]:
    return {"loss": loss, "exact_match": hit, "chrf": hit, "num_examples": 4.0, "num_tokens": 9.0}


BY_LABEL = {
    "label": "language",
    "own": {"da": scored(1.0, 0.75), "sv": scored(2.0, 0.5)},
    "worst": {"loss": {"value": "sv", "result": 2.0}},
    "models": [
        {
            "name": "cluster-0",
            "clients": ["client-000", "client-001"],
            "metrics": {"da": scored(1.0, 0.75), "sv": scored(3.0, 0.25)},
        },
        {
            "name": "cluster-1",
            "clients": ["client-002"],
            "metrics": {"da": scored(4.0, 0.125), "sv": scored(2.0, 0.5)},
        },
    ],
}


@pytest.fixture
def beside(fabricate: Make) -> Path:
    """Return a run whose baseline is better in one language and worse in the other."""
    folder = fabricate()
    baseline = fabricate(folder=folder / "baselines" / "fedavg")
    own = {"da": scored(1.5, 0.25), "sv": scored(1.5, 0.625)}
    one = {**BY_LABEL, "own": own, "models": [{"name": "global", "clients": [], "metrics": {}}]}
    (baseline / "by_label.json").write_text(json.dumps(one))
    return folder


def test_each_language_has_a_row_beside_the_baselines_with_mean_and_worst(beside: Path) -> None:
    part = section(page(beside, by_label=BY_LABEL), "by-label")
    assert "Results by language" in part
    rows = re.findall(r"<tr><td.*?>(.*?)</td>(.*?)</tr>", part, flags=re.DOTALL)
    cells = {
        (at // 4, name): re.findall(r'<td class="n( strong)?">(.*?)</td>', rest)
        for at, (name, rest) in enumerate(rows)
    }
    assert cells[0, "da"] == [(" strong", "75.0 %"), ("", "25.0 %")]
    assert cells[0, "sv"] == [("", "50.0 %"), (" strong", "62.5 %")]
    assert cells[0, "mean"] == [(" strong", "62.5 %"), ("", "43.8 %")]
    assert cells[0, "worst"] == [(" strong", "50.0 %"), ("", "25.0 %")]
    assert cells[1, "worst"] == [("", "2.000"), (" strong", "1.500")]


def test_every_model_is_shown_on_every_language(beside: Path) -> None:
    part = section(page(beside, by_label=BY_LABEL), "by-label")
    assert part.count("<svg") == 2
    for said in ("Exact match of every model on every language", ">12.5 %<", ">4.000<"):
        assert said in part


def test_one_model_for_all_has_a_table_and_no_matrix(fabricate: Make) -> None:
    one = {**BY_LABEL, "models": [{"name": "global", "clients": ["client-000"], "metrics": {}}]}
    part = section(page(fabricate(), by_label=one), "by-label")
    assert "<svg" not in part
    assert ">75.0 %<" in part
