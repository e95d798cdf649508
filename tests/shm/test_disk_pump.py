"""The disk stage's pump across processes: every command, every engine, with and without direct I/O; what must hold is
in hast/ffi/disk.h."""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hast.ffi import _hast
from tests.shm import diskrig
from tests.shm.diskrig import (
    DATA_OFFSET,
    DATASIZE,
    DELETE,
    DURABLE,
    FLUSH,
    MAP,
    MAPSIZE,
    NOHOLE,
    READ,
    SLAB,
    WRITE,
    ZERO,
    Rig,
)

lib = _hast.lib

KINDS = [(engine, direct) for engine in ("inline", "uring", "threads") for direct in (False, True)]


def pattern(length: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(length)


class File:
    """The component beneath a rig, as somebody sees it who reads the file."""

    def __init__(self, path: Path, engine: str, direct: bool) -> None:
        if engine == "uring" and not lib.hast_disk_uring_works():
            pytest.skip("io_uring cannot be set up here")
        self.path = path
        self.engine = engine
        self.direct = direct
        path.write_bytes(pattern(DATA_OFFSET + DATASIZE, 0))
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
        except OSError as error:
            pytest.skip(f"no direct I/O on {path.parent}: {error.strerror}")

    def content(self) -> bytes:
        return self.path.read_bytes()

    def start(self, **options: object) -> Rig:
        return diskrig.start(self.fd, self.engine, align=512 if self.direct else 1, **options)  # type: ignore[arg-type]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}{'-direct' if kind[1] else ''}")
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[File]:
    made = File(tmp_path / "component", *request.param)
    yield made
    os.close(made.fd)


@pytest.fixture
def rig(file: File) -> Iterator[Rig]:
    started = file.start()
    yield started
    started.close()


def test_write_and_read(file: File, rig: Rig) -> None:
    model = bytearray(file.content())
    for offset in (0, 512, 65536 - 512, DATASIZE - SLAB):
        for length in (512, 4096, SLAB):
            at = DATA_OFFSET + offset
            assert rig.do(READ, offset, length).data == model[at : at + length]
            data = pattern(length, offset + length)
            assert rig.error(WRITE, offset, data=data) == 0
            model[at : at + length] = data
            assert file.content() == model
            again = rig.do(READ, offset, length)
            assert (again.error, again.data) == (0, data)
    assert rig.stop() == 0


MIB = 1 << 20


def test_zeros_with_and_without_hole(file: File, rig: Rig) -> None:
    model = bytearray(file.content())
    full = file.path.stat().st_blocks

    def zero(cmd: int, offset: int, length: int, flags: int = 0) -> None:
        assert rig.error(cmd, offset, length, flags=flags) == 0
        model[DATA_OFFSET + offset : DATA_OFFSET + offset + length] = bytes(length)
        assert file.content() == model
        assert rig.error(FLUSH) == 0

    # Longer than a slab, which it does not need.
    zero(WRITE, 0, MIB, ZERO | NOHOLE)
    assert file.path.stat().st_blocks >= full, "NOHOLE gave blocks back"
    zero(WRITE, MIB - 512, MIB, ZERO)
    assert file.path.stat().st_blocks < full - 1500, "nothing was given back"
    zero(DELETE, 3 * MIB, MIB - 512)
    assert file.path.stat().st_blocks < full - 3500, "nothing was given back"


def test_map_is_written_where_it_belongs(file: File, rig: Rig) -> None:
    before = file.content()
    last = pattern(4096, 3)
    assert rig.error(MAP, MAPSIZE - 4096, data=last, flags=DURABLE) == 0
    first = pattern(512, 4)
    assert rig.error(MAP, 0, data=first) == 0
    assert file.content() == before[:4096] + first + before[4608 : DATA_OFFSET - 4096] + last + before[DATA_OFFSET:]


def test_flush(rig: Rig) -> None:
    assert rig.error(FLUSH) == 0
    slots = [rig.submit(FLUSH) for _ in range(20)]
    assert {done.error for done in rig.collect(len(slots)).values()} == {0}


INVALID = [
    (0, 0, 512, 0),
    (6, 0, 512, 0),
    (255, 0, 512, 0),
    (READ, 0, 0, 0),
    (WRITE, 0, 0, 0),
    (DELETE, 0, 0, 0),
    (READ, 1, 512, 0),
    (WRITE, 0, 511, 0),
    (READ, 0, SLAB + 512, 0),
    (WRITE, 0, SLAB + 512, 0),
    (READ, DATASIZE, 512, 0),
    (WRITE, DATASIZE - 512, 1024, 0),
    (DELETE, 0, DATASIZE + 512, 0),
    (WRITE, 512, DATASIZE, ZERO),
    (WRITE, 2**64 - 512, 512, ZERO),
    (WRITE, 2**64 - 512, 1024, 0),
    (DELETE, 512, 2**64 - 512, 0),
    (MAP, MAPSIZE, 512, 0),
    (MAP, MAPSIZE - 512, 1024, DURABLE),
    (MAP, 0, 0, 0),
    (MAP, 2**64 - 4096, 4096, 0),
    (MAP, 0, 2**64 - 1, 0),
]


def test_what_is_out_of_range_is_refused(file: File, rig: Rig) -> None:
    before = file.content()
    for cmd, offset, length, flags in INVALID:
        assert rig.error(cmd, offset, length, flags=flags) == errno.EINVAL, (cmd, offset, length, flags)
    assert file.content() == before
    assert rig.error(READ, 0, 512) == 0
    assert rig.stop() == 0


def test_map_that_direct_io_cannot_take_is_refused(file: File, rig: Rig) -> None:
    expected = errno.EINVAL if file.direct else 0
    assert rig.error(MAP, 64, data=bytes(64)) == expected


def wrong_slot(rig: Rig) -> None:
    rig.push([rig.arena.nslots])


def slot_twice(rig: Rig) -> None:
    # Both are in the ring before the pump is woken, so the first cannot have been given back.
    slot = rig.fill(READ, 0, SLAB)
    rig.push([slot, slot])


def wild_index(rig: Rig) -> None:
    ring = lib.hast_arena_ring(rig.arena, lib.HAST_RING_DISK)
    ring.tail = (ring.tail + ring.mask + 2) % 2**32
    assert lib.hast_doorbell_ring_out(rig.arena.bell + lib.HAST_STAGE_DISK, rig.disk_bell) == 0


@pytest.mark.parametrize("damage", [wrong_slot, slot_twice, wild_index])
def test_nonsense_in_the_ring_ends_the_pump(rig: Rig, damage: Callable[[Rig], None]) -> None:
    assert rig.error(READ, 0, 512) == 0
    damage(rig)
    assert rig.child.wait(diskrig.SECONDS) == diskrig.BROKEN


def test_all_slots_at_once(file: File, rig: Rig) -> None:
    model = bytearray(file.content())
    rng = random.Random(7)
    for _ in range(6):
        slots, wanted = [], {}
        # One bio to a 64 KiB stretch: none overlaps another.
        for stretch in rng.sample(range(DATASIZE // 65536), 60):
            offset = stretch * 65536 + 512 * rng.randrange(64)
            length = 512 * rng.randrange(1, 65)
            kind = rng.choice((READ, READ, WRITE, WRITE, DELETE))
            at = DATA_OFFSET + offset
            data = rng.randbytes(length) if kind == WRITE else None
            slot = rig.fill(kind, offset, length, data)
            slots.append(slot)
            if kind == READ:
                wanted[slot] = bytes(model[at : at + length])
            else:
                model[at : at + length] = data if data is not None else bytes(length)
        slots.append(rig.fill(FLUSH))
        rng.shuffle(slots)
        rig.push(slots)
        done = rig.collect(len(slots))
        assert {d.error for d in done.values()} == {0}
        for slot, data in wanted.items():
            assert done[slot].data == data
    assert file.content() == model
    assert rig.line.ops == 6 * 61
    assert rig.line.errors == 0


SECTORS = 256  # of the random test

operation = st.tuples(
    st.sampled_from(["read", "write", "write", "zero", "nohole", "delete", "flush"]),
    st.integers(0, SECTORS - 1),
    st.integers(1, 64),
)


def test_random_operations(file: File, rig: Rig) -> None:
    """Against a bytearray; operations that follow each other without overlap are under way together."""

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(operation, max_size=30), st.integers(0, 2**32))
    def run(operations: list[tuple[str, int, int]], seed: int) -> None:
        rng = random.Random(seed)
        model = bytearray(SECTORS * 512)
        assert rig.error(DELETE, 0, len(model)) == 0
        flying: dict[int, bytes | None] = {}
        touched: list[range] = []

        def settle() -> None:
            for slot, done in rig.collect(len(flying)).items():
                assert done.error == 0
                expected = flying[slot]
                assert expected is None or done.data == expected
            flying.clear()
            touched.clear()

        for kind, first, count in operations:
            part = range(first, min(first + count, SECTORS))
            if any(part.start < other.stop and other.start < part.stop for other in touched):
                settle()
            if kind != "flush":
                touched.append(part)
            at, length = part.start * 512, len(part) * 512
            if kind == "read":
                flying[rig.submit(READ, at, length)] = bytes(model[at : at + length])
                continue
            if kind == "flush":
                flying[rig.submit(FLUSH)] = None
                continue
            data = rng.randbytes(length) if kind == "write" else bytes(length)
            model[at : at + length] = data
            if kind == "write":
                slot = rig.submit(WRITE, at, data=data)
            elif kind == "delete":
                slot = rig.submit(DELETE, at, length)
            else:
                slot = rig.submit(WRITE, at, length, flags=ZERO | (NOHOLE if kind == "nohole" else 0))
            flying[slot] = None
        settle()
        assert file.content()[DATA_OFFSET : DATA_OFFSET + len(model)] == model
        assert len(rig.free) == rig.arena.nslots

    run()
    assert rig.stop() == 0


def test_stop_leaves_nothing_in_flight(file: File, rig: Rig) -> None:
    data = {rig.fill(WRITE, n * 65536, data=pattern(65536, n)): n for n in range(60)}
    rig.push(data)
    assert rig.stop() == 0
    done = []
    while new := rig.pop():
        done += new
    ring = lib.hast_arena_ring(rig.arena, lib.HAST_RING_DISK)
    # Each one was either done or not even taken.
    assert len(done) + lib.hast_ring_used(ring) == len(data)
    assert rig.line.state == 0
    content = file.content()
    for one in done:
        assert one.error == 0
        at = DATA_OFFSET + data[one.slot] * 65536
        assert content[at : at + 65536] == pattern(65536, data[one.slot])


def test_it_ends_when_the_worker_is_gone(rig: Rig) -> None:
    rig.control.close()
    assert rig.child.wait(diskrig.SECONDS) == 0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + diskrig.SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.001)


def test_an_idle_pump_sleeps(rig: Rig) -> None:
    for n in range(5):
        assert rig.error(READ, n * 512, 512) == 0
        bell = rig.arena.bell[lib.HAST_STAGE_DISK]
        wait_until(lambda: rig.line.state == 2 and bell.sleeping == 1)  # noqa: B023
    assert rig.line.bytes == 5 * 512


def test_follows_the_stage_it_works_for(file: File) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    rig = file.start(follow=True)
    try:
        for cpu in (cpus[0], cpus[-1], cpus[0]):
            rig.arena.stage[lib.HAST_STAGE_GGATE].extra[0] = cpu + 1
            # It looks when it wakes; one that has found the next bio without having slept has not looked yet.
            wait_until(lambda: rig.error(READ, 0, 512) == 0 and os.sched_getaffinity(rig.child.pid) == {cpu})  # noqa: B023
        rig.arena.stage[lib.HAST_STAGE_GGATE].extra[0] = 2**40
        assert rig.error(READ, 0, 512) == 0
        assert rig.error(FLUSH) == 0
    finally:
        rig.close()
