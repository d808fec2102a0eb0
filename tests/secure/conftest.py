"""Parties of one sum, and a server between them that may lie."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest

from fedloom.core.protocols import ClientError
from fedloom.secure.ciphers import Directory, Signer
from fedloom.secure.client import Party
from fedloom.secure.fixed_point import Words
from fedloom.secure.messages import Step
from fedloom.secure.server import SumServer
from fedloom.secure.settings import SecureSettings
from fedloom.secure.terms import Terms

Meddle = Callable[[Step, str, bytes], bytes | str]
NAMES = ("alba", "brno", "cork", "daru", "esch")
SIZE = 600
TASK = "ab" * 32
_SIGNERS: dict[str, Signer] = {}


def signer(name: str) -> Signer:
    """Return the key of a name, made once."""
    return _SIGNERS.setdefault(name, Signer.fresh())


@dataclass
class Table:
    """Everybody in one room."""

    settings: SecureSettings = SecureSettings(3)
    names: tuple[str, ...] = NAMES
    least: int = 0
    gone: Mapping[str, Step] = field(default_factory=dict)
    """From which step on somebody does not answer."""
    meddle: Meddle = lambda step, name, data: data
    """What the server sends in the place of each message, or the answer it does not send one for."""
    received: list[tuple[Step, str, bytes]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    terms: Terms = Terms("run", 3, "0" * 32, TASK, 1.0)

    def __post_init__(self) -> None:
        self.directory = Directory({name: signer(name).public for name in self.names})
        self.parties = {
            name: Party(name, self.settings, signer(name), self.directory, "run", self.least)
            for name in self.names
        }
        source = np.random.default_rng(len(self.names))
        top = 1 << self.settings.bits
        self.vectors = {
            name: source.integers(-top, top + 1, SIZE).astype(np.uint32) for name in self.names
        }
        self.server = SumServer(self.terms, self.settings, SIZE, self.directory)

    def run(self) -> Words:
        return self.server.run(self.names, self.exchange)

    def exchange(self, step: Step, messages: Mapping[str, bytes]) -> dict[str, bytes | str]:
        return {name: self.said(step, name, data) for name, data in messages.items()}

    def said(self, step: Step, name: str, data: bytes) -> bytes | str:
        order = ("advertise", "share", "upload", "consent", "reveal")
        if name in self.gone and order.index(step) >= order.index(self.gone[name]):
            return "gone"
        sent = self.meddle(step, name, data)
        if isinstance(sent, str):
            return sent
        try:
            answer = self.parties[name].answer(step, sent, lambda _: self.vectors[name])
        except ClientError as refusal:
            self.refused[name] = str(refusal)
            return str(refusal)
        self.received.append((step, name, answer))
        return answer

    def sum_of(self, *names: str) -> Words:
        """Return what these add up to, modulo 2^R."""
        whole: Words = np.stack([self.vectors[name] for name in names]).sum(axis=0, dtype=np.uint32)
        return self.low(whole)

    def low(self, words: Words) -> Words:
        return words & np.uint32((1 << self.server.number_bits) - 1)


@pytest.fixture
def table() -> type[Table]:
    """Return the maker of tables."""
    return Table
