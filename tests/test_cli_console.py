"""What is printed is text as it is, on any terminal."""

import io
import sys

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fedloom.cli_console import complain, console, open_terminal

HOSTILE = ["[/x]", "[bold]", "[link=a]b", "[", "]", "\\[", ":smile:", "[@click=x]", "[red]a[/red]"]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_is_markup(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name", title=text)
    table.add_row(text)
    for part in (text, table, Panel("x", title=Text(text))):
        console().print(part)
        assert text in capsys.readouterr().out


def test_a_terminal_without_letters_gets_stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    stream = io.TextIOWrapper(out, encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    open_terminal()
    table = Table("übung", title="quickstart → runs")
    table.add_row("🙂 \ud83d 1–2 −3 …")
    console().print(table)
    complain("no file ‘x’\nin\tß")
    said = out.getvalue().decode("ascii")
    assert "quickstart -> runs" in said
    assert "\\xfcbung" in said
    assert "\\U0001f642 \\ud83d 1-2 -3 ..." in said
    assert said.splitlines()[-1] == "fedloom: no file \\u2018x\\u2019 in \\xdf"


def test_half_a_letter_can_be_printed_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8", write_through=True))
    open_terminal()
    console().print("a \ud83d ä")
    assert out.getvalue().decode() == "a \\ud83d ä\n"
