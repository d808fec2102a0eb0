"""The twelve lines of a notebook: nothing is registered, everything is an object, on two engines, and it resumes."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

import fedloom
from fedloom import experiment
from fedloom.core.metrics import Metric
from fedloom.core.params import add, sub
from fedloom.core.payloads import NoReplies
from fedloom.core.protocols import (
    ClientUpdate,
    Fit,
    Metrics,
    Params,
    Payload,
    Reply,
    Round,
    Sees,
    Task,
)
from fedloom.rounds.training import FinishedRound

Make = Callable[..., Any]
Rows = list[dict[str, str]]


@dataclass(frozen=True)
class State:
    params: Params


@dataclass(frozen=True)
class Slowly:
    """FedAvg that goes a part of the way, unweighted: a method of a reader's own."""

    pace: float = 0.5
    server_sees: ClassVar[Sees] = "each"

    def init(self, params: Params, seed: int) -> State:
        return State(params)

    def broadcast(self, state: State, round: Round) -> Mapping[str, Payload]:
        sent = {"params": state.params}
        return dict.fromkeys(round.cohort, sent)

    def client_update(self, task: Task, client_state: Payload) -> ClientUpdate:
        start = task.download["params"]
        done = yield Fit(start)
        return Reply(task.client, {"delta": sub(done.params, start)}, metrics=done.metrics), {}

    def deployed(self, download: Payload, client_state: Payload) -> Params:
        return download["params"]

    def server_update(
        self, state: State, round: Round, replies: Iterable[Reply]
    ) -> tuple[State, Metrics]:
        deltas = [reply.upload["delta"] for reply in replies]
        if not deltas:
            raise NoReplies("nobody replied")
        params = state.params
        for delta in deltas:
            part = {name: self.pace / len(deltas) * t for name, t in delta.items()}
            params = add(params, part)
        return State(params), {}


def rows(seed: int, count: int = 12) -> Rows:
    return [
        {"prompt": f"Name {i}", "completion": f"code {i * seed % 97}"} for i in range(1, count + 1)
    ]


def shortness(answer: str, references: Sequence[str]) -> float:
    return 1 / (1 + len(answer))


@dataclass
class Watching:
    """Notes the rounds it is called after, and stops after one of them."""

    last: int | None = None
    seen: list[FinishedRound] = field(default_factory=list)

    def __call__(self, finished: FinishedRound) -> None:
        self.seen.append(finished)
        if finished.number == self.last:
            finished.stop()


DATA = {name: rows(seed) for name, seed in (("north", 7), ("south", 11), ("west", 13))}
SETTINGS = [
    "run.rounds=3",
    "run.baselines=[]",
    "run.samples=1",
    "local.steps=2",
    "local.batch_size=2",
    "tune.lora.rank=2",
    "evaluation.every=1",
    "evaluation.max_new_tokens=3",
]


@pytest.fixture
def given(tiny_llama: Make, tiny_tokenizer: Any) -> dict[str, Any]:
    """Return the objects of the notebook; the model is loaded once and used by every run of a test."""
    return {
        "overrides": SETTINGS,
        "algorithm": Slowly(pace=0.7),
        "data": DATA,
        "model": (tiny_llama(vocab=len(tiny_tokenizer)), tiny_tokenizer),
        "metrics": [Metric("shortness", "shortness", better="higher", score=shortness)],
    }


@pytest.mark.parametrize("engine", ["inprocess", "loopback"])
def test_the_twelve_lines_of_a_notebook_run_and_a_stopped_run_resumes_to_the_bit(
    given: dict[str, Any], tmp_path: Path, engine: str
) -> None:
    given["overrides"] = [*SETTINGS, f"engine={engine}"]
    whole, stopped = Watching(), Watching(last=1)
    result = experiment.run("quickstart", tmp_path / "whole", callbacks=[whole], **given)
    part = experiment.run("quickstart", tmp_path / "part", callbacks=[stopped], **given)
    assert part.summary["rounds"] == 1
    assert part.adapter().is_dir(), "a stopped run delivers its model"
    again = experiment.run("quickstart", tmp_path / "part", **given)
    assert again.summary["state_sha256"] == result.summary["state_sha256"]
    assert again.summary["final"] == result.summary["final"]
    assert [finished.number for finished in whole.seen] == [1, 2, 3]
    assert whole.seen[2].metrics["test/shortness"] == result.metrics[3]["test/shortness"]
    assert result.summary["final"]["test/loss"] < result.summary["before"]["test/loss"]
    assert {record["client"] for record in result.clients} == set(DATA)


def test_the_readmes_objects_are_taken(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (block,) = re.findall(r"```python\n(def brevity.*?)```", text, flags=re.DOTALL)
    small = [*SETTINGS, "run.rounds=1"]
    (tmp_path / "south.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(11)))
    model, tokenizer = given["model"]
    names: dict[str, Any] = {
        "fedloom": fedloom,
        "MyMethod": Slowly,
        "rows": rows(7),
        "model": model,
        "tokenizer": tokenizer,
    }
    exec(block.replace('"runs/mine",', f'"runs/mine", overrides={small},'), names)
    assert "test/brevity" in names["result"].summary["final"]
    (block,) = re.findall(r"```python\n(with fedloom\.session.*?)```", text, flags=re.DOTALL)
    few = "data.num_examples=60"
    exec(block.replace('loop")', f'loop", overrides={[*small, few]})'), names)
    assert fedloom.open_run("runs/own-loop").summary["rounds"] == 1
