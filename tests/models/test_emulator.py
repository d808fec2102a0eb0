"""A model in two arrangements: as clients have it, and whole."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.models.build import Base, ModelSettings, fingerprint, load_base
from fedloom.models.emulator import SCALES, Emulator, cut, kept
from fedloom.models.generation import write_greedily
from fedloom.spaces.offsite import Offsite

IDS = torch.arange(20).view(2, 10) % 64 + 3


def emulator_of(model: Any, **settings: Any) -> Emulator:
    given = {"left": 2, "right": 2, "drop": 0.5, "rule": "floor", **settings}
    return Emulator(model, **given)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("rule", ["floor", "round"])
def test_layers_are_kept_from_the_first_to_the_last_without_a_repeat(rule: Any) -> None:
    for total in range(2, 120):
        for count in range(2, total + 1):
            found = kept(total, 1 - count / total, rule)
            assert len(found) == count
            assert (found[0], found[-1]) == (0, total - 1)
            assert all(a < b for a, b in pairwise(found))


def test_what_is_kept_is_as_the_references_have_it() -> None:
    floor = [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 27]
    assert kept(28, 0.5, "floor") == floor
    assert kept(28, 0.5, "round") == [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]
    assert kept(26, 0.5, "floor") == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 25]
    # A stride of floating point loses the last of these.
    assert kept(31, 1 - 14 / 31, "floor")[-1] == 30
    assert kept(7, 0.9, "floor") == [3]


def test_layers_that_learn_must_leave_some_between_them() -> None:
    with pytest.raises(ValueError, match=r"fewer than the model's 4 layers, got 2 \+ 2"):
        cut(4, left=2, right=2, drop=0.5, rule="floor")


def test_without_a_dropped_layer_an_emulator_is_the_model_to_the_bit(
    tiny_llama: Callable[..., Any],
) -> None:
    model = tiny_llama(layers=6)
    whole = logits(model)
    emulator_of(model, drop=0.0)
    assert torch.equal(logits(model), whole)


def test_an_emulator_is_the_model_of_its_layers_and_the_whole_comes_back_to_the_bit(
    tiny_llama: Callable[..., Any],
) -> None:
    model, other = tiny_llama(layers=8), tiny_llama(layers=8)
    whole, names = logits(model), set(model.state_dict())
    emulator = emulator_of(model)
    assert emulator.cut.layers == [0, 1, 2, 5, 6, 7]
    layers = emulator.cut.layers
    other.model.layers = torch.nn.ModuleList(other.model.layers[i] for i in layers)
    assert torch.equal(logits(model), logits(other))
    # A layer's number in the whole model is in its name.
    assert {int(n.split(".")[2]) for n in model.state_dict() if ".layers." in n} == set(layers)
    with emulator.whole():
        assert torch.equal(logits(model), whole)
        assert set(model.state_dict()) == names
    assert torch.equal(logits(model), logits(other))


def test_emulator_and_model_share_their_tensors(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(layers=8)
    own = {name: id(p) for name, p in model.named_parameters()}
    emulator = emulator_of(model)
    assert {id(p) for p in model.parameters()} <= set(own.values())
    assert all(id(p) == own[name] for name, p in model.named_parameters())
    share = sum(p.numel() for p in model.parameters())
    assert 0 < share < sum(p.numel() for p in tiny_llama(layers=8).parameters())
    assert emulator.disclosed == share / sum(p.numel() for p in tiny_llama(layers=8).parameters())


@pytest.mark.parametrize("whole", [False, True])
def test_an_emulator_writes_with_a_cache_what_it_writes_without(
    whole: bool, tiny_llama: Callable[..., Any]
) -> None:
    model = tiny_llama(layers=8)
    emulator = emulator_of(model)

    def check() -> None:
        text, _ = write_greedily(
            model, IDS, torch.ones_like(IDS), max_new_tokens=6, ends=[], fill=0
        )
        ids = IDS
        for step in range(6):
            with torch.no_grad():
                best = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
            assert torch.equal(best, text[:, step])
            ids = torch.cat([ids, best[:, None]], 1)

    if whole:
        with emulator.whole():
            check()
    else:
        check()


def test_layers_of_several_kinds_keep_theirs() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"] * 4
    config = Gemma3TextConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=64,
        layer_types=kinds,
        sliding_window=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = Gemma3ForCausalLM(config).eval()
    before = logits(model)
    emulator = emulator_of(model)
    held = [kinds[number] for number in emulator.cut.layers]
    assert model.config.layer_types == held
    assert [layer.self_attn.layer_type for layer in model.model.layers] == held
    logits(model)
    with emulator.whole():
        assert model.config.layer_types == kinds
        assert torch.equal(logits(model), before)


def test_a_model_without_a_list_of_layers_is_refused(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(layers=4)
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="whose layers are one list, got LlamaForCausalLM"):
        emulator_of(model)


def test_what_is_kept_in_int8_leaves_the_whole_model_as_it_was(
    tiny_llama: Callable[..., Any],
) -> None:
    model, plain = tiny_llama(layers=8), tiny_llama(layers=8)
    whole = logits(model)
    emulator = emulator_of(model, int8=True)
    emulator_of(plain)
    assert 0 < float((logits(model) - logits(plain)).abs().max()) < 0.05
    kinds = {p.dtype for n, p in model.named_parameters() if emulator.is_middle(n)}
    assert torch.int8 in kinds
    assert {p.dtype for n, p in model.named_parameters() if emulator.is_adapter(n)} == {
        torch.float32
    }
    with emulator.whole():
        assert torch.equal(logits(model), whole)


def test_a_folder_holds_what_clients_have_and_no_more(
    tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    from safetensors.torch import load_file

    model = tiny_llama(layers=8, vocab=len(tiny_tokenizer)).requires_grad_(False)
    hidden = [model.model.layers[i].mlp.up_proj.weight.clone() for i in range(8)]
    settings = Offsite(left=1, right=1)
    space = settings.make_space(Base(model, tiny_tokenizer, "x"), seed=0)
    space.load({name: t + 1 for name, t in space.start().items()})
    space.save_emulator(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    kept_here = cut(8, left=1, right=1, drop=0.5, rule="floor").layers
    for number, weight in enumerate(hidden):
        same = any(t.shape == weight.shape and torch.equal(t, weight) for t in stored.values())
        assert same == (number in kept_here)
    # Read back it is what the server has, by the names of the whole model.
    read = load_base(ModelSettings(name=str(tmp_path)))
    there, here = (
        settings.emulate(read),
        settings.emulate(
            Base(tiny_llama(layers=8, vocab=len(tiny_tokenizer)), tiny_tokenizer, "x")
        ),
    )
    assert there.cut == here.cut
    assert not there.is_whole_here
    assert there.disclosed is None
    again = tiny_llama(layers=8, vocab=len(tiny_tokenizer)).requires_grad_(False)
    settings.emulate(Base(again, tiny_tokenizer, "x"))
    assert fingerprint(read.model) == fingerprint(again)
    with pytest.raises(ValueError, match="the whole model is at the server alone"), there.whole():
        pass


def test_the_emulator_of_other_settings_is_refused(
    tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_llama(layers=8, vocab=len(tiny_tokenizer)).requires_grad_(False)
    space = Offsite(left=1, right=1).make_space(Base(model, tiny_tokenizer, "x"), seed=0)
    space.save_emulator(tmp_path)
    read = load_base(ModelSettings(name=str(tmp_path)))
    with pytest.raises(ValueError, match="holds the emulator of other settings than tune"):
        Offsite(left=2, right=1).emulate(read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_in_int8_is_read_as_the_same_integers_and_scales(
    dtype: torch.dtype, tmp_path: Path, tiny_llama: Callable[..., Any], tiny_tokenizer: Any
) -> None:
    model = tiny_llama(layers=8, vocab=len(tiny_tokenizer), dtype=dtype).requires_grad_(False)
    settings = Offsite(left=1, right=1, int8=True, factors=2)
    space = settings.make_space(Base(model, tiny_tokenizer, "x"), seed=0)
    before = fingerprint(model)
    space.save_emulator(tmp_path)
    assert fingerprint(model) == before
    name = str(dtype).removeprefix("torch.")
    read = load_base(ModelSettings(name=str(tmp_path), dtype=name))  # type: ignore[arg-type]
    settings.make_space(read, seed=0)
    assert fingerprint(read.model) == before
    if dtype == torch.float32:  # of others, the fixture's rotary frequencies are rounded too
        assert torch.equal(logits(read.model), logits(model))
    (tmp_path / SCALES).unlink()
    with pytest.raises(ValueError, match="without which an emulator in eight bits is none"):
        settings.emulate(load_base(ModelSettings(name=str(tmp_path))))
