import math

import pytest
import torch
from torch.nn import functional

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.personal import Personal
from fedloom.client.setup import batches
from fedloom.core.params import equal
from fedloom.core.phases import Phase
from fedloom.core.protocols import ClientError, Fit, Job, Proximal, Tail, Task
from fedloom.core.randomness import derive
from fedloom.data.tokens import IGNORED, Example
from fedloom.server.combine.products import pairs
from fedloom.spaces.full import Full

PLAIN = {"kernels": "reference", "batched": "off"}
SGD = {"optimizer": "sgd", "lr": 0.5, "max_grad_norm": None}


def hand_written(bench, examples, optimizer, *, size: int, steps: int, seed: int, clip):
    """Train as anybody would with torch and transformers, on the same batches."""
    model = bench.space.model
    model.train()
    tuned = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer(tuned)
    losses = []
    for _, batch in zip(range(steps), batches(examples, size, seed), strict=False):
        ids = torch.nn.utils.rnn.pad_sequence([row.ids for row in batch], batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(
            [row.labels for row in batch], batch_first=True, padding_value=IGNORED
        )
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(tuned, clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("space", ["lora", "full"])
@pytest.mark.parametrize(
    ("local", "theirs"),
    [
        (SGD, lambda p: torch.optim.SGD(p, 0.5)),
        (
            {**SGD, "momentum": 0.9, "weight_decay": 0.1},
            lambda p: torch.optim.SGD(p, 0.5, momentum=0.9, weight_decay=0.1),
        ),
        (
            {"lr": 0.01, "weight_decay": 0.1, "max_grad_norm": None},
            lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
        ),
    ],
    ids=["sgd", "momentum", "adamw"],
)
def test_a_fit_is_a_plain_torch_loop_bit_for_bit(
    bench, tiny_llama, federation_of, rows, space, local, theirs
):
    """For one client, float32."""
    data = federation_of([rows(1, 10)])
    tune = Full(origin="zero") if space == "full" else {"origin": "zero"}
    ours, other = (
        bench(model=tiny_llama(), data=data, tune=tune, epochs=2, **local, **PLAIN)
        for _ in range(2)
    )
    (done,) = ours.fit(["c0"])
    losses = hand_written(
        other,
        data.shards["c0"].train,
        theirs,
        size=4,
        steps=6,
        seed=derive(3, "c0"),
        clip=None,
    )
    for name, p in zip(done.params, other.space.parameters, strict=True):
        assert torch.equal(done.params[name], p.detach()), name
    assert done.metrics["loss"] == pytest.approx(math.fsum(losses) / 6, abs=1e-6)
    assert (done.num_examples, done.num_steps) == (10, 6)
    assert done.metrics["skipped_steps"] == 0


def test_clipping_is_clip_grad_norm(bench, federation_of, rows):
    data = federation_of([rows(1, 10)])
    local = {**SGD, "max_grad_norm": 0.05}
    ours, other = (
        bench(data=data, tune={"origin": "zero"}, steps=6, **local, **PLAIN) for _ in range(2)
    )
    (done,) = ours.fit(["c0"])
    train = data.shards["c0"].train
    sgd = lambda p: torch.optim.SGD(p, 0.5)  # noqa: E731
    hand_written(other, train, sgd, size=4, steps=6, seed=derive(3, "c0"), clip=0.05)
    for name, p in zip(done.params, other.space.parameters, strict=True):
        # transformers computes the loss in float32, whatever the model.
        torch.testing.assert_close(done.params[name], p.detach(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("batched", ["auto", "off"])
def test_accumulated_batches_are_one_large_batch(bench, distance, batched):
    """The mean is over all target tokens, so unequal counts agree as well."""
    large = bench(batch_size=6, lr=0.01, batched=batched).fit(["c2", "c3"])
    small = bench(batch_size=2, accumulation=3, lr=0.01, batched=batched).fit(["c2", "c3"])
    for one, other in zip(large, small, strict=True):
        assert distance(one.params, other.params) < 1e-12
        assert one.num_steps == other.num_steps
        assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], abs=1e-12)
        assert one.metrics["num_tokens"] == other.metrics["num_tokens"]


def test_bytes_repeat_and_only_the_seed_changes_the_order(bench, distance):
    one = bench(lr=0.01)
    again, start = bench(lr=0.01), one.space.start()
    (first,), (second,) = one.fit(["c3"]), again.fit(["c3"])
    assert distance(first.params, second.params) == 0
    (other,) = again.trainer.run([Job("c3", 1, derive(4, "c3"), Fit(start))])
    assert distance(first.params, other.params) > 0


def test_an_epoch_visits_every_example_once(rows):
    examples = rows(1, 7)
    stream = batches(examples, 3, 5)
    first = [next(stream) for _ in range(3)]
    second = [next(stream) for _ in range(3)]
    assert [len(step) for step in first] == [3, 3, 1]
    for epoch in (first, second):
        assert {id(row) for step in epoch for row in step} == {id(row) for row in examples}
    assert [id(r) for s in first for r in s] != [id(r) for s in second for r in s]


def test_an_offset_is_added_to_the_gradient(bench, distance):
    one = bench(steps=1, **SGD)
    start = one.space.start()
    offset = {name: torch.full_like(t, 0.01) for name, t in start.items()}
    (plain,), (moved,) = one.fit(["c1"]), one.fit(["c1"], gradient_offset=offset)
    shifted = {name: plain.params[name] - 0.5 * offset[name] for name in start}
    assert distance(moved.params, shifted) < 1e-15


def test_a_mask_multiplies_the_gradient_and_a_scalar_covers_its_name(bench):
    one = bench(steps=1, **SGD)
    start = one.space.start()
    mask = {name: torch.tensor(0.0 if "lora_A" in name else 0.25) for name in start}
    (plain,), (masked,) = one.fit(["c1"]), one.fit(["c1"], mask=mask)
    for name in start:
        expected = plain.params[name] * mask[name]
        torch.testing.assert_close(masked.params[name], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_a_mask_freezes_does_not_move_at_all(bench, optimizer):
    one = bench(optimizer=optimizer, lr=0.05, weight_decay=0.1, epochs=2)
    start = one.space.start()
    mask = {name: torch.tensor(0.0 if "lora_A" in name else 1.0) for name in start}
    for done in one.fit(["c1", "c4"], mask=mask):
        for name, t in done.params.items():
            assert bool(t.any()) == ("lora_B" in name)


def test_a_tail_is_the_product_of_its_norms_in_the_loss(bench, tiny_llama, federation_of, rows):
    """Against autograd, layer by layer; zeros stay where they are."""
    data, zero = federation_of([rows(1, 4)]), {"origin": "zero"}
    one = bench(model=tiny_llama(), data=data, tune=zero, **SGD, steps=1, **PLAIN)
    names = tuple(pairs(one.space.start()))
    draw = torch.Generator().manual_seed(2)
    start = {
        n: torch.randn(t.shape, generator=draw).to(t) for n, t in sorted(one.space.start().items())
    }
    start[names[0][1]][:, 2:] = 0  # one layer's tail of B
    tail = Tail(0.3, names, 2, 4)
    (free,), (pulled,) = one.fit(["c0"], start), one.fit(["c0"], start, tail=tail)
    leaves = {n: t.double().requires_grad_() for n, t in start.items()}
    penalty = sum(
        0.3 * torch.linalg.norm(leaves[b][:, 2:]) * torch.linalg.norm(leaves[a][2:])
        for a, b in names[1:]
    )
    penalty.backward()
    for a, b in names:
        for name in (a, b):
            step = (free.params[name] - pulled.params[name]).double() / SGD["lr"]
            wanted = leaves[name].grad
            if wanted is not None:
                assert torch.allclose(step, wanted, atol=2e-5), name
            assert bool(step.any()) == (a != names[0][0])


def test_the_proximal_term_pulls_towards_its_center(bench, distance):
    """The first step from the center is FedAvg's; elsewhere strength * (w - center) is added."""
    one = bench(steps=1, **SGD)
    start = one.space.start()
    away = {name: t + 0.02 for name, t in start.items()}
    (plain,) = one.fit(["c1"])
    (same,) = one.fit(["c1"], proximal=Proximal(0.3, start))
    assert distance(plain.params, same.params) == 0
    (free,) = one.fit(["c1"], away)
    (pulled,) = one.fit(["c1"], away, proximal=Proximal(0.3, start))
    for name in start:
        expected = free.params[name] - 0.5 * 0.3 * 0.02
        torch.testing.assert_close(pulled.params[name], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("batched", ["off", "auto"])
def test_what_a_center_lacks_is_not_pulled(bench, batched):
    """Not even beside a client whose center has everything."""
    one = bench(steps=2, **SGD, batched=batched)
    start = one.space.start()
    away = {name: t + 0.02 for name, t in start.items()}
    center = {name: t for name, t in start.items() if "lora_A" in name}
    pulls = [Proximal(0.3, center), Proximal(0.3, start), None]
    jobs = [
        Job(c, 1, derive(3, c), Fit(away, proximal=pull))
        for c, pull in zip(("c1", "c2", "c3"), pulls, strict=True)
    ]
    alone = [one.trainer.run([job])[0].params for job in jobs]
    together = [done.params for done in one.trainer.run(jobs)]
    for one_by_one, batch in zip(alone, together, strict=True):
        for name in start:
            torch.testing.assert_close(batch[name], one_by_one[name], rtol=0, atol=1e-12)
    first = bench(steps=1, **SGD, batched=batched)
    (free,), (some,) = (first.fit(["c1"], away, proximal=pull) for pull in (None, pulls[0]))
    for name in start:
        expected = free.params[name] - (0.5 * 0.3 * 0.02 if name in center else 0.0)
        torch.testing.assert_close(some.params[name], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("batched", ["off", "auto"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_in_a_phase_what_rests_keeps_every_bit_of_the_download(bench, optimizer, batched):
    """FedRep's first phase moves the client's own tensors alone, whatever decays; its second the shared ones."""
    one = bench(optimizer=optimizer, lr=0.05, weight_decay=0.1, batched=batched)
    algorithm = Personal(FedAvg(), "lora_B", (Phase("local", 3), Phase("shared", 2)))
    download = {"params": {n: t + 0.01 for n, t in one.space.start().items()}}
    shared = {n for n in download["params"] if "lora_A" in n}
    for client in ("c1", "c4"):
        half = algorithm.client_update(Task("train", 1, client, 0, {}, download), {})
        first = next(half)
        (moved,) = one.trainer.run([Job(client, 1, 1, first)])
        second = half.send(moved)
        assert isinstance(second, Fit)
        for name, began in download["params"].items():
            assert torch.equal(second.start[name], began) == (name in shared)
            rounding = float((moved.params[name] - began).abs().max())
            assert (rounding < 1e-15) == (name in shared)
        (moved,) = one.trainer.run([Job(client, 1, 2, second)])
        with pytest.raises(StopIteration) as stop:
            half.send(moved)
        reply, state = stop.value.value
        assert set(reply.upload["delta"]) == shared
        assert all(bool(t.any()) for t in reply.upload["delta"].values())
        assert equal(state["local"], {n: t for n, t in second.start.items() if n not in shared})


@pytest.mark.parametrize(
    ("local", "has_sum"),
    [
        (SGD, True),
        ({**SGD, "max_grad_norm": 0.1}, True),
        ({**SGD, "momentum": 0.5}, False),
        ({**SGD, "weight_decay": 0.1}, False),
        ({"optimizer": "adamw"}, False),
    ],
)
def test_lr_sum_is_there_where_displacement_is_lr_times_gradients(bench, local, has_sum):
    (done,) = bench(steps=3, **local).fit(["c1"])
    assert done.lr_sum == (1.5 if has_sum else None)


def test_the_rate_follows_the_round(bench, distance):
    one = bench(steps=1, num_rounds=4, schedule="linear", **SGD)
    start = one.space.start()
    (early,) = one.trainer.run([Job("c1", 1, 9, Fit(start))])
    (late,) = one.trainer.run([Job("c1", 3, 9, Fit(start))])
    assert (early.lr_sum, late.lr_sum) == (0.5, 0.25)
    half = {name: t / 2 for name, t in early.params.items()}
    assert distance(half, late.params) < 1e-15


def test_no_steps_leave_the_start_as_it_was(bench, distance):
    one = bench()
    (done,) = one.fit(["c1"], steps=0)
    assert distance(done.params, one.space.start()) == 0
    assert (done.num_steps, "loss" in done.metrics) == (0, False)


def test_the_answer_is_fresh_and_the_start_untouched(bench):
    one = bench()
    start = one.space.start()
    before = {name: t.clone() for name, t in start.items()}
    (done,) = one.fit(["c1"], start)
    for t in done.params.values():
        t.zero_()
    assert all(torch.equal(start[name], before[name]) for name in start)
    (again,) = one.fit(["c1"], start)
    assert any(bool(t.any()) for t in again.params.values())


@pytest.mark.parametrize("batched", ["auto", "off"])
def test_a_client_that_never_has_a_finite_loss_is_refused(bench, batched):
    one = bench(batched=batched)
    broken = {name: torch.full_like(t, torch.nan) for name, t in one.space.start().items()}
    with pytest.raises(ClientError, match="c1: no step had a finite loss and gradient"):
        one.fit(["c1"], broken)
    (done,) = one.fit(["c1"])
    assert math.isfinite(done.metrics["loss"])


@pytest.mark.parametrize("batched", ["auto", "off"])
def test_a_client_without_examples_is_refused(bench, federation_of, rows, batched):
    one = bench(data=federation_of([rows(1, 2), []]), batched=batched)
    with pytest.raises(ClientError, match="c1 has no training examples"):
        one.fit(["c0", "c1"])
    with pytest.raises(ClientError, match="stranger is not among the clients"):
        one.fit(["stranger"])


def test_zeroth_order_work_is_not_silently_ignored(bench):
    one = bench()
    with pytest.raises(ValueError, match="seed_sequence and at_start belong to zeroth-order work"):
        one.fit(["c1"], seed_sequence=one.space.start())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kernels", ["torch", "reference"])
def test_packed_rows_do_not_see_each_other(
    bench, tiny_llama, federation_of, rows, distance, attention, kernels
):
    apart = rows(1, 4, (5, 9))
    packed = Example(
        torch.cat([row.ids for row in apart]),
        torch.cat([row.labels for row in apart]),
        0,
        positions=torch.cat([torch.arange(len(row.ids)) for row in apart]),
    )
    local = {"steps": 1, "kernels": kernels, **SGD}
    ends = []
    for train in (apart, [packed]):
        model = tiny_llama(dtype=torch.float64)
        model.set_attn_implementation(attention)
        ends += bench(model=model, data=federation_of([train, train]), **local).fit(["c0", "c1"])
    # The eager implementation takes its softmax in float32, whatever the model.
    bound = 1e-14 if attention == "sdpa" else 1e-8
    assert distance(ends[0].params, ends[2].params) < bound
    assert ends[0].metrics["loss"] == pytest.approx(ends[2].metrics["loss"], abs=bound)
    assert ends[0].metrics["num_tokens"] == ends[2].metrics["num_tokens"]


def test_packed_and_plain_rows_share_a_batch(bench, federation_of, rows, distance):
    long, *short = rows(1, 3, (5, 9))
    packed = Example(
        torch.cat([row.ids for row in short]),
        torch.cat([row.labels for row in short]),
        0,
        positions=torch.cat([torch.arange(len(row.ids)) for row in short]),
    )
    local = {"steps": 1, **SGD}
    (mixed,) = bench(data=federation_of([[long, packed]]), **local).fit(["c0"])
    (plain,) = bench(data=federation_of([[long, *short]]), **local).fit(["c0"])
    assert distance(mixed.params, plain.params) < 1e-14


@pytest.mark.parametrize("lengths", [(6, 7), (5, 30)], ids=["equal rows", "unequal rows"])
@pytest.mark.parametrize("batched", ["auto", "off"])
def test_short_rows_share_a_row_without_changing_the_numbers(
    bench, federation_of, rows, distance, lengths, batched
):
    data = federation_of([rows(1, 9, lengths), rows(2, 5, lengths)])
    local = {"lr": 0.01, "batch_size": 9, "batched": batched}
    fast = bench(data=data, kernels="torch", **local).fit(["c0", "c1"])
    slow = bench(data=data, kernels="reference", **local).fit(["c0", "c1"])
    for one, other in zip(fast, slow, strict=True):
        assert distance(one.params, other.params) < 1e-12
        assert one.metrics == pytest.approx(other.metrics, abs=1e-12)


def test_what_a_row_does_not_ask_for_has_no_loss(bench, rows, federation_of):
    train = rows(1, 4)
    (done,) = bench(data=federation_of([train]), steps=1, **PLAIN).fit(["c0"])
    one = bench(data=federation_of([train]))
    total = count = 0.0
    for row in train:
        with torch.no_grad():
            logits = one.space.model(input_ids=row.ids[None]).logits[0, :-1]
        total += float(functional.cross_entropy(logits, row.labels[1:], reduction="sum"))
        count += row.num_targets
    assert done.metrics["loss"] == pytest.approx(total / count, abs=1e-12)
    assert done.metrics["num_tokens"] == count == sum(len(row.ids) - 2 for row in train)
