"""What a run in seed space told, on the page."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.report.page import write_report

Make = Callable[..., Path]
K = 256


def page_of(folder: Path, told: dict[str, Any], seeds: dict[str, Any] | None) -> str:
    """Add what every round told and the record of the seeds, and return the page."""
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [
        {**row, **({k: v * row["round"] for k, v in told.items()} if row["round"] else {})}
        for row in rows
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if seeds is not None:
        (folder / "seeds.json").write_text(json.dumps(seeds))
    return write_report(folder).read_text(encoding="utf-8")


def section(page: str) -> str:
    found = re.search(r'<section id="seeds">.*?</section>', page, flags=re.DOTALL)
    return found[0] if found else ""


TOLD = {
    "server/coefficient_norm": 2e-5,
    "server/coefficient_max": 3e-6,
    "server/walked": 0.2,
    "memory/train_bytes": 2.5e8,
}


def record(models: int = 1, *, pro: bool = False) -> dict[str, Any]:
    wave = [1e-5 * math.sin(at) for at in range(K)]
    chances = [1 + at / K for at in range(K)]
    return {
        "num_seeds": K,
        "models": [
            {"name": f"cluster-{at}", "num_clients": 2, "coefficients": wave}
            for at in range(models)
        ],
        "probabilities": [chance / sum(chances) for chance in chances] if pro else None,
        "rebuild": {"seconds": 0.82, "memory/rebuild_bytes": 300_000_000.0},
    }


def test_the_page_says_how_large_the_coefficients_are(fabricate: Make) -> None:
    page = page_of(fabricate(), TOLD, record())
    part = section(page)
    assert "the coefficients' norm is 8e-05 and the largest is 1.2e-05." in part.replace(
        "&#39;", "'"
    )
    assert "Of 256 seeds, 80 % were walked along." in part
    assert "Building the model from them takes 0.8 s here." in part
    assert part.count("<svg") == 3
    for said in ("Size of the coefficients", "How many seeds have which coefficient", ">norm<"):
        assert said.strip(">") in part
    assert "#0072b2" not in part
    assert "likeliest" not in part


def test_the_page_shows_which_seeds_are_likely(fabricate: Make) -> None:
    told = {**TOLD, "server/effective_seeds": 60.0}
    part = section(page_of(fabricate(), told, record(pro=True)))
    assert part.count("<svg") == 4
    assert "seeds, from the likeliest" in part
    assert "drawn from, in effect" in part


def test_each_model_has_its_coefficients(fabricate: Make) -> None:
    part = section(page_of(fabricate(), TOLD, record(3)))
    assert all(f"cluster-{at}" in part for at in range(3))


def test_a_run_that_has_not_ended_shows_its_rounds(fabricate: Make) -> None:
    part = section(page_of(fabricate(), TOLD, None))
    assert part.count("<svg") == 1


def test_coefficients_that_never_moved_are_drawn(fabricate: Make) -> None:
    still = {**record(), "models": [{"name": "a", "num_clients": 1, "coefficients": [0.0] * K}]}
    part = section(page_of(fabricate(), dict.fromkeys(TOLD, 0.0), still))
    assert part.count("<svg") == 3


@pytest.mark.parametrize("seeds", [True, False])
def test_memory_is_told_by_phase(seeds: bool, fabricate: Make) -> None:
    page = page_of(fabricate(), TOLD, record() if seeds else None)
    said = "training 1.00 GB" + (", rebuilding the model 300 MB" if seeds else "")
    assert f"<dt>Peak memory by phase</dt><dd>{said}</dd>" in page


def test_a_run_in_another_space_has_no_such_section(fabricate: Make) -> None:
    page = write_report(fabricate()).read_text(encoding="utf-8")
    assert not section(page)
    assert "by phase" not in page
    assert "<li>lora, rank 8</li>" in page
