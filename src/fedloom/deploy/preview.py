"""What would leave a site, shown before anything does; and what a running server knows of its sites."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fedloom.core.protocols import Payload, Reply
from fedloom.deploy.site import open_session, rehearsed
from fedloom.deploy.site_settings import SiteSettings
from fedloom.engines.codec import MessageCodec
from fedloom.engines.sums import layout_of
from fedloom.recipe import build_recipe
from fedloom.recipe_text import to_tree
from fedloom.rounds.session import Session
from fedloom.secure.fixed_point import width
from fedloom.tracking.metric_format import human_bytes
from fedloom.tracking.metrics_log import MetricsLog
from fedloom.wire.format import encode_reply, encode_task

_SEEN = {
    "each": "the server reads every upload by itself",
    "each in full": "the server compares the uploads, entry by entry",
    "mean of each cluster": "the server needs only the means of given clusters, and receives each upload",
    "mean": "the server needs only the mean of the uploads, and receives each of them",
    "noisy mean": "the server adds noise to the mean; it receives each upload, clipped at the site",
}


def site_preview(settings: SiteSettings, recipe_text: str) -> Iterator[RenderableType]:
    """Yield tables of everything a site sends and receives under a recipe, by a rehearsal on its own data.

    Raises:
        ValueError: where the site would refuse the recipe.
    """
    session = open_session(
        settings, settings.with_worker(build_recipe(yaml.safe_load(recipe_text)))
    )
    task, reply = rehearsed(session)
    wire = session.recipe.wire
    for note in session.federation.manifest.left_out():
        yield Text(note, style="yellow")
    yield _introduction(session)
    received = len(encode_task(task, settings=wire))
    yield _payload("received in a round", task.download, received, wire.download)
    if (secure := session.recipe.secure) is None:
        sent = len(encode_reply(settings.limits.bounded(reply), settings=wire))
        yield _payload("sent in a round", reply.upload, sent, wire.upload)
    else:
        codec = MessageCodec(session.recipe.algorithm, wire, session.recipe.metrics)
        size = layout_of(codec, task, secure, 1.0).size
        bits = width(secure.threshold, secure.bits)
        title = f"sent in a round under masks, {bits} bits a number or more"
        yield _payload(title, reply.upload, -(-size * bits // 8), f"{bits} bits")
    yield _privacy(session, settings, reply)


def _introduction(session: Session) -> Table:
    table = Table("sent once, when the site joins", "value", title_justify="left")
    for client, counts in session.counts.items():
        table.add_row("client", client)
        labels = session.federation.manifest.shown_labels(session.engine.population()[client])
        for label, value in labels.items():
            table.add_row(label.replace("_", " "), value)
        table.add_row("validation examples", str(counts.validation))
        table.add_row("test examples", str(counts.test))
        table.add_row("training tokens", str(counts.tokens))
    table.add_row("tuned here", session.recipe.tune.title)
    table.add_row("versions", "of fedloom and its wire; hashes of recipe and base model")
    return table


def _payload(title: str, payload: Payload, size: int, values: str) -> Table:
    table = Table("group", "tensor", "shape", "type", title=title, title_justify="left")
    for group, params in payload.items():
        for name, tensor in params.items():
            kind = str(tensor.dtype).removeprefix("torch.")
            shape = " x ".join(map(str, tensor.shape)) or "one number"
            travels = values if kind == "float32" else kind
            table.add_row(group, name, shape, travels)
        table.add_section()
    table.add_row("", "the whole message", human_bytes(size), "")
    return table


def _privacy(session: Session, settings: SiteSettings, reply: Reply) -> Table:
    recipe, limits = session.recipe, settings.limits
    table = Table("privacy", "value", title_justify="left")
    secure = recipe.secure
    table.add_row(
        "the server",
        _SEEN[recipe.algorithm.server_sees]
        if secure is None
        else f"the server receives uploads under masks, and opens sums of {secure.threshold} or more, weights and metrics"
        " in them",
    )
    for layer in to_tree(recipe)["algorithm"]:
        for name, fields in layer.items():
            text = ", ".join(f"{k} {v}" for k, v in fields.items() if not isinstance(v, dict))
            table.add_row(name, text)
    table.add_row("also sent", ", ".join(["weight", *sorted(reply.metrics)]))
    if recipe.evaluation.every:
        table.add_row(
            "evaluation", f"means over held-out examples, every {recipe.evaluation.every}"
        )
    table.add_row("this site's clip", "none" if limits.clip is None else f"{limits.clip:g}")
    table.add_row("this site's columns", ", ".join(limits.columns) or "all")
    table.add_row("largest message", f"{limits.max_message_mb:g} MiB")
    return table


def status(folder: Path) -> Table:
    """Return what the server of a run knows: its sites, and where the run stands.

    Raises:
        ValueError: where the folder holds no run of a federation.
    """
    file = folder / "status.json"
    if not file.exists():
        raise ValueError(
            f"{folder} has no status.json: give the folder of a run with engine=flower"
        )
    try:
        fields: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return _status(folder, fields)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} is not what a server wrote: remove it and start it again"
        ) from error


def _status(folder: Path, fields: Mapping[str, Any]) -> Table:
    table = Table(title=_standing(folder, fields), title_justify="left")
    for column in ("site", "connected", "last answer", "down", "up", "absent", "last reason"):
        table.add_column(column)
    for site, record in sorted(fields["sites"].items()):
        ago = time.time() - record["last_seen"]
        table.add_row(
            site,
            "yes" if record["connected"] else "no",
            f"{ago:.0f} s ago" if record["last_seen"] else "never",
            human_bytes(record["download_bytes"]),
            human_bytes(record["upload_bytes"]),
            str(record["num_absent"]),
            record["last_absence"],
        )
    return table


def _standing(folder: Path, fields: Mapping[str, Any]) -> str:
    lines = MetricsLog.read(folder / "metrics.jsonl")
    finished = int(lines.lines[-1]["round"]) if lines.lines else 0
    words = [f"{folder.name}: round {finished} finished, at {fields['at']}"]
    if (folder / "summary.json").exists():
        words.append("run ended")
    if epsilon := lines.of("server/epsilon"):
        words.append(f"epsilon {epsilon[-1][1]:.3g}")
    return ", ".join(words)
