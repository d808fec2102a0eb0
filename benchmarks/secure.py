"""What a secure sum costs: bytes of a client and seconds of everybody together, beside Flower's SecAgg+ in the same run.

    python benchmarks/secure.py

All clients and the server run one after another in this process, so that seconds are CPU seconds of all of them together on
one thread; a client's own share is given beside them. Flower's mod and workflow are driven through a grid that hands
messages over; its bytes are those of the arrays and values in them.
"""

import argparse
import copy
import logging
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}

import numpy as np
import torch

from fedloom.algorithms.fedavg import FedAvg
from fedloom.core.protocols import Reply, Round, Task
from fedloom.engines.codec import MessageCodec
from fedloom.engines.sums import Played, sums_of, words_of
from fedloom.secure.messages import Step
from fedloom.secure.settings import SecureSettings
from fedloom.wire.format import encode_reply
from fedloom.wire.wire_settings import WireSettings
from timing import write_page

SIZE = 460_800
"""Coordinates: LoRA of rank 8 on the query and value projections of a 135-million-parameter model."""
EXAMPLES = 40


def replies(number: int) -> list[Reply]:
    """Return what clients would send in the open."""
    source = torch.Generator().manual_seed(0)

    def one(client: int) -> Reply:
        delta = 0.01 * torch.randn(SIZE, generator=source)
        return Reply(f"site{client}", {"delta": {"w": delta}}, EXAMPLES, {"loss": 2.0})

    return [one(client) for client in range(number)]


def ours(sent: list[Reply], settings: SecureSettings, gone: int) -> dict[str, float]:
    """Run one sum, some clients gone before their upload and as many after it; return what it took."""
    algorithm = FedAvg()
    codec = MessageCodec(algorithm, WireSettings())
    clients = {reply.client: {"num_examples": str(EXAMPLES)} for reply in sent}
    state = algorithm.init({"w": torch.zeros(SIZE)}, 0)
    down = algorithm.broadcast(state, Round(1, 0, clients, tuple(clients), 1.0))
    tasks = [Task("train", 1, c, 7, clients[c], down[c]) for c in clients]
    (one,) = sums_of(tasks, codec.bodies(tasks), codec, settings, "benchmark")
    before = frozenset(list(clients)[:gone])
    after = frozenset(list(clients)[gone : 2 * gone])
    uploads: dict[str, int] = {}

    def heard(step: Step, client: str, data: bytes) -> None:
        if step == "upload":
            uploads[client] = len(data)

    played = Played(settings, before, after, heard)
    began = time.process_time()
    words = {
        reply.client: words_of(codec, task, reply, settings, one.heaviest)
        for task, reply in zip(tasks, sent, strict=True)
    }
    *_, last = played.deliveries([], one, words)
    seconds = time.process_time() - began
    assert isinstance(last.answer, Reply)
    kept = [reply for reply in sent if reply.client not in before]
    mean = sum(r.upload["delta"]["w"].double() for r in kept) / len(kept)
    worst = float((last.answer.upload["delta"]["w"] - mean).abs().max())
    return {
        "seconds": seconds,
        "upload": max(uploads.values()),
        "up": max(one.uploaded.values()),
        "down": max(one.downloaded.values()),
        "worst": worst,
        "bits": 8 * uploads[kept[-1].client] / SIZE,
    }


def flowers(sent: list[Reply]) -> dict[str, float]:
    """Run one sum by Flower's mod and workflow; return what it took."""
    from flwr.app import Context, Message, RecordDict
    from flwr.client.mod import secaggplus_mod
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
    from flwr.compat.common import recorddict_compat as compat
    from flwr.server.client_manager import SimpleClientManager
    from flwr.server.compat.grid_client_proxy import GridClientProxy
    from flwr.server.compat.legacy_context import LegacyContext
    from flwr.server.strategy import FedAvg as FlowerAvg
    from flwr.server.workflow import SecAggPlusWorkflow
    from flwr.supercore.task_identity import TaskIdentity

    # Of the program that Flower would start for the server.
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    logging.getLogger("flwr").setLevel(logging.ERROR)
    contexts = {n: Context(1, n, {}, RecordDict(), {}) for n in range(1, len(sent) + 1)}
    up, down = dict.fromkeys(contexts, 0), dict.fromkeys(contexts, 0)

    def trained(message: Message, context: Context) -> Message:
        own = sent[context.node_id - 1].upload["delta"]["w"].numpy()
        fitted = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([own]), EXAMPLES, {})
        return Message(compat.fitres_to_recorddict(fitted, True), reply_to=message)

    class Grid:
        def send_and_receive(self, messages: Iterable[Message], **_: Any) -> list[Message]:
            answers = []
            for message in messages:
                node = message.metadata.dst_node_id
                down[node] += size_of(message.content)
                # As if it had travelled: the mod takes out of it what it reads.
                message.content = copy.deepcopy(message.content)
                answer = secaggplus_mod(message, contexts[node], trained)
                up[node] += size_of(answer.content)
                answers.append(answer)
            return answers

    manager = SimpleClientManager()
    for node in contexts:
        proxy = GridClientProxy(node, Grid(), 1)  # type: ignore[arg-type]
        manager.register(proxy)
    strategy = FlowerAvg(
        fraction_fit=1.0, min_fit_clients=len(sent), min_available_clients=len(sent)
    )
    context = LegacyContext(
        Context(1, 0, {}, RecordDict(), {}), strategy=strategy, client_manager=manager
    )
    from flwr.app import ConfigRecord

    start = ndarrays_to_parameters([np.zeros(SIZE, np.float32)])
    context.state.array_records["parameters"] = compat.parameters_to_arrayrecord(start, True)
    context.state.config_records["config"] = ConfigRecord({"current_round": 1})
    began = time.process_time()
    SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=0.6)(Grid(), context)  # type: ignore[arg-type]
    seconds = time.process_time() - began
    found = context.state.array_records["parameters"].to_numpy_ndarrays()[0]
    mean = sum(reply.upload["delta"]["w"].double() for reply in sent) / len(sent)
    return {
        "seconds": seconds,
        "up": max(up.values()),
        "down": max(down.values()),
        "worst": float(np.abs(found - mean.numpy()).max()),
    }


def size_of(content: Any) -> int:
    """Return the bytes of the values in Flower's records."""
    arrays = [len(a.data) for r in content.array_records.values() for a in r.values()]
    values = [_bytes(v) for r in content.config_records.values() for v in r.values()]
    return sum(arrays) + sum(values)


def _bytes(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_bytes, value))
    return len(value) if isinstance(value, bytes | str) else 8


def row(name: str, clients: int, took: Mapping[str, float], plain: int) -> str:
    """Return a row of the table."""
    beside = took["up"] - took.get("upload", took["up"])
    each = took["up"] / SIZE
    cells = [
        name,
        str(clients),
        f"{took['up']:,.0f}",
        f"{each:.3f}",
        f"{beside:,.0f}" if "upload" in took else "",
        f"{took['up'] / plain:.2f}",
        f"{took['down']:,.0f}",
        f"{took['seconds']:.2f}",
        f"{took['worst']:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    rows, ten = [], replies(10)
    plain = len(encode_reply(ten[0], settings=WireSettings()))
    cases: list[tuple[str, int, Any]] = [
        ("all others, 20 bits", 10, lambda: ours(ten, SecureSettings(6), 0)),
        ("all others, 16 bits", 10, lambda: ours(ten, SecureSettings(6, bits=16), 0)),
        (
            "all others, 20 bits, one gone before and one after",
            10,
            lambda: ours(ten, SecureSettings(6), 1),
        ),
        ("6 neighbours, 20 bits", 10, lambda: ours(ten, SecureSettings(6, 6), 0)),
        ("Flower's SecAgg+", 10, lambda: flowers(ten)),
    ]
    for name, number, run in cases:
        took = min((run() for _ in range(repeats)), key=lambda found: found["seconds"])
        rows.append(row(name, number, took, plain))
    about = (
        f"{SIZE:,} coordinates of float32, which in the open take {plain:,} bytes; ten clients and the server in one process."
        " `beside` is what a client sends besides its masked upload; `bytes down` are those beside the model, which Flower's"
        " include; `CPU seconds` are those of all clients and the server together on one thread, the least of"
        f" {repeats} runs; `worst` is how far an entry of the mean is from that of the uploads in the open.\n"
    )
    text = [
        about,
        "<!-- table -->\n",
        "| masks with | clients | bytes up | a coordinate | beside | times open | bytes down | CPU seconds | worst |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    write_page(
        "secure.md",
        "Secure sums: bytes of a client, and seconds of all of them and the server",
        "\n".join(text),
        packages=["torch", "cryptography", "flwr"],
    )
    print("\n".join(text))


if __name__ == "__main__":
    main()
