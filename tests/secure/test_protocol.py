"""Sums among honest parties, who may be gone at any step, and what they refuse a server that lies."""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare
from tests.secure.conftest import NAMES, SIZE, Table, signer

from fedloom.core.protocols import ClientError
from fedloom.secure import graph
from fedloom.secure.ciphers import Directory, Signer
from fedloom.secure.fixed_point import unpacked
from fedloom.secure.messages import Step, message, read
from fedloom.secure.server import NotOpened
from fedloom.secure.settings import SecureSettings
from fedloom.secure.terms import Advert
from fedloom.wire.frame import frame

STEPS: tuple[Step, ...] = ("advertise", "share", "upload", "consent", "reveal")


def test_the_sum_is_that_of_all_and_no_upload_is_one():
    table = Table()
    assert np.array_equal(table.low(table.run()), table.sum_of(*NAMES))
    assert table.server.survivors == NAMES
    assert not table.server.failures


@pytest.mark.parametrize("neighbours", [None, 4])
@pytest.mark.parametrize("step", STEPS)
def test_who_is_gone_is_in_the_sum_exactly_if_its_upload_arrived(
    step: Step, neighbours: int | None
):
    names = tuple(f"site{at}" for at in range(9))
    table = Table(SecureSettings(4, neighbours), names=names, gone={"site3": step, "site7": step})
    found = table.low(table.run())
    here = names if step in ("consent", "reveal") else tuple({*names} - {"site3", "site7"})
    assert np.array_equal(found, table.sum_of(*here))
    assert {*table.server.survivors} == {*here}
    assert {*table.server.failures} == {*names} - {*here}
    assert {*table.server.lost} == {"site3", "site7"}


def test_one_is_gone_before_its_upload_and_one_after():
    table = Table(gone={"brno": "upload", "daru": "consent"})
    assert np.array_equal(table.low(table.run()), table.sum_of("alba", "cork", "daru", "esch"))


@pytest.mark.parametrize("step", STEPS)
def test_below_the_threshold_the_sum_stays_closed(step: Step):
    table = Table(SecureSettings(4), gone={"alba": step, "brno": step})
    with pytest.raises(NotOpened, match=r"a secure sum needs 4 clients .*, 3 are left|shares that"):
        table.run()


def test_no_less_than_half_open_a_sum_whatever_the_threshold_is():
    table = Table(SecureSettings(2), gone=dict.fromkeys(NAMES[:3], "upload"))
    with pytest.raises(NotOpened, match=r"needs 3 clients .*, 2 are left"):
        table.run()


def test_uploads_of_a_constant_look_uniform_and_never_the_same():
    """All bytes that the server receives of one client, over many sums of the same numbers."""
    uploads, table = [], Table()
    for attempt in range(20):
        table.server = replace(table.server, terms=replace(table.terms, attempt=f"{attempt:032d}"))
        table.server.failures, table.server.lost = {}, {}
        table.vectors = {name: np.full(SIZE, 7, np.uint32) for name in NAMES}
        total = table.server.run(NAMES, table.exchange)
        assert (table.low(total) == 35).all()
        (own,) = [data for step, name, data in table.received if (step, name) == ("upload", "alba")]
        uploads.append(read(own)[1][0])
        table.received.clear()
    assert len({*uploads}) == 20
    counts = np.bincount(np.frombuffer(b"".join(uploads), np.uint8), minlength=256)
    assert chisquare(counts).pvalue > 1e-6
    # The difference of two is as uniform: nothing that does not change shows.
    between = np.bitwise_xor(*(np.frombuffer(u, np.uint8) for u in uploads[:2]))
    assert chisquare(np.bincount(between >> 4, minlength=16)).pvalue > 1e-6


def test_without_one_share_the_bytes_of_the_others_open_nothing():
    """What a server has of a client whose masks it lacks is uniform, whatever it takes off."""
    table = Table()
    table.run()
    of = {name: data for step, name, data in table.received if step == "upload"}
    assert len(of) == 5
    bits = table.server.number_bits
    for name, data in of.items():
        left = unpacked(read(data)[1][0], bits, SIZE) - table.vectors[name]
        top = (left & np.uint32((1 << bits) - 1)) >> np.uint32(bits - 4)
        assert chisquare(np.bincount(top, minlength=16)).pvalue > 1e-6


def test_every_attempt_has_fresh_keys_and_the_same_sum():
    keys, sums, table = list[bytes](), [], Table()
    for _ in range(2):
        sums.append(table.low(table.run()))
        keys += [data for step, _, data in table.received if step == "advertise"]
        table.received.clear()
    assert len({*keys}) == 10
    first, second = sums
    assert np.array_equal(first, second)


def test_the_same_question_gets_the_same_answer_and_another_one_none():
    table = Table()
    table.run()
    asked: dict[tuple[Step, str], bytes] = {}
    again = Table(meddle=lambda step, name, data: asked.setdefault((step, name), data))
    again.run()
    party = again.parties["alba"]
    (sent,) = [data for step, name, data in again.received if (step, name) == ("upload", "alba")]
    assert party.answer("upload", asked["upload", "alba"], lambda _: again.vectors["brno"]) == sent
    with pytest.raises(ClientError, match="asks alba twice for upload in one secure sum"):
        party.answer("upload", message({"names": []}), lambda _: again.vectors["alba"])
    with pytest.raises(ClientError, match="alba takes no part in this secure sum"):
        party.answer("upload", asked["upload", "alba"], lambda _: again.vectors["alba"])


# --- servers that lie -----------------------------------------------------------------------------


def changed(step: Step, change: Callable[[dict, list[bytes]], tuple[dict, list[bytes]]], *to: str):
    """Return a server that changes the messages of one step to some."""

    def meddle(now: Step, name: str, data: bytes) -> bytes:
        return message(*change(*read(data))) if now == step and name in (to or NAMES) else data

    return meddle


def both_kinds(told: dict, parts: list[bytes]) -> tuple[dict, list[bytes]]:
    return {**told, "dead": [*told["dead"], "brno"]}, parts


def the_other_kind(told: dict, parts: list[bytes]) -> tuple[dict, list[bytes]]:
    alive = [name for name in told["alive"] if name != "brno"]
    return {**told, "alive": alive, "dead": [*told["dead"], "brno"]}, parts


@pytest.mark.parametrize("ask", [both_kinds, the_other_kind])
def test_a_server_that_asks_for_both_kinds_of_share_is_refused_and_named(ask):
    table = Table(meddle=changed("reveal", ask))
    with pytest.raises(NotOpened):
        table.run()
    words = "both kinds of share of brno, which together open its upload: nothing is revealed"
    assert all(words in why for why in table.refused.values())
    assert {*table.refused} == {*NAMES}
    assert not [step for step, *_ in table.received if step == "reveal"]


def test_a_server_that_asks_a_second_time_for_the_other_kind_is_refused_and_named():
    table, asked = Table(), dict[tuple[Step, str], bytes]()
    table.meddle = lambda step, name, data: asked.setdefault((step, name), data)
    table.run()
    told, parts = read(asked["reveal", "alba"])
    with pytest.raises(ClientError, match="asks for both kinds of share of brno"):
        table.parties["alba"].answer("reveal", message(*the_other_kind(told, parts)))
    table.meddle = lambda step, name, data: data
    table.run()
    without = message({"names": [name for name in NAMES if name != "brno"]})
    with pytest.raises(ClientError, match="asks for both kinds of share of brno"):
        table.parties["alba"].answer("consent", without)


@pytest.mark.parametrize("step", ["consent", "reveal"])
def test_a_second_question_that_is_malformed_is_refused_in_one_sentence(step: Step):
    table = Table()
    table.run()
    odd = message({"names": [["alba"]], "dead": [3], "alive": {}})
    with pytest.raises(ClientError, match="a message of a secure sum names nobody in"):
        table.parties["alba"].answer(step, odd)


def test_a_server_that_tells_clients_of_different_survivors_has_one_sum_of_them():
    """Two hear that brno is gone, and would reveal its key where the others reveal its own mask: too few agree."""
    fewer = [name for name in NAMES if name != "brno"]

    def split_view(step: Step, name: str, data: bytes) -> bytes:
        told, parts = read(data)
        if step not in ("consent", "reveal") or name not in ("cork", "daru"):
            return data
        if step == "consent":
            return message({"names": fewer})
        at = [told["signers"].index(name) for name in ("cork", "daru")]
        told = {"alive": fewer, "dead": ["brno"], "signers": ["cork", "daru"]}
        return message(told, [parts[i] for i in at])

    table = Table(meddle=split_view)
    table.server.directory = None
    with pytest.raises(NotOpened):
        table.run()
    assert table.refused["cork"] == table.refused["daru"]
    assert "only 2 clients agree on who is in the sum, 3 are needed" in table.refused["cork"]
    # The others see signatures of another list, and reveal nothing either.
    assert "in the name of cork is not signed by its key" in table.refused["alba"]


def test_a_server_that_forges_agreement_is_refused():
    few = changed(
        "reveal", lambda told, parts: ({**told, "signers": told["signers"][:2]}, parts[:2])
    )
    table = Table(meddle=few)
    with pytest.raises(NotOpened):
        table.run()
    assert all("only 2 clients agree on who is in the sum, 3" in w for w in table.refused.values())


def test_a_server_that_shows_a_key_of_its_own_is_refused():
    def impostor(told: dict, parts: list[bytes]) -> tuple[dict, list[bytes]]:
        at = told["names"].index("brno")
        mine = signer("server").sign(b"whatever")
        return told, [*parts[:at], parts[at][:96] + mine, *parts[at + 1 :]]

    table = Table(meddle=changed("share", impostor))
    with pytest.raises(NotOpened):
        table.run()
    assert all("in the name of brno is not signed by its key" in w for w in table.refused.values())


def test_a_server_that_invents_clients_is_refused():
    """Sybils would be the whole of what a client is summed with."""

    def crowd(told: dict, parts: list[bytes]) -> tuple[dict, list[bytes]]:
        return {"names": [*told["names"], "nobody"]}, [*parts, parts[0]]

    table = Table(meddle=changed("share", crowd))
    with pytest.raises(NotOpened):
        table.run()
    assert all("nobody would take part in the sum, whose key" in w for w in table.refused.values())


@pytest.mark.parametrize(
    ("step", "change", "words"),
    [
        (
            "share",
            lambda told, parts: ({"names": told["names"][:2]}, parts[:2]),
            "a secure sum of 2 clients is fewer than the 3 that .* takes part in",
        ),
        (
            "share",
            lambda told, parts: ({"names": told["names"]}, [*parts[:4], parts[0]]),
            "in the name of esch is not signed|another key of esch than its own",
        ),
        (
            "upload",
            lambda told, parts: ({"names": told["names"][:1]}, parts[:1]),
            "only 1 neighbours of .* shared their secrets, 2 are needed",
        ),
        (
            "upload",
            lambda told, parts: ({"names": ["nobody", *told["names"][1:]]}, parts),
            "nobody is no neighbour of",
        ),
        (
            "upload",
            lambda told, parts: ({"names": told["names"]}, [b"x", *parts[1:]]),
            "a sealed share is of the wrong length",
        ),
        (
            "upload",
            lambda told, parts: ({"names": told["names"]}, [parts[1], *parts[1:]]),
            "was changed on the way: that of (alba|brno)$",
        ),
        (
            "consent",
            lambda told, parts: ({"names": told["names"][:2]}, []),
            "a secure sum of 2 clients would be opened, 3 are needed|is not in the sum, but it",
        ),
        (
            "consent",
            lambda told, parts: ({"names": [*told["names"], "nobody"]}, []),
            "nobody takes no part in this secure sum",
        ),
        ("consent", lambda told, parts: ({}, []), "names nobody in names"),
        (
            "reveal",
            lambda told, parts: ({**told, "alive": ["nobody", *told["alive"]]}, parts),
            "asks for shares of others",
        ),
        ("advertise", lambda told, parts: ({**told, "round": "one"}, []), "it has no terms"),
        ("advertise", lambda told, parts: ({**told, "heaviest": 10**400}, []), "it has no terms"),
    ],
)
def test_what_no_honest_server_says_is_refused(step: Step, change, words: str):
    table = Table(meddle=changed(step, change))
    with pytest.raises(NotOpened):
        table.run()
    assert table.refused
    assert all(re.search(words, why) for why in table.refused.values())


def test_a_server_that_changes_the_terms_for_some_has_no_sum_of_them():
    """Keys are bound to round, task, attempt and recipe: what is signed under other terms is refused."""
    other = changed("advertise", lambda told, parts: ({**told, "task": "cd" * 32}, parts), "cork")
    table = Table(meddle=other)
    table.server.directory = None
    with pytest.raises(NotOpened):
        table.run()
    assert any("in the name of cork is not signed" in why for why in table.refused.values())


@pytest.mark.parametrize("own", [{"run": "another"}, {"settings": SecureSettings(3, clip=2.0)}])
def test_a_site_under_another_recipe_has_no_sum_with_the_others(own):
    table = Table()
    table.server.directory = None
    table.parties["cork"] = replace(table.parties["cork"], **own)
    with pytest.raises(NotOpened):
        table.run()
    assert "in the name of cork is not signed" in table.refused["alba"]


def test_a_site_has_a_minimum_of_its_own():
    table = Table(least=6)
    with pytest.raises(NotOpened):
        table.run()
    assert "a secure sum of 5 clients is fewer than the 6 that alba" in table.refused["alba"]


def test_survivors_that_fall_apart_are_not_told_apart():
    names = tuple(f"site{at}" for at in range(12))
    ring = graph.neighbours(names, 2, context=b"")
    assert all(len(others) == 2 for others in ring.values())
    assert len(graph.pieces(ring, names)) == 1
    table = Table(SecureSettings(6, 2), names=names)
    table.server._introduce(names, table.exchange)
    around = list(table.server._graph)
    first = around[0]
    # The two beside one are gone: it stands alone.
    gone: dict[str, Step] = dict.fromkeys(table.server._graph[first], "upload")
    again = Table(SecureSettings(6, 2), names=names)
    again.parties = table.parties

    def same_keys(step: Step, messages):
        again.gone = gone
        return table.exchange(step, messages) if step == "share" else again.exchange(step, messages)

    again.server = table.server
    table.server._hand_shares(same_keys)
    table.server._add_up(same_keys)
    with pytest.raises(NotOpened):
        table.server._agree(same_keys)
    refused = {**table.refused, **again.refused}
    assert any("alone could be told: raise secure.neighbours" in why for why in refused.values())


def test_a_server_that_keeps_shares_back_until_the_graph_falls_apart_has_no_sums_of_its_parts():
    """Twelve in threes, each given the shares of its own three: masks would cancel in sums of three, below the threshold."""
    names = tuple(f"site{at:02}" for at in range(12))

    def in_threes(step: Step, name: str, data: bytes) -> bytes:
        if step != "upload":
            return data
        told, parts = read(data)
        around = graph.ring(names, context=table.server._context)
        at = around.index(name) // 3 * 3
        mine = [
            (n, p) for n, p in zip(told["names"], parts, strict=True) if n in around[at : at + 3]
        ]
        return message({"names": [n for n, _ in mine]}, [part for _, part in mine])

    table = Table(SecureSettings(6, 4), names=names, meddle=in_threes)
    with pytest.raises(NotOpened):
        table.run()
    assert {*table.refused} == {*names}
    assert all("is in the sum, whose shares it kept from" in why for why in table.refused.values())


def test_a_wrong_share_is_found_out_and_not_added_up():
    table = Table(gone={"brno": "upload"})
    exchange = table.exchange

    def altered(step: Step, messages):
        answers = exchange(step, messages)
        if step != "reveal":
            return answers
        assert isinstance(answers["alba"], bytes)
        told, parts = read(answers["alba"])
        return {**answers, "alba": message(told, [bytes(33), *parts[1:]])}

    with pytest.raises(NotOpened, match=r"are not those of its secret|do not belong together"):
        table.server.run(NAMES, altered)


Answer = Callable[[bytes], bytes]


def parts_as(change: Callable[[list[bytes]], list[bytes]]) -> Answer:
    """Return a site that changes the parts of its answer."""

    def changed_parts(data: bytes) -> bytes:
        told, parts = read(data)
        return message(told, change(parts))

    return changed_parts


def advert_as(change: Callable[[Advert], Advert]) -> Answer:
    """Return a site that shows other keys than an honest one, under its own signature."""

    def signed(parts: list[bytes]) -> list[bytes]:
        table = Table()
        shown = change(Advert.read(parts[0]))
        words = table.terms.words("advert", table.settings, shown.said("alba"))
        return [replace(shown, signature=signer("alba").sign(words)).pieces()]

    return parts_as(signed)


@pytest.mark.parametrize(
    ("step", "lie", "words"),
    [
        ("advertise", lambda data: b"nonsense", "begins with b'nons'"),
        ("advertise", parts_as(lambda parts: [*parts, *parts]), "must have one part, got 2"),
        ("advertise", parts_as(lambda parts: [parts[0] * 9]), "up to 256 bytes, got"),
        (
            "advertise",
            advert_as(lambda advert: replace(advert, cipher=bytes(32))),
            "gives no shared key",
        ),
        (
            "advertise",
            advert_as(lambda advert: replace(advert, cipher=advert.mask)),
            "alba shows a key that was shown before",
        ),
        ("share", parts_as(lambda parts: parts[1:]), "must name each in names once"),
        ("share", parts_as(lambda parts: [b"", *parts[1:]]), "shares of the wrong length"),
        ("upload", parts_as(lambda parts: [parts[0] * 2]), "take .* bytes, got shape"),
        ("upload", parts_as(lambda parts: []), "must have one part, got 0"),
        ("consent", parts_as(lambda parts: [parts[0] * 2]), "of alba is not signed by its key"),
        ("reveal", parts_as(lambda parts: parts[1:]), "revealed 4 shares of 5"),
        ("reveal", parts_as(lambda parts: [b"", *parts[1:]]), "an element of the field"),
        ("reveal", parts_as(lambda parts: [b"\xff" * 33, *parts[1:]]), "an element of the field"),
    ],
)
def test_what_no_honest_site_says_costs_its_own_place_alone(step: Step, lie: Answer, words: str):
    table = Table()

    def with_a_liar(now: Step, messages):
        answers = table.exchange(now, messages)
        if now == step:
            theirs = answers["alba"]
            assert isinstance(theirs, bytes)
            answers["alba"] = lie(theirs)
        return answers

    found = table.low(table.server.run(NAMES, with_a_liar))
    here = NAMES if step in ("consent", "reveal") else NAMES[1:]
    assert np.array_equal(found, table.sum_of(*here))
    assert [*table.server.lost] == ["alba"]
    assert re.search(words, table.server.lost["alba"])
    assert {*table.refused} <= {"alba"}


def test_files_that_are_no_keys_are_refused_in_one_sentence():
    for public in (b"", b"ssh-dss AAAA", b"ssh-ed25519 " + b"A" * 68):
        with pytest.raises(ValueError, match="the public key of brno is not one that"):
            Directory({"brno": public}).check("brno", b"", b"")
    with pytest.raises(ValueError, match=r"node.key must be what `fedloom keys add` made"):
        Signer.read(b"nonsense")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"nonsense", "begins with b'nons'"),
        (frame(b"", {"lengths": 3}), "is malformed: it has no lengths"),
        (frame(b"", {"lengths": [3]}), "has 0 bytes, not 3"),
        (message({"names": ["a", "a"]}, [b"", b""]), "it has no terms"),
    ],
)
def test_bytes_that_are_no_message_are_refused(data: bytes, words: str):
    with pytest.raises(ClientError, match=words):
        Table().parties["alba"].answer("advertise", data)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"threshold": 1}, "secure.threshold must be at least 2"),
        ({"threshold": 3, "neighbours": 1}, "secure.neighbours must be at least 2"),
        ({"threshold": 3, "bits": 40}, "secure.bits must be from 8 to 28"),
        ({"threshold": 3, "clip": 0}, "secure.clip must be a positive number"),
    ],
)
def test_settings_without_a_sum_are_refused(given, words: str):
    with pytest.raises(ValueError, match=words):
        SecureSettings(**given)
