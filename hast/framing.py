"""What is around every message (docs/protocol.md section 2): version and size in five bytes, then the nv, then data.

hastctl needs no more of the peer protocol than this, and failover waits for its start.

Invariant: a size from a main header is checked against a limit before anybody may allocate by it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from hast.errors import DataError, ProtocolError
from hast.nv import Nv, decode

PROTOCOL_VERSION = 2  # the highest that we speak
MAIN_HEADER = struct.Struct("<BI")
REQUEST_LIMIT = 64 * 1024  # largest nv of a request or reply, bytes
HANDSHAKE_LIMIT = 1024 * 1024  # largest nv of a handshake or control message, bytes


@dataclass(frozen=True)
class MainHeader:
    """The five bytes before the nv: protocol version, and size of the nv in bytes."""

    version: int
    size: int

    def pack(self) -> bytes:
        return MAIN_HEADER.pack(self.version, self.size)


def parse_main_header(data: bytes, limit: int, highest: int = PROTOCOL_VERSION) -> MainHeader:
    """The main header that is the first five bytes of data.

    Raises ProtocolError when its version is above highest, DataError when its size is above limit.
    """
    if len(data) < MAIN_HEADER.size:
        raise DataError(f"message ends after {len(data)} bytes, in its main header")
    version, size = MAIN_HEADER.unpack_from(data)
    if version > highest:
        raise ProtocolError(f"message of protocol version {version}, the highest known here is {highest}")
    if size > limit:
        raise DataError(f"message with a header of {size} bytes, {limit} are allowed")
    return MainHeader(version, size)


def pack_message(version: int, nv: Nv, data: bytes = b"", limit: int = HANDSHAKE_LIMIT) -> bytes:
    """A whole message. data is what goes on the wire; its length must stand in nv as `size` already."""
    header = nv.encode(limit)
    return MainHeader(version, len(header)).pack() + header + data


def unpack_message(
    message: bytes, limit: int, highest: int = PROTOCOL_VERSION
) -> tuple[MainHeader, Nv, bytes]:
    """Take a whole message apart: main header, nv, and the bytes behind it. Raises as its parts do."""
    main = parse_main_header(message, limit, highest)
    end = MAIN_HEADER.size + main.size
    if len(message) < end:
        raise DataError(f"message ends after {len(message)} of {end} bytes, in its header")
    return main, decode(message[MAIN_HEADER.size : end]), message[end:]
