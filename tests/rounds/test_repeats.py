"""A private run that dies at any point of a round, and goes on with the same replies or others."""

import dataclasses
import io
import json
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fedloom import experiment
from fedloom.algorithms.ditto import Ditto
from fedloom.core.files import read_hashed, write_hashed
from fedloom.core.protocols import ClientFailure, Delivery, Params, Task
from fedloom.engines.inprocess import InProcess
from fedloom.privacy.accountant import Ledger
from fedloom.rounds import training
from fedloom.rounds.checkpoint import Checkpoints
from fedloom.rounds.privacy import Releases
from fedloom.rounds.recipe_settings import Recipe
from fedloom.tracking.records import JsonLines

Make = Callable[..., Recipe]
Z, CLIP, DELTA = 1.0, 0.05, 0.1
CLIENTS = 4


class Killed(BaseException):
    """Ends the process as far as the code can tell."""


def private(make: Make, **fields: Any) -> Recipe:
    """Return two private rounds of everybody, measured after each, with as little of the rest as possible."""
    wrapper = {"clip": CLIP, "noise_multiplier": Z, "delta": DELTA, **fields}
    return make(
        algorithm=[{"private": wrapper}, "fedavg"],
        cohort={"poisson": {"q": 1.0}},
        tune={"lora": {"origin": "initial"}},
        data={"num_examples": 24, "max_length": 64, "partition": "iid"},
        local={"steps": 1, "batched": "off"},
        evaluation={"every": 1, "generate": False},
        run={"rounds": 2, "samples": 0, "keep_checkpoints": 3},
    )


class Watch:
    """Sees every model that is sent, and decides who answers and when the server dies."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sent: list[tuple[int, Params]] = []
        """How many rounds a model has behind it, and the model; each of them once."""
        self.absent: str | None = None
        self.die_after_deliveries: int | None = None
        answer = InProcess.run

        def run(engine: InProcess, tasks: Sequence[Task]) -> Iterator[Delivery]:
            assert self.absent in {None, *engine.clients}
            for task in tasks:
                self._see(task.round - 1, task.download["params"])
            for at, (task, delivery) in enumerate(
                zip(tasks, answer(engine, tasks), strict=True), start=1
            ):
                training = task.kind == "train" and task.round == 1
                if training and task.client == self.absent:
                    yield Delivery(ClientFailure(task.client, "its disk is full"))
                else:
                    yield delivery
                if training and at == self.die_after_deliveries:
                    raise Killed

        patch.setattr(InProcess, "run", run)

    def _see(self, rounds: int, model: Params) -> None:
        if not any(n == rounds and alike(m, model) for n, m in self.sent):
            self.sent.append((rounds, model))

    def models(self, rounds: int) -> list[Params]:
        return [model for number, model in self.sent if number == rounds]


def alike(a: Params, b: Params) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def flat(model: Params) -> torch.Tensor:
    return torch.cat([model[name].double().flatten() for name in sorted(model)])


def dies(patch: pytest.MonkeyPatch, owner: Any, name: str, *, call: int, after: bool) -> None:
    """Let the process die before or after the n-th call of a function."""
    original, calls = vars(owner)[name], iter(range(10**9))

    def dying(*args: Any, **kwargs: Any) -> Any:
        due = next(calls) == call
        if due and not after:
            raise Killed
        result = original(*args, **kwargs)
        if due:
            raise Killed
        return result

    patch.setattr(owner, name, dying)


POINTS: dict[str, Callable[[Watch, pytest.MonkeyPatch], None]] = {
    f"after delivery {n}": lambda watch, _, n=n: vars(watch).update(die_after_deliveries=n)
    for n in range(1, CLIENTS + 1)
} | {
    # Call 0 of save and measure is round 0's; measure is called for either split.
    "after the server's update": lambda _, p: dies(p, training, "advance", call=0, after=True),
    "before the save": lambda _, p: dies(p, Checkpoints, "save", call=1, after=False),
    "after the save": lambda _, p: dies(p, Checkpoints, "save", call=1, after=True),
    "after the release is on record": lambda _, p: dies(p, Releases, "record", call=1, after=True),
    "when half was measured": lambda _, p: dies(p, training, "measure", call=2, after=True),
    "when all was measured": lambda _, p: dies(p, training, "measure", call=3, after=True),
    "before the round's line": lambda _, p: dies(p, JsonLines, "log", call=1, after=False),
    "after the round's line": lambda _, p: dies(p, JsonLines, "log", call=1, after=True),
}


def told(folder: Path) -> list[dict[str, Any]]:
    """Return what metrics.jsonl says, less what takes time."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    own = ("time/", "memory/", "seconds")
    return [{k: v for k, v in line.items() if not k.startswith(own)} for line in lines]


def on_record(folder: Path) -> list[tuple[int, str, float, float]]:
    rows = read_hashed(folder / "checkpoints" / "releases").splitlines()
    return [tuple(json.loads(row)) for row in rows]


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    # A report takes longer than a run of these.
    monkeypatch.setattr("fedloom.experiment.write_report", lambda folder: None)
    return Watch(monkeypatch)


@pytest.fixture(scope="module")
def whole(small_recipe: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    experiment.run(private(small_recipe, noise_seed=1), folder)
    return folder


def killed(recipe: Recipe, folder: Path, point: str, watch: Watch) -> None:
    """Let a run die at a point of its first round."""
    with pytest.MonkeyPatch.context() as patch:
        POINTS[point](watch, patch)
        with pytest.raises(Killed):
            experiment.run(recipe, folder)
    watch.die_after_deliveries = None


@pytest.mark.parametrize("point", POINTS)
def test_with_the_same_replies_it_is_the_run_that_nothing_happened_to(
    point: str, small_recipe: Make, tmp_path: Path, whole: Path, watch: Watch
) -> None:
    recipe, folder = private(small_recipe, noise_seed=1), tmp_path / "killed"
    killed(recipe, folder, point, watch)
    again = experiment.run(recipe, folder).summary
    assert again["state_sha256"] == json.loads((whole / "summary.json").read_text())["state_sha256"]
    assert told(folder) == told(whole)
    assert [line["round"] for line in told(folder)] == [0, 1, 2]
    assert (folder / "clients.jsonl").read_text() == (whole / "clients.jsonl").read_text()
    assert on_record(folder) == on_record(whole)
    assert [len(watch.models(n)) for n in (0, 1, 2)] == [1, 1, 1]


@pytest.mark.parametrize("point", POINTS)
def test_with_other_replies_nobody_gets_a_second_model_of_a_round(
    point: str, small_recipe: Make, tmp_path: Path, watch: Watch
) -> None:
    recipe, folder = private(small_recipe), tmp_path / "killed"
    killed(recipe, folder, point, watch)
    watch.absent = "client-002"
    experiment.run(recipe, folder)
    assert [len(watch.models(n)) for n in (0, 1, 2)] == [1, 1, 1]
    assert [number for number, *_ in on_record(folder)] == [1, 2]
    assert [line["round"] for line in told(folder)] == [0, 1, 2]
    (spent,) = {line["server/epsilon"] for line in told(folder)[2:]}
    assert spent == Ledger(((1.0, Z, 2),)).epsilon(DELTA)


@pytest.mark.parametrize("absent", ["client-000", "client-002", None])
def test_a_lost_checkpoint_makes_a_second_model_with_its_own_noise_and_both_are_counted(
    absent: str | None, small_recipe: Make, tmp_path: Path, watch: Watch
) -> None:
    recipe, folder = private(small_recipe), tmp_path / "run"
    killed(recipe, folder, "when all was measured", watch)
    (folder / "checkpoints" / "round-000001.ckpt").unlink()
    watch.absent = absent
    experiment.run(recipe, folder)
    models, num_releases = watch.models(1), 2 if absent is None else 3
    assert len(on_record(folder)) == num_releases
    assert told(folder)[2]["server/epsilon"] == pytest.approx(
        Ledger(((1.0, Z, num_releases),)).epsilon(DELTA), rel=1e-3
    )
    if absent is None:
        assert len(models) == 1
        return
    # What is left of the noise is not below it: a client moves the difference by CLIP / CLIENTS at most.
    first, second = map(flat, models)
    (start,) = map(flat, watch.models(0))
    std = Z * CLIP / CLIENTS
    assert float((first - second).std()) == pytest.approx(2**0.5 * std, rel=0.1)
    alignment = torch.nn.functional.cosine_similarity(first - start, second - start, dim=0)
    assert abs(float(alignment)) < 5 / first.numel() ** 0.5


def test_a_release_later_than_the_checkpoint_stays_on_the_account(
    small_recipe: Make, tmp_path: Path, watch: Watch
) -> None:
    """Back to the start after both rounds: their models were seen, whatever becomes of the run."""
    recipe, folder = private(small_recipe), tmp_path / "run"
    experiment.run(recipe, folder)
    for number in (1, 2):
        (folder / "checkpoints" / f"round-{number:06d}.ckpt").unlink()
    watch.absent = "client-001"
    experiment.run(recipe, folder)
    assert [number for number, *_ in on_record(folder)] == [1, 1, 2, 2]
    spent = [line["server/epsilon"] for line in told(folder)[1:]]
    assert spent == pytest.approx([Ledger(((1.0, Z, n),)).epsilon(DELTA) for n in (3, 4)], rel=1e-3)


def test_a_budget_that_a_repeat_has_used_up_ends_the_run_with_the_model_so_far(
    small_recipe: Make, tmp_path: Path, watch: Watch
) -> None:
    recipe, folder = private(small_recipe, noise_multiplier=None, epsilon=2.0), tmp_path / "run"
    killed(recipe, folder, "when all was measured", watch)
    (folder / "checkpoints" / "round-000001.ckpt").unlink()
    watch.absent = "client-003"
    for _ in range(2):
        said = io.StringIO()
        summary = experiment.run(recipe, folder, console=Console(file=said, width=300)).summary
        assert "the run ends after round 1: private.epsilon 2.0 is spent after 2" in said.getvalue()
        assert (summary["rounds"], summary["stopped_early"]) == (1, True)
        assert 1 < summary["privacy"]["epsilon"] <= 2
        assert len(on_record(folder)) == 2
        assert watch.models(2) == []


@pytest.mark.parametrize("how", ["gone", "cut", "nonsense"])
def test_a_run_that_does_not_know_what_it_sent_does_not_go_on(
    how: str, small_recipe: Make, tmp_path: Path, watch: Watch
) -> None:
    recipe, folder = private(small_recipe), tmp_path / "run"
    experiment.run(recipe, folder)
    file = folder / "checkpoints" / "releases"
    match how:
        case "gone":
            file.unlink()
        case "cut":
            file.write_bytes(file.read_bytes()[:-5])
        case _:
            write_hashed(file, b'[1, "seal"]\n')
    with pytest.raises(
        ValueError, match=r"releases says which noisy means were sent, and cannot be"
    ):
        experiment.run(recipe, folder)


def test_what_holds_a_secret_is_its_owners_only(
    small_recipe: Make, tmp_path: Path, watch: Watch
) -> None:
    recipe = private(small_recipe)
    recipe = dataclasses.replace(recipe, algorithm=Ditto(recipe.algorithm))
    experiment.run(recipe, tmp_path)
    for name in ("checkpoints", "client_state"):
        modes = {p.is_dir(): stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / name).rglob("*")}
        assert modes[False] == 0o600, name
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700


def test_a_run_that_is_not_private_keeps_no_record(
    small_recipe: Make, tmp_path: Path, watch: Watch
) -> None:
    summary = experiment.run(small_recipe(run={"rounds": 1, "samples": 0}), tmp_path).summary
    assert not (tmp_path / "checkpoints" / "releases").exists()
    assert summary["privacy"] is None


def test_a_known_seed_is_no_privacy_wherever_a_run_speaks_of_it(
    small_recipe: Make, tmp_path: Path
) -> None:
    recipe, said = private(small_recipe, noise_seed=1), io.StringIO()
    result = experiment.run(recipe, tmp_path, console=Console(file=said, width=300))
    assert "private.noise_seed is set: a known seed gives the noise away" in said.getvalue()
    told = io.StringIO()
    Console(file=told, width=200).print(result.table())
    assert "none: noise_seed is set" in told.getvalue()
    assert result.summary["privacy"]["epsilon"] is None
    card = (tmp_path / "adapters" / "global" / "README.md").read_text()
    report = (tmp_path / "report.html").read_text()
    for page in (card, report):
        assert "None: private.noise_seed is set: a known seed gives the noise away" in page
    for text in (
        card,
        report,
        json.dumps(result.summary),
        (tmp_path / "metrics.jsonl").read_text(),
    ):
        assert "psilon is" not in text
        assert "server/epsilon" not in text
        assert "Epsilon spent" not in text


def test_what_epsilon_is_and_what_it_covers_is_said_everywhere(
    small_recipe: Make, tmp_path: Path
) -> None:
    result = experiment.run(private(small_recipe), tmp_path)
    told = io.StringIO()
    Console(file=told, width=200).print(result.table())
    spent = Ledger(((1.0, Z, 2),)).epsilon(DELTA)
    assert result.summary["privacy"]["epsilon"] == spent
    assert result.summary["privacy"]["delta"] == DELTA
    assert f"epsilon {spent:.3f} at delta 0.1" in told.getvalue()
    for page in ("adapters/global/README.md", "report.html"):
        text = (tmp_path / page).read_text()
        assert f"After round 2, epsilon is {spent:.3f} at delta 0.1." in text
        assert "counts, cohort sizes and samples are not covered" in text
