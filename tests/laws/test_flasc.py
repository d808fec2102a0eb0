"""FLASC at density 1 is FedAdam to the bit, on real trainers; so are the baselines in their degenerate cases."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.flasc import Flasc
from fedloom.algorithms.prune import Prune
from fedloom.algorithms.scaffold import Scaffold
from fedloom.client.setup import batches
from fedloom.core.protocols import Reply, Task
from fedloom.core.randomness import derive
from fedloom.core.sparsity import Density
from fedloom.data.tokens import IGNORED
from fedloom.engines import codec
from fedloom.engines.inprocess import InProcess
from fedloom.rounds.checkpoint import state_sha256
from fedloom.server.optimizers import Adam
from fedloom.server.samplers import Uniform
from fedloom.wire.wire_settings import WireSettings

DENSE = Density(1.0)
FEDADAM = FedAvg(Adam(0.05), weighting="uniform")


def reference(bench: Any, rounds: int, lr: float) -> Mapping[str, torch.Tensor]:
    """FedAdam on LoRA as a plain loop over a PEFT model; it shares the seeds and the data only."""
    model, shards = bench.space.model, bench.federation.shards
    tuned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    w = {n: p.detach().clone() for n, p in tuned.items()}
    m = {n: torch.zeros_like(p) for n, p in w.items()}
    v = {n: torch.full_like(p, 1e-3**2) for n, p in w.items()}
    for number in range(1, rounds + 1):
        seed = derive(5, "round", number)
        cohort = Uniform(5).draw({c: {} for c in shards}, seed)
        mean = {n: torch.zeros_like(p) for n, p in w.items()}
        for client in cohort:
            for n, p in tuned.items():
                p.data.copy_(w[n])
            examples = shards[client].train
            stream = batches(examples, 4, derive(derive(seed, client), 0))
            optimizer = torch.optim.SGD(tuned.values(), lr=lr)
            for _ in range(-(-len(examples) // 4)):
                rows = next(stream)
                ids = torch.nn.utils.rnn.pad_sequence([r.ids for r in rows], batch_first=True)
                labels = torch.full_like(ids, IGNORED)
                for row, example in zip(labels, rows, strict=True):
                    row[: len(example.ids) - 1] = example.labels[1:]
                logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
                loss = F.cross_entropy(logits, labels.flatten(), reduction="sum")
                optimizer.zero_grad()
                (loss * (1 / sum(int((r.labels[1:] != IGNORED).sum()) for r in rows))).backward()
                optimizer.step()
            for n, p in tuned.items():
                mean[n] += p.detach() - w[n]
        for n in w:
            delta = mean[n] * (1 / len(cohort))
            m[n] = 0.9 * m[n] + (1 - 0.9) * delta
            v[n] = 0.99 * v[n] + (1 - 0.99) * delta * delta
            w[n] = w[n] + 0.05 * m[n] / (v[n].sqrt() + 1e-3)
    return w


def test_five_rounds_at_density_one_are_a_plain_fedadam_loop_to_the_bit(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    """Check a."""
    ours, theirs = (
        bench(tune={"origin": "zero"}, kernels="reference", max_grad_norm=None) for _ in range(2)
    )
    end = ours.final(Flasc(FEDADAM, DENSE, DENSE), tmp_path, 5).state.params
    expected = reference(theirs, 5, lr=0.5)
    assert len(end) == len(expected)
    for name, tensor in end.items():
        (known,) = [
            t for n, t in expected.items() if n.replace(".default", "") == name or n == name
        ]
        assert torch.equal(tensor, known), name
    moved = max(float(t.abs().max()) for n, t in end.items() if "lora_B" in n)
    assert moved > 1e-2


@pytest.mark.parametrize("inner", [FEDADAM, Scaffold()], ids=["fedadam", "scaffold"])
def test_at_density_one_both_are_their_inner_to_the_bit(
    inner: Any, bench: Callable[..., Any], tmp_path: Path
) -> None:
    it = bench()
    plain = state_sha256(it.final(inner, tmp_path / "plain", 3).state)
    for number, algorithm in enumerate(
        (
            Flasc(inner, DENSE, DENSE),
            Flasc(inner, DENSE, DENSE, error_feedback=True),
            Flasc(inner, Density(0.5, tiers={"phone": 1.0, "desk": 1.0}), DENSE, scope="tensor"),
        )
    ):
        assert state_sha256(it.final(algorithm, tmp_path / f"{number}", 3).state) == plain
    pruned = it.final(Prune(inner, DENSE), tmp_path / "pruned", 3).state
    assert state_sha256(pruned.inner) == plain
    assert not pruned.mask


@pytest.mark.parametrize(
    "wire",
    [WireSettings(), WireSettings(download="int8", upload="int4", compression="zstd")],
    ids=["exact", "lossy"],
)
def test_counted_bytes_are_those_of_the_encoded_messages(
    wire: WireSettings, bench: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: dict[str, list[int]] = {"download": [], "upload": []}
    counted, sent = codec.MessageCodec.num_bytes, codec.MessageCodec.send

    def length_of(self: codec.MessageCodec, task: Task, body: bytes) -> int:
        lengths["download"].append(len(self.message(task, body)))
        return counted(self, task, body)

    def length_sent(self: codec.MessageCodec, reply: Reply) -> bytes:
        message = sent(self, reply)
        lengths["upload"].append(len(message))
        return message

    monkeypatch.setattr(codec.MessageCodec, "num_bytes", length_of)
    monkeypatch.setattr(codec.MessageCodec, "send", length_sent)
    it = bench()
    algorithm = Flasc(FEDADAM, Density(0.25), Density(0.0625), error_feedback=True)
    engine = it.engine(InProcess, algorithm, tmp_path, wire=wire)
    _, said = it.rounds(algorithm, engine, 3)
    for direction, each in lengths.items():
        assert len(each) == 15
        assert sum(metrics[f"comm/{direction}_bytes"] for metrics, _ in said) == sum(each)


def test_sparse_links_carry_fewer_bytes(bench: Callable[..., Any], tmp_path: Path) -> None:
    it = bench(tune={"rank": 16})
    total = {}
    for density in (1.0, 0.25, 0.0625):
        algorithm = Flasc(FEDADAM, Density(density), Density(density))
        engine = it.engine(InProcess, algorithm, tmp_path / str(density))
        _, said = it.rounds(algorithm, engine, 2)
        total[density] = sum(m["comm/download_bytes"] + m["comm/upload_bytes"] for m, _ in said)
    assert total[0.25] < 0.4 * total[1.0]
    assert total[0.0625] < 0.2 * total[1.0]
