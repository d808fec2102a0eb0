"""The commands for sites, as far as they go without a network."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("cryptography", reason="the extra `flower` is not installed")

from fedloom.cli import app


def said(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=True)
    return str(result.exception) if result.exception else result.output


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the keys of a server, made by its commands in an empty folder."""
    monkeypatch.chdir(tmp_path)
    assert "wrote keys" in said("keys", "init", "--host", "server.example")
    assert "hand it to alba" in said("keys", "add", "alba")
    (tmp_path / "alba.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path / "keys"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("serve", "quickstart", "--listen", "0.0.0.0:9443"), "say so with --public"),
        (("serve", "quickstart", "--listen", "9443"), "must look like HOST:PORT"),
        (("serve", "quickstart", "--keys", "none"), "`fedloom keys init` makes it"),
        (
            ("serve", "quickstart", "--listen", "other.example:9443", "--public"),
            "does not name other.example: `fedloom keys init --host other.example`",
        ),
        (("keys", "add", "alba"), "remove it to replace the key of alba"),
        (("keys", "init"), "holds keys already"),
        (("status", "nowhere"), "has no status.json"),
        (
            ("join", "a:1", "--name", "alba", "--data", "no.csv", "--keys", "k"),
            "--data no.csv does not exist",
        ),
        (
            ("join", "a:1", "--name", "alba", "--data", "alba.jsonl", "--keys", "k", "--dry-run"),
            "--dry-run needs --recipe",
        ),
        (
            ("join", "a:1", "--name", "alba", "--data", "alba.jsonl", "--keys", "k"),
            "k/node.key does not exist|k/ca.crt does not exist",
        ),
    ],
)
def test_what_cannot_be_started_says_why(keys: Path, words: tuple[str, ...], reason: str):
    found = said(*words)
    assert any(part in found for part in reason.split("|")), found
