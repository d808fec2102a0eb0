"""A federation of three sites on one machine: every site has a key and data of its own, and Flower carries the messages.

The same commands, each on its own machine, are a federation over a network (docs/deploy.md).
"""

import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from fedloom.data.polyglot import rows

SITES = {"alba": "en", "brno": "de", "cork": "es"}
SETTINGS = [
    "run.rounds=2",
    "run.baselines=[]",
    "run.samples=0",
    "local.steps=4",
    "evaluation.generate=false",
]


def start(*arguments: str, folder: Path) -> "subprocess.Popen[bytes]":
    """Start a fedloom command in a folder."""
    command = [sys.executable, "-c", "from fedloom.cli import main; main()", *arguments]
    return subprocess.Popen(command, cwd=folder)


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def federate(folder: Path) -> None:
    """Make keys and data, start the server and the sites, and wait for all of them."""
    start("recipes", "cp", "quickstart", "recipe.yaml", folder=folder).wait()
    start("keys", "init", "--host", "localhost", folder=folder).wait()
    examples = rows(1200, 0)
    for site, language in SITES.items():
        start("keys", "add", site, folder=folder).wait()
        lines = [json.dumps(row) for row in examples if row["language"] == language]
        (folder / f"{site}.jsonl").write_text("\n".join(lines) + "\n")
    address = f"localhost:{free_port()}"
    served = start(
        "serve", "recipe.yaml", *SETTINGS, "--listen", address, "--out", "run", folder=folder
    )
    joined = [
        start(
            "join", address, "--name", site, "--data", f"{site}.jsonl", "--keys", f"keys/sites/{site}",
            folder=folder,
        )
        for site in SITES
    ]  # fmt: skip
    try:
        codes = [process.wait(timeout=600) for process in (served, *joined)]
    finally:
        for process in (served, *joined):
            process.terminate()
    if any(codes):
        raise SystemExit(f"exit codes of the server and the sites: {codes}")


def main() -> None:
    """Run the federation in a folder that is gone afterwards, and print what came of it."""
    with tempfile.TemporaryDirectory() as name:
        federate(Path(name))
        summary = json.loads((Path(name) / "run" / "summary.json").read_text())
    print(f"{summary['num_clients']} sites, {summary['rounds']} rounds")
    print(f"test loss {summary['before']['test/loss']:.3f} -> {summary['final']['test/loss']:.3f}")


if __name__ == "__main__":
    main()
