"""What pooling costs the server in a round: 100 clients in 8 clusters, two million coordinates, training left out.

    python benchmarks/pooling_cost.py [--clients 100] [--clusters 8] [--rounds 5]

Replies are messages that were made beforehand, of LoRA tensors with noise around a mean of their cluster. A server's round
is all that it does itself: what is sent is encoded, every message read and checked, the models updated. Clusters apart and
pooled ones take turns on the same messages, CPU time on one thread. What clients do is in neither: it is measured beside them, as the least that a client can do, a
single step on 64 tokens.
"""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1"}

import torch

from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.fedavg import FedAvg
from fedloom.clustering.given import Given
from fedloom.clustering.sharing import Sharing
from fedloom.core.protocols import ClientId, Delivery, Params, Profile, Reply, Task
from fedloom.engines.codec import MessageCodec
from fedloom.rounds.loop import Run, advance, begin, draw, tasks
from fedloom.server.samplers import Full
from fedloom.wire.wire_settings import WireSettings
from scenery import random_llama
from timing import Timing, paired, write_page

TOKENS = 64
LAYERS, WIDTH, NARROW, RANK = 30, 576, 192, 18
"""SmolLM2's attention, with LoRA on its four projections."""
APART, POOLED = "clusters apart", "pooled clusters"


def start() -> dict[str, torch.Tensor]:
    """Return LoRA's tensors."""
    shapes = {}
    for at in range(LAYERS):
        for name, out in (("q", WIDTH), ("k", NARROW), ("v", NARROW), ("o", WIDTH)):
            stem = f"model.layers.{at}.self_attn.{name}_proj"
            shapes[f"{stem}.lora_A.weight"] = (RANK, WIDTH)
            shapes[f"{stem}.lora_B.weight"] = (out, RANK)
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


@dataclass
class Mailbox:
    """An engine whose clients answered long ago."""

    codec: MessageCodec
    profiles: Mapping[ClientId, Profile]
    messages: Mapping[ClientId, bytes]

    def population(self) -> Mapping[ClientId, Profile]:
        """Return everybody."""
        return self.profiles

    def run(self, tasks: Sequence[Task]) -> Iterator[Delivery]:
        """Encode every task, and read the reply that lies there."""
        bodies = self.codec.bodies(tasks)
        for task in tasks:
            size = len(self.codec.message(task, bodies[id(task.download)]))
            yield self.codec.receive(task, self.messages[task.client], download_bytes=size)


@dataclass
class Course:
    """One way of sharing, a round at a time."""

    algorithm: Any
    engine: Mailbox
    run: Run[Any]
    bytes_sent: set[tuple[float, float]] = field(default_factory=set)

    def round(self) -> None:
        """Take the next round."""
        self.run, line, failures = advance(
            self.run, self.algorithm, self.engine, population=self.engine.profiles, sampler=Full()
        )
        assert not failures
        self.bytes_sent.add((line["comm/upload_bytes"], line["comm/download_bytes"]))


def profiles_of(asked: argparse.Namespace) -> dict[ClientId, Profile]:
    """Return clients dealt out to groups, each with a declared number of examples."""
    return {
        f"client-{i:03d}": {"group": f"group-{i % asked.clusters}", "num_examples": str(10 + i % 7)}
        for i in range(asked.clients)
    }


def messages_of(profiles: Mapping[ClientId, Profile], codec: MessageCodec) -> dict[ClientId, bytes]:
    """Return the reply of each client: its group's way, and as much noise as makes lambda a half."""
    made, source = {}, torch.Generator().manual_seed(0)
    ways: dict[str, Params] = {}
    for client, profile in profiles.items():
        group = profile["group"]
        if group not in ways:
            ways[group] = _noise(1e-3, source)
        own = _noise(4e-3, source)
        delta = {name: t + ways[group][name] for name, t in own.items()}
        reply = Reply(client, {"delta": delta}, float(profile["num_examples"]), {"loss": 1.0})
        made[client] = codec.send(reply)
    return made


def _noise(size: float, source: torch.Generator) -> Params:
    return {n: size * torch.randn(t.shape, generator=source) for n, t in start().items()}


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--clusters", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    profiles, origin = profiles_of(asked), start()
    courses = {}
    messages = messages_of(profiles, MessageCodec(FedAvg(), WireSettings()))
    for name, share in ((APART, Sharing(pool="off")), (POOLED, Sharing(pool="on"))):
        algorithm: Any = Clustered(FedAvg(), Given("group"), share)
        engine = Mailbox(MessageCodec(algorithm, WireSettings()), profiles, messages)
        courses[name] = Course(algorithm, engine, begin(algorithm, origin, 0))
    whole = paired({name: course.round for name, course in courses.items()}, turns=asked.rounds)
    updates = paired(
        {name: _updating(course) for name, course in courses.items()}, turns=asked.rounds
    )
    step = paired({"step": training_step()}, turns=asked.rounds)["step"].median
    same = {frozenset(course.bytes_sent) for course in courses.values()}
    numel = sum(t.numel() for t in origin.values())
    write_page(
        "pooling_cost.md",
        "What pooling costs the server",
        _page(asked, numel, whole, updates, step, alike=len(same) == 1),
    )


def training_step() -> Callable[[], None]:
    """Return one forward and backward pass through a frozen model of that size, without the adapters' own products."""
    model = random_llama(WIDTH, LAYERS)
    tokens = torch.arange(TOKENS)[None] + 3

    def step() -> None:
        embedded = model.get_input_embeddings()(tokens).requires_grad_()
        model(inputs_embeds=embedded, labels=tokens).loss.backward()

    return step


def _updating(course: Course) -> Any:
    """Return the update of the models alone, on replies that are read already."""
    round = draw(course.run, course.engine.profiles, Full())
    sent = course.algorithm.broadcast(course.run.state, round)
    replies = [d.answer for d in course.engine.run(tasks("train", round, sent))]
    return lambda: course.algorithm.server_update(course.run.state, round, iter(replies))


def _page(
    asked: argparse.Namespace,
    numel: int,
    whole: Mapping[str, Timing],
    updates: Mapping[str, Timing],
    step: float,
    *,
    alike: bool,
) -> str:
    rows = [
        f"| {what} | {times[APART].median:.2f} s | {times[POOLED].median:.2f} s | {times[APART].ratio(times[POOLED]):.3f} |"
        for what, times in (("a server's whole round", whole), ("the update alone", updates))
    ]
    table = "\n".join(
        ["| CPU time of | clusters apart | pooled | ratio |", "|---|---:|---:|---:|", *rows]
    )
    bytes_said = "the same, to the byte" if alike else "NOT the same"
    more = whole[POOLED].median - whole[APART].median
    trained = asked.clients * step
    part = more / (whole[APART].median + trained)
    return (
        f"{asked.clients} clients in {asked.clusters} clusters, {numel:,} coordinates in {len(start())} tensors; medians of"
        f" {asked.rounds} rounds that take turns, without training. Bytes up and down are {bytes_said}.\n\n{table}\n\nThat is"
        f" {more:.2f} s more a round: 5 % or less wherever a round takes at least {more / 0.05:.1f} s of CPU time in all, the"
        f" clients' training with it. One forward and backward pass of {TOKENS} tokens through a model of this size takes"
        f" {step:.2f} s: with a single such step of every client, {trained:.0f} s of training, pooling is {100 * part:.2f} % of the round."
    )


if __name__ == "__main__":
    main()
