"""Bases in few bits on a real model: loss, memory and the speed of cohorts, SmolLM2 on CodeAlpaca.

    python benchmarks/real/quantised.py --data FILE [--model FILE] [--seeds 0,1,2] [--part 0/2] [--table]

FILE is CodeAlpaca's rows (`instruction`, `input`, `output`). Twelve clients of unequal size, four in a round; every arm has
the same rows, cohorts and steps at a seed, and its test loss is that of the model as it is held in training.

Below the table of losses: what the linear layers take, and rounds of eight clients on rows of random tokens, all at
once, one after another, and one after another with PEFT on the model as transformers loads it with bitsandbytes. CPU time, on
one thread.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from runs import MODELS, Lines, Tree, beside, first, grid, last, main

from fedloom.models.build import ModelSettings, fingerprint, load_base, where
from fedloom.models.hf_logging import quiet
from fedloom.models.quantized import quantized_bytes
from intervals import interval
from round import Peft, Scene, our_round, ours
from timing import paired

MODEL = str(MODELS / "smollm2.gguf")
BASE = "none"
SCHEMES = (BASE, "nf4", "int8", "int4")
LENGTHS = (8, 32, 64)
"""Tokens of a row, of which the second half is learnt."""
TIMED = (BASE, "nf4")
TURNS = 2


def arm(source: str, model: str, quantize: str) -> Tree:
    """Return a recipe."""
    return {
        "model": {"name": model, "quantize": quantize},
        "algorithm": "fedavg",
        "data": {
            "source": source,
            "num_clients": 12,
            "num_examples": 1200,
            "prompt": "chat",
            "max_length": 128,
            "shorter": {"output": 300},
            "fractions": [0.9, 0.0, 0.1],
            "partition": {"quantity": {"alpha": 2.0}},
        },
        "cohort": {"uniform": {"size": 4}},
        "tune": {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}},
        "local": {"optimizer": "adamw", "lr": 2e-3, "steps": 4, "batch_size": 2},
        "evaluation": {"every": 4, "validation": False, "generate": False},
        "run": {"rounds": 8, "samples": 0, "keep_checkpoints": 1},
    }


def arms(source: str, model: str) -> Mapping[str, Tree]:
    """Return the rows of the table."""
    return {scheme: arm(source, model, scheme) for scheme in SCHEMES}


def page(lines: Lines) -> str:
    """Return the tables."""
    return "\n\n".join((losses(lines), *held_and_rounds()))


def losses(lines: Lines) -> str:
    """Return the table of losses."""
    base = lines.get(BASE, {})
    rows = [
        (
            name,
            str(len(runs)),
            f"{statistics.fmean(map(first, runs.values())):.3f}",
            interval([last(r) for r in runs.values()]),
            "" if name == BASE else f"{interval(beside(runs, base), 2)} %",
        )
        for name, runs in lines.items()
    ]
    columns = ("model.quantize", "seeds", "loss before", "loss after", "beside float32, paired")
    return f"Test loss, nats a token of the answers.\n\n{grid(columns, rows)}"


def held_and_rounds() -> tuple[str, str]:
    """Return the tables of memory and of rounds."""
    held, speed = [], []
    for scheme in SCHEMES:
        base = load_base(ModelSettings(MODEL, quantize=scheme))  # type: ignore[arg-type]
        vocabulary = base.model.get_input_embeddings().num_embeddings
        weights, size = quantized_bytes(base.model)
        if scheme != BASE:
            share = size / (2 * weights)
            held.append((scheme, f"{weights / 1e6:.1f} M", f"{size / 1e6:.1f}", f"{share:.3f}"))
        for length in LENGTHS if scheme in TIMED else ():
            scene = Scene(
                0, 0, length, 2, length // 2, name=MODEL, vocabulary=vocabulary, quantize=scheme
            )
            speed.append((scheme, str(length), *rounds_of(scene)))
    columns = ("model.quantize", "weights", "MB", "of bfloat16's")
    first_table = f"What the linear layers take.\n\n{grid(columns, held)}"
    columns = (
        *("model.quantize", "tokens a row", "8 at once, CPU ms", "one after another"),
        *("PEFT, one after another", "base hash"),
    )
    second = f"Two steps of a row for each of 8 clients; times are multiples of all at once.\n\n{grid(columns, speed)}"
    return first_table, second


def rounds_of(scene: Scene) -> tuple[str, str, str, str]:
    """Return what a round takes all at once, and how many times as long the others take."""
    together, start = ours(scene)
    alone, _ = ours(scene, batched="off")
    model: Any = together.sequential.setup.space.model  # type: ignore[attr-defined]
    before = fingerprint(model)
    candidates: dict[str, Callable[[], object]] = {
        "together": our_round(together, start, scene.clients),
        "alone": our_round(alone, start, scene.clients),
    }
    with quiet():
        if scene.quantize in (BASE, "nf4"):
            candidates["peft"] = Peft(Loaded(**vars(scene))).round
        times = paired(candidates, turns=TURNS)
    ours_ms = times["together"]
    ratios = [f"{ours_ms.ratio(times[n]):.2f}x" if n in times else "" for n in ("alone", "peft")]
    same = "unchanged" if fingerprint(model) == before else "CHANGED"
    return f"{ours_ms.median * 1e3:.0f}", ratios[0], ratios[1], same


@dataclass(frozen=True)
class Loaded(Scene):
    """The same with the model as transformers loads it with bitsandbytes."""

    def model(self) -> Any:
        """Return a fresh base model."""
        if self.quantize == BASE:
            return Scene.model(self)
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        place = where(ModelSettings(self.name)).path
        return AutoModelForCausalLM.from_pretrained(
            place, quantization_config=config, device_map="cpu", dtype="float32"
        )


if __name__ == "__main__":
    main(
        "quantised",
        "Bases in few bits on a real model: loss, memory and rounds on CodeAlpaca",
        arms,
        page,
        model=MODEL,
        data="codealpaca/train.json",
        doc=__doc__,
    )
