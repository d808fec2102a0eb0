"""One table says what every number is; what is not in it has a sensible default."""

import math

import pytest

from fedloom.core.metrics import METRICS, QUALITY, Metric, MetricTable, Reduction, checked

OWN = Metric("error_rate", "rate of errors", "%", "mean", "lower", (0.0, 1.0))


def test_a_metric_is_known_by_its_name_in_any_split() -> None:
    table = METRICS.extended([OWN])
    assert table.of("test/error_rate").title == "Test rate of errors"
    assert table.of("validation/error_rate").better == "lower"
    assert table.of("train/personal/loss").better == "lower"
    assert table.of("comm/upload_bytes").unit == "B"
    assert METRICS.own == {}


def test_an_unknown_metric_has_its_name_for_a_title_and_no_direction() -> None:
    unknown = METRICS.of("server/drift_of_heads")
    assert unknown.title == "Server drift of heads"
    assert (unknown.reduce, unknown.better, unknown.unit) == ("examples", "none", "")
    assert METRICS.of("server/cache_bytes").unit == "B"


def test_of_what_says_how_good_a_model_is_one_way_is_better() -> None:
    assert all(metric.better != "none" for metric in QUALITY.values())
    assert min([0.5, 0.25], key=QUALITY["loss"].cost) == 0.25
    assert min([0.5, 0.25], key=QUALITY["chrf"].cost) == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reduce": "median"}, "reduce of the metric m must be one of tokens, examples, sum, mean"),
        (
            {"better": "less"},
            "better of the metric m must be one of lower, higher, none, got 'less'",
        ),
        ({"bounds": (1.0, 1.0)}, "bounds of the metric m must be the least value and a larger one"),
        (
            {"bounds": (0.0, math.nan)},
            "bounds of the metric m must be the least value and a larger",
        ),
    ],
)
def test_a_wrong_metric_is_refused_with_what_is_allowed(fields: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        Metric("m", **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["test/m"], "a metric's name must be up to 60 letters, digits and _, beginning with a le"),
        ([""], "a metric's name must be"),
        (["m", "m"], "the metric m is given twice: call yours otherwise"),
        (["perplexity"], "the metric perplexity is one of fedloom's own"),
        (["upload_bytes"], "the metric upload_bytes is one of fedloom's own"),
    ],
)
def test_a_name_that_is_taken_or_none_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METRICS.extended(map(Metric, names))


def test_each_metric_is_reduced_as_it_says_over_clients_of_different_size() -> None:
    kinds = [
        Metric("by_tokens", reduce="tokens"),
        Metric("by_examples"),
        Metric("total", reduce="sum"),
        Metric("alike", reduce="mean"),
    ]
    total = Reduction(METRICS.extended(kinds))
    for value, tokens, examples in ((1.0, 10.0, 4.0), (2.0, 30.0, 1.0)):
        values = {kind.name: value for kind in kinds}
        total.add({**values, "num_tokens": tokens, "num_examples": examples})
    assert total.result() == {
        "by_tokens": (10 * 1 + 30 * 2) / 40,
        "by_examples": (4 * 1 + 1 * 2) / 5,
        "total": 3,
        "alike": 1.5,
        "num_tokens": 40,
        "num_examples": 5,
    }


def test_without_counts_all_clients_weigh_alike_and_without_examples_by_tokens() -> None:
    total = Reduction()
    total.add({"loss": 1.0})
    total.add({"loss": 2.0})
    assert total.result() == {"loss": 1.5}
    total = Reduction(METRICS.extended([Metric("drift")]))
    total.add({"drift": 1.0, "num_tokens": 30.0})
    total.add({"drift": 2.0, "num_tokens": 10.0})
    total.add({"num_tokens": 5.0})
    assert total.result() == {"drift": 1.25, "num_tokens": 45}


def test_a_client_may_report_what_is_declared_and_nothing_else() -> None:
    table = METRICS.extended([OWN])
    told = {"error_rate": 0.5, "loss": 1.0, "num_tokens": 1, "num_examples": 1}
    assert checked(told, measured=True, table=table)["error_rate"] == 0.5
    assert checked({"personal/error_rate": 1}, measured=False, table=table)
    with pytest.raises(
        ValueError, match=r"got a metric 'error_rate', which must be one of .*chrf, "
    ):
        checked(told, measured=True)
    for value in (1.5, math.nan):
        with pytest.raises(ValueError, match=r"error_rate must be in \[0, 1\], got"):
            checked({**told, "error_rate": value}, measured=True, table=table)
    unbounded = METRICS.extended([Metric("any")])
    with pytest.raises(ValueError, match="any must be in"):
        checked({"any": math.inf}, measured=False, table=unbounded)


def test_a_table_is_read_from_what_a_recipe_lists() -> None:
    listed = [
        "exact_match",
        {"error_rate": {"better": "lower", "bounds": [0.0, 1.0], "score": "mine:rate"}},
    ]
    table = MetricTable.read(listed)
    assert table.own == {"error_rate": Metric("error_rate", better="lower", bounds=(0.0, 1.0))}


@pytest.mark.parametrize(
    "item", [3, {"m": {"direction": "lower"}}, {"m": 2}, {"m": {"bounds": 1}}, {"a": {}, "b": {}}]
)
def test_a_damaged_list_is_refused_in_a_sentence(item: object) -> None:
    with pytest.raises(ValueError, match=r"evaluation\.metrics must hold names and \{name: sett"):
        MetricTable.read([item])
