"""Cores between frozen directions of a weight."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.algorithms.fedavg import FedAvg
from fedloom.core.protocols import Task
from fedloom.core.rehearsal import rehearse
from fedloom.models.build import Base
from fedloom.models.hf_logging import quiet
from fedloom.models.introspection import core_layers, lora_layers
from fedloom.models.quantized import quantize_
from fedloom.models.schemes import SCHEMES
from fedloom.rounds.loop import begin, draw
from fedloom.spaces.lora_xs import LoRAXS
from fedloom.wire.format import encode_reply
from fedloom.wire.wire_settings import WireSettings

Llama = Callable[..., Any]
IDS = torch.arange(20).view(2, 10)


def space_of(model: Any, tune: LoRAXS) -> Any:
    return tune.make_space(Base(model.requires_grad_(False), None, "a/model"), seed=1)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 64}
        config = GPT2Config(**shape, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_frozen_factors_are_the_largest_singular_vectors_with_one_sign(
    name: str, tiny_llama: Llama
) -> None:
    model = (tiny_llama(layers=1) if name == "llama" else gpt2()).double()
    space = space_of(model, LoRAXS(rank=3, targets=["down_proj" if name == "llama" else "c_attn"]))
    layers = core_layers(space.model)
    assert [f"{layer.name}.lora_B.core" for layer in layers] == [*space.start()]
    assert not lora_layers(space.model)
    for layer in layers:
        u, s, v = torch.linalg.svd(layer.base.weight, full_matrices=False)
        found = layer.b @ s[:3].diag() @ layer.a
        torch.testing.assert_close(found, u[:, :3] * s[:3] @ v[:3], rtol=0, atol=1e-10)
        torch.testing.assert_close(layer.a @ layer.a.T, torch.eye(3).double(), rtol=0, atol=1e-10)
        torch.testing.assert_close(layer.b.T @ layer.b, torch.eye(3).double(), rtol=0, atol=1e-10)
        assert bool((layer.b.gather(0, layer.b.abs().argmax(0, keepdim=True)) > 0).all())
        assert not layer.a.requires_grad
        assert not layer.b.requires_grad


def test_the_mean_of_cores_is_the_mean_of_what_they_add(tiny_llama: Llama) -> None:
    space = space_of(tiny_llama(dtype=torch.float64), LoRAXS(rank=4, alpha=8))
    algorithm = FedAvg()
    clients: dict[str, dict[str, str]] = {f"c{i}": {} for i in range(3)}
    run = begin(algorithm, space.start(), 1)
    round = draw(run, clients, None)
    replies = []
    for number, (client, download) in enumerate(algorithm.broadcast(run.state, round).items()):
        task = Task("train", 1, client, number, {}, download)
        reply = rehearse(algorithm, task, noise=0.1)
        replies.append(reply.__class__(client, reply.upload, float(number + 1)))
    state, _ = algorithm.server_update(run.state, round, iter(replies))
    for layer in core_layers(space.model):
        name = f"{layer.name}.lora_B.core"
        each = [r.weight / 6 * 2 * layer.b @ r.upload["delta"][name] @ layer.a for r in replies]
        mean = layer.scaling * layer.b @ state.params[name] @ layer.a
        torch.testing.assert_close(mean, torch.stack(each).sum(0), rtol=0, atol=1e-14)


def test_a_message_of_rank_16_on_queries_and_values_of_30_layers_takes_61_kb() -> None:
    names = [f"model.layers.{i}.self_attn.{x}_proj.lora_B.core" for i in range(30) for x in "qv"]
    cores = {name: torch.randn(16, 16) for name in names}
    reply = rehearse(FedAvg(), Task("train", 1, "c", 0, {}, {"params": cores}), noise=1.0)
    assert sum(t.numel() for t in reply.upload["delta"].values()) == 15_360
    assert 61_440 < len(encode_reply(reply, settings=WireSettings())) < 62_000


def test_a_folder_of_transposed_layers_is_plain_lora(tmp_path: Path) -> None:
    from peft import PeftModel

    space = space_of(gpt2(), LoRAXS(rank=3, alpha=5))
    draw = torch.Generator().manual_seed(0)
    params = {n: torch.randn(t.shape, generator=draw) for n, t in space.start().items()}
    space.save_as_lora(tmp_path, params)
    space.load(params)
    with quiet(), torch.no_grad():
        before = gpt2()(input_ids=IDS).logits
        theirs = PeftModel.from_pretrained(gpt2(), str(tmp_path)).eval()
        logits, ours = theirs(input_ids=IDS).logits, space.model(input_ids=IDS).logits
    torch.testing.assert_close(logits, ours, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, ours, atol=1e-2)
    assert {name.rpartition("lora_")[2] for name in dict(theirs.named_parameters())} >= {
        "A.default.weight",
        "B.default.weight",
    }


def test_directions_of_a_weight_in_eight_bits_are_those_of_its_whole_weight(
    tiny_llama: Llama, tmp_path: Path
) -> None:
    model = tiny_llama(layers=1).requires_grad_(False)
    quantize_(model, SCHEMES["int8"])
    space = space_of(model, LoRAXS(rank=3, targets=["o_proj"]))
    layer = space.model.model.layers[0].self_attn.o_proj
    u, s, v = torch.linalg.svd(layer.get_base_layer().whole(), full_matrices=False)
    found = layer.lora_B["default"].b @ s[:3].diag() @ layer.lora_A["default"].weight
    torch.testing.assert_close(found, u[:, :3] * s[:3] @ v[:3], rtol=0, atol=1e-5)
    space.save(tmp_path, space.start())
    assert (tmp_path / "adapter_model.safetensors").is_file()
