"""How good every model is on every value of a label: each client's own, and each shared one on everybody's."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.core.metrics import MetricTable
from fedloom.core.protocols import ClientId, Metrics, Params
from fedloom.data.tokens import Example
from fedloom.evaluation.measure import Evaluator, combine
from fedloom.results.export import deliverables
from fedloom.rounds.loop import Run
from fedloom.rounds.session import Session

_MOST = 40
"""Models that are measured on each other's clients; the personal ones of many more would take for ever."""
_METRICS = ("loss", "exact_match", "accuracy", "chrf")
"""Of which the worst value is told, besides users' own."""


def check_label(session: Session) -> None:
    """Refuse an `evaluation.by` that the data does not have.

    Raises:
        ValueError: where no label is called so.
    """
    by, clients = session.recipe.evaluation.by, session.federation.manifest.clients.values()
    first = next(iter(clients))
    known = [*first.labels, *first.num_values]
    if by is not None and by not in known:
        raise ValueError(
            f"evaluation.by must be a label of the data ({', '.join(known) or 'none'}), got {by!r}; "
            "data.labels names the columns kept"
        )


def metrics_by_label(session: Session, run: Run[Any], by: str) -> dict[str, Any]:
    """Return what by_label.json holds: test metrics by value of the label `by`, and by model and value.

    Returns:
        `own`, of the examples of each value the metrics of the models their clients use; `models`, of each model who
        uses it and, where there are several and not more than a few dozen, its metrics on all examples of each value.
    """
    held = _held_out(session, by, run.number)
    table = session.recipe.evaluation.table
    models = deliverables(session, run)
    settings = dataclasses.replace(session.recipe.evaluation, max_examples=None)
    evaluator = dataclasses.replace(session.evaluator, settings=settings)
    own: dict[str, list[Metrics]] = {value: [] for value in held}
    cross: dict[str, Mapping[str, Metrics]] = {}
    for name, (params, clients) in models.items():
        everywhere = 1 < len(models) <= _MOST
        groups = _groups(held, set(clients), everywhere=everywhere)
        found = _measured(session, evaluator, params, groups)
        for (value, mine), metrics in found.items():
            if mine:
                own[value].append(metrics)
        if everywhere:
            cross[name] = _by_value(found, table)
    by_value = {value: combine(metrics, table) for value, metrics in own.items() if metrics}
    return {
        "label": by,
        "own": by_value,
        "worst": _worst(by_value, table),
        "models": [
            {"name": name, "clients": clients, "metrics": cross.get(name, {})}
            for name, (_, clients) in models.items()
        ],
    }


Held = Mapping[str, Mapping[ClientId, Sequence[Example]]]
Group = tuple[str, bool]
"""A value, and whether the clients are the model's own."""


def _held_out(session: Session, by: str, number: int) -> Held:
    """Return the test examples by value, or its hash, and client: of whom and as many as after round `number`."""
    shown = session.federation.manifest.shown_labels
    held: dict[str, dict[ClientId, list[Example]]] = {}
    for client in session.drawn_judges(number, "test"):
        for example in session.evaluator.drawn(session.federation.shards[client].test):
            if example.record is not None:
                (value,) = shown({by: example.record.labels[by]}).values()
                clients = held.setdefault(value, {})
                clients.setdefault(client, []).append(example)
    return dict(sorted(held.items()))


def _groups(held: Held, own: set[ClientId], *, everywhere: bool) -> dict[Group, list[Example]]:
    groups: dict[Group, list[Example]] = {}
    for value, clients in held.items():
        for client, examples in clients.items():
            if everywhere or client in own:
                groups.setdefault((value, client in own), []).extend(examples)
    return groups


def _measured(
    session: Session, evaluator: Evaluator, params: Params, groups: Mapping[Group, list[Example]]
) -> dict[Group, Metrics]:
    if not groups:
        return {}
    session.space.load(params)
    measured = evaluator.measure_each(session.space.model, list(groups.values()), split="test")
    return dict(zip(groups, measured, strict=True))


def _by_value(found: Mapping[Group, Metrics], table: MetricTable) -> dict[str, Metrics]:
    values = dict.fromkeys(value for value, _ in found)
    return {
        value: combine((metrics for (other, _), metrics in found.items() if other == value), table)
        for value in values
    }


def _worst(own: Mapping[str, Metrics], table: MetricTable) -> dict[str, dict[str, Any]]:
    """Return, by metric, the value of the label with the worst result."""
    worst = {}
    for name in (*_METRICS, *table.own):
        metric = table.of(name)
        values = {value: metrics[name] for value, metrics in own.items() if name in metrics}
        if values and metric.better != "none":
            cost = {value: metric.cost(result) for value, result in values.items()}
            # What is not a number is the worst.
            at = max(cost, key=lambda value: (math.isnan(cost[value]), cost[value]))
            worst[name] = {"value": at, "result": values[at]}
    return worst
