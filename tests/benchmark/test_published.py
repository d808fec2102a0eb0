"""Every table that a page prints can be made anew by its name, and says what papers have beside it."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedloom import cli
from fedloom.benchmark.published import benchmarks, find, published, reproduce

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)]


def printed() -> set[str]:
    """Return the names of the result files that pages include or name."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"benchmarks/results/([\w.]+\.(?:md|txt))", text))
    named |= {n for n in re.findall(r"`([\w.]+\.(?:md|txt))`", text) if (RESULTS / n).is_file()}
    return named


def test_every_table_of_a_page_is_listed_with_a_command_that_is_there() -> None:
    known = published(benchmarks())
    files = printed()
    assert len(files) >= 30
    for name in files:
        table = known[Path(name).stem]
        assert table.file == RESULTS / name
        for script, *_ in table.commands():
            assert Path(script).is_relative_to(ROOT / "benchmarks")
    assert len(known) == len(list(RESULTS.iterdir())), "two files of one name"
    said = CliRunner().invoke(cli.app, ["reproduce", "--list"])
    assert said.exit_code == 0
    assert "engines: The same run in this process, over loopback messages" in said.output
    assert {line.partition(":")[0] for line in said.output.splitlines()} >= {
        Path(name).stem for name in files
    }


def test_figures_of_papers_are_of_tables_that_there_are_and_say_where_they_stand() -> None:
    papers = published(None)
    assert papers.keys() <= published(benchmarks()).keys()
    for table in papers.values():
        assert table.papers
        assert all(re.search(r"arXiv:\d{4}\.\d{5}|notebook", paper.where) for paper in table.papers)
        assert len(table.said()) > len(table.papers)
    assert "  FedKSeed, K=4096: 22.33 ± 1.72 (1.3B model), 29.77 ± 0.75 (3B model)" in (
        papers["real_kseed"].said()
    )


def test_a_table_is_shown_and_its_script_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = CliRunner().invoke(cli.app, ["reproduce", "flasc", "--list"])
    assert shown.exit_code == 0
    assert "benchmarks/flasc.py --table" in shown.output
    assert "| dense" in shown.output
    assert "up to 10x less" in shown.output
    folder = tmp_path / "benchmarks"
    (folder / "results").mkdir(parents=True)
    (folder / "echo.py").write_text("import sys; print(*sys.argv[1:]); sys.exit(3)")
    head = "command   python echo.py --data rows.jsonl\n"
    (folder / "results" / "echo.txt").write_text(head)
    (folder / "results" / ".DS_Store").write_bytes(b"\xff")
    assert [*published(folder)] == ["echo"]
    table = find("echo", folder)
    with pytest.raises(
        ValueError, match=r"the command reads rows\.jsonl, which is not here: start"
    ):
        reproduce(table)
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.setenv("FEDLOOM_DATA", str(tmp_path))
    assert reproduce(table) == 3
    assert table.commands() == [[str(folder / "echo.py"), "--data", "rows.jsonl"]]
    (folder / "echo.py").unlink()
    with pytest.raises(ValueError, match=r"was made by echo\.py, which is not in"):
        table.commands()


def test_outside_of_a_clone_it_says_where_to_get_the_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloom.benchmark.published._CLONE", tmp_path / "lib")
    monkeypatch.chdir(tmp_path)
    assert benchmarks() is None
    listed = CliRunner().invoke(cli.app, ["reproduce", "--list"])
    assert "real_kseed" in listed.output
    assert "in the source distribution" in " ".join(listed.output.split())
    refused = CliRunner().invoke(cli.app, ["reproduce", "real_kseed"])
    assert "FedKSeed, K=4096" in refused.output
    assert "real_kseed cannot be made here: the scripts in benchmarks/" in str(refused.exception)
    with pytest.raises(ValueError, match=r"no table is called 'real_ksed' \(did you mean"):
        find("real_ksed", None)
