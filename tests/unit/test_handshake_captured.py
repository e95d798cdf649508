"""The handshake: captured messages in both directions, byte for byte."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hast.control import Role
from hast.decision import Outcome
from hast.handshake import (
    Agreement,
    PrimaryHandshake,
    RefusedError,
    accept_first,
    check_token,
    read_hello,
    refusal_message,
    refuse,
)
from hast.messages import SPLIT_BRAIN, Handshake1Request, Handshake2Request, Refusal, SyncSource, pack_message
from hast.metadata import Pair
from hast.nv import Nv
from tests import vectors
from tests.unit.handshakes import (
    CAPTURED,
    PEER,
    TOKEN,
    answer,
    element,
    finish,
    foreign,
    nv_of,
    primary,
    second,
    version_of,
)


def extended(message: bytes) -> bytes:
    """A captured message without data, with the element that we add to it: ours stands last."""
    nv = nv_of(message)
    nv.add_uint8("hast", 1)
    return pack_message(version_of(message), nv)


def without_token(agreement: Agreement) -> Agreement:
    assert agreement.token == TOKEN and not agreement.hast  # of a captured secondary
    return replace(agreement, token=b"")


def number(name: str, vector: str) -> int:
    value = element(name, vector)
    assert isinstance(value, int)
    return value


def test_captured_step_1_of_a_primary() -> None:
    vector = vectors.load("hs1_primary_to_secondary")
    assert PrimaryHandshake(CAPTURED, PEER).first() == vector.normal
    assert read_hello(nv_of(vector.raw)) == Handshake1Request("data", 2)


def test_a_primary_that_was_connected_sends_step_1_with_the_version_in_force() -> None:
    vector = vectors.load("hs1_primary_to_secondary")
    message = PrimaryHandshake(CAPTURED, PEER, version=2).first()
    assert message == b"\x02" + vector.normal[1:]


@pytest.mark.parametrize(
    ("name", "highest", "in_force"),
    [
        ("hs1_secondary_to_primary", 2, 2),
        ("hs1_reply_version_fallback", 9, 2),
        ("hs1_reply_no_version", None, 1),
    ],
)
def test_captured_answers_to_step_1(name: str, highest: int | None, in_force: int) -> None:
    vector = vectors.load(name)
    hello = Nv()
    hello.add_string("resource", "data")
    if highest is not None:
        hello.add_uint8("version", highest)
    request = read_hello(hello)
    assert isinstance(request, Handshake1Request)
    token = element("token", name)
    assert isinstance(token, bytes)
    assert accept_first(request, token) == (in_force, vector.normal)
    handshake = PrimaryHandshake(CAPTURED, PEER)
    message = handshake.first_reply(nv_of(vector.raw))
    assert handshake.version == version_of(message) == in_force
    sent = read_hello(nv_of(message))
    assert isinstance(sent, Handshake2Request) and sent.token == token


@pytest.mark.parametrize(
    ("name", "role", "allowed", "wait"),
    [
        ("hs1_error_role_init", Role.INIT, True, False),
        ("hs1_error_wrong_role_wait", Role.PRIMARY, True, True),
        ("hs1_error_unknown_resource", None, True, False),
        ("hs1_error_unknown_resource", None, False, False),
    ],
)
def test_captured_refusals_of_step_1(name: str, role: Role | None, allowed: bool, wait: bool) -> None:
    vector = vectors.load(name)
    refusal = refuse(role, allowed)
    assert refusal is not None
    assert refusal_message(refusal) == vector.normal
    with pytest.raises(RefusedError) as refused:
        PrimaryHandshake(CAPTURED, PEER).first_reply(nv_of(vector.raw))
    assert (refused.value.text, refused.value.wait) == (element("errmsg", name), wait)
    assert not refused.value.split_brain
    assert str(refused.value) == f"data: {PEER} refuses the connection: {element('errmsg', name)}"


@pytest.mark.parametrize("role", list(Role))
def test_a_resource_of_another_node_is_refused_whatever_the_role(role: Role) -> None:
    assert refuse(role, allowed=False) == Refusal("No access to the resource.")


def test_a_secondary_refuses_nobody_that_may_connect() -> None:
    assert refuse(Role.SECONDARY, allowed=True) is None


@pytest.mark.parametrize(
    ("name", "virgin", "pair"),
    [
        ("hs2_primary_to_secondary_virgin", True, Pair()),
        ("hs2_primary_to_secondary", False, Pair(1, 0)),
        ("hs2_primary_to_secondary_splitbrain", False, Pair(1, 0)),
    ],
)
def test_captured_step_2_of_a_primary(name: str, virgin: bool, pair: Pair) -> None:
    vector = vectors.load(name)
    metadata = replace(CAPTURED, resuid=number("resuid", name), pair=pair)
    token = element("token", name)
    assert isinstance(token, bytes)
    handshake = PrimaryHandshake(metadata, PEER, virgin=virgin)
    sent = handshake.first_reply(nv_of(accept_first(Handshake1Request("data"), token)[1]))
    assert sent == extended(vector.normal)  # FreeBSD ignores what it does not know
    request = read_hello(nv_of(vector.raw))
    assert request == Handshake2Request("data", token, metadata.resuid, *pair_of(pair), virgin)


def pair_of(pair: Pair) -> tuple[int, int]:
    return pair.localcnt, pair.remotecnt


def test_captured_answer_of_a_virgin_secondary() -> None:
    vector = vectors.load("hs2_secondary_to_primary_virgin")
    made = answer(foreign(virgin=True), replace(CAPTURED, resuid=0))
    assert made.message == vector.normal
    assert made.accepted and made.metadata == CAPTURED and made.map is None
    agreement = finish(primary(virgin=True), vector.raw)
    assert without_token(agreement) == Agreement(
        2, SyncSource.PRIMARY, Pair(), True, None, replace(CAPTURED, pair=Pair(1, 0))
    )


def test_captured_answer_with_an_empty_map() -> None:
    vector = vectors.load("hs2_secondary_to_primary_activemap")
    made = answer(foreign(replace(CAPTURED, pair=Pair(1, 0))), CAPTURED)
    assert made.message == vector.normal
    assert made.accepted and made.metadata == CAPTURED and made.map is None
    agreement = finish(primary(), vector.raw)
    assert without_token(agreement) == Agreement(2, SyncSource.PRIMARY, Pair(), False, bytes(512), CAPTURED)


def test_captured_answer_of_a_newer_secondary() -> None:
    vector = vectors.load("hs2_secondary_to_primary_activemap_syncsrc_secondary")
    made = answer(foreign(), replace(CAPTURED, pair=Pair(1, 0)), vector.data)
    assert made.decision.outcome is Outcome.SECONDARY_NEWER
    assert made.message == vector.normal
    agreement = finish(primary(), vector.raw)
    assert without_token(agreement) == Agreement(2, SyncSource.SECONDARY, Pair(1, 0), False, vector.data, CAPTURED)


def test_captured_split_brain() -> None:
    vector = vectors.load("hs2_error_splitbrain")
    own = replace(CAPTURED, pair=Pair(1, 0))
    made = answer(second(own), own)
    assert made.message == vector.normal
    assert not made.accepted and made.split_brain and made.metadata == own and made.map is None
    with pytest.raises(RefusedError) as refused:
        primary(own).second_reply(nv_of(vector.raw))
    assert refused.value.split_brain and not refused.value.wait and refused.value.text == SPLIT_BRAIN


def test_captured_mismatch_of_unique_ids() -> None:
    vector = vectors.load("hs2_error_resuid_mismatch")
    own = replace(CAPTURED, resuid=1234605616436508552)
    made = answer(second(), own)
    assert made.message == vector.normal
    assert not made.accepted and not made.split_brain and made.metadata == own
    with pytest.raises(RefusedError) as refused:
        primary().second_reply(nv_of(vector.raw))
    assert refused.value.text == element("errmsg", "hs2_error_resuid_mismatch")
    assert not refused.value.split_brain


def test_captured_token_mismatch() -> None:
    vector = vectors.load("hs2_error_token_mismatch")
    for token in (None, bytes(16), TOKEN[::-1]):
        refusal = check_token(second(), token)
        assert refusal is not None and refusal_message(refusal) == vector.normal
    assert check_token(second(), TOKEN) is None
    with pytest.raises(RefusedError) as refused:
        primary().second_reply(nv_of(vector.raw))
    assert refused.value.text == "Token doesn't match."


def test_version_1_is_in_the_main_header_of_all_that_follows_it() -> None:
    request = Handshake1Request("data", 1)
    version, message = accept_first(request, TOKEN)
    assert version == 1 and version_of(message) == 1
    handshake = PrimaryHandshake(CAPTURED, PEER)
    assert version_of(handshake.first_reply(nv_of(message))) == 1
    accepted = answer(second(), CAPTURED, version=1)
    assert version_of(accepted.message) == 1
    assert finish(handshake, accepted.message).version == 1
    assert version_of(answer(second(), replace(CAPTURED, resuid=1), version=1).message) == 1
