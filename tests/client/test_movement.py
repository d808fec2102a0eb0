from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from fedloom.client.movement import Watched
from fedloom.client.setup import Setup
from fedloom.core.protocols import Done, Fit, Job, Params, Trainer
from fedloom.objectives.sft import DEFAULT
from fedloom.rounds.loop import begin, draw, tasks
from fedloom.rounds.session import Makers, build
from fedloom.spaces.full import Full
from fedloom.spaces.lora_xs import LoRAXS
from fedloom.spaces.scaling_vectors import IA3, VeRA
from fedloom.spaces.virtual_tokens import Prefix, Prompt


@dataclass
class Edited:
    """Trains, and gives back something else."""

    trainer: Trainer
    edit: Callable[[Params, Params], Params]
    """(start, trained) -> what is given back."""
    width: int = 1

    def run(self, jobs: Sequence[Job]) -> Sequence[Done]:
        return [
            replace(done, params=self.edit(job.work.start, done.params))
            for job, done in zip(jobs, self.trainer.run(jobs), strict=True)
            if isinstance(job.work, Fit)
        ]


def gathers_nothing(start: Params, trained: Params) -> Params:
    """Give back what a client had before, as a gather of nothing does under ZeRO-3."""
    return start


@pytest.fixture
def watched(bench, federation) -> Callable[..., Any]:
    """Return a maker of a bench whose trainer is looked at, and gives back what `edit` makes of it."""

    def make(edit: Any = None, **settings: Any) -> Any:
        one = bench(batched="off", **settings)
        inner = one.trainer if edit is None else Edited(one.trainer, edit)
        one.trainer = Watched(
            inner, Setup(one.space, federation, one.trainer.setup.local, 10), DEFAULT
        )
        return one

    return make


KINDS = [
    {},
    {"dora": True},
    {"init": "pissa"},
    LoRAXS(rank=4),
    IA3(),
    VeRA(),
    Prompt(4),
    Prefix(4),
    Full(),
]


@pytest.mark.parametrize("tune", KINDS, ids=lambda tune: str(tune).partition("(")[0])
def test_a_trainer_that_gives_back_the_start_is_refused_and_one_that_trains_is_not(watched, tune):
    with pytest.raises(ValueError, match=r"local training left .* as before"):
        watched(gathers_nothing, tune=tune, steps=1).fit(["c0"])
    honest = watched(tune=tune, steps=1)
    (done,) = honest.fit(["c0"])
    honest.fit(["c1"], done.params)
    assert not honest.trainer._unmoved


def test_the_one_tensor_that_is_left_out_is_named(watched):
    name = "model.layers.1.mlp.up_proj.lora_B.weight"
    one = watched(lambda start, trained: {**trained, name: start[name]}, steps=2)
    with pytest.raises(ValueError, match=rf"left {name} as before"):
        one.fit(["c0"])


def test_what_waits_for_another_tensor_is_excused_until_that_has_moved(watched):
    def without_a(start: Params, trained: Params) -> Params:
        return {n: start[n] if "lora_A" in n else t for n, t in trained.items()}

    one = watched(without_a, steps=1)
    (done,) = one.fit(["c0"])  # B is zero, so A has no gradient
    with pytest.raises(ValueError, match=r"lora_A\.weight"):
        one.fit(["c0"], done.params)


def test_a_start_that_no_gradient_leads_away_from_is_refused(watched):
    one = watched(steps=3, tune={"origin": "zero"})
    nothing = {name: torch.zeros_like(t) for name, t in one.space.start().items()}
    stood = one.space.vector(one.space.absolute(nothing))
    both_zero = one.space.layout.split(-stood)
    with pytest.raises(ValueError, match=r"gradient of .*lora_A.* is exactly zero"):
        one.fit(["c0"], both_zero)


def test_a_rate_that_has_come_to_its_end_is_lawful(watched):
    one = watched(gathers_nothing, steps=2, schedule="linear")
    one.trainer.run([Job("c0", 11, 5, Fit(one.space.start()))])


@pytest.mark.parametrize("bound", [{"lr": 1e-30}, {"max_grad_norm": 1e-30}], ids=str)
def test_steps_below_rounding_are_lawful(watched, bound):
    one = watched(tune=Full(), steps=2, optimizer="sgd", **bound)
    (done,) = one.fit(["c0"])
    assert not any(t.any() for t in done.params.values())


def test_no_step_no_weight_and_no_open_entry_are_lawful(watched, federation):
    one = watched(gathers_nothing, steps=2)
    start = one.space.start()
    one.fit(["c0"], steps=0)
    shut = dict.fromkeys(start, torch.tensor(0.0))
    one.fit(["c0"], mask=shut)
    none = torch.zeros(len(federation.shards["c0"].train), dtype=torch.float64)
    one.fit(["c0"], example_weights=none)
    opened = {**shut, next(n for n in start if "lora_B" in n): torch.tensor(1.0)}
    with pytest.raises(ValueError, match=r"lora_B\.weight as before"):
        one.fit(["c0"], mask=opened)


def test_experts_that_no_token_came_to_are_lawful(watched, tiny_routed):
    one = watched(model=tiny_routed(dtype=torch.float64), tune=Full(), steps=1)
    one.fit(["c0"])
    assert one.trainer._unmoved


def test_what_is_learnt_after_a_look_is_what_is_learnt_without(watched, bench, distance):
    plain = bench(batched="off", steps=1).fit(["c0", "c1"])
    for mine, other in zip(watched(steps=1).fit(["c0", "c1"]), plain, strict=True):
        assert distance(mine.params, other.params) == 0


def test_a_round_of_a_backend_that_gathers_nothing_is_refused(small_recipe, tmp_path):
    makers = Makers(trainer=lambda parts: Edited(parts.default, gathers_nothing))
    session = build(small_recipe(), tmp_path, makers=makers)
    algorithm, population = session.recipe.algorithm, session.engine.population()
    run = begin(algorithm, session.space.start(), 0)
    round = draw(run, population, None)
    sent = tasks("train", round, algorithm.broadcast(run.state, round))
    with pytest.raises(ValueError, match=r"local training left .*lora_B.* as before"):
        list(session.engine.run(sent))
