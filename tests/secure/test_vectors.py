"""Published and hand-made values of everything a secure sum is made of."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.secure import shamir
from fedloom.secure.ciphers import (
    Directory,
    Signer,
    agreed,
    derived,
    key_of,
    mask,
    opened,
    sealed,
    stream,
)

SUNSCREEN = (
    b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future,"
    b" sunscreen would be it."
)
ENCRYPTED = (
    "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0bf91b65c5524733ab8f593dabcd62b357"
    "1639d624e65152ab8f530c359f0861d807ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
    "5af90bbf74a35be6b40b8eedf2785e42874d"
)


def test_two_keys_agree_as_in_rfc_7748_section_6_1():
    private = "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
    alice = key_of(bytes.fromhex(private))
    public = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert alice.public_key().public_bytes_raw().hex() == public
    bob = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert agreed(alice, bob).hex() == shared


def test_a_public_key_that_agrees_on_nothing_with_everybody_is_refused():
    with pytest.raises(ValueError, match="shared key"):
        agreed(key_of(bytes(range(32))), bytes(32))


def test_keys_are_derived_as_in_rfc_5869_appendix_a_1():
    found = derived(
        bytes([0x0B] * 22), salt=bytes(range(13)), info=bytes(range(0xF0, 0xFA)), length=42
    )
    wanted = "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    assert found.hex() == wanted


def test_the_stream_is_that_of_rfc_8439_section_2_4_2():
    start = (1).to_bytes(4, "little") + bytes.fromhex("000000000000004a00000000")
    key = stream(bytes(range(32)), len(SUNSCREEN), start=start)
    assert bytes(a ^ b for a, b in zip(key, SUNSCREEN, strict=True)).hex() == ENCRYPTED


def test_the_stream_begins_as_in_rfc_8439_appendix_a_1():
    # A key and a nonce of zeros, counter 0.
    first = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    assert stream(bytes(32), 32).hex() == first
    assert mask(bytes(32), 2).tolist() == [0xADE0B876, 0x903DF1A0]


def test_shares_lie_on_the_polynomial_and_give_its_value_at_0_back():
    # 1234 + 166 x + 94 x^2, as in the textbook example.
    shares = shamir.shares_of([1234, 166, 94], 6)
    assert [int.from_bytes(s, "big") for s in shares] == [1494, 1942, 2578, 3402, 4414, 5614]
    secret = shamir.combine({2: shares[1], 4: shares[3], 5: shares[4]})
    assert int.from_bytes(secret, "big") == 1234


@settings(max_examples=20, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 6), st.integers(0, 4), st.data())
def test_any_threshold_of_shares_gives_any_secret_back(
    secret: bytes, threshold: int, more: int, data: st.DataObject
):
    holders = threshold + more
    shares = shamir.split(secret, threshold=threshold, holders=holders)
    places = data.draw(st.permutations(range(1, holders + 1)))[:threshold]
    assert shamir.combine({place: shares[place - 1] for place in places}) == secret


def test_one_share_too_few_lies_on_a_line_through_anything():
    # Two points of a parabola are as far from its value at 0 as they are from any other.
    shares = shamir.shares_of([1234, 166, 94], 3)
    assert shamir.combine({1: shares[0], 2: shares[1]}) != (1234).to_bytes(32, "big")


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: shamir.split(b"short", threshold=1, holders=1), "must have 32 bytes, got 5"),
        (lambda: shamir.split(bytes(32), threshold=3, holders=2), "must be from 1 to 2 holders"),
        (lambda: shamir.combine({1: b"short"}), "must be an element of the field in 33 bytes"),
        (lambda: shamir.combine({1: b"\xff" * 33}), "must be an element of the field"),
    ],
)
def test_what_is_no_secret_or_share_is_refused(made, words):
    with pytest.raises(ValueError, match=words):
        made()


def test_a_sealed_share_opens_for_its_key_and_sum_only():
    box = sealed(bytes(32), b"share", about=b"this sum")
    assert opened(bytes(32), box, about=b"this sum") == b"share"
    for key, about in ((b"1" * 32, b"this sum"), (bytes(32), b"another")):
        with pytest.raises(ValueError, match="was changed on the way"):
            opened(key, box, about=about)


def test_signatures_are_looked_at_by_the_keys_one_was_given():
    alba, brno = Signer.fresh(), Signer.fresh()
    directory = Directory({"alba": alba.public})
    directory.check("alba", b"words", alba.sign(b"words"))
    with pytest.raises(ValueError, match="in the name of alba is not signed by its key"):
        directory.check("alba", b"words", brno.sign(b"words"))
    with pytest.raises(ValueError, match="brno would take part in the sum, whose key this site"):
        directory.check("brno", b"words", brno.sign(b"words"))
