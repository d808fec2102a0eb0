"""A quiet run leaves nothing in its folder that tells of single clients and that no epsilon covers."""

import io
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedloom import experiment
from fedloom.rounds.privacy import covered
from fedloom.rounds.recipe_settings import Recipe

Make = Callable[..., Recipe]


def quiet(make: Make, **sections: Any) -> Recipe:
    """Return a recipe of two quiet rounds."""
    wrapper = {"clip": 0.05, "noise_multiplier": 1.0, "delta": 0.1, "quiet": True}
    tree: dict[str, Any] = {
        "algorithm": [{"private": wrapper}, "fedavg"],
        "cohort": {"poisson": {"q": 0.9}},
        "tune": {"lora": {"origin": "initial"}},
        "data": {"num_examples": 24, "max_length": 64, "partition": "iid"},
        "evaluation": {"every": 1, "generate": False},
        "run": {"rounds": 2, "samples": 0},
    }
    return make(
        **{
            n: {**tree.get(n, {}), **sections.get(n, {})} if n in sections else v
            for n, v in tree.items()
        }
    )


def test_a_quiet_folder_tells_of_noisy_means_alone(small_recipe: Make, tmp_path: Path) -> None:
    said = io.StringIO()
    console = Console(file=said, width=300)
    result = experiment.run(quiet(small_recipe), tmp_path, console=console)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert {name.partition("/")[0] for line in lines for name in line} == {"round", "server"}
    assert lines[-1]["server/epsilon"] > 0
    assert not (tmp_path / "clients.jsonl").exists()
    assert not (tmp_path / "samples.json").exists()
    assert not (tmp_path / "log.txt").exists()
    told = {"upload_bytes", "download_bytes", "num_absent", "train_seconds", "skipped_steps"}
    assert not told & result.summary.keys()
    assert result.summary["final"] == {}
    for file in tmp_path.rglob("*"):
        if file.suffix in {".json", ".jsonl", ".md", ".html"} and "checkpoints" not in file.parts:
            text = file.read_text()
            assert "client-0" not in text, file
            assert "num_replies" not in text, file
    assert "validation loss" in said.getvalue(), "whoever runs it sees it"
    console.print(result.table())
    assert "Bytes up" not in said.getvalue()
    assert "epsilon" in said.getvalue()
    report = (tmp_path / "report.html").read_text()
    assert "Traffic" not in report
    assert "epsilon is" in report


def test_a_quiet_run_goes_on_and_its_manifest_is_its_owners(
    small_recipe: Make, tmp_path: Path
) -> None:
    first = experiment.run(quiet(small_recipe), tmp_path).summary
    assert (
        experiment.run(quiet(small_recipe), tmp_path).summary["state_sha256"]
        == first["state_sha256"]
    )
    whole = tmp_path / "checkpoints" / "manifest.json"
    assert stat.S_IMODE(whole.stat().st_mode) == 0o600
    told = json.loads((tmp_path / "manifest.json").read_text())
    assert len(json.loads(whole.read_text())["clients"]) == 4
    assert told["clients"] == {}


def test_who_is_left_out_is_the_owners_too(small_recipe: Make, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{i}?", "completion": f"{i}", "ward": ward}
        for ward, count in {"east": 12, "west": 12, "cellar": 2}.items()
        for i in range(count)
    ]
    source = tmp_path / "mine.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "source": str(source),
        "num_examples": None,
        "num_clients": None,
        "where": {},
        "partition": {"natural": {"by": "ward"}},
        "min_examples": 5,
    }
    folder = tmp_path / "run"
    experiment.run(quiet(small_recipe, data=data), folder)
    whole = json.loads((folder / "checkpoints" / "manifest.json").read_text())
    assert whole["excluded"]["clients"] == {"cellar": 1}
    told = json.loads((folder / "manifest.json").read_text())
    assert told["excluded"]["clients"] == {}
    assert "cellar" not in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"run": {"samples": 3}},
            r"run\.samples must be 0 for private\.quiet, as samples are .* got 3",
        ),
        ({"run": {"baselines": ["local"]}}, r"run\.baselines must be \[\] for private\.quiet"),
        (
            {"evaluation": {"by": "task"}},
            r"evaluation\.by must be null for private\.quiet, .* got task",
        ),
    ],
)
def test_what_would_tell_all_the_same_is_refused(
    sections: dict[str, Any], message: str, small_recipe: Make
) -> None:
    with pytest.raises(ValueError, match=message):
        quiet(small_recipe, **sections)


def test_what_follows_from_noisy_means_and_public_text_alone_is_told() -> None:
    line = {
        "server/epsilon": 1.0,
        "public/plugin/loss": 2.0,
        "test/loss": 3.0,
        "comm/num_absent": 0,
    }
    assert covered(line) == {"server/epsilon": 1.0, "public/plugin/loss": 2.0}
