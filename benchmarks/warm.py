"""What a round costs on Flower when there is next to nothing to do, beside Flower's own floor.

    python benchmarks/warm.py [--rounds 10]

`flower alone`: three SuperNodes, TLS and keys, an app of a few lines that sends an empty message to each and polls for the
answers. `fedloom`: three sites with an adapter of rank 1, one step, a base model that takes 5 s longer to load. Loading
happens while sites are met; no round pays for it again.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from fedloom.engines.flower import programs
from fedloom.engines.flower.keys import Keys
from fedloom.engines.flower.processes import free_port, start
from fedloom.engines.flower.programs import SuperLink
from sites import Sites, metrics, said, until
from timing import about

NAMES = ("alba", "brno", "cork")
APP = """
import json, time
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

server_app = ServerApp()
client_app = ClientApp()

@server_app.main()
def main(grid: Grid, context: Context) -> None:
    seconds = []
    while len(nodes := list(grid.get_node_ids())) < 3:
        time.sleep(0.2)
    for _ in range(int(context.run_config["rounds"])):
        began = time.monotonic()
        said = RecordDict({"empty": ConfigRecord({"x": 1})})
        waiting = set(grid.push_messages([Message(said, n, "train", ttl=60) for n in nodes]))
        while waiting:
            time.sleep(0.02)
            waiting -= {m.metadata.reply_to_message_id for m in grid.pull_messages(waiting)}
        seconds.append(time.monotonic() - began)
    with open(str(context.run_config["out"]), "w") as file:
        json.dump(seconds, file)

@client_app.train()
def train(message: Message, _: Context) -> Message:
    return Message(RecordDict({"empty": ConfigRecord({"x": 1})}), reply_to=message)
"""
PROJECT = """[project]
name = "floor"
version = "1.0.0"
description = "x"
license = {{ text = "Apache-2.0" }}
dependencies = []
[tool.flwr.app]
publisher = "nobody"
[tool.flwr.app.components]
serverapp = "floor.app:server_app"
clientapp = "floor.app:client_app"
[tool.flwr.app.config]
rounds = {rounds}
out = "{out}"
"""


def flower_alone(home: Path, rounds: int) -> list[float]:
    """Return the seconds of each round of an app that does nothing."""
    app, out = home / "app", home / "seconds.json"
    (app / "floor").mkdir(parents=True)
    (app / "floor" / "__init__.py").touch()
    (app / "floor" / "app.py").write_text(APP)
    (app / "pyproject.toml").write_text(PROJECT.format(rounds=rounds, out=out))
    keys, bin = Keys(home / "keys"), Path(sys.executable).parent
    keys.init(())
    sites = {name: keys.add(name) for name in NAMES}
    link = SuperLink(home / "server", keys, free_port())
    with ExitStack() as stack:
        stack.callback(link.start().stop)
        link.register()
        for name, key in sites.items():
            node = start(
                "supernode",
                [
                    str(bin / "flower-supernode"),
                    *("--superlink", f"127.0.0.1:{link.port}"),
                    *("--root-certificates", str(key / "ca.crt")),
                    *("--auth-supernode-private-key", str(key / "node.key")),
                    *("--host", "127.0.0.1", "--port", str(free_port())),
                ],
                folder=home / name,
                environment={**programs.QUIET, "FLWR_HOME": str(home / name / "home")},
            )
            stack.callback(node.stop)
        link.flwr("run", str(app), programs.NAME)
        until(out.exists, seconds=300)
        time.sleep(0.5)
        seconds: list[float] = json.loads(out.read_text())
    return seconds


def ours(home: Path, rounds: int) -> list[float]:
    """Return the seconds of each round of a run that learns next to nothing."""
    recipe = {
        "name": "warm",
        "algorithm": "fedavg",
        "data": {"source": "site", "max_length": 32},
        "tune": {"lora": {"rank": 1, "targets": ["q_proj"]}},
        "local": {"optimizer": "sgd", "lr": 0.1, "steps": 1, "batch_size": 1, "kernels": "torch"},
        "evaluation": {"every": 0, "generate": False, "max_examples": 1, "validation": False},
        "run": {"rounds": rounds, "samples": 0},
    }
    data = home / "text.jsonl"
    rows = [{"prompt": f"say {i}", "completion": str(i)} for i in range(12)]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    lines = (
        "import fedloom.rounds.session as session",
        "real = session.load_base",
        "def load_base(settings):",
        "    time.sleep(5)",
        "    print('loading the base', flush=True)",
        "    return real(settings)",
        "session.load_base = load_base",
    )
    with Sites(home / "lab", recipe, NAMES) as sites:
        server, environment = sites.serve(), sites.injected(*lines)
        joined = [sites.join(name, data, environment=environment) for name in NAMES]
        if any(process.wait(900) for process in (server, *joined)):
            raise SystemExit(said(home / "lab" / "serve.log"))
        logs = [home / "lab" / "sites" / name / "logs" / name / "worker.log" for name in NAMES]
        loads = sum(log.read_text().count("loading the base") for log in logs)
        print(f"bases loaded: {loads}, at {len(NAMES)} sites in {rounds} rounds")
        return [line["time/train_seconds"] for line in metrics(sites.out)[1:]]


def main() -> None:
    """Print the seconds of every round, and the medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    print(about(["torch", "flwr"]), "\n", sep="", flush=True)
    for turn in (1, 2):
        with tempfile.TemporaryDirectory(prefix="fedloom-") as folder:
            show(f"flower alone, turn {turn}", flower_alone(Path(folder), rounds))
        with tempfile.TemporaryDirectory(prefix="fedloom-") as folder:
            show(f"fedloom, turn {turn}", ours(Path(folder), rounds))


def show(name: str, seconds: Sequence[float]) -> None:
    """Print one row."""
    each = " ".join(f"{s:.1f}" for s in seconds)
    print(f"{name:22} median {statistics.median(seconds):5.2f} s, rounds {each}", flush=True)


if __name__ == "__main__":
    main()
