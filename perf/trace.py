"""Where a write spends its microseconds, on both nodes: `make perf-trace`, or `.venv/bin/python -m perf.trace`.

Two nodes with their components in memory; fio writes 4 KiB at random over the nbd socket, at each depth and in each
mode; meanwhile snapshots are taken of what the stages of both nodes note (hast/ffi/trace.h). Printed, and written to
the output directory as trace.json and an SVG each: for each hop of a write its median and 99th percentile.

The clock is the same for both nodes because they run on one machine. Tracing itself costs some twenty clock reads for
each write (half a microsecond in all).

With --attach NAME no node is started: the resource of that name on this machine's running hastd is traced for some
seconds, whatever its clients do (and the secondary's part only if that runs here too).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hast.errors import HastError
from hast.shm import trace
from hast.shm.arena import Arena
from hast.shm.trace import Event, Snapshot
from perf import fio, hops, svg
from perf.errors import ROOT, PerfError, need
from perf.fio import Job
from perf.host import host
from perf.nodes import MODES, pair, request, target
from perf.scene import MIB
from tests.nbdclient import FLUSH

EVERY = 0.05  # seconds between snapshots
SIZE = 256 * MIB
Shots = list[dict[str, Snapshot]]  # by stage


def shots_of(arena: Arena) -> dict[str, Snapshot]:
    return {name: trace.snapshot(arena, stage) for name, stage in hops.STAGES.items()}


def take(arenas: Sequence[Arena], seconds: float) -> list[Shots]:
    """Snapshots of each arena at the same moments, with tracing on only for that time."""
    taken: list[Shots] = [[] for _ in arenas]
    end = time.monotonic() + seconds
    with trace.traced(*arenas):
        while time.monotonic() < end:
            time.sleep(EVERY)
            for shots, arena in zip(taken, arenas, strict=True):
                shots.append(shots_of(arena))
    return taken


def stream(shots: Shots) -> dict[str, list[Event]]:
    """The events of each stage, each once."""
    events: dict[str, list[Event]] = {name: [] for name in hops.STAGES}
    for shot in shots:
        for name, of in shot.items():
            events[name] += of.events(events[name][-1].number + 1 if events[name] else 0)
    return events


def titled(title: str, pids: Sequence[int]) -> int | None:
    """The process of that title."""
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="replace") == title:
                return pid
        except OSError:
            continue
    return None


def arenas_of(resource: str, primary: Sequence[int], secondary: Sequence[int]) -> list[Arena]:
    """The primary's, and the secondary's if it is there."""
    found = []
    for role, pids in (("primary", primary), ("secondary", secondary)):
        pid = titled(f"hastd: {resource} ({role})", pids)
        if pid is not None:
            found.append(trace.attach(pid))
        elif role == "primary":
            raise PerfError(f"{resource}: no process here is titled 'hastd: {resource} (primary)'")
    return found


def waterfall(taken: Sequence[Shots], mode: str) -> dict[str, Any]:
    """What the snapshots say."""
    bios = hops.join(stream(taken[0]), stream(taken[1]) if len(taken) > 1 else {}, mode)
    return {"bios": len(bios), "hops": [bar.data() for bar in hops.bars(bios)]}


def run(mode: str, depths: Sequence[int], seconds: float) -> dict[str, Any]:
    """The waterfalls of a mode, by depth."""
    found: dict[str, Any] = {}
    with pair({"disk": SIZE}, f"replication {mode}") as two:
        to = target(two.a, "nbd", "disk")
        fio.run([to], fio.FILL, SIZE)
        request(two.a, "disk", FLUSH)
        name = two.a.name("disk")
        for depth in depths:
            job = Job(f"randwrite 4k depth {depth}", "randwrite", "4k", depth)
            arenas = arenas_of(name, two.a.pids(), two.b.pids())
            if len(arenas) != 2:
                raise PerfError(f"{name}: the secondary has no connection")
            plain = fio.run([to], job, SIZE, seconds)
            with ThreadPoolExecutor(1) as pool:
                before = int(arenas[0].seq.stats.write)
                # For longer than snapshots are taken.
                client = pool.submit(fio.run, [to], job, SIZE, seconds + 1.0)
                while int(arenas[0].seq.stats.write) == before and not client.done():
                    time.sleep(0.01)
                taken = take(arenas, seconds)
                traced = client.result()
            for arena in arenas:
                arena.close()
            found[str(depth)] = waterfall(taken, mode) | {"client": plain, "client, traced": traced}
    return found


def attach(resource: str, mode: str, seconds: float) -> dict[str, Any]:
    """The waterfall of a resource that is in use."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    arenas = arenas_of(resource, pids, pids)
    return {"as it is": waterfall(take(arenas, seconds), mode)}


def say(mode: str, depth: str, found: dict[str, Any], out: Path) -> None:
    what = f"{mode}, depth {depth}"
    print(f"\n{what}: {found['bios']} writes")
    if not found["hops"]:
        print("no write was seen from its beginning to its end")
        return
    bars = [hops.Bar(**of) for of in found["hops"]]
    print("\n".join(hops.text(bars)))
    if "client" in found:
        plain, traced = found["client"], found["client, traced"]
        print(
            f"the client: median {plain['p50']:.1f} us, p99 {plain['p99']:.1f} us, {plain['rate']:.0f} a second "
            f"(traced: {traced['p50']:.1f}, {traced['p99']:.1f}, {traced['rate']:.0f})"
        )
    name = f"trace-{mode}-{depth}.svg".replace(" ", "-")
    (out / name).write_text(svg.waterfall(f"A write of 4 KiB: {what}", bars))


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m perf.trace", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modes", default="memsync,fullsync", help="of fullsync, memsync, async (%(default)s)")
    parser.add_argument("--depths", default="1,32", help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=3, help="for each (%(default)s)")
    parser.add_argument("--attach", metavar="NAME", help="trace a resource that is in use; --modes: the one it has")
    parser.add_argument("--out", type=Path, default=ROOT / ".build" / "perf", help="directory (%(default)s)")
    chosen = parser.parse_args(words)
    modes, depths = chosen.modes.split(","), [int(depth) for depth in chosen.depths.split(",")]
    if not set(modes) <= set(MODES) or min(depths) < 1 or chosen.seconds <= 0:
        parser.error(f"modes are {', '.join(MODES)}; depths from 1 on; --seconds above 0")
    chosen.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"host": host(), "modes": {}}
    os.chdir(ROOT)
    try:
        for mode in modes:
            if chosen.attach:
                found = attach(chosen.attach, mode, chosen.seconds)
            else:
                need("fio")
                found = run(mode, depths, chosen.seconds)
            result["modes"][mode] = found
            for depth, of in found.items():
                say(mode, depth, of, chosen.out)
    except (PerfError, HastError, AssertionError, OSError) as error:
        print(f"perf.trace: {error}", file=sys.stderr)
        return 1
    (chosen.out / "trace.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
