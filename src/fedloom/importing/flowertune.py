"""FlowerTune's apps: the pyproject.toml of Flower's templates for fine-tuning language models."""

from collections.abc import Mapping
from typing import Any

from fedloom.importing.counterparts import (
    Becomes,
    Counterpart,
    Framework,
    NoCounterpart,
    Values,
    none,
    number,
    read_by,
    to,
    truth,
    whole,
)
from fedloom.importing.data_sets import on_hub, under_data
from fedloom.importing.models import default_targets, lora, quantized

_ARGUMENTS = "train.training-arguments"
_NODES, _PACKAGE = "options.num-supernodes", "package"


def flower_values(tree: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the values of an app's tables by the keys they have there, and its name.

    Raises:
        ValueError: where the app has no configuration.
    """
    tables = tree.get("tool", {}).get("flwr", {})
    config = tables.get("app", {}).get("config")
    if not isinstance(config, Mapping):
        raise ValueError("it has no table [tool.flwr.app.config]")
    values = _flat(config)
    federations = tables.get("federations", {})
    chosen = federations.get("default")
    for name, value in _flat(federations.get(chosen, {}) if chosen else {}).items():
        values[name] = value
    others = [
        name for name, at in federations.items() if isinstance(at, Mapping) and name != chosen
    ]
    values |= {f"federations.{name}": "another federation" for name in others}
    # What the package is and needs are no settings of a run; they are said to be left out, in one line.
    outside = [name for name in tree if name != "tool"]
    outside += [f"tool.{name}" for name in tree.get("tool", {}) if name != "flwr"]
    outside += [f"tool.flwr.app.{name}" for name in tables.get("app", {}) if name != "config"]
    if outside:
        values[_PACKAGE] = ", ".join(outside)
    return values, str(tree.get("project", {}).get("name", ""))


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        # The leaderboard's own table holds keys that stand one higher elsewhere.
        inner = above if key == "static" and not above else f"{above}{key}."
        flat |= _flat(value, inner) if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat


def _source(value: Any, _: Values) -> Becomes:
    return Becomes(under_data(on_hub(str(value))))


def _tune(value: Any, values: Values) -> Becomes:
    targets: Any = values.get("model.lora.peft-target-modules") or ""
    if isinstance(targets, str) and targets != "all-linear":
        targets = [name.strip() for name in targets.split(",") if name.strip()]
    section = lora(
        whole(value),
        number(values["model.lora.peft-lora-alpha"]),
        number(values.get("model.lora.peft-lora-dropout", 0.075)),
        targets or default_targets(str(values.get("model.name", ""))),
    )
    if truth(values.get("model.lora.peft-use-dora", False)) and not _in_few_bits(values):
        section["lora"]["dora"] = True
    return Becomes({"tune": section}, "dropout 0.075 where nothing is said")


def _in_few_bits(values: Values) -> bool:
    return whole(values.get("model.quantization") or 0) > 0


def _bits(value: Any, _: Values) -> Becomes:
    if not whole(value or 0):
        raise NoCounterpart("weights as they are, as without it")
    return quantized(whole(value))


def _steps(value: Any, values: Values) -> Becomes:
    if whole(value) < 1:
        return Becomes({"local.epochs": whole(values.get(f"{_ARGUMENTS}.num-train-epochs", 3))})
    return Becomes({"local.steps": whole(value)})


def _epochs(_: Any, values: Values) -> Becomes:
    if whole(values[f"{_ARGUMENTS}.max-steps"]) >= 1:
        raise NoCounterpart("max-steps overrides it")
    return Becomes()


def _rate(value: Any, _: Values) -> Becomes:
    remark = "its cosine is a round ahead: the first round has less than the most"
    return Becomes({"local.lr": number(value), "local.schedule": "cosine"}, remark)


def _cohort(value: Any, values: Values) -> Becomes:
    clients, share = whole(values[_NODES]), number(value)
    size = max(int(clients * share), 1)
    if size >= clients:
        return Becomes({"cohort": "full"})
    return Becomes({"cohort": {"uniform": {"size": size}}})


def _evaluated(value: Any, _: Values) -> Becomes:
    if number(value) == 0:
        return Becomes({"evaluation.every": 0}, "before the first round and after the last alone")
    remark = "on all clients with held-out rows; evaluation.clients takes fewer"
    return Becomes({"evaluation.every": 1}, remark)


def _optimizer(value: Any, _: Values) -> Becomes:
    kind = "sgd" if str(value).lower() == "sgd" else "adamw"
    return Becomes(
        {"local.optimizer": kind}, "" if value in ("sgd", "adamw_torch") else f"for {value}"
    )


_COUNTED = "records are a line a client and round"

FLOWERTUNE = Framework(
    "FlowerTune",
    (
        Counterpart(
            "num-server-rounds", "run.rounds", convert=to("run.rounds", whole), default=100
        ),
        Counterpart("dataset.name", "data.source", convert=_source),
        Counterpart(_NODES, "data.num_clients", convert=to("data.num_clients", whole), default=20),
        none("options.*", "of Flower's simulation; engine says where clients run"),
        none("federations.*", "a recipe is run where it is started: engine"),
        Counterpart("strategy.fraction-fit", "cohort.uniform.size", convert=_cohort),
        Counterpart("strategy.fraction-train", "cohort.uniform.size", convert=_cohort),
        Counterpart(
            "strategy.fraction-evaluate", "evaluation.every", convert=_evaluated, default=0.0
        ),
        none("strategy.*", "of its own strategy"),
        Counterpart("model.name", "model.name", convert=to("model.name", str)),
        Counterpart("model.quantization", "model.quantize", convert=_bits),
        Counterpart(
            "model.gradient-checkpointing",
            "model.gradient_checkpointing",
            convert=to("model.gradient_checkpointing", truth),
        ),
        Counterpart("model.lora.peft-lora-r", "tune.lora.rank", convert=_tune, default=32),
        Counterpart("model.lora.peft-lora-alpha", "tune.lora.alpha", default=64),
        Counterpart("model.lora.peft-lora-dropout", "tune.lora.dropout"),
        Counterpart("model.lora.peft-target-modules", "tune.lora.targets"),
        read_by(
            "model.lora.peft-use-dora",
            "tune.lora.dora",
            where=lambda values: not _in_few_bits(values),
            else_="magnitudes of DoRA are those of whole weights: leave model.quantization out to have it",
        ),
        none("model.*", "code of the app's own"),
        Counterpart("train.learning-rate-max", "local.lr, schedule", convert=_rate, default=5e-5),
        Counterpart(
            "train.learning-rate-min",
            "local.min_lr",
            convert=to("local.min_lr", number),
            default=1e-6,
        ),
        Counterpart(
            "train.seq-length", "data.max_length", convert=to("data.max_length", whole), default=512
        ),
        none("train.save-every-round", "a run keeps its newest checkpoints: run.keep_checkpoints"),
        Counterpart(
            f"{_ARGUMENTS}.per-device-train-batch-size",
            "local.batch_size",
            convert=to("local.batch_size", whole),
            default=16,
        ),
        Counterpart(
            f"{_ARGUMENTS}.gradient-accumulation-steps",
            "local.accumulation",
            convert=to("local.accumulation", whole),
            default=1,
        ),
        Counterpart(f"{_ARGUMENTS}.max-steps", "local.steps", convert=_steps, default=10),
        Counterpart(f"{_ARGUMENTS}.num-train-epochs", "local.epochs", convert=_epochs),
        Counterpart(
            f"{_ARGUMENTS}.optim", "local.optimizer", convert=_optimizer, default="adamw_torch"
        ),
        Counterpart(
            f"{_ARGUMENTS}.weight-decay",
            "local.weight_decay",
            convert=to("local.weight_decay", number),
        ),
        Counterpart(
            f"{_ARGUMENTS}.max-grad-norm",
            "local.max_grad_norm",
            convert=to("local.max_grad_norm", number),
        ),
        none(f"{_ARGUMENTS}.learning-rate", "learning-rate-max and -min say it"),
        none(
            f"{_ARGUMENTS}.lr-scheduler-type",
            "constant within a round; local.schedule goes by rounds",
        ),
        none(f"{_ARGUMENTS}.gradient-checkpointing", "model.gradient-checkpointing says it"),
        none(f"{_ARGUMENTS}.output-dir", "the folder of a run: `fedloom run --out`"),
        none(f"{_ARGUMENTS}.logging-steps", _COUNTED),
        none(f"{_ARGUMENTS}.save-steps", "checkpoints are of rounds"),
        none(f"{_ARGUMENTS}.save-total-limit", "run.keep_checkpoints is of rounds"),
        none(
            f"{_ARGUMENTS}.*",
            "an argument of Hugging Face's trainer: `fedloom.run(trainer=...)` takes one",
        ),
        none("train.*", "code of the app's own"),
        none(_PACKAGE, "tables of the package, which a recipe has none of"),
    ),
    always={"data.partition": "iid", "data.prompt": "alpaca", "data.fractions": [0.95, 0.0, 0.05]},
    notes=("It keeps no rows to measure on; here a twentieth of every client's is kept.",),
)
