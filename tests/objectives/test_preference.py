"""Losses of preferences: numbers computed by hand, and what is measured."""

import math
import random
import time
from collections.abc import Sequence
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from fedloom.data.tokens import IGNORED, Example
from fedloom.objectives.dpo import DPO
from fedloom.objectives.kto import KTO
from fedloom.objectives.objective import Objective
from fedloom.objectives.orpo import ORPO
from fedloom.objectives.preference import (
    AnswerScore,
    Comparing,
    PreferenceScore,
    compared,
    score_of,
)
from fedloom.recipe import RecipeError, build_recipe, load_recipe
from fedloom.recipe_text import to_yaml
from fedloom.recipe_yaml import read_yaml

POLICY, REFERENCE = (-10.0, -14.0), (-11.0, -12.0)
MARGIN = 0.3
"""Of beta 0.1: 0.1 * ((-10 + 11) - (-14 + 12))."""


def pair(
    policy: Sequence[float] = POLICY,
    reference: Sequence[float] = REFERENCE,
    lengths: Sequence[float] = (4, 8),
) -> tuple[Tensor, Tensor, Tensor]:
    parts = (torch.tensor([each], dtype=torch.float64) for each in (policy, reference, lengths))
    log_probs, references, sizes = parts
    return log_probs, references, sizes


def test_what_answers_of_others_say_of_a_divergence_does_not_grow_with_a_ratio() -> None:
    """Log-ratios of 1, -2 and 15 nats, over three tokens."""
    row = Example(
        torch.tensor([1, 2, 3, 4]),
        torch.tensor([IGNORED, 2, 3, 4]),
        1,
        good=True,
        reference=torch.tensor([-2.0, -1.0, -20.0]),
    )
    answer = score_of(row, torch.tensor([-1.0, -3.0, -5.0]))
    assert (answer.log_prob, answer.drift, answer.num_tokens) == (-9.0, 14.0, 3)
    found = compared([PreferenceScore(0.0, 0, 3, -1, [answer])], lambda each: each.drift)
    assert found["reference_kl"] == (1 + 4 + 225) / 2 / 3


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def scored(
    *answers: tuple[float, float, int] | tuple[float, float, int, bool], loss: float = 0.0
) -> PreferenceScore:
    made = [
        AnswerScore(bool(rest[0]) if rest else at == 0, log_prob, reference, 0.0, tokens)
        for at, (log_prob, reference, tokens, *rest) in enumerate(answers)
    ]
    return PreferenceScore(loss, 0, sum(a.num_tokens for a in made), -1, made)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (DPO(), 0.554355244),
        (DPO(label_smoothing=0.1), 0.9 * 0.554355244 + 0.1 * 0.854355244),
        (DPO(loss="hinge"), 0.7),
        (
            DPO(loss="robust", label_smoothing=0.1),
            (0.9 * 0.554355244 - 0.1 * 0.854355244) / 0.8,
        ),
        # By token: (1 / 4 + 2 / 8) - 1 / (2 * 0.1).
        (DPO(loss="ipo"), (0.5 - 5.0) ** 2),
    ],
)
def test_a_pair_loses_what_was_computed_by_hand(objective: DPO, expected: float) -> None:
    assert float(objective.pair_losses(*pair())) == pytest.approx(expected, abs=1e-6)
    found = objective.losses_of([scored((-10, -11, 4), (-14, -12, 8)).answers])
    assert found == pytest.approx([expected], abs=1e-6)


def test_at_the_reference_a_pair_loses_log_two() -> None:
    losses = DPO().pair_losses(*pair(policy=REFERENCE))
    assert float(losses) == pytest.approx(math.log(2), abs=1e-12)


def test_swapped_answers_turn_the_margin_round() -> None:
    """loss(m) - loss(-m) = -m, as -log sigmoid(m) + log sigmoid(-m) is -m."""
    forth, back = pair(), pair(POLICY[::-1], REFERENCE[::-1], (8, 4))
    difference = float(DPO().pair_losses(*forth) - DPO().pair_losses(*back))
    assert difference == pytest.approx(-MARGIN, abs=1e-12)
    margins = [
        compared([scored(*each)], DPO().reward)["preference_margin"]
        for each in (
            ((-10, -11, 4), (-14, -12, 8)),
            ((-14, -12, 8), (-10, -11, 4)),
        )
    ]
    assert margins == pytest.approx([MARGIN, -MARGIN], abs=1e-12)


def test_kto_loses_what_was_computed_by_hand() -> None:
    """Drifts of 1 and -2 nats as above, z0 0.05: a divergence of half a nat, times beta."""
    drift, good = torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64), [True, False, False]
    losses = KTO().of_drifts(drift, torch.tensor(good), torch.full((3,), 0.5, dtype=torch.float64))
    first = 1 - 1 / (1 + math.exp(-(0.1 * 1 - 0.05)))
    assert losses.tolist()[0] == pytest.approx(first, abs=1e-9)
    assert losses.tolist()[0] == pytest.approx(0.487503, abs=1e-6)
    assert losses.tolist()[2] == pytest.approx(0.437823, abs=1e-6)
    weighed = KTO(good_weight=2.0, bad_weight=3.0).of_drifts(
        drift, torch.tensor(good), torch.full((3,), 0.5, dtype=torch.float64)
    )
    assert (weighed / losses).tolist() == pytest.approx([2.0, 3.0, 3.0])


def test_orpo_loses_what_was_computed_by_hand() -> None:
    """Mean log-likelihoods -0.5 and -1.5: odds p / (1 - p) of exp(-0.5) and exp(-1.5)."""
    p, q = math.exp(-0.5), math.exp(-1.5)
    ratio = math.log(p / (1 - p)) - math.log(q / (1 - q))
    expected = 0.5 - 0.1 * log_sigmoid(ratio)
    losses = ORPO().pair_losses(*pair((-2.0, -12.0), (math.nan, math.nan)))
    assert float(losses) == pytest.approx(expected, abs=1e-9)
    sure = ORPO().of_means(torch.tensor([[0.0, -1.0]], dtype=torch.float64))
    assert bool(torch.isfinite(sure).all())


@pytest.mark.parametrize(
    ("kind", "smoothing"), [("sigmoid", 0.0), ("hinge", 0.0), ("ipo", 0.0), ("robust", 0.2)]
)
def test_losses_are_those_of_trl(kind: Any, smoothing: float) -> None:
    """TRL's own loss, called on the same log-likelihoods by token, where it is installed."""
    trl = pytest.importorskip("trl.trainer.dpo_trainer", reason="TRL is not installed")
    draw = torch.Generator().manual_seed(3)
    pairs, length = 3, 9
    ids = torch.randint(0, 9, (2 * pairs, length + 1), generator=draw)
    mask = torch.ones_like(ids)
    mask[:, :3], mask[1, 7:], mask[4, 6:] = 0, 0, 0
    log_probs = -torch.rand((2 * pairs, length), generator=draw) * mask[:, 1:]
    references = -8 * torch.rand((2, pairs), generator=draw)
    outputs = MagicMock(log_probs=log_probs, aux_loss=0.0)
    for name in ("entropy", "mean_logits"):
        setattr(outputs, name, torch.zeros_like(log_probs))
    outputs.is_top1 = torch.zeros_like(log_probs, dtype=torch.bool)
    trainer = MagicMock(
        beta=0.3,
        loss_types=[kind],
        loss_weights=[1.0],
        label_smoothing=smoothing,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        use_weighting=False,
        aux_loss_enabled=False,
        _total_train_tokens=0,
        _tp_size=1,
    )
    for name in ("gather", "gather_for_metrics"):
        setattr(trainer.accelerator, name, lambda value: value)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": mask,
        "ref_chosen_logps": references[0],
        "ref_rejected_logps": references[1],
    }
    theirs = trl.DPOTrainer._compute_loss(
        trainer, lambda **_: outputs, inputs, return_outputs=False
    )
    sums, lengths = log_probs.sum(1).double(), mask[:, 1:].sum(1).double()
    ours = DPO(loss=kind, beta=0.3, label_smoothing=smoothing).pair_losses(
        sums.view(2, pairs).T, references.T.double(), lengths.view(2, pairs).T
    )
    assert float(ours.mean()) == pytest.approx(float(theirs), abs=1e-6)


def test_a_model_that_prefers_neither_is_right_half_of_the_time() -> None:
    found = compared([scored((-3, -3, 4), (-5, -5, 8))], DPO().reward)
    assert found["preference_accuracy"] == 0.5
    assert found["preference_margin"] == found["chosen_drift"] == found["rejected_drift"] == 0.0
    assert found["length_ratio"] == 1.0


def test_pairs_are_compared_and_lengths_of_what_is_preferred() -> None:
    scores = [scored((-2, -3, 4), (-5, -5, 8)), scored((-4, -3, 6), (-5, -5, 10))]
    found = compared(scores, DPO().reward)
    assert found["preference_accuracy"] == 0.5
    assert found["preference_margin"] == pytest.approx(0.0)
    assert found["chosen_drift"] == pytest.approx(0.0)
    assert found["length_ratio"] == pytest.approx((4 + 10) / (8 + 6))


def test_answers_judged_by_themselves_are_compared_each_with_each() -> None:
    scores = [
        scored((-2, -3, 4, True)),
        scored((-3, -3, 4, False)),
        scored((-1, -3, 4, False)),
    ]
    found = compared(scores, KTO().reward)
    assert found["preference_accuracy"] == 0.5
    assert found["preference_margin"] == pytest.approx(0.1 * (1 - (0 + 2) / 2))
    only = compared(scores[:1], KTO().reward)
    assert "preference_accuracy" not in only
    assert "rejected_drift" not in only
    assert only["chosen_drift"] == pytest.approx(1.0)


def test_each_with_each_is_the_same_as_all_pairs_and_millions_of_them_take_no_time() -> None:
    draw = random.Random(0)

    def answers(count: int, *, good: bool) -> list[PreferenceScore]:
        drawn = ((draw.randrange(-5, 5), 0, draw.randrange(1, 9)) for _ in range(count))
        return [scored((*each, good)) for each in drawn]

    good, bad = answers(7, good=True), answers(5, good=False)
    crossed = [PreferenceScore(0.0, 0, 0, 0, (*a.answers, *b.answers)) for a in good for b in bad]
    found, expected = compared([*good, *bad], KTO().reward), compared(crossed, KTO().reward)
    for name in ("preference_accuracy", "preference_margin", "length_ratio"):
        assert found[name] == pytest.approx(expected[name], abs=1e-12)
    many = [*answers(6000, good=True), *answers(6000, good=False)]
    began = time.process_time()
    assert compared(many, KTO().reward)["preference_accuracy"] == pytest.approx(0.5, abs=0.02)
    assert time.process_time() - began < 2


def test_the_divergence_of_kto_is_that_of_all_scores_and_never_negative() -> None:
    answers = scored((-2, -3, 4, True)).answers
    low, none, high = (
        float(KTO().metrics([PreferenceScore(0.0, 0, 4, -1, answers, other)])["loss"])
        for other in ((-5.0,), (), (5.0,))
    )
    assert low == none == pytest.approx(1 - 1 / (1 + math.exp(-0.1)))
    assert high == pytest.approx(1 - 1 / (1 + math.exp(0.4)))


def test_an_objective_without_a_reference_compares_with_nothing() -> None:
    made: list[Objective] = [DPO(), KTO(), ORPO()]
    assert all(isinstance(one, Objective) for one in made)
    assert [isinstance(one, Comparing) for one in made] == [True, True, False]
    found = compared([scored((-2, math.nan, 4), (-5, math.nan, 8))], ORPO().reward)
    assert set(found) == {"preference_accuracy", "preference_margin", "length_ratio"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"loss": "simpo"},
            r"objective\.dpo\.loss must be one of sigmoid, ipo, hinge, robust, got",
        ),
        ({"beta": 0}, r"objective\.dpo\.beta must be positive, got 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0\.5\), got 0\.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "has no effect with loss ipo"),
        ({"loss": "robust"}, "must be positive with loss robust, which is sigmoid without it"),
        ({"reference": "round0"}, "reference must be base, start or download, got round0"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DPO(**settings)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["objective=kto", "local.batch_size=1"],
            r"local\.batch_size must be at least 2 for .*kto",
        ),
        (
            ["objective=dpo", "data.packing=true"],
            r"data\.packing must be false for an objective of",
        ),
        (
            ["objective=dpo", "tune=prompt"],
            "must be start or download where tune has virtual tokens",
        ),
        (["objective.kto.beta=-1"], r"objective\.kto\.beta must be positive, got -1"),
        (["objective.orpo.beta=0"], r"objective\.orpo\.beta must be positive, got 0"),
        (["objective.kto.reference=none"], r"objective\.kto\.reference: input should be 'base'"),
    ],
)
def test_recipes_that_cannot_work_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        load_recipe("quickstart", overrides)


def test_objectives_are_written_and_read_back() -> None:
    recipe = load_recipe(
        "quickstart", ["objective={dpo: {loss: ipo, beta: 0.2, reference: start}}"]
    )
    assert recipe.objective == DPO(loss="ipo", beta=0.2, reference="start")
    assert build_recipe(read_yaml(to_yaml(recipe))) == recipe
