"""The arena of a resource: the memory that its stages share (hast/ffi/arena.h says what stands where).

Invariants:
- It has no name (memfd_create): stages inherit the mapping by fork, anybody else gets the descriptor, so no crash of
  anybody leaves something behind. And it is in no mounted file system: a full or small /dev/shm, as containers have it,
  would be found by the first use of a slab, as SIGBUS or as a disk that "fails" with EFAULT.
- All but the slabs is backed by memory before it is used: where there is none, that is an error here. Slabs take memory
  when they are first used, the logs of traces when tracing begins.
- Layout is the C side's: no offset is computed here, and memory that somebody else made is used only after
  hast_arena_check() has found in it exactly the layout that its geometry has in this build.
- Memoryviews keep the mapping alive; pointers (c, seq, bio(), bell(), ring(), ...) are good until close() only.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from dataclasses import asdict, dataclass
from typing import Any

from hast.errors import DataError, SystemCallError, refusal
from hast.ffi import _hast

ffi, lib = _hast.ffi, _hast.lib

NAME = "hast."  # how the kernel calls it in /proc, before the resource's name


@dataclass(frozen=True)
class Geometry:
    """What an arena is made for. datasize, data_offset, extentsize, mapsize and slab_size in bytes, keepdirty in
    extents, nclient and nsync in bios under way at once (docs/disk-format.md section 5 for the first five)."""

    datasize: int
    data_offset: int
    extentsize: int
    mapsize: int
    keepdirty: int
    nclient: int
    nsync: int
    slab_size: int

    def arena_size(self) -> int:
        """Bytes of memory that such an arena takes, a multiple of 4096; 0 when there can be none."""
        try:
            return int(lib.hast_arena_size(self.to_c()))
        except OverflowError:
            return 0

    def to_c(self) -> Any:
        """As struct hast_geometry. Raises OverflowError when a number does not fit its field."""
        return ffi.new("struct hast_geometry *", asdict(self))

    @classmethod
    def from_c(cls, c: Any) -> Geometry:
        return cls(**{name: int(getattr(c, name)) for name in cls.__dataclass_fields__})


class Arena:
    """An arena mapped into this process. Made by create() or attach()."""

    def __init__(self, fd: int, memory: mmap.mmap) -> None:
        self.fd = fd  # of the shared memory, close-on-exec; may be sent to another process, which calls attach()
        self.size = len(memory)  # bytes
        self._memory = memory
        self._base = ffi.from_buffer(memory)
        self.c = ffi.cast("struct hast_arena *", self._base)

    @classmethod
    def create(cls, geometry: Geometry, resource: str) -> Arena:
        """A new arena, zeroed but for its header. resource: for messages only.

        Raises DataError when the geometry is not possible, TemporaryError when there is not enough memory.
        """
        size = geometry.arena_size()
        if size == 0:
            raise DataError(
                f"resource {resource}: no shared memory can be laid out for {geometry}; "
                f"if these numbers are not yours, the metadata of the component is damaged"
            )
        fd = -1
        try:
            fd = os.memfd_create(f"{NAME}{resource}", os.MFD_CLOEXEC)
            os.fchmod(fd, 0o600)
            os.ftruncate(fd, size)
            slabs = (geometry.nclient + geometry.nsync + 2) * geometry.slab_size
            os.posix_fallocate(fd, 0, size - slabs - int(lib.hast_trace_size()))
            memory = mmap.mmap(fd, size)
        except (OSError, MemoryError, OverflowError) as error:
            if fd >= 0:
                os.close(fd)
            number = errno.ENOMEM if isinstance(error, MemoryError) else getattr(error, "errno", None)
            raise refusal(_no_memory(resource, size, error), number) from error
        arena = cls(fd, memory)
        if lib.hast_arena_init(arena.c, geometry.to_c()) != 0:
            arena.close()
            raise DataError(f"resource {resource}: no shared memory can be laid out for {geometry}")
        return arena

    @classmethod
    def attach(cls, fd: int) -> Arena:
        """An arena that another process has made. The descriptor stays the caller's: it is duplicated.

        Raises DataError when it is not the whole arena of this very build, SystemCallError when it cannot be mapped.
        """
        own = -1
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or info.st_size < ffi.sizeof("struct hast_arena"):
                raise DataError(f"descriptor {fd} is not shared memory of hastd: it has {info.st_size} bytes")
            own = os.dup(fd)
            arena = cls(own, mmap.mmap(own, info.st_size))
        except (OSError, MemoryError, OverflowError) as error:
            if own >= 0:
                os.close(own)
            raise SystemCallError(f"cannot map the shared memory behind descriptor {fd}: {error}") from error
        if lib.hast_arena_check(arena.c, arena.size) != 0:
            arena.close()
            raise DataError(
                f"descriptor {fd} is not shared memory of this version of hastd, or it was damaged: "
                f"restart hastd, so that all its processes are of one version"
            )
        return arena

    def close(self) -> None:
        """Gives mapping and descriptor back. Pointers end here; memoryviews keep the mapping until they are gone."""
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        self.c = ffi.NULL
        ffi.release(self._base)
        try:
            self._memory.close()
        except BufferError:
            pass  # a memoryview is still out there, and the mapping goes with it

    @property
    def geometry(self) -> Geometry:
        return Geometry.from_c(self._arena.geo)

    @property
    def nslots(self) -> int:
        return int(self._arena.nslots)

    @property
    def seq(self) -> Any:
        """struct hast_seq *, the sequencer's state."""
        return lib.hast_arena_seq(self._arena)

    def bio(self, slot: int) -> Any:
        """struct hast_bio * of a slot. Raises IndexError."""
        return lib.hast_arena_bio(self._arena, self._slot(slot))

    def slab(self, slot: int) -> memoryview:
        """The data of a slot: slab_size bytes. Raises IndexError."""
        slab_size = int(self._arena.geo.slab_size)
        return self._view(int(self._arena.slab_off) + self._slot(slot) * slab_size, slab_size)

    @property
    def dirty(self) -> memoryview:
        """What the activemap on disk should say: mapsize bytes, bit n % 8 of byte n / 8 is extent n."""
        return self._view(int(self._arena.dirty_off), int(self._arena.geo.mapsize))

    @property
    def ondisk(self) -> memoryview:
        """What the activemap on disk says for certain, mapsize bytes."""
        return self._view(int(self._arena.ondisk_off), int(self._arena.geo.mapsize))

    @property
    def sync(self) -> memoryview:
        """Extents that differ between the nodes, or may, mapsize bytes."""
        return self._view(int(self._arena.sync_off), int(self._arena.geo.mapsize))

    def stage(self, stage: int) -> Any:
        """struct hast_stage_line * of a stage (enum hast_stage_id). Raises IndexError."""
        return ffi.addressof(self._arena.stage[_index(stage, lib.HAST_STAGES, "stage")])

    def bell(self, stage: int) -> Any:
        """struct hast_doorbell * of a stage (enum hast_stage_id). Raises IndexError."""
        return ffi.addressof(self._arena.bell[_index(stage, lib.HAST_STAGES, "stage")])

    def ring(self, ring: int) -> Any:
        """struct hast_ring * (enum hast_ring_id). Raises IndexError."""
        return lib.hast_arena_ring(self._arena, _index(ring, lib.HAST_RINGS, "ring"))

    def ring_used(self, ring: int) -> int:
        """Entries in a ring (enum hast_ring_id) at this moment. Raises IndexError."""
        return int(lib.hast_ring_used(self.ring(ring)))

    def trace(self, on: bool) -> None:
        """Lets all stages note where their bios are (hast/ffi/trace.h), or no more; at any time, from any process.

        Raises SystemCallError when there is no memory for it."""
        if on:
            try:
                os.posix_fallocate(self.fd, int(self._arena.trace_off), int(lib.hast_trace_size()))
            except OSError as error:
                raise SystemCallError(f"no memory for a trace: {error.strerror}") from error
        lib.hast_trace_switch(self._arena, on)

    def trace_log(self, stage: int) -> bytes:
        """What a stage has noted, as struct hast_trace_log. Raises IndexError."""
        log = lib.hast_arena_trace(self._arena, _index(stage, lib.HAST_STAGES, "stage"))
        return bytes(ffi.buffer(log, ffi.sizeof("struct hast_trace_log")))

    def load_map(self, activemap: bytes) -> None:
        """Takes the activemap as read from disk, mapsize bytes; before any I/O. Raises DataError when it is not that
        long (docs/disk-format.md section 5)."""
        mapsize = int(self._arena.geo.mapsize)
        if len(activemap) != mapsize:
            raise DataError(f"an activemap of {mapsize} bytes was expected, and {len(activemap)} bytes came")
        lib.hast_seq_load_map(self._arena, ffi.from_buffer("uint8_t[]", activemap))

    @property
    def _arena(self) -> Any:
        """The pointer, never a stale one: cffi would follow NULL into a crash."""
        if self.fd < 0:
            raise ValueError("the arena is closed")
        return self.c

    def _slot(self, slot: int) -> int:
        return _index(slot, int(self._arena.nslots), "slot")

    def _view(self, offset: int, size: int) -> memoryview:
        return memoryview(self._memory)[offset : offset + size]


def _index(value: int, end: int, what: str) -> int:
    if not 0 <= value < end:
        raise IndexError(f"{what} {value} of {end}")
    return value


def _no_memory(resource: str, size: int, error: Exception) -> str:
    """One line on an arena that could not be had."""
    return f"{resource}: cannot get {size} bytes of shared memory: {error or type(error).__name__}"
