"""The way of a read through ggate, out of what that has noted (hast/ffi/trace.h), and how much is done at once.

The client's latency is longer than what ggate sees of it: the rest lies before ggate wakes up and after it has
answered, in the client, the kernel's socket, or the loop device, its workers and the FUSE queue.

Invariant: what a run of events does not show whole, from the wake-up to the answer, does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hast.shm.trace import Event
from perf.fio import Figures
from perf.hops import ADMIT, DID, GOT, IN, OUT, SENDING, SENT, START, WOKE, Bar, Hop, P, Stamps, bars
from perf.tracing import runs

HOPS = (
    Hop(P, "ggate", "awake: those before it", "woke", "asks"),
    Hop(P, "ggate", "receives it", "asks", "got"),
    Hop(P, "ggate", "its turn: of the call", "got", "admit"),
    Hop(P, "ggate", "sequencer", "admit", "in"),
    Hop(P, "ggate", "its turn: others' reads", "in", "start"),
    Hop(P, "ggate", "reads", "start", "did"),
    Hop(P, "ggate", "its turn: others' reads", "did", "out"),
    Hop(P, "ggate", "its turn: others' answers", "out", "sending"),
    Hop(P, "ggate", "answers", "sending", "sent"),
)
WHOLE = Hop(P, "ggate", "all of it, in here", "woke", "sent")


@dataclass
class Counts:
    """Of the turns that were seen whole, from one wake-up to the next: receiving calls, and how many of these brought
    nothing, requests, answering calls."""

    wakes: int = 0
    calls: int = 0
    empty: int = 0
    requests: int = 0
    answers: int = 0

    def text(self) -> str:
        def each(count: int, of: int) -> str:
            return f"{count / of:.1f}" if of else "-"

        empty = f" ({100 * self.empty / self.calls:.0f}% of them found none)" if self.empty else ""
        return (
            f"requests for each wake-up {each(self.requests, self.wakes)}, "
            f"for each receiving call {each(self.requests, self.calls)}{empty}, "
            f"for each answering call {each(self.requests, self.answers)}"
        )

    def add(self, turn: Counts) -> None:
        for name, count in asdict(turn).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass
class Reader:
    """Goes through a run of ggate's events."""

    counts: Counts
    turn: Counts = field(default_factory=Counts)
    woke: int = 0
    asks: int = 0
    got: int = 0
    brought: bool = True  # the last receiving call, something

    def read(self, events: Iterable[Event]) -> list[Stamps]:
        """The reads that are there whole."""
        slots: dict[int, Stamps] = {}  # admitted, by slot
        bios: dict[int, Stamps] = {}
        answering: list[int] = []
        done = []
        last = 0
        for event in events:
            point, ns, key = event.point, event.ns, event.key
            if point == WOKE:
                self.wakes(ns)
            elif point == GOT:
                self.turn.empty += not self.brought
                self.turn.calls += 1
                self.asks, self.got, self.brought = last, ns, False
            elif point == ADMIT:
                self.brought = True
                self.turn.requests += 1
                if self.woke and self.got > self.woke:
                    slots[key] = {"woke": self.woke, "asks": self.asks, "got": self.got, "admit": ns}
            elif point == IN and key & 0xFFFF in slots:
                bios[key] = slots.pop(key & 0xFFFF) | {"in": ns}
            elif point in (START, DID, OUT) and key in bios:
                bios[key][{START: "start", DID: "did", OUT: "out"}[point]] = ns
                if point == OUT:
                    answering.append(key)
            elif point == SENDING and answering:
                self.turn.answers += 1
                for of in answering:
                    bios[of]["sending"] = ns
            elif point == SENT:
                for of in answering:
                    stamps = bios.pop(of)
                    if "did" in stamps and "sending" in stamps:
                        done.append(stamps | {"sent": ns})
                answering = []
            last = ns
        return done

    def wakes(self, ns: int) -> None:
        """The turn before is over."""
        self.turn.empty += not self.brought
        if self.woke:
            self.counts.add(self.turn)
        self.turn = Counts(wakes=1)
        self.woke, self.brought = ns, True


def join(events: Iterable[Event]) -> tuple[list[Stamps], Counts]:
    counts = Counts()
    found: list[Stamps] = []
    for run in runs(events):
        found += Reader(counts).read(run)
    return found, counts


def waterfall(reads: Sequence[Stamps], client: Figures) -> list[Bar]:
    """With what the client has to wait for outside of ggate, of which nobody knows when it is."""
    found = bars(reads, HOPS, WHOLE)
    if found:
        whole = found[-1]
        rest = (max(0.0, client["p50"] - whole.median), max(0.0, client["p99"] - whole.p99))
        found.append(Bar("outside", "", "rest of client's latency", whole.median, *(round(us, 2) for us in rest)))
    return found


def data(reads: Sequence[Stamps], counts: Counts, client: Figures) -> dict[str, Any]:
    return {"reads": len(reads), "hops": [bar.data() for bar in waterfall(reads, client)], "counts": asdict(counts)}
