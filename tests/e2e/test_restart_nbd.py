"""NBD clients that connect again by themselves go on without an error, whichever process is killed under them."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests import tools
from tests.chaos.kill_each import Fio
from tests.e2e.load import PAUSE
from tests.e2e.node import DEADLINE, MIB, Node, eventually
from tests.e2e.test_restart import kill_main, served_by_another
from tests.nbdclient import RawClient

MakeNode = Callable[..., Node]
KINDS = ["ggate", "disk", "worker", "main", "restart"]
BLOCK = 64 << 10
BLOCKS = 64


def strike(node: Node, kind: str) -> None:
    """Kill it, and return when the socket is served again."""
    worker = int(eventually(lambda: node.status()["workerpid"], "a worker"))
    if kind == "main":
        kill_main(node)
        node.start()
    elif kind == "restart":
        node.ctl("restart")
    elif kind == "worker":
        os.kill(worker, signal.SIGKILL)
    else:
        pid = int(eventually(lambda: stage(node, kind), f"a {kind} stage"))
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: stage(node, kind) not in (0, pid), f"a new {kind} stage")
        return
    served_by_another(node, worker)


def stage(node: Node, kind: str) -> int:
    return next((pid for pid, title in node.titles().items() if title.endswith(f"): {kind}")), 0)


class QemuIo:
    """qemu's NBD client, which writes one block after the other, each with a pattern, until it is told to stop."""

    def __init__(self, node: Node) -> None:
        image = f"driver=nbd,server.type=unix,server.path={node.socket()},export=,reconnect-delay={DEADLINE:.0f}"
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            ["qemu-io", "--image-opts", image], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True,
            env=node.env,
        )  # fmt: skip
        self.writes = 0
        self.error = ""
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def do(self, command: str) -> str:
        """Have one command carried out; the line that says how it went."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if "bytes at offset" in line or "failed" in line:
                return line
        return "it ended"

    def _run(self) -> None:
        while not self.stop.is_set():
            said = self.do(f"write -P {self.writes % 251} {self.writes % BLOCKS * BLOCK} {BLOCK}")
            if f"wrote {BLOCK}/{BLOCK}" not in said:
                self.error = said
                return
            self.writes += 1
            self.stop.wait(PAUSE)

    def check(self) -> None:
        """All that was acknowledged is there, and nothing else has failed."""
        self.stop.set()
        self.thread.join()
        assert not self.error, self.error
        for number in range(max(0, self.writes - BLOCKS), self.writes):
            said = self.do(f"read -P {number % 251} {number % BLOCKS * BLOCK} {BLOCK}")
            assert f"read {BLOCK}/{BLOCK}" in said, said

    def close(self) -> None:
        self.stop.set()
        self.process.kill()
        self.process.wait()
        self.thread.join()


def test_qemu_goes_on(node: Node) -> None:
    tools.need("qemu-io")
    client = QemuIo(node)
    try:
        for kind in KINDS:
            strike(node, kind)
            before = client.writes
            eventually(lambda before=before: client.error or client.writes > before + 1, f"it goes on after {kind}")
        client.check()
    finally:
        client.close()


@contextmanager
def through_nbdkit(node: Node) -> Iterator[str]:
    """nbdkit between: it repeats what its server did not answer. The URI of its socket."""
    socket = node.directory / "nbdkit.sock"
    options = ["retries=30", "retry-delay=1", "retry-exponential=no"]
    command = ["nbdkit", "-f", "-U", socket, "--filter=retry", "nbd", f"socket={node.socket()}", "retry=30", *options]
    with subprocess.Popen(command, env=node.env) as nbdkit:
        eventually(socket.exists, "nbdkit listens")
        try:
            yield f"nbd+unix:///?socket={socket}"
        finally:
            nbdkit.terminate()
            nbdkit.wait(DEADLINE)
            socket.unlink(missing_ok=True)


@pytest.mark.slow
def test_clients_behind_nbdkit_go_on(node: Node) -> None:
    tools.need("nbdkit", "fio")
    with through_nbdkit(node) as uri:
        writer = Fio(node.env, "--ioengine=nbd", f"--uri={uri}")
        try:
            for kind in KINDS:
                strike(node, kind)
                written = node.status()["stat_write"]
                eventually(
                    lambda written=written: writer.failure or node.status()["stat_write"] != written,
                    f"fio goes on after {kind}",
                )
        finally:
            writer.end()


@pytest.mark.parametrize("how", ["hastd killed", "restart", "worker killed"])
def test_nbd_clients_do_not_find_another_component(make_node: MakeNode, how: str) -> None:
    """Those that connect again by themselves have no other data under them either."""
    node = make_node({"disk": 8 * MIB})
    node.primary()
    with RawClient(node.socket()) as client:
        assert client.write(0, b"x" * 512) == 0
    good, other = node.conf.read_text(), node.components / "other"
    with other.open("wb") as file:
        file.truncate(node.component().stat().st_size)
    node.conf.write_text(good.replace(f"local {node.component()}\n", f"local {other}\n"))
    node.create()
    if how == "hastd killed":
        kill_main(node)
        node.start()
    elif how == "restart":
        assert node.ctl("restart", check=False).returncode == os.EX_TEMPFAIL
    else:
        node.conf.write_text(good)
        other.rename(node.component())
        os.kill(int(node.status()["workerpid"]), signal.SIGKILL)
    eventually(lambda: node.status()["role"] == "init", "it does not go on")
    assert "the settings or the component have changed" in node.said()
    assert not node.socket().exists()
    node.set_role("primary")  # that is another matter


def test_reload_is_no_reason_not_to_go_on(make_node: MakeNode) -> None:
    """The component that there is since then is the one that is gone on with."""
    node = make_node({"disk": 8 * MIB})
    node.primary()
    other = node.components / "other"
    with other.open("wb") as file:
        file.truncate(node.component().stat().st_size)
    node.conf.write_text(node.conf.read_text().replace(f"local {node.component()}\n", f"local {other}\n"))
    node.create()
    assert node.hastd is not None
    node.hastd.send_signal(signal.SIGHUP)
    eventually(lambda: node.status()["localpath"] == str(other) and node.socket().exists(), "the other component")
    with RawClient(node.socket()) as client:
        assert client.write(0, b"x" * 512) == 0
    os.kill(int(node.status()["workerpid"]), signal.SIGKILL)
    eventually(lambda: "starting its worker again" in node.said(), "the end of the worker is noticed")
    eventually(lambda: node.status()["status"] == "degraded" and node.socket().exists(), "it goes on")
    kill_main(node)
    node.start()
    eventually(lambda: node.status()["status"] == "degraded" and node.socket().exists(), "it goes on")
    with RawClient(node.socket()) as client:
        assert client.read(0, 512) == b"x" * 512
