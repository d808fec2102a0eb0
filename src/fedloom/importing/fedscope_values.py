"""What values of a FederatedScope-LLM configuration become: data, adapters, algorithm, training."""

import re
from pathlib import PurePosixPath
from typing import Any

from fedloom.data.catalogue import CATALOGUE
from fedloom.importing.counterparts import Becomes, NoCounterpart, Values, number, truth, whole
from fedloom.importing.models import default_targets, lora, num_layers

_DATA = {
    "alpaca": "alpaca",
    "alpaca_cleaned": "alpaca_cleaned",
    "dolly-15k": "dolly",
    "gsm8k": "gsm8k",
    "rosetta_alpaca": "codealpaca_languages",
    "code_search_net": "code_search_net",
}
"""Named data sets: what they are called here."""


def is_on(key: str, values: Values) -> bool:
    """Return whether a switch is set."""
    return truth(values.get(key, False))


def data_source(value: Any, values: Values) -> Becomes:
    """Return where the rows of `data.type` are."""
    name, _, kind = str(value).partition("@")
    root = PurePosixPath(str(values.get("data.root", "data")))
    if kind != "llm":
        raise ValueError("only data sets of the kind NAME@llm hold text to fine-tune on")
    if name.endswith((".json", ".jsonl")):
        return Becomes({"data.source": str(root / name)})
    if name.lower() not in _DATA:
        raise ValueError(f"its data sets are {', '.join(_DATA)}, or a .json file")
    found = _DATA[name.lower()]
    if not CATALOGUE[found].hub:
        path = str(root / f"{name}.json")
        remark = f"a file of {CATALOGUE[found].elsewhere}, to be put there"
        return Becomes({"data.source": found, "data.path": path}, remark)
    remark = "answers end in #### and the number, as in the data, not in `The answer is`"
    return Becomes({"data.source": found}, remark if found == "gsm8k" else "")


def is_file(values: Values) -> bool:
    """Return whether rows are in a file below `data.root`."""
    name = str(values.get("data.type", "")).partition("@")[0].lower()
    return name.endswith((".json", ".jsonl")) or not CATALOGUE[_DATA.get(name, "alpaca")].hub


def category(values: Values) -> str:
    """Return the label that clients are told apart by; empty where the data set has none."""
    name = str(values.get("data.type", "")).partition("@")[0].lower()
    if name in _DATA:
        return CATALOGUE[_DATA[name]].label
    return "category" if name.endswith((".json", ".jsonl")) else ""


def partition(value: Any, values: Values) -> Becomes:
    """Return who holds what, by `data.splitter`."""
    kind, by, path = str(value or "iid").lower(), category(values), "data.partition"
    count = whole(values["federate.client_num"])
    if count == 1 or kind == "iid":
        return Becomes({path: "iid"}, "" if kind == "iid" else "one client holds everything")
    if kind == "lda":
        args = values.get("data.splitter_args") or [{}]
        alpha = number(args[0].get("alpha", 0.5))
        if not by:
            return Becomes({path: {"quantity": {"alpha": alpha}}}, "no categories: shares of all")
        remark = "one draw for all three splits, where it draws each split anew"
        return Becomes({path: {"dirichlet": {"by": by, "alpha": alpha, "min_examples": 1}}}, remark)
    if kind == "meta" and by:
        remark = "a client's test data are of its own category, which it shuffles for every split"
        return Becomes({path: {"natural": {"by": by}}}, remark)
    if kind == "meta":
        return Becomes({path: "iid"}, "the data set has no categories to go by")
    raise ValueError("a splitter of text is iid, lda or meta")


def num_clients(value: Any, values: Values) -> Becomes:
    """Return how many clients there are, where they are not as many as categories."""
    count = 1 if str(values["federate.method"]).lower() == "global" else whole(value)
    found = partition(values["data.splitter"], values).settings["data.partition"]
    if "natural" in found:
        raise NoCounterpart(
            "a client for every category there is (data.partition natural): largest takes fewer"
        )
    if count < 1:
        raise NoCounterpart("as many as the data say, there; here 10 where nothing is said")
    return Becomes({"data.num_clients": count})


def cohort_by_number(value: Any, values: Values) -> Becomes:
    """Return who takes part in a round, by how many."""
    return _cohort(whole(value), values)


def cohort_by_rate(value: Any, values: Values) -> Becomes:
    """Return who takes part in a round, by their share."""
    clients = whole(values["federate.client_num"])
    return _cohort(max(int(number(value) * clients), 1) if number(value) > 0 else 0, values)


def _cohort(size: int, values: Values) -> Becomes:
    if size <= 0 or size >= whole(values["federate.client_num"]):
        return Becomes({"cohort": "full"})
    return Becomes({"cohort": {"uniform": {"size": size}}})


def model_name(value: Any, _: Values) -> Becomes:
    """Return the base model of `model.type`."""
    name, hub = str(value).rpartition("@")[::2]
    if hub not in ("huggingface_llm", "modelscope_llm"):
        raise ValueError("only models of the kind NAME@huggingface_llm are language models")
    remark = "an id of ModelScope, which may be another on the Hub" if "scope" in hub else ""
    return Becomes({"model.name": name}, remark)


def adapter(value: Any, values: Values) -> Becomes:
    """Return what is tuned, by `llm.adapter.use` and its arguments."""
    if is_on("llm.offsite_tuning.use", values):
        return Becomes({}, "what learns of the first and last layers, in tune.offsite.adapter")
    if not truth(value):
        return Becomes({"tune": "full"})
    found = _peft(_adapter_args(values), _model(values))
    lora_section, remarks = found.settings["tune"].get("lora"), [found.remark]
    if lora_section is None:
        return found
    if str(values.get("trainer.type", "")).lower() == "mezotrainer" and lora_section.get("dropout"):
        lora_section["dropout"] = 0.0
        remarks.append("without dropout, of which zeroth order has none")
    if _robust_rule(values):
        lora_section["origin"] = "zero"
        remarks.append("the products of factors are compared, which count from zero (origin)")
    return Becomes(found.settings, "; ".join(filter(None, remarks)))


def _adapter_args(values: Values) -> dict[str, Any]:
    args = values.get("llm.adapter.args") or [{}]
    return dict(args[0] if isinstance(args, list) else args)


def _model(values: Values) -> str:
    return str(values.get("model.type", "")).partition("@")[0]


def _peft(args: dict[str, Any], model: str) -> Becomes:
    method = str(args.get("adapter_method", "lora")).lower()
    package = args.get("adapter_package", "peft")
    tokens = whole(args.get("num_virtual_tokens", 20))
    if package != "peft":
        remark = f"lora in the place of {method} of {package}, a package that is no longer kept"
        return Becomes({"tune": {"lora": {"targets": default_targets(model)}}}, remark)
    if method == "lora":
        targets = args.get("target_modules") or default_targets(model)
        shown = (whole(args.get("r", 8)), number(args.get("lora_alpha", 8)))
        return Becomes({"tune": lora(*shown, number(args.get("lora_dropout", 0.0)), targets)})
    if method == "prefix":
        projection = truth(args.get("prefix_projection", False))
        return Becomes({"tune": {"prefix": {"tokens": tokens, "projection": projection}}})
    if method == "prompt":
        return Becomes({"tune": {"prompt": {"tokens": tokens}}})
    if method == "p-tuning":
        encoder = str(args.get("encoder_reparameterization_type", "mlp")).lower()
        return Becomes({"tune": {"ptuning": {"tokens": tokens, "encoder": encoder}}})
    raise ValueError("an adapter of peft is lora, prefix, prompt or p-tuning")


def offsite(value: Any, values: Values) -> Becomes:
    """Return the layers that learn around an emulator, by `llm.offsite_tuning`."""
    if not truth(value):
        raise NoCounterpart("switched off, as without it")
    model, at = _model(values), "llm.offsite_tuning."
    left, right = max(whole(values.get(f"{at}emu_l", 1)), 1), whole(values.get(f"{at}emu_r", 10))
    layers = num_layers(model)
    kwargs = values.get(f"{at}kwargs") or [{}]
    section: dict[str, Any] = {
        "left": left,
        "right": layers - right if layers and layers > right else left,
        "drop": number(kwargs[0].get("drop_ratio", 0.5)),
        "rule": "floor",
    }
    remark = "" if layers else f"as many last layers as first ones: {model} does not say its layers"
    if is_on(f"{at}emu_align.use", values):
        section["factors"] = 8
    if is_on("llm.adapter.use", values):
        section["adapter"] = dict(_peft(_adapter_args(values), model).settings)["tune"]
    else:
        section["adapter"] = "full"
        remark = "; ".join(filter(None, (remark, "embeddings and head stay as they are")))
    return Becomes({"tune": {"offsite": section}}, remark)


def aligned(values: Values) -> bool:
    """Return whether an emulator is aligned."""
    return is_on("llm.offsite_tuning.use", values) and is_on(
        "llm.offsite_tuning.emu_align.use", values
    )


# --- algorithm ------------------------------------------------------------------------------------

_ROBUST = {
    "krum": "krum",
    "median": "median",
    "trimmedmean": "trimmed_mean",
    "bulyan": "bulyan",
    "normbounding": "norm_bound",
}


def algorithm(value: Any, values: Values) -> Becomes:
    """Return the layers of `algorithm`, by `federate.method` and what stands beside it."""
    method = str(value).lower()
    if whole(values.get("federate.client_idx_for_local_train", 0)) or method == "local":
        return Becomes({"algorithm": "local"}, "every client by itself, each measured")
    inner = {"fedavg": _fedavg(values)}
    remark = "on all data in one place" if method == "global" else ""
    strength = number(values.get("personalization.regular_weight", 0.1))
    layers: list[Any] = [inner]
    if method == "ditto":
        layers = [{"ditto": {"strength": strength, **_ditto_steps(values)}}, inner]
    elif method == "fedem":
        layers = [
            {"fedem": {"components": whole(values.get("model.model_num_per_trainer", 2))}},
            inner,
        ]
    elif method == "pfedme":
        layers, remark = [{"pfedme": _pfedme(values, strength)}], "check its two learning rates"
    elif method not in ("fedavg", "fedopt", "fedprox", "fedbn", "fedrep", "global"):
        raise ValueError(
            "no algorithm stands for it: fedavg, fedopt, pfedme, ditto, fedem, fedbn, fedrep, local and global have one"
        )
    local = values.get("personalization.local_param") or []
    if local:
        pattern = "|".join(re.escape(str(name)) for name in local)
        layers = [{"personal": {"local": pattern, **_phases(method)}}, *layers]
    if aligned(values):
        layers = [{"fedbiot": _alignment(values)}, *layers]
    named = [next(iter(layer)) if layer == {next(iter(layer)): {}} else layer for layer in layers]
    return Becomes({"algorithm": named if len(named) > 1 else named[0]}, remark)


def _phases(method: str) -> dict[str, Any]:
    return {"phases": [{"train": "local"}, {"train": "shared"}]} if method == "fedrep" else {}


def _ditto_steps(values: Values) -> dict[str, Any]:
    steps = whole(values.get("personalization.local_update_steps", -1))
    return {"steps": steps} if steps > 0 else {}


def _pfedme(values: Values, strength: float) -> dict[str, Any]:
    return {
        "strength": strength,
        "lr": number(values["train.optimizer.lr"]),
        "local_rounds": whole(values["train.local_update_steps"]),
        "server_mix": number(values.get("personalization.beta", 1.0)),
    }


def _fedavg(values: Values) -> dict[str, Any]:
    fedavg: dict[str, Any] = {}
    if is_on("fedprox.use", values):
        fedavg["mu"] = number(values.get("fedprox.mu", 0.0))
    if is_on("fedopt.use", values) or str(values["federate.method"]).lower() == "fedopt":
        kind = str(values.get("fedopt.optimizer.type", "SGD")).lower()
        lr = number(values.get("fedopt.optimizer.lr", 0.01))
        server = {"sgd": {"lr": lr}, "adam": {"lr": lr, "weight_decay": 0.0}, "adamw": {"lr": lr}}
        if kind not in server:
            raise ValueError(f"fedopt.optimizer.type {kind} has no counterpart: SGD, Adam, AdamW")
        fedavg["server"] = {"sgd" if kind == "sgd" else "adamw": server[kind]}
    if truth(values.get("federate.ignore_weight", False)):
        fedavg["weighting"] = "uniform"
    if rule := _robust_rule(values):
        attackers = whole(values.get("aggregator.byzantine_node_num", 0))
        takes = {"attackers": attackers} if rule in ("krum", "bulyan") else {}
        fedavg["combine"] = {_ROBUST[rule]: takes}
    return fedavg


def _robust_rule(values: Values) -> str:
    """Return FederatedScope's name of the robust rule that uploads are combined by; empty for none."""
    rule = str(values.get("aggregator.robust_rule", "fedavg")).lower()
    return rule if rule in _ROBUST else ""


def _alignment(values: Values) -> dict[str, Any]:
    at = "llm.offsite_tuning.emu_align."
    name = str(values.get(f"{at}data.type", "alpaca@llm")).partition("@")[0].lower()
    return {
        "public": {"source": _DATA.get(name, name), "num_examples": 2000},
        "before": max(whole(values.get(f"{at}train.local_update_steps", 10)), 1),
        "steps": 0,
        "hidden": number(values.get(f"{at}train.kd_loss_weight", 0.9)) or 1.0,
        "kd": 0.0,
    }


# --- training -------------------------------------------------------------------------------------


def length(value: Any, values: Values) -> Becomes:
    """Return how long a client trains in a round."""
    if str(values["federate.method"]).lower() == "pfedme":
        return Becomes({"local.steps": whole(values.get("personalization.K", 5))})
    epochs = str(values.get("train.batch_or_epoch", "batch")) == "epoch"
    return Becomes({"local.epochs" if epochs else "local.steps": whole(value)})


def optimizer(value: Any, values: Values) -> Becomes:
    """Return the optimizer of clients, and its own arguments."""
    kind, at = str(value).lower(), "train.optimizer."
    decay = number(values.get(f"{at}weight_decay", 0.01 if kind == "adamw" else 0.0))
    found: dict[str, Any] = {"local.weight_decay": decay} if decay else {}
    if kind == "sgd":
        momentum = number(values.get(f"{at}momentum", 0.0))
        found |= {"local.momentum": momentum} if momentum else {}
        return Becomes({"local.optimizer": "sgd", **found})
    remark = "" if kind == "adamw" or (kind == "adam" and not decay) else f"in place of {value}"
    found |= {"local.betas": [*values[f"{at}betas"]]} if f"{at}betas" in values else {}
    return Becomes({"local.optimizer": "adamw", **found}, remark)


def half(value: Any, values: Values) -> Becomes:
    """Return the type of the weights."""
    if not truth(value):
        raise NoCounterpart("float32, as without it")
    remark = "its float16 has no loss scaling, and leaves batches out whose loss is no number"
    learns = not is_on("llm.adapter.use", values)
    if learns:
        return Becomes(
            {"local.precision": "bfloat16"}, f"weights that learn stay float32; {remark}"
        )
    return Becomes({"model.dtype": "bfloat16"}, f"adapters stay float32; {remark}")


def clipped(value: Any, _: Values) -> Becomes:
    """Return the norm that gradients are clipped to; negative there is never."""
    return Becomes({"local.max_grad_norm": number(value) if number(value) > 0 else None})


def trainer(value: Any, _: Values) -> Becomes:
    """Return the objective and the order of a trainer."""
    kinds: dict[str, dict[str, Any]] = {
        "llmtrainer": {"objective": "sft"},
        "mezotrainer": {"objective": "sft", "local.order": "zeroth", "local.eps": 1e-3},
        "llmrewardchoicetrainer": {"objective": "selector"},
    }
    name = str(value).lower()
    if name not in kinds:
        raise ValueError(f"trainers of language models are {', '.join(kinds)}")
    return Becomes(kinds[name])


def monitor(value: Any, _: Values) -> Becomes:
    """Return the metric that early stopping watches."""
    found = re.fullmatch(r"(val|test)_(avg_)?loss", str(value))
    if not found:
        raise NoCounterpart("losses are watched: validation/loss or test/loss (run.monitor)")
    return Becomes({"run.monitor": f"{'test' if found[1] == 'test' else 'validation'}/loss"})


def quantisation(value: Any, values: Values) -> Becomes:
    """Return how precisely uploads travel."""
    if str(value) == "none":
        raise NoCounterpart("float32 both ways, as without it")
    bits = whole(values.get("quantization.nbits", 8))
    remark = "all tensors; it rounds only those with fc or conv in their name, of LoRA none"
    return Becomes({"wire.upload": {8: "int8", 16: "float16"}[bits]}, remark)


def finetuned(_: Any, values: Values) -> Becomes:
    """Return the steps that clients fine-tune for before they are measured."""
    steps = whole(values.get("finetune.local_update_steps", 1))
    if values.get("finetune.batch_or_epoch", "epoch") != "batch":
        raise NoCounterpart(
            "evaluation.finetune.steps counts steps, not epochs of every client: set it yourself"
        )
    return Becomes({"evaluation.finetune.steps": steps})
