"""Compression of message data: `hole` and `lzf` (docs/protocol.md section 2).

Invariants:
- The decoders produce exactly the number of bytes that the caller expects, or raise DataError; they never
  allocate more than that because a peer said so.
- hast/ffi/lzf.c emits the very same bytes as lzf_compress(): this module is its reference.
"""

from __future__ import annotations

from hast.errors import DataError

NONE = "none"
HOLE = "hole"
LZF = "lzf"
NAMES = (NONE, HOLE, LZF)

LZF_MIN_SIZE = 1024  # data of this size or less is not worth compressing
LZF_MIN_SAVED = 1024  # what lzf must save, length field included, to be used

MAX_LITERALS = 32
MAX_OFFSET = 1 << 13
MAX_MATCH = 264
HASH_BITS = 13


def choose(data: bytes, setting: str) -> tuple[str, bytes]:
    """Compress data as the configured setting says: (name of the algorithm really used, bytes to send).

    `hole` is tried first under both settings; lzf only where the data is larger than LZF_MIN_SIZE and at
    least LZF_MIN_SAVED bytes are saved. Otherwise the data is sent as it is, as "none".
    """
    if setting not in NAMES:
        raise DataError(f"unknown compression {setting!r}, none, hole and lzf are known")
    if setting == NONE or not data:
        return NONE, data
    if is_zero(data):
        return HOLE, len(data).to_bytes(4, "little")
    if setting == LZF and len(data) > LZF_MIN_SIZE:
        packed = lzf_compress(data)
        if 4 + len(packed) + LZF_MIN_SAVED <= len(data):
            return LZF, len(data).to_bytes(4, "little") + packed
    return NONE, data


def undo(name: str, payload: bytes, length: int) -> bytes:
    """The data that payload stands for, exactly length bytes. Raises DataError when it is not that."""
    if name == NONE:
        if len(payload) != length:
            raise DataError(f"{len(payload)} bytes of data came, {length} were announced")
        return payload
    if name not in (HOLE, LZF):
        raise DataError(f"unknown compression {name!r}, hole and lzf are known")
    if len(payload) < 4 or (name == HOLE and len(payload) != 4):
        raise DataError(f"{name} compressed data of {len(payload)} bytes is not valid")
    original = int.from_bytes(payload[:4], "little")
    if original != length:
        raise DataError(f"{name} compressed data stands for {original} bytes, {length} were announced")
    if name == HOLE:
        return bytes(length)
    return lzf_decompress(payload[4:], length)


def is_zero(data: bytes) -> bool:
    """Whether data holds nothing but zero bytes (true for no data at all)."""
    return data.count(0) == len(data)


def lzf_decompress(stream: bytes, length: int) -> bytes:
    """Undo one raw liblzf block; the result has exactly length bytes. Raises DataError otherwise.

    A control byte below 32 is followed by that many and one literal bytes. Any other is a match: its top
    three bits are the match length minus 2 (7: the next byte is added to it), its low five bits and the
    next byte the distance minus 1.
    """
    out = bytearray()
    pos = 0
    while pos < len(stream):
        control = stream[pos]
        pos += 1
        if control < MAX_LITERALS:
            literals = stream[pos : pos + control + 1]
            if len(literals) != control + 1:
                raise DataError("lzf data ends in the middle of a literal run")
            pos += control + 1
            out += literals
        else:
            count = (control >> 5) + 2
            tail = 2 if count == 9 else 1
            if len(stream) - pos < tail:
                raise DataError("lzf data ends in the middle of a match")
            if count == 9:
                count += stream[pos]
            distance = ((control & 0x1F) << 8) + stream[pos + tail - 1] + 1
            pos += tail
            if distance > len(out):
                raise DataError("lzf data refers to bytes before its beginning")
            start = len(out) - distance
            # A match may overlap what it produces: then the distance is the period of the result.
            period = bytes(out[start : start + min(distance, count)])
            out += (period * (count // len(period) + 1))[:count]
        if len(out) > length:
            raise DataError(f"lzf data is longer than the {length} bytes that it announced")
    if len(out) != length:
        raise DataError(f"lzf data gives {len(out)} bytes of the {length} that it announced")
    return bytes(out)


def lzf_compress(data: bytes) -> bytes:
    """One raw liblzf block. It may be longer than data, by one byte in 32, when there is nothing to gain.

    Greedy: the last place where the same three bytes (by hash) began is the only candidate. As with
    liblzf, position 0 never is (0 marks an empty slot), and matches end two bytes before the end.
    """
    out = bytearray()
    table = [0] * (1 << HASH_BITS)
    last = len(data) - 2  # three bytes begin at each position before this one
    anchor = pos = 0  # literals wait from anchor on
    while pos < last:
        slot = _hash(data, pos)
        candidate, table[slot] = table[slot], pos
        if (
            candidate == 0
            or pos - candidate > MAX_OFFSET
            or last - pos < 3
            or data[candidate : candidate + 3] != data[pos : pos + 3]
        ):
            pos += 1
            continue
        count = 3
        most = min(MAX_MATCH, last - pos)
        while count < most and data[candidate + count] == data[pos + count]:
            count += 1
        _literals(out, data, anchor, pos)
        _match(out, pos - candidate - 1, count)
        pos += count
        # Only the end of a match is remembered: speed, and what liblzf does.
        for inside in (pos - 2, pos - 1):
            if inside < last:
                table[_hash(data, inside)] = inside
        anchor = pos
    _literals(out, data, anchor, len(data))
    return bytes(out)


def _hash(data: bytes, pos: int) -> int:
    key = data[pos] << 16 | data[pos + 1] << 8 | data[pos + 2]
    return (key * 2654435761 & 0xFFFFFFFF) >> (32 - HASH_BITS)


def _literals(out: bytearray, data: bytes, start: int, end: int) -> None:
    for at in range(start, end, MAX_LITERALS):
        run = data[at : min(at + MAX_LITERALS, end)]
        out.append(len(run) - 1)
        out += run


def _match(out: bytearray, distance: int, count: int) -> None:
    """distance is stored minus 1 already; count is the real number of bytes."""
    count -= 2
    if count < 7:
        out += bytes(((count << 5) | distance >> 8, distance & 0xFF))
    else:
        out += bytes((7 << 5 | distance >> 8, count - 7, distance & 0xFF))
