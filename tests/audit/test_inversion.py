"""Inputs found by their gradient: of one layer exactly, of a language model's client as far as a small budget goes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fedloom import experiment
from fedloom.audit.conduct import audited
from fedloom.audit.inversion import Inversion, f1
from fedloom.audit.matching import cosine, matched, polished, squared
from fedloom.audit.records import open_case
from fedloom.rounds.recipe_settings import Recipe


def drawn(*shape: int, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def linear(x: Tensor) -> Sequence[Tensor]:
    """Return the gradient of one linear layer's squared error."""
    weight, target = drawn(4, 6, seed=0).requires_grad_(), drawn(4, seed=1)
    loss = (weight @ x - target).square().sum() / 2
    return torch.autograd.grad(loss, [weight], create_graph=True)


def test_the_input_of_one_layer_is_recovered_to_a_thousandth():
    x = drawn(6, seed=2)
    seen = [t.detach() for t in linear(x)]
    found = polished(linear, seen, 0.1 * drawn(6, seed=3), steps=200)
    assert float((found - x).abs().max()) < 1e-3
    assert float(squared(linear(found), seen).detach()) < 1e-8


def test_what_is_nearest_of_all_that_was_passed_is_returned():
    x = drawn(6, seed=2)
    seen = [t.detach() for t in linear(x)]
    start = drawn(6, seed=4)
    found, far = matched(linear, seen, start, steps=60, lr=0.1)
    assert far == pytest.approx(float(cosine(linear(found), seen).detach()))
    assert far < 0.2 * float(cosine(linear(start), seen).detach())


def test_a_bag_of_tokens_is_scored_by_what_both_have():
    assert f1(torch.tensor([1, 1, 2]), torch.tensor([1, 2, 3])) == pytest.approx(2 / 3)


@pytest.mark.slow
def test_words_of_a_clients_text_come_back_from_its_gradient(
    small_recipe: Callable[..., Recipe], tmp_path: Path
):
    tree: dict[str, Any] = {
        "audit": "record",
        "model": {"name": "builtin:tiny"},
        "tune": {"full": {}},
        "data": {"num_examples": 60, "max_length": 96},
        "local": {"steps": 1, "batch_size": 1},
        "evaluation": {"generate": False, "every": 0, "max_examples": 1},
        "run": {"rounds": 1, "samples": 0},
    }
    folder = tmp_path / "run"
    experiment.run(small_recipe(**tree), folder)
    case = open_case(folder, console=Console(quiet=True))
    console = Console(quiet=True)
    said = audited(case, {"inversion": Inversion(steps=12, lr=0.3)}, console=console)
    by = {one.measure: one for one in said.findings}
    assert by.keys() == {"token F1", "ROUGE-L"}
    assert by["token F1"].value > by["token F1"].chance + 0.1
    small = audited(case, {"inversion": Inversion(most_parameters=1000)}, console=console)
    assert "tries models of 1,000 parameters at most" in small.silent["inversion"]
    short = audited(case, {"inversion": Inversion(most_tokens=3)}, console=console)
    assert "one row of 3 tokens at most" in short.silent["inversion"]
