"""The study that Optuna keeps of a search: which values are tried next, and what came of those that were.

Optuna: A Next-generation Hyperparameter Optimization Framework. Akiba, Sano, Yanase, Ohta, Koyama, KDD 2019 (arXiv:1907.10902).

A trial is written down at once with all its values, and drawn from a generator of its own, so that a search that is ended at any
moment goes on to the same trials. The file is Optuna's own: what reads its studies, such as optuna-dashboard, reads this one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedloom.benchmark.plan import as_override
from fedloom.core.randomness import derive
from fedloom.search.space import Choice, Range, Search

FILE = "search.db"
_NAME = "search"


class Study:
    """Optuna's study in a search's folder."""

    def __init__(self, optuna: Any, storage: Any, search: Search) -> None:
        self._optuna, self._storage, self._search = optuna, storage, search
        self._study = optuna.create_study(
            storage=storage, study_name=_NAME, direction="minimize", load_if_exists=True
        )

    @property
    def noted(self) -> Mapping[str, Any]:
        """Return what was written down beside the trials."""
        return dict(self._study.user_attrs)

    def note(self, name: str, value: Any) -> None:
        """Write something down beside the trials: plain values."""
        self._study.set_user_attr(name, value)

    def asked(self, number: int) -> Mapping[str, str]:
        """Return the settings of a trial, chosen now if it is the next; those before it are there."""
        trials = self._study.get_trials(deepcopy=False)
        if number == len(trials):
            self._study.add_trial(self._chosen(trials, number))
            trials = self._study.get_trials(deepcopy=False)
        settings: dict[str, str] = trials[number].user_attrs["settings"]
        return settings

    def __len__(self) -> int:
        """Return how many trials were chosen."""
        return len(self._study.get_trials(deepcopy=False))

    def costs(self, number: int) -> Mapping[int, float]:
        """Return what a trial came to, by round; less is better."""
        return dict(self._study.get_trials(deepcopy=False)[number].intermediate_values)

    def report(self, number: int, round: int, cost: float) -> None:
        """Write down what a trial came to after a round."""
        self._of(number).report(cost, round)

    def end(self, number: int, reason: str = "", *, stopped: bool = False) -> None:
        """Write down that a trial is over: at its end, stopped before it, or failed for a reason."""
        trial = self._study.get_trials(deepcopy=False)[number]
        if trial.state.is_finished():
            return
        states = self._optuna.trial.TrialState
        if reason:
            self._of(number).set_user_attr("failed", reason)
            self._study.tell(number, state=states.FAIL)
        elif stopped:
            self._study.tell(number, state=states.PRUNED)
        else:
            self._study.tell(number, trial.intermediate_values[max(trial.intermediate_values)])

    def failure(self, number: int) -> str:
        """Return why a trial failed; empty where it did not."""
        found: str = self._study.get_trials(deepcopy=False)[number].user_attrs.get("failed", "")
        return found

    def is_over(self, number: int) -> bool:
        """Return whether a trial goes no farther."""
        return bool(self._study.get_trials(deepcopy=False)[number].state.is_finished())

    def _of(self, number: int) -> Any:
        trial = self._study.get_trials(deepcopy=False)[number]
        return self._optuna.trial.Trial(self._study, trial._trial_id)

    def _chosen(self, past: Sequence[Any], number: int) -> Any:
        optuna, search = self._optuna, self._search
        distributions = {p: _distribution(optuna, v) for p, v in search.settings.items()}
        if search.sampler == "grid":
            settings = search.grid()[number]
            listed = {
                p: optuna.distributions.CategoricalDistribution(v.grid(p))
                for p, v in search.settings.items()
            }
            params, distributions = dict(settings), listed
        else:
            seed = derive(search.seed, "trial", number) % 2**32
            make = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
            beside = optuna.create_study(
                direction="minimize", sampler=make[search.sampler](seed=seed)
            )
            beside.add_trials(past)
            params = beside.ask(distributions).params
            settings = {p: _text(search.settings[p], value) for p, value in params.items()}
        return optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            params=params,
            distributions=distributions,
            user_attrs={"settings": settings},
        )


@contextmanager
def opened(folder: Path, search: Search) -> Iterator[Study]:
    """Yield the study in a search's folder, a new one where there is none.

    Raises:
        ValueError: where Optuna is not installed, or the file is not a study's.
    """
    optuna = _optuna()
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        try:
            # A folder's name may hold what an address takes for its own: ? and %.
            storage = optuna.storages.RDBStorage(f"sqlite:///{quote(str(folder / FILE))}")
            study = Study(optuna, storage, search)
        except Exception as error:
            raise ValueError(
                f"{folder / FILE} is no file of a search: put back the one this search wrote, or take another folder"
            ) from error
        try:
            yield study
        finally:
            storage.remove_session()
            storage.engine.dispose()
    finally:
        optuna.logging.set_verbosity(before)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ValueError("a search needs Optuna: pip install 'fedloom[hpo]'") from error
    return optuna


def _distribution(optuna: Any, values: Range | Choice) -> Any:
    made = optuna.distributions
    if isinstance(values, Choice):
        return made.CategoricalDistribution(values.values)
    if values.is_whole:
        return made.IntDistribution(values.low, values.high, log=values.log, step=values.step or 1)
    return made.FloatDistribution(values.low, values.high, log=values.log, step=values.step)


def _text(values: Range | Choice, value: Any) -> str:
    return str(value) if isinstance(values, Choice) else as_override(value)
