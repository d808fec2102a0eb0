"""Checkpoints: exact, whole, and of this recipe."""

import dataclasses
import errno
import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedloom.core.files import DamagedFile, DiskFull, write_hashed
from fedloom.rounds.checkpoint import Checkpoints, state_sha256


@dataclass(frozen=True, slots=True)
class Momentum:
    """A server optimizer's state."""

    velocity: Mapping[str, Tensor]
    count: int = 0


@dataclass(frozen=True)
class State:
    """All that a state may hold."""

    params: Mapping[str, Tensor]
    optimizer: Momentum | None = None
    centers: tuple[Momentum, ...] = ()
    anything: Any = None
    norm: float = field(init=False)

    def __post_init__(self) -> None:
        """Compute what no checkpoint has to hold."""
        object.__setattr__(self, "norm", float(sum(t.double().sum() for t in self.params.values())))


@dataclass(frozen=True)
class Run:
    """As in the loop, with a field of its own."""

    number: int
    seed: int
    state: Any


def run(number: int = 0, anything: Any = None) -> Run:
    """Return a run after some rounds."""
    params = {"lora_A": torch.arange(6.0).view(2, 3) + number, "n": torch.tensor(number)}
    momentum = Momentum({"lora_A": torch.full((2, 3), 0.1)}, number)
    return Run(number, 2**63 - 1, State(params, momentum, (momentum,), anything))


def back(tmp_path: Path, value: Any) -> Any:
    """Save and load a value inside a run."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(run(1, value))
    return checkpoints.load(run()).run.state.anything


def damage(path: Path) -> None:
    """Flip a bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def fail(error: BaseException) -> Callable[..., None]:
    """Return a function that only raises."""

    def raises(*_: object, **__: object) -> None:
        raise error

    return raises


# --- what is kept -------------------------------------------------------------------------------


def test_a_run_comes_back_exactly(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(run(3), {"best": 0.25, "history": [1, 2]})
    resumed = checkpoints.load(run())
    assert state_sha256(resumed.run) == state_sha256(run(3))
    assert type(resumed.run.state.centers[0]) is Momentum
    assert resumed.run.state.norm == run(3).state.norm
    assert resumed.extra == {"best": 0.25, "history": [1, 2]}
    assert resumed.damaged == ()


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=9)
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
    ),
    max_leaves=9,
)


@given(value=TREES)
def test_every_nesting_comes_back_with_its_types(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    again = back(tmp_path_factory.mktemp("run"), value)
    assert repr(again) == repr(value)
    assert state_sha256(again) == state_sha256(value)


def test_dicts_that_look_like_the_files_own_words_come_back(tmp_path: Path) -> None:
    words: list[Any] = [
        {"tensor": "0"},
        {"type": "x", "fields": {}},
        {"dict": []},
        {"bytes": "eA=="},
    ]
    for value in words:
        assert back(tmp_path, value) == value


def test_numbers_that_are_none_come_back(tmp_path: Path) -> None:
    assert (
        str(back(tmp_path, (float("nan"), float("inf"), -0.0, 5e-324)))
        == "(nan, inf, -0.0, 5e-324)"
    )


def test_a_frozen_mapping_comes_back_as_a_dict(tmp_path: Path) -> None:
    assert back(tmp_path, MappingProxyType({"a": 1})) == {"a": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.int64])
def test_tensors_of_every_type_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    for tensor in (torch.ones(()), torch.ones(0, 2), torch.eye(40)):
        again = back(tmp_path, [tensor.to(dtype)])[0]
        assert again.dtype == dtype
        assert torch.equal(again, tensor.to(dtype))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1, 2}, r"checkpoint\.run\.state\.anything is a set, a checkpoint holds frozen"),
        ([np.float64(1)], r"checkpoint\.run\.state\.anything\[0\] is a float64"),
        ({"a": object()}, r"checkpoint\.run\.state\.anything\.a is a object"),
        (Momentum, r"checkpoint\.run\.state\.anything is a type"),
        (torch.Size([1]), r"checkpoint\.run\.state\.anything is a Size"),
        ({(1, 2): 3}, r"anything has keys that are neither str nor int: \[\(1, 2\)\]"),
        ({True: 3}, r"anything has keys that are neither str nor int"),
    ],
)
def test_what_would_not_come_back_is_refused_by_path(
    tmp_path: Path, value: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        Checkpoints(tmp_path).save(run(1, value))
    assert not list(tmp_path.iterdir())


def test_only_types_of_the_fresh_run_are_built(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(run(1))
    bare = Run(0, 0, State({}, None, ()))
    with pytest.raises(ValueError, match=r"round-000001\.ckpt holds .*Momentum\(velocity, count\)"):
        checkpoints.load(bare)


def test_a_type_that_has_other_fields_now_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(run(1))
    made = dataclasses.make_dataclass("Run", ["number", "seed", "state", "more"], frozen=True)
    made.__module__, made.__qualname__ = Run.__module__, Run.__qualname__
    with pytest.raises(ValueError, match=r"holds .*Run\(number, seed, state\), which this recipe"):
        checkpoints.load(made(0, 0, run().state, 1))


# --- the folder ---------------------------------------------------------------------------------


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for number in (0, 5, 10, 15):
        path = checkpoints.save(run(number))
        assert path.name == f"round-{number:06d}.ckpt"
    assert checkpoints.rounds() == [10, 15]
    assert checkpoints.load(run()).run.number == 15


def test_rounds_beyond_a_million_are_in_order(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for number in (999_999, 1_000_000):
        checkpoints.save(run(number))
    assert checkpoints.rounds() == [999_999, 1_000_000]


def test_at_least_one_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.keep_checkpoints must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize("how", ["flipped bit", "cut", "empty", "other", "folder"])
def test_a_damaged_newest_falls_back_and_says_so(tmp_path: Path, how: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(run(1))
    newest = checkpoints.save(run(2))
    if how == "flipped bit":
        damage(newest)
    elif how == "cut":
        newest.write_bytes(newest.read_bytes()[:-7])
    elif how == "empty":
        newest.write_bytes(b"")
    elif how == "other":
        write_hashed(newest, b"whole, but nothing of ours")
    else:
        newest.unlink()
        newest.mkdir()
    resumed = checkpoints.load(run())
    assert resumed.run.number == 1
    assert len(resumed.damaged) == 1
    assert ("begins with" if how == "other" else "round-000002.ckpt") in resumed.damaged[0]


def test_a_damaged_future_does_not_displace_a_good_past(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(run(2))
    damage(tmp_path / "round-000002.ckpt")
    checkpoints.save(run(1))
    assert checkpoints.rounds() == [1]
    assert checkpoints.load(run()).run.number == 1


def test_no_good_checkpoint_is_an_error_that_says_what_was_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(DamagedFile, match="checkpoints holds no checkpoint to resume from"):
        checkpoints.load(run())
    for number in (1, 2):
        damage(checkpoints.save(run(number)))
    with pytest.raises(
        DamagedFile, match=r"can be gone on from: .*000002\.ckpt does not .*; .*000001\.ckpt"
    ):
        checkpoints.load(run())


# --- the recipe ---------------------------------------------------------------------------------


def test_a_changed_recipe_is_named(tmp_path: Path) -> None:
    settings = {"local.lr": 0.1, "tune.lora.rank": 8, "tune.lora.targets": ("q", "v"), "gone": None}
    Checkpoints(tmp_path, settings=settings).save(run(1))
    changed = {"local.lr": 0.2, "tune.lora.rank": 8, "tune.lora.targets": ["q", "v"], "added": "x"}
    expected = (
        r"round-000001\.ckpt was written under another recipe, "
        r'added was not set and is "x"; gone was null and is not set; local\.lr was 0\.1 and is 0\.2:'
    )
    with pytest.raises(ValueError, match=expected):
        Checkpoints(tmp_path, settings=changed).load(run())


def test_the_same_recipe_resumes_whatever_the_kind_of_sequence(tmp_path: Path) -> None:
    Checkpoints(tmp_path, settings={"tune.lora.targets": ("q",), "a": 1}).save(run(1))
    same = json.loads(json.dumps({"a": 1, "tune.lora.targets": ("q",)}))
    assert Checkpoints(tmp_path, settings=same).load(run()).run.number == 1


def test_a_reader_without_a_recipe_takes_any_runs_checkpoint(tmp_path: Path) -> None:
    Checkpoints(tmp_path, settings={"local.lr": 0.1}).save(run(1))
    assert Checkpoints(tmp_path).load(run()).run.number == 1


def test_a_checkpoint_without_a_recipe_is_not_resumed_under_one(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(run(1))
    with pytest.raises(ValueError, match=r"local\.lr was not set and is 0\.1"):
        Checkpoints(tmp_path, settings={"local.lr": 0.1}).load(run())


# --- crashes ------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends the process as far as the code can tell."""


def open_and_die(path: Path, mode: str, *, opener: Any = None) -> io.RawIOBase:
    """Return a file that takes 10 bytes and dies."""

    class Dying(io.FileIO):
        def write(self, data: Any) -> int:
            super().write(data[:10])
            raise Killed

    return Dying(path, mode, opener=opener)


STEPS = ["mkdir", "open", "write", "fsync", "replace", "fsync the folder", "unlink"]


def kill_at(step: str, patch: pytest.MonkeyPatch) -> None:
    """Let the process die when it comes to `step`."""
    dies = fail(Killed())
    if step == "mkdir":
        # As if the folder had gone meanwhile.
        patch.setattr(Path, "is_dir", lambda _: False)
        patch.setattr(Path, "mkdir", dies)
    elif step in ("open", "write"):
        opened = dies if step == "open" else open_and_die
        patch.setattr("fedloom.core.files.open", opened, raising=False)
    elif step == "fsync the folder":
        patch.setattr("fedloom.core.files._sync_folder", dies)
    elif step == "unlink":
        patch.setattr(Path, "unlink", dies)
    else:
        patch.setattr(os, step, dies)


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_any_step_leaves_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(run(1))
    with monkeypatch.context() as patch:
        kill_at(step, patch)
        with pytest.raises(Killed):
            checkpoints.save(run(2))
    expected = 2 if step in ("fsync the folder", "unlink") else 1
    resumed = checkpoints.load(run())
    assert resumed.run.number == expected
    assert state_sha256(resumed.run) == state_sha256(run(expected))
    assert resumed.damaged == ()
    checkpoints.save(run(2))
    assert [path.name for path in tmp_path.iterdir()] == ["round-000002.ckpt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(run(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(DiskFull, match=r"round-000002\.ckpt needs \d+ bytes and \d+ are free"):
            checkpoints.save(run(2))
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001.ckpt"]
    assert checkpoints.load(run()).run.number == 1


# --- the hash -----------------------------------------------------------------------------------


def test_the_hash_does_not_depend_on_the_order_of_insertion() -> None:
    a, b = torch.ones(2), torch.zeros(2)
    assert state_sha256({"a": a, "b": b}) == state_sha256({"b": b, "a": a})


def test_the_hash_does_not_depend_on_strides_or_sharing() -> None:
    a = torch.arange(6.0).view(2, 3)
    assert state_sha256((a, a)) == state_sha256((a.t().contiguous().t(), a.clone()))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.ones(2), torch.ones(2).int()),
        (torch.ones(4), torch.ones(2, 2)),
        (torch.ones(1), torch.ones(1).nextafter(torch.tensor(2.0))),
        (1, 1.0),
        (1, True),
        (0, None),
        ("1", 1),
        (b"x", "x"),
        ((1,), [1]),
        ((1, (2,)), ((1, 2),)),
        ({"1": 2}, {1: 2}),
        ({}, []),
        (Momentum({}, 1), {"velocity": {}, "count": 1}),
        (Momentum({}, 1), Momentum({}, 2)),
    ],
)
def test_what_differs_has_another_hash(a: Any, b: Any) -> None:
    assert state_sha256(a) != state_sha256(b)


def test_the_hash_is_the_same_on_every_machine() -> None:
    assert state_sha256(run(3))[:16] == "f20d63cb275dd91a"


def test_what_has_no_hash_is_refused() -> None:
    with pytest.raises(TypeError, match="the value is a set"):
        state_sha256({"a": {1}})
