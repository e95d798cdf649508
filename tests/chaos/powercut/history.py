"""A recording of two nodes: what clients asked for and were acknowledged, and what was asked of both disks.

Invariants:
- All stamps are of one clock, and conservative: a request begins before its first byte is sent, and is acknowledged
  after its answer has come; a disk's operation begins after it was asked for and ends before that is answered.
- Every sector of data says which request wrote it and where it belongs; zeros are those of a trim, of write-zeroes, or
  the first ones.
"""

from __future__ import annotations

import math
import pickle
import struct
from dataclasses import dataclass, field
from pathlib import Path

from hast.activemap import METADATA_SIZE
from tests.faultdisk import DELETE, FLUSH, READ, WRITE, Entry

SECTOR = 512
NEVER = math.inf
_PATTERN = struct.Struct("<QQ")

__all__ = ["DELETE", "FLUSH", "NEVER", "READ", "SECTOR", "WRITE", "Entry", "History", "Request", "Shape", "pattern"]


def pattern(number: int, sector: int) -> bytes:
    """What request `number` writes into a sector of the data."""
    return _PATTERN.pack(number, sector) * (SECTOR // _PATTERN.size)


def number_of(data: bytes, sector: int) -> int:
    """The request that wrote this content of a sector; 0: zeros. ValueError when it is neither."""
    number, _ = _PATTERN.unpack_from(data)
    if data != (pattern(number, sector) if number else bytes(SECTOR)):
        raise ValueError(f"sector {sector} of the data holds something that nobody has written: {data[:32].hex()}...")
    return int(number)


@dataclass
class Request:
    """A client's. number: what it writes, 0 for what leaves zeros; sectors of the data; ack: NEVER without a good
    answer."""

    number: int
    flush: bool
    first: int = 0
    count: int = 0
    zeros: bool = False
    fua: bool = False
    begin: float = 0
    ack: float = NEVER


@dataclass(frozen=True)
class Shape:
    """A component, in sectors but for extentsize, which is in bytes."""

    offset: int
    sectors: int
    extentsize: int

    @property
    def mapped(self) -> slice:
        """The sectors of the map."""
        return slice(METADATA_SIZE // SECTOR, self.offset)

    def extent(self, sector: int) -> int:
        """The extent of a sector of the data."""
        return sector * SECTOR // self.extentsize


@dataclass
class History:
    """disks: what the disks of both nodes were asked to do, in the order of completion, from blank ones on (`hastctl
    create` comes first); marks: what was done to the nodes, and when it began, for whoever reads a violation."""

    resource: str
    shape: Shape
    replication: str
    metaflush: bool
    requests: list[Request] = field(default_factory=list)
    disks: dict[str, list[Entry]] = field(default_factory=dict)
    marks: list[tuple[float, str]] = field(default_factory=list)

    def around(self, moment: float) -> str:
        """What was going on then."""
        before = [text for at, text in self.marks if at <= moment]
        return before[-1] if before else "the start"

    def save(self, path: Path) -> None:
        path.write_bytes(pickle.dumps(self))

    @staticmethod
    def load(path: Path) -> History:
        history = pickle.loads(path.read_bytes())
        assert isinstance(history, History)
        return history
