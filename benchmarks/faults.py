"""What a federation does when something breaks: real processes, killed, filled, delayed and misled.

    python benchmarks/faults.py [absent] [lost] [resumed] [refused] [outage] [hostile] [doors]

absent   a client raises, a worker is killed, a disk is full, a site is slower than the deadline: one of three sites is
         absent for a round, by name and with the reason, and is back in the next one, its memory intact.
lost     a SuperNode, the SuperLink and the server are killed in the middle of rounds: every round is finished, and the
         run ends with the bytes of an undisturbed one.
resumed  the server of sites that joined is killed at work, and resumed: sites come back by themselves, no round is lost.
refused  another authority, a key nobody knows, another version, another base model: told before round 1, and why.
outage   all sites are away for three minutes in the middle: no round is spent, and the run goes on with them.
hostile  one site's key under another's name, and one site that answers Flower with no letter at all: the others' rounds count.
doors    a port that is in use, a certificate that has expired: said before anything starts.

The full disk is a small tmpfs, which takes root to mount.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from fedloom import experiment
from fedloom.engines.flower import keys as keys_module
from fedloom.engines.flower.keys import Keys
from fedloom.recipe import build_recipe
from sites import NODE, Sites, below, metrics, said, until
from timing import about

NAMES = ("alba", "brno", "cork")
RECIPE: dict[str, Any] = {
    "name": "faults",
    "algorithm": "scaffold",
    "data": {"source": "site", "max_length": 64},
    "tune": {"lora": {"rank": 4}},
    "local": {"optimizer": "sgd", "lr": 0.1, "steps": 4, "batch_size": 2, "batched": "off"},
    "evaluation": {"every": 0, "generate": False, "max_examples": 1, "validation": False},
}
# Done by the worker of one site where files of these names are found.
INJECTION = (
    "import fedloom.deploy.site as site",
    "real = site.run_tasks",
    "def run_tasks(*given):",
    "    here = os.environ['FAULTS']",
    "    if os.path.exists(here + '/raise'):",
    "        raise RuntimeError('CUDA out of memory, for example')",
    "    if os.path.exists(here + '/slow'):",
    "        time.sleep(75)",
    "    if os.path.exists(here + '/busy'):",
    "        open(here + '/at_work', 'w').close()",
    "        time.sleep(10)",
    "    return real(*given)",
    "site.run_tasks = run_tasks",
)


def texts(folder: Path) -> dict[str, Path]:
    """Write a file of text for each site."""
    folder.mkdir(parents=True, exist_ok=True)
    for at, name in enumerate(NAMES):
        rows = [{"prompt": f"say {i}", "completion": f"{i * (at + 2)}"} for i in range(24)]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return {name: folder / f"{name}.jsonl" for name in NAMES}


def reached(sites: Sites, number: int, server: "subprocess.Popen[bytes]") -> None:
    """Wait until a round is finished."""
    until(lambda: len(metrics(sites.out)) > number, server)


def absent(home: Path) -> None:
    """One of three sites fails in each of four ways, a healthy round after each."""
    recipe = {**RECIPE, "run": {"rounds": 100, "samples": 0}}
    recipe["engine"] = {"flower": {"nodes": 0, "deadline": 60}}
    data, faults, disk = texts(home / "data"), home / "faults", home / "lab" / "sites" / "cork"
    faults.mkdir()
    with Sites(home / "lab", recipe) as sites:
        disk.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], check=True)
        try:
            server = sites.serve()
            environment = {**sites.injected(*INJECTION), "FAULTS": str(faults)}
            joined = {
                name: sites.join(
                    name, data[name], environment=environment if name == "cork" else {}
                )
                for name in NAMES
            }
            reached(sites, 1, server)
            for name, begin, end in _absences(faults, disk, joined["cork"]):
                _one(sites, server, name, begin, end)
            server.send_signal(signal.SIGINT)
            print(f"Ctrl-C at the server: ended with {server.wait(120)}")
            print("the site's own words:")
            print(_indented(said(home / "lab" / "cork.log")))
        finally:
            sites.__exit__(None, None, None)
            subprocess.run(["umount", str(disk)], check=True)


def _absences(
    faults: Path, disk: Path, cork: "subprocess.Popen[bytes]"
) -> list[tuple[str, Callable[[], object], Callable[[], object]]]:
    def kill() -> None:
        (faults / "at_work").unlink(missing_ok=True)
        (faults / "busy").touch()
        until((faults / "at_work").exists, cork)
        below(cork, "fedloom.deploy.worker").kill()

    def fill() -> None:
        with open(disk / "filling", "wb") as file:
            file.write(bytes(shutil.disk_usage(disk).free))

    return [
        ("the client raises", (faults / "raise").touch, (faults / "raise").unlink),
        ("the worker is killed at work", kill, (faults / "busy").unlink),
        ("the site's disk is full", fill, (disk / "filling").unlink),
        ("the site is slower than the deadline", (faults / "slow").touch, (faults / "slow").unlink),
    ]


def _one(
    sites: Sites,
    server: "subprocess.Popen[bytes]",
    name: str,
    begin: Callable[[], object],
    end: Callable[[], object],
) -> None:
    before, at = len(metrics(sites.out)), len(said(sites.folder / "serve.log"))
    began = time.monotonic()
    begin()

    def with_absence() -> bool:
        return any(line.get("comm/num_absent") for line in metrics(sites.out)[before:])

    until(with_absence, server)
    took = time.monotonic() - began
    end()
    since = len(metrics(sites.out))
    until(lambda: any(not line["comm/num_absent"] for line in metrics(sites.out)[since:]), server)
    print(f"{name}: absent after {took:.0f} s, whole again after {time.monotonic() - began:.0f} s")
    heard = said(sites.folder / "serve.log")[at:].splitlines()
    print(_indented("\n".join(dict.fromkeys(line for line in heard if "cork" in line))), flush=True)


def lost(home: Path) -> None:
    """Kill a SuperNode, the SuperLink, and the server, each in the middle of a round."""
    folder = texts(home / "data")["alba"].parent
    data = {**RECIPE["data"], "source": str(folder), "partition": {"natural": {"by": "file"}}}
    recipe = {**RECIPE, "data": data, "run": {"rounds": 8, "samples": 0}}
    here = experiment.run(build_recipe(recipe), home / "here").summary
    recipe["engine"] = {"flower": {"nodes": 3}}
    with Sites(home / "lab", recipe, ()) as sites:
        words = ("run", str(sites.folder / "recipe.yaml"), "--out", str(sites.out))
        log = home / "lab" / "run.log"
        server = sites.command(*words, log=log)
        for at, victim in ((1, "flower-supernode node-1"), (3, "flower-superlink --host")):
            reached(sites, at, server)
            _killed(sites, server, victim)
        reached(sites, 5, server)
        done = len(metrics(sites.out)) - 1
        time.sleep(2)
        server.kill()
        server.wait()
        print(f"the server's process: killed after round {done} was finished")
        began = time.monotonic()
        again = sites.command("resume", str(sites.out), log=log)
        if again.wait(600):
            raise SystemExit(said(log))
        print(f"resumed and ended after {time.monotonic() - began:.0f} s; its words:")
        print(_indented("\n".join(li for li in said(log).splitlines() if _telling(li))))
        told = json.loads((sites.out / "summary.json").read_text())
    rounds = [line["round"] for line in metrics(sites.out)]
    print(f"failures {told['num_absent']}; rounds {rounds}")
    print(f"state undisturbed {here['state_sha256'][:16]}, here {told['state_sha256'][:16]}")
    if told["state_sha256"] != here["state_sha256"] or told["num_absent"]:
        raise SystemExit("a round was lost")


def resumed(home: Path) -> None:
    """Kill the server of three sites that joined, and go on with its run."""
    recipe = {**RECIPE, "run": {"rounds": 5, "samples": 0}}
    data = texts(home / "data")
    with Sites(home / "lab", recipe) as sites:
        server = sites.serve()
        joined = [sites.join(name, data[name]) for name in NAMES]
        reached(sites, 2, server)
        time.sleep(2)
        server.kill()
        server.wait()
        print(
            f"the server's process: killed after round {len(metrics(sites.out)) - 1} was finished"
        )
        began = time.monotonic()
        again = sites.command("resume", str(sites.out), log=home / "lab" / "serve.log")
        codes = [process.wait(600) for process in (again, *joined)]
        print(f"resumed and ended after {time.monotonic() - began:.0f} s, exit codes {codes}")
        print(_indented(said(home / "lab" / "serve.log")))
        print(_indented(said(home / "lab" / "brno.log")))
        told = json.loads((sites.out / "summary.json").read_text())
        rounds = [line["round"] for line in metrics(sites.out)]
    print(f"failures {told['num_absent']}; rounds {rounds}")
    if any(codes) or told["num_absent"] or rounds != list(range(6)):
        raise SystemExit("a round or a site was lost")


def _telling(line: str) -> bool:
    return any(word in line for word in ("link", "gone", "going on after", "absent", "waiting"))


def _killed(sites: Sites, server: "subprocess.Popen[bytes]", victim: str) -> None:
    before, began = len(metrics(sites.out)), time.monotonic()
    time.sleep(2)
    below(server, victim).send_signal(signal.SIGKILL)
    until(lambda: len(metrics(sites.out)) > before + 1, server)
    print(
        f"{victim.split()[0]}: killed, the next round was finished {time.monotonic() - began:.0f} s later"
    )


def refused(home: Path) -> None:
    """Come with another authority, a key nobody knows, another version, another base model."""
    data = texts(home / "data")["alba"]
    recipe = {**RECIPE, "run": {"rounds": 1, "samples": 0}}
    with Sites(home / "doors", recipe, ("alba",)) as sites:
        sites.serve()
        stranger = Keys(home / "stranger")
        stranger.init(())
        late = sites.keys.add("late")
        for name, key in (("alba", stranger.add("alba")), ("late", late)):
            began = time.monotonic()
            code = sites.join(name, data, keys=key).wait(400)
            words = said(sites.folder / f"{name}.log").splitlines()
            print(f"{name}: ended with {code} after {time.monotonic() - began:.0f} s")
            print(_indented("\n".join(dict.fromkeys(words))), flush=True)
    versions = home / "versions" / "fedloom-9.9.9.dist-info"
    versions.mkdir(parents=True)
    (versions / "METADATA").write_text("Metadata-Version: 2.1\nName: fedloom\nVersion: 9.9.9\n")
    _misfit(home / "version", recipe, data, {"PYTHONPATH": str(versions.parent)})
    lines = (
        "import torch, fedloom.rounds.session as session",
        "real = session.load_base",
        "def load_base(settings):",
        "    base = real(settings)",
        "    with torch.no_grad():",
        "        next(iter(base.model.parameters())).add_(1e-3)",
        "    return base",
        "session.load_base = load_base",
    )
    _misfit(home / "base", recipe, data, lines)


def outage(home: Path) -> None:
    """Stop every site in the middle of a run, and start all of them again three minutes later."""
    recipe = {**RECIPE, "run": {"rounds": 6, "samples": 0}}
    data = texts(home / "data")
    with Sites(home / "lab", recipe) as sites:
        server = sites.serve()
        joined = [sites.join(name, data[name]) for name in NAMES]
        reached(sites, 2, server)
        for process in joined:
            process.send_signal(signal.SIGINT)
        for process in joined:
            process.wait(60)
        done = len(metrics(sites.out)) - 1
        print(f"all sites ended after round {done}", flush=True)
        time.sleep(180)
        print(f"three minutes later {len(metrics(sites.out)) - 1} rounds are finished")
        again = [sites.join(name, data[name]) for name in NAMES]
        codes = [process.wait(900) for process in (server, *again)]
        told = json.loads((sites.out / "summary.json").read_text())
        print(f"ended with {codes}; the server's words:")
        print(_indented("\n".join(li for li in said(home / "lab" / "serve.log").splitlines())))
    empty = [li["round"] for li in metrics(sites.out)[1:] if not li["comm/num_replies"]]
    print(f"rounds without a reply {empty}; failures {told['num_absent']}")
    if any(codes) or empty:
        raise SystemExit("a round was spent on nobody")


MALFORMED = (
    "from flwr.app import RecordDict",
    "import fedloom.engines.flower.app as app",
    "app._packed = lambda header, pieces: RecordDict({})",
)


def hostile(home: Path) -> None:
    """Come with one site's key under another's name; then answer with what is no letter."""
    recipe = {**RECIPE, "run": {"rounds": 2, "samples": 0}}
    data = texts(home / "data")
    recipe["engine"] = {"flower": {"nodes": 0, "patience": 400, "deadline": 60}}
    with Sites(home / "stolen", recipe, ("alba", "brno")) as sites:
        server = sites.serve()
        thief = sites.join("thief", data["alba"], keys=sites.keys.folder / "sites" / "alba")
        brno = sites.join("brno", data["brno"])
        until(lambda: "alba cannot join" in said(home / "stolen" / "serve.log"), server)
        print("alba's key under the name thief, while brno joins; the server and the thief:")
        print(_indented(said(home / "stolen" / "serve.log")))
        print(_indented(said(home / "stolen" / "thief.log")))
        thief.terminate()
        thief.wait(60)
        alba = sites.join("alba", data["alba"])
        print(f"alba itself then: all ended with {[p.wait(600) for p in (server, brno, alba)]}")
        print(f"failures {json.loads((sites.out / 'summary.json').read_text())['num_absent']}")
    with Sites(home / "malformed", recipe, ("alba", "brno")) as sites:
        server = sites.serve()
        odd = sites.join("alba", data["alba"], environment=sites.injected(*MALFORMED, program=NODE))
        brno = sites.join("brno", data["brno"])
        until(lambda: "alba cannot join" in said(home / "malformed" / "serve.log"), server)
        print("alba answers Flower with no letter; the server:")
        print(_indented(said(home / "malformed" / "serve.log")))
        odd.terminate()
        odd.wait(60)
        alba = sites.join("alba", data["alba"])
        print(f"alba mended: all ended with {[p.wait(600) for p in (server, brno, alba)]}")
        told = said(home / "malformed" / "serve.log")
        print(f"links that were made anew: {told.count('making a new link')}", flush=True)


def doors(home: Path) -> None:
    """Listen where another program does, and with a certificate of three years ago."""
    recipe = {**RECIPE, "run": {"rounds": 1, "samples": 0}}
    with Sites(home / "port", recipe, ("alba",)) as sites, socket.socket() as other:
        other.bind(("127.0.0.1", sites.port))
        other.listen()
        _ended(sites, home / "port" / "serve.log", "a port that is in use")
    with Sites(home / "old", recipe, ("alba",)) as sites:
        shutil.rmtree(sites.keys.folder)
        today = keys_module._now()
        keys_module._now = lambda: today - datetime.timedelta(days=3 * 365)
        try:
            sites.keys.init(())
        finally:
            keys_module._now = lambda: today
        sites.keys.add("alba")
        _ended(sites, home / "old" / "serve.log", "a certificate that has expired")


def _ended(sites: Sites, log: Path, what: str) -> None:
    began = time.monotonic()
    try:
        sites.serve()
    except RuntimeError as error:
        print(f"{what}: {error} after {time.monotonic() - began:.0f} s")
        print(_indented(said(log)), flush=True)
    else:
        raise SystemExit(f"{what}: the server listens")


def _misfit(home: Path, recipe: Any, data: Path, changed: Any) -> None:
    # The server waits for a site that is mended, this long.
    recipe = {**recipe, "engine": {"flower": {"nodes": 0, "patience": 90}}}
    with Sites(home, recipe, ("alba",)) as sites:
        server, began = sites.serve(), time.monotonic()
        environment = changed if isinstance(changed, dict) else sites.injected(*changed)
        sites.join("alba", data, environment=environment)
        code = server.wait(400)
        print(
            f"another {home.name}: the server ended with {code} after {time.monotonic() - began:.0f} s"
        )
        print(_indented(said(home / "serve.log")))
        print(_indented(said(home / "alba.log")), flush=True)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() if line.strip())


def main() -> None:
    """Break what was asked for, or all of it."""
    kinds = {
        "absent": absent,
        "lost": lost,
        "resumed": resumed,
        "refused": refused,
        "outage": outage,
        "hostile": hostile,
        "doors": doors,
    }
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", default=list(kinds))
    asked = parser.parse_args().kinds
    print(about(["torch", "flwr"]), flush=True)
    for name in asked:
        print(f"\n{name}\n{'-' * len(name)}", flush=True)
        with tempfile.TemporaryDirectory(prefix="fedloom-") as folder:
            kinds[name](Path(folder))


if __name__ == "__main__":
    main()
