"""A resource in the role primary: its component, its stages, its device.

Invariants:
- Metadata is written by this process only, while the component is locked; a counter that others rely on is durable
  before they are told (invariant 7: degraded first).
- The device is published after everything below it serves, and withdrawn before anything below it ends.
- A stage that dies costs the clients a pause: the pipeline is started anew under the same device.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hast import blockdev, decision, peering
from hast.component import Component, open_component
from hast.config import Resource
from hast.control import Role, StatusEntry
from hast.device.nbd import NbdExport
from hast.device.nbdlisten import NbdListener
from hast.errors import HastError, TemporaryError
from hast.ffi import _hast
from hast.link import MODES, Link, Owner
from hast.metadata import Metadata
from hast.pipeline import Pipeline, PipelineSettings
from hast.reload import Action, action, changed_settings
from hast.shm.arena import Geometry
from hast.stages.context import DISK, GGATE, RECV, SEND, DiskSettings

log = logging.getLogger(__name__)
lib = _hast.lib

CLIENT_SLOTS = 256  # bios of clients under way at once
SYNC_SLOTS = 32
SLAB_SIZE = 128 * 1024  # bytes: what a peer of version 2 takes in one request
LOCK_SECONDS = 2.0  # for the kernel to let go of the component of a worker that was killed
RESTARTS = 8  # of the pipeline, within
RESTART_WINDOW = 60.0  # seconds, before the worker gives up and is started anew itself

Tell = Callable[[dict[str, Any]], None]


class Primary:
    """One resource as primary. `failed` becomes done, with the reason, when it can be served no longer."""

    def __init__(self, resource: Resource, rundir: Path, tell: Tell) -> None:
        self.resource = resource
        self.rundir = rundir
        self.tell = tell
        self.failed: asyncio.Future[HastError] = asyncio.get_running_loop().create_future()
        self.component: Component | None = None
        self.metadata: Metadata | None = None
        self.pipeline: Pipeline | None = None
        self.listener: NbdListener | None = None
        self.device: blockdev.BlockDevice | None = None
        self.link: Link | None = None
        self.restarts: list[float] = []
        self.restarting: asyncio.Task[None] | None = None
        self.turn = asyncio.Lock()  # one restart of the stages, or one change of the settings, at a time

    # ---- start ----

    async def start(self) -> None:
        """Serve the resource. Raises HastError; shutdown() then takes away what is there already."""
        resource = self.resource
        self.component = open_component(resource.name, resource.localpath, resource.directio, wait=LOCK_SECONDS)
        self.metadata = self.component.read_metadata()
        virgin = self._become_primary()
        self.device = blockdev.choose(resource, self.rundir)
        self.pipeline = Pipeline(self._settings(), self._stage_message, self._stage_death)
        await self._start_stages()
        if resource.remote is not None:
            self.link = Link(self._owner(), virgin)
            await self.link.start()
        self.listener = NbdListener(
            self.rundir / f"{resource.name}.sock",
            NbdExport(
                resource.name, self.metadata.datasize, f"hast resource {resource.name}", self.component.can_delete
            ),
            self._nbd_client,
        )
        await self.listener.start()
        if self.device is not None:
            self.device.open()
            self._serve_device(resend=False)
            await self.device.attach()

    def ready_message(self) -> dict[str, Any]:
        """What main is told when clients can be served."""
        return {
            "event": "ready",
            "device": self.device.path if self.device is not None else None,
            "nbd": str(self.rundir / f"{self.resource.name}.sock"),
        }

    def _become_primary(self) -> bool:
        """Counters as docs/protocol.md section 6 has them: a resuid at the first start ever, the role noted. Whether
        nothing was ever written here."""
        assert self.metadata is not None
        metadata = self.metadata
        virgin = metadata.resuid == 0
        if virgin:
            metadata = replace(metadata, resuid=decision.choose_resuid(secrets.randbits(64)))
        self._store(replace(metadata, prevrole=Role.PRIMARY))
        return virgin

    def _owner(self) -> Owner:
        assert self.pipeline is not None

        def metadata() -> Metadata:
            assert self.metadata is not None
            return self.metadata

        def hook(event: str) -> None:
            self.tell({"event": "hook", "args": [event, self.resource.name]})

        return Owner(self.resource, self.pipeline, metadata, self._store, hook, self._fail)

    def _store(self, metadata: Metadata) -> None:
        """Make `metadata` durable, then rely on it."""
        assert self.component is not None
        if metadata != self.metadata:
            self.component.write_metadata(metadata, flush=self.resource.metaflush)
            self.metadata = metadata

    def _settings(self) -> PipelineSettings:
        assert self.component is not None and self.metadata is not None
        component, metadata = self.component, self.metadata
        return PipelineSettings(
            resource=self.resource.name,
            role="primary",
            geometry=Geometry(
                datasize=metadata.datasize,
                data_offset=metadata.offset,
                extentsize=metadata.extentsize,
                mapsize=metadata.mapsize,
                keepdirty=metadata.keepdirty,
                nclient=CLIENT_SLOTS,
                nsync=SYNC_SLOTS,
                slab_size=SLAB_SIZE,
            ),
            disk=DiskSettings(component.fd, component.engine, component.align),
            serves_device=self.device is not None,
        )

    async def _start_stages(self) -> None:
        assert self.component is not None and self.metadata is not None and self.pipeline is not None
        arena = self.pipeline.create()
        arena.load_map(self.component.read_map(self.metadata))
        arena.seq.mode = MODES[self.resource.replication]
        arena.seq.sync_rate = self.resource.syncrate
        arena.seq.metaflush = int(self.resource.metaflush)
        arena.seq.degraded_ok = int(self._degraded_granted())
        # Marked extents are old here until the synchronisation that was broken off is complete (invariant 6).
        arena.seq.sync_remote = int(self.metadata.syncing)
        await self.pipeline.start(DISK, GGATE)

    def _degraded_granted(self) -> bool:
        """Whether localcnt says already that this node writes alone."""
        assert self.metadata is not None
        return self.metadata.alone

    # ---- while it runs ----

    def _nbd_client(self, connection: socket.socket, flags: int) -> None:
        assert self.pipeline is not None
        self.pipeline.send(GGATE, {"cmd": "nbd", "flags": flags}, (connection.fileno(),))
        connection.close()

    def _serve_device(self, resend: bool) -> None:
        assert self.pipeline is not None
        if self.device is not None and self.device.fd >= 0:
            self.pipeline.send(GGATE, {"cmd": "fuse", "resend": resend}, (self.device.fd,))

    def _stage_message(self, stage: int, message: dict[str, Any]) -> None:
        if message.get("event") == "seq":
            self._sequencer_event(int(message["bits"]), int(message.get("dirty", 0)))
        elif message.get("event") == "lost" and self.link is not None:
            self.link.lose(str(message.get("why", "")))
        elif message.get("event") == "device":
            self._fail(
                TemporaryError(
                    f"{self.resource.name}: the kernel closed the block device ({os.strerror(message['errno'])}),"
                    " starting it anew"
                )
            )

    def _sequencer_event(self, bits: int, to_sync: int) -> None:
        try:
            if self.link is not None:
                self.link.sequencer(bits, to_sync)
            if bits & lib.HAST_SEQ_NEED_DEGRADED:
                self._go_degraded()
            if bits & lib.HAST_SEQ_MAP_FAILED:
                log.error(
                    "%s: the activemap on %s cannot be written: writes fail until it can",
                    self.resource.name,
                    self.resource.localpath,
                )
        except HastError as error:
            self._fail(error)

    def _go_degraded(self) -> None:
        """The first write without the secondary waits for this: raise localcnt, store it, let go (invariant 7)."""
        assert self.metadata is not None and self.pipeline is not None
        self._store(peering.wrote_alone(self.link.peering if self.link is not None else None, self.metadata))
        self.pipeline.send(GGATE, {"cmd": "grant"})

    def _fail(self, error: HastError) -> None:
        if not self.failed.done():
            self.failed.set_result(error)

    def _stage_death(self, stage: int, what: str) -> None:
        """A stage is gone: take the pipeline down and up again, the device stays (its requests are issued anew)."""
        if stage in (SEND, RECV) and self.link is not None:
            self.link.lose(what)
            return
        now = time.monotonic()
        self.restarts = [*(t for t in self.restarts if now - t < RESTART_WINDOW), now]
        if self.failed.done() or (self.restarting is not None and not self.restarting.done()):
            return
        if len(self.restarts) > RESTARTS:
            self._fail(
                TemporaryError(f"{self.resource.name}: its {what}, {RESTARTS} times in {RESTART_WINDOW:g} s")
            )
            return
        log.error("%s: its %s; restarting its stages", self.resource.name, what)
        self.restarting = asyncio.get_running_loop().create_task(self._restart())

    async def _restart(self) -> None:
        assert self.pipeline is not None
        async with self.turn:
            try:
                if self.link is not None:
                    await self.link.pause()
                await self.pipeline.close()
                await self._start_stages()
                self._serve_device(resend=True)
                if self.link is not None:
                    self.link.resume()
                log.warning("%s: its stages run again", self.resource.name)
            except HastError as error:
                self._fail(error)

    async def reload(self, resource: Resource) -> None:
        """Go on with other settings, none of which needs a new worker (hast/reload.py)."""
        assert self.pipeline is not None
        async with self.turn:
            changed = changed_settings(self.resource, resource)
            self.resource = resource
            settings = {"syncrate": resource.syncrate, "metaflush": int(resource.metaflush)}
            self.pipeline.send(GGATE, {"cmd": "settings", **settings})
            if action(changed, Role.PRIMARY) is Action.RECONNECT:
                await self._relink()

    async def _relink(self) -> None:
        """Leave the other node and connect to the one that is configured now, if there is one."""
        virgin = False
        if self.link is not None:
            await self.link.stop()
            virgin = self.link.peering.virgin
        self.link = None
        if self.resource.remote is not None:
            self.link = Link(self._owner(), virgin)
            self.link.resume()

    # ---- status ----

    def status(self) -> dict[str, Any]:
        """The fields of control.StatusEntry that only a running worker knows (docs/protocol.md section 7)."""
        entry: dict[str, Any] = {"status": "degraded", "role": "primary", "workerpid": os.getpid()}
        if self.metadata is not None:
            entry |= {"extentsize": self.metadata.extentsize, "keepdirty": self.metadata.keepdirty}
        arena = self.pipeline.arena if self.pipeline is not None else None
        if arena is None or self.metadata is None:
            return entry
        seq, stats = arena.seq, arena.seq.stats
        entry |= {
            "status": "complete" if seq.connected and seq.ndirty == 0 else "degraded",
            "dirty": seq.ndirty * self.metadata.extentsize,
            "stat_read": stats.read,
            "stat_write": stats.write,
            "stat_delete": getattr(stats, "del"),
            "stat_flush": stats.flush,
            "stat_activemap_update": stats.map_update,
            "stat_read_error": stats.read_error,
            "stat_write_error": stats.write_error,
            "stat_delete_error": stats.delete_error,
            "stat_flush_error": stats.flush_error,
            "idle_queue_size": seq.nfree,
            "local_queue_size": arena.ring_used(lib.HAST_RING_DISK),
            "send_queue_size": arena.ring_used(lib.HAST_RING_SEND),
            "recv_queue_size": 0,
            "done_queue_size": arena.ring_used(lib.HAST_RING_DISK_DONE),
        }
        return {key: value for key, value in entry.items() if key in STATUS_FIELDS}

    # ---- end ----

    async def shutdown(self) -> None:
        """Withdraw the device, answer what is under way, end the stages, give the component back. Never raises."""
        if self.restarting is not None:
            await asyncio.wait([self.restarting])
        try:
            if self.listener is not None:
                await self.listener.close()
            if self.device is not None:
                await self.device.detach()
            if self.pipeline is not None:
                await self.pipeline.stop(GGATE)
                if self.link is not None:
                    await self.link.pause()
                await self.pipeline.stop(SEND, RECV, DISK)
                await self.pipeline.close()
            if self.device is not None:
                self.device.close()
        except HastError as error:
            log.error("%s", error)
        finally:
            if self.component is not None:
                self.component.close()


STATUS_FIELDS = frozenset(StatusEntry.__dataclass_fields__)
