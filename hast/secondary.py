"""A resource in the role secondary: it waits for its primary, answers the handshake, and does what it is sent.

Invariants:
- The order of docs/protocol.md section 3: what the handshake makes durable (map, metadata) is durable before the
  answer goes out; the on-disk map is cleared only after the primary's first request has come.
- A connection has stages of its own in an arena of its own; a new connection takes the place of the old one, whose
  stages have ended by then: what they had received completely is on the component.
- Losing the primary is no failure: the resource stays secondary and waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hast.activemap import METADATA_SIZE, count_dirty, extent_count
from hast.component import Component, open_component
from hast.config import Resource
from hast.control import Role
from hast.errors import HastError
from hast.handshake import answer_second, request_from_dict
from hast.messages import SPLIT_BRAIN_ADVICE
from hast.metadata import Metadata
from hast.pipeline import Pipeline, PipelineSettings
from hast.reload import Action, action, changed_settings
from hast.shm.arena import Geometry
from hast.sockio import write_all
from hast.stages.context import DISK, RECV, SEND, ConnSettings, DiskSettings

log = logging.getLogger(__name__)

SLOTS = 256  # requests under way at once
SLAB_SIZE = 1 << 20  # bytes: the largest request that has to be taken
SILENCE_SECONDS = 20.0  # without a request or a keepalive
LOCK_SECONDS = 2.0  # for the kernel to let go of the component of a worker that was killed

Tell = Callable[[dict[str, Any]], None]


class Secondary:
    """One resource as secondary. `failed` becomes done, with the reason, when it can be served no longer."""

    def __init__(self, resource: Resource, rundir: Path, tell: Tell) -> None:
        self.resource = resource
        self.tell = tell
        self.failed: asyncio.Future[HastError] = asyncio.get_running_loop().create_future()
        self.component: Component | None = None
        self.metadata: Metadata | None = None
        self.pipeline: Pipeline | None = None
        self.connected = False
        self.peer = ""
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Be ready for a primary. Raises HastError."""
        resource = self.resource
        self.component = open_component(resource.name, resource.localpath, resource.directio, wait=LOCK_SECONDS)
        self.metadata = self.component.read_metadata()
        self._store(replace(self.metadata, prevrole=Role.SECONDARY))

    def ready_message(self) -> dict[str, Any]:
        """What main is told when a primary may connect."""
        return {"event": "ready", "device": None, "nbd": None}

    def _store(self, metadata: Metadata) -> None:
        """Make `metadata` durable, then rely on it."""
        assert self.component is not None
        if metadata != self.metadata:
            self.component.write_metadata(metadata, flush=self.resource.metaflush)
            self.metadata = metadata

    def _hook(self, event: str) -> None:
        self.tell({"event": "hook", "args": [event, self.resource.name]})

    # ---- a primary connects ----

    def connection(self, message: dict[str, Any], fds: list[int]) -> None:
        """Main's message: two connections, the second one's handshake request has been read. Owns the descriptors."""
        if len(fds) != 2:
            for fd in fds:
                os.close(fd)
            log.error("%s: a connection without its sockets", self.resource.name)
            return
        task = asyncio.get_running_loop().create_task(self._connection(message, fds))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connection(self, message: dict[str, Any], fds: list[int]) -> None:
        name = self.resource.name
        with contextlib.ExitStack() as stack:
            incoming, out = (stack.enter_context(socket.socket(fileno=fd)) for fd in fds)
            for sock in (incoming, out):
                sock.setblocking(False)
            async with self._turn:
                await self._drop("a new connection takes its place")
                try:
                    async with asyncio.timeout(self.resource.timeout):
                        accepted = await self._answer(message, incoming)
                    if accepted:
                        await self._serve(message, incoming, out)
                except HastError as error:
                    log.error("%s", error)
                    await self._drop("")
                except OSError as error:
                    why = error.strerror or "it took too long"
                    log.warning("%s: handshake with %s failed: %s", name, message.get("peer"), why)
                    await self._drop("")

    async def _answer(self, message: dict[str, Any], incoming: socket.socket) -> bool:
        """Decide, store, answer on connection 1. Whether there is a connection now."""
        assert self.component is not None and self.metadata is not None
        component, metadata = self.component, self.metadata
        answer = answer_second(
            request_from_dict(message["request"]),
            int(message["version"]),
            metadata,
            lambda: component.read_map(metadata),
            self.resource.compression,
            self.resource.checksum,
        )
        if answer.map is not None:
            self._write_map(answer.map)
        self._store(answer.metadata)
        await write_all(incoming, answer.message)
        decided, name = answer.decision, self.resource.name
        if decided.warning:
            log.warning("%s: %s", name, decided.warning)
        if answer.split_brain:
            log.error("%s: %s", name, SPLIT_BRAIN_ADVICE)
            self._hook("split-brain")
        elif not answer.accepted:
            log.error("%s: refused %s: %s", name, message.get("peer"), decided.error)
        return answer.accepted

    async def _serve(self, message: dict[str, Any], incoming: socket.socket, out: socket.socket) -> None:
        self.peer = str(message.get("peer", ""))
        self.pipeline = Pipeline(self._settings(), self._stage_message, self._stage_death)
        self.pipeline.create()
        version = int(message["version"])
        conns = {
            RECV: self._conn(incoming.fileno(), version, SILENCE_SECONDS),
            SEND: self._conn(out.fileno(), version, float(self.resource.timeout)),
        }
        await self.pipeline.start(DISK, SEND, RECV, conns=conns)
        self.connected = True
        log.info("%s: connected from %s", self.resource.name, self.peer)
        self._hook("connect")

    def _conn(self, fd: int, version: int, timeout: float) -> ConnSettings:
        assert self.component is not None
        resource = self.resource
        return ConnSettings(fd, version, resource.compression, resource.checksum, timeout, self.component.sectorsize)

    def _settings(self) -> PipelineSettings:
        assert self.component is not None and self.metadata is not None
        component, metadata = self.component, self.metadata
        return PipelineSettings(
            resource=self.resource.name,
            role="secondary",
            geometry=Geometry(
                datasize=metadata.datasize,
                data_offset=metadata.offset,
                extentsize=metadata.extentsize,
                mapsize=metadata.mapsize,
                keepdirty=metadata.keepdirty,
                nclient=SLOTS,
                nsync=0,
                slab_size=SLAB_SIZE,
            ),
            disk=DiskSettings(component.fd, component.engine, component.align),
        )

    # ---- while it is there ----

    def _stage_message(self, stage: int, message: dict[str, Any]) -> None:
        if message.get("event") == "first":
            self._first_request()
        elif message.get("event") == "lost":
            self.lose(str(message.get("why", "")))

    def _stage_death(self, stage: int, what: str) -> None:
        self.lose(what)

    def _first_request(self) -> None:
        """The primary has merged our map into its own, durably: ours is not needed any more."""
        assert self.metadata is not None
        try:
            self._write_map(bytes(self.metadata.mapsize))
        except HastError as error:
            # Too much is dirty then, which costs a longer synchronisation and nothing else.
            log.error("%s", error)

    def _write_map(self, activemap: bytes) -> None:
        assert self.component is not None
        self.component.pwrite(METADATA_SIZE, activemap)
        if self.resource.metaflush:
            self.component.flush()

    def lose(self, why: str) -> None:
        """The connection is lost, or another one is about to take its place."""
        if not self.connected:
            return
        task = asyncio.get_running_loop().create_task(self._lost(why))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _lost(self, why: str) -> None:
        async with self._turn:
            await self._drop(why)

    async def _drop(self, why: str) -> None:
        """End the connection's stages, after what they have received is on the component."""
        pipeline, self.pipeline = self.pipeline, None
        if pipeline is None:
            return
        await pipeline.stop(RECV, DISK, SEND)
        await pipeline.close()
        if self.connected:
            self.connected = False
            log.warning("%s: connection from %s ended: %s", self.resource.name, self.peer, why)
            self._hook("disconnect")

    async def reload(self, resource: Resource) -> None:
        """Go on with other settings, none of which needs a new worker (hast/reload.py)."""
        async with self._turn:
            changed = changed_settings(self.resource, resource)
            self.resource = resource
            if action(changed, Role.SECONDARY) is Action.RECONNECT:
                await self._drop("it has other settings now")

    # ---- status and end ----

    def status(self) -> dict[str, Any]:
        """The fields of control.StatusEntry that only a running worker knows (docs/protocol.md section 7)."""
        entry: dict[str, Any] = {
            "status": "complete" if self.connected else "degraded",
            "role": "secondary",
            "workerpid": os.getpid(),
        }
        if self.metadata is None or self.component is None:
            return entry
        metadata = self.metadata
        with contextlib.suppress(HastError):
            extents = extent_count(metadata.datasize, metadata.extentsize)
            entry["dirty"] = count_dirty(self.component.read_map(metadata), extents) * metadata.extentsize
        return entry | {"extentsize": metadata.extentsize, "keepdirty": metadata.keepdirty}

    async def shutdown(self) -> None:
        """End the connection, give the component back. Never raises."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        try:
            await self._drop("the role changes")
        except HastError as error:
            log.error("%s", error)
        finally:
            if self.component is not None:
                self.component.close()
