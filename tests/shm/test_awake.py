"""What the pumps ask of the kernel while they have work (hast/ffi/awake.h): a pipe takes the place of its device."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from hast.ffi import _hast
from hast.shm.arena import Arena, Geometry
from hast.stages import awake

ffi, lib = _hast.ffi, _hast.lib
MIB = 1 << 20
LIMIT = 7
ANY = 2_000_000_000  # us: no demand
SECONDS = 20.0


class Asked:
    """The reader's end of what stands for the device."""

    def __init__(self) -> None:
        self.reader, self.device = os.pipe()

    def next(self) -> int:
        """The next demand, us."""
        ready, _, _ = select.select([self.reader], [], [], SECONDS)
        assert ready, "nothing was asked of the kernel"
        (us,) = struct.unpack("i", os.read(self.reader, 4))
        return int(us)

    def nothing(self) -> bool:
        return not select.select([self.reader], [], [], 0)[0]

    def close(self) -> None:
        for fd in (self.reader, self.device):
            with suppress(OSError):
                os.close(fd)


class Pump:
    """A pump in a thread, with nothing to do: its doorbell is rung, and its control socket closed."""

    def __init__(self, run: Callable[[], int], bell: int, control: socket.socket) -> None:
        self.bell, self.control = bell, control
        self.result: int | None = None
        self.thread = threading.Thread(target=self._run, args=(run,))
        self.thread.start()

    def _run(self, run: Callable[[], int]) -> None:
        self.result = run()

    def ring(self) -> None:
        os.eventfd_write(self.bell, 1)

    def end(self) -> None:
        self.control.close()
        self.thread.join(SECONDS)
        assert self.result == lib.HAST_PUMP_CONTROL


@contextmanager
def ggate(device: int) -> Iterator[Pump]:
    """The pump of a primary."""
    with arena() as shared, bells() as (bell, _), control() as (ours, theirs):
        context = lib.hast_ggate_new(shared.c, bell, theirs.fileno(), -1)
        lib.hast_ggate_awake(context, device, LIMIT)
        pump = Pump(lambda: lib.hast_ggate_pump(context), bell, ours)
        yield pump
        pump.end()
        lib.hast_ggate_free(context)


@contextmanager
def link(device: int) -> Iterator[Pump]:
    """The pump of a secondary."""
    with arena() as shared, bells() as (bell, disk), control() as (ours, theirs), control() as (one, into):
        options = {"in": into.fileno(), "out": into.fileno(), "own_bell": bell, "control": theirs.fileno()}
        options |= {"seq_bell": -1, "disk_bell": disk, "secondary": 1, "version": 2, "sector": 512, "max_io": 131072}
        options |= {"keepalive_ms": 100_000, "timeout_ms": 100_000, "silence_ms": 100_000}
        context = lib.hast_link_new(shared.c, ffi.new("struct hast_conn_options *", options))
        assert context != ffi.NULL, os.strerror(ffi.errno)
        lib.hast_link_awake(context, device, LIMIT)
        pump = Pump(lambda: lib.hast_link_pump(context), bell, ours)
        yield pump
        pump.end()
        lib.hast_link_free(context)
        one.close()


@contextmanager
def arena() -> Iterator[Arena]:
    shared = Arena.create(Geometry(4 * MIB, 8192, MIB, 4096, 2, 16, 4, 131072), "data")
    yield shared
    shared.close()


@contextmanager
def bells() -> Iterator[tuple[int, int]]:
    made = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
    yield made[0], made[1]
    for fd in made:
        os.close(fd)


@contextmanager
def control() -> Iterator[tuple[socket.socket, socket.socket]]:
    pair = socket.socketpair()
    with pair[0], pair[1]:
        yield pair


PUMPS = pytest.mark.parametrize("pump_of", [ggate, link])


@pytest.fixture
def asked() -> Iterator[Asked]:
    made = Asked()
    yield made
    made.close()


@PUMPS
def test_demand_begins_with_work_and_ends_without(pump_of: Any, asked: Asked) -> None:
    with pump_of(asked.device) as pump:
        assert asked.nothing(), "it has had nothing to do"
        for _ in range(3):
            pump.ring()
            assert asked.next() == LIMIT
            assert asked.next() == ANY, "it has had nothing more to do"
        assert asked.nothing()


@PUMPS
def test_demand_is_made_once_while_work_goes_on(pump_of: Any, asked: Asked) -> None:
    with pump_of(asked.device) as pump:
        ringing = threading.Event()

        def ring() -> None:
            while not ringing.is_set():
                pump.ring()

        thread = threading.Thread(target=ring)
        thread.start()
        said = [asked.next()]
        ringing.set()
        thread.join()
        while said[-1] != ANY or not asked.nothing():
            said.append(asked.next())
    # On a busy machine the one that rings may have had to wait: then there is more than one pair.
    assert said == [LIMIT, ANY] * (len(said) // 2)


@PUMPS
def test_device_that_cannot_be_written_is_given_up(pump_of: Any) -> None:
    with Path("/dev/full").open("wb") as full, pump_of(full.fileno()) as pump:
        for _ in range(3):
            pump.ring()


def test_limit_by_what_the_machine_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    governor = tmp_path / "governor"
    monkeypatch.setattr(awake, "GOVERNOR", governor)
    assert awake.limit() == awake.LIMIT_US
    for name, limit in {"menu": awake.LIMIT_US, "haltpoll": awake.GUEST_LIMIT_US}.items():
        governor.write_text(f"{name}\n")
        assert awake.limit() == limit


def test_without_the_device_nothing_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(awake, "DEVICE", tmp_path / "none")
    assert awake.open_device("data") == -1
    with ggate(-1) as pump:
        pump.ring()
