"""The primary connects: two connections and the handshake over them (docs/protocol.md section 3).

Invariants:
- All of it takes `timeout` seconds at most, whatever the peer, the network or the name server does or does not do.
- No thread is started: the worker forks its stages. Names are resolved in a short-lived child.
- Whatever ends it early, being cancelled included, leaves no socket open and no child behind.
- Every error is one line that names the peer.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hast.address import Address, literal_family
from hast.channel import Channel, Message
from hast.config import Resource
from hast.errors import DataError, ProtocolError
from hast.handshake import Agreement, PeerError, PrimaryHandshake, RefusedError
from hast.messages import FIRST_VERSION, PROTOCOL_VERSION, Refusal, pack_message
from hast.metadata import Metadata, Pair
from hast.notice import Notice, parse_reply
from hast.nv import Nv
from hast.sockio import read_exactly, read_message, watch, write_all
from hast.stages.launch import fork

WAIT_SECONDS = 1.0  # between attempts while the peer says that it may become secondary soon
LAST_WORDS_SECONDS = 1.0  # for an answer on connection 1 once connection 2 was closed
MAX_ADDRESSES = 16  # of a name that are tried
IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h; other systems refuse it and do without

Endpoint = tuple[int, tuple[Any, ...]]  # address family, socket address with an IP address in it
Route = tuple[Endpoint, Endpoint | None]  # to, and from


@dataclass(frozen=True)
class Established:
    """Two connections whose handshake is done, non-blocking; the caller closes them.

    out is connection 1, for requests, incoming connection 2, for replies; peer is the address for messages; route:
    how to get there once more.
    """

    out: socket.socket
    incoming: socket.socket
    peer: str
    agreement: Agreement
    route: Route

    def close(self) -> None:
        self.out.close()
        self.incoming.close()


class Progress:
    """What is being waited for, for the error when the time is over."""

    def __init__(self) -> None:
        self.waiting = ""


async def connect(
    resource: Resource, metadata: Metadata, *, version: int = FIRST_VERSION, virgin: bool = False, keepmap: bool = False
) -> Established:
    """Connect to `resource.remote` and agree with the secondary there, within `resource.timeout` seconds.

    metadata is this node's, with a primary's pair and a resuid; version the one in force when there was a connection
    before; virgin, keepmap: see PrimaryHandshake. What is in the result's agreement is to be stored before a request is
    sent.
    Raises RefusedError when the peer says no, PeerError for everything else that can be the peer's or the network's
    fault (MismatchError among them), SystemCallError.
    """
    assert resource.remote is not None
    progress = Progress()
    try:
        async with asyncio.timeout(resource.timeout):
            return await _connect(resource, metadata, version, (virgin, keepmap), progress)
    except OSError as error:  # TimeoutError is one
        late = isinstance(error, TimeoutError) and error.errno is None
        why = f"it took more than {resource.timeout} s" if late else error.strerror
    except (DataError, ProtocolError) as error:
        why = str(error)
    raise PeerError(f"{resource.name}: {resource.remote}: {progress.waiting} failed: {why}")


async def connect_patiently(
    resource: Resource, metadata: Metadata, *, version: int = FIRST_VERSION, virgin: bool = False, keepmap: bool = False
) -> Established:
    """connect(), again each second while the peer says that it may become secondary soon, for `timeout` seconds.

    For a primary that starts: before that it should not write alone. Raises as connect() does.
    """
    refused: RefusedError | None = None
    try:
        async with asyncio.timeout(resource.timeout):
            while True:
                try:
                    return await connect(resource, metadata, version=version, virgin=virgin, keepmap=keepmap)
                except RefusedError as error:
                    refused = error
                    if not error.wait:
                        raise
                await asyncio.sleep(WAIT_SECONDS)
    except TimeoutError:
        if refused is not None:
            raise refused from None
        raise PeerError(f"{resource.name}: {resource.remote}: it took more than {resource.timeout} s") from None


async def _connect(
    resource: Resource, metadata: Metadata, version: int, words: tuple[bool, bool], progress: Progress
) -> Established:
    assert resource.remote is not None
    peer = str(resource.remote)
    handshake = PrimaryHandshake(metadata, peer, version, *words)
    with contextlib.ExitStack() as sockets:
        out, endpoint, source = await _first_socket(resource, progress)
        sockets.callback(out.close)
        progress.waiting = "handshake step 1"
        await write_all(out, handshake.first())
        request = handshake.first_reply((await read_message(out))[1])
        progress.waiting = "the second connection"
        incoming = await _open(endpoint, source)
        sockets.callback(incoming.close)
        for sock in (out, incoming):
            watch(sock, resource.timeout)
        progress.waiting = "handshake step 2"
        await write_all(incoming, request)
        size = handshake.second_reply(await _second_reply(out, incoming))
        progress.waiting = "the activemap of handshake step 2"
        agreement = handshake.finish(await read_exactly(out, size, "map"))
        sockets.pop_all()
        return Established(out, incoming, peer, agreement, (endpoint, source))


async def tell(resource: Resource, route: Route, token: bytes, word: str) -> Pair | None:
    """Give the secondary a notice (hast/notice.py), within `resource.timeout` seconds; its pair, when that has changed.

    Raises RefusedError when it refuses, PeerError when nobody knows whether it has heeded it.
    """
    target, source = route
    peer = str(resource.remote)
    try:
        async with asyncio.timeout(resource.timeout):
            with await _open(target, source) as sock:
                notice = Notice(resource.name, token, word)
                await write_all(sock, pack_message(PROTOCOL_VERSION, notice.to_nv()))
                reply = parse_reply((await read_message(sock))[1])
    except TimeoutError:
        raise PeerError(f"{resource.name}: {peer} does not answer the notice '{word}'") from None
    except (DataError, ProtocolError, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise PeerError(f"{resource.name}: {peer} cannot be given the notice '{word}': {why}") from error
    if isinstance(reply, Refusal):
        raise RefusedError(resource.name, peer, reply)
    return reply


async def _second_reply(out: socket.socket, incoming: socket.socket) -> Nv:
    """The answer to step 2, from connection 1. A peer that does not know the token says so on connection 2, because it
    cannot know which connection 1 belongs to it. Raises DataError, ProtocolError, OSError."""
    async with _tasks(_message(out), _message(incoming)) as (first, second):
        await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
        if not first.done():
            error = second.exception()
            if error is None and "errmsg" in second.result():
                return second.result()
            if error is None:
                raise ProtocolError("the peer answers on the second connection")
            await asyncio.wait({first}, timeout=LAST_WORDS_SECONDS)
            if not first.done():
                raise error
        return first.result()


async def _message(sock: socket.socket) -> Nv:
    return (await read_message(sock))[1]


@contextlib.asynccontextmanager
async def _tasks(*bodies: Any) -> AsyncIterator[list[asyncio.Task[Nv]]]:
    """Run them at once; none is left afterwards."""
    tasks = [asyncio.get_running_loop().create_task(body) for body in bodies]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# Sockets.


async def _first_socket(resource: Resource, progress: Progress) -> tuple[socket.socket, *Route]:
    """Connection 1, and between which addresses it is. Raises PeerError, OSError."""
    remote, source = resource.remote, resource.source
    assert remote is not None
    name = resource.name
    progress.waiting = f"looking up {remote.host}"
    targets = await resolve(name, remote)
    sources: list[Endpoint] = []
    if source is not None:
        progress.waiting = f"looking up {source.host}"
        sources = await resolve(name, source)
    pairs = list(_pairs(targets, sources if source is not None else None))
    if not pairs:
        raise PeerError(f"{name}: {remote} cannot be reached from {source}: one is IPv4 and the other IPv6")
    progress.waiting = "connecting"
    for target, own in pairs[:-1]:
        # One address of several may be dead: it gets its share of the time only.
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(resource.timeout / len(pairs)):
                return await _open(target, own), target, own
    target, own = pairs[-1]
    return await _open(target, own), target, own


def _pairs(targets: list[Endpoint], sources: list[Endpoint] | None) -> Iterator[tuple[Endpoint, Endpoint | None]]:
    """Each target with the first source of its family; sources is None when any will do."""
    for target in targets:
        if sources is None:
            yield target, None
            continue
        own = next((source for source in sources if source[0] == target[0]), None)
        if own is not None:
            yield target, own


async def _open(target: Endpoint, source: Endpoint | None) -> socket.socket:
    """A connection, non-blocking, with TCP_NODELAY. Raises OSError."""
    family, address = target
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if source is not None:
            _bind(sock, source)
        # asyncio's sock_connect() may start a thread to look up an address.
        with contextlib.suppress(BlockingIOError):
            sock.connect(address)
        await _writable(sock)
        if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, os.strerror(error))
        if sock.getsockname() == sock.getpeername():  # no one listens, and it was given that very port for itself
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        return sock
    except BaseException:
        sock.close()
        raise


def _bind(sock: socket.socket, source: Endpoint) -> None:
    try:
        # The port is chosen when it connects, so that it need not be free for all targets.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind(source[1])
    except OSError as error:
        text = f"{os.strerror(error.errno or 0)}, for the source address {source[1][0]}"
        raise OSError(error.errno, text) from error


async def _writable(sock: socket.socket) -> None:
    """Wait until a connection was made, or was not."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_writer(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(sock)


# Names.


async def resolve(resource: str, address: Address) -> list[Endpoint]:
    """Socket addresses of a TCP endpoint, the best first, at least one. For a name, for as long as it takes: limit it.

    Raises PeerError when there is none, SystemCallError.
    """
    family = literal_family(address.host)
    if family is not None:
        return [(family, (address.host, address.port))]
    ours, theirs = Channel.pair(f"{resource}: look-up of {address.host}")
    with contextlib.closing(ours):
        with contextlib.closing(theirs):
            child = fork(f"hastd: {resource}: look-up", {theirs.fileno()}, _look_up(theirs, address))
        try:
            received = await ours.arecv()
        finally:
            child.kill()
            child.reap()
    answer: Message = received[0] if received is not None else {"error": "the look-up died"}
    if "error" in answer:
        raise PeerError(f"{resource}: cannot look up the address of {address}: {answer['error']}")
    return [(found, tuple(sockaddr)) for found, sockaddr in answer["found"]]


def _look_up(channel: Channel, address: Address) -> Callable[[], int]:
    def body() -> int:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            found = socket.getaddrinfo(address.host, address.port, address.family, socket.SOCK_STREAM)
        except OSError as error:  # socket.gaierror is one
            channel.send({"error": error.strerror})
            return os.EX_NOHOST
        endpoints = [(int(entry[0]), entry[4]) for entry in found[:MAX_ADDRESSES]]
        channel.send({"found": endpoints} if endpoints else {"error": "it has none"})
        return os.EX_OK

    return body
