import pytest
import torch

from fedloom.client.mezo import Mezo
from fedloom.client.setup import batches
from fedloom.core.protocols import Evaluate, Job
from fedloom.core.randomness import derive, generator
from fedloom.objectives.batch import collate
from fedloom.spaces.full import Full

ZEROTH = {"order": "zeroth", "optimizer": "sgd", "max_grad_norm": None}


@pytest.mark.parametrize("tune", [None, Full()], ids=["lora", "full"])
def test_a_guess_is_the_slope_times_the_direction(bench, tune):
    """One step of plain descent: the move is -lr (z . gradient) z."""
    local = {"steps": 1, "batch_size": 64, "lr": 1e-3}
    one, other = bench(tune=tune, **ZEROTH, **local, eps=1e-5), bench(tune=tune, **local)
    start = {n: t + 0.01 for n, t in one.space.start().items()}
    (done,) = one.fit(["c2"], start)
    z = torch.randn(
        (1, one.space.values.numel()), generator=generator(derive(3, "c2"), "direction", 0, 0)
    )[0].double()
    space = other.space
    space.load(start)
    if tune:
        space.model.model.embed_tokens.padding_idx = None  # autograd has no gradient for that row
    gradient = space.gradient_vector()
    (step,) = (
        [next(batches(other.trainer.setup.examples("c2"), 64, 0))]
        if tune
        else [next(batches(other.trainer.sequential.setup.examples("c2"), 64, 0))]
    )
    fast = other.trainer.fast if tune else other.trainer.sequential.fast
    count = sum(row.num_targets for row in step)
    fast.losses(collate([step], [count], space.values, pack=False)).sum().backward()
    moved = space.vector(done.params) - space.vector(start)
    torch.testing.assert_close(moved, -1e-3 * (z @ gradient) * z, rtol=1e-2, atol=1e-9)
    assert done.lr_sum == pytest.approx(1e-3)


def test_looks_leave_the_tensors_as_they_were(bench):
    one = bench(**ZEROTH, steps=5, lr=1e-2)
    start = one.space.start()
    (done,) = one.fit(["c1"], start, mask={n: torch.zeros(()) for n in start})
    assert all(torch.equal(done.params[n], start[n]) for n in start)
    one.space.load(start)
    before = one.space.values.clone()
    assert torch.equal(one.space.values, before)


@pytest.mark.parametrize("more", [{}, {"difference": "forward"}, {"directions": 2}])
def test_guesses_learn(bench, tiny_llama, more):
    local = {**ZEROTH, "lr": 1e-3, "steps": 30, "batch_size": 4}
    one = bench(model=tiny_llama(seed=4), tune=Full(), **{**local, **more})
    assert isinstance(one.trainer, Mezo)
    (first,) = one.fit(["c7"])
    (second,) = one.fit(["c7"], first.params)
    assert second.metrics["loss"] < first.metrics["loss"]
    assert first.metrics["skipped_steps"] == 0


def test_guesses_go_through_the_optimizer_of_the_recipe(bench):
    (adam,) = bench(**{**ZEROTH, "optimizer": "adamw", "steps": 1, "lr": 0.01}).fit(["c2"])
    moved = torch.cat([t.flatten() for t in adam.params.values()]).abs()
    assert moved.median() == pytest.approx(0.01, rel=1e-3)


def test_a_slope_is_cut(bench):
    ends = [
        bench(**ZEROTH, steps=1, lr=1.0, max_slope=bound).fit(["c2"])[0].params
        for bound in (1e-3, 2e-3)
    ]
    short, long = (torch.cat([t.flatten() for t in end.values()]) for end in ends)
    torch.testing.assert_close(long, 2 * short)


def test_what_has_no_effect_is_refused(bench):
    with pytest.raises(
        ValueError, match=r"tune.lora.dropout must be 0 for local.order zeroth.* got 0.1"
    ):
        bench(tune={"dropout": 0.1}, **ZEROTH)
    with pytest.raises(
        ValueError, match=r"local.group_tokens has no effect with local.order zeroth"
    ):
        bench(**ZEROTH, group_tokens=64)
    with pytest.raises(ValueError, match=r"local.eps belongs to local.order zeroth, got first"):
        bench(eps=1e-3)


def test_gradient_checkpointing_has_no_place_where_nothing_is_kept(bench, tiny_llama):
    from fedloom.models.build import enable_checkpointing

    model = tiny_llama()
    enable_checkpointing(model)
    with pytest.raises(ValueError, match=r"model.gradient_checkpointing must be false"):
        bench(model=model, **ZEROTH)


def test_evaluation_is_that_of_every_trainer(bench, evaluator):
    one = bench(**ZEROTH)
    start = one.space.start()
    one.trainer.run([Job(f"c{i}", 1, i, Evaluate(start)) for i in range(3)])
    assert evaluator.asked == [(3, "validation")]
