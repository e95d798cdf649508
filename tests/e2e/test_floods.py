"""Floods: thousands of connections that say nothing, or little, at each of hastd's sockets. Whoever has something to
say is served meanwhile; memory and descriptors stay within bounds that do not depend on how many connect."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hast.control_server import CLIENT_LIMIT
from hast.device.nbd import OPTION_MAGIC
from hast.messages import Handshake1Request, pack_message
from hast.peerlistener import ADDRESS_LIMIT
from tests.e2e.node import MIB, Node, eventually, own_address
from tests.e2e.pair import Pair
from tests.nbdclient import RawClient

PORT = 8457
SECONDS = 60.0
CONTROL, PEERS, NEGOTIATIONS, CLIENTS = 10_000, 2_000, 240, 400  # connections of each flood
NBD_LIMIT = 256  # HAST_NBD_CLIENTS_MAX in hast/ffi/nbd.h
GROWTH = 32 * MIB  # of a process's memory, whatever comes
SPARE = 16  # descriptors that a process may have for other reasons
BLOCK = 4096


def memory(pid: int) -> int:
    """Resident memory of a process, bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:"))


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def main(node: Node) -> int:
    assert node.hastd is not None
    return node.hastd.pid


def process(node: Node, ending: str) -> int:
    """The pid of the node's process whose title ends so."""
    return next(pid for pid, title in node.titles().items() if title.endswith(ending))


@contextlib.contextmanager
def bounded(allowed: dict[int, int]) -> Iterator[None]:
    """Memory and descriptors of processes stay within bounds: pid to descriptors more than before."""
    before = {pid: (memory(pid), descriptors(pid)) for pid in allowed}
    yield
    for pid, (size, fds) in before.items():
        assert memory(pid) <= size + GROWTH
        assert descriptors(pid) <= fds + allowed[pid] + SPARE


@pytest.fixture(autouse=True)
def many_descriptors() -> Iterator[None]:
    """The flood is this process's: it needs as many as it makes connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONTROL + 1000
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"{wanted} descriptors are needed, {hard} are the limit here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def status_says(node: Node, role: str) -> bool:
    """One that was too slow to speak may have had to make room; who runs it again is heard."""
    done = node.ctl("status", "--json", node.name("disk"), check=False)
    assert done.returncode != 0 or json.loads(done.stdout)[0]["role"] == role
    return done.returncode == 0


class Flood:
    """`count` connections, made one after the other in a thread; the last `keep` of them stay open."""

    def __init__(self, connect: Callable[[int], socket.socket], count: int, keep: int) -> None:
        self._connect, self._count = connect, count
        self.open: deque[socket.socket] = deque(maxlen=keep)
        self._keep = keep
        self._thread = threading.Thread(target=self._run)
        self._stop = False
        self.errors: list[OSError] = []
        self.made = 0

    def _run(self) -> None:
        while self.made < self._count and not self._stop:
            try:
                sock = self._connect(self.made)
            except OSError as error:
                self.errors.append(error)
            else:
                if len(self.open) == self._keep:
                    self.open[0].close()
                self.open.append(sock)
            self.made += 1

    def __enter__(self) -> Flood:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()
        for sock in self.open:
            sock.close()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> None:
        self._thread.join()
        assert self.made == self._count


def to_unix(path: Path, said: bytes = b"") -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    # Waits for room, which Python's own time limit does not.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(SECONDS), 0))
    sock.connect(str(path))
    sock.settimeout(SECONDS)
    with contextlib.suppress(OSError):  # it may be closed already
        sock.send(said, socket.MSG_NOSIGNAL)
    return sock


def to_peer_port(node: Node, source: str, said: bytes) -> socket.socket:
    sock = socket.socket()
    sock.settimeout(SECONDS)
    sock.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT
    sock.bind((source, 0))
    sock.connect((node.address, PORT))
    with contextlib.suppress(OSError):
        sock.send(said, socket.MSG_NOSIGNAL)
    return sock


def closed(sock: socket.socket) -> bool:
    """Whether the server has hung up; waits for it."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def nbd_client(node: Node) -> RawClient:
    """A client that waits for room when it has to."""

    def connect() -> RawClient | None:
        try:
            return RawClient(node.socket())
        except BlockingIOError:
            return None

    client = eventually(connect, "an NBD client is let in")
    assert isinstance(client, RawClient)
    return client


def works(client: RawClient, number: int) -> None:
    """A client's I/O goes on."""
    data = number.to_bytes(4, "little") * (BLOCK // 4)
    at = number % 64 * BLOCK
    assert client.write(at, data) == 0 and client.read(at, BLOCK) == data


def test_ten_thousand_idle_control_connections(node: Node) -> None:
    """Each of them is open at the client's end until all are there; every other one has begun a request."""
    control = node.directory / "control"
    with RawClient(node.socket()) as client, bounded({main(node): CLIENT_LIMIT}):
        flood = Flood(lambda n: to_unix(control, b"\2\0\1" if n % 2 else b""), CONTROL, CONTROL)
        with flood:
            rounds = 0
            while flood.running or rounds == 0:
                eventually(lambda: status_says(node, "primary"), "hastctl is heard in the flood")
                works(client, rounds)
                rounds += 1
            flood.wait()
            assert not flood.errors
            assert node.status()["role"] == "primary"
            assert closed(flood.open[0]), "the oldest one has to go"
            node.role("primary")
    assert "Traceback" not in node.said() and "unexpected error" not in node.said()


def test_peers_and_strangers_flood_the_peer_port(make_pair: Callable[..., Pair]) -> None:
    """While both nodes find each other, and work: half of the connections come from the other node's address, some with
    half a handshake, some with half a header of the largest size."""
    pair = make_pair(conf="timeout 20")
    pair.create()
    pair.start()
    stranger = own_address()
    halves = (b"", b"\1", b"\1\0\0\x10\0" + bytes(9000), pack_message(1, Handshake1Request("none").to_nv())[:-1])

    def connect(number: int) -> socket.socket:
        node = pair.nodes[number % 2]
        source = pair.other(node).address if number % 4 < 2 else stranger
        return to_peer_port(node, source, halves[number // 4 % len(halves)])

    allowed = ADDRESS_LIMIT + 2
    with bounded({main(node): 2 * allowed for node in pair.nodes}), Flood(connect, PEERS, PEERS // 2) as flood:
        eventually(lambda: flood.made > 200, "the flood has begun")
        pair.roles(pair.a)
        with RawClient(pair.a.socket()) as client:
            for number in range(100):
                works(client, number)
        flood.wait()
        pair.wait_in_sync(pair.a)
        pair.swap(pair.a)
        pair.wait_in_sync(pair.b)
    assert pair.differing() is None
    for node in pair.nodes:
        assert "Traceback" not in node.said() and "unexpected error" not in node.said()
        assert len(node.log.read_text().splitlines()) < PEERS // 4, "a flood of lines in the log"


def test_slow_handshakes_end_in_time(make_pair: Callable[..., Pair]) -> None:
    """A peer that sends a byte now and then has `timeout` for the whole of its request, not for each byte."""
    pair = make_pair(conf="timeout 2")
    pair.up()
    message = pack_message(1, Handshake1Request("x" * 200).to_nv())
    socks = [to_peer_port(pair.b, pair.a.address, message[:9]) for _ in range(ADDRESS_LIMIT)]
    gone = [False] * len(socks)
    position = 9

    def all_gone() -> bool:
        nonlocal position
        position = min(position + 1, len(message) - 1)
        for n, sock in enumerate(socks):
            try:
                sock.send(message[position : position + 1], socket.MSG_NOSIGNAL)
                gone[n] |= sock.recv(1, socket.MSG_DONTWAIT) == b""
            except BlockingIOError:
                continue
            except OSError:
                gone[n] = True
        return all(gone)

    eventually(all_gone, "they are closed")
    for sock in socks:
        sock.close()
    pair.wait_in_sync(pair.a)


def test_nbd_clients_that_do_not_negotiate(node: Node) -> None:
    """They are open all the time; some have begun an option of the largest size."""
    halves = (b"", b"\0\0\0\3", b"\0\0\0\3" + OPTION_MAGIC + b"\0\0\0\7\0\0\xff\xff" + bytes(30000))
    worker = process(node, "(primary)")
    flood = Flood(lambda n: to_unix(node.socket(), halves[n % 3]), NEGOTIATIONS, NEGOTIATIONS)
    with RawClient(node.socket()) as client, bounded({worker: 64}), flood:
        rounds = 0
        while flood.running or rounds == 0:
            works(client, rounds)
            with nbd_client(node) as another:
                works(another, rounds)
            rounds += 1
        flood.wait()
        assert not flood.errors
        with nbd_client(node) as another:
            works(another, rounds)
        assert closed(flood.open[0]), "the oldest one has to go"
    assert node.status()["role"] == "primary"
    assert "Traceback" not in node.said()


def served(node: Node) -> bool:
    """Whether there is room for one more NBD client."""
    try:
        with nbd_client(node) as another:
            works(another, 1)
    except (EOFError, ConnectionError):
        return False
    return True


def test_more_nbd_clients_than_can_be_served(node: Node) -> None:
    """Those that are there stay, also idle ones; the others are closed. When some leave, there is room again."""
    worker, ggate = process(node, "(primary)"), process(node, ": ggate")
    first = RawClient(node.socket())
    with contextlib.ExitStack() as stack, bounded({worker: 0, ggate: NBD_LIMIT}):
        stack.enter_context(first)
        clients = [stack.enter_context(RawClient(node.socket())) for _ in range(CLIENTS)]
        refused = clients[NBD_LIMIT - 1 :]
        assert all(client.closed_by_server() for client in refused)
        for number, client in enumerate((first, clients[0], clients[NBD_LIMIT - 2])):
            works(client, number)
        assert node.log.read_text().count("cannot serve an NBD client") < len(refused) // 2, "a flood in the log"
        clients[1].close()
        eventually(lambda: served(node), "there is room again")
        works(first, 2)
    assert process(node, ": ggate") == ggate and process(node, "(primary)") == worker
    assert "Traceback" not in node.said()


def test_nbd_clients_that_no_descriptor_is_left_for(node: Node) -> None:
    """They are closed as well, and nobody else is. When one leaves, there is room again."""
    ggate = process(node, ": ggate")
    _, hard = resource.prlimit(ggate, resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(RawClient(node.socket())) for _ in range(2))
        works(first, 0)
        works(second, 0)
        room = max(int(entry.name) for entry in Path(f"/proc/{ggate}/fd").iterdir()) + 1
        resource.prlimit(ggate, resource.RLIMIT_NOFILE, (room, hard))
        clients = [stack.enter_context(RawClient(node.socket())) for _ in range(room + 8)]
        assert all(client.closed_by_server() for client in clients[room:])
        works(first, 1)
        second.close()
        eventually(lambda: served(node), "there is room again")
        works(first, 2)
    assert "cannot serve an NBD client: no descriptor is left for it" in node.said()
    assert process(node, ": ggate") == ggate
