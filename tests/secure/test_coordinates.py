"""Replies as coordinates: what their sum says is their weighted mean."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.core.metrics import METRICS, Reduction
from fedloom.core.payloads import mean_upload
from fedloom.core.protocols import ClientError, Reply
from fedloom.core.schema import schema
from fedloom.secure.coordinates import Layout
from fedloom.secure.fixed_point import width

BITS = 20


def replies() -> list[Reply]:
    source = torch.Generator().manual_seed(0)

    def one(client: str, weight: float, loss: float) -> Reply:
        upload = {
            "delta": {"w": torch.randn(6, 5, generator=source).clamp(-3, 3)},
            "control": {"w": torch.randn(4, generator=source, dtype=torch.float64) / 9},
        }
        told = {
            "loss": loss,
            "num_tokens": 3 * weight,
            "num_examples": weight,
            "skipped_steps": 1.0,
        }
        return Reply(client, upload, weight, told)

    return [one("alba", 7.0, 2.5), one("brno", 40.0, 1.25), one("cork", 13.0, 3.0)]


def layout(sent: Sequence[Reply], **changed: Any) -> Layout:
    given = {"support": {}, "metrics": METRICS, "bits": BITS, "clip": 4.0, "heaviest": 40.0}
    return Layout(schema(sent[0].upload), **{**given, **changed})


def summed(sent: Sequence[Reply], it: Layout, *, towards_zero: bool = False) -> tuple[Reply, int]:
    total = np.zeros(it.size, np.uint32)
    for at, reply in enumerate(sent):
        total += it.coordinates(reply, seed=at, towards_zero=towards_zero)
    return it.read(total, width(len(sent), it.bits), client="alba", count=len(sent))


def test_a_sum_says_the_weighted_mean_and_what_metrics_come_to():
    sent = replies()
    found, num_cut = summed(sent, layout(sent))
    mean, step = mean_upload(sent), 4.0 * 2.0**-BITS
    for group, params in mean.items():
        for name, tensor in params.items():
            got = found.upload[group][name]
            assert (got.shape, got.dtype) == (tensor.shape, sent[0].upload[group][name].dtype)
            assert float((got - tensor).abs().max()) <= 3 * step * 40 / 60
    assert (found.client, found.weight, found.count, num_cut) == ("alba", 60.0, 3, 0)
    together = Reduction()
    for reply in sent:
        together.add(reply.metrics)
    assert found.metrics == pytest.approx(together.result())
    # What is made of it further on is the same again.
    again = Reduction()
    again.add(found.metrics)
    assert again.result() == pytest.approx(together.result())


def test_entries_beyond_the_clip_are_cut_and_counted():
    sent = [Reply("alba", {"delta": {"w": torch.tensor([9.0, -9.0, 0.5])}}, 2.0)]
    found, num_cut = summed(sent, layout(sent, heaviest=2.0, clip=1.0))
    assert found.upload["delta"]["w"].tolist() == pytest.approx([1.0, -1.0, 0.5], abs=1e-6)
    assert num_cut == 2


def test_what_no_replies_add_up_to_is_no_sum():
    """As of a site that uploads anything: nobody can look at a single one."""
    sent = [Reply("alba", {"delta": {"w": torch.ones(3)}}, 2.0)] * 2
    it = layout(sent, heaviest=2.0)
    honest = it.coordinates(sent[0], seed=0, towards_zero=False)
    for lie in (honest * np.uint32(9), np.zeros(it.size, np.uint32) - honest * np.uint32(2)):
        with pytest.raises(ValueError, match="is no sum of 2 replies: its weight is"):
            it.read(honest + lie, width(2, it.bits), client="alba", count=2)


def test_towards_zero_no_norm_grows():
    sent = [Reply("alba", {"delta": {"w": torch.full((50,), 0.1234567)}})]
    found, _ = summed(sent, layout(sent, heaviest=1.0), towards_zero=True)
    assert (found.upload["delta"]["w"] <= 0.1234567).all()


def test_only_what_a_common_mask_leaves_travels():
    mask = {"delta": {"w": torch.arange(10) % 3 == 0}}
    sent = [Reply(c, {"delta": {"w": torch.where(mask["delta"]["w"], 0.5, 0.0)}}) for c in "ab"]
    whole, masked = layout(sent, heaviest=1.0), layout(sent, heaviest=1.0, support=mask)
    assert whole.size - masked.size == 6
    assert torch.allclose(
        summed(sent, masked)[0].upload["delta"]["w"], sent[0].upload["delta"]["w"]
    )
    stray = Reply("a", {"delta": {"w": torch.ones(10)}})
    with pytest.raises(ClientError, match="delta/w of its upload has entries where the cohort's"):
        masked.coordinates(stray, seed=0, towards_zero=False)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply("a", {}, 41.0), "its weight must be from 0 to 40, .* got 41"),
        (Reply("a", {}, 1.0, {"loss": float("nan")}), "cannot be added up: loss must be in"),
        (Reply("a", {}, 1.0, {"mixture_1": 0.5}), "reports mixture_1, which is none of a training"),
    ],
)
def test_what_cannot_be_added_up_is_refused_at_its_client(reply: Reply, words: str):
    sent = replies()
    full = Reply(reply.client, sent[0].upload, reply.weight, reply.metrics)
    with pytest.raises(ClientError, match=words):
        layout(sent).coordinates(full, seed=0, towards_zero=False)


@pytest.mark.parametrize(
    ("upload", "words"),
    [
        ({}, "nothing to add up where clients upload nothing"),
        ({"votes": {"w": torch.ones(3, dtype=torch.uint8)}}, "got uint8 in votes/w of an upload"),
    ],
)
def test_uploads_that_are_no_numbers_are_refused(upload: Any, words: str):
    with pytest.raises(ValueError, match=words):
        layout([Reply("a", upload)])
