"""The arena: its layout for any geometry, and its life as an object that nobody can find."""

from __future__ import annotations

import dataclasses
import mmap
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hast.errors import DataError, HastError, SystemCallError
from hast.ffi import _hast
from hast.shm.arena import Arena, Geometry

ffi, lib = _hast.ffi, _hast.lib

MAP_NORESERVE = 0x4000  # Linux; the mmap module has no name for it
GEOMETRY = Geometry(
    datasize=1 << 40,
    data_offset=1 << 20,
    extentsize=2 << 20,
    mapsize=1 << 16,
    keepdirty=64,
    nclient=256,
    nsync=32,
    slab_size=131072,
)
SMALL = dataclasses.replace(GEOMETRY, datasize=64 << 20, mapsize=512, nclient=6, nsync=2, slab_size=4096)


def ceil(value: int, unit: int) -> int:
    return (value + unit - 1) // unit


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    extentsize = 1 << draw(st.integers(9, 31))
    extents = draw(st.integers(1, 1 << 20))
    datasize = max(512, (extents - 1) * extentsize + 512 * draw(st.integers(1, extentsize // 512)))
    mapsize = ceil(ceil(ceil(datasize, extentsize), 8), 512) * 512 + 64 * draw(st.integers(0, 100))
    return Geometry(
        datasize=datasize,
        data_offset=4096 + ceil(mapsize, 512) * 512 + 512 * draw(st.integers(0, 100)),
        extentsize=extentsize,
        mapsize=mapsize,
        keepdirty=draw(st.integers(1, 1 << 20)),
        nclient=draw(st.integers(1, 32768)),
        nsync=draw(st.integers(0, 16384)),
        slab_size=4096 * draw(st.integers(1, 64)),
    )


def areas(c: object) -> list[tuple[str, int, int]]:
    """Name, offset and size of everything in an arena, from what C says of each kind's size."""
    a = ffi.cast("struct hast_arena *", c)
    ring = lib.hast_ring_size(a.ring_entries)
    mapsize = int(a.geo.mapsize)
    found = [
        ("header", 0, ffi.sizeof("struct hast_arena")),
        ("bio", a.bio_off, a.nslots * ffi.sizeof("struct hast_bio")),
        ("seq", a.seq_off, ffi.sizeof("struct hast_seq")),
        ("active", a.active_off, a.nslots * 4),
        ("ack", a.ack_off, ring),
        ("keep", a.keep_off, (a.geo.keepdirty + 1) * ffi.sizeof("struct hast_keep")),
        ("extent", a.extent_off, a.nextents * ffi.sizeof("struct hast_extent")),
        ("dirty", a.dirty_off, mapsize),
        ("ondisk", a.ondisk_off, mapsize),
        ("sync", a.sync_off, mapsize),
        ("changed", a.changed_off, ceil(mapsize, 4096)),
        ("slab", a.slab_off, a.nslots * int(a.geo.slab_size)),
        ("trace", a.trace_off, lib.hast_trace_size()),
    ]
    found += [(f"ring {n}", a.ring_off[n], ring) for n in range(lib.HAST_RINGS)]
    return sorted(((name, int(at), int(size)) for name, at, size in found), key=lambda area: area[1])


@settings(max_examples=60, deadline=None)
@given(geometries())
def test_layout(geometry: Geometry) -> None:
    """Every area is aligned, inside, and its own."""
    size = geometry.arena_size()
    assert size > 0
    assert size % 4096 == 0
    # Not by create(): memory that is only looked at costs nothing when it is not backed beforehand.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    base = ffi.from_buffer(memory)
    a = ffi.cast("struct hast_arena *", base)
    assert lib.hast_arena_init(a, geometry.to_c()) == 0
    assert lib.hast_arena_check(a, size) == 0
    assert a.nextents == ceil(geometry.datasize, geometry.extentsize)
    assert 1 << a.extent_shift == geometry.extentsize
    assert a.ring_entries >= 2 * a.nslots
    assert a.ring_entries & (a.ring_entries - 1) == 0
    end = 0
    for name, offset, length in areas(a):
        assert offset >= end, f"{name} begins in what is before it"
        assert offset % (4096 if name in ("slab", "trace") else 64) == 0, name
        end = offset + length
    assert end == a.size == size
    last = a.nslots - 1
    assert lib.hast_arena_bio(a, last).slot == last
    ffi.release(base)
    memory.close()


@given(st.data())
def test_any_numbers_are_laid_out_or_refused(data: st.DataObject) -> None:
    """Whatever stands in damaged metadata: a layout that holds everything, or none."""
    limits = [2**64, 2**64, *[2**32] * 6]
    numbers = st.one_of(st.integers(0, 31).map(lambda n: 1 << n), st.integers(0, 2**32 - 1), st.integers(0, 2**65))
    geometry = Geometry(*(data.draw(numbers) for _ in limits))
    size = geometry.arena_size()
    if size:
        fields = dataclasses.astuple(geometry)
        assert all(value < limit for value, limit in zip(fields, limits, strict=True))
        extents = ceil(geometry.datasize, geometry.extentsize)
        slots = geometry.nclient + geometry.nsync + 2
        assert geometry.mapsize * 8 >= extents
        assert size > slots * geometry.slab_size + 3 * geometry.mapsize + extents * 16 + geometry.keepdirty * 16


@pytest.mark.parametrize(
    "wrong",
    [
        {"datasize": 0},
        {"datasize": 1000},
        {"datasize": 2**64 - 512},
        {"datasize": 2**64},
        {"datasize": -512},
        {"extentsize": 0},
        {"extentsize": 256},
        {"extentsize": 3 << 20},
        {"mapsize": 0},
        {"mapsize": 100},
        {"mapsize": 32768},
        {"mapsize": 2**32 - 64},
        {"data_offset": 4096},
        {"data_offset": (1 << 20) + 1},
        {"data_offset": 2**63},
        {"keepdirty": 0},
        {"keepdirty": 2**31},
        {"nclient": 0},
        {"nclient": 40000},
        {"nsync": 2**32},
        {"slab_size": 512},
        {"slab_size": 4096 + 512},
        {"slab_size": 128 << 20},
    ],
    ids=str,
)
def test_impossible_geometry_is_refused(wrong: dict[str, int]) -> None:
    geometry = dataclasses.replace(GEOMETRY, **wrong)
    assert geometry.arena_size() == 0
    with pytest.raises(DataError, match="resource shared: no shared memory can be laid out"):
        Arena.create(geometry, "shared")


def test_a_huge_map_has_room_for_its_blocks() -> None:
    """Rounding the size of the largest map up to blocks once wrapped at 2^32."""
    geometry = dataclasses.replace(SMALL, mapsize=2**32 - 64, data_offset=1 << 33)
    blocks = ceil(geometry.mapsize, 4096)
    assert geometry.arena_size() >= 3 * geometry.mapsize + blocks


def test_it_has_no_name() -> None:
    arena = Arena.create(SMALL, "r")
    assert os.fstat(arena.fd).st_nlink == 0
    assert os.fstat(arena.fd).st_mode & 0o777 == 0o600
    assert not os.get_inheritable(arena.fd)
    arena.close()


def test_descriptors_come_back() -> None:
    before = open_files()
    for _ in range(3):
        arena = Arena.create(SMALL, "r")
        Arena.attach(arena.fd).close()
        arena.close()
        arena.close()
        with pytest.raises(ValueError, match="closed"):
            arena.bio(0)
    assert open_files() == before


def test_slabs_take_memory_when_they_are_used() -> None:
    arena = Arena.create(GEOMETRY, "r")
    slab_off = int(arena.c.slab_off)
    backed = os.fstat(arena.fd).st_blocks * 512
    assert slab_off <= backed < slab_off + (1 << 20)  # all before the slabs, and none of their 36 MiB
    assert arena.size - slab_off > 30 << 20
    arena.slab(arena.nslots - 1)[:1] = b"x"
    assert os.fstat(arena.fd).st_blocks * 512 > backed
    arena.close()


def test_views_and_pointers_show_the_same_memory() -> None:
    arena = Arena.create(SMALL, "r")
    assert arena.geometry == SMALL
    assert arena.nslots == 10
    assert [arena.bio(slot).slot for slot in range(10)] == list(range(10))
    for slot in range(10):
        slab = arena.slab(slot)
        assert len(slab) == SMALL.slab_size
        slab[:] = bytes([slot + 1]) * len(slab)
    for slot in range(10):
        c = ffi.cast("uint8_t *", lib.hast_arena_slab(arena.c, slot))
        assert {c[0], c[SMALL.slab_size - 1]} == {slot + 1}
    assert len(arena.dirty) == len(arena.ondisk) == len(arena.sync) == SMALL.mapsize
    arena.load_map(b"\x81" + bytes(SMALL.mapsize - 1))
    assert arena.dirty[0] == arena.sync[0] == 0x81
    assert arena.ring_used(lib.HAST_RING_DISK) == 0
    lib.hast_ring_push_some(arena.ring(lib.HAST_RING_DISK), ffi.new("uint32_t[]", [1, 2, 3]), 3)
    assert arena.ring_used(lib.HAST_RING_DISK) == 3
    arena.stage(lib.HAST_STAGE_DISK).ops = 5
    assert arena.c.stage[lib.HAST_STAGE_DISK].ops == 5
    arena.bell(lib.HAST_STAGE_DISK).wakes = 6
    assert arena.c.bell[lib.HAST_STAGE_DISK].wakes == 6
    assert arena.seq.inuse == 0
    view = arena.slab(0)
    arena.close()
    assert view[0] == 1  # the mapping lives as long as the view


def test_indices_are_checked() -> None:
    arena = Arena.create(SMALL, "r")
    for bad in (-1, arena.nslots, 2**32):
        with pytest.raises(IndexError):
            arena.bio(bad)
        with pytest.raises(IndexError):
            arena.slab(bad)
        with pytest.raises(IndexError):
            arena.ring(bad)
        with pytest.raises(IndexError):
            arena.bell(bad)
        with pytest.raises(IndexError):
            arena.stage(bad)
    with pytest.raises(DataError, match="an activemap of 512 bytes"):
        arena.load_map(bytes(511))
    arena.close()


def test_another_process_gets_it_by_descriptor() -> None:
    """A child that does not have the mapping: the descriptor comes by SCM_RIGHTS."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(60)
            ours.close()
            _, fds, _, _ = socket.recv_fds(theirs, 16, 1)
            there = Arena.attach(fds[0])
            there.slab(3)[:5] = b"hello"
            there.bio(3).length = 5
            lib.hast_ring_push_some(there.ring(lib.HAST_RING_DISK_DONE), ffi.new("uint32_t[]", [3]), 1)
            code = 0
        finally:
            os._exit(code)
    theirs.close()
    arena = Arena.create(SMALL, "r")
    socket.send_fds(ours, [b"arena"], [arena.fd])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    slot = ffi.new("uint32_t *")
    assert lib.hast_ring_pop_some(arena.ring(lib.HAST_RING_DISK_DONE), slot, 1) == 1
    assert bytes(arena.slab(slot[0])[: arena.bio(slot[0]).length]) == b"hello"
    ours.close()
    arena.close()


def test_foreign_memory_is_refused(tmp_path: Path) -> None:
    arena = Arena.create(SMALL, "r")
    whole = os.pread(arena.fd, arena.size, 0)
    slabs, traces = (int(at).to_bytes(8, "little") for at in (arena.c.slab_off, arena.c.trace_off))
    arena.close()
    cases = {
        "empty": b"",
        "short": whole[:100],
        "zeros": bytes(len(whole)),
        "cut": whole[:-4096],
        "longer": whole + bytes(4096),
        "other version": whole[:8] + (99).to_bytes(4, "little") + whole[12:],
        "slabs elsewhere": whole.replace(slabs, bytes(8), 1),
        "traces elsewhere": whole.replace(traces, bytes(8), 1),
        "garbage": bytes(range(256)) * (len(whole) // 256),
    }
    for name, content in cases.items():
        assert content != whole, name
        path = tmp_path / "memory"
        path.write_bytes(content)
        with path.open("r+b") as file, pytest.raises(DataError, match=f"descriptor {file.fileno()} is not"):
            Arena.attach(file.fileno())
            pytest.fail(f"{name} was taken for an arena")
    path.write_bytes(whole)
    with path.open("r+b") as file:
        Arena.attach(file.fileno()).close()  # what is refused above is refused for what was changed


def test_what_is_no_memory_is_refused() -> None:
    reader, writer = os.pipe()
    with pytest.raises(DataError, match="not shared memory"):
        Arena.attach(reader)
    os.close(reader)
    os.close(writer)
    with pytest.raises(SystemCallError, match="cannot map"):
        Arena.attach(reader)


def in_child(limit: int, value: int) -> tuple[int, str]:
    """Arena.create() under a resource limit. The exit code: 0 made, 3 refused with one line, which comes too."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(60)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            fds = open_files()
            soft, hard = resource.getrlimit(limit)
            resource.setrlimit(limit, (value, hard))
            try:
                Arena.create(GEOMETRY, "shared")
                code = 0
            except HastError as error:
                resource.setrlimit(limit, (soft, hard))
                os.write(writer, str(error).encode())
                code = 3 if open_files() == fds else 4
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def test_no_memory_is_one_clear_line() -> None:
    """The size that a file may have stands for memory that is not there, the address space for mmap."""
    code, text = in_child(resource.RLIMIT_FSIZE, 1 << 20)
    assert code == 3, text
    size = GEOMETRY.arena_size()
    assert text.startswith(f"shared: cannot get {size} bytes of shared memory: ")
    assert "\n" not in text
    code, text = in_child(resource.RLIMIT_AS, 1 << 20)
    assert code == 3, text
    assert f"cannot get {size} bytes" in text
    code, text = in_child(resource.RLIMIT_NOFILE, 3)
    assert code == 3, text
    assert f"cannot get {size} bytes" in text


FULL = """
import os, sys
from hast.shm.arena import Arena
from tests.shm.test_arena import GEOMETRY
assert os.statvfs("/dev/shm").f_blocks * 4096 == 1 << 20
arena = Arena.create(GEOMETRY, "shared")
assert arena.size > 2 << 20
memoryview(arena._memory)[:] = bytes(arena.size)
sys.exit(3)
"""


@pytest.mark.root
def test_a_full_dev_shm_does_not_matter(tmp_path: Path) -> None:
    """A /dev/shm of 1 MiB, as containers may have it, in a mount namespace of its own: all of an arena can be used."""
    mount = "mount -t tmpfs -o size=1m none /dev/shm"
    probe = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, text=True, timeout=60)
    if probe.returncode != 0:
        pytest.skip(f"no mount namespace: {probe.stderr.strip()}")
    script = tmp_path / "full.py"
    script.write_text(FULL)
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$0" "$1"', sys.executable, str(script)]
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={"PYTHONPATH": root})
    assert done.returncode == 3, done.stderr
