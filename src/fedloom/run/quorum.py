"""Whether as many clients can reply as the way of combining them needs."""

from typing import Any

from fedloom.run.parts import parts_of
from fedloom.server.combine import COMBINES, Combine
from fedloom.server.samplers import Fixed, Poisson, Sampler, Uniform, Weighted


def check_quorum(algorithm: Any, cohort: Sampler, num_clients: int | None) -> None:
    """Refuse a rule that would never have enough replies.

    Args:
        algorithm: Holds the rule, however deep.
        cohort: Says how many are asked.
        num_clients: How many there are; None where that is not known yet.

    Raises:
        ValueError: where the largest cohort is smaller than the rule's least.
    """
    most = _largest(cohort, num_clients)
    for part in _rules(algorithm):
        if most is not None and part.least > most:
            raise ValueError(
                f"combine: {part.rule} needs at least {part.least} replies a round, got a cohort of at most {most}:"
                " ask more clients, expect fewer attackers, or take another rule"
            )


def quorum_of(algorithm: Any) -> int:
    """Return the replies without which a round of the algorithm changes nothing."""
    return max((rule.least for rule in _rules(algorithm)), default=1)


def _rules(algorithm: Any) -> list[Combine]:
    return [part for part in parts_of(algorithm) if type(part) in COMBINES.values()]


def _largest(cohort: Sampler, num_clients: int | None) -> int | None:
    match cohort:
        case Uniform(size=size) | Weighted(size=size):
            return size
        case Fixed(clients=clients):
            return len(clients)
        case _ if num_clients is None or isinstance(cohort, Poisson):
            return num_clients
    return round(cohort.rate(num_clients) * num_clients)
