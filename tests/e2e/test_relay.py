"""The relay that is the network that fails: each kind of trouble, as both ends see it."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.e2e.node import DEADLINE, eventually, loopback
from tests.e2e.relay import Relay, Way


@dataclass
class Ends:
    relay: Relay
    server: socket.socket

    def connect(self) -> socket.socket:
        host, _, port = self.relay.url.removeprefix("tcp4://").rpartition(":")
        return socket.create_connection((host, int(port)), DEADLINE)

    def both(self) -> tuple[socket.socket, socket.socket]:
        """A connection, as who made it and as who took it."""
        near = self.connect()
        far, _ = self.server.accept()
        far.settimeout(DEADLINE)
        near.sendall(b"!")
        assert far.recv(1) == b"!"
        return near, far


@pytest.fixture
def ends() -> Iterator[Ends]:
    address = loopback(random.randrange(1 << 20))
    with socket.create_server((address, 0)) as server:
        server.settimeout(DEADLINE)
        relay = Relay(loopback(random.randrange(1 << 20)))
        relay.target(address, address, server.getsockname()[1])
        yield Ends(relay, server)
        relay.close()


def silent(sock: socket.socket) -> bool:
    """Nothing is to be read now, not even an end."""
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        sock.recv(1)
        return False
    sock.settimeout(DEADLINE)
    return True


def test_what_is_held_back_arrives_late(ends: Ends) -> None:
    near, far = ends.both()
    ends.relay.trouble(there=Way(hold=True))
    near.sendall(b"late")
    near.close()  # who sent it is gone, as a primary is that has given up
    assert silent(far)
    ends.relay.heal()
    assert far.recv(100) == b"late"
    assert far.recv(100) == b""


def test_one_direction_only(ends: Ends) -> None:
    near, far = ends.both()
    ends.relay.trouble(there=Way(hold=True))
    far.sendall(b"answer")
    assert near.recv(100) == b"answer"


def test_what_is_swallowed_never_arrives_and_ends_the_connection(ends: Ends) -> None:
    near, far = ends.both()
    ends.relay.trouble(there=Way(swallow=True))
    near.sendall(b"x" * 1000)
    eventually(lambda: ends.relay.sent == 1001, "it is swallowed")
    assert silent(far)
    ends.relay.heal()
    assert far.recv(100) == near.recv(100) == b""


def test_a_connection_that_lost_nothing_goes_on(ends: Ends) -> None:
    near, far = ends.both()
    ends.relay.trouble(there=Way(swallow=True))
    ends.relay.heal()
    near.sendall(b"well")
    assert far.recv(100) == b"well"


def test_cut_after_so_many_bytes(ends: Ends) -> None:
    near, far = ends.both()
    ends.relay.trouble(there=Way(cut_after=7))
    near.sendall(b"0123")
    assert far.recv(100) == b"0123"
    near.sendall(b"456789")
    assert far.recv(100) == b"456"
    assert far.recv(100) == near.recv(100) == b""


@pytest.mark.parametrize("near_ends", [True, False])
def test_half_open(ends: Ends, near_ends: bool) -> None:
    near, far = ends.both()
    told, other = (near, far) if near_ends else (far, near)
    ends.relay.forget(near_ends)
    assert told.recv(100) == b""
    other.sendall(b"hello?")
    assert silent(other)
    ends.relay.heal()
    assert other.recv(100) == b""


def test_who_connects_in_a_black_hole_is_served_when_it_is_over(ends: Ends) -> None:
    ends.relay.trouble(Way(swallow=True), Way(swallow=True))
    near = ends.connect()
    near.sendall(b"anybody there?")
    ends.relay.heal()
    far, _ = ends.server.accept()
    assert far.recv(100) == b"anybody there?"


def test_throttle(ends: Ends) -> None:
    """All of it comes, in order."""
    near, far = ends.both()
    ends.relay.trouble(there=Way(rate=10e6, delay=0.001))
    data = random.Random(1).randbytes(1 << 20)
    near.sendall(data)
    near.shutdown(socket.SHUT_WR)
    got = b""
    while piece := far.recv(1 << 20):
        got += piece
    assert got == data
