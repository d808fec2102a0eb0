"""What our own wire reveals: the words of a client's batch, by the span check, over spaces, links, steps, sums and noise.

    python benchmarks/audit.py
    python benchmarks/audit.py --model ~/.cache/fedloom/models/smollm2.gguf --page audit_smollm2.md
    python benchmarks/audit.py --kept rows.json      # an ended one goes on

Every row is a run of two rounds of four clients on the built-in corpus, recorded (`audit: record`) and audited as its own
server; where not said otherwise with one SGD step on one example of each client, which is the worst case. The second round is
looked at: in the first, A of a LoRA does not move.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedloom import experiment
from fedloom.audit.attacks import ATTACKS
from fedloom.audit.conduct import audited
from fedloom.audit.findings import Finding
from fedloom.audit.learnt import learnt, tokens_of
from fedloom.audit.records import Case, open_case
from fedloom.recipe import build_recipe
from timing import write_page

SGD: Mapping[str, Any] = {"optimizer": "sgd", "lr": 0.1, "steps": 1, "batch_size": 1}
LOOKED_AT = 2
FULL: Mapping[str, Any] = {"full": {}}
FLASC: list[Any] = [{"flasc": {"download": 1.0, "upload": 0.25}}, "fedavg"]


def lora(rank: int, **settings: Any) -> dict[str, Any]:
    """Return LoRA on the projections whose input is known for every word."""
    return {"lora": {"rank": rank, "targets": ["q_proj", "k_proj", "v_proj"], **settings}}


def noisy(noise: float) -> list[Any]:
    """Return user-level privacy with so much noise beside the clip."""
    terms = {"clip": 0.001, "noise_multiplier": noise, "delta": 1e-4, "noise_seed": 1}
    return [{"private": terms}, "fedavg"]


@dataclass(frozen=True)
class Row:
    """A setting, and what of it is looked at."""

    name: str
    tune: Mapping[str, Any]
    seen: str = "upload"
    sections: Mapping[str, Any] = field(default_factory=dict)


def rows(*, real: bool) -> list[Row]:
    """Return the settings, of a real model a few."""
    eight = lora(8)
    adamw = {"optimizer": "adamw", "lr": 2e-3, "batch_size": 4}
    spaces = [
        Row("LoRA r2", lora(2)),
        Row("LoRA r8", eight),
        Row("LoRA r32", lora(32)),
        Row("FFA-LoRA r8 (A frozen)", eight, sections={"algorithm": ["freeze", "fedavg"]}),
    ]
    steps = [
        Row(f"LoRA r8, {count} SGD steps", eight, sections={"local": {"steps": count}})
        for count in (4, 16)
    ]
    links = [
        Row("LoRA r8, int8", eight, sections={"wire": {"upload": "int8"}}),
        Row("LoRA r8, FLASC 1/4 up", eight, sections={"algorithm": FLASC}),
    ]
    if real:
        return [spaces[1], spaces[2], steps[0], links[0]]
    return [
        Row("all weights", FULL),
        *spaces,
        Row("IA3", {"ia3": {}}, sections={"local": {"lr": 0.5}}),
        Row("prompt", {"prompt": {}}, sections={"local": {"lr": 0.5}}),
        Row(
            "seeds, K = 1024 (FedKSeed)",
            {"seeds": {"num_seeds": 1024}},
            sections={
                "algorithm": {"fedkseed": {"steps": 100}},
                "local": {"steps": None, "lr": 1e-5},
            },
        ),
        *(
            Row(f"all weights, {count} SGD steps", FULL, sections={"local": {"steps": count}})
            for count in (4, 16)
        ),
        *steps,
        Row("all weights, 1 AdamW step of 1", FULL, sections={"local": {**adamw, "batch_size": 1}}),
        Row("all weights, 1 AdamW step of 4", FULL, sections={"local": adamw}),
        Row("all weights, 4 AdamW steps of 4", FULL, sections={"local": {**adamw, "steps": 4}}),
        Row("LoRA r8, 4 AdamW steps of 4", eight, sections={"local": {**adamw, "steps": 4}}),
        *links,
        Row("all weights, int8", FULL, sections={"wire": {"upload": "int8"}}),
        Row("all weights, FLASC 1/4 up", FULL, sections={"algorithm": FLASC}),
        Row("all weights, secure sum of 2", FULL, "sum of 2", summed(2)),
        Row("all weights, secure sum of 8", FULL, "sum of 8", summed(8)),
        Row("LoRA r8, secure sum of 2", eight, "sum of 2", summed(2)),
        Row("LoRA r8, secure sum of 8", eight, "sum of 8", summed(8)),
        *(
            Row(
                f"all weights, mean of 4 clients, noise {noise:g} of the clip",
                FULL,
                "model",
                {"algorithm": noisy(noise), "cohort": {"poisson": {"q": 0.5}}},
            )
            for noise in (0.0, 0.02, 0.5)
        ),
    ]


def summed(count: int) -> dict[str, Any]:
    """Return the sections of a secure sum of so many clients."""
    return {"secure": {"threshold": count}, "cohort": {"uniform": {"size": count}}}


def tree(row: Row, model: str) -> dict[str, Any]:
    """Return the recipe of a row."""
    sections = dict(row.sections)
    return {
        "name": "audit",
        "algorithm": sections.pop("algorithm", "fedavg"),
        "model": {"name": model},
        "tune": row.tune,
        "audit": "record",
        "data": {
            "num_examples": 240,
            "num_clients": 8,
            "max_length": 96,
            "partition": "iid",
        },
        "local": {**SGD, **sections.pop("local", {})},
        "cohort": sections.pop("cohort", {"uniform": {"size": 4}}),
        "evaluation": {"every": 0, "generate": False, "max_examples": 1, "validation": False},
        "run": {"rounds": LOOKED_AT, "samples": 0},
        **sections,
    }


def looked_at(row: Row, model: str, folder: Path) -> tuple[Case, list[Finding]]:
    """Return a run of a row, and what the span check finds of its last round."""
    experiment.run(build_recipe(tree(row, model)), folder)
    case = open_case(folder, console=Console(quiet=True), round=LOOKED_AT)
    found = audited(case, {"span": ATTACKS["span"]}, console=Console(quiet=True))
    return case, [one for one in found.findings if one.seen == row.seen]


def line(row: Row, case: Case, findings: list[Finding]) -> str:
    """Return a row of the table: of the window whose area is largest, what it shows."""
    received = case.releases() if row.seen == "model" else case.uploads()
    examples = [learnt(case, one) for one in received]
    count = [sum(len(example.ids) for example in own) for own in examples]
    distinct = [len(tokens_of(own)) for own in examples]
    by = {one.measure: one for one in findings}
    areas = [one for one in findings if one.measure.startswith("AUC")]
    if not areas:
        return f"| {row.name} | {row.seen} | | | nothing to hold words against | | | |"
    most = max(areas, key=lambda one: one.value)
    through = most.measure.removeprefix("AUC through ")
    words, right = (
        by.get(f"{measure} through {through}")
        for measure in ("words found", "found words that are right")
    )
    cells = [
        row.name,
        row.seen,
        f"{sum(count) / len(count):.0f}",
        f"{sum(distinct) / len(distinct):.0f}",
        through,
        "" if words is None else f"{100 * words.value:.0f} %",
        "" if right is None else f"{100 * right.value:.0f} %",
        f"{most.value:.2f} ({most.chance:.2f})",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table, and write it down."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--page", default="audit.md")
    parser.add_argument("--kept", type=Path, help="Rows that are finished, by name.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines: dict[str, str] = {}
    if given.kept and given.kept.exists():
        lines = json.loads(given.kept.read_text())
    asked = rows(real=given.model != "builtin:tiny")
    with tempfile.TemporaryDirectory() as home:
        for at, row in enumerate(asked):
            if row.name not in lines:
                model = (
                    str(Path(given.model).expanduser()) if ":" not in given.model else given.model
                )
                lines[row.name] = line(row, *looked_at(row, model, Path(home) / str(at)))
                print(lines[row.name], flush=True)
            if given.kept:
                given.kept.write_text(json.dumps(lines))
    about = (
        f"Model {Path(given.model).name}; eight clients of 30 examples. `tokens` and `words` are those of the batches that an"
        " upload came of, all and distinct ones; `found` is the share of these words at the threshold, `right` that of what is"
        " found; `AUC` is how often a word that was learnt from is nearer to the span than one that other clients use, in"
        " brackets the same by another client's upload of the round, 0.5 where there is none. Of each setting the most telling"
        " part of the upload is shown.\n"
    )
    text = [
        about,
        "<!-- table -->\n",
        "| tuned and sent | read | tokens | words | through | found | right | AUC |",
        "|---|---|---|---|---|---|---|---|",
        *(lines[row.name] for row in asked),
    ]
    write_page(
        given.page, "What our wire reveals: words of a batch, by the span check", "\n".join(text)
    )


if __name__ == "__main__":
    main()
