"""YAML as recipes are written: every key once, values of data as they stand, no more than a recipe can mean, and errors with their line."""

import difflib
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import yaml

_MOST = 20_000
"""Values in a recipe, aliases counted as often as they are used."""
_DEEPEST = 50
_WIDEST = 2**63
_LONG = 100


class YamlError(ValueError):
    """Text that is no YAML of a recipe; the message says why, and in which line."""


def read_yaml(text: str | bytes, above: Sequence[str] = ()) -> Any:
    """Return the value of a YAML text, with every value and column of data as the text that was written.

    Args:
        text: A recipe, or the value of one of its keys; bytes are UTF-8.
        above: The keys down to that value.

    Raises:
        YamlError: where it is none, repeats a key, or is larger than any recipe.
    """
    try:
        loader = _Loader(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node)
            keep_texts(node, above)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise YamlError(f"line {line}: this is not UTF-8 text, save it as such") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}: " if mark is not None else ""
        raise YamlError(
            f"{place}{' '.join(str(error.problem or error.context).split())}"
        ) from error
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise YamlError(f"values may be nested {_DEEPEST} deep, these are deeper") from error


def suggest(given: str, known: Iterable[str]) -> str:
    """Return which known name was meant, for a sentence's end; empty where none is near."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def brief(value: object) -> str:
    """Return a value as Python writes it, in part where it is long."""
    text = repr(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, and numbers and dates that are none."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _marked(node, f"expected a mapping, found a {node.id}")
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key, deep=True)
            if not isinstance(name, Hashable):
                raise _marked(key, "a key must be a word")
            if name in seen:
                raise _marked(key, f"the key {brief(name)} stands in line {seen[name]} already")
            seen[name] = key.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise _marked(node, f"{brief(node.value)} is no {_kind(node)} ({error})") from error
        if type(value) is int and not -_WIDEST <= value < _WIDEST:
            raise _marked(node, f"{brief(node.value)} is larger than any number of a recipe")
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise _marked(node, f"{brief(value)} holds half a letter, which no file can hold")
        return value


def _kind(node: yaml.Node) -> str:
    return str(node.tag).rpartition(":")[2]


def _marked(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _check_size(root: yaml.Node) -> None:
    """Refuse what aliases blow up, or turn into themselves, before anything is made of it."""
    sizes: dict[int, int] = {}
    open_: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if id(node) in open_:
            raise _marked(node, "an alias stands inside what it names")
        if id(node) in sizes:
            return sizes[id(node)]
        if depth > _DEEPEST:
            raise _marked(node, f"values may be nested {_DEEPEST} deep, this one is deeper")
        open_.add(id(node))
        below: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            below = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            below = list(node.value)
        total = 1 + sum(size(part, depth + 1) for part in below)
        if total > _MOST:
            raise _marked(node, f"a recipe may hold {_MOST} values, with its aliases this has more")
        open_.discard(id(node))
        sizes[id(node)] = total
        return total

    size(root, 0)


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
