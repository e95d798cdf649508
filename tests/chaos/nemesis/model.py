"""What a disk may hold: for each cell the values that a reader may be given, by what its client was acknowledged.

A cell is a few sectors, a value is the number of the mutation that wrote it (0: zeros), and what stands in a cell says
of which value and which cell it is, in every sector. Mutations may be under way at the same time and overlap.

Invariants:
- A read may be given a value that was possible at some moment between its request and its answer, and no other.
- An acknowledged mutation ends every value that was complete before it was asked for, except in a world where an
  acknowledgement means less: fork().
- A mutation without an answer, or with an error, may have happened or not, until a later one covers it.
- Each step has a number; nothing here knows of time, sockets or nodes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

SECTOR = 512
_PATTERN = struct.Struct("<QQ")


class Kind:
    """Requests by their NBD numbers."""

    READ, WRITE, FLUSH, TRIM, ZEROES = 0, 1, 3, 4, 6


MUTATIONS = (Kind.WRITE, Kind.TRIM, Kind.ZEROES)
NAMES = {Kind.READ: "read", Kind.WRITE: "write", Kind.FLUSH: "flush", Kind.TRIM: "trim", Kind.ZEROES: "write-zeroes"}


class WrongDataError(Exception):
    """A reader was given what it must not be given."""


def sector(value: int, cell: int) -> bytes:
    """What each sector of the cell holds after the mutation `value`."""
    return _PATTERN.pack(value, cell) * (SECTOR // _PATTERN.size) if value else bytes(SECTOR)


def value_of(data: bytes, cell: int) -> int | None:
    """The value that one sector shows; None when it is none of this cell's."""
    value, place = _PATTERN.unpack_from(data)
    return value if data == sector(value, cell) and place in (cell, 0) else None


@dataclass(eq=False)
class Op:
    """A request: `value` is what it writes, `begun` the step of its start; `allowed` is what a read may be given,
    `raced` the cells that were being written meanwhile."""

    kind: int
    first: int = 0
    count: int = 0
    fua: bool = False
    value: int = 0
    begun: int = 0
    allowed: dict[int, set[int]] = field(default_factory=dict)
    raced: set[int] = field(default_factory=set)

    @property
    def cells(self) -> range:
        return range(self.first, self.first + self.count)

    def __str__(self) -> str:
        where = f" of cells {self.first} to {self.first + self.count - 1}" if self.count else ""
        return f"{NAMES[self.kind]}{' (fua)' if self.fua else ''}{where} as {self.value}"


@dataclass
class Entry:
    """A possible value: `ended` is the step of its acknowledgement; maybe: it has none."""

    ended: int = 0
    maybe: bool = False


class Model:
    """`size` cells of `cell` bytes, all zeros at first."""

    def __init__(self, size: int, cell: int) -> None:
        self.size, self.cell = size, cell
        self.step = 0
        self._possible: dict[int, dict[int, Entry]] = {}
        self._open: dict[int, set[Op]] = {}  # cell -> mutations and reads under way there
        self._old: dict[int, list[tuple[int, int]]] = {}  # cell -> values that ended, and when
        self._flushed = 0  # the last step that an acknowledged flush covers

    def __len__(self) -> int:
        """Cells that were ever touched."""
        return len(self._possible)

    def possible(self, cell: int) -> dict[int, Entry]:
        return self._possible.setdefault(cell, {0: Entry()})

    def data(self, op: Op) -> bytes:
        """What a write carries."""
        return b"".join(sector(op.value, cell) * (self.cell // SECTOR) for cell in op.cells)

    # ---- requests ----

    def begin(self, op: Op) -> None:
        """It is sent, or is about to be."""
        self.step += 1
        op.begun = self.step
        for cell in op.cells:
            others = self._open.setdefault(cell, set())
            if op.kind == Kind.READ:
                writing = {o.value for o in others if o.kind != Kind.READ}
                op.allowed[cell] = {*self.possible(cell), *writing}
                if writing:
                    op.raced.add(cell)
            else:
                for other in others:
                    if other.kind == Kind.READ:
                        other.allowed[cell].add(op.value)
                        other.raced.add(cell)
            others.add(op)

    def end(self, op: Op, data: bytes = b"") -> None:
        """It is acknowledged. Raises WrongDataError."""
        self.step += 1
        self._close(op)
        if op.kind == Kind.FLUSH:
            self._flushed = max(self._flushed, op.begun)
        for cell in op.cells:
            if op.kind == Kind.READ:
                at = (cell - op.first) * self.cell
                self._read(op, cell, data[at : at + self.cell])
            else:
                self._mutated(op, cell)

    def lost(self, op: Op) -> None:
        """It failed, or will never be answered."""
        self.step += 1
        self._close(op)
        if op.kind in MUTATIONS:
            for cell in op.cells:
                self.possible(cell).setdefault(op.value, Entry(self.step, maybe=True))

    def _close(self, op: Op) -> None:
        for cell in op.cells:
            self._open[cell].discard(op)

    def _mutated(self, op: Op, cell: int) -> None:
        possible = self.possible(cell)
        for value in [v for v, entry in possible.items() if entry.ended < op.begun]:
            del possible[value]
            self._old.setdefault(cell, []).append((value, self.step))
        possible[op.value] = Entry(self.step)

    def _read(self, op: Op, cell: int, data: bytes) -> None:
        allowed = op.allowed[cell]
        if cell in op.raced and self._mixed(cell, data, allowed):
            return
        found = self._found(cell, data, allowed, str(op))
        quiet = not any(other.kind != Kind.READ for other in self._open[cell])
        possible = self.possible(cell)
        if len(possible) > 1 and len(found) == 1 and quiet:
            # Who has seen one of two writes that raced has seen which was the later one. What may not have
            # happened at all is not told by that: the other node may have it, or lack it.
            (value,) = found
            entry = possible.get(value)
            if entry is not None and not entry.maybe and all(e.ended < op.begun for e in possible.values()):
                for other in [v for v, e in possible.items() if v != value and not e.maybe]:
                    del possible[other]
                    self._old.setdefault(cell, []).append((other, self.step))

    @staticmethod
    def _mixed(cell: int, data: bytes, allowed: set[int]) -> bool:
        """Whether it is made of allowed values, word by word. A reader who races with a writer may be given some bytes
        of both even within a sector, where the disk is a file in memory."""
        words = struct.unpack(f"<{len(data) // 8}Q", data)
        places = {cell, 0} if 0 in allowed else {cell}
        return allowed.issuperset(words[::2]) and places.issuperset(words[1::2])

    def _found(self, cell: int, data: bytes, allowed: Iterable[int], who: str) -> set[int]:
        """The values that a cell shows. Raises WrongDataError unless each is allowed."""
        allowed = set(allowed)
        for value in allowed:
            if data == sector(value, cell) * (self.cell // SECTOR):
                return {value}
        sectors = [data[at : at + SECTOR] for at in range(0, self.cell, SECTOR)]
        found = [value_of(one, cell) for one in sectors]
        wrong = [n for n, value in enumerate(found) if value is None or value not in allowed]
        if wrong:
            shown = found[wrong[0]]
            what = "something that was never written there" if shown is None else f"value {shown}"
            if shown is None:
                what += f" ({sectors[wrong[0]][:32].hex()}...)"
            raise WrongDataError(
                f"{who}: cell {cell} (offset {cell * self.cell}), sector {wrong[0]}, holds {what},"
                f" allowed are {sorted(allowed)}; before that: {self._old.get(cell, [])[-5:]}"
            )
        return {value for value in found if value is not None}

    # ---- of the whole ----

    def fork(self, floor: int | None) -> Model:
        """The model of another copy of the disk, as its next client has it: nothing is under way there.

        floor: None for a copy that has all that was acknowledged; else a step, acknowledgements after which may be
        missing in the copy: 0 for all since pin(), `flushed` for all that no flush covers.
        """
        new = Model(self.size, self.cell)
        new.step = self.step + 1
        new._flushed = new.step
        for cell in {*self._possible, *self._open}:
            entries = {value: Entry(new.step, entry.maybe) for value, entry in self.possible(cell).items()}
            for op in self._open.get(cell, ()):
                if op.kind != Kind.READ:
                    entries.setdefault(op.value, Entry(new.step, maybe=True))
            for value, ended in self._old.get(cell, ()) if floor is not None else ():
                if ended > floor:
                    entries.setdefault(value, Entry(new.step))
            new._possible[cell] = entries
            new._old[cell] = list(self._old.get(cell, ()))
        return new

    @property
    def flushed(self) -> int:
        """The step that the last acknowledged flush covers."""
        return self._flushed

    def look(self, cell: int, data: bytes, who: str) -> set[int]:
        """The values that the cell shows to a reader who is alone. Raises WrongDataError."""
        return self._found(cell, data, self.possible(cell), who)

    def pin(self, cell: int, data: bytes, who: str) -> None:
        """All is in sync, nothing is under way, and this is what the cell holds: nothing else is possible from now on,
        and nothing older comes back. Raises WrongDataError."""
        assert not self._open.get(cell), "requests are under way"
        found = self._found(cell, data, self.possible(cell), who)
        self.step += 1
        self._possible[cell] = {value: Entry(self.step) for value in found}
        self._old.pop(cell, None)

    def maybes(self) -> int:
        """Values of which nobody knows whether they were written."""
        return sum(entry.maybe for entries in self._possible.values() for entry in entries.values())
