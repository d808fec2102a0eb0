"""What membership inference and canaries find on the bundled model, with and without noise, and what noise promises.

    python benchmarks/audit_privacy.py

Each run is made anew in a temporary folder and audited by the attacks of `fedloom audit`; the promise of `private` is examined
by canaries alone, which trains nothing.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1"}

import torch
from rich.console import Console

from fedloom import experiment
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.private import Private
from fedloom.audit.canaries import Canaries
from fedloom.audit.conduct import Audit, audited
from fedloom.audit.findings import Finding
from fedloom.audit.mechanism import audit_mechanism
from fedloom.audit.membership import Membership
from fedloom.audit.records import open_case
from timing import write_page

SMALL = (
    "audit=record",
    "data.num_examples=1200",
    "data.num_clients=4",
    "data.fractions=[0.6, 0.2, 0.2]",
    "data.max_length=48",
    "tune.lora.rank=8",
    "local.steps=24",
    "evaluation={generate: false, every: 0, max_examples: 4}",
    "run={rounds: 2, samples: 0, baselines: []}",
)
NOISE = "algorithm=[{private: {clip: 1.0, noise_multiplier: %s, delta: 1.0e-3}}, fedavg]"
RUNS: Mapping[str, Sequence[str]] = {
    "fedavg": (),
    "private, noise 1 x the clip": (NOISE % 1.0, "cohort={poisson: {q: 1.0}}"),
}
EPSILONS = (None, 8.0, 4.0, 2.0, 1.0)
SHOWN = {
    "AUC of loss": "loss",
    "AUC of loss drop": "drop",
    "AUC of loss ratio": "ratio",
    "AUC of gradient cosine": "cosine",
    "true positives of loss ratio at 1 % false": "found at 1 % false",
}


def promises(seeds: int) -> list[str]:
    """Return a row for each epsilon: what is promised, and what canaries prove."""
    rows = []
    for epsilon in EPSILONS:
        budget = {"noise_multiplier": 0.0} if epsilon is None else {"epsilon": epsilon}
        found = [
            audit_mechanism(
                Private(FedAvg(), clip=1.0, delta=1e-5, noise_seed=seed, **budget),
                rate=1.0,
                rounds=1,
                seed=seed,
            )
            for seed in range(seeds)
        ]
        proved = [one.guesses.epsilon_low for one in found]
        cells = [
            "none: no noise" if epsilon is None else f"{found[0].epsilon:.2f}",
            f"{statistics.fmean(proved):.2f}",
            f"{min(proved):.2f}",
            f"{max(proved):.2f}",
            f"{sum(one.holds for one in found)} of {seeds}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def audited_run(overrides: Sequence[str]) -> Audit:
    """Return what both attacks find of a run."""
    console = Console(quiet=True)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "run"
        experiment.run("quickstart", home, overrides=[*SMALL, *overrides])
        case = open_case(home, console=console)
        return audited(case, {"membership": Membership(), "canary": Canaries()}, console=console)


def membership_rows(name: str, found: Audit) -> list[str]:
    """Return a row for each view of a run."""
    views: dict[str, dict[str, Finding]] = {}
    for one in found.findings:
        if one.attack == "membership" and one.seen != "rows alone":
            views.setdefault(one.seen, {})[one.measure] = one
    (blind,) = (one for one in found.findings if one.seen == "rows alone")
    return [
        f"| {' | '.join([name, seen, *(cell(by[measure]) for measure in SHOWN), cell(blind)])} |"
        for seen, by in views.items()
    ]


def canary_row(name: str, found: Audit) -> str:
    """Return the row of a run's canaries."""
    by = {one.measure: one for one in found.findings if one.attack == "canary"}
    promised = by["epsilon proved"].says.partition("; ")[2]
    cells = [
        name,
        f"{by['epsilon proved'].value:.2f}",
        promised,
        cell(by["AUC of canaries"]),
        f"{by['exposure, bits'].value:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def cell(finding: Finding) -> str:
    """Return a number with its interval."""
    assert finding.interval is not None
    low, high = finding.interval
    return f"{finding.value:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Print the tables and write them down."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=10)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    examined, audits = promises(seeds), {}
    for name, overrides in RUNS.items():
        began = time.process_time()
        audits[name] = audited_run(overrides), time.process_time() - began
        print(f"{name}: {audits[name][1]:.0f} CPU seconds", flush=True)
    spent = ", ".join(f"{name} {seconds:.0f}" for name, (_, seconds) in audits.items())
    text = [
        (
            "One noisy mean of 200 canary users along directions of their own, clip 1, delta 1e-5, everybody in the cohort;"
            f" {seeds} seeds. `proved` is the lower bound on epsilon with confidence 95 %.\n"
        ),
        "<!-- promises -->\n",
        "| epsilon promised | proved, mean | least | most | within the promise |",
        "|---|---|---|---|---|",
        *examined,
        "\n<!-- promises end -->",
        (
            "\nRecipe `quickstart` with 1,200 rows, 4 clients, LoRA of rank 8, 2 rounds of 24 steps with batches of 8, the last round"
            " looked at; 200 rows that were learnt from, 200 that nobody learns. Areas under the curve and the share of members found"
            " where 1 % of others may be named wrongly (by the loss ratio), with 95 % intervals; one half and 0.01 are chance.\n"
        ),
        "<!-- membership -->\n",
        f"| run | seen | {' | '.join(SHOWN.values())} | rows alone |",
        f"|---|---|{'---|' * len(SHOWN)}---|",
        *(line for name, (found, _) in audits.items() for line in membership_rows(name, found)),
        "\n<!-- members end -->",
        "\nThe same recipes trained anew with 40 canary clients, each in by a coin; exposure is in bits, of 10.\n",
        "<!-- canaries -->\n",
        "| run | epsilon proved | promised | AUC of canaries | exposure |",
        "|---|---|---|---|---|",
        *(canary_row(name, found) for name, (found, _) in audits.items()),
        "\n<!-- canaries end -->",
        f"\nCPU seconds on one thread, training of the run included: {spent}.",
    ]
    packages = ["torch", "dp-accounting"]
    write_page(
        "audit_privacy.md",
        "Who was learnt from, and what noise promises",
        "\n".join(text),
        packages=packages,
    )
    print("\n".join(text))


if __name__ == "__main__":
    main()
