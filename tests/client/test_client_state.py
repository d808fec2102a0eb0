"""What clients keep."""

import os
from pathlib import Path

import pytest
import torch

from fedloom.client.client_state import ClientStateStore
from fedloom.core.protocols import ClientError, Payload


def client_state(value: float) -> Payload:
    """Return a client_state that can be told from others."""
    return {"control": {"w": torch.full((3, 2), value), "n": torch.tensor(int(value))}}


def value(payload: Payload) -> float:
    """Return what `client_state` was given."""
    return float(payload["control"]["w"][0, 0])


@pytest.fixture
def store(tmp_path: Path) -> ClientStateStore:
    """Return a store whose folder does not exist yet."""
    return ClientStateStore(tmp_path / "client_state")


def test_a_new_client_remembers_nothing(store: ClientStateStore) -> None:
    assert store.load("c", before=5) == {}
    store.prune(below=3)
    store.rewind(to=3)
    assert not store.folder.exists()


def test_memory_comes_back_bit_for_bit(store: ClientStateStore) -> None:
    odd = {"a": {"x": torch.tensor([float("nan"), -0.0, 1e-45]), "half": torch.ones(0).half()}}
    store.save("c", 1, odd)
    back = store.load("c", before=2)
    assert back["a"]["half"].dtype == torch.float16
    assert torch.equal(back["a"]["x"].view(torch.int32), odd["a"]["x"].view(torch.int32))


def test_a_server_that_went_back_is_not_given_what_came_of_the_course_that_it_left(
    store: ClientStateStore,
) -> None:
    """Elsewhere nobody rewinds: the next round that a client is asked for may be another than before."""
    for number in (1, 2, 4):
        store.save("c", number, client_state(number))
    store.save("c", 2, client_state(20))
    assert value(store.load("c", before=2)) == 1
    assert value(store.load("c", before=6)) == 20


def test_memory_of_any_types_shapes_and_zeros_comes_back_in_its_order(
    store: ClientStateStore,
) -> None:
    kept: Payload = {
        "mask": {"b": torch.tensor([True, False] * 40), "none": torch.zeros(9, dtype=torch.bool)},
        "state": {
            "zero": torch.zeros(100),
            "few": torch.eye(20).bfloat16(),
            "turned": torch.arange(12.0).reshape(3, 4).t(),
            "scalar": torch.tensor(3),
            "grad": torch.ones(16, requires_grad=True),
            "last": torch.ones(4, 16, dtype=torch.float64),
        },
        "empty": {},
    }
    store.save("c", 1, kept)
    back = store.load("c", before=2)
    assert [(group, list(params)) for group, params in back.items()] == [
        (group, list(params)) for group, params in kept.items()
    ]
    for group, params in kept.items():
        for name, tensor in params.items():
            assert back[group][name].dtype == tensor.dtype
            assert torch.equal(back[group][name], tensor.detach())


def test_a_memory_file_cut_or_flipped_anywhere_is_noticed(store: ClientStateStore) -> None:
    store.save("c", 1, client_state(1))
    path = store.folder / "c" / "1"
    whole = path.read_bytes()
    for at in range(len(whole)):
        flipped = whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
        for damaged in (whole[:at], flipped):
            path.write_bytes(damaged)
            with pytest.raises(
                ClientError, match=r"the client state of c cannot be read from .*c/1: the "
            ):
                store.load("c", before=2)


def test_a_task_finds_the_newest_memory_older_than_its_round(store: ClientStateStore) -> None:
    for number in (2, 9, 10):
        store.save("c", number, client_state(number))
    assert store.load("c", before=2) == {}
    assert [value(store.load("c", before=n)) for n in (3, 9, 10, 11, 99)] == [2, 2, 9, 10, 10]


def test_a_repeated_task_finds_what_it_found_before(store: ClientStateStore) -> None:
    store.save("c", 1, client_state(1))
    for _ in range(3):
        assert value(store.load("c", before=2)) == 1
        store.save("c", 2, client_state(2))
    assert value(store.load("c", before=3)) == 2


def test_nothing_is_written_for_a_client_without_memory(store: ClientStateStore) -> None:
    store.save("c", 1, {})
    assert not store.folder.exists()


def test_memory_can_be_emptied(store: ClientStateStore) -> None:
    store.save("c", 1, client_state(1))
    store.save("c", 2, {})
    assert store.load("c", before=3) == {}
    assert value(store.load("c", before=2)) == 1


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:50] + b"x" + b[51:], lambda b: b""]
)
def test_damaged_memory_is_refused_instead_of_an_older_one(
    store: ClientStateStore, damage: object
) -> None:
    store.save("c", 1, client_state(1))
    store.save("c", 2, client_state(2))
    path = store.folder / "c" / "2"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ClientError, match=r"the client state of c cannot be read from .*c/2: the "):
        store.load("c", before=3)
    assert value(store.load("c", before=2)) == 1


def test_memory_of_another_client_or_round_is_refused(store: ClientStateStore) -> None:
    store.save("a", 1, client_state(1))
    store.save("b", 2, client_state(2))
    os.replace(store.folder / "b" / "2", store.folder / "a" / "2")
    with pytest.raises(
        ClientError, match=r"a/2 is not the client state of a: it says .*'client': 'b'"
    ):
        store.load("a", before=3)
    os.replace(store.folder / "a" / "1", store.folder / "a" / "2")
    with pytest.raises(ClientError, match=r"it says .*'round': 1"):
        store.load("a", before=3)


@pytest.mark.parametrize("below", range(8))
def test_pruning_keeps_all_that_a_later_task_may_ask_for(
    store: ClientStateStore, below: int
) -> None:
    for number in (1, 2, 4, 6):
        store.save("c", number, client_state(number))
        store.save("d", number, client_state(10 * number))
    asked = {n: store.load("c", before=n) for n in range(below, 9)}
    store.prune(below)
    for before, found in asked.items():
        again = store.load("c", before)
        assert again.keys() == found.keys()
        assert not found or value(again) == value(found)
    assert sum(int(path.name) < below for path in (store.folder / "d").iterdir()) <= 1


def test_rewinding_drops_what_another_course_left(store: ClientStateStore) -> None:
    for number in (1, 3, 4):
        store.save("c", number, client_state(number))
    store.rewind(to=3)
    assert value(store.load("c", before=99)) == 3


def test_a_killed_write_is_ignored_and_pruned(store: ClientStateStore) -> None:
    store.save("c", 1, client_state(1))
    leftover = store.folder / "c" / "2.part"
    leftover.write_bytes(b"half")
    assert value(store.load("c", before=9)) == 1
    store.prune(below=2)
    assert not leftover.exists()


def test_any_client_name_is_a_safe_file_name_of_its_own(store: ClientStateStore) -> None:
    names = [
        "client-000",
        "A",
        "a",
        "..",
        ".",
        "",
        "a/b",
        "a_b",
        "/etc",
        "Å",
        "å",
        "x" * 300,
        "x" * 301,
        "a\0b",
        "\ud800",
    ]
    for number, name in enumerate(names):
        store.save(name, 1, client_state(number))
    assert [value(store.load(name, before=2)) for name in names] == list(range(len(names)))
    folders = os.listdir(store.folder)
    assert len({folder.lower() for folder in folders}) == len(names)
    assert all(len(folder) < 80 and folder.isascii() for folder in folders)
    assert "client-000" in folders
    assert os.listdir(store.folder.parent) == ["client_state"]


def test_what_was_kept_is_known_and_its_loss_is_noticed(store: ClientStateStore) -> None:
    assert store.latest_rounds(before=9) == {}
    for client in ("a", "B/b"):
        for number in (1, 3):
            store.save(client, number, client_state(number))
    kept = store.latest_rounds(before=3)
    assert sorted(kept.values()) == [1, 1]
    store.check(kept)
    store.check(store.latest_rounds(before=9))
    (store.folder / "a" / "1").unlink()
    store.check(store.latest_rounds(before=9))
    with pytest.raises(
        ClientError, match=r"the client state of a after round 1 is missing from .*client_state$"
    ):
        store.check(kept)


def test_kept_memory_is_read_when_it_is_checked(store: ClientStateStore) -> None:
    store.save("a", 1, client_state(1))
    store.save("b", 1, client_state(2))
    kept = store.latest_rounds(before=2)
    whole = (store.folder / "a" / "1").read_bytes()
    (store.folder / "a" / "1").write_bytes(whole[:-1])
    with pytest.raises(ClientError, match=r"the client state of a cannot be read from .*a/1: "):
        store.check(kept)
    (store.folder / "a" / "1").write_bytes((store.folder / "b" / "1").read_bytes())
    with pytest.raises(ClientError, match=r"a/1 is not the client state of a: it says .*'b'"):
        store.check(kept)


def test_foreign_files_are_left_alone(store: ClientStateStore) -> None:
    store.save("a", 2, client_state(2))
    foreign = [store.folder / "notes.txt", store.folder / "a" / "007", store.folder / "a" / "x"]
    for path in foreign:
        path.write_text("x")
    (store.folder / "a" / "1").mkdir()
    assert store.latest_rounds(before=9) == {"a": 2}
    store.prune(below=9)
    store.rewind(to=0)
    assert all(path.exists() for path in foreign)
    assert store.load("a", before=9) == {}


def test_what_was_saved_is_on_the_disk_after_one_flush_for_all(
    store: ClientStateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "sync", lambda: synced.append("all"))
    monkeypatch.setattr(os, "fsync", lambda _: synced.append("one"))
    store.flush()
    for client in ("a", "b", "c"):
        store.save(client, 1, client_state(1))
    assert synced == []
    store.flush()
    store.flush()
    assert synced == ["all"]
