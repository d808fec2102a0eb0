"""How much of one round each rule of `robust.py` keeps under each attack, all of them on the same honest updates.

    python benchmarks/robust_round.py [--seeds 0,1,2] [--after 2]

A federation without attackers trains for some rounds. Of the next one, honest updates are kept, what attackers would have
sent is made of them, and every rule combines the same replies. Lengths are of changes of the model, in units of the
honest clients' mean: along is how far the combined update goes its way, aside how far it goes elsewhere.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedloom.core.payloads import mean_upload
from fedloom.core.protocols import ClientId, Delivery, Engine, Params, Profile, Reply, Task
from fedloom.rounds.loop import advance, begin
from fedloom.rounds.session import build
from fedloom.server.combine.products import inner_products
from robust import (
    ATTACKERS,
    ATTACKS,
    BOUNDED,
    MEAN,
    MEAN_OF_11,
    RULES,
    Attacked,
    poisoned,
    recipe_of,
)
from robust_table import ABSENT
from timing import write_page

TOLD = (
    "One round of the federations of [`robust.md`](robust.md), after {after} without attackers, mean of seeds {seeds}. Every"
    " rule combines the same replies. Lengths are of changes of the model in units of the honest clients' mean: the first"
    " number is how far the combined update goes along it (1 is all the way, below 0 backwards), the second how far it goes"
    " aside. The spread of honest updates is what bounds every rule: {spread} What a round goes aside, later ones have to"
    " make up for: rules that sort lose a share of the spread to attackers who stand on one side of every number, Krum takes"
    " one client, whose way is mostly its own, and label flips lie within the spread, so that only rules that choose tell"
    " them. ALIE turns one round hardly, but all rounds the same way."
)


@dataclass
class Kept:
    """An engine that trains each task once, and gives the same replies whenever it is asked again."""

    engine: Engine
    tasks: list[Task] = field(default_factory=list)
    found: dict[ClientId, Delivery] = field(default_factory=dict)

    def population(self) -> Mapping[ClientId, Profile]:
        """Return everybody."""
        return self.engine.population()

    def run(self, tasks: Sequence[Task]) -> Iterator[Delivery]:
        """Yield deliveries, trained where they are new."""
        if not self.found:
            self.tasks = list(tasks)
            clients = [task.client for task in tasks]
            self.found = dict(zip(clients, self.engine.run(tasks), strict=True))
        yield from (self.found[task.client] for task in tasks)


def kept(seed: int, rule: str, attack: str, after: int) -> Kept:
    """Return a round that begins after some without attackers."""
    recipe = recipe_of(rule, seed, 6)
    with tempfile.TemporaryDirectory() as folder:
        session = build(recipe, Path(folder))
        run = begin(recipe.algorithm, session.space.start(), seed)
        ways = {"population": session.learners, "sampler": recipe.cohort, "max_update_norm": 1e9}
        for _ in range(after):
            run, _, _ = advance(run, recipe.algorithm, session.engine, **ways)
        if attack == "labels":
            session = build(recipe, Path(folder) / "own", own=poisoned)
        last = Kept(session.engine)
        advance(run, recipe.algorithm, last, **ways)
    return last


def seen(last: Kept, attack: str, rules: Sequence[str]) -> Iterator[tuple[str, float, float]]:
    """Yield how far each rule's update goes along the honest mean, and aside."""
    engine = Attacked(last, attack)
    answers = [delivery.answer for delivery in engine.run(last.tasks)]
    replies = [answer for answer in answers if isinstance(answer, Reply)]
    bad = sorted(reply.client for reply in replies)[-ATTACKERS:]
    start = last.tasks[0].download["params"]
    honest = mean_upload(reply for reply in replies if reply.client not in bad)["delta"]
    for rule in rules:
        delta, _ = recipe_of(rule, 0, 6).algorithm.combine.combine(start, replies)
        yield rule, *_along(start, honest, delta)


def _along(start: Params, honest: Params, delta: Params) -> tuple[float, float]:
    products = inner_products(start, [honest, delta])
    along = float(products[0, 1] / products[0, 0])
    rest = float(products[1, 1] / products[0, 0]) - along**2
    return along, max(rest, 0.0) ** 0.5


def spread(last: Kept) -> tuple[float, float]:
    """Return the honest updates' distance from their mean in units of its length, and of numbers their mean over deviation."""
    answers = [last.found[client].answer for client in sorted(last.found)[:-ATTACKERS]]
    deltas = [answer.upload["delta"] for answer in answers if isinstance(answer, Reply)]
    start = last.tasks[0].download["params"]
    products = inner_products(start, deltas)
    square = float(products.mean())
    away = float((products.diagonal() - 2 * products.mean(1) + square).clamp_min(0).sqrt().mean())
    stacks = [torch.stack([delta[name] for delta in deltas]) for name in start]
    means = sum(float(stack.mean(0).square().sum()) for stack in stacks)
    return away / square**0.5, (means / sum(float(stack.var(0).sum()) for stack in stacks)) ** 0.5


def main() -> None:
    """Train, combine, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--after", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    attacks = [attack for attack in ATTACKS if attack != ABSENT]
    eleven = [MEAN_OF_11, "bulyan"]
    eight = [rule for rule in RULES if rule not in (*eleven, BOUNDED)]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    spreads = []
    for seed in map(int, arguments.seeds.split(",")):
        for rules, first in ((eight, MEAN), (eleven, MEAN_OF_11)):
            clean = kept(seed, first, "none", arguments.after)
            wrong = kept(seed, first, "labels", arguments.after)
            spreads += [spread(clean)] if rules is eight else []
            for attack in attacks:
                for rule, *parts in seen(wrong if attack == "labels" else clean, attack, rules):
                    found.setdefault((rule, attack), []).append((parts[0], parts[1]))
    rows = [f"| rule | {' | '.join(attacks)} |", f"|---|{'---:|' * len(attacks)}"]
    for rule in (*eight, *eleven):
        cells = [_cell(found[rule, attack]) for attack in attacks]
        rows.append(f"| {rule} | {' | '.join(cells)} |")
    away, ratio = (statistics.fmean(parts) for parts in zip(*spreads, strict=True))
    told = (
        f"they lie {away:.1f} times the length of their mean away from it, and a number's mean is {ratio:.2f} of its"
        " standard deviation over clients."
    )
    text = "\n".join(rows)
    print(text, told)
    heading = TOLD.format(after=arguments.after, seeds=arguments.seeds, spread=told)
    write_page("robust_round.md", "What a round keeps under attack", f"{heading}\n\n{text}")


def _cell(parts: Sequence[tuple[float, float]]) -> str:
    values: list[Any] = [statistics.fmean(part) for part in zip(*parts, strict=True)]
    return " / ".join(f"{value:.2f}" if abs(value) < 100 else f"{value:.0e}" for value in values)


if __name__ == "__main__":
    main()
