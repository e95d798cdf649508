"""Whose address may connect for what, names that change or do not answer; listening sockets; complaints."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hast import listening, peeraccess
from hast.address import parse_address
from hast.complaints import LINES, PERIOD, Complaints
from hast.config import DEFAULT_LISTEN, Resource, parse
from hast.errors import HastError, PermissionDeniedError, SystemCallError, TemporaryError, UnavailableError
from hast.listening import close_all, listen_all
from hast.peeraccess import PeerAccess, canonical
from tests.e2e.node import own_address

_numbers = itertools.count()


def resources(**remotes: str) -> list[Resource]:
    text = "".join(
        f"resource {name} {{ local /dev/{name}\non a {{ remote {remote} }} }}\n" for name, remote in remotes.items()
    )
    return list(parse(text, "hast.conf", ["a"]).resources.values())


# Access.


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:DB8:0:0::1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
    ],
)
def test_one_form_of_an_address(text: str, form: str) -> None:
    assert canonical(text) == form


def test_addresses_count_and_ports_do_not() -> None:
    all_of_them = resources(
        a="10.0.0.1", b="tcp4://10.0.0.1:9", c="10.0.0.2", d="tcp6://2001:db8::1", e="none", f="tcp6://fe80::7"
    )
    access = PeerAccess(lambda: all_of_them)

    async def body() -> None:
        assert await access.resources_of("10.0.0.1") == {"a", "b"}
        assert await access.resources_of("::ffff:10.0.0.2") == {"c"}
        assert await access.resources_of("2001:db8:0::1") == {"d"}
        assert await access.resources_of("fe80::7%eth0") == {"f"}
        assert await access.resources_of("10.0.0.3") == frozenset()
        assert await access.resources_of(None) == {"a", "b", "c", "d", "f"}
        all_of_them.pop(0)
        assert await access.resources_of("10.0.0.1") == {"b"}  # looked at anew each time

    asyncio.run(body())


class NameServer:
    """Stands in for getaddrinfo: answers, fails, or keeps everybody waiting."""

    def __init__(self) -> None:
        self.addresses: list[str] | None = ["10.1.1.1"]  # None: it fails
        self.asked: list[tuple[Any, ...]] = []
        self.go = threading.Event()
        self.go.set()

    def look_up(self, *what: Any) -> list[tuple[Any, ...]]:
        self.asked.append(what)
        self.go.wait(60)
        if self.addresses is None:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in self.addresses]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[NameServer]:
    server = NameServer()
    monkeypatch.setattr(socket, "getaddrinfo", server.look_up)
    yield server
    server.go.set()


def test_names_are_looked_up_and_remembered(server: NameServer, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resources(a="peer.example", b="tcp4://peer.example:9", c="10.1.1.1")
    access = PeerAccess(lambda: found)

    async def body() -> None:
        assert await access.resources_of("10.1.1.1") == {"a", "b", "c"}
        assert {what[0] for what in server.asked} == {"peer.example"} and len(server.asked) == 2
        for _ in range(100):  # a flood of strangers costs no look-up
            assert await access.resources_of("10.9.9.9") == frozenset()
        assert len(server.asked) == 2
        server.addresses = ["10.2.2.2", "10.3.3.3"]
        assert await access.resources_of("10.2.2.2") == frozenset()  # not yet
        monkeypatch.setattr(peeraccess, "FRESH_SECONDS", 0.0)
        assert await access.resources_of("10.3.3.3") == {"a", "b"}
        assert await access.resources_of("10.1.1.1") == {"c"}

    asyncio.run(body())


def test_a_name_server_that_fails_takes_nothing_away(
    server: NameServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peeraccess, "FRESH_SECONDS", 0.0)
    access = PeerAccess(lambda: resources(a="peer.example"))

    async def body() -> None:
        assert await access.resources_of("10.1.1.1") == {"a"}
        server.addresses = None
        for _ in range(3):
            assert await access.resources_of("10.9.9.9") == frozenset()
        assert await access.resources_of("10.1.1.1") == {"a"}

    asyncio.run(body())
    text = "cannot look up the address of remote peer.example: Temporary failure in name resolution"
    assert [record.getMessage() for record in caplog.records] == [text]


def test_a_name_server_that_does_not_answer(server: NameServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for long, only one look-up is under way, and the event loop ends without waiting for it."""
    monkeypatch.setattr(peeraccess, "LOOK_UP_SECONDS", 0.05)
    server.go.clear()
    access = PeerAccess(lambda: resources(a="peer.example"))

    async def body() -> None:
        results = await asyncio.gather(*(access.resources_of("10.1.1.1") for _ in range(20)))
        assert results == [frozenset()] * 20 and len(server.asked) == 1
        server.go.set()
        monkeypatch.setattr(peeraccess, "LOOK_UP_SECONDS", 30.0)
        assert await access.resources_of("10.1.1.1") == {"a"}  # the answer that came late counts
        assert len(server.asked) == 1
        monkeypatch.setattr(peeraccess, "LOOK_UP_SECONDS", 0.0)
        monkeypatch.setattr(peeraccess, "FRESH_SECONDS", 0.0)
        server.go.clear()
        await access.resources_of("10.9.9.9")

    asyncio.run(body())
    assert not server.go.is_set()


# Listening.


def place() -> str:
    return f"{own_address()}:{21000 + next(_numbers)}"


def test_all_or_nothing() -> None:
    free, taken = parse_address(place()), parse_address(place())
    with socket.socket() as other:
        other.bind((taken.host, taken.port))
        other.listen()
        for _ in range(2):  # had one been left open, the second attempt would fail for another reason
            with pytest.raises(TemporaryError) as raised:
                listen_all([free, taken])
            assert str(raised.value) == (
                f"cannot listen on {taken}: Address already in use: another hastd, or another program, listens there"
            )
            assert raised.value.exit_code == os.EX_TEMPFAIL
    opened = listen_all([free, taken])
    assert [at.address for at in opened] == [free, taken]
    assert not any(at.socket.getblocking() or at.socket.get_inheritable() for at in opened)
    close_all(opened)


def test_an_address_of_another_machine() -> None:
    with pytest.raises(UnavailableError) as raised:
        listen_all([parse_address("192.0.2.1:4711")])
    assert str(raised.value) == (
        "cannot listen on 192.0.2.1:4711: Cannot assign requested address: check 'listen' in hast.conf"
    )


def test_a_name_with_two_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = parse_address(place()), parse_address(place())
    kind = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
    answer = [(socket.AF_INET, *kind, (at.host, at.port)) for at in (one, other, one)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: answer)
    opened = listen_all([parse_address("me.example")])
    assert [at.socket.getsockname() for at in opened] == [(at.host, at.port) for at in (one, other)]
    close_all(opened)


def fail_with(number: int, family: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let opening a listening socket of a family fail; others are not really opened."""

    def listen_tcp(address: Any, other: int, sockaddr: Any) -> listening.Listening:
        if family in (None, other):
            raise listening._error(address, OSError(number, os.strerror(number)))
        return listening.Listening(address, socket.socket(other))

    monkeypatch.setattr(listening, "_listen_tcp", listen_tcp)


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
def test_a_kernel_without_ipv6_has_to_do_with_the_other_default(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(number, socket.AF_INET6, monkeypatch)
    opened = listen_all(DEFAULT_LISTEN)
    assert [at.address for at in opened] == [DEFAULT_LISTEN[0]]
    close_all(opened)
    with pytest.raises(UnavailableError):  # asked for
        listen_all([parse_address("[::1]:4711")])
    fail_with(number, None, monkeypatch)
    with pytest.raises(UnavailableError):
        listen_all(DEFAULT_LISTEN)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EADDRINUSE, TemporaryError),
        (errno.EACCES, PermissionDeniedError),
        (errno.EMFILE, SystemCallError),
    ],
)
def test_other_reasons_count_for_defaults_as_well(
    number: int, kind: type[HastError], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(number, socket.AF_INET6, monkeypatch)
    with pytest.raises(kind):
        listen_all(DEFAULT_LISTEN)


def test_unix_sockets(tmp_path: Path) -> None:
    path = tmp_path / "peer"
    address = parse_address(f"uds://{path}")
    (first,) = listen_all([address])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(TemporaryError, match="in use"):
        listen_all([address])
    path.rename(tmp_path / "moved")
    (second,) = listen_all([address])
    first.close()
    assert path.exists()  # it is the second one's
    second.socket.close()  # its hastd was killed
    (third,) = listen_all([address])
    third.close()
    assert not path.exists()


@pytest.mark.parametrize("what", ["file", "directory"])
def test_a_unix_socket_takes_nothing_elses_place(what: str, tmp_path: Path) -> None:
    path = tmp_path / "peer"
    path.write_text("precious") if what == "file" else path.mkdir()
    with pytest.raises(SystemCallError, match="something else is there, no socket"):
        listen_all([parse_address(str(path))])
    assert path.exists()


# Complaints.


def test_complaints_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    complaints = Complaints(logging.getLogger("test"), lambda: now)
    for number in range(1000):
        complaints.warning("peer %d", number)
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"peer {number}" for number in range(LINES)]
    caplog.clear()
    now = PERIOD
    complaints.warning("again")
    assert [record.getMessage() for record in caplog.records] == [
        f"{1000 - LINES} more warnings like the next one were left out",
        "again",
    ]
