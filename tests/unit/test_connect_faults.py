"""The primary's connections to a secondary that is not there, hangs, closes, refuses or says something else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import replace

import pytest

from hast import connect as connect_module
from hast.connect import connect
from hast.handshake import MismatchError, PeerError, RefusedError
from hast.messages import (
    NO_ACCESS,
    NOT_CONFIGURED,
    SPLIT_BRAIN,
    TOKEN_MISMATCH,
    Refusal,
    pack_message,
    resuid_mismatch_text,
    wrong_role_text,
)
from tests import vectors
from tests.unit.scripted_secondary import (
    CAPTURED,
    MAP,
    STEP1,
    VIRGIN,
    WHERE,
    Secondary,
    descriptors,
    failure,
    no_child_left,  # noqa: F401  (a fixture)
    play,
    playing,
    resource,
    stopping,
)


def test_nobody_listens() -> None:
    with contextlib.closing(Secondary()) as secondary:
        pass
    with pytest.raises(PeerError) as raised:
        asyncio.run(connect(resource(secondary.address), CAPTURED))
    assert str(raised.value) == f"data: {secondary.address}: connecting failed: Connection refused"


def test_a_source_that_this_machine_does_not_have() -> None:
    with contextlib.closing(Secondary()) as secondary, pytest.raises(PeerError) as raised:
        asyncio.run(connect(resource(secondary.address, source="192.0.2.77"), CAPTURED))
    assert str(raised.value).endswith(
        "connecting failed: Cannot assign requested address, for the source address 192.0.2.77"
    )


def test_a_peer_that_hangs_at_each_step() -> None:
    """All at once, because each takes the whole second."""

    async def nothing(_: Secondary) -> None:
        await asyncio.sleep(1000)

    async def one(where: int) -> str:
        with contextlib.closing(Secondary()) as secondary:
            with pytest.raises(PeerError) as raised:
                await play(
                    secondary,
                    stopping(where, nothing),
                    lambda: connect(resource(secondary.address, 1), CAPTURED),
                )
            return str(raised.value).removeprefix(f"data: {secondary.address}: ")

    async def all_of_them() -> list[str]:
        before = descriptors()
        errors = await asyncio.gather(*map(one, WHERE))
        assert descriptors() <= before
        return list(errors)

    assert asyncio.run(all_of_them()) == [f"{what} failed: it took more than 1 s" for what in WHERE.values()]


@pytest.mark.parametrize("where", list(WHERE))
def test_a_peer_that_closes_at_each_step(where: int) -> None:
    async def close(secondary: Secondary) -> None:
        secondary.socket.close()
        for sock in secondary.connections:
            sock.shutdown(socket.SHUT_RDWR)

    error = failure(stopping(where, close))
    # Between the steps, it is seen at whatever comes next.
    assert "failed: " in str(error) and ("closed after" in str(error) or "onnection re" in str(error))


@pytest.mark.parametrize("where", [5, 6])
def test_a_peer_that_closes_the_second_connection_only(where: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect_module, "LAST_WORDS_SECONDS", 0.1)

    async def close(secondary: Secondary) -> None:
        secondary.connections[1].shutdown(socket.SHUT_RDWR)

    error = failure(stopping(where, close))
    assert "handshake step 2 failed: " in str(error)


def test_an_answer_on_the_first_connection_counts_although_the_second_was_closed() -> None:
    refusal = vectors.load("hs2_error_splitbrain").raw

    async def script(secondary: Secondary) -> None:
        await playing(second=b"")(secondary)
        secondary.connections[1].shutdown(socket.SHUT_RDWR)
        await asyncio.sleep(0.05)
        await secondary.say(secondary.connections[0], refusal)

    error = failure(script)
    assert isinstance(error, RefusedError) and error.split_brain


GARBAGE = {
    "a web server": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "version 72"),
    "a higher version": (b"\3" + STEP1.raw[1:], "version 3"),
    "an oversize header": (b"\2" + (1 << 20 | 1).to_bytes(4, "little"), "1048577 bytes"),
    "the largest header": (b"\2\xff\xff\xff\xff", "4294967295 bytes"),
    "bad nv": (b"\2\x08\0\0\0" + b"\xff" * 8, "nv"),
    "an empty message": (b"\2\0\0\0\0", "is missing"),
    "something else": (vectors.load("keepalive").raw, "is missing"),
}


@pytest.mark.parametrize("what", list(GARBAGE))
@pytest.mark.parametrize("step", [1, 2])
def test_garbage(what: str, step: int) -> None:
    message, text = GARBAGE[what]
    error = failure(playing(first=message) if step == 1 else playing(second=message))
    assert isinstance(error, PeerError) and f"handshake step {step} failed: " in str(error)
    assert text in str(error)


def test_an_answer_on_the_second_connection() -> None:
    error = failure(playing(second=b"", on_second=VIRGIN.raw))
    assert str(error).endswith("handshake step 2 failed: the peer answers on the second connection")


@pytest.mark.parametrize(
    ("name", "wait"),
    [("hs1_error_role_init", False), ("hs1_error_unknown_resource", False), ("hs1_error_wrong_role_wait", True)],
)
def test_captured_refusals_of_step_1(name: str, wait: bool) -> None:
    error = failure(playing(first=vectors.load(name).raw))
    assert isinstance(error, RefusedError) and error.wait is wait and not error.split_brain
    assert error.text == vectors.load(name).elements[0][2]


@pytest.mark.parametrize("name", ["hs2_error_splitbrain", "hs2_error_resuid_mismatch", "hs2_error_token_mismatch"])
def test_captured_refusals_of_step_2(name: str) -> None:
    error = failure(playing(second=vectors.load(name).raw))
    assert isinstance(error, RefusedError) and not error.wait
    assert error.split_brain is (name == "hs2_error_splitbrain")


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(
    "text",
    [
        NOT_CONFIGURED,
        NO_ACCESS,
        TOKEN_MISMATCH,
        SPLIT_BRAIN,
        wrong_role_text("init"),
        wrong_role_text("primary"),
        resuid_mismatch_text(1, 2),
        "Something that nobody knows.\nTwo lines",
    ],
)
def test_refusals(step: int, text: str) -> None:
    message = pack_message(2, Refusal(text).to_nv())
    error = failure(playing(first=message) if step == 1 else playing(second=message))
    assert isinstance(error, RefusedError)
    assert error.text == text.replace("\n", "\\n")


def test_a_token_that_is_not_known_is_said_on_the_second_connection() -> None:
    error = failure(playing(second=b"", on_second=vectors.load("hs2_error_token_mismatch").raw))
    assert isinstance(error, RefusedError) and error.text == TOKEN_MISMATCH


@pytest.mark.parametrize("changes", [{"datasize": 67104768}, {"extentsize": 1 << 20}])
def test_a_component_of_other_sizes(changes: dict[str, int]) -> None:
    error = failure(playing(second=MAP.raw), replace(CAPTURED, **changes))  # type: ignore[arg-type]
    assert isinstance(error, MismatchError) and "another" in str(error)


def test_a_map_of_another_size() -> None:
    at = MAP.raw.index(b"mapsize\0") + 8
    message = MAP.raw[:at] + (1 << 20).to_bytes(4, "little") + MAP.raw[at + 4 :]
    assert "an activemap of 1048576 bytes" in str(failure(playing(second=message)))


def test_a_damaged_map() -> None:
    message = MAP.raw[:-4] + b"\1\2\0\0"  # stands for 513 bytes
    assert "513 bytes, 512 were announced" in str(failure(playing(second=message)))
