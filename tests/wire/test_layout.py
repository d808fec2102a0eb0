"""What is found once for payloads alike: the same bytes and tensors as if each had been looked at on its own."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fedloom.core.protocols import Payload
from fedloom.core.schema import schema
from fedloom.wire import layout
from fedloom.wire.body import decode_body, encode_body, encode_pieces
from fedloom.wire.table import DTYPES, WireError, read_table
from fedloom.wire.wire_settings import ValueType


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """Begin and end with nothing remembered."""
    forget()
    yield
    forget()


def forget() -> None:
    layout._known.clear()
    layout._dense_layout.cache_clear()


def noise(*shape: int, kind: str = "float32", seed: int = 0, zeros: float = 0.0) -> Tensor:
    """Return entries of any bits, some of them zero."""
    dtype = DTYPES[kind]
    g = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel()
    raw = torch.randint(1, 256, (size, dtype.itemsize), generator=g).to(torch.uint8)
    if kind == "bool":
        raw = torch.ones_like(raw)
    raw[torch.rand(size, generator=g) < zeros] = 0
    return raw.reshape(-1).view(dtype).reshape(shape)


def many(kind: str = "float32", zeros: float = 0.0) -> Payload:
    """Return small tensors, among them empty, scalar and odd ones, a large one and a second group."""
    shapes = [(4, 16), (16, 4), (), (0,), (3, 0, 2), (5,), (2, 32), (300, 300), (64,), (8, 8)]
    tensors = {f"w.{i}": noise(*s, kind=kind, seed=i, zeros=zeros) for i, s in enumerate(shapes)}
    return {"delta": tensors, "empty": {}, "more": {"w.0": noise(16, kind=kind)}}


def same(a: Payload, b: Payload) -> bool:
    """Compare names, order, types, shapes and bits."""
    return [(g, list(p)) for g, p in a.items()] == [(g, list(p)) for g, p in b.items()] and all(
        t.dtype == b[g][n].dtype and t.shape == b[g][n].shape and bits(t) == bits(b[g][n])
        for g, params in a.items()
        for n, t in params.items()
    )


def bits(t: Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("zeros", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("kind", sorted(DTYPES))
def test_tensors_that_go_together_are_the_bytes_of_each_alone(
    kind: str, zeros: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = many(kind, zeros)
    together = encode_body(payload)
    assert same(decode_body(together), payload)
    forget()
    monkeypatch.setattr(layout, "_go_together", lambda a, b: False)
    assert encode_body(payload) == together
    assert same(decode_body(together), payload)


@pytest.mark.parametrize("values", ["bfloat16", "float16", "int8", "int4", "fp8", "nf4"])
def test_rounded_tensors_are_rounded_each_alone(
    values: ValueType, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"w.{i}": torch.randn(4, 16) * 10**i for i in range(4)}
    payload = {"delta": {**tensors, "n": torch.arange(16), "m": torch.arange(16)}}
    together = encode_body(payload, values=values)
    forget()
    monkeypatch.setattr(layout, "_go_together", lambda a, b: False)
    assert encode_body(payload, values=values) == together


def test_one_zero_among_many_tensors_is_left_out_where_that_is_shorter() -> None:
    payload = many()
    payload["delta"]["w.9"].zero_()
    assert len(encode_body(payload)) < len(encode_body(many())) - 200
    assert same(decode_body(encode_body(payload)), payload)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: {**p, "other": p["more"]},
        lambda p: {"delta": p["delta"]},
        lambda p: {**p, "more": {"w.1": p["more"]["w.0"]}},
        lambda p: {**p, "more": {"w.0": p["more"]["w.0"].reshape(4, 4)}},
        lambda p: {**p, "more": {"w.0": p["more"]["w.0"].view(torch.int32)}},
        lambda p: {**p, "delta": dict(reversed(p["delta"].items()))},
    ],
)
def test_what_was_found_for_one_payload_is_not_taken_for_another(
    change: Callable[[Payload], Payload],
) -> None:
    decode_body(encode_body(many()), max_bytes=None)
    other = change(many())
    body = encode_body(other)
    assert same(decode_body(body, max_bytes=None), other)
    forget()
    assert encode_body(other) == body


def test_tensors_in_one_memory_do_not_reach_into_each_other_and_begin_as_if_alone() -> None:
    payload = {"delta": {f"w.{i}": torch.randn(4, 16 + 3 * (i % 2)) for i in range(8)}}
    read = decode_body(encode_body(payload))
    for tensor in read["delta"].values():
        assert tensor.data_ptr() % 64 == 0
        assert tensor.is_contiguous()
    for name, tensor in read["delta"].items():
        tensor.fill_(7)
        rest = {n: t for n, t in read["delta"].items() if n > name}
        assert all(torch.equal(t, payload["delta"][n]) for n, t in rest.items())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(16, 4).t(),
        torch.randn(4, 32)[:, ::2],
        torch.randn(1, 4, 1).expand(4, 4, 4),
        torch.randn(4, 16, requires_grad=True),
        torch.nn.Parameter(torch.randn(64)),
    ],
)
def test_a_tensor_of_any_strides_goes_with_others(tensor: Tensor) -> None:
    read = decode_body(encode_body({"g": {"a": torch.ones(16), "b": tensor, "c": torch.ones(3)}}))
    assert torch.equal(read["g"]["b"], tensor.detach())


def test_a_strangers_table_is_remembered_only_where_it_was_asked_for() -> None:
    body = encode_body(many())
    decode_body(body)
    assert not layout._known
    with pytest.raises(WireError, match=r"upload delta/w\.0: expected nothing, got float32"):
        decode_body(body, expected={})
    assert not layout._known
    decode_body(body, expected=schema(many()))
    assert len(layout._known) == 1
    with pytest.raises(WireError, match=r"upload delta/w\.0: expected nothing, got float32"):
        decode_body(body, expected={})
    with pytest.raises(
        WireError, match=r"takes the payload beyond wire\.max_bytes|the content has"
    ):
        decode_body(body, max_bytes=100)


def test_few_tables_are_remembered_and_none_that_differs_by_client() -> None:
    for i in range(100):
        payload = {"g": {f"w.{i}": torch.ones(16)}}
        decode_body(encode_body(payload), expected=schema(payload))
    assert len(layout._known) <= 16
    layout._known.clear()
    sparse = {"g": {"w": torch.zeros(1000)}}
    assert same(decode_body(encode_body(sparse), expected=schema(sparse)), sparse)
    assert not layout._known


def test_a_table_is_read_once_for_messages_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[bytes] = []

    def counted(data: memoryview, *, limit: int | None) -> object:
        texts.append(bytes(data))
        return read_table(data, limit=limit)

    monkeypatch.setattr(layout, "read_table", counted)
    for seed in range(5):
        payload = {"g": {"w": noise(4, 16, seed=seed), "v": noise(16, seed=seed)}}
        assert same(decode_body(encode_body(payload), expected=schema(payload)), payload)
    assert len(texts) == 1


@pytest.mark.parametrize("zeros", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int64", "bool"])
def test_zeros_may_be_written_to_save_the_search(kind: str, zeros: float) -> None:
    payload = many(kind, zeros)
    body = b"".join(encode_pieces(payload, sparse=False))
    assert same(decode_body(body), payload)
    if zeros and kind != "bool":
        assert len(body) > len(encode_body(payload))


def test_a_type_that_cannot_travel_is_named() -> None:
    with pytest.raises(WireError, match="g/w is of type complex64, what can travel is float32"):
        encode_body({"g": {"w": torch.ones(2, dtype=torch.complex64)}})
