import math

import pytest
import torch

from fedloom.client.trainer import Sequential
from fedloom.core.params import add, scale, sub
from fedloom.core.protocols import ClientError, Evaluate, Fit, Job
from fedloom.core.randomness import derive
from fedloom.models.build import enable_checkpointing, fingerprint
from fedloom.spaces.full import Full
from fedloom.spaces.lora import LoRA


@pytest.mark.parametrize("batched", ["auto", "off"])
def test_the_same_params_are_loaded_and_measured_once(bench, evaluator, batched):
    one = bench(batched=batched)
    start = one.space.start()
    other = {name: t + 0.5 for name, t in start.items()}
    works = [Evaluate(start), Evaluate(other), Evaluate(start), Evaluate(start, "test")]
    done = one.trainer.run([Job(f"c{i}", 1, i, work) for i, work in enumerate(works)])
    assert evaluator.asked == [(2, "validation"), (1, "validation"), (1, "test")]
    losses = [d.metrics["loss"] for d in done]
    assert losses[0] == losses[2] == losses[3]
    moved = losses[1] - losses[0]
    assert moved == pytest.approx(0.5 * one.space.values.numel())
    assert all(d.num_examples == 2 and d.params == {} for d in done)


def test_a_client_without_held_out_examples_is_refused(bench, federation):
    shard = federation.shards["c0"]
    shards = {"c0": type(shard)(shard.train, [], shard.test)}
    one = bench(data=type(federation)(shards, {"c0": {}}, federation.manifest))
    with pytest.raises(ClientError, match="c0 has no validation examples"):
        one.trainer.run([Job("c0", 1, 0, Evaluate(one.space.start()))])


def test_dropout_draws_from_the_seed_of_the_job(bench, distance):
    one = bench(tune={"dropout": 0.5}, steps=2, optimizer="sgd", lr=0.5)
    assert isinstance(one.trainer, Sequential)
    start = {name: t + 0.02 for name, t in one.space.start().items()}
    first, other = (one.trainer.run([Job("c0", 1, s, Fit(start, steps=2))])[0] for s in (1, 2))
    # Whatever ran before, and whatever the global generator has been through.
    with torch.random.fork_rng():
        torch.manual_seed(99)
        (again,) = one.trainer.run([Job("c0", 1, 1, Fit(start, steps=2))])
    assert distance(first.params, again.params) == 0
    assert distance(first.params, other.params) > 0
    plain = bench(steps=2, optimizer="sgd", lr=0.5).trainer.run([Job("c0", 1, 1, Fit(start))])[0]
    assert distance(first.params, plain.params) > 0


def test_evaluation_has_no_dropout(bench, evaluator):
    one = bench(tune={"dropout": 0.5}, steps=1)
    one.fit(["c0"])
    one.trainer.run([Job("c0", 1, 0, Evaluate(one.space.start()))])
    assert evaluator.asked


@pytest.mark.parametrize(
    ("tune", "local"),
    [
        ({"rank": 8}, {"lr": 0.02}),
        ({"rank": 8, "dora": True}, {"lr": 0.02}),
        (Full(), {"lr": 0.005}),
    ],
    ids=["lora", "dora", "full"],
)
def test_ten_rounds_bring_the_loss_down_and_leave_the_base_alone(bench, tiny_llama, tune, local):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # a frozen random head cannot say much else
    one = bench(model=model, tune=tune, epochs=1, batch_size=2, **local)
    before = fingerprint(one.space.model)
    names = [name for name, p in one.space.model.named_parameters() if p.requires_grad]
    params, losses = one.space.start(), []
    assert len(params) == len(names)
    for round in range(1, 11):
        clients = ("c1", "c3", "c5")
        jobs = [Job(c, round, derive(round, c), Fit(params)) for c in clients]
        done = one.trainer.run(jobs)
        losses.append(sum(d.metrics["loss"] for d in done) / 3)
        for d in done:
            params = add(params, scale(sub(d.params, params), 1 / 3))
    assert losses[-1] < 0.8 * losses[0]
    assert fingerprint(one.space.model) == before


@pytest.mark.parametrize("tune", [{}, {"dropout": 0.1}], ids=["batched", "one by one"])
def test_bfloat16_trains_without_a_skipped_step(bench, tiny_llama, tune):
    """A bfloat16 base; adapters stay float32."""
    low = bench(model=tiny_llama(dtype=torch.bfloat16), lr=0.01, tune=tune)
    high = bench(model=tiny_llama(), lr=0.01, tune=tune)
    for done, exact in zip(low.fit(["c2", "c3"]), high.fit(["c2", "c3"]), strict=True):
        assert done.metrics["skipped_steps"] == 0
        assert done.metrics["loss"] == pytest.approx(exact.metrics["loss"], rel=0.02)
        assert {t.dtype for t in done.params.values()} == {torch.float32}


def test_weights_that_learn_do_so_under_autocast_without_a_skipped_step(bench, tiny_llama):
    low, high = (
        bench(model=tiny_llama(), tune=Full(), precision=precision, lr=0.001)
        for precision in ("bfloat16", "float32")
    )
    for done, exact in zip(low.fit(["c2", "c3"]), high.fit(["c2", "c3"]), strict=True):
        assert done.metrics["skipped_steps"] == 0
        assert done.metrics["loss"] == pytest.approx(exact.metrics["loss"], rel=0.02)
        assert {t.dtype for t in done.params.values()} == {torch.float32}


def test_autocast_of_frozen_weights_is_refused(bench, tiny_llama):
    with pytest.raises(ValueError, match=r"local.precision .*: set model.dtype bfloat16 instead"):
        bench(model=tiny_llama(), precision="bfloat16")


@pytest.mark.parametrize("batched", ["auto", "off"])
def test_gradient_checkpointing_changes_memory_only(bench, tiny_llama, distance, batched):
    ends = []
    for checkpointing in (False, True):
        model = tiny_llama(dtype=torch.float64)
        if checkpointing:
            enable_checkpointing(model)
        ends.append(bench(model=model, lr=0.01, batched=batched).fit(["c1", "c2"]))
    for one, other in zip(*ends, strict=True):
        assert distance(one.params, other.params) < 1e-12


def architectures():
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    rotary = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    }
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 64}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return {
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(**gpt2, bos_token_id=0, eos_token_id=0, **still)
        ),
        "qwen2, tied": lambda: Qwen2ForCausalLM(Qwen2Config(**rotary, tie_word_embeddings=True)),
        "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**rotary, tie_word_embeddings=True)),
    }


@pytest.mark.parametrize("name", ["gpt2", "qwen2, tied", "llama, tied"])
@pytest.mark.parametrize("space", ["lora", "full"])
def test_architectures_train_alike_on_every_path(bench, distance, name, space):
    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = architectures()[name]().double().eval()
            # Biases start at zero, where nobody would see them go missing.
            for key, p in model.named_parameters():
                if key.endswith("bias"):
                    torch.nn.init.normal_(p, std=0.1)
            return model

    tune = Full() if space == "full" else LoRA(targets="all-linear")
    fast = bench(model=make(), tune=tune, lr=0.005)
    slow = bench(model=make(), tune=tune, lr=0.005, kernels="reference", batched="off")
    clients = ["c1", "c2", "c4"]
    for one, other in zip(fast.fit(clients), slow.fit(clients), strict=True):
        assert distance(one.params, other.params) < 1e-9
        assert math.isfinite(one.metrics["loss"])


def test_dropout_of_the_base_model_itself_is_respected(bench):
    from transformers import GPT2Config, GPT2LMHeadModel

    def make():
        config = GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=2,
            vocab_size=64,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return GPT2LMHeadModel(config).eval()

    one = bench(model=make(), lr=0.01)
    assert isinstance(one.trainer, Sequential)
    (first,), (again,) = one.fit(["c1"]), one.fit(["c1"])
    assert all(torch.equal(first.params[n], again.params[n]) for n in first.params)
