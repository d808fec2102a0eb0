"""Are the languages found? The adjusted Rand index of clusters nobody gave a number to, beside rules that need one.

    python benchmarks/clusters.py [--clients 10,20,60] [--first-seed 100] [--seeds 20] [--part 0/2] [--table]
                                  [--data FOLDER]

Each client of polyglot speaks one language; `--data FOLDER` takes a folder with a file a language in its place (XQuAD's
eight, say). What clients are compared by, updates of ten local steps from the start, is trained once a seed and kept, so
that arrivals can be played again at no cost: with all clients in each round until they were probed as often as is the
default, with a fifth of them in each round, and with all and one probe only. The same rows are given to: KMeans of the
rows of the similarity matrix with the number of clusters that has the best silhouette, or that the gap statistic says
(Tibshirani, Walther, Hastie 2001); and FedMLLM's cut with the true number, which nobody tells ours. A seed's languages
are separable, whatever a rule makes of them, where every client's nearest by one update of ten steps speaks its own.

The clients of a federation of 60 are also grouped in parts that have no client in common, as federations of 10 and of
20 with the same start. The rule's constants were chosen on seeds below 100; that a cut must also be large was added after a
part of seed 101 had been cut once too often. `--part i/n` takes every n-th seed; `--table` only writes the table, of the
seeds there are.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.fedavg import FedAvg
from fedloom.clustering.groups import adjusted_rand, cosines, ward_cut
from fedloom.clustering.modes import Auto
from fedloom.clustering.rows import row_of
from fedloom.core.params import sub
from fedloom.core.protocols import ClientId, Fit, Job, Reply, Round
from fedloom.core.randomness import derive
from fedloom.recipe import build_recipe
from fedloom.rounds.session import build
from fedloom.server.samplers import Full, Sampler, Uniform
from shares import parser_of, share_of
from timing import write_page

SPOKEN = {10: 5, 20: 5, 60: 6}
"""How many of polyglot's languages so many clients speak, equally many each."""
LANGUAGES = ("en", "de", "es", "pt", "sv", "da")
OURS = ("all a round", "a fifth a round")
RIVALS = ("silhouette", "gap", "Ward, true k")
RULES = (*OURS, "all, one probe", *RIVALS)
REFERENCES = 10
Rows = Mapping[ClientId, Sequence[torch.Tensor]]
"""Of each client, a row a probe."""


def recipe_of(num_clients: int, seed: int, arguments: argparse.Namespace) -> Any:
    """Return the recipe of one federation."""
    by = "file" if arguments.data else "language"
    data: dict[str, Any] = {
        "num_clients": num_clients,
        "partition": {"shards": {"by": by, "per_client": 1}},
        "max_length": 96,
        "seed": seed,
    }
    if arguments.data:
        data |= {"source": arguments.data, "max_length": 320, "truncate": "prompt"}
    else:
        spoken = LANGUAGES[: SPOKEN.get(num_clients, len(LANGUAGES))]
        data |= {"num_examples": 120 * num_clients, "where": {"language": list(spoken)}}
    batch = 4 if arguments.data else 8
    return build_recipe(
        {
            "name": "clusters",
            "data": data,
            "tune": {"lora": {"rank": 16, "alpha": 32, "targets": "all-linear"}},
            "local": {"optimizer": "adamw", "lr": 4e-3, "steps": 10, "batch_size": batch},
            "evaluation": {"generate": False},
            "run": {"seed": seed},
        }
    )


def train(num_clients: int, seed: int, file: Path, arguments: argparse.Namespace) -> None:
    """Train every client's update from the start, and keep its row and its language."""
    recipe = recipe_of(num_clients, seed, arguments)
    mode, rows = Auto(), dict[ClientId, list[torch.Tensor]]()
    with tempfile.TemporaryDirectory() as folder:
        session = build(recipe, Path(folder))
        start, clients = session.space.start(), list(session.learners)
        for at in range(0, len(clients), session.trainer.width):
            some = clients[at : at + session.trainer.width]
            for turn in range(mode.probes):
                jobs = [Job(c, 1, derive(seed, "probe", turn, c), Fit(start)) for c in some]
                for client, done in zip(some, session.trainer.run(jobs), strict=True):
                    delta = sub(done.params, start)
                    row = row_of(start, delta, compare=mode.compare, size=mode.sketch)
                    rows.setdefault(client, []).append(row)
        by = "file" if arguments.data else "language"
        held = {c: session.federation.manifest.clients[c].labels[by] for c in clients}
    spoken = {
        client: max(counts, key=lambda value: counts[value]) for client, counts in held.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    torch.save({"rows": rows, "spoken": spoken}, partial)
    partial.rename(file)


def arrive(rows: Rows, sampler: Sampler, seed: int, probes: int) -> dict[ClientId, int | None]:
    """Return the clusters once every client was probed; clients answer with their kept rows."""
    algorithm = Clustered(FedAvg(), Auto(every=0, probes=probes))
    state = algorithm.init({"w": torch.zeros(1)}, seed)
    population: dict[ClientId, dict[str, str]] = {client: {} for client in sorted(rows)}
    number = 0
    while sum(state.grouping.row_counts.values()) < probes * len(rows):
        number += 1
        drawn = derive(seed, "round", number)
        cohort = tuple(sampler.draw(population, drawn))
        round = Round(number, drawn, population, cohort, sampler.rate(len(population)))
        sent = algorithm.broadcast(state, round)
        asked = set(algorithm.mode.due(state, round))
        replies = []
        for client in sent:
            upload: dict[str, dict[str, torch.Tensor]] = {"delta": {"w": torch.zeros(1)}}
            if client in asked:
                turn = state.grouping.row_counts.get(client, 0)
                upload["probe"] = {"row": rows[client][turn]}
            replies.append(Reply(client, upload))
        state, _ = algorithm.server_update(state, round, iter(replies))
    return {client: state.grouping.assignment.get(client) for client in population}


def kmeans(points: np.ndarray[Any, Any], k: int) -> Any:
    """Return a fitted KMeans, the same every time."""
    return KMeans(k, n_init=10, random_state=0).fit(points)


def by_silhouette(points: np.ndarray[Any, Any]) -> list[int]:
    """Return the KMeans labels with the best mean silhouette."""
    tried = [kmeans(points, k).labels_ for k in range(2, _most(points) + 1)]
    best = max(tried, key=lambda labels: silhouette_score(points, labels))
    return [int(label) for label in best]


def by_gap(points: np.ndarray[Any, Any], seed: int) -> list[int]:
    """Return the KMeans labels of the first k whose gap is not below the next one less its error."""
    source = np.random.default_rng(seed)
    boxes = [source.uniform(points.min(0), points.max(0), points.shape) for _ in range(REFERENCES)]
    gaps, errors = [], []
    for k in range(1, _most(points) + 2):
        logs = [np.log(kmeans(box, k).inertia_ + 1e-12) for box in boxes]
        gaps.append(np.mean(logs) - np.log(kmeans(points, k).inertia_ + 1e-12))
        errors.append(np.std(logs) * (1 + 1 / REFERENCES) ** 0.5)
    found = [k for k in range(1, len(gaps)) if gaps[k - 1] >= gaps[k] - errors[k]]
    return [int(label) for label in kmeans(points, found[0] if found else len(gaps)).labels_]


def _most(points: np.ndarray[Any, Any]) -> int:
    return min(len(points) - 2, 24)


def separable(rows: Sequence[torch.Tensor], truth: Sequence[str]) -> bool:
    """Return whether each row's nearest other is of its own language."""
    nearest = cosines(torch.stack(list(rows))).fill_diagonal_(-2).argmax(1).tolist()
    return all(truth[other] == own for other, own in zip(nearest, truth, strict=True))


def parts_of(spoken: Mapping[ClientId, str], num_clients: int) -> list[list[ClientId]]:
    """Return federations of so many clients, none in two of them, with equally many of each of their languages."""
    languages = LANGUAGES[: SPOKEN[num_clients]]
    each = num_clients // len(languages)
    groups = [sorted(c for c, one in spoken.items() if one == language) for language in languages]
    starts = range(0, min(map(len, groups)) - each + 1, each)
    return [[c for group in groups for c in group[at : at + each]] for at in starts]


def scores(kept: Mapping[str, Any], clients: Sequence[ClientId], seed: int) -> dict[str, float]:
    """Return the adjusted Rand index of every rule, and 1 as `separable` where the languages are."""
    truth = [kept["spoken"][c] for c in clients]
    rows, probes = {c: kept["rows"][c] for c in clients}, Auto().probes
    units = [sum(row / row.norm() for row in rows[c][:probes]) for c in clients]
    similarity = cosines(torch.stack(units))
    points = similarity.double().numpy()
    fifth = Uniform(max(1, len(clients) // 5))
    found = [
        arrive(rows, sampler, seed, count)
        for sampler, count in (
            (Full(), probes),
            (fifth, probes),
            (Full(), 1),
        )
    ]
    labels: dict[str, Sequence[object]] = {
        **{rule: [one[c] for c in clients] for rule, one in zip(RULES[:3], found, strict=True)},
        "silhouette": by_silhouette(points),
        "gap": by_gap(points, seed),
        "Ward, true k": ward_cut(similarity, len(set(truth))),
    }
    found_of = {rule: adjusted_rand(truth, given) for rule, given in labels.items()}
    return {"separable": float(separable([rows[c][0] for c in clients], truth)), **found_of}


def scored(files: Mapping[int, Mapping[int, Path]]) -> dict[str, dict[str, Mapping[str, float]]]:
    """Return the scores of the federations there are, by kind and name."""
    found: dict[str, dict[str, Mapping[str, float]]] = {}
    for count, each in files.items():
        for seed, file in each.items():
            if not file.exists():
                continue
            kept = torch.load(file, weights_only=True)
            whole = scores(kept, sorted(kept["rows"]), seed)
            found.setdefault(str(count), {})[f"seed {seed}"] = whole
            for size in [n for n in SPOKEN if n < count == max(SPOKEN)]:
                for at, clients in enumerate(parts_of(kept["spoken"], size)):
                    results = found.setdefault(f"{size}, parts of {count}", {})
                    results[f"part {at} of seed {seed}"] = scores(kept, clients, seed)
    return dict(sorted(found.items(), key=lambda item: int(item[0].split(",")[0])))


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return the table in Markdown: how often the index is 1, and its mean; then the federations that are missed."""
    columns = (
        "clients",
        "federations",
        "separable",
        *RULES,
        *(f"{one}: never worse" for one in OURS),
    )
    lines, missed = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"], []
    for kind, federations in found.items():
        results = list(federations.values())
        cells = [kind, str(len(results))]
        cells.append(str(sum(result["separable"] == 1 for result in results)))
        for rule in RULES:
            values = [result[rule] for result in results]
            exact = sum(value == 1 for value in values)
            cells.append(f"{exact} of {len(values)}, {statistics.fmean(values):.3f}")
        for one in OURS:
            better = [result[one] >= max(result[rule] for rule in RIVALS) for result in results]
            cells.append(f"{sum(better)} of {len(better)}")
        lines.append(f"| {' | '.join(cells)} |")
        missed += [
            f"- {kind}: {name}{'' if result['separable'] else ', not separable'}: "
            + ", ".join(f"{rule} {result[rule]:.3f}" for rule in (*OURS, *RIVALS))
            for name, result in federations.items()
            if min(result[one] for one in OURS) < 1
        ]
    said = "Missed:" if missed else "None is missed."
    return "\n".join([*lines, "", said, *([""] if missed else []), *missed])


def main() -> None:
    """Train what is missing, and write the table."""
    parser = parser_of(__doc__, "runs/clusters-benchmark")
    parser.add_argument("--clients", default="10,20,60")
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--data", help="a folder with a file a language, in the place of polyglot")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = Path(arguments.data).stem if arguments.data else "polyglot"
    share = share_of(arguments)
    counts = [int(count) for count in arguments.clients.split(",")]
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    files = {
        count: {seed: arguments.runs / name / f"{count}-{seed}.pt" for seed in seeds}
        for count in counts
    }
    for seed in share.of(seeds):
        for count in counts:
            if not files[count][seed].exists():
                print(f"{count} clients, seed {seed}", flush=True)
                train(count, seed, files[count][seed], arguments)
    text = table(scored(files))
    print(text)
    if share.writes:
        asked = f"Of the seeds {seeds[0]} to {seeds[-1]}, those that were trained."
        write_page(
            "clusters.md" if name == "polyglot" else f"clusters_{name}.md",
            f"Clusters found: adjusted Rand index on {name}: exactly 1, and the mean",
            f"{asked}\n\n{text}",
        )


if __name__ == "__main__":
    main()
