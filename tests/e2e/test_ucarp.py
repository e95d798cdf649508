"""Two machines that share an address by ucarp, as far as network namespaces can be machines: the active one dies, the
other one takes over address, device, file system and services."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from hast.device import fuse
from tests import tools
from tests.e2e.hookrig import HOOKS, Hooks
from tests.e2e.node import DEADLINE, MIB, ROOT, eventually
from tests.e2e.pair import Pair, PairNode
from tests.e2e.test_block_device import stage_pid
from tests.faultdisk import FaultDisk

ADDRESSES = ("10.99.0.1", "10.99.0.2")
CLIENT, SHARED, PORT = "10.99.0.3", "10.99.0.10", 8080

# The services of a node: a writer of files (tests/e2e/filewriter.py), and a web server that shows them.
SERVICE = """#!/bin/sh
cd {root}
case "$2 $1" in
"writer start") setsid {python} -m tests.e2e.filewriter {point} {node}-$(date +%s%N) 0.02 >>{directory}/safe 2>&1 & ;;
"web start") setsid {python} -m http.server -d {point} -b {shared} {port} >>{directory}/web.log 2>&1 & ;;
*" stop") [ ! -f {directory}/$2.pid ] || kill $(cat {directory}/$2.pid) || : ;;
esac
[ "$1" = stop ] || echo $! >{directory}/$2.pid
"""
FETCH = """
import sys, urllib.request
sys.stdout.buffer.write(urllib.request.urlopen(sys.argv[1], timeout=2).read())
"""


class Network:
    """Three network namespaces: those of the nodes, and one with a bridge between them, on which there is a client."""

    def __init__(self) -> None:
        self.names = {end: f"hast-test-{os.getpid()}-{end}" for end in ("hasta", "hastb", "client")}
        for name in self.names.values():
            self.ip("netns", "add", name)
        self.ip("-n", self.names["client"], "link", "add", "bridge", "type", "bridge")
        self.address("client", "bridge", CLIENT)
        for node, address in zip(("hasta", "hastb"), ADDRESSES, strict=True):
            self.ip(
                *("link", "add", "eth0", "netns", self.names[node], "type", "veth"),
                *("peer", "name", f"to-{node}", "netns", self.names["client"]),
            )
            self.ip("-n", self.names["client"], "link", "set", f"to-{node}", "master", "bridge", "up")
            self.address(node, "eth0", address)

    def address(self, end: str, interface: str, address: str) -> None:
        self.ip("-n", self.names[end], "address", "add", f"{address}/24", "dev", interface)
        self.link(end, interface, "up")

    def link(self, end: str, interface: str, state: str) -> None:
        self.ip("-n", self.names[end], "link", "set", interface, state)

    @staticmethod
    def ip(*arguments: str) -> str:
        done = subprocess.run([str(tools.find("ip")), *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
        return done.stdout

    def inside(self, end: str) -> list[str]:
        """What to write before a command that is to run there. Not `ip netns exec`: mounts are to stay common."""
        return [str(tools.find("nsenter")), f"--net=/run/netns/{self.names[end]}"]

    def fetch(self, path: str) -> bytes | None:
        """From the web server at the shared address, as the client gets it; None when it does not."""
        command = [*self.inside("client"), sys.executable, "-c", FETCH, f"http://{SHARED}:{PORT}/{path}"]
        done = subprocess.run(command, capture_output=True, check=False, timeout=DEADLINE)
        return done.stdout if done.returncode == 0 else None

    def close(self) -> None:
        for name in self.names.values():
            self.ip("netns", "del", name)


class Machine:
    """A node with its hooks, its ucarp and its services."""

    def __init__(self, network: Network, node: PairNode, skew: int) -> None:
        self.network, self.node, self.skew = network, node, skew
        service = node.directory / "node-service"
        self.hooks = Hooks(
            node,
            f'start_service="{service} start" stop_service="{service} stop" services="writer web"\n'
            "down_role=secondary prefix=24",
        )
        words = {"root": ROOT, "python": sys.executable, "directory": node.directory, "node": node.node}
        service.write_text(SERVICE.format(point=self.hooks.point, shared=SHARED, port=PORT, **words))
        service.chmod(0o755)
        node.prefix = network.inside(node.node)
        self.ucarp: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """hastd and ucarp, as at the start of a machine."""
        self.node.start()
        command = [
            *self.network.inside(self.node.node), str(tools.find("ucarp")), "-i", "eth0", "-s", self.node.address,
            "-v", "7", "-p", "secret", "-a", SHARED, "-b", "1", "-r", "2", "-k", str(self.skew), "-z",
            "-u", str(HOOKS / "vip-up"), "-d", str(HOOKS / "vip-down"), "-x", str(self.hooks.settings),
        ]  # fmt: skip
        with (self.node.directory / "ucarp.out").open("ab") as out:
            self.ucarp = subprocess.Popen(
                command, env=self.node.env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )

    def tell_events(self) -> None:
        """As `exec /etc/ucarp/hast-hook` in hast.conf does; hastd is started later."""
        with (self.node.directory / "hook").open("a") as hook:
            hook.write(f'exec {HOOKS}/hast-ucarp.sh event {self.hooks.settings} "$@"\n')

    def die(self) -> None:
        """The machine is gone: nothing of it answers, and then nothing of it runs."""
        self.network.link(self.node.node, "eth0", "down")
        self.node.kill()
        assert self.ucarp is not None
        self.ucarp.wait(DEADLINE)
        self.node.run("umount", "-l", self.hooks.point)
        self.network.ip("-n", self.network.names[self.node.node], "address", "flush", "dev", "eth0")

    def boot(self) -> None:
        shutil.rmtree(self.node.directory / "ucarp")  # what is in /run is gone
        self.network.address(self.node.node, "eth0", self.node.address)
        self.start()

    def stop(self) -> None:
        """ucarp ends as it does when the machine is shut down: the address, and all else, is given up."""
        assert self.ucarp is not None
        self.ucarp.terminate()
        self.ucarp.wait(DEADLINE)
        eventually(lambda: self.hooks.status() == "down", "down")

    def safe(self) -> dict[str, str]:
        """SHA-256 by name of the files whose fsync has returned on this machine; its writer may be about to begin."""
        path = self.node.directory / "safe"
        lines = path.read_bytes().decode().split("\n")[:-1] if path.exists() else []
        return dict(line.split() for line in lines if not line.startswith("filewriter: "))

    def said(self) -> str:
        files = [self.hooks.log, *(self.node.directory / name for name in ("ucarp.out", "web.log"))]
        return "\n".join(f"---- {file}\n{file.read_text()[-5000:]}" for file in files if file.exists())


@pytest.fixture
def machines(make_pair: Callable[..., Pair]) -> Iterator[tuple[Network, Pair, Machine, Machine]]:
    """A pair of machines with a file system on their resource; nothing runs yet."""
    tools.need_root()
    tools.need("ucarp", "ip", "nsenter", "mkfs.ext4")
    if (reason := fuse.usable()) is not None:
        pytest.skip(reason)
    network = Network()
    try:
        pair = make_pair({"disk": 128 * MIB}, device="fuse", addresses=ADDRESSES, hooks=True)
        one, other = (Machine(network, node, skew) for node, skew in zip(pair.nodes, (0, 50), strict=True))
        pair.up()
        pair.a.run("mkfs.ext4", "-q", pair.a.device())
        pair.wait_in_sync(pair.a)
        for node in pair.nodes:
            node.stop()
        yield network, pair, one, other
        for machine in (one, other):
            print(machine.said())
            machine.node.stop()
            machine.node.kill()
    finally:
        network.close()


def wait_served(network: Network, machine: Machine) -> None:
    """The client gets a file that this machine has written just now."""

    def served() -> bool:
        name, digest = list(machine.safe().items())[-1]
        content = network.fetch(name)
        return content is not None and hashlib.sha256(content).hexdigest() == digest

    before = len(machine.safe())
    eventually(lambda: len(machine.safe()) > before, "its writer goes on")
    eventually(served, f"{machine.node.node} serves the shared address")


def check(machine: Machine, safe: dict[str, str]) -> None:
    for name, digest in safe.items():
        assert hashlib.sha256((machine.hooks.point / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.timeout(400)
def test_the_active_machine_dies(machines: tuple[Network, Pair, Machine, Machine]) -> None:
    """Twice, the other one the second time: it comes back, is brought up to date, and can take over again."""
    network, pair, one, other = machines
    for machine in (one, other):
        machine.start()
    eventually(lambda: "up" in (one.hooks.status(), other.hooks.status()), "one is up")
    active, standby = (one, other) if one.hooks.status() == "up" else (other, one)
    safe: dict[str, str] = {}
    for _ in range(2):
        wait_served(network, active)
        pair.wait_settled(active.node)
        assert standby.hooks.status() == "down" and standby.hooks.is_down("secondary")
        before = len(active.safe())
        eventually(lambda active=active, before=before: len(active.safe()) > before + 20, "files")
        active.die()
        safe |= active.safe()
        eventually(lambda standby=standby: standby.hooks.status() == "up", "the other one takes over")
        wait_served(network, standby)
        check(standby, safe)
        active.boot()
        active, standby = standby, active
        eventually(lambda standby=standby: standby.hooks.status() == "down", "the dead one is back")
    assert "failed" not in one.hooks.said() + other.hooks.said()
    # In good order: who is active gives up, the other one takes over.
    pair.wait_settled(active.node)
    active.stop()
    assert active.hooks.is_down("secondary")
    safe |= active.safe()
    eventually(lambda: standby.hooks.status() == "up", "the other one takes over")
    wait_served(network, standby)
    check(standby, safe)
    standby.stop()


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.timeout(400)
def test_hastd_cannot_serve_the_active_machine_any_more(machines: tuple[Network, Pair, Machine, Machine]) -> None:
    """A process of it dies, and a flush fails that nobody hears of: hastd gives the role up, and the other machine,
    which has everything, is to be the active one."""
    network, pair, one, other = machines
    disk = FaultDisk.under(pair.a)
    for machine in (one, other):
        machine.tell_events()
    one.start()
    eventually(lambda: one.hooks.status() == "up", "it is up")
    other.start()
    eventually(lambda: "synchronisation complete" in pair.a.said(), "the other one has everything")
    wait_served(network, one)
    disk.hang("flush")
    eventually(lambda: disk.stats().waiting, "the disk is asked")
    os.kill(stage_pid(pair.a, "ggate"), signal.SIGKILL)
    disk.fail("flush", errno.EIO, count=1)
    disk.release()
    eventually(lambda: "the role is init now" in pair.a.said(), "it serves nobody")
    eventually(lambda: other.hooks.status() == "up", "the other one takes over")
    wait_served(network, other)
    check(other, one.safe())
    eventually(lambda: one.hooks.status() == "down", "it has given up all else")
    pair.wait_settled(pair.b)
    assert one.hooks.is_down("secondary")
    other.stop()
    one.stop()
