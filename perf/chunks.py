"""The way of a chunk of a full resynchronisation through both nodes, out of what their stages have noted
(hast/ffi/trace.h).

A chunk is issued when the one before it in the same slot is answered, so its way begins with that one's last stamp. A
batch that is laid out is sent to its last byte before the next one is begun: a chunk is sent when the last sendmsg of
its batch has returned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hast.shm.trace import Event
from perf.hops import DID, GOT, IN, OUT, SENDING, SENT, START, Hop, P, S, Stamps
from perf.tracing import runs

Bios = dict[int, Stamps]
Log = Sequence[Event]

HOPS = (
    Hop(P, "disk", "is reached; its turn", "issued", "p.disk.start"),
    Hop(P, "disk", "reads", "p.disk.start", "p.disk.out"),
    Hop(P, "send", "is reached; its turn", "p.disk.out", "p.send.in"),
    Hop(P, "send", "lays out, finds no hole", "p.send.in", "p.send.sending"),
    Hop(P, "send", "sendmsg, to its last byte", "p.send.sending", "p.send.sent"),
    Hop(S, "recv", "is reached, over TCP", "p.send.sending", "s.recv.begin"),
    Hop(S, "recv", "recvmsg, to its last byte", "s.recv.begin", "s.recv.in"),
    Hop(S, "recv", "its turn", "s.recv.in", "s.recv.start"),
    Hop(S, "recv", "writes, instead of disk", "s.recv.start", "s.recv.did"),
    Hop(S, "send", "lays out the reply", "s.recv.did", "s.send.sending"),
    Hop(S, "send", "sendmsg", "s.send.sending", "s.send.sent"),
    Hop(P, "recv", "is reached: the reply", "s.send.sending", "p.recv.in"),
)
WHOLE = Hop(P, "ggate", "all of it", "issued", "p.recv.in")
NEEDED = ("issued", "p.disk.out", "p.send.in", "p.send.sent", "s.recv.in", "s.recv.did", "s.send.sent", "p.recv.in")


def each(bios: Bios, log: Log, names: Mapping[int, str]) -> None:
    """Events of one chunk: its stamps."""
    for event in log:
        if event.point in names:
            bios.setdefault(event.key, {})[names[event.point]] = event.ns


def sent(bios: Bios, log: Log, prefix: str) -> None:
    for run in runs(log):
        batch: list[Stamps] = []
        going = False  # the batch is laid out, and being sent
        for event in run:
            if event.point == IN:
                batch = [] if going else batch
                going = False
                batch.append(bios.setdefault(event.key, {}))
                batch[-1][f"{prefix}.in"] = event.ns
            elif event.point == SENDING:
                for stamps in batch if not going else []:
                    stamps[f"{prefix}.sending"] = event.ns
                going = True
            elif event.point == SENT:
                for stamps in batch:
                    stamps[f"{prefix}.sent"] = event.ns


def received(bios: Bios, log: Log) -> None:
    """A chunk's first bytes come with the first call after the one that brought the last of the chunk before it."""
    for run in runs(log):
        begin = last = 0
        for event in run:
            if event.point == GOT and begin == 0:
                begin = last
            elif event.point == IN:
                stamps = bios.setdefault(event.key, {})
                stamps["s.recv.in"] = event.ns
                if begin:
                    stamps["s.recv.begin"] = begin
                begin = 0
            last = event.ns


def issued(bios: Bios) -> None:
    """Slots are told from each other by the lower half of a seq."""
    last: dict[int, int] = {}
    for seq in sorted(bios):
        stamps, slot = bios[seq], seq & 0xFFFF
        if slot in last:
            stamps["issued"] = last[slot]
        if "p.recv.in" in stamps:
            last[slot] = stamps["p.recv.in"]
        else:
            last.pop(slot, None)


def join(primary: Mapping[str, Log], secondary: Mapping[str, Log]) -> list[Stamps]:
    """The chunks of which everything was seen."""
    bios: Bios = {}
    each(bios, primary["disk"], {START: "p.disk.start", OUT: "p.disk.out"})
    each(bios, primary["recv"], {IN: "p.recv.in"})
    each(bios, secondary["recv"], {START: "s.recv.start", DID: "s.recv.did"})
    sent(bios, primary["send"], "p.send")
    sent(bios, secondary["send"], "s.send")
    received(bios, secondary["recv"])
    issued(bios)
    return [stamps for stamps in bios.values() if all(name in stamps for name in NEEDED)]


def processes(primary: Mapping[str, Log], secondary: Mapping[str, Log]) -> dict[str, dict[str, Log]]:
    """The logs of each process that moves chunks, by their stages."""
    return {
        "primary: disk": {"disk": primary["disk"]},
        "primary: ggate": {name: primary[name] for name in ("ggate", "send", "recv")},
        "secondary: recv": {name: secondary[name] for name in ("send", "recv")},
    }
