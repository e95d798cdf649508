"""The NBD negotiation: the same result in whatever pieces the bytes come, and the transmission phase only when it was
agreed.

Input: flags (1: as they are, or as options), size of the pieces, the rest. As options: number, length, data, and so on.
"""

from __future__ import annotations

import struct

from hast.device.nbd import OPTION_MAGIC, NbdExport, NbdLimits, NbdNegotiation, State
from hast.errors import ProtocolError

EXPORT = NbdExport("data", 1 << 30, "a test")
LIMITS = NbdLimits(options=8, option_bytes=512)
Outcome = tuple[State | None, bool, bytes]  # None: it was refused


def options(data: bytes) -> bytes:
    """The client's flags, then options whose lengths are right."""
    out, pos = bytearray(struct.pack(">I", data[0] & 3 if data else 1)), 1
    while pos + 2 <= len(data):
        number, length = data[pos], data[pos + 1]
        piece = data[pos + 2 : pos + 2 + length]
        out += OPTION_MAGIC + struct.pack(">II", number if number < 128 else number << 24, len(piece)) + piece
        pos += 2 + length
    return bytes(out)


def converse(stream: bytes, piece: int) -> Outcome:
    """What comes of it when each feed() has `piece` bytes."""
    negotiation = NbdNegotiation(EXPORT, LIMITS)
    negotiation.greeting()
    replies: list[bytes] = []
    for at in range(0, len(stream), piece):
        if negotiation.state is State.DONE:
            return None, False, b""  # what is said before the last answer is there
        try:
            replies += negotiation.feed(stream[at : at + piece])
        except ProtocolError as error:
            assert str(error).isprintable()
            return None, False, b""
        assert len(negotiation._buffer) <= 16 + LIMITS.option_bytes + piece, "it keeps too much"
    result = negotiation.result
    assert (result is not None) == (negotiation.state is State.DONE)
    return negotiation.state, result is not None and result.structured, b"".join(replies)


def check(data: bytes) -> None:
    if len(data) < 3:
        return
    stream = data[2:] if data[0] & 1 else options(data[2:])
    whole = converse(stream, max(len(stream), 1))
    for piece in {1, data[1] % 64 + 1}:
        assert converse(stream, piece) == whole, f"another result in pieces of {piece}"
