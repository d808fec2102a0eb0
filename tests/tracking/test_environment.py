import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from fedloom.tracking.environment import (
    collect,
    peak_gpu_memory_bytes,
    peak_memory_bytes,
    phase_memory,
)


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
    code = "from fedloom.tracking.environment import peak_memory_bytes as peak\nprint(peak())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 10**7 < int(done.stdout) < len(block) < peak_memory_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_each_phase_has_its_own_peak_and_the_whole_process_keeps_its() -> None:
    """A peak that is never forgotten tells of another phase."""
    with phase_memory("first") as first:
        block = bytearray(200_000_000)
        del block
    with phase_memory("second") as second:
        pass
    assert list(first) == ["memory/first_bytes"]
    assert list(second) == ["memory/second_bytes"]
    assert first["memory/first_bytes"] > second["memory/second_bytes"] + 190_000_000
    assert peak_memory_bytes() >= first["memory/first_bytes"]


def test_a_system_that_cannot_forget_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    with phase_memory("any") as told:
        pass
    assert told == {}


def test_without_a_gpu_its_peak_is_nothing() -> None:
    if not torch.cuda.is_available():
        assert peak_gpu_memory_bytes() == 0
