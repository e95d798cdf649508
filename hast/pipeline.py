"""The stages of one resource: started together, stopped together, started anew when one of them dies.

Invariants:
- Each start makes a new arena and loads the activemap from disk: what was in flight before is unknown, and its
  extents are dirty there (invariant 1), so nothing is lost with the old arena.
- Stages are killed, and collected, before new ones are started: a component never has two writers.
- The worker's own descriptors (component, FUSE channel) are not touched by any of this.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from hast.channel import Channel, ChannelClosedError, Message
from hast.errors import HastError, ProtocolError, SystemCallError
from hast.shm.arena import Arena, Geometry
from hast.stages import disk as disk_stage
from hast.stages import ggate as ggate_stage
from hast.stages.context import DISK, GGATE, STAGE_NAMES, DiskSettings, StageContext
from hast.stages.launch import Child, Entry, start_stage

log = logging.getLogger(__name__)

UP_SECONDS = 10.0  # for a stage to report that it runs
CLIENT_SECONDS = 1.0  # for NBD clients to finish what they are sending and to take their answers
QUIET_SECONDS = 10.0  # for what is under way to be answered when it is stopped
END_SECONDS = 10.0  # for a stage to end when it was told to

ENTRIES: dict[int, Entry] = {GGATE: ggate_stage.run, DISK: disk_stage.run}
# The consumer of a ring is there before its producer.
START_ORDER = (DISK, GGATE)

OnMessage = Callable[[int, Message], None]
OnDeath = Callable[[str], None]


@dataclass(frozen=True)
class PipelineSettings:
    """What the stages of a primary are made of."""

    resource: str
    role: str
    geometry: Geometry
    disk: DiskSettings
    serves_device: bool
    metaflush: bool


@dataclass
class Pipeline:
    """The running stages. on_message is called with each message of a stage, on_death with a sentence, once, when a
    stage ended that nobody had told to; both in the worker's event loop."""

    settings: PipelineSettings
    on_message: OnMessage
    on_death: OnDeath
    arena: Arena | None = None
    stages: dict[int, Child] = field(default_factory=dict)
    _bells: dict[int, int] = field(default_factory=dict)
    _up: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    _ends: dict[int, asyncio.Future[str]] = field(default_factory=dict)
    _stopping: bool = False
    _broken: bool = False

    async def start(self, activemap: bytes, degraded_granted: bool) -> None:
        """Start all stages and wait until they report. Raises HastError; nothing is left running then."""
        self._stopping = self._broken = False
        self.arena = Arena.create(self.settings.geometry, self.settings.resource)
        self.arena.load_map(activemap)
        self.arena.seq.metaflush = int(self.settings.metaflush)
        self.arena.seq.degraded_ok = int(degraded_granted)
        try:
            for stage in START_ORDER:
                self._bells[stage] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            for stage in START_ORDER:
                self._fork(stage)
            async with asyncio.timeout(UP_SECONDS):
                await asyncio.gather(*self._up.values())
        except TimeoutError:
            await self.kill()
            raise SystemCallError(
                f"{self.settings.resource}: its stages did not start within {UP_SECONDS:g} s"
            ) from None
        except HastError:
            await self.kill()
            raise

    def _fork(self, stage: int) -> None:
        assert self.arena is not None
        settings = self.settings
        ours, theirs = Channel.pair(f"{settings.resource}: {STAGE_NAMES[stage]} stage")
        context = StageContext(
            resource=settings.resource,
            role=settings.role,
            stage=stage,
            arena=self.arena,
            control=theirs,
            bells=dict(self._bells),
            disk=settings.disk if stage == DISK else None,
            serves_device=settings.serves_device,
        )
        child = start_stage(context, ENTRIES[stage], ours)
        loop = asyncio.get_running_loop()
        self.stages[stage] = child
        self._up[stage] = loop.create_future()
        self._ends[stage] = loop.create_future()
        loop.add_reader(ours.fileno(), self._readable, stage)
        loop.add_reader(child.pidfd, self._ended, stage)

    def send(self, stage: int, message: Message, fds: tuple[int, ...] = ()) -> None:
        """A message to a stage; one that has just ended is not an error: its end is handled elsewhere."""
        channel = self.stages[stage].channel if stage in self.stages else None
        if channel is not None:
            with contextlib.suppress(ChannelClosedError):
                channel.send(message, fds)

    def _readable(self, stage: int) -> None:
        channel = self.stages[stage].channel
        assert channel is not None
        try:
            received = channel.recv(timeout=0)
        except TimeoutError:
            return
        except ProtocolError as error:
            log.error("%s", error)
            return
        if received is None:
            asyncio.get_running_loop().remove_reader(channel.fileno())
            return
        message, fds = received
        for fd in fds:
            os.close(fd)
        if message.get("event") == "up":
            if not self._up[stage].done():
                self._up[stage].set_result(None)
        else:
            self.on_message(stage, message)

    def _ended(self, stage: int) -> None:
        child = self.stages[stage]
        loop = asyncio.get_running_loop()
        loop.remove_reader(child.pidfd)
        if child.channel is not None and not child.channel.closed:
            self._last_words(stage)
            loop.remove_reader(child.channel.fileno())
        how = child.reap()
        self._ends[stage].set_result(how)
        if not self._up[stage].done():
            self._up[stage].set_exception(
                SystemCallError(f"{self.settings.resource}: its {STAGE_NAMES[stage]} stage {how} while starting")
            )
        elif not self._stopping and not self._broken:
            self._broken = True
            self.on_death(f"{STAGE_NAMES[stage]} stage {how}")

    def _last_words(self, stage: int) -> None:
        """Messages that a stage sent before it ended."""
        channel = self.stages[stage].channel
        assert channel is not None
        with contextlib.suppress(TimeoutError, HastError):
            while (received := channel.recv(timeout=0)) is not None:
                if received[0].get("event") != "up":
                    self.on_message(stage, received[0])

    async def stop(self) -> None:
        """Answer what is under way, then end the stages; those that do not end in time are killed."""
        self._stopping = True
        for stage in reversed(START_ORDER):
            self.send(stage, {"cmd": "stop"})
            if stage == GGATE and stage in self._ends:
                await asyncio.wait([self._ends[stage]], timeout=CLIENT_SECONDS)
                if not self._ends[stage].done():
                    self.send(stage, {"cmd": "drop"})
            if stage in self._ends:
                await asyncio.wait([self._ends[stage]], timeout=QUIET_SECONDS if stage == GGATE else END_SECONDS)
                if not self._ends[stage].done():
                    log.warning("%s: %s stage does not end, killing it", self.settings.resource, STAGE_NAMES[stage])
        await self.kill()

    async def kill(self) -> None:
        """End all stages at once and give everything back. A stage in an uninterruptible wait is waited for."""
        self._stopping = True
        for stage, child in self.stages.items():
            if not self._ends[stage].done():
                child.kill()
        if self._ends:
            await asyncio.wait(self._ends.values())
        for future in self._up.values():
            if future.done() and not future.cancelled():
                future.exception()  # seen: start() reports the first one
        for bell in self._bells.values():
            os.close(bell)
        self._bells.clear()
        self.stages.clear()
        self._up.clear()
        self._ends.clear()
        if self.arena is not None:
            self.arena.close()
            self.arena = None
