import math

import pytest

from fedloom.core.metrics import METRICS
from fedloom.tracking.metric_format import better, change, duration, quality, shown


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("test/exact_match", "Test exact match"),
        ("validation/loss", "Validation loss"),
        ("test/rougeL", "Test ROUGE-L"),
        ("test/chrf", "Test chrF"),
        ("seconds", "Seconds"),
    ],
)
def test_metrics_have_names(metric: str, words: str) -> None:
    assert METRICS.of(metric).title == words


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("test/exact_match", 0.4567, "45.7 %"),
        ("test/loss", -1.23456, "\u22121.235"),
        ("test/perplexity", 12345.6, "12345.6"),
        ("comm/upload_bytes", 1234.0, "1.23 kB"),
        ("test/loss", None, "\u2013"),
        ("test/loss", math.inf, "not finite"),
    ],
)
def test_values_are_written_for_people(metric: str, value: float | None, text: str) -> None:
    assert shown(METRICS.of(metric), value) == text


@pytest.mark.parametrize(
    ("metric", "before", "after", "text"),
    [
        ("test/exact_match", 0.5, 0.25, "\u221225.0 points"),
        ("test/loss", 4.0, 1.0, "\u221275 %"),
        ("test/rouge1", 0.1, 0.4, "+0.300"),
        ("test/chrf", 0.1, 0.4, "+0.300"),
        ("test/loss", 0.0, 1.0, ""),
        ("test/loss", None, 1.0, ""),
        ("test/loss", math.nan, 1.0, ""),
    ],
)
def test_changes_are_points_differences_or_shares(
    metric: str, before: float | None, after: float, text: str
) -> None:
    assert change(METRICS.of(metric), before, after) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.21, "4.2 s"), (59.96, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_times_are_written_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_metric_that_says_most_and_all_have_is_chosen() -> None:
    assert quality([["test/loss", "test/exact_match"]]) == "test/exact_match"
    assert quality([["test/loss", "test/exact_match"], ["test/loss"]]) == "test/loss"
    assert quality([["seconds"]]) is None
    assert quality([]) is None
    assert better(METRICS.of("test/loss")) == "lower is better"
    assert better(METRICS.of("test/exact_match")) == "higher is better"
