from dataclasses import replace

import pytest
import torch

from fedloom.client import fit as fit_module
from fedloom.client.cohort import AdapterLanes, Cohort, keeps_lanes_apart
from fedloom.client.local_settings import LocalSettings
from fedloom.client.trainer import Sequential
from fedloom.core.protocols import Evaluate, Fit, Job, Proximal, Tail
from fedloom.core.randomness import derive, generator
from fedloom.models.build import ModelSettings, load_base
from fedloom.models.quantized import QuantizedLinear, quantize_, quantized_layers
from fedloom.models.schemes import SCHEMES
from fedloom.server.combine.products import pairs
from fedloom.spaces.full import Full
from fedloom.spaces.lora_xs import LoRAXS
from fedloom.spaces.scaling_vectors import IA3, VeRA
from fedloom.spaces.virtual_tokens import Prefix, Prompt, PTuning
from fedloom.testing.bench import make_bench

EVERYBODY = tuple(f"c{i}" for i in range(8))
LOCALS = {
    "sgd": {"optimizer": "sgd", "lr": 0.5, "epochs": 2},
    "momentum": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "adamw": {"lr": 0.01, "batch_size": 3, "weight_decay": 0.1, "max_grad_norm": 0.3},
    "accumulated": {"lr": 0.01, "batch_size": 1, "accumulation": 3, "epochs": 2},
    "reference": {"lr": 0.01, "kernels": "reference"},
}


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the lanes of every group that is trained."""
    seen: list[int] = []
    real = fit_module.fit

    def spy(jobs, lanes, setup):
        seen.append(len(jobs))
        assert len(lanes.values) == len(jobs)
        return real(jobs, lanes, setup)

    monkeypatch.setattr("fedloom.client.cohort.fit", spy)
    return seen


def edited(space, client: str) -> Fit:
    """Return a Fit whose edits differ by client."""
    number = int(client[1:])
    # No multiple of a step of AdamW, which would leave rounding for a tail to pull at.
    start = space.start()
    if number >= 4:
        start = {n: t + 0.0027 * number for n, t in start.items()}
    return Fit(
        start,
        proximal=Proximal(0.1 * number, space.start()) if number % 2 else None,
        gradient_offset={n: t + 1e-3 for n, t in start.items()} if number % 3 == 0 else None,
        mask={n: torch.tensor(0.5) for n in start} if number == 5 else None,
        steps=7 if number == 2 else None,
        tail=Tail(0.2, tuple(pairs(start)), number - 4, 3 + number % 2) if number > 5 else None,
    )


@pytest.mark.parametrize("local", LOCALS.values(), ids=LOCALS)
def test_a_cohort_in_one_batch_is_the_clients_one_by_one(bench, distance, local, groups):
    """Float64; unequal rows, steps, starts, edits. Lanes leave when they are done."""
    alone, together = bench(batched="off", **local), bench(**local)
    assert isinstance(alone.trainer, Sequential)
    assert isinstance(together.trainer, Cohort)
    ends = []
    for one in (alone, together):
        jobs = [Job(c, 1, derive(3, c), edited(one.space, c)) for c in EVERYBODY]
        ends.append(one.trainer.run(jobs))
    assert groups == [8]
    for one, other in zip(*ends, strict=True):
        assert distance(one.params, other.params) < 1e-12
        assert max(float(t.abs().max()) for t in one.params.values()) > 1e-3
        assert one.metrics == pytest.approx(other.metrics, abs=1e-12)
        assert (one.num_steps, one.lr_sum) == (other.num_steps, other.lr_sum)


@pytest.mark.parametrize(
    ("scheme", "tune"),
    [
        ("nf4", {"targets": "all-linear"}),
        ("nf4", IA3()),
        ("nf4", VeRA(rank=8)),
        ("int8", {"targets": ["q_proj", "v_proj"]}),
        ("int4", LoRAXS(rank=4)),
    ],
    ids=["nf4 lora", "nf4 ia3", "nf4 vera", "int8 lora", "int4 lora_xs"],
)
def test_a_weight_in_few_bits_is_unpacked_once_for_all_clients_of_a_batch(
    bench, distance, tiny_llama, monkeypatch, scheme, tune
):
    unpacked, ends, counts = [], [], []
    real = QuantizedLinear.unpacked

    def spy(layer, dtype):
        unpacked.append(layer)
        return real(layer, dtype)

    monkeypatch.setattr(QuantizedLinear, "unpacked", spy)
    for batched in ("off", "auto"):
        model = tiny_llama(dtype=torch.float64).requires_grad_(False)
        quantize_(model, SCHEMES[scheme])
        local = {"optimizer": "sgd", "lr": 0.1, "steps": 2, "batch_size": 4}
        one = bench(model=model, tune=tune, batched=batched, **local)
        unpacked.clear()
        ends.append(one.fit(EVERYBODY))
        counts.append(len(unpacked))
    for one, other in zip(*ends, strict=True):
        # What learns is float32 beside integers, whatever the model's type.
        assert distance(one.params, other.params) < 1e-6
        assert max(float(t.abs().max()) for t in one.params.values()) > 1e-5
    assert counts[0] == 8 * counts[1]
    # Once a product: two steps, forwards and, but for the first layer's input, backwards.
    layers = len(quantized_layers(model))
    assert 2 * layers < counts[1] <= 2 * 2 * layers


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["down_proj"]])
@pytest.mark.parametrize("rslora", [False, True])
def test_any_linear_layers_can_be_batched(bench, distance, targets, rslora):
    tune = {"targets": targets, "rslora": rslora}
    alone = bench(batched="off", tune=tune, lr=0.01, kernels="reference").fit(EVERYBODY)
    together = bench(tune=tune, lr=0.01).fit(EVERYBODY)
    for one, other in zip(alone, together, strict=True):
        assert distance(one.params, other.params) < 1e-12


@pytest.mark.parametrize(
    "tune",
    [
        IA3(),
        IA3(targets="all-linear", feedforward=["down_proj", "o_proj"]),
        VeRA(rank=8),
        VeRA(rank=8, targets=["q_proj", "o_proj"]),
        LoRAXS(rank=4),
    ],
    ids=["ia3", "ia3 everywhere", "vera", "vera of one size", "lora_xs"],
)
@pytest.mark.parametrize("local", LOCALS.values(), ids=LOCALS)
def test_ia3_vera_and_cores_in_one_batch_are_the_clients_one_by_one(tune, local, distance, groups):
    ends = []
    for batched in ("off", "auto"):
        settings = LocalSettings(**local, batched=batched)
        one = make_bench(tune, settings, dtype=torch.float64)
        assert isinstance(one.trainer, Sequential if batched == "off" else Cohort)
        jobs = [Job(c, 1, derive(3, c), edited(one.space, c)) for c in EVERYBODY]
        ends.append(one.trainer.run(jobs))
    assert groups == [8]
    for one, other in zip(*ends, strict=True):
        assert distance(one.params, other.params) < 1e-12
        assert one.metrics == pytest.approx(other.metrics, abs=1e-12)


@pytest.mark.parametrize(
    "tune", [IA3(), VeRA(rank=8), LoRAXS(rank=4)], ids=["ia3", "vera", "lora_xs"]
)
def test_layers_with_a_bias_or_transposed_are_batched_too(tune, distance):
    """GPT-2 keeps weights as (in, out), and a bias that IA3 scales with the rest."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = []
    for batched in ("off", "auto"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = GPT2Config(
                n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=64,
                attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
            )  # fmt: skip
            model = GPT2LMHeadModel(config).double().requires_grad_(False)
        settings = LocalSettings(lr=0.01, batched=batched)
        one = make_bench(tune, settings, model=model)
        assert isinstance(one.trainer, Sequential if batched == "off" else Cohort)
        jobs = [Job(c, 1, derive(3, c), edited(one.space, c)) for c in EVERYBODY]
        ends.append(one.trainer.run(jobs))
    for one, other in zip(*ends, strict=True):
        assert distance(one.params, other.params) < 1e-12


@pytest.mark.parametrize("tune", [Prompt(tokens=2), Prefix(tokens=2), PTuning(tokens=2, hidden=8)])
def test_virtual_tokens_go_one_by_one(tune):
    assert isinstance(make_bench(tune, LocalSettings()).trainer, Sequential)


def test_groups_hold_about_the_tokens_asked_for_and_never_change_the_numbers(
    bench, distance, groups
):
    whole = bench(lr=0.01, batch_size=2).fit(EVERYBODY)
    small = bench(lr=0.01, batch_size=2, group_tokens=60).fit(EVERYBODY)
    tiny = bench(lr=0.01, batch_size=2, group_tokens=1).fit(EVERYBODY)
    assert groups[0] == 8
    assert set(groups[1:-8]) <= {1, 2, 3, 4}
    assert groups[-8:] == [1] * 8
    for one, *others in zip(whole, small, tiny, strict=True):
        assert all(distance(one.params, other.params) < 1e-12 for other in others)


def test_the_order_of_the_jobs_does_not_change_a_bit(bench, tiny_llama, distance):
    one = bench(model=tiny_llama(), lr=0.01, batch_size=2, group_tokens=60)
    ahead = one.fit(EVERYBODY)
    back = one.fit(EVERYBODY[::-1])[::-1]
    for a, b in zip(ahead, back, strict=True):
        assert distance(a.params, b.params) == 0


def test_width_follows_the_tokens_of_a_typical_batch(bench):
    assert bench(group_tokens=1024, batch_size=4).trainer.width > 8
    assert bench(group_tokens=1, batch_size=4).trainer.width == 4
    assert bench(batched="off").trainer.width == 1


def test_a_lane_with_a_broken_start_disturbs_no_other(bench, federation_of, rows, distance):
    """The broken one reaches its limits in the forward pass; its loss is not finite in some steps or all."""
    data = federation_of([rows(1, 4), rows(2, 4), rows(3, 4)])
    healthy = bench(data=data, lr=0.01, steps=2)
    mixed = bench(data=data, lr=0.01, steps=2)
    start = mixed.space.start()
    broken = {n: torch.full_like(t, torch.nan) for n, t in start.items()}
    jobs = [Job(c, 1, derive(3, c), Fit(start)) for c in ("c0", "c1", "c2")]
    lanes = AdapterLanes(
        mixed.trainer,
        torch.stack([mixed.space.absolute_vector(s) for s in (start, broken, start)]),
    )
    assert all(isinstance(job.work, Fit) for job in jobs)
    train = [data.shards[c].train for c in ("c0", "c1", "c2")]
    gradients, losses = lanes.gradients(train)
    assert torch.isfinite(losses).tolist() == [True, False, True]
    assert torch.isfinite(gradients).all(1).tolist() == [True, False, True]
    (other,) = healthy.fit(["c0"])
    assert other.num_steps == 2


def test_other_work_in_between_is_answered_in_place(bench, evaluator):
    one = bench(lr=0.01)
    start = one.space.start()
    works: list[Fit | Evaluate] = [Fit(start), Evaluate(start), Fit(start), Evaluate(start, "test")]
    jobs = [Job(f"c{i}", 1, derive(3, i), work) for i, work in enumerate(works)]
    done = one.trainer.run(jobs)
    assert [bool(d.params) for d in done] == [True, False, True, False]
    assert evaluator.asked == [(1, "validation"), (1, "test")]


def test_jobs_of_different_rounds_learn_at_their_own_rates(bench):
    one = bench(optimizer="sgd", lr=1.0, schedule="linear", num_rounds=4, steps=1)
    start = one.space.start()
    done = one.trainer.run([Job("c1", r, 5, Fit(start)) for r in (3, 1)])
    assert [d.lr_sum for d in done] == [0.5, 1.0]


@pytest.mark.parametrize(
    "tune",
    [
        {"dropout": 0.1},
        {"dora": True},
        {"modules_to_save": ["lm_head"]},
        Full(),
    ],
    ids=["dropout", "dora", "modules to save", "full"],
)
def test_what_cannot_be_batched_runs_one_by_one(bench, distance, tune):
    # Dropout's draws follow the layout of the batch, which the reference has its own way of.
    kernels = "auto" if tune == {"dropout": 0.1} else "reference"
    one, other = bench(tune=tune, lr=0.01), bench(tune=tune, lr=0.01, kernels=kernels)
    assert isinstance(one.trainer, Sequential)
    for a, b in zip(one.fit(["c1", "c2"]), other.fit(["c1", "c2"]), strict=True):
        assert distance(a.params, b.params) < 1e-12


def test_the_model_is_as_it_was_afterwards(bench, tiny_llama):
    one = bench(model=tiny_llama(), lr=0.01, kernels="auto")
    layers = [m for m in one.space.model.modules() if "forward" in vars(m)]
    before = one.space.values.clone()
    one.fit(EVERYBODY)
    assert [m for m in one.space.model.modules() if "forward" in vars(m)] == layers == []
    assert torch.equal(one.space.values, before)
    assert not one.space.model.training


def test_experts_are_trained_one_client_after_another(bench, tiny_routed, distance):
    """A router mixes the tokens of all rows, so that a batch of clients would train on each other's."""
    assert isinstance(bench(model=tiny_routed(dtype=torch.bfloat16)).trainer, Sequential)
    model = tiny_routed(dtype=torch.float64)
    one = bench(model=model)
    assert isinstance(one.trainer, Sequential)
    ends = one.fit(EVERYBODY)
    again = one.fit(EVERYBODY[::-1])[::-1]
    assert all(distance(a.params, b.params) == 0 for a, b in zip(ends, again, strict=True))


def test_an_expert_no_token_went_to_stays_where_it_was(bench, tiny_routed):
    model = tiny_routed(dtype=torch.float64)
    for layer in model.model.layers:

        def away(x, weight=layer.mlp.router.weight):
            shares = (x @ weight.T).softmax(-1)
            return shares.index_fill(-1, torch.tensor([3]), 0).max(-1)

        layer.mlp.router.forward = away
    one = bench(model=model, optimizer="sgd", lr=0.1)
    (done,) = one.fit(["c3"])
    moved = {name for name, tensor in done.params.items() if bool(tensor.any())}
    stayed = {name.partition(".lora_")[0] for name in one.space.start().keys() - moved}
    assert {f"model.layers.{at}.mlp.experts.3" for at in (0, 1)} <= stayed
    assert any("experts" in name for name in moved)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_lanes_that_would_mix_are_seen(bench, tiny_llama, dtype):
    one = bench(model=tiny_llama(dtype=dtype))
    assert keeps_lanes_apart(one.trainer, one.space.model)
    attention = one.space.model.model.layers[1].self_attn
    forward = attention.forward
    before = one.space.values.clone()

    def turned(hidden_states, **inputs):
        return forward(hidden_states=hidden_states.flip(0), **inputs)

    attention.forward = turned
    assert not keeps_lanes_apart(one.trainer, one.space.model)
    assert torch.equal(one.space.values, before)


@pytest.mark.parametrize("towards", [0.0, 0.3])
def test_rounding_is_told_from_lanes_that_mix_by_its_direction(
    bench, tiny_llama, monkeypatch, towards
):
    """In half precision a deep model is off by much without a direction; a little of another lane's effect is something else."""
    one = bench(model=tiny_llama(dtype=torch.bfloat16))
    model, space, seen = one.space.model, one.space, []
    plain = model.lm_head.forward

    def rough(x):
        logits = plain(x)
        seen.append(logits)
        if len(seen) % 5:
            return logits
        # Four answers alone, the two swapped among them last; the fifth is that of the batch.
        apart, swapped = torch.cat(seen[-5:-3]), torch.cat(seen[-3:-1])
        effect = swapped - apart
        noise = torch.randn(effect.shape, generator=generator(0, "noise")).to(effect)
        return apart + towards * effect + 0.3 * noise * effect.norm() / noise.norm()

    monkeypatch.setattr(model.lm_head, "forward", rough)
    assert keeps_lanes_apart(one.trainer, model) == (towards == 0)
    assert len(seen) == (5 if towards == 0 else 10)
    assert space.values.isfinite().all()


@pytest.mark.slow
@pytest.mark.realmodel
@pytest.mark.parametrize("name", ["smollm2.gguf", "gemma3-270m.gguf"])
def test_rounding_of_a_deep_model_is_not_taken_for_lanes_that_mix(bench, real_model, name):
    """In bfloat16 it grows to a tenth of the effect that adapters in every layer have, and to half of it."""
    base = load_base(ModelSettings(name=str(real_model(name)), dtype="bfloat16"))
    one = bench(model=base.model, tune={"rank": 8, "targets": "all-linear"})
    assert isinstance(one.trainer, Cohort)


def test_a_router_that_draws_is_not_batched(bench, tiny_llama, distance):
    """Its draws are its client's own, whoever else trains."""
    model = tiny_llama(dtype=torch.float64)
    forward = model.model.layers[0].mlp.forward

    def jittered(x):
        noise = torch.rand_like(x) if model.training else 1.0
        return forward(x * noise)

    model.model.layers[0].mlp.forward = jittered
    one = bench(model=model)
    assert isinstance(one.trainer, Sequential)
    (alone,) = one.fit(["c1"])
    _, beside = one.fit(["c0", "c1"])
    assert distance(alone.params, beside.params) == 0


def test_packed_rows_need_a_model_that_keeps_them_apart(bench, tiny_llama, rows, federation_of):
    packed = [replace(row, positions=torch.arange(len(row.ids))) for row in rows(0, 4)]
    data = federation_of([packed])
    bench(data=data)
    model = tiny_llama(dtype=torch.float64)
    forward = model.forward
    model.forward = lambda input_ids, use_cache=False: forward(
        input_ids=input_ids, use_cache=use_cache
    )
    with pytest.raises(ValueError, match=r"data.packing must be false for this model \(LlamaFor"):
        bench(model=model, data=data)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_smaller_rank_in_a_wider_space_is_that_rank_alone(bench, distance, rslora):
    """Zeros on both sides of a column get no gradient, and the scale is each lane's own; AdamW with decay."""
    # Norms are float32 in any Llama, so that in more steps last bits come to a rounding that they fall on either side of.
    settings = {"lr": 0.01, "weight_decay": 0.1, "steps": 20}
    lora = {"alpha": 16, "rslora": rslora, "origin": "zero"}
    narrow = bench(tune={"rank": 2, **lora}, batched="off", **settings)
    start = narrow.space.start()
    (alone,) = narrow.fit(["c1"], start)
    wide = bench(tune={"rank": 8, **lora}, **settings)
    assert isinstance(wide.trainer, Cohort)
    whole = {
        name: torch.cat([start[name], torch.zeros_like(t).narrow(dim, 2, 6)], dim)
        for name, t in wide.space.start().items()
        for dim in [0 if "lora_A" in name else 1]
    }
    gain = 2.0 if rslora else 4.0
    mates = [Job(c, 1, derive(3, c), Fit(wide.space.start())) for c in ("c0", "c2")]
    job = Job("c1", 1, derive(3, "c1"), Fit(whole, gain=gain))
    together = wide.trainer.run([mates[0], job, mates[1]])[1]
    one_by_one = wide.trainer.sequential.run([job])[0]
    for found in (together, one_by_one):
        for name, t in found.params.items():
            dim = 0 if "lora_A" in name else 1
            assert not bool(t.narrow(dim, 2, 6).any())
            assert float((t.narrow(dim, 0, 2) - alone.params[name]).abs().max()) < 1e-11


def test_a_scale_is_refused_where_no_adapter_has_one(bench):
    full = bench(tune=Full(), batched="off", lr=0.01)
    with pytest.raises(ValueError, match="only low-rank adapters have a scale to change"):
        full.fit(["c0"], gain=2.0)
