"""What is believed of a client's word: nothing beyond what it agreed to at joining, and no update out of all proportion."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from fedloom.core.protocols import ClientFailure, ClientId, Metrics, Profile, Reply

_HEAVIEST = 1000.0
"""Times the median client's examples that one may weigh."""
_UNDECLARED = 2.0**53
"""Examples of a client whose profile does not say."""
_LOUD = 10.0
"""Times the median pull from which on a client is named for a round that went wrong."""


@dataclass
class Plausibility:
    """Replies of one round, each held against the profile of who sent it."""

    profiles: Mapping[ClientId, Profile]
    max_update_norm: float | None
    """None where something else bounds updates."""
    pulls: dict[ClientId, float] = field(default_factory=dict)
    """Weight times norm of what was believed."""

    def __post_init__(self) -> None:
        """Find what a client may weigh at most."""
        counts = [_declared(profile) for profile in self.profiles.values()]
        known = [count for count in counts if count is not None]
        self._heaviest = _HEAVIEST * max(statistics.median(known), 1.0) if known else math.inf

    def of(self, reply: Reply) -> Reply | ClientFailure:
        """Return the reply, its weight within the cap, or why it is not one."""
        if reply.count > 1:
            return self._of_sum(reply)
        declared = _declared(self.profiles.get(reply.client, {}))
        most = _UNDECLARED if declared is None else max(declared, 1.0)
        weight = reply.weight
        # Compared as it is: a whole number may be too large for a float.
        if type(weight) not in (int, float) or not 0 <= weight <= most:
            whose = "examples there may be" if declared is None else "examples it declared"
            reason = f"its weight must be a number from 0 to the {most:g} {whose}"
            return ClientFailure(reply.client, f"{reason}, got {ascii(weight)[:40]}")
        size = _norm(reply)
        if why := self._too_large(reply, size):
            return ClientFailure(reply.client, f"its update has norm {why}")
        if weight > self._heaviest:
            weight, reply = self._heaviest, replace(reply, weight=self._heaviest)
        self.pulls[reply.client] = weight * size
        return reply

    def _of_sum(self, reply: Reply) -> Reply | ClientFailure:
        """Return a sum's mean: what single weights may be is the engine's to see to, who weighs what is not known."""
        size = _norm(reply)
        if why := self._too_large(reply, size):
            return ClientFailure(reply.client, f"the mean of {reply.count} updates has norm {why}")
        self.pulls[f"a sum of {reply.count} clients"] = reply.weight * size
        return reply

    def _too_large(self, reply: Reply, size: float) -> str:
        bound = self.max_update_norm
        if bound is None or "delta" not in reply.upload or size <= bound:
            return ""
        return f"{size:.3g}, above run.max_update_norm ({bound:g})"

    def suspects(self) -> list[ClientId]:
        """Return who pulled much harder than most, the hardest first; at least one where anybody replied."""
        ordered = sorted(self.pulls, key=lambda client: (-self.pulls[client], client))
        usual = statistics.median(self.pulls.values()) if ordered else 0.0
        return [c for c in ordered if self.pulls[c] > _LOUD * usual] or ordered[:1]


def implausible_evaluation(
    metrics: Metrics, *, held_out: int, usual: float, most_tokens: int
) -> str | None:
    """Say what is wrong with the counts an evaluation is weighed by; None where they fit what the client declared.

    Args:
        metrics: As reported.
        held_out: The client's declared examples.
        usual: Those of the median client.
        most_tokens: Of one example.
    """
    examples, tokens = metrics.get("num_examples", 0.0), metrics.get("num_tokens", 0.0)
    if not 0 <= examples <= held_out:
        return f"it says it was measured on {examples:g} examples, but declared {held_out}"
    if examples > _HEAVIEST * max(usual, 1.0):
        return f"it would weigh {examples:g} examples, more than {_HEAVIEST:g} times the median client's"
    # Each example of at most as many tokens as a client's data may have.
    if not 0 <= tokens <= examples * most_tokens:
        return (
            f"it says it was measured on {tokens:g} tokens, but {examples:g} examples hold at most"
            f" {examples * most_tokens:g}"
        )
    return None


def _declared(profile: Profile) -> float | None:
    text = profile.get("num_examples", "")
    return float(text) if text.isdecimal() and len(text) < 16 else None


def _norm(reply: Reply) -> float:
    """Return the norm of the delta, else of all that is sent."""
    groups = [reply.upload["delta"]] if "delta" in reply.upload else reply.upload.values()
    tensors = [t for group in groups for t in group.values() if t.is_floating_point()]
    sizes = [float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in tensors]
    return math.hypot(*sizes)
