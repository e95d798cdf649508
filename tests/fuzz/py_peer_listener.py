"""The port for peers: any bytes on up to four connections, between them handshakes that are right. The listener itself,
on socket pairs; the resource only takes notes.

Input: operations. 0 to 3: bytes on a connection (length, bytes); 4: step 1; 5: step 2 with the token that came, or
another one; 6: hang up; 7: the resource's role changes.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

from hast.channel import Message
from hast.config import Resource, parse
from hast.control import Role
from hast.errors import DataError, TemporaryError
from hast.messages import Handshake1Reply, Handshake1Request, Handshake2Request, pack_message, unpack_message
from hast.peerlistener import PeerListener

CONFIG = "resource data { local /dev/data\non a { remote 127.0.0.1 } }\n"
RESOURCE = parse(CONFIG, "hast.conf", ["a"]).resources["data"]
ROLES = (Role.SECONDARY, Role.PRIMARY, Role.INIT)
LOOP = asyncio.new_event_loop()


class Notes:
    """A resource that takes notes."""

    def __init__(self) -> None:
        self.resource: Resource = RESOURCE
        self.role = Role.SECONDARY
        self.handed: list[Message] = []

    def hand_over(self, message: Message, fds: Sequence[int]) -> None:
        assert len(fds) == {"connection": 2, "notice": 1}[str(message["cmd"])]
        for fd in fds:
            socket.socket(fileno=fd).detach()  # they are open
        if len(self.handed) == 3:
            raise TemporaryError("data: no worker")
        self.handed.append(message)

    def disconnect(self) -> None:
        pass


class Peers:
    """The other ends of up to four connections."""

    def __init__(self) -> None:
        self.notes = Notes()
        self.listener = PeerListener({"data": self.notes})
        self.sockets: dict[int, socket.socket] = {}
        self.tasks: list[asyncio.Task[None]] = []
        self.token = bytes(16)
        self.tokens: set[str] = set()

    def connection(self, number: int) -> socket.socket:
        if number not in self.sockets:
            ours, self.sockets[number] = socket.socketpair()
            ours.setblocking(False)
            self.sockets[number].setblocking(False)
            self.tasks.append(asyncio.get_running_loop().create_task(self.listener._greet(ours, None)))
        return self.sockets[number]

    def send(self, number: int, data: bytes) -> None:
        try:
            self.connection(number).send(data)
        except OSError:  # it was closed, or is full
            self.hang_up(number)

    def hang_up(self, number: int) -> None:
        if number in self.sockets:
            self.sockets.pop(number).close()

    def read(self) -> None:
        """Take the tokens that came."""
        for sock in self.sockets.values():
            try:
                reply = Handshake1Reply.from_nv(unpack_message(sock.recv(65536), 65536)[1])
            except (OSError, DataError):
                continue
            self.token = reply.token
            self.tokens.add(reply.token.hex())

    async def settle(self) -> None:
        for _ in range(6):
            await asyncio.sleep(0)
        self.read()


async def converse(data: bytes) -> None:
    peers, pos = Peers(), 0
    while pos < len(data):
        op, number, other = data[pos] & 7, data[pos] >> 3 & 3, data[pos] >> 5
        pos += 1
        if op < 4:
            length = data[pos] if pos < len(data) else 0
            peers.send(number, data[pos + 1 : pos + 1 + length])
            pos += 1 + length
        elif op == 4:
            peers.send(number, pack_message(1, Handshake1Request("data").to_nv()))
        elif op == 5:
            token = bytes((peers.token[0] ^ (other == 7), *peers.token[1:]))
            peers.send(number, pack_message(2, Handshake2Request("data", token, 1, 0, 0).to_nv()))
        elif op == 6:
            peers.hang_up(number)
        else:
            peers.notes.role = ROLES[number % 3]
        await peers.settle()
    for number in range(4):
        peers.hang_up(number)
    await asyncio.gather(*peers.tasks)  # raises what it should have dealt with
    assert len(peers.listener._half_open) <= 1
    await peers.listener.close()
    for message in peers.notes.handed:
        if message["cmd"] == "connection":
            assert message["request"]["token"] in peers.tokens, "handed over without its token"  # type: ignore[index]


def check(data: bytes) -> None:
    LOOP.run_until_complete(asyncio.wait_for(converse(data), 30))
