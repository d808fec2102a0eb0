"""A site answers envelopes with its own data and within its own limits."""

import io
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from fedloom.client.worker_settings import WorkerSettings
from fedloom.core.params import norm
from fedloom.deploy import site as site_module
from fedloom.deploy.greeting import draws_sha256, greeting, shared_recipe
from fedloom.deploy.limits import Limits
from fedloom.deploy.preview import site_preview
from fedloom.deploy.site import Site, agreed_recipe
from fedloom.deploy.site_settings import SiteSettings
from fedloom.results.evaluate import evaluate
from fedloom.rounds.loop import begin, draw, tasks
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Session, build
from fedloom.wire.format import decode_reply, encode_task

REMOTE = {"flower": {"nodes": 0}}
Make = Callable[..., Recipe]


def settings(recipe: Recipe, folder: Path, **limits: Any) -> SiteSettings:
    data = Path(recipe.data.source) / "alba.jsonl"
    return SiteSettings("alba", folder / "site", data, limits=Limits(**limits))


def envelope(
    recipe: Recipe, kind: str, folder: Path
) -> tuple[dict[str, Any], list[bytes], Session]:
    """Return what the server would send alba in round 1, and the server's session."""
    server = build(recipe, folder / "server")
    head = dict(greeting(shared_recipe(recipe), server))
    run = begin(recipe.algorithm, server.space.start(), 0)
    round = draw(run, {"alba": {"num_examples": "9"}}, None)
    (task,) = tasks("train", round, recipe.algorithm.broadcast(run.state, round))
    message = encode_task(task, settings=recipe.wire)
    return {**head, "kind": kind, "tasks": [[0, 1]]}, [message, b""], server


def test_a_site_introduces_its_one_client_in_numbers_only(recipe: Make, tmp_path: Path):
    asked = recipe(engine=REMOTE)
    head, _, _ = envelope(asked, "hello", tmp_path)
    said, pieces = Site(settings(asked, tmp_path)).answer(head, [])
    assert pieces == []
    assert said.get("identity") == head["identity"], said
    assert list(said["clients"]) == ["alba"]
    told = said["clients"]["alba"]
    assert told["profile"]["language"] == "al"
    assert int(told["profile"]["num_examples"]) == told["counts"]["rows"] > 0
    assert told["counts"]["labels"] == {}
    assert "say" not in str(said)


def test_a_text_that_all_rows_of_a_site_share_travels_as_a_hash(recipe: Make, tmp_path: Path):
    asked = recipe(engine=REMOTE)
    head, _, _ = envelope(asked, "hello", tmp_path)
    told = settings(asked, tmp_path)
    assert told.data
    text = "The patient was admitted with a fever of 39 degrees"
    for value, shown in ((text, False), ("cardiology", True)):
        rows = [json.loads(row) | {"topic": value} for row in told.data.read_text().splitlines()]
        told.data.write_text("".join(f"{json.dumps(row)}\n" for row in rows[:1] + rows))
        heard: list[str] = []
        said, _ = Site(told, heard.append).answer(head, [])
        profile = said["clients"]["alba"]["profile"]
        assert (profile["topic"] == value) == shown
        assert ("admitted" in str(said)) is False
        assert any("rows repeat an earlier one, kept" in line for line in heard)
        out = io.StringIO()
        for part in site_preview(told, shared_recipe(asked)):
            Console(file=out, width=160).print(part)
        assert profile["topic"] in out.getvalue()
        assert "rows repeat an earlier one" in out.getvalue()


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": [{"who": "user", "content": "It's a \"secret\" of Anna's"}]}],
        [{"messages": [{"role": "nurse's secret", "content": "hm"}]}],
        [{"messages": "a secret of Anna's"}],
    ],
)
def test_a_refusal_does_not_quote_the_data_of_a_site(
    recipe: Make, tmp_path: Path, rows: list[dict[str, Any]]
):
    asked = recipe(engine=REMOTE)
    head, _, _ = envelope(asked, "hello", tmp_path)
    told = settings(asked, tmp_path)
    assert told.data
    told.data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    heard: list[str] = []
    said, _ = Site(told, heard.append).answer(head, [])
    assert "secret" in heard[-1]
    assert "secret" not in str(said)
    assert "alba.jsonl, line 1" in said["refusal"]


def test_a_site_trains_and_keeps_its_clip(recipe: Make, tmp_path: Path):
    asked = recipe(engine=REMOTE)
    head, pieces, _ = envelope(asked, "work", tmp_path)
    said, free = Site(settings(asked, tmp_path)).answer(head, pieces)
    ((seconds, steps),) = said.pop("spent")
    assert (seconds > 0, steps) == (True, asked.local.steps)
    assert said == {"answers": [None]}
    _, bounded = Site(settings(asked, tmp_path, clip=1e-3)).answer(head, pieces)
    assert norm(decode_reply(free[0]).upload) > 1e-3
    assert norm(decode_reply(bounded[0]).upload) == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"algorithms": ["flasc"]}, "allows --algorithms flasc, the recipe asks for fedavg"),
        ({"spaces": ["full"]}, "allows --spaces full, the recipe tunes lora"),
        ({"min_examples": 100}, "no part with fewer than --min-examples 100"),
        ({"max_message_mb": 1e-5}, "the message has 0.0 MiB, this site allows --max-message-mb"),
        ({"columns": ["prompt"]}, "no known format has the columns prompt"),
    ],
)
def test_what_a_site_does_not_allow_is_refused_in_a_sentence(
    recipe: Make, tmp_path: Path, limits: dict[str, Any], words: str
):
    asked = recipe(engine=REMOTE)
    head, pieces, _ = envelope(asked, "work", tmp_path)
    said: list[str] = []
    site = Site(settings(asked, tmp_path, **limits), said.append)
    answer, out = site.answer(head, pieces)
    assert out == []
    assert words in answer["refusal"]
    assert words in said[-1]


def test_a_site_with_fewer_training_examples_than_the_recipe_asks_for_says_so(
    recipe: Make, tmp_path: Path
):
    for fewest, refused in ((19, False), (20, True)):
        asked = recipe(engine=REMOTE, data={"min_examples": fewest})
        head, _, _ = envelope(asked, "hello", tmp_path / f"{fewest}")
        answer, _ = Site(settings(asked, tmp_path / f"{fewest}", min_examples=0)).answer(head, [])
        if not refused:
            assert answer["clients"]["alba"]["counts"]["train"] == 19
            continue
        assert answer["refusal"] == (
            "this site takes no part, as it has fewer training examples than the recipe's data.min_examples 20"
        )


def test_a_server_and_a_site_come_to_the_same_prompt_or_do_not_start(
    recipe: Make, tmp_path: Path, tiny_folder: Path
):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    asked = recipe(engine=REMOTE, model={"name": str(model)})
    assert asked.data.prompt == "auto"
    head, _, server = envelope(asked, "hello", tmp_path)
    assert server.federation.manifest.prompt == "chat template of the tokenizer"
    told = settings(asked, tmp_path)
    session = site_module.open_session(told, asked)
    assert session.federation.manifest.prompt == server.federation.manifest.prompt
    (model / "chat_template.jinja").unlink()
    answer, _ = Site(told).answer(head, [])
    assert "both sides must have the same chat template (model.name, revision)" in answer["refusal"]


def test_columns_that_may_be_read_are_enough(recipe: Make, tmp_path: Path):
    asked = recipe(engine=REMOTE)
    head, _, _ = envelope(asked, "hello", tmp_path)
    site = Site(settings(asked, tmp_path, columns=["prompt", "completion"]))
    said, _ = site.answer(head, [])
    assert "language" not in said["clients"]["alba"]["profile"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"fedloom": "0.0.1"},
            r"version of fedloom \(install the same\): at the server 0.0.1, at",
        ),
        ({"wire": "99"}, "same version of the messages .*: at the server 99, at the site 1"),
        ({"draws": "zz"}, "install the same torch"),
        ({"base": "0" * 64}, r"weights of the base model \(model.name, .*: at the server 0+, "),
        ({"start": "0" * 64}, r"weights that training starts from \(model.name, tune, run.seed"),
        ({"tensors": "0" * 64}, "names and order of the tensors that move"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(
    recipe: Make, tmp_path: Path, changed: dict[str, Any], words: str
):
    asked = recipe(engine=REMOTE)
    head, _, _ = envelope(asked, "hello", tmp_path)
    said, _ = Site(settings(asked, tmp_path)).answer(
        {**head, "identity": {**head["identity"], **changed}}, []
    )
    assert re.search(words, said["refusal"])


def test_a_site_with_a_recipe_of_its_own_takes_no_other(recipe: Make, tmp_path: Path):
    asked = recipe(engine=REMOTE)
    file = tmp_path / "agreed.yaml"
    file.write_text(shared_recipe(asked))
    assert agreed_recipe(file) == shared_recipe(asked)
    own = replace(settings(asked, tmp_path), recipe=file)
    head, _, _ = envelope(asked, "hello", tmp_path)
    assert "clients" in Site(own).answer(head, [])[0]
    other, _, _ = envelope(recipe(engine=REMOTE, local={"lr": 9.0}), "hello", tmp_path / "b")
    assert "another recipe than" in Site(own).answer(other, [])[0]["refusal"]


def test_a_task_for_somebody_else_is_refused(recipe: Make, tmp_path: Path):
    asked = recipe(engine=REMOTE)
    head, pieces, _ = envelope(asked, "work", tmp_path)
    own = replace(settings(asked, tmp_path), name="brno")
    assert "alba is no client of brno" in Site(own).answer(head, pieces)[0]["refusal"]


def test_no_code_of_a_model_runs_at_a_site(recipe: Make, tmp_path: Path):
    asked = recipe(engine=REMOTE, model={"trust_remote_code": True})
    with pytest.raises(ValueError, match="this site runs no code of a model"):
        Limits().check_recipe(asked)


def test_what_a_site_is_told_names_no_file_of_the_server(recipe: Make):
    text = shared_recipe(recipe(engine=REMOTE))
    assert yaml.safe_load(text)["data"]["source"] == "site"


def test_the_model_is_loaded_once_for_all_rounds(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    opened: list[Recipe] = []
    real = site_module.open_session

    def counting(own: SiteSettings, asked: Recipe, *, device: str | None) -> Session:
        opened.append(asked)
        return real(own, asked, device=device)

    monkeypatch.setattr(site_module, "open_session", counting)
    asked = recipe(engine=REMOTE)
    head, pieces, _ = envelope(asked, "work", tmp_path)
    site = Site(settings(asked, tmp_path))
    said = [site.answer({**head, "kind": kind}, pieces)[0] for kind in ("hello", "work", "work")]
    assert not any("refusal" in answer for answer in said)
    assert len(opened) == 1


def test_a_repeated_task_finds_the_memory_it_found_before(recipe: Make, tmp_path: Path):
    asked = recipe(engine=REMOTE, algorithm="scaffold")
    head, pieces, _ = envelope(asked, "work", tmp_path)
    own = settings(asked, tmp_path)
    _, first = Site(own).answer(head, pieces)
    # Another process: what is not on the disk is gone.
    _, again = Site(own).answer(head, pieces)
    assert first == again
    assert list((own.folder / "client_state" / "alba").iterdir())


def test_settings_of_a_site_survive_their_file(tmp_path: Path):
    site = SiteSettings(
        "a",
        tmp_path,
        tmp_path / "x.csv",
        ["a"],
        Limits(8.0, ["fedavg"], ["lora"], ["prompt"], 1, 2.0, ["my_lab"]),
    )
    site.write(tmp_path / "site.json")
    assert SiteSettings.read(tmp_path / "site.json") == site


def test_the_draws_of_this_torch_is_always_the_same():
    torch.rand(3)
    assert draws_sha256() == draws_sha256()


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_message_mb": 0}, "--max-message-mb must be positive, got 0"),
        ({"min_examples": -1}, "--min-examples must be at least 0, got -1"),
        ({"clip": 0.0}, "--clip must be positive, got 0"),
    ],
)
def test_limits_that_allow_nothing_are_refused(limits: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        Limits(**limits)


def test_a_dry_run_shows_every_tensor_and_its_size(recipe: Make, tmp_path: Path):
    asked = recipe(engine=REMOTE)
    console = Console(width=200, file=io.StringIO(), record=True)
    for part in site_preview(settings(asked, tmp_path, clip=3.0), shared_recipe(asked)):
        console.print(part)
    shown = console.export_text()
    tensors = ("delta", "q_proj.lora_B.weight", "32 x 2", "the whole message", "weight", "3")
    for words in ("lora, rank 2", *tensors):
        assert words in shown


def test_a_server_measures_nothing_whose_data_is_at_sites(recipe: Make, tmp_path: Path):
    session = build(recipe(engine=REMOTE), tmp_path)
    with pytest.raises(
        ValueError, match=r"is at its sites; .*summary\.json has what they measured"
    ):
        evaluate(session, begin(session.recipe.algorithm, session.space.start(), 0))


def test_a_full_disk_at_a_site_is_told(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*paths: Path) -> None:
        raise OSError(28, "No space left on device")

    asked = recipe(engine=REMOTE, algorithm="scaffold")
    head, pieces, _ = envelope(asked, "work", tmp_path)
    site = Site(settings(asked, tmp_path))
    monkeypatch.setattr(os, "replace", full)
    said, _ = site.answer(head, pieces)
    assert re.search(
        r"writing .*/client_state/alba/1 needs \d+ bytes .*: make room", said["refusal"]
    )


@pytest.mark.parametrize(
    "asked",
    [
        {"where": {"language": ["al"]}},
        {"shorter": {"language": 3}},
        {"columns": {"completion": "language"}},
    ],
)
def test_a_column_that_is_not_opened_is_not_there_for_any_filter(
    recipe: Make, tmp_path: Path, asked: dict[str, Any]
):
    """A filter on a hidden column would tell it row by row, by how many rows are left."""
    made = recipe(engine=REMOTE, data=asked)
    head, _, _ = envelope(made, "hello", tmp_path)
    site = Site(settings(made, tmp_path, columns=["prompt", "completion"]))
    refusal = site.answer(head, [])[0]["refusal"]
    assert re.search(r"data\.(where|shorter|columns) names \(see the site\)", refusal)
    assert "the columns are prompt, completion" in refusal


def test_a_site_takes_part_with_twenty_examples_or_more(recipe: Make, tmp_path: Path):
    assert Limits().min_examples == 20
    made = recipe(engine=REMOTE, data={"where": {"completion": ["0", "2", "4"]}})
    head, _, _ = envelope(made, "hello", tmp_path)
    said = Site(settings(made, tmp_path)).answer(head, [])[0]
    assert "no part with fewer than --min-examples 20" in said["refusal"]


def test_the_log_of_a_site_says_what_each_greeting_asked_of_its_data(recipe: Make, tmp_path: Path):
    made = recipe(engine=REMOTE, data={"where": {"language": ["al"]}})
    head, _, _ = envelope(made, "hello", tmp_path)
    heard: list[str] = []
    Site(settings(made, tmp_path), heard.append).answer(head, [])
    assert heard[0].startswith("asked for data: ")
    assert '"where": {"language": ("al")}' in heard[0]


def test_a_site_with_another_name_than_its_key_says_so(recipe: Make, tmp_path: Path):
    made = recipe(engine=REMOTE)
    head, _, _ = envelope(made, "hello", tmp_path)
    said = Site(settings(made, tmp_path)).answer({**head, "site": "brno"}, [])[0]
    assert said["refusal"] == (
        "the server knows the key in --keys as brno, not as alba: start `fedloom join` with --name brno"
    )


def test_rows_that_are_judged_apart_are_refused_at_a_site(recipe: Make, tmp_path: Path):
    made = recipe(engine=REMOTE, data={"held_out": {"completion": ["0"]}})
    head, _, _ = envelope(made, "hello", tmp_path)
    assert (
        "data.held_out is for data in one place"
        in Site(settings(made, tmp_path)).answer(head, [])[0]["refusal"]
    )


def test_a_clip_refuses_integers_that_it_could_not_scale():
    Limits(clip=1.0).check_upload({"delta": {"w": torch.ones(2)}})
    Limits().check_upload({"votes": {"w": torch.ones(2, dtype=torch.uint8)}})
    with pytest.raises(ValueError, match="keeps --clip 1, but votes/w of an upload is uint8"):
        Limits(clip=1.0).check_upload({"votes": {"w": torch.ones(2, dtype=torch.uint8)}})


def test_a_site_has_as_many_processes_as_it_says_itself_or_else_the_recipe(
    recipe: Make, tmp_path: Path
):
    asked = recipe(engine=REMOTE, worker={"replicas": 2})
    head, _, _ = envelope(asked, "hello", tmp_path)
    found = []

    def shared_out(session: Session) -> Session:
        found.append(session.recipe.worker)
        return session

    plain = settings(asked, tmp_path)
    for own in (None, WorkerSettings(), WorkerSettings(shards=2)):
        site = replace(plain, worker=own)
        site.write(tmp_path / "site.json")
        assert SiteSettings.read(tmp_path / "site.json").worker == own
        said, _ = Site(site, shared_out=shared_out).answer(head, [])
    assert found == [WorkerSettings(replicas=2), WorkerSettings()]
    assert "worker.shards 2 goes through the model's own forward" in said["refusal"]
