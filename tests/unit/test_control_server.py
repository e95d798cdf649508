"""The control socket: whatever a client does, others are served."""

from __future__ import annotations

import asyncio
import os
import random
import select
import socket
import stat
import struct
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from hast import control_server
from hast.address import parse_address
from hast.control import (
    ALL,
    CMD_SET_ROLE,
    CMD_STATUS,
    CMD_STOP,
    ERROR_INVALID,
    ControlRequest,
    Role,
    RoleEntry,
    RoleReply,
    StatusEntry,
    StatusReply,
    error_reply,
)
from hast.control_client import ControlClient, RefusedError
from hast.control_server import CLIENT_LIMIT, ControlServer
from hast.errors import HastError, SystemCallError, TemporaryError, UnavailableError
from hast.messages import MAIN_HEADER, REQUEST_LIMIT, pack_message
from hast.nv import Nv
from tests.tools import need, need_root

STATUS = ControlRequest(CMD_STATUS, (ALL,))
ENTRIES = tuple(StatusEntry(f"r{n}", provname="p" * 60, role="init") for n in range(300))


async def answer(request: ControlRequest) -> Nv:
    """A handler that answers as hastd does."""
    if request.cmd == CMD_STATUS:
        return StatusReply(ENTRIES if request.resources == (ALL,) else ENTRIES * 15).to_nv()
    if request.cmd == CMD_SET_ROLE:
        return RoleReply((RoleEntry("data", error=75, errmsg="data: it is locked"),)).to_nv()
    return error_reply(0)


def serve(path: Path, body: Callable[[], Awaitable[None]], seconds: float = 5.0) -> None:
    """Run `body` while a server listens at `path`."""

    async def main() -> None:
        server = ControlServer(control_server.bind(str(path)), answer)
        await server.start()
        try:
            await asyncio.wait_for(body(), 60)
        finally:
            await server.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(control_server, "CLIENT_SECONDS", seconds)
        asyncio.run(main())
    assert not path.exists()


def ask(path: Path, request: ControlRequest = STATUS) -> Nv:
    with ControlClient(parse_address(str(path)), 20) as client:
        client.connect()
        return client.request(request.to_nv())


def hung_up(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def check_served(path: Path) -> None:
    reply = await asyncio.to_thread(ask, path)
    assert StatusReply.from_nv(reply).entries == ENTRIES


def test_request_and_reply(tmp_path: Path) -> None:
    path = tmp_path / "ctl"

    async def body() -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        await check_served(path)
        reply = await asyncio.to_thread(ask, path, ControlRequest(CMD_SET_ROLE, ("data",), Role.PRIMARY))
        assert RoleReply.from_nv(reply).entries == (RoleEntry("data", 75, "", "data: it is locked"),)

    serve(path, body)


def test_reply_has_the_version_of_an_older_client(tmp_path: Path) -> None:
    path = tmp_path / "ctl"

    async def body() -> None:
        for version in (0, 1, 2):
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(pack_message(version, STATUS.to_nv()))
            assert (await reader.readexactly(1))[0] == version
            writer.close()

    serve(path, body)


GARBAGE = [
    b"GET / HTTP/1.0\r\n\r\n",
    b"\x02\xff\xff\xff\xff",  # a size that nobody may allocate
    MAIN_HEADER.pack(2, REQUEST_LIMIT + 1),
    b"\x7f" + MAIN_HEADER.pack(2, 0)[1:],  # a version from the future
    random.Random(2).randbytes(100),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_hung_up_on(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "ctl"

    async def body() -> None:
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(garbage)
        try:
            assert await reader.read() == b""
        except ConnectionError:
            pass
        writer.close()
        await check_served(path)

    serve(path, body, seconds=0.3)


@pytest.mark.parametrize(
    "nv",
    [
        b"",
        b"\x11\x00\x00\x00\x00\x00",
        random.Random(1).randbytes(500),
        ControlRequest(CMD_STATUS).to_nv().encode(),
        ControlRequest(CMD_SET_ROLE, ("data",)).to_nv().encode(),
    ],
)
def test_request_that_means_nothing_is_refused(tmp_path: Path, nv: bytes) -> None:
    path = tmp_path / "ctl"

    async def body() -> None:
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(MAIN_HEADER.pack(2, len(nv)) + nv)
        expected = error_reply(ERROR_INVALID).encode()
        assert await reader.read() == MAIN_HEADER.pack(2, len(expected)) + expected
        writer.close()

    serve(path, body)


def test_refusal_is_an_error_of_the_client(tmp_path: Path) -> None:
    path = tmp_path / "ctl"

    async def body() -> None:
        with pytest.raises(RefusedError, match=r"invalid request \(error 2\)") as caught:
            await asyncio.to_thread(ask, path, ControlRequest(CMD_STATUS))
        assert caught.value.exit_code == os.EX_SOFTWARE

    serve(path, body)


def test_half_messages_and_silence_end_in_time(tmp_path: Path) -> None:
    path = tmp_path / "ctl"
    whole = pack_message(2, STATUS.to_nv())

    async def body() -> None:
        connections = []
        for size in (0, 1, 4, 5, 6, len(whole) - 1):
            reader, writer = await asyncio.open_unix_connection(str(path))
            writer.write(whole[:size])
            connections.append((reader, writer))
        await check_served(path)
        for reader, writer in connections:
            assert await reader.read() == b""
            writer.close()

    serve(path, body, seconds=0.3)


def test_client_that_does_not_read_its_reply(tmp_path: Path) -> None:
    path = tmp_path / "ctl"

    async def body() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.send(pack_message(2, ControlRequest(CMD_STATUS, ("more than a socket takes",)).to_nv()))
            await check_served(path)
            await until(lambda: hung_up(sock))
            sock.settimeout(10)
            data = bytearray()
            try:
                while part := await asyncio.to_thread(sock.recv, 65536):
                    data += part
            except ConnectionError:
                pass
            assert 0 < len(data) < len(pack_message(2, StatusReply(ENTRIES * 15).to_nv()))

    serve(path, body, seconds=0.3)


def test_silent_crowd_makes_room_for_one_who_speaks(tmp_path: Path) -> None:
    path = tmp_path / "ctl"

    async def body() -> None:
        crowd = [await asyncio.open_unix_connection(str(path)) for _ in range(2 * CLIENT_LIMIT)]
        await check_served(path)
        # The oldest ones were dropped for the newest.
        reader, _ = crowd[0]
        assert await reader.read() == b""
        for _, writer in crowd:
            writer.close()

    serve(path, body)


def test_stop_keeps_the_connection_until_the_process_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "ctl"

    async def body() -> None:
        with ControlClient(parse_address(str(path)), 0.5) as client:
            await asyncio.to_thread(client.connect)
            await asyncio.to_thread(client.request, ControlRequest(CMD_STOP).to_nv())
            with pytest.raises(UnavailableError, match="does not end in time"):
                await asyncio.to_thread(client.wait_closed)

    serve(path, body)


def test_other_users_are_not_heard() -> None:
    need_root()
    need("setpriv")
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        check_other_users(Path(directory) / "ctl")


def check_other_users(path: Path) -> None:
    program = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(9))"
    command = ["setpriv", "--reuid=65534", "--clear-groups", "/usr/bin/python3", "-c", program, str(path)]

    async def run() -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(*command, stdout=-1, stderr=-1)
        out, err = await process.communicate()
        return process.returncode, (out + err).decode()

    async def body() -> None:
        code, text = await run()
        assert code != 0 and "PermissionError" in text
        path.chmod(0o666)  # if it were reachable nevertheless, the peer's uid still counts
        code, text = await run()
        assert (code, text) == (0, "b''\n")

    serve(path, body)


def test_stale_socket_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "ctl"
    first = control_server.bind(str(path))
    with pytest.raises(TemporaryError, match="another hastd is running: it answers"):
        control_server.bind(str(path))
    first.close()  # as a kill leaves it: the file is there, nobody answers
    assert path.is_socket()
    control_server.bind(str(path)).close()


@pytest.mark.parametrize("kind", ["file", "directory", "missing"])
def test_places_where_no_socket_can_be(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "ctl"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path = tmp_path / "missing" / "ctl"
    with pytest.raises(SystemCallError, match=f"control socket {path}"):
        control_server.bind(str(path))
    assert kind != "file" or path.read_text() == "precious"


# The client.


def one_answer(path: Path, data: bytes) -> socket.socket:
    """A server that gives one connection `data` and hangs up."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()

    def serve_one() -> None:
        connection, _ = sock.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(data)

    threading.Thread(target=serve_one, daemon=True).start()
    return sock


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x02\x05",
        MAIN_HEADER.pack(2, 100) + b"short",
        b"\x09" + bytes(4),
        b"\x02" + struct.pack("<I", 1 << 31),
        MAIN_HEADER.pack(2, 6) + b"\x55" * 6,
    ],
)
def test_answers_that_are_none(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "ctl"
    with one_answer(path, data), pytest.raises(HastError):
        ask(path)


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(SystemCallError, match="is hastd running") as caught:
        ask(tmp_path / "absent")
    assert caught.value.exit_code == os.EX_OSERR


def test_server_that_never_answers(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "ctl"))
        sock.listen()
        with ControlClient(parse_address(str(tmp_path / "ctl")), 0.1) as client:
            client.connect()
            with pytest.raises(UnavailableError, match="no answer"):
                client.request(STATUS.to_nv())
