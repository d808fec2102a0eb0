"""An evaluation that claims too much is left out of the means, with a word, in a whole run."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fedloom import experiment
from fedloom.core.protocols import Reply
from fedloom.engines.codec import MessageCodec
from fedloom.rounds.recipe_settings import Recipe


def test_a_client_that_claims_a_million_examples_is_left_out_of_the_means(
    small_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = MessageCodec.send

    def send(self: MessageCodec, reply: Reply) -> bytes:
        if reply.client.endswith("2") and "loss" in reply.metrics and not reply.upload:
            reply = replace(reply, metrics={**reply.metrics, "num_examples": 1e6, "loss": 0.0})
        return honest(self, reply)

    monkeypatch.setattr(MessageCodec, "send", send)
    said = io.StringIO()
    experiment.run(small_recipe(run={"rounds": 1}), tmp_path, console=Console(file=said, width=200))
    rows = [json.loads(line) for line in (tmp_path / "clients.jsonl").read_text().splitlines()]
    assert not any(row["client"].endswith("2") for row in rows)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["test/loss"] > 1
    assert "is left out: it says it was measured on 1e+06 examples, but declared" in said.getvalue()
