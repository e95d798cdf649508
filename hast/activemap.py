"""Sizes and bits of the activemap, and the layout of a component (docs/disk-format.md section 5).

Invariants:
- Extent n is bit (n mod 8), counted from the least significant, of byte (n div 8); 1 means dirty.
- All sizes and offsets are in bytes and exact integers; results are multiples of the sector size.
- Bits behind the last extent are never counted and never reported as extents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hast.errors import DataError

METADATA_SIZE = 4096  # bytes; the activemap begins behind it
DEFAULT_EXTENTSIZE = 2 * 1024 * 1024
DEFAULT_KEEPDIRTY = 64
FILE_SECTOR_SIZE = 512  # what a regular file counts as
MIN_EXTENTSIZE = 512
MAX_EXTENTSIZE = 1 << 30  # it must fit an int32 of the handshake
MAX_MAPSIZE = 1 << 30  # bytes; a limit before memory is allocated


def is_power_of_two(n: int) -> bool:
    """Whether n is 1, 2, 4, 8..."""
    return n > 0 and n & (n - 1) == 0


def extent_count(datasize: int, extentsize: int) -> int:
    """The number of extents that datasize bytes have; the last one may be shorter."""
    return -(-datasize // extentsize)


def ondisk_size(mediasize: int, extentsize: int, sectorsize: int) -> int:
    """Bytes of the on-disk map for a media of mediasize bytes: whole sectors."""
    size = -(-extent_count(mediasize, extentsize) // 8)
    return -(-size // sectorsize) * sectorsize


@dataclass(frozen=True)
class Geometry:
    """Where things are on a component, in bytes: the map from METADATA_SIZE on, the data from offset on."""

    mediasize: int
    extentsize: int
    sectorsize: int
    mapsize: int
    offset: int
    datasize: int

    @property
    def extents(self) -> int:
        """The number of extents of the data."""
        return extent_count(self.datasize, self.extentsize)


def check_extentsize(extentsize: int, sectorsize: int) -> None:
    """Raises DataError unless extentsize is a power of two, a multiple of the sector size, within limits."""
    if not is_power_of_two(extentsize) or not MIN_EXTENTSIZE <= extentsize <= MAX_EXTENTSIZE:
        raise DataError(
            f"extent size {extentsize} is not a power of two between {MIN_EXTENTSIZE} and {MAX_EXTENTSIZE}"
        )
    if extentsize % sectorsize:
        raise DataError(f"extent size {extentsize} is not a multiple of the sector size {sectorsize}")


def geometry(mediasize: int, extentsize: int, sectorsize: int) -> Geometry:
    """The layout of a component that is created now on a media of mediasize bytes.

    Raises DataError when the extent size is not valid or nothing would be left for data.
    """
    check_extentsize(extentsize, sectorsize)
    usable = mediasize - mediasize % sectorsize
    mapsize = ondisk_size(max(usable - METADATA_SIZE, 0), extentsize, sectorsize)
    datasize = usable - METADATA_SIZE - mapsize
    if datasize <= 0:
        least = METADATA_SIZE + 2 * sectorsize
        raise DataError(f"{mediasize} bytes are too small for a component, {least} is the least")
    if mapsize > MAX_MAPSIZE:
        raise DataError(f"{mediasize} bytes need a map of {mapsize} bytes: choose a larger extent size")
    return Geometry(mediasize, extentsize, sectorsize, mapsize, METADATA_SIZE + mapsize, datasize)


def extent_range(offset: int, length: int, extentsize: int) -> range:
    """The extents that length (> 0) bytes from offset of the data touch."""
    return range(offset // extentsize, (offset + length - 1) // extentsize + 1)


# Bits. A map is a bytearray (bytes where it is only read).


def is_set(bits: bytes | bytearray, extent: int) -> bool:
    """Whether an extent is dirty. Raises IndexError behind the end of the map."""
    return bool(bits[extent >> 3] >> (extent & 7) & 1)


def set_bit(bits: bytearray, extent: int) -> None:
    """Mark an extent dirty. Raises IndexError behind the end of the map."""
    bits[extent >> 3] |= 1 << (extent & 7)


def clear_bit(bits: bytearray, extent: int) -> None:
    """Mark an extent clean. Raises IndexError behind the end of the map."""
    bits[extent >> 3] &= ~(1 << (extent & 7)) & 0xFF


def _number(bits: bytes | bytearray, extents: int) -> int:
    """The first `extents` bits as one integer, extent 0 the least significant."""
    return int.from_bytes(bits, "little") & ((1 << extents) - 1)


def count_dirty(bits: bytes | bytearray, extents: int) -> int:
    """How many of the first `extents` extents are dirty."""
    return _number(bits, extents).bit_count()


def dirty_bytes(bits: bytes | bytearray, datasize: int, extentsize: int) -> int:
    """How many bytes of the data lie in dirty extents; the last extent counts as long as it is."""
    extents = extent_count(datasize, extentsize)
    dirty = count_dirty(bits, extents) * extentsize
    if datasize % extentsize and is_set(bits, extents - 1):
        dirty -= extentsize - datasize % extentsize
    return dirty


def dirty_ranges(bits: bytes | bytearray, extents: int) -> Iterator[range]:
    """Runs of dirty extents among the first `extents`, in ascending order, none touching the next."""
    start: int | None = None
    for at in range(0, extents, 8):
        byte = bits[at >> 3]
        if (byte == 0 and start is None) or (byte == 0xFF and start is not None and at + 8 <= extents):
            continue
        for extent in range(at, min(at + 8, extents)):
            dirty = byte >> (extent & 7) & 1
            if dirty and start is None:
                start = extent
            elif not dirty and start is not None:
                yield range(start, extent)
                start = None
    if start is not None:
        yield range(start, extents)


def or_into(bits: bytearray, other: bytes | bytearray) -> None:
    """Add the dirty extents of another map to bits. Raises DataError when their sizes differ."""
    if len(bits) != len(other):
        raise DataError(f"activemap of {len(other)} bytes cannot be merged into one of {len(bits)} bytes")
    merged = int.from_bytes(bits, "little") | int.from_bytes(other, "little")
    bits[:] = merged.to_bytes(len(bits), "little")


def all_dirty(size: int) -> bytearray:
    """The full map of size bytes: every extent dirty."""
    return bytearray(b"\xff" * size)
