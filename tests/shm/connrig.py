"""The stages of a connection, as their worker starts them; the test is everything else.

Primary is the sequencer's place beside the connection of a primary, which has a process of its own here: it fills
bios, pushes them into RING_SEND and takes them from RING_RECV_DONE. Secondary has the recv stage of a secondary, and
either the disk stage on a file or the test in its place. Wire is a peer on the other end of one connection, which reads
and writes messages by hast/messages.py.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hast.channel import Channel
from hast.ffi import _hast
from hast.messages import MAIN_HEADER, REQUEST_LIMIT, Reply, Request, decode_payload, pack_message, parse_main_header
from hast.nv import decode
from hast.shm.arena import Arena, Geometry
from hast.stages import disk, recv
from hast.stages.context import DISK, GGATE, RECV, ConnSettings, DiskSettings, StageContext
from hast.stages.launch import Child, Entry, start_stage

ffi, lib = _hast.ffi, _hast.lib

SECONDS = 30.0  # for anything that is waited for
KIB, MIB = 1 << 10, 1 << 20
DATASIZE = 64 * MIB
MAPSIZE = 4096
DATA_OFFSET = 4096 + MAPSIZE
READ, WRITE, DELETE, FLUSH = lib.HAST_CMD_READ, lib.HAST_CMD_WRITE, lib.HAST_CMD_DELETE, lib.HAST_CMD_FLUSH
ZERO, MEMSYNC = lib.HAST_BIO_ZERO, lib.HAST_BIO_MEMSYNC
RECEIVED = lib.HAST_EVENT_RECEIVED
LOCAL, REMOTE = lib.HAST_LOCAL, lib.HAST_REMOTE
ENTRIES: dict[int, Entry] = {RECV: recv.run, DISK: disk.run}


def pair(family: str) -> tuple[socket.socket, socket.socket]:
    """Two connected stream sockets: "unix" or "tcp"."""
    if family == "unix":
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    for end in (one, other):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one, other


class Wire:
    """The other end of one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(SECONDS)

    def read(self, n: int) -> bytes:
        """Exactly n bytes."""
        got = bytearray()
        while len(got) < n:
            more = self.sock.recv(n - len(got))
            assert more, f"end of file after {len(got)} of {n} bytes"
            got += more
        return bytes(got)

    def message(self) -> tuple[bytes, bytes]:
        """The next main header and nv, as they came; and the nv alone."""
        main = self.read(MAIN_HEADER.size)
        nv = self.read(parse_main_header(main, REQUEST_LIMIT).size)
        return main + nv, nv

    def request(self) -> tuple[Request, bytes, bytes]:
        """The next request, its data as sent, and all its bytes."""
        header, nv = self.message()
        request = Request.from_nv(decode(nv))
        data = self.read(request.data.size)
        return request, data, header + data

    def written(self) -> tuple[Request, bytes]:
        """The next request and its data, with the transformations undone."""
        request, data, _ = self.request()
        return request, decode_payload(data, request.data, request.length) if request.data.size else b""

    def reply(self) -> tuple[Reply, bytes, bytes]:
        header, nv = self.message()
        reply = Reply.from_nv(decode(nv))
        data = self.read(reply.data.size)
        return reply, data, header + data

    def say(self, raw: bytes) -> None:
        self.sock.sendall(raw)

    def answer(self, reply: Reply, data: bytes = b"", version: int = 2) -> None:
        self.say(pack_message(version, reply.to_nv(), data))

    def ask(self, request: Request, data: bytes = b"", version: int = 2) -> None:
        self.say(pack_message(version, request.to_nv(), data))

    def at_end(self) -> bool:
        """Whether nothing more comes and the other side has closed."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True

    def silent(self) -> bool:
        """Whether nothing is there to be read now."""
        return not select.select([self.sock], [], [], 0)[0]

    def close(self) -> None:
        self.sock.close()


@dataclass
class Stage:
    child: Child
    channel: Channel
    lost: dict[str, Any] | None = None
    events: list[str] = field(default_factory=list)


@dataclass
class Done:
    """A completion: of which slot, whether it was only "received", its errno, what the slab holds."""

    slot: int
    received: bool
    error: int
    data: bytes


class Rig:
    """The arena and the stages of one role."""

    role = ""

    def __init__(self, nclient: int = 64, nsync: int = 4, slab_size: int = 128 * KIB, datasize: int = DATASIZE) -> None:
        geometry = Geometry(datasize, DATA_OFFSET, 1 * MIB, MAPSIZE, 8, nclient, nsync, slab_size)
        self.arena = Arena.create(geometry, "data")
        self.bells = {
            stage: os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for stage in (GGATE, DISK, RECV)
        }
        self.stages: dict[int, Stage] = {}

    def start(self, stage: int, conn: ConnSettings | None = None, disk: DiskSettings | None = None) -> None:
        ours, theirs = Channel.pair("stage")
        context = StageContext("data", self.role, stage, self.arena, theirs, self.bells, disk, conn)
        self.stages[stage] = Stage(start_stage(context, ENTRIES[stage], ours), ours)
        self.until(lambda: "up" in self.stages[stage].events, stage)

    def until(self, done: Callable[[], bool], stage: int) -> None:
        """Take messages of the stage until done()."""
        deadline = time.monotonic() + SECONDS
        while not done():
            received = self.stages[stage].channel.recv(timeout=max(0.0, deadline - time.monotonic()))
            assert received is not None, f"stage {stage} has ended"
            message = received[0]
            self.stages[stage].events.append(message["event"])
            if message["event"] == "lost":
                assert self.stages[stage].lost is None, "it was reported lost twice"
                self.stages[stage].lost = message

    def lost(self, stage: int) -> tuple[int, str]:
        """Wait until the stage reports the connection lost: the errno and the sentence."""
        self.until(lambda: self.stages[stage].lost is not None, stage)
        lost = self.stages[stage].lost
        assert lost is not None
        assert lost["why"], "there is no reason"
        return lost["errno"], lost["why"]

    def news(self) -> list[dict[str, Any]]:
        """What the stages have said and nobody has taken, for messages."""
        said = []
        for stage in self.stages.values():
            with suppress(TimeoutError):
                while (received := stage.channel.recv(timeout=0)) is not None:
                    said.append(received[0])
        return said

    def sleeps(self, stage: int) -> int:
        """How often the stage has waited."""
        return int(self.arena.c.stage[stage].sleeps)

    def alive(self) -> bool:
        """Whether every stage still runs, and none has reported anything unexpected."""
        return all(not select.select([s.child.pidfd], [], [], 0)[0] for s in self.stages.values())

    def stop(self, stage: int) -> None:
        """Tell it to stop, wait for its end; its exit code must be 0."""
        self.stages[stage].channel.send({"cmd": "stop"})
        self.ends(stage)

    def ends(self, stage: int, code: int = 0) -> None:
        """It ends by itself, with this exit code."""
        child = self.stages[stage].child
        assert select.select([child.pidfd], [], [], SECONDS)[0], f"stage {stage} does not end"
        assert child.reap() == f"exited with code {code}"
        del self.stages[stage]

    def line(self, stage: int) -> Any:
        return self.arena.c.stage[stage]

    def bio(self, slot: int) -> Any:
        return lib.hast_arena_bio(self.arena.c, slot)

    def slab(self, slot: int) -> Any:
        return ffi.buffer(lib.hast_arena_slab(self.arena.c, slot), self.arena.c.geo.slab_size)

    def push(self, ring: int, stage: int, entries: list[int]) -> None:
        assert lib.hast_ring_push_some(self.arena.ring(ring), entries, len(entries)) == len(entries)
        assert lib.hast_doorbell_ring_out(self.arena.c.bell + stage, self.bells[stage]) == 0

    def pop(self, ring: int, stage: int, n: int) -> list[int]:
        """The next n entries of a ring whose consumer is the test, in the place of `stage`."""
        taken: list[int] = []
        deadline = time.monotonic() + SECONDS
        bell, entries = self.arena.c.bell + stage, ffi.new("uint32_t[]", n)
        while True:
            lib.hast_doorbell_announce(bell)
            got = lib.hast_ring_pop_some(self.arena.ring(ring), entries, n - len(taken))
            assert got >= 0, "the ring is damaged"
            taken += [int(entries[i]) for i in range(got)]
            if len(taken) == n:
                break
            left = deadline - time.monotonic()
            assert left > 0, f"{len(taken)} of {n} entries came; the stages say {self.news()}"
            assert self.alive(), "a stage has ended"
            select.select([self.bells[stage]], [], [], min(left, 1.0))
            lib.hast_doorbell_drain(self.bells[stage])
        lib.hast_doorbell_cancel(bell)
        return taken

    def close(self) -> None:
        for stage in self.stages.values():
            stage.child.kill()
            stage.child.reap()
        self.stages.clear()
        for bell in self.bells.values():
            os.close(bell)
        self.arena.close()


class Primary(Rig):
    """The connection of a primary; the test is the sequencer. `out` and `back` are the secondary's ends."""

    role = "primary"

    def __init__(
        self,
        family: str = "unix",
        version: int = 2,
        compression: str = "none",
        checksum: str = "none",
        timeout: float = SECONDS,
        keepalive: float = SECONDS,
        ends: tuple[socket.socket, socket.socket] | None = None,
        **geometry: int,
    ) -> None:
        super().__init__(**geometry)
        if ends is None:
            (one, out), (two, back) = pair(family), pair(family)
            self.out, self.back = Wire(out), Wire(back)
        else:
            one, two = ends
        with one, two:
            fds = two.fileno(), one.fileno()
            self.start(RECV, ConnSettings(*fds, version, compression, checksum, timeout, keepalive=keepalive))
        self.free = list(range(self.arena.c.nslots))[::-1]
        self.number = 0
        self.with_remote: set[int] = set()

    def fill(self, cmd: int, offset: int = 0, length: int = 0, data: bytes | None = None, flags: int = 0) -> int:
        """A slot with the bio in it, pending there."""
        slot = self.free.pop()
        bio = self.bio(slot)
        self.number += 1
        bio.cmd, bio.flags, bio.offset = cmd, flags, offset
        bio.length = length if data is None else len(data)
        bio.seq = self.number << 16 | slot
        bio.pending = 1 << REMOTE
        bio.error[REMOTE] = 9999
        if data is not None:
            self.slab(slot)[: len(data)] = data
        elif cmd == READ:
            self.slab(slot)[:length] = b"\xee" * length
        self.with_remote.add(slot)
        self.arena.seq.nremote = len(self.with_remote)
        return slot

    def submit(self, cmd: int, offset: int = 0, length: int = 0, data: bytes | None = None, flags: int = 0) -> int:
        slot = self.fill(cmd, offset, length, data, flags)
        self.push(lib.HAST_RING_SEND, RECV, [slot])
        return slot

    def seq(self, slot: int) -> int:
        return int(self.bio(slot).seq)

    def done(self, n: int = 1) -> list[Done]:
        """The next n completions."""
        return [self._done(entry) for entry in self.pop(lib.HAST_RING_RECV_DONE, GGATE, n)]

    def _done(self, entry: int) -> Done:
        slot, received = entry & ~RECEIVED, bool(entry & RECEIVED)
        assert slot in self.with_remote, "a slot came back that the secondary does not have"
        bio = self.bio(slot)
        data = bytes(self.slab(slot)[: bio.length]) if bio.cmd == READ else b""
        done = Done(slot, received, bio.error[REMOTE], data)
        if not received:
            bio.pending = 0
            self.with_remote.remove(slot)
            self.arena.seq.nremote = len(self.with_remote)
            self.free.append(slot)
        return done

    def nothing_done(self) -> bool:
        return self.arena.ring_used(lib.HAST_RING_RECV_DONE) == 0


class Secondary(Rig):
    """The recv stage of a secondary. `into` and `back` are the primary's ends. Without a component the test is the
    disk."""

    role = "secondary"

    def __init__(
        self,
        family: str = "unix",
        version: int = 2,
        compression: str = "none",
        checksum: str = "none",
        timeout: float = SECONDS,
        silence: float = SECONDS,
        ends: tuple[socket.socket, socket.socket] | None = None,
        component: Path | None = None,
        engine: str = "inline",
        nclient: int = 64,
        slab_size: int = 1 * MIB,
        datasize: int = DATASIZE,
    ) -> None:
        super().__init__(nclient=nclient, nsync=0, slab_size=slab_size, datasize=datasize)
        if ends is None:
            (one, into), (two, back) = pair(family), pair(family)
            self.into, self.back = Wire(into), Wire(back)
        else:
            one, two = ends
        if component is not None:
            fd = os.open(component, os.O_RDWR | os.O_CLOEXEC)
            self.start(DISK, disk=DiskSettings(fd, engine, 1))
            os.close(fd)
        with one, two:
            fds = one.fileno(), two.fileno()
            self.start(RECV, ConnSettings(*fds, version, compression, checksum, timeout, silence, max_io=slab_size))
        self.at_disk: list[int] = []

    def disk_takes(self, n: int = 1) -> list[int]:
        """The next n slots that are given to the disk."""
        taken = self.pop(lib.HAST_RING_DISK, DISK, n)
        assert not set(taken) & set(self.at_disk), "the disk was given a slot that it has"
        self.at_disk += taken
        return taken

    def disk_waits(self) -> bool:
        """Whether there is nothing for the disk now."""
        return self.arena.ring_used(lib.HAST_RING_DISK) == 0

    def disk_done(self, *slots: int, error: int = 0) -> None:
        for slot in slots:
            self.at_disk.remove(slot)
            self.bio(slot).error[LOCAL] = error
        self.push(lib.HAST_RING_DISK_DONE, RECV, list(slots))

    def contents(self, slot: int) -> bytes:
        """What a write brings."""
        bio = self.bio(slot)
        return bytes(bio.length) if bio.flags & ZERO else bytes(self.slab(slot)[: bio.length])

    def all_slots_free(self) -> None:
        """No slot is lost: each one comes back, and only once. Waits for those whose replies are on their way."""
        total = self.arena.c.geo.nclient
        deadline = time.monotonic() + SECONDS
        while self.arena.seq.nfree + self.arena.ring_used(lib.HAST_RING_SEND_DONE) != total:
            assert time.monotonic() < deadline, f"{self.arena.seq.nfree} of {total} slots are free"
            time.sleep(0.002)


class Pump:
    """The pump of one role in this very process: for tests that need very many of them, and nobody beside it. What it
    sends goes nowhere."""

    def __init__(self, secondary: bool, nclient: int = 4, slab_size: int = 64 * KIB) -> None:
        self.arena = Arena.create(Geometry(DATASIZE, DATA_OFFSET, MIB, MAPSIZE, 8, nclient, 0, slab_size), "data")
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.control = socket.socketpair()
        ours, self.peer = socket.socketpair()
        out, self.sink = socket.socketpair()
        self.ours = ours, out
        options = {
            "in": ours.fileno(),
            "out": out.fileno(),
            **dict.fromkeys(("own_bell", "seq_bell", "disk_bell"), self.bell),
            "control": self.control[0].fileno(),
            "secondary": int(secondary),
            "version": 2,
            "keepalive_ms": 10000,
            "timeout_ms": 20000,
            "silence_ms": 20000,
            "sector": 512,
            "max_io": slab_size,
        }
        self.c = lib.hast_link_new(self.arena.c, ffi.new("struct hast_conn_options *", options))
        assert self.c != ffi.NULL

    def run(self) -> int:
        """Until the connection is lost: the errno. A test closes the peer's end first."""
        while (result := lib.hast_link_pump(self.c)) != lib.HAST_PUMP_LOST:
            assert result == lib.HAST_PUMP_EVENT
        return int(lib.hast_link_error(self.c))

    def why(self) -> str:
        return str(ffi.string(lib.hast_link_why(self.c)).decode())

    def close(self) -> None:
        lib.hast_link_free(self.c)
        for sock in (*self.control, *self.ours, self.peer, self.sink):
            sock.close()
        os.close(self.bell)
        self.arena.close()
