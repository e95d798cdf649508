"""Messages of the peer protocol (docs/protocol.md sections 2, 3 and 4): bytes to dataclasses and back.

Invariants:
- from_nv() gives a message whose fields are all of the right type and range, or raises DataError; checks
  that need to know the resource (sizes, offsets) are check_request().
- to_nv() writes the elements in the order in which the original writes them.
- Error numbers in messages are this host's; they are FreeBSD's only on the wire.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import IntEnum

from hast import checksum, compression, errnos
from hast.errors import DataError
from hast.framing import HANDSHAKE_LIMIT as HANDSHAKE_LIMIT
from hast.framing import MAIN_HEADER as MAIN_HEADER
from hast.framing import PROTOCOL_VERSION as PROTOCOL_VERSION
from hast.framing import REQUEST_LIMIT as REQUEST_LIMIT
from hast.framing import MainHeader as MainHeader
from hast.framing import pack_message as pack_message
from hast.framing import parse_main_header as parse_main_header
from hast.framing import unpack_message as unpack_message
from hast.nv import Nv

FIRST_VERSION = 1  # what a first handshake message is sent as
TOKEN_SIZE = 16
# What both nodes log, with the resource's name twice.
SPLIT_BRAIN_ADVICE = (
    "%s: split-brain: both nodes were written to without the other: choose the one whose changes are to be thrown away,"
    " and run 'hastctl discard %s' there, as secondary (SPLIT-BRAIN in hastd(8))"
)

MISMATCH = "Resource unique ID mismatch"  # and their numbers
# As above.
MISMATCH_ADVICE = (
    "%s: the components of the two nodes have nothing in common: choose the one whose data is to be overwritten,"
    " and run 'hastctl create %s' there, in the role init, before it is secondary"
)

MAX_IO_SENT = 131072  # largest read or write that every peer of version 2 takes, bytes
MAX_IO_ACCEPTED = 1048576  # largest that we must take

SPLIT_BRAIN = "Split-brain condition!"  # both sides compare this text
TOKEN_MISMATCH = "Token doesn't match."
NOT_CONFIGURED = "Resource not configured."
NO_ACCESS = "No access to the resource."
DISK_FAILED = "The secondary's component failed."  # ours; nothing was accepted
OUTDATED = "The primary's component is out of date, and this node has not what it lacks."  # ours, as well
STRANGERS = "One of the two components has been synchronised with another one since."  # ours, as well


def wrong_role_text(role: str) -> str:
    """The refusal of step 1 by a node that is not secondary but `role` ("init" or "primary")."""
    return f"Remote node acts as {role} for the resource and not as secondary."


def resuid_mismatch_text(primary: int, secondary: int) -> str:
    """The refusal of step 2 by a secondary whose resource unique ID is another one."""
    return f"{MISMATCH} (primary={primary}, secondary={secondary})."


class Cmd(IntEnum):
    """`cmd` of a request."""

    READ = 1
    WRITE = 2
    DELETE = 3
    FLUSH = 4
    KEEPALIVE = 5


class SyncSource(IntEnum):
    """`syncsrc` of a handshake: the node whose data is the newer."""

    PRIMARY = 1
    SECONDARY = 2


# Data of a message.


@dataclass(frozen=True)
class DataInfo:
    """What an nv says about the data behind it: how it was transformed, and its size on the wire, bytes."""

    size: int = 0
    compression: str = compression.NONE
    checksum: str = checksum.NONE
    hash: bytes = b""

    def add_to(self, nv: Nv) -> None:
        """Append compression, checksum, hash and size, in this order; nothing when there is no data."""
        if self.size == 0:
            return
        if self.compression != compression.NONE:
            nv.add_string("compression", self.compression)
        if self.checksum != checksum.NONE:
            nv.add_string("checksum", self.checksum)
            nv.add_uint8_array("hash", self.hash)
        nv.add_uint32("size", self.size)

    @classmethod
    def from_nv(cls, nv: Nv) -> DataInfo:
        """Raises DataError for an unknown algorithm or a hash that does not have its algorithm's length."""
        packed = compression.NONE
        if "compression" in nv:
            packed = nv.get_string("compression")
            if packed not in (compression.HOLE, compression.LZF):
                raise DataError(f"unknown compression {packed!r}, hole and lzf are known")
        algorithm, hash_ = checksum.NONE, b""
        if "checksum" in nv:
            algorithm, hash_ = nv.get_string("checksum"), nv.get_uint8_array("hash")
            if algorithm not in checksum.HASH_SIZES:
                raise DataError(f"unknown checksum {algorithm!r}, crc32 and sha256 are known")
            if len(hash_) != checksum.HASH_SIZES[algorithm]:
                raise DataError(f"{algorithm} hash of {len(hash_)} bytes")
        return cls(nv.get_uint32("size", 0), packed, algorithm, hash_)


def encode_payload(data: bytes, packing: str, algorithm: str) -> tuple[bytes, DataInfo]:
    """Transform data for the wire by the configured compression and checksum: (bytes to send, their info)."""
    used, payload = compression.choose(data, packing)
    hash_ = b"" if algorithm == checksum.NONE else checksum.digest(algorithm, payload)
    return payload, DataInfo(len(payload), used, algorithm, hash_)


def decode_payload(payload: bytes, info: DataInfo, length: int) -> bytes:
    """Undo encode_payload(). length is the number of bytes that the data must have.

    Raises DataError on a wrong size, a checksum mismatch, or data that does not decompress to length bytes.
    """
    if len(payload) != info.size:
        raise DataError(f"{len(payload)} bytes of data came, {info.size} were announced")
    if info.checksum != checksum.NONE:
        checksum.verify(info.checksum, payload, info.hash)
    return compression.undo(info.compression, payload, length)


# Requests and replies, section 4.


@dataclass(frozen=True)
class Request:
    """A request of the primary. offset and length in bytes; data describes what follows a write."""

    cmd: int
    seq: int = 0
    offset: int = 0
    length: int = 0
    memsync: bool = False
    data: DataInfo = DataInfo()

    def to_nv(self) -> Nv:
        nv = Nv()
        nv.add_uint8("cmd", self.cmd)
        if self.cmd == Cmd.KEEPALIVE:
            return nv
        nv.add_uint64("seq", self.seq)
        nv.add_uint64("offset", self.offset)
        nv.add_uint64("length", self.length)
        if self.memsync:
            nv.add_uint8("memsync", 1)
        self.data.add_to(nv)
        return nv

    @classmethod
    def from_nv(cls, nv: Nv) -> Request:
        """Raises DataError when an element that the command needs is missing or is not what it must be.

        A cmd that is not known passes: check_request() gives it its answer.
        """
        cmd = nv.get_uint8("cmd")
        if cmd == Cmd.KEEPALIVE:
            return cls(cmd)
        seq = nv.get_uint64("seq")
        if seq == 0:
            raise DataError("request with seq 0")
        optional = None if cmd in (Cmd.READ, Cmd.WRITE, Cmd.DELETE) else 0
        offset, length = nv.get_uint64("offset", optional), nv.get_uint64("length", optional)
        memsync = nv.get_uint8("memsync", 0) != 0
        data = DataInfo.from_nv(nv)
        if cmd == Cmd.WRITE and data.size == 0:
            raise DataError("write request without data")
        if cmd != Cmd.WRITE and data.size != 0:
            raise DataError(f"request {cmd} with {data.size} bytes of data")
        return cls(cmd, seq, offset, length, memsync, data)


def check_request(
    request: Request, datasize: int, sectorsize: int, max_io: int = MAX_IO_ACCEPTED
) -> int:
    """The errno (0 or EINVAL) with which a request that from_nv() let pass must be answered.

    datasize and sectorsize (a power of two) are those of the component, max_io the largest read or write
    that is taken, all in bytes. EINVAL for a write means also: close the connection, because the length of
    what follows cannot be trusted. docs/protocol.md section 4.
    """
    if request.cmd in (Cmd.FLUSH, Cmd.KEEPALIVE):
        return 0
    if request.cmd not in (Cmd.READ, Cmd.WRITE, Cmd.DELETE):
        return errno.EINVAL
    offset, length = request.offset, request.length
    if length == 0 or (offset | length) & (sectorsize - 1) or offset + length > datasize:
        return errno.EINVAL
    if request.cmd != Cmd.DELETE and length > max_io:
        return errno.EINVAL
    if request.cmd == Cmd.WRITE and not data_size_fits(request.data, length):
        return errno.EINVAL
    return 0


def data_size_fits(data: DataInfo, length: int) -> bool:
    """Whether data of this size on the wire can stand for length bytes."""
    if data.compression == compression.NONE:
        return data.size == length
    if data.compression == compression.HOLE:
        return data.size == 4
    return 4 < data.size <= length + 4


@dataclass(frozen=True)
class Reply:
    """A reply of the secondary. error is an errno of this host, 0 for success."""

    seq: int
    received: bool = False
    error: int = 0
    data: DataInfo = DataInfo()

    def to_nv(self) -> Nv:
        nv = Nv()
        nv.add_uint64("seq", self.seq)
        if self.received:
            nv.add_int8("received", 1)
        if self.error:
            nv.add_int16("error", errnos.to_wire(self.error))
        self.data.add_to(nv)
        return nv

    @classmethod
    def from_nv(cls, nv: Nv) -> Reply:
        """Raises DataError when seq is missing or 0, or an element is not what it must be."""
        seq = nv.get_uint64("seq")
        if seq == 0:
            raise DataError("reply with seq 0")
        received = nv.get_int8("received", 0) != 0
        return cls(seq, received, errnos.from_wire(nv.get_int16("error", 0)), DataInfo.from_nv(nv))


# The handshake, section 3.


@dataclass(frozen=True)
class Handshake1Request:
    """Step 1, primary to secondary: version is the highest that the primary speaks."""

    resource: str
    version: int = PROTOCOL_VERSION

    def to_nv(self) -> Nv:
        nv = Nv()
        nv.add_string("resource", self.resource)
        nv.add_uint8("version", self.version)
        return nv

    @classmethod
    def from_nv(cls, nv: Nv) -> Handshake1Request:
        version = nv.get_uint8("version", FIRST_VERSION)
        if version < FIRST_VERSION:
            raise DataError("handshake with protocol version 0")
        return cls(nv.get_string("resource"), version)


@dataclass(frozen=True)
class Handshake1Reply:
    """Step 1, secondary to primary: the version in force, and the token that step 2 must show."""

    version: int
    token: bytes

    def to_nv(self) -> Nv:
        nv = Nv()
        nv.add_uint8("version", self.version)
        nv.add_uint8_array("token", self.token)
        return nv

    @classmethod
    def from_nv(cls, nv: Nv) -> Handshake1Reply:
        version = nv.get_uint8("version", FIRST_VERSION)
        if not FIRST_VERSION <= version <= PROTOCOL_VERSION:
            known = f"{FIRST_VERSION} to {PROTOCOL_VERSION}"
            raise DataError(f"peer chose protocol version {version}, {known} are known")
        return cls(version, handshake_token(nv))


@dataclass(frozen=True)
class Handshake2Request:
    """Step 2, primary to secondary on the second connection: token, resuid and the primary's pair.

    hast: the primary is one of ours, and knows what docs/protocol.md calls extensions. keepmap: it cannot store the
    secondary's map, which therefore has to keep it. outdated: its component is out of date. bond: of its component."""

    resource: str
    token: bytes
    resuid: int
    localcnt: int
    remotecnt: int
    virgin: bool = False
    hast: bool = False
    keepmap: bool = False
    outdated: bool = False
    bond: int = 0

    def to_nv(self) -> Nv:
        nv = Nv()
        nv.add_string("resource", self.resource)
        nv.add_uint8_array("token", self.token)
        if self.virgin:
            nv.add_int8("virgin", 1)
        nv.add_uint64("resuid", self.resuid)
        nv.add_uint64("localcnt", self.localcnt)
        nv.add_uint64("remotecnt", self.remotecnt)
        if self.hast:
            nv.add_uint8("hast", 1)
        if self.keepmap:
            nv.add_uint8("keepmap", 1)
        if self.outdated:
            nv.add_uint8("outdated", 1)
        if self.bond:
            nv.add_uint64("bond", self.bond)
        return nv

    @classmethod
    def from_nv(cls, nv: Nv) -> Handshake2Request:
        resuid = nv.get_uint64("resuid")
        if resuid == 0:
            raise DataError("handshake with resource unique ID 0")
        return cls(
            resource=nv.get_string("resource"),
            token=handshake_token(nv),
            resuid=resuid,
            localcnt=nv.get_uint64("localcnt"),
            remotecnt=nv.get_uint64("remotecnt"),
            virgin=nv.get_int8("virgin", 0) != 0,
            hast=nv.get_uint8("hast", 0) != 0,
            keepmap=nv.get_uint8("keepmap", 0) != 0,
            outdated=nv.get_uint8("outdated", 0) != 0,
            bond=nv.get_uint64("bond", 0),
        )


@dataclass(frozen=True)
class PeerSizes:
    """What every reply to step 2 begins with: sizes in bytes, and the secondary's own pair."""

    datasize: int
    extentsize: int
    localcnt: int
    remotecnt: int

    def add_to(self, nv: Nv) -> None:
        nv.add_int64("datasize", self.datasize)
        nv.add_int32("extentsize", self.extentsize)
        nv.add_uint64("localcnt", self.localcnt)
        nv.add_uint64("remotecnt", self.remotecnt)

    @classmethod
    def from_nv(cls, nv: Nv) -> PeerSizes:
        datasize, extentsize = nv.get_int64("datasize"), nv.get_int32("extentsize")
        if datasize <= 0 or extentsize <= 0:
            raise DataError(f"peer has a data size of {datasize} and an extent size of {extentsize} bytes")
        return cls(datasize, extentsize, nv.get_uint64("localcnt"), nv.get_uint64("remotecnt"))


@dataclass(frozen=True)
class Handshake2Reply:
    """Step 2, secondary to primary on the first connection. mapsize bytes of activemap follow, as data.

    hast: the secondary is one of ours; said to a primary that is one as well. bond: what both components have in common
    from now on."""

    sizes: PeerSizes
    syncsrc: SyncSource
    virgin: bool = False
    mapsize: int = 0
    data: DataInfo = DataInfo()
    hast: bool = False
    bond: int = 0

    def to_nv(self) -> Nv:
        nv = Nv()
        self.sizes.add_to(nv)
        if self.virgin:
            nv.add_int8("virgin", 1)
        nv.add_uint8("syncsrc", self.syncsrc)
        nv.add_uint32("mapsize", self.mapsize)
        if self.hast:
            nv.add_uint8("hast", 1)
            if self.bond:
                nv.add_uint64("bond", self.bond)
        self.data.add_to(nv)
        return nv

    @classmethod
    def from_nv(cls, nv: Nv) -> Handshake2Reply:
        source, mapsize, data = nv.get_uint8("syncsrc"), nv.get_uint32("mapsize", 0), DataInfo.from_nv(nv)
        if source not in (SyncSource.PRIMARY, SyncSource.SECONDARY):
            raise DataError(f"peer names {source} as synchronisation source, 1 and 2 are known")
        if (mapsize == 0) != (data.size == 0) or (mapsize and not data_size_fits(data, mapsize)):
            raise DataError(f"peer sends {data.size} bytes for an activemap of {mapsize} bytes")
        virgin, hast = nv.get_int8("virgin", 0) != 0, nv.get_uint8("hast", 0) != 0
        bond = nv.get_uint64("bond", 0)
        return cls(PeerSizes.from_nv(nv), SyncSource(source), virgin, mapsize, data, hast, bond)


@dataclass(frozen=True)
class Refusal:
    """A refusal of either step. wait: the peer may become secondary soon. sizes: in step 2, if at all."""

    errmsg: str
    wait: bool = False
    sizes: PeerSizes | None = None

    def to_nv(self) -> Nv:
        nv = Nv()
        if self.sizes is not None:
            self.sizes.add_to(nv)
        nv.add_string("errmsg", self.errmsg)
        if self.wait:
            nv.add_uint8("wait", 1)
        return nv

    @classmethod
    def from_nv(cls, nv: Nv) -> Refusal:
        sizes = PeerSizes.from_nv(nv) if "datasize" in nv else None
        return cls(nv.get_string("errmsg"), nv.get_uint8("wait", 0) != 0, sizes)


def parse_handshake1_reply(nv: Nv) -> Handshake1Reply | Refusal:
    """What the secondary answered to step 1. Raises DataError when it is neither."""
    return Refusal.from_nv(nv) if "errmsg" in nv else Handshake1Reply.from_nv(nv)


def parse_handshake2_reply(nv: Nv) -> Handshake2Reply | Refusal:
    """What the secondary answered to step 2. Raises DataError when it is neither."""
    return Refusal.from_nv(nv) if "errmsg" in nv else Handshake2Reply.from_nv(nv)


def negotiate(theirs: int) -> int:
    """The version in force between us and a primary whose highest is theirs (1 or more)."""
    return min(theirs, PROTOCOL_VERSION)


def handshake_token(nv: Nv) -> bytes:
    """The element `token`. Raises DataError."""
    token = nv.get_uint8_array("token")
    if len(token) != TOKEN_SIZE:
        raise DataError(f"handshake token of {len(token)} bytes, {TOKEN_SIZE} are needed")
    return token
