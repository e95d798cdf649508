"""Loop devices (loop(4)): attach one to a file with direct I/O, find those of a file, take them away.

Invariants:
- A device is ours as long as its backing file is: that, and not its number, is what decides, because numbers are
  used again.
- Two processes may want the same free number at once; the kernel gives it to one, the other takes the next.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from hast.errors import SystemCallError, TemporaryError

CONTROL = Path("/dev/loop-control")
LOOP_CLR_FD, LOOP_CTL_GET_FREE, LOOP_CONFIGURE = 0x4C01, 0x4C82, 0x4C0A
LO_FLAGS_DIRECT_IO = 16
SECTOR = 512  # bytes; the logical block size, as of the data on FreeBSD
DISCARD_MAX = 64 << 20  # bytes in one discard
TRIES = 200  # to get a number that nobody else takes meanwhile
BUSY = (errno.EBUSY, errno.ENXIO, errno.ENOENT)  # taken, just being removed, just removed

# struct loop_config: fd, block_size, struct loop_info64, 8 reserved words.
_CONFIG = struct.Struct("=II 5Q 4I 64s 64s 32s 2Q 8Q")


def attach(path: Path) -> int:
    """Attach a free loop device to the file `path`, with direct I/O and 512-byte blocks; its number.

    Blocks as long as the file's server does not answer. Raises SystemCallError, TemporaryError when no device is free.
    """
    try:
        with _opened(path) as backing, _opened(CONTROL) as control:
            for _ in range(TRIES):
                number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
                if _configure(number, backing, path):
                    _limit_discard(number)
                    return number
                time.sleep(0.005)  # somebody else took it
    except OSError as error:
        raise SystemCallError(f"cannot attach a loop device to {path}: {error.strerror}") from error
    raise TemporaryError(f"cannot attach a loop device to {path}: all that were free were taken by others")


def _configure(number: int, backing: int, path: Path) -> bool:
    """Whether the device was free and now has the file behind it."""
    name = os.fsencode(path)[:63]
    config = _CONFIG.pack(
        backing, SECTOR, *(0,) * 5, number, 0, 0, LO_FLAGS_DIRECT_IO, name, b"", b"", *(0,) * 2, *(0,) * 8
    )
    try:
        with _opened(_node(number)) as device:
            fcntl.ioctl(device, LOOP_CONFIGURE, config)
    except OSError as error:
        if error.errno in BUSY:
            return False
        raise
    return True


def _limit_discard(number: int) -> None:
    """A discard locks the whole file until it is done, for writes and flushes as well; and where the other node cannot
    punch holes it is as long as writing zeros. The kernel would put 4 GiB into one."""
    with contextlib.suppress(OSError):  # sysfs may be read-only, in a container
        Path(f"/sys/block/loop{number}/queue/discard_max_bytes").write_text(str(DISCARD_MAX))


def _node(number: int) -> Path:
    """/dev/loop<number>, made where nobody makes it when the kernel adds a device (containers)."""
    node = device_path(number)
    if not node.exists():
        major, minor = Path(f"/sys/block/loop{number}/dev").read_text().split(":")
        with contextlib.suppress(FileExistsError):
            os.mknod(node, stat.S_IFBLK | 0o660, os.makedev(int(major), int(minor)))
    return node


def device_path(number: int) -> Path:
    """The device's node."""
    return Path(f"/dev/loop{number}")


def backing_file(number: int) -> str | None:
    """The path of the file behind the device, None when it has none."""
    try:
        return Path(f"/sys/block/loop{number}/loop/backing_file").read_text().removesuffix("\n")
    except OSError:
        return None


def devices_of(path: Path) -> list[int]:
    """Numbers of the loop devices that stand on the file `path`."""
    numbers = [int(entry.name.removeprefix("loop")) for entry in Path("/sys/block").glob("loop[0-9]*")]
    return sorted(number for number in numbers if backing_file(number) == str(path))


def direct(number: int) -> bool:
    """Whether the device bypasses the page cache of its file."""
    try:
        return Path(f"/sys/block/loop{number}/loop/dio").read_text().strip() == "1"
    except OSError:
        return False


def detach(number: int, path: Path) -> None:
    """Take the file `path` away from the device; while it is open somewhere, the kernel does it at its last close.

    Writes out what is cached, so it blocks as long as the file's server does not answer. Does nothing when another file
    is behind the device by now. Raises SystemCallError.
    """
    try:
        with _opened(device_path(number)) as device:
            if backing_file(number) == str(path):
                fcntl.ioctl(device, LOOP_CLR_FD)
    except OSError as error:
        if error.errno not in BUSY:
            raise SystemCallError(f"cannot detach {device_path(number)}: {error.strerror}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
