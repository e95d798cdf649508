"""NBD negotiation (hast/device/nbd.py) and the listening socket (hast/device/nbdlisten.py)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hast.device import nbdlisten
from hast.device.nbd import (
    NbdExport,
    NbdLimits,
    NbdNegotiation,
    NbdResult,
    State,
    Transmission,
    parse_info,
    printable,
)
from hast.device.nbdlisten import NbdListener
from hast.errors import ProtocolError, SystemCallError, TemporaryError
from hast.ffi import _hast
from tests.nbdclient import go, option

GREETING = b"NBDMAGICIHAVEOPT\0\3"
EXPORT = NbdExport("vm0", 1 << 30, "hast resource vm0")
FLAGS = struct.pack(">I", 3)
ACK, SERVER, INFO = 1, 2, 3
ERR_UNSUP, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG = 0x80000001, 0x80000003, 0x80000006, 0x80000009
SIZE = struct.pack(">Q", EXPORT.size)
# HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES, CAN_MULTI_CONN; structured replies add SEND_DF.
SIMPLE_FLAGS = 0x16D
STRUCTURED_FLAGS = 0x1ED


def negotiation(**how: object) -> NbdNegotiation:
    """One that has the client's flags already."""
    machine = NbdNegotiation(EXPORT, **how)  # type: ignore[arg-type]
    assert machine.feed(FLAGS) == []
    return machine


def parsed(reply: bytes) -> tuple[int, int, bytes]:
    """Option, type and data of an option reply."""
    magic, number, kind, length = struct.unpack(">QIII", reply[:20])
    assert magic == 0x3E889045565A9
    assert length == len(reply) - 20
    return number, kind, reply[20:]


def kinds(replies: list[bytes]) -> list[int]:
    return [parsed(reply)[1] for reply in replies]


def test_greeting_says_fixed_newstyle_without_zeroes() -> None:
    assert NbdNegotiation(EXPORT).greeting() == GREETING


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_client_flags(flags: int) -> None:
    """EXPORT_NAME is answered with 124 zeros, unless the client said that it wants none."""
    machine = NbdNegotiation(EXPORT)
    assert machine.feed(struct.pack(">I", flags)) == []
    zeros = b"" if flags & 2 else bytes(124)
    assert machine.feed(option(1, b"vm0")) == [SIZE + struct.pack(">H", SIMPLE_FLAGS) + zeros]
    assert machine.result == NbdResult(EXPORT, structured=False)
    assert machine.state is State.DONE


@pytest.mark.parametrize("flags", [4, 0x80000000, 0xFFFFFFFF])
def test_unknown_client_flags_close(flags: int) -> None:
    with pytest.raises(ProtocolError, match="unknown handshake flags"):
        NbdNegotiation(EXPORT).feed(struct.pack(">I", flags))


@pytest.mark.parametrize("name", [b"", b"vm0"])
def test_export_name(name: bytes) -> None:
    machine = negotiation()
    assert machine.feed(option(1, name)) == [SIZE + struct.pack(">H", SIMPLE_FLAGS)]
    assert machine.ended


@pytest.mark.parametrize("name", [b"vm1", b"vm0\0", b"VM0", b"x" * 5000, b"\xff\n\x1b[2J"])
def test_unknown_export_name_closes(name: bytes) -> None:
    with pytest.raises(ProtocolError, match="unknown export") as caught:
        negotiation().feed(option(1, name))
    assert str(caught.value).isprintable()


def test_abort_is_acknowledged() -> None:
    for data in (b"", b"ignored"):
        machine = negotiation()
        assert [parsed(r) for r in machine.feed(option(2, data))] == [(2, ACK, b"")]
        assert machine.state is State.ABORTED
        assert machine.result is None


def test_list() -> None:
    machine = negotiation()
    first, last = machine.feed(option(3))
    assert parsed(first) == (3, SERVER, struct.pack(">I", 3) + b"vm0" + b"hast resource vm0")
    assert parsed(last) == (3, ACK, b"")
    assert kinds(machine.feed(option(3, b"data"))) == [ERR_INVALID]
    assert not machine.ended


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("number", [6, 7])
@pytest.mark.parametrize("name", [b"", b"vm0"])
def test_info_and_go(number: int, name: bytes, structured: bool) -> None:
    """Size and flags always, block sizes always, name and description to those who ask; unknown ones ignored."""
    machine = negotiation()
    if structured:
        assert kinds(machine.feed(option(8))) == [ACK]
    flags = STRUCTURED_FLAGS if structured else SIMPLE_FLAGS
    export = struct.pack(">HQH", 0, EXPORT.size, flags)
    blocks = struct.pack(">HIII", 3, 512, 4096, 32 << 20)

    def ask(*infos: int) -> list[tuple[int, int, bytes]]:
        data = go(name, *infos)[16:]
        return [parsed(reply) for reply in machine.feed(option(number, data))]

    if number == 6:
        assert ask(1, 2, 3, 77) == [
            (6, INFO, export),
            (6, INFO, blocks),
            (6, INFO, b"\0\1vm0"),
            (6, INFO, b"\0\2hast resource vm0"),
            (6, ACK, b""),
        ]
        assert machine.result is None
    assert ask() == [(number, INFO, export), (number, INFO, blocks), (number, ACK, b"")]
    assert machine.ended is (number == 7)
    assert machine.result == (NbdResult(EXPORT, structured) if number == 7 else None)


@pytest.mark.parametrize(("name", "kind"), [(b"vm1", ERR_UNKNOWN), (b"vm0\0", ERR_UNKNOWN), (b"x" * 4097, ERR_TOO_BIG)])
def test_go_for_an_unknown_export_is_refused_and_the_next_one_works(name: bytes, kind: int) -> None:
    machine = negotiation()
    assert kinds(machine.feed(go(name))) == [kind]
    assert not machine.ended
    assert kinds(machine.feed(go(b"vm0"))) == [INFO, INFO, ACK]
    assert machine.ended


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(5),
        struct.pack(">IH", 1, 0),
        struct.pack(">I", 3) + b"vm0",
        struct.pack(">I", 3) + b"vm0\0",
        struct.pack(">I", 3) + b"vm0" + struct.pack(">H", 1),
        struct.pack(">I", 3) + b"vm0" + struct.pack(">HHH", 1, 0, 0),
        struct.pack(">I", 0xFFFFFFFF) + b"vm0\0\0",
        struct.pack(">IH", 0, 0xFFFF),
    ],
)
@pytest.mark.parametrize("number", [6, 7])
def test_malformed_info(number: int, data: bytes) -> None:
    machine = negotiation()
    assert kinds(machine.feed(option(number, data))) == [ERR_INVALID]
    assert not machine.ended


def test_structured_reply_takes_no_data() -> None:
    machine = negotiation()
    assert kinds(machine.feed(option(8, b"x"))) == [ERR_INVALID]
    machine.feed(go())
    assert machine.result == NbdResult(EXPORT, structured=False)


@pytest.mark.parametrize("number", [0, 4, 5, 9, 10, 11, 12, 1000, 0xFFFFFFFF])
def test_everything_else_is_unsupported(number: int) -> None:
    """TLS, meta contexts, extended headers and what nobody knows: with or without data, and life goes on."""
    machine = negotiation()
    for data in (b"", b"\0" * 100, b"x" * 65536):
        assert [parsed(r)[:2] for r in machine.feed(option(number, data))] == [(number, ERR_UNSUP)]
    assert kinds(machine.feed(go())) == [INFO, INFO, ACK]


def test_limits() -> None:
    with pytest.raises(ProtocolError, match="65537 bytes"):
        negotiation().feed(option(99, b"")[:12] + struct.pack(">I", 65537))
    machine = negotiation(limits=NbdLimits(options=3))
    assert len(machine.feed(option(3) * 3)) == 6
    with pytest.raises(ProtocolError, match="more than 3 options"):
        machine.feed(option(3))


@pytest.mark.parametrize("stream", [b"GET / HTTP/1.1\r\n", bytes(16), option(3)[::-1]])
def test_no_option(stream: bytes) -> None:
    with pytest.raises(ProtocolError, match="no option"):
        negotiation().feed(stream)


@pytest.mark.parametrize("last", [go(), option(1, b"vm0")])
def test_requests_before_the_answer_are_refused(last: bytes) -> None:
    with pytest.raises(ProtocolError, match="before"):
        negotiation().feed(last + b"\x25\x60\x95\x13")
    machine = negotiation()
    machine.feed(last)
    with pytest.raises(ProtocolError, match="before"):
        machine.feed(b"\x25")


@pytest.mark.parametrize("can_trim", [False, True])
@pytest.mark.parametrize("read_only", [False, True])
def test_transmission_flags(can_trim: bool, read_only: bool) -> None:
    flags = NbdExport("a", 512, can_trim=can_trim, read_only=read_only).flags(structured=False)
    assert (Transmission.SEND_TRIM in flags) is (can_trim and not read_only)
    assert (Transmission.SEND_WRITE_ZEROES in flags) is not read_only
    assert (Transmission.READ_ONLY in flags) is read_only
    assert flags & ~0x16F == 0  # nothing else is promised: no rotational, no fast zero, no cache


def test_client_flags_are_those_of_the_ggate_stage() -> None:
    assert nbdlisten.CLIENT_STRUCTURED == _hast.lib.HAST_NBD_STRUCTURED
    assert nbdlisten.CLIENT_READONLY == _hast.lib.HAST_NBD_READONLY


# ---- any bytes, in any pieces ----

OPTIONS = st.one_of(
    st.builds(option, st.integers(0, 12), st.binary(max_size=40)),
    st.builds(go, st.sampled_from([b"", b"vm0", b"vm1"]), st.integers(0, 5), st.integers(0, 5)),
    st.builds(lambda data: option(6, go(data)[16:]), st.sampled_from([b"", b"vm0", b"vm1"])),
    st.builds(option, st.just(6), st.binary(max_size=20)),
    st.sampled_from([option(8), option(3), option(2), option(1, b"vm0"), option(1)]),
    st.binary(max_size=30),
)
STREAMS = st.builds(lambda flags, rest: flags + b"".join(rest), st.sampled_from([FLAGS] * 5 + [b"\0\0\0\7"]),
                    st.lists(OPTIONS, max_size=8))  # fmt: skip


def outcome(pieces: list[bytes]) -> tuple[bytes, State, NbdResult | None, str]:
    """Everything that can be seen of a negotiation that was fed these pieces."""
    machine = NbdNegotiation(EXPORT)
    said = b""
    try:
        for piece in pieces:
            said += b"".join(machine.feed(piece))
    except ProtocolError as error:
        return said, machine.state, machine.result, str(error)
    return said, machine.state, machine.result, ""


@given(STREAMS, st.data())
def test_pieces_do_not_matter(stream: bytes, data: st.DataObject) -> None:
    """Whole, byte by byte, and cut anywhere: the same end. (Replies before a mistake may be lost with it.)"""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    single = outcome([stream[i : i + 1] for i in range(len(stream))])
    for other in (outcome([stream]), outcome([piece for piece in pieces if piece])):
        assert other[1] is single[1]
        assert other[2] == single[2]
        assert bool(other[3]) is bool(single[3])
        assert single[0].startswith(other[0]) if single[3] else other[0] == single[0]


@given(STREAMS)
def test_replies_are_whole_and_answer_what_was_asked(stream: bytes) -> None:
    machine = NbdNegotiation(EXPORT)
    with contextlib.suppress(ProtocolError):
        for i in range(len(stream)):
            replies = machine.feed(stream[i : i + 1])
            if replies and not replies[0].startswith(SIZE):
                assert {parsed(reply)[0] for reply in replies} == {machine._option}
                assert kinds(replies)[-1] not in (SERVER, INFO)
    if machine.state is State.DONE:
        assert machine.result is not None


@given(st.binary(max_size=200))
def test_garbage_never_gets_through(stream: bytes) -> None:
    """Nothing but ProtocolError ever comes out, and the buffer stays small."""
    machine = NbdNegotiation(EXPORT, NbdLimits(option_bytes=64))
    with contextlib.suppress(ProtocolError):
        machine.feed(FLAGS + stream)
    assert len(machine._buffer) <= 300


@given(st.binary(max_size=60))
def test_parse_info_takes_all_or_nothing(data: bytes) -> None:
    found = parse_info(data)
    if found is not None:
        name, wanted = found
        assert data[4 : 4 + len(name)] == name
        count = struct.unpack_from(">H", data, 4 + len(name))[0]
        assert len(wanted) <= count
        assert len(data) == 6 + len(name) + 2 * count


@given(st.binary(max_size=100))
def test_printable(name: bytes) -> None:
    assert printable(name).isprintable()
    assert printable(name).isascii()


# ---- the socket ----


class Handed:
    """Takes clients over, as the worker does."""

    def __init__(self) -> None:
        self.clients: list[tuple[socket.socket, int]] = []

    def __call__(self, connection: socket.socket, flags: int) -> None:
        self.clients.append((connection, flags))


@contextlib.asynccontextmanager
async def listening(path: Path, **how: object) -> AsyncIterator[tuple[NbdListener, Handed]]:
    handed = Handed()
    listener = NbdListener(path, EXPORT, handed, **how)  # type: ignore[arg-type]
    await listener.start()
    try:
        yield listener, handed
    finally:
        await listener.close()
        for connection, _ in handed.clients:
            connection.close()


async def connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_unix_connection(path)
    assert await reader.readexactly(18) == GREETING
    return reader, writer


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


def test_handover(tmp_path: Path) -> None:
    """Negotiated clients are handed over with their flags, and not a byte of theirs is read after that."""
    path = tmp_path / "vm0.sock"

    async def run() -> None:
        async with listening(path) as (listener, handed):
            assert path.stat().st_mode & 0o7777 == 0o600
            _, first = await connect(path)
            first.write(FLAGS + option(8) + go())
            await until(lambda: len(handed.clients) == 1)
            reader, second = await connect(path)
            second.write(FLAGS + option(1))
            assert await reader.readexactly(10) == SIZE + struct.pack(">H", SIMPLE_FLAGS)
            second.write(b"request")
            await until(lambda: len(handed.clients) == 2 and listener.negotiating == 0)
            assert [flags for _, flags in handed.clients] == [1, 0]
            loop = asyncio.get_running_loop()
            assert await loop.sock_recv(handed.clients[1][0], 100) == b"request"
            first.close()
            second.close()
        assert not path.exists()

    asyncio.run(run())


def test_who_breaks_the_rules_or_leaves_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "vm0.sock"

    async def run() -> None:
        async with listening(path) as (listener, handed):
            for stream in (b"\0\0\0\7", FLAGS + b"x" * 16, FLAGS + option(2), FLAGS + go() + b"early"):
                reader, writer = await connect(path)
                writer.write(stream)
                with contextlib.suppress(ConnectionResetError):
                    async with asyncio.timeout(30):
                        await reader.read()
                writer.close()
            _, writer = await connect(path)
            writer.write(FLAGS + b"IHAVE")
            writer.close()
            await until(lambda: listener.negotiating == 0)
            assert handed.clients == []

    asyncio.run(run())


def test_silent_clients_are_closed_in_time(tmp_path: Path) -> None:
    path = tmp_path / "vm0.sock"

    async def run() -> None:
        async with listening(path, clients=3, timeout=0.5) as (listener, _):
            silent = [await connect(path) for _ in range(3)]
            async with asyncio.timeout(30):
                for reader, writer in silent:
                    assert await reader.read() == b""
                    writer.close()
            await until(lambda: listener.negotiating == 0)

    asyncio.run(run())


def test_the_oldest_negotiation_makes_room(tmp_path: Path) -> None:
    """It takes as long as they have to speak, not the whole time that a negotiation may take; those who have negotiated
    stay."""
    path = tmp_path / "vm0.sock"

    async def run() -> None:
        async with listening(path, clients=3, timeout=60, grace=0.02) as (listener, handed):
            _, early = await connect(path)
            early.write(FLAGS + go())
            await until(lambda: len(handed.clients) == 1)
            silent = [await asyncio.open_unix_connection(path) for _ in range(40)]
            _, late = await connect(path)
            late.write(FLAGS + go())
            await until(lambda: len(handed.clients) == 2)
            assert listener.negotiating <= 3
            async with asyncio.timeout(30):
                for reader, _ in silent[:37]:
                    assert (await reader.read()) in (b"", GREETING)
            assert handed.clients[0][0].fileno() >= 0
            for writer in (early, late, *(writer for _, writer in silent)):
                writer.close()

    asyncio.run(run())


def test_no_negotiation_makes_room_before_it_could_speak(tmp_path: Path) -> None:
    path = tmp_path / "vm0.sock"

    async def run() -> None:
        async with listening(path, clients=3, timeout=60, grace=60) as (listener, handed):
            clients = [await connect(path) for _ in range(3)]
            waiting = [await asyncio.open_unix_connection(path) for _ in range(40)]
            for _, writer in clients:
                writer.write(FLAGS + go())
            await until(lambda: len(handed.clients) == 3)
            async with asyncio.timeout(30):
                assert await waiting[0][0].readexactly(18) == GREETING
            await until(lambda: listener.negotiating == 3)
            for _, writer in (*clients, *waiting):
                writer.close()

    asyncio.run(run())


def test_a_client_that_cannot_be_handed_over_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "vm0.sock"

    def refuse(connection: socket.socket, flags: int) -> None:
        raise TemporaryError("the ggate stage is being restarted")

    async def run() -> None:
        listener = NbdListener(path, EXPORT, refuse)
        await listener.start()
        reader, writer = await connect(path)
        writer.write(FLAGS + go())
        async with asyncio.timeout(30):
            await reader.read()
        writer.close()
        await listener.close()

    asyncio.run(run())


def test_closing_ends_negotiations(tmp_path: Path) -> None:
    path = tmp_path / "vm0.sock"

    async def run() -> None:
        async with listening(path) as (listener, _):
            reader, writer = await connect(path)
            await listener.close()
            assert not path.exists()
            assert listener.negotiating == 0
            async with asyncio.timeout(30):
                assert await reader.read() == b""
            writer.close()

    asyncio.run(run())


def test_dead_sockets_are_replaced_and_living_ones_are_not(tmp_path: Path) -> None:
    path = tmp_path / "vm0.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def run() -> None:
        async with listening(path):
            with pytest.raises(TemporaryError, match="another hastd is serving it"):
                await NbdListener(path, EXPORT, Handed()).start()
            _, writer = await connect(path)
            writer.close()
        assert list(tmp_path.iterdir()) == []

    asyncio.run(run())


def test_a_socket_that_is_not_ours_any_more_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "vm0.sock"

    async def run() -> None:
        async with listening(path):
            path.unlink()
            path.write_text("somebody else's")
        assert path.read_text() == "somebody else's"

    asyncio.run(run())


def test_what_cannot_be_a_socket(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")

    async def start(path: Path) -> None:
        await NbdListener(path, EXPORT, Handed()).start()

    with pytest.raises(SystemCallError, match="a file that is no socket"):
        asyncio.run(start(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(SystemCallError, match="No such file"):
        asyncio.run(start(tmp_path / "missing" / "vm0.sock"))
    with pytest.raises(SystemCallError, match="shorter rundir"):
        asyncio.run(start(tmp_path / ("x" * 110)))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
