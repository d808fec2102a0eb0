"""A configuration of another framework, recognised by what is in it, and the recipe it becomes."""

import textwrap
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedloom.importing.counterparts import Framework, Line, Values
from fedloom.importing.fedkseed import FEDKSEED
from fedloom.importing.fedscope import FEDSCOPE
from fedloom.importing.flowertune import FLOWERTUNE, flower_values
from fedloom.importing.openfedllm import BENCH, FEDMLLM, OPENFEDLLM
from fedloom.importing.shell import Command, read_command
from fedloom.recipe import RecipeError, build_recipe
from fedloom.recipe_yaml import YamlError, brief, read_yaml

FRAMEWORKS = (FLOWERTUNE, FEDSCOPE, OPENFEDLLM, BENCH, FEDMLLM, FEDKSEED)
_KINDS = (
    "a FlowerTune pyproject.toml, a FederatedScope-LLM YAML, or a command line of OpenFedLLM, FedLLM-Bench, FedMLLM or"
    " FedKSeed"
)
_SECTIONS = {"federate", "llm", "dataloader", "criterion", "trainer", "early_stop", "use_gpu"}
"""Keys at the top of FederatedScope's YAML that a recipe has not."""
_WIDTH = 118
_LONGEST = 100
"""Characters of a recipe's name."""


@dataclass(frozen=True, slots=True)
class Imported:
    """A recipe, and what became of the keys it was made from."""

    framework: Framework
    source: str
    """What it was made from, as the user names it."""
    name: str
    tree: Mapping[str, Any]
    lines: tuple[Line, ...]

    def text(self) -> str:
        """Return the recipe as YAML, behind comments that say what became of every key."""
        body = yaml.safe_dump(
            {"name": self.name, **self.tree},
            sort_keys=False,
            allow_unicode=True,
            default_flow_style=None,
            width=_WIDTH,
        )
        return f"{self._header()}\n{body}"

    def _header(self) -> str:
        given = [line for line in self.lines if line.given]
        parts = [f"Made from {self.source}, a configuration of {self.framework.name}."]
        parts += self.framework.notes
        text = "".join(_comment(part) for part in parts)
        for title, lines in (
            ("What its keys became:", [line for line in given if line.settings]),
            (
                "Left out there, so as by its own default:",
                [line for line in self.lines if not line.given],
            ),
            ("Without counterpart:", [line for line in given if not line.settings]),
        ):
            if lines:
                text += f"#\n# {title}\n" + "".join(_comment(_said(line), "  ") for line in lines)
        return text


def import_text(text: str, *, source: str, name: str = "imported") -> Imported:
    """Return the recipe that a configuration of another framework becomes.

    Args:
        text: The file's.
        source: Where it is from, for messages.
        name: Of the recipe, where the configuration has none.

    Raises:
        ValueError: where it is none that is known, cannot be read, or becomes no recipe that can be run.
    """
    try:
        framework, values, named = _recognised(text)
    except ValueError as error:
        raise ValueError(f"{source} cannot be imported: {error}") from error
    try:
        tree, lines = framework.translate(values)
    except ValueError as error:
        raise ValueError(f"{source} cannot be imported: {error}") from error
    imported = Imported(framework, source, _name(named or name), _ordered(tree), tuple(lines))
    try:
        build_recipe(read_yaml(imported.text()))
    except (RecipeError, YamlError) as error:
        raise ValueError(f"{source} becomes a recipe that cannot be run: {error}") from error
    return imported


def _name(said: str) -> str:
    """Return what of a package's or a file's name can be a recipe's."""
    kept = "".join(char for char in said if char.isprintable()).strip()[:_LONGEST].strip()
    return "imported" if kept in ("", ".", "..") else kept


def _recognised(text: str) -> tuple[Framework, Values, str]:
    """Return whose configuration it is, its values by dotted keys, and its name if it has one."""
    if "[tool.flwr" in text:
        try:
            tree = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"it has tables of Flower, but is not TOML: {error}") from error
        return FLOWERTUNE, *flower_values(tree)
    found = _yaml(text)
    if found is not None:
        if not _SECTIONS & found.keys():
            what = "is a recipe of fedloom" if {"algorithm", "tune"} & found.keys() else "is YAML"
            raise ValueError(f"it {what}, but must be {_KINDS}")
        return FEDSCOPE, _flat(found), ""
    command = read_command(text)
    if command is None:
        raise ValueError(f"it must be {_KINDS}")
    return _framework_of(command), _options(command), ""


def _yaml(text: str) -> dict[str, Any] | None:
    """Return the mapping a text is as YAML; None where it is none."""
    try:
        found = read_yaml(text)
    except YamlError as error:
        # Of a YAML with a fault, the fault is what has to be said.
        if any(f"\n{section}:" in f"\n{text}" for section in _SECTIONS):
            raise ValueError(f"it is not YAML: {error}") from error
        return None
    return found if isinstance(found, dict) else None


def _framework_of(command: Command) -> Framework:
    names = command.options.keys()
    if {"K", "zo_eps", "bias_sampling", "local_step", "zerotask"} & names or {
        "rounds",
        "m",
    } <= names:
        return FEDKSEED
    if {"sim_round", "n_clusters", "train_split", "evaluation_rounds"} & names:
        return FEDMLLM
    if {"checkpoint_step", "multi_turn_task", "dynamic_local_step", "dp_epsilon"} & names:
        return BENCH
    if {"fed_alg", "num_rounds", "sample_clients"} & names:
        return OPENFEDLLM
    raise ValueError(f"its script {command.script} takes other options: it must be {_KINDS}")


def _options(command: Command) -> dict[str, Any]:
    values: dict[str, Any] = {k: True if v is None else v for k, v in command.options.items()}
    return {**values, "(script)": command.script}


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inside = isinstance(value, Mapping) and value
        flat |= _flat(value, f"{above}{key}.") if inside else {f"{above}{key}": value}
    return flat


_ORDER = (
    "algorithm",
    "model",
    "tune",
    "data",
    "objective",
    "local",
    "cohort",
    "evaluation",
    "wire",
    "engine",
    "run",
)


def _ordered(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tree[name] for name in _ORDER if name in tree}


def _said(line: Line) -> str:
    plain = isinstance(line.value, str) and line.value.isprintable() and line.value
    value = line.value if plain else brief(line.value)
    key = f"{line.key}: {value}" if line.key != "(script)" else value
    if not line.settings:
        return f"{key}: {line.remark}"
    return f"{key} -> {line.settings}" + (f" ({line.remark})" if line.remark else "")


def _comment(text: str, indent: str = "") -> str:
    lines: Iterable[str] = textwrap.wrap(
        " ".join(text.split()),
        _WIDTH,
        initial_indent=f"# {indent}",
        subsequent_indent=f"# {indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines) + "\n"


def import_file(file: Path) -> Imported:
    """Return the recipe that a file of another framework becomes.

    Raises:
        ValueError: where it is not there or no text, besides those of `import_text`.
    """
    if not file.is_file():
        raise ValueError(f"the file {file} does not exist, or is a folder")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} cannot be imported: it is not UTF-8 text") from error
    return import_text(text, source=file.name, name=file.stem)
