"""Channels: messages and descriptors, whole or not at all; what goes wrong is said and leaks nothing."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from hast.channel import (
    MAX_FDS,
    MAX_MESSAGE,
    Channel,
    ChannelClosedError,
    ChannelFullError,
    DescriptorsLostError,
    close_all,
)
from hast.errors import ProtocolError

Pair = tuple[Channel, Channel]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ends = Channel.pair("test")
    yield ends
    for end in ends:
        end.close()


def open_fds() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir() if entry.exists()}


def raw(channel: Channel) -> socket.socket:
    """The socket itself, to send what Channel would not."""
    return socket.socket(fileno=os.dup(channel.fileno()))


def test_messages_arrive_whole_and_in_order(pair: Pair) -> None:
    messages = [{"n": n, "text": "ä" * (100 * n)} for n in range(20)]
    for message in messages:
        pair[0].send(message)
    assert [pair[1].recv(1) for _ in messages] == [(message, []) for message in messages]


def test_largest_message_passes_and_a_larger_one_is_refused(pair: Pair) -> None:
    room = MAX_MESSAGE - len('{"x":""}')
    pair[0].send({"x": "y" * room})
    received = pair[1].recv(1)
    assert received is not None and len(received[0]["x"]) == room
    with pytest.raises(ProtocolError, match="too large"):
        pair[0].send({"x": "y" * (room + 1)})


def test_descriptors_lead_to_the_same_file_and_do_not_survive_exec(pair: Pair, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("content")
    sent = [os.open(file, os.O_RDONLY) for _ in range(MAX_FDS)]
    pair[0].send({"files": 1}, sent)
    received = pair[1].recv(1)
    assert received is not None
    _, fds = received
    assert len(fds) == MAX_FDS
    assert {os.fstat(fd).st_ino for fd in fds} == {file.stat().st_ino}
    assert not any(os.get_inheritable(fd) for fd in fds)
    close_all([*sent, *fds])


def test_more_descriptors_than_allowed_are_refused(pair: Pair) -> None:
    with pytest.raises(ProtocolError, match="too large"):
        pair[0].send({}, [0] * (MAX_FDS + 1))


def test_too_many_descriptors_are_closed_and_the_next_message_is_read(pair: Pair) -> None:
    before = open_fds()
    with raw(pair[0]) as sock:
        rights = struct.pack(f"{MAX_FDS + 8}i", *[0] * (MAX_FDS + 8))
        sock.sendmsg([b'{"n":1}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    pair[0].send({"next": True})
    with pytest.raises(DescriptorsLostError, match="descriptors were lost") as caught:
        pair[1].recv(1)
    assert caught.value.message == {"n": 1}
    assert pair[1].recv(1) == ({"next": True}, [])
    assert open_fds() == before


@pytest.mark.parametrize(
    "packet", [b"nonsense", b"[1]", b'"text"', b"{", b"\xff\xfe", b"[" * 60000, b"{}" + b" " * MAX_MESSAGE]
)
def test_garbage_is_refused_with_its_descriptors_closed(pair: Pair, packet: bytes) -> None:
    before = open_fds()
    with raw(pair[0]) as sock:
        sock.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", 0))])
    with pytest.raises(ProtocolError):
        pair[1].recv(1)
    assert open_fds() == before


def test_end_of_file_comes_after_the_last_message(pair: Pair) -> None:
    pair[0].send({"last": 1})
    pair[0].close()
    assert pair[1].recv(1) == ({"last": 1}, [])
    assert pair[1].recv(1) is None
    assert pair[1].recv(1) is None


def test_last_words_of_one_who_has_not_read_everything(pair: Pair) -> None:
    """The kernel tells of a reset connection first. What a worker that cannot serve says must not be lost by that."""
    one, other = pair
    one.send({"never": "read"})
    other.send({"last": "words"})
    other.close()
    assert one.recv(timeout=0) == ({"last": "words"}, [])
    assert one.recv(timeout=0) is None


def test_sending_to_one_who_is_gone(pair: Pair) -> None:
    pair[1].close()
    with pytest.raises(ChannelClosedError, match="gone"):
        pair[0].send({})
    with pytest.raises(ChannelClosedError, match="closed"):
        pair[1].send({})
    with pytest.raises(ChannelClosedError, match="closed"):
        pair[1].recv(0)


def test_one_who_does_not_read_never_stops_the_sender(pair: Pair) -> None:
    sent = 0
    with pytest.raises(ChannelFullError):
        for sent in range(100_000):
            pair[0].send({"n": sent})
    for n in range(sent):
        assert pair[1].recv(0) == ({"n": n}, [])
    pair[0].send({"again": True})
    assert pair[1].recv(1) == ({"again": True}, [])


def test_time_limit(pair: Pair) -> None:
    for timeout in (0, 0.01):
        with pytest.raises(TimeoutError):
            pair[1].recv(timeout)


def test_waiting_in_the_event_loop(pair: Pair) -> None:
    async def main() -> None:
        first = asyncio.create_task(pair[1].arecv())
        await asyncio.sleep(0)
        pair[0].send({"n": 1})
        assert await first == ({"n": 1}, [])
        waiting = asyncio.create_task(pair[1].arecv())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        pair[0].send({"n": 2})
        pair[0].close()
        assert await pair[1].arecv() == ({"n": 2}, [])
        assert await pair[1].arecv() is None

    asyncio.run(asyncio.wait_for(main(), 10))
