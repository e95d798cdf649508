"""The disk that records and fails does what it is told: tests of tests/faultdisk.py, without a node but for one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hast.device import mounts
from tests.e2e.node import MIB, Node, eventually
from tests.faultdisk import DELETE, FLUSH, WRITE, FaultDisk, entries
from tests.nbdclient import FUA, RawClient

PUNCH = 1 | 2  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
ZERO = 0x10
LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FaultDisk]:
    (tmp_path / "backing").write_bytes(bytes(range(256)) * 4096)
    with FaultDisk(tmp_path / "disk", tmp_path / "backing") as disk:
        yield disk
    assert not any(mount.point == disk.point for mount in mounts.listed())
    assert not disk.alive


@contextlib.contextmanager
def opened(disk: FaultDisk) -> Iterator[int]:
    fd = os.open(disk.point, os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


def punch(fd: int, offset: int, length: int, mode: int = PUNCH) -> None:
    if LIBC.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")


def failing(error: int, function: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(OSError) as caught:
        function(*arguments)
    assert caught.value.errno == error


def test_is_a_plain_file_that_can_be_locked(disk: FaultDisk) -> None:
    """Reads, writes, holes, zeros, a lock, and no more room behind its end."""
    with opened(disk) as fd, opened(disk) as other:
        assert os.fstat(fd).st_size == MIB
        assert os.lseek(fd, 0, os.SEEK_END) == MIB
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        failing(errno.EAGAIN, fcntl.flock, other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert os.pread(fd, 512, 512) == bytes(range(256)) * 2
        assert os.pwrite(fd, b"x" * 5000, 1000) == 5000
        punch(fd, 2048, 1024)
        punch(fd, 4096, 512, ZERO)
        punch(fd, 2 * MIB, 4096)  # as hast asks whether holes can be had
        os.fsync(fd)
        expected = b"x" * 1048 + bytes(1024) + b"x" * 1024 + bytes(512) + b"x" * 1392
        assert os.pread(other, 5000, 1000) == expected
        failing(errno.ENOSPC, os.pwrite, fd, b"y", MIB)
    assert disk.backing.read_bytes()[1000:6000] == expected


def test_records_in_the_order_of_completion(disk: FaultDisk, tmp_path: Path) -> None:
    """Every mutation and flush, with what was stored and between which moments."""
    log = tmp_path / "log"
    with opened(disk) as fd:
        os.pwrite(fd, b"before", 0)
        disk.record(log)
        start = time.monotonic_ns()
        os.pwrite(fd, b"a" * 1024, 512)
        punch(fd, 4096, 8192)
        os.fdatasync(fd)
        disk.fail("write", errno.EIO, half=True)
        failing(errno.EIO, os.pwrite, fd, b"b" * 2048, 0)
        disk.record(None)
        disk.heal()
        os.pwrite(fd, b"after", 0)
    found = list(entries(log))
    assert [(e.kind, e.error, e.offset, e.length, e.stored) for e in found] == [
        (WRITE, 0, 512, 1024, 1024),
        (DELETE, 0, 4096, 8192, 8192),
        (FLUSH, 0, 0, 0, 0),
        (WRITE, errno.EIO, 0, 2048, 1024),
    ]
    assert [e.data for e in found] == [b"a" * 1024, b"", b"", b"b" * 1024]
    stamps = [stamp for e in found for stamp in (e.begin, e.end)]
    assert sorted(stamps) == stamps
    assert start < stamps[0]
    assert stamps[-1] < time.monotonic_ns()


def test_fails_what_it_is_told_to(disk: FaultDisk) -> None:
    """A number of operations of one kind, those in a range, and none once it is well again."""
    with opened(disk) as fd:
        disk.fail("write,flush", errno.EIO, count=2)
        failing(errno.EIO, os.pwrite, fd, b"x", 0)
        failing(errno.EIO, os.fdatasync, fd)
        assert os.pwrite(fd, b"x", 0) == 1
        disk.fail("read", errno.EIO, within=(4096, 8192))
        assert len(os.pread(fd, 4096, 0)) == 4096
        failing(errno.EIO, os.pread, fd, 4096, 8191)
        disk.fail("delete", errno.EOPNOTSUPP, count=1)
        failing(errno.EOPNOTSUPP, punch, fd, 0, 4096)
        punch(fd, 0, 4096)
        disk.full()
        failing(errno.ENOSPC, os.pwrite, fd, b"x", 0)
        punch(fd, 0, 4096)
        disk.heal()
        disk.readonly()
        failing(errno.EROFS, os.pwrite, fd, b"x", 0)
        failing(errno.EROFS, os.open, disk.point, os.O_RDWR)
        disk.heal()
        assert os.pwrite(fd, b"x", 0) == 1
        assert len(os.pread(fd, 8192, 0)) == 8192
        assert disk.stats().failed == 6


def test_flush_that_fails_may_lose_what_was_not_flushed(disk: FaultDisk, tmp_path: Path) -> None:
    """Some of it, sector by sector, once it is told; never what was flushed, nor what comes later. The log has it."""
    pieces = range(0, 64 * 4096, 4096)
    disk.cache(7)
    disk.record(tmp_path / "log")
    with opened(disk) as fd:
        for at in pieces:
            os.pwrite(fd, b"a" * 4096, at)
        os.fdatasync(fd)
        for text in (b"b", b"c"):
            for at in pieces:
                os.pwrite(fd, text * 4096, at)
        punch(fd, MIB - 4096, 4096)
        disk.fail("flush", errno.EIO, count=1, lose=True)
        assert os.pread(fd, 4096, 0) == b"c" * 4096
        failing(errno.EIO, os.fdatasync, fd)
        sectors = {os.pread(fd, 512, at) for at in range(0, 64 * 4096, 512)}
        assert sectors == {b"a" * 512, b"b" * 512, b"c" * 512}
        kept = os.pread(fd, MIB, 0)
        os.pwrite(fd, b"d" * 4096, 0)
        disk.fail("flush", errno.EIO, count=1)
        failing(errno.EIO, os.fdatasync, fd)
        assert os.pread(fd, MIB, 0) == b"d" * 4096 + kept[4096:], "who is not told to lose something does not"
    disk.record(None)
    again = bytearray(bytes(range(256)) * 4096)
    for entry in entries(tmp_path / "log"):
        if entry.stored:
            again[entry.offset : entry.offset + entry.stored] = entry.data or bytes(entry.stored)
    assert again == disk.backing.read_bytes()


def test_hangs_and_goes_on(disk: FaultDisk) -> None:
    """A flush that hangs holds up neither reads nor attributes; a disk that is closed frees who waits for it."""
    with opened(disk) as fd:
        disk.hang("flush")
        waiting = threading.Thread(target=os.fdatasync, args=(fd,))
        waiting.start()
        eventually(lambda: disk.stats().waiting == 1, "the flush hangs")
        assert len(os.pread(fd, 512, 0)) == 512
        assert disk.point.stat().st_size == MIB
        disk.release()
        waiting.join(30)
        assert not waiting.is_alive()
        disk.hang()
        errors: list[int | None] = []

        def flush() -> None:
            try:
                os.fdatasync(fd)
            except OSError as error:
                errors.append(error.errno)

        waiting = threading.Thread(target=flush)
        waiting.start()
        eventually(lambda: disk.stats().waiting == 1, "the flush hangs")
        disk.close()
        waiting.join(30)
        assert errors in ([errno.ENOTCONN], [errno.ECONNABORTED])


def test_dies_and_comes_back(disk: FaultDisk) -> None:
    """Those who had it open get errors; content stays."""
    with opened(disk) as fd:
        os.pwrite(fd, b"stays", 0)
        disk.die()
        with pytest.raises(OSError):
            os.pread(fd, 5, 0)
        disk.start()
        with opened(disk) as again:
            assert os.pread(again, 5, 0) == b"stays"


def test_under_a_node(make_node: Callable[..., Node], tmp_path: Path) -> None:
    """A node does not notice it; the recording has its metadata, its map, its data and its flushes."""
    node = make_node()
    disk = FaultDisk.under(node)
    log = tmp_path / "log"
    node.create()
    disk.record(log)
    node.start()
    node.role("primary")
    with RawClient(node.socket()) as client:
        data = os.urandom(65536)
        assert client.write(8 * MIB, data, FUA) == 0
        assert client.read(8 * MIB, 65536) == data
    found = list(entries(log))
    at = node.dump()["localoff"]
    assert [e for e in found if e.kind == WRITE and e.offset == at + 8 * MIB and e.data == data]
    assert [e for e in found if e.kind == WRITE and e.offset == 0]
    assert [e for e in found if e.kind == WRITE and e.offset == 4096 and e.data[0] == 1 << 4]
    assert found[-1].kind == FLUSH
