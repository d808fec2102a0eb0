import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

PROGRAM = Path(__file__).with_name("ranks_program.py")


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ranks_program", PROGRAM)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what two processes made of all cases, split and as replicas."""
    folder, number = tmp_path_factory.mktemp("ranks"), 2
    processes = [
        subprocess.Popen([sys.executable, str(PROGRAM), str(rank), str(number), str(folder)])
        for rank in range(number)
    ]
    try:
        assert [process.wait(900) for process in processes] == [0] * number
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return torch.load(folder / "found", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("local", ["adamw", "sgd"])
def test_two_processes_learn_what_one_does(program: ModuleType, found: Any, tune: str, local: str):
    """Two rounds, with unequal rows, a batch too short for all, clip, decay, pull, offset and mask."""
    alone = program.results(tune, local, "one")
    for kind in program.KINDS:
        for own, other in zip(alone, found[f"{kind}-{tune}-{local}"], strict=True):
            assert other[0].keys() == own[0].keys()
            for name, tensor in own[0].items():
                torch.testing.assert_close(other[0][name], tensor, rtol=0, atol=1e-10)
            assert other[1] == pytest.approx(own[1], abs=1e-12)
            assert other[2] == own[2]
