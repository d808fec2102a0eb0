from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fedloom.report.compare import compare

Make = Callable[..., Path]


def said(table: object) -> str:
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_runs_stand_in_one_table_and_one_page(fabricate: Make, tmp_path: Path) -> None:
    out = tmp_path / "compare.html"
    folders = [fabricate("dense", top=0.8), fabricate("sparse", top=0.4, traffic=100)]
    text = said(compare(folders, out=out))
    for part in ("Test exact match of 2 runs", "dense", "80.0 %", "40.0 %", "4.00 kB", "400 B"):
        assert part in text
    # Half the way of the dense run is where the sparse one ends: two rounds of 2,000 bytes.
    assert "bytes to 40.0 %" in text
    assert "4.00 kB" in text
    page = out.read_text()
    assert page.count("<svg") == 2
    assert "Test exact match by bytes" in page
    assert "var(--series-1)" in page
    assert 'src="' not in page
    assert "<script" not in page


def test_the_loss_is_compared_where_a_run_has_no_answers(fabricate: Make) -> None:
    text = said(compare([fabricate("a"), fabricate("b", generate=False)]))
    assert "Test loss of 2 runs" in text
    assert "1.000" in text


def test_a_metric_can_be_asked_for(fabricate: Make) -> None:
    text = said(compare([fabricate("a"), fabricate("b")], metric="test/rougeL"))
    assert "Test ROUGE-L of 2 runs" in text
    with pytest.raises(
        ValueError,
        match=r"--metric must be one that all runs have \(test/loss, .*train/loss.*\), "
        r"got 'test/bleu'",
    ):
        compare([fabricate("c")], metric="test/bleu")


def test_runs_without_anything_in_common_are_refused(fabricate: Make, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text('{"round": 0, "seconds": 1.0}\n')
    with pytest.raises(ValueError, match="runs demo, bare have no loss or exact match in common"):
        compare([fabricate(), bare])


def test_very_different_traffic_gets_a_logarithmic_axis(fabricate: Make, tmp_path: Path) -> None:
    out = tmp_path / "compare.html"
    compare([fabricate("loud", traffic=10**6), fabricate("quiet", traffic=10)], out=out)
    assert "MB" in out.read_text()
    compare([fabricate("silent", traffic=0), fabricate("other")], out=out)
    assert out.read_text().count("<svg") == 2


def test_the_same_folder_given_twice_is_one_run(fabricate: Make) -> None:
    folder = fabricate()
    assert "of 1 runs" in said(compare([folder, folder]))
