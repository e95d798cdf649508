"""What clients reach a primary by: its block device and its NBD socket.

Invariants:
- A block device that the worker before this one has left is served only if nothing that its users rely on has changed.
- The device appears once its ggate stage has its channel, and main has a copy of that: from then on it may outlive
  this worker.
- While the stages are started anew, NBD clients that come wait; a device's requests without an answer are issued again.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from hast import blockdev
from hast.component import Component
from hast.config import Resource
from hast.device.nbd import NbdExport
from hast.device.nbdlisten import NbdListener
from hast.errors import TemporaryError, UnavailableError
from hast.metadata import Metadata
from hast.pipeline import Pipeline
from hast.stages.context import GGATE

Tell = Callable[..., None]


class Owner(Protocol):
    """What is needed of a hast.primary.Primary."""

    resource: Resource
    rundir: Path
    tell: Tell
    component: Component | None
    metadata: Metadata | None
    pipeline: Pipeline | None
    restarting: asyncio.Task[None] | None


class Frontend:
    """The device and the listener of one primary; each is None while, or where, there is none."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.listener: NbdListener | None = None
        self.device: blockdev.BlockDevice | None = None
        self.served = False  # the device has a ggate stage, or has had one
        self.waiting: list[tuple[socket.socket, int]] = []  # NBD clients that have come while there was no ggate stage

    # ---- start ----

    def adopt(self, left: dict[str, Any] | None, fds: list[int]) -> None:
        """The device that the worker before this one has left, if it has: what facts() said of it, and its channel."""
        owner = self.owner
        if left is not None and len(fds) == 1:
            self.device = blockdev.BlockDevice(replace(owner.resource, provname=str(left["provname"])), owner.rundir)
            self.device.adopt(fds[0])

    def choose(self, left: dict[str, Any] | None) -> None:
        """The device that there is to be; it is not made yet. Raises UnavailableError: it cannot be had, or the one
        that was adopted is not that one."""
        owner = self.owner
        if self.device is None:
            self.device = blockdev.choose(owner.resource, owner.rundir)
        elif left != self.facts():
            raise UnavailableError(
                f"{owner.resource.name}: its block device is taken away, the settings or the component have changed:"
                f" {left} became {self.facts()}"
            )

    def facts(self) -> dict[str, Any] | None:
        """What a block device is: a worker that finds it left by another one serves it only if all of it is the same.
        None when there is to be none."""
        resource, metadata = self.owner.resource, self.owner.metadata
        if self.device is None or resource.device == "nbd":
            return None
        assert metadata is not None
        return {
            "mount": self.device.mount,
            "provname": resource.provname,
            "localpath": resource.localpath,
            "datasize": metadata.datasize,
            "resuid": metadata.resuid,
        }

    async def start(self) -> None:
        """Let clients in: the stages serve. Raises HastError."""
        owner, name = self.owner, self.owner.resource.name
        assert owner.metadata is not None and owner.component is not None
        self.listener = NbdListener(
            owner.rundir / f"{name}.sock",
            NbdExport(name, owner.metadata.datasize, f"hast resource {name}", owner.component.can_delete),
            self._nbd_client,
        )
        await self.listener.start()
        if self.device is not None and self.device.fd >= 0:
            if not self.served:  # the restart has not done it
                self.serve_device(resend=True)
        elif self.device is not None:
            self.device.open()
            self.serve_device(resend=False)
            await self.device.attach()
            owner.tell({"event": "device", "device": self.facts()}, (self.device.fd,))
            self.device.kept = True

    def ready_message(self) -> dict[str, Any]:
        """What main is told when clients can be served."""
        return {
            "event": "ready",
            "device": self.device.path if self.device is not None else None,
            "nbd": str(self.owner.rundir / f"{self.owner.resource.name}.sock"),
        }

    # ---- while it runs ----

    def _nbd_client(self, connection: socket.socket, flags: int) -> None:
        owner = self.owner
        assert owner.pipeline is not None
        if owner.restarting is not None and not owner.restarting.done():
            self.waiting.append((connection, flags))
            return
        owner.pipeline.send(GGATE, {"cmd": "nbd", "flags": flags}, (connection.fileno(),))
        connection.close()

    def serve_waiting(self) -> None:
        """The stages run again: NBD clients that have come meanwhile go to them."""
        waiting, self.waiting = self.waiting, []
        for connection, flags in waiting:
            assert self.owner.pipeline is not None
            self.owner.pipeline.send(GGATE, {"cmd": "nbd", "flags": flags}, (connection.fileno(),))
            connection.close()

    def serve_device(self, resend: bool) -> None:
        """The ggate stage gets the device's channel. resend: another one had it, and may have left requests."""
        assert self.owner.pipeline is not None
        if self.device is not None and self.device.fd >= 0:
            self.served = True
            self.owner.pipeline.send(GGATE, {"cmd": "fuse", "resend": resend}, (self.device.fd,))

    def device_gone(self, number: int) -> TemporaryError:
        """The kernel has closed the channel, with this errno; what the worker is to end with."""
        if self.device is not None:
            self.device.dead = True
        why = f"the kernel closed the block device ({os.strerror(number)})"
        if number == errno.EOPNOTSUPP:
            why = "before Linux 6.9 a block device ends with the process that serves it"
        return TemporaryError(f"{self.owner.resource.name}: {why}, starting it anew")

    # ---- end ----

    def drop_waiting(self) -> None:
        """Nobody is going to serve them."""
        for connection, _ in self.waiting:
            connection.close()

    async def close_listener(self) -> None:
        """Nobody new is let in."""
        if self.listener is not None:
            await self.listener.close()

    @property
    def useless(self) -> bool:
        """Whether there is a device that the next worker cannot go on with."""
        return self.device is not None and (self.device.dead or not self.device.kept)

    async def remove_device(self) -> None:
        """Withdraw it. Raises HastError."""
        if self.device is not None:
            await self.device.detach(abort=not self.served)
            self.owner.tell({"event": "released"})

    def close(self) -> None:
        """Give the device's channel up; whoever is left with a copy has the device."""
        if self.device is not None:
            self.device.close()
