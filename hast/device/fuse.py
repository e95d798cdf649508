"""The block device of a resource: a file system of one file (the resource, served by the ggate stage's FUSE port), a
loop device on that file, and a symbolic link to it: /dev/hast/<provname>.

Every function here is plain and blocking. Those that touch the file or the loop device wait for the ggate stage, so
neither it nor anybody whom it waits for may call them: call them in a child process with a deadline, and abort()
when it is over.

Invariants:
- The link is there only while the device serves I/O: it is made last and removed first, each atomically.
- Only what is ours is taken away: mounts of type fuse.hast right below our run directory, loop devices on those
  mounts, links to those loop devices. A mount that still has a living server is never touched by cleanup_stale().
- What a killed hastd has left is found again from the mount table and sysfs alone, so nothing has to be written down.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import select
import signal
import time
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from hast.device import loop, mounts
from hast.errors import HastError, SystemCallError, TemporaryError, UnavailableError

log = logging.getLogger(__name__)

CHANNEL = Path("/dev/fuse")
DEVDIR = Path("/dev/hast")
FSTYPE = "fuse.hast"
MAX_READ = 1 << 20  # bytes in one request, as fuse.c has it
CAP_SYS_ADMIN = 21
PROBE_SECONDS = 2.0  # for a mount's server to answer; one that does not is taken for alive

_LOOP_LINK = re.compile(r"(?:.*/)?loop([0-9]+)")


# ---- what can be done here ----


def usable() -> str | None:
    """Why this machine cannot give a resource a block device through FUSE; None when it can."""
    if not _may_mount():
        return "mounting file systems needs root (CAP_SYS_ADMIN)"
    for path, what in ((CHANNEL, "FUSE"), (loop.CONTROL, "loop devices")):
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            return f"{what} cannot be used: {path}: {error.strerror}"
    return None


def _may_mount() -> bool:
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return match is not None and bool(int(match[1], 16) >> CAP_SYS_ADMIN & 1)


# ---- making it, in this order ----


def open_channel() -> int:
    """A new FUSE channel; close-on-exec and non-blocking. As long as a process has it open, what is under way waits
    for a new server instead of failing. Raises UnavailableError."""
    try:
        return os.open(CHANNEL, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UnavailableError(f"cannot open {CHANNEL}: {error.strerror}") from error


def mount_point(rundir: Path, name: str) -> Path:
    """Where the file of resource `name` is mounted, in the kernel's spelling (no symbolic links)."""
    return rundir.resolve() / f"{name}.dev"


def mount(channel: int, rundir: Path, name: str) -> Path:
    """Mount the channel on its mount point, which is made; does not wait for the server. Returns the mount point.

    Raises TemporaryError when something is mounted there already (see cleanup_stale()), SystemCallError.
    """
    point = mount_point(rundir, name)
    options = f"fd={channel},rootmode=100600,user_id=0,group_id=0,default_permissions,allow_other,max_read={MAX_READ}"
    if _mounts_on(point):
        raise TemporaryError(f"{name}: {point} is mounted already: another hastd serves it, or umount -l {point}")
    try:
        os.close(os.open(point, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        flags = mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOATIME
        mounts.mount(f"hast:{name}", point, FSTYPE, flags, options)
    except OSError as error:
        raise SystemCallError(f"{name}: cannot mount {point}: {error.strerror}") from error
    return point


def attach_loop(rundir: Path, name: str) -> Path:
    """Attach a loop device to the mounted file; the device's path. Waits for the server. Raises HastError."""
    number = loop.attach(mount_point(rundir, name))
    if not loop.direct(number):
        log.warning("%s: %s has no direct I/O, it will be slow", name, loop.device_path(number))
    return loop.device_path(number)


def publish(device: Path, provname: str, devdir: Path = DEVDIR) -> Path:
    """Make the link <devdir>/<provname> to the loop device, in one step; the link's path.

    What a killed hastd has left there is replaced. Raises TemporaryError when the name is taken by a device in use
    or by something else, SystemCallError.
    """
    link = devdir / provname
    fresh = devdir / f".{provname}.{os.getpid()}"
    try:
        devdir.mkdir(mode=0o755, parents=True, exist_ok=True)
        number = _linked_loop(link)
        if os.path.lexists(link) and number is None:
            raise TemporaryError(f"{link} is there already and is not hastd's: remove it")
        if number is not None and _serving(number):
            raise TemporaryError(f"{link} is there already and serves another resource: choose another name")
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()
        fresh.symlink_to(os.path.relpath(device, devdir))
        fresh.replace(link)
    except OSError as error:
        raise SystemCallError(f"cannot make {link}: {error.strerror}") from error
    return link


# ---- taking it away ----


def withdraw(rundir: Path, name: str, provname: str, devdir: Path = DEVDIR) -> None:
    """Remove the link if it leads to this resource's loop device. Never waits. Raises SystemCallError."""
    link = devdir / provname
    if _linked_loop(link) in loop.devices_of(mount_point(rundir, name)):
        _unlink(link)


def detach(rundir: Path, name: str, provname: str, devdir: Path = DEVDIR) -> None:
    """Take away the link, the loop device and the mount, in this order; what is not there is no error.

    Waits for the server while caches are written out. A loop device that is in use (a mounted file system) goes when
    its last user does; its I/O fails as soon as the channel is closed everywhere. Raises SystemCallError.
    """
    point = mount_point(rundir, name)
    withdraw(rundir, name, provname, devdir)
    for number in loop.devices_of(point):
        loop.detach(number, point)
    _unmount(point)


def abort(rundir: Path, name: str) -> None:
    """Fail everything that waits for the server, now and from now on; never waits. detach() goes through afterwards."""
    point = mount_point(rundir, name)
    if _mounts_on(point):
        # EBUSY: aborted, and as it is in use, still mounted.
        with contextlib.suppress(OSError):
            mounts.umount(point, mounts.MNT_FORCE)


def _unmount(point: Path) -> None:
    try:
        for _ in _mounts_on(point):
            mounts.umount(point, mounts.MNT_DETACH)
        with contextlib.suppress(FileNotFoundError):
            point.unlink()
    except OSError as error:
        raise SystemCallError(f"cannot unmount {point}: {error.strerror}") from error


# ---- after kill -9 ----


def clear(rundir: Path, name: str, devdir: Path = DEVDIR) -> None:
    """Take away what a killed worker has left of this resource's device, so that mount() finds its place free.

    Takes PROBE_SECONDS when there is a server that hangs. Raises TemporaryError when the device has a server,
    SystemCallError.
    """
    point = mount_point(rundir, name)
    if not _mounts_on(point):
        return
    if _alive(point):
        raise TemporaryError(f"{name}: its block device is still served by a process of another hastd: end it")
    _take_away(point, devdir)


def cleanup_stale(
    rundir: Path, provnames: Iterable[str], devdir: Path = DEVDIR, kept: Container[str] = ()
) -> list[str]:
    """Take away what a killed hastd has left of its devices in this run directory, and the links `provnames` that lead
    nowhere. Returns the resources whose device still has a server: those are left alone, and so are those that are kept
    for a worker to come.

    Takes PROBE_SECONDS for each server that hangs. Problems are logged: one dead device must not keep the others down.
    """
    living = []
    here = rundir.resolve()
    for point in dict.fromkeys(m.point for m in mounts.listed() if m.fstype == FSTYPE and m.point.parent == here):
        name = point.name.removesuffix(".dev")
        if name in kept:
            continue
        if _alive(point):
            living.append(name)
            continue
        log.warning("%s: taking away the block device of a hastd that was killed", name)
        try:
            _take_away(point, devdir)
        except HastError as error:
            log.error("%s: %s", name, error)
    for provname in provnames:
        link = devdir / provname
        number = _linked_loop(link)
        if number is not None and not _serving(number):
            _unlink(link)
    return living


def remove(rundir: Path, name: str, devdir: Path = DEVDIR) -> None:
    """Take away a device that nobody serves any more, although its channel may still be open somewhere: who uses it
    gets errors. Raises SystemCallError."""
    point = mount_point(rundir, name)
    log.warning("%s: taking away its block device, which nobody serves", name)
    abort(rundir, name)
    _take_away(point, devdir)


def _take_away(point: Path, devdir: Path) -> None:
    """A dead device: its links, loop devices and mounts."""
    numbers = loop.devices_of(point)
    for link in devdir.iterdir() if devdir.is_dir() else ():
        if _linked_loop(link) in numbers:
            _unlink(link)
    for number in numbers:
        loop.detach(number, point)
    _unmount(point)


def _alive(point: Path) -> bool:
    """Whether a process still has the channel of this mount: only when it has not, the kernel answers for it."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os._exit(_dead_by_stat(point))
    with _closing(os.pidfd_open(pid)) as pidfd:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(PROBE_SECONDS * 1000):
            os.kill(pid, signal.SIGKILL)
            _collect(pid)
            return True
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) != 1


def _dead_by_stat(point: Path) -> int:
    """1 when the mount has no server any more, else 0."""
    try:
        # Opening it asks the server; its attributes may be known already.
        os.close(os.open(point, os.O_RDONLY))
    except OSError as error:
        return int(error.errno in (errno.ENOTCONN, errno.ECONNABORTED))
    return 0


def _collect(pid: int) -> None:
    """Wait a moment for a killed process; one that cannot be killed now is collected by our parent or init."""
    deadline = time.monotonic() + 1
    while os.waitpid(pid, os.WNOHANG)[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)


# ---- small things ----


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


def _mounts_on(point: Path) -> list[mounts.Mount]:
    return [m for m in mounts.listed() if m.point == point]


def _linked_loop(link: Path) -> int | None:
    """The number of the loop device that the symbolic link names; None when it is no such link."""
    try:
        match = _LOOP_LINK.fullmatch(str(link.readlink()))
    except OSError:
        return None
    return int(match[1]) if match else None


def _serving(number: int) -> bool:
    """Whether the loop device stands on a mount of some hastd."""
    backing = loop.backing_file(number)
    return backing is not None and any(m.fstype == FSTYPE and str(m.point) == backing for m in mounts.listed())


def _unlink(link: Path) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):
            link.unlink()
    except OSError as error:
        raise SystemCallError(f"cannot remove {link}: {error.strerror}") from error
