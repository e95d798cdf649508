"""Compression and checksums of data in C: the very bytes and the very judgement of hast/messages.py, hashlib and zlib.

As in test_wire_c.py, input ends at an unreadable page and output has guard bytes on both sides. All is done twice:
with the instructions that this processor has for it, and without.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hast.errors import DataError
from hast.ffi._hast import ffi, lib
from hast.messages import DataInfo, data_size_fits, decode_payload, encode_payload
from tests.unit.test_wire_c import CHECKSUMS, COMPRESSIONS, GUARDED, c_data, output, py_data

FAST = pytest.mark.parametrize("fast", [0, 1], ids=["portable", "fast"])
COMPRESSION = pytest.mark.parametrize("compression", COMPRESSIONS)
CHECKSUM = pytest.mark.parametrize("checksum", CHECKSUMS)
EBADMSG = 74

LENGTHS = [*range(140), 191, 192, 255, 256, 1023, 1024, 4096, 100_001]


def pattern(length: int) -> bytes:
    """Bytes that no hash may take for others."""
    return hashlib.shake_128(length.to_bytes(4, "little")).digest(length)


@FAST
def test_crc32_is_zlibs(fast: int) -> None:
    crc = ffi.new("struct hast_crc32 *")
    lib.hast_crc32_init(crc, fast)
    for length in LENGTHS:
        data = pattern(length)
        assert lib.hast_crc32(crc, GUARDED.put(data), length) == zlib.crc32(data), length
    for length in (64, 1000):
        assert lib.hast_crc32(crc, bytes(length), length) == zlib.crc32(bytes(length))


@FAST
def test_sha256_is_hashlibs(fast: int) -> None:
    fast = fast and lib.hast_sha256_fast()
    for length in LENGTHS:
        data = pattern(length)
        with output(32) as hash_:
            lib.hast_sha256(fast, GUARDED.put(data), length, hash_)
            assert bytes(ffi.buffer(hash_, 32)) == hashlib.sha256(data).digest(), length


@FAST
@settings(max_examples=200)
@given(st.binary(max_size=400), st.integers(0, 15))
def test_hashes_of_anything_at_any_place(fast: int, data: bytes, shift: int) -> None:
    crc, buffer = ffi.new("struct hast_crc32 *"), ffi.new("uint8_t[]", bytes(shift) + data)
    lib.hast_crc32_init(crc, fast)
    hash_ = ffi.new("uint8_t[32]")
    lib.hast_sha256(fast and lib.hast_sha256_fast(), buffer + shift, len(data), hash_)
    assert lib.hast_crc32(crc, buffer + shift, len(data)) == zlib.crc32(data)
    assert bytes(hash_) == hashlib.sha256(data).digest()


# ---- transformations ----


def new(compression: str = "none", checksum: str = "none", fast: int = 1) -> Any:
    made = lib.hast_transform_new(COMPRESSIONS.index(compression), CHECKSUMS.index(checksum), fast)
    assert made != ffi.NULL
    return ffi.gc(made, lib.hast_transform_free)


def pack(transform: Any, data: bytes, zero: bool = False) -> tuple[bytes, DataInfo]:
    info = ffi.new("struct hast_wire_data *", {"size": 99, "compression": 9, "checksum": 9, "hash": b"\x11" * 32})
    with output(max(len(data), 4)) as scratch:
        wire = lib.hast_transform_pack(transform, GUARDED.put(data), len(data), zero, scratch, info)
        return bytes(ffi.buffer(wire, info.size)), py_data(info)


def unpack(transform: Any, wire: bytes, info: DataInfo, length: int) -> bytes | None:
    with output(length) as out:
        c = ffi.new("struct hast_wire_data *", c_data(info))
        error = lib.hast_transform_unpack(transform, c, GUARDED.put(wire), out, length)
        assert error in (0, EBADMSG)
        return bytes(ffi.buffer(out, length)) if error == 0 else None


def blocks() -> list[bytes]:
    """What writes look like: noise, zeros, text; around the sizes from which lzf is tried and used."""
    sizes = (512, 1024, 1025, 1028, 1029, 1536, 2048, 4096, 16384, 131072)
    text = (b"the quick brown fox jumps over the lazy dog %d\n" * 4000)[:131072]
    made = [kind[:size] for size in sizes for kind in (bytes(131072), text, pattern(131072))]
    # Just as many bytes saved as are needed, one more, one less.
    made += [pattern(3072 - zeros) + bytes(zeros) for zeros in range(1030, 1090)]
    return [*made, bytes(4095) + b"\1", b"\1" + bytes(4095)]


@FAST
@COMPRESSION
@CHECKSUM
def test_packed_as_python_does(fast: int, compression: str, checksum: str) -> None:
    transform = new(compression, checksum, fast)
    for data in blocks():
        wire, info = pack(transform, data)
        assert (wire, info) == encode_payload(data, compression, checksum)
        assert unpack(transform, wire, info, len(data)) == data
        if not any(data):
            assert pack(transform, data, zero=True) == (wire, info)


def test_lzf_is_used_from_the_byte_on_where_it_saves_enough() -> None:
    used = [pack(new("lzf"), pattern(3072 - zeros) + bytes(zeros))[1].compression for zeros in range(1030, 1500)]
    assert used[0] == "none" and used[-1] == "lzf" and used == sorted(used, reverse=True)


def test_a_known_hole_is_not_looked_at() -> None:
    assert pack(new("hole"), b"\1" * 512, zero=True) == encode_payload(bytes(512), "hole", "none")


@FAST
@COMPRESSION
@CHECKSUM
def test_damage_is_found(fast: int, compression: str, checksum: str) -> None:
    """One bit of what travels is turned: refused with a checksum; without one never out of bounds."""
    sender, receiver = new(compression, checksum, fast), new(fast=fast)
    for data in (bytes(4096), b"abcdefgh" * 512, pattern(4096)):
        wire, info = pack(sender, data)
        for at in {0, 1, 3, 4, len(wire) // 2, len(wire) - 1} & set(range(len(wire))):
            bad = bytearray(wire)
            bad[at] ^= 0x10
            got = unpack(receiver, bytes(bad), info, len(data))
            assert checksum == "none" or got is None
        if checksum != "none":
            wrong = DataInfo(info.size, info.compression, checksum, bytes([info.hash[0] ^ 1]) + info.hash[1:])
            assert unpack(receiver, wire, wrong, len(data)) is None


INFOS = st.builds(
    lambda compression, checksum: (compression, checksum), st.sampled_from(COMPRESSIONS), st.sampled_from(CHECKSUMS)
)


@settings(max_examples=500)
@given(st.binary(min_size=1, max_size=600), INFOS, st.integers(1, 700), st.booleans())
@example(b"\x00\x02\x00\x00", ("hole", "none"), 512, True)
@example(b"\x00\x02\x00\x00" + b"\x00a" + b"\xe0\xff\x00", ("lzf", "none"), 512, True)
def test_garbage_is_judged_as_python_does(wire: bytes, how: tuple[str, str], length: int, right: bool) -> None:
    compression, checksum = how
    hash_ = b""
    if checksum != "none":
        hash_ = zlib.crc32(wire).to_bytes(4, "little") if checksum == "crc32" else hashlib.sha256(wire).digest()
        hash_ = hash_ if right else bytes(len(hash_))
    info = DataInfo(len(wire), compression, checksum, hash_)
    c = ffi.new("struct hast_wire_data *", c_data(info))
    assert lib.hast_transform_fits(c, length) == int(data_size_fits(info, length))
    if not data_size_fits(info, length):
        return
    try:
        expected: bytes | None = decode_payload(wire, info, length)
    except DataError:
        expected = None
    assert unpack(new(), wire, info, length) == expected


def test_an_lzf_bomb_writes_nothing_outside() -> None:
    """A block that stands for far more than it announces, and one that announces far more than there is room for."""
    bomb = b"\x01ab" + b"\xe0\xff\x01" * 3000
    for announced in (512, 4096, 2**32 - 1):
        wire = announced.to_bytes(4, "little") + bomb
        assert unpack(new(), wire, DataInfo(len(wire), "lzf"), 512) is None


def test_a_hole_can_be_verified_without_being_written() -> None:
    transform = new("hole", "crc32")
    wire, info = pack(transform, bytes(1 << 17))
    c = ffi.new("struct hast_wire_data *", c_data(info))
    assert lib.hast_transform_unpack(transform, c, GUARDED.put(wire), ffi.NULL, 1 << 17) == 0
    assert lib.hast_transform_unpack(transform, c, GUARDED.put(wire), ffi.NULL, 1 << 16) == EBADMSG


def test_data_in_place_is_left_there() -> None:
    transform = new("none", "sha256")
    wire, info = pack(transform, pattern(4096))
    buffer, c = ffi.new("uint8_t[]", wire), ffi.new("struct hast_wire_data *", c_data(info))
    assert lib.hast_transform_unpack(transform, c, buffer, buffer, 4096) == 0
    assert bytes(buffer)[:4096] == wire


def test_algorithms_that_do_not_exist() -> None:
    assert lib.hast_transform_new(3, 0, 1) == ffi.NULL and ffi.errno == 22
    assert lib.hast_transform_new(0, 3, 1) == ffi.NULL and ffi.errno == 22
