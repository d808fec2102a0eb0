"""Settings refuse what cannot be meant, in one sentence."""

import re
from typing import Any, get_args

import pytest

from fedloom.data.data_settings import DataSettings, Format, PromptName
from fedloom.data.formats import FORMATS
from fedloom.data.partition import Dirichlet, Natural, Quantity, Shards
from fedloom.data.prompts import PROMPTS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"source": ""},
            "data.source must name a file, a folder, a Hub id or builtin:polyglot, got ''",
        ),
        (
            {"source": "builtin:poly"},
            "data.source must be builtin:polyglot to be built in, got 'builtin:poly'",
        ),
        (
            {"format": "alpacca"},
            "data.format must be one of auto, prompt-completion, messages, alpaca",
        ),
        (
            {"prompt": "llama"},
            "data.prompt must be one of chat, alpaca, vicuna, plain, or a mapping",
        ),
        ({"truncate": "left"}, "data.truncate must be answer or prompt, got 'left'"),
        ({"max_length": 3}, "data.max_length must be at least 8, got 3"),
        ({"num_clients": 0}, "data.num_clients must be at least 1, got 0"),
        ({"num_examples": 0}, "data.num_examples must be at least 1, got 0"),
        (
            {"fractions": (0.8, 0.2)},
            "data.fractions must be three shares (train above 0, validation, test), got",
        ),
        ({"fractions": (0.0, 0.5, 0.5)}, "data.fractions must be three shares (train above 0"),
        (
            {"fractions": (0.8, 0.1, 0.2)},
            "data.fractions must sum to 1, got [0.8, 0.1, 0.2] with sum 1.1",
        ),
        (
            {"tiers": {"phone": 0.5, "desk": 0.4}},
            "data.tiers must be shares above 0 that sum to 1, got {'phone': 0.5, 'desk': 0.4}",
        ),
        ({"tiers": {"phone": 1.0, "desk": 0.0}}, "data.tiers must be shares above 0 that sum to 1"),
        ({"where": {"language": "en"}}, "data.where.language must be a list of values, got 'en'"),
        ({"where": {"language": []}}, "data.where.language must be a list of values, got []"),
    ],
)
def test_a_wrong_setting_names_its_path_and_what_is_allowed(given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        DataSettings(**given)


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (Dirichlet, {"by": "task", "alpha": 0.0}, "data.partition.alpha must be above 0, got 0.0"),
        (
            Dirichlet,
            {"by": "task", "alpha": float("nan")},
            "data.partition.alpha must be above 0, got nan",
        ),
        (
            Dirichlet,
            {"by": "task", "min_examples": 0},
            "data.partition.min_examples must be at least 1, got 0",
        ),
        (
            Shards,
            {"by": "task", "per_client": 0},
            "data.partition.per_client must be at least 1, got 0",
        ),
        (Quantity, {"alpha": -1.0}, "data.partition.alpha must be above 0, got -1.0"),
        (Quantity, {"sigma": -1.0}, "data.partition.sigma must be at least 0, got -1.0"),
        (Quantity, {"min_examples": 0}, "data.partition.min_examples must be at least 1, got 0"),
        (
            Quantity,
            {"alpha": 1.0, "sigma": 2.0},
            "data.partition takes alpha or sigma, got both (1.0 and 2.0)",
        ),
    ],
)
def test_a_wrong_partition_names_its_path_and_what_is_allowed(
    kind: Any, given: dict[str, Any], message: str
):
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**given)


def test_every_format_and_prompt_that_can_be_named_exists():
    assert set(get_args(Format)) == {"auto", *FORMATS}
    assert set(get_args(PromptName)) == {"chat", *PROMPTS}


def test_the_defaults_are_valid_and_frozen():
    settings = DataSettings()
    with pytest.raises(AttributeError):
        settings.seed = 1  # type: ignore[misc]  # the point
    assert DataSettings(partition=Natural("language")).num_clients is None
