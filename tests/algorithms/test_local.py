from typing import Any

import pytest
import torch

from fedloom.algorithms.local import LocalOnly
from fedloom.core.payloads import NoReplies


def test_every_client_goes_on_alone_and_sends_nothing(world: Any, parabola: Any) -> None:
    place = world(LocalOnly(), [parabola(center=a) for a in (1.0, -2.0)], lr=0.5, steps=1)
    place.play(3)
    assert [reply.upload for reply in place.replies] == [{}, {}]
    assert torch.equal(place.state.params["w"], torch.zeros(1, dtype=torch.float64))
    for i, a in enumerate((1.0, -2.0)):
        assert float(place.deployed(f"c{i}")["w"]) == a * (1 - 0.5**3)


def test_a_client_that_has_not_trained_uses_what_everybody_starts_from(task: Any) -> None:
    download = task(params=[3.0]).download
    assert LocalOnly().deployed(download, {}) is download["params"]


def test_a_round_in_which_nobody_trained_is_no_round(world: Any, parabola: Any) -> None:
    with pytest.raises(NoReplies, match="no client replied"):
        world(LocalOnly(), [parabola()]).play(1, [])
