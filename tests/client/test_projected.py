import pytest
import torch

from fedloom.client.projected import Projected
from fedloom.core.protocols import Fit, Job, Proximal
from fedloom.spaces.full import Full
from fedloom.spaces.seed_space import Seeds

NAME = "coefficients"
FIRST = {"order": "first", "optimizer": "sgd", "max_grad_norm": None, "lr": 0.1, "steps": 3}


def make(bench, tiny_llama, num_seeds=24, distribution="rademacher", **local):
    tune = Seeds(num_seeds=num_seeds, distribution=distribution)
    return bench(model=tiny_llama(), tune=tune, **{**FIRST, **local})


def test_the_way_of_the_weights_is_projected_on_the_walk(bench, tiny_llama):
    """Ferret: c_k = <delta, z_k> / K, twice where a direction is drawn twice."""
    one = make(bench, tiny_llama)
    assert isinstance(one.trainer, Projected)
    full = bench(model=tiny_llama(), tune=Full(), **{**FIRST, "order": None})
    (wanted,) = full.fit(["c2"])
    delta = torch.cat([t.flatten() for t in wanted.params.values()])
    walk = torch.tensor([3, 5, 5, 11])
    (done,) = one.fit(["c2"], seed_sequence={NAME: walk})
    met = one.space.directions.dot(delta, walk.tolist()) / 4
    torch.testing.assert_close(-0.1 * done.record["scalars"][NAME], met, rtol=1e-4, atol=1e-7)
    moves = torch.zeros(24, dtype=torch.float64).index_add_(0, walk, met)
    torch.testing.assert_close(done.params[NAME], moves, rtol=1e-4, atol=1e-7)
    assert done.metrics["loss"] == pytest.approx(wanted.metrics["loss"], rel=1e-5)
    assert done.num_steps == 3


def test_without_a_walk_every_direction_counts_once(bench, tiny_llama):
    one, start = make(bench, tiny_llama, distribution="gaussian"), None
    (whole,) = one.fit(["c2"], start)
    (said,) = one.fit(["c2"], start, seed_sequence={NAME: torch.arange(24)})
    assert torch.equal(whole.params[NAME], said.params[NAME])
    assert whole.record["scalars"][NAME].shape == (24,)


def test_many_directions_bring_back_the_way_itself(bench, tiny_llama):
    """Unbiased: what is rebuilt lies along the way, the better the more directions there are."""
    full = bench(model=tiny_llama(), tune=Full(), **{**FIRST, "order": None})
    (wanted,) = full.fit(["c2"])
    delta = torch.cat([t.flatten() for t in wanted.params.values()]).double()
    shares = []
    for num_seeds in (64, 1024):
        one = make(bench, tiny_llama, num_seeds)
        (done,) = one.fit(["c2"])
        space = one.space
        space.load(space.start())
        base = space.values.double().clone()
        space.load(done.params)
        went = space.values.double() - base
        shares.append(float(went @ delta / delta.square().sum()))
        assert float(torch.cosine_similarity(went, delta, dim=0)) > 0
    assert shares[-1] == pytest.approx(1, abs=0.3)


def test_training_starts_where_it_is_told_and_leaves_no_gradient(bench, tiny_llama):
    one = make(bench, tiny_llama, lr=1e-6)
    start = one.space.start()
    start[NAME][2] = 0.05
    (here,) = one.fit(["c2"], start)
    (there,) = one.fit(["c2"])
    assert here.metrics["loss"] != there.metrics["loss"]
    assert float(here.params[NAME][2]) == pytest.approx(0.05, abs=1e-4)
    assert all(p.grad is None for p in one.space.model.parameters())


def test_edits_of_seeds_are_refused(bench, tiny_llama):
    one = make(bench, tiny_llama)
    start = one.space.start()
    for edit in ({"proximal": Proximal(1.0, start)}, {"mask": start}, {"at_start": True}):
        with pytest.raises(ValueError, match=r"local.order must be zeroth where tune is seeds"):
            one.trainer.run([Job("c1", 1, 0, Fit(start, **edit))])


def test_weights_that_cannot_learn_are_refused(bench, tiny_llama):
    tune = Seeds(num_seeds=8)
    with pytest.raises(ValueError, match=r"local.order first where tune is seeds .* float32"):
        bench(model=tiny_llama(dtype=torch.bfloat16), tune=tune, **FIRST)
    with pytest.raises(ValueError, match=r"local.group_tokens has no effect"):
        bench(model=tiny_llama(), tune=tune, **FIRST, group_tokens=64)


@pytest.mark.parametrize(
    ("local", "message"),
    [
        ({}, r"local.optimizer must be sgd where tune is seeds.* got adamw"),
        ({"optimizer": "sgd", "momentum": 0.5}, r"local.momentum has no effect"),
        ({"optimizer": "sgd", "max_grad_norm": 2.0}, r"local.max_grad_norm has no effect"),
        ({"optimizer": "sgd", "group_tokens": 9}, r"local.group_tokens has no effect"),
    ],
)
def test_settings_that_no_walk_looks_at_are_refused(bench, tiny_llama, local, message):
    tune = Seeds(num_seeds=8)
    with pytest.raises(ValueError, match=message):
        bench(model=tiny_llama(), tune=tune, **local)
