"""What is shown of a federation before training."""

import copy
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedloom.data.data_settings import DataSettings
from fedloom.data.federation import federate
from fedloom.data.partition import Dirichlet, Natural
from fedloom.data.preview import COLOURS, preview, split_figure


def rows(count: int = 240, kinds: int = 6) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"Wie viel macht {i}?",
            "completion": f"苹果 {i}\nzwei",
            "task": f"task-{i % kinds:02d}",
            "language": "de",
        }
        for i in range(count)
    ]


def shown(tokenizer: Any, *, ansi: bool = False, **given: Any) -> str:
    out = io.StringIO()
    console = Console(
        file=out, width=140, force_terminal=ansi, color_system="standard" if ansi else None
    )
    settings = DataSettings(**{"prompt": "plain", "max_length": 64, **given})
    for part in preview(federate(settings, tokenizer), tokenizer):
        console.print(part)
    return out.getvalue()


def test_the_tables_show_clients_lengths_and_what_was_left_out(
    written: Callable[..., str], byte_level: Any
):
    given = rows()
    given[0]["completion"] = ""
    given[1]["prompt"] *= 20
    given[2]["completion"] *= 20
    text = shown(
        byte_level, source=written("a.jsonl", given), partition=Dirichlet("task", alpha=1.0)
    )
    assert "dirichlet by task, 10 clients" in text
    assert re.search(r"^prompt +plain *$", text, flags=re.MULTILINE)
    assert "1 rows without an answer, left out" in text
    assert "1 examples left out: the answer does not fit in 64" in text
    assert "1 examples cut to 64 tokens, kept" in text
    assert "client-009" in text
    assert "task-0" in text
    for word in ("median", "95 %", "max", "training, learnt", "their prompts"):
        assert word in text


def test_auto_and_clients_left_out_are_shown_by_name(written: Callable[..., str], byte_level: Any):
    given = rows() + [row | {"task": "rare"} for row in rows(3)]
    asked: dict[str, Any] = {"partition": Natural("task"), "min_examples": 20, "prompt": "auto"}
    text = shown(byte_level, source=written("a.jsonl", given), **asked)
    assert re.search(r"^prompt +chat template of the tokenizer *$", text, flags=re.MULTILINE)
    assert "1 clients left out, and 3 rows with them: fewer training examples than" in text
    assert "rare (1)" in text
    bare = copy.deepcopy(byte_level)
    bare.chat_template = None
    assert "plain: the tokenizer has no chat template" in shown(
        bare, source=written("a.jsonl", given), prompt="auto"
    )


def test_natural_clients_left_out_are_reported(written: Callable[..., str], byte_level: Any):
    text = shown(byte_level, source=written("a.jsonl", rows()), partition=Natural("task", 4))
    assert "80 examples of natural clients beyond data.partition.natural.largest" in text


def test_samples_show_what_is_learnt_in_green_and_the_rest_dim(
    written: Callable[..., str], byte_level: Any
):
    text = shown(byte_level, ansi=True, source=written("a.jsonl", rows()))
    assert text.count("Wie viel macht") == 3
    assert "\x1b[2mWie viel macht" in text
    assert "\x1b[32m苹果" in text, "runs are decoded whole, so that letters of several bytes stay"
    assert "</s>" in text
    assert "↵" in text
    assert "�" not in text


def test_packed_rows_and_many_clients_are_shown_too(written: Callable[..., str], byte_level: Any):
    text = shown(byte_level, source=written("a.jsonl", rows()), packing=True, num_clients=60)
    assert "... and 20 more" in text
    assert text.count("Wie viel macht") >= 3


def figure(
    written: Callable[..., str], tokenizer: Any, given: list[dict[str, str]], **settings: Any
) -> Any:
    federation = federate(
        DataSettings(source=written("a.jsonl", given), prompt="plain", **settings), tokenizer
    )
    return split_figure(federation.manifest.to_json())


def stacked(picture: Any) -> list[str]:
    (axes,) = picture.axes
    return [container.get_label() for container in axes.containers]


def test_the_figure_stacks_labels_and_its_bars_are_the_counts(
    written: Callable[..., str], byte_level: Any, tmp_path: Path
):
    picture = figure(
        written, byte_level, rows(), partition=Dirichlet("task", alpha=1.0), num_clients=5
    )
    assert stacked(picture) == [f"task-{i:02d}" for i in range(6)]
    (axes,) = picture.axes
    assert sum(bar.get_height() for container in axes.containers for bar in container) == 240
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        "000",
        "001",
        "002",
        "003",
        "004",
    ]
    picture.savefig(tmp_path / "split.png")
    assert (tmp_path / "split.png").stat().st_size > 5000


def test_many_labels_end_in_a_grey_rest(written: Callable[..., str], byte_level: Any):
    picture = figure(
        written, byte_level, rows(kinds=15), partition=Dirichlet("task", alpha=1.0), num_clients=5
    )
    assert len(stacked(picture)) == len(COLOURS)
    assert stacked(picture)[-1] == "6 others"


@pytest.mark.parametrize("num_clients", [3, 80])
def test_without_labels_the_splits_are_stacked(
    num_clients: int, written: Callable[..., str], byte_level: Any
):
    given = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows()]
    picture = figure(written, byte_level, given, num_clients=num_clients)
    assert stacked(picture) == ["train", "validation", "test"]
    (axes,) = picture.axes
    assert axes.get_xlabel() == ("client" if num_clients == 3 else "80 clients, by id")


def test_clients_named_for_a_label_are_stacked_by_another(
    written: Callable[..., str], byte_level: Any
):
    given = [
        {**row, "language": ("Deutsch", "Dansk")[i % 2], "task": f"t{i % 3}"}
        for i, row in enumerate(rows())
    ]
    picture = figure(written, byte_level, given, partition=Natural("language"))
    assert stacked(picture) == ["t0", "t1", "t2"]
    (axes,) = picture.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["Dansk", "Deutsch"]
    assert stacked(figure(written, byte_level, rows(kinds=1), partition=Natural("language"))) == [
        "train",
        "validation",
        "test",
    ]
