"""A Hugging Face trainer as the local trainer: it starts, steps and ends where it is asked to, or the reason is said."""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch

from fedloom.client.hf_trainer import HuggingFaceTrainer, LocalRound, hf_trainer
from fedloom.client.setup import Setup, TrainerParts
from fedloom.core.protocols import ClientError, Evaluate, Fit, Job, Params, Proximal, Tail
from fedloom.data.federation import Federation
from fedloom.data.tokens import IGNORED
from fedloom.models.introspection import forgets_activations

# Takes seconds to import, which every process that collects tests would pay.
if TYPE_CHECKING:
    from transformers import TrainingArguments


def collate(rows: Any) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([[*row[name], *[fill] * (width - len(row[name]))] for row in rows])

    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED)}


def arguments(local: LocalRound, **changes: Any) -> "TrainingArguments":
    from transformers import TrainingArguments

    known: dict[str, Any] = {
        "output_dir": str(local.folder),
        "max_steps": local.steps,
        "seed": local.seed,
        "learning_rate": local.lr,
        "per_device_train_batch_size": 32,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**known, **changes})


def made(local: LocalRound, *, model: Any = None, **changes: Any) -> Any:
    from transformers import Trainer

    return Trainer(
        model=local.model if model is None else model,
        args=arguments(local, **changes),
        train_dataset=local.rows,
        data_collator=collate,
    )


def wrapped(bench: Any, make: Callable[[LocalRound], Any] = made) -> HuggingFaceTrainer:
    trainer = bench.trainer
    parts = TrainerParts(trainer.setup, None, trainer)
    found = hf_trainer(make)(parts)
    assert isinstance(found, HuggingFaceTrainer)
    return found


@pytest.fixture
def plain(bench: Callable[..., Any]) -> Any:
    """Return a bench of one client at a time whose steps take all rows."""
    return bench(steps=3, batch_size=32, lr=0.5, optimizer="sgd", batched="off")


def job(plain: Any, client: str = "c3", **work: Any) -> Job:
    return Job(client, 1, 2**40 + 7, Fit(plain.space.start(), **work))


def test_steps_of_all_rows_end_where_our_own_trainer_ends(
    plain: Any, distance: Callable[[Params, Params], float]
) -> None:
    # FedEx's arms multiply the learning rate.
    (ours,) = plain.trainer.run([job(plain, lr_factor=0.5)])
    (theirs,) = wrapped(plain).run([job(plain, lr_factor=0.5)])
    assert ours.lr_sum == 3 * 0.5 * 0.5
    assert distance(ours.params, plain.space.start()) > 1e-3
    assert distance(ours.params, theirs.params) < 1e-7  # its losses are float32
    assert (theirs.num_examples, theirs.num_steps, theirs.lr_sum) == (9, 3, None)
    assert theirs.metrics["num_tokens"] == ours.metrics["num_tokens"]
    assert theirs.metrics["loss"] == pytest.approx(ours.metrics["loss"], rel=1e-4)


def test_a_round_begins_at_its_start_whatever_came_before_and_a_repeat_is_equal(plain: Any) -> None:
    trainer = wrapped(plain, lambda local: made(local, per_device_train_batch_size=2))
    first, other, again = trainer.run([job(plain), job(plain, "c5"), job(plain)])
    assert all(torch.equal(first.params[name], again.params[name]) for name in first.params)
    assert any(not torch.equal(first.params[name], other.params[name]) for name in first.params)


def test_steps_of_the_work_count_before_the_recipes(plain: Any) -> None:
    (done,) = wrapped(plain).run([job(plain, steps=1)])
    assert done.num_steps == 1


def test_what_is_to_be_measured_is_measured_by_our_own(plain: Any, evaluator: Any) -> None:
    start = plain.space.start()
    measured, fitted = wrapped(plain).run([Job("c1", 1, 5, Evaluate(start, "test")), job(plain)])
    assert evaluator.asked == [(1, "test")]
    assert measured.params == {}
    assert fitted.num_steps == 3


def _generators() -> tuple[Any, list[int], torch.Tensor]:
    state: Any = numpy.random.get_state()  # noqa: NPY002
    return random.getstate(), state[1].tolist(), torch.get_rng_state()


def test_generators_modes_and_gradients_are_left_as_they_were(plain: Any) -> None:
    before = _generators()
    wrapped(plain).run([job(plain)])
    after = _generators()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])
    assert not plain.space.model.training
    assert all(parameter.grad is None for parameter in plain.space.model.parameters())


OTHERS: Mapping[str, tuple[Callable[[Any, LocalRound], Any], str]] = {
    "fewer steps": (
        lambda plain, local: made(local, max_steps=2),
        r"max_steps must be round.steps \(3\), got 2",
    ),
    "another seed": (
        lambda plain, local: made(local, seed=1),
        r"seed must be round.seed \(7\), got 1",
    ),
    "another model": (
        lambda plain, local: made(local, model=torch.nn.Linear(2, 2)),
        "holds another model than it was given",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_trainer_that_does_something_else_is_refused(plain: Any, name: str) -> None:
    make, message = OTHERS[name]
    with pytest.raises(ValueError, match=message):
        wrapped(plain, lambda local: make(plain, local)).run([job(plain)])


def test_a_trainer_that_stops_early_is_refused(plain: Any) -> None:
    def make(local: LocalRound) -> Any:
        trainer = made(local)
        inner = trainer.training_step

        def step(*args: Any, **kwargs: Any) -> Any:
            trainer.control.should_training_stop = True
            return inner(*args, **kwargs)

        trainer.training_step = step
        return trainer

    with pytest.raises(ValueError, match=r"took 1 steps where 3 were asked for"):
        wrapped(plain, make).run([job(plain)])


def test_a_trainer_that_lets_more_learn_is_refused(plain: Any) -> None:
    def make(local: LocalRound) -> Any:
        next(p for p in local.model.parameters() if not p.requires_grad).requires_grad_(True)
        return made(local)

    with pytest.raises(ValueError, match="changed which parameters of the model learn"):
        wrapped(plain, make).run([job(plain)])


@pytest.mark.parametrize(
    ("asked", "whose"),
    [
        ({"proximal": Proximal(0.1, {})}, "a proximal term, for which FedProx"),
        ({"gradient_offset": {}}, "a gradient offset, for which SCAFFOLD"),
        ({"mask": {}}, "a mask of the gradient, for which freeze"),
        ({"tail": Tail(0.1, (), 0, 1)}, "a pull of the last columns, for which fedlora.prune"),
        ({"seed_sequence": {}}, "a seed sequence, for which FedKSeed"),
        ({"decay_factor": 0.0}, "another weight decay, for which FedEx"),
    ],
)
def test_work_that_it_has_no_place_for_is_refused(plain: Any, asked: Any, whose: str) -> None:
    with pytest.raises(ValueError, match=f"cannot honour {whose}"):
        wrapped(plain).run([job(plain, **asked)])


def test_packed_rows_are_refused(plain: Any) -> None:
    setup: Setup[Any] = plain.trainer.setup
    shard = setup.federation.shards["c3"]
    packed = [replace(row, positions=torch.arange(len(row.ids))) for row in shard.train]
    shards = {**setup.federation.shards, "c3": replace(shard, train=packed)}
    federation: Federation = replace(setup.federation, shards=shards)
    parts = TrainerParts(replace(setup, federation=federation), None, plain.trainer)
    with pytest.raises(ValueError, match=r"data\.packing must be false"):
        hf_trainer(made)(parts).run([job(plain)])


def test_weights_that_are_not_finite_are_that_clients_failure(plain: Any) -> None:
    with pytest.raises(ClientError, match="c3: its trainer left weights that are not finite"):
        wrapped(plain, lambda local: made(local, learning_rate=1e300)).run([job(plain)])


def test_checkpointing_that_a_trainer_switched_on_is_off_again(plain: Any) -> None:
    wrapped(plain, lambda local: made(local, activation_checkpointing=True)).run([job(plain)])
    assert not forgets_activations(plain.space.model)
