"""The two halves that Flower runs: envelopes in its messages, in pieces of bounded size, and no code from elsewhere."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed")

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.supernode.runtime import run_clientapp

from fedloom.engines.flower import app, node


def test_a_letter_survives_a_message_in_pieces_of_bounded_size(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app, "CHUNK", 10)
    pieces = [b"", b"x" * 10, b"y" * 25, bytes(3)]
    content = app._packed({"kind": "work", "tasks": [[0, 1]]}, pieces)
    chunks = content["chunks"]
    assert isinstance(chunks, ArrayRecord)
    assert max(len(chunk.data) for chunk in chunks.values()) == 10
    assert app._opened(content) == ({"kind": "work", "tasks": [[0, 1]]}, pieces)


def test_a_chunk_that_is_cut_is_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app, "CHUNK", 10)
    content = app._packed({}, [b"y" * 25])
    chunks: Any = content["chunks"]
    name = sorted(chunks)[0]
    chunks[name] = Array("uint8", (1,), "fedloom.chunk/1", b"y")
    with pytest.raises(ValueError, match="piece 0 of an envelope has 16 bytes, not 25"):
        app._opened(content)


class Pulled:
    """A Grid that holds these messages."""

    def __init__(self, *contents: Any) -> None:
        self.messages = [
            SimpleNamespace(
                metadata=SimpleNamespace(reply_to_message_id=str(at)),
                content=content,
                has_error=lambda: False,
            )
            for at, content in enumerate(contents)
        ]

    def pull_messages(self, ids: Any) -> Any:
        return self.messages


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        RecordDict({"envelope": ConfigRecord({"text": "{"})}),
        RecordDict({"envelope": ConfigRecord({"text": '{"header": 5, "sizes": []}'})}),
        RecordDict({"envelope": ConfigRecord({"text": '{"header": {}, "sizes": [1e9]}'})}),
        RecordDict(
            {
                "envelope": ConfigRecord({"text": f'{{"header": {{}}, "sizes": [{10**15}]}}'}),
                "chunks": ArrayRecord({}),
            }
        ),
        RecordDict({"envelope": ConfigRecord({"text": "[" * 100_000})}),
    ],
)
def test_one_sites_malformed_answer_is_its_own_refusal_and_nobody_elses(content: Any):
    good = app._packed({"answers": [None]}, [b"reply"])
    grid: Any = Pulled(good, content, good)
    said, pieces = app._pull(grid, ["1", "2", "3"])
    first, odd, last = said["answers"]
    assert first["header"] == last["header"] == {"answers": [None]}
    assert pieces == [b"reply", b"reply"]
    assert odd["header"]["refusal"].startswith("its answer is no envelope of fedloom's: ")
    assert odd["pieces"] == 0


def test_what_is_put_in_place_at_a_site_is_there_in_this_version_of_flower():
    assert set(node.PRIVATE) <= vars(run_clientapp).keys()


def test_code_that_a_server_sends_is_neither_installed_nor_loaded():
    node._nothing(b"an app", skip_prompt=True)
    load = node._loader(default_app_ref="", app_path=None, multi_app=True)
    assert load("evil/app", "1.0", "hash") is app.client_app


def test_a_flower_without_those_names_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(node, "PRIVATE", ("no_such_name",))
    with pytest.raises(ImportError, match="this version of flwr has no no_such_name"):
        node.main()
