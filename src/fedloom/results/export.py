"""What a run delivers, as folders that plain peft and transformers load."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fedloom.core.description import GLOBAL, Clusters, describe
from fedloom.core.files import write_atomic
from fedloom.core.protocols import ClientId, Params
from fedloom.report.card import model_card
from fedloom.rounds.loop import Run
from fedloom.rounds.session import Session
from fedloom.spaces.adapter import AdapterSpace

Form = Literal["adapter", "lora", "merged"]
USERS = "clients.json"
"""Beside the exported folders: the clients that use each, by its name."""


def deliverables(session: Session, run: Run[Any]) -> dict[str, tuple[Params, list[ClientId]]]:
    """Return every distinct model by name, and who uses it.

    `global` where all use one; otherwise the cluster's name for the one of a cluster, and the client's id for a personal
    one.
    """
    found = describe(session.recipe.algorithm, run.state).clusters or Clusters()
    groups: dict[int, tuple[Params, list[ClientId]]] = {}
    # Where nobody has anything to measure on, whoever learns uses what was learnt.
    users = set(found.assignment) | (set() if session.judges else set(session.learners))
    for client, params in session.deployed(run, also=users).items():
        groups.setdefault(id(params), (params, []))[1].append(client)
    if len(groups) == 1:
        return {GLOBAL: next(iter(groups.values()))}
    clusters = [
        {found.assignment.get(client, GLOBAL) for client in clients}
        for _, clients in groups.values()
    ]
    named: dict[str, tuple[Params, list[ClientId]]] = {}
    for (params, clients), theirs in zip(groups.values(), clusters, strict=True):
        if found.assignment and len(theirs) == 1 and clusters.count(theirs) == 1:
            (name,) = theirs
        else:
            name = clients[0] if len(clients) == 1 else f"cluster-{len(named)}"
        named[name] = (params, clients)
    return named


def export_models(
    session: Session, run: Run[Any], folder: Path, *, form: Form = "adapter"
) -> Mapping[str, Path]:
    """Write one folder a deliverable, and who uses it.

    Args:
        session: The run's.
        run: As it stands.
        folder: Where; a folder in it for each.
        form: An adapter of the run's own kind, that of tune: vera as LoRA, or the whole model.

    Raises:
        ValueError: Where what was tuned cannot be had in this form.
    """
    merged, space = form == "merged", session.space
    save = space.save
    if form == "lora":
        if not isinstance(space, AdapterSpace):
            raise ValueError(
                f"only an adapter of tune: vera can be written as LoRA, got {session.recipe.tune.title}"
            )
        save = space.save_as_lora
    elif merged:
        save = space.save_merged
    written: dict[str, Path] = {}
    users: dict[str, list[ClientId]] = {}
    for name, (params, clients) in deliverables(session, run).items():
        target = folder / name
        card = model_card(
            session.folder, adapter=name, clients=clients, merged=merged, gguf=session.base.gguf
        )
        save(target, params)
        (target / "README.md").write_text(card)
        written[name] = target
        users[name] = clients
    if describe(session.recipe.algorithm).quiet:
        users = {name: [] for name in users}
    text = json.dumps(users, indent=2, ensure_ascii=False) + "\n"
    write_atomic(folder / USERS, text.encode())
    return written
