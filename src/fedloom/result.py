"""What a run left behind, for programs: its numbers, its models, and what one does with them."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedloom.core.files import folder_at
from fedloom.core.metrics import METRICS, Metric, MetricTable
from fedloom.core.protocols import ClientId, Split
from fedloom.models.gguf_write import GgufType
from fedloom.objects import Objects
from fedloom.reopen import Opened, open_session
from fedloom.report.card import Form
from fedloom.results.chat import Chat
from fedloom.results.evaluate import Evaluation, evaluate
from fedloom.results.export import check_form, export_models
from fedloom.results.records import Records, client_records, metric_records
from fedloom.results.routing import model_of
from fedloom.results.suite_results import SuiteResult, keep
from fedloom.results.suites import BASE, Asked, most_tokens, run_suite, shown_sha256
from fedloom.rounds.lock import held
from fedloom.rounds.reading import metrics_of, read_json, require_run
from fedloom.suites.lm_eval import harness
from fedloom.tracking.metric_format import duration, human_bytes, measures, shown


@dataclass(frozen=True)
class Result:
    """A run's folder, read when it is asked; a model is loaded only for `evaluate`, `chat` and `export`."""

    folder: Path
    objects: Objects = Objects()
    """What Python gave in the place of sections when the run was begun."""
    console: Console = field(default_factory=lambda: Console(quiet=True), repr=False)
    """Where notes go."""
    anyway: bool = False
    """Whether data or model may be others than the run was begun with."""
    moved: Path | None = None
    """Where the base model is now, if it is not where the recipe says."""

    @property
    def summary(self) -> Mapping[str, Any]:
        """Return summary.json: metrics before and after, bytes, seconds, the hash of the server's state.

        Raises:
            ValueError: where the run is not finished.
        """
        file = self.folder / "summary.json"
        if not file.exists():
            raise ValueError(
                f"{self.folder} has no summary.json, as its run is not finished: fedloom.run with the same recipe and"
                " folder goes on with it"
            )
        return read_json(file, dict, remedy=f"`fedloom resume {self.folder}` writes it anew")

    @property
    def metrics(self) -> Records:
        """Return a record a round from 0, the model before training, as in metrics.jsonl."""
        return metric_records(self.folder)

    @property
    def clients(self) -> Records:
        """Return a record for every evaluation of a client: round, client, split and its metrics."""
        return client_records(self.folder)

    @property
    def baselines(self) -> dict[str, "Result"]:
        """Return the results of the run's baselines by name, such as "local"."""
        below, objects = (
            self.folder / "baselines",
            dataclasses.replace(self.objects, algorithm=None),
        )
        found = sorted(path.parent for path in below.glob("*/summary.json"))
        return {
            path.name: dataclasses.replace(self, folder=path, objects=objects) for path in found
        }

    @property
    def report(self) -> Path:
        """Return the path of report.html."""
        return self.folder / "report.html"

    def adapter(self, client: ClientId | None = None) -> Path:
        """Return the folder of the adapter that a client uses, which plain peft loads.

        Args:
            client: Its id; may be left out where all clients share one adapter.

        Raises:
            ValueError: where there is no such client, or none was named and adapters differ.
        """
        return model_of(self.folder / "adapters", client)

    def evaluate(self, split: Split = "test") -> Evaluation:
        """Measure the deployed weights again on every client's held-out data."""
        opened = self.open("evaluate", data=True)
        return evaluate(opened.session, opened.run, split)

    def suites(
        self, asked: Sequence[Asked], client: str | None = None, *, base: bool = False
    ) -> list[SuiteResult]:
        """Ask a deployed model public tests, and keep what came of them in suites.json.

        Args:
            asked: Which suites, from which files: `fedloom.Asked("mmlu", "test.jsonl", limit=100)`.
            client: Whose model, or the model's own name; the shared one if not given.
            base: Whether the model before training is asked too.
        """
        for each in asked:  # refused before anything is asked
            shown_sha256(each)
        opened = self.open("suite")
        session = opened.session
        model, tokenizer = session.space.model, session.base.tokenizer
        _one_model(opened, client)
        results = list[SuiteResult]()
        for name in (BASE, client) if base else (client,):
            chat = _one_model(opened, name)
            with session.evaluator.deployed():
                for each in asked:
                    found = run_suite(model, tokenizer, chat.name, each, recipe=session.recipe)
                    keep(self.folder, [found])
                    results.append(found)
        return results

    def lm_eval(
        self,
        tasks: Sequence[Any],
        client: str | None = None,
        *,
        shots: int | None = None,
        limit: int | None = None,
    ) -> Mapping[str, Any]:
        """Return what lm-evaluation-harness (`pip install fedloom[eval]`) measures of a deployed model, by task.

        Args:
            tasks: Its names, or configurations of tasks as mappings, such as over local files.
            client: Whose model, or the model's own name; the shared one if not given.
            shots: Worked examples; as the tasks have it if not given.
            limit: Of the items of each task, the first so many.
        """
        session = _one_model(self.open("lm_eval"), client).session
        model, tokenizer = session.space.model, session.base.tokenizer
        with session.evaluator.deployed():
            return harness(
                model, tokenizer, tasks, max_length=most_tokens(model), shots=shots, limit=limit
            )

    def chat(self, client: str | None = None) -> Chat:
        """Return a conversation with a deployed model: `chat().answer("...")`.

        Args:
            client: Whose model, or the model's own name; "auto" lets what is asked choose, "base" is the model before
                training; the shared one if not given.
        """
        opened = self.open("chat")
        return Chat.open(opened.session, client, run=opened.run)

    def export(
        self,
        out: Path | str | None = None,
        *,
        form: Form = "peft",
        type: GgufType | None = None,
    ) -> Mapping[str, Path]:
        """Write the deployed models for other programs; return what these load, by name.

        Args:
            out: Where; `adapters`, or a folder named for the form, in the run's folder if not given.
            form: "peft": adapters as folders that peft loads, or whole models where these were tuned; "lora": an adapter
                of tune: vera as LoRA; "vllm": LoRA as vLLM reads it; "merged": whole models as folders of transformers;
                "nf4": such a folder in NF4 again; "gguf": whole models as GGUF files; "gguf-lora": LoRA as GGUF, for
                llama.cpp; "seeds": seed files.
            type: Of a GGUF's matrices: "f32", "f16", which it is if not given, or "q8_0".

        Raises:
            ValueError: where what was tuned cannot be had in this form.
        """
        check_form(form, type)
        default = self.folder / ("adapters" if form == "peft" else form)
        target = folder_at(default if out is None else Path(out), "--out")
        inside = self.folder.resolve() in target.resolve().parents
        with held(self.folder) if inside else nullcontext():
            opened = self.open("export")
            return export_models(
                opened.session, opened.run, target, form=form, type=type or "f16", newcomers=True
            )

    def open(self, command: str, *, data: bool = False) -> Opened:
        """Return the run as its newest checkpoint has it, built: for what the other methods do not do."""
        return open_session(
            self.folder,
            command,
            console=self.console,
            objects=self.objects,
            data=data,
            anyway=self.anyway,
            model=self.moved,
        )

    def table(self) -> Table:
        """Return the result beside its baselines: before, after, bytes, time."""
        others = {name: baseline.summary for name, baseline in self.baselines.items()}
        return results_table(self.summary, others, metrics_of(self.folder))


def open_run(
    folder: Path | str,
    *,
    algorithm: Any = None,
    data: Any = None,
    model: Any = None,
    trainer: Any = None,
    metrics: Sequence[Metric] = (),
    console: Console | None = None,
    anyway: bool = False,
    moved: Path | None = None,
) -> Result:
    """Return the result of a run that is in a folder already.

    Args:
        folder: The run's.
        algorithm: As given to `fedloom.run`, and so are the next three; only what was given there, and is asked of, is
            needed.
        data: For `evaluate`.
        model: For `evaluate`, `chat` and `export`.
        trainer: For `evaluate`, where it is to measure; the package's own does if not given.
        metrics: For `evaluate`; those whose function is not given are left out.
        console: Where notes go; nowhere if not given.
        anyway: Go on although data or model are not what the run was begun with, and write that down.
        moved: Where the base model is now, if it has moved.

    Raises:
        ValueError: where there is no run.
    """
    require_run(Path(folder))
    objects = Objects(algorithm=algorithm, data=data, model=model, trainer=trainer, metrics=metrics)
    return Result(Path(folder), objects, console or Console(quiet=True), anyway, moved)


def _one_model(opened: Opened, client: str | None) -> Chat:
    """Put a deployed model into the session, and return the chat with it.

    Raises:
        ValueError: where there is no such model, or it is left to each question which of several it is.
    """
    chat = Chat.open(opened.session, client, run=opened.run)
    if len(chat.models) > 1:
        raise ValueError(
            f"a public test asks one model, and {client} chooses anew with every question: name one of"
            f" {', '.join(chat.models)}, or a client"
        )
    return chat


def results_table(
    own: Mapping[str, Any],
    baselines: Mapping[str, Mapping[str, Any]] | None = None,
    metrics: MetricTable = METRICS,
) -> Table:
    """Return the summary of a run beside those of its baselines, by name; `metrics` are the run's."""
    baselines = baselines or {}
    summaries = [own, *baselines.values()]
    table = Table(
        title=Text(f"{own['name']}: {own['rounds']} rounds, {own['num_clients']} clients"),
        title_justify="left",
    )
    table.add_column("metric")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    for name in baselines:
        table.add_column(name, justify="right")
    for metric in map(metrics.of, measures(own["final"], metrics)):
        row = [own["before"], *(summary["final"] for summary in summaries)]
        table.add_row(metric.title, *(_cell(metric, values) for values in row))
    for metric in map(metrics.of, own["worst"]):
        found = (s["worst"].get(metric.name) for s in summaries)
        worst = (f"{shown(metric, w['result'])} ({w['value']})" if w else "" for w in found)
        table.add_row(f"Worst {metric.title.lower()}", "", *map(Text, worst))
    if drawn := own.get("evaluated"):
        chosen = f"{drawn['clients']} of {drawn['of']}, drawn for each evaluation"
        table.add_row("Clients measured", "", chosen)
    for label, style, cells in _totals(summaries):
        table.add_row(label, "", *cells, style=style)
    return table


def _cell(metric: Metric, values: Mapping[str, float | None]) -> str:
    """Return a value of a summary; a number that is not finite is null in its file."""
    value = values.get(metric.name)
    return shown(metric, math.nan if value is None and metric.name in values else value)


def _totals(
    summaries: Sequence[Mapping[str, Any]],
) -> list[tuple[str, str | None, list[str]]]:
    """Return label, style and a cell a run of what is counted over a whole run."""
    rows: list[tuple[str, str | None, list[str]]] = []

    def add(label: str, cell: Callable[[Mapping[str, Any]], str], style: str | None = None) -> None:
        rows.append((label, style, [cell(summary) for summary in summaries]))

    if any(s.get("rounds_unchanged") for s in summaries):
        told = "Rounds that changed nothing"
        add(told, lambda s: f"{s.get('rounds_unchanged', 0)} of {s['rounds']}", "yellow")
    counted = all("upload_bytes" in s for s in summaries)
    if counted:
        add("Bytes up", lambda s: human_bytes(s["upload_bytes"]))
        add("Bytes down", lambda s: human_bytes(s["download_bytes"]))
    if any(s.get("privacy") for s in summaries):
        add("Privacy", lambda s: (s.get("privacy") or {"short": ""})["short"])
    if counted:
        add("Training time", lambda s: duration(s["train_seconds"]))
    return rows
