"""Three sites, one group of languages each, over `fedloom serve` and `fedloom join`: real text for 20 rounds.

    python benchmarks/xquad_sites.py FOLDER_OF_XQUAD [--rounds 20] [--out FOLDER]

FOLDER_OF_XQUAD holds xquad.LANGUAGE.json. Every site is a process of its own with files of its own, on loopback ports,
encrypted and with a key each; the server holds no text.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from fedloom.recipe import read_tree
from sites import Sites, metrics, said
from timing import about

GROUPS = {"romance": ("es", "ro"), "germanic": ("de", "en"), "others": ("ar", "ru", "tr", "zh")}


def main() -> None:
    """Run it, and print the table of rounds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    recipe = read_tree("xquad")
    recipe["data"] = {k: v for k, v in recipe["data"].items() if k not in ("config", "split")}
    recipe["data"]["max_length"] = 256
    recipe["local"]["steps"] = 4
    recipe["evaluation"] |= {"every": 10, "max_examples": 8, "max_new_tokens": 12}
    recipe["run"] = {"rounds": asked.rounds, "samples": 0}
    recipe["name"] = "xquad-sites"
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fedloom-") as temporary:
        home = Path(temporary)
        for group, languages in GROUPS.items():
            (home / group).mkdir()
            for language in languages:
                shutil.copy(asked.source / f"xquad.{language}.json", home / group)
        with Sites(home / "lab", recipe, tuple(GROUPS)) as sites:
            server = sites.serve()
            joined = [sites.join(group, home / group) for group in GROUPS]
            codes = [process.wait() for process in (server, *joined)]
            print(about(["torch", "flwr"]), "\n", sep="")
            print(said(home / "lab" / "serve.log"))
            if any(codes):
                raise SystemExit(f"commands ended with {codes}")
            show(sites.out, time.perf_counter() - began)
            if asked.out:
                shutil.copytree(sites.out, asked.out)


def show(out: Path, seconds: float) -> None:
    """Print each round and what the whole came to."""
    print("round  train loss  test loss  up kB  down kB  absent  seconds")
    for line in metrics(out):
        print(
            f"{line['round']:5}  {line.get('train/loss', float('nan')):10.3f}"
            f"  {line.get('test/loss', float('nan')):9.3f}"
            f"  {line.get('comm/upload_bytes', 0) / 1e3:5.0f}"
            f"  {line.get('comm/download_bytes', 0) / 1e3:7.0f}"
            f"  {line.get('comm/num_absent', 0):6.0f}  {line['time/round_seconds']:7.1f}"
        )
    told = json.loads((out / "summary.json").read_text())
    report = (out / "report.html").stat().st_size
    print(f"\nstate {told['state_sha256']}, report.html {report} bytes, {seconds:.0f} s in all")


if __name__ == "__main__":
    main()
