"""The stages of one resource: started together, stopped together, their ends noticed.

Invariants:
- Each start makes a new arena: what was in flight before is unknown, and its extents are dirty on disk
  (invariant 1), so nothing is lost with the old arena.
- Stages are killed, and collected, before new ones are started: a component never has two writers, a ring never
  two producers.
- A disk stage is told that one before it, or the worker, has failed a flush: the disk may not say so again.
- A disk stage that waits for a flush is not killed: what becomes of that would be told to nobody.
- The worker's own descriptors (component, FUSE channel) are not touched by any of this. A connection's descriptors
  belong to its stages: the worker's copies are closed when those run.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from hast.channel import Channel, ChannelClosedError, Message
from hast.component import Component
from hast.errors import HastError, ProtocolError, SystemCallError, TemporaryError
from hast.metadata import Metadata
from hast.shm.arena import Arena, Geometry
from hast.stages import disk as disk_stage
from hast.stages import ggate as ggate_stage
from hast.stages import recv as recv_stage
from hast.stages.context import DISK, GGATE, RECV, STAGE_NAMES, ConnSettings, DiskSettings, StageContext
from hast.stages.launch import Child, Entry, start_stage

log = logging.getLogger(__name__)

UP_SECONDS = 10.0  # for a stage to report that it runs
CLIENT_SECONDS = 1.0  # for NBD clients to finish what they are sending and to take their answers
END_SECONDS = 10.0  # for a stage to finish what is under way and to end

ENTRIES: dict[int, Entry] = {
    GGATE: ggate_stage.run,
    DISK: disk_stage.run,
    RECV: recv_stage.run,
}

OnMessage = Callable[[int, Message], None]
OnDeath = Callable[[int, str], None]


@dataclass(frozen=True)
class PipelineSettings:
    """What the stages of a resource have in common."""

    resource: str
    role: str
    geometry: Geometry
    disk: DiskSettings
    serves_device: bool = False
    keepawake: bool = False


def component_settings(
    component: Component,
    metadata: Metadata,
    role: str,
    *,
    nclient: int,
    nsync: int,
    slab_size: int,
    device: bool = False,
    keepawake: bool = False,
) -> PipelineSettings:
    """Those of a resource whose component this is. nclient and nsync: slots; slab_size in bytes; device: a block device
    of this machine stands on it; keepawake: processors are not to fall asleep while there is work."""
    geometry = Geometry(
        datasize=metadata.datasize,
        data_offset=metadata.offset,
        extentsize=metadata.extentsize,
        mapsize=metadata.mapsize,
        keepdirty=metadata.keepdirty,
        nclient=nclient,
        nsync=nsync,
        slab_size=slab_size,
    )
    disk = DiskSettings(
        component.fd,
        component.engine,
        component.align,
        note=component.note,
        direct=component.direct,
        deletes=component.can_delete,
    )
    return PipelineSettings(component.resource, role, geometry, disk, device, keepawake)


@dataclass
class Stage:
    """A running stage: `up` is done when it runs, `end`, with how it ended, when it was collected. witness: end of
    a pipe whose other end a disk stage with io_uring holds; hung up when nothing that it began is under way."""

    child: Child
    channel: Channel
    up: asyncio.Future[None]
    end: asyncio.Future[str]
    stopping: bool = False
    witness: int = -1


@dataclass
class Pipeline:
    """The running stages. on_message is called with each message of a stage, on_death with the stage and a
    sentence when one ended that nobody had told to; both in the worker's event loop."""

    settings: PipelineSettings
    on_message: OnMessage
    on_death: OnDeath
    arena: Arena | None = None
    stages: dict[int, Stage] = field(default_factory=dict)
    _bells: dict[int, int] = field(default_factory=dict)

    def create(self) -> Arena:
        """The arena and the doorbells, before any stage. Raises HastError."""
        assert not self.stages
        self.arena = Arena.create(self.settings.geometry, self.settings.resource)
        for stage in range(len(STAGE_NAMES)):
            try:
                self._bells[stage] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            except OSError as error:
                name = self.settings.resource
                raise TemporaryError(f"{name}: cannot make doorbells for its stages: {error.strerror}") from error
        return self.arena

    async def start(self, *stages: int, conn: ConnSettings | None = None) -> None:
        """Start these stages, consumers first, and wait until they report; conn is the connection of recv.

        Raises HastError; none of them runs then.
        """
        try:
            for stage in stages:
                self._fork(stage, conn if stage == RECV else None)
            async with asyncio.timeout(UP_SECONDS):
                await asyncio.gather(*(self.stages[stage].up for stage in stages))
        except TimeoutError:
            await self.kill(*stages)
            raise TemporaryError(
                f"{self.settings.resource}: its stages did not start within {UP_SECONDS:g} s"
            ) from None
        except BaseException:
            await self.kill(*stages)
            raise

    def _fork(self, stage: int, conn: ConnSettings | None) -> None:
        assert self.arena is not None
        settings = self.settings
        decides = RECV if settings.role == "secondary" else GGATE
        ours, theirs = Channel.pair(f"{settings.resource}: {STAGE_NAMES[stage]} stage")
        disk, witness = settings.disk if stage in (DISK, decides) else None, -1
        if stage == DISK and settings.disk.engine == "uring":
            witness, held = _pipe(settings.resource)
            disk = replace(settings.disk, witness=held)
        context = StageContext(
            resource=settings.resource,
            role=settings.role,
            stage=stage,
            arena=self.arena,
            control=theirs,
            bells=dict(self._bells),
            disk=disk,
            conn=conn,
            serves_device=settings.serves_device,
            keepawake=settings.keepawake,
            lock=settings.disk.fd,
        )
        try:
            child = start_stage(context, ENTRIES[stage], ours)
        except BaseException:
            if witness >= 0:
                os.close(witness)
            raise
        finally:
            if disk is not None and disk.witness > 0:
                os.close(disk.witness)
        loop = asyncio.get_running_loop()
        self.stages[stage] = Stage(child, ours, loop.create_future(), loop.create_future(), witness=witness)
        loop.add_reader(ours.fileno(), self._readable, stage)
        loop.add_reader(child.pidfd, self._ended, stage)

    def send(self, stage: int, message: Message, fds: tuple[int, ...] = ()) -> None:
        """A message to a stage; one that has just ended is not an error: its end is handled elsewhere."""
        if stage in self.stages:
            with contextlib.suppress(ChannelClosedError):
                self.stages[stage].channel.send(message, fds)

    def _readable(self, stage: int) -> None:
        channel = self.stages[stage].channel
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
        self._take(stage, *received)

    def _take(self, stage: int, message: Message, fds: Iterable[int]) -> None:
        for fd in fds:
            os.close(fd)
        if message.get("event") != "up":
            self.on_message(stage, message)
        elif not self.stages[stage].up.done():
            self.stages[stage].up.set_result(None)

    def _ended(self, number: int) -> None:
        stage = self.stages[number]
        loop = asyncio.get_running_loop()
        loop.remove_reader(stage.child.pidfd)
        # Messages that it sent before its end.
        with contextlib.suppress(TimeoutError, HastError):
            while (received := stage.channel.recv(timeout=0)) is not None:
                self._take(number, *received)
        loop.remove_reader(stage.channel.fileno())
        how = stage.child.reap()
        if stage.witness >= 0 and stage.child.killed:
            # It may have left writes in the device, and they must not come down after those of its successor.
            loop.add_reader(stage.witness, self._over, number, stage, how)
        else:
            self._over(number, stage, how)

    def _over(self, number: int, stage: Stage, how: str) -> None:
        if stage.witness >= 0:
            asyncio.get_running_loop().remove_reader(stage.witness)
            os.close(stage.witness)
            stage.witness = -1
        stage.end.set_result(how)
        if not stage.up.done():
            # Who was killed may live the next time, and what the system is out of there may be again; what a stage
            # cannot do for another reason it will not be able to do then either.
            kind = TemporaryError if stage.child.may_live else SystemCallError
            name = STAGE_NAMES[number]
            stage.up.set_exception(kind(f"{self.settings.resource}: its {name} stage {how} while starting"))
            stage.up.exception()  # start() may not wait for it any more
        elif not stage.stopping:
            self.on_death(number, f"{STAGE_NAMES[number]} stage {how}")

    @property
    def sync_error(self) -> int:
        """The errno of the first flush of the component that a disk stage, or the worker, has failed, or 0."""
        # A stage that never ran has said nothing.
        failed = int(self.arena.stage(DISK).extra[0]) if self.arena is not None else 0
        return failed or self.settings.disk.sync_error

    @property
    def _flushing(self) -> bool:
        """Whether the disk stage waits for a flush of the component."""
        return self.arena is not None and int(self.arena.stage(DISK).extra[1]) != 0

    @property
    def unstored(self) -> bool:
        """Whether the secondary's recv stage has told the primary that it has a write, and that is not on the disk."""
        return self.arena is not None and int(self.arena.stage(RECV).extra[1]) != 0

    def flush_failed(self) -> None:
        """One of the worker's own has: the disk stage fails all later ones, this one and those after it."""
        error = self.sync_error or errno.EIO
        self.settings = replace(self.settings, disk=replace(self.settings.disk, sync_error=error))
        self.send(DISK, {"cmd": "flush_failed", "errno": error})

    def runs(self, stage: int) -> bool:
        """Whether it does; one that nobody has told to end may have done so as well."""
        return stage in self.stages and not self.stages[stage].end.done()

    async def stop(self, *stages: int, seconds: float = END_SECONDS) -> bool:
        """Have these stages finish what is under way, one after the other; who does not end in time is killed. Whether
        none had to be. Not while it waits for a flush: a disk that hangs before it fails takes longer than that."""
        in_time = True
        for number in stages:
            stage = self.stages.get(number)
            if stage is None:
                continue
            stage.stopping = True
            self.send(number, {"cmd": "stop"})
            if number == GGATE:
                await asyncio.wait([stage.end], timeout=CLIENT_SECONDS)
                if not stage.end.done():
                    self.send(number, {"cmd": "drop"})
            if number == DISK:
                stage.child.send(signal.SIGCONT)  # as when the worker dies (hast/stages/launch.py)
            await asyncio.wait([stage.end], timeout=seconds)
            if number == DISK and self._flushing and not stage.end.done():
                log.warning("%s: waiting for its disk to end a flush", self.settings.resource)
                while self._flushing and not stage.end.done():
                    await asyncio.wait([stage.end], timeout=seconds)
            if not stage.end.done():
                in_time = False
                log.warning("%s: %s stage does not end, killing it", self.settings.resource, STAGE_NAMES[number])
        await self.kill(*stages)
        return in_time

    async def kill(self, *stages: int) -> None:
        """End these stages at once. One in an uninterruptible wait is waited for: two must never run side by side."""
        ends = []
        for number in stages:
            stage = self.stages.get(number)
            if stage is not None:
                stage.stopping = True
                if not stage.end.done():
                    stage.child.kill()
                ends.append(stage.end)
        if ends:
            await asyncio.wait(ends)
        for number in stages:
            self.stages.pop(number, None)

    async def close(self) -> None:
        """End what still runs, and give everything back. What the disk stage has begun is done in any case; that a
        flush has failed it alone is told, so it is not killed before that."""
        await self.kill(*(stage for stage in self.stages if stage != DISK))
        await self.stop(DISK)
        for bell in self._bells.values():
            os.close(bell)
        self._bells.clear()
        if self.arena is not None:
            disk = replace(self.settings.disk, sync_error=self.sync_error)
            self.settings = replace(self.settings, disk=disk)
            self.arena.close()
            self.arena = None


def _pipe(resource: str) -> tuple[int, int]:
    """Both ends of a pipe. Raises TemporaryError."""
    try:
        return os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise TemporaryError(f"{resource}: cannot make a pipe for its disk stage: {error.strerror}") from error
