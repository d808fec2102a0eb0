"""Look at a federation before training: who holds what, how long it is, what is learnt of it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fedloom.core.protocols import ClientId
from fedloom.data.encoding import Tokenizer
from fedloom.data.federation import Federation
from fedloom.data.manifest import ClientCounts, Manifest
from fedloom.data.tokens import IGNORED, Example

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Paul Tol's muted scheme, told apart in every common colour blindness; grey is the tenth, or the rest.
COLOURS = (
    "#332288",
    "#88CCEE",
    "#117733",
    "#DDCC77",
    "#CC6677",
    "#44AA99",
    "#882255",
    "#999933",
    "#AA4499",
    "#BBBBBB",
)
NAMED_CLIENTS = 40
"""More clients than this are drawn without names, and listed in part."""


def preview(
    federation: Federation, tokenizer: Tokenizer, *, num_samples: int = 3
) -> list[RenderableType]:
    """Return what to print: the split, the lengths, and samples with their label mask."""
    return [
        _summary(federation.manifest),
        _clients(federation.manifest),
        _lengths(federation),
        *_samples(federation, tokenizer, num_samples),
    ]


def split_figure(manifest: Mapping[str, Any]) -> "Figure":
    """Return a bar for every client, stacked by label (by split where there are no labels).

    `manifest` is what `Manifest.to_json` returns.
    """
    from matplotlib import rc_context  # slow to import

    with rc_context({"text.parse_math": False}):  # names may hold dollars
        return _split_figure(Manifest.from_json(manifest))


def _split_figure(read: Manifest) -> "Figure":
    from matplotlib.figure import Figure

    label, values, stacks = _stacks(read)
    clients = list(read.clients)
    figure = Figure(
        figsize=(min(14.0, max(6.0, 2.5 + 0.32 * len(clients))), 4.2), layout="constrained"
    )
    axes = figure.subplots()
    bottom = [0] * len(clients)
    few = len(clients) <= NAMED_CLIENTS
    for colour, value in zip(COLOURS, values, strict=False):
        heights = [stack.get(value, 0) for stack in stacks]
        axes.bar(
            range(len(clients)),
            heights,
            width=0.8 if few else 1.0,
            bottom=bottom,
            color=colour,
            edgecolor="white",
            linewidth=0.6 if few else 0.0,
            label=value,
        )
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    _dress(axes, clients, few)
    figure.legend(
        loc="outside upper center",
        ncols=min(5, len(values)),
        frameon=False,
        fontsize=9,
        title=label,
    )
    return figure


def _dress(axes: "Axes", clients: Sequence[ClientId], few: bool) -> None:
    axes.set_ylabel("examples")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(-0.6, len(clients) - 0.4)
    axes.yaxis.grid(visible=True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    if not few:
        axes.set_xlabel(f"{len(clients)} clients, by id")
        return
    short = [name.removeprefix("client-") for name in clients]
    if short != list(clients):
        axes.set_xlabel("client")
    long = max(map(len, short)) > 4
    axes.set_xticks(
        range(len(clients)),
        short,
        rotation=45 if long else 0,
        ha="right" if long else "center",
        rotation_mode="anchor",
        fontsize=9 if len(clients) <= 25 else 7,
    )


def _stacks(manifest: Manifest) -> tuple[str, list[str], list[Mapping[str, int]]]:
    """Return (what is stacked, its values from the most frequent, the heights of each client)."""
    clients = list(manifest.clients.values())
    label = _telling(manifest)
    if not label:
        splits = [
            {"train": client.train, "validation": client.validation, "test": client.test}
            for client in clients
        ]
        return "split", ["train", "validation", "test"], list(splits)
    totals = Counter[str]()
    for client in clients:
        totals.update(client.labels[label])
    common = sorted(totals, key=lambda value: (-totals[value], value))
    shown = sorted(common if len(common) <= len(COLOURS) else common[: len(COLOURS) - 1])
    rest = f"{len(common) - len(shown)} others"
    stacks = []
    for client in clients:
        stack = Counter[str]()
        for value, count in client.labels[label].items():
            stack[value if value in shown else rest] += count
        stacks.append(stack)
    return label, shown if len(shown) == len(common) else [*shown, rest], list(stacks)


def _telling(manifest: Manifest) -> str:
    """Return the label worth showing: the partition's, unless the clients are named for it; empty if there is none."""
    clients = list(manifest.clients.values())
    if manifest.by and manifest.partition != "natural" and manifest.by not in manifest.hidden:
        return manifest.by
    names = [name for name in clients[0].labels if name != manifest.by]
    varied = (name for name in names if any(len(client.labels[name]) > 1 for client in clients))
    return next(varied, "")


# --- tables -------------------------------------------------------------------------------------


def _summary(manifest: Manifest) -> RenderableType:
    lines = Table.grid(padding=(0, 2))
    lines.add_row("source", Text(manifest.source))
    by = f" by {manifest.by}" if manifest.by else ""
    lines.add_row("partition", f"{manifest.partition}{by}, {len(manifest.clients)} clients")
    lines.add_row("rows read", f"{manifest.num_rows:,}")
    lines.add_row("read as", Text(manifest.losses.read_as()))
    lines.add_row("prompt", Text(manifest.prompt))
    for note in manifest.left_out():
        lines.add_row("", Text(note, style="yellow"))
    lines.add_row("sha256 of the split", manifest.sha256)
    return lines


def _clients(manifest: Manifest) -> RenderableType:
    label = _telling(manifest)
    table = Table(title="clients", title_justify="left", show_footer=True)
    counts = list(manifest.clients.values())
    total = f"{len(counts)} clients"
    table.add_column("client", total, no_wrap=True)
    for name, column in (
        ("train", [client.train for client in counts]),
        ("validation", [client.validation for client in counts]),
        ("test", [client.test for client in counts]),
        ("tokens", [client.tokens for client in counts]),
        ("learnt", [client.target_tokens for client in counts]),
    ):
        table.add_column(name, f"{sum(column):,}", justify="right")
    if label:
        table.add_column(label, ratio=1)
    for name, client in list(manifest.clients.items())[:NAMED_CLIENTS]:
        numbers = (
            client.train,
            client.validation,
            client.test,
            client.tokens,
            client.target_tokens,
        )
        shown = [_histogram(client, label)] if label else []
        table.add_row(Text(name), *(f"{number:,}" for number in numbers), *map(Text, shown))
    if len(counts) > NAMED_CLIENTS:
        return Group(table, f"... and {len(counts) - NAMED_CLIENTS} more")
    return table


def _histogram(client: ClientCounts, label: str) -> str:
    common = Counter(client.labels[label]).most_common()
    text = ", ".join(f"{value} {count}" for value, count in common[:4])
    return text if len(common) <= 4 else f"{text}, {len(common) - 4} more"


def _lengths(federation: Federation) -> RenderableType:
    table = Table(title="tokens of one sequence", title_justify="left")
    table.add_column("")
    for column in ("median", "95 %", "max"):
        table.add_column(column, justify="right")
    train = [example for shard in federation.shards.values() for example in shard.train]
    held = [e for shard in federation.shards.values() for e in (*shard.validation, *shard.test)]
    learnt, judged = (
        [row for example in some for row in example.answers] for some in (train, held)
    )
    for name, lengths in (
        ("training", [len(row.ids) for row in learnt]),
        ("training, learnt", [row.num_own_targets for row in learnt]),
        ("validation and test", [len(row.ids) for row in judged]),
        ("their prompts", [example.prompt_length for example in held]),
    ):
        if lengths:
            table.add_row(name, *(f"{value:,}" for value in _quantiles(lengths)))
    return table


def _quantiles(lengths: Iterable[int]) -> tuple[int, int, int]:
    ordered = sorted(lengths)
    last = len(ordered) - 1
    return ordered[last // 2], ordered[round(0.95 * last)], ordered[-1]


# --- samples ------------------------------------------------------------------------------------


def _samples(federation: Federation, tokenizer: Tokenizer, count: int) -> list[RenderableType]:
    holders = [(client, shard.train) for client, shard in federation.shards.items() if shard.train]
    step = max(1, len(holders) // max(1, count))
    shown: list[RenderableType] = [
        Text.assemble(
            "samples: ",
            ("not learnt", "dim"),
            ", ",
            ("learnt", "green"),
            ", ",
            ("special", SPECIAL),
        )
    ]
    for client, train in holders[::step][:count]:
        labels = train[0].record.labels if train[0].record else {}
        shown_labels = [v for k, v in labels.items() if k not in federation.manifest.hidden]
        title = ", ".join(dict.fromkeys([client, *shown_labels]))
        for row in train[0].answers:
            named = Text(f"{title}{_judgement(row, paired=train[0].rejected is not None)}")
            shown.append(Panel(_masked(row, tokenizer), title=named, title_align="left"))
    return shown


SPECIAL = "bold magenta"


def _judgement(row: Example, *, paired: bool) -> str:
    """Return what is said of an answer, where anything is."""
    if row.good is None:
        return ""
    good, bad = ("chosen", "rejected") if paired else ("good", "bad")
    return f": {good if row.good else bad}"


def _masked(example: Example, tokenizer: Tokenizer) -> Text:
    """Return the text of an example, told apart by what is learnt; runs are decoded whole for scripts of many bytes."""
    special = set(tokenizer.all_special_ids)
    pairs = zip(example.ids.tolist(), example.labels.tolist(), strict=True)

    def kind(pair: tuple[int, int]) -> tuple[bool, bool]:
        return pair[0] in special, pair[1] != IGNORED

    text = Text()
    for (is_special, is_learnt), run in groupby(pairs, key=kind):
        words = str(tokenizer.decode([token for token, _ in run]))
        colour = "green" if is_learnt else "dim"
        style = f"{SPECIAL} {'underline' if is_learnt else ''}" if is_special else colour
        text.append(words.replace("\n", "↵\n"), style=style)
    return text
