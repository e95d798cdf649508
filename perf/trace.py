"""Where a request spends its microseconds: `make perf-trace`, or `.venv/bin/python -m perf.trace`.

Two nodes with their components in memory, of which snapshots are taken: of what their stages note (hast/ffi/trace.h).

- write: fio writes 4 KiB at random over the nbd socket, at each depth and in each mode; for each hop of a write, on
  both nodes, its median and its 99th percentile;
- read: fio reads 4 KiB at random over the nbd socket and over the block device, at each depth: the hops within ggate,
  and how many requests it takes and answers at once;
- resync: a full resynchronisation without clients: the hops of its chunks, and what each process does all the time.

Printed, and written to the output directory as trace.json and an SVG each. With reads and chunks stands what everybody
used of the processors meanwhile, the kernel's threads included, and how long he waited for one.

The clock is the same for both nodes because they run on one machine. Tracing itself costs some twenty clock reads for
each write (half a microsecond in all).

With --attach NAME no node is started: the resource of that name on this machine's running hastd is traced for some
seconds, whatever its clients write (and the secondary's part only if that runs here too).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any

from hast.device import fuse
from hast.errors import HastError
from hast.shm.arena import Arena
from perf import chunks, fio, hops, reads, resync, stream, svg
from perf.clock import IDLE, Clock
from perf.errors import ROOT, MissingError, PerfError, need
from perf.fio import Job, Target
from perf.host import host
from perf.nodes import MODES, compare, pair, request, target
from perf.scene import MIB
from perf.shares import shares
from perf.tracing import Shots, after, arenas_of, events_of, take
from tests.e2e.pair import Pair
from tests.nbdclient import FLUSH

SIZE = 256 * MIB
WHAT = ("write", "read", "resync")
FRONTS = ("nbd", "fuse")
OFTEN = 0.02  # seconds between snapshots in which nothing is to be missing
TRIES = 5  # of a synchronisation that was over too soon
Found = dict[str, Any]


@contextmanager
def client(arena: Arena, to: Target, job: Job, seconds: float) -> Iterator[Future[fio.Figures]]:
    """fio is at work, and for longer than `seconds`; its figures are there after the block."""
    stats = arena.seq.stats
    before = int(stats.write) + int(stats.read)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(fio.run, [to], job, SIZE, seconds + 1.0)
        while int(stats.write) + int(stats.read) == before and not running.done():
            time.sleep(0.01)
        yield running


def both(two: Pair) -> list[Arena]:
    arenas = arenas_of(two.a.name("disk"), two.a.pids(), two.b.pids())
    if len(arenas) != 2:
        raise PerfError(f"{two.a.name('disk')}: the secondary has no connection")
    return arenas


def processors(clock: Clock, each: str, count: float) -> Found:
    """What everybody used since the clock was started, in microseconds of processor time for each of `count` things."""
    seconds, used = clock.used()
    per = {name: (of.ran / count * 1e6, of.waited / count * 1e6) for name, of in used.items()}
    return {"each": each, "us": seconds / count * 1e6, "used": per}


# ---- writes ----


def waterfall(taken: Sequence[Shots], mode: str) -> Found:
    """What the snapshots say."""
    bios = hops.join(events_of(taken[0]), events_of(taken[1]) if len(taken) > 1 else {}, mode)
    return {"bios": len(bios), "hops": [bar.data() for bar in hops.bars(bios)]}


def run(mode: str, depths: Sequence[int], seconds: float) -> Found:
    """The waterfalls of a mode, by depth."""
    found: Found = {}
    with pair({"disk": SIZE}, f"replication {mode}") as two:
        to = target(two.a, "nbd", "disk")
        fio.run([to], fio.FILL, SIZE)
        request(two.a, "disk", FLUSH)
        for depth in depths:
            job = Job(f"randwrite 4k depth {depth}", "randwrite", "4k", depth)
            arenas = both(two)
            plain = fio.run([to], job, SIZE, seconds)
            with client(arenas[0], to, job, seconds) as traced:
                taken = take(arenas, after(seconds))
            for arena in arenas:
                arena.close()
            found[str(depth)] = waterfall(taken, mode) | {"client": plain, "client, traced": traced.result()}
    return found


def attach(resource: str, mode: str, seconds: float) -> Found:
    """The waterfall of a resource that is in use."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return {"as it is": waterfall(take(arenas_of(resource, pids, pids), after(seconds)), mode)}


# ---- reads ----


def run_reads(front: str, depths: Sequence[int], seconds: float) -> Found:
    """The waterfalls of a device, by depth."""
    if front == "fuse" and (reason := fuse.usable()) is not None:
        raise MissingError(f"no block device can be made: {reason}")
    found: Found = {}
    with pair({"disk": SIZE}, "replication memsync", device=front) as two:
        to, name = target(two.a, front, "disk"), two.a.name("disk")
        fio.run([to], fio.FILL, SIZE)
        request(two.a, "disk", FLUSH)
        for depth in depths:
            job = Job(f"randread 4k depth {depth}", "randread", "4k", depth)
            arenas = both(two)
            plain = fio.run([to], job, SIZE, seconds)
            with client(arenas[0], to, job, seconds) as traced:
                clock, before = Clock(name), int(arenas[0].seq.stats.read)
                taken = take(arenas[:1], after(seconds))
                used = processors(clock, "read", int(arenas[0].seq.stats.read) - before)
            for arena in arenas:
                arena.close()
            ggate = events_of(taken[0])["ggate"]
            seen, counts = reads.join(ggate)
            found[str(depth)] = reads.data(seen, counts, traced.result()) | {
                "shares": {"primary: ggate": shares({"ggate": ggate})[1]},
                "processors": used,
                "client": plain,
                "client, traced": traced.result(),
            }
    return found


# ---- a full resynchronisation ----


class TooLateError(PerfError):
    """A small one may be over, on a machine that has other things to do, before anybody has looked at it."""

    def __init__(self) -> None:
        super().__init__("the synchronisation was over before it could be traced: try a larger --resync-size")


def watch(two: Pair, over: Callable[[], bool]) -> tuple[list[Shots], Found]:
    """All of a synchronisation that begins soon, and what it takes of the processors. The secondary's arena is made
    when it is connected."""
    name, arenas = two.a.name(), list[Arena]()
    while len(arenas) != 2:
        if over():
            raise TooLateError
        with suppress(HastError):  # its worker is there, and the arena not yet
            arenas = arenas_of(name, two.a.pids(), two.b.pids())
    copied = arenas[0].seq
    clock, before = Clock(name), int(copied.sync_bytes)
    taken = take(arenas, over, OFTEN)
    count = int(copied.sync_bytes) - before
    used = processors(clock, "128 KiB", count / stream.MESSAGE) if count else {}
    for arena in arenas:
        arena.close()
    if not count:
        raise TooLateError
    return taken, used


def watched(two: Pair, size: int) -> tuple[Sequence[float], list[Shots], Found]:
    """Synchronise all, and watch that: when it began and ended, and the bytes; what was seen. Raises TooLateError."""
    two.b.stop()
    resync.full_ahead(two, size)
    over = Event()
    # Not the other way round: hastd ends with the thread that has started it.
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch, two, over.is_set)
        try:
            timed = resync.timed(two)
        finally:
            over.set()
            two.wait_in_sync(two.a)
        return timed, *watching.result()


def run_resync(size: int) -> Found:
    with pair({"disk": size}) as two:
        fio.run([Target("nbd", two.a.uri())], fio.FILL, size)
        tcp = stream.rate(size)
        plain = resync.one(two, size, full=True, loaded=False)
        seen: list[hops.Stamps] = []
        for _ in range(TRIES):
            with suppress(TooLateError):
                (began, ended, copied), taken, used = watched(two, size)
                nodes = [events_of(shots) for shots in taken]
                if seen := chunks.join(*nodes):
                    break
        if not seen:
            raise TooLateError
        compare(two, "disk")
    return {
        "chunks": len(seen),
        "hops": [bar.data() for bar in hops.bars(seen, chunks.HOPS, chunks.WHOLE)],
        "shares": {name: shares(logs)[1] for name, logs in chunks.processes(*nodes).items()},
        "processors": used,
        "MB/s": {"plain": plain["rate"], "traced": copied / 1e6 / (ended - began), "tcp": tcp},
    }


# ---- what is said ----


def say(title: str, what: str, seen: str, found: Found, picture: Path) -> bool:
    """The waterfall, if there is one, and as a drawing."""
    print(f"\n{what}: {seen}")
    if not found["hops"]:
        print("none was seen from its beginning to its end")
        return False
    bars = [hops.Bar(**of) for of in found["hops"]]
    print("\n".join(hops.text(bars)))
    picture.write_text(svg.waterfall(f"{title}: {what}", bars))
    return True


def say_client(found: Found) -> None:
    plain, traced = found["client"], found["client, traced"]
    print(
        f"the client: median {plain['p50']:.1f} us, p99 {plain['p99']:.1f} us, {plain['rate']:.0f} a second "
        f"(traced: {traced['p50']:.1f}, {traced['p99']:.1f}, {traced['rate']:.0f})"
    )


def say_time(found: Found) -> None:
    """Who did what, and who had the processors."""
    for name, parts in found["shares"].items():
        print(f"{name}: " + ", ".join(f"{what} {100 * part:.0f}%" for what, part in parts.items()))
    of = found["processors"]
    most = sorted(of["used"].items(), key=lambda item: -item[1][0])
    told = [f"{name} {ran:.2f}" + f" (waits {waited:.2f})" * (name != IDLE) for name, (ran, waited) in most]
    shown = sum(ran >= of["us"] / 100 for _, (ran, _) in most)
    print(f"processor time for each {of['each']}, us: {', '.join(told[:shown])}; of {of['us']:.2f}")


def say_write(mode: str, depth: str, found: Found, out: Path) -> None:
    picture = out / f"trace-{mode}-{depth}.svg".replace(" ", "-")
    seen = say("A write of 4 KiB", f"{mode}, depth {depth}", f"{found['bios']} writes", found, picture)
    if seen and "client" in found:
        say_client(found)


def say_read(front: str, depth: str, found: Found, out: Path) -> None:
    picture = out / f"trace-read-{front}-{depth}.svg"
    if say("A read of 4 KiB", f"{front}, depth {depth}", f"{found['reads']} reads", found, picture):
        say_client(found)
        print(reads.Counts(**found["counts"]).text())
        say_time(found)


def say_resync(found: Found, out: Path) -> None:
    picture = out / "trace-resync.svg"
    if say("A chunk of 128 KiB", "full resynchronisation", f"{found['chunks']} chunks", found, picture):
        say_time(found)
        rate = found["MB/s"]
        print(f"MB/s: {rate['plain']:.0f} (traced: {rate['traced']:.0f}), one TCP stream {rate['tcp']:.0f}")


# ---- what is asked ----


def words_of(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m perf.trace", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--what", default=",".join(WHAT), help="(%(default)s)")
    parser.add_argument("--modes", default="memsync,fullsync", help="writes: of fullsync, memsync, async (%(default)s)")
    parser.add_argument("--front", default=",".join(FRONTS), help="reads (%(default)s)")
    parser.add_argument("--depths", default="1,32", help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="for each (%(default)s)")
    parser.add_argument("--resync-size", type=int, default=2048, metavar="MIB", help="(%(default)s)")
    parser.add_argument("--attach", metavar="NAME", help="trace a resource that is in use; --modes: the one it has")
    parser.add_argument("--out", type=Path, default=ROOT / ".build" / "perf", help="directory (%(default)s)")
    chosen = parser.parse_args(words)
    for name, known in (("what", WHAT), ("modes", MODES), ("front", FRONTS)):
        setattr(chosen, name, getattr(chosen, name).split(","))
        if not set(getattr(chosen, name)) <= set(known):
            parser.error(f"--{name}: of {', '.join(known)}")
    chosen.depths = [int(depth) for depth in chosen.depths.split(",")]
    if min(chosen.depths) < 1 or chosen.seconds <= 0 or chosen.resync_size < 64:
        parser.error("depths are from 1 on; --seconds above 0; --resync-size from 64 on")
    return chosen


def traces(chosen: argparse.Namespace, result: Found) -> None:
    if "write" in chosen.what or chosen.attach:
        result["modes"] = {}
        for mode in chosen.modes:
            if chosen.attach:
                found = attach(chosen.attach, mode, chosen.seconds)
            else:
                found = run(mode, chosen.depths, chosen.seconds)
            result["modes"][mode] = found
            for depth, of in found.items():
                say_write(mode, depth, of, chosen.out)
    if chosen.attach:
        return
    if "read" in chosen.what:
        result["reads"] = {}
        for front in chosen.front:
            try:
                found = run_reads(front, chosen.depths, chosen.seconds)
            except MissingError as error:
                print(f"left out: reads over {front}: {error}", file=sys.stderr)
                continue
            result["reads"][front] = found
            for depth, of in found.items():
                say_read(front, depth, of, chosen.out)
    if "resync" in chosen.what:
        result["resync"] = run_resync(chosen.resync_size * MIB)
        say_resync(result["resync"], chosen.out)


def main(words: list[str]) -> int:
    chosen = words_of(words)
    chosen.out.mkdir(parents=True, exist_ok=True)
    result: Found = {"host": host()}
    os.chdir(ROOT)
    try:
        if not chosen.attach:
            need("fio")
        traces(chosen, result)
    except (PerfError, HastError, AssertionError, OSError) as error:
        print(f"perf.trace: {error}", file=sys.stderr)
        return 1
    (chosen.out / "trace.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
