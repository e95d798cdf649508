"""The peer's name, where the primary's connections go: looked up in a child, which never holds anything up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from hast import connect as connect_module
from hast.address import parse_address
from hast.connect import connect, resolve
from hast.handshake import PeerError
from tests.unit.scripted_secondary import (
    CAPTURED,
    SECONDS,
    Secondary,
    descriptors,
    no_child_left,  # noqa: F401  (a fixture)
    play,
    playing,
    resource,
)


def test_a_name_that_has_a_dead_address_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child that looks it up is a fork: it has what is patched here."""

    async def body() -> None:
        with contextlib.closing(Secondary()) as secondary, contextlib.closing(Secondary("127.9.9.9")) as dead:
            dead.socket.close()
            kind = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
            answer = [
                (socket.AF_INET, *kind, ("127.9.9.9", dead.port)),
                (socket.AF_INET, *kind, ("127.0.0.1", secondary.port)),
            ]
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_: answer)
            config = resource(f"peer.example:{secondary.port}")
            (await play(secondary, playing(), lambda: connect(config, CAPTURED))).close()

    asyncio.run(body())


def test_names_are_looked_up_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
    asked = (os.getpid(), "peer.example", 99, socket.AF_INET6)

    def look_up(*what: Any) -> list[Any]:
        assert (os.getpid(), *what[:3]) != asked and what[:3] == asked[1:]
        return [(socket.AF_INET6, *kind, ("2001:db8::1", 99, 0, 0))] * 40

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    found = asyncio.run(resolve("data", parse_address("tcp6://peer.example:99")))
    assert found == [(socket.AF_INET6, ("2001:db8::1", 99, 0, 0))] * 16


def test_ip_addresses_are_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect_module, "fork", lambda *_: pytest.fail("a child was forked"))
    found = [asyncio.run(resolve("data", parse_address(text))) for text in ("10.0.0.1:5", "[2001:db8::2]:6")]
    assert found == [[(socket.AF_INET, ("10.0.0.1", 5))], [(socket.AF_INET6, ("2001:db8::2", 6))]]


def refuse_name(*_: Any) -> list[Any]:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def die(*_: Any) -> list[Any]:
    os._exit(3)


@pytest.mark.parametrize(
    ("look_up", "text"),
    [
        (refuse_name, "Name or service not known"),
        (lambda *_: [], "it has none"),
        (die, "the look-up died"),
    ],
)
def test_a_name_without_address(look_up: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(PeerError) as raised:
        asyncio.run(connect(resource("peer.example"), CAPTURED))
    assert str(raised.value) == f"data: cannot look up the address of peer.example: {text}"


def test_a_name_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: time.sleep(1000))
    before = descriptors()
    with pytest.raises(PeerError) as raised:
        asyncio.run(connect(resource("peer.example", 1), CAPTURED))
    assert str(raised.value) == "data: peer.example: looking up peer.example failed: it took more than 1 s"
    assert descriptors() <= before


def test_a_source_of_the_other_family(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = [(socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("::1", 1, 0, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: answer)
    with pytest.raises(PeerError, match="one is IPv4 and the other IPv6"):
        asyncio.run(connect(resource("peer.example:1", source="127.0.0.1"), CAPTURED))


def test_cancelled_while_a_name_is_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun = tmp_path / "begun"

    def hang(*_: Any) -> None:
        begun.touch()
        time.sleep(1000)

    async def body() -> None:
        task = asyncio.create_task(connect(resource("peer.example"), CAPTURED))
        async with asyncio.timeout(SECONDS):
            while not begun.exists():
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    before = descriptors()
    asyncio.run(body())
    assert descriptors() <= before
