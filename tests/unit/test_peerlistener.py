"""Two connections become a pair: tokens, replacement, deadlines, limits. The resource is one that only takes notes,
the peer is scripted, everything between them is real."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hast import peerlistener
from hast.address import Address, parse_address
from hast.channel import Message
from hast.config import Resource, parse
from hast.control import Role
from hast.errors import TemporaryError, UnavailableError
from hast.handshake import request_from_dict
from hast.messages import (
    HANDSHAKE_LIMIT,
    Handshake1Request,
    Handshake2Request,
    pack_message,
    unpack_message,
    wrong_role_text,
)
from hast.notice import Notice
from hast.nv import Nv
from hast.peerlistener import PeerListener
from tests import vectors
from tests.e2e.node import own_address

SECONDS = 20.0  # for anything to happen
HELLO = vectors.load("hs1_primary_to_secondary").raw
_numbers = itertools.count()
CONFIG = "resource {name} {{ local /dev/{name}\ntimeout {timeout}\non a {{ remote {remote} }} }}\n"


def make_resource(name: str = "data", remote: str = "127.0.0.1", timeout: int = 20) -> Resource:
    text = CONFIG.format(name=name, remote=remote, timeout=timeout)
    return parse(text, "hast.conf", ["a"]).resources[name]


class Notes:
    """A resource of this node that takes notes of what it is given."""

    def __init__(self, resource: Resource, role: Role = Role.SECONDARY) -> None:
        self.resource = resource
        self.role = role
        self.events: list[str] = []
        self.given: list[tuple[Message, list[socket.socket]]] = []
        self.fails = False

    def hand_over(self, message: Message, fds: Sequence[int]) -> None:
        if self.fails:
            raise TemporaryError("data: no secondary worker is running at the moment")
        self.events.append("connection")
        self.given.append((message, [socket.socket(fileno=os.dup(fd)) for fd in fds]))

    def disconnect(self) -> None:
        self.events.append("disconnect")


class Scene:
    """A listener on a port of its own, and peers."""

    def __init__(self, targets: dict[str, Notes]) -> None:
        self.targets = targets
        self.listener = PeerListener(targets)
        self.address = free_address()
        self.sockets: list[socket.socket] = []

    @property
    def notes(self) -> Notes:
        return self.targets["data"]

    async def connect(self, source: str = "127.0.0.1", to: Address | None = None) -> socket.socket:
        to = to or self.address
        family = socket.AF_UNIX if to.is_unix else socket.AF_INET6 if to.protocol == "tcp6" else socket.AF_INET
        sock = socket.socket(family)
        self.sockets.append(sock)
        sock.setblocking(False)
        if family == socket.AF_INET:
            sock.bind((source, 0))
        where: Any = to.path if to.is_unix else (to.host, to.port)
        await asyncio.get_running_loop().sock_connect(sock, where)
        return sock

    async def hello(self, message: bytes, source: str = "127.0.0.1", to: Address | None = None) -> socket.socket:
        sock = await self.connect(source, to)
        await asyncio.get_running_loop().sock_sendall(sock, message)
        return sock

    async def first(self, message: bytes = HELLO) -> tuple[socket.socket, bytes]:
        """A first connection that is accepted, and its token."""
        sock = await self.hello(message)
        nv = unpack_message(await hear(sock), HANDSHAKE_LIMIT)[1]
        return sock, nv.get_uint8_array("token")

    def close(self) -> None:
        for notes in self.targets.values():
            for _, sockets in notes.given:
                self.sockets += sockets
        for sock in self.sockets:
            sock.close()


def free_address(host: str = "") -> Address:
    """One that no other test uses; the port is none that the system chooses by itself."""
    number = next(_numbers)
    return parse_address(f"{host or own_address()}:{20000 + (os.getpid() * 50 + number) % 10000}")


async def hear(sock: socket.socket) -> bytes:
    """One message without data; empty when the connection is closed instead."""
    loop = asyncio.get_running_loop()
    message = b""
    async with asyncio.timeout(SECONDS):
        while len(message) < 5 or len(message) < 5 + int.from_bytes(message[1:5], "little"):
            try:
                part = await loop.sock_recv(sock, 1)
            except ConnectionResetError:
                part = b""
            if not part:
                assert not message, f"closed in the middle: {message!r}"
                return b""
            message += part
    return message


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


def step2(token: bytes, resource: str = "data") -> bytes:
    request = Handshake2Request(resource, token, 2**64 - 1, 2**63, 7, True)
    return pack_message(2, request.to_nv())


@contextlib.asynccontextmanager
async def listening(*targets: Notes) -> AsyncIterator[Scene]:
    scene = Scene({notes.resource.name: notes for notes in targets or [Notes(make_resource())]})
    scene.listener.bind([scene.address])
    scene.listener.start()
    try:
        yield scene
    finally:
        await scene.listener.close()
        scene.close()


def scene(test: Callable[[Scene], Awaitable[None]], *targets: Notes) -> None:
    async def body() -> None:
        async with listening(*targets) as made:
            await test(made)

    asyncio.run(body())


# Pairs.


@pytest.mark.parametrize(("highest", "in_force"), [(None, 1), (1, 1), (2, 2), (9, 2), (255, 2)])
def test_both_connections_go_to_the_worker(highest: int | None, in_force: int) -> None:
    nv = Nv()
    nv.add_string("resource", "data")
    if highest is not None:
        nv.add_uint8("version", highest)

    async def test(scene: Scene) -> None:
        one = await scene.hello(pack_message(1, nv))
        answer = await hear(one)
        main, told, _ = unpack_message(answer, HANDSHAKE_LIMIT)
        assert main.version == told.get_uint8("version") == in_force
        two = await scene.hello(step2(told.get_uint8_array("token")) + b"early")
        await until(lambda: scene.notes.given)
        ((message, (first, second)),) = scene.notes.given
        assert message["cmd"] == "connection" and message["version"] == in_force
        request = Handshake2Request("data", told.get_uint8_array("token"), 2**64 - 1, 2**63, 7, True)
        assert request_from_dict(message["request"]) == request
        host, port = two.getsockname()
        assert message["peer"] == f"{host}:{port}"
        for theirs, ours, data in ((one, first, b"request"), (two, second, b"early")):
            if data == b"request":
                theirs.send(data)
            ours.settimeout(SECONDS)
            assert ours.recv(100) == data  # what follows step 2 was left to be read
            assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        scene.close()  # now nobody else holds them
        assert scene.notes.events == ["disconnect", "connection"]

    scene(test)


def test_captured_answer_with_a_token_of_its_own() -> None:
    async def test(scene: Scene) -> None:
        vector = vectors.load("hs1_secondary_to_primary")
        tokens = set()
        for _ in range(5):
            sock = await scene.hello(HELLO)
            answer = await hear(sock)
            assert len(answer) == len(vector.raw) and answer[:-16] == vector.normal[:-16]
            tokens.add(answer[-16:])
        assert len(tokens) == 5

    scene(test)


def test_a_connection_is_closed_here_once_it_was_given_away() -> None:
    """Else a worker that dies would leave its peer with a connection that nobody reads."""

    async def test(scene: Scene) -> None:
        one, token = await scene.first()
        two = await scene.hello(step2(token))
        await until(lambda: scene.notes.given)
        scene.notes.given[0][1][0].close()
        scene.notes.given[0][1][1].close()
        assert await hear(one) == b"" and await hear(two) == b""

    scene(test)


def test_a_wrong_token_is_refused_and_does_no_harm() -> None:
    async def test(scene: Scene) -> None:
        known = vectors.load("hs2_error_token_mismatch").normal
        assert await hear(await scene.hello(step2(bytes(16)))) == known  # no first connection at all
        _, token = await scene.first()
        wrong = await scene.hello(step2(token[::-1]))
        assert await hear(wrong) == known and await hear(wrong) == b""
        await scene.hello(step2(token))
        await until(lambda: scene.notes.given)
        assert await hear(await scene.hello(step2(token))) == known  # it works once
        assert len(scene.notes.given) == 1

    scene(test)


def test_a_token_of_another_resource_is_refused() -> None:
    async def test(scene: Scene) -> None:
        _, token = await scene.first()
        other = await scene.hello(step2(token, "other"))
        assert await hear(other) == vectors.load("hs2_error_token_mismatch").normal

    scene(test, Notes(make_resource()), Notes(make_resource("other")))


def test_a_new_first_connection_cancels_the_old_one() -> None:
    async def test(scene: Scene) -> None:
        old, old_token = await scene.first()
        new, token = await scene.first()
        assert await hear(old) == b""
        known = vectors.load("hs2_error_token_mismatch").normal
        assert await hear(await scene.hello(step2(old_token))) == known
        await scene.hello(step2(token))
        await until(lambda: scene.notes.given)
        assert scene.notes.events == ["disconnect", "disconnect", "connection"]
        await scene.first()  # and a full one
        assert scene.notes.events[3:] == ["disconnect"]
        scene.notes.given[0][1][0].send(b"x")
        assert await asyncio.get_running_loop().sock_recv(new, 1) == b"x"  # closing it is the worker's part

    scene(test)


def test_connections_of_different_resources_do_not_disturb_each_other() -> None:
    async def test(scene: Scene) -> None:
        hellos = {name: pack_message(1, Handshake1Request(name).to_nv()) for name in scene.targets}
        tokens = {name: (await scene.first(message))[1] for name, message in hellos.items()}
        for name, token in tokens.items():
            await scene.hello(step2(token, name))
        await until(lambda: all(notes.given for notes in scene.targets.values()))
        for name, notes in scene.targets.items():
            assert notes.given[0][0]["request"]["resource"] == name

    scene(test, *(Notes(make_resource(f"r{n}")) for n in range(40)))


def test_a_notice_goes_to_the_worker_beside_the_connections() -> None:
    async def test(scene: Scene) -> None:
        _, token = await scene.first()
        notice = await scene.hello(pack_message(2, Notice("data", bytes(16), "synced").to_nv()))
        await until(lambda: scene.notes.given)
        message, (sock,) = scene.notes.given[0]
        assert message == {"cmd": "notice", "token": "00" * 16, "word": "synced", "peer": message["peer"]}
        sock.send(b"x")
        assert await asyncio.get_running_loop().sock_recv(notice, 1) == b"x"
        # The handshake that is under way is not disturbed.
        await scene.hello(step2(token))
        await until(lambda: len(scene.notes.given) == 2)

    scene(test)


@pytest.mark.parametrize("role", [Role.INIT, Role.PRIMARY])
def test_a_notice_for_a_node_that_is_not_secondary_is_refused(role: Role) -> None:
    async def test(scene: Scene) -> None:
        notice = await scene.hello(pack_message(2, Notice("data", bytes(16), "synced").to_nv()))
        refused = unpack_message(await hear(notice), HANDSHAKE_LIMIT)[1]
        assert refused.get_string("errmsg") == wrong_role_text(role.text)
        assert not scene.notes.given

    scene(test, Notes(make_resource(), role))


# When it does not come to that.


def test_a_second_connection_that_does_not_come() -> None:
    async def test(scene: Scene) -> None:
        one, token = await scene.first()
        assert await hear(one) == b""  # after a second
        refused = await hear(await scene.hello(step2(token)))
        assert refused == vectors.load("hs2_error_token_mismatch").normal

    scene(test, Notes(make_resource(timeout=1)))


def test_the_role_changes_between_the_steps() -> None:
    async def test(scene: Scene) -> None:
        one, token = await scene.first()
        scene.notes.role = Role.INIT
        scene.listener.forget("data")
        assert await hear(one) == b""
        refused = unpack_message(await hear(await scene.hello(step2(token))), HANDSHAKE_LIMIT)[1]
        assert refused.get_string("errmsg") == wrong_role_text("init")
        scene.notes.role = Role.SECONDARY
        known = vectors.load("hs2_error_token_mismatch").normal
        assert await hear(await scene.hello(step2(token))) == known

    scene(test)


def test_a_worker_that_is_not_there_at_that_moment(caplog: pytest.LogCaptureFixture) -> None:
    async def test(scene: Scene) -> None:
        scene.notes.fails = True
        one, token = await scene.first()
        two = await scene.hello(step2(token))
        assert await hear(one) == b"" and await hear(two) == b""
        assert "no secondary worker is running" in caplog.text
        scene.notes.fails = False
        _, token = await scene.first()
        await scene.hello(step2(token))
        await until(lambda: scene.notes.given)

    scene(test)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_the_listener_ends_in_the_middle(step: int) -> None:
    async def test(scene: Scene) -> None:
        sock = await scene.connect()
        if step == 1:
            await asyncio.get_running_loop().sock_sendall(sock, HELLO[:30])
            await until(lambda: scene.listener._greeting)
        if step == 2:
            await asyncio.get_running_loop().sock_sendall(sock, HELLO)
            assert await hear(sock)
        await scene.listener.close()
        assert await hear(sock) == b""
        with pytest.raises(OSError):
            await scene.connect()

    scene(test)


def test_one_address_cannot_have_all_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest of that address makes room; others are not touched, and who talks at once is served."""
    monkeypatch.setattr(peerlistener, "ADDRESS_LIMIT", 3)

    async def test(scene: Scene) -> None:
        other = await scene.connect("127.0.0.2")
        await until(lambda: len(scene.listener._greeting) == 1)
        flood = [await scene.connect() for _ in range(20)]
        for sock in flood[:13]:
            assert await hear(sock) == b""
        assert len(scene.listener._greeting) <= 1 + 3 + 2 * 2
        _, token = await scene.first()
        await scene.hello(step2(token))
        await until(lambda: scene.notes.given)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(other, pack_message(1, Handshake1Request("other").to_nv()))
        assert await hear(other)

    scene(test, Notes(make_resource()), Notes(make_resource("other", "127.0.0.2")))


def test_all_addresses_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peerlistener, "TOTAL_LIMIT", 4)

    async def test(scene: Scene) -> None:
        silent = [await scene.connect(f"127.0.0.{n + 1}") for n in range(8)]
        for sock in silent[:4]:
            assert await hear(sock) == b""
        assert len(scene.listener._greeting) <= 4

    scene(test, *(Notes(make_resource(f"r{n}", f"127.0.0.{n + 1}")) for n in range(8)))


# Where it listens.


def test_ipv6_and_unix_sockets(tmp_path: Path) -> None:
    unix = parse_address(f"uds://{tmp_path}/peer")

    async def test(scene: Scene) -> None:
        scene.listener.bind([unix])
        scene.listener.start()
        known = vectors.load("hs1_secondary_to_primary").normal[:-16]
        assert (await hear(await scene.hello(HELLO, to=unix)))[:-16] == known
        six = free_address("[::1]")
        try:
            scene.listener.bind([six])
        except UnavailableError as error:
            pytest.skip(f"no IPv6 here: {error}")
        scene.listener.start()
        hello = pack_message(1, Handshake1Request("six").to_nv())
        assert (await hear(await scene.hello(hello, to=six)))[:-16] == known

    scene(test, Notes(make_resource()), Notes(make_resource("six", "tcp6://::1")))
    assert list(tmp_path.iterdir()) == []


def test_a_resource_without_remote_has_no_peer_on_a_unix_socket_either(tmp_path: Path) -> None:
    unix = parse_address(f"uds://{tmp_path}/peer")

    async def test(scene: Scene) -> None:
        scene.listener.bind([unix])
        scene.listener.start()
        assert await hear(await scene.connect(to=unix)) == b""

    scene(test, Notes(make_resource(remote="none")))


def test_listening_elsewhere(tmp_path: Path) -> None:
    """Connections that wait are kept, addresses that stay are not closed in between."""
    unix = parse_address(f"uds://{tmp_path}/peer")

    async def test(scene: Scene) -> None:
        _, token = await scene.first()
        await scene.listener.relisten([scene.address, unix])
        await scene.hello(step2(token), to=unix)
        await until(lambda: scene.notes.given)
        taken = free_address()
        with socket.socket() as other:
            other.bind((taken.host, taken.port))
            other.listen()
            with pytest.raises(TemporaryError, match="in use"):
                await scene.listener.relisten([taken])
        await scene.first()  # that changed nothing
        await scene.listener.relisten([unix])
        with pytest.raises(ConnectionRefusedError):
            await scene.connect()
        assert await hear(await scene.hello(HELLO, to=unix))

    scene(test)
