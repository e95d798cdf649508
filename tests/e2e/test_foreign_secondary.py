"""A secondary that is not one of ours, as FreeBSD's hastd is: without `hast` in the handshake, on a disk that can
neither delete nor flush."""

from __future__ import annotations

import contextlib
import errno
import random
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from hast.activemap import METADATA_SIZE
from hast.handshake import accept_first, answer_second, read_hello
from hast.messages import Cmd, DataInfo, Handshake1Request, Handshake2Request, Reply
from hast.metadata import Metadata, Pair, unpack
from hast.nv import decode
from tests.e2e.node import MIB, Node, eventually, loopback
from tests.nbdclient import FLUSH, TRIM, WRITE_ZEROES, RawClient
from tests.shm.connrig import Wire

SIZE = 16 * MIB
DATA = b"data" * 1024


class Foreign:
    """Listens at `url`; `data` is its disk, `asked` what it was asked to do. `metadata` is to be set before somebody
    comes."""

    def __init__(self) -> None:
        address = loopback(random.randrange(1 << 20))
        self.server = socket.create_server((address, 0))
        self.url = f"tcp4://{address}:{self.server.getsockname()[1]}"
        self.metadata: Metadata | None = None
        self.data = bytearray(SIZE)
        self.asked: list[int] = []
        self.sockets: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _accept(self) -> Wire:
        sock, _ = self.server.accept()
        self.sockets.append(sock)
        return Wire(sock)

    def _serve(self) -> None:
        with contextlib.suppress(OSError, AssertionError):
            one = self._accept()
            first = read_hello(decode(one.message()[1]))
            assert isinstance(first, Handshake1Request) and self.metadata is not None
            version, reply = accept_first(first, bytes(16))
            one.say(reply)
            two = self._accept()
            second = read_hello(decode(two.message()[1]))
            assert isinstance(second, Handshake2Request)
            mapsize = self.metadata.mapsize
            request = replace(second, hast=False)
            one.say(answer_second(request, version, self.metadata, lambda: bytes(mapsize), "none", "none").message)
            while True:
                self._do(one, two)

    def _do(self, one: Wire, two: Wire) -> None:
        request, data = one.written()
        if request.cmd == Cmd.KEEPALIVE:
            return
        self.asked.append(request.cmd)
        if request.cmd == Cmd.READ:
            found = bytes(self.data[request.offset : request.offset + request.length])
            two.answer(Reply(request.seq, data=DataInfo(len(found))), found)
            return
        if request.cmd == Cmd.WRITE:
            self.data[request.offset : request.offset + request.length] = data
        can = request.cmd == Cmd.WRITE
        two.answer(Reply(request.seq, error=0 if can else errno.EOPNOTSUPP))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        for sock in self.sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


@pytest.fixture
def foreign() -> Iterator[Foreign]:
    foreign = Foreign()
    yield foreign
    foreign.close()


def test_a_secondary_that_cannot_delete_and_has_no_cache(make_node: type[Node], foreign: Foreign) -> None:
    """Its deletes would not promise zeros, so it gets none; that it knows no flushes is no failure of its disk."""
    node = make_node({"disk": SIZE}, conf="compression none\ntimeout 5", node_conf=f"remote {foreign.url}")
    node.create()
    known = unpack(node.component().read_bytes()[:METADATA_SIZE], node.name())
    foreign.metadata = replace(known, resuid=0, pair=Pair())
    node.start()
    node.set_role("primary")
    eventually(lambda: "connected to" in node.said(), "they are connected")
    with RawClient(node.socket()) as raw:
        assert raw.write(0, DATA * 4) == 0
        assert raw.do(FLUSH).error == 0
        assert raw.do(TRIM, 0, len(DATA)).error == 0
        assert raw.do(TRIM, SIZE, len(DATA)).error != 0
        assert raw.read(0, len(DATA)) == DATA
        assert raw.do(WRITE_ZEROES, 2 * len(DATA), len(DATA)).error == 0
        assert raw.do(FLUSH).error == 0
    assert foreign.data[: 4 * len(DATA)] == DATA * 2 + bytes(len(DATA)) + DATA
    assert Cmd.FLUSH in foreign.asked and Cmd.DELETE not in foreign.asked
    eventually(lambda: node.status()["status"] == "complete", "both have the same")
    assert " lost: " not in node.said()
    assert node.said().count("takes no flushes") == 1
