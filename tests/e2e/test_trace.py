"""A write is followed through both nodes, and only when somebody asks for it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hast.shm import trace
from hast.shm.arena import Arena
from hast.shm.trace import Event
from perf import hops
from perf.hops import STAGES, Stamps
from perf.tracing import arenas_of, titled
from tests.e2e.node import ROOT, eventually
from tests.e2e.pair import Pair
from tests.nbdclient import FLUSH, TRIM, RawClient

BLOCK = 4096
# The disk stages' part: theirs, or that of ggate and recv, who do their work where it takes no waiting.
P_DISK, S_DISK = "the primary's disk", "the secondary's disk"
DISKS = {
    P_DISK: (("p.disk.in", "p.disk.start", "p.disk.out"), ("p.ggate.start", "p.ggate.did")),
    S_DISK: (("s.disk.in", "s.disk.start", "s.disk.out"), ("s.recv.start", "s.recv.did")),
}
LOCAL = ("p.ggate.woke", "p.ggate.admit", P_DISK, "p.ggate.out", "p.ggate.sending", "p.ggate.sent")
REMOTE = (
    "p.ggate.admit", "p.send.in", "p.send.in.sending", "s.recv.in.got", "s.recv.in", S_DISK, "s.recv.out", "s.send.in",
    "s.send.in.sending", "p.recv.in.got", "p.recv.in",
)  # fmt: skip
FIRST = ("s.recv.in", "s.send.first", "s.send.first.sending", "p.recv.first.got", "p.recv.first", "p.ggate.out")
CHAINS = {
    "async": (LOCAL, REMOTE),
    "memsync": (LOCAL, REMOTE, FIRST),
    "fullsync": (LOCAL, (*REMOTE, "p.ggate.out")),
}


@contextmanager
def arenas(pair: Pair) -> Iterator[tuple[Arena, Arena]]:
    primary, secondary = arenas_of(pair.a.name(), pair.a.pids(), pair.b.pids())
    try:
        yield primary, secondary
    finally:
        primary.close()
        secondary.close()


def counts(*of: Arena) -> list[int]:
    return [trace.count(arena, stage) for arena in of for stage in STAGES.values()]


def events(arena: Arena) -> dict[str, list[Event]]:
    return {name: trace.snapshot(arena, stage).events() for name, stage in STAGES.items()}


def write(pair: Pair, blocks: int) -> None:
    with RawClient(pair.a.socket()) as client:
        for n in range(blocks):
            assert client.write(n * BLOCK, os.urandom(BLOCK)) == 0


def ways(primary: Arena, secondary: Arena, mode: str, blocks: int) -> list[Stamps]:
    """The stamps of so many writes, once the secondary's last reply to each is there."""

    def all_there() -> list[Stamps]:
        found = hops.join(events(primary), events(secondary), mode)
        return found if len(found) == blocks and all("p.recv.in" in stamps for stamps in found) else []

    return list(eventually(all_there, f"all stamps of {blocks} writes are there"))


def part(name: str, stamps: Stamps) -> tuple[str, ...]:
    """The names of stamps that this one stands for."""
    stage, instead = DISKS.get(name, ((name,), ()))
    return stage if stage[0] in stamps else instead


@pytest.mark.parametrize("mode", CHAINS)
def test_stamps_of_a_write_are_in_order_on_both_nodes(make_pair: Callable[..., Pair], mode: str) -> None:
    pair = make_pair(resource_conf=f"replication {mode}")
    pair.up()
    write(pair, 1)  # the map update
    with arenas(pair) as (primary, secondary), trace.traced(primary, secondary):
        write(pair, 8)
        found = ways(primary, secondary, mode, 8)
        for stamps in found:
            for chain in CHAINS[mode]:
                names = list(itertools.chain.from_iterable(part(name, stamps) for name in chain))
                times = [stamps[name] for name in names]
                assert times == sorted(times), list(zip(names, times, strict=True))
            assert ("p.recv.first" in stamps) == (mode == "memsync")
        whole = hops.bars(found)[-1]
        assert whole.what == "all of it" and 0 < whole.median <= whole.p99


def test_nothing_is_noted_unless_it_is_switched_on(pair: Pair) -> None:
    with arenas(pair) as (primary, secondary):
        write(pair, 4)
        assert counts(primary, secondary) == [0] * 8
        with trace.traced(primary, secondary):
            with RawClient(pair.a.socket()) as client:
                client.write(0, bytes(BLOCK))
                assert client.read(0, BLOCK) == bytes(BLOCK)
                assert client.do(TRIM, 0, BLOCK).error == 0
                assert client.do(FLUSH).error == 0
            # The secondary has no ggate stage.
            assert [count > 0 for count in counts(primary, secondary)] == [*[True] * 4, False, *[True] * 3]
        write(pair, 1)  # whoever was about to note something has done so
        after = counts(primary, secondary)
        write(pair, 4)
        assert counts(primary, secondary) == after


def test_a_connection_that_is_lost_does_not_end_the_trace(pair: Pair) -> None:
    """What is sent on the next one is noted in the same log."""
    title = f"hastd: {pair.b.name()} (secondary): recv"
    with arenas(pair) as (primary, _), trace.traced(primary):
        write(pair, 2)
        killed = titled(title, pair.b.pids())
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: titled(title, pair.b.pids()) not in (None, killed), "another recv stage runs")
        pair.wait_in_sync(pair.a)
        before = trace.count(primary, STAGES["send"])
        write(pair, 2)
        assert trace.count(primary, STAGES["send"]) > before
    with RawClient(pair.a.socket()) as client:
        assert client.do(FLUSH).error == 0
    assert pair.differing() is None


def test_a_resource_in_use_is_traced_from_outside(pair: Pair, tmp_path: Path) -> None:
    """perf.trace --attach, while a client writes and knows nothing of it."""
    what = (f"--attach={pair.a.name()}", "--modes=memsync", "--seconds=0.5", f"--out={tmp_path}")
    command = [sys.executable, "-m", "perf.trace", *what]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tool:
        while tool.poll() is None:
            write(pair, 8)
        assert tool.stdout is not None
        output = tool.stdout.read()
    assert tool.returncode == 0, output
    found = json.loads((tmp_path / "trace.json").read_text())["modes"]["memsync"]["as it is"]
    assert found["bios"] > 0
    assert {hop["node"] for hop in found["hops"]} == {"primary", "secondary"}
    with arenas(pair) as (primary, secondary):
        assert {int(arena.stage(stage).trace) for arena in (primary, secondary) for stage in STAGES.values()} == {0}
