"""What the server told of its rounds, on the page."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.private import Private
from fedloom.core.description import describe
from fedloom.report.page import write_report
from fedloom.report.server import TensorPlace, place_of

Make = Callable[..., Path]


def name(layer: int, module: str, factor: str) -> str:
    return f"server/density/model.layers.{layer}.self_attn.{module}.lora_{factor}.weight"


def tell(folder: Path, told: dict[str, float]) -> str:
    """Add what the server told to every round but the first, and return the page."""
    file = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [{**row, **(told if row["round"] else {})} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_report(folder).read_text(encoding="utf-8")


def section(page: str, which: str) -> str:
    found = re.search(f'<section id="{which}">.*?</section>', page, flags=re.DOTALL)
    return found[0] if found else ""


@pytest.mark.parametrize(
    ("tensor", "place"),
    [
        ("model.layers.3.self_attn.q_proj.lora_A.weight", TensorPlace("A", "q_proj", 3)),
        ("transformer.h.11.attn.c_attn.lora_B.default.weight", TensorPlace("B", "c_attn", 11)),
        ("model.layers.0.input_layernorm.weight", TensorPlace("", "input_layernorm", 0)),
        ("model.embed_tokens.weight", TensorPlace("", "embed_tokens", -1)),
        ("w", TensorPlace("", "w", -1)),
    ],
)
def test_a_name_says_layer_module_and_factor(tensor: str, place: TensorPlace) -> None:
    assert place_of(tensor) == place


def test_the_page_shows_where_the_mask_lies(fabricate: Make) -> None:
    shares = {
        name(layer, module, factor): 0.1 * (layer + 1) + (0.05 if factor == "B" else 0)
        for layer in range(3)
        for module in ("q_proj", "v_proj")
        for factor in "AB"
    }
    part = section(tell(fabricate(), {**shares, "server/download_density": 0.25}), "sent")
    assert part.count("<svg") == 2
    for said in ("each of LoRA&#39;s A", "q_proj", "v_proj", ">35<", "after round 4", "layer"):
        assert said in part
    assert "#0072b2" not in part


def test_a_whole_model_is_one_map_of_layers_and_what_lies_outside(fabricate: Make) -> None:
    shares = {f"server/density/model.layers.{at}.mlp.up.weight": at / 20 for at in range(20)}
    shares["server/density/lm_head.weight"] = 0.5
    part = section(tell(fabricate(), shares), "sent")
    for said in ("each tensor", "lm_head", ">none<", "deepest 95"):
        assert said in part
    assert "LoRA" not in part


def test_a_mask_that_keeps_nothing_is_drawn(fabricate: Make) -> None:
    assert section(tell(fabricate(), {name(0, "q_proj", "B"): 0.0}), "sent")


def test_epsilon_is_drawn_and_said_with_its_delta(fabricate: Make) -> None:
    folder = fabricate()
    promise = describe(Private(FedAvg(), 0.5, noise_multiplier=1.0)).privacy
    (folder / "privacy.json").write_text(json.dumps(asdict(promise)))  # type: ignore[arg-type]
    part = section(tell(folder, {"server/epsilon": 1.8527}), "privacy")
    assert "After round 4, epsilon is 1.853 at delta 1e-05." in part
    assert part.count("<svg") == 1
    assert "Epsilon spent" in part


@pytest.mark.parametrize(
    ("private", "said"),
    [
        (
            {"noise_seed": 7, "noise_multiplier": 1.0},
            "None: private.noise_seed is set: a known seed",
        ),
        ({"noise_seed": 0, "epsilon": 1.0}, "protects nobody"),
        (
            {"noise_multiplier": 0.0},
            "None: private.noise_multiplier is 0, so no noise is added.",
        ),
    ],
)
def test_where_nothing_is_promised_no_epsilon_is_shown(
    private: dict[str, Any], said: str, fabricate: Make
) -> None:
    folder = fabricate()
    promise = describe(Ditto(Private(FedAvg(), 0.5, **private))).privacy
    (folder / "privacy.json").write_text(json.dumps(asdict(promise)))  # type: ignore[arg-type]
    part = section(tell(folder, {"server/epsilon": 1.8527}), "privacy")
    assert said in part
    assert "<svg" not in part
    assert "1.853" not in part


@pytest.mark.parametrize("text", ["[]", '{"delta": 1e-5}', '{"delta": "much"}', "{"])
def test_a_promise_that_is_none_is_refused(text: str, fabricate: Make) -> None:
    folder = fabricate()
    (folder / "privacy.json").write_text(text)
    with pytest.raises(ValueError, match=r"privacy\.json .*remove it to go on without it"):
        write_report(folder)


def test_epsilon_without_a_promise_is_said_alone(fabricate: Make) -> None:
    part = section(tell(fabricate(), {"server/epsilon": 2.0}), "privacy")
    assert "epsilon is 2.000." in part


def test_a_run_that_told_nothing_has_neither_section(fabricate: Make) -> None:
    page = write_report(fabricate()).read_text(encoding="utf-8")
    assert not section(page, "sent")
    assert not section(page, "privacy")


def test_the_page_shows_how_far_clients_go_their_own_way(fabricate: Make) -> None:
    folder = fabricate()
    assert not section(write_report(folder).read_text(encoding="utf-8"), "own_way")
    shown = section(tell(folder, {"server/mu": 0.4321}), "own_way")
    assert "43.2 %" in shown
    assert "<svg" in shown


def test_the_page_shows_what_sums_of_factors_lack(fabricate: Make) -> None:
    folder = fabricate()
    assert not section(write_report(folder).read_text(encoding="utf-8"), "factors")
    shown = section(tell(folder, {"server/aggregation_error": 0.0321}), "factors")
    assert "3.2 % in round" in shown
    assert "columns" not in shown
    both = {"server/aggregation_error": 0.0, "server/frozen_rank": 24.0}
    shown = section(tell(folder, both), "factors")
    assert "the frozen pair has 24 columns" in shown
    assert "<svg" in shown
