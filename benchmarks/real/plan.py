"""Is the plan right? Time, memory and bytes as planned and as measured, on both real models.

    python benchmarks/real/plan.py [--models FOLDER] [--data FOLDER] [--configs A;B] [--table]

Plan and run are processes of their own, one after the other, on one thread. Time is CPU time in both, which other work
on the machine hardly changes. FOLDER of data holds `codealpaca/train.json` and `xquad`. A configuration that was measured is kept,
here and in `kept/real_plan.json`, with the machine and the date.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from runs import MODELS, grid

import fedloom
from fedloom.recipe import build_recipe
from fedloom.results.plan import make_plan
from fedloom.tracking.environment import peak_memory_bytes
from shares import record, recorded
from timing import processor, write_page

Tree = Mapping[str, Any]
MEMORY = "memory, "
"""Configurations of one short round, for the memory alone, begin with it."""
BASES: Mapping[str, Tree] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "nf4": {"quantize": "nf4"},
    "float32, checkpointing": {"gradient_checkpointing": True},
    "nf4, checkpointing": {"quantize": "nf4", "gradient_checkpointing": True},
}
BEFORE = """\
Rows of SmolLM2 are of before an evaluation was probed with batches as large as its own and the first tokens of answers became one
product with the head, rows of Gemma of after both, measured while other work took most of the machine. Before them, Gemma's
evaluations on short rows were planned 11.5 / 9.1 (+26 %) and 11.7 / 8.8 (+33 %) seconds: the larger probe had 68 tokens where a batch
has 400, and small products cost more a token. Planning Gemma's clusters took 62 s; measuring is not repeated now where it would take
longer than 15 s. Of these rows there are no more digits than here, and differences are of those."""
"""What the first table's rows are of; to go with them when they are measured anew."""
SHORT = {"evaluation": {"every": 0, "validation": False, "max_new_tokens": 12, "max_examples": 4}}
POLYGLOT = {"num_examples": 240, "num_clients": 4, "where": {"language": ["en"]}, "max_length": 96}


def configs(models: Path, data: str) -> Mapping[str, Tree]:
    """Return the configurations, by name."""
    smollm2, gemma = str(models / "smollm2.gguf"), str(models / "gemma3-270m.gguf")
    adamw = {"optimizer": "adamw", "lr": 1e-3, "steps": 3, "batch_size": 4}
    code = {"source": f"{data}/codealpaca/train.json", "num_examples": 240, "max_length": 192}
    xquad = {"source": f"{data}/xquad", "num_examples": 240, "max_length": 320}
    return {
        "SmolLM2, LoRA r8, short rows": tree(smollm2, POLYGLOT, adamw),
        "SmolLM2, FLASC r16 int8, code": tree(
            smollm2,
            {**code, "num_clients": 4},
            {**adamw, "steps": 2},
            algorithm=[{"flasc": {"download": 0.25, "upload": 0.25}}, "fedavg"],
            wire={"download": "int8", "upload": "int8"},
            tune={"lora": {"rank": 16, "targets": "all-linear"}},
        ),
        "SmolLM2, FedKSeed, short rows": tree(
            smollm2,
            POLYGLOT,
            {"optimizer": "sgd", "lr": 1e-6, "batch_size": 4},
            algorithm={"fedkseed": {"steps": 6}},
            tune={"seeds": {"num_seeds": 1024}},
        ),
        "SmolLM2, LoRA r8, code": tree(smollm2, {**code, "num_clients": 4}, adamw),
        "SmolLM2, LoRA r8, code, checkpointing": tree(
            smollm2,
            {**code, "num_clients": 4},
            adamw,
            model={"name": smollm2, "gradient_checkpointing": True},
        ),
        "SmolLM2, full, moments in float8": tree(
            smollm2,
            POLYGLOT,
            {**adamw, "steps": 1, "moments": "float8"},
            tune="full",
            run={"rounds": 1, "samples": 0, "keep_checkpoints": 1},
        ),
        "Gemma, LoRA r8, short rows": tree(gemma, POLYGLOT, adamw),
        "Gemma, clusters, XQuAD": tree(
            gemma,
            {
                **xquad,
                "num_clients": 4,
                "partition": {"clusters": {"by": "file"}},
                "truncate": "prompt",
            },
            {**adamw, "steps": 2, "batch_size": 2},
            algorithm=[{"clustered": {}}, "fedavg"],
        ),
        "Gemma, FFA-LoRA r16, batch 1": tree(
            gemma,
            POLYGLOT,
            {**adamw, "batch_size": 1},
            algorithm=[{"freeze": {"names": ["lora_A"]}}, "fedavg"],
            tune={"lora": {"rank": 16, "targets": "all-linear"}},
        ),
        **{
            f"{MEMORY}{name}, {base}": tree(
                model,
                {**code, "num_clients": 2},
                {**adamw, "steps": 2},
                model={"name": model, **settings},
                run={"rounds": 1, "samples": 0, "keep_checkpoints": 1},
            )
            for name, model in (("SmolLM2", smollm2), ("Gemma", gemma))
            for base, settings in BASES.items()
        },
    }


def tree(named: str, data: Tree, local: Tree, **more: Any) -> Tree:
    """Return a recipe of three rounds."""
    return {
        "name": "plan",
        "algorithm": "fedavg",
        "model": {"name": named},
        "data": data,
        "tune": {"lora": {"rank": 8, "targets": "all-linear"}},
        "local": local,
        "run": {"rounds": 3, "samples": 0, "keep_checkpoints": 1},
        **SHORT,
        **more,
    }


def planned(recipe: Any) -> dict[str, float]:
    """Return what the plan says."""
    began = time.perf_counter()
    plan = make_plan(recipe)
    return {
        "training": plan.train_seconds,
        "evaluation": plan.evaluate_seconds,
        "memory": plan.peak_memory_bytes,
        "bytes": plan.total_bytes,
        "took": time.perf_counter() - began,
    }


def measured(recipe: Any) -> dict[str, float]:
    """Return what a run was."""
    with tempfile.TemporaryDirectory() as folder:
        result = fedloom.run(recipe, Path(folder) / "run")
        lines = list(result.metrics)
        return {
            "training": sum(line.get("time/train_seconds", 0.0) for line in lines),
            "evaluation": sum(line.get("time/evaluation_seconds", 0.0) for line in lines),
            "memory": peak_memory_bytes(),
            "bytes": result.summary["upload_bytes"] + result.summary["download_bytes"],
        }


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the tables: planned, measured, how far apart, and where and when."""

    def cell(one: Mapping[str, Any], name: str, unit: float, digits: int = 1) -> str:
        plan, run = one["plan"][name], one["run"][name]
        return (
            f"{plan / unit:.{digits}f} / {run / unit:.{digits}f} ({100 * (plan / run - 1):+.0f} %)"
        )

    rows = [
        (
            name,
            cell(one, "training", 1),
            cell(one, "evaluation", 1),
            cell(one, "memory", 1e6),
            cell(one, "bytes", 1e6, 3),
            f"{one['plan']['took']:.0f}",
            one["of"],
        )
        for name, one in found.items()
        if not name.startswith(MEMORY)
    ]
    short = [
        (name.removeprefix(MEMORY), cell(one, "memory", 1e6), one["of"])
        for name, one in found.items()
        if name.startswith(MEMORY)
    ]
    columns = (
        *("configuration", "training, s", "evaluation, s", "peak memory, MB"),
        *("MB", "seconds to plan", "measured"),
    )
    parts = []
    if rows:
        parts += [
            "Planned / measured (difference), three rounds; seconds are of CPU time on one thread.",
            grid(columns, rows),
            BEFORE,
        ]
    if short:
        parts += [
            "## Memory by the base's numbers",
            "LoRA of rank 8 on all linear layers, two clients, two steps of four rows of up to 192 tokens, one round.",
            grid(("configuration", "peak memory, MB: planned / measured", "measured"), short),
        ]
    return "\n\n".join(parts)


def main() -> None:
    """Plan, run and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=MODELS)
    parser.add_argument("--data", default="data")
    parser.add_argument("--configs", help="of these alone, with ; between")
    parser.add_argument("--runs", type=Path, default=Path("runs/real/plan"))
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    time.perf_counter = time.process_time  # of the package too
    known = configs(asked.models, asked.data)
    if asked.child:
        kind, name = asked.child
        recipe = build_recipe(known[name])
        print("\n" + json.dumps(planned(recipe) if kind == "plan" else measured(recipe)))
        return
    found = recorded("real_plan")
    asked.runs.mkdir(parents=True, exist_ok=True)
    for name in known:
        kept = asked.runs / f"{name}.json"
        wanted = not asked.configs or name in asked.configs.split(";")
        if wanted and name not in found and not kept.exists() and not asked.table:
            command = [
                sys.executable,
                __file__,
                "--models",
                str(asked.models),
                "--data",
                asked.data,
            ]
            one: dict[str, Any] = {"of": f"{processor()}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
            for kind in ("plan", "run"):
                print(f"{kind}: {name}", flush=True)
                done = subprocess.run(
                    [*command, "--child", kind, name], check=False, capture_output=True, text=True
                )
                if done.returncode:
                    raise SystemExit(done.stderr)
                one[kind] = json.loads(done.stdout.splitlines()[-1])
            kept.write_text(json.dumps(one))
        if kept.exists():
            found[name] = json.loads(kept.read_text())
    record("real_plan", found)
    missing = "; ".join(name for name in known if name not in found)
    text = page({name: found[name] for name in known if name in found})
    text += f"\n\nNot measured: {missing}." if missing else ""
    print(text)
    write_page("real_plan.md", "What a plan says, and what a run was", text)


if __name__ == "__main__":
    main()
