"""FedKSeed's command line.

Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under 18 Kilobytes. Qin et al., ICML
2024 (arXiv:2312.06353); the options of main.py in FederatedScope's branch FedKSeed.
"""

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

_CATEGORIES = (
    "brainstorming",
    "classification",
    "closed_qa",
    "creative_writing",
    "general_qa",
    "information_extraction",
    "open_qa",
    "summarization",
)
"""Of Dolly, as its code numbers them."""
_TASKS = "./natural-instructions"


def _is_dolly(values: Values) -> bool:
    return str(values["dataset"]) == "dolly"


def _data(_: Any, values: Values) -> Becomes:
    if not _is_dolly(values):
        found = {
            "data.source": "natural_instructions",
            "data.path": _TASKS,
            "data.partition": {"natural": {"by": "task"}},
            "data.held_out": {"split": ["test"]},
            "data.shorter": {"input": 1024},
            "data.sample": {"share": 0.2, "skip_below": 20},
            "data.held_out_sample": {"share": 0.02, "at_least": 20},
            "data.fractions": [1.0, 0.0, 0.0],
        }
        return Becomes(found, "a checkout of github.com/allenai/natural-instructions")
    held_out = {"category": [_CATEGORIES[whole(values.get("zerotask", 7))]]}
    found = {
        "data.source": "dolly",
        "data.held_out": held_out,
        "data.fractions": [1.0, 0.0, 0.0],
    }
    return Becomes(found)


def _partition(value: Any, values: Values) -> Becomes:
    if not _is_dolly(values):
        raise NoCounterpart("of dolly; a client is a task of Natural Instructions")
    if not str(value).startswith("dir"):
        return Becomes({"data.partition": "iid"})
    split = {"by": "category", "alpha": number(str(value)[3:]), "min_examples": 10}
    return Becomes({"data.partition": {"dirichlet": {**split, "balanced": True}}})


def _clients(value: Any, values: Values) -> Becomes:
    if not _is_dolly(values):
        raise NoCounterpart("as many as tasks, there as well")
    return Becomes({"data.num_clients": whole(value)})


def _cohort(value: Any, values: Values) -> Becomes:
    clients = whole(values["num_clients"]) if _is_dolly(values) else 738
    size = int(clients * number(value))
    if size < 1:
        raise ValueError(f"it is nobody of {clients} clients")
    remark = "" if _is_dolly(values) else "of the 738 tasks that are left"
    return Becomes({"cohort": {"uniform": {"size": size}}}, remark)


def _algorithm(value: Any, values: Values) -> Becomes:
    if values["batch_or_epoch"] != "batch":
        raise ValueError(
            "steps of a round are counted in batches: batch_or_epoch epoch has no counterpart"
        )
    section: dict[str, Any] = {"steps": whole(value)}
    if truth(values["bias_sampling"]):
        section["sampling"] = {"pro": {"clip": number(values.get("bias_loss_clip", 1000.0))}}
    if truth(values["equal_weight"]):
        section["weighting"] = "uniform"
    if number(values["weight_decay"]) > 0:
        section["uploads"] = "delta"
    return Becomes({"algorithm": {"fedkseed": section}})


def _sample(value: Any, values: Values) -> Becomes:
    if not _is_dolly(values):
        raise NoCounterpart("of dolly only")
    return Becomes({"data.sample": {"share": number(value)}})


def _metric(value: Any, _: Values) -> Becomes:
    if value == "loss":
        return Becomes({"evaluation.generate": False})
    found = {"evaluation.metrics": ["rouge_l_paper", "rougeL"], "evaluation.max_new_tokens": 128}
    return Becomes(found, "measured as evaluation.every says, not once")


def _clip(value: Any, _: Values) -> Becomes:
    if number(value) < 0:
        raise NoCounterpart("negative is never, as without it")
    raise NoCounterpart("it leaves steps out by their loss; local.max_slope cuts slopes")


def _seeds(value: Any, _: Values) -> Becomes:
    return Becomes({"run.seed": whole(value), "data.seed": whole(value)})


def _prompts(value: Any, _: Values) -> Becomes:
    remark = "its wording differs in a few words"
    return Becomes({"data.prompt": "alpaca" if truth(value) else "plain"}, remark)


_LOG = "a run writes its records into its folder"

FEDKSEED = Framework(
    "FedKSeed",
    (
        Counterpart("local_step", "algorithm.fedkseed.steps", convert=_algorithm, default=200),
        Counterpart("batch_or_epoch", "algorithm.fedkseed.steps", default="batch"),
        Counterpart("equal_weight", "algorithm.fedkseed.weighting", default=False),
        Counterpart("bias_sampling", "algorithm.fedkseed.sampling", default=False),
        read_by(
            "bias_loss_clip",
            "algorithm.fedkseed.sampling.pro.clip",
            where=lambda values: truth(values["bias_sampling"]),
            else_="no effect without bias_sampling",
        ),
        none("grad_initial", "histories of seeds begin with a zero, its default"),
        Counterpart("rounds", "run.rounds", convert=to("run.rounds", whole), default=40),
        Counterpart("num_clients", "data.num_clients", convert=_clients, default=200),
        Counterpart("m", "cohort.uniform.size", convert=_cohort, default=0.05),
        Counterpart(
            "dataset", "data.source, path, held_out, sample", convert=_data, default="instruct"
        ),
        read_by("zerotask", "data.held_out", where=_is_dolly, else_="of dolly only"),
        Counterpart("iid", "data.partition", convert=_partition, default="dir0.5"),
        Counterpart("dataset_subsample", "data.sample.share", convert=_sample),
        Counterpart(
            "batch_size", "local.batch_size", convert=to("local.batch_size", whole), default=1
        ),
        Counterpart(
            "max_length",
            "data.max_length",
            "prompts give way where there is no room, not answers",
            lambda value, _: Becomes({"data.max_length": whole(value), "data.truncate": "prompt"}),
            default=1024,
        ),
        Counterpart("use_prompts", "data.prompt", convert=_prompts, default=True),
        Counterpart(
            "model",
            "model.name",
            convert=to("model.name", str),
            default="datajuicer/LLaMA-1B-dj-refine-150B",
        ),
        Counterpart(
            "lr",
            "local.lr",
            "its README has 3e-7, its default is 1e-3",
            to("local.lr", number),
            default=1e-3,
        ),
        Counterpart(
            "weight_decay",
            "local.weight_decay",
            convert=to("local.weight_decay", number),
            default=0.0,
        ),
        Counterpart("grad_clip", "", convert=_clip),
        Counterpart(
            "K", "tune.seeds.num_seeds", convert=to("tune.seeds.num_seeds", whole), default=4096
        ),
        Counterpart("zo_eps", "local.eps", convert=to("local.eps", number), default=5e-4),
        Counterpart("seed", "run.seed, data.seed", convert=_seeds, default=42),
        Counterpart(
            "eval_metric", "evaluation.metrics, generate", convert=_metric, default="rouge"
        ),
        none("device", "which GPU it is belongs to a machine: model.device cuda:N"),
        none("log", _LOG),
        none("log_root", "the folder of a run: `fedloom run --out`"),
        none("save", "a run keeps its newest checkpoints: run.keep_checkpoints"),
        none("(script)", "its one script: algorithm fedkseed"),
    ),
    always={
        "tune.seeds.distribution": "gaussian",
        "local.optimizer": "sgd",
        "evaluation.every": 20,
        "evaluation.max_examples": 200,
    },
    notes=(
        "Its losses are measured every round on all held-out rows; here every 20 rounds on 200 of each client.",
    ),
)
