"""A run with its baselines, from nothing or from where a killed process left it: at once, or round by round."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fedloom.baselines import baseline_of, check_baseline
from fedloom.client.fast.kernels import choose_kernels, slow_type
from fedloom.core.description import check, describe
from fedloom.core.files import file_name, folder_at, write_atomic
from fedloom.core.metrics import Metric
from fedloom.core.protocols import Split
from fedloom.core.together import groups_of
from fedloom.deploy.connect import connect
from fedloom.deploy.listening import Listening
from fedloom.models.build import Base, ModelSettings
from fedloom.objects import Objects, recipe_with, require_objects, to_yaml
from fedloom.reopen import as_begun, binding_of
from fedloom.report.page import write_report
from fedloom.result import Result
from fedloom.results.by_label import check_label
from fedloom.results.evaluate import Evaluation, evaluate
from fedloom.results.finish import finish, record_clusters, record_setup
from fedloom.results.memory import with_batch_size
from fedloom.rounds.binding import bind, changed_sites
from fedloom.rounds.emulation import AlignmentStage, stage_of, unmeasured
from fedloom.rounds.failure import failure_kept
from fedloom.rounds.inputs import note_text, write_note
from fedloom.rounds.lock import held, root_of
from fedloom.rounds.loop import Run, begin, draw
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.restore import Standing, standing
from fedloom.rounds.session import Session, build
from fedloom.rounds.training import Callback, FinishedRound, Training
from fedloom.tracking.run_log import logged
from fedloom.tracking.trackers import check_trackers, make_trackers


def run(
    recipe: str | Path | Recipe,
    folder: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    algorithm: Any = None,
    data: Any = None,
    model: Any = None,
    trainer: Any = None,
    metrics: Sequence[Metric] = (),
    callbacks: Sequence[Callback] = (),
    console: Console | None = None,
    anyway: bool = False,
    listening: Listening | None = None,
    bases: Callable[[ModelSettings], Base] | None = None,
) -> Result:
    """Run a recipe with its baselines, or go on with a run that is in the folder already.

    Every object takes the place of a section of the recipe. It is named in the run's recipe.yaml; the same call, with the
    same objects, goes on with a run that was ended, to the same bits.

    Args:
        recipe: A shipped recipe's name, a path that ends in .yaml, or a Recipe.
        folder: The run's folder, made if needed; runs/NAME, numbered if there is one already, if not given.
        overrides: Settings to change, such as "run.rounds=5".
        algorithm: An object with the protocol `Algorithm`, a frozen dataclass, registered or not.
        data: Client -> rows: a list of dicts, a `datasets.Dataset` or a file; or client -> {"train": rows, "validation":
            rows, "test": rows}; or a `Federation`. What the recipe says on reading and dealing out rows does not count.
        model: A pair (model, tokenizer), of which the run takes a copy, or a function without arguments that makes one
            each time the run or a baseline needs it.
        trainer: An object with the protocol `Trainer`, or a function that makes one of `TrainerParts`: `setup`
            (`setup.space.load(params)` puts a point into `setup.space.model`, `setup.examples(client)` are its rows,
            `setup.local` is the recipe's section), `tokenizer`, and `default`, the package's own trainer of the recipe.
            `hf_trainer` makes such a function of one that makes a Hugging Face or TRL trainer.
        metrics: Metrics of one's own, besides those that the recipe names.
        callbacks: Called after each round of the run, not of its baselines, with a `FinishedRound`: `number`, `metrics`,
            `failures`, and `stop()`.
        console: Where progress and notes go; nowhere if not given.
        anyway: Go on although the data, or beneath adapters the base model, is not what the run was begun with.
        listening: Where sites from elsewhere come in; where they did before if not given.
        bases: Loads the model that the recipe names, such as `models.shared.SharedBases` for many runs; as any run does
            if not given.

    Returns:
        What came of it, read from the folder.

    Raises:
        ValueError: where an object, the data, the model or a checkpoint does not fit the recipe.
    """
    objects = Objects(
        algorithm, data, model, trainer, tuple(metrics), tuple(callbacks), bases=bases
    )
    with _experiment(recipe, folder, overrides, objects, console, anyway, listening) as going:
        for finished in going.rounds():
            for callback in callbacks:
                callback(finished)
    return going.result


@contextmanager
def session(
    recipe: str | Path | Recipe,
    folder: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    algorithm: Any = None,
    data: Any = None,
    model: Any = None,
    trainer: Any = None,
    metrics: Sequence[Metric] = (),
    console: Console | None = None,
    anyway: bool = False,
    bases: Callable[[ModelSettings], Base] | None = None,
) -> Iterator["RoundLoop"]:
    """Give a recipe round by round, as in `for round in s.rounds(): ...`, to a with statement.

    The arguments are those of `run`, and so are folder, lock, checkpoints and resume. Where the block ends without an
    error after a round was begun, what is left is done: the models are delivered, baselines run, the report is written.
    """
    objects = Objects(algorithm, data, model, trainer, tuple(metrics), bases=bases)
    with _experiment(recipe, folder, overrides, objects, console, anyway, None) as going:
        yield going


class RoundLoop:
    """A run under way, one round at a time."""

    def __init__(self, session: Session, training: Training, result: Result) -> None:
        self.session = session
        """The recipe, built."""
        self.result = result
        """What comes of it; whole once the block is left."""
        self._training = training

    @property
    def run(self) -> Run[Any]:
        """Return the number of the last finished round, and the server's state after it."""
        return self._training.run

    @property
    def begun(self) -> bool:
        """Return whether rounds were asked for."""
        return self._training.begun

    def rounds(self, until: int | None = None) -> Iterator[FinishedRound]:
        """Yield each round once it is measured and on the disk; a loop that is left may be taken up again.

        Args:
            until: The round to end after, if that is before the recipe's last; where it is done, none is made.
        """
        for finished in self._training.rounds(until):
            record_clusters(self.session, self.run)
            yield finished

    def evaluate(self, split: Split = "test") -> Evaluation:
        """Measure what every client would use now on its held-out data."""
        return evaluate(self.session, self.run, split)


@contextmanager
def _experiment(
    recipe: str | Path | Recipe,
    folder: str | Path | None,
    overrides: Sequence[str],
    objects: Objects,
    console: Console | None,
    anyway: bool,
    listening: Listening | None,
) -> Iterator[RoundLoop]:
    """Yield the run of a recipe; where its rounds were begun, finish it, run its baselines and write the report."""
    console = console or Console(quiet=True)
    asked = recipe_with(recipe, overrides, objects)
    home = new_folder(asked.name, None) if folder is None else Path(folder)
    require_objects(asked, objects, home)
    asked = _with_batch_size(asked, home, objects, console)
    asked = _with_baselines_checked(asked, console)
    listening = listening or Listening.read(home)
    with held(home):
        with _one(asked, home, objects, console, anyway=anyway, listening=listening) as going:
            yield going
        if not going.begun:
            return
        summary = going.result.summary
        for kind in asked.run.baselines:
            console.print(
                Text.assemble("baseline ", (kind, "bold"), ": same data, seed and evaluation")
            )
            made, below = baseline_of(asked, kind, summary=summary), home / "baselines" / kind
            with _one(made, below, objects, console, anyway=anyway, listening=listening) as other:
                for _ in other.rounds():
                    pass
        write_report(home)


def _with_batch_size(recipe: Recipe, home: Path, objects: Objects, console: Console) -> Recipe:
    """Return the recipe with the batch size that fits here, or that a run in the folder was begun with."""
    if recipe.local.batch_size != "auto":
        return recipe
    if (begun := as_begun(recipe, home)) is not recipe:
        return begun
    found = with_batch_size(recipe, makers=objects.makers())
    console.print(f"local.batch_size auto: {found.local.rows} examples at once fit here")
    return found


def _with_baselines_checked(recipe: Recipe, console: Console) -> Recipe:
    """Return the recipe with the baselines that can be made; one that cannot is refused now, not after the run."""
    if recipe.elsewhere and recipe.run.baselines:
        console.print("no baselines: the data is at the sites")
        return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, baselines=()))
    for kind in recipe.run.baselines:
        check_baseline(recipe, kind)
    return recipe


@contextmanager
def _one(
    recipe: Recipe,
    folder: Path,
    objects: Objects,
    console: Console,
    *,
    anyway: bool,
    listening: Listening | None,
) -> Iterator[RoundLoop]:
    """Yield one run, the recipe's or a baseline's, with its engine; deliver its models where rounds were begun."""
    began = time.perf_counter()
    check_trackers(recipe.run.trackers)
    text = to_yaml(recipe)
    built = build(recipe, folder, makers=objects.makers(), device=recipe.worker.device_of_whole)
    # Nothing is started or written before the recipe is known to fit its data and what the folder holds.
    if not recipe.elsewhere:
        _check_data(built)
    stage = stage_of(built)
    public, quiet = stage.sha256 if stage else None, describe(recipe.algorithm).quiet
    stands = standing(built, _bound(built), anyway=anyway, public=public)
    with ExitStack() as stack:
        log = stack.enter_context(logged(console, root_of(folder), quiet=quiet))
        connected = stack.enter_context(connect(built, console, listening=listening))
        if recipe.elsewhere:
            _check_data(connected)
        _set_up(connected, stands, stage, text, console)
        stack.enter_context(failure_kept(folder, quiet=quiet))
        trackers = make_trackers(folder, recipe.run.trackers, name=recipe.name)
        training = Training(
            connected, stands, trackers=trackers, console=console, stage=stage, log=log
        )
        yield RoundLoop(connected, training, Result(folder, objects))
        if training.begun:
            training.measure_end()
            summary = finish(connected, training.run, began=began)
            for tracker in trackers:
                tracker.finish(summary)


def _bound(session: Session) -> Mapping[str, Any]:
    # Width and kernels decide the order of sums; `auto` is a measurement that another day may turn out otherwise.
    kernels = choose_kernels(session.recipe.local, session.space.model)
    return {
        **binding_of(session.recipe),
        "trainer.width": session.trainer.width,
        "local.kernels": kernels,
    }


def _check_data(session: Session) -> None:
    check_label(session)
    check(session.recipe.algorithm, session.recipe, num_clients=len(session.learners))
    begun = begin(session.recipe.algorithm, session.space.start(), 0)
    round = draw(begun, session.learners, session.sampler)
    # What an algorithm asks of clients' profiles is missing before round 1, not after it.
    groups = groups_of(session.recipe.algorithm, begun.state, round)
    secure, sizes = session.recipe.secure, Counter(groups.values())
    for name in sorted(sizes):
        # Sites may join a cluster later.
        if secure and not session.recipe.elsewhere and sizes[name] < secure.threshold:
            raise ValueError(
                f"secure.threshold must be at most the clients of each cluster, whose sum nobody would be told otherwise, got"
                f" {secure.threshold}, and {name} has {sizes[name]}"
            )


def _set_up(
    session: Session,
    stands: Standing,
    stage: AlignmentStage | None,
    text: str,
    console: Console,
) -> None:
    """Say how the data was read, and write down what the run is made of."""
    folder = session.folder
    # A baseline has the same data and model, and so has what follows a search's first trial.
    if folder.parent.name not in ("baselines", "trials") or folder.name == "0000":
        _say_how_read(session, console)
    if why := unmeasured(session, stage):
        console.print(why, style="yellow", markup=False, highlight=False)
    if differences := (*stands.differences, *changed_sites(session)):
        note = write_note(folder, f"resume after round {stands.run.number}", differences)
        console.print(note_text(note), style="yellow", markup=False, highlight=False)
    bind(session, public=stage.sha256, source=stage.source) if stage else bind(session)
    record_setup(session)
    write_atomic(folder / "recipe.yaml", text.encode())


def _say_how_read(session: Session, console: Console) -> None:
    manifest = session.federation.manifest
    if manifest.losses.formats:
        console.print(f"rows read as {manifest.losses.read_as()}", markup=False, highlight=False)
    if manifest.prompt:
        console.print(f"prompt: {manifest.prompt}", markup=False, highlight=False)
    kernels = choose_kernels(session.recipe.local, session.space.model)
    slow = slow_type(kernels, session.space.model)
    for line in filter(None, (*manifest.left_out(), session.space.left_frozen, slow)):
        console.print(line, style="yellow", markup=False, highlight=False)


def new_folder(name: str, wanted: Path | None) -> Path:
    """Return the folder of a new run: `wanted`, or runs/NAME, numbered if a run is there already.

    Raises:
        ValueError: where `wanted` holds a run, or is no place for a folder.
    """
    if wanted is not None:
        if (wanted / "recipe.yaml").exists():
            raise ValueError(
                f"{wanted} holds a run already; `fedloom resume {wanted}` goes on with it, --out takes another folder"
            )
        return folder_at(wanted, "--out")
    folder, number = folder_at(Path("runs"), "the folder of runs") / file_name(name), 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{name}-{number}")
    return folder
