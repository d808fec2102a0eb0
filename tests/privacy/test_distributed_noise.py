"""Shares of noise: what they add up to, what they are refused for, and in how many sums a site adds them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.core.description import describe
from fedloom.core.protocols import ClientError
from fedloom.deploy.sums import NoisySums
from fedloom.engines.sums import shares_of
from fedloom.privacy.distributed_noise import LEAST_STEPS, share_in_steps, share_of
from fedloom.rounds.privacy import privacy_record
from fedloom.rounds.recipe_settings import Recipe
from fedloom.tracking.metrics_log import MetricsLog

Make = Callable[..., Recipe]
SECURE = {"threshold": 4, "clip": 1.0, "bits": 20}
PRIVATE = {"clip": 0.25, "noise_multiplier": 1.0, "noise": "distributed", "delta": 0.1}


def distributed(make: Make, secure: dict[str, Any] | None = SECURE, **private: Any) -> Recipe:
    """Return a recipe of five rounds whose clients add the noise."""
    return make(
        algorithm=[{"private": {**PRIVATE, **private}}, "fedavg"],
        cohort={"poisson": {"q": 0.9}},
        tune={"lora": {"origin": "initial"}},
        data={"num_clients": 6},
        secure=secure,
        run={"rounds": 5, "samples": 0},
    )


def test_rounded_shares_are_as_the_continuous_ones_that_they_add_up_to() -> None:
    """The characteristic function of a sum of four is that of one normal and four uniforms within a step."""
    std, count = LEAST_STEPS, 200_000
    total = sum((share_in_steps(count, std=std) for _ in range(4)), torch.zeros(count).long())
    assert total.dtype == torch.int64
    assert float(total.double().square().mean()) == pytest.approx(4 * (std**2 + 1 / 12), rel=0.015)
    for angle in (0.02, 0.05, 0.1):
        turned = (total.double() * angle).cos().mean()
        normal = torch.tensor(-4 * (std * angle) ** 2 / 2).exp()
        uniform = torch.sinc(torch.tensor(angle / (2 * torch.pi))) ** 4
        assert float(turned) == pytest.approx(float(normal * uniform), abs=5 / count**0.5)


def test_no_two_shares_are_the_same() -> None:
    one, other = (share_in_steps(1000, std=100.0) for _ in range(2))
    assert abs(float(torch.corrcoef(torch.stack([one, other]).double())[0, 1])) < 0.2


def test_a_recipe_says_how_much_each_client_adds_and_how_often(small_recipe: Make) -> None:
    shares = shares_of(distributed(small_recipe).algorithm)
    assert shares is not None
    assert shares.std == share_of(1.0 * 0.25, 4) == 0.125
    assert shares.num_sums == 5
    more = shares_of(distributed(small_recipe, rounds=9).algorithm)
    assert more is not None
    assert more.num_sums == 9
    assert shares_of(distributed(small_recipe, noise="central").algorithm) is None


def test_what_is_said_of_an_epsilon_names_the_sums_where_clients_add_the_noise(
    small_recipe: Make,
) -> None:
    history, said = MetricsLog([{"round": 1.0, "server/epsilon": 2.5}]), []
    for noise in ("distributed", "central"):
        algorithm = distributed(small_recipe, noise=noise).algorithm
        record = privacy_record(describe(algorithm).privacy, history)
        assert record is not None
        said.append(record["said"])
    assert "epsilon is 2.5" in said[0]
    assert "of all rounds and of the sums that they come from, for one client's updates" in said[0]
    assert "sums" not in said[1]


@pytest.mark.parametrize(
    ("secure", "private", "words"),
    [
        (None, {}, "private.noise distributed is for secure sums, .*: add a section secure"),
        (SECURE, {"noise": "local"}, "private.noise: input should be 'central' or 'distributed'"),
        (
            SECURE,
            {"noise_multiplier": None, "epsilon": 8.0},
            "needs a noise_multiplier above 0, and neither epsilon nor quantile",
        ),
        (SECURE, {"noise_multiplier": 0.0}, "needs a noise_multiplier above 0"),
        (SECURE, {"quantile": 0.5}, "neither epsilon nor quantile"),
        (SECURE, {"rounds": 4}, r"private.rounds must be at least run.rounds \(5\), got 4"),
        (SECURE, {"noise_on": "support"}, "noise_on must be everywhere where noise is distributed"),
        (SECURE, {"clip": 0.5}, r"secure.clip must be at least 1.75 .* norm 0.5 .*, got 1"),
        (
            {**SECURE, "bits": 8},
            {"noise_multiplier": 0.2},
            r"secure.bits must be at least 9 .* standard deviation of 6.4 steps, got 8",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(
    secure: dict[str, Any] | None, private: dict[str, Any], words: str, small_recipe: Make
) -> None:
    with pytest.raises(ValueError, match=words):
        distributed(small_recipe, secure, **private)


def test_a_site_counts_its_shares_on_its_disk_and_gives_no_more(tmp_path: Path) -> None:
    file = tmp_path / "noisy_sums" / "alba" / "recipe"
    for _ in range(2):
        # Each time as a process that was started anew.
        NoisySums(file, 2).charge()
    with pytest.raises(ClientError, match="this site has added its noise to 2 sums, which is all"):
        NoisySums(file, 2).charge()
    assert file.read_text() == "2\n"
    file.write_text("two")
    with pytest.raises(ClientError, match=r"says in how many noisy sums .* put it back"):
        NoisySums(file, 2).charge()
