import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedloom.report.page import write_report
from fedloom.report.run_folder import read_results

Make = Callable[..., Path]
SECTIONS = [
    "headline",
    "results",
    "curves",
    "traffic",
    "clients",
    "split",
    "samples",
    "notes",
    "recipe",
    "environment",
]


class Page(HTMLParser):
    """What a browser would load, and whether tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "br", "use", "path"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.loads.append(value or "")
            if name == "id" and tag == "section":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("use", "path"):
            assert self.open.pop() == tag


@pytest.fixture
def full(fabricate: Make) -> Path:
    folder = fabricate()
    for name, top in (("centralised", 0.9), ("local", 0.4)):
        fabricate(name, folder=folder / "baselines" / name, top=top, traffic=0)
    return folder


def text_of(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


def test_every_section_is_there_in_order(full: Path) -> None:
    assert Page(text_of(full)).ids == SECTIONS


def test_the_page_loads_nothing_and_runs_nothing(full: Path) -> None:
    text = text_of(full)
    page = Page(text)
    assert page.loads
    assert all(load.startswith(("#", "data:")) for load in page.loads)
    assert not re.search(r"url\((?!#)|@import", text)
    assert "script" not in page.tags
    assert not page.open


def test_the_headline_says_before_after_change_and_traffic(full: Path) -> None:
    text = text_of(full)
    head = text[text.index('id="headline"') : text.index('id="results"')]
    for said in ("0.0 % →", "80.0 %", "+80.0 points", "1.000", "\u221275 %", "8.00 kB"):
        assert said in head
    assert "4.00 kB up, 4.00 kB down" in head
    assert "3 clients, 1 min 32 s of training" in head


def test_the_baselines_stand_beside_the_run(full: Path) -> None:
    text = text_of(full)
    assert '<th class="n">centralised</th>' in text
    assert '<td class="n">90.0 %</td>' in text
    assert "trained alone" in text
    assert 'background: var(--series-2)"></span>trained alone' in text


def test_the_clients_table_says_what_each_holds_and_how_it_fares(full: Path) -> None:
    rows = re.findall(r"<tr><td>client-.*?</tr>", text_of(full), flags=re.DOTALL)
    assert len(rows) == 3
    for said in ("English 75 %, Dutch 25 %", "32 / 4 / 4", "78.4 %", "39.2 %", "+78.4 points"):
        assert said in rows[2]


def test_sample_answers_are_escaped_judged_and_shortened(full: Path) -> None:
    text = text_of(full)
    assert "&lt;script&gt;alert(1)" in text
    assert text.count("✓ matches") == 1
    assert text.count("✗ differs") == 1
    assert "(nothing)" in text
    assert "x" * 700 + " \u2026" in text
    assert "x" * 701 not in text


def test_what_was_left_out_is_counted(full: Path) -> None:
    text = text_of(full)
    for note in (
        "The run stopped early.",
        "8 client-rounds brought no reply",
        "4 training steps were skipped",
        "7 examples left out: the answer does not fit in 256.",
        "11 examples cut to 256 tokens, kept.",
    ):
        assert note in text


def test_prompt_and_clients_left_out_are_reported(fabricate: Make) -> None:
    folder = fabricate()
    assert "prompt:" not in text_of(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["prompt"] = "chat template of the tokenizer"
    manifest["excluded"] = {"min_examples": 20, "clients": {"ward-9": 3}, "num_rows": 5}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    text = text_of(folder)
    assert "prompt: chat template of the tokenizer" in text
    assert (
        "1 clients left out, and 5 rows with them: fewer training examples than data.min_examples (20): ward-9 (3)."
        in text
    )


def test_recipe_environment_and_hash_are_given(full: Path) -> None:
    text = text_of(full)
    for said in (
        "Three clients share an adapter.",
        "lora, rank 8",
        "12,345 trainable parameters",
        "<pre>name: demo",
        "python 3.11.7, fedloom 0.1.0, torch 2.13.0<",
        "Some CPU, 2 cores (1 threads used), 25.0 GB memory, Some GPU (80.0 GB)",
        "812 MB",
        "2 min 51 s",
        "9f2b" * 16,
        "fedloom run demo",
    ):
        assert said in text


def test_the_page_is_a_function_of_the_run_directory(full: Path, tmp_path: Path) -> None:
    first = text_of(full)
    assert text_of(full) == first
    moved = tmp_path / "elsewhere"
    shutil.copytree(full, moved)
    assert text_of(moved) == first


def test_pictures_take_their_colours_from_the_page(full: Path) -> None:
    text = text_of(full)
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert drawn.count("<svg") == 5 + 2 + 1 + 1
    assert "var(--ink)" in drawn
    assert "var(--series-0)" in drawn
    assert "#0072b2" not in drawn
    assert "<metadata" not in drawn


def test_a_run_without_answers_leads_with_the_loss(fabricate: Make) -> None:
    text = text_of(fabricate(generate=False))
    page = Page(text)
    assert "Test loss" in text[text.index('id="headline"') : text.index('id="results"')]
    assert "Exact match" not in text
    assert "exact match" not in text
    assert "samples" not in page.ids
    assert "lower is better" in text


@pytest.mark.parametrize(
    ("missing", "section"),
    [
        ("manifest.json", "split"),
        ("samples.json", "samples"),
        ("clients.jsonl", "clients"),
        ("recipe.yaml", "recipe"),
        ("summary.json", None),
        ("environment.json", None),
    ],
)
def test_a_missing_piece_leaves_only_its_section_out(
    fabricate: Make, missing: str, section: str | None
) -> None:
    folder = fabricate(rounds=1)
    (folder / missing).unlink()
    assert Page(text_of(folder)).ids == [name for name in SECTIONS if name != section]


def test_one_line_of_metrics_is_enough(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"round": 0, "test/loss": 4.0}\n')
    assert Page(text_of(tmp_path)).ids == ["headline", "results", "curves"]


def test_a_broken_loss_does_not_break_the_page(fabricate: Make) -> None:
    folder = fabricate()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 5, "test/loss": null, "train/loss": null, "comm/upload_bytes": 1}\n')
        file.write('{"round": 6, "test/lo')
    said = text_of(folder)
    assert "not finite" in said, "not the last loss that was a number"


def test_many_clients_are_drawn_without_names_and_folded(fabricate: Make) -> None:
    text = text_of(fabricate(clients=60))
    assert "from worst to best test exact match" in text
    assert "<details>\n<summary>60 clients" in text


def test_other_runs_can_be_drawn_beside(fabricate: Make) -> None:
    first, second = fabricate("one"), fabricate("two", top=0.5)
    text = write_report(first, others=[second]).read_text()
    assert '<th class="n">two</th>' in text
    third = fabricate("one", folder=second / "again")
    text = write_report(first, others=[third]).read_text()
    assert f'<th class="n">one ({third})</th>' in text


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no run directory: it holds no metrics\.jsonl; give"):
        read_results(tmp_path)


def test_a_damaged_file_is_named(fabricate: Make) -> None:
    folder = fabricate()
    (folder / "summary.json").write_text('{"name": ')
    with pytest.raises(ValueError, match=r"summary\.json is not JSON \(.*\): remove it to go on"):
        read_results(folder)
    (folder / "summary.json").write_text(json.dumps({}))
    assert read_results(folder).name == "demo"
