"""Builds of the sequencer other than the one in the extension: with a mistake put in, or under sanitizers.

A mistake is a replacement in a copy of a source file. What is to be replaced has to be there exactly once, so that a
test whose mistake does not fit the code any more fails, and does not go on proving nothing.
"""

from __future__ import annotations

import subprocess
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cffi import FFI

from hast.ffi import build
from tests.sim.harness import Library, Sequencer

HEADERS = ("ring.h", "doorbell.h", "arena.h", "seq.h")
SANITIZE = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


def sources() -> list[Path]:
    """What the sequencer needs, and nothing else of the extension."""
    return sorted([*build.HERE.glob("seq*.c"), *(build.HERE / name for name in ("arena.c", "ring.c", "doorbell.c"))])


@dataclass(frozen=True)
class Mistake:
    """In a source file: old, which stands there once, becomes new."""

    name: str
    file: str
    old: str
    new: str

    def text(self) -> str:
        text = (build.HERE / self.file).read_text()
        count = text.count(self.old)
        assert count == 1, f"{self.name}: {self.file} has {count} times:\n{self.old}"
        return text.replace(self.old, self.new)


def compile_one(source: Path, target: Path, flags: tuple[str, ...]) -> None:
    command = ["cc", "-std=c11", "-D_GNU_SOURCE", "-fPIC", f"-I{build.HERE}", *flags]
    subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)


def compile_all(directory: Path, flags: tuple[str, ...] = ("-O0",)) -> dict[str, Path]:
    """Object files by the name of their source."""
    objects = {}
    for source in sources():
        objects[source.name] = directory / f"{source.stem}.o"
        compile_one(source, objects[source.name], flags)
    return objects


def link(
    directory: Path, objects: dict[str, Path], mistake: Mistake | None = None, flags: tuple[str, ...] = ("-O0",)
) -> Path:
    """A shared library of these objects, one of them compiled anew with the mistake."""
    objects = dict(objects)
    name = mistake.name if mistake is not None else "plain"
    if mistake is not None:
        changed = directory / f"{name}_{mistake.file}"
        changed.write_text(mistake.text())
        objects[mistake.file] = changed.with_suffix(".o")
        compile_one(changed, objects[mistake.file], flags)
    target = directory / f"{name}.so"
    command = ["cc", "-shared", *flags, "-o", str(target), *map(str, objects.values()), "-pthread"]
    subprocess.run(command, check=True)
    return target


def load(path: Path, *, guarded: bool = False) -> Library:
    """The library through cffi's ABI mode. guarded: under AddressSanitizer, with a Guard for each arena."""
    ffi = FFI()
    for name in HEADERS:
        ffi.cdef(build.declarations(build.HERE / name))
    lib = ffi.dlopen(str(path))
    return Library(ffi, lib, Guard() if guarded else None)


class Guard:
    """Poisons what the sequencer must not touch: gaps between the parts of the arena, and all data but the map's."""

    def __init__(self) -> None:
        self.ffi = FFI()
        self.ffi.cdef(
            "void __asan_poison_memory_region(void *, size_t); void __asan_unpoison_memory_region(void *, size_t);"
        )
        asan: Any = self.ffi.dlopen(None)
        self.poison = getattr(asan, "__asan_poison_memory_region")  # else the name is mangled
        self.clear = getattr(asan, "__asan_unpoison_memory_region")

    def __call__(self, seq: Sequencer) -> None:
        base = int(seq.ffi.cast("uintptr_t", seq.arena))
        weakref.finalize(seq, self.unpoison, base, seq.arena.size)
        for start, end in gaps(seq):
            self.poison(self.ffi.cast("void *", base + start), end - start)

    def unpoison(self, base: int, size: int) -> None:
        self.clear(self.ffi.cast("void *", base), size)


def gaps(seq: Sequencer) -> list[tuple[int, int]]:
    """Offsets in the arena of what is nobody's."""
    a, g, ffi = seq.arena, seq.geometry, seq.ffi
    ring = seq.lib.hast_ring_size(a.ring_entries)
    parts = [
        (a.bio_off, a.nslots * ffi.sizeof("struct hast_bio")),
        (a.seq_off, ffi.sizeof("struct hast_seq")),
        (a.active_off, a.nslots * 4),
        (a.ack_off, ring),
        (a.keep_off, (g.keepdirty + 1) * ffi.sizeof("struct hast_keep")),
        (a.extent_off, a.nextents * ffi.sizeof("struct hast_extent")),
        *((off, g.mapsize) for off in (a.dirty_off, a.ondisk_off, a.sync_off)),
        (a.changed_off, -(-g.mapsize // 4096)),
        *((off, ring) for off in a.ring_off),
        (a.slab_off + seq.map_slot * g.slab_size, g.slab_size),
    ]
    parts.sort()
    found = [(parts[n][0] + parts[n][1], parts[n + 1][0]) for n in range(len(parts) - 1)]
    found.append((parts[-1][0] + parts[-1][1], a.size))
    return [(start, end) for start, end in found if start < end]
