"""What a recipe will cost, before it costs it: parameters, bytes, memory and time."""

import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.table import Table
from rich.text import Text

from fedloom.client.fast.kernels import choose_kernels, products_in_words, slow_type
from fedloom.core.description import check, describe
from fedloom.models.build import model_bytes
from fedloom.models.introspection import numberless
from fedloom.models.quantized import num_weights
from fedloom.results.forecast import forecast
from fedloom.results.memory import largest_term, open_to_probes, with_batch_size
from fedloom.rounds.emulation import stage_of
from fedloom.rounds.loop import begin
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Session
from fedloom.spaces.offsite import OffsiteSpace
from fedloom.spaces.rebuild_cost import cost_in_words
from fedloom.spaces.seed_space import SeedSpace
from fedloom.tracking.metric_format import duration, human_bytes


@dataclass(frozen=True)
class Plan:
    """A forecast; bytes come from rounds played on the real wire, time and memory from probes of two sizes."""

    recipe: Recipe
    num_trainable: int
    num_total: int
    cohort: int
    download_bytes: int
    """Of a client in the last round, the mean over tiers; round 1 is smaller."""
    upload_bytes: int
    """Of a client in the last round, the mean over tiers."""
    total_bytes: int
    """Of all clients in all rounds."""
    train_seconds: float
    """Of all rounds, without evaluation."""
    evaluate_seconds: float
    """Of all evaluations."""
    align_seconds: float
    """Of the server's stage between rounds; 0 where it has none."""
    peak_memory_bytes: int
    largest_term: str
    """What of that is the most, and what would lower it, in words."""
    base: str
    """The base model, in words."""
    left_out: Sequence[str] = ()
    """What of the data is not learnt, in words."""
    products: str = ""
    """How products with frozen weights are made, in words."""
    slow_type: str = ""
    """That this CPU is slow at the weights' type, in words; empty where it is not."""
    left_frozen: str = ""
    """What stays frozen although it might have been expected to learn; empty where there is nothing."""
    local: Mapping[str, int] = field(default_factory=dict)
    """Tensors that stay at their client, and how many numbers each has."""
    disclosed: str = ""
    """Which share of the model clients have, in words; empty where they have all of it."""
    rebuild: str = ""
    """What a rebuild of the weights from coefficients takes, in words; empty where tune is no seeds."""

    def table(self) -> Table:
        """Return the forecast as a table."""
        rounds = self.recipe.run.rounds
        table = Table(
            "forecast", "value", title=Text(f"plan of {self.recipe.name}"), title_justify="left"
        )
        table.add_row("base model", Text(self.base))
        table.add_row("tuned", Text(self.recipe.tune.title))
        if self.recipe.tune.virtual_tokens:
            longest = self.recipe.data.max_length
            held = f"{self.recipe.tune.virtual_tokens} before each row of up to {longest}"
            table.add_row("virtual tokens", f"{held}, which are neither answered nor counted")
        share = 100 * self.num_trainable / self.num_total
        table.add_row(
            "trainable parameters", f"{self.num_trainable:,} ({share:.2f} % of {self.num_total:,})"
        )
        if self.disclosed:
            table.add_row("clients have", Text(self.disclosed))
        if self.local:
            stays = f"{len(self.local):,} tensors, {sum(self.local.values()):,} numbers"
            table.add_row("stays with each client", stays)
            for group in _grouped(self.local):
                table.add_row("", Text(group))
        if self.products:
            table.add_row("frozen products", Text(self.products))
        if self.slow_type:
            table.add_row("", Text(self.slow_type, style="yellow"))
        if self.recipe.worker.num_processes > 1:
            whole = "split over" if self.recipe.worker.shards > 1 else "whole in each of"
            each = f"{whole} {self.recipe.worker.num_processes} processes; memory and time below are of one alone"
            table.add_row("the model of a client is", each)
        table.add_row("clients per round", f"{self.cohort}")
        table.add_row("examples at once", f"{self.recipe.local.rows}")
        table.add_row("download per client and round", human_bytes(self.download_bytes))
        table.add_row("upload per client and round", human_bytes(self.upload_bytes))
        table.add_row(f"all bytes of {rounds} rounds", human_bytes(self.total_bytes))
        table.add_row("peak memory", human_bytes(self.peak_memory_bytes))
        table.add_row("most of it", Text(self.largest_term))
        table.add_row("training time", duration(self.train_seconds))
        table.add_row("evaluation time", duration(self.evaluate_seconds))
        if self.align_seconds:
            table.add_row("alignment at the server", duration(self.align_seconds))
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
    recipe = with_batch_size(recipe)
    with tempfile.TemporaryDirectory() as folder:
        session, shards = open_to_probes(recipe, Path(folder))
        check(recipe.algorithm, recipe, num_clients=len(session.learners))
        taken = forecast(session, shards, stage_of(session))
        begun = begin(recipe.algorithm, session.space.start(), recipe.run.seed)
        local = describe(recipe.algorithm, begun.state).local
    params, model = session.space.start(), session.space.model
    # The last in which anybody is asked: a Poisson cohort may be empty.
    last = next((one for one in reversed(taken.rounds) if one.sent), taken.rounds[-1])
    asked = max(len(last.sent), 1)
    kernels = choose_kernels(recipe.local, model)
    return Plan(
        recipe,
        num_trainable=sum(t.numel() for t in params.values()),
        num_total=_num_total(session),
        cohort=taken.cohort,
        download_bytes=round(last.download_bytes / asked),
        upload_bytes=round(last.upload_bytes / asked),
        total_bytes=taken.total_bytes,
        train_seconds=taken.train_seconds + taken.message_seconds,
        evaluate_seconds=taken.evaluate_seconds,
        align_seconds=taken.align_seconds,
        peak_memory_bytes=taken.peak_memory_bytes,
        largest_term=largest_term(session, taken.activations, taken.held_by_round),
        base=session.base.described(),
        products=products_in_words(kernels, model),
        slow_type=slow_type(kernels, model),
        left_frozen=session.space.left_frozen,
        local=local,
        disclosed=_disclosed_in_words(session.space),
        rebuild=_rebuild_in_words(session.space),
        left_out=session.federation.manifest.left_out(),
    )


def _grouped(sizes: Mapping[str, int]) -> Sequence[str]:
    """Return the names, those that differ in numbers as one, with how many they are and how many numbers they hold."""
    groups: dict[str, list[str]] = {}
    for name in sizes:
        groups.setdefault(numberless(name), []).append(name)
    lines = []
    for names in groups.values():
        parts = zip(*(name.split(".") for name in names), strict=True)
        written = ".".join(
            p[0] if len({*p}) == 1 else f"[{_ranges({*map(int, p)})}]" for p in parts
        )
        held = sum(sizes[name] for name in names)
        lines.append(f"{written}: {len(names):,} x {held // len(names):,}")
    return lines


def _ranges(numbers: Collection[int]) -> str:
    """Return whole numbers as in 0-3, 7."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _num_total(session: Session) -> int:
    space = session.space
    whole = isinstance(space, OffsiteSpace) and space.is_whole_here
    with space.whole() if isinstance(space, OffsiteSpace) and whole else nullcontext():
        return num_weights(session.base.model)


def _disclosed_in_words(space: object) -> str:
    if not isinstance(space, OffsiteSpace) or space.disclosed is None:
        return ""
    cut = space.emulator.cut
    layers = f"layers {_ranges(cut.layers)} of {cut.num_layers}"
    return f"{100 * space.disclosed:.1f} % of the model: {layers}, embeddings and head"


def _rebuild_in_words(space: object) -> str:
    if not isinstance(space, SeedSpace):
        return ""
    kind, seconds = space.directions.distribution, space.rebuild_seconds()
    return cost_in_words(kind, space.num_seeds, seconds)
