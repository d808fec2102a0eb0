"""What every kind of adapter promises: what is federated is what trains, and virtual tokens are nobody else's business."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.flasc import Flasc
from fedloom.client.local_settings import LocalSettings
from fedloom.core.protocols import ClientError, Fit, Job
from fedloom.core.sparsity import Density
from fedloom.data.tokens import IGNORED, Example
from fedloom.engines.inprocess import InProcess
from fedloom.models.build import Base, fingerprint
from fedloom.models.generation import write_greedily
from fedloom.models.hf_logging import quiet
from fedloom.objectives.batch import collate
from fedloom.objectives.forward import Forward
from fedloom.recipe import build_recipe
from fedloom.rounds.checkpoint import state_sha256
from fedloom.rounds.loop import draw
from fedloom.rounds.session import build
from fedloom.spaces.handshake import agree
from fedloom.spaces.live import Live
from fedloom.spaces.lora import LoRA
from fedloom.spaces.lora_xs import LoRAXS
from fedloom.spaces.scaling_vectors import IA3, VeRA
from fedloom.spaces.tune import Tune
from fedloom.spaces.virtual_tokens import Prefix, Prompt, PTuning
from fedloom.testing.bench import make_bench

IDS = torch.arange(20).view(2, 10)
VIRTUAL: dict[str, Tune] = {
    "prompt": Prompt(tokens=4),
    "normal prompt": Prompt(tokens=4, init="normal"),
    "prefix": Prefix(tokens=4),
    "projected prefix": Prefix(tokens=4, projection=True),
    "ptuning mlp": PTuning(tokens=4, hidden=16),
    "ptuning lstm": PTuning(tokens=4, encoder="lstm", hidden=8),
}
AT_BASE: dict[str, Tune] = {
    "ia3": IA3(),
    "vera": VeRA(rank=16, targets=["q_proj", "o_proj"]),
    "lora_xs": LoRAXS(rank=4, alpha=8),
}
LORA: dict[str, Tune] = {
    "rslora": LoRA(rank=2, rslora=True),
    "dora": LoRA(rank=2, dora=True),
    "pissa": LoRA(rank=2, init="pissa"),
}
KINDS = VIRTUAL | AT_BASE | LORA
AS_USED: dict[str, Tune] = {
    **KINDS,
    "prompt": Prompt(tokens=8),
    "normal prompt": Prompt(tokens=8, init="normal"),
    "prefix": Prefix(tokens=8),
    "projected prefix": Prefix(tokens=8, projection=True),
    "ptuning mlp": PTuning(tokens=8),
    "ptuning lstm": PTuning(tokens=8, encoder="lstm"),
}
"""As wide as they are by default: a narrow encoder learns too slowly to be told from one that does not."""
LEARNING = {
    "prompt": 0.3,
    "normal prompt": 0.3,
    "prefix": 0.1,
    "projected prefix": 0.01,
    "ptuning mlp": 0.01,
    "ptuning lstm": 0.003,
    "ia3": 0.1,
    "vera": 0.1,
    "lora_xs": 0.03,
    "rslora": 0.01,
    "dora": 0.01,
    "pissa": 0.003,
}
"""Learning rates of Adam on the bundled model."""

Llama = Callable[..., Any]


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    """Return each kind in turn."""
    name: str = request.param
    return name


def space_of(tune: Tune, model: Any, seed: int = 1) -> Any:
    space = tune.make_space(Base(model.requires_grad_(False), None, "a/model"), seed=seed)
    assert isinstance(space, Live)
    return space


def moved(space: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return coordinates away from the start."""
    draw = torch.Generator().manual_seed(seed)
    return {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in space.start().items()}


@torch.no_grad()
def logits_of(space: Any) -> torch.Tensor:
    logits: torch.Tensor = space.model(input_ids=IDS).logits
    return logits


def peft_of(space: Any) -> Any:
    return space._adapter._peft


def test_coordinates_survive_the_model_to_the_bit(kind: str, tiny_llama: Llama) -> None:
    """A round trip through PEFT's own state moves P-tuning, and does not fit a projected prefix."""
    space = space_of(KINDS[kind], tiny_llama(layers=1))
    start = space.start()
    space.load(start)
    at_start = logits_of(space)
    params = moved(space)
    space.load(params)
    away = logits_of(space)
    values = space.values.clone()
    space.load(start)
    assert torch.equal(logits_of(space), at_start)
    assert not torch.equal(away, at_start)
    space.load(params)
    assert torch.equal(space.values, values)
    assert torch.equal(logits_of(space), away)
    # A sum of float32 and its difference again may round; what is sent of the values as they stand does not.
    again = space.coordinates(space.values)
    space.load(again)
    torch.testing.assert_close(space.values, values, rtol=0, atol=1e-6)


def test_names_are_stable_and_all_that_trains_has_one(kind: str, tiny_llama: Llama) -> None:
    space = space_of(KINDS[kind], tiny_llama(layers=1))
    learning = [p for p in space.model.parameters() if p.requires_grad]
    assert [t.shape for t in space.start().values()] == [p.shape for p in learning]
    assert not any("default" in name or "base_model" in name for name in space.start())


def test_the_seed_alone_decides_the_start(kind: str, tiny_llama: Llama) -> None:
    def begun(seed: int) -> tuple[torch.Tensor, dict[str, str]]:
        with torch.random.fork_rng():
            torch.manual_seed(torch.seed() % 1000)
            state = torch.get_rng_state()
            space = space_of(KINDS[kind], tiny_llama(layers=1), seed)
            assert torch.equal(torch.get_rng_state(), state)
            return space.values.clone(), dict(space.identity())

    (one, identity), (same, its), (other, _) = begun(1), begun(1), begun(2)
    assert torch.equal(one, same)
    assert identity == its
    drawn = kind not in (*AT_BASE, "pissa")
    assert torch.equal(one, other) != drawn


def test_the_hash_of_the_base_model_does_not_follow_the_adapter(
    kind: str, tiny_llama: Llama
) -> None:
    model = tiny_llama(layers=1).requires_grad_(False)
    before = fingerprint(model)
    space = space_of(KINDS[kind], model)
    attached = fingerprint(model)
    # PiSSA takes the largest directions out of the weights themselves.
    assert (attached == before) == (kind != "pissa")
    space.load(moved(space))
    assert fingerprint(model) == attached


@pytest.mark.parametrize("kind", list(AT_BASE))
def test_ia3_vera_and_cores_start_exactly_at_the_base_model(kind: str, tiny_llama: Llama) -> None:
    model = tiny_llama()
    before = model(input_ids=IDS).logits
    assert torch.equal(logits_of(space_of(AT_BASE[kind], model)), before)


@pytest.mark.parametrize(
    "tune", [LoRA(rank=3, init="pissa"), LoRA(rank=3, init="pissa", rslora=True)]
)
def test_pissa_starts_at_the_base_model_with_its_largest_directions(
    tune: LoRA, tiny_llama: Llama
) -> None:
    model = tiny_llama(layers=1, dtype=torch.float64)
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    before = model(input_ids=IDS).logits
    space = space_of(tune, model)
    torch.testing.assert_close(logits_of(space), before, rtol=0, atol=1e-12)
    start = space.absolute(space.start())
    a, b = (start[f"model.layers.0.mlp.up_proj.lora_{x}.weight"] for x in "AB")
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    scale = 16 / 3**0.5 if tune.rslora else 16 / 3
    torch.testing.assert_close(scale * b @ a, u[:, :3] * s[:3] @ v[:3], rtol=0, atol=1e-12)
    # Both factors are as large, as equations 2 and 3 have them.
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), rtol=1e-10, atol=0)
    assert bool((b.gather(0, b.abs().argmax(0, keepdim=True)) > 0).all())


def test_a_folder_gives_plain_peft_the_same_logits(
    kind: str, tiny_llama: Llama, tmp_path: Path
) -> None:
    from peft import PeftModel

    space = space_of(KINDS[kind], tiny_llama())
    params = moved(space)
    space.save(tmp_path, params)
    space.load(params)
    with quiet():
        theirs = PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
        logits = theirs(input_ids=IDS).logits[:, -IDS.shape[1] :]
    torch.testing.assert_close(logits, logits_of(space), rtol=1e-5, atol=1e-5)
    assert theirs.peft_config["default"].base_model_name_or_path == "a/model"


@pytest.mark.parametrize("kind", [*AT_BASE, *LORA])
def test_what_merges_needs_no_peft(
    kind: str, tiny_llama: Llama, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    space = space_of(KINDS[kind], tiny_llama())
    space._tokenizer = tiny_tokenizer
    params = moved(space)
    space.load(params)
    expected = logits_of(space)
    space.save_merged(tmp_path, params)
    assert torch.equal(logits_of(space), expected)
    with quiet():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", list(VIRTUAL))
def test_what_cannot_merge_says_so(kind: str, tiny_llama: Llama, tmp_path: Path) -> None:
    space = space_of(VIRTUAL[kind], tiny_llama(layers=1))
    with pytest.raises(ValueError, match=r"tune: \w+ cannot be merged into a model.*adapter alone"):
        space.save_merged(tmp_path, space.start())


def test_vera_is_a_lora_of_its_rank(tiny_llama: Llama, tmp_path: Path) -> None:
    from peft import PeftModel

    space = space_of(VeRA(rank=16), tiny_llama())
    params = moved(space)
    space.save_as_lora(tmp_path, params)
    space.load(params)
    with quiet():
        theirs = PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    assert theirs.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(theirs(input_ids=IDS).logits, logits_of(space), rtol=1e-5, atol=1e-5)


def test_only_vera_is_written_as_a_lora(tiny_llama: Llama, tmp_path: Path) -> None:
    space = space_of(IA3(), tiny_llama(layers=1))
    with pytest.raises(
        ValueError, match="only an adapter of tune: vera can be written as LoRA, got ia3"
    ):
        space.save_as_lora(tmp_path, space.start())


@pytest.mark.parametrize("kind", list(VIRTUAL))
def test_the_model_answers_as_pefts_own_forward_does(kind: str, tiny_llama: Llama) -> None:
    space = space_of(VIRTUAL[kind], tiny_llama())
    space.load(moved(space))
    hooks = _hooks(space.model.base_model)
    ours = logits_of(space)
    assert ours.shape == (2, 10, 64)
    for held in hooks:
        held.clear()
    with quiet(), torch.no_grad():
        theirs = peft_of(space).eval()(input_ids=IDS).logits[:, -10:]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def _hooks(module: Any) -> list[Any]:
    return [
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
    ]


@pytest.mark.parametrize("kind", list(VIRTUAL))
def test_padding_before_a_row_changes_nothing(kind: str, tiny_llama: Llama) -> None:
    space = space_of(VIRTUAL[kind], tiny_llama())
    alone = space.model(input_ids=IDS[:1], attention_mask=torch.ones(1, 10)).logits
    padded = torch.cat([torch.full((1, 3), 9), IDS[:1]], dim=1)
    mask = torch.cat([torch.zeros(1, 3), torch.ones(1, 10)], dim=1).long()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    beside = space.model(input_ids=padded, attention_mask=mask, position_ids=places).logits[:, 3:]
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", list(VIRTUAL))
def test_answers_are_those_of_whole_passes(kind: str, tiny_llama: Llama) -> None:
    """Token by token through a cache, rows padded on the left, against a whole pass for every token."""
    space = space_of(VIRTUAL[kind], tiny_llama())
    space.load(moved(space))
    rows = [[3, 4, 5, 6, 7], [40, 41], [20, 19, 18]]
    longest = max(map(len, rows))
    prompts = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    answers, sound = write_greedily(space.model, prompts, mask, max_new_tokens=6, ends=[], fill=0)
    assert bool((sound >= 6).all())
    for row, answer in zip(rows, answers.tolist(), strict=True):
        whole = list(row)
        for _ in range(6):
            with torch.no_grad():
                last = space.model(input_ids=torch.tensor([whole]), use_cache=False).logits[0, -1]
            whole.append(int(last.argmax()))
        assert whole[len(row) :] == answer


@pytest.mark.parametrize("kind", list(VIRTUAL))
def test_losses_and_choices_are_those_of_slices_past_the_virtual_tokens(
    kind: str, tiny_llama: Llama
) -> None:
    space = space_of(VIRTUAL[kind], tiny_llama())
    labels = IDS.clone()
    labels[:, :3] = IGNORED
    rows = [Example(ids, label, 3) for ids, label in zip(IDS, labels, strict=True)]
    batch = collate([rows], [14], space.values, pack=False)
    forward = Forward.of(space.model)
    found = forward.predictions(batch)
    hooks = _hooks(space.model.base_model)
    for held in hooks:
        held.clear()
    with quiet(), torch.no_grad():
        logits = peft_of(space).eval()(input_ids=IDS).logits[:, -10:]
    manual = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )
    assert float(found.losses.mean()) == pytest.approx(float(manual), abs=1e-6)
    best = logits[:, 2:-1].flatten(0, 1).argmax(1)
    assert torch.equal(found.best, best)


@pytest.mark.slow
def test_training_moves_every_kind_and_every_tensor(kind: str, tmp_path: Path) -> None:
    """Thirty steps on the bundled corpus lessen the loss by a tenth, and no tensor is left that trains nothing."""
    lr = {"optimizer": "adamw", "lr": LEARNING[kind], "weight_decay": 0.0, "steps": 30}
    data = {"num_examples": 120, "num_clients": 2, "where": {"language": ["en"]}, "max_length": 96}
    recipe = build_recipe({"name": "x", "data": data, "local": {**lr, "batch_size": 8}})
    session = build(replace(recipe, tune=AS_USED[kind]), tmp_path)
    space, client = session.space, next(iter(session.federation.shards))
    batch = collate([session.federation.shards[client].train[:16]], [1], space.values, pack=False)

    def loss_at(params: Any) -> float:
        space.load(params)
        return float(Forward.of(space.model).predictions(batch).losses.mean())

    start = space.start()
    (done,) = session.trainer.run([Job(client, 1, 7, Fit(start))])
    assert loss_at(done.params) < 0.9 * loss_at(start)
    assert [n for n, t in done.params.items() if torch.equal(t, start[n])] == []


def test_a_round_is_the_weighted_mean_of_what_trained_not_of_what_was_made_of_it(
    kind: str, tiny_llama: Llama
) -> None:
    space = space_of(KINDS[kind], tiny_llama(layers=1))
    one, two = moved(space, 1), moved(space, 2)
    mean = {name: (one[name] + 3 * two[name]) / 4 for name in one}
    space.load(mean)
    of_mean = logits_of(space)
    values = space.values.clone()
    space.load(one)
    flat = space.values.clone() / 4
    space.load(two)
    flat += space.values * 3 / 4
    torch.testing.assert_close(flat, values, rtol=0, atol=1e-6)
    with torch.no_grad():
        space.values.copy_(flat)
    torch.testing.assert_close(logits_of(space), of_mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["prompt", "ptuning mlp", "prefix", "ia3", "vera", "lora_xs", "pissa"]
)
def test_rounds_resume_to_the_bit(name: str, tmp_path: Path) -> None:
    local = LocalSettings(optimizer="sgd", lr=0.05, batched="off", steps=2)
    algorithm = FedAvg()

    def bench() -> Any:
        return make_bench(KINDS[name], local, num_clients=6)

    whole = bench().final(algorithm, tmp_path / "whole", 3)
    half = bench()
    first = half.final(algorithm, tmp_path / "half", 2)
    fresh = bench()
    engine = fresh.engine(InProcess, algorithm, tmp_path / "half")
    again, _ = fresh.rounds(algorithm, engine, 3, run=copy.deepcopy(first))
    assert state_sha256(again) == state_sha256(whole)


@pytest.mark.parametrize("name", ["ia3", "prompt", "vera", "lora_xs"])
def test_zeroth_order_steps_replay_to_the_bit(name: str) -> None:
    local = LocalSettings(optimizer="sgd", lr=1e-3, order="zeroth", steps=4)
    runs = []
    for _ in range(2):
        bench = make_bench(KINDS[name], local, num_clients=1)
        (done,) = bench.trainer.run([Job("c0", 1, 3, Fit(bench.space.start()))])
        runs.append((done, bench.space.values.clone()))
    (one, here), (two, there) = runs
    assert torch.equal(here, there)
    assert all(torch.equal(one.params[n], two.params[n]) for n in one.params)
    assert any(bool(t.any()) for t in one.params.values())


def test_ia3_under_flasc_is_dense_at_one_and_at_ones_where_nothing_is_sent(tmp_path: Path) -> None:
    local = LocalSettings(optimizer="sgd", lr=0.1, batched="off", steps=2)
    server, bench = FedAvg(), make_bench(IA3(), local, num_clients=6)
    whole = Flasc(server, Density(1.0), Density(1.0))
    dense = bench.final(server, tmp_path / "dense", 2).state.params
    all_of_it = bench.final(whole, tmp_path / "flasc", 2)
    assert all(torch.equal(dense[n], all_of_it.state.params[n]) for n in dense)
    sparse = Flasc(server, Density(0.02), Density(1.0))
    sent = sparse.broadcast(all_of_it.state, draw(all_of_it, {"c0": {}}, None))["c0"]["params"]
    bench.space.load(sent)
    ones = (bench.space.values == 1).float().mean()
    assert 0.97 < float(ones) < 1


def test_vera_sends_two_vectors_a_layer_and_agrees_on_the_rest(tiny_llama: Llama) -> None:
    space = space_of(VeRA(rank=16, targets=["q_proj", "o_proj"]), tiny_llama())
    sizes = {name.rpartition(".")[2]: t.numel() for name, t in space.start().items()}
    assert sizes == {"vera_lambda_b": 32, "vera_lambda_d": 16}
    assert sum(t.numel() for t in space.start().values()) == (16 + 32) * 4
    same = space_of(VeRA(rank=16, targets=["q_proj", "o_proj"]), tiny_llama())
    other = space_of(VeRA(rank=16, targets=["q_proj", "o_proj"]), tiny_llama(), seed=2)
    agree(space.identity(), same.identity())
    with pytest.raises(ClientError, match=r"same frozen projections of tune: vera \(run\.seed"):
        agree(space.identity(), other.identity())
