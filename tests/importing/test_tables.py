"""Tables of keys: what they promise of each, and that the page of keys has them all."""

import re
from pathlib import Path
from typing import get_type_hints

import pytest

from fedloom.importing.counterparts import Framework
from fedloom.importing.document import FRAMEWORKS
from fedloom.importing.fedscope import FEDSCOPE
from fedloom.rounds.recipe_settings import Recipe

ROOT = Path(__file__).parents[2]
NAMED = """
use_gpu device seed early_stop.patience early_stop.delta early_stop.improve_indicator_mode
federate.mode federate.client_num federate.total_round_num federate.save_to federate.save_freq federate.share_local_model
federate.online_aggr federate.sample_client_num federate.sample_client_rate federate.client_idx_for_local_train federate.method
federate.unseen_clients_rate federate.use_ss federate.restore_from federate.process_num federate.join_in_info
data.root data.type data.splits data.splitter data.splitter_args data.subsample data.transform
dataloader.batch_size dataloader.shuffle model.type criterion.type trainer.type trainer.sam.rho regularizer.mu
llm.tok_len llm.retry_on_nan_loss llm.cache.model llm.chat.max_len llm.chat.max_history_len llm.deepspeed.use
llm.deepspeed.ds_config llm.adapter.use llm.adapter.args llm.adapter.mv_to_cpu
llm.offsite_tuning.use llm.offsite_tuning.strategy llm.offsite_tuning.kwargs llm.offsite_tuning.emu_l llm.offsite_tuning.emu_r
llm.offsite_tuning.eval_type llm.offsite_tuning.emu_align.use llm.offsite_tuning.emu_align.restore_from
llm.offsite_tuning.emu_align.save_to llm.offsite_tuning.emu_align.exit_after_align llm.offsite_tuning.emu_align.data.type
llm.offsite_tuning.emu_align.data.root llm.offsite_tuning.emu_align.data.splits
llm.offsite_tuning.emu_align.train.local_update_steps llm.offsite_tuning.emu_align.train.batch_or_epoch
llm.offsite_tuning.emu_align.train.lm_loss_weight llm.offsite_tuning.emu_align.train.kd_loss_weight
llm.offsite_tuning.emu_align.train.optimizer.type llm.offsite_tuning.emu_align.train.optimizer.lr
train.local_update_steps train.batch_or_epoch train.data_para_dids train.optimizer.type train.optimizer.lr
train.optimizer.weight_decay train.scheduler.type train.is_enable_half train.train_strategy grad.grad_clip grad.grad_accum_count
finetune.before_eval fedopt.use fedopt.optimizer.type fedopt.optimizer.lr fedopt.annealing fedprox.use fedprox.mu fedswa.use
personalization.local_param personalization.local_update_steps personalization.regular_weight personalization.K
personalization.beta personalization.lr aggregator.robust_rule aggregator.byzantine_node_num aggregator.num_agg_topk
quantization.method quantization.nbits nbafl.use nbafl.epsilon sgdmf.use attack.attack_method asyn.use vertical.use
feat_engr.type hpo.scheduler hpo.fedex.use distribute.use distribute.server_host distribute.role distribute.grpc_compression
eval.freq eval.metrics eval.split eval.report eval.best_res_update_round_wise_key eval.count_flops eval.monitoring
wandb.use wandb.name_project adapter.use fedsageplus.num_pred gcflplus.EPS_1 flitplus.tmpFed expname outdir verbose backend
"""
"""Keys of FederatedScope's branch llm: all that its YAML of language models uses, and of every section of its settings."""


@pytest.mark.parametrize("key", NAMED.split())
def test_a_key_of_federatedscope_has_a_documented_counterpart(key: str):
    row = FEDSCOPE.counterpart(key)
    assert row is not None
    assert row.settings or row.remark


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda one: one.name)
def test_a_row_says_what_or_why_and_each_key_has_one(framework: Framework):
    keys = [row.key for row in framework.table]
    assert len(keys) == len(set(keys))
    sections = {
        *get_type_hints(Recipe),
        "held_out",
        "sample",
        "schedule",
        "min_lr",
        "path",
        "source",
        "config",
        "generate",
    }
    for row in framework.table:
        assert row.settings or row.remark or row.convert
        for setting in re.split(r", | or ", row.settings) if row.settings else ():
            assert setting.partition(".")[0].partition(":")[0] in sections | {
                "prefix",
                "prompt",
                "ptuning",
                "pfedme",
            }, row


def test_the_page_of_keys_has_every_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    from keys_page import page, row  # type: ignore[import-not-found]

    text = page()
    for framework in FRAMEWORKS:
        assert f"## {framework.name}\n" in text
        for counterpart in framework.table:
            assert row(counterpart) in text
            assert row(counterpart).count("|") == 4


def test_a_default_that_counts_is_translated_without_being_given():
    tree, lines = FEDSCOPE.translate({})
    assert tree["local"]["optimizer"] == "sgd"
    assert {line.given for line in lines} == {False}
