"""A secondary's handshake with a peer that sends anything: main's part, the worker's part, and a primary that takes the
answer.

Input: details of this node (4), the nv of the first message of a connection.
"""

from __future__ import annotations

import json
from dataclasses import replace

from hast.control import Role
from hast.errors import DataError, HastError
from hast.handshake import (
    PrimaryHandshake,
    accept_first,
    answer_second,
    check_token,
    read_hello,
    refuse,
    request_from_dict,
    request_to_dict,
)
from hast.messages import Handshake1Request, Handshake2Request, Refusal, parse_handshake1_reply, unpack_message
from hast.metadata import Metadata, Pair, unpack
from hast.notice import Notice, heed
from hast.nv import decode
from tests.fuzz.nvmutator import HEAD

TOKEN = bytes(range(16))
METADATA = Metadata("data", 100 * 65536, 65536, 4, 4096 + 512)
PAIRS = (Pair(), Pair(1, 0), Pair(1, 1), Pair(2, 1), Pair(2**64 - 1, 2**64 - 1))
RESUIDS = (0, 1, 2**64 - 1)
PACKING = ("none", "hole", "lzf")
CHECKSUM = ("none", "crc32", "sha256")


def first(request: Handshake1Request) -> None:
    version, message = accept_first(request, TOKEN)
    assert version in (1, 2)
    _, nv, rest = unpack_message(message, 65536)
    assert not rest and parse_handshake1_reply(nv).token == TOKEN  # type: ignore[union-attr]


def second(request: Handshake2Request, head: bytes) -> None:
    refused = check_token(request, TOKEN)
    assert (refused is None) == (request.token == TOKEN)
    request = request_from_dict(json.loads(json.dumps(request_to_dict(request))))
    metadata = replace(
        METADATA, resuid=RESUIDS[head[0] % 3], pair=PAIRS[head[0] // 4 % 5], prevrole=Role.SECONDARY,
        syncing=bool(head[1] & 1), discard=bool(head[1] & 2),
        bond=7 * bool(head[1] & 4),
    )  # fmt: skip
    bits = bytes((head[2],)) * metadata.mapsize
    answer = answer_second(request, 2, metadata, lambda: bits, PACKING[head[3] % 3], CHECKSUM[head[3] // 4 % 3], bond=9)
    assert unpack(answer.metadata.pack(), "data") == answer.metadata, "what is stored cannot be read"
    assert answer.map is None or len(answer.map) == metadata.mapsize
    _, nv, payload = unpack_message(answer.message, 1 << 20)
    primary = PrimaryHandshake(METADATA, "10.0.0.1")
    try:
        size = primary.second_reply(nv)
        assert answer.accepted and size == len(payload)
        primary.finish(payload)
    except HastError:
        assert not answer.accepted, "our own primary does not take the answer"


def notice(word: Notice, head: bytes) -> None:
    heeded = heed(word, TOKEN if head[0] & 1 else word.token, replace(METADATA, pair=PAIRS[head[1] % 4]))
    assert unpack(heeded.metadata.pack(), "data") == heeded.metadata
    assert heeded.map is None or len(heeded.map) == METADATA.mapsize
    unpack_message(heeded.message, 65536)


def check(data: bytes) -> None:
    head = data[:HEAD].ljust(HEAD, b"\0")
    try:
        hello = read_hello(decode(data[HEAD:]))
    except DataError:
        return
    for role in (None, *Role):
        refusal = refuse(role, bool(head[0] & 1))
        assert refusal is None or Refusal.from_nv(refusal.to_nv()) == refusal
    if isinstance(hello, Handshake1Request):
        first(hello)
    elif isinstance(hello, Handshake2Request):
        second(hello, head)
    else:
        try:
            notice(hello, head)
        except DataError as error:
            assert str(error).isprintable()
