"""Full tuning over sites that join: bytes, memory and time of messages too large for one, with the link cut once.

    python benchmarks/large_messages.py [--model FILE] [--sites 3] [--rounds 2] [--cut] [--here]

Sites tune all weights of a random model of 34 million (a message of 135 MB), or of FILE, for a few rounds. Memory is
what a process has to itself (RssAnon: without files that it has mapped), looked at four times a second; the largest is
given as a multiple of the message, less what the process has before round 1. --cut breaks every connection for ten seconds
in the middle of an upload of round 1; --here runs the same in one process, on the same rows as each site cuts them, and compares.
"""

import argparse
import contextlib
import json
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import psutil

from fedloom.deploy.site import all_own
from fedloom.deploy.site_settings import SiteSettings
from fedloom.models.build import ModelSettings, load_tokenizer
from fedloom.recipe import build_recipe
from fedloom.rounds.checkpoint import state_sha256
from fedloom.rounds.loop import advance, begin
from fedloom.rounds.session import Makers, build
from scenery import random_llama
from sites import Sites, metrics, said, until
from timing import about
from wire import OUTAGE, Wire

NAMES = ("alba", "brno", "cork")
ROLES = {
    "fedloom.cli serve": "server",
    "flower-superlink": "SuperLink",
    "flwr-serverapp": "relay",
    "flower.proxy": "proxy",
    "deploy.worker": "worker",
    "flower-supernode": "SuperNode",
    "flower.node": "app of a site",
}


@dataclass
class Memory:
    """What processes have to themselves, by what they are: before round 1, and at most."""

    roots: list[int]
    before: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    most: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    is_over: bool = False

    def watch(self) -> None:
        """Look until it is over."""
        while not self.is_over:
            for root in self.roots:
                with contextlib.suppress(psutil.Error):
                    top = psutil.Process(root)
                    for one in (top, *top.children(recursive=True)):
                        self._look(one)
            time.sleep(0.25)

    def begin(self) -> None:
        """Take what is there now for what there is without messages."""
        self.before = defaultdict(int, self.most)
        self.most.clear()

    def _look(self, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.Error, OSError):
            line = " ".join(process.cmdline())
            role = next((name for words, name in ROLES.items() if words in line), None)
            if role is None or "guard.py" in line:
                return
            status = Path(f"/proc/{process.pid}/status").read_text()
            held = 1024 * int(status.split("RssAnon:")[1].split()[0])
            self.most[role] = max(self.most[role], held)


def recipe_of(model: str, rounds: int) -> dict[str, Any]:
    """Return the recipe as the server has it."""
    return {
        "tune": "full",
        "model": {"name": model},
        "name": "large",
        "algorithm": "fedavg",
        "data": {"source": "site", "prompt": "plain", "max_length": 32},
        "local": {
            "optimizer": "sgd",
            "lr": 0.05,
            "steps": 1,
            "batch_size": 2,
            "batched": "off",
            "kernels": "torch",
        },
        "evaluation": {"every": 0, "generate": False, "max_examples": 1, "validation": False},
        "run": {"rounds": rounds, "samples": 0, "keep_checkpoints": 1},
    }


def texts(folder: Path, names: Sequence[str]) -> None:
    """Write a file of text for each site."""
    folder.mkdir(parents=True)
    for at, name in enumerate(names):
        rows = [{"prompt": f"say {i}", "completion": f"{i * (at + 2)}"} for i in range(24)]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def frames(folder: Path) -> bool:
    """Return whether an upload is on its way, or, of a version that knows no frames, a round."""
    return any(path.suffix == ".part" for path in folder.glob("flower/messages/*/*"))


def main() -> None:
    """Print what was sent, what was held, and how it compares."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="")
    parser.add_argument("--sites", type=int, default=len(NAMES), choices=range(1, 1 + len(NAMES)))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cut", action="store_true")
    parser.add_argument("--here", action="store_true")
    asked = parser.parse_args()
    print(about(["torch", "flwr"]), "\n", sep="")
    with tempfile.TemporaryDirectory(prefix="fedloom-", dir=os.environ.get("LARGE")) as temporary:
        home = Path(temporary)
        model = str(Path(asked.model).expanduser()) if asked.model else str(home / "model")
        if not asked.model:
            random_llama(512, 11).save_pretrained(model)
            load_tokenizer(ModelSettings()).save_pretrained(model)
        names = NAMES[: asked.sites]
        texts(home / "data", names)
        recipe = recipe_of(model, asked.rounds)
        state = federate(home, recipe, names, cut=asked.cut)
        if asked.here:
            print(f"in one process the same state: {in_one_process(home, recipe, names) == state}")


def in_one_process(home: Path, recipe: dict[str, Any], names: Sequence[str]) -> str:
    """Return the hash of the last state of the same rounds here."""

    sites = [SiteSettings(name, home, home / "data" / f"{name}.jsonl") for name in names]
    made = build_recipe(recipe)
    session = build(made, home / "here", makers=Makers(federation=all_own(sites)))
    run = begin(made.algorithm, session.space.start(), made.run.seed)
    for _ in range(made.run.rounds):
        run, _, _ = advance(
            run,
            made.algorithm,
            session.engine,
            population=session.learners,
            sampler=made.cohort,
        )
    return state_sha256(run)


def federate(home: Path, recipe: dict[str, Any], names: Sequence[str], *, cut: bool) -> str:
    """Run the federation, print what it took, and return the hash of its last state."""
    with Sites(home / "lab", recipe, names) as sites:
        began = time.monotonic()
        server, wire = sites.serve(), Wire(sites.port)
        port = wire.start()
        joined = [sites.join(name, home / "data" / f"{name}.jsonl", port=port) for name in names]
        memory = Memory([server.pid, *(process.pid for process in joined)])
        looking = threading.Thread(target=memory.watch, daemon=True)
        looking.start()
        try:
            until(
                lambda: all(
                    f"{name}: joined" in said(home / "lab" / f"{name}.log") for name in names
                ),
                server,
                900,
            )
        except RuntimeError:
            raise SystemExit(said(home / "lab" / "serve.log")) from None
        memory.begin()
        begun = time.monotonic()
        if cut:
            until(lambda: frames(sites.out), server, 900)
            time.sleep(1)
            wire.cut()
            print(f"cut for {OUTAGE:g} seconds")
        if server.wait(3000):
            raise SystemExit(said(home / "lab" / "serve.log"))
        memory.is_over = True
        looking.join()
        print(
            f"met after {begun - began:.0f} s, {recipe['run']['rounds']} rounds in {time.monotonic() - begun:.0f} s"
        )
        heard = [
            line
            for line in said(home / "lab" / "serve.log").splitlines()
            if "waiting 90" in line or "absent" in line
        ]
        print("\n".join(dict.fromkeys(heard)))
        summary = json.loads((sites.out / "summary.json").read_text())
        rounds = metrics(sites.out)[1:]
        size = rounds[0]["comm/upload_bytes"] / len(names)
        for way, counted in (("up", wire.up), ("down", wire.down)):
            whole = sum(
                line[f"comm/{'upload' if way == 'up' else 'download'}_bytes"] for line in rounds
            )
            print(
                f"{way:4} reported {whole / 1e6:9.1f} MB, on the wire {counted / 1e6:9.1f} MB, {counted / whole - 1:+.2%}"
            )
        print(
            f"\na message: {size / 1e6:.1f} MB\nprocess         before      most   more, in messages"
        )
        for role in ROLES.values():
            more = (memory.most[role] - memory.before[role]) / size
            print(
                f"{role:14} {memory.before[role] / 1e6:7.0f} MB {memory.most[role] / 1e6:6.0f} MB {more:8.2f}"
            )
        print(f"absent: {summary['num_absent']}", flush=True)
    return str(summary["state_sha256"])


if __name__ == "__main__":
    main()
