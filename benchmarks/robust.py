"""What bad clients do to a federation, by the rule that combines its uploads; and what a rule costs where there are none.

    python benchmarks/robust.py [--rounds 6] [--seeds 0,1] [--rules A;B] [--attacks A;B] [--part 0/2] [--table]

Eight clients of polyglot, all in every round, of whom the last two attack in all rounds (Bulyan, which needs four times as
many and three, has eleven): sign flip sends its update times -10, 1e30 that number everywhere, noise normal numbers of fifty
times the standard deviation of honest ones, labels trains on answers shifted by a token id, ALIE (Baruch, Baruch, Goldberg,
NeurIPS 2019, arXiv:1902.06156) knows all honest updates and sends their mean less 1.5 standard deviations, gauge trains
honestly and sends A times 1000 and B divided by it, which is the same model. `run.max_update_norm` is off, but for the last
row, where it is the default and the rule the mean. A run's line is kept, so that a benchmark that was stopped goes on;
`--part i/n` takes every n-th run, `--table` only writes the table.
"""

import argparse
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
from fedloom.recipe import build_recipe
from fedloom.rounds.loop import advance, begin, measure
from fedloom.rounds.recipe_settings import MAX_UPDATE_NORM
from fedloom.rounds.session import Makers, Session, build
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
    "centred_clip": {"centred_clip": {"radius": 1.0}},
    "norm_bound": {"norm_bound": {"bound": 2.4}},
    MEAN_OF_11: "mean",
    "bulyan": {"bulyan": {"attackers": ATTACKERS}},
    BOUNDED: "mean",
}
TOLD = (
    "Test loss, mean over the seeds. In brackets, of the seed where it is most: without attackers the difference from the"
    " mean's, with attackers that from the same rule's without. Two attackers of eight clients, of eleven for bulyan; not"
    " finite is a model that no training leads out of. Rejected is who counted by less than a tenth; the gauge attack sends"
    " an honest model, which no rule has to reject. After more rounds the losses without attackers differ by up to a third"
    " from rule to rule, by the course of one seed: smaller differences than that say little. Median, trimmed mean and what"
    " is clipped lose to a sign flip all the same, as a quarter of the clients pulls every number one way."
)
ATTACKS = ("none", "sign flip", "1e30", "noise", "labels", "ALIE", "gauge")


def recipe_of(rule: str, seed: int, rounds: int) -> Any:
    """Return the recipe of one federation."""
    num_clients = 11 if rule in ("bulyan", MEAN_OF_11) else 8
    return build_recipe(
        {
            "name": "robust",
            "algorithm": {"fedavg": {"combine": RULES[rule], "weighting": "uniform"}},
            "data": {
                "num_clients": num_clients,
                "num_examples": 150 * num_clients,
                "partition": "iid",
                "max_length": 96,
                "seed": seed,
            },
            "tune": {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear", "origin": "zero"}},
            "local": {
                "optimizer": "adamw",
                "lr": 4e-3,
                "steps": 5,
                "batch_size": 4,
                "schedule": "cosine",
                "min_lr": 4e-4,
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
        done = list(self.engine.run(tasks))
        if self.attack in ("none", "labels"):
            yield from done
            return
        # A broken model makes honest clients absent; what is left is attacked.
        replies = {t.client: d.answer for t, d in zip(tasks, done, strict=True)}
        bad = sorted(replies)[-ATTACKERS:]
        honest = [
            reply.upload["delta"]
            for client, reply in replies.items()
            if isinstance(reply, Reply) and client not in bad
        ]
        for task, delivery in zip(tasks, done, strict=True):
            reply = delivery.answer
            if task.client in bad and honest and isinstance(reply, Reply):
                sent = self._sent(reply.upload["delta"], honest, task)
                yield replace(delivery, answer=replace(reply, upload={"delta": sent}))
            else:
                yield delivery

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
            return {name: t.mean(0) - 1.5 * t.std(0) for name, t in stacks.items()}
        by = {name: 1e3 if "lora_A" in name else 1e-3 for name in delta}
        return {name: (start[name] + t) * by[name] - start[name] for name, t in delta.items()}


def poisoned(data: DataSettings, tokenizer: Tokenizer) -> Federation:
    """Return the data with the attackers' training answers shifted by a token id."""

    def flipped(example: Example) -> Example:
        labels = torch.where(example.labels < 0, example.labels, (example.labels + 1) % 4096)
        return replace(example, labels=labels)

    federation = federate(data, tokenizer)
    bad = sorted(federation.shards)[-ATTACKERS:]
    shards = {
        client: replace(shard, train=[flipped(e) for e in shard.train]) if client in bad else shard
        for client, shard in federation.shards.items()
    }
    return replace(federation, shards=shards)


def loss_of(run: Any, session: Session) -> float:
    """Return the test loss over all clients' held-out examples."""
    found, _ = measure(
        run,
        session.recipe.algorithm,
        session.engine,
        kind="test",
        population=session.engine.population(),
        clients=session.judges,
    )
    return combine(found.values())["loss"]


def play(rule: str, attack: str, seed: int, rounds: int) -> dict[str, Any]:
    """Return what came of one federation."""
    recipe = recipe_of(rule, seed, rounds)
    with tempfile.TemporaryDirectory() as folder:
        own = poisoned if attack == "labels" else None
        session = build(recipe, Path(folder), makers=Makers(federation=own))
        engine = Attacked(session.engine, attack)
        run = begin(recipe.algorithm, session.space.start(), seed)
        before, kept, spent, rejected = loss_of(run, session), 0.0, 0.0, 0.0
        bad = sorted(session.learners)[-ATTACKERS:]
        for _ in range(rounds):
            began = time.process_time()
            run, told, _ = advance(
                run,
                recipe.algorithm,
                engine,
                population=session.learners,
                sampler=recipe.cohort,
                max_update_norm=MAX_UPDATE_NORM if rule == BOUNDED else math.inf,
            )
            spent += time.process_time() - began
            kept += told["comm/round_kept"]
            rejected += statistics.fmean(told.get(f"server/influence/{c}", 1) < 0.1 for c in bad)
        after = loss_of(run, session)
    return {
        "rule": rule,
        "attack": attack,
        "seed": seed,
        "rounds": rounds,
        "before": before,
        "after": after,
        "kept": kept / rounds,
        "rejected": rejected / rounds,
        "seconds": spent / rounds,
    }


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables in Markdown: losses beside the mean without attackers, then costs."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for line in lines:
        found.setdefault((line["rule"], line["attack"]), []).append(line)
    rows = [f"| rule | {' | '.join(ATTACKS)} |", f"|---|{'---:|' * len(ATTACKS)}"]
    for rule in _played(found):
        beside = [found.get((_beside(rule), "none"), [])] + [found.get((rule, "none"), [])] * len(
            ATTACKS[1:]
        )
        cells = [
            _cell(found.get((rule, attack), []), {line["seed"]: line["after"] for line in clean})
            for attack, clean in zip(ATTACKS, beside, strict=True)
        ]
        rows.append(f"| {rule} | {' | '.join(cells)} |")
    costs = ["| rule | CPU seconds a round | attackers rejected, by attack |", "|---|---:|---|"]
    for rule in _played(found):
        spent = [x["seconds"] for x in found.get((rule, "none"), [])]
        rejected = [
            f"{attack} {100 * statistics.fmean(x['rejected'] for x in found[rule, attack]):.0f} %"
            for attack in ATTACKS[1:]
            if (rule, attack) in found and RULES[rule] != "mean"
        ]
        costs.append(f"| {rule} | {statistics.median(spent):.2f} | {', '.join(rejected)} |")
    return "\n".join([*rows, "", *costs])


def _played(found: Mapping[tuple[str, str], object]) -> list[str]:
    return [rule for rule in RULES if (rule, "none") in found]


def _beside(rule: str) -> str:
    """Return the mean of as many clients."""
    return MEAN_OF_11 if rule == "bulyan" else rule if rule == MEAN_OF_11 else MEAN


def _cell(lines: Sequence[Mapping[str, Any]], clean: Mapping[int, float]) -> str:
    if not lines or not all(line["seed"] in clean for line in lines):
        return ""
    if any(not math.isfinite(line["after"]) for line in lines):
        return "not finite"
    ratios = [line["after"] / clean[line["seed"]] - 1 for line in lines]
    worst = max(ratios, key=abs)
    return f"{statistics.fmean(x['after'] for x in lines):.3f} ({100 * worst:+.1f} %)"


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rules", help="some of them, with ; between them")
    parser.add_argument("--attacks", help="some of them, with ; between them")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs/robust-benchmark"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    part, parts = map(int, arguments.part.split("/"))
    arguments.runs.mkdir(parents=True, exist_ok=True)
    rules = arguments.rules.split(";") if arguments.rules else list(RULES)
    attacks = arguments.attacks.split(";") if arguments.attacks else list(ATTACKS)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    wanted = [(seed, attack, rule) for seed in seeds for attack in attacks for rule in rules]
    for seed, attack, rule in [] if arguments.table else wanted[part::parts]:
        file = arguments.runs / f"{rule}-{attack}-{seed}-{arguments.rounds}.json"
        if not file.exists():
            line = play(rule, attack, seed, arguments.rounds)
            file.write_text(json.dumps(line))
            print(rule, attack, seed, f"{line['before']:.3f} -> {line['after']:.3f}", flush=True)
    if arguments.table or parts == 1:
        lines = [json.loads(file.read_text()) for file in sorted(arguments.runs.glob("*.json"))]
        text = "\n\n".join(
            f"## {rounds} rounds\n\n{table([line for line in lines if line['rounds'] == rounds])}"
            for rounds in sorted({line["rounds"] for line in lines})
        )
        print(text)
        write_page(
            "robust.md", "Bad clients against rules that combine uploads", f"{TOLD}\n\n{text}"
        )


if __name__ == "__main__":
    main()
