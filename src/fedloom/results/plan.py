"""What a recipe will cost, before it costs it: parameters, bytes, memory and time."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from rich.table import Table
from rich.text import Text

from fedloom.core.description import check, describe
from fedloom.core.protocols import ClientId, Fit, Job
from fedloom.core.randomness import derive
from fedloom.core.rehearsal import rehearse
from fedloom.models.build import model_bytes
from fedloom.rounds.loop import begin, draw, tasks
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Session, build
from fedloom.spaces.seed_space import SeedSpace
from fedloom.tracking.environment import peak_memory_bytes
from fedloom.tracking.metric_format import human_bytes
from fedloom.wire.format import encode_reply, encode_task

_PROBE_STEPS = 2


@dataclass(frozen=True)
class Plan:
    """A forecast; bytes come from a rehearsal on the real wire, time and memory from a short probe."""

    recipe: Recipe
    num_trainable: int
    num_total: int
    cohort: int
    download_bytes: int
    """Of one client in one round; round 1 is smaller."""
    upload_bytes: int
    """Of one client in one round."""
    train_seconds: float
    """Of all rounds, without evaluation."""
    peak_memory_bytes: int
    base: str
    """The base model, in words."""
    left_out: Sequence[str] = ()
    """What of the data is not learnt, in words."""
    left_frozen: str = ""
    """What stays frozen although it might have been expected to learn; empty where there is nothing."""
    rebuild: str = ""
    """What a rebuild of the weights from coefficients takes, in words; empty where tune is no seeds."""

    def table(self) -> Table:
        """Return the forecast as a table."""
        rounds = self.recipe.run.rounds
        total = rounds * self.cohort * (self.download_bytes + self.upload_bytes)
        table = Table(
            "forecast", "value", title=Text(f"plan of {self.recipe.name}"), title_justify="left"
        )
        table.add_row("base model", Text(self.base))
        share = 100 * self.num_trainable / self.num_total
        table.add_row(
            "trainable parameters", f"{self.num_trainable:,} ({share:.2f} % of {self.num_total:,})"
        )
        table.add_row("clients per round", f"{self.cohort}")
        table.add_row("download per client and round", human_bytes(self.download_bytes))
        table.add_row("upload per client and round", human_bytes(self.upload_bytes))
        table.add_row(f"all bytes of {rounds} rounds", human_bytes(total))
        table.add_row("peak memory", human_bytes(self.peak_memory_bytes))
        table.add_row("training time", f"{self.train_seconds:.0f} s, without evaluation")
        if self.rebuild:
            table.add_row("rebuild of the weights", Text(self.rebuild))
        if self.left_frozen:
            table.add_row("left frozen", Text(self.left_frozen, style="yellow"))
        for at, note in enumerate(self.left_out):
            table.add_row("" if at else "data", Text(note, style="yellow"))
        return table


def make_plan(recipe: Recipe) -> Plan:
    """Build the recipe, rehearse one client and probe a few steps.

    Raises:
        ValueError: where the model alone does not fit into the memory that is free.
    """
    needed, free = model_bytes(recipe.model), psutil.virtual_memory().available
    if needed > free and recipe.model.device in {"cpu", "auto"}:
        raise ValueError(
            f"model.name {recipe.model.name} needs {human_bytes(needed)} for its weights alone, and "
            f"{human_bytes(free)} are free; choose a smaller model, model.dtype bfloat16 or a larger machine"
        )
    with tempfile.TemporaryDirectory() as folder:
        session = build(recipe, Path(folder))
        check(recipe.algorithm, recipe, num_clients=len(session.learners))
        download, upload = _bytes(session)
        clients = _cohort(session)
        seconds = _probe(session, clients)
        peak = peak_memory_bytes()
    params = session.space.start()
    return Plan(
        recipe,
        num_trainable=sum(t.numel() for t in params.values()),
        num_total=sum(p.numel() for p in session.base.model.parameters()),
        cohort=len(clients),
        download_bytes=download,
        upload_bytes=upload,
        train_seconds=seconds * recipe.run.rounds,
        peak_memory_bytes=peak,
        base=session.base.described(),
        left_frozen=session.space.left_frozen,
        rebuild=session.space.rebuild_cost() if isinstance(session.space, SeedSpace) else "",
        left_out=session.federation.manifest.left_out(),
    )


def _cohort(session: Session) -> list[ClientId]:
    run = begin(session.recipe.algorithm, session.space.start(), session.recipe.run.seed)
    return list(draw(run, session.learners, session.recipe.cohort).cohort)


def _bytes(session: Session) -> tuple[int, int]:
    """Return the lengths of one client's messages once training moves: after a round that noise has played."""
    recipe = session.recipe
    algorithm, wire = recipe.algorithm, recipe.wire
    run = begin(algorithm, session.space.start(), recipe.run.seed)
    upload, least = 0, describe(algorithm).min_replies
    for _ in range(2):
        round = draw(run, session.learners, None)
        client, payload = next(iter(algorithm.broadcast(run.state, round).items()))
        others = [name for name in round.population if name != client]
        (task,) = tasks("train", round, {client: payload})
        reply = rehearse(algorithm, task, noise=1e-2)
        upload = len(encode_reply(reply, settings=wire))
        download = len(encode_task(task, settings=wire))
        # As many of one kind as a robust rule asks for.
        replies = [replace(reply, client=name) for name in (client, *others[: least - 1])]
        state, _ = algorithm.server_update(run.state, round, replies)
        run = replace(run, number=run.number + 1, state=state)
    return download, upload


def _probe(session: Session, clients: list[ClientId]) -> float:
    """Return the seconds of one round, from a few steps of one batch of clients, the first steps left out."""
    recipe, width = session.recipe, session.trainer.width
    start, some = session.space.start(), clients[:width]
    jobs = [Job(c, 1, derive(0, "probe", c), Fit(start, steps=_PROBE_STEPS)) for c in some]
    session.trainer.run(jobs)
    began = time.perf_counter()
    session.trainer.run(jobs)
    per_step = (time.perf_counter() - began) / (len(some) * _PROBE_STEPS)
    shards = session.federation.shards
    steps = sum(recipe.local.num_steps(len(shards[c].train), None) for c in clients)
    return per_step * steps
