"""The reference model of objectives that compare: computed once, equal to the model without what is tuned."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fedloom.client import references as module
from fedloom.client.local_settings import LocalSettings
from fedloom.client.references import References
from fedloom.core.protocols import Fit, Job
from fedloom.data.tokens import Example
from fedloom.evaluation.evaluation_settings import EvaluationSettings
from fedloom.evaluation.measure import Evaluator
from fedloom.objectives.dpo import DPO
from fedloom.objectives.forward import Forward
from fedloom.objectives.kto import KTO
from fedloom.objectives.objective import Objective
from fedloom.objectives.preference import AnswerBatch
from fedloom.spaces.lora import LoRA
from fedloom.spaces.seed_space import Seeds
from fedloom.spaces.tune import Tune
from fedloom.testing.bench import Bench, drawn_start, make_bench

TUNES: dict[str, Tune] = {"lora": LoRA(rank=4), "seeds": Seeds(num_seeds=64)}


def a_bench(objective: Objective, tune: str = "lora", **local: Any) -> Bench:
    settings = {"optimizer": "sgd", "lr": 0.1, "steps": 3, "batch_size": 2, **local}
    return make_bench(TUNES[tune], LocalSettings(**settings), objective=objective, num_clients=4)


def fitted(bench: Bench, number: int = 1, clients: tuple[str, ...] = ("c0", "c1", "c3")) -> Any:
    start = bench.space.start()
    jobs = [Job(client, number, 7, Fit(start)) for client in clients]
    return bench.trainer.run(jobs)


def alone(forward: Forward, example: Example) -> list[Tensor]:
    """Return the log-likelihoods of an example's answers, the model as it stands."""
    like = next(forward.model.parameters())
    with torch.no_grad():
        batch = DPO().batch([[example]], [1], like, pack=False)
        assert isinstance(batch, AnswerBatch)
        return batch.token_log_probs(forward)


@pytest.mark.parametrize("tune", TUNES)
def test_what_is_kept_is_what_the_model_without_what_is_tuned_says_to_the_bit(tune: str) -> None:
    bench = a_bench(DPO(), tune)
    examples = bench.federation.shards["c3"].train
    moved = drawn_start(bench.space, 1)
    bench.space.load(moved)
    stood = bench.space.values.clone()
    references = References.of(bench.space, DPO())
    assert references is not None
    kept = references.carried(examples)
    assert torch.equal(bench.space.values, stood)
    forward = Forward.of(bench.space.model.eval())
    bench.space.load(bench.space.start())
    for example in kept:
        for row, now in zip(example.answers, alone(forward, example), strict=True):
            assert row.reference is not None
            assert torch.equal(row.reference, now)


def test_an_adapter_that_is_switched_off_says_the_same_to_the_bit() -> None:
    from peft.tuners.lora import LoraLayer

    bench = a_bench(DPO())
    bench.space.load(drawn_start(bench.space, 1))
    references = References.of(bench.space, DPO())
    assert references is not None
    kept = references.carried(bench.federation.shards["c2"].train)
    layers = [m for m in bench.space.model.modules() if isinstance(m, LoraLayer)]
    assert layers
    for layer in layers:
        layer.enable_adapters(enabled=False)
    forward = Forward.of(bench.space.model.eval())
    for example in kept:
        for row, now in zip(example.answers, alone(forward, example), strict=True):
            assert row.reference is not None
            assert torch.equal(row.reference, now)


def test_a_client_computes_them_once_for_all_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = a_bench(DPO())
    measured: list[int] = []
    plain = References._measure_

    def counted(self: References, known: Any, examples: list[Example], at: Any) -> None:
        measured.append(len(examples))
        plain(self, known, examples, at)

    monkeypatch.setattr(module.References, "_measure_", counted)
    for number in (1, 2, 3):
        fitted(bench, number)
    first = sum(measured)
    assert first == len(
        {e.key for c in ("c0", "c1", "c3") for e in bench.federation.shards[c].train}
    )
    fitted(bench, 4)
    assert sum(measured) == first


def test_the_reference_of_the_download_is_computed_every_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = a_bench(DPO(reference="download"))
    begun: list[Any] = []
    plain = References._measure_

    def seen(self: References, known: Any, examples: list[Example], at: Any) -> None:
        begun.append(at)
        plain(self, known, examples, at)

    monkeypatch.setattr(module.References, "_measure_", seen)
    start = drawn_start(bench.space, 2)
    (done,) = bench.trainer.run([Job("c1", 1, 7, Fit(start))])
    assert begun[0] is start
    bench.trainer.run([Job("c1", 2, 7, Fit(done.params))])
    assert [at is done.params for at in begun] == [False, True]


@pytest.mark.parametrize("batched", ["off", "auto"])
@pytest.mark.parametrize("objective", [DPO(), DPO(reference="download"), KTO()])
def test_a_model_that_stands_still_loses_log_two_in_every_round(
    objective: Objective, batched: str
) -> None:
    """With a step too small to be seen; a reference that drifts along would not show here, one that stays behind would."""
    bench = a_bench(objective, lr=1e-30, batched=batched)
    expected = math.log(2) if isinstance(objective, DPO) else 0.5
    for number in (1, 2, 3):
        for done in fitted(bench, number):
            assert done.metrics["loss"] == pytest.approx(expected, abs=1e-6)


def test_a_reference_stays_where_it_is_while_the_model_moves() -> None:
    """From a start that has moved the loss is not log 2, unless the reference is the download."""
    losses = {}
    for reference in ("base", "start", "download"):
        bench = a_bench(DPO(reference=reference), lr=1e-30)
        (done,) = bench.trainer.run([Job("c3", 1, 7, Fit(drawn_start(bench.space, 1)))])
        losses[reference] = done.metrics["loss"]
    assert losses["base"] == losses["start"]
    assert abs(losses["base"] - math.log(2)) > 1e-4
    assert losses["download"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("objective", [DPO(), KTO(), DPO(loss="ipo")])
def test_before_training_rewards_are_zero_to_the_bit(objective: Any) -> None:
    bench = a_bench(objective)
    examples = [e for shard in bench.federation.shards.values() for e in shard.train]
    evaluator = Evaluator(
        EvaluationSettings(generate=False, batch_size=8),
        None,  # type: ignore[arg-type]  # nothing is written
        objective,
        references=References.of(bench.space, objective),
    )
    found = evaluator.measure(bench.space.model, examples, split="test")
    assert found["preference_margin"] == 0.0
    assert found["chosen_drift"] == found["rejected_drift"] == found["reference_kl"] == 0.0
    assert found["preference_accuracy"] == 0.5
    assert found["num_pairs"] == len(examples) * (2 if isinstance(objective, KTO) else 1)
    bench.space.load(drawn_start(bench.space, 1))
    moved = evaluator.measure(bench.space.model, examples, split="test")
    assert moved["reference_kl"] > 0
    assert moved["preference_margin"] != 0.0


@pytest.mark.parametrize("objective", [DPO(), KTO()])
def test_what_a_measured_batch_carries_is_asked_once_and_whatever_shares_it_is_nearly_the_same(
    objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = a_bench(objective)
    every = (e for shard in bench.federation.shards.values() for e in shard.train)
    examples = [*{example.key: example for example in every}.values()][:16]
    references = References.of(bench.space, objective)
    assert references is not None
    asked: list[int] = []
    plain = AnswerBatch.token_log_probs

    def counted(self: AnswerBatch, forward: Forward) -> list[Tensor]:
        asked.append(len(self.answers))
        return plain(self, forward)

    monkeypatch.setattr(AnswerBatch, "token_log_probs", counted)
    few, many = (references.together(examples, size) for size in (1, 8))
    assert sum(asked) == 2 * sum(len(e.sequences) for e in examples)
    assert max(asked) == 16
    # Of the same batches once more; of others anew.
    asked.clear()
    again = references.together(examples, 8)
    assert not asked
    references.together(examples[1:], 8)
    assert asked
    for one, other, same in zip(few, many, again, strict=True):
        for row, beside, kept in zip(one.sequences, other.sequences, same.sequences, strict=True):
            assert row.reference is not None
            assert beside.reference is not None
            assert len(row.reference) == row.num_own_targets
            assert (row.reference - beside.reference).abs().max() < 1e-5
            assert kept.reference is beside.reference


@pytest.mark.parametrize("order", ["first", pytest.param("zeroth", marks=pytest.mark.slow)])
def test_a_loss_of_pairs_falls_in_training(order: str) -> None:
    """Zeroth order along 20 directions too: in direction only."""
    more: dict[str, Any] = {"steps": 40, "batch_size": 4, "lr": 0.3}
    if order == "zeroth":
        more |= {"order": "zeroth", "directions": 20, "lr": 0.05}
    bench = a_bench(DPO(beta=0.5), **more)
    (done,) = bench.trainer.run([Job("c3", 1, 7, Fit(bench.space.start()))])
    evaluator = Evaluator(
        EvaluationSettings(generate=False),
        None,  # type: ignore[arg-type]  # nothing is written
        DPO(beta=0.5),
        references=References.of(bench.space, DPO(beta=0.5)),
    )
    bench.space.load(done.params)
    found = evaluator.measure(bench.space.model, bench.federation.shards["c3"].train, split="test")
    assert found["loss"] < math.log(2)
    assert found["preference_margin"] > 0


def test_the_divergence_of_kto_has_no_gradient() -> None:
    """What only the answers to other prompts reach learns nothing."""
    objective, bench = KTO(), a_bench(KTO())
    references = References.of(bench.space, objective)
    assert references is not None
    bench.space.load(drawn_start(bench.space, 3))
    examples = references.carried(bench.federation.shards["c2"].train)
    like = next(bench.space.model.parameters())
    batch = objective.batch([examples], [1], like, pack=False)
    asked: list[bool] = []

    class Watched(Forward):
        def losses(self, batch: Any) -> tuple[Tensor, Tensor]:
            found = Forward.losses(self, batch)
            asked.append(found[0].requires_grad)
            return found

    objective.losses(Watched(bench.space.model), batch)
    assert asked == [False, True]
    divergences = objective._divergences(Forward(bench.space.model), batch)
    assert bool((divergences >= 0).all())


def test_packed_answers_keep_their_tokens_apart(tiny_llama: Callable[..., Any]) -> None:
    """Rows that share one are summed each by itself, whoever stands first."""
    bench = a_bench(DPO())
    examples = bench.federation.shards["c3"].train
    model = tiny_llama(dtype=torch.float64)
    like, forward = next(model.parameters()), Forward.of(model)
    with torch.no_grad():
        batches = [
            DPO().batch([examples, examples[:2]], [1, 1], like, pack=pack) for pack in (False, True)
        ]
        one, many = (batch.log_probs(forward) for batch in batches)
    assert len(batches[1].ids) < len(batches[0].ids)
    assert (one - many).abs().max() < 1e-9
    assert len(one) == 2 * (len(examples) + 2)


def test_what_is_kept_is_the_same_to_the_bit_whoever_asks_first() -> None:
    """So that a run that goes on, whose memory is empty, trains as if it had never stopped."""
    kept = []
    for order in (("c3",), ("c0", "c1", "c3"), ("c3", "c0")):
        bench = a_bench(DPO())
        references = References.of(bench.space, DPO())
        assert references is not None
        for client in order:
            shard = bench.federation.shards[client]
            found = references.carried(shard.train[::-1] if client == order[0] else shard.train)
        wanted = references.carried(bench.federation.shards["c3"].train)
        assert found
        kept.append([row.reference for example in wanted for row in example.answers])
    for others in kept[1:]:
        for one, other in zip(kept[0], others, strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)
