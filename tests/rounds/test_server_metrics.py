"""Whom a rule rejected: counted in the metrics, named in a file and on the page."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom import experiment
from fedloom.core.protocols import Reply
from fedloom.engines.codec import MessageCodec
from fedloom.report.influence import influence_section
from fedloom.report.run_folder import read_results
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.server_metrics import split_influence

KRUM = {"fedavg": {"combine": {"multi_krum": {"attackers": 1}}}}
SECTIONS: dict[str, Any] = {
    "algorithm": KRUM,
    "data": {"num_clients": 5, "num_examples": 100},
    "tune": {"lora": {"origin": "zero"}},
}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_names_leave_the_metrics_and_counts_take_their_place() -> None:
    told = {"server/influence/a/b": 0.0, "server/influence/c": 0.5, "server/influence/d": 1.0}
    metrics, parts = split_influence({"train/loss": 1.0, **told})
    assert metrics == {"train/loss": 1.0, "server/num_rejected": 1.0, "server/num_clipped": 1.0}
    assert parts == {"a/b": 0.0, "c": 0.5, "d": 1.0}
    assert split_influence({"train/loss": 1.0}) == ({"train/loss": 1.0}, {})


def test_a_client_that_flips_its_update_is_named_and_the_run_learns(
    small_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = MessageCodec.send

    def send(self: MessageCodec, reply: Reply) -> bytes:
        if reply.client.endswith("3") and reply.upload:
            delta = {name: -100 * t for name, t in reply.upload["delta"].items()}
            reply = Reply(reply.client, {"delta": delta}, reply.weight, reply.metrics)
        return honest(self, reply)

    monkeypatch.setattr(MessageCodec, "send", send)
    experiment.run(small_recipe(**SECTIONS), tmp_path)
    told = lines(tmp_path / "influence.jsonl")
    assert [line["round"] for line in told] == [1, 2, 3]
    (bad,) = [client for client in told[0]["influence"] if client.endswith("3")]
    assert all(line["influence"][bad] == 0 for line in told)
    assert all(sum(line["influence"].values()) == 4 for line in told)
    metrics = lines(tmp_path / "metrics.jsonl")
    assert [line["server/num_rejected"] for line in metrics[1:]] == [1, 1, 1]
    assert not any("influence" in name for line in metrics for name in line)
    section = influence_section(read_results(tmp_path))
    assert section
    assert section["rows"][0] == {
        "client": bad,
        "share": 1.0,
        "rejected": "3 of 3",
        "rounds": "1 to 3",
        "influence": "0 %",
    }
    page = (tmp_path / "report.html").read_text()
    assert "Who was left out" in page
    assert page.index(bad) > 0


def test_a_run_that_goes_on_tells_each_round_once(
    small_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    experiment.run(small_recipe(**SECTIONS, run={"rounds": 2}), tmp_path)
    experiment.run(small_recipe(**SECTIONS), tmp_path)
    assert [line["round"] for line in lines(tmp_path / "influence.jsonl")] == [1, 2, 3]


def test_a_mean_leaves_nobody_out_and_no_file(
    small_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    experiment.run(small_recipe(run={"rounds": 1}), tmp_path)
    assert not (tmp_path / "influence.jsonl").exists()
    assert influence_section(read_results(tmp_path)) is None
    assert "Who was left out" not in (tmp_path / "report.html").read_text()


def test_too_few_clients_for_a_rule_are_refused_before_anything_is_written(
    small_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    sections = {**SECTIONS, "data": {"num_clients": None, "num_examples": 40}}
    sections["data"] |= {"partition": {"natural": {"by": "task"}}}
    sections["algorithm"] = {"fedavg": {"combine": {"bulyan": {"attackers": 40}}}}
    with pytest.raises(ValueError, match="bulyan needs at least 163 replies a round, got a cohort"):
        experiment.run(small_recipe(**sections), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    with pytest.raises(ValueError, match="compares clients by the products of LoRA's factors"):
        experiment.run(small_recipe(**{**SECTIONS, "tune": {"lora": {}}}), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()
