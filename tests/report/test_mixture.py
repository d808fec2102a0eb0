"""What clients are mixtures of, on the page."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fedloom.report.page import write_report

Make = Callable[..., Path]


def section(folder: Path) -> str:
    page = write_report(folder).read_text(encoding="utf-8")
    found = re.search(r'<section id="mixture">.*?</section>', page, flags=re.DOTALL)
    return found[0] if found else ""


@pytest.mark.parametrize("clients", [3, 50])
def test_the_page_shows_the_shares_of_every_client(fabricate: Make, clients: int) -> None:
    folder = fabricate(clients=clients)
    file = folder / "clients.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        row["metrics"] |= {"mixture_1": 0.7, "mixture_2": 0.2, "mixture_3": 0.1}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = section(folder)
    for at in (1, 2, 3):
        assert f"component {at}</li>" in shown
    assert "component 4" not in shown
    assert ("client-002" in shown) == (clients == 3)
    assert (f"{clients} clients" in shown) == (clients == 50)


def test_a_run_of_one_model_has_no_such_section(fabricate: Make) -> None:
    assert section(fabricate()) == ""
