"""A cell becomes text in one way, or is refused in words."""

import math
import uuid
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from fedloom.data.cells import is_missing, is_printed, short, to_text
from fedloom.data.readers import Row


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (" a\u2028é😀 ", " a\u2028é😀 "),
        (True, "true"),
        (False, "false"),
        (0, "0"),
        (2**80, "1208925819614629174706176"),
        (1.0, "1.0"),
        (-0.1, "-0.1"),
        ([], "[]"),
        ([1, None, "é"], '[1, null, "é"]'),
        ({"known": True, "note": None}, '{"known": true, "note": null}'),
        ((1, (2,)), "[1, [2]]"),
        (Decimal("1.10"), "1.10"),
        (Decimal("1E+3"), "1000"),
        (date(2024, 1, 2), "2024-01-02"),
        (datetime(2024, 1, 2, 3, tzinfo=UTC), "2024-01-02T03:00:00+00:00"),
        (time(3, 4), "03:04:00"),
        (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        ([Decimal("1.10"), date(2024, 1, 2)], '["1.10", "2024-01-02"]'),
        (np.float64(0.5), "0.5"),
        (np.int64(3), "3"),
        ([np.int64(3), np.float32(0.5)], "[3, 0.5]"),
    ],
)
def test_what_is_no_string_is_written_as_json(value: Any, text: str):
    assert to_text(value) == text


@pytest.mark.parametrize("value", [None, math.nan, np.float32("nan"), Decimal("nan")])
def test_null_and_nan_are_missing_and_no_words(value: Any):
    assert is_missing(value)
    assert to_text(value) == ""


def test_what_pandas_calls_missing_is_missing():
    pandas = pytest.importorskip("pandas", reason="pandas is not needed to read")
    assert is_missing(pandas.NA)
    assert is_missing(pandas.NaT)
    assert to_text(pandas.Timestamp("2024-01-02")) == "2024-01-02T00:00:00"


@pytest.mark.parametrize("value", ["", "nan", "None", "null", 0, False, [], {}, [math.nan]])
def test_what_only_looks_empty_is_not_missing(value: Any):
    assert not is_missing(value)


DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"x", "holds bytes, which are no text"),
        ([{"a": bytearray(b"x")}], "holds bytes, which are no text"),
        (math.inf, "holds a number that is not finite, which JSON cannot write"),
        ({"a": [math.nan]}, "holds a number that is not finite, which JSON cannot write"),
        (Decimal("inf"), "holds a number that is not finite"),
        (np.float32("inf"), "holds a number that is not finite, which JSON cannot write"),
        (timedelta(1), "holds a timedelta, which is no text"),
        ({1, 2}, "holds a set, which is no text"),
        (object(), "holds a object, which is no text"),
        ({(1, 2): 3}, "holds an object with a key that is no text"),
        ("ab\ud800", r"holds '\ud800', half a character (a lone surrogate), at character 3"),
        ({"\udfff": 1}, r"holds '\udfff', half a character (a lone surrogate), at character 3"),
        (DEEP, "is nested too deeply to be written"),
    ],
    ids=range(13),
)
def test_what_is_no_text_is_refused_with_row_and_column(value: Any, message: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        Row({"note": value}, "a.parquet", 7).text("note")
    assert str(caught.value) == f"a.parquet, row 7: note {message}"
    str(caught.value).encode()


def test_error_messages_show_the_beginning_in_characters_that_can_be_printed():
    assert short({"a": [1, "é"]}) == '{"a": [1, "é"]}'
    assert short("\ud800") == '"\\ud800"'
    assert short("x" * 99) == '"' + "x" * 56 + "..."
    assert short({1: {2}}) == '{"1": "{2}"}'
    assert short(DEEP) == "a list"


def test_what_python_prints_is_told_from_text():
    assert is_printed("[{'role': 'user'}]")
    assert is_printed(" {'text': ['Ada']}")
    assert not is_printed('[{"role": "user"}]')
    assert not is_printed("{x'}")
    assert not is_printed([{"role": "user"}])
