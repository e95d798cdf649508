"""The metadata block: the first 4096 bytes of a component (docs/disk-format.md section 5).

Invariants:
- pack() gives exactly METADATA_SIZE bytes, byte-identical with the original's for the same fields.
- unpack() gives a block whose sizes fit together, or says which of four things is wrong: blank (never
  created), damaged, of another resource, or larger than its media.
- What a block says stands in its first sector, so that a loss of power leaves the old one or the new one.
- There is one counter pair on disk. Whose pair it is depends on the role that reads it: see counters().
"""

from __future__ import annotations

from dataclasses import dataclass

from hast.activemap import FILE_SECTOR_SIZE, MAX_MAPSIZE, METADATA_SIZE, check_extentsize, ondisk_size
from hast.control import Role
from hast.errors import DataError
from hast.nv import Nv, decode, printable

MAX_DATASIZE = (1 << 63) - 1  # it must fit an int64 of the handshake


class BlankMetadataError(DataError):
    """Nothing but zeros: no component was ever created here."""


class DamagedMetadataError(DataError):
    """Not a metadata block, or one whose values cannot be right."""


class ForeignMetadataError(DataError):
    """A good block of a resource with another name."""


class MediaSizeError(DataError):
    """A good block that describes more than the media holds."""


@dataclass(frozen=True)
class Pair:
    """A node's counters: its own changes made alone, and what it last knew of the other node's."""

    localcnt: int = 0
    remotecnt: int = 0


@dataclass(frozen=True)
class Counters:
    """The pairs of a node by role; None where the role that read the block does not have that pair."""

    primary: Pair | None
    secondary: Pair | None


@dataclass(frozen=True)
class Metadata:
    """What a metadata block says. Sizes and offset in bytes, keepdirty in extents.

    prevrole is the role of the one who wrote the block, pair that role's counters. syncing: this node is
    the target of a synchronisation that has not finished, so its data is not fit to be used. unmapped: and the map does
    not say for certain where it differs. blank: and the other node was one that was never used. unsaid: this node's
    data is not fit to be used, and the other one's localcnt is perhaps not above remotecnt. alone: localcnt was raised
    since the other node was last met, so it need not be raised again (hast.decision). discard: what this node
    has changed alone is to be thrown away when the nodes find that both have (`hastctl discard`). bond: a random number
    that it has in common with the component of the other node, which counters and map speak of; 0: not known.
    """

    resource: str
    datasize: int
    extentsize: int
    keepdirty: int
    offset: int
    resuid: int = 0
    pair: Pair = Pair()
    prevrole: Role = Role.INIT
    syncing: bool = False
    alone: bool = False
    discard: bool = False
    unmapped: bool = False
    blank: bool = False
    unsaid: bool = False
    bond: int = 0

    @property
    def mapsize(self) -> int:
        """Bytes of the on-disk activemap area, from METADATA_SIZE to the data."""
        return self.offset - METADATA_SIZE

    def counters(self, role: Role) -> Counters:
        """The pair as the given role reads it: init as both, a primary or secondary as its own."""
        return Counters(
            primary=self.pair if role is not Role.SECONDARY else None,
            secondary=self.pair if role is not Role.PRIMARY else None,
        )

    def pack(self) -> bytes:
        """The block. Raises DataError when a value does not fit."""
        nv = Nv()
        nv.add_string("resource", self.resource)
        nv.add_uint64("datasize", self.datasize)
        nv.add_uint32("extentsize", self.extentsize)
        nv.add_uint32("keepdirty", self.keepdirty)
        nv.add_uint64("offset", self.offset)
        nv.add_uint64("resuid", self.resuid)
        nv.add_uint64("localcnt", self.pair.localcnt)
        nv.add_uint64("remotecnt", self.pair.remotecnt)
        nv.add_string("prevrole", self.prevrole.text)
        if self.syncing:
            # Ours: the original ignores it. Absent when false, so that blocks stay those of the original.
            nv.add_uint8("syncing", 1)
        if self.alone:
            nv.add_uint8("alone", 1)
        if self.discard:
            nv.add_uint8("discard", 1)
        if self.unmapped:
            nv.add_uint8("unmapped", 1)
        if self.blank:
            nv.add_uint8("blank", 1)
        if self.unsaid:
            nv.add_uint8("unsaid", 1)
        if self.bond:
            nv.add_uint64("bond", self.bond)
        return nv.encode(METADATA_SIZE).ljust(METADATA_SIZE, b"\0")


def unpack(block: bytes, resource: str) -> Metadata:
    """Read the metadata block of a resource.

    block: the first METADATA_SIZE bytes of the component. Raises BlankMetadataError, DamagedMetadataError
    or ForeignMetadataError.
    """
    if len(block) != METADATA_SIZE:
        raise DamagedMetadataError(f"{resource}: metadata block has {len(block)} of {METADATA_SIZE} bytes")
    if block.count(0) == METADATA_SIZE:
        raise BlankMetadataError(
            f"{resource}: the component is blank, it has no metadata: run 'hastctl create {resource}' first"
        )
    try:
        metadata = _from_nv(decode(block))
    except DataError as error:
        raise DamagedMetadataError(
            f"{resource}: the component has no valid metadata ({error}):"
            f" wrong device, not created yet, or damaged"
        ) from None
    if metadata.resource != resource:
        raise ForeignMetadataError(
            f"{resource}: the component belongs to resource '{printable(metadata.resource)}':"
            f" check 'local' and 'name' in hast.conf"
        )
    return metadata


def check_media(metadata: Metadata, mediasize: int) -> None:
    """Raises MediaSizeError when the data would reach past the mediasize bytes that the component has."""
    needed = metadata.offset + metadata.datasize
    if needed > mediasize:
        raise MediaSizeError(
            f"{metadata.resource}: the component has {mediasize} bytes but its metadata needs {needed}:"
            f" it was truncated or is the wrong device"
        )


def _from_nv(nv: Nv) -> Metadata:
    metadata = Metadata(
        resource=nv.get_string("resource"),
        datasize=nv.get_uint64("datasize"),
        extentsize=nv.get_uint32("extentsize"),
        keepdirty=nv.get_uint32("keepdirty"),
        offset=nv.get_uint64("offset"),
        resuid=nv.get_uint64("resuid"),
        pair=Pair(nv.get_uint64("localcnt"), nv.get_uint64("remotecnt")),
        prevrole=Role.from_text(nv.get_string("prevrole")),
        syncing=nv.get_uint8("syncing", 0) != 0,
        alone=nv.get_uint8("alone", 0) != 0,
        discard=nv.get_uint8("discard", 0) != 0,
        unmapped=nv.get_uint8("unmapped", 0) != 0,
        blank=nv.get_uint8("blank", 0) != 0,
        unsaid=nv.get_uint8("unsaid", 0) != 0,
        bond=nv.get_uint64("bond", 0),
    )
    _check_sizes(metadata)
    return metadata


def _check_sizes(metadata: Metadata) -> None:
    """Raises DataError when the sizes cannot be those of a component that somebody created."""
    datasize, offset = metadata.datasize, metadata.offset
    check_extentsize(metadata.extentsize, FILE_SECTOR_SIZE)
    if datasize == 0 or datasize % FILE_SECTOR_SIZE:
        raise DataError(f"data size {datasize} is not a positive multiple of {FILE_SECTOR_SIZE}")
    if offset % FILE_SECTOR_SIZE or not METADATA_SIZE < offset <= METADATA_SIZE + MAX_MAPSIZE:
        raise DataError(f"data offset {offset} is not valid")
    if offset + datasize > MAX_DATASIZE:
        raise DataError(f"data offset {offset} and data size {datasize} are too large")
    needed = ondisk_size(metadata.mapsize + datasize, metadata.extentsize, FILE_SECTOR_SIZE)
    if metadata.mapsize < needed:
        raise DataError(f"data offset {offset} leaves {metadata.mapsize} bytes for a map of {needed} bytes")
