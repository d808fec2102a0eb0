"""The table of kinds in the docs says how many numbers each trains, and what a message of them takes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.models.build import Base
from fedloom.spaces.lora import LoRA
from fedloom.spaces.lora_xs import LoRAXS
from fedloom.spaces.scaling_vectors import IA3, VeRA
from fedloom.spaces.tune import Tune
from fedloom.spaces.virtual_tokens import Prefix, Prompt, PTuning

PAGE = Path(__file__).parents[2] / "docs" / "data_and_model.md"
LAYERS = 30
KINDS: dict[str, Tune] = {
    "lora": LoRA(rank=8),
    "lora: {targets: [q_proj, v_proj]}": LoRA(rank=8, targets=["q_proj", "v_proj"]),
    "lora: {dora: true}": LoRA(rank=8, dora=True),
    "lora_xs": LoRAXS(),
    "lora_xs: {targets: [q_proj, v_proj]}": LoRAXS(targets=["q_proj", "v_proj"]),
    "prompt": Prompt(),
    "prefix": Prefix(),
    "prefix: {projection: true}": Prefix(projection=True),
    "ptuning": PTuning(),
    "ptuning: {encoder: lstm}": PTuning(encoder="lstm"),
    "ia3": IA3(),
    "vera": VeRA(),
    "vera: {targets: [q_proj, o_proj]}": VeRA(targets=["q_proj", "o_proj"]),
}


def told() -> dict[str, tuple[int, int]]:
    """Return what the page says of each kind: trained numbers, kilobytes."""
    row = re.compile(r"^\| `tune: \{?(.+?)\}?` \|[^|]*\| ([\d,]+) \| ([\d,]+) kB \|", re.M)
    found = row.findall(PAGE.read_text(encoding="utf-8"))
    return {kind: (_number(count), _number(size)) for kind, count, size in found}


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def trained(tune: Tune, layers: int) -> dict[str, torch.Tensor]:
    """Return what is learnt of a model as wide as SmolLM2-135M, of a few layers and a small vocabulary."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    return dict(tune.make_space(Base(model, None, "random"), seed=0).start())


def test_every_kind_is_in_the_table() -> None:
    assert told().keys() == KINDS.keys()


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_table_counts_what_is_trained(kind: str) -> None:
    one, two = (sum(t.numel() for t in trained(KINDS[kind], n).values()) for n in (1, 2))
    count = one + (LAYERS - 1) * (two - one)
    assert told()[kind] == (count, round(4 * count / 1000))
