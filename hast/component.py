"""The local component: the file or block device under a resource, from Python (docs/disk-format.md section 5).

Invariants:
- A component that is open for writing is locked: no second hastd or hastctl gets it, and a block device that is mounted
  or used otherwise is refused. The lock belongs to the open file, so that stages that inherit it hold it too.
- Nothing is written before the path was seen to be a regular file or a block device.
- The disk stage does all data and map I/O; here are the metadata block, the map before the stages run, and creation.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hast import boot
from hast.activemap import (
    DEFAULT_EXTENTSIZE,
    DEFAULT_KEEPDIRTY,
    FILE_SECTOR_SIZE,
    METADATA_SIZE,
    all_dirty,
    clear_bit,
    extent_count,
    geometry,
)
from hast.errors import (
    SHORTAGES,
    DataError,
    DiskError,
    HastError,
    InUseError,
    NoInputError,
    PermissionDeniedError,
    SystemCallError,
    TemporaryError,
)
from hast.ffi import _hast
from hast.metadata import Metadata, check_media, unpack

lib = _hast.lib

BLKSSZGET = 0x1268
MAX_KEEPDIRTY = 1 << 24  # extents: what an arena takes
CHUNK = 1 << 20  # bytes written at once where a map is cleared
RETRY = 0.02  # seconds
PLACE = "check 'local' in hast.conf"


@dataclass
class Component:
    """An open component. Sizes in bytes; `fd` is what the disk stage gets, `own` is this process's: opened once more,
    because the kernel tells of lost pages once for each opening, and whoever is told takes it away from the others.

    direct: the descriptor bypasses the page cache, all its I/O is then a multiple of `align` bytes (1 without).
    can_delete: DELETE works, that is, a range can be made to read as zeros without being written. engine: what the
    disk stage is to use: "inline", "uring" or "threads". note: a file that says so when a flush fails
    (hast/boot.py). sync_failed: one has. on_sync_failure: called then: it may have been the disk's only word of what it
    has lost, and the disk stage has not heard it.
    """

    resource: str
    path: str
    fd: int
    is_block: bool
    mediasize: int
    sectorsize: int
    own: int = -1
    note: Path | None = None
    sync_failed: bool = False
    on_sync_failure: Callable[[], None] | None = None
    memory_backed: bool = False
    direct: bool = False
    align: int = 1
    can_delete: bool = False
    engine: str = "threads"

    def read_metadata(self) -> Metadata:
        """The metadata block. Raises DataError (see hast.metadata.unpack and check_media), DiskError."""
        metadata = unpack(self.pread(0, METADATA_SIZE), self.resource)
        check_media(metadata, self.mediasize)
        return metadata

    def write_metadata(self, metadata: Metadata) -> None:
        """Write the metadata block; it is durable afterwards. Raises DiskError, DataError."""
        self.pwrite(0, metadata.pack())
        self.flush()

    def read_map(self, metadata: Metadata) -> bytes:
        """The activemap as it is on disk, metadata.mapsize bytes. Raises DiskError."""
        return self.pread(METADATA_SIZE, metadata.mapsize)

    def fill_map(self, metadata: Metadata) -> None:
        """Have the activemap say, durably, that every extent is dirty. Raises DiskError."""
        extents = extent_count(metadata.datasize, metadata.extentsize)
        bits = bytearray(all_dirty(metadata.mapsize))
        for extent in range(extents, 8 * metadata.mapsize):
            clear_bit(bits, extent)
        self.pwrite(METADATA_SIZE, bytes(bits))
        self.flush()

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly length (> 0) bytes from offset. Raises DiskError, TemporaryError."""
        with self._buffer(length) as buffer, _io(self, "read"):
            done = 0
            while done < length:
                n = os.preadv(self.own, [buffer[done:length]], offset + done)
                if n == 0:
                    raise OSError(errno.EIO, "unexpected end")
                done += n
            return bytes(buffer[:length])

    def pwrite(self, offset: int, data: bytes) -> None:
        """All of data to offset. Raises DiskError, TemporaryError."""
        with self._buffer(len(data)) as buffer, _io(self, "written"):
            buffer[: len(data)] = data
            done = 0
            while done < len(data):
                n = os.pwritev(self.own, [buffer[done : len(data)]], offset + done)
                if n == 0:
                    raise OSError(errno.EIO, "nothing was written")
                done += n

    def flush(self) -> None:
        """Make durable what was written, by whomever. Raises DiskError: then what was only in the cache may be lost."""
        try:
            with _io(self, "flushed"):
                os.fdatasync(self.own)
        except DiskError:
            self.sync_failed = True
            if self.note is not None:
                boot.spoil(self.note)
            if self.on_sync_failure is not None:
                self.on_sync_failure()
            raise

    def close(self) -> None:
        """Close this process's descriptors; the lock goes with the last one. May be called again."""
        for fd in (self.fd, self.own):
            if fd >= 0:
                os.close(fd)
        self.fd = self.own = -1

    @contextmanager
    def _buffer(self, length: int) -> Iterator[memoryview]:
        """Memory of that many bytes, on a page boundary as direct I/O wants it. Raises TemporaryError."""
        try:
            memory = mmap.mmap(-1, length)
        except OSError as error:  # the system's, not the disk's
            raise TemporaryError(
                f"{self.resource}: no memory to read or write component {self.path}: {error.strerror}"
            ) from error
        with memory, memoryview(memory) as view:
            yield view


@dataclass
class AbsentComponent(Component):
    """In the place of one that was given up and cannot even be opened: a descriptor for the stages that nothing is done
    with, and errors for whoever wants its metadata."""

    why: str = ""

    @classmethod
    def of(cls, resource: str, path: str, metadata: Metadata, why: str) -> AbsentComponent:
        """Raises TemporaryError."""
        try:
            fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TemporaryError(f"{resource}: cannot open {os.devnull}: {error.strerror}") from error
        size = metadata.offset + metadata.datasize
        # direct: ggate leaves all that there might be to be done to the disk stage.
        return cls(resource, path, fd, False, size, FILE_SECTOR_SIZE, direct=True, can_delete=True, why=why)

    def pread(self, offset: int, length: int) -> bytes:
        raise DiskError(self.why)

    def pwrite(self, offset: int, data: bytes) -> None:
        raise DiskError(self.why)

    def flush(self) -> None:
        raise DiskError(self.why)


@contextmanager
def _io(component: Component, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{component.resource}: component {component.path} cannot be {what}: {error.strerror}"
        ) from error


# ---- opening ----


def open_component(
    resource: str,
    path: str,
    directio: str = "auto",
    write: bool = True,
    wait: float = 0.0,
    note: Path | None = None,
) -> Component:
    """Open, lock and examine the component of a resource.

    directio: "on", "off" or "auto" (block devices, and files whose file system takes direct I/O in 512-byte sectors).
    write=False only looks: no lock, no direct I/O, so it works beside a running hastd. wait: seconds to keep trying
    while it is in use: a process that was killed takes a moment to be gone, and its lock with it. note: see Component.
    Raises NoInputError, PermissionDeniedError, TemporaryError (in use), DiskError, SystemCallError.
    """
    deadline = time.monotonic() + wait
    while True:
        try:
            component = _open_once(resource, path, directio, write)
            component.note = note
            return component
        except TemporaryError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(RETRY)


def _open_once(resource: str, path: str, directio: str, write: bool) -> Component:
    fd, is_block = _open(resource, path, write)
    try:
        if write:
            _lock(resource, path, fd)
        component = _examine(resource, path, fd, is_block)
        if write:
            _choose_io(component, directio)
        flags = (os.O_RDWR if write else os.O_RDONLY) | (os.O_DIRECT if component.direct else 0)
        with _io(component, "opened again"):
            component.own = os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC | os.O_NOCTTY)
        return component
    except BaseException:
        os.close(fd)
        raise


def _open(resource: str, path: str, write: bool) -> tuple[int, bool]:
    """The descriptor, and whether it is a block device."""
    try:
        # Before opening: merely opening some devices (tapes, watchdogs) does something.
        is_block = _kind(resource, path, Path(path).stat())
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOCTTY
        fd = os.open(path, flags | (os.O_EXCL if write and is_block else 0))
    except OSError as error:
        raise _open_error(resource, path, error) from error
    try:
        if _kind(resource, path, os.fstat(fd)) != is_block:
            raise TemporaryError(f"{resource}: component {path} was replaced while it was being opened: try again")
    except BaseException:
        os.close(fd)
        raise
    return fd, is_block


def _kind(resource: str, path: str, status: os.stat_result) -> bool:
    """True for a block device, False for a regular file. Raises NoInputError for the rest."""
    if stat.S_ISBLK(status.st_mode):
        return True
    if stat.S_ISREG(status.st_mode):
        return False
    raise NoInputError(f"{resource}: component {path} is neither a regular file nor a block device: {PLACE}")


def _open_error(resource: str, path: str, error: OSError) -> HastError:
    where = f"{resource}: component {path}"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NoInputError(f"{where} does not exist: {PLACE}")
    if error.errno in (errno.EACCES, errno.EPERM):
        return PermissionDeniedError(f"{where}: permission denied: run as its owner or as root")
    if error.errno in (errno.EBUSY, errno.ETXTBSY):
        return InUseError(
            f"{where} is in use: it is mounted, part of another device, a swap area, or a process of hastd still waits"
            f" for it ('hastd: {resource} ...')"
        )
    if error.errno in SHORTAGES:
        return TemporaryError(f"{where} cannot be opened now: {error.strerror}")
    if error.errno == errno.EIO:
        return DiskError(f"{where} cannot be opened: {error.strerror}")
    return NoInputError(f"{where} cannot be opened: {error.strerror}")


def _lock(resource: str, path: str, fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUseError(
            f"{resource}: component {path} is locked by another hastd or hastctl, or by a process of theirs that still"
            f" waits for the disk ('hastd: {resource} ...')"
        ) from None
    except OSError as error:
        raise SystemCallError(f"{resource}: component {path} cannot be locked: {error.strerror}") from error


def _examine(resource: str, path: str, fd: int, is_block: bool) -> Component:
    """Size and sector size."""
    component = Component(resource, path, fd, is_block, 0, FILE_SECTOR_SIZE)
    with _io(component, "examined"):
        component.mediasize = os.lseek(fd, 0, os.SEEK_END)
        if is_block:
            (component.sectorsize,) = struct.unpack("i", fcntl.ioctl(fd, BLKSSZGET, bytes(4)))
        component.memory_backed = _asked(lib.hast_disk_memory_backed(fd))
    if component.mediasize < METADATA_SIZE + 2 * component.sectorsize:
        raise NoInputError(
            f"{resource}: component {path} has {component.mediasize} bytes, which is too small for a component"
        )
    return component


def _asked(answer: int) -> bool:
    """The answer of a C function that returns 1, 0 or -errno. Raises OSError."""
    if answer < 0:
        raise OSError(-answer, os.strerror(-answer))
    return answer == 1


# ---- how it is used ----


def _choose_io(component: Component, directio: str) -> None:
    """Direct I/O or not, engine, and whether DELETE works."""
    with _io(component, "examined"):
        component.can_delete = (
            _can_zero_device(component.fd) if component.is_block else _asked(lib.hast_disk_can_punch(component.fd))
        )
    if directio != "off" and not (directio == "auto" and component.memory_backed):
        component.direct = _set_direct(component)
        component.align = FILE_SECTOR_SIZE if component.direct else 1
    if directio == "on" and not component.direct:
        raise NoInputError(
            f"{component.resource}: component {component.path} does not take direct I/O in sectors of"
            f" {FILE_SECTOR_SIZE} bytes: set 'directio off' or 'auto'"
        )
    if component.memory_backed:
        component.engine = "inline"
    else:
        component.engine = "uring" if lib.hast_disk_uring_works() else "threads"


def _set_direct(component: Component) -> bool:
    """Switch the descriptor to direct I/O where that takes single sectors of 512 bytes: clients may ask for them."""
    if component.sectorsize > FILE_SECTOR_SIZE:
        return False
    flags = fcntl.fcntl(component.fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(component.fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        # Some file systems take the flag and then want more than a sector. The metadata block is there to be read.
        with mmap.mmap(-1, mmap.PAGESIZE) as memory, memoryview(memory) as view:
            at = FILE_SECTOR_SIZE
            if os.preadv(component.fd, [view[at : 2 * at]], at) == at:
                return True
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise DiskError(
                f"{component.resource}: component {component.path} cannot be read: {error.strerror}"
            ) from error
    fcntl.fcntl(component.fd, fcntl.F_SETFL, flags)
    return False


def _can_zero_device(fd: int) -> bool:
    """Whether the device can zero a range by itself. Discard alone does not say what is read back afterwards."""
    device = os.fstat(fd).st_rdev
    base = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    # A partition has no queue of its own: it is that of the disk, one level up.
    for queue in (base / "queue", base / ".." / "queue"):
        try:
            return int((queue / "write_zeroes_max_bytes").read_text()) > 0
        except (OSError, ValueError):
            continue
    return False


# ---- creation ----


def create(
    resource: str,
    path: str,
    extentsize: int = DEFAULT_EXTENTSIZE,
    keepdirty: int = DEFAULT_KEEPDIRTY,
    mediasize: int | None = None,
) -> Metadata:
    """Make a new, never used component: `hastctl create`. What was on it is lost. All sizes in bytes.

    mediasize: use only so much (the smaller of the two nodes' media); a regular file that is not there is made with
    that size, one that is smaller is extended. Raises what open_component() raises, DataError for impossible sizes.
    """
    if not 0 < keepdirty <= MAX_KEEPDIRTY:
        raise DataError(f"{resource}: keepdirty {keepdirty} is not between 1 and {MAX_KEEPDIRTY}")
    if mediasize is not None and (mediasize <= 0 or mediasize % FILE_SECTOR_SIZE):
        raise DataError(f"{resource}: media size {mediasize} is not a positive multiple of {FILE_SECTOR_SIZE}")
    if mediasize is not None:
        geometry(mediasize, extentsize, FILE_SECTOR_SIZE)  # before a file is made or extended for nothing
    made = mediasize is not None and not os.path.lexists(path)
    if made:
        _make_file(resource, path)
    try:
        if mediasize is not None:
            _extend(resource, path, mediasize)
        component = open_component(resource, path, directio="off")
        try:
            return _create_on(component, extentsize, keepdirty, mediasize)
        finally:
            component.close()
    except BaseException:
        if made:
            Path(path).unlink()
        raise


def _make_file(resource: str, path: str) -> None:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        directory = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise _open_error(resource, path, error) from error


def _extend(resource: str, path: str, mediasize: int) -> None:
    """Let a regular file have at least mediasize bytes; the new ones read as zeros and take no space."""
    fd, is_block = _open(resource, path, write=True)
    try:
        _lock(resource, path, fd)
        size = os.lseek(fd, 0, os.SEEK_END)
        if size < mediasize and is_block:
            raise DataError(
                f"{resource}: media size {mediasize} is larger than component {path}, which has {size} bytes"
            )
        if size < mediasize:
            os.ftruncate(fd, mediasize)
    except OSError as error:
        raise DiskError(
            f"{resource}: component {path} cannot be made {mediasize} bytes large: {error.strerror}"
        ) from error
    finally:
        os.close(fd)


def _create_on(component: Component, extentsize: int, keepdirty: int, mediasize: int | None) -> Metadata:
    try:
        layout = geometry(mediasize or component.mediasize, extentsize, component.sectorsize)
    except DataError as error:
        raise DataError(f"{component.resource}: component {component.path}: {error}") from None
    metadata = Metadata(
        resource=component.resource,
        datasize=layout.datasize,
        extentsize=extentsize,
        keepdirty=keepdirty,
        offset=layout.offset,
    )
    block = metadata.pack()
    # If this is interrupted no valid block may be left beside a map that is not its own: an old block beside an
    # empty map would say that an old resource is in sync.
    component.pwrite(0, bytes(METADATA_SIZE))
    component.flush()
    for at in range(METADATA_SIZE, layout.offset, CHUNK):
        component.pwrite(at, bytes(min(CHUNK, layout.offset - at)))
    component.flush()
    component.pwrite(0, block)
    component.flush()
    return metadata
