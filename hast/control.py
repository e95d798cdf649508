"""Messages between hastctl and hastd (docs/protocol.md section 7).

Invariants:
- Requests and replies that FreeBSD's hastctl knows keep its names, types and order of elements.
- Commands of our own have numbers from FIRST_OWN_CMD on, so that none of FreeBSD's can ever mean one.
- from_nv() raises DataError for what cannot be understood; a command that is not known passes, so that
  the daemon can answer ERROR_UNIMPLEMENTED.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum

from hast.errors import DataError
from hast.nv import Nv

VERSION = 2  # of the main header of control messages
ALL = "all"  # resource0 of a request for every resource

CMD_SET_ROLE = 1
CMD_STATUS = 2
FIRST_OWN_CMD = 64
CMD_STOP = 64  # end hastd; names no resource; the reply has no elements when it was accepted
CMD_DISCARD = 65  # give up a secondary's own changes at the next split-brain; the reply is that of CMD_SET_ROLE
CMD_RESTART = 66  # start hastd anew, resources go on; as CMD_STOP, and errmsg says why not

ERROR_NONE = 0
ERROR_NO_ENTRY = 1  # no such resource
ERROR_INVALID = 2
ERROR_NO_MEMORY = 3
ERROR_UNIMPLEMENTED = 4

ERROR_TEXTS = {
    ERROR_NO_ENTRY: "no such resource",
    ERROR_INVALID: "invalid request",
    ERROR_NO_MEMORY: "out of memory",
    ERROR_UNIMPLEMENTED: "command not implemented",
}


def error_text(error: int) -> str:
    """What people read for an error of a control reply."""
    return ERROR_TEXTS.get(error, f"unknown error {error}")


class Role(IntEnum):
    """A role, by its number in a request; its text in replies and metadata is `role.text`."""

    INIT = 1
    PRIMARY = 2
    SECONDARY = 3

    @property
    def text(self) -> str:
        return self.name.lower()

    @classmethod
    def from_text(cls, text: str) -> Role:
        """Raises DataError for anything but init, primary and secondary."""
        for role in cls:
            if role.text == text:
                return role
        raise DataError(f"unknown role {text!r}, init, primary and secondary are known")


@dataclass(frozen=True)
class ControlRequest:
    """A request: command, role and whether to force it (only for CMD_SET_ROLE), and names of resources or just ALL."""

    cmd: int
    resources: tuple[str, ...] = ()
    role: Role | None = None
    force: bool = False

    def to_nv(self) -> Nv:
        nv = Nv()
        nv.add_uint8("cmd", self.cmd)
        if self.role is not None:
            nv.add_uint8("role", self.role)
        if self.force:
            nv.add_int8("force", 1)
        for n, name in enumerate(self.resources):
            nv.add_string(f"resource{n}", name)
        return nv

    @classmethod
    def from_nv(cls, nv: Nv) -> ControlRequest:
        """Raises DataError when cmd, the role or the resources that a known command needs are missing."""
        cmd, role = nv.get_uint8("cmd"), None
        if cmd == CMD_SET_ROLE:
            number = nv.get_uint8("role")
            if number not in (Role.INIT, Role.PRIMARY, Role.SECONDARY):
                raise DataError(f"unknown role {number}")
            role = Role(number)
        resources = _resources(nv)
        if cmd in (CMD_SET_ROLE, CMD_STATUS, CMD_DISCARD) and not resources:
            raise DataError(f"control request {cmd} names no resource")
        return cls(cmd, resources, role, role is not None and nv.get_int8("force", 0) != 0)


@dataclass(frozen=True)
class RoleEntry:
    """One resource in the reply to a role request: its previous role, or an error and no role.

    error: ERROR_NO_ENTRY and so on, or a sysexits code when the role could not be taken; errmsg, which
    FreeBSD's hastctl ignores, says why in one line.
    """

    resource: str
    error: int = ERROR_NONE
    role: str = ""
    errmsg: str = ""

    def add_to(self, nv: Nv, n: int) -> None:
        nv.add_string(f"resource{n}", self.resource)
        if self.error != ERROR_NONE:
            nv.add_int16(f"error{n}", self.error)
            if self.errmsg:
                nv.add_string(f"errmsg{n}", self.errmsg)
        elif self.role:
            nv.add_string(f"role{n}", self.role)

    @classmethod
    def from_nv(cls, nv: Nv, n: int) -> RoleEntry:
        error = nv.get_int16(f"error{n}", ERROR_NONE)
        role = "" if error else nv.get_string(f"role{n}", "")
        errmsg = nv.get_string(f"errmsg{n}", "") if error else ""
        return cls(nv.get_string(f"resource{n}"), error, role, errmsg)


@dataclass(frozen=True)
class StatusEntry:
    """One resource in the reply to a status request; the fields stand in the order of the wire.

    None means that the element is not there: all but `resource` when there is an error, everything from
    `status` on when no worker runs. dirty and extentsize in bytes, keepdirty in extents, stat_* count
    requests since the worker began, *_queue_size count requests in that stage now. FreeBSD's hastctl ignores the rest:
    syncing is 1 when the component is the target of a synchronisation that is not complete, errmsg says in one line why
    a worker that should run has nothing to say, or why none could.
    """

    resource: str
    error: int = ERROR_NONE
    provname: str | None = None
    localpath: str | None = None
    remoteaddr: str | None = None
    sourceaddr: str | None = None
    replication: str | None = None
    checksum: str | None = None
    compression: str | None = None
    role: str | None = None
    workerpid: int | None = None
    status: str | None = None
    dirty: int | None = None
    extentsize: int | None = None
    keepdirty: int | None = None
    stat_read: int | None = None
    stat_write: int | None = None
    stat_delete: int | None = None
    stat_flush: int | None = None
    stat_activemap_update: int | None = None
    stat_read_error: int | None = None
    stat_write_error: int | None = None
    stat_delete_error: int | None = None
    stat_flush_error: int | None = None
    idle_queue_size: int | None = None
    local_queue_size: int | None = None
    send_queue_size: int | None = None
    recv_queue_size: int | None = None
    done_queue_size: int | None = None
    syncing: int | None = None
    errmsg: str | None = None

    def add_to(self, nv: Nv, n: int) -> None:
        nv.add_string(f"resource{n}", self.resource)
        if self.error != ERROR_NONE:
            nv.add_int16(f"error{n}", self.error)
            return
        for name in STATUS_ELEMENTS:
            value = getattr(self, name)
            if isinstance(value, str):
                nv.add_string(f"{name}{n}", value)
            elif value is not None:
                _STATUS_WRITERS.get(name, Nv.add_uint64)(nv, f"{name}{n}", value)
        if self.errmsg is not None:
            nv.add_string(f"errmsg{n}", self.errmsg)

    @classmethod
    def from_nv(cls, nv: Nv, n: int) -> StatusEntry:
        resource, error = nv.get_string(f"resource{n}"), nv.get_int16(f"error{n}", ERROR_NONE)
        if error != ERROR_NONE:
            return cls(resource, error)
        values: dict[str, str | int] = {}
        for name in STATUS_ELEMENTS:
            if f"{name}{n}" in nv:
                values[name] = _STATUS_READERS.get(name, Nv.get_uint64)(nv, f"{name}{n}")
        if f"errmsg{n}" in nv:
            values["errmsg"] = nv.get_string(f"errmsg{n}")
        return cls(resource, error, **values)  # type: ignore[arg-type]


# Not resource and error, which come first, and not errmsg, which comes last. `syncing` is ours.
STATUS_ELEMENTS = tuple(field.name for field in fields(StatusEntry))[2:-1]
_STATUS_STRINGS = (
    "provname", "localpath", "remoteaddr", "sourceaddr", "replication", "checksum", "compression", "role",
    "status",
)  # fmt: skip
# What is neither a string nor named here is a uint64.
_STATUS_WRITERS: dict[str, Callable[[Nv, str, int], None]] = {
    "workerpid": Nv.add_int32,
    "extentsize": Nv.add_uint32,
    "keepdirty": Nv.add_uint32,
    "syncing": Nv.add_uint8,
}
_STATUS_READERS: dict[str, Callable[[Nv, str], str | int]] = {
    "workerpid": Nv.get_int32,
    "extentsize": Nv.get_uint32,
    "keepdirty": Nv.get_uint32,
    "syncing": Nv.get_uint8,
    **dict.fromkeys(_STATUS_STRINGS, Nv.get_string),
}


@dataclass(frozen=True)
class RoleReply:
    """Reply to CMD_SET_ROLE and CMD_DISCARD: an error for the whole, else an entry for each resource."""

    entries: tuple[RoleEntry, ...] = ()
    error: int = ERROR_NONE

    def to_nv(self) -> Nv:
        return _reply(self.error, self.entries)

    @classmethod
    def from_nv(cls, nv: Nv) -> RoleReply:
        entries = (RoleEntry.from_nv(nv, n) for n in range(_count(nv)))
        return cls(tuple(entries), nv.get_int16("error", ERROR_NONE))


@dataclass(frozen=True)
class StatusReply:
    """Reply to CMD_STATUS: an error for the whole, else an entry for each resource."""

    entries: tuple[StatusEntry, ...] = ()
    error: int = ERROR_NONE

    def to_nv(self) -> Nv:
        return _reply(self.error, self.entries)

    @classmethod
    def from_nv(cls, nv: Nv) -> StatusReply:
        entries = (StatusEntry.from_nv(nv, n) for n in range(_count(nv)))
        return cls(tuple(entries), nv.get_int16("error", ERROR_NONE))


def error_reply(error: int, errmsg: str = "") -> Nv:
    """The reply to a request that failed as a whole; with ERROR_NONE, the empty reply to CMD_STOP."""
    nv = _reply(error, ())
    if errmsg:
        nv.add_string("errmsg", errmsg)
    return nv


def _reply(error: int, entries: Sequence[RoleEntry | StatusEntry]) -> Nv:
    nv = Nv()
    if error != ERROR_NONE:
        nv.add_int16("error", error)
    for n, entry in enumerate(entries):
        entry.add_to(nv, n)
    return nv


def _count(nv: Nv) -> int:
    """The number of resources named one after the other from resource0 on."""
    n = 0
    while f"resource{n}" in nv:
        n += 1
    return n


def _resources(nv: Nv) -> tuple[str, ...]:
    return tuple(nv.get_string(f"resource{n}") for n in range(_count(nv)))
