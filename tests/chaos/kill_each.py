"""kill -9 of every kind of process of two nodes, under load: python -m tests.chaos.kill_each --rounds 50

On the primary's block device is a mounted ext4; fio writes files there and verifies them, again and again, and a steady
client (tests/chaos/steady.py) measures how long nobody answered. In each round one process of each kind is killed, and
both nodes have to be whole again before the next. At the end: no I/O error, no verify error, a clean file system, and
the same data on both nodes. The table that is printed has for each kind the number of kills and the longest pause.

Needs root, FUSE, loop devices, fio and e2fsprogs. tests/e2e/test_restart.py has a few rounds of it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from hast.device import fuse
from tests import tools
from tests.chaos.steady import SteadyProcess
from tests.e2e.node import DEADLINE, MIB, eventually
from tests.e2e.pair import Pair, PairNode

SIZE = 128 * MIB
# In this order one that starts the primary's worker anew is never far: it knows nothing of a connection that flaps, so
# that the nodes are connected again soon.
KINDS = [
    "primary worker", "primary disk", "secondary recv",
    "primary spawner", "primary ggate", "secondary disk",
    "primary main", "primary keeper", "primary restart", "secondary worker",
    "primary worker", "secondary spawner", "secondary keeper",
    "primary main", "secondary main", "secondary restart",
]  # fmt: skip


@dataclass
class Tally:
    """How often, and the longest pause that the client has seen meanwhile, in seconds."""

    kills: int = 0
    longest: float = 0.0
    pauses: list[float] = field(default_factory=list)

    def add(self, pause: float) -> None:
        self.kills += 1
        self.longest = max(self.longest, pause)
        self.pauses.append(pause)


class Fio:
    """fio over and over; each run writes, and verifies what it wrote. `where`: its options for engine and target."""

    def __init__(self, env: dict[str, str], *where: str) -> None:
        self.command = [
            str(tools.find("fio")), "--name=verified", "--size=16m", "--rw=randwrite", "--bsrange=512-64k",
            "--iodepth=16", "--rate=8m", "--minimal", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
            "--fsync=64", *where,
        ]  # fmt: skip
        self.env = env
        self.runs = 0
        self.failure = ""
        self.stop = False
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while not self.stop and not self.failure:
            done = subprocess.run(self.command, capture_output=True, text=True, env=self.env, check=False)
            self.runs += 1
            if done.returncode != 0:
                self.failure = f"fio exited with {done.returncode}: {done.stdout}{done.stderr}"

    def end(self) -> None:
        """After the run that is under way. AssertionError when one has failed."""
        self.stop = True
        self.thread.join()
        assert not self.failure, self.failure


class Rig:
    """Two nodes with a mounted file system on the primary's device, and load on it."""

    def __init__(self, pair: Pair, primary: PairNode) -> None:
        self.pair = pair
        self.primary, self.secondary = primary, pair.other(primary)
        self.mnt = primary.directory / "mnt"

    @contextlib.contextmanager
    def load(self) -> Iterator[tuple[SteadyProcess, Fio]]:
        """The load, and at its end the proof that it has met no error."""
        node = self.primary
        node.run(str(tools.find("mkfs.ext4")), "-q", node.device())
        self.mnt.mkdir()
        node.run("mount", node.device(), self.mnt)
        files = self.mnt / "files"
        files.mkdir()
        steady = SteadyProcess(self.mnt / "steady", node.env)
        fio = Fio(node.env, f"--directory={files}", "--ioengine=libaio", "--direct=1")
        try:
            yield steady, fio
            steady.end()
        finally:
            steady.process.kill()
            try:
                fio.end()
            finally:
                node.run("umount", self.mnt)
        node.run(str(tools.find("e2fsck")), "-f", "-n", node.device())

    def pid(self, node: PairNode, kind: str) -> int:
        """The process; 0 while there is none."""
        if kind == "main":
            assert node.hastd is not None
            return node.hastd.pid
        names = {
            "spawner": "hastd: spawner",
            "keeper": "hastd: keeper",
            "worker": f"hastd: {node.name()} ({'primary' if node is self.primary else 'secondary'})",
        }
        wanted = names.get(kind)
        return next(
            (pid for pid, t in node.titles().items() if t == wanted or (not wanted and t.endswith(f"): {kind}"))), 0
        )

    def connections(self) -> int:
        """How often the primary has found its secondary."""
        return self.primary.log.read_text(errors="replace").count(": connected to ")

    def strike(self, what: str) -> None:
        """One kind of death, and all that follows until both nodes are whole again."""
        side, kind = what.split()
        node = self.primary if side == "primary" else self.secondary
        before = self.connections()
        if kind == "restart":
            node.ctl("restart")
        else:
            pid = int(eventually(lambda: self.pid(node, kind), f"{what} runs"))
            os.kill(pid, signal.SIGKILL)
            if kind == "main":
                assert node.hastd is not None
                node.hastd.wait(DEADLINE)
                node.start()
            eventually(lambda: self.pid(node, kind) not in (0, pid), f"a new {what} after {pid}")
        if kind != "keeper":
            eventually(lambda: self.connections() > before, f"{what}: connected again")
        self.pair.wait_connected(self.primary)

    def round(self, kinds: list[str], steady: SteadyProcess, fio: Fio, tallies: dict[str, Tally]) -> None:
        """Each of these kinds once."""
        for what in kinds:
            steady.ask()
            self.strike(what)
            longest = steady.progress()
            tallies.setdefault(what, Tally()).add(longest)
            assert not fio.failure, fio.failure


@contextlib.contextmanager
def rig(pair: Pair, seconds: float) -> Iterator[Rig]:
    """Two connected nodes. A watchdog aborts the device after so many seconds: nobody is to hang on it for ever."""

    def abort() -> None:
        for node in pair.nodes:
            fuse.abort(node.rundir, node.name())

    watchdog = threading.Timer(seconds, abort)
    watchdog.daemon = True
    watchdog.start()
    try:
        pair.create("-e", "131072", "-k", "16")
        pair.start()
        pair.roles(pair.a)
        yield Rig(pair, pair.a)
    finally:
        watchdog.cancel()


def table(tallies: dict[str, Tally]) -> str:
    """Kind, kills, median and longest pause."""
    lines = [f"{'kind':20} {'kills':>5} {'median s':>9} {'longest s':>9}"]
    for what, tally in tallies.items():
        pauses = sorted(tally.pauses)
        lines.append(f"{what:20} {tally.kills:5} {pauses[len(pauses) // 2]:9.3f} {tally.longest:9.3f}")
    return "\n".join(lines)


def run(rounds: int, seconds: float, tell: Callable[[str], None]) -> dict[str, Tally]:
    """So many kills of each kind, or as many as fit into the time."""
    pair = Pair({"disk": SIZE}, device="fuse")
    tallies: dict[str, Tally] = {}
    deadline = time.monotonic() + seconds
    try:
        with rig(pair, seconds + 3 * DEADLINE) as r, r.load() as (steady, fio):
            for number in range(rounds):
                for what in KINDS:
                    if time.monotonic() < deadline and tallies.get(what, Tally()).kills < rounds:
                        r.round([what], steady, fio, tallies)
                tell(f"round {number + 1}: {fio.runs} runs of fio")
        pair.wait_in_sync(pair.a)
        differing = pair.differing()
        assert differing is None, f"the nodes differ at {differing}"
    except BaseException:
        for node in pair.nodes:
            tell(f"---- hastd of {node.node}\n{node.said()}")
        raise
    finally:
        complaints = pair.close()
        tell("\n".join(complaints))
    assert not complaints, complaints
    return tallies


def main() -> int:
    parser = argparse.ArgumentParser(description="kill -9 of every kind of process, under load")
    parser.add_argument("--rounds", type=int, default=50, help="kills of each kind")
    parser.add_argument("--seconds", type=float, default=3600, help="do not begin another one after so long")
    arguments = parser.parse_args()
    tallies = run(arguments.rounds, arguments.seconds, lambda text: print(text, flush=True))
    print(table(tallies))
    print(f"{sum(t.kills for t in tallies.values())} kills, no I/O error, no verify error, both nodes the same")
    return 0


if __name__ == "__main__":
    sys.exit(main())
