"""OpenFedLLM's command lines, and those of FedLLM-Bench and FedMLLM, which are made of its code.

OpenFedLLM: Training Large Language Models on Decentralized Private Data via Federated Learning. Ye et al., KDD 2024
(arXiv:2402.06954). FedLLM-Bench: Ye et al., NeurIPS 2024 (arXiv:2406.04845). FedMLLM: PAPERS.md.
"""

import math
from pathlib import PurePosixPath
from typing import Any

from fedloom.data.catalogue import CATALOGUE
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

_FIVE = ["English", "Dutch", "Turkish", "Portuguese", "Spanish"]
_FIFTEEN = [
    *_FIVE,
    *("Filipino", "Bengali", "Standard Malay", "Lithuanian", "Tamil"),
    *("Zulu", "Irish", "Nepali", "Malayalam", "Telugu"),
]
_BENCH_SETS = {
    "FedAya": "fed_aya",
    "FedChatbotIT": "fed_chatbot_it",
    "FedWildChatSingle": "fed_wildchat",
    "FedWildChatMulti": "fed_wildchat",
    "FedChatbotPA": "fed_chatbot_pa",
}
_SCRIPT = "(script)"


def _is_dpo(values: Values) -> bool:
    return "dpo" in str(values.get(_SCRIPT, ""))


def _is_lora(values: Values) -> bool:
    return truth(values["use_peft"])


def _objective(_: Any, values: Values) -> Becomes:
    if _is_dpo(values):
        return Becomes({"objective": {"dpo": {"beta": number(values["dpo_beta"])}}})
    return Becomes({"objective": "sft"})


def _algorithm(value: Any, values: Values) -> Becomes:
    name = str(value).lower()
    beta1, beta2 = number(values["fedopt_beta1"]), number(values["fedopt_beta2"])
    eta, tau = number(values["fedopt_eta"]), number(values["fedopt_tau"])
    adaptive = {"lr": eta, "beta1": beta1, "beta2": beta2, "tau": tau, "variant": "openfedllm"}
    server: dict[str, dict[str, Any]] = {
        "fedavgm": {"momentum": {"beta": beta1, "variant": "openfedllm"}},
        "fedadagrad": {"adagrad": {"lr": eta, "tau": tau}},
        "fedyogi": {"yogi": adaptive},
        "fedadam": {"adam": adaptive},
    }
    if name in ("fedavg", "fedadgrad"):
        remark = "a name that falls through to FedAvg" if name == "fedadgrad" else ""
        return Becomes({"algorithm": "fedavg"}, remark)
    if name == "fedprox":
        return Becomes({"algorithm": {"fedavg": {"mu": number(values["prox_mu"])}}})
    if name in server:
        weighting = {} if name == "fedavgm" else {"weighting": "uniform"}
        return Becomes({"algorithm": {"fedavg": {"server": server[name], **weighting}}})
    if name == "scaffold":
        found = {"algorithm": {"scaffold": {"weighting": "examples"}}, "local.optimizer": "sgd"}
        remark = "control variates are mean gradients, so clients take SGD, and learning_rate has to be found anew"
        return Becomes(found, remark)
    if name.startswith("local"):
        return Becomes({"algorithm": "local"}, "all clients by themselves, not the one alone")
    if name in ("clustered", "clustered_random"):
        count = whole(values.get("n_clusters", 5))
        at_round = max(whole(values.get("sim_round", 1)), 1)
        mode = {"paper": {"num_clusters": count, "at_round": at_round}}
        if name != "clustered":
            mode = {"random": {"num_clusters": count}}
        return Becomes({"algorithm": [{"clustered": {"mode": mode}}, "fedavg"]})
    if name == "feddp":
        return _private(values)
    raise ValueError(
        f"its algorithms are fedavg, fedprox, scaffold, {', '.join(server)}, local, clustered and feddp"
    )


def _private(values: Values) -> Becomes:
    epsilon, delta = number(values.get("dp_epsilon", 1.0)), number(values.get("dp_delta", 1e-4))
    share = whole(values["sample_clients"]) / whole(values["num_clients"])
    private = {
        "clip": number(values.get("dp_max_grad_norm", 1.0)),
        "epsilon": epsilon,
        "delta": delta,
    }
    found = {
        "algorithm": [{"private": private}, {"fedavg": {"weighting": "uniform"}}],
        "cohort": {"poisson": {"q": share}},
    }
    return Becomes(
        found, "its noise promises nothing; here a client's whole update is clipped to `clip`"
    )


def _cohort(value: Any, values: Values) -> Becomes:
    if str(values["fed_alg"]).lower() == "feddp":
        raise NoCounterpart("a share of clients, each drawn on its own: cohort.poisson.q")
    size, clients = whole(value), whole(values["num_clients"])
    if size >= clients:
        return Becomes({"cohort": "full"})
    remark = "drawn with run.seed, not alike in every run"
    return Becomes({"cohort": {"uniform": {"size": size}}}, remark)


def _source(value: Any, values: Values) -> Becomes:
    name, folder = str(value), values.get("local_data_dir")
    # FedLLM-Bench's scripts for one client alone name its file, and their set with something behind it.
    if ours := _BENCH_SETS.get(name.partition("_")[0]):
        if not folder:
            raise ValueError("its rows are in a file, which --local_data_dir has to name")
        return Becomes({"data.source": ours, "data.path": str(folder)})
    section = on_hub("aya_dataset" if name == "multi_language_clusters" else name)
    if folder:
        place = str(PurePosixPath(str(folder)) / name)
        section.pop("split", None)
        section["path" if section["source"] in CATALOGUE else "source"] = place
    if section["source"] == "aya":
        section["where"] = {"language": _languages(values)}
    return Becomes(under_data(section))


def _sample(value: Any, values: Values) -> Becomes:
    if values.get("dataset_name") in _BENCH_SETS:
        raise NoCounterpart("a part of its folder's name only: all rows of the file are taken")
    return Becomes({"data.num_examples": whole(value)})


def _languages(values: Values) -> list[str]:
    return _FIFTEEN if values.get("dataset_name") == "multi_language_clusters" else _FIVE


def _partition(value: Any, values: Values) -> Becomes:
    kind, path = str(value), "data.partition"
    if values.get("dataset_name") in _BENCH_SETS:
        return Becomes({path: {"natural": {"by": "client"}}}, "clients are those of the file")
    if kind in ("iid", "language_iid"):
        return Becomes({path: "iid"})
    if kind in ("language_clusters", "multi_language_clusters"):
        return Becomes({path: {"clusters": {"by": "language"}}})
    if kind == "language_multi_domain":
        order = {"by": "language", "order": _languages(values)}
        return Becomes({path: {"multi_domain": order}})
    raise ValueError(
        "its splits are iid, language_iid, language_clusters and language_multi_domain"
    )


def _clients(value: Any, values: Values) -> Becomes:
    if values.get("dataset_name") in _BENCH_SETS:
        raise NoCounterpart("as many as the file has: data.partition natural")
    return Becomes({"data.num_clients": whole(value)})


def _fractions(value: Any, _: Values) -> Becomes:
    share = number(value)
    if share >= 1:
        return Becomes({"data.fractions": [0.95, 0.0, 0.05]}, "a twentieth kept to measure on")
    return Becomes({"data.fractions": [share, 0.0, round(1 - share, 6)]}, "of every client's rows")


def _model(value: Any, _: Values) -> Becomes:
    if not str(value).strip():
        raise NoCounterpart("empty: until you name one, model.name is builtin:tiny")
    return Becomes({"model.name": str(value)})


def _rate(value: Any, values: Values) -> Becomes:
    least = 1e-6 if str(values.get(_SCRIPT, "")) == "main_sft.py" else 1e-5
    rate = number(value)
    remark = "its cosine runs over rounds as well, down to a least rate that is in its code"
    found = {"local.lr": rate, "local.schedule": "cosine", "local.min_lr": min(least, rate)}
    return Becomes(found, remark)


def _steps(value: Any, values: Values) -> Becomes:
    if truth(values.get("dynamic_local_step", False)):
        return Becomes({"local.epochs": 1}, "steps by a client's rows: passes over them")
    if whole(value) < 1:
        return Becomes({"local.epochs": whole(values["num_train_epochs"])})
    return Becomes({"local.steps": whole(value)})


def _epochs(_: Any, values: Values) -> Becomes:
    if whole(values["max_steps"]) >= 1:
        raise NoCounterpart("max_steps overrides it")
    return Becomes()


def _peft(value: Any, values: Values) -> Becomes:
    if not truth(value):
        return Becomes({"tune": "full"}, "its own code ends with an error where it is not set")
    rank, alpha = whole(values["peft_lora_r"]), number(values["peft_lora_alpha"])
    targets = default_targets(str(values["model_name_or_path"]))
    return Becomes(
        {"tune": lora(rank, alpha, 0.05, targets)}, "dropout 0.05 and layers are its code's"
    )


def _bits(bits: int) -> Any:
    def convert(value: Any, _: Values) -> Becomes:
        if not truth(value):
            raise NoCounterpart("switched off, as without it")
        return quantized(bits)

    return convert


def _template(value: Any, _: Values) -> Becomes:
    kinds = {"alpaca": "alpaca", "vicuna": "vicuna", "vicuna_v1.1": "vicuna"}
    if str(value) not in kinds:
        raise ValueError("prompts of these scripts are alpaca and vicuna: data.prompt takes others")
    remark = "an input has a part of the prompt to itself, not a place behind the instruction"
    return Becomes({"data.prompt": kinds[str(value)]}, remark if value == "alpaca" else "")


def _evaluated(value: Any, _: Values) -> Becomes:
    rounds = [whole(part) for part in str(value).split(",") if part.strip()]
    return Becomes(
        {"evaluation.every": math.gcd(*rounds)}, "and before the first round and after the last"
    )


def _logged(value: Any, _: Values) -> Becomes:
    if str(value) == "none":
        raise NoCounterpart("none, as without it")
    return Becomes({"run.trackers": [str(value)]})


def _trusted(value: Any, _: Values) -> Becomes:
    if not truth(value):
        raise NoCounterpart("code of a repository is not run, as without it")
    return Becomes({"model.trust_remote_code": True})


def _seeds(value: Any, _: Values) -> Becomes:
    return Becomes({"run.seed": whole(value), "data.seed": whole(value)})


def _of(key: str, settings: str, *algorithms: str) -> Counterpart:
    def where(values: Values) -> bool:
        return str(values["fed_alg"]).lower() in algorithms

    return read_by(key, settings, where=where, else_=f"read by {', '.join(algorithms)} only")


_HUB = "a run stays in its folder; `fedloom export` writes what peft loads"
_SHARED = (
    Counterpart(_SCRIPT, "objective", convert=_objective),
    Counterpart("fed_alg", "algorithm", convert=_algorithm, default="fedavg"),
    _of("prox_mu", "algorithm.fedavg.mu", "fedprox"),
    _of("fedopt_tau", "algorithm.fedavg.server", "fedadagrad", "fedyogi", "fedadam"),
    _of("fedopt_eta", "algorithm.fedavg.server", "fedadagrad", "fedyogi", "fedadam"),
    _of("fedopt_beta1", "algorithm.fedavg.server", "fedavgm", "fedyogi", "fedadam"),
    _of("fedopt_beta2", "algorithm.fedavg.server", "fedyogi", "fedadam"),
    Counterpart("num_clients", "data.num_clients", convert=_clients, default=2),
    Counterpart("sample_clients", "cohort.uniform.size", convert=_cohort, default=2),
    Counterpart("split_strategy", "data.partition", convert=_partition, default="iid"),
    none("save_model_freq", "a run keeps its newest checkpoints: run.keep_checkpoints"),
    Counterpart(
        "model_name_or_path", "model.name", convert=_model, default="meta-llama/Llama-2-7b-hf"
    ),
    Counterpart(
        "dataset_name",
        "data.source, path",
        convert=_source,
        default="lucasmccabe-lmi/CodeAlpaca-20k",
    ),
    Counterpart("local_data_dir", "data.path or source"),
    Counterpart(
        "dataset_sample",
        "data.num_examples",
        convert=_sample,
        default=20000,
    ),
    Counterpart("learning_rate", "local.lr, schedule, min_lr", convert=_rate, default=2e-5),
    Counterpart(
        "batch_size", "local.batch_size", convert=to("local.batch_size", whole), default=16
    ),
    Counterpart(
        "gradient_accumulation_steps",
        "local.accumulation",
        convert=to("local.accumulation", whole),
        default=1,
    ),
    Counterpart("max_steps", "local.steps", convert=_steps, default=10),
    Counterpart("num_train_epochs", "local.epochs", convert=_epochs),
    Counterpart("seq_length", "data.max_length", convert=to("data.max_length", whole), default=512),
    Counterpart("load_in_8bit", "model.quantize", convert=_bits(8)),
    Counterpart("load_in_4bit", "model.quantize", convert=_bits(4)),
    Counterpart("use_peft", "tune", convert=_peft, default=False),
    read_by("peft_lora_r", "tune.lora.rank", where=_is_lora, else_="no effect without use_peft"),
    read_by(
        "peft_lora_alpha", "tune.lora.alpha", where=_is_lora, else_="no effect without use_peft"
    ),
    Counterpart(
        "gradient_checkpointing",
        "model.gradient_checkpointing",
        convert=to("model.gradient_checkpointing", truth),
        default=True,
    ),
    Counterpart("trust_remote_code", "model.trust_remote_code", convert=_trusted),
    Counterpart("template", "data.prompt", convert=_template, default="alpaca"),
    Counterpart("seed", "run.seed, data.seed", "cohorts go by it too, here", _seeds, default=2023),
    read_by("dpo_beta", "objective.dpo.beta", where=_is_dpo, else_="read by main_dpo.py only"),
    Counterpart("log_with", "run.trackers", convert=_logged),
    none("output_dir", "the folder of a run: `fedloom run --out`"),
    none("logging_steps", "records are a line a client and round"),
    none("use_auth_token", "the Hub's own login is used (HF_TOKEN)"),
    none("save_steps", "checkpoints are of rounds"),
    none("save_total_limit", "run.keep_checkpoints is of rounds"),
    none("push_to_hub", _HUB),
    none("hub_model_id", _HUB),
)
_BENCH = (
    none("checkpoint_step", "a run keeps its newest checkpoints: run.keep_checkpoints"),
    none("multi_turn_task", "turns are learnt as the rows have them: conversations or messages"),
    Counterpart("dynamic_local_step", "local.epochs"),
    _of("dp_max_grad_norm", "algorithm.private.clip", "feddp"),
    _of("dp_delta", "algorithm.private.delta", "feddp"),
    _of("dp_epsilon", "algorithm.private.epsilon", "feddp"),
    none(
        "dp_sigma",
        "noise of unknown worth: algorithm.private.noise_multiplier is in units of the clip",
    ),
)
_MULTILINGUAL = (
    _of("sim_round", "algorithm.clustered.mode.paper.at_round", "clustered"),
    _of("n_clusters", "algorithm.clustered.mode.*.num_clusters", "clustered", "clustered_random"),
    none("global_n_clusters", "read nowhere there"),
    Counterpart("evaluation_rounds", "evaluation.every", convert=_evaluated),
    none(
        "evaluation_mode", "every client is measured on its own data, with the model it would use"
    ),
    Counterpart("train_split", "data.fractions", convert=_fractions, default=1.0),
    none("sim_alias", "the name of a run is its folder's: `fedloom run --out`"),
    Counterpart(
        "eval_batch_size", "evaluation.batch_size", convert=to("evaluation.batch_size", whole)
    ),
    Counterpart(
        "max_eval_size",
        "evaluation.max_examples",
        convert=to("evaluation.max_examples", whole),
        default=100,
    ),
)


def _rounds(default: int) -> Counterpart:
    return Counterpart("num_rounds", "run.rounds", convert=to("run.rounds", whole), default=default)


def _constants(beta1: float) -> tuple[Counterpart, ...]:
    """Return the defaults that conversions of other keys read."""
    given = {"prox_mu": 0.01, "fedopt_tau": 1e-3, "fedopt_eta": 1e-3, "fedopt_beta1": beta1}
    given |= {"fedopt_beta2": 0.99, "peft_lora_r": 8, "peft_lora_alpha": 16, "dpo_beta": 0.1}
    return tuple(_with_default(row, given) for row in _SHARED)


def _with_default(row: Counterpart, given: dict[str, Any]) -> Counterpart:
    if row.key not in given and row.key != "num_train_epochs":
        return row
    default = given.get(row.key, 3)
    return Counterpart(row.key, row.settings, row.remark, row.convert, default)


_ALWAYS = {"local.optimizer": "adamw"}
_UNMEASURED = {"data.fractions": [0.95, 0.0, 0.05], "evaluation.every": 50}
_NOTE = (
    "It measures nothing while it trains; a twentieth of every client's rows is kept to measure on."
)

OPENFEDLLM = Framework("OpenFedLLM", (*_constants(0.9), _rounds(500)), _UNMEASURED, (_NOTE,))
BENCH = Framework("FedLLM-Bench", (*_constants(0.5), _rounds(500), *_BENCH), _UNMEASURED, (_NOTE,))
FEDMLLM = Framework("FedMLLM", (*_constants(0.9), _rounds(100), *_MULTILINGUAL))
