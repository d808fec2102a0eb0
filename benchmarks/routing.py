"""New clients find the model of their language, and are told how sure that is.

    python benchmarks/routing.py [--clients 60] [--seeds 3] [--rounds 12] [--overrides local.steps=10 ...]

Runs of the recipe `polyglot_mixed` with clients of one language each, their clusters found, pooled or apart; then clients that took no part, of text from another seed, are routed by some of their rows,
with answers and by prompts alone. The likeliest cluster is right if its clients speak the new one's language. Loss is that
of the answers of the other new clients of that language, nats an example: of the model chosen, beside always the likeliest
cluster's, the model for all, and that of the right cluster. The calibration error is that of ten bins of the chance named
for the likeliest cluster, over all seeds. A finished run is not repeated.
"""

import argparse
import dataclasses
import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch

from fedloom import experiment
from fedloom.core.description import GLOBAL
from fedloom.core.randomness import derive
from fedloom.data.formats import Record, to_records
from fedloom.data.sources import take_rows
from fedloom.data.tokens import Example
from fedloom.recipe import load_recipe
from fedloom.results.route import Route, Router
from fedloom.rounds.restore import last_run
from fedloom.rounds.session import Session, build
from intervals import interval
from timing import write_page

SIZES = (1, 2, 4, 16)
SHARES = {"pooled": "", "apart": ", share: {pool: 'off'}"}
"""What clusters have in common, as the recipe says it."""


def trained(seed: int, kind: str, arguments: argparse.Namespace) -> Session:
    """Return the session of a run, after it."""
    share = SHARES[kind]
    recipe = load_recipe(
        "polyglot_mixed",
        [
            f"algorithm=[{{clustered: {{label: group{share}}}}}, fedavg]",
            "data.partition.clusters.share=1.0",
            f"data.seed={seed}",
            f"run.seed={seed}",
            f"run.rounds={arguments.rounds}",
            "run.baselines=[]",
            "run.samples=0",
            "evaluation.every=0",
            "evaluation.generate=false",
            "evaluation.max_examples=8",
            *arguments.overrides,
        ],
    )
    folder = arguments.runs / f"{kind}-{arguments.rounds}-{seed}"
    if not (folder / "summary.json").exists():
        experiment.run(recipe, folder)
    return build(recipe, folder)


def newcomers(session: Session, count: int, size: int) -> list[tuple[str, list[Record]]]:
    """Return the language and the examples of clients that took no part, the languages in turn."""
    data = replace(
        session.recipe.data, seed=derive(session.recipe.data.seed, "newcomers"), num_examples=3000
    )
    by_language: dict[str, list[Record]] = {}
    for record in to_records(take_rows(data).rows, data).records:
        by_language.setdefault(record.labels["language"], []).append(record)
    languages = sorted(by_language)
    found = []
    for at in range(count):
        language, start = languages[at % len(languages)], at // len(languages) * size
        found.append((language, by_language[language][start : start + size]))
    return found


def spoken(session: Session, router: Router) -> Mapping[str, str]:
    """Return the language that most clients of each model speak."""
    profiles = session.federation.profiles
    return {
        name: Counter(profiles[client]["language"] for client in clients).most_common(1)[0][0]
        for name, (_, clients) in router.models.items()
        if clients
    }


@dataclass(frozen=True)
class Case:
    """One new client, routed."""

    route: Route
    right: bool
    """Whether the likeliest cluster speaks its language."""
    losses: Mapping[str, float]
    """Of the rows of others of its language, nats an example: by rule."""

    @property
    def chance(self) -> float:
        """Return the chance named for the likeliest cluster."""
        return self.route.posterior[self.route.likeliest]


def routed(session: Session, count: int) -> dict[tuple[str, int], list[Case]]:
    """Return the new clients of a run by kind of evidence and number of rows; `prompt itself` is its likelihood."""
    run = last_run(session)
    router = Router.of(session, run)
    languages = spoken(session, router)
    new = newcomers(session, count, max(SIZES))
    examples = [router.examples(records) for _, records in new]
    flat = [example for mine in examples for example in mine]
    kinds = {
        "answers": _evidence(router, flat, answered=True),
        "prompts": _evidence(router, flat, answered=False),
        "the prompt itself": _evidence(router, list(map(_posed, flat)), answered=True),
    }
    rows = max(SIZES)
    found: dict[tuple[str, int], list[Case]] = {}
    for at, (language, _) in enumerate(new):
        others = [
            other * rows + row
            for other, (theirs, _) in enumerate(new)
            if theirs == language and other != at
            for row in range(rows)
        ]
        loss = {
            n: -statistics.fmean(each[i] for i in others) for n, each in kinds["answers"].items()
        }
        own = next(name for name, spoken_there in languages.items() if spoken_there == language)
        for kind, evidence in kinds.items():
            for size in SIZES:
                seen = {n: each[at * rows : at * rows + size] for n, each in evidence.items()}
                route = router.concluded(seen, examples[at][:size], answered=kind != "prompts")
                losses = {
                    "chosen": loss[route.model],
                    "likeliest": loss[route.likeliest],
                    "for all": loss[GLOBAL],
                    "right": loss[own],
                }
                case = Case(route, languages.get(route.likeliest) == language, losses)
                found.setdefault((kind, size), []).append(case)
    return found


def _evidence(
    router: Router, examples: Sequence[Example], *, answered: bool
) -> Mapping[str, Sequence[float]]:
    return {name: router.evidence(name, examples, answered=answered) for name in router.models}


def _posed(example: Example) -> Example:
    """Return an example that asks for its prompt."""
    ids = example.ids[: example.prompt_length]
    return dataclasses.replace(example, ids=ids, labels=ids)


def calibration_error(cases: Sequence[Case]) -> float:
    """Return the mean distance of the chance named from how often it came true, in ten bins."""
    bins: dict[int, list[Case]] = {}
    for case in cases:
        bins.setdefault(min(int(10 * case.chance), 9), []).append(case)
    far = (
        len(own)
        * abs(statistics.fmean(c.chance for c in own) - statistics.fmean(c.right for c in own))
        for own in bins.values()
    )
    return sum(far) / len(cases)


def table(found: Sequence[Mapping[tuple[str, int], Sequence[Case]]]) -> str:
    """Return the table of one kind of run, a mapping a seed."""
    columns = ("by", "rows", "right, %", "chance named, %", "calibration error")
    columns += ("for all, %", "loss: chosen", "likeliest", "model for all", "right")
    lines = [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for kind, size in found[0]:
        seeds = [one[kind, size] for one in found]
        cases = [case for one in seeds for case in one]
        right = interval([100 * statistics.fmean(c.right for c in one) for one in seeds], 0)
        cells = [kind, f"{size}", right]
        if kind != "the prompt itself":
            chance = interval([100 * statistics.fmean(c.chance for c in one) for one in seeds], 0)
            cells += [chance, f"{calibration_error(cases):.2f}"]
            shared = [100 * statistics.fmean(c.route.model == GLOBAL for c in one) for one in seeds]
            cells.append(interval(shared, 0))
            for rule in cases[0].losses:
                losses = [statistics.fmean(c.losses[rule] for c in one) for one in seeds]
                cells.append(interval(losses, 2))
        lines.append(f"| {' | '.join(cells)}{' |' * (len(columns) - len(cells))} |")
    return "\n".join(lines)


def main() -> None:
    """Train, route and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--overrides", nargs="*", default=[])
    parser.add_argument("--runs", type=Path, default=Path("runs/routing-benchmark"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts = [
        f"Six languages, {arguments.clients} new clients a seed, {arguments.seeds} seeds, with"
    ]
    parts[0] += " 95 % confidence intervals of means over the seeds."
    for kind in SHARES:
        found = [
            routed(trained(seed, kind, arguments), arguments.clients)
            for seed in range(arguments.seeds)
        ]
        parts.append(f"## Clusters {kind}")
        parts.append(table(found))
        print(parts[-1], flush=True)
    title = f"New clients routed: polyglot, six languages, {arguments.rounds} rounds"
    write_page("routing.md", title, "\n\n".join(parts))


if __name__ == "__main__":
    main()
