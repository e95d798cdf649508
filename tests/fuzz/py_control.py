"""Control requests and replies: refused with a DataError, or understood, and then written and read back the same."""

from __future__ import annotations

from typing import Any

from hast.control import ControlRequest, RoleReply, StatusReply
from hast.errors import DataError
from hast.nv import decode
from tests.fuzz.nvmutator import HEAD

KINDS: tuple[Any, ...] = (ControlRequest, RoleReply, StatusReply)


def check(data: bytes) -> None:
    try:
        nv = decode(data[HEAD:])
    except DataError:
        return
    for kind in KINDS:
        try:
            message = kind.from_nv(nv)
        except DataError:
            continue
        written = message.to_nv()
        again = kind.from_nv(decode(written.encode()))
        assert again.to_nv() == written, f"another {kind.__name__} comes back"
