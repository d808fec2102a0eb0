"""What bad clients do to a federation, by the rule that combines its uploads; and what a rule costs where there are none.

    python benchmarks/robust.py [--rounds 6] [--seeds 0,1,2] [--rules A;B] [--attacks A;B] [--part 0/2] [--table]

Eight clients learn one task of polyglot nearly to the end (in the steep part of a loss curve, a step a little shorter is
a loss that is tens of percent larger, which is no difference of quality), all in every round. The last two attack in all
rounds; Bulyan, which needs four times as many and three, has eleven clients. Sign flip sends its update times -10, 1e30
that number everywhere, noise normal numbers of fifty times the standard deviation of honest ones, labels trains on answers
shifted by a token id, ALIE (Baruch, Baruch, Goldberg, NeurIPS 2019, arXiv:1902.06156) knows all honest updates and sends
their mean less 1.5 standard deviations, gauge trains honestly and sends A times 1000 and B divided by it, which is the
same model. `run.max_update_norm` is off, but for the last row, where it is the default and the rule the mean. Rules know
the number of attackers where they ask for it, and nothing else.

A run's line is kept, so that a benchmark that was stopped goes on; `--part i/n` takes every n-th run, `--table` only
writes the table, of whatever there is.
"""

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch

from fedloom.core.protocols import ClientId, Delivery, Engine, Params, Profile, Reply, Task
from fedloom.core.randomness import generator
from fedloom.data.data_settings import DataSettings
from fedloom.data.federation import Federation, federate
from fedloom.data.tokens import Example, Tokenizer
from fedloom.evaluation.measure import combine
from fedloom.objectives.objective import Objective
from fedloom.recipe import build_recipe
from fedloom.rounds.loop import advance, begin, measure
from fedloom.rounds.recipe_settings import MAX_UPDATE_NORM
from fedloom.rounds.session import Makers, Session, build
from robust_table import ABSENT, NONE, costs, differences, gathered, losses
from shares import parser_of, share_of
from timing import write_page

ATTACKERS = 2
MEAN, MEAN_OF_11, BOUNDED = "mean", "mean, 11 clients", "mean, run.max_update_norm"
RULES: Mapping[str, Any] = {
    MEAN: "mean",
    "median": "median",
    "trimmed_mean": {"trimmed_mean": {"share": 0.25}},
    "krum": {"krum": {"attackers": ATTACKERS}},
    "multi_krum": {"multi_krum": {"attackers": ATTACKERS}},
    "geometric_median": "geometric_median",
    "centred_clip": "centred_clip",
    "norm_bound": "norm_bound",
    MEAN_OF_11: "mean",
    "bulyan": {"bulyan": {"attackers": ATTACKERS}},
    BOUNDED: "mean",
}
TOLD = (
    "Differences are of perplexity on the clients' test examples, which is what a right answer's tokens lose in probability:"
    " near the end of learning losses are close to 0, where their own ratio says nothing. They are taken seed by seed (same"
    " data, same draws); in brackets the 95 % interval of the mean by Student's t, which of three seeds is wide. Bold is a"
    " mean of more than 5 %. `absent` is the mean of the honest clients alone, six of eight or nine of eleven. Not finite is a"
    " model that no training leads out of. Rejected is who counted by less than a tenth; the gauge attack sends an honest"
    " model, which no rule has to reject. What one round keeps of the honest clients' way, and why, is in"
    " [`robust_round.md`](robust_round.md)."
)
ALIE_Z = 1.5
MADE_UP = ("1e30", "noise", "ALIE")
"""Attacks that make no use of what the attacker would have learnt."""
ATTACKS = (NONE, ABSENT, "sign flip", "1e30", "noise", "labels", "gauge", "ALIE")


def recipe_of(rule: str, seed: int, rounds: int) -> Any:
    """Return the recipe of one federation."""
    num_clients = 11 if rule in ("bulyan", MEAN_OF_11) else 8
    return build_recipe(
        {
            "name": "robust",
            "algorithm": {"fedavg": {"combine": RULES[rule], "weighting": "uniform"}},
            "data": {
                "num_clients": num_clients,
                "num_examples": 200 * num_clients,
                "where": {"language": ["en"], "task": ["plural"]},
                "partition": "iid",
                "max_length": 96,
                "seed": seed,
            },
            "tune": {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear", "origin": "zero"}},
            "local": {
                "optimizer": "adamw",
                "lr": 8e-3,
                "steps": 16,
                "batch_size": 4,
                "schedule": "cosine",
                "min_lr": 8e-4,
            },
            "evaluation": {"generate": False},
            "run": {"seed": seed, "rounds": rounds},
        }
    )


@dataclass
class Attacked:
    """An engine some of whose clients send what an attack makes of their replies."""

    engine: Engine
    attack: str

    def population(self) -> Mapping[ClientId, Profile]:
        """Return everybody, the attackers too."""
        return self.engine.population()

    def run(self, tasks: Sequence[Task]) -> Iterator[Delivery]:
        """Yield deliveries, the attackers' changed."""
        if self.attack in (NONE, ABSENT, "labels"):
            yield from self.engine.run(tasks)
            return
        bad = sorted(task.client for task in tasks)[-ATTACKERS:]
        # What is made up needs no training.
        asked = [t for t in tasks if self.attack not in MADE_UP or t.client not in bad]
        done = dict(zip((t.client for t in asked), self.engine.run(asked), strict=True))
        honest = {
            client: delivery.answer
            for client, delivery in done.items()
            if client not in bad and isinstance(delivery.answer, Reply)
        }
        for task in tasks:
            delivery = done.get(task.client, next(d for c, d in done.items() if c not in bad))
            answer = replace(delivery.answer, client=task.client)
            # A broken model makes clients absent: there is nothing to copy.
            if task.client in bad and honest and isinstance(answer, Reply):
                deltas = [reply.upload["delta"] for reply in honest.values()]
                sent = self._sent(answer.upload["delta"], deltas, task)
                answer = replace(answer, upload={"delta": sent})
            yield replace(delivery, answer=answer)

    def _sent(self, delta: Params, honest: Sequence[Params], task: Task) -> Params:
        source, start = generator(task.seed, "attack"), task.download["params"]
        if self.attack == "sign flip":
            return {name: -10 * t for name, t in delta.items()}
        if self.attack == "1e30":
            return {name: torch.full_like(t, 1e30) for name, t in delta.items()}
        if self.attack == "noise":
            draws = {name: torch.randn(t.shape, generator=source) for name, t in delta.items()}
            return {name: 50 * t.std() * draws[name] for name, t in delta.items()}
        if self.attack == "ALIE":
            stacks = {name: torch.stack([d[name] for d in honest]) for name in delta}
            return {name: t.mean(0) - ALIE_Z * t.std(0) for name, t in stacks.items()}
        by = {name: 1e3 if "lora_A" in name else 1e-3 for name in delta}
        return {name: (start[name] + t) * by[name] - start[name] for name, t in delta.items()}


def poisoned(data: DataSettings, tokenizer: Tokenizer, objective: Objective) -> Federation:
    """Return the data with the attackers' training answers shifted by a token id."""

    def flipped(example: Example) -> Example:
        labels = torch.where(example.labels < 0, example.labels, (example.labels + 1) % 4096)
        return replace(example, labels=labels)

    federation = federate(data, tokenizer, objective)
    bad = sorted(federation.shards)[-ATTACKERS:]
    shards = {
        client: replace(shard, train=[flipped(e) for e in shard.train]) if client in bad else shard
        for client, shard in federation.shards.items()
    }
    return replace(federation, shards=shards)


def measured(run: Any, session: Session) -> Mapping[str, float]:
    """Return what the test examples of all clients say of the model."""
    found, _ = measure(
        run,
        session.recipe.algorithm,
        session.engine,
        kind="test",
        population=session.engine.population(),
        clients=session.judges,
    )
    return combine(found.values())


def play(rule: str, attack: str, seed: int, rounds: int) -> dict[str, Any]:
    """Return what came of one federation."""
    recipe = recipe_of(rule, seed, rounds)
    with tempfile.TemporaryDirectory() as folder:
        own = poisoned if attack == "labels" else None
        session = build(recipe, Path(folder), makers=Makers(federation=own))
        engine = Attacked(session.engine, attack)
        run = begin(recipe.algorithm, session.space.start(), seed)
        kept, spent, rejected = 0.0, 0.0, 0.0
        bad = sorted(session.learners)[-ATTACKERS:]
        there = {c: p for c, p in session.learners.items() if attack != ABSENT or c not in bad}
        for _ in range(rounds):
            began = time.process_time()
            run, told, _ = advance(
                run,
                recipe.algorithm,
                engine,
                population=there,
                sampler=recipe.cohort,
                max_update_norm=MAX_UPDATE_NORM if rule == BOUNDED else math.inf,
            )
            spent += time.process_time() - began
            kept += told["comm/round_kept"]
            rejected += statistics.fmean(told.get(f"server/influence/{c}", 1) < 0.1 for c in bad)
        after = measured(run, session)
    return {
        "rule": rule,
        "attack": attack,
        "seed": seed,
        "rounds": rounds,
        "after": after["loss"],
        "right": after["token_accuracy"],
        "kept": kept / rounds,
        "rejected": rejected / rounds,
        "seconds": spent / rounds,
    }


def page(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables in Markdown."""
    runs, attacks = gathered(lines), [attack for attack in ATTACKS if attack != ABSENT]
    rules = [rule for rule in RULES if any(played == rule for played, _ in runs)]
    seeds = ", ".join(str(seed) for seed in sorted({line["seed"] for line in lines}))
    own = differences(runs, rules, attacks, lambda rule: (rule, NONE))
    whole = differences(runs, rules, attacks, lambda rule: (_mean_beside(rule), ABSENT))
    return "\n\n".join(
        (
            f"## Test loss (share of right tokens), mean of seeds {seeds}",
            losses(runs, rules, ATTACKS),
            "## What an attack costs: perplexity beside the same rule's without attackers",
            own,
            "## What attack and rule cost: perplexity beside the mean of the honest clients alone",
            whole,
            "## What a rule costs without attackers, and whom it rejected",
            costs(runs, rules, attacks[1:]),
        )
    )


def _mean_beside(rule: str) -> str:
    """Return the mean of as many clients."""
    return MEAN_OF_11 if rule in ("bulyan", MEAN_OF_11) else MEAN


def _worthwhile(rule: str, attack: str) -> bool:
    """Return whether a run says something that another does not."""
    if rule == BOUNDED:
        return attack in ("1e30", "gauge")
    if attack == ABSENT:
        return RULES[rule] == "mean"
    return rule != MEAN_OF_11 or attack == NONE


def main() -> None:
    """Run what is missing, and write the table."""
    parser = parser_of(__doc__, "runs/robust-benchmark")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rules", help="some of them, with ; between them")
    parser.add_argument("--attacks", help="some of them, with ; between them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    share = share_of(arguments)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    rules = arguments.rules.split(";") if arguments.rules else list(RULES)
    attacks = arguments.attacks.split(";") if arguments.attacks else list(ATTACKS)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    wanted = [
        (seed, attack, rule)
        for seed in seeds
        for attack in attacks
        for rule in rules
        if _worthwhile(rule, attack)
    ]
    for seed, attack, rule in share.of(wanted):
        file = arguments.runs / f"{rule}-{attack}-{seed}-{arguments.rounds}.json"
        if not file.exists():
            line = play(rule, attack, seed, arguments.rounds)
            file.write_text(json.dumps(line))
            print(rule, attack, seed, f"{line['after']:.4f}", flush=True)
    if share.writes:
        files = sorted(arguments.runs.glob(f"*-{arguments.rounds}.json"))
        text = page([json.loads(file.read_text()) for file in files])
        print(text)
        write_page(
            "robust.md", "Bad clients against rules that combine uploads", f"{TOLD}\n\n{text}"
        )


if __name__ == "__main__":
    main()
