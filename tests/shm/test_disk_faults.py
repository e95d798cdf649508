"""The disk pump on components that fail for real: full, cut, sealed, read-only, with large sectors."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from hast import boot
from hast.component import open_component
from hast.errors import DiskError
from hast.ffi import _hast
from tests.shm import diskrig
from tests.shm.diskrig import DATA_OFFSET, DATASIZE, DELETE, DURABLE, FLUSH, MAP, NOHOLE, READ, SLAB, WRITE, ZERO, Rig
from tests.tools import loop_device

MIB = 1 << 20
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts and loop devices")


@pytest.fixture(params=["inline", "uring", "threads"])
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "uring" and not _hast.lib.hast_disk_uring_works():
        pytest.skip("io_uring cannot be set up here")
    return str(request.param)


@pytest.fixture
def start(engine: str) -> Iterator[Callable[..., Rig]]:
    """Starts pumps that end with the test."""
    with ExitStack() as stack:

        def begin(fd: int, **options: object) -> Rig:
            rig = diskrig.start(fd, engine, **options)  # type: ignore[arg-type]
            stack.callback(rig.close)
            return rig

        yield begin


@pytest.fixture
def open_fd() -> Iterator[Callable[..., int]]:
    with ExitStack() as stack:

        def begin(path: Path | str, flags: int = os.O_RDWR) -> int:
            fd = os.open(path, flags | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return fd

        yield begin


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB with a file of a component's size on it."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mounted)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no mounting here")
    try:
        path = mounted / "component"
        path.touch()
        os.truncate(path, DATA_OFFSET + DATASIZE)
        yield path
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)


def component(path: Path) -> bytes:
    content = random.Random(5).randbytes(DATA_OFFSET + DATASIZE)
    path.write_bytes(content)
    return content


def test_read_only_descriptor(tmp_path: Path, start: Callable[..., Rig], open_fd: Callable[..., int]) -> None:
    before = component(tmp_path / "c")
    rig = start(open_fd(tmp_path / "c", os.O_RDONLY))
    assert rig.error(WRITE, 0, data=bytes(512)) == errno.EBADF
    assert rig.error(WRITE, 0, 4096, flags=ZERO) == errno.EBADF
    assert rig.error(DELETE, 0, 4096) == errno.EBADF
    assert rig.error(MAP, 0, data=bytes(512), flags=DURABLE) == errno.EBADF
    read = rig.do(READ, 512, 512)
    assert (read.error, read.data) == (0, before[DATA_OFFSET + 512 :][:512])
    assert rig.line.errors == 4
    assert (tmp_path / "c").read_bytes() == before


def test_a_file_that_was_cut_gives_eio(tmp_path: Path, start: Callable[..., Rig], open_fd: Callable[..., int]) -> None:
    before = component(tmp_path / "c")
    rig = start(open_fd(tmp_path / "c"))
    os.truncate(tmp_path / "c", DATA_OFFSET + MIB + 1000)
    assert rig.error(READ, MIB, 4096) == errno.EIO  # the first 1000 bytes are there
    assert rig.error(READ, 2 * MIB, 4096) == errno.EIO
    read = rig.do(READ, MIB - 4096, 4096)
    assert (read.error, read.data) == (0, before[DATA_OFFSET + MIB - 4096 :][:4096])


def test_a_write_past_the_limit_is_done_as_far_as_it_goes(
    tmp_path: Path, start: Callable[..., Rig], open_fd: Callable[..., int]
) -> None:
    before = component(tmp_path / "c")
    limit = DATA_OFFSET + MIB
    rig = start(open_fd(tmp_path / "c"), file_limit=limit)
    # The kernel writes 4096 bytes and says so; only the call that goes on from there is told why not.
    data = b"\xaa" * 8192
    assert rig.error(WRITE, MIB - 4096, data=data) == errno.EFBIG
    assert rig.error(WRITE, MIB, data=data) == errno.EFBIG
    assert (tmp_path / "c").read_bytes() == before[: limit - 4096] + data[:4096] + before[limit:]
    assert rig.error(WRITE, 0, data=data) == 0


def test_sealed_memory(start: Callable[..., Rig]) -> None:
    fd = os.memfd_create("hast-test-component", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, DATA_OFFSET + DATASIZE)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        rig = start(fd)
        assert rig.error(WRITE, 0, data=bytes(4096)) == errno.EPERM
        assert rig.error(DELETE, 0, 4096) == errno.EPERM
        assert rig.error(READ, 0, 4096) == 0
    finally:
        os.close(fd)


@root
@pytest.mark.root
def test_a_full_file_system(small_tmpfs: Path, start: Callable[..., Rig], open_fd: Callable[..., int]) -> None:
    rig = start(open_fd(small_tmpfs))
    assert rig.error(MAP, 0, data=bytes(4096)) == 0  # so that the last write that fits does not fit whole
    errors = [rig.error(WRITE, n * SLAB, data=bytes([n + 1]) * SLAB) for n in range(16)]
    good = 7
    assert errors == [0] * good + [errno.ENOSPC] * (16 - good)
    # NOHOLE where the file system cannot do it otherwise: written, and there is no room for it.
    assert rig.error(WRITE, 3 * MIB, MIB, flags=ZERO | NOHOLE) == errno.ENOSPC
    assert rig.error(DELETE, 0, 2 * SLAB) == 0
    assert rig.error(WRITE, 2 * MIB, data=b"\x77" * SLAB) == 0
    assert rig.error(FLUSH) == 0
    content = small_tmpfs.read_bytes()[DATA_OFFSET:]
    assert content[: 2 * SLAB] == bytes(2 * SLAB)
    assert content[2 * SLAB : good * SLAB] == b"".join(bytes([n + 1]) * SLAB for n in range(2, good))
    assert content[2 * MIB : 2 * MIB + SLAB] == b"\x77" * SLAB


@root
@pytest.mark.root
def test_a_failed_flush_is_not_forgotten(
    small_tmpfs: Path, start: Callable[..., Rig], open_fd: Callable[..., int]
) -> None:
    """The page cache takes the writes, the device beneath has no room for them: fdatasync says so once, we for ever."""
    device = loop_device(small_tmpfs)
    try:
        rig = start(open_fd(device))
        for n in range(16):
            assert rig.error(WRITE, n * SLAB, data=b"\x11" * SLAB) == 0
        error = rig.error(FLUSH)
        assert error in (errno.EIO, errno.ENOSPC)
        os.truncate(small_tmpfs, 0)  # room again: the next fdatasync alone would be fine
        os.truncate(small_tmpfs, DATA_OFFSET + DATASIZE)
        assert rig.error(FLUSH) == error
        assert rig.error(MAP, 0, data=bytes(4096), flags=DURABLE) == error
        assert rig.error(WRITE, 0, data=bytes(4096)) == 0
        assert rig.error(FLUSH) == error
        # A new stage begins with a clean slate.
        assert start(open_fd(device)).error(FLUSH) == 0
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@root
@pytest.mark.root
def test_the_worker_does_not_take_the_news_of_lost_pages_from_the_disk_stage(
    small_tmpfs: Path, tmp_path: Path, start: Callable[..., Rig]
) -> None:
    """Data of clients is lost in the page cache, and the worker is the first to flush, for its metadata."""
    device, note = loop_device(small_tmpfs), tmp_path / "data.boot"
    try:
        with closing(open_component("data", device, "off", note=note)) as opened:
            note.touch()
            rig = start(opened.fd)
            for n in range(16):
                assert rig.error(WRITE, n * SLAB, data=b"\x11" * SLAB) == 0
            with pytest.raises(DiskError, match="cannot be flushed"):
                opened.flush()
            assert opened.sync_failed and boot.lost(tmp_path, "data")
            os.truncate(small_tmpfs, 0)  # room again
            os.truncate(small_tmpfs, DATA_OFFSET + DATASIZE)
            opened.flush()
            assert rig.error(FLUSH) in (errno.EIO, errno.ENOSPC), "flushed, and what was written is lost"
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@root
@pytest.mark.root
def test_a_device_that_fails_direct_writes(
    small_tmpfs: Path, start: Callable[..., Rig], open_fd: Callable[..., int]
) -> None:
    device = loop_device(small_tmpfs)
    try:
        rig = start(open_fd(device, os.O_RDWR | os.O_DIRECT), align=512)
        errors = [rig.error(WRITE, n * SLAB, data=b"\x22" * SLAB) for n in range(16)]
        assert 0 in errors and errors[-1] in (errno.EIO, errno.ENOSPC)
        assert rig.error(READ, 0, 4096) == 0
        assert rig.error(DELETE, 0, DATASIZE) == 0
        assert rig.error(WRITE, DATASIZE - SLAB, data=b"\x33" * SLAB) == 0
        assert rig.do(READ, DATASIZE - SLAB, SLAB).data == b"\x33" * SLAB
        assert rig.do(READ, 0, SLAB).data == bytes(SLAB)
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@root
@pytest.mark.root
def test_zeros_on_a_device_with_large_sectors(
    tmp_path: Path, start: Callable[..., Rig], open_fd: Callable[..., int]
) -> None:
    """The map does not end on a sector of 4096 bytes here, and the requests do not either."""
    mapsize = 512
    offset = 4096 + mapsize
    content = bytearray(component(tmp_path / "c"))
    device = loop_device(tmp_path / "c", "--sector-size", "4096")
    try:
        fd = open_fd(device)
        rig = start(fd, mapsize=mapsize, data_offset=offset)
        for cmd, flags in ((DELETE, 0), (WRITE, ZERO), (WRITE, ZERO | NOHOLE)):
            for at, length in ((0, 512), (512, 2048), (1024, 4096), (3584, 65536), (70000 // 512 * 512, 512 * 333)):
                base = at + 512 * 1024 * (1 + [DELETE, WRITE, ZERO].index(cmd) + (flags >> 1))
                assert rig.error(cmd, base, length, flags=flags) == 0, (cmd, flags, at, length)
                content[offset + base : offset + base + length] = bytes(length)
        assert rig.error(FLUSH) == 0
        assert rig.line.errors == 0
        assert os.pread(fd, len(content), 0) == content
    finally:
        subprocess.run(["losetup", "-d", device], check=True)
