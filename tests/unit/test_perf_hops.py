"""Events of both nodes become the way of a bio, and many ways a waterfall. No process."""

from __future__ import annotations

from xml.etree import ElementTree

from hast.shm.trace import Event
from perf import hops, svg
from perf.hops import ADMIT, DID, FIRST, GOT, IN, OUT, RANG, SENDING, SENT, START, WOKE, Bar

SLOT = 3
SEQ = 5 << 16 | SLOT


def log(*events: tuple[int, int, int]) -> list[Event]:
    """Of (ns, point, key)."""
    return [Event(number, ns, point, key) for number, (ns, point, key) in enumerate(events)]


GGATE = log(
    (100, WOKE, 0), (110, ADMIT, SLOT), (120, IN, SEQ), (130, RANG, 0), (140, RANG, 0), (900, WOKE, 0),
    (910, OUT, SEQ), (920, SENDING, 0), (930, SENT, 0), (990, SENT, 0),
)  # fmt: skip
DISK = log((150, WOKE, 0), (160, IN, SEQ), (170, START, SEQ), (180, OUT, SEQ))
SEND = log((200, IN, SEQ), (210, SENDING, 0), (220, SENT, 0))
RECV = log((800, GOT, 0), (810, FIRST, SEQ), (1000, GOT, 0), (1010, IN, SEQ))
PRIMARY = {"ggate": GGATE, "disk": DISK, "send": SEND, "recv": RECV}
SECONDARY = {
    "recv": log((300, GOT, 0), (310, IN, SEQ), (400, OUT, SEQ)),
    "disk": log((350, IN, SEQ), (360, START, SEQ), (390, OUT, SEQ)),
    "send": log(
        (320, FIRST, SEQ), (330, SENDING, 0), (340, SENT, 0), (410, IN, SEQ), (420, SENDING, 0), (430, SENT, 0)
    ),
}


def test_the_way_of_a_memsync_write() -> None:
    (stamps,) = hops.join(PRIMARY, SECONDARY, "memsync")
    assert stamps == {
        "p.ggate.woke": 100, "p.ggate.admit": 110, "p.ggate.in": 120, "p.ggate.rang": 140, "p.ggate.woke again": 900,
        "p.ggate.in.sending": 920, "p.ggate.in.sent": 930,
        "p.ggate.out": 910, "p.ggate.sending": 920, "p.ggate.sent": 930,
        "p.disk.in": 160, "p.disk.start": 170, "p.disk.out": 180,
        "p.send.in": 200, "p.send.in.sending": 210, "p.send.in.sent": 220,
        "p.recv.first": 810, "p.recv.first.got": 800, "p.recv.in": 1010, "p.recv.in.got": 1000,
        "s.recv.in": 310, "s.recv.in.got": 300, "s.recv.out": 400,
        "s.disk.in": 350, "s.disk.start": 360, "s.disk.out": 390,
        "s.send.first": 320, "s.send.first.sending": 330, "s.send.first.sent": 340,
        "s.send.in": 410, "s.send.in.sending": 420, "s.send.in.sent": 430,
        "last": 810, "again": 900,
    }  # fmt: skip


def test_what_the_answer_waits_for_depends_on_the_mode() -> None:
    assert hops.join(PRIMARY, SECONDARY, "async")[0]["last"] == 180
    assert hops.join(PRIMARY, SECONDARY, "fullsync")[0]["last"] == 1010


def test_a_way_that_was_not_seen_whole_is_left_out() -> None:
    for stage in ("ggate", "disk", "recv"):
        assert hops.join(PRIMARY | {stage: []}, SECONDARY, "memsync") == []
    assert hops.join(PRIMARY | {"ggate": GGATE[2:]}, SECONDARY, "memsync") == [], "its beginning"
    assert hops.join(PRIMARY | {"ggate": GGATE[:7]}, SECONDARY, "memsync") == [], "its end"


def test_who_writes_instead_of_the_disk_stage_takes_its_place() -> None:
    ggate = [*GGATE[:4], Event(4, 135, START, SEQ), Event(5, 139, DID, SEQ), *GGATE[4:]]
    recv = [*SECONDARY["recv"][:2], Event(2, 350, START, SEQ), Event(3, 355, DID, SEQ), SECONDARY["recv"][2]]
    found = hops.join(PRIMARY | {"ggate": ggate, "disk": []}, SECONDARY | {"recv": recv, "disk": []}, "async")
    assert found[0]["last"] == 139
    taken = {(bar.node, bar.stage): bar.median for bar in hops.bars(found) if bar.what == "writes, instead of disk"}
    assert taken.keys() == {("primary", "ggate"), ("secondary", "recv")}


def test_without_the_secondary_there_are_the_hops_of_the_primary() -> None:
    found = hops.bars(hops.join(PRIMARY, {}, "memsync"))
    assert {bar.node for bar in found} == {"primary"}
    assert found[-1] == Bar("primary", "ggate", "all of it", 0.0, 0.83, 0.83)


def test_a_waterfall_in_characters_and_as_a_drawing() -> None:
    found = hops.bars(hops.join(PRIMARY, SECONDARY, "memsync"))
    assert len(found) == len(hops.HOPS) + 1 - 2, "all but those who write instead of disk"
    lines = hops.text(found)
    assert len(lines) == len(found) + 1
    assert all(line.count("|") == 2 and "#" in line for line in lines[1:])
    root = ElementTree.fromstring(svg.waterfall("a & b", found))
    assert len(root.findall("{http://www.w3.org/2000/svg}rect")) == len(found) + 1
