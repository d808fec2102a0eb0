"""report.html: everything about one run on one page that loads nothing; a pure function of the run directory."""

import math
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fedloom.core.files import write_atomic
from fedloom.core.metrics import Metric
from fedloom.data.manifest import Manifest
from fedloom.data.preview import split_figure
from fedloom.evaluation.text_metrics import extract
from fedloom.report import figures
from fedloom.report.arms import arms_section
from fedloom.report.client_figures import cost_rows, fairness_rows
from fedloom.report.clusters import clusters_section
from fedloom.report.event_clock import clock_section
from fedloom.report.figures import Line
from fedloom.report.influence import influence_section
from fedloom.report.labels import labels_section
from fedloom.report.mixture import mixture_section
from fedloom.report.run_folder import Results, by_name, read_results
from fedloom.report.seed_space import seeds_section
from fedloom.report.server import server_sections
from fedloom.rounds.inputs import note_text
from fedloom.rounds.received import NOTE as UPLOADS_KEPT
from fedloom.tracking.metric_format import change, duration, human_bytes, measures, quality, shown

_CURVES = (
    "test/exact_match",
    "test/preference_accuracy",
    "test/preference_margin",
    "test/accuracy",
    "test/loss",
    "test/plugin/loss",
    "public/loss",
    "public/plugin/loss",
    "validation/loss",
    "train/loss",
    "test/rougeL",
    "test/token_accuracy",
)
FILE = "report.html"
_PAGES = Path(__file__).parent / "pages"
_SPLITS = ("train", "validation", "test")
_LONG = 700
"""Characters of a sample that are shown."""


def write_report(folder: Path, *, others: Sequence[Path] = ()) -> Path:
    """Write report.html into a run directory.

    Args:
        folder: The run directory.
        others: Run directories drawn into the curves, beside the baselines in `folder`.

    Returns:
        The path of the report.
    """
    path = folder / FILE
    write_atomic(path, report_html(folder, others=others).encode())
    return path


def report_html(folder: Path, *, others: Sequence[Path] = ()) -> str:
    """Return the page that `write_report` writes, of a run that may still go on."""
    own = read_results(folder)
    runs = by_name([own, *map(read_results, others)], reserved=tuple(own.baselines))
    beside = {**own.baselines, **dict(list(runs.items())[1:])}
    return render("report.html.j2", _page(own, beside))


def render(template: str, page: Mapping[str, Any], *, folder: Path = _PAGES) -> str:
    """Return a page whose template is in a folder, or among those of the report; what is on it is escaped.

    Halves of characters, which JSON and names of files may hold and UTF-8 does not, are spelled out.
    """
    text = _templates(folder).get_template(template).render(page)
    return text.encode(errors="backslashreplace").decode()


@cache
def _templates(folder: Path) -> Environment:
    return Environment(
        loader=FileSystemLoader([folder, _PAGES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def live_sections(own: Results) -> dict[str, Any]:
    """Return the sections of a report that say something while a run goes on, as the templates `section_*` take them."""
    name = quality([own.metrics()])
    metric = None if name is None else own.metric(name)
    runs = [(own.name if own.baselines else "this run", own), *own.baselines.items()]
    return {
        "tiles": _tiles(own, metric),
        "legend": _legend(runs),
        "curves": _curves(runs),
        "traffic": _traffic(runs, metric),
        "privacy": server_sections(own)["privacy"],
        "clusters": clusters_section(own),
        "influence": influence_section(own),
        "clients": _clients(own, metric),
    }


def _page(own: Results, beside: Mapping[str, Results]) -> dict[str, Any]:
    name = quality([own.metrics()])
    metric = None if name is None else own.metric(name)
    runs = [(own.name if beside else "this run", own), *beside.items()]
    return {
        "name": own.name,
        "description": own.recipe.get("description") or "",
        "facts": _facts(own),
        "tiles": _tiles(own, metric),
        "legend": _legend(runs),
        "results": _results(runs),
        "curves": _curves(runs),
        "traffic": _traffic(runs, metric),
        "clock": clock_section(runs, metric),
        **server_sections(own),
        "seeds": seeds_section(own),
        "clusters": clusters_section(own),
        "mixture": mixture_section(own),
        "arms": arms_section(own),
        "influence": influence_section(own),
        "by_label": labels_section(runs),
        "clients": _clients(own, metric),
        "fairness": fairness_rows(own),
        "costs": cost_rows(own),
        "split": _split(own),
        "samples": _samples(own),
        "notes": _notes(own),
        "recipe": own.recipe_text,
        "machine": machine_rows(own),
    }


def _legend(runs: Sequence[tuple[str, Results]]) -> list[dict[str, Any]]:
    return [{"label": name, "color": at % 7, "dashed": at > 0} for at, (name, _) in enumerate(runs)]


def _facts(own: Results) -> list[str]:
    model, data = (own.recipe.get(section) or {} for section in ("model", "data"))
    trainable, disclosed = own.summary.get("num_trainable"), own.summary.get("disclosed")
    facts = [
        own.summary.get("algorithm"),
        model.get("name"),
        data.get("source") or own.manifest.get("source"),
        f"prompt: {own.manifest['prompt']}" if own.manifest.get("prompt") else None,
        own.summary.get("tune"),
        f"{trainable:,} trainable parameters" if trainable else None,
        None if disclosed is None else f"clients have {100 * disclosed:.1f} % of the model",
    ]
    return [fact for fact in facts if fact]


def _tiles(own: Results, metric: Metric | None) -> list[dict[str, str]]:
    tiles = []
    loss = "test/loss" if "test/loss" in own.metrics() else None
    headline = metric.name if metric else None
    for name in dict.fromkeys(filter(None, (headline, loss))):
        one, (before, after) = own.metric(name), own.ends(name)
        was = "" if before is None else shown(one, before)
        note = change(one, before, after)
        tiles.append(_tile(one.title, shown(one, after), note, before=was))
    up, down = (own.history.total(f"comm/{way}_bytes") for way in ("upload", "download"))
    note = f"{human_bytes(up)} up, {human_bytes(down)} down"
    if up + down or not own.summary or "upload_bytes" in own.summary:
        tiles.append(_tile("Traffic", human_bytes(up + down), note))
    rounds = max((line["round"] for line in own.history.lines), default=0)
    count = own.summary.get("num_clients") or len(own.manifest.get("clients", {}))
    notes = [f"{count} clients"] if count else []
    if "train_seconds" in own.summary:
        notes.append(f"{duration(own.summary['train_seconds'])} of training")
    return [*tiles, _tile("Rounds", f"{rounds:.0f}", ", ".join(notes))]


def _tile(label: str, value: str, note: str, *, before: str = "") -> dict[str, str]:
    return {"label": label, "before": before, "value": value, "note": note}


def _results(runs: Sequence[tuple[str, Results]]) -> list[dict[str, Any]]:
    own, rows = runs[0][1], []
    for name in measures(own.metrics(), own.history.table):
        metric, (before, after) = own.metric(name), own.ends(name)
        rows.append(
            {
                "label": metric.title,
                "before": shown(metric, before),
                "after": shown(metric, after),
                "change": change(metric, before, after),
                "others": [shown(metric, run.ends(name)[1]) for _, run in runs[1:]],
            }
        )
    return rows


def _curves(runs: Sequence[tuple[str, Results]]) -> list[str]:
    drawn, first = [], runs[0][1]
    for metric in (*_CURVES, *(f"test/{name}" for name in first.history.table.own)):
        lines = [
            Line(name, run.history.of(metric), at, dashed=at > 0)
            for at, (name, run) in enumerate(runs)
            if run.history.of(metric)
        ]
        if first.history.of(metric):
            known = first.metric(metric)
            draw = partial(figures.curve, known, lines)
            drawn.append(figures.svg(draw, f"{known.title} over the rounds"))
    return drawn


def _traffic(runs: Sequence[tuple[str, Results]], metric: Metric | None) -> list[str]:
    own, drawn = runs[0][1], []
    upload = own.history.of("comm/upload_bytes")
    if not upload:
        return []
    if metric is not None:
        lines = [bytes_line(name, run, metric.name, at) for at, (name, run) in enumerate(runs)]
        draw = partial(figures.quality_by_bytes, metric, [line for line in lines if line])
        drawn.append(figures.svg(draw, f"{metric.title} by bytes sent"))
    download = dict(own.history.of("comm/download_bytes"))
    draw = partial(figures.round_bytes, upload, download)
    return [*drawn, figures.svg(draw, "Bytes of every round, up and down")]


def bytes_line(name: str, run: Results, metric: str, color: int) -> Line | None:
    """Return a metric over the bytes so far; a run that sent nothing is a level."""
    total = run.total_bytes()
    points = [(total[number], value) for number, value in run.history.of(metric)]
    # A baseline's bytes are an artefact: nobody sends anything alone, and in one place only data moves.
    # The one that waits sends what it would anywhere.
    artefact = run.folder.parent.name == "baselines" and run.folder.name != "synchronous"
    level = artefact or not points or not points[-1][0]
    return Line(name, points, color, dashed=color > 0 and level, level=level) if points else None


def _clients(own: Results, metric: Metric | None) -> dict[str, Any] | None:
    before, after = own.by_client(metric.name) if metric else ({}, {})
    if metric is None or not after:
        return None
    local = own.baselines.get("local")
    alone = local.by_client(metric.name)[1] if local else {}
    held = own.manifest.get("clients", {})
    color = 1 + list(own.baselines).index("local") if local else 1
    drawn = [{c: v for c, v in at.items() if math.isfinite(v)} for at in (before, after, alone)]
    if not drawn[1]:
        return None
    draw = partial(figures.clients, metric, *drawn, color=color)
    rows = [
        {
            "client": client,
            "holds": _main_labels(held.get(client, {}), own.manifest.get("by")),
            "sizes": " / ".join(str(held[client][s]) for s in _SPLITS) if client in held else "",
            "before": shown(metric, before.get(client)),
            "after": shown(metric, after[client]),
            "change": change(metric, before.get(client), after[client]),
            "alone": shown(metric, alone.get(client)) if alone else None,
        }
        for client in sorted(after)
    ]
    names = ["before", "alone", "after"] if alone else ["before", "after"]
    return {
        "metric": metric.title,
        "figure": figures.svg(draw, f"{metric.title} of every client before and after"),
        "rows": rows,
        "legend": names if before else names[1:],
        "color": color,
    }


def _main_labels(counts: Mapping[str, Any], by: str | None) -> str:
    labels: Mapping[str, Mapping[str, int]] = counts.get("labels", {})
    if (hidden := counts.get("num_values", {}).get(by, 0)) > 1:
        return f"{hidden} values of {by}"
    values = labels.get(by or "") or next(iter(labels.values()), {})
    total = sum(values.values())
    most = sorted(values.items(), key=lambda item: (-item[1], item[0]))[:2]
    return ", ".join(f"{name} {100 * n / total:.0f} %" for name, n in most if n)


def _split(own: Results) -> str | None:
    if not own.manifest.get("clients"):
        return None
    return figures.svg(
        lambda: figures.widened(split_figure(own.manifest)), "Labels of every client"
    )


def _samples(own: Results) -> list[dict[str, Any]]:
    what = (own.recipe.get("evaluation") or {}).get("extract", "text")
    hidden = own.manifest.get("hidden", {})
    return [
        {
            "client": sample["client"],
            "labels": [v for k, v in sample["labels"].items() if k not in hidden],
            **{key: _short(sample[key]) for key in ("prompt", "reference", "before", "after")},
            "right": {
                key: extract(sample[key], what) == extract(sample["reference"], what)
                for key in ("before", "after")
            },
        }
        for sample in own.samples
    ]


def _short(text: str) -> str:
    return text if len(text) <= _LONG else text[:_LONG] + " \u2026"


def _notes(own: Results) -> list[str]:
    absent = int(own.history.total("comm/num_absent"))
    stale = int(own.history.total("comm/num_stale"))
    skipped = int(own.history.total("train/skipped_steps"))
    broken = sum(math.isnan(line.get("test/loss", 0.0)) for line in own.history.lines)
    notes = [
        (absent, "client-rounds brought no reply"),
        (stale, "updates were older than run.mode.buffered.max_staleness and were dropped"),
        (broken, "evaluations found a loss that is not finite: the model gave no numbers"),
        (skipped, "training steps were skipped because their loss was not finite"),
    ]
    lines = [f"{count:,} {what}" for count, what in notes if count]
    lines += Manifest.from_json(own.manifest).left_out() if own.manifest else []
    early = ["The run stopped early"] if own.summary.get("stopped_early") else []
    drawn = ((split, own.drawn(split)) for split in ("validation", "test"))
    early += [
        f"Each evaluation measured {some[0]:,} of the {some[1]:,} clients with {split} data, drawn anew"
        for split, some in drawn
        if some
    ]
    sentences = [f"{line[0].upper()}{line[1:]}." for line in early + lines]
    kept = [UPLOADS_KEPT] if own.recipe.get("audit") == "record" else []
    return [*kept, *sentences, *(note_text(row) for row in own.anyway)]


_PHASES = {"train": "training", "evaluate": "evaluation", "rebuild": "rebuilding the model"}


def machine_rows(own: Results) -> list[tuple[str, str]]:
    """Return (what, value) of all that is known."""
    machine, summary = own.environment, own.summary
    versions = {"python": machine.get("python"), **machine.get("versions", {})}
    rows = [
        ("Date", machine.get("date")),
        ("Command", machine.get("command")),
        ("Versions", ", ".join(f"{name} {value}" for name, value in versions.items() if value)),
        ("System", machine.get("os")),
        ("Processor", _processor(machine)),
        ("Wall time", duration(summary["wall_seconds"]) if "wall_seconds" in summary else None),
        ("Peak memory", _bytes(summary.get("peak_memory_bytes"))),
        ("Peak memory by phase", _phases(own, "")),
        ("GPU memory by phase", _phases(own, "gpu_")),
        ("Split, SHA-256", own.manifest.get("sha256")),
        ("Final state, SHA-256", summary.get("state_sha256")),
    ]
    return [(name, value) for name, value in rows if value]


def _processor(machine: Mapping[str, Any]) -> str:
    if "cpu" not in machine:
        return ""
    parts = [
        f"{machine['cpu']}, {machine['num_cores']} cores ({machine['num_threads']} threads used)",
        f"{human_bytes(machine['memory_bytes'])} memory",
        *(f"{gpu['name']} ({human_bytes(gpu['memory_bytes'])})" for gpu in machine["gpus"]),
    ]
    return ", ".join(parts)


def _bytes(count: float | None) -> str:
    return human_bytes(count) if count else ""


def _phases(own: Results, kind: str) -> str:
    """Return the most memory held in any round of each phase."""
    values_by_phase = {
        phase: [value for _, value in own.history.of(f"memory/{phase}_{kind}bytes")]
        for phase in _PHASES
    }
    rebuild = (own.seeds.get("rebuild") or {}).get(f"memory/rebuild_{kind}bytes")
    values_by_phase["rebuild"] += [rebuild] if rebuild else []
    peaks = [
        f"{_PHASES[phase]} {human_bytes(max(values))}"
        for phase, values in values_by_phase.items()
        if values
    ]
    return ", ".join(peaks)
