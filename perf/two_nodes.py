"""Speed of two nodes on one machine, beside qemu-storage-daemon's quorum driver, in one run; failover; resync.

hast: two hastd on addresses in 127/8, one resource for each replication mode. Quorum: a storage daemon that writes to
a local file and, over TCP, to the NBD export of another storage daemon, and answers when both have answered
(vote-threshold 2). Figures are medians over the rounds, ratios are to "quorum"; "cpu" is that of all processes on both
sides. After each job both of hast's components are compared. Components are files in memory (/dev/shm), the clients
come through NBD on a Unix socket: what is measured is the path of a request, not disks and not a network.

Reads: hast reads its local component. Quorum by default reads both children and compares them; "quorum fifo" is a pair
of its own with read-pattern fifo, which reads the local file only, as hast does. It writes as "quorum" does.

Over TCP, with several requests under way, qemu's client and server (seen with 7.2) stall each other for some 40 ms now
and then: see the p99 of "quorum". "quorum unix" has a Unix socket between its storage daemons instead, where that does
not happen: it shows the driver at its best, without the cost of TCP that hast pays.

Failover: the primary is killed (SIGKILL), then `hastctl role primary` is run on the secondary; timed from its start to
the first acknowledged write. Resync: to a new component of 1 GiB, timed by what `hastctl status --json` shows, from the
moment that the secondary has the connection to the moment that the primary is "complete" (asked every few
milliseconds over the control socket, because running hastctl takes a good part of the time that is to be measured).

Needs fio (nbd engine), qemu-storage-daemon, and a built checkout.

    python perf/two_nodes.py [--rounds N] [--seconds N] [--json FILE]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import common
from common import JOBS, SIZE, Figures, Result, System

sys.path.insert(0, str(common.ROOT))
from tests.e2e.node import MIB, component_size, loopback
from tests.e2e.pair import Pair, PairNode, said
from tests.nbdclient import FLUSH, WRITE, RawClient

MODES = ("fullsync", "memsync", "async")
BLOCK = 4096
FAILOVERS = 7
PORT = 10809


@contextmanager
def hast(sizes: dict[str, int], resource_conf: str | dict[str, str] = "") -> Iterator[Pair]:
    """Two nodes with their components in memory, in sync, `a` primary; default settings but for resource_conf."""
    pair = Pair(sizes, conf="", resource_conf=resource_conf)
    try:
        pair.up()
        yield pair
    except BaseException:
        print(said([pair]), file=sys.stderr)
        raise
    finally:
        for complaint in pair.close():
            print(complaint, file=sys.stderr)


def nbd(node: PairNode, resource: str, kind: int, offset: int = 0, data: bytes = b"") -> None:
    """A connection for one request, answered when this returns."""
    with RawClient(node.socket(resource)) as client:
        answer = client.do(kind, offset, len(data), 0, data)
    if answer.error:
        sys.exit(f"{resource}: request {kind} failed with error {answer.error}")


def compare(pair: Pair, resource: str) -> None:
    """Exits unless the data of both components is the same, once all that was acknowledged is on both."""
    nbd(pair.a, resource, FLUSH)
    at = pair.differing(resource)
    if at is not None:
        sys.exit(f"{resource}: the components differ at offset {at}")


# ---- jobs ----


def hast_systems(pair: Pair) -> Iterator[System]:
    def system(mode: str) -> System:
        return System(
            f"hast {mode}",
            pair.a.uri(mode),
            lambda: pair.a.pids() + pair.b.pids(),
            lambda: compare(pair, mode),
        )

    return map(system, MODES)


def storage_daemon(blockdevs: list[dict[str, Any]], listen: dict[str, Any], export: str, pidfile: Path) -> list[str]:
    """The command of a qemu-storage-daemon that exports the last of the nodes; the pidfile appears when it does."""
    command = ["qemu-storage-daemon", "--pidfile", str(pidfile)]
    for blockdev in blockdevs:
        command += ["--blockdev", json.dumps(blockdev)]
    wanted = {"type": "nbd", "id": export, "node-name": blockdevs[-1]["node-name"], "name": export, "writable": True}
    return [*command, "--nbd-server", json.dumps({"addr": listen}), "--export", json.dumps(wanted)]


@contextmanager
def quorum(
    directory: Path, memory: Path, name: str = "quorum", pattern: str = "quorum", tcp: bool = True
) -> Iterator[System]:
    """Two storage daemons with TCP or a Unix socket between them; `pattern` is the driver's read-pattern."""
    local, remote = (common.empty_file(memory / f"{name}.{side}") for side in ("local", "remote"))
    sock, far_sock, far_ready, near_ready = (directory / f"{name}.{n}".replace(" ", "-") for n in range(4))
    between = {"type": "unix", "path": str(far_sock)}
    if tcp:
        # hast's nodes have numbers from 1 on, as many as there are nodes
        host = loopback(os.getpid() * 16 + (15 if pattern == "quorum" else 14))
        between = {"type": "inet", "host": host, "port": str(PORT)}
    far = storage_daemon([{"driver": "file", "node-name": "far", "filename": str(remote)}], between, "far", far_ready)
    near = storage_daemon(
        [
            {"driver": "file", "node-name": "local", "filename": str(local)},
            {"driver": "nbd", "node-name": "remote", "server": between, "export": "far"},
            {
                "driver": "quorum",
                "node-name": "quorum",
                "vote-threshold": 2,
                "rewrite-corrupted": False,
                "read-pattern": pattern,
                "children": ["local", "remote"],
            },
        ],
        {"type": "unix", "path": str(sock)},
        "near",
        near_ready,
    )
    with common.server(far, far_ready.exists) as far_pid, common.server(near, near_ready.exists) as near_pid:
        yield System(
            name,
            f"nbd+unix:///near?socket={sock}",
            lambda: [far_pid, near_pid],
            reads_only=pattern != "quorum",
        )


def jobs(rounds: int, seconds: int) -> Result:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hastperf.")))
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hastperf.", dir="/dev/shm")))
        pair = stack.enter_context(hast(dict.fromkeys(MODES, SIZE), {mode: f"replication {mode}" for mode in MODES}))
        systems = [
            *hast_systems(pair),
            stack.enter_context(quorum(directory, memory)),
            stack.enter_context(quorum(directory, memory, "quorum unix", tcp=False)),
            stack.enter_context(quorum(directory, memory, "quorum fifo", pattern="fifo")),
        ]
        return common.measure(systems, JOBS, rounds, seconds)


def ratio(by_system: dict[str, Figures], name: str) -> float:
    return by_system[name]["rate"] / by_system["quorum"]["rate"]


# ---- failover and resync ----


def failovers(count: int) -> list[float]:
    """Seconds from the start of `hastctl role primary`, the peer just killed, to the first acknowledged write."""
    taken = []
    with hast({"disk": 64 * MIB}) as pair:
        active, standby = pair.a, pair.b
        for n in range(count):
            nbd(active, "disk", WRITE, n * BLOCK, os.urandom(BLOCK))
            active.kill()
            began = time.monotonic()
            standby.role("primary")
            nbd(standby, "disk", WRITE, (count + n) * BLOCK, os.urandom(BLOCK))
            taken.append(time.monotonic() - began)
            active.start()
            active.set_role("secondary")
            active, standby = standby, active
            pair.wait_in_sync(active)
        nbd(active, "disk", FLUSH)
        if pair.differing() is not None:
            sys.exit("the components differ after the failovers")
    return taken


def resyncs(rounds: int) -> list[float]:
    """MB/s of full resyncs of SIZE bytes to a component that was created anew."""
    rates = []
    with hast({"disk": SIZE}) as pair:
        common.fio(pair.a.uri(), common.FILL, None)
        for _ in range(rounds):
            pair.b.stop()
            pair.b.component().unlink()
            with pair.b.component().open("wb") as file:
                file.truncate(component_size(SIZE))
            pair.b.create()
            pair.b.start()
            pair.b.set_role("secondary")
            rates.append(SIZE / 1e6 / resync_seconds(pair))
            compare(pair, "disk")
    return rates


def resync_seconds(pair: Pair) -> float:
    def until_complete(node: PairNode) -> float:
        deadline = time.monotonic() + 120
        while node.status()["status"] != "complete":
            if time.monotonic() > deadline:
                sys.exit(f"{node.node} is not complete within 120 s")
            time.sleep(0.005)
        return time.monotonic()

    # A secondary is complete when it is connected, a primary when nothing is left to synchronise either.
    connected = until_complete(pair.b)
    if pair.a.status()["status"] == "complete":
        sys.exit("nothing was synchronised to a component created anew, or too fast to be timed")
    return until_complete(pair.a) - connected


def main() -> None:
    args = common.arguments(__doc__, "fio", "qemu-storage-daemon")
    print(f"Two nodes on one machine; {common.machine()}", flush=True)
    result = jobs(args.rounds, args.seconds)
    print(common.table(result, JOBS, "to quorum", ratio), flush=True)
    print("After each job of hast both components were identical.")
    taken = failovers(FAILOVERS)
    print(
        f"Failover, from hastctl role primary to the first acknowledged write, peer absent: median "
        f"{statistics.median(taken):.3f} s of {len(taken)} ({min(taken):.3f} to {max(taken):.3f})",
        flush=True,
    )
    rates = resyncs(args.rounds)
    print(
        f"Full resync of {SIZE >> 20} MiB: median {statistics.median(rates):.0f} MB/s of {len(rates)} "
        f"({min(rates):.0f} to {max(rates):.0f})"
    )
    if args.json:
        everything = {"jobs": result, "failover_seconds": taken, "resync_mb_per_second": rates}
        args.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
