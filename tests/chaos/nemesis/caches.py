"""The volatile cache of a node's disk: what a power failure takes away of what was written since the last flush.

Invariants:
- What completed before a flush began that has completed is there afterwards. Of what came later any part may be
  missing, sector by sector, and what is there came in its order.
- The base is a state that the disk has had; what was written while it was copied is in the recording as well.
"""

from __future__ import annotations

import random
import shutil
import zlib
from typing import BinaryIO

from tests.chaos.nemesis.model import SECTOR
from tests.e2e.pair import PairNode
from tests.faultdisk import DELETE, FLUSH, WRITE, Entry, entries

MUTATIONS = (WRITE, DELETE)


class Cache:
    """Of a node whose component is on a fault disk."""

    def __init__(self, node: PairNode) -> None:
        (self.disk,) = node.disks
        self.base = node.directory / "cache.base"
        self.log = node.directory / "cache.log"

    def begin(self) -> None:
        """Remember from now on what is written and flushed; all that is there is taken for durable."""
        self.disk.record(None)
        self.log.unlink(missing_ok=True)
        self.disk.record(self.log)
        self.disk.cache(zlib.crc32(str(self.log).encode()))
        shutil.copyfile(self.disk.backing, self.base)

    def lose(self, rng: random.Random) -> tuple[int, int]:
        """The power is gone, and nobody uses the disk: how many writes were not flushed, and how many of these are
        lost or torn."""
        self.disk.record(None)
        found = list(entries(self.log))
        flushed = max((e.begin for e in found if e.kind == FLUSH and not e.error), default=0)
        keep = rng.choice([0.0, 0.3, 0.9, 1.0])
        volatile = lost = 0
        with self.base.open("r+b") as file:
            for entry in found:
                if entry.kind not in MUTATIONS or not entry.stored:
                    continue
                if entry.end > flushed:
                    volatile += 1
                    if rng.random() >= keep:
                        lost += 1
                        self._torn(file, entry, rng)
                        continue
                self._apply(file, entry.offset, _data(entry))
        shutil.copyfile(self.base, self.disk.backing)
        self.begin()
        return volatile, lost

    def _torn(self, file: BinaryIO, entry: Entry, rng: random.Random) -> None:
        """Some sectors of it, most often none."""
        if rng.random() < 0.7:
            return
        data = _data(entry)
        for at in range(0, len(data), SECTOR):
            if rng.random() < 0.5:
                self._apply(file, entry.offset + at, data[at : at + SECTOR])

    @staticmethod
    def _apply(file: BinaryIO, offset: int, data: bytes) -> None:
        file.seek(offset)
        file.write(data)


def _data(entry: Entry) -> bytes:
    return entry.data if entry.kind == WRITE else bytes(entry.stored)
