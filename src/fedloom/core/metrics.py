"""The numbers of a run: what each is called, how many values of it become one, which way is better, and what a client may report."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from fedloom.core.protocols import Metrics

Reduce = Literal["tokens", "examples", "sum", "mean"]
"""A mean weighed by target tokens, of answers that are compared as wholes by their pairs; one weighed by examples; the sum; a mean in which all weigh the same."""
Better = Literal["lower", "higher", "none"]
Score = Callable[[str, Sequence[str]], float]
"""From an answer and its references to how good it is."""
LARGEST = 2.0**53
_ANY = (-LARGEST, LARGEST)
_COUNT = (0.0, LARGEST)
_SHARE = (0.0, 1.0)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,59}")
PLUGIN = "plugin/"
"""In front of what is measured of a whole model, into which what was learnt around an emulator is put."""
FINETUNED = "finetuned/"
"""In front of what is measured of a model after a client's own steps on it, see `core.finetune`."""
PERSONAL = "personal/"
"""In front of what is measured of a client's own model, beside the shared one."""
MIXTURE = "mixture_"
"""In front of the number of a mixture's model, of whose share an evaluation tells."""
PREFIXES = (PERSONAL, FINETUNED, PLUGIN)
"""What may stand in front of a name, for a second model that is measured; of several in this order."""
PUBLIC = "public/"
"""In front of what a server measures on text of its own."""
CLIENT_SPLITS = ("validation/", "test/", "unseen/")
"""What clients measure, in metrics.jsonl and clients.jsonl; the last is the test split of clients that never train."""
MEASURED_SPLITS = (*CLIENT_SPLITS, PUBLIC)
"""All evaluations, in metrics.jsonl."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of a model or of a round, declared once for files, tables, figures and early stopping."""

    name: str
    """As in metrics.jsonl, where that of the test split is called test/NAME."""
    title: str = ""
    """As it stands in a sentence, such as `error rate`; the name with spaces, if empty."""
    unit: str = ""
    """Shown behind the value: % of a share from 0 to 1, B of bytes, any other as it is."""
    reduce: Reduce = "examples"
    """How the values of several examples, and then of several clients, become one."""
    better: Better = "none"
    """Which way is an improvement; early stopping and best values ask for it."""
    bounds: tuple[float, float] = _ANY
    """The least and the largest value that is believed of a client."""
    score: Score | None = None
    """Scores one answer to the test split, given its references; None where something else reports the metric."""

    def __post_init__(self) -> None:
        for what, value, known in (
            ("reduce", self.reduce, Reduce),
            ("better", self.better, Better),
        ):
            if value not in get_args(known):
                raise ValueError(
                    f"{what} of the metric {self.name} must be one of {', '.join(get_args(known))}, got {value!r}"
                )
        if not self.bounds[0] < self.bounds[1]:
            raise ValueError(
                f"bounds of the metric {self.name} must be the least value and a larger one, got {self.bounds}"
            )

    @property
    def is_share(self) -> bool:
        """Return whether it is a share from 0 to 1 that is read in per cent."""
        return self.unit == "%"

    def takes(self, value: float) -> bool:
        """Return whether a value is within the bounds, which NaN is not."""
        return self.bounds[0] <= value <= self.bounds[1]

    def cost(self, value: float) -> float:
        """Return a number that is the smaller the better the value; not of a metric without a direction."""
        assert self.better != "none", f"neither way is better of {self.name}"
        return value if self.better == "lower" else -value


def _named(*metrics: Metric) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


QUALITY: Mapping[str, Metric] = _named(
    Metric("exact_match", "exact match", "%", better="higher", bounds=_SHARE),
    # One half where a model prefers neither answer, as every model before training beside itself.
    Metric("preference_accuracy", "preference accuracy", "%", better="higher", bounds=_SHARE),
    Metric("preference_margin", "preference margin", better="higher"),
    Metric("accuracy", unit="%", better="higher", bounds=_SHARE),
    Metric("loss", reduce="tokens", better="lower", bounds=(0.0, 1e6)),
    # Of several clients it is that of their loss.
    Metric("perplexity", better="lower", bounds=(1.0, float("inf"))),
    Metric("token_accuracy", unit="%", reduce="tokens", better="higher", bounds=_SHARE),
    Metric("rouge1", "ROUGE-1", better="higher", bounds=_SHARE),
    Metric("rougeL", "ROUGE-L", better="higher", bounds=_SHARE),
    Metric("rouge_l_paper", "ROUGE-L (rouge 1.0.1)", better="higher", bounds=_SHARE),
    Metric("chrf", "chrF", better="higher", bounds=_SHARE),
)
"""How good a model is, in the order of tables."""
REPORTED: Mapping[str, Metric] = {**QUALITY} | _named(
    Metric("num_tokens", reduce="sum", bounds=_COUNT),
    Metric("num_examples", reduce="sum", bounds=_COUNT),
    Metric("num_pairs", reduce="sum", bounds=_COUNT),
    Metric("chosen_drift", "drift of chosen answers", "nats"),
    Metric("rejected_drift", "drift of rejected answers", "nats"),
    Metric("reference_kl", "KL to the reference by token, estimated on given answers", "nats"),
    # Of questions which of two answers is better: one half where places do not matter.
    Metric("first_chosen", "first answer chosen", "%", bounds=_SHARE),
    # Tokens of the answers a model prefers over those of the others.
    Metric("length_ratio", "length of preferred answers beside others", bounds=_COUNT),
    Metric("skipped_steps", reduce="sum", better="lower", bounds=_COUNT),
    # What each model of a mixture counts at a client.
    *(Metric(f"{MIXTURE}{k}", f"share of component {k}", "%", bounds=_SHARE) for k in range(1, 9)),
)
"""What clients may report, besides metrics of users' own."""
WEIGHTS = ("num_examples", "num_tokens")
"""What means over clients are weighed by."""
WRITTEN: Mapping[str, Metric] = _named(
    *(Metric(name, reduce="sum") for name in ("num_replies", "round_kept")),
    *(
        Metric(name, reduce="sum", better="lower")
        for name in ("num_absent", "num_rejected", "num_clipped", "num_too_small", "num_stale")
    ),
    *(
        Metric(name, unit="B", reduce="sum", better="lower")
        for name in ("upload_bytes", "download_bytes")
    ),
    *(
        Metric(f"{phase}_{kind}", unit="B", better="lower")
        for phase in ("train", "evaluate", "rebuild")
        for kind in ("bytes", "gpu_bytes")
    ),
    *(
        Metric(name, unit="s", reduce="sum", better="lower")
        for name in ("seconds", "train_seconds", "evaluation_seconds", "round_seconds")
    ),
    # Of the event clock of a simulation.
    Metric("virtual_seconds", "virtual time", "s", reduce="sum", better="lower"),
    Metric("staleness", "staleness of the answers"),
    Metric("max_staleness", "largest staleness"),
    Metric("num_versions", "versions in a step"),
    Metric("num_training", "clients in training at a step"),
    *(Metric(name, better="lower") for name in ("epsilon", "download_density")),
    # Of hyper-parameters that clients try in turns.
    Metric("arm_entropy", "entropy of the arms' chances", "nats"),
    *(Metric(f"arm_{k}", f"chance of arm {k}", "%", bounds=_SHARE) for k in range(1, 17)),
    Metric("entries_cut", "entries cut to secure.clip", reduce="sum", better="lower"),
    Metric("align_hidden", "distance of the emulator's states", better="lower"),
    Metric("align_kl", "KL of the emulator's tokens", "nats", better="lower"),
    Metric("aggregation_error", "aggregation error", "%", better="lower"),
    *(Metric(name, better="higher") for name in ("adjusted_rand", "confidence", "agreement")),
    # Of a cluster, and their mean: the share of its own way that a pooled one goes.
    Metric("lambda", "own share (lambda)", "%", bounds=_SHARE),
    # The same of one client within its cluster, a mean over tensors.
    Metric("lasting", "noise that comes back", "%", bounds=_SHARE),
    Metric("gain", "gain over shrinkage", ""),
    Metric("mu", "own share of a client (mu)", "%", bounds=_SHARE),
    *(
        Metric(name)
        for name in (
            "clip",
            "noise_std",
            "num_clusters",
            "frozen_rank",
            "mean_rank",
            "num_heard",
            "moved",
            "effective_seeds",
            "coefficient_norm",
            "coefficient_max",
            "walked",
        )
    ),
)
"""What the server writes of a round: comm/*, server/*, time/*, memory/*."""


@dataclass(frozen=True, slots=True)
class MetricTable:
    """All metrics that are known; of any other the name is the title, and neither way is better."""

    own: Mapping[str, Metric] = field(default_factory=dict)
    """Users' own, by name."""
    least_loss: float = 0.0
    """Where losses begin: below 0 where they are corrected for wrong labels."""

    def extended(self, metrics: Iterable[Metric]) -> "MetricTable":
        """Return the table with metrics of one's own.

        Raises:
            ValueError: for a name that is taken, or is none.
        """
        own = dict(self.own)
        for metric in metrics:
            if not _NAME.fullmatch(metric.name):
                raise ValueError(
                    "a metric's name must be up to 60 letters, digits and _, beginning with a letter,"
                    f" got {ascii(metric.name)[:80]}"
                )
            if metric.name in {*REPORTED, *WRITTEN, *own}:
                whose = "given twice" if metric.name in own else "one of fedloom's own"
                raise ValueError(f"the metric {metric.name} is {whose}: call yours otherwise")
            own[metric.name] = metric
        return replace(self, own=own)

    @classmethod
    def read(cls, listed: Sequence[Any]) -> "MetricTable":
        """Return the table of a recipe's `evaluation.metrics` as it stands in a run's recipe.yaml, without scores.

        Raises:
            ValueError: where that is not as a run writes it.
        """
        own = list[Metric]()
        for item in listed:
            if isinstance(item, str):
                continue
            try:
                ((name, settings),) = item.items()
                fields: dict[str, Any] = {k: v for k, v in settings.items() if k != "score"}
                if "bounds" in fields:
                    fields["bounds"] = tuple(fields["bounds"])
                own.append(Metric(name, **fields))
            except (AttributeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"evaluation.metrics must hold names and {{name: settings}}, got {ascii(item)[:60]} ({error})"
                ) from error
        return cls().extended(own)

    def entry(self, name: str) -> Metric:
        """Return what is known of a metric, whatever its split."""
        base = name.rpartition("/")[2]
        for known in (self.own, REPORTED, WRITTEN):
            if base in known:
                return known[base]
        return Metric(base, unit="B" if base.endswith("bytes") else "")

    def of(self, name: str) -> Metric:
        """Return a metric by its name in metrics.jsonl, its title whole: test/exact_match -> Test exact match."""
        split, _, base = name.rpartition("/")
        metric = self.entry(name)
        where = split.replace(f"/{PLUGIN[:-1]}", " plug-in").replace(
            f"/{FINETUNED[:-1]}", " fine-tuned"
        )
        where = where.replace("unseen", "unseen clients'").replace("public", "public text")
        title = f"{where} {metric.title or base.replace('_', ' ')}".strip()
        return replace(metric, name=name, title=title[:1].upper() + title[1:])

    def reported(self) -> Mapping[str, Metric]:
        """Return what a client may report."""
        loss = REPORTED["loss"]
        least = replace(loss, bounds=(self.least_loss, loss.bounds[1]))
        return {**REPORTED, "loss": least, **self.own}


METRICS = MetricTable()
"""Without any of a user's own."""


@dataclass
class Reduction:
    """The values of many examples or clients, each metric reduced as the table says."""

    table: MetricTable = METRICS
    _sums: dict[str, float] = field(default_factory=dict)
    _weights: dict[str, float] = field(default_factory=dict)

    def add(self, metrics: Metrics) -> None:
        """Take one client's values; they weigh by its num_tokens or num_examples, or 1 where those are not there."""
        for name, value in metrics.items():
            weight = _weight(self.table.entry(name).reduce, metrics)
            self._sums[name] = self._sums.get(name, 0.0) + weight * value
            self._weights[name] = self._weights.get(name, 0.0) + weight

    @classmethod
    def of(cls, parts: Mapping[str, tuple[float, float]], table: MetricTable) -> "Reduction":
        """Return the reduction of values that were added up elsewhere, see `parts`."""
        sums = {name: total for name, (total, _) in parts.items()}
        return cls(table, sums, {name: weight for name, (_, weight) in parts.items()})

    def parts(self) -> dict[str, tuple[float, float]]:
        """Return of every metric the sum of its weighed values and that of its weights: both may be added up further."""
        return {name: (total, self._weights[name]) for name, total in self._sums.items()}

    def result(self) -> dict[str, float]:
        """Return the metrics of all together; one that only some have is of those."""
        return {
            name: total
            if self.table.entry(name).reduce == "sum"
            else total / (self._weights[name] or 1.0)
            for name, total in self._sums.items()
        }


def _weight(reduce: Reduce, metrics: Metrics) -> float:
    tokens = metrics.get("num_tokens", 1.0)
    if reduce == "tokens":
        return metrics.get("num_pairs", tokens)
    return metrics.get("num_examples", tokens) if reduce == "examples" else 1.0


MEASURED = (*WEIGHTS, "loss")
"""What no evaluation goes without: all means over clients are weighed by it."""
_UNSURE = (
    "loss",
    "perplexity",
    "preference_margin",
    "chosen_drift",
    "rejected_drift",
    "reference_kl",
)
"""What is NaN where a model has diverged."""


def checked(
    metrics: Mapping[str, object], *, measured: bool, table: MetricTable = METRICS
) -> Metrics:
    """Return reported metrics as floats.

    Args:
        metrics: As a stranger sent them.
        measured: Whether they are of an evaluation: then what means are weighed by must be there, and the loss of a
            model that has diverged may be NaN.
        table: Which metrics there are, with their bounds.

    Raises:
        ValueError: for a name that nothing reports, a value that is no number or out of its range, and an evaluation
            that says too little to be averaged.
    """
    known = table.reported()
    values = {name: _value(name, value, known, unsure=measured) for name, value in metrics.items()}
    if measured:
        _check_measured(values)
    return values


def has_diverged(metrics: Metrics) -> bool:
    """Return whether a measured loss is not finite."""
    return not math.isfinite(metrics["loss"])


def _check_measured(metrics: Metrics) -> None:
    missing = [name for name in MEASURED if name not in metrics]
    if missing:
        raise ValueError(f"an evaluation must report {', '.join(MEASURED)}, got no {missing[0]}")
    if metrics["num_examples"] < 1 or metrics["num_tokens"] < 1:
        raise ValueError("an evaluation must be of at least one example and one target token")


def _value(name: str, value: object, known: Mapping[str, Metric], *, unsure: bool) -> float:
    base = name
    for prefix in PREFIXES:
        base = base.removeprefix(prefix)
    if base not in known:
        raise ValueError(
            f"got a metric {ascii(name)[:60]}, which must be one of {', '.join(known)}"
        )
    if type(value) is not int and type(value) is not float:
        raise ValueError(f"{name} must be a number, got {ascii(value)[:60]}")
    # Compared as it is: a whole number may be too large for a float.
    if known[base].takes(value) or (
        unsure and base in _UNSURE and type(value) is float and math.isnan(value)
    ):
        return float(value)
    low, high = known[base].bounds
    raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {ascii(value)[:60]}")
