"""The block device through FUSE: the kernel, a loop device, the ggate and disk stages, and no daemon."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hast.device import fuse, loop, mounts
from hast.errors import TemporaryError
from tests.shm.fusenode import DATA_OFFSET, SECONDS, FuseNode, running
from tests.tools import find, need, need_root

pytestmark = [pytest.mark.root]

MIB = 1 << 20
BLKZEROOUT, BLKDISCARD, BLKGETSIZE64, BLKSSZGET = 0x127F, 0x1277, 0x80081272, 0x1268


@pytest.fixture
def name(tmp_path: Path) -> str:
    """A name that no other test has."""
    return f"fuse{os.getpid()}-{random.randrange(1 << 32):x}"


@pytest.fixture
def node(tmp_path: Path, name: str) -> Iterator[FuseNode]:
    need_root()
    with running(tmp_path, name) as running_node:
        running_node.attach()
        yield running_node


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + SECONDS / 2
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.005)


class Direct:
    """A block device or file, opened with O_DIRECT."""

    def __init__(self, path: Path | str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)

    def __enter__(self) -> Direct:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def write(self, offset: int, data: bytes) -> None:
        buffer = mmap.mmap(-1, len(data))
        buffer.write(data)
        assert os.pwrite(self.fd, buffer, offset) == len(data)

    def read(self, offset: int, length: int) -> bytes:
        buffer = mmap.mmap(-1, -(-length // mmap.PAGESIZE) * mmap.PAGESIZE)
        done = os.preadv(self.fd, [memoryview(buffer)[:length]], offset)
        return bytes(buffer[:done])

    def range(self, request: int, offset: int, length: int) -> None:
        """BLKDISCARD or BLKZEROOUT."""
        fcntl.ioctl(self.fd, request, struct.pack("QQ", offset, length))


def fio(device: Path | str, *arguments: str) -> list[str]:
    need("fio")
    common = ["--name=test", f"--filename={device}", "--direct=1", "--ioengine=libaio", "--minimal"]
    return [str(find("fio")), *common, "--verify_state_save=0", *arguments]


def run_fio(device: Path | str, *arguments: str) -> None:
    result = subprocess.run(fio(device, *arguments), capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 0, result.stdout + result.stderr


VERIFY = ("--verify=crc32c", "--verify_fatal=1")


# ---- reads, writes, and the others ----


def test_loop_device_has_the_size_the_blocks_and_direct_io(node: FuseNode) -> None:
    queue = Path(f"/sys/block/{Path(node.device).name}")
    with Direct(node.device) as device:
        size = struct.unpack("Q", fcntl.ioctl(device.fd, BLKGETSIZE64, bytes(8)))[0]
        sector = struct.unpack("i", fcntl.ioctl(device.fd, BLKSSZGET, bytes(4)))[0]
    assert (size, sector) == (64 * MIB, 512)
    assert (queue / "loop/dio").read_text().strip() == "1"
    assert (queue / "queue/write_cache").read_text().strip() == "write back"
    assert int((queue / "queue/discard_max_bytes").read_text()) > 0


def test_random_writes_of_all_sizes_at_depth_read_back(node: FuseNode) -> None:
    run_fio(node.device, "--rw=randwrite", "--bsrange=512-1m", "--iodepth=32", "--size=64m", *VERIFY)
    facts = node.ask("facts")
    assert facts["inuse"] == 0
    assert facts["write_error"] == 0


def test_several_writers_and_readers_at_once(node: FuseNode) -> None:
    jobs = ("--numjobs=3", "--size=16m", "--offset_increment=16m")
    run_fio(node.device, "--rw=randrw", "--bs=4k", "--iodepth=16", *jobs, *VERIFY)


def test_what_was_written_stands_in_the_component(node: FuseNode) -> None:
    data = random.randbytes(3 * MIB + 512)
    with Direct(node.device) as device:
        device.write(5 * 512, data)
        assert device.read(5 * 512, len(data)) == data
    with node.component.open("rb") as component:
        component.seek(DATA_OFFSET + 5 * 512)
        assert component.read(len(data)) == data


def test_requests_larger_than_all_slots_together_do_not_block_each_other(tmp_path: Path, name: str) -> None:
    # Eight slots of 128 KiB: each request of 1 MiB takes them all, and sixteen of them are there at once.
    need_root()
    with running(tmp_path, name, nclient=8) as node:
        node.attach()
        run_fio(node.device, "--rw=randrw", "--bs=1m", "--iodepth=16", "--size=32m", *VERIFY)


def test_slabs_of_one_page(tmp_path: Path, name: str) -> None:
    need_root()
    with running(tmp_path, name, nclient=40, slab_size=4096) as node:
        node.attach()
        run_fio(node.device, "--rw=randwrite", "--bsrange=512-256k", "--iodepth=16", "--size=16m", *VERIFY)


def test_discard_becomes_delete_and_reads_zeros(node: FuseNode) -> None:
    with Direct(node.device) as device:
        device.write(0, b"\xaa" * (4 * MIB))
        before = node.ask("facts")["del"]
        device.range(BLKDISCARD, MIB, 2 * MIB)
        assert node.ask("facts")["del"] > before
        assert device.read(MIB, 2 * MIB) == bytes(2 * MIB)
        assert device.read(MIB - 4096, 4096) == device.read(3 * MIB, 4096) == b"\xaa" * 4096


def test_zeroout_writes_zeros_and_keeps_the_blocks(node: FuseNode) -> None:
    with Direct(node.device) as device:
        device.write(0, b"\xaa" * (4 * MIB))
        facts, blocks = node.ask("facts"), node.component.stat().st_blocks
        device.range(BLKZEROOUT, MIB, 2 * MIB)
        after = node.ask("facts")
        assert (after["del"], after["write"] > facts["write"]) == (facts["del"], True)
        assert device.read(MIB, 2 * MIB) == bytes(2 * MIB)
        assert device.read(3 * MIB, 4096) == b"\xaa" * 4096
    assert node.component.stat().st_blocks >= blocks


def test_fsync_becomes_flush(node: FuseNode) -> None:
    with Direct(node.device) as device:
        device.write(0, bytes(4096))
        before = node.ask("facts")["flush"]
        os.fsync(device.fd)
        assert node.ask("facts")["flush"] == before + 1


def test_disk_error_is_the_writers_error_and_nobody_elses(tmp_path: Path, name: str) -> None:
    need_root()
    with running(tmp_path, name, file_limit=DATA_OFFSET + 8 * MIB) as node:
        node.attach()
        with Direct(node.device) as device:
            device.write(7 * MIB, b"\x55" * MIB)
            with pytest.raises(OSError) as caught:
                device.write(9 * MIB, b"\x55" * 4096)
            assert caught.value.errno in (errno.EIO, errno.ENOSPC)
            assert device.read(7 * MIB, MIB) == b"\x55" * MIB
        assert node.ask("facts")["write_error"] == 1


# ---- the file below the loop device ----


def test_the_file_answers_for_itself(node: FuseNode) -> None:
    point = node.mount_point
    info = point.stat()
    assert stat.S_ISREG(info.st_mode)
    assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_size) == (0o600, 0, 64 * MIB)
    assert os.statvfs(point).f_bsize == 4096
    with Direct(point) as file:
        file.write(64 * MIB - 4096, b"\x77" * 4096)
        assert file.read(64 * MIB - 4096, 4096) == b"\x77" * 4096
        assert file.read(64 * MIB - 4096, MIB) == b"\x77" * 4096  # ends where the file ends
        assert file.read(64 * MIB, 4096) == b""


@pytest.mark.parametrize(
    ("what", "number"),
    [
        (lambda fd: os.pwrite(fd, b"x" * 100, 0), errno.EINVAL),
        (lambda fd: os.pwrite(fd, b"x" * 512, 100), errno.EINVAL),
        (lambda fd: os.pread(fd, 100, 0), errno.EINVAL),
        (lambda fd: os.pwrite(fd, b"x" * 512, 64 * MIB), errno.EINVAL),
        (lambda fd: os.ftruncate(fd, 0), errno.EPERM),
        (lambda fd: os.fchmod(fd, 0o666), errno.EPERM),
        (lambda fd: mmap.mmap(fd, 4096), errno.ENODEV),
        (lambda fd: os.getxattr(fd, "user.x"), errno.EOPNOTSUPP),
    ],
    ids=["short write", "unaligned write", "short read", "past the end", "truncate", "chmod", "mmap", "xattr"],
)
def test_what_the_file_refuses(node: FuseNode, what: Callable[[int], Any], number: int) -> None:
    fd = os.open(node.mount_point, os.O_RDWR)
    try:
        with pytest.raises(OSError) as caught:
            what(fd)
        assert caught.value.errno == number
    finally:
        os.close(fd)
    with Direct(node.device) as device:
        assert len(device.read(0, 4096)) == 4096  # and it goes on


# ---- stages die ----


def in_flight(device: str) -> int:
    """Requests that the kernel has given to the loop device and that are not answered."""
    return sum(int(n) for n in Path(f"/sys/block/{Path(device).name}/inflight").read_text().split())


def blocked_writes(node: FuseNode, count: int) -> tuple[list[threading.Thread], list[OSError | None]]:
    """Writers whose data the stopped stages do not take: block n gets the byte n + 1."""
    results: list[OSError | None] = [None] * count

    def write(n: int) -> None:
        try:
            with Direct(node.device) as device:
                device.write(n * 4096, bytes([n + 1]) * 4096)
        except OSError as error:
            results[n] = error

    threads = [threading.Thread(target=write, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    until(lambda: in_flight(node.device) == count, "the writes are under way")
    return threads, results


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "a writer hangs"


def test_requests_that_no_ggate_has_taken_go_to_the_next_one(node: FuseNode) -> None:
    node.ask("stop")
    writers_do_not_notice_a_crash(node)


def test_requests_that_a_ggate_died_with_go_to_the_next_one(node: FuseNode) -> None:
    node.ask("stop disk")
    before = node.ask("facts")["write"]
    writers_do_not_notice_a_crash(node, lambda: node.ask("facts")["write"] == before + 8)


def writers_do_not_notice_a_crash(node: FuseNode, taken: Callable[[], bool] = lambda: True) -> None:
    threads, results = blocked_writes(node, 8)
    until(taken, "the ggate stage has taken the writes")
    assert in_flight(node.device) == 8
    node.ask("crash")
    join(threads)
    assert results == [None] * 8
    with Direct(node.device) as device:
        assert device.read(0, 8 * 4096) == b"".join(bytes([n + 1]) * 4096 for n in range(8))


def test_kill_under_load_again_and_again(node: FuseNode) -> None:
    command = fio(node.device, "--rw=randwrite", "--bsrange=4k-512k", "--iodepth=32", "--size=64m", *VERIFY)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as writer:
        crashes = 0
        while writer.poll() is None and crashes < 100:
            node.ask("crash")
            crashes += 1
        output, _ = writer.communicate(timeout=SECONDS)
    assert writer.returncode == 0, output
    assert crashes > 3


def test_abort_frees_those_who_wait_for_a_server_that_hangs(node: FuseNode) -> None:
    node.ask("stop")
    threads, results = blocked_writes(node, 2)
    fuse.abort(node.rundir, node.name)
    join(threads)
    assert all(isinstance(error, OSError) and error.errno == errno.EIO for error in results)
    fuse.detach(node.rundir, node.name, node.name, node.devdir)
    assert_nothing_left(node)


# ---- the end ----


def assert_nothing_left(node: FuseNode) -> None:
    assert not [m for m in mounts.listed() if m.point == node.mount_point]
    assert not node.mount_point.exists()
    assert loop.devices_of(node.mount_point) == []
    assert list(node.devdir.iterdir()) == []


def test_detach_takes_everything_away(node: FuseNode) -> None:
    with Direct(node.device) as device:
        device.write(0, b"\x11" * 4096)
    fuse.detach(node.rundir, node.name, node.name, node.devdir)
    assert_nothing_left(node)
    fuse.detach(node.rundir, node.name, node.name, node.devdir)  # there is nothing any more: no error


def test_detach_lets_the_last_user_write_out_its_cache(node: FuseNode) -> None:
    with Path(node.device).open("r+b", buffering=0) as cached:
        cached.seek(MIB)
        cached.write(b"\x22" * 4096)
        fuse.detach(node.rundir, node.name, node.name, node.devdir)
        assert list(node.devdir.iterdir()) == []
    assert_nothing_left_in_use(node)
    with node.component.open("rb") as component:
        component.seek(DATA_OFFSET + MIB)
        assert component.read(4096) == b"\x22" * 4096


def assert_nothing_left_in_use(node: FuseNode) -> None:
    until(lambda: loop.devices_of(node.mount_point) == [], "the loop device is free")
    assert_nothing_left(node)


def test_after_kill_of_everything_the_next_start_clears_up(tmp_path: Path, name: str) -> None:
    need_root()
    with running(tmp_path, name) as node:
        node.attach()
        with Direct(node.device) as device:
            device.write(0, b"\x33" * 4096)
        node.kill_all()
        link = node.devdir / name
        with Direct(link) as device, pytest.raises(OSError):
            device.read(0, 4096)
        assert fuse.cleanup_stale(node.rundir, [name], node.devdir) == []
        assert not os.path.lexists(link)
        assert_nothing_left(node)
    with running(tmp_path, name) as node:
        node.attach()
        with Direct(node.devdir / name) as device:
            assert device.read(0, 4096) == b"\x33" * 4096


def test_dead_device_with_a_user_goes_with_its_user(tmp_path: Path, name: str) -> None:
    need_root()
    with running(tmp_path, name) as node:
        node.attach()
        with Direct(node.device):
            node.kill_all()
            assert fuse.cleanup_stale(node.rundir, [name], node.devdir) == []
            assert not [m for m in mounts.listed() if m.point == node.mount_point]
        assert_nothing_left_in_use(node)


def test_clear_makes_room_for_the_next_one(tmp_path: Path, name: str) -> None:
    need_root()
    with running(tmp_path, name) as node:
        node.attach()
        with pytest.raises(TemporaryError, match="still served"):
            fuse.clear(node.rundir, name, node.devdir)
        node.kill_all()
        fuse.clear(node.rundir, name, node.devdir)
        assert_nothing_left(node)
        fuse.clear(node.rundir, name, node.devdir)


def test_cleanup_leaves_the_living_alone(node: FuseNode, tmp_path: Path) -> None:
    assert fuse.cleanup_stale(node.rundir, [node.name], node.devdir) == [node.name]
    other = tmp_path / "other"
    other.mkdir()
    assert fuse.cleanup_stale(other, [node.name], node.devdir) == []
    with Direct(node.devdir / node.name) as device:
        assert len(device.read(0, 4096)) == 4096


def test_cleanup_leaves_a_server_alone_that_does_not_answer(node: FuseNode) -> None:
    node.ask("stop")
    assert fuse.cleanup_stale(node.rundir, [node.name], node.devdir) == [node.name]
    assert loop.devices_of(node.mount_point)


def test_mount_twice_is_refused(node: FuseNode) -> None:
    channel = fuse.open_channel()
    try:
        with pytest.raises(TemporaryError, match="mounted already"):
            fuse.mount(channel, node.rundir, node.name)
    finally:
        os.close(channel)


def test_publish_refuses_a_name_in_use(node: FuseNode) -> None:
    with pytest.raises(TemporaryError, match="serves another resource"):
        fuse.publish(Path("/dev/loop-other"), node.name, node.devdir)
    foreign = node.devdir / "foreign"
    foreign.write_text("not a link")
    with pytest.raises(TemporaryError, match="is not hastd's"):
        fuse.publish(Path(node.device), "foreign", node.devdir)
    foreign.unlink()


def test_links_that_lead_nowhere_are_replaced_or_removed(node: FuseNode) -> None:
    dead = node.devdir / "dead"
    dead.symlink_to("../loop987654")
    fuse.publish(Path(node.device), "dead", node.devdir)
    assert dead.resolve() == Path(node.device)
    fuse.withdraw(node.rundir, node.name, "dead", node.devdir)
    assert not os.path.lexists(dead)
    dead.symlink_to("../loop987654")
    strangers = node.devdir / "stranger"
    strangers.symlink_to("/dev/null")
    fuse.cleanup_stale(node.rundir, ["dead", "stranger"], node.devdir)
    assert not os.path.lexists(dead)
    assert strangers.is_symlink()
    strangers.unlink()


def test_withdraw_leaves_the_link_of_another(node: FuseNode, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    fuse.withdraw(other, node.name, node.name, node.devdir)
    assert (node.devdir / node.name).is_symlink()


def test_more_loop_devices_than_the_machine_began_with(tmp_path: Path, name: str) -> None:
    # Files of any file system do: what is tested is that a free number is found, or made.
    need_root()
    backing = tmp_path / "backing"
    with backing.open("wb") as file:
        file.truncate(MIB)
    numbers: list[int] = []
    try:
        numbers.extend(loop.attach(backing) for _ in range(10))
        assert len(set(numbers)) == 10
        assert set(loop.devices_of(backing)) == set(numbers)
    finally:
        for number in numbers:
            loop.detach(number, backing)
    until(lambda: loop.devices_of(backing) == [], "the loop devices are free")
