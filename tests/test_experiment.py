"""Whole runs on the random model: what a run directory holds, and that going on is going on."""

import dataclasses
import io
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fedloom import experiment
from fedloom.cli_console import NOTHING_CHANGED, show_outcome
from fedloom.engines.loopback import Loopback
from fedloom.results.plan import make_plan
from fedloom.rounds.recipe_settings import Recipe

Make = Callable[..., Recipe]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_directory_holds_what_it_promises(small_recipe: Make, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = experiment.run(small_recipe(run={"baselines": ["local", "centralised"]}), folder)
    for name in (
        "recipe.yaml",
        "metrics.jsonl",
        "clients.jsonl",
        "manifest.json",
        "samples.json",
        "environment.json",
        "summary.json",
        "report.html",
        "adapters/global/adapter_model.safetensors",
        "adapters/global/README.md",
        "baselines/local/summary.json",
        "baselines/centralised/summary.json",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert set(result.baselines) == {"local", "centralised"}
    rounds = lines(folder / "metrics.jsonl")
    assert [line["round"] for line in rounds] == [0, 1, 2, 3]
    assert ["test/loss" in line for line in rounds] == [True, False, True, True]
    assert rounds[3]["comm/num_replies"] == 4
    own = result.summary
    assert own["upload_bytes"] == sum(line.get("comm/upload_bytes", 0) for line in rounds)
    assert own["before"]["test/loss"] == rounds[0]["test/loss"]
    assert own["final"]["test/loss"] == rounds[3]["test/loss"]
    assert own["num_clients"] == 4
    assert result.baselines["centralised"].summary["num_clients"] == 1
    samples = json.loads((folder / "samples.json").read_text())
    assert len(samples) == 2
    assert {"client", "prompt", "reference", "before", "after"} <= samples[0].keys()


def test_what_is_left_out_is_said_once_and_stands_in_the_report(
    small_recipe: Make, tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"{i}?", "completion": f"{i}" if i else "", "hospital": "abc"[i % 3]}
        for i in range(30)
    ]
    source = tmp_path / "mine.jsonl"
    text = "Patient number {} was admitted with a fever"
    source.write_text(
        "".join(json.dumps(row | {"topic": text.format(i)}) + "\n" for i, row in enumerate(rows))
    )
    data = {
        "source": str(source),
        "num_examples": None,
        "num_clients": None,
        "where": {},
        "partition": {"natural": {"by": "hospital", "largest": 2}},
    }
    recipe = small_recipe(data=data, run={"rounds": 1, "baselines": ["local", "centralised"]})
    out, folder = io.StringIO(), tmp_path / "run"
    experiment.run(recipe, folder, console=Console(file=out, width=200))
    page = (folder / "report.html").read_text()
    for line in (
        "1 rows without an answer, left out",
        "9 examples of natural clients beyond data.partition.natural.largest, left out",
        "values of topic are not shown: 29 different ones, too many or too long for a label",
    ):
        assert out.getvalue().count(line) == 1
        assert f"{line[0].upper()}{line[1:]}." in page
        assert line in make_plan(recipe).left_out
    written = [file for file in folder.rglob("*") if file.is_file()]
    assert not [file for file in written if b"was admitted" in file.read_bytes()]


def test_a_run_on_a_base_model_says_its_prompt_everywhere_and_goes_on_with_it(
    small_recipe: Make, tiny_folder: Path, tmp_path: Path
) -> None:
    model, folder = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_folder, model)
    (model / "chat_template.jinja").unlink()
    recipe = small_recipe(model={"name": str(model)}, run={"rounds": 1})
    out, words = io.StringIO(), "plain: the tokenizer has no chat template"
    first = experiment.run(recipe, folder, console=Console(file=out, width=200)).summary
    assert out.getvalue().count(f"prompt: {words}") == 1
    assert json.loads((folder / "manifest.json").read_text())["prompt"] == words
    assert words in (folder / "report.html").read_text()
    assert words in (folder / "adapters" / "global" / "README.md").read_text()
    again = experiment.run(recipe, folder).summary
    assert again["state_sha256"] == first["state_sha256"]
    named = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, prompt="plain"))
    assert (
        experiment.run(named, tmp_path / "named").summary["state_sha256"] == (first["state_sha256"])
    )


def test_results_by_a_hidden_label_are_told_by_hash(small_recipe: Make, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{i}?", "completion": f"{i}", "topic": f"The patient of bed {i % 3} was seen"}
        for i in range(30)
    ]
    source = tmp_path / "mine.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data: dict[str, Any] = {"source": str(source), "num_examples": None, "where": {}}
    recipe = small_recipe(data=data, evaluation={"by": "topic"}, run={"rounds": 1})
    summary = experiment.run(recipe, tmp_path / "run").summary
    told = json.loads((tmp_path / "run" / "by_label.json").read_text())
    assert all(re.fullmatch(r"sha256:[0-9a-f]{12}", value) for value in told["own"])
    assert 1 < len(told["own"]) <= 3
    assert summary["worst"]["loss"]["value"] in told["own"]


def test_the_same_recipe_gives_the_same_run(small_recipe: Make, tmp_path: Path) -> None:
    a = experiment.run(small_recipe(), tmp_path / "a").summary
    b = experiment.run(small_recipe(), tmp_path / "b").summary
    c = experiment.run(small_recipe(run={"seed": 1}), tmp_path / "c").summary
    assert a["state_sha256"] == b["state_sha256"] != c["state_sha256"]
    assert a["final"] == b["final"]


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "local", [{"ditto": {}}, "fedavg"]])
def test_resuming_in_the_middle_ends_as_the_uninterrupted_run(
    algorithm: Any, small_recipe: Make, tmp_path: Path
) -> None:
    """Same weights, metrics and client sampling."""
    recipe = small_recipe(algorithm=algorithm, cohort={"uniform": {"size": 2}}, run={"rounds": 5})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = experiment.run(recipe, whole).summary
    shutil.copytree(whole, cut)
    # As if killed while round 5 was being written down: checkpoint 4 is the last good one.
    (cut / "checkpoints" / "round-000005.ckpt").unlink()
    for name in ("summary.json", "samples.json", "report.html"):
        (cut / name).unlink()
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"round": 6, "half a li')
    resumed = experiment.run(recipe, cut).summary
    assert resumed["state_sha256"] == expected["state_sha256"]
    assert resumed["final"] == expected["final"]
    assert resumed["upload_bytes"] == expected["upload_bytes"]
    assert [line["round"] for line in lines(cut / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
    assert lines(cut / "clients.jsonl") == lines(whole / "clients.jsonl")


def test_a_damaged_checkpoint_is_passed_over_and_said(small_recipe: Make, tmp_path: Path) -> None:
    expected = experiment.run(small_recipe(), tmp_path / "run").summary
    newest = tmp_path / "run/checkpoints/round-000003.ckpt"
    newest.write_bytes(newest.read_bytes()[:-20])
    said = io.StringIO()
    again = experiment.run(
        small_recipe(), tmp_path / "run", console=Console(file=said, width=200)
    ).summary
    assert "damaged checkpoint" in said.getvalue()
    assert "going on after round 2" in said.getvalue()
    assert again["state_sha256"] == expected["state_sha256"]


def test_resuming_a_changed_recipe_is_refused_with_the_change(
    small_recipe: Make, tmp_path: Path
) -> None:
    experiment.run(small_recipe(), tmp_path / "run")
    with pytest.raises(ValueError, match=r"local\.lr was 0\.1 and is 0\.2"):
        experiment.run(small_recipe(local={"lr": 0.2}), tmp_path / "run")


def test_more_rounds_may_be_asked_for_at_resume_where_no_schedule_depends_on_them(
    small_recipe: Make, tmp_path: Path
) -> None:
    experiment.run(small_recipe(), tmp_path / "run")
    longer = experiment.run(small_recipe(run={"rounds": 5}), tmp_path / "run").summary
    whole = experiment.run(small_recipe(run={"rounds": 5}), tmp_path / "whole").summary
    assert longer["state_sha256"] == whole["state_sha256"]


def test_early_stopping_ends_a_run_that_no_longer_improves(
    small_recipe: Make, tmp_path: Path
) -> None:
    # Steps too small to move a float32 weight.
    recipe = small_recipe(
        local={"lr": 1e-30},
        evaluation={"every": 1},
        run={"rounds": 9, "patience": 2, "monitor": "validation/loss"},
    )
    summary = experiment.run(recipe, tmp_path / "run").summary
    assert summary["stopped_early"]
    assert summary["rounds"] < 9


def test_engines_agree_and_the_wire_is_lossy_in_process_too(
    small_recipe: Make, tmp_path: Path
) -> None:
    here = experiment.run(small_recipe(local={"batched": "off"}), tmp_path / "a").summary
    there = experiment.run(
        small_recipe(local={"batched": "off"}, engine="loopback"), tmp_path / "b"
    ).summary
    assert here["state_sha256"] == there["state_sha256"]
    assert (here["upload_bytes"], here["download_bytes"]) == (
        there["upload_bytes"],
        there["download_bytes"],
    )
    small = experiment.run(small_recipe(wire={"upload": "int8"}), tmp_path / "c").summary
    assert small["state_sha256"] != here["state_sha256"]
    assert small["upload_bytes"] < 0.6 * here["upload_bytes"]


@pytest.fixture(scope="session")
def sighted_folder(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random Gemma 3, whose vision tower takes no part in a pass over text."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = Gemma3Config(
        text_config={
            **sizes,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "vocab_size": 110,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={**sizes, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=107,
        boi_token_index=108,
        eoi_token_index=109,
    )
    folder = tmp_path_factory.mktemp("models") / "sighted"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_what_stays_frozen_is_named_once(
    small_recipe: Make, sighted_folder: Path, tmp_path: Path
) -> None:
    recipe = small_recipe(
        model={"name": str(sighted_folder)}, run={"rounds": 1, "baselines": ["local"]}
    )
    file = io.StringIO()
    console = Console(width=400, file=file)
    experiment.run(recipe, tmp_path / "run", console=console)
    said = (
        "tune.lora.targets q_proj, v_proj leaves frozen what no adapter fits, or no pass over text"
    )
    assert file.getvalue().count(said) == 1
    plan = make_plan(recipe)
    assert plan.left_frozen.startswith(said)
    console.print(plan.table())
    assert "left frozen" in file.getvalue()


@pytest.mark.parametrize("command", ["run", "plan"])
def test_rows_longer_than_the_model_are_refused_before_training(
    small_recipe: Make, sighted_folder: Path, tmp_path: Path, command: str
) -> None:
    """Of nested configurations too."""
    recipe = small_recipe(model={"name": str(sighted_folder)}, data={"max_length": 257})
    with pytest.raises(ValueError, match=r"data.max_length must be at most 256, .* got 257"):
        experiment.run(recipe, tmp_path / "run") if command == "run" else make_plan(recipe)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_rounds_that_change_nothing_are_counted_and_end_a_command_with_a_code_of_their_own(
    small_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small_recipe(run={"rounds": 2, "min_replies": 5, "samples": 0})
    result = experiment.run(recipe, tmp_path / "run")
    assert result.summary["rounds_unchanged"] == 2
    with pytest.raises(SystemExit) as end:
        show_outcome(result, console=Console())
    assert end.value.code == NOTHING_CHANGED
    said = capsys.readouterr().out
    assert "2 of 2" in said
    assert "no round changed the model" in said
    summary = tmp_path / "run" / "summary.json"
    summary.write_text(json.dumps({**result.summary, "rounds_unchanged": 1}))
    show_outcome(result, console=Console())
    assert "1 of 2" in capsys.readouterr().out


def test_a_loop_of_ones_own_is_the_run_itself(small_recipe: Make, tmp_path: Path) -> None:
    recipe = small_recipe(run={"baselines": ["local"]}, evaluation={"every": 1})
    whole = experiment.run(recipe, tmp_path / "whole")
    with experiment.session(recipe, tmp_path / "own") as own:
        rounds = list(own.rounds())
        measured = own.evaluate("test")
    assert own.result.summary["state_sha256"] == whole.summary["state_sha256"]
    assert own.result.baselines.keys() == {"local"}
    assert own.result.report.is_file()
    assert [finished.number for finished in rounds] == [1, 2, 3]
    assert rounds[-1].metrics["test/loss"] == measured.metrics["loss"]
    assert measured.clients.keys() == {record["client"] for record in whole.clients}


@pytest.mark.parametrize("how", ["stop", "break"])
def test_a_run_that_ends_early_is_measured_as_it_is_delivered_and_goes_on_as_if_it_had_not(
    small_recipe: Make, tmp_path: Path, how: str
) -> None:
    recipe = small_recipe(
        evaluation={"every": 3},
        local={"schedule": "constant"},
        run={"rounds": 4, "patience": 2, "samples": 0},
    )
    whole = experiment.run(recipe, tmp_path / "whole")
    with experiment.session(recipe, tmp_path / "own") as own:
        for finished in own.rounds():
            if how == "stop":
                finished.stop()
            else:
                break
        delivered = own.evaluate("test").metrics
    assert own.result.summary["rounds"] == 1
    assert own.result.summary["final"]["test/loss"] == delivered["loss"]
    assert own.result.summary["final"]["test/loss"] != own.result.summary["before"]["test/loss"]
    assert [line["round"] for line in own.result.metrics] == [0, 1]
    assert {line["round"] for line in own.result.clients} == {0, 1}
    again = experiment.run(recipe, tmp_path / "own")
    assert again.summary["state_sha256"] == whole.summary["state_sha256"]
    assert again.summary["final"] == whole.summary["final"]
    assert [line["round"] for line in again.metrics] == [line["round"] for line in whole.metrics]


def test_a_loop_that_is_left_delivers_and_is_taken_up_again(
    small_recipe: Make, tmp_path: Path
) -> None:
    recipe = small_recipe(evaluation={"every": 1})
    whole = experiment.run(recipe, tmp_path / "whole").summary
    with experiment.session(recipe, tmp_path / "own") as own:
        for finished in own.rounds():
            if finished.number == 1:
                break
        again = next(own.rounds())
        assert again.number == 2
    assert own.result.summary["rounds"] == 2
    assert own.result.summary["stopped_early"]
    with pytest.raises(ZeroDivisionError), experiment.session(recipe, tmp_path / "own") as own:
        assert [finished.number // 0 for finished in own.rounds()]
    assert own.result.summary["rounds"] == 2, (
        "nothing is delivered where the block ends in an error"
    )
    assert experiment.run(recipe, tmp_path / "own").summary["state_sha256"] == whole["state_sha256"]


def test_a_session_whose_rounds_nobody_asked_for_leaves_no_summary(
    small_recipe: Make, tmp_path: Path
) -> None:
    with experiment.session(small_recipe(), tmp_path / "run") as own:
        assert own.evaluate("validation").round == 0
        with pytest.raises(ValueError, match="split must be validation or test, got 'train'"):
            own.evaluate("train")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has no summary\.json, as its run is not finished"):
        _ = own.result.summary


def test_lost_clients_are_told_to_callbacks(
    small_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losing = partial(Loopback, lost=frozenset(["client-001"]))
    monkeypatch.setattr("fedloom.rounds.session.Loopback", losing)
    with experiment.session(small_recipe(engine="loopback"), tmp_path / "run") as own:
        seen = [finished.failures for finished in own.rounds()]
    assert {failure.client for failures in seen for failure in failures} == {"client-001"}
    assert all(failures for failures in seen)


def test_a_run_without_a_folder_goes_where_the_command_line_puts_it(
    small_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "small").mkdir(parents=True)
    recipe = small_recipe(run={"rounds": 1, "samples": 0})
    assert experiment.run(recipe).folder == Path("runs/small-2")
