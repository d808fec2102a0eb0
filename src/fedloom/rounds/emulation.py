"""The server's stage between rounds: the emulator that clients have is moved towards the layers it stands in for.

The emulator and what its optimizer remembers are in the state of algorithm `fedbiot`, so that a round's alignment is in its
checkpoint or done again, to the same bits. Rows of a step follow from the run's seed, the round and the step.

Where sites join, nobody has both a client's text and the whole model: there what was learnt is measured on the server's own
text, around the emulator and plugged in.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedloom.core.emulation import Aligns
from fedloom.core.metrics import PUBLIC
from fedloom.core.protocols import Metrics, Params
from fedloom.core.randomness import derive, generator
from fedloom.data.data_settings import DataSettings, Sample
from fedloom.data.federation import Federation, federate
from fedloom.data.partition import Iid
from fedloom.data.tokens import Example
from fedloom.rounds.inputs import located_text
from fedloom.rounds.loop import Run
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Session
from fedloom.spaces.emulation import gradient
from fedloom.spaces.offsite import OffsiteSpace


@dataclass(frozen=True)
class AlignmentStage:
    """What a server does between rounds of a run whose emulator it aligns."""

    session: Session
    examples: Sequence[Example]
    """Public rows."""
    sha256: str
    """Hash of what they say."""
    judged: Sequence[Example] = ()
    """The same as the objective reads them, where nobody else can measure the whole model."""
    unjudged: str = ""
    """Why there are none, where there might be."""

    @property
    def source(self) -> str:
        """Return where they are, as the recipe names it."""
        return str(self._algorithm.text["source"])

    def before(self, run: Run[Any]) -> Run[Any]:
        """Return a run that is not begun, with its emulator aligned before round 1."""
        return self._aligned(run, self._algorithm.before)[0]

    def after(self, run: Run[Any]) -> tuple[Run[Any], Metrics]:
        """Return a run after a round's alignment, and how far the emulator was on its last batch."""
        return self._aligned(run, self._algorithm.steps)

    def measured(self, run: Run[Any]) -> Metrics:
        """Return how good what a newcomer would use is on the rows that are judged, around the emulator and plugged in."""
        if not self.judged:
            return {}
        session = self.session
        session.space.load(session.newcomer(run))
        # Answers are not written: public text may have many rows.
        found = session.evaluator.measure(session.space.model, self.judged, split="validation")
        return {f"{PUBLIC}{name}": value for name, value in found.items()}

    @property
    def _algorithm(self) -> Aligns:
        algorithm = self.session.recipe.algorithm
        assert isinstance(algorithm, Aligns)
        return algorithm

    @property
    def batch_size(self) -> int:
        """Return how many public rows a step reads."""
        return self._algorithm.batch_size

    def batches(self, run: Run[Any], steps: int) -> Iterator[list[Example]]:
        """Yield the public rows of each step after a round."""
        seed = derive(run.seed, "align", run.number)
        for step in range(steps):
            order = torch.randperm(len(self.examples), generator=generator(seed, step))
            yield [self.examples[at] for at in order[: self.batch_size].tolist()]

    def all_batches(self) -> Iterator[list[Example]]:
        """Yield the public rows of each step of a whole run."""
        recipe, algorithm = self.session.recipe, self._algorithm
        for number in range(recipe.run.rounds + 1):
            steps = algorithm.steps if number else algorithm.before
            yield from self.batches(Run(number, recipe.run.seed, None), steps)

    def slope(self, rows: Sequence[Example]) -> tuple[Params, Metrics]:
        """Return a step's gradient from the start of a run, and how far the emulator is."""
        space = self.session.space
        assert isinstance(space, OffsiteSpace)
        return gradient(space, space.start(), rows, self._algorithm.distance)

    def _aligned(self, run: Run[Any], steps: int) -> tuple[Run[Any], Metrics]:
        algorithm, space, told = self._algorithm, self.session.space, dict[str, float]()
        assert isinstance(space, OffsiteSpace)
        adapters = space.split(self.session.newcomer(run))[0] if steps else {}
        for rows in self.batches(run, steps):
            params = {**adapters, **algorithm.factors(run.state)}
            slope, parts = gradient(space, params, rows, algorithm.distance)
            told = {f"server/align_{name}": value for name, value in parts.items()}
            run = replace(run, state=algorithm.moved(run.state, slope))
        return run, told


def stage_of(session: Session) -> AlignmentStage | None:
    """Return the stage of a run whose server aligns an emulator; None of any other.

    Raises:
        ValueError: where a client holds a row of the server's text, which would tell the server of it.
    """
    if not isinstance(session.recipe.algorithm, Aligns):
        return None
    return _public(session)


def unmeasured(session: Session, stage: AlignmentStage | None) -> str | None:
    """Return in a sentence why nobody measures the whole model; None where somebody does, or clients have all of it."""
    space = session.space
    if not session.recipe.elsewhere or not isinstance(space, OffsiteSpace) or not space.disclosed:
        return None
    if stage is None:
        why = "there is no text of the server's own, which algorithm fedbiot names as public"
    elif stage.unjudged:
        why = f"fedbiot.public holds nothing that the objective can be judged by ({stage.unjudged})"
    else:
        return None
    return f"the whole model is not measured: sites have the emulator alone, and {why}"


def public_data(recipe: Recipe, text: Mapping[str, Any]) -> DataSettings:
    """Return the server's own text as a section `data`: read and rendered as the clients' is."""
    return replace(
        recipe.data,
        **text,
        path=None,
        unseen=0.0,
        held_out={},
        held_out_sample=Sample(),
        sample=Sample(),
        shorter={},
        shorter_in="characters",
        partition=Iid(),
        num_clients=1,
        tiers={},
        labels=(),
        min_examples=1,
        pooled=False,
        packing=False,
        fractions=(1.0, 0.0, 0.0),
    )


def _public(session: Session) -> AlignmentStage:
    """Return the stage with the server's own rows, tokenised.

    Raises:
        ValueError: where a client holds one of them.
    """
    recipe = session.recipe
    assert isinstance(recipe.algorithm, Aligns)
    if recipe.data.packing:
        raise ValueError(
            "data.packing must be false for algorithm fedbiot: whether a client holds a public row cannot be told of rows"
            " that are joined"
        )
    text = dict(recipe.algorithm.text)
    text["source"] = located_text(text["source"], session.folder)
    try:
        settings = public_data(recipe, text)
        held = federate(settings, session.base.tokenizer)
    except ValueError as error:
        raise ValueError(f"fedbiot.public, read as a section data: {error}") from error
    examples = _rows(held)
    known = {_text(row) for row in examples}
    for client, shard in session.federation.shards.items():
        held_there = (*shard.train, *shard.validation, *shard.test)
        if any(_text(row) in known for each in held_there for row in each.answers):
            raise ValueError(
                f"fedbiot.public must be text that no client holds, got rows that {client} has too: name other rows, or"
                " leave them out of data with where"
            )
    stage = AlignmentStage(session, examples, held.manifest.sha256)
    if not recipe.elsewhere:
        return stage
    try:
        judged = _rows(federate(settings, session.base.tokenizer, recipe.objective))
    except ValueError as error:
        return replace(stage, unjudged=str(error))
    return replace(stage, judged=judged)


def _rows(held: Federation) -> list[Example]:
    return [row for shard in held.shards.values() for row in shard.train]


def _text(row: Example) -> bytes:
    return row.ids.numpy().tobytes()
