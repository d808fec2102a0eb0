"""FederatedScope-LLM: what every key of its YAML is here.

FederatedScope-LLM: A Comprehensive Package for Fine-tuning Large Language Models in Federated Learning. Kuang et al., KDD
2024 (arXiv:2309.00363). Keys and defaults are those of its branch llm, and of FedMeZO's.
"""

from typing import Any

from fedloom.importing import fedscope_values as values
from fedloom.importing.counterparts import (
    Becomes,
    Convert,
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

_OFFSITE, _ALIGN = "llm.offsite_tuning", "llm.offsite_tuning.emu_align"
_NOT_TEXT = "of data and models that are no text and no language model, or no key of it"
_SERVE = "`fedloom serve` of this recipe and `fedloom join` at every site say addresses and files"
_CHECKPOINTS = (
    "a run keeps checkpoints in its folder after every round (run.keep_checkpoints), and its model"
)
_ROUNDS = "rounds are synchronous: who is late is absent (engine.flower.deadline)"


def _if_on(key: str, settings: str, switch: str) -> Counterpart:
    """Return a key that another's conversion reads where a switch is set."""
    return read_by(
        key,
        settings,
        where=lambda given: values.is_on(switch, given),
        else_=f"no effect without {switch}",
    )


def _if_method(key: str, settings: str, *methods: str) -> Counterpart:
    """Return a key that the algorithm reads under some methods."""

    def where(given: Values) -> bool:
        return str(given["federate.method"]).lower() in methods

    return read_by(key, settings, where=where, else_=f"no effect without {' or '.join(methods)}")


def _both_seeds(value: Any, _: Values) -> Becomes:
    return Becomes({"run.seed": whole(value), "data.seed": whole(value)})


def _device(value: Any, _: Values) -> Becomes:
    return Becomes({"model.device": "auto" if truth(value) else "cpu"})


def _mode(value: Any, _: Values) -> Becomes:
    if value == "distributed":
        raise NoCounterpart(_SERVE)
    return Becomes({"engine": "inprocess"})


def _when(wanted: bool, reason: str, found: Convert) -> Convert:
    """Return a conversion of switches that counts where one is as wanted."""

    def convert(value: Any, given: Values) -> Becomes:
        if truth(value) != wanted:
            raise NoCounterpart(reason)
        return found(value, given)

    return convert


_DATA = (
    Counterpart("data.type", "data.source, path", convert=values.data_source),
    read_by(
        "data.root",
        "data.source or path",
        where=values.is_file,
        else_="rows of the Hub stay in its cache; a path in data.source takes their place",
    ),
    Counterpart(
        "data.splitter",
        "data.partition",
        "iid: iid, lda: dirichlet (quantity without categories), meta: natural",
        values.partition,
        default="iid",
    ),
    read_by(
        "data.splitter_args",
        "data.partition.dirichlet.alpha",
        where=lambda given: str(given["data.splitter"]) == "lda",
        else_="read by lda only",
    ),
    Counterpart(
        "data.splits",
        "data.fractions",
        "of every client's own rows, where it cuts once for all and then shards each split",
        to("data.fractions", list),
        default=[0.8, 0.1, 0.1],
    ),
    Counterpart(
        "data.subsample",
        "data.sample.share",
        "read by code_search_net alone there",
        lambda value, _: Becomes({"data.sample.share": number(value)}),
    ),
    none("data.server_holds_all", "the server holds no row here, and neither do other clients"),
    none("data.consistent_label_distribution", "a client's splits are of one distribution always"),
    none("data.*", _NOT_TEXT),
    Counterpart(
        "dataloader.batch_size",
        "local.batch_size",
        convert=to("local.batch_size", whole),
        default=64,
    ),
    none("dataloader.*", "batches are drawn anew from all of a client's rows in every round"),
    Counterpart(
        "llm.tok_len", "data.max_length", convert=to("data.max_length", whole), default=128
    ),
)
_MODEL = (
    Counterpart("model.type", "model.name", convert=values.model_name),
    _if_method("model.model_num_per_trainer", "algorithm.fedem.components", "fedem"),
    none("model.*", _NOT_TEXT),
    Counterpart("use_gpu", "model.device", convert=_device),
    none("device", "which GPU it is belongs to a machine: model.device cuda:N"),
    none("llm.cache.model", "models stay where the Hub's library keeps them (HF_HOME)"),
    Counterpart("llm.adapter.use", "tune", convert=values.adapter, default=False),
    _if_on("llm.adapter.args", "tune: lora, prefix, prompt or ptuning", "llm.adapter.use"),
    none("llm.adapter.*", "adapters are small: they stay where the model is"),
    none("adapter.*", "an adapter of language models is llm.adapter, tune here"),
    Counterpart("train.is_enable_half", "model.dtype or local.precision", convert=values.half),
    none("train.data_para_dids", "clients are shared out over GPUs instead: engine.ray"),
    none(
        "llm.deepspeed.*",
        "one device holds the model; model.quantize and gradient_checkpointing save memory",
    ),
)
_OFFSITE_TUNING = (
    Counterpart(f"{_OFFSITE}.use", "tune.offsite", convert=values.offsite),
    none(f"{_OFFSITE}.strategy", "layers are dropped, the one strategy that exists there too"),
    _if_on(f"{_OFFSITE}.kwargs", "tune.offsite.drop", f"{_OFFSITE}.use"),
    _if_on(f"{_OFFSITE}.emu_l", "tune.offsite.left", f"{_OFFSITE}.use"),
    _if_on(f"{_OFFSITE}.emu_r", "tune.offsite.right", f"{_OFFSITE}.use"),
    none(
        f"{_OFFSITE}.eval_type",
        "both are measured: around the emulator, and plugged into the whole model",
    ),
    Counterpart(
        f"{_ALIGN}.use",
        "algorithm.fedbiot, tune.offsite.factors",
        "factors beside the emulator's layers learn, not the layers themselves",
        _when(True, "switched off, as without it", lambda _value, _given: Becomes()),
    ),
    read_by(
        f"{_ALIGN}.data.type",
        "algorithm.fedbiot.public.source",
        where=values.aligned,
        else_=f"no effect without {_ALIGN}.use",
    ),
    _if_on(f"{_ALIGN}.train.local_update_steps", "algorithm.fedbiot.before", f"{_ALIGN}.use"),
    _if_on(f"{_ALIGN}.train.kd_loss_weight", "algorithm.fedbiot.hidden", f"{_ALIGN}.use"),
    none(
        f"{_ALIGN}.train.lm_loss_weight",
        "an emulator follows the model, not text: fedbiot.kd weighs its next tokens",
    ),
    none(
        f"{_ALIGN}.train.optimizer.*",
        "ignored there (clients' rate is taken); algorithm.fedbiot.optimizer here",
    ),
    none(f"{_ALIGN}.*", "the emulator is aligned as the run begins, and is in its checkpoints"),
)
_RUN = (
    Counterpart("seed", "run.seed, data.seed", convert=_both_seeds),
    Counterpart(
        "federate.total_round_num", "run.rounds", convert=to("run.rounds", whole), default=50
    ),
    Counterpart("federate.client_num", "data.num_clients", convert=values.num_clients, default=0),
    Counterpart(
        "federate.sample_client_num", "cohort.uniform.size", convert=values.cohort_by_number
    ),
    Counterpart(
        "federate.sample_client_rate", "cohort.uniform.size", convert=values.cohort_by_rate
    ),
    none("federate.sampler", "cohort uniform; weighted and fixed are others"),
    Counterpart("federate.method", "algorithm", convert=values.algorithm, default="FedAvg"),
    Counterpart(
        "federate.client_idx_for_local_train",
        "algorithm: local",
        "all clients by themselves, not the one alone",
    ),
    Counterpart("federate.mode", "engine", convert=_mode),
    Counterpart(
        "federate.ignore_weight",
        "algorithm.fedavg.weighting",
        "weights are examples held, there examples processed",
    ),
    none(
        "federate.share_local_model",
        "clients share one base model always, and leave nothing in it for each other",
    ),
    none("federate.online_aggr", "means are added up as uploads come, always"),
    none("federate.use_diff", "uploads are differences always"),
    none("federate.data_weighted_aggr", "read nowhere there; algorithm.fedavg.weighting here"),
    none(
        "federate.make_global_eval",
        "every client measures on its own data; `fedloom evaluate` all of them",
    ),
    Counterpart(
        "federate.unseen_clients_rate",
        "data.unseen",
        convert=lambda value, _: Becomes({"data.unseen": number(value)} if number(value) else {}),
    ),
    none(
        "federate.use_ss", "secret sharing; algorithm private keeps single clients out of the mean"
    ),
    none(
        "federate.restore_from", "`fedloom resume FOLDER` goes on where a run was ended, to the bit"
    ),
    *(
        none(f"federate.{key}", _CHECKPOINTS)
        for key in ("save_to", "save_freq", "save_client_model")
    ),
    none("federate.process_num", "engine.ray.actors: processes that share the clients"),
    none("federate.*", "of its own transport and simulation"),
    none("distribute.*", _SERVE),
    none("asyn.*", _ROUNDS),
    none("expname", "the name of a run is its folder's: `fedloom run --out`"),
    none("expname_tag", "the name of a run is its folder's: `fedloom run --out`"),
    none("outdir", "the folder of a run: `fedloom run --out`"),
    none("verbose", "FEDLOOM_DEBUG=1 shows what is behind an error"),
    none("print_decimal_digits", "numbers are kept whole"),
    none("backend", "torch, always"),
    none("cfg_file", "a recipe is one file"),
    Counterpart(
        "early_stop.patience",
        "run.patience",
        "counts evaluations in both",
        to("run.patience", whole),
        default=5,
    ),
    none("early_stop.delta", "any better value counts"),
    none("early_stop.improve_indicator_mode", "the best value so far is what counts"),
    Counterpart(
        "wandb.use",
        "run.trackers",
        convert=_when(
            True, "switched off, as without it", lambda _v, _g: Becomes({"run.trackers": ["wandb"]})
        ),
    ),
    none("wandb.*", "wandb's own environment says account and project"),
)
_TRAINING = (
    Counterpart("trainer.type", "objective, local.order", convert=values.trainer),
    none("trainer.*", "of other methods than those of language models"),
    none("criterion.type", "the likelihood of the answer's tokens: objective sft"),
    none("regularizer.*", "algorithm.fedavg.mu is FedProx's"),
    Counterpart(
        "train.local_update_steps",
        "local.steps or local.epochs",
        convert=values.length,
        default=1,
    ),
    Counterpart("train.batch_or_epoch", "local.steps or local.epochs"),
    Counterpart("train.optimizer.type", "local.optimizer", convert=values.optimizer, default="SGD"),
    Counterpart("train.optimizer.lr", "local.lr", convert=to("local.lr", number), default=0.1),
    Counterpart("train.optimizer.weight_decay", "local.weight_decay"),
    Counterpart("train.optimizer.momentum", "local.momentum"),
    Counterpart("train.optimizer.betas", "local.betas"),
    none("train.optimizer.*", "arguments that only some optimizers of torch have"),
    none("train.scheduler.*", "within a round the rate is constant; local.schedule goes by rounds"),
    none("train.train_strategy", "the rate changes by rounds alone: local.schedule"),
    Counterpart("grad.grad_clip", "local.max_grad_norm", convert=values.clipped, default=-1.0),
    Counterpart(
        "grad.grad_accum_count",
        "local.accumulation",
        "batches of one step, where its trainer of language models takes as many more steps",
        to("local.accumulation", whole),
    ),
    none("llm.retry_on_nan_loss", "a state that is not finite is not kept (run.max_update_norm)"),
    Counterpart(
        "finetune.before_eval",
        "evaluation.finetune.steps",
        "measured beside the model as it was sent, and by the section local's own optimizer and rate",
        _when(True, "switched off, as without it", values.finetuned),
    ),
    *(
        read_by(
            f"finetune.{key}",
            "evaluation.finetune.steps",
            where=lambda given: truth(given.get("finetune.before_eval", False)),
            else_="read only where finetune.before_eval is true",
        )
        for key in ("local_update_steps", "batch_or_epoch")
    ),
    none(
        "finetune.*",
        "evaluation.finetune trains as the section local says; algorithm ditto and personal are personal models",
    ),
    none(
        "llm.chat.*",
        "`fedloom chat` has no limits of its own: data.max_length, evaluation.max_new_tokens",
    ),
)
_ALGORITHM = (
    _if_on("fedprox.mu", "algorithm.fedavg.mu", "fedprox.use"),
    Counterpart("fedprox.use", "algorithm.fedavg.mu"),
    Counterpart("fedopt.use", "algorithm.fedavg.server"),
    _if_on("fedopt.optimizer.type", "algorithm.fedavg.server", "fedopt.use"),
    _if_on("fedopt.optimizer.lr", "algorithm.fedavg.server", "fedopt.use"),
    none("fedopt.*", "the server's rate is constant"),
    none("fedswa.*", "stochastic weight averaging of rounds"),
    _if_method(
        "personalization.regular_weight",
        "algorithm.ditto.strength or pfedme.strength",
        "ditto",
        "pfedme",
    ),
    _if_method("personalization.K", "local.steps", "pfedme"),
    _if_method("personalization.beta", "algorithm.pfedme.server_mix", "pfedme"),
    _if_method("personalization.local_update_steps", "algorithm.ditto.steps", "ditto"),
    Counterpart("personalization.local_param", "algorithm.personal.local"),
    none(
        "personalization.*",
        "personal models learn as `local` says; algorithm.personal.phases has steps of their own",
    ),
    Counterpart("aggregator.robust_rule", "algorithm.fedavg.combine"),
    Counterpart("aggregator.byzantine_node_num", "algorithm.fedavg.combine"),
    none("aggregator.*", "of rules that algorithm.fedavg.combine has not"),
    Counterpart("quantization.method", "wire.upload", convert=values.quantisation),
    Counterpart("quantization.nbits", "wire.upload"),
    none("nbafl.*", "its noise bounds nothing known: algorithm private states epsilon"),
    none("sgdmf.*", _NOT_TEXT),
    none("attack.*", "written for batches of images and tables"),
    none("hpo.*", "a recipe is one run; a search is made of many"),
    *(
        none(f"{name}.*", _NOT_TEXT)
        for name in ("vertical", "feat_engr", "fedsageplus", "gcflplus", "flitplus")
    ),
)
_EVALUATION = (
    Counterpart("eval.freq", "evaluation.every", convert=to("evaluation.every", whole), default=1),
    Counterpart(
        "eval.metrics",
        "evaluation.generate",
        "its trainers of language models measure losses alone; metrics of answers are evaluation.metrics",
        lambda _value, _given: Becomes({"evaluation.generate": False}),
        default=["loss"],
    ),
    Counterpart(
        "eval.split",
        "evaluation.validation",
        convert=lambda value, _: Becomes({"evaluation.validation": "val" in value}),
    ),
    Counterpart("eval.best_res_update_round_wise_key", "run.monitor", convert=values.monitor),
    none(
        "eval.report",
        "means over clients, each client's values, deciles and spread of them (fairness), always",
    ),
    none(
        "eval.count_flops", "costs.jsonl has every client's operations, by formula, of each round"
    ),
    none("eval.monitoring", "curves of all metrics are in the report"),
)

FEDSCOPE = Framework(
    "FederatedScope-LLM",
    (*_DATA, *_MODEL, *_OFFSITE_TUNING, *_RUN, *_TRAINING, *_ALGORITHM, *_EVALUATION),
    always={"data.prompt": "alpaca"},
    notes=(
        "The Alpaca prompt: rows without an input get the prompt without one, where it writes `None` as their input.",
    ),
)
