"""The primary's connections, against a scripted secondary that replays captured messages or misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hast import connect as connect_module
from hast.address import parse_address
from hast.config import Resource, parse
from hast.connect import Established, connect, connect_patiently, resolve
from hast.handshake import MismatchError, PeerError, RefusedError
from hast.messages import (
    HANDSHAKE_LIMIT,
    NO_ACCESS,
    NOT_CONFIGURED,
    SPLIT_BRAIN,
    TOKEN_MISMATCH,
    Refusal,
    SyncSource,
    pack_message,
    resuid_mismatch_text,
    unpack_message,
    wrong_role_text,
)
from hast.metadata import Metadata, Pair
from tests import vectors

STEP1 = vectors.load("hs1_secondary_to_primary")
VIRGIN = vectors.load("hs2_secondary_to_primary_virgin")
MAP = vectors.load("hs2_secondary_to_primary_activemap")
NEWER = vectors.load("hs2_secondary_to_primary_activemap_syncsrc_secondary")
CAPTURED = Metadata("data", 67104256, 2 << 20, 64, 4608, resuid=1650819838102974576)
SECONDS = 20.0  # for a script to end

CONFIG = "resource data {{ local /dev/null timeout {timeout}\non a {{ remote {remote}\n {source}\n }} }}"


def resource(remote: str, timeout: int = 20, source: str = "") -> Resource:
    text = CONFIG.format(remote=remote, timeout=timeout, source=f"source {source}" if source else "")
    return parse(text, "hast.conf", ["a"]).resources["data"]


class Secondary:
    """A listening socket, and a script that plays the secondary on what comes in."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.socket.bind((address, 0))
        self.socket.listen(8)
        host = f"[{address}]" if ":" in address else address
        self.port = self.socket.getsockname()[1]
        self.address = f"{host}:{self.port}"
        self.said: list[bytes] = []  # what the primary sent, message by message
        self.peers: list[Any] = []
        self.connections: list[socket.socket] = []

    async def accept(self) -> socket.socket:
        sock, peer = await asyncio.get_running_loop().sock_accept(self.socket)
        self.connections.append(sock)
        self.peers.append(peer)
        return sock

    async def hear(self, sock: socket.socket) -> None:
        """One message without data."""
        loop = asyncio.get_running_loop()
        message = b""
        while len(message) < 5 or len(message) < 5 + int.from_bytes(message[1:5], "little"):
            part = await loop.sock_recv(sock, 4096)
            assert part, f"closed after {len(message)} bytes"
            message += part
        self.said.append(message)

    async def say(self, sock: socket.socket, message: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(sock, message)

    def close(self) -> None:
        for sock in [self.socket, *self.connections]:
            sock.close()


def extended(message: bytes) -> bytes:
    """A captured message of step 2, with the element that we add to it: ours stands last, and FreeBSD ignores it."""
    main, nv, _ = unpack_message(message, HANDSHAKE_LIMIT)
    nv.add_uint8("hast", 1)
    return pack_message(main.version, nv)


Script = Callable[[Secondary], Awaitable[None]]


def playing(first: bytes = STEP1.raw, second: bytes = VIRGIN.raw, on_second: bytes = b"") -> Script:
    """Say first and second where they belong, and on_second on connection 2."""

    async def script(secondary: Secondary) -> None:
        one = await secondary.accept()
        await secondary.hear(one)
        await secondary.say(one, first)
        two = await secondary.accept()
        await secondary.hear(two)
        await secondary.say(two, on_second)
        await secondary.say(one, second)

    return script


async def play(
    secondary: Secondary,
    script: Script,
    body: Callable[[], Awaitable[Established]],
) -> Established:
    """Run body() while the script plays. The secondary's sockets stay open."""
    task = asyncio.get_running_loop().create_task(script(secondary))  # type: ignore[arg-type]
    try:
        made = await body()
        async with asyncio.timeout(SECONDS):
            await task
        return made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def established(
    script: Script,
    metadata: Metadata = CAPTURED,
    *,
    address: str = "127.0.0.1",
    check: Callable[[Secondary, Established], None] = lambda _secondary, _made: None,
    **options: Any,
) -> Secondary:
    """Connect, hand what came of it to check, and close everything."""

    async def body() -> Secondary:
        with contextlib.closing(Secondary(address)) as secondary:
            made = await play(
                secondary, script, lambda: connect(resource(secondary.address), metadata, **options)
            )
            with contextlib.closing(made):
                check(secondary, made)
            return secondary

    return asyncio.run(body())


def failure(
    script: Script, metadata: Metadata = CAPTURED, *, timeout: int = 20, **options: Any
) -> PeerError | RefusedError:
    """Connect in vain: the error. No descriptor is left by that."""

    async def body() -> PeerError | RefusedError:
        with contextlib.closing(Secondary()) as secondary:
            before = descriptors()
            with pytest.raises((PeerError, RefusedError)) as raised:
                await play(
                    secondary, script, lambda: connect(resource(secondary.address, timeout), metadata, **options)
                )
            assert descriptors() - before <= inodes(secondary.connections)
            assert "\n" not in str(raised.value)
            assert str(raised.value).startswith("data: ") and secondary.address in str(raised.value)
            return raised.value

    return asyncio.run(body())


def descriptors() -> set[str]:
    """Sockets and pipes that this process has open."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(entry.readlink()))
    return {name for name in found if name.startswith(("socket:", "pipe:", "anon_inode:"))}


def inodes(sockets: list[socket.socket]) -> set[str]:
    return {str(Path(f"/proc/self/fd/{sock.fileno()}").readlink()) for sock in sockets}


@pytest.fixture(autouse=True)
def no_child_left() -> Iterator[None]:
    """Look-ups are children: none may be left, not even as a zombie."""
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


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


# Names.


def test_a_name_that_has_a_dead_address_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child that looks it up is a fork: it has what is patched here."""

    async def body() -> None:
        with contextlib.closing(Secondary()) as secondary, contextlib.closing(Secondary("127.9.9.9")) as dead:
            dead.socket.close()
            kind = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
            answer = [
                (socket.AF_INET, *kind, ("127.9.9.9", dead.port)),
                (socket.AF_INET, *kind, ("127.0.0.1", secondary.port)),
            ]
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_: answer)
            config = resource(f"peer.example:{secondary.port}")
            (await play(secondary, playing(), lambda: connect(config, CAPTURED))).close()

    asyncio.run(body())


def test_names_are_looked_up_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
    asked = (os.getpid(), "peer.example", 99, socket.AF_INET6)

    def look_up(*what: Any) -> list[Any]:
        assert (os.getpid(), *what[:3]) != asked and what[:3] == asked[1:]
        return [(socket.AF_INET6, *kind, ("2001:db8::1", 99, 0, 0))] * 40

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    found = asyncio.run(resolve("data", parse_address("tcp6://peer.example:99")))
    assert found == [(socket.AF_INET6, ("2001:db8::1", 99, 0, 0))] * 16


def test_ip_addresses_are_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect_module, "fork", lambda *_: pytest.fail("a child was forked"))
    found = [asyncio.run(resolve("data", parse_address(text))) for text in ("10.0.0.1:5", "[2001:db8::2]:6")]
    assert found == [[(socket.AF_INET, ("10.0.0.1", 5))], [(socket.AF_INET6, ("2001:db8::2", 6))]]


def refuse_name(*_: Any) -> list[Any]:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def die(*_: Any) -> list[Any]:
    os._exit(3)


@pytest.mark.parametrize(
    ("look_up", "text"),
    [
        (refuse_name, "Name or service not known"),
        (lambda *_: [], "it has none"),
        (die, "the look-up died"),
    ],
)
def test_a_name_without_address(look_up: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(PeerError) as raised:
        asyncio.run(connect(resource("peer.example"), CAPTURED))
    assert str(raised.value) == f"data: cannot look up the address of peer.example: {text}"


def test_a_name_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: time.sleep(1000))
    before = descriptors()
    with pytest.raises(PeerError) as raised:
        asyncio.run(connect(resource("peer.example", 1), CAPTURED))
    assert str(raised.value) == "data: peer.example: looking up peer.example failed: it took more than 1 s"
    assert descriptors() <= before


# It does not work.


def test_nobody_listens() -> None:
    with contextlib.closing(Secondary()) as secondary:
        pass
    with pytest.raises(PeerError) as raised:
        asyncio.run(connect(resource(secondary.address), CAPTURED))
    assert str(raised.value) == f"data: {secondary.address}: connecting failed: Connection refused"


def test_a_source_that_this_machine_does_not_have() -> None:
    with contextlib.closing(Secondary()) as secondary, pytest.raises(PeerError) as raised:
        asyncio.run(connect(resource(secondary.address, source="192.0.2.77"), CAPTURED))
    assert str(raised.value).endswith(
        "connecting failed: Cannot assign requested address, for the source address 192.0.2.77"
    )


def test_a_source_of_the_other_family(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = [(socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("::1", 1, 0, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: answer)
    with pytest.raises(PeerError, match="one is IPv4 and the other IPv6"):
        asyncio.run(connect(resource("peer.example:1", source="127.0.0.1"), CAPTURED))


def stopping(where: int, then: Callable[[Secondary], Awaitable[None]]) -> Script:
    """Play the handshake up to a point, then do something else."""

    async def script(secondary: Secondary) -> None:
        one = await secondary.accept()
        if where >= 1:
            await secondary.hear(one)
        if where >= 2:
            await secondary.say(one, STEP1.raw[:3] if where == 2 else STEP1.raw[:20] if where == 3 else STEP1.raw)
        if where >= 5:
            two = await secondary.accept()
        if where >= 6:
            await secondary.hear(two)
        if where >= 7:
            cuts = {7: 4, 8: 100, 9: len(NEWER.raw) - len(NEWER.data), 10: len(NEWER.raw) - 1}
            await secondary.say(one, NEWER.raw[: cuts[where]])
        await then(secondary)

    return script


WHERE = {
    0: "handshake step 1",
    1: "handshake step 1",
    2: "handshake step 1",
    3: "handshake step 1",
    4: "handshake step 2",
    5: "handshake step 2",
    6: "handshake step 2",
    7: "handshake step 2",
    8: "handshake step 2",
    9: "the activemap of handshake step 2",
    10: "the activemap of handshake step 2",
}


def test_a_peer_that_hangs_at_each_step() -> None:
    """All at once, because each takes the whole second."""

    async def nothing(_: Secondary) -> None:
        await asyncio.sleep(1000)

    async def one(where: int) -> str:
        with contextlib.closing(Secondary()) as secondary:
            with pytest.raises(PeerError) as raised:
                await play(
                    secondary,
                    stopping(where, nothing),
                    lambda: connect(resource(secondary.address, 1), CAPTURED),
                )
            return str(raised.value).removeprefix(f"data: {secondary.address}: ")

    async def all_of_them() -> list[str]:
        before = descriptors()
        errors = await asyncio.gather(*map(one, WHERE))
        assert descriptors() <= before
        return list(errors)

    assert asyncio.run(all_of_them()) == [f"{what} failed: it took more than 1 s" for what in WHERE.values()]


@pytest.mark.parametrize("where", list(WHERE))
def test_a_peer_that_closes_at_each_step(where: int) -> None:
    async def close(secondary: Secondary) -> None:
        secondary.socket.close()
        for sock in secondary.connections:
            sock.shutdown(socket.SHUT_RDWR)

    error = failure(stopping(where, close))
    # Between the steps, it is seen at whatever comes next.
    assert "failed: " in str(error) and ("closed after" in str(error) or "onnection re" in str(error))


@pytest.mark.parametrize("where", [5, 6])
def test_a_peer_that_closes_the_second_connection_only(where: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect_module, "LAST_WORDS_SECONDS", 0.1)

    async def close(secondary: Secondary) -> None:
        secondary.connections[1].shutdown(socket.SHUT_RDWR)

    error = failure(stopping(where, close))
    assert "handshake step 2 failed: " in str(error)


def test_an_answer_on_the_first_connection_counts_although_the_second_was_closed() -> None:
    refusal = vectors.load("hs2_error_splitbrain").raw

    async def script(secondary: Secondary) -> None:
        await playing(second=b"")(secondary)
        secondary.connections[1].shutdown(socket.SHUT_RDWR)
        await asyncio.sleep(0.05)
        await secondary.say(secondary.connections[0], refusal)

    error = failure(script)
    assert isinstance(error, RefusedError) and error.split_brain


GARBAGE = {
    "a web server": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "version 72"),
    "a higher version": (b"\3" + STEP1.raw[1:], "version 3"),
    "an oversize header": (b"\2" + (1 << 20 | 1).to_bytes(4, "little"), "1048577 bytes"),
    "the largest header": (b"\2\xff\xff\xff\xff", "4294967295 bytes"),
    "bad nv": (b"\2\x08\0\0\0" + b"\xff" * 8, "nv"),
    "an empty message": (b"\2\0\0\0\0", "is missing"),
    "something else": (vectors.load("keepalive").raw, "is missing"),
}


@pytest.mark.parametrize("what", list(GARBAGE))
@pytest.mark.parametrize("step", [1, 2])
def test_garbage(what: str, step: int) -> None:
    message, text = GARBAGE[what]
    error = failure(playing(first=message) if step == 1 else playing(second=message))
    assert isinstance(error, PeerError) and f"handshake step {step} failed: " in str(error)
    assert text in str(error)


def test_an_answer_on_the_second_connection() -> None:
    error = failure(playing(second=b"", on_second=VIRGIN.raw))
    assert str(error).endswith("handshake step 2 failed: the peer answers on the second connection")


@pytest.mark.parametrize(
    ("name", "wait"),
    [("hs1_error_role_init", False), ("hs1_error_unknown_resource", False), ("hs1_error_wrong_role_wait", True)],
)
def test_captured_refusals_of_step_1(name: str, wait: bool) -> None:
    error = failure(playing(first=vectors.load(name).raw))
    assert isinstance(error, RefusedError) and error.wait is wait and not error.split_brain
    assert error.text == vectors.load(name).elements[0][2]


@pytest.mark.parametrize("name", ["hs2_error_splitbrain", "hs2_error_resuid_mismatch", "hs2_error_token_mismatch"])
def test_captured_refusals_of_step_2(name: str) -> None:
    error = failure(playing(second=vectors.load(name).raw))
    assert isinstance(error, RefusedError) and not error.wait
    assert error.split_brain is (name == "hs2_error_splitbrain")


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(
    "text",
    [
        NOT_CONFIGURED,
        NO_ACCESS,
        TOKEN_MISMATCH,
        SPLIT_BRAIN,
        wrong_role_text("init"),
        wrong_role_text("primary"),
        resuid_mismatch_text(1, 2),
        "Something that nobody knows.\nTwo lines",
    ],
)
def test_refusals(step: int, text: str) -> None:
    message = pack_message(2, Refusal(text).to_nv())
    error = failure(playing(first=message) if step == 1 else playing(second=message))
    assert isinstance(error, RefusedError)
    assert error.text == text.replace("\n", "\\n")


def test_a_token_that_is_not_known_is_said_on_the_second_connection() -> None:
    error = failure(playing(second=b"", on_second=vectors.load("hs2_error_token_mismatch").raw))
    assert isinstance(error, RefusedError) and error.text == TOKEN_MISMATCH


@pytest.mark.parametrize("changes", [{"datasize": 67104768}, {"extentsize": 1 << 20}])
def test_a_component_of_other_sizes(changes: dict[str, int]) -> None:
    error = failure(playing(second=MAP.raw), replace(CAPTURED, **changes))  # type: ignore[arg-type]
    assert isinstance(error, MismatchError) and "another" in str(error)


def test_a_map_of_another_size() -> None:
    at = MAP.raw.index(b"mapsize\0") + 8
    message = MAP.raw[:at] + (1 << 20).to_bytes(4, "little") + MAP.raw[at + 4 :]
    assert "an activemap of 1048576 bytes" in str(failure(playing(second=message)))


def test_a_damaged_map() -> None:
    message = MAP.raw[:-4] + b"\1\2\0\0"  # stands for 513 bytes
    assert "513 bytes, 512 were announced" in str(failure(playing(second=message)))


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


def test_cancelled_while_a_name_is_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun = tmp_path / "begun"

    def hang(*_: Any) -> None:
        begun.touch()
        time.sleep(1000)

    async def body() -> None:
        task = asyncio.create_task(connect(resource("peer.example"), CAPTURED))
        async with asyncio.timeout(SECONDS):
            while not begun.exists():
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    before = descriptors()
    asyncio.run(body())
    assert descriptors() <= before


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
