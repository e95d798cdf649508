"""Checksums of message data (docs/protocol.md section 2): over the bytes as sent, after compression.

Invariant: a hash that does not fit its algorithm in length is refused before anything is compared.
"""

from __future__ import annotations

import hashlib
import zlib

from hast.errors import DataError

NONE = "none"
CRC32 = "crc32"
SHA256 = "sha256"
HASH_SIZES = {CRC32: 4, SHA256: 32}


def digest(algorithm: str, data: bytes) -> bytes:
    """The hash of data: 4 little-endian bytes (crc32, IEEE as zlib computes it) or 32 bytes (sha256).

    Raises DataError for an algorithm that is not known.
    """
    if algorithm == CRC32:
        return zlib.crc32(data).to_bytes(4, "little")
    if algorithm == SHA256:
        return hashlib.sha256(data).digest()
    raise DataError(f"unknown checksum algorithm {algorithm!r}, crc32 and sha256 are known")


def verify(algorithm: str, data: bytes, expected: bytes) -> None:
    """Raises DataError unless expected is the hash of data."""
    if digest(algorithm, data) != expected:
        raise DataError(f"{algorithm} checksum mismatch: {len(data)} bytes of data were damaged on their way")
