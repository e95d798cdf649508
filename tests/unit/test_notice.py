"""Notices: what a secondary stores because of one, and what it refuses."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hast import decision, peering
from hast.connect import tell
from hast.control import Role
from hast.decision import Outcome, decide
from hast.errors import DataError
from hast.handshake import Agreement, PeerError, RefusedError, read_hello
from hast.messages import HANDSHAKE_LIMIT, Refusal, SyncSource, pack_message, unpack_message
from hast.metadata import Metadata, Pair
from hast.notice import AHEAD, SYNCED, Notice, heed, parse_reply
from hast.nv import Nv, decode
from hast.peering import Peering
from tests.unit.scripted_secondary import Secondary, resource

TOKEN = bytes(range(16))
ACCEPTED = pack_message(2, Nv())
TARGET = Metadata("data", 67104256, 2 << 20, 64, 4608, resuid=7, prevrole=Role.SECONDARY, syncing=True)


def reply(message: bytes) -> Pair | Refusal | None:
    return parse_reply(unpack_message(message, HANDSHAKE_LIMIT)[1])


@given(st.text("abc/._-", min_size=1), st.binary(min_size=16, max_size=16), st.text("abc", max_size=9))
def test_notices_survive_the_wire(name: str, token: bytes, word: str) -> None:
    notice = Notice(name, token, word)
    assert read_hello(decode(notice.to_nv().encode())) == notice


def test_notices_that_cannot_be() -> None:
    nv = Notice("data", TOKEN[:-1], SYNCED).to_nv()
    with pytest.raises(DataError, match="15 bytes"):
        read_hello(nv)
    nv = Nv()
    nv.add_string("notice", SYNCED)
    with pytest.raises(DataError):
        read_hello(nv)


def test_synced_ends_the_synchronisation() -> None:
    heeded = heed(Notice("data", TOKEN, SYNCED), TOKEN, TARGET)
    assert (heeded.metadata, heeded.map) == (replace(TARGET, syncing=False), None)
    assert reply(heeded.message) is None
    assert heed(Notice("data", TOKEN, SYNCED), TOKEN, heeded.metadata).metadata == heeded.metadata


@pytest.mark.parametrize("word", [SYNCED, AHEAD])
@pytest.mark.parametrize("session", [b"", TOKEN[::-1]])
def test_a_notice_of_another_session_is_refused(word: str, session: bytes) -> None:
    with pytest.raises(DataError, match=r"^Token doesn't match\.$"):
        heed(Notice("data", TOKEN, word), session, TARGET)


def test_an_unknown_notice_is_refused_in_one_line() -> None:
    with pytest.raises(DataError, match="Unknown notice") as refused:
        heed(Notice("data", TOKEN, "a\nb" * 100), TOKEN, TARGET)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


@given(st.integers(0, 5), st.integers(0, 5))
def test_ahead_makes_the_secondary_the_newer_one_whatever_the_primary_can_store(local: int, remote: int) -> None:
    """The primary's counters stay what they are on its disk: at the next contact it finds that it is out of date."""
    metadata = replace(TARGET, pair=Pair(local, remote), syncing=False)
    theirs = decision.after_sync(metadata.pair)
    heeded = heed(Notice("data", TOKEN, AHEAD), TOKEN, metadata)
    assert heeded.map == b"\xff" * metadata.mapsize
    assert reply(heeded.message) == heeded.metadata.pair
    found = decide(7, heeded.metadata.pair, 7, theirs, False)
    assert (found.outcome, found.syncsrc) == (Outcome.SECONDARY_NEWER, SyncSource.SECONDARY)
    # And the other way round, should the secondary be made primary.
    assert decide(7, theirs, 7, heeded.metadata.pair, False).outcome is Outcome.PRIMARY_NEWER
    # A primary that has got well in the same session stores what the secondary has now.
    state = Peering(peer=metadata.pair, phase=peering.Phase.CONNECTED)
    known = peering.said_ahead(state, heeded.metadata.pair)
    stored = peering.in_sync(known, replace(metadata, pair=theirs))[1]
    assert decide(7, heeded.metadata.pair, 7, stored.pair, False).outcome is Outcome.IN_SYNC


def test_ahead_is_not_said_to_a_secondary_that_lacks_something() -> None:
    def connected(own: Pair, to_sync: int) -> tuple[Peering, Metadata]:
        agreement = Agreement(2, SyncSource.PRIMARY, Pair(0, 0), False, None, replace(TARGET, pair=own, syncing=False))
        state, metadata = peering.agreed(Peering(), agreement)
        assert not peering.may_say_ahead(state, metadata)
        return peering.joined(state, to_sync)[0], metadata

    assert not peering.may_say_ahead(*connected(Pair(1, 0), 5))
    assert not peering.may_say_ahead(*connected(Pair(1, 0), 0))
    assert peering.may_say_ahead(*connected(Pair(0, 0), 0))
    state, metadata = connected(Pair(1, 0), 5)
    state, metadata, _ = peering.in_sync(state, metadata)
    assert peering.may_say_ahead(state, metadata)
    assert not peering.may_say_ahead(peering.lost(state)[0], metadata)


# Over a connection, to a scripted secondary.


def told(answer: bytes, timeout: int = 20, word: str = SYNCED) -> Pair | None:
    """Give a notice to one that answers so and hangs up; with no answer at all it does not hang up."""

    async def body() -> Pair | None:
        with contextlib.closing(Secondary()) as secondary:
            family, where = secondary.socket.family, secondary.socket.getsockname()

            async def script() -> None:
                sock = await secondary.accept()
                await secondary.hear(sock)
                if answer:
                    await secondary.say(sock, answer)
                    sock.close()

            task = asyncio.get_running_loop().create_task(script())
            try:
                settings = resource(secondary.address, timeout)
                pair = await tell(settings, ((family, where), None), TOKEN, word)
            finally:
                task.cancel()
            said = unpack_message(secondary.said[0], HANDSHAKE_LIMIT)[1]
            assert read_hello(said) == Notice("data", TOKEN, word)
            return pair

    return asyncio.run(body())


def test_a_notice_that_is_heeded() -> None:
    assert told(ACCEPTED) is None
    heeded = heed(Notice("data", TOKEN, AHEAD), TOKEN, replace(TARGET, pair=Pair(4, 2)))
    assert told(heeded.message, word=AHEAD) == Pair(5, 2)


def test_a_notice_that_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"data: .* refuses the connection: Token"):
        told(pack_message(2, Refusal("Token doesn't match.").to_nv()))


def test_nobody_knows_what_became_of_a_notice() -> None:
    with pytest.raises(PeerError, match="does not answer the notice 'synced'"):
        told(b"", timeout=1)
    for answer in (ACCEPTED[:3], b"\xff" * 5, b"\x02\x05\0\0\0hello"):
        with pytest.raises(PeerError, match=r"^data: 127.* cannot be given the notice 'ahead': [^\n]+$"):
            told(answer, word=AHEAD)
