"""Adapters of several ranks through whole rounds: against dense matrices, in any order, whoever takes part."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom import experiment
from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedlora import FedLoRA, FedLoRAState
from fedloom.algorithms.flasc import Flasc
from fedloom.algorithms.freeze import Freeze
from fedloom.algorithms.personal import Personal
from fedloom.algorithms.private import Private
from fedloom.algorithms.prune import Prune
from fedloom.clustering.members import Grouping
from fedloom.clustering.modes import Auto, Paper
from fedloom.clustering.sharing import Sharing
from fedloom.core.finetune import FineTune
from fedloom.core.params import equal
from fedloom.core.payloads import NoReplies
from fedloom.core.protocols import Done, Fit, Params, Payload, Reply, Round, Tail, Task
from fedloom.core.ranks import Ranks
from fedloom.core.rehearsal import Deployed, half_of, rehearse
from fedloom.core.sparsity import Density
from fedloom.models.build import Base
from fedloom.recipe import RecipeError, build_recipe
from fedloom.recipe_text import to_tree, to_yaml
from fedloom.rounds.recipe_settings import Recipe
from fedloom.server.factors.pruning import RankPruning
from fedloom.server.factors.rules import (
    SVD,
    Aggregate,
    Fair,
    Pad,
    Residual,
    Stack,
)
from fedloom.server.factors.slices import frozen, learning, whole
from fedloom.spaces.lora import LoRA
from fedloom.tracking.metrics_log import MetricsLog
from fedloom.wire.format import encode_task
from fedloom.wire.wire_settings import WireSettings

Drive = Callable[..., tuple[Reply, Payload, list[Any]]]
A, B = "layers.0.lora_A.weight", "layers.0.lora_B.weight"
PLAIN = "norm.weight"
OUT, IN = 6, 10
TIERS = {f"c{i}": {"tier": ("phone", "laptop", "desk")[i % 3]} for i in range(10)}


def ranks(side: int = 0, *, most: int = 8) -> Ranks:
    gains = {2: most / 2, 4: most / 4, most: 1.0}
    return Ranks(most, {"phone": 2, "laptop": 4}, side, gains)


def space(side: int = 0, *, most: int = 8, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    a = torch.zeros(most + side, IN, dtype=torch.float64)
    a[:most] = torch.randn(most, IN, generator=draw, dtype=torch.float64)
    return {
        A: a,
        B: torch.zeros(OUT, most + side, dtype=torch.float64),
        PLAIN: torch.ones(3).double(),
    }


def moving(client: str) -> Callable[[Any], Done]:
    """Return a trainer that moves every entry that has a gradient by something of the client's own."""
    draw = torch.Generator().manual_seed(sum(map(ord, client)))

    def run(work: Any) -> Done:
        moved = {}
        for name, start in work.start.items():
            step = torch.randn(start.shape, generator=draw, dtype=torch.float64)
            if name in (A, B):
                # A column that is zero in both factors has no gradient.
                alive = work.start[A].any(1) | work.start[B].any(0)
                step = step * (alive[:, None] if name == A else alive)
            moved[name] = start + 0.1 * step * (1 if work.mask is None else work.mask[name])
        return Done(moved, 1 + int(client[1:]), 1)

    return run


def round_of(number: int, cohort: Sequence[str]) -> Round:
    return Round(number, 70 + number, TIERS, tuple(cohort), len(cohort) / len(TIERS))


def replies_of(
    algorithm: FedLoRA, state: FedLoRAState, round: Round, drive: Drive
) -> tuple[list[Reply], list[Fit]]:
    replies, works = [], []
    for client, download in algorithm.broadcast(state, round).items():
        task = Task("train", round.number, client, 0, TIERS[client], download)
        reply, _, asked = drive(algorithm.client_update(task, {}), moving(client))
        replies.append(reply)
        works += asked
    return replies, works


def added(params: Params) -> Tensor:
    """Return what the adapter adds to the layer, in units of the scale of the widest."""
    return params[B] @ params[A]


RULES: list[Aggregate] = [Pad(), SVD(), Stack(), Residual(), Fair()]
IDS = [rule.rule for rule in RULES]


def made(rule: Aggregate, *, side: int = 60) -> tuple[FedLoRA, FedLoRAState]:
    beside = side if rule.beside else 0
    algorithm = FedLoRA(rule, ranks=ranks(beside))
    return algorithm, algorithm.init(space(beside), 0)


@pytest.mark.parametrize("rule", [Stack(), Residual()], ids=["stack", "residual"])
def test_ten_clients_of_three_ranks_are_summed_exactly_round_after_round(
    rule: Aggregate, drive: Drive
) -> None:
    algorithm, state = made(rule)
    for number in (1, 2, 3):
        round = round_of(number, list(TIERS)[number:])
        sent = algorithm.broadcast(state, round)
        replies, works = replies_of(algorithm, state, round, drive)
        weights = torch.tensor([reply.weight for reply in replies]).double()
        beside = added(whole({A: space()[A] * 0, B: space()[B] * 0}, {}, most=8, side=60))
        if state.used:
            beside = state.params[B][:, 8:] @ state.params[A][8:]
        wanted = beside.clone()
        for reply, share, work in zip(replies, weights / weights.sum(), works, strict=True):
            began, delta = sent[reply.client]["params"], reply.upload["delta"]
            # What it trained, as its own model has it: its own factors by its own scale.
            b, a = (began[n] + delta[n] for n in (B, A))
            gain = algorithm.ranks.gains[len(a)]  # type: ignore[union-attr]
            assert work.gain == gain
            local = (b / gain) @ a
            wanted += share * gain * local
        after, metrics = algorithm.server_update(state, round, iter(replies))
        assert metrics["aggregation_error"] < 1e-12
        assert float((added(after.params) - wanted).norm()) < 1e-12 * float(wanted.norm())
        plain = sum(
            float(s) * r.upload["delta"][PLAIN]
            for s, r in zip(weights / weights.sum(), replies, strict=True)
        )
        assert torch.allclose(after.params[PLAIN], state.params[PLAIN] + plain, atol=1e-15)
        state = after
    assert state.used == min(OUT, IN)


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_any_order_of_arrival_gives_the_same_bits(rule: Aggregate, drive: Drive) -> None:
    algorithm, state = made(rule)
    round = round_of(1, list(TIERS))
    replies, _ = replies_of(algorithm, state, round, drive)
    one, told = algorithm.server_update(state, round, iter(replies))
    other, again = algorithm.server_update(state, round, iter(replies[::-1]))
    assert equal(one.params, other.params)
    assert told == again


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_three_of_ten_and_then_another_three_fit_in(rule: Aggregate, drive: Drive) -> None:
    algorithm, state = made(rule)
    for number, cohort in enumerate((["c0", "c1", "c2"], ["c3", "c6", "c9"], ["c5"]), 1):
        round = round_of(number, cohort)
        sent = algorithm.broadcast(state, round)
        replies, _ = replies_of(algorithm, state, round, drive)
        for reply in replies:
            rank = {"phone": 2, "laptop": 4, "desk": 8}[TIERS[reply.client]["tier"]]
            params, delta = sent[reply.client]["params"], reply.upload["delta"]
            assert params[A].shape == delta[A].shape == (rank, IN)
            assert params[B].shape == delta[B].shape == (OUT, rank)
        state, metrics = algorithm.server_update(state, round, iter(replies))
        assert state.params[A].shape == (8 + (60 if rule.beside else 0), IN)
        assert 0 <= metrics["aggregation_error"] < 1


def test_clients_of_one_tier_share_one_download_and_deploy_the_same(drive: Drive) -> None:
    algorithm, state = made(Residual())
    round = round_of(1, list(TIERS))
    replies, _ = replies_of(algorithm, state, round, drive)
    state, _ = algorithm.server_update(state, round, iter(replies))
    sent = algorithm.broadcast(state, round)
    assert len({id(payload) for payload in sent.values()}) == 3
    assert sent["c0"] is sent["c3"]
    for client, rank in (("c0", 2), ("c1", 4), ("c2", 8)):
        used = algorithm.deployed(sent[client], {})
        assert used[A].shape == (68, IN)
        expected = state.params[B][:, :rank] @ state.params[A][:rank]
        expected = expected + state.params[B][:, 8:] @ state.params[A][8:]
        assert torch.allclose(added(used), expected)


def test_what_is_frozen_keeps_its_values_in_training_and_is_not_sent_back(drive: Drive) -> None:
    algorithm, state = made(Stack())
    replies, _ = replies_of(algorithm, state, round_of(1, ["c2"]), drive)
    state, _ = algorithm.server_update(state, round_of(1, ["c2"]), iter(replies))
    assert not bool(state.params[B][:, :8].any())
    fresh = state.params[A][:8]
    assert bool(fresh.any())
    assert not torch.equal(fresh, space()[A][:8])
    assert float(fresh.abs().max()) <= IN**-0.5
    replies, (work,) = replies_of(algorithm, state, round_of(2, ["c2"]), drive)
    assert work.mask is not None
    assert not bool(work.mask[A][8:].any())
    assert bool(work.mask[A][:8].all())
    assert not bool(work.mask[B][:, 8:].any())
    assert bool(work.mask[B][:, :8].all())
    assert replies[0].upload["delta"][A].shape == (8, IN)


def test_what_is_frozen_rests_inside_personal_and_in_fine_tuning() -> None:
    both = {**space(8, most=2), **{n.replace("0", "1"): t for n, t in space(8, most=2).items()}}
    algorithm = FedLoRA(Residual(), ranks=Ranks(2, {}, 8, {1: 2.0, 2: 1.0}))
    split = Personal(algorithm, local=r"layers\.1")
    state, round = split.init(both, 0), round_of(1, ["c0", "c1"])
    for _ in range(2):
        sent = split.broadcast(state, round)
        tasks = [Task("train", 1, c, int(c[1:]), {}, sent[c]) for c in round.cohort]
        replies = [rehearse(split, task, noise=0.1) for task in tasks]
        state, _ = split.server_update(state, round, iter(replies))
    download = split.broadcast(state, round)["c0"]
    assert "frozen" in download
    mask = split.mask(download)
    assert mask is not None
    assert mask.keys() == both.keys()
    asked = Task("test", 2, "c0", 0, {"num_examples": "4"}, download)
    half = half_of(Deployed(split, FineTune(steps=1, only="lora_A")), asked, {})
    next(half)
    work = half.send(Done({}, 1, metrics={"loss": 1.0}))
    assert isinstance(work, Fit)
    assert work.mask is not None
    assert bool(work.mask[A][:2].all())
    assert not bool(work.mask[A][2:].any())
    assert not bool(work.mask[B].any())
    assert bool(work.mask["layers.1.lora_A.weight"].all())


def test_an_adapter_is_begun_anew_from_the_round_s_seed(drive: Drive) -> None:
    algorithm, state = made(Stack())
    replies, _ = replies_of(algorithm, state, round_of(1, ["c2"]), drive)
    ends = [
        algorithm.server_update(state, replace(round_of(1, ["c2"]), seed=seed), iter(replies))[0]
        for seed in (1, 1, 2)
    ]
    assert equal(ends[0].params, ends[1].params)
    assert not torch.equal(ends[0].params[A][:8], ends[2].params[A][:8])


@pytest.mark.parametrize("rule", RULES, ids=IDS)
def test_a_round_in_which_nobody_moved_changes_no_bit(rule: Aggregate) -> None:
    algorithm, state = made(rule)
    round = round_of(1, ["c0", "c1"])
    still = [
        Reply(c, {"delta": {n: torch.zeros_like(t) for n, t in p["params"].items()}})
        for c, p in algorithm.broadcast(state, round).items()
    ]
    after, metrics = algorithm.server_update(state, round, iter(still))
    assert after is state
    assert metrics["aggregation_error"] == 0


def test_replies_without_weight_are_nobody() -> None:
    algorithm, state = made(SVD())
    with pytest.raises(NoReplies):
        algorithm.server_update(state, round_of(1, ["c0"]), iter([Reply("c0", {}, 0.0)]))


def test_a_full_pair_is_cut_to_its_largest_part_and_the_loss_is_told(drive: Drive) -> None:
    algorithm, state = made(Residual(), side=2)
    round = round_of(1, list(TIERS))
    replies, _ = replies_of(algorithm, state, round, drive)
    after, metrics = algorithm.server_update(state, round, iter(replies))
    large, full = made(Residual())
    exact, _ = large.server_update(full, round, iter(replies))
    lost = added(exact.params) - added(after.params)
    values = torch.linalg.svdvals(exact.params[B][:, 8:] @ exact.params[A][8:])
    assert after.used == 2
    assert metrics["frozen_rank"] == 2
    assert float(lost.norm()) == pytest.approx(float(values[2:].norm()), rel=1e-9)
    assert metrics["aggregation_error"] == pytest.approx(
        float(lost.norm() / added(exact.params).norm()), rel=1e-9
    )


def test_a_stacked_download_is_no_longer_than_its_rows(drive: Drive) -> None:
    algorithm = FedLoRA(Stack(), ranks=Ranks(4, {"phone": 2}, 400, {2: 2.0, 4: 1.0}))
    draw = torch.Generator().manual_seed(1)
    wide = {A: torch.zeros(404, 300), B: torch.zeros(200, 404)}
    wide[A][:4] = torch.randn(4, 300, generator=draw)
    state = algorithm.init(wide, 0)
    round = round_of(1, ["c0", "c1", "c2"])  # ranks 2, 4, 4
    replies = []
    for client, payload in algorithm.broadcast(state, round).items():
        task = Task("train", 1, client, int(client[1:]), TIERS[client], payload)
        replies.append(rehearse(algorithm, task, noise=0.1))
    state, _ = algorithm.server_update(state, round, iter(replies))
    assert state.used == 2 + 4 + 4
    task = Task("train", 2, "c2", 0, TIERS["c2"], algorithm.broadcast(state, round)["c2"])
    rows = (2 + 4 + 4) * (200 + 300) + 4 * 300  # the pair, and the A that begins anew
    assert len(encode_task(task, settings=WireSettings())) <= 4 * rows + 600


def test_slices_put_back_are_the_space() -> None:
    params = space(5, most=4)
    params = {n: torch.randn_like(t) for n, t in params.items()}
    pieces = learning(params, 4), frozen(params, most=4, used=5)
    assert equal(whole(*pieces, most=4, side=5), params)
    alone = space()
    assert learning(alone, 8) is alone
    assert whole(alone, {}, most=8, side=0) is alone


# --- on a model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rule", [Stack(), Residual()], ids=["stack", "residual"])
def test_logits_are_those_of_a_model_with_the_dense_sum(
    rule: Aggregate, rslora: bool, tiny_llama: Any
) -> None:
    tune = LoRA(
        rank=8,
        alpha=12,
        rslora=rslora,
        targets=["q_proj", "down_proj"],
        origin="zero",
        ranks={"phone": 2, "laptop": 4},
        side=16,
    )
    model = tiny_llama().requires_grad_(False)
    dense = {n: p.clone() for n, p in model.named_parameters()}
    built = tune.make_space(Base(model, None, "random"), seed=1)
    algorithm = FedLoRA(rule, ranks=tune.adapters)
    state = algorithm.init(built.start(), 0)
    round = round_of(1, ["c0", "c1", "c2"])
    sent = algorithm.broadcast(state, round)
    replies = []
    for client, weight in (("c0", 1.0), ("c1", 2.0), ("c2", 3.0)):
        task = Task("train", 1, client, int(client[1:]), TIERS[client], sent[client])
        reply = replace(rehearse(algorithm, task, noise=0.05), weight=weight)
        replies.append(reply)
        assert algorithm.ranks
        for name, delta in reply.upload["delta"].items():
            if "lora_B" not in name:
                continue
            partner = name.replace("lora_B", "lora_A")
            gain = algorithm.ranks.gains[delta.shape[1]]
            a = sent[client]["params"][partner] + reply.upload["delta"][partner]
            b = (sent[client]["params"][name] + delta) / gain
            own = 12 / len(a) ** (0.5 if rslora else 1)
            dense[name.replace(".lora_B", "")] += weight / 6 * own * (b @ a)
    state, _ = algorithm.server_update(state, round, iter(replies))
    ids = torch.arange(10)[None]
    with torch.no_grad():
        built.load(state.params)
        found = built.model(input_ids=ids).logits
        plain = tiny_llama()
        before = plain(input_ids=ids).logits
        plain.load_state_dict(dense)
        wanted = plain(input_ids=ids).logits
    assert float((found - wanted).abs().max()) < 1e-5
    assert float((before - wanted).abs().max()) > 1e-2


@pytest.mark.parametrize("rule", [Stack(), Residual(), SVD()], ids=["stack", "residual", "svd"])
def test_transposed_layers_are_summed_as_others_are(rule: Aggregate) -> None:
    """GPT-2 keeps weights as (in, out), where code that transposes a dense sum is right and elsewhere wrong."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 64}
            config = GPT2Config(**shape, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
            return GPT2LMHeadModel(config).eval().requires_grad_(False)

    # As wide as the layers of (16, 48) and (16, 16) allow, so that the sum of two ranks fits into svd's too.
    side = 8 if rule.beside else 0
    tune = LoRA(rank=8, alpha=12, targets=["c_attn", "c_proj"], origin="zero", side=side)
    model, plain = gpt2(), gpt2()
    dense = {n: p.clone() for n, p in model.named_parameters()}
    built = tune.make_space(Base(model, None, "random"), seed=1)
    algorithm = FedLoRA(rule, ranks=ranks(side))
    state = algorithm.init(built.start(), 0)
    round = round_of(1, ["c0", "c1"])
    replies = []
    for client, download in algorithm.broadcast(state, round).items():
        task = Task("train", 1, client, int(client[1:]), TIERS[client], download)
        replies.append(replace(rehearse(algorithm, task, noise=0.1), weight=1.0))
        for name, delta in replies[-1].upload["delta"].items():
            if "lora_B" in name:
                partner = name.replace("lora_B", "lora_A")
                a = download["params"][partner] + replies[-1].upload["delta"][partner]
                added = 0.5 * 12 / 8 * ((download["params"][name] + delta) @ a)
                dense[name.replace(".lora_B", "")] += added.T
    state, metrics = algorithm.server_update(state, round, iter(replies))
    assert metrics["aggregation_error"] < 1e-6
    ids = torch.arange(10)[None]
    with torch.no_grad():
        built.load(state.params)
        found, before = built.model(input_ids=ids).logits, plain(input_ids=ids).logits
        plain.load_state_dict(dense, strict=False)
        wanted = plain(input_ids=ids).logits
    assert float((found - wanted).abs().max()) < 1e-5
    assert float((before - wanted).abs().max()) > 1e-2


# --- recipes -------------------------------------------------------------------------------------

TIERED = {"num_clients": 4, "tiers": {"phone": 0.5, "desk": 0.5}}


def recipe_of(
    make: Callable[..., Recipe], aggregate: Any, lora: Mapping[str, Any], **more: Any
) -> Recipe:
    return make(
        algorithm={"fedlora": {"aggregate": aggregate}},
        tune={"lora": {"rank": 4, "origin": "zero", **lora}},
        **more,
    )


def test_a_recipe_fills_in_the_ranks_and_does_not_write_them_down(small_recipe: Any) -> None:
    recipe = recipe_of(small_recipe, "svd", {"ranks": {"phone": 2}, "rslora": True}, data=TIERED)
    assert isinstance(recipe.algorithm, FedLoRA)
    found = recipe.algorithm.ranks
    assert found is not None
    assert (found.most, found.tiers, found.side) == (4, {"phone": 2}, 0)
    assert found.gains == pytest.approx({r: (4 / r) ** 0.5 for r in (1, 2, 3, 4)})
    assert "ranks" not in to_tree(recipe)["algorithm"][0]["fedlora"]
    assert build_recipe(to_tree(recipe)) == recipe
    assert "aggregate" in to_yaml(recipe)


@pytest.mark.parametrize(
    ("aggregate", "lora", "said"),
    [
        ("mean", {"ranks": {"phone": 2}}, "aggregate mean adds up factors of one rank"),
        ("stack", {}, "aggregate stack keeps what it adds up in a frozen pair"),
        ("residual", {}, "set tune.lora.side"),
        ("svd", {"side": 4}, "tune.lora.side has no effect with fedlora.aggregate svd"),
        (
            "svd",
            {"ranks": {"robot": 2}},
            "tune.lora.ranks.robot is for a tier that no client is of: data.tiers has phone, desk",
        ),
        ("svd", {"dora": True}, "in tune: lora without dora only"),
        (
            "svd",
            {"ranks": {"phone": 5}},
            "tune.lora.ranks.phone must be from 1 to tune.lora.rank, which is 4, got 5",
        ),
        ("svd", {"ranks": {"phone": 0}}, "must be from 1 to tune.lora.rank"),
        ("svd", {"side": -1}, "tune.lora.side must be at least 0, got -1"),
        (
            "svd",
            {"dora": True, "side": 2},
            "tune.lora.side must be left out where tune.lora.dora is true",
        ),
        (
            "svd",
            {"init": "pissa", "ranks": {"phone": 2}},
            "tune.lora.ranks must be left out where tune.lora.init is pissa: without all of its start",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(
    aggregate: str, lora: dict[str, Any], said: str, small_recipe: Any
) -> None:
    with pytest.raises((ValueError, RecipeError), match=said):
        recipe_of(small_recipe, aggregate, lora, data=TIERED)


def test_ranks_without_tiers_and_without_fedlora_are_refused(small_recipe: Any) -> None:
    with pytest.raises(ValueError, match=r"no client is of: data\.tiers has none"):
        recipe_of(small_recipe, "svd", {"ranks": {"phone": 2}})
    for setting in ({"ranks": {"phone": 2}}, {"side": 2}):
        with pytest.raises(
            ValueError, match="has no effect with an algorithm that does not add up"
        ):
            small_recipe(tune={"lora": {"rank": 4, **setting}}, data=TIERED)


def test_ranks_are_no_setting_of_the_algorithm(small_recipe: Any) -> None:
    with pytest.raises(RecipeError, match="ranks"):
        small_recipe(
            algorithm={"fedlora": {"ranks": {"most": 4}}}, tune={"lora": {"origin": "zero"}}
        )


@pytest.mark.parametrize("rule", [SVD(), Residual()], ids=["svd", "residual"])
def test_a_private_sum_is_refused_with_the_reason(rule: Aggregate) -> None:
    with pytest.raises(
        ValueError,
        match="reads the mean of uploads, got FedLoRA, which reads each: only a mean bounds",
    ):
        Private(FedLoRA(rule), clip=1.0, noise_multiplier=1.0)


def test_one_mask_or_one_row_for_clients_of_several_ranks_is_refused() -> None:
    by_tier = FedLoRA(ranks=ranks())
    with pytest.raises(ValueError, match=r"prune keeps one mask .* got tune\.lora\.ranks, side or"):
        Prune(by_tier)
    assert Prune(by_tier, regrow=True).inner is by_tier
    with pytest.raises(ValueError, match=r"mode paper compares .* got tune\.lora\.ranks, side or"):
        Clustered(by_tier, Paper(2))
    assert Clustered(FedLoRA(ranks=ranks(most=8)), Auto(2)).inner == by_tier
    pruned = FedLoRA(Pad(), prune=RankPruning(), ranks=ANY)
    for share in (Sharing(["lora_A"]), Sharing(mix=0.5), Sharing(temperature=1.0)):
        with pytest.raises(ValueError, match=r"blend models in .* fedlora\.prune cuts them"):
            Clustered(pruned, share=share)
    assert Clustered(pruned).inner == pruned


def test_spaces_without_known_factors_are_refused() -> None:
    with pytest.raises(ValueError, match="a space without a layer that has both"):
        FedLoRA().init({"w": torch.zeros(3)}, 0)
    with pytest.raises(ValueError, match=r"needs tune\.lora\.origin zero"):
        FedLoRA().init({A: torch.zeros(4, 3), B: torch.zeros(3, 4)}, 0)
    with pytest.raises(ValueError, match="without freeze around fedlora"):
        Freeze(FedLoRA()).init(space(), 0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FedLoRA(mu=-1), "fedlora.mu must be >= 0, got -1"),
        (lambda: FedLoRA(weighting="size"), "fedlora.weighting must be examples or uniform"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_cannot_be_meant_are_refused(make: Callable[[], FedLoRA], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_ranks_above_a_layer_s_size_are_refused(tiny_llama: Any) -> None:
    base = Base(tiny_llama(hidden=32).requires_grad_(False), None, "random")
    with pytest.raises(
        ValueError, match=r"tune.lora.rank must be at most 32, the size of .* got 33"
    ):
        LoRA(rank=33).make_space(base, seed=1)
    with pytest.raises(ValueError, match=r"tune.lora.rank \+ side must be at most 32, .* got 40"):
        LoRA(rank=8, side=32).make_space(base, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_of_eight_clients_of_four_ranks_the_nearest_sum_learns_more_than_padded_means(
    seed: int, tmp_path: Path
) -> None:
    """On the bundled model, tasks shared out unevenly; both runs have the same data and draws."""
    tiers = dict.fromkeys(("tablet", "phone", "laptop", "desk"), 0.25)
    shares = {"dirichlet": {"by": "task", "alpha": 0.5}}
    data = {"num_examples": 400, "num_clients": 8, "max_length": 64, "tiers": tiers}
    sizes = {"tablet": 2, "phone": 4, "laptop": 8}
    ends = {}
    for rule in ("svd", "pad"):
        recipe = build_recipe(
            {
                "name": "x",
                "algorithm": {"fedlora": {"aggregate": rule}},
                "tune": {"lora": {"rank": 16, "ranks": sizes, "alpha": 32, "origin": "zero"}},
                "data": {**data, "partition": shares, "seed": seed},
                "local": {"optimizer": "adamw", "lr": 4e-3, "steps": 8, "batch_size": 4},
                "evaluation": {"every": 3, "generate": False, "validation": False},
                "run": {"rounds": 3, "seed": seed},
            }
        )
        summary = experiment.run(recipe, tmp_path / rule).summary
        lines = MetricsLog.read(tmp_path / rule / "metrics.jsonl").lines
        errors = [line["server/aggregation_error"] for line in lines if line["round"]]
        ends[rule] = summary["final"]["test/loss"], errors
    assert ends["svd"][0] <= ends["pad"][0]
    assert ends["svd"][1][0] < ends["pad"][1][0]


@pytest.mark.parametrize("rule", [Stack(), Residual()], ids=["stack", "residual"])
def test_the_frozen_pair_is_the_servers_in_personal_models_too(
    rule: Aggregate, drive: Drive
) -> None:
    inner, state = made(rule)
    algorithm = Ditto(inner, 0.1)
    memories: dict[str, Payload] = {client: {} for client in TIERS}
    for number in (1, 2, 3):
        round = round_of(number, list(TIERS))
        replies = []
        for client, download in algorithm.broadcast(state, round).items():
            task = Task("train", number, client, 0, TIERS[client], download)
            half = algorithm.client_update(task, memories[client])
            reply, memories[client], asked = drive(half, moving(client))
            shared, own = inner.deployed(download, {}), memories[client]["ditto"]
            assert torch.equal(own[A][8:], shared[A][8:])
            assert torch.equal(own[B][:, 8:], shared[B][:, 8:])
            assert not torch.equal(own[A][:8], shared[A][:8])
            assert (asked[-1].mask is None) == (number == 1)
            replies.append(reply)
        state, _ = algorithm.server_update(state, round, iter(replies))
        assert state.used


ANY = Ranks(8, {"phone": 2, "laptop": 4}, 0, {r: 8 / r for r in range(1, 9)})


def test_a_client_that_gives_up_columns_is_added_up_and_sent_without_them(drive: Drive) -> None:
    """HetLoRA's pruning: c2, of rank 8, lets its last columns shrink in round 2; c5 does not."""
    algorithm = FedLoRA(Pad("examples"), prune=RankPruning(0.7, 0.2), ranks=ANY)
    state = algorithm.init(space(), 0)
    replies, works = replies_of(algorithm, state, round_of(1, ["c2", "c5"]), drive)
    assert [work.tail for work in works] == [Tail(0.2, ((A, B),), 5, 8)] * 2
    state, metrics = algorithm.server_update(state, round_of(1, ["c2", "c5"]), iter(replies))
    assert (state.ranks, metrics["mean_rank"]) == ({"c2": 8, "c5": 8}, 8.0), "B began at zero"

    def by(factor: float) -> Callable[[Any], Done]:
        def run(work: Any) -> Done:
            moved = {n: t + 0.1 for n, t in work.start.items()}
            moved[A][5:], moved[B][:, 5:] = (
                work.start[A][5:] * factor,
                work.start[B][:, 5:] * factor,
            )
            return Done(moved, 1, 1)

        return run

    round, replies = round_of(2, ["c2", "c5"]), []
    for client, download in algorithm.broadcast(state, round).items():
        task = Task("train", 2, client, 0, TIERS[client], download)
        reply, _, _ = drive(algorithm.client_update(task, {}), by(0.9 if client == "c2" else 1.1))
        assert reply.upload["delta"][A].shape == (8, IN)
        replies.append(reply)
    assert [int(reply.upload["rank"]["rank"]) for reply in replies] == [5, 8]
    assert not bool(replies[0].upload["delta"][A][5:].any())
    after, metrics = algorithm.server_update(state, round, iter(replies))
    assert (after.ranks, metrics["mean_rank"]) == ({"c2": 5, "c5": 8}, 6.5)
    # Zeros in the place of c2's last columns, not what it had of them: the mean is half of what c5 has.
    for name, own in ((A, slice(5, 8)), (B, (slice(None), slice(5, 8)))):
        assert torch.allclose(after.params[name][own], 1.1 * state.params[name][own] / 2)
    sent = algorithm.broadcast(after, round_of(3, ["c2", "c5", "c8", "c0"]))
    assert [len(sent[c]["params"][A]) for c in ("c2", "c5", "c8", "c0")] == [5, 8, 8, 2]
    task = Task("train", 3, "c2", 0, TIERS["c2"], sent["c2"])
    reply, _, (work,) = drive(algorithm.client_update(task, {}), by(1.0))
    assert (work.gain, work.tail) == (8 / 5, Tail(0.2, ((A, B),), 3, 5))
    assert reply.upload["delta"][B].shape == (OUT, 5)


def test_a_rank_that_a_client_cannot_have_is_not_believed(drive: Drive) -> None:
    algorithm = FedLoRA(Pad(), prune=RankPruning(0.7), ranks=ANY)
    state = algorithm.init(space(), 0)
    round = round_of(1, ["c2", "c5"])
    replies, _ = replies_of(algorithm, state, round, drive)
    lying = [
        replace(reply, upload={**reply.upload, "rank": {"rank": torch.tensor(said)}})
        for reply, said in zip(replies, (0, 100), strict=True)
    ]
    state, _ = algorithm.server_update(state, round, iter(lying))
    assert state.ranks == {"c2": 8, "c5": 8}


def test_a_client_has_its_rank_in_its_cluster_and_begins_anew_in_another() -> None:
    algorithm = Clustered(FedLoRA(Pad(), prune=RankPruning(0.7), ranks=ANY), Auto(2))
    state = algorithm.init(space(), 0)
    cut = replace(state.global_state, ranks={"c2": 5})
    for cluster, rank in ((0, 5), (1, 8)):
        state = replace(
            state,
            cluster_states={0: cut, 1: state.global_state},
            grouping=Grouping(assignment={"c2": cluster, "c5": 1}),
        )
        sent = algorithm.broadcast(state, round_of(3, ["c2", "c5"]))
        assert [len(sent[c]["params"][A]) for c in ("c2", "c5")] == [rank, 8]


def test_beneath_flasc_columns_whose_b_is_not_sent_are_kept(drive: Drive) -> None:
    plain = FedLoRA(Pad(), prune=RankPruning(0.7), ranks=ANY)
    smaller = {**space(), B: torch.full((OUT, 8), 0.01, dtype=torch.float64)}
    shrunk: Callable[[Any], Done] = lambda work: Done(  # noqa: E731
        {n: 0.5 * t for n, t in work.start.items()}, 1, 1
    )
    for algorithm, rank in ((plain, 5), (Flasc(plain, download=Density(0.1)), 8)):
        state = algorithm.init(smaller, 0)
        download = algorithm.broadcast(state, round_of(2, ["c2"]))["c2"]
        task = Task("train", 2, "c2", 0, TIERS["c2"], download)
        reply, _, _ = drive(algorithm.client_update(task, {}), shrunk)
        assert int(reply.upload["rank"]["rank"]) == rank


@pytest.mark.parametrize("rule", ["mean", "stack"])
def test_columns_are_given_up_only_where_clients_go_on_from_them(rule: str) -> None:
    with pytest.raises(RecipeError, match=rf"fedlora.prune needs .*, got .* {rule}: take pad"):
        build_recipe({"algorithm": {"fedlora": {"aggregate": rule, "prune": {}}}, "name": "x"})


def test_pruned_ranks_need_adapters_in_one_piece() -> None:
    tree = {
        "name": "x",
        "algorithm": {"fedlora": {"aggregate": "pad", "prune": {"gamma": 0.9}}},
        "tune": {"lora": {"origin": "zero"}},
    }
    algorithm: Any = build_recipe(tree).algorithm
    assert algorithm.prune == RankPruning(0.9)
    with pytest.raises(RecipeError, match=r"lose columns by fedlora.prune: leave that out"):
        build_recipe({**tree, "worker": {"shards": 2}})
