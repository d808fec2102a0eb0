"""What waiting for stragglers costs: synchronous rounds beside buffered ones, on the event clock of a simulation.

    python benchmarks/buffered.py [--rounds 6] [--seeds 0,1,2] [--part 0/2] [--table]

Twenty clients hold tasks of English polyglot in unequal shares (Dirichlet, alpha 1), one loss is that of their test
examples, and a fifth of them, drawn by the seed, is ten times as slow. All twenty train in every synchronous round; buffered,
all twenty train all the while, and the server steps on ten answers, so that two of its steps are the work of a round; "at 1.4" by 1.4 times their mean. Data,
split, slow clients and start are the same for all modes of a seed. `half` is synchronous with ten clients a round, drawn: as
many steps of the server on as many answers as buffered ones, so that what is left of a difference is the staleness. FedAsync is the same with one answer a step, whole
models mixed and the server's lr that its paper has.

A run's line is kept, so that a benchmark that was stopped goes on; `--part i/n` takes every n-th run, `--table` only
writes the table, of whatever there is.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch

from fedloom.core.description import MAX_UPDATE_NORM
from fedloom.core.protocols import ClientId
from fedloom.evaluation.measure import combine
from fedloom.recipe import build_recipe
from fedloom.rounds.buffered import BufferedRun, advance_buffered, buffered
from fedloom.rounds.loop import advance, begin, draw, measure
from fedloom.rounds.session import Session, build
from fedloom.server.buffering import Buffered
from intervals import interval
from shares import parser_of, share_of
from timing import write_page

CLIENTS, SIZE, SLOWER = 20, 10, 10
SYNCHRONOUS, HALF, FEDBUFF, FEDASYNC = "synchronous", "half", "FedBuff", "FedAsync"
FASTER = "FedBuff at 1.4"
MODES: Mapping[str, Any] = {
    SYNCHRONOUS: "synchronous",
    HALF: "synchronous",
    FEDBUFF: {"buffered": {"size": SIZE}},
    FASTER: {"buffered": {"size": SIZE}},
    FEDASYNC: {"buffered": {"size": 1, "mixes": "models"}},
}
LR = {FEDASYNC: 0.6, FASTER: 1.4}
"""The server's, where it is not 1: alpha of FedAsync, and what makes up for the weights of answers of an age of one (0.71)."""
TOLD = (
    "`Work` is the trainings of clients that were aggregated; `half` waits for ten of twenty clients, drawn for each round, and"
    " so steps as often as FedBuff does at the same work, on answers that are not old. Times are virtual seconds: a training of a fast client takes one"
    " in the mean, of a slow one ten, times a factor that is drawn (log-normal, spread 0.1). Differences and ratios are taken"
    " seed by seed; behind a mean stands half the 95 % interval by Student's t, which of three seeds is wide. Loss is of the test"
    " examples of all clients, or of the slow ones alone, whose data an asynchronous server hears less often."
)


def recipe_of(mode: str, seed: int, rounds: int) -> Any:
    """Return the recipe of one federation."""
    lr = LR.get(mode, 1.0)
    return build_recipe(
        {
            "name": "buffered",
            "algorithm": {"fedavg": {"weighting": "uniform", "server": {"sgd": {"lr": lr}}}},
            "data": {
                "num_clients": CLIENTS,
                "num_examples": 60 * CLIENTS,
                "where": {"language": ["en"]},
                "partition": {"dirichlet": {"by": "task", "alpha": 1.0}},
                "max_length": 96,
                "seed": seed,
                "tiers": {"fast": 0.8, "slow": 0.2},
            },
            "tune": {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}},
            "local": {"optimizer": "adamw", "lr": 4e-3, "steps": 6, "batch_size": 4},
            "cohort": {"uniform": {"size": SIZE}} if mode == HALF else "full",
            "clock": {"tiers": {"slow": SLOWER}, "spread": 0.1},
            "evaluation": {"generate": False, "validation": False},
            "run": {"seed": seed, "rounds": rounds, "mode": MODES[mode]},
        }
    )


def losses(run: Any, session: Session) -> tuple[float, float]:
    """Return the test loss of all clients, and of the slow ones."""
    population = session.engine.population()
    found, _ = measure(
        run,
        session.recipe.algorithm,
        session.engine,
        kind="test",
        population=population,
        clients=session.judges,
    )
    slow: dict[ClientId, Any] = {
        c: one for c, one in found.items() if population[c].get("tier") == "slow"
    }
    return combine(found.values())["loss"], combine(slow.values())["loss"]


def play(mode: str, seed: int, rounds: int) -> dict[str, Any]:
    """Return what came of one federation: time, work and losses after each synchronous round's work."""
    work = rounds * CLIENTS
    recipe = recipe_of(mode, seed, rounds)
    settings, began = recipe.run.mode, time.process_time()
    waits = SIZE if mode == HALF else CLIENTS
    per_step = settings.size if isinstance(settings, Buffered) else waits
    every = max(SIZE // per_step, 1)
    points, now, ages = [], 0.0, list[float]()
    with tempfile.TemporaryDirectory() as folder:
        session = build(recipe, Path(folder))
        run: Any = begin(recipe.algorithm, session.space.start(), seed)
        run = buffered(run) if isinstance(settings, Buffered) else run
        terms: Mapping[str, Any] = {
            "population": session.learners,
            "sampler": recipe.cohort,
            "max_update_norm": MAX_UPDATE_NORM,
        }
        points.append((0.0, 0, *losses(run, session)))
        for step in range(1, work // per_step + 1):
            clock = session.durations()
            if isinstance(run, BufferedRun):
                run, told, _ = advance_buffered(
                    run,
                    recipe.algorithm,
                    session.engine,
                    mode=settings,
                    durations=clock,
                    **terms,
                )
                now = run.seconds
                ages.append(told["server/staleness"])
            else:
                now += clock.of_cohort(draw(run, session.learners, recipe.cohort))
                run, told, _ = advance(run, recipe.algorithm, session.engine, **terms)
            if step % every == 0:
                points.append((now, step * per_step, *losses(run, session)))
    return {
        "mode": mode,
        "seed": seed,
        "rounds": rounds,
        "points": points,
        "staleness": statistics.fmean(ages) if ages else 0.0,
        "cpu": time.process_time() - began,
    }


def reached(points: Sequence[Sequence[float]], loss: float) -> float | None:
    """Return when a loss was first reached; None where it never was."""
    return next((point[0] for point in points if point[2] <= loss), None)


def page(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables in Markdown."""
    runs = {(line["mode"], line["seed"]): line for line in lines}
    modes = [mode for mode in MODES if any(mode == played for played, _ in runs)]
    others = [mode for mode in modes if mode != SYNCHRONOUS]
    seeds = sorted({line["seed"] for line in lines})

    def both(
        mode: str, other: str = SYNCHRONOUS
    ) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        return [
            (runs[mode, seed], runs[other, seed])
            for seed in seeds
            if (mode, seed) in runs and (other, seed) in runs
        ]

    def beside(mode: str, other: str, at: int) -> str:
        pairs = [(a["points"][-1], b["points"][-1]) for a, b in both(mode, other)]
        values = [100 * (own[at] / theirs[at] - 1) for own, theirs in pairs]
        return interval(values, 1) if values and mode != other else ""

    columns = (
        *("mode", "seeds", "work", "virtual seconds", "loss", "beside synchronous, %"),
        *("beside half, %", "slow clients, beside half, %", "staleness"),
    )
    end = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    for mode in modes:
        pairs = both(mode)
        last = [(own["points"][-1], other["points"][-1]) for own, other in pairs]
        cells = [
            str(len(last)),
            f"{last[0][0][1]:.0f}",
            interval([own[0] for own, _ in last], 1),
            interval([own[2] for own, _ in last]),
            beside(mode, SYNCHRONOUS, 2),
            beside(mode, HALF, 2),
            beside(mode, HALF, 3),
            f"{statistics.fmean(own['staleness'] for own, _ in pairs):.2f}",
        ]
        end.append(f"| {mode} | {' | '.join(cells)} |")
    rounds = len(runs[SYNCHRONOUS, seeds[0]]["points"]) - 1
    there = [
        f"| target: synchronous after round | synchronous | {' | '.join(f'{m} | ratio' for m in others)} |",
        f"|---:|---:|{'---:|---:|' * len(others)}",
    ]
    for number in range(1, rounds + 1):
        own = [runs[SYNCHRONOUS, seed]["points"][number] for seed in seeds]
        row = [f"{number} (loss {statistics.fmean(point[2] for point in own):.3f})"]
        row.append(interval([point[0] for point in own], 1))
        for mode in others:
            times = [
                (reached(line["points"], other["points"][number][2]), other["points"][number][0])
                for line, other in both(mode)
            ]
            found = [(mine, theirs) for mine, theirs in times if mine is not None]
            missed = len(times) - len(found)
            note = f" ({missed} of {len(times)} never)" if missed else ""
            if found:
                row.append(interval([mine for mine, _ in found], 1) + note)
                row.append(interval([mine / theirs for mine, theirs in found], 2))
            else:
                row += ["never", ""]
        there.append(f"| {' | '.join(row)} |")
    return "\n\n".join(
        (
            f"## At equal work, seeds {', '.join(map(str, seeds))}",
            "\n".join(end),
            "## Virtual seconds to a loss, and their ratio to synchronous",
            "\n".join(there),
        )
    )


def main() -> None:
    """Run what is missing, and write the table."""
    parser = parser_of(__doc__, "runs/buffered-benchmark")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--modes", default=f"{SYNCHRONOUS},{FEDBUFF},{HALF}", help="some of them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    share = share_of(arguments)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    for seed, mode in share.of([(s, m) for s in seeds for m in arguments.modes.split(",")]):
        file = arguments.runs / f"{mode}-{seed}-{arguments.rounds}.json"
        if not file.exists():
            line = play(mode, seed, arguments.rounds)
            file.write_text(json.dumps(line))
            print(mode, seed, *(f"{p[2]:.3f}" for p in line["points"]), f"{line['cpu']:.0f} s")
    if share.writes:
        files = sorted(arguments.runs.glob(f"*-{arguments.rounds}.json"))
        text = page([json.loads(file.read_text()) for file in files])
        print(text)
        write_page("buffered.md", "Stragglers: waiting for them, or not", f"{TOLD}\n\n{text}")


if __name__ == "__main__":
    main()
