"""The local component: what is refused, with which words; locking; direct I/O; creation, byte for byte."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hast import component as module
from hast.activemap import METADATA_SIZE
from hast.component import Component, create, open_component
from hast.control import Role
from hast.errors import DataError, DiskError, HastError, NoInputError, TemporaryError
from hast.ffi import _hast
from hast.metadata import BlankMetadataError, ForeignMetadataError, MediaSizeError, Pair
from tests.tools import loop_device

MIB = 1 << 20
VECTORS = Path(__file__).resolve().parents[1] / "vectors"
root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: loop devices, mounts, other users")


def vector(name: str) -> bytes:
    lines = (VECTORS / f"{name}.hex").read_text().splitlines()
    return bytes.fromhex("".join(line for line in lines if not line.startswith("#")))


def blank(path: Path, size: int = 4 * MIB) -> str:
    path.touch()
    os.truncate(path, size)
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return blank(tmp_path / "component")


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory."""
    shm = Path("/dev/shm")
    if not shm.is_dir() or not os.access(shm, os.W_OK):
        pytest.skip("no /dev/shm here")
    made = shm / f"hast-test-{os.getpid()}-{os.urandom(4).hex()}"
    made.mkdir()
    yield made
    for left in made.iterdir():
        left.unlink()
    made.rmdir()


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    """A loop device of 8 MiB."""
    backing = blank(tmp_path / "backing", 8 * MIB)
    device = loop_device(backing)
    yield device
    subprocess.run(["losetup", "-d", device], check=True)


def refused(kind: type[HastError], path: str, *words: str, **options: str) -> None:
    with pytest.raises(kind) as caught:
        open_component("data", path, **options).close()  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    for word in ("data", path, *words):
        assert word in message, message


# ---- what is refused ----


def test_missing(tmp_path: Path) -> None:
    refused(NoInputError, str(tmp_path / "none"), "does not exist", "hast.conf")
    refused(NoInputError, str(tmp_path / "none" / "below"), "does not exist")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    refused(NoInputError, str(tmp_path / "dangling"), "does not exist")


def test_neither_file_nor_block_device(tmp_path: Path) -> None:
    refused(NoInputError, str(tmp_path), "neither a regular file nor a block device")
    refused(NoInputError, "/dev/null", "neither a regular file nor a block device")
    os.mkfifo(tmp_path / "fifo")
    refused(NoInputError, str(tmp_path / "fifo"), "neither a regular file nor a block device")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        refused(NoInputError, str(tmp_path / "socket"), "neither a regular file nor a block device")


@pytest.mark.parametrize("size", [0, 511, 4096, 4096 + 1023])
def test_too_small(tmp_path: Path, size: int) -> None:
    refused(NoInputError, blank(tmp_path / "small", size), "too small", str(size))


def test_smallest(tmp_path: Path) -> None:
    small = blank(tmp_path / "small", 4096 + 1024)
    made = create("data", small)
    assert (made.datasize, made.offset) == (512, 4608)
    open_component("data", small).close()


@root
@pytest.mark.root
def test_no_permission(memory: Path) -> None:
    """As another user, in a process of its own: root may everything."""
    path = blank(memory / "component")
    Path(path).chmod(0o600)
    program = f"""
import os
from hast.component import create, open_component
from hast.errors import PermissionDeniedError
os.setresuid(65534, 65534, 65534)
for act in (open_component, create):
    try:
        act("data", {path!r})
    except PermissionDeniedError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[1])},
    )
    assert done.stdout.count(f"data: component {path}: permission denied") == 2, done


def test_locked_by_another(path: str) -> None:
    with open_one(path):
        refused(TemporaryError, path, "locked by another hastd or hastctl")
        with pytest.raises(TemporaryError, match="locked by another"):
            create("data", path)
        with pytest.raises(TemporaryError, match="locked by another"):
            create("data", path, mediasize=8 * MIB)
        # To look is always possible.
        open_component("data", path, write=False).close()
    open_component("data", path).close()


def test_lock_goes_with_the_last_descriptor(path: str) -> None:
    component = open_component("data", path)
    inherited = os.dup(component.fd)
    component.close()
    component.close()
    refused(TemporaryError, path, "locked")
    os.close(inherited)
    open_component("data", path).close()


def test_waiting_for_the_last_user(path: str) -> None:
    """A process that holds it ends while we wait."""
    program = f"""
import sys
from hast.component import open_component
component = open_component("data", {path!r})
print("locked", flush=True)
sys.stdin.readline()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[1])},
    )
    try:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == "locked\n"
        refused(TemporaryError, path, "locked")
        with pytest.raises(TemporaryError):
            open_component("data", path, wait=0.05)
        holder.stdin.write("\n")
        holder.stdin.flush()
        open_component("data", path, wait=30).close()
    finally:
        holder.kill()
        holder.communicate()


def open_descriptors() -> list[str]:
    return sorted(str(fd) for fd in Path("/proc/self/fd").iterdir())


def test_a_refused_component_leaves_no_descriptor(path: str, tmp_path: Path) -> None:
    small = blank(tmp_path / "small", 100)
    create("data", path)
    before = open_descriptors()
    with open_one(path):
        refused(TemporaryError, path)
    refused(NoInputError, small)
    refused(NoInputError, str(tmp_path))
    with pytest.raises(DataError):
        create("data", path, extentsize=1000)
    assert open_descriptors() == before


class open_one:
    """with open_one(path) as component."""

    def __init__(self, path: str, **options: object) -> None:
        self.component = open_component("data", path, **options)  # type: ignore[arg-type]

    def __enter__(self) -> Component:
        return self.component

    def __exit__(self, *_: object) -> None:
        self.component.close()


# ---- what it is ----


def test_regular_file(path: str) -> None:
    with open_one(path) as component:
        assert (component.mediasize, component.sectorsize, component.is_block) == (4 * MIB, 512, False)
        assert not os.get_inheritable(component.fd)
        assert fcntl.fcntl(component.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


def direct_works(path: str) -> bool:
    """Whether a read of one sector past the page cache works: what auto is to find out."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, 4096) as memory, memoryview(memory) as view:
            return os.preadv(fd, [view[:512]], 512) == 512
    except OSError:
        return False
    finally:
        os.close(fd)


def test_direct_io(path: str) -> None:
    if not direct_works(path):
        pytest.skip("this file system takes no direct I/O in single sectors")
    for setting, direct in (("auto", True), ("on", True), ("off", False)):
        with open_one(path, directio=setting) as component:
            assert component.direct is direct
            assert component.align == (512 if direct else 1)
            assert bool(fcntl.fcntl(component.fd, fcntl.F_GETFL) & os.O_DIRECT) is direct
            expected = "uring" if _hast.lib.hast_disk_uring_works() else "threads"
            assert component.engine == expected


def test_memory_backed(memory: Path) -> None:
    with open_one(blank(memory / "component")) as component:
        assert component.memory_backed
        assert component.engine == "inline"
        assert not component.direct
        assert component.align == 1
        assert component.can_delete


def test_punching_is_probed_without_harm(path: str) -> None:
    content = os.urandom(4 * MIB)
    Path(path).write_bytes(content)
    with open_one(path) as component:
        can = component.can_delete
    assert Path(path).read_bytes() == content
    assert Path(path).stat().st_size == 4 * MIB
    # And it is right.
    done = subprocess.run(["fallocate", "-p", "-o", "4096", "-l", "4096", path], capture_output=True)
    assert can is (done.returncode == 0)


@root
@pytest.mark.root
def test_block_device(loop: str) -> None:
    with open_one(loop) as component:
        assert component.is_block
        assert (component.mediasize, component.sectorsize) == (8 * MIB, 512)
        assert component.direct
        limit = Path(f"/sys/block/{Path(loop).name}/queue/write_zeroes_max_bytes").read_text()
        assert component.can_delete is (int(limit) > 0)
        # Exclusive: nobody mounts it meanwhile, and we do not take what somebody has mounted.
        with pytest.raises(OSError, match="busy"):
            os.open(loop, os.O_RDWR | os.O_EXCL)
        refused(TemporaryError, loop, "in use")
        open_component("data", loop, write=False).close()


@root
@pytest.mark.root
def test_mounted_block_device(loop: str, tmp_path: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", loop], check=True)
    (tmp_path / "mnt").mkdir()
    if subprocess.run(["mount", loop, str(tmp_path / "mnt")], capture_output=True).returncode != 0:
        pytest.skip("no mounting here")
    try:
        refused(TemporaryError, loop, "mounted")
        with pytest.raises(TemporaryError, match="mounted"):
            create("data", loop)
    finally:
        subprocess.run(["umount", str(tmp_path / "mnt")], check=True)


@root
@pytest.mark.root
def test_large_sectors(tmp_path: Path) -> None:
    backing = blank(tmp_path / "backing", 8 * MIB)
    device = loop_device(backing, "--sector-size", "4096")
    try:
        made = create("data", device)
        assert made.offset == 8192  # the map is a whole sector
        with open_one(device) as component:
            assert component.sectorsize == 4096
            assert not component.direct, "clients may ask for 512 bytes"
            assert component.read_metadata() == made
        refused(NoInputError, device, "direct I/O", "directio off", directio="on")
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


# ---- metadata and map ----


@pytest.mark.parametrize("directio", ["auto", "off"])
def test_metadata_round_trip(path: str, directio: str) -> None:
    made = create("data", path)
    with open_one(path, directio=directio) as component:
        assert component.read_metadata() == made
        changed = type(made)(**{**made.__dict__, "resuid": 7, "pair": Pair(3, 4), "prevrole": Role.PRIMARY})
        component.write_metadata(changed)
        assert component.read_metadata() == changed
        assert component.read_map(changed) == bytes(512)
    with open_one(path, write=False) as component:
        assert component.read_metadata() == changed
        with pytest.raises(DiskError, match=r"cannot be written: Bad file descriptor"):
            component.write_metadata(made)


def test_map_is_read_from_its_place(path: str) -> None:
    made = create("data", path)
    with Path(path).open("r+b") as raw:
        raw.seek(METADATA_SIZE)
        raw.write(b"\x01\x80" + b"\xff")
    with open_one(path) as component:
        assert component.read_map(made) == b"\x01\x80\xff" + bytes(509)


def test_metadata_that_is_not_ours(path: str) -> None:
    with open_one(path) as component, pytest.raises(BlankMetadataError, match="hastctl create"):
        component.read_metadata()
    create("other", path)
    with open_one(path) as component, pytest.raises(ForeignMetadataError, match="other"):
        component.read_metadata()


def test_component_that_was_cut(path: str) -> None:
    create("data", path)
    os.truncate(path, 3 * MIB)
    with open_one(path) as component, pytest.raises(MediaSizeError, match="truncated"):
        component.read_metadata()


def test_read_past_the_end_is_an_error(path: str) -> None:
    with open_one(path, directio="off") as component:
        os.truncate(path, 1000)
        with pytest.raises(DiskError, match=r"data: component .* cannot be read: "):
            component.pread(0, METADATA_SIZE)


def test_write_error_is_one_line(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    fd = os.open("/dev/full", os.O_RDWR | os.O_CLOEXEC)
    component = Component("data", "/dev/full", fd, False, 4 * MIB, 512, own=os.dup(fd))
    try:
        with pytest.raises(DiskError) as caught:
            component.pwrite(0, bytes(4096))
        assert str(caught.value) == f"data: component /dev/full cannot be written: {os.strerror(errno.ENOSPC)}"
    finally:
        component.close()


# ---- create ----


def test_created_like_the_original(tmp_path: Path) -> None:
    path = blank(tmp_path / "component", 64 * MIB)
    Path(path).write_bytes(b"\xa5" * 10000)  # must not survive where the map goes
    os.truncate(path, 64 * MIB)
    made = create("data", path)
    content = Path(path).read_bytes()
    assert content[:METADATA_SIZE] == vector("metadata_init")
    assert content[METADATA_SIZE : made.offset] == bytes(made.mapsize)
    assert content[made.offset : 10000] == b"\xa5" * (10000 - made.offset), "data was touched"


def test_create_options(path: str) -> None:
    made = create("r", path, extentsize=65536, keepdirty=7, mediasize=2 * MIB)
    assert (made.extentsize, made.keepdirty) == (65536, 7)
    assert made.offset + made.datasize == 2 * MIB
    assert Path(path).stat().st_size == 4 * MIB, "a smaller media size cuts nothing"
    component = open_component("r", path)
    assert component.read_metadata() == made
    component.close()


def test_create_makes_and_extends_files(tmp_path: Path) -> None:
    path = tmp_path / "new"
    made = create("data", str(path), mediasize=8 * MIB)
    assert path.stat().st_size == 8 * MIB
    assert path.stat().st_mode & 0o777 == 0o600
    assert made.offset + made.datasize == 8 * MIB
    made = create("data", str(path), mediasize=16 * MIB)
    assert path.stat().st_size == 16 * MIB
    assert made.offset + made.datasize == 16 * MIB


def test_create_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(NoInputError, match="does not exist"):
        create("data", str(tmp_path / "none"))
    with pytest.raises(NoInputError, match="does not exist"):
        create("data", str(tmp_path / "no" / "directory"), mediasize=MIB)
    assert list(tmp_path.iterdir()) == []


IMPOSSIBLE = [("extentsize", n) for n in (256, 1000, 3 * 4096)]
IMPOSSIBLE += [("keepdirty", n) for n in (0, 1 << 25)]
IMPOSSIBLE += [("mediasize", n) for n in (-512, 0, 1000, 4608)]


@pytest.mark.parametrize("option", IMPOSSIBLE, ids=str)
def test_impossible_sizes(tmp_path: Path, option: tuple[str, int]) -> None:
    """Refused before anything is written, made or extended."""
    existing = tmp_path / "existing"
    existing.write_bytes(b"\x5a" * (64 * 1024))
    for path in (existing, tmp_path / "new"):
        if path.exists() or option[0] == "mediasize":
            with pytest.raises(DataError):
                create("data", str(path), **dict([option]))
    assert existing.read_bytes() == b"\x5a" * (64 * 1024)
    assert [p.name for p in tmp_path.iterdir()] == ["existing"]


def test_file_made_for_nothing_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "new"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(DiskError, match=r"cannot be made 8388608 bytes large"):
            create("data", str(path), mediasize=8 * MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not path.exists()


@root
@pytest.mark.root
def test_create_on_a_block_device(loop: str) -> None:
    made = create("data", loop, extentsize=65536)
    with open_one(loop) as component:
        assert component.read_metadata() == made
    with pytest.raises(DataError, match="larger than component"):
        create("data", loop, mediasize=16 * MIB)
    with open_one(loop) as component:
        assert component.read_metadata() == made, "a refused create has written"


def test_an_interrupted_create_leaves_no_valid_block(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old block must not stand beside the new, empty map: it would say that an old resource is in sync."""
    create("data", path)
    with Path(path).open("r+b") as raw:
        raw.seek(METADATA_SIZE)
        raw.write(b"\xff")

    states = []
    fdatasync = os.fdatasync

    def record(fd: int) -> None:
        fdatasync(fd)
        states.append(Path(path).read_bytes()[: METADATA_SIZE + 512])

    monkeypatch.setattr(os, "fdatasync", record)
    create("data", path)
    for durable in states[:-1]:
        assert durable[:METADATA_SIZE] == bytes(METADATA_SIZE)
    assert states[-2][METADATA_SIZE:] == bytes(512)
    assert states[-1][:METADATA_SIZE] != bytes(METADATA_SIZE)
