"""NBD clients as people use them, and as nobody should, on a whole hastd."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import subprocess
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.node import MIB, Node, eventually
from tests.nbdclient import FLUSH, FUA, READ, TRIM, WRITE, WRITE_ZEROES, RawClient, go, option, request
from tests.tools import need

SIZE = 64 * MIB


@pytest.fixture
def disk(make_node: Callable[..., Node], tmp_path: Path) -> Node:
    """On a disk, so that the component is what administrators have: io_uring or threads, and O_DIRECT if it can."""
    node = make_node(memory=False)
    node.primary()
    return node


def image(path: Path, seed: int = 1) -> Path:
    """A file of the export's size with data, zeros and holes."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        for _ in range(SIZE // MIB):
            match rng.choice(("data", "data", "zeros", "hole")):
                case "data":
                    file.write(rng.randbytes(MIB))
                case "zeros":
                    file.write(bytes(MIB))
                case _:
                    file.seek(MIB, os.SEEK_CUR)
        file.truncate(SIZE)
    return path


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- tools ----


def test_nbdinfo(node: Node) -> None:
    need("nbdinfo")
    said = json.loads(node.run("nbdinfo", "--json", node.uri()).stdout)
    assert said["protocol"] == "newstyle-fixed"
    assert said["structured"] is True
    (export,) = said["exports"]
    expected = {
        "export-size": SIZE,
        "is_read_only": False,
        "is_rotational": False,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": True,
        "can_zero": True,
        "can_df": True,
        "can_fast_zero": False,
        "can_cache": False,
        "block_size_minimum": 512,
        "block_size_preferred": 4096,
        "block_size_maximum": 32 * MIB,
    }
    assert {key: export.get(key) for key in expected} == expected
    assert node.name() in node.run("nbdinfo", "--list", node.uri()).stdout
    named = f"nbd+unix:///{node.name()}?socket={node.socket()}"
    assert node.run("nbdinfo", "--size", named).stdout.strip() == str(SIZE)
    wrong = f"nbd+unix:///nothing?socket={node.socket()}"
    refused = node.run("nbdinfo", wrong, check=False)
    assert refused.returncode != 0
    assert "export: nothing" in refused.stderr


@pytest.mark.parametrize("kind", ["node", "disk"])
def test_nbdcopy_both_ways(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    need("nbdcopy")
    node: Node = request.getfixturevalue(kind)
    many = ("nbdcopy", "--connections=4", "--requests=64", "--flush")
    for seed in (1, 2):  # the second over the first: its zeros and holes have to be zeros
        source, back = image(tmp_path / f"in{seed}", seed), tmp_path / f"out{seed}"
        node.run(*many, source, node.uri())
        node.run(*many, node.uri(), back)
        assert digest(source) == digest(back)
    assert node.run("nbdcopy", "--no-extents", node.uri(), "null:")
    # What a client was told is durable is in the component, whatever becomes of hastd.
    offset = node.dump()["localoff"]
    with node.component().open("rb") as file:
        file.seek(offset)
        assert hashlib.sha256(file.read(SIZE)).hexdigest() == digest(tmp_path / "in2")


@pytest.mark.parametrize("kind", ["node", "disk"])
def test_qemu_io(kind: str, request: pytest.FixtureRequest) -> None:
    """Patterns written, zeroed and discarded in every way, and each read back with verification."""
    need("qemu-io")
    node: Node = request.getfixturevalue(kind)
    commands = [
        "write -P 0x11 0 8M",
        "write -f -P 0x22 1M 64k",
        "read -P 0x11 0 1M",
        "read -P 0x22 1M 64k",
        "write -z 2M 1M",
        "read -P 0 2M 1M",
        "write -zu 3M 1M",
        "read -P 0 3M 1M",
        "write -z -f 512 512",
        "read -P 0x11 0 512",
        "read -P 0 512 512",
        "read -P 0x11 1024 512",
        "discard 4M 1M",
        "read -P 0 4M 1M",
        "flush",
        "write -P 0x33 8M 32M",
        "read -P 0x33 8M 32M",
        "aio_write -P 0x44 40M 4M",
        "aio_write -P 0x55 44M 4M",
        "aio_flush",
        "read -P 0x44 40M 4M",
        "read -P 0x55 44M 4M",
        f"write -P 0x66 {SIZE - 512} 512",
        f"read -P 0x66 {SIZE - 512} 512",
        "read -P 0x11 5M 3M",
    ]
    script = [word for command in commands for word in ("-c", command)]
    said = node.run("qemu-io", "-f", "raw", "-t", "none", *script, node.uri()).stdout
    assert "failed" not in said
    assert "error" not in said.lower()
    assert said.count("read ") == sum(command.startswith("read") for command in commands)


def test_qemu_img(node: Node, tmp_path: Path) -> None:
    need("qemu-img")
    source = image(tmp_path / "in", 3)
    node.run("qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", source, node.uri())
    compare = ("qemu-img", "compare", "-f", "raw", "-F", "raw", source, node.uri())
    assert "identical" in node.run(*compare).stdout
    with RawClient(node.socket()) as client:
        block = client.read(10 * MIB, 512)
        assert client.write(10 * MIB, bytes(byte ^ 1 for byte in block)) == 0
    assert node.run(*compare, check=False).returncode == 1


NBDSH = """
import os, random
uri = os.environ["URI"]
handles = []
for _ in range(4):
    h = nbd.NBD()
    h.connect_uri(uri)
    handles.append(h)
assert all(h.can_multi_conn() for h in handles)
size = handles[0].get_size()
rng = random.Random(5)
image = bytearray(size)
block = 128 * 1024

# Each connection writes every fourth block, asynchronously, many at a time.
for n, h in enumerate(handles):
    for at in range(n * block, size // 4, 4 * block):
        data = rng.randbytes(block)
        image[at:at + block] = data
        buffer = nbd.Buffer.from_bytearray(bytearray(data))
        h.aio_pwrite(buffer, at, completion=lambda error: 1)
for h in handles:
    while h.aio_in_flight() > 0:
        h.poll(-1)

# A flush of one connection covers what the others were told is written.
handles[0].flush()
for n, h in enumerate(handles):
    assert h.pread(size // 4, 0) == image[:size // 4], n

# Every connection sees what any other has done as soon as that was answered.
for turn in range(200):
    writer, reader = rng.sample(handles, 2)
    at = rng.randrange(size // 512 - 256) * 512
    length = rng.randrange(1, 257) * 512
    action = rng.choice(["write", "zero", "trim", "fua"])
    if action in ("write", "fua"):
        image[at:at + length] = rng.randbytes(length)
        flags = nbd.CMD_FLAG_FUA if action == "fua" else 0
        writer.pwrite(bytes(image[at:at + length]), at, flags)
    else:
        image[at:at + length] = bytes(length)
        if action == "zero":
            writer.zero(length, at, rng.choice([0, nbd.CMD_FLAG_NO_HOLE]))
        else:
            writer.trim(length, at)
    assert reader.pread(length, at) == image[at:at + length], (turn, action)

biggest = 32 * 1024 * 1024
data = rng.randbytes(biggest)
handles[0].pwrite(data, 0)
assert handles[1].pread(biggest, 0) == data
chunks = []
handles[2].pread_structured(131072, 0, lambda data, at, status, error: chunks.append((at, len(data))),
                            nbd.CMD_FLAG_DF)
assert chunks == [(0, 131072)], chunks
for h in handles:
    h.shutdown()
print("all is well")
"""


def test_nbdsh_with_four_connections(node: Node) -> None:
    need("nbdsh")
    # The system's own python3 is the one that has the module.
    env = node.env | {"URI": node.uri(), "PATH": f"/usr/bin:/bin:{os.environ['PATH']}"}
    said = node.run("nbdsh", "-c", textwrap.dedent(NBDSH), env=env).stdout
    assert "all is well" in said
    assert node.status()["stat_write"] > 0


@pytest.mark.parametrize("kind", ["node", "disk"])
def test_fio_verifies(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Several jobs with random writes and trims, each in its own part, every block verified by checksum."""
    need("fio")
    node: Node = request.getfixturevalue(kind)
    job = tmp_path / "verify.fio"
    job.write_text(
        textwrap.dedent(
            f"""
            [global]
            ioengine=nbd
            uri={node.uri()}
            size=14m
            verify=crc32c
            verify_fatal=1
            verify_state_save=0
            verify_backlog=64
            exitall_on_error=1
            randrepeat=0

            [small]
            rw=randwrite
            bs=4k
            iodepth=32
            offset=0

            [mixed]
            rw=randwrite
            bsrange=512-256k
            blockalign=512
            iodepth=16
            offset=16m

            [large]
            rw=write
            bs=1m
            iodepth=8
            offset=32m

            [trim]
            rw=randtrimwrite
            bs=16k
            iodepth=8
            offset=48m
            trim_verify_zero=1
            """
        )
    )
    said = node.run("fio", job, cwd=tmp_path).stdout
    assert said.count("err= 0") == 4, said


def test_both_kinds_of_replies_and_both_ways_in(node: Node) -> None:
    """An old client: EXPORT_NAME, 124 zeros, simple replies."""
    data = os.urandom(3 * MIB)
    with RawClient(node.socket(), negotiate=False) as old, RawClient(node.socket()) as new:
        old.receive(18)
        old.sock.sendall(b"\0\0\0\1" + option(1, node.name().encode()))
        assert int.from_bytes(old.receive(8 + 2 + 124)[:8]) == SIZE
        assert old.write(512, data) == 0
        assert new.read(512, len(data)) == data
        assert old.read(512, len(data)) == data


# ---- hostile clients ----


@contextlib.contextmanager
def somebody_works(node: Node):  # type: ignore[no-untyped-def]
    """A client that writes and reads all the time, and has to get what it wrote, with others around it."""
    stop, turns, failures = threading.Event(), [0], []

    def work() -> None:
        rng = random.Random(9)
        try:
            with RawClient(node.socket()) as client:
                while not stop.is_set():
                    offset, length = 48 * MIB + rng.randrange(1024) * 4096, rng.choice((4096, 65536, MIB))
                    data = rng.randbytes(length)
                    assert client.write(offset, data, rng.choice((0, FUA))) == 0
                    assert client.read(offset, length) == data
                    turns[0] += 1
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()

    def goes_on() -> None:
        """It has done something since now."""
        before = turns[0]
        eventually(lambda: failures or turns[0] > before + 1, "the other client is served")
        assert not failures

    try:
        eventually(lambda: failures or turns[0] > 0, "the other client is served at all")
        yield goes_on
    finally:
        stop.set()
        thread.join()
    assert not failures, failures


def test_garbage_in_the_negotiation(node: Node) -> None:
    rng = random.Random(3)
    with somebody_works(node) as goes_on:
        for stream in (
            b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n",
            rng.randbytes(100_000),
            b"\xff\xff\xff\xff",
            b"\0\0\0\3" + option(99, b"")[:12] + b"\xff\xff\xff\xff" + bytes(100_000),
            b"\0\0\0\3" + option(3) * 100,
            b"\0\0\0\3" + go() + request(READ, 0, 512, 1),
            b"\0\0\0\3" + option(1, b"nothing"),
        ):
            with RawClient(node.socket(), negotiate=False) as client:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    client.sock.sendall(stream)
                assert client.closed_by_server()
            with RawClient(node.socket(), negotiate=False) as client:
                client.sock.sendall(stream[:7])  # and off
        goes_on()
    assert node.status()["workerpid"] in node.pids()


def test_garbage_after_the_negotiation(node: Node) -> None:
    rng = random.Random(4)
    with somebody_works(node) as goes_on:
        for stream in (
            rng.randbytes(1_000_000),
            request(READ, 0, 512, 1, magic=1) * 10,
            request(WRITE, 0, 512, 1) + bytes(300) + request(READ, 0, 512, 2) * 30,
        ):
            with RawClient(node.socket()) as client:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    client.sock.sendall(stream)
                assert client.closed_by_server()
        goes_on()


def test_what_is_not_possible_is_refused_and_nothing_else_happens(node: Node) -> None:
    with somebody_works(node) as goes_on, RawClient(node.socket()) as client:
        for kind, offset, length, flags in (
            (READ, SIZE, 512, 0),
            (READ, SIZE - 512, 1024, 0),
            (READ, 2**64 - 512, 512, 0),
            (WRITE, SIZE, 4096, 0),
            (WRITE, 2**63, 512, 0),
            (WRITE, 7, 512, 0),
            (WRITE, 0, 33 * MIB, 0),
            (READ, 0, 2**32 - 512, 0),
            (TRIM, SIZE - 512, 2**32 - 512, 0),
            (WRITE_ZEROES, SIZE, 512, 0),
            (WRITE_ZEROES, 3, 5, 0),
            (FLUSH, 1, 1, 0),
            (77, 0, 0, 0),
            (READ, 0, 512, 0x8000),
        ):
            answer = client.do(kind, offset, length, flags, bytes(length) if kind == WRITE else b"")
            assert answer.error in (22, 28), (kind, offset, length)
        goes_on()
        assert client.read(0, 4096) == bytes(4096)
    assert node.component().stat().st_size == node.dump()["localoff"] + SIZE


def test_leaving_at_any_moment(node: Node) -> None:
    """In the middle of a header, a payload, a reply; many times, at once and one after the other."""
    rng = random.Random(6)
    with somebody_works(node) as goes_on:
        for turn in range(60):
            with RawClient(node.socket(), structured=turn % 2 == 0) as client:
                stream = b"".join(
                    request(kind, rng.randrange(64) * 512, length, n) + (bytes(length) if kind == WRITE else b"")
                    for n, kind, length in (
                        (n, rng.choice((READ, WRITE)), rng.choice((512, 65536, 4 * MIB))) for n in range(4)
                    )
                )
                client.sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    client.sock.send(stream[: rng.randrange(len(stream))])
                    client.sock.recv(rng.randrange(1, 100_000))
        goes_on()
    with RawClient(node.socket()) as client:
        assert client.do(FLUSH).error == 0
    eventually(lambda: node.status()["idle_queue_size"] == 256, "every slot comes back")


@pytest.mark.parametrize("structured", [True, False])
def test_who_never_reads(node: Node, structured: bool) -> None:
    """Six of them, with more reads outstanding than there is memory for: others are served, and nothing is lost."""
    with somebody_works(node) as goes_on, contextlib.ExitStack() as stack:
        for _ in range(6):
            client = stack.enter_context(RawClient(node.socket(), structured=structured))
            client.sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                for n in range(100_000):
                    client.sock.send(request(READ, 0, 32 * MIB, n))
            goes_on()
    eventually(lambda: node.status()["idle_queue_size"] == 256, "every slot comes back")


def test_fifty_idle_and_stalled_clients(node: Node) -> None:
    with contextlib.ExitStack() as stack:
        for n in range(50):
            client = stack.enter_context(RawClient(node.socket(), negotiate=n % 5 != 0))
            if n % 5 == 1:
                client.sock.sendall(request(WRITE, 0, MIB, 1) + bytes(100_000))
            if n % 5 == 2:
                client.sock.sendall(request(WRITE, 0, 4096, 1)[:20])
        with somebody_works(node) as goes_on:
            goes_on()
        assert node.run("nbdinfo", "--size", node.uri()).stdout.strip() == str(SIZE)


def test_end_while_clients_work(make_node: Callable[..., Node]) -> None:
    """SIGTERM with clients in every state: hastd ends all the same, and soon."""
    node = make_node()
    node.primary()
    with contextlib.ExitStack() as stack:
        idle = stack.enter_context(RawClient(node.socket()))
        stack.enter_context(RawClient(node.socket(), negotiate=False))
        stalled = stack.enter_context(RawClient(node.socket()))
        stalled.sock.sendall(request(WRITE, 0, MIB, 1) + bytes(100_000))
        deaf = stack.enter_context(RawClient(node.socket()))
        deaf.sock.sendall(request(READ, 0, 32 * MIB, 1) * 8)
        assert idle.write(0, b"last" * 128) == 0
        try:
            assert node.stop() == 0
        except subprocess.TimeoutExpired:
            pytest.fail("hastd did not end")
        for client in (idle, stalled, deaf):
            assert client.closed_by_server()
    assert node.leftovers() == []
    assert node.dump()["prevrole"] == "primary"
    node.start()
    node.role("primary")
    with RawClient(node.socket()) as client:
        assert client.read(0, 512) == b"last" * 128


def test_role_init_closes_clients_and_takes_the_socket_away(node: Node) -> None:
    with RawClient(node.socket()) as client:
        assert client.write(4096, b"x" * 512) == 0
        node.role("init")
        assert client.closed_by_server()
    assert not node.socket().exists()
    node.role("primary")
    with RawClient(node.socket()) as client:
        assert client.read(4096, 512) == b"x" * 512
