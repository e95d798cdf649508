"""The primary's connections, against a scripted secondary that replays captured messages."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from dataclasses import replace

import pytest

from hast import connect as connect_module
from hast.confgrammar import MAX_TIMEOUT
from hast.connect import Established, connect, connect_patiently
from hast.handshake import RefusedError
from hast.messages import HANDSHAKE_LIMIT, SyncSource, pack_message, unpack_message
from hast.metadata import Pair
from hast.sockio import watch
from tests import vectors
from tests.unit.scripted_secondary import (
    CAPTURED,
    MAP,
    NEWER,
    SECONDS,
    STEP1,
    WHERE,
    Script,
    Secondary,
    descriptors,
    established,
    inodes,
    no_child_left,  # noqa: F401  (a fixture)
    play,
    playing,
    resource,
    stopping,
)


def extended(message: bytes) -> bytes:
    """A captured message of step 2, with the element that we add to it: ours stands last, and FreeBSD ignores it."""
    main, nv, _ = unpack_message(message, HANDSHAKE_LIMIT)
    nv.add_uint8("hast", 1)
    return pack_message(main.version, nv)


# It works.


def test_virgin_nodes_byte_for_byte() -> None:
    def check(secondary: Secondary, made: Established) -> None:
        assert secondary.said == [
            vectors.load("hs1_primary_to_secondary").normal,
            extended(vectors.load("hs2_primary_to_secondary_virgin").normal),
        ]
        agreement = made.agreement
        assert (agreement.version, agreement.syncsrc, agreement.secondary) == (2, SyncSource.PRIMARY, Pair())
        assert agreement.virgin and agreement.map is None
        assert agreement.metadata == replace(CAPTURED, pair=Pair(1, 0))
        assert made.peer == secondary.address
        for sock in (made.out, made.incoming):
            assert sock.getblocking() is False and not sock.get_inheritable()
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
        # Requests go out on the first connection, replies come in on the second.
        made.out.send(b"request")
        secondary.connections[1].send(b"reply")
        for sock in (secondary.connections[0], made.incoming):
            sock.setblocking(True)
            sock.settimeout(SECONDS)
        assert secondary.connections[0].recv(100) == b"request"
        assert made.incoming.recv(100) == b"reply"

    established(playing(), virgin=True, check=check)


def test_maps_byte_for_byte() -> None:
    metadata = replace(CAPTURED, pair=Pair(1, 0))

    def empty(secondary: Secondary, made: Established) -> None:
        known = extended(vectors.load("hs2_primary_to_secondary").normal)
        token = STEP1.elements[-1][2]
        assert isinstance(token, bytes)
        assert secondary.said[1] == known.replace(bytes.fromhex("0f72376b34c8d45dfa61b1b8fbe68e08"), token)
        assert made.agreement.map == bytes(512) and not made.agreement.virgin
        assert made.agreement.metadata == metadata

    def newer(_: Secondary, made: Established) -> None:
        assert made.agreement.map == NEWER.data
        assert made.agreement.syncsrc is SyncSource.SECONDARY and made.agreement.secondary == Pair(1, 0)

    established(playing(second=MAP.raw), metadata, check=empty)
    established(playing(second=NEWER.raw), metadata, check=newer)


def test_not_a_byte_too_many_is_read() -> None:
    def check(_: Secondary, made: Established) -> None:
        made.out.settimeout(SECONDS)
        assert made.out.recv(100) == b"more"

    established(playing(second=NEWER.raw + b"more"), check=check)


def test_messages_that_come_byte_by_byte() -> None:
    async def script(secondary: Secondary) -> None:
        one = await secondary.accept()
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await secondary.hear(one)
        for at in range(len(STEP1.raw)):
            await secondary.say(one, STEP1.raw[at : at + 1])
        await secondary.hear(await secondary.accept())
        for at in range(len(NEWER.raw)):
            await secondary.say(one, NEWER.raw[at : at + 1])
            await asyncio.sleep(0)

    established(script, check=lambda _, made: None if made.agreement.map == NEWER.data else pytest.fail("map"))


@pytest.mark.parametrize("version", [1, 2])
def test_connecting_again_begins_with_the_version_in_force(version: int) -> None:
    secondary = established(playing(), version=version)
    assert secondary.said[0] == bytes([version]) + vectors.load("hs1_primary_to_secondary").normal[1:]


def test_a_peer_of_version_1() -> None:
    first = vectors.load("hs1_reply_no_version").raw
    check: Callable[[Secondary, Established], None]

    def check(secondary: Secondary, made: Established) -> None:
        assert made.agreement.version == 1
        assert secondary.said[1][0] == 1  # step 2 is sent as version 1 already

    established(playing(first, b"\1" + MAP.raw[1:]), check=check)


def test_ipv6() -> None:
    try:
        Secondary("::1").close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    established(playing(), address="::1")


def test_the_source_address() -> None:
    async def body() -> None:
        with contextlib.closing(Secondary()) as secondary:
            config = resource(secondary.address, source="127.3.4.5:4000")
            made = await play(secondary, playing(), lambda: connect(config, CAPTURED))
            made.close()
            assert [peer[0] for peer in secondary.peers] == ["127.3.4.5", "127.3.4.5"]
            assert 4000 not in [peer[1] for peer in secondary.peers]

    asyncio.run(body())


# Ended from outside, and patience.


@pytest.mark.parametrize("where", list(WHERE))
def test_cancelled_at_each_step(where: int) -> None:
    async def body() -> None:
        reached = asyncio.Event()

        async def then(_: Secondary) -> None:
            reached.set()

        with contextlib.closing(Secondary()) as secondary:
            before = descriptors()
            script = asyncio.create_task(stopping(where, then)(secondary))  # type: ignore[arg-type]
            task = asyncio.create_task(connect(resource(secondary.address), CAPTURED))
            async with asyncio.timeout(SECONDS):
                await reached.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await script
            assert descriptors() - before <= inodes(secondary.connections)

    asyncio.run(body())


def waiting(times: int, then: Script) -> Script:
    """Refuse with `wait` so many times, then play on."""

    async def script(secondary: Secondary) -> None:
        for _ in range(times):
            sock = await secondary.accept()
            await secondary.hear(sock)
            await secondary.say(sock, vectors.load("hs1_error_wrong_role_wait").raw)
        await then(secondary)

    return script


def test_a_primary_waits_for_a_peer_that_may_become_secondary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect_module, "WAIT_SECONDS", 0.02)

    async def body() -> None:
        with contextlib.closing(Secondary()) as secondary:
            config = resource(secondary.address)
            made = await play(secondary, waiting(3, playing()), lambda: connect_patiently(config, CAPTURED))
            made.close()
            assert len(secondary.connections) == 5

    asyncio.run(body())


def test_a_primary_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect_module, "WAIT_SECONDS", 0.3)

    async def body() -> None:
        with contextlib.closing(Secondary()) as secondary:
            config = resource(secondary.address, 1)
            with pytest.raises(RefusedError) as raised:
                await play(secondary, waiting(1000, playing()), lambda: connect_patiently(config, CAPTURED))
            assert raised.value.wait and 2 <= len(secondary.connections) <= 4

    asyncio.run(body())


def test_other_refusals_are_not_waited_for() -> None:
    async def body() -> None:
        with contextlib.closing(Secondary()) as secondary:
            config = resource(secondary.address)
            script = playing(first=vectors.load("hs1_error_role_init").raw)
            with pytest.raises(RefusedError):
                await play(secondary, script, lambda: connect_patiently(config, CAPTURED))
            assert len(secondary.connections) == 1

    asyncio.run(body())


def test_the_longest_timeout_can_be_watched() -> None:
    """What hast.conf allows the system may not."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        for timeout in (1, MAX_TIMEOUT):
            watch(sock, timeout)
