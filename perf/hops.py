"""Puts together what the stages of both nodes have noted (hast/shm/trace.py) into the way of each bio, and that into
hops.

A bio's stamps have names: "p.disk.out" is when the primary's disk stage had done it, "s.send.first.sending" when the
secondary began to send the first reply to a memsync write. (send and recv are in the ggate stage on a primary, in the
recv stage on a secondary.) Hops overlap where work does: a write is on its
way to the disk and to the secondary at once.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hast.ffi import _hast
from hast.shm.trace import Event

lib = _hast.lib

Stamps = dict[str, int]  # name -> ns
Bios = dict[int, Stamps]  # by seq

STAGES = {
    "ggate": int(lib.HAST_STAGE_GGATE),
    "disk": int(lib.HAST_STAGE_DISK),
    "send": int(lib.HAST_STAGE_SEND),
    "recv": int(lib.HAST_STAGE_RECV),
}
WOKE, GOT, ADMIT, IN, FIRST, START, DID, OUT, RANG, SENDING, SENT = (
    int(getattr(lib, f"HAST_TRACE_{name}"))
    for name in ("WOKE", "GOT", "ADMIT", "IN", "FIRST", "START", "DID", "OUT", "RANG", "SENDING", "SENT")
)
NAMES = {IN: "in", FIRST: "first", OUT: "out"}
WORK = {START: "start", DID: "did"}


@dataclass
class Reader:
    """Goes through the events of one stage. A turn's event belongs to the bios that the stage has in hand."""

    prefix: str
    bios: Bios
    woke: int = 0
    got: int = 0

    def read(self, events: Iterable[Event]) -> None:
        admitted: dict[int, Stamps] = {}  # by slot
        pushed: list[Stamps] = []  # ggate: given away, others are not woken yet
        sending: list[tuple[Stamps, str]] = []
        for event in events:
            point, ns = event.point, event.ns
            if point == WOKE:
                self.woke, pushed = ns, []
            elif point == GOT:
                self.got = ns
            elif point == ADMIT:
                admitted[event.key] = {"woke": self.woke, "admit": ns}
            elif point in WORK:
                self.stamps(event.key, WORK[point], ns)
            elif point in NAMES:
                name = NAMES[point]
                mine = self.stamps(event.key, name, ns)
                if name == "in" and self.prefix.endswith("ggate."):
                    self.note(mine, admitted.pop(event.key & 0xFFFF, {}))
                    pushed.append(mine)
                elif name == "out" and self.prefix.endswith("ggate."):
                    self.note(mine, {"woke again": self.woke})
                elif self.prefix.endswith("recv.") and name != "out":
                    self.note(mine, {f"{name}.got": self.got})
                sending.append((mine, "" if name == "out" else f"{name}."))
            elif point == RANG:
                for mine in pushed:
                    self.note(mine, {"rang": ns})
            elif point in (SENDING, SENT):
                for mine, name in sending:
                    self.note(mine, {f"{name}{'sending' if point == SENDING else 'sent'}": ns})
                if point == SENT:
                    sending = []

    def stamps(self, seq: int, name: str, ns: int) -> Stamps:
        mine = self.bios.setdefault(seq, {})
        self.note(mine, {name: ns})
        return mine

    def note(self, mine: Stamps, more: Stamps) -> None:
        for name, ns in more.items():
            if ns:
                mine[self.prefix + name] = ns


def join(primary: Mapping[str, Sequence[Event]], secondary: Mapping[str, Sequence[Event]], mode: str) -> list[Stamps]:
    """All bios whose way from the device to the answer is in these events, by stage; `mode` says what the answer
    waits for."""
    bios: Bios = {}
    for node, stages in (("p", primary), ("s", secondary)):
        for stage, events in stages.items():
            Reader(f"{node}.{stage}.", bios).read(events)
    return [stamps for stamps in bios.values() if complete(stamps, mode)]


def complete(stamps: Stamps, mode: str) -> bool:
    """Adds what follows from the others: "last", when all that the answer waits for was there. False: it lacks some."""
    # Where ggate does the disk's work itself, that is not handed to anybody.
    disk = "p.disk.out" if "p.disk.out" in stamps else "p.ggate.did"
    waits = [disk, *{"memsync": ["p.recv.first"], "fullsync": ["p.recv.in"]}.get(mode, [])]
    if not all(name in stamps for name in ("p.ggate.woke", "p.ggate.admit", "p.ggate.out", "p.ggate.sent", *waits)):
        return False
    stamps["last"] = max(stamps[name] for name in waits)
    stamps["again"] = max(stamps["last"], stamps["p.ggate.woke again"])
    return True


# ---- hops ----


@dataclass(frozen=True)
class Hop:
    node: str
    stage: str
    what: str
    begin: str
    end: str


P, S = "primary", "secondary"
ORIGIN = "p.ggate.woke"
HOPS = (
    Hop(P, "ggate", "awake: reads the request", ORIGIN, "p.ggate.admit"),
    Hop(P, "ggate", "sequencer", "p.ggate.admit", "p.ggate.in"),
    Hop(P, "ggate", "wakes disk", "p.ggate.in", "p.ggate.rang"),
    Hop(P, "ggate", "writes, instead of disk", "p.ggate.start", "p.ggate.did"),
    Hop(P, "disk", "is reached", "p.ggate.admit", "p.disk.in"),
    Hop(P, "disk", "queued there", "p.disk.in", "p.disk.start"),
    Hop(P, "disk", "writes", "p.disk.start", "p.disk.out"),
    Hop(P, "send", "its turn", "p.ggate.admit", "p.send.in"),
    Hop(P, "send", "lays out", "p.send.in", "p.send.in.sending"),
    Hop(P, "send", "sendmsg", "p.send.in.sending", "p.send.in.sent"),
    Hop(S, "recv", "is reached, over TCP", "p.send.in.sending", "s.recv.in.got"),
    Hop(S, "recv", "reads the request", "s.recv.in.got", "s.recv.in"),
    Hop(S, "send", "its turn: first reply", "s.recv.in", "s.send.first"),
    Hop(S, "send", "lays out: first reply", "s.send.first", "s.send.first.sending"),
    Hop(P, "recv", "is reached: first reply", "s.send.first.sending", "p.recv.first.got"),
    Hop(P, "recv", "reads the first reply", "p.recv.first.got", "p.recv.first"),
    Hop(S, "recv", "writes, instead of disk", "s.recv.start", "s.recv.did"),
    Hop(S, "disk", "is reached", "s.recv.in", "s.disk.in"),
    Hop(S, "disk", "queued there", "s.disk.in", "s.disk.start"),
    Hop(S, "disk", "writes", "s.disk.start", "s.disk.out"),
    Hop(S, "recv", "is reached: done", "s.disk.out", "s.recv.out"),
    Hop(S, "send", "its turn: last reply", "s.recv.out", "s.send.in"),
    Hop(S, "send", "lays out: last reply", "s.send.in", "s.send.in.sending"),
    Hop(P, "recv", "is reached: last reply", "s.send.in.sending", "p.recv.in.got"),
    Hop(P, "recv", "reads the last reply", "p.recv.in.got", "p.recv.in"),
    Hop(P, "ggate", "is reached: all is there", "last", "again"),
    Hop(P, "ggate", "awake: sequencer", "again", "p.ggate.out"),
    Hop(P, "ggate", "answers", "p.ggate.out", "p.ggate.sent"),
)


@dataclass(frozen=True)
class Bar:
    """A hop over many bios: microseconds from the origin to its begin (median), and what it takes."""

    node: str
    stage: str
    what: str
    start: float
    median: float
    p99: float

    def data(self) -> dict[str, Any]:
        return asdict(self)


WHOLE = Hop(P, "ggate", "all of it", ORIGIN, "p.ggate.sent")


def bars(bios: Sequence[Stamps], hops: Sequence[Hop] = HOPS, whole: Hop = WHOLE) -> list[Bar]:
    """The hops that at least half of the bios have, in their order, and at the end the whole, with which they begin."""
    found = []
    for hop in (*hops, whole):
        of = [stamps for stamps in bios if hop.begin in stamps and hop.end in stamps]
        if len(of) * 2 < len(bios) or not of:
            continue
        took = sorted((stamps[hop.end] - stamps[hop.begin]) / 1000 for stamps in of)
        start = statistics.median((stamps[hop.begin] - stamps[whole.begin]) / 1000 for stamps in of)
        p99 = took[min(len(took) - 1, len(took) * 99 // 100)]
        times = (round(us, 2) for us in (start, statistics.median(took), p99))
        found.append(Bar(hop.node, hop.stage, hop.what, *times))
    return found


def text(found: Sequence[Bar], width: int = 56) -> list[str]:
    """A waterfall in characters."""
    end = max(bar.start + bar.median for bar in found)
    lines = [f"{'':9} {'':5} {'':25} {'at':>7} {'median':>7} {'p99':>7}  us"]
    for bar in found:
        left = round(bar.start / end * width)
        right = max(left + 1, round((bar.start + bar.median) / end * width))
        drawn = " " * left + "#" * (right - left)
        times = f"{bar.start:7.1f} {bar.median:7.1f} {bar.p99:7.1f}"
        lines.append(f"{bar.node:9} {bar.stage:5} {bar.what:25} {times}  |{drawn:{width}}|")
    return lines
