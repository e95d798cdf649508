"""Both sides of a handshake (hast/handshake.py) without a network, for its tests."""

from __future__ import annotations

from dataclasses import replace

from hast import checksum, compression
from hast.activemap import extent_count
from hast.handshake import Agreement, PrimaryHandshake, SecondaryAnswer, accept_first, answer_second, read_hello
from hast.messages import HANDSHAKE_LIMIT, Handshake1Request, Handshake2Request, unpack_message
from hast.metadata import Metadata
from hast.nv import Nv
from tests import vectors

PEER = "tcp4://192.0.2.7:8457"
TOKEN = bytes(range(16))
UID = 8812064633014397473
# The component of the captures: 64 MiB, extents of 2 MiB.
CAPTURED = Metadata("data", 67104256, 2 << 20, 64, 4608, resuid=UID)
EXTENTS = extent_count(CAPTURED.datasize, CAPTURED.extentsize)


def nv_of(message: bytes) -> Nv:
    return unpack_message(message, HANDSHAKE_LIMIT)[1]


def version_of(message: bytes) -> int:
    return unpack_message(message, HANDSHAKE_LIMIT)[0].version


def element(name: str, vector: str) -> int | bytes | str:
    return next(value for found, _, value in vectors.load(vector).elements if found == name)


def primary(metadata: Metadata = CAPTURED, *, version: int = 2, virgin: bool = False) -> PrimaryHandshake:
    """A primary that has had the answer to step 1."""
    handshake = PrimaryHandshake(metadata, PEER, virgin=virgin)
    handshake.first_reply(nv_of(accept_first(Handshake1Request("data", version), TOKEN)[1]))
    return handshake


def second(metadata: Metadata = CAPTURED, virgin: bool = False) -> Handshake2Request:
    """What that primary sends in step 2."""
    handshake = PrimaryHandshake(metadata, PEER, virgin=virgin)
    message = handshake.first_reply(nv_of(accept_first(Handshake1Request("data", 2), TOKEN)[1]))
    request = read_hello(nv_of(message))
    assert isinstance(request, Handshake2Request)
    return request


def foreign(metadata: Metadata = CAPTURED, virgin: bool = False) -> Handshake2Request:
    """What FreeBSD's primary sends in step 2."""
    return replace(second(metadata, virgin), hast=False)


def answer(
    request: Handshake2Request,
    metadata: Metadata,
    bits: bytes | None = None,
    *,
    version: int = 2,
    packing: str = compression.HOLE,
    algorithm: str = checksum.NONE,
) -> SecondaryAnswer:
    own = bytes(metadata.mapsize) if bits is None else bits
    return answer_second(request, version, metadata, lambda: own, packing, algorithm)


def finish(handshake: PrimaryHandshake, message: bytes) -> Agreement:
    """The primary takes the whole answer to step 2."""
    _, nv, data = unpack_message(message, HANDSHAKE_LIMIT)
    assert handshake.second_reply(nv) == len(data)
    return handshake.finish(data)
