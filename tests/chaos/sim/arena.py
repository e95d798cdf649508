"""Arenas that are used again: a new pipeline costs the copy of an arena as it was when it was made."""

from __future__ import annotations

from tests.sim.harness import Library, Sequencer, shape

SHAPES = (
    {"extents": 8, "extentsize": 1024, "slab_size": 4096},
    {"extents": 12, "extentsize": 512, "slab_size": 4096},
    {"extents": 9, "extentsize": 1024, "slab_size": 4096, "short": 512},
    {"extents": 4, "extentsize": 8192, "slab_size": 4096},
)
COLD = 1 << 20  # more dirty extents than there are: they are cleared in quiet moments only


class Arena(Sequencer):
    """reset() makes it new. Slabs are not cleared: nobody may rely on what is in them."""

    def __init__(self, which: int, keepdirty: int, nclient: int, library: Library) -> None:
        super().__init__(shape(**SHAPES[which], keepdirty=keepdirty, nclient=nclient), library)
        self.image = bytes(self._view[: self.arena.slab_off])
        at = self.arena.slab_off + self.map_slot * self.geometry.slab_size
        self.map_slab = self.ffi.cast("uint32_t *", self.ffi.cast("char *", self.arena) + at)
        self.sync_map = self.ffi.cast("uint32_t *", self.ffi.cast("char *", self.arena) + self.arena.sync_off)
        self.dirty_map = self.ffi.cast("uint32_t *", self.ffi.cast("char *", self.arena) + self.arena.dirty_off)

    def reset(self, load: int | None, dirty_max: int) -> None:
        self.ffi.memmove(self.arena, self.image, len(self.image))
        self.s.dirty_max = dirty_max
        if load is not None:
            self.lib.hast_seq_load_map(self.arena, self.map_bytes(load))


_kept: dict[tuple[int, int, int, int, int], Arena] = {}


def arena(node: int, which: int, keepdirty: int, nclient: int, library: Library) -> Arena:
    key = (node, which, keepdirty, nclient, id(library))
    found = _kept.get(key)
    if found is None:
        found = _kept[key] = Arena(which, keepdirty, nclient, library)
    return found
