"""Clients trained by several processes beside this one."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import fedloom
from fedloom.client.worker_settings import WorkerSettings
from fedloom.core.protocols import ClientError, ClientFailure, Fit, Job, Task
from fedloom.deploy.greeting import greeting, shared_recipe
from fedloom.deploy.group import SharingOut, grouped
from fedloom.deploy.site import Site
from fedloom.deploy.site_settings import SiteSettings
from fedloom.privacy.clipping import clipped
from fedloom.rounds.loop import begin, draw, tasks
from fedloom.rounds.session import Session, build
from fedloom.wire.format import decode_reply, encode_task

pytestmark = pytest.mark.slow


def distance(a: Any, b: Any) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "adapters").rglob("adapter_model.safetensors")
    return load_file(file)


def test_a_split_run_that_is_taken_up_again_ends_as_that_of_one_process(small_recipe, tmp_path):
    sections: dict[str, Any] = {
        "algorithm": [{"flasc": {"download": 0.25, "upload": 0.25}}, "fedavg"],
        "data": {"num_clients": 2},
        "evaluation": {"every": 1, "generate": False, "max_examples": 4},
        "run": {"rounds": 2, "samples": 0},
    }
    whole = fedloom.run(small_recipe(**sections), tmp_path / "whole")
    split, folder = small_recipe(**sections, worker={"shards": 2}), tmp_path / "split"
    fedloom.run(split, folder, callbacks=[lambda finished: finished.stop()])
    again = fedloom.run(split, folder)
    assert again.summary["rounds"] == 2
    own, other = adapter(tmp_path / "whole"), adapter(tmp_path / "split")
    assert distance(own, other) < 1e-5
    for ours, theirs in zip(whole.metrics, again.metrics, strict=True):
        # The same entries travel.
        assert ours.get("comm/upload_bytes") == theirs.get("comm/upload_bytes")
        assert ours["test/loss"] == pytest.approx(theirs["test/loss"], abs=1e-5)


@pytest.fixture
def session(small_recipe: Callable[..., Any], tmp_path: Path) -> Callable[..., Session]:
    def make(**sections: Any) -> Session:
        recipe = small_recipe(data={"num_clients": 2}, **sections)
        return build(recipe, tmp_path, device=recipe.worker.device_of_whole)

    return make


def round_of(session: Session) -> list[Task]:
    run = begin(session.recipe.algorithm, session.space.start(), session.recipe.run.seed)
    round = draw(run, session.engine.population(), None)
    return list(tasks("train", round, session.recipe.algorithm.broadcast(run.state, round)))


def test_a_process_that_dies_is_a_client_that_is_absent(session):
    alone = session(worker={"shards": 2}, tune="full")
    job = Job("client-000", 1, 7, Fit(alone.space.start(), steps=2))
    with grouped(alone, SiteSettings("here", alone.folder)) as several:
        (own,) = alone.trainer.run([job])
        (other,) = several.watched.run([job])
        assert distance(own.params, other.params) < 1e-5
        norms = [clipped({"delta": one.params}, 1e-3)[1] for one in (own, other)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        group: Any = several.trainer
        first = group._programs
        victim = psutil.Process(first[1].process.pid).children()[0]
        long = Job("client-000", 1, 7, Fit(alone.space.start(), steps=10**6))
        timer = threading.Timer(1.0, victim.kill)
        timer.start()
        with pytest.raises(ClientError, match=r"client-000: process . of 2 ended"):
            several.trainer.run([long])
        assert not any(program.alive() for program in first)
        # The others of the round have processes anew.
        (again,) = several.trainer.run([job])
        assert distance(again.params, other.params) == 0


def test_a_round_ends_without_the_client_whose_processes_take_too_long(session):
    alone = session(worker={"replicas": 2})
    job = Job("client-000", 1, 7, Fit(alone.space.start(), steps=2))
    with grouped(alone, SiteSettings("here", alone.folder)) as several:
        assert (
            distance(alone.trainer.run([job])[0].params, several.watched.run([job])[0].params)
            < 1e-5
        )
        group: Any = several.trainer
        first = group._programs
        with pytest.raises(ClientError, match="nobody is not among the clients"):
            group.run([Job("nobody", 1, 7, job.work)])
        assert group._programs == first
        group.recipe = replace(group.recipe, worker=WorkerSettings(replicas=2, deadline=1.0))
        psutil.Process(first[1].process.pid).children()[0].suspend()
        late = next(iter(several.engine.run(round_of(several))))
        assert isinstance(late.answer, ClientFailure)
        assert "no answer within 1 seconds (worker.deadline)" in late.answer.reason
        assert not group._programs


def test_a_site_that_shares_its_client_out_answers_as_another(recipe, tmp_path):
    asked = recipe(engine={"flower": {"nodes": 0}}, local={"kernels": "auto", "steps": 3})
    server = build(asked, tmp_path / "server")
    run = begin(asked.algorithm, server.space.start(), 0)
    round = draw(run, {"alba": {"num_examples": "9"}}, None)
    (task,) = tasks("train", round, asked.algorithm.broadcast(run.state, round))
    head = {**greeting(shared_recipe(asked), server), "kind": "work", "tasks": [[0, 1]]}
    pieces = [encode_task(task, settings=asked.wire), b""]
    replies = []
    for worker in (WorkerSettings(), WorkerSettings(shards=2)):
        folder, data = tmp_path / f"{worker.shards}", Path(asked.data.source) / "alba.jsonl"
        own = SiteSettings("alba", folder, data, worker=worker)
        shared_out = SharingOut(own)
        said, out = Site(own, shared_out=shared_out).answer(head, pieces)
        shared_out.close()
        assert said["answers"] == [None]
        replies.append(decode_reply(out[0], max_bytes=asked.wire.max_bytes))
    one, two = replies
    assert distance(one.upload["delta"], two.upload["delta"]) < 1e-5
    assert one.weight == two.weight
