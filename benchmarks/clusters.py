"""Are the languages found? The adjusted Rand index of clusters nobody gave a number to, beside rules that need one.

    python benchmarks/clusters.py [--clients 10,20,60] [--seeds 20] [--part 0/2] [--table] [--data FOLDER]

Each client of polyglot speaks one language; `--data FOLDER` takes a folder with a file a language in its place (XQuAD's
eight, say). What clients are compared by, updates of ten local steps from the start, is trained once a seed and kept, so
that arrivals can be played again at no cost: with all clients in a round until they were probed as often as is the
default, with one probe only, and with a fifth of the clients in each round. The same rows are given to: KMeans of the rows of the similarity matrix with the number of clusters that has
the best silhouette, or that the gap statistic says (Tibshirani, Walther, Hastie 2001); and FedMLLM's cut with the
true number, which nobody tells ours. `--part i/n` takes every n-th seed; `--table` only writes the table.
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
from fedloom.core.params import sub
from fedloom.core.protocols import ClientId, Fit, Job, Reply, Round
from fedloom.core.seeds import derive
from fedloom.recipe import build_recipe
from fedloom.run.session import build
from fedloom.server.clustering import adjusted_rand, cosines, ward_cut
from fedloom.server.clustering_modes import Auto
from fedloom.server.clustering_rows import row_of
from fedloom.server.samplers import Full, Sampler, Uniform
from timing import about

HERE = Path(__file__).parent
SPOKEN = {10: 5, 20: 5, 60: 6}
"""How many of polyglot's languages so many clients speak, equally many each."""
LANGUAGES = ("en", "de", "es", "pt", "sv", "da")
RULES = ("ours", "one probe", "a fifth a round", "silhouette", "gap", "Ward, true k")
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
            "tune": {"rank": 16, "alpha": 32, "targets": "all-linear"},
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
    while sum(state.grouping.counts.values()) < probes * len(rows):
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
                turn = state.grouping.counts.get(client, 0)
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


def scores(file: Path, seed: int) -> dict[str, float]:
    """Return the adjusted Rand index of every rule."""
    kept = torch.load(file, weights_only=True)
    clients = sorted(kept["rows"])
    truth = [kept["spoken"][c] for c in clients]
    rows, probes = kept["rows"], Auto().probes
    units = [sum(row / row.norm() for row in rows[c][:probes]) for c in clients]
    similarity = cosines(torch.stack(units))
    points = similarity.double().numpy()
    fifth = Uniform(max(1, len(clients) // 5))
    found = [
        arrive(rows, sampler, seed, count)
        for sampler, count in ((Full(), probes), (Full(), 1), (fifth, probes))
    ]
    labels: dict[str, Sequence[object]] = {
        **{rule: [one[c] for c in clients] for rule, one in zip(RULES[:3], found, strict=True)},
        "silhouette": by_silhouette(points),
        "gap": by_gap(points, seed),
        "Ward, true k": ward_cut(similarity, len(set(truth))),
    }
    return {rule: adjusted_rand(truth, given) for rule, given in labels.items()}


def table(found: Mapping[int, Mapping[int, Mapping[str, float]]]) -> str:
    """Return the table in Markdown: how often the index is 1, and its mean."""
    lines = [f"| clients | seeds | {' | '.join(RULES)} |", f"|{'---|' * (2 + len(RULES))}"]
    for num_clients, seeds in found.items():
        cells = []
        for rule in RULES:
            values = [result[rule] for result in seeds.values()]
            exact = sum(value == 1 for value in values)
            cells.append(f"{exact} of {len(values)}, {statistics.fmean(values):.3f}")
        lines.append(f"| {num_clients} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", default="10,20,60")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--data", help="a folder with a file a language, in the place of polyglot")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs/clusters-benchmark"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = Path(arguments.data).stem if arguments.data else "polyglot"
    part, parts = map(int, arguments.part.split("/"))
    counts = [int(count) for count in arguments.clients.split(",")]
    files = {
        count: {
            seed: arguments.runs / name / f"{count}-{seed}.pt" for seed in range(arguments.seeds)
        }
        for count in counts
    }
    for seed in [] if arguments.table else range(part, arguments.seeds, parts):
        for count in counts:
            if not files[count][seed].exists():
                print(f"{count} clients, seed {seed}", flush=True)
                train(count, seed, files[count][seed], arguments)
    found = {
        count: {seed: scores(file, seed) for seed, file in seeds.items() if file.exists()}
        for count, seeds in files.items()
    }
    text = table({count: seeds for count, seeds in found.items() if seeds})
    print(text)
    if arguments.table:
        page = HERE / "results" / ("clusters.md" if name == "polyglot" else f"clusters_{name}.md")
        setting = f"adjusted Rand index on {name}: exactly 1, and the mean"
        page.write_text(
            f"# Clusters found: {setting}\n\n```text\n{about(['torch'])}\n```\n\n{text}\n"
        )


if __name__ == "__main__":
    main()
