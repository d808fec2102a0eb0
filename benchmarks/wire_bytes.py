"""Bytes that a run reports beside bytes that a proxy counts between a site's node and the server.

    python benchmarks/wire_bytes.py [--rounds 3]

One site tunes all weights of random models, so that a message is a few kilobytes, 1 MB or 50 MB each way; node and server
talk TLS. What the wire carries beside the messages is polls, handshakes and envelopes, whatever the size of a message.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from fedloom.models.build import ModelSettings, load_tokenizer
from scenery import random_llama
from sites import Sites, said
from timing import about
from wire import Wire

SIZES = {"small": (0, 0), "1 MB": (64, 1), "50 MB": (704, 2)}
"""Hidden size and layers; the small one is an adapter of rank 1."""


def recipe_of(size: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Return a recipe whose messages have about that size."""
    hidden, layers = SIZES[size]
    own: dict[str, Any] = {"tune": {"lora": {"rank": 1, "targets": ["q_proj"]}}}
    if hidden:
        random_llama(hidden, layers).save_pretrained(folder)
        load_tokenizer(ModelSettings()).save_pretrained(folder)
        own = {"tune": "full", "model": {"name": str(folder)}}
    return {
        **own,
        "name": "bytes",
        "algorithm": "fedavg",
        "data": {"source": "site", "max_length": 32},
        "local": {"optimizer": "sgd", "lr": 0.1, "steps": 1, "batch_size": 2},
        "evaluation": {"every": 0, "generate": False, "max_examples": 1, "validation": False},
        "run": {"rounds": rounds, "samples": 0},
    }


def main() -> None:
    """Print a row a size and way."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print(about(["torch", "flwr"]), "\n", sep="")
    print("message way    reported     counted  difference  of it fixed  beyond  seconds")
    fixed: dict[str, float] = {}
    for size in SIZES:
        with tempfile.TemporaryDirectory(prefix="fedloom-") as temporary:
            home = Path(temporary)
            data = home / "alba.jsonl"
            rows = [{"prompt": f"say {i}", "completion": str(i)} for i in range(12)]
            data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
            recipe = recipe_of(size, home / "model", rounds)
            began = time.perf_counter()
            with Sites(home / "lab", recipe, ("alba",)) as sites:
                server, wire = sites.serve(), Wire(sites.port)
                joined = sites.join("alba", data, port=wire.start())
                if server.wait(900) or joined.wait(60):
                    raise SystemExit(said(home / "lab" / "serve.log"))
                wire.door.close()
                told = json.loads((sites.out / "status.json").read_text())["sites"]["alba"]
            seconds = time.perf_counter() - began
        for way, counted in (("up", wire.up), ("down", wire.down)):
            reported = told["upload_bytes" if way == "up" else "download_bytes"]
            apart = counted - reported
            beyond = (apart - fixed.setdefault(way, apart)) / reported
            print(
                f"{size:7} {way:4} {reported:10} {counted:11} {apart:11} {fixed[way]:12.0f}"
                f" {beyond:7.2%} {seconds:8.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
