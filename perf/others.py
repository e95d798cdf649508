"""What hast is compared with: servers that do not replicate, user-space mirrors, and the bare file.

- nbdkit file, qemu-nbd: one file, no replication: what a front end alone costs.
- quorum: qemu-storage-daemon whose quorum driver writes to a local file and to the NBD export of another storage
  daemon, and answers when both have (vote-threshold 2); it reads the local file (read-pattern fifo), as hast does. Over
  TCP, qemu's client and server (seen with 7.2) stall each other for some 40 ms now and then when several requests are
  under way: "quorum unix" has a Unix socket between the daemons, where that does not happen. It shows the driver at
  its best, without the cost of TCP that hast pays.
- mirror: a storage daemon that mirrors a local file to the export of another one, in copy-mode write-blocking; "mirror
  unix" in the same way.
- file: fio on the file itself, with libaio: what the disk, or memory, can do.

Each of them keeps no activemap and no counters: after a crash it copies everything, or does not know that it has to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from perf.errors import need
from perf.fio import Target
from perf.measure import System
from perf.qmp import start_mirror
from perf.scene import Scene, server
from tests.e2e.node import loopback

PORT = 10809
REMOTE = 60000  # numbers of loopback addresses for the daemons' exports

Build = Callable[[Scene], AbstractContextManager[System]]


def nbd(path: Path, export: str = "") -> Target:
    return Target("nbd", f"nbd+unix:///{export}?socket={path}")


@contextmanager
def simple(name: str, command: Callable[[Path, Path], list[str]], scene: Scene) -> Iterator[System]:
    """One process for each target, with a Unix socket."""
    need(command(Path(), Path())[0])
    with ExitStack() as stack:
        targets, pids = [], []
        for number in range(scene.targets):
            stem = f"{name.replace(' ', '-')}{number}"
            sock, file = scene.sockets / f"{stem}.sock", scene.file(stem)
            pids.append(stack.enter_context(server(command(sock, file), sock.exists)))
            targets.append(nbd(sock))
        yield System(name, tuple(targets), scene.size, lambda: pids)


def nbdkit(scene: Scene) -> AbstractContextManager[System]:
    # -t 16 is its default; the file plugin has no O_DIRECT.
    return simple("nbdkit", lambda sock, file: ["nbdkit", "-f", "-U", str(sock), "file", str(file)], scene)


def qemu_nbd(scene: Scene) -> AbstractContextManager[System]:
    cache = ["--cache=none", "--aio=native"] if scene.direct else []

    def command(sock: Path, file: Path) -> list[str]:
        return ["qemu-nbd", "-t", "-f", "raw", "-e", "8", *cache, "-k", str(sock), str(file)]

    return simple("qemu-nbd", command, scene)


@contextmanager
def bare(scene: Scene) -> Iterator[System]:
    files = [scene.file(f"bare{number}") for number in range(scene.targets)]
    targets = tuple(Target("file", str(file), scene.direct) for file in files)
    yield System("file", targets, scene.size, list)


# ---- storage daemons ----


def blockfile(name: str, file: Path, scene: Scene) -> dict[str, Any]:
    options: dict[str, Any] = {"driver": "file", "node-name": name, "filename": str(file)}
    if scene.direct:
        options |= {"cache": {"direct": True}, "aio": "native"}
    return options


def storage_daemon(
    blockdevs: list[dict[str, Any]], listen: dict[str, Any], export: str, node: str, pidfile: Path, *more: str
) -> list[str]:
    """The command of a daemon that exports a node under the name `export`; the pidfile appears when it does."""
    command = ["qemu-storage-daemon", "--pidfile", str(pidfile)]
    for blockdev in blockdevs:
        command += ["--blockdev", json.dumps(blockdev)]
    wanted = {"type": "nbd", "id": export, "node-name": node, "name": export, "writable": True}
    return [*command, *more, "--nbd-server", json.dumps({"addr": listen}), "--export", json.dumps(wanted)]


@contextmanager
def daemons(name: str, tcp: bool, mirror: bool, scene: Scene) -> Iterator[System]:
    """For each target two daemons, one of which writes to both files, its own and, over NBD, the other's."""
    need("qemu-storage-daemon")
    with ExitStack() as stack:
        targets, pids = [], []
        for number in range(scene.targets):
            start = mirrored if mirror else voted
            stem = f"{name.replace(' ', '-')}{number}"
            pids += stack.enter_context(start(stem, tcp, scene))
            targets.append(nbd(scene.sockets / f"{stem}.sock", "near"))
        yield System(name, tuple(targets), scene.size, lambda: pids)


@contextmanager
def far_daemon(stem: str, tcp: bool, scene: Scene) -> Iterator[tuple[int, dict[str, Any]]]:
    """The daemon of the other node: its process ID, and the blockdev that reaches its export."""
    between: dict[str, Any] = {"type": "unix", "path": str(scene.sockets / f"{stem}.far.sock")}
    if tcp:
        # A port that is only used on an address that is: the directory's name is as good as a random number.
        address = loopback(REMOTE + hash(stem + str(scene.sockets)) % 4000000)
        between = {"type": "inet", "host": address, "port": str(PORT)}
    pidfile = scene.sockets / f"{stem}.far.pid"
    file = blockfile("far", scene.file(f"{stem}.remote"), scene)
    with server(storage_daemon([file], between, "far", "far", pidfile), pidfile.exists) as pid:
        yield pid, {"driver": "nbd", "node-name": "remote", "server": between, "export": "far"}


@contextmanager
def voted(stem: str, tcp: bool, scene: Scene) -> Iterator[list[int]]:
    with far_daemon(stem, tcp, scene) as (far_pid, remote):
        both = {
            "driver": "quorum",
            "node-name": "both",
            "vote-threshold": 2,
            "rewrite-corrupted": False,
            "read-pattern": "fifo",
            "children": ["local", "remote"],
        }
        pidfile = scene.sockets / f"{stem}.pid"
        blockdevs = [blockfile("local", scene.file(f"{stem}.local"), scene), remote, both]
        listen = {"type": "unix", "path": str(scene.sockets / f"{stem}.sock")}
        with server(storage_daemon(blockdevs, listen, "near", "both", pidfile), pidfile.exists) as pid:
            yield [far_pid, pid]


@contextmanager
def mirrored(stem: str, tcp: bool, scene: Scene) -> Iterator[list[int]]:
    with far_daemon(stem, tcp, scene) as (far_pid, remote):
        monitor, pidfile = scene.sockets / f"{stem}.qmp", scene.sockets / f"{stem}.pid"
        more = ["--chardev", f"socket,id=qmp,path={monitor},server=on,wait=off", "--monitor", "chardev=qmp"]
        blockdevs = [blockfile("local", scene.file(f"{stem}.local"), scene), remote]
        listen = {"type": "unix", "path": str(scene.sockets / f"{stem}.sock")}
        with server(storage_daemon(blockdevs, listen, "near", "local", pidfile, *more), pidfile.exists) as pid:
            start_mirror(monitor, "local", "remote")
            yield [far_pid, pid]


OTHERS: dict[str, Build] = {
    "nbdkit": nbdkit,
    "qemu-nbd": qemu_nbd,
    "quorum": partial(daemons, "quorum", True, False),
    "quorum unix": partial(daemons, "quorum unix", False, False),
    "mirror": partial(daemons, "mirror", True, True),
    "mirror unix": partial(daemons, "mirror unix", False, True),
    "file": bare,
}
