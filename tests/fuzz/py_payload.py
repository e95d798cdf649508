"""Data of messages: what was compressed and checked is undone, or refused, in Python as in C; data goes there and back.

Input: compression, checksum, length (2), hash (4 or 32, or computed when the top bit of the first byte is set), data.
"""

from __future__ import annotations

import zlib

from hast import checksum, compression
from hast.errors import DataError
from hast.ffi import _hast
from hast.messages import DataInfo, data_size_fits, decode_payload, encode_payload

ffi, lib = _hast.ffi, _hast.lib
TRANSFORM = {
    (packing, algorithm): lib.hast_transform_new(packing, algorithm, 1)
    for packing in range(3)
    for algorithm in range(3)
}
PACKING = (compression.NONE, compression.HOLE, compression.LZF)
CHECKSUM = (checksum.NONE, checksum.CRC32, checksum.SHA256)


def unpack_c(info: DataInfo, payload: bytes, length: int) -> bytes | None:
    c = ffi.new("struct hast_wire_data *")
    c.size, c.compression, c.checksum = info.size, PACKING.index(info.compression), CHECKSUM.index(info.checksum)
    ffi.buffer(c.hash)[: len(info.hash)] = info.hash
    assert bool(lib.hast_transform_fits(c, length)) == data_size_fits(info, length)
    if not data_size_fits(info, length):
        return None
    out = ffi.new("uint8_t[]", max(length, 1))
    if lib.hast_transform_unpack(TRANSFORM[0, 0], c, payload, out, length) != 0:
        return None
    return bytes(ffi.buffer(out)[:length])


def unpack(info: DataInfo, payload: bytes, length: int) -> None:
    theirs = unpack_c(info, payload, length)
    try:
        ours = decode_payload(payload, info, length)
    except DataError:
        assert theirs is None, "C takes what Python refuses"
        return
    assert len(ours) == length
    if data_size_fits(info, length):
        assert ours == theirs, "Python takes what C refuses, or they differ"


def pack(data: bytes) -> None:
    for packing in range(3):
        for algorithm in range(3):
            payload, info = encode_payload(data, PACKING[packing], CHECKSUM[algorithm])
            assert decode_payload(payload, info, len(data)) == data
            scratch, c = ffi.new("uint8_t[]", len(data) + 4), ffi.new("struct hast_wire_data *")
            wire = lib.hast_transform_pack(TRANSFORM[packing, algorithm], data, len(data), 0, scratch, c)
            assert bytes(ffi.buffer(wire, c.size)) == payload, "packed differently"
            assert bytes(c.hash)[: len(info.hash)] == info.hash
    assert zlib.crc32(data).to_bytes(4, "little") == checksum.digest(checksum.CRC32, data)


def check(data: bytes) -> None:
    if len(data) < 5:
        return
    packing, algorithm = PACKING[(data[0] & 0x3F) % 3], CHECKSUM[data[1] % 3]
    length, rest = int.from_bytes(data[2:4], "little"), data[4:]
    size = checksum.HASH_SIZES.get(algorithm, 0)
    hash_, payload = (b"", rest) if data[0] & 0x80 else (rest[:size].ljust(size, b"\0"), rest[size:])
    if data[0] & 0x40 and packing != compression.NONE:
        payload = length.to_bytes(4, "little") + payload
    if data[0] & 0x80 and algorithm != checksum.NONE:
        hash_ = checksum.digest(algorithm, payload)
    if not payload:
        return
    unpack(DataInfo(len(payload), packing, algorithm, hash_), payload, length)
    pack(payload)
