"""After the last round: adapters, sample answers, clusters, coefficients, summary and report. Safe to repeat."""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedloom.clustering.groups import adjusted_rand
from fedloom.core.description import Clusters, Description, describe
from fedloom.core.files import write_atomic
from fedloom.core.protocols import ClientId, Params, Profile
from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.data.exclusion import Excluded
from fedloom.data.tokens import Example
from fedloom.evaluation.fairness import fairness
from fedloom.results.by_label import metrics_by_label
from fedloom.results.export import deliverables, export_models
from fedloom.rounds.checkpoint import state_sha256
from fedloom.rounds.costs import FILE as COSTS_FILE
from fedloom.rounds.costs import KINDS, totals
from fedloom.rounds.loop import Run
from fedloom.rounds.privacy import FILE as PRIVACY_FILE
from fedloom.rounds.privacy import privacy_record
from fedloom.rounds.reading import QUIET_MANIFEST
from fedloom.rounds.session import Session
from fedloom.spaces.offsite import OffsiteSpace
from fedloom.spaces.seed_space import SeedSpace
from fedloom.tracking.environment import (
    collect,
    peak_gpu_memory_bytes,
    peak_memory_bytes,
    phase_memory,
)
from fedloom.tracking.metric_format import measures
from fedloom.tracking.metrics_log import MetricsLog
from fedloom.tracking.records import finite, records


def finish(session: Session, run: Run[Any], *, began: float) -> Mapping[str, Any]:
    """Write what the run leaves behind and return its summary.

    Args:
        session: The recipe, built.
        run: After its last round.
        began: time.perf_counter() when this process began.
    """
    folder = session.folder
    if session.recipe.run.samples:
        write_json(folder / "samples.json", samples(session, run))
    details = _details(session, run)
    for name, value in details.items():
        write_json(folder / name, value)
    worst = details.get("by_label.json", {}).get("worst", {})
    summary = summarise(session, run, seconds=time.perf_counter() - began) | {"worst": worst}
    write_json(folder / "summary.json", summary)
    export_models(session, run, folder / "adapters")
    if session.recipe.tune.is_seed_space:
        write_json(folder / "seeds.json", seed_record(session, run))
    return summary


def _details(session: Session, run: Run[Any]) -> dict[str, Any]:
    """Return what only some runs tell, by the name of its file."""
    details, by = dict[str, Any](), session.recipe.evaluation.by
    if by is not None and session.judges:
        details["by_label.json"] = metrics_by_label(session, run, by)
    clusters = describe(session.recipe.algorithm, run.state).clusters
    if clusters is not None:
        details["clusters.json"] = clusters_record(clusters, session.federation.profiles)
    return details


def record_clusters(session: Session, run: Run[Any]) -> None:
    """Write down who is where, if that changed in the run's last round."""
    clusters = describe(session.recipe.algorithm, run.state).clusters
    if clusters is not None and run.number in clusters.changes:
        profiles = session.federation.profiles
        write_json(session.folder / "clusters.json", clusters_record(clusters, profiles))


def write_json(file: Path, value: Any) -> None:
    """Write `value` atomically, readable by people; what is not finite becomes null."""
    text = json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(file, (text + "\n").encode())


def record_setup(session: Session) -> None:
    """Write what is known before training: the split and the machine."""
    manifest = session.federation.manifest
    privacy = describe(session.recipe.algorithm).privacy
    if privacy is not None:
        write_json(session.folder / PRIVACY_FILE, dataclasses.asdict(privacy))
    if privacy is not None and privacy.quiet:
        # For later commands, which have to know the clients of a run whose data is elsewhere.
        text = json.dumps(manifest.to_json()).encode()
        write_atomic(session.folder / QUIET_MANIFEST, text, private=session.folder / "checkpoints")
        manifest = dataclasses.replace(
            manifest, clients={}, profiles={}, excluded=Excluded(), unseen=()
        )
    write_json(session.folder / "manifest.json", manifest.to_json())
    write_json(session.folder / "environment.json", collect())


def summarise(session: Session, run: Run[Any], *, seconds: float) -> dict[str, Any]:
    """Return summary.json: results, totals and the hash of the server's state."""
    recipe, table = session.recipe, session.recipe.evaluation.table
    described = describe(recipe.algorithm, run.state)
    history = MetricsLog.read(session.folder / "metrics.jsonl", table)
    totals = {} if described.quiet else _totals(history)
    found = {m: history.best(m) for m in history.measured()}
    best = {m: {"round": b[0], "value": b[1]} for m, b in found.items() if b is not None}
    ends = {m: history.ends(m) for m in history.measured()}
    return {
        "name": recipe.name,
        "algorithm": type(recipe.algorithm).__name__,
        "tune": recipe.tune.title,
        "rounds": run.number,
        "before": {m: before for m, (before, _) in ends.items() if before is not None},
        "final": {m: final for m, (_, final) in ends.items()},
        "best": best,
        **totals,
        "fairness": {} if described.quiet else _fairness(session),
        "client_costs": {} if described.quiet else _client_costs(session),
        "wall_seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
        "peak_gpu_memory_bytes": peak_gpu_memory_bytes(),
        "num_trainable": sum(t.numel() for t in session.space.start().values()),
        "num_clients": len(session.learners),
        "num_unseen": len(session.unseen),
        "num_clusters": _num_clusters(described),
        "state_sha256": state_sha256(run),
        **_drawn(session),
        **_disclosed(session),
        "stopped_early": run.number < recipe.run.rounds,
        "privacy": privacy_record(described.privacy, history),
    }


def _fairness(session: Session) -> dict[str, Mapping[str, float]]:
    """Return how evenly clients are served by what was measured last, by metric, see `evaluation.fairness`."""
    rows = records(session.folder / "clients.jsonl").rows()
    last = max((row["round"] for row in rows), default=0)
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["round"] == last and row["split"] != "validation":
            for name, value in row["metrics"].items():
                if value is not None:
                    values.setdefault(f"{row['split']}/{name}", []).append(value)
    table = session.recipe.evaluation.table
    return {
        name: fairness(table.of(name), values[name])
        for name in measures(values, table)
        if table.of(name).better != "none"
    }


def _client_costs(session: Session) -> dict[str, dict[str, float]]:
    """Return of each kind of cost what clients took in all rounds together, and what the one took that took most."""
    spent = totals(records(session.folder / COSTS_FILE).rows()).values()
    return {
        kind: {"total": sum(own[kind] for own in spent), "most": max(own[kind] for own in spent)}
        for kind in (KINDS if spent else ())
    }


def _drawn(session: Session) -> dict[str, Any]:
    """Return how many clients each evaluation drew, and of how many; nothing where all were measured."""
    able = sum(bool(session.counts[c].test) for c in session.judges if c not in session.unseen)
    wanted = session.recipe.evaluation.clients
    return {"evaluated": {"clients": wanted, "of": able}} if wanted and wanted < able else {}


def _disclosed(session: Session) -> dict[str, float]:
    """Return which share of the model clients have; nothing where they have all of it."""
    space = session.space
    share = space.disclosed if isinstance(space, OffsiteSpace) else None
    return {} if share is None else {"disclosed": share}


def _totals(history: MetricsLog) -> dict[str, Any]:
    return {
        "upload_bytes": int(history.total("comm/upload_bytes")),
        "download_bytes": int(history.total("comm/download_bytes")),
        "num_absent": int(history.total("comm/num_absent")),
        "rounds_unchanged": sum(not value for _, value in history.of("comm/round_kept")),
        "skipped_steps": int(history.total("train/skipped_steps")),
        "train_seconds": round(history.total("time/train_seconds"), 3),
        "evaluation_seconds": round(history.total("time/evaluation_seconds"), 3),
    }


def _num_clusters(described: Description) -> int:
    """Return how many clusters have a model of their own; 1 where all clients share one."""
    return max(len(described.clusters.names), 1) if described.clusters else 1


def samples(session: Session, run: Run[Any]) -> list[dict[str, Any]]:
    """Return test examples of as many clients as possible with the answers before and after training."""
    chosen = _chosen(session)
    deployed = session.deployed(run)
    before = _answers(session, chosen, {c: session.space.start() for c, _ in chosen})
    after = _answers(session, chosen, deployed)
    rows = []
    for (client, example), was, now in zip(chosen, before, after, strict=True):
        record = example.record
        if record is not None:
            rows.append(
                {
                    "client": client,
                    "labels": session.federation.manifest.shown_labels(record.labels),
                    "prompt": record.messages[-2].content if len(record.messages) > 1 else "",
                    "reference": record.messages[-1].content,
                    "before": was,
                    "after": now,
                }
            )
    return rows


def _chosen(session: Session) -> list[tuple[str, Example]]:
    """Take the clients' first test examples in turn, until there are enough."""
    shards, chosen = session.federation.shards, list[tuple[str, Example]]()
    turns = max((len(shard.test) for shard in shards.values()), default=0)
    for turn in range(turns):
        for client in session.judges:
            if turn < len(shards[client].test) and len(chosen) < session.recipe.run.samples:
                chosen.append((client, shards[client].test[turn]))
    return chosen


def _answers(
    session: Session, chosen: list[tuple[str, Example]], params: Mapping[str, Params]
) -> list[str]:
    """Generate once for every distinct model."""
    out: dict[int, str] = {}
    for model in {id(params[c]): params[c] for c, _ in chosen}.values():
        mine = [i for i, (c, _) in enumerate(chosen) if params[c] is model]
        session.space.load(model)
        texts = session.evaluator.answers(session.space.model, [chosen[i][1] for i in mine])
        out.update(zip(mine, texts, strict=True))
    return [out[i] for i in range(len(chosen))]


_MODELS = 7
"""Models whose coefficients are written down."""


def seed_record(session: Session, run: Run[Any]) -> dict[str, Any]:
    """Return what seeds.json holds: the coefficients, the chances of the seeds, and what one rebuild takes."""
    models = deliverables(session, run)
    seeds = describe(session.recipe.algorithm, run.state).seeds
    params = next(iter(models.values()))[0]
    assert isinstance(session.space, SeedSpace)
    session.space.forget()
    began = time.perf_counter()
    with phase_memory("rebuild") as memory:
        session.space.load(params)
    seconds = time.perf_counter() - began
    return {
        "num_seeds": params[COEFFICIENTS].numel(),
        "models": [
            {"name": name, "num_clients": len(clients), COEFFICIENTS: _short(params[COEFFICIENTS])}
            for name, (params, clients) in list(models.items())[:_MODELS]
        ],
        "probabilities": None if seeds is None else _short(seeds.chances),
        "rebuild": {"seconds": round(seconds, 3), **memory},
    }


def _short(values: Tensor) -> list[float]:
    """Return the numbers with the digits that float32 has."""
    return [float(f"{value:.9g}") for value in values.to(torch.float64).tolist()]


_MOST = 300
"""Clients whose similarities are written down, all with all."""


def clusters_record(clusters: Clusters, profiles: Mapping[ClientId, Profile]) -> dict[str, Any]:
    """Return what clusters.json holds: who is where and since when, and what that rests on."""
    return {
        "assignment": dict(clusters.assignment),
        "changes": {str(round): dict(moves) for round, moves in clusters.changes.items()},
        "confidence": clusters.confidence,
        "noise": clusters.noise,
        "agreement": _agreement(clusters, profiles),
        "clients": list(clusters.clients),
        "similarity": _rounded(clusters.similarity, 4) if len(clusters.clients) <= _MOST else [],
        "merges": _rounded(clusters.merges, 6),
        "variances": {
            name: {"noise": noise, "spread": spread}
            for name, (noise, spread) in clusters.variances.items()
        },
    }


def _agreement(
    clusters: Clusters, profiles: Mapping[ClientId, Profile]
) -> dict[str, dict[str, Any]]:
    """Return, for each label that all grouped clients have, its adjusted Rand index with the clusters."""
    clients = [client for client in clusters.assignment if client in profiles]
    if not clients:
        return {}
    found = [clusters.assignment[client] for client in clients]
    shared = set.intersection(*(set(profiles[client]) for client in clients))
    agreement, seen = dict[str, dict[str, Any]](), list[list[str]]()
    for label in sorted(shared, key=lambda name: (name == "group", name)):
        values = [profiles[client][label] for client in clients]
        # A group is called for the label it was dealt out by: that name is enough.
        if 1 < len(set(values)) < len(values) and values not in seen:
            seen.append(values)
            agreement[label] = {
                "adjusted_rand": adjusted_rand(found, values),
                "num_values": len(set(values)),
            }
    return agreement


def _rounded(values: Tensor | None, digits: int) -> list[list[float]]:
    return (
        []
        if values is None
        else [[round(value, digits) for value in row] for row in values.tolist()]
    )
