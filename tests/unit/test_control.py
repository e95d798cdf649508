"""Control messages: requests, role and status replies, and that garbage raises DataError only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hast.control import (
    CMD_SET_ROLE,
    CMD_STATUS,
    CMD_STOP,
    ERROR_NO_ENTRY,
    ERROR_UNIMPLEMENTED,
    FIRST_OWN_CMD,
    STATUS_ELEMENTS,
    ControlRequest,
    Role,
    RoleEntry,
    RoleReply,
    StatusEntry,
    StatusReply,
    error_reply,
    error_text,
)
from hast.errors import DataError
from hast.nv import Nv, decode
from tests import vectors
from tests.unit.strategies import MESSAGE_NVS

NAMES = st.lists(st.text("abcdef/-._", min_size=1), min_size=1, max_size=12).map(tuple)


@given(NAMES, st.sampled_from(list(Role)), st.booleans())
def test_requests_round_trip(names: tuple[str, ...], role: Role, force: bool) -> None:
    for request in (ControlRequest(CMD_SET_ROLE, names, role, force), ControlRequest(CMD_STATUS, names)):
        assert ControlRequest.from_nv(decode(request.to_nv().encode())) == request


def test_stop_names_no_resource() -> None:
    assert CMD_STOP >= FIRST_OWN_CMD
    assert ControlRequest.from_nv(ControlRequest(CMD_STOP).to_nv()) == ControlRequest(CMD_STOP)


def test_unknown_commands_reach_the_daemon() -> None:
    assert ControlRequest.from_nv(ControlRequest(200, ("data",)).to_nv()).cmd == 200


def test_requests_that_cannot_be() -> None:
    with pytest.raises(DataError, match="names no resource"):
        ControlRequest.from_nv(ControlRequest(CMD_STATUS).to_nv())
    with pytest.raises(DataError, match="names no resource"):
        ControlRequest.from_nv(ControlRequest(CMD_SET_ROLE, (), Role.INIT).to_nv())
    with pytest.raises(DataError, match="'role'"):
        ControlRequest.from_nv(ControlRequest(CMD_SET_ROLE, ("data",)).to_nv())
    with pytest.raises(DataError, match="'cmd'"):
        ControlRequest.from_nv(Nv())
    for number in (0, 4, 255):
        nv = Nv()
        nv.add_uint8("cmd", CMD_SET_ROLE)
        nv.add_uint8("role", number)
        nv.add_string("resource0", "data")
        with pytest.raises(DataError, match=f"role {number}"):
            ControlRequest.from_nv(nv)


def test_roles_have_texts() -> None:
    assert [role.text for role in Role] == ["init", "primary", "secondary"]
    assert all(Role.from_text(role.text) is role for role in Role)
    with pytest.raises(DataError, match="'Primary'"):
        Role.from_text("Primary")


def test_role_reply_with_an_error_in_the_middle() -> None:
    reply = RoleReply(
        (RoleEntry("a", role="init"), RoleEntry("b", ERROR_NO_ENTRY), RoleEntry("c", role="primary"))
    )
    nv = decode(reply.to_nv().encode())
    assert [e.name for e in nv] == ["resource0", "role0", "resource1", "error1", "resource2", "role2"]
    assert RoleReply.from_nv(nv) == reply


@st.composite
def status_entries(draw: st.DrawFn) -> StatusEntry:
    full = StatusReply.from_nv(decode(vectors.load("ctl_status_reply").header)).entries[0]
    values: dict[str, str | int | None] = {}
    for name in STATUS_ELEMENTS:
        sample = getattr(full, name)
        number = st.integers(0, 255 if name == "syncing" else 2**31 - 1)
        some = st.text("abc:/", max_size=9) if isinstance(sample, str) else number
        values[name] = draw(st.none() | some)
    return StatusEntry("data", **values)  # type: ignore[arg-type]


@given(st.lists(status_entries(), max_size=4).map(tuple))
def test_status_round_trips_whatever_is_missing(entries: tuple[StatusEntry, ...]) -> None:
    reply = StatusReply(entries)
    assert StatusReply.from_nv(decode(reply.to_nv().encode())) == reply


def test_status_has_the_order_of_the_capture() -> None:
    captured = [name for name, _, _ in vectors.load("ctl_status_reply").elements]
    assert [*captured, "syncing0"] == ["resource0", *(f"{name}0" for name in STATUS_ELEMENTS)]  # ours stands last


def test_status_of_an_unknown_resource_says_nothing_else() -> None:
    entry = StatusEntry("nosuch", ERROR_NO_ENTRY, provname="x")
    nv = StatusReply((entry,)).to_nv()
    assert [e.name for e in nv] == ["resource0", "error0"]


def test_error_for_the_whole() -> None:
    nv = error_reply(ERROR_UNIMPLEMENTED)
    assert StatusReply.from_nv(nv) == StatusReply(error=ERROR_UNIMPLEMENTED)
    assert RoleReply.from_nv(nv) == RoleReply(error=ERROR_UNIMPLEMENTED)
    assert len(error_reply(0)) == 0
    assert error_text(ERROR_UNIMPLEMENTED) == "command not implemented"
    assert error_text(99) == "unknown error 99"


@given(MESSAGE_NVS)
def test_any_nv_gives_a_message_or_data_error(nv: Nv) -> None:
    for parse in (ControlRequest.from_nv, RoleReply.from_nv, StatusReply.from_nv):
        try:
            message = parse(nv)
        except DataError as error:
            assert "\n" not in str(error)
        else:
            assert parse(message.to_nv()) == message
