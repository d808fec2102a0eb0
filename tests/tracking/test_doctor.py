import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from io import StringIO

import pytest
import torch
from rich.console import Console

from fedloom.tracking import doctor


def printed() -> str:
    out = Console(file=StringIO(), width=200)
    out.print(doctor.doctor())
    assert isinstance(out.file, StringIO)
    return out.file.getvalue()


def test_the_table_names_versions_devices_extras_and_caches():
    text = printed()
    for word in (
        version("torch"),
        version("peft"),
        "cpu",
        "[flower]",
        "[trackers]",
        "HF_HUB_CACHE",
    ):
        assert word in text
    assert "pip install 'fedloom[trackers]'" in text


def test_a_missing_package_comes_with_the_command_that_installs_it(monkeypatch):
    def nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", nothing)
    rows = {row[0]: row for row in doctor.packages()}
    assert rows["peft"][1] == "-"
    assert rows["peft"][2].startswith("missing: pip install 'peft")
    assert any("pip install 'fedloom[flower]'" in note for _, _, note in doctor.extras())


def test_an_extra_that_is_complete_asks_for_nothing(monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "1.0")
    assert {note for _, _, note in doctor.extras()} == {""}


def test_a_gpu_is_listed_with_its_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda at: (3 * doctor.GIB, 4 * doctor.GIB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda at: "Card")
    assert ("cuda:0", "Card", "3.0 of 4.0 GiB free") in list(doctor.devices())


def test_apple_devices_are_listed(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert "mps" in [what for what, _, _ in doctor.devices()]


@pytest.mark.parametrize(("offline", "said"), [("1", True), ("0", False)])
def test_caches_follow_the_environment_even_before_they_exist(monkeypatch, tmp_path, offline, said):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "not" / "there"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    (_, models, note), (_, data, _), (_, own, own_note) = doctor.caches()
    assert models == str(tmp_path / "not" / "there" / "hub")
    assert data == str(tmp_path / "data")
    assert ("offline" in note) == said
    assert own == os.environ["FEDLOOM_CACHE"]
    assert "offline" not in own_note


def test_doctor_loads_no_model_library():
    code = "import sys, fedloom.tracking.doctor as d; d.doctor(); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
