import json
import subprocess
import sys

import psutil
import pytest
import torch

from fedloom.run.environment import collect, peak_gpu_memory_bytes, peak_memory_bytes


def test_the_environment_names_versions_machine_and_command() -> None:
    found = collect(["fedloom", "run", "demo"])
    assert found["command"] == "fedloom run demo"
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["fedloom"]
    assert set(found["versions"]) >= {"transformers", "peft", "numpy"}
    assert found["num_cores"] >= 1
    assert found["memory_bytes"] > 10**8
    assert found["cpu"]
    assert found["date"].endswith("+00:00")
    assert json.loads(json.dumps(found)) == found


def test_the_command_is_this_processs_where_none_is_given() -> None:
    assert "/" not in collect()["command"].split()[0]


def test_peak_memory_remembers_what_was_freed() -> None:
    held = psutil.Process().memory_info().rss
    block = bytearray(200_000_000)
    del block
    assert peak_memory_bytes() > held + 190_000_000


@pytest.mark.slow
def test_peak_memory_is_not_the_parents() -> None:
    block = bytearray(800_000_000)
    code = "from fedloom.run.environment import peak_memory_bytes as peak\nprint(peak())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 10**7 < int(done.stdout) < len(block) < peak_memory_bytes()


def test_without_a_gpu_its_peak_is_nothing() -> None:
    if not torch.cuda.is_available():
        assert peak_gpu_memory_bytes() == 0
