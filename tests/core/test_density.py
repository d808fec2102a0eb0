import pytest

from fedloom.core.density import Density


def test_a_constant_share_is_the_same_in_every_round() -> None:
    assert {Density(0.1).at(n, {}) for n in (1, 2, 1000)} == {0.1}


def test_a_share_decays_after_every_few_rounds_down_to_the_least() -> None:
    falling = Density(0.8, decay=0.5, every=2, least=0.15)
    assert [falling.at(n, {}) for n in range(1, 9)] == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2, 0.15, 0.15]


def test_the_first_rounds_are_dense_and_decay_begins_after_them() -> None:
    warm = Density(0.4, decay=0.5, every=2, warm=2, tiers={"phone": 0.2})
    assert [warm.at(n, {}) for n in range(1, 6)] == [1.0, 1.0, 0.4, 0.4, 0.2]
    assert [warm.at(n, {"tier": "phone"}) for n in (2, 3, 5)] == [1.0, 0.2, 0.1]


def test_a_tier_has_its_own_share_and_others_have_the_start() -> None:
    density = Density(0.5, tiers={"phone": 0.125})
    profiles: tuple[dict[str, str], ...] = (
        {"tier": "phone"},
        {"tier": "desk"},
        {"language": "en"},
        {},
    )
    assert [density.at(1, p) for p in profiles] == [0.125, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": 0.0}, r"start must be in \(0, 1\], got 0"),
        ({"start": 1.5}, r"start must be in \(0, 1\], got 1\.5"),
        ({"start": float("nan")}, r"start must be in \(0, 1\], got nan"),
        ({"decay": 2.0}, r"decay must be in \(0, 1\], got 2"),
        ({"tiers": {"phone": 0.0}}, r"tiers\.phone must be in \(0, 1\], got 0"),
        ({"least": 0.5}, r"least must be in \[0, start\].*got 0\.5"),
        ({"every": 0}, r"every must be at least 1, got 0"),
        ({"warm": -1}, r"warm must be a number of rounds, got -1"),
    ],
)
def test_what_is_no_density_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Density(**fields)  # type: ignore[arg-type]
