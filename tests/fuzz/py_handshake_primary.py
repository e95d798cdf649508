"""A primary's handshake with a peer that answers anything: it ends in an agreement that can be used, or in an error of
ours.

Input: which reply (0, 1: to step 1; 2 to 5: to step 2; 6, 7: to a notice), details of this node (3), the nv, the map.
"""

from __future__ import annotations

from dataclasses import replace

from hast.activemap import extent_count
from hast.errors import HastError
from hast.handshake import PrimaryHandshake
from hast.messages import Handshake1Reply, Handshake2Reply, Handshake2Request, unpack_message
from hast.metadata import Metadata, Pair
from hast.notice import parse_reply
from hast.nv import Nv, decode
from tests.fuzz.nvmutator import HEAD, build, parse

TOKEN = bytes(range(16))
EXTENT = 65536
METADATA = Metadata("data", 100 * EXTENT, EXTENT, 4, 4096 + 512, resuid=7)
EXTENTS = extent_count(METADATA.datasize, EXTENT)
PAIRS = (Pair(), Pair(1, 0), Pair(1, 1), Pair(2**64 - 1, 2**64 - 1))


def one_line(error: HastError) -> None:
    assert len(str(error).splitlines()) == 1 and str(error).isprintable(), f"not one printable line: {error!r}"


def agree(handshake: PrimaryHandshake, nv: Nv, payload: bytes) -> None:
    """Step 2's answer and its data."""
    size = handshake.second_reply(nv)
    mapsize = Handshake2Reply.from_nv(nv).mapsize
    assert size <= mapsize + 4 and mapsize <= 1 << 20, "too much would be read, or made of it"
    assert mapsize == 0 or 8 * mapsize >= EXTENTS, "too short a map is taken"
    agreement = handshake.finish(payload[:size])
    assert agreement.metadata.pack(), "it cannot be stored"
    if agreement.map is None:
        return
    assert len(agreement.map) == METADATA.mapsize, "a map of another size"
    number = int.from_bytes(agreement.map, "little")
    assert number < 1 << EXTENTS, "bits behind the last extent"


def take(which: int, handshake: PrimaryHandshake, nv: Nv, payload: bytes) -> None:
    if which < 2:
        message = handshake.first_reply(nv)
        _, asked, rest = unpack_message(message, 65536)
        assert not rest and Handshake2Request.from_nv(asked).resource == "data"
    elif which < 6:
        handshake.first_reply(Handshake1Reply(2, TOKEN).to_nv())
        agree(handshake, nv, payload)
    else:
        parse_reply(nv)


def check(data: bytes) -> None:
    head, body = data[:HEAD].ljust(HEAD, b"\0"), data[HEAD:]
    parts, rest = parse(body)
    metadata = replace(METADATA, pair=PAIRS[head[1] % 4])
    handshake = PrimaryHandshake(metadata, "10.0.0.2", virgin=bool(head[2] & 1))
    handshake.first()
    try:
        # Behind the nv stands a byte that ends it, then the data.
        take(head[0] % 8, handshake, decode(build(parts)), rest[1:])
    except HastError as error:
        one_line(error)
