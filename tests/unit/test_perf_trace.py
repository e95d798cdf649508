"""What is concluded from the events of reads, of the chunks of a resynchronisation, and of processes. No process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hast.shm.trace import Event
from perf import chunks, hops, reads, shares, trace, tracing
from perf.clock import IDLE, Clock, Time
from perf.hops import ADMIT, DID, GOT, IN, OUT, RANG, SENDING, SENT, START, WOKE
from perf.procstat import machine_idle

X, Y, Z = 7 << 16 | 1, 8 << 16 | 2, 9 << 16 | 1
CLIENT = {"p50": 2.0, "p99": 3.0}


def log(*events: tuple[int, int, int], since: int = 0) -> list[Event]:
    """Of (ns, point, key)."""
    return [Event(since + number, ns, point, key) for number, (ns, point, key) in enumerate(events)]


# One receiving call and one answering call for both reads.
NBD = (
    (100, WOKE, 0), (200, GOT, 0), (210, ADMIT, 1), (220, IN, X), (230, ADMIT, 2), (240, IN, Y),
    (300, START, X), (400, DID, X), (410, START, Y), (510, DID, Y), (520, OUT, X), (530, OUT, Y),
    (540, SENDING, 0), (600, SENT, 0), (900, WOKE, 0), (950, GOT, 0), (960, ADMIT, 2),
)  # fmt: skip
# A call for each request, one more that finds none, and a call for each answer.
FUSE = (
    (100, WOKE, 0), (200, GOT, 0), (210, ADMIT, 1), (220, IN, X), (230, GOT, 0), (240, ADMIT, 2), (250, IN, Y),
    (260, GOT, 0), (300, START, X), (400, DID, X), (410, START, Y), (510, DID, Y),
    (520, OUT, X), (530, SENDING, 0), (540, SENT, 0), (550, OUT, Y), (560, SENDING, 0), (570, SENT, 0), (900, WOKE, 0),
)  # fmt: skip


def test_reads_that_share_their_calls() -> None:
    (x, y), counts = reads.join(log(*NBD))
    assert x == {
        "woke": 100, "asks": 100, "got": 200, "admit": 210, "in": 220, "start": 300, "did": 400, "out": 520,
        "sending": 540, "sent": 600,
    }  # fmt: skip
    assert y["got"] == 200 and y["start"] == 410 and y["sent"] == 600
    assert counts == reads.Counts(wakes=1, calls=1, empty=0, requests=2, answers=1), "the turn that was seen whole"


def test_reads_with_calls_of_their_own() -> None:
    (x, y), counts = reads.join(log(*FUSE))
    assert (x["asks"], x["got"], x["sending"], x["sent"]) == (100, 200, 530, 540)
    assert (y["asks"], y["got"], y["sending"], y["sent"]) == (220, 230, 560, 570)
    assert counts == reads.Counts(wakes=1, calls=3, empty=1, requests=2, answers=2)
    assert counts.text() == (
        "requests for each wake-up 2.0, for each receiving call 0.7 (33% of them found none), "
        "for each answering call 1.0"
    )


def test_nothing_is_concluded_across_events_that_are_missing() -> None:
    whole = log(*FUSE)
    assert tracing.runs(whole) == [whole]
    assert reads.join(whole[1:])[0] == [], "nobody knows when it woke up"
    assert reads.join(whole[:11] + whole[12:])[0] == []
    begun, ended = whole[:10], log(*FUSE, since=100)
    found, _ = reads.join([*begun, *ended])
    assert [stamps["sent"] for stamps in found] == [540, 570], "those of the second run, and only they"


def test_what_the_client_waits_for_elsewhere_is_the_rest() -> None:
    bars = reads.waterfall(reads.join(log(*NBD))[0], CLIENT)
    assert [bar.what for bar in bars[-2:]] == [reads.WHOLE.what, "rest of client's latency"]
    assert bars[-2].median == 0.5 and bars[-1].start == 0.5 and bars[-1].median == 1.5
    assert len(hops.text(bars)) == len(reads.HOPS) + 3
    assert reads.waterfall([], CLIENT) == []


# Of chunk X the reply comes in at 100 and 2000 ns; Z has the same slot, Y another.
PRIMARY = {
    "ggate": log((110, WOKE, 0)),
    "disk": log((250, WOKE, 0), (260, IN, Z), (300, START, Z), (400, OUT, Z)),
    "send": log((500, IN, Z), (505, IN, Y), (510, SENDING, 0), (600, SENT, 0), (700, SENDING, 0), (800, SENT, 0),
                (900, IN, 10 << 16 | 3), (910, SENDING, 0), (950, SENT, 0)),
    "recv": log((90, GOT, 0), (100, IN, X), (1990, GOT, 0), (2000, IN, Z)),
}  # fmt: skip
SECONDARY = {
    "disk": [],
    "recv": log((800, WOKE, 0), (850, GOT, 0), (860, GOT, 0), (870, IN, Z), (880, START, Z), (980, DID, Z)),
    "send": log((1000, IN, Z), (1010, SENDING, 0), (1020, SENT, 0)),
}


def test_the_way_of_a_chunk() -> None:
    (chunk,) = chunks.join(PRIMARY, SECONDARY)
    assert chunk == {
        "issued": 100, "p.disk.start": 300, "p.disk.out": 400,
        "p.send.in": 500, "p.send.sending": 510, "p.send.sent": 800,
        "s.recv.begin": 800, "s.recv.in": 870, "s.recv.start": 880, "s.recv.did": 980,
        "s.send.in": 1000, "s.send.sending": 1010, "s.send.sent": 1020, "p.recv.in": 2000,
    }  # fmt: skip
    bars = hops.bars([chunk], chunks.HOPS, chunks.WHOLE)
    assert len(bars) == len(chunks.HOPS) + 1
    assert bars[-1].median == 1.9


def test_a_chunk_that_was_not_seen_whole_is_left_out() -> None:
    for stage in ("disk", "send", "recv"):
        assert chunks.join(PRIMARY | {stage: []}, SECONDARY) == []
    for stage in ("send", "recv"):
        assert chunks.join(PRIMARY, SECONDARY | {stage: []}) == []


def test_what_a_process_does_with_its_time() -> None:
    _, found = shares.shares({"disk": PRIMARY["disk"]})
    assert found == {"disk's work": 100 / 150, shares.REST: 50 / 150}
    both = {
        "ggate": log((0, WOKE, 0), (700, WOKE, 0), (1000, RANG, 0)),
        "send": log((0, IN, X), (100, SENDING, 0), (500, SENT, 0), (1000, IN, Y)),
        "recv": [],
    }
    seconds, found = shares.shares(both)
    assert seconds == 1e-6
    assert found == {"sends": 0.4, "wakes disk": 0.3, shares.WAITS: 0.2, shares.REST: 0.1}
    assert shares.shares({"ggate": []}) == (0, {})


def test_only_times_that_all_logs_cover_count() -> None:
    one = [*log((0, IN, X), (100, IN, X)), *log((200, IN, X), (300, IN, X), since=9)]
    assert shares.spans([one, log((50, IN, X), (250, IN, X)), []]) == [(50, 100), (200, 250)]
    assert shares.spans([one, log((110, IN, X), (190, IN, X))]) == []


def test_processor_time_is_by_name_and_what_nobody_wants_is_idle() -> None:
    spin = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\ninput()"
    clock = Clock("nothere")
    with subprocess.Popen([sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        comm = Path(f"/proc/{process.pid}/comm")
        while process.poll() is None and clock.used()[1].get(comm.read_text().strip(), Time()).ran < 0.2:
            pass
        seconds, used = clock.used()
        process.communicate(b"\n", timeout=60)
    assert 0 <= used[IDLE].ran <= machine_idle()
    assert seconds >= 0.2 and sum(of.ran for of in used.values()) > 0.2


@pytest.mark.parametrize("words", [["--what=nothing"], ["--front=disk"], ["--depths=0"], ["--resync-size=1"]])
def test_what_cannot_be_asked_for(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        trace.words_of(words)
    assert words[0].partition("=")[0] in capsys.readouterr().err
