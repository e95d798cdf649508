"""A hastd whose peers are scripted: what they are answered byte by byte, and what they cannot do to it."""

from __future__ import annotations

import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hast.messages import Handshake1Request, Handshake2Request, pack_message
from hast.nv import Nv
from tests import vectors
from tests.e2e.node import ROOT, Node, eventually, own_address

MakeNode = Callable[..., Node]
PORT = 8457
SECONDS = 20.0
SIZES = {"disk": 8 << 20, "other": 8 << 20}
PEER = own_address()  # the other node of "disk"
OTHER_PEER = own_address()  # of "other"


def make(make_node: MakeNode, *, timeout: int = 20, conf: str = "") -> Node:
    """A node that runs, in role init, with two resources whose other nodes are different ones."""
    node = make_node(SIZES, node_conf=f"remote {PEER}", resource_conf=f"timeout {timeout}", conf=conf)
    text, other, rest = node.conf.read_text().partition(f"resource {node.name('other')} ")
    node.conf.write_text(text + other + rest.replace(PEER, OTHER_PEER))
    node.create()
    node.start()
    return node


@pytest.fixture
def idle(make_node: MakeNode) -> Node:
    return make(make_node)


@pytest.fixture
def hasty(make_node: MakeNode) -> Node:
    """A node that waits a second for its peers."""
    return make(make_node, timeout=1)


def connect(node: Node, source: str = PEER) -> socket.socket:
    sock = socket.socket()
    sock.settimeout(SECONDS)
    sock.bind((source, 0))
    sock.connect((node.address, PORT))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def answer(sock: socket.socket) -> bytes:
    """All that comes until the connection is closed."""
    data = b""
    while True:
        try:
            part = sock.recv(4096)
        except ConnectionResetError:
            return data
        if not part:
            return data
        data += part


def ask(node: Node, message: bytes, source: str = PEER) -> bytes:
    with connect(node, source) as sock:
        sock.sendall(message)
        return answer(sock)


def hello(name: str, version: int | None = 2) -> bytes:
    nv = Nv()
    nv.add_string("resource", name)
    if version is not None:
        nv.add_uint8("version", version)
    return pack_message(1, nv)


def known(name: str) -> bytes:
    return vectors.load(name).normal


def hastd_pid(node: Node) -> int:
    assert node.hastd is not None
    return node.hastd.pid


def sockets(node: Node) -> int:
    """How many TCP connections hastd's main process has."""
    inodes = set()
    for entry in Path(f"/proc/{hastd_pid(node)}/fd").iterdir():
        try:
            inodes.add(str(entry.readlink()).removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[9] in inodes and row[3] != "0A" for row in rows)


# Refusals, byte by byte.


@pytest.mark.parametrize("version", [None, 1, 2, 9])
def test_role_init(idle: Node, version: int | None) -> None:
    assert ask(idle, hello(idle.name(), version)) == known("hs1_error_role_init")


def test_refusals(idle: Node) -> None:
    unknown = known("hs1_error_unknown_resource")
    assert ask(idle, vectors.load("hs1_primary_to_secondary").raw) == unknown
    assert ask(idle, hello("")) == unknown
    assert ask(idle, hello("x" * 100000)) == unknown
    no_access = Nv()
    no_access.add_string("errmsg", "No access to the resource.")
    assert ask(idle, hello(idle.name("other"))) == pack_message(2, no_access)
    assert ask(idle, hello(idle.name("other")), OTHER_PEER) == known("hs1_error_role_init")
    step2 = Handshake2Request(idle.name(), bytes(16), 1, 0, 0)
    assert ask(idle, pack_message(2, step2.to_nv())) == known("hs1_error_role_init")
    log = idle.said()
    assert f"{idle.name()}: connection of {PEER}:" in log and "No access to the resource." in log
    assert "x" * 65 not in log  # what a peer sends does not fill the log


def test_role_primary_says_wait_and_init_afterwards_does_not(idle: Node) -> None:
    idle.role("primary")
    assert ask(idle, hello(idle.name())) == known("hs1_error_wrong_role_wait")
    assert ask(idle, hello(idle.name(), 1)) == known("hs1_error_wrong_role_wait")
    idle.role("init")
    assert ask(idle, hello(idle.name())) == known("hs1_error_role_init")


def test_strangers_are_not_read(idle: Node) -> None:
    """They are closed at once, before they have said a word, and what they say is not answered."""
    stranger = own_address()
    with connect(idle, stranger) as sock:
        assert answer(sock) == b""
    assert ask(idle, hello(idle.name()), stranger) == b""
    eventually(lambda: f"{stranger}:" in idle.said(), "the stranger is in the log")
    assert "is no resource's remote: it is not let in" in idle.said()


# Bad input.


LONGEST = 1 << 20  # bytes of a header
GARBAGE = {
    "a web client": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a higher version": b"\3" + vectors.load("hs1_primary_to_secondary").raw[1:],
    "an oversize header": b"\1" + (LONGEST + 1).to_bytes(4, "little") + bytes(100),
    "the largest header": b"\1\xff\xff\xff\xff",
    "no header": b"\1\0\0\0\0",
    "zeros": bytes(4096),
    "all ones": b"\1\x40\0\0\0" + b"\xff" * 64,
    "a request": vectors.load("keepalive").raw,
    "no resource": pack_message(1, Nv()),
    "version 0": hello("data", 0),
    "a long header of zeros": b"\1" + LONGEST.to_bytes(4, "little") + bytes(LONGEST),
    "a short token": pack_message(2, Handshake2Request("data", b"short", 1, 0, 0).to_nv()),
    "no unique ID": pack_message(2, Handshake2Request("data", bytes(16), 0, 0, 0).to_nv()),
}


def test_garbage(idle: Node) -> None:
    for what, message in GARBAGE.items():
        with connect(idle) as sock:
            port = sock.getsockname()[1]
            try:
                sock.sendall(message)
            except (ConnectionResetError, BrokenPipeError):
                pass  # closed in the middle of it
            assert answer(sock) == b"", what
        eventually(lambda p=port: f"{PEER}:{p} connected, but: " in idle.said(), f"{what} is in the log")
    assert ask(idle, hello(idle.name())) == known("hs1_error_role_init")
    assert "unexpected error" not in idle.said() and "Traceback" not in idle.said()


def test_messages_cut_anywhere(idle: Node) -> None:
    message = hello(idle.name())
    for cut in range(len(message)):
        with connect(idle) as sock:
            sock.sendall(message[:cut])
            sock.shutdown(socket.SHUT_WR)
            assert answer(sock) == b""
    assert ask(idle, message) == known("hs1_error_role_init")
    assert "Traceback" not in idle.said()


def test_what_follows_the_message_does_not_matter(idle: Node) -> None:
    message = hello(idle.name())
    with connect(idle) as sock:
        sock.sendall(message + b"more")
        assert sock.recv(4096) == known("hs1_error_role_init")


# Slow and many.


def test_slow_peers_delay_nobody(hasty: Node) -> None:
    """Each has a second for its whole message, however many bytes of it come."""
    message = hello(hasty.name())
    silent, half, dripping = (connect(hasty) for _ in range(3))
    half.sendall(message[:20])
    begin = time.monotonic()
    assert ask(hasty, message) == known("hs1_error_role_init")
    sent = 0
    try:
        for sent in range(len(message)):
            dripping.sendall(message[sent : sent + 1])
            assert hasty.status()["role"] == "init"  # it takes its time as well
            time.sleep(0.1)
    except (ConnectionResetError, BrokenPipeError):
        pass
    assert sent < len(message) - 1, f"it was heard for {time.monotonic() - begin:g} s"
    for sock in (silent, half, dripping):
        with sock:
            assert answer(sock) == b""
    assert hasty.said().count("sent no whole request in time") == 3


def test_flood(hasty: Node) -> None:
    """Hundreds of silent connections, of a peer and of a stranger: few are open at a time, and others are heard."""
    stranger = own_address()
    flood = []
    for _ in range(150):
        flood += [connect(hasty), connect(hasty, stranger)]
        assert sockets(hasty) < 40
    assert hasty.status()["role"] == "init"
    assert ask(hasty, hello(hasty.name())) == known("hs1_error_role_init")
    assert ask(hasty, hello(hasty.name("other")), OTHER_PEER) == known("hs1_error_role_init")
    for sock in flood:
        with sock:
            assert answer(sock) == b""
    eventually(lambda: sockets(hasty) == 0, "all are closed")
    assert hasty.log.read_text().count("\n") < 200  # not a line for each


def test_no_descriptors_left(idle: Node) -> None:
    """It waits until there are some again, without turning in circles, and goes on then."""
    pid = hastd_pid(idle)
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = max(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()) + 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 2, limits[1]))
    held = [connect(idle) for _ in range(6)]
    eventually(lambda: "cannot accept a peer" in idle.said(), "it says so")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    assert ask(idle, hello(idle.name())) == known("hs1_error_role_init")
    assert idle.said().count("cannot accept a peer") < 10
    for sock in held:
        sock.close()
    assert idle.status()["role"] == "init"


# Where it listens.


def test_several_addresses(make_node: MakeNode, tmp_path: Path) -> None:
    path = tmp_path / "peer"
    second = own_address()
    node = make_node(SIZES, node_conf=f"remote {PEER}", conf=f"listen {second}:9999\nlisten {path}")
    node.create()
    node.start()
    assert ask(node, hello(node.name())) == known("hs1_error_role_init")
    with socket.socket() as sock:
        sock.bind((PEER, 0))
        sock.connect((second, 9999))
        sock.sendall(hello(node.name()))
        assert answer(sock) == known("hs1_error_role_init")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(hello(node.name()))
        assert answer(sock) == known("hs1_error_role_init")
    node.stop()
    assert not path.exists()


def test_an_address_in_use(idle: Node) -> None:
    conf = idle.directory / "other.conf"
    text = idle.conf.read_text().replace(f"rundir {idle.rundir}", f"rundir {idle.directory}/run2")
    conf.write_text(text.replace(f"control {idle.directory}/control", f"control {idle.directory}/control2"))
    second = idle.run(ROOT / "bin" / "hastd", "-F", "-c", conf, "-P", idle.directory / "pid2", check=False)
    assert second.returncode == os.EX_TEMPFAIL
    assert second.stderr == (
        f"hastd: cannot listen on tcp4://{idle.address}: Address already in use: another hastd, or another program,"
        " listens there\n"
    )
    assert not (idle.directory / "control2").exists()
    assert idle.status()["role"] == "init"


def test_connections_end_with_hastd(idle: Node) -> None:
    with connect(idle) as sock:
        sock.sendall(hello(idle.name())[:10])
        eventually(lambda: sockets(idle) == 1, "it is accepted")
        idle.stop(signal.SIGTERM)
        assert answer(sock) == b""


# A secondary.


def test_a_secondary_takes_both_connections(idle: Node) -> None:
    """Handshakes of virgin nodes as they were captured; a wrong token in between; a second primary takes over."""
    idle.role("secondary")
    reply = vectors.load("hs1_secondary_to_primary")
    old = None
    for _ in range(2):
        one = connect(idle)
        one.sendall(hello(idle.name()))
        token = one.recv(4096).removeprefix(reply.normal[:-16])
        assert len(token) == 16
        if old is not None:
            with old:
                assert answer(old) == b""  # cancelled by the new one
        wrong = Handshake2Request(idle.name(), bytes(16), 4711, 0, 0, True)
        assert ask(idle, pack_message(2, wrong.to_nv())) == known("hs2_error_token_mismatch")
        two = connect(idle)
        two.sendall(pack_message(2, Handshake2Request(idle.name(), token, 4711, 0, 0, True).to_nv()))
        assert one.recv(4096)[:1] == b"\2"
        eventually(lambda: idle.dump()["resuid"] == 4711, "the unique ID is stored")
        two.close()
        old = one
    assert old is not None
    old.close()
    with connect(idle) as sock:
        sock.sendall(pack_message(1, Handshake1Request(idle.name(), 9).to_nv()))
        assert sock.recv(4096)[:-16] == vectors.load("hs1_reply_version_fallback").normal[:-16]
