"""Drives the sequencer (hast/ffi/seq.h), the code that runs in production, one event at a time, in this process.

Nothing is imitated here but what stands around the sequencer: Sequencer is its interface with Python types,
Bench plays both components and the activemap on disk. Bitmaps are integers: bit n is extent n.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from hast.ffi import _hast
from hast.shm.arena import Geometry

SECTOR = 512
MAP_BLOCK = 4096
NONE = 0xFFFFFFFF

READ, WRITE, DELETE, FLUSH, MAP = 1, 2, 3, 4, 5
LOCAL, REMOTE = 0, 1
RING_DISK, RING_SEND, RING_DISK_DONE, RING_SEND_DONE, RING_RECV_DONE, RING_DIRECT = 0, 1, 3, 4, 5, 6
RECEIVED = 0x80000000
FULLSYNC, MEMSYNC, ASYNC = 0, 1, 2
FREE, CLAIMED, BLOCKED, MAPWAIT, RUNNING, QUEUED, GRANTWAIT, DONE, DURABLEWAIT = range(9)
NEED_DEGRADED, REMOTE_FAILED, MAP_FAILED, CONNECTED, SYNC_DONE, LOCAL_FAILED = 1, 2, 4, 8, 16, 32
LOSS_TOLD = 1
FLAG_ZERO, FLAG_SYNC, FLAG_MEMSYNC, FLAG_DURABLE = 1, 4, 8, 16
EIO = 5


@dataclass(frozen=True)
class Library:
    """A build of the C side: the extension, or a variant of it that a test has compiled."""

    ffi: Any
    lib: Any
    guard: Callable[[Sequencer], None] | None = None  # called for each new arena


PRODUCTION = Library(_hast.ffi, _hast.lib)


def shape(
    extents: int = 16,
    extentsize: int = 4096,
    keepdirty: int = 4,
    nclient: int = 8,
    slab_size: int = 4096,
    short: int = 0,
    nsync: int = 2,
) -> Geometry:
    """A component of so many extents, the last of them `short` bytes too small."""
    mapsize = -(-extents // (8 * SECTOR)) * SECTOR
    return Geometry(
        datasize=extents * extentsize - short,
        data_offset=4096 + mapsize,
        extentsize=extentsize,
        mapsize=mapsize,
        keepdirty=keepdirty,
        nclient=nclient,
        nsync=nsync,
        slab_size=slab_size,
    )


def bits(extents: Iterable[int]) -> int:
    """The bitmap with these extents set."""
    value = 0
    for n in extents:
        value |= 1 << n
    return value


def extents_of(bitmap: int) -> set[int]:
    """The extents that are set in a bitmap."""
    return {n for n, digit in enumerate(reversed(f"{bitmap:b}")) if digit == "1"}


def each_extent(bitmap: int) -> Iterator[int]:
    """The same one by one: faster where few are set in a long bitmap."""
    while bitmap:
        low = bitmap & -bitmap
        yield low.bit_length() - 1
        bitmap ^= low


class Sequencer:
    """An arena of its own with the sequencer in it; load: the activemap as read from disk, a bitmap."""

    def __init__(self, geometry: Geometry, library: Library = PRODUCTION, load: int = 0) -> None:
        self.geometry, self.library = geometry, library
        self.ffi, self.lib = ffi, lib = library.ffi, library.lib
        wanted = ffi.new("struct hast_geometry *", asdict(geometry))
        size = lib.hast_arena_size(wanted)
        assert size > 0, f"no such geometry: {geometry}"
        self.memory = mmap.mmap(-1, size)
        self._base = ffi.from_buffer(self.memory)
        assert lib.hast_arena_init(self._base, wanted) == 0
        self.arena = ffi.cast("struct hast_arena *", self._base)
        self.s = lib.hast_arena_seq(self.arena)
        self.s.dirty_max = 0  # whenever the map is written what may be cleared is cleared
        self.ring = [lib.hast_arena_ring(self.arena, n) for n in range(7)]
        self.bio = [lib.hast_arena_bio(self.arena, n) for n in range(self.arena.nslots)]
        self.map_slot, self.own_flush_slot = self.arena.nslots - 2, self.arena.nslots - 1
        self._popped = ffi.new("uint32_t[64]")
        self._pushed = ffi.new("uint32_t *")
        self._view = memoryview(self.memory)
        if library.guard is not None:
            library.guard(self)
        if load:
            lib.hast_seq_load_map(self.arena, self.map_bytes(load))

    def map_bytes(self, bitmap: int) -> bytes:
        return bitmap.to_bytes(self.geometry.mapsize, "little")

    # what the device does

    def claim(self) -> int:
        return int(self.lib.hast_seq_claim(self.arena))

    def submit(self, slot: int, cmd: int, offset: int = 0, length: int = 0, flags: int = 0) -> int:
        bio = self.bio[slot]
        bio.cmd, bio.flags, bio.offset, bio.length = cmd, flags, offset, length
        return int(self.lib.hast_seq_submit(self.arena, slot))

    def acked(self) -> list[int]:
        """Everything that is to be answered now."""
        slots = []
        while (slot := self.lib.hast_seq_acked(self.arena)) != NONE:
            slots.append(slot)
        return slots

    def release(self, slot: int) -> None:
        self.lib.hast_seq_release(self.arena, slot)

    # what the components do

    def take(self, ring: int) -> list[int]:
        """Everything that was pushed to a ring; with the disk's, what its consumer may do without the disk stage."""
        return self._take(ring) + (self._take(RING_DIRECT) if ring == RING_DISK and self.s.direct else [])

    def _take(self, ring: int) -> list[int]:
        n = self.lib.hast_ring_pop_some(self.ring[ring], self._popped, 64)
        assert n >= 0, "corrupt ring"
        return list(self._popped[0:n]) + (self._take(ring) if n == 64 else [])

    def complete(self, component: int, entry: int, error: int = 0) -> int:
        """The component is done with it, without a ring in between. 0 or -EPROTO."""
        slot = entry & ~RECEIVED
        if slot < len(self.bio):
            self.bio[slot].error[component] = error
        return int(self.lib.hast_seq_complete(self.arena, component, entry))

    def post(self, ring: int, entry: int, error: int = 0) -> None:
        """The same through a completion ring; drain() takes it from there."""
        self.bio[entry & ~RECEIVED].error[LOCAL if ring == RING_DISK_DONE else REMOTE] = error
        self._pushed[0] = entry
        assert self.lib.hast_ring_push_some(self.ring[ring], self._pushed, 1) == 1

    def drain(self) -> int:
        return int(self.lib.hast_seq_drain(self.arena))

    # what the worker does

    def connect(self, bitmap: int | None = None) -> None:
        null = self.ffi.NULL
        self.lib.hast_seq_connect(self.arena, null if bitmap is None else self.map_bytes(bitmap))

    def disconnect(self) -> None:
        self.lib.hast_seq_disconnect(self.arena)

    def grant(self) -> None:
        self.lib.hast_seq_grant_degraded(self.arena)

    def outdated(self) -> None:
        self.lib.hast_seq_outdated(self.arena)

    def detach(self) -> None:
        self.lib.hast_seq_detach(self.arena)

    def local_refused(self) -> None:
        self.lib.hast_seq_local_refused(self.arena)

    def local_flush_failed(self) -> None:
        self.lib.hast_seq_local_flush_failed(self.arena)

    def current(self) -> None:
        self.lib.hast_seq_current(self.arena)

    def give_up(self) -> None:
        self.lib.hast_seq_give_up(self.arena)

    def sync_start(self, from_remote: bool) -> None:
        self.lib.hast_seq_sync_start(self.arena, int(from_remote))

    def idle(self) -> int:
        return int(self.lib.hast_seq_idle(self.arena))

    def quiet(self) -> bool:
        return bool(self.lib.hast_seq_quiet(self.arena))

    def events(self) -> int:
        """The events raised since the last call."""
        raised = int(self.s.events)
        self.s.events = 0
        return raised

    # what can be seen of its state

    def bitmap(self, name: str) -> bytes:
        at = getattr(self.arena, name + "_off")
        return bytes(self._view[at : at + self.geometry.mapsize])

    def dirty(self) -> set[int]:
        return extents_of(int.from_bytes(self.bitmap("dirty"), "little"))

    def ondisk(self) -> set[int]:
        return extents_of(int.from_bytes(self.bitmap("ondisk"), "little"))

    def sync(self) -> set[int]:
        return extents_of(int.from_bytes(self.bitmap("sync"), "little"))

    def bio_bytes(self, field: int) -> bytes:
        """One byte of each bio, by its offset in the struct."""
        at = self.arena.bio_off
        return bytes(self._view[at + field : at + 128 * self.arena.nslots : 128])

    def slab(self, slot: int, length: int) -> bytes:
        at = self.arena.slab_off + slot * self.geometry.slab_size
        return bytes(self._view[at : at + length])


class Bench:
    """A sequencer, and a test that plays all who deal with it: device, both components, worker.

    Components hold what they were given in `local` and `remote` (slots) until the test lets them complete it; `map` is
    the activemap on disk, changed by map updates that complete without an error. `answers` says what the
    client was told, by slot.
    """

    def __init__(
        self,
        *,
        mode: int = FULLSYNC,
        connected: bool = True,
        load: int = 0,
        library: Library = PRODUCTION,
        **wanted: int,
    ) -> None:
        self.geometry = shape(**wanted)
        self.seq = Sequencer(self.geometry, library, load)
        self.seq.s.mode = mode
        self.map = load
        self.local: list[int] = []
        self.remote: list[int] = []
        self.answers: dict[int, int] = {}
        self.raised = 0
        if connected:
            self.connect()
            assert self.raised == CONNECTED
            self.raised = 0

    def look(self) -> None:
        """Take over what the sequencer has given out since."""
        self.local += self.seq.take(RING_DISK)
        self.remote += self.seq.take(RING_SEND)
        for slot in self.seq.acked():
            assert slot not in self.answers, f"slot {slot} is answered twice"
            self.answers[slot] = self.seq.bio[slot].result
        self.raised |= self.seq.events()

    # requests: offsets in bytes, or whole extents

    def request(self, cmd: int, offset: int = 0, length: int = 0, flags: int = 0) -> int:
        slot = self.seq.claim()
        assert slot != NONE
        assert self.seq.submit(slot, cmd, offset, length, flags) == 0
        self.look()
        return slot

    def write(self, extent: int, at: int = 0, length: int = SECTOR) -> int:
        return self.request(WRITE, extent * self.geometry.extentsize + at, length)

    def delete(self, extent: int, count: int = 1) -> int:
        return self.request(DELETE, extent * self.geometry.extentsize, count * self.geometry.extentsize)

    def read(self, extent: int, at: int = 0, length: int = SECTOR) -> int:
        return self.request(READ, extent * self.geometry.extentsize + at, length)

    def flush(self) -> int:
        return self.request(FLUSH)

    def forget(self, slot: int) -> None:
        """The device is done with an answered slot."""
        del self.answers[slot]
        self.seq.release(slot)

    # the components

    def local_done(self, slot: int, error: int = 0) -> None:
        self.local.remove(slot)
        assert self.seq.complete(LOCAL, slot, error) == 0
        self.look()

    def remote_done(self, slot: int, error: int = 0) -> None:
        self.remote.remove(slot)
        assert self.seq.complete(REMOTE, slot, error) == 0
        self.look()

    def received(self, slot: int) -> None:
        """The first of the two replies to a memsync write."""
        assert slot in self.remote
        assert self.seq.complete(REMOTE, slot | RECEIVED) == 0
        self.look()

    def done(self, slot: int, error: int = 0) -> None:
        """Both components, as far as they have it."""
        if slot in self.local:
            self.local_done(slot, error)
        if slot in self.remote:
            self.remote_done(slot, error)

    def updating(self) -> set[int] | None:
        """The extents that the map update under way leaves dirty in its part of the map; None: there is none."""
        if self.seq.map_slot not in self.local:
            return None
        bio = self.seq.bio[self.seq.map_slot]
        part = self.seq.slab(self.seq.map_slot, bio.length)
        return extents_of(int.from_bytes(part, "little") << 8 * bio.offset)

    def map_done(self, error: int = 0) -> None:
        slot = self.seq.map_slot
        bio = self.seq.bio[slot]
        if error == 0:
            part = ((1 << 8 * bio.length) - 1) << 8 * bio.offset
            new = int.from_bytes(self.seq.slab(slot, bio.length), "little") << 8 * bio.offset
            self.map = self.map & ~part | new
        self.local_done(slot, error)

    def settle_map(self) -> None:
        """All map updates that are needed now, and those that follow from them."""
        while self.seq.map_slot in self.local:
            self.map_done()

    def settle_own(self) -> None:
        """Map updates, and flushes that the sequencer makes for itself."""
        while self.seq.own_flush_slot in self.local or self.seq.map_slot in self.local:
            self.settle_map()
            self.done(self.seq.own_flush_slot)

    def whole_write(self, extent: int, at: int = 0, length: int = SECTOR) -> None:
        """A write from the request to the released slot, on both components."""
        slot = self.write(extent, at, length)
        self.settle_own()
        self.done(slot)
        assert self.answers[slot] == 0
        self.forget(slot)

    def whole_flush(self) -> None:
        slot = self.flush()
        self.settle_own()
        self.done(slot)
        assert self.answers[slot] == 0
        self.forget(slot)

    def rest(self) -> None:
        """Quiet moments, until there is nothing left to be done in them."""
        for _ in range(100):
            started = self.seq.idle()
            self.look()
            if not started and not self.local and not self.remote:
                return
            while self.local or self.remote:
                self.settle_map()
                for slot in list(self.local) + list(self.remote):
                    if slot != self.seq.map_slot:
                        self.done(slot)
        raise AssertionError("idle finds something to do for ever")

    # the worker

    def connect(self, bitmap: int | None = None) -> None:
        """The secondary comes; the map update that this may need is not waited for."""
        self.seq.connect(bitmap)
        self.look()

    def disconnect(self) -> None:
        self.remote.clear()
        self.seq.disconnect()
        self.look()

    def grant(self) -> None:
        self.seq.grant()
        self.look()

    def outdated(self) -> None:
        self.seq.outdated()
        self.look()

    def detach(self) -> None:
        self.seq.detach()
        self.look()

    def local_refused(self) -> None:
        self.seq.local_refused()
        self.look()

    def local_flush_failed(self) -> None:
        self.seq.local_flush_failed()
        self.look()

    def current(self) -> None:
        self.seq.current()
        self.look()

    def give_up(self) -> None:
        self.seq.give_up()
        self.look()

    def synchronise(self, from_remote: bool = False) -> None:
        """A resynchronisation from its start to its end."""
        self.seq.sync_start(from_remote)
        self.look()
        for _ in range(1000):
            if self.raised & SYNC_DONE:
                break
            for slot in {*self.local, *self.remote}:
                if slot == self.seq.map_slot:
                    self.map_done()
                else:
                    self.done(slot)
        assert self.raised & SYNC_DONE
        self.raised &= ~SYNC_DONE
        if from_remote:
            self.current()


def whole(mode: int = 0, **wanted: int) -> Bench:
    """Connected, in sync, and it is known that the secondary has everything."""
    b = Bench(mode=mode, **wanted)
    b.synchronise()
    for n in range(2):
        b.whole_write(n)
    b.whole_flush()
    b.raised = 0
    return b


def own_flush(b: Bench) -> None:
    """The flush under way, the sequencer's own or a client's that goes with it."""
    b.done(b.seq.s.flush_running)
