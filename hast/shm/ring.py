"""A ring of shared memory (hast/ffi/ring.h) as tests and tools see it; the data path never comes by here.

Invariants:
- One process pushes and one pops, as in C; this class does not know which one it is.
- An index that the other side left and that cannot be is reported as DataError, and never followed.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

from hast.errors import DataError
from hast.ffi import _hast

ffi, lib = _hast.ffi, _hast.lib

MAX_ENTRIES = 1 << 24


class Ring:
    """One ring: of an arena (Ring(arena.ring(n))), or in memory of its own (Ring.create())."""

    def __init__(self, c: Any, owner: object = None) -> None:
        self.c = c  # struct hast_ring *
        self._owner = owner  # what keeps the memory

    @classmethod
    def create(cls, entries: int) -> Ring:
        """A ring in new memory that children made by fork share. entries: a power of two, up to 2^24.

        Raises ValueError for another number.
        """
        if not 0 < entries <= MAX_ENTRIES or entries & (entries - 1) != 0:
            raise ValueError(f"a ring of {entries} entries: a power of two up to {MAX_ENTRIES} is needed")
        memory = ffi.from_buffer(mmap.mmap(-1, lib.hast_ring_size(entries)))
        ring = cls(ffi.cast("struct hast_ring *", memory), memory)
        lib.hast_ring_init(ring.c, entries)
        return ring

    @property
    def size(self) -> int:
        """Entries that it can hold."""
        return int(self.c.mask) + 1

    def __len__(self) -> int:
        """Entries in it at this moment, whoever looks."""
        return int(lib.hast_ring_used(self.c))

    def push(self, values: Sequence[int]) -> int:
        """Pushes as many as there is room for, each a 32-bit number; says how many. Raises DataError when the
        consumer's index cannot be."""
        done = lib.hast_ring_push_some(self.c, ffi.new("uint32_t[]", list(values)), len(values))
        if done < 0:
            raise DataError(self._corrupt("consumer"))
        return int(done)

    def pop(self, most: int | None = None) -> list[int]:
        """Takes what is ready, at most so many; may be fewer than are there when the producer is pushing. Raises
        DataError when the producer's index cannot be."""
        most = self.size if most is None else min(most, self.size)
        values = ffi.new("uint32_t[]", max(most, 1))
        done = lib.hast_ring_pop_some(self.c, values, most)
        if done < 0:
            raise DataError(self._corrupt("producer"))
        return [int(values[i]) for i in range(done)]

    def _corrupt(self, who: str) -> str:
        head, tail = int(self.c.head), int(self.c.tail)
        return f"a ring of {self.size} entries is damaged, its {who} left head {head} and tail {tail}"
