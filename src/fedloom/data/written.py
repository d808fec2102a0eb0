"""YAML whose texts stay as they were written: `no`, `on`, `1.0` and dates name values of data, not YAML's own."""

from collections.abc import Sequence

import yaml

_STRING = "tag:yaml.org,2002:str"
_VALUES = {
    *(("data", name) for name in ("where", "held_out", "columns", "labels")),
    ("objective", "classification", "classes"),
}
"""Settings that hold values or columns of data."""
_KEYS = _VALUES | {("data", "shorter")}
"""Settings whose keys are such."""
_OF_PARTITION = ("by", "order")


def keep_texts(root: yaml.Node, above: Sequence[str] = ()) -> None:
    """Call a string what holds values or columns of data, before anything is made of the nodes.

    Args:
        root: Of a recipe, or of the value of one of its keys.
        above: The keys down to that value.
    """
    done: set[int] = set()  # an alias may stand inside what it names

    def keep(node: yaml.Node, path: tuple[str, ...], *, listed: bool) -> None:
        if isinstance(node, yaml.ScalarNode):
            if node.style is None and _is_text(path, listed):
                node.tag = _STRING
        elif id(node) not in done:
            done.add(id(node))
            if isinstance(node, yaml.SequenceNode):
                for item in node.value:
                    keep(item, path, listed=True)
            for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
                if isinstance(key, yaml.ScalarNode) and path in _KEYS and key.value != "<<":
                    key.tag = _STRING
                keep(value, (*path, str(key.value)), listed=False)

    keep(root, tuple(above), listed=False)


def _is_text(path: tuple[str, ...], listed: bool) -> bool:
    if path[:2] == ("data", "partition"):
        return path[-1] in _OF_PARTITION
    # Directly at the setting stands null, or a name of YAML's.
    return any(
        path[: len(value)] == value and (listed or len(path) > len(value)) for value in _VALUES
    )
