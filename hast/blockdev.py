"""The block device of a resource, as its worker sees it: opened, attached, detached, closed.

Invariants:
- The worker holds the FUSE channel open as long as the resource is primary, so that the device outlives a ggate stage.
  Main and the keeper hold it as well (hast/keeping.py): it outlives the worker, and the next one adopts it.
- What may wait for the device's own server runs in a short-lived child with a deadline, never in the worker: when the
  deadline is over the device is aborted, and everything that waits for it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

from hast.channel import Channel
from hast.config import Resource
from hast.device import fuse
from hast.errors import HastError, SystemCallError, TemporaryError, UnavailableError
from hast.stages.launch import Child, fork

log = logging.getLogger(__name__)

ATTACH_SECONDS = 15.0
DETACH_SECONDS = 15.0  # caches are written out meanwhile
ABORTED_SECONDS = 2.0  # for a child to end after its device was aborted


class BlockDevice:
    """/dev/hast/<provname> on FUSE and a loop device. `fd` is the channel, -1 while it is closed; `path` the link once
    the device is attached."""

    def __init__(self, resource: Resource, rundir: Path) -> None:
        self.resource = resource
        self.rundir = rundir
        self.fd = -1
        self.path: str | None = None
        self.kept = False  # main has its channel as well: the device may outlive this worker
        self.dead = False  # its channel was closed by the kernel

    def open(self) -> None:
        """Make the channel and mount it; the ggate stage is to serve it next. Raises HastError."""
        fuse.clear(self.rundir, self.resource.name)
        self.fd = fuse.open_channel()
        fuse.mount(self.fd, self.rundir, self.resource.name)

    def adopt(self, fd: int) -> None:
        """Go on with the device that the worker before this one has left; owns its channel."""
        self.fd, self.kept = fd, True
        self.path = str(fuse.DEVDIR / self.resource.provname)

    @property
    def mount(self) -> str:
        """The mount point of its file system."""
        return str(fuse.mount_point(self.rundir, self.resource.name))

    async def attach(self) -> None:
        """Put the loop device on it and publish the name. Raises HastError."""
        await self._in_child("attach", self._attach, ATTACH_SECONDS)
        self.path = str(fuse.DEVDIR / self.resource.provname)

    def _attach(self) -> None:
        device = fuse.attach_loop(self.rundir, self.resource.name)
        fuse.publish(device, self.resource.provname)

    async def detach(self, abort: bool = False) -> None:
        """Take the name, the loop device and the mount away; abort: nobody serves it. Raises HastError."""
        if self.fd < 0:
            return
        self.path = None
        if abort:
            fuse.abort(self.rundir, self.resource.name)
        fuse.withdraw(self.rundir, self.resource.name, self.resource.provname)
        await self._in_child("detach", self._detach, DETACH_SECONDS)

    def _detach(self) -> None:
        fuse.detach(self.rundir, self.resource.name, self.resource.provname)

    def close(self) -> None:
        """Close the channel: whatever still uses the device gets I/O errors from now on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    async def _in_child(self, what: str, body: Callable[[], None], seconds: float) -> None:
        """Run body() in a child process. Raises its error, or TemporaryError when it took too long."""
        name = self.resource.name
        ours, theirs = Channel.pair(f"{name}: {what} of the block device")
        child = fork(f"hastd: {name} (primary): {what}", {theirs.fileno()}, lambda: _report(theirs, body), ours)
        theirs.close()
        if not await _ended(child, seconds):
            fuse.abort(self.rundir, name)
            if not await _ended(child, ABORTED_SECONDS):
                child.kill()
            await _ended(child, ABORTED_SECONDS)
            raise TemporaryError(f"{name}: {what} of its block device did not end within {seconds:g} s, aborted it")
        with contextlib.suppress(TimeoutError):
            received = ours.recv(timeout=0)
            if received is not None:
                child.reap()
                raise SystemCallError(str(received[0]["error"]))
        how = child.reap()
        if child.status != 0:
            raise TemporaryError(f"{name}: {what} of its block device {how}")


def _report(channel: Channel, body: Callable[[], None]) -> int:
    """In the child: do it, and send the worker the error if there is one."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        body()
    except HastError as error:
        channel.send({"error": str(error)})
        return error.exit_code
    return os.EX_OK


async def _ended(child: Child, seconds: float) -> bool:
    """Wait for the child's end, but not longer; whether it has ended."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(child.pidfd, ready.set)
    try:
        async with asyncio.timeout(seconds):
            await ready.wait()
        return True
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(child.pidfd)


def choose(resource: Resource, rundir: Path) -> BlockDevice | None:
    """The block device that `device` in hast.conf asks for; None: the NBD socket only.

    Raises UnavailableError when the one asked for cannot be had here.
    """
    if resource.device == "nbd":
        return None
    if resource.device in ("auto", "fuse"):
        reason = fuse.usable()
        if reason is None:
            return BlockDevice(resource, rundir)
        if resource.device == "auto":
            log.warning("%s: no block device, only its NBD socket: %s", resource.name, reason)
            return None
        raise UnavailableError(f"{resource.name}: 'device fuse' is not possible here: {reason}")
    raise UnavailableError(
        f"{resource.name}: 'device {resource.device}' is not built into this hast: use 'auto', 'fuse' or 'nbd'"
    )
