"""What a process does with its time, as its stages' events tell it: the time up to each event belongs to what that
event ends. Waiting begins with the last event before it, so a turn in which nothing is noted counts as waiting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter

from hast.shm.trace import Event
from perf.hops import DID, GOT, OUT, RANG, SENT, WOKE
from perf.tracing import runs

WAITS, REST = "waits", "all else"
# "disk" is the stage of that name; the other stages of a node are done in one process.
ENDS = {WOKE: WAITS, GOT: "receives", DID: "disk's work", SENT: "sends", RANG: "wakes disk"}
DISK_ENDS = {WOKE: WAITS, OUT: "disk's work"}

Shares = dict[str, float]
Span = tuple[int, int]  # ns


def spans(logs: Iterable[Sequence[Event]]) -> list[Span]:
    """The times of which no log lacks anything, of those that have events at all."""
    found: list[Span] | None = None
    for log in logs:
        if not log:
            continue
        mine = [(run[0].ns, run[-1].ns) for run in runs(log)]
        found = mine if found is None else overlap(found, mine)
    return found or []


def overlap(first: Sequence[Span], second: Sequence[Span]) -> list[Span]:
    found, rest = [], list(second)
    for begin, end in first:
        while rest and rest[0][1] <= begin:
            del rest[0]
        found += [(max(begin, b), min(end, e)) for b, e in rest if b < end and e > begin]
    return found


def shares(logs: Mapping[str, Sequence[Event]]) -> tuple[float, Shares]:
    """Seconds that were seen whole, and which part of them a process spent with what. Its stages' logs, by name."""
    events = sorted(((event.ns, event.point, name) for name, log in logs.items() for event in log), key=itemgetter(0))
    spent: dict[str, int] = {}
    seen = at = 0
    for begin, end in spans(logs.values()):
        while at < len(events) and events[at][0] <= begin:
            at += 1
        last = begin
        while at < len(events) and events[at][0] <= end:
            ns, point, name = events[at]
            what = (DISK_ENDS if name == "disk" else ENDS).get(point, REST)
            spent[what] = spent.get(what, 0) + ns - last
            last, at = ns, at + 1
        seen += last - begin
    most = sorted(spent, key=lambda what: -spent[what])
    return seen / 1e9, {what: spent[what] / seen for what in most if seen}
