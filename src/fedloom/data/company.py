"""What a recipe's section `data` says only about something that an override put another thing in the place of."""

from collections.abc import Collection, Mapping
from typing import Any

from fedloom.data.data_settings import BUILTIN

_WRITTEN = ("num_examples", "where")
"""Of the built-in corpus they say what is written; of other text they would leave rows out."""


def unaccompanied(
    data: Mapping[str, Any], before: Mapping[str, Any], overridden: Collection[str]
) -> dict[str, Any]:
    """Return the section without what merely came along with a partition or a source that is no longer there.

    A natural partition takes no `num_clients` from a recipe whose own partition was replaced, and a source of one's own
    nothing that says how the built-in corpus is written. What is overridden itself stays.

    Args:
        data: The section with overrides applied.
        before: The section as the recipe has it.
        overridden: The paths of all overrides, such as `data.partition`.
    """
    gone: list[str] = []
    if "data.partition" in overridden and _is_natural(data.get("partition")):
        gone.append("num_clients")
    if "data.source" in overridden and _is_builtin(before) and not _is_builtin(data):
        gone += _WRITTEN
    own = {path.split(".")[1] for path in overridden if path.startswith("data.")}
    return {name: value for name, value in data.items() if name not in gone or name in own}


def _is_natural(partition: object) -> bool:
    return partition == "natural" or (isinstance(partition, Mapping) and "natural" in partition)


def _is_builtin(data: Mapping[str, Any]) -> bool:
    return str(data.get("source", BUILTIN)).startswith("builtin:")
