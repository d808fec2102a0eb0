import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedloom.client.perturbed_weights import Ground
from fedloom.client.setup import batches
from fedloom.client.zeroth_order import ZerothOrder
from fedloom.core.params import add, scale, sub
from fedloom.core.protocols import ClientError, Evaluate, Fit, Job, Params, Proximal
from fedloom.core.randomness import derive
from fedloom.data.tokens import IGNORED, Example
from fedloom.objectives.batch import collate
from fedloom.spaces.seed_space import Seeds

NAME = "coefficients"


@pytest.fixture
def walker(bench, tiny_llama):
    """Return a maker of walks: `walker(distribution="rademacher", dtype=torch.float32, model=None, data=None, **local)`."""

    def make(distribution="rademacher", *, dtype=torch.float32, model=None, data=None, **local):
        model = tiny_llama(dtype=dtype) if model is None else model
        tune = Seeds(num_seeds=32, distribution=distribution)
        return bench(model=model, data=data, tune=tune, **{"optimizer": "sgd", "lr": 0.01, **local})

    return make


def exact(space, params):
    """Return the weights at params in float64, from the directions one by one; by name."""
    space.load(space.start())
    out = {n: t.double().clone() for n, t in space.seated.layout.split(space.values).items()}
    for name, weights in out.items():
        weights.mul_(1 + float(params.get("base", 0.0)))
        for k, c in enumerate(params[NAME].tolist()):
            weights.add_(space.directions.z(name, k).double(), alpha=c)
    return out


def vector(tensors):
    return torch.cat([t.double().flatten() for t in tensors.values()])


KINDS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("distribution", "dtype", "steps"),
    [
        *(
            (distribution, kind, 20)
            for distribution in ("gaussian", "popcount", "lowrank")
            for kind in KINDS
        ),
        *(("rademacher", kind, 50) for kind in KINDS),
        *(pytest.param("rademacher", kind, 1000, marks=pytest.mark.slow) for kind in KINDS),
    ],
)
def test_looks_leave_no_trace_in_the_weights(
    walker, federation_of, rows, distribution, dtype, steps
):
    """A thousand steps that move nothing leave the bits as they were, in any type."""
    data = federation_of([rows(0, 1), rows(1, 1, (4, 5))])
    one = walker(distribution, dtype=dtype, data=data, steps=steps, batch_size=1)
    start = one.space.start()
    start[NAME][3] = 0.01
    one.space.load(start)
    before = one.space.values.clone()
    (done,) = one.fit(["c1"], start, mask={NAME: torch.zeros(())})
    assert torch.equal(one.space.values, before)
    assert torch.equal(done.params[NAME], start[NAME])
    assert done.record["scalars"][NAME].tolist() == [0.0] * steps
    for (name, p), live in zip(
        one.space.tensors.items(),
        one.space.seated.layout.split(one.space.values).values(),
        strict=True,
    ):
        assert p.data_ptr() == live.data_ptr(), name
        assert "forward" not in vars(one.space.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rebuild_is_the_exact_sum_rounded_once(walker, dtype):
    """Within half an ulp of the exact value, where the usual loop loses most of a step."""
    # The same walk on every machine: an entry near zero may be further off by what float32 sums lose.
    one = walker("gaussian", dtype=dtype, steps=60, lr=1e-4, kernels="torch")
    (done,) = one.fit(["c1"])
    wanted = vector(exact(one.space, done.params))
    one.space.load(done.params)
    kind = torch.finfo(dtype)
    ulp = kind.eps * 2.0 ** torch.floor(torch.log2(wanted.abs().clamp(min=kind.tiny)))
    slack = 0 if dtype != torch.float32 else 2e-7
    assert bool(((one.space.values.double() - wanted).abs() <= 0.502 * ulp + slack).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_walk_applies_is_what_it_means(walker, monkeypatch, dtype):
    """After 200 steps the weights have gone where their coefficients say."""
    one = walker("gaussian", dtype=dtype, steps=200, lr=1e-5, batch_size=1)
    grounds = []

    class Watched(Ground):
        def __init__(self, *given):
            super().__init__(*given)
            grounds.append(self)

    monkeypatch.setattr("fedloom.client.zeroth_order.Ground", Watched)
    (done,) = one.fit(["c1"])
    walked = grounds[0]._flat.double().clone()
    meant = vector(exact(one.space, done.params))
    base = vector(exact(one.space, one.space.start()))
    for applied in (walked, one.space.wide(done.params).double()):
        assert torch.cosine_similarity(applied - base, meant - base, dim=0) >= 0.9999


@pytest.mark.parametrize("distribution", ["rademacher", "popcount", "gaussian", "lowrank"])
def test_the_server_rebuilds_the_weights_a_client_ended_with(walker, distribution):
    """From the walk and its scalars, bit for bit in integer distributions."""
    here, there = walker(distribution, steps=50), walker(distribution, steps=50)
    walk = torch.randint(32, (50,), generator=torch.Generator().manual_seed(1))
    start = here.space.start()
    start[NAME][:8] = torch.linspace(-1e-3, 1e-3, 8, dtype=torch.float64)
    (done,) = here.fit(["c1"], start, seed_sequence={NAME: walk})
    walked = here.space.values.clone()
    scalars = done.record["scalars"][NAME]
    assert torch.equal(scalars, scalars.float().double())
    moves = torch.zeros(32, dtype=torch.float64).index_add_(0, walk, -0.01 * scalars)
    assert torch.equal(done.params[NAME], start[NAME] + moves)
    there.space.load({NAME: start[NAME] + moves})
    here.space.load(done.params)
    assert torch.equal(here.space.values, there.space.values)
    gap = (walked - here.space.values).double().norm() / here.space.values.double().norm()
    assert gap <= 1e-6, "the weights it walked on were these but for the rounding of single steps"


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_mean_of_coefficients_is_the_mean_of_the_clients_weights(walker, decay):
    """Unequal clients, a schedule and weight decay."""
    local = {"weight_decay": decay, "schedule": "cosine", "min_lr": 1e-3, "steps": 4}
    one = walker("gaussian", **local)
    params = one.space.start()
    assert (one.space.layout.shapes.keys() == {NAME, "base"}) == bool(decay)
    for number in (1, 2, 3):
        jobs = [
            Job(c, number, derive(number, c), Fit(params)) for c in ("c0", "c1", "c2", "c3", "c4")
        ]
        done = one.trainer.run(jobs)
        weights = [d.num_examples / sum(e.num_examples for e in done) for d in done]
        mean: Params = {n: torch.zeros_like(t) for n, t in params.items()}
        narrow = torch.zeros_like(one.space.values)
        wide = torch.zeros(one.space.values.shape, dtype=torch.float64)
        for d, weight in zip(done, weights, strict=True):
            mean = add(mean, scale(d.params, weight))
            wide += weight * vector(exact(one.space, d.params))
            one.space.load(d.params)
            narrow += weight * one.space.values
        assert float((vector(exact(one.space, mean)) - wide).norm() / wide.norm()) <= 1e-12
        one.space.load(mean)
        assert float((one.space.values - narrow).norm() / narrow.norm()) <= 1e-5
        params = mean
    if decay:
        lrs = [one.trainer.setup.local.lr_at(r, 10) for r in (1, 2, 3)]
        left = math.prod((1 - lr * decay) ** 4 for lr in lrs)
        assert float(params["base"]) == pytest.approx(left - 1)


def test_steps_with_a_loss_that_is_not_finite_move_nothing(walker, federation_of, rows, tiny_llama):
    """No target, an infinite loss; the bits stay and the scalar is 0."""
    good = rows(1, 4)
    unasked = [Example(r.ids, torch.full_like(r.ids, IGNORED), 2) for r in rows(3, 2)]
    one = walker(data=federation_of([[*good, *unasked], unasked]), batch_size=1, steps=6)
    (done,) = one.fit(["c0"])
    scalars = done.record["scalars"][NAME]
    assert done.metrics["skipped_steps"] == 2
    assert int((scalars == 0).sum()) == 2
    assert done.lr_sum == pytest.approx(0.04)
    with pytest.raises(ClientError, match="c1: no step had a finite loss"):
        one.fit(["c1"])
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[int(good[0].ids[0])] = math.inf
    broken = walker(model=model, data=federation_of([good, good[:1]]), batch_size=1, steps=8)
    before = broken.space.values.clone()
    with pytest.raises(ClientError, match="no step had a finite loss"):
        broken.fit(["c1"], seed_sequence={NAME: torch.arange(8)})
    assert torch.equal(broken.space.values, before)


def test_a_walk_touches_no_global_generator_and_no_order_of_examples(walker, monkeypatch):
    orders: list[list[list[tuple[int, ...]]]] = []

    def watched(examples, size, seed):
        for step in batches(examples, size, seed):
            orders[-1].append([tuple(row.ids.tolist()) for row in step])
            yield step

    monkeypatch.setattr("fedloom.client.setup.batches", watched)
    one = walker(steps=5)
    states = (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state(legacy=False)["state"]["key"].tolist(),  # noqa: NPY002 the global one is meant
    )
    for walk in (None, torch.arange(5), torch.zeros(5, dtype=torch.int64)):
        orders.append([])
        one.fit(["c3"], seed_sequence=None if walk is None else {NAME: walk})
    assert orders[0] == orders[1] == orders[2]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == states[2]  # noqa: NPY002 - the global one is meant


def test_a_slope_is_the_derivative_along_its_direction(walker):
    # In float64, but a Llama's norms are float32 within: hence no smaller eps, no sharper bound.
    local = {"eps": 1e-5, "lr": 1e-12, "batch_size": 2, "dtype": torch.float64}
    one = walker("gaussian", **local)
    walk = torch.tensor([4, 4, 9])
    (done,) = one.fit(["c2"], seed_sequence={NAME: walk})
    (ahead,) = walker("gaussian", difference="forward", **local).fit(
        ["c2"], seed_sequence={NAME: walk}
    )
    space = one.space
    space.load(space.start())
    space.model.requires_grad_(True)
    space.model.model.embed_tokens.padding_idx = None  # autograd has no gradient for that row
    rows = one.trainer.setup.examples("c2")
    for scalar, other, k, step in zip(
        done.record["scalars"][NAME].tolist(),
        ahead.record["scalars"][NAME].tolist(),
        walk.tolist(),
        batches(rows, 2, derive(3, "c2")),
        strict=False,
    ):
        gradient = space.seated.gradient_vector()
        count = sum(row.num_targets for row in step)
        one.trainer.fast.losses(collate([step], [count], space.values, pack=False)).sum().backward()
        slope = float(space.directions.dot(gradient, [k]))
        assert scalar == pytest.approx(slope, rel=1e-2)
        assert other == pytest.approx(slope, rel=1e-1)


def test_directions_of_one_step_are_measured_at_the_same_weights(walker):
    """Steps measured at the start add up; so does one step of as many directions and their rate."""
    walk = {NAME: torch.tensor([1, 5, 5, 7])}
    whole = {"batch_size": 64, "lr": 0.01}
    (apart,) = walker(**whole).fit(["c2"], seed_sequence=walk, at_start=True)
    (joint,) = walker(**whole, directions=4).fit(["c2"], seed_sequence=walk)
    (along,) = walker(**whole).fit(["c2"], seed_sequence=walk)
    slopes = apart.record["scalars"][NAME]
    assert slopes[1] == slopes[2]
    assert along.record["scalars"][NAME][1] != along.record["scalars"][NAME][2]
    torch.testing.assert_close(joint.record["scalars"][NAME], slopes / 4, rtol=1e-6, atol=0)
    moves = torch.zeros(32, dtype=torch.float64).index_add_(0, walk[NAME], -0.01 * slopes)
    assert torch.equal(apart.params[NAME], moves)
    assert (joint.num_steps, apart.num_steps) == (1, 4)


def test_edits_act_on_the_coordinate_that_is_drawn(walker):
    walk = {NAME: torch.tensor([2])}
    whole = {"batch_size": 64}
    start = walker().space.start()
    start[NAME][2] = 0.02
    (plain,) = walker(**whole).fit(["c2"], start, seed_sequence=walk)
    g = float(plain.record["scalars"][NAME])
    center = {NAME: torch.full((32,), 0.5, dtype=torch.float64)}
    offset = {NAME: torch.arange(32.0)}
    mask = {NAME: torch.full((32,), 0.25)}
    for edit, wanted in (
        ({"proximal": Proximal(3.0, center)}, g + 3.0 * (0.02 - 0.5)),
        ({"gradient_offset": offset}, g + 2),
        ({"mask": mask}, g / 4),
        ({"gradient_offset": offset, "mask": mask}, (g + 2) / 4),
    ):
        (done,) = walker(**whole).fit(["c2"], start, seed_sequence=walk, **edit)
        assert float(done.record["scalars"][NAME]) == pytest.approx(wanted, rel=1e-6)
        assert float(done.params[NAME][2]) == pytest.approx(0.02 - 0.01 * wanted, rel=1e-6)
    (cut,) = walker(**whole, max_slope=0.125).fit(
        ["c2"], start, gradient_offset=offset, seed_sequence=walk
    )
    assert abs(float(cut.record["scalars"][NAME])) == 0.125


def test_without_a_walk_the_job_draws_one_and_other_jobs_others(walker):
    one = walker(steps=12)
    start = one.space.start()
    ends = [one.trainer.run([Job("c2", 1, seed, Fit(start))])[0].params[NAME] for seed in (1, 1, 2)]
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0] != 0, ends[2] != 0)
    assert one.trainer.run([Job("c2", 1, 1, Fit(start, steps=3))])[0].num_steps == 3


def test_rows_of_a_step_may_come_in_several_batches(walker):
    (whole,) = walker(steps=3, batch_size=4).fit(["c4"])
    (parts,) = walker(steps=3, batch_size=2, accumulation=2).fit(["c4"])
    # A loss in float32, over two eps, is exact to about its last digits over 1e-3.
    torch.testing.assert_close(
        parts.record["scalars"][NAME], whole.record["scalars"][NAME], rtol=0.01, atol=0.01
    )


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"seed_sequence": {NAME: torch.tensor([32])}}, r"below tune.seeds.num_seeds \(32\)"),
        ({"seed_sequence": {NAME: torch.tensor([-1])}}, r"below tune.seeds.num_seeds \(32\)"),
        (
            {"seed_sequence": {"other": torch.tensor([1])}},
            r"has coefficients only, got \['other'\]",
        ),
        (
            {"seed_sequence": {NAME: torch.tensor([1, 2])}, "steps": 3},
            "of 2 directions cannot take 3 steps",
        ),
    ],
)
def test_a_walk_that_cannot_be_walked_is_refused(walker, edits, message):
    with pytest.raises(ValueError, match=message):
        walker().fit(["c1"], **edits)


def test_a_walk_is_whole_steps_and_frozen_seeds_do_not_decay(walker):
    with pytest.raises(ValueError, match=r"local.directions must divide .* 3, got 2"):
        walker(directions=2).fit(["c1"], seed_sequence={NAME: torch.tensor([1, 2, 3])})
    one = walker(weight_decay=0.1)
    with pytest.raises(ValueError, match=r"local.weight_decay must be 0 where a mask freezes"):
        one.fit(["c1"], mask={NAME: torch.ones(()), "base": torch.ones(())})


def test_evaluation_is_that_of_every_trainer(walker, evaluator):
    one = walker()
    assert isinstance(one.trainer, ZerothOrder)
    start = one.space.start()
    works = [Evaluate(start), Evaluate(start), Evaluate(start, "test")]
    one.trainer.run([Job(f"c{i}", 1, i, work) for i, work in enumerate(works)])
    assert evaluator.asked == [(2, "validation"), (1, "test")]


def counting_up(model):
    """Return the model, taught by gradient descent to count up."""
    ids = (torch.arange(64)[:, None] + torch.arange(12)) % 64
    optimizer = torch.optim.Adam(model.requires_grad_(True).parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        optimizer.step()
    return model.requires_grad_(False)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "popcount", "lowrank"])
def test_walks_learn(walker, tiny_llama, distribution):
    """A model that counts up unlearns it in 80 steps at a client that counts down: the loss falls by a quarter at least."""
    one = walker(distribution, model=counting_up(tiny_llama()), lr=5e-4, steps=20, batch_size=4)
    params, losses = one.space.start(), []
    for number in (1, 2, 3, 4):
        (done,) = one.trainer.run([Job("c6", number, number, Fit(params))])
        params = add(params, sub(done.params, params))
        losses.append(done.metrics["loss"])
    assert losses[-1] < 0.75 * losses[0]


def test_half_precision_walks_as_float32_does(walker, tiny_llama):
    (high,) = walker(steps=4, eps=1e-2, batch_size=8).fit(["c3"])
    one = walker(steps=4, eps=1e-2, batch_size=8, dtype=torch.bfloat16)
    (low,) = one.fit(["c3"])
    assert low.metrics["loss"] == pytest.approx(high.metrics["loss"], rel=0.01)
    assert replace(low, params={}).num_steps == 4
    with pytest.raises(ValueError, match=r"local.precision .*: set model.dtype bfloat16 instead"):
        walker(precision="bfloat16")
