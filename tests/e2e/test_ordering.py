"""What reaches the component, and in which order: the stages of a real node that do its I/O are watched with strace.

Invariant 1 (dirty before write): at each data write, the activemap on disk, as the map writes and fdatasyncs before it
have left it, has the bits of all extents that are written. Invariant 5: a client's flush is answered after an
fdatasync that began when every acknowledged write was done.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import faultdisk, tools
from tests.e2e.node import MIB, Node, eventually
from tests.e2e.pair import Pair
from tests.faultdisk import FaultDisk, entries
from tests.nbdclient import FLUSH, TRIM, WRITE_ZEROES, RawClient

EXTENT = 2 * MIB
MAP_OFFSET = 4096
# The second kind ends a line of the first that was interrupted by another process's.
CALL = re.compile(r"^(\d+)\s+(pwrite64|fdatasync|fallocate)\(\d+(?:, )?(.*?)(?:\)\s+= (-?\d+).*| <unfinished \.\.\.>)$")
RESUMED = re.compile(r"^(\d+)\s+<\.\.\. (pwrite64|fdatasync|fallocate) resumed>.*\)\s+= (-?\d+)")
STAGES = (": disk", ": ggate")  # ggate does what takes no waiting


@dataclass
class Recording:
    """The calls that succeeded: a mutation where it began, an fdatasync where it had completed."""

    calls: list[tuple[str, list[int], bytes]] = field(default_factory=list)  # name, numbers, data

    @classmethod
    def parse(cls, text: str) -> Recording:
        recording = cls()
        begun: dict[str, int] = {}  # by process: where its mutation stands
        for line in text.splitlines():
            if (end := RESUMED.match(line)) is not None:
                at = begun.pop(end[1], None)
                if end[2] == "fdatasync" and end[3] == "0":
                    recording.calls.append(("fdatasync", [], b""))
                elif at is not None and int(end[3]) < 0:
                    recording.calls[at] = ("failed", [], b"")
                continue
            match = CALL.match(line)
            if match is None or int(match[4] or 0) < 0:
                continue
            name, rest = match[2], match[3]
            data = b""
            if match[4] is None:
                if name == "fdatasync":
                    continue
                begun[match[1]] = len(recording.calls)
            if name == "pwrite64":
                quoted, _, rest = rest.partition('", ')
                data = bytes.fromhex(quoted.strip('"').replace("\\x", ""))
            numbers = [int(word) for word in re.findall(r"\b\d+\b", rest)]
            recording.calls.append((name, numbers, data))
        recording.calls = [call for call in recording.calls if call[0] != "failed"]
        return recording


@contextmanager
def watched(node: Node, tmp_path: Path) -> Iterator[Callable[[], Recording]]:
    """strace on the stages; the function ends it and returns what it saw."""
    pids = [f"--attach={pid}" for pid, title in node.titles().items() if title.endswith(STAGES)]
    assert len(pids) == len(STAGES)
    output = tmp_path / "strace"
    process = subprocess.Popen(
        ["strace", "-f", *pids, "-xx", "-s", "4096", "-e", "trace=pwrite64,fdatasync,fallocate", "-o", output],
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    for _ in STAGES:
        assert b"attached" in process.stderr.readline()
    drain = threading.Thread(target=process.stderr.read)  # it must never block on what it says
    drain.start()

    def finish() -> Recording:
        process.send_signal(signal.SIGINT)
        process.wait(30)
        return Recording.parse(output.read_text())

    try:
        yield finish
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        drain.join()
        process.stderr.close()


@pytest.fixture
def geometry_node(make_node: Callable[..., Node]) -> Node:
    tools.need("strace")
    node = make_node({"disk": 512 * MIB})
    node.primary()
    return node


def extents(offset: int, length: int) -> range:
    return range(offset // EXTENT, (offset + length - 1) // EXTENT + 1)


def replay(recording: Recording, data_offset: int, before: bytes) -> tuple[int, int]:
    """Check invariant 1 over the recording; numbers of data writes and map updates seen."""
    written, durable = bytearray(before), bytes(before)
    data_writes = map_writes = 0
    for name, numbers, data in recording.calls:
        if name == "fdatasync":
            durable = bytes(written)
            continue
        length, offset = (numbers[-2], numbers[-1]) if name == "pwrite64" else (numbers[-1], numbers[-2])
        if offset < data_offset:
            assert name == "pwrite64"
            assert offset >= MAP_OFFSET
            assert offset + length <= data_offset, "a map update runs into the data"
            written[offset - MAP_OFFSET : offset - MAP_OFFSET + length] = data[:length]
            map_writes += 1
            continue
        data_writes += 1
        for extent in extents(offset - data_offset, length):
            assert durable[extent // 8] >> (extent % 8) & 1, f"extent {extent} was written before it was dirty on disk"
    return data_writes, map_writes


def on_disk_map(node: Node, dump: dict[str, int]) -> bytes:
    with node.component().open("rb") as file:
        file.seek(MAP_OFFSET)
        return file.read(dump["localoff"] - MAP_OFFSET)


def test_dirty_before_write(geometry_node: Node, tmp_path: Path) -> None:
    """Random writes, trims and zeroes from several connections: no extent is touched before it is dirty on disk."""
    node = geometry_node
    dump = node.dump()
    before = on_disk_map(node, dump)
    rng = random.Random(1)
    with watched(node, tmp_path) as finish:
        clients = [RawClient(node.socket()) for _ in range(3)]
        for _ in range(60):
            for client in clients:
                offset = rng.randrange(0, 512 * MIB - 256 * 1024) // 512 * 512
                kind = rng.randrange(6)
                if kind == 0:
                    client.start(TRIM, offset, 128 * 1024)
                elif kind == 1:
                    client.start(WRITE_ZEROES, offset, 64 * 1024)
                else:
                    client.start(1, offset, 4096, payload=rng.randbytes(4096))
            for client in clients:
                (answer,) = client.wait(1).values()
                assert answer.error == 0
        for client in clients:
            client.close()
        recording = finish()
    data_writes, map_writes = replay(recording, dump["localoff"], before)
    assert data_writes >= 180
    assert map_writes > 10


def test_the_checker_sees_a_write_that_is_too_early() -> None:
    """The same calls with the map's fdatasync after the data write are a violation."""
    size = 512
    good = [("pwrite64", [size, MAP_OFFSET], b"\1" + bytes(size - 1)), ("fdatasync", [], b""),
            ("pwrite64", [4096, 8192], bytes(4096))]  # fmt: skip
    assert replay(Recording(list(good)), 8192, bytes(size)) == (1, 1)
    with pytest.raises(AssertionError, match="before it was dirty"):
        replay(Recording([good[0], good[2], good[1]]), 8192, bytes(size))


def test_interrupted_lines_are_put_together() -> None:
    """Of two processes: a write counts from where it began, a flush from where it ended, a failed write not at all."""
    text = (
        '1 fdatasync(5 <unfinished ...>\n2 pwrite64(6, "\\x01\\x02", 2, 4096 <unfinished ...>\n'
        '1 <... fdatasync resumed>) = 0\n2 <... pwrite64 resumed>) = 2\n3 pwrite64(6, "\\x03", 1, 512) = 1\n'
        '2 pwrite64(6, "\\x04", 1, 1024 <unfinished ...>\n2 <... pwrite64 resumed>) = -1 EIO (Input/output error)\n'
    )
    assert Recording.parse(text).calls == [
        ("pwrite64", [2, 4096], b"\1\2"), ("fdatasync", [], b""), ("pwrite64", [1, 512], b"\3")
    ]  # fmt: skip


def test_flush_reaches_fdatasync_after_acknowledged_writes(geometry_node: Node, tmp_path: Path) -> None:
    """write, acknowledged; flush, answered: then an fdatasync has come after the write. Ten times, also with FUA."""
    node = geometry_node
    offset = node.dump()["localoff"]
    with RawClient(node.socket()) as client:
        client.write(0, bytes(4096))  # the map update is over
        for fua in (0, 1):
            with watched(node, tmp_path) as finish:
                for i in range(5):
                    assert client.write(4096 * i, os.urandom(4096), fua) == 0
                    assert fua or client.do(FLUSH).error == 0
                recording = finish()
            names = [name for name, numbers, _ in recording.calls if name != "pwrite64" or numbers[-1] >= offset]
            assert names == ["pwrite64", "fdatasync"] * 5


def test_hot_working_set_causes_no_map_update(geometry_node: Node, tmp_path: Path) -> None:
    """64 extents are made dirty once; a thousand writes to them later the map has not been written again."""
    node = geometry_node
    rng = random.Random(2)
    hot = rng.sample(range(512 * MIB // EXTENT), 64)
    with RawClient(node.socket()) as client:
        for extent in hot:
            assert client.write(extent * EXTENT, bytes(512)) == 0
        updates = node.status()["stat_activemap_update"]
        with watched(node, tmp_path) as finish:
            for _ in range(1000):
                where = rng.choice(hot) * EXTENT + rng.randrange(EXTENT // 4096) * 4096
                assert client.write(where, rng.randbytes(4096)) == 0
            recording = finish()
    assert node.status()["stat_activemap_update"] == updates
    assert {name for name, _, _ in recording.calls} == {"pwrite64"}
    assert len(recording.calls) == 1000
    eventually(lambda: node.status()["stat_write"] == 1064, "all writes are counted")


def test_counters_are_durable_before_a_write_is_acknowledged(make_pair: Callable[..., Pair], tmp_path: Path) -> None:
    """Invariant 7, also with `metaflush off`: the secondary is gone, and the first write without it is acknowledged
    after a flush that comes after the counters."""
    pair = make_pair(conf="timeout 5\nmetaflush off")
    log = tmp_path / "log"
    disk = FaultDisk.under(pair.a)
    pair.up()
    pair.b.kill()
    eventually(lambda: pair.a.status()["status"] == "degraded", "the secondary is gone")
    disk.record(log)
    with RawClient(pair.a.socket()) as client:
        assert client.write(0, bytes(4096)) == 0
    disk.record(None)
    found = list(entries(log))
    (counters,) = [n for n, e in enumerate(found) if e.kind == faultdisk.WRITE and e.offset == 0]
    assert [e for e in found[counters:] if e.kind == faultdisk.FLUSH]
    assert [e for e in found if e.kind == faultdisk.WRITE and e.length == 4096 and e.offset > MAP_OFFSET]
