"""The handshake of two nodes, with the production code of both sides and the bytes between them.

It is a function of what the nodes have on disk, so results are remembered: the same counters and maps meet again and
again. What may happen between its steps is up to the workers (primary.py, secondary.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any
from zlib import crc32

from hast.control import Role
from hast.errors import DataError
from hast.handshake import (
    Agreement,
    MismatchError,
    PrimaryHandshake,
    RefusedError,
    accept_first,
    answer_second,
    check_token,
    read_hello,
    refuse,
)
from hast.messages import (
    HANDSHAKE_LIMIT,
    Handshake1Request,
    Handshake2Request,
    unpack_message,
)
from hast.metadata import Metadata

TOKEN = b"0123456789abcdef"


@dataclass(frozen=True)
class Shaken:
    """What comes out on both sides: of the secondary, outcome by name, whether it is the target of a synchronisation,
    whether it throws its own changes away, what it stores (map: None for nothing); of the primary, the agreement,
    or why there is none."""

    outcome: str
    target: bool
    discards: bool
    metadata: Metadata
    map: int | None
    agreement: Agreement | None
    refusal: str


def _nv(message: bytes) -> Any:
    _, nv, data = unpack_message(message, HANDSHAKE_LIMIT)
    return nv, data


@lru_cache(maxsize=100000)
def shake(
    primary: Metadata, version: int, virgin: bool, keepmap: bool, secondary: Metadata, bits: int, doubt: bool
) -> Shaken:
    """Both steps. bits: the secondary's map on disk; doubt: it may have lost what it had acknowledged."""
    ours = PrimaryHandshake(primary, "secondary", version, virgin, keepmap)
    hello = read_hello(_nv(ours.first())[0])
    assert isinstance(hello, Handshake1Request) and refuse(Role.SECONDARY, True) is None
    in_force, reply = accept_first(hello, TOKEN)
    second = read_hello(_nv(ours.first_reply(_nv(reply)[0]))[0])
    assert isinstance(second, Handshake2Request) and check_token(second, TOKEN) is None
    mapsize = secondary.mapsize
    read_map = partial(bits.to_bytes, mapsize, "little")
    bond = crc32(repr((primary, secondary)).encode()) + 1  # no chance here: another one for others
    answer = answer_second(second, in_force, secondary, read_map, "hole", "crc32", doubt, bond)
    made = answer.decision
    keep = None if answer.map is None else int.from_bytes(answer.map, "little")
    agreement, why = None, ""
    try:
        nv, data = _nv(answer.message)
        assert ours.second_reply(nv) == len(data)
        agreement = ours.finish(data)
    except (RefusedError, MismatchError, DataError) as error:
        why = str(error)
    discards = secondary.discard and made.error is None and "thrown away" in (made.warning or "")
    target = made.target or (answer.accepted and answer.metadata.syncing and not secondary.syncing)
    return Shaken(made.outcome.name, target, discards, answer.metadata, keep, agreement, why)
